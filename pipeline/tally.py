"""What became of the rows of a shard, or of several: counted, added up, and as JSON."""

import heapq
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.shards import Counts

N_EXAMPLES = 3
Example = tuple[int, float, str]
"""(priority, score, beginning of the text)"""
Examples = dict[str, list[Example]]
"""A few rows that were kept, and a few that were dropped."""
ARRAYS = ("n_rows", "n_kept", "n_tokens_kept")


class Tally:
    """What became of rows, in all and by group."""

    def __init__(self, n_groups: int) -> None:
        self.counts = Counts()
        self.fates: Counter[str] = Counter()
        self.has_tokens = True
        self.n_tokens = 0
        self.n_rows, self.n_kept, self.n_tokens_kept = np.zeros((3, n_groups), np.int64)
        self.lowest = np.full(n_groups, math.inf)
        """Lowest score that was kept."""
        self.examples: Examples = {"kept": [], "dropped": []}

    def add(self, other: "Tally") -> None:
        """Add what became of other rows."""
        for name, n in asdict(other.counts).items():
            setattr(self.counts, name, getattr(self.counts, name) + n)
        self.fates += other.fates
        self.has_tokens &= other.has_tokens
        self.n_tokens += other.n_tokens
        self.n_rows += other.n_rows
        self.n_kept += other.n_kept
        self.n_tokens_kept += other.n_tokens_kept
        self.lowest = np.minimum(self.lowest, other.lowest)
        for side, heap in other.examples.items():
            self.examples[side] = heapq.nlargest(N_EXAMPLES, {*self.examples[side], *heap})

    def said(self) -> dict[str, Any]:
        """As JSON; `from_said` reads it."""
        arrays = {name: getattr(self, name).tolist() for name in ARRAYS}
        lowest = [score if math.isfinite(score) else None for score in self.lowest.tolist()]
        plain = {name: getattr(self, name) for name in ("fates", "has_tokens", "n_tokens", "examples")}
        return {"counts": asdict(self.counts), **plain, **arrays, "lowest": lowest}


def from_said(said: dict[str, Any]) -> Tally:
    """A tally from JSON."""
    tally = Tally(len(said["lowest"]))
    tally.counts, tally.fates = Counts(**said["counts"]), Counter(said["fates"])
    tally.has_tokens, tally.n_tokens = said["has_tokens"], said["n_tokens"]
    for name in ARRAYS:
        setattr(tally, name, np.array(said[name], np.int64))
    tally.lowest = np.array([math.inf if score is None else score for score in said["lowest"]])
    tally.examples = {side: [tuple(each) for each in heap] for side, heap in said["examples"].items()}
    return tally
