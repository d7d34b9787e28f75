"""Plain text as a corpus: paragraphs, or lines, for every stage."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from pipeline import corpus, plain_text, sample, score, shards, train
from pipeline import filter as filters
from pipeline import rate as rating
from pipeline.config import Corpus, load_recipe
from pipeline.errors import UserError
from pipeline.shards import Counts

BOOK = "\n\nONE\n\nThe first paragraph\nhas two lines.  \n \t \n\nThe second\n\n\n"
ROWS = ["ONE", "The first paragraph\nhas two lines.", "The second"]


def rows(path: Path, counts: Counts | None = None, **settings: Any) -> list[str | None]:
    """Every text of a corpus."""
    found = Corpus(path=str(path), **settings)
    counts = counts or Counts()
    return [
        text
        for shard in shards.find_shards(found)
        for batch in corpus.read(shard, found, counts, [found.text_column], corpus.read_schema(shard, found))
        for text in corpus.texts(batch, found, shard, counts)
    ]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_blank_lines_separate_the_rows_of_a_text(tmp_path: Path, line_end: str, mark: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(mark + BOOK.replace("\n", line_end).encode())
    assert rows(tmp_path / "a.txt") == ROWS


def test_where_no_blank_line_separates_each_line_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\n two \nthree\n\n \n")
    assert rows(tmp_path / "a.txt") == ["one", " two", "three"]


def test_a_packed_text_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(BOOK.encode()))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(BOOK.encode()))
    assert rows(tmp_path) == ROWS * 2


@pytest.mark.parametrize("name", ["README.txt", "LICENSE.txt", "data/notes.txt"])
def test_text_beside_data_is_no_part_of_the_corpus_unless_it_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text("read me")
    pq.write_table(pa.table({"text": ["a document"]}), tmp_path / "data" / "a.parquet")
    assert rows(tmp_path) == ["a document"]
    assert rows(tmp_path / name) == rows(tmp_path / "**" / "*.txt") == ["read me"]


def test_bytes_that_are_not_utf_8_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\xe9\n\ngood".encode("latin-1"))
    counts = Counts()
    assert rows(tmp_path, counts) == ["caf�", "good"]
    assert (counts.n_rows, counts.n_repaired_texts) == (2, 1)


def test_utf_16_is_refused_and_the_way_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("word".encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.txt is UTF-16; save it as UTF-8"):
        rows(tmp_path)


def test_a_text_has_one_column(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(BOOK)
    with pytest.raises(UserError, match=r"a\.txt has no column 'body'; there are: text"):
        rows(tmp_path, text_column="body")


def test_an_empty_text_has_no_rows(tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        (tmp_path / "a.txt").write_text(content)
        assert rows(tmp_path) == []
    assert sample.sample(Corpus(path=str(tmp_path)), 5, 0)[0] == []


def test_batches_are_bounded_and_so_is_a_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "BATCH_BYTES", 1000)
    (tmp_path / "a.txt").write_text("ten bytes.\n\n" * 500)
    found = Corpus(path=str(tmp_path))
    batches = list(corpus.read(shards.find_shards(found)[0], found, Counts()))
    assert sum(batch.num_rows for batch in batches) == 500
    assert max(batch.num_rows for batch in batches) == 100
    (tmp_path / "a.txt").write_text("one\n\n" + "ten bytes.\n" * 100_000)
    with pytest.raises(UserError, match=r"a\.txt line \d+ holds a row of more than 1 MB; put blank lines between"):
        rows(tmp_path, max_row_mb=1)


@pytest.mark.parametrize("sidecar", [False, True])
def test_every_stage_takes_a_text(tmp_path: Path, recipe_file: Path, texts: list[str], sidecar: bool) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(texts[:40]), encoding="utf-8")
    values = yaml.safe_load(recipe_file.read_text())
    values["corpus"] = {"path": str(tmp_path / "book.txt")}
    values["rate"] |= {"sample": 40, "gold_column": None}
    recipe_file.write_text(json.dumps(values | {"score": {"sidecar": sidecar}}))
    recipe = load_recipe(recipe_file, {})

    for stage in (rating, train, score, filters):
        stage.run(recipe)

    result = filters.run(recipe)
    kept = pq.read_table(recipe.run_folder / "filter" / "kept" / "book.parquet")
    given = rows(tmp_path / "book.txt")
    assert result.n_rows == len(given) > 40
    assert 0 < kept.num_rows == result.n_kept < len(given)
    assert set(kept["text"].to_pylist()) <= set(given)
