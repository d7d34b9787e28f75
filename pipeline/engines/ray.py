"""A local teacher in each of several actors on a Ray cluster; this process records their answers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

from pipeline import engines
from pipeline.cluster import Actors, actors
from pipeline.config import Ray, Teacher
from pipeline.errors import UserError
from pipeline.prompts import Prompt
from pipeline.teacher import Answer, Ask, Question, Record


class Piece(NamedTuple):
    """Questions for one actor: to be asked, or only to be put into batches."""

    way: Literal["ask", "plan"]
    prompt: Prompt
    teacher: Teacher
    questions: list[Question]


def check(settings: Ray, teacher: Teacher) -> None:
    """Refuse actors with fewer GPUs than a model is spread over."""
    n_gpus = teacher.tensor_parallel_size * teacher.data_parallel_size if teacher.engine == "vllm" else 1
    if n_gpus > max(1, settings.gpus):
        raise UserError(
            f"ray.gpus: each actor has {settings.gpus:g} GPUs, and teacher.tensor_parallel_size x data_parallel_size"
            f" is {n_gpus}; give --ray.gpus {n_gpus}"
        )


@contextmanager
def started(settings: Ray, teacher: Teacher, most: int = 10**6) -> Iterator[Ask]:
    """Actors, each with the model loaded."""
    with actors(settings, partial(begin, teacher), most) as found:
        found.wait()

        def ask(
            prompt: Prompt, teacher: Teacher, questions: list[Question], answered: set[str], record: Record
        ) -> None:
            batches = planned(found, prompt, teacher, questions)
            still = ([each for each in batch if each.key not in answered] for batch in batches)
            ask_all(found, [Piece("ask", prompt, teacher, batch) for batch in still if batch], record)

        yield ask


def begin(teacher: Teacher) -> Callable[[Piece], Any]:
    """The work of an actor: answers to questions, or the batches that they make."""
    running = ExitStack()
    asking: Any = running.enter_context(engines.engine(teacher))

    def work(piece: Piece, _: ExitStack = running) -> Any:
        if piece.way == "plan":
            return asking.planned(piece.prompt, piece.teacher, piece.questions)
        answers: list[tuple[str, Answer]] = []

        def take(some: list[tuple[str, Answer]]) -> bool:
            answers.extend(some)
            return True

        asking(piece.prompt, piece.teacher, piece.questions, set(), take)
        return answers

    return work


def ask_all(found: Actors[Piece, Any], pieces: list[Piece], record: Record) -> None:
    """Record answers as actors give them; once `record` says so, nothing more is handed out."""
    goes_on = True
    for _, answers in found.over(piece for piece in pieces if goes_on):
        goes_on = record(answers) and goes_on


FEWEST, MOST = 16, 512
"""Questions that vLLM, which makes its own batches, is handed at a time: enough to keep it busy, and not more than one
would ask again."""


def planned(
    found: Actors[Piece, Any], prompt: Prompt, teacher: Teacher, questions: list[Question]
) -> list[list[Question]]:
    """Questions by batch, in the order in which they are asked. Those of transformers are the batches of a run without
    a cluster, so that answers have the same bits."""
    from pipeline.engines.transformers import CHUNK

    ordered = sorted(questions)
    if teacher.engine == "vllm":
        return cut(ordered, min(max(len(ordered) // (4 * found.n), FEWEST), MOST))
    pieces = [Piece("plan", prompt, teacher, some) for some in cut(ordered, CHUNK)]
    made = {piece.questions[0]: batches for piece, batches in found.over(pieces)}
    return list(chain.from_iterable(made[piece.questions[0]] for piece in pieces))


def cut(questions: list[Question], n: int) -> list[list[Question]]:
    """Questions in parts of at most n."""
    return [questions[begin : begin + n] for begin in range(0, len(questions), n)]
