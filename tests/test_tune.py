"""Tuning a teacher that rates: what is tried on which documents, how the best is judged, and what rate makes of it."""

import json
import math
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stamina
from endpoint import (
    GENERATE,
    Asked,
    Endpoint,
    Reply,
    gristmill,
    likes,
    one_line,
    says,
    serve,
    start,
)
from endpoint import recipe as endpoint_recipe

from pipeline import findings, known, prompts, rate, summary, tried, tune
from pipeline.config import Recipe, load_recipe
from pipeline.errors import UserError
from pipeline.teacher import AnswerStore
from pipeline.trials import Compared, Trial

N = 60


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


# -- a teacher that is better with another prompt ---------------------------------------------------------------------


def document(asked: Asked) -> int:
    """The n of the document that is asked about, which comes after all examples."""
    return int(re.findall(r"doc-(\d+)", asked.shown)[-1])


def wording(asked: Asked) -> str:
    """The first word of the prompt."""
    return asked.shown.split()[0]


def human(n: int) -> int:
    return n % 6


def noise(n: int) -> int:
    """A score that says nothing of the human one."""
    return (n * n // 7 + n // 3) % 6


def teacher(asked: Asked) -> Reply:
    n, word = document(asked), wording(asked)
    score = {"Carefully:": human(n), "Somewhat:": human(n) if n % 3 else noise(n)}.get(word, noise(n))
    return says(f"Score: {score}")


def prompt_file(folder: Path, word: str, **front: Any) -> Path:
    path = folder / f"{word.strip(':').lower()}.md"
    settings = {"read": "generate", **front}
    if front or not path.exists():
        path.write_text(f"---\n{json.dumps(settings)}\n---\n{word} {GENERATE}\n", encoding="utf-8")
    return path


def gold_file(folder: Path, n: int = N, **more: Any) -> Path:
    """Human scores of id-0 to id-<n-1>; `more` are further columns, from n to a value."""
    rows = [
        {"id": f"id-{i}", "human_1": float(human(i)), **{name: value(i) for name, value in more.items()}}
        for i in range(n)
    ]
    path = folder / "gold.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def tuning(folder: Path, url: str, n: int = N, teacher: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    """A recipe that tunes the prompt on the gold file, unless it is told otherwise."""
    base = endpoint_recipe(folder, url, n, prompt={"body": f"Default: {GENERATE}"}, concurrency=4)
    words = [str(prompt_file(folder, word)) for word in ("Carefully:", "Somewhat:", "Idly:")]
    asked = {"gold": str(gold_file(folder, n)), "space": {"prompt": words}, "search": "grid", **settings}
    values = base.model_dump(mode="json", exclude_unset=True)
    values["teacher"] |= teacher or {}
    return Recipe.model_validate({**values, "tune": {name: each for name, each in asked.items() if each is not None}})


def asked_of(server: Endpoint) -> Counter[tuple[str, int]]:
    """How often each prompt was asked about each document."""
    with server.lock:
        return Counter((wording(asked), document(asked)) for asked in server.asked)


def documents_of(server: Endpoint, word: str) -> set[int]:
    return {n for each, n in asked_of(server) if each == word}


class Tuned(NamedTuple):
    """A search over three prompts, and everything that was asked for it."""

    recipe: Recipe
    result: tune.TuneResult
    asked: list[tuple[str, int]]
    """Prompt and document of each request, in order."""

    def about(self, word: str) -> set[int]:
        return {n for each, n in self.asked if each == word}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    with serve(teacher) as server:
        recipe = tuning(tmp_path_factory.mktemp("tuned"), server.url)
        result = tune.run(recipe)
        return Tuned(recipe, result, [(wording(asked), document(asked)) for asked in server.asked])


# -- the whole stage


def test_the_command_finds_the_better_prompt_and_rate_takes_what_it_found(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url)
        done = gristmill(r, "tune")
        assert done.code == 0, done.stderr
        found = json.loads(done.stdout)["tune"]
        best = load_recipe(r.run_folder / "tune" / "best.yaml", {})
        rated = rate.run(best)
        assert set(asked_of(server).values()) == {1}, "what tune asked, rate finds"
    assert found["best"]["params"] == {"prompt": str(tmp_path / "carefully.md")} == {"prompt": str(best.rate.prompt)}
    assert (found["is_better"], found["n_asked"]) == (True, 4 * 36 + 2 * 24)
    assert (rated.n_asked, rated.n_reused) == (0, N)
    assert best.tune == Recipe().tune
    assert best.teacher == r.teacher


def test_the_best_is_judged_beside_the_defaults(tuned: Tuned) -> None:
    found = tuned.result
    assert found.best["spearman"] == pytest.approx(1)
    assert found.sentence.startswith("Better than the default: Spearman 1.000 against ")
    assert found.gain == pytest.approx(1 - found.default["spearman"])
    assert found.gain_interval is not None
    assert found.gain_interval[0] > 0.5
    assert (found.task, found.n_gold, found.n_chosen_on, found.n_held_out) == ("ratings", 60, 36, 24)
    assert (found.n_trials, found.n_complete, found.n_failed, found.stopped_by) == (3, 3, 0, None)


def test_only_the_best_and_the_defaults_ever_see_the_documents_held_out(tuned: Tuned) -> None:
    chosen_on = tuned.about("Idly:")
    assert tuned.about("Somewhat:") == chosen_on
    assert tuned.about("Carefully:") == tuned.about("Default:") == set(range(N))
    assert len(chosen_on) == 36
    first = min(i for i, (_, n) in enumerate(tuned.asked) if n not in chosen_on)
    assert first == len(tuned.asked) - 48, "they are asked about once nothing is chosen any more"


def test_both_parts_have_every_human_score_alike(tuned: Tuned) -> None:
    assert Counter(map(human, tuned.about("Idly:"))) == dict.fromkeys(range(6), 6)


def test_trials_are_on_disk_with_the_defaults(tuned: Tuned) -> None:
    trials = tried.read(tuned.recipe.run_folder)
    assert [trial.number for trial in trials] == [-1, 0, 1, 2]
    assert {trial.state for trial in trials} == {"complete"}
    assert trials[0].params == {}
    assert trials[0].figures["spearman"] == tuned.result.default["chosen_on"]
    assert max(trial.figures["spearman"] for trial in trials) == tuned.result.best["chosen_on"]
    assert trials[0].figures["tokens_per_document"] == 107
    assert trials[0].figures["usd_per_1000"] is None


def test_a_tuned_run_is_not_taken_for_a_rated_one(tuned: Tuned) -> None:
    states = summary.status(tuned.recipe.run_folder, ["rate"])
    assert (states["tune"]["state"], states["rate"]["state"]) == ("done", "not begun")


def test_the_confusion_counts_the_documents_held_out(tuned: Tuned) -> None:
    confusion = tuned.result.confusion
    assert confusion is not None
    assert sum(n for row in confusion.values() for n in row.values()) == 24
    assert all(n == 0 for row, cells in confusion.items() for column, n in cells.items() if row != column)


def test_nothing_better_is_said_plainly_and_the_defaults_stay(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url, space={"max_tokens": [100, 200]})
        result = tune.run(r)
    assert (result.best["number"], result.best["params"], result.gain, result.is_better) == (-1, {}, 0, False)
    assert result.sentence == "No better than the default: nothing that was tried beats it."
    best = load_recipe(r.run_folder / "tune" / "best.yaml", {})
    assert (best.rate, best.teacher) == (r.rate, r.teacher)


def test_a_gain_that_may_be_luck_is_no_better(tmp_path: Path) -> None:
    def hardly_better(asked: Asked) -> Reply:
        n = document(asked)
        return says(f"Score: {human(n) if n % 13 == 0 and wording(asked) == 'Idly:' else noise(n)}")

    with serve(hardly_better) as server:
        result = tune.run(tuning(tmp_path, server.url, space={"prompt": [str(prompt_file(tmp_path, "Idly:"))]}))
    assert result.best["number"] == 0, "better on the documents chosen on"
    assert result.gain is not None
    assert result.gain_interval is not None
    assert result.gain_interval[0] < 0 < result.gain_interval[1]
    assert not result.is_better
    assert result.sentence.startswith("No better than the default: Spearman ")
    assert f"a gain of {result.gain:+.3f} (95%" in result.sentence


def compared(gain: float | None, low: float, high: float, usd: float | None = None) -> Compared:
    best = {"n": 40, "auc": 0.7 + (gain or 0), "usd_per_1000": usd}
    default = {"n": 40, "auc": 0.7, "usd_per_1000": None if usd is None else 2.0}
    return Compared(best, default, gain, None if gain is None else (low, high))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            compared(0.1, 0.02, 0.2),
            "Better than the default: AUC 0.800 against 0.700 on 40 documents held out, a gain",
        ),
        (compared(0.1, 0.0, 0.2), "No better than the default: AUC 0.800 against 0.700"),
        (compared(-0.1, -0.2, -0.02), "Worse than the default: AUC 0.600 against 0.700"),
        (compared(None, 0, 0), "Not known to be better than the default: AUC is not defined"),
        (
            compared(0.1, 0.02, 0.2, usd=0.5),
            "(95% +0.020 to +0.200). It costs $0.5 per 1,000 documents instead of $2.",
        ),
    ],
)
def test_the_sentence_says_what_the_interval_says(found: Compared, told: str) -> None:
    assert told in findings.sentence("auc", Trial(3, {"top_p": 0.5}, "complete", 0.8, {}), found)


def test_the_defaults_are_never_better_than_themselves() -> None:
    """With folds, others may have been best on some."""
    defaults, found = Trial(-1, {}, "complete", 0.8, {}), compared(0.1, 0.02, 0.2)
    assert findings.sentence("auc", defaults, found).startswith("No better than the default: nothing")
    assert not findings.is_better(defaults, found)


def test_what_is_as_good_and_cheaper_is_worth_it_where_the_price_counts() -> None:
    cheaper = compared(0.0, -0.1, 0.1, usd=0.5)
    assert findings.is_worth_it(cheaper, usd_weight=0.1)
    assert not findings.is_worth_it(cheaper, usd_weight=0)
    assert not findings.is_worth_it(compared(0.1, 0.0, 0.2, usd=5.0), usd_weight=0.1)
    assert not findings.is_worth_it(compared(None, 0, 0), usd_weight=0)


def test_a_gain_without_an_interval_is_told_as_not_known() -> None:
    found = compared(0.1, 0.0, 0.2)._replace(gain_interval=None)
    assert findings.sentence("auc", Trial(3, {}, "complete", 0.8, {}), found) == (
        "Not known to be better than the default: AUC 0.800 against 0.700 on 40 documents held out, which are too few"
        " to tell."
    )


def test_people_among_themselves_are_the_ceiling(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url)
        assert tune.run(r).ceiling is None
        gold_file(tmp_path, human_2=lambda n: float(human(n) if n % 4 else noise(n)))
        result = tune.run(r, redo=True)
    assert result.ceiling is not None
    assert result.ceiling["n_raters"] == 2
    assert 0.5 < result.ceiling["spearman"] < 1
    assert result.ceiling["kappa"] is not None


# -- what is paid for once


def test_a_killed_search_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    with serve(teacher, delay_s=0.03) as server:
        r = tuning(tmp_path, server.url, teacher={"concurrency": 1})
        process = start(r, "tune")
        deadline = time.monotonic() + 60
        while len(server.asked) < 70 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        server.delay_s = 0.0
        before = len(server.asked)
        result = tune.run(r)
        asked = asked_of(server)
    assert 70 <= before < 4 * 36, "killed in the middle of the search"
    assert sum(asked.values()) <= 4 * 36 + 2 * 24 + 1, "at most the answer that was on its way is asked for again"
    assert result.n_asked + result.n_reused == len(asked) == 4 * 36 + 2 * 24
    assert result.best["spearman"] == pytest.approx(1)


def test_ctrl_c_asks_nothing_more_though_several_trials_are_at_work(tmp_path: Path) -> None:
    heard = threading.Event()

    def waits(asked: Asked) -> Reply:
        if len(server.asked) >= 36 + 24:
            heard.wait(60)
        return teacher(asked)

    with serve(waits) as server:
        process = start(tuning(tmp_path, server.url, workers=3), "tune")
        deadline = time.monotonic() + 60
        while len(server.asked) < 36 + 24 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        heard.set()
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert len(server.asked) <= 36 + 24 + 2 * 12, "what was on its way"


def test_a_budget_ends_the_search_and_more_of_it_goes_on(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url)
        budget = 107 * (2 * 36 + 10 + 48)
        stopped = tune.run(with_tune(r, budget_tokens=budget))
        n_asked = len(server.asked)
        assert stopped.stopped_by == "budget_tokens"
        assert 107 * n_asked <= budget
        assert stopped.n_trials == 1
        assert stopped.best["n"] == stopped.default["n"] == 24, "room was kept for the documents held out"
        again = tune.run(with_tune(r, budget_tokens=budget))
        assert (len(server.asked), again.stopped_by) == (n_asked, "budget_tokens")
        whole = tune.run(with_tune(r, budget_tokens=1_000_000))
        assert set(asked_of(server).values()) == {1}
        assert tune.run(with_tune(r, budget_tokens=1)) == whole, "a search that came to its end is finished"
    assert (whole.stopped_by, whole.n_trials) == (None, 3)
    assert whole.prompt_tokens + whole.answer_tokens == 107 * len(server.asked), "what earlier runs paid counts too"


def test_a_budget_without_room_for_the_defaults_is_one_line(tmp_path: Path) -> None:
    with serve(teacher) as server:
        with pytest.raises(UserError, match=r"^tune: budget_tokens leaves no room for the defaults; raise it$"):
            tune.run(tuning(tmp_path, server.url, budget_tokens=107 * 20))
        assert len(server.asked) <= 20


def test_other_settings_are_refused_and_done_anew_with_the_answers_that_are_there(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url)
        first = tune.run(r)
        changed = with_tune(r, objective="kappa")
        with pytest.raises(UserError, match=r"tune: tune.objective changed from None to 'kappa' .* --redo"):
            tune.run(changed)
        n_asked = len(server.asked)
        anew = tune.run(changed, redo=True)
        assert len(server.asked) == n_asked
    assert (first.objective, anew.objective, anew.n_asked) == ("spearman", "kappa", 0)
    assert anew.best["kappa"] == pytest.approx(1)
    assert [trial.figures.keys() & {"kappa", "spearman"} for trial in tried.read(r.run_folder)] == [{"kappa"}] * 4


def test_several_trials_at_a_time_ask_the_same_once(tmp_path: Path) -> None:
    with serve(teacher, delay_s=0.05) as server:
        result = tune.run(tuning(tmp_path, server.url, workers=3))
        assert set(asked_of(server).values()) == {1}
        assert server.most_in_flight > 4, "more than one trial's requests"
    assert (result.n_complete, result.is_better) == (3, True)


# -- examples


def test_a_good_document_is_shown_as_good_where_nearly_all_are(tmp_path: Path) -> None:
    rows = [{"id": f"id-{n}", "text": f"doc-{n}", "good": n % 5 > 0} for n in range(N)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    with serve(teacher) as server:
        tune.run(tuning(tmp_path, server.url, gold=None, gold_column="good", space={"examples": [1]}))
        shown = [asked.body["messages"] for asked in server.asked if len(asked.body["messages"]) > 1]
    assert {turns[1]["content"] for turns in shown} == {"Score: 5"}


def test_people_who_said_yes_or_no_are_on_no_grades_scale(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url)
        rows = [{"id": f"id-{n}", "human_a": int(human(n) > 2), "human_b": int(human(n) > 1)} for n in range(N)]
        (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        result = tune.run(r)
        with pytest.raises(UserError, match="kappa needs known scores on the prompt's scale"):
            tune.run(with_tune(r, objective="kappa"), redo=True)
    assert (result.objective, result.confusion) == ("spearman", None)
    assert result.ceiling is not None
    assert "kappa" not in result.ceiling


def test_documents_shown_as_examples_are_never_asked_about(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url, space={"examples": [0, 2, 3], "examples_draw": [0, 1]}, search="random")
        result = tune.run(r)
        tried_on = {document(asked) for asked in server.asked}
        shown = [turn["content"] for asked in server.asked for turn in asked.body["messages"][:-1]]
    examples = {int(n) for text in shown for n in re.findall(r"doc-(\d+)", text)}
    assert result.n_examples == 6, "twice the most that are shown"
    assert len(examples) > 3
    assert not examples & tried_on
    assert len(tried_on) == result.n_chosen_on + result.n_held_out == N - 6
    assert result.n_gold == N


def test_examples_are_spread_over_the_scores() -> None:
    scores = np.array([human(n) for n in range(N)], dtype=np.float64)
    assert scores[known.spread(scores, 6)].tolist() == [0, 1, 2, 3, 4, 5]
    uneven = np.array([1.0] * 33 + [0.0] * 27)
    assert uneven[known.spread(uneven, 4)].tolist() == [0, 0, 1, 1]
    assert len(known.spread(scores, 0)) == 0


def test_what_is_nearly_a_copy_is_never_on_both_sides(tmp_path: Path) -> None:
    words = [" ".join(f"w{(n // 2 * 31 + k * k) % 997}" for k in range(60)) for n in range(N)]
    rows = [{"id": f"id-{n}", "text": f"doc-{n} {words[n]}"} for n in range(N)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url, space={"prompt": [str(prompt_file(tmp_path, "Carefully:"))], "examples": [1]})
        tune.run(r)
        default = documents_of(server, "Default:")
        first = {document(asked) for asked in server.asked[: len(default) * 6 // 10]}
    assert all(n ^ 1 in default for n in default), "the twin of an example is set aside with it"
    assert len([n for n in first if n ^ 1 in first]) >= len(first) - 1


# -- folds, halving, other objectives


def test_with_folds_every_document_is_held_out_once(tmp_path: Path) -> None:
    with serve(teacher) as server:
        result = tune.run(tuning(tmp_path, server.url, folds=3))
        assert set(asked_of(server).values()) == {1}
        assert len(asked_of(server)) == 4 * N
    assert (result.folds, result.n_chosen_on, result.n_held_out) == (3, N, N)
    assert result.best["n"] == N
    assert result.best["spearman"] == pytest.approx(1)
    assert result.is_better


def test_halving_asks_about_fewer_documents_and_keeps_the_best(tmp_path: Path) -> None:
    def by_tokens(asked: Asked) -> Reply:
        n, room = document(asked), asked.body.get("max_tokens", asked.body.get("max_completion_tokens"))
        n_right = {107: 10, 512: 0}.get(room, (room - 100) // 2)
        return says(f"Score: {human(n) if n * 7919 % 10 < n_right else noise(n)}")

    space = {"max_tokens": list(range(102, 110))}
    with serve(by_tokens) as server:
        r = tuning(tmp_path, server.url, n=180, space=space, halving=True, search="grid", sample=180)
        result = tune.run(r)
        n_halving = len(server.asked)
    assert result.best["params"] == {"max_tokens": 107}
    assert result.n_pruned >= 3
    assert n_halving < 9 * 108


def test_halving_has_some_of_every_stratum_from_the_first(tmp_path: Path) -> None:
    """One document in twenty is good: of a plain draw of an eighth of them often none is."""
    rows = [{"id": f"id-{n}", "text": f"doc-{n}", "good": n % 20 == 5} for n in range(280)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    space = {"max_tokens": [101, 102, 103, 104, 105]}
    with serve(teacher) as server:
        given = {"gold": None, "gold_column": "good", "halving": True, "space": space}
        result = tune.run(tuning(tmp_path, server.url, n=280, **given))
    assert (result.n_complete, result.n_failed) == (5, 0)


def test_too_few_of_a_kind_are_told_before_anything_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": f"id-{n}", "text": f"doc-{n}", "good": n % 15 == 5} for n in range(N)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    with serve(teacher) as server, caplog.at_level("WARNING"):
        result = tune.run(tuning(tmp_path, server.url, gold=None, gold_column="good"))
    assert caplog.messages[0].startswith("tune: 56 of 60 documents are all alike in what is known of them; those held")
    assert (result.gain_interval, result.is_better) == (None, False)


def test_a_price_counts_against_the_objective(tmp_path: Path) -> None:
    prices = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_answer_tokens": 2.0}
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url, teacher=prices, usd_weight=0.5)
        result = tune.run(r)
    usd = 1000 * (100 * 1 + 7 * 2) / 1e6
    for trial in tried.read(r.run_folder):
        assert trial.figures["usd_per_1000"] == pytest.approx(usd)
        assert trial.value == pytest.approx(trial.figures["spearman"] - 0.5 * usd)
    assert result.usd == pytest.approx(usd / 1000 * len(server.asked))


def test_f1_keeps_what_reaches_a_cut_that_was_fitted_elsewhere(tmp_path: Path) -> None:
    """The teacher's scores are half of people's: only a fitted cut finds the documents from 4 up."""

    def halved(asked: Asked) -> Reply:
        return says(f"Score: {human(document(asked)) / 2 if wording(asked) == 'Carefully:' else 1}")

    with serve(halved) as server:
        result = tune.run(tuning(tmp_path, server.url, objective="f1", good_from=4))
    assert result.best["f1"] == pytest.approx(1)
    assert result.default["f1"] == pytest.approx(0.5), "all are kept, and a third are good"


def test_an_unreadable_trial_fails_and_the_others_go_on(tmp_path: Path) -> None:
    def mute(asked: Asked) -> Reply:
        return says("I would rather not say.") if wording(asked) == "Idly:" else teacher(asked)

    with serve(mute) as server:
        r = tuning(tmp_path, server.url)
        result = tune.run(r)
    (failed,) = [trial for trial in tried.read(r.run_folder) if trial.state == "failed"]
    assert failed.reason == "no document has a score: no_score 36"
    assert (result.n_complete, result.n_failed, result.is_better) == (2, 1, True)


def test_documents_without_a_score_are_told_and_say_nothing(tmp_path: Path) -> None:
    def half(asked: Asked) -> Reply:
        return says("Well.") if document(asked) % 2 and wording(asked) == "Carefully:" else teacher(asked)

    with serve(half) as server:
        result = tune.run(tuning(tmp_path, server.url, space={"prompt": [str(prompt_file(tmp_path, "Carefully:"))]}))
    assert 0.3 < result.best["unscored_rate"] < 0.7
    assert 0.3 < result.best["spearman"] < 0.95
    assert result.default["unscored_rate"] == 0


def test_settings_that_cannot_be_fail_and_the_others_go_on(tmp_path: Path) -> None:
    with serve(teacher) as server:
        patterns = [r"Score:\s*{number}", "Score"]
        r = tuning(tmp_path, server.url, space={"prompt.pattern": patterns, "temperature": [0.5]})
        result = tune.run(r)
    assert (result.n_complete, result.n_failed) == (1, 1)
    (failed,) = [trial for trial in tried.read(r.run_folder) if trial.state == "failed"]
    assert failed.reason is not None
    assert "prompt.pattern" in failed.reason


def test_what_does_worse_on_documents_held_out_is_not_written_as_the_best(tmp_path: Path) -> None:
    with serve(teacher) as server:
        tune.run(tuning(tmp_path, server.url))
        chosen_on = documents_of(server, "Idly:")

    def lucky(asked: Asked) -> Reply:
        n = document(asked)
        right = wording(asked) == "Idly:" and n in chosen_on
        return says(f"Score: {human(n) if right else 5 - human(n) if wording(asked) == 'Idly:' else noise(n)}")

    with serve(lucky) as server:
        space = {"prompt": [str(prompt_file(tmp_path, "Idly:"))]}
        r = tuning(tmp_path, server.url, space=space).model_copy(update={"run_folder": tmp_path / "lucky"})
        result = tune.run(r)
    assert result.best["number"] == 0
    assert result.gain is not None
    assert result.gain < 0
    assert load_recipe(r.run_folder / "tune" / "best.yaml", {}).rate == r.rate


# -- the line of a prompt with two groups


LINE = {"offset": 2.5, "slope": 0.1}


CONTRAST = {
    "read": "choices",
    "line": LINE,
    "choices": [{"value": 5, "answers": [" good"]}, {"value": 0, "answers": [" bad"]}],
}


def in_contrast(asked: Asked) -> Reply:
    """Log-odds of good rise with the human score: 0.8 x (score - 2); the default prompt's hardly say anything. After
    an example they are 30 higher, which that line takes beyond the scale."""
    odds = 0.8 * (human(document(asked)) - 2) if wording(asked) == "Carefully:" else 0.01 * noise(document(asked))
    odds += 30 * (len(asked.body["messages"]) > 1)
    return likes({" good": -math.log1p(math.exp(-odds)), " bad": -math.log1p(math.exp(odds))})


def contrasting(folder: Path, url: str, **settings: Any) -> Recipe:
    """A recipe whose prompts compare two groups and lay a line through their log-odds."""
    words = [prompt_file(folder, word, **CONTRAST) for word in ("Carefully:", "Default:")]
    r = tuning(folder, url, **{"space": {"prompt": [str(words[0])]}, **settings})
    return Recipe.model_validate({**r.model_dump(mode="json", exclude_unset=True), "rate": {"prompt": str(words[1])}})


def test_the_line_of_the_best_prompt_is_fitted_to_the_human_scores(tmp_path: Path) -> None:
    with serve(in_contrast) as server:
        r = contrasting(tmp_path, server.url)
        result = tune.run(r)
        n_asked = len(server.asked)
        best = load_recipe(r.run_folder / "tune" / "best.yaml", {})
        rate.run(best)
        assert len(server.asked) == n_asked
    assert result.fitted_line == pytest.approx({"offset": 2.0, "slope": 1.25}, abs=1e-3)
    assert best.rate.prompt == r.run_folder / "tune" / "carefully-tuned.md"
    assert prompts.load(best.rate.prompt).line == prompts.Line(**result.fitted_line)
    rows = pq.read_table(r.run_folder / "rate" / "ratings.parquet").to_pylist()
    assert all(row["score"] == pytest.approx(human(int(row["id"][3:])), abs=0.01) for row in rows)


def test_settings_are_not_judged_by_a_line_that_was_fitted_to_others(tmp_path: Path) -> None:
    rows = [{"id": f"id-{n}", "text": f"doc-{n}", "good": human(n) > 2} for n in range(N)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    with serve(in_contrast) as server:
        space = {"prompt": [str(tmp_path / "carefully.md")], "examples": [1]}
        r = contrasting(tmp_path, server.url, gold=None, gold_column="good", space=space)
        result = tune.run(r)
    assert result.best["auc"] == 1
    prompt = prompts.load(load_recipe(r.run_folder / "tune" / "best.yaml", {}).rate.prompt or Path())
    assert len(prompt.examples) == 1
    assert prompt.line is not None
    ends = [prompt.line.offset + prompt.line.slope * (30 + 0.8 * (score - 2)) for score in (0, 5)]
    assert ends == pytest.approx([0, 5], abs=0.02), "the scores fill the scale"


# -- a local model, and a column that is true or false


def test_a_local_model_is_tuned_on_a_column_and_the_result_is_rated_with(
    tmp_path: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.engines import transformers

    n_loaded = []
    load = transformers.load
    monkeypatch.setattr(transformers, "load", lambda *args: n_loaded.append(1) or load(*args))
    space = {"document_tokens": [16, 64], "examples": [0, 1], "prompt.chat": [True, False]}
    given = {"tune": {"gold_column": "good", "space": space, "search": "random", "trials": 5, "sample": 50}}
    r = load_recipe(recipe_file, given)
    result = tune.run(r)
    assert (result.objective, len(n_loaded)) == ("auc", 1)
    assert (result.n_trials, result.n_complete, result.n_examples) == (5, 5, 2)
    assert result.confusion is None or set(result.confusion) <= {"0", "1"}
    assert result.best["auc_interval"] is not None
    assert all(0 <= share <= 1 for share in result.importances.values())
    best = load_recipe(r.run_folder / "tune" / "best.yaml", {})
    assert rate.run(best).n_scored == 50


def test_documents_whose_column_is_empty_do_not_count(tmp_path: Path) -> None:
    rows = [{"id": f"id-{n}", "text": f"doc-{n}", "good": None if n % 2 else n % 3 == 0} for n in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")

    with serve(teacher) as server:
        result = tune.run(tuning(tmp_path, server.url, gold=None, gold_column="good", sample=30))
        about = {document(asked) for asked in server.asked}
    assert (result.n_gold, result.objective) == (30, "auc")
    assert len(about) == 30
    assert not any(n % 2 for n in about)


def test_scores_may_come_with_their_text_and_without_a_corpus_that_has_it(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url)
        rows = [{"text": f"doc-{n} by hand", "human": human(n)} for n in range(100, 130)]
        (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        result = tune.run(r)
        assert {document(asked) for asked in server.asked} == set(range(100, 130))
    assert result.n_gold == 30


# -- answers instead of ratings


def test_answers_are_tuned_by_the_same_stage(tmp_path: Path) -> None:
    rows = [{"id": f"id-{n}", "text": f"doc-{n}", "answer": f"it is {n}"} for n in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")

    def answers(asked: Asked) -> Reply:
        return says(f"it is {document(asked)}" if wording(asked) == "Carefully:" or document(asked) % 5 == 0 else "no")

    templates = ["Carefully: {{ text }}", "Idly: {{ text }}"]
    with serve(answers) as server:
        asked = {"reference": "answer", "template": "Default: {{ text }}", "space": {"template": templates}}
        r = tuning(tmp_path, server.url, gold=None, **asked)
        result = tune.run(r)
        assert set(asked_of(server).values()) == {1}
        assert tune.run(r) == result
    assert (result.task, result.objective, result.n_gold) == ("answers", "exact_match", 30)
    assert (result.best["exact_match"], result.is_better, result.fitted_line) == (1, True, None)
    best = load_recipe(r.run_folder / "tune" / "best.yaml", {})
    assert (best.tune.template, best.tune.reference, best.tune.space) == (templates[0], "answer", {})


# -- bad input


def with_tune(recipe: Recipe, **settings: Any) -> Recipe:
    values = recipe.model_dump(mode="json", exclude_unset=True)
    return Recipe.model_validate({**values, "tune": {**values["tune"], **settings}})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"gold": None}, "tune: no known score or answer given; give one of"),
    ({"gold_column": "good"}, "tune: tune.gold and tune.gold_column given; give one of"),
    ({"gold": "nowhere.csv"}, "tune.gold: nowhere.csv cannot be read"),
    ({"gold": None, "gold_column": "none"}, "'none'"),
    ({"space": {}}, "tune.space is empty"),
    ({"space": {"temprature": [0, 1]}}, "tune.space.temprature cannot be tuned; did you mean temperature?"),
    ({"space": {"top_p": [0.5, 7]}}, "tune.space.top_p: input should be less than or equal to 1, got 7"),
    ({"space": {"top_p": [0.5, 0.9]}}, "tune.space: top_p makes no difference to what is asked"),
    ({"space": {"examples": [0, 20]}}, "tune.space.examples: 20 examples are too many for 60 documents"),
    ({"space": {"prompt": ["nowhere.md"]}}, "tune.space.prompt: nowhere.md cannot be read"),
    ({"folds": 5, "search": "tpe"}, "tune.folds: search tpe goes by all documents"),
    ({"folds": 5, "halving": True}, "tune.folds: halving goes by all documents"),
    ({"held_out_share": 0.01}, "tune.held_out_share: of 60 documents a part would get 0"),
    ({"objective": "auc", "good_from": 9}, "tune.objective: auc needs good documents and others, but 0 of 60"),
    ({"objective": "f1", "good_from": 0}, "tune.objective: f1 needs good documents and others, but 60 of 60"),
    ({"usd_weight": 0.1}, "tune.usd_weight: the price of m is not known"),
    ({"budget_usd": 1}, "budget_usd: the price of m is not known"),
    ({"teacher": {"batch_folder": "batch"}}, "teacher.batch_folder: each trial would wait for a batch"),
    ({"sample": 19}, "tune.gold: 19 documents have a known score; give more, 20"),
]


@pytest.mark.parametrize(("settings", "told"), BAD)
def test_bad_settings_are_one_line_before_anything_is_asked(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url, **settings)
        with pytest.raises(UserError) as stop:
            tune.run(r)
        assert not server.asked
    assert told in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_missing_prompt_is_told_by_the_setting_that_names_it(tmp_path: Path) -> None:
    r = tuning(tmp_path, "http://127.0.0.1:9/v1")
    (tmp_path / "prompt.md").unlink()
    with pytest.raises(UserError, match=r"^rate.prompt: .*prompt\.md cannot be read"):
        tune.run(r)


def test_bad_settings_exit_with_1(tmp_path: Path) -> None:
    assert one_line(gristmill(tuning(tmp_path, "http://127.0.0.1:9/v1", gold=None), "tune")) == (
        "tune: no known score or answer given; give one of tune.gold, tune.gold_column and tune.reference"
    )


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({"other": 3}, "tune.gold: none of 60 ids, such as other-0, is in the corpus; add a column text"),
        ({"same": 3}, "tune.gold: all 60 documents have the known score 3; give others too"),
    ],
)
def test_gold_that_says_nothing_is_one_line(tmp_path: Path, scores: dict[str, int], told: str) -> None:
    (name,) = scores
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url)
        rows = [{"id": f"{'id' if name == 'same' else name}-{n}", "human": 3} for n in range(N)]
        (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        with pytest.raises(UserError) as stop:
            tune.run(r)
        assert not server.asked
    assert str(stop.value) == told


def test_kappa_needs_scores_on_the_scale_of_every_prompt(tmp_path: Path) -> None:
    with serve(teacher) as server:
        other = prompt_file(tmp_path, "Idly:", scale=[0, 1])
        r = tuning(tmp_path, server.url, objective="kappa", space={"prompt": [str(other)]})
        with pytest.raises(UserError, match="kappa needs known scores on the prompt's scale of 0 to 1, but they go"):
            tune.run(r)
        assert not server.asked


def test_a_local_engine_takes_one_trial_at_a_time(recipe_file: Path) -> None:
    r = load_recipe(recipe_file, {"tune": {"gold_column": "good", "space": {"calibrate": [True]}, "workers": 2}})
    with pytest.raises(UserError, match=r"^tune.workers: transformers runs one trial at a time; leave it at 1"):
        tune.run(r)


def test_a_damaged_study_is_one_line_and_its_answers_are_kept(tmp_path: Path) -> None:
    with serve(teacher) as server:
        r = tuning(tmp_path, server.url, budget_tokens=107 * 150)
        tune.run(r)
        n_asked = len(server.asked)
        study = r.run_folder / "tune" / "study.sqlite"
        study.write_bytes(b"no database" * 1000)
        with pytest.raises(UserError, match=r"study .*study\.sqlite: .*move the file away") as stop:
            tune.run(r)
        assert "\n" not in str(stop.value)
        study.unlink()
        tune.run(r)
        assert set(asked_of(server).values()) == {1}
        assert len(server.asked) == n_asked
    with AnswerStore(r.run_folder / "rate" / "answers.sqlite") as store:
        assert len(store) == n_asked
