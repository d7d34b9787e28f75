"""What the report shows of fine-tuning, of the proof that the filter helps, and of alignment: curves, continuations,
reply pairs and the log of conversations."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import training_charts
from pipeline.training import read_curve
from pipeline.training_charts import known, markup

Values = dict[str, Any]
Row = dict[str, Any]

N_PAIRS = 5
"""Reply pairs at either end, and at random."""
N_LOGGED = 8
"""Conversations of the log."""
LONGEST_LOG_MB = 512
"""A longer log of conversations is not read."""


def page(run_folder: Path, results: dict[str, Values]) -> Values:
    """Charts and rows by what they are called in the template; of a stage at work, as far as it is."""
    curves = {name: read_curve(run_folder / name) for name in ("finetune", "actor", "reward", "rl")}
    arms = results.get("prove", {}).get("arms") or {}
    charts = {"arms": training_charts.arms(arms), "arms_learning": training_charts.arms_learning(arms)}
    charts |= {f"{name}_loss": training_charts.loss(curves[name]) for name in ("finetune", "actor", "reward")}
    charts |= {f"rl_{name}": chart for name, chart in training_charts.reinforcement(curves["rl"]).items()}
    return {
        "charts": markup(charts.items()),
        "tasks": tasks(results.get("prove", {})),
        "continuations": continuations(run_folder),
        "pairs": pairs(run_folder),
        "conversations": conversations(run_folder),
    }


def tasks(prove: Values) -> dict[str, dict[str, Values]]:
    """Benchmark figures by task and metric, then by arm."""
    found: dict[str, dict[str, Values]] = {}
    for each in prove.get("tasks") or []:
        found.setdefault(f"{each.get('task')}: {each.get('metric')}", {})[str(each.get("arm"))] = each
    return found


def continuations(run_folder: Path) -> list[Row]:
    """Beginnings with what the model made of them before and after, none where the file is damaged."""
    path = run_folder / "finetune" / "continuations.json"
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return [each for each in found if isinstance(each, dict)]
    return []


# -- reply pairs ------------------------------------------------------------------------------------------------------


def read_pairs(run_folder: Path) -> list[Row]:
    """Held-out prompts with the replies before and after, as `rl` left them: scores None where there is none."""
    path = run_folder / "rl" / "replies.parquet"
    with suppress(OSError, pa.ArrowException):
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        return [{**row, "gain": gain(row)} for row in table.to_pylist()]
    return []


def gain(row: Row) -> float | None:
    """How much better the teacher likes the reply after; None where one of the two has no score."""
    before, after = row.get("teacher_before"), row.get("teacher_after")
    return after - before if known(before) and known(after) else None


def pairs(run_folder: Path) -> dict[str, list[Row]]:
    """Pairs that the teacher liked most and least beside before, then some at random of the others."""
    rows = read_pairs(run_folder)
    judged = sorted((row for row in rows if row["gain"] is not None), key=lambda row: -row["gain"])
    best = [row for row in judged[:N_PAIRS] if row["gain"] > 0]
    worst = [row for row in judged[::-1][:N_PAIRS] if row["gain"] < 0]
    others = [row for row in rows if not any(row is each for each in (*best, *worst))]
    drawn = random.Random(0).sample(others, min(N_PAIRS, len(others)))  # noqa: S311
    found = {"Most improved": best, "Most worsened": worst, "At random, of the others": drawn}
    return {name: chosen for name, chosen in found.items() if chosen}


# -- the log of conversations -----------------------------------------------------------------------------------------


def conversations(run_folder: Path) -> list[Row]:
    """One conversation of some steps, from the first to the last."""
    first = {row["step"]: row for row in reversed([*logged(run_folder / "rl" / "conversations.jsonl")])}
    return spread([first[step] for step in sorted(first)], N_LOGGED)


def logged(path: Path) -> Iterator[Row]:
    """The first lines of each step; one that was cut by a crash is left out."""
    if not path.exists() or path.stat().st_size > LONGEST_LOG_MB * 1e6:
        return
    last = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and known(row.get("step")) and row["step"] != last:
                    last = row["step"]
                    yield row


def spread(rows: Sequence[Row], n: int) -> list[Row]:
    """So many rows at equal distances, the first and the last among them."""
    if len(rows) <= n:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (n - 1))] for place in range(n)]
