"""What GPUs need: packs of one shape, compiled layers, results that come later, memory that does not suffice."""

import functools
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import attention, config, forward, models, packed
from pipeline.encoder import Encoder
from pipeline.errors import UserError
from pipeline.lanes import Lane, Launched, gathered

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
NO_VARLEN = pytest.mark.skipif(not attention.has_varlen(), reason="torch before 2.10 has no attention over packs")


def encoder(folder: Path, **settings: object) -> Encoder:
    values = {"model": str(folder), "max_tokens": 48, "dtype": "float32", "device": "cpu", **settings}
    return Encoder(config.Encoder.model_validate(values))


def lane(made: Encoder) -> Lane:
    made.ready()
    return made.lanes.get()


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)


def compiled_by(backend: str | Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs have one shape on the CPU too, and layers, with the dense ones that a GPU has, are compiled so."""
    torch.compiler.reset()
    monkeypatch.setattr(forward, "ONE_SHAPE", {"cpu"})
    monkeypatch.setattr(packed, "lays_out", lambda weight: False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


# -- packs of one shape -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_slots_after_the_last_text_change_no_embedding(
    pooling: str, dtype: str, tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    many = [*texts[:9], "short", ""]
    expected = encoder(tiny_encoder, pooling=pooling, dtype=dtype, batch_tokens=100).embed(many).vectors
    monkeypatch.setattr(forward, "ONE_SHAPE", {"cpu"})
    monkeypatch.setattr(forward.Packs, "compile", lambda self, batch_tokens: None)
    filled = encoder(tiny_encoder, pooling=pooling, dtype=dtype, batch_tokens=100)
    found = filled.embed(many)
    np.testing.assert_array_equal(found.vectors, expected)
    assert filled.effort.counts == {"tokens": found.tokens.sum(), "slots": 500}


def test_a_filled_pack_keeps_its_texts_and_their_starts():
    pack = packed.pack_of([np.array([5, 6, 7], np.int32), np.array([8], np.int32)])
    found = packed.filled(pack, 6)
    assert found.ids.tolist() == [5, 6, 7, 8, 0, 0] and found.positions.tolist() == [0, 1, 2, 0, 0, 0]
    assert (found.starts.tolist(), found.longest) == ([0, 3, 4], 3)


def test_every_pack_is_computed_by_layers_compiled_once(
    tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    expected = encoder(tiny_encoder).embed(texts[:12]).vectors
    compiled_by("aot_eager", monkeypatch)
    made = encoder(tiny_encoder, batch_tokens=100)
    alone = lane(made)
    assert alone.way.packed.feed_slots != alone.way.packed.feed
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = gathered(alone.launch(made.read(texts[:12]).ids, made.effort))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_layers_that_cannot_be_compiled_run_as_they_are(
    tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_triton(graph: Any, inputs: Any) -> Any:
        raise ImportError("Cannot find a working triton installation")

    expected = encoder(tiny_encoder).embed(texts[:3]).vectors
    compiled_by(no_triton, monkeypatch)
    caplog.set_level(logging.INFO, "gristmill")
    found = encoder(tiny_encoder, batch_tokens=100).embed(texts[:3]).vectors
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "its layers run uncompiled: " in caplog.text and "working triton" in caplog.text


def test_a_pack_smaller_than_a_window_is_refused(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forward, "ONE_SHAPE", {"cpu"})
    with pytest.raises(UserError, match=r"^encoder.batch_tokens: 40 is less than encoder.max_tokens, the 48 tokens"):
        encoder(tiny_encoder, batch_tokens=40).ready()


@NO_VARLEN
def test_packed_attention_is_asked_as_torch_wants_it(tiny_encoder: Path):
    """Through torch's own checks of its arguments; on the CPU it has no kernel, so the test brings a plain one."""
    n_heads, starts = 2, torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    qkv = torch.randn(9, 3 * 32, generator=torch.Generator().manual_seed(0))
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", plainly, "CPU")
        found = attention.varlen(n_heads)(qkv, starts, 5)
    torch.testing.assert_close(found, attention.by_document(n_heads)(qkv, starts, 5))


def plainly(q: Any, k: Any, v: Any, starts: Any, starts_k: Any, longest: int, longest_k: int, *more: Any) -> Any:
    """softmax(q k' / sqrt(dims)) v within each text, of (n_tokens, n_heads, dims)."""
    lengths = starts.diff()
    assert starts.dtype == starts_k.dtype == torch.int32 and longest == longest_k == lengths.max()
    found = torch.empty_like(q)
    for begin, end in pairwise(starts.tolist()):
        part = [each[begin:end].transpose(0, 1) for each in (q, k, v)]
        found[begin:end] = torch.nn.functional.scaled_dot_product_attention(*part).transpose(0, 1)
    return found, torch.empty(0), torch.empty(0)


# -- lanes ------------------------------------------------------------------------------------------------------------


def test_threads_that_share_a_lane_embed_every_text_in_order(tiny_encoder: Path, texts: list[str]):
    """As on a GPU: one lane, and threads that fetch what they have launched after it is free for the next."""
    made, many = encoder(tiny_encoder, workers=3), texts * 5
    expected = made.embed(many).vectors
    only = made.lanes.get()
    made.lanes = SimpleQueue()
    made.lanes.put(only)
    np.testing.assert_array_equal(made.embed(many).vectors, expected)
    assert made.lanes.qsize() == 1


def test_a_lane_is_free_for_others_while_its_embeddings_are_on_their_way(
    tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    made, free, fetch = encoder(tiny_encoder, workers=1), [], Launched.fetched

    def watched(self: Launched) -> np.ndarray:
        free.append(made.lanes.qsize())
        return fetch(self)

    made.ready()
    monkeypatch.setattr(Launched, "fetched", watched)
    made.embed(texts)
    assert free and set(free) == {1}


def test_each_gpu_has_a_copy_of_the_weights(
    tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    expected = encoder(tiny_encoder).embed(texts).vectors
    monkeypatch.setattr(models, "each", lambda device: [device, device])
    caplog.set_level(logging.INFO, "gristmill")
    made = encoder(tiny_encoder, workers=4)
    np.testing.assert_array_equal(made.embed(texts).vectors, expected)
    ways = {id(made.lanes.get().way.packed.embeddings) for _ in range(4)}
    assert len(ways) == 2 and "encoder: computes on cpu, cpu" in caplog.text


def gpus(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many GPUs as torch would find."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)


@pytest.mark.parametrize(
    ("n_gpus", "asked", "expected"),
    [
        (2, None, ["cuda:0", "cuda:1"]),
        (2, "cuda", ["cuda:0", "cuda:1"]),
        (2, "cuda:1", ["cuda:1"]),
        (1, None, ["cuda:0"]),
        (2, "cpu", ["cpu"]),
        (0, "cpu", ["cpu"]),
    ],
)
def test_the_devices_are_all_gpus_or_the_one_that_was_asked_for(
    n_gpus: int, asked: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
):
    gpus(n_gpus, monkeypatch)
    assert models.each(models.pick_device(asked)) == expected


def test_without_a_gpu_there_is_still_a_device_and_the_log_says_which(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    gpus(0, monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    caplog.set_level(logging.INFO, "gristmill")
    assert models.each(models.pick_device(None)) == ["cpu"] and "device: cpu (0 CUDA devices)" in caplog.text


@pytest.mark.parametrize("missing", ["cuda:2", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch):
    gpus(2, monkeypatch)
    with pytest.raises(UserError, match=f"^device {missing} is not here; torch finds cuda:0, cuda:1, "):
        models.pick_device(missing)


def test_three_threads_serve_each_gpu_unless_told_otherwise():
    assert forward.n_workers(config.Encoder(), ["cuda:0", "cuda:1"]) == 6
    assert forward.n_workers(config.Encoder(workers=4), ["cuda:0", "cuda:1"]) == 4
    assert forward.n_workers(config.Encoder(), ["cpu"]) == torch.get_num_threads()


# -- memory -----------------------------------------------------------------------------------------------------------


def small_memory(n_slots: int, way: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of more slots do not fit."""
    compute = way.__call__

    def limited(self: Any, rows: list[np.ndarray], batch_tokens: int) -> Any:
        slots = sum(map(len, rows)) if way is forward.Packs else len(rows) * max(map(len, rows))
        if slots > n_slots:
            raise torch.OutOfMemoryError(f"{slots} slots")
        return compute(self, rows, batch_tokens)

    monkeypatch.setattr(way, "__call__", limited)


@pytest.mark.parametrize(("engine", "way"), [("packed", forward.Packs), ("plain", forward.Padded)])
def test_memory_that_does_not_suffice_halves_the_tokens_for_good_and_changes_no_embedding(
    engine: str, way: type, tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    many = [*texts[:20], "short", ""]
    whole = encoder(tiny_encoder, engine=engine, workers=1, batch_tokens=800)
    expected = whole.embed(many).vectors
    small_memory(300, way, monkeypatch)
    made = encoder(tiny_encoder, engine=engine, workers=1, batch_tokens=800)
    np.testing.assert_allclose(made.embed(many).vectors, expected, atol=1e-5)
    assert made.effort.counts["halvings"] == 2 and made.lanes.get().batch_tokens == 200
    assert made.effort.counts["tokens"] == whole.effort.counts["tokens"], "what did not fit is not counted"


def test_one_lane_that_is_short_of_memory_leaves_the_others_alone(
    tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    made = encoder(tiny_encoder, workers=2, batch_tokens=800)
    short, other = lane(made), lane(made)
    small_memory(300, forward.Packs, monkeypatch)
    gathered(short.launch(made.read(texts[:20]).ids, made.effort))
    assert (short.batch_tokens, other.batch_tokens) == (200, 800)


def test_the_tokens_never_fall_below_one_window(tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch):
    small_memory(48, forward.Packs, monkeypatch)
    made = encoder(tiny_encoder, workers=1, batch_tokens=760)
    assert made.embed(["short", *texts[:5]]).tokens.max() == 48 and made.lanes.get().batch_tokens == 48


@pytest.mark.parametrize("engine", ["packed", "plain", "exact"])
def test_a_window_that_does_not_fit_alone_is_one_line(
    engine: str, tiny_encoder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    made = encoder(tiny_encoder, engine=engine, workers=1)
    made.ready()
    for way in (forward.Packs, forward.Padded):
        small_memory(40, way, monkeypatch)
    with pytest.raises(UserError, match=r"^encoder.max_tokens: a window of 48 tokens does not fit .* of cpu; set"):
        made.embed(texts[:5])


# -- a GPU itself -----------------------------------------------------------------------------------------------------


@NO_GPU
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_gives_the_embeddings_of_the_cpu(pooling: str, dtype: str, tiny_encoder: Path, texts: list[str]):
    expected = encoder(tiny_encoder, pooling=pooling).embed([*texts, ""]).vectors
    made = encoder(tiny_encoder, pooling=pooling, dtype=dtype, device="cuda", batch_tokens=1024)
    assert cosines(made.embed([*texts, ""]).vectors, expected).min() > 0.999
    able = dtype != "float32" and attention.has_varlen() and models.multiplies_bfloat16("cuda")
    assert isinstance(made.lanes.get().way, forward.Packs if able else forward.Padded)


@NO_GPU
def test_a_gpu_with_little_memory_takes_fewer_tokens_at_once(tiny_encoder: Path, texts: list[str]):
    made = encoder(tiny_encoder, engine="plain", device="cuda:0", batch_tokens=1_000_000, max_tokens=128)
    expected = encoder(tiny_encoder, max_tokens=128).embed(texts * 40).vectors
    made.embed(texts[:2])
    allowed = torch.cuda.memory_reserved(0) + 50_000_000
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory, 0)
    try:
        assert cosines(made.embed(texts * 40).vectors, expected).min() > 0.999
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert made.effort.counts["halvings"] > 0


@NO_GPU
@NO_VARLEN
def test_on_a_gpu_packs_are_launched_without_waiting_or_compiling_again(tiny_encoder: Path, texts: list[str]):
    made = encoder(tiny_encoder, dtype="bfloat16", device="cuda:0", batch_tokens=1024)
    only, ids = lane(made), made.read(texts).ids
    gathered(only.launch(ids, made.effort))
    assert only.way.packed.feed_slots != only.way.packed.feed, "compiled"
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            launched = list(only.launch(ids, made.effort))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(gathered(launched)).all()
