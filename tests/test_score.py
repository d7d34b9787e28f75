import json
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis.strategies import booleans, integers, lists, sampled_from

from pipeline import config, corpus, formats, score, shards, student, summary
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
    names = ("text_column", "id_column", "skip_bad_rows")
    of_corpus = {name: settings.pop(name) for name in names if name in settings}
    of_encoder = {name: settings.pop(name) for name in ("workers",) if name in settings}
    return config.Recipe.model_validate(
        {
            "run_folder": tmp_path / "run",
            "corpus": {"path": str(corpus_path), **of_corpus},
            "encoder": {"dtype": "float32", "device": "cpu", **of_encoder},
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
    result = score.run(settings)
    assert (result.n_shards, result.n_shards_reused, result.n_rows) == (4, 3, 61)
    (corpus_folder / "part-0.parquet").unlink()
    with pytest.raises(UserError, match=r"gone since .*: part-0.parquet; put back .* --redo"):
        score.run(settings)
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


def test_settings_of_a_cascade_change_nothing_without_one(tmp_path: Path, corpus_folder: Path, student_folder: Path):
    done = score.run(recipe(tmp_path, corpus_folder, student_folder))
    assert score.run(recipe(tmp_path, corpus_folder, student_folder, cascade_recall=0.5, cascade_sample=7)) == done


def test_another_way_to_compute_is_named(tmp_path: Path, corpus_folder: Path, student_folder: Path):
    settings = recipe(tmp_path, corpus_folder, student_folder)
    score.run(settings)
    exact = settings.model_copy(update={"encoder": config.Encoder(dtype="float32", device="cpu", engine="exact")})
    with pytest.raises(UserError, match=r"settings.encoder.engine changed from 'packed' to 'exact'"):
        score.run(exact)


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


# -- one stream of work -----------------------------------------------------------------------------------------------


def write_shards(folder: Path, shards: list[list[str]]) -> Path:
    folder.mkdir(parents=True)
    for i, texts in enumerate(shards):
        ids = [f"{i}-{j}" for j in range(len(texts))]
        pq.write_table(pa.table({"id": ids, "text": pa.array(texts, pa.string())}), folder / f"part-{i}.parquet")
    return folder


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that an encoder computes from now on."""
    found: list[str] = []
    original = Encoder.embed_unit

    def watched(self, texts):
        if texts != ["a"]:  # Encoder.dim asks for one embedding
            found.extend(texts)
        return original(self, texts)

    monkeypatch.setattr(Encoder, "embed_unit", watched)
    return found


FEW_TEXTS = [*(f"text {'long ' * i}{i}" for i in range(12)), "", "  "]


@trials(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=lists(lists(sampled_from(FEW_TEXTS), max_size=9), min_size=2, max_size=4),
    workers=integers(1, 5),
    unit_texts=integers(1, 5),
    batch_rows=integers(1, 9),
    sidecar=booleans(),
)
def test_scores_depend_neither_on_workers_and_units_nor_on_texts_around_nor_is_a_text_computed_twice(
    saved_student: Path, computed: list[str], shards, workers: int, unit_texts: int, batch_rows: int, sidecar: bool
):
    """To the last bit, as if each text were the only one."""
    alone = student.load(saved_student, config.Encoder(dtype="float32", device="cpu"))
    expected = {text: alone.score([text])[0] for text in FEW_TEXTS if text.strip()}
    computed.clear()
    given = [[*FEW_TEXTS[:2], *shard] for shard in shards]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "unit_texts", unit_texts)
        patch.setattr(formats, "BATCH_ROWS", batch_rows)
        source = write_shards(Path(folder) / "corpus", given)
        found = recipe(Path(folder), source, saved_student, sidecar=sidecar, workers=workers)
        result = score.run(found)
        made = [scored(Path(folder), f"part-{i}.parquet") for i in range(len(given))]
    for texts, of_shard in zip(given, made, strict=True):
        assert of_shard["score"].to_pylist() == [expected.get(text) for text in texts]
    full = [text for shard in given for text in shard if text.strip()]
    assert Counter(computed) == Counter(set(full))
    assert result.n_duplicates == len(full) - len(set(full))
    assert (result.n_scored, result.n_empty) == (len(full), sum(map(len, given)) - len(full))


@pytest.mark.parametrize("engine", ["packed", "plain", "exact"])
def test_a_resumed_run_writes_the_bytes_of_a_whole_one(
    tmp_path: Path, tiny_encoder: Path, texts: list[str], computed: list[str], engine: str
):
    """With padding embeddings depend on the texts beside them, so texts are shared within a shard only."""
    folder = make_student(tmp_path / "student", tiny_encoder, engine=engine)
    source = write_shards(tmp_path / "corpus", [[*texts[:9], texts[3]], [*texts[4:20], texts[5]], texts[15:40]])
    found = recipe(tmp_path, source, folder, keep_embeddings=True)
    shared = 2 if engine == "plain" else 2 + 5 + 5
    assert score.run(found).n_duplicates == shared
    assert len(computed) == 10 + 17 + 25 - shared
    out = tmp_path / "run" / "score"
    whole = {path: path.read_bytes() for path in out.glob("*/*.parquet")}
    for path in out.glob("*/part-1.parquet"):
        path.unlink()
    result = score.run(found)
    assert (result.n_shards_reused, result.n_duplicates) == (2, 1)
    assert {path: path.read_bytes() for path in out.glob("*/*.parquet")} == whole


def test_no_shard_before_the_one_that_cannot_be_read_is_lost(tmp_path: Path, student_folder: Path):
    """All of them are still at work when reading fails."""
    source = write_shards(tmp_path / "corpus", [[f"text {i}"] for i in range(5)])
    raw = bytearray((source / "part-4.parquet").read_bytes())
    raw[4:30] = b"\xff" * 26
    (source / "part-4.parquet").write_bytes(raw)
    with pytest.raises(UserError, match=r"part-4.parquet cannot be read as parquet"):
        score.run(recipe(tmp_path, source, student_folder, workers=4))
    there = sorted(path.name for path in (tmp_path / "run" / "score" / "scored").iterdir())
    assert there == [f"part-{i}.parquet" for i in range(4)]
    assert not (tmp_path / "run" / "score" / "seen.sqlite").exists()


def test_the_result_says_how_fast_it_went_and_where_the_time_went(
    tmp_path: Path, corpus_folder: Path, student_folder: Path
):
    settings = recipe(tmp_path, corpus_folder, student_folder)
    result = score.run(settings)
    assert list(result.time_shares) == ["reading", "tokenising", "computing", "writing"]
    assert sum(result.time_shares.values()) == pytest.approx(1) and min(result.time_shares.values()) > 0
    assert (result.n_tokens, result.padding_share, result.n_duplicates) == (60 * 64, 0, 0)
    assert result.tokens_per_s == pytest.approx(64 * result.docs_per_s)
    told = summary.tell_score(result.model_dump())
    assert "docs/s" in told and "padding 0%; reading " in told
    (tmp_path / "run" / "score" / "result.json").unlink()
    again = score.run(settings)
    assert (again.docs_per_s, again.n_tokens, again.time_shares, again.n_scored) == (None, 0, {}, 60)
    assert "docs/s" not in summary.tell_score(again.model_dump())


# -- scores alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_sidecar_holds_ids_and_scores_alone_and_reads_as_the_whole_documents(
    tmp_path: Path, student_folder: Path, texts: list[str], form: str
):
    rows = [{"id": i, "text": text, "meta": {"n": i}} for i, text in enumerate([*texts[:5], "", "more"])]
    rows[3]["id"] = None
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = recipe(tmp_path, tmp_path / f"a.{form}", student_folder, sidecar=True, id_column="id")
    score.run(settings)
    found = scored(tmp_path, "a.parquet")
    assert found.schema.names == ["id", "score", "int_score"]
    assert found["id"].to_pylist() == ["0", "1", "2", corpus.text_id(texts[3]), "4", "5", "6"]
    whole = settings.model_copy(
        update={"run_folder": tmp_path / "whole", "score": config.Score(student=student_folder)}
    )
    score.run(whole)
    of_scores = config.Corpus(path=str(tmp_path / "run" / "score" / "scored"))
    (shard,) = [shards.with_documents(shard) for shard in shards.find_shards(of_scores)]
    read = pa.Table.from_batches(corpus.read(shard, of_scores, shards.Counts()))
    assert read.to_pylist() == pq.read_table(tmp_path / "whole" / "score" / "scored" / "a.parquet").to_pylist()


def test_only_text_and_id_are_read_for_a_sidecar(tmp_path: Path, student_folder: Path, monkeypatch):
    table = pa.table({"id": ["a"], "page": [{"body": "one text", "html": "<p>"}], "other": [1]})
    pq.write_table(table, tmp_path / "corpus.parquet")
    asked: list[list[str]] = []
    original = pq.ParquetFile.iter_batches

    def watched(self, *given, columns=None, **more):
        asked.append(columns)
        return original(self, *given, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    score.run(recipe(tmp_path, tmp_path / "corpus.parquet", student_folder, sidecar=True, text_column="page.body"))
    assert asked == [["page.body"]]
    assert scored(tmp_path, "corpus.parquet")["id"].to_pylist() == [corpus.text_id("one text")]


def test_a_shard_without_ids_is_named_before_a_sidecar_is_begun(
    tmp_path: Path, corpus_folder: Path, student_folder: Path
):
    pq.write_table(pa.table({"text": ["one text"]}), corpus_folder / "part-5.parquet")
    with pytest.raises(UserError, match=r"part-5.parquet has no column 'id'; there are: text"):
        score.run(recipe(tmp_path, corpus_folder, student_folder, sidecar=True, id_column="id"))
    assert not list((tmp_path / "run" / "score" / "scored").glob("*"))


def test_a_sidecar_says_which_documents_it_belongs_to(
    tmp_path: Path, corpus_folder: Path, student_folder: Path, monkeypatch
):
    monkeypatch.chdir(corpus_folder.parent)
    score.run(recipe(tmp_path, Path(corpus_folder.name), student_folder, sidecar=True))
    note = json.loads(pq.read_metadata(tmp_path / "run/score/scored/part-1.parquet").metadata[shards.BESIDE])
    (shard,) = [shard for shard in shards.find_shards(config.Corpus(path=str(corpus_folder))) if "1" in shard.name]
    assert note["corpus"] == config.Corpus(path=str(corpus_folder)).model_dump(mode="json")
    assert note["shard"] == shard._asdict() and note["made_from"] == shards.fingerprint(shard)


# -- several students -------------------------------------------------------------------------------------------------


def other_student(folder: Path, encoder: Path, **values: object) -> Path:
    """A score and a label; with `max_tokens` the same texts are read otherwise."""
    numbers = np.random.default_rng(1)
    layers = [Layer(numbers.normal(size=(n, 32)).astype(np.float32), np.zeros(n, np.float32)) for n in (1, 3)]
    heads = (
        Head("score", "score", layers[:1], (0, 5)),
        Head("topic", "label", layers[1:], labels=("art", "law", "tax")),
    )
    settings = {"model": str(encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu", **values}
    Student(config.Encoder.model_validate(settings), heads).save(folder)
    return folder


@pytest.mark.parametrize(("values", "n_passes"), [({}, 1), ({"max_tokens": 32}, 2), ({"windows": "all"}, 2)])
def test_several_students_give_what_each_gives_alone_and_share_an_encoder_that_is_the_same(
    tmp_path: Path,
    corpus_folder: Path,
    student_folder: Path,
    tiny_encoder: Path,
    computed: list[str],
    values,
    n_passes,
):
    other = other_student(tmp_path / "other", tiny_encoder, **values)
    result = score.run(recipe(tmp_path, corpus_folder, student_folder, more_students=[f"da={other}"]))
    assert len(computed) == 60 * n_passes
    added = ["score", "int_score", "score_da", "int_score_da", "topic_da", "topic_probability_da"]
    found = scored(tmp_path, "part-0.parquet")
    assert found.schema.names == ["id", "text", "meta", "good", *added]
    for name, folder in (("", student_folder), ("_da", other)):
        of_it = student.load(folder, config.Encoder(dtype="float32", device="cpu"))
        expected = of_it.predict(found["text"].to_pylist())
        for column, values_alone in expected.items():
            assert found[column + name].to_pylist() == values_alone.tolist()
    assert sum(result.int_score_counts.values()) == sum(result.label_counts["topic_da"].values()) == 60


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["da"], r"score.more_students: 'da' is not NAME=FOLDER, such as"),
        (["=x"], r"score.more_students: '=x' is not NAME=FOLDER, such as"),
        (["d-a={student}"], r"is not NAME=FOLDER, .*; a name has letters, digits and _ only"),
        (["da=nowhere"], r"score.more_students: nowhere does not exist; give the folder of a student"),
        (["da={student}", "da={student}"], r"score.more_students: da is there twice"),
        (["da={corpus}"], r"is no student"),
        (["da={clash}"], r"score.more_students: two columns would be called score_da; give another name"),
    ],
)
def test_students_that_cannot_be_are_refused_in_one_line(
    tmp_path: Path, corpus_folder: Path, student_folder: Path, tiny_encoder: Path, given: list[str], message: str
):
    folders = {"student": student_folder, "corpus": corpus_folder, "clash": tmp_path / "clash"}
    layer = (Layer(np.ones((1, 32), np.float32), np.zeros(1, np.float32)),)
    heads = (Head("score", "score", layer, (0, 5)), Head("score_da", "score", layer, (0, 5)))
    settings = config.Encoder(model=str(tiny_encoder), max_tokens=64, dtype="float32", device="cpu")
    Student(settings, heads[1:] if "{clash}" not in given[0] else heads).save(tmp_path / "clash")
    first = tmp_path / "clash" if "{clash}" in given[0] else student_folder
    more = [text.format(**folders) for text in given]
    with pytest.raises(UserError, match=message):
        score.run(recipe(tmp_path, corpus_folder, first, more_students=more))


def test_another_student_beside_the_first_scores_everything_again(
    tmp_path: Path, corpus_folder: Path, student_folder: Path, tiny_encoder: Path
):
    other = other_student(tmp_path / "other", tiny_encoder)
    settings = recipe(tmp_path, corpus_folder, student_folder, more_students=[f"da={other}"])
    score.run(settings)
    other_student(tmp_path / "other", tiny_encoder, windows="all")
    with pytest.raises(UserError, match=r"settings.more_students.da changed"):
        score.run(settings)


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
