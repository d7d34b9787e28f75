"""A teacher that is asked by file: requests are written in OpenAI's batch format, answers are read from files that are
put beside them."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.config import Teacher, digest
from pipeline.engines.completions import CHAT, TEXT, NoAnswer, Server, Words, dig, parse
from pipeline.errors import Pending, UserError, required
from pipeline.prompts import Prompt
from pipeline.storage import atomic
from pipeline.teacher import Answer, Ask, Question, Record

log = logging.getLogger("gristmill")

MOST_LINES = 50_000
MOST_BYTES = 190_000_000
"""Of one file; OpenAI takes 50,000 requests and 200 MB."""

AT_ONCE = 200
"""Answers that are recorded together."""

OURS = re.compile(r"requests-[0-9a-f]{8}-\d{4,}\.jsonl")
"""Files that are written here; all other *.jsonl in the folder are answers."""
PACKED = {".gz", ".zst"}
FIRST = re.compile(rb'\{"custom_id": "([0-9a-f:]+)"')
"""How a line that is written here begins."""
KEY = re.compile(r"[0-9a-f]{8,}:[0-9a-f]{8,}")
"""How a question's key looks."""

ABOUT_THE_DOCUMENT = (400, 413, 422)
"""Statuses that will not pass: the question counts as failed, and the stage can end without it."""


class Place(NamedTuple):
    """Where a line begins."""

    path: Path
    offset: int


class Refused(NamedTuple):
    """A request that came back without an answer; `passing`: it may fare better when sent again."""

    why: str
    passing: bool


class Asked(NamedTuple):
    """Questions that are still open, and how they are put."""

    wording: Words
    questions: list[Question]

    @property
    def url(self) -> str:
        """Where the requests go on the endpoint."""
        return "/v1" + (CHAT if self.wording.prompt.chat else TEXT)

    @property
    def mark(self) -> str:
        """Names the files: a batch service takes one model and one URL in a file."""
        return digest([self.wording.settings.model, self.url])[:8]


@contextmanager
def started(teacher: Teacher) -> Iterator[Ask]:
    """Nothing is sent: on leaving, what is still open is written out, and the stage has to wait."""
    folder = required(teacher.batch_folder, "teacher.batch_folder", "batches/edu")
    batch = Batch(folder, *index(folder))
    yield batch.ask
    batch.leave(teacher)


class Batch:
    """A folder of requests and answers. `places`: the lines that answer a question, by its key; `odd`: lines that
    answer none, counted by file and reason."""

    def __init__(self, folder: Path, places: dict[str, list[Place]], odd: Counter[tuple[str, str]]) -> None:
        self.folder, self.places, self.odd = folder, places, odd
        self.open: list[Asked] = []
        self.known: set[str] = set()
        self.failed: list[Refused] = []
        self.n_answered = self.n_waiting = 0
        self.may_ask = True

    def ask(
        self, prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record
    ) -> None:
        """Record the answers that are there, and keep the other questions; every answer that is there is paid for."""
        wording = Words(prompt, teacher, Server())
        still_open: list[Question] = []
        fresh = {question.key: question for question in questions if question.key not in self.known}
        self.known |= fresh.keys()
        remaining = (question for question in fresh.values() if question.key not in answered)
        while some := list(islice(remaining, AT_ONCE)):
            found = {question.key: self.find(question, wording) for question in some}
            answers = [(key, answer) for key, answer in found.items() if answer is not None]
            self.may_ask = (not answers or record(answers)) and self.may_ask
            self.n_answered += sum(answer.finish != "failed" for _, answer in answers)
            self.n_waiting += len(some) - len(answers)
            still_open += [each for each in some if (found[each.key] or Answer("failed")).finish == "failed"]
        self.open.append(Asked(wording, sorted(still_open)))

    def find(self, question: Question, wording: Words) -> Answer | None:
        """The answer to one question; a failed one if the document was refused as such, None if there is none yet."""
        said = [read_line(place, wording) for place in self.places.get(question.key, [])]
        answer = next((each for each in said if isinstance(each, Answer)), None)
        refused = [each for each in said if isinstance(each, Refused)]
        if answer is not None:
            return replace(answer, was_truncated=wording.prepare(question.text)[1])
        self.failed += refused[-1:]
        return None if all(each.passing for each in refused) else Answer("failed")

    # -- what is left

    def leave(self, teacher: Teacher) -> None:
        """Write what is open, and say what to do with it; refused questions are written too, but not waited for.
        Nothing is, if the budget allows no more."""
        files = [path for mark in sorted({asked.mark for asked in self.open}) for path in self.write(mark)]
        self.tell()
        if not self.n_waiting or not self.may_ask:
            return
        n, names = sum(len(asked.questions) for asked in self.open), ", ".join(path.name for path in files)
        output = self.folder / files[0].name.replace("requests", "answers")
        raise Pending(
            f"teacher.batch_folder: {n} requests wait in {self.folder}: {names}; upload them to the endpoint's batch"
            f" service, or run vllm run-batch -i {files[0]} -o {output} --model {teacher.model} and so on; put the"
            " output beside them, and run the same command"
        )

    def write(self, mark: str) -> list[Path]:
        """Write the requests to one model and URL in place of those of an earlier time, so that nothing is paid for
        twice. A file with questions that are not known here is another stage's, and stays."""
        there = {path: keys_in(path) for path in self.folder.glob(f"requests-{mark}-*.jsonl") if is_ours(path)}
        others = {path for path, keys in there.items() if not keys <= self.known}
        if others:
            log.info("batch: %s left as they are: with questions of others", ", ".join(sorted(p.name for p in others)))
        asked = [each for each in self.open if each.mark == mark and self.may_ask]
        free = (path for n in count(1) if (path := self.folder / f"requests-{mark}-{n:04d}.jsonl") not in others)
        written = write(free, (line for each in asked for line in lines(each)))
        for path in there.keys() - others - set(written):
            path.unlink()
        return written

    def tell(self) -> None:
        """What was in the folder; stop if there are files of which nothing can be used."""
        other = Counter(place.path.name for key in self.places.keys() - self.known for place in self.places[key])
        self.odd += Counter({(name, "about other questions"): n for name, n in other.items()})
        told = ", ".join(f"{name}: {n} {why}" for (name, why), n in sorted(self.odd.items()))
        if self.odd and not self.places:
            raise UserError(
                f"teacher.batch_folder: nothing in {self.folder} is an answer ({told}); put the output of"
                " the requests there, and nothing else that ends in .jsonl"
            )
        if self.places or self.odd:
            log.info("batch: %d answers read%s", self.n_answered, f"; lines without one: {told}" if told else "")
        if self.failed:
            log.warning(
                "batch: %d requests came back with an error (such as %s); they are written again",
                len(self.failed),
                Counter(each.why for each in self.failed).most_common(1)[0][0],
            )


# -- answers


def index(folder: Path) -> tuple[dict[str, list[Place]], Counter[tuple[str, str]]]:
    """Where each question is answered, and how many lines of each file answer none."""
    places: dict[str, list[Place]] = {}
    odd: Counter[tuple[str, str]] = Counter()
    for path in sorted(folder.glob("*.jsonl*")):
        if path.suffix in PACKED:
            odd[path.name, "file to be unpacked first"] += 1
        if path.suffix != ".jsonl" or is_ours(path) or not path.is_file():
            continue
        for offset, line in numbered(path):
            key, why = key_of(line)
            if why:
                odd[path.name, why] += 1
            else:
                places.setdefault(key, []).append(Place(path, offset))
    return places, odd


def is_ours(path: Path) -> bool:
    """Whether a file has a name that is given here."""
    return bool(OURS.fullmatch(path.name))


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with the byte it begins at."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield offset, line
            offset += len(line)


def key_of(line: bytes) -> tuple[str, str | None]:
    """The key of the question that a line answers, or why it answers none."""
    try:
        said = parse(line)
    except NoAnswer:
        return "", "half-written or no JSON"
    key = dig(said, "custom_id")
    if not isinstance(said, dict) or not said.keys() & {"response", "error"}:
        return "", "no answers"
    ours = isinstance(key, str) and KEY.fullmatch(key)
    return (str(key), None) if ours else ("", "with a custom_id that is none of ours")


def read_line(place: Place, wording: Words) -> Answer | Refused:
    """What one line says."""
    with place.path.open("rb") as file:
        file.seek(place.offset)
        said = parse(file.readline())
    status, error = dig(said, "response", "status_code"), error_of(said)
    if dig(error, "code") == "content_filter":
        return Answer("refused")
    if error or status != 200:
        why = str(dig(error, "message") or error or "no response")
        return Refused(" ".join(f"{status or ''} {why}".split())[:200], passing=status not in ABOUT_THE_DOCUMENT)
    return completion(dig(said, "response", "body"), wording)


def error_of(said: Any) -> Any:
    """The error in a line: beside the response, or in its body, there or one deeper."""
    error = said.get("error") or dig(said, "response", "body", "error")
    return dig(error, "error") or error


def completion(body: Any, wording: Words) -> Answer | Refused:
    """The answer in a completion, if it is one."""
    try:
        answer = wording.read(body)
    except NoAnswer as error:
        return Refused(str(error), passing=True)
    if wording.prompt.read == "choices" and answer.log_probs is None and answer.finish != "refused":
        return Refused("no log-probabilities", passing=True)
    return wording.join([answer])


# -- requests


def lines(asked: Asked) -> Iterator[bytes]:
    """The requests, a line each."""
    for question in asked.questions:
        request = asked.wording.request(asked.wording.prepare(question.text)[0])
        line = {"custom_id": question.key, "method": "POST", "url": asked.url, "body": request.body}
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def write(paths: Iterator[Path], requests: Iterator[bytes]) -> list[Path]:
    """Request files, as many as it takes."""
    written: list[Path] = []
    line = next(requests, None)
    while line is not None:
        path = next(paths)
        with atomic(path) as temporary, temporary.open("wb") as file:
            line = fill(file, line, requests)
        written.append(path)
    return written


def fill(file: IO[bytes], line: bytes | None, requests: Iterator[bytes]) -> bytes | None:
    """Fill one file; returns the line that has no room in it."""
    n = size = 0
    while line is not None and (n == 0 or (n < MOST_LINES and size + len(line) <= MOST_BYTES)):
        file.write(line)
        n, size = n + 1, size + len(line)
        line = next(requests, None)
    return line


def keys_in(path: Path) -> set[str]:
    """The keys of the questions in a request file; what is not written here counts as one that nobody knows."""
    if not path.is_file():
        return {""}
    begins = (FIRST.match(line) for _, line in numbered(path))
    return {begin[1].decode() if begin else "" for begin in begins}
