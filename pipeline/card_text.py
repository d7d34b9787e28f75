"""What a model card says, in Markdown."""

import re
from collections.abc import Iterator
from typing import Any

from pipeline import loaders
from pipeline.head import Head
from pipeline.student import Student

MEASURES = {
    "spearman": "Spearman's rank correlation",
    "mae": "Mean absolute error",
    "kappa": "Quadratic weighted kappa (whole scores)",
    "macro_f1": "Macro F1 (whole scores)",
    "auc": "AUC (teacher's score at least good_from)",
    "kept.precision": "Precision of what is kept at `cut`",
    "kept.recall": "Recall of what is kept at `cut`",
    "kept.f1": "F1 of what is kept at `cut`",
    "accuracy": "Accuracy",
    "exact_match": "All labels right",
    "micro_f1": "Micro F1",
    "majority_share": "Always guessing the commonest",
}
"""Figures that the card shows, in this order, by their names in result.json."""

Figures = dict[str, Any]
"""One target's figures, as in train/result.json."""


def sections(student: Student, result: dict[str, Any], origin: dict[str, Any]) -> Iterator[str]:
    """The card's body, part by part."""
    yield introduction(student, origin)
    yield how_to_load(student)
    for name, figures in result.get("targets", {}).items():
        yield quality(name, figures)
    yield intended_use(student)
    yield limits(student, result)
    yield making(student, result, origin)
    yield LICENCE


def title(student: Student) -> str:
    """A name for people."""
    names = ", ".join(head.name for head in student.heads)
    return f"gristmill student: {names}"


def introduction(student: Student, origin: dict[str, Any]) -> str:
    """What it is, in one sentence, and what each output means."""
    teachers = " and ".join(f"`{name}`" for name in origin.get("teachers", ())) or "a large language model"
    of_heads = "\n".join(f"- **{head.name}**: {meaning(head)}" for head in student.heads)
    what = f"Reads a text and says what {teachers} would say of it, at the price of an encoder."
    return f"# {title(student)}\n\n{what}\n\n{of_heads}"


def meaning(head: Head) -> str:
    """What a head's output is."""
    if head.kind == "label":
        return f"one of {len(head.labels)} labels: {', '.join(head.labels)}."
    if head.kind == "labels":
        return f"any of {len(head.labels)} labels: {', '.join(head.labels)}."
    assert head.scale is not None
    low, high = head.scale
    return f"a number, about {low:g} to {high:g} but not clipped. `int_{head.name}` is a whole one, {rounding(head)}."


def rounding(head: Head) -> str:
    """How a score becomes a whole one."""
    assert head.scale is not None
    low, high = head.scale
    if not head.cuts:
        return f"floor({head.name} + 0.5) clipped to {low:g} to {high:g}"
    from_ = ", ".join(f"{low + i:g} from {cut:.3f}" for i, cut in enumerate(head.cuts, start=1))
    return f"{low:g} below the first of these cuts and then {from_}: each occurs as often as the teacher gives it"


def how_to_load(student: Student) -> str:
    """Code for each loader that is exact."""
    shape = f"(n_texts, {sum(len(head.labels) or 1 for head in student.shown)})"
    what = ", ".join(name for head in student.shown for name in head.labels or (head.name,))
    parts = [
        "## Use\n\nThe folder is complete: nothing else is downloaded.",
        code(
            f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{PLACE}")\n'
            f'found = model.encode(["A text."])  # {shape}: {what}'
        ),
    ]
    if loaders.CLASSIFICATION in student.loaders:
        parts.append(
            code(
                f'from transformers import pipeline\n\nclassify = pipeline("text-classification", "{PLACE}")\n'
                'found = classify(["A text."], truncation=True)'
            )
        )
    else:
        parts.append(
            '`AutoModelForSequenceClassification` and `pipeline("text-classification")` cannot load it: with this'
            " encoder and head they would not give the same scores."
        )
    parts.append(
        "With gristmill, which also gives the whole scores and reads long texts"
        " as set in training:\n\n"
        + code(f'from pipeline.student import load\n\nfound = load("{PLACE}").predict(["A text."])')
    )
    return "\n\n".join(parts)


PLACE = "path/to/this/folder"


def code(text: str, language: str = "python") -> str:
    """A block of code, fenced by more backticks than it holds."""
    longest = max(map(len, re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def quality(name: str, figures: Figures) -> str:
    """A target's figures on the test part."""
    rows = [
        f"| {measure(known, figures)} | {value:.3f} | {between(interval) if interval else ''} |"
        for known, value, interval in told(figures, MEASURES)
    ]
    if not rows:
        return ""
    n = f" of {figures['n_test']} documents" if "n_test" in figures else ""
    table = "\n".join(["| Measure | Value | 95% interval |", "|---|---|---|", *rows])
    said = [
        f"## How well it follows its teacher: {name}\n\nOn a test part{n} that nothing was learned from or chosen on.",
        table,
        of_cut(figures),
        of_rounding(figures),
        of_ceiling(figures.get("ceiling")),
        of_curve(figures.get("learning_curve")),
    ]
    return "\n\n".join(part for part in said if part)


def of_cut(figures: Figures) -> str:
    """What the kept class is."""
    if "cut" not in figures or "good_from" not in figures:
        return ""
    share = f" ({figures['good_share']:.0%} of the documents are)" if "good_share" in figures else ""
    return (
        f"A document is good when the teacher gives it at least {figures['good_from']:g}{share}; the student keeps it"
        f" from {figures['cut']:.3f}. When filtering, look at what is kept: the macro F1 averages over all whole"
        " scores, rare and common alike."
    )


def of_rounding(figures: Figures) -> str:
    """What either rounding would keep."""
    shares, kappas = figures.get("kept_shares"), (figures.get("kappa"), figures.get("kappa_half_up"))
    if not shares or not {"fitted", "half_up"} <= shares.keys():
        return ""
    half_up = f" and has kappa {kappas[1]:.3f}" if isinstance(kappas[1], float) else ""
    return (
        f"Whole scores of at least {figures['good_from']:g} go to {shares['fitted']:.1%} of the test part with fitted"
        f" cuts; rounding half up gives them to {shares['half_up']:.1%}{half_up}."
    )


def of_ceiling(ceiling: dict[str, Any] | None) -> str:
    """How well the teacher agrees with itself."""
    if not ceiling or not isinstance(ceiling.get("spearman"), float):
        return ""
    kappa = f" and kappa {ceiling['kappa']:.3f}" if isinstance(ceiling.get("kappa"), float) else ""
    return (
        f"The ceiling: asked twice, the teacher agrees with itself to Spearman {ceiling['spearman']:.3f}{kappa}"
        f" ({ceiling.get('n', 'some')} documents)."
    )


def of_curve(curve: dict[str, Any] | None) -> str:
    """What more ratings would buy."""
    said = []
    for more in (curve or {}).get("more", ()):
        if isinstance(more.get("gain"), float):
            interval = f" (95% interval {between(more['gain_interval'])})" if more.get("gain_interval") else ""
            said.append(
                f"{more['n_more']} more ratings would buy about {more['gain']:+.3f} {more['measure']}{interval}."
            )
    return " ".join(said)


def intended_use(student: Student) -> str:
    """What it is for, and what not."""
    what = "sort a corpus of texts by score, and keep the best" if student.shown[0].kind == "score" else "sort texts"
    return (
        f"## Intended use\n\nTo {what}, in numbers where a large model would be too slow or dear. Not to judge people,"
        " single texts that matter to someone, or texts unlike those it was taught with."
    )


def limits(student: Student, result: dict[str, Any]) -> str:
    """What is known to go wrong."""
    read = reads(student)
    cut = (
        f" Of the texts it was taught with, {result['n_truncated']} were longer." if result.get("n_truncated") else ""
    )
    return "\n".join(
        [
            "## Limits",
            "",
            f"- {read}{cut}",
            "- It repeats its teacher's errors, and was only held against that teacher.",
            "- It was taught with texts in the languages of its ratings; of others nothing is known.",
            "- Length, source, language or boilerplate may stand in for quality; `gristmill report` shows how far.",
            "- Scores are for ranking within a corpus like the one it was taught with; elsewhere, rate some documents"
            " again (`gristmill audit`).",
        ]
    )


def reads(student: Student) -> str:
    """How much of a text counts."""
    settings = student.encoder_settings
    if settings.windows == "first":
        return f"Only the first {settings.max_tokens} tokens of a text are read."
    which = "at its begin, middle and end" if settings.windows == "spread" else "one after the other"
    how = {"mean": "the mean", "weighted": "the mean weighted by tokens", "max": "the highest"}[settings.aggregate]
    return (
        f"gristmill reads windows of {settings.max_tokens} tokens of a longer text, {which}, and gives {how} of their"
        f" scores; other loaders read only the first {settings.max_tokens} tokens."
    )


def making(student: Student, result: dict[str, Any], origin: dict[str, Any]) -> str:
    """How it was made, down to the prompt."""
    said = ["## How it was made", "\n".join(f"- {line}" for line in facts(student, result, origin))]
    for prompt in origin.get("prompt_files", ()):
        digest = f" (digest `{prompt['digest']}`)" if prompt.get("digest") else ""
        said.append(f"The prompt `{prompt['name']}`{digest}:\n\n{code(prompt['text'], 'markdown')}")
    if origin.get("recipe"):
        said.append(
            "To make it again, `gristmill run recipe.yaml` with this recipe:\n\n" + code(origin["recipe"], "yaml")
        )
    return "\n\n".join(said)


def facts(student: Student, result: dict[str, Any], origin: dict[str, Any]) -> Iterator[str]:
    """Encoder, teachers, prompts and ratings, one a line."""
    settings = student.encoder_settings
    revision = f" at revision `{settings.revision}`" if settings.revision else ""
    frozen = "fine-tuned" if result.get("head") == "full" else "frozen"
    yield f"Encoder: `{settings.model}`{revision}, {frozen}."
    if result.get("head"):
        yield f"Head: {result['head']}."
    if origin.get("teachers"):
        yield f"Teacher: {', '.join(f'`{name}`' for name in origin['teachers'])}."
    if origin.get("prompts"):
        yield f"Prompt digests: {', '.join(f'`{digest}`' for digest in origin['prompts'])}."
    parts = [(name, result.get(f"n_{name}")) for name in ("train", "validation", "test")]
    if all(n is not None for _, n in parts):
        yield "Ratings: " + ", ".join(f"{n} to {PURPOSES[name]}" for name, n in parts) + "."
    if result.get("n_unscored"):
        yield f"Left out, since the teacher gave no readable answer: {result['n_unscored']} documents."


PURPOSES = {"train": "learn from", "validation": "choose on", "test": "report on"}

LICENCE = """## Licence

**To be chosen by whoever publishes this folder.** `license: other` above is a placeholder. The licences of the
encoder, of the teacher (some restrict what may be made of its answers) and of the rated texts bear on the choice."""


def told(figures: Figures, names: dict[str, str]) -> Iterator[tuple[str, float, list[float] | None]]:
    """Name, value and 95% interval of those figures that are there."""
    for name in names:
        outer, _, inner = name.partition(".")
        value = figures.get(outer)
        value = value.get(inner) if inner and isinstance(value, dict) else value
        if isinstance(value, int | float):
            yield name, float(value), (figures.get("intervals") or {}).get(name)


def measure(name: str, figures: Figures) -> str:
    """What a figure is called; the macro F1 of labels is over them."""
    return "Macro F1 (labels)" if name == "macro_f1" and "n_rare_labels" in figures else MEASURES[name]


def between(interval: list[float]) -> str:
    """An interval in words."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"
