"""Stage 2: a student on a frozen encoder learns what the teacher said."""

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import calibration, card, config, embeddings, fine_tune, lesson, metrics, splits, targets
from pipeline.config import Recipe
from pipeline.encoder import Encoder
from pipeline.errors import UserError
from pipeline.figures import Figures, Judged, ScoreFigures, ceiling_of, of_score
from pipeline.heads import N_FOLDS, known
from pipeline.label_figures import LabelFigures, of_label, of_labels
from pipeline.lesson import Lesson, Material, good_from
from pipeline.splits import PARTS, Split, pick
from pipeline.storage import content, write_table
from pipeline.student import Head, Student, schema_of
from pipeline.targets import Kind, Sources, Target, TrainingSet
from pipeline.tracking import Result, Stage, progress, stage

log = logging.getLogger("gristmill")

FEWEST = 20
"""Documents with a target below which no head is trained."""

FEWEST_TO_JUDGE = 2
"""Documents with a target that validation and test part must have each."""

FEWEST_UNITS = 2
"""Units of them in the train part, so that what one teaches can be tried on another."""

ENOUGH = 200
"""Documents with a target below which the figures say little, and the log says so."""

WEAK = 0.3
"""Spearman below which the log says that little was learned."""


class TrainResult(Result):
    """What stage 2 found."""

    n_train: int
    n_validation: int
    n_test: int
    n_aside: int
    """Documents chosen by rate --next that hang together with one of the validation or test part; not learned from."""
    n_unscored: int
    """Documents of which no target is known."""
    n_near_duplicates: int
    """Documents that say, nearly or exactly, what another one says already; all in the same part as that one."""
    n_truncated: int
    """Documents of which not all tokens are in a window."""
    encoder: str
    head: str
    targets: dict[str, Figures]


def run(recipe: Recipe, redo: bool = False) -> TrainResult:
    """Train on the train part, choose on held-out documents, report on the test part."""
    found = targets.sources(recipe)
    with stage("train", recipe, inputs(recipe, found)) as work:
        done = work.finished(TrainResult, redo, (work.folder / "student" / "student.json").exists())
        if done:
            return done
        given = targets.read(found)
        check_columns(given.targets)
        split = split_of(given, recipe)
        for target in given.targets:
            check(target, split, recipe)
        encoder = Encoder(settings_of(recipe))
        material = embed(encoder, given, split, recipe)
        tuned: dict[str, Head] = {}
        if recipe.train.head == "full":
            tuned = fine_tune_all(encoder, material, given, work)
            material = embed(encoder, given, split, recipe)
        lessons = [lesson.learn(target, material, tuned.get(target.name)) for target in given.targets]
        result = report(work, given, material, lessons)
        write_predictions(work, given, split, lessons)
        save(work, given, encoder, lessons, result)
        warn_if_weak(result)
        return work.finish(result)


def inputs(recipe: Recipe, found: Sources) -> dict[str, object]:
    """Everything that decides the student."""
    return {
        "files": {path.name: content(path) for path in found.values()},
        "encoder": recipe.encoder.identity(),
        "train": recipe.train.identity(),
        "seed": recipe.seed,
    }


def check_good_from(value: float, scale: tuple[float, float]) -> None:
    """Refuse a cut that no document, or every document, reaches."""
    if not scale[0] < value <= scale[1]:
        raise UserError(f"train.good_from: {value:g} must be above {scale[0]:g} and at most {scale[1]:g}")


def check_columns(learned: Sequence[Target]) -> None:
    """Refuse targets whose columns would overwrite each other or the document's."""
    names = ["id", "split", "round"]
    names += [name for target in learned for name in schema_of(target.name, target.kind).names]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"train.targets: two columns would be called {twice!r}; learn them apart, or rename one")


def split_of(given: TrainingSet, recipe: Recipe) -> Split:
    """The parts, stratified by the first target."""
    strata = lesson.strata_of(given.targets[0])
    return splits.split(given.texts, strata, given.groups, given.rounds, recipe.train, recipe.seed)


def check(target: Target, split: Split, recipe: Recipe) -> None:
    """Refuse a target of which nothing can be learned."""
    if target.name == "score" and target.scale:
        check_good_from(good_from(recipe, target.scale), target.scale)
    there = known(target)
    n, of_part = int(there.sum()), {name: int(np.sum(there & (split.parts == name))) for name in PARTS}
    n_units, n_taught = (len(np.unique(split.units[rows])) for rows in (there, there & (split.parts == "train")))
    apart = (
        f"; copies, near-duplicates and groups stay together, which leaves {n_units} to deal" if n_units < n else ""
    )
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
    if min(of_part["validation"], of_part["test"]) < FEWEST_TO_JUDGE:
        raise UserError(
            f"train: of {n} documents with a {target.name} only {of_part['validation']} are in the validation part and"
            f" {of_part['test']} in the test part{apart}; {more} more{' distinct texts or groups' if apart else ''}"
        )
    if n_taught < FEWEST_UNITS:
        raise UserError(
            f"train: all {of_part['train']} documents to learn from hang together as copies, near-duplicates or one"
            f" group, which cross-validation cannot part; {more} more distinct texts or groups"
        )
    taught = pick(target.values, there & (split.parts == "train"))
    if all(value == taught[0] for value in taught):
        raise UserError(
            f"train: all {len(taught)} documents to learn from have the {target.name} {taught[0]}; mend the prompt or"
            " choose another teacher"
        )
    if n < ENOUGH:
        log.warning("train: %d documents with a %s are few; expect figures to be far off", n, target.name)


def embed(encoder: Encoder, given: TrainingSet, split: Split, recipe: Recipe) -> Material:
    """Every document embedded once; what was embedded before is read back."""
    with progress("train", len(given.texts)) as step:
        path = embeddings.cache_path(recipe)
        found = embeddings.embed(encoder, given.texts, path, step)
    of_documents = found.documents(recipe.encoder.aggregate == "weighted")
    return Material(found, of_documents, split, np.array(given.rounds), recipe)


def settings_of(recipe: Recipe) -> config.Encoder:
    """The encoder's settings; weights that are to be trained are kept in float32."""
    full = recipe.train.head == "full"
    return recipe.encoder.model_copy(update={"dtype": "float32"} if full else {})


def fine_tune_all(encoder: Encoder, material: Material, given: TrainingSet, work: Stage) -> dict[str, Head]:
    """The heads of all scores, trained together with the encoder, whose weights change."""
    scores = [target for target in given.targets if target.kind == "score"]
    if not scores:
        raise UserError("train.head: full learns scores, and train.targets names none; leave the head out")
    taught = material.split.parts == "train"
    begin = [lesson.fit_on(target, material, taught).head for target in scores]
    recipe = work.recipe
    with TemporaryDirectory() as folder:
        made = fine_tune.tune(
            encoder, begin, given, material.split.parts, Path(folder), recipe.seed, recipe.train.args
        )
    return {head.name: head for head in made}


# -- what is written --------------------------------------------------------------------------------------------------


def save(work: Stage, given: TrainingSet, encoder: Encoder, lessons: list[Lesson], result: TrainResult) -> None:
    """The student's folder with its model card."""
    recipe = work.recipe
    settings = recipe.encoder.model_copy(update={"revision": encoder.revision, "max_tokens": encoder.max_tokens})
    tuned = encoder if recipe.train.head == "full" else None
    made = Student(settings, tuple(each.fit.head for each in lessons), origin(given, result, recipe), tuned)
    made.save(work.folder / "student")
    known_of_it = {**origin(given, result, recipe), **card.of_run(recipe)}
    card.write(work.folder / "student", made, result.model_dump(mode="json"), known_of_it)


def origin(given: TrainingSet, result: TrainResult, recipe: Recipe) -> dict[str, Any]:
    """Where a student comes from."""
    return {
        "prompts": list(given.prompts),
        "teachers": list(given.teachers),
        "rounding": calibration.ROUNDING[recipe.train.rounding],
        "metrics": result.model_dump(mode="json", exclude={"seconds"}),
    }


def write_predictions(work: Stage, given: TrainingSet, split: Split, lessons: list[Lesson]) -> None:
    """What the student says of each document, beside the teacher."""
    columns = {
        "id": pa.array(given.ids, pa.string()),
        "split": pa.array(split.parts.tolist()),
        "round": pa.array(given.rounds, pa.int32()),
    }
    for each in lessons:
        name, kind = each.target.name, TYPES[each.target.kind]
        columns[name] = pa.array(each.target.values, kind)
        columns[f"predicted_{name}"] = pa.array(each.predicted, kind)
        if each.held_out is not None:
            columns[f"held_out_{name}"] = pa.array(each.held_out, kind, mask=np.isnan(each.held_out))
    write_table(work.folder / "predictions.parquet", pa.table(columns))


TYPES: dict[Kind, pa.DataType] = {"score": pa.float64(), "label": pa.string(), "labels": pa.list_(pa.string())}


# -- figures ----------------------------------------------------------------------------------------------------------


def report(work: Stage, given: TrainingSet, material: Material, lessons: list[Lesson]) -> TrainResult:
    """The figures of every target on the test part."""
    parts = material.split.parts
    assert np.isin(parts, (*PARTS, splits.ASIDE)).all(), "every document has a part"
    return TrainResult(
        seconds=work.seconds,
        n_train=int(np.sum(parts == "train")),
        n_validation=int(np.sum(parts == "validation")),
        n_test=int(np.sum(parts == "test")),
        n_aside=int(np.sum(parts == splits.ASIDE)),
        n_unscored=given.n_unscored,
        n_near_duplicates=material.split.n_near_duplicates,
        n_truncated=material.embedded.n_truncated,
        encoder=work.recipe.encoder.model,
        head=work.recipe.train.head,
        targets={each.target.name: figures_of(each, material, given.gold) for each in lessons},
    )


def figures_of(learned: Lesson, material: Material, gold: list[float | None]) -> Figures:
    """One target's figures."""
    target, parts, there = learned.target, material.split.parts, known(learned.target)
    test, n_missing, strength = there & (parts == "test"), int(np.sum(~there)), learned.fit.strength
    if target.kind == "score":
        return figures_of_score(learned, material, pick(gold, test), metrics.is_binary(gold))
    taught, truth = (pick(target.values, chosen) for chosen in (there & (parts == "train"), test))
    guess = pick(list(learned.predicted), test)
    if target.kind == "label":
        return of_label(taught, truth, list(map(str, guess)), target.labels, n_missing, strength)
    return of_labels(sets(taught), sets(truth), sets(guess), target.labels, n_missing, strength)


def figures_of_score(learned: Lesson, material: Material, gold: list[float | None], binary: bool) -> ScoreFigures:
    """A score's figures on the test part; only the score itself is held against the known quality there."""
    target, there = learned.target, known(learned.target)
    test = there & (material.split.parts == "test")
    assert target.scale is not None and learned.good_from is not None and learned.cut is not None
    judged = Judged(
        truth=np.array(pick(target.values, test), dtype=np.float64),
        guess=learned.predicted[test],
        scale=target.scale,
        good_from=learned.good_from,
        cut=learned.cut,
        cuts=learned.cuts,
        rounding=material.recipe.train.rounding,
    )
    return of_score(
        judged,
        n_missing=int(np.sum(~there)),
        head=material.recipe.train.head,
        strength=learned.fit.strength,
        ceiling=ceiling_of(target.repeated, target.scale),
        learning_curve=learned.learning_curve,
        gold=metrics.against_gold(judged.guess, gold, binary) if target.name == "score" else None,
    )


def sets(values: list[list[str]]) -> list[frozenset[str]]:
    """Lists of labels without their order."""
    return [frozenset(labels) for labels in values]


def warn_if_weak(result: TrainResult) -> None:
    """Say so when a head hardly follows the teacher, or guesses no better than without reading."""
    for name, found in result.targets.items():
        if isinstance(found, ScoreFigures) and sum(n > 0 for n in found.int_score_counts["half_up"].values()) == 1:
            log.warning(
                "train: the student's %s hardly varies: half up it is one whole score throughout; where the teacher's"
                " hardly does, mend its prompt",
                name,
            )
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
