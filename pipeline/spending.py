"""What asking a teacher costs, and the budget for it."""

import functools
import time
from typing import Any, NamedTuple

from pipeline.config import Asking, Teacher
from pipeline.errors import UserError
from pipeline.teacher import Answer

MILLION = 1_000_000


class Cost(NamedTuple):
    """Answers, and what they took together."""

    n: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    usd: float = 0.0

    def plus(self, other: "Cost") -> "Cost":
        """Both together."""
        tokens = self.prompt_tokens + other.prompt_tokens, self.answer_tokens + other.answer_tokens
        return Cost(self.n + other.n, *tokens, self.usd + other.usd)


class Spending:
    """Tokens, money and time of recorded answers against a budget."""

    def __init__(self, limits: Asking) -> None:
        self.limits = limits
        self.by_teacher: dict[str, Cost] = {}
        self.n_asked = self.n_paid_now = 0
        self.stopped_by: str | None = None
        """The budget that left questions out."""
        self.begin = time.monotonic()
        self.pace: list[tuple[float, int]] = []
        """Time and tokens so far, when the first and the last answers came."""

    @property
    def total(self) -> Cost:
        """Of all teachers."""
        return functools.reduce(Cost.plus, self.by_teacher.values(), Cost())

    def add(self, teacher: Teacher, answers: list[Answer], now: bool = False) -> None:
        """Count answers; `now`: they have just been paid for, not recorded earlier."""
        paid = [answer for answer in answers if answer.finish not in ("failed", "not_asked")]
        prompt = sum(answer.prompt_tokens for answer in paid)
        written = sum(answer.answer_tokens for answer in paid)
        before, more = self.of(teacher), Cost(len(paid), prompt, written, cost(teacher, prompt, written))
        self.by_teacher[str(teacher.model)] = before.plus(more)
        if now:
            self.n_asked += len(answers)
            self.n_paid_now += len(paid)
            total = self.total
            self.pace = [*self.pace[:1], (time.monotonic(), total.prompt_tokens + total.answer_tokens)]

    def of(self, teacher: Teacher) -> Cost:
        """What one teacher's answers took."""
        return self.by_teacher.get(str(teacher.model), Cost())

    def left(self, teacher: Teacher) -> bool:
        """Whether one more question to this teacher fits in, beside those that may be in flight: each is taken to cost
        what its answers have cost on average."""
        total, own = self.total, self.of(teacher)
        more = (in_flight(teacher, own) if own.n > 1 else 1) / max(own.n, 1)
        spent = {
            "budget_usd": total.usd + own.usd * more,
            "budget_tokens": (total.prompt_tokens + total.answer_tokens)
            + (own.prompt_tokens + own.answer_tokens) * more,
            "budget_minutes": (time.monotonic() - self.begin) / 60,
        }
        given = {name: getattr(self.limits, name) for name in spent}
        self.stopped_by = next((name for name, most in given.items() if most is not None and spent[name] > most), None)
        return self.stopped_by is None

    @property
    def counts_answers(self) -> bool:
        """Whether a budget depends on what an answer costs, which only an answer tells."""
        return self.limits.budget_usd is not None or self.limits.budget_tokens is not None

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt and answer tokens a second between the first answers and the last, the first loading left out."""
        if len(self.pace) < 2:
            return None
        (begin, before), (end, after) = self.pace
        return (after - before) / max(end - begin, 1e-9)

    def in_figures(self, teachers: list[Teacher], seconds: float) -> dict[str, Any]:
        """What asking these raters' teachers took, for the result of a stage at work for so many seconds."""
        total, live = self.total, not any(teacher.batch_folder for teacher in teachers)
        return {
            "n_asked": self.n_asked,
            "n_reused": total.n - self.n_paid_now,
            "stopped_by": self.stopped_by,
            "prompt_tokens": total.prompt_tokens,
            "answer_tokens": total.answer_tokens,
            "usd": total.usd if all(map(has_prices, teachers)) else None,
            "tokens_per_s": self.tokens_per_s if live else None,
            "docs_per_s": self.n_asked / len(teachers) / seconds if self.n_asked and live else None,
        }


FEWEST_IN_FLIGHT = 256
"""vLLM is handed at least so many questions at a time."""


def in_flight(teacher: Teacher, so_far: Cost) -> float:
    """Answers that can still arrive when no more questions are sent: a batch, or what is sent at a time."""
    if teacher.engine == "transformers":
        return teacher.batch_tokens * so_far.n / max(so_far.prompt_tokens + so_far.answer_tokens, 1)
    return max(teacher.concurrency, FEWEST_IN_FLIGHT if teacher.engine == "vllm" else 1)


def cost(teacher: Teacher, prompt_tokens: float, answer_tokens: float) -> float:
    """US dollars at the teacher's prices, 0 where none are given."""
    prices = teacher.usd_per_million_prompt_tokens or 0, teacher.usd_per_million_answer_tokens or 0
    return (prompt_tokens * prices[0] + answer_tokens * prices[1]) / MILLION


def has_prices(teacher: Teacher) -> bool:
    """Whether both prices are known."""
    return None not in (teacher.usd_per_million_prompt_tokens, teacher.usd_per_million_answer_tokens)


def check_budget(limits: Asking, teachers: list[Teacher]) -> None:
    """A budget in dollars needs prices, and any budget needs answers that come while it can still stop."""
    given = [name for name in ("budget_usd", "budget_tokens", "budget_minutes") if getattr(limits, name) is not None]
    for teacher in teachers:
        if given and teacher.batch_folder:
            raise UserError(f"{given[0]}: batch files are paid for elsewhere; lower the sample instead")
        if limits.budget_usd is not None and not has_prices(teacher):
            raise UserError(
                f"budget_usd: the price of {teacher.model} is not known; give teacher.usd_per_million_prompt_tokens"
                " and teacher.usd_per_million_answer_tokens"
            )
