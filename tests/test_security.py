"""What comes from elsewhere (files, models, recipes, documents) is data: it cannot run, escape, or fill the memory."""

import ast
import csv
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from endpoint import Asked, Done, Reply, drop, error, gristmill, one_line, recipe, score_of, serve
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline import (
    cli,
    config,
    corpus,
    encoder,
    front_matter,
    gold,
    language_model,
    models,
    panel,
    report,
    rewards,
    shards,
)
from pipeline import sample as sampling
from pipeline import show as reader
from pipeline import student as students
from pipeline.cli import Selection
from pipeline.config import Corpus
from pipeline.engines import transformers as local
from pipeline.errors import UserError
from pipeline.shards import Counts, Shard
from pipeline.storage import write_text
from pipeline.taxonomy import load as load_taxonomy

ROOT = Path(__file__).parent.parent
MB = 10**6


def complaint(work: Callable[[], Any]) -> str:
    """The one line that a person reads."""
    with pytest.raises(UserError) as refused:
        work()
    line = str(refused.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


def read_all(path: Path | str, **settings: Any) -> list[dict[str, Any]]:
    """Every row of a corpus."""
    found, counts = Corpus(path=str(path), **settings), Counts()
    return [
        row
        for shard in shards.find_shards(found)
        for batch in corpus.read(shard, found, counts)
        for row in batch.to_pylist()
    ]


def n_read(path: Path, **settings: Any) -> int:
    """Rows of a corpus that are read."""
    found = Corpus(path=str(path), **settings)
    return sum(len(batch) for shard in shards.find_shards(found) for batch in corpus.read(shard, found, Counts()))


# -- bombs and giants -------------------------------------------------------------------------------------------------

MEASURED = """
import json, resource, sys
from pipeline import corpus, shards
from pipeline.config import Corpus
from pipeline.errors import UserError

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for given in json.loads(sys.argv[1]):
    found = Corpus(**given)
    [shard] = shards.find_shards(found)
    try:
        said = str(sum(batch.num_rows for batch in corpus.read(shard, found, shards.Counts())))
    except UserError as error:
        said = str(error)
    print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024]))
"""


def measured(*corpora: Corpus) -> list[tuple[str, int]]:
    """What reading each corpus ends with, and the MB that the process has grown by until then."""
    given = json.dumps([each.model_dump(exclude_unset=True) for each in corpora])
    done = subprocess.run([sys.executable, "-c", MEASURED, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(said, grown) for said, grown in map(json.loads, done.stdout.splitlines())]


def line_bomb(file: IO[bytes]) -> None:
    """260 MB of lines that are all alike."""
    for _ in range(260):
        file.write((json.dumps({"text": "a" * 986}).encode() + b"\n") * 1000)


def bomb(path: Path) -> Path:
    """A small file that unpacks to 256 MB."""
    table = pa.table({"text": pa.concat_arrays([pa.array(["a" * 2**20])] * 256)})
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="zstd", use_dictionary=False)
    elif path.suffix in (".arrow", ".feather"):
        new = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
        with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
    elif path.suffix == ".zst":
        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            line_bomb(file)
    else:
        with gzip.open(path, "wb", compresslevel=1) as file:
            line_bomb(file)
    assert path.stat().st_size < 3 * MB
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_what_unpacks_to_much_is_refused_and_read_once_the_limit_is_raised(tmp_path: Path, name: str) -> None:
    path = bomb(tmp_path / name)
    line = complaint(lambda: n_read(path))
    assert re.match(rf"{path} unpacks [\d,]+ bytes to 2\d\d[\d,]+ or more; remove it, or raise", line)
    assert "raise corpus.max_expansion (200)" in line
    assert n_read(path, max_expansion=100_000) == 256


def test_bombs_and_lines_of_a_gigabyte_are_refused_or_left_out_before_they_take_memory(tmp_path: Path) -> None:
    bombs = [bomb(tmp_path / name) for name in ("a.parquet", "a.jsonl.zst", "a.txt.gz")]
    lines = [gigabyte(tmp_path / name) for name in ("b.jsonl", "b.txt")]
    all_of_them = [Corpus(path=str(path), max_expansion=50) for path in (*bombs, *lines)]
    *found, left_out = measured(*all_of_them, Corpus(path=str(lines[0]), skip_bad_rows=True))
    for (said, grown), path in zip(found[:3], bombs, strict=True):
        assert re.match(rf"{path} unpacks [\d,]+ bytes to 2\d\d[\d,]+ or more; remove it, or raise", said)
        assert grown < 150, path
    for (said, grown), path in zip(found[3:], lines, strict=True):
        assert said.startswith(f"{path} line 1 holds a row of more than 100 MB; ")
        assert "raise corpus.max_row_mb" in said
        assert grown < 400, path
    assert left_out[0] == "1"
    assert left_out[1] < 400


@pytest.mark.parametrize("kind", ["arrow", "feather"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow_files_of_all_kinds_are_within_the_limits(tmp_path: Path, kind: str, compression: str | None) -> None:
    rows = [{"text": f"text {n % 7}", "tags": ["a", None], "in": {"n": n}, "kind": f"k{n % 3}"} for n in range(5000)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(3, "kind", table["kind"].dictionary_encode())
    new = pa.ipc.new_file if kind == "feather" else pa.ipc.new_stream
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(str(tmp_path / f"a.{kind}"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=700)
    assert read_all(tmp_path) == table.to_pylist()


def test_a_damaged_message_of_arrow_is_one_line(tmp_path: Path) -> None:
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([["some text"] * 100], ["text"]))
    whole = (tmp_path / "a.arrow").read_bytes()
    for place in range(0, len(whole), 7):
        (tmp_path / "a.arrow").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            sampling.sample(Corpus(path=str(tmp_path)), 5, 0)
        except UserError as error:
            assert "\n" not in str(error)


def gigabyte(path: Path) -> Path:
    """A line of a gigabyte, of which the disk holds next to nothing, and a short one."""
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.seek(10**9)
        file.write(b'"}\n{"text": "short"}\n')
    return path


def test_a_long_line_that_is_left_out_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 3 * MB + '"}\n{"text": "short"}\n{"text": "too"}')
    documents, counts = sampling.sample(Corpus(path=str(tmp_path), skip_bad_rows=True, max_row_mb=1), 5, 0)
    assert {document.text for document in documents} == {"short", "too"}
    assert (counts.n_rows, counts.n_bad_rows) == (3, 1)


@pytest.mark.parametrize("name", ["alone.parquet", "among.parquet", "alone.arrow", "among.arrow", "a.jsonl", "a.txt"])
def test_a_row_above_the_limit_is_refused_in_every_format_and_read_once_it_is_raised(
    tmp_path: Path, name: str
) -> None:
    texts = ["x" * 3 * MB] if name.startswith("alone") else [*["short"] * 50, "x" * 3 * MB]
    table = pa.table({"text": texts, "n": pa.array(["k"] * len(texts)).dictionary_encode()})
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name, use_dictionary=False, compression=None)
    elif name.endswith("arrow"):
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    elif name.endswith("jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        (tmp_path / name).write_text("\n\n".join(texts))
    line = complaint(lambda: read_all(tmp_path, max_row_mb=2))
    assert f"{tmp_path}/{name}" in line
    assert "holds a row of more than 2 MB" in line
    assert "raise corpus.max_row_mb" in line
    assert [row["text"] for row in read_all(tmp_path, max_row_mb=4)] == texts


@pytest.mark.parametrize("kind", [pa.string_view(), pa.list_(pa.string_view()), pa.struct([("a", pa.string_view())])])
def test_rows_that_share_a_large_buffer_are_as_large_as_what_they_hold_of_it(tmp_path: Path, kind: Any) -> None:
    texts = [f"{n} " + "x" * 1000 for n in range(5000)]
    of_kind = {"struct": lambda text: {"a": text}, "list": lambda text: [text]}.get(str(kind).split("<")[0], str)
    table = pa.table({"text": pa.array([of_kind(text) for text in texts], kind)})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert n_read(tmp_path, max_row_mb=1) == 5000
    big = pa.table({"text": pa.array([of_kind("x" * 2 * MB), of_kind("y")], kind)})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(big)
    assert "holds a row of more than 1 MB" in complaint(lambda: n_read(tmp_path, max_row_mb=1))


class FarFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file of a store, fetched in pieces; its readline takes no limit."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        with Path(self.path).open("rb") as file:
            file.seek(start)
            return file.read(end - start)


class Far(LocalFileSystem):  # type: ignore[misc]
    """A store whose files are read as those of S3 are."""

    protocol = ("far",)

    def open(self, path: str, *_: Any, **__: Any) -> FarFile:
        return FarFile(self, self._strip_protocol(path), cache_type="readahead")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("far://").lstrip("/")


def test_lines_of_a_store_far_away_are_bounded_too(tmp_path: Path) -> None:
    fsspec.register_implementation("far", Far, clobber=True)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 3 * MB + '"}\n{"text": "short"}\n')
    assert "line 1 holds a row of more than 1 MB" in complaint(lambda: read_all(f"far:/{tmp_path}", max_row_mb=1))
    assert read_all(f"far:/{tmp_path}", max_row_mb=1, skip_bad_rows=True) == [{"text": "short"}]


@pytest.mark.parametrize("deep", ["[" * 200_000, '{"a":' * 200_000, "[" * 900 + "]" * 900])
def test_json_of_any_depth_is_read_or_refused_in_one_line(tmp_path: Path, deep: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "t", "deep": ' + deep + "}\n")
    try:
        assert len(read_all(tmp_path)) == 1
    except UserError as error:
        assert "\n" not in str(error)


# -- YAML -------------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGED = "a0: &a0 {ha: 1}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
BAD_YAML = {
    "python": "seed: !!python/object/apply:os.system ['touch MARK']",
    "python name": "seed: !!python/name:os.system",
    "python module": "seed: !!python/module:os",
    "billion laughs": LAUGHS,
    "billion merges": MERGED,
    "alias to itself": "a: &a [*a]",
    "deep": "a: " + "[" * 100_000,
    "deep blocks": "- " * 100_000,
    "large": "a: " + "x" * 2**21,
    "no date": "a: 2024-13-45",
    "no timestamp": "a: !!timestamp x",
    "digits": "a: " + "9" * 5000,
    "digits to base 60": "a: " + "1:" * 400_000 + "1",
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_yaml_that_runs_or_swells_is_refused_in_one_line_in_recipe_prompt_and_taxonomy(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = BAD_YAML[kind]
    (tmp_path / "bad.yaml").write_text(text)
    assert "bad.yaml is not YAML" in complaint(lambda: config.load_recipe(Path("bad.yaml"), {}))
    assert "bad.yaml is not YAML" in complaint(lambda: load_taxonomy(Path("bad.yaml")))
    prompt = f"---\n{text}\n---\nbody"
    assert "the front matter is not YAML" in complaint(lambda: front_matter.read(prompt, Path("p.md")))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_aliases_within_reason_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("tune: {space: {examples: &few [0, 2], trials: *few}}\nseed: 3\n")
    assert config.load_recipe(path, {}).tune.space == {"examples": [0, 2], "trials": [0, 2]}


# -- what the code may do ---------------------------------------------------------------------------------------------

NEVER_IMPORTED = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
NEVER_CALLED = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.dump_all"),
}


def named(node: ast.expr) -> str:
    """a.b.c of an expression."""
    return f"{named(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def faults(tree: ast.AST) -> Iterator[str]:
    """What a file of the package does that none may."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in NEVER_IMPORTED)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in NEVER_IMPORTED:
            yield from (name.name for name in node.names if name.name != "UnpicklingError")
        elif isinstance(node, ast.Call) and named(node.func) in NEVER_CALLED:
            yield named(node.func)
        elif isinstance(node, ast.keyword):
            bad = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True}
            harmless = isinstance(node.value, ast.Constant) and node.value.value is not bad.get(node.arg or "")
            asked = node.arg == "trust_remote_code" and named(node.value).endswith(".trust_remote_code")
            if node.arg in bad and not (harmless or asked):
                yield str(node.arg)


def test_nothing_in_the_package_pickles_evaluates_or_trusts_code() -> None:
    files = sorted((ROOT / "pipeline").rglob("*.py"))
    assert len(files) > 50
    found = {path.name: [*faults(ast.parse(path.read_text(encoding="utf-8")))] for path in files}
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from joblib import load", "eval(x)", "yaml.load(x)", "torch.load(x)"),
        *(
            "f(trust_remote_code=True)",
            "f(trust_remote_code=x)",
            "f(weights_only=False)",
            "load(x, allow_pickle=True)",
        ),
    ],
)
def test_that_search_finds_what_it_looks_for(code: str) -> None:
    assert [*faults(ast.parse(code))] != []


# -- models -----------------------------------------------------------------------------------------------------------


class Touch:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


LOADERS: dict[str, Callable[[str], Any]] = {
    "encoder": lambda path: encoder.load(config.Encoder(model=path), "cpu"),
    "teacher": lambda path: local.load(config.Teacher(model=path), "cpu"),
    "finetune": lambda path: language_model.load(path, "finetune.model"),
    "reward": lambda path: rewards.load_classifier(path, "reward.by"),
}


CODE = """open({mark!r}, "w").close()
from transformers import PreTrainedTokenizerFast
from transformers import {architecture} as Base

class Config(Base.config_class):
    model_type = "{kind}"

class Model(Base):
    config_class = Config

class Tok(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, mark: Path, **settings: Any) -> Path:
    """A model whose own Python files leave a mark when they run."""
    own = {"AutoConfig": "evil.Config"} | {
        f"AutoModel{kind}": "evil.Model" for kind in ("", "ForCausalLM", "ForSequenceClassification")
    }
    said = {name: json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")}
    said["config.json"] |= settings
    about = {"architecture": said["config.json"]["architectures"][0], "kind": said["config.json"]["model_type"]}
    (folder / "evil.py").write_text(CODE.format(mark=str(mark), **about))
    said["config.json"]["auto_map"] = own
    said["tokenizer_config.json"]["auto_map"] = {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}
    for name, values in said.items():
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_pickled_weights_are_refused_and_never_run(
    tmp_path: Path, tiny_causal: Path, loader: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_causal, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "MARK"), protocol=2))
    line = complaint(lambda: LOADERS[loader](str(folder)))
    assert f"{folder / name} may be a pickle, which can run code; save the model as safetensors" in line
    assert "may be a pickle" in complaint(lambda: LOADERS[loader](str(folder / name)))
    assert not (tmp_path / "MARK").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "MARK").exists(), "it would have run"


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path, tiny_causal: Path) -> None:
    folder = shutil.copytree(tiny_causal, tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "MARK"), protocol=2))
    language_model.load(str(folder), "finetune.model")
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, tiny_causal: Path, loader: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever would answer, is not asked
    folder = with_code(shutil.copytree(tiny_causal, tmp_path / "model"), tmp_path / "MARK", model_type="evil")
    line = complaint(lambda: LOADERS[loader](str(folder)))
    assert "it comes with code of its own, which is not run unasked; " in line
    assert line.endswith(f"set {loader}.trust_remote_code)" if loader in TRUSTED else "take a model without)")
    assert "Do you wish" not in capfd.readouterr().out
    assert not (tmp_path / "MARK").exists()


TRUSTED: dict[str, Callable[[str], Any]] = {
    "encoder": lambda path: encoder.load(config.Encoder(model=path, trust_remote_code=True), "cpu")[0].auto_model,
    "teacher": lambda path: local.load(config.Teacher(model=path, trust_remote_code=True), "cpu")[1],
}


@pytest.fixture
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place for models' code that is gone afterwards."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("_own_modules")
@pytest.mark.parametrize("loader", TRUSTED)
def test_a_model_with_code_of_its_own_runs_it_where_that_is_asked_for(
    tmp_path: Path, tiny_causal: Path, tiny_encoder: Path, loader: str
) -> None:
    base = tiny_encoder if loader == "encoder" else tiny_causal
    folder = with_code(shutil.copytree(base, tmp_path / loader), tmp_path / "MARK", model_type="evil")
    assert type(TRUSTED[loader](str(folder))).__module__.startswith("transformers_modules.")
    assert (tmp_path / "MARK").exists()


@pytest.mark.usefixtures("_own_modules")
@pytest.mark.parametrize("kind", ["evil", "bert"])
def test_a_student_of_an_encoder_with_code_of_its_own_is_loaded_only_with_the_setting(
    tmp_path: Path, tiny_encoder: Path, kind: str
) -> None:
    folder = with_code(shutil.copytree(tiny_encoder, tmp_path / f"of-{kind}"), tmp_path / "MARK", model_type=kind)
    shutil.copy(tiny_encoder / "tokenizer_config.json", folder)  # of its own, transformers 5 does not read it back
    trusting = config.Encoder(model=str(folder), max_tokens=16, device="cpu", trust_remote_code=True)
    layer = students.Layer(np.ones((1, 32), np.float32), np.zeros(1, np.float32))
    made = students.Student(trusting, (students.Head("score", "score", (layer,), (0, 5)),))
    made.save(tmp_path / f"student-{kind}")
    said = json.loads((tmp_path / f"student-{kind}" / "student.json").read_text())
    said["encoder"]["trust_remote_code"] = True
    (tmp_path / f"student-{kind}" / "student.json").write_text(json.dumps(said))
    scores = made.score(["Some text.", "More."])
    (tmp_path / "MARK").unlink()
    careful = students.load(tmp_path / f"student-{kind}", config.Encoder(device="cpu"))
    if kind == "evil":
        assert "set encoder.trust_remote_code" in complaint(lambda: careful.score(["Some text."]))
    else:
        careful.score(["Some text."])
    assert not (tmp_path / "MARK").exists()
    trusted = students.load(tmp_path / f"student-{kind}", config.Encoder(device="cpu", trust_remote_code=True))
    assert trusted.score(["Some text.", "More."]) == pytest.approx(scores, abs=1e-4)
    assert (tmp_path / "MARK").exists()


def test_trust_is_for_one_model_and_never_comes_from_a_run_folder(tmp_path: Path) -> None:
    teacher = config.Teacher(model="a/b", trust_remote_code=True)
    same, other = panel.teachers(teacher, [{"temperature": 0.5}, {"model": "c/d"}])[1:]
    assert (same.trust_remote_code, other.trust_remote_code) == (True, False)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "recipe.yaml").write_text("{corpus: {path: x}, encoder: {trust_remote_code: true}}")
    found = report.settings(config.Recipe(run_folder=tmp_path))
    assert (found.corpus.path, found.encoder.trust_remote_code) == ("x", False)


def test_a_model_that_transformers_knows_is_loaded_without_the_code_beside_it(
    tmp_path: Path, tiny_causal: Path
) -> None:
    folder = with_code(shutil.copytree(tiny_causal, tmp_path / "model"), tmp_path / "MARK")
    assert type(LOADERS["teacher"](str(folder))[1]).__module__.startswith("transformers.")
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("kind", ["evil.Module", "os.system", "subprocess.Popen", "antigravity.fly"])
def test_modules_of_other_packages_are_refused(tmp_path: Path, tiny_encoder: Path, kind: str) -> None:
    folder = modules(shutil.copytree(tiny_encoder, tmp_path / "model"), kind)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'MARK')!r}, 'w').close()\nclass Module: pass\n")
    assert "code of its own" in complaint(lambda: LOADERS["encoder"](str(folder)))
    assert not (tmp_path / "MARK").exists()


def modules(folder: Path, kind: str, path: str = "1_More") -> Path:
    """An encoder with a second module."""
    listed = [("", "sentence_transformers.models.Transformer"), (path, kind)]
    said = [{"idx": n, "name": str(n), "path": where, "type": what} for n, (where, what) in enumerate(listed)]
    (folder / "modules.json").write_text(json.dumps(said))
    (folder / "1_More").mkdir()
    return folder


@pytest.mark.parametrize("path", ["../other", "/tmp", "1_More/../../other"])
def test_modules_outside_the_model_are_refused(tmp_path: Path, tiny_encoder: Path, path: str) -> None:
    folder = modules(shutil.copytree(tiny_encoder, tmp_path / "model"), "sentence_transformers.models.Pooling", path)
    assert f"modules.json names {path}, outside its folder" in complaint(lambda: LOADERS["encoder"](str(folder)))


def test_a_pickle_in_a_module_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    folder = modules(shutil.copytree(tiny_encoder, tmp_path / "model"), "sentence_transformers.models.Dense")
    (folder / "1_More" / "config.json").write_text(json.dumps({"in_features": 32, "out_features": 1}))
    (folder / "1_More" / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "MARK"), protocol=2))
    assert "1_More/pytorch_model.bin may be a pickle" in complaint(lambda: LOADERS["encoder"](str(folder)))
    assert not (tmp_path / "MARK").exists()


def test_a_chat_template_cannot_reach_beyond_its_messages(tmp_path: Path, tiny_causal: Path) -> None:
    tokenizer = models.load_tokenizer(str(tiny_causal), "teacher.model")
    for template in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append.__globals__ }}"):
        tokenizer_, message = type(tokenizer).from_pretrained(tiny_causal), [{"role": "user", "content": "x"}]
        tokenizer_.chat_template = template
        with pytest.raises(Exception, match=r"unsafe|has no|access") as refused:
            tokenizer_.apply_chat_template(message, tokenize=False)
        assert type(refused.value).__name__ in ("SecurityError", "UndefinedError")


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.arrow", "a/../../secret.arrow", "..", "a\0b.arrow"])
def test_a_saved_dataset_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "secret.arrow"), pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([["secret"]], ["text"]))
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    line = complaint(lambda: read_all(tmp_path / "saved"))
    assert "which is not inside it" in line or "holds no parquet" in line


def test_an_absolute_name_in_a_saved_dataset_is_looked_for_inside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    listed = {"_data_files": [{"filename": str(tmp_path / "secret.jsonl")}]}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(listed))
    assert "secret.jsonl is missing" in complaint(lambda: read_all(tmp_path / "saved"))


def test_names_that_a_store_lists_never_lead_out_of_the_folder_that_is_written(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("/security/good.jsonl", "/security/../../evil.jsonl", "/security/a/../../../evil.jsonl"):
        store.store[name] = fsspec.implementations.memory.MemoryFile(store, name, b'{"text": "x"}\n')
    found = shards.find_shards(Corpus(path="memory://security"))
    assert [shard.name for shard in found] == ["good.parquet"]


def test_a_link_where_a_result_goes_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "run" / "result.json", "theirs")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "run" / "result.json").read_text() == "theirs"


@pytest.mark.parametrize(
    "note",
    [
        *("no JSON", "[]", "{}", '{"corpus": {"path": 1}}', '{"corpus": {}, "shard": [], "made_from": ""}'),
        '{"corpus": {}, "shard": {"name": "x"}, "made_from": ""}',
        '{"corpus": {"unknown": 1}, "shard": {"name": "x", "source": "y", "format": "jsonl"}, "made_from": ""}',
    ],
)
def test_a_sidecar_with_a_broken_note_is_one_line(tmp_path: Path, note: str) -> None:
    table = pa.table({"id": ["a"], "score": [1.0]}).replace_schema_metadata({shards.BESIDE: note.encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    [shard] = shards.find_shards(Corpus(path=str(tmp_path)))
    assert "does not say where the documents of its scores are" in complaint(lambda: shards.with_documents(shard))


def test_a_sidecar_reads_only_the_very_documents_that_were_scored(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    said = {"corpus": {}, "shard": {"name": "../../x.parquet", "source": str(tmp_path / "secret.jsonl")}}
    said["shard"]["format"] = "jsonl"
    table = pa.table({"id": ["a"], "score": [1.0]})
    table = table.replace_schema_metadata({shards.BESIDE: json.dumps({**said, "made_from": "0" * 16}).encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    shard = Shard("a.parquet", str(tmp_path / "a.parquet"), "parquet")
    assert "have changed since they were scored" in complaint(lambda: shards.with_documents(shard))


# -- keys -------------------------------------------------------------------------------------------------------------

KEYS = {
    "MY_KEY": "sk-canary-7391-teacher",
    "OPENAI_API_KEY": "sk-canary-7392-openai",
    "WANDB_API_KEY": "canary7393wandb0000000000000000000000000000",
    "HF_TOKEN": "hf_canary7394huggingface",
    "AWS_SECRET_ACCESS_KEY": "canary7395/aws+secret",
}


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Rates at an endpoint, in this process, with a key of every kind in the environment."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)

    def rate(url: str, *flags: str, **settings: Any) -> Done:
        asking = recipe(tmp_path, url, n=4, api_key_env="MY_KEY", retries=0, **settings)
        return command(asking, capfd, "rate", *flags)

    return rate


def command(given: config.Recipe, capfd: pytest.CaptureFixture[str], *words: str) -> Done:
    """The command line, in this process."""
    path = Path(str(given.corpus.path)).parent / "recipe.yaml"
    path.write_text(given.model_dump_json())
    with pytest.raises(SystemExit) as stop:
        cli.main([words[0], str(path), *words[1:]])
    said = capfd.readouterr()
    return Done(int(stop.value.code or 0), said.out, said.err)


def leaks(folder: Path, done: Done) -> list[str]:
    """Where a key is found: on the terminal, or in a file."""
    said = [("stdout", done.stdout.encode()), ("stderr", done.stderr.encode())]
    files = [(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 3
    return [
        f"{key} in {name}" for name, held in (*said, *files) for key, value in KEYS.items() if value.encode() in held
    ]


def told_back(status: int) -> Callable[[Asked], Reply]:
    """An endpoint that repeats the key it was given."""
    return lambda one: error(
        status, f"no access with {one.headers['authorization']}, {one.headers['authorization'][7:]}"
    )


@pytest.mark.parametrize("status", [401, 400, 500])
def test_an_endpoint_that_repeats_the_key_in_its_error_does_not_make_us_tell_it(
    tmp_path: Path, ask: Callable[..., Done], status: int
) -> None:
    with serve(told_back(status)) as server:
        done = ask(server.url)
    assert KEYS["MY_KEY"] in server.asked[0].headers["authorization"]
    assert "no access with Bearer ***, ***" in done.stderr
    assert leaks(tmp_path, done) == []
    if status == 401:
        assert "refuses" in one_line(done)


def test_an_answer_that_repeats_no_key_leaves_none_in_a_run_that_is_tracked(tmp_path: Path) -> None:
    """The real command, in a process of its own, with no folder but this one to write to."""
    pytest.importorskip("wandb")
    home = dict.fromkeys(("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"), str(tmp_path)) | {"WANDB_MODE": "offline"}
    with serve(score_of) as server:
        asking = recipe(tmp_path, server.url, n=4, api_key_env="MY_KEY")
        done = gristmill(asking, "rate", "--tracking.to", "wandb", **home, **KEYS)
    assert done.code == 0, done.stderr
    deadline = time.monotonic() + 30
    while not [*tmp_path.rglob("run-*.wandb")] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [*tmp_path.rglob("run-*.wandb")]
    assert leaks(tmp_path, done) == []


@pytest.mark.parametrize("kind", ["nobody there", "hangs up"])
def test_a_connection_that_fails_tells_no_key(tmp_path: Path, ask: Callable[..., Done], kind: str) -> None:
    with serve(lambda _: drop) as server:
        done = ask(server.url if kind == "hangs up" else "http://127.0.0.1:9/v1")
    assert "cannot be reached" in one_line(done)
    assert leaks(tmp_path, done) == []


def test_batch_files_hold_no_key(tmp_path: Path, ask: Callable[..., Done]) -> None:
    done = ask("unused", "--teacher.batch-folder", str(tmp_path / "batch"))
    assert done.code == 75, done.stderr
    assert [*(tmp_path / "batch").glob("requests-*.jsonl")]
    assert leaks(tmp_path, done) == []


@pytest.mark.parametrize("flags", [(), ("--teacher.base-url", "http://me:canary7396@127.0.0.1:9/v1")])
def test_a_password_in_the_address_of_an_endpoint_is_refused_and_neither_repeated_nor_recorded(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    values = recipe(tmp_path, "http://127.0.0.1:9/v1").model_dump(mode="json")
    values["teacher"]["base_url"] = None if flags else "http://canary7396@127.0.0.1:9/v1"
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "pipeline", "run", str(tmp_path / "recipe.yaml"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gristmill: teacher.base_url: a URL must not hold a password")
    assert "canary7396" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_key_in_a_recipe_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("teacher: {api_key: sk-canary-7397}\n")
    line = complaint(lambda: config.load_recipe(tmp_path / "a.yaml", {}))
    assert "teacher.api_key is not a setting; did you mean teacher.api_key_env?" in line
    assert "canary" not in line


# -- spreadsheets -----------------------------------------------------------------------------------------------------

FORMULAS = (
    *("=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1"),
    *("'=1", "''+1", '=1,"2', "plain", "'t"),
)


def test_no_cell_of_an_export_is_a_formula_and_all_come_back_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"{begin}id-{n}", "text": f"{begin} doc-{n} is it."} for n, begin in enumerate(FORMULAS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    with serve(score_of) as server:
        done = command(recipe(tmp_path, server.url, n=len(rows)), capfd, "rate")
    assert done.code == 0, done.stderr
    reader.run(tmp_path / "run", Selection(export=tmp_path / "people.csv"))
    with (tmp_path / "people.csv").open(encoding="utf-8-sig", newline="") as file:
        header, *cells = csv.reader(file)
    assert len(cells) == len(rows)
    assert [cell for row in cells for cell in row if cell[:1] and cell[0] in "=+-@\t\r\n＝＋－＠"] == []
    with (tmp_path / "people.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *([*row[:2], "3"] for row in cells)])
    found, _ = gold.read(tmp_path / "people.csv")
    assert {(each.id, each.text) for each in found} == {(row["id"], row["text"]) for row in rows}


# -- the page ---------------------------------------------------------------------------------------------------------

RUN = "document.title='it ran'"
LABEL = f"' \" onmouseover={RUN} &lt;script x='"
"""A label, which has no >."""
NAME = f'"><img src=x onerror={RUN}>'
"""A name that a file can have."""
HOSTILE = (
    f'</pre></details></title></style></svg>{NAME}<script>{RUN}</script><svg onload={RUN}><a href="javascript:{RUN}">'
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe> ' onmouseover={RUN} {{{{ 7 * 7 }}}} ]]> --> &lt;b&gt;"
)


class Markup(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_causal: Path, tiny_encoder: Path, texts: list[str]) -> Path:
    """The report of a run in which every name, document, answer and column value is hostile."""
    import test_training_page as trained

    folder = tmp_path_factory.mktemp("page") / NAME
    folder.mkdir()
    prompts = {
        "rate": {
            "scale": [0, 5],
            "read": "choices",
            "answer_start": "This text is",
            "choices": [{"value": 5, "answers": [" educational"]}],
        },
        "label": {"read": "label", "labels": {"levels": ["topic"], "labels": [LABEL, "Other"]}},
    }
    prompts["rate"]["choices"].append({"value": 0, "answers": [" spam"]})
    for name, front in prompts.items():
        body = "Which?\n{{ labels }}\n{{ text }}" if name == "label" else "Which?\n\n{{ text }}"
        (folder / f"{name} {NAME}.md").write_text(f"---\n{json.dumps(front)}\n---\n{body}\n")
    rows = [
        {
            "id": f"{n}{HOSTILE}",
            "text": f"{'' if n % 5 else HOSTILE}{text} {NAME}",
            "site": f"{HOSTILE}{n % 12}",
            "good": n % 2 == 0,
        }
        for n, text in enumerate(texts[:30])
    ]
    (folder / f"{NAME}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"prompt": str(folder / f"rate {NAME}.md"), "sample": 30, "group_column": "site", "gold_column": "good"}
    settings = {
        "run_folder": str(folder / "run"),
        "corpus": {"path": str(folder / f"{NAME}.jsonl"), "id_column": "id"},
        "teacher": {"model": str(tiny_causal), "document_tokens": 64, "dtype": "float32", "device": "cpu"},
        "encoder": {"model": str(tiny_encoder), "max_tokens": 16, "dtype": "float32", "device": "cpu"},
        "rate": asked,
        "label": {"prompt": str(folder / f"label {NAME}.md"), "sample": 10, "max_unscored_rate": 1.0},
        "cuts": {"by": ["site"]},
        "filter": {"keep_share": 0.3},
        "report": {"examples": 10},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "HOSTILE", HOSTILE)
        trained.finetuned(folder / "run", model=HOSTILE)
        trained.aligned(folder / "run", warning=HOSTILE)
    for command in ("label", "run"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, str(folder / "recipe.yaml")])
        assert not stop.value.code, command
    return folder / "run" / "report" / "report.html"


def test_no_element_or_attribute_of_the_page_comes_from_the_corpus(page: Path) -> None:
    found = Markup(page.read_text(encoding="utf-8"))
    assert found.text.count("onerror=") > 50, "it is there to be read"
    assert {"section", "svg", "pre"} <= found.tags
    assert not found.tags & {
        "script",
        "img",
        "image",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "link",
        "foreignobject",
    }
    assert [name for name, _ in found.attributes if name.startswith("on") or name in ("srcdoc", "action")] == []
    links = [value for name, value in found.attributes if name in ("href", "src", "xlink:href")]
    assert [link for link in links if not link.startswith(("#", "../"))] == []
    for svg in re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL):
        drawn = Markup(svg)
        assert drawn.tags <= {"svg", "g", "path", "text", "tspan", "use", "defs", "clippath", "rect", "title"}


def title(page: Path, profile: Path) -> str:
    """The title of a page after a browser has loaded it, and run what there is to run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return found[1]


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""


@pytest.mark.skipif(not BROWSER, reason="chromium is not installed")
def test_a_script_in_the_corpus_never_runs_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Nor would it if the page's own ban on scripts were gone."""
    written = page.read_text(encoding="utf-8")
    unprotected, control = tmp_path / "unprotected.html", tmp_path / "control.html"
    unprotected.write_text(re.sub(r"<meta http-equiv[^>]*>", "", written), encoding="utf-8")
    control.write_text(f"<title>quiet</title><pre>{HOSTILE}</pre>", encoding="utf-8")
    assert "Content-Security-Policy" in written
    assert "Content-Security-Policy" not in unprotected.read_text(encoding="utf-8")
    assert title(control, tmp_path / "profile") == "it ran"
    for each in (page, unprotected):
        assert title(each, tmp_path / "profile") == "run · gristmill"
