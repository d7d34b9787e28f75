"""A search: settings are proposed, tried on documents, and told back, until enough have been."""

import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import config, study_file
from pipeline import space as spaces
from pipeline.errors import Pending, UserError
from pipeline.study import Proposal, State, Study, in_words
from pipeline.trials import Failed, Outcome, Params, Positions, Task, Trial

log = logging.getLogger("gristmill")

LEAST = 50
"""Documents in the smallest share that halving begins on: on 20 an AUC is only known to 0.25 either way."""
SAME = 20
"""Proposals in a row with settings that were tried before, after which there is nothing new to find."""
SAME_DRAWN = 5
"""And after which proposals are drawn at random."""
FAILURES = 5
"""First trials that may all fail."""

Step = Callable[[Trial], None]


def search(
    task: Task,
    space: dict[str, Any],
    chosen_on: Positions,
    settings: config.Tune,
    seed: int,
    storage: Path,
    step: Step,
    go_on: Callable[[], bool] = lambda: True,
) -> list[Trial]:
    """The defaults (number -1), then what was tried in this and in earlier runs with this storage, settings.trials in
    all, in order of number. `step` hears of each, earlier ones first. Once `go_on` says no, no trial begins, and one
    that fails is left to be tried again."""
    distributions = spaces.read(space, task.tunable())
    if settings.search == "grid":
        spaces.grid_values(distributions)
    shares = rungs(len(chosen_on)) if settings.halving else [len(chosen_on)]
    made_from = {
        "objective": task.objective,
        "space": in_words(distributions),
        "documents": config.digest(chosen_on.tolist()),
        "halving": settings.halving,
        "seed": seed,
    }
    with study_file.opened(storage, f"gristmill tune: {task.objective}", made_from, shares) as opened:
        proposals = Study(opened, distributions, settings, seed)
        desk = Desk(task, proposals, growing(chosen_on, shares, seed, task.strata), settings, step, go_on)
        desk.begin()
        work(desk, settings.workers)
        return [desk.default, *sorted(desk.trials, key=lambda trial: trial.number)]


def rungs(n: int) -> list[int]:
    """Documents on which halving judges: an eighth of all, a quarter, a half, all; none below LEAST but the last."""
    return [n >> k for k in (3, 2, 1) if n >> k >= LEAST] + [n]


def growing(chosen_on: Positions, shares: Sequence[int], seed: int, strata: Sequence[Hashable]) -> list[Positions]:
    """So many of the documents each, the smaller within the larger, with as much of each stratum as it is due."""
    drawn = np.random.default_rng(abs(seed)).permutation(chosen_on).tolist()
    sizes, taken = Counter(strata[position] for position in drawn), Counter[Hashable]()
    due = {}
    for position in drawn:
        due[position] = taken[strata[position]] / sizes[strata[position]]
        taken[strata[position]] += 1
    order = np.array(sorted(drawn, key=due.__getitem__))
    return [*(order[:n] for n in shares[:-1]), chosen_on]


def work(desk: "Desk", n_workers: int) -> None:
    """Try settings, so many at a time, until there is an end."""
    if n_workers == 1:
        desk.work()
        return
    with ThreadPoolExecutor(n_workers, thread_name_prefix="trial") as pool:
        workers = [pool.submit(desk.work) for _ in range(n_workers)]
        try:
            for worker in as_completed(workers):
                worker.result()
        except BaseException as error:
            desk.stopped = True
            if isinstance(error, KeyboardInterrupt):
                desk.task.spending.is_over = True
            raise


class Desk:
    """What has been tried and what is at work; the lock guards it, and the study."""

    def __init__(
        self,
        task: Task,
        study: Study,
        shares: Sequence[Positions],
        settings: config.Tune,
        step: Step,
        go_on: Callable[[], bool],
    ) -> None:
        self.task, self.study, self.shares, self.settings = task, study, shares, settings
        self.step, self.go_on = step, go_on
        self.lock = threading.RLock()
        self.default: Trial
        self.trials: list[Trial] = []
        self.seen: dict[str, Trial] = {}
        self.at_work: dict[str, list[Proposal]] = {}
        """By the key of what is being tried: proposals of the same settings."""
        self.n_same = self.n_failed = 0
        self.stopped = False

    # -- beginning --

    def begin(self) -> None:
        """Try the defaults, and recall what earlier runs finished."""
        begin = time.perf_counter()
        try:
            key, outcome = self.task.key({}), finite(self.task.outcome({}, self.shares[-1]))
        except Failed as error:
            raise UserError(f"tune: the defaults came to nothing ({error}), so that nothing can be compared") from None
        self.default = self.seen[key] = trial_of(-1, {}, "complete", outcome, begin)
        self.step(self.default)
        for trial, key_of in self.study.standing():
            self.count(trial, key_of)

    def count(self, trial: Trial, key: str | None) -> None:
        """One more trial."""
        self.trials.append(trial)
        if key is not None:
            self.seen[key] = trial
        self.step(trial)

    # -- going on --

    def work(self) -> None:
        """Try one after the other."""
        while (found := self.propose()) is not None:
            self.judge(*found)

    def propose(self) -> tuple[Proposal, str] | None:
        """The next settings that nobody has tried, and their key; None at the end."""
        with self.lock:
            while self.is_wanted():
                proposal = self.study.ask(at_random=self.n_same >= SAME_DRAWN)
                try:
                    key = self.task.key(proposal.params)
                except Pending:
                    raise
                except (Failed, UserError) as error:
                    self.fail(proposal, None, str(error), time.perf_counter())
                    continue
                if key not in self.seen and key not in self.at_work:
                    self.n_same, self.at_work[key] = 0, []
                    return proposal, key
                self.repeat(proposal, key)
            return None

    def is_wanted(self) -> bool:
        """Whether one more trial is to begin."""
        if self.stopped or len(self.trials) + len(self.at_work) >= self.settings.trials or not self.go_on():
            return False
        if self.study.is_exhausted():
            log.info("tune: all combinations were tried, %d of them different", len(self.trials) + len(self.at_work))
            self.stopped = True
        elif self.n_same >= SAME and self.settings.search != "grid":
            log.info("tune: ended after %d trials: %d proposals in a row had been tried", len(self.trials), SAME)
            self.stopped = True
        return not self.stopped

    def repeat(self, proposal: Proposal, key: str) -> None:
        """Tell the study what is known of these settings, now or when it is."""
        self.n_same += 1
        if key in self.seen:
            self.study.tell_same(proposal, self.seen[key])
        else:
            self.at_work[key].append(proposal)

    def judge(self, proposal: Proposal, key: str) -> None:
        """Try settings, and tell what came of it."""
        begin = time.perf_counter()
        try:
            outcome, state = self.outcome(proposal)
        except Pending:
            raise
        except (Failed, UserError) as error:
            if self.go_on():
                self.fail(proposal, key, str(error), begin)
            else:
                self.leave(key)
            return
        self.finish(proposal, key, trial_of(proposal.number, proposal.params, state, outcome, begin))

    def outcome(self, proposal: Proposal) -> tuple[Outcome, State]:
        """What came of settings on growing shares of the documents, as far as they are worth it."""
        for positions in self.shares[:-1]:
            if len(positions) in proposal.passed:
                continue
            outcome = finite(self.task.outcome(proposal.params, positions))
            with self.lock:
                if self.study.is_pruned(proposal, outcome.value, len(positions)):
                    return outcome, "pruned"
        return finite(self.task.outcome(proposal.params, self.shares[-1])), "complete"

    # -- what came of it --

    def fail(self, proposal: Proposal, key: str | None, reason: str, begin: float) -> None:
        """Settings that came to nothing; stops where all have."""
        with self.lock:
            self.finish(proposal, key, trial_of(proposal.number, proposal.params, "failed", None, begin, reason))
            self.n_failed += 1
            if self.n_failed >= FAILURES and all(trial.state == "failed" for trial in self.trials):
                raise UserError(f"tune: all {len(self.trials)} trials came to nothing, the last because: {reason}")

    def finish(self, proposal: Proposal, key: str | None, trial: Trial) -> None:
        """Store a trial, and those that waited for it."""
        with self.lock:
            self.study.tell(proposal, trial, key)
            for same in self.at_work.pop(key, []) if key else []:
                self.study.tell_same(same, trial)
            self.count(trial, key)

    def leave(self, key: str) -> None:
        """Leave what was begun to a later run, and begin nothing more."""
        with self.lock:
            self.stopped = True
            del self.at_work[key]


def finite(outcome: Outcome) -> Outcome:
    """The outcome; raises Failed where there is no objective."""
    if not math.isfinite(outcome.value):
        raise Failed(f"the objective is {outcome.value}")
    return outcome


def trial_of(
    number: int,
    params: Params,
    state: State,
    outcome: Outcome | None,
    begin: float,
    reason: str | None = None,
) -> Trial:
    """A trial that has just ended; its figures are as they will be read from the study, NaN as None."""
    seconds = round(time.perf_counter() - begin, 3)
    if outcome is None:
        return Trial(number, params, state, None, {}, reason, seconds)
    text = json.dumps(outcome.figures, default=spaces.plain)
    figures = json.loads(text, parse_constant=lambda _: None)
    return Trial(number, params, state, float(outcome.value), figures, reason, seconds)
