"""What the stages write is read by other tools as it is, and the kept corpus goes to the Hub as a dataset."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_export import TOKEN, StandIn, hub

from pipeline import cli, dataset_card
from pipeline import export as export_
from pipeline.config import Recipe, load_recipe
from pipeline.errors import UserError

__all__ = ["hub"]

PROMPT = (
    "---\nscale: [0, 5]\nread: choices\nanswer_start: This text is\nchoices:\n"
    '  - {value: 5, answers: [" educational"]}\n  - {value: 0, answers: [" spam"]}\n---\n'
    "What kind of text is this?\n\n{{ text }}\n"
)
LABELS = "---\nread: label\nlabels: [Law, Food]\n---\nOne of these:\n{{ labels }}\n\n{{ text }}\n"


class Runs(NamedTuple):
    """Run folders of one corpus: with rewritten documents and parquet, and with scores beside them and JSON lines."""

    whole: Path
    beside: Path
    n_rows: int
    n_empty: int


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tiny_causal: Path, tiny_encoder: Path) -> Runs:
    folder = tmp_path_factory.mktemp("interop")
    (folder / "prompt.md").write_text(PROMPT)
    (folder / "labels.md").write_text(LABELS)
    (folder / "corpus" / "b").mkdir(parents=True)
    rows = [
        {"id": f"doc-{i}", "text": text, "meta": {"lang": "en", "n": i}} for i, text in enumerate([*texts[:60], None])
    ]
    pq.write_table(pa.Table.from_pylist(rows[:40]), folder / "corpus" / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[40:]), folder / "corpus" / "b" / "c.parquet")
    on_cpu = {"dtype": "float32", "device": "cpu"}
    recipe: dict[str, Any] = {
        "run_folder": str(folder / "whole"),
        "corpus": {"path": str(folder / "corpus"), "id_column": "id"},
        "teacher": {"model": str(tiny_causal), "document_tokens": 64, **on_cpu},
        "encoder": {"model": str(tiny_encoder), "max_tokens": 64, **on_cpu},
        "rate": {"prompt": str(folder / "prompt.md"), "sample": 50},
        "label": {"prompt": str(folder / "labels.md"), "sample": 10, "max_unscored_rate": 1},
        "filter": {"keep_share": 0.3, "keep_dropped": True},
        "export": {"formats": []},
    }
    student = str(folder / "whole/train/student")
    other = {"score": {"student": student, "sidecar": True}, "export": {"student": student, "formats": []}}
    aside = {"filter": {"keep_share": 0.3, "keep_dropped": True, "output_format": "jsonl"}}
    run(folder / "whole.yaml", recipe, "rate", "train", "score", "filter", "label")
    run(folder / "beside.yaml", {**recipe, **other, **aside, "run_folder": str(folder / "beside")}, "score", "filter")
    return Runs(folder / "whole", folder / "beside", len(rows), 1)


def run(path: Path, recipe: dict[str, Any], *stages: str) -> None:
    """Each stage by its command."""
    path.write_text(json.dumps(recipe))
    for stage in stages:
        with pytest.raises(SystemExit) as stop:
            cli.main([stage, str(path)])
        assert not stop.value.code, stage


def result(folder: Path, stage: str = "filter") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / stage / "result.json").read_text())
    return found


def loaded(kind: str, cache: Path, *files: Path) -> datasets.Dataset:
    """Files as `datasets` reads them."""
    return datasets.load_dataset(kind, data_files=list(map(str, files)), cache_dir=str(cache), split="train")


def files(folder: Path, suffix: str = "parquet") -> list[Path]:
    return sorted(folder.rglob(f"*.{suffix}"))


# -- Hugging Face datasets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["rate/ratings.parquet", "label/labels.parquet", "train/predictions.parquet"])
def test_datasets_reads_what_the_stages_learned_from(runs: Runs, tmp_path: Path, table: str):
    found = loaded("parquet", tmp_path, runs.whole / table)
    expected = pq.read_table(runs.whole / table)
    assert found.column_names == expected.column_names
    assert found.to_list() == expected.to_pylist()


def test_datasets_reads_scored_shards_with_the_types_of_the_columns(runs: Runs, tmp_path: Path):
    found = loaded("parquet", tmp_path, *files(runs.whole / "score" / "scored"))
    assert len(found) == runs.n_rows
    kinds = {name: found.features[name].dtype for name in ("id", "text", "score", "int_score")}
    assert kinds == {"id": "string", "text": "string", "score": "float32", "int_score": "int8"}
    assert found.features["meta"] == {"lang": datasets.Value("string"), "n": datasets.Value("int64")}
    assert [row["id"] for row in found if row["score"] is None] == ["doc-60"]


def test_datasets_reads_scores_that_lie_beside_the_documents(runs: Runs, tmp_path: Path):
    found = loaded("parquet", tmp_path, *files(runs.beside / "score" / "scored"))
    whole = loaded("parquet", tmp_path, *files(runs.whole / "score" / "scored"))
    assert set(found.column_names) == {"id", "score", "int_score"} and len(found) == runs.n_rows
    assert found["id"][:] == whole["id"][:] and found["int_score"][:] == whole["int_score"][:]


def test_datasets_reads_the_kept_corpus_in_both_formats_alike(runs: Runs, tmp_path: Path):
    kept = loaded("parquet", tmp_path, *files(runs.whole / "filter" / "kept"))
    lines = loaded("json", tmp_path, *files(runs.beside / "filter" / "kept", "jsonl"))
    assert len(kept) == len(lines) == result(runs.whole)["n_kept"] > 0
    assert kept["id"][:] == lines["id"][:] and kept["meta"][:] == lines["meta"][:]
    assert kept["score"][:] == pytest.approx(lines["score"][:])


def test_datasets_reads_what_was_dropped_with_its_reasons(runs: Runs, tmp_path: Path):
    dropped = loaded("parquet", tmp_path, *files(runs.whole / "filter" / "dropped"))
    reasons = dropped["dropped_reason"][:]
    assert {reason: reasons.count(reason) for reason in set(reasons)} == result(runs.whole)["dropped"]


# -- DuckDB and Polars ------------------------------------------------------------------------------------------------


def test_duckdb_reads_scored_shards_by_a_glob(runs: Runs):
    shards = runs.whole / "score" / "scored" / "**" / "*.parquet"
    rows = duckdb.sql(f"select id, score, int_score from '{shards}'")
    assert dict(zip(rows.columns, map(str, rows.types), strict=True)) == {
        "id": "VARCHAR",
        "score": "FLOAT",
        "int_score": "TINYINT",
    }
    [counts] = duckdb.sql(f"select count(*), count(score), count(int_score) from '{shards}'").fetchall()
    assert counts == (runs.n_rows, runs.n_rows - runs.n_empty, runs.n_rows - runs.n_empty)


def test_duckdb_chooses_what_filter_chose(runs: Runs):
    shards, cut = runs.whole / "score" / "scored" / "**" / "*.parquet", result(runs.whole)["cut"]
    ids = duckdb.sql(f"select id from '{shards}' where score >= {cut}::float").fetchall()
    kept = duckdb.sql(f"select id from '{runs.whole / 'filter' / 'kept' / '**' / '*.parquet'}'").fetchall()
    assert sorted(ids) == sorted(kept) and len(kept) == result(runs.whole)["n_kept"]


def test_duckdb_joins_documents_with_the_scores_beside_them(runs: Runs):
    documents = runs.whole.parent / "corpus" / "**" / "*.parquet"
    scores = runs.beside / "score" / "scored" / "**" / "*.parquet"
    [row] = duckdb.sql(f"select count(*) from '{documents}' join '{scores}' using (id)").fetchall()
    assert row == (runs.n_rows,)


def test_polars_reads_scored_shards_and_kept_rows(runs: Runs):
    found = polars.read_parquet(runs.whole / "score" / "scored" / "**" / "*.parquet")
    assert (found.schema["score"], found.schema["int_score"]) == (polars.Float32, polars.Int8)
    assert found["score"].null_count() == found["int_score"].null_count() == runs.n_empty
    kept = polars.scan_parquet(runs.whole / "filter" / "kept" / "**" / "*.parquet").collect()
    assert kept.height == result(runs.whole)["n_kept"]
    assert kept["score"].min() == pytest.approx(result(runs.whole)["cut"])


# -- the Hub ----------------------------------------------------------------------------------------------------------


def export(recipe: Path, endpoint: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command itself, with a token in its environment."""
    known = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "pipeline", "export", str(recipe), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **known})


@pytest.mark.parametrize("name", ["whole", "beside"])
def test_the_kept_corpus_goes_to_the_hub_as_a_dataset_that_loads(runs: Runs, hub: StandIn, tmp_path: Path, name: str):
    done = export(runs.whole.parent / f"{name}.yaml", hub.url, "--push-kept-to-hub", "me/kept")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["export"]
    assert found["kept_pushed_to"] and found["pushed_to"] is None
    [made] = hub.created
    assert made["type"] == "dataset" and (made.get("private") or made.get("visibility") == "private")
    assert {path for path in hub.asked if "/commit/" in path} == {"/api/datasets/me/kept/commit/main"}
    received(hub, tmp_path / "received")
    rows = datasets.load_dataset(str(tmp_path / "received"), cache_dir=str(tmp_path / "cache"), split="train")
    kept = pq.read_table(runs.whole / "filter" / "kept").to_pylist()
    assert [(row["id"], row["text"]) for row in rows] == [(row["id"], row["text"]) for row in kept]
    assert not [
        place for place in (str(runs.whole.parent), TOKEN, hub.url) if place in hub.files["README.md"].decode()
    ]


def received(hub: StandIn, folder: Path) -> None:
    """Write what the stand-in was given."""
    for name, raw in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def test_the_dataset_card_says_how_it_was_made(runs: Runs, tmp_path: Path):
    recipe = load_recipe(runs.whole.parent / "whole.yaml", {})
    dataset_card.write(tmp_path, runs.whole / "filter" / "kept", recipe, "me/kept")
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    told, known = yaml.safe_load(front), result(runs.whole)
    assert told["size_categories"] == ["n<1K"] and told["license"] == "other" and "gristmill" in told["tags"]
    assert told["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/**"}]}]
    assert f"{known['n_kept']:,} of {known['n_rows']:,} documents" in body
    assert all(f"| dropped: {reason} | {n:,} |" in body for reason, n in known["dropped"].items())
    assert "| `score` | float |" in body and "| `int_score` | int8 |" in body
    assert "`prompt.md` (digest `" in body and "keep_share: 0.3" in body and "Spearman" in body
    assert "/tmp" not in body and str(runs.whole.parent) not in body


def test_without_a_kept_corpus_nothing_is_uploaded(runs: Runs, tmp_path: Path):
    given = {"student": runs.whole / "train" / "student", "formats": [], "push_kept_to_hub": "me/kept"}
    with pytest.raises(UserError, match="run gristmill filter first"):
        export_.run(Recipe.model_validate({"run_folder": tmp_path, "export": given}))


def test_a_dataset_that_the_hub_refuses_is_one_line(runs: Runs, hub: StandIn):
    hub.refuse = 403
    done = export(runs.whole.parent / "whole.yaml", hub.url, "--push-kept-to-hub", "me/kept")
    assert done.returncode == 1 and "Traceback" not in done.stderr and TOKEN not in done.stderr
    assert "export.push_kept_to_hub" in done.stderr and "refused me/kept (403 you may not)" in done.stderr


def test_a_dataset_name_that_cannot_be_is_refused_first(tmp_path: Path):
    with pytest.raises(UserError, match=r"export.push_kept_to_hub: kept is no repository; give owner/name"):
        export_.run(Recipe.model_validate({"run_folder": tmp_path, "export": {"push_kept_to_hub": "kept"}}))


@pytest.mark.parametrize(
    ("n", "size"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**14, "n>10B")]
)
def test_sizes_have_the_names_of_the_hub(n: int, size: str):
    assert dataset_card.size(n) == size
