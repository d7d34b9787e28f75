"""Fine-tuning the encoder together with its heads (train.head: full), for those who pay."""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.arguments import configured
from pipeline.encoder import Encoder
from pipeline.errors import needs
from pipeline.heads import known
from pipeline.metrics import Bools, Floats
from pipeline.student import Head, Layer
from pipeline.targets import Target, TrainingSet

log = logging.getLogger("gristmill")

DEFAULTS = {
    "num_train_epochs": 3,
    "learning_rate": 3e-5,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "report_to": [],
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
}
"""TrainingArguments where the recipe says nothing."""

Example = dict[str, list[int] | list[float]]


def tune(
    encoder: Encoder, heads: list[Head], given: TrainingSet, parts: Any, folder: Path, seed: int, args: dict[str, Any]
) -> list[Head]:
    """Train the linear `heads` of scores further, together with the encoder, whose weights change in place (linear
    probing, then fine-tuning, arXiv:2202.10054). What was best on the validation part is kept, be it the begin."""
    transformers = needs("transformers", "torch")
    settings = arguments(encoder, folder, seed, args)
    targets = [next(target for target in given.targets if target.name == head.name) for head in heads]
    units = [unit(target, parts == "train") for target in targets]
    network = joined(encoder, heads, units)
    keeper = best_keeper(network)
    trainer = transformers.Trainer(
        model=network,
        args=settings,
        train_dataset=examples(encoder, given, targets, units, parts == "train"),
        eval_dataset=examples(encoder, given, targets, units, parts == "validation"),
        data_collator=collator(encoder),
        callbacks=[keeper],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    keeper.restore()
    encoder.model.eval()
    log.info(
        "train: least loss on the validation part: %.4f, %.4f before fine-tuning", min(keeper.seen), keeper.seen[0]
    )
    return unjoined(network, heads, units)


def arguments(encoder: Encoder, folder: Path, seed: int, args: dict[str, Any]) -> Any:
    """TrainingArguments of the recipe, laid over the defaults."""
    kind = needs("transformers", "torch").TrainingArguments
    ours = {"output_dir": str(folder), "seed": seed, "disable_tqdm": not sys.stderr.isatty()}
    on_cpu = {"use_cpu": encoder.model.device.type == "cpu"}
    return configured(kind, {**DEFAULTS, **ours, **on_cpu, **args}, "train.args", args)


def unit(target: Target, learned: Bools) -> tuple[float, float]:
    """Mean and spread of what is learned, so that every score weighs the same in the loss."""
    scores = [target.values[i] for i in np.flatnonzero(known(target) & learned)]
    return float(np.mean(scores)), max(float(np.std(scores)), 1e-9)


def examples(
    encoder: Encoder, given: TrainingSet, targets: list[Target], units: list[tuple[float, float]], chosen: Bools
) -> list[Example]:
    """Each window of the chosen documents with its document's scores in units of their spread, NaN where missing."""
    scores = np.array([[np.nan if value is None else value for value in target.values] for target in targets])
    scores = (scores - np.array(units)[:, :1]) / np.array(units)[:, 1:]
    rows = np.flatnonzero(chosen & np.isfinite(scores).any(axis=0))
    read = encoder.read([given.texts[i] for i in rows])
    return [
        {"input_ids": ids.tolist(), "labels": scores[:, rows[owner]].tolist()}
        for ids, owner in zip(read.ids, read.owners.tolist(), strict=True)
    ]


def collator(encoder: Encoder) -> Any:
    """Pads a batch of examples."""
    torch, padding = encoder.torch, encoder.tokenizer.pad_token_id or 0

    def collate(batch: list[Example]) -> dict[str, Any]:
        longest = max(len(example["input_ids"]) for example in batch)
        ids = [[*example["input_ids"], *[padding] * (longest - len(example["input_ids"]))] for example in batch]
        mask = [[int(i < len(example["input_ids"])) for i in range(longest)] for example in batch]
        labels = torch.tensor([example["labels"] for example in batch], dtype=torch.float32)
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": labels}

    return collate


# -- the network ------------------------------------------------------------------------------------------------------


def joined(encoder: Encoder, heads: list[Head], units: list[tuple[float, float]]) -> Any:
    """Encoder and heads as one torch module, which gives the mean squared error over the scores that are known."""
    torch = encoder.torch

    class Network(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder.model
            weight, bias = stacked(heads, units)
            self.heads = torch.nn.Linear(weight.shape[1], len(bias))
            with torch.no_grad():
                self.heads.weight.copy_(torch.from_numpy(weight))
                self.heads.bias.copy_(torch.from_numpy(bias))

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
            found = self.encoder({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]
            scores = self.heads(found)
            there = ~torch.isnan(labels)
            return {"loss": torch.nn.functional.mse_loss(scores[there], labels[there]), "scores": scores}

    return Network().to(encoder.model.device)


def stacked(heads: list[Head], units: list[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Weights (n_heads, dim) and biases (n_heads,) of linear heads in units of the scores' spread."""
    weight = np.concatenate([head.layers[0].weight / spread for head, (_, spread) in zip(heads, units, strict=True)])
    bias = [(head.layers[0].bias[0] - about) / spread for head, (about, spread) in zip(heads, units, strict=True)]
    return weight, np.array(bias, dtype=np.float32)


def unjoined(network: Any, heads: list[Head], units: list[tuple[float, float]]) -> list[Head]:
    """The heads with what they have learned, in points of their scales."""
    weights = network.heads.weight.detach().float().cpu().numpy()
    biases = network.heads.bias.detach().float().cpu().numpy()
    return [
        dataclasses.replace(head, layers=(Layer(weights[[i]] * np.float32(spread), biases[[i]] * spread + about),))
        for i, (head, (about, spread)) in enumerate(zip(heads, units, strict=True))
    ]


def best_keeper(network: Any) -> Any:
    """A callback that keeps the weights of the least loss on the validation part."""
    transformers = needs("transformers", "torch")

    class Keeper(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.seen: list[float] = []
            self.best: dict[str, Any] = {}

        def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
            self.seen.append(metrics["eval_loss"])
            if not self.best or metrics["eval_loss"] < min(self.seen[:-1]):
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}

        def restore(self) -> None:
            network.load_state_dict(self.best)

    return Keeper()
