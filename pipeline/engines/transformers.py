"""A teacher on this machine through transformers: causal or encoder-decoder, batches by length, the rubric's prefix
computed once."""

import copy
import functools
import inspect
import logging
import math
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline import sampling
from pipeline.config import Teacher
from pipeline.engines.layout import Layout, Row
from pipeline.engines.spacious import spacious
from pipeline.errors import UserError, needs, required
from pipeline.model_files import of_weights, reason
from pipeline.models import files_of, pick_device, pick_dtype
from pipeline.prompts import Prompt
from pipeline.teacher import Answer, Ask, Question, Record

log = logging.getLogger("gristmill")

After = Callable[[tuple[int, ...]], Any]
"""Log-probabilities after each of further tokens: (n_rows, n_tokens, vocabulary)."""


@contextmanager
def started(teacher: Teacher) -> Iterator[Ask]:
    """The model on its device."""
    yield Loaded(*load(teacher, pick_device(teacher.device)))


class Loaded:
    """A loaded model; what is computed of a prompt stays until another comes."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model, self.memory = tokenizer, model, Memory()
        self.last: LocalTeacher | None = None

    def __call__(
        self, prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record
    ) -> None:
        """Ask every question that is still open."""
        ask_all(self.local(prompt, teacher), questions, answered, record)

    def planned(self, prompt: Prompt, teacher: Teacher, questions: list[Question]) -> list[list[Question]]:
        """The batches in which questions would be asked."""
        known = {question.key: question for question in questions}
        return [[known[row.key] for row in batch] for batch in planned(self.local(prompt, teacher), questions)]

    def local(self, prompt: Prompt, teacher: Teacher) -> "LocalTeacher":
        """The model with a prompt."""
        if self.last is None or (self.last.prompt, self.last.settings) != (prompt, teacher):
            self.last = None  # what it holds may fill the memory
            self.last = LocalTeacher(prompt, teacher, self.tokenizer, self.model, self.memory)
        return self.last


@dataclass
class Memory:
    """What is known of the memory beside a loaded model, for as long as it is loaded."""

    max_tokens: float = math.inf
    """Tokens that a batch may have, padding and room for the answer included."""


CHUNK = 512
"""Questions that are sorted by length together: a run that is stopped has asked a fair sample, not the shortest."""


def ask_all(local: "LocalTeacher", questions: list[Question], answered: set[str], record: Record) -> None:
    """Ask batch by batch."""
    for batch in planned(local, questions):
        for answers in local.fitting([row for row in batch if row.key not in answered]):
            if not record(answers):
                return


def planned(local: "LocalTeacher", questions: list[Question]) -> Iterator[list[Row]]:
    """Batches over all questions, in the order of their keys, which is as good as random, so that a resumed run
    computes the same ones."""
    ordered = sorted(questions)
    for begin in range(0, len(ordered), CHUNK):
        rows = sorted(map(local.layout.row, ordered[begin : begin + CHUNK]), key=lambda row: (len(row.ids), row.key))
        yield from batches(rows, local.extra, local.settings.batch_tokens)


def batches(rows: list[Row], extra: int, budget: float) -> list[list[Row]]:
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

    def __init__(
        self, prompt: Prompt, teacher: Teacher, tokenizer: Any, model: Any, memory: Memory | None = None
    ) -> None:
        self.torch = needs("torch", "torch")
        self.prompt, self.settings, self.memory = prompt, teacher, memory or Memory()
        self.tokenizer, self.model, self.device = tokenizer, model, model.device
        self.forward_takes = inspect.signature(model.forward).parameters
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        start = [model.generation_config.decoder_start_token_id] if self.encoder_decoder else []
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.layout = Layout(tokenizer, prompt, teacher, context, start)
        self.pieces, self.candidates = self.layout.pieces, self.layout.candidates
        self.extra = len(self.pieces.head) + self.layout.room
        self.pad, self.ends = pad_and_ends(tokenizer, model)
        self.stops = sampling.stops(teacher)

    @functools.cached_property
    def prefix(self) -> Any:
        """Keys and values of the head, computed once; None where padding behind it would change an answer: sliding
        windows, convolutions, recurrent states and n-grams count columns, not positions."""
        if self.encoder_decoder or not self.pieces.head or "position_ids" not in self.forward_takes:
            return None
        if "no_repeat_ngram_size" in self.settings.args:
            return None
        head = self.torch.tensor([self.pieces.head], device=self.device)
        with self.torch.inference_mode():
            cache = self.model(input_ids=head, use_cache=True).past_key_values
        layers = getattr(cache, "layers", [None])
        plain = all(type(layer).__name__ == "DynamicLayer" and layer.is_initialized for layer in layers)
        return cache if plain else None

    def fitting(self, rows: list[Row]) -> Iterator[list[tuple[str, Answer]]]:
        """Ask one batch, in smaller ones where it doesn't fit into memory."""
        for batch in batches(rows, self.extra, self.memory.max_tokens):
            answers = self.tried(batch)
            if answers is None:
                self.halve(batch)
                yield from self.fitting(batch)
            else:
                yield answers

    def tried(self, rows: list[Row]) -> list[tuple[str, Answer]] | None:
        """The answers of one batch; None if it doesn't fit into memory, which is free again by then."""
        try:
            return self.answers(rows)
        except self.torch.cuda.OutOfMemoryError:
            return None

    def halve(self, rows: list[Row]) -> None:
        """Ask with at most half of these rows' tokens from now on, whatever the prompt."""
        width = len(rows[-1].ids) + self.extra
        if len(rows) == 1:
            raise UserError(
                f"teacher.document_tokens: one document with its rubric and room for the answer, {width} tokens, does"
                f" not fit into the memory of {self.device}; lower it or teacher.max_tokens, or free some memory; what"
                " was answered is recorded"
            )
        self.memory.max_tokens = len(rows) * width // 2
        log.warning(
            "teacher: a batch of %d tokens does not fit into the memory of %s; going on with %d at most",
            *(len(rows) * width, self.device, self.memory.max_tokens),
        )

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
        first, or between head and document where the head's keys are shared; it repeats a token of the row, so that a
        repetition penalty finds no other. Encoders are padded at the end."""
        head, longest = self.pieces.head, max(len(row.ids) for row in rows)
        ids, mask = [], []
        for row in rows:
            fill = longest - len(row.ids)
            before, own = (head, row.ids) if self.prefix is not None else ([], head + row.ids)
            pad = self.pad if self.encoder_decoder else (head + row.ids or [self.pad])[0]
            parts = [(before, 1), ([pad] * fill, 0), (own, 1)]
            parts = parts[::-1] if self.encoder_decoder else parts
            ids.append([token for part, _ in parts for token in part])
            mask.append([seen for part, seen in parts for _ in part])
        tensor = functools.partial(self.torch.tensor, device=self.device)
        return {"input_ids": tensor(ids), "attention_mask": tensor(mask)}

    def prefix_for(self, ids: Any, n_beams: int = 1) -> Any:
        """The head's keys and values for each row of ids, with space for all that follows, the answer included."""
        if self.prefix is None:
            return None
        (n_rows, n_columns), cache = ids.shape, copy.copy(self.prefix)
        room = n_rows * n_beams, n_columns + self.layout.room
        cache.layers = [spacious()(layer, *room) for layer in self.prefix.layers]
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
        cache = self.prefix_for(ids)
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
        return [self.written(ids) for ids in self.new_tokens(rows)]

    def new_tokens(self, rows: list[Row]) -> list[list[int]]:
        """Token ids of the answers; those that end early are padded."""
        batch = self.inputs(rows)
        if self.encoder_decoder:
            batch["decoder_input_ids"] = self.torch.tensor([self.pieces.decoder] * len(rows), device=self.device)
        else:
            batch["past_key_values"] = self.prefix_for(batch["input_ids"], self.options.get("num_beams") or 1)
        begin = len(self.pieces.decoder) or batch["input_ids"].shape[1]
        with sampling.explained(self.settings):
            drawn = sampling.drawing(self.settings, [row.key for row in rows], self.device)
            ways = {**self.options, **drawn, **self.stopping(begin), **self.only_answers(begin)}
            found = self.model.generate(**batch, tokenizer=self.tokenizer, **ways)
        return [list(ids) for ids in found[:, begin:].tolist()]

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """How answers are written; teacher.args has the last word."""
        return {"pad_token_id": self.pad, **sampling.options(self.settings, self.device)}

    @functools.cached_property
    def stopped(self) -> sampling.Completed | None:
        """Says which rows' tokens have just completed a text that ends an answer."""
        return sampling.completed(self.tokenizer, self.stops)

    def stopping(self, begin: int) -> dict[str, Any]:
        """Lets `generate` stop at a text that ends an answer, whether or not the prompt before it has it too."""
        stopped = self.stopped
        return {"stopping_criteria": [lambda ids, *_, **__: stopped(ids[:, begin:], None)]} if stopped else {}

    def only_answers(self, begin: int) -> dict[str, Any]:
        """Lets `generate` write nothing but one of the prompt's permitted answers, where it lists them."""
        if not (self.layout.answers and self.settings.structured):
            return {}
        endings = sorted(self.ends)

        def allowed(_: int, ids: Any) -> list[int]:
            return self.layout.next_tokens(tuple(ids[begin:].tolist()), endings)

        return {"prefix_allowed_tokens_fn": allowed}

    def written(self, ids: list[int]) -> dict[str, Any]:
        """One answer, up to its end token or stop string; a batch that ends early was ended by its rows."""
        n = next((position + 1 for position, token in enumerate(ids) if token in self.ends), len(ids))
        if met := sampling.before_stop(self.stops, ids[:n], self.tokenizer):
            return {"finish": "stop", "text": met.text, "answer_tokens": met.n_tokens}
        ended = n < self.options["max_new_tokens"] or ids[n - 1] in self.ends
        text = self.tokenizer.decode(ids[:n], skip_special_tokens=True)
        return {"finish": "stop" if ended else "length", "text": text, "answer_tokens": n}


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


def load(teacher: Teacher, device: str) -> tuple[Any, Any]:
    """Tokenizer and model of a Hub name, folder or .gguf file."""
    transformers, safetensors = needs("transformers", "torch"), needs("safetensors", "torch")
    model_name = required(teacher.model, "teacher.model", "Qwen/Qwen3-8B")
    name, where = files_of(model_name, "teacher.model", teacher.revision, teacher.trust_remote_code)
    try:
        config = transformers.AutoConfig.from_pretrained(name, **where)
        kinds = {False: transformers.AutoModelForCausalLM, True: transformers.AutoModelForSeq2SeqLM}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
        kind = kinds[bool(config.is_encoder_decoder)]
        model = kind.from_pretrained(name, config=config, dtype=pick_dtype(teacher.dtype, device), **of_weights(where))
    except (OSError, ValueError, KeyError, ImportError, struct.error, safetensors.SafetensorError) as error:
        why = reason(error, "teacher.model")
        raise UserError(f"teacher.model: {teacher.model} cannot be loaded ({why})") from None
    model.generation_config = token_ids_only(model.generation_config)
    try:
        return tokenizer, model.to(device).eval()
    except needs("torch", "torch").cuda.OutOfMemoryError:
        raise UserError(
            f"teacher.model: {teacher.model} does not fit into the memory of {device}; take a smaller model or"
            " --teacher.dtype bfloat16, or free some memory"
        ) from None


def token_ids_only(generation: Any) -> Any:
    """A model's generation settings without its sampling habits (a repetition penalty, a temperature), which would
    work unseen beside ours."""
    kept = {name: value for name, value in generation.to_dict().items() if name.endswith("_token_id")}
    return type(generation)(**kept)
