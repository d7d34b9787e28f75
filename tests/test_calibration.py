from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import calibration, metrics


def test_fitted_cuts_give_each_whole_score_as_often_as_the_teacher():
    rng = np.random.default_rng(0)
    truth = rng.choice(6, 1000, p=[0.05, 0.3, 0.3, 0.2, 0.1, 0.05]).astype(float)
    guess = 1.8 + 0.4 * (truth - truth.mean()) + rng.normal(scale=0.3, size=1000)  # shrunk towards the mean
    cuts = calibration.fitted_cuts(truth, guess, (0, 5))
    counts = np.bincount(metrics.int_scores(guess, (0, 5), cuts), minlength=6)
    assert counts.tolist() == np.bincount(truth.astype(int), minlength=6).tolist()
    assert set(metrics.int_scores(guess, (0, 5)).tolist()) < set(range(6)), "half up gives fewer of them"


def test_a_whole_score_that_the_teacher_never_gave_is_not_given_unless_a_score_lies_beyond_all_seen():
    truth, guess = np.array([1.0, 1, 3, 3]), np.array([1.2, 1.4, 2.2, 2.9])
    cuts = calibration.fitted_cuts(truth, guess, (0, 5))
    assert cuts == pytest.approx((0.5, 1.8, 1.8, 3.5, 4.5))
    assert metrics.int_scores(np.array([0.2, 1.4, 1.8, 3.6, 9]), (0, 5), cuts).tolist() == [0, 1, 3, 4, 5]


def test_a_tie_stays_together_on_the_nearer_side():
    truth = np.array([0.0, 0, 0, 1, 1, 1, 1, 1])
    for guess, cut in (
        ([0.1, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9], 0.3),
        ([0.5, 0.5, 0.5, 0.5, 0.6, 0.9, 0.9, 0.9], 0.55),
        ([0.1, 0.2, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9], 0.35),
    ):
        assert calibration.fitted_cuts(truth, np.array(guess), (0, 1)) == (pytest.approx(cut),)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(-1, 6, width=16)), min_size=1, max_size=40),
)
def test_cuts_rise_and_miss_each_count_by_no_more_than_the_ties_there(pairs: list[tuple[int, float]]):
    truth, guess = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    cuts = calibration.fitted_cuts(truth, guess, (0, 5))
    assert len(cuts) == 5 and all(a <= b for a, b in pairwise(cuts)) and np.isfinite(cuts).all()
    for level, cut in enumerate(cuts, start=1):
        asked, got = int((truth < level).sum()), int((guess < cut).sum())
        ties = max(np.unique(guess, return_counts=True)[1])
        assert abs(asked - got) <= ties - (ties == 1) or asked in (0, len(pairs))


def test_the_calibration_curve_is_the_means_of_equal_bins():
    guess = np.arange(100.0)
    found = calibration.curve(guess * 2, guess)
    assert [each["n"] for each in found] == [10] * 10
    assert [each["predicted"] for each in found] == [4.5 + 10 * i for i in range(10)]
    assert all(each["actual"] == 2 * each["predicted"] for each in found)
    assert calibration.curve(np.array([1.0, 2.0]), np.array([0.0, 4.0])) == [{"predicted": 2.0, "actual": 1.5, "n": 2}]
