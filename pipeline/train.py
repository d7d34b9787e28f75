"""Stage 2: linear heads on a frozen encoder learn what the teacher said."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import metrics, targets
from pipeline.config import Recipe
from pipeline.corpus import text_id
from pipeline.encoder import Embeddings, Encoder
from pipeline.errors import UserError
from pipeline.figures import Figures, LabelFigures, ScoreFigures, of_label, of_labels, of_score
from pipeline.heads import N_FOLDS, Fit, fit_head, known
from pipeline.metrics import Bools
from pipeline.storage import write_table
from pipeline.student import Student, schema_of
from pipeline.targets import Kind, Sources, Target, TrainingSet
from pipeline.tracking import Result, Stage, progress, stage

log = logging.getLogger("gristmill")

FEWEST = 10
"""Documents with a target below which no head is trained."""

FEWEST_TO_JUDGE = 2
"""Documents with a target that validation and test part must have each."""

ENOUGH = 200
"""Documents with a target below which the figures say little, and the log says so."""

WEAK = 0.3
"""Spearman below which the log says that little was learned."""

PARTS = ("train", "validation", "test")

Split = NDArray[np.str_]


class TrainResult(Result):
    """What stage 2 found."""

    n_train: int
    n_validation: int
    n_test: int
    n_unscored: int
    """Documents of which no target is known."""
    n_truncated: int
    encoder: str
    targets: dict[str, Figures]


class Lesson(NamedTuple):
    """One target with its trained head, and what the student says of every document."""

    target: Target
    fit: Fit
    predicted: Any
    """Scores (n,), labels (n,) or n lists of labels."""
    good_from: float | None
    cut: float | None
    """Of scores only: the teacher's and the student's score from which a document counts as good."""


def run(recipe: Recipe, redo: bool = False) -> TrainResult:
    """Train on the train part, choose on the validation part, report on the test part."""
    found = targets.sources(recipe)
    with stage("train", recipe, inputs(recipe, found)) as work:
        done = work.finished(TrainResult, redo, (work.folder / "student" / "head.safetensors").exists())
        if done:
            return done
        given = targets.read(found)
        parts = split(given.texts, recipe)
        check_columns(given.targets)
        for target in given.targets:
            check(target, parts, recipe)
        encoder = Encoder(recipe.encoder)
        with progress("train", len(given.texts)) as step:
            embeddings, n_truncated = encoder.embed(given.texts, step)
        lessons = [learn(target, embeddings, parts, recipe) for target in given.targets]
        made = student(recipe, encoder, lessons)
        result = report(work, given, parts, lessons, n_truncated)
        write_predictions(work, given, parts, lessons)
        made.about.update(origin(given, result))
        made.save(work.folder / "student")
        warn_if_weak(result)
        return work.finish(result)


def inputs(recipe: Recipe, found: Sources) -> dict[str, object]:
    """Everything that decides the student."""
    return {
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in found.values()},
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


def check_columns(learned: Sequence[Target]) -> None:
    """Refuse targets whose columns would overwrite each other or the document's."""
    names = ["id", "split", *(name for target in learned for name in schema_of(target.name, target.kind).names)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"train.targets: two columns would be called {twice!r}; learn them apart, or rename one")


def check(target: Target, parts: Split, recipe: Recipe) -> None:
    """Refuse a target of which nothing can be learned."""
    if target.name == "score" and target.scale:
        check_good_from(good_from(recipe, target.scale), target.scale)
    there = known(target)
    n, of_part = int(there.sum()), {name: int(np.sum(there & (parts == name))) for name in PARTS}
    more = "rate" if target.kind == "score" else "label"
    if n < FEWEST:
        raise UserError(
            f"train: only {n} documents have a {target.name}; {more} at least {FEWEST}, better a thousand (--sample)"
        )
    if of_part["train"] < N_FOLDS:
        raise UserError(
            f"train: only {of_part['train']} of {n} documents with a {target.name} are left to learn from; lower"
            f" train.validation_share and train.test_share, or {more} more distinct texts"
        )
    if min(of_part.values()) < FEWEST_TO_JUDGE:
        raise UserError(
            f"train: of {n} documents with a {target.name} only {of_part['validation']} are in the validation part and"
            f" {of_part['test']} in the test part; {more} more"
        )
    taught = pick(target.values, there & (parts == "train"))
    if all(value == taught[0] for value in taught):
        raise UserError(
            f"train: all {len(taught)} documents to learn from have the {target.name} {taught[0]}; mend the prompt or"
            " choose another teacher"
        )
    if n < ENOUGH:
        log.warning("train: %d documents with a %s are few; expect figures to be far off", n, target.name)


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


def learn(target: Target, embeddings: Embeddings, parts: Split, recipe: Recipe) -> Lesson:
    """Fit one head on the train part; of a score, choose the cut by F1 on the validation part."""
    fit = fit_head(target, embeddings, parts == "train", recipe.seed)
    predicted = fit.head.predict(embeddings)[target.name]
    if target.kind != "score":
        return Lesson(target, fit, predicted, None, None)
    good = good_score(target, recipe)
    return Lesson(target, fit, predicted.astype(np.float64), good, best_cut(target, predicted, parts, good))


def good_score(target: Target, recipe: Recipe) -> float:
    """train.good_from is about the score; attributes are good from the middle of their scales."""
    assert target.scale is not None
    return good_from(recipe, target.scale) if target.name == "score" else sum(target.scale) / 2


def best_cut(target: Target, predicted: NDArray[np.floating], parts: Split, good_from: float) -> float:
    """The student's score that finds the validation part's good documents best; good_from if it has none."""
    choose = known(target) & (parts == "validation")
    truth = pick(target.values, choose)
    good = np.array(truth, dtype=np.float64) >= good_from
    return metrics.best_cut(good, predicted[choose].astype(np.float64)) if good.any() else good_from


def pick(values: Sequence[Any], chosen: Bools) -> list[Any]:
    """The chosen values, in order."""
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]


def student(recipe: Recipe, encoder: Encoder, lessons: list[Lesson]) -> Student:
    """The encoder that was used, and the heads."""
    settings = recipe.encoder.model_copy(update={"revision": encoder.revision})
    return Student(settings, tuple(lesson.fit.head for lesson in lessons))


def origin(given: TrainingSet, result: TrainResult) -> dict[str, Any]:
    """Where a student comes from."""
    return {
        "prompts": list(given.prompts),
        "teachers": list(given.teachers),
        "rounding": "int_score is floor(score + 0.5), clipped to the scale",
        "metrics": result.model_dump(mode="json", exclude={"seconds"}),
    }


def write_predictions(work: Stage, given: TrainingSet, parts: Split, lessons: list[Lesson]) -> None:
    """What the student says of each document, beside the teacher."""
    columns = {"id": pa.array(given.ids, pa.string()), "split": pa.array(parts.tolist())}
    for lesson in lessons:
        name, kind = lesson.target.name, TYPES[lesson.target.kind]
        columns[name] = pa.array(lesson.target.values, kind)
        columns[f"predicted_{name}"] = pa.array(lesson.predicted, kind)
    write_table(work.folder / "predictions.parquet", pa.table(columns))


TYPES: dict[Kind, pa.DataType] = {"score": pa.float64(), "label": pa.string(), "labels": pa.list_(pa.string())}


# -- figures ----------------------------------------------------------------------------------------------------------


def report(work: Stage, given: TrainingSet, parts: Split, lessons: list[Lesson], n_truncated: int) -> TrainResult:
    """The figures of every target on the test part."""
    return TrainResult(
        seconds=work.seconds,
        n_train=int(np.sum(parts == "train")),
        n_validation=int(np.sum(parts == "validation")),
        n_test=int(np.sum(parts == "test")),
        n_unscored=given.n_unscored,
        n_truncated=n_truncated,
        encoder=work.recipe.encoder.model,
        targets={lesson.target.name: figures_of(lesson, parts, given.gold) for lesson in lessons},
    )


def figures_of(lesson: Lesson, parts: Split, gold: list[float | None]) -> Figures:
    """One target's figures; only the score itself is held against the known quality."""
    target, there = lesson.target, known(lesson.target)
    test = there & (parts == "test")
    learned, truth = (pick(target.values, chosen) for chosen in (there & (parts == "train"), test))
    guess = pick(list(lesson.predicted), test)
    n_missing, strength = int(np.sum(~there)), lesson.fit.strength
    if target.kind == "label":
        return of_label(learned, truth, list(map(str, guess)), target.labels, n_missing, strength)
    if target.kind == "labels":
        return of_labels(sets(learned), sets(truth), sets(guess), target.labels, n_missing, strength)
    assert target.scale is not None and lesson.good_from is not None and lesson.cut is not None
    scores = np.array(guess, dtype=np.float64)
    quality = (
        metrics.against_gold(scores, pick(gold, test), metrics.is_binary(gold)) if target.name == "score" else None
    )
    return of_score(
        truth=np.array(truth, dtype=np.float64),
        guess=scores,
        scale=target.scale,
        good_from=lesson.good_from,
        cut=lesson.cut,
        gold=quality,
        n_missing=n_missing,
        strength=strength,
    )


def sets(values: list[list[str]]) -> list[frozenset[str]]:
    """Lists of labels without their order."""
    return [frozenset(labels) for labels in values]


def warn_if_weak(result: TrainResult) -> None:
    """Say so when a head hardly follows the teacher, or guesses no better than without reading."""
    for name, found in result.targets.items():
        if is_weak(found):
            log.warning(
                "train: the student hardly follows its teacher in %s; rate more documents or try another encoder", name
            )


def is_weak(found: Figures) -> bool:
    """Whether a target was hardly learned."""
    if isinstance(found, ScoreFigures):
        return found.spearman is None or found.spearman < WEAK
    if isinstance(found, LabelFigures):
        return found.accuracy <= found.majority_share
    return found.exact_match <= found.majority_share and found.micro_f1 < WEAK
