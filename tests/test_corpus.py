"""Reading, sampling and writing corpora, on small real files."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import corpus as corpora
from pipeline import formats, storage
from pipeline import sample as sampling
from pipeline import shards as shards_
from pipeline.config import Corpus
from pipeline.errors import UserError
from pipeline.shards import Counts, Shard

ROWS = [{"id": f"d{i}", "text": f"document number {i}", "n": i} for i in range(10)]


def at(path: Any, **fields: Any) -> Corpus:
    return Corpus(path=str(path), **fields)


def read_all(corpus: Corpus, counts: Counts | None = None) -> list[dict[str, Any]]:
    """Every row, each shard under its own schema, as score reads them."""
    rows = []
    for shard in shards_.find_shards(corpus):
        schema = corpora.read_schema(shard, corpus)
        for batch in corpora.read(shard, corpus, counts or Counts(), schema=schema):
            assert batch.schema.equals(schema)
            rows += batch.to_pylist()
    return rows


def draw(corpus: Corpus, size: int, seed: int = 0, **more: Any) -> list[str]:
    return [document.text for document in sampling.sample(corpus, size, seed, **more)[0]]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "a.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "a.ndjson": lambda path, rows: path.write_bytes(lines(rows)),
    "a.json": lambda path, rows: path.write_bytes(lines(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "a.json.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "a.JSONL.GZ": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "a.jsonl.zst": lambda path, rows: path.write_bytes(zstandard.compress(lines(rows))),
    "a.json.zst": lambda path, rows: path.write_bytes(zstandard.compress(lines(rows))),
    "a.arrow": write_stream,
    "a.feather": lambda path, rows: pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(path)),
}


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("way", ["file", "folder", "glob"])
def test_every_format_is_read_as_file_folder_and_glob(tmp_path: Path, name: str, way: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    corpus = at({"file": tmp_path / name, "folder": tmp_path, "glob": tmp_path / "a.*"}[way])
    assert [shard.name for shard in shards_.find_shards(corpus)] == ["a.parquet"]
    assert read_all(corpus) == ROWS


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_several_compressed_files_put_one_after_the_other_are_read_to_the_end(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    path.write_bytes(pack(lines(ROWS[:4])) + pack(lines(ROWS[4:])))
    assert read_all(at(path)) == ROWS


def test_a_dataset_saved_to_disk_is_read_without_the_caches_beside_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=3)
    write_stream(tmp_path / "saved" / "cache-123.arrow", ROWS)
    assert len(shards_.find_shards(at(tmp_path / "saved"))) == 3
    assert read_all(at(tmp_path / "saved")) == ROWS


def test_the_split_of_a_saved_dataset_dict_is_a_setting(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": datasets.Dataset.from_list(ROWS[:7]), "held-out": datasets.Dataset.from_list(ROWS[7:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read_all(at(tmp_path / "saved")) == ROWS[:7]
    assert read_all(at(tmp_path / "saved", split="held-out")) == ROWS[7:]


def test_a_state_file_of_another_tool_does_not_make_a_saved_dataset(tmp_path: Path) -> None:
    WRITERS["a.parquet"](tmp_path / "a.parquet", ROWS)
    (tmp_path / "state.json").write_text('{"step": 3}')
    assert read_all(at(tmp_path)) == ROWS


def hub_rows(corpus: Corpus) -> list[dict[str, Any]]:
    rows = []
    for shard in shards_.hub_shards(corpus):
        schema = corpora.read_schema(shard, corpus)
        for batch in corpora.read(shard, corpus, Counts(), schema=schema):
            assert batch.schema.equals(schema)
            rows += batch.to_pylist()
    return rows


def test_a_hub_dataset_streams_shard_by_shard_with_subset_and_split(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for config, split, start in [("en", "train", 0), ("en", "train", 4), ("en", "test", 6), ("es", "train", 8)]:
        folder = tmp_path / config
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(ROWS[start : start + 2]), folder / f"{split}-{start}.parquet")
    configs = [{"config_name": name, "data_dir": name} for name in ("en", "es")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    english = at(tmp_path, subset="en")
    names = [shard.name for shard in shards_.hub_shards(english)]
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert hub_rows(english) == ROWS[0:2] + ROWS[4:6]
    assert hub_rows(at(tmp_path, subset="en", split="test")) == ROWS[6:8]
    assert hub_rows(at(tmp_path, subset="es")) == ROWS[8:10]


def test_a_hub_dataset_keeps_its_types_and_gives_only_the_columns_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    table = pa.table(
        {
            "text": pa.array(["a", "b", "c"], pa.large_string()),
            "when": pa.array([1, 2, 3], pa.timestamp("us", "UTC")),
            "meta": pa.array([{"k": [1]}, None, {"k": []}], pa.struct([("k", pa.list_(pa.int32()))])),
        }
    )
    pq.write_table(table, tmp_path / "train-0.parquet")
    [shard] = shards_.hub_shards(at(tmp_path))
    assert corpora.read_schema(shard, at(tmp_path)).equals(table.schema)
    assert hub_rows(at(tmp_path)) == table.to_pylist()
    [batch] = corpora.read(shard, at(tmp_path), Counts(), ["text"])
    assert batch.schema.names == ["text"]


def test_a_hub_dataset_of_json_lines_is_read_through_for_its_schema(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    assert hub_rows(at(tmp_path)) == ROWS


def test_a_batch_is_widened_to_the_schema_of_its_shard() -> None:
    schema = pa.schema({"n": pa.float64(), "late": pa.struct([("x", pa.string())]), "text": pa.string()})
    batch = pa.record_batch({"text": ["a"], "n": [1]})
    wide = corpora.conform(batch, schema)
    assert wide.schema.equals(schema)
    assert wide.to_pylist() == [{"n": 1.0, "late": None, "text": "a"}]


@pytest.mark.parametrize("path", ["memory://bucket/data", "memory://bucket/data/*/*.jsonl.gz"])
def test_a_remote_folder_and_glob_are_read_through_fsspec(path: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/data/x/b.jsonl.gz", gzip.compress(lines(ROWS[5:])))
    fs.pipe_file("/bucket/data/x/a.jsonl.gz", gzip.compress(lines(ROWS[:5])))
    corpus = at(path)
    assert [shard.name for shard in shards_.find_shards(corpus)] == ["x/a.parquet", "x/b.parquet"]
    assert shards_.find_shards(corpus)[0].source.startswith("memory://")
    assert read_all(corpus) == ROWS
    fs.rm("/bucket", recursive=True)


def test_a_remote_file_is_read_through_fsspec(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    fs.pipe_file("/bucket/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert read_all(at("memory://bucket/a.parquet")) == ROWS
    fs.rm("/bucket", recursive=True)


# -- names ------------------------------------------------------------------------------------------------------------


def test_shards_come_in_the_order_of_their_own_names(tmp_path: Path) -> None:
    for name in ["c.json.gz", "c.k.jsonl"]:
        (tmp_path / name).write_bytes(lines(ROWS))
    assert [shard.name for shard in shards_.find_shards(at(f"{tmp_path}/c*"))] == ["c.k.parquet", "c.parquet"]


def test_shards_keep_their_names_below_the_folder_and_come_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ["b/2.jsonl", "a/1.jsonl", "c.jsonl", "a/b/0.jsonl"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(ROWS[:1]))
    expected = ["a/1.parquet", "a/b/0.parquet", "b/2.parquet", "c.parquet"]
    assert [shard.name for shard in shards_.find_shards(at(tmp_path))] == expected
    assert [shard.name for shard in shards_.find_shards(at(f"{tmp_path}/**/*.jsonl"))] == expected
    assert [shard.name for shard in shards_.find_shards(at(f"{tmp_path}/[ab]/*.jsonl"))] == [
        "a/1.parquet",
        "b/2.parquet",
    ]


@pytest.mark.parametrize(
    "hidden", [".a.jsonl", "_a.jsonl", ".git/a.jsonl", "_tmp/0/a.jsonl", "notes.txt", "dataset_info.json"]
)
def test_hidden_files_and_other_files_are_no_documents(tmp_path: Path, hidden: str) -> None:
    (tmp_path / "_hidden" / ".above").mkdir(parents=True)
    folder = tmp_path / "_hidden" / ".above"  # what lies above the corpus does not matter
    (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
    (folder / hidden).write_bytes(lines(ROWS))
    (folder / "seen.jsonl").write_bytes(lines(ROWS[:1]))
    assert [shard.name for shard in shards_.find_shards(at(folder))] == ["seen.parquet"]
    assert [shard.name for shard in shards_.find_shards(at(f"{folder}/**/*.jsonl"))] == ["seen.parquet"]


def test_json_beside_other_formats_is_never_left_out_silently(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(lines(ROWS))
    (tmp_path / "README.md").write_text("no data")
    assert [shard.name for shard in shards_.find_shards(at(tmp_path))] == ["a.parquet"]
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS))
    assert [shard.name for shard in shards_.find_shards(at(tmp_path))] == ["a.parquet", "b.parquet"]


def test_folders_that_match_a_glob_are_not_taken_for_files(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").mkdir()
    WRITERS["a.parquet"](tmp_path / "a.parquet", ROWS)
    assert [shard.name for shard in shards_.find_shards(at(tmp_path / "*.parquet"))] == ["a.parquet"]


def test_names_with_brackets_blanks_and_signs_are_names(tmp_path: Path) -> None:
    folder = tmp_path / "data [1] 50% #x"
    folder.mkdir()
    WRITERS["a.parquet"](folder / "ä b?.parquet", ROWS)
    assert read_all(at(folder)) == read_all(at(folder / "ä b?.parquet")) == ROWS


def test_linked_files_are_read_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    WRITERS["a.parquet"](tmp_path / "blobs" / "0123", ROWS)
    (tmp_path / "snapshot" / "a.parquet").symlink_to(tmp_path / "blobs" / "0123")
    assert read_all(at(tmp_path / "snapshot")) == ROWS


def test_a_fingerprint_tells_another_file_under_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    prints = set()
    for body in [b"", b"{}\n", b"{ }\n", b"x" * 200_000, b"x" * 199_999 + b"y", b"y" + b"x" * 199_999]:
        path.write_bytes(body)
        [shard] = shards_.find_shards(at(path))
        assert shards_.fingerprint(shard) == shards_.fingerprint(shard)
        prints.add(shards_.fingerprint(shard))
    assert len(prints) == 6


def test_the_fingerprint_of_a_remote_file_is_that_of_a_local_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    fsspec.filesystem("memory").pipe_file("/bucket/a.jsonl", lines(ROWS))
    prints = {shards_.fingerprint(shards_.find_shards(at(p))[0]) for p in (tmp_path, "memory://bucket")}
    assert len(prints) == 1
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


# -- columns ----------------------------------------------------------------------------------------------------------


def every_type() -> pa.Table:
    moment = datetime(2024, 5, 1, 12, 30, tzinfo=timezone.utc)
    points = pa.list_(pa.struct([("x", pa.int8()), ("tags", pa.list_(pa.string()))]))
    columns = {
        "z": pa.array([1, None, 3], pa.int16()),
        "kind": pa.array(["a", "b", None]).dictionary_encode(),
        "when": pa.array([moment, None, moment], pa.timestamp("ms", "Europe/Madrid")),
        "day": pa.array([moment.date()] * 3, pa.date32()),
        "long": pa.array(["x", None, "y"], pa.large_string()),
        "text": pa.array(["one", "two", "three"]),
        "points": pa.array([[{"x": 1, "tags": ["a"]}], [], None], points),
        "price": pa.array([Decimal("1.50"), None, Decimal("-2.25")], pa.decimal128(9, 2)),
        "raw": pa.array([b"\x00\xff", b"", None], pa.binary()),
        "nothing": pa.nulls(3),
        "a": pa.array([True, None, False]),
        "small": pa.array([0.5, None, 1.5], pa.float32()),
    }
    return pa.table(columns)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_every_column_passes_through_with_its_type_and_in_its_place(tmp_path: Path, suffix: str) -> None:
    table = every_type()
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "feather":
        pyarrow.feather.write_feather(table, str(path))
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    [shard] = shards_.find_shards(at(path))
    schema = corpora.read_schema(shard, at(path))
    assert schema.equals(table.schema)
    found = pa.Table.from_batches(corpora.read(shard, at(path), Counts(), schema=schema))
    assert found.equals(table)


def test_what_is_written_as_a_shard_comes_back_with_its_types(tmp_path: Path) -> None:
    storage.write_table(tmp_path / "a.parquet", every_type())
    [shard] = shards_.find_shards(at(tmp_path))
    assert pa.Table.from_batches(corpora.read(shard, at(tmp_path), Counts())).equals(every_type())


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_trap_03_the_text_column_is_a_setting(tmp_path: Path, name: str) -> None:
    rows = [{"content": {"body": {"text": f"t{i}"}, "n": i}, "text": "wrong", "url": f"u{i}"} for i in range(3)]
    WRITERS[name](tmp_path / name, rows)
    documents, _ = sampling.sample(at(tmp_path, text_column="content.body.text", id_column="url"), 9, 0)
    assert {(d.id, d.text) for d in documents} == {(f"u{i}", f"t{i}") for i in range(3)}
    assert set(draw(at(tmp_path, text_column="url"), 9)) == {"u0", "u1", "u2"}


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_a_column_that_has_a_dot_in_its_name_is_found_by_it(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, [{"content.text": "plain", "content": {"text": "nested"}}])
    assert draw(at(tmp_path, text_column="content.text"), 9) == ["plain"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_text_may_be_any_kind_of_string(kind: Any) -> None:
    array = pa.array(["a", None, "b"])
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(kind)
    shard = Shard("a.parquet", "a.parquet", "parquet")
    assert corpora.texts(pa.record_batch({"text": array}), Corpus(), shard, Counts()) == ["a", None, "b"]


def test_without_an_id_column_copies_of_a_text_share_the_hash_of_their_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "same"}, {"text": "other"}, {"text": "same"}]))
    [shard] = shards_.find_shards(at(tmp_path))
    [documents] = sampling.documents_of(shard, at(tmp_path), Counts(), None, None)
    first, other, copy = [document.id for document in documents]
    assert first == copy != other
    assert first == "3899cbf2bbe606b305a65b559330d720"


def test_a_null_id_falls_back_to_the_hash(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": 7, "text": "a"}, {"id": None, "text": "b"}]))
    documents, _ = sampling.sample(at(tmp_path, id_column="id"), 9, 0)
    assert {d.text: d.id for d in documents} == {"a": "7", "b": corpora.text_id("b")}


def test_json_lines_unify_over_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late keys, int then float, null then struct, structs and lists that grow: each in another batch."""
    monkeypatch.setattr(formats, "BATCH_ROWS", 1)
    rows = [
        {"text": "a", "n": 1, "meta": {"a": 2, "z": 1}, "tags": []},
        {"text": "b", "n": None, "meta": None},
        {"text": "c", "n": 2.5, "meta": {"late": {"deep": "x"}, "z": 0.5}, "tags": ["t"], "late": True},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    [shard] = shards_.find_shards(at(tmp_path))
    late = pa.struct([("deep", pa.string())])
    meta = pa.struct([("a", pa.int64()), ("z", pa.float64()), ("late", late)])
    expected = {
        "text": pa.string(),
        "n": pa.float64(),
        "meta": meta,
        "tags": pa.list_(pa.string()),
        "late": pa.bool_(),
    }
    assert corpora.read_schema(shard, at(tmp_path)).equals(pa.schema(expected))
    assert read_all(at(tmp_path)) == [
        {"text": "a", "n": 1.0, "meta": {"z": 1.0, "a": 2, "late": None}, "tags": [], "late": None},
        {"text": "b", "n": None, "meta": None, "tags": None, "late": None},
        {"text": "c", "n": 2.5, "meta": {"z": 0.5, "a": None, "late": {"deep": "x"}}, "tags": ["t"], "late": True},
    ]


def test_a_column_may_be_absent_from_any_number_of_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BATCH_ROWS", 1)
    rows = [{"text": "a"}, {"text": "b"}, {"other": 1}, {"text": "c", "good": 1, "key": "k"}, {"text": None}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    documents, counts = sampling.sample(at(tmp_path, id_column="key"), 9, 0, gold_column="good")
    assert {d.text: d.gold for d in documents} == {"a": None, "b": None, "c": 1.0}
    assert (counts.n_rows, counts.n_empty) == (5, 2)


def test_json_lines_may_have_blank_lines_windows_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\u2028"}')
    assert draw(at(tmp_path), 9, 1) and sorted(draw(at(tmp_path), 9)) == ["a", "b\u2028"]


def test_a_gold_column_may_hold_booleans_numbers_and_gaps(tmp_path: Path) -> None:
    golds = {
        "bool": pa.array([True, False, None]),
        "int": pa.array([3, 0, None], pa.int8()),
        "float": pa.array([0.5, 0.0, float("nan")]),
        "decimal": pa.array([Decimal("1.5"), Decimal(0), None]),
    }
    pq.write_table(pa.table({"text": ["a", "b", "c"], **golds}), tmp_path / "a.parquet")
    for name, first in {"bool": 1.0, "int": 3.0, "float": 0.5, "decimal": 1.5}.items():
        documents, _ = sampling.sample(at(tmp_path), 9, 0, gold_column=name)
        assert {d.text: d.gold for d in documents} == {"a": first, "b": 0.0, "c": None}


# -- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow", "a.feather"])
def test_batches_hold_at_most_so_many_rows(tmp_path: Path, name: str) -> None:
    n = 2 * formats.BATCH_ROWS + 7
    WRITERS[name](tmp_path / name, [{"text": str(i)} for i in range(n)])
    [shard] = shards_.find_shards(at(tmp_path))
    counts = Counts()
    sizes = [batch.num_rows for batch in corpora.read(shard, at(tmp_path), counts)]
    assert max(sizes) <= formats.BATCH_ROWS
    assert sum(sizes) == counts.n_rows == n


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_batches_of_long_documents_hold_fewer_rows(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BATCH_BYTES", 2**20)
    WRITERS[name](tmp_path / name, [{"text": os.urandom(50_000).hex()} for _ in range(40)])
    [shard] = shards_.find_shards(at(tmp_path))
    sizes = [batch.nbytes for batch in corpora.read(shard, at(tmp_path), Counts())]
    assert max(sizes) <= 1.2 * 2**20
    assert len(sizes) >= 4


PEAK = """
import sys
from pipeline.config import Corpus
from pipeline.corpus import read
from pipeline.sample import sample
from pipeline.shards import Counts, find_shards as shards
corpus = Corpus(path=sys.argv[1])
if sys.argv[2] == "sample":
    assert len(sample(corpus, 10, 0)[0]) == 10
else:
    assert sum(batch.num_rows for shard in shards(corpus) for batch in read(shard, corpus, Counts())) > 0
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""


def peak_mb(path: Path, how: str) -> float:
    """Most memory a process had that read or sampled a corpus."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(path), how], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("name", "how"), [("a.parquet", "read"), ("a.parquet", "sample"), ("a.jsonl.zst", "sample")])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, name: str, how: str) -> None:
    """Ten times the corpus, 36 MB more that hardly compress, in one row group: under 12 MB more memory."""
    peaks = []
    for n in (4_000, 40_000):
        noise = random.Random(n).randbytes(500 * n).hex()
        rows = [{"text": noise[i * 1000 : i * 1000 + 1000]} for i in range(n)]
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=n, use_dictionary=False)
        else:
            WRITERS[name](tmp_path / name, rows)
        peaks.append(peak_mb(tmp_path / name, how))
    assert peaks[1] - peaks[0] < 12, peaks


# -- sampling ---------------------------------------------------------------------------------------------------------


def numbered(path: Path, n: int) -> Corpus:
    (path / "a.jsonl").write_bytes(lines([{"text": f"document {i}"} for i in range(n)]))
    return at(path)


def test_the_same_seed_draws_the_same_sample_and_another_seed_another(tmp_path: Path) -> None:
    corpus = numbered(tmp_path, 100)
    assert draw(corpus, 20, 1) == draw(corpus, 20, 1)
    assert len(set(draw(corpus, 20, 1)) & set(draw(corpus, 20, 2))) < 12


def test_a_larger_sample_holds_the_smaller_one(tmp_path: Path) -> None:
    corpus = numbered(tmp_path, 100)
    assert draw(corpus, 30)[:10] == draw(corpus, 10)


def test_the_sample_is_uniform_over_the_whole_corpus(tmp_path: Path) -> None:
    """Chi-square of how often each of 200 places is drawn, in 400 samples of 20: about 180, sd 18."""
    corpus = numbered(tmp_path, 200)
    drawn = Counter(int(text.split()[1]) for seed in range(400) for text in draw(corpus, 20, seed))
    assert sum(drawn.values()) == 8000
    assert 100 < sum((drawn[place] - 40) ** 2 / 40 for place in range(200)) < 270
    for part in range(4):
        assert abs(sum(drawn[place] for place in range(50 * part, 50 * part + 50)) - 2000) < 180


def test_every_pair_of_documents_is_as_likely_as_any_other(tmp_path: Path) -> None:
    corpus = numbered(tmp_path, 6)
    pairs = Counter(frozenset(draw(corpus, 2, seed)) for seed in range(900))
    assert len(pairs) == 15
    assert all(30 <= count <= 95 for count in pairs.values())  # 60 expected


def cut(rows: list[dict[str, Any]], folder: Path, n_shards: int, seed: int) -> Corpus:
    """The same rows in another order and in other shards."""
    mixed = random.Random(seed).sample(rows, len(rows))
    folder.mkdir()
    for index in range(n_shards):
        (folder / f"{index}.jsonl").write_bytes(lines(mixed[index::n_shards]))
    return at(folder)


def test_the_sample_is_the_same_however_the_corpus_is_cut_and_ordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "BATCH_ROWS", 7)
    rows = [{"text": f"t{i % 80}", "group": "abc"[i % 3], "good": i % 2} for i in range(120)]
    more: list[dict[str, Any]] = [{}, {"stratify_by": "group"}, {"gold_column": "good"}]
    for how in more:
        samples = [
            sampling.sample(cut(rows, tmp_path / f"{len(how)}{how}{n}", n, n), 25, 3, **how)[0] for n in (1, 2, 5)
        ]
        assert samples[0] == samples[1] == samples[2]
        assert len(samples[0]) == 25


def test_copies_are_drawn_once_and_empty_texts_never_but_counted(tmp_path: Path) -> None:
    texts = ["a", "a", "b", "a", "", "  \n\t", None, "b", "c"]
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": text} for text in texts]))
    documents, counts = sampling.sample(at(tmp_path), 50, 0)
    assert sorted(document.text for document in documents) == ["a", "b", "c"]
    assert (counts.n_rows, counts.n_empty, counts.n_bad_rows) == (9, 3, 0)


def test_of_copies_the_smallest_id_stays(tmp_path: Path) -> None:
    rows = [{"id": name, "text": "same"} for name in ("c", "a", "b")]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    [document] = sampling.sample(at(tmp_path, id_column="id"), 5, 0)[0]
    assert document.id == "a"


def test_a_copy_with_a_known_quality_goes_before_one_without(tmp_path: Path) -> None:
    for order in ([None, 2, 1], [1, 2, None], [2, None, 1]):
        (tmp_path / "a.jsonl").write_bytes(lines([{"text": "same", "good": good} for good in order]))
        [document] = sampling.sample(at(tmp_path), 5, 0, gold_column="good")[0]
        assert document.gold == 1.0


def test_a_sample_larger_than_the_corpus_is_the_corpus(tmp_path: Path) -> None:
    assert len(draw(numbered(tmp_path, 12), 1000)) == 12


def stratified(path: Path, groups: dict[str, int], size: int, seed: int = 0) -> Counter[str | None]:
    rows = [{"text": f"{name} {i}", "group": name} for name, n in groups.items() for i in range(n)]
    (path / "a.jsonl").write_bytes(lines(rows))
    documents, _ = sampling.sample(at(path), size, seed, stratify_by="group")
    assert all(document.text.startswith(f"{document.stratum} ") for document in documents)
    return Counter(document.stratum for document in documents)


def test_strata_get_equal_shares_whatever_their_size(tmp_path: Path) -> None:
    assert stratified(tmp_path, {"big": 500, "mid": 50, "small": 20}, 60) == {"big": 20, "mid": 20, "small": 20}


def test_what_small_strata_cannot_fill_goes_to_the_others_and_the_size_is_exact(tmp_path: Path) -> None:
    assert stratified(tmp_path, {"big": 500, "mid": 12, "small": 3}, 60) == {"big": 45, "mid": 12, "small": 3}
    assert sorted(stratified(tmp_path, {"a": 100, "b": 100, "c": 100}, 50).values()) == [16, 17, 17]


def test_with_more_strata_than_places_each_is_as_likely_to_get_one(tmp_path: Path) -> None:
    groups = {f"g{i:02}": 3 for i in range(30)}
    drawn = Counter(name for seed in range(100) for name in stratified(tmp_path, groups, 6, seed).elements())
    assert len(drawn) == 30
    assert all(6 <= count <= 38 for count in drawn.values()), drawn  # 20 expected


def test_a_text_in_several_strata_is_drawn_once_and_the_size_is_still_exact(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "group": group} for i in range(40) for group in "abc"]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    texts = draw(at(tmp_path), 30, stratify_by="group")
    assert len(texts) == len(set(texts)) == 30


@settings(max_examples=40)
@given(
    groups=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    size=st.integers(1, 60),
    seed=st.integers(0, 99),
    batch=st.integers(1, 50),
)
def test_stratified_shares_are_as_equal_as_the_strata_allow(
    groups: list[int], size: int, seed: int, batch: int
) -> None:
    rows = [{"text": f"{g}/{i}", "group": g} for g, n in enumerate(groups) for i in range(n)] or [{"text": "x"}]
    rows = [{"group": None, **row} for row in rows]
    samples = []
    for shuffle in (seed, seed + 1):
        mixed = random.Random(shuffle).sample(rows, len(rows))
        fsspec.filesystem("memory").pipe_file("/strata/a.jsonl", lines(mixed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "BATCH_ROWS", batch)
            samples.append(sampling.sample(at("memory://strata/a.jsonl"), size, seed, stratify_by="group")[0])
    assert samples[0] == samples[1]
    shares = Counter(document.stratum for document in samples[0])
    assert shares.total() == min(size, len(rows))
    if len([n for n in groups if n]) <= size:
        for g, n in enumerate(groups):
            assert shares[str(g)] == n or shares[str(g)] >= max(shares.values()) - 1


# -- writing ----------------------------------------------------------------------------------------------------------


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_writer_that_fails_leaves_neither_file_nor_leftover_and_the_old_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.parquet"
    table = pa.table({"text": ["new"]})
    with pytest.raises(RuntimeError), storage.shard_writer(path, table.schema) as writer:
        writer.write_table(table)
        raise RuntimeError
    assert everything_in(tmp_path) == []
    storage.write_table(path, pa.table({"text": ["old"]}))
    with pytest.raises(KeyboardInterrupt), storage.shard_writer(path, table.schema) as writer:
        writer.write_table(table)
        raise KeyboardInterrupt
    assert everything_in(tmp_path) == ["deep/a.parquet"]
    assert pq.read_table(path).to_pylist() == [{"text": "old"}]


def test_a_reader_of_the_old_file_reads_it_to_the_end_while_the_new_one_takes_its_place(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "a.json", "old")
    with (tmp_path / "a.json").open() as file:
        storage.write_text(tmp_path / "a.json", "new")
        assert file.read() == "old"
    assert (tmp_path / "a.json").read_text() == "new"


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[list[str]] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(everything_in(tmp_path)), fsync(handle)))
    storage.write_text(tmp_path / "a.json", "x")
    assert [names == ["a.json"] for names in synced] == [False, True]


def test_a_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    table = pa.table({"text": ["x"] * 1000})
    with storage.shard_writer(tmp_path / "a.parquet", table.schema) as writer:
        writer.write_table(table)
        assert not (tmp_path / "a.parquet").exists()
        [leftover] = everything_in(tmp_path)
        assert leftover.startswith(".")
    assert everything_in(tmp_path) == ["a.parquet"]


KILLED = """
import sys, time, pyarrow as pa
from pathlib import Path
from pipeline.storage import shard_writer
table = pa.table({"text": ["x" * 1000] * 1000})
with shard_writer(Path(sys.argv[1]), table.schema) as writer:
    writer.write_table(table)
    print("half", flush=True)
    time.sleep(60)
"""


def test_trap_16_a_killed_writer_leaves_no_shard_and_the_sweep_takes_its_leftover(tmp_path: Path) -> None:
    path = tmp_path / "nested" / "a.parquet"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    [leftover] = everything_in(tmp_path)
    assert leftover != "nested/a.parquet"
    with pytest.raises(UserError, match="holds no parquet"):
        shards_.find_shards(at(tmp_path))
    storage.sweep(tmp_path)
    assert everything_in(tmp_path) == []


def test_the_sweep_keeps_what_it_is_told_to_keep(tmp_path: Path) -> None:
    for name in ["a.parquet", "deep/b.parquet", "old.parquet", ".a.parquet.7.tmp", "deep/.b.parquet.8.tmp"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    storage.sweep(tmp_path)
    assert everything_in(tmp_path) == ["a.parquet", "deep/b.parquet", "old.parquet"]
    storage.sweep(tmp_path, keep={"a.parquet", "deep/b.parquet"})
    assert everything_in(tmp_path) == ["a.parquet", "deep/b.parquet"]
    storage.sweep(tmp_path / "not there")


@pytest.mark.parametrize(("n_rows", "step"), [(2000, 401), (60, 7)], ids=["large", "small"])
def test_a_flipped_bit_in_a_written_shard_never_gives_wrong_data(tmp_path: Path, n_rows: int, step: int) -> None:
    """Parquet puts no checksum on its footer, where a flip may rename a column; but no row is wrong or missing."""
    rows = [{"text": f"some text, number {i * i}", "x": i / 7} for i in range(n_rows)]
    path = tmp_path / "a.parquet"
    storage.write_table(path, pa.Table.from_pylist(rows))
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    outcomes: Counter[str] = Counter()
    for bit in range(0, 8 * len(whole), step):
        body = bytearray(whole)
        body[bit // 8] ^= 1 << bit % 8
        path.write_bytes(body)
        try:
            found = read_all(at(path))
            renamed = bit // 8 >= footer and len(found) == len(rows)
            outcomes["same" if found == rows else "renamed" if renamed else "wrong"] += 1
        except UserError:
            outcomes["caught"] += 1
    assert outcomes["wrong"] == 0, outcomes
    assert outcomes["caught"] > 100, outcomes
