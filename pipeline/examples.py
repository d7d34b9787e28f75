"""Documents to look at: rated ones; of a scored corpus a uniform sample, some at each whole score, and both ends."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import config, corpus, places
from pipeline.config import Recipe
from pipeline.pairs import as_dict
from pipeline.shards import Counts, Shard, find_shards, with_documents
from pipeline.storage import read_table

N_ENDS = 10
"""Documents shown at either end of a score."""
COPIES = 10
"""So many times as many are looked at, since copies of one text often share an end."""
CHARACTERS = 600
"""Characters of a text in a dashboard's table."""

Row = dict[str, Any]
Places = NDArray[np.int64]
"""(n, 2): shard and row of documents."""


class Looked(NamedTuple):
    """Documents of a scored corpus, whole: id, text, score, int_score, source and the columns asked for."""

    sample: list[Row]
    """A uniform draw."""
    at: dict[int, list[Row]]
    """Some with each int_score."""
    ends: dict[str, dict[str, list[Row]]]
    """By score: those with the highest ("top", highest first) and the lowest ("bottom", lowest first)."""


def look(recipe: Recipe, n_sample: int, n_each: int, columns: Sequence[str] = ()) -> Looked:
    """Choose by one pass over the scores alone, then read the texts of those chosen."""
    scored, found = scored_corpus(recipe)
    scores = score_columns(corpus.read_schema(found[0], scored))
    lists = choose(found, scored, recipe.seed, scores, n_sample, n_each)
    chosen = np.unique(np.concatenate([each.places for each in lists.values()]), axis=0)
    rows = dict(read(found, scored, chosen, [*scores, *columns]))
    picked = {name: [rows[place] for place in each.in_order()] for name, each in lists.items()}
    ends = {name: {side: distinct(picked[f"{side} {name}"])[:N_ENDS] for side in ("top", "bottom")} for name in scores}
    at = {int(name[3:]): picked[name] for name in lists if name.startswith("at ")}
    return Looked(picked["sample"], dict(sorted(at.items())), ends)


def scored_corpus(recipe: Recipe) -> tuple[config.Corpus, list[Shard]]:
    """The run's scored corpus and its shards."""
    place = places.made(recipe, "score")
    scored = config.Corpus(path=str(place), text_column=recipe.corpus.text_column, id_column=recipe.corpus.id_column)
    return scored, [with_documents(shard) for shard in find_shards(scored)]


def score_columns(schema: pa.Schema) -> list[str]:
    """The scores that a student gave, `score` first: columns that have a whole one beside them."""
    names = [name for name in schema.names if f"int_{name}" in schema.names]
    return sorted(names, key=lambda name: name != "score")


# -- choosing ---------------------------------------------------------------------------------------------------------


class Lowest:
    """The `n` documents with the lowest keys of all that were added."""

    def __init__(self, n: int) -> None:
        self.n, self.keys, self.places = n, np.empty(0), np.empty((0, 2), np.int64)

    def add(self, keys: NDArray[np.float64], places: Places) -> None:
        """Documents that may be among them; NaN is none."""
        there = ~np.isnan(keys)
        keys, places = np.concatenate([self.keys, keys[there]]), np.concatenate([self.places, places[there]])
        best = np.argsort(keys, kind="stable")[: self.n]
        self.keys, self.places = keys[best], places[best]

    def in_order(self) -> list[tuple[int, int]]:
        """Their places, lowest key first."""
        return [(int(shard), int(row)) for shard, row in self.places]


def choose(
    found: Sequence[Shard], scored: config.Corpus, seed: int, scores: Sequence[str], n_sample: int, n_each: int
) -> dict[str, Lowest]:
    """What is shown, by name: sample, at WHOLE SCORE, top and bottom SCORE."""
    lists = {"sample": Lowest(n_sample)}
    lists |= {f"{side} {name}": Lowest(N_ENDS * COPIES) for name in scores for side in ("top", "bottom")}
    whole = f"int_{scores[0]}"
    for number, shard in enumerate(found):
        rng, start = np.random.default_rng([seed, number]), 0
        for batch in corpus.read(shard, scored, Counts(), [*scores, whole]):
            places = np.stack([np.full(len(batch), number), np.arange(start, start + len(batch))], axis=1)
            start += len(batch)
            values = {name: floats(batch.column(name)) for name in [*scores, whole]}
            draw = np.where(np.isnan(values[scores[0]]), np.nan, rng.random(len(batch)))
            lists["sample"].add(draw, places)
            for name in scores:
                lists[f"top {name}"].add(-values[name], places)
                lists[f"bottom {name}"].add(values[name], places)
            for value in np.unique(values[whole][~np.isnan(values[whole])]):
                drawn = np.where(values[whole] == value, draw, np.nan)
                lists.setdefault(f"at {int(value)}", Lowest(n_each)).add(drawn, places)
    return lists


def floats(array: pa.Array) -> NDArray[np.float64]:
    """A column of numbers, NaN where there is none."""
    return np.array(array.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The rows, of those with one text the first."""
    return list({row["text"]: row for row in reversed(list(rows))}.values())[::-1]


# -- reading ----------------------------------------------------------------------------------------------------------


def read(
    found: Sequence[Shard], scored: config.Corpus, chosen: Places, columns: Sequence[str]
) -> Iterator[tuple[tuple[int, int], Row]]:
    """The chosen documents with their places; `columns` may reach into structs (meta.language)."""
    wanted = list(dict.fromkeys([scored.text_column, "int_score", *columns, *ids(scored)]))
    for number in np.unique(chosen[:, 0]):
        shard, mine, start = found[number], chosen[chosen[:, 0] == number, 1], 0
        for batch in corpus.read(shard, scored, Counts(), tops(wanted)):
            here = mine[(mine >= start) & (mine < start + len(batch))]
            part = batch.take(pa.array(here - start))
            start += len(batch)
            if len(part):
                yield from zip(
                    ((int(number), int(row)) for row in here), rows(part, scored, shard, wanted), strict=True
                )


def ids(scored: config.Corpus) -> list[str]:
    """The column that names documents, if there is one."""
    return [scored.id_column] if scored.id_column else []


def tops(names: Sequence[str]) -> list[str]:
    """The columns of the file that hold these."""
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def rows(batch: pa.RecordBatch, scored: config.Corpus, shard: Shard, wanted: Sequence[str]) -> Iterator[Row]:
    """Documents as dicts."""
    texts = corpus.texts(batch, scored, shard, Counts())
    others = {name: corpus.column(batch, name, shard).to_pylist() for name in wanted if name != scored.text_column}
    for position, text in enumerate(texts):
        row = {name: values[position] for name, values in others.items()}
        named = row.get(scored.id_column) if scored.id_column else None
        name = corpus.text_id(text or "") if named is None else str(named)
        yield {**row, "id": name, "text": text or "", "shard": shard.name}


# -- tables -----------------------------------------------------------------------------------------------------------


def ratings(run_folder: Path) -> tuple[list[Row], dict[str, str]]:
    """The ratings with dicts for maps, and the notes in the file (scale, attributes)."""
    table = read_table(run_folder / "rate" / "ratings.parquet")
    notes = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return table.to_pylist(), notes


def scale_of(notes: dict[str, str]) -> tuple[float, float]:
    """Lowest and highest score of a ratings file."""
    low, high = notes.get("scale", "0 5").split()
    return float(low), float(high)


def whole(scale: tuple[float, float]) -> list[str]:
    """The whole scores of a scale."""
    return [str(value) for value in range(math.ceil(scale[0]), math.floor(scale[1]) + 1)]


def spread_over(rows: Sequence[Row], n: int, key: str = "score") -> list[Row]:
    """At most `n` rows from one end of a score to the other, unscored ones last."""
    there = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
    missing = [row for row in rows if row[key] is None][: max(n // 6, 1)]
    places = np.unique(np.linspace(0, len(there) - 1, min(len(there), n - len(missing))).astype(int))
    return [there[place] for place in places if there] + missing


def rated(run_folder: Path, n: int) -> list[Row]:
    """A few dozen rated documents with the first opinion on each, for a dashboard."""
    found, _ = ratings(run_folder)
    return [
        {
            "id": row["id"],
            "score": row["score"],
            "reason": row["reason"],
            "text": row["text"][:CHARACTERS],
            "answer": answer(row)[:CHARACTERS],
        }
        for row in spread_over(found, n)
    ]


def answer(row: Row) -> str:
    """What was said of a rated document: words, or the probabilities of the choices."""
    said = (row.get("opinions") or [{}])[0]
    if said.get("answer") or not said.get("log_probs"):
        return said.get("answer") or ""
    log_probs = as_dict(said["log_probs"]).items()
    chances = sorted(((word, float(np.exp(log_prob))) for word, log_prob in log_probs), key=lambda x: -x[1])
    return ", ".join(f"{json.dumps(word.strip(), ensure_ascii=False)} {chance:.3f}" for word, chance in chances[:5])


def scored(recipe: Recipe, n: int) -> list[Row]:
    """Documents at each int_score, for a dashboard."""
    found = look(recipe, 1, max(n // 6, 1))
    return [
        {name: row[name] for name in ("id", "int_score", "score")} | {"text": row["text"][:CHARACTERS]}
        for rows in found.at.values()
        for row in rows
    ]
