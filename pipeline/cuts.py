"""What each cut would keep of the scored corpus, and how good that would be, before anything is written."""

import importlib.util
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import config, corpus, cuts_picture, judged, scored
from pipeline.choice import Groups
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.judged import Judged
from pipeline.shards import Counts, Shard, fingerprint
from pipeline.storage import content
from pipeline.tracking import Result, progress, read_json, stage
from pipeline.weighting import Strata, above, estimate

log = logging.getLogger("gristmill")

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of the corpus whose cuts are always shown."""
CURVE = np.geomspace(0.005, 1, 48)
"""Shares of the corpus that the curve goes through."""
MOST_VALUES = 20
"""Values of a column that are shown by themselves, those with most documents."""
OTHERS = "(others)"


class CutsResult(Result):
    """What each cut would keep. Figures against the teacher are estimates for the corpus, with 95% intervals."""

    n_rows: int
    n_scored: int
    n_tokens: int
    """Of the scored documents."""
    tokens_counted_by: str
    n_looked_at: int
    """Scored documents that the cuts were found on: all, or a uniform sample."""
    judged_by: str | None
    """audit or ratings; None where the teacher's judgement of this corpus is not known."""
    n_judged: int
    n_strata_empty: int
    good_from: float | None
    base_rate: float | None
    base_rate_interval: tuple[float, float] | None
    cuts: list[dict[str, Any]]
    """From the lowest cut to the highest: by (int_score, share or student), cut, score (the lowest that is kept),
    documents, tokens, share, token_share, n_judged_kept, precision, recall and their intervals."""
    curve: list[dict[str, Any]]
    """The same, more closely."""
    by: dict[str, list[dict[str, Any]]]
    """For each column of cuts.by its values: value, documents, tokens, n_judged, base_rate, and cuts as above."""
    score_counts: dict[str, list[float]]
    """A histogram of the scores: `edges`, and `documents` between them."""


def run(recipe: Recipe, redo: bool = False) -> CutsResult:
    """Look at the scores once, then find every cut and estimate its quality."""
    found, shards = scored.locate(recipe, "plan")
    with stage("cuts", recipe, inputs(recipe, shards)) as work:
        has_plots = importlib.util.find_spec("matplotlib") is not None
        there = not redo and (not has_plots or (work.folder / "cuts.png").exists())
        done = work.finished(CutsResult, True, there, start=False)
        if done:
            return done
        seen = look(recipe, found, shards)
        work.start()
        result = plan(recipe, seen, work.seconds)
        try:
            cuts_picture.draw(work.folder / "cuts.png", result.model_dump())
        except UserError as error:
            log.warning("plan: there is no picture: %s", error)
        return work.finish(result)


def inputs(recipe: Recipe, shards: list[Shard]) -> dict[str, Any]:
    """Everything that decides what is shown."""
    files = [path for path in judged.files(recipe) if path.exists()]
    return {
        "cuts": recipe.cuts.model_dump(mode="json"),
        "tokens": scored.tokens_counted_by(recipe),
        "seed": recipe.seed,
        "shards": {shard.name: fingerprint(shard) for shard in shards},
        "judged": {path.parent.name: content(path) for path in files},
    }


# -- one pass over the corpus -----------------------------------------------------------------------------------------


Held = NDArray[np.void]
"""Scored documents, a row each: random number, scores, tokens, and the values of the columns as numbers."""


def held_type(n_columns: int) -> np.dtype[np.void]:
    """The fields of such a row."""
    fields = [("rank", "<f8"), ("score", "<f4"), ("int_score", "<f4"), ("tokens", "<i8"), ("codes", "<i4", n_columns)]
    return np.dtype([(name, kind, *rest) for name, kind, *rest in fields])


class Seen:
    """What one pass finds: exact totals, a sample of bounded size, and where the judged documents stand."""

    def __init__(self, recipe: Recipe) -> None:
        self.judged = judged.to_choose(recipe)
        self.names = recipe.cuts.by
        self.groups = [Groups(name, "cuts.by") for name in self.names]
        self.n_rows = self.n_scored = self.n_tokens = 0
        self.size, self.random = recipe.cuts.documents, np.random.default_rng([recipe.seed, 7])
        self.parts = [np.zeros(0, held_type(len(self.names)))]
        self.n_held, self.limit = 0, 1.0
        self.places = {name: place for place, name in enumerate(self.judged.ids)} if self.judged else {}
        self.judged_codes = np.full((len(self.places), len(self.names)), -1, np.int32)
        """Values of the columns for each judged document, -1 where it was not met: (n_judged, n_columns)."""

    def add(self, batch: pa.RecordBatch, recipe: Recipe, found: config.Corpus, shard: Shard) -> None:
        """Take a batch in."""
        rows = np.zeros(batch.num_rows, self.parts[0].dtype)
        rows["rank"] = self.random.random(len(rows))
        rows["score"], rows["int_score"] = scored.scores(batch), scored.scores(batch, "int_score")
        rows["tokens"] = scored.tokens(batch, recipe.filter.tokens_column, found, shard)
        for column, (name, group) in enumerate(zip(self.names, self.groups, strict=True)):
            rows["codes"][:, column] = group.code(scored.values(batch, name, shard))
        if self.names and self.places:
            self.meet(scored.ids(batch, found, shard), rows["codes"])
        self.n_rows += len(rows)
        self.hold(rows[~np.isnan(rows["score"])])

    def meet(self, ids: list[str], codes: NDArray[np.int32]) -> None:
        """Note the values of judged documents."""
        for name, code in zip(ids, codes, strict=True):
            if name in self.places:
                self.judged_codes[self.places[name]] = code

    def hold(self, rows: Held) -> None:
        """Count scored documents, and keep those with the smallest random numbers."""
        self.n_scored += len(rows)
        self.n_tokens += int(rows["tokens"].sum())
        self.parts.append(rows[rows["rank"] <= self.limit])
        self.n_held += len(self.parts[-1])
        if self.n_held > 2 * self.size:
            self.parts = [self.held()]
            self.n_held, self.limit = self.size, float(self.parts[0]["rank"].max())

    def held(self) -> Held:
        """A uniform sample of the scored documents seen so far, at most `size` of them."""
        rows = np.concatenate(self.parts)
        return rows[np.argpartition(rows["rank"], self.size)[: self.size]] if len(rows) > self.size else rows


def look(recipe: Recipe, found: config.Corpus, shards: list[Shard]) -> Seen:
    """Read scores, tokens and columns of the whole scored corpus."""
    seen = Seen(recipe)
    with progress("plan", corpus.n_rows(shards)) as step:
        for shard in shards:
            names = ["score", "int_score", recipe.filter.tokens_column or found.text_column]
            names += scored.value_columns(shard, found, seen.names)
            names += scored.id_columns(found) if seen.names and seen.judged else []
            for batch in corpus.read(shard, found, Counts(), list(dict.fromkeys(names))):
                seen.add(batch, recipe, found, shard)
                step(batch.num_rows)
    if not seen.n_scored:
        raise UserError(f"plan: {found.path} has no scored document")
    return seen


# -- the table --------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A way to cut: documents with at least `score` are kept."""

    by: str
    cut: float
    score: float


class Part(NamedTuple):
    """Documents of which a table is made: scores and tokens (n,) of a sample, what one of it stands for, and the
    judged documents among them."""

    scores: NDArray[np.float32]
    tokens: NDArray[np.int64]
    each: float
    judged: Judged | None


def plan(recipe: Recipe, seen: Seen, seconds: float) -> CutsResult:
    """Every cut on the whole, and on the values of each column."""
    held = seen.held()
    each = seen.n_scored / len(held)
    whole = Part(held["score"], held["tokens"], each, seen.judged)
    found = cuts(held, student_cut(recipe))
    curve = [
        Cut("share", float(share), score) for share, score in zip(CURVE, at_shares(held["score"], CURVE), strict=True)
    ]
    base = figures(whole, [Cut("share", 1.0, -math.inf)])[0]
    return CutsResult(
        seconds=seconds,
        n_rows=seen.n_rows,
        n_scored=seen.n_scored,
        n_tokens=seen.n_tokens,
        tokens_counted_by=scored.tokens_counted_by(recipe),
        n_looked_at=len(held),
        judged_by=seen.judged.by if seen.judged else None,
        n_judged=len(seen.judged.scores) if seen.judged else 0,
        n_strata_empty=base["n_strata_empty"],
        good_from=seen.judged.good_from if seen.judged else None,
        base_rate=base["precision"],
        base_rate_interval=base["precision_interval"],
        cuts=figures(whole, found),
        curve=figures(whole, curve),
        by={name: values(seen, held, column, found) for column, name in enumerate(seen.names)},
        score_counts=histogram(held["score"], each),
    )


def student_cut(recipe: Recipe) -> float | None:
    """The score at which the student's F1 was best when it was trained."""
    targets = (read_json(recipe.run_folder / "train" / "result.json") or {}).get("targets", {})
    return None if recipe.filter.scored or recipe.score.student else targets.get("score", {}).get("cut")


def cuts(held: Held, student: float | None) -> list[Cut]:
    """Whole scores, common shares and the student's own cut, from the lowest score to the highest."""
    whole = np.unique(held["int_score"][~np.isnan(held["int_score"])])
    found = [Cut("int_score", float(k), float(held["score"][held["int_score"] >= k].min())) for k in whole[1:]]
    found += [
        Cut("share", share, score) for share, score in zip(SHARES, at_shares(held["score"], SHARES), strict=True)
    ]
    found += [] if student is None else [Cut("student", student, student)]
    return sorted(found, key=lambda cut: cut.score)


def at_shares(scores: NDArray[np.float32], shares: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """The lowest score of the best `shares` of all documents."""
    ranked = np.sort(scores)[::-1]
    return [float(ranked[max(0, round(share * len(ranked)) - 1)]) for share in shares]


def figures(part: Part, found: Sequence[Cut]) -> list[dict[str, Any]]:
    """What each cut keeps of some documents, and how good it is."""
    order = np.argsort(part.scores)
    ranked, tokens = part.scores[order], np.append(0, np.cumsum(part.tokens[order]))
    of = judged.strata_for(part.judged, part.scores) if part.judged and len(ranked) else None
    rows = []
    for cut in found:
        first = int(np.searchsorted(ranked, np.float32(cut.score)))
        n, n_tokens = len(ranked) - first, int(tokens[-1] - tokens[first])
        rows.append(
            {
                **cut._asdict(),
                "documents": round(n * part.each),
                "tokens": round(n_tokens * part.each),
                "share": n / max(len(ranked), 1),
                "token_share": n_tokens / max(int(tokens[-1]), 1),
                **quality(part.judged, of, cut),
            }
        )
    return rows


def quality(found: Judged | None, of: Strata | None, cut: Cut) -> dict[str, Any]:
    """Precision and recall of a cut; None where nothing is judged."""
    names = ("n_judged_kept", "n_strata_empty", "precision", "precision_interval", "recall", "recall_interval")
    if found is None or of is None:
        return {**dict.fromkeys(names), "n_judged_kept": 0, "n_strata_empty": 0}
    known = judged.figures(estimate(found.scores, found.good, of, above(cut.score)))
    return {name: known[name] for name in names}


def values(seen: Seen, held: Held, column: int, found: Sequence[Cut]) -> list[dict[str, Any]]:
    """The table of each value of a column, those with most documents first, the rest together."""
    codes, names = held["codes"][:, column], list(seen.groups[column].codes)
    order = np.argsort(-np.bincount(codes, minlength=len(names)), kind="stable")
    shown = [(names[code], np.array([code])) for code in order[:MOST_VALUES]]
    shown += [(OTHERS, order[MOST_VALUES:])] if len(order) > MOST_VALUES else []
    each = seen.n_scored / len(held)
    return [of_value(name, part_of(seen, held[np.isin(codes, of)], column, of, each), found) for name, of in shown]


def part_of(seen: Seen, held: Held, column: int, codes: NDArray[np.intp], each: float) -> Part:
    """The documents with some values of a column, and the judged ones among them."""
    known = np.isin(seen.judged_codes[:, column], codes)
    some = seen.judged and seen.judged._replace(scores=seen.judged.scores[known], good=seen.judged.good[known])
    return Part(held["score"], held["tokens"], each, some if known.any() else None)


def of_value(name: str, part: Part, found: Sequence[Cut]) -> dict[str, Any]:
    """One value of a column: its size, its base rate and its cuts."""
    everything = figures(part, [Cut("share", 1.0, -math.inf)])[0]
    return {
        "value": name,
        "documents": everything["documents"],
        "tokens": everything["tokens"],
        "n_judged": len(part.judged.scores) if part.judged else 0,
        "base_rate": everything["precision"],
        "base_rate_interval": everything["precision_interval"],
        "cuts": figures(part, found),
    }


def histogram(scores: NDArray[np.float32], each: float) -> dict[str, list[float]]:
    """Documents by score in sixty bins of equal width."""
    counts, edges = np.histogram(scores.astype(np.float64), bins=60)
    return {"edges": edges.tolist(), "documents": (counts * each).tolist()}
