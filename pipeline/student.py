"""Encoder and linear heads in one folder that loads with one line:

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
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit, softmax

from pipeline import config, metrics
from pipeline.encoder import Embeddings, Encoder
from pipeline.errors import UserError, needs
from pipeline.storage import atomic, write_text
from pipeline.targets import Kind

log = logging.getLogger("gristmill")

FORMAT = 2
"""Version of the folder's layout."""

Columns = dict[str, Any]
"""Predictions by column, each as long as the texts."""


@dataclass(frozen=True)
class Head:
    """One linear output of the student: a score, one label of several, or any number of labels."""

    name: str
    kind: Kind
    weight: NDArray[np.float32]
    """(n_outputs, dim)"""
    bias: NDArray[np.float32]
    """(n_outputs,)"""
    scale: tuple[float, float] | None = None
    """Lowest and highest score; of scores only."""
    labels: tuple[str, ...] = ()
    """The label of each output; of labels only."""

    def outputs(self, embeddings: Embeddings) -> NDArray[np.float32]:
        """Scores or log-odds (n, n_outputs) of embeddings (n, dim)."""
        return (embeddings @ self.weight.T + self.bias).astype(np.float32)

    def predict(self, embeddings: Embeddings) -> Columns:
        """The columns of this head, named as in `schema`."""
        values = PREDICT[self.kind](self, self.outputs(embeddings))
        return dict(zip(self.schema.names, values, strict=True))

    @property
    def schema(self) -> pa.Schema:
        """The columns of this head and their types."""
        return schema_of(self.name, self.kind)


def schema_of(name: str, kind: Kind) -> pa.Schema:
    """The columns of a head and their types."""
    names = (name, f"int_{name}" if kind == "score" else f"{name}_probability")
    return pa.schema(list(zip(names, TYPES[kind], strict=True)))


TYPES = {
    "score": (pa.float32(), pa.int8()),
    "label": (pa.string(), pa.float32()),
    "labels": (pa.list_(pa.string()), pa.list_(pa.float32())),
}


def scored(head: Head, outputs: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Scores as they are, not clipped, and whole scores of the scale, half up."""
    assert head.scale is not None
    return outputs[:, 0], metrics.int_scores(outputs[:, 0], head.scale)


def likeliest(head: Head, outputs: NDArray[np.float32]) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
    """The likeliest label and its probability."""
    return np.array(head.labels)[outputs.argmax(axis=1)], softmax(outputs, axis=1).max(axis=1)


def all_likely(head: Head, outputs: NDArray[np.float32]) -> tuple[list[list[str]], list[list[float]]]:
    """The labels with a probability of at least one half, and their probabilities."""
    probabilities = expit(outputs)
    found = [np.flatnonzero(row >= 0.5) for row in probabilities]
    labels = [[head.labels[i] for i in chosen] for chosen in found]
    return labels, [row[chosen].tolist() for row, chosen in zip(probabilities, found, strict=True)]


PREDICT: dict[Kind, Callable[[Head, NDArray[np.float32]], tuple[Any, Any]]] = {
    "score": scored,
    "label": likeliest,
    "labels": all_likely,
}


@dataclass
class Student:
    """A frozen encoder and linear heads on it."""

    encoder_settings: config.Encoder
    heads: tuple[Head, ...]
    about: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: prompt digests, teachers, metrics."""

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded at first use."""
        return Encoder(self.encoder_settings)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides the predictions."""
        heads = [
            [*described(head).values(), head.weight.tobytes().hex(), head.bias.tobytes().hex()] for head in self.heads
        ]
        return config.digest([heads, self.encoder_settings.identity()])

    @property
    def schema(self) -> pa.Schema:
        """The columns of all heads and their types."""
        return pa.schema([column for head in self.heads for column in head.schema])

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores (n_texts,) float32, not clipped."""
        if all(head.name != "score" for head in self.heads):
            names = ", ".join(head.name for head in self.heads)
            raise UserError(f"this student gives no score, but {names}; use predict")
        found: NDArray[np.float32] = self.predict(texts)["score"]
        return found

    def predict(self, texts: Sequence[str]) -> Columns:
        """Every head's columns: a score with its int_score, a label or a list of labels with probabilities."""
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not one string")
        return self.predict_counted(texts)[0]

    def predict_counted(
        self, texts: Sequence[str], step: Callable[[int], None] = lambda _: None
    ) -> tuple[Columns, int]:
        """Every head's columns, and how many texts were longer than the encoder reads."""
        embeddings, n_truncated = np.empty((0, self.heads[0].weight.shape[1]), np.float32), 0
        if texts:
            embeddings, n_truncated = self.encoder.embed(texts, step)
        columns = {name: values for head in self.heads for name, values in head.predict(embeddings).items()}
        return columns, n_truncated

    def save(self, folder: Path) -> None:
        """Write head.safetensors and student.json, which names the heads and the file they are in."""
        raw = needs("safetensors.numpy", "torch").save(tensors(self.heads))
        with atomic(folder / "head.safetensors") as temporary:
            temporary.write_bytes(raw)
        description = {
            "format": FORMAT,
            "head": hashlib.sha256(raw).hexdigest(),
            "encoder": self.encoder_settings.identity(),
            "heads": [described(head) for head in self.heads],
            **self.about,
        }
        write_text(folder / "student.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def tensors(heads: Sequence[Head]) -> dict[str, NDArray[np.float32]]:
    """Weights (n_outputs, dim) and biases (n_outputs,) by name."""
    weights = {f"{head.name}.weight": np.ascontiguousarray(head.weight) for head in heads}
    return weights | {f"{head.name}.bias": np.ascontiguousarray(head.bias) for head in heads}


def described(head: Head) -> dict[str, Any]:
    """A head without its numbers."""
    about = {"scale": list(head.scale)} if head.scale else {"labels": list(head.labels)}
    return {"name": head.name, "kind": head.kind, **about}


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
    named = safetensors.load(raw)
    heads = tuple(head_of(about, named) for about in description.pop("heads"))
    settings = as_asked(config.Encoder.model_validate(description.pop("encoder")), encoder)
    return Student(settings, heads, description)


def head_of(about: dict[str, Any], named: dict[str, NDArray[np.float32]]) -> Head:
    """A head from its description and the tensors of all of them."""
    name, scale = about["name"], about.get("scale")
    return Head(
        name=name,
        kind=about["kind"],
        weight=named[f"{name}.weight"],
        bias=named[f"{name}.bias"],
        scale=(scale[0], scale[1]) if scale else None,
        labels=tuple(about.get("labels", ())),
    )


def as_asked(own: config.Encoder, asked: config.Encoder | None) -> config.Encoder:
    """The student's encoder with the device, precision and batch size that were asked for; it stays the same model."""
    given = asked.model_fields_set if asked is not None else set()
    for name in sorted(given & {"model", "revision", "max_tokens"}):
        if getattr(asked, name) not in (None, getattr(own, name)):
            log.warning("encoder.%s: the student keeps its own, %r", name, getattr(own, name))
    how = {name: getattr(asked, name) for name in given & {"device", "dtype", "batch_tokens"}}
    return own.model_copy(update=how)
