"""The best candidates of a run scored again: nothing having changed, every score is what it was, bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from llmevo import changes, events, trust
from llmevo.bench import config_of
from llmevo.errors import CandidateError, RunError
from llmevo.recipe import Recipe
from llmevo.resuming import facts, facts_now
from llmevo.runlog import LOG
from llmevo.state import RunState
from llmevo.trial import Trial
from llmevo.versions import VERSIONED, versions

if TYPE_CHECKING:  # see `Bench`
    from llmevo.rig import Rig

COMPARED = ("score", "tasks", "items", "item_scores")
"""Not standard errors: they follow from the questions' scores, and older versions had another formula."""


@dataclass(frozen=True)
class Again:
    """A candidate with its score in the log and its score now."""

    trial: Trial
    logged: events.Evaluated
    now: events.Evaluated | None
    reason: str = ""

    @property
    def differing(self) -> list[str]:
        """The fields that are not equal; what an older log does not have is not compared."""
        if self.now is None:
            return ["score"]
        one, other = (_without_errors(event.model_dump(mode="json")) for event in (self.logged, self.now))
        return [name for name in COMPARED if one[name] != other[name] and one[name] not in ({}, None)]


def _without_errors(event: dict[str, Any]) -> dict[str, Any]:
    tasks: dict[str, dict[str, float]] = event["tasks"]
    shown = {name: {k: v for k, v in of.items() if "_stderr," not in k} for name, of in tasks.items()}
    return {**event, "tasks": shown}


def rescore(recorded: Sequence[events.Event], rig: "Rig", count: int) -> list[Again]:
    """The `count` best of those that were asked everything, the best first. Loads the engine."""
    state = RunState.fold(iter(recorded))
    if voted := next((task.name for task in rig.config.tasks if task.votes), None):
        raise RunError(
            f"{voted} is voted on by a person, who is not asked again; `llmevo replay RUN --verify` recomputes the"
            " scores from the votes"
        )
    rig.book = state.book
    logged = {event.candidate: event for event in recorded if isinstance(event, events.Evaluated)}
    best = state.asked_all[:count]
    return [_again(rig, trial, state.recipes[trial.candidate.id], logged[trial.candidate.id]) for trial in best]


def _again(rig: "Rig", trial: Trial, recipe: dict[str, object], logged: events.Evaluated) -> Again:
    try:
        score, seconds = rig.score(Recipe.model_validate(recipe))
    except CandidateError as error:
        return Again(trial, logged, None, str(error))
    return Again(trial, logged, events.Evaluated(candidate=trial.candidate.id, **events.scored(score, seconds)))


def rig_of(recorded: Sequence[events.Event], run: Path, trusted: bool = False) -> "Rig":
    """What a logged run was scored with, as far as it is still there. Raises RunError where that needs the user's
    agreement: see `llmevo.trust`.
    """
    from llmevo.rig import Rig

    trust.check(recorded, run, trusted)
    started = RunState.fold(iter(recorded)).started
    if started is None:
        raise RunError(f"{run}: the log has no beginning; start the run anew")

    return Rig(config_of(started, LOG), (run if run.is_dir() else run.parent).absolute() / started.root)


def show(console: Console, rows: Sequence[Again], started: events.RunStarted, rig: "Rig") -> bool:
    """Print the table. Whether all scores are what they were; if not, what has changed since is named."""
    table = Table(box=None, pad_edge=False)
    for column in ("candidate", "from", "in the log", "now", "difference", ""):
        table.add_column(column, justify="left" if column in ("candidate", "from", "") else "right")
    for row in rows:
        now = "failed" if row.now is None else f"{row.now.score:.6f}"
        off = "" if row.now is None else f"{row.now.score - row.logged.score:+.2g}" if row.differing else "0"
        note = row.reason or (f"differs in {', '.join(row.differing)}" if row.differing else "equal")
        origin = row.trial.candidate.note or row.trial.candidate.origin
        table.add_row(f"#{row.trial.candidate.id}", origin[:40], f"{row.logged.score:.6f}", now, off, note)
    console.print(table)
    found = changes.differences(facts(started), facts_now(rig, started))
    equal = not any(row.differing for row in rows)
    if equal and not found:
        return True
    here = versions()
    others = [
        f"{k} {started.versions[k]} (here {here[k]})" for k in VERSIONED if started.versions.get(k, here[k]) != here[k]
    ]
    why = changes.table(found) if found else "  neither the questions nor the models"
    console.print(f"What has changed since:\n{why}", highlight=False, markup=False)
    if others:
        console.print(f"  versions: {', '.join(others)}", highlight=False, markup=False)
    return equal
