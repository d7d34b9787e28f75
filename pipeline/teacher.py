"""Ask an LLM: one question per document, every answer recorded before it is used."""

import json
import logging
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from pipeline import reading
from pipeline.config import Teacher, digest
from pipeline.corpus import text_id
from pipeline.errors import UserError
from pipeline.prompts import Prompt
from pipeline.reading import Reading, Reason
from pipeline.sampling import is_sampled
from pipeline.storage import check_form

log = logging.getLogger("gristmill")


class Question(NamedTuple):
    """A document to be asked about; `key` names the answer in the store."""

    key: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What a teacher said, as it said it; how it is read can change later without asking again."""

    finish: Literal["stop", "length", "refused", "failed", "not_asked"]
    text: str = ""
    log_probs: dict[str, float] | None = None
    """Natural log-probability of each candidate over the full vocabulary; -inf where it was not seen."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    """From the first sending to the answer, retries included; a local model's share of its batch."""
    was_truncated: bool = False
    """The document was longer than teacher.document_tokens."""


Record = Callable[[list[tuple[str, Answer]]], bool]
"""Takes answers in; says whether to go on asking. Requests already sent are waited for either way."""


class Ask(Protocol):
    """An engine with its model loaded: asks what is not in `answered` and hands each answer to `record` as it arrives.
    The teacher may differ from call to call in how it is asked (seed, max_tokens), never in what is loaded."""

    def __call__(
        self, prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record
    ) -> None:
        """Ask every question that is still open."""
        ...


def questions(prompt: Prompt, teacher: Teacher, texts: Iterable[str]) -> list[Question]:
    """One question per text, keyed by the text, what is asked, and who is asked with which settings."""
    asking = digest([prompt.asked_digest, identity(prompt, teacher)])
    return [Question(f"{asking}:{text_id(text)}", text) for text in texts]


ONLY = {
    "transformers": {"revision", "dtype", "tfs", "top_a"},
    "vllm": {"revision", "dtype", "max_model_len", "quantization", "engine_args"},
    "openai": {"tokenizer", "top_logprobs"},
}
"""Settings that bear on the answers of some engines only."""

DRAWN_BY = {"top_p", "top_k", "min_p", "tfs", "top_a", "seed"}
"""Settings that bear on sampled answers only."""
WRITTEN_BY = {"max_tokens", "temperature", "repetition_penalty", "stop", *DRAWN_BY}
"""Settings that bear on written answers only."""


def identity(prompt: Prompt, teacher: Teacher) -> dict[str, object]:
    """The teacher's settings that bear on an answer of this kind, from this engine; those that ask for nothing are
    left out."""
    aside = set().union(*ONLY.values()) - ONLY[teacher.engine]
    aside |= WRITTEN_BY if prompt.read == "choices" else {"top_logprobs"}
    aside |= {"args"} if prompt.read == "choices" and teacher.engine != "openai" else set()
    aside |= set() if is_sampled(teacher) else DRAWN_BY
    aside |= set() if prompt.form else {"structured"}
    aside |= set() if prompt.chat else {"chat_template_args"}
    given = {name: value for name, value in teacher.identity().items() if value not in (None, [], {})}
    return {name: value for name, value in given.items() if name not in aside}


UNREAD: dict[str, Reason] = {"failed": "request_failed", "refused": "refused", "not_asked": "not_asked"}
"""Answers with nothing to read, and why."""


def read(prompt: Prompt, answer: Answer, empty: Answer | None = None) -> Reading:
    """The score in an answer, whichever way the prompt reads; `empty` is the answer about an empty document, to
    calibrate choices by."""
    if answer.finish in UNREAD:
        return Reading(None, UNREAD[answer.finish])
    if prompt.read == "choices":
        return reading.read_choices(prompt, answer.log_probs or {}, empty.log_probs if empty else None)
    ways = {"generate": reading.read_text, "json": reading.read_json, "label": reading.read_label}
    return ways[prompt.read](prompt, prompt.answer_start + answer.text, answer.finish == "stop")


def check_candidates_seen(prompt: Prompt, teacher: Teacher, answers: Iterable[Answer]) -> None:
    """Name the groups of candidates that came up in no answer: an endpoint lists only the likeliest single tokens.
    Where a single group is left, all scores are the same, and the prompt is refused."""
    given = [answer.log_probs for answer in answers if answer.log_probs is not None]
    seen = {name for log_probs in given for name, log_p in log_probs.items() if log_p > -math.inf}
    absent = [choice for choice in prompt.choices if given and not seen & set(choice.answers)]
    for choice in absent:
        told = (
            f"prompt {prompt.name}: none of {', '.join(map(repr, choice.answers))} was ever among the"
            f" {teacher.top_logprobs} likeliest tokens of {teacher.model}; spell each as one of its tokens, or"
            " lead to them with answer_start"
        )
        if len(prompt.choices) - len(absent) < 2:
            raise UserError(told)
        log.warning("%s; counted as probability 0", told)


class AnswerStore:
    """Answers on disk, by key: an SQLite journal where a recorded answer survives kill -9 and power loss.

    Failed requests are not recorded, so that they are asked again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with self.explained("make room, or move the file away, and run again"):
            self.db = sqlite3.connect(path, timeout=PATIENCE_S)
            self.db.execute(f"PRAGMA journal_mode={journal(path)}")
            self.db.execute("PRAGMA synchronous=FULL")
            self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            check_form(self.db)

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()

    def add(self, answers: list[tuple[str, Answer]]) -> None:
        """Record answers; on return they are on the disk."""
        rows = [(key, encode(answer)) for key, answer in answers if answer.finish != "failed"]
        with self.explained("everything recorded so far is kept, make room and run again"), self.db:
            self.db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def take(self, path: Path, ids: set[str] | None = None) -> None:
        """Record what another store holds, all of it or what is about texts with these ids; what is here stays."""
        with AnswerStore(path) as other, other.explained("make room, or move the file away, and run again"), self.db:
            found = other.db.execute("SELECT key, answer FROM answers")
            rows = (row for row in found if ids is None or row[0].rpartition(":")[2] in ids)
            self.db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)

    def find(self, keys: Iterable[str]) -> Iterator[tuple[str, Answer]]:
        """The recorded answers among these keys."""
        with self.explained("the file is damaged; move it away and run again"):
            for key in keys:
                row = self.db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    yield key, decode(row[0])

    def __len__(self) -> int:
        return int(self.db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    @contextmanager
    def explained(self, remedy: str) -> Iterator[None]:
        """What the database complains about, as one line."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise UserError(f"answer store {self.path}: {error}; {remedy}") from None


PATIENCE_S = 60
"""How long a store waits for another process that reads or writes the same one."""


def journal(path: Path) -> str:
    """How SQLite makes a store safe. A part's is read by processes on other machines, and WAL keeps its index in
    memory that only those of one machine share."""
    return "DELETE" if "-of-" in path.name else "WAL"


def encode(answer: Answer) -> str:
    """An answer as strict JSON: an unseen candidate is null."""
    fields = asdict(answer)
    if answer.log_probs is not None:
        fields["log_probs"] = {name: log_p if log_p > -math.inf else None for name, log_p in answer.log_probs.items()}
    return json.dumps(fields, ensure_ascii=True)


def decode(stored: str) -> Answer:
    """The answer that was encoded."""
    fields = json.loads(stored)
    if fields["log_probs"] is not None:
        fields["log_probs"] = {name: -math.inf if p is None else p for name, p in fields["log_probs"].items()}
    return Answer(**fields)
