"""One command per stage: the recipe's YAML, then flags, then run."""

import errno
import importlib
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import yaml
from cyclopts import App, CycloptsError, Parameter
from pydantic import Field, ValidationError

from pipeline import __version__, config
from pipeline.config import Common, Recipe, Settings
from pipeline.errors import Pending, SettingsError, UserError, required

log = logging.getLogger("gristmill")

STAGES = ("rate", "train", "score", "filter")
WITH_PICTURES = ("rate", "train", "score", "cuts", "filter", "report")
"""The same with what only looks at the run."""
ALIGNING = ("actor", "rate_replies", "reward", "rl")
"""Steps of align, as modules."""
PASSED_THROUGH = {"args", "chat_template_args", "engine_args", "lora", "space"}
"""Settings that hold others' names."""

Flat = Parameter(name="*")
RecipePath = Annotated[Path | None, Parameter(help="Recipe: a YAML file with a section per stage. Flags win over it.")]


class How(Settings):
    """How a command runs and answers; not part of the recipe."""

    dry_run: bool = False
    """Print the resolved settings as YAML, and do nothing."""
    redo: bool = False
    """Do again what was made from other settings or inputs, and ask again what failed; recorded answers are reused."""
    as_json: Annotated[bool, Parameter(name="--json")] = False
    """Answer with one JSON line (the default when piped)."""
    as_table: Annotated[bool, Parameter(name="--table")] = False
    """Answer with a table (the default on a terminal)."""


app = App(
    name="gristmill",
    version=__version__,
    help="Grade a sample with an LLM, teach a small encoder to grade like it, grade everything, keep the best.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=()),
)


@app.command(sort_key=0)
def run(
    recipe: RecipePath = None,
    /,
    *,
    settings: Annotated[Recipe, Flat] = Recipe(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Every stage, and the report where the extra `plots` is installed; a finished one is skipped."""
    drawn = all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib"))
    execute(WITH_PICTURES if drawn else STAGES, recipe, flags(settings), how)


@app.command(sort_key=1)
def rate(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    rate: Annotated[config.Rate, Flat] = config.Rate(),  # noqa: B008
    probe: bool = False,
    next: Annotated[int | None, Field(ge=1)] = None,
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Stage 1: an LLM rates a sample of the corpus.

    Parameters
    ----------
    probe
        Instead, try how far lines in a document can talk the teacher into a better score.
    next
        Rate so many more documents, those from which the student learns most.
    """
    if probe and next:
        raise SettingsError("rate: give --probe or --next, not both")
    given = {**flags(common), "rate": flags(rate)}
    execute(["probe" if probe else "rate"], recipe, given, how, lambda found: add_round(found, next, how.redo))


def add_round(recipe: Recipe, n: int | None, redo: bool) -> None:
    """Choose the next documents to rate, if that was asked."""
    if n:
        from pipeline import panel, rounds
        from pipeline import rate as stage

        rounds.add(recipe, n, stage.inputs(recipe, panel.of(recipe)), redo)


@app.command(sort_key=1)
def plan(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    rate: Annotated[config.Rate, Flat] = config.Rate(),  # noqa: B008
    plan: Annotated[config.Plan, Flat] = config.Plan(),  # noqa: B008
    cuts: Annotated[config.Cuts, Flat] = config.Cuts(),  # noqa: B008
    rating: bool = False,
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Before stage 1: the tokens, hours and money that it will take. After stage 3: what each cut would keep.

    Parameters
    ----------
    rating
        The plan of stage 1 although the corpus is scored.
    """
    given = {**flags(common), "rate": flags(rate), "plan": flags(plan), "cuts": flags(cuts)}
    from pipeline import mirror

    folder = mirror.refresh(config.load_recipe(recipe, given))
    scored = (folder / "score" / "result.json").exists()
    if (folder / "score" / "inputs.json").exists() and not scored:
        log.warning("plan: scoring is not finished, so this is the plan of rating; run gristmill score")
    execute(["cuts" if scored and not rating else "plan"], recipe, given, how)


@app.command(sort_key=0)
def tune(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    tune: Annotated[config.Tune, Flat] = config.Tune(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Before stage 1: the prompt and generation settings that agree best with people, or answer best."""
    execute(["tune"], recipe, {**flags(common), "tune": flags(tune)}, how)


@app.command(sort_key=2)
def label(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    label: Annotated[config.Label, Flat] = config.Label(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Beside stage 1: an LLM sorts a sample into the labels of a taxonomy."""
    results = execute(["label"], recipe, {**flags(common), "label": flags(label)}, how)
    for result in results:
        importlib.import_module("pipeline.label").check_all_done(result)


@app.command(sort_key=2)
def train(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    train: Annotated[config.Train, Flat] = config.Train(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Stage 2: a head on a frozen encoder learns the ratings."""
    execute(["train"], recipe, {**flags(common), "train": flags(train)}, how)


@app.command(sort_key=3)
def score(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    score: Annotated[config.Score, Flat] = config.Score(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Stage 3: the student scores every document."""
    execute(["score"], recipe, {**flags(common), "score": flags(score)}, how)


@app.command(sort_key=4)
def filter(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    filter: Annotated[config.Filter, Flat] = config.Filter(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Stage 4: the best documents are kept, every dropped one counted."""
    execute(["filter"], recipe, {**flags(common), "filter": flags(filter)}, how)


@app.command(sort_key=4)
def audit(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    audit: Annotated[config.Audit, Flat] = config.Audit(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """After stage 3: the teacher rates some scored documents, for unbiased figures on the whole corpus."""
    execute(["audit"], recipe, {**flags(common), "audit": flags(audit)}, how)


@app.command(sort_key=5)
def export(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    export: Annotated[config.Export, Flat] = config.Export(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """The student as ONNX and OpenVINO, and to the Hub."""
    execute(["export"], recipe, {**flags(common), "export": flags(export)}, how)


@app.command(sort_key=5)
def finetune(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    finetune: Annotated[config.Finetune, Flat] = config.Finetune(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Does it help? A language model is trained further on a corpus, or on what was kept of it."""
    execute(["finetune"], recipe, {**flags(common), "finetune": flags(finetune)}, how)


@app.command(sort_key=6)
def generate(
    model: str,
    /,
    *prompts: str,
    ways: Annotated[config.Generate, Flat] = config.Generate(),  # noqa: B008
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """What a language model writes after a prompt.

    Parameters
    ----------
    model
        Hub name, folder (a run's finetune/model), package:NAME/PATH or .gguf file.
    prompts
        Texts to go on from; without any what stands on stdin.
    as_json
        Answer with one JSON line for each: prompt, seed, text.
    """
    from pipeline import continuations

    continuations.run(model, prompts, ways, as_json)


@app.command(sort_key=5)
def prove(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    prove: Annotated[config.Prove, Flat] = config.Prove(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Does it help? A small model learns from what was kept, from a random draw and from what was rejected."""
    execute(["prove"], recipe, {**flags(common), "prove": flags(prove)}, how)


align = App(name="align", sort_key=5, help="A model learns to reply as the teacher likes, with the student as reward.")
app.command(align)


@align.command(name="prepare", sort_key=0)
def align_prepare(
    recipe: RecipePath = None,
    /,
    *,
    settings: Annotated[Recipe, Flat] = Recipe(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Prompts and replies from ARLHF, SHP or a file of pairs; both replies are kept."""
    execute(["prepare"], recipe, flags(settings), how)


@align.command(name="expand", sort_key=1)
def align_expand(
    kind: Literal["actor", "prompts", "reward"],
    recipe: RecipePath = None,
    /,
    *,
    n: Annotated[int, Parameter(name=["--rows", "-n"]), Field(ge=1)] = 100,
    settings: Annotated[Recipe, Flat] = Recipe(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Further rows that the teacher writes, from a few examples of the data or from nothing.

    Parameters
    ----------
    kind
        What rows are for: the actor (prompt and reply), prompts alone, or the reward (replies of any quality).
    n
        Rows wanted in all.
    """
    execute(["expand"], recipe, flags(settings), how, kind=kind, n=n)


@align.command(name="actor", sort_key=2)
def align_actor(
    recipe: RecipePath = None,
    /,
    *,
    settings: Annotated[Recipe, Flat] = Recipe(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """Supervised fine-tuning: the model learns the replies."""
    execute(["actor"], recipe, flags(settings), how)


@align.command(name="rate", sort_key=3)
def align_rate(
    recipe: RecipePath = None,
    /,
    *,
    settings: Annotated[Recipe, Flat] = Recipe(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """The teacher rates the actor's replies, and the rows that have no score yet."""
    execute(["rate_replies"], recipe, flags(settings), how)


@align.command(name="reward", sort_key=4)
def align_reward(
    recipe: RecipePath = None,
    /,
    *,
    settings: Annotated[Recipe, Flat] = Recipe(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """What a reply is worth: a student or a classifier learns the ratings."""
    execute(["reward"], recipe, flags(settings), how)


@align.command(name="rl", sort_key=5)
def align_rl(
    recipe: RecipePath = None,
    /,
    *,
    settings: Annotated[Recipe, Flat] = Recipe(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """The actor learns to please the reward; the teacher judges it before and after."""
    execute(["rl"], recipe, flags(settings), how)


@align.command(name="all", sort_key=6)
def align_all(
    recipe: RecipePath = None,
    /,
    *,
    settings: Annotated[Recipe, Flat] = Recipe(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """All steps one after another, prepare first where align.source is set; a finished one is skipped."""
    given = flags(settings)
    first = ["prepare"] if config.load_recipe(recipe, given).align.source else []
    execute([*first, *ALIGNING], recipe, given, how, check_align)


def check_align(recipe: Recipe) -> None:
    """Find what would stop a later step of align."""
    importlib.import_module("pipeline.align").check_ahead(recipe)


@app.command(sort_key=5)
def report(
    recipe: RecipePath = None,
    /,
    *,
    common: Annotated[Common, Flat] = Common(),  # noqa: B008
    report: Annotated[config.Report, Flat] = config.Report(),  # noqa: B008
    how: Annotated[How, Flat] = How(),  # noqa: B008
) -> None:
    """The run as one HTML page."""
    execute(["report"], recipe, {**flags(common), "report": flags(report)}, how)


@app.command(sort_key=5)
def status(run_folder: Path, /, *, how: Annotated[How, Flat] = How()) -> None:  # noqa: B008
    """What a run folder holds and how far it is.

    Parameters
    ----------
    run_folder
        Run folder to look at.
    """
    from pipeline import mirror, summary

    states = summary.status(mirror.here(run_folder), STAGES)
    answer(states, how, summary.show_status)


@app.command(sort_key=5)
def verify(run_folder: Path, /, *, remove: bool = False, how: Annotated[How, Flat] = How()) -> None:  # noqa: B008
    """Find every damaged or missing file of a run.

    Parameters
    ----------
    run_folder
        Run folder to read, all of it.
    remove
        Remove what is damaged, so that its stages make it again.
    """
    from pipeline import mirror
    from pipeline import verify as check

    found = check.run(mirror.here(run_folder), remove)
    answer(found, how, check.show)
    if said := check.advice(found):
        raise UserError(said)


class Selection(Settings):
    """Which documents are shown, and how; not part of the recipe."""

    min_score: float | None = None
    """Documents with at least this score."""
    max_score: float | None = None
    """Documents with at most this score."""
    unscored: bool = False
    """Documents without a score or label."""
    reason: str | None = None
    """Documents without a score or label for this reason, such as no_score."""
    contains: str | None = None
    """Documents with these words, in small or capital letters."""
    order: Annotated[Literal["score", "-score", "spread", "random"] | None, Parameter(allow_leading_hyphen=True)] = (
        None
    )
    """Lowest score first, highest first (-score), those first on which opinions differ most, or shuffled; without it
    as in the file."""
    n: Annotated[int | None, Field(ge=1)] = None
    """At most so many documents."""
    chars: Annotated[int, Field(ge=1)] = 600
    """Characters shown of each text and answer."""
    seed: int = 0
    """Seed of shuffling."""
    export: Annotated[Path | None, Parameter(name="--open")] = None
    """Write the documents to this CSV, without what the teacher said, for a person to fill in human_score."""
    as_json: Annotated[bool, Parameter(name="--json")] = False
    """Answer with one JSON line a document, whole texts."""


@app.command(sort_key=6)
def show(path: Path, /, *, selection: Annotated[Selection, Flat] = Selection()) -> None:  # noqa: B008
    """Read ratings or labels document by document, or hand some to a person.

    Parameters
    ----------
    path
        Run folder, its rate or label folder, or a file of ratings or labels.
    """
    from pipeline import mirror
    from pipeline import show as reader

    reader.run(mirror.here(path), selection)


def flags(settings: Settings) -> dict[str, Any]:
    """Only what was given on the command line; pass-through values are typed as YAML would."""
    given = settings.model_dump(exclude_unset=True)
    for section in (given, *(value for value in given.values() if isinstance(value, dict))):
        for name in PASSED_THROUGH & section.keys():
            section[name] = {key: yaml.safe_load(str(value)) for key, value in section[name].items()}
    return given


def execute(
    stages: Sequence[str],
    path: Path | None,
    given: dict[str, Any],
    how: How,
    before: Callable[[Recipe], None] = lambda _: None,
    **options: Any,
) -> list[Any]:
    """Run stages one after another, each with these options, and show what they did; their results."""
    recipe = config.load_recipe(path, given)
    if how.dry_run:
        sys.stdout.write(config.to_yaml(recipe))
        return []
    if recipe.shard and len(stages) > 1:
        raise SettingsError(f"--shard: {', '.join(stages)} follow each other; give it to each stage's own command")
    from pipeline import mirror, spread, summary, tracking

    if stages[0] not in tracking.IN_PARTS:
        spread.by_one(recipe, stages[0])
    with mirror.kept(recipe), log_in(recipe.run_folder):
        if "filter" in stages and len(stages) > 1:
            check_ahead(recipe)
        before(recipe)
        modules = {name: importlib.import_module(f"pipeline.{name}") for name in stages}
        results = {name: module.run(recipe, how.redo, **options) for name, module in modules.items()}

    values = {name: result.model_dump(mode="json") for name, result in results.items()}
    answer({**values, "run_folder": str(recipe.run_folder)}, how, summary.show)
    return list(results.values())


def check_ahead(recipe: Recipe) -> None:
    """Find what would stop a later stage before the first token is paid for."""
    from pipeline import filter, lesson, models, prompts, score, train
    from pipeline.shards import find_shards

    filter.check_one_cut(recipe.filter)
    models.locate(recipe.encoder.model, "encoder.model")
    prompt = prompts.load(required(recipe.rate.prompt, "rate.prompt", "prompts/edu-en.md"))
    train.check_good_from(lesson.good_from(recipe, prompt.scale), prompt.scale)
    if recipe.rate.sample < train.FEWEST:
        raise UserError(
            f"rate.sample: {recipe.rate.sample} ratings are too few to train on; {train.FEWEST} is the least"
        )
    score.check_columns(find_shards(recipe.corpus), recipe)


def answer(values: dict[str, Any], how: How, show: Callable[[dict[str, Any]], None]) -> None:
    """The result on stdout: a table for a person, a JSON line for a program."""
    if how.as_table or (sys.stdout.isatty() and not how.as_json):
        show(values)
    else:
        sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")


# -- the process ------------------------------------------------------------------------------------------------------


def main(tokens: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; the exit code tells the truth."""
    alone(lambda: app(tokens, exit_on_error=False, print_error=False, result_action="return_value"))


def alone(work: Callable[[], Any]) -> NoReturn:
    """Do all that this process is for; what is wrong is one line, and the exit code tells the truth."""
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.handlers[0].addFilter(said_once())
    quieten_libraries()
    signals = end_by_sigterm()
    try:
        work()
    except (CycloptsError, ValidationError) as error:
        fail(one_line(error), 2)
    except SettingsError as error:
        fail(str(error), 2)
    except Pending as error:
        fail(str(error), 75)
    except UserError as error:
        fail(str(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{error}; everything recorded is kept, make room and run the same command again", 1)
    except KeyboardInterrupt:
        number = signals[-1] if signals else signal.SIGINT
        fail("interrupted; everything recorded is kept, the same command goes on", 128 + number)
    sys.exit(0)


def end_by_sigterm() -> list[int]:
    """From now on SIGTERM, by which a scheduler says that the time is up, does what Ctrl-C does; it is noted here."""
    seen: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        interrupt = signal.getsignal(signal.SIGINT)
        (interrupt if callable(interrupt) else signal.default_int_handler)(signal.SIGINT, frame)

    signal.signal(signal.SIGTERM, end)
    return seen


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and out."""
    sys.stderr.write(f"gristmill: {message}\n")
    sys.exit(code)


def one_line(error: CycloptsError | ValidationError) -> str:
    """What is wrong with the command line."""
    cause = error if isinstance(error, ValidationError) else error.__cause__
    if isinstance(cause, ValidationError):
        argument = getattr(error, "argument", None)
        return config.explain(cause, None, argument.name if argument else "")
    return " ".join(str(error).split())


@contextmanager
def log_in(run_folder: Path) -> Iterator[None]:
    """Keep the log in the run folder too."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(run_folder / "run.log", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_folder: {run_folder} cannot be written ({error.strerror}); give another") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def said_once() -> Callable[[logging.LogRecord], bool]:
    """A filter that passes the same words once, as several steps tell the same of the same machine."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        words, n = record.getMessage(), len(said)
        said.add(words)
        return len(said) > n

    return is_new


def quieten_libraries() -> None:
    """Loading bars of other libraries belong on a terminal, not in a log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
