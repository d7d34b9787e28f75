"""A teacher that answers a template is an estimator like any other, and pays for nothing twice."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from endpoint import Asked, Endpoint, Reply, error, says, serve
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

from pipeline import generation
from pipeline.engines import transformers as engine
from pipeline.errors import UserError
from pipeline.generation import Generator, columns, fill, filled

QUESTIONS = [f"What is {a} and {b}?" for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]
ROWS = [{"question": question, "n": i, "of": {"author": f"nr {i}"}} for i, question in enumerate(QUESTIONS)]
TEMPLATE = "{{ question }} ({{n}}, {{ of.author }})"


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    """No model stays loaded."""
    yield
    generation.LOADED.close()


def small(model: Path, **changes: Any) -> Generator:
    """A Generator of a small model on the CPU."""
    settings = {"template": TEMPLATE, "max_tokens": 6, "teacher": {"dtype": "float32", "device": "cpu"}}
    return Generator(model=str(model), **{**settings, **changes})


def remote(server: Endpoint, folder: Path, **changes: Any) -> Generator:
    """A Generator of an endpoint, with an answer store of its own."""
    teacher = {"base_url": server.url, "retries": 0, "concurrency": 4, "timeout_s": 20}
    return Generator("m", engine="openai", teacher=teacher, answers=folder / "answers.sqlite", **changes)


def n_characters(answers: list[str], references: list[Any]) -> list[float]:
    return [float(len(answer)) for answer in answers]


# -- templates


def test_a_value_is_never_searched_for_places():
    assert fill("{{ a }} / {{b}}", {"a": "{{ b }} {b} }}", "b": "{{ a }}"}) == "{{ b }} {b} }} / {{ a }}"


def test_what_is_missing_leaves_its_place_empty():
    assert fill("[{{ a }}{{ b }}]", {"a": None, "b": float("nan")}) == "[]"


def test_a_dot_reaches_into_objects_and_what_is_no_text_is_written_out():
    row = {"a": {"b": "inner"}, "n": np.int64(3), "x": 0.5, "several": ["é", "two"]}
    assert fill("{{ a.b }} {{ n }} {{ x }} {{ several }}", row) == 'inner 3 0.5 ["é", "two"]'


def test_what_pandas_calls_missing_is_missing_and_its_arrays_are_lists():
    table = pd.DataFrame(
        {
            "n": pd.array([1, None], dtype="Int64"),
            "day": pd.to_datetime(["2020-01-01", None]),
            "several": [np.array(["é", "two"]), np.array([], dtype=object)],
        }
    )
    assert filled("{{ n }} {{ day }} {{ several }}", table) == ['1 2020-01-01 00:00:00 ["é", "two"]', "  []"]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("What?", "a single str"),
        (Dataset.from_list(ROWS)[:2], "a single dict"),
        (np.array([["What?"], ["Why?"]]), "of type ndarray"),
        ([["What?"]], "of type list"),
    ],
)
def test_what_is_no_table_is_not_taken_for_one(table, told):
    with pytest.raises(UserError, match=told):
        filled("{{ text }}", table)


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"no column 'answr'; there are: question, of, of\.author"):
        fill("{{ answr }}", {"question": "?", "of": {"author": "me"}})


def test_a_template_names_its_columns_each_once_and_at_least_one():
    assert columns("{{ a }} {{ b.c }} {{a}}") == ["a", "b.c"]
    with pytest.raises(UserError, match="names no column"):
        columns("What is this? {a}")


# -- rows


def test_rows_may_be_dicts_a_data_frame_a_dataset_or_an_array(tiny_causal):
    generator = small(tiny_causal)
    expected = generator.predict(ROWS)
    as_array = np.empty(len(ROWS), dtype=object)
    as_array[:] = ROWS
    for table in (pd.DataFrame(ROWS), Dataset.from_list(ROWS), as_array, tuple(ROWS)):
        assert generator.predict(table).tolist() == expected.tolist()
    assert (expected.shape, expected.dtype) == ((12,), object)
    assert len(set(expected)) > 6


def test_a_row_that_is_a_text_is_the_column_text(tiny_causal):
    generator = small(tiny_causal, template="Q: {{ text }}")
    series = pd.Series(QUESTIONS)
    assert generator.predict(QUESTIONS).tolist() == generator.predict(series).tolist()
    assert generator.predict(QUESTIONS).tolist() == generator.predict([{"text": text} for text in QUESTIONS]).tolist()


def test_no_rows_have_no_answers(tiny_causal):
    assert small(tiny_causal).predict([]).shape == (0,)


def test_an_answer_goes_with_its_row_whatever_stands_around_it(tiny_causal, tmp_path):
    """Asked alone, each into a store of its own, every row gets the answer that it got among all."""
    together = small(tiny_causal, answers=tmp_path / "all.sqlite").predict(ROWS).tolist()
    alone = [small(tiny_causal, answers=tmp_path / f"{i}.sqlite").predict([row])[0] for i, row in enumerate(ROWS)]
    assert together == alone


def test_sampled_answers_are_those_of_the_seed_and_of_the_row_alone(tiny_causal, tmp_path):
    def sampled(name: str, rows: list[dict[str, Any]], seed: int = 0) -> list[str]:
        drawn = small(tiny_causal, temperature=1.0, seed=seed, answers=tmp_path / name)
        return drawn.predict(rows).tolist()

    first = sampled("a", ROWS)
    assert sampled("b", ROWS[::-1])[::-1] == first
    assert sampled("c", ROWS[3:4]) == first[3:4]
    assert sampled("d", ROWS, seed=1) != first


# -- scikit-learn


def test_a_clone_has_the_same_parameters_untouched():
    stop, teacher = ["\n"], {"device": "cpu"}
    generator = Generator("m", stop=stop, teacher=teacher, temperature=0.3, metric=n_characters)
    assert generator.get_params()["stop"] is stop
    assert clone(generator).get_params() == generator.get_params()
    assert Generator("m").set_params(top_p=0.5).get_params()["top_p"] == 0.5
    Generator(model=None, temperature="hot", template=3)  # type: ignore[arg-type]


def test_there_is_nothing_to_fit():
    generator = Generator("m", template="{{ question }}")
    check_is_fitted(generator)
    assert generator.fit(ROWS).columns_ == ["question"]


def test_a_grid_search_finds_the_parameters_that_score_best(tiny_causal):
    search = GridSearchCV(small(tiny_causal, metric=n_characters), {"max_tokens": [1, 8, 3]}, cv=3)
    search.fit(ROWS, QUESTIONS)
    assert search.best_params_ == {"max_tokens": 8}
    assert (np.diff(search.cv_results_["mean_test_score"][[0, 2, 1]]) > 0).all()
    assert search.predict(ROWS[:2]).tolist() == small(tiny_causal, max_tokens=8).predict(ROWS[:2]).tolist()


def test_a_halving_grid_search_takes_a_data_frame(tiny_causal):
    search = HalvingGridSearchCV(
        small(tiny_causal, metric=n_characters), {"max_tokens": [1, 2, 4, 8]}, cv=2, min_resources=4, random_state=0
    )
    search.fit(pd.DataFrame(ROWS), np.array(QUESTIONS))
    assert search.best_params_ == {"max_tokens": 8}


def test_cross_validation_scores_the_parts_as_score_does(tiny_causal):
    generator = small(tiny_causal, metric="chrf")
    right = [[question, "another"] for question in QUESTIONS]
    scores = cross_val_score(generator, ROWS, right, cv=3)
    assert scores.tolist() == pytest.approx([generator.score(ROWS[i : i + 4], right[i : i + 4]) for i in (0, 4, 8)])
    assert 0 < scores.mean() < 1


def test_answers_are_not_judged_by_those_of_other_rows():
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        Generator("m", template=TEMPLATE).score(ROWS, QUESTIONS[:5])


def test_it_may_stand_at_the_end_of_a_pipeline(tiny_causal):
    assert make_pipeline(small(tiny_causal)).fit(ROWS).predict(ROWS[:1]).shape == (1,)


def test_all_clones_share_one_loaded_model_and_its_other_settings_load_none(tiny_causal, monkeypatch, tmp_path):
    generation.LOADED.close()
    loads, load = [], engine.load
    monkeypatch.setattr(engine, "load", lambda *args: loads.append(args) or load(*args))
    search = GridSearchCV(
        small(tiny_causal, metric=n_characters, answers=tmp_path / "answers.sqlite"),
        {"max_tokens": [1, 2], "temperature": [0.0, 0.8], "system": [None, "Be brief."]},
        cv=2,
    )
    search.fit(ROWS, QUESTIONS)
    assert len(loads) == 1


def test_threads_ask_one_model_one_after_the_other(tiny_causal, tmp_path):
    expected = small(tiny_causal).predict(ROWS).tolist()
    found: dict[int, list[str]] = {}

    def predict(i: int) -> None:
        found[i] = small(tiny_causal, answers=tmp_path / f"{i}.sqlite").predict(ROWS).tolist()

    threads = [threading.Thread(target=predict, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == [expected] * 3


# -- settings


def test_the_forced_beginning_is_no_part_of_the_answer(tiny_causal):
    texts = small(tiny_causal, answer_start="The answer is").predict(ROWS)
    assert not any(text.startswith("The answer") for text in texts)
    assert texts.tolist() != small(tiny_causal).predict(ROWS).tolist()


def test_numbers_of_numpy_are_numbers():
    settings = Generator("m", temperature=np.float64(0.5), top_k=np.int64(5), max_tokens=np.int32(7)).settings()
    assert (settings.temperature, settings.top_k, settings.max_tokens) == (0.5, 5, 7)


def test_a_single_stop_text_is_one_text():
    assert Generator("m", stop="END").settings().stop == ("END",)
    assert Generator("m", stop=["a", "b"]).settings().stop == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"temperature": -1}, "Generator: temperature: input should be greater than or equal to 0, got -1"),
        ({"teacher": {"devise": "cpu"}}, "did you mean device"),
        ({"teacher": {"temperature": 1}}, "give temperature=..."),
        ({"metric": "rogueL"}, "did you mean rougeL"),
        ({"template": "What?"}, "names no column"),
        ({"template": 3}, "'3' names no column"),
        ({"system": 3}, "system: 3 is no text"),
        ({"template": "{{ nothing }}"}, "no column 'nothing'"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_fitted(changes, told):
    with pytest.raises(UserError, match=told):
        Generator(**{"model": "m", "template": TEMPLATE, **changes}).fit(ROWS)


def test_parameters_that_ask_the_same_have_one_key():
    generator = Generator("m")
    assert generator.key() == Generator("m", top_p=0.5, metric="chrf", seed=3).key()
    assert generator.key() != Generator("m", temperature=0.5).key()
    assert generator.key() != Generator("m", template="Q: {{ text }}").key()
    assert generator.key() != Generator("m", system="Be brief.").key()


# -- what it costs


def echo(asked: Asked) -> Reply:
    return says(f" {asked.document} \n")


def test_nothing_is_asked_twice(tmp_path):
    with serve(echo) as server:
        rows = ["doc-1", "doc-2", "doc-1"]
        assert remote(server, tmp_path).predict(rows).tolist() == rows
        assert remote(server, tmp_path, metric="chrf").predict([*rows, "doc-3"]).tolist() == [*rows, "doc-3"]
        assert server.attempts() == {"doc-1": 1, "doc-2": 1, "doc-3": 1}


def test_a_request_that_failed_is_no_empty_answer_and_is_all_that_is_asked_again(tmp_path):
    def fails_once(asked: Asked) -> Reply:
        return error(500) if asked.document == "doc-2" and asked.attempt == 1 else echo(asked)

    with serve(fails_once) as server:
        generator = remote(server, tmp_path)
        with pytest.raises(UserError, match="1 of 3 requests failed"):
            generator.predict(["doc-1", "doc-2", "doc-3"])
        assert generator.predict(["doc-1", "doc-2", "doc-3"]).tolist() == ["doc-1", "doc-2", "doc-3"]
        assert server.attempts() == {"doc-1": 1, "doc-2": 2, "doc-3": 1}


def test_a_question_that_does_not_fit_is_not_cut_in_silence(tiny_causal):
    rows = [*ROWS[:2], {**ROWS[2], "question": "why? " * 40}]
    with pytest.raises(UserError, match=r"1 of 3 questions are longer than document_tokens \(30\)"):
        small(tiny_causal, document_tokens=30).predict(rows)
    with pytest.raises(UserError, match=r"or than what max_tokens \(1990\) leaves in the model"):
        small(tiny_causal, max_tokens=1990, args={"max_new_tokens": 1}).predict(rows)


def test_it_works_where_an_event_loop_runs_as_in_a_notebook(tmp_path):
    async def cell() -> list[str]:
        with serve(echo) as server:
            return remote(server, tmp_path).predict(["doc-1"]).tolist()

    assert asyncio.run(cell()) == ["doc-1"]


def test_what_a_teacher_said_can_be_looked_at(tmp_path):
    with serve(lambda asked: says("so far", finish="length")) as server:
        (answer,) = remote(server, tmp_path).asked(["doc-1"])
    assert (answer.finish, answer.text, answer.prompt_tokens, answer.answer_tokens) == ("length", "so far", 100, 7)
