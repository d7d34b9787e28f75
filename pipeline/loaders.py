"""The student in the forms that other libraries load."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import classification
from pipeline.errors import needs
from pipeline.layers import Layer, Layers
from pipeline.model_files import has_own_code

SENTENCE_TRANSFORMER = "SentenceTransformer"
CLASSIFICATION = "AutoModelForSequenceClassification"

ACTIVATIONS = {"identity": "Identity", "sigmoid": "Sigmoid", "relu": "ReLU"}
"""Activations by torch's name."""


def write(
    folder: Path, encoder: Any, layers: Layers, max_tokens: int, bound: float, config: dict[str, Any]
) -> list[str]:
    """Write `encoder` (a SentenceTransformer) with `layers` behind it in float32; returns the loaders that are exact.

    Where a classification model would not be exact, the transformer is in a folder of its own, so that loading one
    fails instead of starting with random weights; but not one with code of its own, which is looked for at the root.
    """
    model = copy.deepcopy(encoder).float().cpu().eval()
    model.max_seq_length, model.default_prompt_name = max_tokens, None
    exact = classification.model_of(model, layers, bound, config)
    model[0].save_in_root = exact is not None or has_own_code(model[0].auto_model)
    for i, layer in enumerate(layers):
        model.add_module(f"head{i}", dense(layer))
    model.save(str(folder), create_model_card=False)
    name_modules_plainly(folder / "modules.json")
    if exact is None:
        return [SENTENCE_TRANSFORMER]
    exact.save_pretrained(folder)
    return [SENTENCE_TRANSFORMER, CLASSIFICATION]


def dense(layer: Layer) -> Any:
    """A layer as a sentence-transformers module."""
    torch = needs("torch", "torch")
    before_6 = importlib.util.find_spec("sentence_transformers.sentence_transformer") is None
    where = "sentence_transformers.models" if before_6 else "sentence_transformers.sentence_transformer.modules"
    n_out, n_in = layer.weight.shape
    return needs(where, "torch").Dense(
        n_in,
        n_out,
        activation_function=getattr(torch.nn, ACTIVATIONS[layer.activation])(),
        init_weight=torch.from_numpy(np.array(layer.weight, np.float32)),
        init_bias=torch.from_numpy(np.array(layer.bias, np.float32)),
    )


def name_modules_plainly(path: Path) -> None:
    """Name sentence-transformers' own modules as all its versions know them."""
    modules = json.loads(path.read_text(encoding="utf-8"))
    for module in modules:
        if module["type"].startswith("sentence_transformers."):
            module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    path.write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
