"""Training: what it takes, what it leaves, and how it goes on."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertForMaskedLM

from pipeline import language_model, training
from pipeline.errors import UserError
from pipeline.training import Job

QUICK = {"max_length": 64, "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": "1e-3"}
LEARNS = {"max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
"""Long enough for a random model to learn which tokens are common."""


@pytest.fixture
def rows(tmp_path: Path, texts: list[str]) -> Path:
    """Texts as a parquet file."""
    pq.write_table(pa.table({"text": texts[:20]}), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def job(tmp_path: Path, model: Path, rows: Path, **settings: Any) -> Job:
    """A short training of texts on the CPU."""
    args = QUICK | settings.pop("args", {})
    given = {"trainer": "sft", "section": "finetune", "model": str(model), "device": "cpu", "rows": rows}
    return Job.model_validate({**given, "folder": tmp_path / "made", "args": args, **settings})


def test_a_training_leaves_a_model_that_transformers_loads_and_its_curve(
    tmp_path: Path, tiny_causal: Path, rows: Path
) -> None:
    folder = training.run(job(tmp_path, tiny_causal, rows, args=LEARNS))

    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    losses = [line["loss"] for line in training.read_curve(folder.parent) if "loss" in line]
    assert len(losses) == 24
    assert losses[-1] < losses[0] - 3
    assert {path.name for path in folder.parent.iterdir()} == {"model", "curve.jsonl"}


def test_an_adapter_is_merged_into_the_model(tmp_path: Path, tiny_causal: Path, rows: Path) -> None:
    folder = training.run(job(tmp_path, tiny_causal, rows, lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}))

    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_causal, folder))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"args": {"learning_rat": 1}}, "finetune.args: 'learning_rat' is not an argument of SFTConfig; did you mean"),
        ({"lora": {"rank": 4}}, "finetune.lora: 'rank' is not an argument of LoraConfig"),
        ({"args": {"max_steps": "many"}}, "finetune.args.max_steps: input should be a valid integer.*got 'many'"),
        ({"lora": {"r": "many"}}, "finetune.lora.r: input should be a valid integer"),
    ],
)
def test_an_unknown_argument_is_named(
    tmp_path: Path, tiny_causal: Path, rows: Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        training.run(job(tmp_path, tiny_causal, rows, **setting))


def test_a_killed_training_goes_on_from_its_last_whole_checkpoint(
    tmp_path: Path, tiny_causal: Path, rows: Path
) -> None:
    whole = training.run(job(tmp_path / "whole", tiny_causal, rows))
    begun = job(tmp_path / "begun", tiny_causal, rows, args={"save_steps": 2})

    class Killed(Exception):
        pass

    def killing(at: int) -> Any:
        watcher = training.watcher

        def made(job: Job, begun: Path | None) -> Any:
            found = watcher(job, begun)
            step_end = found.on_step_end

            def stop(args: Any, state: Any, *rest: Any, **named: Any) -> None:
                step_end(args, state, *rest, **named)
                if state.global_step == at:
                    raise Killed

            found.on_step_end = stop
            return found

        return made

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "watcher", killing(5))
        training.run(begun)
    broken = begun.folder / "checkpoints" / "checkpoint-5"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global', encoding="utf-8")

    resumed = training.run(begun)

    curves = [
        [line["loss"] for line in training.read_curve(folder.parent) if "loss" in line] for folder in (whole, resumed)
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert len(curves[1]) == 6
    tokens = [
        [line["num_tokens"] for line in training.read_curve(folder.parent) if "loss" in line]
        for folder in (whole, resumed)
    ]
    assert tokens[1] == tokens[0]
    steps = [json.loads(line)["step"] for line in (resumed.parent / "curve.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_the_loss_on_rows_held_out_is_looked_at_before_and_after(
    tmp_path: Path, tiny_causal: Path, rows: Path, texts: list[str]
) -> None:
    pq.write_table(pa.table({"text": texts[20:24]}), tmp_path / "held_out.parquet")
    folder = training.run(job(tmp_path, tiny_causal, rows, args=LEARNS, held_out=tmp_path / "held_out.parquet"))

    looks = [line for line in training.read_curve(folder.parent) if "eval_loss" in line]
    assert [line["step"] for line in looks] == [0, 17, 24], "an epoch has 17 steps"
    assert looks[-1]["eval_loss"] < looks[0]["eval_loss"] - 3


def test_when_the_loss_is_looked_at_is_for_the_recipe_to_say_and_the_end_is_looked_at_too(
    tmp_path: Path, tiny_causal: Path, rows: Path
) -> None:
    args = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 2, "max_steps": 4}
    given = job(tmp_path, tiny_causal, rows, args=args, held_out=rows)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "merged", interrupted)
        training.run(given)
    shutil.rmtree(given.folder / "checkpoints" / "checkpoint-4")
    training.run(given)

    looks = [line["step"] for line in training.read_curve(given.folder) if "eval_loss" in line]
    assert looks == [0, 3, 4], "going on from a checkpoint is no start"


def interrupted(*_: Any) -> None:
    """As by Ctrl-C."""
    raise KeyboardInterrupt


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path, tiny_causal: Path, rows: Path) -> None:
    args = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "warmup_steps": 0}
    with pytest.raises(UserError, match=r"finetune: the loss is nan at step 2; lower finetune\.args\.learning_rate"):
        training.run(job(tmp_path, tiny_causal, rows, args=args))


def test_a_model_whose_output_is_no_number_is_refused(tmp_path: Path, tiny_causal: Path) -> None:
    tokenizer, model = language_model.load(str(tiny_causal), "model")
    model.lm_head.weight.data.fill_(float("nan"))
    language_model.save(tmp_path / "broken", tokenizer, model)
    with pytest.raises(UserError, match=r"model: .*broken says nothing: its output is no number"):
        language_model.load(str(tmp_path / "broken"), "model")


def test_a_text_longer_than_a_block_is_learned_whole(tmp_path: Path, tiny_causal: Path, texts: list[str]) -> None:
    whole = " ".join(texts[:5])
    pq.write_table(pa.table({"text": [whole]}), tmp_path / "one.parquet")
    args = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    folder = training.run(job(tmp_path, tiny_causal, tmp_path / "one.parquet", args=args))

    n_tokens = len(AutoTokenizer.from_pretrained(tiny_causal)(whole)["input_ids"])
    assert n_tokens > 5 * 64
    assert [line for line in training.read_curve(folder.parent) if "loss" in line][-1]["num_tokens"] == n_tokens + 1


def test_several_processes_train_one_model_and_one_of_them_writes(
    tmp_path: Path, tiny_causal: Path, rows: Path
) -> None:
    launch = tmp_path / "two.yaml"
    launch.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\n"
        "num_processes: 2\nmachine_rank: 0\nmain_process_port: 0\nmixed_precision: 'no'\n"
    )
    alone = training.run(job(tmp_path / "alone", tiny_causal, rows, args={"per_device_train_batch_size": 4}))
    together = training.run(job(tmp_path / "together", tiny_causal, rows), launch)

    curves = [training.read_curve(folder.parent) for folder in (alone, together)]
    losses = [[line["loss"] for line in curve if "loss" in line] for curve in curves]
    assert [line["step"] for line in curves[1] if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (alone, together)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])
    assert {path.name for path in together.parent.iterdir()} == {"model", "curve.jsonl", "job.json"}


@pytest.mark.parametrize(("stage", "expected"), [(None, False), (2, False), (3, True)])
def test_only_from_zero_stage_3_on_weights_lie_in_pieces(stage: int | None, expected: bool) -> None:
    deepspeed = None if stage is None else SimpleNamespace(zero_stage=stage)
    trainer = SimpleNamespace(
        is_fsdp_enabled=False, accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=deepspeed))
    )
    assert training.in_pieces(trainer) == expected


def test_a_launch_that_is_not_there_is_one_line(tmp_path: Path, tiny_causal: Path, rows: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.launch: none\.yaml does not exist"):
        training.run(job(tmp_path, tiny_causal, rows), Path("none.yaml"))


def test_a_block_longer_than_the_context_is_refused(tmp_path: Path, tiny_causal: Path, rows: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.args\.max_length: 4096 is more than the 2048 tokens"):
        training.run(job(tmp_path, tiny_causal, rows, args={"max_length": 4096}))


def test_what_is_no_causal_model_is_refused(
    tmp_path: Path, tiny_causal: Path, tiny_t5: Path, tiny_encoder: Path
) -> None:
    masked, classifier = tmp_path / "masked", tmp_path / "classifier"
    for folder, kind, base in (
        (masked, BertForMaskedLM, tiny_encoder),
        (classifier, AutoModelForSequenceClassification, tiny_causal),
    ):
        kind.from_pretrained(base).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    for folder, why in (
        (tiny_t5, "cannot be loaded as a causal language model (it is an encoder-decoder)"),
        (tiny_encoder, "is no causal language model: it has no weights for"),
        (masked, "is no causal language model: what it says depends on what follows"),
        (classifier, "is no causal language model: it has no weights for lm_head.weight"),
        (tmp_path / "no/where", "does not exist; give a model folder, a .gguf file or a Hub name"),
    ):
        with pytest.raises(UserError, match=re.escape(f"finetune.model: {folder} {why}")):
            language_model.load(str(folder), "finetune.model")


def test_an_adapter_folder_is_no_model(tmp_path: Path, rows: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")

    with pytest.raises(UserError, match="is a LoRA adapter, not a whole model; give its base model"):
        training.run(job(tmp_path, adapter, rows))
