"""gristmill generate, as a user meets it."""

import io
import json
from pathlib import Path

import pytest

from pipeline import cli

CPU = ("--device", "cpu", "--max-tokens", 6)


def run(capsys: pytest.CaptureFixture[str], *tokens: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", *map(str, tokens)])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_a_prompt_is_continued_and_the_same_seed_says_the_same(
    tiny_causal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [run(capsys, tiny_causal, "This text", *CPU, "--seed", seed) for seed in (1, 1, 2)]
    assert all(code == 0 and out.startswith("This text") for code, out, _ in found)
    assert found[0][1] == found[1][1] != found[2][1]


def test_several_prompts_and_continuations_are_told_apart(
    tiny_causal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, tiny_causal, "This text", "yes or no", *CPU, "--n", 2, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("This text", 0),
        ("yes or no", 0),
        ("This text", 1),
        ("yes or no", 1),
    ]
    alone = json.loads(run(capsys, tiny_causal, "yes or no", *CPU, "--seed", 1, "--json")[1])
    assert alone == lines[3]
    assert run(capsys, tiny_causal, "a", "b", *CPU)[1].count("\n---\n") == 1


def test_the_prompt_may_come_on_stdin(
    tiny_causal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("This text\nis\n"))
    code, out, _ = run(capsys, tiny_causal, *CPU, "--temperature", 0, "--json")
    assert code == 0 and json.loads(out)["prompt"] == "This text\nis"


def test_a_chat_is_asked_in_its_template_and_the_reply_stands_alone(
    tiny_causal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = (*CPU, "--temperature", 0, "--json")
    plain, chat = (json.loads(run(capsys, tiny_causal, "This text", *ways, *more)[1]) for more in ((), ("--chat",)))
    assert plain["text"] != chat["text"]
    _, out, _ = run(capsys, tiny_causal, "This text", *CPU, "--temperature", 0, "--chat")
    assert out == chat["text"].strip() + "\n"


def test_bad_input_is_one_line(
    tiny_causal: Path, tiny_t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for given, message in (
        ((tiny_causal, " "), "generate: the prompt is empty; give one after the model, or on stdin"),
        ((tiny_causal, "word " * 3000), "tokens; beside 6 to be written the model can read 1978: shorten it"),
        ((tiny_causal, "a", "--n", 2, "--temperature", 0), "at --temperature 0 all continuations are the same"),
        ((tmp_path / "none/such", "a"), "model: " + str(tmp_path / "none/such") + " does not exist"),
        ((adapter, "a"), "is a LoRA adapter, not a whole model"),
        ((tiny_t5, "a"), "cannot be loaded as a causal language model (it is an encoder-decoder)"),
    ):
        code, out, err = run(capsys, *given, *CPU)
        assert (code, out) == (1, "")
        assert message in err.strip().splitlines()[-1]
