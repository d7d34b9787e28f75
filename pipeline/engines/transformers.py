"""A teacher on this machine through transformers: causal or encoder-decoder, batches by length, the rubric's prefix
computed once."""

import copy
import functools
import inspect
import logging
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Teacher
from pipeline.errors import UserError, needs, required
from pipeline.models import first_tokens, locate, pick_device, pick_dtype, special_tokens_around
from pipeline.prompts import CUT_MARK, Prompt
from pipeline.teacher import Answer, Question, Record

log = logging.getLogger("gristmill")

SENTINEL = "⁂DOCUMENT⁂"
"""Holds the document's place while a chat template is applied."""


class Pieces(NamedTuple):
    """Token ids around a document: `head` is the same for all, `tail` ends with the forced answer beginning."""

    head: list[int]
    tail: list[int]
    decoder: list[int]
    """What an encoder-decoder's answer begins with; empty for causal models."""
    before_answer: str
    """The text that the answer follows, back to the document: candidates are tokenised after it."""


After = Callable[[tuple[int, ...]], Any]
"""Log-probabilities after each of further tokens: (n_rows, n_tokens, vocabulary)."""


class Row(NamedTuple):
    """A document ready to be asked about: its own token ids without the head."""

    key: str
    ids: list[int]
    was_truncated: bool


def ask(prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record) -> None:
    """Ask a local model. Batches are planned over all questions, so a resumed run computes the same batches."""
    local = LocalTeacher(prompt, teacher)
    rows = sorted((local.row(question) for question in questions), key=lambda row: (len(row.ids), row.key))
    for batch in batches(rows, len(local.pieces.head) + local.room, teacher.batch_tokens):
        open_rows = [row for row in batch if row.key not in answered]
        if open_rows:
            record(local.answers(open_rows))


def batches(rows: list[Row], extra: int, budget: int) -> list[list[Row]]:
    """Rows of rising length in batches of at most `budget` tokens, `extra` more counted for each row."""
    planned: list[list[Row]] = []
    for row in rows:
        width = len(row.ids) + extra
        if planned and (len(planned[-1]) + 1) * width <= budget:
            planned[-1].append(row)
        else:
            planned.append([row])
    return planned


class LocalTeacher:
    """A loaded model with one prompt."""

    def __init__(self, prompt: Prompt, teacher: Teacher) -> None:
        self.torch = needs("torch", "torch")
        self.prompt, self.settings = prompt, teacher
        self.device = pick_device(teacher.device)
        self.tokenizer, self.model = load(teacher, self.device)
        self.forward_takes = inspect.signature(self.model.forward).parameters
        self.encoder_decoder = bool(self.model.config.is_encoder_decoder)
        start = [self.model.generation_config.decoder_start_token_id] if self.encoder_decoder else []
        self.pieces = pieces(self.tokenizer, prompt, teacher, start)
        self.candidates = candidate_ids(self.tokenizer, prompt, self.pieces.before_answer)
        longest = max((len(ids) for ids in self.candidates.values() if ids), default=0)
        self.room = longest if prompt.read == "choices" else teacher.max_tokens
        self.mark = token_ids(self.tokenizer, CUT_MARK)
        self.document_tokens = self.fit_context()
        self.document_tokenizer = document_tokenizer(self.tokenizer)
        self.pad, self.ends = pad_and_ends(self.tokenizer, self.model)
        self.prefix = self.compute_prefix()

    def fit_context(self) -> int:
        """Tokens a document may have: what was asked for, or what the model's context leaves beside the rubric."""
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or math.inf
        around = len(self.pieces.head) + len(self.pieces.tail) + len(self.mark)
        room = 0 if self.encoder_decoder else self.room
        free = context - around - room
        if free < 16:
            raise UserError(
                f"prompt {self.prompt.name}: the rubric takes {around} tokens and the answer {room} of the model's"
                f" {context}; shorten the rubric or lower --teacher.max-tokens"
            )
        if free < self.settings.document_tokens:
            log.info("documents are cut to %d tokens: the model's context holds no more", free)
        return int(min(free, self.settings.document_tokens))

    def row(self, question: Question) -> Row:
        """Token ids of one document; its control tokens are spelled out, so it cannot end its turn."""
        text = self.prompt.fence(question.text.encode("utf-8", "replace").decode())
        ids, was_truncated = first_tokens(
            text, self.document_tokens, self.document_tokenizer, split_special_tokens=True
        )
        return Row(question.key, ids + (self.mark if was_truncated else []) + self.pieces.tail, was_truncated)

    def compute_prefix(self) -> Any:
        """Keys and values of the head, computed once; None where padding behind it would change an answer: sliding
        windows, convolutions and recurrent states count columns, not positions."""
        if self.encoder_decoder or not self.pieces.head or "position_ids" not in self.forward_takes:
            return None
        head = self.torch.tensor([self.pieces.head], device=self.device)
        with self.torch.inference_mode():
            cache = self.model(input_ids=head, use_cache=True).past_key_values
        plain = all(type(layer).__name__ == "DynamicLayer" for layer in getattr(cache, "layers", [None]))
        return cache if plain else None

    def answers(self, rows: list[Row]) -> list[tuple[str, Answer]]:
        """Ask one batch."""
        begin = time.perf_counter()
        with self.torch.inference_mode():
            found = self.choose(rows) if self.prompt.read == "choices" else self.generate(rows)
        seconds = (time.perf_counter() - begin) / len(rows)
        return [
            (
                row.key,
                Answer(
                    **answer, prompt_tokens=self.prompt_tokens(row), seconds=seconds, was_truncated=row.was_truncated
                ),
            )
            for row, answer in zip(rows, found, strict=True)
        ]

    def prompt_tokens(self, row: Row) -> int:
        """Tokens the model reads for one document."""
        return len(self.pieces.head) + len(row.ids) + len(self.pieces.decoder)

    def inputs(self, rows: list[Row]) -> dict[str, Any]:
        """Padded ids and mask, (n_rows, longest). The last token is the last column of a causal model: padding comes
        first, or between head and document where the head's keys are shared. Encoders are padded at the end."""
        head, longest = self.pieces.head, max(len(row.ids) for row in rows)
        ids, mask = [], []
        for row in rows:
            fill = longest - len(row.ids)
            before, own = (head, row.ids) if self.prefix is not None else ([], head + row.ids)
            parts = [(before, 1), ([self.pad] * fill, 0), (own, 1)]
            parts = parts[::-1] if self.encoder_decoder else parts
            ids.append([token for part, _ in parts for token in part])
            mask.append([seen for part, seen in parts for _ in part])
        tensor = functools.partial(self.torch.tensor, device=self.device)
        return {"input_ids": tensor(ids), "attention_mask": tensor(mask)}

    def prefix_for(self, n_rows: int) -> Any:
        """A copy of the head's keys and values for each row."""
        if self.prefix is None:
            return None
        cache = copy.deepcopy(self.prefix)
        cache.batch_repeat_interleave(n_rows)
        return cache

    # -- choices

    def choose(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Log-probability of each candidate as the next tokens; nothing is generated."""
        first, after = self.decoder_step(rows) if self.encoder_decoder else self.causal_step(rows)
        after = functools.cache(after)
        columns = {name: chain(ids, first, after) for name, ids in self.candidates.items() if ids}
        return [
            {
                "finish": "stop",
                "log_probs": {name: columns[name][i] if name in columns else -math.inf for name in self.candidates},
            }
            for i in range(len(rows))
        ]

    def causal_step(self, rows: list[Row]) -> tuple[Any, After]:
        """Log-probabilities (n_rows, vocabulary) after the prompt, and a function that gives those after further
        tokens, (n_rows, n_tokens, vocabulary)."""
        ids, mask = self.inputs(rows).values()
        cache = self.prefix_for(len(rows))
        seen = len(self.pieces.head) if cache is not None else 0
        out = self.forward(ids[:, seen:], mask, cache, last_only=True)

        def after(further: tuple[int, ...]) -> Any:
            more = self.torch.tensor([further] * len(rows), device=self.device)
            longer = self.torch.cat([mask, self.torch.ones_like(more)], 1)
            return self.log_softmax(self.forward(more, longer, copy.deepcopy(out.past_key_values)).logits)

        return self.log_softmax(out.logits[:, -1]), after

    def forward(self, ids: Any, mask: Any, cache: Any, last_only: bool = False) -> Any:
        """The causal model on the last columns of the mask; positions don't count padding."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        wanted = {"position_ids": positions, **({"logits_to_keep": 1} if last_only else {})}
        taken = {name: value for name, value in wanted.items() if name in self.forward_takes}
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **taken)

    def decoder_step(self, rows: list[Row]) -> tuple[Any, After]:
        """The same for an encoder-decoder: the document is encoded once, candidates are tried on the decoder."""
        batch = self.inputs(rows)
        encoded = self.model.get_encoder()(**batch)

        def log_probs(ids: tuple[int, ...]) -> Any:
            decoder = self.torch.tensor([[*self.pieces.decoder, *ids]] * len(rows), device=self.device)
            out = self.model(
                encoder_outputs=encoded, attention_mask=batch["attention_mask"], decoder_input_ids=decoder
            )
            return self.log_softmax(out.logits)

        return log_probs(())[:, -1], lambda ids: log_probs(ids)[:, -len(ids) :]

    def log_softmax(self, logits: Any) -> Any:
        """Natural log-probabilities in float32 on the CPU."""
        return self.torch.log_softmax(logits.float(), dim=-1).cpu()

    # -- generate

    def generate(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Written answers."""
        batch = self.inputs(rows)
        if self.encoder_decoder:
            batch["decoder_input_ids"] = self.torch.tensor([self.pieces.decoder] * len(rows), device=self.device)
        else:
            batch["past_key_values"] = self.prefix_for(len(rows))
        self.torch.manual_seed(self.settings.seed + int(rows[0].key[-8:], 16))
        out = self.model.generate(**batch, tokenizer=self.tokenizer, **self.options())
        begin = len(self.pieces.decoder) or batch["input_ids"].shape[1]
        return [self.written(ids) for ids in out[:, begin:].tolist()]

    def options(self) -> dict[str, Any]:
        """How answers are written; teacher.args has the last word."""
        settings = self.settings
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p or 1.0, "top_k": 0}
        sampled = settings.temperature > 0
        length = {"max_new_tokens": settings.max_tokens, "pad_token_id": self.pad}
        return {**length, "do_sample": sampled, **(sampling if sampled else {}), **settings.args}

    def written(self, ids: list[int]) -> dict[str, Any]:
        """One answer, up to its end token; a batch that ends early was ended by a stop string."""
        n = next((position + 1 for position, token in enumerate(ids) if token in self.ends), len(ids))
        stopped = n < self.options()["max_new_tokens"] or ids[n - 1] in self.ends
        text = self.tokenizer.decode(ids[:n], skip_special_tokens=True)
        return {"finish": "stop" if stopped else "length", "text": text, "answer_tokens": n}


def chain(ids: list[int], first: Any, after: After) -> list[float]:
    """log P of several tokens: the first, then each further one given those before it; a value per row."""
    total = first[:, ids[0]]
    if len(ids) > 1:
        following = after(tuple(ids[:-1]))
        total = total + sum(following[:, step, token] for step, token in enumerate(ids[1:]))
    return list(total.tolist())


def pad_and_ends(tokenizer: Any, model: Any) -> tuple[int, set[int]]:
    """A token to pad with, and the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    known = [token for token in [tokenizer.pad_token_id, *ends] if token is not None]
    return (known[0] if known else 0), set(known)


def document_tokenizer(tokenizer: Any) -> Any:
    """A copy that can spell out every control token: also those of the chat template that aren't called special."""
    plain, template = copy.deepcopy(tokenizer), str(tokenizer.chat_template)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    plain.add_tokens([token for token in added if token.strip() and token in template], special_tokens=True)
    return plain


def load(teacher: Teacher, device: str) -> tuple[Any, Any]:
    """Tokenizer and model of a Hub name, folder or .gguf file."""
    transformers, safetensors = needs("transformers", "torch"), needs("safetensors", "torch")
    name = locate(required(teacher.model, "teacher.model", "Qwen/Qwen3-8B"), "teacher.model")
    where: dict[str, Any] = {"revision": teacher.revision} if teacher.revision else {}
    if name.endswith(".gguf"):
        needs("gguf", "demo")
        name, where = str(Path(name).parent), {"gguf_file": Path(name).name}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **where)
        kinds = {False: transformers.AutoModelForCausalLM, True: transformers.AutoModelForSeq2SeqLM}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
        kind = kinds[bool(config.is_encoder_decoder)]
        model = kind.from_pretrained(name, config=config, dtype=pick_dtype(teacher.dtype, device), **where)
    except (OSError, ValueError, KeyError, ImportError, struct.error, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"teacher.model: {teacher.model} cannot be loaded ({reason})") from None
    model.generation_config = token_ids_only(model.generation_config)
    return tokenizer, model.to(device).eval()


def token_ids_only(generation: Any) -> Any:
    """A model's generation settings without its sampling habits (a repetition penalty, a temperature), which would
    work unseen beside ours."""
    kept = {name: value for name, value in generation.to_dict().items() if name.endswith("_token_id")}
    return type(generation)(**kept)


def pieces(tokenizer: Any, prompt: Prompt, teacher: Teacher, decoder_start: list[int]) -> Pieces:
    """The token ids that enclose every document; `decoder_start` is empty for causal models."""
    rendered = render(tokenizer, prompt, teacher) if prompt.chat else raw(prompt)
    head, found, tail = rendered.partition(SENTINEL)
    if not found or SENTINEL in tail:
        raise UserError(f"prompt {prompt.name}: the chat template of {teacher.model} does not show the document once")
    begin, end = ([], []) if prompt.chat else special_tokens_around(tokenizer)
    head_ids, start = begin + token_ids(tokenizer, head), prompt.answer_start
    if decoder_start:
        decoder = decoder_start + token_ids(tokenizer, start)
        return Pieces(head_ids, token_ids(tokenizer, tail) + end, decoder, start)
    return Pieces(head_ids, token_ids(tokenizer, tail + start), [], tail + start)


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


def raw(prompt: Prompt) -> str:
    """The prompt without a chat template."""
    system = f"{prompt.system}\n\n" if prompt.system else ""
    before, after = prompt.around()
    return f"{system}{before}{SENTINEL}{after}"


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
