"""The run as one page, drawn from real runs, half of one, and none."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import bars, cli, config, pictures, report, summary, verdict
from pipeline.config import Recipe

HOSTILE = "</pre></details><script>alert(1)</script> {{ 7 * 7 }} {%<img src=x onerror=alert(2)> \x1b[31m \u202egnirts"
ALONE = {"meta", "link", "img", "br", "hr", "input", "rect", "path", "use", "circle", "line"}
"""Elements that may stand without an end."""
SECTIONS = ("stages", "ratings", "student", "corpus", "cuts", "audit", "shortcuts", "documents", "kept", "settings")


class Page(HTMLParser):
    """What a browser would make of a page: tags in balance, links, names, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ALONE:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], tiny_causal: Path, tiny_encoder: Path
) -> tuple[Path, Path]:
    """A recipe and its run folder after every stage, on small models; one document is hostile."""
    folder = tmp_path_factory.mktemp("report")
    prompt = folder / "prompt.md"
    prompt.write_text(
        "---\nscale: [0, 5]\nread: choices\nanswer_start: This text is\nchoices:\n"
        '  - {value: 5, answers: [" educational"]}\n  - {value: 0, answers: [" spam"]}\n---\n'
        "What kind of text is this?\n\n{{ text }}\n",
        encoding="utf-8",
    )
    rows = [{"id": f"doc-{i}", "text": text, "lang": ["da", "en"][i % 2]} for i, text in enumerate([*texts, HOSTILE])]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "run_folder": str(folder / "run"),
        "corpus": {"path": str(folder / "corpus.jsonl"), "id_column": "id"},
        "teacher": {"model": str(tiny_causal), "document_tokens": 64, "dtype": "float32", "device": "cpu"},
        "encoder": {"model": str(tiny_encoder), "max_tokens": 32, "dtype": "float32", "device": "cpu"},
        "rate": {"prompt": str(prompt), "sample": len(rows)},
        "cuts": {"by": ["lang"]},
        "audit": {"sample": 20, "strata": 2},
        "filter": {"keep_share": 0.3},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    for command in ("run", "plan", "audit", "report"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, str(path)])
        assert not stop.value.code, command
    return path, folder / "run"


def drawn(run_folder: Path, **settings: Any) -> tuple[report.ReportResult, Page]:
    """The page of a run folder that is asked for by its folder alone."""
    result = report.run(Recipe(run_folder=run_folder, **settings))
    return result, Page(Path(result.page))


@pytest.fixture
def half(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run, to take away from."""
    return shutil.copytree(finished[1], tmp_path / "run")


def test_a_finished_run_is_one_page_with_every_section(finished: tuple[Path, Path]):
    page = Page(finished[1] / "report/report.html")
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert page.open == [] and page.tags.count("section") == len(SECTIONS)
    assert page.tags.count("svg") >= 8
    for words in (
        "Spearman",
        "kept: precision",
        "Calibration",
        "What more ratings",
        "Answers to read",
        "Length alone",
    ):
        assert words in page.text or words == "Length alone", words
    assert "–\n" not in page.text[: page.text.index("Stages")]


def test_the_page_needs_nothing_else(finished: tuple[Path, Path]):
    page = Page(finished[1] / "report/report.html")
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    for link in page.links:
        assert link.startswith(("#", "../")), link
        if link.startswith("../"):
            assert (finished[1] / "report" / link).exists(), link
    assert not re.search(r"@import|url\((?!#)", page.raw)
    assert len(page.raw.encode()) < 3_000_000


def test_a_hostile_document_is_text(half: Path):
    _, page = drawn(half, report=config.Report(examples=100))
    assert "alert(1)" in page.text and "{{ 7 * 7 }}" in page.text
    assert "img" not in page.tags and "script" not in page.tags
    assert "\x1b" not in page.raw and "\u202e" not in page.raw and "␛[31m" in page.text


def test_charts_take_their_inks_from_the_page_in_light_dark_and_print(finished: tuple[Path, Path]):
    page = Page(finished[1] / "report/report.html")
    charts = "".join(re.findall(r"<svg.*?</svg>", page.raw, re.DOTALL))
    assert not re.search(r"(fill|stroke): ?#[0-9a-f]{3}", charts, re.IGNORECASE)
    used = set(re.findall(r"var\((--[\w-]+)\)", charts))
    light, dark, printed = (part.split("}")[0] for part in page.raw.split(":root {")[1:])
    assert used and all(f"{name}:" in themes for name in used for themes in (light, dark, printed))


def test_names_in_the_page_are_its_own(finished: tuple[Path, Path]):
    page = Page(finished[1] / "report/report.html")
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([\w-]+)\)", page.raw)) <= set(page.ids)


def test_parts_of_long_documents_are_compared_through_the_student(finished: tuple[Path, Path]):
    found = json.loads((finished[1] / "report/shortcuts.json").read_text())
    assert found["along"]["n"] > 20 and set(found["along"]["means"]) == {"begin", "middle", "end"}
    assert {each["name"] for each in found["shortcuts"]} >= {"language"}


def test_documents_at_the_ends_are_the_highest_and_the_lowest(finished: tuple[Path, Path]):
    from pipeline import examples

    looked = examples.look(config.load_recipe(finished[0], {}), 1000, 2)
    scores = sorted(pq.read_table(finished[1] / "score/scored", columns=["score"])["score"].to_pylist())
    ends = looked.ends["score"]
    assert [row["score"] for row in ends["top"]] == scores[::-1][:10]
    assert [row["score"] for row in ends["bottom"]] == scores[:10]
    assert sorted(row["score"] for row in looked.sample) == scores
    assert all(row["int_score"] == value for value, rows in looked.at.items() for row in rows)
    assert all(1 <= len(rows) <= 2 for rows in looked.at.values())


def test_a_second_report_is_skipped_and_a_change_draws_it_again(half: Path, caplog: pytest.LogCaptureFixture):
    first, _ = drawn(half)
    page = half / "report/report.html"
    before = page.stat().st_mtime_ns
    assert drawn(half)[0] == first and page.stat().st_mtime_ns == before
    kept, shortcuts = half / "filter/result.json", (half / "report/shortcuts.json").stat().st_mtime_ns
    kept.write_text(kept.read_text().replace('"n_kept"', '"n_kept_otherwise": 1, "n_kept"'))
    drawn(half)
    assert page.stat().st_mtime_ns > before
    assert (half / "report/shortcuts.json").stat().st_mtime_ns == shortcuts


@pytest.mark.parametrize("gone", [("rate",), ("train", "score", "cuts", "audit", "filter"), ("rate", "train")])
def test_a_run_without_some_stages_is_a_page_that_names_their_commands(half: Path, gone: tuple[str, ...]):
    for name in gone:
        shutil.rmtree(half / name)
    result, page = drawn(half)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS) and page.open == []
    assert {name for name, state in result.states.items() if state == "not begun"} >= set(gone)
    for name in gone:
        assert report.STAGES[name] in page.text


def test_an_empty_run_folder_is_a_page(tmp_path: Path):
    result, page = drawn(tmp_path / "new")
    assert "Nothing has been made yet." in page.text and page.open == [] and result.verdict == []
    assert page.text.count("gristmill") > 8


def test_a_stage_at_work_says_how_far_it_is(half: Path):
    for name in ("rate", "score"):
        (half / name / "result.json").unlink()
    result, page = drawn(half)
    assert (result.states["rate"], result.states["score"]) == ("begun", "begun")
    assert "1 of 1 shards" in page.text and "answers" in page.text


def test_results_with_nothing_in_them_are_still_a_page(tmp_path: Path):
    for name in report.STAGES:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "result.json").write_text('{"seconds": 1.5}')
    result, page = drawn(tmp_path)
    assert page.open == [] and set(result.states.values()) == {"done"}


def test_the_terminal_tells_every_stage(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    values = {
        name: summary.state(finished[1] / name) for name in ("rate", "train", "score", "cuts", "audit", "filter")
    }
    page = summary.state(finished[1] / "report")
    summary.show({**values, "report": page, "run_folder": "here"})
    words = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    for told in (
        "macro-F1 of all int scores",
        "at fitted cuts",
        "half up",
        "would buy about",
        "windows",
        "int_score 1",
    ):
        assert told in words, told
    assert "report.html" in words and "from" in summary.tell_audit(values["audit"])


# -- what it says -----------------------------------------------------------------------------------------------------


def learned(**more: Any) -> dict[str, Any]:
    """Figures of a score."""
    figures = {
        "n_test": 50,
        "spearman": 0.8,
        "cut": 2.5,
        "good_share": 0.4,
        "kept": {"precision": 0.75, "recall": 0.6, "f1": 0.67},
        "intervals": {"spearman": [0.7, 0.86], "kept.precision": [0.6, 0.9], "kept.recall": None},
    }
    return {"train": {"targets": {"score": figures | more}}}


def test_the_verdict_says_how_good_the_kept_documents_are():
    known = {"judged_by": "ratings", "precision": 0.9, "precision_interval": [0.85, 0.94], "recall": None}
    filtered = {"n_kept": 300, "n_rows": 1000, "kept_share": 0.3, "quality": {**known, "recall_interval": None}}
    assert verdict.verdict({"filter": filtered})["kept"][1] == (
        "By the ratings, 90% [85%, 94%] of them is good, and an unknown share of what is good is among them."
    )


def test_the_verdict_is_plain_sentences():
    told = verdict.verdict(learned(ceiling={"spearman": 0.9, "spearman_interval": [0.88, 0.93]}))["student"]
    assert told == [
        "The student follows the teacher with a Spearman of 0.80 [0.70, 0.86] on 50 test documents that nothing was"
        " chosen on.",
        "The teacher agrees with itself at 0.90 [0.88, 0.93]: the student reaches 89% of that.",
        "Of what it keeps from 2.50 up, 75% [60%, 90%] is good by the teacher (of everything, 40%), and 60% of what is"
        " good is kept.",
    ]


def test_the_verdict_begins_with_what_tuning_found():
    tuned = {"tune": {"sentence": "No better than the default: nothing that was tried beats it."}}
    told = verdict.verdict({"rate": {"n_scored": 5, "n_sampled": 5}, **tuned})
    assert list(told) == ["tuning", "teacher"] and told["tuning"] == [tuned["tune"]["sentence"]]


def test_the_audit_speaks_of_its_own_cut_and_not_of_what_was_kept_since():
    """filter may have been run again with another cut."""
    audited = {"cut": 3.46, "precision": 0.87, "base_rate": 0.45, "recall": 0.26}
    told = verdict.verdict({"filter": {"n_kept": 356, "n_rows": 1000, "kept_share": 0.356}, "audit": audited})["kept"]
    assert told[1] == (
        "Rated again on the corpus itself, 87% of the documents from 3.46 up is good, against 45% of all; 26% of the"
        " good ones are among them."
    )


@pytest.mark.parametrize(
    ("ceiling", "words"),
    [
        ({"spearman": 0.85, "spearman_interval": [0.8, 0.9]}, "about as good as a second answer"),
        ({"spearman": 0.7, "spearman_interval": None}, "about as good as a second answer"),
        ({"spearman": 0.95, "spearman_interval": [0.94, 0.96]}, "reaches 84% of that"),
    ],
)
def test_the_student_stands_beside_the_ceiling(ceiling: dict[str, Any], words: str):
    assert words in verdict.verdict(learned(ceiling=ceiling))["student"][1]


def test_a_teacher_that_nothing_is_known_of_is_said_to_be_so():
    told = verdict.verdict({"rate": {"n_scored": 40, "n_sampled": 50, "gold": None, "human": None}})["teacher"]
    assert told[0] == "The teacher gave 40 of 50 documents a score; 10 have none, with the reason beside them."
    assert "nothing here tells" in told[1]


def test_figures_stand_with_their_intervals_and_missing_ones_are_a_dash():
    assert report.ranged(0.814, (0.76, 0.85)) == "0.81 [0.76, 0.85]"
    assert (report.ranged(0.814), report.ranged(None, (0, 1)), report.FILTERS["percent"](None)) == ("0.81", "–", "–")
    assert [pictures.short(n) for n in (7, 999, 1000, 9_960, 12_345, 2.5e6)] == [
        "7",
        "999",
        "1.0k",
        "10k",
        "12k",
        "2.5M",
    ]


def test_a_chart_without_intervals_is_drawn():
    line = pictures.Line("precision", [0.1, 0.5], [0.9, 0.6], [None, None])
    assert "precision" not in pictures.lines([line], "share", "") and "<svg" in pictures.lines([line], "share", "")
    assert "recall" in pictures.lines([line, line._replace(name="recall", bands=())], "share", "")


def test_names_in_a_chart_are_text():
    drawn = pictures.dots(["<script>", "$x$ & y"], [0.1, 0.2], [None, (0.1, 0.3)], "R2")
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn and "$x$ &amp; y" in drawn
    counts = {"domain": {"Law <b>": 3, "no match": 1}}
    shown = bars.as_svg(bars.Bars("", counts, "no match", 5, 1))
    assert "Law &lt;b&gt;" in shown and "60%, 3 of 5" in shown and "var(--blue)" in shown


def test_a_scored_corpus_without_documents_has_nothing_to_look_at(tmp_path: Path):
    from pipeline import examples

    folder = tmp_path / "score/scored"
    folder.mkdir(parents=True)
    schema = pa.schema({"text": pa.string(), "score": pa.float32(), "int_score": pa.int8()})
    pq.write_table(schema.empty_table(), folder / "a.parquet")
    looked = examples.look(Recipe(run_folder=tmp_path), 10, 3)
    assert (looked.sample, looked.at, looked.ends) == ([], {}, {"score": {"top": [], "bottom": []}})


def test_copies_of_a_text_stand_once_among_the_ends(tmp_path: Path):
    from pipeline import examples

    folder = tmp_path / "score/scored"
    folder.mkdir(parents=True)
    texts = [*["the same"] * 30, *(f"text {i}" for i in range(20)), None]
    scores = [*[5.0] * 30, *(i / 10 for i in range(20)), None]
    table = pa.table(
        {"text": texts, "score": pa.array(scores, pa.float32()), "int_score": pa.array([1] * 51, pa.int8())}
    )
    pq.write_table(table, folder / "a.parquet")
    looked = examples.look(Recipe(run_folder=tmp_path), 100, 3)
    assert [row["text"] for row in looked.ends["score"]["top"][:2]] == ["the same", "text 19"]
    assert len(looked.ends["score"]["top"]) == 10 and len(looked.sample) == 50
