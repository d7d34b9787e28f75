"""Errors for people: one line that says what, where, and what to do."""

import importlib
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user can mend; the command line prints the one line and exits 1."""


class SettingsError(UserError):
    """A flag or a recipe that cannot be read; the command line exits 2."""


class Pending(UserError):
    """Something outside has to be done first; the command line exits 75, and the same command goes on."""


def required(value: T | None, setting: str, example: str) -> T:
    """The value of a setting that this stage cannot do without."""
    if value is None:
        raise UserError(f"{setting} is not set; give it in the recipe or as a flag, such as {example}")
    return value


def needs(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or name the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f'{module} is not installed; in your clone run: pip install -e ".[{extra}]"') from None
