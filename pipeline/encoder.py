"""Text to frozen embeddings."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config, models
from pipeline.errors import UserError, needs

Embeddings = NDArray[np.float32]

POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Architectures that number positions from 2, so that two of them cannot be used."""


class Encoder:
    """A frozen encoder, pooled as its own files say (sentence-transformers modules, else the mean)."""

    def __init__(self, settings: config.Encoder) -> None:
        self.torch = needs("torch", "torch")
        sentence_transformers = needs("sentence_transformers", "torch")
        self.settings = settings
        device = models.pick_device(settings.device)
        name = models.locate(settings.model, "encoder.model")
        try:
            self.model = sentence_transformers.SentenceTransformer(
                name,
                revision=settings.revision,
                device=device,
                model_kwargs={"dtype": models.pick_dtype(settings.dtype, device)},
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"encoder.model: {settings.model} cannot be loaded ({reason})") from None
        if not hasattr(self.model[0], "auto_model"):
            raise UserError(f"encoder.model: {settings.model} is no transformer; choose one that is")
        self.tokenizer: Any = self.model.tokenizer
        self.max_tokens = self.context(settings.max_tokens)

    def context(self, asked: int) -> int:
        """Tokens a document may have, special ones included: what was asked for, or what the encoder can take."""
        auto = self.model[0].auto_model.config
        positions = getattr(auto, "max_position_embeddings", None) or asked
        return min(asked, positions - (2 if auto.model_type in POSITIONS_AFTER_PADDING else 0))

    @property
    def revision(self) -> str | None:
        """The Hub commit that was loaded, where there is one."""
        return getattr(self.model[0].auto_model.config, "_commit_hash", None) or self.settings.revision

    def embed(self, texts: Sequence[str], step: Callable[[int], None] = lambda _: None) -> tuple[Embeddings, int]:
        """Embeddings (n_texts, dim) in the order given, and how many texts were cut. `step` hears of progress."""
        ids, n_truncated = self.tokenise(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        embeddings: Embeddings | None = None
        for batch in self.batches(order, ids):
            rows = self.forward([ids[i] for i in batch])
            embeddings = np.empty((len(ids), rows.shape[1]), np.float32) if embeddings is None else embeddings
            embeddings[batch] = rows
            step(len(batch))
        return (np.empty((0, 0), np.float32) if embeddings is None else embeddings), n_truncated

    def tokenise(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of each text with the encoder's special tokens, and how many texts were cut."""
        room = self.max_tokens - self.tokenizer.num_special_tokens_to_add()
        pieces = [models.cut_at_space(text, 64 * room) for text in texts]
        ids = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
        cut = [len(row) > room for row in ids]
        for i, text in enumerate(texts):
            if len(pieces[i]) < len(text) and len(ids[i]) <= room + models.CUT_REACHES:
                ids[i], cut[i] = models.first_tokens(text, room, self.tokenizer)
        ids = [row[:room] for row in ids]
        before, after = self.around
        return [before + row + after for row in ids], sum(cut)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens around a text, such as [CLS] and [SEP]."""
        return models.special_tokens_around(self.tokenizer)

    def batches(self, order: list[int], ids: list[list[int]]) -> list[list[int]]:
        """Indices of rising length in batches of at most `batch_tokens` tokens, padding included."""
        planned: list[list[int]] = []
        for i in order:
            if planned and (len(planned[-1]) + 1) * len(ids[i]) <= self.settings.batch_tokens:
                planned[-1].append(i)
            else:
                planned.append([i])
        return planned

    def forward(self, ids: list[list[int]]) -> Embeddings:
        """Embeddings of one batch: (n_rows, dim) float32."""
        longest = max(map(len, ids))
        padded = self.torch.full((len(ids), longest), self.tokenizer.pad_token_id or 0)
        mask = self.torch.zeros((len(ids), longest), dtype=self.torch.long)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = self.torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        device = self.model.device
        with self.torch.inference_mode():
            pooled = self.model({"input_ids": padded.to(device), "attention_mask": mask.to(device)})
        rows: Embeddings = pooled["sentence_embedding"].float().cpu().numpy()
        if not np.isfinite(rows).all():
            raise UserError(f"encoder {self.settings.model} gives NaN; use encoder.dtype float32")
        return rows
