"""Beside stage 1: a teacher sorts a sample of a corpus, or of each of several, into the labels of a taxonomy."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel

from pipeline import bars, corpora, engines, labels, panel, parts, prompts, teacher
from pipeline.bars import Bars
from pipeline.config import Label, Recipe, Teacher
from pipeline.corpora import Listed
from pipeline.errors import Pending, UserError, needs, required
from pipeline.panel import Rater, Start
from pipeline.parts import PartResult
from pipeline.sample import draw, where_rows_went
from pipeline.shards import find_shards, fingerprint
from pipeline.spending import check_budget
from pipeline.storage import write_text
from pipeline.teacher import Ask
from pipeline.tracking import Result, Stage, dump, stage

log = logging.getLogger("gristmill")


class LabelResult(Result):
    """What became of one corpus. Rates and shares are of the sample, no_match_share of what has a label."""

    n_rows: int
    n_empty: int
    n_bad_rows: int
    n_repaired_texts: int
    n_not_drawn: int
    """Rows with text that the sample left out, copies of a drawn text among them."""
    n_sampled: int
    n_labelled: int
    n_asked: int
    """Questions asked in this run, failed ones among them; the other answers were recorded before."""
    n_reused: int
    n_failed: int
    """Questions whose request failed; --redo asks them again."""
    n_not_asked: int
    """Questions that the budget left out; the same command with more of it goes on."""
    stopped_by: str | None
    n_truncated: int
    """Documents cut to teacher.document_tokens."""
    unlabelled: dict[str, int]
    unlabelled_rate: float
    strata: dict[str, int]
    labels_per_document: float | None
    levels: labels.LevelCounts
    no_match: str
    """The label of a document that fits no other."""
    no_match_share: float | None
    n_unknown_labels: int
    """Times that something was written which the taxonomy does not have."""
    n_different_unknown_labels: int
    unknown_labels: dict[str, int]
    """The commonest of them."""
    prompt_tokens: int
    answer_tokens: int
    usd: float | None
    """At the prices given; None without them."""
    tokens_per_s: float | None
    """Prompt and answer tokens a second, loading left out."""
    docs_per_s: float | None


State = Literal["done", "skipped", "stopped", "waiting", "failed"]
"""skipped: done before. stopped: the budget left documents out. waiting: for answers to a batch file."""


class Outcome(BaseModel, frozen=True, extra="forbid"):
    """What became of one of several corpora."""

    path: str
    text_column: str | None
    title: str
    folder: str
    """Its folder in the run folder."""
    state: State
    reason: str | None
    result: LabelResult | PartResult | None


class SeveralResult(Result):
    """What became of several corpora; also in labels.json."""

    n_sampled: int
    n_labelled: int
    states: dict[str, int]
    corpora: list[Outcome]


def run(recipe: Recipe, redo: bool = False) -> LabelResult | PartResult | SeveralResult:
    """Label a sample of the corpus, or of each listed one; answers already recorded are not asked for again."""
    rater = rater_of(recipe)
    recipe = recipe.model_copy(update={"label": parts.share(recipe.label, recipe.shard)})
    if recipe.label.datasets is None:
        return label(recipe, rater, redo, engines.of(recipe))[0]
    return label_all(corpora.read(recipe.label.datasets), recipe, rater, redo)


def rater_of(recipe: Recipe) -> Rater:
    """Who is asked what, if nothing in the settings speaks against it."""
    path = required(recipe.label.prompt, "label.prompt", "prompts/domains.md")
    if not path.is_file():
        raise UserError(f"label.prompt: {path} does not exist; give a prompt file such as prompts/domains.md")
    prompt = prompts.load(path, "label.prompt")
    if prompt.read != "label":
        raise UserError(
            f"label.prompt: {path} asks for no label; give one with read: label, such as prompts/domains.md"
        )
    check_budget(recipe.label, [recipe.teacher])
    return Rater(prompt, recipe.teacher)


# -- one corpus -------------------------------------------------------------------------------------------------------


def label(recipe: Recipe, rater: Rater, redo: bool, start: Start) -> tuple[LabelResult | PartResult, bool]:
    """Label one corpus, or ask about a part of it; says too whether that had been done before."""
    with stage("label", recipe, inputs(recipe, rater)) as work:
        done = parts.finished(work, LabelResult, redo, (work.folder / "labels.parquet").exists())
        if done:
            return done, True
        documents, counts = draw(recipe.corpus, recipe.label, recipe.seed)
        texts = [document.text for document in documents]
        if recipe.shard:
            return parts.asked(work, [rater], texts, recipe.label, start=start), False
        with parts.gathered(work) as store:
            got = panel.collect("label", [rater], texts, store, recipe.label, start)
            said = panel.opinions(rater, texts, store, got.failed)
        labels.write(work.folder / "labels.parquet", documents, said)
        result = LabelResult(
            seconds=work.seconds,
            **where_rows_went(counts, documents),
            **labels.in_figures(rater.prompt, said.readings),
            **got.spending.in_figures([rater.teacher], work.seconds),
            n_failed=len(got.failed),
            n_not_asked=got.n_not_asked,
            n_truncated=sum(answer.was_truncated for answer in said.answers),
        )
        check_readable(result, work)
        picture(work.folder, [as_bars(str(recipe.corpus.path), result)], rater)
        return parts.put_together(work, result), False


def inputs(recipe: Recipe, rater: Rater) -> dict[str, Any]:
    """Everything that decides the labels."""
    return {
        "corpus": recipe.corpus.identity(),
        "shards": {shard.name: fingerprint(shard) for shard in find_shards(recipe.corpus)},
        "prompt": rater.prompt.digest,
        "teacher": teacher.identity(rater.prompt, rater.teacher),
        "label": recipe.label.identity(),
        "seed": recipe.seed,
    }


class Unreadable(UserError):
    """Too few labels; what was asked has been paid for all the same."""

    def __init__(self, result: LabelResult, message: str) -> None:
        super().__init__(message)
        self.result = result


def check_readable(result: LabelResult, work: Stage) -> None:
    """Stop when too much of what was asked has no label; labels and answers stay to be looked at."""
    n_asked = result.n_sampled - result.unlabelled.get("not_asked", 0)
    n_unlabelled = n_asked - result.n_labelled
    if n_asked == 0:
        raise UserError(f"label: {result.stopped_by} leaves room for no document; raise it")
    if n_unlabelled > work.recipe.label.max_unscored_rate * n_asked or result.n_labelled == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in result.unlabelled.items())
        written = ", ".join(f"{name!r} {count}" for name, count in list(result.unknown_labels.items())[:3])
        raise Unreadable(
            result,
            f"label: {n_unlabelled} of {n_asked} documents have no label ({reasons}"
            f"{f'; not in the taxonomy: {written}' if written else ''}); read the answers with gristmill show"
            f" {work.folder}, then mend the prompt or choose another teacher; where the request failed, the same"
            " command asks again",
        )
    if result.n_failed:
        log.info("label: %d requests failed; run again with --redo to ask only them again", result.n_failed)


def as_bars(title: str, result: LabelResult) -> Bars:
    """What is drawn of a corpus: shares of the documents that were asked about."""
    n_asked = result.n_sampled - result.unlabelled.get("not_asked", 0)
    return Bars(title, result.levels, result.no_match, n_asked, n_asked - result.n_labelled)


def picture(folder: Path, all_bars: Sequence[Bars], rater: Rater) -> None:
    """Draw the distribution, if there is something to draw with."""
    try:
        needs("matplotlib", "plots")
    except UserError as error:
        log.info("label: no picture: %s", error)
        return
    title = f"Labels by {str(rater.teacher.model).rpartition('/')[2]}, prompt {rater.prompt.name}"
    bars.draw(folder, all_bars, title, "A document can have several labels" if rater.prompt.multi else "")


# -- several corpora --------------------------------------------------------------------------------------------------


class NoTeacher(UserError):
    """The teacher cannot be started, for whichever corpus."""


def label_all(listed: list[Listed], recipe: Recipe, rater: Rater, redo: bool) -> SeveralResult:
    """Label one corpus after the other, whatever becomes of each; the model is loaded once, and only if needed."""
    begin, found = time.perf_counter(), list[Outcome]()
    with kept_running(engines.of(recipe)) as start:
        for entry, title in zip(listed, corpora.titles(listed), strict=True):
            log.info("label: %s (%d of %d)", title, len(found) + 1, len(listed))
            limits = left_over(recipe.label, found, time.perf_counter() - begin)
            alone = corpora.of(recipe.model_copy(update={"label": limits}), entry)
            found.append(one_of_them(entry, title, alone, rater._replace(teacher=alone.teacher), redo, start))
    result = SeveralResult(
        seconds=round(time.perf_counter() - begin, 3),
        n_sampled=sum(each.result.n_sampled for each in found if each.result),
        n_labelled=sum(each.result.n_labelled for each in found if isinstance(each.result, LabelResult)),
        states={state: sum(each.state == state for each in found) for state in get_args(State)},
        corpora=found,
    )
    if recipe.shard:
        return result
    write_text(recipe.run_folder / "labels.json", dump(result.model_dump(mode="json")))
    done = [(each.title, each.result) for each in found if each.state != "failed"]
    drawn = [as_bars(title, result) for title, result in done if isinstance(result, LabelResult)]
    if drawn:
        picture(recipe.run_folder, drawn, rater)
    return result


@contextmanager
def kept_running(begin: Start) -> Iterator[Start]:
    """Starts a teacher when it is first asked, and keeps it for all that follow; one that is asked by file is started
    for each, for it leaves its files when it ends."""
    running: list[Ask] = []
    with ExitStack() as until_the_end:

        @contextmanager
        def start(teacher: Teacher) -> Iterator[Ask]:
            if teacher.batch_folder:
                with begin(teacher) as ask:
                    yield ask
                return
            if not running:
                try:
                    running.append(until_the_end.enter_context(begin(teacher)))
                except UserError as error:
                    raise NoTeacher(str(error)) from None
            yield running[0]

        yield start


LEAST = {"budget_usd": 1e-9, "budget_tokens": 1, "budget_minutes": 1e-9}
"""What stands for a budget that is used up: nothing can be had for it, and it is a setting still."""


def left_over(limits: Label, found: list[Outcome], seconds: float) -> Label:
    """The limits for the next corpus: budgets hold for all corpora together."""
    spent = [each.result for each in found if each.result]
    used = {
        "budget_usd": sum(result.usd or 0 for result in spent),
        "budget_tokens": sum(result.prompt_tokens + result.answer_tokens for result in spent),
        "budget_minutes": seconds / 60,
    }
    given = {name: getattr(limits, name) for name in used}
    left = {name: max(limit - used[name], LEAST[name]) for name, limit in given.items() if limit is not None}
    return limits.model_copy(update=left)


def used_up(limits: Label) -> str | None:
    """The budget of which nothing is left."""
    left = {name: getattr(limits, name) for name in LEAST}
    return next((name for name, limit in left.items() if limit is not None and limit <= LEAST[name]), None)


def one_of_them(entry: Listed, title: str, recipe: Recipe, rater: Rater, redo: bool, start: Start) -> Outcome:
    """Label one of several corpora, or say why not; what would stop all of them stops here too."""
    fate: dict[str, Any] = {"state": "stopped", "reason": used_up(recipe.label), "result": None}
    if fate["reason"] is None or (recipe.run_folder / "label" / "result.json").exists():
        try:
            result, was_done = label(recipe, rater, redo, start)
            state = "skipped" if was_done else "stopped" if result.stopped_by else "done"
            fate = {"state": state, "reason": result.stopped_by, "result": result}
        except NoTeacher:
            raise
        except UserError as error:
            log.warning("label: %s: %s", title, error)
            state = "waiting" if isinstance(error, Pending) else "failed"
            paid = error.result if isinstance(error, Unreadable) else None
            fate = {"state": state, "reason": str(error), "result": paid}
    folder = recipe.run_folder.name
    return Outcome(path=entry.path, text_column=entry.text_column, title=title, folder=folder, **fate)


def check_all_done(result: Result) -> None:
    """Complain of the corpora that failed, or else of those that wait."""
    outcomes = result.corpora if isinstance(result, SeveralResult) else []
    failed = [each for each in outcomes if each.state == "failed"]
    if failed:
        told = "; ".join(f"{each.title}: {each.reason}" for each in failed[:3])
        more = f"; and {len(failed) - 3} more, see labels.json" if len(failed) > 3 else ""
        raise UserError(f"label: {len(failed)} of {len(outcomes)} corpora failed: {told}{more}")
    waiting = [each for each in outcomes if each.state == "waiting"]
    if waiting:
        raise Pending(f"label: {len(waiting)} of {len(outcomes)} corpora wait for answers: {waiting[0].reason}")
