"""An additive model of the scores of paths: each edit has an effect, and so has each kind of edit at a depth."""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy  # its parts are loaded at their first use

from llmevo.search.paths.edits import Edit
from llmevo.search.space import Array

Features = Mapping[tuple[str, ...], float]
"""What a path has, as {name: amount}."""

BINS = 5  # of depth, between whose centres effects are interpolated
UNIT = 4  # layers whose edit has the amount 1
PRIOR = {
    "edit": 0.3,
    "kind": 0.3,
    "depth": 0.5,
    "layers": 0.2,
    "scan": 0.3,
}  # variances of effects, as shares of the signal's
SIGNALS = (0.3, 1.0, 3.0)  # variances of the signal, where scores have variance 1
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # variances of the noise
OFFSET = 0.02  # the variance of the score of the path without edits


def features_of(edits: Sequence[Edit], layers: int, depth: int) -> dict[tuple[str, ...], float]:
    """Return the features of a path with these edits, of models with `layers` layers; `depth` is the path's own."""
    found: dict[tuple[str, ...], float] = {("layers",): (depth - layers) / layers}
    for edit in edits:
        found["edit", str(edit)] = float(min(1.0, (edit.stop - edit.start) / UNIT) ** 0.5)
        kinds = [(edit.kind, edit.model, 1.0)]
        if edit.kind == "repeat":
            kinds.append(("gain", edit.model, edit.factor))
        elif edit.factor != 1.0:
            kinds = [(edit.kind, edit.model, float(np.log(edit.factor)))]
        for kind, model, amount in kinds:
            for layer in range(edit.start, edit.stop):
                place = layer / max(1, layers - 1) * (BINS - 1)
                below = min(int(place), BINS - 2)
                for bin_, share in ((below, 1 - (place - below)), (below + 1, place - below)):
                    key = ("depth", kind, model, str(bin_))
                    found[key] = found.get(key, 0.0) + amount * share / UNIT
                key = ("kind", kind, model)
                found[key] = found.get(key, 0.0) + amount / UNIT
    return found


class Additive:
    """Ridge regression with the posterior's standard deviation: Bayesian linear regression with a Gaussian prior of the
    effects (Rasmussen and Williams 2006, section 2.1), in its dual form, as there are more effects than scores.

    The variances of signal and noise are those of the highest evidence on a small grid.
    """

    def fit(self, paths: Sequence[Features], values: Sequence[float], centre: float | None = None) -> None:
        """Learn from scores of any scale; infinite ones count as the lowest. `centre` is the score of the path without
        edits, by default their mean.
        """
        finite = [value for value in values if np.isfinite(value)]
        filled = np.maximum(np.asarray(values, dtype=np.float64), min(finite, default=0.0))
        self.centre = float(filled.mean()) if centre is None else centre
        self.scale = max(float(np.sqrt(np.mean((filled - self.centre) ** 2))), 1e-9)
        self._paths, targets = [*paths], (filled - self.centre) / self.scale
        self._names = {name: place for place, name in enumerate(dict.fromkeys(n for path in paths for n in path))}
        kernel = self._kernel(self._paths, self._paths)
        best = -np.inf
        for signal in SIGNALS:
            for noise in NOISES:
                covariance = signal * kernel + OFFSET + noise * np.eye(len(kernel))
                factor = scipy.linalg.cholesky(covariance, lower=True)
                solved = scipy.linalg.cho_solve((factor, True), targets)
                evidence = -0.5 * float(targets @ solved) - float(np.log(np.diag(factor)).sum())
                if evidence > best:
                    best, self._signal, self._factor, self._weights = evidence, signal, factor, solved

    def predict(self, paths: Sequence[Features]) -> tuple[Array, Array]:
        """Return the expected scores and their standard deviations without noise, in the scores' units."""
        covariance = self._signal * self._kernel(paths, self._paths) + OFFSET
        reduced = scipy.linalg.solve_triangular(self._factor, covariance.T, lower=True)
        own = np.array([sum(_prior(name) * value**2 for name, value in path.items()) for path in paths])
        variances = self._signal * own + OFFSET - (reduced**2).sum(axis=0)
        means = self.centre + self.scale * (covariance @ self._weights)
        return means, self.scale * np.sqrt(np.maximum(variances, 0.0))

    def _kernel(self, ones: Sequence[Features], others: Sequence[Features]) -> Array:
        return self._matrix(ones) @ self._matrix(others).T

    def _matrix(self, paths: Sequence[Features]) -> Array:
        """(paths, features) of the features that were learnt, scaled by their priors; others have no covariance."""
        found = np.zeros((len(paths), len(self._names)))
        for row, path in enumerate(paths):
            for name, value in path.items():
                if (place := self._names.get(name)) is not None:
                    found[row, place] = value * np.sqrt(_prior(name))
        return found


def _prior(name: tuple[str, ...]) -> float:
    return PRIOR[name[0]]
