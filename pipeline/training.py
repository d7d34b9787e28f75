"""Training a language model through TRL and Transformers: a job on disk, done in this process or launched into several
(python -m pipeline.training JOB), that goes on from its last checkpoint."""

import importlib
import json
import math
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline import config, language_model
from pipeline.config import Settings
from pipeline.errors import UserError, needs
from pipeline.storage import read_lines, write_text
from pipeline.tracking import Stage, Step, progress, read_json

CURVE, MODEL, CHECKPOINTS = "curve.jsonl", "model", "checkpoints"
"""What a training leaves in its folder: a line for each time it logged, the whole model, and where it can go on."""
CACHE = "cache"
"""Rows as `datasets` keeps them while a training is at work."""

TRAINERS = {
    "sft": "pipeline.sft",
    "grpo": "pipeline.policy",
    "rloo": "pipeline.policy",
    "dpo": "pipeline.policy",
    "classifier": "pipeline.classifier",
}
"""Modules with a function `train(job)`."""


class Job(Settings):
    """Everything that a training needs, so that other processes can do it."""

    trainer: Literal["sft", "grpo", "rloo", "dpo", "classifier"]
    section: str
    """Section of the recipe, for messages."""
    model: str
    """Hub name, folder, package:NAME/PATH or .gguf file."""
    revision: str | None = None
    rows: Path
    """Parquet file of what is learned from; its columns are the trainer's."""
    held_out: Path | None = None
    """The same of what only the loss is looked at."""
    folder: Path
    args: dict[str, Any] = Field(default_factory=dict)
    """Laid over the trainer's defaults, then handed to its configuration."""
    lora: dict[str, Any] = Field(default_factory=dict)
    """Passed verbatim to peft's LoraConfig; empty trains all weights."""
    device: str | None = None
    seed: int = 0
    recipe: Path | None = None
    """A resolved recipe, for trainers that ask a teacher or a student."""


def job(work: Stage, settings: config.Training, **given: Any) -> Job:
    """The training of a stage in its folder, with the settings of its section where none are `given`."""
    own = settings.model_dump(include={"model", "revision", "args", "lora", "device"})
    where = {"section": work.name, "folder": work.folder, "seed": work.recipe.seed}
    return Job.model_validate({**own, **where, **given})


def run(job: Job, launch: Path | None = None) -> Path:
    """Train, in processes that `accelerate launch` starts from a configuration file if one is given; the folder of
    the whole model. Checkpoints are removed once it is there."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if launch is None:
        train(job)
    else:
        launched(job, launch)
    for name in (CHECKPOINTS, CACHE):
        shutil.rmtree(job.folder / name, ignore_errors=True)
    return job.folder / MODEL


def train(job: Job) -> None:
    """Train in this process."""
    needs("trl", "finetune")
    needs("peft", "finetune")
    with warnings.catch_warnings():  # TRL and Transformers rename each other's arguments; no user can mend that
        warnings.filterwarnings("ignore", ".*_checkpointing.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Could not find a config file in None", UserWarning)  # peft, of a .gguf file
        importlib.import_module(TRAINERS[job.trainer]).train(job)


def launched(job: Job, launch: Path) -> None:
    """Train in the processes of a configuration of accelerate, which says how many, with DeepSpeed or not."""
    needs("accelerate", "finetune")
    check_launch(launch, job.section)
    path = job.folder / "job.json"
    write_text(path, job.model_dump_json(indent=2) + "\n")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch)]
    done = subprocess.run([*command, "-m", "pipeline.training", str(path)], check=False, stdout=sys.stderr)  # noqa: S603
    if done.returncode:
        raise UserError(
            f"{job.section}.launch: accelerate launch ended with exit code {done.returncode} (its messages are above);"
            " checkpoints are kept, the same command goes on"
        )


def check_launch(launch: Path | None, section: str) -> None:
    """Refuse a configuration file that is not there."""
    if launch is not None and not launch.exists():
        raise UserError(f"{section}.launch: {launch} does not exist; give a file that accelerate config writes")


def check_chat_template(tokenizer: Any, setting: str, model: str) -> None:
    """Refuse a model that has no form for a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{setting}: {model} has no chat template; take an instruct model, or one that gristmill align actor made"
            " of it, or put a chat_template.jinja into its folder"
        )


# -- at work ----------------------------------------------------------------------------------------------------------


def work(trainer: Any, job: Job, tokenizer: Any) -> None:
    """Train from the last checkpoint on, then write the whole model."""
    transformers = needs("transformers", "torch")
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    if in_pieces(trainer) and job.lora:
        raise UserError(
            f"{job.section}.lora: an adapter cannot be merged into weights that lie in pieces; take DeepSpeed with"
            f" ZeRO stage 1 or 2, or leave {job.section}.lora out"
        )
    begun = last_checkpoint(job.folder / CHECKPOINTS)
    if begun:
        trainer.args.eval_on_start = False
    watching = watcher(job, begun)
    trainer.add_callback(watching)
    with watching.shown, suppress(AtItsEnd):
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if in_pieces(trainer):
        trainer.save_model(str(job.folder / MODEL))  # only the trainer can gather them
    elif trainer.is_world_process_zero():
        language_model.save(job.folder / MODEL, tokenizer, merged(model))
    trainer.accelerator.wait_for_everyone()


def in_pieces(trainer: Any) -> bool:
    """Whether no process has all weights: with FSDP, and with DeepSpeed from ZeRO stage 3 on."""
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    return bool(trainer.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3))


class AtItsEnd(Exception):
    """The checkpoint that a training goes on from is its last: Transformers would take one step more."""


def merged(model: Any) -> Any:
    """A model whose adapter is part of its weights: a folder with an adapter alone cannot be loaded by its path."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that is whole; what a killed process was writing is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if is_whole(path)]
    for path in set(found) - set(whole):
        shutil.rmtree(path, ignore_errors=True)  # every process of a launched job does so
    return whole[-1] if whole else None


def is_whole(checkpoint: Path) -> bool:
    """Whether its state, which is written last, can be read."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """What a training logged, in the order of steps."""
    return read_lines(folder / CURVE)


def line_of(values: dict[str, Any]) -> str:
    """A JSON line."""
    return json.dumps(values, ensure_ascii=False) + "\n"


def watcher(job: Job, begun: Path | None) -> Any:
    """A callback that keeps the curve, shows how far it is, and stops where the loss is no number."""
    transformers = needs("transformers", "torch")

    class Watcher(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.shown, self.loss = ExitStack(), math.nan
            self.step: Step = lambda _: None
            at = (read_json(begun / "trainer_state.json") or {})["global_step"] if begun else -1
            self.lines = [line for line in read_curve(job.folder) if line["step"] <= at]
            last: dict[str, Any] = next((line for line in reversed(self.lines) if "loss" in line), {})
            self.before = {name: last.get(name, 0) for name in ("num_tokens", "seconds")}
            self.began = time.perf_counter()

        def on_train_begin(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            self.began = time.perf_counter()
            if state.is_world_process_zero:
                write_text(job.folder / CURVE, "".join(map(line_of, self.lines)))
                bar = progress(job.section, state.max_steps, self.told, "steps", state.global_step)
                self.step = self.shown.enter_context(bar)

        def told(self, _: float) -> str:
            return "" if math.isnan(self.loss) else f"loss {self.loss:.3f}"

        def on_step_begin(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            if state.global_step >= state.max_steps:
                raise AtItsEnd

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.step(1)
            if state.global_step >= state.max_steps and args.eval_strategy == "steps":
                control.should_evaluate = True

        def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, Any], **___: Any) -> None:
            if not state.is_world_process_zero:
                return
            numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            numbers["seconds"] = round(time.perf_counter() - self.began, 3)
            numbers |= {name: numbers[name] + past for name, past in self.before.items() if name in numbers}
            with (job.folder / CURVE).open("a", encoding="utf-8") as file:
                file.write(line_of({"step": state.global_step, **numbers}))
            self.loss = numbers.get("loss", self.loss)
            if "loss" in numbers and not math.isfinite(numbers["loss"]):
                raise UserError(
                    f"{job.section}: the loss is {numbers['loss']} at step {state.global_step}; lower"
                    f" {job.section}.args.learning_rate, or look for rows that are empty once cut"
                )

        def on_train_end(self, _: Any, __: Any, ___: Any, **____: Any) -> None:
            self.shown.close()

    return Watcher()


def main(arguments: Sequence[str]) -> None:
    """One of the processes of a launched job."""
    from pipeline import cli

    cli.alone(lambda: train(Job.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(sys.argv[1:])
