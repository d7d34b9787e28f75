"""A teacher on this machine through vLLM: the engine batches as it goes and keeps the rubric's prefix in its cache."""

import asyncio
import difflib
import logging
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple
from uuid import uuid4

from pipeline.config import Teacher
from pipeline.engines.completions import next_tokens
from pipeline.engines.layout import Layout
from pipeline.errors import UserError, needs, required
from pipeline.models import load_tokenizer, locate
from pipeline.prompts import Prompt
from pipeline.sampling import is_sampled
from pipeline.teacher import Answer, Ask, Question, Record

log = logging.getLogger("gristmill")

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""Given to vLLM where the user's environment says nothing else: a clean stdout, no report to its makers, no fork of a
process that has threads."""

IN_FLIGHT = 256
"""Fewest requests handed to the engine at a time, which schedules them itself: with less a GPU waits for work."""

STOP_S = 30.0
"""Seconds the engine's processes have to end by themselves."""

GIVE_UP_AFTER = 20
"""Documents that fail in a row before the settings count as wrong."""

GUARD = """
import contextlib, os, signal, sys
engines = [os.pidfd_open(int(pid)) for pid in sys.argv[1:]]
if not sys.stdin.read():
    for engine in engines:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(engine, signal.SIGKILL)
"""
"""Waits for the end of its parent, and ends the parent's engines if it came without a word."""


class Loaded(NamedTuple):
    """A running engine."""

    vllm: Any
    engine: Any
    tokenizer: Any


@contextmanager
def started(teacher: Teacher) -> Iterator[Ask]:
    """The engine in processes of its own, which end with this context, on an error and on Ctrl-C too. vLLM leaves them
    behind, holding the GPU, when this process is killed (kill -9, out of memory); a guard ends them then."""
    if sys.version_info < (3, 11):
        raise UserError("teacher.engine: vllm needs Python 3.11 or newer; transformers and openai do not")
    with asyncio.Runner() as runner:
        loaded = runner.run(load(teacher))

        def ask(
            prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record
        ) -> None:
            open_questions = [question for question in questions if question.key not in answered]
            runner.run(Asking(prompt, teacher, loaded, record).ask_all(open_questions))

        try:
            with guarded():
                yield ask
        finally:
            loaded.engine.shutdown(timeout=STOP_S)
            loaded.engine.shutdown = bool  # vLLM calls it again when Python ends, and then fails


@contextmanager
def guarded() -> Iterator[None]:
    """Ends the engine's processes should this one be killed; their own workers follow them."""
    if not hasattr(os, "pidfd_open"):
        yield
        return
    engines = [str(process.pid) for process in multiprocessing.active_children()]
    command = [sys.executable, "-c", GUARD, *engines]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603
    try:
        yield
    finally:
        guard.communicate(b"done")


class Asking:
    """One prompt before a running engine."""

    def __init__(self, prompt: Prompt, teacher: Teacher, loaded: Loaded, record: Record) -> None:
        self.vllm, self.engine, _ = loaded
        self.prompt, self.settings, self.record = prompt, teacher, record
        self.layout = Layout(loaded.tokenizer, prompt, teacher, self.engine.model_config.max_model_len)
        self.next = next_tokens(self.layout.candidates)
        self.names_tokens = names_tokens(self.vllm)
        self.errors = (ValueError, TypeError, vllm_error())
        self.arrived: list[tuple[str, Answer]] = []
        self.n_failed_in_a_row = self.n_prompt_tokens = self.n_cached_tokens = 0

    async def ask_all(self, questions: list[Question]) -> None:
        """Keep the engine supplied until every question is answered or has failed."""
        self.check_args()
        queue, n_workers = iter(questions), min(max(self.settings.concurrency, IN_FLIGHT), len(questions))
        workers = [asyncio.create_task(self.work(queue)) for _ in range(n_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            deque(queue, maxlen=0)
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            self.keep()
        if self.n_prompt_tokens:
            log.info("teacher: %.0f%% of the prompt tokens were cached", self.cached_share * 100)

    @property
    def cached_share(self) -> float:
        """Share of the prompt tokens that came from the prefix cache."""
        return self.n_cached_tokens / self.n_prompt_tokens

    async def work(self, queue: Iterator[Question]) -> None:
        """Ask one question after another."""
        for question in queue:
            answer = await self.answer(question)
            self.arrived.append((question.key, answer))
            await asyncio.sleep(0)
            if not self.keep():
                deque(queue, maxlen=0)

    def keep(self) -> bool:
        """Record what has arrived, together: each recording waits for the disk."""
        arrived, self.arrived = self.arrived, []
        return not arrived or self.record(arrived)

    async def answer(self, question: Question) -> Answer:
        """One answer; a document that the engine refuses costs only itself."""
        begin, row = time.perf_counter(), self.layout.row(question)
        ids = self.layout.whole(row)
        ask = self.choose if self.prompt.read == "choices" else self.generate
        try:
            said = await ask(ids, question.key)
        except self.errors as error:
            said = self.failed(error)
        self.n_failed_in_a_row = self.n_failed_in_a_row + 1 if said["finish"] == "failed" else 0
        seconds = time.perf_counter() - begin
        return Answer(**said, prompt_tokens=len(ids), seconds=seconds, was_truncated=row.was_truncated)

    def failed(self, error: Exception) -> dict[str, Any]:
        """What is recorded of a document that the engine refuses; stop where it refuses all or is gone."""
        reason = one_line(error)
        if self.engine.errored:
            raise UserError(
                f"vLLM stopped while it ran {self.settings.model} (its log is above); every answer so far is recorded,"
                " run the same command to go on, with a lower --teacher.gpu-memory-utilization if memory ran out"
            )
        if self.n_failed_in_a_row + 1 >= GIVE_UP_AFTER:
            raise UserError(
                f"prompt {self.prompt.name}: vLLM refuses {GIVE_UP_AFTER} documents in a row ({reason}); mend the"
                " prompt or teacher.args, and run the same command to go on"
            )
        log.warning("teacher: a document failed (%s)", reason)
        return {"finish": "failed"}

    async def request(self, ids: list[int], params: Any, priority: int = 0) -> Any:
        """The finished output of one request; the lowest priority goes first."""
        params.output_kind = type(params.output_kind).FINAL_ONLY
        outputs = self.engine.generate(tokens(ids), params, uuid4().hex, priority=priority)
        *_, last = [out async for out in outputs]
        self.n_prompt_tokens += len(ids)
        self.n_cached_tokens += last.num_cached_tokens or 0
        if last.outputs[0].finish_reason not in ("stop", "length"):
            raise ValueError(f"vLLM ended an answer with {last.outputs[0].finish_reason}")
        return last.outputs[0]

    # -- choices

    async def choose(self, ids: list[int], _: str) -> dict[str, Any]:
        """Log-probability of each candidate as the next tokens, over the full vocabulary and exact: the product over
        its tokens, those after the first from further requests. These go before other documents, while the prompt is
        still in the prefix cache."""
        log_probs: dict[tuple[int, ...], float] = {(): 0.0}
        for before, following in self.next.items():
            out = await self.request([*ids, *before], self.naming(following), -len(before))
            for token in following:
                log_p = out.logprobs[0][token].logprob if token in out.logprobs[0] else -math.inf
                log_probs[(*before, token)] = log_probs[before] + log_p
        named = self.layout.candidates.items()
        return {"finish": "stop", "log_probs": {name: log_probs[tuple(c)] if c else -math.inf for name, c in named}}

    def naming(self, tokens: list[int]) -> Any:
        """Asks for the log-probabilities of these tokens; of the likeliest ones where vLLM is too old to be told."""
        asked = {"logprob_token_ids": tokens} if self.names_tokens else {"logprobs": self.settings.top_logprobs}
        return self.vllm.SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, **asked)

    # -- generate

    async def generate(self, ids: list[int], key: str) -> dict[str, Any]:
        """A written answer."""
        out = await self.request(ids, self.sampling(key))
        return {"finish": out.finish_reason, "text": out.text, "answer_tokens": len(out.token_ids)}

    def sampling(self, key: str) -> Any:
        """How an answer is written; teacher.args has the last word. The seed is the document's own, so that a sample
        doesn't depend on what else is in the batch."""
        settings = self.settings
        named, seed = {"max_tokens", "temperature", "repetition_penalty"}, {}
        if is_sampled(settings):
            named |= {"top_p", "top_k", "min_p"}
            seed = {"seed": settings.seed + int(key[-8:], 16)}
        asked = settings.model_dump(include=named, exclude_none=True) | {"stop": list(settings.stop)}
        return self.vllm.SamplingParams(**{**asked, **seed, **self.form(), **settings.args})

    def form(self) -> dict[str, Any]:
        """Structured output, where the prompt asks for a form."""
        form = self.prompt.form
        if form is None or not self.settings.structured:
            return {}
        parameters = needs("vllm.sampling_params", "vllm").StructuredOutputsParams
        return {"structured_outputs": parameters(**{form.kind: form.value})}

    def check_args(self) -> None:
        """Refuse arguments that vLLM doesn't know before the first document."""
        try:
            if self.prompt.read != "choices":
                self.sampling("0")
        except self.errors as error:
            raise UserError(f"teacher.args: vLLM's SamplingParams refuses them ({one_line(error)})") from None


def tokens(ids: list[int]) -> dict[str, Any]:
    """A prompt of token ids, ready for the engine."""
    return {"type": "token", "prompt_token_ids": ids}


def names_tokens(vllm: Any) -> bool:
    """Whether this vLLM gives the log-probabilities of named tokens, not only of the likeliest."""
    return "logprob_token_ids" in vllm.SamplingParams.__struct_fields__


def vllm_error() -> Any:
    """What vLLM's own exceptions have in common."""
    return needs("vllm.exceptions", "vllm").VLLMError


# -- loading


async def load(teacher: Teacher) -> Loaded:
    """Start the engine; it belongs to the event loop that it is started in."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    vllm = needs("vllm", "vllm")
    check_device(teacher, needs("vllm.platforms", "vllm").current_platform.device_type)
    asked = engine_args(teacher, [field.name for field in fields(vllm.AsyncEngineArgs)])
    name, trust = asked.get("tokenizer", asked["model"]), asked["trust_remote_code"]
    tokenizer = load_tokenizer(name, "teacher.model", teacher.revision, trust)
    refusals = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AssertionError)
    try:
        engine = vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**asked))
    except (*refusals, vllm_error()) as error:
        raise UserError(f"teacher.model: vLLM cannot load {teacher.model} ({one_line(error)})") from None
    await asyncio.sleep(0)  # where Ctrl-C is heard that came while it loaded
    return Loaded(vllm, engine, tokenizer)


def check_device(teacher: Teacher, present: str) -> None:
    """Refuse a device that vLLM would not use."""
    if teacher.device not in (None, present):
        raise UserError(
            f"teacher.device: vLLM runs on {present} here, not on {teacher.device}; leave it out, and choose among"
            " GPUs with CUDA_VISIBLE_DEVICES"
        )


def engine_args(teacher: Teacher, known: list[str]) -> dict[str, Any]:
    """The engine's arguments; teacher.engine_args has the last word. JSON has no blanks: small models write many."""
    for name in teacher.engine_args.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see AsyncEngineArgs of the installed vLLM"
        raise UserError(f"teacher.engine_args: vLLM has no {name}; {hint}")
    asked = {
        "model": locate(required(teacher.model, "teacher.model", "Qwen/Qwen3-8B"), "teacher.model"),
        "revision": teacher.revision,
        "trust_remote_code": teacher.trust_remote_code,
        "dtype": teacher.dtype,
        "quantization": teacher.quantization,
        "max_model_len": teacher.max_model_len,
        "tensor_parallel_size": teacher.tensor_parallel_size,
        "data_parallel_size": teacher.data_parallel_size,
        "gpu_memory_utilization": teacher.gpu_memory_utilization,
        "seed": teacher.seed,
        "max_logprobs": teacher.top_logprobs,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    return {**{name: value for name, value in asked.items() if value is not None}, **teacher.engine_args}


def one_line(error: Exception) -> str:
    """What an error says, in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
