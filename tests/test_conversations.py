"""Conversations in files: what is read, what is refused, and what is set aside."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline import conversations
from pipeline.config import Recipe
from pipeline.conversations import Exchange
from pipeline.errors import UserError

ROWS = [
    {"user_input": " Is water wet? ", "completion": "Yes.", "score": 0.0},
    {"user_input": "Is fire wet?", "completion": "No.", "score": None, "lang": "en"},
    {"user_input": "Is ice wet?"},
]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def recipe(tmp_path: Path, **align: Any) -> Recipe:
    return Recipe.model_validate({"run_folder": tmp_path / "run", "align": align})


def test_arrays_and_lines_read_the_same_and_no_score_is_not_a_score_of_zero(tmp_path: Path) -> None:
    array = write(tmp_path / "a.json", "\ufeff \n" + json.dumps(ROWS, indent=1))
    lines = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n")

    found = conversations.read(array, "align.reward_data")

    assert found == conversations.read(lines, "align.reward_data")
    assert found == [
        Exchange("Is water wet?", "Yes.", 0.0),
        Exchange("Is fire wet?", "No.", None),
        Exchange("Is ice wet?"),
    ]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    rows = [row._asdict() for row in (Exchange("Qué?", "a\nb", 0.0), Exchange("ok", "", None))]
    conversations.write(tmp_path / name, rows)

    assert [row._asdict() for row in conversations.read(tmp_path / name, "x")] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("user_input: hello", "is neither a JSON array nor JSON lines .*line 1"),
        ('{"user_input": "a", "completion": "b"}\n{"user_', "is neither a JSON array nor JSON lines .*line 2"),
        ("[1, 2]", "row 1 is no object but 1"),
        ([{"prompt": "a", "completion": "b"}], "row 1: user_input is missing; there are: prompt, completion"),
        ([{"user_input": "a", "completion": "b"}, {"user_input": "a"}], "row 2: completion is missing"),
        ([{"user_input": "a", "completion": None}], "row 1: completion is missing"),
        ([{"user_input": ["a"], "completion": "b"}], 'row 1: user_input must be a text, not \\["a"\\]'),
        ([{"user_input": " ", "completion": "b"}], "row 1: user_input is empty"),
        ([{"user_input": "a", "completion": "b", "score": "3"}], 'row 1: score must be a number, .*not "3"'),
        ([{"user_input": "a", "completion": "b", "score": True}], "row 1: score must be a number, .*not true"),
        ('[{"user_input": "a", "completion": "b", "score": NaN}]', "row 1: score must be a number, .*not NaN"),
        ([{"user_input": "a", "completion": "b", "score": 7}], "row 1: score 7 is outside the scale 0 to 5"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(UserError, match=rf"^align\.reward_data: .*rows\.json,? {message}"):
        conversations.read(path, "align.reward_data", ("completion",), (0, 5))


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^align\.actor_data: .*none\.json cannot be read \(No such file"):
        conversations.read(tmp_path / "none.json", "align.actor_data")


def test_half_a_character_does_not_stop_a_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"user_input": "cut \\ud83d", "completion": "b"}')
    (row,) = conversations.read(path, "x")
    assert row.user_input == "cut ?"


# -- prompts


def test_prompts_are_distinct_and_held_out_by_content_alone(tmp_path: Path) -> None:
    rows = [{"user_input": f"Prompt {i}?"} for i in range(200)]
    there = write(tmp_path / "a.json", rows)
    back = write(tmp_path / "b.json", [*reversed(rows), *rows[:50]])

    taught, held_out = conversations.prompts(recipe(tmp_path, prompt_data=there))
    again = conversations.prompts(recipe(tmp_path, prompt_data=back))

    assert (sorted(again[0]), again[1]) == (sorted(taught), held_out)
    assert len(taught) + len(held_out) == 200
    assert 20 <= len(held_out) <= 60
    assert not set(taught) & set(held_out)
    few = conversations.prompts(recipe(tmp_path, prompt_data=there, held_out_prompts=5))
    assert few == (taught, held_out[:5])


def test_one_prompt_cannot_be_learned_on_and_judged_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"user_input": "Only one?"}])
    with pytest.raises(UserError, match=r"of 1 distinct prompts none is (held out|left)"):
        conversations.prompts(recipe(tmp_path, prompt_data=path))


def test_no_prompts_at_all_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^align\.prompt_data is not set, .*gristmill align expand prompts"):
        conversations.prompts(recipe(tmp_path))


def test_what_prepare_and_expand_left_counts_together_where_no_file_is_named(tmp_path: Path) -> None:
    for name in ("prepare/actor_training_data.json", "expand/actor.jsonl"):
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        conversations.write(tmp_path / "run" / name, [{"user_input": name, "completion": "b"}])
    named = write(tmp_path / "own.json", [{"user_input": "own", "completion": "b"}])

    assert [row.user_input for row in conversations.of(recipe(tmp_path), "actor")] == [
        "prepare/actor_training_data.json",
        "expand/actor.jsonl",
    ]
    assert [row.user_input for row in conversations.of(recipe(tmp_path, actor_data=named), "actor")] == ["own"]


def test_prompts_that_do_not_fit_are_left_out_and_counted(tiny_causal: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one two"}], tokenize=False, add_generation_prompt=True
    )
    limit = len(tokenizer(asked, add_special_tokens=False)["input_ids"])

    assert conversations.fitting(["one two", "one two " * 50], tokenizer, limit) == (["one two"], 1)
    assert conversations.fitting(["one two"], tokenizer, limit - 1) == ([], 1)
    assert conversations.fitting([], tokenizer, limit) == ([], 0)
