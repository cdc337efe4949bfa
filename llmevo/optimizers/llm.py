"""The evolution strategy with an LLM in it.

Each generation the LLM reads the best trials and proposes recombined means (EvoLLM,
https://arxiv.org/abs/2402.18381); Gaussian mutation around its proposals and around the best trial so far fills
the generation. The LLM never sets the step size: the success rate does.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmevo.optimizers.base import Asking, Setup, digest
from llmevo.prompting import STYLES, Question
from llmevo.trial import Suggestion, Trial

FIRST_SIGMA = 0.15
SIGMA_RANGE = (0.02, 0.3)
"""Step sizes in shares of a gene's range. Below the lower one, differences drown in the noise of the tasks."""

TARGET_SUCCESS = 0.2
"""The share of a generation that should improve on the best: the 1/5 rule (Rechenberg 1973)."""

MOST_PROPOSALS = 4


class LlmEvolution:
    """LLM proposals and Gaussian mutation, with a step size adapted by success.

    Use it for any merge; without an answer from the LLM it is a plain evolution strategy around the best trial.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup, self._space = setup, setup.space
        self._random = np.random.default_rng(setup.seed)
        self._sigma = FIRST_SIGMA
        self._trials: list[Trial] = []
        self._generation = 0

    @property
    def sigma(self) -> float:
        return self._sigma

    def ask(self, size: int) -> Asking:
        self._generation += 1
        wanted = max(1, min(MOST_PROPOSALS, size // 2))
        question = self._question(wanted)
        style = STYLES[self._setup.style]
        seed = int(self._random.integers(2**31))
        reading = yield style.ask(question, self._setup.templates, seed)
        proposals = reading.proposals[:wanted]
        return [*proposals, *self._mutants(proposals, size - len(proposals))]

    def _question(self, wanted: int) -> Question:
        setup = self._setup
        return Question(
            space=setup.space,
            trials=tuple(self._trials),
            tasks=setup.tasks,
            wanted=wanted,
            generation=self._generation,
            sigma=self._sigma,
            used=len(self._trials),
            budget=setup.budget,
        )

    def _mutants(self, proposals: Sequence[Suggestion], size: int) -> list[Suggestion]:
        """Gaussian steps around the best trial and the proposals, in turn."""
        best = max(self._trials, key=lambda trial: trial.value, default=None)
        if best is None:  # no start row lies within the user's bounds
            centres = [("mutation of the middle of the bounds", np.full(len(self._space.genes), 0.5))]
        else:
            centres = [(f"mutation of #{best.candidate.id}", self._space.to_unit(best.candidate.genes))]
        centres += [
            (f"mutation of the LLM's proposal {i + 1}", self._space.to_unit(p.genes)) for i, p in enumerate(proposals)
        ]
        mutants: list[Suggestion] = []
        for place in range(size):
            note, centre = centres[place % len(centres)]
            mutants.append(Suggestion(self._space.from_unit(self._step(centre)), "gaussian", note))
        return mutants

    def _step(self, centre: NDArray[np.float64]) -> NDArray[np.float64]:
        """One mutation; what would leave the unit cube is reflected, so that mass does not pile up at the bounds.

        Choices have no order to step along: each is drawn anew with the step size for its probability.
        """
        point = np.abs(centre + self._sigma * self._random.standard_normal(len(centre)))
        point = np.clip(1.0 - np.abs(1.0 - point), 0.0, 1.0)
        for place, gene in enumerate(self._space.genes):
            if gene.choices:
                anew = self._random.random() < self._sigma
                point[place] = self._random.random() if anew else centre[place]
        return point

    def tell(self, trials: Sequence[Trial]) -> None:
        before = max((trial.value for trial in self._trials), default=None)
        self._trials += trials
        if before is None or not trials:
            return
        success = sum(trial.value > before for trial in trials) / len(trials)
        low, high = SIGMA_RANGE
        step = math.exp(0.5 * (success - TARGET_SUCCESS) / (1 - TARGET_SUCCESS))
        self._sigma = min(max(self._sigma * step, low), high)

    def state(self) -> str:
        return digest(self._random, self._sigma, self._generation, [(t.value, t.candidate.genes) for t in self._trials])
