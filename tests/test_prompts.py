"""A prompt file says what is asked and how the answer is read."""

import math
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.probe import best_answer
from pipeline.prompts import Choice, Line, Prompt, load, mark_pattern
from pipeline.reading import log_sum_exp, read_choices, read_json, read_text

SHIPPED = sorted((Path(__file__).parent.parent / "prompts").glob("*.md"))


def asking(**changes: object) -> Prompt:
    """A prompt that reads a written score from 0 to 5."""
    return Prompt.model_validate({"name": "test", "body": "Rate:\n{{ text }}", "read": "generate", **changes})


def choosing(*choices: tuple[float, list[str]], **changes: object) -> Prompt:
    """A prompt that reads probabilities."""
    groups = tuple(Choice(value=value, answers=tuple(answers)) for value, answers in choices)
    return asking(read="choices", choices=groups, **changes)


def write(folder: Path, front: str, body: str = "Rate this.\n\n{{ text }}\n") -> Path:
    path = folder / "prompt.md"
    path.write_text(f"---\n{front}\n---\n{body}", encoding="utf-8")
    return path


# -- files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_prompt_loads_renders_and_has_a_digest(path):
    prompt = load(path)
    document = "A text with {{ braces }}, {{ text }} and {% tags %}."
    turns = prompt.turns(document)
    assert turns[-1]["content"].count(document) == 1
    assert "{{" not in turns[-1]["content"].replace(document, "")
    assert re.fullmatch("[0-9a-f]{16}", prompt.digest)


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if load(path).read == "generate"], ids=lambda path: path.stem
)
def test_the_line_a_shipped_prompt_asks_for_is_the_line_it_reads(path):
    prompt = load(path)
    asked = re.search(r"^(?P<name>.+): <[^<>]+>$", prompt.body, re.MULTILINE)
    assert asked is not None
    assert read_text(prompt, f"Two sentences.\n\n{asked['name']}: 4", finished=True).score == 4
    assert read_text(prompt, f"**{asked['name']}:** <2>", finished=True).score == 2


def test_no_two_shipped_prompts_share_a_digest():
    assert {"askllm", "demo", "domains", "edu-en", "edu-es", "quality"} <= {path.stem for path in SHIPPED}
    assert len({load(path).digest for path in SHIPPED}) == len(SHIPPED)


ERRORS = [
    ("read: generate", "Rate this.", "0 places for the document; write {{ text }} exactly once"),
    ("read: generate", "{{ text }} {{text}}", "2 places for the document"),
    ("read: generate\nscale: [5, 0]", "{{ text }}", "scale [5.0, 0.0] must rise"),
    ("read: generate\nscale: [0, 1000]", "{{ text }}", "needs a whole number and must stay in -128 to 127"),
    ("read: generate\nscale: [0, .inf]", "{{ text }}", "scale.1: Input should be a finite number"),
    ("read: generate\npattern: 'score: (\\d)'", "{{ text }}", "has no {number}"),
    ("read: generate\npattern: '({number}'", "{{ text }}", "is no regular expression"),
    ("read: guess", "{{ text }}", "read: Input should be 'generate', 'choices', 'json' or 'label', got 'guess'"),
    ("scale: [0, 5]", "{{ text }}", "read: Field required"),
    ("# nothing is set", "{{ text }}", "read: Field required"),
    ("read: generate\nscael: [0, 5]", "{{ text }}", "scael: no such setting; did you mean scale?"),
    ("read: generate\nscale: [0, 5", "{{ text }}", "the front matter is not YAML"),
    ("- read\n- generate", "{{ text }}", "the front matter is not a mapping"),
    ("read: choices", "{{ text }}", "read: choices needs choices"),
    ("read: choices\nchoices: [{value: 1, answers: []}]", "{{ text }}", "each with a value and answers"),
    ("read: choices\nchoices: [{value: 1, answers: [yes]}]", "{{ text }}", "True is no text; put it in quotes"),
    ("read: choices\nchoices: [{value: 7, answers: [' a']}]", "{{ text }}", "value 7 is outside the scale 0 to 5"),
    ("read: choices\nchoices: [{valeu: 1, answers: [' a']}]", "{{ text }}", "choices.0.valeu: no such setting; did"),
    (
        "read: choices\nchoices: [{value: 1, answers: [' a']}, {value: 0, answers: [' a']}]",
        "{{ text }}",
        "candidate ' a' stands twice",
    ),
    ("read: choices\nchoices: [{value: 1, answers: ['']}]", "{{ text }}", "a candidate is empty"),
    (
        "read: choices\nline: {offset: 0, slope: 1}\nchoices:\n  - {value: 0, answers: [' a']}\n"
        "  - {value: 1, answers: [' b']}\n  - {value: 2, answers: [' c']}",
        "{{ text }}",
        "line needs candidates of exactly two values",
    ),
    (
        "read: choices\nline: {offset: 0, slope: -1}\nchoices:\n  - {value: 0, answers: [' a']}\n"
        "  - {value: 1, answers: [' b']}",
        "{{ text }}",
        "line.slope: Input should be greater than 0, got -1",
    ),
    (
        "read: choices\nnormalise: false\nscale: [1, 5]\nchoices: [{value: 5, answers: [' a']}]",
        "{{ text }}",
        "raw probabilities can fall to 0, below the scale's 1",
    ),
    ("read: json\nattributes: {a: [5, 0]}", "{{ text }}", "scale [5.0, 0.0] must rise"),
    ("read: json\nattributes: {a: [0, 5], b: [5, 0]}", "{{ text }}", "attribute b: scale [5.0, 0.0] must rise"),
    ("read: json\nattributes: {a: [0, 5], b: [0, 1000]}", "{{ text }}", "attribute b: scale [0.0, 1000.0] needs a w"),
    ("read: json\nattributes: {a: [0, 5], b: [0.1, 0.9]}", "{{ text }}", "attribute b: scale [0.1, 0.9] needs a who"),
    (
        "read: json\nscale: [0, 5]\nmain: b\nattributes: {a: [0, 5], b: [0, 10]}",
        "{{ text }}",
        "scale [0.0, 5.0] is not that of b, [0.0, 10.0]; leave it out",
    ),
    ("read: json\nattributes: {a_1: [0, 5], a1: [0, 5]}", "{{ text }}", "'a1' cannot be told from 'a_1'; rename one"),
    ("read: json\nrationale: Why\nattributes: {why: [0, 5]}", "{{ text }}", "'why' cannot be told from 'Why'"),
    ("read: json\nmain: [a]\nattributes: {a: [0, 5]}", "{{ text }}", "main: ['a'] is no text; put it in quotes"),
    ("read: json\nmain: {a: 1}\nattributes: {a: [0, 5]}", "{{ text }}", "main: {'a': 1} is no text"),
    ("read: json\nmain: b\nattributes: {a: [0, 5]}", "{{ text }}", "main: 'b' is none of the attributes a"),
    ("read: json\nattributes: [a]", "{{ text }}", "attributes: Input should be a valid dictionary, got ['a']"),
    ("read: json\nattributes: {a: 5}", "{{ text }}", "attributes.a: Input should be a valid tuple, got 5"),
    ("read: json\nattributes: {a: [x, 5]}", "{{ text }}", "attributes.a.0: Input should be a valid number"),
    ("read: json\nattributes: {a: [0]}", "{{ text }}", "attributes.a.1: Field required"),
    ("read: json\nattributes: {1: [0, 5]}", "{{ text }}", "1 is no text; put it in quotes"),
    ("read: generate\nname: 5", "{{ text }}", "name: 5 is no text; put it in quotes"),
    ("read: [generate]", "{{ text }}", "read: Input should be 'generate', 'choices', 'json' or 'label', got ['genera"),
    ("read: generate\n1: 2", "{{ text }}", "1: "),
    ("read: generate\nname: 2020-13-45", "{{ text }}", "the front matter is not YAML: month must be in 1..12"),
    (f"read: {'[' * 9000}", "{{ text }}", "the front matter is not YAML"),
    ("read: generate\nattributes: {a: [0, 5]}", "{{ text }}", "attributes: read: generate ignores it; take it out, o"),
    ("read: generate\nmain: a", "{{ text }}", "main: read: generate ignores it; take it out, or set read: json"),
    ("read: generate\nrationale: why", "{{ text }}", "rationale: read: generate ignores it; take it out, or set rea"),
    ("read: generate\nregex: '(('", "{{ text }}", "regex '((' is no regular expression (missing )"),
    ("read: generate\nregex: 'a{99999999999999999999}'", "{{ text }}", "is no regular expression"),
    ("read: label\nlabels: [a]\nregex: a", "{{ text }} {{ labels }}", "regex: read: label ignores it; take it out, o"),
    ("read: generate\nexample_answer: 'Score: 3'", "{{ text }}", "example_answer 'Score: 3' has no {score}"),
    (
        "read: choices\nexample_answer: '{score}'\nchoices: [{value: 1, answers: [a]}]",
        "{{ text }}",
        "example_answer: read: choices ignores it; take it out, or set read: generate or json",
    ),
    ("read: generate\nexamples: [{text: a}]", "{{ text }}", "examples.0.answer: Field required"),
    ("read: generate\nexamples: [{text: a, answer: 4}]", "{{ text }}", "4 is no text; put it in quotes"),
    ("read: generate\nexamples: [{txt: a, answer: b}]", "{{ text }}", "examples.0.txt: no such setting; did you mean"),
    ("read: label", "{{ text }} {{ labels }}", "read: label needs labels"),
    ("read: label\nlabels: [a, b]", "{{ text }}", "{{ labels }} exactly once"),
]


@pytest.mark.parametrize(("front", "body", "message"), ERRORS, ids=[message[:40] for *_, message in ERRORS])
def test_a_bad_prompt_is_refused_in_one_line_that_names_the_file(tmp_path, front, body, message):
    path = write(tmp_path, front, body)
    with pytest.raises(UserError) as error:
        load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_prompt_or_one_without_front_matter_is_refused_in_one_line(tmp_path):
    bare = tmp_path / "bare.md"
    bare.write_text("Rate this: {{ text }}", encoding="utf-8")
    with pytest.raises(UserError, match="no front matter"):
        load(bare)
    with pytest.raises(UserError, match=r"nothing\.md cannot be read"):
        load(tmp_path / "nothing.md")
    bare.write_bytes(b"---\nread: generate\n---\n\xff\xfe {{ text }}")
    with pytest.raises(UserError, match="cannot be read"):
        load(bare)


def test_a_prompt_written_on_windows_is_the_same_prompt(tmp_path):
    unix, windows = tmp_path / "unix.md", tmp_path / "windows.md"
    text = "---\nread: generate\n---\nRate:\n\n{{ text }}\n"
    unix.write_bytes(text.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load(unix).digest == load(windows).digest


def test_the_digest_follows_every_setting_and_the_asked_digest_only_what_the_teacher_sees():
    base = choosing((5, [" good"]), (0, [" bad"]))
    reread = choosing((4, [" good"]), (1, [" bad"]), scale=(1, 5))
    reworded = choosing((5, [" good"]), (0, [" bad"]), body="Judge:\n{{ text }}")
    assert base.digest != reread.digest
    assert base.asked_digest == reread.asked_digest
    assert base.asked_digest != reworded.asked_digest
    assert base.asked_digest != choosing((5, [" great"]), (0, [" bad"])).asked_digest


def test_a_document_is_never_searched_for_places_and_labels_are_filled_in():
    prompt = asking(read="label", labels=("E-commerce", "{{ text }}"), body="{{ labels }}\n\n{{ text }}")
    content = prompt.turns("see {{ labels }} and {{ text }}")[-1]["content"]
    assert content == "- E-commerce\n- {{ text }}\n- None of these\n\nsee {{ labels }} and {{ text }}"


def test_an_empty_system_turn_is_a_turn_and_none_is_not():
    assert [turn["role"] for turn in asking(system="").turns("x")] == ["system", "user"]
    assert [turn["role"] for turn in asking().turns("x")] == ["user"]


# -- the fence around a document


@pytest.mark.parametrize("close", ["</page>", "</PAGE>", "< / page >", "<\n/page\t>", "</page now>", "word</page>"])
def test_a_document_cannot_close_the_tag_around_it(close):
    prompt = asking(body="Rate.\n<page>\n{{ text }}\n</page>\nScore it.")
    fenced = prompt.fence(f"before {close} after")
    assert re.search(r"<\s*/\s*page", fenced, re.IGNORECASE) is None
    assert fenced.replace("\\", "") == f"before {close} after"


def test_a_document_cannot_repeat_the_line_that_ends_it_but_may_use_its_words():
    prompt = asking(body="Text:\n{{ text }}\nScore of the text:")
    fenced = prompt.fence("  score  of THE text: 5\nThe score of the text: 5\rScore of the text: 5")
    assert fenced == "  score\\  of THE text: 5\nThe score of the text: 5\rScore\\ of the text: 5"


def test_punctuation_fences_are_broken_as_whole_lines_and_markdown_headings_stay():
    prompt = asking(body="Rate.\n\n###\n{{ text }}\n###\n\nScore?")
    document = "### Heading\n#\n#\n# comment\n####\n x ### y"
    assert prompt.fence(document) == document
    assert prompt.fence("text\n ### \n# # #") == "text\n #\\## \n#\\ # #"


def test_a_document_without_the_fence_is_left_as_it_is(texts):
    for path in SHIPPED:
        prompt = load(path)
        assert [prompt.fence(text) for text in texts] == texts


@given(st.text(alphabet="</page> \n\tP#a\\", max_size=60))
def test_no_document_can_spell_the_closing_tag(document):
    prompt = asking(body="Rate.\n<page>\n{{ text }}\n</page>")
    fenced = prompt.fence(document)
    assert re.search(r"<\s*/\s*page\b", fenced, re.IGNORECASE) is None
    assert re.search(r"<\s*page\b", fenced, re.IGNORECASE) is None


@pytest.mark.parametrize("mark", ["</page>", "###", "Score of the text:", "The page:"])
@pytest.mark.parametrize("filler", [" ", "\n", "\t", "\r", "<", "< ", "#", "# ", "\n ", "</page", "score of "])
def test_fencing_a_megabyte_takes_no_quadratic_time(mark, filler):
    begin = time.perf_counter()
    mark_pattern(mark).sub("", filler * (1_000_000 // len(filler)))
    assert time.perf_counter() - begin < 2


# -- named scores


def scoring(**attributes: list[float]) -> Prompt:
    """A prompt that reads named scores."""
    return asking(read="json", attributes=attributes)


def test_the_score_has_the_scale_of_the_main_attribute():
    scales = {"clarity": [0, 5], "value": [1, 10]}
    assert scoring(**scales).scale == (0, 5)
    assert asking(read="json", attributes=scales, main="value").scale == (1, 10)
    assert asking(read="json", attributes=scales, main="value", scale=[1, 10]).scale == (1, 10)


@pytest.mark.parametrize(
    ("answer", "attributes"),
    [
        ('{"scores": {"clarity": 3, "value": 4}}', {"clarity": 3, "value": 4}),
        ('{"reason": "fine", "result": [{"Clarity": "3/5"}]}', {"clarity": 3}),
        ('{"draft": {"clarity": 1}, "final": {"clarity": 2, "value": 0}}', {"clarity": 2, "value": 0}),
        ('{"clarity": 5, "example": {"clarity": 1}}', {"clarity": 5}),
        ('{"clarity": 5} {"example": {"clarity": 1}}', {"clarity": 5}),
        ('{"clarity": {"score": 3}}', {}),
        ('{"other": {"grade": 3}}', {}),
        ("[[{}]]", {}),
    ],
)
def test_named_scores_are_read_from_inner_objects_where_no_outer_one_has_any(answer, attributes):
    reading = read_json(scoring(clarity=[0, 5], value=[0, 5]), answer, finished=True)
    assert reading.attributes == attributes
    assert reading.score == attributes.get("clarity")
    assert (reading.score is None) == (reading.reason == "no_score")


def test_an_answer_of_deeply_nested_objects_is_read():
    answer = '{"a": ' * 900 + '{"clarity": 3}' + "}" * 900
    assert read_json(scoring(clarity=[0, 5]), answer, finished=True).score == 3


# -- the best answer


PATTERNS = [
    (r"\[\[{number}\]\]", "[[5]]"),
    (r"<score>\s*{number}", "<score> 5"),
    (r"(?:grade|nota)\W{0,3}{number}", "Grade:5"),
    (r"(?P<what>(?:final )?score|mark)\s*[:=]\s*\(?{number}\)?", "Final score : (5)"),
    (r"^\s*{number}\s*$", "5"),
    (r"no score|score:? ?{number}", "Score: 5"),
    (r"(?:none|(?:mark|grade): {number})\.", "Mark: 5."),
]


@pytest.mark.parametrize(("pattern", "answer"), PATTERNS)
def test_the_best_answer_is_written_as_the_pattern_reads_it(pattern, answer):
    prompt = asking(pattern=pattern)
    assert best_answer(prompt) == answer
    assert read_text(prompt, answer, finished=True).score == 5


def test_a_pattern_too_odd_for_a_best_answer_has_an_attempt_at_one():
    prompt = asking(pattern=r"(?<=verdict )\d{3}{number}", scale=(0, 4.5))
    assert best_answer(prompt) == "4.5"
    assert read_text(prompt, "4.5", finished=True).score is None


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if load(path).read in ("generate", "json")], ids=lambda path: path.stem
)
def test_the_best_answer_to_a_shipped_prompt_reads_back_as_the_highest_score(path):
    prompt = load(path)
    read = {"generate": read_text, "json": read_json}[prompt.read]
    assert read(prompt, best_answer(prompt), True).score == prompt.scale[1]


# -- reading a written answer


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 3", 3),
        ("score 3", 3),
        ("SCORE = 3", 3),
        ("Score: **3**", 3),
        ("**Score:** 3", 3),
        ("__Score__: _3_", 3),
        ("Score: `3`", 3),
        ("Score: <3>", 3),
        ('{"score": 3}', 3),
        ("Score: 3/5", 3),
        ("Score: **3** / 5", 3),
        ("Score: 3 out of 5", 3),
        ("Score: 3 de 5", 3),
        ("Score: 3,5", 3.5),
        ("Score: 3.5/5", 3.5),
        ("Score: 3.", 3),
        ("Score: 3, because it explains", 3),
        ("Score:\n\n3", 3),
        ("Score: 3\n- 2 facts", 3),
        ("Score: 0", 0),
        ("Score: 0.0/5", 0),
        ("Score: +4", 4),
        ("Score: 5", 5),
    ],
)
def test_the_usual_spellings_of_a_score_are_read(answer, score):
    assert read_text(asking(), answer, finished=True)[:4] == (score, None, None, None)


@pytest.mark.parametrize(
    "answer",
    [
        "Score: 3/10",
        "Score: 3 out of 10",
        "Score: 3 sobre 10",
        "Score: 3-4",
        "Score: 3 – 4",
        "Score: 3 to 4",
        "Score: 3 or 4",
        "Score: 3/5-4/5",
        "Score: 6",
        "Score: 35",
        "Score: -1",
        "Score: −1",
        "Score: 5.1",
        "Score: none",
        "A good page.",
        "",
        "\x00\ud800",
        f"Score: {'9' * 500}",
    ],
)
def test_anything_else_is_no_score_with_its_reason(answer):
    assert read_text(asking(), answer, finished=True)[:4] == (None, "no_score", None, None)


def test_trap_05_the_last_match_wins_over_a_quoted_score():
    answer = 'The page itself says "score: 5" and later Score: 4/5, which is not deserved.\n\nScore: **1**'
    assert read_text(asking(), answer, finished=True).score == 1


def test_trap_05_an_off_scale_last_match_is_not_replaced_by_an_earlier_one():
    assert read_text(asking(), "Score: 4 at first, but finally Score: 9", finished=True).reason == "no_score"


def test_trap_05_a_quotation_in_a_cut_answer_is_no_score():
    answer = 'It claims "educational score: 5", although there is little to'
    assert read_text(asking(), answer, finished=False)[:4] == (None, "truncated", None, None)


def test_an_unfinished_answer_counts_only_if_its_score_ends_a_line():
    assert read_text(asking(), "Score: 3.\nNote that", finished=False).score == 3
    assert read_text(asking(), "Score: 3", finished=False).reason == "truncated"
    assert read_text(asking(), "The page explains", finished=False).reason == "truncated"


@pytest.mark.parametrize("answer", ["I'm sorry, but I can't.", "I cannot rate this.", "Sorry, no.", "Lo siento, no."])
def test_a_refusal_is_told_from_a_missing_score(answer):
    assert read_text(asking(), answer, finished=True).reason == "refused"
    assert read_text(asking(), answer + " Score: 0", finished=True).score == 0
    assert read_text(asking(), "A page of refusals. " + answer, finished=True).reason == "no_score"


def test_the_pattern_may_hold_underscores_and_may_match_without_a_number():
    assert read_text(asking(pattern="edu_score: {number}"), "__edu_score: 2__", finished=True).score == 2
    assert read_text(asking(pattern="score: {number}|no score"), "No score", finished=True).reason == "no_score"


@given(
    st.integers(0, 50),
    st.sampled_from(["Score: {}", "score: **{}**", "**SCORE**: {}/5", "Score: {} out of 5.", "So\nScore – {}\n"]),
    st.sampled_from([".", ","]),
    st.sampled_from(["", "The text says score: 5. ", "Score: 2/5 or so.\n"]),
)
def test_any_number_on_the_scale_reads_back_in_any_spelling(tenths, spelling, point, before):
    """Zero among them: it is a score, not a missing one."""
    number = f"{tenths / 10:g}".replace(".", point)
    assert read_text(asking(), before + spelling.format(number), finished=True).score == tenths / 10


@given(st.text(max_size=200))
def test_any_answer_is_read_as_a_score_on_the_scale_or_a_reason(answer):
    for finished in (True, False):
        score, reason, *_ = read_text(asking(), answer + "score: 3" + answer, finished)
        assert (score is None) == (reason is not None)
        assert score is None or 0 <= score <= 5


# -- reading probabilities


def logs(**probabilities: float) -> dict[str, float]:
    return {name: math.log(p) if p else -math.inf for name, p in probabilities.items()}


def test_trap_19_probabilities_are_normalised_among_the_candidates():
    prompt = choosing((1, ["yes", "Yes"]), (0, ["no"]), scale=(0, 1))
    reading = read_choices(prompt, logs(yes=0.2, Yes=0.1, no=0.1))
    assert reading.score == pytest.approx(0.75)
    assert reading.mass == pytest.approx(0.4)
    assert reading.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_raw_reading_is_p_yes_of_ask_llm():
    prompt = choosing((1, ["yes", "Yes"]), (0, ["no"]), scale=(0, 1), normalise=False)
    assert read_choices(prompt, logs(yes=0.2, Yes=0.1, no=0.1)).score == pytest.approx(0.3)
    assert read_choices(prompt, logs(yes=0.2, Yes=0.1, no=0)).score == pytest.approx(0.3)


def test_the_expected_digit_is_the_mean_of_the_scale_under_the_probabilities():
    prompt = choosing(*[(digit, [str(digit)]) for digit in range(6)])
    uniform = read_choices(prompt, {str(digit): math.log(0.1) for digit in range(6)})
    assert uniform.score == pytest.approx(2.5)
    assert uniform.entropy == pytest.approx(math.log(6))
    sure = read_choices(prompt, {str(digit): 0.0 if digit == 4 else -math.inf for digit in range(6)})
    assert sure[:4] == (4, None, 1, 0)


def test_the_line_puts_log_odds_on_the_scale_and_clips_them():
    prompt = choosing((5, ["a", "b"]), (0, ["c"]), line=Line(offset=1, slope=2))
    assert read_choices(prompt, logs(a=0.1, b=0.2, c=0.3)).score == pytest.approx(1)
    assert read_choices(prompt, logs(a=0.1, b=0.1, c=0.1)).score == pytest.approx(1 + 2 * math.log(2))
    assert read_choices(prompt, logs(a=0.1, b=0.1, c=1e-9)).score == 5
    assert read_choices(prompt, logs(a=1e-9, b=0, c=0.1)).score == 0


def test_a_side_that_was_not_seen_is_no_extreme_score():
    prompt = choosing((5, ["a"]), (0, ["b"]), line=Line(offset=1, slope=2))
    assert read_choices(prompt, logs(a=0.1, b=0))[:2] == (None, "no_score")
    assert read_choices(prompt, logs(a=0, b=0.1))[:2] == (None, "no_score")


def test_the_line_counts_groups_of_one_value_together_and_does_not_depend_on_normalising():
    groups = [(5, ["a"]), (5, ["b"]), (0, ["c"])]
    log_probs = logs(a=0.1, b=0.2, c=0.1)
    for normalise in (True, False):
        prompt = choosing(*groups, line=Line(offset=0, slope=1), normalise=normalise)
        assert read_choices(prompt, log_probs).score == pytest.approx(math.log(3))


def test_tiny_probabilities_do_not_underflow():
    prompt = choosing((1, ["yes"]), (0, ["no"]), scale=(0, 1))
    assert read_choices(prompt, {"yes": -2000.0, "no": -2000.0 - math.log(3)}).score == pytest.approx(0.75)


def test_candidates_that_were_all_unseen_are_no_score_and_never_a_zero():
    prompt = choosing((1, ["yes"]), (0, ["no"]), scale=(0, 1))
    assert read_choices(prompt, {"yes": -math.inf, "no": -math.inf})[:4] == (None, "no_score", 0, None)
    assert read_choices(prompt, {"yes": -math.inf, "no": -1.0}).score == 0


@given(st.lists(st.floats(-60, 0) | st.just(-math.inf), min_size=6, max_size=6), st.booleans())
def test_a_score_from_probabilities_never_leaves_the_scale(log_probs, normalise):
    prompt = choosing(*[(digit, [str(digit)]) for digit in range(6)], normalise=normalise)
    score = read_choices(prompt, {str(digit): log_p for digit, log_p in enumerate(log_probs)}).score
    assert score is None or 0 <= score <= 5
    assert (score is None) == (max(log_probs) == -math.inf)


def test_log_sum_exp_of_nothing_is_minus_infinity():
    assert log_sum_exp([]) == -math.inf
