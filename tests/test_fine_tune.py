"""The encoder fine-tuned together with its heads."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config, student, train
from pipeline.encoder import Encoder
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def many(texts: list[str]) -> list[str]:
    """A hundred and twenty distinct real pieces of text."""
    pieces = [text[start : start + 200] for text in texts for start in (0, 400)]
    return list(dict.fromkeys(pieces))[:120]


def recipe(folder: Path, encoder: Path, texts: list[str], args: dict, **values: object) -> config.Recipe:
    scores = [min(5.0, text.count(chr(34)) / 2) for text in texts]
    columns = {"id": [f"d{i}" for i in range(len(texts))], "text": texts, "score": scores}
    columns["depth"] = [None if i % 3 else 1.0 + i % 2 for i in range(len(texts))]
    columns["domain"] = ["Law" if i % 2 else "Health" for i in range(len(texts))]
    metadata = {"scale": "0 5", "attributes": '{"depth": [1, 3]}'}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), folder / "ratings.parquet")
    return config.Recipe.model_validate(
        {
            "run_folder": folder / "run",
            "encoder": {"model": str(encoder), "max_tokens": 64, "device": "cpu"},
            "train": {"ratings": folder / "ratings.parquet", "head": "full", "args": args, **values},
        }
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, many: list[str]) -> Path:
    """A run folder with two scores and a label, learned by a tuned encoder."""
    folder = tmp_path_factory.mktemp("tuned")
    args = {"num_train_epochs": 8, "learning_rate": 1e-3}
    train.run(recipe(folder, tiny_encoder, many, args, targets=["score", "depth", "domain"]))
    return folder / "run"


def test_the_tuned_student_is_saved_whole_and_gives_what_was_reported(
    tuned: Path, tiny_encoder: Path, many: list[str]
):
    made = student.load(tuned / "train/student", config.Encoder(dtype="float32", device="cpu"))
    rows = pq.read_table(tuned / "train/predictions.parquet").to_pydict()
    found = made.predict(many)
    for name in ("score", "depth"):
        np.testing.assert_allclose(found[name], rows[f"predicted_{name}"], atol=1e-3)
    assert found["domain"].tolist() == rows["predicted_domain"]
    frozen = Encoder(config.Encoder(model=str(tiny_encoder), max_tokens=64, dtype="float32", device="cpu"))
    assert np.abs(made.encoder.embed(many[:5]).vectors - frozen.embed(many[:5]).vectors).max() > 1e-3


def test_what_was_fine_tuned_has_no_held_out_prediction_of_what_it_learned_from(tuned: Path):
    rows = pq.read_table(tuned / "train/predictions.parquet").to_pylist()
    for row in rows:
        assert (row["held_out_score"] is None) == (row["split"] == "train")


def test_fine_tuning_has_no_learning_curve_and_says_its_head(tuned: Path):
    import json

    result = json.loads((tuned / "train/result.json").read_text())
    assert result["head"] == result["targets"]["score"]["head"] == "full"
    assert result["targets"]["score"]["learning_curve"] is None


def test_fine_tuning_that_makes_it_worse_on_the_validation_part_is_taken_back(
    tmp_path: Path, tiny_encoder: Path, many: list[str]
):
    """One epoch at an absurd rate breaks the encoder; what is kept is the linear student that it began as."""
    args = {"num_train_epochs": 1, "learning_rate": 5.0}
    train.run(recipe(tmp_path, tiny_encoder, many, args))
    full = pq.read_table(tmp_path / "run/train/predictions.parquet")["predicted_score"].to_numpy()
    begin = recipe(tmp_path, tiny_encoder, many, {}, learning_curve=False)
    linear = begin.train.model_copy(update={"head": "linear"})
    frozen = begin.encoder.model_copy(update={"dtype": "float32"})
    train.run(begin.model_copy(update={"train": linear, "encoder": frozen}), redo=True)
    expected = pq.read_table(tmp_path / "run/train/predictions.parquet")["predicted_score"].to_numpy()
    np.testing.assert_allclose(full, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_train_epoch": 1}, r"train.args: 'num_train_epoch' is not an .*; did you mean num_train_epochs\?"),
        ({"xyzzy": 1}, r"train.args: 'xyzzy' is not an argument of TrainingArguments"),
        ({"eval_strategy": "sometimes"}, r"train.args: .*sometimes.* is not a valid"),
    ],
)
def test_arguments_that_do_not_exist_are_refused(
    tmp_path: Path, tiny_encoder: Path, many: list[str], args: dict, message: str
):
    with pytest.raises(UserError, match=message):
        train.run(recipe(tmp_path, tiny_encoder, many, args))


def test_labels_alone_have_nothing_to_fine_tune(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    with pytest.raises(UserError, match=r"train.head: full learns scores, and train.targets names none"):
        train.run(recipe(tmp_path, tiny_encoder, many, {}, targets=["domain"]))
