"""Prompts and replies as they lie in files: JSON arrays or JSON lines of {user_input, completion, score}."""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Recipe
from pipeline.corpus import text_id
from pipeline.errors import UserError
from pipeline.storage import write_text


class Exchange(NamedTuple):
    """A prompt with a reply, either of which may be missing; no score is not a score of 0."""

    user_input: str
    completion: str | None = None
    score: float | None = None


def text(user_input: str, completion: str) -> str:
    """An exchange as the document that a teacher rates and a student scores."""
    return f"User: {user_input.strip()}\n\nAssistant: {completion.strip()}"


def is_held_out(user_input: str, share: float, seed: int) -> bool:
    """Whether a prompt is set aside for judging: decided by its content, so that every step agrees."""
    return int(text_id(f"{seed}:{user_input.strip()}")[:8], 16) / 16**8 < share


def for_judging(recipe: Recipe, user_input: str) -> bool:
    """Whether a recipe sets a prompt aside."""
    return is_held_out(user_input, recipe.align.held_out_share, recipe.seed)


# -- files ------------------------------------------------------------------------------------------------------------


def read(
    path: Path, setting: str, needed: Collection[str] = (), scale: tuple[float, float] | None = None
) -> list[Exchange]:
    """The rows of a file, in order, prompts without spaces around them; raises UserError that names the file, the row
    and what is wrong with it. A score is missing where it is null; one outside the scale is refused."""
    found = [exchange(row, f"{setting}: {path}, row {number}", needed, scale) for number, row in rows(path, setting)]
    if not found:
        raise UserError(f"{setting}: {path} has no rows; give JSON lines or a JSON array of {{user_input, ...}}")
    return found


def exchange(row: dict[str, Any], where: str, needed: Collection[str], scale: tuple[float, float] | None) -> Exchange:
    """One row, if it holds what is needed of it."""
    for name in ("user_input", *needed):
        if row.get(name) is None:
            raise UserError(f"{where}: {name} is missing; there are: {', '.join(row) or 'no keys'}")
    for name in ("user_input", "completion"):
        if not isinstance(row.get(name), str | None):
            raise UserError(f"{where}: {name} must be a text, not {json.dumps(row[name])[:60]}")
    if not row["user_input"].strip():
        raise UserError(f"{where}: user_input is empty")
    completion = row.get("completion")
    score = score_of(row.get("score"), where, scale)
    return Exchange(repaired(row["user_input"]).strip(), None if completion is None else repaired(completion), score)


def repaired(value: str) -> str:
    """A text with half a character of UTF-16 replaced: such a text cannot be written."""
    return value.encode("utf-8", "replace").decode()


def score_of(value: Any, where: str, scale: tuple[float, float] | None) -> float | None:
    """A score as it was given, 0 among them."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: score must be a number, or null where there is none, not {json.dumps(value)[:60]}")
    if scale and not scale[0] <= value <= scale[1]:
        raise UserError(
            f"{where}: score {value:g} is outside the scale {scale[0]:g} to {scale[1]:g} of rate.prompt; put it on"
            " that scale, or make it null to have it rated"
        )
    return float(value)


def rows(path: Path, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON array, numbered from 1, or of JSON lines with the numbers of their lines; raises UserError
    where there is something else."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.read(4096).lstrip()[:1]
            file.seek(0)
            found = enumerate(array(file.read()), 1) if first == "[" else lines(file)
            for number, row in found:
                if not isinstance(row, dict):
                    raise UserError(f"{setting}: {path}, row {number} is no object but {json.dumps(row)[:60]}")
                yield number, row
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be read ({error.strerror}); give a JSON or JSONL file") from None
    except UnicodeDecodeError:
        raise UserError(f"{setting}: {path} is not UTF-8 text; give a JSON or JSONL file") from None
    except ValueError as error:
        raise UserError(f"{setting}: {path} is neither a JSON array nor JSON lines ({error})") from None


def array(content: str) -> list[Any]:
    """A JSON array."""
    found: list[Any] = json.loads(content)
    return found


def lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """JSON lines with their numbers; empty ones are passed over."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def write(path: Path, found: Iterable[dict[str, Any]]) -> None:
    """Write rows as a JSON array (.json) or as JSON lines, whole or not at all."""
    made = [json.dumps(row, ensure_ascii=False) for row in found]
    is_array = path.suffix == ".json"
    write_text(path, "[\n" + ",\n".join(made) + "\n]\n" if is_array else "".join(line + "\n" for line in made))


# -- the rows of a recipe ---------------------------------------------------------------------------------------------

FILES = {
    "actor": ("actor_data", "prepare/actor_training_data.json", "expand/actor.jsonl"),
    "prompts": ("prompt_data", "prepare/rlhf_training_data.json", "expand/prompts.jsonl"),
    "reward": ("reward_data", "prepare/reward_training_data.json", "expand/reward.jsonl"),
}
"""Each kind of rows: the setting of align that names a file, and what prepare and expand leave."""


def files(recipe: Recipe, kind: str, made_by: Collection[str] = ("prepare", "expand")) -> list[Path]:
    """The file that the recipe names for a kind of rows; without one, what prepare and expand left."""
    setting, *left = FILES[kind]
    given: Path | None = getattr(recipe.align, setting)
    if given is not None:
        return [given]
    return [path for name in left if name.split("/")[0] in made_by and (path := recipe.run_folder / name).exists()]


def of(
    recipe: Recipe,
    kind: str,
    needed: Collection[str] = (),
    scale: tuple[float, float] | None = None,
    made_by: Collection[str] = ("prepare", "expand"),
) -> list[Exchange]:
    """All rows of a kind; none where there is no file."""
    setting = f"align.{FILES[kind][0]}"
    return [row for path in files(recipe, kind, made_by) for row in read(path, setting, needed, scale)]


def absent(kind: str) -> UserError:
    """What to do where a kind of rows is needed and there is none."""
    setting, command = FILES[kind][0], f"gristmill align expand {kind}"
    return UserError(
        f"align.{setting} is not set, and the run folder has no such rows; name a file, or run gristmill align prepare"
        f" (align.source) or {command}"
    )


def prompts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Distinct prompts to learn on, in the order of the files, and at most align.held_out_prompts of those set aside,
    drawn by content; raises UserError where either are none."""
    found = list(dict.fromkeys(row.user_input for row in of(recipe, "prompts")))
    if not found:
        raise absent("prompts")
    aside = {prompt for prompt in found if for_judging(recipe, prompt)}
    taught = [prompt for prompt in found if prompt not in aside]
    if not aside or not taught:
        which = "held out to judge on" if taught else "left to learn on"
        raise UserError(
            f"align.prompt_data: of {len(found)} distinct prompts none is {which}; give more, or change"
            f" align.held_out_share ({recipe.align.held_out_share:g})"
        )
    drawn = sorted(aside, key=lambda prompt: text_id(f"{recipe.seed}:{prompt}"))
    return taught, drawn[: recipe.align.held_out_prompts]


# -- tokens -----------------------------------------------------------------------------------------------------------

AT_A_TIME = 1000
"""Prompts that are tokenised together."""


def n_tokens(prompts: Sequence[str], tokenizer: Any) -> Iterator[int]:
    """Tokens of each prompt in the chat template, up to where the reply begins."""
    for begin in range(0, len(prompts), AT_A_TIME):
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts[begin : begin + AT_A_TIME]]
        asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        yield from map(len, tokenizer(asked, add_special_tokens=False, verbose=False)["input_ids"])


def fitting(prompts: Sequence[str], tokenizer: Any, limit: float) -> tuple[list[str], int]:
    """The prompts of at most so many tokens in the chat template, and how many are longer."""
    kept = [prompt for prompt, n in zip(prompts, n_tokens(prompts, tokenizer), strict=True) if n <= limit]
    return kept, len(prompts) - len(kept)
