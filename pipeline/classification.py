"""The encoder and its head as one classification model of transformers, for the families where that is exact."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import needs
from pipeline.layers import Layer, Layers
from pipeline.model_files import has_own_code

Weights = NDArray[np.floating[Any]]


class Pair(NamedTuple):
    """What stands behind the encoder in a classification model: outer @ act(inner @ x + inner_bias) + outer_bias."""

    inner: Weights
    """(n_hidden, dim)"""
    inner_bias: Weights
    outer: Weights
    """(n_outputs, n_hidden)"""
    outer_bias: Weights


class Family(NamedTuple):
    """Where an architecture has its two layers, and what can be said with them."""

    inner: str
    outer: str
    pair: Callable[[Layers, float], Pair | None]
    poolings: tuple[str, ...] = ("cls",)
    config: Callable[[Layers, str], dict[str, Any]] = lambda layers, pooling: {}  # noqa: ARG005


def tanh_pair(layers: Layers, bound: float) -> Pair | None:
    """Layers through a tanh: small numbers pass it unchanged (to 1e-7 of outputs up to `bound`), and a sigmoid is one:
    sigmoid(z) = (1 + tanh(z / 2)) / 2."""
    small = 2.0 ** -(11 + math.ceil(math.log2(bound)))
    match layers:
        case (Layer(weight, bias, "identity"),):
            return Pair(small * weight, small * bias, np.eye(len(bias)) / small, np.zeros(len(bias)))
        case (Layer(weight, bias, "sigmoid"), Layer(outer, outer_bias, "identity")):
            return Pair(weight / 2, bias / 2, outer / 2, outer_bias + outer.sum(axis=1) / 2)
    return None


def relu_pair(layers: Layers, _bound: float) -> Pair | None:
    """Layers through a ReLU: x = relu(x) - relu(-x)."""
    match layers:
        case (Layer(weight, bias, "identity"),):
            both = np.eye(len(bias))
            return Pair(
                np.concatenate([weight, -weight]),
                np.concatenate([bias, -bias]),
                np.concatenate([both, -both], axis=1),
                np.zeros(len(bias)),
            )
        case (Layer(weight, bias, "relu"), Layer(outer, outer_bias, "identity")):
            return Pair(weight, bias, outer, outer_bias)
    return None


def any_pair(layers: Layers, _bound: float) -> Pair | None:
    """Layers through an activation that the configuration names."""
    match layers:
        case (Layer(weight, bias, "identity"),):
            return Pair(weight, bias, np.eye(len(bias)), np.zeros(len(bias)))
        case (Layer(weight, bias, _), Layer(outer, outer_bias, "identity")):
            return Pair(weight, bias, outer, outer_bias)
    return None


def normalised_pair(layers: Layers, bound: float) -> Pair | None:
    """A layer through a layer norm: beside two large constants outputs up to `bound` hardly change the spread that
    they are divided by (to 1e-7), and beside their negatives not the mean."""
    match layers:
        case (Layer(weight, bias, "identity"),):
            large = bound * 2.0**12
            inner = np.concatenate([weight, -weight, np.zeros((2, weight.shape[1]))])
            spread = large * math.sqrt(2 / weight.shape[1])
            outer = np.concatenate([spread * np.eye(len(bias)), np.zeros((len(bias), len(bias) + 2))], axis=1)
            return Pair(inner, np.concatenate([bias, -bias, [large, -large]]), outer, np.zeros(len(bias)))
    return None


TANH = Family("classifier.dense", "classifier.out_proj", tanh_pair)

FAMILIES = {
    "bert": Family("bert.pooler.dense", "classifier", tanh_pair),
    "roberta": TANH,
    "xlm-roberta": TANH,
    "camembert": TANH,
    "mpnet": TANH,
    "distilbert": Family("pre_classifier", "classifier", relu_pair),
    "deberta-v2": Family(
        "pooler.dense",
        "classifier",
        any_pair,
        config=lambda layers, _: {"pooler_hidden_act": named(layers[0])},
    ),
    "modernbert": Family(
        "head.dense",
        "classifier",
        normalised_pair,
        poolings=("cls", "mean"),
        config=lambda _, pooling: {
            "classifier_bias": True,
            "classifier_activation": "linear",
            "classifier_pooling": pooling,
        },
    ),
}


def named(layer: Layer) -> str:
    """The activation by transformers' name."""
    return "linear" if layer.activation == "identity" else layer.activation


def model_of(encoder: Any, layers: Layers, bound: float, config: dict[str, Any]) -> Any | None:
    """A classification model that gives the outputs of `layers` on `encoder` (a SentenceTransformer in float32), with
    what `config` says of them; None where that could not be exact. `bound` is about the largest output."""
    transformers = needs("transformers", "torch")
    own, pooling = encoder[0].auto_model, pooling_of(encoder)
    family = FAMILIES.get(own.config.model_type)
    if family is None or has_own_code(own) or pooling not in family.poolings:
        return None
    pair = family.pair(layers, bound)
    if pair is None or len(pair.inner_bias) > own.config.hidden_size:
        return None
    changed = type(own.config).from_dict({**own.config.to_dict(), **family.config(layers, pooling), **config})
    model = transformers.AutoModelForSequenceClassification.from_config(changed).float().eval()
    missing = model.base_model.load_state_dict(own.state_dict(), strict=False).missing_keys
    assert not [name for name in missing if "pooler" not in name], f"weights that {type(model)} lacks: {missing}"
    fill(model.get_submodule(family.inner), pair.inner, pair.inner_bias)
    fill(model.get_submodule(family.outer), pair.outer, pair.outer_bias)
    return model


def pooling_of(encoder: Any) -> str | None:
    """How token states become an embedding, where that is all that comes after the transformer."""
    if [type(module).__name__ for module in list(encoder)[1:]] != ["Pooling"]:
        return None
    config = encoder[1].get_config_dict()
    if "pooling_mode" in config:
        return config["pooling_mode"] if isinstance(config["pooling_mode"], str) else None
    modes = [name for name, is_on in config.items() if name.startswith("pooling_mode_") and is_on]
    return BEFORE_6.get(modes[0]) if len(modes) == 1 else None


BEFORE_6 = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
"""Names of poolings in sentence-transformers before version 6."""


def fill(linear: Any, weight: Weights, bias: Weights) -> None:
    """Put the weights into the first rows and columns of a larger layer of zeros."""
    torch = needs("torch", "torch")
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        linear.weight[: weight.shape[0], : weight.shape[1]] = torch.from_numpy(np.asarray(weight, np.float32))
        linear.bias[: len(bias)] = torch.from_numpy(np.asarray(bias, np.float32))
