"""A stream of work for threads."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from pipeline.workers import AHEAD, Effort, in_order


def after_a_while(milliseconds: int) -> int:
    time.sleep(milliseconds / 1000)
    return milliseconds * 10


def threads_at_work() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("worker")]


@given(lists(integers(0, 3), max_size=12), integers(1, 4))
def test_results_come_in_the_order_of_the_items_whichever_is_ready_first(items: list[int], n_workers: int):
    assert list(in_order(after_a_while, items, n_workers)) == [(item, item * 10) for item in items]


@pytest.mark.parametrize("n_workers", [1, 3])
def test_only_a_bounded_number_of_items_is_ahead_of_the_results(n_workers: int):
    n_taken = n_done = furthest = 0

    def items() -> Iterator[int]:
        nonlocal n_taken, furthest
        for i in range(50):
            n_taken += 1
            furthest = max(furthest, n_taken - n_done)
            yield i

    for _ in in_order(lambda item: item, items(), n_workers):
        n_done += 1
    assert (n_taken, n_done) == (50, 50) and furthest <= AHEAD * n_workers


def test_a_stream_that_fails_gives_what_came_before_and_then_fails():
    def items() -> Iterator[int]:
        yield from range(5)
        raise OSError("the disk")

    found: list[int] = []
    with pytest.raises(OSError, match="the disk"):
        found.extend(item for item, _ in in_order(after_a_while, items(), 4))
    assert found == [0, 1, 2, 3, 4] and not threads_at_work()


def test_work_that_fails_fails_in_its_turn():
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return after_a_while(3 - item)

    found: list[int] = []
    with pytest.raises(ValueError, match="three"):
        found.extend(item for item, _ in in_order(work, range(100), 4))
    assert found == [0, 1, 2] and not threads_at_work()


def test_a_stream_of_streams_that_fails_leaves_no_thread():
    def fails(item: int) -> None:
        raise ValueError(item)

    inner = (item for item, _ in in_order(after_a_while, range(1000), 1))
    with pytest.raises(ValueError, match="0"):
        list(in_order(fails, inner, 2))
    assert not threads_at_work()


def test_every_thread_is_started_and_none_is_left_when_the_results_are_not_wanted_any_more():
    started: list[str] = []
    results = in_order(after_a_while, range(1000), 3, lambda: started.append(threading.current_thread().name))
    with closing(results):
        next(results)
        assert 1 <= len(threads_at_work()) <= 3
    assert not threads_at_work() and len(set(started)) == len(started) <= 3


def test_effort_is_counted_over_all_threads():
    effort = Effort()

    def work(item: int) -> None:
        with effort.spent("computing"):
            after_a_while(5)
        effort.count(tokens=item, slots=2 * item)

    for _ in in_order(work, effort.timed("reading", map(after_a_while, [10, 10])), 2):
        pass
    assert effort.counts == {"tokens": 200, "slots": 400}
    assert effort.seconds["computing"] >= 0.01 and effort.seconds["reading"] >= 0.02
    effort.forget()
    assert not effort.counts and not effort.seconds


def test_effort_of_a_block_that_fails_is_counted_too():
    effort = Effort()
    with pytest.raises(KeyError), effort.spent("reading"):
        raise KeyError
    assert effort.seconds["reading"] > 0
