"""Text to frozen embeddings."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import config, models, windows
from pipeline.errors import UserError, needs
from pipeline.windows import Ids, Windows

Embeddings = NDArray[np.float32]


class Embedded(NamedTuple):
    """Embeddings of texts by window."""

    vectors: Embeddings
    """(n_windows, dim)"""
    owners: NDArray[np.int64]
    """(n_windows,) index of the text each window is of, rising; every text has at least one."""
    tokens: NDArray[np.int64]
    """(n_windows,) tokens in each window, special ones included."""
    n_truncated: int
    """Texts of which not all tokens were read."""

    def documents(self, weighted: bool = False) -> Embeddings:
        """The mean of each text's windows, or their mean weighted by tokens: (n_texts, dim) float32."""
        begins = np.flatnonzero(np.diff(self.owners, prepend=-1))
        if len(begins) == len(self.owners):
            return self.vectors
        weights = self.tokens if weighted else np.ones_like(self.tokens)
        sums = np.add.reduceat(self.vectors * weights[:, None], begins, axis=0)
        return (sums / np.add.reduceat(weights, begins)[:, None]).astype(np.float32)


class Encoder:
    """A frozen encoder, pooled as set, else as its own files say (sentence-transformers modules, else the mean)."""

    def __init__(self, settings: config.Encoder) -> None:
        self.torch = needs("torch", "torch")
        self.settings = settings
        self.model = load(settings)
        self.tokenizer: Any = self.model.tokenizer
        self.max_tokens = min(settings.max_tokens, positions(self.model) or settings.max_tokens)

    @property
    def revision(self) -> str | None:
        """The Hub commit that was loaded, where there is one."""
        return getattr(self.model[0].auto_model.config, "_commit_hash", None) or self.settings.revision

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides an embedding, but for the rounding of another device or batch."""
        kind = [weights(self.model), architecture(self.model), vocabulary(self.tokenizer)]
        return config.digest([*kind, self.max_tokens, self.settings.windows])

    @cached_property
    def dim(self) -> int:
        """Numbers in an embedding."""
        return int(self.forward(self.read(["a"]).ids).shape[1])

    def embed(self, texts: Sequence[str], step: Callable[[int], None] = lambda _: None) -> Embedded:
        """The embeddings of each text's windows, in the order given. `step` hears of progress."""
        read = self.read(texts)
        return Embedded(self.vectors(read, step), read.owners, lengths(read), int(read.truncated.sum()))

    def read(self, texts: Sequence[str]) -> Windows:
        """The windows of tokens of each text."""
        return windows.cut(texts, self.tokenizer, self.max_tokens, self.settings.windows)

    def vectors(self, read: Windows, step: Callable[[int], None] = lambda _: None) -> Embeddings:
        """Embeddings of windows (n_windows, dim), computed in batches of similar length."""
        first = np.diff(read.owners, prepend=-1) > 0
        found: Embeddings | None = None
        for batch in batches(lengths(read), self.settings.batch_tokens):
            rows = self.forward([read.ids[i] for i in batch])
            found = np.empty((len(read.ids), rows.shape[1]), np.float32) if found is None else found
            found[batch] = rows
            step(int(first[batch].sum()))
        return np.empty((0, self.dim), np.float32) if found is None else found

    def forward(self, ids: Sequence[Ids]) -> Embeddings:
        """Embeddings of one batch: (n_rows, dim) float32."""
        longest = max(map(len, ids))
        padded = np.full((len(ids), longest), self.tokenizer.pad_token_id or 0, np.int64)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        device = self.model.device
        inputs = {"input_ids": padded, "attention_mask": mask}
        with self.torch.inference_mode():
            pooled = self.model({name: self.torch.from_numpy(array).to(device) for name, array in inputs.items()})
        rows: Embeddings = pooled["sentence_embedding"].float().cpu().numpy()
        if not np.isfinite(rows).all():
            raise UserError(f"encoder {self.settings.model} gives NaN; use encoder.dtype float32")
        return rows


def lengths(read: Windows) -> NDArray[np.int64]:
    """Tokens in each window."""
    return np.array([len(ids) for ids in read.ids], np.int64)


def batches(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rising length in batches of at most `batch_tokens` tokens, padding included, or of one."""
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# -- loading ----------------------------------------------------------------------------------------------------------


def load(settings: config.Encoder) -> Any:
    """The encoder as sentence-transformers modules, without the heads of a student."""
    name, device = models.locate(settings.model, "encoder.model"), models.pick_device(settings.device)
    sentence_transformers = needs("sentence_transformers", "torch")
    damaged = needs("safetensors", "torch").SafetensorError
    try:
        model = sentence_transformers.SentenceTransformer(
            name,
            revision=settings.revision,
            device=device,
            model_kwargs={"dtype": models.pick_dtype(settings.dtype, device)},
        ).eval()
    except (OSError, ValueError, KeyError, ImportError, damaged) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"encoder.model: {settings.model} cannot be loaded ({reason})") from None
    if not hasattr(model[0], "auto_model"):
        raise UserError(f"encoder.model: {settings.model} is no transformer; choose one that is")
    check_tokenizer(model.tokenizer, settings)
    for head in [name for name, _ in model.named_children() if name.startswith("head")]:
        delattr(model, head)
    if settings.pooling:
        pool(model, settings)
    return model


def check_tokenizer(tokenizer: Any, settings: config.Encoder) -> None:
    """Refuse a model that came without its tokenizer: for some families, loaders make up one that knows no word."""
    known = set(getattr(tokenizer, "get_vocab", dict)())
    if known <= set(getattr(tokenizer, "all_special_tokens", ())):
        raise UserError(
            f"encoder.model: {settings.model} has no tokenizer; put the model's tokenizer.json and"
            " tokenizer_config.json beside its weights"
        )


def pool(model: Any, settings: config.Encoder) -> None:
    """Put the pooling that was asked for in the place of the model's own."""
    at = next((i for i, module in enumerate(model) if type(module).__name__ == "Pooling"), None)
    if at is None:
        raise UserError(f"encoder.pooling: {settings.model} has no pooling that could be set; leave it out")
    model[at] = type(model[at])(model[0].auto_model.config.hidden_size, pooling_mode=settings.pooling)


def positions(model: Any) -> int | None:
    """Tokens that the encoder can take, special ones included; None where positions are only relative."""
    auto = model[0].auto_model
    tables = (module for name, module in auto.named_modules() if name.endswith("position_embeddings"))
    table = next((table for table in tables if hasattr(table, "num_embeddings")), None)
    if table is not None:
        return int(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    relative = getattr(auto.config, "relative_attention", False)
    return None if relative else getattr(auto.config, "max_position_embeddings", None)


# -- what decides an embedding ----------------------------------------------------------------------------------------


def weights(model: Any) -> str:
    """A digest of all weights with their names, shapes and precision."""
    torch, digest = needs("torch", "torch"), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def architecture(model: Any) -> list[str]:
    """Each module's settings, without where and by what version it was saved."""
    noise = ("_name_or_path", "transformers_version", "architectures", "_commit_hash")
    settings = model[0].auto_model.config.to_dict()
    transformer = str(sorted((name, value) for name, value in settings.items() if name not in noise))
    return [transformer, *(repr(module) for module in list(model)[1:])]


def vocabulary(tokenizer: Any) -> dict[str, Any]:
    """How texts become tokens; padding and truncation are the business of each call."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return dict(tokenizer.get_vocab())
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return described | {"padding": None, "truncation": None}
