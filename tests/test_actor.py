"""The actor: what it learns from, where its loss is, and how it goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from trl import SFTTrainer

from pipeline import actor, conversations, replies, training
from pipeline.config import Recipe
from pipeline.errors import UserError

QUICK = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "max_length": 64}
ROWS = [{"user_input": f"What is {i} and 1?", "completion": f"It is {i + 1}."} for i in range(20)]


def recipe(tmp_path: Path, model: Path, rows: list[dict[str, Any]] | None = None, **args: Any) -> Recipe:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(ROWS if rows is None else rows), encoding="utf-8")
    return Recipe.model_validate(
        {
            "run_folder": tmp_path / "run",
            "align": {"actor_data": data, "reply_tokens": 8},
            "actor": {"model": str(model), "device": "cpu", "args": QUICK | args},
        }
    )


def test_the_actor_learns_and_every_row_is_counted(tmp_path: Path, tiny_causal: Path) -> None:
    long, empty = {"user_input": "word " * 200, "completion": "a"}, {"user_input": "b", "completion": " "}
    asked = recipe(tmp_path, tiny_causal, [*ROWS, long, empty], max_steps=30)

    result = actor.run(asked)

    held_out = sum(conversations.for_judging(asked, row["user_input"]) for row in ROWS)
    assert 0 < held_out == result.n_held_out
    assert (result.n_rows, result.n_too_long, result.n_empty) == (22, 1, 1)
    assert result.n_trained_on == 20 - held_out
    assert result.n_steps == 30
    assert result.loss_first is not None and result.loss_last is not None
    assert result.loss_last < result.loss_first - 1
    assert result.held_out_loss_before is not None and result.held_out_loss_after is not None
    assert result.held_out_loss_after < result.held_out_loss_before - 1
    assert (tmp_path / "run" / "actor" / "model" / "config.json").exists()
    assert actor.run(asked) == result


def test_the_loss_is_on_the_reply_alone(tmp_path: Path, tiny_causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def look(trainer: SFTTrainer, *_: Any) -> None:
        batch = next(iter(trainer.get_train_dataloader()))
        seen.extend(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))
        Path(trainer.args.output_dir).parent.joinpath("model").mkdir()

    monkeypatch.setattr(training, "work", look)
    actor.run(recipe(tmp_path, tiny_causal))

    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    assert len(seen) == 2
    for ids, labels in seen:
        learned = tokenizer.decode([token for token in labels if token != -100])
        whole = tokenizer.decode(ids)
        asked, said = next((row["user_input"], row["completion"]) for row in ROWS if row["user_input"] in whole)
        assert said in learned and learned.replace(said, "").strip() == "<|im_end|>"
        assert asked not in learned and tokenizer.pad_token not in learned


def test_two_rows_are_enough_to_learn_from_and_one_is_one_line(tmp_path: Path, tiny_causal: Path) -> None:
    rows = [row for row in ROWS if not conversations.for_judging(Recipe(), row["user_input"])][:2]
    with pytest.raises(UserError, match=r"^actor: 1 of 1 rows can be learned from, at least 2 are needed: 0 have an"):
        actor.run(recipe(tmp_path, tiny_causal, rows[:1]))
    result = actor.run(recipe(tmp_path, tiny_causal, rows))
    assert (result.n_trained_on, result.n_held_out, result.held_out_loss_after) == (2, 0, None)


def test_prompts_that_fill_the_length_leave_nothing_to_learn(tmp_path: Path, tiny_causal: Path) -> None:
    asked = recipe(tmp_path, tiny_causal, max_length=8)
    with pytest.raises(UserError, match=r"^actor: 0 of 20 rows can be learned from, .*in 20 the prompt fills .*\(8 "):
        actor.run(asked)


def test_a_model_without_a_chat_template_is_one_line(tmp_path: Path, tiny_causal: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_causal, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"^actor\.model: .*bare has no chat template; take an instruct model"):
        actor.run(recipe(tmp_path, bare))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "actor.model is not set"),
        ({"args": {"learning_rat": 1}}, "actor.args: 'learning_rat' is not an argument of SFTConfig; did you mean"),
        ({"args": {"max_length": "long"}}, "actor.args.max_length: input should be a valid integer, .* got 'long'"),
    ],
)
def test_a_wrong_setting_is_one_line(
    tmp_path: Path, tiny_causal: Path, settings: dict[str, Any], message: str
) -> None:
    asked = recipe(tmp_path, tiny_causal)
    asked = asked.model_copy(update={"actor": asked.actor.model_copy(update=settings)})
    with pytest.raises(UserError, match=message):
        actor.run(asked)


def test_an_interrupted_training_goes_on_only_with_the_same_settings(
    tmp_path: Path, tiny_causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tmp_path, tiny_causal, save_steps=1, max_steps=6)
    whole = training.watcher

    def stopping(job: training.Job, begun: Path | None) -> Any:
        found = whole(job, begun)
        step_end = found.on_step_end

        def stop(args: Any, state: Any, *rest: Any, **named: Any) -> None:
            step_end(args, state, *rest, **named)
            if state.global_step == 4:
                raise KeyboardInterrupt

        found.on_step_end = stop
        return found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "watcher", stopping)
        actor.run(asked)
    with pytest.raises(UserError, match=r"^actor: actor\.args\.learning_rate changed from 0\.005 to 0\.001 .*--redo"):
        actor.run(recipe(tmp_path, tiny_causal, save_steps=1, max_steps=6, learning_rate=1e-3))

    steps: list[int] = []
    step = SFTTrainer.training_step
    monkeypatch.setattr(SFTTrainer, "training_step", lambda self, *a, **k: steps.append(1) or step(self, *a, **k))
    assert actor.run(asked).n_steps == 6
    assert len(steps) == 3


# -- replies


def test_replies_are_cut_kept_and_read_back(
    tmp_path: Path, tiny_causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, prompts = recipe(tmp_path, tiny_causal), ["One?", "Two?", "One?"]
    greedy = replies.write(asked, str(tiny_causal), prompts, 0.0, 0)
    first, second = replies.write_several(asked, str(tiny_causal), prompts, None, [0, 1])

    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    assert greedy[0] == greedy[2]
    assert first[0] == first[2] != second[0]
    assert all(reply == reply.strip() and len(tokenizer(reply)["input_ids"]) <= 12 for reply in [*greedy, *first])

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded for nothing")

    monkeypatch.setattr("pipeline.engines.transformers.load", never)
    assert replies.write_several(asked, str(tiny_causal), prompts, None, [0, 1]) == [first, second]
    with pytest.raises(AssertionError):
        replies.write(asked, str(tiny_causal), prompts, None, 2)


def test_a_greedy_reply_is_what_the_model_itself_writes(tmp_path: Path, tiny_causal: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_causal), AutoModelForCausalLM.from_pretrained(tiny_causal)
    turns = [{"role": "user", "content": "What is a topic?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    own = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()

    assert replies.write(recipe(tmp_path, tiny_causal), str(tiny_causal), ["What is a topic?"], 0.0, 0) == [own]


def test_prompts_longer_than_the_context_are_left_out_early(tmp_path: Path, tiny_causal: Path) -> None:
    asked = recipe(tmp_path, tiny_causal)
    kept, n_too_long = replies.fitting(asked, str(tiny_causal), "actor", ["short", "word " * 3000])
    assert (kept, n_too_long) == (["short"], 1)
    crowded = asked.model_copy(update={"align": asked.align.model_copy(update={"reply_tokens": 2048})})
    with pytest.raises(UserError, match=r"^align\.reply_tokens: 2048 leave no room for a prompt in the 2048 tokens"):
        replies.fitting(crowded, str(tiny_causal), "actor", ["short"])
