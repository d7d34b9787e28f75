"""Dense layers: what a head is made of."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Outputs = NDArray[np.float32]

Activation = Literal["identity", "sigmoid", "relu"]

ACTIVATIONS: dict[Activation, Callable[[Outputs], Outputs]] = {
    "identity": lambda values: values,
    "sigmoid": expit,
    "relu": lambda values: np.maximum(values, 0),
}


class Layer(NamedTuple):
    """One dense layer: activation(weight x + bias)."""

    weight: NDArray[np.float32]
    """(n_out, n_in)"""
    bias: NDArray[np.float32]
    """(n_out,)"""
    activation: Activation = "identity"

    def __call__(self, values: Outputs) -> Outputs:
        """(n, n_out) of (n, n_in)."""
        return ACTIVATIONS[self.activation](values @ self.weight.T + self.bias)


Layers = tuple[Layer, ...]
"""From an embedding to the outputs of a head, one after the other."""


def activations(layers: Layers) -> tuple[Activation, ...]:
    """The activation of each layer."""
    return tuple(layer.activation for layer in layers)


def side_by_side(stacks: Sequence[Layers]) -> Layers:
    """One stack with the outputs of several, in their order; their activations must be the same."""
    assert len({activations(layers) for layers in stacks}) == 1
    return tuple(joined(each, shared_input=i == 0) for i, each in enumerate(zip(*stacks, strict=True)))


def joined(layers: Sequence[Layer], shared_input: bool) -> Layer:
    """Layers as one: all reading the same input, or each its own part of it."""
    from scipy.linalg import block_diag

    weights = [layer.weight for layer in layers]
    weight = np.concatenate(weights) if shared_input else block_diag(*weights)
    bias = np.concatenate([layer.bias for layer in layers])
    return Layer(weight.astype(np.float32), bias.astype(np.float32), layers[0].activation)
