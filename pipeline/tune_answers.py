"""Tuning a teacher to answer like a column of the corpus: rows, a template, a metric."""

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import generation, space, teacher, text_metrics
from pipeline.candidates import ASKED_WITH, INSIDE, taught
from pipeline.config import Corpus, Recipe, Teacher, merge
from pipeline.corpus import column, decoded, read, text_id
from pipeline.engines import engine
from pipeline.engines.kept import Kept
from pipeline.errors import UserError, required
from pipeline.panel import Desk, Start
from pipeline.prompts import Prompt
from pipeline.sample import priority
from pipeline.shards import Counts, Shard, find_shards
from pipeline.spending import Spending, cost, has_prices
from pipeline.teacher import Answer, AnswerStore
from pipeline.text_metrics import Metric
from pipeline.trials import FEWEST, Compared, Failed, Outcome, OutOfBudget, Params, Positions

Row = dict[str, Any]

QUESTION_TOKENS = 4096
"""teacher.document_tokens where the recipe leaves it open: a question cannot be cut, as a document can."""
OWN = ("template", "system", "answer_start", "chat")
"""Settings of tune that are asked with."""
TUNABLE = [*OWN, *ASKED_WITH, *(f"{name}." for name in INSIDE)]
"""Names that a search space may have; one that ends in a dot takes any further name."""


def of(recipe: Recipe, kept: Kept, folder: Path) -> "Answers":
    """The task of a recipe with tune.reference; answers are recorded in the folder."""
    tune = recipe.tune
    space.read(tune.space, TUNABLE)
    reference, metric = str(tune.reference), text_metrics.metric(tune.objective or "exact_match")
    names = [reference, *(name for template in templates(recipe) for name in generation.columns(template))]
    rows = drawn(recipe.corpus, list(dict.fromkeys(names)), reference, tune.sample, recipe.seed)
    if len(rows) < FEWEST:
        what = f"{len(rows)} rows with a value in {reference!r} are used"
        raise UserError(f"tune.reference: of {recipe.corpus.path} {what}; {FEWEST} are the least")
    right = [right_answers(row[reference]) for row in rows]
    check_metric(metric, right)
    start = engine if tune.workers > 1 else kept.start
    return Answers(recipe, metric, rows, right, folder / "answers.sqlite", start)


def check_metric(metric: Metric, right: list[list[str]]) -> None:
    """Refuse, before answers are paid for, a metric that fails even on the right ones."""
    try:
        text_metrics.score(metric, [each[0] for each in right], right)
    except Failed as error:
        raise UserError(f"tune.objective: {error} on the right answers themselves; mend it") from None


# -- rows -------------------------------------------------------------------------------------------------------------


def templates(recipe: Recipe) -> list[str]:
    """The recipe's template, and all that are tried."""
    own = required(recipe.tune.template, "tune.template", "'{{ question }}'")
    tried = recipe.tune.space.get("template", [])
    return [own, *(tried if isinstance(tried, list) else [tried])]


def drawn(corpus: Corpus, names: list[str], reference: str, n: int, seed: int) -> list[Row]:
    """A uniform draw of n distinct rows that have a right answer, in one pass; the columns asked for by name."""
    smallest: dict[int, Row] = {}
    for shard in find_shards(corpus):
        for batch in read(shard, corpus, Counts(), names):
            known = (row for row in rows_of(batch, names, shard) if right_answers(row[reference]))
            smallest |= {priority(text_id(repr(row)), seed): row for row in known}
            smallest = dict(sorted(smallest.items(), key=lambda item: item[0])[:n])
    return list(smallest.values())


def rows_of(batch: pa.RecordBatch, names: list[str], shard: Shard) -> Iterator[Row]:
    """The rows of a batch, those columns only; a dot in a name reaches into structs."""
    values = [decoded(column(batch, name, shard))[0] for name in names]
    return (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))


def right_answers(value: Any) -> list[str]:
    """The right answers that a value holds, empty ones left out."""
    found = value if isinstance(value, list) else [value]
    texts = [generation.shown(each).strip() for each in found]
    return [text for text in texts if text]


# -- the task ---------------------------------------------------------------------------------------------------------


class Answers:
    """Answering like a reference, as a task to tune a teacher for (pipeline.trials.Task); `right` holds the right
    answers of each row."""

    def __init__(
        self, recipe: Recipe, metric: Metric, rows: list[Row], right: list[list[str]], store: Path, start: Start
    ) -> None:
        self.recipe, self.metric, self.rows, self.right = recipe, metric, rows, right
        self.store, self.start = store, start
        self.objective, self.n_documents = metric.name, len(rows)
        self.strata: Sequence[Hashable] = [0] * len(rows)
        self.units = generation.units([generation.fill(str(recipe.tune.template), row) for row in rows])
        self.spending = Spending(recipe.tune, recipe.tune.workers)

    def tunable(self) -> Sequence[str]:
        """Names that a search space may have."""
        return TUNABLE

    def key(self, params: Params) -> str:
        """The same for parameters that ask the same."""
        template, prompt, settings = self.asked_with(params)
        return generation.key(template, prompt, settings)

    def recall(self, params: Params) -> None:
        """Counts what was paid for these parameters earlier."""
        template, prompt, settings = self.asked_with(params)
        texts = [generation.fill(template, row) for row in self.rows]
        with AnswerStore(self.store) as store:
            keys = [question.key for question in teacher.questions(prompt, settings, texts)]
            self.spending.add(settings, list(store.find(keys)))

    def outcome(self, params: Params, positions: Positions) -> Outcome:
        """The metric of the answers to these rows."""
        answers = self.answers(params, positions)
        if any(answer.finish == "not_asked" for answer in answers):
            raise OutOfBudget(str(self.spending.stopped_by))
        figures = self.figures(params, answers)
        value = text_metrics.score(self.metric, texts_of(answers), self.right_at(positions))
        return Outcome(value - self.price(figures), {self.metric.name: value, **figures})

    def price(self, figures: dict[str, Any]) -> float:
        """What the price takes off the objective."""
        weight, usd = self.recipe.tune.usd_weight, figures["usd_per_1000"]
        if weight and usd is None:
            raise Failed("tune.usd_weight: the teacher's prices are not known")
        return weight * (usd or 0.0)

    def compared(
        self, best: Sequence[Params], chosen_on: Sequence[Positions], held_out: Sequence[Positions]
    ) -> Compared:
        """The best of each fold and the defaults on the rows that it holds out, as far as the budget goes; nothing has
        to be fitted."""
        del chosen_on
        folds = zip(best, held_out, strict=True)
        ours = [each for params, positions in folds for each in self.answers(params, positions)]
        theirs = [each for positions in held_out for each in self.answers({}, positions)]
        right = [each for positions in held_out for each in self.right_at(positions)]
        asked = [i for i in range(len(right)) if "not_asked" not in (ours[i].finish, theirs[i].finish)]
        ours, theirs = ([side[i] for i in asked] for side in (ours, theirs))
        right = [right[i] for i in asked]
        found = text_metrics.compared(self.metric, texts_of(ours), texts_of(theirs), right)
        return found._replace(
            best={**found.best, **self.figures(best[0], ours)}, default={**found.default, **self.figures({}, theirs)}
        )

    def settings(self, best: Params, folder: Path) -> dict[str, Any]:
        """Settings of `teacher` and `tune` that differ from the recipe's, nested as there."""
        del folder
        template, prompt, settings = self.asked_with(best)
        before, after = (each.model_dump(mode="json") for each in (self.recipe.teacher, settings))
        asked = {"template": template, **{name: getattr(prompt, name) for name in OWN[1:]}}
        found = {
            "teacher": {name: value for name, value in after.items() if value != before[name]},
            "tune": {name: value for name, value in asked.items() if value != getattr(self.recipe.tune, name)},
        }
        return {section: values for section, values in found.items() if values}

    def told(self, best: Params) -> dict[str, Any]:
        """Nothing more."""
        del best
        return {}

    # -- asking

    def asked_with(self, params: Params) -> tuple[str, Prompt, Teacher]:
        """The template, the prompt around it and the teacher, these parameters laid over the recipe's settings."""
        tune, given = self.recipe.tune, self.recipe.teacher.model_dump(exclude_unset=True)
        base = Teacher.model_validate(merge({"document_tokens": QUESTION_TOKENS}, given))
        template, *around = (params.get(name, getattr(tune, name)) for name in OWN)
        prompt = generation.question_prompt(*around)
        return template, prompt, taught(base, {name: params[name] for name in params if name not in OWN})

    def answers(self, params: Params, positions: Positions) -> list[Answer]:
        """What the teacher says to these rows, as far as the budget goes."""
        template, prompt, settings = self.asked_with(params)
        texts = [generation.fill(template, self.rows[position]) for position in positions]
        with AnswerStore(self.store) as store:
            return generation.ask(prompt, settings, texts, Desk(store, self.spending), self.start)

    def right_at(self, positions: Positions) -> list[list[str]]:
        """The right answers of some rows."""
        return [self.right[position] for position in positions]

    def figures(self, params: Params, answers: Sequence[Answer]) -> dict[str, Any]:
        """What is known of answers beside the metric."""
        settings, n = self.asked_with(params)[2], max(len(answers), 1)
        read, written = (sum(getattr(answer, f"{kind}_tokens") for answer in answers) for kind in ("prompt", "answer"))
        return {
            "unscored_rate": sum(answer.finish == "refused" for answer in answers) / n,
            "truncated_rate": sum(answer.finish == "length" for answer in answers) / n,
            "tokens_per_document": (read + written) / n,
            "usd_per_1000": 1000 * cost(settings, read, written) / n if has_prices(settings) else None,
        }


def texts_of(answers: Sequence[Answer]) -> list[str]:
    """What was written, without spaces around it."""
    return [answer.text.strip() for answer in answers]
