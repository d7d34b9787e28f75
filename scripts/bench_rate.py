"""How fast documents are rated: the loop that people write by hand beside the three engines.

    python scripts/bench_rate.py MODEL FILE [--documents 32] [--rationales 8] [--rounds 3] [--sides transformers vllm]

MODEL is a folder that all sides load, FILE a parquet file with a column text. The rubric is that of prompts/edu-en.md,
read in two ways: as the expected value of one token, and as sentences that end with a grade. Each way of each round
has documents of its own, for vLLM would remember those it has seen; the sides take turns with them, and loading is not
counted. Prints medians over the rounds, and as the last line one JSON object.
"""

import argparse
import json
import logging
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from pipeline import prompts
from pipeline.config import Teacher
from pipeline.engines import engine
from pipeline.engines.layout import Layout
from pipeline.engines.transformers import load
from pipeline.models import first_tokens, load_tokenizer, pick_device
from pipeline.prompts import Prompt
from pipeline.teacher import Answer, questions, read

Side = Callable[[Prompt, list[str]], tuple[list[Answer], float]]
"""Asks about texts; returns the answers, and the share of the prompt tokens whose keys were in a cache."""

BODY = prompts.load(Path(__file__).parent.parent / "prompts" / "edu-en.md").body
FORMS: dict[str, dict[str, Any]] = {
    "one_token": {
        "read": "choices",
        "answer_start": "Educational value: ",
        "choices": [{"value": grade, "answers": [str(grade)]} for grade in range(6)],
    },
    "rationale": {"read": "generate", "pattern": r"educational value\W{0,3}\s*{number}"},
}
WAYS = {name: Prompt.model_validate({"name": name, "body": BODY, **form}) for name, form in FORMS.items()}
CONTEXT = 2048
"""Tokens of prompt and answer that vLLM keeps space for."""
GPU_SHARE = 0.3
"""Of the GPU's memory, for the vLLM engine and for the server: all sides are loaded at once."""
START_S = 600.0
"""Seconds a server has to start."""
CACHED = r"(\d+)% of the prompt tokens were cached"


def main() -> None:
    """All sides loaded, then round by round."""
    asked = arguments()
    teacher = Teacher(
        model=asked.model, dtype=asked.dtype, document_tokens=2 * asked.document_tokens, max_tokens=asked.answer_tokens
    )
    warm_up, documents = cut(asked)
    names = ["naive", *asked.sides]
    figures = {way: {name: defaultdict(list) for name in names} for way in WAYS}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(SIDES[name](teacher)) for name in names}
        for side in sides.values():
            for prompt in WAYS.values():
                side(prompt, warm_up)
        for _ in range(asked.rounds):
            for way, n in (("one_token", asked.documents), ("rationale", asked.rationales)):
                texts, documents = documents[:n], documents[n:]
                compare(sides, way, texts, figures[way])
    print(json.dumps(report(figures)))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--documents", type=int, default=32, help="documents a round")
    parser.add_argument("--rationales", type=int, default=8, help="documents a round that get a rationale")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--document-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=60)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sides", nargs="*", choices=list(SIDES)[1:], default=list(SIDES)[1:], help="beside naive")
    return parser.parse_args()


def cut(asked: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Two documents to warm up with and those of all rounds, cut beforehand, so that every side reads the same."""
    n = asked.rounds * (asked.documents + asked.rationales) + 2
    texts = pq.read_table(asked.file, columns=["text"])["text"].to_pylist()[:n]
    assert len(texts) == n, f"{asked.file} holds {len(texts)} documents; {n} are needed"
    tokenizer = load_tokenizer(asked.model, "MODEL")
    short = [tokenizer.decode(first_tokens(text, asked.document_tokens, tokenizer)[0]) for text in texts]
    return short[:2], short[2:]


def compare(sides: dict[str, Side], way: str, texts: list[str], figures: Any) -> None:
    """Each side reads the same documents."""
    for name, side in sides.items():
        begin = time.perf_counter()
        answers, cached_share = side(WAYS[way], texts)
        found = figures[name]
        found["docs_per_s"].append(len(texts) / (time.perf_counter() - begin))
        found["cached_share"].append(cached_share)
        found["answer_tokens"].append(statistics.mean(answer.answer_tokens for answer in answers))
        found["scores"] += [read(WAYS[way], answer).score for answer in answers]
        print(f"{way} {name} {found['docs_per_s'][-1]:.3g} docs/s", flush=True)


# -- the sides


@contextmanager
def naive(teacher: Teacher) -> Iterator[Side]:
    """One document at a time through the whole prompt, every position's logits; nothing is kept for the next."""
    tokenizer, model = load(teacher, pick_device(None))

    def prompt_of(prompt: Prompt, text: str) -> Any:
        asked = tokenizer.apply_chat_template(prompt.turns(text), tokenize=False, add_generation_prompt=True)
        whole = tokenizer(asked + prompt.answer_start, add_special_tokens=False, return_tensors="pt")
        return whole.to(model.device)

    def choose(prompt: Prompt, inputs: Any) -> Answer:
        log_probs = torch.log_softmax(model(**inputs).logits[0, -1].float(), -1)
        ids = {name: tokenizer(name, add_special_tokens=False)["input_ids"][-1] for name in prompt.candidates}
        return Answer("stop", log_probs={name: float(log_probs[token]) for name, token in ids.items()})

    def write(inputs: Any) -> Answer:
        pad = tokenizer.eos_token_id
        out = model.generate(**inputs, max_new_tokens=teacher.max_tokens, do_sample=False, pad_token_id=pad)
        ids = out[0, inputs["input_ids"].shape[1] :]
        return Answer("stop", text=tokenizer.decode(ids, skip_special_tokens=True), answer_tokens=len(ids))

    @torch.inference_mode()
    def ask(prompt: Prompt, texts: list[str]) -> tuple[list[Answer], float]:
        inputs = (prompt_of(prompt, text) for text in texts)
        return [choose(prompt, each) if prompt.read == "choices" else write(each) for each in inputs], 0.0

    yield ask


def asking(ask: Any, teacher: Teacher, prompt: Prompt, texts: list[str]) -> list[Answer]:
    """The answers of an engine, in the order of the texts."""
    asked, found = questions(prompt, teacher, texts), {}
    ask(prompt, teacher, asked, set(), lambda arrived: found.update(arrived) or True)
    assert all(answer.finish != "failed" for answer in found.values())
    return [found[question.key] for question in asked]


@contextmanager
def with_transformers(teacher: Teacher) -> Iterator[Side]:
    """The transformers engine; what it reuses is the rubric's share of the prompts."""
    tokenizer = load_tokenizer(str(teacher.model), "MODEL")
    with engine(teacher) as running:

        def ask(prompt: Prompt, texts: list[str]) -> tuple[list[Answer], float]:
            answers = asking(running, teacher, prompt, texts)
            n_shared = len(Layout(tokenizer, prompt, teacher, None).pieces.head) * len(answers)
            return answers, n_shared / sum(answer.prompt_tokens for answer in answers)

        yield ask


@contextmanager
def with_vllm(teacher: Teacher) -> Iterator[Side]:
    """The vLLM engine, which logs what it found in its cache."""
    shares: list[float] = []
    heard = logging.Handler()
    heard.emit = lambda record: shares.extend(float(n) / 100 for n in re.findall(CACHED, record.getMessage()))
    logging.getLogger("gristmill").addHandler(heard)
    logging.getLogger("gristmill").setLevel(logging.INFO)
    settings = {"engine": "vllm", "max_model_len": CONTEXT, "engine_args": {"enforce_eager": True}}
    local = teacher.model_copy(update={**settings, "gpu_memory_utilization": GPU_SHARE})
    with engine(local) as running:
        yield lambda prompt, texts: (asking(running, local, prompt, texts), shares[-1])


@contextmanager
def with_openai(teacher: Teacher) -> Iterator[Side]:
    """The openai engine before a vLLM server, which counts what it found in its cache."""
    with server(teacher) as url:
        remote = teacher.model_copy(update={"engine": "openai", "base_url": f"{url}/v1", "tokenizer": teacher.model})
        with engine(remote) as running:

            def ask(prompt: Prompt, texts: list[str]) -> tuple[list[Answer], float]:
                before, answers, after = counters(url), asking(running, remote, prompt, texts), counters(url)
                n_asked, n_found = (now - then for now, then in zip(after, before, strict=True))
                return answers, n_found / n_asked

            yield ask


@contextmanager
def server(teacher: Teacher) -> Iterator[str]:
    """A vLLM server on this machine; it ends with everything that it has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--model", str(teacher.model), "--host", "127.0.0.1", "--port", str(port), "--dtype", teacher.dtype]
    how = ["--max-model-len", str(CONTEXT), "--gpu-memory-utilization", str(GPU_SHARE), "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *where, *how, "--enable-prefix-caching"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    end = time.monotonic() + START_S
    while True:
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < end, f"{url} is still silent after {START_S:g} s"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)


def counters(url: str) -> tuple[float, float]:
    """Prompt tokens that the server has looked for in its prefix cache so far, and those found there."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    names = ("queries", "hits")
    found = [re.findall(rf"^vllm:prefix_cache_{name}_total\S* (\S+)$", text, re.MULTILINE) for name in names]
    return float(sum(map(float, found[0]))), float(sum(map(float, found[1])))


SIDES = {"naive": naive, "transformers": with_transformers, "vllm": with_vllm, "openai": with_openai}


# -- what is told


def report(figures: Any) -> dict[str, Any]:
    """Medians over the rounds, each side's ratio to the naive loop, and how much farther a score is from its score."""
    told: dict[str, Any] = {}
    for way, sides in figures.items():
        for name, found in sides.items():
            one = {key: statistics.median(found[key]) for key in ("docs_per_s", "cached_share", "answer_tokens")}
            ratios = [a / b for a, b in zip(found["docs_per_s"], sides["naive"]["docs_per_s"], strict=True)]
            one["times_naive"] = statistics.median(ratios)
            told.setdefault(name, {})[way] = one
    for name, ways in told.items():
        costs = [figures["one_token"][name]["docs_per_s"], figures["rationale"][name]["docs_per_s"]]
        ways["rationale_over_one_token"] = statistics.median(a / b for a, b in zip(*costs, strict=True))
        ways["largest_difference_to_naive"] = apart(figures["one_token"], name)
        print(f"{name:12}", *(f"{way}: {line(one)};" for way, one in list(ways.items())[:2]), end=" ")
        print(f"a rationale costs {ways['rationale_over_one_token']:.1f} x one token")
    return told


def line(one: dict[str, float]) -> str:
    """The figures of one side and way."""
    rate, ratio, cached = one["docs_per_s"], one["times_naive"], one["cached_share"]
    return f"{rate:.3g} docs/s, {ratio:.2f} x naive, {cached:.0%} of prompt tokens cached"


def apart(found: Any, name: str) -> float:
    """The largest difference of an expected score to the naive loop's."""
    return max(abs(a - b) for a, b in zip(found[name]["scores"], found["naive"]["scores"], strict=True))


if __name__ == "__main__":
    main()
