"""Fine-tuning on a corpus, a book or what was kept, judged on text held out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from pipeline import continuations, finetune, passages, training
from pipeline.config import Corpus, Recipe
from pipeline.errors import UserError
from pipeline.finetune import FinetuneResult
from pipeline.perplexity import Predicted

ROOT = Path(__file__).parent.parent
LEARNS = {"max_length": 64, "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
QUICK = LEARNS | {"max_steps": 2}


def recipe(tmp_path: Path, corpus: Path, model: Path, args: dict[str, Any] = QUICK, **more: Any) -> Recipe:
    """Short fine-tuning on the CPU."""
    settings = {"model": str(model), "device": "cpu", "args": args, "continuation_tokens": 8, **more}
    return Recipe.model_validate(
        {"run_folder": tmp_path / "run", "corpus": {"path": str(corpus)}, "finetune": settings}
    )


def book(path: Path, texts: list[str]) -> Path:
    """Texts as paragraphs of a plain file."""
    path.write_text("\n\n".join(" ".join(text.split()) for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_causal: Path, texts: list[str]) -> tuple[Recipe, Any]:
    """A small model that has read most of a book."""
    folder = tmp_path_factory.mktemp("tuned")
    made = recipe(folder, book(folder / "book.txt", texts), tiny_causal, LEARNS, held_out_share=0.3)
    return made, finetune.run(made)


def test_a_random_model_gets_better_and_the_result_says_so(tuned: tuple[Recipe, FinetuneResult]) -> None:
    made, result = tuned
    assert result.gain == pytest.approx(result.bits_per_byte_before - result.bits_per_byte_after)
    assert result.gain_interval is not None and 0 < result.gain_interval[0] <= result.gain <= result.gain_interval[1]
    assert result.perplexity_after < result.perplexity_before / 10
    assert result.sentence.startswith(f"Better on {result.n_measured} texts held out: held-out perplexity")
    assert result.n_trained_on + result.n_held_out + result.n_copies == result.n_documents and result.n_steps == 20
    assert result.tokens_per_s is not None and result.tokens_per_s > 0
    assert AutoModelForCausalLM.from_pretrained(made.run_folder / "finetune" / "model").num_parameters() > 0


def test_continuations_stand_beside_the_documents_own_words(tuned: tuple[Recipe, FinetuneResult]) -> None:
    made, _ = tuned
    shown = json.loads((made.run_folder / "finetune" / "continuations.json").read_text(encoding="utf-8"))
    assert [set(row) for row in shown] == [{"prompt", "before", "after", "original"}] * 3
    held_out = pq.read_table(made.run_folder / "finetune" / "held_out.parquet")["text"].to_pylist()
    assert all(any(text.startswith(row["prompt"] + row["original"]) for text in held_out) for row in shown)
    assert all(row["before"] != row["after"] for row in shown)


def test_nothing_held_out_is_trained_on_and_a_book_is_held_out_by_passages(
    tuned: tuple[Recipe, FinetuneResult], texts: list[str]
) -> None:
    folder = tuned[0].run_folder / "finetune"
    rows, held_out = (
        pq.read_table(folder / name)["text"].to_pylist() for name in ("rows.parquet", "held_out.parquet")
    )
    paragraphs = [{part for row in each for part in row.split("\n\n")} for each in (rows, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    assert paragraphs[0] | paragraphs[1] == {" ".join(text.split()) for text in texts}
    assert min(map(len, rows)) > 0 and len(held_out) < len(paragraphs[1])


def test_a_second_run_changes_nothing_and_a_changed_one_is_refused(tuned: tuple[Recipe, FinetuneResult]) -> None:
    made, result = tuned
    weights = made.run_folder / "finetune" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert finetune.run(made) == result
    changed = made.model_copy(update={"finetune": made.finetune.model_copy(update={"args": QUICK})})
    with pytest.raises(UserError, match=r"finetune: finetune\.args\.max_steps changed from 20 to 2 since"):
        finetune.run(changed)
    assert weights.stat().st_mtime_ns == before


def test_redo_begins_from_nothing(tmp_path: Path, tiny_causal: Path, tuned: tuple[Recipe, FinetuneResult]) -> None:
    shutil.copytree(tuned[0].run_folder, tmp_path / "run")
    args = QUICK | {"max_steps": 3, "logging_steps": 2}
    again = finetune.run(recipe(tmp_path, Path(str(tuned[0].corpus.path)), tiny_causal, args), redo=True)
    assert again.n_steps == 3
    curve = training.read_curve(tmp_path / "run" / "finetune")
    assert [line["step"] for line in curve if "loss" in line] == [2]


def test_a_killed_run_goes_on_and_does_not_measure_the_model_twice(
    tmp_path: Path, tiny_causal: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, book(tmp_path / "book.txt", texts), tiny_causal, QUICK | {"max_steps": 4, "save_steps": 2})
    looks: list[str] = []
    look = finetune.look
    monkeypatch.setattr(finetune, "look", lambda *given: looks.append(given[1]) or look(*given))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "merged", interrupted)
        finetune.run(made)
    assert (tmp_path / "run" / "finetune" / "checkpoints" / "checkpoint-4").exists()
    changed = made.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match=r"finetune: seed changed from 0 to 1 since .* with --redo"):
        finetune.run(changed)

    result = finetune.run(made)
    assert looks == [str(tiny_causal), str(tmp_path / "run" / "finetune" / "model")]
    assert result.n_steps == 4


def test_ctrl_c_leaves_a_checkpoint_and_one_line(tmp_path: Path, tiny_causal: Path, texts: list[str]) -> None:
    made = recipe(
        tmp_path, book(tmp_path / "book.txt", texts), tiny_causal, QUICK | {"max_steps": 100_000, "save_steps": 1}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(made.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "pipeline", "finetune", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        folder = tmp_path / "run" / "finetune" / "checkpoints"
        begun, deadline = folder / "checkpoint-2" / "trainer_state.json", time.monotonic() + 120
        while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert (
        err.strip().splitlines()[-1] == "gristmill: interrupted; everything recorded is kept, the same command goes on"
    )
    assert "Traceback" not in err and "it/s" not in err
    assert training.last_checkpoint(folder) is not None


def test_kept_documents_are_those_that_are_learned(tmp_path: Path, tiny_causal: Path, texts: list[str]) -> None:
    kept = tmp_path / "run" / "filter" / "kept"
    kept.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts[:30]}), kept / "a.parquet")
    pq.write_table(pa.table({"text": texts}), tmp_path / "all.parquet")
    made = recipe(tmp_path, tmp_path / "all.parquet", tiny_causal, on="kept", held_out_share=0.2)
    with pytest.raises(UserError, match="filter is not finished; run gristmill filter first"):
        finetune.run(made)
    (kept.parent / "result.json").write_text("{}")
    (kept.parent / "recipe.yaml").write_text("{}")
    result = finetune.run(made)
    assert (result.n_documents, result.n_trained_on, result.n_held_out) == (30, 24, 6)


def test_copies_and_near_copies_are_on_one_side(tmp_path: Path, tiny_causal: Path, texts: list[str]) -> None:
    again = [f"{text} One more word." for text in texts[:20]]
    made = recipe(tmp_path, tmp_path, tiny_causal, held_out_share=0.5)
    parts = finetune.parted([*texts[:20], *again], made)
    assert len(parts.taught) == len(parts.held_out) == 20
    assert {f"{text} One more word." in parts.taught for text in parts.taught if text in texts} == {True}


def test_what_stands_in_a_longer_document_that_is_learned_is_not_measured_on(tmp_path: Path, texts: list[str]) -> None:
    made = recipe(tmp_path, tmp_path, tmp_path, held_out_share=0.5)
    quoted = [" ".join(text.split()[:40]) for text in texts[:20]]
    parts = finetune.parted([*texts[:20], *quoted], made)
    assert not any(text.startswith(short) for short in set(quoted) & set(parts.held_out) for text in parts.taught)
    assert len(parts.taught) == 20 and len(parts.held_out) == 20 - parts.n_copies > 0 < parts.n_copies


def test_a_uniform_draw_is_the_same_whatever_the_order(tmp_path: Path, texts: list[str]) -> None:
    drawn = []
    for name, rows in (("a", texts), ("b", texts[::-1])):
        pq.write_table(pa.table({"text": [*rows, rows[0]]}), tmp_path / f"{name}.parquet")
        drawn.append(passages.draw(Corpus(path=str(tmp_path / f"{name}.parquet")), 10, 0))
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 10


def test_passages_are_the_book_in_pieces(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "It goes on for a while. " * 8 for i in range(200)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = Corpus(path=str(tmp_path / "book.txt"))
    pieces = passages.draw(found, None, 0)
    in_order = sorted(pieces, key=lambda text: int(text.split(".")[0].split()[1]))
    assert "\n\n".join(in_order) == "\n\n".join(text.strip() for text in paragraphs)
    assert 18 <= len(pieces) <= 20
    assert len(passages.draw(found, 5, 0)) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no distinct texts, and at least 2 are needed"),
        ("A single paragraph.", "holds 1 distinct text, and at least 2 are needed, of which one is held out"),
        ("One.\n\nTwo.", r"finetune\.held_out_share: 0\.1 of 2 texts \(2 that are not nearly copies"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, tiny_causal: Path, content: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        finetune.run(recipe(tmp_path, tmp_path / "a.txt", tiny_causal))


def test_a_corpus_inside_the_run_folder_is_refused(tmp_path: Path, tiny_causal: Path, texts: list[str]) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run_folder: .* and corpus\.path .* overlap; keep them apart"):
        finetune.run(recipe(tmp_path, book(tmp_path / "run" / "book.txt", texts), tiny_causal))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "finetune.model is not set; give it in the recipe or as a flag, such as"),
        ({"model": "runs/no/model"}, "finetune.model: runs/no/model does not exist; give a model folder"),
        ({"prompts": ("word " * 5000,)}, "tokens; beside 8 to be written the model can read 1976: shorten it"),
        ({"args": QUICK | {"max_length": 4096}}, "finetune.args.max_length: 4096 is more than the 2048 tokens"),
        ({"device": "cuda:1"}, "finetune.device: models are trained on the first GPU; set CUDA_VISIBLE_DEVICES=1 to"),
        ({"args": QUICK | {"max_length": 1}}, "finetune.args.max_length: 1 tokens are no text; give 8 or more"),
        ({"args": QUICK | {"max_length": "many"}}, "finetune.args.max_length: input should be a valid integer"),
        ({"args": QUICK | {"load_best_model_at_end": True}}, "what is held out would choose the checkpoint, and then"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_trained(
    tmp_path: Path, tiny_causal: Path, texts: list[str], given: dict[str, Any], message: str
) -> None:
    made = recipe(tmp_path, book(tmp_path / "book.txt", texts), tiny_causal)
    made = made.model_copy(update={"finetune": made.finetune.model_copy(update=given)})
    with pytest.raises(UserError, match=message):
        finetune.run(made)
    assert not (tmp_path / "run" / "finetune" / "curve.jsonl").exists()


@pytest.mark.parametrize(
    "given",
    [{"args": {"learning_rat": 1}}, {"args": {"max_steps": "x"}}, {"lora": {"rank": 4}}, {"launch": "none.yaml"}],
)
def test_an_argument_that_fails_does_so_before_the_model_is_read(tmp_path: Path, given: dict[str, Any]) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"finetune\.(args|lora|launch)[:.]"):
        finetune.run(recipe(tmp_path, tmp_path / "none.txt", tmp_path / "model", **given))


@pytest.mark.parametrize(
    ("change", "verdict"), [(-5.0, "Better on 20"), (5.0, "Worse on 20"), (0.0, "No difference found on 20")]
)
def test_the_sentence_says_what_the_interval_says(change: float, verdict: str) -> None:
    rng = np.random.default_rng(0)
    old = Predicted(rng.normal(100, 1, 20), np.full(20, 40), np.full(20, 160))
    new = old._replace(nats=old.nats + change + rng.normal(0, 1, 20))
    gain = old.bits_per_byte - new.bits_per_byte
    interval = finetune.saved(old, new, 0)
    assert interval[0] <= gain <= interval[1]
    assert finetune.sentence(old, new, gain, interval).startswith(verdict)


def test_a_beginning_leaves_something_to_continue() -> None:
    text = " ".join(f"word{i}" for i in range(60))
    found = continuations.beginning(text, 100)
    assert found is not None and found.original is not None
    assert found.prompt.split() == text.split()[:16]
    assert text.startswith(found.prompt + found.original) and len(found.original) <= 100
    assert continuations.beginning("too short to go on", 100) is None
    unspaced = continuations.beginning("字" * 300, 100)
    assert unspaced is not None and unspaced.prompt == "字" * 66
