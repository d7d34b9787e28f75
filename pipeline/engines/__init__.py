"""Who runs a teacher: one file per engine, each with one function `ask` (see pipeline.teacher.Ask)."""

from pipeline.config import Teacher
from pipeline.errors import UserError, required
from pipeline.teacher import Ask


def engine(teacher: Teacher) -> Ask:
    """The engine by its name; its libraries are imported only now."""
    required(teacher.model, "teacher.model", "Qwen/Qwen3-8B")
    if "@" in (teacher.base_url or ""):
        raise UserError("teacher.base_url: a URL must not hold a password; put the key in the environment")
    if teacher.engine == "openai":
        from pipeline.engines import openai

        return openai.ask
    from pipeline.engines import transformers

    return transformers.ask
