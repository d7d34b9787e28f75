"""What prepare makes of the sources that people's preferences come in."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import prepare
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.prepare import PrepareResult

PAIRS = [
    {"prompt": "\n\nHuman: One?\n\nAssistant:", "chosen": " Good one.", "rejected": " Bad one."},
    {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Two?\n\nAssistant:",
        "chosen": "Good.",
        "rejected": "Bad.",
    },
    {"prompt": "Three?", "chosen": "Good three.", "rejected": "Bad three."},
]
SHP = [
    {"history": "Post A", "human_ref_A": "first", "human_ref_B": "second", "labels": 1, "score_A": 9, "score_B": 3},
    {"history": "Post B", "human_ref_A": "first", "human_ref_B": "second", "labels": 0, "score_A": 2, "score_B": 8},
]


def prepared(folder: Path, source: Path, **align: Any) -> tuple[PrepareResult, dict[str, list[dict[str, Any]]]]:
    """The result, and the rows of each file that was left."""
    recipe = Recipe.model_validate({"run_folder": folder / "run", "align": {"source": str(source), **align}})
    result = prepare.run(recipe)
    made = folder / "run" / "prepare"
    arrays = {path.stem: json.loads(path.read_text()) for path in made.glob("*_data.json")}
    lines = {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in made.glob("*.jsonl")}
    return result, arrays | lines


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.parquet", "saved"])
def test_both_replies_are_kept_from_any_format(tmp_path: Path, name: str) -> None:
    result, made = prepared(tmp_path, saved(tmp_path / name, PAIRS))

    assert (result.n_drawn, result.n_reward, result.n_preferences) == (3, 6, 3)
    replies = {(row["user_input"], row["completion"]) for row in made["reward_training_data"]}
    assert {("One?", "Good one."), ("One?", "Bad one.")} <= replies
    assert all(row["score"] is None for row in made["reward_training_data"])
    assert {"user_input": "One?", "completion": "Good one."} in made["actor_training_data"]
    assert not any("Bad" in row["completion"] for row in made["actor_training_data"])
    assert {"prompt": "Three?", "chosen": "Good three.", "rejected": "Bad three."} in made["preferences"]


def test_earlier_turns_stay_in_the_prompt(tmp_path: Path) -> None:
    _, made = prepared(tmp_path, saved(tmp_path / "pairs.json", PAIRS))
    prompts = {row["user_input"] for row in made["rlhf_training_data"]}
    assert prompts == {"One?", "Three?", "Hi\n\nAssistant: Hello.\n\nUser: Two?"}


def test_whole_transcripts_differ_in_their_last_reply(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Two?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} Good.", "rejected": f"{start} Bad."},
        {"chosen": f"{start} Good.", "rejected": "\n\nHuman: Other\n\nAssistant: Bad."},
    ]
    result, made = prepared(tmp_path, saved(tmp_path / "rows.jsonl", rows))

    assert result.left_out == {"the replies are to different prompts": 1}
    assert made["preferences"] == [
        {"prompt": "Hi\n\nAssistant: Hello.\n\nUser: Two?", "chosen": "Good.", "rejected": "Bad."}
    ]


@pytest.mark.parametrize("name", ["shp.jsonl", "saved"])
def test_the_preferred_comment_of_shp_is_the_one_its_label_names(tmp_path: Path, name: str) -> None:
    _, made = prepared(tmp_path, saved(tmp_path / name, SHP))
    preferred = {row["prompt"]: (row["chosen"], row["rejected"]) for row in made["preferences"]}
    assert preferred == {"Post A": ("first", "second"), "Post B": ("second", "first")}


def test_instructions_are_for_the_actor_with_their_material(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
    ]
    result, made = prepared(tmp_path, saved(tmp_path / "table.parquet", rows))

    assert sorted(row["user_input"] for row in made["actor_training_data"]) == ["Add.\n\n2 and 2", "Greet."]
    assert made.keys() == {"actor_training_data", "rlhf_training_data"}
    assert (result.n_reward, result.n_preferences) == (0, 0)


def test_every_row_that_is_left_out_is_counted_with_its_reason(tmp_path: Path) -> None:
    odd = [
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": None, "rejected": "b"},
        {"prompt": "p", "chosen": "same", "rejected": " same "},
        {"prompt": "\n\nHuman: a\n\nAssistant: done", "chosen": "a", "rejected": "b"},
        PAIRS[0],
    ]
    result, _ = prepared(tmp_path, saved(tmp_path / "pairs.json", [*PAIRS, *odd]))

    assert result.left_out == {
        "prompt is empty": 1,
        "reply is no text": 1,
        "both replies are the same": 1,
        "the last turn is not the user's": 1,
        "copy": 1,
    }
    assert result.n_rows == 8


def test_a_sample_is_a_draw_by_seed_from_the_whole_source(tmp_path: Path) -> None:
    rows = [{"prompt": f"Prompt {i:03d}?", "chosen": "a", "rejected": "b"} for i in range(200)]
    source = saved(tmp_path / "pairs.jsonl", rows)
    backwards = saved(tmp_path / "back.jsonl", rows[::-1])

    result, made = prepared(tmp_path / "a", source, sample=40)
    _, again = prepared(tmp_path / "b", backwards, sample=40)

    assert made == again
    assert result.left_out == {"not drawn": 160}
    assert 50 < sum(int(row["user_input"][7:10]) for row in made["rlhf_training_data"]) / 40 < 150


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], r"there are the columns question, answer; needed are .*chosen, rejected"),
        ([], "nothing of .* can be used \\(it is empty\\)"),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "a"}],
            r"nothing of .* can be used \(both replies are the same 1\)",
        ),
    ],
)
def test_a_source_that_holds_nothing_of_use_is_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^align\.source: {message}"):
        prepared(tmp_path, saved(tmp_path / "rows.json", rows))


def test_a_source_that_is_not_there_is_named_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^align\.source: .*none\.parquet does not exist"):
        prepared(tmp_path, tmp_path / "none.parquet")


def test_a_changed_source_is_refused_without_redo(tmp_path: Path) -> None:
    source = saved(tmp_path / "pairs.json", PAIRS)
    prepared(tmp_path, source)
    saved(source, PAIRS[:2])
    with pytest.raises(UserError, match=r"^prepare: files.pairs.json changed .*--redo"):
        prepared(tmp_path, source)
