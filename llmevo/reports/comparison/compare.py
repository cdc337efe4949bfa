"""What finished runs say of their optimizers. From their logs alone, so every number can be had again from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from llmevo.errors import RunError
from llmevo.evaluation.judges.verdicts import Bill
from llmevo.reports.comparison.results import Result, read_results
from llmevo.reports.comparison.statistics import Band, Mean, Paired, holm, median_reached, paired, reached

REFERENCE = "cma-es"
"""Whose final score the others are measured by: how many evaluations they need for it."""


Kind = str
"""`search` or `heldout`: which questions a score is of."""


@dataclass(frozen=True)
class Optimizer:
    """All runs of one optimizer."""

    name: str
    seeds: list[int]
    curve: Band
    search: Mean | None
    heldout: Mean | None
    heldout_stderr: float | None
    """The mean standard error that the questions leave; they are the same for all, so more seeds do not lower it."""
    reached: dict[int, int | None]
    """By seed, the evaluations to reach what the reference has in the end on that seed."""
    median_reached: float | None
    """None when half of the seeds or more never reach it."""
    llm: dict[str, float]
    """Summed over the runs; `share` and `best` are shares."""
    judged: Bill
    """The same of LLM judges."""

    @property
    def final(self) -> Mean | None:
        """The score that counts: on held-out questions, where there are any."""
        return self.heldout or self.search


@dataclass(frozen=True)
class Pair:
    """Two optimizers on the seeds that both have."""

    first: str
    second: str
    questions: Kind
    result: Paired
    win_rate: float
    p_holm: float
    """Corrected for the number of pairs."""


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown, drawn and written; the best optimizer first."""

    budget: int
    start_rows: int
    items: int
    heldout_items: int
    runs: list[Result]
    optimizers: list[Optimizer]
    pairs: list[Pair]
    reference: str | None
    rows: dict[str, float]
    """Held-out scores of what the merge has to beat."""

    @property
    def final(self) -> Kind:
        """Which questions count in the end."""
        return "heldout" if self.rows or any(run.heldout is not None for run in self.runs) else "search"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(folders: Sequence[Path]) -> Comparison:
    """Read finished runs. Raises RunError for runs that cannot be set side by side, naming why."""
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
        start_rows=runs[0].start_rows,
        items=runs[0].items,
        heldout_items=runs[0].heldout_items,
        runs=runs,
        optimizers=optimizers,
        pairs=[*_pairs(by_name, "heldout"), *_pairs(by_name, "search")],
        reference=REFERENCE if reference else None,
        # Which weight for all models is held out is each run's own choice.
        rows={name: score for run in runs for name, score in run.rows.items()},
    )


def _optimizer(name: str, runs: Sequence[Result], reference: Mapping[int, Result]) -> Optimizer:
    goals = {seed: run.search for seed, run in reference.items() if run.search is not None}
    needed = {run.seed: reached(run.scores, goals[run.seed]) for run in runs if run.seed in goals}
    errors = [run.heldout_stderr for run in runs if run.heldout_stderr is not None]
    asked = [run.llm for run in runs if run.llm]
    llm = {key: sum(of[key] for of in asked) for key in asked[0]} if asked else {}
    for key in ("share", "best"):
        if key in llm:
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
        judged=sum((run.judged for run in runs), Bill.of(())),
    )


def _pairs(by_name: Mapping[str, Mapping[int, Result]], questions: Kind) -> list[Pair]:
    """Every two optimizers on the seeds they share."""
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
