"""Does the filter help? The same small model learns, equally long, from what was kept, from a random draw and from
what was rejected; texts that the filter never saw tell which of them taught it most."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import (
    arms,
    benchmarks,
    contrast,
    language_model,
    locks,
    perplexity,
    proof,
    prove_picture,
    sft,
    spread,
    storage,
    training,
)
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.metrics import Floats
from pipeline.models import pick_device
from pipeline.proof import Proof, Training
from pipeline.shards import fingerprint
from pipeline.tracking import Result, Stage, progress, read_json, stage

log = logging.getLogger("gristmill")

OURS = ("max_steps", "num_train_epochs", "packing", "packing_strategy")
"""Arguments that the budget of tokens sets."""
N_POINTS, CURVE_BLOCKS = 6, 48
"""Points of a learning curve, and blocks of the trusted texts that each is measured on."""
IN_USE = ".in-use.lock"
"""Held by all that train."""
WATCHED = "trusted.parquet"
"""Blocks of the trusted texts, for the learning curves."""
PREDICTED, JUDGED = "predicted.parquet", "judged.json"
"""What a training leaves: the first, written last, says that it is done."""


class ProveResult(Result):
    """What the arms learned, in bits per byte of the trusted texts: less is better."""

    model: str
    """prove.model, or the shape of one from scratch."""
    n_parameters: int
    tokens: int
    """Tokens that each training read."""
    n_steps: int
    n_seeds: int
    trusted: str
    n_trusted: int
    """Documents judged on."""
    n_trusted_copies: int
    """Documents left out as they are, nearly or in part, in the corpus."""
    n_trusted_repeated: int
    """Documents left out as they say what another one says."""
    arms: dict[str, dict[str, Any]]
    """By arm: n_documents and n_tokens there are, epochs, bits_per_byte with its interval and by_seed, and curve."""
    comparisons: list[dict[str, Any]]
    """Bits a byte that the arm `better` saves against `than`, with the interval and a sentence."""
    tasks: list[dict[str, Any]]
    """By task and arm: metric, value and interval."""
    task_comparisons: list[dict[str, Any]]
    """Of the same: gain, interval and a sentence."""
    sentence: str
    """The first comparison's."""


class PartResult(Result):
    """What one part of the trainings came to."""

    part: str
    """i/n."""
    n_trainings: int
    n_trained: int
    """Those done this time."""


def run(recipe: Recipe, redo: bool = False) -> ProveResult | PartResult:
    """Draw, train and judge, or train a part of it; a training that is done is not done again."""
    check(recipe)
    with stage("prove", recipe, inputs(recipe)) as work:
        done = finished(work, redo)
        if done:
            return done
        with prepared(work, redo) as made:
            own = spread.part(made.trainings, recipe.shard)
            n_trained = train_all(work, made, own)
            if recipe.shard:
                part = PartResult(seconds=work.seconds, part=recipe.shard, n_trainings=len(own), n_trained=n_trained)
                return work.finish(part)
            result = summarise(recipe, work, made)
        try:
            prove_picture.draw(work.folder / "prove.png", result.model_dump())
        except UserError as error:
            log.warning("prove: there is no picture: %s", error)
        return work.finish(result)


def finished(work: Stage, redo: bool) -> ProveResult | PartResult | None:
    """The result of the whole, or of this part, if it is there."""
    if work.recipe.shard and not (work.folder / "result.json").exists():
        return work.finished(PartResult, redo, True, start=False)
    return work.finished(ProveResult, redo, True, start=False)


def check(recipe: Recipe) -> None:
    """Refuse what would say nothing, before any work."""
    settings = recipe.prove
    if len(settings.arms) < 2 or len(set(settings.arms)) < len(settings.arms):
        raise UserError("prove.arms: give two or three different ones, such as [kept, random]")
    for name in OURS:
        if name in settings.args:
            raise UserError(f"prove.args.{name}: prove.tokens says how long each arm is read; leave it out")
    sft.check(settings, "prove")
    if settings.model:
        language_model.check_whole(settings.model, "prove.model")
    if settings.tasks:
        benchmarks.check(settings.tasks)
    if settings.seeds == 1:
        log.warning("prove.seeds: one training each says nothing of chance, so there will be no intervals; give 3")


def inputs(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides what is found."""
    found = arms.locate(recipe)
    shards = {"scored": found[1], "kept": found[3], "trusted": arms.locate_trusted(recipe)[1]}
    return {
        "prove": recipe.prove.identity(),
        "text_column": recipe.corpus.text_column,
        "seed": recipe.seed,
        **{name: {shard.name: fingerprint(shard) for shard in there} for name, there in shards.items()},
    }


@contextmanager
def prepared(work: Stage, redo: bool) -> Iterator[Proof]:
    """All trainings, which nobody begins anew while they are in use; parts come to it one after another."""
    with ExitStack() as use:
        with locks.held(work.folder / ".prepared.lock", "", wait=True):
            begin(work, redo)
            made = proof.prepare(work.recipe, work.folder)
            write_blocks(work.folder / WATCHED, curve_blocks(made))
            use.enter_context(locks.held(work.folder / IN_USE, "", shared=True, wait=True))
        yield made


def begin(work: Stage, redo: bool) -> None:
    """Go on with the trainings there are, if they were made from the same; with redo, from nothing else."""
    made = [work.folder / name for name in ("trainings", "scratch")]
    if not redo and any(path.exists() for path in made):
        work.refuse_changes()
    if read_json(work.folder / "inputs.json") != work.inputs:
        refusal = f"prove: parts with other settings are at work in {work.folder}; wait for them or stop them"
        with locks.held(work.folder / IN_USE, refusal):
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
    work.start()


# -- trainings --------------------------------------------------------------------------------------------------------


def train_all(work: Stage, made: Proof, own: list[Training]) -> int:
    """Do the trainings that are not done, here one after another or in the actors of a cluster; how many."""
    todo = [each for each in own if not (each.folder / PREDICTED).exists()]
    with progress("prove", len(own), unit="trainings", already=len(own) - len(todo)) as step:
        for _ in spread.over(work.recipe, partial(learner, work, made), todo):
            step(1)
    return len(todo)


def learner(work: Stage, made: Proof) -> Callable[[Training], None]:
    """Does one training after another, as long as no other process has begun or done it."""

    def one(each: Training) -> None:
        with locks.written_by_one(each.folder, "training"):
            if not (each.folder / PREDICTED).exists():
                learn(work, made, each)

    return one


def learn(work: Stage, made: Proof, each: Training) -> None:
    """Train, judge, and remove what is not needed any more."""
    log.info("prove: %s, seed %d (%d trainings in all)", each.arm, each.seed, len(made.trainings))
    settings, rows = work.recipe.prove, each.folder / "rows.parquet"
    each.folder.mkdir(parents=True, exist_ok=True)
    write_blocks(rows, each.blocks)
    watched = {"eval_strategy": "steps", "eval_steps": 1 / N_POINTS, "per_device_eval_batch_size": 16}
    job = training.job(
        work,
        settings,
        trainer="sft",
        model=settings.model or str(work.folder / "scratch" / str(each.seed)),
        rows=rows,
        held_out=work.folder / WATCHED,
        folder=each.folder,
        args={"packing": False, "num_train_epochs": 1, **watched, **proof.arguments(settings)},
        seed=each.seed,
    )
    judge(work.recipe, made, training.run(job, settings.launch), each.folder)
    rows.unlink()
    shutil.rmtree(each.folder / training.MODEL, ignore_errors=True)


def write_blocks(path: Path, blocks: NDArray[np.int32]) -> None:
    """Blocks (n_blocks, length) as rows that are tokens already."""
    flat = pa.array(blocks.ravel(), pa.int32())
    ids = pa.ListArray.from_arrays(pa.array(np.arange(0, blocks.size + 1, blocks.shape[1]), pa.int32()), flat)
    storage.write_table(path, pa.table({"input_ids": ids}))


def curve_blocks(made: Proof) -> NDArray[np.int32]:
    """Blocks of the trusted texts for the learning curve."""
    read = proof.tokens_of(made.tokenizer, made.texts, CURVE_BLOCKS * made.length)
    return proof.blocks(read, max(1, sum(map(len, read)) // made.length) * made.length, made.length, 0)[:CURVE_BLOCKS]


def judge(recipe: Recipe, made: Proof, model: Path, folder: Path) -> None:
    """Leave what a trained model makes of every trusted text, and of the tasks."""
    settings, device = recipe.prove, pick_device(recipe.prove.device)
    tokenizer, loaded = language_model.load(str(model), "prove.model", device)
    found = perplexity.predict(loaded, tokenizer, made.texts, made.length)
    n_parameters = loaded.num_parameters()
    del loaded
    answers = benchmarks.evaluate(model, settings.tasks, settings.task_documents, device, recipe.seed)
    storage.write_text(folder / JUDGED, json.dumps({"n_parameters": n_parameters, "tasks": answers}))
    storage.write_table(folder / PREDICTED, pa.table(found._asdict()))


# -- what was found ---------------------------------------------------------------------------------------------------


def summarise(recipe: Recipe, work: Stage, made: Proof) -> ProveResult:
    """Every arm in figures, and each against each."""
    settings = recipe.prove
    tables = {(each.arm, each.seed): storage.read_table(each.folder / PREDICTED) for each in made.trainings}
    said = {(each.arm, each.seed): read_json(each.folder / JUDGED) or {} for each in made.trainings}
    first = next(iter(tables.values()))
    n_bytes = first["n_bytes"].to_numpy()
    bits: dict[str, Floats] = {
        arm: np.stack([tables[arm, seed]["nats"].to_numpy() / math.log(2) for seed in range(settings.seeds)])
        for arm in settings.arms
    }
    pairs = [pair for pair in combinations(("kept", "random", "rejected"), 2) if set(pair) <= set(settings.arms)]
    compared = [contrast.compare(*pair, bits, n_bytes) for pair in pairs]
    tasks, task_comparisons = benchmarks.summarise(said, settings.arms, pairs)
    curves = {(each.arm, each.seed): training.read_curve(each.folder) for each in made.trainings}
    per_byte = first["tokens"].to_numpy().sum() / n_bytes.sum() / math.log(2)
    n_steps = max(line["step"] for line in next(iter(curves.values())))
    return ProveResult(
        seconds=work.seconds,
        model=settings.model or f"Llama from scratch, {settings.layers} layers of {settings.hidden_size}",
        n_parameters=next(iter(said.values()))["n_parameters"],
        tokens=made.tokens,
        n_steps=n_steps,
        n_seeds=settings.seeds,
        trusted=str(settings.trusted),
        n_trusted=len(made.texts),
        n_trusted_copies=made.n_copies,
        n_trusted_repeated=made.n_repeated,
        arms={
            arm: made.arms[arm]
            | in_figures(bits[arm], n_bytes)
            | {"curve": curve([curves[arm, seed] for seed in range(settings.seeds)], made.tokens, n_steps, per_byte)}
            for arm in settings.arms
        },
        comparisons=compared,
        tasks=tasks,
        task_comparisons=task_comparisons,
        sentence=compared[0]["sentence"],
    )


def in_figures(bits: Floats, n_bytes: NDArray[np.int64]) -> dict[str, Any]:
    """Bits per byte of an arm, over its seeds and by seed."""
    found = contrast.estimate(bits, n_bytes)
    by_seed = (bits.sum(axis=1) / n_bytes.sum()).tolist()
    return {"bits_per_byte": found.value, "interval": found.interval, "by_seed": by_seed}


def curve(lines: list[list[dict[str, Any]]], tokens: int, n_steps: int, per_byte: float) -> list[dict[str, float]]:
    """Bits per byte on some of the trusted texts while an arm learned, mean over its seeds, from nats a token."""
    points: dict[int, list[float]] = {}
    for line in (line for of_seed in lines for line in of_seed if "eval_loss" in line):
        points.setdefault(line["step"], []).append(line["eval_loss"] * per_byte)
    return [
        {"tokens": round(step / n_steps * tokens), "bits_per_byte": sum(values) / len(values)}
        for step, values in sorted(points.items())
    ]
