"""A prompt file: rubric, scale, how its answer is read, digest."""

import difflib
import math
import random
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from pipeline import front_matter, storage
from pipeline.config import Settings, digest
from pipeline.errors import UserError
from pipeline.taxonomy import Taxonomy, folded
from pipeline.taxonomy import load as load_taxonomy

PLACE = re.compile(r"\{\{\s*text\s*\}\}")
LABELS = re.compile(r"\{\{\s*labels\s*\}\}")
CHOICES = re.compile(r"\{\{\s*choices\s*\}\}")
CUT_MARK = " […]"
"""Ends a document that was cut, so that the teacher doesn't take the break for bad writing."""

GAP = r"[^\S\n]*"
NUMBER = (
    r"(?<![\d.,+−-])(?P<number>[+−-]?\d+(?:[.,]\d+)?)"
    rf"(?:{GAP}(?:/|(?:out{GAP})?of\b|de\b|sobre\b){GAP}(?P<out_of>\d+(?:[.,]\d+)?))?"
)
"""A number and the scale it names (3, 3.5, 3,5, 3/5, 3 out of 5, 3 de 5), never the tail of a longer number."""
TAKEN = {
    *("id", "text", "score", "reason", "spread", "n_opinions", "probabilities", "stratum", "group", "round", "gold"),
    *("opinions", "int_score", "student_score", "student_int_score", "weight", "split"),
}
"""Columns of the ratings and of scored shards that no attribute may be called."""
READ_BY = {
    "attributes": ("json",),
    "main": ("json",),
    "rationale": ("json", "label"),
    "regex": ("generate",),
    "example_answer": ("generate", "json"),
}
"""Settings that only some ways of reading heed."""
BREAKS = r"\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"
"""Everything that ends a line."""


class Choice(Settings):
    """Candidate answers that mean the same, and what they are worth."""

    value: FiniteFloat
    answers: tuple[str, ...]
    meaning: str = ""
    """What the prompt says of it at {{ choices }}."""


class Line(Settings):
    """Puts log-odds on the scale: score = offset + slope x log-odds, clipped to the scale."""

    offset: FiniteFloat
    slope: FiniteFloat = Field(gt=0)


class Example(Settings):
    """A document that the teacher is shown with its answer before it is asked, both as they are."""

    text: str
    answer: str
    """What follows answer_start."""


class Prompt(Settings):
    """What a teacher is asked and how its answer becomes a score."""

    name: str
    body: str
    """The user's turn, with {{ text }} where the document goes."""
    read: Literal["generate", "choices", "json", "label"]
    """generate: the score is read from the answer. choices: from the probabilities of candidate answers, nothing is
    generated. json: the answer is an object of named scores. label: the answer is one of `labels`, or several."""
    scale: tuple[FiniteFloat, FiniteFloat] = (0, 5)
    """Lowest and highest score."""
    pattern: str = r"score\W{0,3}\s*{number}"
    """Regular expression, case ignored, whose last match holds the score; {number} stands for the number. Emphasis
    (* ` and _ around words) is taken out of the answer first."""
    regex: str | None = None
    """The form of the whole answer (read: generate), kept to by engines with structured output."""
    attributes: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(default_factory=dict)
    """Named scores and their scales (read: json)."""
    main: str | None = None
    """The attribute that is the score; without it the first."""
    rationale: str | None = None
    """Name of a text that the answer's JSON object begins with (read: json or label)."""
    choices: tuple[Choice, ...] = ()
    """Groups of candidate answers, each spelled exactly as it would follow, leading space included."""
    normalise: bool = True
    """Divide by the probability of all candidates together; false leaves them raw, as Ask-LLM does."""
    line: Line | None = None
    """For two groups: score from the log-odds of the higher against the lower, instead of the expected value."""
    labels: Taxonomy | None = None
    """The labels to choose from, listed in the prompt at {{ labels }}: a list, or a YAML file beside the prompt."""
    multi: bool = False
    """A document may have several labels."""
    system: str | None = None
    """System turn; an empty one keeps a chat template from adding its own."""
    answer_start: str = ""
    """What the teacher's answer is made to begin with."""
    chat: bool = True
    """Apply the model's chat template; false sends the text as it is (base models, T5)."""
    order: int = Field(default=0, ge=0)
    """0 lists choices and labels as written, any other number in an order of its own."""
    examples: tuple[Example, ...] = ()
    """Documents with their answers, shown as turns of the conversation before the document that is asked about."""
    example_answer: str | None = None
    """How the answer of an example that is drawn from human scores is written, {score} where the score goes; without
    it as the pattern or the attribute reads it (read: generate or json)."""

    @model_validator(mode="before")
    @classmethod
    def _scale_of_main(cls, values: Any) -> Any:
        """Without a scale, the score has that of the main attribute."""
        attributes = values.get("attributes") if isinstance(values, dict) else None
        if not isinstance(attributes, dict) or not attributes or "scale" in values:
            return values
        main = values.get("main")
        scale = attributes.get(main if isinstance(main, str) else next(iter(attributes)))
        is_scale = isinstance(scale, list | tuple) and [isinstance(end, int | float) for end in scale] == [True, True]
        return {**values, "scale": scale} if is_scale else values

    @model_validator(mode="after")
    def _check(self) -> "Prompt":
        places = len(PLACE.findall(self.body))
        if places != 1:
            raise ValueError(f"the text has {places} places for the document; write {{{{ text }}}} exactly once")
        check_scale("scale", self.scale)
        check_heeded(self)
        checks = {
            "generate": check_pattern,
            "choices": check_choices,
            "json": check_attributes,
            "label": check_labels,
        }
        checks[self.read](self)
        return self

    @property
    def digest(self) -> str:
        """Fingerprint of everything in the file."""
        aside = {"name"} | {name for name in ("examples", "example_answer") if not getattr(self, name)}
        return digest(self.model_dump(mode="json", exclude=aside))

    @property
    def asked_digest(self) -> str:
        """Fingerprint of what the teacher sees: an answer is good for as long as this stays the same, whatever is
        changed about how it is read."""
        named = {"system", "answer_start", "chat"} | ({"examples"} if self.examples else set())
        asked = {"around": self.around(), **self.model_dump(mode="json", include=named)}
        form = self.form._asdict() if self.form else None
        return digest({**asked, "form": form, "candidates": sorted(sorted(choice.answers) for choice in self.choices)})

    @property
    def candidates(self) -> tuple[str, ...]:
        """All candidate answers."""
        return tuple(answer for choice in self.choices for answer in choice.answers)

    @property
    def lists_options(self) -> bool:
        """Whether the text lists choices or labels, whose order can be changed."""
        return bool(CHOICES.search(self.body) or LABELS.search(self.body))

    @property
    def form(self) -> "Form | None":
        """The form that a readable answer has, for engines with structured output."""
        if self.read == "generate" and self.regex is not None:
            return Form("regex", self.regex)
        if self.read == "json":
            numbers = {
                name: {"type": "number", "minimum": a, "maximum": b} for name, (a, b) in self.attributes.items()
            }
            return Form("json", self.schema_of(numbers))
        if self.read != "label" or self.labels is None:
            return None
        if not self.multi and self.rationale is None:
            gap = " " if self.answer_start and not self.answer_start[-1].isspace() else ""
            return Form("choice", [gap + path for path in self.labels.paths])
        one: dict[str, Any] = {"type": "string", "enum": list(self.labels.paths)}
        several = {"type": "array", "items": one, "minItems": 1, "maxItems": len(self.labels.paths)}
        return Form("json", self.schema_of({"labels": several} if self.multi else {"label": one}))

    def schema_of(self, fields: dict[str, Any]) -> dict[str, Any]:
        """JSON schema of an object with these fields, the rationale first."""
        first = {self.rationale: {"type": "string"}} if self.rationale else {}
        fields = {**first, **fields}
        return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}

    def turns(self, document: str) -> list[dict[str, str]]:
        """The conversation, with the document in its place; the document itself is never searched for places."""
        said = [("system", self.system)] if self.system is not None else []
        said += [turn for asked, answer in self.shots() for turn in (("user", asked), ("assistant", answer))]
        before, after = self.around()
        said.append(("user", before + document + after))
        return [{"role": role, "content": content} for role, content in said]

    def plain(self, document: str) -> str:
        """All of it as one text, for models without a chat template."""
        system = f"{self.system}\n\n" if self.system else ""
        shots = "".join(f"{joined(asked, answer)}\n\n" for asked, answer in self.shots())
        before, after = self.around()
        return f"{system}{shots}{before}{document}{after}"

    def shots(self) -> list[tuple[str, str]]:
        """What is asked about each example, and the whole answer."""
        before, after = self.around()
        return [(before + each.text + after, self.answer_start + each.answer) for each in self.examples]

    def around(self) -> tuple[str, str]:
        """The body before and after the document, labels and choices filled in."""
        labels = self.labels.listed(self.order) if self.labels else ""
        lines = [f"{choice.answers[0].strip()}: {choice.meaning}" for choice in self.choices if choice.answers]
        lines = arranged(lines, self.order)
        parts = (LABELS.sub(lambda _: labels, part) for part in PLACE.split(self.body))
        before, after = (CHOICES.sub(lambda _: "\n".join(lines), part) for part in parts)
        return before, after

    def fence(self, document: str) -> str:
        """The document with the lines that enclose it in the prompt broken by a backslash, so it cannot close them."""
        before, after = self.around()
        for mark in dict.fromkeys(before.rstrip().splitlines()[-1:] + after.lstrip().splitlines()[:1]):
            document = mark_pattern(mark).sub(r"\g<indent>\g<first>\\\g<rest>", document)
        return document


def joined(asked: str, answer: str) -> str:
    """A question and its answer as one text, on a line of its own where nothing parts them."""
    parted = asked[-1:].isspace() or answer[:1].isspace()
    return asked + ("" if parted else "\n") + answer


def arranged(lines: list[str], order: int) -> list[str]:
    """The lines as they are (0), turned round (1), or in an arrangement like none before it while there are any."""
    known = [lines, lines[::-1]]
    shuffled = random.Random(0)  # noqa: S311
    while len(known) <= order and len(known) < math.factorial(len(lines)):
        tried = shuffled.sample(lines, len(lines))
        known += [tried] if tried not in known else []
    return known[order % len(known)]


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


class Form(NamedTuple):
    """Structured output: one of several texts, a JSON schema, or a regular expression."""

    kind: Literal["choice", "json", "regex"]
    value: Any


def check_scale(name: str, scale: tuple[float, float]) -> None:
    """Refuse a scale that falls or on which an int8 has no place."""
    if not scale[0] < scale[1]:
        raise ValueError(f"{name} {list(scale)} must rise")
    if scale[0] < -128 or scale[1] > 127 or math.ceil(scale[0]) > math.floor(scale[1]):
        raise ValueError(f"{name} {list(scale)} needs a whole number and must stay in -128 to 127 (int_score)")


def check_heeded(prompt: Prompt) -> None:
    """Refuse settings that this way of reading ignores."""
    for name, reads in READ_BY.items():
        if getattr(prompt, name) not in (None, {}) and prompt.read not in reads:
            raise ValueError(f"{name}: read: {prompt.read} ignores it; take it out, or set read: {' or '.join(reads)}")
    if prompt.example_answer is not None and "{score}" not in prompt.example_answer:
        raise ValueError(f"example_answer {prompt.example_answer!r} has no {{score}}")


def check_pattern(prompt: Prompt) -> None:
    """Refuse a pattern that could never yield a number, or a form that is none."""
    if "{number}" not in prompt.pattern:
        raise ValueError(f"pattern {prompt.pattern!r} has no {{number}}")
    for name, written, compiled in (("pattern", prompt.pattern, score_pattern), ("regex", prompt.regex, re.compile)):
        try:
            compiled(written or "{number}")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{name} {written!r} is no regular expression ({error})") from None


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


def check_attributes(prompt: Prompt) -> None:
    """Refuse names that cannot be columns or told apart, and scales that are none or not that of the score."""
    if not prompt.attributes:
        raise ValueError("read: json needs attributes, such as clarity: [0, 5]")
    names = {folded(prompt.rationale): prompt.rationale} if prompt.rationale else {}
    for name, scale in prompt.attributes.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in TAKEN or name == prompt.rationale:
            raise ValueError(f"attribute {name!r} cannot be a column; use small letters, digits and _")
        if folded(name) in names:
            raise ValueError(f"attribute {name!r} cannot be told from {names[folded(name)]!r}; rename one")
        names[folded(name)] = name
        check_scale(f"attribute {name}: scale", scale)
    if prompt.main is not None and prompt.main not in prompt.attributes:
        raise ValueError(f"main: {prompt.main!r} is none of the attributes {', '.join(prompt.attributes)}")
    main = prompt.main or next(iter(prompt.attributes))
    if prompt.scale != prompt.attributes[main]:
        raise ValueError(
            f"scale {list(prompt.scale)} is not that of {main}, {list(prompt.attributes[main])}; leave it out"
        )


def check_labels(prompt: Prompt) -> None:
    """Refuse a label prompt without labels or without a place for them."""
    if prompt.labels is None or len(LABELS.findall(prompt.body)) != 1:
        raise ValueError("read: label needs labels, and {{ labels }} exactly once in the text")
    if prompt.rationale in ("label", "labels"):
        raise ValueError(f"rationale: {prompt.rationale} is where the answer goes; call it reason")


def score_pattern(pattern: str) -> re.Pattern[str]:
    """The prompt's pattern with {number} spelled out."""
    return re.compile(pattern.replace("{number}", NUMBER), re.IGNORECASE)


def load(path: Path, setting: str = "rate.prompt") -> Prompt:
    """Read a prompt file; `setting` is where it was named."""
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{setting}: {path} cannot be read ({error}); give a prompt file such as prompts/edu-en.md"
        ) from None
    front, body = front_matter.read(raw, path)
    if isinstance(front.get("labels"), str):
        front["labels"] = load_taxonomy(path.parent / front["labels"])
    try:
        return Prompt.model_validate({"name": path.stem, **front, "body": body})
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from None


def write(prompt: Prompt, path: Path) -> None:
    """Write a prompt file with the settings that differ from the defaults; `load` reads back an equal prompt."""
    if prompt.body != prompt.body.strip() or "\r" in prompt.body:
        raise UserError(f"prompt {prompt.name}: no file keeps the white space around its text or its carriage returns")
    aside = {"body", "name"} if prompt.name == path.stem else {"body"}
    front = prompt.model_dump(mode="json", exclude=aside, exclude_defaults=True)
    storage.write_text(path, front_matter.written(front, prompt.body))


def one_line(error: ValidationError) -> str:
    """What is wrong with a prompt, and where."""
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = [*Prompt.model_fields, *Choice.model_fields, *Line.model_fields, *Example.model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        message = "no such setting" + (f"; did you mean {near[0]}?" if near else "")
    elif first["type"] == "string_type":
        message = f"{first['input']!r} is no text; put it in quotes"
    elif key and first["type"] != "missing":
        message += f", got {first['input']!r}"
    return f"{key}: {message}" if key else message
