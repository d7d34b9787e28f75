"""A prompt file: rubric, scale, how its answer is read, digest."""

import difflib
import math
import re
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import Field, FiniteFloat, ValidationError, model_validator

from pipeline.config import Settings, digest
from pipeline.errors import UserError

PLACE = re.compile(r"\{\{\s*text\s*\}\}")
LABELS = re.compile(r"\{\{\s*labels\s*\}\}")
CUT_MARK = " […]"
"""Ends a document that was cut, so that the teacher doesn't take the break for bad writing."""

GAP = r"[^\S\n]*"
NUMBER = (
    r"(?<![\d.,+−-])(?P<number>[+−-]?\d+(?:[.,]\d+)?)"
    rf"(?:{GAP}(?:/|(?:out{GAP})?of\b|de\b|sobre\b){GAP}(?P<out_of>\d+(?:[.,]\d+)?))?"
)
"""A number and the scale it names (3, 3.5, 3,5, 3/5, 3 out of 5, 3 de 5), never the tail of a longer number."""
EMPHASIS = re.compile(r"[*`]+|\b_+|_+\b")
RANGE_GOES_ON = re.compile(rf"{GAP}(?:[-–—~]|(?:to|or|a|o)\b){GAP}\d", re.IGNORECASE)
LINE_ENDS = re.compile(r"[^\w\n]*\n")
REFUSAL = re.compile(
    r"\s*(?:sorry|i(?:['’]?m| am) (?:sorry|unable)|i (?:can['’]?t|cannot|won['’]t)|lo siento|no puedo)\b",
    re.IGNORECASE,
)
BREAKS = r"\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"
"""Everything that ends a line."""

Reason = Literal["no_score", "truncated", "refused", "request_failed"]


class Choice(Settings):
    """Candidate answers that mean the same, and what they are worth."""

    value: FiniteFloat
    answers: tuple[str, ...]


class Line(Settings):
    """Puts log-odds on the scale: score = offset + slope x log-odds, clipped to the scale."""

    offset: FiniteFloat
    slope: FiniteFloat = Field(gt=0)


class Prompt(Settings):
    """What a teacher is asked and how its answer becomes a score."""

    name: str
    body: str
    """The user's turn, with {{ text }} where the document goes."""
    read: Literal["generate", "choices", "label"]
    """generate: the score is read from the answer. choices: from the probabilities of candidate answers, nothing is
    generated. label: the answer is one of `labels`."""
    scale: tuple[FiniteFloat, FiniteFloat] = (0, 5)
    """Lowest and highest score."""
    pattern: str = r"score\W{0,3}\s*{number}"
    """Regular expression, case ignored, whose last match holds the score; {number} stands for the number. Emphasis
    (* ` and _ around words) is taken out of the answer first."""
    choices: tuple[Choice, ...] = ()
    """Groups of candidate answers, each spelled exactly as it would follow, leading space included."""
    normalise: bool = True
    """Divide by the probability of all candidates together; false leaves them raw, as Ask-LLM does."""
    line: Line | None = None
    """For two groups: score from the log-odds of the higher against the lower, instead of the expected value."""
    labels: tuple[str, ...] = ()
    """The labels to choose from, listed in the prompt at {{ labels }}."""
    system: str | None = None
    """System turn; an empty one keeps a chat template from adding its own."""
    answer_start: str = ""
    """What the teacher's answer is made to begin with."""
    chat: bool = True
    """Apply the model's chat template; false sends the text as it is (base models, T5)."""

    @model_validator(mode="after")
    def _check(self) -> "Prompt":
        places = len(PLACE.findall(self.body))
        if places != 1:
            raise ValueError(f"the text has {places} places for the document; write {{{{ text }}}} exactly once")
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} must rise")
        if self.scale[0] < -128 or self.scale[1] > 127 or math.ceil(self.scale[0]) > math.floor(self.scale[1]):
            raise ValueError(f"scale {list(self.scale)} needs a whole number and must stay in -128 to 127 (int_score)")
        checks = {"generate": check_pattern, "choices": check_choices, "label": check_labels}
        checks[self.read](self)
        return self

    @property
    def digest(self) -> str:
        """Fingerprint of everything in the file."""
        return digest(self.model_dump(mode="json", exclude={"name"}))

    @property
    def asked_digest(self) -> str:
        """Fingerprint of what the teacher sees: an answer is good for as long as this stays the same, whatever is
        changed about how it is read."""
        asked = self.model_dump(mode="json", include={"body", "system", "answer_start", "chat", "labels"})
        return digest({**asked, "candidates": sorted(sorted(choice.answers) for choice in self.choices)})

    @property
    def candidates(self) -> tuple[str, ...]:
        """All candidate answers."""
        return tuple(answer for choice in self.choices for answer in choice.answers)

    def turns(self, document: str) -> list[dict[str, str]]:
        """The conversation, with the document in its place; the document itself is never searched for places."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        before, after = self.around()
        return [*system, {"role": "user", "content": before + document + after}]

    def around(self) -> tuple[str, str]:
        """The body before and after the document, labels filled in."""
        listed = "\n".join(f"- {label}" for label in self.labels)
        before, after = (LABELS.sub(lambda _: listed, part) for part in PLACE.split(self.body))
        return before, after

    def fence(self, document: str) -> str:
        """The document with the lines that enclose it in the prompt broken by a backslash, so it cannot close them."""
        before, after = self.around()
        for mark in dict.fromkeys(before.rstrip().splitlines()[-1:] + after.lstrip().splitlines()[:1]):
            document = mark_pattern(mark).sub(r"\g<indent>\g<first>\\\g<rest>", document)
        return document


def mark_pattern(mark: str) -> re.Pattern[str]:
    """Finds a line of the prompt in a document, however it is cased and spaced: a tag anywhere and with attributes,
    words at the start of a line, mere punctuation (###) as a whole line only."""
    tag, wordless = mark.strip().startswith("<"), re.search(r"\w", mark) is None
    first, *rest = re.findall(r"\w+|[^\w\s]", mark.rstrip("> ") if tag else mark)
    gap = r"\s*" if tag else rf"[^\S{BREAKS}]*"
    begin = "" if tag else rf"(?<![^{BREAKS}]){gap}"
    end = rf"(?={gap}(?![^{BREAKS}]))" if wordless else r"(?!\w)" if [first, *rest][-1].isalnum() else ""
    spaced = "".join(gap + re.escape(part) for part in rest)
    return re.compile(rf"(?P<indent>{begin})(?P<first>{re.escape(first)})(?P<rest>{spaced}){end}", re.IGNORECASE)


class Reading(NamedTuple):
    """A score, or the reason there is none. `mass`: probability of all candidates; `entropy` in nats, over groups."""

    score: float | None
    reason: Reason | None = None
    mass: float | None = None
    entropy: float | None = None


def check_pattern(prompt: Prompt) -> None:
    """Refuse a pattern that could never yield a number."""
    if "{number}" not in prompt.pattern:
        raise ValueError(f"pattern {prompt.pattern!r} has no {{number}}")
    try:
        score_pattern(prompt.pattern)
    except re.error as error:
        raise ValueError(f"pattern {prompt.pattern!r} is no regular expression ({error})") from None


def check_choices(prompt: Prompt) -> None:
    """Refuse candidates that cannot be told apart or whose values leave the scale."""
    if not prompt.choices or not all(choice.answers for choice in prompt.choices):
        raise ValueError("read: choices needs choices, each with a value and answers")
    twice = {answer for answer in prompt.candidates if prompt.candidates.count(answer) > 1}
    if twice or "" in prompt.candidates:
        raise ValueError(f"candidate {sorted(twice)[0]!r} stands twice" if twice else "a candidate is empty")
    low, high = prompt.scale
    outside = [choice.value for choice in prompt.choices if not low <= choice.value <= high]
    if prompt.line is None and outside:
        raise ValueError(f"candidate value {outside[0]:g} is outside the scale {low:g} to {high:g}")
    if prompt.line is not None and len({choice.value for choice in prompt.choices}) != 2:
        raise ValueError("line needs candidates of exactly two values: log-odds have two sides")
    if not prompt.normalise and prompt.line is None and low > 0:
        raise ValueError(f"raw probabilities can fall to 0, below the scale's {low:g}")


def check_labels(prompt: Prompt) -> None:
    """Refuse a label prompt without labels or without a place for them."""
    if not prompt.labels or len(LABELS.findall(prompt.body)) != 1:
        raise ValueError("read: label needs labels, and {{ labels }} exactly once in the text")


def load(path: Path) -> Prompt:
    """Read a prompt file."""
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"rate.prompt: {path} cannot be read ({error}); give a prompt file such as prompts/edu-en.md"
        ) from None
    match = re.match(r"---\n(.*?)\n---\n(.*)", raw, re.DOTALL)
    if match is None:
        raise UserError(f"{path}: no front matter; begin the file with --- lines around its settings")
    try:
        front = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: the front matter is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(front, dict):
        raise UserError(f"{path}: the front matter is not a mapping; write one setting: value a line")
    try:
        return Prompt.model_validate({"name": path.stem, **front, "body": match[2].strip()})
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from None


def one_line(error: ValidationError) -> str:
    """What is wrong with a prompt, and where."""
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = [*Prompt.model_fields, *Choice.model_fields, *Line.model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        message = "no such setting" + (f"; did you mean {near[0]}?" if near else "")
    elif first["type"] == "string_type":
        message = f"{first['input']!r} is no text; put it in quotes"
    elif key and first["type"] != "missing":
        message += f", got {first['input']!r}"
    return f"{key}: {message}" if key else message


# -- reading answers --------------------------------------------------------------------------------------------------


def score_pattern(pattern: str) -> re.Pattern[str]:
    """The prompt's pattern with {number} spelled out."""
    return re.compile(pattern.replace("{number}", NUMBER), re.IGNORECASE)


def read_text(prompt: Prompt, answer: str, finished: bool) -> Reading:
    """The score in a written answer: its last match, if that is on the scale.

    Bold, "3/5", a decimal comma and case are understood. A fraction of another scale or a range is no score; in an
    unfinished answer only a score that ends its line counts, because anything else may be a quotation or go on.
    """
    plain = EMPHASIS.sub("", answer)
    *_, last = [None, *score_pattern(prompt.pattern).finditer(plain)]
    score = on_scale(prompt, last) if last else None
    if score is not None and last and (finished or LINE_ENDS.match(plain, last.end())):
        return Reading(score)
    if not finished:
        return Reading(None, "truncated")
    return Reading(None, "refused" if REFUSAL.match(plain) else "no_score")


def on_scale(prompt: Prompt, match: re.Match[str]) -> float | None:
    """The matched number, if it is a single number of the prompt's scale."""
    number, out_of = (to_float(match[name]) for name in ("number", "out_of"))
    other_scale = out_of is not None and out_of != prompt.scale[1]
    if number is None or other_scale or RANGE_GOES_ON.match(match.string, match.end()):
        return None
    return number if prompt.scale[0] <= number <= prompt.scale[1] else None


def to_float(written: str | None) -> float | None:
    """A written number, with a decimal point or comma."""
    return None if written is None else float(written.replace(",", ".").replace("−", "-"))


def read_choices(prompt: Prompt, log_probs: dict[str, float]) -> Reading:
    """The score in the candidates' log-probabilities (natural, over the full vocabulary).

    Normalised: sum of value x p / sum of p. Raw: sum of value x p, P(yes) of Ask-LLM (arXiv:2402.09668). With a line:
    offset + slope x log-odds, clipped to the scale; no score where an endpoint did not show one of the sides.
    """
    groups = [(choice.value, log_sum_exp([log_probs[a] for a in choice.answers])) for choice in prompt.choices]
    total = log_sum_exp([log_p for _, log_p in groups])
    if total == -math.inf:
        return Reading(None, "no_score", mass=0.0)
    shares = [(value, math.exp(log_p - total)) for value, log_p in groups]
    entropy = -sum(p * math.log(p) for _, p in shares if p > 0)
    mass = math.exp(total)
    score = sum(value * p for value, p in shares) * (1 if prompt.normalise else mass)
    if prompt.line is not None:
        odds = log_odds(groups)
        if not math.isfinite(odds):
            return Reading(None, "no_score", mass, entropy)
        score = prompt.line.offset + prompt.line.slope * odds
    return Reading(clip(score, prompt.scale), None, mass, entropy)


def log_odds(groups: list[tuple[float, float]]) -> float:
    """log P(higher value) - log P(lower value); groups of the same value count together."""
    high = max(value for value, _ in groups)
    up = log_sum_exp([log_p for value, log_p in groups if value == high])
    return up - log_sum_exp([log_p for value, log_p in groups if value != high])


def log_sum_exp(logs: list[float]) -> float:
    """log of the sum of exponentials, -inf for none."""
    top = max(logs, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in logs))


def clip(value: float, scale: tuple[float, float]) -> float:
    """The nearest value on the scale."""
    return min(max(value, scale[0]), scale[1])
