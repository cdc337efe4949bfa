"""The interface of optimizers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmevo.llm.templates import Templates
from llmevo.search.prompts.question import Prompt, Question, Reading, SliceGeometry
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Suggestion, Trial

Asking = Generator[Prompt, Reading, list[Suggestion]]
"""The result of `ask`: it may yield prompts, is sent the readings of their answers, and returns candidates.

So an optimizer needs no LLM, no log and no network: its caller answers from a server or from a recording.
"""

Answer = Callable[[Prompt], Reading]
"""The reading of a prompt's reply."""


def answered(asking: Asking, answer: Answer) -> list[Suggestion]:
    """Return the candidates of an optimizer that is asked; `answer` answers the prompts that it yields."""
    try:
        prompt = next(asking)
        while True:
            prompt = asking.send(answer(prompt))
    except StopIteration as done:
        return done.value


@dataclass(frozen=True)
class Setup:
    """The inputs of an optimizer."""

    space: SearchSpace
    seed: int
    budget: int
    """Evaluations in all, the start rows included."""
    tasks: Mapping[str, tuple[float, str]]
    """Each task's weight and the metric that counts."""
    style: str
    """The prompting style of the LLM: `chat` or `completion`."""
    templates: Templates
    geometry: Sequence[SliceGeometry] = ()
    """For the prompt; see `Question`."""
    mask_names: bool = False
    """Hide all names from the LLM."""
    sigma_rule: str = "csa"
    """`csa`, or `llm`: the LLM's words for each slice add up in the widths of the samples around its proposals."""
    pareto: bool = False
    """True if every task is an objective of its own. Trials have one number for all of them even so."""
    constraints: Sequence[str] = ()
    """The constraints, for the prompt. Trials have a `violation`, and values that include it."""
    cards: Mapping[str, str] = field(default_factory=dict[str, str])
    """For the prompt; see `Question`, also for the next three."""
    texts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict[str, Sequence[tuple[str, str]]])
    descriptions: Mapping[str, str] = field(default_factory=dict[str, str])
    chances: Mapping[str, float] = field(default_factory=dict[str, float])
    short: bool = False
    """Ask the LLM in a short form, for small models."""
    scan: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """For layer paths: {path of a single edit: its effect and standard error} from a scan."""
    presumed: Mapping[str, float] = field(default_factory=dict[str, float])
    """{gene: where the best value is presumed before anything is scored}: a prior of `llm` and `llm-off`."""
    parallel: int = 1
    """How many candidates are scored at the same time: an optimizer that asks for single ones asks for so many."""
    population: int | None = None
    """The size of populations that the config gives; None for the optimizer's own. One candidate for each worker if
    that is more."""
    before_rules_4: bool = False
    """True in logs with `rules` below 4: scores far below the others are not raised, and the LLM's answers are read by
    earlier rules."""
    before_rules_5: bool = False
    """True in logs with `rules` below 5: an optimizer of paths that has no candidate left is asked again, in
    `spaces: both` all inner segments of a path have a gain, and paths are searched with the budget of the start.
    Bayesian optimization refines no further where scores have little noise, believes nothing where methods are
    searched, repeats candidates where no new one is left, and merges no sets of models that cover the tasks. Optuna's
    samplers give one candidate at a time."""
    budget_is_known: bool = True
    """False where `budget` is only the most, before a first forecast: see `extend`."""
    from_uniform: bool = False
    """True if optimizers that start from one point take the uniform merge, as in logs with `rules` below 2, instead of
    the best start row."""

    @property
    def question(self) -> Question:
        """A question to the LLM before anything is scored; its other parts are the optimizer's."""
        return Question(
            space=self.space,
            trials=(),
            tasks=self.tasks,
            wanted=0,
            generation=0,
            sigma=0.0,
            used=0,
            budget=self.budget,
            geometry=self.geometry,
            mask_names=self.mask_names,
            constraints=self.constraints,
            cards=self.cards,
            texts=self.texts,
            descriptions=self.descriptions,
            chances=self.chances,
            short=self.short,
            before_rules_4=self.before_rules_4,
            budget_is_known=self.budget_is_known,
        )


class Optimizer(ABC):
    """Propose points of a search space and learn from their scores. All randomness comes from the setup's seed.

    A subclass implements `ask`, `tell` and `state`; the other methods do nothing by default.
    """

    largest: int | None = None
    """The most candidates that `ask` returns; None for as many as it is asked for."""
    batch = 1
    """How many candidates are worth asking for at once, even where fewer can be scored at the same time."""
    learns_paths = False
    """Whether it is told of layer paths, and of models alone that are no points of the space."""
    is_steady = False
    """Whether it can be asked while candidates are being scored, and told of each when it is scored."""
    beside: Sequence[Trial] = ()
    """Trials that are no points of its space, of which it is not told: an LLM is shown those of models alone."""

    @property
    def sigma(self) -> float | None:
        """The step size as a share of a gene's range; None for an optimizer without one."""
        return None

    @property
    def trust(self) -> float | None:
        """The share of candidates, 0 to 1, that the LLM is given; None for an optimizer without an LLM."""
        return None

    @abstractmethod
    def ask(self, size: int) -> Asking:
        """Propose at most `size` new candidates; none where none is left, which ends the search."""

    def expect(self, pending: Sequence[Suggestion]) -> None:
        """Know the candidates that are being scored, before `ask`, in an order of asking and telling without
        generations (`search.order: steady`). Only for optimizers that are `is_steady`.
        """
        raise NotImplementedError(f"{type(self).__name__} learns from whole generations")

    def ask_start(self, rows: Sequence[Suggestion]) -> Asking:
        """Propose start rows in addition to `rows`, before anything is scored; none by default."""
        return []
        yield  # makes this a generator, as Asking is

    @abstractmethod
    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn from a generation's trials, failures included; the first call brings the start rows."""

    @abstractmethod
    def state(self) -> str:
        """Return a digest of all that decides the next candidates; equal digests mean equal futures."""

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        """Replace the values of all earlier trials, before each `ask` and `tell`, where constraints or several
        objectives change them over time: see `search.objectives.scalarize`.

        `weights` are the current weights of the objectives, empty where the objective is the sum. An optimizer that
        keeps no values needs no such method.
        """

    def extend(self, evaluations: int) -> None:
        """Plan with another budget, in evaluations, after the user raised it, or by a forecast from what was spent."""

    def recommend(self) -> Trial | None:
        """Return the result of a run with `rules` below 2; newer runs use `search.optimizers.recommend`."""
        return None


def digest(generator: np.random.Generator, *parts: Any) -> str:
    """Return a short digest of a random generator's state and of plain values."""
    text = json.dumps([generator.bit_generator.state, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class CallDigest:
    """A digest of all arguments of `ask` and `tell`: the `state` of an optimizer that is a function of these."""

    def __init__(self, *setup: Any) -> None:
        self._hash = hashlib.sha256()
        self.add(*setup)

    def add(self, *parts: Any) -> None:
        self._hash.update(json.dumps(parts, sort_keys=True, default=str).encode())

    def told(self, trials: Sequence[Trial]) -> None:
        told = [(trial.value, trial.candidate.genes, trial.candidate.path) for trial in trials]
        self.add("told", [each if each[-1] else each[:-1] for each in told])  # as it was before there were paths

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


class ReproducibleOptimizer(Optimizer):
    """An optimizer that is a function of its setup and of the arguments of all calls: `state` is their digest."""

    _setup: Setup
    _history: CallDigest

    def extend(self, evaluations: int) -> None:
        """Plan with another budget; an LLM is told how many evaluations are left."""
        if evaluations != self._setup.budget:
            self._setup = replace(self._setup, budget=evaluations, budget_is_known=True)
            self._history.add("budget", evaluations)

    def state(self) -> str:
        return str(self._history)


def genes_key(genes: Genes) -> tuple[float, ...]:
    """Return a hashable form of genes."""
    return tuple(genes[name] for name in sorted(genes))
