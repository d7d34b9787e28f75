"""What a cascade saves (score.cascade_keep_share), beside one whose first student counts hashed n-grams.

    python scripts/bench_cascade.py FOLDER [--corpus NAME] [--ratings FILE ...] [--sample 5000] [--rounds 3]

FOLDER holds the corpus and the graded sets named below, each as <set>/data.parquet. The encoder scores the whole
corpus for each target: a graded set, or what an LLM said of a sample (the ratings of gristmill rate), learned as
gristmill train learns it. Each round draws a sample, of which a first student learns and is calibrated as in gristmill
score; on all other documents it is counted how many pass, and how many of the best are among them.

Costs are seconds of processor time on one thread for the same documents, all in this run. Prints a Markdown table,
medians over targets of means over rounds; the last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from bench_student import MODEL, SETS, read
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline, make_union
from threadpoolctl import threadpool_limits

from pipeline import cascade, config, embeddings, heads
from pipeline.cascade import Costs, Floats
from pipeline.cascade_sample import LEARNED
from pipeline.encoder import Encoder
from pipeline.targets import Target

GRADED = ("dclm_human_quality_en", "finewebc_edu_da", "fineweb2_gemini_edu_da", "onestop_levels_en")
KEPT = (0.1, 0.3, 0.5)
RECALLS = (0.95, 0.99)
N_TIMED = 300
N_ANCHORS = 1250
"""Documents learned from by the first student whose cost is measured."""
N_CHARACTERS = 3000
"""Of a document's beginning that n-grams are counted in, about what the encoder reads."""
N_GRAMS = make_union(
    HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False, norm=None),
    HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=2**18, alternate_sign=False, norm=None),
)


class Outcome(NamedTuple):
    """One first student in one round, on documents that are not in the sample."""

    passes: float
    """Share of them that the encoder would still read."""
    tokens: float
    """Share of their tokens."""
    recall: float
    """Share of the best that passes."""
    speed_up: float


class Kind(NamedTuple):
    """A kind of first student: what it sees of the texts, how it learns from some of them, and what that costs."""

    seen: Any
    sizes: Floats
    """Tokens of each text (n_texts,)."""
    says: Callable[[Any, Floats, slice], Floats]
    costs: Costs


def main() -> None:
    """Score the corpus, let both kinds of first student rule out, print what that saves."""
    asked = arguments()
    encoder = Encoder(config.Encoder(model=asked.encoder, max_tokens=asked.max_tokens, workers=1))
    texts = pq.read_table(asked.folder / asked.corpus / "data.parquet", columns=["text"])["text"].to_pylist()
    scores = dict(scored(texts, encoder, asked))
    with threadpool_limits(1):
        found = kinds(texts, encoder)
        rows = [
            {"first student": name, "target": target, **row}
            for (name, kind), (target, truth) in product(found.items(), scores.items())
            for row in rounds(kind, truth, asked)
        ]
    sys.stdout.write(table(rows))
    costs = {name: kind.costs._asdict() for name, kind in found.items()}
    sys.stdout.write(json.dumps({"corpus": asked.corpus, "n": len(texts), "cost_s": costs, "rows": rows}) + "\n")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", default="weborganizer_web_en", help="set whose documents are scored")
    parser.add_argument("--graded", nargs="+", choices=SETS, default=GRADED, help="sets with scores to learn")
    parser.add_argument("--ratings", type=Path, nargs="*", default=[], help="ratings of gristmill rate to learn")
    parser.add_argument("--sample", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoder", default=MODEL)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--cache", type=Path, default=Path("runs/cascade/embeddings.sqlite"))
    return parser.parse_args()


# -- the encoder's scores ---------------------------------------------------------------------------------------------


def scored(texts: list[str], encoder: Encoder, asked: argparse.Namespace) -> Iterator[tuple[str, Floats]]:
    """The encoder's score (n_texts,) of every document, for each target."""
    vectors = embeddings.embed(encoder, texts, asked.cache).documents()
    for name, graded, values in targets(asked):
        learned = embeddings.embed(encoder, graded, asked.cache).documents()
        folds = np.random.default_rng(0).permutation(len(graded)) % heads.N_FOLDS
        fit = heads.fit_head(Target("score", "score", values), learned, np.ones(len(graded), bool), folds)
        yield name, fit.head.outputs(vectors)[:, 0].astype(np.float64)


def targets(asked: argparse.Namespace) -> Iterator[tuple[str, list[str], list[float]]]:
    """Each target's name, texts and scores."""
    for name in asked.graded:
        found = read(asked.folder / name / "data.parquet", SETS[name], 10_000)
        yield f"{name} {found.source.label}", found.texts, [float(value) for value in found.values]
    for path in asked.ratings:
        rows = [row for row in pq.read_table(path, columns=["text", "score"]).to_pylist() if row["score"] is not None]
        yield str(path), [row["text"] for row in rows], [row["score"] for row in rows]


# -- first students ---------------------------------------------------------------------------------------------------


def by_embeddings(features: Floats, scores: Floats, learn: slice) -> Floats:
    """What gristmill's own says of all documents (n_texts,)."""
    return cascade.learn(features[learn], scores[learn], 0).scores(features)


def by_n_grams(counts: Any, scores: Floats, learn: slice) -> Floats:
    """What ridge regression on TF-IDF says of all documents (n_texts,)."""
    ridge = make_pipeline(TfidfTransformer(sublinear_tf=True), RidgeCV(np.logspace(-3, 3, 13)))
    found: Floats = ridge.fit(counts[learn], scores[learn]).predict(counts)
    return found


def kinds(texts: list[str], encoder: Encoder) -> dict[str, Kind]:
    """Both kinds of first student, with what they and the encoder cost on some of the texts."""
    cut, some = [text[:N_CHARACTERS] for text in texts], slice(None, None, len(texts) // N_TIMED)
    features = cascade.features(encoder.read(texts).firsts, encoder.word_embeddings)
    sizes = cascade.n_tokens(features)
    read, first = encoder.read(texts[some]), cascade.learn(features[:N_ANCHORS], features[:N_ANCHORS, 0], 0)
    encoder.ready()
    tokenising, computing = seconds(lambda: encoder.read(texts[some])), seconds(lambda: encoder.vectors(read))
    of_embeddings = seconds(lambda: first.scores(cascade.features(read.firsts, encoder.word_embeddings)))
    of_n_grams = seconds(lambda: N_GRAMS.transform(cut[some]))
    return {
        "word embeddings": Kind(features, sizes, by_embeddings, Costs(tokenising, of_embeddings, computing)),
        "hashed n-grams": Kind(N_GRAMS.transform(cut), sizes, by_n_grams, Costs(tokenising, of_n_grams, computing)),
    }


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of processor time."""
    work()
    begin = time.process_time()
    work()
    return time.process_time() - begin


# -- what they save ---------------------------------------------------------------------------------------------------


def rounds(kind: Kind, scores: Floats, asked: argparse.Namespace) -> Iterator[dict[str, float]]:
    """A row for each share kept and recall wanted: means over the rounds of what a first student does."""
    outcomes = [one_round(kind, scores, np.random.default_rng(seed), asked.sample) for seed in range(asked.rounds)]
    for keep, wanted in outcomes[0]:
        means = np.mean([each[keep, wanted] for each in outcomes], axis=0)
        yield {"keep": keep, "recall wanted": wanted, **Outcome(*means.tolist())._asdict()}


def one_round(kind: Kind, scores: Floats, rng: np.random.Generator, size: int) -> dict[tuple[float, float], Outcome]:
    """What a first student does with one sample of so many, for each share kept and recall wanted."""
    order = rng.permutation(len(scores))
    n_learned = math.ceil(LEARNED * size)
    truth, learned, rest, others = scores[order], slice(n_learned), slice(n_learned, size), slice(size, None)
    said, sizes = kind.says(kind.seen[order], truth, learned), kind.sizes[order][others]
    found = {}
    for keep, wanted in product(KEPT, RECALLS):
        cut = np.quantile(truth[learned], 1 - keep)
        passing = said[others] >= cascade.calibrate(said[rest], truth[rest], cut, wanted)
        tokens = float(sizes[passing].sum() / sizes.sum())
        recall, gain = float(passing[truth[others] >= cut].mean()), cascade.speed_up(tokens, kind.costs)
        found[keep, wanted] = Outcome(float(passing.mean()), tokens, recall, gain)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over targets as Markdown."""
    columns = ["first student", "keep", "recall wanted"]
    lines = [[*columns, *Outcome._fields, "least and most speed_up"], ["---"] * (len(columns) + 5)]
    for place in dict.fromkeys(tuple(row[name] for name in columns) for row in rows):
        of = [row for row in rows if tuple(row[name] for name in columns) == place]
        figures = [f"{statistics.median(row[name] for row in of):.2f}" for name in Outcome._fields]
        ends = [f"{end(row['speed_up'] for row in of):.2f}" for end in (min, max)]
        lines.append([place[0], f"{place[1]:.0%}", f"{place[2]:.0%}", *figures, " to ".join(ends)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
