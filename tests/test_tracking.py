"""The run folder's metrics, and the dashboards beside them: real trackers, offline."""

import io
import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cli, config, dashboards, tracking
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.tracking import Result, stage
from pipeline.trials import Trial

ROOT = Path(__file__).parent.parent
STAGES = ("tune", "rate", "train", "score", "report")
ROWS = [
    {
        "id": f"d{i}",
        "text": f"text {i} <b>",
        "score": float(i % 6),
        "reason": None,
        "opinions": [{"answer": f"says {i}"}],
    }
    for i in range(60)
]


TRIAL_COLUMNS = [
    "trial",
    "state",
    "value",
    "auc",
    "usd_per_1000",
    "prompt",
    "stop",
    "temperature",
    "reason",
    "seconds",
]


class Counted(Result):
    objective: str
    n_documents: int
    figures: dict[str, float]


def made(tmp_path: Path, **tracking: Any) -> Recipe:
    """A run folder with trials, ratings, a scored corpus, a student and a page."""
    run = tmp_path / "my run"
    for name in ("tune", "rate", "score/scored", "train/student", "report"):
        (run / name).mkdir(parents=True)
    opinion = pa.struct({"answer": pa.string()})
    schema = pa.schema(
        {
            "id": pa.string(),
            "text": pa.string(),
            "score": pa.float64(),
            "reason": pa.string(),
            "opinions": pa.list_(opinion),
        }
    )
    pq.write_table(pa.Table.from_pylist(ROWS, schema), run / "rate/ratings.parquet")
    scored = {"text": [row["text"] for row in ROWS], "score": [row["score"] for row in ROWS]}
    table = pa.table({**scored, "int_score": pa.array([int(score) for score in scored["score"]], pa.int8())})
    pq.write_table(table, run / "score/scored/a.parquet")
    trials = [
        Trial(-1, {}, "complete", 0.4, {"auc": 0.4, "usd_per_1000": None}),
        Trial(0, {"prompt": "prompts/edu-en.md", "stop": ["\n", "<b>"]}, "complete", 0.6, {"auc": 0.6}, None, 3.5),
        Trial(1, {"temperature": 0.7}, "failed", None, {}, "no document has a score"),
    ]
    (run / "tune/trials.jsonl").write_text("".join(json.dumps(trial._asdict()) + "\n" for trial in trials))
    (run / "tune/best.yaml").write_text("rate: {prompt: edu-en-tuned.md}")
    (run / "tune/edu-en-tuned.md").write_text("What is this? {{ text }}")
    (run / "train/student/student.json").write_text('{"a": "student"}')
    (run / "report/report.html").write_text("<!doctype html><p>the page")
    return Recipe(run_folder=run, tracking=config.Tracking(**tracking))


def finish(recipe: Recipe, name: str) -> Counted:
    """One stage of no work."""
    with stage(name, recipe, {}) as work:
        return work.finish(Counted(seconds=1.0, objective="auc", n_documents=7, figures={"spearman": 0.5}))


def logged_by_wandb(run_folder: Path) -> dict[str, tuple[bytes, Path]]:
    """What each stage's offline run holds, and its folder; wandb writes from another process, so wait for it."""
    end = time.monotonic() + 30
    while True:
        logs = [
            (next(folder.glob("run-*.wandb")).read_bytes(), folder) for folder in run_folder.glob("wandb/offline-*")
        ]
        found = {name: log for log in logs for name in STAGES if f"my run-{name}".encode() in log[0]}
        if len(found) == len(STAGES) or time.monotonic() > end:
            return found
        time.sleep(0.1)


def test_without_a_tracker_the_numbers_are_in_metrics_jsonl_and_nowhere_else(tmp_path: Path):
    recipe = made(tmp_path)
    before = {path.name for path in recipe.run_folder.iterdir()}
    finish(recipe, "rate")
    line = json.loads((recipe.run_folder / "metrics.jsonl").read_text())
    assert (line["stage"], line["n_documents"], line["figures.spearman"]) == ("rate", 7, 0.5)
    assert {path.name for path in recipe.run_folder.iterdir()} - before == {"metrics.jsonl"}


def test_wandb_offline_gets_numbers_trials_examples_student_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    recipe = made(tmp_path, to="wandb", project="mine")
    for name in STAGES:
        finish(recipe, name)
    found = logged_by_wandb(recipe.run_folder)
    assert {name: b"mine" in log and b"figures.spearman" in log for name, (log, _) in found.items()} == dict.fromkeys(
        STAGES, True
    )
    assert b"examples" in found["score"][0] and b"my-run-student" in found["train"][0]
    [table] = found["rate"][1].rglob("*.table.json")
    answers = json.loads(table.read_text())
    assert answers["columns"] == ["id", "score", "reason", "text", "answer"] and len(answers["data"]) == 48
    [table] = found["tune"][1].rglob("*.table.json")
    trials = json.loads(table.read_text())
    assert trials["columns"] == TRIAL_COLUMNS and [row[0] for row in trials["data"]] == ["defaults", "0", "1"]
    assert trials["data"][1][2:7] == [0.6, 0.6, None, "edu-en", '["\\n", "<b>"]']
    assert b"my-run-best" in found["tune"][0] and b"my-run-edu-en-tuned" in found["tune"][0]
    assert b"my-run-report" in found["report"][0]
    [page] = found["report"][1].rglob("*.html")
    assert "the page" in page.read_text()


def test_trackio_on_this_machine_gets_numbers_trials_examples_and_student(tmp_path: Path):
    """In a process of its own, as Trackio reads where it keeps things when it is imported."""
    pytest.importorskip("trackio")
    recipe = made(tmp_path, to="trackio", project="mine")
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_tracking\n"
        "from pipeline.config import Recipe; recipe = Recipe.model_validate_json(sys.argv[1])\n"
        "for name in ('tune', 'rate', 'train', 'report'): test_tracking.finish(recipe, name)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO")}
    environment |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", code, recipe.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "did not take" not in done.stderr
    with sqlite3.connect(tmp_path / "trackio/mine.db") as file:
        logged = [json.loads(row[0]) for row in file.execute("SELECT metrics FROM metrics ORDER BY id")]
    file.close()
    assert any(line.get("train/figures.spearman") == 0.5 for line in logged)
    assert any("rate/examples" in line for line in logged) and any("tune/trials" in line for line in logged)
    blobs = [path.read_bytes() for path in (tmp_path / "trackio/artifacts").rglob("*") if path.is_file()]
    assert b"rate: {prompt: edu-en-tuned.md}" in blobs and b"What is this? {{ text }}" in blobs
    assert b'{"a": "student"}' in blobs and b"<!doctype html><p>the page" in blobs


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("no network\nmore"), KeyError("run")])
def test_a_tracker_that_fails_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
):
    wandb = pytest.importorskip("wandb")

    def down(**_: object) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", down)
    recipe = made(tmp_path, to="wandb")
    with caplog.at_level(logging.WARNING, "gristmill"):
        assert finish(recipe, "rate").n_documents == 7
    assert "rate: wandb did not take everything" in caplog.text and "more" not in caplog.messages[0].split("(")[1]
    assert (recipe.run_folder / "rate/result.json").exists()


def test_a_tracker_that_is_not_installed_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        UserError, match=r'trackio is not installed; in your clone run: pip install -e "\.\[trackio\]"'
    ):
        finish(made(tmp_path, to="trackio"), "rate")


def test_examples_go_from_one_end_of_the_score_to_the_other(tmp_path: Path):
    from pipeline import examples

    scores = [row["score"] for row in examples.rated(made(tmp_path).run_folder, 12)]
    assert scores == sorted(scores) and (scores[0], scores[-1], len(scores)) == (0.0, 5.0, 12)


def test_names_of_artifacts_suit_both_trackers():
    assert dashboards.safe("läufe/demo 1-student") == "l-ufe-demo-1-student"


# -- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "beside", "told"),
    [
        (None, "", "30 documents, 10.0 docs/s"),
        (90, "", "30 of 90 documents, 10.0 docs/s, 6 s left"),
        (90, "4.1k tokens/s, padding 0%", "30 of 90 documents, 10.0 docs/s, 4.1k tokens/s, padding 0%, 6 s left"),
    ],
)
def test_pace_is_told_in_words(total: int | None, beside: str, told: str):
    assert tracking.pace(30, total, 3, beside) == told


def test_slow_steps_are_told_in_seconds_and_those_done_before_are_no_part_of_the_speed():
    assert tracking.pace(5, 10, 100, "loss 2.1", "steps") == "5 of 10 steps, 20 s each, loss 2.1, 100 s left"
    assert tracking.pace(60, 100, 5, "", "steps", 50) == "60 of 100 steps, 2.0 steps/s, 20 s left"
    assert tracking.pace(50, 100, 5, "", "steps", 50) == "50 of 100 steps, 0.0 steps/s"


def test_progress_is_plain_lines_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(tracking, "EVERY_S", 0)
    with caplog.at_level(logging.INFO, "gristmill"), tracking.progress("score", 4, lambda _: "2 tokens/s") as step:
        step(1)
        step(3)
    first, last = caplog.messages
    assert first.startswith("score: 1 of 4 documents, ") and "docs/s, 2 tokens/s, " in first
    assert last.startswith("score: 4 of 4 documents, ") and last.endswith(", 0 s left")


def test_what_several_steps_tell_of_a_machine_is_told_once():
    is_new = cli.said_once()
    lines = [logging.makeLogRecord({"msg": words}) for words in ("device: cpu", "rate: done", "device: cpu")]
    assert [is_new(line) for line in lines] == [True, True, False]


def test_progress_is_quiet_before_there_is_something_to_say(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "gristmill"), tracking.progress("score", 4) as step:
        step(4)
    assert not caplog.messages


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    with tracking.progress("score", 4, lambda _: "2 tokens/s") as step:
        step(1)
        step(3)
    assert "4/4 documents" in terminal.getvalue() and " docs/s, 2 tokens/s" in terminal.getvalue()
    with tracking.progress("prepare", None, unit="rows", already=5) as step:
        step(2)
    assert "7 rows" in terminal.getvalue() and "None" not in terminal.getvalue()


def test_a_bar_within_the_work_of_another_stands_below_it(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    with tracking.progress("prove", 2, unit="trainings") as outer:
        for _ in range(2):
            with tracking.progress("prove", 4, lambda _: "loss 2.0", "steps") as inner:
                inner(3)
                tracking.SHOWN[0].refresh()
            outer(1)
    assert "3/4 steps" in terminal.getvalue() and "2/2 trainings" in terminal.getvalue()
    assert tracking.SHOWN == []
