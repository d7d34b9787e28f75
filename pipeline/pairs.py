"""Named numbers as a column: a list of keys and values, since Hugging Face `datasets` cannot read a map."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa


def pairs(key: pa.DataType) -> pa.DataType:
    """The type of such a column."""
    return pa.list_(pa.struct({"key": key, "value": pa.float64()}))


def as_dict(value: Iterable[Any] | None) -> dict[Any, float]:
    """What such a column held, or a map, as a dict."""
    return dict(tuple(each.values()) if isinstance(each, dict) else each for each in value or ())
