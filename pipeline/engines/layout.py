"""One prompt before one model, in token ids: what stands around every document, and the candidates in their place."""

import copy
import logging
import math
from typing import Any, NamedTuple

from pipeline.config import Teacher
from pipeline.errors import UserError, needs
from pipeline.models import first_tokens, special_tokens_around
from pipeline.prompts import CUT_MARK, Prompt
from pipeline.teacher import Question

log = logging.getLogger("gristmill")

SENTINEL = "⁂DOCUMENT⁂"
"""Holds the document's place while a chat template is applied."""
EXAMPLE = "⁂EXAMPLE⁂"
"""Holds the place of each example's text."""


class Pieces(NamedTuple):
    """Token ids around a document: `head` is the same for all, `tail` ends with the forced answer beginning."""

    head: list[int]
    tail: list[int]
    decoder: list[int]
    """What an encoder-decoder's answer begins with; empty for causal models."""
    before_answer: str
    """The text that the answer follows, back to the document: candidates are tokenised after it."""


class Row(NamedTuple):
    """A document ready to be asked about: its own token ids without the head."""

    key: str
    ids: list[int]
    was_truncated: bool


class NoRoom(UserError):
    """The rubric and the answer leave no room for a document."""


class Layout:
    """A prompt in a model's tokens. `context` is the most tokens that the model reads, None where there is no limit;
    `decoder_start` is empty for causal models."""

    def __init__(
        self,
        tokenizer: Any,
        prompt: Prompt,
        teacher: Teacher,
        context: int | None,
        decoder_start: list[int] | None = None,
    ) -> None:
        self.prompt, self.decoder_start = prompt, decoder_start or []
        self.pieces = pieces(tokenizer, prompt, teacher, self.decoder_start)
        self.candidates = candidate_ids(tokenizer, prompt, self.pieces.before_answer)
        self.answers = permitted_answers(tokenizer, prompt, self.pieces.before_answer)
        longest = max((len(ids) for ids in self.candidates.values() if ids), default=0)
        self.room = longest if prompt.read == "choices" else teacher.max_tokens
        self.mark = token_ids(tokenizer, CUT_MARK)
        self.document_tokens = self.fit(context, teacher.document_tokens)
        self.document_tokenizer = document_tokenizer(tokenizer)

    def fit(self, context: int | None, asked: int) -> int:
        """Tokens a document may have: what was asked for, or what the model's context leaves beside the rubric."""
        around = len(self.pieces.head) + len(self.pieces.tail) + len(self.mark)
        room = 0 if self.decoder_start else self.room
        free = (context or math.inf) - around - room
        if free < 16:
            raise NoRoom(
                f"prompt {self.prompt.name}: the rubric takes {around} tokens and the answer {room} of the model's"
                f" {context}; shorten the rubric or lower --teacher.max-tokens"
            )
        if free < asked:
            log.info("the model's context holds texts of at most %d tokens", free)
        return int(min(free, asked))

    def row(self, question: Question) -> Row:
        """Token ids of one document; its control tokens are spelled out, so it cannot end its turn."""
        text = self.prompt.fence(question.text.encode("utf-8", "replace").decode())
        ids, was_truncated = first_tokens(
            text, self.document_tokens, self.document_tokenizer, split_special_tokens=True
        )
        return Row(question.key, ids + (self.mark if was_truncated else []) + self.pieces.tail, was_truncated)

    def next_tokens(self, written: tuple[int, ...], endings: list[int]) -> list[int]:
        """Tokens that lead on to a permitted answer; the ends of an answer where one is complete."""
        n = len(written)
        going_on = {ids[n] for ids in self.answers if len(ids) > n and ids[:n] == written}
        return sorted(going_on) + (endings if not going_on or written in self.answers else [])

    def whole(self, row: Row) -> list[int]:
        """All that a causal model reads for one document."""
        return self.pieces.head + row.ids


def document_tokenizer(tokenizer: Any) -> Any:
    """A copy that can spell out every control token: also those of the chat template that aren't called special."""
    plain, template = copy.deepcopy(tokenizer), str(tokenizer.chat_template)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    plain.add_tokens([token for token in added if token.strip() and token in template], special_tokens=True)
    return plain


def pieces(tokenizer: Any, prompt: Prompt, teacher: Teacher, decoder_start: list[int]) -> Pieces:
    """The token ids that enclose every document; `decoder_start` is empty for causal models."""
    marks = tuple(example.model_copy(update={"text": EXAMPLE}) for example in prompt.examples)
    marked = prompt.model_copy(update={"examples": marks})
    rendered = render(tokenizer, marked, teacher) if prompt.chat else marked.plain(SENTINEL)
    head, found, tail = rendered.partition(SENTINEL)
    if not found or SENTINEL in tail:
        raise UserError(f"prompt {prompt.name}: the chat template of {teacher.model} does not show the document once")
    if head.count(EXAMPLE) != len(marks):
        raise UserError(f"prompt {prompt.name}: the chat template of {teacher.model} does not show each example once")
    begin, end = ([], []) if prompt.chat else special_tokens_around(tokenizer)
    head_ids, start = begin + with_examples(tokenizer, head, prompt), prompt.answer_start
    if decoder_start:
        decoder = decoder_start + token_ids(tokenizer, start)
        return Pieces(head_ids, token_ids(tokenizer, tail) + end, decoder, start)
    return Pieces(head_ids, token_ids(tokenizer, tail + start), [], tail + start)


def with_examples(tokenizer: Any, head: str, prompt: Prompt) -> list[int]:
    """Token ids of a head, the examples in their places; they cannot end their turns, no more than a document can."""
    first, *rest = head.split(EXAMPLE)
    ids, spelling = token_ids(tokenizer, first), document_tokenizer(tokenizer) if rest else tokenizer
    for example, part in zip(prompt.examples, rest, strict=True):
        shown = spelling(example.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += [*shown, *token_ids(tokenizer, part)]
    return ids


def render(tokenizer: Any, prompt: Prompt, teacher: Teacher) -> str:
    """The conversation in the model's chat template, up to where its answer begins."""
    if not tokenizer.chat_template:
        raise UserError(
            f"teacher.model: {teacher.model} has no chat template; put chat: false in prompt {prompt.name}"
        )
    jinja2 = needs("jinja2", "torch")
    try:
        rendered = tokenizer.apply_chat_template(
            prompt.turns(SENTINEL), tokenize=False, add_generation_prompt=True, **teacher.chat_template_args
        )
    except jinja2.TemplateError as error:
        raise UserError(f"prompt {prompt.name}: the chat template of {teacher.model} refuses it ({error})") from None
    return str(rendered)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special ones added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def candidate_ids(tokenizer: Any, prompt: Prompt, before: str) -> dict[str, list[int] | None]:
    """Token ids of each candidate in its place, after the text before it; None for one that another includes.

    P(candidate) is the product over its tokens. Candidates with the same tokens, or one of which begins with the
    other, are one event: within a group it is counted once, across groups it is refused.
    """
    values = {answer: choice.value for choice in prompt.choices for answer in choice.answers}
    ids = {name: ids_after(tokenizer, before, name, prompt) for name in values}
    resolved: dict[str, list[int] | None] = {}
    for name in sorted(values, key=lambda name: len(ids[name])):
        includes = [other for other, prefix in resolved.items() if prefix and ids[name][: len(prefix)] == prefix]
        if includes and values[includes[0]] != values[name]:
            raise UserError(f"prompt {prompt.name}: to this teacher, candidate {name!r} begins with {includes[0]!r}")
        resolved[name] = None if includes else ids[name]
    return resolved


def permitted_answers(tokenizer: Any, prompt: Prompt, before: str) -> list[tuple[int, ...]]:
    """Token ids of each answer that a label prompt permits; none where answers are not listed."""
    form = prompt.form
    listed = form.value if form is not None and form.kind == "choice" else []
    return [tuple(ids_after(tokenizer, before, answer, prompt)) for answer in listed]


def ids_after(tokenizer: Any, before: str, candidate: str, prompt: Prompt) -> list[int]:
    """Token ids that follow `before` when the candidate is written there."""
    start, both = token_ids(tokenizer, before), token_ids(tokenizer, before + candidate)
    ids = both[len(start) :]
    if both[: len(start)] != start or not ids:
        raise UserError(
            f"prompt {prompt.name}: candidate {candidate!r} merges with the text before it, {before[-20:]!r}; move the"
            " space between them from there to the candidate"
        )
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise UserError(f"prompt {prompt.name}: this teacher's vocabulary cannot spell candidate {candidate!r}")
    return ids
