"""The numbers of a comparison, against what can be worked out by hand or by scipy."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmevo.reports.comparison.statistics import Band, Mean, best_so_far, holm, median_reached, paired, reached

SCORES = st.lists(st.floats(0, 1).map(lambda x: round(x, 2)) | st.none(), min_size=1, max_size=12)


def test_the_best_so_far_overlooks_failures_and_never_falls() -> None:
    assert best_so_far([None, 0.2, 0.1, None, 0.5]) == [None, 0.2, 0.2, 0.2, 0.5]


@settings(deadline=None)
@given(SCORES)
def test_the_best_so_far_is_the_highest_of_the_scores_before(scores: list[float | None]) -> None:
    for place, best in enumerate(best_so_far(scores), start=1):
        assert best == max((score for score in scores[:place] if score is not None), default=None)


@pytest.mark.parametrize(("goal", "place"), [(0.1, 2), (0.2, 2), (0.5, 5), (0.6, None)])
def test_a_score_is_reached_with_the_first_evaluation_that_has_it(goal: float, place: int | None) -> None:
    assert reached([None, 0.2, 0.1, None, 0.5], goal) == place


def test_what_is_never_reached_is_later_than_all() -> None:
    assert median_reached([3, None, 5]) == 5
    assert median_reached([3, 5]) == 4
    assert median_reached([3, None, None]) is None
    assert median_reached([]) is None


def test_a_mean_knows_its_error_and_one_value_has_none() -> None:
    values = [0.1, 0.4, 0.3, 0.6]
    mean = Mean.of(values)
    assert mean is not None
    assert mean.mean == pytest.approx(0.35)
    assert mean.stderr == pytest.approx(stats.sem(values))
    low, high = stats.t.interval(0.95, 3, 0.35, stats.sem(values))
    assert mean.half_width == pytest.approx((high - low) / 2)
    assert Mean.of([0.5]) == Mean(0.5, None, 1)
    assert Mean.of([]) is None


def test_a_confidence_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    drawn = [Mean.of([*random.normal(0, 1, 4)]) for _ in range(1000)]
    held = np.mean([abs(mean.mean) <= mean.half_width for mean in drawn if mean])
    assert 0.925 < held < 0.975


def test_a_band_begins_where_every_curve_has_a_value_and_ends_with_the_shortest() -> None:
    band = Band.of([[None, 0.2, 0.4], [0.1, 0.4, 0.4, 0.9]])
    assert band.mean == [None, pytest.approx(0.3), pytest.approx(0.4)]
    assert band.low[0] is None
    assert (band.low[2], band.high[2]) == (0.4, 0.4)
    assert Band.of([[0.1, 0.3]]) == Band([0.1, 0.3], [0.1, 0.3], [0.1, 0.3])


def test_wins_ties_and_losses_are_counted_seed_by_seed() -> None:
    result = paired([0.5, 0.4, 0.3], [0.4, 0.4, 0.5])
    assert result is not None
    assert (result.wins, result.ties, result.losses, result.pairs) == (1, 1, 1, 3)
    assert result.win_rate == 0.5
    assert result.difference.mean == pytest.approx(-0.1 / 3)


def test_scores_that_differ_by_rounding_only_are_ties() -> None:
    result = paired([0.1 + 0.2], [0.3])
    assert result is not None
    assert (result.ties, result.p) == (1, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_pairs_are_tested_by_flipping_signs_and_cannot_be_significant(count: int) -> None:
    first = [0.5 + 0.01 * place for place in range(count)]
    result = paired(first, [0.1] * count)
    assert result is not None
    assert result.test == "sign-flip permutation"
    assert result.p == result.least == 2.0 ** (1 - count)
    assert result.p > 0.05


def test_flipping_signs_is_what_it_is_by_hand() -> None:
    result = paired([0.3, 0.1, 0.2], [0.0, 0.2, 0.0])  # differences 0.3, -0.1, 0.2: sum 0.4
    assert result is not None
    assert result.p == 4 / 8  # the sums ±0.4 and ±0.6 of the eight lie as far out


def test_six_pairs_and_more_are_tested_by_wilcoxon() -> None:
    differences = [0.1, 0.2, -0.05, 0.3, 0.25, 0.4, 0.15]
    result = paired([0.5 + d for d in differences], [0.5] * 7)
    assert result is not None
    assert result.test == "Wilcoxon signed-rank"
    expected: Any = stats.wilcoxon(differences, method="exact")
    assert result.p == pytest.approx(expected.pvalue)


def test_wilcoxon_is_exact_with_ties_among_the_differences() -> None:
    differences = [1.0, 1.0, 1.0, 2.0, 2.0, -1.0, 3.0]
    result = paired(differences, [0.0] * 7)
    ranks = stats.rankdata(np.abs(differences))
    sums = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in itertools.product((0, 1), repeat=7)
    ]
    seen, middle = sum(r for r, d in zip(ranks, differences, strict=True) if d > 0), sum(ranks) / 2
    assert result is not None
    assert result.p == pytest.approx(np.mean([abs(s - middle) >= abs(seen - middle) - 1e-9 for s in sums]))


@pytest.mark.parametrize("count", [4, 8])
def test_tests_cry_wolf_no_more_often_than_they_say(count: int) -> None:
    random = np.random.default_rng(count)
    ps = [paired([*random.normal(0, 1, count)], [*random.normal(0, 1, count)]) for _ in range(400)]
    for level in (0.05, 0.2, 0.5):
        share = np.mean([result.p <= level for result in ps if result])
        assert share <= level + 3 * math.sqrt(level * (1 - level) / 400)


def test_nothing_to_pair_gives_no_test_and_equal_scores_no_difference() -> None:
    assert paired([], []) is None
    same = paired([0.5] * 7, [0.5] * 7)
    assert same is not None
    assert (same.p, same.ties, same.win_rate) == (1.0, 7, 0.5)


def test_holm_is_what_it_is_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_differences_that_are_equal_but_for_rounding_have_one_rank() -> None:
    first = [k / 40 for k in (21, 29, 19, 33, 23, 37, 27, 39)]
    second = [k / 40 for k in (20, 28, 18, 32, 22, 36, 28, 40)]  # six wins and two losses, each of one question
    found = paired(first, second)
    assert found
    assert found.p == pytest.approx(sum(math.comb(8, wins) for wins in (0, 1, 2, 6, 7, 8)) / 2**8)


def test_ties_are_left_out_however_many_they_are() -> None:
    found = paired([0.5] * 40 + [0.6, 0.7, 0.8], [0.5] * 40 + [0.5, 0.5, 0.5])  # all flips would be 2^43
    assert found
    assert (found.pairs, found.ties, found.p) == (43, 40, 0.25)
