"""Trials as a tuning left them in its run folder, and in words."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.show import clean
from pipeline.storage import read_lines
from pipeline.trials import Params, Trial

DEFAULTS = -1
"""Number of the trial that has no settings of its own."""
CHARACTERS = 40
"""Characters shown of a value."""
CALLED = {"auc": "AUC", "f1": "F1", "spearman": "Spearman"}
"""Objectives that are written otherwise than they are set."""


def read(run_folder: Path) -> list[Trial]:
    """The defaults and the trials so far; none where nothing was tuned. Lines of another version are left out."""
    found = []
    for values in read_lines(run_folder / "tune" / "trials.jsonl"):
        with suppress(TypeError):
            found.append(Trial(**{name: values[name] for name in Trial._fields if name in values}))
    return found


def quality(trial: Trial, objective: str) -> float | None:
    """The objective's own figure, from which no price is taken off."""
    found = trial.figures.get(objective, trial.value)
    return float(found) if found is not None else None


def less_price(trials: Iterable[Trial], objective: str) -> bool:
    """Whether values are something else than the objective's own figure."""
    return any(trial.value is not None and quality(trial, objective) != trial.value for trial in trials)


def known(trials: Iterable[Trial], figure: str) -> bool:
    """Whether any trial has this figure."""
    return any(trial.figures.get(figure) is not None for trial in trials)


# -- in words ---------------------------------------------------------------------------------------------------------


def called(objective: str) -> str:
    """An objective as it is written."""
    return CALLED.get(objective, objective)


def name(trial: Trial) -> str:
    """A trial in a word."""
    return "defaults" if trial.number == DEFAULTS else str(trial.number)


def words(value: Any, characters: int = CHARACTERS) -> str:
    """A value on one line: a prompt by its name, numbers with three digits, blanks and the rest as JSON."""
    if isinstance(value, str) and value.strip():
        return clipped(Path(value).stem if value.endswith(".md") else value, characters)
    if isinstance(value, float):
        return f"{value:.3g}"
    return clipped(json.dumps(value, ensure_ascii=False, default=str), characters)


def clipped(text: str, characters: int = CHARACTERS) -> str:
    """The begin of a text on one line, without characters that steer a terminal."""
    line = " ".join(clean(text).split())
    return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"


def settings(params: Params) -> str:
    """What a trial sets."""
    return ", ".join(f"{name}={words(value)}" for name, value in params.items())


def remark(trial: Trial) -> str:
    """What became of a trial that is not complete."""
    if trial.state == "pruned":
        return "pruned" if trial.value is None else f"pruned at {trial.value:.3f}"
    return f"failed: {clipped(trial.reason or 'no reason given', 200)}"


# -- as rows ----------------------------------------------------------------------------------------------------------


def rows(trials: Sequence[Trial], objective: str) -> list[dict[str, Any]]:
    """A row for each trial, with a column for each figure and each setting as text."""
    figures = dict.fromkeys(name for trial in trials for name in trial.figures)
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    return [
        {
            "trial": name(trial),
            "state": trial.state,
            "value": trial.value,
            **{figure: trial.figures.get(figure) for figure in {objective: None, **figures}},
            **{key: words(trial.params[key]) if key in trial.params else None for key in names},
            "reason": trial.reason,
            "seconds": trial.seconds,
        }
        for trial in trials
    ]
