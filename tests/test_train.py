import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config, lesson, metrics, splits, student, train
from pipeline.encoder import Embedded
from pipeline.errors import UserError
from pipeline.figures import ScoreFigures
from pipeline.lesson import Material
from pipeline.targets import Target


def ratings_file(tmp_path: Path, scores: list[float | None], texts: list[str], **columns: object) -> Path:
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
            "train": {"ratings": tmp_path / "ratings.parquet", "learning_curve": False, **values},
        }
    )


def learnable(encoder: Path, texts: list[str], seed: int = 0) -> list[float]:
    """Scores that are linear in the embeddings, on 0 to 5, with a little noise."""
    from pipeline.encoder import Encoder

    embeddings = Encoder(config.Encoder(model=str(encoder), max_tokens=64, dtype="float32", device="cpu")).embed(texts)
    embeddings = embeddings.documents()
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


def test_trap_12_the_test_part_chooses_nothing(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    scores = np.array(learnable(tiny_encoder, many))
    recipe = settings(tmp_path, tiny_encoder, learning_curve=True)
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    embedded = Embedded(vectors, np.arange(300), np.full(300, 9), np.zeros(300, np.bool_))
    split = splits.split(many, [0] * 300, [None] * 300, [0] * 300, recipe.train, 0)
    split = split._replace(units=np.arange(300))
    shuffled = scores.copy()
    shuffled[split.parts == "test"] = 5 - scores[split.parts == "test"]
    material = Material(embedded, vectors, split, np.zeros(300, np.int64), recipe)
    targets = [Target("score", "score", values.tolist(), (0, 5)) for values in (scores, shuffled)]
    one, other = (lesson.learn(target, material) for target in targets)
    np.testing.assert_array_equal(one.fit.head.layers[0].weight, other.fit.head.layers[0].weight)
    assert (one.cut, one.cuts, one.fit.strength) == (other.cut, other.cuts, other.fit.strength)
    assert one.learning_curve == other.learning_curve


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
        ([1.0, 2.0, 3.0] * 6, "only 18 documents have a score; rate at least 20"),
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


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), r"score of document 'd7' is NaN; leave it empty"),
        (7.0, r"score of document 'd7' is 7, outside the scale 0 to 5"),
        (-0.5, r"is -0.5, outside the scale"),
    ],
)
def test_a_number_that_is_no_score_is_refused_and_named(
    tmp_path: Path, tiny_encoder: Path, many: list[str], bad: float, message: str
):
    ratings_file(tmp_path, [bad if i == 7 else 1.0 + i % 3 for i in range(80)], many)
    with pytest.raises(UserError, match=message):
        train.run(settings(tmp_path, tiny_encoder))


def test_ratings_of_another_prompt_mixed_in_are_refused(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    asked = [[{"prompt": "edu", "prompt_digest": "aa" if i < 50 else "bb", "teacher": "t"}] for i in range(80)]
    ratings_file(tmp_path, [1.0, 2.0] * 40, many, opinions=asked)
    with pytest.raises(UserError, match=r"mixes ratings of different prompts \(50 by edu aa; 30 by edu bb\)"):
        train.run(settings(tmp_path, tiny_encoder))


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
    assert names[:3] == ["id", "split", "round"]
    assert names[3:] == [f"{kind}{name}" for name in ("score", "depth") for kind in ("", "predicted_", "held_out_")]


def test_a_score_learned_beside_others_is_the_one_learned_alone(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, learnable(tiny_encoder, many), many, depth=[1.0, 2.0, 3.0] * 100)
    alone = train.run(settings(tmp_path, tiny_encoder))
    (tmp_path / "run/train/predictions.parquet").rename(tmp_path / "alone.parquet")
    beside = train.run(settings(tmp_path, tiny_encoder, targets=["depth", "score"]), redo=True)
    assert alone.targets["score"].spearman == pytest.approx(beside.targets["score"].spearman, abs=0.05)
    one, other = (pq.read_table(tmp_path / name) for name in ("alone.parquet", "run/train/predictions.parquet"))
    assert one.column_names == ["id", "split", "round", "score", "predicted_score", "held_out_score"]
    assert other.column_names[-3:] == ["score", "predicted_score", "held_out_score"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["scrore"], r"train.targets: 'scrore' is not in .*ratings.parquet; did you mean score\?"),
        (["clarity"], r"train.targets: 'clarity' is not in .*ratings.parquet; there are: score$"),
        (["gold"], r"'gold' in .*ratings.parquet is double without a scale; scores are numbers with a scale"),
    ],
)
def test_a_target_in_no_file_is_named_with_those_there_are(
    tmp_path: Path, tiny_encoder: Path, many: list[str], targets: list[str], message: str
):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many)
    with pytest.raises(UserError, match=message):
        train.run(settings(tmp_path, tiny_encoder, targets=targets))


@pytest.mark.parametrize(
    ("columns", "scale", "message"),
    [
        (
            {},
            "0-5",
            r"ratings.parquet is no ratings or labels file \(the scale of score is not two numbers such as 0 5\)",
        ),
        ({}, "5 0", r"is no ratings or labels file \(the scale of score goes from 5 to 0\)"),
        ({"id": list(range(40))}, "0 5", r"is no ratings or labels file \(id is int64, not text\)"),
        ({"gold": ["good", "bad"] * 20}, "0 5", r"\(gold is text, neither a number nor true/false\)"),
        ({"score": ["1", "2"] * 20}, "0 5", r"'score' in .* is string with a scale; scores are numbers with a scale"),
    ],
)
def test_a_file_that_cannot_be_read_as_ratings_is_refused_in_a_line(
    tmp_path: Path, tiny_encoder: Path, many: list[str], columns: dict[str, list], scale: str, message: str
):
    path = ratings_file(tmp_path, [1.0, 2.0] * 20, many, **columns)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"scale": scale}), path)
    with pytest.raises(UserError, match=message):
        train.run(settings(tmp_path, tiny_encoder))


def test_labels_of_another_prompt_mixed_in_are_refused(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    said = {"topic": ["a", "b"] * 40, "prompt": ["topics"] * 80, "prompt_digest": ["aa"] * 50 + ["bb"] * 30}
    ratings_file(tmp_path, [1.0] * 80, many, opinions=pa.nulls(80), **said)
    with pytest.raises(UserError, match=r"different prompts \(50 by topics aa; 30 by topics bb\); keep those of one"):
        train.run(settings(tmp_path, tiny_encoder, targets=["topic"]))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a", "b", "c"] * 20, r"in the test part; copies, .* leaves 3 to deal; rate more distinct texts or groups$"),
        (["a"] * 40 + ["b"] * 10 + ["c"] * 10, r"all 40 documents to learn from hang together"),
    ],
)
def test_groups_too_few_to_deal_are_named_as_what_is_missing(
    tmp_path: Path, tiny_encoder: Path, many: list[str], groups: list[str], message: str
):
    ratings_file(tmp_path, [1.0, 2.0, 3.0] * 20, many, group=groups)
    with pytest.raises(UserError, match=message):
        train.run(settings(tmp_path, tiny_encoder))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("head", ["linear", "ordinal", "mlp"])
def test_the_fewest_ratings_make_a_student_with_a_learning_curve(
    tmp_path: Path, tiny_encoder: Path, many: list[str], head: str
):
    ratings_file(tmp_path, learnable(tiny_encoder, many[:20]), many)
    found = train.run(settings(tmp_path, tiny_encoder, head=head, learning_curve=True)).targets["score"]
    assert isinstance(found, ScoreFigures) and found.learning_curve is not None
    assert found.learning_curve["points"][-1]["spearman"] is not None


def test_the_student_says_how_many_tokens_it_can_read(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [1.0, 2.0, 3.0] * 20, many)
    wide = {"model": str(tiny_encoder), "max_tokens": 100_000, "dtype": "float32", "device": "cpu"}
    recipe = settings(tmp_path, tiny_encoder).model_copy(update={"encoder": config.Encoder.model_validate(wide)})
    train.run(recipe)
    made = student.load(tmp_path / "run/train/student")
    assert made.encoder_settings.max_tokens == made.encoder.max_tokens < 100_000
    card = (tmp_path / "run/train/student/README.md").read_text()
    assert f"the first {made.encoder.max_tokens} tokens" in card


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


# -- what is written --------------------------------------------------------------------------------------------------


def test_held_out_predictions_are_others_than_the_students_where_it_has_learned(
    tmp_path: Path, tiny_encoder: Path, many: list[str]
):
    ratings_file(tmp_path, learnable(tiny_encoder, many), many)
    train.run(settings(tmp_path, tiny_encoder))
    for row in pq.read_table(tmp_path / "run/train/predictions.parquet").to_pylist():
        assert (row["held_out_score"] == row["predicted_score"]) == (row["split"] != "train")


def test_a_held_out_prediction_does_not_follow_the_documents_own_score(tmp_path: Path, many: list[str]):
    recipe = settings(tmp_path, tmp_path)
    rng = np.random.default_rng(0)
    vectors, scores = rng.normal(size=(300, 8)).astype(np.float32), rng.integers(0, 5, 300).astype(float)
    split = splits.split(many, [0] * 300, [None] * 300, [0] * 300, recipe.train, 0)
    embedded = Embedded(vectors, np.arange(300), np.full(300, 9), np.zeros(300, np.bool_))
    material = Material(embedded, vectors, split, np.zeros(300, np.int64), recipe)
    at = int(np.flatnonzero(split.parts == "train")[0])
    changed = scores + 0.2 * (np.arange(300) == at)  # stays in its stratum, so that the folds are the same
    found = []
    for values in (scores, changed):
        target = Target("score", "score", values.tolist(), (0, 5))
        fit = lesson.fit_on(target, material, split.parts == "train", strength=1.0)
        predicted = lesson.predictions(fit.head, material).astype(np.float64)
        found.append((predicted, lesson.held_out_predictions(target, material, fit, predicted, False)))
    (one, one_held_out), (other, other_held_out) = found
    assert one[at] != other[at] and one_held_out[at] == other_held_out[at]
    assert (one_held_out != other_held_out).any()


def test_the_counts_of_the_test_part_add_up_in_every_table(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, learnable(tiny_encoder, many), many)
    found = train.run(settings(tmp_path, tiny_encoder)).targets["score"]
    assert isinstance(found, ScoreFigures) and len(found.int_cuts) == 5
    assert all(sum(counts.values()) == found.n_test for counts in found.int_score_counts.values())
    assert sum(sum(row.values()) for row in found.confusion.values()) == found.n_test
    assert sum(each["n"] for each in found.calibration) == found.n_test
    predictions = pq.read_table(tmp_path / "run/train/predictions.parquet").to_pandas()
    test = predictions[predictions["split"] == "test"]
    teacher, guess = test["score"].to_numpy(), test["predicted_score"].to_numpy()
    for name, cuts in (("fitted", tuple(found.int_cuts)), ("half_up", ())):
        ints = metrics.int_scores(guess, (0, 5), cuts)
        assert found.int_score_counts[name] == {str(k): int((ints == k).sum()) for k in range(6)}
        assert found.kept_shares[name] == (ints >= found.good_from).mean()
    kappa = metrics.quadratic_weighted_kappa(
        metrics.int_scores(teacher, (0, 5)), metrics.int_scores(guess, (0, 5), tuple(found.int_cuts)), (0, 5)
    )
    assert found.kappa == pytest.approx(kappa)
    for name, interval in found.intervals.items():
        figure = getattr(found, name) if "." not in name else getattr(found, name.split(".")[0])[name.split(".")[1]]
        assert interval is not None and interval[0] <= figure <= interval[1], name


@pytest.mark.parametrize("rounding", ["fitted", "half_up"])
def test_the_rounding_that_is_stated_is_the_one_that_is_written(
    tmp_path: Path, tiny_encoder: Path, many: list[str], rounding: str
):
    ratings_file(tmp_path, learnable(tiny_encoder, many), many)
    found = train.run(settings(tmp_path, tiny_encoder, rounding=rounding)).targets["score"]
    made = student.load(tmp_path / "run/train/student")
    assert isinstance(found, ScoreFigures) and found.rounding == rounding
    assert list(made.heads[0].cuts) == (found.int_cuts if rounding == "fitted" else [])
    assert made.about["rounding"].startswith(
        "int_score counts the cuts" if rounding == "fitted" else "int_score is fl"
    )
    written = made.predict(many)
    expected = metrics.int_scores(written["score"], (0, 5), made.heads[0].cuts)
    assert written["int_score"].tolist() == expected.tolist()


def test_the_ceiling_is_the_teachers_agreement_with_itself(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    scores = [float(i % 6) for i in range(60)]
    again = [5 - score if i % 10 == 0 else score for i, score in enumerate(scores)]
    opinions = [
        [
            {"prompt": "edu", "prompt_digest": "p", "teacher": "t", "repeat": repeat, "score": said[i]}
            for repeat, said in enumerate((scores, again))
        ]
        for i in range(60)
    ]
    ratings_file(tmp_path, scores, many, opinions=opinions)
    found = train.run(settings(tmp_path, tiny_encoder)).targets["score"]
    expected = metrics.agreement(scores, again, (0, 5))
    assert isinstance(found, ScoreFigures) and found.ceiling is not None
    assert (found.ceiling["n"], found.ceiling["kappa"]) == (60, pytest.approx(expected["kappa"]))
    assert found.ceiling["spearman"] == pytest.approx(expected["spearman"])


def test_ratings_given_once_have_no_ceiling(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [1.0, 2.0] * 20, many)
    assert train.run(settings(tmp_path, tiny_encoder)).targets["score"].ceiling is None


def test_documents_of_later_rounds_are_learned_from_and_never_judged_on(
    tmp_path: Path, tiny_encoder: Path, many: list[str]
):
    rounds = [0] * 200 + [1] * 100
    ratings_file(tmp_path, learnable(tiny_encoder, many), many, round=pa.array(rounds, pa.int32()))
    result = train.run(settings(tmp_path, tiny_encoder))
    assert (result.n_validation, result.n_test, result.n_train + result.n_aside) == (30, 40, 230)
    rows = pq.read_table(tmp_path / "run/train/predictions.parquet").to_pylist()
    assert {row["split"] for row in rows if row["round"] == 1} <= {"train", "aside"}


def test_a_second_head_embeds_nothing_again(tmp_path: Path, tiny_encoder: Path, many: list[str]):
    ratings_file(tmp_path, [float(i % 6) for i in range(60)], many)
    train.run(settings(tmp_path, tiny_encoder))
    (tmp_path / "run/embeddings.sqlite").chmod(0o644)
    before = (tmp_path / "run/embeddings.sqlite").read_bytes()
    train.run(settings(tmp_path, tiny_encoder, head="ordinal"), redo=True)
    assert (tmp_path / "run/embeddings.sqlite").read_bytes() == before


def test_a_student_whose_scores_hardly_vary_is_named(
    tmp_path: Path, tiny_encoder: Path, many: list[str], caplog: pytest.LogCaptureFixture
):
    close = [3.8 + 0.05 * value / 5 for value in learnable(tiny_encoder, many)]
    ratings_file(tmp_path, close, many)
    train.run(settings(tmp_path, tiny_encoder))
    assert "score hardly varies: half up it is one whole score throughout" in caplog.text
