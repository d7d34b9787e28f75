"""Encoder and heads in one folder that loads with one line:

from pipeline.student import load
load("runs/demo/train/student").score(["Photosynthesis turns light into sugar."])
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import config, loaders
from pipeline.encoder import Embedded, Encoder
from pipeline.errors import UserError, needs
from pipeline.head import Columns, Head, schema_of
from pipeline.layers import Layer, Outputs, activations, side_by_side
from pipeline.storage import replacing, write_text, writing

__all__ = ["Columns", "Head", "Layer", "Student", "load", "schema_of"]

log = logging.getLogger("gristmill")

FORMAT = 3
"""Version of the folder's layout."""

DESCRIPTION, HEADS = "student.json", "head.safetensors"
"""What a student is, written last, and the numbers of its heads."""


class Student:
    """An encoder and the heads on it."""

    def __init__(
        self,
        encoder_settings: config.Encoder,
        heads: tuple[Head, ...],
        about: dict[str, Any] | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        self.encoder_settings = encoder_settings
        """The encoder it was made from, and how it reads texts."""
        self.heads = heads
        self.about: dict[str, Any] = about or {}
        """Where it comes from: prompt digests, teachers, metrics."""
        self.fine_tuned = encoder
        """Given where the weights are no longer those of `encoder_settings`."""
        self.folder: Path | None = None
        """Where it was loaded from."""
        self.files: dict[str, str] = {}
        """SHA-256 of each file there."""
        self.loaders: list[str] = []
        """Classes of other libraries that load what was saved or loaded, with the same scores."""

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded at first use."""
        return self.fine_tuned or Encoder(self.source)

    @property
    def source(self) -> config.Encoder:
        """Where the encoder is: in the student's own folder, or where it was made from."""
        own = {"model": str(self.folder), "revision": None} if self.folder else {}
        return self.encoder_settings.model_copy(update=own)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides the predictions, wherever the folder is."""
        numbers = {name: values.tobytes().hex() for name, values in tensors(self.heads).items()}
        heads = [described(head) for head in self.heads]
        return config.digest([heads, numbers, self.encoder_settings.identity(), self.files])

    @property
    def weights(self) -> str:
        """16 hex digits of its files, wherever they are."""
        return config.digest(self.files)

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
        return self.columns(self.outputs(self.encoder.embed(texts)))

    def outputs(self, embedded: Embedded) -> Outputs:
        """All heads' outputs side by side (n_texts, n_outputs), of texts that are embedded already."""
        aggregate = self.encoder_settings.aggregate
        return np.concatenate([head.outputs_of_texts(embedded, aggregate) for head in self.heads], axis=1)

    def columns(self, outputs: Outputs) -> Columns:
        """Every head's columns, of all heads' outputs (n_texts, n_outputs)."""
        begins = np.cumsum([head.n_outputs for head in self.heads])[:-1]
        found = [head.columns(part) for head, part in zip(self.heads, np.split(outputs, begins, axis=1), strict=True)]
        return {name: values for columns in found for name, values in columns.items()}

    @property
    def n_outputs(self) -> int:
        """Numbers that all heads make of a text."""
        return sum(head.n_outputs for head in self.heads)

    @property
    def shown(self) -> tuple[Head, ...]:
        """The heads whose outputs other libraries give: the scores, or the labels of a student without any."""
        kind = "score" if any(head.kind == "score" for head in self.heads) else self.heads[0].kind
        alike = [head for head in self.heads if head.kind == kind]
        return tuple(head for head in alike if activations(head.layers) == activations(alike[0].layers))

    def save(self, folder: Path) -> None:
        """Write a folder that sentence-transformers loads too, complete with the encoder; student.json comes last and
        names the digest of every file. A student that was there before is replaced as a whole."""
        safetensors = needs("safetensors.numpy", "torch")
        unrounded = self.source.model_copy(update={"dtype": "float32", "device": "cpu"})
        encoder = self.fine_tuned or Encoder(unrounded)
        with writing(folder), replacing(folder, DESCRIPTION) as made:
            self.loaders = loaders.write(
                made,
                encoder.model,
                side_by_side([head.layers for head in self.shown]),
                max_tokens=encoder.max_tokens,
                bound=max([16.0, *(abs(end) for head in self.shown for end in head.scale or ())]),
                config=of_classification(self.shown),
            )
            safetensors.save_file(tensors(self.heads), made / HEADS)
            description = {
                "format": FORMAT,
                "encoder": self.encoder_settings.identity(),
                "heads": [described(head) for head in self.heads],
                "shown": [head.name for head in self.shown],
                "loaders": self.loaders,
                "files": digests(made),
                **self.about,
            }
            write_text(made / DESCRIPTION, json.dumps(description, indent=2, ensure_ascii=False) + "\n")


PROBLEMS = {"score": "regression", "label": "single_label_classification", "labels": "multi_label_classification"}
"""Kinds of heads by transformers' name."""


def of_classification(heads: Sequence[Head]) -> dict[str, Any]:
    """What a transformers configuration says of the outputs of heads. No softmax goes over the labels of several, so
    that their log-odds stay as they are."""
    kind, several = heads[0].kind, len(heads) > 1
    names = [f"{head.name}: {label}" if several else label for head in heads for label in head.labels]
    names = names or [head.name for head in heads]
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": PROBLEMS["score" if several and kind == "label" else kind],
    }


# -- the folder -------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that decides a prediction, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return {path.relative_to(folder).as_posix(): digest(path) for path in paths}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def tensors(heads: Sequence[Head]) -> dict[str, NDArray[np.float32]]:
    """Weights (n_out, n_in) and biases (n_out,) of every layer by name."""
    layers = {f"{head.name}.{i}": layer for head in heads for i, layer in enumerate(head.layers)}
    weights = {f"{name}.weight": np.ascontiguousarray(layer.weight) for name, layer in layers.items()}
    return weights | {f"{name}.bias": np.ascontiguousarray(layer.bias) for name, layer in layers.items()}


def described(head: Head) -> dict[str, Any]:
    """A head without its numbers."""
    about = {"scale": list(head.scale), "cuts": list(head.cuts)} if head.scale else {"labels": list(head.labels)}
    return {"name": head.name, "kind": head.kind, "activations": list(activations(head.layers)), **about}


def load(folder: str | Path, encoder: config.Encoder | None = None) -> Student:
    """A student from its folder; `encoder` may set another device, precision or batch size."""
    folder = Path(folder)
    safetensors = needs("safetensors.numpy", "torch")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no student ({error}); give a folder that gristmill train made") from None
    if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
        raise UserError(f"{folder} was made by another version of gristmill; train it again")
    check_whole(folder, description["files"])
    named = safetensors.load_file(folder / HEADS)
    heads = tuple(head_of(about, named) for about in description.pop("heads"))
    settings = as_asked(config.Encoder.model_validate(description.pop("encoder")), encoder)
    about = {name: value for name, value in description.items() if name not in ("files", "loaders", "shown")}
    student = Student(settings, heads, about)
    student.folder, student.files, student.loaders = folder, description["files"], description["loaders"]
    return student


def check_whole(folder: Path, files: dict[str, str]) -> None:
    """Refuse a folder of which a file is missing or not the one that was written."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or digest(path) != expected:
            raise UserError(f"{folder} is damaged: {name} is not the one student.json names; train it again")


def head_of(about: dict[str, Any], named: dict[str, NDArray[np.float32]]) -> Head:
    """A head from its description and the tensors of all of them."""
    name, scale = about["name"], about.get("scale")
    layers = [
        Layer(named[f"{name}.{i}.weight"], named[f"{name}.{i}.bias"], activation)
        for i, activation in enumerate(about["activations"])
    ]
    return Head(
        name=name,
        kind=about["kind"],
        layers=tuple(layers),
        scale=(scale[0], scale[1]) if scale else None,
        labels=tuple(about.get("labels", ())),
        cuts=tuple(about.get("cuts", ())),
    )


OF_THE_STUDENT = {"model", "revision", "pooling", "max_tokens", "windows", "aggregate"}
"""Settings of the encoder that the heads were trained with."""


def as_asked(own: config.Encoder, asked: config.Encoder | None) -> config.Encoder:
    """The student's encoder with the device, precision and batch size that were asked for; it stays the same model."""
    given = asked.model_fields_set if asked is not None else set()
    for name in sorted(given & OF_THE_STUDENT):
        if getattr(asked, name) not in (None, getattr(own, name)):
            log.warning("encoder.%s: the student keeps its own, %r", name, getattr(own, name))
    how = {name: getattr(asked, name) for name in given & {"device", "dtype", "engine", "workers", "batch_tokens"}}
    trusted = asked is not None and asked.trust_remote_code  # whatever the folder says
    return own.model_copy(update={**how, "trust_remote_code": trusted})
