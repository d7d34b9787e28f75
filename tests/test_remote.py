"""Corpora, run folders and outputs on an object store: a real S3 server (moto) on 127.0.0.1."""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import endpoint
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from endpoint import score_of, serve
from moto.server import ThreadedMotoServer
from upath import UPath

from pipeline import cli, config, manifest, mirror, places, storage, verify
from pipeline.cli import How
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.student import Head, Layer, Student
from pipeline.teacher import Answer, AnswerStore

SECRET = "canary-secret-0123456789"
STAGES = ("rate", "train", "score", "filter")
Given = dict[str, Any]


class Store:
    """A server that forgets nothing while it is stopped."""

    def __init__(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", 0)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.stop()

    def start_again(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", self.port)
        self.server.start()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    given = {"AWS_ACCESS_KEY_ID": "canary", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        made = Store()
        for name, value in {**given, "AWS_ENDPOINT_URL": made.url}.items():
            patch.setenv(name, value)
        yield made
        made.stop()


@pytest.fixture
def bucket(store: Store, request: pytest.FixtureRequest) -> str:
    """An empty bucket of the test's own."""
    name = request.node.name.split("[")[0].replace("_", "-")[-60:].strip("-").lower()
    s3().mkdir(name)
    return f"s3://{name}"


def s3() -> Any:
    return fsspec.filesystem("s3")


def objects(url: str) -> dict[str, bytes]:
    """Everything below a URL, by path from there."""
    fs, root = fsspec.core.url_to_fs(url)
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def upload(folder: Path, url: str) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*.parquet"):
        fs.put_file(str(path), f"{root}/{path.relative_to(folder).as_posix()}")


def run(machine: Path, recipe: Path, *stages: str, redo: bool = False, **given: Any) -> list[Any]:
    """Stages as the command line runs them, in a folder that stands for a machine of its own."""
    machine.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(machine)
    try:
        return cli.execute(stages, recipe, given, How(redo=redo))
    finally:
        os.chdir(before)


def said(results: list[Any]) -> list[Any]:
    return [result.model_dump(mode="json") for result in results]


@contextmanager
def started(machine: Path, recipe: Path, stage: str) -> Iterator[subprocess.Popen[str]]:
    """The real command in a process group of its own, until kill -9."""
    machine.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", stage, str(recipe)],
        cwd=machine,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL


def wait_for(ready: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, f"ended before its time: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def watched(url: str) -> Iterator[list[str]]:
    """What can be seen of a bucket while the block works: every parquet file that is listed can be read whole."""
    fs, root = fsspec.core.url_to_fs(url)
    ended, seen = threading.Event(), list[str]()

    def look() -> None:
        while not ended.wait(0.1):
            for path in fs.find(root):
                if path not in seen and path.endswith(".parquet"):
                    with fs.open(path, "rb") as file:
                        pq.read_table(file)
                if path not in seen:
                    seen.append(path)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def test_a_whole_run_on_a_store_gives_the_bytes_of_a_local_one_and_goes_on_elsewhere(
    tmp_path: Path, recipe_file: Path, corpus_folder: Path, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gristmill")
    run(tmp_path, recipe_file, *STAGES)
    local = files(tmp_path / "run")
    upload(corpus_folder, f"{bucket}/data")
    url, of_store = f"{bucket}/runs/edu", {"corpus": {"path": f"{bucket}/data"}, "run_folder": f"{bucket}/runs/edu"}
    with watched(bucket) as seen:
        first = run(tmp_path / "a", recipe_file, *STAGES, **of_store, mirror_every_s=0.2)
    assert not [name for name in seen if ".tmp" in name or ("/." in name and "/.gristmill" not in name)]
    remote = objects(url)
    corpora = [name for name in local if name.startswith(("score/scored/", "filter/kept/"))]
    assert len(corpora) == 6
    assert {name: remote[name] for name in corpora} == {name: local[name] for name in corpora}
    assert remote["rate/ratings.parquet"] == local["rate/ratings.parquet"]
    [here] = (tmp_path / "a" / "runs").iterdir()
    assert not [name for name in files(here) if name.startswith(("score/scored", "filter/kept"))]
    caplog.clear()
    again = run(tmp_path / "b", recipe_file, *STAGES, **of_store)
    assert [line for line in caplog.messages if line.endswith("done already, skipped")] == [
        f"{stage}: done already, skipped" for stage in STAGES
    ]
    assert said(again) == said(first)
    canaries = (
        *files(tmp_path / "b").values(),
        *objects(bucket).values(),
        *(line.encode() for line in caplog.messages),
    )
    assert not [content for content in canaries if SECRET.encode() in content]


# -- losing a machine -------------------------------------------------------------------------------------------------


def test_answers_that_were_pushed_survive_the_machine_that_paid_for_them(tmp_path: Path, bucket: str) -> None:
    killed = threading.Event()

    def script(asked: endpoint.Asked) -> endpoint.Reply:
        if asked.n > 80:
            killed.wait(200)
        return score_of(asked)

    with serve(script) as server:
        r = endpoint.recipe(tmp_path, server.url, n=120, concurrency=4)
        path = tmp_path / "recipe.yaml"
        given = r.model_dump(mode="json") | {"run_folder": f"{bucket}/edu", "mirror_every_s": 0.1}
        path.write_text(json.dumps(given), encoding="utf-8")
        with started(tmp_path / "a", path, "rate") as process:
            wait_for(lambda: n_answers(f"{bucket}/edu", tmp_path) >= 20, process)
        killed.set()
        time.sleep(0.3)  # what was on its way to the server is there now
        pushed, n_before = n_answers(f"{bucket}/edu", tmp_path), len(server.asked)
        [result] = run(tmp_path / "b", path, "rate")
        assert (result.n_scored, result.n_reused) == (120, pushed)
        assert len(server.asked) - n_before == 120 - pushed, "what was pushed is not paid for again"
        run(tmp_path / "whole", path, "rate", run_folder="runs/whole", mirror=None)
    [local] = (tmp_path / "whole").rglob("ratings.parquet")
    assert objects(f"{bucket}/edu")["rate/ratings.parquet"] == local.read_bytes()


def n_answers(url: str, folder: Path) -> int:
    """Answers in the copy of the store, which is whole whenever it is looked at."""
    fs, root = fsspec.core.url_to_fs(url)
    if not fs.exists(f"{root}/rate/answers.sqlite"):
        return 0
    copy = folder / "copy.sqlite"
    fs.get_file(f"{root}/rate/answers.sqlite", str(copy))
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, store: Store, texts: list[str], tiny_encoder: Path) -> Path:
    """A student and two corpora: s3://corpora/few of 4 shards, s3://corpora/many of 12 that can be interrupted."""
    folder = tmp_path_factory.mktemp("shared")
    weight = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    head = Head("score", "score", (Layer(weight, np.array([2.5], np.float32)),), (0, 5))
    settings = {"model": str(tiny_encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu"}
    Student(config.Encoder.model_validate(settings), (head,)).save(folder / "student")
    s3().mkdir("corpora")
    for name, n_shards, n in (("few", 4, 20), ("many", 12, len(texts))):
        (folder / name).mkdir()
        for shard in range(n_shards):
            rows = [{"text": f"{shard} {text}"} for text in texts[:n]]
            pq.write_table(pa.Table.from_pylist(rows), folder / name / f"part-{shard:02d}.parquet")
        upload(folder / name, f"s3://corpora/{name}")
    return folder


@pytest.fixture(scope="module")
def whole(shared: Path) -> dict[str, dict[str, bytes]]:
    """What a run without a store makes of both corpora."""
    made = {}
    for name in ("few", "many"):
        recipe = scoring_of(shared / f"{name}.yaml", shared, str(shared), str(shared / name))
        run(shared, recipe, "score", run_folder=f"runs/{name}")
        made[name] = files(shared / "runs" / name / "score" / "scored")
    return made


def scoring_of(path: Path, shared: Path, url: str, corpus: str) -> Path:
    """A recipe that scores a corpus with the student that is there, and filters it."""
    recipe = {
        "run_folder": f"{url}/edu",
        "mirror_every_s": 0.2,
        "corpus": {"path": corpus},
        "encoder": {"device": "cpu", "dtype": "float32", "workers": 1},
        "score": {"student": str(shared / "student")},
        "filter": {"keep_share": 0.3},
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.fixture
def scoring(tmp_path: Path, shared: Path, bucket: str) -> Path:
    """A recipe that scores 4 small shards."""
    return scoring_of(tmp_path / "recipe.yaml", shared, bucket, "s3://corpora/few")


@pytest.fixture
def long_scoring(tmp_path: Path, shared: Path, bucket: str) -> Path:
    """A recipe that scores 12 shards and takes so long that it can be interrupted."""
    return scoring_of(tmp_path / "recipe.yaml", shared, bucket, "s3://corpora/many")


def n_scored(url: str) -> int:
    """Shards that can be seen."""
    return sum(name.endswith(".parquet") for name in s3().find(f"{url.removeprefix('s3://')}/edu/score"))


def scored(url: str) -> dict[str, bytes]:
    return objects(f"{url}/edu/score/scored")


def test_scoring_that_was_killed_goes_on_on_another_machine_and_shards_are_whole_at_all_times(
    tmp_path: Path, long_scoring: Path, bucket: str, whole: dict[str, dict[str, bytes]]
) -> None:
    with watched(bucket) as seen:
        with started(tmp_path / "a", long_scoring, "score") as process:
            wait_for(lambda: n_scored(bucket) >= 1, process)
        before = scored(bucket)
        n_there = len(before)
        [result] = run(tmp_path / "b", long_scoring, "score")
    assert n_there < 12 and (result.n_shards, result.n_shards_reused) == (12, n_there)
    assert {name.rpartition("/")[2] for name in seen if "/scored/" in name} == set(scored(bucket))
    assert not [name for name in seen if name.endswith(".tmp")]
    assert scored(bucket) == whole["many"]
    [here] = (tmp_path / "b" / "runs").iterdir()
    made = manifest.read(here / "score" / "manifest.json")
    assert made is not None
    unread = {
        path.removeprefix("score/").removeprefix("scored/") for path, each in made.files.items() if not each.sha256
    }
    assert unread == set(before), "what the other machine put there is not fetched to be hashed"
    assert not verify.run(here)["damaged"]
    name = min(before)
    s3().pipe_file(f"{bucket.removeprefix('s3://')}/edu/score/scored/{name}", flipped(before[name]))
    [damage] = verify.run(here)["damaged"]
    assert damage["path"] == f"scored/{name}" and damage["what"].startswith("other content: row group 0")


def flipped(content: bytes) -> bytes:
    """A parquet file with other bits in the middle of its pages."""
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def test_a_store_that_goes_away_ends_the_run_in_one_line_and_the_same_command_goes_on(
    tmp_path: Path, long_scoring: Path, bucket: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0.1,))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def go_away() -> None:
        while n_scored(bucket) < 1:
            time.sleep(0.01)
        store.stop()

    thread = threading.Thread(target=go_away)
    thread.start()
    with pytest.raises(UserError, match=r"cannot write s3://|is out of reach") as told:
        run(tmp_path / "a", long_scoring, "score")
    thread.join()
    assert "\n" not in str(told.value)
    store.start_again()
    n_there = n_scored(bucket)
    [result] = run(tmp_path / "a", long_scoring, "score")
    assert 1 <= n_there < 12 and result.n_shards_reused == n_there
    assert json.loads(objects(f"{bucket}/edu")["score/result.json"]) == result.model_dump(mode="json")
    assert not list((tmp_path / "temporary").iterdir())


# -- outputs and readers ----------------------------------------------------------------------------------------------


LOCAL = {"run_folder": "runs/a", "mirror": None}


def test_outputs_go_where_the_recipe_says_and_later_stages_find_them(
    tmp_path: Path, scoring: Path, bucket: str
) -> None:
    run(tmp_path, scoring, "score", **LOCAL, score={"output": f"{bucket}/out/edu", "keep_embeddings": True})
    given = {"keep_share": 0.3, "output": f"{bucket}/out/best", "keep_dropped": True, "output_format": "jsonl"}
    [result] = run(tmp_path, scoring, "filter", **LOCAL, filter=given)
    made = objects(f"{bucket}/out")
    counts = Counter(name.split("/")[0] for name in made)
    assert counts == dict.fromkeys(("edu", "edu-embeddings", "best", "best-dropped"), 4)
    for side, n in (("best", result.n_kept), ("best-dropped", result.n_dropped)):
        assert sum(made[name].count(b"\n") for name in made if name.startswith(f"{side}/")) == n
    [again] = run(tmp_path, scoring, "filter", **LOCAL, filter={**given, "keep_dropped": False}, redo=True)
    after = objects(f"{bucket}/out")
    assert again.n_kept == result.n_kept and not [name for name in after if name.startswith("best-dropped/")]
    assert after == {name: content for name, content in made.items() if not name.startswith("best-dropped/")}
    [drawn] = run(tmp_path, scoring, "filter", **LOCAL, filter={"keep_share": 0.2, "sampling": "density"}, redo=True)
    assert drawn.n_kept > 0


def test_a_folder_with_files_of_others_is_never_swept(tmp_path: Path, scoring: Path, bucket: str) -> None:
    s3().pipe_file(f"{bucket.removeprefix('s3://')}/mine/thesis.parquet", b"years of work")
    with pytest.raises(UserError, match=r"score.output: s3://.*/mine holds thesis.parquet, .* empty folder"):
        run(tmp_path, scoring, "score", **LOCAL, score={"output": f"{bucket}/mine"})
    run(tmp_path, scoring, "score", **LOCAL)
    with pytest.raises(UserError, match=r"filter.output: s3://.*/mine holds thesis.parquet, .* empty folder"):
        run(tmp_path, scoring, "filter", **LOCAL, filter={"keep_share": 0.3, "output": f"{bucket}/mine"})
    assert objects(f"{bucket}/mine") == {"thesis.parquet": b"years of work"}


def test_commands_that_only_read_take_the_url_of_a_run(
    tmp_path: Path, scoring: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", scoring, "score")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    cli.status(Path(f"{bucket}/edu"), how=How())
    assert json.loads(capsys.readouterr().out)["score"]["state"] == "done"
    cli.plan(scoring, how=How())
    assert json.loads(capsys.readouterr().out)["cuts"]["n_scored"] > 0
    cli.verify(Path(f"{bucket}/edu"), how=How())
    verified = json.loads(capsys.readouterr().out)
    assert verified["n_files"] >= 4 and not verified["damaged"]
    with pytest.raises(UserError, match="holds no run"):
        cli.status(Path(f"{bucket}/other"), how=How())


def test_machines_that_share_nothing_but_the_store_each_do_a_part(
    tmp_path: Path, scoring: Path, bucket: str, whole: dict[str, dict[str, bytes]]
) -> None:
    for name in ("1/2", "2/2"):
        [part] = run(tmp_path / name[0], scoring, "score", shard=name)
        assert part.n_shards == 2
    [result] = run(tmp_path / "c", scoring, "score")
    assert (result.n_shards, result.n_shards_reused) == (4, 4)
    assert scored(bucket) == whole["few"]


# -- two sides --------------------------------------------------------------------------------------------------------


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """An empty folder of a store in memory."""
    return f"memory://bucket/{request.node.name}"


def machine(folder: Path, url: str) -> mirror.Mirror:
    """The mirror as one machine sees it."""
    made = mirror.of(Recipe.model_validate({"run_folder": folder, "mirror": url}))
    assert made is not None
    return made


def write(at: mirror.Mirror, name: str, text: str) -> None:
    storage.write_text(at.folder / name, text)


def text(at: mirror.Mirror, name: str) -> str:
    return (at.folder / name).read_text(encoding="utf-8")


def test_what_changed_on_two_machines_is_refused_and_nothing_is_overwritten(tmp_path: Path, url: str) -> None:
    a, b = machine(tmp_path / "a", url), machine(tmp_path / "b", url)
    write(a, "rate/note.txt", "first")
    mirror.push(a)
    mirror.fetch(b)
    write(a, "rate/note.txt", "by a")
    write(b, "rate/note.txt", "by b")
    mirror.push(a)
    for again in (mirror.push, mirror.fetch):
        with pytest.raises(mirror.Conflict, match=r"rate/note.txt has changed in .*/b and in memory://.* move .*/b"):
            again(b)
    assert objects(url) == {"rate/note.txt": b"by a"}
    assert text(b, "rate/note.txt") == "by b"
    write(b, "rate/note.txt", "by a")
    mirror.push(b)


def test_what_only_one_side_changed_goes_to_the_other(tmp_path: Path, url: str) -> None:
    a, b = machine(tmp_path / "a", url), machine(tmp_path / "b", url)
    write(a, "train/student/head.json", "first")
    write(a, "run.log", "log of a")
    mirror.push(a)
    mirror.fetch(b)
    write(b, "train/student/head.json", "better")
    write(b, "run.log", "log of b")
    mirror.push(b)
    mirror.fetch(a)
    assert text(a, "train/student/head.json") == "better"
    (a.folder / "train" / "student" / "head.json").unlink()
    mirror.fetch(a)
    assert text(a, "train/student/head.json") == "better", "what was lost here comes back"


def test_locks_temporary_files_corpora_and_checkpoints_stay_here(tmp_path: Path, url: str) -> None:
    a = machine(tmp_path / "a", url)
    for name in ("rate/.x.tmp", "score/scored/a.parquet", "filter/kept/a.parquet", "score/seen.1.sqlite"):
        write(a, name, "no")
    for name in ("finetune/checkpoints/1/a.json", "rate/answers.sqlite-wal", ".lock"):
        write(a, name, "no")
    write(a, "rate/ratings.parquet", "yes")
    mirror.push(a)
    assert list(objects(url)) == ["rate/ratings.parquet"]


def test_a_result_is_there_only_after_what_it_vouches_for(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, order = machine(tmp_path / "a", url), list[str]()
    put = storage.put
    monkeypatch.setattr(storage, "put", lambda file, place: (order.append(place.name), put(file, place)))
    for name in ("rate/result.json", "rate/a.parquet", "train/zz.json", "rate/manifest.json"):
        write(a, name, name)
    mirror.push(a)
    assert set(order[:2]) == {"a.parquet", "zz.json"} and set(order[2:]) == {"result.json", "manifest.json"}


def test_a_result_is_taken_back_there_before_a_stage_changes_anything(tmp_path: Path, url: str) -> None:
    recipe = Recipe.model_validate({"run_folder": tmp_path / "run", "mirror": url})
    with mirror.kept(recipe):
        at = mirror.AT_WORK[0]
        write(at, "rate/result.json", "{}")
        write(at, "rate/other.json", "{}")
        mirror.push(at)
        mirror.forget(at.folder / "rate" / "result.json")
        assert list(objects(url)) == ["rate/other.json"]
        b = machine(tmp_path / "b", url)
        mirror.fetch(b)
    mirror.fetch(at)
    assert not (at.folder / "rate" / "result.json").exists(), "a machine that was killed then does the stage again"


def test_a_database_is_copied_whole_while_it_is_written_to(tmp_path: Path, url: str) -> None:
    a, b = machine(tmp_path / "a", url), machine(tmp_path / "b", url)
    (a.folder / "rate").mkdir(parents=True)
    with AnswerStore(a.folder / "rate" / "answers.sqlite") as answers:
        answers.add([("one", Answer("stop", "1"))])
        mirror.push(a)
        answers.add([("two", Answer("stop", "2"))])
        mirror.push(a)
    mirror.fetch(b)
    with AnswerStore(b.folder / "rate" / "answers.sqlite") as copied:
        assert [key for key, _ in copied.find(["one", "two"])] == ["one", "two"]
    assert not list(a.folder.rglob(".*.tmp"))


def test_a_conflict_stops_the_work_in_one_line(tmp_path: Path, url: str) -> None:
    recipe = Recipe.model_validate({"run_folder": tmp_path / "a", "mirror": url, "mirror_every_s": 0.05})
    with pytest.raises(mirror.Conflict, match=r"rate/note.txt has changed"), mirror.kept(recipe):
        UPath(f"{url}/rate/note.txt").write_text("by another machine")
        write(mirror.AT_WORK[0], "rate/note.txt", "by this one")
        time.sleep(30)
    assert objects(url)["rate/note.txt"] == b"by another machine"


def test_what_a_failed_stage_left_is_pushed_too(tmp_path: Path, url: str) -> None:
    recipe = Recipe.model_validate({"run_folder": tmp_path / "a", "mirror": url})
    for error in (UserError("no room"), KeyboardInterrupt()):
        with pytest.raises(type(error)), mirror.kept(recipe):
            write(mirror.AT_WORK[0], "rate/note.txt", type(error).__name__)
            raise error
        assert objects(url)["rate/note.txt"] == type(error).__name__.encode()


@pytest.mark.parametrize("fetched", [True, False])
def test_a_push_that_was_cut_off_is_no_conflict(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, fetched: bool
) -> None:
    a = machine(tmp_path / "a", url)
    write(a, "rate/note.txt", "first")
    put = storage.put

    def put_and_die(file: Path, place: UPath) -> None:
        put(file, place)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "put", put_and_die)
        mirror.push(a)
    write(a, "rate/note.txt", "second")
    if fetched:
        mirror.fetch(a)
    mirror.push(a)
    assert objects(url) == {"rate/note.txt": b"second"}


def test_a_push_of_many_files_writes_down_what_it_is_about_to_do_once(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, times = machine(tmp_path / "a", url), list[int]()
    for number in range(40):
        write(a, f"filter/tallies/{number}.json", str(number))
    write_state = mirror.write_state
    monkeypatch.setattr(mirror, "write_state", lambda at, known: (times.append(len(known)), write_state(at, known)))
    mirror.push(a)
    assert len(objects(url)) == 40 and times == [40, 40], "before and after"


def test_folders_that_a_console_made_are_no_files(tmp_path: Path, bucket: str) -> None:
    name = bucket.removeprefix("s3://")
    for key in ("edu/", "edu/rate/", "edu/score/scored/"):
        s3().call_s3("put_object", Bucket=name, Key=key, Body=b"")
    for key in ("rate/note.txt", "score/scored/a.parquet"):
        s3().pipe_file(f"{name}/edu/{key}", b"yes")
    a = machine(tmp_path / "a", f"{bucket}/edu")
    mirror.fetch(a)
    assert [path for path in files(a.folder) if not path.startswith(".")] == ["rate/note.txt"]
    scored = places.of(f"{bucket}/edu/score/scored", "score.output")
    assert places.names(scored) == {"a.parquet"}
    assert [*manifest.walk(tmp_path / "none", {"scored": str(scored)})] == ["scored/a.parquet"]
    assert not mirror.there(machine(tmp_path / "b", f"{bucket}/edu/rate/note.txt")), "a file is no run"


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"run_folder": "s3://no-such-bucket/edu"}, r"cannot write s3://no-such-bucket/edu/.* check bucket"),
        ({"score": {"output": "s3://no-such-bucket/edu"}}, r"cannot write s3://no-such-bucket/edu/.* check bucket"),
        ({"run_folder": "gs://bucket/edu"}, r"mirror: gs://bucket/edu needs a package: .*gcsfs"),
        ({"mirror": "s3://key:secret@bucket/edu"}, "mirror: a URL must not hold a password"),
        ({"mirror": "s3://bucket"}, "mirror: s3://bucket is a whole bucket; give a folder in it"),
        ({"mirror": "nowhere://bucket/edu"}, r"mirror: .*nowhere:// is not understood"),
        (
            {"corpus": {"path": "s3://b/x"}, "mirror": "s3://b/x/run"},
            "mirror: s3://b/x/run lies in corpus.path",
        ),
        (
            {"corpus": {"path": "s3://b/x/*.parquet"}, "filter": {"output": "s3://b/x"}},
            "corpus.path: .* lies in filter.o",
        ),
        (
            {"score": {"output": "s3://b/x"}, "filter": {"output": "s3://b/x/kept"}},
            r"filter.output: .* lies in score.o",
        ),
    ],
)
def test_a_place_that_cannot_be_written_to_is_one_line_before_anything_is_done(
    tmp_path: Path, recipe_file: Path, store: Store, given: Given, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told) as error:
        cli.execute(["rate"], recipe_file, given, How())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("answers.sqlite"))


@pytest.mark.parametrize("missing", ["endpoint", "credentials"])
def test_a_store_that_does_not_answer_or_know_us_is_one_line_soon(
    tmp_path: Path, recipe_file: Path, store: Store, missing: str
) -> None:
    gone = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"} if missing == "endpoint" else {}
    kept = {name: value for name, value in os.environ.items() if missing == "endpoint" or "AWS_" not in name[:4]}
    env = kept | gone | {"AWS_ENDPOINT_URL": gone.get("AWS_ENDPOINT_URL", store.url), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "rate", str(recipe_file), "--run-folder", "s3://bucket/edu"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    [line] = [line for line in done.stderr.splitlines() if line.startswith("gristmill: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert line.startswith("gristmill: cannot write s3://bucket/edu/") and "credentials" in line
    assert SECRET not in done.stderr
