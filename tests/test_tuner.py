"""A search over any estimator's parameters tells what they are worth on rows it did not choose them on."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from endpoint import Asked, Endpoint, Reply, error, says, serve
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import make_classification
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from pipeline.errors import UserError
from pipeline.generation import Generator
from pipeline.text_metrics import metric
from pipeline.tuner import Rows, Tuner, parts, taken

N = 60
ROWS = [f"doc-{i}" for i in range(N)]
RIGHT = [f"answer {i}" for i in range(N)]


class Rule(BaseEstimator):
    """Gives the right answer to a share of the rows, with nothing to learn."""

    def __init__(self, share: float = 0.3, manner: str = "plain") -> None:
        self.share = share
        self.manner = manner

    def fit(self, rows: Any, y: Any = None) -> "Rule":
        return self

    def predict(self, rows: Any) -> np.ndarray:
        if self.manner == "broken":
            raise ValueError("no such manner")
        numbers = [int(row.removeprefix("doc-")) for row in rows]
        known = [(i * 37 % 100) / 100 < self.share for i in numbers]
        return np.array([f"answer {i}" if is_known else "?" for i, is_known in zip(numbers, known, strict=True)])


def tuner(estimator: Any = None, space: dict[str, Any] | None = None, **changes: Any) -> Tuner:
    settings = {"metric": "exact_match", "search": "grid", "trials": 20}
    return Tuner(estimator or Rule(), space or {"share": [0.2, 0.9, 0.5]}, **{**settings, **changes})


def test_the_best_parameters_are_found_and_judged_on_rows_held_out():
    found = tuner().fit(ROWS, RIGHT)
    assert found.best_params_ == {"share": 0.9}
    assert found.best_score_ > found.default_score_
    assert found.held_out_["gain"] > 0.3
    assert found.held_out_["gain_interval"][0] > 0
    assert found.held_out_["best"]["exact_match_interval"][0] < found.held_out_["best"]["exact_match"]
    assert found.sentence_.startswith("Better than the default: exact_match")
    assert found.predict(ROWS[:1]).tolist() == Rule(share=0.9).predict(ROWS[:1]).tolist()
    assert found.score(ROWS, RIGHT) == pytest.approx(0.9, abs=0.05)
    assert [trial.number for trial in found.trials_] == [-1, 0, 1, 2]


def test_a_gain_that_chance_could_make_is_called_no_better():
    found = tuner(Rule(share=0.5), {"share": [0.45, 0.52, 0.55]}).fit(ROWS, RIGHT)
    low, high = found.held_out_["gain_interval"]
    assert low <= 0 <= high
    assert found.sentence_.startswith("No better than the default")


def test_where_nothing_is_better_the_defaults_are_the_best():
    found = tuner(Rule(share=1.0)).fit(ROWS, RIGHT)
    assert (found.best_params_, found.held_out_["gain"]) == ({}, 0.0)
    assert found.sentence_ == "No better than the default: nothing that was tried beats it."


def test_the_figures_held_out_are_of_other_rows_than_the_search_saw():
    seen: list[set[str]] = []

    class Watched(Rule):
        def predict(self, rows: Any) -> np.ndarray:
            seen.append(set(rows))
            return super().predict(rows)

    Tuner(Watched(), {"share": [0.2, 0.9]}, "exact_match", "grid", held_out_share=0.25).fit(ROWS, RIGHT)
    best, default = seen[-2:]
    chosen_on = set().union(*seen[:-2])
    assert best == default
    assert (len(best), len(chosen_on)) == (15, 45)
    assert best | chosen_on == set(ROWS)


def test_an_estimator_that_learns_is_never_judged_on_what_it_learned_from():
    """With labels at random, one neighbour knows its own row by heart: right on it, at chance on others."""
    rows, _ = make_classification(120, random_state=0)
    labels = np.random.default_rng(0).integers(0, 2, 120)
    found = Tuner(KNeighborsClassifier(15), {"n_neighbors": [1, 5]}, search="grid").fit(rows, labels)
    assert all(trial.value is not None and trial.value < 0.75 for trial in found.trials_)
    assert found.held_out_["best"]["accuracy_score"] < 0.75
    assert found.score(rows, labels) > found.best_score_


def test_classifiers_and_regressors_have_metrics_of_their_own():
    rows, classes = make_classification(60, random_state=0)
    assert (
        "r2_score"
        in Tuner(KNeighborsRegressor(), {"n_neighbors": [3]}, search="grid").fit(rows, rows[:, 0]).held_out_["best"]
    )
    table = pd.DataFrame(rows, columns=[f"x{i}" for i in range(rows.shape[1])])
    assert Tuner(KNeighborsClassifier(), {"n_neighbors": [3]}, search="grid").fit(table, classes).best_score_ > 0.6
    with pytest.raises(UserError, match="Rule has no metric of its own"):
        Tuner(Rule(), {"share": [0.1]}).fit(ROWS, RIGHT)


def test_parameters_that_raise_are_a_failed_trial_and_the_search_goes_on():
    found = tuner(space={"manner": ["broken", "plain"], "share": [0.9]}).fit(ROWS, RIGHT)
    failed = [trial for trial in found.trials_ if trial.state == "failed"]
    assert [(trial.params["manner"], trial.reason) for trial in failed] == [("broken", "Rule: no such manner")]
    assert found.best_params_["manner"] == "plain"


def test_a_metric_that_raises_for_some_answers_fails_those_trials_alone():
    def moody(answers: list[Any], right: list[Any]) -> list[float]:
        if sum(answer == "?" for answer in answers) < 10:
            raise RuntimeError("too good")
        return [float(answer == known) for answer, known in zip(answers, right, strict=True)]

    found = tuner(metric=moody).fit(ROWS, RIGHT)
    assert found.best_params_ == {"share": 0.5}
    assert [trial.reason for trial in found.trials_ if trial.reason] == ["metric moody raised RuntimeError: too good"]


def test_a_search_goes_on_where_its_storage_ended(tmp_path):
    storage = tmp_path / "study.sqlite"
    first = tuner(storage=storage, search="random", trials=3, space={"share": {"low": 0.0, "high": 1.0}})
    second = clone(first).set_params(trials=5)
    first.fit(ROWS, RIGHT)
    second.fit(ROWS, RIGHT)
    assert [trial.params for trial in second.trials_[:4]] == [trial.params for trial in first.trials_]
    assert len(second.trials_) == 6


def test_halving_judges_poor_parameters_on_few_rows():
    n_asked: dict[float, int] = {}

    class Counted(Rule):
        def predict(self, rows: Any) -> np.ndarray:
            n_asked[self.share] = n_asked.get(self.share, 0) + len(rows)
            return super().predict(rows)

    rows, right = ([f"{name}{i}" for i in range(400)] for name in ("doc-", "answer "))
    space = {"share": [0.1, 0.15, 0.2, 0.25, 0.35, 0.4, 0.95, 0.45]}
    found = Tuner(Counted(), space, "exact_match", "grid", halving=True).fit(rows, right)
    assert found.best_params_ == {"share": 0.95}
    assert "pruned" in {trial.state for trial in found.trials_}
    assert min(n_asked[share] for share in space["share"]) < n_asked[0.95] / 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"space": {"shar": [0.1]}}, "did you mean share"),
        ({"space": {}}, "empty"),
        ({"search": "bayes"}, "Tuner: search: input should be 'tpe', 'random' or 'grid', got 'bayes'"),
        ({"held_out_share": 1.0}, "Tuner: held_out_share"),
        ({"held_out_share": 0.05}, "held_out_share 0.05 makes of 60 rows 57 to choose on and 3 held out; 5 each"),
        ({"metric": "exact_mach"}, "did you mean exact_match"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, told):
    with pytest.raises(UserError, match=told):
        clone(tuner()).set_params(**changes).fit(ROWS, RIGHT)


def test_rows_are_taken_from_any_table_in_its_own_kind():
    rows = [{"a": i} for i in range(5)]
    frame, dataset, array = pd.DataFrame(rows), Dataset.from_list(rows), np.arange(5)
    positions = np.array([3, 1])
    assert taken(rows, positions) == list(taken(dataset, positions)) == [{"a": 3}, {"a": 1}]
    assert taken(frame, positions)["a"].tolist() == taken(array, positions).tolist() == [3, 1]


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match="19 rows; give at least 20"):
        tuner().fit(ROWS[:19], RIGHT[:19])


def test_rows_without_an_answer_or_answers_without_a_row_are_refused():
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[60, 59\]"):
        tuner().fit(ROWS, RIGHT[:59])


def test_before_it_is_fitted_there_is_no_best():
    with pytest.raises(NotFittedError):
        tuner().predict(ROWS)


def test_rare_classes_are_chosen_on_and_held_out_alike():
    labels = np.array(["rare"] * 10 + ["common"] * 90)
    task = Rows(KNeighborsClassifier(), np.zeros((100, 1)), labels.tolist(), metric("accuracy_score"))
    for seed in range(5):
        chosen_on, held_out = parts(task, 0.4, seed)
        assert [(labels[side] == "rare").sum() for side in (chosen_on, held_out)] == [6, 4]
        assert sorted([*chosen_on, *held_out]) == list(range(100))


def test_rows_that_ask_the_same_are_never_chosen_on_and_held_out_at_once():
    rows = [{"question": f"doc-{i % 30}", "other": i} for i in range(60)]
    task = Rows(Generator("m", template="{{ question }}"), rows, RIGHT, metric("exact_match"))
    chosen_on, held_out = parts(task, 0.4, 0)
    asked = [{rows[i]["question"] for i in side} for side in (chosen_on, held_out)]
    assert not asked[0] & asked[1]
    assert len(chosen_on) + len(held_out) == 60


# -- generators


def remote(server: Endpoint, folder: Path, **changes: Any) -> Generator:
    """A Generator of an endpoint, with an answer store of its own."""
    teacher = {"base_url": server.url, "retries": 0, "concurrency": 8, "timeout_s": 20}
    return Generator("m", engine="openai", teacher=teacher, answers=folder / "answers.sqlite", **changes)


def better_when_cool(asked: Asked) -> Reply:
    """Right about a share of the documents that falls with the temperature."""
    number = int(asked.document.removeprefix("doc-"))
    known = (number * 37 % 100) / 100 < 0.95 - 0.5 * asked.body.get("temperature", 0)
    return says(f"answer {number}" if known else "?")


def test_a_generator_is_tuned_in_a_few_lines(tmp_path):
    with serve(better_when_cool) as server:
        generator = remote(server, tmp_path, temperature=1.0)
        found = Tuner(generator, {"temperature": [0.4, 0.7], "top_p": {"low": 0.5, "high": 1}}, trials=4).fit(
            ROWS, RIGHT
        )
    assert found.best_params_ == {"temperature": 0.0}
    assert found.held_out_["gain"] > 0.2


def test_greedy_decoding_is_tried_where_the_estimator_samples_and_once_is_enough(tmp_path):
    def greedy(found: Tuner) -> list[Any]:
        return [trial for trial in found.trials_ if {**own.get_params(), **trial.params}["temperature"] == 0]

    with serve(better_when_cool) as server:
        own = remote(server, tmp_path, temperature=0.7)
        assert len(greedy(Tuner(own, {"temperature": [0.4]}, search="grid").fit(ROWS, RIGHT))) == 1
        assert len(greedy(Tuner(own, {"temperature": [0.4, 0.0]}, search="grid").fit(ROWS, RIGHT))) == 1
        own = remote(server, tmp_path)
        assert len(greedy(Tuner(own, {"temperature": [0.4]}, search="grid").fit(ROWS, RIGHT))) == 1


def test_parameters_that_ask_the_same_are_one_trial_and_nothing_is_paid_for_twice(tmp_path):
    with serve(better_when_cool) as server:
        own = remote(server, tmp_path)
        space = {"temperature": [0.0], "top_p": [0.5, 0.9], "max_tokens": [256, 8]}
        found = Tuner(own, space, search="grid").fit(ROWS, RIGHT)
        assert [trial.params.get("max_tokens") for trial in found.trials_] == [None, 8]
        n_asked = len(server.asked)
        assert n_asked <= 2 * N
        Tuner(own, space, search="random", held_out_share=0.2).fit(ROWS, RIGHT)
        assert len(server.asked) <= 2 * N


def test_an_endpoint_that_is_down_stops_the_search_with_its_line(tmp_path):
    with (
        serve(lambda asked: error(500)) as server,
        pytest.raises(UserError, match=r"has no answer for \d+ documents in a row"),
    ):
        Tuner(remote(server, tmp_path), {"temperature": [0.4]}, search="grid").fit(ROWS, RIGHT)
