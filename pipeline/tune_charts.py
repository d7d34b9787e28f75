"""What a tuning's trials tell, as charts: each setting's slice, importances, and quality against price."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import tried
from pipeline.charts import markup
from pipeline.pictures import BLUE, GREY, INK, OFFSET, ORANGE, RULE, WIDE_IN, Axes, chart
from pipeline.trials import Trial, ranked, value_of

Values = dict[str, Any]

SLICE_IN = (3.3, 2.3)
"""Inches of a small chart."""
N_SHOWN = 10
"""Best trials in the table."""
LABEL = 18
"""Characters of a value beside an axis."""
PRICES = {"usd_per_1000": "US dollars per 1,000 documents", "tokens_per_document": "tokens per document"}
"""Figures that tell what settings cost, the better known one first."""
MOST_ROWS = 6
"""Different numbers that still have a row each."""
SKEWED = 8
"""Times the median that the highest number is where an axis becomes logarithmic."""


class Point(NamedTuple):
    """One trial in a slice."""

    setting: Any
    value: float
    is_best: bool


def page(run_folder: Path, result: Values) -> Values:
    """What the report's page shows of the trials so far, and of the result once there is one."""
    trials = tried.read(run_folder)
    objective = str(result.get("objective") or "objective")
    order = ranked(trials)
    return {
        "objective": objective,
        "called": tried.called(objective),
        "less_price": bool(result) and tried.less_price(trials, objective),
        "default": next((trial for trial in trials if trial.number == tried.DEFAULTS), None),
        "best": [trial for trial in order if trial.number != tried.DEFAULTS][:N_SHOWN],
        "winner": order[0].number if order else None,
        "failed": [trial for trial in trials if trial.state == "failed"],
        "n_trials": sum(trial.number != tried.DEFAULTS for trial in trials),
        "usd_known": tried.known(trials, "usd_per_1000"),
        "slices": [markup(each) for each in slices(trials, objective, result.get("importances") or {})],
        "importances": drawn(importances(result.get("importances") or {})),
        "price": drawn(against_price(trials, objective)),
    }


def drawn(svg: str | None) -> Any:
    """A chart as markup, if there is one."""
    return markup(svg) if svg else None


# -- slices -----------------------------------------------------------------------------------------------------------


def slices(trials: Sequence[Trial], objective: str, importance: dict[str, float]) -> list[str]:
    """A small chart for each setting that took several values, the most important first."""
    best = ranked(trials)
    defaults = [trial for trial in best if trial.number == tried.DEFAULTS]
    there = [trial for trial in best if trial.number != tried.DEFAULTS]
    names = sorted(
        dict.fromkeys(name for trial in there for name in trial.params), key=lambda x: -importance.get(x, 0)
    )
    values = [value_of(trial) for trial in best]
    label = tried.called(objective) + (" less price" if tried.less_price(trials, objective) else "")
    shown = []
    for name in names:
        points = [
            Point(trial.params[name], value_of(trial), trial is best[0]) for trial in there if name in trial.params
        ]
        if len({key(point.setting) for point in points}) > 1:
            default = value_of(defaults[0]) if defaults else None
            shown.append(one_slice(name, points, default, (min(values), max(values)), label))
    return shown


def key(setting: Any) -> str:
    """What tells one value from another: 1 and 1.0 are the same, true and "1" are others."""
    return repr(float(setting)) if is_number(setting) else repr(setting)


def one_slice(name: str, points: Sequence[Point], default: float | None, ends: tuple[float, float], label: str) -> str:
    """The objective to the right, the setting's values upwards or a row each."""
    with chart(*SLICE_IN) as (axes, made):
        if default is not None:
            axes.axvline(default, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        places = by_number(axes, points) if on_axis(points) else by_row(axes, points)
        dots(axes, [(point.value, place, point.is_best) for point, place in zip(points, places, strict=True)])
        margin = 0.06 * (ends[1] - ends[0]) or 0.05
        axes.set_xlim(ends[0] - margin, ends[1] + margin)
        axes.xaxis.set_major_locator(few_ticks())
        axes.set_title(tried.clipped(name, 34), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel(label)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    return made[0]


def few_ticks() -> Any:
    """At most six round numbers along an axis."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def on_axis(points: Sequence[Point]) -> bool:
    """Whether every value is a number, and there are too many for a row each."""
    numbers = {point.setting for point in points if is_number(point.setting)}
    return len(numbers) > MOST_ROWS and all(is_number(point.setting) for point in points)


def is_number(setting: Any) -> bool:
    """Whether a value has a place on an axis."""
    return isinstance(setting, int | float) and not isinstance(setting, bool)


def by_number(axes: Axes, points: Sequence[Point]) -> list[float]:
    """Places of numbers on their axis."""
    settings = [float(point.setting) for point in points]
    if is_skewed(settings):
        axes.set_yscale("log")
        plain_log(axes, axes.yaxis)
    else:
        axes.yaxis.set_major_locator(few_ticks())
        axes.margins(y=0.12)
    return settings


def is_skewed(numbers: Sequence[float]) -> bool:
    """Whether most numbers would crowd at the low end of an axis that is not logarithmic."""
    return min(numbers) > 0 and statistics.median(numbers) < max(numbers) / SKEWED


def plain_log(axes: Axes, axis: Any) -> None:
    """Powers of ten as plain text on a logarithmic axis, and nothing between them."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def by_row(axes: Axes, points: Sequence[Point]) -> list[float]:
    """Places of values that have a row each, points of one row side by side."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point.setting), []).append(point)
    order = sorted(groups.values(), key=row_order(points))
    axes.set_yticks(range(len(order)), labels([group[0].setting for group in order]))
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    place = {id(point): row + side(n) for row, group in enumerate(order) for n, point in enumerate(group)}
    return [place[id(point)] for point in points]


def row_order(points: Sequence[Point]) -> Callable[[list[Point]], float]:
    """Numbers from the bottom up; others with the best on average at the top."""
    if all(is_number(point.setting) for point in points):
        return lambda group: -group[0].setting
    return lambda group: -statistics.fmean(point.value for point in group)


def side(n: int) -> float:
    """How far from the middle of its row the nth point stands: the golden ratio spreads any number of them."""
    return 0.36 * ((n * 0.618 + 0.5) % 1 - 0.5)


def labels(settings: Sequence[Any]) -> list[str]:
    """Names of values; those that would read the same by their ends, and by number where these are the same too."""
    names = [tried.words(setting, LABEL) for setting in settings]
    for shorten in (ending, lambda setting, n: f"{tried.words(setting, LABEL - 4)} ({n})"):
        names = [
            shorten(setting, n) if names.count(name) > 1 else name
            for n, (name, setting) in enumerate(zip(names, settings, strict=True), 1)
        ]
    return names


def ending(setting: Any, _: int) -> str:
    """The end of a value."""
    text = tried.clipped(str(setting), 10_000).removesuffix(".md")
    return text if len(text) <= LABEL else "…" + text[1 - LABEL :].lstrip()


def dots(axes: Axes, points: Sequence[tuple[float, float, bool]]) -> None:
    """Trials, and the best as a diamond above them."""
    others, best = [[point[:2] for point in points if point[2] is is_best] for is_best in (False, True)]
    if others:
        axes.scatter(*zip(*others, strict=True), 26, color=BLUE, alpha=0.6, linewidth=0, zorder=3)
    if best:
        axes.scatter(*zip(*best, strict=True), 52, color=ORANGE, marker="D", linewidth=0, zorder=4)


# -- importances ------------------------------------------------------------------------------------------------------


def importances(found: dict[str, float]) -> str | None:
    """A bar for each setting, the most important at the top."""
    there = sorted(((share, name) for name, share in found.items() if math.isfinite(share)), reverse=True)
    if not there:
        return None
    with chart(WIDE_IN, 0.6 + 0.32 * len(there)) as (axes, made):
        axes.barh(range(len(there)), [share for share, _ in there], height=0.66, color=BLUE)
        for row, (share, _) in enumerate(there):
            axes.annotate(f"{share:.2f}", (share, row), (4, 0), **OFFSET, va="center", fontsize=9, color=INK)
        axes.set_yticks(range(len(there)), [tried.clipped(name, 28) for _, name in there])
        axes.set_ylim(len(there) - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_xlim(0, 1.14 * max(max(share for share, _ in there), 1e-9))
        axes.spines["bottom"].set_visible(False)
    return made[0]


# -- quality against price --------------------------------------------------------------------------------------------


def against_price(trials: Sequence[Trial], objective: str) -> str | None:
    """Trials by what they cost and how good they are, and the front; None where the price is always the same."""
    order = ranked(trials)
    for figure, label in PRICES.items():
        points = [
            (float(each.figures[figure]), tried.quality(each, objective) or 0.0, each)
            for each in order
            if each.figures.get(figure) is not None
        ]
        if len({price for price, _, _ in points}) > 1:
            return priced(points, label, tried.called(objective), order[0])
    return None


def priced(points: Sequence[tuple[float, float, Trial]], x: str, y: str, best: Trial) -> str:
    """The chart of quality against price."""
    prices = [price for price, _, _ in points]
    with chart(WIDE_IN, 3.1) as (axes, made):
        if is_skewed(prices):
            axes.set_xscale("log")
            plain_log(axes, axes.xaxis)
        cheapest, goods = zip(*front([point[:2] for point in points]), strict=True)
        axes.step([*cheapest, max(prices)], [*goods, goods[-1]], where="post", color=GREY, linewidth=1.4, zorder=2)
        dots(axes, [(price, good, trial is best) for price, good, trial in points if trial is best or trial.params])
        for price, good, trial in points:
            if trial is best:
                axes.annotate("best", (price, good), (7, 7), **OFFSET, fontsize=9)
            elif trial.number == tried.DEFAULTS:
                axes.scatter(price, good, 46, facecolor="none", edgecolor=INK, linewidth=1.4, zorder=4)
                axes.annotate("default", (price, good), (7, -13), **OFFSET, fontsize=9)
        axes.margins(0.1, 0.14)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    return made[0]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (price, quality) than which none is both as cheap and better, the cheapest first: the Pareto front."""
    kept: list[tuple[float, float]] = []
    for price, good in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or good > kept[-1][1]:
            kept.append((price, good))
    return kept
