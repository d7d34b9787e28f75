"""Texts as windows of tokens, each with the encoder's special tokens around it."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import models
from pipeline.tokens import Ids, Reader

How = Literal["first", "spread", "all"]

PIECE = 1_000_000
"""Characters that are tokenised at once."""
FEW = 6
"""Characters per token of a first cut where it changes no token: more than nearly all texts have."""
MANY = 64
"""Characters per token of a first cut where it may change the last tokens before it."""


class Windows(NamedTuple):
    """The windows of some texts, in the order of the texts."""

    ids: list[Ids]
    """Token ids of each window, special ones included."""
    owners: NDArray[np.int64]
    """(n_windows,) index of the text each window is of, rising; every text has at least one."""
    truncated: NDArray[np.bool_]
    """(n_texts,) whether not all tokens of the text are in a window."""

    @property
    def firsts(self) -> list[Ids]:
        """The token ids of each text's first window."""
        return [self.ids[i] for i in np.flatnonzero(np.diff(self.owners, prepend=-1))]


def of_texts(read: Windows, chosen: NDArray[np.bool_]) -> Windows:
    """The windows of some of the texts (n_texts,)."""
    inside = chosen[read.owners]
    ids = [row for row, is_inside in zip(read.ids, inside, strict=True) if is_inside]
    return Windows(ids, (np.cumsum(chosen) - 1)[read.owners[inside]], read.truncated[chosen])


def cut(texts: Sequence[str], read_by: Reader, max_tokens: int, how: How) -> Windows:
    """The windows of each text, of at most `max_tokens` tokens with the special ones."""
    before, after = read_by.before, read_by.after
    room = max(max_tokens - len(before) - len(after), 1)
    read = beginnings(texts, room, read_by) if how == "first" else whole(texts, read_by)
    ids: list[Ids] = []
    owners: list[int] = []
    truncated = np.zeros(len(texts), np.bool_)
    for i, tokens in enumerate(read):
        begins = starts(len(tokens), room, how)
        parts = [tokens[begin : begin + room] for begin in begins] if len(tokens) else [read_by.blank]
        ids += [np.concatenate([before, part, after]) for part in parts]
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


def beginnings(texts: Sequence[str], room: int, read_by: Reader) -> list[Ids]:
    """Of each text its tokens, or at least one more than `room` of them, whatever its length: a prefix is tokenised,
    and one of twice the length as long as it gives too few."""
    found = [np.empty(0, np.int32)] * len(texts)
    enough = room + models.CUT_REACHES
    characters = (FEW if read_by.spaces else MANY) * enough
    left = list(range(len(texts)))
    while left:
        pieces = [prefix(texts[i], characters, read_by, anywhere=characters >= MANY * room) for i in left]
        for i, ids in zip(left, read_by.ids(pieces), strict=True):
            found[i] = ids
        cut_short = [i for i, piece in zip(left, pieces, strict=True) if len(piece) < len(texts[i])]
        left = [i for i in cut_short if len(found[i]) <= enough]
        characters *= 2
    return found


def prefix(text: str, characters: int, read_by: Reader, anywhere: bool) -> str:
    """At most so many first characters, cut where that changes no token; where there is no such place, none of them,
    or up to any space if `anywhere` will do, which is where only runs of thousands of characters can differ."""
    if len(text) <= characters:
        return text
    return read_by.prefix(text, characters) or (models.cut_at_space(text, characters) if anywhere else "")


def whole(texts: Sequence[str], read_by: Reader) -> Iterator[Ids]:
    """All tokens of each text; a very long one is tokenised piece by piece, so that time and memory grow with it."""
    of_short = iter(read_by.ids([text for text in texts if len(text) <= PIECE]))
    for text in texts:
        short = len(text) <= PIECE
        yield next(of_short) if short else np.concatenate(list(long_ids(text, read_by)))


def long_ids(text: str, read_by: Reader) -> Iterator[Ids]:
    """The tokens of each piece of a text."""
    return (ids for piece in pieces_of(text) for ids in read_by.ids([piece]))


def pieces_of(text: str) -> Iterator[str]:
    """The text in pieces that end between words where they can."""
    begin = 0
    while begin < len(text):
        piece = models.cut_at_space(text[begin : begin + PIECE + 1], PIECE)
        yield piece
        begin += len(piece)
