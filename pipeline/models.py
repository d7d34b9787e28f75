"""Models by name: where they are, and what they run on."""

import importlib.util
import logging
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UserError, needs

log = logging.getLogger("gristmill")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that cutting a text needs."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Token ids and their masks."""
        ...


def locate(name: str, setting: str) -> str:
    """A Hub name or folder as it is; package:<import name>/<path> as the folder inside that installed package."""
    if not name.startswith("package:"):
        looks_local = name.startswith(("/", "./", "../", "~"))
        if looks_local and not Path(name).expanduser().exists():
            raise UserError(f"{setting}: {name} does not exist; give a model folder or a Hub name")
        return str(Path(name).expanduser()) if looks_local else name
    package, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{setting}: package {package} is not installed; bash scripts/demo.sh installs the demo's models"
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise UserError(f"{setting}: package {package} holds no {inside}")
    return str(path)


def pick_device(device: str | None) -> str:
    """The device asked for, or the best one present; what was picked is logged, so a missing GPU is noticed."""
    torch = needs("torch", "torch")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        log.info("device: %s (%d CUDA devices)", device, torch.cuda.device_count())
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: {device} was asked for, but torch finds no CUDA; give --…device cpu")
    return device


def pick_dtype(dtype: str, device: str) -> Any:
    """A torch dtype; auto is bfloat16 where the hardware multiplies it, float32 elsewhere."""
    torch = needs("torch", "torch")
    if dtype == "auto":
        on_cpu = device == "cpu" and hasattr(torch.cpu, "get_capabilities")
        able = torch.cpu.get_capabilities() if on_cpu else {}
        fast = device.startswith("cuda") or able.get("avx512_bf16") or able.get("amx_bf16")
        dtype = "bfloat16" if fast else "float32"
    return getattr(torch, dtype)


def special_tokens_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens a tokenizer puts before and after a text, such as <s> or [SEP]."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:at], full[at + len(plain) :]


def first_tokens(text: str, limit: int, tokenizer: Tokenizer, **options: Any) -> tuple[list[int], bool]:
    """The first `limit` token ids of a text, and whether there were more.

    A very long text is first cut at a space, far beyond the limit, so that 50 MB cost no more than a page; should the
    piece give too few tokens, a longer one is taken.
    """
    characters = 64 * limit
    while True:
        piece = cut_at_space(text, characters)
        ids = tokenizer(piece, add_special_tokens=False, **options)["input_ids"]
        if len(ids) > limit or len(piece) == len(text):
            return ids[:limit], len(ids) > limit
        characters *= 4


def cut_at_space(text: str, characters: int) -> str:
    """A prefix of at most so many characters that ends between words where it can."""
    if len(text) <= characters:
        return text
    end = text.rfind(" ", 0, characters)
    return text[: end if end > characters // 2 else characters]
