"""Stage 4: the best documents are kept, and every dropped one is counted."""

import heapq
import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import cascade, choice, chosen, config, corpus, judged, locks, mirror, places, scored, spread, storage
from pipeline import rule as rules
from pipeline import tally as tallies
from pipeline.chosen import Chosen
from pipeline.config import Recipe, digest
from pipeline.errors import UserError
from pipeline.keys import AMOUNTS, THRESHOLDS, Survey, reaches, surveyed
from pipeline.places import Place
from pipeline.rule import Rule
from pipeline.shards import Counts, Shard, fingerprints
from pipeline.sinks import SINKS
from pipeline.tally import N_EXAMPLES, Example, Examples, Tally
from pipeline.tracking import Result, Stage, progress, read_json, stage

log = logging.getLogger("gristmill")

EXAMPLE_CHARACTERS = 160

TALLIES = "tallies"
"""Folder of what became of each shard."""
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


def run(recipe: Recipe, redo: bool = False) -> FilterResult:
    """Choose the cut, then write each shard's rows to the kept corpus or aside; a shard that is there is not written
    again."""
    check_one_cut(recipe.filter)
    check_apart(recipe)
    found, shards = scored.locate(recipe, "filter")
    behind = scored.cascade_of(shards)
    if behind:
        cascade.check_filter(recipe.filter, behind["keep_share"])
    own = spread.part(list(enumerate(shards)), recipe.shard)
    with stage("filter", recipe, inputs(recipe, shards)) as work:
        there = names_there(recipe)
        is_whole = all(name_of(shard, recipe.filter) in there for _, shard in own)
        done = work.finished(FilterResult, redo, is_whole, start=False)
        if done:
            return done
        survey = Survey(recipe.filter, found, recipe.seed)
        make = partial(choose, recipe, shards, behind, survey)
        with chosen.once(work.folder, digest(work.inputs), survey, make) as choice_made:
            check_ours(work.folder, shards, recipe)
            work.start()
            if not recipe.shard:
                sweep(work.folder, shards, recipe)
            total = write_all(work, own, choice_made)
            if recipe.engine == "ray" and not recipe.shard:
                sweep(work.folder, shards, recipe)  # actors that died left files
            result = work.finish(summarise(recipe, *choice_made, total, bool(behind), work.seconds))
        if not recipe.shard:
            chosen.forget(work.folder)
        return result


def choose(recipe: Recipe, shards: list[Shard], behind: dict[str, Any] | None, survey: Survey, folder: Path) -> Rule:
    """What is kept, after a look at all scores."""
    floor = rules.floor_of(recipe.filter)
    rule = rules.choose(recipe, survey, floor, tuple(surveyed(survey, shards, floor, folder)))
    if behind:
        rules.check_behind(recipe.filter, survey, rule, behind)
    return rule


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
    kept = places.corpus(recipe, "filter")
    if recipe.filter.scored:
        source = places.of(recipe.filter.scored, "filter.scored")
        if places.lies_in(source, kept) or places.lies_in(kept, source):
            raise UserError(f"filter.scored: {source} is where this run's kept corpus goes; give another run_folder")


def inputs(recipe: Recipe, found: list[Shard]) -> dict[str, Any]:
    """Everything that decides what is kept."""
    files = judged.files(recipe) if recipe.filter.precision is not None else []
    drawn_by = {} if recipe.filter.sampling == "top" else {"id_column": recipe.corpus.id_column}
    return {
        "filter": recipe.filter.identity(),
        "seed": recipe.seed,
        **drawn_by,
        "shards": fingerprints(found),
        **{path.name: storage.content(path) for path in files if path.exists()},
    }


# -- writing ----------------------------------------------------------------------------------------------------------


def sides(recipe: Recipe) -> list[Place]:
    """Where rows go: those kept and those dropped."""
    kept = places.corpus(recipe, "filter")
    return [kept, places.side(kept, "dropped")]


def wanted(recipe: Recipe) -> list[Place]:
    """Those of them that are written."""
    return sides(recipe)[: 1 + recipe.filter.keep_dropped]


def name_of(shard: Shard, settings: config.Filter) -> str:
    """The name of a shard on either side."""
    return PurePosixPath(shard.name).with_suffix(f".{settings.output_format}").as_posix()


def names_there(recipe: Recipe) -> set[str]:
    """Names that are there on all sides that are wanted."""
    return set.intersection(*map(places.names, wanted(recipe)))


def tally_file(shard: Shard, folder: Path) -> Path:
    """Says, once its rows are written, what became of a shard."""
    return folder / TALLIES / f"{shard.name}.json"


def tally_of(shard: Shard, made_from: str, folder: Path) -> Tally | None:
    """What became of a shard whose rows were chosen in the same way before; None if it has to be (re)done."""
    known = read_json(tally_file(shard, folder)) or {}
    return tallies.from_said(known["tally"]) if known.get("made_from") == made_from else None


def check_ours(folder: Path, shards: list[Shard], recipe: Recipe) -> None:
    """Refuse a folder that the user named and that holds more than shards of this run."""
    ours = {PurePosixPath(name).with_suffix("").with_suffix("") for name in places.names(folder / TALLIES)}
    ours |= {PurePosixPath(shard.name).with_suffix("") for shard in shards}
    for place in sides(recipe) if recipe.filter.output else []:
        names = (name for name in places.names(place) if not storage.is_unfinished(name))
        foreign = next((name for name in names if PurePosixPath(name).with_suffix("") not in ours), None)
        if foreign is not None:
            raise UserError(f"filter.output: {place} holds {foreign}, which is not of this run; give an empty folder")


def sweep(folder: Path, shards: list[Shard], recipe: Recipe) -> None:
    """Remove what killed processes left, and what was made of other shards or is no longer asked for."""
    for place in sides(recipe):
        names = {name_of(shard, recipe.filter) for shard in shards} if place in wanted(recipe) else set()
        storage.sweep(place, names)
    storage.sweep(folder / TALLIES, {f"{shard.name}.json" for shard in shards})


def write_all(work: Stage, own: list[tuple[int, Shard]], choice_made: Chosen) -> Tally:
    """What became of the rows of numbered shards; those are written that are not there as chosen."""
    recipe, survey, there = work.recipe, choice_made[0], names_there(work.recipe)
    prints = chosen.fingerprints(recipe, choice_made, work.inputs)
    total, todo = Tally(max(1, len(survey.n_scored))), []
    for number, shard in own:
        known = name_of(shard, recipe.filter) in there and tally_of(shard, prints[shard.name], work.folder)
        total.add(known) if known else todo.append((number, shard))
    if todo:
        mirror.forget(work.folder / TALLIES)  # else another machine would take new shards for those of before
    n_left = len(todo)
    with progress("filter", corpus.n_rows([shard for _, shard in todo])) as step:
        start = partial(writer, recipe, survey.found, work.folder, digest(work.inputs), prints)
        for _, tally in spread.over(recipe, start, todo):
            total.add(tally)
            step(tally.counts.n_rows)
            n_left -= 1
    assert not n_left, "every shard is written"
    return total


def writer(
    recipe: Recipe, found: config.Corpus, folder: Path, made_from: str, prints: dict[str, str]
) -> Callable[[tuple[int, Shard]], Tally]:
    """Writes the rows of numbered shards by what has been chosen."""
    there = chosen.read(folder, made_from, recipe.filter, found, recipe.seed)
    assert there is not None, "the choice is there until the stage is finished"
    survey, rule = there

    def write(numbered: tuple[int, Shard]) -> Tally:
        number, shard = numbered
        path = tally_file(shard, folder)
        path.unlink(missing_ok=True)  # it would vouch for the new rows, were this process killed before it is replaced
        tally = write_shard(shard, number, survey, recipe, rule)
        said = {"made_from": prints[shard.name], "tally": tally.said()}
        storage.write_text(path, json.dumps(said, ensure_ascii=False))
        return tally

    return write


def write_shard(shard: Shard, number: int, survey: Survey, recipe: Recipe, rule: Rule) -> Tally:
    """Send each row of a scored shard to the kept corpus or aside; what became of them."""
    found, sink, tally = survey.found, SINKS[recipe.filter.output_format], Tally(max(1, len(survey.n_scored)))
    schema = corpus.read_schema(shard, found)
    paths = [place / name_of(shard, recipe.filter) for place in sides(recipe)]
    start = 0
    with ExitStack() as files:
        files.enter_context(locks.written_by_one(paths[0]))
        keep = files.enter_context(sink(paths[0], schema))
        drop = files.enter_context(sink(paths[1], schema.append(REASON))) if recipe.filter.keep_dropped else None
        for batch in corpus.read(shard, found, tally.counts):
            reasons = reasons_to_drop(batch, rule, reach_cut(rule, number, start, batch.num_rows))
            kept = np.array([reason is None for reason in reasons], dtype=bool)
            tally.fates.update(reason or "kept" for reason in reasons)
            count(batch, shard, survey, kept, tally)
            remember(batch, found, shard, kept, recipe.seed, tally.examples)
            keep(batch.filter(pa.array(kept)))
            if drop is not None:
                drop(batch.append_column(REASON, pa.array(reasons, pa.string())).filter(pa.array(~kept)))
            start += batch.num_rows
    return tally


def reach_cut(rule: Rule, number: int, start: int, n: int) -> NDArray[np.bool_]:
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
    if not n_kept and not recipe.shard:
        log.warning("filter: nothing reaches %g, so nothing is kept", rule.floor.cut if rule.floor else math.inf)
    kept = None if behind or recipe.shard else rules.chance(recipe.filter, survey, rule, float(tally.lowest[0]))
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
