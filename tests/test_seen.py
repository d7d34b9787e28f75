"""What was made of texts before in the same run."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import seen
from pipeline.errors import UserError

KIND = np.dtype([("outputs", "<f4", (2,)), ("n_windows", "<i4"), ("truncated", "?")])


def records(*numbers: int) -> np.ndarray:
    found = np.zeros(len(numbers), KIND)
    found["outputs"] = [[number, np.nextafter(np.float32(number), np.float32(9))] for number in numbers]
    found["n_windows"], found["truncated"] = numbers, [number % 2 for number in numbers]
    return found


def keys(*texts: str) -> list[bytes]:
    return [seen.key_of(text) for text in texts]


def test_records_come_back_to_the_bit_in_the_order_asked_for(tmp_path: Path):
    with seen.opened(tmp_path / "seen.sqlite", KIND) as known:
        known.claim(keys("a", "b", "c"))
        known.add(keys("a", "b"), records(1, 2))
        known.add(keys("c"), records(3))
        found = known.get(keys("c", "a", "c", "b"))
        assert found.dtype == KIND and found.tobytes() == records(3, 1, 3, 2).tobytes()
        assert len(known.get([])) == 0 and known.get([]).dtype == KIND


def test_a_text_is_claimed_once_whether_its_record_is_there_or_awaited(tmp_path: Path):
    with seen.opened(tmp_path / "seen.sqlite", KIND) as known:
        assert known.claim(keys("a", "b", "a")) == keys("a", "b")
        assert known.claim(keys("b", "c")) == keys("c")
        known.add(keys("a", "b"), records(1, 2))
        assert known.awaited == set(keys("c"))
        assert known.claim(keys("a", "c", "d", "b")) == keys("d")


def test_texts_of_different_scopes_are_different():
    assert len({seen.key_of("a"), seen.key_of("a", 1), seen.key_of("a", 2), seen.key_of("b")}) == 4
    assert seen.key_of("\ud800") != seen.key_of("\ufffd")


def test_the_file_is_gone_at_the_end_and_one_left_by_a_killed_process_counts_for_nothing(tmp_path: Path):
    path = tmp_path / "seen.sqlite"
    path.write_bytes(b"half a page")
    with seen.opened(path, KIND) as known:
        assert known.claim(keys("a")) == keys("a")
    assert not path.exists()
    with pytest.raises(KeyError), seen.opened(path, KIND):
        raise KeyError("a bug elsewhere")
    assert not path.exists()


def test_memory_is_bounded_and_the_rest_is_on_disk(tmp_path: Path):
    many = [number.to_bytes(16, "little") for number in range(100_000)]
    with seen.opened(tmp_path / "seen.sqlite", KIND) as known:
        known.file.execute("PRAGMA cache_size=-1024")
        for begin in range(0, len(many), 1000):
            part = known.claim(many[begin : begin + 1000])
            known.add(part, records(*range(begin, begin + 1000)))
        assert (tmp_path / "seen.sqlite").stat().st_size > 2_000_000
        assert not known.awaited and not known.claim(many)
        assert known.get(many[::-777])["n_windows"].tolist() == list(range(100_000))[::-777]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path):
    with (
        pytest.raises(UserError, match=r"cannot write .*seen.sqlite \(.*\); make room"),
        seen.opened(tmp_path / "nowhere" / "seen.sqlite", KIND),
    ):
        pass
