"""Student: heads on an encoder, in one folder that our loader and others' read alike."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENDS, SMALL
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
    pipeline,
)

from pipeline import config, student
from pipeline.encoder import Embedded, Encoder
from pipeline.errors import UserError
from pipeline.layers import side_by_side
from pipeline.student import Head, Layer, Student


def settings(folder: Path, **given: object) -> config.Encoder:
    values = {"model": str(folder), "max_tokens": 64, "dtype": "float32", "device": "cpu", **given}
    return config.Encoder.model_validate(values)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


LINEAR = (Layer(np.linspace(-1, 1, 32, dtype=np.float32)[None], np.array([0.25], np.float32)),)
ORDINAL = (
    Layer(numbers(5, 32), np.linspace(2, -2, 5, dtype=np.float32), "sigmoid"),
    Layer(np.ones((1, 5), np.float32), np.zeros(1, np.float32)),
)
MLP = (Layer(numbers(8, 32), numbers(8, seed=1), "relu"), Layer(numbers(1, 8, seed=2), numbers(1, seed=3)))
STACKS = {"linear": LINEAR, "ordinal": ORDINAL, "mlp": MLP}


def score_head(name: str = "score", layers: tuple[Layer, ...] = LINEAR, **more: object) -> Head:
    return Head(name, "score", layers, (0, 5), **more)


def make_student(folder: Path, *heads: Head, **given: object) -> Student:
    return Student(settings(folder, **given), heads or (score_head(),), {"prompts": ["p"]})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A student of a mean-pooled BERT."""
    folder = tmp_path_factory.mktemp("saved") / "student"
    make_student(tiny_encoder).save(folder)
    return folder


# -- heads ------------------------------------------------------------------------------------------------------------


def test_a_head_is_its_layers_one_after_the_other():
    x = numbers(3, 32, seed=9)
    np.testing.assert_allclose(score_head().outputs(x)[:, 0], x @ LINEAR[0].weight[0] + 0.25, rtol=1e-5)
    above = 1 / (1 + np.exp(-(x @ ORDINAL[0].weight.T + ORDINAL[0].bias)))
    np.testing.assert_allclose(score_head(layers=ORDINAL).outputs(x)[:, 0], above.sum(axis=1), rtol=1e-5)
    hidden = np.maximum(x @ MLP[0].weight.T + MLP[0].bias, 0)
    expected = hidden @ MLP[1].weight[0] + MLP[1].bias
    np.testing.assert_allclose(score_head(layers=MLP).outputs(x)[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(("aggregate", "expected"), [("mean", [2, 7]), ("weighted", [1.5, 7]), ("max", [3, 7])])
def test_windows_become_one_score(aggregate: str, expected: list[float]):
    one = Head("score", "score", (Layer(np.eye(1, dtype=np.float32), np.zeros(1, np.float32)),), (0, 9))
    vectors = np.array([[1], [3], [7]], np.float32)
    embedded = Embedded(vectors, np.array([0, 0, 1]), np.array([30, 10, 5]), np.zeros(2, np.bool_))
    found = one.predict(embedded, aggregate)
    assert found["score"].tolist() == expected and found["score"].dtype == np.float32
    assert found["int_score"].tolist() == np.floor(np.array(expected) + 0.5).tolist()


def test_scores_of_windows_are_aggregated_not_their_embeddings():
    embedded = Embedded(numbers(2, 32, seed=5) * 9, np.array([0, 0]), np.array([9, 9]), np.zeros(1, np.bool_))
    head = score_head(layers=ORDINAL)
    found = head.predict(embedded)["score"][0]
    assert found == pytest.approx(head.outputs(embedded.vectors).mean(), rel=1e-6)
    assert abs(found - head.outputs(embedded.vectors.mean(axis=0, keepdims=True))[0, 0]) > 0.01


def test_no_texts_have_no_scores():
    nothing = Embedded(np.empty((0, 32), np.float32), *[np.empty(0, np.int64)] * 2, np.empty(0, np.bool_))
    for aggregate in ("mean", "weighted", "max"):
        found = score_head().predict(nothing, aggregate)
        assert found["score"].shape == (0,) and found["int_score"].shape == (0,)


def test_cuts_decide_the_whole_scores_and_leave_the_score_alone():
    identity = (Layer(np.eye(1, dtype=np.float32), np.zeros(1, np.float32)),)
    embedded = Embedded(
        np.array([[0.9], [1.5], [2.2]], np.float32), np.arange(3), np.ones(3, np.int64), np.zeros(3, np.bool_)
    )
    found = Head("score", "score", identity, (0, 3), cuts=(1.0, 1.6, 2.0)).predict(embedded)
    assert found["int_score"].tolist() == [0, 1, 3]
    assert found["score"].tolist() == embedded.vectors[:, 0].tolist()


def test_stacks_side_by_side_give_what_each_gives():
    x, other = numbers(4, 32, seed=7), (Layer(numbers(3, 32, seed=8), numbers(3), "sigmoid"), Layer(*MLP[1][:2]))
    other = (other[0], Layer(numbers(1, 3, seed=4), np.ones(1, np.float32)))
    joint = score_head(layers=side_by_side([ORDINAL, other])).outputs(x)
    apart = [score_head(layers=layers).outputs(x) for layers in (ORDINAL, other)]
    np.testing.assert_allclose(joint, np.concatenate(apart, axis=1), rtol=1e-5)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_student_loads_again_with_one_line_and_scores_the_same(saved: Path, tiny_encoder: Path, texts: list[str]):
    made, loaded = make_student(tiny_encoder), student.load(saved)
    np.testing.assert_array_equal(loaded.score(texts[:5]), made.score(texts[:5]))
    assert loaded.heads[0].scale == (0, 5)
    assert loaded.about == {"prompts": ["p"]}
    assert made.score(texts[:5]).dtype == np.float32


@pytest.mark.parametrize("head", [score_head(layers=ORDINAL, cuts=(0.5, 1, 2, 3, 4)), score_head("clarity", MLP)])
def test_every_kind_of_head_comes_back_as_it_was(tmp_path: Path, tiny_encoder: Path, texts: list[str], head: Head):
    made = make_student(tiny_encoder, head)
    made.save(tmp_path / "s")
    loaded = student.load(tmp_path / "s")
    assert loaded.heads[0].cuts == head.cuts and loaded.schema == made.schema
    for name, values in made.predict(texts[:3]).items():
        np.testing.assert_array_equal(loaded.predict(texts[:3])[name], values)


def test_the_folder_is_all_that_is_needed_wherever_it_is(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    made = make_student(tmp_path / "encoder")
    made.save(tmp_path / "here")
    expected, before = made.score(texts[:3]), student.load(tmp_path / "here").fingerprint
    shutil.rmtree(tmp_path / "encoder")
    (tmp_path / "here").rename(tmp_path / "there")
    moved = student.load(tmp_path / "there")
    np.testing.assert_array_equal(moved.score(texts[:3]), expected)
    assert moved.fingerprint == before
    assert moved.encoder_settings.model == str(tmp_path / "encoder"), "its origin stays known"


def test_the_student_folder_holds_no_pickle_and_nothing_of_the_writing(saved: Path):
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert [path.name for path in saved.parent.iterdir()] == ["student"]


def test_whoever_may_read_the_description_may_read_the_weights(saved: Path):
    modes = {path.stat().st_mode for path in saved.rglob("*") if path.is_file()}
    assert modes == {(saved / student.DESCRIPTION).stat().st_mode}


def test_every_file_but_the_card_is_named_with_its_digest(saved: Path):
    named = json.loads((saved / "student.json").read_text())["files"]
    there = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert set(named) == there - {"student.json"}


@pytest.mark.parametrize(
    "damage", ["head.safetensors", "0_Transformer/model.safetensors", "1_Pooling/config.json", "modules.json"]
)
def test_a_damaged_student_is_refused_in_one_line(tmp_path: Path, saved: Path, damage: str):
    shutil.copytree(saved, tmp_path / "s")
    raw = bytearray((tmp_path / "s" / damage).read_bytes())
    raw[-2] ^= 1
    (tmp_path / "s" / damage).write_bytes(raw)
    with pytest.raises(UserError, match=f"is damaged: {damage} is not the one student.json names; train it again"):
        student.load(tmp_path / "s")
    (tmp_path / "s" / damage).unlink()
    with pytest.raises(UserError, match=f"is damaged: {damage}"):
        student.load(tmp_path / "s")


@pytest.mark.parametrize("text", ["{", None])
def test_a_folder_without_a_description_is_no_student(tmp_path: Path, saved: Path, text: str | None):
    shutil.copytree(saved, tmp_path / "s")
    (tmp_path / "s" / "student.json").unlink()
    if text is not None:
        (tmp_path / "s" / "student.json").write_text(text)
    with pytest.raises(UserError, match=r"is no student .*; give a folder that gristmill train made"):
        student.load(tmp_path / "s")


@pytest.mark.parametrize("other", ['{"format": 2', '{"format": 99', "{"])
def test_a_student_of_another_format_is_refused(tmp_path: Path, saved: Path, other: str):
    shutil.copytree(saved, tmp_path / "s")
    text = (saved / "student.json").read_text()
    assert '{\n  "format": 3' in text
    text = text.replace('{\n  "format": 3,', other + ("," if "format" in other else ""), 1)
    (tmp_path / "s" / "student.json").write_text(text)
    with pytest.raises(UserError, match="another version"):
        student.load(tmp_path / "s")


def test_saving_again_replaces_the_whole_student(tmp_path: Path, saved: Path, tiny_encoder: Path, texts: list[str]):
    shutil.copytree(saved, tmp_path / "s")
    (tmp_path / ".s.1.tmp").mkdir()
    made = make_student(tiny_encoder, score_head(layers=ORDINAL), pooling="cls")
    made.save(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert not (tmp_path / "s" / "0_Transformer").exists()
    np.testing.assert_array_equal(student.load(tmp_path / "s").score(texts[:2]), made.score(texts[:2]))


def test_a_failed_save_leaves_the_student_that_was_there(tmp_path: Path, saved: Path, tiny_encoder: Path):
    shutil.copytree(saved, tmp_path / "s")
    made = make_student(tiny_encoder)
    made.about["not json"] = object()
    with pytest.raises(TypeError):
        made.save(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert student.load(tmp_path / "s").about["prompts"] == ["p"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, tiny_encoder: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files than gristmill's"):
        make_student(tiny_encoder).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_student_on_an_encoder_in_bfloat16_is_saved_unrounded(tmp_path: Path, tiny_encoder: Path):
    made = make_student(tiny_encoder, dtype="bfloat16")
    assert made.encoder.dtype == torch.bfloat16
    made.save(tmp_path / "s")
    source = BertModel.from_pretrained(tiny_encoder).state_dict()
    written = SentenceTransformer(str(tmp_path / "s"), device="cpu")[0].auto_model.state_dict()
    assert all(torch.equal(written[name], values) for name, values in source.items())


def test_an_encoder_stored_in_bfloat16_is_computed_in_float32_by_every_loader(
    tmp_path: Path, tiny_encoder: Path, texts: list[str]
):
    BertModel.from_pretrained(tiny_encoder, dtype=torch.bfloat16).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "encoder")
    made = make_student(tmp_path / "encoder", pooling="cls")
    made.save(tmp_path / "s")
    np.testing.assert_allclose(by_sentence_transformers(tmp_path / "s", texts)[:, 0], made.score(texts), atol=1e-4)
    np.testing.assert_allclose(by_transformers(tmp_path / "s", texts)[:, 0], made.score(texts), atol=1e-4)


def test_a_fine_tuned_encoder_is_saved_with_its_own_weights(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    tuned = Encoder(settings(tiny_encoder))
    with torch.no_grad():
        tuned.model[0].auto_model.embeddings.word_embeddings.weight.mul_(0.5)
    made = Student(settings(tiny_encoder), (score_head(),), encoder=tuned)
    made.save(tmp_path / "s")
    assert len(list(tuned.model)) == 2, "the encoder itself is left as it was"
    np.testing.assert_array_equal(student.load(tmp_path / "s").score(texts[:3]), made.score(texts[:3]))
    assert np.abs(made.score(texts[:3]) - make_student(tiny_encoder).score(texts[:3])).max() > 1e-3


def test_scores_come_with_whole_scores_and_no_texts_give_none(tiny_encoder: Path, texts: list[str]):
    made = make_student(tiny_encoder)
    found = made.predict(texts[:5])
    assert list(found) == ["score", "int_score"] == made.schema.names
    assert found["int_score"].tolist() == np.clip(np.floor(found["score"] + 0.5), 0, 5).tolist()
    assert found["int_score"].dtype == np.int8
    assert made.score([]).shape == (0,) and len(made.predict([])["int_score"]) == 0
    with pytest.raises(TypeError, match="a list of texts"):
        made.score("one string")


def test_a_student_keeps_its_encoder_and_its_precision_unless_told(saved: Path, tiny_encoder: Path):
    assert student.load(saved, config.Encoder()).encoder_settings.dtype == "float32"
    asked = config.Encoder(model="another", max_tokens=8, dtype="bfloat16", windows="all", aggregate="max")
    kept = student.load(saved, asked).encoder_settings
    assert (kept.model, kept.max_tokens, kept.windows, kept.aggregate) == (str(tiny_encoder), 64, "first", "mean")
    assert kept.dtype == "bfloat16"


# -- other libraries --------------------------------------------------------------------------------------------------

ROBERTA = {**SMALL, "max_position_embeddings": 130, "pad_token_id": 1}
FAMILIES = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**ROBERTA)),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**ROBERTA)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**ROBERTA)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=1000, dim=32, n_layers=2, n_heads=2, hidden_dim=64, initializer_range=0.3)
    ),
    "deberta-v2": lambda: DebertaV2Model(
        DebertaV2Config(**SMALL, pos_att_type=["p2c", "c2p"], relative_attention=True)
    ),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SMALL, **ENDS, initializer_cutoff_factor=2.0)),
}
EXACT = [
    *[(family, "linear", "cls") for family in FAMILIES],
    *[(family, "ordinal", "cls") for family in ("bert", "roberta", "mpnet", "deberta-v2")],
    *[(family, "mlp", "cls") for family in ("distilbert", "deberta-v2")],
    ("modernbert", "linear", "mean"),
]
INEXACT = [
    *[(family, "linear", "mean") for family in FAMILIES if family != "modernbert"],
    ("bert", "mlp", "cls"),
    ("distilbert", "ordinal", "cls"),
    ("modernbert", "ordinal", "cls"),
]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, Path]:
    """A small random model of every family, with the tokenizer of the small BERT."""
    folders = {}
    for family, model in FAMILIES.items():
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp(family)
        model().save_pretrained(folders[family])
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folders[family])
    return folders


def mixed(texts: list[str]) -> list[str]:
    """Short ones and some that are longer than is read."""
    return [text[: 20 + 60 * i] for i, text in enumerate(texts[:12])]


def by_sentence_transformers(folder: Path, texts: list[str]) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu").encode(texts)


def by_transformers(folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        return model.eval()(**inputs).logits.numpy()


@pytest.mark.parametrize(("family", "head", "pooling"), EXACT)
def test_one_folder_scores_alike_by_three_loaders(
    tmp_path: Path, encoders: dict[str, Path], texts: list[str], family: str, head: str, pooling: str
):
    made = make_student(encoders[family], score_head(layers=STACKS[head]), pooling=pooling)
    made.save(tmp_path / "s")
    read = mixed(texts)
    ours = student.load(tmp_path / "s").score(read)
    assert np.ptp(ours) > 0.05, "a constant would agree too"
    np.testing.assert_array_equal(ours, made.score(read))
    np.testing.assert_allclose(by_sentence_transformers(tmp_path / "s", read), ours[:, None], atol=1e-4)
    np.testing.assert_allclose(by_transformers(tmp_path / "s", read), ours[:, None], atol=1e-4)
    assert student.load(tmp_path / "s").loaders == [
        "SentenceTransformer",
        "AutoModelForSequenceClassification",
    ]


@pytest.mark.parametrize(("family", "head", "pooling"), INEXACT)
def test_a_folder_pretends_to_no_loader_that_would_not_be_exact(
    tmp_path: Path, encoders: dict[str, Path], texts: list[str], family: str, head: str, pooling: str
):
    made = make_student(encoders[family], score_head(layers=STACKS[head]), pooling=pooling)
    made.save(tmp_path / "s")
    read = mixed(texts)
    np.testing.assert_allclose(by_sentence_transformers(tmp_path / "s", read)[:, 0], made.score(read), atol=1e-4)
    with pytest.raises((OSError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "s")
    assert student.load(tmp_path / "s").loaders == ["SentenceTransformer"]


def test_the_text_classification_pipeline_gives_the_score(tmp_path: Path, encoders: dict[str, Path], texts: list[str]):
    made = make_student(encoders["bert"], pooling="cls")
    made.save(tmp_path / "s")
    read = mixed(texts)
    classify = pipeline("text-classification", str(tmp_path / "s"), device="cpu")
    found = classify(read, truncation=True, batch_size=4)
    assert {each["label"] for each in found} == {"score"}
    np.testing.assert_allclose([each["score"] for each in found], made.score(read), atol=1e-4)


def test_several_scores_are_several_outputs_in_their_order(
    tmp_path: Path, encoders: dict[str, Path], texts: list[str]
):
    heads = score_head(), score_head("clarity", (Layer(numbers(1, 32, seed=6), np.ones(1, np.float32)),))
    labels = Head("topic", "label", (Layer(numbers(3, 32), np.zeros(3, np.float32)),), labels=("a", "b", "c"))
    made = make_student(encoders["roberta"], *heads, labels, pooling="cls")
    made.save(tmp_path / "s")
    ours = made.predict(texts[:4])
    expected = np.stack([ours["score"], ours["clarity"]], axis=1)
    np.testing.assert_allclose(by_sentence_transformers(tmp_path / "s", texts[:4]), expected, atol=1e-4)
    np.testing.assert_allclose(by_transformers(tmp_path / "s", texts[:4]), expected, atol=1e-4)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "s").config.id2label == {
        0: "score",
        1: "clarity",
    }
    assert student.load(tmp_path / "s").predict(texts[:4])["topic"].tolist() == ours["topic"].tolist()


def test_a_student_of_labels_alone_gives_their_log_odds(tmp_path: Path, encoders: dict[str, Path], texts: list[str]):
    layers = (Layer(numbers(3, 32), numbers(3)),)
    made = make_student(encoders["distilbert"], Head("topic", "label", layers, labels=("a", "b", "c")), pooling="cls")
    made.save(tmp_path / "s")
    read = mixed(texts)
    log_odds = made.heads[0].outputs(made.encoder.embed(read).vectors)
    np.testing.assert_allclose(by_sentence_transformers(tmp_path / "s", read), log_odds, atol=1e-4)
    found = pipeline("text-classification", str(tmp_path / "s"), device="cpu")(read, truncation=True)
    assert [each["label"] for each in found] == made.predict(read)["topic"].tolist()
    np.testing.assert_allclose([each["score"] for each in found], made.predict(read)["topic_probability"], atol=1e-4)


def test_labels_of_several_heads_are_never_mixed_up(tmp_path: Path, encoders: dict[str, Path], texts: list[str]):
    heads = [
        Head(name, "label", (Layer(numbers(2, 32, seed=i), numbers(2)),), labels=("law", "other"))
        for i, name in enumerate(("topic", "form"))
    ]
    made = make_student(encoders["bert"], *heads, pooling="cls")
    made.save(tmp_path / "s")
    found = pipeline("text-classification", str(tmp_path / "s"), device="cpu", top_k=None)(texts[:1], truncation=True)
    named = {each["label"]: each["score"] for each in found[0]}
    vectors = made.encoder.embed(texts[:1]).vectors
    for head in heads:
        log_odds = [named[f"{head.name}: {label}"] for label in head.labels]
        np.testing.assert_allclose(log_odds, head.outputs(vectors)[0], atol=1e-4)


def test_a_head_on_normalised_embeddings_is_no_classification_model(
    tmp_path: Path, tiny_encoder: Path, texts: list[str]
):
    with_norm = SentenceTransformer(str(tiny_encoder), device="cpu")
    with_norm[1].pooling_mode = "cls"
    from sentence_transformers.sentence_transformer.modules import Normalize

    with_norm.add_module("2", Normalize())
    with_norm.save(str(tmp_path / "encoder"), create_model_card=False)
    made = make_student(tmp_path / "encoder")
    made.save(tmp_path / "s")
    assert student.load(tmp_path / "s").loaders == ["SentenceTransformer"]
    np.testing.assert_allclose(
        by_sentence_transformers(tmp_path / "s", texts[:3])[:, 0], made.score(texts[:3]), atol=1e-4
    )
    np.testing.assert_allclose(student.load(tmp_path / "s").score(texts[:3]), made.score(texts[:3]), atol=1e-6)


def test_wide_scales_stay_exact(tmp_path: Path, encoders: dict[str, Path], texts: list[str]):
    layers = (Layer(numbers(1, 32) * 40, np.array([500], np.float32)),)
    made = make_student(encoders["bert"], Head("score", "score", layers, (0, 1000)), pooling="cls")
    made.save(tmp_path / "s")
    np.testing.assert_allclose(by_transformers(tmp_path / "s", texts[:6])[:, 0], made.score(texts[:6]), rtol=1e-6)
