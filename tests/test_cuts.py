import json
import logging
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_filter import judged_run

from pipeline import config, cuts
from pipeline.errors import UserError


def planned(recipe: config.Recipe, **settings: object) -> cuts.CutsResult:
    return cuts.run(recipe.model_copy(update={"cuts": config.Cuts.model_validate(settings)}))


@pytest.fixture
def recipe(tmp_path: Path) -> config.Recipe:
    """A run of 2,000 scored documents, 800 of them rated."""
    return judged_run(tmp_path)


def scored(recipe: config.Recipe) -> pa.Table:
    return pq.read_table(recipe.run_folder / "score" / "scored")


def good(tmp_path: Path) -> np.ndarray:
    """The teacher's judgement of every document of the corpus."""
    return np.load(tmp_path / "teacher.npy") > 2.5


def test_every_cut_counts_documents_and_tokens(recipe: config.Recipe):
    result, table = planned(recipe), scored(recipe)
    scores, ints = table["score"].to_numpy(), table["int_score"].to_numpy()
    tokens = np.array([-(-len(text) // 4) for text in table["text"].to_pylist()])
    assert (result.n_rows, result.n_scored, result.n_looked_at) == (2000, 2000, 2000)
    assert (result.n_tokens, result.tokens_counted_by) == (tokens.sum(), "4 bytes of text")
    assert [cut["cut"] for cut in result.cuts if cut["by"] == "int_score"] == [1, 2, 3, 4, 5]
    assert [cut["documents"] for cut in result.cuts if cut["by"] == "share"] == [1000, 600, 400, 200, 100, 40, 20]
    for cut in result.cuts:
        kept = ints >= cut["cut"] if cut["by"] == "int_score" else scores >= np.float32(cut["score"])
        assert (cut["documents"], cut["tokens"]) == (kept.sum(), tokens[kept].sum())
        assert cut["share"] == pytest.approx(kept.mean())
    assert [cut["score"] for cut in result.cuts] == sorted(cut["score"] for cut in result.cuts)


def test_precision_and_recall_are_those_of_the_corpus_within_their_intervals(recipe: config.Recipe, tmp_path: Path):
    result, scores, truth = planned(recipe), scored(recipe)["score"].to_numpy(), good(tmp_path)
    assert (result.judged_by, result.n_judged, result.good_from) == ("ratings", 600, 2.5)
    assert result.base_rate_interval is not None
    assert result.base_rate_interval[0] < truth.mean() < result.base_rate_interval[1]
    for cut in result.cuts:
        kept = scores >= np.float32(cut["score"])
        assert cut["precision_interval"][0] <= truth[kept].mean() <= cut["precision_interval"][1]
        assert cut["recall_interval"][0] <= truth[kept].sum() / truth.sum() <= cut["recall_interval"][1]


def test_ratings_of_mostly_good_documents_are_weighted_back(recipe: config.Recipe, tmp_path: Path):
    path = recipe.run_folder / "train" / "predictions.parquet"
    table = pq.read_table(path)
    liked = np.array(table["held_out_score"].to_numpy() > 3) | (np.arange(800) % 3 == 0)
    pq.write_table(table.filter(pa.array(liked)), path)
    result, truth = planned(recipe), good(tmp_path)
    rated = table.filter(pa.array(liked))["score"].to_numpy() > 2.5
    assert rated.mean() > truth.mean() + 0.1
    assert result.base_rate_interval is not None
    assert result.base_rate_interval[0] < truth.mean() < result.base_rate_interval[1]


def test_the_test_part_and_later_rounds_do_not_choose(recipe: config.Recipe):
    path = recipe.run_folder / "train" / "predictions.parquet"
    table = pq.read_table(path)
    rounds = pa.array([i % 2 for i in range(800)], pa.int32())
    pq.write_table(table.set_column(table.schema.get_field_index("round"), "round", rounds), path)
    n_train = sum(i % 4 != 0 and i % 2 == 0 for i in range(800))
    assert planned(recipe).n_judged == n_train


def test_a_column_is_broken_down_by_value(recipe: config.Recipe, tmp_path: Path):
    result, table, truth = planned(recipe, by=("lang",)), scored(recipe), good(tmp_path)
    assert [(each["value"], each["documents"]) for each in result.by["lang"]] == [("en", 1333), ("pt", 667)]
    assert sum(each["n_judged"] for each in result.by["lang"]) == 600
    for each in result.by["lang"]:
        there = np.array(table["lang"].to_pylist()) == each["value"]
        assert each["base_rate_interval"][0] < truth[there].mean() < each["base_rate_interval"][1]
        assert [cut["by"] for cut in each["cuts"]] == [cut["by"] for cut in result.cuts]
        for cut in each["cuts"]:
            kept = there & (table["score"].to_numpy() >= np.float32(cut["score"]))
            assert cut["documents"] == kept.sum()


def test_rare_values_are_put_together(recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuts, "MOST_VALUES", 3)
    values = planned(recipe, by=("id",)).by["id"]
    assert [each["value"] for each in values[3:]] == ["(others)"]
    assert sum(each["documents"] for each in values) == 2000
    assert values[0]["base_rate"] in (None, 0.0, 1.0)


def test_of_a_large_corpus_a_sample_is_looked_at_and_totals_stay_exact(recipe: config.Recipe):
    whole, part = planned(recipe), planned(recipe, documents=500, by=("lang",))
    assert (part.n_looked_at, part.n_scored, part.n_tokens) == (500, 2000, whole.n_tokens)
    for one, other in zip(whole.cuts, part.cuts, strict=False):
        if one["by"] == other["by"] == "int_score":
            assert other["share"] == pytest.approx(one["share"], abs=0.08)
    assert sum(each["documents"] for each in part.by["lang"]) == 2000
    assert sum(each["n_judged"] for each in part.by["lang"]) == 600


def test_the_sample_is_the_same_however_the_corpus_is_cut(recipe: config.Recipe):
    one = planned(recipe, documents=300)
    folder, table = recipe.run_folder / "score" / "scored", scored(recipe)
    (folder / "part.parquet").unlink()
    for number in range(4):
        pq.write_table(table.slice(number * 500, 500), folder / f"part-{number}.parquet", row_group_size=77)
    two = planned(recipe, documents=300)
    assert two.cuts == one.cuts and two.score_counts == one.score_counts


def test_without_ratings_the_table_has_no_precision(recipe: config.Recipe):
    (recipe.run_folder / "train" / "predictions.parquet").unlink()
    result = planned(recipe, by=("lang",))
    assert (result.judged_by, result.base_rate, result.n_judged) == (None, None, 0)
    assert all(cut["precision"] is None and cut["documents"] for cut in result.cuts)
    assert (recipe.run_folder / "cuts" / "cuts.png").read_bytes().startswith(b"\x89PNG")


def test_a_stratum_without_ratings_leaves_recall_unknown(recipe: config.Recipe):
    path = recipe.run_folder / "train" / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.array(table["held_out_score"].to_numpy() > 2)), path)
    result = planned(recipe)
    top = next(cut for cut in result.cuts if cut["by"] == "share" and cut["cut"] == 0.1)
    assert result.n_strata_empty > 0 and result.base_rate is None
    assert top["precision"] is not None and top["recall"] is None


def test_the_table_comes_without_matplotlib(
    recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, "gristmill"):
        assert planned(recipe).cuts
    assert "there is no picture: matplotlib is not installed" in caplog.text and "[plots]" in caplog.text
    assert not (recipe.run_folder / "cuts" / "cuts.png").exists()


def test_a_second_time_nothing_is_done_and_other_ratings_are_noticed(
    recipe: config.Recipe, caplog: pytest.LogCaptureFixture
):
    first = planned(recipe)
    with caplog.at_level(logging.INFO, "gristmill"):
        assert planned(recipe) == first
    assert "cuts: done already" in caplog.text
    path = recipe.run_folder / "train" / "predictions.parquet"
    pq.write_table(pq.read_table(path).slice(0, 700), path)
    assert planned(recipe).n_judged == 525


def test_an_unscored_corpus_is_refused(recipe: config.Recipe):
    (recipe.run_folder / "score" / "result.json").unlink()
    with pytest.raises(UserError, match="run gristmill score first"):
        planned(recipe)


def test_a_corpus_with_no_score_at_all_is_refused(recipe: config.Recipe):
    path = recipe.run_folder / "score" / "scored" / "part.parquet"
    table = scored(recipe)
    nothing = pa.nulls(2000, pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("score"), "score", nothing), path)
    with pytest.raises(UserError, match="has no scored document"):
        planned(recipe)


def test_a_column_that_is_not_there_is_named(recipe: config.Recipe):
    with pytest.raises(UserError, match="has no column 'source_name'; there are: id, text, lang"):
        planned(recipe, by=("source_name",))


def test_the_result_is_json_and_comes_back(recipe: config.Recipe):
    result = planned(recipe, by=("lang", "source"))
    written = json.loads((recipe.run_folder / "cuts" / "result.json").read_text())
    assert cuts.CutsResult.model_validate(written) == result
    assert [each["value"] for each in written["by"]["source"]] == ["."]


def test_a_plan_by_a_column_that_is_not_there_leaves_the_plan_before(recipe: config.Recipe):
    planned(recipe)
    result = recipe.run_folder / "cuts/result.json"
    before = result.read_text()
    with pytest.raises(UserError, match="nosuch"):
        planned(recipe, by=("nosuch",))
    assert result.read_text() == before
