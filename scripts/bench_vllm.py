"""How fast the vLLM engine rates beside the transformers engine, on the same documents and with the same model.

    python scripts/bench_vllm.py MODEL FILE [--documents 200] [--runs 2] [--dtype bfloat16]

MODEL is a folder that both load, FILE a parquet file with a column text. The engines take turns, in a program of its
own each time; loading is not counted. Prints a line a run, and as the last line one JSON object with the medians.
"""

import argparse
import json
import logging
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline import prompts
from pipeline.config import Teacher
from pipeline.engines import engine
from pipeline.prompts import Prompt
from pipeline.teacher import Answer, questions

ENGINES = ("transformers", "vllm")
QUALITY = Path(__file__).parent.parent / "prompts" / "quality.md"


def main() -> None:
    """Every engine, by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=ENGINES, help="measure one engine once")
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(measure(asked)))
        return
    runs = {name: [] for name in ENGINES}
    for name in ENGINES * asked.runs:
        runs[name].append(in_a_program_of_its_own(name))
        print(f"{name:12}", *(f"{key} {value:.3g}" for key, value in runs[name][-1].items()))
    print(json.dumps(medians(runs)))


def in_a_program_of_its_own(name: str) -> dict[str, float]:
    """One run of one engine, without what the one before has warmed."""
    command = [sys.executable, *sys.argv, "--only", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The median of each figure of each engine, and how many times as fast vLLM is."""
    found = {
        name: {key: statistics.median(run[key] for run in mine) for key in mine[0]} for name, mine in runs.items()
    }
    slow, fast = (found[name]["choices_docs_per_s"] for name in ENGINES)
    return {**found, "vllm_over_transformers": fast / slow}


def measure(asked: argparse.Namespace) -> dict[str, float]:
    """Documents a second for choices and for written labels, and the share of prompt tokens found in the cache."""
    texts = pq.read_table(asked.file, columns=["text"])["text"].to_pylist()[: asked.documents]
    teacher = Teacher(
        engine=asked.only,
        model=asked.model,
        dtype=asked.dtype,
        document_tokens=256,
        max_tokens=16,
        max_model_len=1024 if asked.only == "vllm" else None,
        engine_args={"enforce_eager": True} if asked.only == "vllm" else {},
    )
    choices = prompts.load(QUALITY)
    written = Prompt.model_validate({"name": "written", "body": choices.body, "read": "generate"})
    heard = Cached()
    logging.getLogger("gristmill").addHandler(heard)
    logging.getLogger("gristmill").setLevel(logging.INFO)
    with engine(teacher) as ask:
        timed(ask, choices, teacher, texts[:2])
        figures = {"choices_docs_per_s": timed(ask, choices, teacher, texts)}
        shares = {"cached_share": heard.share} if heard.share is not None else {}
        figures["written_docs_per_s"] = timed(ask, written, teacher, texts[: len(texts) // 10])
    return figures | shares


class Cached(logging.Handler):
    """Remembers the share of prompt tokens that the engine says were cached."""

    share: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take the share out of the engine's message."""
        match = re.search(r"(\d+)% of the prompt tokens were cached", record.getMessage())
        self.share = int(match[1]) / 100 if match else self.share


def timed(ask: Any, prompt: Prompt, teacher: Teacher, texts: list[str]) -> float:
    """Documents a second."""
    answers: list[tuple[str, Answer]] = []
    begin = time.perf_counter()
    ask(prompt, teacher, questions(prompt, teacher, texts), set(), lambda arrived: answers.extend(arrived) or True)
    assert all(answer.finish != "failed" for _, answer in answers)
    return len(texts) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
