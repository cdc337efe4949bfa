"""The evolution strategy with an LLM in it: the LLM proposes, statistics dispose."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from llmevo.search.optimizers.base import Asking, Optimizer, Setup
from llmevo.search.optimizers.population import History, key
from llmevo.search.optimizers.surrogate.cma_es import POPULATION, Evolution, Prospect
from llmevo.search.optimizers.surrogate.distribution import Array, next_sigma, spread_factors
from llmevo.search.optimizers.trust import PRIOR, Trust
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Question, Reading
from llmevo.search.trial import Suggestion, Trial

MOST_PROPOSALS = 4


AROUND = 8
"""Samples around each proposal, in the widths that the LLM asks for; they compete for its slots."""


WIDTHS = (0.01, 0.3)
"""The least and the largest standard deviation of these, in shares of a gene's range."""


PEERS = 8
"""How many of the latest numeric candidates an LLM's is ranked among."""


class SurrogateCmaEs(Optimizer):
    """The numeric engine alone: CMA-ES whose samples a Gaussian process ranks first.

    Use it where there is no LLM, and beside `llm` to see what the LLM adds. Measured for 50 to 200
    evaluations of 10 to 40 genes.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup, self._space = setup, setup.space
        self._engine = Evolution(setup)
        self._random = np.random.default_rng([setup.seed, 1])
        genes = [gene.described() for gene in setup.space.genes]
        self._history = History(setup.seed, setup.budget, setup.sigma_rule, genes)
        self._best_value = -np.inf
        self._begun = False
        self._weights: Mapping[str, float] = {}

    @property
    def sigma(self) -> float:
        """The step size in shares of a gene's range."""
        return self._engine.sigma

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        pool = self._engine.pool()
        return self._numeric(pool, min(size, POPULATION))
        yield  # makes this a generator, as asking is

    def _numeric(self, pool: Sequence[Prospect], size: int) -> list[Suggestion]:
        """At least one candidate; those of the highest expectation first."""
        chosen = self._engine.choose(pool, size)
        if not chosen:  # nothing new is left near by
            chosen = [Suggestion(self._space.from_unit(self._random.random(len(self._space.genes))), "gaussian")]
        return chosen

    def extend(self, evaluations: int) -> None:
        """Evaluations in all from now on: the LLM is told how many are left."""
        if evaluations != self._setup.budget:
            self._setup = replace(self._setup, budget=evaluations)
            self._history.add("budget", evaluations)

    def tell(self, trials: Sequence[Trial]) -> None:
        self._history.told(trials)
        self._engine.tell(trials)
        best = max((trial.value for trial in trials), default=-np.inf)
        improved = best > self._best_value
        self._best_value = max(best, self._best_value)
        if not self._begun:  # the start rows are points of no distribution
            self._begun = True
            return
        before = self._engine.sigma
        moved = self._engine.learn([trial for trial in trials if trial.score and self._may_lead(trial)])
        if moved and self._engine.distribution:
            self._engine.distribution.sigma = next_sigma(
                self._setup.sigma_rule, before, self._engine.sigma, improved, len(self._space.genes)
            )

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        """The model learns from the values of now, and so does whoever looks for an improvement."""
        self._history.told(trials)
        self._engine.retell(trials)
        if weights != self._weights:
            self._engine.move()
        self._best_value = max((trial.value for trial in trials), default=-np.inf)
        self._weights = weights

    def _may_lead(self, trial: Trial) -> bool:
        """Whether the distribution learns from a scored trial."""
        return True

    def recommend(self) -> Trial | None:
        """What logs with `rules` below 2 make a finalist: where scores are noisy, the trial that the model expects most
        of. Newer runs have one rule for all optimizers, `llmevo.search.optimizers.recommend`.
        """
        return self._engine.best

    def state(self) -> str:
        return str(self._history)


class LlmGuidedCmaEs(SurrogateCmaEs):
    """The numeric engine, and an LLM that adds candidates and earns its share of the evaluations by their worth.

    What an LLM proposes is evaluated only if it is new and the model thinks it possible that it is better than the
    last numeric candidate of the generation, whose place it takes. It moves the distribution only where it was better
    than most, and no further than a sample could. It never sets the step size or the covariance. So a bad LLM soon gets
    few, one in 32 when none is any good. Use it whenever there is an LLM; the more it knows of the models, the better.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._trust = Trust(PRIOR.get(setup.style, PRIOR["chat"]))
        self._generation = 0
        self._asked: dict[tuple[float, ...], Suggestion] = {}
        self._predictions: list[tuple[float, float]] = []
        self._widths = np.ones(len(setup.space.slices))
        self._middle = 0.0

    @property
    def trust(self) -> float | None:
        return self._trust.value

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        self._generation += 1
        size = min(size, POPULATION)
        pool = self._engine.pool()
        numeric = self._numeric(pool, size)
        slots = self._trust.slots(size)
        proposed: list[Suggestion] = []
        if slots:
            style = STYLES[self._setup.style]
            seed = int(self._random.integers(2**31))
            reading = yield style.ask(self._question(pool), self._setup.templates, seed)
            proposed = self._admitted(reading, numeric, slots)
            self._history.add("read", [suggestion.genes for suggestion in proposed])
        self._asked |= {key(suggestion.genes): suggestion for suggestion in proposed}
        return [*proposed, *numeric[: size - len(proposed)]]

    def _question(self, pool: Sequence[Prospect]) -> Question:
        setup, engine = self._setup, self._engine
        ahead = [p for p in pool if p.deviation > 0][:3]
        return Question(
            space=setup.space,
            trials=tuple(engine.trials),
            tasks=setup.tasks,
            wanted=MOST_PROPOSALS,
            generation=self._generation,
            sigma=engine.sigma,
            used=len(engine.trials),
            budget=setup.budget,
            suggestions=[(setup.space.from_unit(p.point), *self._in_score(p)) for p in ahead],
            predictions=self._predictions,
            geometry=setup.geometry,
            mask_names=setup.mask_names,
            constraints=setup.constraints,
            weights=self._weights,
        )

    def _in_score(self, prospect: Prospect) -> tuple[float, float]:
        score, mean, deviation = self._engine.as_score, prospect.mean, prospect.deviation
        return score(mean), (score(mean + deviation) - score(mean - deviation)) / 2

    def _admitted(self, reading: Reading, numeric: Sequence[Suggestion], slots: int) -> list[Suggestion]:
        """The LLM's proposals, and then samples around them, each of which takes the place of the last numeric one.

        It is to have the higher hope of the two, with an allowance that shrinks as scores come in (Chang et al.,
        https://arxiv.org/abs/2505.14756, "Justify"), and to lie apart from what stays: what the numeric engine would
        find anyway earns nothing.
        """
        points = [self._space.to_unit(suggestion.genes) for suggestion in numeric]
        bars = self._hopes(points) - 1 / self._generation
        admitted: list[Suggestion] = []
        around = [other for proposal in reading.proposals for other in self._around(proposal)]
        for group in filter(None, (reading.proposals, around)):
            offered = [self._space.to_unit(suggestion.genes) for suggestion in group]
            hoped = self._hopes(offered)
            for place in np.argsort(-hoped, kind="stable"):
                last = len(numeric) - len(admitted) - 1
                beside = [*points[:last], *(self._space.to_unit(other.genes) for other in admitted)]
                if len(admitted) == slots or hoped[place] < bars[last]:
                    break
                if self._engine.is_new(group[place].genes, admitted) and self._engine.differs(offered[place], beside):
                    admitted.append(group[place])
        if not admitted:  # no answer, nothing new, nothing as good: no credit for any of these
            self._trust.reject(reading.lost)
        return admitted

    def _hopes(self, points: Sequence[Array]) -> Array:
        """One standard deviation above what the model expects of points."""
        means, deviations = self._engine.predicted(points)
        return means + deviations

    def _around(self, suggestion: Suggestion) -> list[Suggestion]:
        """Samples around a proposal, as wide in every slice as the LLM says, within bounds."""
        factors = np.array(spread_factors(suggestion.spread) or [1.0] * len(self._space.slices))
        if self._setup.sigma_rule == "llm":  # its words add up
            self._widths = factors = np.clip(self._widths * factors, 1 / 3, 3.0)
        by_slice = dict(zip(self._space.slices, factors, strict=False))
        widths = [self.sigma * by_slice.get(gene.slice or "", 1.0) for gene in self._space.genes]
        widths = [0.0 if g.choices else w for g, w in zip(self._space.genes, np.clip(widths, *WIDTHS), strict=True)]
        steps = self._random.standard_normal((AROUND, len(widths))) * widths
        points = np.clip(self._space.to_unit(suggestion.genes) + steps, 0.0, 1.0)
        note = f"around the LLM's proposal: {suggestion.note}"
        return [Suggestion(self._space.from_unit(point), "llm", note) for point in points]

    def tell(self, trials: Sequence[Trial]) -> None:
        own = [trial for trial in trials if key(trial.candidate.genes) in self._asked]
        numeric = [trial.value for trial in (*self._engine.trials, *trials) if trial.candidate.origin == "gaussian"]
        for trial in own:
            self._trust.observe(trial.value, numeric[-PEERS:])
            predicted = self._asked[key(trial.candidate.genes)].predicted
            if predicted is not None and trial.score:
                self._predictions.append((predicted, trial.score.total))
        self._middle = float(np.median([trial.value for trial in trials])) if trials else 0.0
        super().tell(trials)
        self._asked.clear()

    def _may_lead(self, trial: Trial) -> bool:
        """The numeric candidates all do; the LLM's only where they are better than most of their generation."""
        return key(trial.candidate.genes) not in self._asked or trial.value > self._middle
