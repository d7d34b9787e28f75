"""What parameters mean when ratings are tuned: a prompt with its examples, a teacher, and whether it is calibrated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from pipeline import few_shot, panel, prompts, teacher
from pipeline.config import OPERATIONAL, Recipe, Teacher, digest, merge
from pipeline.errors import UserError, required
from pipeline.few_shot import Pool
from pipeline.metrics import Floats
from pipeline.prompts import Line, Prompt
from pipeline.trials import Params

OWN = ("prompt", "examples", "examples_draw", "calibrate")
"""Parameters that are no single setting of the teacher or the prompt."""
ASKED_WITH = [name for name, field in Teacher.model_fields.items() if OPERATIONAL not in field.metadata]
"""Settings of the teacher that bear on an answer."""
INSIDE = ("args", "chat_template_args")
"""Those among them that take any further name."""
OF_PROMPT = [
    name for name in Prompt.model_fields if name not in {"name", "body", "examples", "order", "labels", "multi"}
]
"""Settings of a prompt that asks for a score, but for its text."""
TUNABLE = [*OWN, *ASKED_WITH, *(f"{name}." for name in INSIDE), *(f"prompt.{name}" for name in OF_PROMPT)]
"""Names that a search space may have; one that ends in a dot takes any further name."""

FEWEST_POINTS = 10
"""Documents below which no line is fitted."""


class Candidate(NamedTuple):
    """One way to rate."""

    prompt: Prompt
    teacher: Teacher
    calibrate: bool
    """Never where it has no effect."""
    changes: Params
    """The parameters it was made of."""


def candidate(recipe: Recipe, params: Params, pool: Pool, loaded: Callable[[Path], Prompt]) -> Candidate:
    """The recipe's prompt and teacher with these parameters laid over; examples come from the pool.

    `loaded` reads a prompt file. Raises UserError for settings that cannot be.
    """
    prompt = worded(recipe, params, loaded)
    if "examples" in params:
        n, draw = (whole(name, params.get(name, 0)) for name in ("examples", "examples_draw"))
        examples = few_shot.drawn(prompt, pool, n, draw, recipe.tune.example_characters)
        prompt = prompt.model_copy(update={"examples": examples})
    calibrate = params.get("calibrate", recipe.rate.calibrate)
    if not isinstance(calibrate, bool):
        raise UserError(f"calibrate: give true or false, not {calibrate!r}")
    heeds = prompt.read == "choices" and prompt.normalise
    return Candidate(prompt, taught(recipe.teacher, params), calibrate and heeds, params)


def whole(name: str, value: Any) -> int:
    """A parameter that counts."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{name}: give a whole number from 0 up, not {value!r}")
    return value


def worded(recipe: Recipe, params: Params, loaded: Callable[[Path], Prompt]) -> Prompt:
    """The prompt file, with its settings changed as asked."""
    prompt = loaded(prompt_file(recipe, params))
    changes = {name.removeprefix("prompt."): value for name, value in params.items() if name.startswith("prompt.")}
    values = {**prompt.model_dump(), **changes}
    if values["read"] == "json" and "scale" not in changes:
        del values["scale"]  # it is that of the main attribute
    try:
        prompt = Prompt.model_validate(values) if changes else prompt
    except ValidationError as error:
        raise UserError(f"{why(error, changes)} (prompt {prompt.name})") from None
    if prompt.read == "label":
        raise UserError(f"prompt {prompt.name} asks for labels; tune takes prompts that ask for a score")
    return prompt


def prompt_file(recipe: Recipe, params: Params) -> Path:
    """The prompt file that is asked with."""
    return Path(required(params.get("prompt", recipe.rate.prompt), "rate.prompt", "prompts/edu-en.md"))


def why(error: ValidationError, changes: dict[str, Any]) -> str:
    """What is wrong with a changed prompt, by the parameter at fault or by all where only their sum is."""
    if error.errors()[0]["loc"]:
        return f"prompt.{prompts.one_line(error)}"
    asked = ", ".join(f"prompt.{name} {value!r}" for name, value in changes.items())
    return f"{asked}: {prompts.one_line(error)}"


def taught(teacher: Teacher, params: Params, where: str = "") -> Teacher:
    """The teacher with its settings changed as asked; another model leaves behind what is only good for this one."""
    changes = {name: value for name, value in params.items() if name in ASKED_WITH}
    for part in INSIDE:
        named = {name.removeprefix(f"{part}."): value for name, value in params.items() if name.startswith(f"{part}.")}
        changes = merge(changes, {part: named} if named else {})
    bound = panel.MODEL_BOUND if changes.get("model", teacher.model) != teacher.model else set()
    try:
        return Teacher.model_validate(merge(teacher.model_dump(exclude_unset=True, exclude=bound), changes))
    except ValidationError as error:
        raise UserError(f"{where}.{panel.explain(error)}".lstrip(".")) from None


# -- which are the same -----------------------------------------------------------------------------------------------


def key(candidate: Candidate) -> str:
    """The same for candidates that ask and read the same."""
    prompt = candidate.prompt
    heeded = prompt.model_copy(update={name: Prompt.model_fields[name].default for name in unheeded(prompt)})
    return digest([heeded.digest, teacher.identity(prompt, candidate.teacher), candidate.calibrate])


def unheeded(prompt: Prompt) -> set[str]:
    """Settings that change neither what is asked nor how it is read."""
    aside = {"example_answer"}
    aside |= set() if prompt.read == "generate" else {"pattern"}
    aside |= set() if prompt.read == "choices" else {"line"}
    return aside | (set() if prompt.read == "choices" and prompt.line is None else {"normalise"})


# -- what a recipe needs to rate like this ----------------------------------------------------------------------------


def settings(candidate: Candidate, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Settings of `rate` and `teacher` that differ from the recipe's, nested as there. A prompt that is not as in its
    file is written to the folder."""
    path = prompt_file(recipe, candidate.changes)
    if prompts.load(path).digest != candidate.prompt.digest:
        path = folder / f"{path.stem}-tuned.md"
        prompts.write(candidate.prompt.model_copy(update={"name": f"{candidate.prompt.name}-tuned"}), path)
    now = {"prompt": path, "calibrate": candidate.calibrate}
    before, after = (each.model_dump(mode="json") for each in (recipe.teacher, candidate.teacher))
    found = {
        "rate": {
            name: str(value) if name == "prompt" else value
            for name, value in now.items()
            if value != getattr(recipe.rate, name)
        },
        "teacher": {name: value for name, value in after.items() if value != before[name]},
    }
    return {section: values for section, values in found.items() if values}


def with_line(prompt: Prompt, log_odds: Floats, gold: Floats) -> Prompt | None:
    """The prompt with its line fitted: gold (n,) on the prompt's scale by least squares on log-odds (n,), those that
    are finite. None where the prompt has no line, where it would not rise, or with fewer than ten points."""
    known = np.isfinite(log_odds) & np.isfinite(gold)
    x, y = log_odds[known], gold[known]
    if prompt.read != "choices" or prompt.line is None or len(x) < FEWEST_POINTS or np.ptp(x) == 0:
        return None
    across, up = x - x.mean(), y - y.mean()
    slope = float(across @ up / (across @ across))
    if slope <= 0:
        return None
    offset = float(y.mean() - slope * x.mean())
    return prompt.model_copy(update={"line": Line(offset=short(offset), slope=short(slope))})


def short(value: float) -> float:
    """Four digits, for people to read."""
    return float(f"{value:.4g}")
