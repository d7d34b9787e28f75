import json
import shutil
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config, formats, score, student
from pipeline.encoder import Encoder
from pipeline.errors import UserError
from pipeline.student import Head, Layer, Student

CUTS = (-3.0, 0.5, 2.2, 2.9, 7.0)


def make_student(folder: Path, tiny_encoder: Path, cuts: tuple[float, ...] = (), **settings: object) -> Path:
    values = {"model": str(tiny_encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu", **settings}
    weight = np.random.default_rng(0).normal(size=32).astype(np.float32)
    head = Head("score", "score", (Layer(weight[None], np.array([2.5], np.float32)),), (0, 5), cuts=cuts)
    Student(config.Encoder.model_validate(values), (head,)).save(folder)
    return folder


@pytest.fixture(scope="module")
def saved_student(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    return make_student(tmp_path_factory.mktemp("students") / "student", tiny_encoder)


@pytest.fixture
def student_folder(tmp_path: Path, saved_student: Path) -> Path:
    return Path(shutil.copytree(saved_student, tmp_path / "student"))


def recipe(tmp_path: Path, corpus_path: Path, student_folder: Path, **settings: object) -> config.Recipe:
    of_corpus = {name: settings.pop(name) for name in ("text_column", "skip_bad_rows") if name in settings}
    return config.Recipe.model_validate(
        {
            "run_folder": tmp_path / "run",
            "corpus": {"path": str(corpus_path), **of_corpus},
            "encoder": {"dtype": "float32", "device": "cpu"},
            "score": {"student": student_folder, **settings},
        }
    )


def scored(tmp_path: Path, name: str) -> pa.Table:
    return pq.read_table(tmp_path / "run" / "score" / "scored" / name)


def test_every_document_gets_a_score_and_an_int_score_in_its_place(
    tmp_path: Path, corpus_folder: Path, student_folder: Path
):
    result = score.run(recipe(tmp_path, corpus_folder, student_folder))
    assert (result.n_rows, result.n_scored, result.n_shards) == (60, 60, 3)
    loaded = student.load(student_folder)
    for shard in ("part-0.parquet", "part-1.parquet", "part-2.parquet"):
        before, after = pq.read_table(corpus_folder / shard), scored(tmp_path, shard)
        assert after.schema.names == [*before.schema.names, "score", "int_score"]
        assert after.select(before.schema.names).equals(before)
        assert (after.schema.field("score").type, after.schema.field("int_score").type) == (pa.float32(), pa.int8())
        expected = loaded.score(before["text"].to_pylist())
        np.testing.assert_allclose(after["score"].to_numpy(), expected, atol=1e-4)
        assert after["int_score"].to_pylist() == np.clip(np.floor(after["score"].to_numpy() + 0.5), 0, 5).tolist()
    assert sum(result.int_score_counts.values()) == 60 and result.label_counts == {}
    assert result.half_up_counts == result.int_score_counts and result.n_windows == 60


def test_empty_and_null_texts_have_null_scores_and_are_counted(tmp_path: Path, student_folder: Path):
    source = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"text": ["a real text", "", None, "  \n", "another"]}), source)
    result = score.run(recipe(tmp_path, source, student_folder))
    assert (result.n_scored, result.n_empty) == (2, 3)
    found = scored(tmp_path, "corpus.parquet")
    assert [value is None for value in found["score"].to_pylist()] == [False, True, True, True, False]
    assert [value is None for value in found["int_score"].to_pylist()] == [False, True, True, True, False]


def test_other_columns_pass_through_with_type_and_order_unchanged(tmp_path: Path, student_folder: Path):
    table = pa.table(
        {
            "when": pa.array([1, 2], pa.timestamp("us", tz="America/Lima")),
            "tags": pa.array(["a", "b"]).dictionary_encode(),
            "text": pa.array(["one text", "two texts"], pa.large_string()),
            "nested": pa.array([[{"k": 1}], []], pa.list_(pa.struct({"k": pa.int16()}))),
            "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
            "raw": pa.array([b"\xff", b""], pa.binary()),
            "nothing": pa.nulls(2),
        }
    )
    pq.write_table(table, tmp_path / "corpus.parquet")
    score.run(recipe(tmp_path, tmp_path / "corpus.parquet", student_folder))
    after = scored(tmp_path, "corpus.parquet").select(table.schema.names)
    assert after.schema.equals(table.schema)
    assert after.equals(table)


def test_the_text_may_be_nested_and_json_lines_become_parquet(tmp_path: Path, student_folder: Path):
    rows = [{"page": {"body": f"text {i}"}, "n": i} for i in range(5)] + [{"page": {"body": "late"}, "late": "x"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    score.run(recipe(tmp_path, tmp_path / "corpus.jsonl", student_folder, text_column="page.body"))
    found = scored(tmp_path, "corpus.parquet")
    assert found["late"].to_pylist() == [None] * 5 + ["x"]
    assert found["page"].to_pylist() == [row["page"] for row in rows]
    assert found["score"].null_count == 0


def test_bad_rows_that_are_skipped_are_counted(tmp_path: Path, student_folder: Path):
    (tmp_path / "corpus.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n[1]\n')
    result = score.run(recipe(tmp_path, tmp_path / "corpus.jsonl", student_folder, skip_bad_rows=True))
    assert (result.n_rows, result.n_scored, result.n_bad_rows) == (3, 1, 2)


def test_hugging_face_reads_the_scored_shards_with_their_features(tmp_path: Path, student_folder: Path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.Dataset.from_dict({"text": ["one", "two"], "kind": [0, 1]}, features=features)
    dataset.to_parquet(str(tmp_path / "corpus.parquet"))
    score.run(recipe(tmp_path, tmp_path / "corpus.parquet", student_folder))
    out = str(tmp_path / "run" / "score" / "scored" / "corpus.parquet")
    back = datasets.load_dataset("parquet", data_files=out, split="train", cache_dir=str(tmp_path / "cache"))
    assert back.features["kind"].names == ["a", "b"]
    assert str(back.features["score"].dtype) == "float32" and str(back.features["int_score"].dtype) == "int8"


def test_trap_16_a_half_written_shard_is_done_again(tmp_path: Path, corpus_folder: Path, student_folder: Path):
    settings = recipe(tmp_path, corpus_folder, student_folder)
    score.run(settings)
    out = tmp_path / "run" / "score" / "scored"
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "part-1.parquet").write_bytes(whole["part-1.parquet"][:-100])
    (out / ".part-2.parquet.123.tmp").write_bytes(b"left by a killed writer")
    (tmp_path / "run" / "score" / "result.json").unlink()
    result = score.run(settings)
    assert result.n_shards_reused == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_trap_16_the_corpus_itself_is_never_touched(tmp_path: Path, corpus_folder: Path, student_folder: Path):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in corpus_folder.iterdir()}
    score.run(recipe(tmp_path, corpus_folder, student_folder))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in corpus_folder.iterdir()} == before


def test_a_shard_added_or_changed_is_said_and_only_it_is_scored(
    tmp_path: Path, corpus_folder: Path, student_folder: Path
):
    settings = recipe(tmp_path, corpus_folder, student_folder)
    score.run(settings)
    pq.write_table(pa.table({"id": ["new"], "text": ["a new text"]}), corpus_folder / "part-9.parquet")
    with pytest.raises(UserError, match=r"shards.part-9.parquet changed from None .* --redo"):
        score.run(settings)
    result = score.run(settings, redo=True)
    assert (result.n_shards, result.n_shards_reused, result.n_rows) == (4, 3, 61)
    (corpus_folder / "part-0.parquet").unlink()
    result = score.run(settings, redo=True)
    assert (result.n_shards, result.n_rows) == (3, 41)
    assert not (tmp_path / "run" / "score" / "scored" / "part-0.parquet").exists()


def test_another_student_scores_everything_again(tmp_path: Path, corpus_folder: Path, student_folder: Path):
    settings = recipe(tmp_path, corpus_folder, student_folder)
    score.run(settings)
    changed = student.load(student_folder)
    (head,) = changed.heads
    (layer,) = head.layers
    changed.heads = (replace(head, layers=(layer._replace(bias=layer.bias + 1),)),)
    changed.save(student_folder)
    with pytest.raises(UserError, match=r"settings.student changed"):
        score.run(settings)
    assert score.run(settings, redo=True).n_shards_reused == 0


def test_a_column_called_score_is_refused_or_replaced_but_never_doubled(tmp_path: Path, student_folder: Path):
    pq.write_table(pa.table({"score": [9.5], "text": ["a text"]}), tmp_path / "corpus.parquet")
    with pytest.raises(UserError, match=r"corpus.parquet already has a column 'score'; set score.replace_existing"):
        score.run(recipe(tmp_path, tmp_path / "corpus.parquet", student_folder))
    score.run(recipe(tmp_path, tmp_path / "corpus.parquet", student_folder, replace_existing=True), redo=True)
    found = scored(tmp_path, "corpus.parquet")
    assert found.schema.names == ["text", "score", "int_score"] and found["score"][0].as_py() != 9.5


@pytest.mark.parametrize("rows", [[], None])
def test_an_empty_corpus_is_refused(tmp_path: Path, student_folder: Path, rows: list | None):
    folder = tmp_path / "corpus"
    folder.mkdir()
    if rows is not None:
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    with pytest.raises(UserError, match=r"corpus.path: .*corpus (has no rows|holds no parquet)"):
        score.run(recipe(tmp_path, folder, student_folder))


def test_a_wrong_column_is_named_with_those_there_are_before_anything_is_scored(
    tmp_path: Path, corpus_folder: Path, student_folder: Path
):
    with pytest.raises(UserError, match=r"has no column 'body'; there are: id, text, meta, good"):
        score.run(recipe(tmp_path, corpus_folder, student_folder, text_column="body"))
    assert not list((tmp_path / "run" / "score" / "scored").glob("*"))


def test_a_damaged_shard_is_named_and_those_before_it_are_kept(
    tmp_path: Path, corpus_folder: Path, student_folder: Path
):
    """The footer is whole, so it is found only while reading."""
    table = pa.table({"text": [f"text {i} " * 50 for i in range(3000)]})
    pq.write_table(table, corpus_folder / "part-5.parquet", compression="none", use_dictionary=False)
    raw = bytearray((corpus_folder / "part-5.parquet").read_bytes())
    raw[4:400] = b"\xff" * 396
    (corpus_folder / "part-5.parquet").write_bytes(raw)
    with pytest.raises(UserError, match=r"part-5.parquet cannot be read as parquet"):
        score.run(recipe(tmp_path, corpus_folder, student_folder))
    out = tmp_path / "run" / "score" / "scored"
    assert sorted(path.name for path in out.iterdir()) == ["part-0.parquet", "part-1.parquet", "part-2.parquet"]


def test_score_says_what_is_missing(tmp_path: Path, corpus_folder: Path):
    with pytest.raises(UserError, match="run gristmill train first"):
        score.run(recipe(tmp_path, corpus_folder, tmp_path).model_copy(update={"score": config.Score()}))
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        score.run(recipe(tmp_path, corpus_folder, tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"is no student"):
        score.run(recipe(tmp_path, corpus_folder, corpus_folder))


def test_windows_of_rows_bound_the_memory_of_a_shard(tmp_path: Path, student_folder: Path, monkeypatch):
    """The encoder never sees more than a window at a time."""
    monkeypatch.setattr(formats, "BATCH_ROWS", 64)
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(300)]}), tmp_path / "corpus.parquet")
    seen: list[int] = []
    original = Encoder.embed

    def watched(self, texts, step):
        seen.append(len(texts))
        return original(self, texts, step)

    monkeypatch.setattr(Encoder, "embed", watched)
    score.run(recipe(tmp_path, tmp_path / "corpus.parquet", student_folder))
    assert seen == [64, 64, 64, 64, 44]


def counts(values: np.ndarray) -> dict[str, int]:
    return {str(value): n for value, n in sorted(Counter(values.tolist()).items())}


def test_both_roundings_are_counted_and_the_students_own_cuts_are_written(
    tmp_path: Path, corpus_folder: Path, tiny_encoder: Path
):
    fitted = make_student(tmp_path / "fitted", tiny_encoder, CUTS)
    result = score.run(recipe(tmp_path, corpus_folder, fitted))
    shards = [scored(tmp_path, f"part-{i}.parquet") for i in range(3)]
    scores = np.concatenate([shard["score"].to_numpy() for shard in shards])
    ints = np.concatenate([shard["int_score"].to_numpy() for shard in shards])
    assert ints.tolist() == np.searchsorted(CUTS, scores, side="right").tolist()
    assert result.int_score_counts == counts(ints)
    half_up = np.clip(np.floor(scores + 0.5), 0, 5).astype(int)
    assert result.half_up_counts == counts(half_up)
    assert result.half_up_counts != result.int_score_counts


def test_all_windows_of_a_document_count_for_its_score(tmp_path: Path, corpus_folder: Path, tiny_encoder: Path):
    folder = make_student(tmp_path / "all", tiny_encoder, windows="all", aggregate="max")
    result = score.run(recipe(tmp_path, corpus_folder, folder))
    assert result.n_truncated == 0 and result.n_windows > 180
    loaded = student.load(folder)
    embedded = loaded.encoder.embed(pq.read_table(corpus_folder / "part-0.parquet")["text"].to_pylist())
    by_window = loaded.heads[0].outputs(embedded.vectors)[:, 0]
    highest = [by_window[embedded.owners == i].max() for i in range(20)]
    np.testing.assert_allclose(scored(tmp_path, "part-0.parquet")["score"].to_numpy(), highest, atol=1e-4)


# -- embeddings -------------------------------------------------------------------------------------------------------


def kept(tmp_path: Path, name: str) -> pa.Table:
    return pq.read_table(tmp_path / "run" / "score" / "embeddings" / name)


def test_embeddings_are_kept_in_the_place_of_their_documents(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    folder = make_student(tmp_path / "spread", tiny_encoder, windows="spread")
    source = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"text": [texts[0], "", texts[1], None, "short"]}), source)
    score.run(recipe(tmp_path, source, folder, keep_embeddings=True))
    found = kept(tmp_path, "corpus.parquet")
    assert found.schema.names == ["embedding"] and found.schema.field(0).type == pa.list_(pa.float16(), 32)
    rows = found["embedding"].to_pylist()
    assert [row is None for row in rows] == [False, True, False, True, False]
    embedded = student.load(folder).encoder.embed([texts[0], texts[1], "short"])
    expected = [embedded.vectors[embedded.owners == i].mean(axis=0) for i in range(3)]
    np.testing.assert_allclose(np.array([rows[0], rows[2], rows[4]], np.float32), expected, atol=2e-3)


def test_a_corpus_of_empty_documents_has_no_score_and_no_embedding(tmp_path: Path, student_folder: Path):
    pq.write_table(pa.table({"text": ["", None, " "]}), tmp_path / "corpus.parquet")
    result = score.run(recipe(tmp_path, tmp_path / "corpus.parquet", student_folder, keep_embeddings=True))
    assert (result.n_scored, result.n_empty, result.n_windows, result.int_score_counts) == (0, 3, 0, {})
    assert kept(tmp_path, "corpus.parquet")["embedding"].to_pylist() == [None, None, None]
    assert scored(tmp_path, "corpus.parquet")["score"].to_pylist() == [None, None, None]


def test_embeddings_are_not_kept_unless_asked_and_old_ones_go(
    tmp_path: Path, corpus_folder: Path, student_folder: Path
):
    settings = recipe(tmp_path, corpus_folder, student_folder, keep_embeddings=True)
    score.run(settings)
    folder = tmp_path / "run" / "score" / "embeddings"
    assert len(list(folder.iterdir())) == 3
    score.run(recipe(tmp_path, corpus_folder, student_folder), redo=True)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("lost", ["embeddings", "scored"])
def test_a_shard_is_done_only_with_its_embeddings(
    tmp_path: Path, corpus_folder: Path, student_folder: Path, lost: str
):
    settings = recipe(tmp_path, corpus_folder, student_folder, keep_embeddings=True)
    score.run(settings)
    out = tmp_path / "run" / "score"
    whole = {path: path.read_bytes() for path in out.glob("*/*.parquet")}
    assert len(whole) == 6
    path = out / lost / "part-1.parquet"
    path.write_bytes(whole[path][:-50])
    assert score.run(settings).n_shards_reused == 2
    assert {path: path.read_bytes() for path in out.glob("*/*.parquet")} == whole
    assert score.run(settings).n_shards_reused == 2, "finished: the result is read, nothing is done again"


def test_hugging_face_reads_kept_embeddings(tmp_path: Path, corpus_folder: Path, student_folder: Path):
    datasets = pytest.importorskip("datasets")
    score.run(recipe(tmp_path, corpus_folder, student_folder, keep_embeddings=True))
    files = str(tmp_path / "run" / "score" / "embeddings" / "*.parquet")
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found.num_rows == 60
    assert np.array(found[0]["embedding"]).tolist() == kept(tmp_path, "part-0.parquet")["embedding"][0].as_py()
