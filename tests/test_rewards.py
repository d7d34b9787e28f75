"""What replies are worth: by students, classifiers and a judging teacher."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pipeline import config, judge, preferences, rewards
from pipeline.errors import UserError

PAIRS = [("What is light?", "A wave."), ("What is light?", "spam spam spam"), ("Who?", "No.")]


def recipe(run_folder: Path, by: Any, **more: Any) -> config.Recipe:
    """A recipe with this reward."""
    reward = {"by": str(by), "device": "cpu", **more.pop("reward", {})}
    return config.load_recipe(None, {"run_folder": str(run_folder), "reward": reward, **more})


def classifier(folder: Path, base: Path, n_labels: int = 1, **options: Any) -> Path:
    """A random classifier on a model."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=n_labels, **options)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("one two three four five", 0.0),
        ("a a a a a", 2 / 3),
        ("a b c a b c", 1 / 4),
        ("A, b! c. a B C", 1 / 4),
    ],
)
def test_repetition_is_the_share_of_trigrams_that_came_before(reply: str, share: float) -> None:
    assert rewards.repetition(reply) == pytest.approx(share)


@pytest.mark.parametrize("base", ["tiny_encoder", "tiny_causal"])
def test_a_classifier_folder_rewards_whatever_else_is_in_the_batch(
    tmp_path: Path, base: str, request: pytest.FixtureRequest
) -> None:
    folder = classifier(tmp_path / "made", request.getfixturevalue(base))
    with rewards.load(recipe(tmp_path, folder)) as reward:
        together = reward(PAIRS * 7)
        alone = np.concatenate([reward([pair]) for pair in PAIRS])

    assert together.shape == (21,)
    assert together.dtype == np.float64
    assert together[:3] == pytest.approx(alone, abs=1e-4)
    assert len(set(np.round(alone, 4))) == 3


def test_a_classifier_with_several_labels_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    folder = classifier(tmp_path / "made", tiny_encoder, n_labels=3)
    with pytest.raises(UserError, match="has 3 labels; a reward is a classifier with one output"):
        rewards.load(recipe(tmp_path, folder))


def test_a_model_without_a_head_is_refused_as_its_rewards_would_be_random(tmp_path: Path, tiny_encoder: Path) -> None:
    with pytest.raises(UserError, match=r"is neither a student nor a classifier; take reward.by: model"):
        rewards.load(recipe(tmp_path, tiny_encoder))


def test_an_adapter_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is a LoRA adapter, not a whole model"):
        rewards.load(recipe(tmp_path, tmp_path))


@pytest.mark.parametrize("by", ["student", "model"])
def test_a_reward_that_is_not_learned_yet_is_one_line(tmp_path: Path, by: str) -> None:
    with pytest.raises(UserError, match=f"reward.by: {by} is not learned yet, .* run gristmill align reward"):
        rewards.load(recipe(tmp_path, by))


def test_a_reward_that_is_no_number_is_one_line(tmp_path: Path, tiny_encoder: Path) -> None:
    folder = classifier(tmp_path / "made", tiny_encoder)
    about = AutoConfig.from_pretrained(folder)
    about.score_offset = float("inf")
    about.save_pretrained(folder)
    with (
        rewards.load(recipe(tmp_path, folder)) as reward,
        pytest.raises(UserError, match=r"gives inf to the reply 'A wave.' to 'What is light"),
    ):
        reward(PAIRS)


# -- the teacher ------------------------------------------------------------------------------------------------------


def test_a_judging_teacher_is_asked_once_about_each_reply(recipe_file: Path) -> None:
    given = config.load_recipe(recipe_file, {"reward": {"by": "teacher"}})
    with rewards.load(given) as reward:
        assert isinstance(reward, judge.Judge)
        first, again = reward(PAIRS), reward([*PAIRS, ("Who?", "Me.")])
        assert reward.spending.n_asked == 4
    assert np.isfinite(again).all()
    assert again[:3] == pytest.approx(first)
    assert judge.scores(given, PAIRS, config.Budget()) == pytest.approx(list(first))

    with rewards.load(given) as reward:
        reward(PAIRS)
        assert isinstance(reward, judge.Judge)
        assert reward.spending.n_asked == 0


def test_a_spent_budget_leaves_replies_without_a_reward_and_says_so(recipe_file: Path) -> None:
    given = config.load_recipe(recipe_file, {"reward": {"by": "teacher", "budget_tokens": 60}})
    with rewards.load(given) as reward:
        found = reward([("Say a number.", str(number)) for number in range(12)])
        assert isinstance(reward, judge.Judge)
        assert reward.stopped_by == "budget_tokens"
    assert np.isfinite(found).any()
    assert np.isnan(found).any()
    assert judge.scores(given, [("Say a number.", "3")], config.Budget())[0] is not None


def test_replies_that_the_teacher_does_not_see_whole_are_told_of(
    recipe_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = config.load_recipe(recipe_file, {"reward": {"by": "teacher"}})
    judge.scores(given, [("Say a word.", "word " * 200), ("Say a word.", "word")], config.Budget())
    assert "judge: 1 replies were cut before the teacher saw them whole; raise teacher.document_tokens" in caplog.text


# -- preferences of people --------------------------------------------------------------------------------------------


def test_accuracy_counts_ties_half_and_leaves_out_what_has_no_reward() -> None:
    known = {"good": 3.0, "bad": 1.0, "same": 3.0, "lost": np.nan}
    said = [("good", "bad")] * 5 + [("bad", "good")] * 2 + [("good", "same"), ("good", "lost")]
    pairs = [preferences.Preference(f"q{i}", *both) for i, both in enumerate(said)]
    found = preferences.accuracy(lambda said: np.array([known[reply] for _, reply in said]), pairs)

    assert (found["n"], found["n_unscored"]) == (8, 1)
    assert found["accuracy"] == pytest.approx(5.5 / 8)
    low, high = found["interval"]
    assert low < 5.5 / 8 < high
    assert low >= 0
    assert high <= 1


def test_many_pairs_to_a_few_prompts_tell_no_more_than_these_prompts() -> None:
    known, won = {"good": 1.0, "bad": 0.0}, (True, True, True, False, True, False)
    sides = [("good", "bad") if is_won else ("bad", "good") for is_won in won]

    def interval(times: int) -> Any:
        pairs = [preferences.Preference(f"q{i}", *both) for i, both in enumerate(sides) for _ in range(times)]
        return preferences.accuracy(lambda said: np.array([known[reply] for _, reply in said]), pairs)["interval"]

    assert interval(20) == interval(1)


def test_a_preference_on_several_turns_is_read_as_prepare_writes_it(tmp_path: Path) -> None:
    asked = "\n\nHuman: Hello.\n\nAssistant: Hi!\n\nHuman: Who?\n\nAssistant:"
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": asked, "chosen": "b", "rejected": "c"}]), "utf-8")
    assert preferences.read(tmp_path / "pairs.json")[0].prompt == "Hello.\n\nAssistant: Hi!\n\nUser: Who?"


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.parquet"])
def test_pairs_are_read_from_json_json_lines_and_parquet(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "more": 1}]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(rows if name.endswith("json") else rows[0]), encoding="utf-8")

    assert preferences.read(tmp_path / name) == [("a", "b", "c")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}', "pairs.jsonl, row 1 has no text 'rejected'; there are: prompt, chosen"),
        ("", "has no rows"),
        ("nonsense", "neither a JSON array nor JSON lines"),
        (
            '{"prompt": "Human: a\\n\\nAssistant: d", "chosen": "b", "rejected": "c"}',
            "row 1: the last turn is not the",
        ),
    ],
)
def test_pairs_that_cannot_be_read_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        preferences.read(path)
