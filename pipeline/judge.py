"""What the teacher thinks of replies, asked through the one store that `align rate` fills: nothing is paid twice."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from pipeline import consensus, conversations, panel
from pipeline.config import Budget, Recipe
from pipeline.engines.kept import Kept
from pipeline.metrics import Floats
from pipeline.spending import Spending, check_budget, has_prices
from pipeline.teacher import AnswerStore

log = logging.getLogger("gristmill")

STORE = "rate/answers.sqlite"
"""Where answers are kept, in the run folder."""

Pair = tuple[str, str]
"""A prompt and a reply to it."""


class Judge:
    """Teachers that stay loaded from call to call, and one budget for all calls."""

    def __init__(self, recipe: Recipe, limits: Budget) -> None:
        self.raters = panel.of(recipe)
        self.teachers = [rater.teacher for rater in self.raters]
        check_budget(limits, self.teachers)
        self.rate, self.path, self.limits = recipe.rate, recipe.run_folder / STORE, limits
        self.spending = Spending(limits, 1)
        self.open = ExitStack()
        self.n_cut = 0
        """Replies so far that the teacher did not see whole."""
        self.stopped_by: str | None = None
        """The budget that left replies unread."""

    def __enter__(self) -> "Judge":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.store = self.open.enter_context(AnswerStore(self.path))
        self.kept = self.open.enter_context(Kept())
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()
        warn_of_cuts("judge", self.n_cut)

    def __call__(self, pairs: Sequence[Pair]) -> Floats:
        """(n,) scores of replies, NaN where a reply has none."""
        texts = [conversations.text(*pair) for pair in pairs]
        distinct, calibrate = list(dict.fromkeys(texts)), self.rate.calibrate
        raters, store, start = self.raters, self.store, self.kept.start
        got = panel.collect("judge", raters, distinct, store, self.limits, start, calibrate, self.spending, "replies")
        said = [panel.opinions(rater, distinct, store, got.failed, calibrate) for rater in raters]
        found = dict(zip(distinct, consensus.verdicts(said, self.rate.consensus), strict=True))
        scores = [found[text].score for text in texts]
        self.stopped_by = self.spending.stopped_by if got.n_not_asked else self.stopped_by
        self.n_cut += max(sum(answer.was_truncated for answer in each.answers) for each in said)
        return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)

    @property
    def usd(self) -> float | None:
        """What all answers cost, those of earlier runs among them; None where prices are not known."""
        return self.spending.total.usd if all(map(has_prices, self.teachers)) else None


def warn_of_cuts(stage: str, n: int) -> None:
    """Say where a teacher did not see a whole exchange, at whose end the reply stands."""
    if n:
        log.warning(
            "%s: %d replies were cut before the teacher saw them whole; raise teacher.document_tokens", stage, n
        )


def scores(recipe: Recipe, exchanges: Sequence[Pair], limits: Budget) -> list[float | None]:
    """The teacher's score of each reply; None where it gave none that can be read, or the budget was spent."""
    with Judge(recipe, limits) as judge:
        return [None if np.isnan(score) else float(score) for score in judge(exchanges)]
