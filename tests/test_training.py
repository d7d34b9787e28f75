"""Training: what it takes, what it leaves, and how it goes on."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from pipeline import training
from pipeline.errors import UserError
from pipeline.training import Job

QUICK = {"max_length": 64, "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": "1e-3"}


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
    folder = training.run(job(tmp_path, tiny_causal, rows, args={"max_steps": 30, "learning_rate": 5e-3}))

    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    losses = [line["loss"] for line in training.read_curve(folder.parent) if "loss" in line]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 2
    assert not (folder.parent / "checkpoints").exists()


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
    steps = [json.loads(line)["step"] for line in (resumed.parent / "curve.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_an_adapter_folder_is_no_model(tmp_path: Path, rows: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")

    with pytest.raises(UserError, match="is a LoRA adapter, not a whole model; give its base model"):
        training.run(job(tmp_path, adapter, rows))
