"""A recipe with a reference column tunes a teacher to answer like it, row by row and paid for once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from endpoint import Asked, Endpoint, Reply, error, says, serve

from pipeline import tune, tune_answers
from pipeline.config import Recipe, load_recipe, merge
from pipeline.engines.kept import Kept
from pipeline.errors import UserError
from pipeline.trials import Failed, OutOfBudget
from pipeline.tune_answers import Answers, drawn, right_answers

N = 40
ALL = np.arange(N)


def rows(n: int = N) -> list[dict[str, Any]]:
    """Rows with a nested column and a reference; the last has none, and the first stands twice."""
    found = [{"name": f"doc-{i}", "about": {"topic": f"t{i}"}, "answer": f"answer {i}"} for i in range(n)]
    return [*found, found[0], {"name": f"doc-{n}", "about": {"topic": "t"}, "answer": None}]


def recipe(folder: Path, url: str = "http://127.0.0.1:9/v1", **changes: Any) -> Recipe:
    """A recipe that tunes an endpoint on the rows in the folder."""
    path = folder / "rows.parquet"
    if not path.exists():
        pq.write_table(pa.Table.from_pylist(rows()), path)
    base = {
        "run_folder": folder / "run",
        "corpus": {"path": str(path)},
        "teacher": {"engine": "openai", "model": "m", "base_url": url, "retries": 0, "timeout_s": 20},
        "tune": {
            "reference": "answer",
            "template": "Who is {{ name }} of {{ about.topic }}?",
            "space": {"temperature": [0.0, 0.5]},
        },
    }
    return Recipe.model_validate(merge(base, changes))


def task(recipe: Recipe) -> Answers:
    return tune_answers.of(recipe, Kept(), recipe.run_folder / "tune")


def knows_half(asked: Asked) -> Reply:
    """Right about even documents; about all of them when it is not greedy or is told to think."""
    number = int(asked.document.removeprefix("doc-"))
    warm = asked.body.get("temperature", 0) > 0 or asked.body["messages"][0]["role"] == "system"
    return says(f" Answer  {number}\n" if number % 2 == 0 or warm else "no idea")


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with serve(knows_half) as started:
        yield started


# -- rows


def test_rows_are_those_with_a_right_answer_each_once(tmp_path):
    found = task(recipe(tmp_path))
    assert sorted(row["name"] for row in found.rows) == sorted(f"doc-{i}" for i in range(N))
    assert all(right == [row["answer"]] for row, right in zip(found.rows, found.right, strict=True))
    assert set(found.rows[0]) == {"name", "about.topic", "answer"}


def test_the_draw_is_that_of_the_seed_however_rows_are_ordered_and_stored(tmp_path):
    names = ["answer", "name", "about.topic"]

    def draw(seed: int, path: Path) -> list[str]:
        corpus = recipe(tmp_path, corpus={"path": str(path)}).corpus
        return [row["name"] for row in drawn(corpus, names, "answer", 25, seed)]

    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows()[::-1]), encoding="utf-8")
    recipe(tmp_path)
    first = draw(0, tmp_path / "rows.parquet")
    assert len(set(first)) == 25
    assert draw(0, jsonl) == first
    assert draw(1, jsonl) != first


def test_a_reference_may_hold_several_right_answers_and_empty_ones_are_none():
    assert right_answers(["a", "", None, " b "]) == ["a", "b"]
    assert right_answers(3) == ["3"]
    assert [right_answers(value) for value in (None, float("nan"), "  ", [])] == [[], [], [], []]


def test_rows_that_are_asked_the_same_are_never_parted(tmp_path):
    copies = [{"name": f"doc-{i % 20}", "about": {"topic": "t"}, "answer": f"answer {i}"} for i in range(N)]
    pq.write_table(pa.Table.from_pylist(copies), tmp_path / "rows.parquet")
    found = task(recipe(tmp_path))
    names = [row["name"] for row in found.rows]
    assert len(set(found.units.tolist())) == 20
    assert len({(name, unit) for name, unit in zip(names, found.units.tolist(), strict=True)}) == 20


# -- asking


def test_an_outcome_is_the_metric_of_the_answers_to_those_rows(tmp_path, server):
    found = task(recipe(tmp_path, server.url))
    greedy, warm = found.outcome({}, ALL[:10]), found.outcome({"temperature": 0.5}, ALL[:10])
    even = sum(int(row["name"].removeprefix("doc-")) % 2 == 0 for row in found.rows[:10])
    assert (greedy.value, greedy.figures["exact_match"], warm.value) == (even / 10, even / 10, 1.0)
    figures = {"unscored_rate": 0.0, "truncated_rate": 0.0, "tokens_per_document": 107.0, "usd_per_1000": None}
    assert {**greedy.figures, **figures} == greedy.figures
    assert {asked.document for asked in server.asked} == {row["name"] for row in found.rows[:10]}
    assert all(" of t" in asked.shown for asked in server.asked)


def test_answers_are_paid_for_once_whoever_asks_again(tmp_path, server):
    wanted = recipe(tmp_path, server.url)
    task(wanted).outcome({}, ALL)
    again = task(wanted)
    again.recall({})
    assert (again.spending.total.n, again.spending.n_asked) == (N, 0)
    again.outcome({}, ALL)
    again.compared([{}], [ALL[:20]], [ALL[20:]])
    assert (again.spending.total.n, len(server.asked)) == (N, N)
    assert (tmp_path / "run" / "tune" / "answers.sqlite").exists()


def test_the_price_is_told_and_taken_off_the_objective(tmp_path, server):
    prices = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_answer_tokens": 10.0}
    outcome = task(recipe(tmp_path, server.url, teacher=prices, tune={"usd_weight": 0.5})).outcome({}, ALL)
    assert outcome.figures["usd_per_1000"] == pytest.approx(0.17)
    assert outcome.value == pytest.approx(outcome.figures["exact_match"] - 0.5 * 0.17)


def test_the_best_and_the_defaults_are_compared_on_the_same_rows(tmp_path, server):
    found = task(recipe(tmp_path, server.url)).compared([{"temperature": 0.5}], [ALL[:10]], [ALL[10:]])
    assert (found.best["n"], found.best["exact_match"], found.default["exact_match"] < 0.8) == (30, 1.0, True)
    assert found.gain == pytest.approx(1 - found.default["exact_match"])
    assert 0 < found.gain_interval[0] < found.gain < found.gain_interval[1]
    assert found.default["tokens_per_document"] == 107.0


def test_folds_are_judged_together(tmp_path, server):
    parts = [ALL[:20], ALL[20:]]
    found = task(recipe(tmp_path, server.url)).compared([{"temperature": 0.5}, {}], parts[::-1], parts)
    assert found.best["n"] == N
    assert 0 < found.gain < 0.5


def test_a_budget_that_ends_within_a_trial_leaves_the_rest_to_a_larger_one(tmp_path, server):
    cheap = recipe(tmp_path, server.url, tune={"budget_tokens": 107 * 15}, teacher={"concurrency": 1})
    with pytest.raises(OutOfBudget, match="budget_tokens"):
        task(cheap).outcome({}, ALL)
    n_asked = len(server.asked)
    assert 10 <= n_asked <= 15
    found = task(recipe(tmp_path, server.url))
    found.outcome({}, ALL)
    assert found.spending.stopped_by is None
    assert len(server.asked) == N


def test_what_is_left_of_a_budget_is_compared(tmp_path, server):
    cheap = recipe(tmp_path, server.url, tune={"budget_tokens": 107 * 60}, teacher={"concurrency": 1})
    found = task(cheap).compared([{"temperature": 0.5}], [ALL[:0]], [ALL])
    assert 10 <= found.best["n"] == found.default["n"] < N
    assert found.gain is not None


def test_without_any_answer_there_is_no_figure(tmp_path, server):
    cheap = recipe(tmp_path, server.url, tune={"budget_tokens": 1}, teacher={"concurrency": 1})
    found = task(cheap).compared([{"temperature": 0.5}], [ALL[:0]], [ALL])
    assert (found.gain, found.gain_interval, found.best["exact_match"], found.best["n"]) == (None, None, None, 0)


def test_answers_that_were_cut_off_and_refusals_are_told(tmp_path):
    def scripted(asked: Asked) -> Reply:
        number = int(asked.document.removeprefix("doc-"))
        return (
            says("x", finish="length")
            if number % 2
            else says("", finish="content_filter")
            if number % 4
            else says("y")
        )

    with serve(scripted) as server:
        figures = task(recipe(tmp_path, server.url)).outcome({}, ALL).figures
    assert (figures["truncated_rate"], figures["unscored_rate"]) == (0.5, 0.25)


def test_a_request_that_failed_is_no_poor_answer(tmp_path):
    def fails_once(asked: Asked) -> Reply:
        return error(500) if asked.document == "doc-3" else says("x")

    with serve(fails_once) as server, pytest.raises(UserError, match="1 of 40 requests failed"):
        task(recipe(tmp_path, server.url)).outcome({}, ALL)


def test_a_question_longer_than_document_tokens_is_not_cut_in_silence(tmp_path, server):
    with pytest.raises(UserError, match="40 of 40 questions are longer"):
        task(recipe(tmp_path, server.url)).outcome({"document_tokens": 3}, ALL)


def test_a_metric_that_raises_fails_the_trial(tmp_path, server):
    path = tmp_path / "mine.py"
    path.write_text(
        "def moody(answers, right):\n    return {'yes': 1.0}['mood' if 'no idea' in answers else 'yes']\n",
        encoding="utf-8",
    )
    with pytest.raises(Failed, match="metric moody raised KeyError: 'mood'"):
        task(recipe(tmp_path, server.url, tune={"objective": f"{path}:moody"})).outcome({}, ALL)


def test_a_metric_that_fails_on_the_right_answers_is_refused_before_anything_is_asked(tmp_path, server):
    path = tmp_path / "mine.py"
    path.write_text("def boom(answers, right):\n    return 1 / 0\n", encoding="utf-8")
    with pytest.raises(UserError, match="metric boom raised ZeroDivisionError"):
        task(recipe(tmp_path, server.url, tune={"objective": f"{path}:boom"}))
    assert server.asked == []


# -- settings


def test_settings_that_ask_the_same_have_one_key(tmp_path):
    found = task(recipe(tmp_path))
    assert found.key({}) == found.key({"top_p": 0.5}) == found.key({"temperature": 0.0, "seed": 5})
    different = [{"temperature": 0.5}, {"template": "{{ name }}"}, {"system": "s"}, {"args.n": 1}, {"max_tokens": 9}]
    assert len({found.key(params) for params in [{}, *different]}) == 6


def test_questions_may_be_long_unless_the_recipe_says_otherwise(tmp_path):
    found = task(recipe(tmp_path))
    assert found.asked_with({})[2].document_tokens == 4096
    assert found.settings({}, tmp_path) == {"teacher": {"document_tokens": 4096}}
    short = recipe(tmp_path, teacher={"document_tokens": 50})
    assert task(short).asked_with({})[2].document_tokens == 50


def test_the_settings_of_the_best_make_a_recipe_that_asks_the_same(tmp_path):
    params = {
        "template": "{{ name }}?",
        "system": "Think.",
        "temperature": 0.5,
        "args.presence_penalty": 1,
        "chat": False,
    }
    found = task(recipe(tmp_path))
    settings = found.settings(params, tmp_path)
    assert settings["tune"] == {"template": "{{ name }}?", "system": "Think.", "chat": False}
    assert settings["teacher"] == {
        "temperature": 0.5,
        "args": {"presence_penalty": 1},
        "document_tokens": 4096,
    }
    path = tmp_path / "best.yaml"
    path.write_text(json.dumps(merge(json.loads(found.recipe.model_dump_json()), settings)), encoding="utf-8")
    assert task(load_recipe(path, {})).key({}) == found.key(params)


def test_the_stage_finds_the_best_writes_it_down_and_pays_for_nothing_twice(tmp_path, server):
    space = {"temperature": [0.0, 0.5], "top_p": [0.9], "system": [None, "Think."]}
    wanted = recipe(tmp_path, server.url, tune={"search": "grid", "space": space, "workers": 3})
    result = tune.run(wanted)
    assert (result.task, result.objective, result.n_gold, result.n_trials) == ("answers", "exact_match", N, 3)
    assert (result.best["exact_match"], result.is_better, result.best["chosen_on"]) == (1.0, True, 1.0)
    assert result.n_held_out + result.n_chosen_on == N
    n_asked = len(server.asked)
    assert n_asked == result.n_asked <= 4 * N
    best = load_recipe(tmp_path / "run" / "tune" / "best.yaml", {})
    assert (best.tune.template, best.teacher.document_tokens) == (wanted.tune.template, 4096)
    again = Recipe.model_validate(merge(best.model_dump(exclude_unset=True), {"tune": {"space": space}}))
    assert task(again).outcome({}, ALL).value == 1.0
    tune.run(wanted, redo=True)
    assert len(server.asked) <= n_asked + N


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"temperature": -1}, "temperature"),
        ({"system": 3}, "system"),
        ({"chat": "perhaps"}, "chat"),
    ],
)
def test_parameters_that_cannot_be_are_refused(tmp_path, params, told):
    with pytest.raises(UserError, match=told):
        task(recipe(tmp_path)).key(params)


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        ({"reference": "anser"}, "no column 'anser'; there are: name, about, answer"),
        ({"template": "{{ nam }}"}, "no column 'nam'"),
        ({"template": None}, r"tune\.template is not set"),
        ({"template": "Who?"}, "names no column"),
        ({"space": {"template": ["{{ name }}", "Who?"]}}, "names no column"),
        ({"space": {"template": ["{{ name }}", 3]}}, "'3' names no column"),
        ({"space": {"temprature": [0.5]}}, "did you mean temperature"),
        ({"objective": "exact_mach"}, "did you mean exact_match"),
        ({"sample": 19}, "19 rows"),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(tmp_path, tune, told):
    with serve(says) as server, pytest.raises(UserError, match=told):  # type: ignore[arg-type]
        task(recipe(tmp_path, server.url, tune=tune))
    assert server.asked == []


def test_fewer_than_twenty_rows_are_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist(rows(19)), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="19 rows with a value in 'answer' are used; 20 are the least"):
        task(recipe(tmp_path))
