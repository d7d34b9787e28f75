"""Rows that the teacher writes: what it is shown, what of its answers is used, and what is never asked twice."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stamina
from endpoint import Asked, Endpoint, Reply, error, says, serve

from pipeline import conversations, expand, expansion
from pipeline.config import Recipe
from pipeline.conversations import Exchange, for_judging
from pipeline.corpus import text_id
from pipeline.errors import UserError
from pipeline.expansion import Apart, Question
from pipeline.teacher import Answer

DATA = [{"user_input": f"How is doc-{i} made?", "completion": f"With {i} eggs."} for i in range(20)]


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


def writes(asked: Asked) -> Reply:
    """A new row each time."""
    name = text_id(str(asked.n))
    return says(f"User: What about {name}?\n\nAssistant: It is as good as {name}.")


def recipe(tmp_path: Path, server: Endpoint | None = None, **settings: Any) -> Recipe:
    (tmp_path / "data.json").write_text(json.dumps(DATA), encoding="utf-8")
    teacher = {"engine": "openai", "model": "m", "base_url": server.url, "retries": 0} if server else {}
    align = {"actor_data": tmp_path / "data.json", **settings.pop("align", {})}
    return Recipe.model_validate(
        {
            "run_folder": tmp_path / "run",
            "teacher": {**teacher, "concurrency": 1, **settings.pop("teacher", {})},
            "align": align,
            **settings,
        }
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["actor", "prompts", "reward"])
def test_rows_of_each_kind_are_what_the_later_steps_read(tmp_path: Path, kind: expansion.Kind) -> None:
    with serve(writes) as server:
        asked = recipe(tmp_path, server, align={"actor_data": None})
        result = expand.run(asked, kind=kind, n=5)
    rows = lines(tmp_path / "run" / "expand" / f"{kind}.jsonl")
    keys = {"actor": ["user_input", "completion"], "prompts": ["user_input"]}
    assert all(list(row) == keys.get(kind, ["user_input", "completion", "score"]) for row in rows)
    assert all(row.get("score") is None for row in rows)
    assert len({row["user_input"] for row in rows}) == 5 == result.n_rows
    assert len(conversations.of(asked, kind)) == 5


def test_the_examples_are_other_ones_each_time_and_never_held_out(tmp_path: Path) -> None:
    with serve(writes) as server:
        asked = recipe(tmp_path, server, align={"examples": 2})
        expand.run(asked, kind="actor", n=8)
        shown = [tuple(row["user_input"] for row in DATA if row["user_input"] in each.shown) for each in server.asked]
    assert all(len(each) == 2 for each in shown)
    assert len(set(shown)) > 4
    assert not any(for_judging(asked, prompt) for each in shown for prompt in each)


def test_copies_and_unreadable_answers_are_counted_and_it_gives_up_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = [
        "User: A?\n\nAssistant: B.",
        "User: a?\nAssistant: C.",
        "User: Nothing else",
        "",
        "User: How is doc-3 made?\nAssistant: x",
    ]
    with serve(lambda asked: says(said[asked.n % 5], "length" if asked.n > 10 else "stop")) as server:
        result = expand.run(recipe(tmp_path, server), kind="actor", n=4)
        assert len(server.asked) == 12
    assert (result.n_rows, result.n_answers, result.n_copies) == (1, 12, 5)
    assert result.unreadable == {"no_reply": 4, "truncated": 2}
    assert result.sentence == "1 of 4 rows from 12 answers (no_reply 4, truncated 2, copies 5); given up"
    assert result.sentence in caplog.text


def test_no_row_at_all_is_one_line(tmp_path: Path) -> None:
    with (
        serve(lambda _: says("I cannot.")) as server,
        pytest.raises(
            UserError, match=r"^expand: 0 of 2 rows from 6 answers \(no_reply 6\); given up; .*template actor"
        ),
    ):
        expand.run(recipe(tmp_path, server), kind="actor", n=2)
    assert not (tmp_path / "run" / "expand" / "actor.jsonl").exists()


def test_more_rows_begin_with_the_same_ones_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    with serve(writes) as server:
        asked = recipe(tmp_path, server)
        expand.run(asked, kind="actor", n=3)
        few = lines(tmp_path / "run" / "expand" / "actor.jsonl")
        expand.run(asked, kind="actor", n=3)
        assert len(server.asked) == 3
        result = expand.run(asked, kind="actor", n=7)
        assert len(server.asked) == 7
    assert lines(tmp_path / "run" / "expand" / "actor.jsonl")[:3] == few
    assert (result.n_rows, result.n_reused, result.n_asked) == (7, 3, 4)


def test_a_killed_expansion_asks_nothing_twice(tmp_path: Path) -> None:
    with serve(writes, delay_s=0.05) as server:
        asked = recipe(tmp_path, server)
        (tmp_path / "recipe.yaml").write_text(asked.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline", "align", "expand", "actor", str(tmp_path / "recipe.yaml"), "-n"]
        with subprocess.Popen([*command, "20"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while len(server.asked) < 5 and process.poll() is None:
                time.sleep(0.01)
            process.kill()
        assert 5 <= len(server.asked) < 20
        result = expand.run(asked, kind="actor", n=20)

        most = Counter(each.shown for each in server.asked)
        assert len(server.asked) <= 21, "but for the one that was on its way"
        assert sum(n > 1 for n in most.values()) <= 1
    assert (result.n_rows, result.n_reused + result.n_asked) == (20, 20)


def test_a_budget_leaves_the_rest_for_later(tmp_path: Path) -> None:
    with serve(writes) as server:
        result = expand.run(recipe(tmp_path, server, rate={"budget_tokens": 107 * 3}), kind="actor", n=6)
        assert (result.n_rows, result.n_not_asked, result.stopped_by) == (3, 3, "budget_tokens")
        result = expand.run(recipe(tmp_path, server), kind="actor", n=6)
        assert len(server.asked) == 6
    assert (result.n_rows, result.n_not_asked, result.stopped_by) == (6, 0, None)


def test_failed_requests_are_one_line_and_only_they_are_asked_again(tmp_path: Path) -> None:
    with serve(lambda asked: error(400) if asked.n == 2 else writes(asked)) as server:
        asked = recipe(tmp_path, server)
        with pytest.raises(UserError, match="1 of 4 requests failed; the other answers are kept"):
            expand.run(asked, kind="actor", n=4)
        assert expand.run(asked, kind="actor", n=4).n_rows == 4
        assert len(server.asked) == 5


def test_what_is_asked_in_the_same_words_is_drawn_with_another_seed(tmp_path: Path) -> None:
    templates = tmp_path / "templates.json"
    templates.write_text(json.dumps({"rlhf": "Ask something."}), encoding="utf-8")
    with serve(writes) as server:
        result = expand.run(recipe(tmp_path, server, align={"templates": templates}), kind="prompts", n=4)
        assert sorted(each.body["seed"] for each in server.asked) == [0, 1, 2, 3]
        assert {each.body["temperature"] for each in server.asked} == {1.0}
    assert result.n_rows == 4


def test_replies_can_be_asked_for_to_prompts_of_the_data(tmp_path: Path) -> None:
    templates = tmp_path / "templates.json"
    templates.write_text(json.dumps({"reward": "{{ user_input }}\n\nReply {{ quality }}."}), encoding="utf-8")
    align = {"templates": templates, "prompt_data": tmp_path / "data.json"}
    with serve(lambda asked: says(f"Reply {asked.n}")) as server:
        expand.run(recipe(tmp_path, server, align=align), kind="reward", n=6)
    rows = lines(tmp_path / "run" / "expand" / "reward.jsonl")
    assert {row["user_input"] for row in rows} <= {row["user_input"] for row in DATA}
    assert {row["completion"] for row in rows} == {f"Reply {i}" for i in range(1, 7)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"rlhf": "x"}', "holds no text called 'actor'"),
        ('{"actor": "{{ exmples }}"}', r"actor names \{\{ exmples \}\}; there are: examples, quality, topic"),
        ('{"actor": "x", "topics": "one"}', "must be a list of texts"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.json").write_text(content, encoding="utf-8")
    asked = recipe(tmp_path, align={"templates": tmp_path / "t.json"}, teacher={"model": "m"})
    with pytest.raises(UserError, match=rf"^align\.templates: .*{message}"):
        expand.run(asked)


@pytest.mark.parametrize(
    ("text", "kind", "row"),
    [
        (" What?\n\nAssistant: That.", "actor", Exchange("What?", "That.")),
        ("User: What?\nAssistant: That.\nAnd this.", "actor", Exchange("What?", "That.\nAnd this.")),
        ("**User:** What?\n**Assistant:** That.", "actor", Exchange("What?", "That.")),
        ("User: What?\nAssistant: That.\nAssistant: More.", "reward", Exchange("What?", "That.")),
        ("What?", "actor", "no_reply"),
        ("User: What?\nAssistant:  ", "actor", "empty"),
        (" What?", "prompts", Exchange("What?")),
        ("User: ", "prompts", "empty"),
    ],
)
def test_a_row_is_read_from_an_answer(text: str, kind: expansion.Kind, row: Exchange | str) -> None:
    assert expansion.read(Answer("stop", text), Question("", 0), kind) == row


def test_rows_of_the_reward_may_share_a_prompt_and_other_rows_may_not() -> None:
    rows = [Exchange("Why is the sky blue today?", reply) for reply in ("It scatters light.", "No idea.")]
    assert [Apart("reward", []).takes(row) for row in rows] == [True, True]
    actor = Apart("actor", [])
    assert [actor.takes(row) for row in rows] == [True, False]


def test_a_local_model_that_babbles_is_told_of_in_one_line(tmp_path: Path, tiny_causal: Path) -> None:
    teacher = {"model": str(tiny_causal), "max_tokens": 24, "device": "cpu"}
    with pytest.raises(
        UserError, match=r"^expand: 0 of 2 rows from 6 answers \(truncated 6\); given up; .*max_tokens"
    ):
        expand.run(recipe(tmp_path, teacher=teacher, align={"examples": 1}), kind="prompts", n=2)
