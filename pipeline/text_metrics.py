"""How close written answers come to the right ones."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import UserError, needs
from pipeline.metrics import Floats, percentile_interval, resamples
from pipeline.trials import Compared, Failed

log = logging.getLogger("gristmill")

RowMetric = Callable[[str, str], float]
"""An answer and a right answer."""


class Metric(NamedTuple):
    """A measure of answers, the higher the better."""

    name: str
    of: Callable[[list[Any], list[Any]], Any]
    """Takes all answers and all right answers (each a text, or several texts that are right); gives a number for each
    row, or one for all rows."""


def metric(named: str | Callable[[list[Any], list[Any]], Any]) -> Metric:
    """A metric by its name: one of ROW_METRICS, evaluate:NAME, FILE.py:FUNCTION or a function of sklearn.metrics; or
    a function as it is, and functions of sklearn as theirs are called."""
    if not isinstance(named, str):
        return by_function(named)
    if named in ROW_METRICS:
        return Metric(named, best_of(ROW_METRICS[named]()))
    kind, _, rest = named.partition(":")
    if kind == "evaluate":
        return Metric(named.rpartition(":")[2], by_evaluate(rest))
    if ".py:" in named:
        path, _, function = named.rpartition(":")
        return Metric(function, from_file(Path(path), function))
    return Metric(named, with_labels(of_sklearn(named)))


def by_function(function: Any) -> Metric:
    """A function, or a functools.partial of one; those of sklearn take the right answers first."""
    if not callable(function):
        raise UserError(f"metric {function!r} is neither a name nor a function")
    inner = getattr(function, "func", function)
    name = getattr(inner, "__name__", type(inner).__name__)
    if not str(getattr(inner, "__module__", "")).startswith("sklearn.metrics"):
        return Metric(name, function)
    check_direction(name)
    return Metric(name, with_labels(function))


# -- a value for each row ---------------------------------------------------------------------------------------------


def best_of(one: RowMetric) -> Callable[[list[Any], list[Any]], list[float]]:
    """The metric for each row; where several answers are right, of the closest."""

    def each(answers: list[Any], references: list[Any]) -> list[float]:
        pairs = zip(answers, references, strict=True)
        return [max(one(str(answer), right) for right in several(reference)) for answer, reference in pairs]

    return each


def several(reference: Any) -> list[str]:
    """The right answers of a row, of which there must be one."""
    found = reference if isinstance(reference, list | tuple | np.ndarray) else [reference]
    there = [str(right) for right in found if right is not None and right == right]
    if not there:
        raise ValueError("a row has no right answer")
    return there


def exact_match() -> RowMetric:
    """1 where both are the same text, however cased and spaced."""

    def same(text: str) -> list[str]:
        return text.casefold().split()

    return lambda answer, right: float(same(answer) == same(right))


class Words:
    """Cuts texts into words of any alphabet for ROUGE, whose own way knows a to z only; on those it is the same."""

    def tokenize(self, text: str) -> list[str]:
        """Words in small letters, without punctuation."""
        return re.findall(r"[^\W_]+", text.lower())


def rouge(kind: str) -> RowMetric:
    """F-measure of ROUGE (Lin 2004), words unstemmed."""
    scorer = needs("rouge_score.rouge_scorer", "tune").RougeScorer([kind], tokenizer=Words())
    return lambda answer, right: float(scorer.score(right, answer)[kind].fmeasure)


def bleu() -> RowMetric:
    """BLEU of a single text, 0 to 1, over as many orders of n-grams as it has (sacrebleu's effective order)."""
    scorer = needs("sacrebleu", "tune").BLEU(effective_order=True)
    return lambda answer, right: float(scorer.sentence_score(answer, [right]).score) / 100


def chrf() -> RowMetric:
    """F-score of character n-grams, 0 to 1 (Popovic 2015; sacrebleu)."""
    scorer = needs("sacrebleu", "tune").CHRF()
    return lambda answer, right: float(scorer.sentence_score(answer, [right]).score) / 100


ROW_METRICS: dict[str, Callable[[], RowMetric]] = {
    "exact_match": exact_match,
    "rouge1": functools.partial(rouge, "rouge1"),
    "rouge2": functools.partial(rouge, "rouge2"),
    "rougeL": functools.partial(rouge, "rougeL"),
    "bleu": bleu,
    "chrf": chrf,
}


# -- by other packages and files --------------------------------------------------------------------------------------

LABELS = (["y_true", "y_pred"], ["y1", "y2"])
"""What the metrics of sklearn call right and given labels."""
SMALLER_IS_BETTER = ("_loss", "_error", "_deviance")
"""Ends of the names of sklearn's other metrics."""


def of_sklearn(name: str) -> Callable[..., Any]:
    """A function of sklearn.metrics that takes right labels and given ones."""
    import sklearn.metrics

    known = [each for each in sklearn.metrics.__all__ if takes_labels(getattr(sklearn.metrics, each))]
    if name in known:
        return getattr(sklearn.metrics, name)  # type: ignore[no-any-return]
    if hasattr(sklearn.metrics, name):
        check_direction(name)
    near = difflib.get_close_matches(name, [*ROW_METRICS, *known], n=1)
    there = f"give {', '.join(ROW_METRICS)}, a function of sklearn.metrics, evaluate:NAME or FILE.py:FUNCTION"
    raise UserError(f"no metric is called {name!r}; " + (f"did you mean {near[0]}?" if near else there))


def takes_labels(function: Any) -> bool:
    """Whether a function needs right labels and given ones, nothing more, and is the better the larger it is."""
    if not inspect.isfunction(function) or not function.__name__.endswith(("_score", "_corrcoef")):
        return False
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.default is each.empty] in LABELS


def check_direction(name: str) -> None:
    """Refuse a metric of sklearn of which less is better."""
    if name.endswith(SMALLER_IS_BETTER):
        raise UserError(f"metric {name!r} is the better the smaller it is; give FILE.py:FUNCTION that turns it round")


def with_labels(function: Callable[..., Any]) -> Callable[[list[Any], list[Any]], Any]:
    """A metric of sklearn on whole answers, spaces around them aside; averages are macro, and a class that no answer
    has counts 0, where it is not said otherwise."""
    given = {"average": "macro", "zero_division": 0, **getattr(function, "keywords", {})}
    options = {name: value for name, value in given.items() if name in inspect.signature(function).parameters}

    def one(answers: list[Any], references: list[Any]) -> Any:
        labels = [bare(answer) for answer in answers]
        right = [closest(label, reference) for label, reference in zip(labels, references, strict=True)]
        if any(isinstance(label, str) for label in labels):
            right = [str(label) for label in right]
        with about_labels():
            return function(right, labels, **options)

    return one


def bare(value: Any) -> Any:
    """A text without spaces around it; anything else as it is."""
    return value.strip() if isinstance(value, str) else value


def closest(label: Any, reference: Any) -> Any:
    """Of several right labels the one that was given, else the first."""
    if not isinstance(reference, list | tuple | np.ndarray):
        return bare(reference)
    right = [bare(each) for each in reference]
    return next((each for each in right if str(each) == str(label)), right[0])


@contextmanager
def about_labels() -> Iterator[None]:
    """Answers are free texts: that there are many of them, or others than the right ones, is no news."""
    with warnings.catch_warnings():
        for message in ("The number of unique classes is greater", "y_pred contains classes not in y_true"):
            warnings.filterwarnings("ignore", message=message)
        yield


def by_evaluate(name: str) -> Callable[[list[Any], list[Any]], float]:
    """A metric of Hugging Face's `evaluate`: its number of the same name, its only one, or NAME:NUMBER."""
    try:
        evaluate = importlib.import_module("evaluate")
    except ModuleNotFoundError:
        raise UserError(f"metric evaluate:{name} needs the package evaluate; run: pip install evaluate") from None
    name, _, wanted = name.partition(":")
    try:
        loaded = evaluate.load(name)
    except Exception as error:  # it comes from the Hub, or from anybody's file
        raise UserError(f"metric evaluate:{name} cannot be loaded ({wording(error)})") from None

    def one(answers: list[Any], references: list[Any]) -> float:
        found = loaded.compute(predictions=answers, references=references)
        numbers = {each: value for each, value in found.items() if isinstance(value, int | float | np.number)}
        key = wanted or (name if name in numbers or len(numbers) != 1 else next(iter(numbers)))
        if key not in numbers:
            raise ValueError(f"it gives {', '.join(numbers)}; write evaluate:{name}:{next(iter(numbers), 'NUMBER')}")
        return float(numbers[key])

    return one


def from_file(path: Path, name: str) -> Callable[[list[Any], list[Any]], Any]:
    """A function of a Python file, called with all answers and all right answers."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise UserError(f"metric {path}:{name}: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is somebody else's and can raise anything
        raise UserError(f"metric {path}:{name}: the file raises {wording(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"metric {path}:{name}: the file has no function {name}")
    return found  # type: ignore[no-any-return]


# -- applied ----------------------------------------------------------------------------------------------------------


def score(metric: Metric, answers: Sequence[Any], references: Sequence[Any]) -> float:
    """The metric over all rows: the mean where it has a value for each; raises Failed where it raises or has none."""
    return float(np.mean(values(metric, answers, references)))


def values(metric: Metric, answers: Sequence[Any], references: Sequence[Any]) -> Floats:
    """(n_rows,), or () of a metric that has one value for all rows."""
    if not len(answers):
        raise Failed(f"metric {metric.name} has no answer to judge")
    try:
        found = np.asarray(metric.of(list(answers), list(references)), dtype=np.float64)
    except Exception as error:  # a metric is anybody's and can raise anything
        raise Failed(f"metric {metric.name} raised {wording(error)}") from error
    if found.shape not in ((), (len(answers),)):
        raise Failed(f"metric {metric.name} gave {found.shape} values for {len(answers)} rows; one, or one for each")
    if not np.isfinite(found).all():
        raise Failed(f"metric {metric.name} gave {found[~np.isfinite(found)].flat[0]}")
    return found


def wording(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


N_RESAMPLES = {0: 200, 1: 1000}
"""Resamples by the number of dimensions of a metric's values: one that has a single value is called for each."""


def compared(metric: Metric, best: Sequence[Any], default: Sequence[Any], references: Sequence[Any]) -> Compared:
    """Two sets of answers to the same rows, with intervals by resampling rows for both alike; None where the metric
    has no value."""
    sides = [judged(metric, answers, references) for answers in (best, default)]
    told = [
        {"n": len(references), metric.name: defined(side[0]), f"{metric.name}_interval": percentile_interval(side[1:])}
        for side in sides
    ]
    gain = sides[0] - sides[1]
    return Compared(told[0], told[1], defined(gain[0]), percentile_interval(gain[1:]))


def judged(metric: Metric, answers: Sequence[Any], references: Sequence[Any]) -> Floats:
    """(1 + n_resamples,) of the metric, on all rows and on resampled ones, NaN where it has no value; (1,) and logged
    where it has none on all rows."""
    try:
        own = values(metric, answers, references)
    except Failed as error:
        log.warning("%s", error)
        return np.full(1, np.nan)
    parts = resamples([np.arange(len(answers))], seed=0, n=N_RESAMPLES[own.ndim])
    rows = np.concatenate([part[0] for part in parts])
    drawn = own[rows].mean(axis=1) if own.ndim else [again(metric, answers, references, row) for row in rows.tolist()]
    return np.array([own.mean(), *drawn])


def defined(value: np.float64) -> float | None:
    """A number, None for NaN."""
    return None if np.isnan(value) else float(value)


def again(metric: Metric, answers: Sequence[Any], references: Sequence[Any], rows: list[int]) -> float:
    """The metric on some rows, NaN where it has no value there."""
    try:
        return score(metric, [answers[row] for row in rows], [references[row] for row in rows])
    except Failed:
        return float("nan")
