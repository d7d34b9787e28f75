"""How much of a score can be told without reading: known answers on made-up scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import shortcuts

WORDS = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in "rstvwxz"]


def documents(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents of all lengths, in two sources and three languages, with a score that has nothing to do with them."""
    rng = np.random.default_rng(seed)
    return [
        {
            "id": f"d{i}",
            "text": " ".join(rng.choice(WORDS, int(rng.integers(5, 300)))),
            "score": float(rng.normal(2.5, 1.0)),
            "shard": f"{'ab'[i % 2]}/part.parquet",
            "lang": ["da", "en", None][i % 3],
        }
        for i in range(n)
    ]


def found(sample: list[dict[str, Any]], cut: float | None = 3.0) -> dict[str, dict[str, Any]]:
    """What each shortcut tells, by name."""
    return {each["name"]: each for each in shortcuts.find(sample, cut, {"language": "lang"}, 0)["shortcuts"]}


def told(sample: list[dict[str, Any]]) -> list[str]:
    return shortcuts.warnings(shortcuts.find(sample, 3.0, {"language": "lang"}, 0), (0, 5))


def test_a_score_that_is_the_length_is_told_by_length_alone():
    sample = [{**row, "score": len(row["text"]) / 200} for row in documents(600)]
    length = found(sample)["length"]
    assert length["r2"] > 0.95 and length["auc"] > 0.99
    low, high = length["r2_interval"]
    assert low <= length["r2"] <= high
    assert any(line.startswith("Length alone explains 9") for line in told(sample))
    assert found(sample)["source"]["r2"] < 0.05


def test_a_score_that_nothing_tells_warns_of_nothing():
    sample = documents(1000)
    assert all(-0.1 < each["r2"] < 0.03 for each in found(sample).values())
    assert all(0.4 < each["auc"] < 0.6 for each in found(sample).values())
    assert told(sample) == []


def test_variance_between_and_within_sources_adds_up_to_all_of_it():
    sample = [{**row, "score": row["score"] + 4 * (i % 2)} for i, row in enumerate(documents(400))]
    source = found(sample)["source"]
    scores = np.array([row["score"] for row in sample])
    assert source["variance_between"] + source["variance_within"] == pytest.approx(scores.var())
    assert source["variance_between"] == pytest.approx(4.0, rel=0.2)
    groups = {each["name"]: each for each in source["groups"]}
    assert groups["a"]["mean"] == pytest.approx(scores[::2].mean())
    assert groups["b"]["kept_share"] == pytest.approx((scores[1::2] >= 3).mean())
    assert (groups["a"]["n"], groups["b"]["n"]) == (200, 200)
    assert any(line.startswith("The source alone explains") for line in told(sample))


def test_a_group_of_one_document_tells_nothing_of_it():
    scores = np.arange(100, dtype=np.float64)
    guess = shortcuts.left_out_means(np.arange(100), scores, 0)
    assert shortcuts.r2(scores, guess) <= 0


def test_a_beginning_that_documents_share_is_found_and_numbers_in_it_do_not_hide_it():
    rows = documents(300)
    for i, row in enumerate(rows[:60]):
        row["text"] = f"Copyright {1990 + i}   The Authors. " + row["text"]
        row["score"] = -3.0
    beginning = found(rows)["beginning"]
    assert beginning["r2"] > 0.5
    assert {each["name"]: each["n"] for each in beginning["groups"]} == {"(none)": 240, "copyright 0 the authors.": 60}


def test_length_has_equal_groups_and_equal_lengths_stay_together():
    grouping = shortcuts.by_length([10] * 90 + list(range(11, 111)))
    assert len({int(group) for group in grouping.groups[:90]}) == 1
    assert set(shortcuts.by_length([7] * 100).groups.tolist()) == {0}


def test_a_missing_language_is_a_group_of_its_own():
    groups = {each["name"]: each["n"] for each in found(documents(300))["language"]["groups"]}
    assert groups == {"da": 100, "en": 100, "(none)": 100}


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("https://www.example.org/a?b", "example.org"),
        ("cc-main", "cc-main"),
        (None, ""),
        ("http://[broken", "http://[broken"),
    ],
)
def test_the_source_of_an_address_is_its_host(value: str | None, source: str):
    assert shortcuts.source_of(value) == source


def test_columns_are_found_by_their_name_also_within_a_struct():
    schema = pa.schema(
        {
            "text": pa.string(),
            "meta": pa.struct({"url": pa.string(), "lang": pa.string(), "n": pa.int64()}),
            "kind": pa.string(),
            "language": pa.int64(),
        }
    )
    assert shortcuts.columns_there(schema, ()) == {"source": "meta.url", "language": "meta.lang"}
    assert shortcuts.columns_there(schema, ("kind", "meta.url", "nowhere"))["kind"] == "kind"
    assert "nowhere" not in shortcuts.columns_there(schema, ("nowhere",))


@pytest.mark.parametrize("sample", [documents(20), [{**row, "score": 1.0} for row in documents(200)], []])
def test_too_few_documents_or_equal_scores_tell_nothing(sample: list[dict[str, Any]]):
    assert shortcuts.find(sample, 3.0, {}, 0)["shortcuts"] == []


def test_without_a_cut_only_the_score_is_told():
    assert all(each["auc"] is None and each["r2"] is not None for each in found(documents(200), None).values())


# -- begin, middle and end --------------------------------------------------------------------------------------------


def test_parts_of_documents_are_compared_with_their_begin():
    begin = np.linspace(0, 5, 50)
    parts = np.stack([begin, begin - 1.0, 5 - begin], axis=1)
    along = shortcuts.compared(parts, 2.5)
    assert along is not None
    assert along["means"] == pytest.approx({"begin": 2.5, "middle": 1.5, "end": 2.5})
    assert along["spearman"] == pytest.approx({"middle": 1.0, "end": -1.0})
    assert along["difference"] == pytest.approx({"middle": -1.0, "end": 0.0})
    assert along["n_otherwise"] == int(np.sum((begin >= 2.5) != (parts.mean(axis=1) >= 2.5)))
    lines = shortcuts.warnings({"shortcuts": [], "along": along}, (0, 5))
    assert lines[0] == "The middle of long documents scores 1.00 lower than their begin."
    assert "would be judged otherwise" in lines[-1]


def test_a_document_whose_last_window_is_a_rest_is_left_out():
    owners = np.array([0, 0, 0, 1, 1, 1, 2])
    tokens = np.array([64, 64, 64, 64, 64, 5, 30])
    assert shortcuts.in_thirds(np.arange(7.0), owners, tokens).tolist() == [[0.0, 1.0, 2.0]]
    assert shortcuts.in_thirds(np.arange(1.0), np.array([0]), np.array([9])).shape == (0, 3)


def test_a_run_without_a_student_has_no_begin_middle_and_end(tmp_path: Path):
    from pipeline.config import Recipe

    assert shortcuts.along(Recipe(run_folder=tmp_path), documents(60), 3.0) is None
