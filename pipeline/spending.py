"""What asking a teacher costs, and the budget for it."""

import time
from typing import Any

from pipeline.config import Asking, Teacher
from pipeline.errors import UserError
from pipeline.teacher import Answer

MILLION = 1_000_000


class Spending:
    """Tokens, money and time of recorded answers against a budget. `in_flight`: answers that may still arrive after
    the last question was sent; room is left for them."""

    def __init__(self, limits: Asking, in_flight: int = 0) -> None:
        self.limits, self.in_flight = limits, in_flight
        self.n_answers = self.prompt_tokens = self.answer_tokens = 0
        self.usd = 0.0
        self.n_asked = self.n_paid_now = 0
        self.begin = time.monotonic()
        self.pace: list[tuple[float, int]] = []
        """Time and tokens so far, when the first and the last answers came."""

    def add(self, teacher: Teacher, answers: list[Answer], now: bool = False) -> None:
        """Count answers; `now`: they have just been paid for, not recorded earlier."""
        paid = [answer for answer in answers if answer.finish not in ("failed", "not_asked")]
        prompt = sum(answer.prompt_tokens for answer in paid)
        written = sum(answer.answer_tokens for answer in paid)
        self.n_answers += len(paid)
        self.prompt_tokens += prompt
        self.answer_tokens += written
        self.usd += cost(teacher, prompt, written)
        if now:
            self.n_asked += len(answers)
            self.n_paid_now += len(paid)
            self.pace = [*self.pace[:1], (time.monotonic(), self.prompt_tokens + self.answer_tokens)]

    def left(self) -> bool:
        """Whether one more question fits in, beside those in flight."""
        return self.stopped_by is None

    @property
    def stopped_by(self) -> str | None:
        """The budget that is used up."""
        limits, more = self.limits, self.in_flight / max(self.n_answers, 1)
        spent = {
            "budget_usd": self.usd * (1 + more),
            "budget_tokens": (self.prompt_tokens + self.answer_tokens) * (1 + more),
            "budget_minutes": (time.monotonic() - self.begin) / 60,
        }
        given = {name: getattr(limits, name) for name in spent if getattr(limits, name) is not None}
        if self.n_answers == 0:
            given = {name: limit for name, limit in given.items() if name == "budget_minutes"}
        return next((name for name, limit in given.items() if spent[name] > limit), None)

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt and answer tokens a second between the first answers and the last, loading left out."""
        if len(self.pace) < 2:
            return None
        (begin, before), (end, after) = self.pace
        return (after - before) / max(end - begin, 1e-9)

    def in_figures(self, teachers: list[Teacher], seconds: float) -> dict[str, Any]:
        """What asking took, for the result of a stage that has been at work for so many seconds."""
        return {
            "n_asked": self.n_asked,
            "n_reused": self.n_answers - self.n_paid_now,
            "stopped_by": self.stopped_by,
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
            "usd": self.usd if all(map(has_prices, teachers)) else None,
            "tokens_per_s": self.tokens_per_s,
            "docs_per_s": self.n_asked / seconds if self.n_asked else None,
        }


def cost(teacher: Teacher, prompt_tokens: float, answer_tokens: float) -> float:
    """US dollars at the teacher's prices, 0 where none are given."""
    prices = teacher.usd_per_million_prompt_tokens or 0, teacher.usd_per_million_answer_tokens or 0
    return (prompt_tokens * prices[0] + answer_tokens * prices[1]) / MILLION


def has_prices(teacher: Teacher) -> bool:
    """Whether both prices are known."""
    return None not in (teacher.usd_per_million_prompt_tokens, teacher.usd_per_million_answer_tokens)


def check_prices(limits: Asking, teachers: list[Teacher]) -> None:
    """A budget in dollars needs prices."""
    for teacher in teachers:
        if limits.budget_usd is not None and not has_prices(teacher):
            raise UserError(
                f"budget_usd: the price of {teacher.model} is not known; give teacher.usd_per_million_prompt_tokens"
                " and teacher.usd_per_million_answer_tokens"
            )
