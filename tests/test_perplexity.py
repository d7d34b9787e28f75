"""Perplexity: every token once, whatever the windows and batches."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import language_model, perplexity
from pipeline.errors import UserError
from pipeline.perplexity import Predicted


@pytest.fixture(scope="module")
def loaded(tiny_causal: Path) -> tuple[Any, Any]:
    return language_model.load(str(tiny_causal), "model")


def test_one_window_is_the_loss_of_transformers(loaded: tuple[Any, Any], texts: list[str]) -> None:
    tokenizer, model = loaded
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    row = torch.tensor([[tokenizer.eos_token_id, *ids]])
    with torch.inference_mode():
        loss = model(input_ids=row, labels=row).loss.item()

    found = perplexity.predict(model, tokenizer, texts[:1], 2048)

    assert found.nats[0] == pytest.approx(loss * len(ids), rel=1e-5)
    assert found.tokens[0] == len(ids)
    assert found.n_bytes[0] == len(texts[0].encode())
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(loss * len(ids) / math.log(2) / len(texts[0].encode()), rel=1e-5)


def test_every_token_is_predicted_once_from_its_own_window(loaded: tuple[Any, Any], texts: list[str]) -> None:
    tokenizer, model = loaded
    ids = tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    expected = 0.0
    for begin in range(0, len(ids), 15):
        row = torch.tensor([[tokenizer.eos_token_id, *ids[begin : begin + 15]]])
        with torch.inference_mode():
            logs = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        expected -= logs.gather(1, row[0, 1:, None]).sum().item()

    found = perplexity.predict(model, tokenizer, [texts[1]], 16)

    assert found.tokens.tolist() == [len(ids)]
    assert found.nats[0] == pytest.approx(expected, rel=1e-5)


def test_a_document_is_worth_the_same_alone_and_in_a_batch(
    loaded: tuple[Any, Any], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = loaded
    some = [texts[0], texts[1][:40], texts[2][:300]]
    together = perplexity.predict(model, tokenizer, some, 128)
    monkeypatch.setattr(perplexity, "BATCH_LOGITS", 1)
    alone = perplexity.predict(model, tokenizer, some, 128)

    np.testing.assert_allclose(together.nats, alone.nats, rtol=1e-5)
    assert together.tokens.tolist() == alone.tokens.tolist()


def test_a_large_vocabulary_makes_small_batches() -> None:
    windows = [(i, [0] * 512) for i in range(64)]

    found = perplexity.batches(windows, min(perplexity.BATCH_TOKENS, perplexity.BATCH_LOGITS // 49152))

    assert all(len(batch) * 512 * 49152 * 4 <= 2**28 for batch in found)
    assert sum(map(len, found)) == 64


def test_an_empty_text_has_nothing_to_predict(loaded: tuple[Any, Any], texts: list[str]) -> None:
    tokenizer, model = loaded
    found = perplexity.predict(model, tokenizer, ["", texts[0]], 128)

    assert (found.nats[0], found.tokens[0], found.n_bytes[0]) == (0, 0, 0)
    assert found.nats[1] > 0
    assert perplexity.predict(model, tokenizer, [], 128).nats.shape == (0,)


def test_half_a_character_is_read_as_a_question_mark(loaded: tuple[Any, Any]) -> None:
    tokenizer, model = loaded
    half, mark = (perplexity.predict(model, tokenizer, [text], 128) for text in ("a\ud800b", "a?b"))

    assert half.nats.tolist() == mark.nats.tolist()
    assert half.n_bytes.tolist() == [3]


def test_a_tokenizer_without_ends_is_refused(loaded: tuple[Any, Any]) -> None:
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(UserError, match="neither a begin nor an end token"):
        perplexity.predict(loaded[1], Bare(), ["a"], 128)


def test_the_interval_of_a_gain_holds_what_every_document_gains() -> None:
    rng = np.random.default_rng(0)
    n_bytes = rng.integers(100, 1000, 50)
    before = Predicted(n_bytes * 1.5, n_bytes // 3, n_bytes)
    after = before._replace(nats=before.nats - n_bytes * 0.1 * math.log(2))

    low, high = perplexity.gain_interval(lambda found: found.bits_per_byte, before, after)

    assert (low, high) == pytest.approx((-0.1, -0.1))
