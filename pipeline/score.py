"""Stage 3: the student scores every document."""

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import (
    cascade_sample,
    corpus,
    locks,
    places,
    scored,
    scored_shard,
    scoring,
    seen,
    shards,
    spread,
    storage,
)
from pipeline import student as students
from pipeline.cascade_sample import Cascade
from pipeline.config import Recipe, digest
from pipeline.errors import UserError
from pipeline.formats import check_column
from pipeline.pictures import short
from pipeline.places import Place
from pipeline.scored_shard import FINGERPRINT, notes_of
from pipeline.scoring import Named, Scoring
from pipeline.seen import Seen
from pipeline.shards import Counts, Shard, find_shards
from pipeline.stream import ID, Begin, Job, refuse_existing, results
from pipeline.tracking import Result, Step, progress, stage
from pipeline.workers import Effort

log = logging.getLogger("gristmill")

ACTIVITIES = ("reading", "tokenising", "ruling out", "computing", "writing")


class ScoreResult(Result):
    """What stage 3 did. Every row of the corpus is scored, empty (null score), ruled out by a cascade (null score), or
    a bad row that was left out."""

    n_rows: int
    n_scored: int
    n_empty: int
    n_ruled_out: int
    n_bad_rows: int
    n_repaired_texts: int
    n_truncated: int
    """Documents of which not all tokens were read: those longer than encoder.max_tokens with windows: first, than
    three windows with spread, none with all."""
    n_windows: int
    """Windows of documents that the encoder read."""
    n_shards: int
    n_shards_reused: int
    int_score_counts: dict[str, int]
    half_up_counts: dict[str, int]
    """Documents by score rounded half up, beside int_score_counts at the student's own cuts."""
    label_counts: dict[str, dict[str, int]]
    """Documents by label, for each target that is labels; commonest first."""
    n_duplicates: int
    """Documents, of those scored this time, whose text had been there before and was not computed again."""
    docs_per_s: float | None
    """Documents a second, of those scored this time, without loading the model."""
    tokens_per_s: float | None
    n_tokens: int
    """Tokens that the encoder read this time."""
    padding_share: float | None
    """Padding among the tokens that were computed."""
    time_shares: dict[str, float]
    """Of the seconds that all threads were at work: reading, tokenising, computing, writing; ruling out."""
    n_memory_halvings: int
    """Times that the tokens computed at once were halved to fit into memory."""
    cascade: dict[str, Any] | None
    """With score.cascade_keep_share, what the first student was found to do on the sample: keep_share, cut (the score
    from which on documents are among those best), recall (at least, with 95% confidence), n_learned, n_calibrated, and
    of the latter n_above the cut, n_missed of these, passing_share and passing_token_share; and speed_up, expected
    from what these cost."""


def run(recipe: Recipe, redo: bool = False) -> ScoreResult:
    """Score all shards; one that is there with the right fingerprint is not done again."""
    named = scoring.load(recipe)
    cascade_sample.check(recipe, named)
    found = find_shards(recipe.corpus)
    made_from = inputs(recipe, named, found)
    own = spread.part(found, recipe.shard)
    with stage("score", recipe, made_from) as work:
        cascade = cascade_sample.kept(work.folder, made_from)
        prints = fingerprints(own, made_from, cascade)
        tallies = scored_shard.tallies_of(prints, recipe)
        done = work.finished(ScoreResult, redo, None not in tallies.values())
        if done:
            return done
        check_columns(own, recipe, scoring.added(recipe, named).names)
        if not recipe.shard:
            sweep(work.folder, found, recipe)
        todo = [shard for shard, tally in tallies.items() if tally is None]
        n_reused = len(own) - len(todo)
        if n_reused:
            log.info("score: %d of %d shards are there already", n_reused, len(own))
        effort = Effort()
        if todo:
            tallies |= score_shards(todo, recipe, made_from, work.folder, effort)
            if recipe.engine == "ray" and not recipe.shard:
                sweep(work.folder, found, recipe)  # actors that died left files
            cascade = cascade_sample.kept(work.folder, made_from)
        counted = [tally for tally in tallies.values() if tally is not None]
        speed = {**speed_of(effort), "cascade": cascade.about if cascade else None}
        return work.finish(summarise(counted, n_reused, recipe, speed, work.seconds))


def inputs(recipe: Recipe, named: Named, found: list[Shard]) -> dict[str, Any]:
    """Everything that decides the scores."""
    first, *more = named.items()
    unused = set() if is_cascade(recipe) else {"cascade_recall", "cascade_sample"}
    return {
        "settings": {
            "encoder": first[1].encoder_settings.identity(),  # in the student's fingerprint, which names no setting
            "student": first[1].fingerprint,
            "weights": first[1].weights,
            "more_students": {ending[1:]: digest([each.fingerprint, each.weights]) for ending, each in more},
            "corpus": recipe.corpus.identity(),
            "score": {name: value for name, value in recipe.score.identity().items() if name not in unused},
            **({"seed": recipe.seed} if is_cascade(recipe) else {}),
        },
        "shards": shards.fingerprints(found),
    }


def is_cascade(recipe: Recipe) -> bool:
    """Whether a first student rules documents out."""
    return recipe.score.cascade_keep_share is not None


def fingerprints(found: list[Shard], made_from: dict[str, Any], cascade: Cascade | None) -> dict[Shard, str]:
    """Of each shard with all that decides its scores."""
    how = [made_from["settings"], *([cascade.first.digest] if cascade else [])]
    return {shard: digest([*how, made_from["shards"][shard.name]]) for shard in found}


def sweep(folder: Path, found: list[Shard], recipe: Recipe) -> None:
    """Remove what killed processes left, and what was made of other shards or is no longer asked for."""
    names, place = {shard.name for shard in found}, places.corpus(recipe, "score")
    check_ours(place, names, recipe)
    storage.sweep(place, keep=names)
    storage.sweep(places.side(place, "embeddings"), keep=names if recipe.score.keep_embeddings else set())
    for path in folder.glob("seen.*"):
        path.unlink(missing_ok=True)
    if not is_cascade(recipe):
        (folder / cascade_sample.FILE).unlink(missing_ok=True)


def check_ours(place: Place, names: set[str], recipe: Recipe) -> None:
    """Refuse a folder that the user named and that holds more than scored shards."""
    others = sorted(places.names(place) - names) if recipe.score.output else []
    finished = (name for name in others if not storage.is_unfinished(name))
    foreign = next((name for name in finished if FINGERPRINT not in notes_of(place / name)), None)
    if foreign is not None:
        raise UserError(f"score.output: {place} holds {foreign}, which is no scored shard; give an empty folder")


def score_shards(
    todo: list[Shard], recipe: Recipe, made_from: dict[str, Any], folder: Path, effort: Effort
) -> dict[Shard, Counter[str]]:
    """Score and write shards, here in one stream or each on its own by the actors of a cluster; their counts."""
    with progress("score", corpus.n_rows(todo), lambda seconds: pace(effort, seconds)) as step:
        if recipe.engine == "local":
            with scorer(recipe, made_from, folder, effort, step) as score:
                return score(todo)
        tallies = {}
        for shard, (tally, spent) in spread.over(recipe, partial(actor, recipe, made_from, folder), todo):
            effort.add(spent)
            step(tally["n_rows"])
            tallies[shard] = tally
        return tallies


@contextmanager
def scorer(
    recipe: Recipe, made_from: dict[str, Any], folder: Path, effort: Effort, step: Step
) -> Iterator[Callable[[list[Shard]], dict[Shard, Counter[str]]]]:
    """Scores and writes shards with the students loaded once, and with the cascade, which is made first where it is
    asked for and not there."""
    named = scoring.load(recipe)
    work = Scoring(named, recipe.score.keep_embeddings, effort)
    with seen.opened(folder / f"seen.{uuid.uuid4().hex[:12]}.sqlite", work.kind) as known:
        cascade = begin_cascade(recipe, work, known, folder, made_from)

        def score(some: list[Shard]) -> dict[Shard, Counter[str]]:
            prints, about = fingerprints(some, made_from, cascade), cascade.about if cascade else None
            place = places.corpus(recipe, "score")
            return write_all(Job(recipe, work, scoring.added(recipe, named), known, place, prints, step, about))

        yield score


def begin_cascade(
    recipe: Recipe, work: Scoring, known: Seen, folder: Path, made_from: dict[str, Any]
) -> Cascade | None:
    """The cascade if one is asked for, made by the first process that comes to it."""
    if not is_cascade(recipe):
        return None
    with locks.held(folder / ".cascade.lock", "", wait=True):
        cascade = cascade_sample.kept(folder, made_from)
        cascade = cascade or cascade_sample.make(recipe, work, known, folder, made_from)
    work.first = cascade.first
    return cascade


def actor(
    recipe: Recipe, made_from: dict[str, Any], folder: Path
) -> Callable[[Shard], tuple[Counter[str], dict[str, Any]]]:
    """What an actor does as long as it lives: scores and writes a shard; its counts, and what that took."""
    running, effort = ExitStack(), Effort()
    score = running.enter_context(scorer(recipe, made_from, folder, effort, lambda _: None))

    def one(shard: Shard, _: ExitStack = running) -> tuple[Counter[str], dict[str, Any]]:
        effort.forget()
        return score([shard])[shard], effort.spent_so_far()

    return one


def write_all(job: Job) -> dict[Shard, Counter[str]]:
    """Score and write the job's shards; their counts."""
    with closing(results(job)) as stream:
        begun = (item for item, _ in stream if isinstance(item, Begin))
        return {item.shard: scored_shard.write(item, stream, job) for item in begun}


# -- the result -------------------------------------------------------------------------------------------------------


def summarise(
    tallies: list[Counter[str]], n_reused: int, recipe: Recipe, speed: dict[str, Any], seconds: float
) -> ScoreResult:
    """Counts over all shards; every row must be somewhere."""
    total = sum(tallies, Counter())
    rows_out = total["n_scored"] + total["n_empty"] + total["n_ruled_out"] + total["n_bad_rows"]
    assert total["n_rows"] == rows_out, f"{total['n_rows']} rows in, {rows_out} accounted for"
    if total["n_rows"] == 0 and not recipe.shard:
        raise UserError(f"corpus.path: {recipe.corpus.path} has no rows")
    given = [(*json.loads(key), count) for key, count in total.most_common() if key.startswith("[")]
    return ScoreResult(
        seconds=seconds,
        n_shards=len(tallies),
        n_shards_reused=n_reused,
        int_score_counts=score_counts(given, "score"),
        half_up_counts=score_counts(given, "half_up"),
        label_counts=label_counts(given),
        **(speed | {name: total[name] for name in COUNTED}),
    )


COUNTED = (
    *("n_rows", "n_scored", "n_empty", "n_ruled_out", "n_bad_rows"),
    *("n_repaired_texts", "n_truncated", "n_windows"),
)


def score_counts(given: list[tuple[str, str, Any, int]], kind: str) -> dict[str, int]:
    """Documents by whole score, from (kind, target, value, count), of the target called score."""
    counts = sorted((value, count) for of, name, value, count in given if (of, name) == (kind, "score"))
    return {str(value): count for value, count in counts}


def label_counts(given: list[tuple[str, str, Any, int]]) -> dict[str, dict[str, int]]:
    """Documents by label, from (kind, target, value, count), of the targets that are labels."""
    counts: dict[str, dict[str, int]] = {}
    for kind, name, value, count in given:
        if kind in ("label", "labels"):
            counts.setdefault(name, {})[value] = count
    return counts


def speed_of(effort: Effort) -> dict[str, Any]:
    """What the result says of the work since it began."""
    done, spent = effort.counts, sum(effort.seconds.values())
    seconds = time.perf_counter() - effort.begin
    return {
        "n_duplicates": done["duplicates"],
        "docs_per_s": done["documents"] / seconds if done["documents"] else None,
        "tokens_per_s": done["tokens"] / seconds if done["tokens"] else None,
        "n_tokens": done["tokens"],
        "padding_share": padding_share(effort),
        "time_shares": {name: effort.seconds[name] / spent for name in ACTIVITIES if effort.seconds[name]},
        "n_memory_halvings": done["halvings"],
    }


def padding_share(effort: Effort) -> float | None:
    """Padding among what was computed so far."""
    slots = effort.counts["slots"]
    return 1 - effort.counts["tokens"] / slots if slots else None


def pace(effort: Effort, seconds: float) -> str:
    """How fast the encoder reads, in words."""
    speed, share = f"{short(effort.counts['tokens'] / seconds)} tokens/s", padding_share(effort)
    return f"{speed}, padding {share:.0%}" if share else speed


# -- schema -----------------------------------------------------------------------------------------------------------


def check_columns(found: list[Shard], recipe: Recipe, names: Sequence[str] | None = None) -> None:
    """Refuse, before anything is scored, shards without text (or ids for a sidecar) or with columns of these names
    (those of the targets, before there is a student), as far as their heads tell; of JSON lines the first shard's
    beginning is looked at."""
    names = expected(recipe) if names is None else names
    if recipe.score.sidecar and ID in names:
        raise UserError(
            f"score.sidecar: the student gives a column {ID!r}, which here names the documents; leave it out"
        )
    read = scored.id_columns(recipe.corpus) if recipe.score.sidecar else [recipe.corpus.text_column]
    for shard in found:
        if shard.format == "jsonl":
            first = next(corpus.read(shard, recipe.corpus, Counts()), None)
            refuse_existing(first.schema if first is not None else pa.schema([]), shard, recipe, names)
            return
        schema = corpus.read_schema(shard, recipe.corpus)
        for name in read:
            check_column(schema, name, shard)
        refuse_existing(schema, shard, recipe, names)


def expected(recipe: Recipe) -> list[str]:
    """Columns that a student of the recipe's targets surely gives, and those of the students beside it."""
    targets = recipe.train.targets
    whole = students.schema_of("score", "score").names[1:] if "score" in targets else []
    return [*targets, *whole, *scoring.added(recipe, scoring.load_more(recipe)).names]
