import numpy as np
import pytest
from scipy.special import expit

from pipeline import heads
from pipeline.encoder import Embedded
from pipeline.targets import Target

SCALE = (0.0, 5.0)
EVERYONE = np.ones(400, dtype=bool)
FOLDS = np.arange(400) % 5


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 12))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def scores(embeddings: np.ndarray) -> list[float]:
    raw = embeddings @ np.random.default_rng(1).normal(size=12)
    return np.clip(np.round(2.5 + 1.5 * raw / raw.std()), 0, 5).tolist()


def target(values: list, **known: object) -> Target:
    return Target("score", "score", values, SCALE, **known)


def predicted(fit: heads.Fit, embeddings: np.ndarray) -> np.ndarray:
    n = len(embeddings)
    return fit.head.predict(Embedded(embeddings, np.arange(n), np.full(n, 9), np.zeros(n, np.bool_)))["score"]


def test_ridge_is_that_of_sklearn_for_more_and_for_fewer_documents_than_dimensions(embeddings: np.ndarray):
    from sklearn.linear_model import Ridge

    rng, strengths = np.random.default_rng(0), np.array([1e-2, 1.0, 30.0])
    for x in (rng.normal(size=(50, 9)), rng.normal(size=(7, 20))):
        y = rng.normal(size=len(x))
        weights, biases = heads.ridge(x, y, strengths)
        for weight, bias, strength in zip(weights, biases, strengths, strict=True):
            model = Ridge(alpha=strength).fit(x, y)
            np.testing.assert_allclose(weight, model.coef_, atol=1e-8)
            assert bias == pytest.approx(model.intercept_)


def test_the_strength_of_ridge_is_the_one_with_least_error_on_the_folds(embeddings: np.ndarray, scores: list[float]):
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, PredefinedSplit

    noisy = np.clip(np.array(scores) + np.random.default_rng(2).normal(scale=2, size=400), 0, 5)
    x = embeddings.astype(np.float64)
    tried = heads.RIDGE_STRENGTHS * heads.size(x)
    search = GridSearchCV(Ridge(), {"alpha": tried}, cv=PredefinedSplit(FOLDS), scoring="neg_mean_squared_error")
    search.fit(x, noisy)
    fit = heads.fit_head(target(noisy.tolist()), embeddings, EVERYONE, FOLDS)
    assert tried[0] < fit.strength < tried[-1]
    assert fit.strength == pytest.approx(search.best_params_["alpha"])


@pytest.mark.parametrize("how", ["linear", "ordinal", "mlp"])
def test_every_head_learns_what_can_be_learned(embeddings: np.ndarray, scores: list[float], how: heads.Name):
    fit = heads.fit_head(target(scores), embeddings, EVERYONE, FOLDS, how)
    assert np.corrcoef(predicted(fit, embeddings), scores)[0, 1] > 0.9
    assert fit.head.outputs(embeddings).shape == (400, 1)
    again = heads.fit_head(target(scores), embeddings, EVERYONE, FOLDS, how)
    np.testing.assert_array_equal(predicted(fit, embeddings), predicted(again, embeddings))


@pytest.mark.parametrize("how", ["linear", "ordinal", "mlp"])
def test_documents_outside_the_lesson_change_nothing(embeddings: np.ndarray, scores: list[float], how: heads.Name):
    learn = np.arange(400) % 4 > 0
    other = [score if is_learned else 5 - score for score, is_learned in zip(scores, learn, strict=True)]
    missing = [score if is_learned else None for score, is_learned in zip(scores, learn, strict=True)]
    fits = [
        heads.fit_head(target(values), embeddings, where, FOLDS, how)
        for values, where in ((scores, learn), (other, learn), (missing, EVERYONE))
    ]
    for fit in fits[1:]:
        np.testing.assert_array_equal(predicted(fits[0], embeddings), predicted(fit, embeddings))


def test_the_ordinal_head_is_the_optimum_of_its_penalised_log_loss(embeddings: np.ndarray, scores: list[float]):
    """The gradient, worked out here anew, is zero."""
    strength = 0.5
    fit = heads.fit_head(target(scores), embeddings, EVERYONE, FOLDS, "ordinal", strength=strength)
    chances, mean = fit.head.layers
    climbed = np.array(scores)[:, None] > np.arange(5)
    misses = expit(embeddings @ chances.weight.T + chances.bias) - climbed
    assert (chances.weight == chances.weight[0]).all() and (np.diff(chances.bias) < 0).all()
    np.testing.assert_allclose(misses.sum(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(embeddings.T @ misses.sum(axis=1) + strength * chances.weight[0], 0, atol=0.05)
    assert (mean.weight.tolist(), mean.bias.tolist()) == ([[1.0] * 5], [0.0])


def test_an_ordinal_score_never_leaves_the_scale(embeddings: np.ndarray, scores: list[float]):
    fit = heads.fit_head(target(scores), embeddings, EVERYONE, FOLDS, "ordinal")
    far = predicted(fit, 100 * embeddings)
    assert far.min() >= 0 and far.max() <= 5


def lessons(values: list[float], **known: object) -> heads.Lessons:
    rows = np.arange(len(values))
    return heads.Lessons(target(values, **known), np.zeros((len(values), 1)), values, rows, rows, 0)


def test_the_chances_of_climbing_come_from_the_probabilities_where_there_are_some():
    said = ({0.0: 0.5, 5.0: 0.5}, {1.0: 0.25, 2.0: 0.75}, None)
    steps = heads.ladder(SCALE)
    found = heads.climbs(lessons([2.5, 1.75, 1.75], probabilities=said), steps)
    np.testing.assert_allclose(found, [[0.5] * 5, [1, 0.75, 0, 0, 0], [1, 0.75, 0, 0, 0]])
    np.testing.assert_allclose(found.sum(axis=1), [2.5, 1.75, 1.75])


def test_a_distribution_teaches_more_than_its_mean(embeddings: np.ndarray):
    """Teachers that are torn between 0 and 5 and those that are sure of 2.5 have one mean, not one distribution."""
    torn = heads.climbs(lessons([2.5], probabilities=({0.0: 0.5, 5.0: 0.5},)), heads.ladder(SCALE))
    sure = heads.climbs(lessons([2.5]), heads.ladder(SCALE))
    assert torn.tolist() == [[0.5] * 5] and sure.tolist() == [[1, 1, 0.5, 0, 0]]


def test_ladders_of_whole_scores_of_odd_and_of_long_scales():
    assert heads.ladder((1, 3)).tolist() == [1, 2, 3]
    assert heads.ladder((0.5, 3)).tolist() == [0.5, 1, 2, 3]
    assert heads.ladder((0, 100)).tolist() == list(range(0, 101, 5))


def test_a_scale_of_two_is_logistic_regression(embeddings: np.ndarray):
    from sklearn.linear_model import LogisticRegression

    good = (embeddings[:, 0] + 0.2 * np.random.default_rng(0).normal(size=400) > 0).astype(float)
    fit = heads.fit_head(
        Target("score", "score", good.tolist(), (0, 1)), embeddings, EVERYONE, FOLDS, "ordinal", strength=1.0
    )
    model = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(embeddings.astype(np.float64), good)
    np.testing.assert_allclose(
        predicted(fit, embeddings), model.predict_proba(embeddings.astype(np.float64))[:, 1], atol=1e-3
    )
