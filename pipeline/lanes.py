"""What computes for an encoder: each GPU, or each thread of the CPU. What is launched is fetched later, so that a GPU
has its next work before it is done with the last."""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError, needs
from pipeline.tokens import Ids
from pipeline.workers import Effort

log = logging.getLogger("gristmill")


class Way(Protocol):
    """How embeddings are computed."""

    device: Any
    unit_texts: int
    """Texts that one worker should take at a time."""

    def cut(self, lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[list[int]]:
        """Indices of windows of such lengths, in batches."""
        ...

    def __call__(self, rows: Sequence[Ids], batch_tokens: int, /) -> tuple[Any, int]:
        """Embeddings (n_windows, dim) float32 of one batch, which the device may still be computing, and its slots."""
        ...


class Lane:
    """A GPU or a thread of the CPU, which computes at most so many tokens at once; for one thread at a time."""

    def __init__(self, way: Way, batch_tokens: int, max_tokens: int) -> None:
        self.torch = needs("torch", "torch")
        self.way, self.batch_tokens, self.max_tokens = way, batch_tokens, max_tokens

    def launch(self, ids: Sequence[Ids], effort: Effort) -> Iterator[tuple[list[int], "Launched"]]:
        """Indices of windows and their embeddings to be; where memory is short, in smaller batches from then on."""
        lengths = np.array([len(row) for row in ids], np.int64)
        left = deque(self.way.cut(lengths, self.batch_tokens))
        while left:
            launched = self.tried([ids[i] for i in left[0]], effort)
            if launched is not None:
                yield left.popleft(), launched
                continue
            self.halve()
            effort.count(halvings=1)
            again = np.concatenate(left)
            left = deque(again[batch].tolist() for batch in self.way.cut(lengths[again], self.batch_tokens))

    def tried(self, rows: Sequence[Ids], effort: Effort) -> "Launched | None":
        """The embeddings to be of one batch; None if it does not fit into memory, which is free again by then."""
        try:
            with self.torch.inference_mode(), on(self.way.device):
                embeddings, n_slots = self.way(rows, self.batch_tokens)
                launched = Launched(embeddings)
        except self.torch.cuda.OutOfMemoryError:
            return None
        effort.count(tokens=sum(map(len, rows)), slots=n_slots)
        return launched

    def halve(self) -> None:
        """Fewer tokens at once from now on, but never fewer than one window may have."""
        if self.batch_tokens <= self.max_tokens:
            raise UserError(
                f"encoder.max_tokens: a window of {self.max_tokens} tokens does not fit into the memory of"
                f" {self.way.device}; set it lower, or free some of it"
            )
        before, self.batch_tokens = self.batch_tokens, max(self.batch_tokens // 2, self.max_tokens)
        log.warning(
            "encoder: %d tokens at once do not fit into the memory of %s; going on with %d",
            *(before, self.way.device, self.batch_tokens),
        )


class Launched:
    """Embeddings that are on their way from the device."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows.to("cpu", non_blocking=rows.is_cuda)
        self.done = event_after(rows) if rows.is_cuda else None

    def fetched(self) -> NDArray[np.float32]:
        """Embeddings (n_windows, dim), as soon as they are there."""
        if self.done is not None:
            self.done.synchronize()
        found: NDArray[np.float32] = self.rows.numpy()
        return found


def gathered(launched: Iterable[tuple[Sequence[int], Launched]]) -> NDArray[np.float32]:
    """The embeddings of all windows that were launched, by their indices."""
    batches, coming = zip(*launched, strict=True)
    rows: NDArray[np.float32] = np.concatenate([each.fetched() for each in coming])
    return rows[np.argsort(np.concatenate(batches))]


# -- CUDA -------------------------------------------------------------------------------------------------------------


def on(device: Any) -> AbstractContextManager[Any]:
    """What is launched goes to this GPU. All threads share its default stream, so that packs compute one after the
    other in the memory of one."""
    return needs("torch", "torch").cuda.device(device) if device.type == "cuda" else nullcontext()


def sent(tensor: Any, device: Any) -> Any:
    """A tensor on its way to the device; from pinned memory, nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def event_after(rows: Any) -> Any:
    """Happens when all is done that was launched until now; who waits for it sleeps and leaves its core to others."""
    cuda = needs("torch", "torch").cuda
    event = cuda.Event(blocking=True)
    event.record(cuda.current_stream(rows.device))
    return event


def compiled(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """The function compiled for the shapes of the example; itself where that fails, such as without Triton."""
    try:
        fast: Callable[..., Any] = needs("torch", "torch").compile(function, dynamic=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)  # nothing here is float32
            fast(*example)
    except RuntimeError as error:
        log.info("encoder: its layers run uncompiled: %s", " ".join(str(error).split())[:200])
        return function
    return fast
