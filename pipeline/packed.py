"""Encoders of BERT's shape over packs: texts one after the other, so that no token of padding is computed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline import attention, models
from pipeline.attention import Attention
from pipeline.errors import needs
from pipeline.model_files import has_own_code
from pipeline.tokens import Ids

FAMILIES = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
"""Model types of one shape: learned positions, attention over all, normalisation after each block."""

ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}
"""Kind and approximation of activations, by transformers' name."""


class Pack(NamedTuple):
    """Texts one after the other."""

    ids: Any
    """(n_tokens,) int64"""
    positions: Any
    """(n_tokens,) int64, each text's from 0"""
    starts: Any
    """(n_texts + 1,) int32, where each begins, and the end; slots after it belong to no text"""
    longest: int
    """Tokens of the longest text."""


def pack_of(rows: Sequence[Ids], padding: int = -1) -> Pack:
    """A pack of the token ids of some texts; where these hold a padding token, it has no position but -1."""
    torch = needs("torch", "torch")
    lengths = np.array([len(row) for row in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate(rows).astype(np.int64)
    counted = np.cumsum(ids != padding)
    before = np.repeat(np.append(0, counted)[starts[:-1]], lengths)
    positions = np.where(ids != padding, counted - before - 1, -1)
    tensors = [torch.from_numpy(array) for array in (ids, positions, starts.astype(np.int32))]
    return Pack(tensors[0], tensors[1], tensors[2], int(lengths.max()))


def filled(pack: Pack, n_slots: int) -> Pack:
    """The pack with slots after its last text, so that all packs have one shape; what becomes of them is not read."""
    pad, more = needs("torch", "torch").nn.functional.pad, (0, n_slots - len(pack.ids))
    return pack._replace(ids=pad(pack.ids, more), positions=pad(pack.positions, more))


def packs(lengths: Sequence[int], pack_tokens: int) -> Iterator[list[int]]:
    """Indices in their order, in packs of at most `pack_tokens` tokens, or of one text."""
    pack: list[int] = []
    n_tokens = 0
    for i, length in enumerate(lengths):
        if pack and n_tokens + length > pack_tokens:
            yield pack
            pack, n_tokens = [], 0
        pack.append(i)
        n_tokens += length
    if pack:
        yield pack


# -- the model --------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One layer's weights."""

    qkv: "Linear"
    out: "Linear"
    norm: "Norm"
    up: "Linear"
    down: "Linear"
    last_norm: "Norm"


class Packed:
    """Token states of a transformers model of BERT's shape, pooled, pack by pack. Matrices are multiplied in `dtype`;
    normalisation keeps the weights that the model has, for there rounding would shift all scores alike."""

    def __init__(self, model: Any, pooling: str, dtype: Any) -> None:
        self.torch = needs("torch", "torch")
        config, weight = model.config, model.embeddings.word_embeddings.weight
        heads, dims = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.embeddings, self.hidden, self.dtype = model.embeddings, config.hidden_size, dtype
        self.padding = padding_of(model.embeddings)
        self.layers = [layer_of(layer, dtype) for layer in model.encoder.layer]
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attend: Attention = attention.pick(heads, dims, dtype, weight.device.type)
        self.pooling = pooling
        self.feed_slots: Callable[[Layer, Any, Any], Any] = self.feed
        """`feed` for all slots of a pack; may be compiled."""

    def __call__(self, pack: Pack) -> Any:
        """Embeddings (n_texts, hidden) float32."""
        x = self.embed(pack)
        for layer in self.layers[:-1]:
            x = self.feed_slots(layer, self.attended(layer, x, pack), x)
        last, attended = self.layers[-1], self.attended(self.layers[-1], x, pack)
        if self.pooling == "cls":  # no other token of the last layer is looked at
            first = pack.starts[:-1].long()
            return self.feed(last, attended[first], x[first]).float()
        states, lengths = self.feed_slots(last, attended, x).float(), pack.starts.diff().long()
        return self.torch.segment_reduce(states, "mean", lengths=lengths, unsafe=True)  # safe would wait for the GPU

    def embed(self, pack: Pack) -> Any:
        """Embeddings of the tokens before the first layer (n_tokens, hidden)."""
        tables = self.embeddings
        x = tables.word_embeddings(pack.ids) + tables.token_type_embeddings.weight[0]
        return tables.LayerNorm(x + tables.position_embeddings(pack.positions + self.padding + 1)).to(self.dtype)

    def attended(self, layer: Layer, x: Any, pack: Pack) -> Any:
        """What the layer's attention makes of each token (n_tokens, hidden)."""
        return self.attend(layer.qkv(x), pack.starts, pack.longest)

    def feed(self, layer: Layer, attended: Any, x: Any) -> Any:
        """The rest of the layer: each row by itself."""
        x = layer.norm(layer.out(attended, plus=x))
        return layer.last_norm(layer.down(layer.up(x, self.activation), plus=x))


class Linear:
    """Dense layers that read the same input, as one; in oneDNN's own layout where torch has it."""

    def __init__(self, dtype: Any, *parts: Any) -> None:
        self.torch = needs("torch", "torch")
        self.weight = self.torch.cat([part.weight.detach().to(dtype) for part in parts])
        self.bias = self.torch.cat([part.bias.detach().to(dtype) for part in parts])
        self.is_laid_out = lays_out(self.weight)
        if self.is_laid_out:
            self.weight = self.torch.ops.mkldnn._reorder_linear_weight(self.weight, TOKENS_TO_LAY_OUT_FOR)

    def __call__(self, x: Any, activation: tuple[str, str] | None = None, plus: Any = None) -> Any:
        """activation(x weight' + bias), or x weight' + bias + plus."""
        if self.is_laid_out:
            return self.by_onednn(x, activation, plus)
        y = self.torch.nn.functional.linear(x, self.weight, self.bias)
        if activation is not None:
            kind, approximate = activation
            functional = self.torch.nn.functional
            return functional.gelu(y, approximate=approximate) if kind == "gelu" else functional.relu(y)
        return y if plus is None else y + plus

    def by_onednn(self, x: Any, activation: tuple[str, str] | None, plus: Any) -> Any:
        """The same with one call, activation and addition included."""
        if len(x) == 1:  # alone, a row's products would be added up in another order than among others
            return self.by_onednn(x.repeat(2, 1), activation, None if plus is None else plus.repeat(2, 1))[:1]
        linear = self.torch.ops.mkldnn._linear_pointwise
        if plus is not None:
            return linear.binary(x, plus, self.weight, self.bias, "add")
        kind, algorithm = activation or ("none", "")
        return linear(x, self.weight, self.bias, kind, [], algorithm)


class Norm:
    """Layer normalisation with weights in float32 of states in any precision, which it keeps."""

    def __init__(self, module: Any) -> None:
        self.normalised = needs("torch", "torch").nn.functional.layer_norm
        weight, bias = (parameter.detach().float() for parameter in (module.weight, module.bias))
        self.further = (module.normalized_shape, weight, bias, module.eps)

    def __call__(self, x: Any) -> Any:
        """States (n, hidden), each row normalised."""
        if x.is_cuda:  # takes no weights of another precision
            return self.normalised(x.float(), *self.further).to(x.dtype)
        return self.normalised(x, *self.further)


TOKENS_TO_LAY_OUT_FOR = 4096
"""Rows that oneDNN chooses its layout for; any number may come."""


def lays_out(weight: Any) -> bool:
    """Whether torch's inductor operators for oneDNN are here, and work with this precision on this CPU."""
    torch = needs("torch", "torch")
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if weight.device.type != "cpu" or not there:
        return False
    return weight.dtype is torch.float32 or (
        weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def layer_of(layer: Any, dtype: Any) -> Layer:
    """The weights of a transformers layer."""
    own = layer.attention.self
    return Layer(
        qkv=Linear(dtype, own.query, own.key, own.value),
        out=Linear(dtype, layer.attention.output.dense),
        norm=Norm(layer.attention.output.LayerNorm),
        up=Linear(dtype, layer.intermediate.dense),
        down=Linear(dtype, layer.output.dense),
        last_norm=Norm(layer.output.LayerNorm),
    )


def padding_of(embeddings: Any) -> int:
    """The padding token that takes no position, and the place before the first, in RoBERTa and its kin; else -1."""
    padding = embeddings.position_embeddings.padding_idx
    return -1 if padding is None else int(padding)


# -- which models -----------------------------------------------------------------------------------------------------


def why_not(model: Any, dtype: Any) -> str | None:
    """Why sentence-transformers modules cannot run over packs in a precision; None if they can."""
    torch, auto = needs("torch", "torch"), model[0].auto_model
    config, device = auto.config, model.device
    if has_own_code(auto):
        return "it comes with code of its own"
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is another architecture than {', '.join(FAMILIES)}"
    odd = config.model_type == "electra" and config.embedding_size != config.hidden_size
    if odd or config.hidden_act not in ACTIVATIONS or getattr(config, "is_decoder", False):
        return f"its {config.model_type} is of an unusual kind"
    if pooling_of(model) is None:
        return "its pooling is neither cls nor mean"
    if device.type == "cuda":
        fits = dtype is not torch.float32 and attention.has_varlen() and flash_runs(device, config)
        return None if fits else "on CUDA packs need half precision, torch 2.10 or later, and an Ampere GPU or later"
    fits = device.type == "cpu" and dtype is not torch.float16
    return None if fits else f"not written for {device.type} in {dtype}"


def flash_runs(device: Any, config: Any) -> bool:
    """Whether a GPU and heads are such that FlashAttention 2, which torch's packed attention is, takes them."""
    built = needs("torch", "torch").backends.cuda.is_flash_attention_available()
    dims = config.hidden_size // config.num_attention_heads
    return built and models.multiplies_bfloat16(str(device)) and dims % 8 == 0 and dims <= 256


def pooling_of(model: Any) -> str | None:
    """cls or mean, where sentence-transformers modules pool so."""
    modules = list(model)
    named = [type(module).__name__ for module in modules]
    mode = modules[1].pooling_mode if named[1:2] == ["Pooling"] else None
    return mode if mode in ("cls", "mean") else None
