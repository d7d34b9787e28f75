"""How well a language model predicts texts: nats, tokens and bytes of each document."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError, needs
from pipeline.metrics import Interval
from pipeline.tracking import Step

BATCH_TOKENS = 8192
"""Tokens of a batch at most, padding included."""
BATCH_LOGITS = 2**26
"""Logits of a batch at most: 256 MiB in float32, where one window alone does not have more."""


class Predicted(NamedTuple):
    """Of each document (n,): the sum of -ln P of its tokens, how many these are, and its bytes in UTF-8."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    n_bytes: NDArray[np.int64]

    @property
    def perplexity(self) -> float:
        """exp of the mean nats a token; comparable between models with the same tokenizer only."""
        return math.exp(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text, whatever the tokenizer (arXiv:2101.00027, section 3.1)."""
        return float(self.nats.sum() / math.log(2) / self.n_bytes.sum())


def predict(
    model: Any, tokenizer: Any, texts: Sequence[str], max_length: int, step: Step = lambda _: None
) -> Predicted:
    """Read each document in windows of `max_length` tokens, one after the other, each after a token that begins or
    ends a text, so that every token of the document is predicted once."""
    torch = needs("torch", "torch")
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # tokenizers take no lone surrogates
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if start is None:
        raise UserError("perplexity: the tokenizer has neither a begin nor an end token to predict the first one from")
    windows = [
        (document, [start, *ids[begin : begin + max_length - 1]])
        for document, ids in enumerate(tokenize(tokenizer, texts))
        for begin in range(0, len(ids), max_length - 1)
    ]
    windows.sort(key=lambda window: -len(window[1]))
    nats, tokens = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    was_training, device = model.training, model.device
    model.eval()
    with torch.inference_mode():
        for batch in batches(windows, min(BATCH_TOKENS, BATCH_LOGITS // len(tokenizer))):
            found = read(torch, model, [ids for _, ids in batch], device)
            for (document, ids), each in zip(batch, found, strict=True):
                nats[document] += each
                tokens[document] += len(ids) - 1
            step(len(batch))
    model.train(was_training)
    if not np.isfinite(nats).all():
        raise UserError("perplexity: the model gives some texts no probability; train it with a lower learning_rate")
    return Predicted(nats, tokens, np.array([len(text.encode()) for text in texts], dtype=np.int64))


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without those that begin or end it."""
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return list(found)


def batches(windows: list[tuple[int, list[int]]], most: int) -> list[list[tuple[int, list[int]]]]:
    """Windows of falling length, together as long as they fit into so many tokens; a longer one alone."""
    found: list[list[tuple[int, list[int]]]] = []
    for window in windows:
        if found and len(found[-1][0][1]) * (len(found[-1]) + 1) <= most:
            found[-1].append(window)
        else:
            found.append([window])
    return found


def read(torch: Any, model: Any, rows: list[list[int]], device: Any) -> list[float]:
    """-ln P of all tokens but the first of each row."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return [row_nats(torch, logits[i], ids[i], len(row)) for i, row in enumerate(rows)]


def row_nats(torch: Any, logits: Any, ids: Any, length: int) -> float:
    """-ln P of all tokens but the first; row by row, as in float32 the logits of a batch take much memory."""
    loss = torch.nn.functional.cross_entropy(logits[: length - 1].float(), ids[1:length], reduction="none")
    return float(loss.double().sum())


def gain_interval(
    figure: Callable[[Predicted], float], before: Predicted, after: Predicted, n: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap 95% interval of figure(after) - figure(before) over the same documents, drawn in pairs."""
    rng, size = np.random.default_rng(seed), len(before.nats)
    draws = rng.integers(0, size, (n, size))
    gains = [figure(chosen(after, rows)) - figure(chosen(before, rows)) for rows in draws]
    low, high = np.quantile(gains, [0.025, 0.975])
    return float(low), float(high)


def chosen(found: Predicted, rows: NDArray[np.int64]) -> Predicted:
    """Of some documents."""
    return Predicted(found.nats[rows], found.tokens[rows], found.n_bytes[rows])
