"""What people see of a tuning: the live table, the lines, the summary, the section of the page."""

import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_report import Page

from pipeline import report, summary, trial_table, tried, tune_charts
from pipeline.config import Recipe
from pipeline.trials import Trial, ranked

HOSTILE = "</td><script>alert(1)</script> {{ 7 * 7 }} [red]$x$ \x1b[31m"
SPACE: list[dict[str, Any]] = [
    {"prompt": "prompts/edu-en.md", "temperature": 0.0, "examples": 0},
    {"prompt": "prompts/edu-en.md", "temperature": 0.7, "examples": 2, "top_p": 0.9},
    {"prompt": "prompts/words in contrast.md", "temperature": 0.2, "examples": 4, "stop": ["\n\n", "</answer>"]},
    {"prompt": "other/edu-en.md", "temperature": 1.0, "examples": 1, "stop": None},
    {"prompt": "prompts/words in contrast.md", "temperature": 0.4, "examples": 2, "prompt.system": HOSTILE},
    {"prompt": "prompts/words in contrast.md", "temperature": 0.1, "examples": 3, "top_p": 0.5},
    {"prompt": "prompts/edu-en.md", "temperature": 0.9, "examples": 4, "calibrate": True},
    {"prompt": "prompts/edu-en.md", "temperature": 0.3, "examples": 1, "calibrate": False},
]
VALUES = [0.41, 0.35, 0.58, 0.22, 0.55, 0.61, 0.38, 0.44]


def trial(number: int, params: dict[str, Any], value: float | None, objective: str, prices: bool) -> Trial:
    """A complete trial, its price by its examples."""
    n_tokens = 310.0 + 95 * params.get("examples", 0)
    figures = {
        objective: value,
        "unscored_rate": 0.02 * (number % 3),
        "tokens_per_document": n_tokens,
        "usd_per_1000": n_tokens * 1e-4 if prices else None,
    }
    return Trial(number, params, "complete", value, figures, seconds=12.5)


def trials(objective: str = "spearman", prices: bool = True) -> list[Trial]:
    """The defaults, complete trials, one that was pruned and two that failed."""
    done = [trial(n, params, VALUES[n], objective, prices) for n, params in enumerate(SPACE)]
    pruned = Trial(8, {"prompt": "prompts/edu-en.md", "temperature": 0.8}, "pruned", 0.12, {objective: 0.12})
    reason = f"the metric raised ValueError: y_true holds {HOSTILE}"
    failed = [
        Trial(9, {"temperature": 1.5, "prompt.system": HOSTILE}, "failed", None, {}, reason),
        Trial(10, {"temperature": 1.4}, "failed", None, {}, "no document has a score"),
    ]
    return [trial(-1, {}, 0.4, objective, prices), *done, pruned, *failed]


def result(task: str, objective: str, prices: bool) -> dict[str, Any]:
    """What the stage reports."""
    held_out = {
        "n": 116,
        "unscored_rate": 0.0,
        "tokens_per_document": 310.0,
        "usd_per_1000": 0.031 if prices else None,
    }
    sentence = (
        f"Better than the default: the best settings reach {objective} 0.57 on documents that nothing was chosen on."
    )
    answers = task == "answers"
    held_out |= {"truncated_rate": 0.05} if answers else {}
    return {
        "seconds": 310.5,
        "task": task,
        "objective": objective,
        "n_gold": 300,
        "n_chosen_on": 174,
        "n_held_out": 116,
        "n_examples": 0 if answers else 10,
        "folds": None,
        "n_trials": 11,
        "n_complete": 8,
        "n_pruned": 1,
        "n_failed": 2,
        "stopped_by": None,
        "default": {
            "params": {},
            "chosen_on": 0.4,
            objective: 0.42,
            f"{objective}_interval": [0.27, 0.55],
            **held_out,
        },
        "best": {
            "number": 5,
            "params": SPACE[5],
            "chosen_on": 0.61,
            objective: 0.57,
            f"{objective}_interval": [0.44, 0.68],
            **{**held_out, "tokens_per_document": 595.0},
        },
        "gain": 0.15,
        "gain_interval": [0.03, 0.27],
        "is_better": True,
        "sentence": sentence,
        "ceiling": None if answers else {"n": 120, "n_raters": 2, "spearman": 0.71, "kappa": 0.6},
        "importances": {"prompt": 0.62, "temperature": 0.21, "examples": 0.17},
        "confusion": None if answers else {"0": {"0": 20, "1": 6}, "1": {"0": 9, "1": 30, "2": 3}, "2": {"2": 11}},
        "fitted_line": None if answers else {"offset": 2.5, "slope": 0.8},
        "n_asked": 2400,
        "n_reused": 310,
        "prompt_tokens": 912_000,
        "answer_tokens": 2_400,
        "usd": 0.0912 if prices else None,
    }


def tuned(
    run_folder: Path,
    task: str = "ratings",
    objective: str = "spearman",
    prices: bool = True,
    found: list[Trial] | None = None,
    **changes: Any,
) -> Path:
    """A run folder in which nothing was done but tuning."""
    folder = run_folder / "tune"
    folder.mkdir(parents=True)
    lines = [json.dumps(each._asdict()) + "\n" for each in found or trials(objective, prices)]
    (folder / "trials.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result(task, objective, prices) | changes), encoding="utf-8")
    for name, text in {
        "inputs.json": '{"format": 1}',
        "best.yaml": "{}",
        "study.sqlite": "",
        "recipe.yaml": "{}",
    }.items():
        (folder / name).write_text(text)
    return run_folder


def drawn(run_folder: Path) -> tuple[Page, str]:
    """The page, and the markup of its section on tuning."""
    page = Page(Path(report.run(Recipe(run_folder=run_folder)).page))
    assert page.open == []
    return page, page.raw.split('<section id="tuning">')[1].split("</section>")[0]


def words(section: str) -> str:
    """The text of some markup, charts left out."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>", "", section, flags=re.DOTALL)).split())


def titles(section: str) -> list[str]:
    """What is written in each chart."""
    return [
        " ".join(re.findall(r"<text[^>]*>([^<]*)", svg)) for svg in re.findall(r"<svg.*?</svg>", section, re.DOTALL)
    ]


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_sets_the_best_beside_the_defaults_on_documents_held_out(tmp_path: Path):
    page, section = drawn(tuned(tmp_path / "run"))
    told = words(section)
    assert page.raw.index('id="tuning"') < page.raw.index('id="ratings"')
    assert "chosen on 0.40 0.61" in told and "held out 0.42 [0.27, 0.55] 0.57 [0.44, 0.68]" in told
    assert "gain, held out 0.15 [0.03, 0.27]" in told and "price of 1,000 documents $0.0310 $0.0310" in told
    assert "chosen on 174 documents and judged on 116 others" not in told
    assert "trials were chosen on 174 and judged on 116 others; 10 were set aside as examples" in told
    assert "people among themselves Spearman 0.71 , kappa 0.60 (n = 120)" in told
    assert "known ↓ teacher →" in told and "the best settings reach spearman 0.57" in page.text.split("Stages")[0]
    assert "optuna-dashboard sqlite:///" in told and f"gristmill rate {tmp_path}/run/tune/best.yaml" in told


def test_the_best_trials_stand_in_order_and_the_failed_ones_with_their_reason(tmp_path: Path):
    _, section = drawn(tuned(tmp_path / "run"))
    table = section.split("The best trials")[1].split("</table>")[0]
    rows = [words(row) for row in table.split("<tr")[2:]]
    assert [row.split(">")[-1].split()[0] for row in rows] == ["defaults", "5", "2", "4", "7", "0", "6", "1", "3"]
    assert table.count('class="main"') == 1 and 'class="main"><th scope="row" class="r">5<' in table
    failed = words(section.split("The best trials")[1].split("</table>")[1])
    assert "2 failed" in failed and "the metric raised ValueError" in failed and "no document has a score" in failed


def test_every_setting_that_varied_has_a_slice_the_most_important_first(tmp_path: Path):
    _, section = drawn(tuned(tmp_path / "run"))
    slices = titles(section.split('class="slices"')[1].split("</div>")[0])
    names = ["prompt", "temperature", "examples", "top_p", "stop", "calibrate"]
    assert [next(name for name in [*names, "prompt.system"] if shown.endswith(name)) for shown in slices] == names
    assert "prompts/edu-en" in slices[0] and "other/edu-en" in slices[0] and "words in contrast" in slices[0]
    assert "Spearman" in slices[0] and "none" not in slices[3] and "null" in slices[4] and "true" in slices[5]


def test_values_from_a_recipe_are_text_and_nothing_else(tmp_path: Path):
    found = [each._replace(params={**each.params, HOSTILE: n}) for n, each in enumerate(trials())]
    page, section = drawn(tuned(tmp_path / "run", found=found, sentence=HOSTILE, importances={HOSTILE: 0.5}))
    assert "script" not in page.tags and "alert(1)" in page.text and "{{ 7 * 7 }}" in page.text
    assert "\x1b" not in page.raw and "&lt;script&gt;" in section and "$x$" in page.text


def test_charts_of_a_tuning_take_their_inks_from_the_page(tmp_path: Path):
    page, section = drawn(tuned(tmp_path / "run"))
    assert section.count("<svg") == 8
    assert not re.search(r"(fill|stroke): ?#[0-9a-f]{3}", section, re.IGNORECASE)
    assert len(page.ids) == len(set(page.ids))


def test_a_tuning_without_prices_draws_quality_against_tokens(tmp_path: Path):
    _, section = drawn(tuned(tmp_path / "run", "answers", "rougeL", prices=False))
    told = words(section)
    assert "tokens per document" in titles(section)[-1] and "price of" not in told
    assert "for 1,000" not in words(section.split("The best trials")[1].split("</thead>")[0])
    assert (
        "cut at max_tokens 5.0% 5.0%" in told
        and "documents with a right answer" in told
        and "↓" not in told
        and "people among" not in told
    )


def test_a_price_that_is_always_the_same_is_no_chart(tmp_path: Path):
    found = [each._replace(figures={**each.figures, "usd_per_1000": 0.5}) for each in trials()]
    same = [each._replace(figures={**each.figures, "tokens_per_document": 300.0}) for each in found]
    assert "tokens per document" in (tune_charts.against_price(found, "spearman") or "")
    assert tune_charts.against_price(same, "spearman") is None


def test_a_price_that_was_taken_off_has_a_column(tmp_path: Path):
    found = [each._replace(value=each.value - 0.1 if each.value else None) for each in trials()]
    _, section = drawn(tuned(tmp_path / "run", found=found))
    assert "less price" in words(section.split("The best trials")[1])
    assert any("Spearman less price" in shown for shown in titles(section))


def test_defaults_that_nothing_beats_are_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = [each._replace(value=0.9) if each.number == -1 else each for each in trials()]
    best = {**result("ratings", "spearman", True)["default"], "number": -1}
    run_folder = tuned(tmp_path / "run", found=found, best=best, gain=0.0, gain_interval=None)
    _, section = drawn(run_folder)
    assert 'class="main"><th scope="row" class="r">defaults' in section and "gain, held out 0.00" in words(section)
    summary.show({"tune": summary.state(run_folder / "tune"), "run_folder": str(run_folder)})
    assert "best is the defaults" in capsys.readouterr().out


def test_a_search_at_work_shows_its_trials_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder = tuned(tmp_path / "run")
    (run_folder / "tune/result.json").unlink()
    (run_folder / "tune/best.yaml").unlink()
    _, section = drawn(run_folder)
    told = words(section)
    assert "The search is not finished (11 trials so far)" in told and "gristmill tune" in told
    assert titles(section)[0].endswith("prompt") and "objective" in told and "best.yaml" not in told
    states = summary.status(run_folder, [])
    assert states["tune"] == {"state": "begun", "n_trials": 11}
    summary.show_status(states)
    shown = capsys.readouterr().out
    assert "n_trials 11" in shown and f"optuna-dashboard sqlite:///{run_folder}/tune/study.sqlite" in shown


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_search_with_hardly_a_trial_is_a_page(tmp_path: Path, n: int):
    run_folder = tuned(tmp_path / "run", found=trials()[:n] or None)
    if not n:
        (run_folder / "tune/trials.jsonl").write_text('{"number": 1, "par')
    (run_folder / "tune/result.json").unlink()
    _, section = drawn(run_folder)
    assert "<svg" not in section and f"({max(n - 1, 0)} trials so far)" in section


def test_a_run_that_was_never_tuned_does_not_speak_of_it(tmp_path: Path):
    page = Page(Path(report.run(Recipe(run_folder=tmp_path)).page))
    assert "tuning" not in page.ids and "Tuning" not in page.text


def test_nothing_is_both_cheaper_and_better_than_the_front():
    points = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.1), (3.0, 0.6), (5.0, 0.6), (4.0, 0.7)]
    assert tune_charts.front(points) == [(1.0, 0.2), (3.0, 0.6), (4.0, 0.7)]


def test_a_setting_that_always_had_one_value_has_no_slice():
    found = [trial(n, {"a": value, "b": n}, 0.1 * n, "auc", False) for n, value in enumerate([1, 1.0, 1])]
    assert ["b" in shown for shown in tune_charts.slices(found, "auc", {"a": 0.9})] == [True]


def test_values_that_begin_alike_have_labels_of_their_own():
    long = "You judge web pages"
    settings = ["a/edu.md", "b/edu.md", f"{long} kindly.", f"{long} with care.", "1", 1, "other", None]
    told = ["a/edu", "b/edu", "…web pages kindly.", "…pages with care.", "1 (5)", "1 (6)", "other", "null"]
    assert tune_charts.labels(settings) == told


@pytest.mark.parametrize(
    "settings", [[1e-5, 1e-3, 0.1], [1, 2, 3], [True, False], [True, 1], [0, "auto"], [None, 0.5]]
)
def test_any_values_have_a_slice(settings: list[Any]):
    found = [trial(n, {"a": setting}, 0.1 * n, "auc", False) for n, setting in enumerate(settings)]
    [shown] = tune_charts.slices(found, "auc", {})
    assert "AUC" in shown and ("10" in shown) >= (settings[0] == 1e-5)


# -- in words ---------------------------------------------------------------------------------------------------------


def test_of_equal_trials_the_defaults_come_first_then_the_earlier():
    equal = [Trial(n, {}, "complete", 0.5, {}) for n in (3, -1, 1)]
    nothing = [Trial(4, {}, "failed", None, {}), Trial(5, {}, "complete", float("nan"), {})]
    assert [each.number for each in ranked([*equal, *nothing])] == [-1, 1, 3]


def test_values_are_told_on_one_line():
    told = {"prompts/edu-en.md": "edu-en", 0.123456: "0.123", 3: "3", True: "true", None: "null", "a\nb\x1b": "a b␛"}
    assert {value: tried.words(value) for value in told} == told
    assert tried.words(["\n", "ä"]) == '["\\n", "ä"]' and tried.words("x" * 50, 8) == "xxxxxxx…"


def test_a_line_that_was_cut_and_one_of_another_version_are_left_out(tmp_path: Path):
    run_folder = tuned(tmp_path / "run")
    path = run_folder / "tune/trials.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"number": 7}', "[1]", lines[1], lines[2][:30]]))
    assert tried.read(run_folder) == trials()[:2] and tried.read(tmp_path) == []


def test_the_summary_tells_what_was_found_and_what_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder = tuned(tmp_path / "my run", stopped_by="tune.budget_usd")
    summary.show({"tune": summary.state(run_folder / "tune"), "run_folder": str(run_folder)})
    out = capsys.readouterr().out
    shown = " ".join(re.sub(r"[│┃]", " ", out).split())
    for told in (
        "on 116 held out: best 0.57 [0.44, 0.68], default 0.42 [0.27, 0.55]",
        "the best settings reach spearman 0.57",
        "best is trial 5: prompt=words in contrast, temperature=0.1, examples=3, top_p=0.5",
        "people among themselves: Spearman 0.71, kappa 0.60 (n = 120)",
        "11 trials: 8 complete, 1 pruned, 2 failed",
        "stopped by tune.budget_usd",
        "asked 2,400, reused 310 answers; 914,400 tokens, $0.0912",
    ):
        assert told in shown, told
    assert f"\nto rate like the best: gristmill rate '{run_folder}/tune/best.yaml'\n" in out
    assert f"\nto look at the trials: optuna-dashboard 'sqlite:///{run_folder}/tune/study.sqlite'\n" in out


# -- while it runs ----------------------------------------------------------------------------------------------------


def test_where_nobody_watches_each_trial_is_a_line(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    with caplog.at_level(logging.INFO, "gristmill"), trial_table.live("auc", 30) as step:
        for each in [*trials("auc")[:4], *trials("auc")[-3:-1]]:
            step(each)
    assert caplog.messages[:4] == [
        "tune: defaults: AUC 0.400",
        "tune: trial 0 (1 of 30): AUC 0.410; prompt=edu-en, temperature=0, examples=0; best so far 0.410 (0)",
        "tune: trial 1 (2 of 30): AUC 0.350; prompt=edu-en, temperature=0.7, examples=2, top_p=0.9; best so far 0.410"
        " (0)",
        'tune: trial 2 (3 of 30): AUC 0.580; prompt=words in contrast, temperature=0.2, examples=4, stop=["\\n\\n",'
        ' "</answer>"]; best so far 0.580 (2)',
    ]
    assert caplog.messages[4].startswith("tune: trial 8 (4 of 30): pruned at 0.120; prompt=edu-en")
    assert "trial 9 (5 of 30): failed: the metric raised ValueError" in caplog.messages[5]
    assert capsys.readouterr().out == "" and "\x1b" not in caplog.text


def test_a_price_that_was_taken_off_is_told_in_the_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "gristmill"), trial_table.live("auc", 3) as step:
        step(trials("auc")[1]._replace(value=0.31))
    assert "AUC 0.410, 0.310 less its price;" in caplog.text


class Terminal(io.StringIO):
    """Something that is watched."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_table_stays_with_the_log_above_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    terminal, log = Terminal(), logging.getLogger("gristmill")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(log, "handlers", [handler])
    with trial_table.live("spearman", 11) as step:
        for each in trials():
            step(each)
        log.warning("a line of the log")
        print("\rloading 50%", end="", flush=True, file=sys.stderr)
        print("\rloading 100%", file=sys.stderr)
    assert "loading 100%" in terminal.getvalue() and "loading 50%" not in terminal.getvalue()
    last = terminal.getvalue().split("a line of the log")[-1]
    for told in ("Spearman", "defaults", "words in contrast", "11 of 11 trials, 1 pruned, 2 failed; 0:0", "0.610"):
        assert told in last, told
    assert handler.stream is terminal and sys.stderr is terminal and capsys.readouterr().out == ""


def test_the_table_holds_the_defaults_the_best_ten_and_what_came_to_nothing():
    many = [trial(n, {"temperature": n / 20}, n / 20, "auc", False) for n in range(20)]
    failed = [Trial(n, {"top_p": 2}, "failed", None, {}, HOSTILE) for n in range(20, 25)]
    listed = [(each.number, style) for each, style, _ in trial_table.listed([*trials("auc")[:1], *many, *failed])]
    assert listed[:2] == [(-1, ""), (19, "bold green")] and [number for number, _ in listed[2:11]] == [
        *range(18, 9, -1)
    ]
    assert listed[11:] == [(22, "dim"), (23, "dim"), (24, "dim")]


def test_a_narrow_terminal_has_room_for_the_settings():
    found = trials("auc", prices=False)
    wide, narrow = (trial_table.table(found, "auc", "", is_wide).columns for is_wide in (True, False))
    assert [column.header for column in wide] == ["trial", "AUC", "unscored", "tokens", "settings"]
    assert [column.header for column in narrow] == ["trial", "AUC", "settings"]


def test_time_left_counts_only_trials_of_this_run():
    pace, done = trial_table.Pace(10, now=100.0), trials()
    pace.add(done[0], 102.0)
    assert pace.left_s(102.0) is None
    for each in done[1:5]:
        pace.add(each, 102.5)
    assert pace.left_s(102.5) is None and pace.n_done == 4
    pace.add(done[5], 116.5)
    pace.add(done[6], 122.5)
    assert pace.left_s(122.5) == 40.0 and pace.left_s(130.5) == 32.0 and pace.left_s(500.0) == 0.0


@pytest.mark.parametrize(("seconds", "told"), [(3, "0:03"), (75, "1:15"), (3599.6, "1:00:00"), (7322, "2:02:02")])
def test_times_are_told_as_on_a_clock(seconds: float, told: str):
    assert trial_table.lasting(seconds) == told
