"""Answers to a template filled in row by row: a teacher as an estimator that scikit-learn's searches can tune."""

import asyncio
import atexit
import functools
import json
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.base import BaseEstimator
from sklearn.utils import check_consistent_length

from pipeline import panel, prompts, teacher, text_metrics
from pipeline.config import Budget, Teacher, digest
from pipeline.engines import engine
from pipeline.engines.kept import Kept
from pipeline.errors import UserError
from pipeline.formats import ABSENT, dotted, reach
from pipeline.panel import Desk, Rater, Round, Start
from pipeline.prompts import Prompt
from pipeline.spending import Spending
from pipeline.teacher import Answer, AnswerStore, Ask

log = logging.getLogger("gristmill")

T = TypeVar("T")
Row = Mapping[str, Any]
"""Values by the names of their columns."""

OWN = (
    *("model", "engine", "temperature", "top_p", "top_k", "min_p", "tfs", "top_a", "repetition_penalty", "max_tokens"),
    *("seed", "document_tokens"),
)
"""Settings of the teacher that are parameters of a Generator as they are."""


class Generator(BaseEstimator):  # type: ignore[misc]
    """Writes an answer to each row with a language model: an estimator with nothing to fit.

    Rows are texts (the column `text`), dicts, a DataFrame or a `datasets.Dataset`, which scikit-learn's own searches
    take as list(dataset); each {{ column }} of the template is filled in, and control tokens of a chat are plain text
    there. At temperature 0 answers are greedy. One model stays loaded for all Generators of a process. `metric` is
    what text_metrics.metric takes; `teacher` holds further settings of the teacher, such as {"device": "cpu"};
    `answers` is a file that keeps the answers for later runs.
    """

    def __init__(
        self,
        model: str,
        template: str = "{{ text }}",
        metric: str | Callable[[list[Any], list[Any]], Any] = "exact_match",
        engine: str = "transformers",
        system: str | None = None,
        answer_start: str = "",
        chat: bool = True,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        tfs: float | None = None,
        top_a: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] = (),
        max_tokens: int = 256,
        seed: int = 0,
        document_tokens: int = 4096,
        args: dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
        answers: str | Path | None = None,
    ) -> None:
        self.model = model
        self.template = template
        self.metric = metric
        self.engine = engine
        self.system = system
        self.answer_start = answer_start
        self.chat = chat
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.tfs = tfs
        self.top_a = top_a
        self.repetition_penalty = repetition_penalty
        self.stop = stop
        self.max_tokens = max_tokens
        self.seed = seed
        self.document_tokens = document_tokens
        self.args = args
        self.teacher = teacher
        self.answers = answers

    def fit(self, X: Any, y: Any = None) -> "Generator":  # noqa: N803, ARG002
        """Checks settings and columns; there is nothing to learn."""
        self.key()
        text_metrics.metric(self.metric)
        self.columns_ = columns(self.template)
        filled(self.template, X)
        return self

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """(n_rows,) answers without spaces around them; raises UserError where a request failed or a question was too
        long, and what was answered is not asked again."""
        return np.array([answer.text.strip() for answer in self.asked(X)], dtype=object)

    def score(self, X: Any, y: Any) -> float:  # noqa: N803
        """The metric of the answers against y: a right answer, or a list of them, for each row."""
        check_consistent_length(X, y)
        return text_metrics.score(text_metrics.metric(self.metric), list(self.predict(X)), list(y))

    def asked(self, X: Any) -> list[Answer]:  # noqa: N803
        """What the teacher said to each row, in order, with its tokens and how it ended."""
        texts, settings = filled(self.template, X), self.settings()
        prompt = question_prompt(self.system, self.answer_start, self.chat)
        path = Path(self.answers) if self.answers else own_store()

        def ask_all() -> list[Answer]:
            with AnswerStore(path) as store:
                return ask(prompt, settings, texts, Desk(store, Spending(Budget())), running)

        return outside_of_loops(ask_all)

    def key(self) -> str:
        """The same for parameters that ask the same."""
        return key(self.template, question_prompt(self.system, self.answer_start, self.chat), self.settings())

    def settings(self) -> Teacher:
        """The teacher that these parameters describe."""
        own = {name: plain(getattr(self, name)) for name in OWN}
        further = self.teacher or {}
        twice = sorted({*own, "stop", "args"} & further.keys())
        if twice:
            raise UserError(f"Generator: teacher[{twice[0]!r}] is a parameter of its own; give {twice[0]}=...")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        try:
            return Teacher.model_validate({**further, **own, "stop": stop, "args": self.args or {}})
        except ValidationError as error:
            raise UserError(f"Generator: {panel.explain(error)}") from None

    def __sklearn_is_fitted__(self) -> bool:
        return True


def plain(value: Any) -> Any:
    """A number of numpy as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


# -- templates --------------------------------------------------------------------------------------------------------

PLACE = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")


def columns(template: Any) -> list[str]:
    """The columns that a template names, each once; raises UserError where there is none."""
    found = PLACE.findall(template) if isinstance(template, str) else []
    if not found:
        raise UserError(
            f"template {str(template)[:60]!r} names no column; write {{{{ column }}}} where its value goes"
        )
    return list(dict.fromkeys(found))


def fill(template: str, row: Row) -> str:
    """The template with the row's values in their places; a value is never searched for places itself."""
    return PLACE.sub(lambda place: shown(value_of(row, place[1])), template)


def value_of(row: Row, name: str) -> Any:
    """A column's value; a dot reaches into objects."""
    found = reach(dict(row), name)
    if found is ABSENT:
        raise UserError(f"template: there is no column {name!r}; there are: {', '.join(dotted(dict(row))) or 'none'}")
    return found


def shown(value: Any) -> str:
    """A value as the teacher reads it: nothing for a missing one, JSON for lists and objects."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if is_missing(value) else str(value)


def is_missing(value: Any) -> bool:
    """Whether there is no value: None, or what pandas writes for it (NaN, NaT, NA)."""
    return value is None or type(value).__name__ == "NAType" or bool(value != value)


def filled(template: str, table: Any) -> list[str]:
    """The question of each row."""
    columns(template)
    return [fill(template, row) for row in rows(table)]


def rows(table: Any) -> list[Row]:
    """The rows of a DataFrame, a Dataset, an array or a list; one that is a text is its column `text`."""
    if isinstance(table, str | Mapping):
        raise UserError(f"rows: this is a single {type(table).__name__}; give a list of texts or of dicts, or a table")
    is_frame = hasattr(table, "iloc") and hasattr(table, "columns")
    found = table.to_dict("records") if is_frame else list(table)
    for row in found:
        if not isinstance(row, Mapping) and np.ndim(row):
            raise UserError(f"rows: a row is of type {type(row).__name__}; give texts, dicts or a table with names")
    return [row if isinstance(row, Mapping) else {"text": row} for row in found]


def question_prompt(system: str | None, answer_start: str, chat: bool) -> Prompt:
    """The prompt in which a filled-in template is the document."""
    around = {"system": system, "answer_start": answer_start, "chat": chat}
    try:
        return Prompt.model_validate({"name": "template", "body": "{{ text }}", "read": "generate", **around})
    except ValidationError as error:
        raise UserError(prompts.one_line(error)) from None


def units(asked: Sequence[str]) -> NDArray[np.int64]:
    """(n_rows,) rows that ask the same are one unit."""
    return np.unique(np.array(asked, dtype=object), return_inverse=True)[1].astype(np.int64)


def key(template: str, prompt: Prompt, settings: Teacher) -> str:
    """The same for what asks the same."""
    return digest([template, prompt.asked_digest, teacher.identity(prompt, settings)])


# -- asking -----------------------------------------------------------------------------------------------------------


def ask(prompt: Prompt, settings: Teacher, texts: Sequence[str], desk: Desk, start: Start) -> list[Answer]:
    """What the teacher says to each text, in order: what is recorded, and for the rest what it is asked now, as far as
    the budget goes. Raises UserError where a request failed, or a text is longer than the teacher can be asked."""
    questions = teacher.questions(prompt, settings, texts)
    distinct = list(dict.fromkeys(questions))
    recorded = list(desk.store.find(question.key for question in distinct))
    desk.spending.add(settings, recorded)
    if len(recorded) < len(distinct) and desk.spending.left(settings):
        with start(settings) as started:
            panel.ask_round(
                started, Rater(prompt, settings), Round(settings, distinct, {k for k, _ in recorded}), desk
            )
    found = dict(desk.store.find(question.key for question in distinct))
    if len(found) == len(distinct):
        desk.spending.stopped_by = None
    check_failed(len(desk.failed), len(distinct))
    check_whole(list(found.values()), settings)
    return [found.get(question.key, Answer("not_asked")) for question in questions]


def check_failed(n_failed: int, n: int) -> None:
    """Refuse to go on without answers to some requests: they would be taken for poor ones."""
    if n_failed:
        raise UserError(
            f"{n_failed} of {n} requests failed; the other answers are kept, and asking again asks only these"
        )


def check_whole(answers: Sequence[Answer], settings: Teacher) -> None:
    """Refuse answers to questions of which the end was cut off."""
    n_cut = sum(answer.was_truncated for answer in answers)
    if n_cut:
        raise UserError(
            f"{n_cut} of {len(answers)} questions are longer than document_tokens ({settings.document_tokens}), or"
            f" than what max_tokens ({settings.max_tokens}) leaves in the model; change these, or leave the rows out"
        )


LOADED, ONE_AT_A_TIME = Kept(), threading.RLock()
"""The local model of this process."""
atexit.register(LOADED.close)


@contextmanager
def running(settings: Teacher) -> Iterator[Ask]:
    """The teacher; a local one stays loaded, and is asked by one thread at a time."""
    if settings.engine == "openai":
        with engine(settings) as started:
            yield started
        return
    with ONE_AT_A_TIME, LOADED.start(settings) as started:
        yield started


@functools.cache
def own_store() -> Path:
    """An answer store that lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="gristmill-")
    atexit.register(folder.cleanup)
    return Path(folder.name) / "answers.sqlite"


def outside_of_loops(call: Callable[[], T]) -> T:
    """The result of a call that runs an event loop of its own; in a notebook, where one is running, on a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()
