import numpy as np
import pytest

from pipeline import curve

SIZES = np.array([40.0, 80.0, 160.0, 280.0, 400.0])


def test_a_power_law_is_found_again_and_followed():
    values = np.array([0.8 - 2 * SIZES**-0.5, 0.6 - 1 * SIZES**-0.9]).T
    found = curve.extrapolate(SIZES, values, np.array([400.0, 2000.0]))
    np.testing.assert_allclose(found, [[0.8 - 2 * n**-0.5, 0.6 - 1 * n**-0.9] for n in (400.0, 2000.0)], atol=1e-9)


def test_a_curve_that_falls_promises_nothing_and_none_goes_beyond_one():
    falling = curve.extrapolate(SIZES, np.linspace(0.7, 0.6, 5)[:, None], np.array([400.0, 4000.0]))
    np.testing.assert_allclose(falling, 0.65)
    steep = curve.extrapolate(SIZES, np.linspace(0.1, 0.95, 5)[:, None], np.array([40000.0]))
    assert steep.max() <= 1


def test_the_gain_is_told_with_its_interval():
    rng = np.random.default_rng(0)
    exact = 0.8 - 2 * SIZES**-0.5
    kappas = np.column_stack([exact, exact[:, None] + rng.normal(scale=0.005, size=(5, 200))])
    found = curve.gain(SIZES, kappas, n_train=400, share=0.5, n_more=2000)
    expected = 2 * 400**-0.5 - 2 * 1400**-0.5
    assert found["gain"] == pytest.approx(expected, abs=1e-6)
    low, high = found["gain_interval"]
    assert low < expected < high and high - low < 0.1
    assert found["sentence"].startswith(f"2,000 more ratings would buy about +{expected:.3f} kappa (95% interval ")


def test_a_measure_that_is_not_defined_has_no_gain():
    found = curve.gain(SIZES, np.full((5, 11), np.nan), 400, 0.5, 2000)
    assert (found["gain"], found["gain_interval"], found["sentence"]) == (None, None, None)


def mean_learner(features: np.ndarray, truth: np.ndarray, seen: list[np.ndarray]):
    """Learns by least squares, and remembers from whom."""

    def learn(taken: np.ndarray) -> np.ndarray:
        seen.append(taken)
        weights, *_ = np.linalg.lstsq(features[taken], truth[taken], rcond=None)
        return features @ weights

    return learn


def test_points_come_from_documents_held_out_and_grow_with_the_share_learned_from():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 20))
    truth = np.clip(2.5 + features @ rng.normal(size=20) / 4 + rng.normal(scale=0.5, size=400), 0, 5)
    features = np.column_stack([features, np.ones(400)])
    units = np.repeat(np.arange(200), 2)
    seen: list[np.ndarray] = []
    found = curve.of_score(
        mean_learner(features, truth, seen), truth, (0, 5), np.ones(400, bool), units, [0] * 400, "fitted", 400, 500, 0
    )
    assert [point["n"] for point in found["points"]] == [32, 64, 128, 224, 320]
    spearmans = [point["spearman"] for point in found["points"]]
    assert spearmans[0] < spearmans[2] < spearmans[4] and spearmans[4] > 0.8
    for point in found["points"]:
        assert point["kappa_interval"][0] <= point["kappa"] <= point["kappa_interval"][1]
    assert [more["n_more"] for more in found["more"]] == [500, 2000]
    assert 0 <= found["more"][0]["gain"] <= found["more"][1]["gain"]
    assert all((taken[::2] == taken[1::2]).all() for taken in seen), "a unit is learned from whole or not at all"
    assert len(seen) == 5 * sum(curve.N_DRAWS)


def test_only_documents_of_the_sample_are_judged_on():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 200).astype(float)
    judged = np.arange(200) < 100
    other = np.where(judged, truth, 5 - truth)
    one, two = (
        curve.of_score(
            lambda taken: truth + 0.1, values, (0, 5), judged, np.arange(200), [0] * 200, "half_up", 100, 200, 0
        )
        for values in (truth, other)
    )
    assert one == two and one["points"][-1]["spearman"] == pytest.approx(1)
