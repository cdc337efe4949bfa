"""Bayesian optimization: the Matérn process, the weight of a prior mean, and the candidates of the highest bound."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.special import log_softmax, softmax
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from llmevo.search.optimizers import OPTIMIZERS, recommend
from llmevo.search.optimizers.bayesian import FEW, BayesianOptimization, StandardScale
from llmevo.search.optimizers.matern_process import WEIGHT_PRIOR, WEIGHTS, MaternProcess
from llmevo.search.space import Array, Genes, SearchSpace
from llmevo.search.trial import Suggestion, Trial
from llmevo.testing.optimizers import ask, setup, silent, space, start_rows, trial

RANDOM = np.random.default_rng(0)
POINTS = RANDOM.random((40, 3))
ASKED = RANDOM.random((20, 3))


def scaled(values: Array) -> Array:
    return (values - values.mean()) / values.std()


VALUES = scaled(np.sin(4 * POINTS[:, 0]) + POINTS[:, 1] ** 2)


def fitted(points: Array = POINTS, values: Array = VALUES, mean: Any = None) -> Any:
    process = MaternProcess(points.shape[1])
    process.fit(points, values, mean)
    return process


# The process


def test_the_gradient_of_the_loss_is_that_of_finite_differences() -> None:
    process = fitted()
    for logs in (np.array([-0.5, 0.3, -3.0, -0.2, 0.4, 0.9]), np.array([0.4, -1.0, -1.0, 1.0, 0.0, -1.5])):
        assert check_grad(lambda x: process._loss(x)[0], lambda x: process._loss(x)[1], logs) < 1e-3


def test_the_posterior_is_that_of_scikit_learn_with_the_same_parameters() -> None:
    process = fitted()
    shared, signal, noise = process._logs[:3]
    matern: Any = ConstantKernel(np.exp(signal)) * Matern(np.exp(shared + process._logs[3:]), nu=2.5)
    regressor: Any = GaussianProcessRegressor
    other = regressor(matern + WhiteKernel(np.exp(noise)), optimizer=None, alpha=1e-8).fit(POINTS, VALUES)
    means, deviations = process.predict(ASKED)
    expected, noisy = other.predict(ASKED, return_std=True)
    assert means == pytest.approx(expected, abs=1e-6)
    assert process.mean(ASKED) == pytest.approx(expected, abs=1e-6)
    assert deviations**2 + np.exp(noise) == pytest.approx(noisy**2, abs=1e-6)


def test_a_fit_finds_parameters_of_higher_density_than_those_around_and_the_priors() -> None:
    process = fitted()
    logs = process._logs.copy()
    least = process._loss(logs)[0]
    others = [process._centres, *(logs + 0.3 * RANDOM.standard_normal((20, len(logs))))]
    assert least < min(process._loss(other)[0] for other in others)


def test_features_that_decide_have_shorter_length_scales_and_noise_is_found() -> None:
    lengths = fitted()._logs[3:]
    assert lengths[0] < lengths[2] > lengths[1]
    line = POINTS[:, :1]
    clean, noisy = (scaled(line[:, 0] + share * RANDOM.standard_normal(40)) for share in (0.0, 0.3))
    assert np.exp(fitted(line, noisy)._logs[2]) > 10 * np.exp(fitted(line, clean)._logs[2])


def test_few_scores_do_not_tell_features_apart_by_chance() -> None:
    random = np.random.default_rng(1)
    for _ in range(5):
        process = fitted(random.random((6, 10)), scaled(random.standard_normal(6)))
        assert np.abs(process._logs[3:]).max() < 0.7


def test_without_adapting_the_parameters_stay_and_the_new_scores_are_learnt() -> None:
    process = fitted()
    logs, before = process._logs.copy(), process.mean(ASKED)
    process.fit(POINTS, -VALUES, adapt=False)
    assert (process._logs == logs).all()
    assert process.mean(ASKED) == pytest.approx(-before)


def test_a_single_point_and_equal_points_can_be_learnt() -> None:
    for points in (POINTS[:1], np.repeat(POINTS[:1], 5, axis=0)):
        assert np.isfinite(fitted(points, np.zeros(len(points))).predict(POINTS)).all()


# The weight of a prior mean

CENTRE = np.full(6, 0.3)
BOWL = np.random.default_rng(2).random((12, 6))
HEIGHTS = scaled(-((BOWL - CENTRE) ** 2).sum(axis=1))


def around(centre: float) -> Callable[[Array], Array]:
    return lambda points: -8 * ((points - centre) ** 2).sum(axis=1) / np.sqrt(6)


def test_a_right_belief_gets_weight_and_a_wrong_one_next_to_none() -> None:
    right, wrong = (fitted(BOWL, HEIGHTS, around(centre)) for centre in (0.3, 1.0))
    assert right.belief_probability > 0.9
    assert right.belief > 0.3
    assert wrong.belief_probability < 0.15
    assert wrong.belief < 0.05
    asked = np.random.default_rng(3).random((200, 6))
    truth = -((asked - CENTRE) ** 2).sum(axis=1)

    def found(process: Any) -> float:
        return float(np.corrcoef(process.mean(asked), truth)[0, 1])

    bare = fitted(BOWL, HEIGHTS)
    assert (bare.belief, bare.belief_probability) == (0.0, None)
    assert found(right) > found(bare)
    assert found(wrong) > found(bare) - 0.05


def test_before_the_scores_can_tell_a_belief_has_the_weight_of_its_prior() -> None:
    process = fitted(BOWL[:1], np.zeros(1), around(0.3))
    assert process.belief == pytest.approx(np.exp(WEIGHT_PRIOR) @ WEIGHTS)
    assert process.belief_probability == pytest.approx(1 - np.exp(WEIGHT_PRIOR[0]))


def test_the_expectation_is_the_average_over_the_weights_by_their_posterior() -> None:
    mean = around(0.4)
    process = fitted(BOWL, HEIGHTS, mean)
    asked = RANDOM.random((10, 6))
    covariance = process._kernel(BOWL, BOWL) + (np.exp(process._logs[2]) + 1e-8) * np.eye(len(BOWL))
    centred, there = mean(BOWL) - mean(BOWL).mean(), mean(asked) - mean(BOWL).mean()
    density = [multivariate_normal.logpdf(HEIGHTS, weight * centred, covariance) for weight in WEIGHTS]
    posterior = softmax(WEIGHT_PRIOR + np.array(density))
    means = [
        weight * there + process._kernel(asked, BOWL) @ np.linalg.solve(covariance, HEIGHTS - weight * centred)
        for weight in WEIGHTS
    ]
    assert np.ptp(np.array(means), axis=0).max() > 0.1  # the weights differ in what they expect
    assert process.mean(asked) == pytest.approx(posterior @ np.array(means), abs=1e-6)
    assert process.predict(asked)[0] == pytest.approx(process.mean(asked))
    assert np.allclose(log_softmax(WEIGHT_PRIOR), WEIGHT_PRIOR)


def test_presumed_values_lead_the_first_candidates_and_the_scores_decide_what_they_count() -> None:
    """Before the scores can tell, the search goes towards them; a wrong presumption is given up."""
    over, rows = SIX, [row.candidate.genes for row in start_rows(SIX)]
    names = [gene.name for gene in over.genes]
    distances: list[float] = []
    for presumed in ({}, over.from_unit(np.full(6, 0.35))):
        optimizer: Any = BayesianOptimization(replace(setup(over, 0), presumed=dict(presumed)))
        optimizer.tell([trial(place, genes, quadratic(over)(genes)) for place, genes in enumerate(rows)])
        (genes,), _ = ask(optimizer, silent, 1)
        distances.append(float(((over.to_unit(genes) - 0.35) ** 2).mean()))
        assert (optimizer._model.belief_probability is None) is (not presumed)
    assert distances[1] < distances[0]
    wrong: Any = BayesianOptimization(replace(setup(over, 0), presumed=dict.fromkeys(names, over.genes[0].high)))
    points = [over.from_unit(point) for point in np.random.default_rng(3).random((30, 6))]
    wrong.tell([trial(place, genes, quadratic(over)(genes)) for place, genes in enumerate(points)])
    ask(wrong, silent, 1)
    assert wrong._model.belief_probability < 0.2
    assert wrong.state() != after([]).state()


def test_a_constant_in_a_belief_makes_no_difference() -> None:
    mean = around(0.4)
    one, other = fitted(BOWL, HEIGHTS, mean), fitted(BOWL, HEIGHTS, lambda points: mean(points) + 100.0)
    assert one.mean(BOWL) == pytest.approx(other.mean(BOWL), abs=1e-6)
    assert one.belief == pytest.approx(other.belief, abs=1e-6)


# The scale of the scores


def test_scores_are_standardised_and_failures_share_the_lowest_place() -> None:
    scores = [0.5, -np.inf, 0.3, 0.9, -np.inf]
    scale, values = StandardScale.of(scores)
    assert (values.mean(), values.std()) == (pytest.approx(0), pytest.approx(1))
    assert values[1] == values[4] == values[2] == values.min()
    assert [scale.score(values[place]) for place in (0, 2, 3)] == pytest.approx([0.5, 0.3, 0.9])
    for same in ([0.4] * 3, [-np.inf] * 3):
        assert np.abs(StandardScale.of(same)[1]).max() < 1e-3


def test_a_few_very_bad_scores_do_not_make_all_others_look_alike() -> None:
    scores = [0.5, -1e6, 0.3, 0.9, 0.4, -np.inf]
    _, values = StandardScale.of(scores)
    _, wanted = StandardScale.of([0.5, 0.4 - 3 * 0.5, 0.3, 0.9, 0.4, 0.4 - 3 * 0.5])
    assert values == pytest.approx(wanted)
    _, unchanged = StandardScale.of(scores, raised=False)
    assert np.ptp(unchanged[[0, 2, 3, 4]]) < 1e-5
    ordinary = [0.55, 0.32, 0.3, 0.61, 0.66]
    close = [0.8, 0.7999, 0.7998, 0.3]  # they differ by less than the noise
    for same, error in ((ordinary, 0.0), (close, 0.01)):
        assert StandardScale.of(same, error=error)[1].tolist() == StandardScale.of(same, raised=False)[1].tolist()


# The search

SIX = space(models=3, method="task_arithmetic", layer_granularity=2)


def quadratic(over: SearchSpace, centre: float = 0.35) -> Callable[[Genes], float]:
    """Falls with the distance from a point of the unit cube."""
    return lambda genes: 1.0 - float(((over.to_unit(genes) - centre) ** 2).mean())


def searched(
    objective: Callable[[Genes], float | None],
    evaluations: int = 25,
    over: SearchSpace = SIX,
    seed: int = 0,
    kind: str = "llm-off",
    start: Sequence[Genes] = (),
    before_rules_5: bool = False,
) -> list[Trial]:
    """The trials of a search after the start rows."""
    optimizer = OPTIMIZERS[kind](replace(setup(over, seed), before_rules_5=before_rules_5))
    rows = start or [row.candidate.genes for row in start_rows(over)]
    told = [trial(place, genes, objective(genes)) for place, genes in enumerate(rows)]
    trials: list[Trial] = []
    while len(trials) < evaluations:
        optimizer.tell(told)
        genes, origins = ask(optimizer, silent, 1)
        told = [trial(100 + len(trials), one, objective(one), origins[0]) for one in genes]
        trials += told
    return trials


def random_rows(objective: Callable[[Genes], float], count: int) -> list[Trial]:
    """The same points for every objective."""
    points = [SIX.from_unit(point) for point in np.random.default_rng(5).random((count, 6))]
    return [trial(place, genes, objective(genes), "random") for place, genes in enumerate(points)]


def best(trials: Sequence[Trial]) -> float:
    return max(trial.value for trial in trials)


def test_it_finds_the_optimum_of_a_smooth_function_in_few_evaluations() -> None:
    assert len(SIX.genes) == 6

    def curved(genes: Genes) -> float:
        point = SIX.to_unit(genes) - np.array([0.2, 0.8, 0.3, 0.6, 0.4, 0.5])
        return 1.0 - float((point**2).mean()) - 0.5 * float(point[0] * point[1]) ** 2

    regrets = {
        kind: fmean(1 - best(searched(curved, seed=seed, kind=kind)) for seed in range(3))
        for kind in ("llm-off", "random")
    }
    assert regrets["llm-off"] < 0.1 * regrets["random"]
    assert regrets["llm-off"] < 0.005


def test_exact_scores_are_refined_further_than_in_logs_of_earlier_rules() -> None:
    """A search of exact scores ended at the distance that its smallest samples have."""
    earlier, now = (1 - best(searched(quadratic(SIX), 50, before_rules_5=before)) for before in (True, False))
    assert now < 0.2 * earlier


def test_a_candidate_is_one_at_a_time_and_is_never_a_repetition() -> None:
    over = space(1, "task_arithmetic")  # one gene: the samples soon repeat
    optimizer = OPTIMIZERS["llm-off"](setup(over))
    optimizer.tell(start_rows(over))
    assert len(ask(optimizer, silent, 6)[0]) == 1
    trials = searched(quadratic(over), 40, over)
    assert len({tuple(of.candidate.genes.values()) for of in trials}) == len(trials)


def test_predictions_are_in_the_scores_own_units_and_become_true() -> None:
    objective = quadratic(SIX)
    optimizer = OPTIMIZERS["llm-off"](setup(SIX))
    optimizer.tell(random_rows(objective, 40))
    asking = optimizer.ask(1)
    with pytest.raises(StopIteration) as stop:
        next(asking)
    suggestion: Suggestion = stop.value.value[0]
    assert suggestion.expected is not None
    assert suggestion.note == f"expected {suggestion.expected:.4g}"
    assert suggestion.expected == pytest.approx(objective(suggestion.genes), abs=0.02)


def test_several_candidates_of_one_generation_are_chosen_apart() -> None:
    optimizer: Any = OPTIMIZERS["llm-off"](setup(SIX))
    objective = quadratic(SIX)
    optimizer.tell(random_rows(objective, 10))
    chosen = optimizer._numeric(3)
    points = [SIX.to_unit(one.genes) for one in chosen]
    assert len({tuple(point) for point in points}) == 3
    after = optimizer._numeric(1, chosen)[0]
    assert after.genes not in [one.genes for one in chosen]


def test_candidates_that_are_being_scored_change_where_it_is_uncertain_and_not_what_it_expects() -> None:
    objective = quadratic(SIX)
    made: list[Any] = [BayesianOptimization(replace(setup(SIX), parallel=2)) for _ in range(2)]
    alone, waiting = made
    for optimizer in (alone, waiting):
        optimizer.tell(random_rows(objective, 10))
    pending = alone._numeric(1)
    waiting.expect(pending)
    asking = waiting.ask(5)
    with pytest.raises(StopIteration) as stop:
        next(asking)
    (chosen,) = stop.value.value  # the other worker is busy
    there = alone._points([pending[0].genes])
    for optimizer, other in ((alone, ()), (waiting, pending)):
        optimizer._fit(other)
    (before, wide), (after, narrow) = (optimizer._model.predict(there) for optimizer in (alone, waiting))
    assert after == pytest.approx(before, abs=0.05)
    assert narrow < 0.8 * wide
    assert chosen.genes != pending[0].genes


def test_the_best_of_several_merge_methods_is_found_where_each_has_a_score() -> None:
    over = space(method=["ties", "task_arithmetic", "linear"], layer_granularity=2)
    method = next(gene.name for gene in over.genes if gene.choices)
    weights = [gene.name for gene in over.genes if gene.parameter == "weight"]

    def objective(genes: Genes) -> float:
        return 0.2 * (genes[method] == 1) - fmean((genes[name] - 0.6) ** 2 for name in weights)

    each = [{**over.uniform(), method: float(choice)} for choice in range(3)]
    for seed in range(2):
        trials = searched(objective, 20, over, seed, start=each)
        assert max(trials, key=lambda of: of.value).candidate.genes[method] == 1
        assert sum(of.candidate.genes[method] == 1 for of in trials[-10:]) >= 8
        features: Any = BayesianOptimization(setup(over))
        models = {features._features.model_key(of.candidate.genes) for of in trials}
        assert len(models) == len(trials)  # what a method does not use makes no new model


def test_it_learns_where_candidates_fail() -> None:
    def objective(genes: Genes) -> float | None:
        point = SIX.to_unit(genes)
        return None if point[0] > 0.45 else 1.0 - float(((point - 0.4) ** 2).mean())

    trials = searched(objective, 30)
    assert sum(of.score is None for of in trials[-15:]) <= 6
    assert best(trials) > 0.99


def test_with_noisy_scores_it_finds_a_better_recipe_than_random_search() -> None:
    truth = quadratic(SIX)

    def found(kind: str, seed: int) -> float:
        random = np.random.default_rng(seed)
        trials = searched(lambda genes: truth(genes) + 0.03 * random.standard_normal(), 40, SIX, seed, kind)
        noisy = [replace(of, score=replace(of.score, stderr=0.03)) for of in trials if of.score]
        chosen = recommend(SIX, noisy)
        assert chosen
        return truth(chosen.candidate.genes)

    means = {kind: fmean(found(kind, seed) for seed in range(4)) for kind in ("llm-off", "random")}
    assert means["llm-off"] > means["random"]
    assert 1 - means["llm-off"] < 0.02


def test_in_many_dimensions_samples_move_a_few_genes_and_the_search_still_climbs() -> None:
    over = space(models=3, method="ties", layer_granularity=1)
    assert len(over.genes) >= 24
    optimizer: Any = OPTIMIZERS["llm-off"](setup(over))
    centre = np.full(len(over.genes), 0.5)
    moved = (optimizer._around(centre, 500, 0.1) != centre).sum(axis=1)
    assert moved[:250].mean() == pytest.approx(FEW, rel=0.1)
    assert moved[250:].min() == len(over.genes)
    objective = quadratic(over)
    start = max(objective(row.candidate.genes) for row in start_rows(over))
    regrets = {kind: 1 - best(searched(objective, 60, over, kind=kind)) for kind in ("llm-off", "random")}
    assert regrets["llm-off"] < 0.2 * (1 - start)
    assert regrets["llm-off"] < 0.5 * regrets["random"]


# Its state


def after(rows: Sequence[Trial]) -> BayesianOptimization:
    optimizer = BayesianOptimization(setup())
    optimizer.tell(rows)
    return optimizer


def test_histories_with_other_scores_or_other_points_have_other_states() -> None:
    rows = start_rows(space())
    elsewhere = [trial(0, space().clamp({g.name: 0.9 for g in space().genes}), 0.3), *rows[1:]]
    better = [trial(0, rows[0].candidate.genes, 0.9), *rows[1:]]
    assert after(rows).state() == after(rows).state()
    assert len({after(history).state() for history in (rows, elsewhere, better)}) == 3


def test_a_raised_budget_is_a_part_of_the_state_and_the_same_one_is_not() -> None:
    rows = start_rows(space())
    one, same, raised = (after(rows) for _ in range(3))
    same.extend(60)
    raised.extend(90)
    assert one.state() == same.state() != raised.state()
    assert ask(one, silent) == ask(raised, silent)


def test_told_again_with_other_values_it_forgets_the_earlier_ones() -> None:
    optimizer = BayesianOptimization(setup(SIX))
    optimizer.tell(random_rows(quadratic(SIX, 0.2), 30))
    optimizer.retell(random_rows(quadratic(SIX, 0.8), 30), {"sums": 1.0})
    assert np.mean(SIX.to_unit(ask(optimizer, silent)[0][0])) > 0.6


def test_of_very_many_trials_the_highest_and_the_latest_are_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmevo.search.optimizers.features.MOST", 60)
    objective = quadratic(SIX)
    rows = random_rows(objective, 200)
    optimizer: Any = BayesianOptimization(setup(SIX))
    optimizer.tell(rows)
    genes = ask(optimizer, silent)[0][0]
    assert len(optimizer._model._values) == 60
    assert objective(genes) > np.quantile([row.value for row in rows], 0.99)
