"""Stage 4: the best documents are kept, and every dropped one is counted."""

import base64
import heapq
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import config, corpus, metrics, storage
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.formats import check_column
from pipeline.shards import Counts, Shard, find_shards, fingerprint
from pipeline.tracking import Result, progress, read_json, stage, upstream

log = logging.getLogger("gristmill")

N_EXAMPLES = 3
EXAMPLE_CHARACTERS = 160

Scores = NDArray[np.float32]
Example = tuple[int, float, str]
"""(priority, score, beginning of the text)"""
Examples = dict[str, list[Example]]
"""A few rows that were kept, and a few that were dropped."""

REASON = pa.field("dropped_reason", pa.string())


class Rule(NamedTuple):
    """Rows whose `column` is at least `cut` are kept."""

    column: str
    cut: float


class FilterResult(Result):
    """What stage 4 did: rows in = kept + dropped, and why they were dropped."""

    n_rows: int
    n_kept: int
    n_dropped: int
    dropped: dict[str, int]
    kept_share: float
    cut: float
    """Lowest score that is kept; of int_score where the cut is made there."""
    examples_kept: list[dict[str, Any]]
    examples_dropped: list[dict[str, Any]]


def run(recipe: Recipe, redo: bool = False) -> FilterResult:
    """Choose the cut, then write each shard's rows to the kept corpus or aside."""
    check_one_cut(recipe.filter)
    folder = upstream(recipe.filter.scored, recipe, "score/scored", "filter")
    if folder.resolve().is_relative_to((recipe.run_folder / "filter").resolve()):
        raise UserError(f"filter.scored: {folder} is where this run's kept corpus goes; give another run_folder")
    scored = config.Corpus(path=str(folder), text_column=recipe.corpus.text_column)
    found = find_shards(scored)
    check_complete(recipe, found)
    with stage("filter", recipe, inputs(recipe, found)) as work:
        done = work.finished(FilterResult, redo, (work.folder / "kept").exists())
        if done:
            return done
        for side in ("kept", "dropped"):
            storage.sweep(work.folder / side, keep=set())
        rule = choose_rule(recipe.filter, scored, found)
        counts, tally = Counts(), Counter[str]()
        examples: Examples = {"kept": [], "dropped": []}
        with progress("filter", corpus.n_rows(found)) as step:
            for shard in found:
                before = counts.n_rows
                tally += write_shard(shard, scored, recipe, rule, work.folder, examples, counts)
                step(counts.n_rows - before)
        return work.finish(summarise(tally, counts.n_rows, examples, rule.cut, work.seconds))


def check_one_cut(settings: config.Filter) -> None:
    """Exactly one way to choose must be given."""
    given = [name for name in config.CUTS if getattr(settings, name) is not None]
    if len(given) != 1:
        said = " and ".join(given) or "none"
        raise UserError(f"filter: give one of min_score, min_int_score and keep_share; given: {said}")


def check_complete(recipe: Recipe, found: list[Shard]) -> None:
    """Refuse this run's scored corpus when shards of it are gone."""
    scored = {} if recipe.filter.scored else read_json(recipe.run_folder / "score" / "inputs.json") or {}
    missing = sorted(scored.get("shards", {}).keys() - {shard.name for shard in found})
    if missing:
        raise UserError(f"filter: {missing[0]} is missing from the scored corpus; run gristmill score again")


def inputs(recipe: Recipe, found: list[Shard]) -> dict[str, Any]:
    """Everything that decides what is kept."""
    return {
        "filter": recipe.filter.identity(),
        "seed": recipe.seed,
        "shards": {shard.name: fingerprint(shard) for shard in found},
    }


# -- the cut ----------------------------------------------------------------------------------------------------------


def choose_rule(settings: config.Filter, scored: config.Corpus, found: list[Shard]) -> Rule:
    """The column that decides, and the lowest value that is kept."""
    for shard in found:
        for name in ("score", "int_score"):
            check_column(corpus.read_schema(shard, scored), name, shard)
    if settings.min_int_score is not None:
        return Rule("int_score", settings.min_int_score)
    if settings.min_score is not None:
        return Rule("score", float(np.float32(settings.min_score)))
    assert settings.keep_share is not None
    return Rule("score", share_cut(settings.keep_share, lambda: score_arrays(scored, found)))


def score_arrays(scored: config.Corpus, found: list[Shard]) -> Iterator[Scores]:
    """The scores of the corpus, null ones left out, batch by batch."""
    for shard in found:
        for batch in corpus.read(shard, scored, Counts(), ["score"]):
            yield batch.column("score").drop_null().to_numpy(zero_copy_only=False).astype(np.float32)


def share_cut(share: float, arrays: Callable[[], Iterator[Scores]]) -> float:
    """The score at which `share` of all scores is at or above it: exact, two passes, constant memory.

    Scores are counted by their upper 16 bits, then, within the one group that holds the cut, by their lower 16.
    """
    upper = sum((np.bincount(metrics.sortable(a) >> 16, minlength=65536) for a in arrays()), np.zeros(65536, np.int64))
    n_keep = round(share * int(upper.sum()))
    if n_keep == 0:
        raise UserError(f"filter.keep_share: {share:g} of {int(upper.sum())} scored documents is none; raise it")
    group, before = from_top(upper, n_keep)
    lower = np.zeros(65536, np.int64)
    for array in arrays():
        keys = metrics.sortable(array)
        lower += np.bincount(keys[keys >> 16 == group] & 0xFFFF, minlength=65536)
    low, _ = from_top(lower, n_keep - before)
    return metrics.unsortable(group << 16 | low)


def from_top(counts: NDArray[np.int64], n: int) -> tuple[int, int]:
    """The bin that holds the n-th largest, and how many lie above that bin."""
    above = np.cumsum(counts[::-1])
    position = int(np.searchsorted(above, n))
    return len(counts) - 1 - position, int(above[position - 1]) if position else 0


# -- writing ----------------------------------------------------------------------------------------------------------


def write_shard(
    shard: Shard,
    scored: config.Corpus,
    recipe: Recipe,
    rule: Rule,
    folder: Path,
    examples: Examples,
    counts: Counts,
) -> Counter[str]:
    """Send each row of a scored shard to the kept corpus or aside; returns what became of them."""
    schema = corpus.read_schema(shard, scored)
    sink = SINKS[recipe.filter.output_format]
    tally: Counter[str] = Counter()
    with ExitStack() as files:
        keep = files.enter_context(sink(folder / "kept" / shard.name, schema))
        aside = folder / "dropped" / shard.name
        drop = files.enter_context(sink(aside, schema.append(REASON))) if recipe.filter.keep_dropped else None
        for batch in corpus.read(shard, scored, counts):
            reasons = reasons_to_drop(batch, rule)
            kept = np.array([reason is None for reason in reasons], dtype=bool)
            tally.update(reason or "kept" for reason in reasons)
            remember(batch, scored, shard, kept, recipe.seed, examples)
            keep(batch.filter(pa.array(kept)))
            if drop is not None:
                drop(batch.append_column(REASON, pa.array(reasons, pa.string())).filter(pa.array(~kept)))
    return tally


def reasons_to_drop(batch: pa.RecordBatch, rule: Rule) -> list[str | None]:
    """Why each row is dropped; None for one that is kept."""
    values = batch.column(rule.column).cast(pa.float32()).to_pylist()
    return ["no_text" if v is None else f"{rule.column}_below_cut" if not v >= rule.cut else None for v in values]


def remember(
    batch: pa.RecordBatch,
    scored: config.Corpus,
    shard: Shard,
    kept: NDArray[np.bool_],
    seed: int,
    examples: Examples,
) -> None:
    """Keep a few rows of either side to show, drawn uniformly (smallest hashes) from those with text."""
    if scored.text_column.split(".")[0] not in batch.schema.names:
        return
    texts, scores = corpus.texts(batch, scored, shard, Counts()), batch.column("score").to_pylist()
    for text, score, is_kept in zip(texts, scores, kept.tolist(), strict=True):
        if text is None or score is None:
            continue
        heap = examples["kept" if is_kept else "dropped"]
        example = (
            -int(corpus.text_id(f"{seed}:{text}"), 16),
            score,
            " ".join(text[:800].split())[:EXAMPLE_CHARACTERS],
        )
        if example not in heap:
            heapq.heappush(heap, example)
        if len(heap) > N_EXAMPLES:
            heapq.heappop(heap)


def summarise(tally: Counter[str], n_rows: int, examples: Examples, cut: float, seconds: float) -> FilterResult:
    """Counts over all shards; every row must be kept or dropped."""
    n_kept = tally.pop("kept", 0)
    n_dropped = sum(tally.values())
    assert n_rows == n_kept + n_dropped, f"{n_rows} rows in, {n_kept} + {n_dropped} out"
    if not n_kept:
        log.warning("filter: nothing reaches %g, so nothing is kept", cut)
    shown = {
        side: [{"score": round(score, 3), "text": text} for _, score, text in sorted(heap, reverse=True)]
        for side, heap in examples.items()
    }
    return FilterResult(
        seconds=seconds,
        n_rows=n_rows,
        n_kept=n_kept,
        n_dropped=n_dropped,
        dropped=dict(sorted(tally.items())),
        kept_share=n_kept / max(n_rows, 1),
        cut=cut,
        examples_kept=shown["kept"],
        examples_dropped=shown["dropped"],
    )


# -- sinks ------------------------------------------------------------------------------------------------------------

Sink = Callable[[pa.RecordBatch], None]


@contextmanager
def parquet_sink(path: Path, schema: pa.Schema) -> Iterator[Sink]:
    """Writes record batches to a parquet shard."""
    with storage.shard_writer(path, schema) as writer:
        yield writer.write_batch


@contextmanager
def jsonl_sink(path: Path, _: pa.Schema) -> Iterator[Sink]:
    """Writes record batches as JSON lines, under the shard's name with .jsonl at its end."""
    with storage.atomic(path.with_suffix(".jsonl")) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield lambda batch: write_lines(file, batch)


SINKS = {"parquet": parquet_sink, "jsonl": jsonl_sink}


def write_lines(file: IO[str], batch: pa.RecordBatch) -> None:
    """Rows as JSON lines; what JSON has no form for (times, decimals) as text."""
    columns = [corpus.decoded(column)[0] for column in batch.columns]
    for row in zip(*columns, strict=True):
        named = dict(zip(batch.schema.names, row, strict=True))
        file.write(json.dumps(plain(named), ensure_ascii=False, default=str) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold: bytes as base64, NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
