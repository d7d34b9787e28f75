import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.weighting import FEWEST_KEPT, above, estimate, lowest_cut, strata, stratum_of, wilson

N = 100_000
RNG = np.random.default_rng(0)
SCORES = RNG.normal(1.5, 1.0, N)
GOOD = RNG.random(N) < 1 / (1 + np.exp(-2 * (SCORES - 3)))
"""A corpus of which the teacher's judgement is known; 13% of it is good."""
CORPUS = strata(SCORES)
MEMBERS = [np.flatnonzero(stratum_of(SCORES, CORPUS) == each) for each in range(10)]
CUTS = (2.5, 3.0)


def drawn(sizes: list[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """So many judged documents of each stratum."""
    chosen = np.concatenate([rng.choice(of, size) for of, size in zip(MEMBERS, sizes, strict=True)])
    return SCORES[chosen], GOOD[chosen]


def truth(cut: float) -> dict[str, float]:
    kept = cut <= SCORES
    return {
        "base_rate": GOOD.mean(),
        "precision": GOOD[kept].mean(),
        "recall": (GOOD & kept).sum() / GOOD.sum(),
    }


@pytest.mark.parametrize("sizes", [[30] * 10, [15, 15, 15, 15, 15, 15, 30, 50, 80, 150]], ids=["equal", "mostly good"])
def test_estimates_from_stratified_draws_are_unbiased_and_their_intervals_cover(sizes: list[int]):
    rng = np.random.default_rng(1)
    for cut in CUTS:
        found = [estimate(*drawn(sizes, rng), CORPUS, above(cut)) for _ in range(300)]
        for name, known in truth(cut).items():
            values = np.array([getattr(each, name) for each in found], dtype=float)
            intervals = np.array([getattr(each, name + "_interval") for each in found])
            assert values.mean() == pytest.approx(known, abs=3 * values.std() / np.sqrt(300) + 0.01)
            assert np.mean((intervals[:, 0] <= known) & (known <= intervals[:, 1])) >= 0.9


def test_without_weights_a_draw_of_mostly_good_documents_would_mislead():
    scores, good = drawn([15, 15, 15, 15, 15, 15, 30, 50, 80, 150], np.random.default_rng(2))
    known = truth(2.5)["base_rate"]
    weighted = estimate(scores, good, CORPUS, above(2.5))
    assert good.mean() > 1.8 * known
    assert weighted.base_rate_interval is not None
    assert weighted.base_rate_interval[0] < known < weighted.base_rate_interval[1]


def test_a_stratum_that_nobody_judged_leaves_unknown_what_depends_on_it():
    scores, good = drawn([0, *[30] * 9], np.random.default_rng(3))
    low_unseen = estimate(scores, good, CORPUS, above(2.5))
    assert low_unseen.n_strata_empty == 1
    assert low_unseen.precision is not None
    assert (low_unseen.recall, low_unseen.base_rate) == (None, None)
    high_unseen = estimate(*drawn([*[30] * 9, 0], np.random.default_rng(3)), CORPUS, above(2.5))
    assert (high_unseen.precision, high_unseen.precision_interval) == (None, None)


def test_nothing_kept_has_no_precision_and_nothing_good_no_recall():
    scores = np.linspace(0, 1, 100)
    none_kept = estimate(scores, scores > 0.5, strata(scores), above(2.0))
    assert (none_kept.precision, none_kept.recall, none_kept.n_judged_kept) == (None, 0.0, 0)
    none_good = estimate(scores, scores > 2, strata(scores), above(0.5))
    assert (none_good.precision, none_good.recall) == (0.0, None)


def test_all_good_is_not_certain():
    scores = np.linspace(0, 1, 40)
    found = estimate(scores, np.ones(40, bool), strata(scores, 1), above(0.5))
    assert found.precision == 1.0
    assert found.precision_interval == pytest.approx((20 / (20 + 1.96**2), 1.0))


def test_documents_drawn_by_chance_count_by_their_chance():
    scores, good = np.array([0.0, 1.0, 2.0, 3.0] * 10), np.array([False, False, True, True] * 10)
    found = estimate(scores, good, strata(scores, 1), lambda s: np.where(s == 3, 1.0, 0.5 * (s == 0)))
    assert found.precision == pytest.approx(1 / 1.5)
    assert found.recall == pytest.approx(0.5)


def test_wilson_of_five_in_ten():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=200), st.integers(1, 12))
def test_strata_keep_equal_scores_together_and_share_out_the_corpus(values: list[int], n: int):
    found = strata(np.array(values, float), n)
    assert len(found.shares) <= n and len(found.edges) == len(found.shares) - 1
    counts = np.bincount(stratum_of(np.array(values, float), found), minlength=len(found.shares))
    assert counts.min() > 0
    assert found.shares == pytest.approx(counts / len(values))


def test_strata_of_counted_scores_are_those_of_the_scores():
    scores = np.repeat([1.0, 2.0, 3.0, 5.0], [10, 5, 3, 2])
    counted = strata(np.array([1.0, 2.0, 3.0, 5.0]), 4, np.array([10, 5, 3, 2]))
    assert counted.edges.tolist() == strata(scores, 4).edges.tolist() == [2.0, 3.0]
    assert counted.shares == pytest.approx([0.5, 0.25, 0.25])


def test_the_lowest_cut_that_is_precise_enough_is_found():
    scores = np.arange(200, dtype=float)
    good = np.where(scores >= 100, True, scores % 2 == 0)
    cut, best = lowest_cut(scores, good, strata(scores, 1), 0.8)
    assert cut is not None and best is not None
    kept = scores >= cut.cut
    assert good[kept].mean() == pytest.approx(cut.precision) and cut.precision >= 0.8
    assert all(good[scores >= lower].mean() < 0.8 for lower in range(int(cut.cut)))
    assert best.precision == 1.0


def test_a_precision_out_of_reach_gives_the_best_there_is():
    scores = np.arange(100, dtype=float)
    cut, best = lowest_cut(scores, scores % 2 == 1, strata(scores, 1), 0.9)
    assert cut is None
    assert best is not None and best.precision < 0.6


def test_a_cut_is_not_chosen_by_a_handful_of_documents():
    scores = np.arange(FEWEST_KEPT - 1, dtype=float)
    assert lowest_cut(scores, np.ones(len(scores), bool), strata(scores, 1), 0.5) == (None, None)
