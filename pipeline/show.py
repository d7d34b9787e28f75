"""Ratings and labels read by a person, document by document, or handed to one to be rated by hand."""

import csv
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipeline.errors import UserError
from pipeline.gold import defused
from pipeline.pairs import as_dict, pairs
from pipeline.shards import first_line
from pipeline.storage import atomic
from pipeline.tracking import check_format

if TYPE_CHECKING:
    from pipeline.cli import Selection

FILES = (
    "rate/ratings.parquet",
    "label/labels.parquet",
    "ratings.parquet",
    "labels.parquet",
    "replies.parquet",
    "rl/replies.parquet",
)
"""What is shown of a run folder, or of a stage's."""
RATINGS = {"id", "text", "score", "reason", "spread", "stratum", "group", "round", "gold", "opinions"}
LABELS = {"id", "text", "reason", "unknown", "answer", "stratum"}
REPLIES = {"user_input", "before", "after", "teacher_before", "teacher_after", "reward_before", "reward_after"}
"""Columns that tell the three kinds of file."""
SIDE = {"prompt": pa.string(), "score": pa.float64(), "reason": pa.string(), "answer": pa.string()}
PAIR = pa.schema(
    {
        **dict.fromkeys(("id", "text"), pa.string()),
        **dict.fromkeys(("score", "gain"), pa.float64()),
        "reason": pa.string(),
        "spread": pa.float64(),
        "opinions": pa.list_(pa.struct({**SIDE, "attributes": pairs(pa.string())})),
    }
)
"""Reply pairs as they are shown."""
LIGHT = ("text", "score", "reason", "spread")
"""Columns that documents are chosen and ordered by."""
HOSTILE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters that could steer a terminal, and those that turn the direction of writing."""
LIKELIEST = 5
"""Probabilities shown of each opinion."""
MAPS = ("attributes", "log_probs")
"""Maps of an opinion."""
AT_A_TIME = 256

Row = dict[str, Any]


def run(path: Path, selection: "Selection") -> None:
    """Show a selection of the documents: in a pager on a terminal, else as text or JSON lines; or export it."""
    table = load(find(path))
    if selection.export and "gain" in table.schema.names:
        raise UserError("--open: replies are no documents to be rated; give the run's rate folder")
    check(table, selection)
    chosen = choose(table, selection)
    if selection.export:
        export(selection.export, list(rows(table.select(["id", "text"]), chosen)), selection)
        return
    try:
        show(table, chosen, selection)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(table: pa.Table, chosen: Sequence[int], selection: "Selection") -> None:
    """The chosen documents on stdout."""
    if selection.as_json:
        for row in rows(table, chosen):
            sys.stdout.write(harmless_json(row) + "\n")
        return
    pages = (page(row, number, len(chosen), selection.chars) for number, row in enumerate(rows(table, chosen), 1))
    if not sys.stdout.isatty():
        sys.stdout.writelines(pages)
        return
    console = Console()
    with console.pager():
        for text in pages:
            console.print(text, markup=False, highlight=False, emoji=False)


# -- the file ---------------------------------------------------------------------------------------------------------


def find(path: Path) -> Path:
    """The ratings or labels of a run folder, of a stage's folder, or the file itself."""
    for folder in (path, path.parent, *(path / Path(name).parent for name in FILES)):
        check_format(folder)
    if path.is_file():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        what = "holds neither ratings nor labels nor replies" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a run folder, or its rate/ratings.parquet or label/labels.parquet")
    return found[0]


def load(path: Path) -> pa.Table:
    """The file's table, if this version wrote it."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)}); make it again") from None
    names = set(table.schema.names)
    if names >= REPLIES:
        return with_opinions(table)
    if names >= RATINGS or names >= LABELS:
        return table
    if names >= {"id", "text", "score", "reason"}:
        raise UserError(
            f"{path} was written by another version; remove it and rate again, answers are not asked twice"
        )
    there = ", ".join(table.schema.names) or "none"
    raise UserError(f"{path} holds neither ratings nor labels; its columns are: {clean(there)}")


def with_opinions(table: pa.Table) -> pa.Table:
    """Reply pairs as ratings: the prompt is the text, its score the teacher's of the reply after, and the replies are
    two opinions."""
    return pa.Table.from_pylist([reply_pair(number, row) for number, row in enumerate(table.to_pylist())], PAIR)


def reply_pair(number: int, row: Row) -> Row:
    """One of them."""
    before, after = row["teacher_before"], row["teacher_after"]
    gain = None if before is None or after is None else after - before
    return {
        "id": str(number),
        "text": row["user_input"],
        "score": after,
        "gain": gain,
        "reason": "unscored" if after is None else None,
        "spread": None if gain is None else abs(gain),
        "opinions": [
            {
                "prompt": side,
                "score": row[f"teacher_{side}"],
                "reason": "unscored" if row[f"teacher_{side}"] is None else None,
                "attributes": [] if row[f"reward_{side}"] is None else [("reward", row[f"reward_{side}"])],
                "answer": row[side],
            }
            for side in ("before", "after")
        ],
    }


# -- the selection ----------------------------------------------------------------------------------------------------


def check(table: pa.Table, selection: "Selection") -> None:
    """Refuse filters that cannot find anything."""
    low, high = selection.min_score, selection.max_score
    by_score = low is not None or high is not None
    if "score" not in table.schema.names and (by_score or selection.order in ("score", "-score", "spread")):
        raise UserError(
            "show: labels have no score to choose or order by; leave --min-score, --max-score and --order out"
        )
    if by_score and (selection.unscored or selection.reason):
        raise UserError(
            "show: a document without a score has no lowest or highest; leave --min-score, --max-score out"
        )
    if low is not None and high is not None and low > high:
        raise UserError(f"show: --min-score {low:g} is above --max-score {high:g}")
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason)
    if selection.reason and selection.reason not in reasons:
        there = ", ".join(f"{clean(reason)} {count}" for reason, count in reasons.items()) or "none"
        raise UserError(f"show: --reason {selection.reason}: no document has it; there are: {there}")


def choose(table: pa.Table, selection: "Selection") -> list[int]:
    """The places in the table of the documents that match, in the order asked for."""
    light = table.select([name for name in LIGHT if name in table.schema.names]).to_pylist()
    found = [place for place, row in enumerate(light) if matches(row, selection)]
    if selection.order == "random":
        random.Random(selection.seed).shuffle(found)  # noqa: S311
    elif selection.order:
        name, sign = selection.order.removeprefix("-"), 1 if selection.order == "score" else -1
        found.sort(key=lambda place: last_if_none(light[place][name], sign))
    return found[: selection.n]


def matches(row: Row, selection: "Selection") -> bool:
    """Whether a document passes every filter; one without a score passes none on scores."""
    score, low, high = row.get("score"), selection.min_score, selection.max_score
    return (
        (low is None or (score is not None and score >= low))
        and (high is None or (score is not None and score <= high))
        and (not selection.unscored or row["reason"] is not None)
        and (selection.reason is None or row["reason"] == selection.reason)
        and (selection.contains is None or selection.contains.casefold() in row["text"].casefold())
    )


def last_if_none(value: float | None, sign: int) -> tuple[bool, float]:
    """A sorting key: by value, downwards for sign -1, what is missing last."""
    return value is None, sign * (value or 0.0)


def rows(table: pa.Table, chosen: Sequence[int]) -> Iterator[Row]:
    """The chosen rows, maps as dicts."""
    for start in range(0, len(chosen), AT_A_TIME):
        for row in table.take(pa.array(chosen[start : start + AT_A_TIME], pa.int64())).to_pylist():
            opinions = row.get("opinions")
            row = with_dicts(row, "probabilities")
            yield {**row, "opinions": [with_dicts(each, *MAPS) for each in opinions]} if opinions else row


def with_dicts(row: Row, *names: str) -> Row:
    """A row, these maps of it as dicts."""
    return {**row, **{name: as_dict(row[name]) for name in names if row.get(name)}}


# -- one document -----------------------------------------------------------------------------------------------------


def page(row: Row, number: int, total: int, chars: int) -> str:
    """A document and what was said of it, fit for a terminal."""
    lines = [f"---- {number} of {total} ---- {row['id']}", *facts(row), "", beginning(row["text"], chars), ""]
    said = row["opinions"] or [] if "opinions" in row else [row]
    for each in said:
        lines += opinion(each, chars)
    return clean("\n".join(lines)) + "\n\n"


def facts(row: Row) -> list[str]:
    """What is known of a document, a kind a line: figures or labels, then why there are none."""
    names = list(row)
    given = names[names.index("text") + 1 : names.index("reason")]
    if "spread" in row:
        given += names[names.index("reason") + 1 : names.index("spread") + 1]
    given += ["stratum", "group", *(["round"] if row.get("round") else []), "gold"]
    lines = ["   ".join(f"{name} {value(row[name])}" for name in given if row.get(name) is not None)]
    if row["reason"]:
        lines.append(f"unscored: {row['reason']}")
    if row.get("unknown"):
        lines.append(f"not in the taxonomy: {value(row['unknown'])}")
    return lines


def value(found: object) -> str:
    """A figure with two digits, labels side by side."""
    if isinstance(found, float):
        return f"{found:.2f}"
    return ", ".join(map(str, found)) or "none" if isinstance(found, list) else str(found)


def opinion(said: Row, chars: int) -> list[str]:
    """One opinion: whose, what, in which words and how sure."""
    who = "  ".join(str(said[name]) for name in ("prompt", "teacher") if said.get(name))
    repeat = f"  repeat {said['repeat']}" if said.get("repeat") else ""
    what = value(said["score"]) if said.get("score") is not None else said["reason"] or ""
    named = "".join(f"  {name} {value(each)}" for name, each in (said.get("attributes") or {}).items())
    lines = [f"  {who}{repeat}  {what}{named}".rstrip()]
    if said.get("answer"):
        lines += [f"    | {line}" for line in beginning(said["answer"], chars).splitlines()]
    if said.get("log_probs"):
        lines.append("    " + likeliest(said["log_probs"]))
    return lines


def likeliest(log_probs: dict[str, float]) -> str:
    """The likeliest answers and their probabilities."""
    top = sorted(log_probs.items(), key=lambda item: -item[1])[:LIKELIEST]
    return "   ".join(f"{answer.strip()!r} {math.exp(log_prob):.3f}" for answer, log_prob in top)


def beginning(text: str, chars: int) -> str:
    """The first so many characters, and how many follow."""
    return text if len(text) <= chars else f"{text[:chars].rstrip()} [... {len(text) - chars:,} more characters]"


def clean(text: str) -> str:
    """Text that cannot steer a terminal: hostile characters are shown as pictures, or as U+FFFD."""
    return HOSTILE.sub(picture, text.replace("\r\n", "\n"))


def picture(found: re.Match[str]) -> str:
    """What stands for a hostile character."""
    return chr(0x2400 + ord(found[0])) if ord(found[0]) < 0x20 else "\ufffd"


def harmless_json(row: Row) -> str:
    """One JSON line; what JSON leaves as it is but a terminal may obey is escaped."""
    return HOSTILE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(row, ensure_ascii=False))


# -- rating by hand ---------------------------------------------------------------------------------------------------


def export(path: Path, documents: list[Row], selection: "Selection") -> None:
    """A CSV for a human: id, text, and an empty human_score; shuffled, and nothing of what a teacher said."""
    check_export(path, documents)
    random.Random(selection.seed).shuffle(documents)  # noqa: S311
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "human_score"])
        writer.writerows([cell(row["id"]), cell(row["text"]), ""] for row in documents)
    if selection.as_json or not sys.stdout.isatty():
        sys.stdout.write(json.dumps({"file": str(path), "n_documents": len(documents)}, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"{path}: {len(documents)} documents; fill in human_score, then give the file as --gold\n")


def check_export(path: Path, documents: list[Row]) -> None:
    """Refuse a file that is there, and one that could not be read back."""
    if path.suffix.lower() != ".csv":
        raise UserError(f"--open: {path} must end in .csv")
    if os.path.lexists(path):
        raise UserError(f"--open: {path} is there already, and somebody's scores may be in it; give another name")
    if not documents:
        raise UserError("--open: no document matches; choose with other filters")
    [(name, count)] = Counter(row["id"] for row in documents).most_common(1)
    if count > 1:
        raise UserError(f"--open: {count} documents have the id {clean(name)}; rate with another corpus.id_column")


def cell(text: str) -> str:
    """Text that a spreadsheet shows and never runs; NUL, which no CSV can hold, is U+FFFD."""
    return defused(text.replace("\0", "\ufffd"))
