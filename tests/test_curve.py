import numpy as np
import pytest

from pipeline import curve

SIZES = np.array([40.0, 80.0, 160.0, 280.0, 400.0])


def test_a_power_law_is_found_again_and_followed():
    for exponent in (curve.EXPONENTS[0], curve.EXPONENTS[-1]):
        values = (0.8 - 2 * SIZES**-exponent)[:, None]
        found = curve.power_law(SIZES, values, np.array([400.0, 2000.0]), exponent)[:, 0]
        np.testing.assert_allclose(found, [0.8 - 2 * n**-exponent for n in (400.0, 2000.0)], atol=1e-9)


def test_a_curve_that_falls_promises_nothing_and_none_goes_beyond_one():
    falling = curve.extrapolate(SIZES, np.linspace(0.7, 0.6, 5)[:, None], np.array([400.0, 4000.0]))
    np.testing.assert_allclose(falling, 0.65)
    _, steep = curve.extrapolate(SIZES, np.linspace(0.1, 0.95, 5)[:, None], np.array([400.0, 40000.0]))
    assert steep.max() <= 1


def test_the_gain_is_told_with_its_interval():
    rng = np.random.default_rng(0)
    exact = 0.8 - 2 * SIZES**-0.5
    kappas = np.column_stack([exact, exact[:, None] + rng.normal(scale=0.005, size=(5, 200))])
    found = curve.gain(SIZES, kappas, n_train=400, share=0.5, n_more=2000)
    expected = 2 * 400**-0.5 - 2 * 1400**-0.5
    low, high = found["gain_interval"]
    assert low < found["gain"] < high and low < expected < high and high - low < 0.1
    told = f"2,000 more ratings would buy about +{found['gain']:.3f} kappa (95% interval "
    assert found["sentence"].startswith(told)


@pytest.mark.parametrize("exponent", [0.3, 0.6, 1.0])
def test_the_interval_of_the_gain_holds_it_although_the_points_are_off(exponent: float):
    """Points are off by what was learned from, which resampling the documents judged on does not show."""
    rng, n_held, n = np.random.default_rng(0), 0, 100
    exact = 0.8 - 0.5 * (SIZES / SIZES[0]) ** -exponent
    expected = 0.5 * ((400 / SIZES[0]) ** -exponent - (1400 / SIZES[0]) ** -exponent)
    for _ in range(n):
        seen = exact + rng.normal(scale=0.015, size=5)
        kappas = np.column_stack([seen, seen[:, None] + rng.normal(scale=0.01, size=(5, 200))])
        low, high = curve.gain(SIZES, kappas, n_train=400, share=0.5, n_more=2000)["gain_interval"]
        n_held += low <= expected <= high
    assert n_held >= 90


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
