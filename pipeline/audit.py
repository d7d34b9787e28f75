"""After stage 3: scored documents are rated again by the teacher, for figures that hold on the corpus itself."""

import heapq
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import consensus, corpus, panel, parts, ratings, scored, teacher
from pipeline.config import Corpus as CorpusSettings
from pipeline.config import Filter, Recipe, load_recipe
from pipeline.consensus import Verdict
from pipeline.errors import UserError
from pipeline.judged import of_scores
from pipeline.keys import gives_amount
from pipeline.metrics import Floats, sortable, unsortable
from pipeline.panel import Collected, Opinions, Rater
from pipeline.parts import PartResult
from pipeline.sample import Document, priority
from pipeline.shards import Counts, Shard, fingerprint
from pipeline.spending import check_budget
from pipeline.storage import write_table
from pipeline.tracking import Result, Stage, read_json, stage
from pipeline.weighting import Strata, above, estimate, strata, stratum_of

log = logging.getLogger("gristmill")

Interval = tuple[float, float] | None

BITS = 20
"""Upper bits of a score by which strata are cut: sign, exponent and 11 of the fraction, fine to 0.05%."""


class AuditResult(Result):
    """The student's figures against the teacher on the whole scored corpus, with 95% intervals; None where no document
    that matters was rated. Good documents have a teacher's score of at least `good_from`, kept ones a student's score
    of at least `cut`."""

    n_rows: int
    n_no_score: int
    """Rows that the student has not scored: no text."""
    n_audited: int
    """Documents drawn."""
    n_scored: int
    """Documents drawn that the teacher scored; in its stratum each stands for those that it did not score."""
    unscored: dict[str, int]
    n_asked: int
    n_reused: int
    n_failed: int
    n_not_asked: int
    stopped_by: str | None
    strata: list[dict[str, Any]]
    """From the lowest scores: low, high, n_corpus, n_audited, n_scored, n_good, mean_teacher."""
    good_from: float
    cut: float
    cut_from: str
    """Where the cut comes from: filter, or train."""
    kept_share: float
    base_rate: float | None
    base_rate_interval: Interval
    precision: float | None
    precision_interval: Interval
    recall: float | None
    recall_interval: Interval
    by_cut: list[dict[str, Any]]
    """The same at the lowest score of each int_score above the lowest one."""
    prompt_tokens: int
    answer_tokens: int
    usd: float | None
    tokens_per_s: float | None
    docs_per_s: float | None


def run(recipe: Recipe, redo: bool = False) -> AuditResult | PartResult:
    """Rate equally many documents of each stratum of the score, and weight them back."""
    raters = panel.of(recipe)
    check_budget(recipe.audit, [rater.teacher for rater in raters])
    found, shards = scored.locate(recipe, "audit")
    with stage("audit", recipe, inputs(recipe, raters, shards)) as work:
        done = parts.finished(work, AuditResult, redo, (work.folder / "ratings.parquet").exists())
        if done:
            return done
        survey = surveyed(found, shards)
        judge = Judge.of(recipe, survey, raters[0].prompt.scale)
        if judge.cut_from == "train" and (recipe.run_folder / "filter" / "result.json").exists():
            log.warning("audit: the score alone does not tell what was kept; the figures are from %g up", judge.cut)
        n_kept = sum(int(np.sum(scored.scores(batch) >= judge.cut)) for _, batch in batches(found, shards, ["score"]))
        drawn = draw(found, shards, survey.strata(recipe.audit.strata), recipe)
        texts = list(dict.fromkeys(each.document.text for each in drawn))
        calibrate, home = recipe.rate.calibrate, recipe.run_folder / "rate"
        if recipe.shard:
            return parts.asked(work, raters, texts, parts.share(recipe.audit, recipe.shard), calibrate, home=home)
        with parts.gathered(work, home) as store:
            got = panel.collect("audit", raters, texts, store, recipe.audit, calibrate=calibrate)
            said = [panel.opinions(rater, texts, store, got.failed, calibrate) for rater in raters]
        said = [each.about(texts, [one.document.text for one in drawn]) for each in said]
        verdicts = consensus.verdicts(said, recipe.rate.consensus)
        write(work, survey, drawn, said, verdicts)
        result = summarise(work, survey, judge, n_kept, drawn, said, verdicts, got)
        check_readable(result, work)
        return parts.put_together(work, result)


def inputs(recipe: Recipe, raters: list[Rater], shards: list[Shard]) -> dict[str, Any]:
    """Everything that decides the result."""
    cut, cut_from = given_cut(recipe)
    return {
        "audit": recipe.audit.identity(),
        "raters": [[rater.prompt.digest, teacher.identity(rater.prompt, rater.teacher)] for rater in raters],
        "consensus": recipe.rate.consensus,
        "calibrate": recipe.rate.calibrate,
        "good_from": recipe.train.good_from,
        "cut": [cut, cut_from, filter_settings(recipe).min_int_score if cut is None else None],
        "shards": {shard.name: fingerprint(shard) for shard in shards},
        "scores": of_scores(recipe),
        "seed": recipe.seed,
    }


def given_cut(recipe: Recipe) -> tuple[float | None, str]:
    """The score from which documents are kept, as filtered or as the recipe says, else as the student was judged; and
    which of them. None: not told as a score."""
    filtered, settings = read_json(recipe.run_folder / "filter" / "result.json") or {}, filter_settings(recipe)
    if filtered.get("cut") is not None:
        return float(filtered["cut"]), "filter"
    if not gives_amount(settings) and settings.min_int_score is not None:
        return None, "filter"
    if not gives_amount(settings) and settings.min_score is not None:
        return settings.min_score, "filter"
    trained = read_json(recipe.run_folder / "train" / "result.json") or {}
    return trained.get("targets", {}).get("score", {}).get("cut"), "train"


def filter_settings(recipe: Recipe) -> Filter:
    """Those that the kept corpus was made with, else the recipe's."""
    made = recipe.run_folder / "filter" / "recipe.yaml"
    is_done = made.exists() and (made.parent / "result.json").exists()
    return load_recipe(made, {}).filter if is_done else recipe.filter


class Judge(NamedTuple):
    """The teacher's score from which a document is good, the student's from which it is kept, and what says so."""

    good_from: float
    cut: float
    cut_from: str

    @classmethod
    def of(cls, recipe: Recipe, survey: "Survey", scale: tuple[float, float]) -> "Judge":
        """As the recipe and the stages before say."""
        good_from = sum(scale) / 2 if recipe.train.good_from is None else recipe.train.good_from
        cut, cut_from = given_cut(recipe)
        least = filter_settings(recipe).min_int_score
        if cut_from == "filter" and cut is None and least is not None:
            cut = min((low for value, low in survey.lowest.items() if value >= least), default=survey.highest + 1)
        return cls(good_from, good_from if cut is None else cut, cut_from)


# -- the corpus -------------------------------------------------------------------------------------------------------


@dataclass
class Survey:
    """The scores of a corpus, counted in constant memory."""

    n_rows: int = 0
    n_scored: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1 << BITS, np.int64))
    """Documents by the upper bits of their score."""
    int_counts: Counter[int] = field(default_factory=Counter)
    lowest: dict[int, float] = field(default_factory=dict)
    """The lowest score of each int_score."""
    highest: float = -np.inf

    def add(self, scores: NDArray[np.float32], ints: NDArray[np.int8]) -> None:
        """Count the scored documents of a batch."""
        self.n_scored += len(scores)
        self.counts += np.bincount(sortable(scores) >> (32 - BITS), minlength=1 << BITS)
        self.highest = max(self.highest, float(scores.max(initial=-np.inf)))
        for value in np.unique(ints).tolist():
            self.int_counts[value] += int(np.sum(ints == value))
            self.lowest[value] = min(self.lowest.get(value, np.inf), float(scores[ints == value].min()))

    def strata(self, n: int) -> Strata:
        """At most `n` strata of the score, with equally many documents each as far as ties allow."""
        keys = np.flatnonzero(self.counts)
        values = np.array([unsortable(int(key) << (32 - BITS)) for key in keys])
        return strata(values, n, self.counts[keys])


def surveyed(found: CorpusSettings, shards: list[Shard]) -> Survey:
    """Count all scores."""
    survey = Survey()
    for _, batch in batches(found, shards, ["score", "int_score"]):
        scores = scored.scores(batch)
        survey.n_rows += len(scores)
        there = np.isfinite(scores)
        survey.add(scores[there], scored.scores(batch, "int_score")[there].astype(np.int8))
    if not survey.n_scored:
        raise UserError(f"audit: {found.path} has no scored document in {survey.n_rows} rows")
    return survey


def batches(found: CorpusSettings, shards: list[Shard], columns: list[str]) -> Iterator[tuple[Shard, pa.RecordBatch]]:
    """Some columns of the scored corpus, shard by shard."""
    for shard in shards:
        for batch in corpus.read(shard, found, Counts(), columns):
            yield shard, batch


# -- the draw ---------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A document that is audited: what the student says of it, and its stratum, counted from the lowest scores."""

    document: Document
    score: float
    int_score: int
    stratum: int


Place = tuple[float, int, int]
"""(minus a random number, shard, row): of a stratum, those with the smallest numbers are drawn."""


def draw(found: CorpusSettings, shards: list[Shard], of: Strata, recipe: Recipe) -> list[Drawn]:
    """Equally many documents of each stratum, uniform within it. Rows are drawn, not texts: each copy counts."""
    size = -(-recipe.audit.sample // len(of.shares))
    heaps: list[list[Place]] = [[] for _ in of.shares]
    for number, shard in enumerate(shards):
        rng, row = np.random.default_rng(priority(shard.name, recipe.seed)), 0
        for _, batch in batches(found, [shard], ["score"]):
            scores, chance = scored.scores(batch), rng.random(batch.num_rows)
            offer(heaps, scores, chance, of, size, number, row)
            row += batch.num_rows
    places = {(shard, row): stratum for stratum, heap in enumerate(heaps) for _, shard, row in heap}
    return [each for number, shard in enumerate(shards) for each in fetch(found, shard, number, places)]


def offer(
    heaps: list[list[Place]], scores: NDArray[np.float32], chance: Floats, of: Strata, size: int, shard: int, row: int
) -> None:
    """Take in the rows of a batch, the first of which is `row`, that are among the `size` smallest of a stratum."""
    stratum = stratum_of(scores.astype(np.float64), of)
    for number, heap in enumerate(heaps):
        inside = np.flatnonzero((stratum == number) & np.isfinite(scores))
        for i in inside[np.argsort(chance[inside], kind="stable")[:size]].tolist():
            heapq.heappush(heap, (-float(chance[i]), shard, row + i))
            if len(heap) > size:
                heapq.heappop(heap)


def fetch(found: CorpusSettings, shard: Shard, number: int, places: dict[tuple[int, int], int]) -> Iterator[Drawn]:
    """The drawn documents of one shard, in its order."""
    row = 0
    if not any(of == number for of, _ in places):
        return
    columns = list(dict.fromkeys(["score", "int_score", *scored.id_columns(found)]))
    for _, batch in batches(found, [shard], columns):
        wanted = [i for i in range(batch.num_rows) if (number, row + i) in places]
        part = batch.take(pa.array(wanted, pa.int64()))
        texts, ids = corpus.texts(part, found, shard, Counts()), scored.ids(part, found, shard)
        scores, ints = scored.scores(part), scored.scores(part, "int_score")
        for i, id, text, score, int_score in zip(wanted, ids, texts, scores, ints, strict=True):
            stratum = places[number, row + i]
            yield Drawn(Document(id, text or "", stratum=str(stratum)), float(score), int(int_score), stratum)
        row += batch.num_rows


# -- the result -------------------------------------------------------------------------------------------------------


def summarise(
    work: Stage,
    survey: Survey,
    judge: Judge,
    n_kept: int,
    drawn: list[Drawn],
    said: list[Opinions],
    verdicts: list[Verdict],
    got: Collected,
) -> AuditResult:
    """The figures of the corpus, estimated from the documents that the teacher scored."""
    unscored = Counter(str(verdict.reason) for verdict in verdicts if verdict.reason)
    n_scored = sum(verdict.score is not None for verdict in verdicts)
    assert len(drawn) == n_scored + unscored.total(), "every drawn document has a score or a reason"
    return AuditResult(
        seconds=work.seconds,
        n_rows=survey.n_rows,
        n_no_score=survey.n_rows - survey.n_scored,
        n_audited=len(drawn),
        n_scored=n_scored,
        unscored=dict(unscored),
        **got.spending.in_figures([each.rater.teacher for each in said], work.seconds),
        n_failed=len(got.failed),
        n_not_asked=got.n_not_asked,
        **judge._asdict(),
        kept_share=n_kept / survey.n_scored,
        **estimates(survey, survey.strata(work.recipe.audit.strata), drawn, judged(verdicts), judge),
    )


def judged(verdicts: list[Verdict]) -> Floats:
    """The teacher's scores (n,), NaN where there is none."""
    return np.array([np.nan if verdict.score is None else verdict.score for verdict in verdicts], dtype=np.float64)


def estimates(survey: Survey, of: Strata, drawn: list[Drawn], truth: Floats, judge: Judge) -> dict[str, Any]:
    """Base rate, precision and recall at the cut and at every whole score, and what they rest on."""
    there = np.isfinite(truth)
    scores, good = np.array([each.score for each in drawn])[there], truth[there] >= judge.good_from

    def at(cut: float, *names: str) -> dict[str, Any]:
        found = estimate(scores, good, of, above(cut))._asdict()
        wanted = {key: found[key] for name in names for key in (name, f"{name}_interval")}
        return {key: list(each) if isinstance(each, tuple) else each for key, each in wanted.items()}

    total = survey.int_counts.total()
    by_cut = [
        {
            "int_score": value,
            "cut": lowest,
            "share": sum(n for other, n in survey.int_counts.items() if other >= value) / total,
            **at(lowest, "precision", "recall"),
        }
        for value, lowest in sorted(survey.lowest.items())[1:]
    ]
    return {
        **at(float(np.float32(judge.cut)), "base_rate", "precision", "recall"),  # as the scores are compared
        "by_cut": by_cut,
        "strata": in_strata(survey, of, drawn, truth, judge.good_from),
    }


def in_strata(survey: Survey, of: Strata, drawn: list[Drawn], truth: Floats, good_from: float) -> list[dict[str, Any]]:
    """What was drawn and found in each stratum; `low` belongs to it, `high` to the next, but for the last."""
    ends = [min(survey.lowest.values()), *of.edges.tolist(), survey.highest]
    found = []
    for number, n_corpus in enumerate(sizes(survey, of).tolist()):
        inside = truth[[each.stratum == number for each in drawn]]
        known = inside[np.isfinite(inside)]
        found.append(
            {
                "low": ends[number],
                "high": ends[number + 1],
                "n_corpus": n_corpus,
                "n_audited": len(inside),
                "n_scored": len(known),
                "n_good": int(np.sum(known >= good_from)),
                "mean_teacher": float(known.mean()) if len(known) else None,
            }
        )
    return found


def sizes(survey: Survey, of: Strata) -> NDArray[np.int64]:
    """Documents of the corpus in each stratum."""
    return np.rint(of.shares * survey.n_scored).astype(np.int64)


def write(work: Stage, survey: Survey, drawn: list[Drawn], said: list[Opinions], verdicts: list[Verdict]) -> None:
    """The ratings, and beside each what the student says, and how many documents of the corpus it stands for: none
    without a teacher's score."""
    there, stratum = np.isfinite(judged(verdicts)), np.array([each.stratum for each in drawn])
    of = sizes(survey, survey.strata(work.recipe.audit.strata))
    weights = np.where(there, of[stratum] / np.maximum(np.bincount(stratum[there], minlength=len(of)), 1)[stratum], 0)
    table = ratings.table([each.document for each in drawn], said, verdicts)
    for name, values, kind in (
        ("student_score", [each.score for each in drawn], pa.float32()),
        ("student_int_score", [each.int_score for each in drawn], pa.int8()),
        ("weight", weights, pa.float64()),
    ):
        table = table.append_column(name, pa.array(values, kind))
    write_table(work.folder / "ratings.parquet", table)


def check_readable(result: AuditResult, work: Stage) -> None:
    """Stop when too much of what was asked has no score."""
    n_asked = result.n_audited - result.unscored.get("not_asked", 0)
    if n_asked == 0:
        raise UserError(f"audit: {result.stopped_by} leaves room for no document; raise it")
    n_unscored = n_asked - result.n_scored
    if n_unscored > work.recipe.rate.max_unscored_rate * n_asked or result.n_scored == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in result.unscored.items())
        raise UserError(
            f"audit: {n_unscored} of {n_asked} documents have no score ({reasons}); read the answers with gristmill"
            f" show {work.folder}; where the request failed, the same command asks again"
        )
