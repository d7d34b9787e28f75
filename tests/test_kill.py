"""kill -9 and Ctrl-C in the middle of the real command: nothing recorded is lost or asked again, same final bytes."""

import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import endpoint
import pytest
import stamina
from endpoint import (
    Endpoint,
    Process,
    gristmill,
    one_line,
    ratings,
    recipe,
    score_of,
    serve,
    start,
)

from pipeline import rate
from pipeline.config import Recipe
from pipeline.corpus import text_id

CONCURRENCY = 8


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


def wait_for(ready: Callable[[], bool], process: Process) -> None:
    """Until the moment has come, in a process that is still at work."""
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, f"ended before its time: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.003)


def kill(process: Process, number: int = signal.SIGKILL) -> tuple[str, str]:
    """Signal the whole process group; what it had said."""
    os.killpg(process.pid, number)
    said = process.communicate(timeout=30)
    assert process.returncode in (-number, 130)
    return said


def recorded(r: Recipe) -> dict[str, str]:
    """The answers on disk, as they stand there, by text; read from a copy, so that the store is left as it is."""
    copy = r.run_folder.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in ("answers.sqlite", "answers.sqlite-wal"):
        if (r.run_folder / "rate" / name).exists():
            shutil.copy(r.run_folder / "rate" / name, copy)
    with closing(sqlite3.connect(copy / "answers.sqlite")) as db:
        return {key.split(":")[1]: answer for key, answer in db.execute("SELECT key, answer FROM answers")}


def n_recorded(r: Recipe) -> int:
    """How many answers a run at work has recorded so far."""
    path = r.run_folder / "rate" / "answers.sqlite"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def elsewhere(r: Recipe) -> Recipe:
    """The same recipe with another run folder."""
    return r.model_copy(update={"run_folder": r.run_folder.with_name("whole")})


def same_ratings(r: Recipe) -> bool:
    """Whether the interrupted run ended with the bytes of the whole one."""
    assert ratings(r) == ratings(elsewhere(r))  # which says what differs
    made = [x.run_folder / "rate" / "ratings.parquet" for x in (r, elsewhere(r))]
    return made[0].read_bytes() == made[1].read_bytes()


# -- rating at an endpoint


def names(texts: set[str], n: int) -> set[str]:
    """doc-<i> of the texts with these digests."""
    return {f"doc-{i}" for i in range(n) if text_id(f"doc-{i} is a document.") in texts}


def asked_since(server: Endpoint, n_before: int) -> set[str]:
    """The documents of all requests but the first so many."""
    return {asked.document for asked in server.asked[n_before:]}


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with serve(score_of, delay_s=0.02) as server:
        r = recipe(tmp_path, server.url, n=100, concurrency=CONCURRENCY)
        process = start(r)
        wait_for(lambda: len(server.asked) >= 30, process)
        stdout, stderr = kill(process, signal.SIGINT)
        known, n_before = names(set(recorded(r)), 100), len(server.asked)
        assert (process.returncode, stdout) == (130, "")
        assert stderr.splitlines()[-1].startswith("gristmill: interrupted; everything recorded is kept")
        assert "Traceback" not in stderr
        assert "never retrieved" not in stderr
        result = rate.run(r)
        again = asked_since(server, n_before)
    assert (result.n_reused, result.n_asked, result.n_scored) == (len(known), 100 - len(known), 100)
    assert 20 <= len(known) < 100
    assert not known & again
    assert n_before - len(known) <= CONCURRENCY


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    with serve(score_of, delay_s=0.05) as server:
        r = recipe(tmp_path, server.url, n=400, concurrency=1)
        process = start(r)
        wait_for(lambda: len(server.asked) >= 3, process)
        assert one_line(gristmill(r)).startswith("rate: another process is at work in ")
        assert process.poll() is None
        kill(process)


# -- rating on this machine


def test_rating_on_this_machine_survives_kill_9(tmp_path: Path, tiny_causal: Path, texts: list[str]) -> None:
    choices = [{"value": 5, "answers": [" educational"]}, {"value": 0, "answers": [" spam"]}]
    n = 300
    rows = [{"id": f"id-{i}", "text": f"{i} {texts[i % len(texts)][: 40 + i]}"} for i in range(n)]
    endpoint.write(tmp_path, rows)
    r = recipe(
        tmp_path,
        "http://127.0.0.1:9/v1",
        n=n,
        prompt={"read": "choices", "choices": choices, "answer_start": "This text is"},
        engine="transformers",
        model=str(tiny_causal),
        device="cpu",
        dtype="float32",
        document_tokens=64,
        batch_tokens=1000,
    )
    rate.run(elsewhere(r))
    known: dict[str, str] = {}
    for n_more in (1, 90):
        until = len(known) + n_more
        process = start(r)
        wait_for(lambda until=until: n_recorded(r) >= until, process)  # type: ignore[misc]
        kill(process)
        assert known.items() <= recorded(r).items(), "answers on disk, their seconds included, stay as they are"
        known = recorded(r)
        assert until <= len(known) < n
    result = rate.run(r)
    assert (result.n_reused, result.n_asked) == (len(known), n - len(known))
    assert known.items() <= recorded(r).items()
    assert same_ratings(r)
