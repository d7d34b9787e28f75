"""One target learned: its head, what the student says of every document, and where scores are cut."""

import logging
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import calibration, curve, heads, metrics, splits
from pipeline.config import Recipe
from pipeline.encoder import Embedded
from pipeline.forward import Embeddings
from pipeline.heads import Fit, known
from pipeline.metrics import Bools, Floats
from pipeline.splits import Split
from pipeline.student import Head
from pipeline.targets import Target

log = logging.getLogger("gristmill")


class Lesson(NamedTuple):
    """One target with its trained head; the last five are of scores only."""

    target: Target
    fit: Fit
    predicted: Any
    """Scores (n,), labels (n,) or n lists of labels."""
    held_out: Floats | None = None
    """(n,) Predictions by heads that have not learned from the document, NaN where there is none."""
    good_from: float | None = None
    cut: float | None = None
    """The teacher's and the student's score from which a document counts as good."""
    cuts: tuple[float, ...] = ()
    """Of the fitted rounding."""
    learning_curve: dict[str, Any] | None = None


class Material(NamedTuple):
    """What a head learns from, aligned with the documents."""

    embedded: Embedded
    embeddings: Embeddings
    """(n, dim) one of each document"""
    split: Split
    rounds: NDArray[np.int64]
    """(n,)"""
    recipe: Recipe

    def held_out_folds(self, target: Target) -> NDArray[np.int64]:
        """The fold of each document in cross-validation: (n,); scores of the test part have no say in it."""
        strata = zip(strata_of(target), self.split.parts == "test", strict=True)
        unseen = [None if is_test else stratum for stratum, is_test in strata]
        return splits.folds(self.split.units, unseen, heads.N_FOLDS, self.recipe.seed)


def learn(target: Target, given: Material, head: Head | None = None) -> Lesson:
    """Fit one head on the train part; of a score, choose the cuts on held-out predictions. A `head` that is given was
    trained together with the encoder."""
    if target.kind != "score":
        fit = fit_on(target, given, given.split.parts == "train")
        return Lesson(target, fit, predictions(fit.head, given))
    fit = Fit(head, 0.0) if head else fit_on(target, given, given.split.parts == "train")
    predicted = predictions(fit.head, given).astype(np.float64)
    held_out = held_out_predictions(target, given, fit, predicted, head is not None)
    choose = known(target) & choosing(given) & np.isfinite(held_out)
    truth = np.array([target.values[i] for i in np.flatnonzero(choose)], dtype=np.float64)
    assert target.scale is not None
    good = good_score(target, given.recipe)
    cuts = calibration.fitted_cuts(truth, held_out[choose], target.scale)
    return Lesson(
        target,
        fit._replace(head=rounded(fit.head, cuts, given.recipe)),
        predicted,
        held_out,
        good,
        metrics.best_cut(truth >= good, held_out[choose]) if (truth >= good).any() else good,
        cuts,
        None if head or not given.recipe.train.learning_curve else learning_curve(target, given, fit),
    )


def fit_on(target: Target, given: Material, chosen: Bools, strength: float | None = None) -> Fit:
    """A head that learns from the chosen documents."""
    how = given.recipe.train.head
    name: heads.Name = "linear" if how == "full" else how
    folds = given.held_out_folds(target)
    return heads.fit_head(target, given.embeddings, chosen, folds, name, given.recipe.seed, strength)


def predictions(head: Head, given: Material) -> Any:
    """What a head says of every document."""
    return head.predict(given.embedded, given.recipe.encoder.aggregate)[head.name]


def held_out_predictions(target: Target, given: Material, fit: Fit, predicted: Floats, tuned: bool) -> Floats:
    """Predictions (n,) by heads of the same strength that have not learned from the document; NaN where an encoder
    that was `tuned` has."""
    learned = known(target) & (given.split.parts == "train")
    found = np.where(learned, np.nan, predicted)
    if not tuned:
        folds = given.held_out_folds(target)
        for fold in range(heads.N_FOLDS):
            here = learned & (folds == fold)
            other = fit_on(target, given, learned & (folds != fold), fit.strength)
            found[here] = predictions(other.head, given)[here]
    return found


def choosing(given: Material) -> Bools:
    """The documents (n,) on which cuts are chosen: those of the sample that are not reported on."""
    return np.asarray(np.isin(given.split.parts, ("train", "validation")) & (given.rounds == 0))


def rounded(head: Head, cuts: tuple[float, ...], recipe: Recipe) -> Head:
    """The head with the cuts that are written, none where whole scores are rounded half up."""
    return Head(head.name, head.kind, head.layers, head.scale, head.labels, cuts if is_fitted(recipe) else ())


def is_fitted(recipe: Recipe) -> bool:
    """Whether whole scores are as frequent as the teacher's."""
    return recipe.train.rounding == "fitted"


def good_score(target: Target, recipe: Recipe) -> float:
    """train.good_from is about the score; attributes are good from the middle of their scales."""
    assert target.scale is not None
    return good_from(recipe, target.scale) if target.name == "score" else sum(target.scale) / 2


def good_from(recipe: Recipe, scale: tuple[float, float]) -> float:
    """The teacher's score from which a document counts as good: as set, or the middle of the scale."""
    return sum(scale) / 2 if recipe.train.good_from is None else recipe.train.good_from


def strata_of(target: Target) -> list[Hashable]:
    """What is spread evenly over parts and folds: tenths of the scale, or labels."""
    if target.kind != "score":
        return [str(value) for value in target.values]
    assert target.scale is not None
    low, high = target.scale
    return [None if value is None else round(10 * (value - low) / (high - low)) for value in target.values]


def learning_curve(target: Target, given: Material, fit: Fit) -> dict[str, Any]:
    """The learning curve over train and validation part, with this head (linear in place of the mlp) and its
    strength, which a Bayesian reading of the penalty does not change with the number of documents."""
    how: heads.Name = "ordinal" if given.recipe.train.head == "ordinal" else "linear"
    there = np.flatnonzero(known(target) & np.isin(given.split.parts, ("train", "validation")))
    everywhere = np.zeros(len(given.rounds), dtype=bool)
    folds = given.held_out_folds(target)

    def fitted(chosen: Bools, strength: float | None) -> Fit:
        return heads.fit_head(target, given.embeddings, chosen, folds, how, given.recipe.seed, strength)

    own = fit if given.recipe.train.head == how else fitted(given.split.parts == "train", None)

    def of(taken: Bools) -> Floats:
        chosen = everywhere.copy()
        chosen[there[taken]] = True
        made = fitted(chosen, own.strength)
        return np.asarray(predictions(made.head, given)[there], dtype=np.float64)

    assert target.scale is not None
    found = curve.of_score(
        learn=of,
        truth=np.array([target.values[i] for i in there], dtype=np.float64),
        scale=target.scale,
        judged=given.rounds[there] == 0,
        units=given.split.units[there],
        strata=[strata_of(target)[i] for i in there],
        rounding=given.recipe.train.rounding,
        n_train=int(np.sum(known(target) & (given.split.parts == "train"))),
        n_rated=int(np.sum(known(target))),
        seed=given.recipe.seed,
    )
    return {"head": how, **found}
