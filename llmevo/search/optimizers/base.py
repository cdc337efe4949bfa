"""What an optimizer is."""

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from llmevo.llm.templates import Templates
from llmevo.search.prompts.question import Prompt, Reading, SliceGeometry
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Suggestion, Trial

Asking = Generator[Prompt, Reading, list[Suggestion]]
"""An optimizer at work on its next candidates: it may yield prompts and is sent what was read of the answers.

So it needs no LLM, no log and no network; whoever drives it may answer from a server or from a recording.
"""


@dataclass(frozen=True)
class Setup:
    """What an optimizer is made from."""

    space: SearchSpace
    seed: int
    budget: int
    """Evaluations in all, the start rows included."""
    tasks: Mapping[str, tuple[float, str]]
    """Each task's weight and the metric that counts."""
    style: str
    """How the proposer wants to be asked."""
    templates: Templates
    geometry: Sequence[SliceGeometry] = ()
    """For the prompt; see `Question`."""
    mask_names: bool = False
    """Hide all names from the LLM."""
    sigma_rule: str = "csa"
    """How the `llm` strategy adapts its step size: `csa`, `success`, `legacy` or `llm`."""
    pareto: bool = False
    """Whether every task is an aim of its own. Trials come with one number for all of them even so."""
    constraints: Sequence[str] = ()
    """What a recipe must keep, for the prompt. Trials come with `violation`, and with values that have it in them."""
    from_uniform: bool = False
    """Whether optimizers that start from one point take the uniform merge, as in logs with `rules` below 2; by default
    they take the best start row."""


class Optimizer(Protocol):
    """Proposes points and learns from their scores. All randomness comes from the setup's seed.

    An optimizer does not say which trial to hand over: that is the same rule for all, `search.optimizers.recommend`.
    """

    @property
    def sigma(self) -> float | None:
        """The step size in shares of a gene's range; None where there is none."""
        ...

    def ask(self, size: int) -> Asking:
        """At most `size` new candidates; at least one."""
        ...

    def tell(self, trials: Sequence[Trial]) -> None:
        """A generation's trials, failures included; the first call brings the start rows."""
        ...

    def state(self) -> str:
        """A digest of all that decides what comes next; equal digests mean equal futures."""
        ...


@runtime_checkable
class Retold(Protocol):
    """An optimizer that keeps the values of trials, and so has to know when they change: with constraints and with
    several aims; see `search.objectives.valued`. One that keeps none, or values them by itself, needs no such method.
    """

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        """Everything it was told of, with the values of now; `weights` is what each aim counts at present, empty where
        the objective is the sum. Called before each `ask`, and before each `tell` for what was told earlier.
        """
        ...


def digest(generator: np.random.Generator, *parts: Any) -> str:
    """A short digest of a random generator's state and of plain values."""
    text = json.dumps([generator.bit_generator.state, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
