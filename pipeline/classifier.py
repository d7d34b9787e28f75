"""A sequence classifier with one output that learns scores: a reward that reads whole exchanges."""

from typing import Any

import numpy as np

from pipeline import arguments, language_model, rewards, training
from pipeline.errors import needs
from pipeline.training import Job

DEFAULTS = {"num_train_epochs": 3, "learning_rate": 2e-5, "per_device_train_batch_size": 8}
"""Arguments of TrainingArguments."""


def train(job: Job) -> None:
    """Rows are exchanges with scores (columns `user_input`, `completion`, `score`). It learns them with mean 0 and
    spread 1, and its configuration keeps how to turn its output back: score_offset + score_slope x output."""
    transformers, datasets = needs("transformers", "torch"), needs("datasets", "datasets")
    language_model.check_whole(job.model, f"{job.section}.model")
    one_number = {"num_labels": 1, "problem_type": "regression"}
    tokenizer, model = rewards.load_classifier(job.model, f"{job.section}.model", job.revision, **one_number)
    rows = datasets.Dataset.from_parquet(str(job.rows), cache_dir=str(job.folder / training.CACHE))
    scores = np.array(rows["score"], dtype=np.float64)
    model.config.score_offset, model.config.score_slope = float(scores.mean()), float(scores.std())
    settings = arguments.of(transformers.TrainingArguments, job, DEFAULTS)
    trainer = transformers.Trainer(
        model=adapted(model, job),
        args=settings,
        train_dataset=read(rows, tokenizer, model),
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    training.work(trainer, job, tokenizer)


def adapted(model: Any, job: Job) -> Any:
    """The model with the adapter that is trained, where LoRA is asked for."""
    settings = arguments.lora(job)
    return model if settings is None else needs("peft", "finetune").get_peft_model(model, settings)


def read(rows: Any, tokenizer: Any, model: Any) -> Any:
    """Token ids, and scores as they are learned."""
    offset, slope = rewards.scale_of(model)

    def of(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pairs = list(zip(batch["user_input"], batch["completion"], strict=True))
        labels = [(score - offset) / slope for score in batch["score"]]
        return {**rewards.tokens_of(tokenizer, pairs), "labels": labels}

    return rows.map(of, batched=True, remove_columns=rows.column_names)
