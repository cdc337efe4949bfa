"""Tasks that a line of the config describes itself: a text, and a Python function as a metric."""

import hashlib
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmevo.config import read_config
from llmevo.engines.scoring.hf import HfScorer
from llmevo.engines.vllm import longest_text
from llmevo.errors import CandidateError, MachineError, TaskError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.questions import check_disjoint
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.evaluation.tasks.text import cut
from llmevo.run.log import events
from llmevo.run.preflight.questions import directions, lengths
from llmevo.run.scorer import Scorer
from support.tasks import GENERATION, MULTIPLE_CHOICE, ROWS, add_task
from support.workspace import Workspace

PARAGRAPHS = [f"Paragraph {i} begins. " + "Some words, and then some more. " * (3 + i * 7 % 9) for i in range(60)]
CORPUS = "\n\n".join(paragraph.strip() for paragraph in PARAGRAPHS)


pytestmark = pytest.mark.usefixtures("cached")


def line(**values: Any) -> Task:
    return Task.model_validate(values)


def evaluator(folder: Path, *tasks: Task, **protocol: Any) -> Evaluator:
    options: dict[str, Any] = {"apply_chat_template": False, **protocol}
    return Evaluator(tasks, AskingOptions(**options), [folder], folder)


# Lines


def test_a_plain_line_is_written_and_asked_as_ever(tmp_path: Path) -> None:
    task = add_task(tmp_path, "sums", ROWS[:3])
    assert task.model_dump() == {"name": "sums", "weight": 1.0, "metric": "acc,none"}
    scoring = evaluator(tmp_path, task, seed=5)
    protocol = {**asdict(scoring.asking), "seed": None, "shuffle": None}
    for shown in ("share", "after", "blocks"):
        del protocol[shown]
    content = [[{"name": "sums", "weight": 1.0, "metric": "acc,none"}], protocol, [0], sorted(scoring.questions())]
    assert scoring.digest == hashlib.sha256(json.dumps(content).encode()).hexdigest()


@pytest.mark.parametrize("weight", [0.2, -0.2, "0.2"])
def test_a_text_counts_against_the_objective_whatever_its_weights_sign(weight: Any) -> None:
    task = line(text="data/corpus.txt", weight=weight)
    assert (task.name, task.weight, task.metric) == ("corpus", -0.2, "bits_per_byte,none")
    assert line(text="corpus.txt").weight == -1
    assert Task.model_validate(task.model_dump()) == task


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"text": "a.txt", "metric": "word_perplexity,none"}, "'bits_per_byte,none'.*Lower is better"),
        ({"text": "a.txt", "name": "a", "function": "b.py:c"}, "text and function are two kinds"),
        ({"text": "a.txt", "weight": "heavy"}, "weight"),
        ({"name": "a", "function": "b.py"}, "FILE.py:NAME"),
        ({"name": "a", "questions": "b"}, "needs a `function"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        line(**values)


# Texts


def test_a_text_is_cut_between_paragraphs_into_pages_of_one_size() -> None:
    pages = cut(CORPUS)
    assert "\n\n".join(pages) == CORPUS
    assert len(pages) == round(len(CORPUS) / 2048)
    assert all(1500 < len(page) < 2600 for page in pages)
    assert all(page.startswith("Paragraph") for page in pages)


def test_what_has_no_paragraphs_is_cut_between_sentences_words_or_anywhere() -> None:
    sentences = "One sentence follows another here. " * 200
    assert all(page.endswith(".") for page in cut(sentences))
    words = "word " * 2000
    assert {word for page in cut(words) for word in page.split()} == {"word"}
    assert "".join(cut("語" * 5000)) == "語" * 5000
    assert [len(page) for page in cut("x" * 6144)] == [2048] * 3
    assert cut("short") == ["short"]


def test_a_text_is_scored_in_bits_per_byte(tmp_path: Path, lm: HfScorer) -> None:
    pages = cut(CORPUS[:16000])
    (tmp_path / "corpus.txt").write_text(CORPUS[:16000])
    scoring = evaluator(tmp_path, line(text="corpus.txt", weight=0.2), blocks=4, num_fewshot=3)
    score = scoring.score(lm)
    requests: list[Any] = [type("Request", (), {"args": (page,)}) for page in pages]
    nats = lm.loglikelihood_rolling(requests)
    each = [-n / math.log(2) / len(page) for n, page in zip(nats, pages, strict=True)]
    assert scoring.raceable
    assert len(scoring.blocks) == 4
    assert score.items == len(each)
    assert sorted(score.item_scores["corpus"]) == pytest.approx(sorted(each), abs=1e-4)
    assert score.total == pytest.approx(-0.2 * sum(each) / len(each), abs=1e-4)
    assert 0 < score.stderr < 0.1
    whole = -sum(nats) / math.log(2) / sum(map(len, pages))
    assert score.tasks["corpus"]["bits_per_byte,none"] == pytest.approx(whole, rel=0.01)
    assert scoring.sign_conflicts == []


def test_shares_limits_and_digests_of_a_text_go_by_its_pages(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    task = line(text="corpus.txt")
    pages = cut(CORPUS)
    assert [text for _, text in evaluator(tmp_path, task, limit=3).questions()] == pages[:3]
    one, other = (evaluator(tmp_path, task, share=share) for share in ((0.0, 0.5), (0.5, 1.0)))
    assert sorted(text for scoring in (one, other) for _, text in scoring.questions()) == sorted(pages)
    before = evaluator(tmp_path, task).digest
    (tmp_path / "corpus.txt").write_text(CORPUS.replace("Paragraph 40", "Paragraph forty"))
    assert evaluator(tmp_path, task).digest != before
    with pytest.raises(TaskError, match="corpus has no questions in the 0%"):
        evaluator(tmp_path, task, share=(0.0, 1e-9))


@pytest.mark.parametrize(
    ("content", "says"), [(None, "there is no file.*corpus.txt"), (b" \n", "is empty"), (b"\xff\xfea", "not UTF-8")]
)
def test_a_text_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "corpus.txt").write_bytes(content)
    with pytest.raises(TaskError, match=f"corpus.*{says}"):
        evaluator(tmp_path, line(text="corpus.txt"))


# Functions

METRICS = """
from dataclasses import dataclass

@dataclass
class Limit:
    characters: int = 3

def brevity(document, reply):
    assert set(document) == {"question", "choices", "answer"} and isinstance(reply, str)
    return len(reply) / Limit().characters + document["answer"]

def broken(document, reply):
    return 1 / (len(document["question"]) - len("0 + 3 ="))

def nothing(document, reply):
    return float("nan")

def words(document, reply):
    return reply

def leaves(document, reply):
    raise SystemExit(3)

def alone(reply):
    return 1.0

def hungry(document, reply):
    raise MemoryError(reply)

def looking(document, reply):
    open("/no/such/" + reply.encode().hex())

def slow(document, reply):
    raise TimeoutError("two seconds")

def cut_off(document, reply):
    raise ConnectionError("the server is gone")

def full(document, reply):
    raise OSError(28, "No space left on device")

NUMBER = 3
"""


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    (tmp_path / "metrics.py").write_text(METRICS)
    add_task(tmp_path, "said", **GENERATION, filter_list=[{"name": "odd", "filter": [{"function": "take_first"}]}])
    return tmp_path


def test_a_function_scores_what_the_model_writes(metrics: Path, lm: HfScorer) -> None:
    said = line(name="said", function="metrics.py:brevity", weight=0.5)
    assert said.metric == "brevity,none"
    scoring = evaluator(metrics, said, blocks=4)
    score = scoring.score(lm)
    expected = [len(reply) / 3 for reply in score.replies["said"]]
    assert score.item_scores["said"] == pytest.approx(expected, abs=1e-4)
    assert score.total == pytest.approx(0.5 * sum(expected) / 20, abs=1e-4)
    spread = math.sqrt(sum((value - sum(expected) / 20) ** 2 for value in expected) / 19 / 20)
    assert score.stderr == pytest.approx(0.5 * spread, abs=1e-3)
    assert len(scoring.blocks) == 4
    assert score.items == 20


def test_a_task_counts_by_its_own_metric_and_by_a_function(metrics: Path, lm: HfScorer) -> None:
    own = line(name="said", metric="exact_match,odd")
    brief = line(name="brief", questions="said", function="metrics.py:brevity", weight=-0.1)
    score = evaluator(metrics, own, brief).score(lm)
    parts = score.tasks["said"]["exact_match,odd"], score.tasks["brief"]["brevity,none"]
    assert score.total == pytest.approx(parts[0] - 0.1 * parts[1])
    assert score.replies["said"] == score.replies["brief"]


def test_a_functions_code_belongs_to_what_is_asked(metrics: Path) -> None:
    task = line(name="said", function="metrics.py:brevity")
    before = evaluator(metrics, task).digest
    assert evaluator(metrics, task).digest == before
    (metrics / "metrics.py").write_text(METRICS.replace("= 3", "= 4"))
    assert evaluator(metrics, task).digest != before


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("broken", r"said: .*broken raised ZeroDivisionError.* in line 13, for the reply '.*' to the question '0 \+ 0"),
        ("leaves", r"leaves raised SystemExit: 3 in line 22,"),
        ("nothing", r"nothing gave nan.*'0 \+ 0 ='"),
        ("words", r"words gave '.*', which is no number"),
        ("hungry", "hungry raised MemoryError"),
        ("looking", "looking raised FileNotFoundError"),
        ("slow", "slow raised TimeoutError"),
    ],
)
def test_a_function_that_fails_costs_the_candidate(metrics: Path, lm: HfScorer, function: str, says: str) -> None:
    with pytest.raises(CandidateError, match=says):
        evaluator(metrics, line(name="said", function=f"metrics.py:{function}")).score(lm)


@pytest.mark.parametrize(("function", "says"), [("cut_off", "server is gone"), ("full", "No space left")])
def test_a_function_that_loses_the_network_or_the_disk_costs_no_candidate(
    metrics: Path, lm: HfScorer, function: str, says: str
) -> None:
    with pytest.raises(MachineError, match=says):
        evaluator(metrics, line(name="said", function=f"metrics.py:{function}")).score(lm)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("metrics.py:brevit", "no function 'brevit'.*it has .*brevity"),
        ("metrics.py:NUMBER", "no function 'NUMBER'"),
        ("metrics.py:alone", r"metrics.py:alone takes other arguments.*too many.*write `def alone\(question, reply\)`"),
        ("other.py:brevity", "there is no file .*other.py"),
        ("torn.py:brevity", r"torn.py cannot be run \(SyntaxError"),
        ("sums", "FILE.py:NAME"),
    ],
)
def test_a_function_that_is_not_there_is_named(metrics: Path, function: str, says: str) -> None:
    (metrics / "torn.py").write_text("def brevity(:\n")
    with pytest.raises((TaskError, ValidationError), match=says):
        evaluator(metrics, line(name="said", function=function))


def test_a_function_needs_a_task_that_writes(metrics: Path) -> None:
    add_task(metrics, "sums")
    with pytest.raises(TaskError, match="sums is a multiple_choice task"):
        evaluator(metrics, line(name="sums", function="metrics.py:brevity"))


# Faults in lm-eval's own


def with_code(folder: Path, name: str, key: str, code: str, rows: Any = ROWS[:4], **config: Any) -> Task:
    """A task one of whose functions is in a file beside it."""
    (folder / "code.py").write_text(code)
    task = add_task(folder, name, rows, **config)
    text = (folder / f"{name}.yaml").read_text().removesuffix("}")
    (folder / f"{name}.yaml").write_text(text + f', "{key}": !function code.run }}')
    return task


def test_a_task_that_fails_on_one_question_names_it(tmp_path: Path, lm: HfScorer) -> None:
    code = "def run(doc, results):\n    return {'acc': {'0 + 0 =': 1.0, '0 + 1 =': 0.0}[doc['question']]}\n"
    odd = with_code(tmp_path, "odd", "process_results", code)
    with pytest.raises(CandidateError, match=r"odd failed: KeyError.*for the question '0 \+ 2 ='"):
        evaluator(tmp_path, odd).score(lm)


@pytest.mark.parametrize("value", ["'high'", "None", "[1.0]"])
def test_a_metric_that_is_no_number_is_named_with_its_task(tmp_path: Path, lm: HfScorer, value: str) -> None:
    odd = with_code(tmp_path, "odd", "process_results", f"def run(doc, results):\n    return {{'acc': {value}}}\n")
    says = rf"odd failed: .*its metric 'acc' is {re.escape(value)}, not a number, for the question '0 \+ 0 ='"
    with pytest.raises(CandidateError, match=says):
        evaluator(tmp_path, odd).score(lm)


@pytest.mark.parametrize("value", ["np.float32(0.5)", "np.int64(1)", "np.bool_(True)", "torch.tensor(0.5)"])
def test_metrics_of_numpy_and_torch_count_as_those_of_python(tmp_path: Path, lm: HfScorer, value: str) -> None:
    code = f"import numpy as np, torch\ndef run(doc, results):\n    return {{'acc': {value}}}\n"
    own = with_code(tmp_path, "own", "process_results", code)
    number = 0.5 if "0.5" in value else 1.0
    for blocks in (1, 2):
        score = Evaluator([own], AskingOptions(blocks=blocks), [tmp_path]).score(lm)
        assert score.total == number
        assert score.item_scores == {"own": [number] * 4}


def test_a_question_that_cannot_be_said_is_found_before_the_first_candidate(tmp_path: Path) -> None:
    code = "def run(doc):\n    return {'0 + 0 =': 'nought'}[doc['question']]\n"
    odd = with_code(tmp_path, "odd", "doc_to_text", code)
    with pytest.raises(TaskError, match=r"odd: the question of a document cannot be written \(KeyError.*0 \+ 1 ="):
        _ = evaluator(tmp_path, odd).digest


@pytest.mark.parametrize("target", [7, -1, None, "nought"])
@pytest.mark.parametrize("first", [True, False])
def test_a_right_answer_that_is_no_choice_is_found_before_the_first_candidate(
    tmp_path: Path, target: Any, first: bool
) -> None:
    rows: list[dict[str, Any]] = [{"question": f"{n} =", "choices": ["a", "b"], "answer": 1} for n in range(3)]
    code = f"def run(doc):\n    return {target!r} if doc['question'] == '{0 if first else 2} =' else doc['answer']\n"
    odd = with_code(tmp_path, "odd", "doc_to_target", code, rows=rows)
    with pytest.raises(TaskError, match=r"tasks: .*odd.* right answer .* none of (its|the 2) choices"):
        evaluator(tmp_path, odd).texts()


def test_a_file_without_rows_has_no_questions(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="tasks: none has no questions"):
        evaluator(tmp_path, add_task(tmp_path, "none", []))


def test_questions_that_only_differ_in_their_choices_are_told_apart(tmp_path: Path, lm: HfScorer) -> None:
    rows = [{"question": i % 2, "choices": [f"{i} a", f"{i} b"], "answer": 0} for i in range(6)]
    gap = {**MULTIPLE_CHOICE, "doc_to_text": "question", "doc_to_target": "ends."}
    scoring = evaluator(tmp_path, add_task(tmp_path, "gaps", rows, **gap))
    assert len(set(scoring.questions())) == 6
    parts = [evaluator(tmp_path, Task(name="gaps"), share=share, seed=3) for share in ((0.0, 0.5), (0.5, 1.0))]
    assert sorted(pair for part in parts for pair in part.questions()) == sorted(scoring.questions())
    assert scoring.score(lm).items == 6


def test_questions_of_sentences_alone_are_told_apart(tmp_path: Path) -> None:
    rows = [{"question": "", "choices": [f"the cat {i} sleeps", f"the cat {i} sleep"], "answer": 0} for i in range(20)]
    task = add_task(tmp_path, "pairs", rows)
    asked = evaluator(tmp_path, task)
    assert [text for _, text in asked.questions()][:1] == ["the cat 0 sleeps / the cat 0 sleep"]
    halves = [evaluator(tmp_path, task, share=share) for share in ((0.0, 0.5), (0.5, 1.0))]
    assert sum(half.items for half in halves) == 20
    check_disjoint("heldout", halves[1].compared(), halves[0].compared())
    with pytest.raises(TaskError, match="also searched"):
        check_disjoint("heldout", asked.compared(), halves[0].compared())


def test_the_digest_of_such_questions_is_that_of_older_logs(tmp_path: Path) -> None:
    rows = [{"question": "", "choices": [f"{i} a", f"{i} b"], "answer": 0} for i in range(3)]
    assert (
        evaluator(tmp_path, add_task(tmp_path, "pairs", rows)).digest
        == "254d2f79cb1c2cd7a524c4a117e2d6ec7fdd14d5e1cd5920f941d7a198ae2879"
    )


@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize("limit", [1, 2, None])
def test_the_standard_error_of_a_group_follows_from_those_of_its_tasks(
    tmp_path: Path, lm: HfScorer, by_size: bool, limit: int | None
) -> None:
    rows = [{"question": f"{i}?", "choices": ["a", "b"], "answer": 0} for i in range(8)]
    tasks = [add_task(tmp_path, "eight", rows), add_task(tmp_path, "three", rows[:3])]
    metrics = [{"metric": "acc", "weight_by_size": by_size}]
    group = json.dumps({"group": "both", "task": ["eight", "three"], "aggregate_metric_list": metrics})
    (tmp_path / "both.yaml").write_text(group)
    found = evaluator(tmp_path, Task(name="both"), limit=limit).score(lm)
    alone = [evaluator(tmp_path, task, limit=limit).score(lm) for task in tasks]
    sizes = [score.items if by_size else 1 for score in alone]
    expected = math.hypot(*(size * score.stderr for size, score in zip(sizes, alone, strict=True))) / sum(sizes)
    assert found.stderr == pytest.approx(expected)
    assert found.stderr > 0


def test_a_weight_that_would_make_it_worse_is_said(workspace: Workspace) -> None:
    perplexity = [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    rolling: dict[str, Any] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
    }
    add_task(workspace.root / "tasks", "plain", **rolling, doc_to_choice=None, metric_list=perplexity)
    (workspace.root / "corpus.txt").write_text(CORPUS)

    def found(weight: float) -> list[str]:
        tasks = [{"name": "plain", "metric": "byte_perplexity,none", "weight": weight}, {"text": "corpus.txt"}]
        return [*map(str, directions(Scorer(read_config(workspace.config(tasks=tasks)), workspace.root)))]

    assert found(-0.5) == []
    (said,) = found(0.5)
    assert said.startswith("tasks: plain: its byte_perplexity,none is better when lower")
    assert "Write `weight: -0.5`" in said


def test_questions_longer_than_the_context_are_said(workspace: Workspace) -> None:
    assert not [*lengths(Scorer(read_config(workspace.config()), workspace.root))]
    rows = [{"question": "x" * size, "choices": ["a", "b"], "answer": 0} for size in (10, 50, 70, 80)]
    add_task(workspace.root / "tasks", "long", rows)
    (said,) = lengths(Scorer(read_config(workspace.config(tasks=["long"])), workspace.root))
    assert said.model == "long"
    assert said.what.startswith("2 of its questions take up to 84 tokens with the reply, and the model holds 64")


def test_questions_longer_than_what_vllm_reads_are_said(workspace: Workspace) -> None:
    rows = [{"question": "x" * size, "choices": ["a", "b"], "answer": 0} for size in (10, 50)]
    add_task(workspace.root / "tasks", "long", rows)
    engine = {"backend": "vllm", "options": {"max_model_len": 40}}
    (said,) = lengths(Scorer(read_config(workspace.config(tasks=["long"], engine=engine)), workspace.root))
    assert said.what.startswith("1 of its questions take up to 54 tokens with the reply, and the engine reads 40")
    assert said.remedy.endswith("raise engine.options.max_model_len")
    assert longest_text(131072, {}) == 4096
    assert longest_text(131072, {"max_model_len": 8192}) == 8192
    assert longest_text(64, {}) == 64


@pytest.mark.parametrize("key", ["max_gen_toks", "max_new_tokens", "max_tokens"])  # as lm-eval reads them
def test_a_reply_as_long_as_the_context_is_refused_before_the_run(workspace: Workspace, key: str) -> None:
    written: dict[str, Any] = {**GENERATION, "generation_kwargs": {"until": ["\n"], key: 64}}
    add_task(workspace.root / "tasks", "written", **written)
    task = {"name": "written", "metric": "exact_match,none"}
    status, printed = workspace.llmevo("inspect", workspace.config(tasks=[task]))
    assert status == 2
    assert "tasks: written: max_gen_toks: 64 leaves no token of the 64 that the model reads" in " ".join(
        printed.split()
    )


def test_a_run_on_a_text_and_a_function(workspace: Workspace) -> None:
    (workspace.root / "corpus.txt").write_text(CORPUS[:4500])
    (workspace.root / "heldout.txt").write_text(CORPUS[-4500:].replace("words", "letters"))
    (workspace.root / "metrics.py").write_text("def length(document, reply):\n    return len(reply)\n")
    add_task(workspace.root / "tasks", "said", ROWS[:6], **GENERATION)
    tasks = ["letters", {"text": "corpus.txt", "weight": 0.2}, {"name": "said", "function": "metrics.py:length"}]
    config = workspace.config(
        tasks=tasks,
        heldout=[{"text": "heldout.txt"}],
        search={"optimizer": "random", "budget": 5, "seed": 3, "finalists": 0},
        engine={"self_check": False},
    )
    assert workspace.llmevo("run", config, "--out", "run")[0] == 0
    scored = [event for event in workspace.events("run") if isinstance(event, events.Evaluated)]
    assert len(scored) == 5
    whole = [event for event in scored if event.items == max(event.items for event in scored)]
    assert len(whole) >= 2  # others may have been stopped: theirs is an estimate
    for event in whole:
        parts = [("letters", "acc,none", 1.0), ("corpus", "bits_per_byte,none", -0.2), ("said", "length,none", 1.0)]
        total = sum(weight * event.tasks[name][metric] for name, metric, weight in parts)
        assert event.score == pytest.approx(total)
    state = workspace.state("run")
    assert {row.score < 0 for row in state.heldout.values()} == {True}
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
