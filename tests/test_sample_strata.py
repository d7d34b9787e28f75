"""Strata by length and by source, and the floor under them."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import formats
from pipeline.config import Corpus
from pipeline.errors import UserError
from pipeline.sample import Document, length_class, sample
from pipeline.shards import Shard

MEMORY = fsspec.filesystem("memory")
SHARD = Shard("a.parquet", "a.parquet", "parquet")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def strata_of(documents: list[Document]) -> Counter[str | None]:
    return Counter(document.stratum for document in documents)


def words(n: int, length: int) -> list[dict[str, str]]:
    """So many different texts of one length."""
    return [{"text": f"{length}:{i}".ljust(length, "x")} for i in range(n)]


# -- length and source ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "name"),
    [(1, "1-1"), (2, "2-3"), (3, "2-3"), (4, "4-7"), (255, "128-255"), (256, "256-511"), (511, "256-511")],
)
def test_length_classes_double(n: int, name: str) -> None:
    assert length_class(SHARD, "é" * n) == f"{name} characters"


def test_each_length_gets_an_equal_share(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", words(90, 20) + words(30, 100) + words(10, 300))
    documents, _ = sample(Corpus(path=str(tmp_path)), 30, 0, "length")
    assert strata_of(documents) == {"16-31 characters": 10, "64-127 characters": 10, "256-511 characters": 10}
    assert all(document.stratum == length_class(SHARD, document.text) for document in documents)


def test_a_source_is_the_first_folder_below_the_corpus_and_a_dot_is_beside_them(tmp_path: Path) -> None:
    for name in ("web/2024/a", "web/b", "books/a", "c"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(20)])
    documents, _ = sample(Corpus(path=str(tmp_path)), 30, 0, "source")
    assert strata_of(documents) == {"web": 10, "books": 10, ".": 10}
    assert all(document.text.startswith(document.stratum or "") or document.stratum == "." for document in documents)


def test_a_group_is_what_its_column_says_and_settles_which_copy_stays(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1, "site": 7}, {"text": "b", "id": 2, "site": None}, {"text": "a", "id": 1, "site": 3}]
    for order in (rows, rows[::-1]):
        write(tmp_path / "a.jsonl", order)
        documents, _ = sample(Corpus(path=str(tmp_path), id_column="id"), 5, 0, group_column="site")
        assert {document.text: document.group for document in documents} == {"a": "3", "b": None}
    with pytest.raises(UserError, match="no column 'web'"):
        sample(Corpus(path=str(tmp_path), id_column="id"), 5, 0, group_column="web")


def test_a_glob_has_sources_too(tmp_path: Path) -> None:
    for name in ("web", "books"):
        write(tmp_path / name / "a.jsonl", [{"text": f"{name} {i}"} for i in range(9)])
    assert strata_of(sample(Corpus(path=f"{tmp_path}/*/*.jsonl"), 6, 0, "source")[0]) == {"web": 3, "books": 3}


def test_a_corpus_without_folders_has_no_sources(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"stratify_by: source is the first folder .* has none"):
        sample(Corpus(path=str(tmp_path)), 6, 0, "source")


@pytest.mark.parametrize("name", ["length", "source"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_column_of_that_name_wins(tmp_path: Path, name: str, suffix: str) -> None:
    rows = [{"text": f"t{i}", name: "ab"[i % 2]} for i in range(20)]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        write(tmp_path / "a.jsonl", rows)
    assert strata_of(sample(Corpus(path=str(tmp_path)), 10, 0, name)[0]) == {"a": 5, "b": 5}


def test_a_column_that_only_the_last_json_line_has_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BATCH_ROWS", 2)
    nested = {"text": 'a "length" is quoted', "meta": {"length": 3}}
    write(tmp_path / "a.jsonl", [nested, *words(5, 20)])
    assert set(strata_of(sample(Corpus(path=str(tmp_path)), 9, 0, "length")[0])) == {"16-31 characters"}
    write(tmp_path / "a.jsonl", [nested, *words(5, 20), {"text": "last", "length": "short"}])
    assert strata_of(sample(Corpus(path=str(tmp_path)), 9, 0, "length")[0]) == {"None": 6, "short": 1}


def test_a_bad_line_is_left_out_or_named_when_columns_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"length": 3\n{"text": "good"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 1 is not JSON"):
        sample(Corpus(path=str(tmp_path)), 9, 0, "length")
    documents, counts = sample(Corpus(path=str(tmp_path), skip_bad_rows=True), 9, 0, "length")
    assert (len(documents), counts.n_bad_rows, counts.n_rows) == (1, 1, 2)


# -- the floor --------------------------------------------------------------------------------------------------------


GROUPS = {"big": 500, "mid": 40, "rare": 3}


@pytest.fixture
def grouped(tmp_path: Path) -> Corpus:
    write(
        tmp_path / "a.jsonl", [{"text": f"{name} {i}", "group": name} for name, n in GROUPS.items() for i in range(n)]
    )
    return Corpus(path=str(tmp_path))


def test_each_stratum_has_the_floor_or_all_it_has_and_the_size_is_exact(grouped: Corpus) -> None:
    documents, _ = sample(grouped, 60, 0, "group", floor=12)
    found = strata_of(documents)
    assert found["rare"] == 3 and found["mid"] >= 12 and len(documents) == 60
    assert found["big"] > 30  # more than an equal share: beyond the floor the sample is uniform


def test_without_rare_strata_the_floor_changes_nothing(grouped: Corpus) -> None:
    uniform = [document.text for document in sample(grouped, 200, 0)[0]]
    floored = [document.text for document in sample(grouped, 200, 0, "group", floor=1)[0]]
    by_name = Counter(text.split()[0] for text in uniform)
    assert min(by_name[name] for name in GROUPS) >= 1
    assert floored == uniform


def test_what_the_floor_adds_takes_the_last_places_of_the_uniform_sample(grouped: Corpus) -> None:
    uniform = {document.text for document in sample(grouped, 60, 0)[0]}
    floored = {document.text for document in sample(grouped, 60, 0, "group", floor=12)[0]}
    assert {text.split()[0] for text in floored - uniform} == {"mid", "rare"}
    assert {text.split()[0] for text in uniform - floored} == {"big"}


def test_documents_below_a_floor_are_drawn_uniformly_within_their_stratum(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": f"{'ab'[i >= 10]} {i}", "group": "ab"[i >= 10]} for i in range(100)])
    drawn: Counter[str] = Counter()
    for seed in range(300):
        documents, _ = sample(Corpus(path=str(tmp_path)), 6, seed, "group", floor=3)
        drawn.update(document.text for document in documents if document.stratum == "a")
    assert len(drawn) == 10
    assert all(55 <= count <= 130 for count in drawn.values()), drawn  # 90 and a few expected


def test_floors_that_do_not_fit_are_refused_with_the_numbers(grouped: Corpus) -> None:
    with pytest.raises(UserError, match=r"stratum_floor: 20 from each .* makes 43 .* 3 of them, .* sample of 42;"):
        sample(grouped, 42, 0, "group", floor=20)
    assert strata_of(sample(grouped, 43, 0, "group", floor=20)[0]) == {"big": 20, "mid": 20, "rare": 3}


def test_strata_without_end_are_refused_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "BATCH_ROWS", 10)
    write(tmp_path / "a.jsonl", [{"text": f"t{i}", "url": f"u{i}"} for i in range(200)])
    with pytest.raises(UserError, match="makes 30 for the first 30 of them"):
        sample(Corpus(path=str(tmp_path)), 25, 0, "url", floor=5)


def test_a_floor_without_strata_is_refused(grouped: Corpus) -> None:
    with pytest.raises(UserError, match="stratum_floor: there are no strata without stratify_by"):
        sample(grouped, 60, 0, floor=12)


def test_copies_in_other_strata_do_not_eat_a_floor(tmp_path: Path) -> None:
    """Half the texts of `b` are in `a` as well."""
    rows = [
        {"text": f"t{i}", "group": group} for group, first in (("a", 0), ("b", 50)) for i in range(first, first + 100)
    ]
    write(tmp_path / "a.jsonl", rows)
    for seed in range(20):
        documents, _ = sample(Corpus(path=str(tmp_path)), 40, seed, "group", floor=18)
        assert len({document.text for document in documents}) == 40
        assert min(strata_of(documents).values()) >= 18


# -- the same sample, however the corpus is cut -----------------------------------------------------------------------


ROW = st.fixed_dictionaries(
    {
        "text": st.tuples(st.integers(0, 40), st.sampled_from([3, 9, 40])).map(
            lambda p: f"{p[0]:02}".ljust(p[1], "x")
        ),
        "group": st.sampled_from("abcd"),
        "good": st.sampled_from([0, 1, None]),
    }
)
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "column": {"stratify_by": "group"},
    "length": {"stratify_by": "length"},
    "floor": {"stratify_by": "group", "floor": 2},
    "floor of lengths": {"stratify_by": "length", "floor": 2},
}


def lay_out(rows: list[dict[str, Any]], seed: int, folder_of: dict[str, str] | None = None) -> Corpus:
    """The rows in random order, in one to four shards (of each row's own folder)."""
    rng = random.Random(seed)
    if MEMORY.exists("/cuts"):
        MEMORY.rm("/cuts", recursive=True)
    shards: dict[str, list[str]] = {}
    n_shards = rng.randint(1, 4)
    for row in rng.sample(rows, len(rows)):
        folder = folder_of[row["group"]] if folder_of else ""
        shards.setdefault(f"/cuts/{folder}{rng.randrange(n_shards)}.jsonl", []).append(json.dumps(row) + "\n")
    for path, lines in shards.items():
        MEMORY.pipe_file(path, "".join(lines).encode())
    return Corpus(path="memory://cuts")


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30)
@given(
    rows=st.lists(ROW, min_size=1, max_size=80),
    size=st.integers(8, 40),
    batch=st.integers(1, 30),
    cuts=st.tuples(st.integers(0, 999), st.integers(0, 999)),
)
def test_the_sample_is_the_same_however_the_corpus_is_cut_and_ordered(
    way: str, rows: list[dict[str, Any]], size: int, batch: int, cuts: tuple[int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BATCH_ROWS", batch)
        one, other = (sample(lay_out(rows, cut), size, 3, gold_column="good", **WAYS[way])[0] for cut in cuts)
    assert one == other
    assert len(one) == min(size, len({row["text"] for row in rows}))
    assert all((document.stratum is None) == (way == "uniform") for document in one)


@pytest.mark.parametrize("floor", [None, 2])
@settings(max_examples=30)
@given(
    rows=st.lists(ROW, min_size=1, max_size=80), batch=st.integers(1, 30), cuts=st.tuples(*[st.integers(0, 999)] * 2)
)
def test_sources_may_be_cut_again_within_their_folders(
    floor: int | None, rows: list[dict[str, Any]], batch: int, cuts: tuple[int, int]
) -> None:
    folders = {"a": "web/", "b": "web/deep/", "c": "books/", "d": "code/"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BATCH_ROWS", batch)
        one, other = (sample(lay_out(rows, cut, folders), 12, 3, "source", floor=floor)[0] for cut in cuts)
    assert one == other
    assert {document.stratum for document in one} <= {"web", "books", "code"}


@settings(max_examples=60)
@given(groups=st.lists(st.integers(0, 30), min_size=1, max_size=6), floor=st.integers(1, 6), batch=st.integers(1, 50))
def test_every_stratum_reaches_its_floor_whatever_the_strata(groups: list[int], floor: int, batch: int) -> None:
    rows = [{"text": f"{g}/{i}", "group": f"{g}"} for g, n in enumerate(groups) for i in range(n)]
    rows = rows or [{"text": "x", "group": "0"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BATCH_ROWS", batch)
        found = strata_of(sample(lay_out(rows, 1), 36, 0, "group", floor=floor)[0])
    there = Counter(row["group"] for row in rows)
    assert all(found[name] >= min(floor, n) for name, n in there.items())
    assert found.total() == min(36, len(rows))
