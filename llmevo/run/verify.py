"""Verify a run: recompute its log, or score its best candidates again, which gives the same scores bit for bit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmevo.config import check_values
from llmevo.errors import CandidateError, RunError
from llmevo.evaluation.score import SAMPLES
from llmevo.merging.recipe import Recipe
from llmevo.run import loop, trust
from llmevo.run.experiment import Experiment, config_of
from llmevo.run.log import events
from llmevo.run.log.journal import EndOfRecordError, Journal
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG
from llmevo.search.trial import Trial
from llmevo.workers.protocol import Result

if TYPE_CHECKING:  # see `Experiment`
    from llmevo.run.scorer import Scorer

COMPARED = ("score", "tasks", "items", "item_scores")
"""Fields compared: not standard errors, for which older versions had another formula."""

PRECISION = 1e-9
"""Of tasks' metrics: racing joins them of other blocks of questions, so that the last digit may be another one."""


@dataclass(frozen=True)
class Rescored:
    """A candidate with its logged score and its new score."""

    trial: Trial
    logged: events.Evaluated
    now: events.Evaluated | None
    reason: str = ""

    @property
    def differing(self) -> list[str]:
        """The fields that differ; those that an older log lacks are not compared."""
        if self.now is None:
            return ["score"]
        one, other = (event.model_dump(mode="json") for event in (self.logged, self.now))
        differing = [name for name in COMPARED if one[name] != other[name] and one[name] not in ({}, None)]
        same = _are_equal(*(_metrics(of["tasks"]) for of in (one, other)))
        return [name for name in differing if not (name == "tasks" and same)]

    def as_dict(self) -> dict[str, Any]:
        """The row in plain values, as `llmevo replay --rescore --json` prints it."""
        now = self.now.score if self.now else None
        return {
            "candidate": self.trial.candidate.id,
            "logged": self.logged.score,
            "now": now,
            "differing": self.differing,
            "reason": self.reason,
        }


def _metrics(tasks: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    """{(task, metric): value}, without standard errors, and without numbers of questions, which some logs average."""
    found = {(name, metric): value for name, of in tasks.items() for metric, value in of.items()}
    return {key: value for key, value in found.items() if "_stderr," not in key[1] and key[1] != SAMPLES}


def _are_equal(one: Mapping[tuple[str, str], float], other: Mapping[tuple[str, str], float]) -> bool:
    close = (math.isclose(value, other.get(key, math.nan), rel_tol=PRECISION) for key, value in one.items())
    return one.keys() == other.keys() and all(close)


def rescore(recorded: Sequence[events.Event], scorer: "Scorer", count: int) -> list[Rescored]:
    """Score the `count` best fully evaluated candidates again, the best first. Loads the engine."""
    state = RunState.fold(iter(recorded))
    if voted := next((task.name for task in scorer.config.tasks if task.votes), None):
        raise RunError(
            f"{voted} is voted on by a person, who is not asked again; `llmevo replay RUN --verify` recomputes the"
            " scores from the votes"
        )
    logged = {event.candidate: event for event in recorded if isinstance(event, events.Evaluated)}
    best = state.asked_all[:count]
    return [_rescored(scorer, trial, state.recipes[trial.candidate.id], logged[trial.candidate.id]) for trial in best]


def _rescored(scorer: "Scorer", trial: Trial, recipe: dict[str, object], logged: events.Evaluated) -> Rescored:
    try:
        score, seconds = scorer.score(Recipe.model_validate(recipe), quantize=scorer.config.engine.search_format)
    except CandidateError as error:
        return Rescored(trial, logged, None, str(error))
    result = Result(trial.candidate.id, score, seconds=seconds)
    return Rescored(trial, logged, events.Evaluated(candidate=trial.candidate.id, **events.scored(result)))


def scorer_of(recorded: Sequence[events.Event], run: Path, trusted: bool = False) -> "Scorer":
    """Return the scorer of a logged run. Raises RunError where that needs the user's agreement: see
    `llmevo.run.trust`.
    """
    from llmevo.run.scorer import Scorer

    trust.check(recorded, run, trusted)
    state = RunState.fold(iter(recorded))
    if (started := state.started) is None:
        raise RunError(f"{run}: the log has no beginning; start the run anew")

    root = (run if run.is_dir() else run.parent).absolute() / started.root
    return Scorer(config_of(started, LOG), root, verdicts=state.verdicts)


def verify(recorded: Sequence[events.Event], run: Path, trusted: bool = False) -> bool:
    """Recompute a log and return whether the run is finished; an unfinished one is verified as far as it goes.

    Raises RunError with the first line that does not follow from those before it: genes, recipes, origins, the
    optimizer's state and all that follows from other events must be equal, `sigma` and `trust` to six digits. Also
    for a log from elsewhere with prompt templates that are not llmevo's, unless it is `trusted`: see
    `llmevo.run.trust`.
    """
    begun = next((event for event in recorded if isinstance(event, events.RunStarted)), None)
    trust.check_templates(recorded, run, trusted)
    experiment = Experiment.of_log(begun, run)
    if begun:
        check_values(begun.config, str(run))
    journal = Journal(recorded, verdicts=experiment.verdicts)
    try:
        loop.run(experiment, journal)
    except EndOfRecordError:
        return False
    except RunError as error:
        raise RunError(f"{run / LOG if run.is_dir() else run}: {error}") from error
    except (LookupError, TypeError, ValueError) as error:  # a value of another kind, in a log that was edited
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        broken = journal.broken(f"does not fit the lines before it ({reason})", ahead=True)
        raise RunError(f"{run / LOG if run.is_dir() else run}: {broken}") from error
    return True
