"""Before stage 1: settings of the teacher are searched on documents with a known score or answer, and judged on
others."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline import (
    candidates,
    findings,
    search,
    space,
    splits,
    storage,
    study,
    trial_table,
    tried,
    tune_answers,
    tune_ratings,
)
from pipeline import gold as golds
from pipeline.config import Recipe, merge
from pipeline.engines.kept import Kept
from pipeline.errors import UserError
from pipeline.metrics import Interval
from pipeline.shards import find_shards, fingerprint
from pipeline.spending import check_budget, has_prices
from pipeline.storage import write_text
from pipeline.tracking import Result, Stage, read_json, stage
from pipeline.trials import Compared, Failed, OutOfBudget, Params, Positions, Task, Trial, winner

log = logging.getLogger("gristmill")

Fold = tuple[Positions, Positions]
"""The documents that are chosen on, and those that are held out."""

FEWEST = 5
"""Documents below which a part says nothing."""
KNOWN_FROM = ("gold", "gold_column", "reference")
"""Settings of which one says where scores or answers are known from."""
OF_ANSWERS = {"reference", "template", "system", "answer_start", "chat", "objective"}
"""Settings of tune that say what is asked, not how it is searched."""


class TuneResult(Result):
    """What was found, judged on documents that it was not chosen on."""

    task: str
    """ratings or answers."""
    objective: str
    n_gold: int
    """Documents with a known score or answer that were used."""
    n_chosen_on: int
    n_held_out: int
    n_examples: int
    """Documents set aside as examples, with what is nearly a copy of one; they are part of no figure."""
    folds: int | None
    n_trials: int
    """Trials beside the defaults."""
    n_complete: int
    n_pruned: int
    n_failed: int
    stopped_by: str | None
    """The budget that ended the search; the same command with more of it goes on."""
    default: dict[str, Any]
    """The defaults: `chosen_on` is the objective there, the other figures are of the documents held out."""
    best: dict[str, Any]
    """The same of the best trial, with its number (-1: the defaults) and its settings."""
    gain: float | None
    """The best's objective less the default's, on the documents held out."""
    gain_interval: Interval | None
    is_better: bool
    """Whether it is not the defaults, and the whole interval of the gain is above 0."""
    sentence: str
    ceiling: dict[str, Any] | None
    """How far people agree among themselves, where several gave scores."""
    importances: dict[str, float]
    """Share of each setting in how the trials differ."""
    confusion: dict[str, dict[str, int]] | None
    """Documents held out by their known whole score, then by the best's."""
    fitted_line: dict[str, float] | None
    """Offset and slope of the line in best.yaml's prompt, where it was fitted again to the documents chosen on."""
    n_asked: int
    n_reused: int
    prompt_tokens: int
    answer_tokens: int
    usd: float | None
    """At the prices given; None without them."""


def run(recipe: Recipe, redo: bool = False) -> TuneResult:
    """Search, then judge what was found; answers already recorded are not asked for again."""
    kind = check(recipe)
    with stage("tune", recipe, inputs(recipe, kind)) as work, Kept() as kept:
        anew = read_json(work.folder / "inputs.json") != work.inputs or (redo and has_failed(work.folder))
        done = work.finished(TuneResult, redo, not anew and is_whole(work.folder), start=False)
        if done:
            return done
        task = TASKS[kind](recipe, kept, work.folder)
        check_space(recipe, task)
        folds = parts(recipe, task)
        begin(work, anew)
        trials, stopped_by = searched(work, task, folds)
        best = winner(trials)
        compared = judged(task, trials, folds)
        told = findings.sentence(task.objective, best, compared)
        written = best.params if findings.is_worth_it(compared, recipe.tune.usd_weight) else {}
        write_best(work, task.settings(written, work.folder), told, kind)
        return work.finish(summarise(work, task, kind, folds, trials, compared, written, stopped_by))


TASKS: dict[str, Callable[[Recipe, Kept, Path], Task]] = {"ratings": tune_ratings.of, "answers": tune_answers.of}


def check(recipe: Recipe) -> str:
    """What is tuned, ratings or answers, if the settings go together."""
    tune, given = recipe.tune, [name for name in KNOWN_FROM if getattr(recipe.tune, name) is not None]
    if len(given) != 1:
        what = " and ".join(f"tune.{name}" for name in given) or "no known score or answer"
        raise UserError(f"tune: {what} given; give one of tune.gold, tune.gold_column and tune.reference")
    if tune.folds and (tune.search == "tpe" or tune.halving):
        what = "halving" if tune.halving else "search tpe"
        raise UserError(
            f"tune.folds: {what} goes by all documents, so that no fold is held out from it; set search random or grid"
            " without halving, or leave folds out"
        )
    check_budget(tune, [recipe.teacher])
    if tune.usd_weight and not has_prices(recipe.teacher):
        raise UserError(
            f"tune.usd_weight: the price of {recipe.teacher.model} is not known; give"
            " teacher.usd_per_million_prompt_tokens and teacher.usd_per_million_answer_tokens"
        )
    if recipe.teacher.batch_folder:
        raise UserError("teacher.batch_folder: each trial would wait for a batch; leave it out to tune")
    if tune.workers > 1 and recipe.teacher.engine != "openai":
        raise UserError(
            f"tune.workers: {recipe.teacher.engine} runs one trial at a time; leave it at 1, or use engine openai"
        )
    return "answers" if given == ["reference"] else "ratings"


def check_space(recipe: Recipe, task: Task) -> None:
    """Refuse values that the teacher's settings do not take, and a space in which everything is asked alike."""
    each = [{name: value} for name, values in recipe.tune.space.items() for value in space.some(values)]
    for params in each:
        candidates.taught(recipe.teacher, params, "tune.space")
    keys = set()
    for params in [{}, *each]:
        try:
            keys.add(task.key(params))
        except UserError as error:  # beside other settings it may be fine
            keys.add(str(error))
    if len(keys) == 1:
        raise UserError(
            f"tune.space: {', '.join(recipe.tune.space)} {'makes' if len(recipe.tune.space) == 1 else 'make'} no"
            " difference to what is asked or read (prompts that compare choices generate nothing); vary something else"
        )


def inputs(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Everything that decides what is found."""
    tune = recipe.tune
    shards = find_shards(recipe.corpus) if recipe.corpus.path or not tune.gold else []
    asked = tune_ratings.asked_with(recipe) if kind == "ratings" else {}
    metric = Path((tune.objective or "").rpartition(":")[0])
    return {
        "corpus": recipe.corpus.identity(),
        "shards": {shard.name: fingerprint(shard) for shard in shards},
        "gold": golds.content(tune.gold, "tune.gold") if tune.gold else None,
        "prompts": {path: prompt.digest for path, prompt in asked.items()},
        "teacher": recipe.teacher.identity(),
        "calibrate": recipe.rate.calibrate,
        "near_duplicates": recipe.train.near_duplicates,
        "tune": {name: value for name, value in tune.identity().items() if name != "gold"},
        "metric": storage.content(metric) if metric.suffix == ".py" and metric.is_file() else None,
        "seed": recipe.seed,
    }


# -- what is there already --------------------------------------------------------------------------------------------


def is_whole(folder: Path) -> bool:
    """Whether the search came to its end, and what it found is there."""
    result = read_json(folder / "result.json") or {}
    return (folder / "best.yaml").exists() and result.get("stopped_by") is None


def has_failed(folder: Path) -> bool:
    """Whether a finished search has failed trials."""
    return bool((read_json(folder / "result.json") or {}).get("n_failed"))


def begin(work: Stage, anew: bool) -> None:
    """Start, without the trials of other inputs; their answers stay."""
    for path in work.folder.glob("study.sqlite*") if anew else ():
        path.unlink()
    if anew:
        (work.folder / "trials.jsonl").unlink(missing_ok=True)
    work.start()


# -- search -----------------------------------------------------------------------------------------------------------


def parts(recipe: Recipe, task: Task) -> list[Fold]:
    """Documents chosen on and held out: a single fold, or one after the other; whole units, evenly by stratum."""
    n, share = recipe.tune.folds, recipe.tune.held_out_share
    if n:
        dealt = splits.folds(task.units, task.strata, n, recipe.seed)
        found = [(np.flatnonzero(dealt != fold), np.flatnonzero(dealt == fold)) for fold in range(n)]
    else:
        found = [splits.sides(task.units, task.strata, share, recipe.seed)]
    fewest = min(len(positions) for fold in found for positions in fold)
    if fewest < (1 if n else FEWEST):
        setting = "tune.folds" if n else "tune.held_out_share"
        raise UserError(f"{setting}: of {task.n_documents} documents a part would get {fewest}; choose another number")
    return found


def searched(work: Stage, task: Task, folds: Sequence[Fold]) -> tuple[list[Trial], str | None]:
    """The defaults and all trials, in order of number, and the budget that ended the search. Room is kept for asking
    the defaults and the best about what is held out."""
    recipe, found, stopped_by = work.recipe, dict[int, Trial](), None
    recall(task, tried.read(recipe.run_folder))
    task.spending.n_reserved = 0 if recipe.tune.folds else 2 * len(folds[0][1])
    go_on = partial(task.spending.left, recipe.teacher)
    with trial_table.live(task.objective, n_trials(recipe, task)) as show:

        def step(trial: Trial) -> None:
            found[trial.number] = trial
            write_trials(work.folder / "trials.jsonl", found.values())
            show(trial)

        given = (task, recipe.tune.space, chosen_on(folds), recipe.tune, recipe.seed)
        try:
            search.search(*given, file_of(work), step, go_on)
        except OutOfBudget as error:
            stopped_by = str(error)
    stopped_by, task.spending.n_reserved = stopped_by or task.spending.stopped_by, 0
    if not found:
        raise UserError(f"tune: {stopped_by} leaves no room for the defaults; raise it")
    return [found[number] for number in sorted(found)], stopped_by


def n_trials(recipe: Recipe, task: Task) -> int:
    """At most so many trials."""
    combinations = space.grid(space.read(recipe.tune.space, task.tunable()))
    return min(recipe.tune.trials, combinations or recipe.tune.trials)


def chosen_on(folds: Sequence[Fold]) -> Positions:
    """What is chosen on in any fold."""
    return np.unique(np.concatenate([chosen for chosen, _ in folds]))


def recall(task: Task, trials: Iterable[Trial]) -> None:
    """Count what an earlier run paid for; settings that cannot be have cost nothing."""
    for trial in trials:
        with suppress(UserError):
            task.recall(trial.params)


def write_trials(path: Path, trials: Iterable[Trial]) -> None:
    """A line for each trial."""
    write_text(path, "".join(json.dumps(trial._asdict(), ensure_ascii=False) + "\n" for trial in trials))


def file_of(work: Stage) -> Path:
    """Optuna's study."""
    return work.folder / "study.sqlite"


# -- what was found ---------------------------------------------------------------------------------------------------


def judged(task: Task, trials: Sequence[Trial], folds: Sequence[Fold]) -> Compared:
    """The best and the defaults on documents held out; with several folds, what was best on the others of each."""
    chosen, held_out = ([fold[side] for fold in folds] for side in (0, 1))
    found = [winner(trials)] if len(folds) == 1 else [best_on(task, trials, each) for each in chosen]
    try:
        return task.compared([trial.params for trial in found], chosen, held_out)
    except Failed as error:
        raise UserError(f"tune: nothing can be compared on the documents held out ({error})") from None


def best_on(task: Task, trials: Sequence[Trial], positions: Positions) -> Trial:
    """The best of the complete trials on some of the documents that all of them were asked about."""
    values = []
    for trial in trials:
        with suppress(Failed, OutOfBudget):
            if trial.state == "complete":
                values.append(trial._replace(value=task.outcome(trial.params, positions).value))
    return winner(values or trials)


def write_best(work: Stage, settings: dict[str, Any], told: str, kind: str) -> None:
    """The recipe with the settings that were found, for rate to take as it is; as it was, if nothing was gained."""
    recipe = work.recipe
    given = recipe.model_dump(mode="json", exclude_unset=True, exclude={"tune"})
    asked = recipe.tune.model_dump(mode="json", exclude_unset=True, include=OF_ANSWERS) if kind == "answers" else {}
    values = merge(merge(given, {"tune": asked} if asked else {}), settings)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(work.folder / "best.yaml", f"# Found by gristmill tune. {told}\n{text}")


def summarise(
    work: Stage,
    task: Task,
    kind: str,
    folds: Sequence[Fold],
    trials: Sequence[Trial],
    compared: Compared,
    written: Params,
    stopped_by: str | None,
) -> TuneResult:
    """All of it in figures."""
    tune, best, default = work.recipe.tune, winner(trials), trials[0]
    spent = task.spending.in_figures([work.recipe.teacher], work.seconds)
    told = {"n_examples": 0, "ceiling": None, "fitted_line": None, **task.told(written)}
    states = [trial.state for trial in trials[1:]]
    return TuneResult(
        seconds=work.seconds,
        task=kind,
        objective=task.objective,
        n_gold=task.n_documents + told["n_examples"],
        n_chosen_on=len(chosen_on(folds)),
        n_held_out=sum(len(fold[1]) for fold in folds),
        folds=tune.folds,
        n_trials=len(states),
        n_complete=states.count("complete"),
        n_pruned=states.count("pruned"),
        n_failed=states.count("failed"),
        default=findings.figures(default, task.objective, {"params": {}}, compared.default),
        best=findings.figures(best, task.objective, {"number": best.number, "params": best.params}, compared.best),
        gain=compared.gain,
        gain_interval=compared.gain_interval,
        is_better=findings.is_better(best, compared),
        sentence=findings.sentence(task.objective, best, compared),
        importances=study.importances(file_of(work)),
        confusion=compared.confusion,
        **told,
        stopped_by=stopped_by or task.spending.stopped_by,
        **{name: spent[name] for name in ("n_asked", "n_reused", "prompt_tokens", "answer_tokens")},
        usd=None if "model" in tune.space else spent["usd"],
    )
