"""A teacher that is asked by file: requests are written in OpenAI's batch format, answers are read from files that are
put beside them."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.config import Teacher
from pipeline.engines.completions import NoAnswer, Server, Words, dig
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

OURS = re.compile(r"requests-\d{4,}\.jsonl")
"""Files that are written here; all other *.jsonl in the folder are answers."""
KEY = re.compile(r"[0-9a-f]{8,}:[0-9a-f]{8,}")
"""How a question's key looks."""

ABOUT_THE_DOCUMENT = {400, 413, 422}
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

    def ask(
        self, prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record
    ) -> None:
        """Record the answers that are there, and keep the other questions; every answer that is there is paid for."""
        wording, may_ask = Words(prompt, teacher, Server()), True
        still_open: list[Question] = []
        fresh = {question.key: question for question in questions if question.key not in self.known}
        self.known |= fresh.keys()
        remaining = (question for question in fresh.values() if question.key not in answered)
        while some := list(islice(remaining, AT_ONCE)):
            found = {question.key: self.find(question, wording) for question in some}
            answers = [(key, answer) for key, answer in found.items() if answer is not None]
            may_ask = (not answers or record(answers)) and may_ask
            self.n_answered += sum(answer.finish != "failed" for _, answer in answers)
            self.n_waiting += sum(answer is None for answer in found.values()) if may_ask else 0
            still_open += [each for each in some if (found[each.key] or Answer("failed")).finish == "failed"]
        if may_ask:
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
        """Write what is open, and say what to do with it; refused questions are written too, but not waited for."""
        files = write(self.folder, (line for asked in self.open for line in lines(asked)))
        sweep(self.folder, files)
        self.tell()
        if not self.n_waiting:
            return
        n, first = sum(len(asked.questions) for asked in self.open), files[0]
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        raise Pending(
            f"teacher.batch_folder: {n} requests wait in {first}{more}; upload them to the endpoint's batch service,"
            f" or run vllm run-batch -i {first} -o {self.folder / 'answers-0001.jsonl'} --model {teacher.model}; put"
            " the output beside them, and run the same command"
        )

    def tell(self) -> None:
        """What was in the folder; stop if there are files of which nothing can be used."""
        other = Counter(place.path.name for key in self.places.keys() - self.known for place in self.places[key])
        self.odd += Counter({(name, "about other questions"): n for name, n in other.items()})
        told = ", ".join(f"{name}: {n} {why}" for (name, why), n in sorted(self.odd.items()))
        if self.odd and not self.places:
            raise UserError(
                f"teacher.batch_folder: nothing in {self.folder} is an answer ({told}); put the output of"
                " requests-0001.jsonl there, and nothing else that ends in .jsonl"
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
    for path in sorted(folder.glob("*.jsonl")):
        if OURS.fullmatch(path.name):
            continue
        for offset, line in numbered(path):
            key, why = key_of(line)
            if why:
                odd[path.name, why] += 1
            else:
                places.setdefault(key, []).append(Place(path, offset))
    return places, odd


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
        said = json.loads(line)
    except ValueError:
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
        said = json.loads(file.readline())
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
        line = {"custom_id": question.key, "method": "POST", "url": f"/v1{request.path}", "body": request.body}
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def write(folder: Path, requests: Iterator[bytes]) -> list[Path]:
    """Request files, as many as it takes."""
    written: list[Path] = []
    line = next(requests, None)
    while line is not None:
        path = folder / f"requests-{len(written) + 1:04d}.jsonl"
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


def sweep(folder: Path, keep: list[Path]) -> None:
    """Remove request files of an earlier time, so that nothing in them is paid for twice."""
    for path in folder.glob("requests-*.jsonl"):
        if OURS.fullmatch(path.name) and path not in keep:
            path.unlink()
