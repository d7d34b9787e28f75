"""What a run did, for a person at a terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError
from pipeline.teacher import AnswerStore
from pipeline.tracking import read_json

Values = dict[str, Any]

PARTS = ("n_train", "n_validation", "n_test")


def show(values: Values) -> None:
    """A table with a row per stage, then examples and where everything is."""
    console = Console(width=max(Console().width, 100))
    table = Table("stage", "documents", "time", "what came out")
    for name, tell in TELL.items():
        if name in values:
            table.add_row(name, f"{documents(values[name]):,}", f"{values[name]['seconds']:.1f} s", tell(values[name]))
    console.print(table)
    for side in ("kept", "dropped"):
        for example in values.get("filter", {}).get(f"examples_{side}", []):
            console.print(
                f"{side:>8} {example['score']:6.2f}  {example['text']}",
                markup=False,
                overflow="ellipsis",
                no_wrap=True,
            )
    console.print(f"run folder: {values['run_folder']}", markup=False)


def documents(result: Values) -> int:
    """How many documents a stage worked on."""
    return int(
        result.get("n_sampled")
        or result.get("n_rows")
        or result["n_train"] + result["n_validation"] + result["n_test"]
    )


def tell_rate(result: Values) -> str:
    """The teacher in a line or two."""
    unscored = ", ".join(f"{reason} {count}" for reason, count in result["unscored"].items())
    lines = [
        f"{result['n_scored']:,} scored, unscored: {unscored or 'none'}; mean score {figure(result['mean_score'])}"
    ]
    lines.append(
        f"asked {result['n_asked']:,}, reused {result['n_reused']:,} answers; {result['n_truncated']:,} documents cut"
    )
    return "\n".join(lines + gold("teacher", result["gold"]))


def tell_train(result: Values) -> str:
    """The student in a few lines."""
    kept = {name: figure(value) for name, value in result["kept"].items()}
    lines = [
        f"on {result['n_test']} held-out ratings: Spearman {figure(result['spearman'])} to the teacher,"
        f" MAE {figure(result['mae'])}, macro-F1 of int scores {figure(result['macro_f1'])}",
        f"documents worth {result['good_from']:g} or more ({result['good_share']:.0%} of them), kept from"
        f" {result['cut']:.2f} up:"
        f" precision {kept['precision']}, recall {kept['recall']}, F1 {kept['f1']}",
    ]
    return "\n".join(lines + gold("student", result["gold"]))


def tell_score(result: Values) -> str:
    """The scored corpus in a line or two."""
    counts = ", ".join(f"{value}: {count:,}" for value, count in result["int_score_counts"].items())
    reused = f", {result['n_shards_reused']} of them reused" if result["n_shards_reused"] else ""
    speed = f"{figure(result['docs_per_s'])} docs/s, " if result["docs_per_s"] else ""
    lines = [
        f"{result['n_scored']:,} scored, {result['n_empty']:,} empty, {result['n_truncated']:,} cut",
        f"int_score {counts}",
        f"{speed}{result['n_shards']} shards{reused}",
    ]
    return "\n".join(lines)


def tell_filter(result: Values) -> str:
    """The kept corpus in a line."""
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in result["dropped"].items()) or "none"
    return f"kept {result['n_kept']:,} ({result['kept_share']:.1%}) from {result['cut']:.2f} up; dropped: {dropped}"


TELL = {"rate": tell_rate, "train": tell_train, "score": tell_score, "filter": tell_filter}


def gold(who: str, found: Values | None) -> list[str]:
    """Agreement with a known quality, if there is one."""
    if not found:
        return []
    measure = "AUC" if "auc" in found else "Spearman"
    return [f"{who}'s {measure} against the known quality: {figure(found[measure.lower()])} (n = {found['n']})"]


def figure(value: float | None) -> str:
    """A number with the digits that mean something."""
    return "not defined" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def status(run_folder: Path, stages: Sequence[str]) -> Values:
    """Each stage's state: done, begun (with what is there) or not begun."""
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is no folder; give the run folder of a recipe")
    states = {name: state(run_folder / name) for name in stages}
    return {"run_folder": str(run_folder), **states}


def state(folder: Path) -> Values:
    """One stage's state."""
    result = read_json(folder / "result.json")
    if result is not None:
        return {"state": "done", **result}
    if not (folder / "inputs.json").exists():
        return {"state": "not begun"}
    begun: Values = {"state": "begun"}
    if (folder / "answers.sqlite").exists():
        with AnswerStore(folder / "answers.sqlite") as store:
            begun["n_answers"] = len(store)
    if (folder / "scored").is_dir():
        begun["n_shards_done"] = sum(1 for path in (folder / "scored").rglob("*.parquet") if path.name[0] != ".")
        begun["n_shards"] = len((read_json(folder / "inputs.json") or {})["shards"])
    return begun


def show_status(values: Values) -> None:
    """A row per stage."""
    table = Table("stage", "state", "what is there", title=values["run_folder"])
    for name, tell in TELL.items():
        found = values[name]
        there = (
            tell(found)
            if found["state"] == "done"
            else ", ".join(f"{k} {v}" for k, v in found.items() if k != "state")
        )
        table.add_row(name, found["state"], there)
    Console(width=max(Console().width, 100)).print(table)
