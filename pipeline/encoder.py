"""Text to frozen embeddings."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pickle import UnpicklingError
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import config, forward, model_files, models, packed, windows
from pipeline.errors import UserError, needs
from pipeline.forward import Embeddings
from pipeline.lanes import Lane, gathered
from pipeline.tokens import reader
from pipeline.windows import Windows
from pipeline.workers import Effort, in_order


class Embedded(NamedTuple):
    """Embeddings of texts by window."""

    vectors: Embeddings
    """(n_windows, dim)"""
    owners: NDArray[np.int64]
    """(n_windows,) index of the text each window is of, rising; every text has at least one."""
    tokens: NDArray[np.int64]
    """(n_windows,) tokens in each window, special ones included."""
    truncated: NDArray[np.bool_]
    """(n_texts,) whether not all tokens of the text were read."""

    @property
    def n_truncated(self) -> int:
        """Texts of which not all tokens were read."""
        return int(self.truncated.sum())

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
        device = models.pick_device(settings.device)
        self.devices = models.each(device)
        self.model = load(settings, self.devices[0])
        self.dtype = models.pick_dtype(rounding(settings), self.devices[0])
        self.tokenizer: Any = self.model.tokenizer
        self.reader = reader(self.tokenizer)
        self.max_tokens = min(settings.max_tokens, positions(self.model) or settings.max_tokens)
        self.effort = Effort()
        self.made_for = -1
        self.lanes: SimpleQueue[Lane] = SimpleQueue()

    @property
    def revision(self) -> str | None:
        """The Hub commit that was loaded, where there is one."""
        return getattr(self.model[0].auto_model.config, "_commit_hash", None) or self.settings.revision

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides an embedding, but for the rounding of another device, engine or batch."""
        kind = [weights(self.model), architecture(self.model), vocabulary(self.tokenizer)]
        return config.digest([*kind, str(self.dtype), self.max_tokens, self.settings.windows])

    @cached_property
    def dim(self) -> int:
        """Numbers in an embedding."""
        return int(self.embed(["a"]).vectors.shape[1])

    @property
    def is_independent(self) -> bool:
        """Whether an embedding is the same to the bit beside any other texts; of an encoder that is `ready`."""
        return forward.is_independent(self.first_lane, self.settings)

    @cached_property
    def word_embeddings(self) -> Any:
        """The table of the tokens' own embeddings (n_words, dim) float32, on the CPU."""
        return self.model[0].auto_model.get_input_embeddings().weight.detach().to("cpu", self.torch.float32)

    @property
    def unit_texts(self) -> int:
        """Texts that one worker should take at a time; of an encoder that is `ready`."""
        return self.first_lane.way.unit_texts

    # -- texts

    def embed(self, texts: Sequence[str], step: Callable[[int], None] = lambda _: None) -> Embedded:
        """The embeddings of each text's windows, in the order given. `step` hears of texts that are done."""
        n_workers, found = self.ready(), list[Embedded]()
        units = [texts[i : i + self.unit_texts] for i in range(0, len(texts), self.unit_texts)]
        for unit, embedded in in_order(self.embed_unit, units, n_workers, self.begin_thread):
            found.append(embedded)
            step(len(unit))
        return joined(found) if found else nothing(self.dim)

    def embed_unit(self, texts: Sequence[str]) -> Embedded:
        """The same for some texts, by the thread that calls; `ready` comes first."""
        return self.embed_windows(self.read_unit(texts))

    def read_unit(self, texts: Sequence[str]) -> Windows:
        """The windows of tokens of some texts, its time counted."""
        with self.effort.spent("tokenising"):
            return self.read(texts)

    def embed_windows(self, read: Windows) -> Embedded:
        """The embeddings of windows, by the thread that calls."""
        with self.effort.spent("computing"):
            return Embedded(self.vectors(read), read.owners, lengths(read), read.truncated)

    def read(self, texts: Sequence[str]) -> Windows:
        """The windows of tokens of each text."""
        return windows.cut(texts, self.reader, self.max_tokens, self.settings.windows)

    # -- tokens

    def vectors(self, read: Windows) -> Embeddings:
        """Embeddings of windows (n_windows, dim)."""
        if not read.ids:
            return np.empty((0, self.dim), np.float32)
        lane = self.lanes.get()
        try:
            launched = list(lane.launch(read.ids, self.effort))
        finally:
            self.lanes.put(lane)  # a GPU takes the next thread's while it computes this one's
        return self.checked(gathered(launched))

    def checked(self, rows: Embeddings) -> Embeddings:
        """The same embeddings, if they are numbers."""
        if not np.isfinite(rows).all():
            raise UserError(f"encoder {self.settings.model} gives NaN; use encoder.dtype float32")
        return rows

    # -- threads

    def ready(self) -> int:
        """Lays the weights out, anew where they have changed since, for as many threads as it says."""
        n_workers = forward.n_workers(self.settings, self.devices)
        version = sum(weight._version for weight in self.model.parameters())
        if version != self.made_for:
            self.made_for, self.lanes = version, SimpleQueue()
            lanes = forward.lanes(self.model, self.devices, n_workers, self.settings, self.max_tokens)
            self.first_lane = lanes[0]
            for lane in lanes:
                self.lanes.put(lane)
        return n_workers

    def begin_thread(self) -> None:
        """One thread computes with one core; several share the cores better by working on several units."""
        if self.model.device.type == "cpu":
            self.torch.set_num_threads(1)


def lengths(read: Windows) -> NDArray[np.int64]:
    """Tokens in each window."""
    return np.array([len(ids) for ids in read.ids], np.int64)


def joined(found: Sequence[Embedded]) -> Embedded:
    """The embeddings of several lists of texts as those of one."""
    begins = np.cumsum([0, *(len(each.truncated) for each in found)])
    owners = [each.owners + begin for each, begin in zip(found, begins, strict=False)]
    vectors, _, tokens, truncated = zip(*found, strict=True)
    return Embedded(np.concatenate(vectors), np.concatenate(owners), np.concatenate(tokens), np.concatenate(truncated))


def nothing(dim: int) -> Embedded:
    """The embeddings of no texts."""
    none = np.empty(0, np.int64)
    return Embedded(np.empty((0, dim), np.float32), none, none, np.empty(0, np.bool_))


# -- loading ----------------------------------------------------------------------------------------------------------


def load(settings: config.Encoder, device: str) -> Any:
    """The encoder as sentence-transformers modules, without the heads of a student."""
    name = models.locate(settings.model, "encoder.model")
    dtype = "float32" if is_packed_family(name, settings) else rounding(settings)  # packs round for themselves
    sentence_transformers = needs("sentence_transformers", "torch")
    damaged = needs("safetensors", "torch").SafetensorError
    try:
        model = sentence_transformers.SentenceTransformer(
            name,
            revision=settings.revision,
            device=device,
            trust_remote_code=settings.trust_remote_code,
            model_kwargs=model_files.of_weights({"dtype": models.pick_dtype(dtype, device)}),
        ).eval()
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, UnpicklingError, damaged) as error:
        reason = model_files.reason(error, "encoder.model")
        raise UserError(f"encoder.model: {settings.model} cannot be loaded ({reason})") from None
    if not hasattr(model[0], "auto_model"):
        raise UserError(f"encoder.model: {settings.model} is no transformer; choose one that is")
    check_tokenizer(model.tokenizer, settings)
    for head in [name for name, _ in model.named_children() if name.startswith("head")]:
        delattr(model, head)
    if settings.pooling:
        pool(model, settings)
    return model


def rounding(settings: config.Encoder) -> str:
    """The precision in which the encoder computes."""
    return "float32" if settings.engine == "exact" else settings.dtype


def is_packed_family(name: str, settings: config.Encoder) -> bool:
    """Whether a model may go over packs, by its config.json; false where that lies elsewhere, or is damaged."""
    if settings.engine != "packed":
        return False
    try:
        kind = needs("transformers", "torch").AutoConfig.from_pretrained(
            name, revision=settings.revision, **model_files.NO_CODE
        )
    except (OSError, ValueError, KeyError):
        return False
    return kind.model_type in packed.FAMILIES


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
