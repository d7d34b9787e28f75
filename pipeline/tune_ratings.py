"""Tuning a teacher that rates: what settings come to on documents whose score is known."""

import logging
from collections.abc import Hashable, Sequence
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import candidates, comparison, known, metrics, objectives, panel, prompts, space
from pipeline import gold as golds
from pipeline.candidates import Candidate
from pipeline.comparison import Judgement, Side
from pipeline.config import Recipe
from pipeline.corpus import text_id
from pipeline.engines import engine
from pipeline.engines.kept import Kept
from pipeline.errors import UserError, required
from pipeline.known import Known
from pipeline.metrics import Floats
from pipeline.objectives import Objective
from pipeline.panel import Rater, Start
from pipeline.prompts import Line, Prompt
from pipeline.spending import Spending, cost, has_prices
from pipeline.teacher import AnswerStore
from pipeline.trials import Compared, Failed, Outcome, OutOfBudget, Params, Positions

log = logging.getLogger("gristmill")

ENDLESS = (-128.0, 127.0)
"""A scale on which no log-odds are clipped."""
FILLED = (0.025, 0.975)
"""The shares of documents below the ends of a scale that is filled."""
N_STRATA = 10
"""Strata of the known score: its values, or tenths of the documents where it has more."""


def of(recipe: Recipe, kept: Kept, _: Path) -> "Ratings":
    """The task of a recipe with known scores; what cannot be is refused before anything is asked."""
    tune = recipe.tune
    space.read(tune.space, candidates.TUNABLE)
    asked = list(asked_with(recipe).values())
    found = known.read(recipe)
    objective = objectives.of(tune.objective, tune.good_from, found.scores, asked[0].scale)
    for prompt in asked:
        objectives.check_defined(objective, found.scores, prompt.scale)
    warn_of_few(found.scores, objective, 1 if tune.folds else tune.held_out_share)
    return Ratings(recipe, found, objective, engine if tune.workers > 1 else kept.start)


def warn_of_few(scores: Floats, objective: Objective, share: float) -> None:
    """Say so before anything is paid for, where the share that is held out will not tell what is better."""
    truth = scores >= objective.good_from if objective.name in ("auc", "f1") else scores
    if share * objectives.n_others(truth) < objectives.FEWEST_OTHERS:
        log.warning(
            "tune: %d of %d documents are all alike in what is known of them; those held out are too few to tell what"
            " is better, so give more of the others",
            len(scores) - objectives.n_others(truth),
            len(scores),
        )


def asked_with(recipe: Recipe) -> dict[str, Prompt]:
    """The prompt of the recipe, then those of the search space, by their files."""
    given = recipe.tune.space.get("prompt", [])
    first = required(recipe.rate.prompt, "rate.prompt", "prompts/edu-en.md")
    others = [str(path) for path in (given if isinstance(given, list) else [given])]
    return {str(first): loaded(first, "rate.prompt")} | {path: loaded(Path(path)) for path in others}


def loaded(path: Path, setting: str = "tune.space.prompt") -> Prompt:
    """A prompt file that asks for a score; `setting` is where it was named."""
    prompt = prompts.load(path, setting)
    if prompt.read == "label":
        raise UserError(f"{setting}: {path} asks for labels; give prompts that ask for a score")
    return prompt


class Ratings:
    """Rating like people, as a task to tune a teacher for (pipeline.trials.Task)."""

    def __init__(self, recipe: Recipe, documents: Known, objective: Objective, start: Start) -> None:
        self.recipe, self.documents, self.measure, self.start = recipe, documents, objective, start
        self.objective, self.n_documents = objective.name, len(documents.texts)
        self.units = documents.units
        self.strata: Sequence[Hashable] = strata(documents.scores, objective)
        self.spending = Spending(recipe.tune, recipe.tune.workers)
        self.judged: dict[str, dict[int, Judgement]] = {}
        """By the key of a candidate, then by position."""
        self.loaded = cache(loaded)
        self.chosen_on: Positions = np.arange(self.n_documents)

    def tunable(self) -> Sequence[str]:
        """Names that a search space may have."""
        return candidates.TUNABLE

    def key(self, params: Params) -> str:
        """The same for settings that ask and read the same."""
        return candidates.key(self.candidate(params))

    def candidate(self, params: Params) -> Candidate:
        """The prompt and the teacher that settings mean."""
        return candidates.candidate(self.recipe, params, self.documents.pool, self.loaded)

    def recall(self, params: Params) -> None:
        """Counts what was paid for these settings in an earlier run."""
        found, texts = self.candidate(params), self.documents.texts
        with AnswerStore(store(self.recipe)) as answers:
            panel.count_recorded(rater(found), texts, answers, self.spending, found.calibrate)

    def outcome(self, params: Params, positions: Positions) -> Outcome:
        """Asks about documents, as far as the budget goes."""
        found = self.candidate(params)
        said = self.judgements(found, positions)
        if len(said) < len(positions):
            raise OutOfBudget(str(self.spending.stopped_by))
        figures = comparison.in_figures(list(said.values()))
        if self.recipe.tune.usd_weight and figures["usd_per_1000"] is None:
            raise Failed(f"tune.usd_weight: the price of {found.teacher.model} is not known")
        value = self.value(self.fitted(params, positions), positions)
        if value is None:
            raise Failed(f"{self.objective} is not defined: the scores of {len(positions)} documents are too alike")
        price = self.recipe.tune.usd_weight * (figures["usd_per_1000"] or 0.0)
        return Outcome(value - price, {self.objective: value, **figures})

    def compared(
        self, best: Sequence[Params], chosen_on: Sequence[Positions], held_out: Sequence[Positions]
    ) -> Compared:
        """The best of each fold and the defaults on what the fold holds out, as far as the budget goes."""
        self.chosen_on, default = np.unique(np.concatenate(chosen_on)), self.candidate({})
        winners = [self.fitted(params, chosen) for params, chosen in zip(best, chosen_on, strict=True)]
        there = [self.asked_both(*each) for each in zip(winners, repeat(default), held_out, strict=False)]
        return comparison.compare(
            self.objective,
            self.together(winners, chosen_on, there),
            self.together([default] * len(winners), chosen_on, there),
            len(winners),
        )

    def settings(self, best: Params, folder: Path) -> dict[str, Any]:
        """What a recipe needs to rate like this."""
        return candidates.settings(self.fitted(best, self.chosen_on), self.recipe, folder)

    def told(self, best: Params) -> dict[str, Any]:
        """How many documents are set aside for examples, how far people agree, and the line that was fitted."""
        line, before = self.fitted(best, self.chosen_on).prompt.line, self.candidate(best).prompt
        people = self.documents.people
        shared = before.scale if objectives.is_on(self.documents.scores, before.scale) else None
        return {
            "n_examples": self.documents.n_aside,
            "ceiling": golds.between_raters(people, shared) if people else None,
            "fitted_line": line.model_dump() if line and line != before.line else None,
        }

    # -- asking

    def judgements(self, candidate: Candidate, positions: Positions) -> dict[int, Judgement]:
        """What the teacher makes of documents, before a line is laid through log-odds; those that the budget left out
        are absent, and nothing is asked twice."""
        asked = without_line(candidate)
        there = self.judged.setdefault(candidates.key(asked), {})
        missing = [position for position in positions.tolist() if position not in there]
        if missing:
            there.update(self.ask(asked, missing))
        return {position: there[position] for position in positions.tolist() if position in there}

    def ask(self, candidate: Candidate, positions: list[int]) -> dict[int, Judgement]:
        """Ask about documents; one that the budget left no room to ask again counts as left out."""
        texts, asked = [self.documents.texts[position] for position in positions], rater(candidate)
        with AnswerStore(store(self.recipe)) as answers:
            limits, calibrate = self.recipe.tune, candidate.calibrate
            got = panel.collect("tune", [asked], texts, answers, limits, self.start, calibrate, self.spending)
            said = panel.opinions(asked, texts, answers, got.failed, calibrate)
            paid = tokens(asked, texts, answers)
        left_out = {"not_asked", "truncated"} if got.n_not_asked else {"not_asked"}
        return {
            position: Judgement(score, reading.reason, sum(paid[text]), price(candidate, *paid[text]))
            for position, text, score, reading in zip(
                positions, texts, said.scores.tolist(), said.readings, strict=True
            )
            if reading.reason not in left_out
        }

    def scores(self, candidate: Candidate, positions: Positions) -> Floats:
        """(n,) scores of documents that were asked about, NaN where there is none."""
        found = np.array([each.score for each in self.judgements(candidate, positions).values()], dtype=np.float64)
        line, scale = candidate.prompt.line, candidate.prompt.scale
        return np.clip(line.offset + line.slope * found, *scale) if has_line(candidate.prompt) and line else found

    def asked_both(self, a: Candidate, b: Candidate, positions: Positions) -> Positions:
        """Those documents that both were asked about; the budget may have left some out."""
        first, stopped_by = self.judgements(a, positions), self.spending.stopped_by
        there = first.keys() & self.judgements(b, positions).keys()
        self.spending.stopped_by = stopped_by or self.spending.stopped_by
        return np.array([position for position in positions.tolist() if position in there], dtype=np.int64)

    # -- judging

    def value(self, candidate: Candidate, positions: Positions) -> float | None:
        """The objective on documents, what has to be fitted being fitted on these; None where it is not defined."""
        side = self.side(candidate, positions, positions)
        return objectives.value(self.objective, side.truth, side.guess)

    def side(self, candidate: Candidate, chosen: Positions, held: Positions, several: bool = False) -> Side:
        """A teacher on documents, what has to be fitted being fitted on those that it was chosen on; scores that are
        ranked are standardised where those of `several` teachers are put together."""
        truth, scale, like = self.documents.scores, candidate.prompt.scale, self.scores(candidate, chosen)
        objectives.check_defined(self.measure, truth, scale)
        if not np.isfinite(like).any():
            why = comparison.reasons(list(self.judgements(candidate, chosen).values()))
            raise Failed(f"no document has a score: {why}")
        cut = metrics.best_cut(truth[chosen] >= self.measure.good_from, objectives.filled(like, like))
        scores = objectives.filled(self.scores(candidate, held), like)
        compared = objectives.sides(self.measure, truth[held], scores, scale, cut)
        if several and self.objective in objectives.RANKED:
            compared = compared[0], objectives.standardised(scores, like)
        on_one_scale = self.measure.binary or objectives.is_on(truth, scale)
        whole = objectives.whole(self.measure, truth[held], scores, scale, cut) if on_one_scale else None
        return Side(*compared, whole, list(self.judgements(candidate, held).values()))

    def together(self, folds: list[Candidate], chosen_on: Sequence[Positions], held: Sequence[Positions]) -> Side:
        """The candidate of each fold on what the fold holds out."""
        several = len({candidates.key(without_line(each)) for each in folds}) > 1
        sides = [self.side(*each, several) for each in zip(folds, chosen_on, held, strict=True)]
        return comparison.joined(sides)

    def fitted(self, params: Params, chosen: Positions) -> Candidate:
        """The candidate of settings. A line belongs to what it was fitted for: where something else is asked than by
        the defaults, it is fitted again to the documents chosen on, unless that makes it worse."""
        found = self.candidate(params)
        if not has_line(found.prompt) or "prompt.line" in params or candidates.key(found) == self.key({}):
            return found
        before, scores = self.value(found, chosen), self.documents.scores
        known_scores = scores[chosen] if objectives.is_on(scores, found.prompt.scale) else None
        prompt = with_line(found.prompt, self.scores(without_line(found), chosen), known_scores)
        value = self.value(found._replace(prompt=prompt), chosen)
        better = value is not None and (before is None or value >= before)
        return found._replace(prompt=prompt) if better else found


def has_line(prompt: Prompt) -> bool:
    """Whether a prompt's scores lie on a line through log-odds."""
    return prompt.read == "choices" and prompt.line is not None


def without_line(candidate: Candidate) -> Candidate:
    """The candidate with log-odds for scores, if it lays a line through them: they are scores on an endless line."""
    endless = {"line": Line(offset=0, slope=1), "scale": ENDLESS}
    prompt = candidate.prompt.model_copy(update=endless if has_line(candidate.prompt) else {})
    return candidate._replace(prompt=prompt)


def with_line(prompt: Prompt, log_odds: Floats, scores: Floats | None) -> Prompt:
    """The prompt with its line fitted to known scores of the same documents (n,); without any, or where they don't
    rise with the log-odds, laid so that the scores fill the scale."""
    fitted = None if scores is None else candidates.with_line(prompt, log_odds, scores)
    low, high = np.nanquantile(log_odds, FILLED)
    if fitted or not low < high:
        return fitted or prompt
    slope = (prompt.scale[1] - prompt.scale[0]) / float(high - low)
    line = Line(offset=candidates.short(prompt.scale[0] - slope * float(low)), slope=candidates.short(slope))
    return prompt.model_copy(update={"line": line})


def strata(scores: Floats, objective: Objective) -> list[str]:
    """Good or not where the objective asks for that, and the stratum of the known score: (n,)."""
    values, tenths = np.unique(scores), np.quantile(scores, np.linspace(0, 1, N_STRATA + 1)[1:-1])
    parts = np.searchsorted(values if len(values) <= N_STRATA else tenths, scores, side="right")
    good = scores >= objective.good_from if objective.name in ("auc", "f1") else np.zeros(len(scores), dtype=bool)
    return [f"{is_good:d} {part:02d}" for is_good, part in zip(good.tolist(), parts.tolist(), strict=True)]


def store(recipe: Recipe) -> Path:
    """Where answers are recorded: where rate finds them again."""
    return recipe.run_folder / "rate" / "answers.sqlite"


def rater(candidate: Candidate) -> Rater:
    """Who is asked."""
    return Rater(candidate.prompt, candidate.teacher, called=str(candidate.teacher.model))


def tokens(asked: Rater, texts: list[str], answers: AnswerStore) -> dict[str, tuple[int, int]]:
    """Prompt and answer tokens that each text has taken."""
    taken = dict.fromkeys(texts, (0, 0))
    by_id = {text_id(text): text for text in texts}
    for key, _, answer in panel.recorded(asked, texts, answers):
        text = by_id[key.rpartition(":")[2]]
        taken[text] = taken[text][0] + answer.prompt_tokens, taken[text][1] + answer.answer_tokens
    return taken


def price(candidate: Candidate, prompt_tokens: int, answer_tokens: int) -> float | None:
    """US dollars, if the prices are known."""
    return cost(candidate.teacher, prompt_tokens, answer_tokens) if has_prices(candidate.teacher) else None
