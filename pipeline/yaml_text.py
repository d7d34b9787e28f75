"""YAML as data: of plain types alone, and no larger than it looks."""

import re
from typing import Any

import yaml

LONGEST = 2**20
"""Characters."""
MOST_VALUES = 100_000
"""Values, counting those that aliases repeat."""
DEEPEST = 100
LONG_NUMBER = re.compile(r"[-+\d:_.]{1000,}")
OPENS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
CLOSES = yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken
UNUSABLE = yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError
"""What PyYAML raises for text that it cannot read, and for values that are not what their tag says."""


def parse(text: str) -> Any:
    """What the YAML says; ValueError, in one line, where it says nothing that can be used."""
    if len(text) > LONGEST:
        raise ValueError(f"{len(text):,} characters; {LONGEST:,} are the most")
    try:
        check_tokens(text)
        check_size(text)
        return yaml.safe_load(text)
    except UNUSABLE as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None


def check_tokens(text: str) -> None:
    """Refuse what is nested so deeply, or a number so long (1:1:1 ... is one, to base 60), that it takes very long."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, OPENS) - isinstance(token, CLOSES)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        if isinstance(token, yaml.ScalarToken) and LONG_NUMBER.fullmatch(token.value):
            raise ValueError("a number of more than 1,000 digits")


def check_size(text: str) -> None:
    """Refuse a document in which aliases of aliases repeat values without end."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and n_values(root, {}) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values, through aliases (*name)")


def n_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, those of aliases each time; an alias to what it stands in has no end."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # until it is counted
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        known[id(node)] = 1 + sum(n_values(part, known) for part in parts)
    return known[id(node)]
