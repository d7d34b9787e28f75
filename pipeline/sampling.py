"""How an answer is drawn: from which tokens, by which random numbers, and where it stops."""

import bisect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.config import Teacher
from pipeline.errors import UserError, needs

OURS = ("tfs", "top_a")
"""Settings that only the transformers engine knows."""


def is_sampled(teacher: Teacher) -> bool:
    """Whether answers are drawn at random; teacher.args has the last word."""
    return bool(teacher.args.get("do_sample", teacher.args.get("temperature", teacher.temperature) != 0))


def check(teacher: Teacher) -> None:
    """Refuse what the engine cannot do."""
    for name in OURS if teacher.engine != "transformers" else ():
        if (value := getattr(teacher, name)) is not None:
            raise UserError(
                f"teacher.{name}: {teacher.engine} cannot sample so (it is {value:g}); take it out, or set"
                " --teacher.engine transformers"
            )
    if "" in teacher.stop:
        raise UserError("teacher.stop: an empty text would end every answer before it begins; take it out")


# -- drawing, in transformers -----------------------------------------------------------------------------------------

IDLE = {"temperature": 1, "top_k": 0, "top_p": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "tfs": 1}
"""Values that change nothing."""


def options(teacher: Teacher, device: Any) -> dict[str, Any]:
    """Arguments of `generate` for one answer a row; teacher.args has the last word. Sampling and stop strings are not
    left to the library: its random numbers are those of a batch, and it would find the strings in the prompt too."""
    penalty = teacher.repetition_penalty
    own = {"max_new_tokens": teacher.max_tokens, **({} if penalty is None else {"repetition_penalty": penalty})}
    apart, fixed = {"stop_strings", *kinds(device)}, {"do_sample": False, "num_return_sequences": 1}
    return {name: value for name, value in {**own, **teacher.args}.items() if name not in apart} | fixed


def drawing(teacher: Teacher, keys: Sequence[str], device: Any) -> dict[str, Any]:
    """Lets `generate` draw each row's answer by random numbers of its own, if answers are sampled."""
    if not is_sampled(teacher):
        return {}
    library, asked = needs("transformers.generation", "torch"), options(teacher, device)
    mode = library.GenerationConfig(**asked).get_generation_mode()
    if mode != library.GenerationMode.GREEDY_SEARCH:
        raise UserError(
            f"teacher.args: answers cannot be sampled with {mode.value.replace('_', ' ')}; take its arguments out, or"
            " set --teacher.temperature 0"
        )
    return {"logits_processor": processors(teacher, keys, device)}


@contextmanager
def explained(teacher: Teacher) -> Iterator[None]:
    """What the library says of arguments that it doesn't take, as one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not teacher.args:
            raise
        raise UserError(f"teacher.args: generate() refuses them ({' '.join(str(error).split())[:200]})") from None


def processors(teacher: Teacher, keys: Sequence[str], device: Any) -> list[Any]:
    """What chooses each row's next token in a `generate` that doesn't sample by itself: the library's processors in
    its own order, ours, and the draw."""
    possible = kinds(device)
    named = {"temperature": teacher.temperature or 1.0}
    named |= {name: getattr(teacher, name) for name in ("top_k", "top_p", "min_p", *OURS)}
    asked = {**named, **teacher.args}
    given = [name for name in possible if asked.get(name) not in (None, IDLE.get(name))]
    return [*(possible[name](asked[name]) for name in given), Draw(teacher.seed, keys)]


def kinds(device: Any) -> dict[str, Callable[[Any], Any]]:
    """What makes the processor of each setting, in the order in which they are applied."""
    library = needs("transformers.generation", "torch")
    return {
        "temperature": lambda value: library.TemperatureLogitsWarper(float(value)),
        "top_h": lambda value: library.TopHLogitsWarper(value),
        "top_k": lambda value: library.TopKLogitsWarper(value),
        "top_p": lambda value: library.TopPLogitsWarper(value),
        "min_p": lambda value: library.MinPLogitsWarper(value),
        "typical_p": lambda value: library.TypicalLogitsWarper(value),
        "epsilon_cutoff": lambda value: library.EpsilonLogitsWarper(value),
        "eta_cutoff": lambda value: library.EtaLogitsWarper(value, device=device),
        "tfs": TailFree,
        "top_a": TopA,
    }


class TailFree:
    """Tail-free sampling: the likeliest tokens, up to where the sorted probabilities have done the share z of their
    bending (absolute second differences). The likeliest always stays, and all do where nothing bends."""

    def __init__(self, z: float) -> None:
        self.z = share("tfs", z)

    def __call__(self, _: Any, scores: Any) -> Any:
        """Logits (n_rows, vocabulary), -inf for what is left out."""
        torch = needs("torch", "torch")
        ordered, order = exact(scores).sort(dim=-1, descending=True, stable=True)
        bends = ordered.softmax(-1).diff(n=2, dim=-1).abs()
        done = bends.cumsum(-1) / bends.sum(-1, keepdim=True)  # nan where nothing bends
        middle = done > self.z  # a second difference belongs to the middle one of its three tokens
        tail = torch.cat([torch.zeros_like(middle[:, :1]), middle, middle[:, -1:]], -1)
        return without(scores, torch.zeros_like(tail).scatter(-1, order, tail))


class TopA:
    """Top-a sampling: tokens with at least `a` times the square of the likeliest one's probability."""

    def __init__(self, a: float) -> None:
        self.a = share("top_a", a)

    def __call__(self, _: Any, scores: Any) -> Any:
        """Logits (n_rows, vocabulary), -inf for what is left out."""
        p = exact(scores).softmax(-1)
        return without(scores, p < self.a * p.amax(-1, keepdim=True) ** 2)


class Draw:
    """Draws a token for each row by random numbers of its own, so that an answer doesn't depend on its batch."""

    def __init__(self, seed: int, keys: Sequence[str]) -> None:
        self.rows = [numbers(seed, key) for key in keys]

    def __call__(self, _: Any, scores: Any) -> Any:
        """Logits (n_rows, vocabulary): 0 for the token that is drawn, -inf for all others."""
        drawn = race(exact(scores), [row.getrandbits(62) for row in self.rows]).to(scores.device)
        return scores.new_full(scores.shape, -math.inf).scatter(-1, drawn, 0.0)


def numbers(seed: int, key: str) -> random.Random:
    """Random numbers for a question: those of its document, so that a longer answer begins like the one that was cut,
    and settings are compared by the same luck."""
    return random.Random(f"{seed}:{key.rpartition(':')[2]}")  # noqa: S311


def race(scores: Any, salts: Sequence[int]) -> Any:
    """The token (n_rows, 1) with the largest sum of its score and a Gumbel number of its own, which draws it as often
    as it is likely. Rounding, which is another in another batch, rarely changes which one that is; where all tokens
    share one number, it shifts them all."""
    torch = needs("torch", "torch")
    own = torch.tensor(list(salts), device=scores.device)[:, None]
    uniform = scattered(own + torch.arange(scores.shape[-1], device=scores.device) * STRIDE)
    return (scores - (-uniform.log()).log()).argmax(-1, keepdim=True)


STRIDE, FACTORS = 0x1E3779B97F4A7C15, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def scattered(whole: Any) -> Any:
    """Numbers above 0 and below 1, as good as random, of whole ones (SplitMix64's finish: Steele et al. 2014)."""
    for factor, bits in zip(FACTORS, (30, 27), strict=True):
        whole = (whole ^ (whole >> bits & (1 << 64 - bits) - 1)) * factor
    return ((whole ^ (whole >> 31 & (1 << 33) - 1)) >> 12 & (1 << 52) - 1).double().add(0.5).div(1 << 52)


def exact(scores: Any) -> Any:
    """The scores in float64, on the CPU where their device has none."""
    return (scores.cpu() if scores.device.type == "mps" else scores).double()


def without(scores: Any, left_out: Any) -> Any:
    """The scores with -inf for what is left out."""
    return scores.masked_fill(left_out.to(scores.device), -math.inf)


def share(name: str, value: Any) -> float:
    """A number above 0, at most 1."""
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} is {value!r} and must be above 0, at most 1")
    return float(value)


# -- stopping, in transformers ----------------------------------------------------------------------------------------

Completed = Callable[[Any, None], Any]
"""Which rows of token ids (n_rows, n_columns) have just completed one of the texts."""


class Stopped(NamedTuple):
    """An answer that a text has ended: how many tokens it took with that text, and what stands before it."""

    n_tokens: int
    text: str


def stops(teacher: Teacher) -> tuple[str, ...]:
    """Texts that end an answer."""
    asked = teacher.args.get("stop_strings", teacher.stop)
    return (asked,) if isinstance(asked, str) else tuple(asked or ())


def completed(tokenizer: Any, texts: Sequence[str]) -> Completed | None:
    """The library's criterion for these texts; None where there are none, or none that the vocabulary can spell."""
    try:
        return needs("transformers", "torch").StopStringCriteria(tokenizer, list(texts)) if texts else None
    except ValueError:
        return None


def before_stop(texts: Sequence[str], ids: list[int], tokenizer: Any) -> Stopped | None:
    """The answer before the first of the texts that is completed, also by control tokens; None where none is."""

    def has_stopped(n: int) -> bool:
        written = tokenizer.decode(ids[:n], skip_special_tokens=False)
        return any(text in written for text in texts)

    if not texts or not has_stopped(len(ids)):
        return None
    n = bisect.bisect_left(range(len(ids)), True, key=has_stopped)
    answer = tokenizer.decode(ids[:n], skip_special_tokens=True)
    return Stopped(n, answer[: min((answer.index(text) for text in texts if text in answer), default=None)])
