"""What is kept of a scored corpus: a threshold, an amount of the best or of a draw, or as much as is good enough."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import cascade, choice, config, judged, metrics
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.keys import Floor, Survey, gives_amount
from pipeline.weighting import Chance, above, lowest_cut

Read = Callable[[], Iterator[NDArray[np.void]]]
"""The rows of the key files, as often as asked."""


class Rule(NamedTuple):
    """What is kept: rows that reach the floor and, with an amount, whose key reaches the cut of their group."""

    floor: Floor | None
    cuts: NDArray[np.int64] | None = None
    """Lowest key that is kept, as a sortable integer: (n_groups,)."""
    paths: tuple[Path, ...] = ()
    """The key files of the shards."""
    reason: str = ""
    """Why a row is dropped whose key does not reach it."""


def floor_of(settings: config.Filter) -> Floor | None:
    """The threshold that rows must reach, if one is given."""
    if settings.min_int_score is not None:
        return Floor("int_score", settings.min_int_score)
    return None if settings.min_score is None else Floor("score", float(np.float32(settings.min_score)))


def choose(recipe: Recipe, survey: Survey, floor: Floor | None, paths: tuple[Path, ...]) -> Rule:
    """The rule that the settings and the scored corpus make."""
    settings = recipe.filter
    if settings.precision is not None:
        return Rule(Floor("score", precise_cut(recipe, survey, settings.precision)))
    if not gives_amount(settings):
        return Rule(floor)
    read, wanted = partial(choice.blocks, paths), amounts(settings, survey.n_scored)
    find = choice.cuts_of_tokens if settings.keep_tokens else choice.cuts_of_documents
    cuts = find(read, wanted)
    check_something(settings, survey, read, cuts)
    reason = "not_drawn" if settings.sampling != "top" else "group_full" if settings.per_group else "score_below_cut"
    return Rule(floor, cuts, paths, reason)


def amounts(settings: config.Filter, n_scored: NDArray[np.int64]) -> NDArray[np.int64]:
    """How much is wanted of each group, documents or tokens: (n_groups,)."""
    if settings.keep_share is not None:
        return np.round(settings.keep_share * n_scored).astype(np.int64)
    return np.full(len(n_scored), settings.keep_tokens or settings.keep_documents)


def check_something(settings: config.Filter, survey: Survey, read: Read, cuts: NDArray[np.int64]) -> None:
    """Refuse an amount so small that nothing is kept, although there is something to keep."""
    able = [(len(rows), int(choice.is_kept(rows, cuts).sum())) for rows in read()]
    if sum(n for _, n in able) or not sum(n for n, _ in able):
        return
    if settings.keep_tokens:
        raise UserError(
            f"filter.keep_tokens: the best document, or those that share its score, has more than"
            f" {settings.keep_tokens} tokens; raise it"
        )
    share, n_scored = settings.keep_share, int(survey.n_scored.max())
    whose = f" in the largest {settings.per_group}" if settings.per_group else ""
    raise UserError(f"filter.keep_share: {share:g} of {n_scored} scored documents{whose} is none; raise it")


def check_behind(settings: config.Filter, survey: Survey, rule: Rule, behind: dict[str, Any]) -> None:
    """Refuse to keep documents of which a cascade has ruled many out, by what it says it looked for."""
    share = settings.keep_share
    if settings.keep_documents is not None:
        share = settings.keep_documents / max(int(survey.n_scored.sum()), 1)
    floor = rule.floor.cut if rule.floor else -math.inf
    if settings.min_int_score is not None:
        floor = survey.lowest
    cut = 0 if rule.cuts is None else int(rule.cuts[0])
    lowest = metrics.unsortable(cut) if 0 < cut < choice.NONE_KEPT else -math.inf
    cascade.check_lowest(max(floor, lowest), share, behind)


def precise_cut(recipe: Recipe, survey: Survey, wanted: float) -> float:
    """The lowest score from which the judged documents promise the precision that is wanted."""
    found = judged.to_choose(recipe)
    if found is None:
        raise UserError(
            "filter.precision: there are no ratings or audit of this run's scored corpus to estimate it from; run"
            " gristmill train, or give another cut"
        )
    cut, best = lowest_cut(found.scores, found.good, judged.strata_for(found, *survey.scores.lie()), wanted)
    if cut is not None:
        return float(np.float32(cut.cut))
    told = f"; the best is {best.precision:.3f}, from score {best.cut:.3f}" if best else ""
    raise UserError(
        f"filter.precision: no cut is {wanted:g} precise by the {found.by} ({len(found.scores)} documents){told}; ask"
        " for less, or train on more ratings"
    )


def chance(settings: config.Filter, survey: Survey, rule: Rule, lowest_kept: float) -> Chance | None:
    """How likely a document of each score is kept, the lowest score that is being known; None where more than the
    score decides."""
    lowest = survey.lowest if settings.min_int_score is not None else rule.floor.cut if rule.floor else -math.inf
    if rule.cuts is None or rule.cuts.max(initial=0) == 0:
        return above(lowest)
    if settings.per_group or settings.sampling == "density":
        return None
    if settings.sampling == "top":
        return above(lowest_kept)
    return drawn(metrics.unsortable(int(rule.cuts[0])), settings.temperature, lowest)


def drawn(cut: float, temperature: float, lowest: float) -> Chance:
    """The chance that score + temperature x Gumbel noise reaches the cut."""

    def kept(scores: NDArray[np.float64]) -> NDArray[np.float64]:
        needed = np.clip((cut - scores) / temperature, -700, 700)
        return np.where(scores >= lowest, -np.expm1(-np.exp(-needed)), 0.0)

    return kept
