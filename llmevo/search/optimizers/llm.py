"""Bayesian optimization that an LLM leads: the scores of its recipes decide how many of the evaluations are its own."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmevo.search.optimizers.base import Asking, Setup, genes_key
from llmevo.search.optimizers.bayesian import WIDTH, BayesianOptimization
from llmevo.search.optimizers.llm_share import SUCCESS, Share, probability_of_improvement
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Belief, Hypothesis, Proposed, Question, Reading
from llmevo.search.space import Array, Genes
from llmevo.search.trial import Suggestion, Trial

GENERATION = 3  # candidates between two prompts
PROPOSALS = 4  # asked for in each prompt, at most
FIRST = 3  # proposals that are start rows
LEFT = 4  # the share of the evaluations after the start rows that these may be is 1/LEFT

STEP = 0.17  # a belief's direction as a value: so far from the best recipe, a share of the range


class LlmLedSearch(BayesianOptimization):
    """Bayesian optimization that an LLM leads.

    The LLM is asked for recipes before anything is scored, and then, as long as its recipes are worth more than the
    numeric ones, for most of each generation. They are scored in the order of the answer, whatever the model of the
    scores predicts for them. The LLM's beliefs are a prior mean of that model, with a weight that the scores decide. An
    answer without a recipe does not lower the LLM's share; its evaluations go to the statistical model. Merges of the
    fewest models that cover the tasks are proposed only where none of the LLM's first recipes is the best start row.
    Use it whenever there is an LLM; the more it knows of the models, the better.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.largest = self.batch = max(GENERATION, setup.parallel)
        self._share = Share(SUCCESS.get(setup.style, SUCCESS["chat"]))
        self._other_random = np.random.default_rng([setup.seed, 1])
        self._generation = 0
        self._own: dict[tuple[float, ...], Suggestion] = {}
        self._proposed: list[tuple[Suggestion, str, int]] = []
        self._hypotheses: list[Hypothesis] = []
        self._beliefs: Sequence[Belief] = ()
        self._analysis = ""

    @property
    def trust(self) -> float | None:
        return self._share.value

    def ask_start(self, rows: Sequence[Suggestion]) -> Asking:
        left = (self._setup.budget - len(rows)) // LEFT
        if self._setup.style != "chat" or left < 1:
            return []
        self._known |= {self._features.model_key(row.genes) for row in rows if self._space.contains(row.genes)}
        return (yield from self._ask_llm(min(FIRST, left), (), rows))

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        self._generation += 1
        size = min(size, max(GENERATION, self._setup.parallel))
        slots = self._share.slots(size) if self._share.may_ask() else 0
        if not slots:
            self._share.spend(size, 0)  # as if it was a whole generation: a prompt is worth more than one recipe
            return self._numeric(self._free(size), self._pending)
        own = yield from self._ask_llm(slots, self._numeric(3, self._pending))
        self._share.spend(size, len(own))
        return [*own, *self._numeric(size - len(own), [*self._pending, *own])]

    def _ask_llm(self, slots: int, numeric: Sequence[Suggestion], start: Sequence[Suggestion] = ()) -> Asking:
        """Ask the LLM, and return its first proposals that are new, in its order."""
        seed = int(self._other_random.integers(2**31))
        question = self._question(slots, numeric)
        question = replace(question, used=question.used + len(start), start=start)
        reading = yield STYLES[self._setup.style].ask(question, self._setup.templates, seed)
        chosen: list[Suggestion] = []
        for proposal in reading.proposals:
            fate = "no evaluation was left for it"
            if not self._is_new(proposal.genes, [*self._pending, *chosen]):
                fate = "it repeats a candidate"
            elif len(chosen) < slots:
                chosen.append(proposal)
                fate = "scored"
            self._proposed.append((proposal, fate, self._generation))
        self._remember(reading)
        self._own |= {genes_key(suggestion.genes): suggestion for suggestion in chosen}
        self._share.answered(bool(chosen))
        self._history.add("read", [suggestion.genes for suggestion in chosen], self._believes())
        return chosen

    def _remember(self, reading: Reading) -> None:
        self._analysis = reading.analysis or self._analysis
        self._hypotheses += reading.hypotheses
        if reading.beliefs:
            self._beliefs = reading.beliefs
            self._believed = self._centres_of(reading.beliefs)

    def _believes(self) -> list[list[float]]:
        return [part.tolist() for part in self._believed] if self._believed else []

    def _question(self, slots: int, numeric: Sequence[Suggestion]) -> Question:
        trials = {genes_key(trial.candidate.genes): trial for trial in self._trials}
        proposed = [
            self._proposal_of(one, trials.get(genes_key(one.genes)), fate, generation)
            for one, fate, generation in self._proposed
        ]
        predictions = [
            (of.suggestion.expected, of.trial.score.total)
            for of in proposed
            if of.suggestion.expected is not None and of.trial and of.trial.score
        ]
        alone = [trial for trial in self.beside if not trial.candidate.path]
        return replace(
            self._setup.question,
            trials=tuple(sorted([*self._trials, *alone], key=lambda trial: trial.candidate.id)),
            wanted=min(slots + 1, PROPOSALS),  # one more, in the place of a repetition
            generation=self._generation,
            used=len(self._trials) + len(self.beside),
            suggestions=self._expectations(numeric),
            predictions=predictions,
            weights=self._weights,
            slots=slots,
            proposed=proposed,
            hypotheses=tuple(self._hypotheses),
            beliefs=self._beliefs,
            belief_weight=self._model.belief_probability,
            share=self._share.value,
            analysis=self._analysis,
        )

    def _expectations(self, numeric: Sequence[Suggestion]) -> list[tuple[Genes, float, float]]:
        """(genes, expected score, its standard deviation) of the numeric engine's next candidates, by the scores alone:
        the model that chose them takes each for scored before the next. None before there are scores.
        """
        if not self._trials or not numeric:
            return []
        with self._threads.limit(limits=1):
            self._fit()
            found = zip(*self._model.predict(self._points([one.genes for one in numeric])), strict=True)
        return [
            (one.genes, self._scale.score(float(mean)), self._scale.deviation * float(deviation))
            for one, (mean, deviation) in zip(numeric, found, strict=True)
        ]

    def _proposal_of(self, one: Suggestion, trial: Trial | None, fate: str, generation: int) -> Proposed:
        """What became of a proposal; a repetition has no trial of its own."""
        if fate != "scored":
            return Proposed(one, None, fate, generation)
        return Proposed(one, trial, fate if trial else "it is being scored", generation)

    def tell(self, trials: Sequence[Trial]) -> None:
        before = [*self._trials]
        super().tell(trials)
        if not before:  # start rows: the first scores say what the LLM's recipes are worth beside them
            before = [trial for trial in trials if genes_key(trial.candidate.genes) not in self._own]
            trials = [trial for trial in trials if genes_key(trial.candidate.genes) in self._own]
            own, others = (max((one.value for one in some), default=-math.inf) for some in (trials, before))
            if own > others:
                self._covers = []  # the LLM knows a better place to begin
        self._observe(before, trials)

    def _observe(self, before: Sequence[Trial], trials: Sequence[Trial]) -> None:
        """Learn what new candidates are worth: the probability that each is better than the best one before."""
        if not any(trial.score for trial in before) or not trials:
            return
        with self._threads.limit(limits=1):
            self._fit()
            best = max(self._model.mean(self._points([trial.candidate.genes for trial in before])))
            means, deviations = self._model.predict(self._points([trial.candidate.genes for trial in trials]))
        chances = probability_of_improvement(means, deviations, float(best), 1e-6)
        for trial, chance in zip(trials, chances, strict=True):
            self._share.observe(float(chance) if trial.score else 0.0, genes_key(trial.candidate.genes) in self._own)

    # Beliefs

    def _centres_of(self, beliefs: Sequence[Belief]) -> tuple[Array, Array]:
        """The value that is believed to be the best of each gene, and its precision, 0 where nothing is believed.

        A direction is a value one step from the best recipe. A belief takes the place of a presumed value.
        """
        best = max(self._trials, key=lambda trial: trial.value, default=None)
        start = self._space.to_unit(best.candidate.genes if best else self._space.clamp(self._space.uniform()))
        centres, precisions = start.copy(), np.zeros(len(start))
        if self._presumed:
            precisions = self._presumed[1].copy()
            centres = np.where(precisions > 0, self._presumed[0], start)
        places = {gene.name: place for place, gene in enumerate(self._space.genes) if not gene.choices}
        for belief in sorted(beliefs, key=lambda one: one.confidence):  # the most confident has the last word
            for name in belief.genes:
                if (place := places.get(name)) is None:
                    continue
                gene, width = self._space.genes[place], WIDTH
                if belief.value is None:
                    centres[place] = np.clip(start[place] + STEP * belief.direction, 0.0, 1.0)
                else:
                    centres[place] = gene.to_unit(belief.value)
                    if belief.spread:
                        width = float(np.clip(belief.spread / (gene.high - gene.low), 0.05, 1.0))
                precisions[place] = 1 / width**2
        return centres, precisions
