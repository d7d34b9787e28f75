"""The search: what is tried, what is remembered, and when it ends, on a task whose best settings are known."""

import itertools
import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from pipeline import search, study, study_file
from pipeline.config import Tune
from pipeline.errors import Pending, UserError
from pipeline.trials import Compared, Failed, Outcome, Params, Positions, Trial, winner

DOCUMENTS = np.arange(100)
DEFAULTS: Params = {"x": 0.0, "y": 0.0, "kind": "plain", "stop": None}


def height(params: Params) -> float:
    """Highest, 1, at x = 0.6, y = -0.2, kind = good."""
    at = {**DEFAULTS, **params}
    return 1 - (at["x"] - 0.6) ** 2 - (at["y"] + 0.2) ** 2 - (at["kind"] != "good") * 0.1


@dataclass
class Hill:
    """Finds how high settings are; remembers what it was asked."""

    value: Callable[[Params], float] = height
    objective: str = "height"
    n_documents: int = 100
    strata: Sequence[int] = (0,) * 100
    asked: list[tuple[Params, int]] = field(default_factory=list)

    def tunable(self) -> Sequence[str]:
        return [*DEFAULTS, "args."]

    def key(self, params: Params) -> str:
        return json.dumps({**DEFAULTS, **params}, sort_keys=True)

    def outcome(self, params: Params, positions: Positions) -> Outcome:
        self.asked.append((params, len(positions)))
        value = self.value(params)
        return Outcome(value, {"height": value, "usd_per_1000": None, "interval": (0.0, np.float64(1.0))})

    def compared(self, *_: Any) -> Compared:
        raise NotImplementedError

    def settings(self, best: Params, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def n_asked(self) -> int:
        """Documents asked about, the defaults' left out; what was asked before about them costs nothing."""
        most: dict[str, int] = {}
        for params, n in self.asked:
            most[self.key(params)] = max(n, most.get(self.key(params), 0))
        return sum(most.values()) - most[self.key({})]


XY = {"x": {"low": -1.0, "high": 1.0}, "y": {"low": -1.0, "high": 1.0}}


def found(
    folder: Path,
    space: dict[str, Any],
    task: Hill | None = None,
    seed: int = 0,
    step: Callable[[Trial], None] = lambda _: None,
    go_on: Callable[[], bool] = lambda: True,
    **settings: Any,
) -> list[Trial]:
    """What a search in this folder comes to."""
    tune = Tune(**{"search": "random", "trials": 6, **settings})
    return search.search(task or Hill(), space, DOCUMENTS, tune, seed, folder / "study.sqlite", step, go_on)


def stored(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The study's trials as others read them."""
    file = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.sqlite'}")
    try:
        return optuna.load_study(study_name="gristmill tune: height", storage=file).trials
    finally:
        file.engine.dispose()


def settings_of(trials: list[Trial]) -> list[Params]:
    return [trial.params for trial in trials]


def without_seconds(trials: list[Trial]) -> list[Trial]:
    return [trial._replace(seconds=0.0) for trial in trials]


# -- what is tried --


def test_the_defaults_are_tried_first_on_all_documents(tmp_path: Path) -> None:
    task, heard = Hill(), []
    trials = found(tmp_path, XY, task, step=heard.append, trials=3)
    assert task.asked[0] == ({}, 100)
    assert [trial.number for trial in trials] == [-1, 0, 1, 2]
    assert heard == trials
    assert trials[0].value == pytest.approx(height({}))
    assert all(trial.figures["height"] == trial.value for trial in trials)


def test_a_grid_tries_every_combination_once(tmp_path: Path) -> None:
    space = {"x": {"low": 0.0, "high": 0.9, "step": 0.3}, "kind": ["plain", "good"], "stop": [["\n"], None]}
    task = Hill()
    trials = found(tmp_path, space, task, search="grid", trials=100)
    tried = {(trial.params["x"], trial.params["kind"], str(trial.params["stop"])) for trial in trials[1:]}
    combinations = set(itertools.product((0, 0.3, 0.6, 0.9), ("plain", "good"), ("['\\n']", "None")))
    assert tried == combinations - {(0, "plain", "None")}, "which is what the defaults are"
    assert len(trials) == 16 and len(task.asked) == 16
    assert (winner(trials).params["x"], winner(trials).params["kind"]) == (0.6, "good")


def test_a_grid_with_fewer_trials_goes_on_where_it_ended(tmp_path: Path) -> None:
    space = {"x": [0.1, 0.2, 0.3], "y": [0.1, 0.2, 0.3]}
    first = found(tmp_path, space, search="grid", trials=4)
    task = Hill()
    both = found(tmp_path, space, task, search="grid", trials=9)
    assert without_seconds(both[1:5]) == without_seconds(first[1:])
    assert len(task.asked) == 1 + 5
    assert len({task.key(params) for params in settings_of(both[1:])}) == 9


def test_identical_settings_are_one_trial(tmp_path: Path) -> None:
    task = Hill()
    task.key = lambda params: str(params.get("kind", "plain"))  # type: ignore[method-assign]
    trials = found(tmp_path, {"kind": ["plain", "good"], **XY}, task, trials=30)
    assert [trial.params.get("kind") for trial in trials] == [None, "good"]
    assert len(task.asked) == 2
    told = stored(tmp_path)
    assert len(told) - 1 - trials[1].number == search.SAME, "so many in a row brought nothing new"
    assert {trial.value for trial in told} == {trial.value for trial in trials}
    again = found(tmp_path, {"kind": ["plain", "good"], **XY}, task, trials=30)
    assert without_seconds(again) == without_seconds(trials), "repetitions are no trials of an earlier run either"


def test_the_search_ends_when_all_has_been_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gristmill")
    trials = found(tmp_path, {"kind": ["good", "bad"], "x": [0.5, 1]}, search="tpe", trials=30)
    assert len(trials) == 1 + 4
    assert "all combinations were tried, 4 of them different" in caplog.text


def test_settings_that_cannot_be_are_a_failed_trial(tmp_path: Path) -> None:
    class Picky(Hill):
        def key(self, params: Params) -> str:
            if params.get("kind") == "impossible":
                raise UserError("kind: impossible needs another engine")
            return super().key(params)

    trials = found(tmp_path, {"kind": ["good", "impossible"]}, Picky())
    states = {trial.params.get("kind"): (trial.state, trial.value, trial.reason) for trial in trials[1:]}
    assert states["impossible"] == ("failed", None, "kind: impossible needs another engine")
    assert states["good"] == ("complete", pytest.approx(height({"kind": "good"})), None)


def test_a_search_for_settings_that_are_unknown_begins_nothing(tmp_path: Path) -> None:
    task = Hill()
    with pytest.raises(UserError, match="did you mean kind"):
        found(tmp_path, {"kinds": ["good"]}, task)
    with pytest.raises(UserError, match="a grid over a range needs a step"):
        found(tmp_path, XY, task, search="grid")
    assert not task.asked and not list(tmp_path.iterdir())


# -- what fails --


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_an_objective_that_is_no_number_fails_its_trial_alone(tmp_path: Path, wrong: float) -> None:
    task = Hill(lambda params: wrong if params.get("x") == 0.5 else height(params))
    trials = found(tmp_path, {"x": [0.5, 0.6, 0.7, 0.8]}, task)
    assert {trial.params["x"]: trial.state for trial in trials[1:]} == {
        **dict.fromkeys((0.6, 0.7, 0.8), "complete"),
        0.5: "failed",
    }
    failed = next(trial for trial in trials if trial.state == "failed")
    assert failed.value is None and failed.reason == f"the objective is {wrong}"
    assert winner(trials).params == {"x": 0.6}


@pytest.mark.parametrize("kind", [Failed, UserError])
def test_a_trial_that_raises_fails_and_the_study_goes_on(tmp_path: Path, kind: type[Exception]) -> None:
    def value(params: Params) -> float:
        if params.get("x", 0) > 0.75:
            raise kind("the metric: division by zero")
        return height(params)

    trials = found(tmp_path, {"x": [0.5, 0.6, 0.7, 0.8]}, Hill(value))
    assert [trial.reason for trial in trials if trial.state == "failed"] == ["the metric: division by zero"]
    assert len(trials) == 5
    again = Hill(value)
    assert without_seconds(found(tmp_path, {"x": [0.5, 0.6, 0.7, 0.8]}, again)) == without_seconds(trials)
    assert again.asked == [({}, 100)], "a failure stands too"


def test_when_the_first_trials_all_fail_the_search_stops(tmp_path: Path) -> None:
    def value(params: Params) -> float:
        if params:
            raise Failed("nobody answers")
        return 0.0

    task = Hill(value)
    with pytest.raises(UserError, match="all 5 trials came to nothing, the last because: nobody answers"):
        found(tmp_path, XY, task, trials=30)
    assert len(task.asked) == 6


def test_failures_after_a_success_do_not_stop_the_search(tmp_path: Path) -> None:
    def value(params: Params) -> float:
        if len(task.asked) > 3:
            raise Failed("no more")
        return height(params)

    task = Hill(value)
    assert [trial.state for trial in found(tmp_path, XY, task, trials=12)].count("failed") == 10


@pytest.mark.parametrize("value", [math.nan, None])
def test_without_the_defaults_nothing_is_compared(tmp_path: Path, value: float | None) -> None:
    def outcome(_: Params) -> float:
        if value is None:
            raise Failed("no answer has a score")
        return value

    with pytest.raises(UserError, match=r"the defaults came to nothing \((no answer|the objective is nan)"):
        found(tmp_path, XY, Hill(outcome))


@pytest.mark.parametrize(("kind", "workers"), [(Pending, 1), (KeyboardInterrupt, 1), (ZeroDivisionError, 2)])
def test_what_ends_the_search_is_no_failure_and_is_tried_again(
    tmp_path: Path, kind: type[BaseException], workers: int
) -> None:
    def value(params: Params) -> float:
        if len(task.asked) == 4:
            raise kind("now")
        return height(params)

    task = Hill(value)
    with pytest.raises(kind):
        found(tmp_path, XY, task, workers=workers)
    later = Hill()
    trials = found(tmp_path, XY, later, workers=workers)
    whole = found(tmp_path / "whole", XY)
    assert all(trial.state == "complete" for trial in trials)
    assert without_seconds(trials) == without_seconds(whole)
    assert task.asked[3][0] in settings_of(trials) and task.asked[3] in later.asked


def test_no_trial_begins_without_budget_and_one_that_ran_out_of_it_is_left(tmp_path: Path) -> None:
    def value(params: Params) -> float:
        if len(task.asked) == 4:
            raise Failed("the budget is spent")
        return height(params)

    task = Hill(value)
    trials = found(tmp_path, XY, task, go_on=lambda: len(task.asked) < 4)
    assert [trial.number for trial in trials] == [-1, 0, 1]
    later = found(tmp_path, XY)
    assert without_seconds(later) == without_seconds(found(tmp_path / "whole", XY))


# -- going on --


@pytest.mark.parametrize("kind", ["random", "tpe", "grid"])
def test_more_trials_go_on_from_those_that_are_there(tmp_path: Path, kind: str) -> None:
    space = {"x": {"low": 0.0, "high": 1.0, "step": 0.1}, "y": [0, 0.1, 0.2], "stop": [None, ["\n", "#"]]}
    first = found(tmp_path, space, search=kind, trials=8)
    task, heard = Hill(), []
    trials = found(tmp_path, space, task, step=heard.append, search=kind, trials=10)
    assert without_seconds(trials[1:9]) == without_seconds(first[1:])
    assert [trial.seconds for trial in trials[1:9]] == [trial.seconds for trial in first[1:]]
    assert heard == trials, "those of earlier runs among them"
    assert len(task.asked) == 3


def test_kill_9_loses_one_trial_which_is_tried_again(tmp_path: Path) -> None:
    program = f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        from pathlib import Path
        from test_search import XY, Hill, found, height
        import time

        def slow(params):
            with open({str(tmp_path / "asked")!r}, "a") as file:
                file.write("asked\\n")
            time.sleep(0.01 if len(open({str(tmp_path / "asked")!r}).readlines()) < 5 else 60)
            return height(params)

        found(Path({str(tmp_path)!r}), XY, Hill(slow), search="tpe")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "asked").exists() or len((tmp_path / "asked").read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    task = Hill()
    trials = found(tmp_path, XY, task, search="tpe")
    assert len(task.asked) == 1 + 6 - 3
    assert without_seconds(trials) == without_seconds(found(tmp_path / "whole", XY, search="tpe"))


def test_another_space_objective_or_seed_is_another_study(tmp_path: Path) -> None:
    found(tmp_path, {"x": [0.1, 0.2]})
    with pytest.raises(UserError, match=r"study .*study.sqlite is another one: space.x.choices changed from"):
        found(tmp_path, {"x": [0.1, 0.3]})
    with pytest.raises(UserError, match="objective changed from 'height' to 'depth'"):
        found(tmp_path, {"x": [0.1, 0.2]}, Hill(objective="depth"))
    with pytest.raises(UserError, match="seed changed from 0 to 1"):
        found(tmp_path, {"x": [0.1, 0.2]}, seed=1)


@pytest.mark.parametrize("damage", ["cut", "overwritten", "one page", "foreign"])
def test_a_damaged_study_is_one_line(tmp_path: Path, damage: str) -> None:
    file, task = tmp_path / "study.sqlite", Hill()
    found(tmp_path, XY)
    raw = file.read_bytes()
    overwritten = raw[:4096] + b"\xff" * (len(raw) - 4096)
    one_page = raw[:-4096] + b"\xff" * 4096
    damaged = {"cut": raw[: len(raw) // 2], "overwritten": overwritten, "one page": one_page, "foreign": b"none" * 99}
    file.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"study .*study.sqlite: .*move the file away.*answers are kept") as error:
        found(tmp_path, XY, task)
    assert "\n" not in str(error.value) and not task.asked
    with pytest.raises(UserError, match="move the file away"):
        study.importances(file)


def test_two_searches_are_never_in_one_file(tmp_path: Path) -> None:
    def value(params: Params) -> float:
        with pytest.raises(UserError, match="another process is at work"):
            found(tmp_path, XY)
        return height(params)

    found(tmp_path, XY, Hill(value), trials=1)


# -- how well --


def test_tpe_finds_higher_ground_than_chance(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).uniform(-1, 1, (10_000, 25, 2))
    by_chance = (1.1 - ((drawn - [0.6, -0.2]) ** 2).sum(-1) - 0.2).max(1).mean()
    tops = [winner(found(tmp_path / str(seed), XY, seed=seed, search="tpe", trials=25)).value for seed in range(3)]
    assert all(top is not None and 0.9 - top < (0.9 - by_chance) / 2 for top in tops)


@pytest.fixture
def _small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LEAST", 20)


@pytest.mark.usefixtures("_small_shares")
def test_halving_asks_about_fewer_documents_and_keeps_the_winner(tmp_path: Path) -> None:
    space = {"x": {"low": -1.0, "high": 1.0, "step": 0.2}}
    whole, halved = Hill(), Hill()
    every = found(tmp_path / "whole", space, whole, search="grid", trials=11)
    trials = found(tmp_path / "halved", space, halved, search="grid", trials=11, halving=True)
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert winner(trials).params == winner(every).params == {"x": 0.6}
    assert halved.n_asked < 0.7 * whole.n_asked
    assert pruned and all(trial.value is not None and trial.figures for trial in pruned)
    assert {n for _, n in halved.asked} == {25, 50, 100}
    again = found(tmp_path / "halved", space, task := Hill(), search="grid", trials=11, halving=True)
    assert without_seconds(again) == without_seconds(trials) and task.n_asked == 0


@pytest.mark.usefixtures("_small_shares")
def test_halving_that_was_stopped_goes_on_with_the_documents_it_got_to(tmp_path: Path) -> None:
    def value(params: Params) -> float:
        if len(task.asked) == 3:
            raise KeyboardInterrupt
        return height(params)

    task, later = Hill(value), Hill()
    with pytest.raises(KeyboardInterrupt):
        found(tmp_path, XY, task, halving=True)
    found(tmp_path, XY, later, halving=True)
    assert [n for _, n in task.asked] == [100, 25, 50]
    assert later.asked[1] == (task.asked[1][0], 50)


def test_the_shares_of_halving_lie_within_each_other() -> None:
    assert search.rungs(400) == [50, 100, 200, 400]
    assert search.rungs(100) == [50, 100]
    assert search.rungs(39) == [39]
    shares = [set(each.tolist()) for each in search.growing(np.arange(5, 405), search.rungs(400), 1, [0] * 405)]
    assert [len(share) for share in shares] == [50, 100, 200, 400]
    assert shares[0] < shares[1] < shares[2] < shares[3]


def test_four_workers_find_what_one_finds(tmp_path: Path) -> None:
    class Slow(Hill):
        def outcome(self, params: Params, positions: Positions) -> Outcome:
            time.sleep(0.01)
            return super().outcome(params, positions)

    space = {**XY, "kind": ["plain", "good"]}
    one = found(tmp_path / "one", space, trials=12)
    four = found(tmp_path / "four", space, Slow(), trials=12, workers=4)
    assert without_seconds(four) == without_seconds(one)


def test_settings_that_are_being_tried_are_not_tried_beside(tmp_path: Path) -> None:
    class Slow(Hill):
        def outcome(self, params: Params, positions: Positions) -> Outcome:
            time.sleep(0.05)
            return super().outcome(params, positions)

    task = Slow()
    trials = found(tmp_path, {"kind": ["good", "bad"], "x": [0.1, 0.2]}, task, trials=12, workers=4)
    assert len(trials) == len(task.asked) == 5
    assert all(trial.state.is_finished() for trial in stored(tmp_path))


def test_the_best_of_equals_is_the_defaults_then_the_earliest() -> None:
    trials = [Trial(n, {}, "complete", value, {}) for n, value in ((2, 0.5), (1, 0.5), (-1, 0.4))]
    assert winner(trials).number == 1
    assert winner([*trials, Trial(-1, {}, "complete", 0.5, {})]).number == -1
    assert winner([trials[2], Trial(0, {}, "pruned", 0.9, {}), Trial(1, {}, "failed", None, {}, "no")]).number == -1


# -- what others see --


def test_the_dashboard_reads_what_was_tried(tmp_path: Path) -> None:
    trials = found(tmp_path, {"x": {"low": 0.0, "high": 1.0}, "stop": [["\n"], None]}, trials=4)
    seen = stored(tmp_path)
    assert [trial.value for trial in seen] == [trial.value for trial in trials[1:]]
    assert [trial.params["x"] for trial in seen] == [trial.params["x"] for trial in trials[1:]]
    assert {trial.params["stop"] for trial in seen} <= {'["\\n"]', None}
    assert all(trial.user_attrs["height"] == trial.value for trial in seen)


def test_importances_name_what_mattered_first(tmp_path: Path) -> None:
    space = {**XY, "y": {"low": -0.1, "high": 0.1}, "kind": ["plain", "good"], "stop": [None]}
    found(tmp_path, space, trials=15)
    shares = study.importances(tmp_path / "study.sqlite")
    assert next(iter(shares)) == "x" and set(shares) == {"x", "y", "kind"}
    assert sum(shares.values()) == pytest.approx(1)


def test_importances_are_nothing_where_nothing_can_be_told(tmp_path: Path) -> None:
    found(tmp_path / "few", XY, trials=4)
    found(tmp_path / "one", {"x": {"low": 0.0, "high": 1.0}, "kind": ["good"]}, trials=8)
    found(tmp_path / "flat", XY, Hill(lambda _: 0.5), trials=8)
    assert [study.importances(tmp_path / name / "study.sqlite") for name in ("few", "one", "flat")] == [{}, {}, {}]


def test_optuna_says_nothing_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found(tmp_path, XY, search="tpe", halving=True)
    assert capfd.readouterr() == ("", "")


def test_what_optuna_warns_of_is_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    with study_file.quiet():
        logging.getLogger("optuna.trial").warning("beware")
        logging.getLogger("optuna.trial").info("a trial ended")
    assert [record.getMessage() for record in caplog.records] == ["beware"]


def test_the_study_is_whole_sqlite(tmp_path: Path) -> None:
    found(tmp_path, XY)
    with sqlite3.connect(tmp_path / "study.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
