"""What a student makes of an embedding: a score, or labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit, softmax

from pipeline import metrics
from pipeline.encoder import Embedded
from pipeline.forward import Embeddings
from pipeline.layers import Layers, Outputs
from pipeline.targets import Kind

Columns = dict[str, Any]
"""Predictions by column, each as long as the texts."""

Aggregate = Literal["mean", "weighted", "max"]


@dataclass(frozen=True)
class Head:
    """What the student says in one matter: a score, one label of several, or any number of labels."""

    name: str
    kind: Kind
    layers: Layers
    """From the embedding to one score, or to a log-odds for each label."""
    scale: tuple[float, float] | None = None
    """Lowest and highest score; of scores only."""
    labels: tuple[str, ...] = ()
    """The label of each output; of labels only."""
    cuts: tuple[float, ...] = ()
    """Lowest score of each whole score above the scale's lowest; without them whole scores are rounded half up."""

    def outputs(self, embeddings: Embeddings) -> Outputs:
        """Scores or log-odds (n, n_outputs) of embeddings (n, dim)."""
        values: Outputs = embeddings
        for layer in self.layers:
            values = layer(values)
        return values.astype(np.float32)

    def outputs_of_texts(self, embedded: Embedded, aggregate: Aggregate = "mean") -> Outputs:
        """Scores or log-odds (n_texts, n_outputs), which are the same beside any other texts."""
        # Window by window: the last bits of a product depend on how many rows it has.
        by_window = [self.outputs(vector) for vector in embedded.vectors[:, None]]
        return of_texts(np.concatenate([np.empty((0, self.n_outputs), np.float32), *by_window]), embedded, aggregate)

    def columns(self, outputs: Outputs) -> Columns:
        """The columns of this head, named as in `schema`, of outputs (n_texts, n_outputs)."""
        return dict(zip(self.schema.names, PREDICT[self.kind](self, outputs), strict=True))

    def predict(self, embedded: Embedded, aggregate: Aggregate = "mean") -> Columns:
        """The columns of this head, a row for each text."""
        return self.columns(self.outputs_of_texts(embedded, aggregate))

    @property
    def n_outputs(self) -> int:
        """One for a score, else one for each label."""
        return len(self.layers[-1].bias)

    @property
    def schema(self) -> pa.Schema:
        """The columns of this head and their types."""
        return schema_of(self.name, self.kind)


def of_texts(outputs: Outputs, embedded: Embedded, aggregate: Aggregate) -> Outputs:
    """Outputs of texts (n_texts, n_outputs) from those of their windows (n_windows, n_outputs)."""
    if aggregate == "max" and len(outputs):
        return np.maximum.reduceat(outputs, np.flatnonzero(np.diff(embedded.owners, prepend=-1)))
    return embedded._replace(vectors=outputs).documents(aggregate == "weighted")


def schema_of(name: str, kind: Kind) -> pa.Schema:
    """The columns of a head and their types."""
    names = (name, f"int_{name}" if kind == "score" else f"{name}_probability")
    return pa.schema(list(zip(names, TYPES[kind], strict=True)))


TYPES = {
    "score": (pa.float32(), pa.int8()),
    "label": (pa.string(), pa.float32()),
    "labels": (pa.list_(pa.string()), pa.list_(pa.float32())),
}


def scored(head: Head, outputs: Outputs) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Scores as they are, not clipped, and whole scores of the scale."""
    assert head.scale is not None
    return outputs[:, 0], metrics.int_scores(outputs[:, 0], head.scale, head.cuts)


def likeliest(head: Head, outputs: Outputs) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
    """The likeliest label and its probability."""
    return np.array(head.labels)[outputs.argmax(axis=1)], softmax(outputs, axis=1).max(axis=1)


def all_likely(head: Head, outputs: Outputs) -> tuple[list[list[str]], list[list[float]]]:
    """The labels with a probability of at least one half, and their probabilities."""
    probabilities = expit(outputs)
    found = [np.flatnonzero(row >= 0.5) for row in probabilities]
    labels = [[head.labels[i] for i in chosen] for chosen in found]
    return labels, [row[chosen].tolist() for row, chosen in zip(probabilities, found, strict=True)]


PREDICT: dict[Kind, Callable[[Head, Outputs], tuple[Any, Any]]] = {
    "score": scored,
    "label": likeliest,
    "labels": all_likely,
}
