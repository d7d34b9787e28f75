"""Scores beside the documents: whatever reads a scored corpus finds in both kinds the same."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import test_audit
from endpoint import serve
from test_filter import judged_run, with_filter
from test_report import drawn, finished
from test_score import make_student

from pipeline import audit, corpus, cuts, examples, score, scored
from pipeline import filter as filter_
from pipeline.config import Corpus, Recipe
from pipeline.errors import UserError
from pipeline.shards import BESIDE, Counts, Shard, find_shards, fingerprint, hub_shards

__all__ = ["finished"]

ADDED = ("score", "int_score")


def put_beside(run_folder: Path, documents: Corpus, shards: list[Shard] | None = None) -> None:
    """Make of a run's rewritten scored corpus one of scores alone, beside the documents."""
    folder = run_folder / "score" / "scored"
    for shard in shards or find_shards(documents):
        table = pq.read_table(folder / shard.name).select(["id", *ADDED])
        table = table.set_column(0, "id", table["id"].cast(pa.string()))
        note = {"corpus": documents.model_dump(mode="json"), "shard": shard._asdict(), "made_from": fingerprint(shard)}
        with pq.ParquetWriter(folder / shard.name, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({BESIDE: json.dumps(note).encode()})


# -- corpora ----------------------------------------------------------------------------------------------------------


def rows(texts: list[str], n: int) -> Iterator[dict[str, Any]]:
    for i in range(n):
        text = None if i % 97 == 3 else f"{texts[i % len(texts)][: 20 + i % 50]} {i}"
        yield {
            "page": {"body": text, "lang": ["en", "pt", "da"][i % 3]},
            "id": f"doc-{i}" if i % 11 else None,
            "n": i if i % 2 else i / 2,
            "score": "taken",
        }


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{**row, "n": float(row["n"])} for row in rows]).data.table
    assert b"huggingface" in table.schema.metadata
    pq.write_table(table, folder / "a.parquet", row_group_size=700)
    (folder / "b").mkdir()
    pq.write_table(table.slice(0, 100), folder / "b" / "c.parquet")
    pq.write_table(table.slice(0, 0), folder / "none.parquet")


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps({**row, "late": i} if i > 2500 else row) for i, row in enumerate(rows)]
    lines[5:5] = ["not JSON", "[1]", ""]
    lines[2400:2400] = ["{"]
    (folder / "a.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def as_arrow(folder: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist([{**row, "n": float(row["n"])} for row in rows])
    table = table.set_column(3, "score", table["score"].combine_chunks().dictionary_encode())
    pa.feather.write_feather(table, folder / "a.arrow", compression="uncompressed", chunksize=900)


class Pair(NamedTuple):
    """Two runs of one corpus: that with rewritten documents, and that with scores beside them."""

    rewritten: Recipe
    beside: Recipe


@pytest.fixture(scope="module", params=[(as_parquet, "id"), (as_jsonl, None), (as_arrow, "id")])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str], tiny_encoder: Path
) -> Pair:
    """Some 2,700 documents with nested text, scored both ways; their own column `score` is replaced."""
    folder = tmp_path_factory.mktemp("sidecar")
    write, id_column = request.param
    (folder / "corpus").mkdir()
    write(folder / "corpus", list(rows(texts, 2700)))
    student = make_student(folder / "student", tiny_encoder)
    documents = Corpus(path=str(folder / "corpus"), text_column="page.body", id_column=id_column, skip_bad_rows=True)
    recipe = Recipe.model_validate(
        {
            "run_folder": folder / "rewritten",
            "corpus": documents,
            "encoder": {"dtype": "float32", "device": "cpu"},
            "score": {"student": student, "replace_existing": True, "keep_embeddings": True},
            "cuts": {"by": ["page.lang"]},
        }
    )
    with_scores_alone = recipe.score.model_copy(update={"sidecar": True})
    pair = Pair(recipe, recipe.model_copy(update={"run_folder": folder / "beside", "score": with_scores_alone}))
    for each in pair:
        score.run(each)
    return pair


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder: tables with their schemas, other files as bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): content(path) for path in files}


def content(path: Path) -> Any:
    if path.suffix != ".parquet":
        return path.read_bytes()
    table = pq.read_table(path)
    return table.schema, table.schema.metadata, table.to_pylist()


# -- what the stages find ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_share": 0.3, "keep_dropped": True},
        {"min_int_score": 3, "output_format": "jsonl"},
        {"keep_tokens": 5000, "per_group": "page.lang"},
        {"keep_tokens": 5000, "tokens_column": "n", "min_score": 2.0},
        {"keep_documents": 300, "sampling": "gumbel", "per_group": "n"},
        {"keep_share": 0.2, "sampling": "density"},
    ],
    ids="-".join,
)
def test_the_filter_keeps_the_same_rows_with_the_same_columns_in_the_same_order(made: Pair, settings: dict[str, Any]):
    results = [filter_.run(with_filter(recipe, **settings), redo=True) for recipe in made]
    first, second = (result.model_dump(exclude={"seconds"}) for result in results)
    assert first == second and 0 < first["n_kept"] < first["n_rows"]
    for side in ("kept", "dropped"):
        before, after = (contents(recipe.run_folder / "filter" / side) for recipe in made)
        assert before == after and (before or side == "dropped")


def test_kept_files_are_the_same_to_the_byte(made: Pair):
    """But for those from Arrow files, whose own batches become row groups."""
    for recipe in made:
        filter_.run(with_filter(recipe, keep_share=0.5), redo=True)
    for path in made.rewritten.run_folder.glob("filter/kept/**/*.parquet"):
        other = made.beside.run_folder / path.relative_to(made.rewritten.run_folder)
        assert (path.read_bytes() == other.read_bytes()) == (not list(path.parents[3].glob("corpus/*.arrow")))


def test_the_plan_of_cuts_is_the_same(made: Pair):
    first, second = (cuts.run(recipe, redo=True).model_dump(exclude={"seconds"}) for recipe in made)
    assert first == second and {each["value"] for each in first["by"]["page.lang"]} == {"en", "pt", "da"}


def test_the_documents_to_look_at_are_the_same(made: Pair):
    first, second = (examples.look(recipe, 50, 3, ["page.lang"]) for recipe in made)
    assert first == second and all(row["text"] and row["id"] and row["page.lang"] for row in first.sample)


def test_the_report_is_the_same(finished: tuple[Path, Path], tmp_path: Path):
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    first, known = reported(run)
    put_beside(run, Corpus(path=str(finished[0].parent / "corpus.jsonl"), id_column="id"))
    assert reported(run) == (first, known) and "along" in known


def reported(run_folder: Path) -> tuple[dict[str, Any], str]:
    """What a new report says, and the shortcuts that it found."""
    shutil.rmtree(run_folder / "report")
    result, _ = drawn(run_folder)
    return result.model_dump(exclude={"seconds", "n_bytes"}), (run_folder / "report/shortcuts.json").read_text()


def test_the_audit_finds_the_same(tmp_path: Path):
    with serve(test_audit.rated) as server:
        recipe = test_audit.scored(tmp_path, server.url, 600, audit={"sample": 40})
        first = audit.run(recipe)
        of_rewritten = pq.read_table(recipe.run_folder / "audit/ratings.parquet")
        take_apart(recipe, tmp_path / "documents")
        second = audit.run(recipe, redo=True)
    assert pq.read_table(recipe.run_folder / "audit/ratings.parquet").equals(of_rewritten)
    assert (second.strata, second.precision_interval) == (first.strata, first.precision_interval)


def take_apart(recipe: Recipe, folder: Path) -> Corpus:
    """Documents without their scores in `folder`, and the scores alone in the run."""
    folder.mkdir()
    for path in (recipe.run_folder / "score" / "scored").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(list(ADDED)), folder / path.name)
    documents = recipe.corpus.model_copy(update={"path": str(folder)})
    put_beside(recipe.run_folder, documents)
    return documents


# -- reading ----------------------------------------------------------------------------------------------------------


def read(recipe: Recipe, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """All rows, as a stage of the run sees them."""
    found, shards = scored.locate(recipe, "filter")
    return [
        row for shard in shards for batch in corpus.read(shard, found, Counts(), columns) for row in batch.to_pylist()
    ]


@pytest.fixture
def small(tmp_path: Path) -> Recipe:
    """A run of 2,500 documents with scores beside them."""
    recipe = judged_run(tmp_path, 2500)
    take_apart(recipe, tmp_path / "documents")
    return recipe


def test_a_sidecar_holds_ids_and_scores_and_nothing_else(made: Pair):
    for path in made.beside.run_folder.glob("score/scored/**/*.parquet"):
        alone = pq.read_table(path)
        whole = pq.read_table(made.rewritten.run_folder / path.relative_to(made.beside.run_folder))
        found, [batch] = made.rewritten.corpus, whole.combine_chunks().to_batches() or [whole.schema.empty_table()]
        assert alone.schema.names == ["id", *ADDED] and alone.select(ADDED).equals(whole.select(ADDED))
        assert alone["id"].to_pylist() == scored.ids(batch, found, find_shards(found)[0])


def test_scores_alone_are_read_without_the_documents(small: Recipe, tmp_path: Path):
    found, shards = scored.locate(small, "filter")
    shutil.rmtree(tmp_path / "documents")
    batches = list(corpus.read(shards[0], found, Counts(), ["int_score", "score"]))
    assert sum(map(len, batches)) == 2500 and set(batches[0].schema.names) == {"score", "int_score"}


def test_an_id_keeps_the_type_that_it_has_in_the_documents(tmp_path: Path):
    recipe = judged_run(tmp_path, 1000)
    path = recipe.run_folder / "score/scored/part.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "id", pa.array(range(1000))), path)
    take_apart(recipe, tmp_path / "documents")
    assert [row["id"] for row in read(recipe, ["id", "score"])] == list(range(1000))
    assert pq.read_table(path)["id"].type == pa.string()


def test_columns_are_read_without_any_score(small: Recipe):
    assert [row["lang"] for row in read(small, ["lang"])] == [row["lang"] for row in read(small)]


def test_a_column_that_neither_has_is_refused(small: Recipe, tmp_path: Path):
    with pytest.raises(UserError, match=r"documents/part.parquet has no column 'domain'; there are: id, text, lang"):
        read(small, ["domain", "score"])


def test_the_schema_is_known_without_reading_and_counts_rows(small: Recipe):
    found, shards = scored.locate(small, "filter")
    assert corpus.read_schema(shards[0], found).names == ["id", "text", "lang", "score", "int_score"]
    assert corpus.n_rows(shards) == 2500


def test_documents_of_a_hub_dataset_stand_beside_their_scores(tmp_path: Path):
    pytest.importorskip("datasets")
    recipe = judged_run(tmp_path, 1000)
    (tmp_path / "hub").mkdir()
    table = pq.read_table(recipe.run_folder / "score/scored/part.parquet")
    documents = Corpus(path=str(tmp_path / "hub"), id_column="id")
    pq.write_table(table.drop_columns(list(ADDED)), tmp_path / "hub" / "train-00000-of-00001.parquet")
    [shard] = hub_shards(documents)
    (recipe.run_folder / "score/scored/part.parquet").rename(recipe.run_folder / "score/scored" / shard.name)
    put_beside(recipe.run_folder, documents, [shard])
    assert read(recipe) == table.to_pylist()


# -- documents that are not those that were scored --------------------------------------------------------------------


def refusal(recipe: Recipe) -> str:
    with pytest.raises(UserError) as refused:
        filter_.run(with_filter(recipe, keep_share=0.5))
    return str(refused.value)


def test_documents_that_are_gone_are_missed_before_anything_is_done(small: Recipe, tmp_path: Path):
    shutil.move(tmp_path / "documents", tmp_path / "elsewhere")
    assert refusal(small) == (
        f"{small.run_folder}/score/scored/part.parquet holds scores alone, and their documents,"
        f" {tmp_path}/documents/part.parquet, are not there any more; put them back, or run gristmill score --redo"
    )
    assert not (small.run_folder / "filter").exists()


def test_documents_that_have_changed_are_not_given_old_scores(small: Recipe, tmp_path: Path):
    path = tmp_path / "documents" / "part.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    assert f"their documents, {path}, have changed since they were scored; put them back" in refusal(small)


@pytest.mark.parametrize("instead", ["", '{"id": "x", "text": "y"}\n{"id": "x", "text": "y"}'])
def test_another_number_of_documents_is_refused_though_their_fingerprint_is_the_same(tmp_path: Path, instead: str):
    """Size and both ends of the file are as they were."""
    recipe = judged_run(tmp_path, 2500)
    rows = pq.read_table(recipe.run_folder / "score/scored/part.parquet", columns=["id", "text"]).to_pylist()
    lines = [json.dumps({**row, "text": row["text"] * 9}) for row in rows]
    path = tmp_path / "part.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    put_beside(recipe.run_folder, recipe.corpus.model_copy(update={"path": str(path)}))
    lines[1300] = instead.ljust(len(lines[1300]))
    path.write_text("\n".join(lines), encoding="utf-8")
    assert f"holds scores for another number of documents than are in {path}; put back what" in refusal(recipe)
