"""Whatever the input, each reader ends in rows or one line, each answer in a score on its scale or a reason, and each
cut in kept and dropped rows. FUZZ_EXAMPLES in the environment sets how many examples are tried (scripts/fuzz.sh)."""

import gzip
import io
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline import corpus, filter, prompts, reading, shards
from pipeline.config import Corpus, Recipe, Teacher
from pipeline.engines.layout import Layout
from pipeline.errors import UserError
from pipeline.prompts import Prompt
from pipeline.teacher import Question

ASKED = os.environ.get("FUZZ_EXAMPLES")


def tried(n: int) -> Callable[[Any], Any]:
    """`n` examples, always the same; or as many as are asked for, each time others."""
    return settings(
        max_examples=int(ASKED or n),
        derandomize=ASKED is None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextmanager
def folder() -> Iterator[Path]:
    """A new one for every example, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def one_line(error: UserError) -> str:
    line = str(error)
    assert line and "\n" not in line and len(line) < 2000, line
    return line


# -- corpora ----------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=40)
"""Any characters but surrogates."""
NESTED = st.none() | st.fixed_dictionaries({"tags": st.none() | st.lists(st.none() | TEXTS, max_size=3)})
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.none() | TEXTS,
            "n": st.none() | st.integers(-(2**63), 2**63 - 1),
            "share": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "nested": NESTED,
        }
    ),
    max_size=12,
)
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "n": pa.int64(),
        "share": pa.float64(),
        "nested": pa.struct({"tags": pa.list_(pa.string())}),
    }
)


def packed(suffix: str, raw: bytes) -> bytes:
    """Compressed as the suffix says."""
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    return packers.get("." + suffix.rpartition(".")[2], bytes)(raw)


def parquet(table: pa.Table, **how: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True, **how)
    return sink.getvalue()


def stream(table: pa.Table) -> bytes:
    """The Arrow format that save_to_disk writes."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def feather(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table, sink, compression="lz4", chunksize=3)
    return sink.getvalue()


def json_lines(table: pa.Table) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()


BINARY = {".parquet": parquet, ".arrow": stream, ".feather": feather}


def read(path: Path, **how: Any) -> tuple[list[dict[str, Any]], shards.Counts]:
    """All rows as score meets them: the schema of every shard first; and what reading met."""
    found, rows, counts = Corpus(path=str(path), **how), [], shards.Counts()
    for shard in shards.find_shards(found):
        schema = corpus.read_schema(shard, found)
        for batch in corpus.read(shard, found, counts, schema=schema):
            corpus.texts(batch, found, shard, counts)
            rows += [dict(zip(schema.names, row, strict=True)) for row in zip(*values_of(batch), strict=True)]
    assert counts.n_rows == len(rows) + counts.n_bad_rows
    return rows, counts


def values_of(batch: pa.RecordBatch) -> list[list[Any]]:
    """The values of every column."""
    return [corpus.decoded(column)[0] for column in batch.columns]


def read_or_refused(path: Path, **how: Any) -> list[dict[str, Any]] | None:
    """Its rows, or None where one line says what is wrong."""
    try:
        return read(path, **how)[0]
    except UserError as error:
        one_line(error)
        return None


@pytest.mark.parametrize("suffix", sorted(shards.SUFFIXES))
@tried(20)
@given(raw=st.binary(max_size=300), pack=st.booleans(), skip=st.booleans())
def test_any_bytes_are_rows_or_one_line(suffix: str, raw: bytes, pack: bool, skip: bool):
    with folder() as at:
        (at / f"a{suffix}").write_bytes(packed(suffix, raw) if pack else raw)
        read_or_refused(at, skip_bad_rows=skip)


CHANGES = st.lists(
    st.tuples(st.sampled_from(["write", "cut", "delete", "insert"]), st.floats(0, 1), st.binary(max_size=4)),
    min_size=1,
    max_size=4,
)


def damaged(raw: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes overwritten, inserted, taken out or cut off, each at a share of the way."""
    for what, share, by in changes:
        place = int(share * len(raw))
        ends = {"write": raw[place + len(by) :], "cut": b"", "delete": raw[place + 4 :], "insert": raw[place:]}
        raw = raw[:place] + (b"" if what in ("cut", "delete") else by) + ends[what]
    return raw


@pytest.mark.parametrize("suffix", [*BINARY, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst"])
@tried(40)
@given(rows=ROWS, changes=CHANGES)
def test_a_damaged_file_is_rows_or_one_line(suffix: str, rows: list[dict[str, Any]], changes: Any):
    table = pa.Table.from_pylist(rows, SCHEMA)
    raw = BINARY[suffix](table) if suffix in BINARY else packed(suffix, json_lines(table))
    with folder() as at:
        (at / f"a{suffix}").write_bytes(damaged(raw, changes))
        read_or_refused(at)


@pytest.mark.parametrize("suffix", BINARY)
@tried(40)
@given(rows=ROWS)
def test_what_was_written_is_read_row_by_row(suffix: str, rows: list[dict[str, Any]]):
    with folder() as at:
        (at / f"a{suffix}").write_bytes(BINARY[suffix](pa.Table.from_pylist(rows, SCHEMA)))
        assert read(at)[0] == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.builds(lambda others, text: {**others, "text": text}, st.dictionaries(st.text(max_size=3), JSON), TEXTS)
ANY_TEXT = st.text(st.characters(), max_size=40)
"""Any characters, lone surrogates among them, which JSON can spell."""


def without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".ndjson.zst"])
@tried(40)
@given(written=st.lists(st.none() | ANY_TEXT, max_size=12), blanks=st.booleans())
def test_no_line_of_json_is_lost_whatever_its_characters(suffix: str, written: list[str | None], blanks: bool):
    lines = [json.dumps({"text": text, "i": i}) for i, text in enumerate(written)]
    raw = ("\n\n" if blanks else "\n").join(lines).encode()
    with folder() as at:
        (at / f"a{suffix}").write_bytes(packed(suffix, raw or b"\n"))
        rows = read(at)[0]
    assert [row["text"] for row in rows] == [None if text is None else without_surrogates(text) for text in written]
    assert [row["i"] for row in rows] == list(range(len(written)))


@tried(100)
@given(rows=st.lists(OBJECTS | JSON, max_size=6), skip=st.booleans())
def test_any_json_is_rows_or_one_line_and_skipped_lines_are_counted(rows: list[Any], skip: bool):
    with folder() as at:
        (at / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            found, counts = read(at, skip_bad_rows=skip)
        except UserError as error:
            one_line(error)
            return
    assert len(found) + counts.n_bad_rows == len(rows)
    assert counts.n_bad_rows == sum(not isinstance(row, dict) for row in rows)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
@tried(40)
@given(written=st.lists(TEXTS, max_size=8))
def test_no_paragraph_is_lost_whatever_its_characters(suffix: str, written: list[str]):
    lines = [text.encode().replace(b"\n", b"").replace(b"\r", b"") for text in written]
    lines = [line for line in lines if line.strip() and not line.startswith(MARKS)]
    with folder() as at:
        (at / f"a{suffix}").write_bytes(packed(suffix, b"\n\n".join(lines) or b"\n"))
        assert [row["text"].encode() for row in read(at)[0]] == [line.rstrip() for line in lines]


MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
"""Marks that may begin a file, and are no part of its text."""


def test_an_arrow_file_that_points_outside_itself_is_refused():
    """In a process of its own, as Arrow would end this one."""
    offsets = struct.pack("<3i", 0, 5, 10)
    raw = stream(pa.table({"text": ["right", "wrong"]}))
    assert raw.count(offsets) == 1
    with folder() as at:
        (at / "a.arrow").write_bytes(raw.replace(offsets, struct.pack("<3i", 0, 2**30, 10)))
        code = "import sys; from pipeline import corpus, shards; from pipeline.config import Corpus\n"
        code += "found = Corpus(path=sys.argv[1]); [shard] = shards.find_shards(found)\n"
        code += "[batch.to_pylist() for batch in corpus.read(shard, found, shards.Counts())]"
        done = subprocess.run([sys.executable, "-c", code, str(at)], capture_output=True, text=True)
    assert done.returncode == 1 and "UserError" in done.stderr and "cannot be read as arrow" in done.stderr


def test_text_that_is_not_utf8_is_repaired_however_deep_it_lies():
    bad = pa.array([b"caf\xe9", None], pa.binary()).view(pa.string())
    nested = pa.StructArray.from_arrays([pa.ListArray.from_arrays([0, 2, 2], bad), pa.array([1, 2])], ["tags", "n"])
    assert corpus.decoded(nested)[0] == [{"tags": ["caf\ufffd", None], "n": 1}, {"tags": [], "n": 2}]


# -- prompts ----------------------------------------------------------------------------------------------------------

SHIPPED = {
    path.name: path.read_text(encoding="utf-8") for path in (Path(__file__).parents[1] / "prompts").glob("*.md")
}
PARTS = [
    *("---\n", "\n", "{{ text }}", "{{ labels }}", "{{ choices }}", "scale: ", "[0, 5]", "[5, 0]", "read: ", "json"),
    *("generate", "choices: ", "label", "labels: ", "pattern: ", "'{number}'", "(", "attributes: ", "{a: [0, 5]}"),
    *(
        "- {value: 5, answers: [x]}\n",
        "line: {offset: 0, slope: 1}\n",
        "main: a\n",
        "&a [*a]",
        "!!python/name:os",
        ".inf",
    ),
    *(
        "{labels: [a, b], levels: [x, y]}",
        "regex: ",
        "examples: [{text: a, answer: b}]\n",
        "order: 1\n",
        "~",
        "2020-01-01",
    ),
]
PROMPT_FILES = (
    st.binary(max_size=60)
    | st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=20).map(lambda parts: "".join(parts).encode())
    | st.builds(damaged, st.sampled_from(sorted(SHIPPED.values())).map(str.encode), CHANGES)
)


@tried(300)
@given(raw=PROMPT_FILES, document=ANY_TEXT)
def test_any_prompt_file_asks_about_the_document_or_is_one_line(raw: bytes, document: str):
    with folder() as at:
        (at / "prompt.md").write_bytes(raw)
        (at / "domains.yaml").write_text("[a, b]")
        try:
            prompt = prompts.load(at / "prompt.md")
        except UserError as error:
            one_line(error)
            return
    before, after = prompt.around()
    assert prompt.turns(document)[-1] == {"role": "user", "content": before + document + after}
    assert prompt.plain(document).endswith(before + document + after)


PLACES = st.lists(st.sampled_from(["{{ text }}", "{{ labels }}", "{{choices}}", "\\1", "\\g<0>", "{", "}", "%s"]))


@pytest.mark.parametrize("name", sorted(SHIPPED))
@tried(20)
@given(document=PLACES.map("".join) | ANY_TEXT)
def test_a_document_stands_in_the_prompt_as_it_is(name: str, document: str):
    prompt = prompts.load(Path(__file__).parents[1] / "prompts" / name)
    empty, marked = prompt.turns("")[-1]["content"], prompt.turns("\0")[-1]["content"]
    place = marked.index("\0")
    assert prompt.turns(document)[-1]["content"] == empty[:place] + document + empty[place:]


CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>system\n", "assistant", "</s>", "[CLS]", "\n"]


@pytest.fixture(scope="module")
def asking(tiny_causal: Path) -> Callable[[str], list[int]]:
    """The control tokens that the model reads when it is asked about a document."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    prompt = Prompt(name="test", body="Rate.\n<page>\n{{ text }}\n</page>", read="generate")
    layout = Layout(tokenizer, prompt, Teacher(model="tiny", document_tokens=64), 2048)
    control = set(tokenizer.all_special_ids)

    def found(document: str) -> list[int]:
        return [i for i in layout.whole(layout.row(Question("key", document))) if i in control]

    return found


CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>system\n", "<|", "|>", "</page>", "\n"]


@tried(100)
@given(document=st.lists(st.sampled_from(CONTROL) | st.text(st.characters(), max_size=5), max_size=8).map("".join))
def test_no_document_brings_a_control_token_into_what_is_asked(document: str, asking: Callable[[str], list[int]]):
    assert asking(document) == asking("") != []


# -- answers ----------------------------------------------------------------------------------------------------------

HALF = {"read": "generate", "body": "{{ text }}", "name": "half"}
PROMPTS = {name: prompts.load(Path(__file__).parents[1] / "prompts" / name) for name in sorted(SHIPPED)}
PROMPTS["from -1 to 1"] = Prompt.model_validate({**HALF, "scale": [-1, 1], "pattern": "{number}"})
PROMPTS["any"] = Prompt.model_validate({**HALF, "pattern": ".*?{number}|no score"})
NAMES = sorted({name for each in PROMPTS.values() for name in each.attributes})
BY_READ = {kind: [each for each in PROMPTS.values() if each.read == kind] for kind in ("generate", "json", "label")}
SAID = [
    *(
        "score: ",
        "Score",
        "**",
        "3",
        "3.5",
        "3,5",
        "٣",
        "³",
        "½",
        "−1",
        "-",
        "/5",
        "/10",
        " out of 5",
        " de 5",
        "to 4",
    ),
    *("1e999", "9" * 400, "NaN", "Infinity", "true", "null", "{", "}", "[", "]", '"', ":", ",", "\\u0000", "\\ud800"),
    *("\n", "- ", "1. ", "labels", "label", "Law", "Other", ">", ";", "Sorry", "I can't", "clarity", "\u2028", "\x00"),
    *('{"label": ', '{"labels": [', *(f'{{"{name}": ' for name in NAMES), "```json\n", '"}', "]}"),
]
ANSWERS = st.lists(st.sampled_from(SAID) | st.text(st.characters(), max_size=6), max_size=14).map("".join)
JSON_ANSWERS = st.recursive(
    JSON | st.sampled_from(SAID),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "label", "labels"]), inner),
    max_leaves=8,
).map(json.dumps)


def check(prompt: Prompt, found: reading.Reading) -> None:
    """A score on the scale or a reason, and nothing that the prompt does not know."""
    assert (found.score is None and not found.labels) == (found.reason is not None)
    low, high = prompt.scale
    assert found.score is None or low <= found.score <= high
    for name, value in (found.attributes or {}).items():
        assert prompt.attributes[name][0] <= value <= prompt.attributes[name][1]
    if prompt.labels:
        assert set(found.labels) <= set(prompt.labels.paths) and (prompt.multi or len(found.labels) <= 1)


@tried(300)
@given(prompt=st.sampled_from(BY_READ["generate"]), answer=ANSWERS, finished=st.booleans())
def test_any_answer_is_a_score_on_the_scale_or_a_reason(prompt: Prompt, answer: str, finished: bool):
    found = reading.read_text(prompt, answer, finished)
    check(prompt, found)
    assert found.score is None or any(character.isdecimal() for character in answer)


@tried(300)
@given(prompt=st.sampled_from(BY_READ["json"]), answer=ANSWERS | JSON_ANSWERS, finished=st.booleans())
def test_any_object_is_scores_on_their_scales_or_a_reason(prompt: Prompt, answer: str, finished: bool):
    found = reading.read_json(prompt, answer, finished)
    check(prompt, found)
    assert not found.attributes or any(character.isdecimal() for character in answer)


@tried(300)
@given(prompt=st.sampled_from(BY_READ["label"]), answer=ANSWERS | JSON_ANSWERS, finished=st.booleans())
def test_any_answer_is_labels_of_the_taxonomy_or_a_reason(prompt: Prompt, answer: str, finished: bool):
    check(prompt, reading.read_label(prompt, answer, finished))


LOG_PROBS = st.floats(max_value=0) | st.sampled_from([0.0, -1.0, -math.inf, 1e-6, 1e6, math.nan, math.inf])


@st.composite
def choices(draw: st.DrawFn) -> tuple[Prompt, dict[str, float], dict[str, float] | None]:
    """A prompt that compares candidates, and their log-probabilities for a document and for an empty one."""
    prompt = draw(st.sampled_from([each for each in PROMPTS.values() if each.read == "choices"]))
    given = st.fixed_dictionaries(dict.fromkeys(prompt.candidates, LOG_PROBS))
    return prompt, draw(given), draw(st.none() | given)


@tried(300)
@given(choices())
def test_any_probabilities_are_a_score_on_the_scale_or_a_reason(given: Any):
    prompt, log_probs, empty = given
    found = reading.read_choices(prompt, log_probs, empty)
    check(prompt, found)
    assert found.probabilities is None or sum(found.probabilities.values()) == pytest.approx(1)


def test_candidates_that_an_empty_document_rules_out_give_no_score():
    prompt = PROMPTS["quality.md"]
    sure, never = dict.fromkeys(prompt.candidates, -1.0), dict.fromkeys(prompt.candidates, -math.inf)
    assert reading.read_choices(prompt, sure, never).reason == "no_score"


@pytest.mark.parametrize("said", ["a, ", "a:b,", "!,", "1", ",", '{"a":[', "law; "])
def test_an_answer_that_goes_in_circles_is_read_before_the_suite_times_out(said: str):
    for prompt in BY_READ["label"]:
        check(prompt, reading.read_label(prompt, said * (8000 // len(said)), True))


# -- cuts -------------------------------------------------------------------------------------------------------------

SCORES = (
    st.sampled_from([None, math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.5, 2.5, 3.0, -1.0, 5e-324])
    | st.floats(width=32)
    | st.floats(0, 5, width=32)
)
ROW = st.tuples(SCORES, st.none() | st.integers(-5, 5), st.sampled_from(["a", "b", "c", None]), st.integers(0, 9))
SHARDS = st.lists(st.lists(ROW, max_size=12), min_size=1, max_size=4)
CUT = st.one_of(
    st.fixed_dictionaries({"min_score": st.floats(-3, 6) | st.just(2.5)}),
    st.fixed_dictionaries({"min_int_score": st.integers(-6, 6)}),
    st.fixed_dictionaries(
        {},
        optional={"min_score": st.sampled_from([-1.0, 0.0, 2.5])},
    ).flatmap(
        lambda floor: st.one_of(
            st.fixed_dictionaries({"keep_share": st.floats(0.01, 1)}),
            st.fixed_dictionaries({"keep_documents": st.integers(1, 20)}),
            st.fixed_dictionaries({"keep_tokens": st.integers(1, 60), "tokens_column": st.just("n_tokens")}),
        ).map(lambda amount: floor | amount)
    ),
)


def scored(at: Path, rows: list[list[Any]]) -> pa.Table:
    """Write a shard for each list; all rows, each with its place."""
    tables, n = [], 0
    for number, of_shard in enumerate(rows):
        scores, whole, group, n_tokens = zip(*of_shard, strict=True) if of_shard else ((), (), (), ())
        columns = {
            "text": pa.array([f"text {i}" for i in range(len(of_shard))], pa.string()),
            "row": pa.array(range(n, n + len(of_shard)), pa.int64()),
            "group": pa.array(group, pa.string()),
            "n_tokens": pa.array(n_tokens, pa.int32()),
            "extra": pa.array([bytes([i, 255]) for i in range(len(of_shard))], pa.binary()),
            "score": pa.array(scores, pa.float32(), from_pandas=False),
            "int_score": pa.array(whole, pa.int8()),
        }
        tables.append(pa.table(columns))
        pq.write_table(tables[-1], at / f"part-{number}.parquet")
        n += len(of_shard)
    return pa.concat_tables(tables)


def bits(table: pa.Table) -> list[tuple[Any, ...]]:
    """Rows in which equal means the same bits: -0.0 is not 0.0, and NaN is itself."""
    score = table["score"].combine_chunks()
    exact = score.fill_null(0).view(pa.uint32()).to_pylist()
    others = [column.to_pylist() for column in table.drop_columns(["score"]).columns]
    return list(zip(exact, score.is_null().to_pylist(), *others, strict=True))


def cut(at: Path, given: dict[str, Any]) -> filter.FilterResult | None:
    """What stage 4 did, or None where it refused to keep nothing."""
    recipe = {"run_folder": at / "run", "filter": {"scored": at / "scored", "keep_dropped": True, **given}}
    try:
        return filter.run(Recipe.model_validate(recipe))
    except UserError as error:
        assert "raise it" in one_line(error)
        return None


def kept_and_dropped(at: Path, name: str) -> tuple[pa.Table, pa.Table]:
    """Both sides of a shard."""
    sides = (pq.read_table(at / "run" / "filter" / side / name) for side in ("kept", "dropped"))
    return next(sides), next(sides).drop_columns(["dropped_reason"])


class Row(NamedTuple):
    """A row that could be kept."""

    score: float
    n_tokens: int
    row: int


def able(table: pa.Table, given: dict[str, Any]) -> dict[str | None, list[Row]]:
    """The rows that have a score and reach the thresholds, by group (one where there is no per_group), the best
    first; and a group for every value that a scored row has."""
    found: dict[str | None, list[Row]] = {}
    for row in table.to_pylist():
        if row["score"] is None or math.isnan(row["score"]):
            continue
        group = found.setdefault(row["group"] if given.get("per_group") else None, [])
        whole = row["int_score"] if row["int_score"] is not None else -math.inf
        low = np.float32(given.get("min_score", -math.inf))
        if row["score"] >= low and whole >= given.get("min_int_score", -math.inf):
            group.append(Row(row["score"], row["n_tokens"], row["row"]))
    return {name: sorted(rows, reverse=True) for name, rows in found.items()}


def wanted(table: pa.Table, group: str | None, given: dict[str, Any]) -> int | None:
    """Documents or tokens to keep of a group; None where only thresholds count."""
    rows = (row for row in table.to_pylist() if row["score"] is not None and not math.isnan(row["score"]))
    n = sum(not given.get("per_group") or row["group"] == group for row in rows)
    share = round(np.float64(given["keep_share"]) * n) if "keep_share" in given else None
    return next(
        (each for each in (share, given.get("keep_documents"), given.get("keep_tokens")) if each is not None), None
    )


def expected(rows: list[Row], amount: int | None, by_tokens: bool) -> set[int]:
    """The rows of a group to keep: ties together, as many as it takes to reach the documents that are wanted, as many
    as there is room for in the tokens."""
    kept: set[int] = set()
    n = 0
    for _, tied in groupby(rows, key=lambda row: row.score):
        together = [*tied]
        weight = sum(row.n_tokens for row in together) if by_tokens else len(together)
        if amount is not None and (n + weight > amount if by_tokens else n >= amount):
            break
        kept, n = kept | {row.row for row in together}, n + weight
    return kept


@tried(50)
@given(rows=SHARDS, given=CUT, per_group=st.booleans())
def test_any_cut_of_any_corpus_keeps_just_what_it_should(
    rows: list[list[Any]], given: dict[str, Any], per_group: bool
):
    by_amount = not given.keys() <= {"min_score", "min_int_score"}
    given = {**given, "per_group": "group"} if per_group and by_amount else given
    with folder() as at:
        (at / "scored").mkdir()
        table = scored(at / "scored", rows)
        groups = able(table, given)
        amounts = {name: wanted(table, name, given) for name in groups}
        kept = {i for name, of in groups.items() for i in expected(of, amounts[name], "keep_tokens" in given)}
        result = cut(at, given)
        if result is None:
            assert not kept and any(groups.values()), "refused, though there was something to keep"
            return
        assert result.n_rows == result.n_kept + result.n_dropped == table.num_rows
        assert (result.n_kept, sum(result.dropped.values())) == (len(kept), result.n_dropped)
        for group in result.groups:
            assert group["n_kept"] <= group["n_rows"]
        for name in (path.name for path in (at / "scored").iterdir()):
            before = bits(pq.read_table(at / "scored" / name))
            sides = [bits(side) for side in kept_and_dropped(at, name)]
            is_kept = [row[ROW_COLUMN] in kept for row in before]
            assert sides[0] == [row for row, stays in zip(before, is_kept, strict=True) if stays]
            assert sides[1] == [row for row, stays in zip(before, is_kept, strict=True) if not stays]


ROW_COLUMN = 3
"""Where `bits` has the row's place: behind the score, whether it is null, and the text."""


@tried(25)
@given(rows=SHARDS, given=CUT, temperature=st.floats(0.001, 1000), output=st.sampled_from(["parquet", "jsonl"]))
def test_a_draw_loses_no_row_and_keeps_no_more_tokens_than_asked(
    rows: list[list[Any]], given: dict[str, Any], temperature: float, output: str
):
    assume(not given.keys() <= {"min_score", "min_int_score"})
    given = {**given, "sampling": "gumbel", "temperature": temperature, "output_format": output}
    with folder() as at:
        (at / "scored").mkdir()
        table = scored(at / "scored", rows)
        result = cut(at, given)
        if result is None:
            return
        assert result.n_rows == result.n_kept + result.n_dropped == table.num_rows
        suffix = {"parquet": "parquet", "jsonl": "jsonl"}[output]
        files = [
            at / "run/filter" / side / f"part-{i}.{suffix}" for side in ("kept", "dropped") for i in range(len(rows))
        ]
        sides = [row for path in files for row in read(path)[0]]
        assert sorted(row["row"] for row in sides) == table["row"].to_pylist()
        kept = [row for path in files[: len(rows)] for row in read(path)[0]]
        assert len(kept) == result.n_kept
        if "keep_tokens" in given:
            assert sum(row["n_tokens"] for row in kept) <= given["keep_tokens"]
        else:
            rows_able, amount = able(table, given).get(None, []), wanted(table, None, given) or 0
            assert len(kept) >= min(amount, len(rows_able))
