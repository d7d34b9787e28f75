"""What the parameters of a search mean: a prompt and a teacher, which are the same, and what a recipe then says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_prompts import asking, choosing

from pipeline import prompts
from pipeline.candidates import TUNABLE, Candidate, candidate, key, settings, with_line
from pipeline.config import Recipe, merge
from pipeline.errors import UserError
from pipeline.few_shot import Pool
from pipeline.prompts import Line, Prompt
from pipeline.reading import read_choices

POOL = Pool([(f"text {n}", n / 4) for n in range(20)], (0, 4.75))
WRITES = """---
scale: [0, 5]
read: generate
---
Rate it.

{{ text }}
"""
CHOOSES = """---
read: choices
answer_start: This text is
choices:
- {value: 5, answers: [" good"]}
- {value: 0, answers: [" bad"]}
line: {offset: 1, slope: 2}
---
What is it?

{{ text }}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "writes.md").write_text(WRITES, encoding="utf-8")
    (tmp_path / "chooses.md").write_text(CHOOSES, encoding="utf-8")
    return tmp_path


def recipe(folder: Path, name: str = "chooses.md", rate: dict[str, Any] | None = None, **teacher: Any) -> Recipe:
    rate = {"prompt": folder / name, **(rate or {})}
    return Recipe.model_validate({"rate": rate, "teacher": {"model": "m", **teacher}})


def made(recipe: Recipe, **params: Any) -> Candidate:
    """The candidate of these parameters; a double underscore stands for a dot."""
    return candidate(recipe, {name.replace("__", "."): each for name, each in params.items()}, POOL, prompts.load)


def refused(recipe: Recipe, **params: Any) -> str:
    with pytest.raises(UserError) as stop:
        made(recipe, **params)
    assert "\n" not in str(stop.value)
    return str(stop.value)


# -- what they mean


def test_without_parameters_it_is_the_recipe(folder: Path):
    r = recipe(folder, rate={"calibrate": True}, temperature=0.5)
    found = made(r)
    assert found.prompt == prompts.load(folder / "chooses.md")
    assert found.teacher == r.teacher
    assert found.calibrate
    assert settings(found, r, folder / "tune") == {}
    assert not (folder / "tune").exists()


def test_settings_of_the_teacher_are_laid_over_and_arguments_added(folder: Path):
    r = recipe(folder, "writes.md", args={"num_beams": 2}, max_tokens=9)
    found = made(r, temperature=0.7, top_p=0.9, stop=["END"], args__length_penalty=2, chat_template_args__think=False)
    assert (found.teacher.temperature, found.teacher.top_p, found.teacher.stop) == (0.7, 0.9, ("END",))
    assert found.teacher.max_tokens == 9
    assert found.teacher.args == {"num_beams": 2, "length_penalty": 2}
    assert found.teacher.chat_template_args == {"think": False}


def test_another_model_leaves_behind_what_is_only_good_for_the_first(folder: Path):
    r = recipe(folder, revision="abc", usd_per_million_prompt_tokens=3, document_tokens=99)
    found = made(r, model="other")
    assert (found.teacher.revision, found.teacher.usd_per_million_prompt_tokens) == (None, None)
    assert found.teacher.document_tokens == 99
    assert made(r, model="m").teacher == r.teacher


def test_a_prompt_is_a_file_and_its_settings_can_be_changed(folder: Path):
    found = made(recipe(folder), prompt=str(folder / "writes.md"), prompt__chat=False, prompt__system="Be fair.")
    assert (found.prompt.name, found.prompt.chat, found.prompt.system) == ("writes", False, "Be fair.")
    assert found.prompt.read == "generate"


def test_the_way_of_reading_can_be_changed(folder: Path):
    scales = {"a": [0, 5], "b": [1, 10]}
    r = recipe(folder, "writes.md")
    assert made(r, prompt__read="json", prompt__attributes=scales).prompt.scale == (0, 5)
    assert made(r, prompt__read="json", prompt__attributes=scales, prompt__main="b").prompt.scale == (1, 10)


def test_examples_come_from_the_pool_and_are_cut_as_the_recipe_says(folder: Path):
    r = recipe(folder).model_copy(update={"tune": Recipe().tune.model_copy(update={"example_characters": 5})})
    found = made(r, examples=4, examples_draw=2)
    assert len(found.prompt.examples) == 4
    assert all(example.text == "text […]" for example in found.prompt.examples)
    assert sorted(example.answer for example in found.prompt.examples) == [" bad", " bad", " good", " good"]


def test_the_files_own_examples_stay_until_others_are_asked_for(folder: Path):
    own = CHOOSES.replace("line:", "examples: [{text: mine, answer: ' good'}]\nline:")
    (folder / "own.md").write_text(own, encoding="utf-8")
    r = recipe(folder, "own.md")
    assert [example.text for example in made(r).prompt.examples] == ["mine"]
    assert made(r, examples=0).prompt.examples == ()
    assert len(made(r, examples=3).prompt.examples) == 3


def test_calibration_is_only_meant_where_it_has_an_effect(folder: Path):
    r = recipe(folder)
    assert made(r, calibrate=True).calibrate
    assert not made(r, calibrate=True, prompt=str(folder / "writes.md")).calibrate
    assert not made(r, calibrate=True, prompt__line=None, prompt__normalise=False).calibrate


REFUSED = [
    ({"temperature": -1}, "temperature: input should be greater than or equal to 0, got -1"),
    ({"top_p": 1.5}, "top_p: input should be less than or equal to 1, got 1.5"),
    ({"max_tokens": 2.5}, "max_tokens: input should be a valid integer"),
    ({"prompt__read": "guess"}, "prompt.read: Input should be 'generate', 'choices', 'json' or 'label', got 'guess'"),
    (
        {"prompt__scale": [5, 0], "prompt__chat": False},
        "prompt.scale [5, 0], prompt.chat False: scale [5.0, 0.0] must",
    ),
    ({"prompt__pattern": "x", "prompt__read": "generate"}, "pattern 'x' has no {number} (prompt chooses)"),
    ({"examples": 21}, "examples: 21 are asked for, 20 documents are set aside for them"),
    ({"examples": 1.5}, "examples: give a whole number from 0 up, not 1.5"),
    ({"examples": True}, "examples: give a whole number from 0 up, not True"),
    ({"examples": 2, "examples_draw": -1}, "examples_draw: give a whole number from 0 up, not -1"),
    ({"calibrate": 1}, "calibrate: give true or false, not 1"),
    ({"prompt": "nowhere.md"}, "nowhere.md cannot be read"),
]


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_is_refused_in_one_line_that_names_the_parameter(folder: Path, params: Any, message: str):
    assert message in refused(recipe(folder), **params)


def test_a_prompt_that_asks_for_labels_or_none_at_all_is_refused(folder: Path):
    (folder / "sorts.md").write_text("---\nread: label\nlabels: [a]\n---\n{{ labels }} {{ text }}", encoding="utf-8")
    assert "prompt sorts asks for labels" in refused(recipe(folder, "sorts.md"))
    with pytest.raises(UserError, match=r"^rate\.prompt is not set"):
        made(Recipe())


def test_everything_tunable_can_be_named_and_nothing_that_only_says_where_or_how_fast():
    assert {"temperature", "document_tokens", "stop", "model", "prompt", "examples", "calibrate"} < set(TUNABLE)
    assert {"args.", "chat_template_args.", "prompt.chat", "prompt.answer_start", "prompt.normalise"} < set(TUNABLE)
    assert not {"device", "base_url", "concurrency", "prompt.body", "prompt.examples", "prompt.name"} & set(TUNABLE)


# -- which are the same


def same(recipe: Recipe, one: dict[str, Any], other: dict[str, Any]) -> bool:
    return key(made(recipe, **one)) == key(made(recipe, **other))


def test_what_has_no_effect_makes_no_difference(folder: Path):
    chooses, writes = recipe(folder), recipe(folder, "writes.md")
    assert same(chooses, {}, {"temperature": 0.7, "max_tokens": 9})
    assert same(chooses, {}, {"prompt__normalise": False})
    assert same(chooses, {}, {"prompt__pattern": "grade {number}"})
    assert same(chooses, {}, {"examples_draw": 3})
    assert same(chooses, {"examples": 0}, {"examples": 0, "examples_draw": 3})
    assert same(writes, {}, {"top_p": 0.9, "seed": 4})
    assert same(writes, {}, {"calibrate": True})
    assert same(writes, {}, {"prompt__example_answer": "My score: {score}"})
    assert same(writes, {"prompt__chat": False}, {"prompt__chat": False, "chat_template_args__think": True})
    assert same(writes, {}, {"prompt": str(folder / "writes.md")})


def test_what_has_an_effect_makes_a_difference(folder: Path):
    chooses, writes = recipe(folder), recipe(folder, "writes.md", temperature=1)
    assert not same(chooses, {}, {"prompt": str(folder / "writes.md")})
    assert not same(chooses, {}, {"calibrate": True})
    assert not same(chooses, {}, {"document_tokens": 99})
    assert not same(chooses, {}, {"prompt__system": ""})
    assert not same(chooses, {"prompt__line": None}, {"prompt__line": None, "prompt__normalise": False})
    assert not same(chooses, {"examples": 2}, {"examples": 2, "examples_draw": 1})
    assert not same(chooses, {"examples": 2}, {"examples": 3})
    assert not same(writes, {}, {"top_p": 0.9})
    assert not same(writes, {}, {"seed": 4})
    assert not same(writes, {}, {"prompt__pattern": "grade {number}"})
    shown = {"examples": 2}
    assert not same(writes, shown, {**shown, "prompt__example_answer": "My score: {score}"})


def test_a_file_with_the_same_prompt_under_another_name_is_the_same(folder: Path):
    (folder / "again.md").write_text(WRITES, encoding="utf-8")
    assert same(recipe(folder, "writes.md"), {}, {"prompt": str(folder / "again.md")})


# -- what a recipe then says


def read_again(recipe: Recipe, found: Candidate, folder: Path) -> Recipe:
    """The recipe with the settings laid over it, by way of YAML."""
    values = merge(recipe.model_dump(mode="json"), settings(found, recipe, folder))
    return Recipe.model_validate(yaml.safe_load(yaml.safe_dump(values)))


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.7, "stop": ["END", "\n"], "args__num_beams": 3},
    {"model": "other", "chat_template_args__think": False},
    {"examples": 3, "examples_draw": 1, "calibrate": True},
    {"prompt__system": "", "prompt__chat": False},
    {"prompt__line": {"offset": 0.5, "slope": 3}},
]


@pytest.mark.parametrize("params", PARAMS, ids=[next(iter(params)) for params in PARAMS])
@pytest.mark.parametrize("name", ["chooses.md", "writes.md"])
def test_the_settings_laid_over_the_recipe_rate_like_the_candidate(folder: Path, params: dict[str, Any], name: str):
    r = recipe(folder, rate={"calibrate": False}, revision="abc", args={"length_penalty": 1})
    found = made(r, prompt=str(folder / name), **params)
    again = made(read_again(r, found, folder / "tune"))
    assert key(again) == key(found)
    assert again.prompt.digest == found.prompt.digest
    assert again.teacher == found.teacher


def test_only_what_differs_is_said_and_only_a_changed_prompt_is_a_new_file(folder: Path):
    r = recipe(folder, temperature=1, max_tokens=7)
    other = made(r, temperature=0, max_tokens=7, prompt=str(folder / "writes.md"))
    assert settings(other, r, folder / "tune") == {
        "rate": {"prompt": str(folder / "writes.md")},
        "teacher": {"temperature": 0.0},
    }
    assert not (folder / "tune").exists()
    shot = made(r, examples=2)
    assert settings(shot, r, folder / "tune") == {"rate": {"prompt": str(folder / "tune" / "chooses-tuned.md")}}
    assert prompts.load(folder / "tune" / "chooses-tuned.md").name == "chooses-tuned"


def test_calibration_that_the_prompt_cannot_have_is_turned_off_in_the_recipe(folder: Path):
    r = recipe(folder, rate={"calibrate": True})
    found = made(r, prompt=str(folder / "writes.md"))
    assert settings(found, r, folder)["rate"] == {"prompt": str(folder / "writes.md"), "calibrate": False}


def test_a_fitted_line_is_a_new_file(folder: Path):
    r = recipe(folder)
    found = made(r)
    fitted = found._replace(prompt=found.prompt.model_copy(update={"line": Line(offset=2, slope=0.5)}))
    path = Path(settings(fitted, r, folder / "tune")["rate"]["prompt"])
    assert prompts.load(path).line == Line(offset=2, slope=0.5)


# -- the line


def contrast(**changes: Any) -> Prompt:
    return choosing((5, [" good"]), (0, [" bad"]), line=Line(offset=0, slope=1), **changes)


@given(
    offset=st.floats(1, 4),
    slope=st.floats(0.01, 10),
    odds=st.lists(st.floats(-8, 8), min_size=10, max_size=30, unique_by=lambda x: round(x, 2)),
)
def test_a_line_through_points_is_found(offset: float, slope: float, odds: list[float]):
    x = np.array(odds)
    fitted = with_line(contrast(), x, offset + slope * x)
    assert fitted is not None and fitted.line is not None
    assert fitted.line.slope == pytest.approx(slope, rel=1e-3)
    assert fitted.line.offset == pytest.approx(offset, abs=1e-3 * (1 + 80 * slope))


def test_the_fitted_line_reads_scores_nearer_to_the_human_ones():
    odds = np.linspace(-2, 2, 21)
    gold = 2.5 + 0.6 * odds
    fitted = with_line(contrast(), odds, gold)
    assert fitted is not None
    for before, right in zip(odds, gold, strict=True):
        answer = {" good": -0.1, " bad": -0.1 - before}
        assert read_choices(fitted, answer).score == pytest.approx(right, abs=0.01)


def test_unseen_candidates_and_missing_scores_are_left_out():
    odds = np.array([*range(12), np.inf, -np.inf, np.nan, 3.0])
    gold = np.array([*(2 * n for n in range(12)), 0.0, 5.0, 1.0, np.nan])
    fitted = with_line(contrast(), odds, gold)
    assert fitted is not None and fitted.line == Line(offset=0, slope=2)


def test_no_line_is_fitted_where_it_would_mean_nothing():
    rising, enough = np.arange(10.0), np.arange(10.0)
    assert with_line(contrast(), rising, enough) is not None
    assert with_line(contrast(), rising, -enough) is None
    assert with_line(contrast(), rising, np.ones(10)) is None
    assert with_line(contrast(), np.ones(10), enough) is None
    assert with_line(contrast(), rising[:9], enough[:9]) is None
    assert with_line(choosing((5, [" good"]), (0, [" bad"])), rising, enough) is None
    assert with_line(asking(), rising, enough) is None
