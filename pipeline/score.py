"""Stage 3: the student scores every document."""

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import cascade_sample, corpus, scored, scored_shard, scoring, seen, storage
from pipeline import student as students
from pipeline.cascade_sample import Cascade
from pipeline.config import Recipe, digest
from pipeline.errors import UserError
from pipeline.formats import check_column
from pipeline.pictures import short
from pipeline.scored_shard import tally_of
from pipeline.scoring import Named, Scoring
from pipeline.shards import Counts, Shard, find_shards, fingerprint
from pipeline.stream import ID, Begin, Job, refuse_existing, results
from pipeline.tracking import Result, progress, stage
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
    with stage("score", recipe, made_from) as work:
        cascade = cascade_sample.kept(work.folder, made_from)
        prints = fingerprints(found, made_from, cascade)
        tallies = {shard: tally_of(work.folder, shard, prints[shard], recipe) for shard in found}
        done = work.finished(ScoreResult, redo, None not in tallies.values())
        if done:
            return done
        check_columns(found, recipe, scoring.added(recipe, named).names)
        sweep(work.folder, found, recipe)
        todo = [shard for shard, tally in tallies.items() if tally is None]
        n_reused, speed = len(found) - len(todo), speed_of(Effort(), 0)
        if n_reused:
            log.info("score: %d of %d shards are there already", n_reused, len(found))
        if todo:
            new, speed, cascade = score_shards(todo, recipe, named, work.folder, made_from, cascade)
            tallies |= new
        counted = [tally for tally in tallies.values() if tally is not None]
        speed["cascade"] = cascade.about if cascade else None
        return work.finish(summarise(counted, n_reused, made_from, speed, work.seconds))


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
        "shards": {shard.name: fingerprint(shard) for shard in found},
    }


def is_cascade(recipe: Recipe) -> bool:
    """Whether a first student rules documents out."""
    return recipe.score.cascade_keep_share is not None


def fingerprints(found: list[Shard], made_from: dict[str, Any], cascade: Cascade | None) -> dict[Shard, str]:
    """Of each shard with all that decides its scores."""
    how = [made_from["settings"], *([cascade.first.digest] if cascade else [])]
    return {shard: digest([*how, made_from["shards"][shard.name]]) for shard in found}


def sweep(folder: Path, found: list[Shard], recipe: Recipe) -> None:
    """Remove what killed writers left, and what was made of other shards or is no longer asked for."""
    names = {shard.name for shard in found}
    storage.sweep(folder / "scored", keep=names)
    storage.sweep(folder / "embeddings", keep=names if recipe.score.keep_embeddings else set())
    if not is_cascade(recipe):
        (folder / cascade_sample.FILE).unlink(missing_ok=True)


def score_shards(
    todo: list[Shard],
    recipe: Recipe,
    named: Named,
    folder: Path,
    made_from: dict[str, Any],
    cascade: Cascade | None,
) -> tuple[dict[Shard, Counter[str]], dict[str, Any], Cascade | None]:
    """Read, score and write shards in one stream; their counts, how fast it went, and the cascade, which is made first
    where it is asked for and not there."""
    work = Scoring(named, recipe.score.keep_embeddings)
    begin = time.perf_counter()
    with seen.opened(folder / "seen.sqlite", work.kind) as known:
        if is_cascade(recipe):
            cascade = cascade or cascade_sample.make(recipe, work, known, folder, made_from)
            work.first = cascade.first
        prints = fingerprints(todo, made_from, cascade)
        with progress("score", corpus.n_rows(prints), lambda seconds: pace(work.effort, seconds)) as step:
            about = cascade.about if cascade else None
            job = Job(recipe, work, scoring.added(recipe, named), known, folder, prints, step, about)
            tallies = write_all(job)
    return tallies, speed_of(work.effort, time.perf_counter() - begin), cascade


def write_all(job: Job) -> dict[Shard, Counter[str]]:
    """Score and write the job's shards; their counts."""
    with closing(results(job)) as stream:
        begun = (item for item, _ in stream if isinstance(item, Begin))
        return {item.shard: scored_shard.write(item, stream, job) for item in begun}


# -- the result -------------------------------------------------------------------------------------------------------


def summarise(
    tallies: list[Counter[str]], n_reused: int, made_from: dict[str, Any], speed: dict[str, Any], seconds: float
) -> ScoreResult:
    """Counts over all shards; every row must be somewhere."""
    total = sum(tallies, Counter())
    rows_out = total["n_scored"] + total["n_empty"] + total["n_ruled_out"] + total["n_bad_rows"]
    assert total["n_rows"] == rows_out, f"{total['n_rows']} rows in, {rows_out} accounted for"
    if total["n_rows"] == 0:
        raise UserError(f"corpus.path: {made_from['settings']['corpus']['path']} has no rows")
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


def speed_of(effort: Effort, seconds: float) -> dict[str, Any]:
    """What the result says of the work of so many seconds."""
    done, spent = effort.counts, sum(effort.seconds.values())
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
