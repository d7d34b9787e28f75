"""Models by name: where they are, and what they run on."""

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any, Protocol

from pipeline import model_files
from pipeline.errors import UserError, needs

log = logging.getLogger("gristmill")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that cutting a text needs."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Token ids and their masks."""
        ...


def locate(name: str, setting: str) -> str:
    """A Hub name or folder as it is; package:<import name>/<path> as the folder inside that installed package."""
    if name.startswith("package:"):
        return locate_in_package(name.removeprefix("package:"), setting)
    looks_local = name.startswith(("/", "./", "../", "~"))
    if looks_local and not Path(name).expanduser().exists():
        raise UserError(f"{setting}: {name} does not exist; give a model folder or a Hub name")
    where = str(Path(name).expanduser()) if looks_local else name
    model_files.check(where, setting)
    return where


def locate_in_package(name: str, setting: str) -> str:
    """The folder or file <import name>/<path>."""
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{setting}: package {package!r} is not installed; bash scripts/demo.sh installs the demo's models"
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise UserError(f"{setting}: package {package} holds no {inside}")
    return str(path)


def files_of(name: str, setting: str, revision: str | None = None, trust: bool = False) -> tuple[str, dict[str, Any]]:
    """What from_pretrained is given for a Hub name, folder or .gguf file: where it is, and options."""
    where = locate(name, setting)
    if where.endswith(".gguf"):
        needs("gguf", "demo")
        return str(Path(where).parent), {"gguf_file": Path(where).name, **model_files.NO_CODE}
    return where, {**({"revision": revision} if revision else {}), "trust_remote_code": trust}


@functools.lru_cache(maxsize=2)
def load_tokenizer(name: str, setting: str, revision: str | None = None, trust: bool = False) -> Any:
    """The tokenizer of a Hub name, folder or .gguf file."""
    transformers, (where, options) = needs("transformers", "torch"), files_of(name, setting, revision, trust)
    try:
        return transformers.AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{setting}: no tokenizer of {name} ({model_files.reason(error, setting)})") from None


def pick_device(device: str | None) -> str:
    """The device asked for, or the best one present; what was picked is logged, so a missing GPU is noticed."""
    torch = needs("torch", "torch")
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {"cuda": n_cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    present = [f"{kind}:{i}" for kind in found for i in range(found[kind])]
    if device is None:
        device = present[0].partition(":")[0]
        log.info("device: %s (%d CUDA devices)", device, n_cuda)
    elif (device if ":" in device else f"{device}:0") not in present:
        raise UserError(
            f"device {device} is not here; torch finds {', '.join(present)}; leave it out for the best one"
        )
    return device


def each(device: str) -> list[str]:
    """The devices that a name stands for: cuda is all GPUs."""
    n_cuda = needs("torch", "torch").cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{i}" for i in range(n_cuda)] or [device]


def pick_dtype(dtype: str, device: str) -> Any:
    """A torch dtype; auto is bfloat16 where the hardware multiplies it, float32 elsewhere."""
    torch = needs("torch", "torch")
    if dtype == "auto":
        dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return getattr(torch, dtype)


def multiplies_bfloat16(device: str) -> bool:
    """Whether the hardware does it itself; CUDA before Ampere and most CPUs only emulate it, slowly."""
    torch = needs("torch", "torch")
    if device.startswith("cuda"):
        return bool(torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip)
    able = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def special_tokens_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens a tokenizer puts before and after a text, such as <s> or [SEP]."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:at], full[at + len(plain) :]


CUT_REACHES = 32
"""Tokens before a cut that may differ from those of the whole text, in long runs without a space."""


def first_tokens(text: str, limit: int, tokenizer: Tokenizer, **options: Any) -> tuple[list[int], bool]:
    """The first `limit` token ids of a text, and whether there were more.

    A very long text is first cut between words, far beyond the limit, so that 50 MB cost no more than a page; should
    the piece give too few tokens, a longer one is taken. Only inside a run of thousands of equal characters can the
    tokens differ from those of the whole text.
    """
    characters = max(64 * limit, 4096)
    while True:
        piece = cut_at_space(text, characters)
        ids = tokenizer(piece, **{"add_special_tokens": False, "verbose": False, **options})["input_ids"]
        if len(ids) > limit + CUT_REACHES or len(piece) == len(text):
            return ids[:limit], len(ids) > limit
        characters *= 4


def cut_at_space(text: str, characters: int) -> str:
    """A prefix of at most so many characters that ends between words where it can."""
    if len(text) <= characters:
        return text
    end = max(text.rfind(space, 0, characters) for space in " \n\t\r")
    return text[: end if end > characters // 2 else characters]
