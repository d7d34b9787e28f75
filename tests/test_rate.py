"""The answer store and the rate stage: what is asked, what is asked again, and what becomes of every row."""

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stamina
from endpoint import (
    CHOICES,
    Asked,
    Reply,
    changed,
    corpus,
    error,
    gristmill,
    likes,
    number,
    one_line,
    ratings,
    recipe,
    says,
    score_of,
    serve,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline import prompts, rate, teacher
from pipeline.corpus import text_id
from pipeline.errors import UserError
from pipeline.ratings import schema
from pipeline.teacher import Answer, AnswerStore


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


def good_by_number(asked: Asked) -> Reply:
    """doc-<n> is good with odds n + 1 to 1."""
    n = number(asked)
    return likes({" good": math.log(0.8 * (n + 1) / (n + 2)), " bad": math.log(0.8 / (n + 2))})


# -- the store


def answers(n: int, size: int = 1000) -> list[tuple[str, Answer]]:
    return [(f"key-{i:06d}", Answer("stop", text="x" * size)) for i in range(n)]


def test_trap_08_answers_are_never_rewritten_as_a_whole(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "a.sqlite") as store:
        store.add(answers(5000))
    before = (tmp_path / "a.sqlite").stat()
    with AnswerStore(tmp_path / "a.sqlite") as store:
        store.add([("one-more", Answer("stop", text="x" * 1000))])
        written = (tmp_path / "a.sqlite-wal").stat().st_size
        assert (tmp_path / "a.sqlite").stat().st_mtime_ns == before.st_mtime_ns
    assert before.st_size > 5_000_000
    assert written < 50_000, "one answer of 1 kB, not the 5 MB before it"


def test_a_recorded_answer_is_there_for_everyone_at_once(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "a.sqlite") as store, AnswerStore(tmp_path / "a.sqlite") as other:
        store.add(answers(3))
        assert len(other) == 3


def test_failed_answers_are_not_recorded(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "a.sqlite") as store:
        store.add([("a", Answer("failed")), ("b", Answer("refused")), ("c", Answer("length"))])
        assert {key for key, _ in store.find("abc")} == {"b", "c"}


WRITER = """
import itertools, sys
from pathlib import Path
from pipeline.teacher import Answer, AnswerStore
with AnswerStore(Path(sys.argv[1])) as store:
    for i in itertools.count(int(sys.argv[2])):
        store.add([(f"key-{i}", Answer("stop", text="x" * 500))])
        print(i, flush=True)
"""


def test_no_recorded_answer_is_lost_to_kill_9(tmp_path: Path) -> None:
    acknowledged = -1
    for n_lines in (1, 37, 180):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "a.sqlite"), str(acknowledged + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(n_lines)]
            process.kill()
            lines += process.stdout.read().splitlines()
        assert process.returncode == -signal.SIGKILL
        acknowledged = max(int(line) for line in lines if line.strip())
        with AnswerStore(tmp_path / "a.sqlite") as store:
            assert {key for key, _ in store.find(f"key-{i}" for i in range(acknowledged + 1))} == {
                f"key-{i}" for i in range(acknowledged + 1)
            }
            assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_torn_journal_loses_only_its_end(tmp_path: Path) -> None:
    """What a power cut may leave on a disk that lies about what it has written."""
    with AnswerStore(tmp_path / "a.sqlite") as store:
        for answer in answers(40):
            store.add([answer])
        shutil.copytree(tmp_path, tmp_path / "copy")
    wal = tmp_path / "copy" / "a.sqlite-wal"
    size = wal.stat().st_size
    os.truncate(wal, size * 2 // 3)
    with AnswerStore(tmp_path / "copy" / "a.sqlite") as store:
        kept = [key for key, _ in store.find(key for key, _ in answers(40))]
        assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        store.add(answers(40))
        assert len(store) == 40
    assert 20 <= len(kept) < 40
    assert kept == [key for key, _ in answers(len(kept))]


def test_a_damaged_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(UserError, match=r"^answer store .*a\.sqlite: file is not a database; .*move the file away"):
        AnswerStore(tmp_path / "a.sqlite")


def test_a_store_with_torn_pages_is_one_line(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "a.sqlite") as store:
        store.add(answers(500))
    with (tmp_path / "a.sqlite").open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 400_000)
    with AnswerStore(tmp_path / "a.sqlite") as store, pytest.raises(UserError, match="malformed; the file is damaged"):
        list(store.find(key for key, _ in answers(500)))


LOG_PROBS = st.floats(max_value=0, allow_nan=False)


@given(
    st.builds(
        Answer,
        finish=st.sampled_from(["stop", "length", "refused"]),
        text=st.text(),
        log_probs=st.none() | st.dictionaries(st.text(), LOG_PROBS),
        prompt_tokens=st.integers(0, 10**9),
        seconds=st.floats(0, 1e6),
        was_truncated=st.booleans(),
    )
)
def test_an_answer_comes_back_as_it_was(answer: Answer) -> None:
    assert teacher.decode(teacher.encode(answer)) == answer


# -- what is asked again


def test_an_unchanged_run_asks_nothing(tmp_path: Path) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url)
        first = rate.run(r)
        made = (r.run_folder / "rate" / "ratings.parquet").read_bytes()
        assert rate.run(r) == first, "a finished stage is skipped"
        (r.run_folder / "rate" / "result.json").unlink()
        again = rate.run(r)
        assert server.attempts().total() == 8
    assert (again.n_asked, again.n_reused, again.docs_per_s) == (0, 8, None)
    assert again.unscored_rate == first.unscored_rate == 0
    assert (r.run_folder / "rate" / "ratings.parquet").read_bytes() == made


def test_trap_10_a_changed_prompt_never_reuses_old_answers(tmp_path: Path) -> None:
    with serve(score_of) as server:
        rate.run(recipe(tmp_path, server.url))
        for n, change in enumerate(
            ({"body": "Rate: {{ text }} Score:"}, {"system": ""}, {"answer_start": "So"}, {"chat": False}), start=2
        ):
            r = recipe(tmp_path, server.url, prompt=change)
            with pytest.raises(UserError, match=r"rate: .*prompt.* changed from .* run again with --redo"):
                rate.run(r)
            assert rate.run(r, redo=True).n_asked == 8
            assert set(server.attempts().values()) == {n}


@pytest.mark.parametrize(
    ("change", "score"),
    [
        ({"pattern": r"what it is\.\s+score: {number}"}, 3.0),
        ({"pattern": "banana {number}"}, None),
        ({"scale": [0, 2]}, None),
        ({"scale": [-1, 9]}, 3.0),
    ],
)
def test_another_reading_of_written_answers_asks_nothing(
    tmp_path: Path, change: dict[str, Any], score: float | None
) -> None:
    with serve(score_of) as server:
        rate.run(recipe(tmp_path, server.url))
        r = recipe(tmp_path, server.url, prompt=change)
        try:
            result = rate.run(r, redo=True)
            assert (result.n_asked, result.n_reused) == (0, 8)
        except UserError as stopped:
            assert "8 of 8 documents have no score (no_score 8)" in str(stopped)
        assert server.attempts().total() == 8
    assert ratings(r)["id-3"]["score"] == score


def test_another_reading_of_choices_asks_nothing(tmp_path: Path) -> None:
    values = [{"value": 4, "answers": [" bad"]}, {"value": 1, "answers": [" good"]}]
    with serve(good_by_number) as server:
        r = recipe(tmp_path, server.url, prompt=CHOICES)
        rate.run(r)
        first = ratings(r)["id-3"]
        scores = []
        for change in ({"choices": values}, {"normalise": False}, {"line": {"offset": 1.0, "slope": 0.5}}):
            r = recipe(tmp_path, server.url, prompt={**CHOICES, **change})
            assert rate.run(r, redo=True).n_asked == 0
            scores.append(ratings(r)["id-3"]["score"])
        assert server.attempts().total() == 8
    assert first["score"] == pytest.approx(5 * 0.8)
    assert scores == pytest.approx([1 * 0.8 + 4 * 0.2, 5 * 0.8 * 0.8, 1 + 0.5 * math.log(4)])


@pytest.mark.parametrize(
    ("settings", "n_asked"),
    [
        ({"temperature": 0.5}, 8),
        ({"model": "other"}, 8),
        ({"max_tokens": 99}, 8),
        ({"args": {"reasoning_effort": "low"}}, 8),
        ({"document_tokens": 7}, 8),
        ({"concurrency": 3, "timeout_s": 5, "retries": 0, "api_key_env": "OTHER"}, 0),
    ],
)
def test_settings_that_bear_on_the_answer_ask_again_and_others_do_not(
    tmp_path: Path, settings: dict[str, Any], n_asked: int
) -> None:
    with serve(score_of) as server:
        rate.run(recipe(tmp_path, server.url))
        r = recipe(tmp_path, server.url, **settings)
        (r.run_folder / "rate" / "result.json").unlink()
        assert rate.run(r, redo=True).n_asked == n_asked
        assert server.attempts().total() == 8 + n_asked


def test_a_way_back_to_old_settings_costs_nothing(tmp_path: Path) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url)
        rate.run(r)
        rate.run(changed(r, "teacher", temperature=0.5), redo=True)
        assert rate.run(r, redo=True).n_asked == 0
        assert server.attempts().total() == 16


def test_copies_of_a_text_are_asked_about_once(tmp_path: Path) -> None:
    write(tmp_path, [{"id": f"id-{i}", "text": f"doc-{i % 3} again"} for i in range(12)])
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=12)
        result = rate.run(r)
    assert server.attempts() == {"doc-0": 1, "doc-1": 1, "doc-2": 1}
    assert (result.n_rows, result.n_sampled, result.n_not_drawn) == (12, 3, 9)


def test_a_larger_sample_asks_only_what_is_new(tmp_path: Path) -> None:
    corpus(tmp_path, 40)
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=10)
        rate.run(r)
        first = set(ratings(r))
        result = rate.run(changed(r, "rate", sample=25), redo=True)
        assert (result.n_asked, result.n_reused, result.n_sampled) == (15, 10, 25)
        assert set(server.attempts().values()) == {1}
    assert first < set(ratings(r))


# -- what becomes of every row


@pytest.mark.parametrize(("n_rows", "sample"), [(1, 1), (1, 2000), (3, 2), (5, 2000), (17, 16)])
def test_trap_01_the_last_documents_are_rated_however_few(tmp_path: Path, n_rows: int, sample: int) -> None:
    corpus(tmp_path, n_rows)
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=sample, concurrency=16)
        result = rate.run(r)
    assert result.n_scored == result.n_sampled == len(ratings(r)) == min(n_rows, sample)
    assert server.attempts().total() == min(n_rows, sample)


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    texts = [*(f"doc-{i} text" for i in range(10)), "doc-3 text", "doc-4 text", "", "  \n", None]
    write(tmp_path, [{"id": f"id-{i}", "text": text} for i, text in enumerate(texts)])
    with serve(lambda asked: says("banana") if number(asked) % 2 else score_of(asked)) as server:
        result = rate.run(recipe(tmp_path, server.url, n=8))
    assert (result.n_rows, result.n_empty, result.n_sampled, result.n_not_drawn) == (15, 3, 8, 4)
    assert result.n_rows == result.n_empty + result.n_bad_rows + result.n_sampled + result.n_not_drawn
    assert result.n_sampled == result.n_scored + sum(result.unscored.values()) == result.n_asked + result.n_reused


def test_a_missing_score_is_never_a_zero(tmp_path: Path) -> None:
    said = {0: "Score: 0", 1: "banana", 2: "Score: 3", 3: "Score: 2.5", 4: "Score: 4.9", 5: "Score: 0.4"}
    with serve(lambda asked: says(said[number(asked)])) as server:
        r = recipe(tmp_path, server.url, n=6)
        result = rate.run(r)
    scores = {name: row["score"] for name, row in ratings(r).items()}
    assert scores == {"id-0": 0.0, "id-1": None, "id-2": 3.0, "id-3": 2.5, "id-4": 4.9, "id-5": 0.4}
    assert result.mean_score == pytest.approx((0 + 3 + 2.5 + 4.9 + 0.4) / 5)
    assert result.int_score_counts == {"0": 2, "3": 2, "5": 1}
    assert (result.n_scored, result.unscored, result.unscored_rate) == (5, {"no_score": 1}, pytest.approx(1 / 6))


def test_the_teacher_is_measured_against_a_known_quality(tmp_path: Path) -> None:
    """Four known documents: of the four pairs of a good and a bad one, three are in the right order."""
    said = {0: "Score: 0", 1: "Score: 1", 2: "Score: 2", 3: "Score: 3", 4: "banana", 5: "Score: 5"}
    good = [False, True, False, True, True, None]
    write(tmp_path, [{"id": f"id-{i}", "text": f"doc-{i}", "good": good[i]} for i in range(6)])
    with serve(lambda asked: says(said[number(asked)])) as server:
        r = recipe(tmp_path, server.url, n=6, rate={"gold_column": "good"})
        gold = rate.run(r).gold
    assert gold == {"n": 4, "auc": 0.75, "auc_interval": (0.0, 1.0)}, "of four documents little is known"
    assert {name: row["gold"] for name, row in ratings(r).items()} == {
        f"id-{i}": None if g is None else float(g) for i, g in enumerate(good)
    }
    assert all("good" not in asked.shown.replace("How good is it?", "") for asked in server.asked)


def test_a_known_quality_in_numbers_gives_a_rank_correlation(tmp_path: Path) -> None:
    """Scores 0 1 2 3 against 10 20 40 30: one swap among four ranks, Spearman 1 - 6 x 2 / (4 x 15)."""
    write(tmp_path, [{"id": f"id-{i}", "text": f"doc-{i}", "worth": w} for i, w in enumerate((10, 20, 40, 30))])
    with serve(score_of) as server:
        result = rate.run(recipe(tmp_path, server.url, n=4, rate={"gold_column": "worth"}))
    assert result.gold == {"n": 4, "spearman": pytest.approx(0.8), "spearman_interval": (-1.0, 1.0)}


def test_too_many_documents_without_a_score_stop_the_run_and_keep_the_ratings(tmp_path: Path) -> None:
    with serve(lambda asked: says("banana") if number(asked) < 5 else score_of(asked)) as server:
        r = recipe(tmp_path, server.url, rate={"max_unscored_rate": 0.5})
        line = one_line(gristmill(r))
        assert line.startswith("rate: 5 of 8 documents have no score (no_score 5); read the answers with gristmill")
        assert len(ratings(r)) == 8
        assert not (r.run_folder / "rate" / "result.json").exists(), "not finished"
        result = rate.run(changed(r, "rate", max_unscored_rate=0.7), redo=True)
        assert (result.n_asked, server.attempts().total()) == (0, 8)


def test_no_score_at_all_always_stops_the_run(tmp_path: Path) -> None:
    with serve(lambda _: says("banana")) as server:
        r = recipe(tmp_path, server.url, rate={"max_unscored_rate": 1.0})
        with pytest.raises(UserError, match="8 of 8 documents have no score"):
            rate.run(r)


def test_a_rating_carries_everything_needed_to_judge_it(tmp_path: Path) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url)
        rate.run(r)
    row = ratings(r)["id-3"]
    assert row["answer"] == "It is what it is.\nScore: 3"
    assert (row["teacher"], row["prompt_tokens"], row["answer_tokens"], row["was_truncated"]) == ("m", 100, 7, False)
    assert (row["prompt"], row["prompt_digest"]) == ("prompt", prompts.load(r.rate.prompt).digest)
    written = pq.read_schema(r.run_folder / "rate" / "ratings.parquet")
    assert (written.names, written.metadata) == (schema((0.0, 5.0), {}).names, schema((0.0, 5.0), {}).metadata)


def test_ratings_are_the_same_bytes_however_the_answers_came(tmp_path: Path) -> None:
    def uneven(asked: Asked) -> Reply:
        def late(handler: Any) -> None:
            handler.server.closing.wait(0.03 * (number(asked) % 3))
            score_of(asked)(handler)

        return error(500) if asked.attempt == 1 and number(asked) % 5 == 0 else late

    made = []
    for folder, script, concurrency in ((tmp_path / "a", score_of, 1), (tmp_path / "b", uneven, 9)):
        folder.mkdir()
        with serve(script) as server:
            r = recipe(folder, server.url, n=20, concurrency=concurrency)
            rate.run(r)
        made.append((r.run_folder / "rate" / "ratings.parquet").read_bytes())
    assert made[0] == made[1]


def test_documents_are_named_by_the_id_column_or_by_their_content(tmp_path: Path) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url)
        rate.run(r)
        assert set(ratings(r)) == {f"id-{i}" for i in range(8)}
        r = changed(r, "corpus", id_column=None)
        assert rate.run(r, redo=True).n_asked == 0, "an answer belongs to a text, whatever its name"
    assert set(ratings(r)) == {text_id(f"doc-{i} is a document.") for i in range(8)}


def test_a_prompt_for_labels_is_refused(tmp_path: Path) -> None:
    labels = {"read": "label", "labels": ["law", "sports"], "body": "One of {{ labels }}: {{ text }}"}
    with pytest.raises(UserError, match=r"rate.prompt: .*prompt\.md asks for labels; give it to gristmill label"):
        rate.run(recipe(tmp_path, "http://127.0.0.1:9/v1", prompt=labels))


def test_strata_are_drawn_equally(tmp_path: Path) -> None:
    rows = [{"id": f"id-{i}", "text": f"doc-{i}", "kind": "rare" if i < 5 else "common"} for i in range(60)]
    write(tmp_path, rows)
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=20, rate={"stratify_by": "kind"})
        rate.run(r)
    strata = [row["stratum"] for row in ratings(r).values()]
    assert (strata.count("rare"), strata.count("common")) == (5, 15)


def test_an_empty_corpus_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["", None]}), tmp_path / "corpus.parquet")
    with pytest.raises(UserError, match="has no document with text in 2 rows"):
        rate.run(recipe(tmp_path, "http://127.0.0.1:9/v1"))


# -- disks


def test_trap_02_a_full_disk_is_one_line_and_loses_no_answer(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    with serve(lambda asked: says(f"{'x' * 3000} Score: {number(asked) % 6}")) as server:
        r = recipe(tmp_path, server.url, n=60, concurrency=4)
        line = one_line(gristmill(r, before=("bash", "-c", 'ulimit -f 400; exec "$@"', "bash")))
        assert line.startswith(f"answer store {r.run_folder}/rate/answers.sqlite: ")
        assert line.endswith("everything recorded so far is kept, make room and run again")
        asked = server.attempts().total()
        assert 10 < asked < 60
        result = rate.run(r)
    assert asked - 4 <= result.n_reused <= asked
    assert (result.n_asked, result.n_scored) == (60 - result.n_reused, 60)


def in_a_namespace() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not in_a_namespace(), reason="this machine allows no mount namespace (unshare -rm)")
@pytest.mark.parametrize(
    ("mount", "line"),
    [
        ("size=200k", "; everything recorded so far is kept, make room and run again"),
        ("ro", " (Read-only file system); give another"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, mount: str, line: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ("unshare", "-rm", "bash", "-c", f'mount -t tmpfs -o {mount} tmpfs {disk}; exec "$@"', "bash")
    with serve(lambda asked: says(f"{'x' * 3000} Score: {number(asked) % 6}")) as server:
        r = recipe(tmp_path, server.url, n=80, concurrency=4).model_copy(update={"run_folder": disk / "run"})
        assert line in one_line(gristmill(r, before=mounted))
