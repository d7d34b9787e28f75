"""Reading ratings and labels, and handing documents to a person."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cli, gold, labels, ratings
from pipeline import show as reader
from pipeline.cli import Selection
from pipeline.errors import UserError
from pipeline.taxonomy import Taxonomy

HOSTILE = "\x1b]0;owned\x07\x1b[2Jred\x9b31m\x08\x7f\u202etxt\r\nend"


def said(score: float | None, **more: Any) -> dict[str, Any]:
    """One opinion."""
    none = dict.fromkeys(field.name for field in ratings.OPINION)
    reason = None if score is not None else "no_score"
    return {**none, "prompt": "edu", "teacher": "tiny", "repeat": 0, "score": score, "reason": reason, **more}


ROWS = [
    {
        "id": "good",
        "text": "Photosynthesis turns light into sugar. " * 30,
        "score": 4.5,
        "clarity": 3.0,
        "spread": 0.5,
        "n_opinions": 2,
        "probabilities": [(0.0, 0.1), (5.0, 0.9)],
        "stratum": "web",
        "group": "example.org",
        "round": 2,
        "gold": 5.0,
        "opinions": [
            said(5.0, answer="Score: 5", attributes=[("clarity", 3.0)]),
            said(4.0, repeat=1, log_probs=[("4", math.log(0.75)), ("5", math.log(0.25))]),
        ],
    },
    {"id": "bad", "text": "buy now", "score": 0.0, "spread": 0.0, "n_opinions": 2, "opinions": [said(0.0), said(0.0)]},
    {"id": "lost", "text": HOSTILE, "reason": "no_score", "n_opinions": 0, "opinions": [said(None, answer=HOSTILE)]},
    {
        "id": "torn",
        "text": "=cmd() or PHOTOSYNTHESIS",
        "score": 2.5,
        "spread": 2.5,
        "n_opinions": 2,
        "opinions": [said(5.0), said(0.0)],
    },
]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with four ratings: one without a score, one with hostile text."""
    (tmp_path / "run" / "rate").mkdir(parents=True)
    table = pa.Table.from_pylist(ROWS, ratings.schema((0, 5), {"clarity": (0, 5)}))
    pq.write_table(table, tmp_path / "run" / "rate" / "ratings.parquet")
    return tmp_path / "run"


@pytest.fixture
def labels_file(tmp_path: Path) -> Path:
    """Two levels and several labels a document; the second document has none that the taxonomy knows."""
    nursing = {"domain": ["Health"], "use_case": ["Nursing"], "labels": ["Health > Nursing"]}
    rows = [
        {"id": "a", "text": "Nurses at work.", **nursing, "answer": "nursing", "prompt": "domains", "teacher": "tiny"},
        {"id": "b", "text": "Odd.", "reason": "no_label", "unknown": ["Oddity"], "answer": "Oddity"},
        {"id": "c", "text": "Nothing.", "domain": [], "use_case": [], "labels": [], "answer": "[]"},
    ]
    taxonomy = Taxonomy.model_validate(
        {"levels": ["domain", "use_case"], "labels": [{"name": "Health", "labels": ["Nursing", "Surgery"]}]}
    )
    path = tmp_path / "label" / "labels.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, labels.schema(taxonomy, multi=True)), path)
    return path


def shown(capsys: pytest.CaptureFixture[str], path: Path, *flags: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["show", str(path), *map(str, flags)])
    captured = capsys.readouterr()
    assert not stop.value.code, captured.err
    return captured.out


def ids(capsys: pytest.CaptureFixture[str], path: Path, *flags: object) -> list[str]:
    return [json.loads(line)["id"] for line in shown(capsys, path, "--json", *flags).splitlines()]


def refused(capsys: pytest.CaptureFixture[str], path: Path, *flags: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["show", str(path), *map(str, flags)])
    captured = capsys.readouterr()
    assert stop.value.code in (1, 2) and captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_document_is_shown_with_everything_that_was_said_of_it(run_folder: Path, capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, run_folder, "--n", 1, "--chars", 40)
    assert out == (
        "---- 1 of 1 ---- good\n"
        "score 4.50   clarity 3.00   spread 0.50   stratum web   group example.org   round 2   gold 5.00\n"
        "\n"
        "Photosynthesis turns light into sugar. P [... 1,130 more characters]\n"
        "\n"
        "  edu  tiny  5.00  clarity 3.00\n"
        "    | Score: 5\n"
        "  edu  tiny  repeat 1  4.00\n"
        "    '4' 0.750   '5' 0.250\n"
        "\n"
    )


def test_a_missing_score_is_shown_as_its_reason_and_a_zero_as_a_zero(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
):
    out = shown(capsys, run_folder)
    assert "---- 2 of 4 ---- bad\nscore 0.00   spread 0.00\n" in out
    assert "---- 3 of 4 ---- lost\n\nunscored: no_score\n" in out


def test_labels_are_shown_by_level(labels_file: Path, capsys: pytest.CaptureFixture[str]):
    for path in (labels_file, labels_file.parent, labels_file.parent.parent):
        out = shown(capsys, path)
        assert "---- a\ndomain Health   use_case Nursing   labels Health > Nursing\n\nNurses at work.\n" in out
        assert "  domains  tiny\n    | nursing\n" in out
        assert "unscored: no_label\nnot in the taxonomy: Oddity\n" in out and "    | Oddity\n" in out
        assert "---- c\ndomain none   use_case none   labels none\n\nNothing.\n" in out
    assert ids(capsys, labels_file, "--unscored") == ["b"]


@pytest.mark.parametrize("part", ["", "rate", "rate/ratings.parquet"])
def test_a_path_is_a_run_a_stage_or_a_file(run_folder: Path, part: str, capsys: pytest.CaptureFixture[str]):
    assert ids(capsys, run_folder / part) == ["good", "bad", "lost", "torn"]


def test_json_lines_hold_whole_rows(run_folder: Path, capsys: pytest.CaptureFixture[str]):
    found = [json.loads(line) for line in shown(capsys, run_folder, "--json").splitlines()]
    assert [row["text"] for row in found] == [row["text"] for row in ROWS]
    assert found[0]["opinions"][1]["log_probs"] == {"4": math.log(0.75), "5": math.log(0.25)}
    assert found[0]["opinions"][0]["attributes"] == {"clarity": 3.0}
    assert found[2]["score"] is None and found[1]["score"] == 0.0


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_no_document_can_steer_the_terminal(run_folder: Path, flags: list[str], capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, run_folder, *flags)
    assert not [
        char for char in out if (ord(char) < 32 and char != "\n") or 0x7F <= ord(char) < 0xA0 or char == "\u202e"
    ]
    if not flags:
        assert "␛]0;owned␇␛[2Jred\ufffd31m␈\ufffd\ufffdtxt\nend" in out


def test_a_reader_who_has_seen_enough_is_no_error(run_folder: Path):
    pq.write_table(
        pa.concat_tables([pq.read_table(run_folder / "rate" / "ratings.parquet")] * 500),
        run_folder / "ratings.parquet",
    )
    command = f"{sys.executable} -m pipeline show {run_folder / 'ratings.parquet'} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "---- 1 of 2000 ---- good\n", "")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_terminal_gets_a_pager(run_folder: Path):
    ours, theirs = os.openpty()
    environment = {**os.environ, "PAGER": "sed s/^/paged:/", "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "pipeline", "show", str(run_folder), "--n", "2"]
    subprocess.run(command, stdin=theirs, stdout=theirs, env=environment, check=True, cwd=Path(__file__).parent.parent)
    os.close(theirs)
    assert "paged:---- 2 of 2 ---- bad" in os.read(ours, 65536).decode()


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--min-score", 2.5], ["good", "torn"]),
        (["--max-score", 2.5], ["bad", "torn"]),
        (["--min-score", 0, "--max-score", 0], ["bad"]),
        (["--min-score", -1], ["good", "bad", "torn"]),
        (["--unscored"], ["lost"]),
        (["--reason", "no_score"], ["lost"]),
        (["--contains", "photoSYNTHESIS"], ["good", "torn"]),
        (["--contains", "photosynthesis", "--max-score", 3], ["torn"]),
        (["--contains", "nowhere"], []),
        (["--order", "score"], ["bad", "torn", "good", "lost"]),
        (["--order", "-score"], ["good", "torn", "bad", "lost"]),
        (["--order", "spread"], ["torn", "good", "bad", "lost"]),
        (["--order", "-score", "--n", 2], ["good", "torn"]),
        (["--n", 99], ["good", "bad", "lost", "torn"]),
    ],
)
def test_documents_are_chosen_and_ordered(
    run_folder: Path, flags: list[object], found: list[str], capsys: pytest.CaptureFixture[str]
):
    assert ids(capsys, run_folder, *flags) == found


def test_a_random_order_is_that_of_its_seed(run_folder: Path, capsys: pytest.CaptureFixture[str]):
    orders = [ids(capsys, run_folder, "--order", "random", "--seed", seed) for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == ["bad", "good", "lost", "torn"] for order in orders)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--min-score", 4, "--max-score", 3], "--min-score 4 is above --max-score 3"),
        (["--unscored", "--min-score", 3], "a document without a score has no lowest or highest"),
        (["--reason", "refused"], "no document has it; there are: no_score 1"),
        (["--order", "best"], "--order: input should be"),
        (["--n", 0], "--n: input should be greater"),
        (["--min-scor", 0], "--min-scor"),
    ],
)
def test_a_bad_filter_is_one_line(
    run_folder: Path, flags: list[object], said: str, capsys: pytest.CaptureFixture[str]
):
    assert said in refused(capsys, run_folder, *flags)


@pytest.mark.parametrize("flags", [["--min-score", 1], ["--order", "spread"]])
def test_labels_have_no_scores_to_choose_by(
    labels_file: Path, flags: list[object], capsys: pytest.CaptureFixture[str]
):
    assert "labels have no score" in refused(capsys, labels_file, *flags)


def test_a_bad_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "absent does not exist; give a run folder" in refused(capsys, tmp_path / "absent")
    assert "holds neither ratings nor labels nor replies; give a run folder" in refused(capsys, tmp_path)
    (tmp_path / "a.parquet").write_text("no parquet")
    assert "a.parquet cannot be read as parquet" in refused(capsys, tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "ur\x1bl": ["b"]}), tmp_path / "a.parquet")
    assert "holds neither ratings nor labels; its columns are: text, ur␛l" in refused(capsys, tmp_path / "a.parquet")


def test_ratings_of_another_version_are_named_so(run_folder: Path, capsys: pytest.CaptureFixture[str]):
    path = run_folder / "rate" / "ratings.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["opinions", "spread"]), path)
    assert "ratings.parquet was written by another version; remove it and rate again" in refused(capsys, run_folder)


# -- rating by hand ---------------------------------------------------------------------------------------------------


def cells(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def test_what_was_exported_and_filled_in_comes_back_as_gold(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "by-hand.csv"
    assert json.loads(shown(capsys, run_folder, "--open", path)) == {"file": str(path), "n_documents": 4}
    header, *documents = cells(path)
    given = {"good": "4,5", "bad": "0", "lost": "", "torn": "2"}
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows(
            [header, *([name, text, given[name]] for name, text, _ in documents)]
        )
    found = {document.id: (document.text, document.mean) for document in gold.read(path)[0]}
    texts = {row["id"]: row["text"] for row in ROWS}
    assert found == {"good": (texts["good"], 4.5), "bad": (texts["bad"], 0.0), "torn": (texts["torn"], 2.0)}
    assert [text for name, text, _ in documents if name == "lost"] == [HOSTILE]


def test_an_export_does_not_sway_the_rater(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shown(capsys, run_folder, "--open", tmp_path / "a.csv", "--order", "-score")
    header, *documents = cells(tmp_path / "a.csv")
    assert header == ["id", "text", "human_score"]
    assert {len(row) for row in documents} == {3} and {row[2] for row in documents} == {""}
    orders = set()
    for seed in range(6):
        shown(capsys, run_folder, "--open", tmp_path / f"{seed}.csv", "--order", "-score", "--seed", seed)
        orders.add(tuple(row[0] for row in cells(tmp_path / f"{seed}.csv")[1:]))
    assert len(orders) > 2
    shown(capsys, run_folder, "--open", tmp_path / "b.csv", "--order", "-score")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_an_export_holds_the_selection_and_no_formula(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shown(capsys, run_folder, "--open", tmp_path / "a.csv", "--contains", "cmd()")
    assert cells(tmp_path / "a.csv")[1:] == [["torn", "'=cmd() or PHOTOSYNTHESIS", ""]]


def test_an_export_never_overwrites(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "a.csv"
    path.write_text("weeks of work")
    assert "a.csv is there already" in refused(capsys, run_folder, "--open", path)
    assert path.read_text() == "weeks of work"
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere.csv")
    assert "link.csv is there already" in refused(capsys, run_folder, "--open", tmp_path / "link.csv")


def test_an_export_that_could_not_be_read_back_is_refused(run_folder: Path, tmp_path: Path):
    table = reader.load(run_folder / "rate" / "ratings.parquet")
    for name, kept, said in (
        ("a.xlsx", [0], "must end in .csv"),
        ("a.csv", [], "no document"),
        ("a.csv", [0, 0], "have the id good"),
    ):
        with pytest.raises(UserError, match=said):
            reader.export(tmp_path / name, list(reader.rows(table, kept)), Selection())
        assert not (tmp_path / name).exists()


# -- a real run -------------------------------------------------------------------------------------------------------


def test_the_ratings_of_a_real_run_are_shown_and_exported(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        cli.main(["rate", str(recipe_file)])
    assert not stop.value.code, capsys.readouterr().err
    capsys.readouterr()
    out = shown(capsys, tmp_path / "run", "--n", 3, "--order", "-score")
    assert "---- 3 of 3 ---- doc-" in out and "score " in out and "' educational'".replace(" ", "") in out
    shown(capsys, tmp_path / "run", "--n", 3, "--open", tmp_path / "a.csv")
    with pytest.raises(UserError, match="no human score in 3 rows"):
        gold.read(tmp_path / "a.csv")
