"""How well a student learned each target: the figures on its test part."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

from pipeline import metrics
from pipeline.metrics import Floats

T = TypeVar("T")

PerLabel = dict[str, dict[str, float | int]]
"""Precision, recall, F1 and support (documents that have the label) of each label that occurs on either side."""


class ScoreFigures(BaseModel, frozen=True, extra="forbid"):
    """How well a score was learned; every figure but `cut` is on the test part, which nothing was chosen on."""

    n_test: int
    n_missing: int
    """Documents without this score, of which something else is known."""
    strength: float
    """Ridge penalty."""
    good_from: float
    """Teacher score from which a document counts as good."""
    good_share: float
    """Share of the test part that is: the precision of keeping everything."""
    cut: float
    """Student score that finds them best, chosen on the validation part."""
    spearman: float | None
    mae: float
    macro_f1: float
    auc: float | None
    """Student's score against good or not by the teacher."""
    kept: dict[str, float]
    """Precision, recall and F1 of what the student keeps at `cut`, against the teacher."""
    kept_at_good_from: dict[str, float]
    """The same with the student cut at good_from itself."""
    gold: dict[str, Any] | None
    """The student against the known quality."""


class LabelFigures(BaseModel, frozen=True, extra="forbid"):
    """How well one label of several was learned, on the test part."""

    n_test: int
    n_missing: int
    """Documents without this label, of which something else is known."""
    n_rare_labels: int
    """Labels that fewer than two documents of the train part have."""
    strength: float
    """Penalty on the squared weights: 1 / C."""
    accuracy: float
    majority_share: float
    """Accuracy of always guessing the commonest label of the train part."""
    macro_f1: float
    per_label: PerLabel
    confusion: dict[str, dict[str, int]]
    """Documents by the teacher's label, then by the student's; pairs that do not occur are left out."""


class MultiLabelFigures(BaseModel, frozen=True, extra="forbid"):
    """How well any number of labels was learned, on the test part."""

    n_test: int
    n_missing: int
    """Documents whose labels are not known, of which something else is; one that has none is no such."""
    n_rare_labels: int
    """Labels that fewer than two documents of the train part have."""
    strength: float
    """Penalty on the squared weights: 1 / C."""
    exact_match: float
    """Share of documents with all labels right."""
    majority_share: float
    """Exact match of always guessing the commonest set of labels of the train part."""
    micro_f1: float
    macro_f1: float
    per_label: PerLabel


Figures = ScoreFigures | LabelFigures | MultiLabelFigures


def of_score(
    truth: Floats,
    guess: Floats,
    scale: tuple[float, float],
    good_from: float,
    cut: float,
    gold: dict[str, Any] | None,
    n_missing: int,
    strength: float,
) -> ScoreFigures:
    """Student's scores (n,) against the teacher's."""
    good = truth >= good_from
    return ScoreFigures(
        n_test=len(truth),
        n_missing=n_missing,
        strength=strength,
        good_from=good_from,
        good_share=float(good.mean()),
        cut=cut,
        spearman=metrics.spearman(truth, guess),
        mae=float(np.mean(np.abs(truth - guess))),
        macro_f1=metrics.macro_f1(metrics.int_scores(truth, scale), metrics.int_scores(guess, scale)),
        auc=metrics.auc(good, guess),
        kept=metrics.kept_class(good, guess >= cut),
        kept_at_good_from=metrics.kept_class(good, guess >= good_from),
        gold=gold,
    )


def of_label(
    learned: list[str], truth: list[str], guess: list[str], all_labels: Sequence[str], n_missing: int, strength: float
) -> LabelFigures:
    """Student's labels against the teacher's; `learned` are those of the train part."""
    figures = per_label([{label} for label in truth], [{label} for label in guess])
    return LabelFigures(
        n_test=len(truth),
        n_missing=n_missing,
        n_rare_labels=n_rare(all_labels, Counter(learned)),
        strength=strength,
        accuracy=share_equal(truth, guess),
        majority_share=share_equal(truth, [commonest(learned)] * len(truth)),
        macro_f1=macro_f1(figures),
        per_label=figures,
        confusion=confusion(truth, guess),
    )


def of_labels(
    learned: list[frozenset[str]],
    truth: list[frozenset[str]],
    guess: list[frozenset[str]],
    all_labels: Sequence[str],
    n_missing: int,
    strength: float,
) -> MultiLabelFigures:
    """Student's sets of labels against the teacher's; `learned` are those of the train part."""
    figures = per_label(truth, guess)
    return MultiLabelFigures(
        n_test=len(truth),
        n_missing=n_missing,
        n_rare_labels=n_rare(all_labels, Counter(label for labels in learned for label in labels)),
        strength=strength,
        exact_match=share_equal(truth, guess),
        majority_share=share_equal(truth, [commonest(learned)] * len(truth)),
        micro_f1=micro_f1(truth, guess),
        macro_f1=macro_f1(figures),
        per_label=figures,
    )


def per_label(truth: Sequence[set[str] | frozenset[str]], guess: Sequence[set[str] | frozenset[str]]) -> PerLabel:
    """Precision, recall, F1 and support of every label that occurs on either side, in the order of the alphabet."""
    figures: PerLabel = {}
    for label in sorted(set().union(*truth, *guess)):
        has, said = (np.array([label in labels for labels in side], dtype=bool) for side in (truth, guess))
        figures[label] = {**metrics.kept_class(has, said), "support": int(has.sum())}
    return figures


def macro_f1(figures: PerLabel) -> float:
    """F1 averaged over the labels that occur on either side; 0 where none does."""
    return sum(each["f1"] for each in figures.values()) / max(len(figures), 1)


def micro_f1(truth: list[frozenset[str]], guess: list[frozenset[str]]) -> float:
    """F1 over all pairs of document and label; 0 where there are none."""
    n_right = sum(len(a & b) for a, b in zip(truth, guess, strict=True))
    return 2 * n_right / max(sum(map(len, truth)) + sum(map(len, guess)), 1)


def share_equal(truth: Sequence[T], guess: Sequence[T]) -> float:
    """Share of documents on which both sides say the same."""
    return sum(a == b for a, b in zip(truth, guess, strict=True)) / len(truth)


def commonest(values: list[T]) -> T:
    """The commonest value; of several, the one that comes first."""
    return Counter(values).most_common(1)[0][0]


def n_rare(labels: Sequence[str], counts: Counter[str]) -> int:
    """Labels that occur, but in fewer than two documents of the train part."""
    return sum(counts[label] < 2 for label in labels)


def confusion(truth: list[str], guess: list[str]) -> dict[str, dict[str, int]]:
    """Documents by true label, then by guessed one."""
    table: dict[str, dict[str, int]] = {}
    for (a, b), count in sorted(Counter(zip(truth, guess, strict=True)).items()):
        table.setdefault(a, {})[b] = count
    return table
