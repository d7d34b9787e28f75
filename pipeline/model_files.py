"""Models as data: weights in safetensors or GGUF, no pickles, and no code of their own unless that is asked for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

from pipeline.errors import UserError

PICKLED = re.compile(r"(pytorch_model|adapter_model)[^/]*\.bin|[^/]+\.(pt|pth|ckpt|pkl|pickle|joblib)")
"""Files of weights that are, or may be, pickles: programs that run when they are read."""
UNPICKLING = re.compile(r"Unsupported global|Weights only load")
OWN_CODE = re.compile(r"custom code|third-party code")
"""What the libraries say of a model that is more than data."""

TRUSTING = ("encoder", "teacher")
"""Sections with a setting trust_remote_code."""
NO_CODE = {"trust_remote_code": False}
"""For from_pretrained: the default would ask on the terminal."""


def of_weights(options: dict[str, Any]) -> dict[str, Any]:
    """What from_pretrained is given, for reading weights."""
    return options if "gguf_file" in options else {**options, "use_safetensors": True}


def check(where: str, setting: str) -> None:
    """Refuse a pickle, a folder here that holds its weights in nothing else, and one that reaches outside itself."""
    path = Path(where)
    if path.is_file() and PICKLED.fullmatch(path.name):
        raise pickles(setting, path)
    for folder in folders(path, setting) if path.is_dir() else []:
        files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
        found = [name for name in files if PICKLED.fullmatch(name)]
        if found and not any(name.endswith((".safetensors", ".gguf")) for name in files):
            raise pickles(setting, folder / found[0])


def pickles(setting: str, path: Path) -> UserError:
    """What to say of a pickle."""
    return UserError(f"{setting}: {path} may be a pickle, which can run code; save the model as safetensors")


def folders(root: Path, setting: str) -> Iterator[Path]:
    """A model's folder, and those of its modules."""
    yield root
    for name in module_names(root):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{setting}: {root}/modules.json names {name}, outside its folder; take another model")
        if path.parts:
            yield root / path


def module_names(root: Path) -> list[str]:
    """The folders that a sentence-transformers model names; none where the file cannot be read."""
    try:
        said = json.loads((root / "modules.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(each.get("path", "")) for each in said if isinstance(each, dict)] if isinstance(said, list) else []


def reason(error: Exception, setting: str) -> str:
    """Why a library did not load the model of a setting, in a few words."""
    said, section = " ".join(str(error).split()), setting.partition(".")[0]
    if isinstance(error, UnpicklingError) or UNPICKLING.search(said):
        return "it comes with pickles, which can run code and are never read; take a model without"
    if OWN_CODE.search(said):
        trust = f"read it, pin {section}.revision, and set {section}.trust_remote_code"
        way_out = trust if section in TRUSTING else "take a model without"
        return f"it comes with code of its own, which is not run unasked; {way_out}"
    return said[:200]


def has_own_code(model: Any) -> bool:
    """Whether a model's class came with it; its configuration may bear the name of an architecture that we know."""
    return type(model).__module__.startswith("transformers_modules.")
