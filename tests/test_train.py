from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config, ratings, student, train
from pipeline.errors import UserError


def ratings_file(tmp_path: Path, scores: list[float | None], texts: list[str], **columns: list) -> Path:
    n = len(scores)
    columns = {
        "id": [f"d{i}" for i in range(n)],
        "text": texts[:n],
        "score": scores,
        "gold": [None] * n,
        "prompt": ["p"] * n,
        "teacher": ["t"] * n,
        **columns,
    }
    table = pa.table({name: pa.array(values, ratings.SCHEMA.field(name).type) for name, values in columns.items()})
    path = tmp_path / "ratings.parquet"
    pq.write_table(table.replace_schema_metadata({"scale": "0 5"}), path)
    return path


def settings(tmp_path: Path, encoder: Path, **values: object) -> config.Recipe:
    return config.Recipe.model_validate(
        {
            "run_folder": tmp_path / "run",
            "encoder": {"model": str(encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu"},
            "train": {"ratings": tmp_path / "ratings.parquet", **values},
        }
    )


def learnable(encoder: Path, texts: list[str], seed: int = 0) -> list[float]:
    """Scores that are linear in the embeddings, on 0 to 5, with a little noise."""
    from pipeline.encoder import Encoder

    embeddings, _ = Encoder(config.Encoder(model=str(encoder), max_tokens=64, dtype="float32", device="cpu")).embed(
        texts
    )
    rng = np.random.default_rng(seed)
    raw = embeddings @ rng.normal(size=embeddings.shape[1])
    raw = (raw - raw.mean()) / raw.std() + rng.normal(scale=0.05, size=len(raw))
    return np.clip(2.5 + raw, 0, 5).tolist()


@pytest.fixture(scope="module")
def many(texts: list[str]) -> list[str]:
    """Three hundred distinct real pieces of text."""
    pieces = [text[start : start + 300] for text in texts for start in range(0, 1200, 200)]
    return list(dict.fromkeys(piece for piece in pieces if len(piece) > 250))[:300]


def test_the_student_learns_what_can_be_learned(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    gold = [float(score > 2.5) for score in learnable(tiny_encoder, many)]
    ratings_file(tmp_path, learnable(tiny_encoder, many), many, gold=gold)
    result = train.run(settings(tmp_path, tiny_encoder))
    assert (result.n_train, result.n_validation, result.n_test) == (195, 45, 60)
    assert result.spearman is not None and result.spearman > 0.95
    assert result.kept["f1"] > 0.85 and result.mae < 0.3
    assert result.gold is not None and result.gold["n"] == 60 and result.gold["auc"] > 0.95


def test_the_saved_student_gives_the_reported_predictions(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, learnable(tiny_encoder, many), many)
    train.run(settings(tmp_path, tiny_encoder))
    predictions = pq.read_table(tmp_path / "run/train/predictions.parquet")
    scores = student.load(tmp_path / "run/train/student").score(many)
    np.testing.assert_allclose(scores, predictions["predicted"].to_numpy(), atol=1e-4)


def test_trap_12_no_document_is_in_two_parts_and_copies_never_cross(tmp_path: Path, many: list[str]):
    recipe = settings(tmp_path, tmp_path)
    parts = train.split([*many, *many[:50]], recipe)
    assert set(parts) == {"train", "validation", "test"}
    assert parts[:50].tolist() == parts[300:].tolist()


def test_trap_12_the_test_part_chooses_nothing(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    scores = np.array(learnable(tiny_encoder, many))
    embeddings = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    parts = train.split(many, settings(tmp_path, tiny_encoder))
    shuffled = scores.copy()
    shuffled[parts == "test"] = 5 - scores[parts == "test"]
    fits = [train.fit_head(embeddings, values, parts, 2.5, 0) for values in (scores, shuffled)]
    np.testing.assert_array_equal(fits[0].weight, fits[1].weight)
    assert (fits[0].cut, fits[0].strength) == (fits[1].cut, fits[1].strength)


def test_the_split_is_seeded_and_does_not_depend_on_the_order(tmp_path: Path, many: list[str]):
    recipe = settings(tmp_path, tmp_path)
    parts = dict(zip(many, train.split(many, recipe), strict=True))
    backwards = dict(zip(many[::-1], train.split(many[::-1], recipe), strict=True))
    assert parts == backwards
    other = dict(zip(many, train.split(many, recipe.model_copy(update={"seed": 1})), strict=True))
    assert parts != other


def test_trap_14_a_score_that_occurs_once_is_no_crash(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [5.0] + [1.0, 2.0] * 20, many)
    assert train.run(settings(tmp_path, tiny_encoder)).n_test == 8


def test_unscored_documents_are_left_out_and_counted_and_never_zero(
    tmp_path: Path, tiny_encoder: Path, many: list[str]
):
    scores = [None if i % 3 == 0 else 1.0 + i % 4 for i in range(90)]
    result = train.run(settings(tmp_path, tiny_encoder, ratings=ratings_file(tmp_path, scores, many)))
    assert result.n_unscored == 30 and result.n_train + result.n_validation + result.n_test == 60


def test_trap_11_a_rating_of_zero_is_learned_from(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [0.0, 3.0] * 20, many)
    assert train.run(settings(tmp_path, tiny_encoder)).n_unscored == 0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0, 3.0] * 3, "only 9 documents have a score; rate at least 10"),
        ([3.0] * 40, "all 40 scores are 3; mend the prompt"),
        ([None] * 40, "only 0 documents have a score"),
    ],
)
def test_ratings_nothing_can_be_learned_from_are_refused(
    tmp_path: Path, tiny_encoder: Path, many: list[str], scores: list, message: str
):
    ratings_file(tmp_path, scores, many)
    with pytest.raises(UserError, match=message):
        train.run(settings(tmp_path, tiny_encoder))


def test_ratings_of_two_prompts_are_not_mixed(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many, prompt=["p", "q"] * 20)
    with pytest.raises(UserError, match="mixes ratings of 2 prompts"):
        train.run(settings(tmp_path, tiny_encoder))


def test_a_file_that_holds_no_ratings_is_refused(tmp_path: Path, tiny_encoder: Path, corpus_folder: Path):
    recipe = settings(tmp_path, tiny_encoder, ratings=corpus_folder / "part-0.parquet")
    with pytest.raises(UserError, match="is no ratings file"):
        train.run(recipe)


def test_a_cut_outside_the_scale_is_refused(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many)
    with pytest.raises(UserError, match=r"train.good_from: 7 must be above 0 and at most 5"):
        train.run(settings(tmp_path, tiny_encoder, good_from=7))


def test_parts_that_leave_nothing_to_learn_from_are_refused(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many)
    with pytest.raises(UserError, match=r"only \d of 40 documents are left to learn from; lower"):
        train.run(settings(tmp_path, tiny_encoder, test_share=0.49, validation_share=0.49))


def test_train_before_rate_says_what_to_run(tmp_path: Path, tiny_encoder: Path):
    recipe = settings(tmp_path, tiny_encoder).model_copy(update={"train": config.Train()})
    with pytest.raises(UserError, match=r"run gristmill rate first"):
        train.run(recipe)
