import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config, student, train
from pipeline.errors import UserError
from pipeline.figures import ScoreFigures
from pipeline.targets import Target


def ratings_file(tmp_path: Path, scores: list[float | None], texts: list[str], **columns: list) -> Path:
    n = len(scores)
    opinions = [[{"prompt": "edu", "prompt_digest": digest, "teacher": "t"} for digest in ("p", "q")]] * n
    table = {
        "id": [f"d{i}" for i in range(n)],
        "text": texts[:n],
        "score": pa.array(scores, pa.float64()),
        "gold": pa.array([None] * n, pa.float64()),
        "opinions": opinions,
        **columns,
    }
    path = tmp_path / "ratings.parquet"
    scales = {"scale": "0 5", "attributes": json.dumps({"clarity": [0, 5], "depth": [1, 3]})}
    pq.write_table(pa.table(table).replace_schema_metadata(scales), path)
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
    found = result.targets["score"]
    assert isinstance(found, ScoreFigures) and found.spearman is not None and found.spearman > 0.95
    assert found.kept["f1"] > 0.85 and found.mae < 0.3
    assert found.gold is not None and found.gold["n"] == 60 and found.gold["auc"] > 0.95


def test_the_saved_student_gives_the_reported_predictions(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, learnable(tiny_encoder, many), many)
    train.run(settings(tmp_path, tiny_encoder))
    predictions = pq.read_table(tmp_path / "run/train/predictions.parquet")
    scores = student.load(tmp_path / "run/train/student").score(many)
    np.testing.assert_allclose(scores, predictions["predicted_score"].to_numpy(), atol=1e-4)


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
    recipe = settings(tmp_path, tiny_encoder)
    targets = [Target("score", "score", values.tolist(), (0, 5)) for values in (scores, shuffled)]
    one, other = (train.learn(target, embeddings, parts, recipe) for target in targets)
    np.testing.assert_array_equal(one.fit.head.weight, other.fit.head.weight)
    assert (one.cut, one.fit.strength) == (other.cut, other.fit.strength)


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
        ([3.0] * 40, "all 26 documents to learn from have the score 3.0; mend the prompt"),
        ([None] * 40, "only 0 documents have a score"),
    ],
)
def test_ratings_nothing_can_be_learned_from_are_refused(
    tmp_path: Path, tiny_encoder: Path, many: list[str], scores: list, message: str
):
    ratings_file(tmp_path, scores, many)
    with pytest.raises(UserError, match=message):
        train.run(settings(tmp_path, tiny_encoder))


def test_a_student_names_all_the_prompts_and_teachers_it_learned_from(
    tmp_path: Path, tiny_encoder: Path, many: list[str]
):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many)
    train.run(settings(tmp_path, tiny_encoder))
    about = student.load(tmp_path / "run/train/student").about
    assert (about["prompts"], about["teachers"]) == (["p", "q"], ["t"])


def test_nan_is_a_missing_score_and_never_learned_from(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    scores = [float("nan") if i % 4 == 0 else 1.0 + i % 3 for i in range(80)]
    result = train.run(settings(tmp_path, tiny_encoder, ratings=ratings_file(tmp_path, scores, many)))
    assert result.n_unscored == 20


def test_attributes_are_learned_beside_the_score_each_on_its_own_scale(
    tmp_path: Path, tiny_encoder: Path, many: list[str]
):
    scores = learnable(tiny_encoder, many)
    depth = [None if i < 30 else 1 + 2 * value / 5 for i, value in enumerate(learnable(tiny_encoder, many, seed=1))]
    ratings_file(tmp_path, scores, many, depth=depth)
    result = train.run(settings(tmp_path, tiny_encoder, targets=["score", "depth"], good_from=2))
    found = result.targets
    assert {name: (each.good_from, each.n_missing) for name, each in found.items()} == {
        "score": (2, 0),
        "depth": (2, 30),
    }
    assert all(each.spearman > 0.95 for each in found.values())
    ints = student.load(tmp_path / "run/train/student").predict(many)["int_depth"]
    assert set(ints.tolist()) == {1, 2, 3}
    names = pq.read_schema(tmp_path / "run/train/predictions.parquet").names
    assert names == ["id", "split", "score", "predicted_score", "depth", "predicted_depth"]


def test_a_score_learned_beside_others_is_the_one_learned_alone(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, learnable(tiny_encoder, many), many, depth=[1.0, 2.0, 3.0] * 100)
    alone = train.run(settings(tmp_path, tiny_encoder))
    beside = train.run(settings(tmp_path, tiny_encoder, targets=["depth", "score"]), redo=True)
    assert alone.targets["score"] == beside.targets["score"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["scrore"], r"train.targets: 'scrore' is not in .*ratings.parquet; did you mean score\?"),
        (["clarity"], r"train.targets: 'clarity' is not in .*ratings.parquet; there are: score$"),
        (["gold"], r"'gold' is not in .*; there are: score"),
    ],
)
def test_a_target_in_no_file_is_named_with_those_there_are(
    tmp_path: Path, tiny_encoder: Path, many: list[str], targets: list[str], message: str
):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many)
    with pytest.raises(UserError, match=message):
        train.run(settings(tmp_path, tiny_encoder, targets=targets))


def test_targets_whose_columns_would_overwrite_each_other_are_refused(
    tmp_path: Path, tiny_encoder: Path, many: list[str]
):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many, int_score=["a", "b"] * 20)
    with pytest.raises(UserError, match=r"train.targets: two columns would be called 'int_score'"):
        train.run(settings(tmp_path, tiny_encoder, targets=["score", "int_score"]))


def test_a_document_that_stands_in_the_file_twice_is_refused(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many, id=["same"] * 40, text=[many[0]] * 2 + many[2:40])
    with pytest.raises(UserError, match="holds the same document twice"):
        train.run(settings(tmp_path, tiny_encoder))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, tiny_encoder: Path):
    (tmp_path / "ratings.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"train.ratings: .*ratings.parquet is no ratings or labels file"):
        train.run(settings(tmp_path, tiny_encoder))


def test_a_file_that_holds_no_ratings_is_refused(tmp_path: Path, tiny_encoder: Path, corpus_folder: Path):
    recipe = settings(tmp_path, tiny_encoder, ratings=corpus_folder / "part-0.parquet")
    with pytest.raises(UserError, match=r"train.targets: 'score' is not in .*part-0.parquet; there are: none"):
        train.run(recipe)


def test_a_cut_outside_the_scale_is_refused(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many)
    with pytest.raises(UserError, match=r"train.good_from: 7 must be above 0 and at most 5"):
        train.run(settings(tmp_path, tiny_encoder, good_from=7))


def test_parts_that_leave_nothing_to_learn_from_are_refused(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many)
    with pytest.raises(UserError, match=r"only \d of 40 documents with a score are left to learn from; lower"):
        train.run(settings(tmp_path, tiny_encoder, test_share=0.49, validation_share=0.49))


def test_train_before_rate_says_what_to_run(tmp_path: Path, tiny_encoder: Path):
    recipe = settings(tmp_path, tiny_encoder).model_copy(update={"train": config.Train()})
    with pytest.raises(UserError, match=r"run gristmill rate first"):
        train.run(recipe)
