"""What is wrong with a corpus is said in one line: what, where, and what to do."""

import gzip
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline import corpus as corpora
from pipeline import formats, storage
from pipeline import sample as sampling_
from pipeline import shards as shards_
from pipeline.config import Corpus
from pipeline.errors import UserError
from pipeline.shards import Counts

ROWS = [{"id": f"d{i}", "text": f"document number {i}", "n": i} for i in range(10)]


def at(path: Any, **fields: Any) -> Corpus:
    return Corpus(path=str(path), **fields)


def complaint(work: Callable[[], Any]) -> str:
    """The one line that a user reads."""
    with pytest.raises(UserError) as caught:
        work()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


def listing(corpus: Corpus) -> str:
    return complaint(lambda: shards_.find_shards(corpus))


def sampling(corpus: Corpus, **more: Any) -> str:
    return complaint(lambda: sampling_.sample(corpus, 5, 0, **more))


def scoring(corpus: Corpus) -> str:
    """What score meets: the schema of every shard, then its rows."""
    return complaint(lambda: read_all(corpus))


def read_all(corpus: Corpus, counts: Counts | None = None) -> list[dict[str, Any]]:
    rows = []
    for shard in shards_.find_shards(corpus):
        schema = corpora.read_schema(shard, corpus)
        for batch in corpora.read(shard, corpus, counts or Counts(), schema=schema):
            corpora.texts(batch, corpus, shard, Counts())
            rows += batch.to_pylist()
    return rows


def texts_of(corpus: Corpus) -> list[str]:
    return sorted(document.text for document in sampling_.sample(corpus, 99, 0)[0])


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(path: Path, **columns: Any) -> Corpus:
    pq.write_table(pa.table(columns), path)
    return at(path)


# -- the path ---------------------------------------------------------------------------------------------------------


def test_no_path_says_which_setting_to_give() -> None:
    assert "--corpus.path" in listing(Corpus())
    assert "--corpus.path" in listing(Corpus(path=""))


@pytest.mark.parametrize("path", ["/nowhere/pilott", "data/pilott/deep", "nowhere/a.parquet", "memory://nowhere/a"])
def test_a_missing_path_is_named(path: str) -> None:
    line = listing(at(path))
    assert f"corpus.path: {path} does not exist" in line
    assert "give a parquet, JSONL or text file" in line


def test_a_missing_path_that_could_be_a_hub_name_says_that_it_is_neither() -> None:
    pytest.importorskip("datasets")
    line = listing(at("nobody-has-this/data-set"))
    assert "nobody-has-this/data-set does not exist here and is no Hub dataset within reach" in line


def test_an_empty_folder_and_one_without_documents_are_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no parquet, JSONL, Arrow or text file" in listing(at(tmp_path))
    (tmp_path / "readme.md").write_text("x")
    assert "holds no parquet" in listing(at(tmp_path))
    assert "holds no parquet" in listing(at(tmp_path / "readme.md"))
    assert "holds no parquet" in listing(at(tmp_path / "*.jsonl"))


def test_an_empty_corpus_has_no_rows_and_no_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    parquet(tmp_path / "a.parquet", text=pa.array([], pa.string()))
    for name in ("a.jsonl", "a.parquet"):
        documents, counts = sampling_.sample(at(tmp_path / name), 5, 0)
        assert (documents, counts.n_rows) == ([], 0)


def test_two_files_that_would_be_written_as_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    assert "would both be written as a.parquet; rename one" in listing(at(tmp_path))


def test_a_folder_of_several_formats_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    parquet(tmp_path / "b.parquet", text=["x"])
    line = listing(at(tmp_path))
    assert "mixes jsonl and parquet files; choose with a glob such as *.jsonl" in line
    assert [shard.name for shard in shards_.find_shards(at(tmp_path / "*.jsonl"))] == ["a.parquet"]


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list(ROWS) for name in ("fit", "held-out")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert "has no split 'train'; there are: fit, held-out" in listing(at(tmp_path / "saved"))


def test_a_split_that_a_hub_dataset_does_not_have_names_those_that_it_has(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    parquet(tmp_path / "train.parquet", text=["x"])
    line = complaint(lambda: shards_.hub_shards(at(tmp_path, split="validation")))
    assert "validation" in line
    assert "train" in line


def test_a_hub_dataset_that_changes_its_types_late_is_one_line(tmp_path: Path) -> None:
    """`datasets` takes the types of the first 10 MB for those of the whole."""
    pytest.importorskip("datasets")
    rows = [{"text": "x" * 2**20, "n": 1}] * 12 + [{"text": "y", "n": 0.5}]
    (tmp_path / "train.jsonl").write_bytes(lines(rows))
    [shard] = shards_.hub_shards(at(tmp_path))
    assert "train-00000-of-00001.parquet cannot be read" in complaint(
        lambda: list(corpora.read(shard, at(tmp_path), Counts()))
    )


def test_a_damaged_saved_dataset_names_the_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow is missing" in sampling(at(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text('{"_data_fi')
    assert "state.json is not JSON" in listing(at(tmp_path / "saved"))


def test_an_unknown_protocol_and_a_chain_are_refused() -> None:
    assert "s4:// is not understood" in listing(at("s4://bucket/data"))
    assert "unpack it first" in listing(at("zip://*.jsonl::data.zip"))


def test_a_protocol_whose_package_is_missing_names_the_package() -> None:
    known = {"gs": "gcsfs", "abfs": "adlfs", "oci": "ocifs", "lakefs": "lakefs_spec", "asynclocal": "morefs"}
    protocol, package = next((p, package) for p, package in known.items() if not importlib.util.find_spec(package))
    line = listing(at(f"{protocol}://bucket/data"))
    assert f"{protocol}://bucket/data needs a package" in line
    assert package in line


@pytest.mark.parametrize("path", ["s3://bucket/data/*.parquet", "http://127.0.0.1:9/a.jsonl"])
def test_a_store_that_does_not_answer_is_one_line(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    line = listing(at(path))
    assert f"{path} is out of reach" in line or f"{path} does not exist" in line


# -- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path, name: str) -> None:
    rows = [{"id": 1, "meta": {"body": "x", "lang": "en"}}]
    write(tmp_path / name, rows)
    for wrong in ("text", "meta.text", "id.text"):
        for say in (sampling, scoring):
            line = say(at(tmp_path, text_column=wrong))
            assert f"{name} has no column '{wrong}'; there are: id, meta, meta.body, meta.lang" in line
    good = at(tmp_path, text_column="meta.body")
    assert "no column 'key'" in sampling(good.model_copy(update={"id_column": "key"}))
    assert "no column 'lng'" in sampling(good, stratify_by="lng")
    assert "no column 'gold'" in sampling(good, gold_column="gold")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_bytes(lines(rows))
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
@pytest.mark.parametrize(("value", "kind"), [(3, "int64"), (["x"], "list<"), ({"a": "x"}, "struct<"), (True, "bool")])
def test_a_text_column_that_is_no_text_is_refused(tmp_path: Path, name: str, value: Any, kind: str) -> None:
    write(tmp_path / name, [{"text": value}])
    for say in (sampling, scoring):
        line = say(at(tmp_path))
        assert f"{name}: text column 'text' holds {kind}" in line
        assert line.endswith("not text")


def test_a_gold_column_that_is_text_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    corpus = parquet(tmp_path / "a.parquet", text=["x"], good=["yes"])
    assert "gold column 'good' holds 'yes'; it must be true/false or a number" in sampling(corpus, gold_column="good")


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, suffix: str) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_file if suffix == "feather" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    for say in (sampling, scoring):
        assert f"a.{suffix} has several columns called 'text'; rename all but one" in say(at(path))


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["empty", "cut at the end", "cut in the middle", "garbage", "a folder's listing"])
def test_trap_02_a_parquet_shard_that_cannot_be_read_stops_the_work_and_is_named(tmp_path: Path, damage: str) -> None:
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        parquet(tmp_path / name, text=[f"{name} {i}" for i in range(100)])
    body = (tmp_path / "b.parquet").read_bytes()
    bodies = {
        "empty": b"",
        "cut at the end": body[:-5],
        "cut in the middle": body[: len(body) // 2],
        "garbage": os.urandom(1000),
        "a folder's listing": b"PAR1" + b"\0" * 100 + b"PAR1",
    }
    (tmp_path / "b.parquet").write_bytes(bodies[damage])
    for say in (sampling, scoring):
        line = say(at(tmp_path))
        assert f"{tmp_path}/b.parquet cannot be read as parquet (" in line
        assert line.endswith("replace or remove it")


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_trap_16_a_half_written_shard_is_never_taken_for_a_whole_one(tmp_path: Path, share: float) -> None:
    rows = [{"text": os.urandom(100).hex()} for _ in range(3000)]
    for name, body in {
        "a.jsonl.gz": gzip.compress(lines(rows)),
        "a.jsonl.zst": zstandard.compress(lines(rows)),
        "a.arrow": None,
        "a.parquet": None,
    }.items():
        if body is None:
            write(tmp_path / name, rows)
        else:
            (tmp_path / name).write_bytes(body)
        whole = (tmp_path / name).read_bytes()
        assert len(read_all(at(tmp_path / name))) == 3000
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        for say in (sampling, scoring):
            assert f"{name} cannot be read as" in say(at(tmp_path / name))


def test_trap_16_a_cut_json_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS)[:-9])
    assert "a.jsonl line 10 is not JSON" in sampling(at(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.arrow", "a.feather"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is a plain text, whatever the name says\n" * 30)
    assert f"{name} cannot be read as" in sampling(at(tmp_path))


def test_flipped_bits_in_compressed_json_lines_never_give_a_traceback(tmp_path: Path) -> None:
    whole = gzip.compress(lines([{"text": f"text {i * i}"} for i in range(300)]), mtime=0)
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 60):
        body = bytearray(whole)
        body[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.jsonl.gz").write_bytes(body)
        try:
            assert len(read_all(at(tmp_path))) == 300
        except UserError as error:
            assert "\n" not in str(error)


def test_a_shard_that_goes_away_is_named(tmp_path: Path) -> None:
    corpus = parquet(tmp_path / "a.parquet", text=["x"])
    [shard] = shards_.find_shards(corpus)
    (tmp_path / "a.parquet").unlink()
    for work in (shards_.fingerprint, lambda s: corpora.read_schema(s, corpus), lambda s: corpora.n_rows([s])):
        assert "a.parquet is missing" in complaint(lambda work=work: work(shard))


# -- bad rows ---------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "not valid UTF-8": b'{"text": "caf\xe9"}',
    "not JSON": b'{"text": "open',
    "not a JSON object": b'["a list"]',
    "not JSON (": b"{'text': 'python'}",
}


@pytest.mark.parametrize("problem", BAD_LINES)
def test_a_bad_line_is_named_with_its_number_and_can_be_left_out_and_counted(tmp_path: Path, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + BAD_LINES[problem] + b'\n{"text": "b"}\n')
    for say in (sampling, scoring):
        line = say(at(tmp_path))
        assert f"a.jsonl line 3 is {problem}" in line
        assert "--corpus.skip-bad-rows" in line
    patient = at(tmp_path, skip_bad_rows=True)
    counts = Counts()
    assert read_all(patient, counts) == [{"text": "a"}, {"text": "b"}]
    assert (counts.n_rows, counts.n_bad_rows) == (3, 1)
    documents, counts = sampling_.sample(patient, 9, 0)
    assert (len(documents), counts.n_rows, counts.n_bad_rows) == (2, 3, 1)


def test_json_too_deep_to_read_is_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"[" * 200_000 + b"\n")
    assert "line 1 is not JSON" in sampling(at(tmp_path))


@pytest.mark.parametrize("batch_rows", [1, 2048], ids=["in several batches", "in one batch"])
@pytest.mark.parametrize(
    "pair", [(1, "one"), ("one", 1), ([1], {"a": 1}), ({"a": 1}, "x"), (True, 1), (1, True), ({"a": 1}, {"a": "x"})]
)
def test_a_column_of_several_types_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[Any, Any], batch_rows: int
) -> None:
    monkeypatch.setattr(formats, "BATCH_ROWS", batch_rows)
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "t", "mixed": value} for value in pair]))
    line = scoring(at(tmp_path))
    assert "a.jsonl" in line
    assert "mixed" in line
    assert "type" in line
    assert texts_of(at(tmp_path)) == ["t"]  # a column that is not read does no harm


def test_a_text_column_of_several_types_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "t"}, {"text": 5}]))
    assert "a.jsonl lines up to 2: column 'text' mixes types" in sampling(at(tmp_path))


def test_a_number_too_large_for_64_bits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "t", "hash": 2**70}]))
    assert "column 'hash' mixes types or holds too large a number" in scoring(at(tmp_path))


def test_a_column_of_empty_objects_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "t", "meta": [{"deep": {}}]}]))
    assert "column 'meta' holds empty objects" in scoring(at(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "t", "meta": {}}, {"text": "t", "meta": {"a": 1}}]))
    assert [row["meta"] for row in read_all(at(tmp_path))] == [{"a": None}, {"a": 1}]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_a_document_of_50_mb_is_read_and_drawn(tmp_path: Path, name: str) -> None:
    long = "grist " * (50 * 2**20 // 6)
    write(tmp_path / name, [{"text": "short"}, {"text": long}, {"text": "short too"}])
    assert texts_of(at(tmp_path)) == [long, "short", "short too"]
    assert [len(row["text"]) for row in read_all(at(tmp_path))] == [5, len(long), 9]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_nul_bytes_and_control_characters_pass_through(tmp_path: Path, name: str) -> None:
    strange = "a\x00b\x01\x1f\x7f\u2028\ufeff\U0001f600"
    write(tmp_path / name, [{"text": strange}])
    assert texts_of(at(tmp_path)) == [strange]
    assert read_all(at(tmp_path)) == [{"text": strange}]


def test_lone_surrogates_become_the_replacement_character_and_are_counted(tmp_path: Path) -> None:
    body = (
        b'{"text": "cut \\ud83d here"}\n{"text": "at the end \\uD83D"}\n{"text": "backwards \\ude00\\ud83d!"}\n'
        b'{"text": "whole \\ud83d\\ude00"}\n{"text": "deep", "meta": [{"\\udfff": "\\udc00"}]}\n'
    )
    (tmp_path / "a.jsonl").write_bytes(body)
    expected = ["cut \ufffd here", "at the end \ufffd", "backwards \ufffd\ufffd!", "whole \U0001f600", "deep"]
    documents, counts = sampling_.sample(at(tmp_path), 9, 0)
    assert {document.text for document in documents} == set(expected)
    assert counts.n_repaired_texts == 4
    counts = Counts()
    rows = read_all(at(tmp_path), counts)
    assert [row["text"] for row in rows] == expected
    assert rows[4]["meta"] == [{"\ufffd": "\ufffd"}]
    assert counts.n_repaired_texts == 4


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "nested"])
def test_bytes_that_are_not_utf8_in_a_string_column_become_the_replacement_character(
    tmp_path: Path, kind: str
) -> None:
    raw = pa.array([b"fine", b"caf\xe9", None, b"\xff", "good \ufffd".encode()])
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    shapes = {
        "string": {"text": strings},
        "large_string": {"text": strings.cast(pa.large_binary()).view(pa.large_string())},
        "dictionary": {"text": strings.dictionary_encode()},
        "nested": {"content": pa.StructArray.from_arrays([strings], ["text"])},
    }
    corpus = parquet(tmp_path / "a.parquet", **shapes[kind])
    corpus = corpus.model_copy(update={"text_column": "content.text" if kind == "nested" else "text"})
    documents, counts = sampling_.sample(corpus, 9, 0)
    assert {document.text for document in documents} == {"fine", "caf\ufffd", "\ufffd", "good \ufffd"}
    assert (counts.n_repaired_texts, counts.n_empty) == (2, 1)


def test_bytes_that_are_not_utf8_in_an_id_or_a_stratum_do_no_harm(tmp_path: Path) -> None:
    raw = pa.array([b"caf\xe9", b"fine"])
    strings = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    corpus = parquet(tmp_path / "a.parquet", text=["a", "b"], key=strings, group=strings)
    corpus = corpus.model_copy(update={"id_column": "key"})
    documents, _ = sampling_.sample(corpus, 9, 0, stratify_by="group")
    assert {(d.id, d.stratum) for d in documents} == {("caf\ufffd", "caf\ufffd"), ("fine", "fine")}


# -- no room ----------------------------------------------------------------------------------------------------------

WRITE = """
import os, sys
import pyarrow as pa
from pathlib import Path
from pipeline.storage import shard_writer, write_text
from pipeline.errors import UserError
folder = Path(sys.argv[1])
table = pa.table({"text": [os.urandom(500).hex() for _ in range(1000)]})
try:
    with shard_writer(folder / "a.parquet", table.schema) as writer:
        for _ in range(5):
            writer.write_table(table)
except UserError as error:
    print("shard:", error)
try:
    write_text(folder / "a.json", "x" * 3_000_000)
except UserError as error:
    print("text:", error)
for path in folder.iterdir():
    print("left:", path.name)
"""


def in_own_mount(folder: Path, options: str) -> list[str]:
    """What WRITE prints, line by line, when its folder is a small disk of its own."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o {options} small {folder}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a disk of his own")
    done = subprocess.run([*unshare, f'{mount} && exec "$@"', "sh", sys.executable, "-c", WRITE, str(folder)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_is_one_line_and_leaves_neither_file_nor_leftover(tmp_path: Path) -> None:
    said = in_own_mount(tmp_path / "small", "size=256k")
    assert said[0].startswith(f"shard: cannot write {tmp_path}/small/a.parquet: no space left on device; make room")
    assert said[1].startswith(f"text: cannot write {tmp_path}/small/a.json: no space left on device; make room")
    assert said[2:] == []


def test_a_disk_that_can_only_be_read_is_one_line(tmp_path: Path) -> None:
    said = in_own_mount(tmp_path / "small", "ro")
    assert "read-only file system" in said[0]
    assert "give another folder" in said[0]
    assert "read-only file system" in said[1]
    assert said[2:] == []


def test_a_limit_on_file_size_is_one_line_and_leaves_neither_file_nor_leftover(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path)], capture_output=True, text=True, preexec_fn=small_files
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith(f"shard: cannot write {tmp_path}/a.parquet: file too large; make room")
    assert said[1].startswith(f"text: cannot write {tmp_path}/a.json: file too large; make room")
    assert said[2:] == []


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("I am a file")
    for path in (tmp_path / "run" / "a.json", tmp_path / "run" / "deep" / "a.json"):
        assert f"cannot write {path}: " in complaint(lambda path=path: storage.write_text(path, "x"))
    assert (tmp_path / "run").read_text() == "I am a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the read-only disk above covers it")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    line = complaint(lambda: storage.write_text(tmp_path / "locked" / "a.json", "x"))
    assert "permission denied" in line


@pytest.mark.parametrize("path", ["./nodir", "../nodir", "/nodir", "nodir/", ".hidden/x"])
def test_a_path_that_is_plainly_local_is_never_looked_for_on_the_hub(path: str) -> None:
    line = listing(Corpus(path=path))
    assert line == f"corpus.path: {path} does not exist; give a parquet, JSONL or text file or a folder of them"
