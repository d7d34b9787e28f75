import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import choice, config, filter, judged, rule, sinks
from pipeline.errors import UserError


def scored_folder(tmp_path: Path, scores: list[list[float | None]]) -> Path:
    """One shard per list."""
    folder = tmp_path / "scored"
    folder.mkdir()
    for shard, of_shard in enumerate(scores):
        table = pa.table(
            {
                "text": [f"text {shard}-{i}" if s is not None else None for i, s in enumerate(of_shard)],
                "meta": [{"row": i} for i in range(len(of_shard))],
                "score": pa.array(of_shard, pa.float32()),
                "int_score": pa.array([None if s is None else round(s) for s in of_shard], pa.int8()),
            }
        )
        pq.write_table(table, folder / f"part-{shard}.parquet")
    return folder


def run(tmp_path: Path, folder: Path, redo: bool = False, **settings: object) -> filter.FilterResult:
    values = {"run_folder": tmp_path / "run", "filter": {"scored": folder, **settings}}
    return filter.run(config.Recipe.model_validate(values), redo)


def kept_scores(tmp_path: Path, side: str = "kept") -> list[float | None]:
    return pq.read_table(tmp_path / "run" / "filter" / side)["score"].to_pylist()


def test_rows_in_are_kept_plus_dropped_each_with_its_reason(tmp_path: Path):
    folder = scored_folder(tmp_path, [[1.0, 4.0, None], [3.0, 2.5]])
    result = run(tmp_path, folder, min_score=2.5)
    assert (result.n_rows, result.n_kept, result.dropped) == (5, 3, {"no_text": 1, "score_below_cut": 1})
    assert kept_scores(tmp_path) == [4.0, 3.0, 2.5]


def test_trap_17_a_row_is_kept_by_its_score_wherever_it_stands(tmp_path: Path):
    scores = [float(i % 7) for i in range(5000)]
    folder = scored_folder(tmp_path, [scores])
    run(tmp_path, folder, min_score=6)
    assert kept_scores(tmp_path) == [6.0] * scores.count(6.0)


def test_int_scores_can_decide(tmp_path: Path):
    folder = scored_folder(tmp_path, [[0.2, 2.6, 3.4]])
    assert run(tmp_path, folder, min_int_score=3).n_kept == 2
    assert run(tmp_path, folder, redo=True, min_int_score=3).dropped == {"int_score_below_cut": 1}


@pytest.mark.parametrize(("share", "kept"), [(0.1, 1), (0.25, 2), (0.5, 5), (1.0, 10)])
def test_a_share_is_exact(tmp_path: Path, share: float, kept: int):
    scores = [[0.1, -2.0, 3.0, 0.0, 5.5], [4.0, 1.0, 2.0, -0.25, 9.0]]
    result = run(tmp_path, scored_folder(tmp_path, scores), keep_share=share)
    assert result.n_kept == kept
    assert sorted(kept_scores(tmp_path)) == pytest.approx(sorted([*scores[0], *scores[1]])[-kept:])


def test_equal_scores_share_their_fate(tmp_path: Path):
    assert run(tmp_path, scored_folder(tmp_path, [[1.0, 2.0, 2.0, 2.0]]), keep_share=0.5).n_kept == 3


def test_a_share_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"keep_share: 0.01 of 3 scored documents is none"):
        run(tmp_path, scored_folder(tmp_path, [[1.0, 2.0, 3.0]]), keep_share=0.01)


def test_every_other_column_comes_through(tmp_path: Path):
    folder = scored_folder(tmp_path, [[1.0, 4.0]])
    run(tmp_path, folder, min_score=2)
    kept = pq.read_table(tmp_path / "run" / "filter" / "kept" / "part-0.parquet")
    assert kept.schema.equals(pq.read_schema(folder / "part-0.parquet"))
    assert kept["meta"].to_pylist() == [{"row": 1}]


def test_dropped_rows_are_kept_aside_with_their_reason(tmp_path: Path):
    folder = scored_folder(tmp_path, [[1.0, 4.0, None]])
    run(tmp_path, folder, min_score=2, keep_dropped=True)
    dropped = pq.read_table(tmp_path / "run" / "filter" / "dropped")
    assert dropped["dropped_reason"].to_pylist() == ["score_below_cut", "no_text"]


def test_the_kept_corpus_as_json_lines(tmp_path: Path):
    folder = scored_folder(tmp_path, [[1.0, 4.0]])
    run(tmp_path, folder, min_score=2, output_format="jsonl")
    lines = (tmp_path / "run" / "filter" / "kept" / "part-0.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "text 0-1", "meta": {"row": 1}, "score": 4.0, "int_score": 4}
    ]
    assert sinks.plain({"a": [float("nan"), b"\xff"], "b": 1.5}) == {"a": [None, "/w=="], "b": 1.5}


def test_json_lines_survive_bytes_that_are_not_utf8(tmp_path: Path):
    folder = tmp_path / "scored"
    folder.mkdir()
    bad = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    columns = {
        "text": ["a"],
        "note": bad,
        "score": pa.array([3.0], pa.float32()),
        "int_score": pa.array([3], pa.int8()),
    }
    pq.write_table(pa.table(columns), folder / "part.parquet")
    run(tmp_path, folder, min_score=1, output_format="jsonl")
    line = (tmp_path / "run/filter/kept/part.jsonl").read_text(encoding="utf-8")
    assert json.loads(line)["note"] == "caf\ufffd"


@pytest.mark.parametrize(
    ("cuts", "given"),
    [
        ({}, "none"),
        ({"keep_tokens": 5, "keep_share": 0.5}, "keep_share and keep_tokens"),
        ({"min_score": 1, "min_int_score": 1}, "min_score and min_int_score"),
        ({"precision": 0.9, "keep_share": 0.5}, "keep_share and precision"),
    ],
)
def test_nothing_is_written_until_one_cut_is_given(tmp_path: Path, cuts: dict[str, float], given: str):
    with pytest.raises(UserError, match=f"given: {given}. Run gristmill plan to see what each cut would keep"):
        run(tmp_path, scored_folder(tmp_path, [[1.0]]), **cuts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("drawn", [{"sampling": "gumbel"}, {"sampling": "density"}, {"per_group": "meta.row"}])
def test_a_draw_or_quota_needs_an_amount(tmp_path: Path, drawn: dict[str, str]):
    with pytest.raises(UserError, match=r"needs an amount, .*; min_score alone keeps whatever reaches it"):
        run(tmp_path, scored_folder(tmp_path, [[1.0]]), min_score=1, **drawn)


def test_a_corpus_without_scores_is_refused(tmp_path: Path, corpus_folder: Path):
    with pytest.raises(UserError, match=r"has no column 'score'; there are: id, text, meta, good"):
        run(tmp_path, corpus_folder, min_score=1)


def test_a_changed_cut_says_so_and_leaves_nothing_of_the_old_one(tmp_path: Path):
    folder = scored_folder(tmp_path, [[1.0], [4.0]])
    run(tmp_path, folder, min_score=2)
    with pytest.raises(UserError, match=r"filter.min_score changed from 2.0 to 0.5 .* --redo"):
        run(tmp_path, folder, min_score=0.5)
    run(tmp_path, folder, redo=True, min_score=0.5, output_format="jsonl")
    assert sorted(path.name for path in (tmp_path / "run/filter/kept").iterdir()) == ["part-0.jsonl", "part-1.jsonl"]


def test_a_shard_that_is_gone_is_missed_and_scored_again(recipe_file: Path, tmp_path: Path, corpus_folder: Path):
    from pipeline import cuts, rate, score, train

    recipe = config.load_recipe(recipe_file, {})
    for stage in (rate, train, score):
        stage.run(recipe)
    gone = tmp_path / "run" / "score" / "scored" / "part-1.parquet"
    before = gone.read_bytes()
    gone.unlink()
    with pytest.raises(
        UserError, match=r"part-1.parquet is missing from the scored corpus; run gristmill score again"
    ):
        filter.run(recipe)
    assert score.run(recipe).n_shards_reused == 2 and gone.read_bytes() == before
    kept, planned = filter.run(recipe), cuts.run(recipe)
    assert kept.n_rows == planned.n_rows == 60
    assert kept.quality is not None and kept.quality["judged_by"] == planned.judged_by == "ratings"


def test_the_kept_corpus_is_never_filtered_onto_itself(tmp_path: Path):
    folder = scored_folder(tmp_path, [[1.0, 4.0]])
    run(tmp_path, folder, min_score=2)
    kept = tmp_path / "run" / "filter" / "kept"
    with pytest.raises(UserError, match="is where this run's kept corpus goes"):
        run(tmp_path, kept, redo=True, min_score=2)
    assert pq.read_table(kept).num_rows == 1


def test_scores_of_another_width_are_compared_as_ours(tmp_path: Path):
    folder = tmp_path / "scored"
    folder.mkdir()
    table = pa.table({"text": ["a"], "score": pa.array([0.1], pa.float64()), "int_score": pa.array([0], pa.int64())})
    pq.write_table(table, folder / "part.parquet")
    assert run(tmp_path, folder, min_score=0.1).n_kept == 1


def test_nan_is_never_kept(tmp_path: Path):
    folder = tmp_path / "scored"
    folder.mkdir()
    table = pa.table(
        {
            "text": ["a", "b"],
            "score": pa.array([float("nan"), 3.0], pa.float32()),
            "int_score": pa.array([0, 3], pa.int8()),
        }
    )
    pq.write_table(table, folder / "part.parquet")
    assert run(tmp_path, folder, min_score=1).n_kept == 1


# -- amounts, against brute force -------------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(st.integers(-3, 3).map(float) | st.floats(-1e3, 1e3, width=32), st.integers(-1, 3), st.integers(1, 9)),
    max_size=60,
)
"""Key, group and tokens; whole keys, so that ties are common; group -1 is out of the question."""


def read(rows: list[tuple[float, int, int]], size: int) -> rule.Read:
    """Key files of so many rows each."""
    array = np.array(rows, choice.ROW)
    parts = [array[start : start + size] for start in range(0, len(array), size)]
    return lambda: (part[part["group"] >= 0] for part in parts)


@given(ROWS, st.lists(st.integers(0, 12), min_size=4, max_size=4), st.integers(1, 60))
def test_documents_are_the_best_of_each_group_and_their_ties(rows, wanted: list[int], size: int):
    cuts = choice.cuts_of_documents(read(rows, size), np.array(wanted))
    kept = choice.is_kept(np.array(rows, choice.ROW), cuts)
    for group, n in enumerate(wanted):
        keys = sorted((key for key, g, _ in rows if g == group), reverse=True)
        least = keys[min(n, len(keys)) - 1] if n and keys else math.inf
        assert [bool(k) for k, (_, g, _) in zip(kept, rows, strict=True) if g == group] == [
            ordered(key) >= ordered(least) for key, g, _ in rows if g == group
        ]
    assert not kept[[g < 0 for _, g, _ in rows]].any()


@given(ROWS, st.lists(st.integers(0, 60), min_size=4, max_size=4), st.integers(1, 60))
def test_tokens_are_never_more_than_wanted_and_no_better_tie_is_left_out(rows, wanted: list[int], size: int):
    cuts = choice.cuts_of_tokens(read(rows, size), np.array(wanted))
    kept = choice.is_kept(np.array(rows, choice.ROW), cuts)
    for group, most in enumerate(wanted):
        sums = Counter[tuple[float, float]]()
        for key, g, tokens in rows:
            if g == group:
                sums[ordered(key)] += tokens
        total, fitting = 0, set()
        for key in sorted(sums, reverse=True):
            total += sums[key]
            if total > most or not most:
                break
            fitting.add(key)
        assert [bool(k) for k, (_, g, _) in zip(kept, rows, strict=True) if g == group] == [
            ordered(key) in fitting for key, g, _ in rows if g == group
        ]


def ordered(key: float) -> tuple[float, float]:
    """A key in the order of its bits: minus zero is below zero."""
    return key, math.copysign(1.0, key)


def test_a_share_counts_scored_documents(tmp_path: Path):
    folder = scored_folder(tmp_path, [[1.0, None, 4.0, 2.0, None, 3.0]])
    assert run(tmp_path, folder, keep_share=0.5).n_kept == 2
    assert kept_scores(tmp_path) == [4.0, 3.0]


def test_so_many_documents_are_kept(tmp_path: Path):
    result = run(tmp_path, scored_folder(tmp_path, [[1.0, 4.0], [3.0, 2.5, None]]), keep_documents=3)
    assert (result.n_kept, result.cut, kept_scores(tmp_path)) == (3, 2.5, [4.0, 3.0, 2.5])
    assert result.dropped == {"no_text": 1, "score_below_cut": 1}


def with_columns(tmp_path: Path, n: int = 40, **columns: list[object]) -> Path:
    """One shard of documents with scores 0, 1, 2 ... and further columns."""
    folder = tmp_path / "scored"
    folder.mkdir()
    table = pa.table(
        {
            "text": [f"text {i}" for i in range(n)],
            "score": pa.array(range(n), pa.float32()),
            "int_score": pa.array([min(i, 5) for i in range(n)], pa.int8()),
            **columns,
        }
    )
    pq.write_table(table, folder / "part.parquet")
    return folder


def test_tokens_are_counted_by_a_column_or_by_bytes(tmp_path: Path):
    folder = with_columns(tmp_path, 4, length=[10, 20, 30, 40])
    result = run(tmp_path, folder, keep_tokens=75, tokens_column="length")
    assert (result.n_kept, result.n_tokens, result.n_tokens_kept, result.tokens_counted_by) == (
        2,
        100,
        70,
        "length",
    )
    result = run(tmp_path, folder, redo=True, keep_tokens=5)
    assert (result.n_kept, result.n_tokens, result.n_tokens_kept) == (2, 8, 4)
    assert result.tokens_counted_by == "4 bytes of text"


def test_fewer_tokens_than_the_best_document_has_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"filter.keep_tokens: the best document, .* more than 39 tokens; raise it"):
        run(tmp_path, with_columns(tmp_path, 4, length=[10, 20, 30, 40]), keep_tokens=39, tokens_column="length")


def test_what_was_kept_before_stays_when_another_cut_is_refused(tmp_path: Path):
    folder = with_columns(tmp_path, 4, length=[10, 20, 30, 40])
    before = run(tmp_path, folder, keep_documents=2)
    with pytest.raises(UserError, match=r"filter.keep_tokens"):
        run(tmp_path, folder, redo=True, keep_tokens=39, tokens_column="length")
    assert kept_scores(tmp_path) == [2.0, 3.0]
    assert run(tmp_path, folder, keep_documents=2) == before, "its result and settings are still beside it"


def test_tokens_that_are_missing_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="tokens_column length holds nan for a scored document"):
        run(tmp_path, with_columns(tmp_path, 2, length=[10, None]), keep_tokens=39, tokens_column="length")


def test_an_amount_counts_within_each_group(tmp_path: Path):
    folder = with_columns(tmp_path, 40, lang=["en"] * 30 + ["pt"] * 8 + [None] * 2)
    result = run(tmp_path, folder, keep_share=0.1, per_group="lang", keep_dropped=True)
    assert [(each["value"], each["n_rows"], each["n_kept"], each["cut"]) for each in result.groups] == [
        ("en", 30, 3, 27.0),
        ("pt", 8, 1, 37.0),
        ("(none)", 2, 0, None),
    ]
    assert (result.n_kept, result.cut, result.dropped) == (4, None, {"group_full": 36})


def test_a_share_that_keeps_nothing_of_any_group_is_told_of_the_largest(tmp_path: Path):
    folder = with_columns(tmp_path, 9, lang=["en"] * 4 + ["pt"] * 3 + ["da"] * 2)
    with pytest.raises(UserError, match=r"0.1 of 4 scored documents in the largest lang is none; raise it"):
        run(tmp_path, folder, keep_share=0.1, per_group="lang")


def test_the_cut_is_told_as_a_score_where_an_int_score_makes_it(tmp_path: Path):
    result = run(tmp_path, scored_folder(tmp_path, [[0.2, 2.625, 3.5]]), min_int_score=3)
    assert (result.n_kept, result.cut) == (2, 2.625)


def test_the_source_is_the_first_folder_where_no_column_says_it(tmp_path: Path):
    (tmp_path / "all").mkdir()
    for name in ("a", "b"):
        with_columns(tmp_path, 10).rename(tmp_path / "all" / name)
    result = run(tmp_path, tmp_path / "all", keep_documents=2, per_group="source")
    assert [(each["value"], each["n_kept"]) for each in result.groups] == [("a", 2), ("b", 2)]


def test_a_threshold_beside_an_amount_is_a_floor(tmp_path: Path):
    result = run(tmp_path, with_columns(tmp_path, 10), keep_documents=8, min_score=5)
    assert (result.n_kept, result.dropped) == (5, {"score_below_cut": 5})
    result = run(tmp_path, tmp_path / "scored", redo=True, keep_documents=2, min_int_score=5)
    assert (result.n_kept, result.dropped) == (2, {"int_score_below_cut": 5, "score_below_cut": 3})


def test_too_many_groups_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "MOST_GROUPS", 5)
    with pytest.raises(UserError, match=r"filter.per_group: text has more than 5 values"):
        run(tmp_path, with_columns(tmp_path, 10), keep_documents=1, per_group="text")


def test_key_files_are_gone_afterwards(tmp_path: Path):
    run(tmp_path, with_columns(tmp_path, 10), keep_documents=1)
    assert not (tmp_path / "run" / "filter" / "keys").exists()


# -- draws ------------------------------------------------------------------------------------------------------------


def ids(kept: Path) -> list[str]:
    return pq.read_table(kept)["text"].to_pylist()


def test_noise_is_gumbel_and_independent_of_batches():
    names = [f"name {i}" for i in range(20_000)]
    noise = choice.Noise(1)
    whole = choice.Noise(1).draw(names)
    parts = np.concatenate([noise.draw(names[start : start + 777]) for start in range(0, len(names), 777)])
    assert (whole == parts).all()
    assert not np.isclose(whole, choice.Noise(2).draw(names)).any()
    from scipy.stats import kstest

    assert kstest(whole, "gumbel_r").pvalue > 0.01


def test_copies_draw_apart():
    assert len(set(choice.Noise(0).draw(["same"] * 1000).tolist())) == 1000
    again = choice.Noise(0)
    twice = [*again.draw(["same"] * 10).tolist(), *again.draw(["other", "same"]).tolist()]
    assert len(set(twice)) == 12


def test_gumbel_draws_in_proportion_to_exp_of_score_over_temperature():
    scores, temperature = np.array([0.0, 1.0, 2.0, 3.0]), 1.5
    names = ["a", "b", "c", "d"]
    firsts = np.bincount(
        [int(np.argmax(scores + temperature * choice.Noise(seed).draw(names))) for seed in range(400)], minlength=4
    )
    softmax = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    assert firsts / 400 == pytest.approx(softmax, abs=0.07)


def test_a_temperature_near_zero_keeps_the_best(tmp_path: Path):
    folder = with_columns(tmp_path, 40)
    run(tmp_path, folder, keep_documents=10, sampling="gumbel", temperature=1e-6)
    assert kept_scores(tmp_path) == [float(i) for i in range(30, 40)]


def test_a_high_temperature_draws_low_scores_too_and_says_not_drawn(tmp_path: Path):
    folder = with_columns(tmp_path, 40)
    result = run(tmp_path, folder, keep_documents=10, sampling="gumbel", temperature=1e6)
    assert (result.n_kept, result.cut, result.dropped) == (10, None, {"not_drawn": 30})
    assert min(kept_scores(tmp_path)) < 20


def test_a_draw_is_the_same_however_the_corpus_is_cut_and_another_with_another_seed(tmp_path: Path):
    folder = with_columns(tmp_path, 40)
    table = pq.read_table(folder)
    other = tmp_path / "other" / "scored"
    other.mkdir(parents=True)
    for number, start in enumerate((0, 3, 25)):
        part = table.slice(start, (3, 22, 15)[number])
        pq.write_table(part, other / f"part-{number}.parquet", row_group_size=4)
    settings = {"keep_tokens": 30, "sampling": "gumbel", "temperature": 8.0}
    run(tmp_path, folder, **settings)
    run(tmp_path / "other", other, **settings)
    one, two = ids(tmp_path / "run/filter/kept"), ids(tmp_path / "other/run/filter/kept")
    assert sorted(one) == sorted(two)
    recipe = {"run_folder": tmp_path / "third", "seed": 1, "filter": {"scored": folder, **settings}}
    filter.run(config.Recipe.model_validate(recipe))
    assert sorted(ids(tmp_path / "third/filter/kept")) != sorted(one)


def embedded_folder(tmp_path: Path, n: int = 300) -> Path:
    """300 documents with embeddings, two thirds of them alike."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(n, 24))
    vectors[: 2 * n // 3] = vectors[0] + 0.01 * rng.normal(size=(2 * n // 3, 24))
    folder = with_columns(tmp_path, n)
    (tmp_path / "embeddings").mkdir()
    column = pa.array(vectors.astype(np.float16).tolist(), pa.list_(pa.float16(), 24))
    pq.write_table(pa.table({"embedding": column}), tmp_path / "embeddings" / "part.parquet")
    return folder


def test_density_sampling_keeps_few_of_what_is_alike(tmp_path: Path):
    result = run(tmp_path, embedded_folder(tmp_path), keep_documents=90, sampling="density")
    alike = sum(score < 200 for score in kept_scores(tmp_path))
    assert result.n_kept == 90 and result.quality is None
    assert alike < 15


def test_density_sampling_without_embeddings_says_how_to_get_them(tmp_path: Path):
    with pytest.raises(UserError, match=r"no .*embeddings/part.parquet; run gristmill score --keep-embeddings"):
        run(tmp_path, with_columns(tmp_path), keep_documents=9, sampling="density")


def test_embeddings_of_another_corpus_are_refused(tmp_path: Path):
    folder = embedded_folder(tmp_path)
    path = tmp_path / "embeddings" / "part.parquet"
    pq.write_table(pq.read_table(path).slice(0, 299), path)
    with pytest.raises(UserError, match=r"part.parquet does not fit the scores beside it"):
        run(tmp_path, folder, keep_documents=9, sampling="density")


# -- quality ----------------------------------------------------------------------------------------------------------


def judged_run(tmp_path: Path, n: int = 2000) -> config.Recipe:
    """A run whose corpus is scored and rated: documents are good by chance, the likelier the higher their score."""
    rng = np.random.default_rng(0)
    scores = rng.normal(2.5, 1, n).clip(0, 5)
    teacher = np.where(rng.random(n) < 1 / (1 + np.exp(-2 * (scores - 3))), 4.0, 1.0)
    run_folder = tmp_path / "run"
    (run_folder / "score" / "scored").mkdir(parents=True)
    (run_folder / "train").mkdir()
    names = [f"doc-{i}" for i in range(n)]
    table = pa.table(
        {
            "id": names,
            "text": [f"text of {name}" for name in names],
            "lang": ["en" if i % 3 else "pt" for i in range(n)],
            "score": pa.array(scores, pa.float32()),
            "int_score": pa.array(np.floor(scores + 0.5), pa.int8()),
        }
    )
    pq.write_table(table, run_folder / "score" / "scored" / "part.parquet")
    rated = rng.permutation(n)[:800]
    predictions = {
        "id": [names[i] for i in rated],
        "split": ["test" if i % 4 == 0 else "train" for i in range(800)],
        "score": teacher[rated],
        "predicted_score": scores[rated],
        "held_out_score": scores[rated],
        "round": pa.array([0] * 800, pa.int32()),
    }
    pq.write_table(pa.table(predictions), run_folder / "train" / "predictions.parquet")
    figures = {"targets": {"score": {"good_from": 2.5, "cut": 2.9}}}
    (run_folder / "train" / "result.json").write_text(json.dumps(figures))
    (run_folder / "score" / "result.json").write_text("{}")
    recipe = config.Recipe.model_validate({"run_folder": run_folder, "corpus": {"id_column": "id"}})
    (run_folder / "score" / "recipe.yaml").write_text(config.to_yaml(recipe))
    np.save(tmp_path / "teacher.npy", teacher)
    return recipe


def with_filter(recipe: config.Recipe, **settings: object) -> config.Recipe:
    return recipe.model_copy(update={"filter": config.Filter.model_validate(settings)})


def true_precision(tmp_path: Path) -> float:
    """Of the kept set, by the teacher's judgement of every document."""
    kept = pq.read_table(tmp_path / "run/filter/kept")["id"].to_pylist()
    return float(np.mean([np.load(tmp_path / "teacher.npy")[int(name.removeprefix("doc-"))] > 2.5 for name in kept]))


@pytest.mark.parametrize(
    "settings",
    [
        {"min_score": 3.0},
        {"min_int_score": 3},
        {"keep_share": 0.2},
        {"keep_tokens": 2000},
        {"keep_share": 0.3, "sampling": "gumbel", "temperature": 0.5},
        {"keep_share": 0.3, "sampling": "gumbel", "temperature": 0.5, "min_score": 2.0},
    ],
)
def test_the_quality_of_what_is_kept_is_estimated_from_the_ratings(tmp_path: Path, settings: dict[str, object]):
    result = filter.run(with_filter(judged_run(tmp_path), **settings))
    assert result.quality is not None and result.test_quality is not None
    low, high = result.quality["precision_interval"]
    assert low < true_precision(tmp_path) < high and high - low < 0.2
    assert (result.quality["judged_by"], result.quality["n_judged"]) == ("ratings", 600)
    assert (result.test_quality["judged_by"], result.test_quality["n_judged"]) == ("test part", 200)


def test_the_lowest_cut_with_the_wanted_precision_is_taken(tmp_path: Path):
    recipe = judged_run(tmp_path)
    result = filter.run(with_filter(recipe, precision=0.75))
    assert result.quality is not None and result.quality["precision"] == pytest.approx(0.75, abs=0.02)
    assert 0.68 < true_precision(tmp_path) < 0.82
    more = filter.run(with_filter(recipe, precision=0.6), redo=True)
    assert more.n_kept > result.n_kept and more.cut is not None and result.cut is not None and more.cut < result.cut


def test_a_precision_out_of_reach_names_the_best(tmp_path: Path):
    recipe = judged_run(tmp_path)
    with pytest.raises(
        UserError, match=r"no cut is 0.999 precise by the ratings \(600 documents\); the best is 0.\d+"
    ):
        filter.run(with_filter(recipe, precision=0.999))


def test_precision_without_ratings_is_refused_and_other_cuts_say_nothing_of_it(tmp_path: Path):
    folder = scored_folder(tmp_path, [[1.0, 4.0]])
    with pytest.raises(UserError, match=r"filter.precision: there are no ratings or audit"):
        run(tmp_path, folder, precision=0.9)
    assert run(tmp_path, folder, min_score=1, redo=True).quality is None


def test_an_audit_counts_before_the_ratings(tmp_path: Path):
    recipe = judged_run(tmp_path)
    audit = recipe.run_folder / "audit"
    audit.mkdir()
    scores = np.linspace(0, 5, 100)
    table = pa.table({"id": [str(i) for i in range(100)], "score": np.full(100, 5.0), "student_score": scores})
    pq.write_table(table, audit / "ratings.parquet")
    (audit / "result.json").write_text(json.dumps({"good_from": 2.5}))
    (audit / "inputs.json").write_text(json.dumps({"scores": judged.of_scores(recipe)}))
    result = filter.run(with_filter(recipe, min_score=3.0))
    assert result.quality is not None and result.test_quality is not None
    assert (result.quality["judged_by"], result.quality["precision"]) == ("audit", 1.0)
    assert result.test_quality["precision"] < 1


# -- interrupted ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing is put in order behind it."""


def test_a_shard_that_was_written_anew_before_a_kill_is_not_taken_for_the_one_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = scored_folder(tmp_path, [[1.0, 2.0, 3.0], [1.0, 4.0]])
    first = run(tmp_path, folder, min_score=2)
    write = filter.storage.write_text

    def killed(path: Path, text: str) -> None:
        if path.parent.name == filter.TALLIES:
            raise Killed
        write(path, text)

    monkeypatch.setattr(filter.storage, "write_text", killed)
    with pytest.raises(Killed):
        run(tmp_path, folder, redo=True, min_score=3)
    monkeypatch.undo()
    again = run(tmp_path, folder, redo=True, min_score=2)
    assert kept_scores(tmp_path) == [2.0, 3.0, 4.0]
    assert again.model_copy(update={"seconds": 0}) == first.model_copy(update={"seconds": 0})


def test_what_a_killed_process_left_in_an_output_of_its_own_is_no_foreign_file(tmp_path: Path):
    folder, output = scored_folder(tmp_path, [[1.0, 4.0]]), tmp_path / "own"
    output.mkdir()
    for name in (".part-0.parquet.0123456789ab.tmp", ".part-0.parquet.lock"):
        (output / name).write_text("")
    assert run(tmp_path, folder, min_score=2, output=str(output)).n_kept == 1
    assert [path.name for path in output.iterdir()] == ["part-0.parquet"]


def test_a_part_with_other_settings_waits_until_what_was_chosen_is_not_in_use(tmp_path: Path):
    from pipeline import chosen, locks

    folder = with_columns(tmp_path, 4)
    part = {"run_folder": tmp_path / "run", "shard": "1/2"}
    filter.run(config.Recipe.model_validate({**part, "filter": {"scored": folder, "keep_documents": 2}}))
    other = config.Recipe.model_validate({**part, "filter": {"scored": folder, "keep_documents": 3}})
    with (
        locks.held(tmp_path / "run" / "filter" / chosen.IN_USE, "", shared=True),
        pytest.raises(UserError, match=r"parts with other settings are at work in .*; wait for them or stop them"),
    ):
        filter.run(other, redo=True)
    assert filter.run(other, redo=True).n_kept == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_share": 0.3, "per_group": "meta.row", "keep_dropped": True},
        {"keep_documents": 4, "sampling": "gumbel", "temperature": 2.0, "output_format": "jsonl"},
        {"min_score": 2.0},
    ],
)
def test_parts_in_any_order_and_then_the_whole_make_the_same_files_and_result(
    tmp_path: Path, settings: dict[str, object]
):
    folder = scored_folder(tmp_path, [[float((7 * i + shard) % 5) for i in range(shard + 3)] for shard in range(5)])

    def of(name: str, shard: str | None = None, redo: bool = False, **other: object) -> filter.FilterResult:
        values = {"run_folder": tmp_path / name, "shard": shard, "filter": {"scored": folder, **settings, **other}}
        return filter.run(config.Recipe.model_validate(values), redo).model_copy(update={"seconds": 0})

    def files(name: str) -> dict[str, bytes]:
        found = (path for path in (tmp_path / name / "filter").glob("[kdt]*/*") if path.is_file())
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in found}

    assert sum(of("parts", f"{i}/6").n_rows for i in (6, 2, 3, 1, 4)) == 18, "all but the last shard of five"
    whole = of("whole")
    assert of("parts") == whole
    assert files("parts") == files("whole")
    assert len(files("whole")) == 5 * (2 + ("keep_dropped" in settings))
    of("parts", redo=True, output_format="jsonl", keep_dropped=True)
    of("whole", redo=True, output_format="jsonl", keep_dropped=True)
    assert files("parts") == files("whole")
    assert len(files("whole")) == 15
