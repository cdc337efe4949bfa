"""The interface of optimizers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


class Optimizer(ABC):
    """Propose points of a search space and learn from their scores. All randomness comes from the setup's seed.

    A subclass implements `ask`, `tell` and `state`; the other methods do nothing by default.
    """

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
        """Propose at least one and at most `size` new candidates."""

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
        """Plan with another budget, in evaluations, after the user raised it."""

    def recommend(self) -> Trial | None:
        """Return the trial to hand over in runs with `rules` below 2; newer runs use `search.optimizers.recommend`."""
        return None


def digest(generator: np.random.Generator, *parts: Any) -> str:
    """A short digest of a random generator's state and of plain values."""
    text = json.dumps([generator.bit_generator.state, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
