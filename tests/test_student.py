"""Encoder and student: any encoder, frozen, the same scores whatever the batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
)

from pipeline import config, student
from pipeline.encoder import Encoder
from pipeline.errors import UserError
from pipeline.student import Head, Student


def encoder(folder: Path, **settings: object) -> Encoder:
    values = {"model": str(folder), "max_tokens": 64, "dtype": "float32", "device": "cpu", **settings}
    return Encoder(config.Encoder.model_validate(values))


def test_embeddings_are_those_of_the_encoder_itself(tiny_encoder: Path, texts: list[str]):
    model, tokenizer = BertModel.from_pretrained(tiny_encoder), AutoTokenizer.from_pretrained(tiny_encoder)
    embeddings, n_truncated = encoder(tiny_encoder).embed(texts[:5])
    for text, embedding in zip(texts, embeddings, strict=False):
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**inputs).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(embedding, expected.numpy(), atol=1e-5)
    assert n_truncated == 5


def sentence_transformer_folder(folder: Path, bert: Path) -> Path:
    """CLS pooling and normalisation around a BERT, as sentence-transformers writes them."""
    kinds = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    shutil.copytree(bert, folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in paths[1:]:
        (folder / path).mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_pooling_is_what_the_folder_says(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    folder = sentence_transformer_folder(tmp_path / "st", tiny_encoder)
    short = [text[:100] for text in texts[:4]]
    found, n_truncated = encoder(folder, max_tokens=128).embed(short)
    np.testing.assert_allclose(found, SentenceTransformer(str(folder), device="cpu").encode(short), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    inputs = AutoTokenizer.from_pretrained(tiny_encoder)(short[0], return_tensors="pt")
    with torch.inference_mode():
        cls = BertModel.from_pretrained(tiny_encoder)(**inputs).last_hidden_state[0, 0]
    np.testing.assert_allclose(found[0], (cls / cls.norm()).numpy(), atol=1e-5)
    assert n_truncated == 0


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_batch_size_changes_nothing_and_order_is_kept(tiny_encoder: Path, texts: list[str], batch_tokens: int):
    mixed = [text[: 40 + 37 * (i % 11)] for i, text in enumerate(texts[:30])]
    one_by_one = np.concatenate([encoder(tiny_encoder).embed([text])[0] for text in mixed])
    together, _ = encoder(tiny_encoder, batch_tokens=batch_tokens).embed(mixed)
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)


SMALL = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertModel(BertConfig(**SMALL)),
        lambda: RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=66, pad_token_id=1)),
        lambda: DistilBertModel(DistilBertConfig(vocab_size=1000, dim=32, n_layers=2, n_heads=2, hidden_dim=64)),
        lambda: ModernBertModel(
            ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        ),
    ],
    ids=["bert", "roberta", "distilbert", "modernbert"],
)
def test_trap_13_any_encoder_works_and_nothing_of_it_is_trained(
    tmp_path: Path, tiny_encoder: Path, texts: list[str], model
):
    torch.manual_seed(0)
    model().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    loaded = encoder(tmp_path)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    embeddings, _ = loaded.embed(texts[:6])
    assert embeddings.shape == (6, 32) and np.isfinite(embeddings).all() and np.ptp(embeddings, axis=0).max() > 0
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_trap_18_documents_longer_than_the_encoder_reads_are_counted(tiny_encoder: Path, texts: list[str]):
    assert encoder(tiny_encoder).embed([texts[0], "short", texts[1]])[1] == 2


def test_a_document_of_50_mb_costs_no_more_than_a_page(tiny_encoder: Path, texts: list[str]):
    huge = (texts[0] + " ") * (50_000_000 // len(texts[0]))
    found, n_truncated = encoder(tiny_encoder).embed([huge, texts[0]])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert n_truncated == 2


def test_odd_texts_are_embedded(tiny_encoder: Path):
    odd = ["\0\0", "a" * 100_000, "\U0001f600" * 50, "\ufffd", " ."]
    assert np.isfinite(encoder(tiny_encoder).embed(odd)[0]).all()


def make_student(folder: Path) -> Student:
    settings = config.Encoder(model=str(folder), max_tokens=64, dtype="float32", device="cpu")
    weight = np.linspace(-1, 1, 32).astype(np.float32)
    head = Head("score", "score", weight[None], np.array([0.25], np.float32), (0, 5))
    return Student(settings, (head,), {"prompts": ["p"]})


def test_a_student_loads_again_with_one_line_and_scores_the_same(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    made = make_student(tiny_encoder)
    made.save(tmp_path)
    np.testing.assert_array_equal(student.load(tmp_path).score(texts[:5]), made.score(texts[:5]))
    assert student.load(tmp_path).heads[0].scale == (0, 5)
    assert student.load(tmp_path).about == {"prompts": ["p"]}
    assert made.score(texts[:5]).dtype == np.float32


def test_the_score_is_embedding_times_weight_plus_bias(tiny_encoder: Path, texts: list[str]):
    made = make_student(tiny_encoder)
    embedding = made.encoder.embed(texts[:1])[0][0]
    assert made.score(texts[:1])[0] == pytest.approx(float(embedding @ made.heads[0].weight[0]) + 0.25, abs=1e-4)


def test_the_student_folder_holds_no_pickle_and_names_its_encoder(tmp_path: Path, tiny_encoder: Path):
    make_student(tiny_encoder).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.safetensors", "student.json"]
    assert json.loads((tmp_path / "student.json").read_text())["encoder"]["model"] == str(tiny_encoder)


@pytest.mark.parametrize("damage", ["student.json", "head.safetensors"])
def test_a_damaged_student_is_refused_in_one_line(tmp_path: Path, tiny_encoder: Path, damage: str):
    make_student(tiny_encoder).save(tmp_path)
    (tmp_path / damage).write_text("{")
    with pytest.raises(UserError, match=r"is no student .*; give a folder that gristmill train made|is damaged: head"):
        student.load(tmp_path)


@pytest.mark.parametrize("other", [1, 99])
def test_a_student_of_another_format_is_refused(tmp_path: Path, tiny_encoder: Path, other: int):
    make_student(tiny_encoder).save(tmp_path)
    text = (tmp_path / "student.json").read_text()
    assert '"format": 2' in text
    (tmp_path / "student.json").write_text(text.replace('"format": 2', f'"format": {other}'))
    with pytest.raises(UserError, match="another version"):
        student.load(tmp_path)


def test_scores_come_with_whole_scores_and_no_texts_give_none(tiny_encoder: Path, texts: list[str]):
    made = make_student(tiny_encoder)
    found = made.predict(texts[:5])
    assert list(found) == ["score", "int_score"] == made.schema.names
    assert found["int_score"].tolist() == np.clip(np.floor(found["score"] + 0.5), 0, 5).tolist()
    assert found["int_score"].dtype == np.int8
    assert made.score([]).shape == (0,) and len(made.predict([])["int_score"]) == 0
    with pytest.raises(TypeError, match="a list of texts"):
        made.score("one string")


def test_an_encoder_that_cannot_be_loaded_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"encoder.model: nobody/nothing cannot be loaded"):
        encoder(Path("nobody/nothing"))
    with pytest.raises(UserError, match=r"package 'no_such_package' is not installed"):
        encoder(Path("package:no_such_package/model"))


def test_an_encoder_that_gives_nan_says_so(tmp_path: Path, tiny_encoder: Path):
    shutil.copytree(tiny_encoder, tmp_path / "nan")
    model = BertModel.from_pretrained(tmp_path / "nan")
    torch.nn.init.constant_(model.encoder.layer[0].output.dense.weight, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="gives NaN"):
        make_student(tmp_path / "nan").score(["text"])


def test_a_student_keeps_its_encoder_and_its_precision_unless_told(tmp_path: Path, tiny_encoder: Path):
    make_student(tiny_encoder).save(tmp_path)
    assert student.load(tmp_path, config.Encoder()).encoder_settings.dtype == "float32"
    asked = config.Encoder(model="another", max_tokens=8, dtype="bfloat16")
    settings = student.load(tmp_path, asked).encoder_settings
    assert (settings.model, settings.max_tokens, settings.dtype) == (str(tiny_encoder), 64, "bfloat16")
