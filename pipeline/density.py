"""How many documents are alike: a kernel density over the embeddings that were kept beside the scores.

The Ask-LLM paper (arXiv:2402.09668, section 3.2) sums kernels over the whole corpus with a hashing sketch; here the
same sum is estimated from a uniform sample of the corpus, exactly where that sample is all of it. Clusters that are
rarer than one document of the sample are not seen.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.formats import BATCH_ROWS
from pipeline.places import Place
from pipeline.storage import reading_table

Vectors = NDArray[np.float32]

N_REFERENCE = 4096
"""Documents that the sum over the corpus is estimated from."""
N_ALIKE = 4.0
"""Others in the sample that the median document is like, kernels summed: the bandwidth is chosen so."""
NARROWEST, WIDEST = 0.05, 2.0
"""Bandwidths, in distances of unit vectors (0 to 2)."""
N_TRIED = 1024
"""Documents of the sample that the bandwidth is chosen by."""


class Reference(NamedTuple):
    """A uniform sample of a corpus of `n_documents`: unit vectors (m, dim), their places in the corpus (m,) rising,
    and the bandwidth of the Gaussian kernel."""

    vectors: Vectors
    places: NDArray[np.int64]
    n_documents: int
    bandwidth: float


def read(path: Place) -> Iterator[tuple[Vectors, NDArray[np.bool_]]]:
    """A shard's embeddings as unit vectors (n, dim), and which rows have one, a batch at a time."""
    with reading_table(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=["embedding"]):
            column = batch.column("embedding")
            there = ~np.asarray(column.is_null().to_numpy(zero_copy_only=False), bool)
            flat = column.drop_null().flatten().to_numpy(zero_copy_only=False)
            yield unit(flat.astype(np.float32).reshape(int(there.sum()), -1)), there


def unit(vectors: Vectors) -> Vectors:
    """Vectors of length one; zero stays zero."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def reference(paths: Sequence[Place], seed: int, size: int = N_REFERENCE) -> Reference:
    """A seeded uniform sample of all embeddings: those with the smallest random numbers, in one pass."""
    random = np.random.default_rng([seed, size])
    vectors, ranks, places, n = None, np.zeros(0), np.zeros(0, np.int64), 0
    for path in paths:
        for more, _ in read(path):
            ranks = np.append(ranks, random.random(len(more)))
            places = np.append(places, np.arange(n, n + len(more)))
            vectors = more if vectors is None else np.concatenate([vectors, more])
            n += len(more)
            kept = np.sort(np.argsort(ranks)[:size])
            vectors, ranks, places = vectors[kept], ranks[kept], places[kept]
    if vectors is None or not n:
        raise UserError(f"filter.sampling: {paths[0].parent if paths else 'the corpus'} holds no embedding")
    return Reference(vectors, places, n, bandwidth(vectors))


def bandwidth(vectors: Vectors) -> float:
    """The bandwidth at which the median document is like N_ALIKE others, found by bisection, as t-SNE does it
    (van der Maaten & Hinton 2008). With a fixed one, or a neighbour's distance, in hundreds of dimensions the many
    far documents would outweigh the few near ones."""
    wanted = min(N_ALIKE, (len(vectors) - 1) / 2)
    closeness = vectors[:N_TRIED] @ vectors.T - 1
    np.fill_diagonal(closeness, -np.inf)
    low, high = np.log(NARROWEST), np.log(WIDEST)
    for _ in range(16):
        middle = (low + high) / 2
        alike = np.median(np.exp(closeness / np.exp(2 * middle)).sum(axis=1))
        low, high = (middle, high) if alike < wanted else (low, middle)
    return float(np.exp((low + high) / 2))


def n_alike(vectors: Vectors, first: int, of: Reference) -> NDArray[np.float64]:
    """Estimated number of documents like each (n,), itself counted once: 1 + (N - 1) x the mean kernel to the others.

    The rows are the corpus's from place `first` on. The kernel is exp(-d^2 / 2 h^2) of the distance d of unit vectors.
    """
    kernels = np.exp((vectors @ of.vectors.T - 1) / of.bandwidth**2)
    own, in_sample = np.searchsorted(of.places, np.arange(first, first + len(vectors))), np.zeros(len(vectors), bool)
    inside = own < len(of.places)
    in_sample[inside] = of.places[own[inside]] == np.arange(first, first + len(vectors))[inside]
    kernels[np.flatnonzero(in_sample), own[in_sample]] = 0
    others = len(of.vectors) - in_sample
    mean = kernels.sum(axis=1, dtype=np.float64) / np.maximum(others, 1)
    return np.asarray(1 + (of.n_documents - 1) * mean)


def log_alike(path: Place, first: int, of: Reference) -> Iterator[NDArray[np.float64]]:
    """The logarithm of `n_alike` for every row of a shard, NaN where there is no embedding, a batch at a time; `first`
    embeddings lie in the shards before."""
    for vectors, there in read(path):
        found = np.full(len(there), np.nan)
        found[there] = np.log(n_alike(vectors, first, of))
        first += len(vectors)
        yield found
