"""What is tried when a teacher is tuned: settings, what came of them, and the task they are tried on."""

import math
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import Pending
from pipeline.metrics import Interval
from pipeline.spending import Spending

FEWEST = 20
"""Documents below which nothing can be chosen."""
Params = dict[str, Any]
"""Settings by their names in the search space; none are the defaults."""
Positions = NDArray[Any]
"""(n,) indices of documents."""


class Failed(Exception):
    """Settings that came to nothing; the others go on."""


class OutOfBudget(Pending):
    """The budget of this name ended within a trial, which a larger one takes up again."""


class Outcome(NamedTuple):
    """What came of settings on some documents."""

    value: float
    """The objective, which is maximised; a price has been taken off."""
    figures: dict[str, Any]
    """What else is known: the objective's own figure under its name, unscored_rate, tokens_per_document,
    usd_per_1000."""


class Trial(NamedTuple):
    """Settings that were tried on the documents that are chosen on; number -1 is the defaults."""

    number: int
    params: Params
    state: Literal["complete", "pruned", "failed"]
    value: float | None
    """The objective; of a pruned trial on the documents that it got to."""
    figures: dict[str, Any]
    reason: str | None = None
    """Why it failed."""
    seconds: float = 0.0


class Compared(NamedTuple):
    """Two settings on the same documents, which neither was chosen on."""

    best: dict[str, Any]
    """The objective's figure under its name and its interval under NAME_interval, and the other figures."""
    default: dict[str, Any]
    gain: float | None
    """The best's objective less the default's."""
    gain_interval: Interval | None
    """95%, by resampling documents for both alike."""
    confusion: dict[str, dict[str, int]] | None = None
    """Documents by the right whole score, then by the best's."""


class Task(Protocol):
    """What a teacher is tuned for. Answers are recorded, so that asking again costs nothing."""

    objective: str
    n_documents: int
    strata: Sequence[Hashable]
    """(n_documents,) what is shared out evenly between the documents chosen on and those held out."""
    units: NDArray[np.int64]
    """(n_documents,) documents of one unit, such as copies, are never chosen on and held out at once."""
    spending: Spending
    """What all answers took, against the budget of the whole study."""

    def tunable(self) -> Sequence[str]:
        """Names that a search space may have; one that ends in a dot takes any further name."""
        ...

    def key(self, params: Params) -> str:
        """The same for settings that ask and read the same; raises UserError for settings that cannot be."""
        ...

    def recall(self, params: Params) -> None:
        """Counts what was paid for these settings in an earlier run."""
        ...

    def outcome(self, params: Params, positions: Positions) -> Outcome:
        """Asks about documents; raises Failed, UserError where the teacher cannot be asked so, or OutOfBudget."""
        ...

    def compared(
        self, best: Sequence[Params], chosen_on: Sequence[Positions], held_out: Sequence[Positions]
    ) -> Compared:
        """The best of each fold and the defaults on the documents that it holds out, all together; what has to be
        fitted (a cut) is, on those that the fold's best was chosen on. Without cross-validation there is one fold."""
        ...

    def settings(self, best: Params, folder: Path) -> dict[str, Any]:
        """What a recipe needs to ask like this, nested as there; new prompts are written to the folder."""
        ...

    def told(self, best: Params) -> dict[str, Any]:
        """What else the result tells by its own names, such as a ceiling."""
        ...


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Complete trials, the best first; of equals the defaults, then the earlier."""
    there = [trial for trial in trials if trial.state == "complete" and math.isfinite(value_of(trial))]
    return sorted(there, key=lambda trial: (-value_of(trial), trial.number))


def value_of(trial: Trial) -> float:
    """The objective less the price, NaN where there is none."""
    return math.nan if trial.value is None else trial.value


def winner(trials: Iterable[Trial]) -> Trial:
    """The first of them; one must be complete."""
    return ranked(trials)[0]
