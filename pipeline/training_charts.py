"""What trainings tell, as charts: bits per byte by arm, and figures over the steps."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np

from pipeline import pictures
from pipeline.pictures import BLUE, GREY, OFFSET, ORANGE, RULE, WIDE_IN, Axes, Line, chart

Values = dict[str, Any]
Curve = Sequence[Values]
"""What a training logged, in the order of steps."""

ARMS = {"kept": BLUE, "random": GREY, "rejected": ORANGE}
MOST_POINTS = 240
"""Of one line; more are averaged, as no chart can show them."""


def known(value: Any) -> TypeGuard[float]:
    """Whether a figure is there, and is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def interval(ends: Any) -> Sequence[float] | None:
    """Both ends of an interval, if both are known."""
    return ends if ends and all(map(known, ends)) else None


# -- the proof --------------------------------------------------------------------------------------------------------


def arms(found: dict[str, Values]) -> str | None:
    """Bits per byte of each arm: a dot for each training, the mean as a diamond, its interval a line."""
    there = {name: arm for name, arm in found.items() if known(arm.get("bits_per_byte"))}
    if not there:
        return None
    with chart(WIDE_IN, 0.8 + 0.5 * len(there)) as (axes, made):
        for row, (name, arm) in enumerate(there.items()):
            one_arm(axes, row, arm, ARMS.get(name, BLUE))
        axes.set_yticks(range(len(there)), list(there))
        axes.set_ylim(len(there) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel("bits per byte (left is better)")
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    return made[0]


def one_arm(axes: Axes, row: int, arm: Values, colour: str) -> None:
    """One row of the chart of arms."""
    seeds, mean = [value for value in arm.get("by_seed") or [] if known(value)], arm["bits_per_byte"]
    ends = interval(arm.get("interval"))
    if ends:
        axes.plot(ends, (row, row), color=colour, linewidth=2.4, alpha=0.55, solid_capstyle="round")
    axes.scatter(seeds, [row] * len(seeds), 22, color=colour, alpha=0.6, linewidth=0, zorder=3)
    axes.scatter(mean, row, 52, color=colour, marker="D", linewidth=0, zorder=4)
    axes.annotate(f"{mean:.3f}", (mean, row), (0, 8), **OFFSET, ha="center", fontsize=9)


def arms_learning(found: dict[str, Values]) -> str | None:
    """Bits per byte of each arm over the tokens it has read."""
    points = {
        name: [
            each for each in arm.get("curve") or [] if known(each.get("bits_per_byte")) and known(each.get("tokens"))
        ]
        for name, arm in found.items()
    }
    there = {name: curve for name, curve in points.items() if len(curve) > 1}
    if not there:
        return None
    with chart() as (axes, made):
        for name, curve in there.items():
            line = Line(name, [each["tokens"] for each in curve], [each["bits_per_byte"] for each in curve])
            pictures.draw_line(axes, line, ARMS.get(name, BLUE))
        axes.xaxis.set_major_formatter(lambda value, _: pictures.short(value))
        axes.set_xlabel("tokens read")
        axes.set_ylabel("bits per byte")
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        pictures.legend(axes, len(there))
    return made[0]


# -- curves -----------------------------------------------------------------------------------------------------------


def over_steps(curve: Curve, keys: dict[str, str], label: str) -> str | None:
    """Figures of a curve over the steps, by what they are called in the chart; None where none has two points."""
    drawn = [line for key, called in keys.items() if len((line := series(curve, key, called)).x) > 1]
    return pictures.lines(drawn, "steps", label) if drawn else None


def series(curve: Curve, key: str, called: str) -> Line:
    """One figure over the steps; where there are too many points, means of neighbours."""
    points = [(line["step"], line[key]) for line in curve if known(line.get(key)) and known(line.get("step"))]
    parts = np.array_split(np.array(points, dtype=float).reshape(-1, 2), min(max(len(points), 1), MOST_POINTS))
    means = [part.mean(axis=0) for part in parts if len(part)]
    return Line(called, [float(step) for step, _ in means], [float(value) for _, value in means])


def loss(curve: Curve) -> str | None:
    """Loss over the steps, of documents held out too where it was looked at."""
    return over_steps(curve, {"loss": "learned from", "eval_loss": "held out"}, "loss (nats per token)")


def reinforcement(curve: Curve) -> dict[str, str | None]:
    """What matters while a policy learns to please a reward: is it pleased, and at what price?"""
    penalties, rewards = parted(rewards_by_name(curve))
    rewards = rewards if len(rewards) > 1 else {"reward": "reward"}
    length = ("completions/mean_length", "completion_length")
    return {
        "reward": over_steps(curve, rewards, "reward"),
        "kl": over_steps(curve, {"kl": "KL"}, "KL from the actor (nats)"),
        "length": over_steps(curve, dict.fromkeys(length, "length"), "tokens of a reply"),
        "penalty": over_steps(curve, penalties, "repetition penalty"),
        "margin": over_steps(curve, {"rewards/accuracies": "pairs in the right order"}, "share of pairs"),
    }


def rewards_by_name(curve: Curve) -> dict[str, str]:
    """Names of rewards that were logged apart, by their key."""
    keys = dict.fromkeys(key for line in curve for key in line)
    return {key: key.split("/")[1] for key in keys if key.startswith("rewards/") and key.endswith("/mean")}


def parted(rewards: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Penalties on repetition, and rewards proper."""
    penalties = {key: name for key, name in rewards.items() if "repet" in name}
    return penalties, {key: name for key, name in rewards.items() if key not in penalties}


def markup(charts: Iterable[tuple[str, str | None]]) -> dict[str, Any]:
    """Those charts that there are, as they stand in the page."""
    from pipeline.charts import markup as whole

    return {name: whole(chart) for name, chart in charts if chart}
