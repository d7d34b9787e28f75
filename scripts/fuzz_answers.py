"""A coverage-guided fuzzer of what reads a teacher's answer: nothing may raise, or give a score off the scale.

python scripts/fuzz_answers.py FOLDER [libFuzzer's own flags, such as -max_total_time=60]; the folder keeps what
reached new code, to go on from. What failed is written to crash-* where it ran; given as a file it is tried again.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pipeline.reading", "pipeline.taxonomy", "json"]):
    from pipeline import prompts, reading

from pipeline.prompts import Prompt

PROMPTS = [prompts.load(path) for path in sorted((Path(__file__).parents[1] / "prompts").glob("*.md"))]
WRITTEN = {"generate": reading.read_text, "json": reading.read_json, "label": reading.read_label}
ODD = [-float("inf"), float("inf"), float("nan"), 0.0, -0.0, 1e-9, 1e300, -745.2, -1e300]


def one(data: bytes) -> None:
    """Read one answer: the first byte chooses the prompt, the second whether the answer is whole."""
    if len(data) < 2:
        return
    prompt, is_whole, said = PROMPTS[data[0] % len(PROMPTS)], data[1] % 2 == 0, data[2:]
    if prompt.read == "choices":
        half = len(said) // 2
        empty = None if is_whole else log_probs(prompt, said[half:])
        check(prompt, reading.read_choices(prompt, log_probs(prompt, said[:half]), empty))
    else:
        check(prompt, WRITTEN[prompt.read](prompt, said.decode("utf-8", "surrogateescape"), is_whole))


def log_probs(prompt: Prompt, said: bytes) -> dict[str, float]:
    """A log-probability for each candidate: down to -25.5, or an odd one; 0 where the bytes end."""
    values = [ODD[byte] if byte < len(ODD) else -byte / 10 for byte in said[: len(prompt.candidates)]]
    return {answer: values[i] if i < len(values) else 0.0 for i, answer in enumerate(prompt.candidates)}


def check(prompt: Prompt, found: reading.Reading) -> None:
    """A score on the scale, labels of the taxonomy, or a reason."""
    assert (found.score is None and not found.labels) == (found.reason is not None), found
    assert on(prompt.scale, found.score), found
    assert all(on(prompt.attributes[name], value) for name, value in (found.attributes or {}).items()), found
    assert prompt.labels is None or set(found.labels) <= set(prompt.labels.paths), found


def on(scale: tuple[float, float], value: float | None) -> bool:
    """Whether there is no value, or one on the scale."""
    return value is None or scale[0] <= value <= scale[1]


SAID = [
    "The score is 2. **Score: 3/5**\n",
    "Score: 4,5 out of 5.",
    "score - 3 to 4",
    "I'm sorry, I can't.",
    '```json\n{"reason": "{", "Clarity": "4/5", "a": [{"clarity": 2.5}]}\n```',
    '{"labels": ["Law", "Food > Cooking", null]}',
    "1. Law, Food\n- Health: Nursing; None of these\n",
    "Label: **Law**",
]
"""Answers to begin with."""


def begin(folder: Path) -> None:
    """Put an answer of each kind before each prompt into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(PROMPTS)):
        for place, said in enumerate(SAID):
            (folder / f"begin-{number}-{place}").write_bytes(bytes([number, place]) + said.encode())


if __name__ == "__main__":
    if sys.argv[1:] and not Path(sys.argv[1]).is_file():
        begin(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
