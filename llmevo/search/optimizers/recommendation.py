"""Which trial is the result where scores are noisy: one rule for every optimizer."""

from collections.abc import Sequence

import numpy as np
from threadpoolctl import ThreadpoolController

from llmevo.search.optimizers.earlier.gaussian_process import GaussianProcess
from llmevo.search.optimizers.earlier.surrogate_cma_es import LEAST_NOISE
from llmevo.search.optimizers.features import NOISY, Features, Scale, noise_of, training_set
from llmevo.search.optimizers.matern_process import MaternProcess
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Trial

FITS = 5  # each starts at the parameters of the one before


def recommend(space: SearchSpace, trials: Sequence[Trial], earlier: bool = False) -> Trial | None:
    """Return the trial with the highest expected score; None where none has a score. `trials` lie in the space.

    Exact scores are their own expectations. The highest of many noisy scores is a lucky one; there the expectation is
    the posterior mean of a Gaussian process of all scores, the start rows' included, which corrects a score by its
    neighbours (Jin and Branke 2005, section II, https://doi.org/10.1109/TEVC.2005.846356; knowledge gradient uses the
    posterior mean too: Frazier et al. 2009, https://doi.org/10.1287/ijoc.1080.0314). The rule depends on the trials
    alone, so optimizers are compared by where they searched. `earlier` is the process of logs with `rules` below 3.
    """
    scored = [trial for trial in trials if trial.score]
    noise = noise_of(trials)
    if len(scored) < 2 or noise <= NOISY:
        return max(scored, key=lambda trial: trial.value, default=None)
    known = training_set(trials)
    features = Features(space)
    points, candidates = (features.of([space.to_unit(t.candidate.genes) for t in of]) for of in (known, scored))
    values = Scale([trial.value for trial in known], noisy=True).values
    with ThreadpoolController().limit(limits=1):  # the number of threads would change the digits
        if earlier:
            model: GaussianProcess | MaternProcess = GaussianProcess(features.size)
            for _ in range(FITS):
                model.fit(points, values, max(LEAST_NOISE, noise))
        else:
            model = MaternProcess(features.size)
            model.fit(points, values)
        expected = model.mean(candidates)
    return scored[int(np.argmax(expected))]
