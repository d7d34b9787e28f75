"""What a teacher's answer says: a score, named scores, labels, or the reason there is none."""

import json
import math
import re
from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import Any, Literal, NamedTuple

from pipeline.prompts import GAP, NUMBER, Prompt, score_pattern
from pipeline.taxonomy import Taxonomy, folded

EMPHASIS = re.compile(r"[*`]+|\b_+|_+\b")
RANGE_GOES_ON = re.compile(rf"{GAP}(?:[-–—~]|(?:to|or|a|o)\b){GAP}\d", re.IGNORECASE)
LINE_ENDS = re.compile(r"[^\w\n]*\n")
BULLET = re.compile(r"\s*(?:[-*•–]|\d{1,3}[.)])\s+")
MOST_COLONS = 16
"""The last so many colons of a line can be where its labels begin."""
AROUND = " \t.;,\"'«»“”<>[]()"
"""What may stand around a written label."""
REFUSAL = re.compile(
    r"\s*(?:sorry|i(?:['’]?m| am) (?:sorry|unable)|i (?:can['’]?t|cannot|won['’]t)|lo siento|no puedo)\b",
    re.IGNORECASE,
)

Reason = Literal[
    "no_score", "no_label", "unknown_label", "several_labels", "truncated", "refused", "request_failed", "not_asked"
]


class Reading(NamedTuple):
    """A score or labels, or the reason there is none. `mass`: probability of all candidates; `entropy` in nats, over
    groups; `attributes`: the named scores that could be read; `unknown`: labels that the taxonomy does not have;
    `probabilities`: of each value, where the score is their mean."""

    score: float | None
    reason: Reason | None = None
    mass: float | None = None
    entropy: float | None = None
    attributes: dict[str, float] | None = None
    labels: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    probabilities: dict[float, float] | None = None


def read_text(prompt: Prompt, answer: str, finished: bool) -> Reading:
    """The score in a written answer: its last match, if that is on the scale.

    Bold, "3/5", a decimal comma and case are understood. A fraction of another scale or a range is no score; in an
    unfinished answer only a score that ends its line counts, because anything else may be a quotation or go on.
    """
    plain = EMPHASIS.sub("", answer)
    *_, last = [None, *score_pattern(prompt.pattern).finditer(plain)]
    score = on_scale(prompt.scale, last) if last else None
    if score is not None and last and (finished or LINE_ENDS.match(plain, last.end())):
        return Reading(score)
    return Reading(None, why_unread(answer, finished, "no_score"))


def on_scale(scale: tuple[float, float], match: re.Match[str]) -> float | None:
    """The matched number, if it is a single number of the scale."""
    number, out_of = (to_float(match[name]) for name in ("number", "out_of"))
    other_scale = out_of is not None and out_of != scale[1]
    if number is None or other_scale or RANGE_GOES_ON.match(match.string, match.end()):
        return None
    return number if scale[0] <= number <= scale[1] else None


def to_float(written: str | None) -> float | None:
    """A written number, with a decimal point or comma."""
    return None if written is None else float(written.replace(",", ".").replace("−", "-"))


def read_json(prompt: Prompt, answer: str, finished: bool) -> Reading:
    """The named scores in the last JSON object of an answer that has any of them, an inner object where no outermost
    one has; one that is missing or off its scale is left out. The main one is the score."""
    names, objects = {folded(name) for name in prompt.attributes}, json_objects(answer)
    outer, inner = ([each for each in some if names & each.keys()] for some in (objects, inner_objects(objects)))
    written = [{}, *inner, *outer][-1]
    read = {name: number_of(written.get(folded(name)), scale) for name, scale in prompt.attributes.items()}
    attributes = {name: value for name, value in read.items() if value is not None}
    score = attributes.get(prompt.main or next(iter(prompt.attributes)))
    return Reading(
        score, None if score is not None else why_unread(answer, finished, "no_score"), attributes=attributes
    )


def json_objects(answer: str) -> list[dict[str, Any]]:
    """The outermost JSON objects in a text, keys folded."""
    decoder, found, at = json.JSONDecoder(), [], answer.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(answer, at)
            found.append({folded(key): item for key, item in value.items()})
        except (ValueError, RecursionError):
            end = at + 1
        at = answer.find("{", end)
    return found


def inner_objects(values: Sequence[Any]) -> list[dict[str, Any]]:
    """All JSON objects in these values, as written from left to right, keys folded."""
    found, waiting = [], [*reversed(values)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found.append({folded(key): item for key, item in value.items()})
        inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        waiting += reversed(inside)
    return found


def number_of(value: Any, scale: tuple[float, float]) -> float | None:
    """A JSON value as a number of the scale; "4" and "4/5" are understood, true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    match = re.fullmatch(NUMBER, EMPHASIS.sub("", str(value)).strip(), re.IGNORECASE)
    return on_scale(scale, match) if match else None


def read_label(prompt: Prompt, answer: str, finished: bool) -> Reading:
    """The labels that an answer names, in its last JSON object or on its last line, spelled as in the taxonomy but for
    case, accents and punctuation. No match beside real labels says nothing and is left out."""
    assert prompt.labels is not None
    written = written_labels(prompt, answer if finished else what_stands(prompt, answer))
    matches = {name: prompt.labels.match(name) for name in written}
    unknown = tuple(name for name, match in matches.items() if match is None)
    found = tuple(dict.fromkeys(match for match in matches.values() if match is not None))
    found = tuple(name for name in found if name != prompt.labels.no_match_path) or found
    if found and (prompt.multi or len(found) == 1):
        return Reading(None, labels=found, unknown=unknown)
    reason = why_unread(answer, finished, "several_labels" if found else "unknown_label" if unknown else "no_label")
    return Reading(None, reason, unknown=() if reason in ("truncated", "refused") else unknown)


def what_stands(prompt: Prompt, answer: str) -> str:
    """The part of an unfinished answer that cannot go on: a whole object or, where one label is asked for, whole lines
    ("Law" may have been going to be "Law of the sea")."""
    if answer.rstrip().endswith("}"):
        return answer
    return "" if prompt.multi or prompt.rationale else answer.rpartition("\n")[0]


def written_labels(prompt: Prompt, answer: str) -> list[str]:
    """What stands where the labels should: in the last JSON object that has any, else in the list or on the line that
    ends the answer."""
    named = [value for each in json_objects(answer) for key, value in each.items() if key in ("label", "labels")]
    if named:
        last = named[-1] if isinstance(named[-1], list) else named[-1:]
        return [str(value) for value in last if value is not None and str(value).strip()]
    lines = [line for line in EMPHASIS.sub("", answer).splitlines() if re.search(r"\w", line)]
    return list(dict.fromkeys(name for line in last_lines(prompt, lines) for name in names_on(prompt, line)))


def last_lines(prompt: Prompt, lines: list[str]) -> list[str]:
    """The last line, or the list that ends the answer; a mere list of labels where one is asked for, such as all of
    them read back, chooses none."""
    assert prompt.labels is not None
    match = prompt.labels.match
    belongs = BULLET.match if prompt.multi else lambda line: match(BULLET.sub("", line))
    return list(takewhile(belongs, reversed(lines)))[::-1] or lines[-1:]


def names_on(prompt: Prompt, line: str) -> list[str]:
    """The names on a line, after whichever of its colons leaves most that the taxonomy has: names may hold some."""
    assert prompt.labels is not None
    parts = BULLET.sub("", line).split(":")
    starts = reversed(range(max(0, len(parts) - MOST_COLONS), len(parts)))
    tails = [split_names(prompt, ":".join(parts[start:])) for start in starts]
    match = prompt.labels.match
    return max(tails, key=lambda names: sum(match(name) is not None for name in names))


def split_names(prompt: Prompt, text: str) -> list[str]:
    """A single name or, where several are allowed, those of a list; a name may hold commas, so the longest runs that
    the taxonomy has are kept together."""
    assert prompt.labels is not None
    if not prompt.multi:
        return [text.strip(AROUND)] if text.strip(AROUND) else []
    names = []
    for part in re.split(r"[;|\n]", text):
        pieces = [piece for piece in part.split(",") if piece.strip(AROUND)]
        while pieces:
            n = longest_run(prompt.labels, pieces)
            names.append(",".join(pieces[:n]).strip(AROUND))
            pieces = pieces[n:]
    return names


def longest_run(labels: Taxonomy, pieces: list[str]) -> int:
    """How many of the first pieces are one label together; 1 where no several are. Runs longer than every label are
    not tried: a teacher that goes in circles writes hundreds of commas."""
    longest = max(map(len, labels.spelled))
    sizes = accumulate(max(1, len(folded(piece))) for piece in pieces)
    most = sum(1 for _ in takewhile(lambda size: size <= longest, sizes))
    return next((n for n in range(most, 1, -1) if labels.match(",".join(pieces[:n]))), 1)


def why_unread(answer: str, finished: bool, otherwise: Reason) -> Reason:
    """Why nothing could be read in an answer."""
    return "truncated" if not finished else "refused" if REFUSAL.match(EMPHASIS.sub("", answer)) else otherwise


def read_choices(prompt: Prompt, log_probs: dict[str, float], empty: dict[str, float] | None = None) -> Reading:
    """The score in the candidates' log-probabilities (natural, over the full vocabulary).

    Normalised: sum of value x p / sum of p. Raw: sum of value x p, P(yes) of Ask-LLM (arXiv:2402.09668). With a line:
    offset + slope x log-odds, clipped to the scale; no score where an endpoint did not show one of the sides. With
    `empty`, the log-probabilities for an empty document: each group's is divided by it first (contextual calibration,
    arXiv:2102.09690); mass stays that of the answer.
    """
    groups = grouped(prompt, log_probs)
    total = log_sum_exp([log_p for _, log_p in groups])
    if not math.isfinite(total):
        return Reading(None, "no_score", mass=0.0)
    mass = math.exp(min(total, 0.0))
    if empty is not None:
        groups = [
            (value, log_p - prior) for (value, log_p), (_, prior) in zip(groups, grouped(prompt, empty), strict=True)
        ]
        total = log_sum_exp([log_p for _, log_p in groups])
        if not math.isfinite(total):
            return Reading(None, "no_score", mass)
    shares = [(value, math.exp(log_p - total)) for value, log_p in groups]
    entropy = -sum(p * math.log(p) for _, p in shares if p > 0)
    score = sum(value * p for value, p in shares) * (1 if prompt.normalise else mass)
    if prompt.line is not None:
        odds = log_odds(groups)
        if not math.isfinite(odds):
            return Reading(None, "no_score", mass, entropy)
        score = prompt.line.offset + prompt.line.slope * odds
    expected = prompt.normalise and prompt.line is None
    return Reading(
        clip(score, prompt.scale), None, mass, entropy, probabilities=by_value(shares) if expected else None
    )


def by_value(shares: list[tuple[float, float]]) -> dict[float, float]:
    """The probability of each value; groups of the same value count together."""
    return {value: sum(p for other, p in shares if other == value) for value, _ in shares}


def grouped(prompt: Prompt, log_probs: dict[str, float]) -> list[tuple[float, float]]:
    """Value and log-probability of each group of candidates."""
    return [(choice.value, log_sum_exp([log_probs[a] for a in choice.answers])) for choice in prompt.choices]


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
