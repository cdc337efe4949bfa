"""CMA-ES with a surrogate, and an LLM that proposes candidates: the scores decide how many of these are evaluated."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmevo.search.optimizers.base import Asking, Setup, genes_key
from llmevo.search.optimizers.earlier.surrogate_cma_es import POPULATION, Prospect, SurrogateCmaEs
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Question, Reading
from llmevo.search.space import Array
from llmevo.search.trial import Suggestion, Trial

PROPOSALS = 4  # asked for in each prompt
AROUND = 8  # samples around each proposal, in the widths that the LLM asks for; they compete for its slots
WIDTHS = (0.01, 0.3)  # bounds of their standard deviation, as shares of a gene's range
PEERS = 8  # the latest numeric candidates that an LLM's candidate is ranked among
FACTORS = {"tighter": 0.5, "same": 1.0, "wider": 2.0}  # of the step size, by the LLM's word for a slice

PRIOR = {"chat": 0.25, "completion": 0.15}  # the first trust, by style: base models rarely do more than recombine
PRIOR_WEIGHT = 2  # candidates that the prior is worth
CAP = 0.5  # the highest trust: at least half of every generation is the numeric engine's
WINDOW = 8  # the LLM's latest candidates that count
FLOOR, SLOPE = 0.2, 1.4  # trust is FLOOR at a mean rank of a half, and SLOPE more for every unit above it (measured)
PROBE = 32  # an LLM without trust is asked for one candidate in so many evaluations: it may have improved
PATIENCE = 3  # answers in a row that may be lost before it counts against the LLM: servers restart


class Trust:
    """The share of the evaluations that an LLM is given, by the ranks of its own candidates.

    Each is ranked among the latest numeric candidates: 1 above all, 0 below all or failed. Trust is linear in the mean
    of the latest ranks, from 0 to a half. A repetition is never evaluated, so a copy of the best earns nothing.
    """

    def __init__(self, prior: float) -> None:
        self._prior = min(max((prior - FLOOR) / SLOPE + 0.5, 0.0), 1.0)
        self._ranks: deque[float] = deque(maxlen=WINDOW)
        self._credit = 0.0
        self._since = 0
        self._lost = 0

    @property
    def value(self) -> float:
        """Return the share, from 0 to 1/2."""
        mean = (PRIOR_WEIGHT * self._prior + sum(self._ranks)) / (PRIOR_WEIGHT + len(self._ranks))
        return min(max(FLOOR + SLOPE * (mean - 0.5), 0.0), CAP)

    def slots(self, size: int) -> int:
        """Return how many of the next `size` candidates are the LLM's; fractions are saved up."""
        self._since += size
        self._credit = min(self._credit + self.value * size, CAP * size + 1.0)
        slots = min(int(self._credit), max(1, int(CAP * size)))
        if not slots and self._since > PROBE:
            slots, self._credit = 1, 1.0
        if slots:
            self._credit -= slots
            self._since = 0
        return slots

    def observe(self, value: float, others: Sequence[float]) -> None:
        """Rank the score of one of the LLM's candidates, -inf if it failed, among numeric ones."""
        self._lost = 0
        if others:
            below = sum(value > other for other in others) + 0.5 * sum(value == other for other in others)
            self._ranks.append(below / len(others) if value > float("-inf") else 0.0)

    def reject(self, lost: bool = False) -> None:
        """Count an answer without a proposal worth scoring; a `lost` one only after several in a row."""
        self._lost = self._lost + 1 if lost else 0
        if not lost or self._lost > PATIENCE:
            self._ranks.append(0.0)


class LlmGuidedCmaEs(SurrogateCmaEs):
    """CMA-ES with a surrogate, and an LLM that adds candidates and earns its share of the evaluations by their scores.

    A proposal of the LLM is evaluated only if it is new and the model thinks it possible that it is better than the
    last numeric candidate of the generation, whose place it takes. It moves the distribution only where it was better
    than most, and no further than a sample could. It never sets the step size or the covariance. So a bad LLM soon gets
    few, one in 32 when none is any good. Only for logs with `rules` below 3, where `llm` is this optimizer.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._trust = Trust(PRIOR.get(setup.style, PRIOR["chat"]))
        self._generation = 0
        self._asked: dict[tuple[float, ...], Suggestion] = {}
        self._predictions: list[tuple[float, float]] = []
        self._widths = np.ones(len(setup.space.slices))
        self._median = 0.0

    @property
    def trust(self) -> float | None:
        return self._trust.value

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        self._generation += 1
        size = min(size, POPULATION)
        pool = self._pool()
        numeric = self._choose(pool, size)
        slots = self._trust.slots(size)
        proposed: list[Suggestion] = []
        if slots:
            style = STYLES[self._setup.style]
            seed = int(self._other_random.integers(2**31))
            reading = yield style.ask(self._question(pool), self._setup.templates, seed)
            proposed = self._admitted(reading, numeric, slots)
            self._history.add("read", [suggestion.genes for suggestion in proposed])
        self._asked |= {genes_key(suggestion.genes): suggestion for suggestion in proposed}
        return [*proposed, *numeric[: size - len(proposed)]]

    def _question(self, pool: Sequence[Prospect]) -> Question:
        setup = self._setup
        ahead = [p for p in pool if p.deviation > 0][:3]
        return replace(
            setup.question,
            trials=tuple(self._trials),
            wanted=PROPOSALS,
            generation=self._generation,
            sigma=self.sigma,
            used=len(self._trials),
            suggestions=[(setup.space.from_unit(p.point), *self._in_score(p)) for p in ahead],
            predictions=self._predictions,
            weights=self._weights,
        )

    def _in_score(self, prospect: Prospect) -> tuple[float, float]:
        score, mean, deviation = self._as_score, prospect.mean, prospect.deviation
        return score(mean), (score(mean + deviation) - score(mean - deviation)) / 2

    def _admitted(self, reading: Reading, numeric: Sequence[Suggestion], slots: int) -> list[Suggestion]:
        """The LLM's proposals, and then samples around them, each in the place of the last numeric candidate.

        A proposal needs the higher upper confidence bound of the two, with an allowance that shrinks with the
        generations (Chang et al., https://arxiv.org/abs/2505.14756, "Justify"), and a distance from the candidates that
        stay: the numeric engine would find a near one by itself.
        """
        points = [self._space.to_unit(suggestion.genes) for suggestion in numeric]
        bars = self._upper_bounds(points) - 1 / self._generation
        admitted: list[Suggestion] = []
        around = [other for proposal in reading.proposals for other in self._around(proposal)]
        for group in filter(None, (reading.proposals, around)):
            offered = [self._space.to_unit(suggestion.genes) for suggestion in group]
            bounds = self._upper_bounds(offered)
            for place in np.argsort(-bounds, kind="stable"):
                last = len(numeric) - len(admitted) - 1
                others = [*points[:last], *(self._space.to_unit(other.genes) for other in admitted)]
                if len(admitted) == slots or bounds[place] < bars[last]:
                    break
                chosen = self._features.chosen(offered[place])
                alike = [other for other in others if self._features.chosen(other) == chosen]
                if self._is_new(group[place].genes, admitted) and self._apart(offered[place], alike):
                    admitted.append(group[place])
        if not admitted:
            self._trust.reject(reading.lost)
        return admitted

    def _upper_bounds(self, points: Sequence[Array]) -> Array:
        """One standard deviation above the expectations of points."""
        means, deviations = self._predicted(points)
        return means + deviations

    def _around(self, proposal: Suggestion) -> list[Suggestion]:
        """Samples around a proposal, as wide in every slice as the LLM says, within bounds."""
        factors = np.array([FACTORS[word] for word in proposal.spread] or [1.0] * len(self._space.slices))
        if self._setup.sigma_rule == "llm":  # its words add up
            self._widths = factors = np.clip(self._widths * factors, 1 / 3, 3.0)
        by_slice = dict(zip(self._space.slices, factors, strict=False))
        widths = np.clip([self.sigma * by_slice.get(gene.slice or "", 1.0) for gene in self._space.genes], *WIDTHS)
        widths[self._features.choices] = 0.0
        steps = self._other_random.standard_normal((AROUND, len(widths))) * widths
        points = np.clip(self._space.to_unit(proposal.genes) + steps, 0.0, 1.0)
        note = f"around the LLM's proposal: {proposal.note}"
        return [Suggestion(self._space.from_unit(point), "llm", note) for point in points]

    def tell(self, trials: Sequence[Trial]) -> None:
        own = [trial for trial in trials if genes_key(trial.candidate.genes) in self._asked]
        numeric = [trial.value for trial in (*self._trials, *trials) if trial.candidate.origin == "gaussian"]
        for trial in own:
            self._trust.observe(trial.value, numeric[-PEERS:])
            expected = self._asked[genes_key(trial.candidate.genes)].expected
            if expected is not None and trial.score:
                self._predictions.append((expected, trial.score.total))
        self._median = float(np.median([trial.value for trial in trials])) if trials else 0.0
        super().tell(trials)
        self._asked.clear()

    def _may_lead(self, trial: Trial) -> bool:
        """True if the distribution learns from a trial: an LLM's has to be better than most of its generation."""
        return genes_key(trial.candidate.genes) not in self._asked or trial.value > self._median
