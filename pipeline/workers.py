"""Work on a stream by threads: torch and the tokenizers let go of Python's lock while they compute."""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

AHEAD = 2
"""Items for each worker that are taken from the stream before their turn."""


def in_order(
    work: Callable[[Item], Made], items: Iterable[Item], n_workers: int, start: Callable[[], None] = lambda: None
) -> Generator[tuple[Item, Made]]:
    """Each item with what `work` makes of it, in the order given, a bounded number at a time. `start` is called in
    every thread. Where the stream fails, what came before is finished first."""
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    source, failed = iter(items), None
    with ThreadPoolExecutor(n_workers, thread_name_prefix="worker", initializer=start) as pool:
        try:
            while True:
                try:
                    item = next(source)
                except StopIteration:
                    break
                except Exception as error:
                    failed = error
                    break
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= AHEAD * n_workers:
                    yield done(waiting)
            while waiting:
                yield done(waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(source, Generator):  # else its own files and threads wait for the garbage collector
                source.close()
    if failed is not None:
        raise failed


def done(waiting: "deque[tuple[Item, Future[Made]]]") -> tuple[Item, Made]:
    """The first item that waits, with what was made of it."""
    item, made = waiting.popleft()
    return item, made.result()


class Effort:
    """What work took, over all threads."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.seconds: Counter[str] = Counter()
        """By activity: reading, tokenising, computing, writing."""
        self.counts: Counter[str] = Counter()
        """tokens, slots (tokens with padding), halvings (packs that did not fit into memory)."""
        self.begin = time.perf_counter()

    @contextmanager
    def spent(self, activity: str) -> Iterator[None]:
        """Count the block's seconds."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.seconds[activity] += time.perf_counter() - begin  # type: ignore[assignment]

    def timed(self, activity: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the seconds until each is there are counted."""
        source, end = iter(items), object()
        while True:
            with self.spent(activity):
                item: Any = next(source, end)
            if item is end:
                return
            yield item

    def count(self, **numbers: int) -> None:
        """Add to the counts."""
        with self.lock:
            self.counts.update(numbers)

    def forget(self) -> None:
        """Begin again, after what only got ready for the work."""
        with self.lock:
            self.seconds.clear()
            self.counts.clear()
            self.begin = time.perf_counter()

    def spent_so_far(self) -> dict[str, Counter[str]]:
        """Seconds and counts, to be added to those of others."""
        with self.lock:
            return {"seconds": self.seconds.copy(), "counts": self.counts.copy()}

    def add(self, spent: dict[str, Counter[str]]) -> None:
        """Add what another process spent."""
        with self.lock:
            self.seconds.update(spent["seconds"])
            self.counts.update(spent["counts"])
