"""A search space: lists and ranges as people write them, as Optuna's distributions."""

import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from pipeline.errors import UserError, needs
from pipeline.trials import Params

Distribution = Any
"""One of optuna.distributions."""

LIKE_JSON = ("[", "{", '"')
"""First characters of texts that stand for JSON."""
RANGE = {"low", "high", "step", "log"}
LARGEST_GRID = 100_000


def read(space: Mapping[str, Any], tunable: Sequence[str], where: str = "tune.space") -> dict[str, Distribution]:
    """What is tried for each name: a list of values, a range {low, high} with step or log, or one value that is
    fixed; names that end in a dot in `tunable` take any further name."""
    if not space:
        raise UserError(f"{where} is empty; give at least one setting to vary, such as document_tokens: [200, 400]")
    for name in space:
        check_name(str(name), tunable, where)
    return {str(name): distribution(values, f"{where}.{name}") for name, values in space.items()}


def some(values: Any) -> list[Any]:
    """The values of a list, the ends of a range, or the only value."""
    values = plain(values)
    if isinstance(values, Mapping):
        return [values[end] for end in ("low", "high") if end in values]
    return values if isinstance(values, list) else [values]


def check_name(name: str, tunable: Sequence[str], where: str) -> None:
    """Refuse what cannot be tuned."""
    names = [each for each in tunable if not each.endswith(".")]
    families = [each for each in tunable if each.endswith(".")]
    if name in names or any(name.startswith(family) and name != family for family in families):
        return
    if f"{name.rstrip('.')}." in families:
        raise UserError(f"{where}.{name} is a group of settings; write {name.rstrip('.')}.NAME for each of them")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join([*names, *(f'{f}NAME' for f in families)])}"
    raise UserError(f"{where}.{name} cannot be tuned; {hint}")


def distribution(values: Any, where: str) -> Distribution:
    """The distribution of one setting."""
    if hasattr(values, "rvs"):
        raise UserError(f"{where}: a distribution of scipy cannot be stored; give a range {{low: 0.0, high: 1.0}}")
    values = plain(values)
    if isinstance(values, Mapping):
        return span(values, where)
    choices = distinct([carried(value, where) for value in (values if isinstance(values, list) else [values])])
    if not choices:
        raise UserError(f"{where} is an empty list; give the values to try, or leave the setting out")
    if {each for each in choices if isinstance(each, bool)} & {each for each in choices if is_number(each)}:
        raise UserError(f"{where}: true and 1 (false and 0) mean the same in one list; give only one of the two")
    return needs("optuna", "tune").distributions.CategoricalDistribution(choices)


def plain(value: Any) -> Any:
    """Arrays, tuples, ranges, NumPy's numbers and paths as YAML would give them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple | range) else value


def carried(value: Any, where: str) -> Any:
    """A value as Optuna stores it: lists, mappings, and texts that look like them, as JSON."""
    value = plain(value)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str) and not value.startswith(LIKE_JSON):
        return value
    try:
        if isinstance(value, str | list | Mapping):
            return json.dumps(value, ensure_ascii=False, allow_nan=False, default=plain)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{where}: {value!r} is no value to try; give text, finite numbers, true, false, null or lists")


def decoded(params: Params) -> Params:
    """Values as they stood in the space, from those that Optuna stores."""
    return {name: read_back(value) for name, value in params.items()}


def read_back(value: Any) -> Any:
    """One value as it stood in the space."""
    if isinstance(value, str) and value.startswith(LIKE_JSON):
        return json.loads(value)
    if not isinstance(value, float):
        return value
    short = float(f"{value:.12g}")  # 0.1 + 2 * 0.1 is 0.3, as its step was written
    return short if math.isclose(short, value, rel_tol=1e-15) else value


def distinct(choices: Sequence[Any]) -> list[Any]:
    """Each choice once; true is not 1 here."""
    return list({(isinstance(choice, bool), choice): choice for choice in choices}.values())


def is_number(value: Any) -> bool:
    """Whether it is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- ranges -----------------------------------------------------------------------------------------------------------


def span(values: Mapping[str, Any], where: str) -> Distribution:
    """A range: of whole numbers, if all that was given is whole."""
    if not {"low", "high"} <= set(values) <= RANGE:
        raise UserError(
            f"{where}: a range is {{low: 0.0, high: 1.0}} with step or log: true, got {dict(values)!r}; a mapping that"
            " is a value itself goes in a list"
        )
    low, high, step, log = (plain(values.get(name)) for name in ("low", "high", "step", "log"))
    check_span(low, high, step, log, where)
    kinds = needs("optuna", "tune").distributions
    if all(isinstance(value, int) for value in (low, high, step or 1)):
        return kinds.IntDistribution(low, last(low, high, step or 1), log=bool(log), step=step or 1)
    return kinds.FloatDistribution(low, last(low, high, step) if step else high, log=bool(log), step=step)


def check_span(low: Any, high: Any, step: Any, log: Any, where: str) -> None:
    """Refuse ranges that hold nothing, or what was hardly meant."""
    for name, value in (("low", low), ("high", high), ("step", 1 if step is None else step)):
        if not is_number(value) or not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value!r}, which is no finite number (YAML needs 1.0e-5, not 1e-5)")
    if low >= high:
        raise UserError(f"{where}: low {low} is not below high {high}; give one fixed value as it is")
    if log is not None and not isinstance(log, bool):
        raise UserError(f"{where}: log is {log!r}; give true or false")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{where}: with log: true low must be above 0, and there is no step")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{where}: step {step} must be above 0, and at most high - low")
    if isinstance(low, int) and isinstance(high, int) and high - low == 1 and step is None:
        raise UserError(
            f"{where}: between the whole numbers {low} and {high} there is nothing; give [{low}, {high}] for these"
            f" two, or {{low: {low}.0, high: {high}.0}} for fractions"
        )


def last(low: float, high: float, step: float) -> float:
    """The last step that is not above high."""
    exact_low, exact_high, exact_step = (Decimal(str(value)) for value in (low, high, step))
    exact = exact_low + (exact_high - exact_low) // exact_step * exact_step
    return int(exact) if isinstance(low, int) and isinstance(step, int) else float(exact)


# -- grids ------------------------------------------------------------------------------------------------------------


def values(distribution: Distribution) -> Sequence[Any] | None:
    """All values of a list or a stepped range; None where there is no end of them."""
    if hasattr(distribution, "choices"):
        return list(distribution.choices)
    low, high, step = distribution.low, distribution.high, distribution.step
    if isinstance(low, int):
        return range(low, high + 1, step)
    if step is None:
        return None
    exact_low, exact_step = Decimal(str(low)), Decimal(str(step))
    return [float(exact_low + k * exact_step) for k in range(1 + round((high - low) / step))]


def grid(distributions: Mapping[str, Distribution]) -> int | None:
    """How many combinations there are; None where there is no end of them."""
    sizes = [values(each) for each in distributions.values()]
    return None if None in sizes else math.prod(len(size) for size in sizes if size is not None)


def grid_values(distributions: Mapping[str, Distribution], where: str = "tune.space") -> dict[str, list[Any]]:
    """What a grid goes through, for each name."""
    found = {name: values(each) for name, each in distributions.items()}
    for name, all_values in found.items():
        if all_values is None:
            raise UserError(f"{where}.{name}: a grid over a range needs a step; give one, or a list of values")
    n = grid(distributions)
    if n is None or n > LARGEST_GRID:
        raise UserError(f"{where}: a grid of {n:,} combinations; give fewer values or larger steps, or search: tpe")
    return {name: list(all_values or ()) for name, all_values in found.items()}
