"""Weights & Biases or Trackio, when asked: a stage's numbers, curves, trials, examples, the report and the student.
Language models are gigabytes, and stay where they are."""

import logging
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline import examples, training, training_page, tried
from pipeline.config import Recipe
from pipeline.errors import needs
from pipeline.tracking import read_json

log = logging.getLogger("gristmill")

N_ROWS = 48
"""Documents in a table of examples."""


def send(stage: str, recipe: Recipe, numbers: dict[str, Any]) -> None:
    """One run per stage, grouped by run folder; a tracker that fails costs its run, never the stage."""
    assert recipe.tracking.to is not None
    tracker = needs(recipe.tracking.to, recipe.tracking.to)
    try:
        with redirect_stdout(sys.stderr):  # stdout is the result's
            run = tracker.init(**START[recipe.tracking.to](tracker, stage, recipe))
            try:
                for step, line in curve(stage, recipe.run_folder):
                    run.log({f"{stage}/{name}": value for name, value in line.items()}, step=step)
                run.log({f"{stage}/{name}": value for name, value in numbers.items()})
                for name, shown in to_look_at(tracker, stage, recipe):
                    run.log({f"{stage}/{name}": shown})
                for name, kind, path in files(stage, recipe.run_folder):
                    run.log_artifact(artifact(tracker, name, kind, path))
            finally:
                tracker.finish()
    except Exception as error:  # whatever a tracker raises: the stage is done, and its numbers are kept here too
        why = str(error).split("\n")[0] or type(error).__name__
        log.warning("%s: %s did not take everything (%s); metrics.jsonl has it", stage, recipe.tracking.to, why)


def for_wandb(tracker: ModuleType, stage: str, recipe: Recipe) -> dict[str, Any]:
    """What wandb.init is given; its files go to the run folder."""
    settings = tracker.Settings(console="off", disable_git=True, silent=True)
    return {**for_both(stage, recipe), "job_type": stage, "dir": recipe.run_folder, "settings": settings}


def for_trackio(_: ModuleType, stage: str, recipe: Recipe) -> dict[str, Any]:
    """What trackio.init is given: the stage's numbers, not the machine's."""
    return {**for_both(stage, recipe), "auto_log_cpu": False, "auto_log_gpu": False}


def for_both(stage: str, recipe: Recipe) -> dict[str, Any]:
    """What both trackers are given."""
    folder = recipe.run_folder.name
    config = recipe.model_dump(mode="json")
    return {"project": recipe.tracking.project, "group": folder, "name": f"{folder}-{stage}", "config": config}


START = {"wandb": for_wandb, "trackio": for_trackio}


def to_look_at(tracker: ModuleType, stage: str, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """A table of trials, examples, continuations or reply pairs, the proof's picture, or the report's page."""
    name, rows = "examples", list[dict[str, Any]]()
    if stage == "finetune":
        name, rows = "continuations", training_page.continuations(recipe.run_folder)
    if stage == "rl":
        name, rows = "replies", training_page.read_pairs(recipe.run_folder)[:N_ROWS]
    if stage == "tune":
        name, rows = "trials", trials(recipe.run_folder)
    if stage == "rate":
        rows = examples.rated(recipe.run_folder, N_ROWS)
    if stage == "score":
        rows = examples.scored(recipe, N_ROWS)
    if rows:
        yield name, tracker.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    picture = recipe.run_folder / "prove" / "prove.png"
    if stage == "prove" and picture.exists():
        yield "picture", tracker.Image(str(picture))
    page = recipe.run_folder / "report" / "report.html"
    if stage == "report" and page.exists():
        yield "page", tracker.Html(page.read_text(encoding="utf-8"))


def curve(stage: str, run_folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Figures of a training by step, those logged at one step together; of the arms of a proof by tokens."""
    steps: dict[int, dict[str, float]] = {}
    lines = training.read_curve(run_folder / stage)
    if stage == "prove":
        arms = (read_json(run_folder / "prove" / "result.json") or {}).get("arms") or {}
        lines = [
            {"step": each["tokens"], name: each["bits_per_byte"]}
            for name in arms
            for each in arms[name].get("curve", [])
        ]
    for line in lines:
        steps.setdefault(int(line.pop("step")), {}).update(line)
    yield from sorted(steps.items())


def trials(run_folder: Path) -> list[dict[str, Any]]:
    """A row for each trial of a tuning."""
    result = read_json(run_folder / "tune" / "result.json") or {}
    return tried.rows(tried.read(run_folder), str(result.get("objective") or "objective"))


def files(stage: str, run_folder: Path) -> list[tuple[str, str, Path]]:
    """Artifacts of a stage: name, kind and where they are."""
    made = {
        "tune": [("best", "recipe", "tune/best.yaml")],
        "train": [("student", "model", "train/student")],
        "report": [("report", "report", "report/report.html")],
    }.get(stage, [])
    if stage == "tune":
        made += [(path.stem, "prompt", f"tune/{path.name}") for path in sorted((run_folder / "tune").glob("*.md"))]
    there = [(name, kind, run_folder / path) for name, kind, path in made]
    return [(f"{run_folder.name}-{name}", kind, path) for name, kind, path in there if path.exists()]


def artifact(tracker: ModuleType, name: str, kind: str, path: Path) -> Any:
    """A file or folder as the tracker's artifact."""
    bundle = tracker.Artifact(safe(name), type=kind)
    if path.is_dir():
        bundle.add_dir(str(path))
    else:
        bundle.add_file(str(path))
    return bundle


def safe(name: str) -> str:
    """A name that both trackers take: letters, digits, dot, underscore and hyphen."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in name)
