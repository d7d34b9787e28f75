"""Embeddings are computed once for one encoder and one text, whatever asks for them."""

import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline import config, embeddings
from pipeline.encoder import Embedded, Encoder
from pipeline.errors import UserError


def encoder(folder: Path, **settings: object) -> Encoder:
    values = {"model": str(folder), "max_tokens": 32, "dtype": "float32", "device": "cpu", **settings}
    return Encoder(config.Encoder.model_validate(values))


@pytest.fixture(scope="module")
def spread(tiny_encoder: Path) -> Encoder:
    return encoder(tiny_encoder, windows="spread")


def counted(made: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The windows of each unit of texts that the encoder really computes."""
    computed: list[int] = []
    vectors = made.vectors

    def watched(read):
        computed.append(len(read.ids))
        return vectors(read)

    monkeypatch.setattr(made, "vectors", watched)
    return computed


def stored(path: Path) -> int:
    with sqlite3.connect(path) as file:
        return file.execute("SELECT count(*) FROM embeddings").fetchone()[0]


def assert_same(found: Embedded, expected: Embedded) -> None:
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-5)
    assert found.owners.tolist() == expected.owners.tolist()
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.n_truncated == expected.n_truncated
    assert [array.dtype for array in found[:3]] == [array.dtype for array in expected[:3]]


def test_the_cache_gives_what_the_encoder_gives_in_the_order_asked(tmp_path: Path, spread: Encoder, texts: list[str]):
    mixed = [texts[2], "short", texts[0][:150], texts[2], ""]
    expected = spread.embed(mixed)
    assert len(expected.owners) > len(mixed) and expected.n_truncated == 2
    for _ in range(2):
        assert_same(embeddings.embed(spread, mixed, tmp_path / "cache.sqlite"), expected)
    assert stored(tmp_path / "cache.sqlite") == 4


def test_what_is_stored_is_not_computed_again(tmp_path: Path, spread: Encoder, texts: list[str], monkeypatch):
    batches, steps = counted(spread, monkeypatch), []
    embeddings.embed(spread, texts[:6], tmp_path / "cache.sqlite", steps.append)
    computed = sum(batches)
    assert computed > 0 and sum(steps) == 6
    steps.clear()
    embeddings.embed(spread, texts[5::-1], tmp_path / "cache.sqlite", steps.append)
    assert sum(batches) == computed and steps == [6]
    embeddings.embed(spread, [*texts[:6], "one more"], tmp_path / "cache.sqlite")
    assert sum(batches) == computed + 1


def test_a_run_that_stops_midway_goes_on_where_it_was(tmp_path: Path, spread: Encoder, texts: list[str], monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK_TEXTS", 3)
    embed_unit = spread.embed_unit
    allowed = iter(range(3))

    def stopping(unit):
        if next(allowed, None) is None:
            raise KeyboardInterrupt
        return embed_unit(unit)

    monkeypatch.setattr(spread, "embed_unit", stopping)
    with pytest.raises(KeyboardInterrupt):
        embeddings.embed(spread, texts[:12], tmp_path / "cache.sqlite")
    kept = stored(tmp_path / "cache.sqlite")
    assert kept % 3 == 0 and kept < 12
    monkeypatch.setattr(spread, "embed_unit", embed_unit)
    assert_same(embeddings.embed(spread, texts[:12], tmp_path / "cache.sqlite"), spread.embed(texts[:12]))
    assert stored(tmp_path / "cache.sqlite") == 12


@pytest.mark.parametrize(
    "other",
    [{"pooling": "cls"}, {"max_tokens": 16}, {"windows": "all"}, {"dtype": "bfloat16"}],
    ids=lambda other: next(iter(other)),
)
def test_another_setting_never_reuses(tmp_path: Path, tiny_encoder: Path, texts: list[str], other: dict):
    path = tmp_path / "cache.sqlite"
    embeddings.embed(encoder(tiny_encoder), texts[:2], path)
    changed = encoder(tiny_encoder, **other)
    assert_same(embeddings.embed(changed, texts[:2], path), changed.embed(texts[:2]))
    assert stored(path) == 4


def test_other_weights_never_reuse_even_if_only_in_memory(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    import torch

    path, made = tmp_path / "cache.sqlite", encoder(tiny_encoder)
    before = embeddings.embed(made, texts[:2], path)
    with torch.no_grad():
        made.model[0].auto_model.encoder.layer[0].output.dense.bias[0] += 1
    after = embeddings.embed(made, texts[:2], path)
    assert stored(path) == 4 and np.abs(before.vectors - after.vectors).max() > 1e-3


def test_no_texts_have_no_embeddings(tmp_path: Path, spread: Encoder):
    found = embeddings.embed(spread, [], tmp_path / "cache.sqlite")
    assert found.vectors.shape == (0, 32) and found.owners.shape == found.tokens.shape == (0,)


def test_two_at_once_share_one_file(tmp_path: Path, tiny_encoder: Path, texts: list[str], monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK_TEXTS", 2)
    path, found = tmp_path / "cache.sqlite", []
    several = [encoder(tiny_encoder), encoder(tiny_encoder)]
    work = [
        threading.Thread(target=lambda made=made: found.append(embeddings.embed(made, texts[:10], path)))
        for made in several
    ]
    for one in work:
        one.start()
    for one in work:
        one.join()
    assert_same(found[0], found[1])
    assert stored(path) == 10


def test_a_file_that_is_no_cache_is_named(tmp_path: Path, spread: Encoder):
    (tmp_path / "cache.sqlite").write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match=r"encoder.cache: .*cache.sqlite cannot be used \(file is not a database\)"):
        embeddings.embed(spread, ["text"], tmp_path / "cache.sqlite")
    with pytest.raises(UserError, match=r"encoder.cache: .* cannot be used"):
        embeddings.embed(spread, ["text"], tmp_path)


def test_the_cache_is_in_the_run_folder_unless_set(tmp_path: Path):
    recipe = config.Recipe(run_folder=tmp_path)
    assert embeddings.cache_path(recipe) == tmp_path / "embeddings.sqlite"
    elsewhere = recipe.model_copy(update={"encoder": config.Encoder(cache=tmp_path / "shared.sqlite")})
    assert embeddings.cache_path(elsewhere) == tmp_path / "shared.sqlite"
