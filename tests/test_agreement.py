"""Agreement between raters: known answers, by hand and by other programs' formulas."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import metrics

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30)


def kappa_by_hand(a: list[int], b: list[int], levels: range) -> float | None:
    """Cohen (1968): one less the weighted misses over those that the two histograms make by chance."""
    n = len(a)
    seen = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / n
    chance = sum((i - j) ** 2 * a.count(i) / n * b.count(j) / n for i in levels for j in levels)
    return None if chance == 0 else 1 - seen / chance


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    both = np.array(pairs, dtype=np.int8)
    return both[:, 0], both[:, 1]


def means(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows.mean(axis=1))


def one_by_one(plain: Callable[..., float | None]) -> Callable[..., np.ndarray]:
    """A statistic of one resample as one of many."""
    return lambda *rows: np.array([plain(*row) for row in zip(*rows, strict=True)], dtype=np.float64)


# -- kappa ------------------------------------------------------------------------------------------------------------


def test_quadratic_weighted_kappa_by_hand():
    """Misses (1 + 4) / 5 = 1; by chance var(a) 2 + var(b) 2.64 + (2 - 2.6)^2 = 5."""
    a, b = np.array([0, 1, 2, 3, 4]), np.array([1, 1, 2, 5, 4])
    assert metrics.quadratic_weighted_kappa(a, b, (0, 5)) == pytest.approx(1 - 1 / 5)


@given(PAIRS)
def test_kappa_is_that_of_the_definition_whatever_levels_occur(pairs: list[tuple[int, int]]):
    found = metrics.quadratic_weighted_kappa(*columns(pairs), (0, 5))
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    assert found == pytest.approx(kappa_by_hand(a, b, range(6)), abs=1e-12)
    assert math.isnan(metrics.kappa_rows(*(c[None] for c in columns(pairs)))[0]) == (found is None)


def test_kappa_of_raters_who_agree_is_one_and_of_opposites_minus_one():
    a = np.array([0, 5, 0, 5])
    assert metrics.quadratic_weighted_kappa(a, a, (0, 5)) == pytest.approx(1)
    assert metrics.quadratic_weighted_kappa(a, 5 - a, (0, 5)) == pytest.approx(-1)


def test_kappa_is_not_defined_for_one_constant_and_zero_for_two():
    three, four = np.full(4, 3), np.full(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.quadratic_weighted_kappa(three, three, (0, 5)) is None
        assert metrics.quadratic_weighted_kappa(three, four, (0, 5)) == pytest.approx(0)
        assert metrics.quadratic_weighted_kappa(three[:0], four[:0], (0, 5)) is None


# -- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    """Values 0..99: mean 49.5, standard error 28.87 / 10."""
    low, high = metrics.bootstrap_interval(means, np.arange(100.0), n=4000) or (0, 0)
    assert low == pytest.approx(49.5 - 1.96 * 2.887, abs=0.5)
    assert high == pytest.approx(49.5 + 1.96 * 2.887, abs=0.5)


def test_the_interval_of_spearman_is_as_wide_as_theory_says():
    """Fisher's z: correlation 0.6 of 300 documents lies within about 0.52 and 0.67."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=300)
    b = 0.6 * a + 0.8 * rng.normal(size=300)
    found = metrics.correlation(a, b)
    value, (low, high) = found["spearman"], found["spearman_interval"]
    error = 1.06 * 1.96 / math.sqrt(300 - 3)
    assert math.atanh(value) - math.atanh(low) == pytest.approx(error, rel=0.3)
    assert math.atanh(high) - math.atanh(value) == pytest.approx(error, rel=0.3)


def test_the_interval_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        sample = rng.normal(size=60)
        low, high = metrics.bootstrap_interval(means, sample, seed=trial, n=300) or (0, 0)
        held += low <= 0 <= high
    assert 178 <= held <= 199


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    a = np.arange(30.0)
    assert metrics.bootstrap_interval(means, a) == metrics.bootstrap_interval(means, a)
    assert metrics.bootstrap_interval(means, a) != metrics.bootstrap_interval(means, a, seed=1)


def test_documents_are_resampled_whole():
    """Two arrays that differ by one constant keep doing so in every resample."""
    a = np.arange(50.0)
    assert metrics.bootstrap_interval(lambda x, y: means(x - y), a, a + 3) == (-3.0, -3.0)


def test_resamples_without_a_value_are_left_out_and_a_majority_of_them_is_no_interval():
    lone = np.array([True] + [False] * 9)
    scores = np.arange(10.0)
    assert metrics.bootstrap_interval(metrics.auc_rows, lone, scores, n=200) is not None  # about 65% have both kinds
    assert metrics.bootstrap_interval(lambda x: np.where(x[:, 0] == 3, 1.0, np.nan), scores, n=200) is None
    assert metrics.bootstrap_interval(lambda x: np.full(len(x), np.nan), scores, n=20) is None
    assert metrics.bootstrap_interval(means, scores[:2]) is None
    assert metrics.bootstrap_interval(means, scores[:0]) is None


@pytest.mark.parametrize("part", [1, 150, 2**20])
def test_intervals_by_row_are_those_of_the_plain_statistics(monkeypatch: pytest.MonkeyPatch, part: int):
    monkeypatch.setattr(metrics, "RESAMPLED", part)
    rng = np.random.default_rng(4)
    a = rng.integers(0, 6, 40)
    b = np.clip(a + rng.integers(-2, 3, 40), 0, 5)
    same = [
        (metrics.spearman_rows, metrics.spearman, (a.astype(float), b.astype(float))),
        (metrics.auc_rows, metrics.auc, (a > 2, b.astype(float))),
        (metrics.kappa_rows, lambda x, y: metrics.quadratic_weighted_kappa(x, y, (0, 5)), (a, b)),
    ]
    for rows, plain, arrays in same:
        found = metrics.bootstrap_interval(rows, *arrays, n=100)
        assert found == pytest.approx(metrics.bootstrap_interval(one_by_one(plain), *arrays, n=100))


@given(PAIRS)
def test_each_row_has_the_value_of_the_plain_statistic(pairs: list[tuple[int, int]]):
    a, b = (column.astype(np.float64) for column in columns(pairs))
    for rows, plain, arrays in (
        (metrics.spearman_rows, metrics.spearman, (a, b)),
        (metrics.auc_rows, metrics.auc, (a > 2, b)),
    ):
        value, expected = rows(*(array[None] for array in arrays))[0], plain(*arrays)
        assert math.isnan(value) if expected is None else value == pytest.approx(expected)


def test_two_documents_have_no_rank_correlation_in_any_resample():
    a, b = np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([[3.0, 4.0], [3.0, 4.0]])
    assert np.isnan(metrics.spearman_rows(a, b)).all()
    assert metrics.spearman(a[0], b[0]) is None


# -- agreement --------------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    found = metrics.agreement([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.4, 2.5, 3.0, 5.0], (0, 5))
    assert found["n"] == 5
    assert found["spearman"] == pytest.approx(1)
    assert found["kappa"] == pytest.approx(kappa_by_hand([1, 2, 3, 4, 5], [0, 2, 3, 3, 5], range(6)))
    assert found["mean_difference"] == pytest.approx((1 - 0.4 + 0.5 + 1) / 5)
    low, high = found["kappa_interval"]
    assert low < found["kappa"] < high <= 1


def test_documents_that_one_rater_left_out_do_not_count():
    found = metrics.agreement([0.0, None, 2.0, 5.0, 4.0], [0.0, 3.0, np.nan, 5.0, 3.0], (0, 5))
    assert found["n"] == 3 and found["mean_difference"] == pytest.approx(1 / 3)
    assert found == metrics.agreement([0.0, 5.0, 4.0], [0.0, 5.0, 3.0], (0, 5))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_agreement_on_next_to_nothing_has_no_intervals(n: int):
    found = metrics.agreement([3.0, 4.0][:n], [3.0, 5.0][:n], (0, 5))
    assert found["n"] == n and found["spearman"] is None
    assert found["spearman_interval"] is None and found["kappa_interval"] is None
    assert (found["mean_difference"] is None) == (n == 0)


def test_raters_who_give_one_score_have_no_correlation_and_no_interval():
    found = metrics.agreement([3.0] * 9, [3.0] * 9, (0, 5))
    assert [found[name] for name in ("spearman", "spearman_interval", "kappa", "kappa_interval")] == [None] * 4


def test_a_known_quality_comes_with_intervals():
    rng = np.random.default_rng(2)
    gold = [None if i % 9 == 0 else float(i % 2) for i in range(200)]
    scores = np.array([(value or 0) + noise for value, noise in zip(gold, rng.normal(size=200), strict=True)])
    found = metrics.against_gold(scores, gold, binary=True) or {}
    assert list(found) == ["n", "auc", "auc_interval"] and found["n"] == 177
    low, high = found["auc_interval"]
    assert low < found["auc"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.037, rel=0.3)  # Hanley and McNeil's error at 0.76, 88 against 89


def test_kappa_is_only_told_where_the_quality_is_on_the_scale_of_the_scores():
    scores, gold = np.array([1.0, 2.0, 3.0, 5.0, 4.0]), [1.0, 2.0, None, 4.0, 4.0]
    assert set(metrics.against_gold(scores, gold, False) or {}) == {"n", "spearman", "spearman_interval"}
    found = metrics.against_gold(scores, gold, False, (0, 5)) or {}
    assert found["n"] == 4 and found["kappa"] == pytest.approx(kappa_by_hand([1, 2, 5, 4], [1, 2, 4, 4], range(6)))
    assert found["mean_difference"] == pytest.approx(0.25)
    assert metrics.against_gold(scores, [None] * 5, False, (0, 5)) is None
