"""What filter has chosen, on disk: made by the first process that comes to it, used by all that write shards."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import config, locks, storage
from pipeline.config import Recipe, digest
from pipeline.keys import Floor, Survey
from pipeline.rule import Rule
from pipeline.tracking import read_json

FOLDER, FILE = "keys", "chosen.json"
"""The folder holds a key file for each shard and, written last, the choice."""
LOCK, IN_USE = ".chosen.lock", ".in-use.lock"
"""Held by the one that chooses, and shared by all that write by the choice."""

Chosen = tuple[Survey, Rule]


@contextmanager
def once(folder: Path, made_from: str, survey: Survey, make: Callable[[Path], Rule]) -> Iterator[Chosen]:
    """The choice that is there, or else what `make` finds while it fills the survey and a folder of key files; nobody
    chooses anew while it is in use."""
    with ExitStack() as use:
        with locks.held(folder / LOCK, "", wait=True):
            there = read(folder, made_from, survey.settings, survey.found, survey.seed)
            if there is None:
                refusal = f"filter: parts with other settings are at work in {folder}; wait for them or stop them"
                with locks.held(folder / IN_USE, refusal):
                    there = survey, made(folder, made_from, survey, make)
            use.enter_context(locks.held(folder / IN_USE, "", shared=True, wait=True))
        yield there


def made(folder: Path, made_from: str, survey: Survey, make: Callable[[Path], Rule]) -> Rule:
    """A new choice, written down; nothing is left where there is none to make."""
    forget(folder)
    keys = folder / FOLDER
    keys.mkdir(parents=True, exist_ok=True)
    try:
        rule = make(keys)
        storage.write_text(keys / FILE, json.dumps({"made_from": made_from, **said(survey, rule)}))
    except BaseException:
        forget(folder)
        raise
    return rule


def forget(folder: Path) -> None:
    """Remove the choice and its key files."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def read(folder: Path, made_from: str, settings: config.Filter, found: config.Corpus, seed: int) -> Chosen | None:
    """The choice, if one is there that was made from the same."""
    known = read_json(folder / FOLDER / FILE)
    if known is None or known["made_from"] != made_from:
        return None
    survey = Survey(settings, found, seed)
    survey.groups.codes.update(known["codes"])
    survey.n_scored = np.array(known["n_scored"], np.int64)
    survey.scores.counts[known["bins"]] = known["counts"]
    survey.lowest = math.inf if known["lowest"] is None else known["lowest"]
    floor = None if known["floor"] is None else Floor(*known["floor"])
    cuts = None if known["cuts"] is None else np.array(known["cuts"], np.int64)
    paths = tuple(folder / FOLDER / name for name in known["files"])
    return survey, Rule(floor, cuts, paths, known["reason"])


def said(survey: Survey, rule: Rule) -> dict[str, Any]:
    """A choice as JSON."""
    bins = np.flatnonzero(survey.scores.counts)
    return {
        "floor": rule.floor,
        "cuts": None if rule.cuts is None else rule.cuts.tolist(),
        "files": [path.name for path in rule.paths],
        "reason": rule.reason,
        "codes": survey.groups.codes,
        "n_scored": survey.n_scored.tolist(),
        "bins": bins.tolist(),
        "counts": survey.scores.counts[bins].tolist(),
        "lowest": survey.lowest if math.isfinite(survey.lowest) else None,
    }


def fingerprints(recipe: Recipe, chosen: Chosen, inputs: dict[str, Any]) -> dict[str, str]:
    """By shard, a fingerprint of all that decides which of its rows are kept."""
    survey, rule = chosen
    noise = inputs if survey.noise is not None else None  # it hangs on the shards before
    cuts = None if rule.cuts is None else rule.cuts.tolist()
    how = digest([recipe.filter.identity(), recipe.seed, rule.floor, cuts, survey.groups.codes, noise])
    return {name: digest([how, print]) for name, print in inputs["shards"].items()}
