"""Attention within documents that lie one after the other, without padding between them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from pipeline.errors import needs

try:
    from pipeline import _attention
except ImportError:  # built where there is a C compiler
    _attention = None  # type: ignore[assignment]

Attention = Callable[[Any, Any, int], Any]
"""Queries, keys and values side by side (n_tokens, 3 hidden), where documents start (n_documents + 1,) int32, and the
longest one's tokens; to (n_tokens, hidden)."""


def pick(n_heads: int, dims: int, dtype: Any, device: str) -> Attention:
    """The fastest attention here for heads of so many dimensions."""
    torch = needs("torch", "torch")
    if device.startswith("cuda") and dtype is not torch.float32 and has_varlen():
        return varlen(n_heads)
    if device == "cpu" and dtype is torch.bfloat16 and native_is_there() and dims % 32 == 0:
        return native(n_heads)
    return by_document(n_heads)


def native_is_there() -> bool:
    """Whether the kernel was built, and runs on this CPU."""
    return _attention is not None and _attention.is_supported()


def native(n_heads: int) -> Attention:
    """Our own kernel (_attention.c): bfloat16 on CPUs with AVX512-BF16, scores in float32."""

    def attend(qkv: Any, starts: Any, _: int) -> Any:
        hidden = qkv.shape[1] // 3
        qkv, out = qkv.contiguous(), qkv.new_empty(qkv.shape[0], hidden)
        dims = hidden // n_heads
        addresses = (qkv.data_ptr(), out.data_ptr(), starts.data_ptr())
        _attention.attend(*addresses, len(starts) - 1, n_heads, dims, dims**-0.5)
        return out

    return attend


def by_document(n_heads: int) -> Attention:
    """torch's own attention, a document at a time; anywhere, in any precision."""
    attention = needs("torch", "torch").nn.functional.scaled_dot_product_attention

    def attend(qkv: Any, starts: Any, _: int) -> Any:
        heads = qkv.view(len(qkv), 3, n_heads, -1).permute(1, 2, 0, 3)
        out = qkv.new_empty(qkv.shape[0], n_heads, heads.shape[-1])
        for begin, end in pairwise(starts.tolist()):
            q, k, v = heads[:, None, :, begin:end]
            out[begin:end] = attention(q, k, v)[0].transpose(0, 1)
        return out.flatten(1)

    return attend


def has_varlen() -> bool:
    """Whether this torch has attention over packed sequences (2.10 and later)."""
    return hasattr(needs("torch", "torch").nn, "attention") and bool(varlen_attn())


def varlen_attn() -> Any:
    """torch.nn.attention.varlen.varlen_attn; None where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn as found
    except ImportError:
        return None
    return found


def varlen(n_heads: int) -> Attention:
    """torch's attention over packed sequences: CUDA, in half precision."""
    attention = varlen_attn()

    def attend(qkv: Any, starts: Any, longest: int) -> Any:
        q, k, v = qkv.view(len(qkv), 3, n_heads, -1).unbind(1)
        return attention(q, k, v, starts, starts, longest, longest).flatten(1)

    return attend
