"""The stage that learns from the reward: what it starts from, what it refuses, and how it is judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from pipeline import before_after, config, gains, rl, training
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.storage import read_lines

QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "learning_rate": 1e-3}


def recipe(recipe_file: Path, tiny_align: Path, **settings: Any) -> Recipe:
    """RL of the tiny actor, judged by a random teacher."""
    align = {"prompt_data": str(tiny_align / "prompts.json"), "reply_tokens": 6, "held_out_prompts": 8}
    own = {"model": str(tiny_align / "actor"), "device": "cpu", "args": QUICK, **settings.pop("rl", {})}
    given = {"align": align, "actor": {"device": "cpu"}, "rl": own, "reward": {"by": "teacher", **settings}}
    return config.load_recipe(recipe_file, given)


def test_rl_is_judged_by_the_teacher_on_prompts_it_did_not_learn_from(recipe_file: Path, tiny_align: Path) -> None:
    given = recipe(recipe_file, tiny_align)
    result = rl.run(given)

    folder = given.run_folder / "rl"
    table = pq.read_table(folder / "replies.parquet").to_pydict()
    taught = {line["user_input"] for line in read_lines(folder / "conversations.jsonl")}
    assert result.n_held_out == len(table["user_input"]) == 8
    assert not taught & set(table["user_input"])
    assert result.gain == pytest.approx(np.mean(table["teacher_after"]) - np.mean(table["teacher_before"]))
    assert (result.reward_before, result.reward_after) == (result.teacher_before, result.teacher_after)
    assert (result.algorithm, result.reward, result.n_steps, result.n_unscored) == ("grpo", "teacher", 2, 0)
    assert AutoModelForCausalLM.from_pretrained(folder / "model").num_parameters() > 0
    assert rl.run(given) == result


def test_a_spent_budget_ends_the_learning_and_the_result_says_so(recipe_file: Path, tiny_align: Path) -> None:
    settings = {"rl": {"args": {**QUICK, "max_steps": 30}}, "budget_tokens": 400}
    result = rl.run(recipe(recipe_file, tiny_align, **settings))

    assert result.stopped_by == "budget_tokens"
    assert 0 < result.n_steps < 30
    assert result.n_unrewarded > 0
    assert result.teacher_after is not None
    with pytest.raises(UserError, match=r"reward.budget_tokens changed from 400 to None .* run again with --redo"):
        rl.run(recipe(recipe_file, tiny_align, rl=settings["rl"]))


def test_held_out_replies_that_a_budget_left_unjudged_are_no_result(recipe_file: Path, tiny_align: Path) -> None:
    given, pairs = recipe(recipe_file, tiny_align), [("what is my cat", "good"), ("what is my dog", "bad")]
    poor = given.model_copy(update={"rate": given.rate.model_copy(update={"budget_tokens": 1})})
    prompts, replies = (list(side) for side in zip(*pairs, strict=True))
    with pytest.raises(UserError, match=r"rl: rate.budget_tokens is spent before all replies to held-out prompts"):
        before_after.judge(poor, prompts, (replies, replies[::-1]))
    assert np.isfinite(before_after.judge(given, prompts, (replies, replies[::-1])).teacher).all()


def test_an_interrupted_rl_refuses_other_settings_and_is_not_trained_again_once_the_model_is_there(
    recipe_file: Path, tiny_align: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(recipe_file, tiny_align)

    class Killed(Exception):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(before_after, "judge", killed)
        rl.run(given)
    other = recipe(recipe_file, tiny_align, rl={"args": {**QUICK, "max_steps": 3}})
    with pytest.raises(UserError, match=r"rl.args.max_steps changed from 2 to 3 .* run again with --redo"):
        rl.run(other)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run", killed)
        assert rl.run(given).n_steps == 2
    assert rl.run(other, redo=True).n_steps == 3


def test_dpo_learns_from_the_best_and_the_worst_reply_and_a_score_of_zero_is_a_score(
    recipe_file: Path, tiny_align: Path
) -> None:
    given = recipe(recipe_file, tiny_align, rl={"algorithm": "dpo", "args": {"max_steps": 1}})
    asked = [row["user_input"] for row in json.loads((tiny_align / "prompts.json").read_text(encoding="utf-8"))]
    said = [("my cat is good", 5.0), ("my cat is bad", 0.0), ("my cat is cold", 1.0), ("my cat", None)]
    rows = [
        {"user_input": prompt, "completion": reply, "score": score, "reason": None, "source": "actor"}
        for prompt in asked
        for reply, score in said
    ]
    path = given.run_folder / "rate" / "replies.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")

    result = rl.run(given)

    learned = pq.read_table(given.run_folder / "rl" / "rows.parquet").to_pylist()
    assert {(row["chosen"], row["rejected"]) for row in learned} == {("my cat is good", "my cat is bad")}
    assert (result.algorithm, result.reward, result.reward_before) == ("dpo", None, None)
    assert 0 < result.n_prompts < len(asked)


def test_dpo_without_replies_that_differ_is_one_line(recipe_file: Path, tiny_align: Path) -> None:
    with pytest.raises(UserError, match="dpo needs prompts with two replies of different scores"):
        rl.run(recipe(recipe_file, tiny_align, rl={"algorithm": "dpo"}))


def test_prompts_longer_than_the_context_are_left_out_and_counted(
    recipe_file: Path, tiny_align: Path, tmp_path: Path
) -> None:
    short = json.loads((tiny_align / "prompts.json").read_text(encoding="utf-8"))
    long = [{"user_input": "tell me about the cat " * 20 + row["user_input"]} for row in short[:10]]
    (tmp_path / "prompts.json").write_text(json.dumps(short + long), encoding="utf-8")
    given = recipe(recipe_file, tiny_align)
    align = given.align.model_copy(update={"prompt_data": tmp_path / "prompts.json", "held_out_prompts": 100})
    result = rl.run(given.model_copy(update={"align": align}))

    assert result.n_too_long == 10
    assert result.n_prompts + result.n_held_out == 64


@pytest.mark.parametrize("is_begun", [False, True])
def test_without_a_finished_actor_there_is_one_line(recipe_file: Path, tiny_align: Path, is_begun: bool) -> None:
    given = recipe(recipe_file, tiny_align, rl={"model": None})
    if is_begun:
        (given.run_folder / "actor" / "checkpoints").mkdir(parents=True)
        actor = given.actor.model_copy(update={"model": str(tiny_align / "model")})
        given = given.model_copy(update={"actor": actor})
    with pytest.raises(UserError, match="there is no actor to improve; run gristmill align actor to its end"):
        rl.run(given)


@pytest.mark.parametrize("step", ["actor", "rate"])
def test_prompts_that_an_earlier_step_may_have_learned_from_judge_nothing(
    recipe_file: Path, tiny_align: Path, step: str
) -> None:
    given = recipe(recipe_file, tiny_align)
    made: dict[str, Any] = {"held_out_share": 0.1} if step == "actor" else {"align": {"held_out_share": 0.1}}
    (given.run_folder / step).mkdir(parents=True)
    (given.run_folder / step / "inputs.json").write_text(json.dumps({**made, "seed": 0}), encoding="utf-8")
    with pytest.raises(UserError, match=f"rl: held_out_share is 0.2, and was 0.1 in align {step}, so that other"):
        rl.run(given)


# -- what is said of it -----------------------------------------------------------------------------------------------

LOW, HIGH = np.tile([1.0, 2.0], 20), np.tile([4.0, 4.5], 20)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            LOW,
            HIGH,
            "Better: the teacher's mean score rose from 1.50 to 4.25 of 5 on 40 held-out prompts, +2.75 (95% ",
        ),
        (HIGH, LOW, "Worse: the teacher's mean score fell from 4.25 to 1.50 of 5 on 40 held-out prompts, -2.75 (95% "),
        (LOW, LOW[::-1], "No difference found: the teacher's mean score went from 1.50 to 1.50 of 5"),
        (LOW[:2], HIGH[:2], "Not known: 2 held-out prompts are too few to tell."),
        (LOW * np.nan, HIGH, "Not known: the teacher scored no reply to a held-out prompt both before and after."),
    ],
)
def test_the_sentence_says_what_the_interval_allows(before: Any, after: Any, said: str) -> None:
    assert gains.sentence(gains.compared(before, after), gains.NOTHING, 5).startswith(said)


def test_a_reply_without_a_score_takes_its_prompt_out_of_both_means() -> None:
    found = gains.compared(np.array([0.0, 2.0, np.nan, 1.0]), np.array([3.0, np.nan, 5.0, 1.0]))
    assert (found.n, found.before, found.after, found.gain) == (2, 0.5, 2.0, 1.5)


def test_a_reward_that_rose_alone_is_called_exploited() -> None:
    rose, stayed = gains.compared(LOW, HIGH), gains.compared(LOW, LOW)
    assert "the reward is being exploited" in str(gains.warning(stayed, rose))
    assert gains.warning(rose, rose) is None
    assert gains.warning(stayed, stayed) is None
