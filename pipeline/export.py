"""After stage 2: the student as ONNX and OpenVINO, each held against our own scores, and what goes to the Hub."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipeline import card, dataset_card, hub, metrics, targets
from pipeline import student as students
from pipeline.config import Encoder, Recipe, load_recipe
from pipeline.errors import UserError, needs
from pipeline.layers import Outputs
from pipeline.storage import atomic, write_text
from pipeline.student import Student
from pipeline.tracking import Result, Stage, corpus_of, dump, stage, upstream

log = logging.getLogger("gristmill")

TOLERANCE = 1e-3
"""Points of the scale that a format may differ from our scores by, beside 1e-5 of the score."""

N_DOCUMENTS = 200
"""Documents on which formats are compared."""

LONGEST = 50_000
"""Characters of such a document."""

BATCH = 8
"""Documents in a batch of the comparison, of mixed lengths, so that padding would show."""

ONNX, OPENVINO = "model.onnx", "openvino/model.xml"

LARGEST_ONNX = 2**31 - 2**20
"""Bytes of weights that fit into one ONNX file."""

Inputs = dict[str, Any]
"""int64 arrays (n_documents, n_tokens) by the name of the model's input."""
Scores = Callable[[Inputs], Outputs]


class Agreement(BaseModel):
    """How near a format comes to our scores in float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    megabytes: float
    max_difference: float
    """Largest difference, in points of the scale."""
    spearman: float | None
    """Of the first output; None where our scores are all the same."""


class ExportResult(Result):
    """What was exported, and how near it comes to our own scores."""

    student: str
    outputs: list[str]
    n_documents: int
    """Documents that both scored, cut to what the student reads at once."""
    student_megabytes: float
    formats: dict[str, Agreement]
    pushed_to: str | None
    """URL of the Hub repository."""
    kept_pushed_to: str | None = None
    """URL of the Hub dataset."""


def run(recipe: Recipe, redo: bool = False) -> ExportResult:
    """Write the formats, hold them against our scores, and upload what was asked for."""
    for name in hub.SETTINGS.values():
        hub.check_name(getattr(recipe.export, name), name)
    for name in recipe.export.formats:
        FORMATS[name].check()
    kept = kept_folder(recipe) if recipe.export.push_kept_to_hub else None
    folder = upstream(recipe.export.student, recipe, "train/student", "export")
    how = Encoder(dtype="float32", device="cpu", trust_remote_code=recipe.encoder.trust_remote_code)
    student = students.load(folder, how)
    with stage("export", recipe, inputs(recipe, student)) as work:
        files = [work.folder / FORMATS[name].file for name in recipe.export.formats]
        done = work.finished(ExportResult, redo, all(file.exists() for file in files))
        result = done or work.finish(written(work, folder, student))
        urls = dict(pushed(work, folder, kept))
        return work.finish(result.model_copy(update=urls)) if urls else result


def kept_folder(recipe: Recipe) -> Path:
    """The kept corpus, which must be on this machine to be uploaded."""
    kept = corpus_of("filter", recipe, "export")
    if not isinstance(kept, Path):
        raise UserError(f"export.push_kept_to_hub: {kept} is not on this machine; copy it, and filter.output names it")
    return kept


def pushed(work: Stage, folder: Path, kept: Path | None) -> Iterator[tuple[str, str]]:
    """What was uploaded, and where to."""
    settings = work.recipe.export
    if settings.push_to_hub is not None:
        folders = {"": folder, "export": work.folder}
        yield "pushed_to", hub.push(settings.push_to_hub, folders, settings.private)
    if settings.push_kept_to_hub is not None and kept is not None:
        about = work.folder / hub.KEPT_CARD
        dataset_card.write(about, kept, work.recipe, settings.push_kept_to_hub)
        folders = {dataset_card.DATA: kept, "": about}
        yield "kept_pushed_to", hub.push(settings.push_kept_to_hub, folders, settings.private, "dataset")


def inputs(recipe: Recipe, student: Student) -> dict[str, Any]:
    """Everything that decides the exports."""
    return {"student": student.fingerprint, "export": recipe.export.identity()}


def written(work: Stage, folder: Path, student: Student) -> ExportResult:
    """Every format with the tokenizer beside, and how near it comes to our scores."""
    names = work.recipe.export.formats
    documents = texts(work.recipe)
    expected = first_windows(student, documents)
    tokenizer = student.encoder.tokenizer
    tokenizer.model_max_length = student.encoder.max_tokens
    tokenizer.save_pretrained(work.folder)
    write_text(work.folder / "outputs.json", dump(outputs(student)))
    if names:
        write_onnx(work.folder / ONNX, folder)
    found: dict[str, Agreement] = {}
    for name in names:
        file = work.folder / FORMATS[name].file
        scores = FORMATS[name].open(work.folder)
        got = np.concatenate(list(in_batches(scores, tokenizer, documents)))
        found[name] = agreement(name, got, expected, file)
    if "onnx" not in names:
        (work.folder / ONNX).unlink(missing_ok=True)
    return ExportResult(
        seconds=work.seconds,
        student=str(folder),
        outputs=[head.name for head in student.shown],
        n_documents=len(documents),
        student_megabytes=megabytes(folder),
        formats=found,
        pushed_to=None,
    )


def texts(recipe: Recipe) -> list[str]:
    """Real texts to compare on: those that were rated or labelled, else those of the model card."""
    trained = recipe.run_folder / "train" / "recipe.yaml"
    ratings = recipe.train.ratings or (load_recipe(trained, {}).train.ratings if trained.exists() else None)
    given = [ratings] if ratings else []
    made = [recipe.run_folder / inside for inside in (targets.RATINGS, targets.LABELS)]
    path = next((path for path in [*given, *made] if path.exists()), None)
    if path is None:
        return list(card.EXAMPLES)
    read = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    found = [text[:LONGEST] for text in read if text and text.strip()]
    return found[:N_DOCUMENTS] or list(card.EXAMPLES)


def first_windows(student: Student, documents: Sequence[str]) -> Outputs:
    """Our own outputs (n_documents, n_outputs), of the first window of each document, which is what formats see."""
    settings = student.encoder_settings.model_copy(update={"windows": "first"})
    alone = Student(settings, student.heads)
    alone.folder = student.folder
    vectors = alone.encoder.embed(documents).vectors
    return np.concatenate([head.outputs(vectors) for head in student.shown], axis=1)


def in_batches(scores: Scores, tokenizer: Any, documents: Sequence[str]) -> Iterator[Outputs]:
    """Outputs of documents in the order given, whatever their lengths."""
    for begin in range(0, len(documents), BATCH):
        batch = list(documents[begin : begin + BATCH])
        tokens = tokenizer(batch, padding=True, truncation=True, return_tensors="np")
        yield scores({name: np.asarray(values, np.int64) for name, values in tokens.items()})


def agreement(name: str, found: Outputs, expected: Outputs, file: Path) -> Agreement:
    """How near outputs come to ours; an error if they don't."""
    difference = float(np.abs(found - expected).max())
    if not np.allclose(found, expected, atol=TOLERANCE, rtol=1e-5):
        raise UserError(
            f"export.formats: {name} differs from our scores by up to {difference:.3g} on {len(expected)} documents;"
            f" {file} is not to be used; leave {name} out of export.formats, and report the encoder"
        )
    first = (np.asarray(side[:, 0], np.float64) for side in (found, expected))
    size = megabytes(file.parent if file.suffix == ".xml" else file)
    return Agreement(file=str(file), megabytes=size, max_difference=difference, spearman=metrics.spearman(*first))


def megabytes(path: Path) -> float:
    """Size of a file or folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def outputs(student: Student) -> dict[str, Any]:
    """What the columns of `scores` are, and how to read them."""
    return {
        "max_tokens": student.encoder.max_tokens,
        "outputs": [students.described(head) for head in student.shown],
    }


# -- formats ----------------------------------------------------------------------------------------------------------


def write_onnx(path: Path, folder: Path) -> None:
    """The student from token ids to `scores` (n_documents, n_outputs), for batches of any size and length."""
    torch = needs("torch", "torch")
    sentence_transformers = needs("sentence_transformers", "torch")
    model = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": torch.float32}
    ).eval()
    tokens = model.tokenizer(
        list(card.EXAMPLES[:2]), padding=True, truncation=True, max_length=model.max_seq_length, return_tensors="pt"
    )
    size = sum(weights.numel() * weights.element_size() for weights in model.state_dict().values())
    with quietly(), torch.inference_mode():
        program = torch.onnx.export(
            traceable(model, list(tokens)).eval(),
            args=tuple(tokens.values()),
            input_names=list(tokens),
            output_names=["scores"],
            dynamic_shapes={"tokens": tuple({0: "batch", 1: "tokens"} for _ in tokens)},
            dynamo=True,
            verbose=False,
        )
    if size > LARGEST_ONNX:
        program.save(str(path), external_data=True)
        return
    with atomic(path) as temporary:
        program.save(str(temporary), external_data=False)


def traceable(model: Any, names: list[str]) -> Any:
    """A SentenceTransformer as a module that takes tensors by position."""
    torch = needs("torch", "torch")

    class Traceable(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tokens: Any) -> Any:
            return self.model(dict(zip(names, tokens, strict=True)))["sentence_embedding"]

    return Traceable()


@contextmanager
def quietly() -> Iterator[None]:
    """Without what torch's exporter says of itself; what it makes is compared with our scores."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)


def open_onnx(folder: Path) -> Scores:
    """The ONNX file in onnxruntime."""
    runtime = needs("onnxruntime", "export")
    session = runtime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda tokens: session.run(["scores"], {name: tokens[name] for name in names})[0]


def open_openvino(folder: Path) -> Scores:
    """The ONNX file as OpenVINO's own format, in float32 as it is and computed so."""
    openvino = needs("openvino", "export")
    core = openvino.Core()
    openvino.save_model(core.read_model(str(folder / ONNX)), str(folder / OPENVINO), compress_to_fp16=False)
    model = core.compile_model(str(folder / OPENVINO), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [each.any_name for each in model.inputs]
    return lambda tokens: model({name: tokens[name] for name in names})["scores"]


def check_onnx() -> None:
    """What exporting to ONNX takes."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        needs(module, "export")


def check_openvino() -> None:
    """What exporting to OpenVINO takes."""
    check_onnx()
    needs("openvino", "export")


class Format(NamedTuple):
    """What a format needs, what it is called and how it is opened."""

    check: Callable[[], None]
    file: str
    open: Callable[[Path], Scores]


FORMATS = {
    "onnx": Format(check_onnx, ONNX, open_onnx),
    "openvino": Format(check_openvino, OPENVINO, open_openvino),
}
