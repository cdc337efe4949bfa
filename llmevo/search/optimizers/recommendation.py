"""Which trial to hand over when scores are noisy: one rule for every optimizer."""

from collections.abc import Sequence

import numpy as np
from threadpoolctl import ThreadpoolController

from llmevo.search.optimizers.surrogate.cma_es import LEAST_NOISE, NOISY
from llmevo.search.optimizers.surrogate.features import Features
from llmevo.search.optimizers.surrogate.gaussian_process import GaussianProcess, Scale, noise_of
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Trial

FITS = 5
"""Each goes on from the one before, a few steps further."""


MOST = 400
"""Trials that the model learns from: the highest scores and, of the rest, the latest."""


def recommend(space: SearchSpace, trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest expected score; None where none has a score. `trials` lie in the space.

    Where scores are exact that is the one with the highest score. Where they are noisy the highest of many scores is a
    lucky one, and the expectation is the posterior mean of a Gaussian process of all scores, the start rows' included:
    it takes from a score what its neighbours do not confirm (Jin and Branke 2005, section II,
    https://doi.org/10.1109/TEVC.2005.846356; the posterior mean is the rule of knowledge gradient, Frazier et al. 2009,
    https://doi.org/10.1287/ijoc.1080.0314). It depends on the trials alone, not on the optimizer that asked for them,
    so optimizers are compared by where they searched.
    """
    scored = [trial for trial in trials if trial.score]
    noise = noise_of(trials)
    if len(scored) < 2 or noise <= NOISY:
        return max(scored, key=lambda trial: trial.value, default=None)
    known = _learnt(trials)
    features = Features(space)
    points, candidates = (features.of([space.to_unit(t.candidate.genes) for t in of]) for of in (known, scored))
    values = Scale([trial.value for trial in known], noisy=True).values
    model = GaussianProcess(features.size)
    with ThreadpoolController().limit(limits=1):  # the number of threads would change the digits
        for _ in range(FITS):
            model.fit(points, values, max(LEAST_NOISE, noise))
        expected = model.mean(candidates)
    return scored[int(np.argmax(expected))]


def _learnt(trials: Sequence[Trial]) -> Sequence[Trial]:
    if len(trials) <= MOST:
        return trials
    best = sorted(trials, key=lambda trial: trial.value, reverse=True)[: MOST // 2]
    taken = {trial.candidate.id for trial in best}
    rest = [trial for trial in trials if trial.candidate.id not in taken]
    return [*best, *rest[-(MOST - len(best)) :]]
