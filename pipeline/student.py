"""Encoder, linear head and scale in one folder that loads with one line:

from pipeline.student import load
load("runs/demo/train/student").score(["Photosynthesis turns light into sugar."])
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config, metrics
from pipeline.encoder import Embeddings, Encoder
from pipeline.errors import UserError, needs
from pipeline.storage import atomic, write_text

log = logging.getLogger("gristmill")

FORMAT = 1
"""Version of the folder's layout."""


@dataclass
class Student:
    """A frozen encoder and a linear head: score = embedding @ weight + bias."""

    encoder_settings: config.Encoder
    weight: NDArray[np.float32]
    """(dim,)"""
    bias: float
    scale: tuple[float, float]
    about: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: prompt digest, teacher, metrics."""

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded at first use."""
        return Encoder(self.encoder_settings)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides the scores."""
        return config.digest([self.weight.tobytes().hex(), self.bias, self.encoder_settings.identity(), self.scale])

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores (n_texts,) float32, not clipped."""
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not one string")
        return self.score_counted(texts)[0]

    def score_counted(
        self, texts: Sequence[str], step: Callable[[int], None] = lambda _: None
    ) -> tuple[NDArray[np.float32], int]:
        """Scores (n_texts,) float32, and how many texts were longer than the encoder reads."""
        if not texts:
            return np.empty(0, np.float32), 0
        embeddings, n_truncated = self.encoder.embed(texts, step)
        return self.head(embeddings), n_truncated

    def head(self, embeddings: Embeddings) -> NDArray[np.float32]:
        """Scores of embeddings (n, dim)."""
        return (embeddings @ self.weight + np.float32(self.bias)).astype(np.float32)

    def int_score(self, scores: NDArray[np.float32]) -> NDArray[np.int8]:
        """Whole scores of the scale, half up."""
        return metrics.int_scores(scores, self.scale)

    def save(self, folder: Path) -> None:
        """Write head.safetensors and student.json, which names the head it belongs to."""
        save = needs("safetensors.numpy", "torch").save
        head = save({"weight": self.weight, "bias": np.array([self.bias], np.float32)})
        with atomic(folder / "head.safetensors") as temporary:
            temporary.write_bytes(head)
        description = {
            "format": FORMAT,
            "head": hashlib.sha256(head).hexdigest(),
            "encoder": self.encoder_settings.identity(),
            "scale": list(self.scale),
            **self.about,
        }
        write_text(folder / "student.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def load(folder: str | Path, encoder: config.Encoder | None = None) -> Student:
    """A student from its folder; `encoder` may set another device, precision or batch size."""
    folder = Path(folder)
    safetensors = needs("safetensors.numpy", "torch")
    try:
        description = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        raw = (folder / "head.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no student ({error}); give a folder that gristmill train made") from None
    if description.pop("format", None) != FORMAT:
        raise UserError(f"{folder} was made by another version of gristmill; train it again")
    if description.pop("head") != hashlib.sha256(raw).hexdigest():
        raise UserError(f"{folder} is damaged: head.safetensors is not the one student.json names; train it again")
    head, (low, high) = safetensors.load(raw), description.pop("scale")
    settings = as_asked(config.Encoder.model_validate(description.pop("encoder")), encoder)
    return Student(settings, head["weight"], float(head["bias"][0]), (low, high), description)


def as_asked(own: config.Encoder, asked: config.Encoder | None) -> config.Encoder:
    """The student's encoder with the device, precision and batch size that were asked for; it stays the same model."""
    given = asked.model_fields_set if asked is not None else set()
    for name in sorted(given & {"model", "revision", "max_tokens"}):
        if getattr(asked, name) not in (None, getattr(own, name)):
            log.warning("encoder.%s: the student keeps its own, %r", name, getattr(own, name))
    how = {name: getattr(asked, name) for name in given & {"device", "dtype", "batch_tokens"}}
    return own.model_copy(update=how)
