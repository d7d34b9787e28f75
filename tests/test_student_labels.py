"""Labels beside scores: read from the labels file, learned, saved, and given to every document."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax

from pipeline import config, heads, label_figures, metrics, score, splits, student, targets, train
from pipeline.errors import UserError
from pipeline.figures import ScoreFigures
from pipeline.label_figures import LabelFigures, MultiLabelFigures
from pipeline.student import Head, Layer, Student
from pipeline.targets import Target

DOMAINS = ("Health", "Law", "Science")
FOLDS = np.arange(300) % 5


@pytest.fixture(scope="module")
def many(texts: list[str]) -> list[str]:
    """Three hundred distinct real pieces of text."""
    pieces = [text[start : start + 300] for text in texts for start in range(0, 1200, 200)]
    return list(dict.fromkeys(piece for piece in pieces if len(piece) > 250))[:300]


@pytest.fixture(scope="module")
def embeddings(tiny_encoder: Path, many: list[str]) -> np.ndarray:
    from pipeline.encoder import Encoder

    settings = config.Encoder(model=str(tiny_encoder), max_tokens=64, dtype="float32", device="cpu")
    return Encoder(settings).embed(many).documents()


@pytest.fixture(scope="module")
def domains(embeddings: np.ndarray) -> list[str]:
    """A label that is the largest of three linear functions of the embeddings."""
    raw = (embeddings - embeddings.mean(0)) @ np.random.default_rng(0).normal(size=(embeddings.shape[1], 3))
    return [DOMAINS[i] for i in raw.argmax(axis=1)]


@pytest.fixture(scope="module")
def uses(embeddings: np.ndarray) -> list[list[str]]:
    """Any number of labels, each where a linear function of the embeddings is positive."""
    raw = (embeddings - embeddings.mean(0)) @ np.random.default_rng(1).normal(size=(embeddings.shape[1], 3))
    return [[name for name, value in zip(("chat", "code", "search"), row, strict=True) if value > 0] for row in raw]


def recipe(tmp_path: Path, encoder: Path, **values: object) -> config.Recipe:
    return config.Recipe.model_validate(
        {
            "run_folder": tmp_path / "run",
            "encoder": {"model": str(encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu"},
            "train": {"learning_curve": False, **values},
        }
    )


def finish(path: Path, columns: dict[str, object], settings: config.Recipe, **metadata: str) -> Path:
    """A file as a finished stage leaves it in the run folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    for name in ("inputs.json", "result.json"):
        (path.parent / name).write_text('{"format": 1}')
    (path.parent / "recipe.yaml").write_text(config.to_yaml(settings))
    return path


def labels_file(tmp_path: Path, settings: config.Recipe, texts: list[str], **columns: list) -> Path:
    n = len(texts)
    rows = {
        "id": [f"d{i}" for i in range(n)],
        "text": texts,
        **columns,
        "labels": [["said"]] * n,
        "reason": pa.nulls(n, pa.string()),
        "unknown": pa.array([[]] * n, pa.list_(pa.string())),
        "answer": ["said"] * n,
        "stratum": pa.nulls(n, pa.string()),
    }
    levels = json.dumps({name: [] for name in columns})
    return finish(tmp_path / "run/label/labels.parquet", rows, settings, levels=levels)


def ratings_file(tmp_path: Path, settings: config.Recipe, texts: list[str], scores: list) -> Path:
    rows = {"id": [f"d{i}" for i in range(len(texts))], "text": texts, "score": pa.array(scores, pa.float64())}
    return finish(tmp_path / "run/rate/ratings.parquet", rows, settings, scale="0 5", attributes="{}")


# -- reading ----------------------------------------------------------------------------------------------------------


def test_where_only_labels_were_made_every_level_is_learned(
    tmp_path: Path, tiny_encoder: Path, many: list[str], domains: list, uses: list
):
    settings = recipe(tmp_path, tiny_encoder)
    labels_file(tmp_path, settings, many, domain=domains, use_case=uses)
    result = train.run(settings)
    assert list(result.targets) == ["domain", "use_case"]
    assert (result.n_train, result.n_validation, result.n_test) == (195, 45, 60)


def test_where_ratings_were_made_too_the_score_alone_is_learned_unless_told(
    tmp_path: Path, tiny_encoder: Path, many: list[str], domains: list
):
    settings = recipe(tmp_path, tiny_encoder)
    labels_file(tmp_path, settings, many, domain=domains)
    ratings_file(tmp_path, settings, many, [i % 6 for i in range(300)])
    assert list(targets.sources(settings)) == ["score"]
    both = recipe(tmp_path, tiny_encoder, targets=["domain", "score"])
    assert {name: path.name for name, path in targets.sources(both).items()} == {
        "domain": "labels.parquet",
        "score": "ratings.parquet",
    }


def test_ratings_that_are_not_finished_are_never_passed_over_for_labels(
    tmp_path: Path, tiny_encoder: Path, many: list[str], domains: list
):
    settings = recipe(tmp_path, tiny_encoder)
    labels_file(tmp_path, settings, many, domain=domains)
    ratings_file(tmp_path, settings, many, [1.0, 2.0] * 150).with_name("result.json").unlink()
    with pytest.raises(UserError, match=r"rate is not finished; run gristmill rate first"):
        targets.sources(settings)
    assert list(targets.sources(recipe(tmp_path, tiny_encoder, targets=["domain"]))) == ["domain"]


def test_documents_of_both_files_are_joined_and_what_is_missing_stays_missing(tmp_path: Path, tiny_encoder: Path):
    settings = recipe(tmp_path, tiny_encoder, targets=["score", "domain", "use_case"])
    rated, labelled = ["one", "two", "three", "nothing known"], ["one", "two", "other text"]
    ratings_file(tmp_path, settings, rated, [0.0, None, 2.0, None])
    labels_file(tmp_path, settings, labelled, domain=["Law", None, "Health"], use_case=pa.array([None, [], ["chat"]]))
    found = targets.read(targets.sources(settings))
    assert (found.ids, found.texts) == (["d0", "d1", "d2", "d2"], ["one", "two", "three", "other text"])
    assert found.n_unscored == 1
    score_, domain, use = found.targets
    assert (score_.values, score_.scale) == ([0.0, None, 2.0, None], (0, 5))
    assert (domain.values, domain.labels) == (["Law", None, None, "Health"], ("Health", "Law"))
    assert (use.values, use.labels) == ([None, [], None, ["chat"]], ("chat",))


def test_a_column_in_both_files_must_be_told_apart(tmp_path: Path, tiny_encoder: Path, many: list[str], domains: list):
    settings = recipe(tmp_path, tiny_encoder, targets=["answer"])
    labels_file(tmp_path, settings, many, domain=domains)
    path = ratings_file(tmp_path, settings, many, [1.0, 2.0] * 150)
    pq.write_table(pq.read_table(path).append_column("answer", pa.array(["4"] * 300)), path)
    with pytest.raises(UserError, match=r"ratings.parquet and .*labels.parquet both hold 'answer'; name one"):
        targets.sources(settings)


def test_a_misspelt_level_is_met_with_the_right_one(
    tmp_path: Path, tiny_encoder: Path, many: list[str], domains: list
):
    settings = recipe(tmp_path, tiny_encoder, targets=["domains"])
    labels_file(tmp_path, settings, many, domain=domains)
    with pytest.raises(UserError, match=r"'domains' is not in .*labels.parquet; did you mean domain\?"):
        targets.sources(settings)


# -- learning ---------------------------------------------------------------------------------------------------------


def test_labels_that_can_be_learned_are_and_better_than_guessing(
    tmp_path: Path, tiny_encoder: Path, many: list[str], domains: list, uses: list
):
    settings = recipe(tmp_path, tiny_encoder)
    labels_file(tmp_path, settings, many, domain=domains, use_case=uses)
    result = train.run(settings)
    domain, use = result.targets["domain"], result.targets["use_case"]
    assert isinstance(domain, LabelFigures) and isinstance(use, MultiLabelFigures)
    assert domain.accuracy > 0.8 > 0.7 > domain.majority_share and domain.macro_f1 > 0.75
    assert use.micro_f1 > 0.85 and use.macro_f1 > 0.85 and use.exact_match > 0.6 > use.majority_share
    assert sum(sum(row.values()) for row in domain.confusion.values()) == domain.n_test == 60
    assert sum(each["support"] for each in domain.per_label.values()) == 60


def test_the_saved_student_gives_the_predictions_that_were_reported(
    tmp_path: Path, tiny_encoder: Path, many: list[str], domains: list, uses: list
):
    settings = recipe(tmp_path, tiny_encoder, targets=["score", "domain", "use_case"])
    labels_file(tmp_path, settings, many, domain=domains, use_case=uses)
    ratings_file(tmp_path, settings, many[:200], [i % 6 for i in range(200)])
    result = train.run(settings)
    table = pq.read_table(tmp_path / "run/train/predictions.parquet")
    found = student.load(tmp_path / "run/train/student").predict(many)
    np.testing.assert_allclose(found["score"], table["predicted_score"].to_numpy(), atol=1e-4)
    for name in ("domain", "use_case"):
        assert [np.array(each).tolist() for each in found[name]] == table[f"predicted_{name}"].to_pylist()
    assert table["score"].null_count == 100 and table["domain"].to_pylist() == domains
    assert isinstance(result.targets["score"], ScoreFigures)
    assert (result.targets["score"].n_missing, result.targets["domain"].n_missing) == (100, 0)
    test = [row for row in table.to_pylist() if row["split"] == "test"]
    right = sum(row["domain"] == row["predicted_domain"] for row in test)
    assert result.targets["domain"].accuracy == right / len(test)


def test_trap_12_labels_of_the_test_part_choose_nothing(embeddings: np.ndarray, domains: list):
    learn = np.arange(300) % 3 != 0
    other = [domain if is_learned else "Law" for domain, is_learned in zip(domains, learn, strict=True)]
    one, two = (heads.fit_head(Target("d", "label", each), embeddings, learn, FOLDS) for each in (domains, other))
    np.testing.assert_array_equal(one.head.layers[0].weight, two.head.layers[0].weight)
    assert one.strength == two.strength


def test_trap_14_a_label_that_occurs_once_is_no_crash_and_is_counted(
    tmp_path: Path, tiny_encoder: Path, many: list[str], domains: list, uses: list
):
    settings = recipe(tmp_path, tiny_encoder)
    rare, rare_uses = ["Once", *domains[1:]], [["once"], *uses[1:]]
    labels_file(tmp_path, settings, many, domain=rare, use_case=rare_uses)
    result = train.run(settings)
    assert {name: each.n_rare_labels for name, each in result.targets.items()} == {"domain": 1, "use_case": 1}


def test_trap_14_classes_too_small_to_compare_are_still_learned(embeddings: np.ndarray):
    labels = [f"label {i}" for i in range(40)] * 2
    fit = heads.fit_head(
        Target("d", "label", labels), np.vstack([embeddings[:40]] * 2), np.ones(80, dtype=bool), FOLDS[:80]
    )
    assert fit.strength == 1 and len(fit.head.labels) == 40


def test_the_strength_of_labels_is_chosen_on_other_units():
    """Documents of a group are alike and of one label: held out one by one, they would speak for learning by heart."""
    rng = np.random.default_rng(0)
    of_group = rng.integers(0, 3, 30)
    group = np.repeat(np.arange(30), 8)
    vectors = rng.normal(size=(30, 40))[group] + 0.8 * np.eye(3, 40)[of_group[group]]
    vectors += rng.normal(scale=0.3, size=vectors.shape)
    labels = [str(label) for label in of_group[group]]
    tags = [[label] if label != "0" else [] for label in labels]
    for target in (Target("d", "label", labels), Target("u", "labels", tags)):
        apart, together = (
            heads.fit_head(target, vectors.astype(np.float32), np.ones(240, dtype=bool), folds).strength
            for folds in (np.arange(240) % 5, group % 5)
        )
        assert together >= 100 * apart


@pytest.mark.filterwarnings("error")
def test_two_labels_are_as_likely_as_sklearn_says(embeddings: np.ndarray, domains: list):
    from sklearn.linear_model import LogisticRegression

    labels = ["Law" if domain == "Law" else "other" for domain in domains]
    fit = heads.fit_head(Target("d", "label", labels), embeddings, np.ones(300, dtype=bool), FOLDS)
    model = LogisticRegression(C=1 / fit.strength, max_iter=heads.N_STEPS).fit(embeddings.astype(np.float64), labels)
    found = softmax(fit.head.outputs(embeddings), axis=1)
    np.testing.assert_allclose(found, model.predict_proba(embeddings.astype(np.float64)), atol=1e-4)
    assert fit.head.labels == tuple(model.classes_)


def test_a_label_that_every_document_has_is_always_given(embeddings: np.ndarray, uses: list):
    everywhere = [["always", *labels] for labels in uses]
    fit = heads.fit_head(Target("use", "labels", everywhere), embeddings, np.ones(300, dtype=bool), FOLDS)
    position = fit.head.labels.index("always")
    np.testing.assert_allclose(expit(fit.head.outputs(embeddings)[:, position]), 301 / 302, atol=1e-6)


def test_a_document_without_labels_is_learned_from_and_may_be_found_again(
    tmp_path: Path, tiny_encoder: Path, many: list[str], uses: list
):
    assert [] in uses
    settings = recipe(tmp_path, tiny_encoder)
    labels_file(tmp_path, settings, many, use_case=uses)
    result = train.run(settings)
    assert result.n_unscored == 0 and result.targets["use_case"].n_missing == 0
    assert [] in pq.read_table(tmp_path / "run/train/predictions.parquet")["predicted_use_case"].to_pylist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["Law"] * 19, "only 19 documents have a domain; label at least 20"),
        (["Law"] * 40, "all 26 documents to learn from have the domain Law; mend the prompt"),
    ],
)
def test_labels_nothing_can_be_learned_from_are_refused(
    tmp_path: Path, tiny_encoder: Path, many: list[str], labels: list, message: str
):
    settings = recipe(tmp_path, tiny_encoder)
    labels_file(tmp_path, settings, many[: len(labels)], domain=labels)
    with pytest.raises(UserError, match=message):
        train.run(settings)


@pytest.mark.parametrize(
    ("part", "message"), [("train", "only 0 of 20 .* left to learn"), ("test", "and 0 in the test part")]
)
def test_a_target_known_in_some_parts_only_is_refused(
    tmp_path: Path, tiny_encoder: Path, many: list[str], part: str, message: str
):
    settings = recipe(tmp_path, tiny_encoder)
    split = splits.split(many, [0] * 300, [None] * 300, [0] * 300, settings.train, 0)
    there = np.flatnonzero(split.parts != part)[:20].tolist()
    values = [("Law", "Health")[i % 2] if i in there else None for i in range(300)]
    with pytest.raises(UserError, match=message):
        train.check(Target("domain", "label", values, labels=("Health", "Law")), split, settings)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_label_by_hand():
    learned, truth, guess = ["a", "a", "b"], ["a", "a", "b", "c"], ["a", "b", "b", "a"]
    found = label_figures.of_label(learned, truth, guess, ("a", "b", "c"), n_missing=2, strength=1)
    assert (found.accuracy, found.majority_share, found.n_test, found.n_missing) == (0.5, 0.5, 4, 2)
    assert found.n_rare_labels == 2
    assert found.per_label["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found.per_label["b"] == pytest.approx({"precision": 0.5, "recall": 1, "f1": 2 / 3, "support": 1})
    assert found.per_label["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert found.macro_f1 == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert found.confusion == {"a": {"a": 1, "b": 1}, "b": {"b": 1}, "c": {"a": 1}}


def test_the_figures_of_several_labels_by_hand():
    truth, guess = ([frozenset(each) for each in side] for side in (["ab", "", "c", "a"], ["a", "", "ac", "b"]))
    found = label_figures.of_labels([frozenset("a"), frozenset("a")], truth, guess, ("a", "b", "c"), 0, 1)
    assert (found.exact_match, found.majority_share) == (0.25, 0.25)
    assert found.micro_f1 == pytest.approx(2 * 2 / (4 + 4))
    assert found.macro_f1 == pytest.approx((0.5 + 0 + 1) / 3)
    assert found.n_rare_labels == 2


def test_the_intervals_of_labels_hold_their_figures_and_are_those_of_plain_resampling():
    rng = np.random.default_rng(0)
    truth = ["abc"[i] for i in rng.integers(0, 3, 60)]
    guess = [
        a if keep else "abcd"[i]
        for a, keep, i in zip(truth, rng.random(60) < 0.7, rng.integers(0, 4, 60), strict=True)
    ]
    found = label_figures.of_label(truth, truth, guess, tuple("abcd"), 0, 1)
    equal = np.array(truth) == np.array(guess)
    assert found.intervals["accuracy"] == metrics.bootstrap_interval(lambda rows: rows.mean(axis=1), equal)
    for name in ("accuracy", "macro_f1"):
        low, high = found.intervals[name] or (1, 0)
        assert low < getattr(found, name) < high


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=30))
def test_macro_f1_is_that_of_sklearn(pairs: list[tuple[str, str]]):
    from sklearn.metrics import f1_score

    truth, guess = ([pair[i] for pair in pairs] for i in (0, 1))
    found = label_figures.of_label(truth, truth, guess, tuple("abcd"), 0, 1)
    assert found.macro_f1 == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))


# -- the student and the shards ---------------------------------------------------------------------------------------


@pytest.fixture
def three_heads(tiny_encoder: Path) -> Student:
    """A score, one of three domains, and any of two uses."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(n, 32)).astype(np.float32) for n in (1, 3, 2)]
    biases = [np.full(n, 0.5, np.float32) for n in (1, 3, 2)]
    settings = config.Encoder(model=str(tiny_encoder), max_tokens=64, dtype="float32", device="cpu")
    return Student(
        settings,
        (
            Head("score", "score", (Layer(weights[0], biases[0]),), (0, 5)),
            Head("domain", "label", (Layer(weights[1], biases[1]),), labels=DOMAINS),
            Head("use case", "labels", (Layer(weights[2], biases[2]),), labels=("chat", "ä > b")),
        ),
    )


def test_a_student_of_several_heads_loads_again_and_says_the_same(
    tmp_path: Path, three_heads: Student, texts: list[str]
):
    three_heads.save(tmp_path)
    before, after = three_heads.predict(texts[:9]), student.load(tmp_path).predict(texts[:9])
    assert list(before) == list(after) == three_heads.schema.names
    for name in before:
        assert np.array(before[name], dtype=object).tolist() == np.array(after[name], dtype=object).tolist()
    assert student.load(tmp_path).fingerprint == student.load(tmp_path).fingerprint


def test_a_label_comes_with_its_softmax_and_several_with_the_probability_of_each(
    three_heads: Student, texts: list[str]
):
    embeddings = three_heads.encoder.embed(texts[:9]).documents()
    found = three_heads.predict(texts[:9])
    of_domain = softmax(embeddings @ three_heads.heads[1].layers[0].weight.T + 0.5, axis=1)
    assert found["domain"].tolist() == [DOMAINS[i] for i in of_domain.argmax(axis=1)]
    np.testing.assert_allclose(found["domain_probability"], of_domain.max(axis=1), atol=1e-4)
    of_use = expit(embeddings @ three_heads.heads[2].layers[0].weight.T + 0.5)
    for labels, probabilities, row in zip(found["use case"], found["use case_probability"], of_use, strict=True):
        assert labels == [name for name, p in zip(("chat", "ä > b"), row, strict=True) if p >= 0.5]
        np.testing.assert_allclose(probabilities, [p for p in row if p >= 0.5], atol=1e-4)


def test_renaming_a_label_makes_another_student(three_heads: Student):
    others = (*three_heads.heads[:1], Head("domain", "label", three_heads.heads[1].layers, labels=("X", "Y", "Z")))
    assert (
        Student(three_heads.encoder_settings, others).fingerprint
        != Student(three_heads.encoder_settings, three_heads.heads[:2]).fingerprint
    )


def test_a_student_without_a_score_names_what_it_gives(three_heads: Student):
    with pytest.raises(UserError, match=r"gives no score, but domain, use case; use predict"):
        Student(three_heads.encoder_settings, three_heads.heads[1:]).score(["text"])


def to_score(tmp_path: Path, corpus_path: Path, made: Student, **settings: object) -> config.Recipe:
    made.save(tmp_path / "student")
    return config.Recipe.model_validate(
        {
            "run_folder": tmp_path / "run",
            "corpus": {"path": str(corpus_path)},
            "encoder": {"dtype": "float32", "device": "cpu"},
            "score": {"student": tmp_path / "student", **settings},
        }
    )


def test_every_head_gives_its_columns_to_every_document(tmp_path: Path, corpus_folder: Path, three_heads: Student):
    result = score.run(to_score(tmp_path, corpus_folder, three_heads))
    assert sum(result.int_score_counts.values()) == sum(result.label_counts["domain"].values()) == 60
    table = pq.read_table(tmp_path / "run/score/scored")
    assert table.schema.names[-6:] == three_heads.schema.names
    assert [table.schema.field(name).type for name in three_heads.schema.names] == three_heads.schema.types
    found = three_heads.predict(table["text"].to_pylist())
    assert table["domain"].to_pylist() == found["domain"].tolist()
    assert table["use case"].to_pylist() == found["use case"]
    given_ = [label for labels in table["use case"].to_pylist() for label in labels]
    assert result.label_counts["use case"] == {name: given_.count(name) for name in set(given_)}


def test_an_empty_text_has_null_labels_and_never_an_empty_list(tmp_path: Path, three_heads: Student):
    pq.write_table(pa.table({"text": ["a text", " ", None]}), tmp_path / "corpus.parquet")
    score.run(to_score(tmp_path, tmp_path / "corpus.parquet", three_heads))
    table = pq.read_table(tmp_path / "run/score/scored/corpus.parquet")
    for name in three_heads.schema.names:
        assert [value is None for value in table[name].to_pylist()] == [False, True, True]


def test_a_shard_of_empty_texts_alone_is_all_null(tmp_path: Path, three_heads: Student):
    pq.write_table(pa.table({"text": ["", None]}), tmp_path / "corpus.parquet")
    result = score.run(to_score(tmp_path, tmp_path / "corpus.parquet", three_heads))
    assert (result.n_scored, result.int_score_counts, result.label_counts) == (0, {}, {})


def test_a_resumed_run_counts_the_labels_of_the_shards_it_found(
    tmp_path: Path, corpus_folder: Path, three_heads: Student
):
    settings = to_score(tmp_path, corpus_folder, three_heads)
    first = score.run(settings)
    (tmp_path / "run/score/result.json").unlink()
    (tmp_path / "run/score/scored/part-1.parquet").unlink()
    again = score.run(settings)
    assert again.n_shards_reused == 2
    assert (again.label_counts, again.int_score_counts) == (first.label_counts, first.int_score_counts)


def test_a_column_called_like_a_label_is_refused_or_replaced(tmp_path: Path, three_heads: Student):
    corpus = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"domain": [7], "text": ["a text"]}), corpus)
    with pytest.raises(UserError, match=r"already has a column 'domain'; set score.replace_existing"):
        score.run(to_score(tmp_path, corpus, three_heads))
    score.run(to_score(tmp_path, corpus, three_heads, replace_existing=True), redo=True)
    table = pq.read_table(tmp_path / "run/score/scored/corpus.parquet")
    assert table.schema.names == ["text", *three_heads.schema.names] and table["domain"][0].as_py() in DOMAINS


def test_columns_are_refused_before_there_is_a_student(tmp_path: Path, three_heads: Student):
    from pipeline.shards import find_shards

    pq.write_table(pa.table({"domain": [7], "text": ["a text"]}), tmp_path / "corpus.parquet")
    settings = to_score(tmp_path, tmp_path / "corpus.parquet", three_heads)
    score.check_columns(find_shards(settings.corpus), settings)
    asked = settings.model_copy(update={"train": config.Train(targets=("domain",))})
    with pytest.raises(UserError, match="already has a column 'domain'"):
        score.check_columns(find_shards(asked.corpus), asked)


def test_hugging_face_reads_labels_with_their_features(tmp_path: Path, three_heads: Student):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(str(tmp_path / "corpus.parquet"))
    score.run(to_score(tmp_path, tmp_path / "corpus.parquet", three_heads))
    out = str(tmp_path / "run/score/scored/corpus.parquet")
    notes = json.loads(pq.read_schema(out).metadata[b"huggingface"])["info"]["features"]
    assert list(notes) == ["text", *three_heads.schema.names]
    back = datasets.load_dataset("parquet", data_files=out, split="train", cache_dir=str(tmp_path / "cache"))
    assert back.features["use case"] == datasets.List(datasets.Value("string"))
    assert back.features["domain_probability"] == datasets.Value("float32")
    assert set(back["domain"]) <= set(DOMAINS)
