import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import metrics


def test_trap_20_rounding_is_half_up_and_clipped():
    scores = np.array([-0.6, -0.5, 0.49, 0.5, 1.5, 2.5, 3.5, 4.49, 4.9, 5.5, 9.0], np.float32)
    assert metrics.int_scores(scores, (0, 5)).tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 5, 5, 5]
    assert metrics.int_scores(scores, (0, 5)).dtype == np.int8


def test_trap_11_a_score_of_4_9_is_a_five_and_zero_is_zero():
    assert metrics.int_scores(np.array([4.9, 0.0], np.float32), (0, 5)).tolist() == [5, 0]


GOLDEN = {
    -9.0: (0, 0), -0.5: (0, 0), 0.49: (0, 0), 0.5: (1, 0), 0.9: (1, 1), 1.49: (1, 1), 1.5: (2, 1), 1.7: (2, 2),
    2.45: (2, 3), 2.5: (3, 3), 2.9: (3, 3), 3.0: (3, 4), 3.5: (4, 5), 4.49: (4, 5), 5.0: (5, 5), 99.0: (5, 5),
}  # fmt: skip
"""Whole scores on 0 to 5: half up, and at the cuts 0.9, 1.7, 2.45, 3.0, 3.5."""


def test_trap_20_either_rounding_is_pinned_at_halves_beyond_the_scale_and_at_the_cuts_themselves():
    scores = np.array(list(GOLDEN))
    assert metrics.int_scores(scores, (0, 5)).tolist() == [half_up for half_up, _ in GOLDEN.values()]
    fitted = metrics.int_scores(scores, (0, 5), (0.9, 1.7, 2.45, 3.0, 3.5))
    assert fitted.tolist() == [at_cuts for _, at_cuts in GOLDEN.values()] and fitted.dtype == np.int8


def test_cuts_that_fall_together_pass_over_a_whole_score():
    assert metrics.int_scores(np.array([[0.9, 1.0], [1.1, 2.0]]), (1, 3), (1.0, 1.0)).tolist() == [[1, 3], [3, 3]]


def test_int_scores_of_a_probability_are_zero_or_one():
    assert metrics.int_scores(np.array([0.2, 0.5, 0.9]), (0, 1)).tolist() == [0, 1, 1]


def test_spearman_of_a_constant_is_not_defined():
    assert metrics.spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])) is None
    assert metrics.spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0])) == pytest.approx(1)


def test_auc_counts_pairs_ties_half():
    assert metrics.auc(np.array([True, True, False, False]), np.array([3.0, 1.0, 1.0, 0.0])) == pytest.approx(3.5 / 4)
    assert metrics.auc(np.array([True, True]), np.array([3.0, 1.0])) is None


def test_kept_class_by_hand():
    truth, kept = np.array([True, True, True, False]), np.array([True, False, False, True])
    found = metrics.kept_class(truth, kept)
    assert found["precision"] == 0.5
    assert found["recall"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(0.4)
    assert metrics.kept_class(np.array([False]), np.array([False]))["f1"] == 0


def test_macro_f1_averages_over_the_scores_that_occur():
    truth, guess = np.array([0, 0, 3, 3], np.int8), np.array([0, 0, 3, 0], np.int8)
    assert metrics.macro_f1(truth, guess) == pytest.approx((0.8 + 2 / 3) / 2)


def test_the_best_cut_lies_between_the_classes():
    predicted = np.array([4.0, 3.0, 2.0, 1.0])
    assert metrics.best_cut(np.array([True, True, False, False]), predicted) == 2.5
    assert metrics.best_cut(np.array([True, True, True, True]), predicted) <= 1.0


def test_the_best_cut_never_falls_inside_a_tie():
    predicted = np.array([3.0, 3.0, 3.0, 1.0])
    assert metrics.best_cut(np.array([True, False, False, False]), predicted) == 2.0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=12).filter(
        lambda p: any(t for t, _ in p)
    )
)
def test_no_other_cut_has_a_better_f1(pairs: list[tuple[bool, int]]):
    truth = np.array([t for t, _ in pairs])
    predicted = np.array([float(p) for _, p in pairs])
    best = metrics.kept_class(truth, predicted >= metrics.best_cut(truth, predicted))["f1"]
    assert all(metrics.kept_class(truth, predicted >= cut)["f1"] <= best + 1e-12 for cut in range(8))


def test_gold_is_measured_by_auc_or_by_spearman():
    scores = np.array([1.0, 2.0, 3.0, 4.0])
    apart = metrics.against_gold(scores, [0.0, 0.0, 1.0, 1.0], binary=True)
    assert apart == {"n": 4, "auc": 1.0, "auc_interval": (1.0, 1.0)}
    ranked = metrics.against_gold(scores, [1.0, None, 2.0, 7.0], False)
    assert ranked == {"n": 3, "spearman": pytest.approx(1.0), "spearman_interval": pytest.approx((1.0, 1.0))}
    assert metrics.against_gold(scores, [None] * 4, binary=True) is None
    assert metrics.is_binary([1.0, None, 0.0]) and not metrics.is_binary([0.0, 2.0])


def test_the_figures_of_rows_are_those_of_each_row_alone():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 5, (20, 12)), rng.integers(0, 6, (20, 12))
    expected = [f1_score(a, b, average="macro", zero_division=0) for a, b in zip(truth, guess, strict=True)]
    np.testing.assert_allclose(metrics.macro_f1_rows(truth, guess), expected)
    np.testing.assert_allclose(
        metrics.mae_rows(truth, guess), [np.abs(a - b).mean() for a, b in zip(truth, guess, strict=True)]
    )
    rows = metrics.kept_rows(truth > 2, guess > 3)
    for i in range(20):
        assert {name: rows[name][i] for name in rows} == pytest.approx(metrics.kept_class(truth[i] > 2, guess[i] > 3))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2))
def test_sortable_keys_keep_the_order_and_come_back(values: list[float]):
    scores = np.array(values, np.float32)
    keys = metrics.sortable(scores)
    assert np.array_equal(scores[np.argsort(keys, kind="stable")], np.sort(scores))
    assert [metrics.unsortable(int(key)) for key in keys] == scores.tolist()
