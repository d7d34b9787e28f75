"""What asking a teacher costs, and the budget for it."""

import functools
import math
import threading
import time
from typing import Any, NamedTuple

from pipeline.config import Budget, Teacher
from pipeline.errors import UserError
from pipeline.teacher import Answer

MILLION = 1_000_000

CERTAIN = 0.9
"""Share of the answers that seem to fit into a budget which is asked for at a time; documents differ in length."""


class Cost(NamedTuple):
    """Answers, and what they took together."""

    n: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    usd: float = 0.0

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prompt_tokens + self.answer_tokens

    def plus(self, other: "Cost") -> "Cost":
        """Both together."""
        tokens = self.prompt_tokens + other.prompt_tokens, self.answer_tokens + other.answer_tokens
        return Cost(self.n + other.n, *tokens, self.usd + other.usd)


class Spending:
    """Tokens, money and time of recorded answers against a budget."""

    def __init__(self, limits: Budget, n_askers: int = 1) -> None:
        self.limits, self.n_askers = limits, n_askers
        """How many ask at a time."""
        self.lock = threading.Lock()
        self.by_teacher: dict[str, Cost] = {}
        self.counted: set[str] = set()
        """Keys of the answers that are in."""
        self.n_reserved = 0
        """Answers that room is kept for, each taken to cost what the others did on average."""
        self.n_asked = self.n_paid_now = 0
        self.stopped_by: str | None = None
        """The budget that left questions out."""
        self.is_over = False
        """Interrupted: nothing more is asked, whatever the budget has left."""
        self.begin = time.monotonic()
        self.pace: list[tuple[float, int]] = []
        """Time and tokens so far, when the first and the last answers came."""

    @property
    def total(self) -> Cost:
        """Of all teachers."""
        return functools.reduce(Cost.plus, self.by_teacher.values(), Cost())

    def add(self, teacher: Teacher, answers: list[tuple[str, Answer]], now: bool = False) -> None:
        """Count answers by key; `now`: they have just been paid for. One recorded earlier counts once."""
        with self.lock:
            self.count(teacher, [each for each in answers if now or each[0] not in self.counted], now)

    def count(self, teacher: Teacher, answers: list[tuple[str, Answer]], now: bool) -> None:
        """Count answers, failed ones as asked only."""
        paid = [answer for _, answer in answers if answer.finish not in ("failed", "not_asked")]
        self.counted.update(key for key, _ in answers)
        prompt = sum(answer.prompt_tokens for answer in paid)
        written = sum(answer.answer_tokens for answer in paid)
        before, more = self.of(teacher), Cost(len(paid), prompt, written, cost(teacher, prompt, written))
        self.by_teacher[str(teacher.model)] = before.plus(more)
        if now:
            self.n_asked += len(answers)
            self.n_paid_now += len(paid)
            total = self.total
            self.pace = [*self.pace[:1], (time.monotonic(), total.tokens)]

    def of(self, teacher: Teacher) -> Cost:
        """What one teacher's answers took."""
        return self.by_teacher.get(str(teacher.model), Cost())

    def left(self, teacher: Teacher) -> bool:
        """Whether one more question to this teacher fits in, taken to cost what its answers have cost on average."""
        if self.is_over:
            self.stopped_by = "interrupt"
            return False
        total, own, more = self.total, self.of(teacher), 1 + self.n_reserved
        spent = {
            "budget_usd": total.usd + more * own.usd / max(own.n, 1),
            "budget_tokens": total.tokens + more * own.tokens / max(own.n, 1),
            "budget_minutes": (time.monotonic() - self.begin + self.reserved_s) / 60,
        }
        given = {name: getattr(self.limits, name) for name in spent}
        self.stopped_by = next((name for name, most in given.items() if most is not None and spent[name] > most), None)
        return self.stopped_by is None

    def room(self, teacher: Teacher) -> float:
        """How many more answers of this teacher the budget surely takes: a little less than at their average cost, and
        one where that is not known yet."""
        limits, total, own = self.limits, self.total, self.of(teacher)
        if limits.budget_usd is None and limits.budget_tokens is None:
            return math.inf
        if own.n == 0:
            return 1
        sides = ((limits.budget_usd, total.usd, own.usd), (limits.budget_tokens, total.tokens, own.tokens))
        fit = [(limit - spent) / paid for limit, spent, paid in sides if limit is not None and paid]
        return max(1.0, (CERTAIN * own.n * min(fit, default=math.inf) - self.n_reserved) / self.n_askers)

    @property
    def reserved_s(self) -> float:
        """Seconds that the reserved answers will take, as far as that is known yet."""
        speed, total = self.tokens_per_s, self.total
        return self.n_reserved * total.tokens / max(total.n, 1) / speed if speed else 0.0

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


def cost(teacher: Teacher, prompt_tokens: float, answer_tokens: float) -> float:
    """US dollars at the teacher's prices, 0 where none are given."""
    prices = teacher.usd_per_million_prompt_tokens or 0, teacher.usd_per_million_answer_tokens or 0
    return (prompt_tokens * prices[0] + answer_tokens * prices[1]) / MILLION


def has_prices(teacher: Teacher) -> bool:
    """Whether both prices are known."""
    return None not in (teacher.usd_per_million_prompt_tokens, teacher.usd_per_million_answer_tokens)


def check_budget(limits: Budget, teachers: list[Teacher]) -> None:
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
