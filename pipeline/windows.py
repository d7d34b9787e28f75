"""Texts as windows of tokens, each with the encoder's special tokens around it."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import models

How = Literal["first", "spread", "all"]
Ids = NDArray[np.int32]

PIECE = 1_000_000
"""Characters that are tokenised at once."""


class Windows(NamedTuple):
    """The windows of some texts, in the order of the texts."""

    ids: list[Ids]
    """Token ids of each window, special ones included."""
    owners: NDArray[np.int64]
    """(n_windows,) index of the text each window is of, rising; every text has at least one."""
    truncated: NDArray[np.bool_]
    """(n_texts,) whether not all tokens of the text are in a window."""


def cut(texts: Sequence[str], tokenizer: Any, max_tokens: int, how: How) -> Windows:
    """The windows of each text, of at most `max_tokens` tokens with the special ones."""
    before, after = (np.array(ids, np.int32) for ids in models.special_tokens_around(tokenizer))
    room = max(max_tokens - len(before) - len(after), 1)
    read = beginnings(texts, room, tokenizer) if how == "first" else whole(texts, tokenizer)
    ids: list[Ids] = []
    owners: list[int] = []
    truncated = np.zeros(len(texts), np.bool_)
    for i, tokens in enumerate(read):
        begins = starts(len(tokens), room, how)
        ids += [np.concatenate([before, tokens[begin : begin + room], after]) for begin in begins]
        owners += [i] * len(begins)
        truncated[i] = len(begins) * room < len(tokens)
    return Windows(ids, np.array(owners, np.int64), truncated)


def starts(n_tokens: int, room: int, how: How) -> list[int]:
    """Where the windows of `room` tokens begin in a text of so many: its first; those at begin, middle and end; or
    one after the other until the end. None overlap, only the last may be shorter, and a text of none has one."""
    if how == "first":
        return [0]
    if how == "spread" and n_tokens > 3 * room:
        return [0, (n_tokens - room) // 2, n_tokens - room]
    return list(range(0, max(n_tokens, 1), room))


def beginnings(texts: Sequence[str], room: int, tokenizer: Any) -> Iterator[Ids]:
    """Of each text its tokens, or at least one more than `room` of them, whatever its length."""
    pieces = [models.cut_at_space(text, 64 * room) for text in texts]
    for text, piece, ids in zip(texts, pieces, token_ids(pieces, tokenizer), strict=True):
        enough = len(piece) == len(text) or len(ids) > room + models.CUT_REACHES
        yield ids if enough else np.array(models.first_tokens(text, room + 1, tokenizer)[0], np.int32)


def whole(texts: Sequence[str], tokenizer: Any) -> Iterator[Ids]:
    """All tokens of each text; a very long one is tokenised piece by piece, so that time and memory grow with it."""
    of_short = token_ids([text for text in texts if len(text) <= PIECE], tokenizer)
    for text in texts:
        short = len(text) <= PIECE
        yield next(of_short) if short else np.concatenate(list(long_ids(text, tokenizer)))


def long_ids(text: str, tokenizer: Any) -> Iterator[Ids]:
    """The tokens of each piece of a text."""
    return (ids for piece in pieces_of(text) for ids in token_ids([piece], tokenizer))


def token_ids(texts: Sequence[str], tokenizer: Any) -> Iterator[Ids]:
    """The tokens of each text, without special ones."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return (np.array(row, np.int32) for row in rows)


def pieces_of(text: str) -> Iterator[str]:
    """The text in pieces that end between words where they can."""
    begin = 0
    while begin < len(text):
        piece = models.cut_at_space(text[begin : begin + PIECE + 1], PIECE)
        yield piece
        begin += len(piece)
