"""Runs whose candidates are asked together: the events of a run that merges each, and nothing is lost on the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import new_adapter
from workspace import CHOICE, Workspace

from llmevo.config import read_config
from llmevo.errors import CandidateError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.merging.recipe import Recipe
from llmevo.run import batch_scoring as heat
from llmevo.run.log import events
from llmevo.run.log.storage import LOG
from llmevo.run.scorer import Scorer

GENOME = {
    "base_model": "base",
    "models": ["base+first", "base+second"],
    "merge_method": "task_arithmetic",
    "dtype": "float32",
    "bounds": {"weight": [-2.0, 2.0]},
}
LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj"]
RACING = {"error_rate": 0.4, "looks": 3}


SEARCH: dict[str, Any] = {"optimizer": "random", "budget": 11, "population": 4, "seed": 3}


def config(workspace: Workspace, adapters: str, racing: Any = RACING, **changes: Any) -> Path:
    """A run on 30 of a task's 60 questions; finalists are asked the others."""
    if not (workspace.root / "first").exists():
        for seed, name in enumerate(("first", "second")):
            new_adapter(workspace.root / name, workspace.root / "base", seed, target_modules=LAYERS, lora_alpha=20)
        rows = [
            {"question": f"no {i}", "choices": [" a", f" {i}b", " zq", f" c{i}"], "answer": i % 4} for i in range(60)
        ]
        file = workspace.root / "tasks" / "many.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file.with_suffix(".yaml").write_text(CHOICE.format(task="many", file=file))
    given: dict[str, Any] = {
        "genome": GENOME,
        "tasks": ["many"],
        "limit": 30,
        "search": {**SEARCH, "racing": racing},
        **changes,
    }
    return workspace.config(engine={"adapters": adapters, "self_check": False}, **given)


def evaluated(workspace: Workspace, run: str) -> list[events.Evaluated]:
    return [event for event in workspace.events(run) if isinstance(event, events.Evaluated)]


def facts(event: events.Scored) -> dict[str, Any]:
    """What must not depend on how it was asked."""
    return event.model_dump(exclude={"time", "seconds", "cached", "item_probabilities"})


def test_the_same_candidates_get_the_same_scores_and_may_be_raced_in_step(workspace: Workspace) -> None:
    for adapters in ("merged", "together"):
        status, printed = workspace.llmevo("run", config(workspace, adapters, racing=False), "--out", adapters)
        assert status == 0, printed
    merged, together = (workspace.state(adapters) for adapters in ("merged", "together"))
    assert together.candidates == merged.candidates
    assert [*map(facts, evaluated(workspace, "together"))] == [*map(facts, evaluated(workspace, "merged"))]
    assert len({str(event.item_scores) for event in evaluated(workspace, "together")}) > 4
    # Each has its share of the seconds, and is no copy of another.
    assert all(event.seconds["evaluate"] > 0 and not event.cached for event in evaluated(workspace, "together"))
    assert merged.started
    assert together.started
    asked, others = together.started.questions, merged.started.questions
    assert asked["search"] != others["search"]
    assert (asked["selection"], asked["heldout"]) == (others["selection"], others["heldout"])
    assert together.finished
    assert merged.finished
    assert together.finished.best == merged.finished.best
    assert together.finished.heldout == merged.finished.heldout
    assert workspace.llmevo("run", config(workspace, "together"), "--out", "raced")[0] == 0
    whole, raced = (evaluated(workspace, run) for run in ("merged", "raced"))
    assert {event.items for event in raced if event.rival is not None} == {20}
    once = {event.candidate: event for event in reversed(raced)}  # a finalist that was stopped is asked the rest
    for one, other in zip((once[number] for number in sorted(once)), whole, strict=True):
        values = other.item_scores["many"]
        in_parts = [value for part in range(3) for value in values[part::3]]
        assert one.item_scores["many"] == in_parts[: one.items]
    assert workspace.llmevo("replay", "raced", "--verify")[0] == 0


def test_what_is_handed_over_was_scored_merged(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str]] = {"search": set(), "selection": set(), "letters_heldout": set()}
    real = Evaluator.score_block

    def score_block(self: Evaluator, lm: Any, place: int) -> Any:
        name = self.tasks[0].name
        asked["selection" if self.protocol.after else "search" if name == "many" else name].add(type(lm).__name__)
        return real(self, lm, place)

    monkeypatch.setattr(Evaluator, "score_block", score_block)
    given = config(workspace, "together")
    assert workspace.llmevo("run", given, "--out", "run")[0] == 0
    assert "Member" in asked.pop("search")
    assert [*asked.values()] == [{"RequestScorer"}] * 2
    state, log = workspace.state("run"), workspace.events("run")
    plain = Scorer(read_config(config(workspace, "merged")), workspace.root)
    selected = [event for event in log if isinstance(event, events.Selected)]
    assert len(selected) > 2
    for event in selected:
        score, _ = plain.score(Recipe.model_validate(state.recipes[event.candidate]), "selection")
        assert (score.total, dict(score.item_scores)) == (event.score, event.item_scores)


def test_a_run_that_was_stopped_within_a_generation_asks_the_rest_together(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(workspace, "together", search={**SEARCH, "budget": 12})
    assert workspace.llmevo("run", given, "--out", "run")[0] == 0
    whole = [facts(event) for event in evaluated(workspace, "run")]
    log = workspace.root / "run" / LOG
    lines = log.read_text().splitlines()
    scored = [place for place, line in enumerate(lines) if json.loads(line)["event"] == "evaluated"]
    log.write_text("".join(line + "\n" for line in lines[: scored[5] + 1]))  # of the first generation's four two
    asked: list[int] = []
    real = heat.run
    monkeypatch.setattr(heat, "run", lambda *args: asked.append(len(args[2])) or real(*args))
    status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed
    assert asked == [2, 4]
    assert [facts(event) for event in evaluated(workspace, "run")] == whole
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_one_that_fails_costs_the_others_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(read_config(config(workspace, "together", racing=False)), workspace.root)
    genes = [{gene.name: value for gene in scorer.space.genes} for value in (0.1, 0.4, 0.7)]
    recipes = [*map(scorer.space.decode, genes)]
    real = Evaluator.score_block
    calls: list[str] = []

    def score_block(self: Evaluator, lm: Any, place: int) -> Any:
        calls.append(type(lm).__name__)
        if len(calls) == 2:
            raise CandidateError("no number")
        return real(self, lm, place)

    monkeypatch.setattr(Evaluator, "score_block", score_block)
    scorer.anticipate(recipes)
    assert len(scorer.known) == 2
    scorer.anticipate(recipes)
    assert calls == ["Member"] * 3
    scores = [scorer.score(recipe) for recipe in recipes]
    assert calls == ["Member"] * 3 + ["RequestScorer"]
    assert all(seconds["evaluate"] > 0 for _, seconds in scores)
    assert all(scorer.score(recipe) == (score, {}) for recipe, (score, _) in zip(recipes, scores, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"genome": {**GENOME, "merge_method": "ties"}}, "merge_method 'ties' is not linear in the models"),
        ({"genome": {**GENOME, "merge_method": ["task_arithmetic", "sce"]}}, "merge_method 'sce' is not linear"),
        ({"genome": {**GENOME, "models": ["base+first", "one"]}}, "one is no LoRA adapter of base"),
        ({"genome": {**GENOME, "base_model": "base+first"}}, "base_model base+first has an adapter of its own"),
        (
            {"genome": {"models": ["base+first", "base+second"], "merge_method": "linear", "normalize": False}},
            "without `normalize`, linear scales the base as well",
        ),
        ({"genome": {"models": ["base"], "merge_method": "linear"}}, "none of the models is a LoRA adapter of base"),
        ({"gate": True}, "`gate:` reads the replies"),
        ({"tasks": [{"name": "said", "votes": {}, "prompts": "prompts.txt"}]}, "said is judged candidate by candidate"),
    ],
)
def test_who_cannot_be_asked_together_is_told_why(workspace: Workspace, changes: dict[str, Any], words: str) -> None:
    refused(workspace, config(workspace, "together", **changes), words)


def test_vllm_asks_them_one_by_one(workspace: Workspace) -> None:
    given = config(workspace, "together")
    refused(workspace, given, "engine.backend is 'vllm', and only hf", "--backend", "vllm")
    raw = yaml.safe_load(given.read_text())
    given.write_text(yaml.safe_dump({**raw, "engine": {"adapters": "both"}}))
    refused(workspace, given, "engine.adapters: Input should be 'merged' or 'together' (it is 'both')", advice=False)


def refused(workspace: Workspace, given: Path, words: str, *options: str, advice: bool = True) -> None:
    status, printed = workspace.llmevo("run", given, "--out", "run", *options)
    assert status == 2
    assert words in printed
    assert not advice or "set `engine: {adapters: merged}`" in printed
    assert not (workspace.root / "run").exists()
