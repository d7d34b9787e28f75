"""A cascade: a first student that costs next to nothing rules out what is surely not among the best, and the encoder
reads the rest.

It sees the mean of the encoder's own word embeddings and the number of tokens, and has learned the student's scores
of a sample.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.stats import beta
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, KFold

from pipeline.config import Filter
from pipeline.errors import UserError, needs
from pipeline.storage import atomic
from pipeline.tokens import Ids

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
STRENGTHS = np.logspace(-4, 1, 11)
"""Of the regularisation, tried in cross-validation."""
N_FOLDS = 5
LEAST_GAIN = 1.2
"""Expected speed-up below which a cascade is not worth its risk."""


class First(NamedTuple):
    """The first student: kernel ridge regression on standardised features."""

    mean: Floats
    scale: Floats
    """Of the features (dim,)."""
    anchors: Floats
    """Standardised features of the documents it has learned from: (n_learned, dim)."""
    weights: Floats
    """(n_learned,)"""
    gamma: float
    """Of the kernel exp(-gamma x squared distance)."""
    bias: float
    threshold: float = -math.inf
    """From this score up a document passes."""

    def scores(self, features: Floats) -> Floats:
        """Its scores (n,) of features (n, dim)."""
        kernel = rbf_kernel((features - self.mean) / self.scale, self.anchors, self.gamma)
        found: Floats = kernel @ self.weights + self.bias
        return found

    def passes(self, features: Floats) -> NDArray[np.bool_]:
        """Whether the encoder has to read the documents (n,) of features (n, dim)."""
        return np.asarray(self.scores(features) >= self.threshold, bool)

    @property
    def digest(self) -> str:
        """16 hex digits of all that decides what passes."""
        numbers = b"".join(np.asarray(value, np.float64).tobytes() for value in self)
        return hashlib.sha256(numbers).hexdigest()[:16]


class Costs(NamedTuple):
    """Seconds that the same documents took."""

    tokenising: float
    first: float
    encoder: float


# -- learning ---------------------------------------------------------------------------------------------------------


def features(ids: Sequence[Ids], table: Any) -> Floats:
    """Means of word embeddings, from a table (n_words, dim) float32, and the logarithm of how many there are, of each
    text's token ids: (n_texts, dim + 1)."""
    torch = needs("torch", "torch")
    lengths = np.array([len(row) for row in ids])
    tokens = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    starts = torch.from_numpy(np.cumsum(lengths) - lengths)
    means = torch.nn.functional.embedding_bag(tokens, table, starts, mode="mean").numpy()
    return np.column_stack([means, np.log1p(lengths)]).astype(np.float64)


def n_tokens(features: Floats) -> Floats:
    """How many tokens (n,) were read for features."""
    return np.asarray(np.expm1(features[:, -1]))


def learn(features: Floats, scores: Floats, seed: int) -> First:
    """A first student of documents' features (n, dim) and scores (n,); how strictly is chosen by cross-validation."""
    mean, scale, bias = features.mean(axis=0), features.std(axis=0), scores.mean()
    scale = np.where(scale > 0, scale, 1.0)
    anchors = (features - mean) / scale
    gamma = 1 / (np.median(pdist(anchors, "sqeuclidean")) or 1.0)
    folds = KFold(N_FOLDS, shuffle=True, random_state=seed % 2**32)
    ridge = KernelRidge(kernel="precomputed")
    search = GridSearchCV(ridge, {"alpha": STRENGTHS}, scoring="neg_mean_squared_error", cv=folds)
    search.fit(rbf_kernel(anchors, gamma=gamma), scores - bias)
    return First(mean, scale, anchors, search.best_estimator_.dual_coef_, float(gamma), float(bias))


def calibrate(said: Floats, scores: Floats, cut: float, recall: float) -> float:
    """The highest threshold on what the first student said (n,) at which, with 95% confidence, at least the share
    `recall` of documents whose scores (n,) reach the cut passes; it must not have learned from any of these."""
    above = np.sort(said[scores >= cut])
    missed = most_missed(len(above), recall)
    passing = above[missed] if missed >= 0 else -math.inf
    below = said[said < passing]
    # Halfway to the next one below, so that rounding decides about no document of the sample.
    return float((passing + below.max()) / 2) if len(below) else -math.inf


def most_missed(n: int, recall: float) -> int:
    """How many of n documents may be missed for the lower bound of the recall (Clopper and Pearson 1934) to be as
    asked; -1 where n is too small. The threshold may be chosen by them: the bound is that of the order statistic."""
    missed = np.arange(n)
    return int(np.sum(beta.ppf(1 - CONFIDENCE, n - missed, missed + 1) >= recall)) - 1


def fewest(recall: float) -> int:
    """Documents that it takes, none of them missed, to be sure of a recall."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(recall))


def speed_up(token_share: float, costs: Costs) -> float:
    """How many times as fast documents are scored of which this share of the tokens passes; what is ruled out is often
    shorter than the rest, and an encoder's time goes with the tokens."""
    alone = costs.tokenising + costs.encoder
    return alone / (costs.tokenising + costs.first + token_share * costs.encoder)


def check_gain(gain: float, token_share: float) -> None:
    """Refuse a cascade that saves too little."""
    if gain < LEAST_GAIN:
        raise UserError(
            f"score.cascade_keep_share: the first student would let {token_share:.0%} of the tokens pass, which makes"
            f" scoring {gain:.2f} times as fast, less than {LEAST_GAIN}; leave it out, ask for less"
            " score.cascade_recall, or calibrate on a larger score.cascade_sample"
        )


# -- what is left to choose from --------------------------------------------------------------------------------------


def check_filter(settings: Filter, keep_share: float) -> None:
    """Refuse a filter that asks for more than the best that a cascade looked for."""
    ways = [f"sampling: {settings.sampling}"] * (settings.sampling != "top") + ["per_group"] * bool(settings.per_group)
    if ways:
        raise UserError(
            f"filter.{ways[0]} chooses among all documents, but score.cascade_keep_share rules out those that are not"
            " among the best; leave out one of the two"
        )
    if settings.keep_share is not None and settings.keep_share > keep_share:
        raise UserError(
            f"filter.keep_share: {settings.keep_share:g} is more than score.cascade_keep_share, {keep_share:g}, among"
            " which documents were looked for; lower it, or score with the other raised"
        )


def check_lowest(lowest: float, share: float | None, about: dict[str, Any]) -> None:
    """Refuse to keep documents from a score up of which many were ruled out, unless that is known to be only a `share`
    as small as the one that a cascade looked for."""
    if lowest < about["cut"] and (share is None or share > about["keep_share"]):
        raise UserError(
            f"filter: documents from {lowest:.3f} up would be kept, but below {about['cut']:.3f} a cascade has ruled"
            f" many out (score.cascade_keep_share: {about['keep_share']:g}); keep fewer, or score with that raised"
        )


# -- the file ---------------------------------------------------------------------------------------------------------


def save(first: First, about: dict[str, Any], path: Path) -> None:
    """Keep a first student, and what is said about it."""
    tensors = {name: np.asarray(value, np.float64) for name, value in first._asdict().items()}
    content = needs("safetensors.numpy", "torch").save(tensors, {"about": json.dumps(about)})
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def load(path: Path) -> tuple[First, dict[str, Any]] | None:
    """A first student that was kept, and what is said about it; None if there is none."""
    safetensors = needs("safetensors", "torch")
    try:
        with safetensors.safe_open(path, "np") as file:
            about, names = json.loads(file.metadata()["about"]), file.keys()
            found = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError):
        return None
    numbers = {name: float(found[name]) for name in ("gamma", "bias", "threshold")}
    return First(**{**found, **numbers}), about
