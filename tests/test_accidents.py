"""Accidents: kill -9 anywhere, damaged files, a full disk, a clock that goes back, folders that cannot be written or
have moved, inputs that changed, another version's runs. scripts/accidents.sh runs them all, at more points."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from endpoint import Asked, Done, Endpoint, Reply, one_line, recipe, says, serve, write

from pipeline import cli, embeddings, manifest, rate, report, score, show, summary, tracking, train, unfinished, verify
from pipeline import filter as filter_
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.teacher import AnswerStore

ROOT = Path(__file__).parent.parent
N_KILLS = int(os.environ.get("GRISTMILL_KILLS", "2"))
"""Random points at which each stage is killed."""
N_RAY_KILLS = int(os.environ.get("GRISTMILL_RAY_KILLS", "3"))
in_full = pytest.mark.skipif("GRISTMILL_KILLS" not in os.environ, reason="slow; scripts/accidents.sh runs it")
N_FLIPS = 200
N_SHARDS, OF_SHARD = 4, 15
CONCURRENCY = 4
STAGES = ("rate", "train", "score", "filter")
Shown = Callable[[str, object], None]
"""Keeps a number for scripts/accidents.sh."""


# -- a run, and a process that runs its stages again and again


class Run(NamedTuple):
    """A whole run, never to be changed, the endpoint that rated it, and how often each stage changed its folder."""

    recipe: Recipe
    server: Endpoint
    n_changes: dict[str, int]


class Drill:
    """The real command in children of a process that has everything imported."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "drill.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def start(self, r: Recipe, stage: str, *flags: str, cwd: Path = ROOT, **harm: Any) -> int:
        """Begin a stage; its process."""
        path = cwd / r.run_folder.parent / f"{r.run_folder.name}.json"
        path.write_text(r.model_dump_json(), encoding="utf-8")
        return self.begin(r, [stage, str(path), *flags], cwd, harm)

    def begin(self, r: Recipe, args: list[str], cwd: Path, harm: dict[str, Any]) -> int:
        job = {"args": args, "folder": str(cwd / r.run_folder), "cwd": str(cwd), **harm}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.answer()["pid"])

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def end(self) -> tuple[Done, int]:
        """How a command ended, and how often it changed something in its folder."""
        found = self.answer()
        return Done(found["code"], found["stdout"], found["stderr"]), found["n_changes"]

    def on_run(self, r: Recipe, command: str, *flags: str, cwd: Path = ROOT, **harm: Any) -> Done:
        """A command that looks at a run folder."""
        self.begin(r, [command, str(r.run_folder), *flags], cwd, harm)
        return self.end()[0]

    def __call__(self, r: Recipe, stage: str, *flags: str, **harm: Any) -> Done:
        self.start(r, stage, *flags, **harm)
        return self.end()[0]


@pytest.fixture(scope="module")
def drill() -> Iterator[Drill]:
    made = Drill()
    yield made
    assert made.process.stdin is not None and made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait(30)
    made.process.stdout.close()


def grade(asked: Asked) -> Reply:
    """A teacher: doc-<n> is worth n modulo 6."""
    return says(f"Score: {int(asked.document[4:]) % 6}")


def rows_of(shard: int, texts: list[str]) -> list[dict[str, Any]]:
    numbers = range(shard * OF_SHARD, (shard + 1) * OF_SHARD)
    return [{"id": f"id-{i}", "text": f"doc-{i} {'good ' * (i % 6)} {texts[i % len(texts)][:300]}"} for i in numbers]


def made(folder: Path, url: str, tiny_encoder: Path, texts: list[str]) -> Recipe:
    """A recipe of all four stages over a corpus of a few shards."""
    for shard in range(N_SHARDS):
        write(folder / "corpus", rows_of(shard, texts), f"part-{shard}.parquet")
    write(folder, rows_of(0, texts))  # a file that endpoint.recipe would otherwise make
    n = N_SHARDS * OF_SHARD
    rated = recipe(folder, url, n=n, concurrency=CONCURRENCY, rate={"sample": n}, retries=0, timeout_s=60)
    return Recipe.model_validate(
        {
            **rated.model_dump(),
            "corpus": {"path": str(folder / "corpus"), "id_column": "id"},
            "encoder": {"model": str(tiny_encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu"},
            "filter": {"keep_share": 0.4},
        }
    )


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, texts: list[str], drill: Drill
) -> Iterator[Run]:
    with serve(grade, delay_s=0.01) as server:
        r = made(tmp_path_factory.mktemp("whole"), server.url, tiny_encoder, texts)
        n_changes = {}
        for stage in STAGES:
            drill.start(r, stage)
            done, n_changes[stage] = drill.end()
            assert done.code == 0, done.stderr
        yield Run(r, server, n_changes)


def before(run: Run, folder: Path, stage: str) -> Recipe:
    """A copy of the run that is done up to this stage."""
    r = run.recipe.model_copy(update={"run_folder": folder / "run"})
    r.run_folder.mkdir(parents=True)
    for name in STAGES[: STAGES.index(stage)]:
        shutil.copytree(run.recipe.run_folder / name, r.run_folder / name)
    return r


def copied(run: Run, folder: Path) -> Recipe:
    """A copy of the run and its corpus, to be changed."""
    shutil.copytree(run.recipe.run_folder, folder / "run")
    shutil.copytree(str(run.recipe.corpus.path), folder / "corpus")
    corpus = run.recipe.corpus.model_copy(update={"path": str(folder / "corpus")})
    return run.recipe.model_copy(update={"run_folder": folder / "run", "corpus": corpus})


UNLIKE = ("manifest.json", "recipe.yaml")
"""Files that hold times or paths."""
TIMES = ("seconds", "per_s", "shares", "n_shards_reused", "n_asked", "n_reused", "n_tokens", "padding_share", "tokens")


def outputs(r: Recipe, stage: str) -> dict[str, bytes]:
    """Everything that a stage left, but logs, locks, stores and times."""
    folder = r.run_folder / stage
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    kept = {name: path for name, path in found.items() if manifest.is_finished(name) and path.name not in UNLIKE}
    return {name: timeless(path) if name == "result.json" else path.read_bytes() for name, path in kept.items()}


def timeless(path: Path) -> bytes:
    """A result without what the clock, and what was done before, decide."""
    said = json.loads(path.read_text())
    return json.dumps({key: value for key, value in said.items() if not any(word in key for word in TIMES)}).encode()


def leftovers(r: Recipe) -> list[str]:
    """Temporary files."""
    return [path.name for path in r.run_folder.rglob(".*") if path.name.endswith(".tmp")]


# -- kill -9


@pytest.mark.parametrize("stage", ["train", "score", "filter"])
def test_kill_9_at_random_points_and_the_same_command_ends_with_the_same_bytes(
    tmp_path: Path, whole: Run, drill: Drill, stage: str, record_property: Shown
) -> None:
    at, wanted, n_changes = random.Random(stage), outputs(whole.recipe, stage), whole.n_changes[stage]
    n_killed = 0
    while n_killed < N_KILLS:
        r = before(whole, tmp_path / str(n_killed), stage)
        point, later_s = at.randint(1, n_changes), at.choice([0.0, 0.0, at.random() * 0.05])
        killed = drill(r, stage, die_at=point, die_later_s=later_s)
        if killed.code == 0:
            shutil.rmtree(r.run_folder.parent)
            continue
        assert killed.code == -signal.SIGKILL, killed
        n_killed += 1
        done = drill(r, stage)
        assert done.code == 0, done.stderr
        assert outputs(r, stage) == wanted, f"killed at change {point}, {later_s:.3f} s later"
        assert not leftovers(r)
        assert verify.run(r.run_folder)["damaged"] == []
    record_property("shown", f"{n_killed} kills at random points of {n_changes} changes on disk, bytes identical")


def test_kill_9_at_random_points_of_rating_pays_for_nothing_twice_but_what_was_in_flight(
    tmp_path: Path, whole: Run, drill: Drill, record_property: Shown
) -> None:
    at, wanted, n = random.Random(1), outputs(whole.recipe, "rate"), N_SHARDS * OF_SHARD
    n_repeated = n_in_flight = 0
    for number in range(N_KILLS // 2):
        r, known = before(whole, tmp_path / str(number), "rate"), set[str]()
        n_begin = len(whole.server.asked)
        for _ in range(2):
            n_before = len(whole.server.asked)
            process, until = drill.start(r, "rate"), n_before + at.randint(1, (n - len(known)) // 2)
            kill(process, lambda until=until: len(whole.server.asked) >= until, at.random() * 0.02)  # type: ignore[misc]
            drill.end()
            time.sleep(0.1)  # what was on its way to the server is there now
            asked = [each.document for each in whole.server.asked[n_before:]]
            assert len(asked) == len(set(asked)) and not known & set(asked), "recorded, and asked again"
            known = recorded(r)
            in_flight = set(asked) - known
            assert len(in_flight) <= CONCURRENCY
            n_in_flight += len(in_flight)
        n_before = len(whole.server.asked)
        done = drill(r, "rate")
        assert done.code == 0, done.stderr
        asked = [each.document for each in whole.server.asked[n_before:]]
        assert not known & set(asked), "recorded, and asked again"
        assert len(asked) == n - len(known)
        assert rows_rated(r) == rows_rated(whole.recipe)
        assert outputs(r, "rate") == wanted and verify.run(r.run_folder)["damaged"] == []
        n_repeated += len(whole.server.asked) - n_begin - n
    assert n_repeated <= n_in_flight
    n_kills = N_KILLS // 2 * 2
    bound = n_kills * CONCURRENCY
    told = f"{n_repeated} requests repeated, {n_in_flight} in flight at the kills (at most {bound}), bytes identical"
    record_property("shown", f"{n_kills} kills, {told}")


def rows_rated(r: Recipe) -> list[dict[str, Any]]:
    """The ratings, whose differences can be read."""
    rows: list[dict[str, Any]] = pq.read_table(r.run_folder / "rate" / "ratings.parquet").to_pylist()
    return rows


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stage", "made"), [("score", "scored"), ("filter", "kept")])
def test_kill_9_of_a_command_whose_actors_work_and_it_ends_with_the_same_bytes(
    tmp_path: Path, stage: str, made: str, whole: Run, drill: Drill, record_property: Shown
) -> None:
    if not os.environ.get("GRISTMILL_RAY"):
        pytest.skip("starts clusters; set GRISTMILL_RAY=1")
    at, wanted, flags = random.Random(2), outputs(whole.recipe, stage), ("--engine", "ray", "--ray.actors", "1")
    n_shards = [0, *at.choices(range(N_SHARDS), k=N_RAY_KILLS - 1)]
    for number, n in enumerate(n_shards):
        r = before(whole, tmp_path / str(number), stage)
        shards, process = r.run_folder / stage / made, drill.start(r, stage, *flags)
        kill(process, lambda folder=shards, n=n: len(list(folder.glob("*.parquet"))) >= n, at.random())  # type: ignore[misc]
        assert drill.end()[0].code == -signal.SIGKILL
        done = drill(r, stage, *flags)
        assert done.code == 0, done.stderr
        assert outputs(r, stage) == wanted and verify.run(r.run_folder)["damaged"] == []
    record_property("shown", f"kills when {n_shards} of {N_SHARDS} shards were there, bytes identical")


def kill(process: int, is_time: Callable[[], bool], later_s: float) -> None:
    """Kill a command when it is time, or a moment later."""
    deadline = time.monotonic() + 120
    while not is_time():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(later_s)
    os.killpg(process, signal.SIGKILL)


def recorded(r: Recipe) -> set[str]:
    """The documents whose answers are on disk."""
    from pipeline.corpus import text_id

    names = {text_id(row["text"]): row["text"].split()[0] for row in corpus_rows(r)}
    path = r.run_folder / "rate" / "answers.sqlite"
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path)) as db:
        there = db.execute("SELECT name FROM sqlite_master WHERE name = 'answers'").fetchone()
        return {names[key.split(":")[1]] for (key,) in db.execute("SELECT key FROM answers")} if there else set()


def corpus_rows(r: Recipe) -> list[dict[str, Any]]:
    return [
        row for path in sorted(Path(str(r.corpus.path)).glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


# -- damaged files


def flip(path: Path, at: random.Random) -> None:
    """One bit, anywhere."""
    raw = bytearray(path.read_bytes())
    raw[at.randrange(len(raw))] ^= 1 << at.randrange(8)
    path.write_bytes(raw)


def test_every_flipped_bit_in_anything_that_a_run_made_is_found(
    tmp_path: Path, whole: Run, record_property: Shown
) -> None:
    r, at = copied(whole, tmp_path), random.Random(0)
    stages = [r.run_folder / stage for stage in STAGES]
    files = [folder / name for folder in stages for name in [*manifest.walk(folder, {}), manifest.FILE]]
    kinds = {path.suffix for path in files}
    assert {".parquet", ".safetensors", ".json"} <= kinds
    assert verify.run(r.run_folder)["damaged"] == []
    n_found = 0
    for number in range(N_FLIPS):
        path = files[number % len(files)]
        raw = path.read_bytes()
        flip(path, at)
        found = found_in(r)
        n_found += path.relative_to(r.run_folder).as_posix() in found
        assert len(found) >= 1
        path.write_bytes(raw)
    record_property("shown", f"{n_found} of {N_FLIPS} bits, in {len(files)} files: {', '.join(sorted(kinds))}")
    assert n_found == N_FLIPS


def found_in(r: Recipe) -> dict[str, str]:
    """What verify finds wrong, by file."""
    found = verify.run(r.run_folder)["damaged"]
    return {"/".join(filter(None, [each["stage"], each["path"]])): each["what"] for each in found}


def test_a_file_that_is_gone_cut_swapped_or_flipped_is_named_with_what_is_wrong(tmp_path: Path, whole: Run) -> None:
    r = copied(whole, tmp_path)
    scored, kept = r.run_folder / "score" / "scored", r.run_folder / "filter" / "kept"
    (scored / "part-0.parquet").unlink()
    os.truncate(scored / "part-1.parquet", 100)
    raw = [(scored / f"part-{n}.parquet").read_bytes() for n in (2, 3)]
    for n, content in zip((3, 2), raw, strict=True):
        (scored / f"part-{n}.parquet").write_bytes(content)
    page = bytearray((kept / "part-0.parquet").read_bytes())
    page[len(page) // 4] ^= 1
    (kept / "part-0.parquet").write_bytes(page)
    (r.run_folder / "filter" / "stray.parquet").write_bytes(b"")
    with (r.run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sco')
    found = found_in(r)
    assert found["score/scored/part-0.parquet"] == "missing"
    assert found["score/scored/part-1.parquet"].startswith("100 bytes instead of ")
    for name in ("part-2", "part-3"):
        assert found[f"score/scored/{name}.parquet"].split()[:2] != ["missing"]
    assert found["filter/kept/part-0.parquet"].startswith("other content: row group 0 of 1")
    assert found["metrics.jsonl"] == "line 5 cannot be read"
    assert len(found) == 6
    assert verify.run(r.run_folder)["n_unknown"] == 1


def test_what_verify_removes_is_made_again_by_the_same_commands_and_nothing_else(
    tmp_path: Path, whole: Run, drill: Drill
) -> None:
    r = copied(whole, tmp_path)
    at = random.Random(3)
    for name in ("rate/ratings.parquet", "train/student/head.safetensors", "score/scored/part-2.parquet"):
        flip(r.run_folder / name, at)
    flip(r.run_folder / "filter/kept/part-1.parquet", at)
    n_asked = len(whole.server.asked)
    said = drill.on_run(r, "verify", "--remove")
    assert said.code == 1 and "4 damaged or missing" in said.stderr
    assert "run gristmill rate, train, score, filter again" in said.stderr
    for stage in STAGES:
        done = drill(r, stage)
        assert done.code == 0, done.stderr
        assert outputs(r, stage) == outputs(whole.recipe, stage)
        if stage == "score":
            assert json.loads(done.stdout)["score"]["n_shards_reused"] == N_SHARDS - 1
    assert len(whole.server.asked) == n_asked, "answers are recorded"
    assert found_in(r) == {}


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_that_was_removed_or_cut_is_made_again_though_its_stage_was_done(
    tmp_path: Path, whole: Run, drill: Drill, stage: str
) -> None:
    r = copied(whole, tmp_path)
    files = [r.run_folder / stage / name for name in sorted(outputs(r, stage))]
    *cut, removed = [path for path in files if path.suffix in (".parquet", ".safetensors")]
    n_asked = len(whole.server.asked)
    removed.unlink()
    for path in cut[:1]:
        os.truncate(path, path.stat().st_size - 1)
    done = drill(r, stage)
    assert done.code == 0, done.stderr
    assert f"{stage}: gone, cut off or changed, and made again: " in done.stderr and removed.name in done.stderr
    assert outputs(r, stage) == outputs(whole.recipe, stage)
    assert len(whole.server.asked) == n_asked


def test_what_somebody_changed_is_refused_and_never_removed_by_a_stage(tmp_path: Path, whole: Run) -> None:
    r = copied(whole, tmp_path)
    path = r.run_folder / "rate" / "ratings.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    mine = path.read_bytes()
    with pytest.raises(UserError, match=r"rate: \S+ratings\.parquet has \d+ bytes and was made with \d+; .* --remove"):
        rate.run(r)
    assert path.read_bytes() == mine
    rate.run(r, redo=True)
    assert outputs(r, "rate") == outputs(whole.recipe, "rate")
    path.write_bytes(mine)
    card = r.run_folder / "train" / "student" / "README.md"
    card.write_text("My own words.")
    assert set(found_in(r)) == {"rate/ratings.parquet", "train/student/README.md"}
    verify.run(r.run_folder, remove=True)
    assert card.read_text() == "My own words." and not path.exists()
    rate.run(r)
    train.run(r)
    assert card.read_text() == "My own words.", "a card is for people to change"


def test_a_trained_model_without_one_of_its_files_is_trained_again(tmp_path: Path) -> None:
    class Trained(tracking.Result):
        pass

    r = Recipe(run_folder=tmp_path / "run")
    for harm in ("flipped", "gone"):
        model = r.run_folder / "finetune" / "model"
        with tracking.stage("finetune", r, {}) as work:
            work.finished(Trained, True, False)
            model.mkdir(parents=True)
            for name in ("config.json", "model.safetensors"):
                (model / name).write_bytes(b"of a model")
            work.finish(Trained(seconds=0))
            assert unfinished.is_trained(work)
        if harm == "flipped":
            flip(model / "model.safetensors", random.Random(0))
            verify.run(r.run_folder, remove=True)
        else:
            (model / "model.safetensors").unlink()
        with tracking.stage("finetune", r, {}) as work:
            assert work.finished(Trained, False, True) is None
            assert not unfinished.is_trained(work), harm


def test_a_flipped_bit_in_a_scored_shard_stops_the_filter_with_what_to_do(
    tmp_path: Path, whole: Run, drill: Drill
) -> None:
    r = copied(whole, tmp_path)
    path = r.run_folder / "score" / "scored" / "part-1.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)
    line = one_line(drill(r, "filter", "--redo"))
    assert str(path) in line and "remove it" in line
    path.unlink()
    assert "run gristmill score again" in one_line(drill(r, "filter", "--redo"))
    for stage in ("score", "filter"):
        assert drill(r, stage).code == 0
    assert outputs(r, "filter") == outputs(whole.recipe, "filter")


def test_a_manifest_that_leads_out_of_its_folder_or_was_changed_is_refused(tmp_path: Path, whole: Run) -> None:
    r = copied(whole, tmp_path)
    path = r.run_folder / "score" / manifest.FILE
    good = manifest.read(path)
    assert good is not None
    entry = next(iter(good.files.values()))
    for name in ("../../../etc/passwd", "/etc/passwd", "scored/../../x", "C:\\x", ""):
        manifest.write(path, good._replace(files={name: entry}))
        with pytest.raises(UserError, match="outside its folder; remove it") as caught:
            verify.run(r.run_folder)
        assert "\n" not in str(caught.value)
    path.write_text(path.read_text().replace('"bytes"', '"Bytes"'))
    assert found_in(r)["score/manifest.json"] == "cannot be read"


def test_a_file_elsewhere_is_verified_where_it_is_and_never_removed(tmp_path: Path) -> None:
    stage, place = tmp_path / "run" / "score", tmp_path / "elsewhere"
    stage.mkdir(parents=True), place.mkdir()
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"score": [1.0, 2.0]}), place / name, write_page_checksum=True)
    url = f"file://{place}"
    vouched = manifest.of(stage, {"scored": url}, {})
    assert sorted(vouched.files) == ["scored/a.parquet", "scored/b.parquet"]
    manifest.write(stage / manifest.FILE, vouched)
    assert verify.run(tmp_path / "run")["damaged"] == []
    (place / "a.parquet").unlink()
    flip(place / "b.parquet", random.Random(0))
    found = verify.run(tmp_path / "run", remove=True)["damaged"]
    assert [each["path"] for each in found] == ["scored/a.parquet", "scored/b.parquet"]
    assert (place / "b.parquet").exists()


def test_what_was_hashed_is_not_read_again_and_keeps_its_digest(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"first")
    first = manifest.of(tmp_path, {}, {})
    known = {"a.parquet": first.files["a.parquet"]._replace(sha256="known before")}
    assert manifest.of(tmp_path, {}, known).files["a.parquet"].sha256 == "known before"
    (tmp_path / "a.parquet").write_bytes(b"other content")
    assert manifest.of(tmp_path, {}, known).files["a.parquet"].sha256 != "known before"


def test_damage_between_two_runs_is_not_vouched_for_by_the_second(
    tmp_path: Path, whole: Run, drill: Drill, texts: list[str]
) -> None:
    r = copied(whole, tmp_path)
    path = r.run_folder / "score" / "scored" / "part-1.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)
    write(tmp_path / "corpus", rows_of(N_SHARDS, texts), "part-9.parquet")
    assert drill(r, "score").code == 0
    assert list(found_in(r)) == ["score/scored/part-1.parquet"]


def test_a_line_that_a_crash_cut_costs_no_other_line_of_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracking.add_line(path, {"stage": "rate"})
    with path.open("a") as file:
        file.write('{"stage": "tr')
    tracking.add_line(path, {"stage": "score"})
    assert [line["stage"] for line in tracking.read_metrics(tmp_path)] == ["rate", "score"]
    (found,) = verify.run(tmp_path)["damaged"]
    assert found["what"] == "line 2 cannot be read"
    assert verify.run(tmp_path, remove=True)["damaged"] and verify.run(tmp_path)["damaged"] == []
    assert [line["stage"] for line in tracking.read_metrics(tmp_path)] == ["rate", "score"]


# -- inputs that change between runs


def change(r: Recipe, texts: list[str]) -> None:
    """One shard more, and one with other documents."""
    folder = Path(str(r.corpus.path))
    write(folder, rows_of(N_SHARDS, texts), "part-9.parquet")
    write(folder, rows_of(N_SHARDS + 1, texts), "part-1.parquet")


def test_shards_that_are_new_or_changed_are_said_and_only_they_are_scored(
    tmp_path: Path, whole: Run, drill: Drill, texts: list[str]
) -> None:
    r = copied(whole, tmp_path)
    first = outputs(r, "score")
    change(r, texts)
    done = drill(r, "score")
    assert done.code == 0, done.stderr
    assert "score: new: part-9.parquet" in done.stderr and "score: changed: part-1.parquet" in done.stderr
    assert json.loads(done.stdout)["score"]["n_shards_reused"] == N_SHARDS - 1
    now = outputs(r, "score")
    same = {name for name in now if now[name] == first.get(name)}
    assert {f"scored/part-{n}.parquet" for n in (0, 2, 3)} == {name for name in same if name.endswith(".parquet")}
    fresh = r.model_copy(update={"run_folder": tmp_path / "fresh"})
    shutil.copytree(r.run_folder / "train", fresh.run_folder / "train")
    assert drill(fresh, "score").code == 0
    assert outputs(fresh, "score") == now
    done = drill(r, "filter")
    assert done.code == 0 and "filter: new: part-9.parquet" in done.stderr
    assert json.loads(done.stdout)["filter"]["n_rows"] == (N_SHARDS + 1) * OF_SHARD


def test_shards_that_are_new_or_changed_are_said_and_no_document_is_rated_twice(
    tmp_path: Path, whole: Run, drill: Drill, texts: list[str]
) -> None:
    r, n_asked = copied(whole, tmp_path), len(whole.server.asked)
    change(r, texts)
    done = drill(r, "rate")
    assert done.code == 0, done.stderr
    assert "rate: new: part-9.parquet" in done.stderr and "rate: changed: part-1.parquet" in done.stderr
    again = {int(asked.document[4:]) for asked in whole.server.asked[n_asked:]}
    assert again and min(again) >= N_SHARDS * OF_SHARD, "only documents that were not there before"


@pytest.mark.parametrize("stage", ["rate", "score"])
def test_a_shard_that_is_gone_or_has_another_name_is_named_and_removed_only_with_redo(
    tmp_path: Path, whole: Run, drill: Drill, stage: str
) -> None:
    r = copied(whole, tmp_path)
    corpus, made_before = tmp_path / "corpus", outputs(r, stage)
    (corpus / "part-3.parquet").rename(corpus / "part-7.parquet")
    line = one_line(drill(r, stage))
    assert line.startswith(f"{stage}: gone since ") and ": part-3.parquet; put back" in line and "--redo" in line
    assert outputs(r, stage) == made_before
    done = drill(r, stage, "--redo")
    assert done.code == 0, done.stderr
    if stage == "score":
        names = {path.name for path in (r.run_folder / "score" / "scored").iterdir()}
        assert names == {f"part-{n}.parquet" for n in (0, 1, 2, 7)}
        assert "part-3.parquet" in one_line(drill(r, "filter"))


def test_a_setting_that_changed_is_refused_as_ever(tmp_path: Path, whole: Run, drill: Drill, texts: list[str]) -> None:
    r = copied(whole, tmp_path)
    change(r, texts)
    assert "seed changed from 0 to 1" in one_line(drill(r, "filter", "--seed", "1"))


def test_another_number_of_workers_and_a_file_that_was_added_lose_and_double_nothing(
    tmp_path: Path, whole: Run, drill: Drill, texts: list[str]
) -> None:
    r = before(whole, tmp_path, "score")
    shutil.copytree(str(r.corpus.path), tmp_path / "corpus")
    r = r.model_copy(update={"corpus": r.corpus.model_copy(update={"path": str(tmp_path / "corpus")})})
    assert drill(r, "score", "--shard", "1/4").code == 0
    assert drill(r, "score", "--shard", "2/4", die_at=6).code == -signal.SIGKILL
    for part in ("1/2", "2/2"):
        assert drill(r, "score", "--shard", part).code == 0
    done = drill(r, "score")
    assert done.code == 0, done.stderr
    assert outputs(r, "score") == outputs(whole.recipe, "score")
    write(tmp_path / "corpus", rows_of(N_SHARDS, texts), "part-0a.parquet")  # in the middle of the order
    for part in ("2/3", "1/3", "3/3"):
        assert drill(r, "score", "--shard", part).code == 0
    assert drill(r, "score").code == 0
    ids = [id for path in (r.run_folder / "score").rglob("*.parquet") for id in pq.read_table(path)["id"].to_pylist()]
    assert sorted(ids) == sorted(row["id"] for row in corpus_rows(r))
    assert found_in(r) == {}


# -- disks, clocks, folders


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, whole: Run, drill: Drill, stage: str
) -> None:
    r = before(whole, tmp_path, stage)
    largest = {"rate": "rate/answers.sqlite", "train": "embeddings.sqlite", "score": "score/scored/part-0.parquet"}
    largest["filter"] = "filter/kept/part-0.parquet"
    limit = (whole.recipe.run_folder / largest[stage]).stat().st_size * 3 // 4
    line = one_line(drill(r, stage, file_bytes=limit))
    assert str(r.run_folder) in line and "make room" in line
    for path in r.run_folder.rglob("*.parquet"):
        if not path.name.startswith("."):
            pq.ParquetFile(path, page_checksum_verification=True).read()
    assert not (r.run_folder / stage / "result.json").exists()
    done = drill(r, stage)
    assert done.code == 0, done.stderr
    assert outputs(r, stage) == outputs(whole.recipe, stage)
    assert found_in(r) == {} and not leftovers(r)


def can_mount() -> bool:
    """Whether file systems may be mounted in a namespace of one's own."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@in_full
def test_a_file_system_without_room_is_one_line_and_the_same_command_goes_on(tmp_path: Path, whole: Run) -> None:
    if not can_mount():
        pytest.skip("no file system may be mounted here; the limit on file sizes above stands for it")
    r = before(whole, tmp_path, "score")
    source, out = tmp_path / "source", tmp_path / "out"
    r.run_folder.rename(source)
    r.run_folder.mkdir()
    (tmp_path / "recipe.json").write_text(r.model_dump_json(), encoding="utf-8")
    command = f"{sys.executable} -m pipeline score {tmp_path}/recipe.json"
    blocks = sum(-(-path.stat().st_size // 4096) for path in source.rglob("*") if path.is_file())
    size = 4 * blocks + 28
    script = (
        f"mount -t tmpfs -o size={size}k tmpfs {r.run_folder} && cp -r {source}/. {r.run_folder} || exit 9\n"
        f"{command} 2> {tmp_path}/said; echo $? > {tmp_path}/code\n"
        f"mount -o remount,size=20m {r.run_folder} && {command} && cp -r {r.run_folder} {out}"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done
    first = Done(int((tmp_path / "code").read_text()), "", (tmp_path / "said").read_text())
    line = one_line(first)
    assert str(r.run_folder) in line and "no space left on device" in line
    assert outputs(r.model_copy(update={"run_folder": out}), "score") == outputs(whole.recipe, "score")


def test_a_clock_that_goes_back_an_hour_at_every_look_changes_nothing(
    tmp_path: Path, whole: Run, drill: Drill
) -> None:
    r = before(whole, tmp_path, "rate")
    for stage in STAGES:
        done = drill(r, stage, clock=True)
        assert done.code == 0, done.stderr
        assert outputs(r, stage) == outputs(whole.recipe, stage)
        assert "done already, skipped" in drill(r, stage, clock=True).stderr
    assert found_in(r) == {}


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_can_only_be_read_is_one_line_and_can_be_looked_at(
    tmp_path: Path, whole: Run, drill: Drill, stage: str
) -> None:
    r = before(whole, tmp_path, stage)
    if os.geteuid() == 0 and not can_mount():
        pytest.skip("root writes anywhere, and nothing may be mounted here")
    folders = [r.run_folder, *(path for path in r.run_folder.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        line = one_line(drill(r, stage, read_only=True))
        assert str(r.run_folder) in line and "Traceback" not in line
        if stage == "filter":
            assert drill.on_run(r, "status", read_only=True).code == 0
            assert drill.on_run(r, "show", read_only=True).code == 0
            assert drill.on_run(r, "verify", read_only=True).code == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)


@in_full
def test_two_runs_at_the_same_moment_make_what_one_makes(tmp_path: Path, whole: Run) -> None:
    r = before(whole, tmp_path, "score")
    path = tmp_path / "recipe.json"
    path.write_text(r.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "pipeline", "score", str(path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) in ([0, 0], [0, 1])
    for code, (_, stderr) in zip(codes, said, strict=True):
        assert code == 0 or "another process is at work in" in stderr.splitlines()[-1]
    assert outputs(r, "score") == outputs(whole.recipe, "score")
    assert found_in(r) == {} and not leftovers(r)


def test_a_run_that_moved_with_its_corpus_is_done_and_can_be_looked_at(
    tmp_path: Path, whole: Run, drill: Drill
) -> None:
    r = copied(whole, tmp_path / "elsewhere")
    shutil.copy(str(r.rate.prompt), tmp_path / "elsewhere")
    results = {stage: (r.run_folder / stage / "result.json").read_bytes() for stage in STAGES}
    n_asked = len(whole.server.asked)
    moved = r.model_copy(
        update={
            "run_folder": Path("elsewhere/run"),
            "corpus": r.corpus.model_copy(update={"path": "elsewhere/corpus"}),
            "rate": r.rate.model_copy(update={"prompt": Path("elsewhere/prompt.md")}),
        }
    )
    (tmp_path / "elsewhere" / "run.json").unlink(missing_ok=True)
    for stage in STAGES:
        done = drill(moved, stage, cwd=tmp_path)
        assert done.code == 0 and f"{stage}: done already, skipped" in done.stderr, done.stderr
    assert {stage: (r.run_folder / stage / "result.json").read_bytes() for stage in STAGES} == results
    assert len(whole.server.asked) == n_asked
    states = json.loads(drill.on_run(moved, "status", cwd=tmp_path).stdout)
    assert [states[stage]["state"] for stage in STAGES] == ["done"] * 4
    assert "doc-0 " in drill.on_run(moved, "show", cwd=tmp_path).stdout
    assert drill.on_run(moved, "verify", cwd=tmp_path).code == 0
    assert drill(moved, "report", cwd=tmp_path).code == 0


# -- another version


@pytest.mark.parametrize("form", [None, 0, manifest.FORMAT + 1])
def test_a_run_of_another_version_is_refused_by_every_command_in_one_line(
    tmp_path: Path, whole: Run, form: int | None
) -> None:
    r = copied(whole, tmp_path)
    for stage in STAGES:
        path = r.run_folder / stage / "inputs.json"
        said = {key: value for key, value in json.loads(path.read_text()).items() if key != "format"}
        path.write_text(json.dumps(said if form is None else {"format": form, **said}))
    left = {path: path.read_bytes() for path in r.run_folder.rglob("*") if path.is_file() and path.name[0] != "."}
    commands: list[Callable[[], object]] = [
        *(lambda stage=stage: stage.run(r, True) for stage in (rate, train, score, filter_, report)),  # type: ignore[misc]
        lambda: summary.status(r.run_folder, STAGES),
        lambda: show.run(r.run_folder, cli.Selection()),
        lambda: show.run(r.run_folder / "rate" / "ratings.parquet", cli.Selection()),
    ]
    for command in commands:
        with pytest.raises(UserError) as caught:
            command()
        line = str(caught.value)
        assert f"was written by another version of gristmill (form {form or 0}" in line and "--run-folder" in line
        assert "\n" not in line
    assert {path: path.read_bytes() for path in left} == left, "nothing was touched"


def test_stores_of_another_version_are_refused_in_one_line(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "answers.sqlite"), embeddings.opened(tmp_path / "embeddings.sqlite"):
        pass
    for name in ("answers.sqlite", "embeddings.sqlite"):
        with closing(sqlite3.connect(tmp_path / name)) as db:
            db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match=r"answers\.sqlite: .*another version of gristmill \(form 99"):
        AnswerStore(tmp_path / "answers.sqlite")
    with (
        pytest.raises(UserError, match=r"embeddings\.sqlite cannot be used \(.*form 99"),
        embeddings.opened(tmp_path / "embeddings.sqlite"),
    ):
        pass
