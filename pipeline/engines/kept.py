"""One engine that stays up from call to call, for those who ask in many ways."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline.config import Teacher
from pipeline.engines import engine
from pipeline.teacher import Ask

LOADED = {
    "transformers": {"model", "revision", "trust_remote_code", "dtype", "device"},
    "vllm": {
        *("model", "revision", "dtype", "device", "quantization", "max_model_len", "top_logprobs", "engine_args"),
        *("trust_remote_code", "tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization"),
    },
    "openai": {"model", "base_url", "api_key_env"},
}
"""Settings that an engine is started with; it takes all others anew with each call."""


class Kept:
    """Brings a teacher up when it is first asked, and takes it down when another is, or at the end."""

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
        self.loaded = self.ask = None
        self.running.close()

    @contextmanager
    def start(self, teacher: Teacher) -> Iterator[Ask]:
        """The engine of this teacher, which stays up; one that asks by file writes its requests when it is left."""
        starting = engine(teacher)
        if teacher.batch_folder:
            with starting as ask:
                yield ask
            return
        wanted = teacher.model_dump(include={"engine", *LOADED[teacher.engine]})
        if self.ask is None or wanted != self.loaded:
            self.close()
            self.ask, self.loaded = self.running.enter_context(starting), wanted
        yield self.ask
