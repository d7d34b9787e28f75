import random

import numpy as np
import pytest

from pipeline import splits
from pipeline.config import Train


@pytest.fixture(scope="module")
def many(texts: list[str]) -> list[str]:
    """Three hundred distinct real pieces of text."""
    pieces = [text[start : start + 300] for text in texts for start in range(0, 1200, 200)]
    return list(dict.fromkeys(piece for piece in pieces if len(piece) > 250))[:300]


def split(
    texts: list[str],
    strata: list | None = None,
    groups: list | None = None,
    rounds: list[int] | None = None,
    seed: int = 0,
    **settings: object,
) -> splits.Split:
    n = len(texts)
    train = Train.model_validate(settings)
    return splits.split(texts, strata or [0] * n, groups or [None] * n, rounds or [0] * n, train, seed)


def retyped(text: str, n_words: int, seed: int = 0) -> str:
    """The text with some words exchanged."""
    words, rng = text.split(" "), random.Random(seed)
    for i in rng.sample(range(len(words)), n_words):
        words[i] = f"word{i}"
    return " ".join(words)


def test_every_document_has_a_part_and_each_part_its_share(many: list[str]):
    found = split(many, near_duplicates=None)
    assert {part: int((found.parts == part).sum()) for part in splits.PARTS} == {
        "train": 195,
        "validation": 45,
        "test": 60,
    }
    assert found.n_near_duplicates == 0


def test_trap_12_copies_never_cross(many: list[str]):
    found = split([*many, *many[:50]], near_duplicates=None)
    assert found.parts[:50].tolist() == found.parts[300:].tolist()
    assert found.n_near_duplicates == 50


def test_near_duplicates_never_cross_and_texts_less_alike_are_told_apart(texts: list[str]):
    near = [retyped(text, 2) for text in texts]
    far = [retyped(text, len(text.split(" ")) // 3) for text in texts]
    shared = [splits.jaccard(splits.grams(text), splits.grams(other)) for text, other in zip(texts, near, strict=True)]
    alike = np.array(shared) >= 0.8
    assert alike.sum() > 30
    found = split([*texts, *near])
    n = len(texts)
    assert (found.units[:n] == found.units[n:])[alike].all() and (found.parts[:n] == found.parts[n:])[alike].all()
    assert found.n_near_duplicates == alike.sum()
    apart = split([*texts, *far])
    assert apart.n_near_duplicates == 0 and (apart.units[:n] != apart.units[n:]).all()


def test_the_comparison_can_be_turned_off_but_copies_still_hold_together(texts: list[str]):
    found = split([*texts, *(retyped(text, 1) for text in texts), texts[0]], near_duplicates=None)
    assert found.n_near_duplicates == 1 and found.units[0] == found.units[-1]
    assert len(set(found.units.tolist())) == 2 * len(texts)


def test_chains_of_near_duplicates_hang_together():
    words = [f"w{i}" for i in range(100)]
    chain = [" ".join(words[start : start + 60]) for start in (0, 4, 8, 12, 16)]
    assert splits.jaccard(splits.grams(chain[0]), splits.grams(chain[-1])) < 0.8
    assert len(set(split([*chain, "another text", "and one more"]).units[:5].tolist())) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ok", "ok", True),
        ("ok", "no", False),
        ("The cat sat.", "the cat  sat.", True),
        ("机器学习是人工智能的一个分支" * 3, "机器学习是人工智能的一个分支" * 3 + "。", True),
        ("机器学习是人工智能的一个分支", "今天天气很好我们去公园散步吧", False),
        ("!!!", "???", False),
        ("", "x", False),
    ],
)
def test_short_texts_and_those_without_spaces_are_compared_by_characters(one: str, other: str, same: bool):
    assert (splits.jaccard(splits.grams(one), splits.grams(other)) >= 0.8) == same


def test_groups_never_cross_and_link_what_they_share(many: list[str]):
    groups = [f"site {i % 40}" if i < 200 else None for i in range(300)]
    found = split(many, groups=groups)
    for site in range(40):
        assert len({found.parts[i] for i in range(200) if i % 40 == site}) == 1
    linked = split([*many[:3], many[0]], groups=["a", "b", "b", "b"])
    assert len(set(linked.units.tolist())) == 1


def test_a_group_too_large_for_a_small_part_is_learned_from(many: list[str]):
    found = split(many, groups=["big" if i < 150 else None for i in range(300)], near_duplicates=None)
    assert set(found.parts[:150]) == {"train"}
    assert {part: int((found.parts == part).sum()) for part in ("validation", "test")} == {
        "validation": 45,
        "test": 60,
    }


def test_each_part_has_its_share_of_each_stratum(many: list[str]):
    strata = [5 if i % 15 == 0 else i % 3 for i in range(300)]
    parts = split(many, strata).parts
    for stratum, n in ((5, 20), (0, 80), (1, 100), (2, 100)):
        n_test = sum(part == "test" for part, at in zip(parts, strata, strict=True) if at == stratum)
        assert abs(n_test - 0.2 * n) <= 1.5, stratum


def test_trap_14_a_stratum_with_one_member_or_none_known_is_no_crash(many: list[str]):
    parts = split(many, ["rare", None, *["common"] * 298]).parts
    assert set(parts) == set(splits.PARTS)


def test_the_split_is_seeded_and_does_not_depend_on_the_order(many: list[str]):
    strata = list(range(300))
    parts = dict(zip(many, split(many, [i % 6 for i in strata]).parts, strict=True))
    backwards = split(many[::-1], [i % 6 for i in strata[::-1]]).parts
    assert dict(zip(many[::-1], backwards, strict=True)) == parts
    other = dict(zip(many, split(many, [i % 6 for i in strata], seed=1).parts, strict=True))
    assert parts != other


def test_later_rounds_change_no_part_of_the_sample_and_never_touch_what_is_judged(many: list[str]):
    copies = [retyped(text, 1) for text in many[:200]]
    added = [*copies, *many[200:]]
    found = split([*many[:200], *added], rounds=[0] * 200 + [1] * len(added), near_duplicates=0.6)
    np.testing.assert_array_equal(found.parts[:200], split(many[:200], near_duplicates=0.6).parts)
    near = found.units[:200] == found.units[200:400]
    assert near.sum() > 150
    for part, copy in zip(found.parts[:200][near], found.parts[200:400][near], strict=True):
        assert copy == ("train" if part == "train" else splits.ASIDE)
    assert set(found.parts[400:]) == {"train"}


def test_folds_hold_units_together_and_spread_strata():
    units = np.repeat(np.arange(100), 2)
    strata = [int(unit >= 90) for unit in units]
    folds = splits.folds(units, strata, 5, seed=0)
    assert np.bincount(folds).tolist() == [40] * 5
    assert all(len(set(folds[units == unit].tolist())) == 1 for unit in range(100))
    assert np.bincount(folds[np.array(strata) == 1]).tolist() == [4] * 5


@pytest.mark.parametrize("sizes", [[42, 9, 9], [300, 60, 50, 40, 30, 20], [60, *[1] * 40]])
def test_a_few_large_groups_leave_each_part_its_share(sizes: list[int]):
    shares = {"train": 0.65, "validation": 0.15, "test": 0.2}
    units = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(20):
        ids = np.array([f"{seed}-{i}" for i in range(len(units))])
        dealt = splits.deal(units, ids, [0] * len(units), shares, seed)
        for part, share in shares.items():
            assert (dealt == part).mean() == pytest.approx(share, abs=0.06)
