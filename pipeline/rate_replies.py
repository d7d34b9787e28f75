"""Align, second: the teacher rates the actor's replies, and the rows that have no score yet."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import consensus, conversations, judge, language_model, panel, rate, ratings, replies, spread, teacher
from pipeline.config import Recipe
from pipeline.consensus import Verdict
from pipeline.conversations import Exchange
from pipeline.corpus import text_id
from pipeline.errors import UserError
from pipeline.panel import Opinions, Rater
from pipeline.prompts import Prompt
from pipeline.rate import RateResult
from pipeline.sample import Document
from pipeline.shards import Counts
from pipeline.storage import content, write_table
from pipeline.teacher import AnswerStore
from pipeline.tracking import Stage, read_json, stage

log = logging.getLogger("gristmill")

MODEL = "actor/model"
"""Where the run folder holds the model whose replies are rated."""


class RepliesResult(RateResult):
    """What stage 1 did with replies. Rows are those of align.reward_data and the actor's replies; `n_not_drawn` counts
    those that are held out and those that say what another row says."""

    n_given: int
    """Replies with a score of their own, which nobody was asked about."""
    n_replies: int
    """Replies of the actor that were rated."""
    n_held_out: int
    """Rows to a prompt that is held out; success is measured on those."""
    n_copies: int
    n_too_long: int
    """Prompts that leave the actor no room for a reply."""


class Reply(NamedTuple):
    """A reply that is in the ratings, and where it comes from."""

    row: Exchange
    source: str

    @property
    def document(self) -> Document:
        """What the teacher rates; all replies to one prompt are one group."""
        asked, said, _ = self.row
        text = conversations.text(asked, said or "")
        return Document(text_id(text), text, group=text_id(asked))


class Material(NamedTuple):
    """What is to be in the ratings, each text once, and how many rows are not."""

    replies: list[Reply]
    n_rows: int
    n_held_out: int
    n_too_long: int


def run(recipe: Recipe, redo: bool = False) -> RepliesResult:
    """Have rated what has no score; answers and replies already recorded are not asked for again."""
    spread.by_one(recipe, "align rate")
    raters = panel.of(recipe)
    given = read(recipe, raters[0].prompt)
    with stage("rate", recipe, inputs(recipe, raters)) as work:
        done = work.finished(RepliesResult, redo, rate.is_whole(work.folder, 0))
        if done:
            return done
        material = gather(recipe, given)
        documents = [each.document for each in material.replies]
        texts = [d.text for d, each in zip(documents, material.replies, strict=True) if each.row.score is None]
        with AnswerStore(work.folder / "answers.sqlite") as store:
            calibrate = recipe.rate.calibrate and bool(texts)
            got = panel.collect("rate", raters, texts, store, recipe.rate, calibrate=calibrate, unit="replies")
            said = [panel.opinions(rater, texts, store, got.failed, calibrate) for rater in raters]
        asked = dict(zip(texts, consensus.verdicts(said, recipe.rate.consensus), strict=True))
        verdicts = [asked.get(d.text, known(each.row)) for d, each in zip(documents, material.replies, strict=True)]
        write(work, documents, material.replies, said, verdicts)
        counts = Counts(n_rows=material.n_rows)
        told = rate.summarise(work, documents, counts, said, verdicts, got, texts, None)
        result = RepliesResult.model_validate({**told.model_dump(), **in_figures(material)})
        check(result, work, said, verdicts)
        return work.finish(result)


def read(recipe: Recipe, prompt: Prompt) -> list[Exchange]:
    """The rows of align.reward_data, if there is anything to rate."""
    rows = read_given(recipe, prompt.scale)
    if not rows and not has_actor(recipe):
        raise UserError(
            "rate: there are no replies to rate; run gristmill align actor first, or give align.reward_data"
        )
    return rows


def read_given(recipe: Recipe, scale: tuple[float, float]) -> list[Exchange]:
    """The rows of align.reward_data; none where there is no file."""
    return conversations.of(recipe, "reward", needed=("completion",), scale=scale)


def has_actor(recipe: Recipe) -> bool:
    """Whether there is a finished actor whose replies are wanted."""
    return recipe.align.replies_per_prompt > 0 and (recipe.run_folder / "actor" / "result.json").exists()


OF_REPLIES = {"replies_per_prompt", "reply_tokens", "reply_temperature", "held_out_share"}
"""Settings of align that decide what is rated."""


def inputs(recipe: Recipe, raters: Sequence[Rater]) -> dict[str, Any]:
    """Everything that decides the ratings."""
    files = {
        f"{kind}/{path.name}": path for kind in ("prompts", "reward") for path in conversations.files(recipe, kind)
    }
    actor = read_json(recipe.run_folder / "actor" / "inputs.json") if has_actor(recipe) else None
    settings = recipe.rate.model_dump(mode="json", include={"repeats", "permute", "consensus", "calibrate"})
    return {
        "rows": {name: content(path) for name, path in files.items() if path.exists()},
        "actor": actor,
        "align": recipe.align.model_dump(mode="json", include=OF_REPLIES),
        "raters": {
            f"{rater.prompt.name}, {position}": {
                "prompt": rater.prompt.digest,
                "teacher": teacher.identity(rater.prompt, rater.teacher),
            }
            for position, rater in enumerate(raters)
        },
        "rate": settings,
        "seed": recipe.seed,
    }


# -- what is rated ----------------------------------------------------------------------------------------------------


def gather(recipe: Recipe, given: Sequence[Exchange]) -> Material:
    """Rows and replies to prompts that are not held out. Of rows that say the same the first counts, one with a score
    before one without."""
    made, n_too_long = written(recipe)
    rows = [*(Reply(row, "data") for row in given), *(Reply(row, "actor") for row in made)]
    taught = [each for each in rows if not conversations.for_judging(recipe, each.row.user_input)]
    found: dict[str, Reply] = {}
    for each in taught:
        name = each.document.id
        if name not in found or (found[name].row.score is None and each.row.score is not None):
            found[name] = each
    if not found:
        raise UserError(f"rate: all {len(rows)} rows are to prompts that are held out; give more, or lower the share")
    return Material(list(found.values()), len(rows), len(rows) - len(taught), n_too_long)


def written(recipe: Recipe) -> tuple[list[Exchange], int]:
    """The actor's replies to the prompts it may learn on, and how many prompts are too long."""
    if not has_actor(recipe):
        return [], 0
    model = str(recipe.run_folder / MODEL)
    language_model.check_whole(model, "actor")
    taught, n_too_long = replies.fitting(recipe, model, "actor", conversations.prompts(recipe)[0])
    seeds = [recipe.seed + number for number in range(recipe.align.replies_per_prompt)]
    said = replies.write_several(recipe, model, taught, None, seeds)
    by_prompt = zip(taught, zip(*said, strict=True), strict=True)
    return [Exchange(prompt, reply) for prompt, some in by_prompt for reply in some], n_too_long


def known(row: Exchange) -> Verdict:
    """The verdict on a row that has a score."""
    return Verdict(row.score, None, {}, None, 0)


# -- what is left -----------------------------------------------------------------------------------------------------


def write(
    work: Stage,
    documents: Sequence[Document],
    found: Sequence[Reply],
    said: Sequence[Opinions],
    verdicts: Sequence[Verdict],
) -> None:
    """The ratings, and the same as conversations. A row with a score of its own has no opinions."""
    prompt, asked = said[0].rater.prompt, [each.row.score is None for each in found]
    chosen = [(d, v) for d, v, is_asked in zip(documents, verdicts, asked, strict=True) if is_asked]
    table = ratings.table([d for d, _ in chosen], list(said), [v for _, v in chosen])
    own = [
        {**document._asdict(), "score": verdict.score, "n_opinions": 0, "opinions": []}
        for document, verdict, is_asked in zip(documents, verdicts, asked, strict=True)
        if not is_asked
    ]
    table = pa.concat_tables([table, pa.Table.from_pylist(own, ratings.schema(prompt.scale, prompt.attributes))])
    at = np.argsort(np.argsort(np.logical_not(asked), kind="stable"), kind="stable")
    write_table(work.folder / "ratings.parquet", table.take(at))
    conversations.write(
        work.folder / "replies.jsonl",
        (
            {**each.row._asdict(), "score": verdict.score, "reason": verdict.reason, "source": each.source}
            for each, verdict in zip(found, verdicts, strict=True)
        ),
    )


def in_figures(material: Material) -> dict[str, int]:
    """Where rows came from, and where those went that are not in the ratings."""
    return {
        "n_given": sum(each.row.score is not None for each in material.replies),
        "n_replies": sum(each.source == "actor" for each in material.replies),
        "n_held_out": material.n_held_out,
        "n_copies": material.n_rows - material.n_held_out - len(material.replies),
        "n_too_long": material.n_too_long,
    }


def check(result: RepliesResult, work: Stage, said: list[Opinions], verdicts: Sequence[Verdict]) -> None:
    """Stop where too much has no score, or where nothing can be learned from the scores."""
    n_asked = result.n_sampled - result.n_given
    if n_asked:
        of_asked = {"n_sampled": n_asked, "n_scored": result.n_scored - result.n_given}
        rate.check_readable(result.model_copy(update=of_asked), work.recipe, work, said)
    judge.warn_of_cuts("rate", result.n_truncated)
    scores = {verdict.score for verdict in verdicts if verdict.score is not None}
    if len(scores) == 1:
        raise UserError(
            f"rate: all {result.n_scored} scores are {next(iter(scores)):g}, and nothing can be learned from that;"
            f" read the answers with gristmill show {work.folder}, then mend the prompt or choose another teacher"
        )
