"""Causal language models as folders: read from wherever they are, written so that anything loads them."""

import math
import struct
from pathlib import Path
from typing import Any

from pipeline import model_files
from pipeline.errors import UserError, needs
from pipeline.models import files_of, pick_dtype
from pipeline.storage import replacing, writing


def load(
    name: str, setting: str, device: str = "cpu", revision: str | None = None, dtype: str = "float32"
) -> tuple[Any, Any]:
    """Tokenizer and model of a Hub name, folder, package:NAME/PATH or .gguf file, in a form that can be trained and
    saved. A LoRA adapter alone, a model without all its weights, and one that reads ahead are refused."""
    transformers, safetensors = needs("transformers", "torch"), needs("safetensors", "torch")
    check_whole(name, setting)
    where, options = files_of(name, setting, revision)
    try:
        if "gguf_file" not in options and transformers.AutoConfig.from_pretrained(where, **options).is_encoder_decoder:
            raise ValueError("it is an encoder-decoder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            where, dtype=pick_dtype(dtype, device), output_loading_info=True, **model_files.of_weights(options)
        )
    except (OSError, ValueError, KeyError, ImportError, struct.error, safetensors.SafetensorError) as error:
        raise UserError(
            f"{setting}: {name} cannot be loaded as a causal language model ({first_sentence(error, setting)})"
        ) from None
    if "gguf_file" in options:
        model = unquantised(model)
    check_causal(model, sorted(found["missing_keys"]), f"{setting}: {name}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.to(device)


def first_sentence(error: Exception, setting: str) -> str:
    """What the library says, as far as it is about this."""
    return model_files.reason(error, setting).split(". ")[0]


def check_whole(name: str, setting: str) -> None:
    """Refuse a folder that is not there, and one that holds what a LoRA training changed, and not the model."""
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{setting}: {name} is a LoRA adapter, not a whole model; give its base model, or merge the two"
            " (peft's merge_and_unload) and give the merged folder"
        )
    is_path = name.count("/") > 1 or name.endswith(".gguf")
    if is_path and not name.startswith("package:") and not folder.exists():
        raise UserError(f"{setting}: {name} does not exist; give a model folder, a .gguf file or a Hub name")


def check_causal(model: Any, missing: list[str], what: str) -> None:
    """Refuse a model that was not trained to say what comes next: an encoder, or one whose output has no weights."""
    torch = needs("torch", "torch")
    if missing:
        raise UserError(f"{what} is no causal language model: it has no weights for {missing[0]}; take another")
    with torch.inference_mode():
        first = model.eval()(input_ids=torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device)).logits[:, 0].float()
    if not torch.isfinite(first).all():
        raise UserError(f"{what} says nothing: its output is no number; train it with a lower learning_rate")
    if not torch.allclose(first[0], first[1], rtol=1e-2, atol=1e-3):
        raise UserError(f"{what} is no causal language model: what it says depends on what follows; take another")


def context(model: Any) -> float:
    """The most tokens that it reads; infinity where it names no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else math.inf


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
