"""What people see of trained language models: sections of the page, its verdict, the terminal, the dashboards."""

import base64
import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_report import Page

from pipeline import cli, config, report, summary, training_charts, training_page, verdict
from pipeline import show as reader
from pipeline.cli import Selection
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.tracking import Result, stage

ROOT = Path(__file__).parent.parent

HOSTILE = (
    "</pre></details><script>alert(1)</script> {{ 7 * 7 }} [red]<img src=x onerror=alert(2)> \x1b[31m \u202egnirts"
)
WARNING = "The reward rose and the teacher's score did not"
BETTER = "Better: the teacher's mean score rose from 2.3 to 4.7 of 5 on 8 held-out prompts, +2.4 (95% 2.0 to 2.8)"
FINETUNED: dict[str, Any] = {
    "seconds": 300.0,
    "model": f"tiny {HOSTILE}",
    "n_documents": 500,
    "n_trained_on": 450,
    "n_held_out": 50,
    "n_steps": 60,
    "tokens_per_s": 512.3,
    "perplexity_before": 23.41,
    "perplexity_after": 19.87,
    "bits_per_byte_before": 1.1312,
    "bits_per_byte_after": 1.0714,
    "gain": 0.0598,
    "gain_interval": [0.051, 0.068],
    "sentence": "Better: 1.071 against 1.131 bits per byte on 50 documents held out",
}
PROVED: dict[str, Any] = {
    "seconds": 700.0,
    "model": "from scratch",
    "n_parameters": 2_600_000,
    "tokens": 1_000_000,
    "n_steps": 122,
    "n_seeds": 3,
    "trusted": f"books {HOSTILE}",
    "n_trusted": 200,
    "arms": {
        name: {
            "n_documents": n,
            "n_tokens": n * 600,
            "epochs": 1.2 if name == "kept" else 0.4,
            "bits_per_byte": mean,
            "interval": [mean - 0.02, mean + 0.02],
            "by_seed": [mean - 0.01, mean, mean + 0.01],
            "curve": [{"tokens": n * 125_000, "bits_per_byte": mean + 1 / n} for n in range(1, 9)],
        }
        for name, n, mean in (("kept", 1652, 2.0512), ("random", 5505, 2.1009), ("rejected", 3853, 2.1503))
    },
    "comparisons": [
        {"better": "kept", "than": "random", "gain": 0.0497, "interval": [0.03, 0.07], "sentence": "Kept is better."},
        {"better": "kept", "than": "rejected", "gain": 0.0991, "interval": [0.08, 0.12], "sentence": "Kept is best."},
    ],
    "tasks": [
        {"task": "quiz", "arm": "kept", "metric": "acc", "value": 0.31, "interval": [0.25, 0.37]},
        {"task": "quiz", "arm": "random", "metric": "acc", "value": 0.29, "interval": [0.23, 0.35]},
    ],
    "sentence": "Kept is better than random: 2.051 against 2.101 bits per byte on 200 trusted documents",
}
ALIGNED: dict[str, dict[str, Any]] = {
    "prepare": {"seconds": 1.0, "n_actor": 300, "n_prompts": 300, "n_reward": 600},
    "expand/prompts": {"seconds": 1.0, "n_wanted": 50, "n_rows": 41},
    "actor": {"seconds": 40.0, "model": "tiny", "n_rows": 300, "n_trained_on": 240, "n_too_long": 3, "n_steps": 60}
    | {"loss_first": 3.4, "loss_last": 1.2},
    "reward": {"seconds": 4.0, "by": "student", "n_rated": 480, "spearman": 0.71, "spearman_interval": [0.6, 0.8]}
    | {"preferences": {"n": 120, "accuracy": 0.62, "interval": [0.53, 0.7]}, "sentence": "The student follows."},
    "rl": {
        "seconds": 90.0,
        "algorithm": "grpo",
        "reward": "student",
        "n_prompts": 32,
        "n_too_long": 0,
        "n_held_out": 8,
        "n_steps": 40,
        "teacher_before": 2.3,
        "teacher_after": 4.7,
        "gain": 2.4,
        "gain_interval": [2.0, 2.8],
        "reward_before": 2.1,
        "reward_after": 4.9,
        "reward_gain": 2.8,
        "n_unscored": 0,
        "n_asked": 16,
        "usd": None,
        "stopped_by": None,
        "sentence": BETTER,
        "warning": None,
    },
}
RESULTS = {**ALIGNED, "finetune": FINETUNED, "prove": PROVED}
SCORES: list[tuple[float | None, float | None]] = [
    (1.0, 5.0), (2.0, 4.0), (2.5, 3.0), (4.0, 1.0), (3.0, 3.0), (None, 4.0), (0.0, 0.0), (3.0, 2.0),
]  # fmt: skip


def left(folder: Path, result: dict[str, Any] | None, curve: list[dict[str, Any]] | None = None) -> None:
    """What a stage leaves; one without a result is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inputs.json").write_text('{"format": 1}')
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if curve is not None:
        (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve) + '{"step": 9')


def losses(n: int) -> list[dict[str, Any]]:
    """A curve of supervised fine-tuning."""
    return [{"step": step, "loss": 1 + 2 / step, "grad_norm": 0.5} for step in range(1, n + 1)]


def rewards(n: int) -> list[dict[str, Any]]:
    """A curve of reinforcement learning with a penalty on repetition; the KL of the first step is unknown."""
    return [
        {"step": step, "reward": step / n, "kl": math.nan if step == 1 else 0.01 * step}
        | {"completions/mean_length": 20 + step, "rewards/student/mean": step / n, "rewards/repetition/mean": -0.1}
        for step in range(1, n + 1)
    ]


def finetuned(run_folder: Path, **changes: Any) -> Path:
    """A run folder that holds a fine-tuning and nothing else."""
    left(run_folder / "finetune", FINETUNED | changes, losses(60))
    pairs = [{"prompt": "I went to", "before": HOSTILE, "after": "the woods", "original": "the pond"}]
    pairs += [{"prompt": HOSTILE, "before": "x", "after": HOSTILE, "original": None}]
    (run_folder / "finetune/continuations.json").write_text(json.dumps(pairs))
    return run_folder


def aligned(run_folder: Path, **changes: Any) -> Path:
    """A run folder that holds an alignment and nothing else; some replies are hostile or have no score."""
    for name, result in ALIGNED.items():
        curve = {"actor": losses(50), "rl": rewards(40)}.get(name)
        left(run_folder / name, result | (changes if name == "rl" else {}), curve)
    rows = [
        {"user_input": f"prompt {n} {HOSTILE}", "before": f"before {n}", "after": HOSTILE}
        | {"teacher_before": before, "teacher_after": after, "reward_before": 1.5, "reward_after": 2.5}
        for n, (before, after) in enumerate(SCORES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), run_folder / "rl/replies.parquet")
    log = [
        {"step": step, "user_input": HOSTILE, "completion": f"reply {step}.{n}", "reward": None if n else step / 10}
        for step in range(1, 41)
        for n in range(2)
    ]
    text = "".join(json.dumps(row) + "\n" for row in log) + '{"step": 41, "us'
    (run_folder / "rl/conversations.jsonl").write_text(text)
    return run_folder


def drawn(run_folder: Path) -> Page:
    """The page of a run folder."""
    return Page(Path(report.run(Recipe(run_folder=run_folder)).page))


# -- the page ---------------------------------------------------------------------------------------------------------


def test_a_fine_tuning_alone_is_a_page_about_it(tmp_path: Path):
    page = drawn(finetuned(tmp_path / "run"))
    assert page.open == [] and {"stages", "finetune", "settings"} <= set(page.ids)
    assert not {"ratings", "student", "corpus", "kept", "prove", "align"} & set(page.ids)
    for told in ("1.131", "1.071", "0.060 [0.051, 0.068]", "23.41", "Better: 1.071 against", "As it was written"):
        assert told in page.text, told
    assert page.tags.count("svg") == 1


def test_a_proof_alone_is_a_page_with_arms_comparisons_and_tasks(tmp_path: Path):
    left(tmp_path / "run/prove", PROVED)
    page = drawn(tmp_path / "run")
    assert page.open == [] and "prove" in page.ids and "ratings" not in page.ids and page.tags.count("svg") == 2
    for told in ("2.051 [2.031, 2.071]", "kept beside random", "0.050 [0.030, 0.070]", "0.310 [0.250, 0.370]"):
        assert told in page.text, told
    assert "quiz: acc" in page.text and "1,000,000 tokens" in page.text


def test_an_alignment_alone_is_a_page_with_curves_reply_pairs_and_the_log(tmp_path: Path):
    page = drawn(aligned(tmp_path / "run"))
    assert page.open == [] and "align" in page.ids and not {"corpus", "kept", "finetune"} & set(page.ids)
    assert page.tags.count("svg") == 5  # the actor's loss; reward, KL, length and penalty
    words = " ".join(page.text.split())
    for told in (BETTER, "0.62 [0.53, 0.70]", "0.71 [0.60, 0.80]", "2.40 [2.00, 2.80]", "Most improved", "step 40"):
        assert told in words, told
    assert "gristmill align rate" in page.text and WARNING not in page.text


def test_hostile_documents_and_replies_are_text(tmp_path: Path):
    run_folder = aligned(finetuned(tmp_path / "run"))
    left(run_folder / "prove", PROVED)
    page = drawn(run_folder)
    assert page.text.count("alert(1)") > 8 and "{{ 7 * 7 }}" in page.text
    assert not {"img", "script"} & set(page.tags)
    assert "\x1b" not in page.raw and "\u202e" not in page.raw
    assert len(page.ids) == len(set(page.ids)) and {link[1:] for link in page.links if link[0] == "#"} <= set(page.ids)
    for link in page.links:
        assert link[0] == "#" or (run_folder / "report" / link).exists(), link


@pytest.mark.parametrize("name", summary.TRAININGS)
def test_a_stage_that_is_begun_names_the_command_that_goes_on(tmp_path: Path, name: str):
    left(tmp_path / "run" / name, None, losses(7))
    result = report.run(Recipe(run_folder=tmp_path / "run"))
    page = Page(Path(result.page))
    assert result.states[name] == "begun" and page.open == [] and report.STAGES[name] in page.text
    assert summary.state(tmp_path / "run" / name) == {"state": "begun", "n_steps": 7}


@pytest.mark.parametrize("name", summary.TRAININGS)
def test_figures_that_are_not_known_are_a_dash(tmp_path: Path, name: str):
    full = RESULTS.get(name, ALIGNED["expand/prompts"])
    left(tmp_path / "run" / name, {"seconds": 1.0, **dict.fromkeys(set(full) - {"seconds"})})
    page = drawn(tmp_path / "run")
    assert page.open == [] and "None" not in page.text and "nan" not in page.text


def test_arms_whose_figures_are_missing_are_not_drawn():
    assert training_charts.arms({"kept": {"bits_per_byte": None}, "random": {}}) is None
    arms = {"kept": {"bits_per_byte": 2.0, "by_seed": [None, 2.0], "interval": None}, "random": {}}
    assert "2.000" in str(training_charts.arms(arms)) and "random" not in str(training_charts.arms(arms))


def test_damaged_files_are_left_out(tmp_path: Path):
    run_folder = aligned(finetuned(tmp_path / "run"))
    for path in ("finetune/continuations.json", "rl/replies.parquet", "rl/conversations.jsonl"):
        (run_folder / path).write_bytes(b'[{"prompt": ')
    page = drawn(run_folder)
    assert page.open == [] and "Continuations" not in page.text and "Replies before and after" not in page.text


def test_a_reward_that_rose_alone_is_warned_of_on_the_page_in_the_verdict_and_at_the_terminal(tmp_path: Path):
    page = drawn(aligned(tmp_path / "run", warning=WARNING))
    assert page.text.count(WARNING) == 2
    assert WARNING in summary.TELL["rl"](ALIGNED["rl"] | {"warning": WARNING})


def test_reply_pairs_are_the_best_the_worst_and_others_each_once(tmp_path: Path):
    found = training_page.pairs(aligned(tmp_path / "run"))
    gains = {name: [row["gain"] for row in rows] for name, rows in found.items()}
    assert gains["Most improved"] == [4.0, 2.0, 0.5] and gains["Most worsened"] == [-3.0, -1.0]
    assert sorted(map(str, gains["At random, of the others"])) == ["0.0", "0.0", "None"]


def test_the_log_is_shown_from_its_first_step_to_its_last(tmp_path: Path):
    rows = training_page.conversations(aligned(tmp_path / "run"))
    assert [row["step"] for row in rows][:: len(rows) - 1] == [1, 40] and len(rows) == training_page.N_LOGGED
    assert all(row["completion"] == f"reply {row['step']}.0" for row in rows)


def test_a_long_curve_is_drawn_by_the_means_of_neighbours():
    curve = [{"step": n, "loss": float(n % 2)} for n in range(10_000)]
    line = training_charts.series(curve, "loss", "loss")
    assert len(line.x) == training_charts.MOST_POINTS and line.y == pytest.approx([0.5] * len(line.y), abs=0.02)
    assert training_charts.series([], "loss", "loss").x == []


def test_reply_pairs_can_be_read_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder = aligned(tmp_path / "run")
    for path in (run_folder, run_folder / "rl", run_folder / "rl/replies.parquet"):
        reader.run(path, Selection(order="spread", n=2))
        first, second = capsys.readouterr().out.split("---- ")[1::2]
        assert first == "1 of 2 " and second == "2 of 2 "
    reader.run(run_folder, Selection(order="-score", n=1))
    shown = capsys.readouterr().out
    assert "score 5.00   gain 4.00   spread 4.00" in shown and "\x1b" not in shown
    assert "before  1.00  reward 1.50\n    | before 0" in shown and "after  5.00  reward 2.50\n    | </pre>" in shown
    reader.run(run_folder, Selection(order="score", as_json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["score"] for row in rows] == [0, 1, 2, 3, 3, 4, 4, 5] and rows[0]["opinions"][1]["score"] == 0
    with pytest.raises(UserError, match="replies are no documents"):
        reader.run(run_folder, Selection(export=tmp_path / "people.csv"))


# -- the verdict and the terminal -------------------------------------------------------------------------------------


def test_the_verdict_leads_with_whether_it_helped():
    told = verdict.verdict(
        {"rate": {"n_scored": 5, "n_sampled": 5}, "prove": PROVED, **ALIGNED, "finetune": FINETUNED}
    )
    assert list(told) == ["proof", "fine-tuning", "alignment", "teacher"]
    assert told["alignment"] == [
        f"{BETTER}.",
        "The reward prefers the reply that people prefer in 62% [53%, 70%] of 120 pairs.",
    ]
    assert told["teacher"] == ["The teacher gave 5 of 5 replies a score."]


def test_the_terminal_tells_every_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder = aligned(finetuned(tmp_path / "run", model="tiny"))
    left(run_folder / "prove", PROVED)
    states = summary.status(run_folder, cli.STAGES)
    assert list(states) == ["run_folder", *RESULTS]
    summary.show_status(states)
    words = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    for told in (
        "Better: 1.071 against 1.131 bits per byte",
        "perplexity 23.4 to 19.9",
        "kept 2.051 [2.031, 2.071]",
        "quiz: acc: kept 0.310 [0.250, 0.370], random 0.290 [0.230, 0.350]",
        "learned from 240 of 300 replies, 3 too long",
        "loss 3.40 to 1.20",
        "prefers what people prefer in 0.62 [0.53, 0.70] of 120 pairs",
        "rose from 2.3 to 4.7 of 5 on 8 held-out prompts",
        "32 prompts, 8 held out; 40 steps of GRPO",
    ):
        assert told in words, told


@pytest.mark.parametrize("name", summary.TRAININGS)
def test_the_terminal_tells_figures_that_are_not_known(name: str):
    full = RESULTS.get(name, ALIGNED["expand/prompts"])
    empty = {key: None for key in full if not isinstance(full[key], str)}
    assert "None" not in summary.TELL[name]({**full, **empty})


# -- dashboards -------------------------------------------------------------------------------------------------------


class Counted(Result):
    """The result of a stage of no work."""

    n_steps: int
    arms: dict[str, Any]


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def sent(run_folder: Path, to: Any) -> None:
    """Stages that end, with a tracker beside them."""
    aligned(finetuned(run_folder))
    (run_folder / "prove").mkdir()
    (run_folder / "prove/prove.png").write_bytes(PIXEL)
    for name in ("finetune", "rl", "prove"):
        for left in ("model", "model/checkpoint"):
            (run_folder / name / left).mkdir(exist_ok=True)
        (run_folder / name / "model/model.safetensors").write_bytes(b"gigabytes of weights")
        with stage(name, Recipe(run_folder=run_folder, tracking=config.Tracking(to=to, project="mine")), {}) as work:
            work.finish(Counted(seconds=1.0, n_steps=60, arms=PROVED["arms"] if name == "prove" else {}))


def test_trackio_gets_curves_by_step_tables_and_no_weights(tmp_path: Path):
    """In a process of its own, as Trackio reads where it keeps things when it is imported."""
    pytest.importorskip("trackio")
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_training_page\n"
        "test_training_page.sent(test_training_page.Path(sys.argv[1]), 'trackio')"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO")}
    environment |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and "did not take" not in done.stderr, done.stderr
    with sqlite3.connect(tmp_path / "trackio/mine.db") as file:
        logged = [(step, json.loads(line)) for step, line in file.execute("SELECT step, metrics FROM metrics")]
    file.close()
    losses = {step: line["finetune/loss"] for step, line in logged if "finetune/loss" in line}
    assert losses[1] == 3.0 and losses[60] == pytest.approx(1 + 2 / 60) and len(losses) == 60
    kl = {step: line["rl/kl"] for step, line in logged if "rl/kl" in line}
    assert kl[40] == pytest.approx(0.4) and any(line.get("finetune/n_steps") == 60 for _, line in logged)
    kept = {step: line["prove/kept"] for step, line in logged if "prove/kept" in line}
    assert len(kept) == 8 and kept[1_000_000] == pytest.approx(2.0512 + 1 / 8)
    for name in ("finetune/continuations", "rl/replies", "prove/picture"):
        assert any(name in line for _, line in logged), name
    blobs = [path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file()]
    assert PIXEL in blobs and not any(b"gigabytes of weights" in blob for blob in blobs)


def test_wandb_offline_gets_tables_and_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, "gristmill"):
        sent(tmp_path / "run", "wandb")
    assert caplog.messages == []
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")}
    assert tables["continuations"]["columns"] == ["prompt", "before", "after", "original"]
    assert len(tables["replies"]["data"]) == len(SCORES) and "gain" in tables["replies"]["columns"]
    assert [path.read_bytes() for path in (tmp_path / "run/wandb").rglob("*.png")] == [PIXEL]
