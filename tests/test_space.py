"""Search spaces: what people write, as what Optuna takes and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import stats

from pipeline import space
from pipeline.errors import UserError

TUNABLE = ["temperature", "top_p", "document_tokens", "prompt", "examples", "stop", "calibrate", "args."]


def read(**values: Any) -> dict[str, Any]:
    return space.read(values, TUNABLE)


def refused(**values: Any) -> str:
    with pytest.raises(UserError) as error:
        read(**values)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_lists_are_choices_and_ranges_are_ranges() -> None:
    assert read(
        prompt=["a.md", "b.md"],
        temperature={"low": 0, "high": 1.5},
        top_p={"low": 0.5, "high": 1, "step": 0.1},
        document_tokens={"low": 256, "high": 4096, "log": True},
        examples={"low": 0, "high": 8, "step": 2},
    ) == {
        "prompt": CategoricalDistribution(["a.md", "b.md"]),
        "temperature": FloatDistribution(0, 1.5),
        "top_p": FloatDistribution(0.5, 1.0, step=0.1),
        "document_tokens": IntDistribution(256, 4096, log=True),
        "examples": IntDistribution(0, 8, step=2),
    }


def test_one_value_is_fixed() -> None:
    assert read(temperature=0.7) == {"temperature": CategoricalDistribution([0.7])}


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.25, "", "text", ["\n", "###"], [], {"a": [1, None]}, "[INST]", "[1]", '{"a": 1}', '"x"']
)
def test_every_value_comes_back_as_it_was_written(value: Any) -> None:
    (stored,) = read(stop=[value])["stop"].choices
    assert stored is None or isinstance(stored, str | int | float)
    assert space.decoded({"stop": stored}) == {"stop": value}


def test_what_python_callers_give_is_read_as_yaml_would_be() -> None:
    found = read(temperature=np.linspace(0, 1, 3), prompt=(Path("a.md"),), examples=range(3), stop=[("a", "b")])
    assert [each.choices for each in found.values()] == [(0.0, 0.5, 1.0), ("a.md",), (0, 1, 2), ('["a", "b"]',)]


def test_a_choice_that_is_given_twice_is_one() -> None:
    assert read(temperature=[0, 0.5, 0.0, 0.5])["temperature"].choices == (0, 0.5)


def test_a_range_whose_steps_do_not_reach_its_end_stops_before_it() -> None:
    found = read(examples={"low": 0, "high": 5, "step": 2}, top_p={"low": 0.1, "high": 0.75, "step": 0.2})
    assert (found["examples"].high, found["top_p"].high) == (4, 0.7)


def test_a_family_of_settings_takes_any_name() -> None:
    assert list(read(**{"args.anything": [1, 2]})) == ["args.anything"]


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    assert refused(temprature=[0, 1]) == "tune.space.temprature cannot be tuned; did you mean temperature?"
    assert "there are: temperature, top_p" in refused(zzz=[0, 1])
    assert "write args.NAME" in refused(args={"top_k": [1]})


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([], "empty list"),
        ({"low": 1, "high": 1}, "low 1 is not below high 1"),
        ({"low": 2.0, "high": 1.0}, "low 2.0 is not below high 1.0"),
        ({"low": 0, "high": 1.0, "log": True}, "low must be above 0"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, "there is no step"),
        ({"low": 0.0, "high": 1.0, "step": 0}, "step 0 must be above 0"),
        ({"low": 0.0, "high": 1.0, "step": 2}, "at most high - low"),
        ({"low": float("nan"), "high": 1}, "low is nan"),
        ({"low": "1e-5", "high": 1}, "YAML needs 1.0e-5"),
        ({"low": 0, "high": True}, "high is True"),
        ({"low": 0.0, "high": 1.0, "log": 1}, "log is 1"),
        ({"low": 0}, "a range is {low: 0.0, high: 1.0}"),
        ({"low": 0, "high": 9, "steps": 3}, "a range is {low: 0.0, high: 1.0}"),
        ({"low": 0, "high": 1}, "give [0, 1] for these two, or {low: 0.0, high: 1.0} for fractions"),
        ([0.5, float("nan")], "nan is no value"),
        ([float("inf")], "inf is no value"),
        ([[float("nan")]], "[nan] is no value"),
        ([{1, 2}], "{1, 2} is no value"),
        ([True, 1], "mean the same"),
        ([0, False], "mean the same"),
        (stats.uniform(0, 1), "a distribution of scipy"),
    ],
)
def test_a_space_that_cannot_be_is_one_line(values: Any, why: str) -> None:
    assert "tune.space.temperature" in refused(temperature=values)
    assert why in refused(temperature=values)


def test_an_empty_space_is_refused() -> None:
    assert "tune.space is empty" in refused()


def test_true_and_a_number_that_is_not_1_may_be_in_one_list() -> None:
    assert read(calibrate=[True, False, 2])["calibrate"].choices == (True, False, 2)


def test_a_step_of_a_range_is_the_number_that_was_written() -> None:
    assert space.decoded({"top_p": 0.1 + 2 * 0.1}) == {"top_p": 0.3}
    assert space.decoded({"top_p": 1 / 3}) == {"top_p": 1 / 3}


def test_a_grid_has_every_combination() -> None:
    found = read(top_p={"low": 0.1, "high": 0.5, "step": 0.1}, examples={"low": 0, "high": 4, "step": 2}, stop=[None])
    assert space.grid(found) == 15
    assert space.grid_values(found)["top_p"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert space.grid_values(found)["examples"] == [0, 2, 4]


def test_a_grid_needs_steps_and_an_end() -> None:
    endless = read(temperature={"low": 0.0, "high": 1.0})
    assert space.grid(endless) is None
    with pytest.raises(UserError, match=r"tune.space.temperature: a grid over a range needs a step"):
        space.grid_values(endless)
    with pytest.raises(UserError, match="a grid of 1,000,001 combinations"):
        space.grid_values(read(document_tokens={"low": 1, "high": 1_000_001}))
