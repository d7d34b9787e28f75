"""A cache of keys and values that answers are written into."""

import functools
from typing import Any

from pipeline.errors import needs


@functools.cache
def spacious() -> Any:
    """A cache layer where further columns are written into a space kept for them. The library's own appends, which
    copies all keys and values for each token."""
    cache_utils = needs("transformers.cache_utils", "torch")

    class Spacious(cache_utils.DynamicLayer):  # type: ignore[misc, name-defined]
        def __init__(self, head: Any, n_rows: int, n_columns: int) -> None:
            super().__init__()
            self.__dict__.update(head.__dict__)
            states = head.keys, head.values
            self.space = [each.new_empty(n_rows, each.shape[1], n_columns, each.shape[3]) for each in states]
            self.write(0, states)

        def write(self, begin: int, states: tuple[Any, Any]) -> None:
            """Put keys and values (n_rows, n_heads, n_new, dim) at column `begin`."""
            end = begin + states[0].shape[2]
            for space, new in zip(self.space, states, strict=True):
                space[:, :, begin:end] = new
            self.keys, self.values = self.written = [space[:, :, :end] for space in self.space]

        def update(self, keys: Any, values: Any, *args: Any, **options: Any) -> Any:
            """Append; the library's way once the space is used up, or the library itself has cut or moved them."""
            begin = self.get_seq_length()
            if self.keys is not self.written[0] or begin + keys.shape[2] > self.space[0].shape[2]:
                return super().update(keys, values, *args, **options)
            self.write(begin, (keys, values))
            return self.keys, self.values

    return Spacious
