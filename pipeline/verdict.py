"""What the figures of a run say, in plain sentences; every one of them is left out where its figure is missing."""

from collections.abc import Iterator
from typing import Any

Values = dict[str, Any]


def verdict(results: dict[str, Values]) -> dict[str, list[str]]:
    """Sentences on models that learned from what was kept, on tuning, on the teacher, on the student beside it, and on
    what is kept."""
    learned = target_of(results.get("train", {}))
    aligned = any(results.get(name) for name in ("actor", "reward", "rl"))
    told = {
        "proof": [*of_sentence(results.get("prove", {}))],
        "fine-tuning": [*of_sentence(results.get("finetune", {}))],
        "alignment": [*of_alignment(results.get("rl", {})), *of_preferences(results.get("reward", {}))],
        "tuning": [*of_sentence(results.get("tune", {}))],
        "teacher": [*of_teacher(results.get("rate", {}), "replies" if aligned else "documents")],
        "student": [*of_student(learned), *([] if aligned else of_kept_class(learned)), *of_more_ratings(learned)],
        "kept": [*of_filter(results.get("filter", {})), *of_audit(results.get("audit", {}))],
    }
    return {name: sentences for name, sentences in told.items() if sentences}


def of_sentence(result: Values) -> Iterator[str]:
    """What a stage says itself: whether something is better than what it was compared with."""
    if result.get("sentence"):
        yield f"{str(result['sentence']).rstrip('.')}."


def of_alignment(rl: Values) -> Iterator[str]:
    """What the teacher says of the replies, and whether the reward alone is pleased."""
    yield from of_sentence(rl)
    if rl.get("warning"):
        yield f"{str(rl['warning']).rstrip('.')}."


def of_preferences(reward: Values) -> Iterator[str]:
    """Whether the reward prefers what people prefer."""
    found = reward.get("preferences") or {}
    if found.get("accuracy") is not None:
        share = percent(found["accuracy"], found.get("interval"))
        yield f"The reward prefers the reply that people prefer in {share} of {found.get('n', 0):,} pairs."


def target_of(train: Values) -> Values:
    """The figures of the score, else of the first target."""
    targets = train.get("targets") or {}
    return targets.get("score") or next(iter(targets.values()), {})


def of_teacher(rate: Values, kind: str = "documents") -> Iterator[str]:
    """How much was rated, and how good that is as far as anything tells."""
    if not rate:
        return
    n, of = rate.get("n_scored", 0), rate.get("n_sampled", 0)
    yield f"The teacher gave {n:,} of {of:,} {kind} a score" + (
        f"; {of - n:,} have none, with the reason beside them." if of > n else "."
    )
    for found, who in ((rate.get("human"), "people"), (rate.get("gold"), "the known quality")):
        if found and found.get("n"):
            yield f"Against {who} it has {agreement(found)}, on {found['n']:,} documents."
    if kind == "documents" and not rate.get("human") and not rate.get("gold"):
        yield "How good the teacher itself is, nothing here tells: give human scores (rate.gold) to find out."


def agreement(found: Values) -> str:
    """The figures of an agreement with their intervals."""
    names = {"auc": "an AUC of", "spearman": "a Spearman of", "kappa": "a kappa of"}
    told = [
        f"{said} {ranged(found[name], found.get(f'{name}_interval'))}" for name, said in names.items() if name in found
    ]
    return " and ".join(told) or "no figure"


def of_student(learned: Values) -> Iterator[str]:
    """How far the student follows the teacher, beside how far the teacher follows itself."""
    intervals = learned.get("intervals") or {}
    if "accuracy" in learned:
        yield (
            f"The student gives the teacher's label to {ranged(learned['accuracy'], intervals.get('accuracy'))} of the"
            f" test documents; always guessing the commonest gives {learned.get('majority_share', 0):.2f}."
        )
    if "spearman" not in learned:
        return
    yield (
        f"The student follows the teacher with a Spearman of {ranged(learned['spearman'], intervals.get('spearman'))}"
        f" on {learned.get('n_test', 0):,} test documents that nothing was chosen on."
    )
    ceiling = learned.get("ceiling")
    if ceiling and ceiling.get("spearman") is not None:
        yield (
            f"The teacher agrees with itself at {ranged(ceiling['spearman'], ceiling.get('spearman_interval'))}: "
            + beside(learned["spearman"], intervals.get("spearman"), ceiling)
        )


def beside(value: float | None, interval: Any, ceiling: Values) -> str:
    """Where the student stands below the ceiling."""
    if value is None:
        return "the student's own figure is not defined."
    lows = ceiling.get("spearman_interval")
    if value >= ceiling["spearman"] or (lows and interval and interval[1] >= lows[0]):
        return "the student is about as good as a second answer of the teacher."
    return f"the student reaches {value / ceiling['spearman']:.0%} of that." if ceiling["spearman"] > 0 else ""


def of_kept_class(learned: Values) -> Iterator[str]:
    """Precision and recall of what is kept, beside what keeping everything would give."""
    kept, intervals = learned.get("kept"), learned.get("intervals") or {}
    if not kept:
        return
    precision, recall = (percent(kept.get(name), intervals.get(f"kept.{name}")) for name in ("precision", "recall"))
    yield (
        f"Of what it keeps from {learned.get('cut', 0):.2f} up, {precision} is good by the teacher (of everything,"
        f" {learned.get('good_share', 0):.0%}), and {recall} of what is good is kept."
    )


def of_more_ratings(learned: Values) -> Iterator[str]:
    """What further ratings would buy."""
    for each in (learned.get("learning_curve") or {}).get("more") or []:
        if each.get("sentence"):
            yield f"{each['sentence']}."


def of_filter(filtered: Values) -> Iterator[str]:
    """How much of the corpus is kept, and how good that is."""
    if not filtered:
        return
    n, of = filtered.get("n_kept", 0), filtered.get("n_rows", 0)
    yield f"Of the corpus, {n:,} of {of:,} documents are kept ({filtered.get('kept_share', 0):.1%})."
    known = filtered.get("quality") or {}
    if known.get("precision") is not None:
        precision, recall = (percent(known[name], known[f"{name}_interval"]) for name in ("precision", "recall"))
        yield f"By the {known['judged_by']}, {precision} of them is good, and {recall} of what is good is among them."


def of_audit(audit: Values) -> Iterator[str]:
    """Quality on the corpus itself."""
    if not audit or audit.get("base_rate") is None:
        return
    precision, base_rate, recall = (
        percent(audit.get(name), audit.get(f"{name}_interval")) for name in ("precision", "base_rate", "recall")
    )
    yield (
        f"Rated again on the corpus itself, {precision} of the documents from {audit.get('cut', 0):.2f} up is good,"
        f" against {base_rate} of all; {recall} of the good ones are among them."
    )


def percent(share: float | None, interval: Any = None) -> str:
    """81% [76%, 85%]; only the share where there is no interval."""
    if share is None:
        return "an unknown share"
    return f"{share:.0%}" + (f" [{interval[0]:.0%}, {interval[1]:.0%}]" if interval else "")


def ranged(value: float | None, interval: Any = None, digits: int = 2) -> str:
    """0.81 [0.76, 0.85]; only the figure where there is no interval."""
    if value is None:
        return "not defined"
    return f"{value:.{digits}f}" + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")
