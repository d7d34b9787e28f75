"""One question to an OpenAI-compatible endpoint: the body of its request, and what the response says."""

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pipeline.config import Teacher
from pipeline.engines.layout import Layout
from pipeline.models import first_tokens, load_tokenizer
from pipeline.prompts import CUT_MARK, Prompt
from pipeline.reading import log_sum_exp
from pipeline.teacher import Answer, Question

log = logging.getLogger("gristmill")

BYTES_PER_TOKEN = 4
"""Stands in for an unknown tokenizer when documents are cut."""

ROUNDING = 0.01
"""Log-probabilities that are larger are none."""
NEVER = -9999.0
"""What vLLM writes for a log-probability of minus infinity."""

CHAT, TEXT = "/chat/completions", "/completions"
"""Paths below the base URL."""

CONTROL = re.compile(
    r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>",
    re.IGNORECASE,
)
"""Control tokens of common chat templates, which some servers obey inside a document."""

Cut = Callable[[str], tuple[str, bool]]
Json = Any


class NoAnswer(Exception):
    """A request that came to nothing without an error being sent: time-out, or something that is no completion."""


@dataclass
class Server:
    """What is known of an endpoint. `context`: the most tokens its model reads; `refused`: fields of a request that it
    has shown not to take, which are left out from then on."""

    is_vllm: bool = False
    context: int | None = None
    refused: set[str] = field(default_factory=set)


class Request(NamedTuple):
    """What is sent: a path below the base URL, and a body that names the model."""

    path: str
    body: dict[str, Json]


class Words:
    """Asks in words: turns of a chat, or a single text (prompts with chat: false). A document takes one request."""

    parts: tuple[tuple[int, ...], ...] = ((),)

    def __init__(self, prompt: Prompt, settings: Teacher, server: Server) -> None:
        self.prompt, self.settings, self.server = prompt, settings, server
        self.cut = cutter(settings)

    def prepare(self, text: str) -> tuple[str, bool]:
        """The document as it is sent, unable to leave its place, and whether it was cut.

        It is cut before it is guarded, so that 50 MB cost no more than a page, and again should the guards be long.
        """
        short, was_truncated = self.cut(well_formed(text))
        safe, cut_again = self.cut(self.prompt.fence(break_control_tokens(short)))
        was_truncated = was_truncated or cut_again
        return safe + (CUT_MARK if was_truncated else ""), was_truncated

    def request(self, document: str, _: tuple[int, ...] = ()) -> Request:
        """The request about one document."""
        return self.chat(document) if self.prompt.chat else self.text(document)

    def chat(self, document: str) -> Request:
        """A chat; one that goes on from a forced beginning is vLLM's extension."""
        messages, extra = self.prompt.turns(document), {}
        if self.prompt.answer_start:
            messages = [*messages, {"role": "assistant", "content": self.prompt.answer_start}]
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        options = {
            **sampling(self.prompt, self.settings),
            **self.rivals({"logprobs": True, "top_logprobs": self.settings.top_logprobs}),
            **form(self.prompt, self.settings, self.server),
            **extra,
            "chat_template_kwargs": self.settings.chat_template_args or None,
        }
        if "max_completion_tokens" in self.settings.args:
            options["max_tokens"] = None
        return request(CHAT, self.settings, {"messages": messages}, options)

    def text(self, document: str) -> Request:
        """A plain completion."""
        text = self.prompt.plain(document) + self.prompt.answer_start
        options = {**sampling(self.prompt, self.settings), **self.rivals({"logprobs": self.settings.top_logprobs})}
        if self.server.is_vllm:
            options |= form(self.prompt, self.settings, self.server)
        return request(TEXT, self.settings, {"prompt": text}, options)

    def rivals(self, options: dict[str, Json]) -> dict[str, Json]:
        """What asks for the likeliest tokens, where choices are compared."""
        return options if self.prompt.read == "choices" else {}

    def read(self, response: Json) -> Answer:
        """What one response says; `log_probs` holds every token listed, None if none are."""
        choice = dig(response, "choices", 0)
        if self.prompt.chat:
            listed = dig(choice, "logprobs", "content")
            tops = None if listed is None else dig(listed, 0, "top_logprobs") or []
            return read(response, dig(choice, "message"), "content", tops)
        listed = dig(choice, "logprobs", "top_logprobs")
        return read(response, choice, "text", None if listed is None else dig(listed, 0) or [])

    def join(self, answers: list[Answer]) -> Answer:
        """The answer about one document; of the tokens listed, the candidates are kept, -inf where one is not."""
        if self.prompt.read != "choices" or answers[0].finish == "refused":
            return replace(answers[0], log_probs=None)
        tops = answers[0].log_probs or {}
        found = {name: tops.get(name, -math.inf) for name in self.prompt.candidates}
        return replace(answers[0], finish="stop", log_probs=found)


class Tokens:
    """Asks a vLLM server in token ids, so that it reads what a local model would read. The probabilities of choices
    are exact: a candidate's is the product over its tokens, with a further request for each way candidates begin."""

    def __init__(self, prompt: Prompt, settings: Teacher, server: Server) -> None:
        self.prompt, self.settings, self.server = prompt, settings, server
        self.layout = Layout(tokenizer_of(settings), prompt, settings, server.context)
        self.next = next_tokens(self.layout.candidates) if prompt.read == "choices" else {(): []}
        self.parts = tuple(self.next)

    def prepare(self, text: str) -> tuple[list[int], bool]:
        """All that the model reads for one document, and whether it was cut."""
        row = self.layout.row(Question("", text))
        return self.layout.whole(row), row.was_truncated

    def request(self, ids: list[int], part: tuple[int, ...] = ()) -> Request:
        """The request about one document, behind the part of a candidate that has already been asked for."""
        options = sampling(self.prompt, self.settings)
        if self.prompt.read == "choices":
            options |= {"return_tokens_as_token_ids": True, **self.rivals(part)}
        else:  # the server would else apply the model's own sampling habits
            options = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0} | options
            options |= form(self.prompt, self.settings, self.server)
        return request(TEXT, self.settings, {"prompt": [*ids, *part]}, options)

    def rivals(self, part: tuple[int, ...]) -> dict[str, Json]:
        """What asks for exactly the tokens that go on to a candidate, else for the likeliest ones."""
        if "logprob_token_ids" in self.server.refused:
            return {"logprobs": self.settings.top_logprobs}
        return {"logprobs": 1, "logprob_token_ids": self.next[part]}

    def read(self, response: Json) -> Answer:
        """What one response says; `log_probs` is by token_id:<id>."""
        choice = dig(response, "choices", 0)
        listed = dig(choice, "logprobs", "top_logprobs")
        return read(response, choice, "text", None if listed is None else dig(listed, 0) or [])

    def join(self, answers: list[Answer]) -> Answer:
        """The answer about one document; -inf for a candidate that was not seen, or that another one includes."""
        if self.prompt.read != "choices" or answers[0].finish == "refused":
            return replace(answers[0], log_probs=None)
        seen = {part: answer.log_probs or {} for part, answer in zip(self.parts, answers, strict=True)}

        def log_p(ids: list[int]) -> float:
            return sum(seen[tuple(ids[:n])].get(f"token_id:{token}", -math.inf) for n, token in enumerate(ids))

        found = {name: log_p(ids) if ids else -math.inf for name, ids in self.layout.candidates.items()}
        return replace(
            answers[0],
            finish="stop",
            text="",
            log_probs=found,
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            answer_tokens=sum(answer.answer_tokens for answer in answers),
        )


Wording = Words | Tokens


def wording(prompt: Prompt, settings: Teacher, server: Server) -> Wording:
    """In token ids where the server takes them and the tokenizer is known, else in words."""
    return (Tokens if server.is_vllm and settings.tokenizer else Words)(prompt, settings, server)


# -- the body of a request


def request(path: str, settings: Teacher, question: dict[str, Json], options: dict[str, Json]) -> Request:
    """`args` have the last word; `args: {temperature: null}` takes an option away."""
    options = {name: value for name, value in {**options, **settings.args}.items() if value is not None}
    return Request(path, {"model": settings.model, **question, **options})


def sampling(prompt: Prompt, settings: Teacher) -> dict[str, Json]:
    """The sampling part of a request: one token, or a written answer. What OpenAI's own endpoint doesn't know is named
    only if it is asked for."""
    if prompt.read == "choices":
        return {"max_tokens": 1, "temperature": 0.0}
    named = {"max_tokens", "temperature", "repetition_penalty"}
    named |= {"top_p", "top_k", "min_p", "seed"} if settings.temperature > 0 else set()
    given = settings.model_dump(include=named, exclude_none=True)
    return {**given, **({"stop": list(settings.stop)} if settings.stop else {})}


def form(prompt: Prompt, settings: Teacher, server: Server) -> dict[str, Json]:
    """What keeps the answer to the prompt's form; others than vLLM only know JSON schemas."""
    asked = prompt.form if settings.structured else None
    if asked is None:
        return {}
    options: dict[str, Json] = {}
    if server.is_vllm:
        options = {"structured_outputs": {asked.kind: asked.value}}
    elif asked.kind == "json":
        name = re.sub(r"[^A-Za-z0-9_-]", "_", prompt.name)[:64]
        schema = {"name": name, "strict": True, "schema": asked.value}
        options = {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {name: value for name, value in options.items() if name not in server.refused}


def next_tokens(candidates: dict[str, list[int] | None]) -> dict[tuple[int, ...], list[int]]:
    """The token ids that follow each beginning of a candidate, the empty one first."""
    found: dict[tuple[int, ...], set[int]] = {}
    for ids in candidates.values():
        for n, token in enumerate(ids or []):
            found.setdefault(tuple((ids or [])[:n]), set()).add(token)
    return {part: sorted(found[part]) for part in sorted(found, key=lambda part: (len(part), part))}


# -- the document in it


def cutter(teacher: Teacher) -> Cut:
    """Cuts a document to teacher.document_tokens: exactly if the tokenizer is known, else by bytes."""
    limit = teacher.document_tokens
    if teacher.tokenizer is None:
        n_bytes = limit * BYTES_PER_TOKEN
        log.info("documents are cut at %d bytes; give --teacher.tokenizer to cut by tokens", n_bytes)
        return lambda text: cut_bytes(text, n_bytes)
    tokenizer = tokenizer_of(teacher)

    def cut(text: str) -> tuple[str, bool]:
        ids, was_truncated = first_tokens(text, limit, tokenizer)
        return (tokenizer.decode(ids).rstrip("\ufffd") if was_truncated else text), was_truncated

    return cut


def tokenizer_of(teacher: Teacher) -> Any:
    """The tokenizer that the settings name."""
    return load_tokenizer(str(teacher.tokenizer), "teacher.tokenizer", trust=teacher.trust_remote_code)


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
    """The body of a response; JSON nested too deep to be read is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise NoAnswer(f"no JSON in the response {content[:80]!r}") from None


def read(response: Json, said: Json, name: str, tops: Json) -> Answer:
    """What is kept of a response: `said` holds the text under `name`, `tops` are the tokens listed for its first."""
    if not isinstance(said, dict) or dig(response, "choices", 0, "error"):
        raise NoAnswer(f"no completion in the response {str(response)[:80]!r}")
    finish = dig(response, "choices", 0, "finish_reason")
    refusal = said.get("refusal")
    answer = Answer(
        "length" if finish == "length" else "stop",
        text=well_formed(str(refusal or said.get(name) or "")),
        log_probs=None if tops is None else listed_tokens(tops),
        prompt_tokens=whole(dig(response, "usage", "prompt_tokens")),
        answer_tokens=whole(dig(response, "usage", "completion_tokens")),
    )
    return replace(answer, finish="refused") if refusal or finish == "content_filter" else answer


def listed_tokens(tops: Json) -> dict[str, float]:
    """Tokens with their log-probabilities, listed (chat) or mapped (plain completions); those of one spelling count
    together."""
    if not isinstance(tops, dict | list):
        return {}
    found = tops.items() if isinstance(tops, dict) else [(dig(x, "token"), dig(x, "logprob")) for x in tops]
    spellings: dict[str, list[float]] = {}
    for token, p in found:
        if isinstance(p, int | float) and p <= ROUNDING:
            spellings.setdefault(str(token), []).append(-math.inf if p <= NEVER else float(p))
    return {token: log_sum_exp(values) for token, values in spellings.items()}


def dig(value: Json, *path: str | int) -> Json:
    """A part of a response; None where the path ends early."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def whole(value: Json) -> int:
    """A count, 0 if there is none."""
    return value if isinstance(value, int) else 0
