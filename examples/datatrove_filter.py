"""A gristmill student as a filter in a datatrove pipeline: documents below a score are dropped (and may be written
aside), the others go on with `score` and `int_score` in their metadata.

python examples/datatrove_filter.py CORPUS STUDENT OUTPUT [LOWEST_SCORE]

reads a folder of parquet and writes OUTPUT/kept and OUTPUT/dropped. Run with datatrove 0.10.1, torch 2.13.0.
"""

import sys
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from datatrove.pipeline.writers.disk_base import DiskWriter


class StudentFilter(BaseFilter):
    """Keeps documents that a student gives at least `lowest_score`; the student is loaded once in each process."""

    name = "gristmill student"

    def __init__(
        self,
        student: str,
        lowest_score: float,
        batch_size: int = 256,
        exclusion_writer: DiskWriter | None = None,
    ) -> None:
        super().__init__(exclusion_writer, batch_size)
        self.student, self.lowest_score = student, lowest_score
        self.loaded: Any = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether one document is kept, or why not."""
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        """Score a batch at once; a document without text has no score and is dropped with that reason."""
        if self.loaded is None:
            from pipeline.student import load

            self.loaded = load(self.student)
        found = self.loaded.predict([doc.text for doc in batch])
        fates: list[bool | tuple[bool, str]] = []
        for doc, score, whole in zip(batch, found["score"], found["int_score"], strict=True):
            if not doc.text.strip():
                fates.append((False, "no_text"))
                continue
            doc.metadata |= {"score": float(score), "int_score": int(whole)}
            fates.append(True if score >= self.lowest_score else (False, "score_below_cut"))
        return fates


def main(corpus: str, student: str, output: str, lowest_score: str = "2.5") -> None:
    """One task that reads, filters and writes; give LocalPipelineExecutor more tasks and workers for more files."""
    aside = ParquetWriter(f"{output}/dropped", expand_metadata=True)
    steps = [
        ParquetReader(corpus),
        StudentFilter(student, float(lowest_score), exclusion_writer=aside),
        ParquetWriter(f"{output}/kept", expand_metadata=True),
    ]
    LocalPipelineExecutor(steps, tasks=1, logging_dir=f"{output}/logs").run()


if __name__ == "__main__":
    main(*sys.argv[1:])
