"""A tokenizer for several threads, which knows where a text can be cut without changing its tokens."""

import copy
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import models
from pipeline.formats import without_surrogates

Ids = NDArray[np.int32]

LOCK = threading.Lock()
"""Held while a Hugging Face tokenizer is called: each call sets padding and truncation for every thread."""
NOWHERE = re.compile(r"(?!)")


@dataclass(frozen=True)
class Reader:
    """The tokens of texts; any number of threads may use it at once."""

    encode: Callable[[Sequence[str]], Iterable[Sequence[int]]]
    """Token ids of each text, without special ones."""
    before: Ids
    """The special tokens before a text."""
    after: Ids
    """The special tokens after a text."""
    blank: Ids
    """What a text without tokens is read as: nothing, or where there are no special tokens either, one unknown."""
    spaces: str
    """The spaces before which a text can be cut without changing its tokens; none where that is not known."""

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text, without special ones; lone surrogates, which no tokenizer takes, as U+FFFD."""
        try:
            rows = self.encode(texts)
        except TypeError:
            rows = self.encode(without_surrogates(list(texts)))
        return [np.array(row, np.int32) for row in rows]

    def prefix(self, text: str, characters: int) -> str:
        """A prefix that has the tokens of the whole text, of at most so many characters and at least half of them; or
        none. It ends in a word, which no normalizer strips or turns into space, or in its full stop or comma."""
        end = re.compile(rf"(?s).*[\w.,\u3002\uff0c](?=[{self.spaces}])") if self.spaces else NOWHERE
        found = end.match(text, characters // 2, characters + 1)
        return text[: found.end()] if found else ""


def reader(tokenizer: Any) -> Reader:
    """Reads as a Hugging Face tokenizer does, by a copy of its fast part or, if it has none, by one call at a time."""
    with LOCK:
        before, after = (np.array(ids, np.int32) for ids in models.special_tokens_around(tokenizer))
        around = before, after, blank(tokenizer)[: not len(before) + len(after)]
        if not hasattr(tokenizer, "backend_tokenizer"):
            return Reader(functools.partial(slow, tokenizer), *around, "")
        own = copy.deepcopy(tokenizer.backend_tokenizer)
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = tokenizer.split_special_tokens
    return Reader(functools.partial(fast, own), *around, cutting_spaces(json.loads(own.to_str())))


def blank(tokenizer: Any) -> Ids:
    """One token that says nothing."""
    ids = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return np.array([next(id for id in ids if id is not None)], np.int32)


def fast(own: Any, texts: Sequence[str]) -> Iterable[list[int]]:
    """Token ids of each text by a tokenizer of the `tokenizers` library."""
    return (encoding.ids for encoding in own.encode_batch_fast(texts, add_special_tokens=False))


def slow(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by a tokenizer that is written in Python."""
    with LOCK:
        return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


# -- where a text can be cut ------------------------------------------------------------------------------------------

NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend"}
NORMALIZERS |= {"Strip", "StripAccents"}
"""They change a character by itself or with its accents, or the ends of a text."""
REPLACED = {(" ", "▁"), (" {2,}", " "), (" {2,}", "▁"), ("``", '"'), ("''", '"')}
"""What a Replace may replace: no pattern begins before a space and ends after it."""
SPLIT_AT_ANY_SPACE = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel"}
SPLITTERS = SPLIT_AT_ANY_SPACE | {"Metaspace", "Digits", "Punctuation"}
"""How they split what is before a space depends on nothing after it."""


def cutting_spaces(tokenizer: dict[str, Any]) -> str:
    """Of space and line break those before which tokens always end, by a tokenizer.json; none if it holds a part that
    is not known here, such as a regular expression of its own."""
    normalizers, splitters = steps(tokenizer["normalizer"]), steps(tokenizer["pre_tokenizer"])
    phrases = [token for token in tokenizer["added_tokens"] if len(token["content"].replace("▁", " ").split()) > 1]
    if phrases or not all(map(is_known, normalizers + splitters)):
        return ""
    kinds = {step["type"] for step in splitters if step.get("split", True) and step.get("use_regex", True)}
    at_any_space = kinds & SPLIT_AT_ANY_SPACE
    if "Metaspace" in kinds:
        return " \n" if at_any_space else " "
    replaces = any(step["type"] == "Replace" for step in normalizers)
    return " \n" if at_any_space and not replaces else spaces_within_no_token(tokenizer)


def steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The normalizers or pre-tokenizers of a sequence, which may hold sequences, or of one alone, or none."""
    if part is None or part["type"] != "Sequence":
        return [part] if part else []
    return [step for inner in part.get("normalizers") or part.get("pretokenizers", ()) for step in steps(inner)]


def is_known(step: dict[str, Any]) -> bool:
    """Whether a normalizer or pre-tokenizer treats what is before a space alike, whatever comes after."""
    if step["type"] == "Replace":
        return (*step["pattern"].values(), step["content"]) in REPLACED
    if step["type"] == "Split":
        return bool(step["pattern"] == {"String": " "})
    return step["type"] in NORMALIZERS | SPLITTERS and step.get("replacement", "▁") == "▁"


def spaces_within_no_token(tokenizer: dict[str, Any]) -> str:
    """Of space and line break those that only begin tokens: neither merges nor the best path then reach across, even
    where whole texts are one word. An unknown part would, in WordPiece, make the whole word unknown."""
    model, splitters = tokenizer["model"], steps(tokenizer["pre_tokenizer"])
    in_bytes = any(step["type"] == "ByteLevel" for step in splitters)
    if model["type"] not in {"BPE", "Unigram"} or in_bytes or model.get("end_of_word_suffix"):
        return ""
    tokens = "\0".join(token if isinstance(token, str) else token[0] for token in model["vocab"])
    written = {" ": " ▁", "\n": " ▁\n"}
    return "".join(space for space in written if not re.search(rf"[^\s▁\0][{written[space]}]", tokens))
