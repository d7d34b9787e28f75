"""How labels are distributed, as horizontal bars: one column of bars a corpus, the same labels on the same lines."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import needs
from pipeline.labels import LevelCounts
from pipeline.pictures import BLUE, FAINT, GREY, INK, LIGHT, style, svg
from pipeline.storage import atomic
from pipeline.taxonomy import STEP

PER_PAGE, PER_LINE = 12, 4
"""Corpora on one page, and side by side."""
MANY_LINES = 30
"""With more lines of bars, a page holds one line of corpora only."""
COLUMN_IN, LINE_IN, FIGURE_IN = 2.7, 0.235, 0.95
"""Inches: width of a column of bars, height of a line, room for the figure beside the longest bar."""
UNLABELLED = "(no label)"


class Bars(NamedTuple):
    """One corpus: documents by level and label, and how many were asked about."""

    title: str
    levels: LevelCounts
    no_match: str
    n_asked: int
    n_unlabelled: int


class Line(NamedTuple):
    """One line of every column; `name` is the label in full."""

    name: str
    level: str | None
    shown: str
    colour: str
    is_heading: bool = False


def draw(folder: Path, all_bars: Sequence[Bars], title: str, per_document: str = "") -> list[Path]:
    """Write labels.png, and labels-2.png and so on where there are more corpora than fit on one."""
    needs("matplotlib", "plots")
    shown, n_hidden = lines(all_bars)
    size = PER_LINE if len(shown) > MANY_LINES else PER_PAGE
    pages = [all_bars[start : start + size] for start in range(0, len(all_bars), size)]
    highest = max((share for each in all_bars for line in shown if (share := share_of(each, line))), default=0.0)
    note = ". ".join(part for part in (per_document, left_out(n_hidden)) if part)
    paths = [folder / ("labels.png" if number == 1 else f"labels-{number}.png") for number in range(1, len(pages) + 1)]
    for number, (path, page) in enumerate(zip(paths, pages, strict=True), 1):
        heading = title if len(pages) == 1 else f"{title} ({number} of {len(pages)})"
        draw_page(path, page, shown, highest, heading, note)
    remove_more(folder, len(pages))
    return paths


def remove_more(folder: Path, n_pages: int) -> None:
    """Pages of an earlier time, when there were more corpora."""
    for path in folder.glob("labels-*.png"):
        number = path.stem.removeprefix("labels-")
        if number.isdigit() and int(number) > n_pages:
            path.unlink()


def left_out(n_hidden: int) -> str:
    """What the picture does not show."""
    return f"Labels of the last level without a document are left out ({n_hidden})" if n_hidden else ""


# -- what is shown ----------------------------------------------------------------------------------------------------


def lines(all_bars: Sequence[Bars]) -> tuple[list[Line], int]:
    """The lines, commonest label first, a domain's use cases below it, no match and no label last; and how many use
    cases have no document anywhere."""
    first, *_, last = [*all_bars[0].levels, *all_bars[0].levels]
    no_match, two = all_bars[0].no_match, len(all_bars[0].levels) > 1
    found, n_hidden = [], 0
    for name in by_share(all_bars, first):
        if name == no_match:
            continue
        found.append(Line(name, first, name, BLUE, is_heading=two))
        below = [path for path in by_share(all_bars, last) if two and path.startswith(name + STEP)]
        used = [path for path in below if any(each.levels[last][path] for each in all_bars)]
        found += [Line(path, last, path.removeprefix(name + STEP), LIGHT) for path in used]
        n_hidden += len(below) - len(used)
    found.append(Line(no_match, first, no_match, GREY, is_heading=two))
    return [*found, Line(UNLABELLED, None, UNLABELLED, GREY, is_heading=two)], n_hidden


def by_share(all_bars: Sequence[Bars], level: str) -> list[str]:
    """The labels of a level, those with most documents first, each corpus counting the same."""
    names = list(all_bars[0].levels[level])
    return sorted(names, key=lambda name: -sum(each.levels[level][name] / max(each.n_asked, 1) for each in all_bars))


def count_of(bars: Bars, line: Line) -> int:
    """Documents of a corpus on a line."""
    return bars.n_unlabelled if line.level is None else bars.levels[line.level][line.name]


def share_of(bars: Bars, line: Line) -> float:
    """The same as a share of those asked about."""
    return count_of(bars, line) / bars.n_asked if bars.n_asked else 0.0


# -- drawing ----------------------------------------------------------------------------------------------------------


def draw_page(path: Path, page: Sequence[Bars], shown: list[Line], highest: float, title: str, note: str) -> None:
    """One picture, its columns on one scale."""
    with style(9):
        figure = figure_of(page, shown, highest, title, note)
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, facecolor="white")


def figure_of(page: Sequence[Bars], shown: list[Line], highest: float, title: str, note: str) -> Any:
    """A page of bars, to be written or shown."""
    figures = needs("matplotlib.figure", "plots")
    n_down, n_across = -(-len(page) // PER_LINE), min(len(page), PER_LINE)
    names_in = 0.085 * max(len(line.shown) for line in shown) + 0.4
    size = names_in + COLUMN_IN * n_across, 0.9 + n_down * (0.6 + LINE_IN * len(shown))
    figure = figures.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(n_down, n_across, squeeze=False).ravel()
    for position, (axis, bars) in enumerate(zip(axes, page, strict=False)):
        draw_column(axis, bars, shown, highest)
        name_lines(axis, shown if position % PER_LINE == 0 else [])
    for axis in axes[len(page) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(textwrap.fill(title, int(9 * size[0])), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(textwrap.fill(note, int(13 * size[0])), x=0.01, ha="left", fontsize=8, color=FAINT)
    return figure


def as_svg(bars: Bars) -> str:
    """One corpus as a chart for a page, without a title."""
    shown, n_hidden = lines([bars])
    highest = max(share_of(bars, line) for line in shown)
    with style(9):
        return svg(figure_of([bars._replace(title="")], shown, highest, "", left_out(n_hidden)))


def draw_column(axis: Any, bars: Bars, shown: list[Line], highest: float) -> None:
    """The bars of one corpus, each with its figures; without a scale, as the figures say it."""
    shares = [share_of(bars, line) for line in shown]
    rows = range(len(shown))
    axis.barh(rows, shares, height=0.72, color=[line.colour for line in shown])
    for row, line in zip(rows, shown, strict=True):
        told = f"{shares[row]:.0%}, {count_of(bars, line):,} of {bars.n_asked:,}"
        ink = INK if count_of(bars, line) else FAINT
        axis.annotate(
            told, (shares[row], row), (3, 0), textcoords="offset points", va="center", fontsize=7.5, color=ink
        )
    axis.set_xlim(0, max(highest, 0.01) * COLUMN_IN / (COLUMN_IN - FIGURE_IN))
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.tick_params(length=0, bottom=False, labelbottom=False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.spines["left"].set_color(GREY)
    axis.set_title(textwrap.fill(bars.title, 34), fontsize=9, loc="left")


def name_lines(axis: Any, shown: list[Line]) -> None:
    """The labels left of the first column, those with others below them in bold."""
    axis.set_yticks(range(len(shown)), [line.shown for line in shown])
    for name, line in zip(axis.get_yticklabels(), shown, strict=True):
        name.set_fontweight("bold" if line.is_heading else "normal")
