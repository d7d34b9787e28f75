"""The planner's picture: how the scores lie, how good each share of the corpus would be, and what it is made of."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import needs
from pipeline.pictures import BLUE, FAINT, GREY, INK, LIGHT, ORANGE, plain
from pipeline.storage import atomic

SHADES = ("#A9CFE8", "#56B4E9", "#0072B2", "#003B5C")
"""From the lowest cut to the highest."""
FEWEST = 10
"""Judged documents that a point of the curve must keep to be drawn."""
LABEL_WIDTH = 0.06
"""Of a label, as a share of the picture's width."""
MOST_VALUES, MOST_PANELS = 12, 3
"""Values of a column, and columns, that are drawn."""

Result = dict[str, Any]


def draw(path: Path, result: Result) -> None:
    """Write the picture of a CutsResult."""
    matplotlib, figures = needs("matplotlib", "plots"), needs("matplotlib.figure", "plots")
    columns = list(result["by"].items())[:MOST_PANELS]
    heights = [2.2, 3.4, *(0.75 + 0.27 * min(len(values), MOST_VALUES) for _, values in columns)]
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "text.color": INK, "axes.labelcolor": INK}):
        figure = figures.Figure(figsize=(8, sum(heights) + 0.9), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
        axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False).ravel()
        draw_scores(axes[0], result)
        draw_quality(axes[1], result)
        for axis, (name, values) in zip(axes[2:], columns, strict=True):
            draw_values(axis, name, values[:MOST_VALUES], whole_cuts(result))
        for axis in axes:
            plain(axis)
        told = f"What each cut keeps of {result['n_scored']:,} scored documents, {big(result['n_tokens'])} tokens"
        figure.suptitle(told, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(textwrap.fill(note(result), 118), x=0.01, ha="left", fontsize=8, color=FAINT)
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130, facecolor="white")


def note(result: Result) -> str:
    """How the figures came about."""
    tokens = f"Tokens are counted by {result['tokens_counted_by']}."
    looked = result["n_looked_at"]
    sample = f" Looked at {looked:,} documents drawn uniformly." if looked < result["n_scored"] else ""
    if not result["judged_by"]:
        return f"{tokens}{sample} No ratings or audit of this corpus, so neither precision nor recall is known."
    source = "audit" if result["judged_by"] == "audit" else "ratings (held-out scores, without the test part)"
    return (
        f"Good: at least {result['good_from']:g} by the teacher, estimated for the corpus from {result['n_judged']:,}"
        f" documents of the {source}, weighted by stratum of the score. Bands: 95% intervals. {tokens}{sample}"
    )


def whole_cuts(result: Result) -> list[Result]:
    """The cuts at whole scores that keep something, from the lowest."""
    return [cut for cut in result["cuts"] if cut["by"] == "int_score" and cut["documents"]]


# -- the scores -------------------------------------------------------------------------------------------------------


def draw_scores(axis: Any, result: Result) -> None:
    """A histogram of the scores, and where each int_score begins."""
    edges, documents = result["score_counts"]["edges"], result["score_counts"]["documents"]
    axis.stairs(documents, edges, fill=True, color=LIGHT, linewidth=0)
    highest = max(documents)
    axis.set_ylim(0, highest * 1.28)
    last = -float("inf")
    for cut in whole_cuts(result):
        axis.axvline(cut["score"], ymax=0.84, color=INK, linewidth=0.8)
        if cut["score"] - last > LABEL_WIDTH * (edges[-1] - edges[0]):
            last = cut["score"]
            told = f"\u2265 {cut['cut']:g}\n{percent(cut['share'])}"
            axis.annotate(told, (cut["score"], highest * 1.09), (2, 0), textcoords="offset points", fontsize=7.5)
    axis.set_xlabel("score")
    axis.set_ylabel("documents")
    axis.yaxis.set_major_formatter(formatter(big))
    axis.set_title(
        "Scores: where each int_score begins, and the share of documents from there on", loc="left", fontsize=10
    )


# -- the quality ------------------------------------------------------------------------------------------------------


def draw_quality(axis: Any, result: Result) -> None:
    """Precision and recall by the share that is kept, with their intervals."""
    axis.set_xscale("log")
    axis.set_xlim(1.06, 0.0047)
    axis.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005])
    axis.xaxis.set_major_formatter(formatter(percent))
    axis.minorticks_off()
    axis.set_ylim(0, 1.14)
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axis.yaxis.set_major_formatter(formatter(percent))
    axis.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axis.set_xlabel("share of the documents kept, the best first")
    axis.set_title("How good the kept documents are (\u2265: cuts by int_score)", loc="left", fontsize=10)
    known = [point for point in result["curve"] if point["n_judged_kept"] >= FEWEST]
    for name, colour in (("precision", BLUE), ("recall", ORANGE)):
        draw_line(axis, [point for point in known if point[name] is not None], name, colour)
    if not known:
        axis.text(0.5, 0.5, "not known: nothing is judged", transform=axis.transAxes, ha="center", color=FAINT)
    if result["base_rate"] is not None:
        axis.axhline(result["base_rate"], color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        told = f"good in the corpus: {percent(result['base_rate'])}"
        halo = needs("matplotlib.patheffects", "plots").withStroke(linewidth=3, foreground="white")
        style = {"ha": "right", "color": FAINT, "path_effects": [halo]}
        axis.annotate(told, (0.0047, result["base_rate"]), (0, 4), textcoords="offset points", **style)
    mark_cuts(axis, result)


def draw_line(axis: Any, points: list[Result], name: str, colour: str) -> None:
    """One figure along the shares, in its band."""
    shares = [point["share"] for point in points]
    low, high = ([point[f"{name}_interval"][end] for point in points] for end in (0, 1))
    axis.fill_between(shares, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(shares, [point[name] for point in points], color=colour, linewidth=1.8)
    name_line(axis, points, name, colour)


def name_line(axis: Any, points: list[Result], name: str, colour: str) -> None:
    """The figure's name where its line is apart from the other one."""
    if not points:
        return
    here = points[0] if name == "precision" else points[len(points) * 2 // 5]
    place, side = ((8, 6), "right") if name == "precision" else ((7, 7), "left")
    spot = (here["share"], here[name])
    halo = needs("matplotlib.patheffects", "plots").withStroke(linewidth=3, foreground="white")
    style = {"color": colour, "fontweight": "bold", "path_effects": [halo]}
    axis.annotate(name, spot, place, textcoords="offset points", ha=side, **style)


def mark_cuts(axis: Any, result: Result) -> None:
    """Where the whole scores and the student's own cut are, on the line of precision."""
    halo = needs("matplotlib.patheffects", "plots").withStroke(linewidth=2.5, foreground="white")
    for cut in result["cuts"]:
        if cut["by"] == "share" or cut["precision"] is None or not 0.005 <= cut["share"] < 0.999:
            continue
        is_whole = cut["by"] == "int_score"
        told = f"\u2265 {cut['cut']:g}" if is_whole else "best F1"
        axis.plot(cut["share"], cut["precision"], "o" if is_whole else "D", color=BLUE, markersize=5, mec="white")
        place, side = ((0, 7), "center") if is_whole else ((6, -10), "left")
        spot = (cut["share"], cut["precision"])
        axis.annotate(
            told, spot, place, textcoords="offset points", ha=side, fontsize=8, path_effects=[halo], zorder=4
        )


# -- the columns ------------------------------------------------------------------------------------------------------


def draw_values(axis: Any, name: str, values: list[Result], cuts: list[Result]) -> None:
    """Which share of each value's documents every whole score would keep."""
    chosen = cuts[-len(SHADES) :]
    for row, value in enumerate(values):
        shares = [next(cut["share"] for cut in value["cuts"] if same(cut, of)) for of in chosen]
        axis.plot([0, max(shares, default=0)], [row, row], color=GREY, linewidth=0.8, alpha=0.6, zorder=1)
        for share, shade in zip(shares, SHADES[len(SHADES) - len(chosen) :], strict=True):
            axis.scatter(share, row, s=34, color=shade, edgecolor="white", linewidth=0.6, zorder=2)
    axis.set_yticks(range(len(values)), [f"{clip(value['value'])}  ({big(value['documents'])})" for value in values])
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.set_xlim(left=-0.01)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(formatter(percent))
    axis.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
    axis.set_xlabel("share of its documents kept")
    axis.set_title(f"By {name} (documents in brackets)", loc="left", fontsize=10)
    for cut, shade in zip(chosen, SHADES[-len(chosen) :], strict=True):
        axis.scatter([], [], s=34, color=shade, label=f"\u2265 {cut['cut']:g}")
    if chosen:
        tight = {"handletextpad": 0, "columnspacing": 0.9, "borderaxespad": 0.1, "frameon": False}
        legend = axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(chosen), **tight)
        legend.set_in_layout(False)


def same(one: Result, other: Result) -> bool:
    """Whether two cuts are made the same way."""
    return bool((one["by"], one["cut"]) == (other["by"], other["cut"]))


# -- words ------------------------------------------------------------------------------------------------------------


def formatter(form: Callable[[float], str]) -> Any:
    """Labels of an axis."""
    return needs("matplotlib.ticker", "plots").FuncFormatter(lambda value, _: form(value))


def percent(share: float) -> str:
    """A share with as many digits as it needs: 0.5%, 12%."""
    return f"{share:.1%}" if 0 < share < 0.0095 or 0.995 < share < 1 else f"{share:.0%}"


def big(number: float) -> str:
    """A count in few characters: 950, 1.2k, 35M, 1.1B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def clip(value: str) -> str:
    """A value fit to stand beside an axis."""
    return value if len(value) <= 32 else value[:31] + "\u2026"
