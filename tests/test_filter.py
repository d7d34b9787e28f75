import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config, filter
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


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=200),
    st.integers(1, 200),
)
def test_the_cut_of_a_share_is_the_nth_largest_score(values: list[float], n: int):
    n = min(n, len(values))
    halves = [np.array(values[::2], np.float32), np.array(values[1::2], np.float32)]
    cut = filter.share_cut(n / len(values), lambda: iter(halves))
    assert cut == float(np.sort(np.array(values, np.float32))[-round(n / len(values) * len(values))])


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
    assert filter.plain({"a": [float("nan"), b"\xff"], "b": 1.5}) == {"a": [None, "/w=="], "b": 1.5}


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


@pytest.mark.parametrize("cuts", [{}, {"min_score": 1, "keep_share": 0.5}])
def test_exactly_one_cut_must_be_given(tmp_path: Path, cuts: dict[str, float]):
    with pytest.raises(UserError, match="give one of min_score, min_int_score and keep_share"):
        run(tmp_path, scored_folder(tmp_path, [[1.0]]), **cuts)


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
    from pipeline import rate, score, train

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
    assert filter.run(recipe).n_rows == 60


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
