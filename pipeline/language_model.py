"""Causal language models as folders: read from wherever they are, written so that anything loads them."""

import struct
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, needs
from pipeline.models import files_of, pick_dtype
from pipeline.storage import replacing, writing


def load(
    name: str, setting: str, device: str = "cpu", revision: str | None = None, dtype: str = "float32"
) -> tuple[Any, Any]:
    """Tokenizer and model of a Hub name, folder, package:NAME/PATH or .gguf file, in a form that can be trained and
    saved. A LoRA adapter alone is refused."""
    transformers, safetensors = needs("transformers", "torch"), needs("safetensors", "torch")
    check_whole(name, setting)
    where, options = files_of(name, setting, revision)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=pick_dtype(dtype, device), **options)
    except (OSError, ValueError, KeyError, ImportError, struct.error, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{setting}: {name} cannot be loaded as a causal language model ({reason})") from None
    if "gguf_file" in options:
        model = unquantised(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.to(device)


def check_whole(name: str, setting: str) -> None:
    """Refuse a folder that holds what a LoRA training changed, and not the model."""
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{setting}: {name} is a LoRA adapter, not a whole model; give its base model, or merge the two"
            " (peft's merge_and_unload) and give the merged folder"
        )


def unquantised(model: Any) -> Any:
    """The same weights in a model that forgot the .gguf file they came from, which save_pretrained refuses."""
    del model.config.quantization_config
    fresh = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=model.dtype)
    fresh.generation_config = model.generation_config
    return fresh


def save(folder: Path, tokenizer: Any, model: Any) -> None:
    """Write both to a folder that from_pretrained and vLLM load; it is there whole or not at all."""
    with writing(folder), replacing(folder, "config.json") as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
