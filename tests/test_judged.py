"""What is known of scored documents counts only as long as it is about the scores that there are."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config, judged


def write(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture
def recipe(tmp_path: Path) -> config.Recipe:
    """A run that was trained, scored and audited, as far as its files tell."""
    files = {"head.safetensors": "abc"}
    write(tmp_path / "train/result.json", {"targets": {"score": {"good_from": 3}}})
    write(tmp_path / "train/student/student.json", {"files": files})
    write(tmp_path / "score/inputs.json", {"settings": {"weights": config.digest(files)}})
    made = config.Recipe(run_folder=tmp_path)
    write(tmp_path / "audit/inputs.json", {"scores": judged.of_scores(made)})
    write(tmp_path / "audit/result.json", {"good_from": 3})
    columns = {"id": ["a", "b"], "score": [1.0, 4.0], "round": [0, 0], "split": ["train", "test"]}
    pq.write_table(pa.table({**columns, "held_out_score": [1.5, 3.5]}), tmp_path / "train/predictions.parquet")
    pq.write_table(pa.table({"id": ["c"], "score": [5.0], "student_score": [4.5]}), tmp_path / "audit/ratings.parquet")
    return made


def test_the_audit_counts_before_the_ratings(recipe: config.Recipe):
    chosen, reported = judged.to_choose(recipe), judged.to_report(recipe)
    assert chosen is not None and (chosen.by, chosen.ids) == ("audit", ["c"])
    assert reported is not None and (reported.by, reported.ids) == ("test part", ["b"])


def test_an_audit_of_earlier_scores_does_not_count(recipe: config.Recipe, caplog: pytest.LogCaptureFixture):
    files = {"head.safetensors": "another"}
    write(recipe.run_folder / "train/student/student.json", {"files": files})
    write(recipe.run_folder / "score/inputs.json", {"settings": {"weights": config.digest(files)}})
    found = judged.to_choose(recipe)
    assert found is not None and (found.by, found.ids) == ("ratings", ["a"])
    assert "run gristmill audit --redo" in caplog.text


def test_ratings_tell_nothing_of_the_scores_of_an_earlier_student(
    recipe: config.Recipe, caplog: pytest.LogCaptureFixture
):
    write(recipe.run_folder / "train/student/student.json", {"files": {"head.safetensors": "another"}})
    assert judged.rated(recipe, test=False) is None and judged.to_report(recipe) is None
    judged.to_choose(recipe)
    assert "run gristmill score --redo" in caplog.text
