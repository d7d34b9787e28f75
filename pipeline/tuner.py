"""Searching the parameters of any estimator, with its figures from rows that it was not chosen on."""

import logging
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier, is_regressor
from sklearn.model_selection import cross_val_predict
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted

from pipeline import findings, panel, search, splits, text_metrics
from pipeline.config import Budget, Tune, digest
from pipeline.errors import UserError
from pipeline.generation import Generator, filled, units
from pipeline.spending import Spending
from pipeline.text_metrics import Metric
from pipeline.trials import FEWEST, Compared, Failed, Outcome, Params, Positions, Trial, winner

log = logging.getLogger("gristmill")

FOLDS = 5
"""Parts in which an estimator that learns is judged on the rows it is chosen on."""
GREEDY: Params = {"temperature": 0.0}


class Tuner(MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc]
    """Finds the parameters with which an estimator's predictions come closest to y, and how much better than its own
    they are on rows held out.

    `space` has a list of values for each parameter, or a range {"low": 0, "high": 1} with step or log; `metric` is
    what text_metrics.metric takes, without it the estimator's own. `storage` is the file of an Optuna study that a
    later fit goes on with. After fit: best_params_, best_estimator_ (fitted to all rows), best_score_ and
    default_score_ (on the rows chosen on), held_out_ (figures of both on the others, the gain and its 95% interval),
    trials_, and sentence_, which says whether there is a gain to rely on.
    """

    def __init__(
        self,
        estimator: Any,
        space: dict[str, Any],
        metric: str | Callable[[list[Any], list[Any]], Any] | None = None,
        search: str = "tpe",
        trials: int = 30,
        halving: bool = False,
        held_out_share: float = 0.4,
        seed: int = 0,
        storage: str | Path | None = None,
        workers: int = 1,
    ) -> None:
        self.estimator = estimator
        self.space = space
        self.metric = metric
        self.search = search
        self.trials = trials
        self.halving = halving
        self.held_out_share = held_out_share
        self.seed = seed
        self.storage = storage
        self.workers = workers

    def fit(self, X: Any, y: Any) -> "Tuner":  # noqa: N803
        """Searches; y holds the right answer of each row, or several."""
        check_consistent_length(X, y)
        if len(y) < FEWEST:
            raise UserError(f"Tuner: {len(y)} rows; give at least {FEWEST}")
        settings, task = self.settings(), Rows(self.estimator, X, list(y), metric_of(self.estimator, self.metric))
        chosen_on, held_out = parts(task, settings.held_out_share, self.seed)
        with study_file(self.storage) as file:
            tried = search.search(task, self.space, chosen_on, settings, self.seed, file, tell)
        self.trials_ = with_greedy(task, tried, chosen_on)
        won = winner(self.trials_)
        self.best_params_, self.best_score_, self.default_score_ = won.params, won.value, tried[0].value
        compared = task.compared([won.params], [chosen_on], [held_out])
        self.held_out_ = {name: value for name, value in compared._asdict().items() if name != "confusion"}
        self.sentence_ = findings.sentence(task.objective, won, compared)
        self.best_estimator_ = clone(self.estimator).set_params(**won.params).fit(X, y)
        return self

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """The predictions of the best."""
        check_is_fitted(self)
        return self.best_estimator_.predict(X)  # type: ignore[no-any-return]

    def score(self, X: Any, y: Any) -> float:  # noqa: N803
        """The metric of the best's predictions."""
        check_consistent_length(X, y)
        metric = metric_of(self.estimator, self.metric)
        return text_metrics.score(metric, list(self.predict(X)), list(y))

    def settings(self) -> Tune:
        """The search, as a recipe would have it."""
        given = ("search", "trials", "halving", "held_out_share", "workers")
        try:
            return Tune.model_validate({name: getattr(self, name) for name in given})
        except ValidationError as error:
            raise UserError(f"Tuner: {panel.explain(error)}") from None


def metric_of(estimator: Any, metric: Any) -> Metric:
    """The metric asked for, or the estimator's own."""
    if metric is not None:
        return text_metrics.metric(metric)
    usual = "accuracy_score" if is_classifier(estimator) else "r2_score" if is_regressor(estimator) else None
    own = getattr(estimator, "metric", None) if isinstance(estimator, Generator) else usual
    if own is None:
        raise UserError(f"Tuner: {type(estimator).__name__} has no metric of its own; give metric=...")
    return text_metrics.metric(own)


def parts(task: "Rows", held_out_share: float, seed: int) -> tuple[Positions, Positions]:
    """Rows to choose on and rows held out; whole units, evenly by stratum."""
    chosen_on, held_out = splits.sides(task.units, task.strata, held_out_share, seed)
    if min(len(chosen_on), len(held_out)) < FOLDS:
        what = f"{len(chosen_on)} to choose on and {len(held_out)} held out; {FOLDS} each are the least"
        raise UserError(f"Tuner: held_out_share {held_out_share:g} makes of {task.n_documents} rows {what}")
    return chosen_on, held_out


@contextmanager
def study_file(storage: str | Path | None) -> Iterator[Path]:
    """The file of the study; without a name it goes at the end."""
    if storage is not None:
        yield Path(storage)
        return
    with tempfile.TemporaryDirectory(prefix="gristmill-") as folder:
        yield Path(folder) / "study.sqlite"


def tell(trial: Trial) -> None:
    """Log a trial."""
    what = f"{trial.value:.4g}" if trial.value is not None else f"{trial.state}: {trial.reason}"
    log.info("trial %s: %s %s", trial.number if trial.number >= 0 else "defaults", what, trial.params)


def with_greedy(task: "Rows", tried: list[Trial], chosen_on: Positions) -> list[Trial]:
    """The trials, greedy decoding among them where an estimator's own parameters sample."""
    own = task.estimator
    if not isinstance(own, Generator) or own.temperature == 0:
        return tried
    if task.key(GREEDY) in {task.key(trial.params) for trial in tried}:
        return tried
    begin, number = time.perf_counter(), 1 + tried[-1].number
    try:
        greedy = search.trial_of(number, GREEDY, "complete", task.outcome(GREEDY, chosen_on), begin)
    except (Failed, UserError) as error:
        greedy = search.trial_of(number, GREEDY, "failed", None, begin, str(error))
    tell(greedy)
    return [*tried, greedy]


# -- the task ---------------------------------------------------------------------------------------------------------


class Rows:
    """An estimator's predictions, as a task to tune it for (pipeline.trials.Task)."""

    def __init__(self, estimator: Any, rows: Any, right: list[Any], metric: Metric) -> None:
        self.estimator, self.rows, self.right, self.metric = estimator, rows, right, metric
        self.objective, self.n_documents = metric.name, len(right)
        self.strata: Sequence[Hashable] = right if is_classifier(estimator) else [0] * len(right)
        is_asked = isinstance(estimator, Generator)
        self.units = units(filled(estimator.template, rows)) if is_asked else np.arange(len(right))
        self.spending = Spending(Budget())

    def tunable(self) -> Sequence[str]:
        """The estimator's parameters."""
        return sorted(self.estimator.get_params())

    def key(self, params: Params) -> str:
        """The same for parameters that predict the same."""
        found = self.with_params(params)
        if isinstance(found, Generator):
            return found.key()
        return digest({name: repr(value) for name, value in found.get_params().items()})

    def recall(self, params: Params) -> None:
        """There is no budget."""

    def outcome(self, params: Params, positions: Positions) -> Outcome:
        """The metric of the predictions for these rows."""
        value = text_metrics.score(self.metric, self.predicted(params, positions), self.right_at(positions))
        return Outcome(value, {self.objective: value})

    def compared(
        self, best: Sequence[Params], chosen_on: Sequence[Positions], held_out: Sequence[Positions]
    ) -> Compared:
        """The best and the defaults on the rows held out, having learned, if they learn, from those chosen on."""
        folds = list(zip(best, chosen_on, held_out, strict=True))
        ours = [answer for params, chosen, held in folds for answer in self.predicted(params, held, chosen)]
        theirs = [answer for _, chosen, held in folds for answer in self.predicted({}, held, chosen)]
        right = [answer for held in held_out for answer in self.right_at(held)]
        return text_metrics.compared(self.metric, ours, theirs, right)

    def settings(self, best: Params, folder: Path) -> dict[str, Any]:
        """The parameters themselves."""
        del folder
        return best

    def told(self, best: Params) -> dict[str, Any]:
        """Nothing more."""
        del best
        return {}

    # -- predicting

    def with_params(self, params: Params) -> Any:
        """A fresh estimator with these parameters; raises UserError where it takes none of that name."""
        try:
            return clone(self.estimator).set_params(**params)
        except ValueError as error:
            raise UserError(f"Tuner: {' '.join(str(error).split())[:200]}") from None

    def predicted(self, params: Params, positions: Positions, learn_from: Positions | None = None) -> list[Any]:
        """Predictions for some rows. An estimator that learns does so from other rows, or from each part of these for
        the rest of them."""
        estimator, table = self.with_params(params), taken(self.rows, positions)
        try:
            if isinstance(estimator, Generator):
                return list(estimator.predict(table))
            if learn_from is None:
                return list(cross_val_predict(estimator, table, self.right_at(positions), cv=FOLDS))
            learned = estimator.fit(taken(self.rows, learn_from), self.right_at(learn_from))
            return list(learned.predict(table))
        except (ValueError, TypeError) as error:
            raise Failed(f"{type(estimator).__name__}: {' '.join(str(error).split())[:200]}") from error

    def right_at(self, positions: Positions) -> list[Any]:
        """The right answers of some rows."""
        return [self.right[position] for position in positions]


def taken(table: Any, positions: Positions) -> Any:
    """Some rows of a DataFrame, a Dataset, an array or a list, in its own kind."""
    if hasattr(table, "iloc"):
        return table.iloc[positions]
    if hasattr(table, "select") and hasattr(table, "column_names"):
        return table.select(positions)
    return table[positions] if hasattr(table, "shape") else [table[position] for position in positions]
