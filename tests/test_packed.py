"""Packs without padding give each text the embedding that the model itself gives it."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from pipeline import config, forward, packed
from pipeline.encoder import Encoder
from pipeline.lanes import Way

OF_BERT = {**SMALL, "hidden_size": 64, "max_position_embeddings": 128}
OF_ROBERTA = {**OF_BERT, "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 3}
FAMILIES = {
    "bert": ("Bert", OF_BERT),
    "camembert": ("Camembert", OF_ROBERTA),
    "electra": ("Electra", {**OF_BERT, "embedding_size": 64}),
    "roberta": ("Roberta", OF_ROBERTA),
    "xlm-roberta": ("XLMRoberta", OF_ROBERTA),
}
ELSEWHERE = {
    "distilbert": ("DistilBert", {"vocab_size": 1000, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}),
    "odd electra": ("Electra", {**OF_BERT, "embedding_size": 16}),
    "odd activation": ("Bert", {**OF_BERT, "hidden_act": "silu"}),
}


def saved(folder: Path, name: str, settings: dict, tokenizer: Path) -> Path:
    """A small random model with the words of `tokenizer`."""
    torch.manual_seed(0)
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def encoder(folder: Path, **settings: object) -> Encoder:
    values = {"model": str(folder), "max_tokens": 48, "dtype": "float32", "device": "cpu", **settings}
    return Encoder(config.Encoder.model_validate(values))


def way(made: Encoder) -> Way:
    """How the encoder computes."""
    made.ready()
    return made.first_lane.way


def alone(folder: Path, made: Encoder, texts: list[str], pooling: str) -> np.ndarray:
    """Each window by itself through transformers in float32."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for ids in made.read(texts).ids:
        with torch.inference_mode():
            states = model(input_ids=torch.from_numpy(ids).long()[None]).last_hidden_state[0]
        rows.append((states[0] if pooling == "cls" else states.mean(0)).numpy())
    return np.array(rows)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_of_this_shape_gives_the_models_own_embeddings(
    family: str, pooling: str, tmp_path: Path, tiny_encoder: Path, texts: list[str]
):
    folder = saved(tmp_path, *FAMILIES[family], tokenizer=tiny_encoder)
    made, mixed = encoder(folder, pooling=pooling, batch_tokens=100), [*texts[:6], "short", "", "a", texts[7]]
    assert isinstance(way(made), forward.Packs)
    np.testing.assert_allclose(made.embed(mixed).vectors, alone(folder, made, mixed, pooling), atol=1e-5)


def test_a_text_that_names_the_padding_token_has_the_models_own_embedding(tmp_path: Path, tiny_encoder: Path):
    folder = saved(tmp_path, "Roberta", {**OF_ROBERTA, "pad_token_id": 0, "bos_token_id": 1}, tiny_encoder)
    made, several = encoder(folder), ["the word [PAD] in a text", "short", "[PAD] [PAD]"]
    assert isinstance(way(made), forward.Packs) and 0 in made.read(several).ids[0]
    np.testing.assert_allclose(made.embed(several).vectors, alone(folder, made, several, "mean"), atol=1e-5)


def test_bfloat16_differs_by_its_rounding_only(tiny_encoder: Path, tmp_path: Path, texts: list[str]):
    folder = saved(tmp_path, "Bert", OF_BERT, tiny_encoder)
    made = encoder(folder, dtype="bfloat16")
    found, expected = made.embed(texts[:20]).vectors, alone(folder, made, texts[:20], "mean")
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert isinstance(way(made), forward.Packs) and 0.999 < cosines.min() < 1


def test_bfloat16_keeps_normalisation_unrounded(tiny_encoder: Path, tmp_path: Path, texts: list[str]):
    folder = saved(tmp_path, "Bert", OF_BERT, tiny_encoder)
    model = AutoModel.from_pretrained(folder)
    for name, weight in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            torch.nn.init.constant_(weight, 1.003)  # 1 in bfloat16
    model.save_pretrained(folder)
    exact = np.linalg.norm(alone(folder, encoder(folder, pooling="cls"), texts[:20], "cls"), axis=1)
    packs, plain = (encoder(folder, dtype="bfloat16", pooling="cls", engine=engine) for engine in ("packed", "plain"))
    shifts = [np.mean(np.linalg.norm(made.embed(texts[:20]).vectors, axis=1) / exact - 1) for made in (packs, plain)]
    assert abs(shifts[0]) < 3e-4 and abs(shifts[1] + 0.003) < 3e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_embedding_does_not_depend_on_neighbours_packs_or_threads(
    dtype: str, tmp_path: Path, tiny_encoder: Path, texts: list[str]
):
    folder = saved(tmp_path, "Bert", OF_BERT, tiny_encoder)
    many = [*texts, "short", ""] * 2
    expected = encoder(folder, dtype=dtype, batch_tokens=48, workers=1).embed(many).vectors
    for batch_tokens, workers in ((1, 2), (500, 1), (2048, 3)):
        made = encoder(folder, dtype=dtype, batch_tokens=batch_tokens, workers=workers)
        np.testing.assert_array_equal(made.embed(many[::-1]).vectors[::-1], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_alone_in_its_pack_has_the_embedding_that_it_has_among_others(
    dtype: str, tmp_path: Path, tiny_encoder: Path, texts: list[str]
):
    folder = saved(tmp_path, "Bert", {**OF_BERT, "intermediate_size": 3072}, tiny_encoder)
    made = encoder(folder, dtype=dtype, pooling="cls", workers=1)
    together = made.embed(texts[:30]).vectors
    np.testing.assert_array_equal(np.concatenate([made.embed([text]).vectors for text in texts[:30]]), together)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_is_bit_for_bit_the_model_alone(dtype: str, tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    folder = saved(tmp_path, "Bert", OF_BERT, tiny_encoder)
    made = encoder(folder, engine="exact", dtype=dtype, pooling="cls")
    np.testing.assert_array_equal(made.embed(texts[:9]).vectors, alone(folder, made, texts[:9], "cls"))


@pytest.mark.parametrize("kind", list(ELSEWHERE))
def test_another_architecture_goes_in_plain_batches_and_the_log_says_so(
    kind: str, tmp_path: Path, tiny_encoder: Path, texts: list[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "gristmill")
    folder = saved(tmp_path, *ELSEWHERE[kind], tokenizer=tiny_encoder)
    made = encoder(folder)
    assert isinstance(way(made), forward.Padded) and "runs in plain padded batches: " in caplog.text
    np.testing.assert_allclose(made.embed(texts[:3]).vectors, alone(folder, made, texts[:3], "mean"), atol=1e-5)


def test_a_model_that_is_another_over_packs_goes_in_plain_batches(
    tmp_path: Path, tiny_encoder: Path, texts: list[str], caplog: pytest.LogCaptureFixture, monkeypatch
):
    caplog.set_level(logging.INFO, "gristmill")
    monkeypatch.setitem(packed.ACTIVATIONS, "gelu", ("relu", ""))
    made = encoder(saved(tmp_path, "Bert", OF_BERT, tiny_encoder))
    assert isinstance(way(made), forward.Padded) and "its embeddings are others" in caplog.text


def test_weights_that_have_changed_are_laid_out_anew(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    made = encoder(saved(tmp_path, "Bert", OF_BERT, tiny_encoder))
    before = made.embed(texts[:3]).vectors
    with torch.no_grad():
        made.model[0].auto_model.encoder.layer[1].output.dense.bias[0] += 1
    assert np.abs(made.embed(texts[:3]).vectors - before).max() > 1e-3


def test_hardly_anything_is_padded_and_every_token_is_counted(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    made = encoder(saved(tmp_path, "Bert", OF_BERT, tiny_encoder))
    made.ready()
    made.effort.counts.clear()
    embedded = made.embed([*texts[:5], "short"])
    n_tokens, n_slots = embedded.tokens.sum(), made.effort.counts["slots"]
    assert made.effort.counts["tokens"] == n_tokens and n_tokens <= n_slots < n_tokens + forward.SLOTS


@given(st.lists(st.integers(1, 60)), st.integers(1, 100))
def test_packs_hold_every_text_once_in_order_within_the_budget(lengths: list[int], budget: int):
    found = list(packed.packs(lengths, budget))
    assert [i for pack in found for i in pack] == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in pack) for pack in found]
    assert all(size <= budget or len(pack) == 1 for pack, size in zip(found, sizes, strict=True))
    firsts = [lengths[pack[0]] for pack in found[1:]]
    assert all(size + first > budget for size, first in zip(sizes, firsts, strict=False)), "no pack is cut short"
