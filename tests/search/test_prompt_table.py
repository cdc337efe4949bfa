"""The genes as a table: how the prompt shows them, how an answer's table is read; templates and the schema."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmevo.errors import ConfigError
from llmevo.evaluation.score import Score
from llmevo.llm.templates import Templates, foreign
from llmevo.search.prompts import STYLES, completion
from llmevo.search.prompts.chat import TOKENS, tokens
from llmevo.search.prompts.names import shortened
from llmevo.search.prompts.question import ROWS, Question
from llmevo.search.prompts.reading import read
from llmevo.search.prompts.schema import answer_model
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Trial
from support.spaces import space

TASKS = {"sums": (1.0, "acc,none"), "dates": (-0.5, "exact_match,number")}


def scored(
    place: int, genes: Genes, total: float, origin: str = "llm", note: str = "", tasks: tuple[float, float] = (0.0, 0.0)
) -> Trial:
    metrics = {"sums": {"acc,none": tasks[0]}, "dates": {"exact_match,number": tasks[1]}}
    return Trial(Candidate(place, 1, origin, genes, note), Score(total, 0.01, metrics, 20))


def question(trials: tuple[Trial, ...] = (), over: SearchSpace | None = None, **keys: Any) -> Question:
    options: dict[str, Any] = {"wanted": 2, "generation": 3, "sigma": 0.15, "used": 17, "budget": 80, **keys}
    return Question(over or space(), trials, TASKS, **options)


def both(a: float, b: float) -> Genes:
    return {"alpha/all/weight": a, "beta/all/weight": b}


def chat_text(asked: Question, templates: Templates | None = None) -> str:
    prompt = STYLES["chat"].ask(asked, templates or Templates(), 0)
    return "\n".join(message["content"] for message in prompt.messages)


def history(count: int) -> tuple[Trial, ...]:
    return tuple(scored(i, both(i % 149 / 100, i % 97 / 100), i / 10_000) for i in range(count))


# The prompt for chat models


def test_the_chat_prompt_shows_the_models_slices_and_parameters_by_name() -> None:
    text = chat_text(question(over=space(layer_granularity=2, filters=["self_attn"])))
    for name in ("alpha.self_attn.weight", "beta.other.weight", "layers 0-1", "layers 2-3", "task_arithmetic"):
        assert name in text


def test_long_names_that_differ_in_the_middle_keep_what_tells_them_apart() -> None:
    names = [f"Llama-3.1-8B-Instruct-{kind}-checkpoint-2000-merged" for kind in ("math", "code", "law")]
    for longest in (40, 28, 16):
        found = shortened(names, longest)
        assert all(kind in found[name] for name, kind in zip(names, ("math", "code", "law"), strict=True))
        assert max(map(len, found.values())) <= longest
    same = [f"{'x' * 40}{letter * 30}{'z' * 40}" for letter in "abc"]  # too long to show where they differ
    assert len({*shortened(same, 20).values()}) == 3
    assert shortened(["one", "two"], 40) == {"one": "one", "two": "two"}


def test_the_chat_prompt_says_how_models_are_prepared_and_where_their_sum_is_a_merge() -> None:
    said = {step: chat_text(question(over=space(prepare=[step]))) for step in ("regmean", "tsv")}
    assert all(f"to the prepared ones, 1 ({step})\n" in text for step, text in said.items())
    assert "With all weights 100 the merge is RegMean's own" in said["regmean"]
    assert "RegMean" not in said["tsv"]
    assert "prepared" not in chat_text(question())
    assert "RegMean" not in chat_text(question(over=space(prepare=["regmean"], merge_method="ties")))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, ["weight may be 0 to 150 (100 is 1): the factor of all that the model adds", "need not sum to 100.\n"]),
        ({"merge_method": "ties"}, ["kept, the largest ones\n", "\nThe weights of a row are divided by their sum"]),
        ({"merge_method": "dare_linear"}, ["kept, at random\n", "need not sum to 100.\n"]),
        ({"merge_method": "della"}, ["large ones more often\n", "(1000 is 1): a row's largest entry is kept with"]),
        ({"merge_method": "linear"}, ["the model's weight in the mean\n", "only their ratios count.\n"]),
        ({"merge_method": "linear", "normalize": False}, ["The weights of a row should sum to about 100.\n"]),
        ({"merge_method": "slerp"}, ["(100 is 1): 0 is alpha, 1 is beta\n"]),
        ({"merge_method": "slerp", "models": 1}, ["(100 is 1): 0 is base, 1 is alpha\n"]),
        ({"merge_method": "slerp", "models": 3}, ["in the ratio of their shares\n"]),
        ({"merge_method": "nearswap", "models": 1}, ["and not beyond it (base towards alpha)\n"]),
        (
            {"merge_method": "sce"},
            ["a parameter, of one model or of all.", "those that differ most between the models\n"],
        ),
        (
            {"merge_method": ["ties", "linear"]},
            ["in ties the factor of", "; in linear the model's weight", "\nIn ties, linear the weights of a row are"],
        ),
    ],
)
def test_the_chat_prompt_says_what_each_parameter_of_the_search_does(keys: dict[str, Any], said: list[str]) -> None:
    over = space(**keys)
    text = chat_text(question(over=over))
    assert [one for one in said if one not in text] == []
    divided = over.genome.methods[0].normalize and over.genome.normalize is None
    assert ("need not sum" in text) == ("need not sum" in str(said))
    assert ("divided by their sum" in text) == bool(divided)
    masked = chat_text(question(over=over, mask_names=True))
    assert not [word for word in (*over.names.values(), "weight", "task vector", "ties") if word in masked]


def test_the_short_prompt_says_what_the_integers_are_and_its_example_can_be_copied() -> None:
    text = chat_text(question(over=space(merge_method="ties"), short=True))
    assert "- weight: 0 to 150 (100 is 1): the factor of all" in text
    assert "only their ratios count" in text
    copied = re.search(r'"beliefs": \[(.*?)\]', text)
    assert copied
    said = json.loads(copied[1]) | {"model": "alpha"}
    assert read(json.dumps({"beliefs": [said]}), question(over=space(merge_method="ties"), short=True)).beliefs


def test_the_metrics_of_several_aims_are_said_to_be_hundredths() -> None:
    assert "Metrics are shown in hundredths)" in chat_text(question(weights={"sums": 0.5, "dates": 0.5}))


def test_a_single_task_whose_metric_is_the_score_is_shown_once() -> None:
    trials = tuple(
        Trial(
            Candidate(i, 1, "llm", both(i / 20, 7 * i % 12 / 20)),
            Score(i / 20, 0.0, {"sums": {"acc,none": i / 20}}, 20),
        )
        for i in range(12)
    )
    once = replace(question(trials), tasks={"sums": (1.0, "acc,none")})
    text, other = chat_text(once), chat_text(replace(once, tasks={"sums": (2.0, "acc,none")}))
    assert "score; rows of the table" in text
    assert "\n#11 llm 0.550; [55 25] (best)" in text
    assert "\n#11 llm 0.550; 55; [55 25] (best)" in other
    assert re.findall(r"^- (?:score|sums): (?=alpha|beta)", text, re.MULTILINE) == ["- score: "]
    assert len(re.findall(r"^- (?:score|sums): (?=alpha|beta)", other, re.MULTILINE)) == 2


def test_the_chat_prompt_shows_every_task_with_its_weight_and_metric() -> None:
    text = chat_text(question())
    assert "- sums: 1 × acc\n" in text
    assert "- dates: -0.5 × exact_match,number, less is better\n" in text


def test_the_chat_prompt_shows_what_each_parent_scores_on_each_task_and_is_the_best_at() -> None:
    parents = (
        scored(0, both(1, 0), 0.711, "parent", "alpha", (0.823, 0.224)),
        scored(1, both(0, 1), 0.25, "parent", "beta", (0.3, 0.1)),
    )
    text = chat_text(question(parents))
    assert "- alpha #0: 0.711; 82 22; best at sums\n" in text
    assert "- beta #1: 0.250; 30 10; best at dates\n" in text  # its weight is negative: lower is better


def test_a_parent_that_is_no_point_of_the_space_is_shown_among_the_models_only() -> None:
    over = space(merge_method="sce")
    parent = scored(0, over.parent(over.merged[0]), 0.7, "parent", "alpha", (0.8, 0.2))
    outside = scored(1, both(3.0, 0), 0.6, "parent", "alpha")
    for trial, where in ((parent, over), (outside, space())):
        asked = question((trial,), where)
        for style in STYLES:
            text = STYLES[style].ask(asked, Templates(), 0).messages[-1]["content"]
            assert (f"- alpha #{trial.candidate.id}: 0." in text) == (style == "chat")
            assert f"\n#{trial.candidate.id}" not in text
        assert read(answer([[50]] if where is over else [[30, 60]]), asked).proposals


def test_the_chat_prompt_shows_how_much_of_the_budget_is_used_and_how_many_proposals_will_be_scored() -> None:
    text = chat_text(question(slots=1, share=0.25))
    assert "17 of 80 evaluations are used, 63 left; your share of them is 25 %." in text
    assert "Propose 2 recipes" in text
    assert ", the most important first; 1 will be scored, in your order." in text
    assert text.count("Propose ") == 1
    assert "your last prompt" not in text
    assert "The end is near" not in text
    assert "Propose up to 2 recipes" in chat_text(question())


@pytest.mark.parametrize(("used", "said"), [(78, "your last prompt: exploit only"), (75, "The end is near")])
def test_the_chat_prompt_says_when_the_end_is_near(used: int, said: str) -> None:
    assert said in chat_text(question(slots=2, used=used))


def test_the_chat_prompt_lists_candidates_worst_to_best_as_hundredths() -> None:
    text = chat_text(
        question((scored(4, both(0.31, 0.62), 0.5), scored(5, both(1.5, 0), 0.9), scored(6, both(0, 1), 0.1)))
    )
    lines = ["#6 llm 0.100; 0 0; [0 100]", "#4 llm 0.500; 0 0; [31 62]", "#5 llm 0.900; 0 0; [150 0]"]
    assert "\n".join(lines) in text


def test_the_chat_prompt_tells_why_the_latest_candidates_failed() -> None:
    failed = Trial(Candidate(9, 1, "llm", both(0, 0)), None, "the merged norm.weight is not finite")
    assert "FAILED #9 llm [0 0]: the merged norm.weight is not finite\n" in chat_text(question((failed,)))


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_is_hardly_longer_after_2000_trials_than_after_100(style: str) -> None:
    def length(count: int) -> int:
        prompt = STYLES[style].ask(question(history(count)), Templates(), 0)
        return sum(tokens(message["content"]) for message in prompt.messages)

    if style == "chat":
        assert length(2000) <= TOKENS
    else:
        assert length(2000) <= length(100) + ROWS * 3  # longer candidate numbers, and nothing else


def test_a_very_long_failure_reason_does_not_fill_the_prompt() -> None:
    failed = Trial(Candidate(9, 1, "llm", both(0, 0)), None, "boom " * 10_000)
    assert len(chat_text(question((failed,)))) < len(chat_text(question())) + 400


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_can_be_asked_before_there_is_any_trial(style: str) -> None:
    assert STYLES[style].ask(question(), Templates(), 0).messages[-1]["content"]


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_carries_its_generation_and_seed(style: str) -> None:
    prompt = STYLES[style].ask(question(), Templates(), 41)
    assert (prompt.generation, prompt.seed) == (3, 41)


# Templates


@pytest.mark.parametrize("wrong", ["{{ colour }}", "{{ q.colour }}", "{{ colour.name }}"])
def test_a_template_with_an_unknown_variable_is_an_error_that_names_file_and_variable(
    tmp_path: Path, wrong: str
) -> None:
    (tmp_path / "chat_user.j2").write_text(f"Use {wrong}")
    with pytest.raises(ConfigError, match=r"chat_user\.j2.*colour"):
        chat_text(question(), Templates(tmp_path))


def test_a_template_with_a_broken_tag_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "chat_system.j2").write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"chat_system\.j2"):
        chat_text(question(), Templates(tmp_path))


def test_a_users_folder_overrides_one_template_and_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "chat_user.j2").write_text("My own words about {{ q.space.merged | length }} models")
    prompt = STYLES["chat"].ask(question(), Templates(tmp_path), 0)
    assert prompt.messages[1]["content"] == "My own words about 2 models"
    assert prompt.messages[0]["content"] == STYLES["chat"].ask(question(), Templates(), 0).messages[0]["content"]


def test_the_templates_texts_are_those_in_use(tmp_path: Path) -> None:
    (tmp_path / "completion.j2").write_text("{{ target }}")
    texts = Templates(tmp_path).texts(["completion.j2", "chat_user.j2"])
    assert texts["completion.j2"] == "{{ target }}"
    assert "RECIPES" in texts["chat_user.j2"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch touched') }}",
        "{{ q.space.genome.parse_raw(pickled, proto='pickle', allow_pickle=True) }}",
        "{{ q.space.genome.parse_file('touched') }}",
        "{{ q.points.tofile('touched') }}",
        "{{ q.points.sum().tofile('touched') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(q) }}",
        "{% for number in range(10 ** 9) %}x{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_runs_no_code_and_what_it_may_not_do_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = question((scored(0, both(0.5, 0.5), 0.5),))
    with pytest.raises(ConfigError, match=r"prompts/chat_user\.j2: "):
        Templates(recorded={"chat_user.j2": template}).render(
            "chat_user.j2", q=asked, pickled=b"cposix\nsystem\n(S'touch touched'\ntR."
        )
    assert not (tmp_path / "touched").exists()


def test_a_template_may_call_macros_and_the_methods_of_texts_and_lists() -> None:
    template = (
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('a').upper() }} {{ '{:.1f}'.format(q.sigma) }}"
        "{% for key, value in {'a': 1}.items() %} {{ key }}{{ loop.cycle('!', '?') }}{% endfor %} {{ range(3) | list }}"
    )
    assert Templates(recorded={"own.j2": template}).render("own.j2", q=question(sigma=0.25)) == "AA 0.2 a! [0, 1, 2]"


def test_templates_of_a_log_are_known_when_they_are_llmevos_or_the_users_own(tmp_path: Path) -> None:
    ours = Templates().texts(["chat_user.j2", "repair.j2"])
    assert not foreign({**ours, "chat/rubric": "What is good"})
    assert foreign({**ours, "repair.j2": "Again!"}) == ["repair.j2"]
    (tmp_path / "repair.j2").write_text("Again!")
    assert not foreign({**ours, "repair.j2": "Again!"}, tmp_path)


def test_a_missing_template_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llm\.prompts.*nowhere"):
        Templates(tmp_path / "nowhere")


# Reading the answers of chat models


OPINION: dict[str, Any] = {"reason": "r", "kind": "refine", "spread": ["same"], "predicted_score": 0.5}


def answer(*genomes: Any, **more: Any) -> str:
    proposals = [{**OPINION, "genome": genome} for genome in genomes]
    return json.dumps({"analysis": "why", "proposals": proposals, **more})


def read_genes(text: str, *known: Trial) -> list[Genes]:
    return [proposal.genes for proposal in read(text, question(known)).proposals]


def test_a_valid_answer_becomes_candidates_with_their_reasons() -> None:
    reading = read(answer([[30, 60]], [[120, 5]]), question())
    assert [p.genes for p in reading.proposals] == [both(0.3, 0.6), both(1.2, 0.05)]
    assert {(p.origin, p.note) for p in reading.proposals} == {("llm", "r")}
    assert (reading.analysis, reading.problems) == ("why", [])


def test_no_more_proposals_are_taken_than_were_wanted() -> None:
    assert len(read_genes(answer([[1, 2]], [[11, 12]], [[21, 22]], [[31, 32]]))) == 2


@pytest.mark.parametrize(
    "text",
    [
        "```json\n%s\n```",
        "Here is what I propose.\n\n%s",
        '<think>Maybe {"proposals": [{"genome": [[99, 99]]}]} would do?</think>\n%s',
        "A set {1, 2} of ideas, then: %s Good luck!",
    ],
    ids=["fenced", "prose before", "thoughts before", "braces before"],
)
def test_an_answer_is_found_wherever_it_stands(text: str) -> None:
    assert read_genes(text % answer([[30, 60]])) == [both(0.3, 0.6)]


def test_decimals_are_taken_as_weights_and_the_reading_says_so() -> None:
    reading = read(answer([[0.3, 1.0]]), question())
    assert [p.genes for p in reading.proposals] == [both(0.3, 1.0)]
    assert any("decimals" in problem for problem in reading.problems)


def test_decimals_beyond_every_bound_are_still_hundredths() -> None:
    assert read_genes(answer([[30.5, 60]])) == [both(0.305, 0.6)]


@pytest.mark.parametrize(
    "genome", [[["30", " 60 "]], [30, 60], {"all": [30, 60]}, {"alpha": 30, "beta": 60}, "flat"], ids=repr
)
def test_a_genome_in_another_shape_with_one_meaning_is_understood(genome: Any) -> None:
    text = json.dumps({"genome": [[30, 60]]}) if genome == "flat" else answer(genome)
    assert read_genes(text) == [both(0.3, 0.6)]


def test_slices_by_name_are_taken_by_name_in_any_order() -> None:
    over = space(layer_granularity=2)
    reading = read(answer({"2-3": [3, 4], "0-1": [1, 2]}), question(over=over))
    genes = [reading.proposals[0].genes[gene.name] for gene in over.genes]
    assert genes == [0.01, 0.02, 0.03, 0.04]


@pytest.mark.parametrize("genome", [[[30]], [[1, 2, 3]], [], None])
def test_a_genome_of_the_wrong_length_is_dropped_with_a_message(genome: Any) -> None:
    reading = read(answer(genome, [[30, 60]]), question())
    assert [p.genes for p in reading.proposals] == [both(0.3, 0.6)]
    assert any("dropped proposal 1" in problem for problem in reading.problems)


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "1e999", '"nan"', '"much"', "true", "null", "1" + "0" * 400], ids=lambda n: n[:9]
)
def test_what_is_not_a_finite_number_is_dropped_with_a_message(number: str) -> None:
    reading = read(f'{{"proposals": [{{"genome": [[30, {number}]]}}]}}', question())
    assert reading.proposals == []
    assert any("dropped proposal 1" in problem for problem in reading.problems)


def test_values_out_of_bounds_are_clamped_and_the_reading_says_which() -> None:
    reading = read(answer([[-20, 900]]), question())
    assert [p.genes for p in reading.proposals] == [both(0.0, 1.5)]
    assert any("clamped 2" in problem and "beta/all/weight" in problem for problem in reading.problems)


def test_a_repeat_of_a_known_candidate_is_dropped_and_said() -> None:
    reading = read(answer([[30, 60]]), question((scored(0, both(0.3, 0.6), 0.5),)))
    assert reading.proposals == []
    assert any("repeats" in problem for problem in reading.problems)


def test_a_repeat_of_a_failed_candidate_is_dropped() -> None:
    assert read_genes(answer([[30, 60]]), Trial(Candidate(0, 0, "llm", both(0.3, 0.6)), None, "NaN")) == []


def test_proposals_that_repeat_each_other_are_taken_once() -> None:
    reading = read(answer([[30, 60]], [[30, 60]], [[31, 60]]), question())
    assert [p.genes for p in reading.proposals] == [both(0.3, 0.6)]
    assert sum("repeats" in problem for problem in reading.problems) == 2


NONSENSE = {
    "empty": "",
    "prose": "I would rather not.",
    "half": answer([[30, 60]])[:-12],
    "a list": "[[30, 60]]",
    "unfinished thoughts": "<think> 30 or 60?",
    "nested too deep": '{"genome":' + "[" * 50_000,
    "objects too deep": '{"a":' * 20_000,
    "a genome too deep": '{"proposals": [{"genome": ' + '{"a":' * 600 + "1" + "}" * 600 + "}]}",
    "text proposals": '{"proposals": "none"}',
    "no genome": '{"proposals": [{"reason": "lazy"}]}',
    "an empty list": answer(),
    "no proposals": '{"analysis": "hm"}',
}


@pytest.mark.parametrize("text", NONSENSE.values(), ids=NONSENSE)
def test_an_answer_without_a_usable_proposal_gives_none_and_a_problem(text: str) -> None:
    reading = read(text, question())
    assert reading.proposals == []
    assert reading.problems


def test_what_is_kept_of_an_answer_can_be_written_to_the_log() -> None:
    text = '{"analysis": "\\ud800!", "proposals": [{"reason": "\\udfff", "genome": [[30, 60]]}]}'
    reading = read(text, question())
    assert (reading.analysis.encode(), reading.proposals[0].note.encode()) == (b"?!", b"?")


# What an LLM says beside the genome


def test_the_kind_the_prediction_and_the_spread_are_kept() -> None:
    over = space(layer_granularity=2)
    said = {"kind": "Crossover ", "predicted_score": "0.61", "spread": ["tighter", "WIDER"]}
    text = json.dumps({"proposals": [{**OPINION, **said, "genome": [[1, 2], [3, 4]]}]})
    (suggestion,) = read(text, question(over=over)).proposals
    assert (suggestion.kind, suggestion.expected, suggestion.spread) == ("crossover", 0.61, ("tighter", "wider"))


def test_an_answer_without_them_is_as_good() -> None:
    (suggestion,) = read('{"proposals": [{"genome": [[30, 60]]}]}', question()).proposals
    assert (suggestion.genes, suggestion.kind, suggestion.expected, suggestion.spread) == (
        both(0.3, 0.6),
        "",
        None,
        (),
    )


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({"kind": "guess"}, ("", 0.5, ("same",))),
        ({"kind": ["refine"]}, ("", 0.5, ("same",))),
        ({"predicted_score": "high"}, ("refine", None, ("same",))),
        ({"predicted_score": float("nan")}, ("refine", None, ("same",))),
        ({"predicted_score": [0.4]}, ("refine", None, ("same",))),
        ({"spread": "tighter"}, ("refine", 0.5, ("tighter",))),
        ({"spread": {"all": "tighter"}}, ("refine", 0.5, ("tighter",))),
        ({"spread": ["a lot"]}, ("refine", 0.5, ("same",))),
        ({"spread": ["same", "same"]}, ("refine", 0.5, ())),
        ({"spread": 7}, ("refine", 0.5, ("same",))),
    ],
    ids=str,
)
def test_what_of_them_makes_no_sense_is_left_out_and_the_genome_stays(
    said: dict[str, Any], kept: tuple[str, float | None, tuple[str, ...]]
) -> None:
    text = json.dumps({"proposals": [{**OPINION, **said, "genome": [[30, 60]]}]})
    (suggestion,) = read(text, question()).proposals
    assert suggestion.genes == both(0.3, 0.6)
    assert (suggestion.kind, suggestion.expected, suggestion.spread) == kept


# Rows that are lost


@pytest.mark.parametrize(
    "genome",
    [
        [[30, 60]],
        [[30, 60], [1]],
        [[30, 60], [1, None]],
        [[30, 60], ["much", 2]],
        [[30, 60], [1, 2, 3]],
        {"0-1": [30, 60]},
        {"layers 0-1": [30, 60], "2-3": []},
    ],
    ids=str,
)
def test_a_row_that_is_lost_is_taken_from_the_best(genome: Any) -> None:
    over = space(layer_granularity=2)
    best = {gene.name: 0.77 for gene in over.genes}
    trials = (scored(1, over.uniform(), 0.1), scored(2, best, 0.9))
    reading = read(answer(genome), question(trials, over))
    assert [[*p.genes.values()] for p in reading.proposals] == [[0.3, 0.6, 0.77, 0.77]]
    assert any("took 1 of 2 rows from the best recipe" in problem for problem in reading.problems)


@pytest.mark.parametrize("genome", [[[1], [2]], [[1, 2], [3, 4], [5]], [["a", "b"], ["c", "d"]], [[], []]], ids=str)
def test_a_genome_without_a_whole_row_or_with_too_many_is_dropped(genome: Any) -> None:
    reading = read(answer(genome), question(over=space(layer_granularity=2)))
    assert reading.proposals == []
    assert any("dropped proposal 1" in problem for problem in reading.problems)


def test_the_whole_proposals_of_an_answer_that_was_cut_off_are_taken() -> None:
    text = answer([[30, 60]], [[70, 10]], [[90, 90]])
    reading = read(text[: text.rindex("90, 90")], question())
    assert [p.genes for p in reading.proposals] == [both(0.3, 0.6), both(0.7, 0.1)]


# Scales


@pytest.mark.parametrize(
    ("genome", "genes"),
    [
        ([[0.3, 1.0]], (0.3, 1.0)),
        ([[0.9, 1.45]], (0.9, 1.45)),
        ([[0, 1]], (0.0, 0.01)),  # integers: hundredths, as was asked
        ([[1, 1]], (0.01, 0.01)),
        ([[0.5, 30]], (0.005, 0.3)),
    ],
    ids=str,
)
def test_decimals_are_values_only_where_nothing_else_is_possible(genome: Any, genes: tuple[float, float]) -> None:
    assert read_genes(answer(genome)) == [both(*genes)]


def test_decimals_above_a_low_bound_are_values_as_well() -> None:
    over = space(bounds={"weight": [0, 0.7]})
    (suggestion,) = read(answer([[0.9, 0.3]]), question(over=over)).proposals
    assert suggestion.genes == both(0.7, 0.3)


def test_numbers_at_their_ends_without_evidence_are_remarked_upon_and_kept() -> None:
    over = space(layer_granularity=1)
    middle = scored(1, {gene.name: 0.5 for gene in over.genes}, 0.5)
    corner = [[0, 150]] * 4
    reading = read(answer(corner), question((middle,), over))
    assert {*reading.proposals[0].genes.values()} == {0.0, 1.5}
    assert any("8 of 8 numbers at their lowest or highest without evidence" in p for p in reading.problems)
    assert read(answer([[0, 50], [51, 52], [53, 54], [55, 150]]), question((middle,), over)).problems == []


def test_numbers_at_their_ends_are_not_remarked_upon_where_evidence_or_the_best_is_there_too() -> None:
    supported = tuple(scored(i, both(i / 40, 0.5), i / 40) for i in range(40))
    assert read(answer([[150, 51]]), question(supported)).problems == []
    best = scored(1, both(0.0, 0.5), 0.9)
    assert read(answer([[0, 60]]), question((best,))).problems == []


# Size


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10_000_000,
        "<think>" * 1_500_000,
        '{"a": [1, ' * 1_000_000,
        "9" * 10_000_000,
        '{"genome": [[30, 60]]} ' * 400_000,
    ],
    ids=lambda text: text[:10],
)
def test_ten_megabytes_are_read_in_a_moment(text: str) -> None:
    started = time.process_time()
    reading = read(text, question())
    assert time.process_time() - started < 5
    assert len(str(reading)) < 10_000


def test_the_answer_at_the_end_of_long_thoughts_is_found() -> None:
    assert read_genes("<think>" + "{ hm } " * 500_000 + "</think>" + answer([[30, 60]])) == [both(0.3, 0.6)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["genome", "proposals", "all"]), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text() | st.text('{}[]":,0123456789.- <>/think') | JSON.map(json.dumps) | JSON.map(lambda v: answer(v)))
def test_no_text_at_all_makes_a_reader_raise_or_leave_the_bounds(text: str) -> None:
    asked = question()
    for reader in (read, completion.read):
        reading = reader(text, asked)
        assert reading.proposals or reading.problems
        assert all(asked.space.contains(proposal.genes) for proposal in reading.proposals)


# The schema servers hold a model to


def test_the_schema_accepts_an_answer_of_the_right_shape() -> None:
    valid = answer_model(question()).model_validate_json(answer([[0, 150]], [[1, 2]]))
    assert valid.model_dump(by_alias=True)["proposals"][0]["genome"] == [[0, 150]]


@pytest.mark.parametrize(
    "text",
    [
        answer([[30, 60]], mood="good"),
        answer([[30, 60, 1]]),
        answer([[30]]),
        answer([[30, 60], [1, 2]]),
        answer([[30, 151]]),
        answer([[-1, 60]]),
        answer([[30.5, 60]]),
        answer([[1, 2]], [[3, 4]], [[5, 6]]),
        answer(),
        json.dumps({"analysis": "", "proposals": [{**OPINION, "genome": [[30, 60]], "more": 1}]}),
        json.dumps({"analysis": "", "proposals": [{**OPINION, "genome": [[30, 60]], "kind": "guess"}]}),
        json.dumps({"analysis": "", "proposals": [{**OPINION, "genome": [[30, 60]], "spread": ["same", "same"]}]}),
        json.dumps({"analysis": "", "proposals": [{"reason": "r", "genome": [[30, 60]]}]}),
    ],
)
def test_the_schema_refuses_every_other_shape(text: str) -> None:
    with pytest.raises(ValidationError):
        answer_model(question()).model_validate_json(text)


def test_the_schema_in_the_prompt_closes_objects_and_bounds_lists_and_integers() -> None:
    schema: Any = STYLES["chat"].ask(question(), Templates(), 0).schema
    genome = schema["$defs"]["Proposal"]["properties"]["genome"]
    row = genome["items"]
    assert schema["additionalProperties"] is schema["$defs"]["Proposal"]["additionalProperties"] is False
    assert (genome["minItems"], genome["maxItems"], row["minItems"], row["maxItems"]) == (1, 1, 2, 2)
    assert (row["items"]["minimum"], row["items"]["maximum"]) == (0, 150)


# Base models


def test_the_completion_prompt_has_two_digit_lines_worst_to_best_and_ends_open() -> None:
    trials = (scored(1, both(1.5, 0), 0.9), scored(2, both(0, 0.75), 0.1), scored(3, both(0.75, 1.5), 0.5))
    prompt = STYLES["completion"].ask(question(trials), Templates(), 0)
    text = prompt.messages[-1]["content"]
    assert text == "score 00 | 00 50\nscore 50 | 50 99\nscore 99 | 99 00\nscore 99 |"
    assert (prompt.integers, prompt.digits) == (2, 2)
    assert prompt.samples > 1


def test_the_median_of_the_continuations_is_the_first_proposal() -> None:
    reading = completion.read("00 10\n50 20\n99 60", question(wanted=4))
    genes = [[round(99 * value / 1.5) for value in proposal.genes.values()] for proposal in reading.proposals]
    assert genes == [[50, 20], [0, 10], [99, 60]]  # the second line is the median itself
    assert "median" in reading.proposals[0].note


@pytest.mark.parametrize("line", ["10", "10 20 30", "10 200", "prose", "10 " + "1" * 5000], ids=lambda line: line[:9])
def test_a_line_of_other_than_two_digit_integers_is_dropped_and_said(line: str) -> None:
    reading = completion.read(f"{line}\n30 40", question())
    assert len(reading.proposals) == 1
    assert any("dropped a line" in problem for problem in reading.problems)
    assert completion.read(line, question()).proposals == []


# Several merge methods

METHODS = ["ties", "dare_ties", "task_arithmetic"]
WEIGHTED = {"alpha/all/weight": 0.31, "beta/all/weight": 0.62, "alpha/all/density": 0.5, "beta/all/density": 0.9}


def several(**keys: Any) -> SearchSpace:
    return space(merge_method=METHODS, **keys)


def by_slice() -> SearchSpace:
    return several(layer_granularity=2, method_per_slice=True)


def proposal(method: Any, genome: Any) -> str:
    opinion = {**OPINION, "spread": ["same"] * len(genome)}
    return json.dumps({"analysis": "", "proposals": [{**opinion, "merge_method": method, "genome": genome}]})


def test_the_chat_prompt_names_the_methods_what_they_use_and_which_one_each_candidate_has() -> None:
    text = chat_text(question((scored(4, {**WEIGHTED, "merge_method": 1.0}, 0.5),), several()))
    for line in (
        "- ties uses weight, density",
        "- task_arithmetic uses weight",
        "#4 llm 0.500; 0 0; dare_ties; [31 50 62 90] (best)",
    ):
        assert f"{line}\n" in text
    assert "ties or dare_ties or task_arithmetic of 2 models" in text


def test_the_chat_prompt_names_the_method_of_every_slice() -> None:
    over = by_slice()
    genes = {**over.uniform(), "0-1/merge_method": 2.0}
    text = chat_text(question((scored(4, genes, 0.5),), over))
    assert "; task_arithmetic ties; [" in text
    assert "- layers 2-3: ties best 0.500 mean 0.500 of 1\n" in text


@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("dare_ties", 1),
        ("DARE-TIES", 1),
        (" dare ties ", 1),
        (1, 1),
        ("1", 1),
        (["ties"], 0),
        (2.0, 2),
        (7, 2),
        (-1, 0),
    ],
    ids=repr,
)
def test_a_method_may_be_given_by_name_or_place(method: Any, place: int) -> None:
    reading = read(proposal(method, [[31, 50, 62, 90]]), question(over=several()))
    assert [p.genes for p in reading.proposals] == [{**WEIGHTED, "merge_method": float(place)}]
    assert bool(reading.problems) == (method in (7, -1))


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("dare_tis", "merge_method 'dare_tis' is unknown, did you mean 'dare_ties'?"),
        ("soup", "merge_method 'soup' is unknown; known: ties, dare_ties, task_arithmetic"),
        (["ties", "ties"], "it names 2 merge methods, 1 are wanted"),
        (None, "it names 0 merge methods, 1 are wanted"),
        (True, "merge_method 'True' is unknown"),
    ],
)
def test_a_method_that_is_not_known_drops_the_proposal_with_a_message(method: Any, problem: str) -> None:
    reading = read(proposal(method, [[31, 50, 62, 90]]), question(over=several()))
    assert reading.proposals == []
    assert f"dropped proposal 1: {problem}" in reading.problems[0]


@pytest.mark.parametrize(
    ("method", "places"), [(["ties", "dare_ties"], (0, 1)), ("dare_ties", (1, 1)), ({"0-1": 2, "2-3": "ties"}, (2, 0))]
)
def test_every_slice_has_its_method_and_one_name_is_for_all(method: Any, places: tuple[int, int]) -> None:
    reading = read(proposal(method, [[31, 50, 62, 90]] * 2), question(over=by_slice()))
    (genes,) = (p.genes for p in reading.proposals)
    assert (genes["0-1/merge_method"], genes["2-3/merge_method"]) == places


def test_methods_that_stand_in_the_table_are_understood() -> None:
    rows = [["ties", 31, 50, 62, 90], [1, 31, 50, 62, 90]]
    (genes,) = (p.genes for p in read(answer(rows), question(over=by_slice())).proposals)
    assert [*genes.values()].count(0.31) == 2
    assert (genes["0-1/merge_method"], genes["2-3/merge_method"]) == (0.0, 1.0)


def test_the_schema_holds_the_method_to_the_known_names() -> None:
    model = answer_model(question(over=several()))
    assert model.model_validate_json(proposal("ties", [[31, 50, 62, 90]]))
    for method in ("soup", 1, ["ties"]):
        with pytest.raises(ValidationError):
            model.model_validate_json(proposal(method, [[31, 50, 62, 90]]))
    per_slice = answer_model(question(over=by_slice()))
    assert per_slice.model_validate_json(proposal(["ties", "dare_ties"], [[31, 50, 62, 90]] * 2))


def test_a_repeat_is_one_also_where_only_genes_without_effect_differ() -> None:
    known = scored(0, {**WEIGHTED, "merge_method": 2.0}, 0.5)
    reading = read(proposal("task_arithmetic", [[31, 7, 62, 8]]), question((known,), several()))
    assert reading.proposals == []
    assert read(proposal("ties", [[31, 50, 62, 90]]), question((known,), several())).proposals


def test_a_parameter_that_stays_small_is_shown_finer() -> None:
    over = space(merge_method="nearswap", base_model=None)
    text = chat_text(question((scored(1, {"beta/all/t": 0.0034}, 0.5),), over))
    assert "- t may be 0 to 100 (10000 is 1): how far" in text
    assert "; [34]" in text
    assert [p.genes for p in read(answer([[7]]), question(over=over)).proposals] == [{"beta/all/t": 0.0007}]


def test_parameters_that_all_models_share_have_a_column_of_their_own() -> None:
    assert "1=all models.select_topk" in chat_text(question(over=space(merge_method="sce")))


def test_the_completion_prompt_says_what_the_numbers_of_methods_name() -> None:
    trial = scored(1, {**WEIGHTED, "merge_method": 1.0}, 0.9)
    text = STYLES["completion"].ask(question((trial,), several()), Templates(), 0).messages[-1]["content"]
    assert text.startswith("merge methods: 00 ties 01 dare_ties 02 task_arithmetic\n\nscore 99 | 01 20 49 41 89\n")


def test_a_continuation_may_number_or_name_the_method_and_the_commonest_joins_the_median() -> None:
    lines = "01 20 49 41 90\ndare_ties 30 49 41 90\n00 40 49 41 90\n77 50 49 41 90\nsoup 40 49 41 90"
    reading = completion.read(lines, question(over=several(), wanted=9))
    assert [p.genes["merge_method"] for p in reading.proposals] == [1.0, 1.0, 1.0, 0.0, 2.0]
    assert any("clamped 1 of 5" in problem for problem in reading.problems)
    assert any("merge_method 'soup' is unknown" in problem for problem in reading.problems)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=40) | JSON.map(lambda v: proposal(v, [[31, 50, 62, 90]])) | JSON.map(lambda v: answer(v)))
def test_no_text_makes_a_reader_raise_where_there_are_several_methods(text: str) -> None:
    for over in (several(), by_slice()):
        for reader in (read, completion.read):
            reading = reader(text, question(over=over))
            assert reading.proposals or reading.problems
            assert all(over.contains(p.genes) and over.clamp(p.genes) == p.genes for p in reading.proposals)
