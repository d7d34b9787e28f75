"""What a run did, for a person at a terminal."""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import places, training, tried
from pipeline import training_summary as trained
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.pictures import short
from pipeline.teacher import AnswerStore
from pipeline.tracking import check_format, read_json

Values = dict[str, Any]

COMMONEST = 5
"""Labels that are named."""
PARTS = ("n_train", "n_validation", "n_test")
EXPANSIONS = ("expand/actor", "expand/prompts", "expand/reward")
ALIGNMENT = ("prepare", *EXPANSIONS, "actor", "reward", "rl")
TRAININGS = (*ALIGNMENT, "finetune", "prove")
"""Stages that train language models, or make what these learn from; a run folder may hold nothing else."""


def show(values: Values) -> None:
    """A table with a row per stage, then examples and where everything is."""
    console = Console(width=max(Console().width, 100))
    table = Table("stage", "documents", "time", "what came out")
    for name, tell in TELL.items():
        if name in values:
            found = values[name]
            n, told = documents(found), tell_part(found) if "part" in found else tell(found)
            table.add_row(name, f"{n:,}" if n else "", f"{found['seconds']:.1f} s", told)
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
    show_further(console, values)


def further(values: Values) -> dict[str, str]:
    """Commands that go on from a tuning, by what they do."""
    if "tune" not in values:
        return {}
    folder = Path(values["run_folder"]) / "tune"
    commands = {
        "rate like the best": (folder / "best.yaml", f"gristmill rate {shlex.quote(str(folder / 'best.yaml'))}"),
        "look at the trials": (
            folder / "study.sqlite",
            f"optuna-dashboard {shlex.quote(f'sqlite:///{folder}/study.sqlite')}",
        ),
    }
    return {what: command for what, (path, command) in commands.items() if path.exists()}


def show_further(console: Console, values: Values) -> None:
    """Commands on lines of their own, which a terminal does not break, to be copied."""
    for what, command in further(values).items():
        console.print(f"to {what}: {command}", markup=False, highlight=False, soft_wrap=True)


def documents(result: Values) -> int:
    """How many documents a stage worked on."""
    return int(
        result.get("n_documents")
        or result.get("n_audited")
        or result.get("n_sampled")
        or result.get("n_rows")
        or result.get("n_gold")
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


def tell_tune(result: Values) -> str:
    """What was found, how good it is where nothing was chosen, and what it took."""
    objective, best, default = result["objective"], result["best"], result["default"]
    found = "the defaults" if best["number"] == tried.DEFAULTS else f"trial {best['number']}"
    counts = ", ".join(f"{result[f'n_{state}']} {state}" for state in ("complete", "pruned", "failed"))
    lines = [
        escape(result["sentence"]),
        f"{escape(tried.called(objective))} on {result['n_held_out']:,} held out: best {beside(best, objective)},"
        f" default {beside(default, objective)}",
        escape(f"best is {found}: {tried.settings(best['params'])}".rstrip(": ")),
        *people(result["ceiling"]),
        f"{result['n_trials']} trials: {counts}",
        *stopped(result),
        f"asked {result['n_asked']:,}, reused {result['n_reused']:,} answers;"
        f" {tokens(result['prompt_tokens'] + result['answer_tokens'])}"
        + ("" if result["usd"] is None else f", {dollars(result['usd'])}"),
    ]
    return "\n".join(lines)


def people(ceiling: Values | None) -> list[str]:
    """How far people agree among themselves, if several scored."""
    return [f"people among themselves: {agreement(ceiling)}"] if ceiling else []


def tell_rate(result: Values) -> str:
    """The teachers in a few lines."""
    unscored = ", ".join(f"{reason} {count}" for reason, count in result["unscored"].items())
    lines = [
        f"{result['n_scored']:,} scored, unscored: {unscored or 'none'}; mean score {figure(result['mean_score'])}",
        asked(result),
        *stopped(result),
    ]
    if len(result["rounds"]) > 1:
        told = ", ".join(f"round {each['round']}: {each['n_documents']:,}" for each in result["rounds"])
        lines.append(f"documents by round: {told}; means and counts are of round 0, the sample")
    if result["attributes"]:
        lines.append("means: " + ", ".join(f"{name} {figure(mean)}" for name, mean in result["attributes"].items()))
    lines += planned_and_actual(result)
    lines += [f"{each['between']}: {agreement(each)}" for each in result["agreement"]]
    lines += gold("teacher", result["gold"])
    if result["human"]:
        lines.append(f"with people: {agreement(result['human'])}")
        lines += people(result["human"].get("between_people"))
    return "\n".join(lines)


def tell_part(result: Values) -> str:
    """One part of the asking or of the trainings, in a line or two."""
    if "n_trainings" in result:
        lines = [f"part {result['part']}: {result['n_trainings']} trainings, {result['n_trained']} of them done now"]
    else:
        told = f"part {result['part']}: asked {result['n_asked']:,}, reused {result['n_reused']:,} answers"
        lines = [f"{told}; {result['n_failed']:,} requests failed", *stopped(result)]
    return "\n".join([*lines, "when all parts are done, the same command without --shard puts them together"])


def stopped(result: Values) -> list[str]:
    """What stopped the asking early, if something did."""
    what = result["stopped_by"]
    return [f"stopped by {what}; the same command with more of it goes on"] if what else []


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
    if "part" in result:
        return f"{who}: part {result['part']}, asked {result['n_asked']:,}, reused {result['n_reused']:,} answers"
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
    """One target in a few lines."""
    if "accuracy" in found:
        return [
            f"{name} on {found['n_test']} test documents: accuracy {measured(found, 'accuracy')}"
            f" (always the commonest: {figure(found['majority_share'])}), macro-F1 {measured(found, 'macro_f1')}"
        ]
    if "exact_match" in found:
        return [
            f"{name} on {found['n_test']} test documents: micro-F1 {measured(found, 'micro_f1')}, macro-F1"
            f" {measured(found, 'macro_f1')}; all right in {found['exact_match']:.0%} (always the commonest:"
            f" {found['majority_share']:.0%})"
        ]
    return tell_learned_score(name, found)


def tell_learned_score(name: str, found: Values) -> list[str]:
    """A score: how well it was learned, how well it keeps, how it is rounded, what more ratings would buy."""
    kept = ", ".join(
        f"{called} {measured(found, f'kept.{key}')}"
        for key, called in {"precision": "precision", "recall": "recall", "f1": "F1"}.items()
    )
    return [
        f"{name} on {found['n_test']} test documents: Spearman {measured(found, 'spearman')} to the teacher, kappa"
        f" {measured(found, 'kappa')}, MAE {measured(found, 'mae')}",
        *ceiling(found["ceiling"]),
        f"documents worth {found['good_from']:g} or more ({found['good_share']:.0%} of them), kept from"
        f" {found['cut']:.2f} up: {kept}; macro-F1 of all int scores {measured(found, 'macro_f1')}",
        roundings(found),
        *(each["sentence"] for each in (found["learning_curve"] or {}).get("more", []) if each["sentence"]),
        *gold("student", found["gold"]),
    ]


def measured(found: Values, name: str) -> str:
    """A figure of a target, with its 95% interval."""
    value: Any = found
    for key in name.split("."):
        value = value[key]
    ends = found["intervals"].get(name)
    return figure(value) + (f" [{figure(ends[0])}, {figure(ends[1])}]" if ends else "")


def ceiling(found: Values | None) -> list[str]:
    """The teacher with itself, if it was asked twice."""
    return [f"the teacher with itself: {agreement(found)}"] if found else []


def roundings(found: Values) -> str:
    """Both ways to write whole scores."""
    fitted, half_up = found["kept_shares"]["fitted"], found["kept_shares"]["half_up"]
    written = "fitted cuts" if found["rounding"] == "fitted" else "half up"
    return (
        f"int scores from {found['good_from']:g} up: {fitted:.0%} at fitted cuts, {half_up:.0%} half up; kappa"
        f" {figure(found['kappa'])} as written ({written}), {figure(found['kappa_half_up'])} half up"
    )


def tell_score(result: Values) -> str:
    """The scored corpus in a few lines."""
    half_up = result["half_up_counts"]
    tallies = {"int_score": result["int_score_counts"], **result["label_counts"]}
    if half_up != result["int_score_counts"]:
        tallies = {"int_score": result["int_score_counts"], "half up": half_up, **result["label_counts"]}
    counts = {name: ", ".join(f"{key}: {n:,}" for key, n in tally.items()) for name, tally in tallies.items() if tally}
    reused = f", {result['n_shards_reused']} of them reused" if result["n_shards_reused"] else ""
    again = f", {result['n_duplicates']:,} of the same text as another" if result["n_duplicates"] else ""
    lines = [
        f"{result['n_scored']:,} scored{again}, {result['n_empty']:,} empty; of {result['n_truncated']:,} not all was"
        f" read ({result['n_windows']:,} windows)",
        *(f"{name} {told}" for name, told in counts.items()),
        f"{result['n_shards']} shards{reused}",
        *behind(result["cascade"], result["n_ruled_out"] / max(result["n_rows"], 1)),
        *speed(result),
    ]
    return "\n".join(lines)


def behind(cascade: Values | None, share: float) -> list[str]:
    """What a cascade ruled out, and what is sure about the rest."""
    if cascade is None:
        return []
    return [
        f"cascade: {share:.0%} ruled out before the encoder; recall at least {cascade['recall']:g} (95% sure) of the"
        f" best {cascade['keep_share']:.0%}; about {cascade['speed_up']:.1f}x"
    ]


def speed(result: Values) -> list[str]:
    """How fast scoring went, if something was scored, and where the time went."""
    if not result["tokens_per_s"]:
        return []
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["time_shares"].items())
    halved = (
        f"; halved {result['n_memory_halvings']:,} times for lack of memory" if result["n_memory_halvings"] else ""
    )
    return [
        f"{figure(result['docs_per_s'])} docs/s, {short(result['tokens_per_s'])} tokens/s, padding"
        f" {result['padding_share']:.0%}; {shares}{halved}"
    ]


def tell_cuts(result: Values) -> str:
    """What each cut would keep, a cut a line."""
    lines = [f"{'keeps':11} {'from':>5} {'docs':>5} {'tokens':>6} precision         recall"]
    for cut in result["cuts"]:
        told = [f"{beside(cut, name):17}" if cut[name] is not None else f"{'not known':17}" for name in BOTH]
        kept = f"{short(cut['documents']):>5} {short(cut['tokens']):>6}"
        lines.append(f"{called(cut):11} {cut['score']:5.2f} {kept} {' '.join(told)}".rstrip())
    if result["judged_by"]:
        lines.append(f"judged by {result['n_judged']:,} documents of the {result['judged_by']}; {good_in_all(result)}")
    else:
        lines.append("neither ratings nor an audit tell how good it is")
    return "\n".join(lines)


BOTH = ("precision", "recall")


def called(cut: Values) -> str:
    """A cut in two words."""
    names = {"share": f"best {cut['cut']:.3g}" if cut["cut"] < 0.01 else f"best {cut['cut']:.0%}"}
    return {**names, "int_score": f"int_score {cut['cut']:g}", "student": "student"}[cut["by"]]


def beside(found: Values, name: str) -> str:
    """A figure with the interval that stands beside it."""
    return f"{figure(found[name])}{interval(found, name)}"


def good_in_all(found: Values) -> str:
    """How common good documents are."""
    return f"{beside(found, 'base_rate')} of the corpus is good, from {found['good_from']:g} up"


def tell_audit(result: Values) -> str:
    """Quality on the corpus itself, in a few lines."""
    unscored = ", ".join(f"{reason} {count}" for reason, count in result["unscored"].items())
    lines = [
        f"{result['n_scored']:,} of {result['n_audited']:,} scored by the teacher, unscored: {unscored or 'none'};"
        f" asked {result['n_asked']:,}, reused {result['n_reused']:,} answers",
        *stopped(result),
        f"kept from {result['cut']:.2f} up ({result['cut_from']}), {result['kept_share']:.1%} of the corpus: precision"
        f" {beside(result, 'precision')}, recall {beside(result, 'recall')}; {good_in_all(result)}",
    ]
    for cut in result["by_cut"]:
        told = " ".join(f"{beside(cut, name):17}" for name in BOTH)
        lines.append(f"  from int_score {cut['int_score']}   {told}".rstrip())
    return "\n".join(lines)


def tell_filter(result: Values) -> str:
    """The kept corpus in a line or two."""
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in result["dropped"].items()) or "none"
    start = "" if result["cut"] is None else f" from {result['cut']:.2f} up"
    lines = [f"kept {result['n_kept']:,} ({result['kept_share']:.1%}){start}; dropped: {dropped}"]
    if result["n_tokens_kept"] is not None:
        lines.append(
            f"{result['n_tokens_kept']:,} of {result['n_tokens']:,} tokens (counted by {result['tokens_counted_by']})"
        )
    for who, found in (("estimated for the corpus", result["quality"]), ("test part", result["test_quality"])):
        if found and found["precision"] is not None:
            lines.append(f"{who}: precision {beside(found, 'precision')}, recall {beside(found, 'recall')}")
    return "\n".join(lines)


def tell_export(result: Values) -> str:
    """Each format, its size, and how near its scores are to ours."""
    lines = [
        f"{name}: {escape(found['file'])}, {found['megabytes']:.0f} MB; largest difference"
        f" {found['max_difference']:.1e} on {result['n_documents']:,} documents"
        for name, found in result["formats"].items()
    ]
    return "\n".join([*lines, *([f"uploaded to {result['pushed_to']}"] if result["pushed_to"] else [])])


def tell_report(result: Values) -> str:
    """Where the page is, and what it warns of."""
    return "\n".join([f"{escape(result['page'])} ({result['n_bytes'] / 1e6:.1f} MB)", *result["warnings"]])


TELL = {
    "plan": tell_plan,
    "tune": tell_tune,
    "rate": tell_rate,
    "probe": tell_probe,
    "label": tell_label,
    "train": tell_train,
    "score": tell_score,
    "cuts": tell_cuts,
    "audit": tell_audit,
    "filter": tell_filter,
    "export": tell_export,
    "prepare": trained.tell_counts,
    "expand": trained.tell_counts,
    **dict.fromkeys(EXPANSIONS, trained.tell_counts),
    "actor": trained.tell_actor,
    "rate_replies": tell_rate,
    "reward": trained.tell_reward,
    "rl": trained.tell_rl,
    "finetune": trained.tell_finetune,
    "prove": trained.tell_prove,
    "report": tell_report,
}


def gold(who: str, found: Values | None) -> list[str]:
    """Agreement with a known quality, if there is one."""
    return [f"{who} against the known quality: {agreement(found)}"] if found else []


def figure(value: float | None) -> str:
    """A number with the digits that mean something."""
    return "not defined" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def status(run_folder: Path, stages: Sequence[str]) -> Values:
    """The state of each of these stages, and of others that the folder holds: done, begun (with what is there) or not
    begun. Where language models were trained, only of what the folder holds."""
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is no folder; give the run folder of a recipe")
    there = [name for name in TELL if state(run_folder / name)["state"] != "not begun"]
    expected = () if set(there) & set(TRAININGS) else stages
    states = {name: state(run_folder / name) for name in TELL if name in expected or name in there}
    return {"run_folder": str(run_folder), **states}


def state(folder: Path) -> Values:
    """One stage's state."""
    check_format(folder)
    result = read_json(folder / "result.json")
    if result is not None:
        return {"state": "done", **result}
    if not (folder / "inputs.json").exists():
        return {"state": "not begun"}
    begun: Values = {"state": "begun"}
    if stores := sorted(folder.glob("answers*.sqlite")):
        begun["n_answers"] = sum(map(n_answers, stores))
    if parts := sorted(folder.glob("parts/result.*-of-*.json")):
        totals = Counter(path.stem.partition("-of-")[2] for path in parts)
        begun["parts_done"] = " and ".join(f"{count} of {total}" for total, count in totals.items())
    if curve := training.read_curve(folder):
        begun["n_steps"] = curve[-1]["step"]
    if (folder / "trainings").is_dir():
        begun["n_trainings_done"] = sum(1 for _ in (folder / "trainings").glob("*/predicted.parquet"))
    if (folder / "trials.jsonl").exists():
        begun["n_trials"] = sum(trial.number != tried.DEFAULTS for trial in tried.read(folder.parent))
    if folder.name == "score":
        scored = places.names(places.made(Recipe(run_folder=folder.parent), "score"))
        begun["n_shards_done"] = sum(PurePosixPath(name).name[0] != "." for name in scored)
        begun["n_shards"] = len((read_json(folder / "inputs.json") or {})["shards"])
    return begun


def n_answers(path: Path) -> int:
    """How many answers a store holds."""
    with AnswerStore(path) as store:
        return len(store)


def show_status(values: Values) -> None:
    """A row per stage."""
    table = Table("stage", "state", "what is there", title=values["run_folder"])
    for name, tell in TELL.items():
        if name in values:
            table.add_row(name, values[name]["state"], what_is_there(values[name], tell))
    console = Console(width=max(Console().width, 100))
    console.print(table)
    show_further(console, values)


def what_is_there(found: Values, tell: Callable[[Values], str]) -> str:
    """A stage's result, or how far it is, in words."""
    if found["state"] != "done":
        return ", ".join(f"{name} {value}" for name, value in found.items() if name != "state")
    try:
        return tell(found)
    except KeyError:
        return "written by another version; remove its result.json and run the stage again"
