"""Arguments of a recipe for configuration classes of TRL, Transformers and peft: handed on as they are, or refused."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from pipeline.errors import UserError, needs
from pipeline.models import multiplies_bfloat16, pick_device
from pipeline.training import CHECKPOINTS, Job

EVERYWHERE = {
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": [],
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "dataloader_pin_memory": False,
}
"""Arguments of every trainer where the recipe says nothing."""


def of(kind: Any, job: Job, defaults: dict[str, Any]) -> Any:
    """A configuration class of TRL or Transformers with the job's arguments over the defaults; refuses what it does
    not take."""
    ours = {
        "output_dir": str(job.folder / CHECKPOINTS),
        "seed": job.seed,
        "disable_tqdm": True,
        **checkpointing(kind, job.args),
        **precision(pick_device(job.device)),
    }
    check_device(job.device, job.section)
    found = configured(kind, {**EVERYWHERE, **defaults, **ours, **job.args}, f"{job.section}.args", job.args)
    found._n_gpu = min(found.n_gpu, 1)  # else a single process takes a batch for each GPU there is
    return found


def check_device(device: str | None, section: str) -> None:
    """Refuse a GPU by number, which Transformers does not look at."""
    number = (device or "").partition(":")[2]
    if number.strip("0"):
        raise UserError(
            f"{section}.device: models are trained on the first GPU; set CUDA_VISIBLE_DEVICES={number} to make it that"
            f" one, or give {section}.launch for several"
        )


def checkpointing(kind: Any, given: Iterable[str]) -> dict[str, Any]:
    """No recomputing of activations where the recipe says nothing, by the name that this version has for it."""
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if {old, new} & set(given):
        return {old: None} if new in given else {}
    return {old: None, new: False} if new in {field.name for field in dataclasses.fields(kind)} else {old: False}


def precision(device: str) -> dict[str, Any]:
    """Where it runs; half precision only where the GPU has it, as TRL would ask for it everywhere."""
    on_cpu = device == "cpu"
    return {"use_cpu": on_cpu, "bf16": not on_cpu and device.startswith("cuda") and multiplies_bfloat16(device)}


def configured(kind: Any, values: dict[str, Any], setting: str, given: Iterable[str]) -> Any:
    """An instance of a configuration dataclass, of which the recipe has `given` some values."""
    read = known(kind, {name: values[name] for name in given}, setting)
    try:
        return kind(**{**values, **read})
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UserError(f"{setting}: {' '.join(str(error).split())[:300]}") from None


def known(kind: Any, given: dict[str, Any], setting: str) -> dict[str, Any]:
    """Values as the fields of a configuration dataclass hold them; the first key that it has no field for is named."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            told = f"did you mean {near[0]}?" if near else f"see the documentation of {kind.__name__}"
            raise UserError(f"{setting}: {name!r} is not an argument of {kind.__name__}; {told}")
    return {name: typed(fields[name].type, value, f"{setting}.{name}") for name, value in given.items()}


PLAIN = {"int": int, "float": float, "bool": bool}


def typed(kind: Any, value: Any, setting: str) -> Any:
    """A value of the recipe as what the field holds: to YAML, 1e-4 is a text."""
    kind = PLAIN.get(kind, Any) if isinstance(kind, str) else kind
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        told = error.errors()[0]["msg"]
        raise UserError(f"{setting}: {told[0].lower()}{told[1:]}, got {value!r}") from None
    except PydanticSchemaGenerationError:
        return value


def lora(job: Job) -> Any:
    """The LoraConfig, or None where all weights are trained."""
    if not job.lora:
        return None
    peft = needs("peft", "finetune")
    task = {"task_type": "SEQ_CLS" if job.trainer == "classifier" else "CAUSAL_LM"}
    return configured(peft.LoraConfig, {**task, **job.lora}, f"{job.section}.lora", job.lora)
