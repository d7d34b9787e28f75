"""Who runs a teacher: one file per engine, each with a function `started` that yields an Ask (pipeline.teacher)."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from pipeline.config import Recipe, Teacher
from pipeline.errors import UserError, required
from pipeline.sampling import check
from pipeline.teacher import Ask


def of(recipe: Recipe) -> Callable[[Teacher], AbstractContextManager[Ask]]:
    """Brings up the teachers of a recipe: here, or in the actors of a cluster. Of an endpoint these would ask no
    faster."""

    def start(teacher: Teacher) -> AbstractContextManager[Ask]:
        here = engine(teacher)
        if recipe.engine == "local" or teacher.engine == "openai":
            return here
        from pipeline.engines import ray

        ray.check(recipe.ray, teacher)
        return ray.started(recipe.ray, teacher)

    return start


def engine(teacher: Teacher) -> AbstractContextManager[Ask]:
    """The engine by its name, its settings looked at; a model is loaded when it is entered."""
    required(teacher.model, "teacher.model", "Qwen/Qwen3-8B")
    check(teacher)
    if "@" in (teacher.base_url or ""):
        raise UserError("teacher.base_url: a URL must not hold a password; put the key in the environment")
    if teacher.batch_folder and teacher.engine != "openai":
        raise UserError(f"teacher.batch_folder: {teacher.engine} asks no endpoint; set --teacher.engine openai")
    if teacher.batch_folder:
        from pipeline.engines import batch

        return batch.started(teacher)
    if teacher.engine == "openai":
        from pipeline.engines import openai

        openai.check(teacher)
        return openai.started(teacher)
    if teacher.engine == "vllm":
        from pipeline.engines import vllm

        return vllm.started(teacher)
    from pipeline.engines import transformers

    return transformers.started(teacher)
