"""The Gaussian process, the features it sees, and the distribution that its candidates come from."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import check_grad
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern, WhiteKernel

from llmevo.search.genome import Genome
from llmevo.search.optimizers.earlier.gaussian_process import GaussianProcess
from llmevo.search.optimizers.earlier.surrogate_cma_es import Distribution
from llmevo.search.optimizers.features import CHOICE, UNUSED, Features, Scale
from llmevo.search.space import SearchSpace

RANDOM = np.random.default_rng(0)
POINTS = RANDOM.random((40, 3))
VALUES = Scale(list(np.sin(4 * POINTS[:, 0]) + POINTS[:, 1] ** 2), False).values


def fitted(points: np.ndarray = POINTS, values: np.ndarray = VALUES, floor: float = 0.0) -> GaussianProcess:
    process = GaussianProcess(points.shape[1])
    for _ in range(5):
        process.fit(points, values, floor)
    return process


noises = pytest.mark.parametrize("noisy", [False, True])


@noises
def test_a_scale_keeps_the_order_and_gives_variance_one(noisy: bool) -> None:
    values = Scale([3.0, 1.0, 9.0, 2.0, -np.inf, 2.5, 2.6, 2.7], noisy).values
    assert [*np.argsort(values, kind="stable")] == ([1, 4, 3, 5, 6, 7, 0, 2] if noisy else [4, 1, 3, 5, 6, 7, 0, 2])
    assert Scale(list(RANDOM.random(200)), noisy).values.std() == pytest.approx(1, abs=0.05)


def test_outliers_weigh_no_more_than_others_where_scores_are_exact() -> None:
    assert (Scale([1.0, 2.0, 3.0], False).values == Scale([1.0, 2.0, 1e9], False).values).all()


@noises
def test_failures_share_the_lowest_place_whatever_the_others_are_worth(noisy: bool) -> None:
    values = Scale([-np.inf, 0.4, -np.inf, 0.5], noisy).values
    assert values[0] == values[2] <= values[1] < values[3]
    assert np.isfinite(values).all()


@noises
def test_a_scale_leads_back_to_the_scores(noisy: bool) -> None:
    scores = [0.3, 0.1, 0.9, 0.2]
    scale = Scale(scores, noisy)
    assert [scale.score(value) for value in scale.values] == pytest.approx(scores)
    assert scale.score(99.0) == 0.9
    assert Scale([-np.inf, -np.inf], noisy).score(0.0) == 0.0


def test_the_predictions_are_those_of_scikit_learn_with_the_same_parameters() -> None:
    process = fitted()
    unit = np.sqrt(12 / POINTS.shape[1])
    matern: Any = ConstantKernel(process.signal) * Matern(unit * process.length_scale, nu=2.5)
    kernel = matern + ConstantKernel(process.quadratic) * DotProduct(1.0) ** 2 + WhiteKernel(process.noise)
    regressor: Any = GaussianProcessRegressor
    other = regressor(kernel, optimizer=None, alpha=1e-8).fit(unit * (POINTS - 0.5), VALUES)
    asked = RANDOM.random((20, 3))
    means, deviations = process.predict(asked)
    expected, noisy = other.predict(unit * (asked - 0.5), return_std=True)
    assert means == pytest.approx(expected, abs=1e-6)
    assert deviations**2 + process.noise == pytest.approx(noisy**2, abs=1e-6)


def test_the_gradients_are_those_of_finite_differences() -> None:
    process = fitted()
    asked = RANDOM.random(3)
    assert check_grad(lambda x: process.mean(x[None])[0], lambda x: process.gradient(x[None])[1][0], asked) < 1e-5
    logs = np.array([-0.5, 0.3, -3.0, -0.2])
    assert check_grad(lambda x: process.loss(x)[0], lambda x: process.loss(x)[1], logs) < 1e-3


def test_noise_is_found_and_never_below_its_floor() -> None:
    line = POINTS[:, :1]
    noise = 0.3 * RANDOM.standard_normal(40)
    clean, noisy = (Scale(list(line[:, 0] + share * noise), True).values for share in (0, 1))
    assert fitted(line, noisy).noise > 3 * fitted(line, clean).noise
    assert fitted(floor=0.3).noise >= 0.3


def test_a_quadratic_is_learnt_from_fewer_scores_than_it_has_coefficients() -> None:
    points, asked = RANDOM.random((60, 12)), RANDOM.random((200, 12))
    centre = RANDOM.random(12)
    learnt, true = (-((at - centre) ** 2).sum(axis=1) for at in (points, asked))
    process = fitted(points, Scale(list(learnt), True).values)
    assert np.corrcoef(process.mean(asked), true)[0, 1] > 0.95


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
    assert features.model_key(linear) == features.model_key({**linear, density: 0.3})
    assert features.model_key(genes) != features.model_key(linear)


# The distribution


def test_the_distribution_moves_towards_what_was_better_and_no_point_throws_it() -> None:
    made = Distribution(np.full(4, 0.5), 0.1, 6, 0)
    far = np.array([1.0, 0.5, 0.5, 0.5])
    points = [far, *(0.5 + 0.1 * RANDOM.standard_normal((5, 4)))]
    made.tell(points, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert made.mean[0] > 0.5
    assert np.linalg.norm(made.mean - 0.5) < 0.5
    assert made.sigma < 0.3


def test_a_part_of_a_population_moves_the_distribution_and_what_is_missing_has_no_say() -> None:
    made = Distribution(np.full(4, 0.5), 0.1, 6, 0)
    made.tell(
        [np.array([0.6, 0.5, 0.5, 0.5]), np.array([0.55, 0.5, 0.5, 0.5]), np.array([0.52, 0.5, 0.5, 0.5])], [0, 1, 2]
    )
    assert made.mean[0] > 0.55
    assert made.mean[1:] == pytest.approx(0.5)
    covariance = made.axes @ made.axes.T
    assert covariance[1:, 1:] == pytest.approx(covariance[1, 1] * np.eye(3))


def test_distances_are_counted_in_standard_deviations() -> None:
    made = Distribution(np.full(2, 0.5), 0.1, 6, 0)
    assert made.distances(np.array([[0.6, 0.5], [0.5, 0.3]]), made.mean) == pytest.approx([1.0, 2.0])
    assert made.axes == pytest.approx(np.eye(2))
