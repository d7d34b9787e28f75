"""Export: the student in other formats scores like the student, and goes to the Hub in one piece."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ENDS, SMALL
from transformers import (
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
)

from pipeline import config, export, student
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.student import Head, Layer, Student


def make_student(folder: Path, out: Path, *heads: Head, **given: object) -> Student:
    values = {"model": str(folder), "max_tokens": 64, "dtype": "float32", "device": "cpu", **given}
    weight = np.linspace(-1, 1, 32, dtype=np.float32)
    one = Head("score", "score", (Layer(weight[None], np.array([2.5], np.float32)),), (0, 5))
    made = Student(config.Encoder.model_validate(values), heads or (one,))
    made.save(out)
    return student.load(out)


def recipe(folder: Path, student: Path, **given: object) -> Recipe:
    return Recipe.model_validate({"run_folder": folder, "export": {"student": student, **given}})


def two_scores() -> tuple[Head, Head]:
    """Ordinal ones, through a sigmoid."""
    rng = np.random.default_rng(0)
    hidden = [Layer(rng.normal(0, 0.5, (5, 32)).astype(np.float32), np.zeros(5, np.float32), "sigmoid") for _ in "ab"]
    sums = Layer(np.ones((1, 5), np.float32), np.zeros(1, np.float32))
    first, second = (Head(name, "score", (each, sums), (0, 5)) for name, each in zip("ab", hidden, strict=True))
    return first, second


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, texts: list[str]) -> tuple[Path, Student]:
    """The run folder of two scores in both formats, compared on rated texts of very different lengths."""
    folder = tmp_path_factory.mktemp("exported")
    made = make_student(tiny_encoder, folder / "student", *two_scores())
    (folder / "run" / "rate").mkdir(parents=True)
    rated = [text[: 10 + 30 * (i % 20)] for i, text in enumerate(texts)]
    pq.write_table(pa.table({"text": [*rated, None, " "]}), folder / "run" / "rate" / "ratings.parquet")
    export.run(recipe(folder / "run", folder / "student"))
    return folder / "run", made


def result_of(run_folder: Path) -> dict[str, Any]:
    return json.loads((run_folder / "export" / "result.json").read_text())


def test_both_formats_agree_with_our_own_scores_on_rated_texts(exported: tuple[Path, Student], texts: list[str]):
    found = result_of(exported[0])
    assert found["n_documents"] == len(texts) and found["outputs"] == ["a", "b"]
    assert set(found["formats"]) == {"onnx", "openvino"}
    for each in found["formats"].values():
        assert each["max_difference"] < 1e-4 and each["spearman"] > 0.9999 and each["megabytes"] > 0


def by_onnx(folder: Path, inputs: dict[str, Any]) -> np.ndarray:
    return onnxruntime.InferenceSession(folder / "model.onnx").run(["scores"], inputs)[0]


def by_openvino(folder: Path, inputs: dict[str, Any]) -> np.ndarray:
    model = openvino.Core().compile_model(
        folder / "openvino" / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return model(inputs)["scores"]


@pytest.mark.parametrize("scores", [by_onnx, by_openvino])
def test_padding_changes_nothing(exported: tuple[Path, Student], texts: list[str], scores):
    folder, made = exported[0] / "export", exported[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mixed = [texts[0], "a", texts[1][:80], texts[2][:200], "two words"]

    def read(batch: list[str]) -> np.ndarray:
        tokens = tokenizer(batch, padding=True, truncation=True, return_tensors="np")
        return scores(folder, {name: values.astype(np.int64) for name, values in tokens.items()})

    together = read(mixed)
    np.testing.assert_allclose(together, np.concatenate([read([text]) for text in mixed]), atol=1e-5)
    ours = made.predict(mixed)
    np.testing.assert_allclose(together, np.stack([ours["a"], ours["b"]], axis=1), atol=1e-4)


def test_the_onnx_file_takes_any_batch_and_any_length(exported: tuple[Path, Student]):
    graph = onnx.load(exported[0] / "export" / "model.onnx").graph
    assert [each.name for each in graph.input] == ["input_ids", "token_type_ids", "attention_mask"]
    for each in graph.input:
        assert [dim.dim_param for dim in each.type.tensor_type.shape.dim] == ["batch", "tokens"]
    assert [each.name for each in graph.output] == ["scores"]


def test_what_the_outputs_mean_lies_beside_them(exported: tuple[Path, Student]):
    found = json.loads((exported[0] / "export" / "outputs.json").read_text())
    assert found["max_tokens"] == 64
    assert [(each["name"], each["scale"]) for each in found["outputs"]] == [("a", [0, 5]), ("b", [0, 5])]


def test_texts_are_those_that_the_student_was_trained_on(tmp_path: Path):
    pq.write_table(pa.table({"text": ["one text", " ", "another"]}), tmp_path / "mine.parquet")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/recipe.yaml").write_text(f"train: {{ratings: {tmp_path}/mine.parquet}}")
    assert export.texts(config.Recipe(run_folder=tmp_path)) == ["one text", "another"]


def test_an_export_that_is_there_is_not_made_again(exported: tuple[Path, Student]):
    file = exported[0] / "export" / "model.onnx"
    before = file.stat().st_mtime_ns
    export.run(recipe(exported[0], exported[0].parent / "student"))
    assert file.stat().st_mtime_ns == before


FAMILIES = {
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=1000, dim=32, n_layers=2, n_heads=2, hidden_dim=64, initializer_range=0.3)
    ),
    "deberta-v2": lambda: DebertaV2Model(
        DebertaV2Config(**SMALL, pos_att_type=["p2c", "c2p"], relative_attention=True)
    ),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SMALL, **ENDS, local_attention=16)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported_exactly(tmp_path: Path, tiny_encoder: Path, family: str):
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "encoder")
    make_student(tmp_path / "encoder", tmp_path / "student")
    found = export.run(recipe(tmp_path / "run", tmp_path / "student"))
    assert max(each.max_difference for each in found.formats.values()) < 1e-4
    assert min(each.spearman for each in found.formats.values()) > 0.99


def test_only_the_format_that_was_asked_for_is_left(tmp_path: Path, exported: tuple[Path, Student]):
    found = export.run(recipe(tmp_path / "run", exported[0].parent / "student", formats=["openvino"]))
    assert set(found.formats) == {"openvino"}
    assert not (tmp_path / "run" / "export" / "model.onnx").exists()
    assert (tmp_path / "run" / "export" / "openvino" / "model.bin").exists()


def test_a_run_without_a_student_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"export: .*train is not finished; run gristmill train first"):
        export.run(Recipe(run_folder=tmp_path))


def test_a_format_that_differs_is_an_error(tmp_path: Path):
    ours = np.array([[1.0], [2.0]], np.float32)
    with pytest.raises(UserError, match=r"onnx differs from our scores by up to 0.5 on 2 documents.*not to be used"):
        export.agreement("onnx", ours + np.float32([[0], [0.5]]), ours, tmp_path)
    with pytest.raises(UserError, match="differs"):
        export.agreement("onnx", ours * np.nan, ours, tmp_path)


def test_a_missing_library_is_named_before_anything_is_made(tmp_path: Path, exported: tuple[Path, Student]):
    hide = "import sys; sys.modules['onnxscript'] = None; from pipeline.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", hide, "export", "--student", exported[0].parent / "student", "--run-folder", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and 'onnxscript is not installed; in your clone run: pip install -e ".[export]"' in (
        done.stderr
    )


# -- the Hub ----------------------------------------------------------------------------------------------------------

TOKEN = "hf_do_not_show_me"


class StandIn(ThreadingHTTPServer):
    """The part of the Hub that an upload asks, which keeps what it is given."""

    def __init__(self, refuse: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.refuse = refuse
        self.files: dict[str, bytes] = {}
        self.asked: set[str] = set()
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does; every file counts as small, so it comes inside the commit."""

    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, values: Any, status: int = 200) -> None:
        raw = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self.answer({"id": "me/student", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers["Authorization"] or "")
        self.server.asked.add(self.path)
        if self.server.refuse:
            self.answer({"error": "you may not"}, self.server.refuse)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(raw))
            self.answer({"url": f"{self.server.url}/me/student", "name": "me/student", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(raw)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {"commitUrl": f"{self.server.url}/me/student/commit/1", "commitOid": "0" * 40, "success": True}
            )
        else:
            self.answer({}, 404)


@pytest.fixture
def hub() -> Iterator[StandIn]:
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(exported: tuple[Path, Student], endpoint: str, to: str = "me/student") -> subprocess.CompletedProcess[str]:
    """The command line itself, with a token in its environment."""
    known = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = ["export", "--student", exported[0].parent / "student", "--run-folder", exported[0]]
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *command, "--push-to-hub", to],
        capture_output=True,
        text=True,
        env={**os.environ, **known},
    )


def test_student_and_exports_are_uploaded_together(exported: tuple[Path, Student], hub: StandIn):
    done = push(exported, hub.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["export"]["pushed_to"] == f"{hub.url}/me/student"
    made = hub.created[0]
    assert made["name"] == "student" and (made.get("private") or made.get("visibility") == "private")
    folder = exported[0].parent / "student"
    of_student = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    beside = {"outputs.json", "tokenizer.json", "tokenizer_config.json"}
    of_export = {"model.onnx", "openvino/model.xml", "openvino/model.bin", *beside}
    assert set(hub.files) == of_student | {f"export/{name}" for name in of_export}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    written = [path.read_bytes() for path in exported[0].rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in raw for raw in [done.stdout.encode(), done.stderr.encode(), *written])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_upload_is_one_line(exported: tuple[Path, Student], hub: StandIn, status: int):
    hub.refuse = status
    done = push(exported, hub.url)
    assert done.returncode == 1 and "Traceback" not in done.stderr and TOKEN not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"{hub.url} refused me/student ({status} you may not); run hf auth login" in last


def test_no_hub_at_all_is_one_line(exported: tuple[Path, Student]):
    done = push(exported, "http://127.0.0.1:9")
    assert done.returncode == 1 and "Traceback" not in done.stderr and TOKEN not in done.stderr
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["student", "a/b/c", "me/stu dent"])
def test_a_repository_name_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=f"export.push_to_hub: {name} is no repository; give owner/name"):
        export.run(recipe(tmp_path, tmp_path / "none", push_to_hub=name))
