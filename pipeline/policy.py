"""Learning from rewards through TRL: GRPO and RLOO on sampled replies, DPO on rated pairs; replies are kept."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import arguments, language_model, rewards, training
from pipeline.config import Recipe, load_recipe
from pipeline.errors import UserError, needs, required
from pipeline.judge import Judge, Pair
from pipeline.models import pick_device
from pipeline.rewards import Reward
from pipeline.storage import read_lines, write_text
from pipeline.training import CACHE, Job, line_of

CONVERSATIONS, ENDED = "conversations.jsonl", "ended.json"
"""Every reply that was rewarded, and how the training ended."""

SAMPLED = {
    "beta": 0.04,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "learning_rate": 1e-5,
}
"""Arguments of GRPOConfig and RLOOConfig: beta keeps the policy near the actor, so that it does not leave what the
reward was learned on."""
PAIRED = {"beta": 0.1, "num_train_epochs": 1, "learning_rate": 1e-6, "max_length": 1024}
"""The same of DPOConfig."""


class Kind(NamedTuple):
    """TRL's names of an algorithm, and our defaults."""

    trainer: str
    config: str
    defaults: dict[str, Any]


KINDS = {
    "grpo": Kind("GRPOTrainer", "GRPOConfig", SAMPLED),
    "rloo": Kind("RLOOTrainer", "RLOOConfig", SAMPLED),
    "dpo": Kind("DPOTrainer", "DPOConfig", PAIRED),
}

Rewarding = Callable[..., list[float | None]]
"""A reward as TRL calls it."""


def train(job: Job) -> None:
    """Rows are prompts (column `user_input`), for dpo with two replies (`chosen`, `rejected`)."""
    datasets = needs("datasets", "datasets")
    recipe = load_recipe(required(job.recipe, "recipe", "that of the run folder"), {})
    tokenizer, model = language_model.load(job.model, f"{job.section}.model", pick_device(job.device), job.revision)
    training.check_chat_template(tokenizer, f"{job.section}.model", job.model)
    rows = datasets.Dataset.from_parquet(str(job.rows), cache_dir=str(job.folder / CACHE))
    rows = rows.map(as_messages, remove_columns=rows.column_names)
    if job.trainer == "dpo":
        training.work(made(job, recipe, model, tokenizer, rows), job, tokenizer)
        return
    with rewards.load(share_of(recipe)) as reward:
        log = Conversations(job.folder / CONVERSATIONS, training.last_checkpoint(job.folder / training.CHECKPOINTS))
        learned_from = Rewarded(reward, recipe.rl.repetition_penalty, log)
        trainer = made(job, recipe, model, tokenizer, rows, reward_funcs=learned_from.functions())
        trainer.add_callback(stopping(learned_from))
        training.work(trainer, job, tokenizer)
        ended = learned_from.ended()
        if log.writes:
            write_text(job.folder / ENDED, json.dumps(ended) + "\n")


def made(job: Job, recipe: Recipe, model: Any, tokenizer: Any, rows: Any, **more: Any) -> Any:
    """TRL's trainer of the job."""
    trl, kind = needs("trl", "finetune"), KINDS[job.trainer]
    settings = arguments.of(getattr(trl, kind.config), job, {**kind.defaults, **of_replies(job, recipe)})
    check_batch(len(rows), settings)
    return getattr(trl, kind.trainer)(
        model=model,
        args=settings,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=arguments.lora(job),
        **more,
    )


def check_batch(n_rows: int, settings: Any) -> None:
    """Refuse fewer prompts than one batch has, of which nothing would be learned."""
    at_a_time = getattr(settings, "generation_batch_size", 0) // getattr(settings, "num_generations", 1)
    if n_rows < at_a_time:
        raise UserError(
            f"rl: {n_rows} prompts do not fill a batch of {at_a_time}; give more, or lower"
            " rl.args.per_device_train_batch_size, or raise rl.args.num_generations"
        )


def of_replies(job: Job, recipe: Recipe) -> dict[str, Any]:
    """How replies are sampled: as those that the reward learned from."""
    if job.trainer == "dpo":
        return {}
    return {"max_completion_length": recipe.align.reply_tokens, "temperature": recipe.align.reply_temperature or 1.0}


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    """A row as TRL reads conversations."""
    replies = {str(name): [{"role": "assistant", "content": row[name]}] for name in row if name != "user_input"}
    return {"prompt": [{"role": "user", "content": row["user_input"]}], **replies}


# -- several processes ------------------------------------------------------------------------------------------------


def share_of(recipe: Recipe) -> Recipe:
    """The recipe with what each process may spend on the teacher."""
    n = needs("accelerate", "finetune").PartialState().num_processes
    given = {name: getattr(recipe.reward, name) for name in ("budget_usd", "budget_tokens")}
    shares = {name: value / n for name, value in given.items() if value is not None}
    return recipe.model_copy(update={"reward": recipe.reward.model_copy(update=shares)})


def of_all(values: list[Any]) -> list[Any]:
    """The values of all processes, each of which has to call this."""
    found: list[Any] = needs("accelerate", "finetune").utils.gather_object(values)
    return found


# -- rewards as TRL calls them ----------------------------------------------------------------------------------------


class Rewarded:
    """The reward and the repetition penalty, as two functions whose means TRL logs apart."""

    def __init__(self, reward: Reward, penalty: float, log: "Conversations") -> None:
        self.reward, self.penalty, self.log = reward, penalty, log
        self.found: list[float | None] = []

    def functions(self) -> list[Rewarding]:
        """For `reward_funcs`, called in this order on the same replies."""
        return [self.score, self.repetition] if self.penalty else [self.score]

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], trainer_state: Any, **_: Any) -> list[Any]:
        """The reward; None, which TRL leaves out, where a reply has none."""
        pairs = [(asked[-1]["content"], said[-1]["content"]) for asked, said in zip(prompts, completions, strict=True)]
        self.found = [None if np.isnan(value) else float(value) for value in self.reward(pairs)]
        self.log.add(trainer_state.global_step, pairs, self.found)
        return self.found

    def repetition(self, completions: Sequence[Any], **_: Any) -> list[Any]:
        """What is taken off; None where there is no reward either, as TRL would take the rest for all of it."""
        repeated = [rewards.repetition(said[-1]["content"]) for said in completions]
        return [
            None if value is None else -self.penalty * share for value, share in zip(self.found, repeated, strict=True)
        ]

    @property
    def stopped_by(self) -> str | None:
        """The teacher's budget, once it is spent."""
        return self.reward.stopped_by if isinstance(self.reward, Judge) else None

    def ended(self) -> dict[str, Any]:
        """For the result, of all processes."""
        judge = self.reward if isinstance(self.reward, Judge) else None
        own = self.stopped_by, judge.spending.n_asked if judge else 0, judge.usd if judge else None
        stopped_by, n_asked, usd = zip(*of_all([own]), strict=True)
        total = None if None in usd else sum(usd)
        return {"stopped_by": next(filter(None, stopped_by), None), "n_asked": sum(n_asked), "usd": total}


def stopping(learned_from: Rewarded) -> Any:
    """A callback that ends the training in all processes where the teacher's budget is spent: what was learned is
    kept."""
    transformers = needs("transformers", "torch")

    class Stopping(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            control.should_training_stop |= any(of_all([learned_from.stopped_by]))

    return Stopping()


class Conversations:
    """The log of replies, {step, user_input, completion, reward} a line; what came after the checkpoint that a
    training goes on from is taken back. Of several processes the first one writes those of all."""

    def __init__(self, path: Path, begun: Path | None) -> None:
        self.path, at = path, int(begun.name.rpartition("-")[2]) if begun else 0
        self.writes = bool(needs("accelerate", "finetune").PartialState().is_main_process)
        if self.writes:
            kept = [line for line in read_lines(path) if line["step"] < at]
            write_text(path, "".join(map(line_of, kept)))

    def add(self, step: int, pairs: Sequence[Pair], found: Sequence[float | None]) -> None:
        """Replies sampled after so many steps."""
        lines = of_all(
            [
                line_of({"step": step, "user_input": prompt, "completion": reply, "reward": value})
                for (prompt, reply), value in zip(pairs, found, strict=True)
            ]
        )
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
