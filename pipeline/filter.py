"""Stage 4: the best documents are kept, and every dropped one is counted."""

import heapq
import logging
import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import cascade, choice, config, corpus, judged, scored, storage
from pipeline import rule as rules
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.keys import AMOUNTS, THRESHOLDS, Survey, reaches, surveyed
from pipeline.rule import Rule
from pipeline.shards import Counts, Shard, fingerprint
from pipeline.sinks import SINKS
from pipeline.tracking import Result, progress, stage

log = logging.getLogger("gristmill")

N_EXAMPLES = 3
EXAMPLE_CHARACTERS = 160

Example = tuple[int, float, str]
"""(priority, score, beginning of the text)"""
Examples = dict[str, list[Example]]
"""A few rows that were kept, and a few that were dropped."""

REASON = pa.field("dropped_reason", pa.string())


class FilterResult(Result):
    """What stage 4 did: rows in = kept + dropped, and why they were dropped."""

    n_rows: int
    n_kept: int
    n_dropped: int
    dropped: dict[str, int]
    kept_share: float
    n_tokens: int | None
    n_tokens_kept: int | None
    """None where the scored corpus has no text and filter.tokens_column is not set."""
    tokens_counted_by: str | None
    """The column they stand in, or how many bytes of text count as one."""
    cut: float | None
    """Lowest score that is kept; None where it differs by group or by chance, and where an int_score keeps nothing."""
    groups: list[dict[str, Any]]
    """With filter.per_group: value, n_rows, n_kept, n_tokens_kept and cut of each, largest first."""
    quality: dict[str, Any] | None
    """Precision, recall and base rate of the kept set against the teacher, with 95% intervals, estimated for the
    corpus from the audit or the ratings; None where there are none, by group, with density, and behind a cascade."""
    test_quality: dict[str, Any] | None
    """The same from the test part of the ratings, by which nothing is chosen."""
    examples_kept: list[dict[str, Any]]
    examples_dropped: list[dict[str, Any]]


class Tally:
    """What became of the rows, in all and by group."""

    def __init__(self, n_groups: int) -> None:
        self.counts = Counts()
        self.fates: Counter[str] = Counter()
        self.has_tokens = True
        self.n_tokens = 0
        self.n_rows, self.n_kept, self.n_tokens_kept = np.zeros((3, n_groups), np.int64)
        self.lowest = np.full(n_groups, math.inf)
        """Lowest score that was kept."""
        self.examples: Examples = {"kept": [], "dropped": []}


def run(recipe: Recipe, redo: bool = False) -> FilterResult:
    """Choose the cut, then write each shard's rows to the kept corpus or aside."""
    check_one_cut(recipe.filter)
    check_apart(recipe)
    found, shards = scored.locate(recipe, "filter")
    behind = scored.cascade_of(shards)
    if behind:
        cascade.check_filter(recipe.filter, behind["keep_share"])
    with stage("filter", recipe, inputs(recipe, shards)) as work:
        done = work.finished(FilterResult, redo, (work.folder / "kept").exists(), start=False)
        if done:
            return done
        survey, floor = Survey(recipe.filter, found, recipe.seed), rules.floor_of(recipe.filter)
        with surveyed(survey, shards, floor, recipe.seed, work.folder / "keys") as paths:
            rule, tally = rules.choose(recipe, survey, floor, tuple(paths)), Tally(max(1, len(survey.n_scored)))
            if behind:
                rules.check_behind(recipe.filter, survey, rule, behind)
            work.start()
            for side in ("kept", "dropped"):
                storage.sweep(work.folder / side, keep=set())
            with progress("filter", corpus.n_rows(shards)) as step:
                for number, shard in enumerate(shards):
                    step(write_shard(shard, number, survey, recipe, rule, work.folder, tally))
        return work.finish(summarise(recipe, survey, rule, tally, bool(behind), work.seconds))


def check_one_cut(settings: config.Filter) -> None:
    """One way to choose must be given, or an amount of what reaches a threshold; drawing needs an amount."""
    given = [name for name in config.CUTS if getattr(settings, name) is not None]
    said = " and ".join(given) or "none"
    amounts, thresholds = set(given) & set(AMOUNTS), set(given) & set(THRESHOLDS)
    both = len(amounts) == len(thresholds) == 1 and len(given) == 2
    if len(given) != 1 and not both:
        raise UserError(
            f"filter: give one of {', '.join(config.CUTS)}, or min_score with an amount; given: {said}. Run gristmill"
            " plan to see what each cut would keep"
        )
    drawn = "sampling: " + settings.sampling if settings.sampling != "top" else "per_group" * bool(settings.per_group)
    if drawn and not amounts:
        raise UserError(
            f"filter.{drawn} needs an amount, keep_share, keep_documents or keep_tokens; {said} alone keeps whatever"
            " reaches it"
        )


def check_apart(recipe: Recipe) -> None:
    """Refuse to read what is about to be overwritten."""
    folder = recipe.filter.scored
    if folder and folder.resolve().is_relative_to((recipe.run_folder / "filter").resolve()):
        raise UserError(f"filter.scored: {folder} is where this run's kept corpus goes; give another run_folder")


def inputs(recipe: Recipe, found: list[Shard]) -> dict[str, Any]:
    """Everything that decides what is kept."""
    files = judged.files(recipe) if recipe.filter.precision is not None else []
    drawn_by = {} if recipe.filter.sampling == "top" else {"id_column": recipe.corpus.id_column}
    return {
        "filter": recipe.filter.identity(),
        "seed": recipe.seed,
        **drawn_by,
        "shards": {shard.name: fingerprint(shard) for shard in found},
        **{path.name: storage.content(path) for path in files if path.exists()},
    }


# -- writing ----------------------------------------------------------------------------------------------------------


def write_shard(
    shard: Shard, number: int, survey: Survey, recipe: Recipe, rule: Rule, folder: Path, tally: Tally
) -> int:
    """Send each row of a scored shard to the kept corpus or aside, and count what became of it; the number of rows."""
    found, sink = survey.found, SINKS[recipe.filter.output_format]
    schema = corpus.read_schema(shard, found)
    start = 0
    with ExitStack() as files:
        keep = files.enter_context(sink(folder / "kept" / shard.name, schema))
        aside = folder / "dropped" / shard.name
        drop = files.enter_context(sink(aside, schema.append(REASON))) if recipe.filter.keep_dropped else None
        for batch in corpus.read(shard, found, tally.counts):
            reasons = reasons_to_drop(batch, rule, chosen(rule, number, start, batch.num_rows))
            kept = np.array([reason is None for reason in reasons], dtype=bool)
            tally.fates.update(reason or "kept" for reason in reasons)
            count(batch, shard, survey, kept, tally)
            remember(batch, found, shard, kept, recipe.seed, tally.examples)
            keep(batch.filter(pa.array(kept)))
            if drop is not None:
                drop(batch.append_column(REASON, pa.array(reasons, pa.string())).filter(pa.array(~kept)))
            start += batch.num_rows
    return start


def chosen(rule: Rule, number: int, start: int, n: int) -> NDArray[np.bool_]:
    """Whether the keys of the next `n` rows of a shard reach their cut: (n,)."""
    if rule.cuts is None:
        return np.ones(n, bool)
    rows = np.fromfile(rule.paths[number], choice.ROW, n, offset=start * choice.ROW.itemsize)
    return choice.is_kept(rows, rule.cuts)


def reasons_to_drop(batch: pa.RecordBatch, rule: Rule, is_chosen: NDArray[np.bool_]) -> list[str | None]:
    """Why each row is dropped; None for one that is kept."""
    reasons = np.full(batch.num_rows, None, object)
    reasons[~is_chosen] = rule.reason
    if rule.floor:
        reasons[~reaches(batch, rule.floor)] = f"{rule.floor.column}_below_cut"
    reasons[np.isnan(scored.scores(batch))] = "score_is_nan"
    reasons[batch.column("score").is_null().to_numpy(zero_copy_only=False)] = "no_text"
    reasons[np.isnan(scored.scores(batch)) & scored.is_ruled_out(batch)] = "ruled_out_by_cascade"
    return list(reasons)


def count(batch: pa.RecordBatch, shard: Shard, survey: Survey, kept: NDArray[np.bool_], tally: Tally) -> None:
    """Add a batch to what is known of the kept and dropped rows."""
    group, size = survey.code(batch, shard), len(tally.n_rows)
    tally.n_rows += np.bincount(group, minlength=size)
    tally.n_kept += np.bincount(group[kept], minlength=size)
    np.minimum.at(tally.lowest, group[kept], scored.scores(batch)[kept])
    column = survey.settings.tokens_column
    tally.has_tokens &= scored.has_tokens(batch, column, survey.found)
    if tally.has_tokens:
        n_tokens = scored.tokens(batch, column, survey.found, shard)
        tally.n_tokens += int(n_tokens.sum())
        np.add.at(tally.n_tokens_kept, group[kept], n_tokens[kept])


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


# -- what was done ----------------------------------------------------------------------------------------------------


def summarise(recipe: Recipe, survey: Survey, rule: Rule, tally: Tally, behind: bool, seconds: float) -> FilterResult:
    """Counts over all shards; every row must be kept or dropped."""
    n_rows, fates = tally.counts.n_rows, Counter(tally.fates)
    n_kept = fates.pop("kept", 0)
    n_dropped = sum(fates.values())
    assert n_rows == n_kept + n_dropped, f"{n_rows} rows in, {n_kept} + {n_dropped} out"
    assert tally.n_rows.sum() == n_rows and tally.n_kept.sum() == n_kept, "groups do not add up"
    cut = cut_of(rule, tally, recipe.filter)
    if not n_kept:
        log.warning("filter: nothing reaches %g, so nothing is kept", rule.floor.cut if rule.floor else math.inf)
    kept = None if behind else rules.chance(recipe.filter, survey, rule, float(tally.lowest[0]))
    lie = survey.scores.lie()
    return FilterResult(
        seconds=seconds,
        n_rows=n_rows,
        n_kept=n_kept,
        n_dropped=n_dropped,
        dropped=dict(sorted(fates.items())),
        kept_share=n_kept / max(n_rows, 1),
        n_tokens=tally.n_tokens if tally.has_tokens else None,
        n_tokens_kept=int(tally.n_tokens_kept.sum()) if tally.has_tokens else None,
        tokens_counted_by=scored.tokens_counted_by(recipe) if tally.has_tokens else None,
        cut=cut,
        groups=groups(survey, tally) if recipe.filter.per_group else [],
        quality=judged.quality(judged.to_choose(recipe), *lie, kept) if kept else None,
        test_quality=judged.quality(judged.to_report(recipe), *lie, kept) if kept else None,
        examples_kept=shown(tally.examples["kept"]),
        examples_dropped=shown(tally.examples["dropped"]),
    )


def shown(heap: list[Example]) -> list[dict[str, Any]]:
    """Examples as a result holds them."""
    return [{"score": round(score, 3), "text": text} for _, score, text in sorted(heap, reverse=True)]


def cut_of(rule: Rule, tally: Tally, settings: config.Filter) -> float | None:
    """The lowest score that is kept; None where that says nothing."""
    if rule.cuts is None and rule.floor and rule.floor.column == "score":
        return rule.floor.cut
    one = settings.sampling == "top" and not settings.per_group and tally.n_kept.any()
    return float(tally.lowest[0]) if one else None


def groups(survey: Survey, tally: Tally) -> list[dict[str, Any]]:
    """What was kept of each group, the largest first."""
    top = survey.settings.sampling == "top"
    found = [
        {
            "value": value,
            "n_rows": int(tally.n_rows[code]),
            "n_kept": int(tally.n_kept[code]),
            "n_tokens_kept": int(tally.n_tokens_kept[code]) if tally.has_tokens else None,
            "cut": float(tally.lowest[code]) if top and tally.n_kept[code] else None,
        }
        for value, code in survey.groups.codes.items()
    ]
    return sorted(found, key=lambda group: (-group["n_rows"], group["value"]))
