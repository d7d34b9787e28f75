"""One side of bench_score.py, in a process of its own.

    python scripts/bench_score_sides.py SIDE JSON

JSON holds the fields of Task. The model is loaded and the fastest settings are found; the first line on stdout says
which. Then each line of stdin, a JSON object, is one call, and each line of stdout its answer.
"""

import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import score, student
from pipeline.config import Recipe
from pipeline.forward import batches

Answer = dict[str, Any]
Floats = NDArray[np.float32]

N_CORES = len(os.sched_getaffinity(0))
MAX_TOKENS = 512
BATCH_SIZES = {"cpu": (8, 16, 32, 64, 128, 256), "cuda": (32, 64, 128, 256, 512, 1024)}
BATCH_TOKENS = 2048
"""Tokens in one of OpenVINO's batches, padding included."""
GEMMS = {"cpu": ((2048, 768, 3072), (2048, 384, 1536)), "cuda": ((8192, 8192, 8192),)}
"""Rows, inputs and outputs of the matrix products on which the hardware's peak is measured."""
N_TIMED, N_REPEATED = 12, 4
"""Times that a product's speed is measured, and products in each."""


class Task(NamedTuple):
    """What a side works on."""

    encoder: str
    """Folder of the encoder, as sentence-transformers saves it."""
    student: str
    """Folder of the encoder with its head."""
    pooling: str
    """cls or mean; embeddings are of length 1."""
    trial: str
    """Parquet file on which settings are tried; its column text has the documents, as in every file."""
    device: str
    settings: dict[str, Any]
    """Of gristmill's encoder."""


class Side(NamedTuple):
    """What a side is asked for each line, and the settings that were found best."""

    call: Callable[..., Answer]
    best: str = ""


def main() -> None:
    """Load, say so, answer."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = SIDES[sys.argv[1]](Task(**json.loads(sys.argv[2])))
    say({"best": side.best}, replies)
    for line in sys.stdin:
        say(side.call(**json.loads(line)), replies)


def say(answer: Answer, replies: TextIO) -> None:
    """One line."""
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


# -- others -----------------------------------------------------------------------------------------------------------


def map_padding(task: Task) -> Side:
    """The ancestors' way: datasets.map in the order of the file, each batch padded to its longest text."""
    import datasets
    import torch
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.encoder)
    model = transformers.AutoModel.from_pretrained(task.encoder, dtype=torch.bfloat16).eval().to(task.device)
    head = head_of(task)

    def scored(rows: dict[str, list[str]], n_threads: int) -> dict[str, Floats]:
        torch.set_num_threads(n_threads)
        how = {"padding": "longest", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        tokens = tokenizer(rows["text"], **how).to(task.device)
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state
            return {"score": head(pooled(states.float(), tokens["attention_mask"], task).cpu().numpy())}

    def call(file: str, scored_file: str, batch_size: int, n_processes: int) -> Answer:
        begin = time.perf_counter()
        together = {"num_proc": n_processes} if n_processes > 1 else {}
        threads = {"n_threads": max(1, N_CORES // n_processes)}
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.Dataset.from_parquet(file, cache_dir=cache)
            named = {"fn_kwargs": threads, "new_fingerprint": "scored"}
            found = rows.map(scored, batched=True, batch_size=batch_size, **named, **together)
            found.to_parquet(scored_file)
        return {"seconds": time.perf_counter() - begin}

    return fastest(call, {"batch_size": sizes(task), "n_processes": processes(task)}, task)


def sentence_transformers(task: Task) -> Side:
    """SentenceTransformer.encode, which sorts the texts by length, in one process or several."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(task.encoder, device=task.device, model_kwargs={"dtype": torch.bfloat16}).eval()
    model.max_seq_length = MAX_TOKENS
    head = head_of(task)

    @functools.cache
    def pool(n_processes: int) -> Any:
        os.environ["OMP_NUM_THREADS"] = str(max(1, N_CORES // n_processes))
        return model.start_multi_process_pool(["cpu"] * n_processes)

    def call(file: str, scored_file: str, batch_size: int, n_processes: int) -> Answer:
        how = {"batch_size": batch_size, "show_progress_bar": False}
        together = {"pool": pool(n_processes)} if n_processes > 1 else {}
        return timed(file, scored_file, lambda texts: head(model.encode(texts, **how, **together)))

    return fastest(call, {"batch_size": sizes(task), "n_processes": processes(task)}, task)


def openvino(task: Task) -> Side:
    """OpenVINO driven by hand: texts of similar length in batches, several under way at once."""
    import openvino
    import transformers

    tokenizer, head = transformers.AutoTokenizer.from_pretrained(task.encoder), head_of(task)
    model = converted(task)

    @functools.cache
    def queue(n_streams: int) -> Any:
        how = {"INFERENCE_PRECISION_HINT": "bf16", "NUM_STREAMS": n_streams, "INFERENCE_NUM_THREADS": N_CORES}
        return openvino.AsyncInferQueue(openvino.Core().compile_model(model, "CPU", how), n_streams)

    def call(file: str, scored_file: str, n_streams: int) -> Answer:
        return timed(file, scored_file, lambda texts: head(inferred(queue(n_streams), tokenizer, texts)))

    return fastest(call, {"n_streams": sorted({1, N_CORES})}, task)


def converted(task: Task) -> Any:
    """The encoder in OpenVINO's form, from token ids to embeddings; through ONNX, its attention would not be fused."""
    import openvino
    import torch
    import transformers

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModel.from_pretrained(task.encoder, dtype=torch.float32).eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return pooled(states, attention_mask, task)

    example = {name: torch.ones((2, 16), dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    shape = openvino.PartialShape([-1, -1])
    return openvino.convert_model(Embedding(), example_input=example, input=[shape] * len(example))


def inferred(queue: Any, tokenizer: Any, texts: Sequence[str]) -> Floats:
    """Embeddings (n_texts, dim)."""
    rows = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    found: dict[int, Floats] = {}

    def keep(request: Any, batch: list[int]) -> None:
        found.update(zip(batch, request.get_output_tensor().data.copy(), strict=True))

    queue.set_callback(keep)
    for batch in batches(np.array([len(row) for row in rows]), BATCH_TOKENS):
        ids = np.zeros((len(batch), max(len(rows[i]) for i in batch)), np.int64)
        mask = np.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], 1
        queue.start_async([ids, mask], batch)
    queue.wait_all()
    return np.stack([found[i] for i in range(len(rows))])


def pooled(states: Any, mask: Any, task: Task) -> Any:
    """Embeddings (n_texts, dim) of length 1, from token states (n_texts, n_tokens, dim)."""
    import torch

    weights = mask[:, :, None].to(states.dtype)
    found = states[:, 0] if task.pooling == "cls" else (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(found)


# -- ours -------------------------------------------------------------------------------------------------------------


def gristmill(task: Task) -> Side:
    """The stage itself. It loads the student each time, which is not counted, as no side's loading is."""

    def call(file: str, scored_file: str) -> Answer:
        return stage(task, Path(file), scored_file) | {"peak_rss_mb": peak_rss_mb()}

    with tempfile.TemporaryDirectory() as folder:
        call(task.trial, f"{folder}/tried.parquet")  # what is loaded at first use
    return Side(call)


def stage(task: Task, file: Path, scored_file: str) -> Answer:
    """Seconds of gristmill score from its first document to its last, and those before and after."""
    with tempfile.TemporaryDirectory() as folder:
        sections = {"corpus": {"path": str(file)}, "score": {"student": task.student}}
        encoder = {"device": task.device, **task.settings}
        recipe = Recipe.model_validate({"run_folder": folder, "encoder": encoder, **sections})
        result = score.run(recipe)
        shutil.move(Path(folder) / "score" / "scored" / file.name, scored_file)
        seconds = result.n_rows / (result.docs_per_s or 1)
        return {"seconds": seconds, "loading_s": result.seconds - seconds, "time_shares": result.time_shares}


def peak_rss_mb() -> float:
    """The most memory that this process has held, in MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


# -- the hardware -----------------------------------------------------------------------------------------------------


def peak(task: Task) -> Side:
    """bf16 matrix products: one thread's speed, or a GPU's."""
    import torch

    torch.set_num_threads(1)
    products = [product(*each, task.device) for each in GEMMS[task.device]]

    def call() -> Answer:
        return {"gflops": [max(once() for _ in range(N_TIMED)) for once in products]}

    return Side(call)


def product(n_rows: int, n_in: int, n_out: int, device: str) -> Callable[[], float]:
    """Speed of one matrix product in GFLOP/s each time it is called; the weights are laid out beforehand if torch can
    do so."""
    import torch

    x, weight = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in ((n_rows, n_in), (n_out, n_in)))
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)

        def multiply() -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    else:

        def multiply() -> Any:
            return x @ weight.T

    def once() -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(N_REPEATED):
            multiply()
        synchronize(device)
        return 2e-9 * n_rows * n_in * n_out * N_REPEATED / (time.perf_counter() - begin)

    return once


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


# -- shared -----------------------------------------------------------------------------------------------------------


def head_of(task: Task) -> Callable[[Any], Floats]:
    """From embeddings (n_texts, dim) to scores (n_texts,), in float32."""
    head = student.load(task.student).heads[0]
    return lambda embeddings: head.outputs(np.asarray(embeddings, np.float32))[:, 0]


def timed(file: str, scored_file: str, scores: Callable[[list[str]], Floats]) -> Answer:
    """Seconds from one parquet file to another."""
    begin = time.perf_counter()
    rows = pq.read_table(file)
    found = scores(rows.column("text").to_pylist())
    pq.write_table(rows.append_column("score", pa.array(found, pa.float32())), scored_file)
    return {"seconds": time.perf_counter() - begin}


def sizes(task: Task) -> list[int]:
    """Batch sizes to try: those of which the trial file fills a batch."""
    n_rows = pq.read_metadata(task.trial).num_rows
    return [size for size in BATCH_SIZES[task.device] if size <= n_rows] or [n_rows]


def processes(task: Task) -> list[int]:
    """Numbers of processes to try: one with a thread for each core, or one for each core."""
    return sorted({1, N_CORES if task.device == "cpu" else 1})


def fastest(call: Callable[..., Answer], choices: dict[str, list[int]], task: Task) -> Side:
    """The call with the settings that take the least time on the trial file, chosen one after the other."""
    best = {name: values[0] for name, values in choices.items()}
    with tempfile.TemporaryDirectory() as folder:

        def seconds(settings: dict[str, int]) -> float:
            return float(call(task.trial, f"{folder}/tried.parquet", **settings)["seconds"])

        seconds(best)  # what is loaded or compiled at first use is not counted
        for name, values in choices.items():
            found = {value: seconds({**best, name: value}) for value in values}
            best[name] = min(found, key=lambda value: found[value])
            tried = ", ".join(f"{value}: {taken:.1f} s" for value, taken in found.items())
            sys.stderr.write(f"  {name} {tried}\n")
    return Side(functools.partial(call, **best), ", ".join(f"{name} {value}" for name, value in best.items()))


SIDES: dict[str, Callable[[Task], Side]] = {
    "map_padding": map_padding,
    "sentence_transformers": sentence_transformers,
    "openvino": openvino,
    "gristmill": gristmill,
    "peak": peak,
}


if __name__ == "__main__":
    main()
