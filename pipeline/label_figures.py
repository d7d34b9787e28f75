"""How well a student learned labels: the figures on its test part."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from pipeline import metrics
from pipeline.metrics import Bools, Floats, Interval

T = TypeVar("T")

PerLabel = dict[str, dict[str, float | int]]
"""Precision, recall, F1 and support (documents that have the label) of each label that occurs on either side."""

Intervals = dict[str, Interval | None]
"""95% intervals of figures, by name, from 1,000 resamples of the test part."""


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
    intervals: Intervals
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
    intervals: Intervals
    majority_share: float
    """Exact match of always guessing the commonest set of labels of the train part."""
    micro_f1: float
    macro_f1: float
    per_label: PerLabel


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
        intervals=intervals_of(
            member([{label} for label in truth], figures),
            member([{label} for label in guess], figures),
            {"accuracy": equal_rows, "macro_f1": macro_rows},
        ),
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
        intervals=intervals_of(
            member(truth, figures),
            member(guess, figures),
            {"exact_match": equal_rows, "micro_f1": micro_rows, "macro_f1": macro_rows},
        ),
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


# -- intervals --------------------------------------------------------------------------------------------------------


def member(values: Sequence[set[str] | frozenset[str]], figures: PerLabel) -> Bools:
    """Which documents have which of these labels: (n_documents, n_labels)."""
    found = [[label in labels for label in figures] for labels in values]
    return np.array(found, dtype=bool).reshape(len(values), len(figures))


def intervals_of(truth: Bools, guess: Bools, measures: dict[str, Callable[[Bools, Bools], Floats]]) -> Intervals:
    """The interval of each measure, which takes (n_resamples, n_documents, n_labels) of both sides."""
    positions = np.arange(len(truth))

    def at(measure: Callable[[Bools, Bools], Floats]) -> Callable[[NDArray[np.int64]], Floats]:
        return lambda drawn: np.concatenate([measure(truth[row][None], guess[row][None]) for row in drawn])

    return {name: metrics.bootstrap_interval(at(measure), positions) for name, measure in measures.items()}


def equal_rows(truth: Bools, guess: Bools) -> Floats:
    """Share of documents with all labels right."""
    return np.asarray((truth == guess).all(axis=2).mean(axis=1))


def micro_rows(truth: Bools, guess: Bools) -> Floats:
    """F1 over all pairs of document and label; 0 where there are none."""
    n_right = (truth & guess).sum(axis=(1, 2))
    return np.asarray(2 * n_right / np.maximum(truth.sum(axis=(1, 2)) + guess.sum(axis=(1, 2)), 1))


def macro_rows(truth: Bools, guess: Bools) -> Floats:
    """F1 averaged over the labels that occur on either side; 0 where none does."""
    n_right, n = (truth & guess).sum(axis=1), truth.sum(axis=1) + guess.sum(axis=1)
    return np.asarray((2 * n_right / np.maximum(n, 1)).sum(axis=1) / np.maximum((n > 0).sum(axis=1), 1))
