"""A teacher behind any OpenAI-compatible endpoint: many requests in flight, failed ones sent again."""

import asyncio
import functools
import json
import logging
import math
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import Teacher
from pipeline.engines.completions import CHAT, Json, NoAnswer, Request, Server, dig, parse, wording
from pipeline.errors import UserError, needs
from pipeline.prompts import Prompt
from pipeline.teacher import Answer, Ask, Question, Record

log = logging.getLogger("gristmill")

OPENAI_URL = "https://api.openai.com/v1"

GIVE_UP_AFTER = 20
"""Documents without an answer in a row before the endpoint counts as down, and answers without a single candidate
before the prompt counts as wrong."""

CONNECT_S = 10.0
LOOK_S = 5.0
"""How long an endpoint may take to say what it is."""
LONGEST_PAUSE_S = 120.0

PASSING = {408, 409, 425, 429}
"""Statuses that pass, beside those from 500 on: the request is sent again."""

ABOUT_THE_DOCUMENT = {400, 413, 422}
"""Statuses that speak of one request: too long, not allowed."""

EXTRAS = {
    "logprob_token_ids": r"logprob_token_ids",
    "structured_outputs": r"structured|grammar|schema|regex|guided",
    "response_format": r"response_format|schema",
}
"""Fields of a request that an endpoint may not take, and what it speaks of when it refuses them."""


@contextmanager
def started(teacher: Teacher) -> Iterator[Ask]:
    """An endpoint needs no starting; what it is, is looked up when there is something to ask."""
    server = functools.cache(lambda: look(teacher))

    def ask(prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record) -> None:
        open_questions = [question for question in questions if question.key not in answered]
        if open_questions:
            asyncio.run(Endpoint(prompt, teacher, server(), record, proven=bool(answered)).ask_all(open_questions))

    yield ask


class Endpoint:
    """One endpoint with one prompt. `proven`: it has answered this prompt before, so its settings are right."""

    def __init__(self, prompt: Prompt, teacher: Teacher, server: Server, record: Record, proven: bool) -> None:
        self.openai, self.stamina = libraries()
        self.prompt, self.settings, self.server, self.record = prompt, teacher, server, record
        self.url, self.key = url_of(teacher), key_of(teacher)
        self.wording = wording(prompt, teacher, server)
        self.proven, self.saw_candidate = proven, proven
        self.n_answered = self.n_failed_in_a_row = 0
        self.failures: Counter[str] = Counter()
        self.n_empty = 0
        self.arrived: list[tuple[str, Answer]] = []
        self.sending: set[Any] = set()
        self.is_stopping = False

    async def ask_all(self, questions: list[Question]) -> None:
        """Keep `concurrency` requests in flight until every question is answered or has failed."""
        queue, n_workers = iter(questions), min(self.settings.concurrency, len(questions))
        async with self.client() as client:
            workers = [asyncio.create_task(self.work(client, queue)) for _ in range(n_workers)]
            try:
                await self.finish(workers)
            finally:
                deque(queue, maxlen=0)  # before Python 3.12 an answer that arrives with a cancellation swallows it
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                self.keep()
        if self.failures:
            log.info("teacher: failed requests: %s", ", ".join(f"{why} {n}" for why, n in self.failures.items()))

    async def finish(self, workers: list[asyncio.Task[None]]) -> None:
        """Wait for all. An error that stops the run lets the requests in flight arrive first, for they are paid for;
        who only waits to send again is let go."""
        ended, at_work = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        for worker in at_work - self.sending:
            worker.cancel()
        if at_work:
            log.info("teacher: stopping; %d requests in flight are waited for", len(at_work & self.sending))
            await asyncio.wait(at_work)
        for worker in ended:
            worker.result()

    def client(self) -> Any:
        """A client that sends each request once; how long one may take is seen to in `send`."""
        timeout = self.openai.Timeout(None, connect=min(CONNECT_S, self.settings.timeout_s))
        return self.openai.AsyncOpenAI(api_key=self.key or "none", base_url=self.url, timeout=timeout, max_retries=0)

    async def work(self, client: Any, queue: Iterator[Question]) -> None:
        """Ask one question after another; an error leaves none to the others."""
        try:
            for question in queue:
                answer = await self.timed(client, question.text)
                self.arrived.append((question.key, answer))
                await asyncio.sleep(0)
                if not self.keep():
                    deque(queue, maxlen=0)
        except Exception:
            self.is_stopping = True
            deque(queue, maxlen=0)
            raise

    def keep(self) -> bool:
        """Record what has arrived, together: each recording waits for the disk."""
        arrived, self.arrived = self.arrived, []
        return not arrived or self.record(arrived)

    async def timed(self, client: Any, text: str) -> Answer:
        """The answer about one document, and how long it took."""
        begin = time.perf_counter()
        document, was_truncated = self.wording.prepare(text)
        answer = await self.answer(client, document)
        return replace(answer, seconds=time.perf_counter() - begin, was_truncated=was_truncated)

    # -- retries

    async def answer(self, client: Any, document: Any) -> Answer:
        """One answer, or a failed one after all retries."""
        try:
            answers = [await self.retried(client, document, part) for part in self.wording.parts]
        except (self.openai.OpenAIError, NoAnswer) as error:
            return self.failed(error)
        answer = self.wording.join(answers)
        self.check_candidates(answer, list(answers[0].log_probs or {}))
        self.tell_of_reasoning(answer)
        self.proven = True
        self.n_answered += 1
        self.n_failed_in_a_row = 0
        return answer

    async def retried(self, client: Any, document: Any, part: tuple[int, ...]) -> Answer:
        """Send until it succeeds or the retries are used up."""
        attempts = self.settings.retries + 1
        async for attempt in self.stamina.retry_context(
            on=self.pause_before_retry, attempts=attempts, timeout=None, wait_initial=0.5, wait_max=30.0
        ):
            with attempt:
                return await self.send(client, document, part)
        raise AssertionError("unreachable")

    def pause_before_retry(self, error: Any) -> bool | float:
        """Whether to send again; the seconds to wait where the endpoint names them (Retry-After)."""
        if isinstance(error, self.openai.APIStatusError):
            self.note(error, str(error.status_code))
            passing = error.status_code in PASSING or error.status_code >= 500
            return passing and not self.is_stopping and (retry_after(error.response.headers) or True)
        if isinstance(error, (self.openai.APIConnectionError, NoAnswer)):
            self.note(error, type(error).__name__)
            return not self.is_stopping
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

    async def send(self, client: Any, document: Any, part: tuple[int, ...]) -> Answer:
        """What the endpoint says to one request; what it does not take is left out of a second one."""
        request = self.wording.request(document, part)
        try:
            response = await self.response(client, request)
        except self.openai.APIStatusError as error:
            if not self.goes_without(request, error):
                raise
            return await self.send(client, document, part)
        answer = self.wording.read(response)
        if self.ignored(request, answer):
            return await self.send(client, document, part)
        if self.prompt.read == "choices" and answer.log_probs is None and answer.finish != "refused":
            self.refuse_without_log_probs()
        return answer

    async def response(self, client: Any, request: Request) -> Json:
        """The response to one request, as plain JSON."""
        options = dict(request.body)
        endpoint, asked = (
            (client.chat.completions, "messages") if request.path == CHAT else (client.completions, "prompt")
        )
        question = {name: options.pop(name) for name in ("model", asked)}
        with self.in_flight():
            sent = endpoint.with_raw_response.create(**question, extra_body=options)
            try:
                response = await asyncio.wait_for(sent, self.settings.timeout_s)
            except asyncio.TimeoutError:
                raise NoAnswer(f"no answer within {self.settings.timeout_s:g} s") from None
        return parse(response.content)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """The worker has sent a request, and not only means to."""
        worker = asyncio.current_task()
        self.sending.add(worker)
        try:
            yield
        finally:
            self.sending.discard(worker)

    def goes_without(self, request: Request, error: Any) -> bool:
        """Whether the endpoint refused a field that can be left out from now on."""
        if error.status_code not in ABOUT_THE_DOCUMENT:
            return False
        ours = [name for name in EXTRAS if name in request.body and name not in self.settings.args]
        named = [name for name in ours if re.search(EXTRAS[name], str(error), re.IGNORECASE)]
        for name in named:
            self.leave_out(name, self.one_line(error))
        return bool(named)

    def ignored(self, request: Request, answer: Answer) -> bool:
        """Whether the endpoint lists other tokens than those asked for, as one does that does not know the field."""
        wanted = {f"token_id:{token}" for token in request.body.get("logprob_token_ids", [])}
        ignored = bool(answer.log_probs) and not wanted <= set(answer.log_probs or {})
        if ignored:
            self.leave_out("logprob_token_ids", "it lists other tokens than those asked for")
        return ignored

    def leave_out(self, name: str, why: str) -> None:
        """Send a field no more; said once."""
        instead = {"logprob_token_ids": f"the {self.settings.top_logprobs} likeliest tokens are asked for instead"}
        if name not in self.server.refused:
            said = instead.get(name, "answers are no longer kept to their form")
            log.info("teacher: %s does not take %s (%s); %s", self.url, name, why, said)
        self.server.refused.add(name)

    # -- what an answer says about the settings

    def refuse_without_log_probs(self) -> None:
        """Stop if log-probabilities never come; where they have come before, the request is sent again."""
        if self.proven:
            raise NoAnswer("no log-probabilities in the response")
        raise UserError(
            f"{self.settings.model} at {self.url} returns no log-probabilities; use a prompt with read: generate"
        )

    def check_candidates(self, answer: Answer, tokens: list[str]) -> None:
        """Stop after a while if no candidate was ever among the `tokens` listed."""
        found = answer.log_probs or {}
        self.saw_candidate = self.saw_candidate or max(found.values(), default=-math.inf) > -math.inf
        if found and not self.saw_candidate and self.n_answered + 1 >= GIVE_UP_AFTER:
            raise UserError(
                f"prompt {self.prompt.name}: none of {', '.join(map(repr, found))} was among the likeliest tokens of"
                f" {GIVE_UP_AFTER} answers; {self.settings.model} rather says {', '.join(map(repr, tokens[:5]))};"
                " spell the answers so, or lead to them with answer_start"
            )

    def tell_of_reasoning(self, answer: Answer) -> None:
        """Say once that a model used all its tokens before the answer began."""
        if answer.finish != "length" or answer.text.strip():
            return
        self.n_empty += 1
        if self.n_empty == 1:
            log.warning(
                "teacher: %s wrote %d tokens and no answer; if it reasons first, raise --teacher.max-tokens, or turn"
                " reasoning off in teacher.chat_template_args or teacher.args",
                self.settings.model,
                answer.answer_tokens,
            )


# -- before the first request


def check(teacher: Teacher) -> None:
    """Refuse what can be seen to be wrong without asking anybody."""
    url_of(teacher)
    key_of(teacher)


def libraries() -> tuple[Any, Any]:
    """openai and stamina, kept from logging by themselves: where OPENAI_LOG is set, versions before 3 write whole
    requests; of retries `note` says more."""
    openai, stamina = needs("openai", "openai"), needs("stamina", "openai")
    logging.getLogger("openai").setLevel(logging.WARNING)
    stamina.instrumentation.set_on_retry_hooks([])
    return openai, stamina


def look(teacher: Teacher) -> Server:
    """What the endpoint says of itself, which is free; many say nothing, and nothing depends on it.

    Only where nobody is there it is asked again, as a request would be: it may still be starting.
    """
    openai, stamina = libraries()
    url, key = url_of(teacher), key_of(teacher)
    try:
        with openai.OpenAI(api_key=key or "none", base_url=url, timeout=LOOK_S, max_retries=0) as client:
            for attempt in stamina.retry_context(
                on=nobody_there, attempts=teacher.retries + 1, timeout=None, wait_initial=0.5, wait_max=30.0
            ):
                with attempt:
                    listed = json.loads(client.models.with_raw_response.list().content)
    except (openai.OpenAIError, ValueError) as error:
        if nobody_there(error):
            raise UserError(
                f"{url} cannot be reached ({error.__cause__}); start it, or check --teacher.base-url; every answer so"
                " far is recorded, run the same command to go on"
            ) from None
        return Server()
    return server_of(listed, teacher)


def nobody_there(error: Exception) -> bool:
    """Whether not even a connection came about."""
    return type(error.__cause__).__name__ == "ConnectError"


def server_of(listed: Json, teacher: Teacher) -> Server:
    """The server that lists these models; a vLLM server is told what it can do for who knows its tokenizer."""
    models = dig(listed, "data")
    mine = [model for model in models if dig(model, "id") == teacher.model] if isinstance(models, list) else []
    if not mine or dig(mine[0], "owned_by") != "vllm":
        return Server()
    context = dig(mine[0], "max_model_len")
    if teacher.tokenizer is None:
        log.info("teacher: a vLLM server; with --teacher.tokenizer the probabilities of choices would be exact")
    return Server(is_vllm=True, context=context if isinstance(context, int) else None)


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


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait as the endpoint names them, 0 if it doesn't."""
    seconds = headers.get("retry-after", "")
    return min(float(seconds), LONGEST_PAUSE_S) if re.fullmatch(r"\d+(\.\d+)?", seconds) else 0.0
