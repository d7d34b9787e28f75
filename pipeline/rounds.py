"""After the first sample: the documents of the corpus from which the student learns most, round by round."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import spread
from pipeline.config import Corpus, Recipe, digest
from pipeline.errors import UserError
from pipeline.forward import Embeddings
from pipeline.sample import Document, sample
from pipeline.shards import find_shards, fingerprint
from pipeline.storage import read_table, write_table
from pipeline.tracking import progress, read_json, stage, upstream

log = logging.getLogger("gristmill")

Ints = NDArray[np.integer[Any]]

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "group": pa.string(),
        "gold": pa.float64(),
        "student_score": pa.float32(),
        "stratum": pa.int32(),
        "uncertainty": pa.float32(),
        "pool_share": pa.float64(),
    }
)
"""One chosen document a row. `stratum` is the student's int_score, `pool_share` the share of the candidates in it,
`uncertainty` the leverage at the time it was chosen."""
CORPUS = b"corpus"
"""Metadata of a round: a digest of the corpus that it was drawn from."""

PRIOR = 0.1
"""Weight of the ridge in the leverage, in mean squared lengths of a centred embedding."""

TRIED = 2
"""Candidates for each place: the most uncertain of very many are oddities that teach little of the others."""


def add(recipe: Recipe, n: int, inputs: dict[str, Any], redo: bool = False) -> None:
    """Choose the documents of the next round, before anything is asked about them; an earlier round that is not rated
    to its end goes on instead. With other `inputs` than those of stage 1 nothing is chosen, unless `redo`."""
    spread.by_one(recipe, "rate --next")
    with stage("rate", recipe, inputs) as work:
        if not (work.folder / "inputs.json").exists():
            raise UserError(f"rate --next: {work.folder} holds no rated sample; run gristmill rate first, then train")
        if not redo:
            work.refuse_changes()
        n_rounds = len(files(work.folder))
        if not is_rated(work.folder, n_rounds):
            log.warning("rate: what was chosen before is not rated to its end; that goes on, and nothing is chosen")
            return
        student = upstream(None, recipe, "train/student", "rate --next")
        rated = already(work.folder / "ratings.parquet")
        pool = candidates(recipe, {document.text for document in rated})
        table = chosen(recipe, student, pool, [document.text for document in rated], n)
        path = work.folder / "rounds" / f"{n_rounds + 1}.parquet"
        write_table(path, table.replace_schema_metadata({CORPUS: of_corpus(recipe.corpus).encode()}))
        shares = ", ".join(
            f"{n} of int_score {value}" for value, n in sorted(Counter(table["stratum"].to_pylist()).items())
        )
        log.info("rate: round %d, %d of %d candidates: %s", n_rounds + 1, len(table), len(pool), shares)


def is_rated(folder: Path, n_rounds: int) -> bool:
    """Whether the sample and all rounds have been asked about; failed requests count as asked."""
    result = read_json(folder / "result.json")
    return result is not None and not result["n_not_asked"] and len(result["rounds"]) == 1 + n_rounds


def already(path: Path) -> list[Document]:
    """The documents that are rated, those without a score among them."""
    table = read_table(path, ["id", "text"])
    return [Document(**row) for row in table.to_pylist()]


def candidates(recipe: Recipe, rated: set[str]) -> list[Document]:
    """A uniform draw of `rate.pool` documents of the corpus that are not rated yet."""
    rate, size = recipe.rate, recipe.rate.pool + len(rated)
    drawn, _ = sample(recipe.corpus, size, recipe.seed, gold_column=rate.gold_column, group_column=rate.group_column)
    fresh = [document for document in drawn if document.text not in rated][: rate.pool]
    if not fresh:
        raise UserError(f"rate --next: every document of {recipe.corpus.path} is rated already")
    return fresh


def chosen(recipe: Recipe, folder: Path, pool: list[Document], rated: list[str], n: int) -> pa.Table:
    """The chosen documents, and why."""
    vectors, scores, ints = judged(recipe, folder, [document.text for document in pool], rated)
    found = choose(vectors[: len(pool)], ints, vectors[len(pool) :], n)
    sizes = Counter(ints.tolist())
    rows = [
        {
            **pool[place]._asdict(),
            "student_score": float(scores[place]),
            "stratum": int(ints[place]),
            "uncertainty": uncertainty,
            "pool_share": sizes[int(ints[place])] / len(pool),
        }
        for place, uncertainty in zip(found.places.tolist(), found.uncertainty.tolist(), strict=True)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def judged(
    recipe: Recipe, folder: Path, pool: list[str], rated: list[str]
) -> tuple[Embeddings, NDArray[np.float32], Ints]:
    """Embeddings of the candidates and of the rated documents, (n_pool + n_rated, dim); and what the student says of
    the candidates: scores (n_pool,), and whole scores (n_pool,)."""
    from pipeline import embeddings
    from pipeline import student as students

    student = students.load(folder, recipe.encoder)
    heads = [head for head in student.heads if head.kind == "score"]
    if not heads:
        raise UserError(f"rate --next: the student in {folder} gives labels only; train it on a score")
    path = embeddings.cache_path(recipe)
    with progress("rate --next", len(pool) + len(rated)) as step:
        embedded = embeddings.embed(student.encoder, [*pool, *rated], path, step)
    aggregate = student.encoder_settings.aggregate
    found = heads[0].predict(embedded, aggregate)
    scores, ints = (np.asarray(found[name])[: len(pool)] for name in heads[0].schema.names)
    return embedded.documents(aggregate == "weighted"), scores, ints


# -- choosing ---------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Places of the chosen among the candidates, in the order of choosing, and how uncertain each was by then: both
    (n_chosen,)."""

    places: NDArray[np.intp]
    uncertainty: NDArray[np.float32]


def choose(embeddings: Embeddings, strata: Ints, rated: Embeddings, n: int) -> Choice:
    """As many documents from each stratum, or all that it has, and of the first candidates of each the most uncertain.

    Uncertainty is the leverage x' (X'X + a I)^-1 x of an embedding, the variance of a ridge regression's prediction
    but for a factor, X being what is rated and what has been chosen so far: greedy D-optimal design (Fedorov 1972),
    under which no two chosen documents are near copies. `embeddings` (n_candidates, dim) in random order, `strata`
    (n_candidates,), `rated` (n_rated, dim).
    """
    x, inverse = centred(embeddings, rated)
    leverage = np.einsum("ij,ij->i", x @ inverse, x)
    places, uncertainty, order = [], [], turns(strata, n)
    free = tried(strata, order)
    for stratum in order:
        open_places = np.flatnonzero(free & (strata == stratum))
        place = open_places[np.argmax(leverage[open_places])]
        places.append(place)
        uncertainty.append(leverage[place])
        free[place] = False
        direction = inverse @ x[place]
        shrink = 1 + leverage[place]
        leverage -= (x @ direction) ** 2 / shrink
        inverse -= np.outer(direction, direction) / shrink
    return Choice(np.array(places, np.intp), np.array(uncertainty, np.float32))


def tried(strata: Ints, order: list[int]) -> NDArray[np.bool_]:
    """The candidates that are looked at: of each stratum the first, TRIED for each of its places."""
    found = np.zeros(len(strata), bool)
    for stratum, n_places in Counter(order).items():
        found[np.flatnonzero(strata == stratum)[: TRIED * n_places]] = True
    return found


def centred(embeddings: Embeddings, rated: Embeddings) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Candidates less the mean of what is rated, with a constant: (n_candidates, dim + 1); and the inverse of the
    information in what is rated: (dim + 1, dim + 1)."""
    middle = rated.mean(axis=0, dtype=np.float64)
    x, known = (np.pad(side - middle, ((0, 0), (0, 1)), constant_values=1.0) for side in (embeddings, rated))
    ridge = PRIOR * float(((rated - middle) ** 2).sum(axis=1).mean()) or PRIOR
    return x, np.linalg.inv(known.T @ known + ridge * np.eye(x.shape[1]))


def turns(strata: Ints, n: int) -> list[int]:
    """The stratum of each choice: one after the other, those that have something left; the smallest first."""
    left = Counter(strata.tolist())
    order, found = sorted(left, key=lambda stratum: (left[stratum], stratum)), []
    for turn in range(max(left.values(), default=0)):
        found += [stratum for stratum in order if left[stratum] > turn]
        if len(found) >= n:
            break
    return found[:n]


# -- the rounds that are there ----------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """The files of all rounds, in their order, below the folder of stage 1."""
    numbers = sorted(int(path.stem) for path in (folder / "rounds").glob("*.parquet"))
    return [folder / "rounds" / f"{number}.parquet" for number in numbers]


def read(folder: Path, sampled: list[Document], corpus: Corpus) -> list[Document]:
    """The documents of all rounds that the sample does not hold."""
    there, found = {document.text for document in sampled}, files(folder)
    known = of_corpus(corpus) if found else ""
    rounds: list[Document] = []
    for number, path in enumerate(found, 1):
        table = read_table(path)
        if (table.schema.metadata or {}).get(CORPUS) != known.encode():
            raise UserError(
                f"rate: {path} was chosen from another corpus than {corpus.path} as it is; remove {path.parent}, or"
                " give another --run-folder"
            )
        rows = table.select(["id", "text", "gold", "group"]).to_pylist()
        rounds += [Document(**row, round=number) for row in rows if row["text"] not in there]
    return rounds


def of_corpus(corpus: Corpus) -> str:
    """A digest of a corpus: its settings and its files."""
    return digest([corpus.identity(), {shard.name: fingerprint(shard) for shard in find_shards(corpus)}])
