"""RL on a model of forty words: what is rewarded becomes likelier, and an interrupted training goes on."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import config, policy, rewards, training
from pipeline.errors import UserError
from pipeline.storage import read_lines
from pipeline.training import Job

QUICK = {
    "max_steps": 4,
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
}
KIND = ("good", "kind", "happy", "warm", "gentle", "lovely", "nice", "sweet")
"""Words that the actor says less often than others in their place."""


@pytest.fixture
def rows(tmp_path: Path, tiny_align: Path) -> Path:
    """Prompts as a parquet file."""
    found = json.loads((tiny_align / "prompts.json").read_text(encoding="utf-8"))
    pq.write_table(pa.Table.from_pylist(found[:16]), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.fixture
def rewarding_kind_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward of 5 for replies with a kind word, 0 for others."""

    def reward(pairs: Sequence[tuple[str, str]]) -> Any:
        return np.array([5.0 * is_kind(reply) for _, reply in pairs])

    monkeypatch.setattr(rewards, "load", lambda recipe: nullcontext(reward))


def is_kind(reply: str) -> bool:
    """Whether it has a kind word."""
    return bool(set(KIND) & set(reply.split()))


def job(folder: Path, model: Path, rows: Path, **settings: Any) -> Job:
    """A short training on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = config.Recipe.model_validate({"align": {"reply_tokens": 8}, "rl": settings.pop("rl", {})})
    (folder / "recipe.yaml").write_text(config.to_yaml(recipe), encoding="utf-8")
    args = QUICK | settings.pop("args", {})
    given = {"trainer": "grpo", "section": "rl", "model": str(model), "device": "cpu", "rows": rows, "folder": folder}
    return Job.model_validate({**given, "recipe": folder / "recipe.yaml", "args": args, **settings})


def probability(model: Path, words: Sequence[str]) -> float:
    """Of some words in their place in a reply."""
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    asked = tokenizer("<user> how is my cat <end> <assistant> my cat is", return_tensors="pt").input_ids
    with torch.inference_mode():
        chances = loaded(asked).logits[0, -1].softmax(-1)
    return float(chances[tokenizer.convert_tokens_to_ids(list(words))].sum())


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.usefixtures("rewarding_kind_words")
def test_sampled_words_that_are_rewarded_become_likelier_although_others_were_the_likeliest(
    tmp_path: Path, tiny_align: Path, rows: Path, algorithm: str
) -> None:
    made = training.run(job(tmp_path / "rl", tiny_align / "actor", rows, trainer=algorithm, args={"max_steps": 12}))

    before, after = probability(tiny_align / "actor", KIND), probability(made, KIND)
    assert before < 0.4
    assert after > before + 0.2


@pytest.mark.usefixtures("rewarding_kind_words")
def test_every_reply_is_kept_with_its_reward_and_both_rewards_are_logged_apart(
    tmp_path: Path, tiny_align: Path, rows: Path
) -> None:
    made = training.run(job(tmp_path / "rl", tiny_align / "actor", rows))

    said = read_lines(made.parent / "conversations.jsonl")
    assert [line["step"] for line in said] == [step for step in range(4) for _ in range(16)]
    assert {line["reward"] for line in said} == {0.0, 5.0}
    assert all((line["reward"] == 5.0) == is_kind(line["completion"]) for line in said)
    curve = training.read_curve(made.parent)
    assert {"rewards/score/mean", "rewards/repetition/mean", "kl"} <= curve[0].keys()
    mean = np.mean([line["reward"] for line in said if line["step"] == 0])
    assert curve[0]["rewards/score/mean"] == pytest.approx(mean, abs=1e-5)


@pytest.mark.usefixtures("rewarding_kind_words")
def test_an_adapter_is_merged_into_the_policy(tmp_path: Path, tiny_align: Path, rows: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    made = training.run(job(tmp_path / "rl", tiny_align / "actor", rows, lora=lora))

    assert not (made / "adapter_config.json").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_align / "actor", made))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_generations": 3}, r"rl.args: generation_batch_size \(16\) must be divisible by num_generations \(3\)"),
        ({"num_generation": 4}, "rl.args: 'num_generation' is not an argument of GRPOConfig; did you mean num_gen"),
        ({"per_device_train_batch_size": 256}, "rl: 16 prompts do not fill a batch of 32; give more, or lower"),
    ],
)
@pytest.mark.usefixtures("rewarding_kind_words")
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, tiny_align: Path, rows: Path, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        training.run(job(tmp_path / "rl", tiny_align / "actor", rows, args=args))


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path, tiny_align: Path, rows: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_align / "actor")
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(tiny_align / "actor").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")

    with pytest.raises(UserError, match=r"rl.model: .*plain has no chat template"):
        training.run(job(tmp_path / "rl", tmp_path / "plain", rows))


def test_a_reward_that_fails_keeps_the_checkpoints_and_the_same_job_goes_on_without_doubled_steps(
    tmp_path: Path, tiny_align: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def failing(pairs: Sequence[tuple[str, str]]) -> Any:
        calls.append(len(pairs))
        if len(calls) == 4:
            raise UserError("the reward is gone")
        return np.arange(len(pairs), dtype=np.float64)

    monkeypatch.setattr(rewards, "load", lambda recipe: nullcontext(failing))
    begun = job(tmp_path / "rl", tiny_align / "actor", rows, args={"max_steps": 6, "save_steps": 2})
    with pytest.raises(UserError, match="the reward is gone"):
        training.run(begun)
    assert (begun.folder / "checkpoints" / "checkpoint-2").exists()
    with (begun.folder / "conversations.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 3, "user_inp')

    training.run(begun)

    steps = [line["step"] for line in read_lines(begun.folder / "conversations.jsonl")]
    assert steps == [step for step in range(6) for _ in range(16)]
    assert len(calls) == 4 + 4
    logged = [line["step"] for line in training.read_curve(begun.folder) if "loss" in line]
    assert logged == [1, 2, 3, 4, 5, 6]


def test_a_reply_without_a_reward_has_no_penalty_either_so_that_it_is_left_out() -> None:
    found = policy.Rewarded(
        lambda pairs: np.array([2.0, np.nan]), penalty=2.0, log=policy.Conversations(Path("/dev/null"), None)
    )
    said = [[{"role": "assistant", "content": "a b c a b c"}]] * 2
    asked = [[{"role": "user", "content": "say"}]] * 2

    class State:
        global_step = 0

    found.log.writes = False
    assert found.score(prompts=asked, completions=said, trainer_state=State()) == [2.0, None]
    assert found.repetition(completions=said) == [pytest.approx(-0.5), None]


def test_dpo_makes_the_better_reply_likelier(tmp_path: Path, tiny_align: Path) -> None:
    said = [
        {"user_input": f"how is my {thing}", "chosen": f"my {thing} is good", "rejected": f"my {thing} is bad"}
        for thing in ("cat", "dog", "friend", "house", "day", "garden", "song", "town")
    ]
    pq.write_table(pa.Table.from_pylist(said), tmp_path / "rows.parquet")
    args = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    folder = tmp_path / "rl"
    begun = job(folder, tiny_align / "actor", tmp_path / "rows.parquet", trainer="dpo")

    made = training.run(begun.model_copy(update={"args": args}))

    odds = [probability(path, ["good"]) / probability(path, ["bad"]) for path in (tiny_align / "actor", made)]
    assert odds[1] > 3 * odds[0]
