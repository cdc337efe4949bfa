"""The finals of a run: finalists and held-out rows of which some cannot be scored."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from llmevo.errors import CandidateError
from llmevo.evaluation.score import Score
from llmevo.merging.recipe import Recipe
from llmevo.run import experiment
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog, read_log
from llmevo.run.progress import seconds_left
from llmevo.run.verify import verify
from support.resumable import CountedRig, carry_on, config_in
from support.workspace import Workspace

REASON = "the metric perplexity is inf"

Failing = Callable[[Recipe, str, str], bool]
"""Whether a recipe fails on a set of questions in a format."""


def nothing(*_: object) -> bool:
    return False


@dataclass
class FailingRig(CountedRig):
    """Raises CandidateError where `fails` says so."""

    fails: Failing = nothing

    def score(
        self, recipe: Recipe, questions: str = "search", rivals: Sequence[Score] = (), quantize: str = ""
    ) -> tuple[Score, Mapping[str, float]]:
        if self.fails(recipe, questions, quantize):
            raise CandidateError(REASON)
        return super().score(recipe, questions, rivals, quantize)


def is_base(recipe: Recipe) -> bool:
    return [str(reference) for reference in recipe.references] == ["base"]


def played(workspace: Workspace, fails: Failing, out: str = "run", **changes: Any) -> RunState:
    """The end of a run, whose log verifies."""
    folder = workspace.root / out
    carry_on(FailingRig(config_in(workspace.root, "random", 9, **changes), workspace.root, fails=fails), folder)
    log = read_log(folder)
    assert verify(log, folder)
    return RunState.fold(iter(log))


def best_of(state: RunState) -> Recipe:
    assert state.best
    return Recipe.model_validate(state.recipes[state.best.candidate.id])


def without_best(workspace: Workspace, **changes: Any) -> tuple[RunState, RunState]:
    """A run, and one whose best finalist fails on questions that the search did not ask, or in its served format."""
    whole = played(workspace, nothing, out="whole", **changes)
    best = best_of(whole)

    def fails(recipe: Recipe, questions: str, quantize: str) -> bool:
        return recipe == best and (questions == "selection" or bool(quantize))

    return whole, played(workspace, fails, **changes)


def test_a_held_out_row_that_fails_is_logged_and_the_run_ends(workspace: Workspace) -> None:
    state = played(workspace, lambda recipe, questions, _: questions == "heldout" and is_base(recipe))
    assert {name: event.reason for name, event in state.failed_rows.items()} == {"base": REASON}
    assert {"one", "two", "uniform", "best"} <= state.heldout.keys()
    assert state.finished
    assert state.finished.heldout
    assert state.finished.heldout["failed"] == ["base"]
    assert state.finished.heldout["score"] == state.heldout["best"].score


def test_a_run_whose_best_cannot_be_held_out_ends_without_its_held_out_score(workspace: Workspace) -> None:
    best = best_of(played(workspace, nothing, out="whole"))
    state = played(workspace, lambda recipe, questions, _: questions == "heldout" and recipe == best)
    assert "best" in state.failed_rows
    assert state.finished
    assert state.finished.heldout
    assert state.finished.heldout["score"] is None


@pytest.mark.parametrize("changes", [{"limit": 8}, {"engine": {"quantize": "fp8"}}], ids=["selected", "served"])
def test_a_finalist_that_fails_is_not_the_best_and_the_others_are_compared(
    workspace: Workspace, changes: dict[str, Any]
) -> None:
    whole, state = without_best(workspace, **changes)
    assert whole.best
    assert state.best
    failed = {event.candidate for event in state.failed_finals if event.step != "heldout"}
    assert failed == {whole.best.candidate.id}
    others = state.served_finalists or [state.trials[number] for number in state.selected]
    score = state.as_served if state.served_finalists else state.as_merged
    assert state.best == max(others, key=lambda trial: score(trial).total)
    assert len(others) > 1
    assert state.finished


def test_where_all_finalists_fail_as_served_the_best_is_that_of_the_merges(workspace: Workspace) -> None:
    state = played(workspace, lambda *asked: bool(asked[-1]), engine={"quantize": "fp8"})
    assert not state.served_finalists
    assert state.best == state.leader
    assert [*state.failed_rows] == ["best (fp8)"]
    assert state.finished


def test_a_row_that_failed_is_asked_again_with_a_higher_budget(workspace: Workspace) -> None:
    played(workspace, lambda recipe, questions, _: questions == "heldout" and is_base(recipe))
    with RunLog(workspace.root / "run", resume=True) as log:
        log.append(events.Resumed(reason="budget 12", budget=12))
    state = played(workspace, nothing)
    assert not state.failed_rows
    assert "base" in state.heldout


OTHER_QUESTIONS = events.Resumed(
    reason="--force in spite of 2 changes",
    forced=[events.Change(key=f"questions.{name}", before="ab", now="cd") for name in ("selection", "heldout")],
    counts={"search": 12, "selection": 4, "heldout": 12},
)


@pytest.mark.parametrize(("kind", "engine"), [("selected", {}), ("served", {"quantize": "fp8"}), ("heldout", {})])
def test_finals_that_go_on_with_other_questions_begin_again(
    workspace: Workspace, kind: str, engine: dict[str, Any]
) -> None:
    played(workspace, nothing, limit=8, engine=engine)
    file = workspace.root / "run" / LOG
    places = [place for place, event in enumerate(read_log(workspace.root / "run")) if event.event == kind]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[: places[0] + 2]))
    with RunLog(workspace.root / "run", resume=True) as log:
        log.append(OTHER_QUESTIONS)
    state = played(workspace, nothing, limit=8, engine=engine)
    log = read_log(workspace.root / "run")
    after = log[next(place for place, event in enumerate(log) if event.event == "resumed") :]
    scored = [event for event in after if isinstance(event, events.Scored)]
    assert not any(event.cached for event in scored)
    assert [*state.selected] == [event.candidate for event in scored if isinstance(event, events.Selected)]
    assert len(state.selected) == next(iter(state.selected.values())).finalists
    assert len(state.served) == (2 * len(state.selected) if engine else 0)
    assert [*state.heldout] == [event.row for event in scored if isinstance(event, events.HeldOut)]
    assert {"base", "one", "best"} <= state.heldout.keys()


@pytest.fixture
def named_best(workspace: Workspace) -> dict[str, Any]:
    """The keys of a config with a model of the name of a row."""
    shutil.copytree(workspace.root / "two", workspace.root / "best")
    return {"genome": {"base_model": "base", "models": ["one", "best"], "merge_method": "task_arithmetic"}}


def test_a_parent_with_the_name_of_another_row_has_its_own_row(
    workspace: Workspace, named_best: dict[str, Any]
) -> None:
    state = played(workspace, nothing, **named_best)
    assert state.heldout["best"].kind == "best"
    assert state.heldout["best (parent)"].kind == "parent"
    assert state.finished
    assert state.finished.heldout
    assert len(state.finished.heldout["rows"]) == len(state.heldout) == 6
    with RunLog(workspace.root / "run", resume=True) as log:
        log.append(events.Resumed(reason="budget 10", budget=10))
    again = played(workspace, nothing, **named_best)
    assert again.heldout["best (parent)"] == state.heldout["best (parent)"]
    assert again.heldout["best"].kind == "best"


def test_a_log_from_before_parents_had_rows_of_their_own_verifies(
    workspace: Workspace, named_best: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "RULES", 4)
        before = played(workspace, nothing, **named_best)
    assert (before.rules, "best (parent)" in before.heldout) == (4, False)
    log = read_log(workspace.root / "run")
    assert verify(log, workspace.root / "run")


def test_no_time_is_left_for_what_has_failed(workspace: Workspace) -> None:
    config = {"limit": 8, "engine": {"quantize": "fp8"}}
    without_best(workspace, **config)
    *log, _ = read_log(workspace.root / "run")
    state = RunState.fold(iter(log))
    assert state.failed_finals
    assert seconds_left(state, config_in(workspace.root, "random", 9, **config)) == 0
