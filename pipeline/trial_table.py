"""Trials as they come: a table on a terminal, a line each elsewhere."""

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from typing import TYPE_CHECKING

from pipeline import tried
from pipeline.trials import Trial, ranked, value_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

log = logging.getLogger("gristmill")

N_BEST, N_INCOMPLETE = 10, 3
"""Trials in the table: the best, and the last of those that failed or were pruned."""
EXTRAS = {"unscored_rate": "unscored", "usd_per_1000": "$ per 1,000", "tokens_per_document": "tokens"}
"""Figures that get a column where they are known and the terminal is wide."""
WIDE = 100
"""Characters of a line from which a terminal is wide."""

Step = Callable[[Trial], None]


def live(objective: str, n_trials: int) -> AbstractContextManager[Step]:
    """Shows each trial on stderr: the defaults and the best ones in a table that stays, or a line each in the log."""
    return as_table(objective, n_trials) if sys.stderr.isatty() else as_lines(objective, n_trials)


class Pace:
    """How long trials take; those that an earlier run had done already are not counted."""

    def __init__(self, n_trials: int, now: float) -> None:
        self.n_left, self.n_done, self.n_timed = n_trials, 0, 0
        self.begin = self.since = self.last = now

    def add(self, trial: Trial, now: float) -> None:
        """One trial is over; one that took longer than all of this run so far is of an earlier run."""
        self.last = now
        if trial.number == tried.DEFAULTS:
            self.since = now
            return
        self.n_done, self.n_left = self.n_done + 1, max(self.n_left - 1, 0)
        if trial.seconds > now - self.begin:
            self.since, self.n_timed = now, 0
        else:
            self.n_timed += 1

    def left_s(self, now: float) -> float | None:
        """Seconds that the other trials will take; None while nothing tells."""
        if not self.n_timed or not self.n_left:
            return None
        return max(self.n_left * (self.last - self.since) / self.n_timed - (now - self.last), 0.0)


# -- lines ------------------------------------------------------------------------------------------------------------


@contextmanager
def as_lines(objective: str, n_trials: int) -> Iterator[Step]:
    """A line of the log for each trial."""
    trials: list[Trial] = []

    def step(trial: Trial) -> None:
        trials.append(trial)
        log.info("tune: %s", line(trials, objective, n_trials))

    yield step


def line(trials: Sequence[Trial], objective: str, n_trials: int) -> str:
    """The last trial in words, and the best so far."""
    trial, best = trials[-1], ranked(trials)[:1]
    who = "defaults" if trial.number == tried.DEFAULTS else f"trial {trial.number} ({n_done(trials)} of {n_trials})"
    what = tried.remark(trial) if trial.state != "complete" else scored(trial, objective)
    told = [f"{who}: {what}", tried.settings(trial.params)]
    if trial.number != tried.DEFAULTS and best:
        told.append(f"best so far {value_of(best[0]):.3f} ({tried.name(best[0])})")
    return "; ".join(filter(None, told))


def n_done(trials: Sequence[Trial]) -> int:
    """Trials beside the defaults."""
    return sum(trial.number != tried.DEFAULTS for trial in trials)


def scored(trial: Trial, objective: str) -> str:
    """A complete trial's figure, and what is left of it where a price has been taken off."""
    own, value = tried.quality(trial, objective), value_of(trial)
    less = "" if own in (None, value) else f", {value:.3f} less its price"
    return f"{tried.called(objective)} {value if own is None else own:.3f}{less}"


# -- a table ----------------------------------------------------------------------------------------------------------


@contextmanager
def as_table(objective: str, n_trials: int) -> Iterator[Step]:
    """A table that is drawn again twice a second, and once more at the end."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stderr)
    trials, pace = list[Trial](), Pace(n_trials, time.monotonic())

    def drawn() -> "Table":
        there = list(trials)  # the one that draws is another thread
        return table(there, objective, tally(there, n_trials, pace, time.monotonic()), console.width >= WIDE)

    with (
        Live(
            console=console, get_renderable=drawn, refresh_per_second=2, redirect_stdout=False, redirect_stderr=False
        ) as shown,
        stderr_above(console),
    ):

        def step(trial: Trial) -> None:
            trials.append(trial)
            pace.add(trial, time.monotonic())
            shown.refresh()

        yield step


class Above(io.TextIOBase):
    """Lines for a terminal that come above what is live on it; of a loading bar, only how it ended."""

    def __init__(self, console: "Console") -> None:
        self.console, self.rest = console, ""

    def write(self, text: str) -> int:
        """Print the lines that are whole."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            ended = [part for part in line.split("\r") if part.strip()][-1:]
            if ended:
                self.console.out(*ended, highlight=False)
        return len(text)

    def isatty(self) -> bool:
        """It is for a person."""
        return True


@contextmanager
def stderr_above(console: "Console") -> Iterator[None]:
    """What others write to stderr, and the log, comes above what is live."""
    terminal, above = sys.stderr, Above(console)
    handlers = [each for each in log.handlers if isinstance(each, logging.StreamHandler) and each.stream is terminal]
    with redirect_stderr(above):
        try:
            for handler in handlers:
                handler.setStream(above)
            yield
        finally:
            for handler in handlers:
                handler.setStream(terminal)


def table(trials: Sequence[Trial], objective: str, caption: str, is_wide: bool) -> "Table":
    """The defaults, the best trials, and the last that came to nothing."""
    from rich.table import Table
    from rich.text import Text

    heading = tried.called(objective) + (" less price" if tried.less_price(trials, objective) else "")
    extras = [figure for figure in EXTRAS if is_wide and tried.known(trials, figure)]
    shown = Table(caption=Text(caption), caption_justify="left", expand=False)
    for name in ("trial", heading, *(EXTRAS[figure] for figure in extras)):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("settings", overflow="ellipsis")  # it alone gives way, as its cells are not wrapped
    for trial, style, ends in listed(trials):
        figures = [figure_of(trial, figure) for figure in extras]
        value = f"{value_of(trial):.3f}" if trial.state == "complete" else trial.state
        cells = [Text(cell, no_wrap=True) for cell in (tried.name(trial), value, *figures, says(trial))]
        shown.add_row(*cells, style=style, end_section=ends)
    return shown


def listed(trials: Sequence[Trial]) -> Iterator[tuple[Trial, str, bool]]:
    """Trials in the order of the table, each with its style and whether a rule follows."""
    best = ranked(trials)
    first = [trial for trial in trials if trial.number == tried.DEFAULTS]
    others = [trial for trial in best if trial.number != tried.DEFAULTS][:N_BEST]
    incomplete = [trial for trial in trials if trial.state != "complete" and trial not in first][-N_INCOMPLETE:]
    for group in (first, others, incomplete):
        for trial in group:
            style = "bold green" if trial in best[:1] else "dim" if trial in incomplete else ""
            yield trial, style, trial is group[-1]


def figure_of(trial: Trial, figure: str) -> str:
    """One figure with the digits that mean something; nothing where it is not known."""
    value = trial.figures.get(figure)
    if value is None:
        return ""
    return f"{value:.0%}" if figure == "unscored_rate" else f"{value:,.4f}" if "usd" in figure else f"{value:,.0f}"


def says(trial: Trial) -> str:
    """A trial's settings, after the reason where it failed."""
    reason = tried.clipped(trial.reason or "no reason given", 80) if trial.state == "failed" else ""
    return " · ".join(filter(None, [reason, tried.settings(trial.params)]))


def tally(trials: Sequence[Trial], n_trials: int, pace: Pace, now: float) -> str:
    """How far the search is, in words."""
    if not trials:
        return f"the defaults first, then {n_trials} trials; {lasting(now - pace.begin)}"
    counts = {state: sum(trial.state == state for trial in trials) for state in ("pruned", "failed")}
    told = [f"{pace.n_done} of {n_trials} trials", *(f"{n} {state}" for state, n in counts.items() if n)]
    left = pace.left_s(now)
    return ", ".join(told) + f"; {lasting(now - pace.begin)}" + ("" if left is None else f", {lasting(left)} left")


def lasting(seconds: float) -> str:
    """A time as h:mm:ss, or m:ss where it is shorter than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
