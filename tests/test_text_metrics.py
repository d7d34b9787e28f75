"""Answers are compared with right ones as the metrics' sources define it, and a metric that fails says why."""

import importlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, fbeta_score, hamming_loss, precision_score, zero_one_loss

from pipeline import text_metrics
from pipeline.errors import UserError
from pipeline.text_metrics import compared, metric, score, values
from pipeline.trials import Failed

ANSWERS = ["The cat sat on the mat.", "no", "Paris is in France"]
RIGHT = ["the cat lay on the mat", "yes", "Paris lies in France"]


def rows(name: Any, answers: list[str] = ANSWERS, right: list[Any] = RIGHT) -> list[float]:
    return values(metric(name), answers, right).tolist()


def test_exact_match_heeds_neither_case_nor_spacing_but_everything_else():
    found = rows("exact_match", [" Yes\n", "a  B", "yes.", "", "nein"], ["yes", "A b", "yes", "", "no"])
    assert found == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_rouge_is_the_f_measure_over_words():
    """Five of six words in common; four of five in the longest common subsequence of the third row."""
    assert rows("rouge1") == pytest.approx([5 / 6, 0, 3 / 4])
    assert rows("rouge2") == pytest.approx([3 / 5, 0, 1 / 3])
    assert rows("rougeL") == pytest.approx([5 / 6, 0, 3 / 4])


def test_rouge_on_english_is_that_of_the_package_itself():
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for kind in scorer.rouge_types:
        theirs = [scorer.score(right, answer)[kind].fmeasure for answer, right in zip(ANSWERS, RIGHT, strict=True)]
        assert rows(kind) == pytest.approx(theirs)


def test_rouge_reads_words_of_any_alphabet():
    assert rows("rouge1", ["Œuvre complète", "Где кошка?"], ["œuvre COMPLÈTE", "где собака"]) == [1.0, 0.5]


def test_bleu_and_chrf_are_one_for_the_right_text_and_defined_for_a_single_word():
    for name in ("bleu", "chrf"):
        same, different, one_word = rows(name, [RIGHT[0], "xyz", "Paris"], [RIGHT[0], "abc", "Paris"])
        assert (same, one_word) == (pytest.approx(1.0), pytest.approx(1.0))
        assert different == pytest.approx(0.0, abs=1e-6)
    assert 0 < rows("bleu")[0] < 1


@pytest.mark.parametrize("name", ["exact_match", "rouge1", "rougeL", "bleu", "chrf"])
def test_of_several_right_answers_the_closest_counts(name):
    assert rows(name, ["Paris is here"], [["London was there", "Paris is here"]]) == [pytest.approx(1.0)]


@pytest.mark.parametrize("name", ["exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"])
def test_an_empty_answer_has_a_value_and_it_is_zero(name):
    assert rows(name, [""], ["something right"]) == [0.0]


@pytest.mark.parametrize("reference", [None, float("nan"), [], [None]])
def test_a_row_without_a_right_answer_is_no_poor_answer(reference):
    with pytest.raises(Failed, match="a row has no right answer"):
        rows("exact_match", ["a", "b"], ["a", reference])


# -- metrics of sklearn


def test_a_metric_of_sklearn_has_one_value_for_all_and_its_average_is_macro():
    answers, right = ["a ", "a", "b", "c"], ["a", "b", "b", "b"]
    assert score(metric("accuracy_score"), answers, right) == 0.5
    f1_of = {"a": 2 / 3, "b": 0.5, "c": 0.0}
    assert score(metric("f1_score"), answers, right) == pytest.approx(np.mean(list(f1_of.values())))
    assert values(metric("f1_score"), answers, right).shape == ()


def test_a_function_of_sklearn_itself_gets_the_right_labels_first():
    answers, right = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
    macro_precision = np.mean([2 / 3, 1.0])
    assert score(metric(precision_score), answers, right) == pytest.approx(macro_precision)
    assert score(metric(accuracy_score), answers, right) == 0.75


def test_arguments_given_to_a_function_of_sklearn_have_the_last_word():
    answers, right = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
    twice = partial(fbeta_score, beta=2, average="macro")
    found = metric(twice)
    assert (found.name, score(found, answers, right)) == ("fbeta_score", pytest.approx(twice(right, answers)))
    assert score(metric(partial(f1_score, average="micro")), answers, right) == 0.75


@pytest.mark.parametrize("right", [[1, 0, 0], np.array([1, 0, 0]), [[1, 2], 0, [0]]])
def test_a_written_number_is_the_right_label_that_is_this_number(right):
    assert score(metric("accuracy_score"), ["1", " 0", "2"], right) == pytest.approx(2 / 3)


@pytest.mark.parametrize("given", ["hamming_loss", hamming_loss, partial(zero_one_loss, normalize=False)])
def test_a_metric_that_is_better_the_smaller_is_refused_however_it_is_given(given):
    with pytest.raises(UserError, match="the better the smaller"):
        metric(given)


def test_of_several_right_labels_the_given_one_counts():
    assert score(metric("accuracy_score"), ["b", "c"], [["a", "b"], ["a", "b"]]) == 0.5


def test_free_texts_bring_no_warnings_from_sklearn():
    answers, right = [f"answer {i}" for i in range(40)], [f"right {i % 3}" for i in range(40)]
    assert score(metric("balanced_accuracy_score"), answers, right) == 0.0
    assert score(metric("f1_score"), answers, right) == 0.0


# -- functions, files, evaluate


def test_a_function_gives_a_value_for_each_row_or_one_for_all():
    def lengths(answers: list[str], right: list[str]) -> list[float]:
        return [len(answer) / len(known) for answer, known in zip(answers, right, strict=True)]

    assert score(metric(lengths), ["ab", "abcd"], ["abcd", "abcd"]) == 0.75
    assert metric(lengths).name == "lengths"
    assert score(metric(lambda answers, right: len(answers)), ["ab", "abcd"], ["", ""]) == 2.0


def test_what_is_neither_a_name_nor_a_function_is_refused():
    with pytest.raises(UserError, match="metric None is neither a name nor a function"):
        metric(None)  # type: ignore[arg-type]


def test_a_function_is_found_in_a_file(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def same_length(answers, right):\n    return [float(len(a) == len(b)) for a, b in zip(answers, right)]\n"
    )
    found = metric(f"{path}:same_length")
    assert (found.name, score(found, ["ab", "c"], ["xy", "xyz"])) == ("same_length", 0.5)


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        ("x = 1\n", "absent", "no function absent"),
        ("x = 1\n", "x", "no function x"),
        ("import no_such_module\n", "f", "ModuleNotFoundError"),
        ("def f(:\n", "f", "SyntaxError"),
        (None, "f", "there is no file"),
    ],
)
def test_a_file_that_holds_no_metric_is_refused_in_one_line(tmp_path, content, name, told):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        metric(f"{path}:{name}")
    assert "\n" not in str(caught.value)


def stand_in(found: dict[str, Any]) -> SimpleNamespace:
    """What `evaluate` offers: load(name).compute(predictions, references)."""
    compute = lambda predictions, references: {**found, "n": [len(predictions), len(references)]}  # noqa: E731
    return SimpleNamespace(load=lambda name: SimpleNamespace(compute=compute))


def test_a_metric_of_evaluate_gives_its_number(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", stand_in({"bleu": 0.25, "length": 3}))
    assert score(metric("evaluate:bleu"), ANSWERS, RIGHT) == 0.25
    monkeypatch.setitem(sys.modules, "evaluate", stand_in({"score": 7.5}))
    assert score(metric("evaluate:sacrebleu"), ANSWERS, RIGHT) == 7.5


def test_which_number_of_evaluate_is_meant_can_be_named_and_must_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", stand_in({"rouge1": 0.5, "rougeL": 0.4}))
    assert metric("evaluate:rouge:rougeL").name == "rougeL"
    assert score(metric("evaluate:rouge:rougeL"), ANSWERS, RIGHT) == 0.4
    with pytest.raises(Failed, match="it gives rouge1, rougeL; write evaluate:rouge:rouge1"):
        score(metric("evaluate:rouge"), ANSWERS, RIGHT)


def test_a_metric_of_evaluate_that_cannot_be_loaded_is_one_line(monkeypatch):
    def load(name: str) -> None:
        raise FileNotFoundError(f"no module script\nfor {name}")

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load))
    with pytest.raises(UserError, match=r"^metric evaluate:blue cannot be loaded \(.*: no module script for blue\)$"):
        metric("evaluate:blue")


def test_without_the_package_evaluate_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(UserError, match="pip install evaluate"):
        metric("evaluate:bleu")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rougel", "did you mean rougeL?"),
        ("acuracy_score", "did you mean accuracy_score?"),
        ("roc_auc_score", "no metric is called"),
        ("qqqq", "give exact_match, rouge1"),
    ],
)
def test_an_unknown_metric_is_refused_with_the_nearest_name(name, told):
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        metric(name)


# -- failures


def divides_by_zero(answers: list[str], right: list[str]) -> float:
    return len(answers) / 0


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (divides_by_zero, "divides_by_zero raised ZeroDivisionError: division by zero"),
        (lambda answers, right: float("nan"), "gave nan"),
        (lambda answers, right: [1.0, float("inf"), 0.0], "gave inf"),
        (lambda answers, right: [1.0, 0.0], r"gave \(2,\) values for 3 rows"),
        (lambda answers, right: "good", "raised ValueError"),
    ],
)
def test_a_metric_that_raises_or_has_no_number_fails_with_the_reason(function, told):
    with pytest.raises(Failed, match=told):
        score(metric(function), ANSWERS, RIGHT)


# -- two sets of answers


def test_the_gain_is_paired_so_answers_that_always_beat_others_surely_gain():
    """Each row is better by exactly 0.1, however much rows differ: the interval of the gain has no width."""
    levels = np.random.default_rng(0).uniform(0, 0.8, 30)

    def level(answers: list[str], right: list[str]) -> list[float]:
        return [
            levels[int(known)] + (0.1 if answer == "better" else 0.0)
            for answer, known in zip(answers, right, strict=True)
        ]

    right = [str(i) for i in range(30)]
    found = compared(metric(level), ["better"] * 30, ["worse"] * 30, right)
    assert (found.gain, found.gain_interval) == (pytest.approx(0.1), pytest.approx((0.1, 0.1)))
    low, high = found.best["level_interval"]
    assert low < found.best["level"] < high
    assert found.default["level"] == pytest.approx(levels.mean())


def test_equal_answers_gain_nothing():
    found = compared(metric("exact_match"), ["a", "b", "c"], ["a", "b", "c"], ["a", "b", "x"])
    assert (found.gain, found.gain_interval, found.best) == (0.0, (0.0, 0.0), found.default)


def test_a_metric_with_one_value_is_resampled_by_calling_it_and_agrees_with_its_rows():
    right = [str(i % 3) for i in range(60)]
    answers = [str(i % 2) for i in range(60)]
    once = compared(metric("accuracy_score"), right, answers, right)
    by_row = compared(metric("exact_match"), right, answers, right)
    assert once.gain == by_row.gain
    assert once.gain_interval == pytest.approx(by_row.gain_interval, abs=0.05)


def test_a_metric_with_one_value_is_called_at_most_a_few_hundred_times():
    calls = []

    def counted(answers: list[str], right: list[str]) -> float:
        calls.append(len(answers))
        return float(len(set(answers)))

    compared(metric(counted), ["a", "b", "c"], ["a", "a", "a"], ["x", "x", "x"])
    assert len(calls) == 2 + 2 * text_metrics.N_RESAMPLES[0]


def test_resamples_where_a_metric_has_no_value_are_left_out():
    def undefined_without_a(answers: list[str], right: list[str]) -> float:
        return answers.count("b") / answers.count("a")

    found = compared(metric(undefined_without_a), ["a", "b"] * 4, ["a", "b"] * 4, ["x"] * 8)
    assert found.gain_interval == (0.0, 0.0)
    assert found.best["undefined_without_a_interval"][0] < 1.0 < found.best["undefined_without_a_interval"][1]
