"""The Gaussian process, the features it sees, and the distribution that its candidates come from."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import check_grad
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from llmevo.genome import Genome
from llmevo.optimizers.distribution import Distribution
from llmevo.optimizers.features import CHOICE, UNUSED, Features
from llmevo.optimizers.surrogate import GaussianProcess, normal_scores
from llmevo.space import SearchSpace

RANDOM = np.random.default_rng(0)
POINTS = RANDOM.random((40, 3))
VALUES = normal_scores(list(np.sin(4 * POINTS[:, 0]) + POINTS[:, 1] ** 2))


def fitted(points: np.ndarray = POINTS, values: np.ndarray = VALUES, floor: float = 0.0) -> GaussianProcess:
    process = GaussianProcess(points.shape[1])
    for _ in range(5):
        process.fit(points, values, floor)
    return process


def test_normal_scores_keep_the_order_and_have_variance_one() -> None:
    scores = normal_scores([3.0, 1.0, 1e9, 2.0, -np.inf, 2.5, 2.6, 2.7])
    assert [*np.argsort(scores)] == [4, 1, 3, 5, 6, 7, 0, 2]
    assert normal_scores(list(RANDOM.random(200))).std() == pytest.approx(1, abs=0.05)


def test_failures_share_the_lowest_score_whatever_the_others_are_worth() -> None:
    scores = normal_scores([-np.inf, 0.4, -np.inf, 0.5])
    assert scores[0] == scores[2] < scores[1] < scores[3]
    assert np.isfinite(scores).all()


def test_the_predictions_are_those_of_scikit_learn_with_the_same_parameters() -> None:
    process = fitted()
    kernel = ConstantKernel(process.signal) * Matern(process.length_scale, nu=2.5) + WhiteKernel(process.noise)
    regressor: Any = GaussianProcessRegressor
    other = regressor(kernel, optimizer=None, alpha=1e-8).fit(POINTS, VALUES)
    asked = RANDOM.random((20, 3))
    means, deviations = process.predict(asked)
    expected, noisy = other.predict(asked, return_std=True)
    assert means == pytest.approx(expected, abs=1e-6)
    assert deviations**2 + process.noise == pytest.approx(noisy**2, abs=1e-6)


def test_the_gradients_are_those_of_finite_differences() -> None:
    process = fitted()
    asked = RANDOM.random(3)
    assert check_grad(lambda x: process.mean(x[None])[0], lambda x: process.gradient(x[None])[1][0], asked) < 1e-5
    logs = np.array([-0.5, 0.3, -3.0])
    assert check_grad(lambda x: process.loss(x)[0], lambda x: process.loss(x)[1], logs) < 1e-3


def test_noise_is_found_and_never_below_its_floor() -> None:
    line = POINTS[:, :1]
    clean, noisy = (normal_scores(list(line[:, 0] + 0.3 * share * RANDOM.standard_normal(40))) for share in (0, 1))
    assert fitted(line, noisy).noise > 3 * fitted(line, clean).noise
    assert fitted(floor=0.3).noise >= 0.3


def test_a_single_point_and_equal_points_can_be_learnt() -> None:
    for points in (POINTS[:1], np.repeat(POINTS[:1], 5, axis=0)):
        process = fitted(points, np.zeros(len(points)))
        assert np.isfinite(process.predict(POINTS)).all()


# Features


def space(**keys: object) -> SearchSpace:
    return SearchSpace(Genome.model_validate({"models": ["alpha", "beta"], "base_model": "base", **keys}), 4)


def test_without_choices_the_features_are_the_point() -> None:
    features = Features(space(merge_method="ties"))
    points = RANDOM.random((3, features.size))
    assert (features.of(points) == points).all()


def test_choices_are_features_of_their_own_and_what_a_method_lacks_makes_no_difference() -> None:
    over = space(merge_method=["ties", "linear"])
    features, genes = Features(over), over.uniform()
    linear = {**genes, "merge_method": 1.0}
    density = next(gene.name for gene in over.genes if gene.parameter == "density")
    rows = features.of([over.to_unit(g) for g in (genes, linear, {**linear, density: 0.3}, {**genes, density: 0.3})])
    assert rows[0, -2:].tolist() == [CHOICE, 0.0]
    assert rows[1, -2:].tolist() == [0.0, CHOICE]
    assert (rows[1] == rows[2]).all()
    assert (rows[0] != rows[3]).any()
    assert UNUSED in rows[1]
    assert features.essence(linear) == features.essence({**linear, density: 0.3})
    assert features.essence(genes) != features.essence(linear)


# The distribution


@pytest.mark.parametrize("separable", [True, False])
def test_the_distribution_moves_towards_what_was_better_and_no_point_throws_it(separable: bool) -> None:
    made = Distribution(np.full(4, 0.5), 0.1, 6, separable, 0)
    far = np.array([1.0, 0.5, 0.5, 0.5])
    points = [far, *(0.5 + 0.1 * RANDOM.standard_normal((5, 4)))]
    made.tell(points, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert made.mean[0] > 0.5
    assert np.linalg.norm(made.mean - 0.5) < 0.5
    assert made.sigma < 0.3


def test_lengths_are_counted_in_standard_deviations() -> None:
    made = Distribution(np.full(2, 0.5), 0.1, 6, False, 0)
    assert made.lengths(np.array([[0.6, 0.5], [0.5, 0.3]])) == pytest.approx([1.0, 2.0])
    assert made.axes == pytest.approx(np.eye(2))
