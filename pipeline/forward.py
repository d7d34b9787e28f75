"""How an encoder computes: over packs where it can, else in padded batches."""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config, models, packed
from pipeline.errors import UserError, needs
from pipeline.lanes import Lane, compiled, gathered, sent
from pipeline.packed import Pack
from pipeline.tokens import Ids
from pipeline.workers import Effort

log = logging.getLogger("gristmill")

Embeddings = NDArray[np.float32]
Lengths = NDArray[np.int64]

PACK_TOKENS = {"cpu": 4096, "cuda": 32_768}
BATCH_TOKENS = 4096
"""Tokens in one pack, by device, and in one padded batch."""
ONE_SHAPE = {"cuda"}
"""Devices on which packs are filled to one shape and layers are compiled for it."""
SLOTS = 64
"""Packs on the CPU are filled to a multiple of it: oneDNN makes and keeps code for every number of rows it meets."""
THREADS_A_GPU = 3
"""One launches while the others tokenise or wait for their embeddings."""
FURTHEST = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}
"""1 - cosine that may lie between an embedding over packs and the model's own."""


class Padded:
    """By the model itself, in batches of windows of similar length."""

    unit_texts = 512
    """Many, so that batches hardly differ in length."""

    def __init__(self, model: Any) -> None:
        self.torch = needs("torch", "torch")
        self.model, self.device = model, model.device
        self.padding = model.tokenizer.pad_token_id or 0

    def cut(self, lengths: Lengths, batch_tokens: int) -> Iterator[list[int]]:
        """Indices of windows of such lengths, in batches."""
        return batches(lengths, batch_tokens)

    def __call__(self, rows: Sequence[Ids], _: int, /) -> tuple[Any, int]:
        """Embeddings (n_windows, dim) of one batch, and its slots."""
        longest = max(map(len, rows))
        padded = np.full((len(rows), longest), self.padding, np.int64)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(rows):
            padded[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        arrays = {"input_ids": padded, "attention_mask": mask}
        found = self.model({name: sent(self.torch.from_numpy(array), self.device) for name, array in arrays.items()})
        return found["sentence_embedding"].float(), mask.size


class Packs:
    """Over packs, in the order given."""

    def __init__(self, model: Any, dtype: Any) -> None:
        self.torch = needs("torch", "torch")
        self.packed = packed.Packed(model[0].auto_model, packed.pooling_of(model) or "mean", dtype)
        self.further = list(model)[2:]
        self.device = model.device
        self.has_one_shape = self.device.type in ONE_SHAPE
        self.unit_texts = 1024 if self.has_one_shape else 16
        """A dozen packs where they are filled, for the last of them is partly empty; few, where they are not, so that
        all threads are busy to the end."""

    def cut(self, lengths: Lengths, batch_tokens: int) -> Iterator[list[int]]:
        """Indices of windows of such lengths, in packs."""
        return packed.packs(lengths.tolist(), batch_tokens)

    def __call__(self, rows: Sequence[Ids], batch_tokens: int, /) -> tuple[Any, int]:
        """Embeddings (n_windows, dim) of one pack, and its slots."""
        pack = packed.pack_of(rows, self.packed.padding)
        pack = packed.filled(pack, batch_tokens if self.has_one_shape else -(-len(pack.ids) // SLOTS) * SLOTS)
        ids, positions, starts = (sent(tensor, self.device) for tensor in (pack.ids, pack.positions, pack.starts))
        pooled = self.packed(Pack(ids, positions, starts, pack.longest))
        for module in self.further:
            like = next(module.parameters(), pooled)
            pooled = module({"sentence_embedding": pooled.to(like.dtype)})["sentence_embedding"]
        return pooled.float(), len(pack.ids)

    def compile(self, batch_tokens: int) -> None:
        """Compiles what layers do with each slot by itself: bias and GELU become one, sum and normalisation too."""
        over = self.packed
        with self.torch.inference_mode():
            zeros = self.torch.zeros(2, batch_tokens, over.hidden, dtype=over.dtype, device=self.device)
            over.feed_slots = compiled(over.feed, over.layers[0], *zeros.unbind())


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


def lanes(model: Any, devices: Sequence[str], n_workers: int, settings: config.Encoder, max_tokens: int) -> list[Lane]:
    """One for each GPU, with its own copy of the weights; one for each thread of the CPU, over the same weights."""
    if len(devices) > 1:
        log.info("encoder: computes on %s", ", ".join(devices))
    models = [model, *(copy.deepcopy(model).to(device) for device in devices[1:])]
    made = [pick(each, settings, max_tokens) for each in models]
    n_lanes = n_workers if model.device.type == "cpu" else len(devices)
    return [copy.copy(made[i % len(made)]) for i in range(n_lanes)]


def n_workers(settings: config.Encoder, devices: Sequence[str]) -> int:
    """Threads that are worth having."""
    n_threads: int = needs("torch", "torch").get_num_threads()
    on_cpu = devices[0].startswith("cpu")
    return settings.workers or (n_threads if on_cpu else THREADS_A_GPU * len(devices))


def pick(model: Any, settings: config.Encoder, max_tokens: int) -> Lane:
    """A lane of the way that was asked for, or of the plain one where the model cannot go over packs; the log says
    so."""
    batch_tokens = 1 if settings.engine == "exact" else settings.batch_tokens or BATCH_TOKENS
    plain = Lane(Padded(model), batch_tokens, max_tokens)
    if settings.engine != "packed":
        return plain
    dtype = models.pick_dtype(settings.dtype, str(model.device))
    reason = packed.why_not(model, dtype)
    if reason is None:
        over_packs = packing(model, dtype, settings, max_tokens)
        if agree(model, dtype, over_packs, plain):
            return over_packs
        reason = "over packs its embeddings are others"
    log.info("encoder: %s runs in plain padded batches: %s", settings.model, reason)
    is_rounded = next(model.parameters()).dtype is dtype
    return plain if is_rounded else Lane(Padded(copy.deepcopy(model).to(dtype)), batch_tokens, max_tokens)


def packing(model: Any, dtype: Any, settings: config.Encoder, max_tokens: int) -> Lane:
    """A lane over packs, its layers compiled where all packs have one shape."""
    packs, pack_tokens = Packs(model, dtype), settings.batch_tokens or PACK_TOKENS[model.device.type]
    if packs.has_one_shape:
        if pack_tokens < max_tokens:
            raise UserError(
                f"encoder.batch_tokens: {pack_tokens} is less than encoder.max_tokens, the {max_tokens} tokens of one"
                " window; set it higher or leave it out"
            )
        packs.compile(pack_tokens)
    return Lane(packs, pack_tokens, max_tokens)


def is_independent(lane: Lane, settings: config.Encoder) -> bool:
    """Whether each embedding is the same to the bit beside any other texts: alone, or over packs on the CPU. On GPUs
    cuBLAS may add up in another order where there are more [CLS] rows."""
    over_packs_on_cpu = isinstance(lane.way, Packs) and lane.way.device.type == "cpu"
    return over_packs_on_cpu or settings.engine == "exact"


def agree(model: Any, dtype: Any, over_packs: Lane, plain: Lane) -> bool:
    """Whether both ways give the same embeddings of some random tokens, but for rounding."""
    n_words = len(model[0].auto_model.get_input_embeddings().weight)
    rng = np.random.default_rng(0)
    n_tokens = (min(n, plain.max_tokens) for n in (48, 5, 21))
    rows = [rng.integers(n_words, size=n).astype(np.int32) for n in n_tokens]
    ours, own = (gathered(lane.launch(rows, Effort())) for lane in (over_packs, plain))
    cosines = (ours * own).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(own, axis=1)
    return bool((1 - cosines < FURTHEST[str(dtype).removeprefix("torch.")]).all())
