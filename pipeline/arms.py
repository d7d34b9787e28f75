"""Which documents each arm of the proof learns from: rows that were kept, any, or those that were rejected."""

import heapq
import logging
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import config, corpus, scored, splits
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.sample import priority
from pipeline.shards import Counts, Shard, find_shards
from pipeline.tracking import corpus_of

log = logging.getLogger("gristmill")

WHOLE = "random"
"""The arm that draws from the whole corpus."""
COPIED = 0.5
"""Share of a text's grams in one other document from which it counts as a copy of that."""


class Row(NamedTuple):
    """A document, by where it is in the scored corpus."""

    place: str
    text: str
    is_kept: bool

    @property
    def arms(self) -> tuple[str, str]:
        """The arms it belongs to."""
        return ("kept" if self.is_kept else "rejected"), WHOLE


@dataclass
class Draw:
    """A uniform draw of documents in random order: those with the lowest hashes, as many as hold so many bytes."""

    most_bytes: int
    n_bytes: int = 0
    heap: list[tuple[int, str]] = field(default_factory=list)

    def add(self, hash: int, text: str, size: int) -> None:
        """Take a document in, and leave out what is not needed any more."""
        if self.n_bytes >= self.most_bytes and hash > -self.heap[0][0]:
            return
        heapq.heappush(self.heap, (-hash, text))
        self.n_bytes += size
        while self.n_bytes - len(self.heap[0][1].encode()) >= self.most_bytes:
            self.n_bytes -= len(heapq.heappop(self.heap)[1].encode())

    def texts(self) -> list[str]:
        """The documents in the order drawn."""
        return [text for _, text in sorted(self.heap, key=lambda each: -each[0])]


class Drawn(NamedTuple):
    """What one pass over the scored corpus found."""

    texts: dict[tuple[str, int], list[str]]
    """By arm and seed."""
    whole: list[str]
    """A draw of the whole corpus that no training depends on, for the vocabulary."""
    n_documents: Counter[str]
    """By arm, those with text."""
    n_bytes: Counter[str]
    ids: set[str]
    """Of those asked for, the contents that are in the corpus."""


def locate(recipe: Recipe) -> tuple[config.Corpus, list[Shard], config.Corpus, list[Shard]]:
    """The scored corpus and what was kept of it, with their shards."""
    kept = corpus_of("filter", recipe, "prove")
    there, shards = scored.locate(recipe, "prove")
    of_kept = config.Corpus(path=str(kept), text_column=recipe.corpus.text_column)
    return there, shards, of_kept, find_shards(of_kept)


def draw(recipe: Recipe, arms: Collection[str], most_bytes: int, ids: Collection[str]) -> Drawn:
    """Up to so many bytes of documents for each arm and seed; `ids` are contents to look for on the way.

    A document has the same hash in all arms of a seed, so that they differ by what the filter did alone."""
    draws = {(arm, seed): Draw(most_bytes) for arm in arms for seed in range(recipe.prove.seeds)}
    whole, n_documents, n_bytes, found = Draw(most_bytes), Counter[str](), Counter[str](), set[str]()
    for row in rows(recipe):
        size = len(row.text.encode())
        for seed in range(recipe.prove.seeds):
            hash = priority(f"{seed}:{row.place}", recipe.seed)
            for arm in set(row.arms) & set(arms):
                draws[arm, seed].add(hash, row.text, size)
        whole.add(priority(f"whole:{row.place}", recipe.seed), row.text, size)
        n_documents.update(row.arms)
        n_bytes.update(dict.fromkeys(row.arms, size))
        found |= {corpus.text_id(row.text)} & set(ids)
    texts = {key: each.texts() for key, each in draws.items()}
    return Drawn(texts, whole.texts(), n_documents, n_bytes, found)


def rows(recipe: Recipe) -> Iterator[Row]:
    """Every document with text of the scored corpus.

    Shard by shard, as many rows of one content are kept as the kept corpus holds: which of several copies does not
    matter, since they are the same text."""
    found, shards, of_kept, kept_shards = locate(recipe)
    by_name = {shard.name: shard for shard in kept_shards}
    for shard in shards:
        kept = contents(by_name.pop(shard.name), of_kept) if shard.name in by_name else Counter[str]()
        for place, text in documents(shard, found):
            id = corpus.text_id(text)
            is_kept = kept[id] > 0
            kept[id] -= is_kept
            yield Row(f"{shard.name}:{place}", text, is_kept)
        if +kept:
            raise other_corpus(of_kept.path, kept.total(), shard.name)
    if by_name:
        raise other_corpus(of_kept.path, len(by_name), min(by_name))


def other_corpus(path: str | None, n: int, name: str) -> UserError:
    """What to say where documents were kept that are not in the scored corpus."""
    return UserError(
        f"prove: {path} holds documents that are not in the scored corpus ({n} in {name}); run gristmill filter --redo"
    )


def contents(shard: Shard, of_kept: config.Corpus) -> Counter[str]:
    """How often each content is in a shard."""
    return Counter(corpus.text_id(text) for _, text in documents(shard, of_kept))


def documents(shard: Shard, found: config.Corpus) -> Iterator[tuple[int, str]]:
    """The documents with text of a shard, with the number of the row."""
    start, top = 0, found.text_column.split(".")[0]
    for batch in corpus.read(shard, found, Counts(), [top]):
        for place, text in enumerate(corpus.texts(batch, found, shard, Counts()), start):
            if text is not None and not corpus.is_empty(text):
                yield place, text
        start += batch.num_rows


# -- copies -----------------------------------------------------------------------------------------------------------


def copied(texts: list[str], others: Collection[str]) -> NDArray[np.bool_]:
    """Whether each text is, nearly or in part, one of the others: (n,). It is where COPIED of its word 5-grams are in
    one of them, which also finds a text inside a longer one."""
    grams = [splits.grams(text) for text in texts]
    all_grams = np.concatenate([np.empty(0, np.uint32), *grams])
    owners = np.repeat(np.arange(len(texts)), [len(each) for each in grams])
    order = np.argsort(all_grams, kind="stable")
    known, owners = all_grams[order], owners[order]
    least = COPIED * np.array([len(each) for each in grams])
    is_copy = np.zeros(len(texts), bool)
    for other in others:
        of_other = splits.grams(other)
        is_in = np.zeros(0, bool) if not len(of_other) else within(known, of_other)
        is_copy |= np.bincount(owners[is_in], minlength=len(texts)) >= least
    return is_copy


def within(values: NDArray[np.uint32], known: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Whether each value is in a sorted array that is not empty."""
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.asarray(known[places] == values)


def repeated(texts: list[str]) -> NDArray[np.bool_]:
    """Whether each text is nearly, or exactly, one before it: (n,)."""
    units = splits.components(
        splits.near_pairs(dict(enumerate(texts)), np.zeros(len(texts), bool), COPIED), len(texts)
    )
    is_first = np.zeros(len(texts), bool)
    is_first[np.unique(units, return_index=True)[1]] = True
    return ~is_first


def read_trusted(recipe: Recipe) -> list[str]:
    """The texts to be judged on: a uniform draw of those with text, in the order drawn; each content once."""
    found, shards = locate_trusted(recipe)
    texts = {corpus.text_id(text): text for shard in shards for _, text in documents(shard, found)}
    if not texts:
        raise UserError(f"prove.trusted: {found.path} holds no text in column {found.text_column!r}")
    order = sorted(texts, key=lambda id: priority(id, recipe.seed))
    return [texts[id] for id in order[: recipe.prove.trusted_documents]]


def locate_trusted(recipe: Recipe) -> tuple[config.Corpus, list[Shard]]:
    """The trusted corpus and its shards."""
    settings = recipe.prove
    if settings.trusted is None:
        raise UserError(
            "prove.trusted is not set; give texts you trust that the filter never saw, such as textbooks: a parquet or"
            " JSONL file or a folder of them"
        )
    if recipe.corpus.path and Path(settings.trusted).resolve() == Path(recipe.corpus.path).resolve():
        raise UserError(
            f"prove.trusted: {settings.trusted} is the corpus itself; give texts that the filter never saw"
        )
    found = config.Corpus(path=settings.trusted, text_column=settings.trusted_text_column)
    try:
        return found, find_shards(found)
    except UserError as error:
        raise UserError(str(error).replace("corpus.path", "prove.trusted", 1)) from None
