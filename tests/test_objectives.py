"""What a teacher that rates is tuned by: measures that agree with the plain ones, and what they refuse."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import metrics, objectives
from pipeline.errors import UserError
from pipeline.objectives import Objective

TRUTH = np.array([0.0, 1, 2, 3, 4, 5, 5, 2.6])
SCORES = np.array([0.4, 0.2, 3.1, 2.2, 4.9, 3.6, 4.4, 1.2])
SCALE = (0.0, 5.0)


def measured(
    name: str, truth: np.ndarray, scores: np.ndarray, good_from: float = 3.0, cut: float = 2.0
) -> float | None:
    found = objectives.sides(Objective(name, good_from, binary=False), truth, scores, SCALE, cut)
    return objectives.value(name, *found)


def test_each_measure_is_the_plain_one() -> None:
    good, whole = TRUTH >= 3, [metrics.int_scores(side, SCALE) for side in (TRUTH, SCORES)]
    assert measured("spearman", TRUTH, SCORES) == pytest.approx(metrics.spearman(TRUTH, SCORES))
    assert measured("auc", TRUTH, SCORES) == pytest.approx(metrics.auc(good, SCORES))
    assert measured("kappa", TRUTH, SCORES) == pytest.approx(metrics.quadratic_weighted_kappa(*whole, SCALE))
    assert measured("f1", TRUTH, SCORES) == pytest.approx(metrics.kept_class(good, SCORES >= 2)["f1"])


def test_f1_by_hand() -> None:
    """Four are good (3, 4, 5, 5); from 2 up five are found, those and the one known as 2: F1 is 8 of 9."""
    assert measured("f1", TRUTH, SCORES) == pytest.approx(8 / 9)


@pytest.mark.parametrize("name", ["spearman", "auc", "kappa", "f1"])
def test_what_tells_nothing_apart_has_no_value(name: str) -> None:
    same = np.full(8, 4.0)
    assert measured(name, same, same, good_from=5) is None
    assert measured(name, TRUTH[:0], SCORES[:0]) is None


def test_the_gain_over_oneself_is_nothing_and_over_noise_is_certain() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 200).astype(float)
    near, noise = truth + rng.normal(0, 0.5, 200), rng.normal(0, 1, 200)
    assert objectives.gain_interval("spearman", (truth, near), (truth, near)) == (0, 0)
    low, high = objectives.gain_interval("spearman", (truth, near), (truth, noise)) or (0, 0)
    assert 0.5 < low < high < 1.5
    assert objectives.gain_interval("spearman", (truth, noise), (truth, near)) == pytest.approx((-high, -low))


def test_the_gain_is_measured_on_the_same_documents_for_both() -> None:
    """Two teachers that err alike: resampled apart, their difference would seem wide."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 6, 100).astype(float)
    first = truth + rng.normal(0, 2, 100)
    second = first + rng.normal(0, 0.01, 100)
    low, high = objectives.gain_interval("spearman", (truth, first), (truth, second)) or (-1, 1)
    alone = objectives.interval("spearman", truth, first) or (0, 0)
    assert high - low < 0.05 * (alone[1] - alone[0])


@pytest.mark.parametrize(
    ("name", "n", "n_good"), [("auc", 60, 5), ("auc", 24, 12), ("kappa", 12, 0), ("spearman", 24, 0)]
)
def test_equal_teachers_are_hardly_ever_told_apart(name: str, n: int, n_good: int) -> None:
    """At most 2.5% of the time, give or take what 400 times can tell, is one better than another just like it."""
    rng, n_better = np.random.default_rng(0), 0
    for _ in range(400):
        truth = np.arange(n) < n_good if n_good else rng.integers(0, 6, n).astype(float)
        twins = [truth + rng.normal(0, 1.5, n) for _ in range(2)]
        sides = [objectives.sides(Objective(name, 1.0, n_good > 0), truth * 1.0, each, SCALE, 0.0) for each in twins]
        interval = objectives.gain_interval(name, *sides)
        n_better += interval is not None and interval[0] > 0
    assert n_better <= 400 * 0.025 + 2 * math.sqrt(400 * 0.025)


def test_folds_tell_no_more_than_they_know() -> None:
    """Each document is held out once, but helps to choose what is judged on all others: eight twins of the default."""
    rng, n_better = np.random.default_rng(0), 0
    for _ in range(200):
        truth = rng.integers(0, 6, 60).astype(float)
        twins, fold, found = truth + rng.normal(0, 2, (9, 60)), np.arange(60) % 5, np.empty(60)
        for held in range(5):
            values = [objectives.value("spearman", truth[fold != held], twin[fold != held]) or 0.0 for twin in twins]
            found[fold == held] = twins[int(np.argmax(values))][fold == held]
        interval = objectives.gain_interval("spearman", (truth, found), (truth, twins[0]), n_folds=5)
        n_better += interval is not None and interval[0] > 0
    assert n_better <= 5 + 2 * math.sqrt(5)


def test_with_a_single_good_document_nothing_is_known_of_a_gain() -> None:
    truth = np.arange(40) == 7
    best, default = (truth, truth * 1.0), (truth, np.arange(40.0))
    assert objectives.value("auc", *best) == 1
    assert objectives.gain_interval("auc", best, default) is None
    assert objectives.n_others(truth) == objectives.n_others(~truth) == 1


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=30, unique=True), st.floats(0.1, 10), st.floats(-3, 3))
def test_standard_scores_do_not_depend_on_the_scale(values: list[float], slope: float, offset: float) -> None:
    scores = np.round(values, 3)
    expected = objectives.standardised(scores, scores)
    assert objectives.standardised(offset + slope * scores, offset + slope * scores) == pytest.approx(
        expected, abs=1e-6
    )


def test_a_document_without_a_score_counts_as_the_mean() -> None:
    scores = np.array([1.0, np.nan, 3.0])
    assert objectives.filled(scores, scores).tolist() == [1, 2, 3]
    assert objectives.filled(scores, np.array([5.0, np.nan])).tolist() == [1, 5, 3]


def test_confusion_counts_every_document_once() -> None:
    known, given_ = np.array([0, 0, 5, 5, 2], dtype=np.int8), np.array([0, 1, 5, 5, 2], dtype=np.int8)
    found = objectives.confusion(known, given_)
    assert found["0"] == {"0": 1, "1": 1, "2": 0, "5": 0}
    assert found["5"]["5"] == 2
    assert sum(n for row in found.values() for n in row.values()) == 5


# -- what is maximised, and what cannot be


def test_without_an_objective_it_is_auc_for_true_and_false_else_spearman() -> None:
    assert objectives.of(None, None, np.array([0.0, 1, 1]), SCALE) == Objective("auc", 1.0, binary=True)
    assert objectives.of(None, None, TRUTH, SCALE) == Objective("spearman", 2.5, binary=False)
    assert objectives.of("f1", 4, TRUTH, SCALE) == Objective("f1", 4, binary=False)


def test_true_and_false_are_on_no_scale_but_their_own() -> None:
    assert not objectives.is_on(np.array([0.0, 1, 1]), SCALE)
    assert objectives.is_on(np.array([0.0, 1, 1]), (0, 1))
    assert objectives.is_on(TRUTH, SCALE)
    assert not objectives.is_on(TRUTH + 1, SCALE)
    assert not objectives.is_on(np.array([0.0, 0.5, 1]), SCALE), "two people said yes or no"


@pytest.mark.parametrize(
    ("name", "good_from", "truth", "told"),
    [
        ("spearmann", None, TRUTH, r"tune.objective: spearmann is no measure of ratings; did you mean spearman\?"),
        ("rougeL", None, TRUTH, r"tune.objective: rougeL .* give one of spearman, kappa, auc, f1"),
        (
            "kappa",
            None,
            TRUTH + 1,
            r"kappa needs known scores on the prompt's scale of 0 to 5, but they go from 1 to 6",
        ),
        ("auc", None, TRUTH * 20, r"tune.good_from is not set.*0 to 100"),
        ("f1", 7.0, TRUTH, r"f1 needs good documents and others, but 0 of 8 have a known score from 7 up"),
        ("auc", None, np.ones(8), r"auc needs good documents and others, but 8 of 8"),
    ],
)
def test_an_objective_that_cannot_be_is_one_line(
    name: str, good_from: float | None, truth: np.ndarray, told: str
) -> None:
    with pytest.raises(UserError, match=told) as stop:
        objectives.of(name, good_from, truth, SCALE)
    assert "\n" not in str(stop.value)
