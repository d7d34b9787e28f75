"""Attention within each document of a pack, whoever computes it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline import attention

LENGTHS = [[1], [7], [8, 9], [31, 32, 33], [64, 1, 100], [5] * 40, [513, 16]]


def pack(lengths: list[int], n_heads: int, dims: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random queries, keys and values, and where the documents start."""
    starts = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    made = torch.Generator().manual_seed(len(lengths))
    return torch.randn(sum(lengths), 3 * n_heads * dims, generator=made).mul(1.5).to(dtype), starts


def exactly(qkv: torch.Tensor, starts: torch.Tensor, n_heads: int) -> torch.Tensor:
    """softmax(q k' / sqrt(dims)) v in double precision."""
    found = []
    for begin, end in pairwise(starts.tolist()):
        q, k, v = qkv[begin:end].double().view(end - begin, 3, n_heads, -1).permute(1, 2, 0, 3)
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
        found.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat(found)


@pytest.fixture(params=["native", "by_document"])
def way(request: pytest.FixtureRequest):
    if request.param == "native" and not attention.native_is_there():
        pytest.skip("the kernel was not built, or this CPU has no AVX512-BF16")
    return getattr(attention, request.param)


@pytest.mark.parametrize("dims", [32, 64, 96])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bfloat16_is_as_good_as_its_rounding(way, lengths: list[int], dims: int):
    qkv, starts = pack(lengths, 3, dims, torch.bfloat16)
    expected = exactly(qkv, starts, 3)
    found = way(3)(qkv, starts, max(lengths))
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert (found - expected).abs().max() < 2**-7 * expected.abs().max() + 1e-3


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_float32_is_exact_but_for_its_rounding(lengths: list[int]):
    qkv, starts = pack(lengths, 2, 16, torch.float32)
    torch.testing.assert_close(
        attention.by_document(2)(qkv, starts, max(lengths)).double(), exactly(qkv, starts, 2), atol=1e-5, rtol=1e-5
    )


def test_a_document_never_sees_its_neighbours(way):
    qkv, starts = pack([40, 70, 3], 2, 32, torch.bfloat16)
    alone = way(2)(qkv[40:110].contiguous(), torch.tensor([0, 70], dtype=torch.int32), 70)
    assert torch.equal(way(2)(qkv, starts, 70)[40:110], alone)


@pytest.mark.parametrize("size", [1e-6, 30.0, 200.0])
def test_large_and_small_scores_neither_overflow_nor_vanish(way, size: float):
    qkv, starts = pack([50, 20], 2, 32, torch.bfloat16)
    qkv = (qkv * size).contiguous()
    found, expected = way(2)(qkv, starts, 50), exactly(qkv, starts, 2)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() < 2**-6 * expected.abs().max()


def test_what_is_not_a_number_stays_so(way):
    qkv, starts = pack([9, 9], 1, 32, torch.bfloat16)
    qkv[3] = float("nan")
    found = way(1)(qkv, starts, 9)
    assert torch.isnan(found[:9]).any() and torch.isfinite(found[9:]).all()


@pytest.mark.parametrize(
    "n_dims, dtype, device, there, expected",
    [
        (32, torch.bfloat16, "cpu", True, "native"),
        (16, torch.bfloat16, "cpu", True, "by_document"),
        (32, torch.float32, "cpu", True, "by_document"),
        (32, torch.bfloat16, "cpu", False, "by_document"),
        (32, torch.float32, "cuda", True, "by_document"),
        (32, torch.bfloat16, "cuda", True, "varlen"),
    ],
)
def test_the_fastest_that_fits_is_picked(monkeypatch: pytest.MonkeyPatch, n_dims, dtype, device, there, expected):
    monkeypatch.setattr(attention, "native_is_there", lambda: there)
    assert attention.pick(2, n_dims, dtype, device).__qualname__.startswith(expected)


def test_the_kernel_refuses_heads_it_was_not_written_for():
    kernel = pytest.importorskip("pipeline._attention", reason="the kernel was not built")
    with pytest.raises(ValueError, match="multiple of 32"):
        kernel.attend(0, 0, 0, 0, 1, 16, 1.0)
