"""A gristmill student as a stage of a NeMo Curator pipeline: each batch of documents gets `score` and `int_score`, and
those below a score are dropped.

python examples/nemo_curator_stage.py CORPUS STUDENT OUTPUT [LOWEST_SCORE]

reads a folder of parquet and writes parquet. Run with nemo-curator 1.4.0 (ray 2.60.0, torch 2.13.0) on a CPU.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.backends.ray_data import RayDataExecutor
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.stages.text.io.reader import ParquetReader
from nemo_curator.stages.text.io.writer import ParquetWriter
from nemo_curator.tasks import DocumentBatch


@dataclass
class StudentStage(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Scores documents, and keeps those with at least `lowest_score`; the student is loaded once in each worker. With
    a GPU, give it `Resources(cpus=1, gpus=1)`."""

    student: str
    lowest_score: float
    text_field: str = "text"
    name: str = "gristmill_student"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1))

    def inputs(self) -> tuple[list[str], list[str]]:
        """What a batch must have."""
        return ["data"], [self.text_field]

    def outputs(self) -> tuple[list[str], list[str]]:
        """What it has afterwards."""
        return ["data"], [self.text_field, "score", "int_score"]

    def setup(self, _: WorkerMetadata | None = None) -> None:
        """Load the student, once in a worker."""
        from pipeline.student import load

        self.loaded: Any = load(self.student)

    def process(self, batch: DocumentBatch) -> DocumentBatch:
        """Score a batch; a document without text has no score, and is dropped."""
        table = batch.to_pyarrow()
        texts = [text or "" for text in table[self.text_field].to_pylist()]
        is_empty = pa.array([not text.strip() for text in texts])
        found = self.loaded.predict(texts) if texts else {"score": [], "int_score": []}
        for name, kind in (("score", pa.float32()), ("int_score", pa.int8())):
            values = pa.array(found[name], kind)
            table = table.append_column(name, pc.if_else(is_empty, pa.scalar(None, kind), values))
        kept = table.filter(pc.greater_equal(table["score"], pa.scalar(self.lowest_score, pa.float32())))
        return DocumentBatch(
            dataset_name=batch.dataset_name, data=kept, _metadata=batch._metadata, _stage_perf=batch._stage_perf
        )


def main(corpus: str, student: str, output: str, lowest_score: str = "2.5") -> None:
    """Read, score, drop, write."""
    stages = [ParquetReader(corpus), StudentStage(student, float(lowest_score)), ParquetWriter(output)]
    Pipeline(name="gristmill", stages=stages).run(RayDataExecutor())


if __name__ == "__main__":
    main(*sys.argv[1:])
