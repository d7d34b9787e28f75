"""A document is read as windows of tokens; what is left out is counted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline import windows
from pipeline.tokens import reader


@pytest.fixture(scope="module", params=["tiny_encoder", "tiny_causal", "tiny_t5"])
def tokenizer(request: pytest.FixtureRequest):
    """WordPiece with tokens around, byte-level BPE without any, unigram with one at the end."""
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize(
    ("n_tokens", "first", "spread", "every"),
    [
        (0, [0], [0], [0]),
        (10, [0], [0], [0]),
        (15, [0], [0, 10], [0, 10]),
        (30, [0], [0, 10, 20], [0, 10, 20]),
        (31, [0], [0, 10, 21], [0, 10, 20, 30]),
        (100, [0], [0, 45, 90], [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),
    ],
)
def test_where_the_windows_of_ten_tokens_begin(n_tokens: int, first: list, spread: list, every: list):
    assert windows.starts(n_tokens, 10, "first") == first
    assert windows.starts(n_tokens, 10, "spread") == spread
    assert windows.starts(n_tokens, 10, "all") == every


@given(st.integers(0, 5000), st.integers(1, 600), st.sampled_from(["first", "spread", "all"]))
def test_windows_never_overlap_and_leave_out_only_what_they_must(n_tokens: int, room: int, how: windows.How):
    begins = windows.starts(n_tokens, room, how)
    lengths = [min(room, n_tokens - begin) for begin in begins]
    assert begins[0] == 0 and (n_tokens == 0 or min(lengths) > 0)
    assert all(a + room <= b for a, b in pairwise(begins))
    n_most = {"first": 1, "spread": 3, "all": n_tokens + 1}[how]
    assert len(begins) == max(1, min(n_most, -(-n_tokens // room)))
    assert sum(lengths) == min(n_tokens, len(begins) * room)
    assert how == "first" or n_tokens == 0 or begins[-1] + lengths[-1] == n_tokens


@pytest.mark.parametrize("how", ["first", "spread", "all"])
def test_windows_hold_the_documents_own_tokens_between_special_ones(tokenizer, texts: list[str], how: windows.How):
    mixed = [texts[0], "short", "", "\n".join(texts[1:5]), texts[5][:200]]
    found = windows.cut(mixed, reader(tokenizer), 64, how)
    before, after = windows.models.special_tokens_around(tokenizer)
    room = 64 - len(before) - len(after)
    assert found.owners.tolist() == sorted(found.owners.tolist()) and set(found.owners) == set(range(len(mixed)))
    for i, text in enumerate(mixed):
        own = [ids.tolist() for ids, owner in zip(found.ids, found.owners, strict=True) if owner == i]
        tokens = plain(tokenizer, text)
        begins = windows.starts(len(tokens), room, how)
        assert own == [before + tokens[begin : begin + room] + after for begin in begins] or not tokens
        assert found.truncated[i] == (len(begins) * room < len(tokens))


@pytest.mark.parametrize("how", ["first", "spread", "all"])
def test_a_text_without_tokens_is_what_stands_around_texts_or_one_unknown_token(tokenizer, how: windows.How):
    (ids,) = windows.cut([""], reader(tokenizer), 64, how).ids
    before, after = windows.models.special_tokens_around(tokenizer)
    unknown = next(id for id in (tokenizer.unk_token_id, tokenizer.eos_token_id) if id is not None)
    assert ids.tolist() == ([*before, *after] or [unknown])


def test_documents_that_are_cut_are_counted_by_what_is_read(tokenizer, texts: list[str]):
    mixed = ["short", texts[0], "\n".join(texts[:9])]
    counted = {
        how: windows.cut(mixed, reader(tokenizer), 512, how).truncated.tolist() for how in ("first", "spread", "all")
    }
    assert counted["first"][0::2] == [False, True] and counted["spread"] == [False, False, True]
    assert counted["all"] == [False, False, False]


def test_a_very_long_document_is_tokenised_in_pieces_to_the_same_tokens(tokenizer, texts: list[str], monkeypatch):
    monkeypatch.setattr(windows, "PIECE", 1000)
    long = " ".join(" ".join(texts[:20]).split())
    found = windows.whole([texts[0], long, "short"], reader(tokenizer))
    assert [ids.tolist() for ids in found] == [plain(tokenizer, text) for text in (texts[0], long, "short")]
    assert len(long) > 10_000 and max(map(len, windows.pieces_of(long))) <= 1000


@given(st.text(alphabet="ab \n\u3000", max_size=60), st.integers(2, 20))
def test_pieces_are_the_whole_text(text: str, size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "PIECE", size)
        found = list(windows.pieces_of(text))
    assert "".join(found) == text and all(len(piece) <= size for piece in found)


def test_the_first_window_of_a_run_without_spaces_is_full(tokenizer):
    (ids,) = windows.cut(["\U0001f600" * 100_000], reader(tokenizer), 64, "first").ids
    assert len(ids) == 64 or len(np.unique(ids)) <= 4  # WordPiece makes one unknown word of it
