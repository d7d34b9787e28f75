"""Charts as SVG that takes its colours from the page, so that it follows light and dark; drawn by matplotlib."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.config import digest
from pipeline.errors import needs

BLUE, LIGHT, ORANGE, GREEN, GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#A6A6A6"
"""Colours that everyone can tell apart (Okabe and Ito)."""
INK, FAINT, RULE = "#262626", "#767676", "#DDDDDD"
INKS = {
    BLUE: "blue",
    LIGHT: "light",
    ORANGE: "orange",
    GREEN: "green",
    GREY: "grey",
    INK: "ink",
    FAINT: "faint",
    RULE: "rule",
    "#FFFFFF": "paper",
}
"""The page's variable for each."""
WIDE_IN, HIGH_IN = 4.8, 2.8
"""Inches of a chart; an inch is 72 units of the SVG, and text of 10 points stays readable at 330 pixels."""

SERIES = (BLUE, ORANGE, GREY)
"""Of series in one chart: the teacher's, the student's, and what stands beside them."""

FEW = 12
"""Points of a line up to which each is marked."""

Band = Sequence[float] | None
"""Low and high end of a 95% interval."""
Axes = Any


class Line(NamedTuple):
    """One line of a chart: its points, and an interval for each (None where there is none)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    bands: Sequence[Band] = ()


@contextmanager
def chart(wide_in: float = WIDE_IN, high_in: float = HIGH_IN) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; the SVG is in the list afterwards."""
    figures = needs("matplotlib.figure", "plots")
    with style():
        figure = figures.Figure(figsize=(wide_in, high_in), layout="constrained")
        axes, made = figure.subplots(), list[str]()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=FAINT, length=0)
        yield axes, made
        made.append(svg(figure))


@contextmanager
def style(points: float = 10) -> Iterator[None]:
    """Plain text, our inks, and names within an SVG that are the same each time."""
    matplotlib = needs("matplotlib", "plots")
    ours = {
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "font.size": points,
        "svg.fonttype": "none",
        "svg.hashsalt": "gristmill",
    }
    with matplotlib.rc_context(ours):
        yield


def svg(figure: Any) -> str:
    """A figure as an SVG element to stand in a page: no width of its own, its inks the page's variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    found = out.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>\s*", "", found, flags=re.DOTALL)
    wide, high = re.findall(r'(?:width|height)="([\d.]+)pt"', found)[:2]
    found = re.sub(
        r"<svg [^>]*>", f'<svg viewBox="0 0 {wide} {high}" role="img" xmlns:xlink="{XLINK}">', found, count=1
    )
    for colour, name in INKS.items():
        found = re.sub(colour, f"var(--{name})", found, flags=re.IGNORECASE)
    return own_names(re.sub(r"font-family: [^;\"]*;? ?", "", found))


XLINK = "http://www.w3.org/1999/xlink"


def own_names(found: str) -> str:
    """The SVG with only the names that something refers to, made its own, as several SVGs stand in one page."""
    mark = digest(found)[:6]
    for name in set(re.findall(r'id="([\w.-]+)"', found)):
        found = found.replace(f"#{name})", f"#{mark}-{name})").replace(f'"#{name}"', f'"#{mark}-{name}"')
        found = found.replace(f' id="{name}"', f' id="{mark}-{name}"' if f"#{mark}-{name}" in found else "")
    return re.sub(r"<!--.*?-->\s*|<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", found, flags=re.DOTALL)


# -- charts -----------------------------------------------------------------------------------------------------------


def bars(
    names: Sequence[str], series: Mapping[str, Sequence[float]], label: str, colours: Sequence[str] = SERIES
) -> str:
    """Upright bars, several series side by side, each bar with its number."""
    with chart() as (axes, made):
        width = 0.8 / len(series)
        for number, (name, values) in enumerate(series.items()):
            places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(names))]
            axes.bar(places, values, width * 0.94, color=colours[number], label=name)
            for place, value in zip(places, values, strict=True):
                size = {1: 9.5, 2: 8.5}.get(len(series), 7.5)
                axes.annotate(short(value), (place, value), (0, 2), **OFFSET, ha="center", fontsize=size, color=FAINT)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        legend(axes, len(series))
    return made[0]


def short(value: float) -> str:
    """A count in at most five characters."""
    units = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
    unit, sign = next(((unit, sign) for unit, sign in units if value >= 0.9995 * unit), (1.0, ""))
    digits = 1 if sign and value < 9.95 * unit else 0
    return f"{value / unit:.{digits}f}{sign}"


OFFSET = {"textcoords": "offset points"}


def lines(
    drawn: Sequence[Line],
    x: str,
    y: str,
    log_x: bool = False,
    percent_x: bool = False,
    marks: dict[str, float] | None = None,
) -> str:
    """Lines with their intervals, and upright marks with a name."""
    with chart() as (axes, made):
        for line, colour in zip(drawn, SERIES, strict=False):
            draw_line(axes, line, colour)
        if log_x:
            axes.set_xscale("log")
            axes.minorticks_off()
            ticks = sorted({value for line in drawn for value in line.x})
            axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        if percent_x:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        mark(axes, marks or {}, 0.02)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        legend(axes, len(drawn))
    return made[0]


def mark(axes: Axes, marks: dict[str, float], height: float) -> None:
    """Upright lines with a name, at a share of the chart's height."""
    for name, place in marks.items():
        axes.axvline(place, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(name, (place, height), (4, 0), xycoords=axes.get_xaxis_transform(), **OFFSET, fontsize=9)


def draw_line(axes: Axes, line: Line, colour: str) -> None:
    """One line, its intervals as a band."""
    size = 3.5 if len(line.x) <= FEW else 0
    axes.plot(line.x, line.y, color=colour, linewidth=1.8, marker="o", markersize=size, label=line.name)
    known = [(x, *band) for x, band in zip(line.x, line.bands, strict=False) if band]
    if known:
        at, low, high = zip(*known, strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)


def histogram(edges: Sequence[float], counts: Sequence[float], marks: dict[str, float]) -> str:
    """Documents by score, as one outline."""
    with chart() as (axes, made):
        axes.stairs(counts, edges, fill=True, color=BLUE)
        mark(axes, marks, 0.92)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(0, 1.12 * max(counts))
        axes.set_xlabel("score")
    return made[0]


def calibration(bins: Sequence[dict[str, float]], scale: tuple[float, float]) -> str:
    """Mean score by the teacher over the student's; a larger point stands for more documents."""
    with chart(WIDE_IN, 3.4) as (axes, made):
        axes.plot(scale, scale, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        most = max(each["n"] for each in bins)
        xs, ys = [each["predicted"] for each in bins], [each["actual"] for each in bins]
        axes.plot(xs, ys, color=BLUE, linewidth=1.2, alpha=0.6)
        axes.scatter(xs, ys, [14 + 60 * each["n"] / most for each in bins], color=BLUE, zorder=3, linewidth=0)
        axes.set_xlabel("student's score")
        axes.set_ylabel("teacher's score")
        axes.set_xlim(min(scale[0], *xs) - 0.1, max(scale[1], *xs) + 0.1)
        axes.set_ylim(min(scale[0], *ys) - 0.1, max(scale[1], *ys) + 0.1)
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    return made[0]


def dots(names: Sequence[str], values: Sequence[float], bands: Sequence[Band], label: str) -> str:
    """A dot and its interval a line."""
    with chart(WIDE_IN, 0.75 + 0.3 * len(names)) as (axes, made):
        for row, (value, band) in enumerate(zip(values, bands, strict=True)):
            if band:
                axes.plot(band, (row, row), color=BLUE, linewidth=2, alpha=0.5, solid_capstyle="round")
            axes.plot(value, row, "o", color=BLUE, markersize=6)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        ends = [end for band in bands if band for end in band]
        axes.set_xlim(min(0, *values, *ends) - 0.02, max(1.0, *values, *ends))
        axes.set_xlabel(label)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    return made[0]


def plain(axis: Any) -> None:
    """Only what is needed to read the values."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.tick_params(color=GREY, labelcolor=INK)


def legend(axes: Axes, n_series: int) -> None:
    """The names of several series, above the chart."""
    if n_series > 1:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=n_series, frameon=False, borderaxespad=0.2, handlelength=1.2
        )
