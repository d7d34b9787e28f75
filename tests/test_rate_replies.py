"""Replies are rated: what is asked, what is known already, and what is never in the ratings."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import endpoint
import pyarrow.parquet as pq
import pytest
import stamina
from endpoint import Asked, Endpoint, Reply, error, number, says, serve

from pipeline import actor, conversations, rate_replies, show, train
from pipeline.cli import Selection
from pipeline.config import Recipe
from pipeline.conversations import for_judging
from pipeline.errors import UserError


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


def row(i: int, score: float | None = None) -> dict[str, Any]:
    return {"user_input": f"What of doc-{i}?", "completion": f"This of number {i}.", "score": score}


def rated(asked: Asked) -> Reply:
    return says(f"Fine.\nScore: {number(asked) % 6}")


def recipe(tmp_path: Path, server: Endpoint, rows: list[dict[str, Any]], **settings: Any) -> Recipe:
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "prompt.md").write_text(f"---\nread: generate\n---\n{endpoint.GENERATE}\n", encoding="utf-8")
    teacher = {"engine": "openai", "model": "m", "base_url": server.url, "retries": 0, "concurrency": 1}
    return Recipe.model_validate(
        {
            "run_folder": tmp_path / "run",
            "teacher": teacher,
            "rate": {"prompt": tmp_path / "prompt.md", **settings.pop("rate", {})},
            "align": {"reward_data": tmp_path / "rows.json", **settings.pop("align", {})},
            **settings,
        }
    )


def ratings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The ratings by text."""
    rows = pq.read_table(recipe.run_folder / "rate" / "ratings.parquet").to_pylist()
    return {each["text"]: each for each in rows}


def text(i: int) -> str:
    return conversations.text(f"What of doc-{i}?", f"This of number {i}.")


def taught(n: int) -> list[int]:
    """Numbers of prompts that are not held out."""
    return [i for i in range(n) if not for_judging(Recipe(), f"What of doc-{i}?")]


def test_a_given_score_is_kept_and_never_asked_for_zero_among_them(tmp_path: Path) -> None:
    rows = [row(i, [0.0, None, 4.5][i % 3]) for i in range(12)]
    with serve(rated) as server:
        asked = recipe(tmp_path, server, rows)
        result = rate_replies.run(asked)
        found = ratings(asked)

        assert set(server.attempts()) == {f"doc-{i}" for i in taught(12) if i % 3 == 1}
    for i in taught(12):
        assert found[text(i)]["score"] == [0.0, i % 6, 4.5][i % 3]
        assert found[text(i)]["n_opinions"] == (1 if i % 3 == 1 else 0)
        assert len(found[text(i)]["opinions"]) == (1 if i % 3 == 1 else 0)
    kept = [json.loads(line) for line in (tmp_path / "run/rate/replies.jsonl").read_text().splitlines()]
    assert {(each["user_input"], each["score"]) for each in kept} == {
        (f"What of doc-{i}?", [0.0, i % 6, 4.5][i % 3]) for i in taught(12)
    }
    assert result.n_given == sum(i % 3 != 1 for i in taught(12))
    assert (result.n_asked, result.n_scored) == (len(taught(12)) - result.n_given, len(taught(12)))


def test_nothing_of_a_held_out_prompt_is_rated(tmp_path: Path) -> None:
    with serve(rated) as server:
        asked = recipe(tmp_path, server, [row(i) for i in range(30)])
        result = rate_replies.run(asked)
    assert set(ratings(asked)) == {text(i) for i in taught(30)}
    assert result.n_held_out == 30 - len(taught(30)) > 0
    assert result.n_rows == 30 == result.n_sampled + result.n_not_drawn


def test_rows_that_say_the_same_are_rated_once_and_a_score_goes_before_none(tmp_path: Path) -> None:
    a, b, *_ = taught(30)
    with serve(rated) as server:
        asked = recipe(tmp_path, server, [row(a), row(a, 2.5), row(a), row(b), row(b)])
        result = rate_replies.run(asked)
        assert server.attempts() == {f"doc-{b}": 1}
    assert ratings(asked)[text(a)]["score"] == 2.5
    assert (result.n_copies, result.n_sampled) == (3, 2)


def test_the_actors_replies_are_rated_and_not_written_anew(tmp_path: Path, tiny_causal: Path) -> None:
    prompts = [{"user_input": f"What of doc-{i}?"} for i in range(8)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    quick = {"model": str(tiny_causal), "device": "cpu", "args": {"max_steps": 1}}
    with serve(rated) as server:
        align = {"actor_data": tmp_path / "rows.json", "prompt_data": tmp_path / "prompts.json", "reply_tokens": 8}
        asked = recipe(tmp_path, server, [row(i) for i in range(8)], align=align, actor=quick)
        actor.run(asked)
        result = rate_replies.run(asked)
        found = ratings(asked)

        (tmp_path / "run" / "rate" / "result.json").unlink()
        n_asked = len(server.asked)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.engines.transformers.load", None)
            again = rate_replies.run(asked)
        assert len(server.asked) == n_asked
    assert result.n_replies == 2 * len(taught(8))
    assert again.n_asked == 0
    assert ratings(asked) == found
    kept = [json.loads(line) for line in (tmp_path / "run/rate/replies.jsonl").read_text().splitlines()]
    assert {each["user_input"] for each in kept if each["source"] == "actor"} == {
        f"What of doc-{i}?" for i in taught(8)
    }


def test_all_scores_equal_is_one_line_that_leaves_the_answers_to_be_read(tmp_path: Path) -> None:
    with serve(lambda _: says("Score: 3")) as server:
        asked = recipe(tmp_path, server, [row(i) for i in range(10)])
        with pytest.raises(UserError, match=rf"^rate: all {len(taught(10))} scores are 3, .*gristmill show"):
            rate_replies.run(asked)
    assert len(ratings(asked)) == len(taught(10))
    assert not (tmp_path / "run" / "rate" / "result.json").exists()


def test_a_score_outside_the_prompts_scale_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with serve(rated) as server:
        asked = recipe(tmp_path, server, [row(0), row(1, 9)])
        with pytest.raises(UserError, match=r"^align\.reward_data: .*row 2: score 9 is outside the scale 0 to 5"):
            rate_replies.run(asked)
        assert not server.asked


def test_nothing_to_rate_is_one_line(tmp_path: Path) -> None:
    with serve(rated) as server:
        asked = recipe(tmp_path, server, [], align={"reward_data": None})
        with pytest.raises(UserError, match=r"^rate: there are no replies to rate; run gristmill align actor first"):
            rate_replies.run(asked)


def test_what_was_answered_before_a_failure_or_a_spent_budget_is_not_asked_again(tmp_path: Path) -> None:
    def failing(asked: Asked) -> Reply:
        return error(400) if asked.n > 5 else rated(asked)

    rows = [row(i) for i in range(24)]
    with serve(failing) as server:
        asked = recipe(tmp_path, server, rows, rate={"budget_tokens": 107 * 5, "max_unscored_rate": 1.0})
        assert rate_replies.run(asked).stopped_by == "budget_tokens"
        server.script = rated
        result = rate_replies.run(recipe(tmp_path, server, rows))
        assert max(server.attempts().values()) == 1
        assert set(server.attempts()) == {f"doc-{i}" for i in taught(24)}
    assert (result.n_not_asked, result.n_scored) == (0, len(taught(24)))


def test_a_killed_rating_asks_nothing_twice(tmp_path: Path) -> None:
    with serve(rated, delay_s=0.05) as server:
        asked = recipe(tmp_path, server, [row(i) for i in range(24)])
        (tmp_path / "recipe.yaml").write_text(asked.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline", "align", "rate", str(tmp_path / "recipe.yaml")]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while len(server.asked) < 6 and process.poll() is None:
                time.sleep(0.01)
            process.kill()
        assert 6 <= len(server.asked) < len(taught(24))
        result = rate_replies.run(asked)

        assert len(server.asked) <= len(taught(24)) + 1, "but for the one that was on its way"
        assert set(server.attempts()) == {f"doc-{i}" for i in taught(24)}
    assert (result.n_scored, result.n_reused + result.n_asked) == (len(taught(24)), len(taught(24)))
    assert result.n_reused >= 4


def test_a_student_learns_from_the_ratings_of_replies_and_they_can_be_shown(
    tmp_path: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = {"model": str(tiny_encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu"}
    with serve(rated) as server:
        asked = recipe(tmp_path, server, [row(i, float(i % 6) if i % 2 else None) for i in range(60)], encoder=encoder)
        rate_replies.run(asked)
    result = train.run(asked)
    assert result.n_train + result.n_validation + result.n_test == len(taught(60))
    show.run(tmp_path / "run", Selection(n=2))
    assert "Assistant: This of number" in capsys.readouterr().out
