"""Tasks of lm-evaluation-harness, answered by each trained model and compared document by document."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import contrast
from pipeline.errors import UserError, needs

METRICS = ("acc_norm", "acc", "exact_match", "f1")
"""Of several metrics of a task, the first of these that it has is compared; else the first that is a number."""

Answers = dict[str, dict[str, Any]]
"""By task: metric, and its values by document."""


def check(tasks: Iterable[str]) -> None:
    """Refuse a file that is not there, before anything is trained."""
    needs("lm_eval", "lm-eval")
    for task in tasks:
        if is_file(task) and not Path(task).is_file():
            raise UserError(f"prove.tasks: {task} does not exist; give a task's YAML file or a name such as arc_easy")
        name_of(task)


def evaluate(model: Path, tasks: Sequence[str], limit: int | None, device: str, seed: int) -> Answers:
    """What a model folder gets on each document of each task."""
    if not tasks:
        return {}
    lm_eval = needs("lm_eval", "lm-eval")
    folders = sorted({str(Path(task).parent) for task in tasks if is_file(task)})
    seeds = {"random_seed": seed, "numpy_random_seed": seed, "torch_random_seed": seed, "fewshot_random_seed": seed}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[name_of(task) for task in tasks],
        task_manager=needs("lm_eval.tasks", "lm-eval").TaskManager(
            include_path=folders or None, include_defaults=not all(map(is_file, tasks))
        ),
        limit=limit,
        device=device,
        batch_size=16,
        bootstrap_iters=0,
        log_samples=True,
        **seeds,
    )
    return {task: answers(task, samples) for task, samples in found["samples"].items()}


def is_file(task: str) -> bool:
    """Whether a task is given as a file of its own."""
    return task.endswith((".yaml", ".yml"))


def name_of(task: str) -> str:
    """The name of a task, which its file says on a line of its own."""
    if not is_file(task):
        return task
    said = re.search(r"^task: *['\"]?([^'\"#\n]+)", Path(task).read_text(encoding="utf-8"), re.MULTILINE)
    if said is None:
        raise UserError(f"prove.tasks: {task} names no task; write task: NAME into it")
    return said[1].strip()


def answers(task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One number for each document, by its number in the task."""
    metric = metric_of(task, samples[0])
    return {"metric": metric, "values": {str(each["doc_id"]): float(each[metric]) for each in samples}}


def metric_of(task: str, sample: dict[str, Any]) -> str:
    """What is compared of a task."""
    there = [name for name in sample["metrics"] if isinstance(sample[name], int | float)]
    chosen = next((name for name in METRICS if name in there), next(iter(there), None))
    if chosen is None:
        raise UserError(f"prove.tasks: {task} gives no number for a single document; choose another task")
    return chosen


def summarise(
    said: dict[tuple[str, int], dict[str, Any]], arms: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every task by arm, and the arms against each other, with intervals over seeds and documents."""
    figures, compared = [], []
    by_arm = {arm: [one["tasks"] for (of, _), one in sorted(said.items()) if of == arm] for arm in arms}
    for task, first in next(iter(said.values()))["tasks"].items():
        ids = sorted(first["values"], key=int)
        points = {
            arm: np.array([[one[task]["values"][id] for id in ids] for one in by_seed])
            for arm, by_seed in by_arm.items()
        }
        ones = np.ones(len(ids))
        about = {"task": task, "metric": first["metric"]}
        for arm in arms:
            value, interval = contrast.estimate(points[arm], ones)
            figures.append({**about, "arm": arm, "value": value, "interval": interval, "n_documents": len(ids)})
        for better, than in pairs:
            gain = contrast.estimate(points[better] - points[than], ones)
            values = (float(points[better].mean()), float(points[than].mean()))
            unit = f"{first['metric']} on {len(ids):,} documents of {task}"
            told = contrast.sentence((better, than), values, gain, unit)
            entry = {"better": better, "than": than, "gain": gain.value, "interval": gain.interval, "sentence": told}
            compared.append({**about, **entry})
    return figures, compared
