"""Which rows are kept: each has a key, and the rows with the highest keys are kept up to an amount, group by group.

Keys lie on disk, a file per shard, so memory does not grow with the corpus.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import metrics
from pipeline.errors import UserError
from pipeline.sample import priority

Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]

ROW = np.dtype([("key", "<f4"), ("group", "<i4"), ("tokens", "<i8")])
"""What a choice needs to know of a row; group -1 is out of the question, whatever its key."""
Rows = NDArray[np.void]

BLOCK_ROWS = 2**18
"""Rows of a key file that are held at a time."""
NONE_KEPT = 2**32
"""The cut of a group of which nothing is kept: above every key."""
MOST_GROUPS = 10_000
N_CELLS = 2**22
"""Counters of copies; texts that share one by chance only draw other random numbers."""


# -- keys -------------------------------------------------------------------------------------------------------------


class Noise:
    """Standard Gumbel noise that follows from a seed and the document's id, and differs among its copies.

    The highest of log-weight + noise are a draw without replacement in proportion to the weights (Gumbel-top-k,
    arXiv:1903.06059). The same documents in the same order draw the same, however they are cut into shards.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.n_seen = np.zeros(N_CELLS, np.uint32)

    def draw(self, ids: Sequence[str]) -> NDArray[np.float64]:
        """Noise (n,) of the next documents of the corpus."""
        hashes = np.array([priority(name, self.seed) for name in ids], np.uint64)
        uniform = (mixed(hashes + self.copies(hashes) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)).astype(float)
        return -np.log(-np.log((uniform + 0.5) * 2.0**-53))

    def copies(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """How many documents of the same hash came before each: (n,)."""
        cells, places, counts = np.unique(hashes % np.uint64(N_CELLS), return_inverse=True, return_counts=True)
        order = np.argsort(places, kind="stable")
        within = np.empty(len(hashes), np.int64)
        within[order] = np.arange(len(hashes)) - np.repeat(np.cumsum(counts) - counts, counts)
        earlier = self.n_seen[cells][places] + within
        self.n_seen[cells] += counts.astype(np.uint32)
        return earlier.astype(np.uint64)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Integers whose bits are as good as random (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Groups:
    """Values of a column by number, in the order in which they come."""

    def __init__(self, column: str | None, setting: str) -> None:
        self.column, self.setting = column, setting
        self.codes: dict[str, int] = {}

    def code(self, values: Iterable[Any]) -> NDArray[np.int32]:
        """The number of each value: (n,); a missing one is a value too."""
        found = [self.codes.setdefault(name_of(value), len(self.codes)) for value in values]
        if len(self.codes) > MOST_GROUPS:
            raise UserError(
                f"{self.setting}: {self.column} has more than {MOST_GROUPS:,} values; give a column with fewer"
            )
        return np.array(found, np.int32)


def name_of(value: Any) -> str:
    """A value of a column as text."""
    return "(none)" if value is None else str(value)


def blocks(paths: Sequence[Path]) -> Iterator[Rows]:
    """The rows of key files that have a group, a block at a time."""
    for path in paths:
        for start in range(0, path.stat().st_size // ROW.itemsize, BLOCK_ROWS):
            rows = np.fromfile(path, ROW, BLOCK_ROWS, offset=start * ROW.itemsize)
            yield rows[rows["group"] >= 0]


# -- the cut of each group --------------------------------------------------------------------------------------------

Weigh = Callable[[Rows], Ints]
"""What each row counts: (n,)."""


def documents(rows: Rows) -> Ints:
    """Each row counts one."""
    return np.ones(len(rows), np.int64)


def tokens(rows: Rows) -> Ints:
    """Each row counts its tokens."""
    return np.asarray(rows["tokens"], np.int64)


def totals(read: Callable[[], Iterator[Rows]], n_groups: int, weigh: Weigh) -> Ints:
    """The weight of each group: (n_groups,)."""
    return added((np.bincount(rows["group"], weigh(rows), n_groups) for rows in read()), n_groups)


def cuts_of_documents(read: Callable[[], Iterator[Rows]], wanted: Ints) -> Ints:
    """The lowest key that is kept of each group, so that `wanted` (n_groups,) rows or, with ties, more are kept."""
    return crossings(read, wanted, documents)[0]


def cuts_of_tokens(read: Callable[[], Iterator[Rows]], wanted: Ints) -> Ints:
    """The lowest key that is kept of each group, so that no more than `wanted` tokens are; ties are dropped together
    where they are too many."""
    keys, reached = crossings(read, wanted, tokens)
    return keys + (reached > wanted)


def crossings(read: Callable[[], Iterator[Rows]], wanted: Ints, weigh: Weigh) -> tuple[Ints, Ints]:
    """Per group the key at which the weight from the top reaches `wanted`, and the weight at or above that key.

    Exact in constant memory: keys are counted by their upper 8 bits, then, within the group's one bin that holds the
    crossing, by the next 8, and so on. Where all is less than `wanted` the key is 0, where nothing is wanted
    NONE_KEPT.
    """
    n_groups = len(wanted)
    prefix, before = np.zeros(n_groups, np.int64), np.zeros(n_groups, np.int64)
    short = np.zeros(n_groups, bool)
    each = np.arange(n_groups)
    for shift in (24, 16, 8, 0):
        counts = added((of_bins(rows, prefix, shift, weigh) for rows in read()), n_groups * 256).reshape(-1, 256)
        reached = before[:, None] + np.cumsum(counts[:, ::-1], axis=1)
        crossed = reached >= wanted[:, None]
        short |= ~crossed.any(axis=1)
        place = np.where(short, 255, crossed.argmax(axis=1))
        above = np.where(place > 0, reached[each, place - 1], before)
        through, before = reached[each, place], above
        prefix = prefix << 8 | (255 - place)
    keys = np.where(short, 0, prefix)
    return np.where(wanted > 0, keys, NONE_KEPT), np.where(wanted > 0, np.where(short, 0, through), 0)


def of_bins(rows: Rows, prefix: Ints, shift: int, weigh: Weigh) -> NDArray[Any]:
    """The weight by group and next 8 bits of the key, of rows whose key begins like their group's prefix."""
    keys = metrics.sortable(rows["key"]).astype(np.int64)
    inside = keys >> (shift + 8) == prefix[rows["group"]]
    bins = rows["group"][inside].astype(np.int64) * 256 + (keys[inside] >> shift & 255)
    return np.bincount(bins, weigh(rows[inside]), len(prefix) * 256)


def added(parts: Iterable[NDArray[Any]], size: int) -> Ints:
    """The sum of counts (size,), exact up to 2^53 in a part."""
    total = np.zeros(size, np.int64)
    for part in parts:
        total += part.astype(np.int64)
    return total


def is_kept(rows: Rows, cuts: Ints) -> NDArray[np.bool_]:
    """Whether each row's key reaches the cut of its group: (n,)."""
    group = rows["group"]
    return np.asarray((group >= 0) & (metrics.sortable(rows["key"]) >= cuts[np.maximum(group, 0)]), bool)
