"""Parts of a stage in processes of their own, then the whole: same bytes, nothing paid twice, one writer to a file."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import endpoint
import numpy as np
import pytest
import stamina
import test_audit
from endpoint import Asked, Done, Endpoint, Process, Reply, gristmill, one_line, recipe, says, score_of, serve, start

from pipeline import audit, label, rate, score, summary
from pipeline.config import Corpus, Encoder, Recipe, Score
from pipeline.errors import SettingsError, UserError
from pipeline.parts import PartResult, share
from pipeline.student import Head, Layer, Student

N_SHARDS = 5


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


def of(r: Recipe, shard: str | None) -> Recipe:
    """A part of the recipe's work."""
    return r.model_copy(update={"shard": shard})


def elsewhere(r: Recipe) -> Recipe:
    """The same recipe with another run folder."""
    return r.model_copy(update={"run_folder": r.run_folder.with_name("whole")})


def waited(processes: list[Process]) -> list[Done]:
    """How processes ended."""
    said = [process.communicate(timeout=60) for process in processes]
    return [Done(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


def wait_for(ready: Callable[[], bool], process: Process) -> None:
    """Until the moment has come, in a process that is still at work."""
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, f"ended before its time: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(process: Process, number: int = signal.SIGKILL) -> str:
    """Signal the whole process group; what it had said on stderr."""
    os.killpg(process.pid, number)
    return process.communicate(timeout=30)[1]


def ratings_of(r: Recipe) -> bytes:
    """The bytes of the ratings."""
    return (r.run_folder / "rate" / "ratings.parquet").read_bytes()


def files(r: Recipe) -> set[str]:
    """What stands in the folder of stage 1, locks left out."""
    return {path.name for path in (r.run_folder / "rate").iterdir() if path.name[0] != "."}


# -- asking


def test_parts_at_once_and_then_the_whole_ask_each_question_once_and_give_the_same_bytes(tmp_path: Path) -> None:
    with serve(score_of, delay_s=0.02) as server:
        r = recipe(tmp_path, server.url, n=30, concurrency=4)
        for done in waited([start(r, "rate", f"--shard={i}/3") for i in (1, 2, 3)]):
            assert done.code == 0, done.stderr
        assert set(server.attempts().values()) == {1}
        assert len(server.asked) == 30
        assert summary.status(r.run_folder, ())["rate"] == {"state": "begun", "n_answers": 30, "parts_done": "3 of 3"}
        assert not (r.run_folder / "rate" / "ratings.parquet").exists()
        again = gristmill(r, "rate", "--shard", "2/3")
        assert (again.code, "done already" in again.stderr) == (0, True)
        result = rate.run(r)
        assert isinstance(result, rate.RateResult)
        assert (result.n_asked, result.n_reused, result.n_scored) == (0, 30, 30)
        assert len(server.asked) == 30, "nothing is asked twice"
        rate.run(elsewhere(r))
    assert ratings_of(r) == ratings_of(elsewhere(r))
    assert files(r) == files(elsewhere(r)), "what the parts left is gone"


def test_a_part_says_what_it_did_and_no_part_is_empty_handed_where_there_are_more_than_documents(
    tmp_path: Path,
) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=3)
        found = [rate.run(of(r, f"{i}/5")) for i in range(1, 6)]
        assert all(isinstance(each, PartResult) for each in found)
        assert [(each.n_sampled, each.n_asked) for each in found] == [(1, 1)] * 3 + [(0, 0)] * 2  # type: ignore[union-attr]
        rate.run(r)
        rate.run(elsewhere(r))
        assert len(server.asked) == 6
    assert ratings_of(r) == ratings_of(elsewhere(r))


def test_what_the_whole_or_another_part_has_recorded_is_not_asked_by_a_part(tmp_path: Path) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=24)
        few = endpoint.changed(r, "rate", sample=6)
        rate.run(few)
        assert len(server.asked) == 6
        rate.run(of(r, "1/2"), redo=True)
        rate.run(of(r, "1/3"))  # of the 8 documents 4 are of 1/2 too
        rate.run(of(r, "2/3"))
        rate.run(of(r, "3/3"))
        assert set(server.attempts().values()) == {1}
        assert len(server.asked) == 24
        rate.run(r)
        assert len(server.asked) == 24


def test_parts_of_different_numbers_are_not_at_work_at_once_for_they_would_ask_the_same(tmp_path: Path) -> None:
    with serve(score_of, delay_s=0.05) as server:
        r = recipe(tmp_path, server.url, n=400, concurrency=1)
        process = start(r, "rate", "--shard", "1/2")
        wait_for(lambda: len(server.asked) >= 2, process)
        told = one_line(gristmill(r, "rate", "--shard", "2/3"))
        assert told.startswith("rate: part 1/2 is at work in ")
        assert told.endswith("wait for it, or go on with parts of 2")
        kill(process)


def test_the_same_part_twice_and_the_whole_beside_a_part_are_refused_in_one_line(tmp_path: Path) -> None:
    with serve(score_of, delay_s=0.05) as server:
        r = recipe(tmp_path, server.url, n=400, concurrency=1)
        process = start(r, "rate", "--shard", "1/2")
        wait_for(lambda: len(server.asked) >= 2, process)
        assert one_line(gristmill(r, "rate", "--shard", "1/2")).startswith(
            "rate: another process is at work on part 1/2"
        )
        assert one_line(gristmill(r, "rate")).startswith("rate: another process is at work in ")
        assert process.poll() is None
        kill(process)
        process = start(r)
        n_before = len(server.asked)
        wait_for(lambda: len(server.asked) >= n_before + 2, process)
        assert one_line(gristmill(r, "rate", "--shard", "1/2")).startswith("rate: another process is at work in ")
        kill(process)


def test_a_part_that_is_killed_goes_on_and_the_whole_has_the_same_bytes(tmp_path: Path) -> None:
    with serve(score_of, delay_s=0.01) as server:
        r = recipe(tmp_path, server.url, n=80, concurrency=4)
        process = start(r, "rate", "--shard", "1/2")
        wait_for(lambda: len(server.asked) >= 15, process)
        kill(process)
        n_killed = len(server.asked)
        part = rate.run(of(r, "1/2"))
        assert (part.n_reused > 5, part.n_reused + part.n_asked) == (True, 40)
        assert len(server.asked) - 40 <= 4, "only what was on its way is asked again"
        assert n_killed < 40
        result = rate.run(r)
        assert (result.n_asked, result.n_reused) == (40, 40)
        server.delay_s = 0
        rate.run(elsewhere(r))
    assert ratings_of(r) == ratings_of(elsewhere(r))


def test_the_whole_killed_while_it_takes_answers_in_loses_none(tmp_path: Path) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=20)
        rate.run(of(r, "1/2"))
        server.delay_s = 0.05
        process = start(r)
        wait_for(lambda: len(server.asked) >= 12, process)
        kill(process)
        server.delay_s = 0
        assert (r.run_folder / "rate" / "answers.1-of-2.sqlite").exists(), "kept until the result is written"
        result = rate.run(r)
        assert (result.n_sampled, result.n_scored) == (20, 20)
        assert all(server.attempts()[f"doc-{i}"] == 1 for i in range(20) if i not in in_flight(server))


def in_flight(server: Endpoint) -> set[int]:
    """Documents that were asked about twice: they were on their way when the process was killed."""
    twice = {int(name[4:]) for name, n in server.attempts().items() if n > 1}
    assert len(twice) <= 16, "no more than are asked at once"
    return twice


def test_sigterm_ends_like_ctrl_c_with_its_own_exit_code(tmp_path: Path) -> None:
    with serve(score_of, delay_s=0.02) as server:
        r = recipe(tmp_path, server.url, n=100, concurrency=4)
        process = start(r, "rate", "--shard", "1/1")
        wait_for(lambda: len(server.asked) >= 20, process)
        stderr = kill(process, signal.SIGTERM)
        assert process.returncode == 143
        assert stderr.splitlines()[-1].startswith("gristmill: interrupted; everything recorded is kept")
        assert "Traceback" not in stderr
        n_before = len(server.asked)
        result = rate.run(r)
        assert result.n_reused >= n_before - 4
        assert result.n_scored == 100


def test_a_part_is_refused_after_the_recipe_has_changed(tmp_path: Path) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=8)
        rate.run(of(r, "1/2"))
        other = endpoint.changed(r, "teacher", model="another")
        with pytest.raises(UserError, match=r"raters\.prompt.*changed from 'm' to 'another'"):
            rate.run(of(other, "1/2"))
        with pytest.raises(UserError, match="changed from 'm' to 'another'"):
            rate.run(other)


def test_a_part_where_too_many_requests_fail_says_so_and_is_not_done(tmp_path: Path) -> None:
    def broken(asked: Asked) -> Reply:
        return endpoint.error(400) if int(asked.document[4:]) % 4 else score_of(asked)

    with serve(broken) as server:
        r = recipe(tmp_path, server.url, n=20, rate={"max_unscored_rate": 0.3})
        told = one_line(gristmill(r, "rate", "--shard", "1/2"))
        assert told.endswith("requests of part 1/2 failed; the answers are kept, and the same command asks again")
        server.script = score_of
        assert rate.run(of(r, "1/2")).n_failed == 0


def test_a_part_has_its_share_of_the_budget_and_the_whole_has_all_of_it(tmp_path: Path) -> None:
    with serve(score_of) as server:
        r = recipe(tmp_path, server.url, n=40, rate={"budget_tokens": 107 * 20}, concurrency=1)
        parts = [rate.run(of(r, f"{i}/2")) for i in (1, 2)]
        assert [(each.n_asked, each.n_not_asked, each.stopped_by) for each in parts] == [(10, 10, "budget_tokens")] * 2
        result = rate.run(r)
        assert (result.n_asked, result.n_reused, result.n_not_asked) == (0, 20, 20)
    shared = share(Recipe(rate={"budget_usd": 3, "budget_minutes": 5}).rate, "1/3")  # type: ignore[arg-type]
    assert (shared.budget_usd, shared.budget_minutes) == (1, 5)


def test_labelling_several_corpora_in_parts_asks_once_and_gives_the_same(tmp_path: Path) -> None:
    front = "---\nread: label\nlabels: [good, bad]\n---\nWhich of {{ labels }}?\n\n{{ text }}\n"
    (tmp_path / "labels.md").write_text(front, encoding="utf-8")
    for name, numbers in {"a": range(9), "b": range(9, 20)}.items():
        endpoint.write(tmp_path, [{"id": f"id-{i}", "text": f"doc-{i} is one."} for i in numbers], f"{name}.parquet")
    (tmp_path / "listed.txt").write_text(f"{tmp_path}/a.parquet\n{tmp_path}/b.parquet\n", encoding="utf-8")
    asking = {"prompt": tmp_path / "labels.md", "datasets": tmp_path / "listed.txt", "sample": 20}
    with serve(lambda _: says("good")) as server:
        r = recipe(tmp_path, server.url)
        r = Recipe.model_validate({**r.model_dump(), "label": asking})
        found = [label.run(of(r, f"{i}/2")) for i in (1, 2)]
        assert [each.states["done"] for each in found] == [2, 2]  # type: ignore[union-attr]
        assert not (r.run_folder / "labels.json").exists()
        label.run(r)
        assert len(server.asked) == 20
        label.run(elsewhere(r))
    made, whole = (
        {path.parent.parent.name: path.read_bytes() for path in x.run_folder.glob("*/label/labels.parquet")}
        for x in (r, elsewhere(r))
    )
    assert made == whole
    assert len(made) == 2


def test_an_audit_in_parts_finds_the_same_and_looks_into_the_answers_of_stage_1(tmp_path: Path) -> None:
    with serve(test_audit.rated) as server:
        r = test_audit.scored(tmp_path, server.url, n=200, audit={"sample": 40})
        parts = [audit.run(of(r, f"{i}/3")) for i in (1, 2, 3)]
        assert sum(each.n_asked for each in parts) == len(server.asked) == 40
        result = audit.run(r)
        assert (result.n_asked, result.n_reused) == (0, 40)
        shutil.copytree(r.run_folder / "score", elsewhere(r).run_folder / "score")
        shutil.copytree(r.run_folder / "rate", elsewhere(r).run_folder / "rate")
        assert audit.run(elsewhere(r)).n_reused == 40, "they are in the store of stage 1"
        assert len(server.asked) == 40
    made = [(x.run_folder / "audit" / "ratings.parquet").read_bytes() for x in (r, elsewhere(r))]
    assert made[0] == made[1]
    assert not list((r.run_folder / "audit").glob("answers*"))


# -- scoring


@pytest.fixture
def scoring(tmp_path: Path, tiny_encoder: Path, texts: list[str]) -> Recipe:
    """A recipe that scores five shards, with a student that is there."""
    for shard in range(N_SHARDS):
        rows = [{"id": f"{shard}-{i}", "text": f"{shard} {text}"} for i, text in enumerate(texts)]
        endpoint.write(tmp_path / "shards", rows, f"part-{shard:02d}.parquet")
    encoder = Encoder(model=str(tiny_encoder), max_tokens=64, dtype="float32", device="cpu")
    weight, bias = np.linspace(-2, 2, 32, dtype=np.float32)[None], np.array([2.5], dtype=np.float32)
    Student(encoder, (Head("score", "score", (Layer(weight, bias),), (0, 5)),)).save(tmp_path / "student")
    return Recipe(
        run_folder=tmp_path / "run",
        corpus=Corpus(path=str(tmp_path / "shards"), id_column="id"),
        encoder=encoder,
        score=Score(student=tmp_path / "student"),
    )


def scored(r: Recipe) -> dict[str, bytes]:
    """Every file among the scored shards."""
    folder = r.run_folder / "score" / "scored"
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_of_scoring_at_once_and_more_of_them_than_shards_give_the_same_bytes(scoring: Recipe) -> None:
    score.run(elsewhere(scoring))
    for done in waited([start(scoring, "score", f"--shard={i}/7") for i in (1, 7)]):
        assert done.code == 0, done.stderr
    assert len(scored(scoring)) == 1
    assert summary.status(scoring.run_folder, ())["score"]["parts_done"] == "2 of 7"
    result = score.run(scoring)
    assert (result.n_shards, result.n_shards_reused) == (N_SHARDS, 1)
    assert scored(scoring) == scored(elsewhere(scoring))


def test_parts_of_different_numbers_never_write_the_same_shard_at_once(scoring: Recipe) -> None:
    score.run(elsewhere(scoring))
    ended = waited([start(scoring, "score", f"--shard={part}") for part in ("1/1", "1/2", "2/3")])
    lost = [one_line(done) for done in ended if done.code]
    assert all("another process is writing this shard" in told for told in lost), lost
    assert len(lost) < 3, "somebody wins"
    assert scored(scoring).items() <= scored(elsewhere(scoring)).items(), "what is there is whole"
    score.run(scoring)
    assert scored(scoring) == scored(elsewhere(scoring))


def test_a_part_of_scoring_that_is_killed_is_done_again_with_the_same_bytes(scoring: Recipe) -> None:
    score.run(elsewhere(scoring))
    process = start(scoring, "score", "--shard", "1/2")
    folder = scoring.run_folder / "score" / "scored"
    wait_for(lambda: any(folder.glob(".*.tmp")), process)
    kill(process)
    assert any(folder.glob(".*.tmp")), "killed in the middle of a shard"
    part = score.run(of(scoring, "1/2"))
    assert part.n_shards == 3
    score.run(scoring)
    assert scored(scoring) == scored(elsewhere(scoring))


# -- what has no parts


def test_what_one_process_does_refuses_a_part_in_one_line(recipe_file: Path) -> None:
    from pipeline import cli

    for stage in ("train", "tune", "report", "plan", "export", "finetune", "run", "align reward", "align rate"):
        with pytest.raises(SettingsError, match=r"leave out --shard|each stage's own command"):
            cli.app([*stage.split(), str(recipe_file), "--shard", "1/2"], exit_on_error=False, print_error=False)


def test_a_part_beyond_the_last_one_is_refused(recipe_file: Path) -> None:
    from pipeline import cli

    with pytest.raises(SettingsError, match="count from 1/2 to 2/2"):
        cli.app(["rate", str(recipe_file), "--shard", "3/2"], exit_on_error=False, print_error=False)


def test_what_a_killed_process_left_among_scores_put_elsewhere_is_no_foreign_file(scoring: Recipe) -> None:
    output = scoring.run_folder / "own"
    output.mkdir(parents=True)
    (output / ".part-00.parquet.0123456789ab.tmp").write_bytes(b"PAR1")
    score.sweep(scoring.run_folder / "score", [], endpoint.changed(scoring, "score", output=str(output)))
    assert not any(output.iterdir())
