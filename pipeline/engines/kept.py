"""One engine that stays up from call to call, for those who ask in many ways."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline.config import Teacher
from pipeline.engines import engine
from pipeline.teacher import Ask

ASKED_WITH = {
    *("document_tokens", "max_tokens", "temperature", "top_p", "top_k", "min_p", "tfs", "top_a", "repetition_penalty"),
    *("stop", "seed", "args", "chat_template_args", "structured", "batch_tokens", "top_logprobs"),
    *("usd_per_million_prompt_tokens", "usd_per_million_answer_tokens"),
}
"""Settings that a running engine takes anew with each call."""


class Kept:
    """Brings a teacher up when it is first asked, and takes it down when another model is, or at the end."""

    def __init__(self) -> None:
        self.running = ExitStack()
        self.loaded: dict[str, object] | None = None
        self.ask: Ask | None = None

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take it down."""
        self.running.close()
        self.loaded = self.ask = None

    @contextmanager
    def start(self, teacher: Teacher) -> Iterator[Ask]:
        """The engine of this teacher, which stays up."""
        wanted = teacher.model_dump(exclude=ASKED_WITH)
        if self.ask is None or wanted != self.loaded:
            self.close()
            self.ask, self.loaded = self.running.enter_context(engine(teacher)), wanted
        yield self.ask
