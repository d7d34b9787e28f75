"""Two teachers that rate, on documents that neither was chosen on."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import objectives
from pipeline.trials import Compared


class Judgement(NamedTuple):
    """What a teacher made of a document; the score is NaN where there is none. Tokens of all that it was asked, and
    their price where it is known."""

    score: float
    reason: str | None
    tokens: int
    usd: float | None


class Side(NamedTuple):
    """A teacher on documents, (n,) each: what the objective compares, then the known and its own whole scores, where
    they are on one scale."""

    truth: NDArray[Any]
    guess: NDArray[Any]
    whole: tuple[NDArray[np.int8], NDArray[np.int8]] | None
    said: list[Judgement]


def in_figures(said: list[Judgement]) -> dict[str, Any]:
    """What is known beside the objective; None where nothing was asked."""
    if not said:
        return {"unscored_rate": None, "tokens_per_document": None, "usd_per_1000": None}
    prices = [each.usd for each in said]
    known_prices = [usd for usd in prices if usd is not None]
    return {
        "unscored_rate": sum(each.reason is not None for each in said) / len(said),
        "tokens_per_document": sum(each.tokens for each in said) / len(said),
        "usd_per_1000": 1000 * sum(known_prices) / len(said) if len(known_prices) == len(said) else None,
    }


def reasons(said: list[Judgement]) -> str:
    """Why there is no score, the commonest reason first."""
    return ", ".join(f"{reason} {n}" for reason, n in Counter(each.reason for each in said).most_common())


def joined(folds: list[Side]) -> Side:
    """All folds together."""
    truth, guess = (np.concatenate(side) for side in zip(*(fold[:2] for fold in folds), strict=True))
    whole = [fold.whole for fold in folds if fold.whole is not None]
    both = [np.concatenate(side) for side in zip(*whole, strict=True)] if len(whole) == len(folds) else None
    said = [each for fold in folds for each in fold.said]
    return Side(truth, guess, (both[0], both[1]) if both else None, said)


def compare(name: str, best: Side, default: Side, n_folds: int) -> Compared:
    """Both in figures, and by how much the best, or what was best on the others of each fold, is better."""
    sides = (best, default)
    values = [objectives.value(name, side.truth, side.guess) for side in sides]
    figures = [
        {
            "n": len(side.said),
            name: value,
            f"{name}_interval": objectives.interval(name, side.truth, side.guess),
            **in_figures(side.said),
        }
        for side, value in zip(sides, values, strict=True)
    ]
    gain = None if values[0] is None or values[1] is None else values[0] - values[1]
    interval = None if gain is None else objectives.gain_interval(name, best[:2], default[:2], n_folds)
    confusion = objectives.confusion(*best.whole) if best.whole else None
    return Compared(figures[0], figures[1], gain, interval, confusion)
