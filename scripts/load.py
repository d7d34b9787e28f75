"""What millions of documents take: sample, score and filter of a synthetic corpus of tiny texts, watched from outside.

    load.py FOLDER [DOCUMENTS]

Prints, for each stage, the resident memory of the process while it goes on, and how much longer a document takes at
the end than at the beginning; then how long a scoring that was killed takes to be at work again. The last line is one
JSON object. The encoder has two layers and random weights: the load is what is measured, not the quality.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHARDS = 200
WORDS = 2000
WORDS_IN_TEXT = (4, 12)
PAGE = os.sysconf("SC_PAGE_SIZE")
SAMPLE = (
    "import sys; from pipeline.config import Corpus; from pipeline.sample import sample\n"
    "print(len(sample(Corpus(path=sys.argv[1], id_column='id'), 20_000, 0)[0]), flush=True)"
)


class Moment(NamedTuple):
    """What is seen of a process at a time."""

    seconds: float
    resident_mb: float
    n_done: int
    """Documents in finished shards."""


def main(folder: str, n: str = "2_000_000") -> None:
    """Make the corpus if it is not there, then watch stage after stage."""
    logging.disable(logging.INFO)
    root, n_documents = Path(folder), int(n)
    per_shard = -(-n_documents // SHARDS)
    write_corpus(root / "corpus", n_documents, per_shard)
    write_student(root / "student")
    score = [*gristmill("score", root), "--student", str(root / "student"), "--encoder.dtype", "float32"]
    cut = [*gristmill("filter", root), "--keep-share", "0.1"]
    half = [sys.executable, "-c", SAMPLE, str(root / "corpus" / "*[02468].parquet")]
    whole = [sys.executable, "-c", SAMPLE, str(root / "corpus")]
    found = {"documents": n_documents, "sample": of_sample(watch(half), watch(whole), n_documents)}
    found["score"], found["resume_s"] = scored(score, root, per_shard, n_documents)
    kept = root / "run" / "filter" / "kept"
    found["filter"] = told("filter", watch(cut, lambda: finished(kept, per_shard)), n_documents)
    print(json.dumps(found))


def gristmill(stage: str, root: Path) -> list[str]:
    """The command of a stage on this corpus."""
    there = ["--corpus.path", str(root / "corpus"), "--run-folder", str(root / "run")]
    return [sys.executable, "-m", "pipeline", stage, *there, "--corpus.id-column", "id"]


# -- what is worked on ------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, n: int, per_shard: int) -> None:
    """Tiny texts of random words, all different, in shards."""
    rng = np.random.default_rng(0)
    words = np.array(vocabulary())
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, n, per_shard)):
        path = folder / f"part-{shard:03d}.parquet"
        numbers = range(start, min(n, start + per_shard))
        lengths = rng.integers(*WORDS_IN_TEXT, len(numbers))
        texts = [f"{' '.join(words[rng.integers(0, WORDS, k)])} {i}" for i, k in zip(numbers, lengths, strict=True)]
        if not path.exists():
            pq.write_table(pa.table({"id": [f"d{i}" for i in numbers], "text": texts}), path, compression="zstd")


def vocabulary() -> list[str]:
    """Words of two to four syllables."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    rng = np.random.default_rng(1)
    found: dict[str, None] = {}
    while len(found) < WORDS:
        found["".join(rng.choice(syllables, int(rng.integers(2, 5))))] = None
    return list(found)


def write_student(folder: Path) -> None:
    """A BERT of two layers with random weights, and a linear head on it."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from pipeline.config import Encoder
    from pipeline.student import Head, Layer, Student

    if folder.exists():
        return
    encoder = folder.parent / "encoder"
    encoder.mkdir(parents=True, exist_ok=True)
    pieces = [prefix + sign for prefix in ("", "##") for sign in "0123456789"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *vocabulary()]
    (encoder / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(encoder / "vocab.txt"), model_max_length=64).save_pretrained(encoder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=len(names), max_position_embeddings=64, **sizes)).save_pretrained(encoder)
    weight = np.random.default_rng(0).normal(0, 0.5, (1, 64)).astype(np.float32)
    settings = Encoder(model=str(encoder), max_tokens=64, dtype="float32", device="cpu")
    Student(settings, (Head("score", "score", (Layer(weight, np.array([2.5], np.float32)),), (0, 5)),)).save(folder)


# -- watching ---------------------------------------------------------------------------------------------------------


def watch(
    command: list[str], n_done: Callable[[], int] = lambda: 0, stop_at: float = float("inf"), every_s: float = 0.5
) -> list[Moment]:
    """Run a command and look at it every so often; killed with -9 once so many documents are done."""
    begin, seen = time.perf_counter(), list[Moment]()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or []), daemon=True)
    reader.start()
    while process.poll() is None:
        seen.append(Moment(time.perf_counter() - begin, resident_mb(process.pid), n_done()))
        if seen[-1].n_done >= stop_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return seen
        time.sleep(every_s)
    reader.join(5)
    if process.returncode:
        sys.exit(f"load: {' '.join(command)} ended with {process.returncode}: {''.join(said)[-500:]}")
    return [*seen, Moment(time.perf_counter() - begin, seen[-1].resident_mb, n_done())]


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6
    except (OSError, IndexError):
        return 0.0


def finished(folder: Path, per_shard: int) -> int:
    """Documents in the finished shards of a folder."""
    if not folder.exists():
        return 0
    return per_shard * sum(path.name[0] != "." for path in folder.glob("*.parquet"))


def scored(command: list[str], root: Path, per_shard: int, n: int) -> tuple[dict[str, Any], float]:
    """Score until nine tenths are done; then kill it, and take the seconds until it is at work again."""
    out = root / "run" / "score" / "scored"
    done = lambda: finished(out, per_shard)  # noqa: E731
    killed = watch(command, done, stop_at=0.9 * n)
    before = killed[-1].n_done
    found = told("score", killed, before)
    again = watch(command, done, every_s=0.05)
    first = next(moment.seconds for moment in again if moment.n_done > before)
    resume_s = max(0.0, first - per_shard * found["seconds"] / before)
    print(f"resume: killed at {before:,} documents; at work again after {resume_s:.1f} s, models loaded", flush=True)
    return found, resume_s


# -- telling ----------------------------------------------------------------------------------------------------------


def told(stage: str, seen: list[Moment], n: int) -> dict[str, Any]:
    """Memory over time, and the time per document of the last third of a stage against its second."""
    working = [moment for moment in seen if moment.n_done > 0]
    tenths = [min(working, key=lambda moment: abs(moment.n_done - share * n)) for share in np.arange(0.1, 1.01, 0.1)]
    resident = [round(moment.resident_mb) for moment in tenths]
    thirds = [min(working, key=lambda moment: abs(moment.n_done - share * n)) for share in (1 / 3, 2 / 3, 1)]
    spent = [(b.seconds - a.seconds) / max(b.n_done - a.n_done, 1) for a, b in pairwise(thirds)]
    growth, seconds = spent[1] / spent[0], seen[-1].seconds
    print(f"{stage}: {n:,} documents in {seconds:.0f} s; MB resident at each tenth: {' '.join(map(str, resident))};")
    print(f"  a document of the last third takes {growth:.2f} times as long as one of the second", flush=True)
    return {"seconds": seconds, "resident_mb": resident, "growth": growth, "docs_per_s": n / seconds}


def of_sample(half: list[Moment], whole: list[Moment], n: int) -> dict[str, Any]:
    """The same of a sample, which leaves no shards: by half the corpus beside the whole."""
    places = [round(share * (len(whole) - 1)) for share in np.arange(0.1, 1.01, 0.1)]
    resident = [round(whole[place].resident_mb) for place in places]
    seconds, growth = whole[-1].seconds, (whole[-1].seconds - half[-1].seconds) / half[-1].seconds
    print(f"sample: {n:,} documents in {seconds:.0f} s; MB resident at each tenth: {' '.join(map(str, resident))};")
    print(f"  a document of the second half takes {growth:.2f} times as long as one of the first, loading included")
    return {"seconds": seconds, "resident_mb": resident, "growth": growth, "docs_per_s": n / seconds}


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("load.py: give a folder to work in and, if not two million, how many documents")
    main(*sys.argv[1:])
