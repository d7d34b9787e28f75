"""Text files that begin with settings: YAML between lines of ---, then a body."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline import yaml_text
from pipeline.errors import UserError

ODD_BREAKS = re.compile(r"[\x85\u2028\u2029]|(?:^|\n)\n\Z")
"""Line ends that a block of YAML would change, or need a mark for."""


def read(raw: str, path: Path) -> tuple[dict[str, Any], str]:
    """The settings and the body of a file that holds `raw`; `path` is for errors."""
    match = re.match(r"---\n(.*?\n)---\n(.*)", raw, re.DOTALL)
    if match is None:
        raise UserError(f"{path}: no front matter; begin the file with --- lines around its settings")
    try:
        front = yaml_text.parse(match[1]) or {}
    except ValueError as error:
        raise UserError(f"{path}: the front matter is not YAML: {error}") from None
    if not isinstance(front, dict):
        raise UserError(f"{path}: the front matter is not a mapping; write one setting: value a line")
    return front, match[2].strip()


def written(front: dict[str, Any], body: str) -> str:
    """The file of such settings and body."""
    settings = yaml.dump(plain(front), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"---\n{settings}---\n{body}\n"


def plain(value: Any) -> Any:
    """The same with whole numbers written as such: 5, not 5.0."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Dumper(yaml.SafeDumper):
    """Texts of several lines stand as blocks, and lists of single values on one line."""

    def analyze_scalar(self, scalar: str) -> Any:
        """How a text may be written: tabs, and spaces that end its lines, don't keep it from being a block."""
        found = super().analyze_scalar(scalar)
        tame = re.sub(r" +(?=\n|$)", "", scalar.replace("\t", " "))
        found.allow_block = super().analyze_scalar(tame).allow_block
        return found


def text(dumper: Dumper, value: str) -> yaml.Node:
    """A text as a block where it has several lines, escaped where it must be."""
    style = '"' if ODD_BREAKS.search(value) else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def listed(dumper: Dumper, values: list[Any]) -> yaml.Node:
    """A list, on one line if nothing in it has several."""
    short = not any(isinstance(value, list | dict) or "\n" in str(value) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=short)


Dumper.add_representer(str, text)
Dumper.add_representer(list, listed)
