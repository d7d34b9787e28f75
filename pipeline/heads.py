"""Fitting the linear heads of a student: ridge for scores, logistic regression for labels."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.encoder import Embeddings
from pipeline.metrics import Bools, Floats
from pipeline.student import Head
from pipeline.targets import Kind, Target

STRENGTHS = np.logspace(-3, 3, 25)
"""Ridge strengths tried, for embeddings of about unit length."""

LABEL_STRENGTHS = np.logspace(2, -2, 7)
"""Strengths tried for labels."""

N_FOLDS = 5

N_STEPS = 1000
"""Most steps of one logistic regression."""


class Fit(NamedTuple):
    """A trained head, and the penalty on its squared weights."""

    head: Head
    strength: float


def fit_head(target: Target, embeddings: Embeddings, learn: Bools, seed: int) -> Fit:
    """A head from the documents of `learn` (n,) that have this target; its strength by 5-fold cross-validation."""
    chosen = learn & known(target)
    values = [value for value, is_chosen in zip(target.values, chosen, strict=True) if is_chosen]
    return FITS[target.kind](target, embeddings[chosen].astype(np.float64), values, seed)


def known(target: Target) -> Bools:
    """Which documents have this target: (n,)."""
    return np.array([value is not None for value in target.values], dtype=bool)


def fit_score(target: Target, embeddings: Floats, values: list[float], seed: int) -> Fit:
    """Ridge regression."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    folds = KFold(N_FOLDS, shuffle=True, random_state=seed)
    ridge = RidgeCV(STRENGTHS, cv=folds, scoring="neg_mean_squared_error")
    ridge.fit(embeddings, np.array(values, dtype=np.float64))
    return Fit(head(target, ridge.coef_[None], np.array([ridge.intercept_])), float(ridge.alpha_))


def fit_label(target: Target, embeddings: Floats, values: list[str], seed: int) -> Fit:
    """Multinomial logistic regression over the labels that occur."""
    labels, truth = np.unique(np.array(values), return_inverse=True)
    strength = best_strength(losses(embeddings, truth, seed))
    weight, bias = logistic(embeddings, truth, strength)
    return Fit(head(target, weight, bias, labels.tolist()), strength)


def fit_labels(target: Target, embeddings: Floats, values: list[list[str]], seed: int) -> Fit:
    """A logistic regression for each label that occurs, against all documents without it; one strength for all."""
    labels = sorted({label for each in values for label in each})
    truth = np.array([[label in each for label in labels] for each in values], dtype=np.int64)
    total = np.sum([losses(embeddings, column, seed) for column in truth.T], axis=0)
    strength = best_strength(total)
    fits = [logistic(embeddings, column, strength) for column in truth.T]
    weight = np.stack([weight[-1] - weight[0] for weight, _ in fits])
    return Fit(head(target, weight, np.array([bias[-1] - bias[0] for _, bias in fits]), labels), strength)


FITS: dict[Kind, Callable[..., Fit]] = {"score": fit_score, "label": fit_label, "labels": fit_labels}


def head(target: Target, weight: Floats, bias: Floats, labels: list[str] | None = None) -> Head:
    """A head of a target from weights (n_outputs, dim) and biases (n_outputs,) of any precision."""
    return Head(
        target.name,
        target.kind,
        weight.astype(np.float32),
        bias.astype(np.float32),
        target.scale,
        tuple(labels or ()),
    )


# -- logistic regression ----------------------------------------------------------------------------------------------


def logistic(embeddings: Floats, truth: NDArray[np.int64], strength: float) -> tuple[Floats, Floats]:
    """Weights (n_classes, dim) and biases (n_classes,), at least two of each, of a softmax over classes 0, 1, ...

    Where all documents are of one class, the bias is its log-odds by the rule of succession.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(truth.tolist())) < 2:
        return np.zeros((2, embeddings.shape[1])), np.array([0.0, np.log(len(truth) + 1)])
    with quietly_alone():
        model = LogisticRegression(C=1 / strength, max_iter=N_STEPS).fit(embeddings, truth)
    weight, bias = model.coef_, model.intercept_
    if len(bias) > 1:
        return weight, bias
    return np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])


def losses(embeddings: Floats, truth: NDArray[np.int64], seed: int) -> Floats:
    """Log loss of held-out folds at each of LABEL_STRENGTHS: (n_strengths,).

    Classes with fewer members than folds are left out; zeros where fewer than two are left.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    common = np.bincount(truth)[truth] >= N_FOLDS
    if len(set(truth[common].tolist())) < 2:
        return np.zeros(len(LABEL_STRENGTHS))
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    tried = {"C": 1 / LABEL_STRENGTHS}
    search = GridSearchCV(LogisticRegression(max_iter=N_STEPS), tried, scoring="neg_log_loss", cv=folds, refit=False)
    with quietly_alone():
        search.fit(embeddings[common], truth[common])
    return -np.asarray(search.cv_results_["mean_test_score"], dtype=np.float64)


@contextmanager
def quietly_alone() -> Iterator[None]:
    """On one thread, since threads that wait for each other made small fits 50 times slower on a busy machine, and
    without warnings of fits not quite settled after N_STEPS: held-out documents judge them like any other."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def best_strength(losses: Floats) -> float:
    """The strength of the least loss; 1 where nothing could be compared."""
    return float(LABEL_STRENGTHS[int(np.argmin(losses))]) if losses.any() else 1.0
