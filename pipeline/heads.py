"""Fitting the heads of a student: linear, ordinal or with a hidden layer for scores, logistic for labels."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.forward import Embeddings
from pipeline.metrics import Bools, Floats
from pipeline.student import Head, Layer
from pipeline.targets import Kind, Target

Name = Literal["linear", "ordinal", "mlp"]

RIDGE_STRENGTHS = np.logspace(-4, 2, 25)
"""Ridge strengths tried, as multiples of the mean squared length of the centred embeddings."""

ORDINAL_STRENGTHS = np.logspace(1, -3, 9)
"""The same for the ordinal head, strongest first: each fit starts from the one before."""

LABEL_STRENGTHS = np.logspace(2, -2, 7)
"""Strengths tried for labels."""

MLP_STRENGTHS = np.array([10.0, 30.0, 100.0])
"""Strengths tried for the mlp, whose inputs have spread 1."""

N_HIDDEN = 64
"""Hidden units of the mlp."""

FEWEST_TO_STOP = 14
"""Documents from which the mlp sets a part aside to be stopped by; of fewer it would be a single one or two."""

N_FOLDS = 5

N_STEPS = 1000
"""Most steps of one logistic regression."""

MOST_STEPS_OF_A_LADDER = 20


class Fit(NamedTuple):
    """A trained head, and the penalty on its squared weights."""

    head: Head
    strength: float


class Lessons(NamedTuple):
    """What one head is fitted to: n documents that have the target."""

    target: Target
    embeddings: Floats
    """(n, dim)"""
    values: list[Any]
    rows: NDArray[np.int64]
    """(n,) where these documents stand among all."""
    folds: NDArray[np.int64]
    """(n,) fold of each in cross-validation."""
    seed: int


Fitter = Callable[[Lessons, float | None], Fit]


def fit_head(
    target: Target,
    embeddings: Embeddings,
    learn: Bools,
    folds: NDArray[np.int64],
    how: Name = "linear",
    seed: int = 0,
    strength: float | None = None,
) -> Fit:
    """A head from the documents of `learn` (n,) that have this target; its strength by cross-validation over `folds`
    (n,), unless given. `how` concerns scores; labels are logistic."""
    rows = np.flatnonzero(learn & known(target))
    values = [target.values[i] for i in rows]
    lessons = Lessons(target, embeddings[rows].astype(np.float64), values, rows, folds[rows], seed)
    fit: Fitter = SCORES[how] if target.kind == "score" else LABELS[target.kind]
    with quietly_alone():
        return fit(lessons, strength)


def known(target: Target) -> Bools:
    """Which documents have this target: (n,)."""
    return np.array([value is not None for value in target.values], dtype=bool)


def head(target: Target, layers: list[Layer], labels: list[str] | None = None) -> Head:
    """A head of a target."""
    return Head(target.name, target.kind, tuple(layers), target.scale, tuple(labels or ()))


def layer(weight: Floats, bias: Floats, activation: Literal["identity", "sigmoid", "relu"] = "identity") -> Layer:
    """A layer from weights (n_out, n_in) and biases (n_out,) of any precision."""
    return Layer(weight.astype(np.float32), bias.astype(np.float32), activation)


def by_folds(losses: Callable[[Bools], Floats], folds: NDArray[np.int64]) -> Floats:
    """Summed losses (n_strengths,) of each fold, held out in turn: (n,) bool."""
    return np.asarray(np.sum([losses(folds == fold) for fold in np.unique(folds)], axis=0))


def size(embeddings: Floats) -> float:
    """Mean squared length of embeddings (n, dim) less their mean, so that strengths mean the same for any encoder."""
    return max(float(embeddings.var(axis=0).sum()), 1e-12)


# -- linear: ridge regression -----------------------------------------------------------------------------------------


def fit_linear(lessons: Lessons, strength: float | None) -> Fit:
    """Ridge regression, its global optimum."""
    x, y = lessons.embeddings, np.array(lessons.values, dtype=np.float64)
    if strength is None:
        tried = RIDGE_STRENGTHS * size(x)
        strength = float(tried[np.argmin(by_folds(partial(ridge_losses, x, y, tried), lessons.folds))])
    weights, biases = ridge(x, y, np.array([strength]))
    return Fit(head(lessons.target, [layer(weights, biases)]), strength)


def ridge_losses(x: Floats, y: Floats, strengths: Floats, held_out: Bools) -> Floats:
    """Squared errors on held-out documents at each strength: (n_strengths,)."""
    weights, biases = ridge(x[~held_out], y[~held_out], strengths)
    misses = x[held_out] @ weights.T + biases - y[held_out, None]
    return np.asarray((misses**2).sum(axis=0))


def ridge(x: Floats, y: Floats, strengths: Floats) -> tuple[Floats, Floats]:
    """Weights (n_strengths, dim) and biases (n_strengths,) that minimise squared errors + strength x squared weights:
    one eigendecomposition, of the smaller Gram matrix, serves all strengths."""
    middle = x.mean(axis=0)
    centred, misses = x - middle, y - y.mean()
    wide = len(x) < x.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    basis = centred.T @ vectors if wide else vectors
    turned = vectors.T @ misses if wide else vectors.T @ (centred.T @ misses)
    weights = (turned / (np.maximum(values, 0) + strengths[:, None])) @ basis.T
    return weights, y.mean() - weights @ middle


# -- ordinal: cumulative logistic regression --------------------------------------------------------------------------


def fit_ordinal(lessons: Lessons, strength: float | None) -> Fit:
    """Chances of climbing above each step of the scale, proportional odds: one weight vector, a bias for each step
    (arXiv:1901.07884). The score is the mean that these chances give."""
    assert lessons.target.scale is not None
    steps = ladder(lessons.target.scale)
    x, climbed = lessons.embeddings, climbs(lessons, steps)
    if strength is None:
        tried = ORDINAL_STRENGTHS * size(x)
        strength = float(tried[np.argmin(by_folds(partial(ordinal_losses, x, climbed, tried), lessons.folds))])
    weight, biases = ordinal(x, climbed, np.array([strength]))[-1]
    chances = layer(np.tile(weight, (len(biases), 1)), biases, "sigmoid")
    return Fit(head(lessons.target, [chances, layer(np.diff(steps)[None], steps[:1])]), strength)


def ladder(scale: tuple[float, float]) -> Floats:
    """The scale's ends and the whole scores between; of long scales twenty equal steps."""
    low, high = scale
    whole = np.arange(np.ceil(low), np.floor(high) + 1)
    even = np.linspace(low, high, MOST_STEPS_OF_A_LADDER + 1)
    return np.unique([low, *whole, high]) if len(whole) <= len(even) else even


def climbs(lessons: Lessons, steps: Floats) -> Floats:
    """The teacher's chance of a score above each step (n, n_steps - 1), from its probabilities, else from the score
    itself; in between two steps in proportion, so that the mean over the steps is the score."""
    said = lessons.target.probabilities
    found = np.empty((len(lessons.values), len(steps) - 1))
    for row, (i, value) in enumerate(zip(lessons.rows.tolist(), lessons.values, strict=True)):
        shares = (said[i] if said else None) or {value: 1.0}
        parts = np.clip((np.array(list(shares))[:, None] - steps[:-1]) / np.diff(steps), 0, 1)
        weights = np.array(list(shares.values()))
        found[row] = weights @ parts / weights.sum()
    return found


def ordinal_losses(x: Floats, climbed: Floats, strengths: Floats, held_out: Bools) -> Floats:
    """Log loss of held-out documents at each strength: (n_strengths,)."""
    fits = ordinal(x[~held_out], climbed[~held_out], strengths)
    return np.array([log_loss(x[held_out] @ weight[:, None] + biases, climbed[held_out]) for weight, biases in fits])


def ordinal(x: Floats, climbed: Floats, strengths: Floats) -> list[tuple[Floats, Floats]]:
    """Weights (dim,) and biases (n_steps - 1,) at each strength, of log loss + strength / 2 x squared weights, which
    is convex; each starts from the one before, in units of the curvature at the begin, which settles in few steps."""
    from scipy.optimize import minimize

    middle, dim = x.mean(axis=0), x.shape[1]
    shares = np.clip(climbed.mean(axis=0), 1e-3, 1 - 1e-3)
    slopes = shares * (1 - shares)
    values, basis = np.linalg.eigh((x - middle).T @ (x - middle))
    turned = (x - middle) @ basis
    point = np.concatenate([np.zeros(dim), np.log(shares / (1 - shares))])
    fits = []
    for strength in strengths:
        curvature = np.concatenate([np.maximum(values, 0) * slopes.sum() + strength, len(x) * slopes])
        units = 1 / np.sqrt(curvature)
        args = (turned, climbed, strength, units)
        point = units * minimize(ordinal_loss, point / units, args, jac=True, method="L-BFGS-B", options=SETTLED).x
        weight = basis @ point[:dim]
        fits.append((weight, point[dim:] - weight @ middle))
    return fits


SETTLED = {"maxiter": N_STEPS, "gtol": 1e-4}
"""Gradients are in units in which a step of one is about one standard error."""


def ordinal_loss(scaled: Floats, x: Floats, climbed: Floats, strength: float, units: Floats) -> tuple[float, Floats]:
    """The penalised log loss at weights and biases (dim + n_steps - 1,) in these units, and its gradient. A trace of a
    penalty holds biases that no document does."""
    from scipy.special import expit

    weight, biases = np.split(scaled * units, [x.shape[1]])
    odds = (x @ weight)[:, None] + biases
    misses = expit(odds) - climbed
    gradient = np.concatenate([x.T @ misses.sum(axis=1) + strength * weight, misses.sum(axis=0) + TRACE * biases])
    penalty = (strength * weight @ weight + TRACE * biases @ biases) / 2
    return log_loss(odds, climbed) + float(penalty), np.asarray(gradient * units)


TRACE = 1e-3


def log_loss(odds: Floats, climbed: Floats) -> float:
    """Summed log loss of log-odds against shares, both (n, n_steps - 1)."""
    return float(np.sum(np.logaddexp(0, odds) - climbed * odds))


# -- mlp: one hidden layer --------------------------------------------------------------------------------------------


def fit_mlp(lessons: Lessons, strength: float | None) -> Fit:
    """One hidden layer, stopped early by a part of its own lessons."""
    x, y = lessons.embeddings, np.array(lessons.values, dtype=np.float64)
    middle, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-9)
    about, unit = y.mean(), max(float(y.std()), 1e-9)
    x, y = (x - middle) / spread, (y - about) / unit
    if strength is None:
        tried = partial(mlp_losses, x, y, lessons.seed)
        strength = float(MLP_STRENGTHS[np.argmin(by_folds(tried, lessons.folds))])
    net = mlp(x, y, strength, lessons.seed)
    weight = net.coefs_[0].T / spread
    hidden = layer(weight, net.intercepts_[0] - weight @ middle, "relu")
    last = layer(net.coefs_[1].T * unit, net.intercepts_[1] * unit + about)
    return Fit(head(lessons.target, [hidden, last]), strength)


def mlp(x: Floats, y: Floats, strength: float, seed: int) -> Any:
    """A network that has learned y (n,) from x (n, dim), both of mean 0 and spread 1."""
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(
        hidden_layer_sizes=(N_HIDDEN,),
        alpha=strength,
        early_stopping=len(x) >= FEWEST_TO_STOP,
        validation_fraction=0.15,
        max_iter=N_STEPS,
        random_state=seed,
    ).fit(x, y)


def mlp_losses(x: Floats, y: Floats, seed: int, held_out: Bools) -> Floats:
    """Squared errors on held-out documents at each strength: (n_strengths,)."""
    nets = [mlp(x[~held_out], y[~held_out], strength, seed) for strength in MLP_STRENGTHS]
    return np.array([((net.predict(x[held_out]) - y[held_out]) ** 2).sum() for net in nets])


# -- logistic regression for labels -----------------------------------------------------------------------------------


def fit_label(lessons: Lessons, strength: float | None) -> Fit:
    """Multinomial logistic regression over the labels that occur."""
    labels, truth = np.unique(np.array(lessons.values), return_inverse=True)
    strength = strength or best_strength(losses(lessons.embeddings, truth, lessons.folds))
    weight, bias = logistic(lessons.embeddings, truth, strength)
    return Fit(head(lessons.target, [layer(weight, bias)], labels.tolist()), strength)


def fit_labels(lessons: Lessons, strength: float | None) -> Fit:
    """A logistic regression for each label that occurs, against all documents without it; one strength for all."""
    x = lessons.embeddings
    labels = sorted({label for each in lessons.values for label in each})
    truth = np.array([[label in each for label in labels] for each in lessons.values], dtype=np.int64)
    if strength is None:
        strength = best_strength(np.sum([losses(x, column, lessons.folds) for column in truth.T], axis=0))
    fits = [logistic(x, column, strength) for column in truth.T]
    weight = np.stack([weight[-1] - weight[0] for weight, _ in fits])
    bias = np.array([bias[-1] - bias[0] for _, bias in fits])
    return Fit(head(lessons.target, [layer(weight, bias)], labels), strength)


def logistic(embeddings: Floats, truth: NDArray[np.int64], strength: float) -> tuple[Floats, Floats]:
    """Weights (n_classes, dim) and biases (n_classes,), at least two of each, of a softmax over classes 0, 1, ...

    Where all documents are of one class, the bias is its log-odds by the rule of succession.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(truth.tolist())) < 2:
        return np.zeros((2, embeddings.shape[1])), np.array([0.0, np.log(len(truth) + 1)])
    model = LogisticRegression(C=1 / strength, max_iter=N_STEPS).fit(embeddings, truth)
    weight, bias = model.coef_, model.intercept_
    if len(bias) > 1:
        return weight, bias
    return np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])


def losses(embeddings: Floats, truth: NDArray[np.int64], folds: NDArray[np.int64]) -> Floats:
    """Summed log loss of held-out folds at each of LABEL_STRENGTHS: (n_strengths,).

    Classes with fewer members than folds are left out; zeros where fewer than two are left.
    """
    common = np.bincount(truth)[truth] >= N_FOLDS
    return by_folds(partial(label_losses, embeddings[common], truth[common]), folds[common])


def label_losses(x: Floats, truth: NDArray[np.int64], held_out: Bools) -> Floats:
    """Log loss of held-out documents, of classes that the others have too, at each strength: (n_strengths,)."""
    from sklearn import metrics
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(truth[~held_out])
    judged = held_out & np.isin(truth, classes)
    if len(classes) < 2 or not judged.any():
        return np.zeros(len(LABEL_STRENGTHS))
    models = (LogisticRegression(C=1 / strength, max_iter=N_STEPS) for strength in LABEL_STRENGTHS)
    chances = (model.fit(x[~held_out], truth[~held_out]).predict_proba(x[judged]) for model in models)
    return np.array([metrics.log_loss(truth[judged], each, labels=classes, normalize=False) for each in chances])


def best_strength(losses: Floats) -> float:
    """The strength of the least loss; 1 where nothing could be compared."""
    return float(LABEL_STRENGTHS[int(np.argmin(losses))]) if losses.any() else 1.0


@contextmanager
def quietly_alone() -> Iterator[None]:
    """On one thread, since threads that wait for each other made small fits 50 times slower on a busy machine, and
    without warnings of fits not quite settled after N_STEPS: held-out documents judge them like any other."""
    from sklearn.exceptions import ConvergenceWarning

    with threads().limit(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@lru_cache(maxsize=1)
def threads() -> Any:
    """The thread pools of the libraries that are loaded; looking for them takes longer than a small fit."""
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController()


SCORES: dict[Name, Fitter] = {"linear": fit_linear, "ordinal": fit_ordinal, "mlp": fit_mlp}
LABELS: dict[Kind, Fitter] = {"label": fit_label, "labels": fit_labels}
