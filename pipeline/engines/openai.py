"""A teacher behind any OpenAI-compatible endpoint: many requests in flight, failed ones sent again."""

import asyncio
import json
import logging
import math
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import Teacher
from pipeline.errors import UserError, needs
from pipeline.models import first_tokens, locate
from pipeline.prompts import CUT_MARK, Prompt, log_sum_exp
from pipeline.teacher import Answer, Question, Record

log = logging.getLogger("gristmill")

OPENAI_URL = "https://api.openai.com/v1"

BYTES_PER_TOKEN = 4
"""Stands in for an unknown tokenizer when documents are cut."""

GIVE_UP_AFTER = 20
"""Documents without an answer in a row before the endpoint counts as down, and answers without a single candidate
before the prompt counts as wrong."""

CONNECT_S = 10.0
LONGEST_PAUSE_S = 120.0

ROUNDING = 0.01
"""Log-probabilities that are larger are none."""

PASSING = {408, 409, 425, 429}
"""Statuses that pass, beside those from 500 on: the request is sent again."""

ABOUT_THE_DOCUMENT = {400, 413, 422}
"""Statuses that speak of one request: too long, not allowed."""

CONTROL = re.compile(
    r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>",
    re.IGNORECASE,
)
"""Control tokens of common chat templates, which some servers obey inside a document."""

Cut = Callable[[str], tuple[str, bool]]
Json = Any
Pairs = list[tuple[str, float]]


def ask(prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record) -> None:
    """Ask an endpoint; an answer is recorded the moment it arrives."""
    open_questions = [question for question in questions if question.key not in answered]
    if open_questions:
        asyncio.run(Endpoint(prompt, teacher, record, proven=bool(answered)).ask_all(open_questions))


class NoAnswer(Exception):
    """A request that came to nothing without an error being sent: time-out, or something that is no completion."""


class Endpoint:
    """One endpoint with one prompt. `proven`: it has answered this prompt before, so its settings are right."""

    def __init__(self, prompt: Prompt, teacher: Teacher, record: Record, proven: bool) -> None:
        self.openai = needs("openai", "openai")
        self.stamina = needs("stamina", "openai")
        self.stamina.instrumentation.set_on_retry_hooks([])  # note() says more
        self.prompt, self.settings, self.record = prompt, teacher, record
        self.url, self.key = url_of(teacher), key_of(teacher)
        self.cut = cutter(teacher)
        self.proven, self.saw_candidate = proven, proven
        self.n_answered = self.n_failed_in_a_row = 0
        self.failures: Counter[str] = Counter()

    async def ask_all(self, questions: list[Question]) -> None:
        """Keep `concurrency` requests in flight until every question is answered or has failed."""
        queue, n_workers = iter(questions), min(self.settings.concurrency, len(questions))
        async with self.client() as client:
            workers = [asyncio.create_task(self.work(client, queue)) for _ in range(n_workers)]
            try:
                await asyncio.gather(*workers)
            finally:
                deque(queue, maxlen=0)  # before Python 3.12 an answer that arrives with a cancellation swallows it
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self.failures:
            log.info("teacher: failed requests: %s", ", ".join(f"{why} {n}" for why, n in self.failures.items()))

    def client(self) -> Any:
        """A client that sends each request once; how long one may take is seen to in `send`."""
        timeout = self.openai.Timeout(None, connect=min(CONNECT_S, self.settings.timeout_s))
        return self.openai.AsyncOpenAI(api_key=self.key or "none", base_url=self.url, timeout=timeout, max_retries=0)

    async def work(self, client: Any, queue: Iterator[Question]) -> None:
        """Ask one question after another."""
        for question in queue:
            begin = time.perf_counter()
            document, was_truncated = self.prepare(question.text)
            answer = await self.answer(client, document)
            seconds = time.perf_counter() - begin
            self.record([(question.key, replace(answer, seconds=seconds, was_truncated=was_truncated))])

    def prepare(self, text: str) -> tuple[str, bool]:
        """The document as it is sent, unable to leave its place, and whether it was cut.

        It is cut before it is guarded, so that 50 MB cost no more than a page, and again should the guards be long.
        """
        short, was_truncated = self.cut(well_formed(text))
        safe, cut_again = self.cut(self.prompt.fence(break_control_tokens(short)))
        was_truncated = was_truncated or cut_again
        return safe + (CUT_MARK if was_truncated else ""), was_truncated

    # -- retries

    async def answer(self, client: Any, document: str) -> Answer:
        """One answer, or a failed one after all retries."""
        try:
            answer = await self.retried(client, document)
        except (self.openai.OpenAIError, NoAnswer) as error:
            return self.failed(error)
        self.proven = True
        self.n_answered += 1
        self.n_failed_in_a_row = 0
        return answer

    async def retried(self, client: Any, document: str) -> Answer:
        """Send until it succeeds or the retries are used up."""
        send = self.send_chat if self.prompt.chat else self.send_text
        attempts = self.settings.retries + 1
        async for attempt in self.stamina.retry_context(
            on=self.pause_before_retry, attempts=attempts, timeout=None, wait_initial=0.5, wait_max=30.0
        ):
            with attempt:
                return await send(client, document)
        raise AssertionError("unreachable")

    def pause_before_retry(self, error: Any) -> bool | float:
        """Whether to send again; the seconds to wait where the endpoint names them (Retry-After)."""
        if isinstance(error, self.openai.APIStatusError):
            self.note(error, str(error.status_code))
            passing = error.status_code in PASSING or error.status_code >= 500
            return passing and (retry_after(error.response.headers) or True)
        if isinstance(error, (self.openai.APIConnectionError, NoAnswer)):
            self.note(error, type(error).__name__)
            return True
        return False

    def note(self, error: Exception, kind: str) -> None:
        """Count failed requests by kind; the first of a kind is logged."""
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            log.info("teacher: a request failed (%s)", self.one_line(error))

    def failed(self, error: Any) -> Answer:
        """What is recorded of a document without an answer."""
        if getattr(error, "code", None) == "content_filter":
            return Answer("refused")
        self.check_usable(getattr(error, "status_code", None), error)
        log.warning("teacher: a document failed (%s)", self.one_line(error))
        return Answer("failed")

    def check_usable(self, status: int | None, error: Exception) -> None:
        """Stop where no other request would fare better: wrong key or model, nobody there, no answer for long.

        A document that is refused as such says nothing about an endpoint that has answered others.
        """
        kept = "every answer so far is recorded, run the same command to go on"
        if status in (401, 404) or (status == 403 and not self.proven):
            raise UserError(
                f"{self.url} refuses ({self.one_line(error)}); check --teacher.model, --teacher.base-url and the key"
                f" in {self.settings.api_key_env}; {kept}"
            )
        if isinstance(error, self.openai.APIConnectionError) and not self.n_answered:
            raise UserError(
                f"{self.url} cannot be reached ({self.one_line(error)}); start it, or check --teacher.base-url; {kept}"
            )
        self.n_failed_in_a_row += not (self.proven and status in ABOUT_THE_DOCUMENT)
        if self.n_failed_in_a_row >= GIVE_UP_AFTER:
            raise UserError(
                f"{self.url} has no answer for {self.n_failed_in_a_row} documents in a row ({self.one_line(error)});"
                f" {kept}"
            )

    def one_line(self, error: Exception) -> str:
        """An error in one line, without the key, should the endpoint repeat it."""
        cause = error.__cause__ if isinstance(error, self.openai.APIConnectionError) else None
        said = " ".join(f"{type(error).__name__}: {cause or error}".split())
        return (said.replace(self.key, "***") if self.key else said)[:300]

    # -- one request

    async def send_chat(self, client: Any, document: str) -> Answer:
        """One chat completion."""
        messages = self.prompt.turns(document)
        extra: dict[str, Json] = {}
        if self.prompt.answer_start:
            messages = [*messages, {"role": "assistant", "content": self.prompt.answer_start}]
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        if self.settings.chat_template_args:
            extra["chat_template_kwargs"] = self.settings.chat_template_args
        rivals = {"logprobs": True, "top_logprobs": self.settings.top_logprobs}
        response = await self.send(client.chat.completions, {"messages": messages}, {**self.sampling(rivals), **extra})
        shown = dig(response, "choices", 0, "logprobs", "content")
        tops = None if shown is None else pairs(dig(shown, 0, "top_logprobs"))
        return self.read(response, dig(response, "choices", 0, "message"), "content", tops)

    async def send_text(self, client: Any, document: str) -> Answer:
        """One plain completion (prompts with chat: false)."""
        before, after = self.prompt.around()
        system = f"{self.prompt.system}\n\n" if self.prompt.system else ""
        text = system + before + document + after + self.prompt.answer_start
        rivals = {"logprobs": self.settings.top_logprobs}
        response = await self.send(client.completions, {"prompt": text}, self.sampling(rivals))
        shown = dig(response, "choices", 0, "logprobs", "top_logprobs")
        tops = None if shown is None else pairs(dig(shown, 0))
        return self.read(response, dig(response, "choices", 0), "text", tops)

    async def send(self, endpoint: Any, question: dict[str, Json], options: dict[str, Json]) -> Json:
        """The response to one request, as plain JSON; `args: {temperature: null}` takes an option away."""
        options = {name: value for name, value in {**options, **self.settings.args}.items() if value is not None}
        request = endpoint.with_raw_response.create(model=self.settings.model, **question, extra_body=options)
        try:
            response = await asyncio.wait_for(request, self.settings.timeout_s)
        except asyncio.TimeoutError:
            raise NoAnswer(f"no answer within {self.settings.timeout_s:g} s") from None
        return parse(response.content)

    def sampling(self, rivals: dict[str, Json]) -> dict[str, Json]:
        """The sampling part of a request: one token with its rivals, or a written answer."""
        settings = self.settings
        if self.prompt.read == "choices":
            asked = {"max_tokens": 1, "temperature": 0.0, **rivals}
        elif settings.temperature == 0:
            asked = {"max_tokens": settings.max_tokens, "temperature": 0.0}
        else:
            asked = {name: getattr(settings, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        return asked | ({"max_tokens": None} if "max_completion_tokens" in settings.args else {})

    def read(self, response: Json, said: Json, name: str, tops: Pairs | None) -> Answer:
        """What is kept of a response; `said` holds the text under `name`."""
        if not isinstance(said, dict) or dig(response, "choices", 0, "error"):
            raise NoAnswer(f"no completion in the response {str(response)[:80]!r}")
        finish = dig(response, "choices", 0, "finish_reason")
        refusal = said.get("refusal")
        answer = Answer(
            "length" if finish == "length" else "stop",
            text=well_formed(str(refusal or said.get(name) or "")),
            prompt_tokens=whole(dig(response, "usage", "prompt_tokens")),
            answer_tokens=whole(dig(response, "usage", "completion_tokens")),
        )
        if refusal or finish == "content_filter":
            return replace(answer, finish="refused")
        if self.prompt.read != "choices":
            return answer
        return replace(answer, finish="stop", log_probs=self.log_probs(tops))

    def log_probs(self, tops: Pairs | None) -> dict[str, float]:
        """Log-probability of each candidate, -inf where it is not listed; tokens of one spelling count together."""
        if tops is None and self.proven:
            raise NoAnswer("no log-probabilities in the response")
        if tops is None:
            raise UserError(
                f"{self.settings.model} at {self.url} returns no log-probabilities; use a prompt with read: generate"
            )
        found = {name: log_sum_exp([p for token, p in tops if token == name]) for name in self.prompt.candidates}
        self.saw_candidate = self.saw_candidate or max(found.values()) > -math.inf
        if not self.saw_candidate and self.n_answered + 1 >= GIVE_UP_AFTER:
            raise UserError(
                f"prompt {self.prompt.name}: none of {', '.join(map(repr, found))} was among the likeliest tokens of"
                f" {GIVE_UP_AFTER} answers; {self.settings.model} rather says"
                f" {', '.join(repr(token) for token, _ in tops[:5])}; spell the answers so, or lead to them with"
                " answer_start"
            )
        return found


# -- before the first request


def url_of(teacher: Teacher) -> str:
    """The endpoint, if its URL can be one."""
    url = teacher.base_url or OPENAI_URL
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"teacher.base_url: {url} is no URL; give one such as http://localhost:8000/v1")
    return url


def key_of(teacher: Teacher) -> str:
    """The endpoint's key from the environment; one's own endpoint may do without."""
    name = teacher.api_key_env
    key = os.environ.get(name, "").strip()
    if not key and teacher.base_url is None:
        raise UserError(f"teacher.api_key_env: {name} is not set; export the endpoint's key in it")
    if re.search(r"[^!-~]", key):
        raise UserError(f"teacher.api_key_env: {name} holds something that is no key (spaces, or not ASCII)")
    return key


def cutter(teacher: Teacher) -> Cut:
    """Cuts a document to teacher.document_tokens: exactly if the tokenizer is known, else by bytes."""
    limit = teacher.document_tokens
    if teacher.tokenizer is None:
        n_bytes = limit * BYTES_PER_TOKEN
        log.info("documents are cut at %d bytes; give --teacher.tokenizer to cut by tokens", n_bytes)
        return lambda text: cut_bytes(text, n_bytes)
    where = locate(teacher.tokenizer, "teacher.tokenizer")
    try:
        tokenizer = needs("transformers", "torch").AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"teacher.tokenizer: {teacher.tokenizer} cannot be loaded ({reason})") from None

    def cut(text: str) -> tuple[str, bool]:
        ids, was_truncated = first_tokens(text, limit, tokenizer)
        return (tokenizer.decode(ids).rstrip("\ufffd") if was_truncated else text), was_truncated

    return cut


def cut_bytes(text: str, limit: int) -> tuple[str, bool]:
    """The first bytes of a text, whole characters only."""
    raw = text.encode()
    return raw[:limit].decode("utf-8", "ignore"), len(raw) > limit


def break_control_tokens(text: str) -> str:
    """The text with chat-template tokens broken by a backslash, for servers that would obey them."""
    return CONTROL.sub(lambda m: m[0][0] + "\\" + m[0][1:], text)


def well_formed(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


# -- reading a response


def parse(content: bytes) -> Json:
    """The body of a response."""
    try:
        return json.loads(content)
    except ValueError:
        raise NoAnswer(f"no JSON in the response {content[:80]!r}") from None


def dig(value: Json, *path: str | int) -> Json:
    """A part of a response; None where the path ends early."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def pairs(listed: Json) -> Pairs:
    """Tokens with their log-probabilities, listed (chat) or mapped (plain completions)."""
    if not isinstance(listed, dict | list):
        return []
    found = listed.items() if isinstance(listed, dict) else [(dig(x, "token"), dig(x, "logprob")) for x in listed]
    return [(str(token), float(p)) for token, p in found if isinstance(p, int | float) and p <= ROUNDING]


def whole(value: Json) -> int:
    """A count, 0 if there is none."""
    return value if isinstance(value, int) else 0


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait as the endpoint names them, 0 if it doesn't."""
    seconds = headers.get("retry-after", "")
    return min(float(seconds), LONGEST_PAUSE_S) if re.fullmatch(r"\d+(\.\d+)?", seconds) else 0.0
