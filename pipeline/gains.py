"""Scores of the same prompts before and after, in figures and in a sentence."""

from typing import NamedTuple

import numpy as np

from pipeline.metrics import Floats, Interval, bootstrap_interval


class Gain(NamedTuple):
    """Means over the prompts that have a score on both sides."""

    n: int
    before: float | None
    after: float | None
    gain: float | None
    interval: Interval | None

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "No difference found"
        return "Better" if self.interval[0] > 0 else "Worse"


NOTHING = Gain(0, None, None, None, None)


def compared(before: Floats, after: Floats) -> Gain:
    """Of (n_prompts,) scores, NaN where there is none; the interval from prompts drawn anew, each with both sides."""
    both = np.isfinite(before) & np.isfinite(after)
    if not both.any():
        return NOTHING
    gains = after[both] - before[both]
    interval = bootstrap_interval(lambda rows: rows.mean(axis=1), gains)
    return Gain(int(both.sum()), float(before[both].mean()), float(after[both].mean()), float(gains.mean()), interval)


def sentence(teacher: Gain, reward: Gain, best: float) -> str:
    """What a person has to know, on one line; `best` is the end of the teacher's scale."""
    if teacher.gain is None or teacher.before is None or teacher.after is None:
        return "Not known: the teacher scored no reply to a held-out prompt both before and after."
    if teacher.interval is None:
        return f"Not known: {teacher.n} held-out prompts are too few to tell."
    went = {"Better": "rose", "Worse": "fell"}.get(teacher.verdict, "went")
    low, high = teacher.interval
    return (
        f"{teacher.verdict}: the teacher's mean score {went} from {teacher.before:.2f} to {teacher.after:.2f} of"
        f" {best:g} on {teacher.n} held-out prompts, {teacher.gain:+.2f} (95% {low:+.2f} to {high:+.2f})"
        f"{of_reward(reward)}."
    )


def of_reward(reward: Gain) -> str:
    """What the reward says of the same replies."""
    if reward.before is None or reward.after is None:
        return ""
    return f"; the reward's own from {reward.before:.2f} to {reward.after:.2f}"


def warning(teacher: Gain, reward: Gain) -> str | None:
    """Reward hacking: what was learned pleases the reward alone."""
    if reward.verdict != "Better" or teacher.verdict == "Better":
        return None
    return (
        "The reward rose and the teacher's score did not: the reward is being exploited. Raise rl.args.beta or"
        " rl.repetition_penalty, train for fewer steps, or rate more replies."
    )
