"""Asking by file: requests are written, something outside runs them, and what it gives back is read."""

import gzip
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint import (
    CHOICES,
    Asked,
    Endpoint,
    Reply,
    answers,
    error,
    gristmill,
    likes,
    number,
    ratings,
    recipe,
    says,
    score_of,
    serve,
)

from pipeline import label, prompts, rate, teacher
from pipeline.config import Recipe
from pipeline.engines import batch
from pipeline.errors import Pending, UserError
from pipeline.teacher import Answer

HALF = {" good": math.log(0.3), " bad": math.log(0.1)}
Line = dict[str, Any]


def asking(folder: Path, **options: Any) -> Recipe:
    """A recipe that asks by file."""
    return recipe(folder, "http://127.0.0.1:9/v1", batch_folder=folder / "batch", **options)


def requests(folder: Path) -> list[Line]:
    """Every request written, in the order of the files."""
    return [line for path in files(folder) for line in read(path)]


def files(folder: Path) -> list[Path]:
    """Every request file, in order."""
    return sorted((folder / "batch").glob("requests-*.jsonl"))


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def put(folder: Path, name: str, lines: list[Any]) -> None:
    """A file beside the requests."""
    (folder / "batch").mkdir(exist_ok=True)
    (folder / "batch" / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def run_batch(server: Endpoint, lines: list[Line]) -> list[Line]:
    """What a batch service gives back: each request sent as it stands there, in another order."""
    return [{"id": "b", "custom_id": line["custom_id"], **sent(server, line)} for line in reversed(lines)]


def sent(server: Endpoint, line: Line) -> Line:
    """The response to one line, in OpenAI's words."""
    url = server.url.removesuffix("/v1") + line["url"]
    body, headers = json.dumps(line["body"]).encode(), {"content-type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=line["method"])) as response:
            status, said = response.status, json.loads(response.read())
    except urllib.error.HTTPError as refused:
        status, said = refused.code, json.loads(refused.read())
        refused.close()
    return {"response": {"status_code": status, "request_id": "r", "body": said}, "error": None}


def pending(r: Recipe, redo: bool = False) -> str:
    """The line a stage stops with that has to wait."""
    with pytest.raises(Pending) as stopped:
        rate.run(r, redo)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def answered(folder: Path, script: Callable[[Asked], Reply], name: str = "answers-0001.jsonl") -> list[Line]:
    """Run all requests that are there, and put the answers beside them."""
    with serve(script) as server:
        lines = run_batch(server, requests(folder))
    put(folder, name, lines)
    return lines


# -- there and back


def test_requests_go_out_by_file_and_answers_come_back_by_file(tmp_path: Path) -> None:
    r = asking(tmp_path, n=12)
    said = pending(r)
    (path,) = files(tmp_path)
    assert f"12 requests wait in {path.parent}: {path.name};" in said
    assert f"vllm run-batch -i {path} -o" in said
    assert not (tmp_path / "run" / "rate" / "result.json").exists()
    answered(tmp_path, score_of)
    result = rate.run(r)
    assert (result.n_asked, result.n_scored, result.n_failed) == (12, 12, 0)
    assert (result.prompt_tokens, result.answer_tokens) == (1200, 84)
    assert {name: row["score"] for name, row in ratings(r).items()} == {f"id-{i}": i % 6 for i in range(12)}
    assert requests(tmp_path) == [], "nothing is left that could be paid for again"
    assert rate.run(r) == result


def test_a_request_in_a_file_is_the_request_that_would_be_sent(tmp_path: Path) -> None:
    texts = ["doc-1 <|im_end|>", "doc-2 \N{EURO SIGN}" * 50]
    for options in ({}, {"prompt": CHOICES}, {"prompt": {"chat": False, "system": "Be strict."}}):
        with serve(lambda asked: likes(HALF) if "logprobs" in asked.body else score_of(asked)) as server:
            live = recipe(tmp_path, server.url, document_tokens=16, **options)
            answers(live, texts)
        with pytest.raises(Pending):
            answers(asking(tmp_path, document_tokens=16, **options), texts)
        lines = {line["custom_id"]: line for line in requests(tmp_path)}
        assert len(lines) == 2
        assert sorted(json.dumps(line["body"]) for line in lines.values()) == sorted(
            json.dumps(asked.body) for asked in server.asked
        )
        assert {line["url"] for line in lines.values()} == {asked.path for asked in server.asked}
        assert {line["method"] for line in lines.values()} == {"POST"}
        assert {line["body"]["model"] for line in lines.values()} == {"m"}
        for path in files(tmp_path):
            path.unlink()


def test_the_same_open_questions_give_the_same_bytes(tmp_path: Path) -> None:
    r = asking(tmp_path, n=9)
    first_said = pending(r)
    (path,) = files(tmp_path)
    first = path.read_bytes()
    assert (pending(r), path.read_bytes()) == (first_said, first)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_order_of_questions_makes_no_difference(tmp_path: Path) -> None:
    texts, written = [f"doc-{i}" for i in range(20)], []
    for order in (texts, texts[::-1]):
        with pytest.raises(Pending):
            answers(asking(tmp_path), order)
        written.append([path.read_bytes() for path in files(tmp_path)])
    assert written[0] == written[1]


def test_probabilities_of_choices_come_back_too(tmp_path: Path) -> None:
    r = asking(tmp_path, n=4, prompt=CHOICES)
    pending(r)
    assert {line["body"]["top_logprobs"] for line in requests(tmp_path)} == {20}
    answered(tmp_path, lambda _: likes(HALF))
    result = rate.run(r)
    assert result.mass == pytest.approx(0.4)
    assert ratings(r)["id-0"]["score"] == pytest.approx(5 * 0.3 / 0.4)


def test_whether_a_document_was_cut_is_known_of_answers_by_file(tmp_path: Path) -> None:
    r = asking(tmp_path, n=3, document_tokens=2)
    pending(r)
    answered(tmp_path, lambda _: says("Score: 3"))
    assert rate.run(r).n_truncated == 3


def test_several_opinions_wait_in_one_file(tmp_path: Path) -> None:
    second = tmp_path / "other.md"
    second.write_text("---\nread: generate\n---\nIs it any good?\n\n{{ text }}\n\nScore: 0 to 5\n", encoding="utf-8")
    r = asking(tmp_path, n=5, rate={"more_prompts": [str(second)]})
    assert "10 requests wait" in pending(r)
    assert len({line["custom_id"] for line in requests(tmp_path)}) == 10
    answered(tmp_path, score_of)
    assert rate.run(r).n_asked == 10


# -- in parts


def test_answers_may_come_in_parts_and_are_recorded_once(tmp_path: Path) -> None:
    r = asking(tmp_path, n=10)
    pending(r)
    with serve(score_of) as server:
        lines = run_batch(server, requests(tmp_path))
    put(tmp_path, "a.jsonl", lines[:4])
    assert "6 requests wait" in pending(r)
    assert {line["custom_id"] for line in requests(tmp_path)} == {line["custom_id"] for line in lines[4:]}
    put(tmp_path, "b.jsonl", lines[2:])
    result = rate.run(r)
    assert (result.n_asked, result.n_reused, result.n_scored) == (6, 4, 10)


def test_recorded_answers_need_no_file_any_more(tmp_path: Path) -> None:
    r = asking(tmp_path, n=6)
    pending(r)
    lines = answered(tmp_path, score_of)
    put(tmp_path, "answers-0001.jsonl", lines[:3])
    pending(r)
    (tmp_path / "batch" / "answers-0001.jsonl").unlink()
    assert "3 requests wait" in pending(r)


def test_files_are_split_and_files_of_an_earlier_time_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MOST_LINES", 4)
    r = asking(tmp_path, n=10)
    said, written = pending(r), files(tmp_path)
    assert f"10 requests wait in {tmp_path / 'batch'}: {', '.join(path.name for path in written)};" in said
    assert [path.stem[-5:] for path in written] == ["-0001", "-0002", "-0003"]
    assert [len(read(path)) for path in written] == [4, 4, 2]
    assert sorted((tmp_path / "batch").iterdir()) == written
    with serve(score_of) as server:
        put(tmp_path, "a.jsonl", run_batch(server, requests(tmp_path)[:7]))
    assert "3 requests wait" in pending(r)
    assert sorted((tmp_path / "batch").iterdir()) == [tmp_path / "batch" / "a.jsonl", written[0]]


def test_no_file_is_larger_than_a_service_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pending(asking(tmp_path, n=10))
    longest = max(len(line) for line in files(tmp_path)[0].read_bytes().splitlines()) + 1
    monkeypatch.setattr(batch, "MOST_BYTES", 3 * longest)
    pending(asking(tmp_path, n=10))
    sizes = [path.stat().st_size for path in files(tmp_path)]
    assert len(sizes) in (4, 3)
    assert max(sizes) <= 3 * longest
    assert len(requests(tmp_path)) == 10
    monkeypatch.setattr(batch, "MOST_BYTES", 1)
    pending(asking(tmp_path, n=10))
    assert len(files(tmp_path)) == 10, "a request that is too large goes alone"


def test_every_answer_there_is_recorded_even_past_the_budget_and_nothing_more_is_asked(tmp_path: Path) -> None:
    texts = [f"doc-{i}" for i in range(batch.AT_ONCE + 50)]
    r = asking(tmp_path)
    with pytest.raises(Pending):
        answers(r, texts)
    with serve(score_of) as server:
        put(tmp_path, "a.jsonl", run_batch(server, requests(tmp_path))[:-20])
    found = answers(r, texts, lambda *_: False)
    assert len(found) == len(texts) - 20
    assert requests(tmp_path) == []


def test_no_request_is_written_when_the_budget_ends_after_questions_that_wait(tmp_path: Path) -> None:
    texts = [f"doc-{i}" for i in range(batch.AT_ONCE + 1)]
    r = asking(tmp_path)
    with pytest.raises(Pending):
        answers(r, texts)
    last = teacher.questions(prompts.load(tmp_path / "prompt.md"), r.teacher, texts)[-1]
    with serve(score_of) as server:
        put(tmp_path, "a.jsonl", run_batch(server, [x for x in requests(tmp_path) if x["custom_id"] == last.key]))
    assert answers(r, texts, lambda *_: False).keys() == {last.text}
    assert requests(tmp_path) == []


# -- one folder for several


def labelling(r: Recipe) -> Recipe:
    """The same documents, to be labelled by the same teacher."""
    path = Path(str(r.corpus.path)).parent / "labels.md"
    front = {"read": "label", "labels": ["Law", "Food"]}
    path.write_text(
        f"---\n{json.dumps(front)}\n---\nPick one of:\n{{{{ labels }}}}\n\n{{{{ text }}}}\n", encoding="utf-8"
    )
    return Recipe.model_validate({**r.model_dump(exclude_unset=True), "label": {"prompt": path, "sample": 3}})


def test_two_stages_share_a_folder_and_neither_takes_the_others_requests(tmp_path: Path) -> None:
    r = asking(tmp_path, n=5)
    pending(r)
    (rating,) = files(tmp_path)
    before = rating.read_bytes()
    with pytest.raises(Pending, match="3 requests wait") as stopped:
        label.run(labelling(r))
    assert rating.read_bytes() == before
    first, second = files(tmp_path)
    assert (first, [len(read(path)) for path in (first, second)]) == (rating, [5, 3])
    assert second.name in str(stopped.value)
    assert first.name not in str(stopped.value)
    labels_before = second.read_bytes()
    pending(r)
    assert second.read_bytes() == labels_before
    answered(tmp_path, lambda asked: says("Law") if "Pick one of" in asked.shown else score_of(asked))
    assert rate.run(r).n_scored == 5
    assert files(tmp_path) == [second], "the requests that are done are gone, the others' are not"
    assert label.run(labelling(r)).n_labelled == 3
    assert files(tmp_path) == []


def test_a_file_that_is_not_written_here_is_never_overwritten(tmp_path: Path) -> None:
    pending(asking(tmp_path, n=5))
    (path,) = files(tmp_path)
    ours = path.read_bytes()
    path.write_bytes(b"mine\n" + ours)
    assert path.name not in pending(asking(tmp_path, n=5))
    assert path.read_bytes() == b"mine\n" + ours
    assert [each.read_bytes() for each in files(tmp_path)[1:]] == [ours]


def test_a_file_holds_one_model_and_one_url(tmp_path: Path) -> None:
    second = tmp_path / "plain.md"
    second.write_text("---\nread: generate\nchat: false\n---\n{{ text }}\n\nScore: 0 to 5\n", encoding="utf-8")
    said = pending(asking(tmp_path, n=4, rate={"more_prompts": [str(second)]}))
    pending(asking(tmp_path, n=4, model="other"))
    held = [{(line["url"], line["body"]["model"]) for line in read(path)} for path in files(tmp_path)]
    chat, plain = "/v1/chat/completions", "/v1/completions"
    assert sorted(map(sorted, held)) == [[(chat, "m")], [(chat, "other")], [(plain, "m")]]
    of_m = [path.name for path in files(tmp_path) if read(path)[0]["body"]["model"] == "m"]
    assert f"8 requests wait in {tmp_path / 'batch'}: {', '.join(of_m)};" in said


# -- what may lie in the folder


def errors(status: int | None, message: str, key: str) -> dict[str, Line]:
    """An error about this question as OpenAI and as vLLM word it."""
    inner = {"message": message, "code": None}
    response = {"status_code": status, "request_id": "r", "body": {"error": inner}}
    no_body = {"status_code": status, "request_id": "r", "body": None}
    return {
        "openai": {"custom_id": key, "response": response, "error": None},
        "expired": {"custom_id": key, "response": None, "error": {"code": "batch_expired", "message": message}},
        "vllm": {"custom_id": key, "response": no_body, "error": {"error": {**inner, "code": status}}},
        "vllm in words": {"custom_id": key, "response": no_body, "error": message},
    }


@pytest.mark.parametrize("kind", ["openai", "expired", "vllm", "vllm in words"])
def test_what_came_back_with_a_passing_error_is_asked_again(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    r = asking(tmp_path, n=6)
    pending(r)
    lines = answered(tmp_path, score_of)
    key = lines[2]["custom_id"]
    put(tmp_path, "answers-0001.jsonl", [line for line in lines if line["custom_id"] != key])
    put(tmp_path, "errors.jsonl", [errors(503, "we were busy", key)[kind]])
    assert "1 requests wait" in pending(r)
    assert [line["custom_id"] for line in requests(tmp_path)] == [key]
    assert any("1 requests came back with an error" in each and "we were busy" in each for each in caplog.messages)
    put(tmp_path, "second.jsonl", [line for line in lines if line["custom_id"] == key])
    result = rate.run(r)
    assert (result.n_scored, result.n_failed) == (6, 0), "an answer counts, whatever error came before"


@pytest.mark.parametrize("kind", ["openai", "vllm", "vllm in words"])
def test_a_document_that_is_refused_as_such_does_not_keep_the_others_waiting(tmp_path: Path, kind: str) -> None:
    r = asking(tmp_path, n=6)
    pending(r)
    lines = answered(tmp_path, lambda asked: error(400, "too long") if number(asked) == 3 else score_of(asked))
    key = next(line["custom_id"] for line in lines if line["response"]["status_code"] == 400)
    lines = [errors(400, "too long", key)[kind] if line["custom_id"] == key else line for line in lines]
    put(tmp_path, "answers-0001.jsonl", lines)
    result = rate.run(r)
    assert (result.n_scored, result.n_failed, result.unscored) == (5, 1, {"request_failed": 1})
    assert ratings(r)["id-3"]["reason"] == "request_failed"
    assert [line["custom_id"] for line in requests(tmp_path)] == [key], "it can be tried again"
    answered(tmp_path, score_of, "second.jsonl")
    assert rate.run(r, redo=True).n_scored == 6


def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    kinds = [error(400, "filtered", code="content_filter"), says(None, refusal="No."), says("Score: 2")]
    r = asking(tmp_path, n=6)
    pending(r)
    answered(tmp_path, lambda asked: kinds[number(asked) % 3])
    result = rate.run(r)
    assert (result.unscored, result.n_scored, result.n_failed) == ({"refused": 4}, 2, 0)


def test_strange_lines_are_counted_and_named_and_cost_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gristmill")
    r = asking(tmp_path, n=8)
    pending(r)
    lines = answered(tmp_path, score_of)
    other = {**lines[0], "custom_id": "0123456789abcdef:" + "0" * 32}
    foreign = [
        None,
        5,
        [],
        {},
        {"custom_id": "x"},
        {**lines[0], "custom_id": "request-1"},
        {**lines[0], "custom_id": 7},
    ]
    put(tmp_path, "answers-0001.jsonl", [*foreign, other, *lines])
    path = tmp_path / "batch" / "answers-0001.jsonl"
    path.write_bytes(path.read_bytes() + b'\n\xff\xfe\n{"custom_id": "half')
    put(tmp_path, "copy.jsonl", requests(tmp_path))
    result = rate.run(r)
    assert (result.n_scored, result.n_asked) == (8, 8)
    told = next(each for each in caplog.messages if each.startswith("batch: 8 answers read"))
    assert "answers-0001.jsonl: 1 about other questions" in told
    assert "answers-0001.jsonl: 2 half-written or no JSON" in told
    assert "answers-0001.jsonl: 5 no answers" in told
    assert "answers-0001.jsonl: 2 with a custom_id that is none of ours" in told
    assert "copy.jsonl: 8 no answers" in told


@pytest.mark.parametrize(
    "body",
    [None, {}, [], {"choices": []}, {"choices": [{"message": None}]}, {"choices": [{"error": {"code": 502}}]}, "text"],
)
def test_what_is_no_completion_is_asked_again(tmp_path: Path, body: Any) -> None:
    r = asking(tmp_path, n=4)
    pending(r)
    lines = answered(tmp_path, score_of)
    lines[1]["response"]["body"] = body
    put(tmp_path, "answers-0001.jsonl", lines)
    assert "1 requests wait" in pending(r)
    assert [line["custom_id"] for line in requests(tmp_path)] == [lines[1]["custom_id"]]


def test_choices_without_probabilities_are_no_answers(tmp_path: Path) -> None:
    r = asking(tmp_path, n=3, prompt=CHOICES)
    pending(r)
    answered(tmp_path, lambda asked: says(" good") if number(asked) == 1 else likes(HALF))
    assert "1 requests wait" in pending(r)


def test_answers_to_another_prompt_are_not_taken_for_answers_to_this_one(tmp_path: Path) -> None:
    r = asking(tmp_path, n=5)
    pending(r)
    answered(tmp_path, score_of)
    other = asking(tmp_path, n=5, prompt={"body": "Another question.\n\n{{ text }}\n"})
    (first,) = files(tmp_path)
    before = first.read_bytes()
    said = pending(other)
    assert "5 requests wait" in said
    assert first.name not in said
    assert first.read_bytes() == before, "who wrote it may still want its answers"


def test_a_folder_in_which_nothing_is_an_answer_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "corpus.jsonl", [{"text": "doc-1"}, {"text": "doc-2"}])
    with pytest.raises(UserError, match=r"nothing in .* is an answer \(corpus.jsonl: 2 no answers\)") as refused:
        rate.run(asking(tmp_path, n=3))
    assert not isinstance(refused.value, Pending)
    assert len(requests(tmp_path)) == 3


def test_a_batch_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "batch").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*requests-[0-9a-f]{8}-0001\.jsonl"):
        rate.run(asking(tmp_path, n=3))


def test_a_folder_with_the_name_of_a_file_is_passed_over(tmp_path: Path) -> None:
    r = asking(tmp_path, n=4)
    (tmp_path / "batch" / "x.jsonl").mkdir(parents=True)
    assert "4 requests wait" in pending(r)
    (path,) = files(tmp_path)
    path.unlink()
    path.mkdir()
    assert path.name not in pending(r)
    assert [len(read(each)) for each in files(tmp_path)[1:]] == [4]


def test_a_line_nested_too_deep_is_no_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gristmill")
    r = asking(tmp_path, n=4)
    pending(r)
    answered(tmp_path, score_of)
    (tmp_path / "batch" / "deep.jsonl").write_text("[" * 100_000 + "\n" + '{"response":' * 100_000 + "\n")
    assert rate.run(r).n_scored == 4
    assert any("deep.jsonl: 2 half-written or no JSON" in each for each in caplog.messages)


def test_packed_answers_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gristmill")
    r = asking(tmp_path, n=4)
    pending(r)
    answered(tmp_path, score_of)
    path = tmp_path / "batch" / "answers-0001.jsonl"
    packed = path.with_name("answers-0001.jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with pytest.raises(UserError, match=r"answers-0001\.jsonl\.gz: 1 file to be unpacked first") as refused:
        rate.run(r)
    assert not isinstance(refused.value, Pending)
    packed.rename(path)
    with pytest.raises(UserError, match=r"answers-0001\.jsonl: \d+ half-written or no JSON"):
        rate.run(r)


@pytest.mark.parametrize("response", ["text", 5, [], {"status_code": [200]}, {"status_code": {}, "body": []}])
def test_an_odd_response_is_asked_again(tmp_path: Path, response: Any) -> None:
    r = asking(tmp_path, n=3)
    pending(r)
    lines = answered(tmp_path, score_of)
    put(tmp_path, "answers-0001.jsonl", [*lines[1:], {**lines[0], "response": response}])
    assert "1 requests wait" in pending(r)


# -- the command


def test_a_command_that_has_to_wait_exits_75_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    r = asking(tmp_path, n=4)
    done = gristmill(r)
    assert (done.code, done.stdout) == (75, "")
    assert done.stderr.splitlines()[-1].startswith("gristmill: teacher.batch_folder: 4 requests wait in ")
    assert "Traceback" not in done.stderr
    answered(tmp_path, score_of)
    done = gristmill(r)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["rate"]["n_scored"] == 4


def test_answers_by_file_are_the_answers_of_a_live_endpoint(tmp_path: Path) -> None:
    texts = [f"doc-{i}" for i in range(7)]

    def plain(found: dict[str, Answer]) -> dict[str, tuple[object, ...]]:
        return {text: (a.finish, a.text, a.prompt_tokens, a.was_truncated) for text, a in found.items()}

    with pytest.raises(Pending):
        answers(asking(tmp_path), texts)
    answered(tmp_path, score_of)
    with serve(score_of) as server:
        assert plain(answers(recipe(tmp_path, server.url), texts)) == plain(answers(asking(tmp_path), texts))
