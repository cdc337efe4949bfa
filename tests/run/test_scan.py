"""`llmevo scan`, and the probabilities of right answers that it measures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from llmevo.config import read_config
from llmevo.errors import CandidateError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.gold import GoldAnswers
from llmevo.evaluation.tasks.lm_eval import task_of_rows
from llmevo.merging.recipe import Recipe
from llmevo.run.scan import Row, Scan, luck
from support.tiny_model import save_tiny
from support.workspace import Workspace

ROWS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2 2"}]


class Stub(LM):
    """Answers with the logarithm of a probability that is in the text."""

    def __init__(self, found: dict[tuple[str, str], float]) -> None:
        super().__init__()
        self.found = found

    def tok_encode(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(math.log(self.found[request.args]), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


class Replies(Stub):
    """Finds the first of equal texts likeliest."""

    def __init__(self) -> None:
        super().__init__({})

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-float(place % 5), False) for place, _ in enumerate(requests)]


def gold_of(lm: LM, **keys: Any) -> Any:
    leaf = task_of_rows("t", ROWS, doc_to_text="{{q}}", **keys)
    leaf.build_all_requests()
    found = GoldAnswers()
    by_place = {place: [i for i in leaf.instances if i.doc_id == place] for place in range(len(ROWS))}
    assert all(found._add("t", leaf, of, False, lm) for of in by_place.values())  # pyright: ignore[reportPrivateUsage]
    return found.measure(lm)


def test_a_right_choice_counts_among_the_choices() -> None:
    lm = Stub({("one", " x"): 0.1, ("one", " y"): 0.3, ("two", " x"): 0.02, ("two", " y"): 0.01})
    gold = gold_of(lm, output_type="multiple_choice", doc_to_choice=["x", "y"], doc_to_target=1)
    assert gold.values["t"] == pytest.approx([0.75, 1 / 3])
    assert gold.right == {"t": [1.0, 0.0]}


def test_a_written_answer_counts_by_token() -> None:
    lm = Stub({("one", " 1"): 0.3, ("two", " 2 2"): 0.25})
    gold = gold_of(lm, output_type="generate_until", doc_to_target="{{a}}")
    assert gold.values["t"] == pytest.approx([0.3, 0.5])
    assert gold.right == {}


def test_a_task_without_answers_is_left_out_by_name() -> None:
    leaf = task_of_rows("t", ROWS, doc_to_text="{{q}}", output_type="generate_until", doc_to_target="")
    leaf.build_all_requests()
    assert not GoldAnswers()._add("t", leaf, leaf.instances[:1], False, Stub({}))  # pyright: ignore[reportPrivateUsage]


def test_a_task_without_answers_counts_by_its_metric(workspace: Workspace) -> None:
    config = read_config(workspace.config())
    evaluator = Evaluator(config.tasks, config.asking, [workspace.root / "tasks"], workspace.root)
    lm = Replies()
    answers = GoldAnswers(evaluator=evaluator, counted={"letters": [0, 1, 2]})
    gold = answers.measure(lm)
    score = evaluator.score_questions(lm, {"letters": [0, 1, 2]})
    assert gold.values == score.item_scores
    assert len(gold.values["letters"]) == answers.counts["letters"] == 3


@pytest.fixture
def deep(workspace: Workspace) -> Workspace:
    """A workspace whose models have four layers."""
    for seed, name in enumerate(("base", "one", "two")):
        save_tiny(workspace.root / name, seed, num_hidden_layers=4)
    workspace.config()
    return workspace


def lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "scan.jsonl").read_text().splitlines()]


def test_a_merge_with_another_recipe_is_measured_anew(deep: Workspace) -> None:
    def scanned(*settings: str) -> list[dict[str, Any]]:
        options = ("--of", "merge", "--limit", 2, "--step", 3, "--out", "found")
        status, text = deep.llmevo("scan", "config.yml", *options, *settings)
        assert status == 0, text
        return lines("found")[1:]

    other = ("--set", "genome.parameters.lambda=2.0")
    first = scanned()
    both = scanned(*other)
    assert both[: len(first)] == first
    of_merge = [row for row in first if row["merge"]]
    assert len(of_merge) > 3
    again = {row["path"]: row["score"] for row in both[len(first) :]}
    assert [*again] == [row["path"] for row in of_merge]
    assert not [row["path"] for row in of_merge if row["score"] == again[row["path"]]]
    assert scanned(*other) == both


def test_a_scan_measures_models_and_edits_and_goes_on_after_a_stop(deep: Workspace) -> None:
    status, text = deep.llmevo("scan", "config.yml", "--limit", 8, "--out", "found")
    assert status == 0, text
    head, *rows = lines("found")
    assert head["models"] == {"base": "base", "one": "one", "two": "two"}
    models, edits = rows[:3], rows[3:]
    assert [row["path"] for row in models] == ["base 0-4", "one 0-4", "two 0-4"]
    best = max(models, key=lambda row: row["score"])
    assert {row["kind"] for row in edits} == {"skip", "repeat", "swap", "rope"}
    assert len({row["path"] for row in rows}) == len(rows)
    for row in edits:
        assert row["score"] == pytest.approx(best["score"] + row["effect"], abs=1e-9)
        assert row["stderr"] > 0
    assert "The best of" in text
    assert Recipe.from_yaml(Path("found/best.yml").read_text()).slices
    assert deep.llmevo("merge", "found/best.yml", "merged")[0] == 0
    page = Path("found/scan.html").read_text()
    assert max(edits, key=lambda row: row["effect"])["path"] in page
    assert 'id="plot-effects"' in page
    assert "from the scan's rows, scan.jsonl" in page
    (kind,) = {line.split()[-1] for line in text.splitlines() if line.startswith("rope ")}
    assert kind == "layers"  # of all: no block, and no worst of one edit
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    kinds = data["figures"]["effects"]["data"][0]["y"]
    assert kinds
    assert not [name for name in kinds if name.startswith("rope")]

    file = Path("found/scan.jsonl")
    whole = file.read_text().splitlines()
    file.write_text("\n".join([*whole[:7], whole[7][:20]]))
    status, text = deep.llmevo("scan", "config.yml", "--limit", 8, "--out", "found", "--json")
    assert status == 0
    again = lines("found")[1:]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    printed, _ = json.JSONDecoder().raw_decode(text[text.index("[{") :])
    assert [row["path"] for row in printed] == [row["path"] for row in rows]


def test_a_finished_scan_is_shown_again_without_an_engine(deep: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [deep.llmevo("scan", "config.yml", "--limit", 8, "--step", 2, "--out", "found")]
    monkeypatch.delattr("llmevo.engines.hf.HfEngine")
    said.append(deep.llmevo("scan", "config.yml", "--limit", 8, "--step", 2, "--out", "found"))
    assert [status for status, _ in said] == [0, 0]
    first, second = (text[text.index("The best of") :] for _, text in said)
    assert first == second
    assert "(8 of letters)" in second


def test_a_smaller_step_adds_the_blocks_between(deep: Workspace) -> None:
    found = {}
    for step in (2, 1):
        assert deep.llmevo("scan", "config.yml", "--limit", 8, "--step", step, "--out", "found")[0] == 0
        found[step] = lines("found")[1:]
    assert found[1][: len(found[2])] == found[2]
    skips = {step: [row["start"] for row in rows if row["kind"] == "skip"] for step, rows in found.items()}
    assert skips == {2: [1, 1], 1: [1, 1, 2]}


def test_a_model_that_cannot_be_measured_is_no_root(deep: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmevo.engines.hf import HfEngine

    def refuse(*_: Any) -> None:
        raise CandidateError("a weight is not finite")

    monkeypatch.setattr(HfEngine, "swap", refuse)
    status, text = deep.llmevo("scan", "config.yml", "--limit", 8, "--out", "found", "--of", "two")
    assert status == 2, text
    assert "two cannot be measured (a weight is not finite); name another model with --of" in text


@pytest.mark.slow
def test_workers_measure_the_same_rows(deep: Workspace) -> None:
    for out, more in (("one", ()), ("two", ("--workers", 2))):
        status, text = deep.llmevo("scan", "config.yml", "--limit", 8, "--step", 3, "--out", out, *more)
        assert status == 0, text
    first, second = ({row["path"]: {**row, "seconds": 0} for row in lines(out)[1:]} for out in ("one", "two"))
    assert first == second


def test_a_row_is_what_the_models_scores_say(deep: Workspace) -> None:
    deep.llmevo("scan", "config.yml", "--limit", 8, "--out", "found", "--of", "one")
    row = next(row for row in lines("found")[1:] if row["kind"] == "swap" and row["model"] == "two")
    scan = Scan(read_config(deep.root / "config.yml"), deep.root, deep.root / "other", limit=8)
    answers, engine = scan.scorer.right_answers, scan.scorer.engine
    values = {}
    for path in ("one 0-4", row["path"]):
        engine.swap(scan.recipe(path))
        values[path] = answers.measure(engine.lm).values["letters"]
    effects = [one - other for one, other in zip(values[row["path"]], values["one 0-4"], strict=True)]
    assert row["effect"] == pytest.approx(sum(effects) / len(effects))
    assert row["path"] == f"one 0-{row['start']} | two {row['start']}-{row['stop']} | one {row['stop']}-4"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--of", "three"), "--of 'three' is no model of the config"),
        (("--limit", 4), "is of a scan of other models, questions or settings"),
        (("--limit", 1), "Invalid value for '--limit'"),
        (("--set", "limit=0"), "limit: Input should be greater than or equal to 1 (it is 0)"),
    ],
)
def test_a_mistake_is_named(deep: Workspace, words: tuple[Any, ...], reason: str) -> None:
    Path("found").mkdir()
    Path("found/scan.jsonl").write_text('{"scan": "another"}\n')
    status, text = deep.llmevo("scan", "config.yml", "--out", "found", *words)
    assert status == 2
    assert reason in text
    assert "Traceback" not in text


def test_an_edit_that_cannot_be_exported_is_a_row_with_the_reason(
    deep: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmevo.engines.hf import HfEngine

    swap = HfEngine.swap

    def refuse(engine: HfEngine, recipe: Recipe, quantize: str = "") -> None:
        if len(recipe.origins(4)) < 4:
            raise CandidateError("a layer of another kind")
        swap(engine, recipe, quantize)

    monkeypatch.setattr(HfEngine, "swap", refuse)
    status, text = deep.llmevo("scan", "config.yml", "--limit", 8, "--out", "found")
    assert status == 0
    failed = [row for row in lines("found")[1:] if row["failed"]]
    assert {row["kind"] for row in failed} == {"skip"}
    assert "a layer of another kind" in text


def test_the_best_of_many_edits_stands_out_by_chance() -> None:
    assert luck(1) == 0.0
    assert luck(250) == pytest.approx(2.81, abs=0.02)
    assert Row("repeat", "A 0-4 | A 2-4 gain 0.5", 6, 2, 4, gain=0.5).group == "repeat 2, gain 0.5"
