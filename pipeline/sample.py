"""A seeded sample of a corpus: uniform over all of it, or stratified by a column."""

import hashlib
import heapq
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.config import Corpus
from pipeline.corpus import column, decoded, is_empty, read, text_id, texts
from pipeline.errors import UserError
from pipeline.shards import Counts, Shard, find_shards


class Document(NamedTuple):
    """A sampled document. `gold` is a known quality, `stratum` the group it was drawn from."""

    id: str
    text: str
    gold: float | None = None
    stratum: str | None = None


def sample(
    corpus: Corpus, size: int, seed: int, stratify_by: str | None = None, gold_column: str | None = None
) -> tuple[list[Document], Counts]:
    """A seeded sample of the distinct, non-empty texts of the whole corpus.

    Every text has a priority, the hash of seed and content, and the smallest ones are drawn (bottom-k): uniform, one
    pass, memory of a few times `size` documents, and the same however the corpus is cut into shards. With
    `stratify_by` the places are shared out equally among the values of that column (`size` of them, drawn the same
    way, if there are more), and what small strata leave goes to the others.
    """
    counts, everything = Counts(), Smallest()
    strata: dict[str, Smallest] = {}
    for shard in find_shards(corpus):
        for documents in documents_of(shard, corpus, counts, stratify_by, gold_column):
            for document in documents:
                rank = priority(text_id(document.text), seed)
                everything.add(rank, document, size)
                if document.stratum is not None:
                    strata.setdefault(document.stratum, Smallest()).add(rank, document, size)
            trim(strata, size, seed)
    return share_out(strata, everything, size), counts


def priority(name: str, seed: int) -> int:
    """A number of 64 bits as good as drawn at random, always the same for a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big")


class Smallest:
    """The documents with the smallest priorities so far, one per text."""

    def __init__(self) -> None:
        self.documents: dict[int, Document] = {}
        self.heap: list[int] = []

    def add(self, rank: int, document: Document, size: int) -> None:
        """Take a document in if it is among the `size` smallest; which of one text's copies stays is settled too."""
        if rank in self.documents:
            self.documents[rank] = min(self.documents[rank], document, key=copy_order)
        elif len(self.heap) < size or rank < -self.heap[0]:
            heapq.heappush(self.heap, -rank)
            self.documents[rank] = document
            self.keep(size)

    def keep(self, size: int) -> None:
        """Drop the largest priorities beyond `size`."""
        while len(self.heap) > size:
            del self.documents[-heapq.heappop(self.heap)]


def copy_order(document: Document) -> tuple[str, str, bool, float]:
    """Of two copies of a text the smaller id counts, then the smaller stratum, then a known quality."""
    return document.id, document.stratum or "", document.gold is None, document.gold or 0.0


def trim(strata: dict[str, Smallest], size: int, seed: int) -> None:
    """Drop what cannot be drawn any more: shares only fall as documents come, so none of it is missed later."""
    for name in sorted(strata, key=lambda name: priority(name, seed))[size:]:
        del strata[name]
    largest = largest_share([len(stratum.heap) for stratum in strata.values()], size)
    for stratum in strata.values():
        stratum.keep(largest)


def largest_share(available: list[int], size: int) -> int:
    """Most places that any stratum gets when `size` are shared out equally, as far as each can fill them."""
    largest, left = 0, size
    for position, n in enumerate(sorted(available)):
        share = min(n, -(-left // (len(available) - position)))
        largest, left = max(largest, share), left - share
    return largest


def share_out(strata: dict[str, Smallest], everything: Smallest, size: int) -> list[Document]:
    """Equal shares, smallest strata first, no text twice; places left over (all, without strata) go to any text."""
    drawn: dict[int, Document] = {}
    order = sorted(strata, key=lambda name: (len(strata[name].heap), name))
    for position, name in enumerate(order):
        share = -(-(size - len(drawn)) // (len(order) - position))
        drawn |= next_smallest(strata[name], drawn, share)
    drawn |= next_smallest(everything, drawn, size - len(drawn))
    return [document for _, document in sorted(drawn.items())]


def next_smallest(pool: Smallest, drawn: dict[int, Document], places: int) -> dict[int, Document]:
    """The first documents of a pool, by priority, that are not drawn yet."""
    fresh = sorted(rank for rank in pool.documents if rank not in drawn)
    return {rank: pool.documents[rank] for rank in fresh[:places]}


def documents_of(
    shard: Shard, corpus: Corpus, counts: Counts, stratify_by: str | None, gold_column: str | None
) -> Iterator[list[Document]]:
    """The non-empty documents of a shard, batch by batch."""
    names = [corpus.text_column, corpus.id_column, stratify_by, gold_column]
    for batch in read(shard, corpus, counts, list(dict.fromkeys(name for name in names if name))):
        found = texts(batch, corpus, shard, counts)
        ids, strata, golds = (values(batch, name, shard) for name in names[1:])
        counts.n_empty += sum(map(is_empty, found))
        yield [
            Document(
                id=text_id(text) if id_ is None else str(id_),
                text=text,
                gold=gold_value(gold, gold_column, shard),
                stratum=str(stratum) if stratify_by else None,
            )
            for text, id_, stratum, gold in zip(found, ids, strata, golds, strict=True)
            if text is not None and not is_empty(text)
        ]


def values(batch: pa.RecordBatch, name: str | None, shard: Shard) -> list[Any]:
    """A column as Python values; all None when there is no such column to read."""
    return decoded(column(batch, name, shard))[0] if name else [None] * batch.num_rows


def gold_value(value: Any, name: str | None, shard: Shard) -> float | None:
    """A known quality as a number; NaN, which pandas writes for a missing one, is none."""
    if value is None or value != value:
        return None
    if isinstance(value, bool | int | float | Decimal):
        return float(value)
    raise UserError(f"{shard.source}: gold column {name!r} holds {value!r}; it must be true/false or a number")
