"""Asking in parts (--shard i/n): each part records in a store of its own, which one writes and nobody waits for; the
same command without --shard takes their answers in, asks what is still open, and finishes."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline import locks, panel, spread
from pipeline.config import Budget
from pipeline.corpus import text_id
from pipeline.engines import engine
from pipeline.errors import UserError
from pipeline.panel import Collected, Rater, Start
from pipeline.teacher import AnswerStore
from pipeline.tracking import AnyResult, Result, Stage

log = logging.getLogger("gristmill")

Limits = TypeVar("Limits", bound=Budget)


class PartResult(Result):
    """What one part of the asking came to."""

    part: str
    """i/n."""
    n_sampled: int
    """Documents of this part."""
    n_asked: int
    n_reused: int
    n_failed: int
    n_not_asked: int
    stopped_by: str | None
    prompt_tokens: int
    answer_tokens: int
    usd: float | None
    tokens_per_s: float | None
    docs_per_s: float | None


def share(limits: Limits, shard: str | None) -> Limits:
    """The budget of a part: one n-th of the dollars and tokens, but all minutes, as parts work side by side."""
    if shard is None or (limits.budget_usd is None and limits.budget_tokens is None):
        return limits
    n = spread.numbers(shard)[1]
    usd, tokens = limits.budget_usd, limits.budget_tokens
    own = {"budget_usd": usd and usd / n, "budget_tokens": tokens and max(tokens // n, 1)}
    told = ", ".join(f"{name} {value:g}" for name, value in own.items() if value)
    log.info("part %s has one %d-th of the budget: %s", shard, n, told)
    return limits.model_copy(update=own)


def finished(work: Stage, kind: type[AnyResult], redo: bool, there: bool) -> AnyResult | PartResult | None:
    """The result of the stage if it is finished (Stage.finished); of a part else that of the part, if this is."""
    if work.recipe.shard and not (work.folder / "result.json").exists():
        return work.finished(PartResult, redo, True)
    return work.finished(kind, redo, there)


# -- a part -----------------------------------------------------------------------------------------------------------


def asked(
    work: Stage,
    raters: list[Rater],
    texts: Sequence[str],
    limits: Budget,
    calibrate: bool = False,
    start: Start = engine,
    home: Path | None = None,
) -> PartResult:
    """Ask about the texts of this part. `home` is the folder of the stage's answers, where it is not its own."""
    check(work, raters)
    own = spread.part(texts, work.recipe.shard)
    with opened(work, home or work.folder, own) as store:
        got = panel.collect(work.name, raters, own, store, limits, start, calibrate and bool(own))
    check_answered(work, got, len(own) * len(raters))
    return work.finish(
        PartResult(
            seconds=work.seconds,
            part=str(work.recipe.shard),
            n_sampled=len(own),
            **got.spending.in_figures([rater.teacher for rater in raters], work.seconds),
            n_failed=len(got.failed),
            n_not_asked=got.n_not_asked,
        )
    )


def check(work: Stage, raters: list[Rater]) -> None:
    """Refuse what cannot be done in parts, and parts of another number, which would ask the same as this one."""
    if any(rater.teacher.batch_folder for rater in raters):
        raise UserError("teacher.batch_folder: requests are answered elsewhere, all at once; leave out --shard")
    own = spread.name(work.recipe.shard).partition("-of-")[2]
    for path in work.folder.glob(".lock.*-of-*"):
        part, _, n = path.name.removeprefix(".lock.").partition("-of-")
        told = f"{work.name}: part {part}/{n} is at work in {work.folder}, and would ask the same as a part of {own}"
        if n != own:
            with locks.held(path, f"{told}; wait for it, or go on with parts of {n}", shared=True):
                pass


@contextmanager
def opened(work: Stage, home: Path, texts: Sequence[str]) -> Iterator[AnswerStore]:
    """The store of this part, with what is recorded elsewhere about its texts. Parts open their stores one after
    another: what one has just made is whole when another reads it, and a journal that is shared memory, as that of
    answers.sqlite, belongs to one machine at a time."""
    wanted = {text_id(text) for text in [*texts, ""]}
    path = work.folder / f"answers{spread.name(work.recipe.shard)}.sqlite"
    with locks.held(home / ".answers.lock", "", wait=True):
        store = AnswerStore(path)
        for other in {*stores(home), *stores(work.folder)} - {path}:
            store.take(other, wanted)
    with store:
        yield store


def check_answered(work: Stage, got: Collected, n: int) -> None:
    """Stop where too many requests failed, so that a scheduler sees it and starts nothing that needs this part."""
    settings = work.recipe.label if work.name == "label" else work.recipe.rate
    if len(got.failed) > settings.max_unscored_rate * n:
        raise UserError(
            f"{work.name}: {len(got.failed)} of {n} requests of part {work.recipe.shard} failed; the answers are kept,"
            " and the same command asks again"
        )


# -- the whole --------------------------------------------------------------------------------------------------------


@contextmanager
def gathered(work: Stage, home: Path | None = None) -> Iterator[AnswerStore]:
    """The answers of a stage, those of its parts among them."""
    with AnswerStore((home or work.folder) / "answers.sqlite") as store:
        for part in stores_of_parts(work.folder):
            log.info("%s: taking in %s", work.name, part.name)
            store.take(part)
        yield store


def put_together(work: Stage, result: AnyResult) -> AnyResult:
    """Finish the stage; what its parts left is not needed any more."""
    work.finish(result)
    for part in stores_of_parts(work.folder):
        part.unlink()
    shutil.rmtree(work.part.parent, ignore_errors=True)
    return result


def stores_of_parts(folder: Path) -> list[Path]:
    """The answers of all parts that have been asked."""
    return sorted(folder.glob("answers.*-of-*.sqlite"))


def stores(folder: Path) -> list[Path]:
    """All answers that are there."""
    whole = folder / "answers.sqlite"
    return [*([whole] if whole.exists() else []), *stores_of_parts(folder)]
