"""A language model is trained further on a corpus, or on what was kept of it, and judged on text that was held out."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import arms, continuations, language_model, passages, perplexity, sft, splits, training, unfinished
from pipeline.config import Corpus, Recipe, Teacher, digest
from pipeline.continuations import Beginning
from pipeline.errors import UserError, required
from pipeline.known import alike
from pipeline.metrics import Interval
from pipeline.models import pick_device
from pipeline.perplexity import Predicted
from pipeline.shards import find_shards, fingerprint
from pipeline.storage import write_table, write_text
from pipeline.tracking import Result, Stage, corpus_of, progress, read_json, stage
from pipeline.training import Job

CHARACTERS_PER_TOKEN = 4
"""Of the text that is shown beside continuations."""


class FinetuneResult(Result):
    """The model on documents held out, before and after; a gain is in bits a byte saved."""

    model: str
    """What was trained further."""
    n_documents: int
    """Documents, of plain text passages, that were drawn."""
    n_trained_on: int
    n_held_out: int
    """Documents that were not trained on; `n_measured` of them were measured on."""
    n_copies: int
    """Documents that are neither, as half of it, or more, is in one that was trained on."""
    n_measured: int
    n_steps: int
    tokens_per_s: float | None
    """Tokens learned a second; None where nothing was logged."""
    perplexity_before: float
    perplexity_after: float
    bits_per_byte_before: float
    bits_per_byte_after: float
    gain: float
    gain_interval: Interval | None
    """None where a single document was measured on."""
    sentence: str


class Parts(NamedTuple):
    """Documents by what becomes of them."""

    taught: list[str]
    held_out: list[str]
    n_copies: int = 0


@dataclass(frozen=True)
class Look:
    """What a model makes of the documents measured on, (n,) each, and how it continues each prompt."""

    nats: list[float]
    tokens: list[int]
    n_bytes: list[int]
    continued: list[str]

    @property
    def predicted(self) -> Predicted:
        """The same as arrays."""
        return Predicted(np.array(self.nats), np.array(self.tokens), np.array(self.n_bytes))


def run(recipe: Recipe, redo: bool = False) -> FinetuneResult:
    """Look at the model, train, and look again; what an interrupted run has done is not done again."""
    check(recipe)
    found = corpus(recipe)
    with stage("finetune", recipe, inputs(recipe, found)) as work:
        unfinished.begin(work, redo)
        done = work.finished(FinetuneResult, redo, (work.folder / training.MODEL).exists())
        if done:
            return done
        parts = parted(passages.draw(found, recipe.finetune.documents, recipe.seed), recipe)
        measured = parts.held_out[: recipe.finetune.held_out_documents]
        asked = beginnings(recipe, measured)
        before = first_look(work, measured, asked)
        if not unfinished.is_trained(work):
            training.run(job(work, parts), recipe.finetune.launch)
        after = look(recipe, str(work.folder / training.MODEL), None, measured, asked)
        write_continuations(work.folder / "continuations.json", asked, before, after)
        return work.finish(summarise(work, parts, before, after))


def check(recipe: Recipe) -> None:
    """Refuse what can be known to fail before anything is read."""
    sft.check(recipe.finetune, "finetune")
    model = required(recipe.finetune.model, "finetune.model", "HuggingFaceTB/SmolLM2-135M")
    language_model.check_whole(model, "finetune.model")


def corpus(recipe: Recipe) -> Corpus:
    """The documents: all, or what the run's filter kept."""
    if recipe.finetune.on == "corpus":
        return recipe.corpus
    place = corpus_of("filter", recipe, "finetune")
    return Corpus(path=str(place), text_column=recipe.corpus.text_column)


def inputs(recipe: Recipe, found: Corpus) -> dict[str, Any]:
    """Everything that decides the model."""
    return {
        "finetune": recipe.finetune.identity(),
        "corpus": found.identity() if recipe.finetune.on == "corpus" else found.text_column,
        "shards": {shard.name: fingerprint(shard) for shard in find_shards(found)},
        "near_duplicates": recipe.train.near_duplicates,
        "seed": recipe.seed,
    }


# -- documents --------------------------------------------------------------------------------------------------------


def parted(texts: Sequence[str], recipe: Recipe) -> Parts:
    """Documents to learn from, and others that are nearly copies of none of them."""
    share, least = recipe.finetune.held_out_share, recipe.train.near_duplicates
    if len(texts) < 2:
        raise UserError(
            f"finetune: {recipe.corpus.path} holds {len(texts) or 'no'} distinct text{'s' * (not texts)}, and at least"
            " 2 are needed, of which one is held out; give more, in a .txt a paragraph each"
        )
    units = alike(texts, least)
    taught, held_out = splits.sides(units, [""] * len(units), share, recipe.seed)
    parts = Parts([texts[i] for i in taught], [texts[i] for i in held_out])
    if least is not None:
        parts = without_copies(parts)
    if not parts.taught or not parts.held_out:
        raise UserError(
            f"finetune.held_out_share: {share:g} of {len(texts)} texts ({len(set(units.tolist()))} that are not nearly"
            f" copies of each other) leaves none to {'measure on' if parts.taught else 'learn from'}; change it, or"
            " give more"
        )
    return parts


def without_copies(parts: Parts) -> Parts:
    """The same, less what is held out and, in good part, in a longer document that is learned: a quotation, a passage
    of another edition."""
    is_copy = arms.copied(parts.held_out, parts.taught)
    return Parts(parts.taught, splits.pick(parts.held_out, ~is_copy), int(is_copy.sum()))


def beginnings(recipe: Recipe, measured: Sequence[str]) -> list[Beginning]:
    """The prompts, or first words of documents measured on."""
    settings = recipe.finetune
    if settings.prompts:
        return [Beginning(prompt) for prompt in settings.prompts]
    characters = CHARACTERS_PER_TOKEN * settings.continuation_tokens
    found = (continuations.beginning(text, characters) for text in measured)
    return [each for each in found if each][: settings.n_continuations]


def job(work: Stage, parts: Parts) -> Job:
    """The training; the loss on what is held out is looked at where args.eval_strategy says when."""
    settings = work.recipe.finetune
    held_out = written(work.folder / "held_out.parquet", parts.held_out[: settings.held_out_documents])
    looked = held_out if settings.args.get("eval_strategy", "no") != "no" else None
    rows = written(work.folder / "rows.parquet", parts.taught)
    return training.job(work, settings, trainer="sft", rows=rows, held_out=looked)


def written(path: Path, texts: Sequence[str]) -> Path:
    """Texts as the trainer reads them."""
    write_table(path, pa.table({"text": pa.array(texts, pa.large_string())}))
    return path


# -- before and after -------------------------------------------------------------------------------------------------


def first_look(work: Stage, measured: Sequence[str], asked: Sequence[Beginning]) -> Look:
    """What the model was like before; kept, so that a run that goes on does not look again."""
    path, key = work.folder / "before.json", digest([work.inputs, measured, asked])
    kept = read_json(path)
    if kept and kept["made_from"] == key:
        return Look(**kept["look"])
    settings = work.recipe.finetune
    found = look(work.recipe, str(settings.model), settings.revision, measured, asked)
    write_text(path, json.dumps({"made_from": key, "look": asdict(found)}, ensure_ascii=False) + "\n")
    return found


def look(recipe: Recipe, name: str, revision: str | None, measured: Sequence[str], asked: Sequence[Beginning]) -> Look:
    """A model on the documents and prompts: in windows as long as the blocks that are learned."""
    settings = recipe.finetune
    tokenizer, model = language_model.load(name, "finetune.model", pick_device(settings.device), revision)
    length = sft.block(model, settings.args, "finetune")
    with progress("finetune: perplexity", None, unit="windows") as step:
        found = perplexity.predict(model, tokenizer, measured, length, step)
    ways = Teacher(
        model=name, max_tokens=settings.continuation_tokens, temperature=settings.temperature, seed=recipe.seed
    )
    prompts = [each.prompt for each in asked]
    told = continuations.continued(tokenizer, model, prompts, ways) if prompts else []
    return Look(found.nats.tolist(), found.tokens.tolist(), found.n_bytes.tolist(), told)


def write_continuations(path: Path, asked: Sequence[Beginning], before: Look, after: Look) -> None:
    """Side by side."""
    rows = [
        {"prompt": each.prompt, "before": old, "after": new, "original": each.original}
        for each, old, new in zip(asked, before.continued, after.continued, strict=True)
    ]
    write_text(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def summarise(work: Stage, parts: Parts, before: Look, after: Look) -> FinetuneResult:
    """All of it in figures."""
    old, new, recipe = before.predicted, after.predicted, work.recipe
    curve = training.read_curve(work.folder)
    last: dict[str, Any] = next((line for line in reversed(curve) if "loss" in line), {})
    gain = old.bits_per_byte - new.bits_per_byte
    interval = saved(old, new, recipe.seed) if len(old.nats) > 1 else None
    return FinetuneResult(
        seconds=work.seconds,
        model=str(recipe.finetune.model),
        n_documents=len(parts.taught) + len(parts.held_out) + parts.n_copies,
        n_trained_on=len(parts.taught),
        n_held_out=len(parts.held_out),
        n_copies=parts.n_copies,
        n_measured=len(old.nats),
        n_steps=max((line["step"] for line in curve), default=0),
        tokens_per_s=round(last["num_tokens"] / last["seconds"], 1) if last.get("seconds") else None,
        perplexity_before=old.perplexity,
        perplexity_after=new.perplexity,
        bits_per_byte_before=old.bits_per_byte,
        bits_per_byte_after=new.bits_per_byte,
        gain=gain,
        gain_interval=interval,
        sentence=sentence(old, new, gain, interval),
    )


def saved(old: Predicted, new: Predicted, seed: int) -> Interval:
    """Bootstrap 95% interval of the bits a byte that were saved."""
    low, high = perplexity.gain_interval(lambda found: -found.bits_per_byte, old, new, seed=seed)
    return low, high


def sentence(old: Predicted, new: Predicted, gain: float, interval: Interval | None) -> str:
    """What was found, in words."""
    n = len(old.nats)
    if interval is None:
        return f"A single document was measured on, which says little: {gain:+.3f} bits a byte saved."
    told = f"{gain:+.3f} bits a byte saved, 95% interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    ppl = f"held-out perplexity {old.perplexity:.4g} before, {new.perplexity:.4g} after"
    verdict = "Better" if interval[0] > 0 else "Worse" if interval[1] < 0 else "No difference found"
    return f"{verdict} on {n} texts held out: {ppl} ({told})."
