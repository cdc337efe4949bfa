"""What another optimizer or seed would have done, as a model of the log's scores expects it; nothing is scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # its parts are opened when they are used
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from llmevo.config import Config, check_values
from llmevo.errors import ConfigError, RunError, nearest
from llmevo.evaluation.score import Score
from llmevo.run.experiment import Experiment, population
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.search.optimizers import ASKING, OPTIMIZERS
from llmevo.search.optimizers.base import Optimizer
from llmevo.search.optimizers.gaussian_process import Features, GaussianProcess
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial

FITS = 10
"""Each goes on from the one before, a few steps further."""


LEAST = 8
"""Scores to learn from; from fewer a model says nothing."""


KEYS = ("optimizer", "seed")


class Landscape:
    """A Gaussian process of the scores in a log."""

    def __init__(self, space: SearchSpace, trials: Sequence[Trial]) -> None:
        """Raises RunError where there are too few scores."""
        self._space, self._features = space, Features(space)
        self.trials = [trial for trial in trials if trial.score and space.contains(trial.candidate.genes)]
        values = np.array([trial.value for trial in self.trials])
        if len(values) < LEAST or not values.std():
            raise RunError(
                f"--what-if: {len(values)} scores in the log say nothing of others; {LEAST} different ones do"
            )
        self._middle, self._spread = float(values.mean()), float(values.std())
        self.noise = float(np.median([trial.score.stderr for trial in self.trials if trial.score]))
        self._model = GaussianProcess(self._features.size)
        points = self._points([trial.candidate.genes for trial in self.trials])
        for _ in range(FITS):
            self._model.fit(points, (values - self._middle) / self._spread, min(1.0, (self.noise / self._spread) ** 2))
        left_out, _ = self._model.left_out()
        off = (left_out * self._spread + self._middle) - values
        self.error = float(np.sqrt(np.mean(off**2)))
        self.correlation = (
            float(np.corrcoef(scipy.stats.rankdata(left_out), scipy.stats.rankdata(values))[0, 1])
            if left_out.std()
            else 0.0
        )

    def _points(self, genes: Sequence[Genes]) -> NDArray[np.float64]:
        return self._features.of([self._space.to_unit(each) for each in genes])

    def expected(self, genes: Genes) -> tuple[float, float]:
        """The score of a point and its standard deviation, without the noise of scoring."""
        mean, deviation = self._model.predict(self._points([genes]))
        return float(mean[0]) * self._spread + self._middle, float(deviation[0]) * self._spread


@dataclass(frozen=True)
class Imagined:
    """A run in the model: its trials in their order, and how sure the model is of each."""

    name: str
    trials: Sequence[Trial]
    deviations: Sequence[float]

    def best(self, count: int) -> Trial:
        """After so many evaluations."""
        return max(self.trials[:count], key=lambda trial: trial.value)


def parse(given: Sequence[str], config: Config) -> Config:
    """The config that `optimizer=cma-es`, `seed=3` mean. Raises ConfigError."""
    changes: dict[str, Any] = {}
    for text in (part.strip() for whole in given for part in whole.split(",")):
        key, _, value = text.partition("=")
        if key not in KEYS or not value:
            raise ConfigError(f"--what-if: {text!r} is unknown; give optimizer=NAME, seed=N or both")
        if key == "optimizer" and value not in OPTIMIZERS:
            raise ConfigError(f"--what-if: optimizer {value!r} is unknown{nearest(value, OPTIMIZERS)}")
        if key == "seed" and not value.isdecimal():
            raise ConfigError(f"--what-if: seed {value!r} is no whole number")
        changes[key] = int(value) if key == "seed" else value
    search = config.search.model_copy(update={"evaluation_seed": config.evaluation_seed, **changes})
    if search.optimizer in ASKING:
        raise ConfigError(
            f"--what-if: {search.optimizer} asks an LLM, and what it would answer to other prompts is in no log;"
            " try optimizer=llm-off"
        )
    return config.model_copy(update={"search": search})


def imagine(experiment: Experiment, landscape: Landscape, known: Mapping[int, Trial]) -> Imagined:
    """Run an optimizer for as many evaluations as the log has, on what the model expects.

    The start rows have the scores that they have in the log.
    """
    optimizer, space = experiment.optimizer(), experiment.space
    rows = [trial for trial in known.values() if trial.candidate.generation == 0]
    trials, deviations = [*rows], [0.0] * len(rows)
    optimizer.tell([trial for trial in rows if space.contains(trial.candidate.genes)])
    generation = 0
    while len(trials) < len(known):
        generation += 1
        told: list[Trial] = []
        for suggestion in _asked(optimizer, min(population(experiment), len(known) - len(trials))):
            mean, deviation = landscape.expected(suggestion.genes)
            candidate = Candidate(
                len(trials) + len(told), generation, suggestion.origin, suggestion.genes, suggestion.note
            )
            told.append(Trial(candidate, Score(mean, landscape.noise, {}, 0)))
            deviations.append(deviation)
        optimizer.tell(told)
        trials += told
    return Imagined(f"{experiment.config.search.optimizer}, seed {experiment.config.search.seed}", trials, deviations)


def _asked(optimizer: Optimizer, size: int) -> list[Suggestion]:
    try:
        next(optimizer.ask(size))
    except StopIteration as done:
        return done.value
    raise AssertionError("an optimizer without an LLM has asked one")


def what_if(recorded: Sequence[events.Event], run: Path, given: Sequence[str], console: Console) -> None:
    """Print what the model expects of another optimizer or seed, beside what the run has scored."""
    state = RunState.fold(iter(recorded))
    experiment = Experiment.of_log(state.started, run)
    if state.started:
        check_values(state.started.config, str(run))
    if not state.aims.plain:
        raise RunError("--what-if: its model knows one score, and this run has constraints or several aims")
    other = replace(experiment, config=parse(given, experiment.config))
    landscape = Landscape(experiment.space, [*state.trials.values()])
    imagined = [imagine(other, landscape, state.trials)]
    if not experiment.asks and other.config.search != experiment.config.search:
        imagined.append(imagine(experiment, landscape, state.trials))
    _show(console, state, landscape, imagined)


def _show(console: Console, state: RunState, landscape: Landscape, imagined: Sequence[Imagined]) -> None:
    scored = Imagined("this run, as scored", [*state.trials.values()], [])
    table = Table(title="best score so far", title_justify="left", box=None, pad_edge=False)
    table.add_column("after", justify="right")
    for each in (scored, *imagined):
        table.add_column(each.name if each is scored else f"{each.name}: expected", justify="right")
    start = sum(candidate.generation == 0 for candidate in state.candidates.values())
    whole = len(state.trials)
    for count in sorted({start, *(start + (whole - start) * part // 4 for part in range(1, 5))}):
        values = [each.best(count) for each in (scored, *imagined)]
        table.add_row(str(count), *(f"{trial.value:.4f}" for trial in values))
    console.print(table)
    first = imagined[0]
    best = first.best(whole)
    deviation = first.deviations[[*first.trials].index(best)]
    console.print(
        f"\nThe best that {first.name} would have proposed ({best.candidate.origin}, evaluation"
        f" {best.candidate.id + 1}) is expected to score {best.value:.4f} ± {deviation:.4f}.",
        highlight=False,
    )
    console.print(
        f"Expected, not scored: nothing was merged or asked. A Gaussian process of {len(landscape.trials)} scores; each"
        f" left out, it is wrong by {landscape.error:.4f} (root mean square; the scores' own standard error is"
        f" {landscape.noise:.4f}) and ranks with a correlation of {landscape.correlation:.2f}. An optimizer goes where"
        " the model errs upwards, so expect less.",
        highlight=False,
        soft_wrap=True,
    )
    if landscape.correlation < 0.3:
        console.print("The model hardly knows which candidate is better: read nothing into this.", style="yellow")
