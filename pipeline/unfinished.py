"""A stage that trains goes on where it was interrupted, but only with the settings it began with."""

import shutil

from pipeline.tracking import Stage, read_json
from pipeline.training import CHECKPOINTS, CURVE, MODEL


def begin(work: Stage, redo: bool, *made: str) -> None:
    """Refuse changed inputs where a training has left something, or with `redo` remove that, and the files `made`
    beside it. Comes before Stage.finished, which writes the inputs down."""
    left = [work.folder / name for name in (CHECKPOINTS, MODEL, CURVE, *made) if (work.folder / name).exists()]
    if not left or read_json(work.folder / "inputs.json") == work.inputs:
        return
    if not redo:
        work.refuse_changes()
    (work.folder / "result.json").unlink(missing_ok=True)
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_trained(work: Stage) -> bool:
    """Whether the whole model is there already."""
    return (work.folder / MODEL / "config.json").exists() and not (work.folder / CHECKPOINTS).exists()
