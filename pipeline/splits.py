"""Which documents are learned from, which choose the cuts and which are reported on; copies never cross."""

import hashlib
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Train
from pipeline.corpus import text_id

PARTS = ("train", "validation", "test")

ASIDE = "aside"
"""The part of documents that were chosen to be rated and hang together with one that is judged on."""

GRAM = 5
"""Words, or characters, in a row that are compared."""

LONGEST_WORD = 20
"""Mean characters to a word above which a text is compared by characters, as it has hardly any spaces."""

N_HASHES = 64

LARGE = 0.2
"""Share of the smallest part above which a unit is large."""

Pair = tuple[int, int]
T = TypeVar("T")


class Split(NamedTuple):
    """The parts of documents, aligned with them."""

    parts: NDArray[np.str_]
    """(n,) train, validation, test or aside."""
    units: NDArray[np.int64]
    """(n,) Documents of one unit (copies, near-duplicates, one group) are never learned from and judged on at once."""
    n_near_duplicates: int
    """Documents that say, nearly or exactly, what another one says already."""


def split(
    texts: Sequence[str],
    strata: Sequence[Hashable],
    groups: Sequence[str | None],
    rounds: Sequence[int],
    settings: Train,
    seed: int,
) -> Split:
    """Whole units, shared out so that each part has its share of each stratum; whatever the order of documents.

    Only the uniform sample (round 0) is judged on, and later rounds don't change its parts: their documents are
    learned from, or set aside where they hang together with one that is judged on.
    """
    ids, rows = np.unique([text_id(text) for text in texts], return_inverse=True)
    chosen = np.ones(len(ids), dtype=bool)
    chosen[rows[np.array(rounds) == 0]] = False
    first = {int(row): text for row, text in zip(rows, texts, strict=True)}
    pairs = [] if settings.near_duplicates is None else near_pairs(first, chosen, settings.near_duplicates)
    links = [*pairs, *group_pairs(rows, groups, len(ids))]
    n_nodes = len(ids) + len(texts)
    units = components(links, n_nodes)[: len(ids)]
    of_sample = components([(a, b) for a, b in links if not chosen[a] and (b >= len(ids) or not chosen[b])], n_nodes)
    sample = np.array(rounds) == 0
    parts = np.full(len(texts), "train", dtype="U10")
    shares = {"train": 1 - settings.validation_share - settings.test_share} | {
        "validation": settings.validation_share,
        "test": settings.test_share,
    }
    parts[sample] = deal(of_sample[rows[sample]], ids[rows[sample]], pick(strata, sample), shares, seed)
    judged = np.unique(units[rows[np.isin(parts, ("validation", "test"))]])
    parts[~sample & np.isin(units[rows], judged)] = ASIDE
    n_distinct = len(set(components(pairs, len(ids)).tolist()))
    return Split(parts, units[rows], len(texts) - n_distinct)


def folds(units: NDArray[np.int64], strata: Sequence[Hashable], n_folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each document, from 0: (n,); whole units, each stratum in all folds."""
    names = np.array([f"{unit:012d}" for unit in units])
    dealt = deal(units, names, strata, {str(fold): 1 / n_folds for fold in range(n_folds)}, seed)
    return dealt.astype(np.int64)


def deal(
    units: NDArray[np.int64],
    ids: NDArray[np.str_],
    strata: Sequence[Hashable],
    shares: dict[str, float],
    seed: int,
) -> NDArray[np.str_]:
    """The part of each document: unit by unit, in seeded order within a stratum, each to the part that then has least
    of what it is due (D'Hondt), so that a unit too large for a small part goes to a large one. Large units come first,
    the largest before all, so that others can make up for them."""
    members: dict[int, list[int]] = {}
    for row, unit in enumerate(units.tolist()):
        members.setdefault(unit, []).append(row)
    large = LARGE * min(shares.values()) * len(units)

    def place(rows: list[int]) -> tuple[int, tuple[str, str]]:
        return -len(rows) if len(rows) > large else 0, turn([(str(ids[i]), strata[i]) for i in rows], seed)

    order = sorted(members.values(), key=place)
    dealt = np.empty(len(units), dtype="U10")
    counts = dict.fromkeys(shares, 0)
    for rows in order:
        part = min(shares, key=lambda name: (counts[name] + len(rows)) / shares[name])
        counts[part] += len(rows)
        dealt[rows] = part
    return dealt


def sides(
    units: NDArray[np.int64], strata: Sequence[Hashable], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions on the one side and those held out, which are about `share` of all; whole units, evenly by stratum."""
    names = np.array([f"{unit:012d}" for unit in units])
    dealt = deal(units, names, strata, {"used": 1 - share, "held_out": share}, seed)
    return np.flatnonzero(dealt == "used"), np.flatnonzero(dealt == "held_out")


def turn(members: list[tuple[str, Hashable]], seed: int) -> tuple[str, str]:
    """When a unit's turn comes: by stratum, then by a seeded hash of its first id."""
    id, stratum = min(members, key=lambda member: (member[0], str(member[1])))
    return str(stratum), hashlib.sha256(f"{seed} {id}".encode()).hexdigest()


def pick(values: Sequence[T], chosen: NDArray[np.bool_]) -> list[T]:
    """The chosen values, in order."""
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]


# -- what hangs together ----------------------------------------------------------------------------------------------


def components(links: Iterable[Pair], n: int) -> NDArray[np.int64]:
    """The connected component of each of n nodes."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), dtype=bool), (ends[:, 0], ends[:, 1])), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def group_pairs(rows: NDArray[np.int64], groups: Sequence[str | None], n: int) -> Iterator[Pair]:
    """Each text linked to a node of its group, counted from n."""
    nodes: dict[str, int] = {}
    for row, group in zip(rows.tolist(), groups, strict=True):
        if group is not None:
            yield row, nodes.setdefault(group, n + len(nodes))


def near_pairs(texts: dict[int, str], chosen: NDArray[np.bool_], least: float) -> list[Pair]:
    """Links between distinct texts of which this share of grams is common (Jaccard), enough of them to join all that
    hang together: candidates by MinHash with banding (Broder 1997), each compared exactly.

    The uniform sample comes first, so that its own links are complete without the others.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=least, num_perm=N_HASHES, weights=(0.1, 0.9))
    order = sorted(texts, key=lambda i: (bool(chosen[i]), i))
    found: dict[int, NDArray[np.uint32]] = {}
    joined: list[Pair] = []
    roots = list(range(max(texts, default=-1) + 1))
    blank = MinHash(num_perm=N_HASHES, hashfunc=int)
    for i in order:
        found[i] = grams(texts[i])
        sketch = blank.copy()
        sketch.update_batch(found[i].tolist())
        for j in sorted(index.query(sketch)):
            if root(roots, i) != root(roots, j) and jaccard(found[i], found[j]) >= least:
                roots[root(roots, i)] = root(roots, j)
                joined.append((i, j))
        index.insert(i, sketch, check_duplication=False)
    return joined


def root(roots: list[int], i: int) -> int:
    """The one that stands for all that is joined with i (union-find, halving paths)."""
    while roots[i] != i:
        roots[i] = i = roots[roots[i]]
    return i


def grams(text: str) -> NDArray[np.uint32]:
    """Distinct hashes of a text's word 5-grams; of characters where it has few words or hardly any spaces."""
    words = re.findall(r"\w+", text.lower())
    pieces = words if len(words) >= GRAM and len(text) <= LONGEST_WORD * len(words) else text.lower().split()
    if pieces is not words:
        pieces = list(" ".join(pieces))
    if len(pieces) < GRAM:
        return np.array([hashed("".join(pieces))], dtype=np.uint32)
    codes = np.array([hashed(piece) for piece in pieces], dtype=np.uint64)
    mixed = np.zeros(len(codes) - GRAM + 1, dtype=np.uint64)
    for k in range(GRAM):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + len(mixed)]
    return np.unique(mixed >> np.uint64(32)).astype(np.uint32)


@lru_cache(maxsize=2**18)
def hashed(piece: str) -> int:
    """32 bits of a word."""
    return crc32(piece.encode("utf-8", "surrogatepass"))


def jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """Share of what either has that both have."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
