"""Finished runs as a comparison reads them: their logs, and whether these may stand side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmevo.errors import RunError
from llmevo.evaluation.judges.records import Bill
from llmevo.models.files import WHOLE
from llmevo.reports.comparison.statistics import best_so_far
from llmevo.run.experiment import Experiment
from llmevo.run.finals import proposals
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log
from llmevo.search.trial import START_ROWS


@dataclass(frozen=True)
class Result:
    """One finished run, as far as a comparison goes."""

    folder: str
    optimizer: str
    seed: int
    scores: list[float | None]
    """Of every evaluation in its order; None for a failure, and for one that violates a constraint."""
    start_rows: int
    search: float | None
    """The best of them; where none keeps the constraints, of the one that misses them least."""
    heldout: float | None
    heldout_stderr: float | None
    """Of the questions: what other questions of the same kind would change."""
    rows: dict[str, float]
    """The held-out scores of the base, the parents, the uniform merge and the best other weight for all models."""
    llm: dict[str, float]
    """What was asked of the LLM, what came of it, and what it took; empty for an optimizer without one."""
    seconds: float
    """Of merging and scoring; what was taken over from another run took none."""
    items: int
    heldout_items: int
    """Questions of a search score, and of a held-out one."""
    judged: Bill
    """What LLM judges were asked, the finalists' and held-out replies included."""
    violated: str = ""
    """Which constraints the best violates: no candidate keeps them all."""

    @property
    def best(self) -> list[float | None]:
        return best_so_far(self.scores)


def read_results(folders: Sequence[Path]) -> list[Result]:
    """The finished runs in these folders. Raises RunError for runs that cannot be set side by side, naming why."""
    states = {str(folder): RunState.fold(iter(read_log(folder))) for folder in folders}
    check_comparable(states)
    named = _names(states)
    return [_result(folder, named[folder], state) for folder, state in states.items()]


def check_comparable(states: Mapping[str, RunState]) -> None:
    """Raise RunError unless all runs are finished and differ in nothing but the search."""
    first: tuple[str, dict[str, Any]] | None = None
    for folder, state in states.items():
        if state.started is None or state.finished is None:
            raise RunError(f"{folder} is unfinished; `llmevo resume {folder}` goes on with it")
        conditions = _conditions(folder, state)
        first = first or (folder, conditions)
        for name, value in conditions.items():
            other = first[1][name]
            if value != other and not (name in ("questions", "models") and _is_unknown(value, other)):
                raise RunError(
                    f"{first[0]} and {folder} cannot be compared: their {name} differ ({_difference(other, value)})"
                )


def _conditions(folder: str, state: RunState) -> dict[str, Any]:
    """What must be the same for scores to mean the same, and for the comparison to be fair."""
    started = state.started
    assert started is not None
    config = Experiment.of_log(started, Path(folder)).config
    budget = config.search.budget
    given = {"models", "base_model", "tokenizer_source"}
    return {
        "models": [source["checksum"] for source in started.sources],
        "genes": {gene["name"]: gene for gene in started.genes},
        "merge settings": config.genome.model_dump(mode="json", exclude=given),
        "tasks": [task.model_dump() for task in config.tasks],
        "aims": [config.search.objective, *config.constraints],
        "held-out tasks": [task.model_dump() for task in config.heldout_tasks],
        "number of questions": [started.items, started.heldout_items],
        "questions": started.questions,
        "start rows": [c.genes for c in state.candidates.values() if c.origin in START_ROWS],
        "budgets": budget.model_dump(),
        # A bound on time or cost ends each at its own place; set side by side they are at equal evaluations.
        "numbers of evaluations": len(state.trials) if {"minutes", "cost"} & budget.bounds.keys() else None,
    }


def _is_unknown(one: Sequence[str] | Mapping[str, str], other: Sequence[str] | Mapping[str, str]) -> bool:
    """Whether logs do not say if they are of the same questions or models: old ones have no digests of questions, and
    checksums by another rule.
    """
    if isinstance(one, Mapping) or isinstance(other, Mapping) or len(one) != len(other):
        return not (one and other)
    pairs = [pair for pair in zip(one, other, strict=True) if len({each.startswith(WHOLE) for each in pair}) == 1]
    return all(a == b for a, b in pairs)


def _difference(one: Any, other: Any) -> str:
    """The first place where two values differ, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *other]:
            if one.get(key) != other.get(key):
                return f"{key}: {_difference(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next(_difference(a, b) for a, b in zip(one, other, strict=True) if a != b)
    return f"{str(one)[:80]} and {str(other)[:80]}"


def _names(states: Mapping[str, RunState]) -> dict[str, str]:
    """What each run's optimizer is called: with its LLM where there are several of them."""
    configs = {folder: Experiment.of_log(state.started, Path(folder)).config for folder, state in states.items()}
    optimizers = {folder: config.search.optimizer for folder, config in configs.items()}
    # As the config names it: what a server calls itself may change from answer to answer.
    asking = {folder: state.started is not None and state.started.proposer for folder, state in states.items()}
    models = {f: (config.llm.model or config.llm.proposer) if asking[f] else "" for f, config in configs.items()}
    asked = {name: {models[f] for f in states if optimizers[f] == name and models[f]} for name in optimizers.values()}
    return {f: f"{name} ({models[f]})" if len(asked[name]) > 1 else name for f, name in optimizers.items()}


def _result(folder: str, optimizer: str, state: RunState) -> Result:
    assert state.started is not None
    best = state.heldout.get("best")
    trials = [*state.trials.values()]
    return Result(
        folder=folder,
        optimizer=optimizer,
        seed=state.started.seed,
        scores=[trial.score.total if trial.score and not trial.violation else None for trial in trials],
        start_rows=sum(trial.candidate.generation == 0 for trial in trials),
        search=state.best.value if state.best else None,
        heldout=best.score if best else None,
        heldout_stderr=best.stderr if best else None,
        rows={row.row: row.score for row in state.heldout.values() if row.kind != "best"},
        llm=_llm(state),
        judged=Bill.of(state.judged),
        seconds=sum(sum(trial.seconds.values()) for trial in trials),
        items=state.started.items,
        heldout_items=state.started.heldout_items,
        violated=state.best.reason if state.best else "",
    )


def _llm(state: RunState) -> dict[str, float]:
    """The LLM's part in one run."""
    if not state.prompted:
        return {}
    later = [trial for trial in state.trials.values() if trial.candidate.generation]
    return {
        **proposals(state),
        "calls": sum(event.calls for event in state.prompted),
        "prompt_tokens": sum(event.tokens["prompt"] for event in state.prompted),
        "completion_tokens": sum(event.tokens["completion"] for event in state.prompted),
        "cost": sum(event.cost for event in state.prompted),
        "seconds": sum(event.seconds for event in state.prompted),
        "share": sum(trial.candidate.origin == "llm" for trial in later) / max(1, len(later)),
        "best": float(state.best is not None and state.best.candidate.origin == "llm"),
    }
