"""The gate: what only babbles fails after a few tokens, judged by what the parents say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmevo.engines.scoring.hf import HfScorer
from llmevo.errors import CandidateError, ConfigError
from llmevo.evaluation.gate import PROMPTS, Gate, fault, loops, read_prompts
from llmevo.run.log import events
from support.workspace import Workspace

LATIN = frozenset({"LATIN"})

SENSE = [
    "The sea is wide and blue, and it covers more than two thirds of the earth's surface. It holds many animals.",
    "1. Flour\n2. Water\n3. Yeast\n\nMix them well and wait for an hour before you put the dough into a hot oven.",
    "Paris",
    "42.",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday: a week has seven days, and they are called so.",
]


class Said:
    """A model that gives these replies."""

    def __init__(self, *replies: str) -> None:
        self.said = replies

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        assert all(request.args[1]["max_gen_toks"] == 48 for request in requests)
        return [self.said[place % len(self.said)] for place in range(len(requests))]


def gate(*parents: Any, asked: Sequence[str] = PROMPTS) -> Gate:
    named = [(f"parent{place}", parent) for place, parent in enumerate(parents)]
    return Gate(asked, tokens=48, share=0.5).calibrated(named)


@pytest.mark.parametrize(
    "reply", [*SENSE, "Το νερό είναι γαλάζιο. The sea is blue and wide, and many fish live in it."]
)
def test_ordinary_replies_have_no_fault(reply: str) -> None:
    assert fault(reply, LATIN) == ""


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        (" \n\n ", "empty"),
        ("!!! ... ???", "without a word"),
        ("the " * 40, "looping"),
        ("ha" * 60, "looping"),
        ("\n".join(["The answer is 12, so the answer is 12."] * 5), "looping"),
        ("Once there was a fox. " + "He saw the crow. " * 9, "looping"),
        ("海は広くて青い。" * 10, "looping"),
        ("Море синее.", "in another script"),
        ("海は青い。", "in another script"),
    ],
)
def test_degenerate_replies_are_told_by_their_fault(reply: str, reason: str) -> None:
    assert fault(reply, LATIN) == reason


def test_a_short_reply_does_not_loop() -> None:
    assert not loops("no no no no no no")


def test_a_candidate_fails_with_its_reason_and_a_reply() -> None:
    guard = gate(Said(*SENSE))
    guard.check(Said(*SENSE[:2], "the " * 40))
    with pytest.raises(
        CandidateError, match=r"gate: of 8 short replies 6 are degenerate \(6 looping\), such as 'the t"
    ):
        guard.check(Said(SENSE[0], "the " * 40, "the " * 40, "the " * 40))


def test_equal_prompts_are_one() -> None:
    guard = gate(Said(*SENSE), asked=[*["Say hello."] * 12, "Name a colour."])
    assert [*guard.prompts] == ["Say hello.", "Name a colour."]


def test_what_a_parent_does_is_no_fault() -> None:
    loop, russian = "the " * 40, "Море широкое и синее, в нём живут рыбы."
    guard = gate(Said(*SENSE), Said(loop, loop, loop, SENSE[0]), Said(russian))
    guard.check(Said(russian))
    guard.check(Said(loop, loop, loop, SENSE[0]))
    with pytest.raises(CandidateError, match="8 are degenerate"):
        guard.check(Said(loop))


class Silent:
    """A model whose outputs are not numbers."""

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        raise CandidateError("the model's outputs are not numbers")


def test_a_parent_that_says_nothing_sets_no_limit() -> None:
    guard = gate(Silent(), Said(*SENSE))
    guard.check(Said(*SENSE))
    with pytest.raises(CandidateError, match="not numbers"):
        guard.check(Silent())


class Expert:
    """A model that talks sense only at prompts with one of these words in it."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        prompts = [request.args[0] for request in requests]
        return [SENSE[0] if any(word in prompt for word in self.words) else "the " * 40 for prompt in prompts]


def test_where_a_parent_babbles_at_the_tasks_own_prompts_others_tell_what_is_broken() -> None:
    asked = [f"{n} + {n} =" for n in range(8)]
    sums, talker = Expert("+", "12", "Tell"), Expert("e")
    guard = gate(sums, talker, asked=asked)
    assert guard.warning == ""
    assert len(guard.prompts) == 8
    assert any("+" in prompt for prompt in guard.prompts)  # each parent has some that it can reply to
    assert guard.share < 1
    guard.check(sums)
    guard.check(talker)
    with pytest.raises(CandidateError, match="8 are degenerate"):
        guard.check(Expert())
    assert gate(sums, Expert("="), asked=asked).prompts == asked


def test_where_a_parent_babbles_at_all_there_is_to_ask_the_gate_says_that_it_is_off() -> None:
    guard = gate(Said(*SENSE), Said("the " * 40), Said(SENSE[0], ""))
    assert guard.idle
    assert guard.warning.startswith(
        "gate: it is off, for of the 8 short replies of parent1, a parent, 8 are degenerate (8 looping), such as 'the"
    )
    assert "gate.prompts" in guard.warning
    guard.check(Said("the " * 40))


def test_where_a_parent_babbles_at_most_of_it_the_gate_says_how_little_it_stops() -> None:
    guard = gate(Said(*SENSE), Expert("fox", "12"))
    assert not guard.idle
    assert "a candidate fails only when more than 6 replies are, for of the 8 short replies of parent1" in guard.warning
    guard.check(Expert("fox", "12"))
    with pytest.raises(CandidateError, match="8 are degenerate"):
        guard.check(Expert())
    assert gate(Said(*SENSE), Said(SENSE[0], "the " * 40)).warning == ""


def test_prompts_are_read_a_line_each_and_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("One?\n\n  Two?  \n", "utf-8-sig")  # as Windows' editors write
    assert read_prompts(file) == ["One?", "Two?"]
    file.write_text("\n")
    with pytest.raises(ConfigError, match="has no prompts"):
        read_prompts(file)


# Languages

FOREIGN = {
    "de": "Ein Fuchs sah eine Krähe mit einem Stück Käse im Schnabel. Er lobte ihre Stimme, bis sie zu singen begann.",
    "id": "Ibu kota Prancis adalah Paris. Kota ini terletak di tepi sungai Seine dan memiliki dua juta penduduk.",
    "fr": "Il faut de la farine, de l'eau et de la levure. On mélange le tout et on attend une heure avant la cuisson.",
    "es": "La respuesta es cuarenta y dos, porque doce más treinta son cuarenta y dos.",
    "it": "Il mare è grande e azzurro e copre più di due terzi della superficie della terra. Ci vivono molti animali.",
    "pt": "O mar é largo e azul e cobre mais de dois terços da superfície da terra. Muitos animais vivem nele.",
    "nl": "Om brood te bakken heb je meel, water en gist nodig. Kneed alles goed en laat het deeg een uur rusten.",
    "sv": "För att baka bröd behöver man mjöl, vatten och jäst. Blanda allt väl och vänta en timme.",
    "pl": "Do upieczenia chleba potrzeba mąki, wody i drożdży. Wszystko trzeba dobrze wymieszać i odczekać godzinę.",
    "tr": "Ekmek yapmak için un, su ve maya gerekir. Hepsini iyice karıştırın ve bir saat bekleyin.",
    "vi": "Biển rộng và xanh, bao phủ hơn hai phần ba bề mặt trái đất. Có rất nhiều loài động vật sống trong đó.",
    "ru": "Море широкое и синее, и оно покрывает более двух третей поверхности земли.",
    "ja": "海は広くて青い。地球の表面の三分の二以上を覆っていて、魚がたくさん住んでいる。",
    "hi": "समुद्र विशाल और नीला है और पृथ्वी की सतह के दो तिहाई से अधिक भाग को ढकता है।",
}

NO_LANGUAGE = [
    "def add(a, b):\n    return a + b\n\n\nprint(add(12, 30))",
    "import numpy as np\n\nx = np.zeros((3, 4))\nfor i in range(len(x)):\n    x[i] += i\nprint(x.sum())",
    '#include <stdio.h>\nint main(void) { int x = 42; printf("%d\\n", x); return 0; }',
    "SELECT name, age FROM users WHERE age > 30 ORDER BY name LIMIT 10;",
    '<div class="row"><span id="total">42</span><a href="index.html">Home</a></div>',
    "42, 17, 23, 8, 99, 101, 12, 55, 67, 1, 0, 3.14159, 2.71828, -17, 256, 1024, 4096",
    "x = (-b + sqrt(b^2 - 4ac)) / (2a), sin^2(x) + cos^2(x) = 1, \\frac{1}{2} \\int_0^1 x^2 dx = \\frac{1}{6}",
    "Hans Müller, Jürgen Schmidt, Wolfgang Schneider, Friedrich Weber, Heinrich Wagner, Karl Becker",
    "Jakarta, Surabaya, Bandung, Medan, Semarang, Makassar, Palembang, Denpasar, Yogyakarta",
    "José García, María Rodríguez, Juan Hernández, Carmen López, Miguel González, Ana Martínez",
    "Baguette, Croissant, Brioche, Pain au chocolat, Ciabatta, Focaccia, Pretzel, Pumpernickel",
]

QUICKSTART = [  # as its base model, its experts and broken merges of them write
    " 115\n\nThis is the sum of the first two numbers, 60 and 55, which is 115.\n\nThe next number is 70, so",
    " which, individual, a, has",
    " Mars, using, well, it, be, may, setting, And, has, individual, water, through, first, been, that",
    " grandmother\n\nThe grandmother of Jayden is Susan, who is married to Finn, and William is their child.",
    " 22\n\nThis is a classic example of a recursive sequence, where the output is the previous input multiplied by",
    " son\n son drafts drafts son son of the arvae and the output nuns, initially, the son drafts which are in",
    "the of and to in a is that it for was on are as with his they at be this from have or by one had not but what",
]


@pytest.mark.parametrize("code", FOREIGN)
def test_another_language_is_told_and_a_parents_or_the_prompts_is_not_another(code: str) -> None:
    reply, english = FOREIGN[code], SENSE[0]
    with pytest.raises(CandidateError, match=rf"\(8 in another language, {code}\)"):
        gate(Said(*SENSE)).check(Said(reply))
    gate(Said(*SENSE), Said(english, english, reply)).check(Said(reply))
    native = gate(Said(reply), asked=[reply])
    native.check(Said(reply))
    with pytest.raises(CandidateError, match=r"in another language, en"):
        native.check(Said(english))


@pytest.mark.parametrize("reply", [*NO_LANGUAGE, *QUICKSTART, *SENSE])
def test_code_numbers_names_and_bad_english_are_in_no_other_language(reply: str) -> None:
    gate(Said(*SENSE)).check(Said(reply))


def test_a_few_words_are_in_no_language_and_where_none_is_known_none_is_another() -> None:
    gate(Said(*SENSE)).check(Said("Das Meer ist blau."))
    gate(Said("42"), asked=["12 + 30 ="]).check(Said(FOREIGN["de"]))
    assert fault(FOREIGN["de"]) == ""
    with pytest.raises(CandidateError, match="in another script"):
        gate(Said(*SENSE)).check(Said("Море синее."))


# In a run


def test_a_run_goes_on_without_what_fails_at_the_gate(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = HfScorer.generate_until

    def babbling(self: HfScorer, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The parents, the uniform merge and a candidate talk; then one does not."""
        assert len(real(self, requests, disable_tqdm)) == len(requests)
        asked.append(len(requests))
        return [SENSE[0] if len(asked) != 7 else "the " * 40] * len(requests)

    monkeypatch.setattr(HfScorer, "generate_until", babbling)
    (workspace.root / "prompts.txt").write_text("ab?\ncd?\n")
    search = {"optimizer": "random", "budget": 6, "population": 3, "seed": 3}
    given = workspace.config(gate={"prompts": "prompts.txt", "tokens": 16}, search=search, heldout=None)
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    assert asked == [2 + len(PROMPTS)] * 2 + [2] * 6  # to calibrate, and for every candidate
    failed = [event for event in workspace.events("run") if isinstance(event, events.Failed)]
    assert [event.candidate for event in failed] == [4]
    assert "gate: of 2 short replies 2 are degenerate (2 looping), such as 'the the" in failed[0].reason
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_a_run_says_once_that_its_gate_is_off_and_asks_no_candidate(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def babbling(_: HfScorer, requests: list[Any], **_options: Any) -> list[str]:
        asked.append(len(requests))
        return ["the " * 40] * len(requests)

    monkeypatch.setattr(HfScorer, "generate_until", babbling)
    search = {"optimizer": "random", "budget": 5, "population": 2, "seed": 3}
    given = workspace.config(gate=True, search=search, heldout=None)
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    assert asked == [len(PROMPTS)] * 2  # to calibrate
    assert printed.count("gate: it is off, for of the 8 short replies of one, a parent, 8 are degenerate") == 1
    assert not [event for event in workspace.events("run") if isinstance(event, events.Failed)]
    printed = workspace.llmevo("compare", given, "--optimizers", "random", "--seeds", 2, "--out", "many")[1]
    assert printed.count("gate: it is off") == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"prompts": "none.txt"}, ("gate.prompts", "none.txt", "cannot be read")),
        ({"token": 48}, ("gate", "token", "tokens")),
        ({"tokens": 2}, ("gate", "tokens", "16")),
    ],
)
def test_mistakes_are_named(workspace: Workspace, value: dict[str, Any], words: tuple[str, ...]) -> None:
    status, printed = workspace.llmevo("run", workspace.config(gate=value), "--out", "run")
    assert status == 2
    assert all(word in printed for word in words), printed
    assert not (workspace.root / "run").exists()
