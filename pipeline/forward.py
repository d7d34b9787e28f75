"""How an encoder computes: over packs where it can, else in padded batches."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config, packed
from pipeline.errors import needs
from pipeline.windows import Ids
from pipeline.workers import Effort

log = logging.getLogger("gristmill")

Embeddings = NDArray[np.float32]
Lengths = NDArray[np.int64]

PACK_TOKENS = {"cpu": 2048, "cuda": 32_768}
BATCH_TOKENS = 4096
"""Tokens in one pack, by device, and in one padded batch."""
THREADS_A_GPU = 3
"""One computes while the others tokenise."""
FURTHEST = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}
"""1 - cosine that may lie between an embedding over packs and the model's own."""


class Padded:
    """By the model itself, in batches of windows of similar length."""

    def __init__(self, model: Any, batch_tokens: int, effort: Effort) -> None:
        self.torch = needs("torch", "torch")
        self.model, self.batch_tokens, self.effort = model, batch_tokens, effort
        self.padding = model.tokenizer.pad_token_id or 0

    def cut(self, lengths: Lengths) -> Iterator[list[int]]:
        """Indices of windows of such lengths, in batches."""
        return batches(lengths, self.batch_tokens)

    def __call__(self, rows: Sequence[Ids]) -> Embeddings:
        """Embeddings (n_windows, dim) of one batch."""
        longest = max(map(len, rows))
        padded = np.full((len(rows), longest), self.padding, np.int64)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(rows):
            padded[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        self.effort.count(tokens=int(mask.sum()), slots=mask.size)
        inputs = {"input_ids": self.torch.from_numpy(padded), "attention_mask": self.torch.from_numpy(mask)}
        with self.torch.inference_mode():
            pooled = self.model({name: tensor.to(self.model.device) for name, tensor in inputs.items()})
            found: Embeddings = pooled["sentence_embedding"].float().cpu().numpy()
        return found


class Packs:
    """Over packs, in the order given."""

    def __init__(self, model: Any, batch_tokens: int, effort: Effort) -> None:
        self.torch = needs("torch", "torch")
        self.packed = packed.Packed(model[0].auto_model, packed.pooling_of(model) or "mean")
        self.further = list(model)[2:]
        self.batch_tokens, self.effort, self.device = batch_tokens, effort, model.device

    def cut(self, lengths: Lengths) -> Iterator[list[int]]:
        """Indices of windows of such lengths, in packs."""
        return packed.packs(lengths.tolist(), self.batch_tokens)

    def __call__(self, rows: Sequence[Ids]) -> Embeddings:
        """Embeddings (n_windows, dim) of one pack."""
        n_tokens = sum(map(len, rows))
        self.effort.count(tokens=n_tokens, slots=n_tokens)
        with self.torch.inference_mode():
            pooled = self.packed(packed.pack_of(rows, self.device))
            for module in self.further:
                like = next(module.parameters(), pooled)
                pooled = module({"sentence_embedding": pooled.to(like.dtype)})["sentence_embedding"]
            found: Embeddings = pooled.float().cpu().numpy()
        return found


Forward = Padded | Packs


def batches(lengths: Lengths, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rising length in batches of at most `batch_tokens` tokens, padding included, or of one."""
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# -- which way --------------------------------------------------------------------------------------------------------


def n_workers(device: str) -> int:
    """Threads that are worth having."""
    return int(needs("torch", "torch").get_num_threads()) if device == "cpu" else THREADS_A_GPU


def pick(model: Any, settings: config.Encoder, effort: Effort) -> Forward:
    """The way that was asked for, or the plain one where the model cannot go over packs; the log says so."""
    plain = Padded(model, 1 if settings.engine == "exact" else settings.batch_tokens or BATCH_TOKENS, effort)
    if settings.engine != "packed":
        return plain
    reason = packed.why_not(model)
    if reason is None:
        over_packs = Packs(model, settings.batch_tokens or PACK_TOKENS[model.device.type], effort)
        reason = None if agree(over_packs, plain) else "over packs its embeddings are others"
    if reason is not None:
        log.info("encoder: %s runs in plain padded batches: %s", settings.model, reason)
        return plain
    return over_packs


def agree(over_packs: Packs, plain: Padded) -> bool:
    """Whether both ways give the same embeddings of some random tokens, but for rounding."""
    rng, n_words = np.random.default_rng(0), over_packs.packed.embeddings.word_embeddings.num_embeddings
    rows = [rng.integers(n_words, size=n).astype(np.int32) for n in (48, 5, 21)]
    ours, own = over_packs(rows), plain(rows)
    cosines = (ours * own).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(own, axis=1)
    furthest = FURTHEST[str(next(plain.model.parameters()).dtype).removeprefix("torch.")]
    return bool((1 - cosines < furthest).all())
