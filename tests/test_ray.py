"""A real cluster of three nodes on this machine: the same bytes as without one, whatever is killed in the middle.

These tests take minutes and a machine that is not busy, so they run with GRISTMILL_RAY=1 only.
`python tests/test_ray.py ADDRESS FOLDER KIND SETTINGS` works on thirty numbers, as a stage does on shards.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cluster, config, filter, locks, prove, rate, score
from pipeline.config import Recipe
from pipeline.engines import ray as engine
from pipeline.errors import UserError
from pipeline.student import Head, Layer, Student

N_NUMBERS, N_SHARDS, N_ROWS = 30, 24, 20
WAIT_S = 200
"""A busy machine takes its time to start processes."""
pytestmark = pytest.mark.timeout(900)
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_USAGE_STATS_ENABLED": "0"}
"""Lets commands into this cluster, and nothing else."""


# -- a stage of the test's own ----------------------------------------------------------------------------------------


def load(folder: Path, kind: str) -> Callable[[int], str]:
    """Leaves a file for each time it is called, as a model would be loaded."""
    (folder / f"loaded-{os.getpid()}-{time.monotonic_ns()}").touch()
    if kind == "refused":
        raise UserError("student: there is none; train one")
    if kind == "broken":
        raise ZeroDivisionError("a bug of ours")
    cluster.log.info("loaded in a process")
    return partial(work, folder, kind)


def work(folder: Path, kind: str, number: int) -> str:
    """Leaves a file for each time it is called; what the actor sees of its machine."""
    if kind == "deadly" and number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    cluster.log.info("working on %d", number)
    if number % 2:
        cluster.log.warning("odd numbers are slow")
    time.sleep(0.3 if kind == "slow" else 0)
    (folder / f"done-{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
    return json.dumps([os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_TEST")])


def drive(address: str, folder: str, kind: str, settings: str) -> None:
    """Work on thirty numbers, and print each with what came of it."""
    given = config.Ray.model_validate({"address": address, **json.loads(settings)})
    for number, made in cluster.over(given, partial(load, Path(folder), kind), range(N_NUMBERS)):
        os.write(1, f"{number} {made}\n".encode())


if __name__ == "__main__":
    from pipeline import cli

    cli.alone(lambda: drive(*sys.argv[1:]))


# -- the cluster ------------------------------------------------------------------------------------------------------


class Node:
    """`ray start` and all processes under it; a busy machine needs several tries, for Ray gives itself 30 s."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log, self.arguments, self.tries = log, arguments, 0
        while not self.starts():
            assert self.tries < 8, self.log.read_text()

    def starts(self) -> bool:
        """Whether it comes up."""
        self.tries += 1
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
        small = ["--num-cpus=1", "--object-store-memory=80000000"]
        env = {**os.environ, **TOKEN}
        with self.log.open("w") as out:
            started = [*command, *small, *self.arguments]
            self.process = subprocess.Popen(started, stdout=out, stderr=out, start_new_session=True, env=env)
        while "Ray runtime started" not in self.log.read_text():
            if self.process.poll() is not None:
                return False
            time.sleep(0.1)
        return True

    def kill(self) -> None:
        """kill -9 of everything at once, as when a machine is gone."""
        if self.process.poll() is None:
            for number in [*children(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        self.process.wait()


def children(number: int) -> list[int]:
    """All processes below one."""
    own = list[int]()
    for thread in Path(f"/proc/{number}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            own += map(int, thread.read_text().split())
    return [*own, *(below for each in own for below in children(each))]


def has_open(folder: Path, number: int) -> bool:
    """Whether a process has a file of this folder open."""
    with contextlib.suppress(OSError):
        return any(file.readlink().is_relative_to(folder) for file in Path(f"/proc/{number}/fd").iterdir())
    return False


class Cluster:
    """A head where no actor has room, and two nodes beside it, each with four declared GPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[Node] = []
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}"]
        self.head = Node(folder / "head.out", *head)

    def complete(self) -> "Cluster":
        """With new nodes in the place of those that were killed."""
        while len(self.nodes) < 2:
            self.nodes.append(Node(self.folder / "node.out", f"--address={self.address}", "--num-gpus=4"))
        return self

    def kill_a_node(self) -> None:
        """Kill one that is not the head."""
        self.nodes.pop(0).kill()

    def with_open(self, folder: Path) -> Node | None:
        """A node, not the head, of which a process has a file of this folder open."""
        holds = partial(has_open, folder)
        return next((node for node in self.nodes if any(map(holds, children(node.process.pid)))), None)

    def kill(self) -> None:
        """Kill all."""
        for node in [*self.nodes, self.head]:
            node.kill()


def free_port() -> int:
    """A port where nobody listens."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(ready: Callable[[], bool], process: "subprocess.Popen[Any]") -> None:
    """Until the moment has come, in a process that is still at work."""
    deadline = time.monotonic() + WAIT_S
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    if not os.environ.get("GRISTMILL_RAY"):
        pytest.skip("starts a cluster; set GRISTMILL_RAY=1")
    folder = Path(tempfile.mkdtemp(prefix="gm", dir="/tmp"))
    with contextlib.ExitStack() as running:
        running.callback(shutil.rmtree, folder, ignore_errors=True)
        made = Cluster(folder)
        running.callback(made.kill)
        yield made


@pytest.fixture
def three(nodes: Cluster) -> Cluster:
    return nodes.complete()


class Done:
    """A command that has ended."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.out, self.err = process.communicate(timeout=WAIT_S)
        self.code = process.returncode


def start(*arguments: str, **env: str) -> "subprocess.Popen[str]":
    """A command of Python in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **TOKEN, **env},
    )


def numbers(address: str, folder: Path, kind: str = "plain", env: Any = None, **settings: Any) -> Any:
    """The stage of the test's own, on a cluster."""
    return start(__file__, address, str(folder), kind, json.dumps(settings), **(env or {}))


# -- without a cluster ------------------------------------------------------------------------------------------------


def machine(cpus: float, gpus: float = 0, is_up: bool = True) -> dict[str, Any]:
    """A machine as Ray describes it."""
    return {"Alive": is_up, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


def test_an_actor_has_room_where_one_machine_has_all_that_it_asks_for() -> None:
    machines = [machine(8, 1), machine(8, 1), machine(3), machine(64, 8, is_up=False)]

    def room(**settings: float) -> int:
        return cluster.n_actors(machines, config.Ray.model_validate(settings), 100)

    assert room(gpus=0.5) == 4
    assert room(gpus=1, cpus=9, actors=2) == 2, "waited for, where that was asked for"
    assert cluster.n_actors(machines, config.Ray(gpus=0.1), 5) == 5
    with pytest.raises(UserError, match="ray: no machine of the cluster has room for an actor with 1 CPUs and 2 GPUs"):
        room(gpus=2)


def test_gpus_that_no_actor_would_use_are_not_passed_over_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "gristmill"):
        assert cluster.n_actors([machine(3, 2)], config.Ray(), 100) == 3

    assert "the cluster has 2 GPUs, and actors compute without one; give --ray.gpus 1" in caplog.text


def test_a_model_over_more_gpus_than_an_actor_has_is_refused() -> None:
    teacher = config.Teacher(engine="vllm", model="m", tensor_parallel_size=2)

    with pytest.raises(UserError, match=r"ray.gpus: each actor has 1 GPUs.* is 2; give --ray.gpus 2"):
        engine.check(config.Ray(gpus=1), teacher)
    engine.check(config.Ray(gpus=2), teacher)


def test_an_address_where_nobody_listens_is_refused_before_ray_tries_it() -> None:
    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}"):
        with pytest.raises(UserError, match=f"ray.address: nobody listens at {address} "):
            cluster.check_listens(address)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(UserError, match=r'ray is not installed.*pip install -e "\.\[ray\]"'):
        next(cluster.over(config.Ray(), lambda: str, [1]))


def test_a_shard_that_a_dying_actor_still_holds_is_waited_for(tmp_path: Path) -> None:
    held, asked = threading.Event(), threading.Event()

    def hold() -> None:
        with locks.held(tmp_path / "lock", ""):
            held.set()
            asked.wait()

    def take(item: str) -> str:
        try:
            with locks.held(tmp_path / "lock", "held by another"):
                return item
        finally:
            asked.set()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    assert cluster.patient(take, "done") == "done"
    holder.join()


# -- any work ---------------------------------------------------------------------------------------------------------


def left(folder: Path, what: str) -> Counter[str]:
    """What the test's stage left, by the second part of the name: process or number."""
    return Counter(path.name.split("-")[1] for path in folder.glob(f"{what}-*"))


def test_each_actor_loads_once_and_a_node_that_is_killed_costs_only_what_it_was_at(
    three: Cluster, tmp_path: Path
) -> None:
    process = numbers(three.address, tmp_path, "slow", actors=2)
    wait_for(lambda: len(left(tmp_path, "done")) > 6 and len(left(tmp_path, "loaded")) == 2, process)
    three.kill_a_node()
    done = Done(process)

    assert done.code == 0, done.err
    assert sorted(int(line.split()[0]) for line in done.out.splitlines()) == list(range(N_NUMBERS))
    assert set(left(tmp_path, "done")) == set(map(str, range(N_NUMBERS)))
    assert left(tmp_path, "done").total() <= N_NUMBERS + 1
    assert set(left(tmp_path, "loaded").values()) == {1}
    assert "another one takes its place" in done.err and "Traceback" not in done.err


def test_what_actors_log_is_read_once_and_not_what_they_say_of_their_progress(three: Cluster, tmp_path: Path) -> None:
    done = Done(numbers(three.address, tmp_path, actors=2))

    assert done.code == 0, done.err
    assert done.err.count("odd numbers are slow\n") == done.err.count("loaded in a process\n") == 1
    assert "working on" not in done.err


def test_actors_have_their_share_of_gpus_threads_and_only_named_parts_of_the_environment(
    three: Cluster, tmp_path: Path
) -> None:
    env = {"HF_TEST": "in the environment"}
    whole = Done(numbers(three.address, tmp_path, "slow", env, cpus=0.4, gpus=2))
    half = Done(numbers(three.address, tmp_path, "slow", env, cpus=0.2, gpus=0.5, actors=2))

    def seen(done: Done) -> list[Any]:
        return [json.loads(line.partition(" ")[2]) for line in done.out.splitlines()]

    assert (whole.code, half.code) == (0, 0), whole.err + half.err
    assert {gpus for gpus, _, _ in seen(whole)} == {"0,1", "2,3"}
    assert {len(gpus) for gpus, _, _ in seen(half)} == {1}
    assert {(threads, named) for _, threads, named in seen(whole) + seen(half)} == {("1", "in the environment")}


def test_work_that_kills_every_actor_ends_the_run_with_one_line(three: Cluster, tmp_path: Path) -> None:
    done = Done(numbers(three.address, tmp_path, "deadly", restarts=2))

    assert done.code == 1 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("gristmill: ray: 2 actors died at the same piece of work (")


def test_what_the_user_can_mend_is_one_line_and_a_bug_keeps_its_traceback(three: Cluster, tmp_path: Path) -> None:
    refused = Done(numbers(three.address, tmp_path, "refused"))
    broken = Done(numbers(three.address, tmp_path, "broken"))

    assert (refused.code, refused.out) == (1, "")
    assert refused.err.splitlines()[-1] == "gristmill: student: there is none; train one"
    assert "Traceback" not in refused.err
    assert broken.code == 1 and "in load" in broken.err and "a bug of ours" in broken.err


# -- the stages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_causal: Path, texts: list[str]) -> Recipe:
    """A recipe with a corpus of many small shards, a student and a teacher; its run folder holds what one process
    makes."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "corpus").mkdir()
    for shard in range(N_SHARDS):
        rows = [f"{shard} {row} {texts[(shard * 7 + row) % len(texts)]}" for row in range(N_ROWS)]
        pq.write_table(pa.table({"text": rows}), folder / "corpus" / f"part-{shard:02}.parquet")
    pq.write_table(pa.table({"text": texts[:20]}), folder / "trusted.parquet")
    encoder = {"model": str(tiny_encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu"}
    weight = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    head = Head("score", "score", (Layer(weight, np.array([2.5], np.float32)),), (0, 5))
    Student(config.Encoder.model_validate(encoder), (head,)).save(folder / "student")
    (folder / "prompt.md").write_text(PROMPT, encoding="utf-8")
    small = {"max_length": 32, "per_device_train_batch_size": 4}
    recipe = {
        "run_folder": folder / "here",
        "corpus": {"path": str(folder / "corpus")},
        "encoder": encoder,
        "teacher": {"model": str(tiny_causal), "dtype": "float32", "device": "cpu", "batch_tokens": 1500},
        "rate": {"prompt": folder / "prompt.md", "sample": 240},
        "score": {"student": folder / "student"},
        "filter": {"keep_share": 0.3},
        "prove": {
            **{"trusted": str(folder / "trusted.parquet"), "arms": ["kept", "rejected"], "seeds": 2, "tokens": 1600},
            **{"vocabulary": 300, "layers": 1, "hidden_size": 32, "device": "cpu", "args": small},
        },
    }
    return Recipe.model_validate(recipe)


PROMPT = """---
scale: [0, 5]
read: choices
answer_start: This text is
choices:
  - {value: 5, answers: [" educational"]}
  - {value: 0, answers: [" spam"]}
---
What kind of text is this?

{{ text }}
"""


@pytest.fixture(scope="module")
def here(made: Recipe) -> Path:
    """The run folder of one process."""
    for stage in (rate, score, filter, prove):
        stage.run(made)
    return made.run_folder


@pytest.fixture
def elsewhere(made: Recipe, tmp_path: Path, here: Path) -> Recipe:
    """The same recipe with a run folder of its own."""
    return made.model_copy(update={"run_folder": tmp_path / "there"})


def command(stage: str, recipe: Recipe, address: str, **settings: Any) -> "subprocess.Popen[str]":
    """The real command, on a cluster."""
    path = recipe.run_folder.with_suffix(".yaml")
    on = {"engine": "ray", "ray": {"address": address, **settings}}
    path.write_text(json.dumps(json.loads(recipe.model_dump_json(exclude_unset=True)) | on), encoding="utf-8")
    return start("-m", "pipeline", stage, str(path))


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def n_scored(recipe: Recipe) -> int:
    """Shards that are there so far."""
    return len(list((recipe.run_folder / "score" / "scored").glob("*.parquet")))


def test_scores_have_the_same_bytes_though_a_node_is_killed(three: Cluster, elsewhere: Recipe, here: Path) -> None:
    process = command("score", elsewhere, three.address, actors=2)
    wait_for(lambda: three.with_open(elsewhere.run_folder) is not None, process)
    three.nodes.sort(key=lambda node: node is not three.with_open(elsewhere.run_folder))
    three.kill_a_node()
    n_then, done = n_scored(elsewhere), Done(process)

    assert done.code == 0, done.err
    assert n_then < N_SHARDS and "another one takes its place" in done.err
    assert files(elsewhere.run_folder / "score" / "scored") == files(here / "score" / "scored")
    assert not list((elsewhere.run_folder / "score").glob("seen*"))
    result, alone = (read_json(folder / "score" / "result.json") for folder in (elsewhere.run_folder, here))
    for name in ("n_rows", "n_scored", "n_shards", "n_windows", "int_score_counts"):
        assert result[name] == alone[name]
    assert result["n_tokens"] >= alone["n_tokens"]


def test_a_killed_command_leaves_no_actor_at_work_and_goes_on_to_the_same_bytes(
    three: Cluster, elsewhere: Recipe, here: Path
) -> None:
    process = command("score", elsewhere, three.address)
    wait_for(lambda: n_scored(elsewhere) > 0, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    n_kept = when_still(lambda: n_scored(elsewhere))
    done = Done(command("score", elsewhere, three.address))

    assert 0 < n_kept < N_SHARDS
    assert done.code == 0, done.err
    assert read_json(elsewhere.run_folder / "score" / "result.json")["n_shards_reused"] == n_kept
    assert files(elsewhere.run_folder / "score" / "scored") == files(here / "score" / "scored")


def when_still(count: Callable[[], int]) -> int:
    """A number once it no longer changes."""
    before = -1
    while before != count():
        before = count()
        time.sleep(5)
    return before


def n_answers(recipe: Recipe) -> int:
    """Answers recorded so far."""
    path = recipe.run_folder / "rate" / "answers.sqlite"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def test_ratings_have_the_same_bytes_though_a_node_and_then_the_command_are_killed(
    three: Cluster, elsewhere: Recipe, here: Path
) -> None:
    n = elsewhere.rate.sample
    process = command("rate", elsewhere, three.address, actors=2)
    wait_for(lambda: n_answers(elsewhere) > 0, process)
    three.kill_a_node()
    wait_for(lambda: n_answers(elsewhere) > n // 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    n_kept = n_answers(elsewhere)
    done = Done(command("rate", elsewhere, three.address))

    assert done.code == 0, done.err
    result = read_json(elsewhere.run_folder / "rate" / "result.json")
    assert (result["n_reused"], result["n_asked"]) == (n_kept, n - n_kept) and 0 < n_kept < n
    same = [(folder / "rate" / "ratings.parquet").read_bytes() for folder in (elsewhere.run_folder, here)]
    assert same[0] == same[1]


def test_a_budget_holds_on_a_cluster(three: Cluster, elsewhere: Recipe) -> None:
    limits = elsewhere.rate.model_copy(update={"budget_tokens": 6000})
    done = Done(command("rate", elsewhere.model_copy(update={"rate": limits}), three.address))

    assert done.code == 0, done.err
    result = json.loads(done.out)["rate"]
    assert result["stopped_by"] == "budget_tokens" and result["n_not_asked"] > 0
    assert 3000 < result["prompt_tokens"] <= 6000


def test_the_kept_corpus_and_the_proof_are_the_same(three: Cluster, elsewhere: Recipe, here: Path) -> None:
    shutil.copytree(here / "score", elsewhere.run_folder / "score")
    kept = Done(command("filter", elsewhere, three.address))
    proven = Done(command("prove", elsewhere, three.address))

    assert (kept.code, proven.code) == (0, 0), kept.err + proven.err
    assert files(elsewhere.run_folder / "filter" / "kept") == files(here / "filter" / "kept")
    result, alone = (read_json(folder / "prove" / "result.json") for folder in (elsewhere.run_folder, here))
    assert {**result, "seconds": 0} == {**alone, "seconds": 0}


def read_json(path: Path) -> dict[str, Any]:
    """A file of a stage."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
