"""The audit: what the teacher says of some scored documents holds for the whole corpus."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stamina
from endpoint import Asked, Reply, changed, corpus, number, ratings, recipe, says, score_of, serve

from pipeline import audit, rate
from pipeline import filter as filter_
from pipeline.config import Recipe, to_yaml
from pipeline.errors import UserError
from pipeline.tracking import dump, read_json

N = 3000


def student(i: int) -> float:
    """What the student says of doc-<i>, to which the teacher gives i modulo 6: the same, but for noise that is seeded,
    and far fewer documents with high scores."""
    return float(np.float32(0.6 * teacher(i) + 1.2 * np.random.default_rng(i).random()))


def teacher(i: int) -> int:
    return i % 6 if i % 5 == 0 else i % 3


def rated(asked: Asked) -> Reply:
    return says(f"Score: {teacher(number(asked))}")


def scored(
    folder: Path, url: str, n: int = N, rows: list[dict[str, Any]] | None = None, shards: int = 3, **sections: Any
) -> Recipe:
    """A recipe whose run folder holds a scored corpus of doc-0 to doc-<n-1>."""
    if rows is None:
        rows = [
            {"id": f"id-{i}", "text": f"doc-{i} is a document.", "score": student(i), "int_score": round(student(i))}
            for i in range(n)
        ]
    corpus(folder, 2)
    r = recipe(folder, url, concurrency=64)
    r = Recipe.model_validate(r.model_dump() | {**sections, "rate": {**r.rate.model_dump(), "sample": 20}})
    out = r.run_folder / "score" / "scored"
    out.mkdir(parents=True)
    schema = pa.schema({"id": pa.string(), "text": pa.string(), "score": pa.float32(), "int_score": pa.int8()})
    for shard in range(shards):
        pq.write_table(pa.Table.from_pylist(rows[shard::shards], schema), out / f"{shard}.parquet")
    (out.parent / "result.json").write_text("{}")
    (out.parent / "recipe.yaml").write_text(to_yaml(r))
    return r


def truth(n: int, cut: float) -> dict[str, float]:
    """The figures of the whole corpus."""
    scores, good = np.array([student(i) for i in range(n)]), np.array([teacher(i) >= 2.5 for i in range(n)])
    kept = scores >= cut
    return {
        "base_rate": float(good.mean()),
        "precision": float(good[kept].mean()),
        "recall": float(kept[good].mean()),
        "kept_share": float(kept.mean()),
    }


def test_figures_of_the_corpus_are_found_from_a_few_documents(tmp_path: Path) -> None:
    with serve(rated) as server:
        result = audit.run(scored(tmp_path, server.url, filter={"min_score": 2.2}))
    known = truth(N, 2.2)
    assert (result.n_rows, result.n_audited, result.n_scored, result.cut) == (N, 300, 300, 2.2)
    assert result.kept_share == pytest.approx(known["kept_share"])
    for name in ("base_rate", "precision", "recall"):
        low, high = getattr(result, f"{name}_interval")
        assert low <= known[name] <= high
        assert high - low < 0.35
    assert sum(each["n_corpus"] for each in result.strata) == N
    assert [each["n_audited"] for each in result.strata] == [30] * 10
    for at in result.by_cut:
        exact = truth(N, at["cut"])
        assert at["share"] == pytest.approx(exact["kept_share"])
        assert at["precision_interval"][0] <= exact["precision"] <= at["precision_interval"][1]
        assert at["recall_interval"][0] <= exact["recall"] <= at["recall_interval"][1]


def test_the_weights_of_the_documents_are_the_corpus(tmp_path: Path) -> None:
    with serve(rated) as server:
        r = scored(tmp_path, server.url, audit={"sample": 60, "strata": 4})
        result = audit.run(r)
    table = pq.read_table(r.run_folder / "audit" / "ratings.parquet").to_pylist()
    assert sum(row["weight"] for row in table) == pytest.approx(N)
    for row in table:
        i = int(row["id"].removeprefix("id-"))
        assert (row["score"], row["student_score"]) == (teacher(i), pytest.approx(student(i)))
        stratum = result.strata[int(row["stratum"])]
        assert stratum["low"] <= row["student_score"] <= stratum["high"]
        assert row["weight"] == pytest.approx(stratum["n_corpus"] / stratum["n_scored"])
    good = sum(row["weight"] for row in table if row["score"] >= 2.5)
    assert result.base_rate == pytest.approx(good / N)


def test_a_mean_that_is_not_weighted_back_would_be_wrong(tmp_path: Path) -> None:
    """Nine tenths of the corpus share one score: the tenth is half of what is audited."""
    rows = [
        {
            "id": str(i),
            "text": f"doc-{5 if i % 10 == 0 else 0} number {i}",
            "score": float(i % 10 == 0),
            "int_score": 0,
        }
        for i in range(500)
    ]
    with serve(score_of) as server:
        result = audit.run(scored(tmp_path, server.url, rows=rows, audit={"sample": 40}))
    assert [(each["n_corpus"], each["n_audited"], each["n_good"]) for each in result.strata] == [
        (450, 20, 0),
        (50, 20, 20),
    ]
    assert result.base_rate == pytest.approx(0.1)
    assert result.by_cut == []


def test_an_audit_repeated_asks_nothing_and_finds_the_same(tmp_path: Path) -> None:
    with serve(rated) as server:
        r = scored(tmp_path, server.url, audit={"sample": 40})
        first = audit.run(r)
        assert audit.run(r) == first, "a finished stage is skipped"
        (r.run_folder / "audit" / "result.json").unlink()
        again = audit.run(r)
        assert server.attempts().total() == first.n_asked == 40
    assert (again.n_asked, again.n_reused) == (0, 40)
    assert (again.strata, again.precision_interval) == (first.strata, first.precision_interval)


def test_documents_that_were_rated_before_cost_nothing(tmp_path: Path) -> None:
    with serve(rated) as server:
        r = scored(tmp_path, server.url, n=30)
        corpus(tmp_path, 30)
        rate.run(r)
        assert len(ratings(r)) == 20
        result = audit.run(changed(r, "audit", sample=30, strata=2))
        assert set(server.attempts().values()) == {1}
    assert (result.n_asked, result.n_reused) == (10, 20)


def test_a_budget_stops_the_audit_and_more_of_it_goes_on(tmp_path: Path) -> None:
    with serve(rated) as server:
        r = scored(tmp_path, server.url, audit={"sample": 40, "strata": 2, "budget_tokens": 107 * 10})
        stopped = audit.run(changed(r, "teacher", concurrency=1))
        assert stopped.stopped_by == "budget_tokens"
        assert stopped.n_scored + stopped.unscored["not_asked"] == stopped.n_audited == 40
        result = audit.run(changed(r, "audit", budget_tokens=None))
        assert set(server.attempts().values()) == {1}
    assert (result.n_scored, result.n_not_asked, result.stopped_by) == (40, 0, None)


def test_a_document_without_a_score_of_the_teacher_weighs_nothing(tmp_path: Path) -> None:
    def half_silent(asked: Asked) -> Reply:
        return says("I wonder.") if number(asked) % 2 else rated(asked)

    with serve(half_silent) as server:
        r = scored(tmp_path, server.url, audit={"sample": 80, "strata": 4})
        result = audit.run(r)
    assert 0 < result.n_scored < 80
    assert result.unscored == {"no_score": 80 - result.n_scored}
    rows = pq.read_table(r.run_folder / "audit" / "ratings.parquet").to_pylist()
    assert all((row["weight"] == 0) == (row["score"] is None) for row in rows)
    assert sum(row["weight"] for row in rows) == pytest.approx(N)


def test_rows_without_text_are_counted_and_never_drawn(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"doc-{i}", "score": i / 10, "int_score": i // 10} for i in range(20)]
    rows += [{"id": f"empty-{i}", "text": "", "score": None, "int_score": None} for i in range(5)]
    with serve(rated) as server:
        result = audit.run(scored(tmp_path, server.url, rows=rows, audit={"sample": 25, "strata": 2}))
    assert (result.n_rows, result.n_no_score, result.n_audited) == (25, 5, 20)


def test_a_cut_that_keeps_nothing_has_no_precision(tmp_path: Path) -> None:
    with serve(rated) as server:
        r = scored(tmp_path, server.url, n=100, audit={"sample": 40, "strata": 2}, filter={"min_score": 99})
        result = audit.run(r)
        assert (result.kept_share, result.precision, result.precision_interval) == (0, None, None)
        assert result.recall == 0
        by_int = audit.run(changed(r, "filter", min_score=None, min_int_score=9), redo=True)
        assert (by_int.kept_share, by_int.precision, by_int.n_asked) == (0, None, 0)
        assert audit.run(changed(r, "filter", min_score=None, min_int_score=9)) == by_int


def test_the_cut_is_that_of_the_filter_else_that_of_the_student(tmp_path: Path) -> None:
    with serve(rated) as server:
        r = scored(tmp_path, server.url, n=100, audit={"sample": 40, "strata": 2})
        found = [audit.run(r, redo=True)]
        (r.run_folder / "train").mkdir()
        (r.run_folder / "train" / "result.json").write_text(dump({"targets": {"score": {"cut": 1.75}}}))
        found.append(audit.run(r, redo=True))
        found.append(audit.run(changed(r, "filter", min_int_score=2), redo=True))
        (r.run_folder / "filter").mkdir()
        (r.run_folder / "filter" / "result.json").write_text(dump({"cut": 1.25}))
        with pytest.raises(UserError, match=r"audit: cut changed from .*--redo"):
            audit.run(r)
        found.append(audit.run(r, redo=True))
    least = min(student(i) for i in range(100) if round(student(i)) >= 2)
    assert [(each.cut, each.cut_from) for each in found] == [
        (2.5, "train"),
        (1.75, "train"),
        (least, "filter"),
        (1.25, "filter"),
    ]


@pytest.mark.parametrize(
    ("filtered_with", "recipe_says"),
    [
        ({"min_int_score": 2}, {"keep_share": 0.3}),
        ({"keep_share": 0.1}, {"min_int_score": 2}),
        ({"min_int_score": 2, "keep_share": 0.1}, {"min_int_score": 2, "keep_share": 0.1}),
    ],
)
def test_what_was_kept_is_audited_whatever_the_recipe_says(
    tmp_path: Path, filtered_with: dict[str, Any], recipe_says: dict[str, Any]
) -> None:
    """An int_score of 2 is no score of 2, and filter may have been run with a flag."""
    with serve(rated) as server:
        r = scored(tmp_path, server.url, n=100, audit={"sample": 40, "strata": 2}, filter=recipe_says)
        kept = filter_.run(r.model_copy(update={"filter": r.filter.model_validate(filtered_with)}))
        result = audit.run(r)
    table = pq.read_table(r.run_folder / "filter" / "kept")
    assert (result.cut, result.cut_from) == (min(table["score"].to_pylist()), "filter")
    assert result.kept_share == kept.kept_share


def test_a_kept_set_that_the_score_does_not_tell_is_not_taken_for_a_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(rated) as server, caplog.at_level(logging.WARNING, "gristmill"):
        r = scored(tmp_path, server.url, n=100, filter={"keep_share": 0.3, "per_group": "int_score"})
        filter_.run(r)
        result = audit.run(r)
    assert (result.cut, result.cut_from) == (2.5, "train")
    assert "the score alone does not tell what was kept" in caplog.text


def test_a_score_at_the_cut_is_kept_in_every_figure(tmp_path: Path) -> None:
    """2.1 is above its float32."""
    rows = [
        {"id": str(i), "text": f"doc-{i} is a document.", "score": 2.1 if i % 2 else 1, "int_score": 1 + i % 2}
        for i in range(60)
    ]
    with serve(rated) as server:
        r = scored(tmp_path, server.url, rows=rows, audit={"sample": 60, "strata": 2}, filter={"min_score": 2.1})
        result = audit.run(r)
    assert result.kept_share == 0.5
    assert result.precision == pytest.approx(np.mean([teacher(i) >= 2.5 for i in range(60) if i % 2]))


def test_the_audit_of_nothing_is_one_line(tmp_path: Path) -> None:
    with serve(rated) as server:
        r = scored(tmp_path, server.url, rows=[{"id": "a", "text": "", "score": None, "int_score": None}], shards=1)
        with pytest.raises(UserError, match=r"audit: .*scored has no scored document in 1 rows"):
            audit.run(r)
        with pytest.raises(UserError, match=r"audit: .*score is not finished; run gristmill score first"):
            audit.run(changed(r, "audit").model_copy(update={"run_folder": tmp_path / "other"}))


def test_a_teacher_that_cannot_be_read_stops_the_audit_and_leaves_its_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gristmill")
    with serve(lambda _: says("I wonder.")) as server:
        r = scored(tmp_path, server.url, n=50, audit={"sample": 20, "strata": 2})
        with pytest.raises(
            UserError, match=r"audit: 20 of 20 documents have no score \(no_score 20\); read the answers"
        ):
            audit.run(changed(r, "rate", max_unscored_rate=0.5))
    assert pq.read_table(r.run_folder / "audit" / "ratings.parquet")["opinions"].num_chunks == 1
    assert read_json(r.run_folder / "audit" / "result.json") is None


@pytest.fixture(autouse=True)
def _no_pauses() -> Any:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield
