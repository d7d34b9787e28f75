"""Gristmill score beside other ways to score the same documents with the same weights.

    python scripts/bench_score.py [FILE TEXT_COLUMN] [--documents 2000] [--bert-documents 200] [--slices 4]

Others are the script that people share (datasets.map, each batch padded to its longest text), sentence-transformers'
encode and OpenVINO driven by hand, all in bf16, from one parquet file to another, with both cores, at whichever of
their settings is fastest on the first documents. Each side is a process that stays and loads its model once, which is
not timed. The corpus is cut in slices; in each round every side scores one, and who begins changes, so that a noisy
machine disturbs all alike. Ratios are medians over the slices, with the lowest and highest.

The floor is the time that the arithmetic takes at the speed of the machine's fastest bf16 matrix product, measured
before each round and after the last: for each document 2 x parameters of the layers x tokens, and 4 x tokens squared x
hidden size x layers for attention. Every side's scores are held against ours in float32 by transformers.

Two models: all-MiniLM-L6-v2 with a head that has learned the share of plain words in a text, and random weights in the
shape of BERT-base, whose speed is that of any such model and whose differences are only rounding. Without FILE the
documents are those of scripts/demo_corpus.py, half of them longer than the encoder reads. Prints a Markdown table for
each model; the last line is one JSON object.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from bench_score_sides import MAX_TOKENS, N_CORES, Task
from bench_train import MODEL, plain
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import RidgeCV

from pipeline import metrics, models
from pipeline.config import Encoder
from pipeline.head import Head
from pipeline.layers import Layer
from pipeline.student import Student

Floats = NDArray[np.float64]

SCALE = (0.0, 5.0)
OTHERS = ("map_padding", "sentence_transformers", "openvino")
OURS = {"gristmill": {"dtype": "bfloat16"}}
REFERENCE = "transformers float32"
"""Gristmill's own way without any of its engine."""
N_TRIED = {"minilm": 96, "bert-base": 16}
"""Documents on which each side finds its fastest settings."""
N_FITTED = {"minilm": 400, "bert-base": 64}
"""Documents from which a head is made."""
N_CHECKED_ON_GPU = 300
"""Documents of each slice that are held against the CPU's float32 there."""
MEMORY = {"characters": 5000, "tokens": 8}
"""Short for the encoder and long for the memory."""
N_IN_MEMORY = {"minilm": 4000, "bert-base": 1500}
"""Documents, and ten times as many, over which memory is compared."""
FLAGS = ("avx512_bf16", "amx_bf16", "avx512_vnni")
"""What of a CPU's instructions decides the speed."""


class Model(NamedTuple):
    """A student to measure, and what its arithmetic is."""

    encoder: str
    folder: str
    head: Head
    pooling: str
    n_parameters: int
    """Of the layers, without embeddings and pooler."""
    hidden: int
    n_layers: int


class Slice(NamedTuple):
    """Documents that every side scores in one round."""

    file: Path
    checked: Path
    """Those of them that are held against float32."""
    n_documents: int
    n_tokens: int
    gflop: float
    """What the encoder has to compute."""


class Scored(NamedTuple):
    """One side, slice by slice."""

    best: str
    """The settings it chose."""
    seconds: list[float]
    scores: list[Floats]
    about: list[dict[str, Any]]
    """All that it answered."""


def main() -> None:
    """Both models in turn, then the JSON."""
    asked = arguments()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    about = {"date": today, "corpus": asked.file or "installed documentation", **machine(device)}
    print("; ".join(f"{name} {value}" for name, value in about.items() if value) + "\n", flush=True)
    texts, found = corpus(asked), {}
    for shape in asked.shapes:
        n = asked.documents if shape == "minilm" else min(asked.documents, asked.bert_documents)
        with tempfile.TemporaryDirectory() as folder:
            found[shape] = measured(shape, texts[:n], Path(folder), device, asked)
        print(table(shape, found[shape]), flush=True)
    print(json.dumps(rounded({**about, "shapes": found})))


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="parquet file")
    parser.add_argument("text", nargs="?", default="text", help="its column with the documents")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--bert-documents", type=int, default=200, help="those of them that BERT-base scores")
    parser.add_argument("--slices", type=int, default=4, help="parts of the corpus, one a round")
    parser.add_argument("--repeat", type=int, default=1, help="times each document stands in its slice, for a GPU")
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sides", nargs="*", choices=OTHERS, default=list(OTHERS), help="others to compare with")
    parser.add_argument("--variants", nargs="*", type=json.loads, default=[], help='such as \'{"engine": "plain"}\'')
    return parser.parse_args()


# -- documents --------------------------------------------------------------------------------------------------------


def corpus(asked: argparse.Namespace) -> list[str]:
    """Texts in random order, none twice."""
    if asked.file is None:
        return installed(asked.documents)
    texts = pq.read_table(asked.file, columns=[asked.text]).column(0).to_pylist()
    texts = list(dict.fromkeys(text for text in texts if text and text.strip()))
    random.Random(0).shuffle(texts)
    return texts[: asked.documents]


def installed(n_documents: int) -> list[str]:
    """Documentation and its junk, as the demo has them, as many longer than the encoder reads as not."""
    import demo_corpus

    rows = demo_corpus.collect(demo_corpus.Library(demo_corpus.sources(), 0))
    texts = [str(row["text"]) for row in rows]
    long = n_tokens(texts) > MAX_TOKENS
    halves = [[text for text, is_long in zip(texts, long, strict=True) if is_long == side] for side in (True, False)]
    found = [text for half in halves for text in half[: n_documents // 2]]
    random.Random(0).shuffle(found)
    return found


def n_tokens(texts: Sequence[str]) -> NDArray[np.int64]:
    """Tokens of each text with the special ones, of those that the encoder does not read only the first counted."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.locate(MODEL, "encoder"))
    rows = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS + 1)["input_ids"]
    return np.array([len(row) for row in rows])


def slices(texts: Sequence[str], model: Model, folder: Path, device: str, asked: argparse.Namespace) -> list[Slice]:
    """The corpus as files."""
    return [
        cut(texts[i :: asked.slices], model, folder / f"slice-{i}.parquet", device, asked.repeat)
        for i in range(asked.slices)
    ]


def cut(texts: Sequence[str], model: Model, file: Path, device: str, repeat: int) -> Slice:
    """One slice."""
    lengths = np.minimum(n_tokens(texts), MAX_TOKENS)
    flop = 2.0 * model.n_parameters * lengths + 4.0 * lengths**2 * model.hidden * model.n_layers
    write(list(texts) * repeat, file)
    checked = file
    if device == "cuda":
        checked = write(texts[:N_CHECKED_ON_GPU], file.with_suffix(".checked.parquet"))
    return Slice(file, checked, len(texts) * repeat, int(lengths.sum()) * repeat, float(flop.sum()) * repeat / 1e9)


def write(texts: Sequence[str], file: Path) -> Path:
    """A parquet file with the texts."""
    pq.write_table(pa.table({"text": list(texts)}), file)
    return file


# -- models -----------------------------------------------------------------------------------------------------------


def minilm(folder: Path, texts: Sequence[str]) -> Model:
    """all-MiniLM-L6-v2; its head has learned the share of plain words in a text."""
    encoder = models.locate(MODEL, "encoder")
    embeddings = embedded(encoder, texts)
    learned = RidgeCV(np.logspace(-3, 3, 25)).fit(embeddings, [plain(text) for text in texts])
    return student(encoder, learned.coef_, embeddings, "mean", folder)


def bert_base(folder: Path, texts: Sequence[str]) -> Model:
    """BERT-base with random weights, [CLS] and MiniLM's tokenizer; its head is the direction in which the embeddings
    differ most, so that rounding changes its scores least."""
    encoder = folder / "encoder"
    shutil.copytree(models.locate(MODEL, "encoder"), encoder)
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig())
    bert.save_pretrained(encoder)
    pooling = {"word_embedding_dimension": bert.config.hidden_size, "pooling_mode_cls_token": True}
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "pooling_mode_mean_tokens": False}))
    embeddings = embedded(str(encoder), texts)
    differing = np.linalg.svd(embeddings - embeddings.mean(axis=0), full_matrices=False)[2][0]
    return student(str(encoder), differing, embeddings, "cls", folder)


MODELS: dict[str, Callable[[Path, Sequence[str]], Model]] = {"minilm": minilm, "bert-base": bert_base}


def embedded(encoder: str, texts: Sequence[str]) -> Floats:
    """Embeddings (n_texts, dim) in float32."""
    model = SentenceTransformer(encoder)
    model.max_seq_length = MAX_TOKENS
    return np.asarray(model.encode(list(texts), batch_size=8), np.float64)


def student(encoder: str, direction: Floats, embeddings: Floats, pooling: str, folder: Path) -> Model:
    """A student whose scores of these embeddings (n, dim) have mean 2.5 and standard deviation 1."""
    raw = embeddings @ direction
    weight, bias = direction / raw.std(), sum(SCALE) / 2 - raw.mean() / raw.std()
    layer = Layer(weight[None].astype(np.float32), np.array([bias], np.float32))
    head = Head("score", "score", (layer,), SCALE)
    for name, tokens in (("student", MAX_TOKENS), ("short", MEMORY["tokens"])):
        settings = Encoder(model=encoder, max_tokens=tokens, dtype="float32")
        Student(settings, (head,)).save(folder / name)
    config = transformers.AutoConfig.from_pretrained(encoder)
    with torch.device("meta"):
        layers = transformers.AutoModel.from_config(config).encoder
    n_parameters = sum(weights.numel() for weights in layers.parameters())
    shape = (n_parameters, config.hidden_size, config.num_hidden_layers)
    return Model(encoder, str(folder / "student"), head, pooling, *shape)


# -- measuring --------------------------------------------------------------------------------------------------------


def measured(shape: str, texts: Sequence[str], folder: Path, device: str, asked: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    say(f"{shape}: making the student")
    model = MODELS[shape](folder, texts[: N_FITTED[shape]])
    parts = slices(texts, model, folder, device, asked)
    trial = write(texts[: min(N_TRIED[shape], len(texts) // asked.slices)], folder / "trial.parquet")
    task = Task(model.encoder, model.folder, model.pooling, str(trial), device, {})
    scored, peaks = take_turns(parts, tasks(task, asked), task, folder)
    growth = rss(task, texts, folder, N_IN_MEMORY[shape])
    return {**of_corpus(texts, model), **figures(scored, parts, model, statistics.median(peaks)), **growth}


def tasks(task: Task, asked: argparse.Namespace) -> dict[str, Task]:
    """What each side works on; on a GPU without OpenVINO, and the reference stays on the CPU."""
    others = {name: task for name in asked.sides if name != "openvino" or task.device == "cpu"}
    variants = {f"gristmill {' '.join(map(str, each.values()))}": each for each in asked.variants}
    ours = {name: task._replace(settings=settings) for name, settings in {**OURS, **variants}.items()}
    plain_way = {"dtype": "float32", "engine": "plain"}
    return {**others, **ours, REFERENCE: task._replace(settings=plain_way, device="cpu")}


def take_turns(
    parts: Sequence[Slice], by_side: dict[str, Task], task: Task, folder: Path
) -> tuple[dict[str, Scored], list[float]]:
    """Every side on every slice, and the peaks between the rounds in GFLOP/s."""
    with ExitStack() as running:
        sides = {name: running.enter_context(started(name, each)) for name, each in by_side.items()}
        n_peaks = N_CORES if task.device == "cpu" else 1
        hardware = [running.enter_context(started("peak", task)) for _ in range(n_peaks)]
        scored = {name: Scored(side.best, [], [], []) for name, side in sides.items()}
        peaks = [peak(hardware)]
        for i, part in enumerate(parts):
            for name in rotated(list(sides), i):
                turn(sides[name], part, scored[name], folder, name)
            peaks.append(peak(hardware))
        return scored, peaks


def turn(side: "Running", part: Slice, scored: Scored, folder: Path, name: str) -> None:
    """One side scores one slice."""
    file, scored_file = part.checked if name == REFERENCE else part.file, folder / "scored.parquet"
    answer = side.ask(file=str(file), scored_file=str(scored_file))
    n = pq.read_metadata(part.checked).num_rows
    scored.seconds.append(answer["seconds"])
    scored.scores.append(pq.read_table(scored_file).column("score").to_numpy()[:n].astype(np.float64))
    scored.about.append(answer)
    say(f"{name}: {pq.read_metadata(file).num_rows / answer['seconds']:.1f} docs/s on {file.stem}")


def rotated(names: list[str], by: int) -> list[str]:
    """The names from another one on."""
    by %= len(names)
    return names[by:] + names[:by]


def rss(task: Task, texts: Sequence[str], folder: Path, n_documents: int) -> dict[str, float]:
    """The most memory that a process holds for some documents, and by how much more for ten times as many."""
    task = task._replace(student=str(folder / "short"), settings=OURS["gristmill"])
    peaks = []
    for n in (n_documents, 10 * n_documents):
        file = long_documents(texts, n, folder / f"long-{n}.parquet")
        with started("gristmill", task) as side:
            peaks.append(side.ask(file=str(file), scored_file=str(folder / "scored.parquet"))["peak_rss_mb"])
        say(f"{n:,} documents of {MEMORY['characters']:,} characters: {peaks[-1]:,.0f} MB of memory")
    return {"rss_mb": peaks[0], "rss_mb_at_10x": peaks[1], "rss_growth_at_10x": peaks[1] / peaks[0] - 1}


def long_documents(texts: Sequence[str], n_documents: int, file: Path) -> Path:
    """Documents that differ, each some stretch of the corpus, in row groups of a thousand."""
    length, together = MEMORY["characters"], "\n".join(texts)
    together *= 2 * length // len(together) + 1
    with pq.ParquetWriter(file, pa.schema({"text": pa.string()})) as writer:
        for begin in range(0, n_documents, 1000):
            places = [(i, 7919 * i % (len(together) - length)) for i in range(begin, min(begin + 1000, n_documents))]
            writer.write_table(pa.table({"text": [f"{i} {together[at : at + length]}" for i, at in places]}))
    return file


# -- processes --------------------------------------------------------------------------------------------------------


class Running(NamedTuple):
    """A side that waits for its turn."""

    process: subprocess.Popen[str]
    best: str

    def ask(self, **call: Any) -> dict[str, Any]:
        """Its answer to one call."""
        send(self.process, call)
        return receive(self.process)


@contextmanager
def started(name: str, task: Task) -> Iterator[Running]:
    """A side from when it is ready; gristmill's variants are one with other settings."""
    say(f"{name}: loading")
    side = "gristmill" if task.settings else name
    command = [sys.executable, str(Path(__file__).with_name("bench_score_sides.py")), side, json.dumps(task._asdict())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        yield Running(process, receive(process)["best"])
    finally:
        assert process.stdin is not None
        process.stdin.close()  # a side ends at the end of its input, and takes its own processes along
        process.wait()


def environment() -> dict[str, str]:
    """Tokenisers on all cores, and only our own progress on stderr."""
    quiet = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, "TOKENIZERS_PARALLELISM": "true", **quiet}


def send(process: subprocess.Popen[str], call: dict[str, Any]) -> None:
    """One call."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(call) + "\n")
    process.stdin.flush()


def receive(process: subprocess.Popen[str]) -> dict[str, Any]:
    """One answer."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a side stopped; its last words stand above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def peak(hardware: Sequence[Running]) -> float:
    """GFLOP/s of the fastest matrix product, on all cores at once."""
    for core in hardware:
        send(core.process, {})
    by_product = np.sum([receive(core.process)["gflops"] for core in hardware], axis=0)
    say("bf16 matrix products: " + ", ".join(f"{each:,.0f}" for each in by_product) + " GFLOP/s")
    return float(by_product.max())


def say(what: str) -> None:
    """Progress."""
    sys.stderr.write(what + "\n")


# -- figures ----------------------------------------------------------------------------------------------------------


def of_corpus(texts: Sequence[str], model: Model) -> dict[str, Any]:
    """What the documents are, and what the model has to do for them."""
    lengths = n_tokens(texts)
    read = np.minimum(lengths, MAX_TOKENS)
    return {
        "n_documents": len(texts),
        "mean_tokens": float(read.mean()),
        "median_tokens": float(np.median(read)),
        "share_over_512_tokens": float(np.mean(lengths > MAX_TOKENS)),
        "layer_parameters": model.n_parameters,
    }


def figures(scored: dict[str, Scored], parts: Sequence[Slice], model: Model, peak_gflops: float) -> dict[str, Any]:
    """Speeds, ratios, the share of the floor and the differences; medians over slices."""
    sides = {name: of_side(each, parts, scored, model) for name, each in scored.items()}
    ours = scored["gristmill"]
    shares = [part.gflop / peak_gflops / seconds for part, seconds in zip(parts, ours.seconds, strict=True)]
    return {
        "docs_per_s": sides["gristmill"]["docs_per_s"],
        **{f"ratio_vs_{name}": sides[name]["ratio"] if name in sides else None for name in OTHERS},
        "fraction_of_bf16_floor": statistics.median(shares),
        "spearman_vs_fp32": sides["gristmill"]["spearman"],
        "int_score_flip_rate": sides["gristmill"]["int_score_flip_rate"],
        "peak_bf16_gflops": peak_gflops,
        "gflop_per_document": sum(part.gflop for part in parts) / sum(part.n_documents for part in parts),
        "loading_s": statistics.median(answer["loading_s"] for answer in ours.about),
        "reference_sd": float(np.concatenate(scored[REFERENCE].scores).std()),
        "sides": sides,
    }


def of_side(side: Scored, parts: Sequence[Slice], scored: dict[str, Scored], model: Model) -> dict[str, Any]:
    """One side's row of the table; the ratio says how many times as fast gristmill is."""
    checked_only = side is scored[REFERENCE]
    amounts = [pq.read_metadata(part.checked).num_rows if checked_only else part.n_documents for part in parts]
    speeds = [n / seconds for n, seconds in zip(amounts, side.seconds, strict=True)]
    ours = [part.n_documents / seconds for part, seconds in zip(parts, scored["gristmill"].seconds, strict=True)]
    ratios = [mine / theirs for mine, theirs in zip(ours, speeds, strict=True)]
    per_document = sum(part.n_tokens for part in parts) / sum(part.n_documents for part in parts)
    return {
        "settings": side.best,
        "docs_per_s": statistics.median(speeds),
        "docs_per_s_range": [min(speeds), max(speeds)],
        "tokens_per_s": statistics.median(speeds) * per_document,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        **differences(np.concatenate(side.scores), np.concatenate(scored[REFERENCE].scores), model.head),
    }


def differences(scores: Floats, reference: Floats, head: Head) -> dict[str, Any]:
    """How far scores are from float32."""
    whole, expected = (metrics.int_scores(side, SCALE, head.cuts) for side in (scores, reference))
    return {
        "max_difference": float(np.abs(scores - reference).max()),
        "spearman": metrics.spearman(scores, reference),
        "int_score_flip_rate": float(np.mean(whole != expected)),
    }


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    of = {name.strip(): value.strip() for name, value in fields.items()}
    return {
        "cpu": of.get("model name", platform.processor()),
        "cores": N_CORES,
        "flags": " ".join(flag for flag in FLAGS if flag in of.get("flags", "").split()),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# -- the table --------------------------------------------------------------------------------------------------------


def table(shape: str, found: dict[str, Any]) -> str:
    """A Markdown table of one model, and what it is about."""
    head = "| way | settings | docs/s | tokens/s | gristmill is | max difference | Spearman | int_score flips |"
    rows = [row(name, side) for name, side in found["sides"].items()]
    return "\n".join(
        [
            f"**{shape}**, {found['layer_parameters'] / 1e6:.1f} M parameters in its layers; {found['n_documents']:,}"
            f" documents of {found['mean_tokens']:.0f} tokens in the mean, {found['median_tokens']:.0f} in the median,"
            f" {found['share_over_512_tokens']:.0%} longer than {MAX_TOKENS}; scores spread by"
            f" {found['reference_sd']:.2f} (standard deviation)",
            "",
            head,
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"{found['fraction_of_bf16_floor']:.0%} of the bf16 floor: {found['gflop_per_document']:.1f} GFLOP a"
            f" document at {found['peak_bf16_gflops']:,.0f} GFLOP/s are"
            f" {found['peak_bf16_gflops'] / found['gflop_per_document']:.1f} docs/s. Loading the student takes"
            f" {found['loading_s']:.1f} s more. Memory: {found['rss_mb']:,.0f} MB, with 10 times the documents"
            f" {found['rss_mb_at_10x']:,.0f} MB ({found['rss_growth_at_10x']:+.1%}).",
            "",
        ]
    )


def row(name: str, side: dict[str, Any]) -> str:
    """One side."""
    speeds, ratios = (" to ".join(f"{end:.1f}" for end in side[f"{what}_range"]) for what in ("docs_per_s", "ratio"))
    spearman = "-" if side["spearman"] is None else f"{side['spearman']:.5f}"
    cells = [
        name.replace("_", " "),
        side["settings"] or "as it comes",
        f"{side['docs_per_s']:.1f} ({speeds})",
        f"{side['tokens_per_s']:,.0f}",
        "" if name == "gristmill" else f"{side['ratio']:.2f}x as fast ({ratios})",
        f"{side['max_difference']:.4f}",
        spearman,
        f"{side['int_score_flip_rate']:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def rounded(value: Any) -> Any:
    """Numbers with as many digits as mean something."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
