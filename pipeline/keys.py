"""One pass over a scored corpus before anything is chosen: how its scores lie, and a key for each row."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import config, corpus, density, metrics, scored, storage
from pipeline.choice import ROW, Groups, Noise
from pipeline.errors import UserError
from pipeline.places import Place
from pipeline.shards import Counts, Shard
from pipeline.tracking import Step, progress

THRESHOLDS, AMOUNTS = ("min_score", "min_int_score"), ("keep_share", "keep_documents", "keep_tokens")


class Floor(NamedTuple):
    """Rows whose `column` is below `cut` are dropped, whatever their key."""

    column: str
    cut: float


class Scores:
    """How the scores of a corpus lie, in constant memory: documents (65,536,) by the upper 16 bits of their score."""

    def __init__(self) -> None:
        self.counts = np.zeros(2**16, np.int64)

    def add(self, scores: NDArray[np.float32]) -> None:
        """Count more scores, none of them NaN."""
        self.counts += np.bincount(metrics.sortable(scores) >> 16, minlength=2**16)

    def lie(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores (k,) from lowest to highest, each the least of its bin, and how many documents are in it: (k,)."""
        bins = np.flatnonzero(self.counts)
        return np.array([metrics.unsortable(int(bin) << 16) for bin in bins]), self.counts[bins]


class Survey:
    """What one pass over a scored corpus finds."""

    def __init__(self, settings: config.Filter, found: config.Corpus, seed: int) -> None:
        self.settings, self.found, self.seed = settings, found, seed
        self.scores = Scores()
        self.groups = Groups(settings.per_group, "filter.per_group")
        self.n_scored = np.zeros(0, np.int64)
        """Scored documents by group, and those that a cascade ruled out."""
        self.lowest = math.inf
        """Lowest score of a document that filter.min_int_score keeps."""
        self.noise = None if settings.sampling == "top" else Noise(seed)

    def columns(self, shard: Shard) -> list[str]:
        """Columns that are read."""
        settings, names = self.settings, ["score"]
        names += [scored.REASON] if scored.REASON in corpus.read_schema(shard, self.found).names else []
        names += ["int_score"] if settings.min_int_score is not None else []
        names += value_columns(shard, self.found, settings)
        names += [settings.tokens_column or self.found.text_column] if settings.keep_tokens else []
        names += scored.id_columns(self.found) if self.noise else []
        return list(dict.fromkeys(names))

    def look(self, batch: pa.RecordBatch, shard: Shard, floor: Floor | None) -> NDArray[np.int32]:
        """Count a batch; the group of each row (n,), -1 for one that cannot be kept."""
        scores, code = scored.scores(batch), self.code(batch, shard)
        there = ~np.isnan(scores)
        able = there & reaches(batch, floor)
        self.scores.add(scores[there])
        self.count(code[there | scored.is_ruled_out(batch)])
        if self.settings.min_int_score is not None:
            self.lowest = min(self.lowest, float(np.min(scores[able], initial=math.inf)))
        return np.where(able, code, -1)

    def rows(self, batch: pa.RecordBatch, shard: Shard, group: NDArray[np.int32]) -> NDArray[np.void]:
        """What a choice needs to know of a batch: (n,)."""
        rows = np.zeros(batch.num_rows, ROW)
        rows["group"] = group
        rows["key"] = np.where(group >= 0, self.key(scored.scores(batch), batch, shard), 0) + 0.0  # no minus zero
        if self.settings.keep_tokens:
            rows["tokens"] = scored.tokens(batch, self.settings.tokens_column, self.found, shard)
        return rows

    def code(self, batch: pa.RecordBatch, shard: Shard) -> NDArray[np.int32]:
        """The group of each row: (n,)."""
        name = self.settings.per_group
        return self.groups.code(scored.values(batch, name, shard) if name else [""] * batch.num_rows)

    def count(self, codes: NDArray[np.int32]) -> None:
        """Count scored documents by group."""
        counts = np.bincount(codes, minlength=len(self.groups.codes))
        counts[: len(self.n_scored)] += self.n_scored
        self.n_scored = counts

    def key(self, scores: NDArray[np.float32], batch: pa.RecordBatch, shard: Shard) -> NDArray[np.float64]:
        """The score; with gumbel noise on it; or the noise alone, from which the density is taken off later."""
        if self.noise is None:
            return scores.astype(np.float64)
        noise = self.noise.draw(scored.ids(batch, self.found, shard))
        return noise if self.settings.sampling == "density" else scores + self.settings.temperature * noise


def gives_amount(settings: config.Filter) -> bool:
    """Whether an amount is to be kept, so that rows compete."""
    return any(getattr(settings, name) is not None for name in AMOUNTS)


def value_columns(shard: Shard, found: config.Corpus, settings: config.Filter) -> list[str]:
    """The column of the groups, if there are some."""
    return scored.value_columns(shard, found, (settings.per_group,)) if settings.per_group else []


def reaches(batch: pa.RecordBatch, floor: Floor | None) -> NDArray[np.bool_]:
    """Whether each row reaches the floor: (n,)."""
    if floor is None:
        return np.ones(batch.num_rows, bool)
    return np.asarray(scored.scores(batch, floor.column) >= np.float32(floor.cut), bool)


def surveyed(survey: Survey, shards: list[Shard], floor: Floor | None, folder: Path) -> list[Path]:
    """The key files of all shards, in `folder`; empty where no amount is asked for."""
    paths = [folder / f"{number:06d}.rows" for number in range(len(shards))]
    with progress("filter: scores", corpus.n_rows(shards)) as step:
        for shard, path in zip(shards, paths, strict=True):
            write_keys(survey, shard, floor, path, step)
    if survey.settings.sampling == "density":
        thin_out(paths, scored.embeddings_of(survey.found, shards), survey.seed)
    return paths


def write_keys(survey: Survey, shard: Shard, floor: Floor | None, path: Path, step: Step) -> None:
    """Read a shard, and write the keys of its rows if they matter."""
    with storage.writing(path), path.open("wb") as file:
        for batch in corpus.read(shard, survey.found, Counts(), survey.columns(shard)):
            group = survey.look(batch, shard, floor)
            if gives_amount(survey.settings):
                survey.rows(batch, shard, group).tofile(file)
            step(batch.num_rows)


def thin_out(paths: list[Path], embeddings: list[Place], seed: int) -> None:
    """Take the logarithm of how many documents are alike off every key."""
    of, first = density.reference(embeddings, seed), 0
    for path, vectors in zip(paths, embeddings, strict=True):
        rows = np.memmap(path, ROW, "r+") if path.stat().st_size else np.zeros(0, ROW)
        start = 0
        for alike in density.log_alike(vectors, first, of):
            part = rows[start : start + len(alike)]
            start += len(alike)
            if start > len(rows) or np.isnan(alike[part["group"] >= 0]).any():
                break
            part["key"] = np.where(part["group"] >= 0, part["key"] - np.nan_to_num(alike), 0)
            first += int((~np.isnan(alike)).sum())
        if start != len(rows):
            raise UserError(f"{vectors} does not fit the scores beside it; run gristmill score --redo")
