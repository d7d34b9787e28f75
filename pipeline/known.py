"""Documents whose score is known: those that a teacher is tuned on, and those that it may be shown."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import corpus
from pipeline import gold as golds
from pipeline.config import Recipe
from pipeline.corpus import text_id
from pipeline.errors import UserError
from pipeline.few_shot import Pool
from pipeline.gold import GoldDocument
from pipeline.metrics import Floats
from pipeline.sample import Document, Smallest, documents_of, priority
from pipeline.shards import Counts, find_shards
from pipeline.splits import components, near_pairs
from pipeline.tracking import progress
from pipeline.trials import FEWEST

log = logging.getLogger("gristmill")

SHOWN_SHARE = 5
"""At most one of so many documents is set aside to be shown."""


class Known(NamedTuple):
    """Documents with a known score, (n,) each, and apart from them those that may be shown as examples."""

    texts: list[str]
    scores: Floats
    units: NDArray[np.int64]
    """Copies and near-duplicates share one."""
    pool: Pool
    """Those that may be shown."""
    n_aside: int
    """Documents that are not among the `texts`: the pool, and what is nearly a copy of it."""
    people: list[GoldDocument]
    """Who gave which score, where they are in a file."""


def read(recipe: Recipe) -> Known:
    """Up to `tune.sample` documents, drawn by seed; twice as many as the most examples in the space are set aside."""
    documents, people = in_file(recipe) if recipe.tune.gold else (in_column(recipe), [])
    drawn = sorted(documents, key=lambda document: priority(text_id(document.text), recipe.seed))[: recipe.tune.sample]
    texts, scores = [document.text for document in drawn], np.array([document.gold for document in drawn], np.float64)
    check(scores, len(texts), recipe)
    units = alike(texts, recipe.train.near_duplicates)
    shown = spread(scores, n_shown(recipe.tune.space, len(texts)))
    tried = np.flatnonzero(~np.isin(units, units[shown]))
    check(scores[tried], len(texts), recipe)
    span = float(scores.min()), float(scores.max())
    pool = Pool([(texts[i], float(scores[i])) for i in shown.tolist()], span)
    n_aside = len(texts) - len(tried)
    return Known([texts[i] for i in tried.tolist()], scores[tried], units[tried], pool, n_aside, people)


def check(scores: Floats, n_drawn: int, recipe: Recipe) -> None:
    """Refuse too few documents, and scores that are all the same."""
    setting = "tune.gold" if recipe.tune.gold else "tune.gold_column"
    if len(scores) < FEWEST:
        aside = f", and {n_drawn - len(scores)} of them are set aside for examples" if n_drawn > len(scores) else ""
        raise UserError(
            f"{setting}: {n_drawn} documents have a known score{aside}; give more, {FEWEST} to try settings on is the"
            " least"
        )
    if np.ptp(scores) == 0:
        raise UserError(f"{setting}: all {len(scores)} documents have the known score {scores[0]:g}; give others too")


# -- where they are ---------------------------------------------------------------------------------------------------


def in_file(recipe: Recipe) -> tuple[list[Document], list[GoldDocument]]:
    """The documents of the gold file, with the text of the corpus where only an id is given."""
    assert recipe.tune.gold is not None
    people, _ = golds.read(recipe.tune.gold)
    there = in_corpus(recipe, {each.id for each in people if each.id is not None})
    return golds.documents(people, there, "tune.gold", "the corpus"), people


def in_corpus(recipe: Recipe, ids: set[str]) -> list[Document]:
    """The documents of the corpus with these ids, in one pass that ends with the last of them; of several with one id
    the first."""
    found: dict[str, Document] = {}
    for document in stream(recipe, None) if ids and recipe.corpus.path else ():
        if document.id in ids:
            found.setdefault(document.id, document)
        if len(found) == len(ids):
            break
    return list(found.values())


def in_column(recipe: Recipe) -> list[Document]:
    """A uniform draw of the corpus's documents whose quality is known, each text once."""
    drawn = Smallest()
    for document in stream(recipe, recipe.tune.gold_column):
        if document.gold is not None:
            drawn.add(priority(text_id(document.text), recipe.seed), document, recipe.tune.sample)
    return list(drawn.documents.values())


def stream(recipe: Recipe, gold_column: str | None) -> Iterator[Document]:
    """Every document of the corpus that holds text."""
    shards = find_shards(recipe.corpus)
    with progress("tune: corpus", corpus.n_rows(shards)) as step:
        for shard in shards:
            for documents in documents_of(shard, recipe.corpus, Counts(), None, gold_column):
                yield from documents
                step(len(documents))


# -- what is set aside, and what hangs together -----------------------------------------------------------------------


def n_shown(space: dict[str, Any], n: int) -> int:
    """How many of n documents are set aside: twice the most examples that the space asks for, where there is room."""
    most, room = most_examples(space.get("examples", 0)), n // SHOWN_SHARE
    if most > room:
        raise UserError(
            f"tune.space.examples: {most} examples are too many for {n} documents with a known score, of which"
            f" {room} may be shown; give fewer, or more documents"
        )
    return min(2 * most, room)


def most_examples(asked: Any) -> int:
    """The most examples of a list, a range or a single value; what is no number is refused elsewhere."""
    values = [asked.get("high")] if isinstance(asked, dict) else asked if isinstance(asked, list) else [asked]
    return max((int(value) for value in values if isinstance(value, int | float)), default=0)


def spread(scores: Floats, n: int) -> NDArray[np.int64]:
    """Positions of n documents from lowest to highest score: of each n-th part of all, the first with its median
    score."""
    parts = np.array_split(np.argsort(scores, kind="stable"), n) if n else []
    medians = [part[scores[part] == scores[part[len(part) // 2]]] for part in parts]
    return np.array([part.min() for part in medians], dtype=np.int64)


def alike(texts: Sequence[str], least: float | None) -> NDArray[np.int64]:
    """The unit of each text, (n,): those that share at least so much (train.near_duplicates) are in one."""
    if least is None:
        return np.arange(len(texts), dtype=np.int64)
    return components(near_pairs(dict(enumerate(texts)), np.zeros(len(texts), dtype=bool), least), len(texts))
