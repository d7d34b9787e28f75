from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline import density
from pipeline.errors import UserError

N, DIM = 600, 16


def vectors(seed: int = 0) -> NDArray[np.float32]:
    """600 directions: 100 of them near one another, the others apart."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(N, DIM))
    found[:100] = found[0] + 0.05 * rng.normal(size=(100, DIM))
    return density.unit(found.astype(np.float32))[rng.permutation(N)]


def write(folder: Path, found: NDArray[np.float32], sizes: list[int], holes: tuple[int, ...] = ()) -> list[Path]:
    """Embeddings as the score stage keeps them, in shards of these sizes; rows in `holes` have none."""
    rows = [None if i in holes else row for i, row in enumerate(found.astype(np.float16).tolist())]
    paths, start = [], 0
    for number, size in enumerate(sizes):
        array = pa.array(rows[start : start + size], pa.list_(pa.float16(), found.shape[1]))
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"part-{number}.parquet")
        pq.write_table(pa.table({"embedding": array}), paths[-1])
        start += size
    return paths


def alike(paths: list[Path], of: density.Reference) -> NDArray[np.float64]:
    """How many documents are like each row."""
    found, first = [], 0
    for path in paths:
        for part in density.log_alike(path, first, of):
            found.append(part)
            first += int((~np.isnan(part)).sum())
    return np.exp(np.concatenate(found))


def test_with_the_whole_corpus_as_reference_the_density_is_the_sum_of_kernels(tmp_path: Path):
    found = vectors()
    paths = write(tmp_path, found, [250, 350])
    of = density.reference(paths, seed=0)
    exact = density.unit(found.astype(np.float16).astype(np.float32)).astype(np.float64)
    distances = ((exact[:, None] - exact[None]) ** 2).sum(axis=2)
    assert alike(paths, of) == pytest.approx(np.exp(-distances / (2 * of.bandwidth**2)).sum(axis=1), rel=1e-3)


def test_the_median_document_is_like_four_others():
    found = vectors()
    of = density.Reference(found, np.arange(N), N, density.bandwidth(found))
    assert np.median(density.n_alike(found, 0, of)) == pytest.approx(1 + 4, rel=0.02)


def test_copies_are_counted_and_a_document_alone_counts_itself():
    apart = np.eye(8, dtype=np.float32)
    found = np.concatenate([apart, np.tile(apart[:1], (4, 1))])
    of = density.Reference(found, np.arange(len(found)), len(found), bandwidth=0.2)
    assert density.n_alike(found, 0, of) == pytest.approx([5.0] + [1.0] * 7 + [5.0] * 4)


def test_a_sample_estimates_the_density_without_bias(tmp_path: Path):
    paths = write(tmp_path, vectors(), [N])
    whole = density.reference(paths, seed=0)
    truth = alike(paths, whole)
    draws = [density.reference(paths, seed, size=150)._replace(bandwidth=whole.bandwidth) for seed in range(40)]
    estimates = np.stack([alike(paths, of) for of in draws])
    errors = (estimates.mean(axis=0) - truth) / (estimates.std(axis=0) / np.sqrt(40))
    assert abs(errors.mean()) < 0.5
    assert estimates.mean() == pytest.approx(truth.mean(), rel=0.05)


def test_the_sample_is_the_same_however_the_corpus_is_cut(tmp_path: Path):
    found = vectors()
    one, two = write(tmp_path / "one", found, [N]), write(tmp_path / "two", found, [7, 293, 300])
    first, second = (density.reference(paths, seed=3, size=50) for paths in (one, two))
    assert first.places.tolist() == second.places.tolist() and first.n_documents == second.n_documents == N
    assert alike(one, first) == pytest.approx(alike(two, second), rel=1e-5)


def test_a_document_without_embedding_has_no_density(tmp_path: Path):
    paths = write(tmp_path, vectors()[:20], [20], holes=(3, 7))
    of = density.reference(paths, seed=0)
    found = alike(paths, of)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 7]
    assert of.n_documents == 18


@pytest.mark.parametrize("n", [1, 2, 30])
def test_a_corpus_of_copies_has_a_bandwidth(n: int):
    copies = np.tile(np.eye(4, dtype=np.float32)[:1], (n, 1))
    of = density.Reference(copies, np.arange(n), n, density.bandwidth(copies))
    assert density.n_alike(copies, 0, of) == pytest.approx([n] * n)


def test_embeddings_without_a_row_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no embedding"):
        density.reference(write(tmp_path, vectors(), [0]), seed=0)
