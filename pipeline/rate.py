"""Stage 1: a teacher, or several, rate a sample of the corpus."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import consensus, engines, metrics, panel, parts, ratings, rounds, teacher
from pipeline import gold as golds
from pipeline.config import Recipe
from pipeline.consensus import Verdict
from pipeline.errors import UserError
from pipeline.gold import GoldDocument
from pipeline.metrics import Floats
from pipeline.panel import Collected, Opinions, Rater
from pipeline.parts import PartResult
from pipeline.sample import Document, draw, where_rows_went
from pipeline.shards import Counts, find_shards, fingerprint
from pipeline.tracking import Result, Stage, read_json, stage

log = logging.getLogger("gristmill")


class RateResult(Result):
    """What stage 1 did, with the sample and with every round that rate --next chose. What describes the corpus (mean
    scores, counts of int scores, agreement, gold) is about the sample alone: rounds favour rare documents. `mass` is
    the mean probability of all candidates."""

    n_rows: int
    n_empty: int
    n_bad_rows: int
    n_repaired_texts: int
    n_not_drawn: int
    """Rows with text that are in neither the sample nor a round, copies of a drawn text among them."""
    n_sampled: int
    """Documents of the sample and of all rounds."""
    rounds: list[dict[str, Any]]
    """The sample (round 0), then each round: documents, those scored, their mean and counts of int scores."""
    n_scored: int
    n_raters: int
    n_asked: int
    """Questions asked in this run, failed ones among them; the other answers were recorded before."""
    n_reused: int
    n_failed: int
    """Questions whose request failed; --redo asks them again."""
    n_not_asked: int
    """Questions that the budget left out; the same command with more of it goes on."""
    stopped_by: str | None
    n_truncated: int
    """Documents cut to teacher.document_tokens."""
    unscored: dict[str, int]
    unscored_rate: float
    strata: dict[str, int]
    int_score_counts: dict[str, int]
    mean_score: float | None
    attributes: dict[str, float | None]
    """Mean of each named score."""
    mean_spread: float | None
    mass: float | None
    prompt_tokens: int
    answer_tokens: int
    usd: float | None
    """At the prices given; None without them."""
    tokens_per_s: float | None
    """Prompt and answer tokens a second, loading left out."""
    docs_per_s: float | None
    """Answers of each rater a second, loading included."""
    planned: dict[str, float | None] | None
    """What `gristmill plan` expected, if it was asked."""
    opinions: list[dict[str, Any]]
    """Each rater: how many it scored, its mean, what was unscored."""
    agreement: list[dict[str, Any]]
    """Between repeats, prompts and teachers: the ceiling of any student."""
    gold: dict[str, Any] | None
    """Against the corpus's own column of known quality."""
    human: dict[str, Any] | None
    """Against the file of human scores."""


def run(recipe: Recipe, redo: bool = False) -> RateResult | PartResult:
    """Rate a sample, or ask about a part of it; answers already recorded are not asked for again."""
    raters = panel.of(recipe)
    with stage("rate", recipe, inputs(recipe, raters)) as work:
        n_rounds = len(rounds.files(work.folder))
        done = parts.finished(work, RateResult, redo, is_whole(work.folder, n_rounds))
        if done:
            return done
        rate = recipe.rate
        documents, counts = draw(recipe.corpus, rate, recipe.seed, rate.gold_column, rate.group_column)
        documents += rounds.read(work.folder, documents, recipe.corpus)
        people = golds.read(recipe.rate.gold)[0] if recipe.rate.gold else []
        judged = golds.documents(people, documents) if people else []
        texts = list(dict.fromkeys(document.text for document in [*documents, *judged]))
        calibrate = rate.calibrate
        if recipe.shard:
            return parts.asked(work, raters, texts, parts.share(rate, recipe.shard), calibrate, engines.of(recipe))
        with parts.gathered(work) as store:
            got = panel.collect("rate", raters, texts, store, recipe.rate, engines.of(recipe), calibrate)
            said = [panel.opinions(rater, texts, store, got.failed, calibrate) for rater in raters]
        on_documents = [each.about(texts, [document.text for document in documents]) for each in said]
        verdicts = consensus.verdicts(on_documents, rate.consensus)
        ratings.write(work.folder / "ratings.parquet", documents, on_documents, verdicts)
        human = against_people(work, people, judged, [each.about(texts, [d.text for d in judged]) for each in said])
        result = summarise(work, documents, counts, on_documents, verdicts, got, texts, human)
        check_readable(result, recipe, work, on_documents)
        return parts.put_together(work, result)


def is_whole(folder: Path, n_rounds: int) -> bool:
    """Whether the ratings are there, those of all rounds among them."""
    result = read_json(folder / "result.json") or {}
    return (folder / "ratings.parquet").exists() and len(result.get("rounds", [])) == 1 + n_rounds


BY_CONTENT = {"prompt", "more_prompts", "more_teachers", "gold"}
"""Settings that stand in the inputs by what they name."""


def inputs(recipe: Recipe, raters: list[Rater]) -> dict[str, Any]:
    """Everything that decides the ratings."""
    return {
        "corpus": recipe.corpus.identity(),
        "shards": {shard.name: fingerprint(shard) for shard in find_shards(recipe.corpus)},
        "raters": {
            f"{rater.prompt.name}, {position}": {
                "prompt": rater.prompt.digest,
                "teacher": teacher.identity(rater.prompt, rater.teacher),
            }
            for position, rater in enumerate(raters)
        },
        "rate": {name: value for name, value in recipe.rate.identity().items() if name not in BY_CONTENT},
        "gold": golds.content(recipe.rate.gold, "rate.gold") if recipe.rate.gold else None,
        "seed": recipe.seed,
    }


def against_people(
    work: Stage, people: list[GoldDocument], judged: list[Document], said: list[Opinions]
) -> dict[str, Any] | None:
    """Agreement of the consensus and of each rater with the human scores; these ratings are kept beside the others."""
    if not judged:
        return None
    verdicts = consensus.verdicts(said, work.recipe.rate.consensus)
    ratings.write(work.folder / "gold.parquet", judged, said, verdicts)
    scale, truth = said[0].rater.prompt.scale, np.array([document.gold for document in judged], dtype=np.float64)
    scores = np.array([np.nan if each.score is None else each.score for each in verdicts], dtype=np.float64)
    binary, shared = metrics.is_binary([each.mean for each in people]), golds.shared_scale(people, scale)
    each = [{**panel.origin(one.rater), **compared(one.scores, truth, binary, shared)} for one in said]
    found = {**compared(scores, truth, binary, shared), "between_people": golds.between_raters(people, shared)}
    return {**found, "raters": each if len(each) > 1 else []}


def compared(scores: Floats, truth: Floats, binary: bool, scale: tuple[float, float] | None) -> dict[str, Any]:
    """Scores against human ones, (n,) each, where there is a score; `scale` is that of both, if there is one."""
    there = np.isfinite(scores)
    return dict(metrics.against_gold(scores[there], truth[there].tolist(), binary, scale) or {"n": 0})


# -- the result -------------------------------------------------------------------------------------------------------


def summarise(
    work: Stage,
    documents: list[Document],
    counts: Counts,
    said: list[Opinions],
    verdicts: list[Verdict],
    got: Collected,
    texts: list[str],
    human: dict[str, Any] | None,
) -> RateResult:
    """Counts over all documents; figures about the corpus over the sample, which comes first."""
    prompt, n_sample = said[0].rater.prompt, sum(document.round == 0 for document in documents)
    sampled = [each.first(n_sample) for each in said]
    return RateResult(
        seconds=work.seconds,
        **where_rows_went(counts, documents),
        **scored_and_not(verdicts),
        **scores_in_figures(documents[:n_sample], verdicts[:n_sample], prompt.scale, prompt.attributes),
        **answers_in_figures(said),
        rounds=by_round(documents, verdicts, prompt.scale, len(rounds.files(work.folder))),
        **got.spending.in_figures([each.rater.teacher for each in said], work.seconds),
        n_failed=len(got.failed),
        n_not_asked=got.n_not_asked,
        planned=planned(work, len(said), len(texts)),
        agreement=consensus.agreements(sampled, prompt.scale),
        human=human,
    )


def scored_and_not(verdicts: list[Verdict]) -> dict[str, Any]:
    """Every document has a score or a reason."""
    n_scored = sum(verdict.score is not None for verdict in verdicts)
    unscored = Counter(str(verdict.reason) for verdict in verdicts if verdict.reason)
    assert len(verdicts) == n_scored + unscored.total(), "every document has a score or a reason"
    return {"n_scored": n_scored, "unscored": dict(unscored), "unscored_rate": 1 - n_scored / len(verdicts)}


def by_round(
    documents: list[Document], verdicts: list[Verdict], scale: tuple[float, float], n_rounds: int
) -> list[dict[str, Any]]:
    """What became of the sample and of each round."""
    found = []
    for number in range(1 + n_rounds):
        of_round = [v.score for d, v in zip(documents, verdicts, strict=True) if d.round == number]
        scores = [score for score in of_round if score is not None]
        found.append(
            {
                "round": number,
                "n_documents": len(of_round),
                "n_scored": len(scores),
                "mean_score": mean(scores),
                "int_score_counts": int_score_counts(scores, scale),
            }
        )
    return found


def int_score_counts(scores: list[float], scale: tuple[float, float]) -> dict[str, int]:
    """How many documents have each whole score."""
    ints = Counter(metrics.int_scores(np.array(scores, dtype=np.float64), scale).tolist())
    return {str(value): ints[value] for value in sorted(ints)}


def scores_in_figures(
    documents: list[Document],
    verdicts: list[Verdict],
    scale: tuple[float, float],
    scales: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """What the consensus looks like."""
    scored = [i for i, verdict in enumerate(verdicts) if verdict.score is not None]
    scores = np.array([verdicts[i].score for i in scored], dtype=np.float64)
    known = [documents[i].gold for i in scored]
    return {
        "int_score_counts": int_score_counts(scores.tolist(), scale),
        "mean_score": mean(scores.tolist()),
        "mean_spread": mean([each.spread for each in verdicts]),
        "attributes": {name: mean([each.attributes.get(name) for each in verdicts]) for name in scales},
        "gold": metrics.against_gold(scores, known, metrics.is_binary(known)),
    }


def answers_in_figures(said: list[Opinions]) -> dict[str, Any]:
    """What each rater said, in figures, and over all of them."""
    readings = [reading for each in said for reading in each.readings]
    cut = {position for each in said for position, answer in enumerate(each.answers) if answer.was_truncated}
    return {
        "n_raters": len(said),
        "n_truncated": len(cut),
        "mass": mean([reading.mass for reading in readings]),
        "opinions": [
            {
                **panel.origin(each.rater),
                "n_scored": int(np.isfinite(each.scores).sum()),
                "mean_score": mean([reading.score for reading in each.readings]),
                "unscored": dict(Counter(str(reading.reason) for reading in each.readings if reading.reason)),
            }
            for each in said
        ],
    }


def planned(work: Stage, n_raters: int, n_documents: int) -> dict[str, float | None] | None:
    """What the plan expected, if there was one for as many raters and documents."""
    plan = read_json(work.recipe.run_folder / "plan" / "result.json")
    names = ("prompt_tokens", "answer_tokens", "usd", "hours")
    meant = plan is not None and (plan["n_raters"], plan["n_documents"]) == (n_raters, n_documents)
    return {name: plan[name] for name in names} if plan and meant else None


def mean(values: list[Any]) -> float | None:
    """The mean of what is there."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def check_readable(result: RateResult, recipe: Recipe, work: Stage, said: list[Opinions]) -> None:
    """Stop when too much of what was asked has no score; ratings and answers stay to be looked at."""
    for each, figures in zip(said, result.opinions, strict=True):
        teacher.check_candidates_seen(each.rater.prompt, each.rater.teacher, each.answers)
        n_lost = result.n_sampled - figures["n_scored"]
        if len(said) > 1 and n_lost > recipe.rate.max_unscored_rate * result.n_sampled:
            log.warning("rate: %s with prompt %s has no score for %d", figures["teacher"], figures["prompt"], n_lost)
    n_asked = result.n_sampled - result.unscored.get("not_asked", 0)
    n_unscored = n_asked - result.n_scored
    if n_asked == 0:
        raise UserError(f"rate: {result.stopped_by} leaves room for no document; raise it")
    if n_unscored > recipe.rate.max_unscored_rate * n_asked or result.n_scored == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in result.unscored.items())
        raise UserError(
            f"rate: {n_unscored} of {n_asked} documents have no score ({reasons}); read the answers with"
            f" gristmill show {work.folder}, then mend the prompt or choose another teacher; where the request failed,"
            " the same command asks again"
        )
    if result.n_failed:
        log.info("rate: %d requests failed; run again with --redo to ask only them again", result.n_failed)
