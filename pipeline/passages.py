"""The texts that a language model is trained on: documents of a corpus, passages of a book."""

from collections.abc import Iterable, Iterator

from pipeline import corpus, plain_text
from pipeline.config import Corpus
from pipeline.sample import priority, sample
from pipeline.shards import Counts, Shard, find_shards

LENGTH = 4000
"""Characters of a passage, some two pages: more, and a book has too few to be judged on; fewer, and what is held out
stands between sentences that were learned."""
FEWEST = 20
"""Passages that even a short text is cut into, as far as its paragraphs allow."""


def draw(settings: Corpus, most: int | None, seed: int) -> list[str]:
    """Distinct texts with something in them, at most so many, a uniform draw in seeded order: the documents; of plain
    text, passages."""
    shards = find_shards(settings)
    if shards[0].format != "text":
        documents, _ = sample(settings, most or 2**62, seed)
        return [document.text for document in documents]
    found = dict.fromkeys(passages(settings, shards))
    return sorted(found, key=lambda text: priority(corpus.text_id(text), seed))[:most]


def passages(settings: Corpus, shards: list[Shard]) -> Iterator[str]:
    """Rows of plain text that follow one another, joined as they stand in their file: neighbouring paragraphs are
    about the same, so a book is learned from and held out by passages of them, never by single ones."""
    rows = [list(texts(settings, shard)) for shard in shards]
    length = min(LENGTH, sum(len(row) for each in rows for row in each) // FEWEST)
    for shard, found in zip(shards, rows, strict=True):
        yield from joined(found, "\n\n" if plain_text.has_paragraphs(shard, settings) else "\n", length)


def texts(settings: Corpus, shard: Shard) -> Iterator[str]:
    """The rows of a shard."""
    counts = Counts()
    for batch in corpus.read(shard, settings, counts, [settings.text_column]):
        for text in corpus.texts(batch, settings, shard, counts):
            if text is not None and not corpus.is_empty(text):
                yield text


def joined(rows: Iterable[str], between: str, length: int) -> Iterator[str]:
    """Rows together until they are so long; a longer one is a passage of its own or the end of one."""
    held: list[str] = []
    for row in rows:
        held.append(row)
        if sum(map(len, held)) >= length:
            yield between.join(held)
            held = []
    if held:
        yield between.join(held)
