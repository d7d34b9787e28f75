"""A seeded sample of a corpus: uniform over all of it, or stratified by a column, by length or by source."""

import hashlib
import heapq
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.config import Asking, Corpus
from pipeline.corpus import column, decoded, is_empty, read, read_schema, text_id, texts
from pipeline.errors import UserError
from pipeline.formats import parse_line
from pipeline.limits import lines
from pipeline.shards import Counts, Shard, find_shards, opened, reading

log = logging.getLogger("gristmill")


class Document(NamedTuple):
    """A sampled document. `gold` is a known quality, `stratum` what it was drawn from, `group` what it must not be
    split from when a student is judged (a site, an author), `round` the rate --next that chose it (0: none)."""

    id: str
    text: str
    gold: float | None = None
    stratum: str | None = None
    group: str | None = None
    round: int = 0


Derive = Callable[[Shard, str], str]
"""The stratum of a text that lies in a shard."""


def draw(
    corpus: Corpus, asking: Asking, seed: int, gold_column: str | None = None, group_column: str | None = None
) -> tuple[list[Document], Counts]:
    """The sample that is asked about, if the corpus has anything to judge."""
    documents, counts = sample(
        corpus, asking.sample, seed, asking.stratify_by, gold_column, asking.stratum_floor, group_column
    )
    if not documents:
        raise UserError(f"corpus.path: {corpus.path} has no document with text in {counts.n_rows} rows")
    if len(documents) < asking.sample:
        log.info("sample: the corpus has only %d distinct texts", len(documents))
    return documents, counts


def where_rows_went(counts: Counts, documents: list[Document]) -> dict[str, Any]:
    """Every row of the corpus is sampled, empty, bad, or not drawn."""
    n_not_drawn = counts.n_rows - counts.n_empty - counts.n_bad_rows - len(documents)
    assert n_not_drawn >= 0, f"{counts.n_rows} rows in, {-n_not_drawn} too many accounted for"
    return {
        "n_rows": counts.n_rows,
        "n_empty": counts.n_empty,
        "n_bad_rows": counts.n_bad_rows,
        "n_repaired_texts": counts.n_repaired_texts,
        "n_not_drawn": n_not_drawn,
        "n_sampled": len(documents),
        "strata": dict(sorted(Counter(each.stratum for each in documents if each.stratum is not None).items())),
    }


def sample(
    corpus: Corpus,
    size: int,
    seed: int,
    stratify_by: str | None = None,
    gold_column: str | None = None,
    floor: int | None = None,
    group_column: str | None = None,
) -> tuple[list[Document], Counts]:
    """A seeded sample of the distinct, non-empty texts of the whole corpus.

    Every text has a priority, the hash of seed and content, and the smallest ones are drawn (bottom-k): uniform, one
    pass, memory of a few times `size` documents, and the same however the corpus is cut into shards. With
    `stratify_by` the places are shared out equally among the strata (`size` of them, drawn the same way, if there are
    more), and what small strata leave goes to the others. With `floor` too the sample stays uniform, but for the first
    so many of each stratum, or all that it has. Of a text's copies in several strata one is drawn.
    """
    if floor and not stratify_by:
        raise UserError("stratum_floor: there are no strata without stratify_by; give both or none")
    counts, everything = Counts(), Smallest()
    strata: dict[str, Smallest] = {}
    shards = find_shards(corpus)
    derive = derived(corpus, shards, stratify_by)
    for shard in shards:
        for documents in documents_of(shard, corpus, counts, stratify_by, gold_column, derive, group_column):
            for document in documents:
                rank = priority(text_id(document.text), seed)
                everything.add(rank, document, size)
                if document.stratum is not None:
                    strata.setdefault(document.stratum, Smallest()).add(rank, document, size)
            if floor:
                trim_to_floor(strata, size, floor)
            else:
                trim(strata, size, seed)
    drawn = top_up(strata, everything, size, floor) if floor else share_out(strata, everything, size)
    return drawn, counts


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


def copy_order(document: Document) -> tuple[str, str, bool, float, str]:
    """Of two copies of a text the smaller id counts, then the smaller stratum, a known quality, the smaller group."""
    return document.id, document.stratum or "", document.gold is None, document.gold or 0.0, document.group or ""


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


def trim_to_floor(strata: dict[str, Smallest], size: int, floor: int) -> None:
    """Keep twice the floor, as a stratum's texts may be drawn for others that have copies; refuse floors too high."""
    for stratum in strata.values():
        stratum.keep(2 * floor)
    needed = sum(min(floor, len(stratum.heap)) for stratum in strata.values())
    if needed > size:
        raise UserError(
            f"stratum_floor: {floor} from each stratum, or all it has, makes {needed} for the first {len(strata)} of"
            f" them, more than the sample of {size}; lower the floor or draw more"
        )


def top_up(strata: dict[str, Smallest], everything: Smallest, size: int, floor: int) -> list[Document]:
    """The floor of each stratum, smallest strata first, no text twice; the other places go to any text."""
    drawn: dict[int, Document] = {}
    for name in by_size(strata):
        drawn |= next_smallest(strata[name], drawn, floor)
    drawn |= next_smallest(everything, drawn, size - len(drawn))
    return [document for _, document in sorted(drawn.items())]


def share_out(strata: dict[str, Smallest], everything: Smallest, size: int) -> list[Document]:
    """Equal shares, smallest strata first, no text twice; places left over (all, without strata) go to any text."""
    drawn: dict[int, Document] = {}
    order = by_size(strata)
    for position, name in enumerate(order):
        share = -(-(size - len(drawn)) // (len(order) - position))
        drawn |= next_smallest(strata[name], drawn, share)
    drawn |= next_smallest(everything, drawn, size - len(drawn))
    return [document for _, document in sorted(drawn.items())]


def by_size(strata: dict[str, Smallest]) -> list[str]:
    """Names of strata, the smallest first."""
    return sorted(strata, key=lambda name: (len(strata[name].heap), name))


def next_smallest(pool: Smallest, drawn: dict[int, Document], places: int) -> dict[int, Document]:
    """The first documents of a pool, by priority, that are not drawn yet."""
    fresh = sorted(rank for rank in pool.documents if rank not in drawn)
    return {rank: pool.documents[rank] for rank in fresh[:places]}


# -- documents and their strata ---------------------------------------------------------------------------------------


def documents_of(
    shard: Shard,
    corpus: Corpus,
    counts: Counts,
    stratify_by: str | None,
    gold_column: str | None,
    derive: Derive | None = None,
    group_column: str | None = None,
) -> Iterator[list[Document]]:
    """The non-empty documents of a shard, batch by batch; their strata derived, or from the column `stratify_by`."""
    names = [corpus.text_column, corpus.id_column, None if derive else stratify_by, gold_column, group_column]
    for batch in read(shard, corpus, counts, list(dict.fromkeys(name for name in names if name))):
        found = texts(batch, corpus, shard, counts)
        ids, strata, golds, groups = (values(batch, name, shard) for name in names[1:])
        counts.n_empty += sum(map(is_empty, found))
        yield [
            Document(
                id=text_id(text) if id_ is None else str(id_),
                text=text,
                gold=gold_value(gold, gold_column, shard),
                stratum=derive(shard, text) if derive else str(stratum) if stratify_by else None,
                group=None if group is None else str(group),
            )
            for text, id_, stratum, gold, group in zip(found, ids, strata, golds, groups, strict=True)
            if text is not None and not is_empty(text)
        ]


def derived(corpus: Corpus, shards: list[Shard], stratify_by: str | None) -> Derive | None:
    """How a stratum follows from a text or its shard; None where a column says it."""
    known = {"length": length_class, "source": source}
    if stratify_by not in known or any(has_column(shard, corpus, stratify_by) for shard in shards):
        return None
    if stratify_by == "source" and not any("/" in shard.name for shard in shards):
        raise UserError(
            f"stratify_by: source is the first folder below corpus.path, but {corpus.path} has none, nor a column"
            " of that name; give the folder above, or stratify by length"
        )
    return known[stratify_by]


def length_class(_: Shard, text: str) -> str:
    """Lengths in classes that double, such as 256-511 characters."""
    shortest = 1 << (len(text).bit_length() - 1)
    return f"{shortest}-{2 * shortest - 1} characters"


def source(shard: Shard, _: str) -> str:
    """The first folder below the corpus; a dot for files that lie beside the folders."""
    folder, slash, _ = shard.name.partition("/")
    return folder if slash else "."


def has_column(shard: Shard, corpus: Corpus, name: str) -> bool:
    """Whether any row of a shard has a column; of JSON lines only those that mention it are parsed."""
    if shard.format != "jsonl":
        return name in read_schema(shard, corpus).names
    mention = f'"{name}"'.encode()
    with reading(shard), opened(shard, corpus) as file:
        found = ((number, line) for number, line in lines(file, shard, corpus, Counts()) if mention in line)
        rows = (parse_line(line, number, shard, corpus.skip_bad_rows, Counts()) for number, line in found)
        return any(name in row for row in rows if row)


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
