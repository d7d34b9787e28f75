"""Supervised fine-tuning: texts, or replies to prompts, of which only the replies are learned."""

from typing import Any

from pipeline import arguments, config, language_model, training
from pipeline.errors import UserError, needs
from pipeline.models import pick_device
from pipeline.training import Job

TEXTS = {"packing": True, "packing_strategy": "wrapped", "max_length": 512, "learning_rate": 5e-5}
"""Arguments of SFTConfig for texts: rows follow one another in blocks of equal length, so that nothing of a longer one
is left out; with packing: false each row is a block, and its end is cut off."""
REPLIES = {"packing": False, "max_length": 1024, "learning_rate": 2e-5}
"""The same for replies."""
FEWEST_TOKENS = 8
"""Of a block."""


def check(settings: config.Training, section: str) -> None:
    """Refuse what SFTConfig and LoraConfig do not take, and a launch that is not there, before anything is loaded."""
    trl, peft = needs("trl", "finetune"), needs("peft", "finetune")
    arguments.check_device(settings.device, section)
    training.check_launch(settings.launch, section)
    args = arguments.known(trl.SFTConfig, settings.args, f"{section}.args")
    arguments.known(peft.LoraConfig, settings.lora, f"{section}.lora")
    length = args.get("max_length")
    if length is not None and length < FEWEST_TOKENS:
        raise UserError(f"{section}.args.max_length: {length} tokens are no text; give {FEWEST_TOKENS} or more")
    if args.get("load_best_model_at_end"):
        raise UserError(
            f"{section}.args.load_best_model_at_end: what is held out would choose the checkpoint, and then judge it;"
            " leave it out"
        )


def train(job: Job) -> None:
    """Rows are texts (column `text`), or replies (`user_input`, `completion`). The loss on rows held out is looked at
    before and after each epoch where args.eval_strategy does not say when."""
    trl, datasets = needs("trl", "finetune"), needs("datasets", "datasets")
    tokenizer, model = language_model.load(job.model, f"{job.section}.model", pick_device(job.device), job.revision)
    parts = {
        name: datasets.Dataset.from_parquet(str(path), cache_dir=str(job.folder / training.CACHE))
        for name, path in (("rows", job.rows), ("held_out", job.held_out))
        if path
    }
    has_replies = "completion" in parts["rows"].column_names
    looks = {"eval_strategy": "epoch", "eval_on_start": True} if job.held_out else {}
    settings = arguments.of(trl.SFTConfig, job, (REPLIES if has_replies else TEXTS) | looks)
    if settings.max_length is not None:
        check_context(settings.max_length, model, job.section)
    if has_replies:
        training.check_chat_template(tokenizer, f"{job.section}.model", job.model)
        parts = {name: conversations(part) for name, part in parts.items()}
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=parts["rows"],
        eval_dataset=parts.get("held_out"),
        processing_class=tokenizer,
        peft_config=arguments.lora(job),
    )
    if len(trainer.train_dataset) == 0:
        raise UserError(
            f"{job.section}: {job.rows} does not fill one block of {settings.max_length} tokens; lower"
            f" {job.section}.args.max_length, or give more text"
        )
    training.work(trainer, job, tokenizer)


def block(model: Any, args: dict[str, Any], section: str) -> int:
    """Tokens of a block of texts."""
    length = args.get("max_length", TEXTS["max_length"]) or min(1024, language_model.context(model))
    check_context(int(length), model, section)
    return int(length)


def check_context(length: int, model: Any, section: str) -> None:
    """Refuse blocks that the model cannot read."""
    if length > language_model.context(model):
        most = language_model.context(model)
        raise UserError(f"{section}.args.max_length: {length} is more than the {most} tokens that the model reads")


def conversations(rows: Any) -> Any:
    """Rows as TRL reads them: the loss is on the completion alone."""
    return rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["user_input"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        },
        remove_columns=rows.column_names,
    )
