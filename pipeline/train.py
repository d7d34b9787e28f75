"""Stage 2: a linear head on a frozen encoder learns the teacher's ratings."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import metrics
from pipeline.config import Recipe
from pipeline.corpus import text_id
from pipeline.encoder import Embeddings, Encoder
from pipeline.errors import UserError
from pipeline.metrics import Floats
from pipeline.ratings import Ratings, read
from pipeline.storage import write_table
from pipeline.student import Student
from pipeline.tracking import Result, Stage, progress, stage, upstream

log = logging.getLogger("gristmill")

STRENGTHS = np.logspace(-3, 3, 25)
"""Ridge strengths tried, for embeddings of about unit length."""

N_FOLDS = 5

FEWEST = 10
"""Ratings below which no head is trained."""

ENOUGH = 200
"""Ratings below which the figures say little, and the log says so."""

WEAK = 0.3
"""Spearman below which the log says that little was learned."""

Split = NDArray[np.str_]


class Fit(NamedTuple):
    """A trained head. `strength` is the ridge penalty, `cut` the student's score from which documents count as
    good."""

    weight: NDArray[np.float32]
    bias: float
    strength: float
    cut: float


class TrainResult(Result):
    """What stage 2 found; every figure but `cut` is on the test part, which nothing was chosen on."""

    n_train: int
    n_validation: int
    n_test: int
    n_unscored: int
    n_truncated: int
    encoder: str
    strength: float
    good_from: float
    """Teacher score from which a document counts as good."""
    good_share: float
    """Share of the test part that is: the precision of keeping everything."""
    cut: float
    """Student score that finds them best, chosen on the validation part."""
    spearman: float | None
    mae: float
    macro_f1: float
    auc: float | None
    """Student's score against good or not by the teacher."""
    kept: dict[str, float]
    """Precision, recall and F1 of what the student keeps at `cut`, against the teacher."""
    kept_at_good_from: dict[str, float]
    """The same with the student cut at good_from itself."""
    gold: dict[str, float | int | None] | None
    """The student against the known quality."""


def run(recipe: Recipe, redo: bool = False) -> TrainResult:
    """Train on the train part, choose on the validation part, report on the test part."""
    path = ratings_path(recipe)
    with stage("train", recipe, inputs(recipe, path)) as work:
        done = work.finished(TrainResult, redo, (work.folder / "student" / "head.safetensors").exists())
        if done:
            return done
        ratings = read(path)
        good = good_from(recipe, ratings.scale)
        check_good_from(good, ratings.scale)
        parts = split(ratings.texts, recipe)
        check(ratings, parts)
        encoder = Encoder(recipe.encoder)
        with progress("train", len(ratings.texts)) as step:
            embeddings, n_truncated = encoder.embed(ratings.texts, step)
        fit = fit_head(embeddings, ratings.scores, parts, good, recipe.seed)
        predicted = (embeddings @ fit.weight + np.float32(fit.bias)).astype(np.float64)
        result = report(work, ratings, parts, predicted, fit, good, n_truncated)
        write_predictions(work, ratings, parts, predicted)
        student(recipe, encoder, ratings, fit, result).save(work.folder / "student")
        if result.spearman is None or result.spearman < WEAK:
            log.warning("train: the student hardly follows its teacher; rate more documents or try another encoder")
        return work.finish(result)


def ratings_path(recipe: Recipe) -> Path:
    """The ratings to learn from."""
    return upstream(recipe.train.ratings, recipe, "rate/ratings.parquet", "train")


def inputs(recipe: Recipe, path: Path) -> dict[str, object]:
    """Everything that decides the student."""
    return {
        "ratings": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "encoder": recipe.encoder.identity(),
        "train": recipe.train.identity(),
        "seed": recipe.seed,
    }


def good_from(recipe: Recipe, scale: tuple[float, float]) -> float:
    """The teacher's score from which a document counts as good: as set, or the middle of the scale."""
    return sum(scale) / 2 if recipe.train.good_from is None else recipe.train.good_from


def check_good_from(value: float, scale: tuple[float, float]) -> None:
    """Refuse a cut that no document, or every document, reaches."""
    if not scale[0] < value <= scale[1]:
        raise UserError(f"train.good_from: {value:g} must be above {scale[0]:g} and at most {scale[1]:g}")


def check(ratings: Ratings, parts: Split) -> None:
    """Refuse ratings nothing can be learned from."""
    n, n_train = len(ratings.scores), int(np.sum(parts == "train"))
    if n < FEWEST:
        raise UserError(
            f"train: only {n} documents have a score; rate at least {FEWEST}, better a thousand (--sample)"
        )
    if n_train < N_FOLDS:
        raise UserError(
            f"train: only {n_train} of {n} documents are left to learn from; lower train.validation_share and"
            " train.test_share, or rate more distinct texts"
        )
    if np.ptp(ratings.scores) == 0:
        raise UserError(f"train: all {n} scores are {ratings.scores[0]:g}; mend the prompt or choose another teacher")
    if n < ENOUGH:
        log.warning("train: %d ratings are few; expect figures to be far off", n)


def split(texts: list[str], recipe: Recipe) -> Split:
    """train, validation or test for each text: a seeded permutation of the distinct texts, so copies never cross."""
    ids = np.array([text_id(text) for text in texts])
    distinct = np.unique(ids)
    order = np.random.default_rng(recipe.seed).permutation(len(distinct))
    n_test = max(2, round(recipe.train.test_share * len(distinct)))
    n_validation = max(2, round(recipe.train.validation_share * len(distinct)))
    names = np.full(len(distinct), "train", dtype="U10")
    names[order[:n_test]] = "test"
    names[order[n_test : n_test + n_validation]] = "validation"
    return names[np.searchsorted(distinct, ids)]


def fit_head(embeddings: Embeddings, scores: Floats, parts: Split, good_from: float, seed: int) -> Fit:
    """Ridge on the train part, its strength by 5-fold cross-validation there; the cut by F1 on validation."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    learn, choose = parts == "train", parts == "validation"
    folds = KFold(N_FOLDS, shuffle=True, random_state=seed)
    ridge = RidgeCV(STRENGTHS, cv=folds, scoring="neg_mean_squared_error")
    ridge.fit(embeddings[learn].astype(np.float64), scores[learn])
    weight, bias = ridge.coef_.astype(np.float32), float(ridge.intercept_)
    predicted = (embeddings[choose] @ weight + np.float32(bias)).astype(np.float64)
    truth = scores[choose] >= good_from
    cut = metrics.best_cut(truth, predicted) if truth.any() else good_from
    return Fit(weight, bias, float(ridge.alpha_), cut)


def report(
    work: Stage, ratings: Ratings, parts: Split, predicted: Floats, fit: Fit, good_from: float, n_truncated: int
) -> TrainResult:
    """The figures on the test part."""
    test = parts == "test"
    truth, guess = ratings.scores[test], predicted[test]
    good = truth >= good_from
    gold = [value for value, held_out in zip(ratings.gold, test, strict=True) if held_out]
    return TrainResult(
        seconds=work.seconds,
        n_train=int(np.sum(parts == "train")),
        n_validation=int(np.sum(parts == "validation")),
        n_test=int(test.sum()),
        n_unscored=ratings.n_unscored,
        n_truncated=n_truncated,
        encoder=work.recipe.encoder.model,
        strength=fit.strength,
        good_from=good_from,
        good_share=float(good.mean()),
        cut=fit.cut,
        spearman=metrics.spearman(truth, guess),
        mae=float(np.mean(np.abs(truth - guess))),
        macro_f1=metrics.macro_f1(metrics.int_scores(truth, ratings.scale), metrics.int_scores(guess, ratings.scale)),
        auc=metrics.auc(good, guess),
        kept=metrics.kept_class(good, guess >= fit.cut),
        kept_at_good_from=metrics.kept_class(good, guess >= good_from),
        gold=metrics.against_gold(guess, gold, metrics.is_binary(ratings.gold)),
    )


def write_predictions(work: Stage, ratings: Ratings, parts: Split, predicted: Floats) -> None:
    """What the student says of each rated document, beside the teacher."""
    table = pa.table({"id": ratings.ids, "split": parts.tolist(), "score": ratings.scores, "predicted": predicted})
    write_table(work.folder / "predictions.parquet", table)


def student(recipe: Recipe, encoder: Encoder, ratings: Ratings, fit: Fit, result: TrainResult) -> Student:
    """The student with its origin."""
    about = {
        "prompt": ratings.prompt,
        "teacher": ratings.teacher,
        "rounding": "int_score is floor(score + 0.5), clipped to the scale",
        "metrics": result.model_dump(mode="json", exclude={"seconds", "n_failed"}),
    }
    settings = recipe.encoder.model_copy(update={"revision": encoder.revision})
    return Student(settings, fit.weight, fit.bias, ratings.scale, about)
