"""The proof's picture: bits per byte of each arm, training by training, and how they came down."""

import textwrap
from pathlib import Path
from typing import Any

from pipeline.errors import needs
from pipeline.pictures import BLUE, FAINT, GREY, INK, ORANGE, plain
from pipeline.storage import atomic

COLOURS = {"kept": BLUE, "random": GREY, "rejected": ORANGE}

Result = dict[str, Any]


def draw(path: Path, result: Result) -> None:
    """Write the picture of a ProveResult."""
    matplotlib, figures = needs("matplotlib", "plots"), needs("matplotlib.figure", "plots")
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "text.color": INK, "axes.labelcolor": INK}):
        figure = figures.Figure(figsize=(8, 4.6), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
        draw_arms(left, result["arms"])
        draw_curves(right, result["arms"])
        for axis in (left, right):
            plain(axis)
            axis.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        told = textwrap.fill(result["sentence"], 86)
        figure.suptitle(told, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        figure.supxlabel(textwrap.fill(note(result), 125), x=0.01, ha="left", fontsize=8, color=FAINT)
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130, facecolor="white")


def note(result: Result) -> str:
    """How the figures came about."""
    return (
        f"{result['model']} ({result['n_parameters'] / 1e6:.1f}M parameters), {result['tokens']:,} tokens and"
        f" {result['n_steps']:,} steps in every arm, {result['n_seeds']} seeds (dots). Bars: 95% intervals over seeds"
        f" and documents; those of the arms share their documents, so that arms may differ though bars overlap. Judged"
        f" on {result['n_trusted']:,} documents of {Path(result['trusted']).name}."
    )


def draw_arms(axis: Any, arms: dict[str, Result]) -> None:
    """A dot for each training, the mean, and its interval."""
    for place, (name, arm) in enumerate(arms.items()):
        colour = COLOURS[name]
        if arm["interval"]:
            axis.plot([place, place], arm["interval"], color=colour, linewidth=2, alpha=0.6, zorder=1)
        axis.plot([place - 0.16, place + 0.16], [arm["bits_per_byte"]] * 2, color=colour, linewidth=2, zorder=2)
        n = len(arm["by_seed"])
        spread = [place + 0.1 * (2 * i - n + 1) / max(n - 1, 1) for i in range(n)]
        axis.scatter(spread, arm["by_seed"], s=30, color=colour, edgecolor="white", linewidth=0.7, zorder=3)
        told = f"{arm['bits_per_byte']:.3f}"
        axis.annotate(told, (place + 0.18, arm["bits_per_byte"]), (3, 0), textcoords="offset points", va="center")
    axis.set_xticks(range(len(arms)), list(arms))
    axis.set_xlim(-0.5, len(arms) - 0.3)
    axis.set_ylabel("bits per byte (less is better)")
    axis.set_title("Each training", loc="left", fontsize=10)


def draw_curves(axis: Any, arms: dict[str, Result]) -> None:
    """Bits per byte on some of the documents while each arm learned."""
    for name, arm in arms.items():
        tokens = [point["tokens"] / 1e6 for point in arm["curve"]]
        values = [point["bits_per_byte"] for point in arm["curve"]]
        axis.plot(tokens, values, color=COLOURS[name], linewidth=1.8, marker="o", markersize=3, label=name)
    axis.set_xlabel("million tokens read")
    axis.set_title("On some of the documents, while learning", loc="left", fontsize=10)
    axis.legend(frameon=False)
