"""A real OpenAI-compatible endpoint on 127.0.0.1, for tests: it counts what it is asked, and misbehaves on request."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import prompts, teacher
from pipeline.config import Recipe
from pipeline.engines import engine
from pipeline.teacher import Answer

CHOICES: dict[str, Any] = {
    "read": "choices",
    "choices": [{"value": 5, "answers": [" good"]}, {"value": 0, "answers": [" bad"]}],
}
GENERATE = "How good is it?\n\n<text>\n{{ text }}\n</text>\n\nEnd with Score: and a number from 0 to 5."


@dataclass
class Asked:
    """One request."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    document: str
    """doc-<n> as found in the prompt."""
    attempt: int
    """The how-manieth request about this document, from 1."""
    n: int
    """The how-manieth request of all, from 1."""
    at: float

    @property
    def shown(self) -> str:
        """The prompt of a plain completion, or the last user turn of a chat."""
        if "prompt" in self.body:
            return str(self.body["prompt"])
        return [turn["content"] for turn in self.body["messages"] if turn["role"] == "user"][-1]


class Done(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


Process = subprocess.Popen[str]
Reply = Callable[["Handler"], None]
Script = Callable[[Asked], Reply]


class Endpoint(ThreadingHTTPServer):
    """Answers as its script says; every request is kept."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, script: Script, delay_s: float = 0.0, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.delay_s = script, delay_s
        self.models: list[dict[str, Any]] | None = None
        """What GET /v1/models lists; None has no such path."""
        self.tokenizer: Any = None
        """Finds the document in a prompt of token ids."""
        self.looked: list[str] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.asked: list[Asked] = []
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def attempts(self) -> Counter[str]:
        """Requests per document."""
        with self.lock:
            return Counter(asked.document for asked in self.asked)

    def take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Asked:
        ids = body.get("prompt")
        text = self.tokenizer.decode(ids) if isinstance(ids, list) else json.dumps(body, ensure_ascii=False)
        found = re.search(r"doc-\d+", text)
        with self.lock:
            name = found[0] if found else ""
            attempt = 1 + sum(asked.document == name for asked in self.asked)
            asked = Asked(path, body, headers, name, attempt, len(self.asked) + 1, time.monotonic())
            self.asked.append(asked)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return asked

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up; that is no error of the server."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Endpoint

    def do_GET(self) -> None:
        self.server.looked.append(self.path)
        listed = {"object": "list", "data": self.server.models}
        found = self.path == "/v1/models" and self.server.models is not None
        (reply(listed) if found else error(404, "Not Found"))(self)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        asked = self.server.take(self.path, {k.lower(): v for k, v in self.headers.items()}, json.loads(raw))
        try:
            self.server.closing.wait(self.server.delay_s)
            self.server.script(asked)(self)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def send(
        self, content: bytes, status: int = 200, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(script: Script, delay_s: float = 0.0, port: int = 0) -> Iterator[Endpoint]:
    """An endpoint for as long as the block lasts."""
    server = Endpoint(script, delay_s, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


# -- replies


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    """Any JSON."""
    return lambda handler: handler.send(json.dumps(body).encode(), status, headers=headers)


def says(text: str | None, finish: str = "stop", **message: Any) -> Reply:
    """A written answer, in the shape of a chat and of a plain completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "text": text or ""}
    return completion({**choice, "finish_reason": finish})


def likes(log_probs: dict[str, float], finish: str = "length") -> Reply:
    """One token with its rivals, in the shape of the request's kind."""

    def send(handler: Handler) -> None:
        token = next(iter(log_probs), "")
        tops = [{"token": token, "logprob": p} for token, p in log_probs.items()]
        position = {"token": token, "logprob": 0.0, "top_logprobs": tops}
        chat = {"content": [position]}
        plain = {"tokens": [token], "token_logprobs": [0.0], "top_logprobs": [log_probs]}
        logprobs = chat if "chat" in handler.path else plain
        choice = {"message": {"role": "assistant", "content": token}, "text": token, "logprobs": logprobs}
        completion({**choice, "index": 0, "finish_reason": finish})(handler)

    return send


def completion(choice: dict[str, Any]) -> Reply:
    """A completion of one choice, with usage."""
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return reply({"id": "x", "object": "x", "created": 0, "model": "m", "choices": [choice], "usage": usage})


def error(status: int, message: str = "no", code: str | None = None, headers: dict[str, str] | None = None) -> Reply:
    """An error as OpenAI's endpoint words it."""
    body = {"error": {"message": message, "type": "x", "code": code}}
    return reply(body, status, headers)


def raw(content: bytes, kind: str = "application/json") -> Reply:
    """Anything at all."""
    return lambda handler: handler.send(content, 200, kind)


def html() -> Reply:
    """A gateway's idea of an answer."""
    return raw(b"<html><body>We'll be back soon</body></html>", "text/html")


def truncated() -> Reply:
    """JSON that ends in the middle."""
    return raw(b'{"id": "x", "choices": [{"index": 0, "mess')


def drop(handler: Handler) -> None:
    """Hang up without a word."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def stall(handler: Handler) -> None:
    """Never answer."""
    handler.server.closing.wait(20)
    handler.close_connection = True


def dribble(handler: Handler) -> None:
    """Answer a byte at a time, for ever: no single read times out."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "100000")
    handler.end_headers()
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def hang_up_halfway(handler: Handler) -> None:
    """Promise more than is sent."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "x"')
    handler.wfile.flush()
    drop(handler)


def number(asked: Asked) -> int:
    """The n of doc-<n>."""
    return int(asked.document.removeprefix("doc-"))


def score_of(asked: Asked) -> Reply:
    """A well-behaved teacher: doc-<n> is worth n modulo 6."""
    return says(f"It is what it is.\nScore: {number(asked) % 6}")


# -- a server with a real model


@contextmanager
def serve_model(folder: Path, max_model_len: int = 2048, exact: bool = True) -> Iterator[Endpoint]:
    """What a vLLM server answers to token ids, by a real model; not `exact`: it ignores logprob_token_ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, one_at_a_time = AutoModelForCausalLM.from_pretrained(folder).eval(), threading.Lock()

    def script(asked: Asked) -> Reply:
        body = asked.body
        ids = torch.tensor([body["prompt"]])
        with torch.inference_mode(), one_at_a_time:
            if "logprobs" in body:
                log_p = model(ids).logits[0, -1].float().log_softmax(-1)
                wanted = body.get("logprob_token_ids", []) if exact else []
                top = log_p.topk(max(body["logprobs"], 1)).indices.tolist() if not wanted else [int(log_p.argmax())]
                return likes({f"token_id:{i}": float(log_p[i]) for i in dict.fromkeys([*top, *wanted])})
            out = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False, top_p=1.0, temperature=1.0)
        written = out[0, ids.shape[1] :].tolist()
        done = written[-1] == model.config.eos_token_id
        return says(server.tokenizer.decode(written, skip_special_tokens=True), "stop" if done else "length")

    with serve(script) as server:
        server.tokenizer = AutoTokenizer.from_pretrained(folder)
        server.models = [{"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": max_model_len}]
        yield server


# -- rating at an endpoint


def answers(
    recipe: Recipe, texts: list[str], record: Callable[[str, Answer], bool] = lambda *_: True
) -> dict[str, Answer]:
    """The answer about each text; `record` sees each as it comes, and says whether to go on."""
    prompt, found, asked = prompts.load(Path(str(recipe.rate.prompt))), {}, {}

    def take(some: list[tuple[str, Answer]]) -> bool:
        assert not found.keys() & {asked[key] for key, _ in some}, "recorded once"
        found.update({asked[key]: answer for key, answer in some})
        return min(record(asked[key], answer) for key, answer in some)

    questions = teacher.questions(prompt, recipe.teacher, texts)
    asked = {question.key: question.text for question in questions}
    with engine(recipe.teacher) as ask:
        ask(prompt, recipe.teacher, questions, set(), take)
    return found


def corpus(folder: Path, n: int, tail: str = "") -> Path:
    """A corpus of doc-0 to doc-<n-1>, named id-0 to id-<n-1>."""
    return write(folder, [{"id": f"id-{i}", "text": f"doc-{i} is a document.{tail}"} for i in range(n)])


def write(folder: Path, rows: list[dict[str, Any]], name: str = "corpus.parquet") -> Path:
    """A file of these rows."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


def recipe(
    folder: Path,
    url: str,
    n: int = 8,
    prompt: dict[str, Any] | None = None,
    rate: dict[str, Any] | None = None,
    **settings: Any,
) -> Recipe:
    """A recipe that rates n documents at this endpoint: of the corpus in the folder, else of a new one."""
    front = {"read": "generate", **(prompt or {})}
    body = front.pop("body", GENERATE)
    (folder / "prompt.md").write_text(f"---\n{json.dumps(front)}\n---\n{body}\n", encoding="utf-8")
    path = folder / "corpus.parquet"
    defaults = {"engine": "openai", "model": "m", "base_url": url, "retries": 2, "timeout_s": 20}
    return Recipe.model_validate(
        {
            "run_folder": folder / "run",
            "corpus": {"path": str(path if path.exists() else corpus(folder, n)), "id_column": "id"},
            "teacher": {**defaults, **settings},
            "rate": {"prompt": folder / "prompt.md", "sample": n, "max_unscored_rate": 1.0, **(rate or {})},
        }
    )


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """The recipe with other settings in one section."""
    return Recipe.model_validate(recipe.model_dump() | {section: {**recipe.model_dump()[section], **values}})


def ratings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The ratings by id; of a single opinion, what it says stands in the row."""
    rows = pq.read_table(recipe.run_folder / "rate" / "ratings.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: {**row["opinions"][0], **row} if len(row["opinions"]) == 1 else row for row in rows}


def start(recipe: Recipe, stage: str = "rate", *flags: str, before: tuple[str, ...] = (), **env: str) -> Process:
    """The real command in a process group of its own, not waited for; `before` stands before it."""
    path = Path(str(recipe.corpus.path)).parent / "recipe.yaml"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    return subprocess.Popen(
        [*before, sys.executable, "-m", "pipeline", stage, str(path), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **env},
    )


def gristmill(recipe: Recipe, stage: str = "rate", *flags: str, **options: Any) -> Done:
    """The real command, waited for."""
    process = start(recipe, stage, *flags, **options)
    stdout, stderr = process.communicate(timeout=60)
    return Done(process.returncode, stdout, stderr)


def one_line(done: Done) -> str:
    """What a person reads who did something wrong: exit code 1, no traceback, one line of ours, the last."""
    lines = done.stderr.splitlines()
    assert (done.code, done.stdout) == (1, ""), done
    assert "Traceback" not in done.stderr
    assert [line for line in lines if line.startswith("gristmill: ")] == lines[-1:]
    return lines[-1].removeprefix("gristmill: ")


if __name__ == "__main__":
    with serve(score_of, delay_s=0.02, port=int(sys.argv[1])):
        threading.Event().wait()
