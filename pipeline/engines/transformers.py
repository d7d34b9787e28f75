"""A teacher on this machine through transformers: causal or encoder-decoder, batches by length, the rubric's prefix
computed once."""

import copy
import inspect
import logging
import math
import time
import warnings
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


class Row(NamedTuple):
    """A document ready to be asked about: its own token ids without the head."""

    key: str
    ids: list[int]
    was_cut: bool


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
        self.encoder_decoder = bool(self.model.config.is_encoder_decoder)
        self.room = teacher.max_tokens if prompt.read == "generate" else 1
        start = [self.model.config.decoder_start_token_id] if self.encoder_decoder else []
        self.pieces = pieces(self.tokenizer, prompt, teacher, start)
        self.candidates = candidate_ids(self.tokenizer, prompt, self.pieces)
        self.mark = self.tokenizer(CUT_MARK, add_special_tokens=False)["input_ids"]
        self.document_tokens = self.fit_context()
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        self.prefix = self.compute_prefix()

    def fit_context(self) -> int:
        """Tokens a document may have: what was asked for, or what the model's context leaves beside the rubric."""
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or math.inf
        around = len(self.pieces.head) + len(self.pieces.tail) + len(self.mark)
        free = context - around - (0 if self.encoder_decoder else self.room)
        if free < 16:
            raise UserError(
                f"prompt {self.prompt.name}: the rubric takes {around} tokens and the answer {self.room} of the"
                f" model's {context}; shorten the rubric or lower --teacher.max-tokens"
            )
        if free < self.settings.document_tokens:
            log.info("documents are cut to %d tokens: the model's context holds no more", free)
        return int(min(free, self.settings.document_tokens))

    def row(self, question: Question) -> Row:
        """Token ids of one document; its control tokens are spelled out, so it cannot end its turn."""
        text = self.prompt.fence(question.text.encode("utf-8", "replace").decode())
        ids, was_cut = first_tokens(text, self.document_tokens, self.tokenizer, split_special_tokens=True)
        return Row(question.key, ids + (self.mark if was_cut else []) + self.pieces.tail, was_cut)

    def compute_prefix(self) -> Any:
        """Keys and values of the head, computed once; None where the model's cache cannot be shared that way."""
        if self.encoder_decoder or not self.pieces.head:
            return None
        head = self.torch.tensor([self.pieces.head], device=self.device)
        with self.torch.inference_mode():
            cache = self.model(input_ids=head, use_cache=True).past_key_values
        plain = type(cache).__name__ == "DynamicCache" and not any(cache.is_sliding)
        return cache if plain and not any(getattr(cache, "is_linear", [])) else None

    def answers(self, rows: list[Row]) -> list[tuple[str, Answer]]:
        """Ask one batch."""
        begin = time.perf_counter()
        with self.torch.inference_mode():
            found = self.choose(rows) if self.prompt.read == "choices" else self.generate(rows)
        seconds = (time.perf_counter() - begin) / len(rows)
        n_head = len(self.pieces.head)
        return [
            (
                row.key,
                Answer(**answer, prompt_tokens=n_head + len(row.ids), seconds=seconds, was_cut=row.was_cut),
            )
            for row, answer in zip(rows, found, strict=True)
        ]

    def inputs(self, rows: list[Row]) -> dict[str, Any]:
        """Padded ids and mask, (n_rows, longest). Causal models are padded between head and document, so that the
        head's keys stay shared and the last token is the last column; encoders at the end."""
        longest = max(len(row.ids) for row in rows)
        ids, mask = [], []
        for row in rows:
            fill = longest - len(row.ids)
            head, pad = self.pieces.head, [self.pad] * fill
            ones, zeros = [1] * len(row.ids), [0] * fill
            ids.append(head + row.ids + pad if self.encoder_decoder else head + pad + row.ids)
            mask.append([1] * len(head) + (ones + zeros if self.encoder_decoder else zeros + ones))
        tensor = self.torch.tensor
        return {
            "input_ids": tensor(ids, device=self.device),
            "attention_mask": tensor(mask, device=self.device),
        }

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
        torch = self.torch
        first, after = self.decoder_step(rows) if self.encoder_decoder else self.causal_step(rows)
        log_probs = {}
        for name, ids in self.candidates.items():
            total = torch.full((len(rows),), -math.inf) if ids is None else first[:, ids[0]].clone()
            if ids is not None and len(ids) > 1:
                following = after(ids[:-1])
                total += sum(following[:, step, token] for step, token in enumerate(ids[1:]))
            log_probs[name] = total.tolist()
        return [
            {"finish": "stop", "log_probs": {name: column[i] for name, column in log_probs.items()}}
            for i in range(len(rows))
        ]

    def causal_step(self, rows: list[Row]) -> tuple[Any, Any]:
        """Log-probabilities (n_rows, vocabulary) after the prompt, and a function that gives those after further
        tokens, (n_rows, n_tokens, vocabulary)."""
        batch, cache = self.inputs(rows), self.prefix_for(len(rows))
        mask = batch["attention_mask"]
        seen = cache.get_seq_length() if cache is not None else 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=batch["input_ids"][:, seen:],
            attention_mask=mask,
            position_ids=positions[:, seen:],
            past_key_values=cache,
            use_cache=True,
            **self.last_only(),
        )
        cache = out.past_key_values

        def after(ids: list[int]) -> Any:
            n = len(ids)
            before = cache.get_seq_length()
            ones = self.torch.ones((len(rows), n), dtype=mask.dtype, device=self.device)
            further = self.model(
                input_ids=self.torch.tensor([ids] * len(rows), device=self.device),
                attention_mask=self.torch.cat([mask, ones], 1),
                position_ids=positions[:, -1:] + self.torch.arange(1, n + 1, device=self.device),
                past_key_values=cache,
                use_cache=True,
            )
            cache.crop(before)
            return self.log_softmax(further.logits)

        return self.log_softmax(out.logits[:, -1]), after

    def decoder_step(self, rows: list[Row]) -> tuple[Any, Any]:
        """The same for an encoder-decoder: the document is encoded once, candidates are tried on the decoder."""
        batch = self.inputs(rows)
        encoded = self.model.get_encoder()(**batch)

        def log_probs(ids: list[int]) -> Any:
            decoder = self.torch.tensor([self.pieces.decoder + ids] * len(rows), device=self.device)
            out = self.model(
                encoder_outputs=encoded, attention_mask=batch["attention_mask"], decoder_input_ids=decoder
            )
            return self.log_softmax(out.logits)

        return log_probs([])[:, -1], lambda ids: log_probs(ids)[:, -len(ids) :]

    def log_softmax(self, logits: Any) -> Any:
        """Natural log-probabilities in float32 on the CPU."""
        return self.torch.log_softmax(logits.float(), dim=-1).cpu()

    def last_only(self) -> dict[str, int]:
        """Spares the vocabulary projection of every token but the last, where the model knows how."""
        known = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return {"logits_to_keep": 1} if known else {}

    # -- generate

    def generate(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Written answers."""
        batch, settings = self.inputs(rows), self.settings
        if self.encoder_decoder:
            batch["decoder_input_ids"] = self.torch.tensor([self.pieces.decoder] * len(rows), device=self.device)
        elif (cache := self.prefix_for(len(rows))) is not None:
            batch["past_key_values"] = cache
        self.torch.manual_seed(settings.seed + int(rows[0].key[-8:], 16))
        sampled = settings.temperature > 0
        options = {
            "max_new_tokens": settings.max_tokens,
            "pad_token_id": self.pad,
            "do_sample": sampled,
            "temperature": settings.temperature if sampled else None,
            "top_p": (settings.top_p or 1.0) if sampled else None,
            "top_k": None,
            **settings.args,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.model.generate(**batch, **options)
        begin = len(self.pieces.decoder) if self.encoder_decoder else batch["input_ids"].shape[1]
        return [self.written(ids) for ids in out[:, begin:].tolist()]

    def written(self, ids: list[int]) -> dict[str, Any]:
        """One answer, up to its end token."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        n = next((position + 1 for position, token in enumerate(ids) if token in ends), None)
        text = self.tokenizer.decode(ids[:n], skip_special_tokens=True)
        return {"finish": "stop" if n else "length", "text": text, "answer_tokens": n or len(ids)}


def load(teacher: Teacher, device: str) -> tuple[Any, Any]:
    """Tokenizer and model of a Hub name, folder or .gguf file."""
    transformers = needs("transformers", "torch")
    name = locate(required(teacher.model, "teacher.model", "Qwen/Qwen3-8B"), "teacher.model")
    where: dict[str, Any] = {"revision": teacher.revision} if teacher.revision else {}
    if name.endswith(".gguf"):
        needs("gguf", "demo")
        name, where = str(Path(name).parent), {"gguf_file": Path(name).name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
        config = transformers.AutoConfig.from_pretrained(name, **where)
        kinds = {False: transformers.AutoModelForCausalLM, True: transformers.AutoModelForSeq2SeqLM}
        kind = kinds[bool(config.is_encoder_decoder)]
        model = kind.from_pretrained(name, dtype=pick_dtype(teacher.dtype, device), **where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"teacher.model: {teacher.model} cannot be loaded ({reason})") from None
    return tokenizer, model.to(device).eval()


def pieces(tokenizer: Any, prompt: Prompt, teacher: Teacher, decoder_start: list[int]) -> Pieces:
    """The token ids that enclose every document; `decoder_start` is empty for causal models."""
    rendered = render(tokenizer, prompt, teacher) if prompt.chat else raw(prompt)
    head, found, tail = rendered.partition(SENTINEL)
    if not found or SENTINEL in tail:
        raise UserError(f"prompt {prompt.name}: the chat template of {teacher.model} does not show the document once")
    begin, end = ([], []) if prompt.chat else special_tokens_around(tokenizer)
    head_ids = begin + token_ids(tokenizer, head)
    if decoder_start:
        decoder = decoder_start + token_ids(tokenizer, prompt.answer_start)
        return Pieces(head_ids, token_ids(tokenizer, tail) + end, decoder)
    return Pieces(head_ids, token_ids(tokenizer, tail + prompt.answer_start), [])


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


def candidate_ids(tokenizer: Any, prompt: Prompt, around: Pieces) -> dict[str, list[int] | None]:
    """Token ids of each candidate in its place, after the forced beginning; None for one that another includes.

    P(candidate) is the product over its tokens. Candidates with the same tokens, or one of which begins with the
    other, are one event: within a group it is counted once, across groups it is refused.
    """
    start = answer_context(tokenizer, prompt, around)
    groups = {answer: choice.value for choice in prompt.choices for answer in choice.answers}
    resolved: dict[str, list[int] | None] = {}
    for name in sorted(groups, key=lambda name: len(ids_after(tokenizer, start, name, prompt))):
        ids = ids_after(tokenizer, start, name, prompt)
        includes = [other for other, prefix in resolved.items() if prefix and ids[: len(prefix)] == prefix]
        if includes and groups[includes[0]] != groups[name]:
            raise UserError(f"prompt {prompt.name}: to this teacher, candidate {name!r} begins with {includes[0]!r}")
        resolved[name] = None if includes else ids
    return resolved


def answer_context(tokenizer: Any, prompt: Prompt, around: Pieces) -> str:
    """The text right before the answer: enough of it to tokenise candidates in context."""
    if prompt.answer_start or around.decoder or not around.tail:
        return prompt.answer_start
    return str(tokenizer.decode(around.tail[-1:]))


def ids_after(tokenizer: Any, start: str, candidate: str, prompt: Prompt) -> list[int]:
    """Token ids that follow `start` when the candidate is written there."""
    before, both = token_ids(tokenizer, start), token_ids(tokenizer, start + candidate)
    ids = both[len(before) :]
    if both[: len(before)] != before or not ids:
        raise UserError(
            f"prompt {prompt.name}: candidate {candidate!r} merges with the answer's beginning {start!r}; move the"
            " space between them from the beginning to the candidate"
        )
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise UserError(f"prompt {prompt.name}: this teacher's vocabulary cannot spell candidate {candidate!r}")
    return ids
