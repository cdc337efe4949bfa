"""Strengths from pairwise comparisons.

Bradley and Terry (1952, https://doi.org/10.2307/2334029): i is preferred to j with probability σ(θᵢ − θⱼ). A tie counts
as half a win for each (Davidson's model without its own parameter). θ has a normal prior around 0, so that it is finite
after one vote; the estimate is the maximum of the posterior, which is unique, for the posterior is log-concave.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy  # its parts are opened when they are used
from numpy.typing import NDArray

PRIOR = 2.0
"""The standard deviation of the prior on θ: two random players differ by up to about ±5.5, odds of 250 to 1."""

Floats = NDArray[np.float64]

Won = tuple[int, int, float]
"""First and second player, and the share that the first has won: 1, 0, or 0.5."""


def strengths(players: int, games: Sequence[Won]) -> tuple[Floats, Floats]:
    """θ of every player, and its covariance (the inverse of the Hessian, Laplace's approximation)."""
    first = np.array([game[0] for game in games], dtype=int)
    second = np.array([game[1] for game in games], dtype=int)
    share = np.array([game[2] for game in games], dtype=float)

    def loss(theta: Floats) -> float:
        gap = theta[first] - theta[second]
        return float((np.logaddexp(0, gap) - share * gap).sum() + (theta**2).sum() / (2 * PRIOR**2))

    def slope(theta: Floats) -> Floats:
        surplus = scipy.special.expit(theta[first] - theta[second]) - share
        found = theta / PRIOR**2
        np.add.at(found, first, surplus)
        np.add.at(found, second, -surplus)
        return found

    def curvature(theta: Floats) -> Floats:
        chance = scipy.special.expit(theta[first] - theta[second])
        found = np.eye(players) / PRIOR**2
        for one, other, sign in ((first, first, 1), (second, second, 1), (first, second, -1), (second, first, -1)):
            np.add.at(found, (one, other), sign * chance * (1 - chance))
        return found

    start = np.zeros(players)
    solved: Any = scipy.optimize.minimize(
        loss, start, jac=slope, hess=curvature, method="trust-exact", options={"gtol": 1e-10}
    )
    covariance: Any = np.linalg.inv(curvature(solved.x))
    return solved.x, covariance


def preference(theta: Floats, covariance: Floats, one: int, other: int) -> tuple[float, float]:
    """The probability that one player is preferred to the other, and its standard error by the delta method."""
    if one == other:
        return 0.5, 0.0
    chance = float(scipy.special.expit(theta[one] - theta[other]))
    variance = covariance[one, one] + covariance[other, other] - 2 * covariance[one, other]
    return chance, chance * (1 - chance) * float(np.sqrt(variance))
