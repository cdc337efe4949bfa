"""Finished runs compared, from their logs alone: the results of each run, each optimizer and each pair of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from llmevo.config import Config
from llmevo.errors import RunError
from llmevo.evaluation.judges.verdicts import JudgeCost
from llmevo.models.files import WHOLE
from llmevo.reports.comparison.statistics import (
    Band,
    Mean,
    Paired,
    best_so_far,
    holm,
    median_reached,
    paired,
    reached,
)
from llmevo.run.experiment import Experiment
from llmevo.run.finals import proposals
from llmevo.run.log.events import OF_BEST
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log
from llmevo.search.trial import START_ROWS

REFERENCE = "cma-es"
"""The optimizer whose final search score the others have to reach."""


@dataclass(frozen=True)
class Result:
    """One finished run."""

    folder: str
    optimizer: str
    seed: int
    scores: list[float | None]
    """Of every evaluation in its order; None for a failure, and for a candidate that violates a constraint."""
    start_rows: int
    search: float | None
    """The best of them; where no candidate satisfies the constraints, of the one that misses them least."""
    heldout: float | None
    heldout_stderr: float | None
    """From the choice of questions."""
    rows: dict[str, float]
    """The held-out scores of the base, the parents, the uniform merge and the best coefficient."""
    llm: dict[str, float]
    """The calls, proposals, tokens, cost and seconds of the LLM; empty for an optimizer without one."""
    seconds: float
    """Of merging and scoring; scores taken over from another run took none."""
    items: int
    heldout_items: int
    """Questions of a search score, and of a held-out one."""
    judged: JudgeCost
    """The calls of LLM judges, those of finalists and held-out rows included."""
    violated: str = ""
    """The constraints that the best violates: no candidate satisfies them all."""

    @property
    def best(self) -> list[float | None]:
        return best_so_far(self.scores)


@dataclass(frozen=True)
class Optimizer:
    """All runs of one optimizer."""

    name: str
    seeds: list[int]
    curve: Band
    search: Mean | None
    heldout: Mean | None
    heldout_stderr: float | None
    """The mean standard error from the choice of questions; they are the same for all, so more seeds do not lower
    it."""
    reached: dict[int, int | None]
    """By seed, the evaluations until the reference's final search score on that seed."""
    median_reached: float | None
    """None when half of the seeds or more never reach it."""
    llm: dict[str, float]
    """Summed over the runs; `share` and `best` are shares."""
    judged: JudgeCost
    """The calls of LLM judges, summed over the runs."""

    @property
    def final(self) -> Mean | None:
        """The held-out score, or the search score where nothing is held out."""
        return self.heldout or self.search


@dataclass(frozen=True)
class Pair:
    """Two optimizers on the seeds that both have."""

    first: str
    second: str
    questions: str
    """`search` or `heldout`."""
    result: Paired
    win_rate: float
    p_holm: float
    """Corrected for the number of pairs."""


@dataclass(frozen=True)
class Comparison:
    """All numbers of a comparison; the best optimizer first."""

    budget: int
    start_rows: int
    """Of all runs; those whose first rows an LLM adds to have more."""
    items: int
    heldout_items: int
    runs: list[Result]
    optimizers: list[Optimizer]
    pairs: list[Pair]
    reference: str | None
    rows: dict[str, float]
    """Held-out scores of the rows that a merge has to beat."""

    @property
    def final(self) -> str:
        """The questions that decide: `heldout`, or `search` where nothing is held out."""
        return "heldout" if self.rows or any(run.heldout is not None for run in self.runs) else "search"

    def final_score(self, run: Result) -> float | None:
        return run.heldout if self.final == "heldout" else run.search

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare finished runs. Raises RunError that names why runs are not comparable."""
    by_name: dict[str, dict[int, Result]] = {}
    for run in sorted(read_results(folders), key=lambda run: (run.optimizer, run.seed)):
        if run.seed in by_name.setdefault(run.optimizer, {}):
            raise RunError(f"of {run.optimizer} there are two runs with seed {run.seed}; give one of each seed")
        by_name[run.optimizer][run.seed] = run
    reference = by_name.get(REFERENCE)
    optimizers = [_optimizer(name, [*of.values()], reference or {}) for name, of in by_name.items()]
    optimizers.sort(key=lambda optimizer: -(optimizer.final.mean if optimizer.final else -math.inf))
    by_name = {optimizer.name: by_name[optimizer.name] for optimizer in optimizers}
    runs = [run for of in by_name.values() for run in of.values()]
    return Comparison(
        budget=max(len(run.scores) for run in runs),
        start_rows=min(run.start_rows for run in runs),  # an LLM may add some of its own
        items=runs[0].items,
        heldout_items=runs[0].heldout_items,
        runs=runs,
        optimizers=optimizers,
        pairs=[*_pairs(by_name, "heldout"), *_pairs(by_name, "search")],
        reference=REFERENCE if reference else None,
        # Each run chooses its own coefficient to hold out.
        rows={name: score for run in runs for name, score in run.rows.items()},
    )


def _optimizer(name: str, runs: Sequence[Result], reference: Mapping[int, Result]) -> Optimizer:
    goals = {seed: run.search for seed, run in reference.items() if run.search is not None}
    needed = {run.seed: reached(run.scores, goals[run.seed]) for run in runs if run.seed in goals}
    errors = [run.heldout_stderr for run in runs if run.heldout_stderr is not None]
    asked = [run.llm for run in runs if run.llm]
    llm = {key: sum(of[key] for of in asked) for key in asked[0]} if asked else {}
    for key in {"share", "best"} & llm.keys():
        llm[key] /= len(asked)
    return Optimizer(
        name=name,
        seeds=sorted(run.seed for run in runs),
        curve=Band.of([run.best for run in runs]),
        search=Mean.of([run.search for run in runs if run.search is not None]),
        heldout=Mean.of([run.heldout for run in runs if run.heldout is not None]),
        heldout_stderr=sum(errors) / len(errors) if errors else None,
        reached=needed,
        median_reached=median_reached([*needed.values()]),
        llm=llm,
        judged=sum((run.judged for run in runs), JudgeCost.of(())),
    )


def _pairs(by_name: Mapping[str, Mapping[int, Result]], questions: str) -> list[Pair]:
    """Return every two optimizers on the seeds they share."""
    found: list[tuple[str, str, Paired]] = []
    for first, second in combinations(by_name, 2):
        both = [(by_name[first][seed], by_name[second][seed]) for seed in by_name[first] if seed in by_name[second]]
        values = [(getattr(a, questions), getattr(b, questions)) for a, b in both]
        known = [(a, b) for a, b in values if a is not None and b is not None]
        if result := paired([a for a, _ in known], [b for _, b in known]):
            found.append((first, second, result))
    corrected = holm([result.p for _, _, result in found])
    return [
        Pair(first, second, questions, result, result.win_rate, p)
        for (first, second, result), p in zip(found, corrected, strict=True)
    ]


def read_results(folders: Sequence[Path]) -> list[Result]:
    """Read finished runs. Raises RunError unless all are finished and differ in nothing but the search."""
    states = {str(folder): RunState.fold(iter(read_log(folder))) for folder in folders}
    configs: dict[str, Config] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for folder, state in states.items():
        if state.started is None or state.finished is None:
            raise RunError(f"{folder} is unfinished; `llmevo resume {folder}` goes on with it")
        configs[folder] = Experiment.of_log(state.started, Path(folder)).config
        conditions[folder] = _conditions(state, configs[folder])
        first, expected = next(iter(conditions.items()))
        for name, value in conditions[folder].items():
            other = expected[name]
            if value != other and not (name in ("questions", "models") and _is_unknown(value, other)):
                raise RunError(
                    f"{first} and {folder} cannot be compared: their {name} differ ({_difference(other, value)})"
                )
    named = _names(states, configs)
    return [_result(folder, named[folder], state) for folder, state in states.items()]


def _conditions(state: RunState, config: Config) -> dict[str, Any]:
    """Return all that must be equal for scores to mean the same, and for the comparison to be fair."""
    started, budget = state.started, config.search.budget
    assert started is not None
    return {
        "models": [source["checksum"] for source in started.sources],
        "genes": {gene["name"]: gene for gene in started.genes},
        "merge settings": config.genome.model_dump(mode="json", exclude={"models", "base_model", "tokenizer_source"}),
        "tasks": [task.model_dump() for task in config.tasks],
        "objective and constraints": [config.search.objective, *config.constraints],
        "held-out tasks": [task.model_dump() for task in config.heldout_tasks],
        "number of questions": [started.items, started.heldout_items],
        "questions": started.questions,
        "start rows": [c.genes for c in state.candidates.values() if c.origin in START_ROWS],
        "budgets": budget.model_dump(),
        # A bound on time or cost ends each run at its own place; runs are compared at equal evaluations.
        "numbers of evaluations": len(state.trials) if {"minutes", "cost"} & budget.bounds.keys() else None,
    }


def _is_unknown(one: Sequence[str] | Mapping[str, str], other: Sequence[str] | Mapping[str, str]) -> bool:
    """Return whether logs do not say if questions or models are the same: old logs have no digests of questions, and
    checksums by another rule.
    """
    if isinstance(one, Mapping) or isinstance(other, Mapping) or len(one) != len(other):
        return not (one and other)
    pairs = [pair for pair in zip(one, other, strict=True) if len({each.startswith(WHOLE) for each in pair}) == 1]
    return all(a == b for a, b in pairs)


def _difference(one: Any, other: Any) -> str:
    """Describe the first place where two values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *other]:
            if one.get(key) != other.get(key):
                return f"{key}: {_difference(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next(_difference(a, b) for a, b in zip(one, other, strict=True) if a != b)
    return f"{str(one)[:80]} and {str(other)[:80]}"


def _names(states: Mapping[str, RunState], configs: Mapping[str, Config]) -> dict[str, str]:
    """Name each run's optimizer, with its LLM where an optimizer has several."""
    optimizers = {folder: config.search.optimizer for folder, config in configs.items()}
    # As the config names it: the name that a server gives may change from reply to reply.
    models = {
        folder: (config.llm.model or config.llm.proposer)
        if (begun := states[folder].started) and begun.proposer
        else ""
        for folder, config in configs.items()
    }
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
        rows={row.row: row.score for row in state.heldout.values() if row.kind not in OF_BEST},
        llm=_llm(state),
        judged=JudgeCost.of(state.judged),
        seconds=sum(sum(trial.seconds.values()) for trial in trials),
        items=state.started.items,
        heldout_items=state.started.heldout_items,
        violated=state.best.reason if state.best else "",
    )


def _llm(state: RunState) -> dict[str, float]:
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
