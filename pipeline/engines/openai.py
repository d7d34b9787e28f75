"""A teacher behind any OpenAI-compatible endpoint: many requests in flight, failed ones sent again."""

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.config import Teacher
from pipeline.errors import UserError, needs
from pipeline.models import first_tokens, locate
from pipeline.prompts import CUT_MARK, Prompt
from pipeline.teacher import Answer, Question, Record

log = logging.getLogger("gristmill")

BYTES_PER_TOKEN = 4
"""Stands in for an unknown tokenizer when documents are cut."""

GIVE_UP_AFTER = 20
"""Documents that fail in a row, with none answered in between, before the endpoint counts as down."""

CONTROL = re.compile(
    r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>",
    re.IGNORECASE,
)
"""Control tokens of common chat templates, which some servers obey inside a document."""

Cut = Callable[[str], tuple[str, bool]]


def ask(prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record) -> None:
    """Ask an endpoint; an answer is recorded the moment it arrives."""
    open_questions = [question for question in questions if question.key not in answered]
    if open_questions:
        asyncio.run(Endpoint(prompt, teacher, record).ask_all(iter(open_questions)))


class Endpoint:
    """One endpoint with one prompt."""

    def __init__(self, prompt: Prompt, teacher: Teacher, record: Record) -> None:
        self.openai = needs("openai", "openai")
        self.stamina = needs("stamina", "openai")
        self.prompt, self.settings, self.record = prompt, teacher, record
        self.cut = cutter(teacher)
        self.failed_in_a_row = 0
        self.seen: set[str] = set()

    async def ask_all(self, questions: Iterator[Question]) -> None:
        """Keep `concurrency` requests in flight until every question is answered or has failed."""
        key = os.environ.get(self.settings.api_key_env)
        if key is None and self.settings.base_url is None:
            raise UserError(
                f"teacher.api_key_env: {self.settings.api_key_env} is not set; export the endpoint's key in it"
            )
        async with self.openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=self.settings.base_url,
            timeout=self.settings.timeout_s,
            max_retries=0,
        ) as client:
            workers = [self.work(client, questions) for _ in range(self.settings.concurrency)]
            await asyncio.gather(*workers)
        self.check_choices_seen()

    async def work(self, client: Any, questions: Iterator[Question]) -> None:
        """Ask one question after another."""
        for question in questions:
            answer = await self.answer(client, question)
            self.record([(question.key, answer)])
            self.failed_in_a_row = self.failed_in_a_row + 1 if answer.finish == "failed" else 0
            self.seen |= {name for name, log_p in (answer.log_probs or {}).items() if log_p > -math.inf}

    async def answer(self, client: Any, question: Question) -> Answer:
        """One answer, or a failed one after all retries."""
        openai, url = self.openai, client.base_url
        begin = time.perf_counter()
        document, was_cut = self.cut(self.prompt.fence(break_control_tokens(question.text)))
        document += CUT_MARK if was_cut else ""
        try:
            answer = await self.retried(client, document)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(
                f"{url} refuses: {one_line(error)}; check --teacher.model, --teacher.base-url and the key in"
                f" {self.settings.api_key_env}; every answer so far is recorded"
            ) from None
        except (openai.OpenAIError, Garbage) as error:
            log.warning("request failed for good: %s", one_line(error))
            self.check_alive(url, error)
            return Answer("failed")
        return Answer(**answer, seconds=time.perf_counter() - begin, was_cut=was_cut)

    async def retried(self, client: Any, document: str) -> dict[str, Any]:
        """Send until it succeeds or the retries are used up."""
        async for attempt in self.stamina.retry_context(
            on=self.pause_before_retry, attempts=self.settings.retries + 1, timeout=None, wait_max=30.0
        ):
            with attempt:
                send = self.send_chat if self.prompt.chat else self.send_text
                return await send(client, document)
        raise AssertionError("unreachable")

    def pause_before_retry(self, error: Exception) -> bool | float:
        """Whether to send again; the seconds to wait where the endpoint names them (Retry-After)."""
        openai = self.openai
        if isinstance(error, openai.RateLimitError | openai.InternalServerError):
            after = error.response.headers.get("retry-after", "")
            return min(float(after), 120.0) if after.replace(".", "", 1).isdigit() else True
        again = (
            openai.APIConnectionError,
            openai.ConflictError,
            openai.APIResponseValidationError,
            Garbage,
            ValueError,
        )
        return isinstance(error, again) and not isinstance(error, UserError)

    def check_alive(self, url: object, error: Exception) -> None:
        """Stop when nothing has been answered for long: the endpoint is down, or refuses every request."""
        if self.failed_in_a_row >= GIVE_UP_AFTER:
            raise UserError(
                f"{url} failed {self.failed_in_a_row} times in a row ({one_line(error)}); every answer so far is"
                " recorded, run the same command to go on"
            )

    # -- one request

    async def send_chat(self, client: Any, document: str) -> dict[str, Any]:
        """One chat completion."""
        messages = self.prompt.turns(document)
        extra: dict[str, Any] = {}
        if self.prompt.answer_start:
            messages = [*messages, {"role": "assistant", "content": self.prompt.answer_start}]
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        if self.settings.chat_template_args:
            extra["chat_template_kwargs"] = self.settings.chat_template_args
        top = {"logprobs": True, "top_logprobs": self.settings.top_logprobs}
        body = self.body(top) | extra | self.settings.args
        response = await client.chat.completions.create(
            model=self.settings.model, messages=messages, extra_body=without_none(body)
        )
        choice = first_choice(response)
        if getattr(choice.message, "refusal", None):
            return self.read(response, "refused", choice.message.refusal, {})
        tokens = choice.logprobs.content if choice.logprobs else None
        found = {item.token: item.logprob for item in tokens[0].top_logprobs} if tokens else {}
        return self.read(response, choice.finish_reason, choice.message.content or "", found)

    async def send_text(self, client: Any, document: str) -> dict[str, Any]:
        """One plain completion (prompts with chat: false)."""
        before, after = self.prompt.around()
        system = f"{self.prompt.system}\n\n" if self.prompt.system else ""
        body = self.body({"logprobs": self.settings.top_logprobs}) | self.settings.args
        response = await client.completions.create(
            model=self.settings.model,
            prompt=system + before + document + after + self.prompt.answer_start,
            extra_body=without_none(body),
        )
        choice = first_choice(response)
        tops = choice.logprobs.top_logprobs if choice.logprobs else None
        return self.read(response, choice.finish_reason, choice.text or "", dict(tops[0]) if tops else {})

    def body(self, top: dict[str, Any]) -> dict[str, Any]:
        """The sampling part of a request: one token with its rivals, or a written answer."""
        settings = self.settings
        if self.prompt.read == "choices":
            return {"max_tokens": 1, "temperature": 0.0, **top}
        room = {} if "max_completion_tokens" in settings.args else {"max_tokens": settings.max_tokens}
        seed = {"seed": settings.seed} if settings.temperature > 0 else {}
        return {**room, **seed, "temperature": settings.temperature, "top_p": settings.top_p}

    def read(self, response: Any, finish: str, text: str, found: dict[str, float]) -> dict[str, Any]:
        """What is kept of a response."""
        usage = response.usage
        kept: dict[str, Any] = {
            "text": text,
            "prompt_tokens": getattr(usage, "prompt_tokens", 0) or 0,
            "answer_tokens": getattr(usage, "completion_tokens", 0) or 0,
        }
        if finish in ("content_filter", "refused"):
            return {**kept, "finish": "refused"}
        if self.prompt.read != "choices":
            return {**kept, "finish": "length" if finish == "length" else "stop"}
        if not found:
            raise UserError(f"{self.settings.model} returns no log-probabilities; use a prompt with read: generate")
        return {
            **kept,
            "finish": "stop",
            "log_probs": {name: found.get(name, -math.inf) for name in self.prompt.candidates},
        }

    def check_choices_seen(self) -> None:
        """Refuse a group of candidates that never came up: they are several tokens, or too unlikely to be listed."""
        for choice in self.prompt.choices if self.seen else ():
            if not self.seen & set(choice.answers):
                raise UserError(
                    f"prompt {self.prompt.name}: none of {', '.join(map(repr, choice.answers))} was ever among the"
                    f" {self.settings.top_logprobs} likeliest tokens; each must be one token of {self.settings.model}"
                )


class Garbage(Exception):
    """A response with status 200 that is no completion."""


def first_choice(response: Any) -> Any:
    """The completion in a response."""
    choices = getattr(response, "choices", None)
    if not choices:
        raise Garbage(f"no completion in the response: {str(response)[:80]!r}")
    return choices[0]


def cutter(teacher: Teacher) -> Cut:
    """Cuts a document to teacher.document_tokens: exactly if the tokenizer is known, else by bytes."""
    limit = teacher.document_tokens
    if teacher.tokenizer is None:
        log.info(
            "documents are cut at %d bytes; give --teacher.tokenizer to cut by tokens",
            limit * BYTES_PER_TOKEN,
        )
        return lambda text: cut_bytes(text, limit * BYTES_PER_TOKEN)
    tokenizer = needs("transformers", "torch").AutoTokenizer.from_pretrained(
        locate(teacher.tokenizer, "teacher.tokenizer")
    )

    def cut(text: str) -> tuple[str, bool]:
        ids, was_cut = first_tokens(text, limit, tokenizer)
        return (tokenizer.decode(ids) if was_cut else text), was_cut

    return cut


def cut_bytes(text: str, limit: int) -> tuple[str, bool]:
    """The first bytes of a text, whole characters only."""
    raw = text.encode("utf-8", "replace")
    return raw[:limit].decode("utf-8", "ignore"), len(raw) > limit


def break_control_tokens(text: str) -> str:
    """The text with chat-template tokens broken by a backslash, for servers that would obey them."""
    return CONTROL.sub(lambda m: m[0][0] + "\\" + m[0][1:], text)


def without_none(body: dict[str, Any]) -> dict[str, Any]:
    """A request body without unset fields; `args: {temperature: null}` takes one away."""
    return {name: value for name, value in body.items() if value is not None}


def one_line(error: Exception) -> str:
    """An error's first line, cut."""
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if str(error).strip()
        else type(error).__name__
    )
