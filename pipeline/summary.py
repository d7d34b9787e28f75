"""What a run did, for a person at a terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.errors import UserError
from pipeline.teacher import AnswerStore
from pipeline.tracking import read_json

Values = dict[str, Any]

COMMONEST = 5
"""Labels that are named."""
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
        result.get("n_documents")
        or result.get("n_sampled")
        or result.get("n_rows")
        or sum(result.get(name, 0) for name in PARTS)
    )


def tell_plan(result: Values) -> str:
    """What rating will take."""
    money = "no prices given" if result["usd"] is None else f"{dollars(result['usd'])}"
    time = "speed not known (--tokens-per-s)" if result["hours"] is None else duration(result["hours"])
    lines = [
        f"{result['n_answers']:,} answers, {result['n_recorded']:,} of them there already",
        f"{result['prompt_tokens']:,} prompt tokens, {result['answer_tokens']:,} answer tokens"
        f" (answer length: {result['answer_length']})",
        f"{money}; {time}",
    ]
    if result["n_recorded"] and result["usd"] is not None:
        lines.append(f"still to pay: {dollars(result['usd_left'])}")
    return "\n".join(lines)


def tell_rate(result: Values) -> str:
    """The teachers in a few lines."""
    unscored = ", ".join(f"{reason} {count}" for reason, count in result["unscored"].items())
    lines = [
        f"{result['n_scored']:,} scored, unscored: {unscored or 'none'}; mean score {figure(result['mean_score'])}",
        asked(result),
    ]
    if result["stopped_by"]:
        lines.append(f"stopped by {result['stopped_by']}; the same command with more of it goes on")
    if result["attributes"]:
        lines.append("means: " + ", ".join(f"{name} {figure(mean)}" for name, mean in result["attributes"].items()))
    lines += planned_and_actual(result)
    lines += [f"{each['between']}: {agreement(each)}" for each in result["agreement"]]
    lines += gold("teacher", result["gold"])
    if result["human"]:
        lines.append(f"with people: {agreement(result['human'])}")
        if result["human"].get("between_people"):
            lines.append(f"people among themselves: {agreement(result['human']['between_people'])}")
    return "\n".join(lines)


def asked(result: Values) -> str:
    """How much a teacher was asked, and how much of it was known."""
    return (
        f"asked {result['n_asked']:,}, reused {result['n_reused']:,} answers; {result['n_truncated']:,} documents cut"
    )


def planned_and_actual(result: Values) -> list[str]:
    """What was planned beside what it took: tokens, and money and time where both are known."""
    planned = result["planned"]
    if not planned:
        return []
    sides = [
        (planned["prompt_tokens"] + planned["answer_tokens"], planned["usd"], planned["hours"]),
        (result["prompt_tokens"] + result["answer_tokens"], result["usd"], result["seconds"] / 3600),
    ]
    known = [None not in pair for pair in zip(*sides, strict=True)]
    told = [
        ", ".join(
            tell(value) for tell, value, both in zip((tokens, dollars, duration), side, known, strict=True) if both
        )
        for side in sides
    ]
    return [f"planned {told[0]}; it took {told[1]}"]


def tokens(n: float) -> str:
    """A number of tokens."""
    return f"{n:,.0f} tokens"


def agreement(found: Values) -> str:
    """Agreement of two sides, with 95% intervals."""
    names = {"auc": "AUC", "spearman": "Spearman", "kappa": "kappa"}
    told = [
        f"{called} {figure(found[name])}{interval(found, name)}" for name, called in names.items() if name in found
    ]
    return f"{', '.join(told)} (n = {found['n']})"


def interval(found: Values, name: str) -> str:
    """A 95% interval in brackets, if there is one."""
    ends = found.get(f"{name}_interval")
    return f" [{figure(ends[0])}, {figure(ends[1])}]" if ends else ""


def dollars(amount: float) -> str:
    """Money with the digits that mean something."""
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.2f}" if amount >= 0.1 else f"${amount:.4f}"


def duration(hours: float) -> str:
    """A time a person can picture."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def tell_probe(result: Values) -> str:
    """What each kind of line did to each rater's scores."""
    return "\n".join(line for rater in result["raters"] for line in tell_attacks(rater))


def tell_attacks(rater: Values) -> list[str]:
    """A line for each attack on one rater."""
    lines = [f"prompt {rater['prompt']}: int_score changed, went up; mean and worst shift of the score"]
    for name, found in rater["attacks"].items():
        rates = f"{percent(found['flip_rate']):>5} {percent(found['raised_rate']):>5}"
        shifts = (
            f"{figure(found['mean_shift'])} {figure(found['worst_shift'])}" if found["n"] else "never read to its end"
        )
        lines.append(f"  {name:18} {rates}  {shifts}")
    return lines


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{share:.0%}"


def tell_label(result: Values) -> str:
    """The labels of one corpus in a few lines, of several in a line or two each."""
    if "corpora" in result:
        return "\n".join(tell_corpus(each) for each in result["corpora"])
    reasons = ", ".join(f"{reason} {count}" for reason, count in result["unlabelled"].items())
    lines = [
        f"{result['n_labelled']:,} labelled, unlabelled: {reasons or 'none'}",
        asked(result),
    ]
    if result["n_unknown_labels"]:
        lines.append(f"{result['n_unknown_labels']:,} times a label that the taxonomy does not have")
    return "\n".join(lines + [f"{escape(level)}: {commonest(result, level)}" for level in result["levels"]])


def tell_corpus(outcome: Values) -> str:
    """What became of one of several corpora."""
    who, result = f"{outcome['state']}  {escape(outcome['title'])}", outcome["result"]
    if result is None:
        return f"{who}: {escape(outcome['reason'])}"
    left_out = f" ({outcome['reason']})" if outcome["reason"] else ""
    labelled = f"{result['n_labelled']:,} of {result['n_sampled']:,} labelled{left_out}"
    return f"{who}: {labelled}: {commonest(result, next(iter(result['levels'])))}"


def commonest(result: Values, level: str) -> str:
    """The labels that most documents have, as shares of those labelled."""
    counts = sorted(result["levels"][level].items(), key=lambda item: -item[1])[:COMMONEST]
    return ", ".join(f"{escape(name)} {count / result['n_labelled']:.0%}" for name, count in counts if count)


def tell_train(result: Values) -> str:
    """The student in a few lines, target by target."""
    return "\n".join(line for name, found in result["targets"].items() for line in tell_target(name, found))


def tell_target(name: str, found: Values) -> list[str]:
    """One target in a line or two."""
    if "accuracy" in found:
        return [
            f"{name} on {found['n_test']} held-out documents: accuracy {figure(found['accuracy'])}"
            f" (always the commonest: {figure(found['majority_share'])}), macro-F1 {figure(found['macro_f1'])}"
        ]
    if "exact_match" in found:
        return [
            f"{name} on {found['n_test']} held-out documents: micro-F1 {figure(found['micro_f1'])}, macro-F1"
            f" {figure(found['macro_f1'])}; all right in {found['exact_match']:.0%} (always the commonest:"
            f" {found['majority_share']:.0%})"
        ]
    return tell_learned_score(name, found)


def tell_learned_score(name: str, found: Values) -> list[str]:
    """A score in two lines, and one more where its quality is known."""
    kept = {key: figure(value) for key, value in found["kept"].items()}
    lines = [
        f"{name} on {found['n_test']} held-out ratings: Spearman {figure(found['spearman'])} to the teacher,"
        f" MAE {figure(found['mae'])}, macro-F1 of int scores {figure(found['macro_f1'])}",
        f"documents worth {found['good_from']:g} or more ({found['good_share']:.0%} of them), kept from"
        f" {found['cut']:.2f} up:"
        f" precision {kept['precision']}, recall {kept['recall']}, F1 {kept['f1']}",
    ]
    return lines + gold("student", found["gold"])


def tell_score(result: Values) -> str:
    """The scored corpus in a line or two."""
    tallies = {"int_score": result["int_score_counts"], **result["label_counts"]}
    counts = {name: ", ".join(f"{key}: {n:,}" for key, n in tally.items()) for name, tally in tallies.items() if tally}
    reused = f", {result['n_shards_reused']} of them reused" if result["n_shards_reused"] else ""
    speed = f"{figure(result['docs_per_s'])} docs/s, " if result["docs_per_s"] else ""
    lines = [
        f"{result['n_scored']:,} scored, {result['n_empty']:,} empty, {result['n_truncated']:,} cut",
        *(f"{name} {told}" for name, told in counts.items()),
        f"{speed}{result['n_shards']} shards{reused}",
    ]
    return "\n".join(lines)


def tell_filter(result: Values) -> str:
    """The kept corpus in a line."""
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in result["dropped"].items()) or "none"
    return f"kept {result['n_kept']:,} ({result['kept_share']:.1%}) from {result['cut']:.2f} up; dropped: {dropped}"


TELL = {
    "plan": tell_plan,
    "rate": tell_rate,
    "probe": tell_probe,
    "label": tell_label,
    "train": tell_train,
    "score": tell_score,
    "filter": tell_filter,
}


def gold(who: str, found: Values | None) -> list[str]:
    """Agreement with a known quality, if there is one."""
    return [f"{who} against the known quality: {agreement(found)}"] if found else []


def figure(value: float | None) -> str:
    """A number with the digits that mean something."""
    return "not defined" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def status(run_folder: Path, stages: Sequence[str]) -> Values:
    """The state of each of these stages, and of others that the folder holds: done, begun (with what is there) or not
    begun."""
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is no folder; give the run folder of a recipe")
    states = {name: state(run_folder / name) for name in TELL if name in stages or (run_folder / name).is_dir()}
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
        if name not in values:
            continue
        found = values[name]
        there = (
            tell(found)
            if found["state"] == "done"
            else ", ".join(f"{k} {v}" for k, v in found.items() if k != "state")
        )
        table.add_row(name, found["state"], there)
    Console(width=max(Console().width, 100)).print(table)
