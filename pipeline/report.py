"""The run as one HTML page that needs nothing else: no network, no other file."""

import logging
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import charts, corpus, examples, places, shortcuts, summary, training_page, tried, tune_charts, verdict
from pipeline.config import Recipe, digest, load_recipe, to_yaml
from pipeline.errors import SettingsError, needs
from pipeline.examples import Looked, Row
from pipeline.metrics import int_scores
from pipeline.show import beginning, clean
from pipeline.storage import write_text
from pipeline.tracking import Result, Stage, dump, read_json, read_metrics, stage

log = logging.getLogger("gristmill")

TEMPLATE = Path(__file__).with_name("report.html.jinja")
TRAINING_TEMPLATE = Path(__file__).with_name("report_training.jinja")
STAGES = {
    "plan": "gristmill plan",
    "tune": "gristmill tune",
    "rate": "gristmill rate",
    "probe": "gristmill rate --probe",
    "label": "gristmill label",
    "train": "gristmill train",
    "score": "gristmill score",
    "cuts": "gristmill plan",
    "audit": "gristmill audit",
    "filter": "gristmill filter",
    "export": "gristmill export",
    "prepare": "gristmill align prepare",
    "expand/actor": "gristmill align expand actor",
    "expand/prompts": "gristmill align expand prompts",
    "expand/reward": "gristmill align expand reward",
    "actor": "gristmill align actor",
    "reward": "gristmill align reward",
    "rl": "gristmill align rl",
    "finetune": "gristmill finetune",
    "prove": "gristmill prove",
}
"""Stages in the order of the page, and the command that makes each."""
ALIGNED = {"rate": "gristmill align rate", "train": "gristmill align reward"}
"""Commands of stages that replies go through too."""
CORPUS = ("score", "cuts", "audit", "filter", "export")
"""Stages about a scored corpus."""
LINKS = (
    "tune/best.yaml",
    "tune/trials.jsonl",
    "rate/ratings.parquet",
    "label/labels.parquet",
    "train/predictions.parquet",
    "train/student",
    "score/scored",
    "cuts/cuts.png",
    "audit/ratings.parquet",
    "filter/kept",
    "filter/dropped",
    "export",
    "prove/prove.png",
    "finetune/model",
    "finetune/continuations.json",
    "prepare",
    "expand",
    "actor/model",
    "reward/model",
    "rl/model",
    "rl/replies.parquet",
    "rl/conversations.jsonl",
    "metrics.jsonl",
    "run.log",
)
CHARACTERS = 3000
"""Characters shown of a document or an answer."""
GIST = 160
"""Characters of the line that stands for a folded document."""

MANY_TIMES = ("tune", *summary.TRAININGS)
"""Stages that read a document more than once, so that documents a second say nothing."""

Values = dict[str, Any]


class ReportResult(Result):
    """What the page says in short."""

    page: str
    n_bytes: int
    states: dict[str, str]
    """done, begun or not begun, by stage."""
    verdict: list[str]
    warnings: list[str]
    """Shortcuts that explain much of the score."""


def run(recipe: Recipe, redo: bool = False) -> ReportResult:
    """Draw the page from what the stages left; again whenever one of them left something else."""
    needs("jinja2", "plots")
    needs("matplotlib", "plots")
    made_with = settings(recipe)
    states = {name: summary.state(recipe.run_folder / name) for name in STAGES}
    with stage("report", recipe, inputs(made_with, states)) as work:
        page = work.folder / "report.html"
        done = work.finished(ReportResult, True, page.exists() and not redo)
        if done:
            return done
        results = {name: values for name, values in states.items() if values["state"] == "done"}
        looked, found = scored_documents(work, made_with, results)
        shown = content(made_with, states, results, looked, found)
        write_text(page, render(shown))
        return work.finish(
            ReportResult(
                seconds=work.seconds,
                page=str(page),
                n_bytes=page.stat().st_size,
                states={name: values["state"] for name, values in states.items()},
                verdict=list(chain.from_iterable(shown["verdict"].values())),
                warnings=shown["shortcut_warnings"],
            )
        )


def settings(recipe: Recipe) -> Recipe:
    """The recipe that the run's last stage was made with, as a report is often asked for by run folder alone."""
    if recipe.corpus.path is not None:
        return recipe
    for name in reversed(STAGES):
        path = recipe.run_folder / name / "recipe.yaml"
        if path.exists():
            try:
                made = load_recipe(path, {})
            except SettingsError as error:
                log.info("report: %s", error)
                continue
            trust = {"trust_remote_code": recipe.encoder.trust_remote_code}
            own = {"run_folder": recipe.run_folder, "report": recipe.report}
            return made.model_copy(update={**own, "encoder": made.encoder.model_copy(update=trust)})
    return recipe


def inputs(made_with: Recipe, states: dict[str, Values]) -> Values:
    """Everything that decides the page."""
    return {
        "stages": {name: digest(values) for name, values in states.items()},
        "recipe": digest(to_yaml(made_with)),
        "template": digest([path.read_text(encoding="utf-8") for path in (TEMPLATE, TRAINING_TEMPLATE)]),
    }


def scale_of(recipe: Recipe) -> tuple[float, float]:
    """The scale of the ratings; 0 to 5 where there are none."""
    path = recipe.run_folder / "rate" / "ratings.parquet"
    return examples.scale_of(examples.ratings(recipe.run_folder)[1] if path.exists() else {})


# -- the scored corpus ------------------------------------------------------------------------------------------------


def scored_documents(work: Stage, recipe: Recipe, results: dict[str, Values]) -> tuple[Looked | None, Values]:
    """Scored documents to look at, and the shortcuts that lead to their scores."""
    if "score" not in results or not places.is_there(places.made(recipe, "score")):
        return None, {}
    scored, found = examples.scored_corpus(recipe)
    schema = corpus.read_schema(found[0], scored)
    if "score" not in schema.names:
        return None, {}
    columns = shortcuts.columns_there(schema, recipe.cuts.by)
    looked = examples.look(recipe, work.recipe.report.documents, work.recipe.report.examples, list(columns.values()))
    return looked, known_shortcuts(work, recipe, results, looked, columns)


def known_shortcuts(
    work: Stage, recipe: Recipe, results: dict[str, Values], looked: Looked, columns: dict[str, str]
) -> Values:
    """The shortcuts, from the file where the same documents have been looked at before."""
    path, cut = work.folder / "shortcuts.json", cut_of(results)
    ids = [row["id"] for row in looked.sample]
    made_from = digest([ids, [row["score"] for row in looked.sample], columns, cut, recipe.encoder.identity()])
    before = read_json(path)
    if before and before.get("made_from") == made_from:
        return before
    found = shortcuts.find(looked.sample, cut, columns, recipe.seed)
    found |= {"along": shortcuts.along(recipe, looked.sample, cut), "made_from": made_from}
    write_text(path, dump(found))
    return found


def cut_of(results: dict[str, Values]) -> float | None:
    """The score from which documents are kept: the filter's, else the student's."""
    filtered, learned = results.get("filter", {}), verdict.target_of(results.get("train", {}))
    if filtered.get("cut") is not None:
        return float(filtered["cut"])
    return learned.get("cut")


# -- the page ---------------------------------------------------------------------------------------------------------


def content(
    recipe: Recipe,
    states: dict[str, Values],
    results: dict[str, Values],
    looked: Looked | None,
    found: Values,
) -> Values:
    """What the template fills in."""
    folder, scale = recipe.run_folder, scale_of(recipe)
    return {
        "name": folder.resolve().name,
        "recipe": recipe,
        "settings": to_yaml(recipe),
        "verdict": verdict.verdict(results),
        "stages": [stage_line(name, commands(states)[name], values) for name, values in states.items()],
        "states": states,
        "commands": {name: f"{command} {recipe_of(folder)}" for name, command in commands(states).items()},
        **sections(states),
        **results,
        "tuning": tune_charts.page(folder, results.get("tune", {})),
        "training": training_page.page(folder, results),
        "further": summary.further({"run_folder": folder, "tune": states["tune"]}),
        "answers": answers(recipe),
        "targets": [target(name, each) for name, each in (results.get("train", {}).get("targets") or {}).items()],
        "charts": charts.of_run(results, found, scale, cut_of(results)),
        "looked": looked,
        "shortcuts": found,
        "shortcut_warnings": shortcuts.warnings(found, scale) if found else [],
        "links": [link for link in LINKS if (folder / link).exists()],
        "made": max(
            (line.get("time", 0.0) for line in read_metrics(folder) if line.get("stage") in STAGES), default=None
        ),
    }


def begun(states: dict[str, Values], names: Iterable[str]) -> bool:
    """Whether one of some stages has been begun."""
    return any(states[name]["state"] != "not begun" for name in names)


def commands(states: dict[str, Values]) -> dict[str, str]:
    """The command of each stage, that of `align` where replies are rated."""
    return STAGES | (ALIGNED if begun(states, summary.ALIGNMENT) and not begun(states, CORPUS) else {})


def sections(states: dict[str, Values]) -> Values:
    """Which sections stand in the page: where language models were trained, only those of what was begun."""
    all_of_them = not begun(states, summary.TRAININGS)
    shown = {"ratings": ("rate",), "student": ("train",), "corpus": CORPUS}
    expected = ("rate", "train", "score", "filter") if all_of_them else ()
    return {
        "shown": {name: all_of_them or begun(states, stages) for name, stages in shown.items()},
        "expected": expected,
        "aligned": begun(states, summary.ALIGNMENT),
    }


def recipe_of(folder: Path) -> str:
    """The resolved recipe that the run's last stage left, to go on with."""
    there = [path for name in STAGES if (path := folder / name / "recipe.yaml").exists()]
    return str(there[-1]) if there else "RECIPE"


def stage_line(name: str, command: str, values: Values) -> Values:
    """A stage in the table of stages."""
    is_done = values["state"] == "done"
    n, seconds = (summary.documents(values) or None, values.get("seconds")) if is_done else (None, None)
    begun = ", ".join(
        f"{key.removeprefix('n_').replace('_', ' ')} {value}" for key, value in values.items() if key != "state"
    )
    return {
        "name": name,
        "command": command,
        "state": values["state"],
        "begun": begun,
        "documents": n,
        "seconds": seconds,
        "speed": values.get("docs_per_s", n / seconds if n and seconds and name not in MANY_TIMES else None),
        "usd": values.get("usd"),
    }


def answers(recipe: Recipe) -> dict[str, list[Row]]:
    """Some rated documents at each whole score, and some without one, with what was said of them."""
    if not (recipe.run_folder / "rate" / "ratings.parquet").exists():
        return {}
    rows, notes = examples.ratings(recipe.run_folder)
    scale = examples.scale_of(notes)
    groups: dict[str, list[Row]] = {name: [] for name in [*examples.whole(scale), "none"]}
    for row in rows:
        group = groups["none" if row["score"] is None else str(int_scores(np.array([row["score"]]), scale)[0])]
        if len(group) < recipe.report.examples:
            group.append({**row, "answer": examples.answer(row)})
    return {name: found for name, found in groups.items() if found}


def target(name: str, found: Values) -> Values:
    """One target's figures with its charts."""
    return {"name": name, "found": found, "charts": charts.of_target(found)}


def render(values: Values) -> str:
    """The page; whatever a document holds is text in it, and nothing else."""
    jinja2 = needs("jinja2", "plots")
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= FILTERS
    return str(page.get_template(TEMPLATE.name).render(values))


def harmless(value: Any) -> Any:
    """Text without characters that steer or turn it; markup of our own, and anything else, as it is."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return clean(value).encode("utf-8", "replace").decode("utf-8")
    return "" if value is None else value


def known(value: Any) -> bool:
    """Whether a figure is there: neither None nor what the template knows nothing of."""
    return isinstance(value, int | float)


def told(tell: Callable[[Any], str]) -> Callable[[Any], str]:
    """A dash where there is nothing to tell."""
    return lambda value: tell(value) if known(value) else "–"


def ranged(value: Any, interval: Any = None, digits: int = 2) -> str:
    """0.81 [0.76, 0.85]."""
    return verdict.ranged(value, interval or None, digits) if known(value) else "–"


def speed(value: float) -> str:
    """Documents a second."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def lasted(seconds: float) -> str:
    """A time a person can picture."""
    return f"{seconds:.1f} s" if seconds < 120 else summary.duration(seconds / 3600)


def day(time_s: float) -> str:
    """A day in words, from seconds since 1970."""
    date = datetime.fromtimestamp(time_s, timezone.utc)
    return f"{date.day} {date:%B %Y}"


def gist(text: str) -> str:
    """One line that stands for a document."""
    words = " ".join(clean(text[: 4 * GIST]).split())
    return words if len(words) <= GIST else words[:GIST].rsplit(" ", 1)[0] + " …"


def shade(value: float, highest: float) -> str:
    """How strongly a cell of a table is coloured, as a CSS percentage."""
    return f"{72 * value / max(highest, 1e-9):.0f}%"


FILTERS: dict[str, Callable[..., Any]] = {
    "figure": told(lambda value: f"{value:.2f}"),
    "precise": told(lambda value: f"{value:.3f}"),
    "scientific": told(lambda value: f"{value:.1e}"),
    "count": told(lambda value: f"{value:,.0f}"),
    "percent": told(lambda value: f"{value:.1%}"),
    "dollars": told(summary.dollars),
    "lasted": told(lasted),
    "speed": told(speed),
    "day": told(day),
    "hours": told(summary.duration),
    "ranged": ranged,
    "gist": gist,
    "sentence": lambda text: f"{text.rstrip('.')}." if text else "",
    "words": tried.words,
    "shade": shade,
    "beginning": lambda text: beginning(text or "", CHARACTERS),
}
