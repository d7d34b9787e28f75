"""The label stage: what becomes of every document, and of every corpus of a list."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import stamina
from endpoint import Asked, Done, Reply, corpus, error, number, one_line, says, serve, write

from pipeline import bars, cli, corpora, label, labels, prompts
from pipeline.config import Recipe, load_recipe, to_yaml
from pipeline.corpora import Listed
from pipeline.errors import Pending, UserError
from pipeline.reading import Reading
from pipeline.taxonomy import Taxonomy

ROOT = Path(__file__).parent.parent
FLAT = {"labels": ["E-commerce", "Law", "Niñez"]}
TREE = {
    "levels": ["domain", "use_case"],
    "labels": [{"name": "Health", "labels": ["Nursing", "Forms"]}, {"name": "Law", "labels": ["Forms"]}],
}


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


def recipe(folder: Path, url: str, n: int = 8, front: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A recipe that labels n documents at this endpoint."""
    settings = {"read": "label", "labels": FLAT, **(front or {})}
    body = "One of these:\n{{ labels }}\n\n<text>\n{{ text }}\n</text>"
    (folder / "prompt.md").write_text(f"---\n{json.dumps(settings)}\n---\n{body}\n", encoding="utf-8")
    path = folder / "corpus.parquet"
    teacher = {"engine": "openai", "model": "m", "base_url": url, "retries": 0, "concurrency": 1}
    asked = {"prompt": folder / "prompt.md", "sample": n, "max_unscored_rate": 1.0, **sections.get("label", {})}
    return Recipe.model_validate(
        {
            "run_folder": folder / "run",
            "corpus": {"path": str(path if path.exists() else corpus(folder, n)), "id_column": "id"},
            "teacher": {**teacher, **sections.get("teacher", {})},
            "label": asked,
        }
    )


def listing(folder: Path, url: str, lines: list[str], **sections: Any) -> Recipe:
    """A recipe for the corpora on these lines."""
    (folder / "list.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = {"datasets": folder / "list.tsv", **sections.pop("label", {})}
    return recipe(folder, url, label=asked, **sections)


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The labels of a run folder by id."""
    found = pq.read_table(folder / "label" / "labels.parquet").to_pylist()
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def gristmill(recipe: Recipe, *flags: str) -> Done:
    """The real command."""
    path = recipe.run_folder.parent / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "pipeline", "label", str(path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    return Done(done.returncode, done.stdout, done.stderr)


def said(*answers: str) -> Any:
    """doc-<n> gets the n-th answer, over and over."""
    return lambda asked: says(answers[number(asked) % len(answers)])


# -- one corpus


def test_every_document_has_a_row_with_labels_or_a_reason(tmp_path: Path):
    def script(asked: Asked) -> Reply:
        replies = [says("e commerce"), says("Ninez."), says("Shipping"), says("Law", "length"), error(500), says("")]
        return replies[number(asked)] if number(asked) < 6 else says("None of these")

    with serve(script) as endpoint:
        result = label.run(recipe(tmp_path, endpoint.url))
    found = rows(tmp_path / "run")
    assert {name: (row["label"], row["reason"]) for name, row in found.items()} == {
        "id-0": ("E-commerce", None),
        "id-1": ("Niñez", None),
        "id-2": (None, "unknown_label"),
        "id-3": (None, "truncated"),
        "id-4": (None, "request_failed"),
        "id-5": (None, "no_label"),
        "id-6": ("None of these", None),
        "id-7": ("None of these", None),
    }
    assert isinstance(result, label.LabelResult)
    assert (result.n_sampled, result.n_labelled, result.n_failed) == (8, 4, 1)
    assert result.unlabelled == {"unknown_label": 1, "truncated": 1, "request_failed": 1, "no_label": 1}
    assert result.levels == {"label": {"E-commerce": 1, "Law": 0, "Niñez": 1, "None of these": 2}}
    assert result.no_match_share == 0.5
    assert (result.n_unknown_labels, result.unknown_labels) == (1, {"Shipping": 1})
    assert found["id-2"]["unknown"] == ["Shipping"] and found["id-0"]["answer"] == "e commerce"


def test_the_file_holds_a_column_a_level_and_whatever_it_was_made_from(tmp_path: Path):
    with serve(said("Health > Nursing", "law: forms", "None of these")) as endpoint:
        made = recipe(tmp_path, endpoint.url, n=3, front={"labels": TREE})
        result = label.run(made)
    table = pq.read_table(tmp_path / "run/label/labels.parquet")
    assert table.schema.names == [
        *("id", "text", "domain", "use_case", "labels", "reason", "unknown", "answer", "was_truncated"),
        *("prompt_tokens", "answer_tokens", "stratum", "prompt", "prompt_digest", "teacher"),
    ]
    assert json.loads(table.schema.metadata[b"levels"]) == {
        "domain": ["Health", "Law", "None of these"],
        "use_case": ["Nursing", "Forms", "None of these"],
    }
    found = rows(tmp_path / "run")
    assert [(each["domain"], each["use_case"], each["labels"]) for _, each in sorted(found.items())] == [
        ("Health", "Nursing", ["Health > Nursing"]),
        ("Law", "Forms", ["Law > Forms"]),
        ("None of these", "None of these", ["None of these"]),
    ]
    assert found["id-0"]["teacher"] == "m" and found["id-0"]["prompt"] == "prompt"
    assert found["id-0"]["prompt_digest"] == prompts.load(tmp_path / "prompt.md").digest
    assert (found["id-0"]["prompt_tokens"], found["id-0"]["answer_tokens"]) == (100, 7)
    assert isinstance(result, label.LabelResult)
    assert result.levels["use_case"] == {
        "Health > Nursing": 1,
        "Health > Forms": 0,
        "Law > Forms": 1,
        "None of these": 1,
    }
    assert (result.prompt_tokens, result.answer_tokens) == (300, 21)


def test_a_document_with_several_labels_counts_once_for_each_at_each_level(tmp_path: Path):
    answers = ('{"labels": ["Nursing", "Health > Forms", "None of these"]}', '{"labels": ["Law > Forms", "Tax"]}')
    with serve(said(*answers)) as endpoint:
        result = label.run(recipe(tmp_path, endpoint.url, n=2, front={"labels": TREE, "multi": True}))
    found = rows(tmp_path / "run")
    assert (found["id-0"]["domain"], found["id-0"]["use_case"]) == (["Health"], ["Nursing", "Forms"])
    assert (found["id-1"]["domain"], found["id-1"]["unknown"]) == (["Law"], ["Tax"])
    assert isinstance(result, label.LabelResult)
    assert result.levels["domain"] == {"Health": 1, "Law": 1, "None of these": 0}
    assert (result.labels_per_document, result.no_match_share, result.n_unknown_labels) == (1.5, 0, 1)


def test_the_commonest_unknown_labels_are_listed_and_all_are_counted():
    readings = [Reading(None, "unknown_label", unknown=(f"name {i % 30}", "x" * 200)) for i in range(45)]
    found = labels.unknown_in_figures(readings)
    assert (found["n_unknown_labels"], found["n_different_unknown_labels"]) == (90, 31)
    assert len(found["unknown_labels"]) == 20
    assert list(found["unknown_labels"].items())[:2] == [("x" * 80 + "…", 45), ("name 0", 2)]


def test_too_many_documents_without_a_label_stop_the_stage_and_say_what_was_written(tmp_path: Path):
    with serve(said("Law", "Shipping", "Shipping")) as endpoint:
        made = recipe(tmp_path, endpoint.url, n=6, label={"max_unscored_rate": 0.5})
        with pytest.raises(UserError, match=r"4 of 6 documents have no label \(unknown_label 4; .*'Shipping' 4\)"):
            label.run(made)
    assert len(rows(tmp_path / "run")) == 6, "to be looked at"
    assert not (tmp_path / "run/label/result.json").exists()


@pytest.mark.parametrize(
    ("front", "complaint"),
    [({"read": "generate", "labels": None}, "asks for no label"), ({"labels": {"labels": []}}, "labels")],
)
def test_a_prompt_that_cannot_label_is_refused_before_anything_is_asked(tmp_path: Path, front, complaint):
    made = recipe(tmp_path, "http://127.0.0.1:9/v1", front=front)
    (tmp_path / "prompt.md").write_text((tmp_path / "prompt.md").read_text().replace("{{ labels }}", ""))
    with pytest.raises(UserError, match=complaint):
        label.run(made)
    assert not (tmp_path / "run").exists()


def test_without_a_prompt_the_setting_is_named():
    with pytest.raises(UserError, match=r"label\.prompt is not set"):
        label.run(Recipe())
    with pytest.raises(UserError, match=r"label\.prompt: none\.md does not exist"):
        label.run(Recipe.model_validate({"label": {"prompt": "none.md"}}))


# -- the budget, and going on


def test_a_budget_stops_and_more_of_it_goes_on_without_asking_twice(tmp_path: Path):
    with serve(said("Law")) as endpoint:
        made = recipe(tmp_path, endpoint.url, n=10, label={"budget_tokens": 500})
        first = label.run(made)
        assert isinstance(first, label.LabelResult)
        assert first.stopped_by == "budget_tokens" and 0 < first.n_not_asked < 10
        assert first.n_labelled + first.unlabelled["not_asked"] == 10
        second = label.run(made.model_copy(update={"label": made.label.model_copy(update={"budget_tokens": 5000})}))
        assert isinstance(second, label.LabelResult)
        assert (second.n_labelled, second.n_reused, second.stopped_by) == (10, first.n_labelled, None)
        assert set(endpoint.attempts().values()) == {1}


def test_a_budget_holds_for_all_corpora_together(tmp_path: Path):
    with serve(said("Law")) as endpoint:
        lines = [str(corpus(tmp_path / name, 10)) for name in ("a", "b", "c")]
        made = listing(tmp_path, endpoint.url, lines, n=10, label={"budget_tokens": 1500})
        result = label.run(made)
        assert isinstance(result, label.SeveralResult)
        assert [each.state for each in result.corpora] == ["done", "stopped", "stopped"]
        assert [each.reason for each in result.corpora] == [None, "budget_tokens", "budget_tokens"]
        assert len(endpoint.asked) < 17
        again = label.run(made.model_copy(update={"label": made.label.model_copy(update={"budget_tokens": 9999})}))
        assert isinstance(again, label.SeveralResult)
        assert [each.state for each in again.corpora] == ["skipped", "done", "done"]
        assert len(endpoint.asked) == 30, "none twice"


def test_a_finished_stage_is_skipped_and_a_changed_taxonomy_is_noticed(tmp_path: Path):
    with serve(said("Law")) as endpoint:
        made = recipe(tmp_path, endpoint.url)
        first = label.run(made)
        assert label.run(made) == first
        other = recipe(tmp_path, endpoint.url, front={"labels": {"labels": ["Law", "Sport"]}})
        with pytest.raises(UserError, match=r"label: prompt changed from .* run again with --redo"):
            label.run(other)
        assert len(endpoint.asked) == 8


def test_a_taxonomy_spelled_otherwise_is_read_from_the_same_answers(tmp_path: Path):
    """What the teacher saw decides what is asked; the column's name does not."""
    with serve(said("Law")) as endpoint:
        label.run(recipe(tmp_path, endpoint.url))
        label.run(recipe(tmp_path, endpoint.url, front={"labels": {**FLAT, "levels": ["area"]}}), redo=True)
        assert len(endpoint.asked) == 8
    assert {row["area"] for row in rows(tmp_path / "run").values()} == {"Law"}


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path: Path):
    with serve(said("Law", "Niñez"), delay_s=0.05) as endpoint:
        whole = recipe(tmp_path, endpoint.url, n=12, label={"sample": 12})
        whole = whole.model_copy(update={"run_folder": tmp_path / "whole"})
        label.run(whole)
        made = whole.model_copy(update={"run_folder": tmp_path / "killed"})
        (tmp_path / "recipe.yaml").write_text(to_yaml(made), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline", "label", str(tmp_path / "recipe.yaml")]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, cwd=ROOT)
        while len(endpoint.asked) < 12 + 4:
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed/label/result.json").exists()
        result = label.run(made)
    assert isinstance(result, label.LabelResult) and result.n_reused >= 3
    names = [tmp_path / name / "label/labels.parquet" for name in ("whole", "killed")]
    assert names[0].read_bytes() == names[1].read_bytes()


# -- several corpora


def test_a_corpus_that_fails_stops_no_other_and_the_exit_code_tells(tmp_path: Path):
    lines = ["# what we have", str(corpus(tmp_path / "a", 4)), "", f"{tmp_path}/none", f"{tmp_path}/b\tbody"]
    write(tmp_path / "b", [{"id": str(i), "body": f"doc-{i}"} for i in range(4)])
    with serve(said("Law")) as endpoint:
        made = listing(tmp_path, endpoint.url, lines, n=4)
        done = gristmill(made)
        assert done.code == 1 and "Traceback" not in done.stderr
        told = f"label: 1 of 3 corpora failed: none: corpus.path: {tmp_path}/none does not exist"
        assert done.stderr.splitlines()[-1].startswith(f"gristmill: {told}")
        result = json.loads(done.stdout)["label"]
        assert [each["state"] for each in result["corpora"]] == ["done", "failed", "done"]
        assert result["states"] == {"done": 2, "skipped": 0, "stopped": 0, "waiting": 0, "failed": 1}
        assert json.loads((tmp_path / "run/labels.json").read_text()) == result
        assert (result["n_sampled"], result["n_labelled"], len(endpoint.asked)) == (8, 8, 8)
        corpus(tmp_path / "none", 4)
        mended = gristmill(made, "--table")
        assert mended.code == 0 and len(endpoint.asked) == 12
    assert [mended.stdout.count(state) for state in ("skipped", "failed")] == [2, 0]
    for each in result["corpora"]:
        assert set(rows(tmp_path / "run" / each["folder"])), each["title"]


def test_no_two_corpora_share_a_folder_and_more_lines_change_none(tmp_path: Path):
    names = ["a/web", "b/web", "a/web.parquet", "b/Wéb ", "web", "c/*.parquet"]
    (tmp_path / "list").write_text("\n".join(names))
    before = corpora.read(tmp_path / "list")
    (tmp_path / "list").write_text("\n".join(["more/web", *reversed(names), "a/web\tbody"]))
    after = corpora.read(tmp_path / "list")
    assert len({each.slug for each in after}) == 8
    assert {each: each.slug for each in before}.items() <= {each: each.slug for each in after}.items()
    assert all(each.slug == Path(each.slug).name and each.slug.isascii() for each in after)
    assert Listed("b/Wéb", None).slug.startswith("web-")


def test_corpora_are_called_by_as_much_of_their_path_as_tells_them_apart():
    listed = [Listed("a/x/web", None), Listed("a/y/web", None), Listed("c/news", None), Listed("c/news", "body")]
    assert corpora.titles(listed) == ["x/web", "y/web", "c/news, text", "c/news, body"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a\nb\na/\n", "line 3 names the same corpus as line 1"),
        ("# only\n\n", "names no corpus"),
        ("a\tb\tc", "is not a path and, after a tab, a text column"),
        ("\tbody", "is not a path and, after a tab, a text column"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(tmp_path: Path, text, complaint):
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match=complaint):
        corpora.read(tmp_path / "list")


def test_a_line_may_end_with_a_comment_and_names_its_column(tmp_path: Path):
    (tmp_path / "list").write_text("data/a#b # ours\nowner/name\tcontent.text  # from the Hub\n")
    assert corpora.read(tmp_path / "list") == [Listed("data/a#b", None), Listed("owner/name", "content.text")]


def test_a_listed_corpus_keeps_the_recipe_but_for_what_names_another(tmp_path: Path):
    whole = Recipe.model_validate(
        {
            "run_folder": tmp_path,
            "corpus": {"path": "x/y", "subset": "spa", "revision": "1", "text_column": "body", "id_column": "id"},
            "teacher": {"batch_folder": tmp_path / "batches"},
            "label": {"datasets": tmp_path / "list", "sample": 7},
        }
    )
    one, other = (corpora.of(whole, entry) for entry in (Listed("a/b", None), Listed("a/b", "content")))
    assert (one.corpus.path, one.corpus.subset, one.corpus.revision) == ("a/b", None, None)
    assert (one.corpus.text_column, other.corpus.text_column, one.corpus.id_column) == ("body", "content", "id")
    assert (one.label.sample, one.label.datasets) == (7, None)
    assert len({one.run_folder, other.run_folder, one.teacher.batch_folder, other.teacher.batch_folder}) == 4


def local(folder: Path, model: Path, lines: list[str], **teacher: Any) -> Recipe:
    """A recipe for a teacher on this machine."""
    settings = {"engine": "transformers", "model": str(model), "max_tokens": 12, "dtype": "float32"}
    return listing(folder, "", lines, n=6, teacher={**settings, "base_url": None, **teacher})


def test_a_local_model_is_loaded_once_for_all_and_writes_nothing_but_labels(
    tmp_path: Path, tiny_causal: Path, caplog: pytest.LogCaptureFixture
):
    lines = [str(corpus(tmp_path / name, 6)) for name in ("a", "b")]
    with caplog.at_level(logging.INFO, "gristmill"):
        result = label.run(local(tmp_path, tiny_causal, lines))
    assert isinstance(result, label.SeveralResult)
    assert [each.result.n_labelled for each in result.corpora if each.result] == [6, 6]
    assert sum(record.message.startswith("device:") for record in caplog.records) == 1
    found = [row for each in result.corpora for row in rows(tmp_path / "run" / each.folder).values()]
    assert all(row["answer"].strip() == row["label"] and row["unknown"] == [] for row in found)
    caplog.clear()
    again = label.run(local(tmp_path, tiny_causal, lines))
    assert isinstance(again, label.SeveralResult)
    assert [each.state for each in again.corpora] == ["skipped", "skipped"]
    assert not [record for record in caplog.records if record.message.startswith("device:")], "nothing to ask"


def test_unstructured_a_random_model_writes_no_label_at_all(tmp_path: Path, tiny_causal: Path):
    """What keeps the answers above to the taxonomy is the engine."""
    made = local(tmp_path, tiny_causal, [str(corpus(tmp_path / "a", 6))], structured=False)
    result = label.run(made)
    assert isinstance(result, label.SeveralResult)
    assert result.states["failed"] == 1 and "6 of 6 documents have no label" in str(result.corpora[0].reason)


def test_a_teacher_that_cannot_be_started_stops_everything_at_once(tmp_path: Path):
    lines = [str(corpus(tmp_path / name, 6)) for name in ("a", "b")]
    (tmp_path / "model").mkdir()
    done = gristmill(local(tmp_path, tmp_path / "model", lines))
    assert one_line(done).startswith("teacher.model:")
    assert done.stderr.count("(1 of 2)") == 1 and "(2 of 2)" not in done.stderr


def test_corpora_that_wait_for_batch_files_have_a_folder_each_and_none_has_failed(tmp_path: Path):
    lines = [str(corpus(tmp_path / name, 3)) for name in ("a", "b")]
    result = label.run(listing(tmp_path, "", lines, n=3, teacher={"base_url": None, "batch_folder": tmp_path / "out"}))
    assert isinstance(result, label.SeveralResult)
    assert result.states["waiting"] == 2
    assert sorted(path.parent.name for path in tmp_path.rglob("requests-*.jsonl")) == sorted(
        each.folder for each in result.corpora
    )
    with pytest.raises(Pending, match="2 of 2 corpora wait"):
        label.check_all_done(result)


# -- pictures


def column(title: str, *found: str, n_unlabelled: int = 0, tree: dict[str, Any] = TREE) -> bars.Bars:
    """A corpus with these labels."""
    labelled = Taxonomy.model_validate(tree)
    counts = labels.level_counts(labelled, [Reading(None, labels=(name,)) for name in found])
    return bars.Bars(title, counts, labelled.no_match_path, len(found) + n_unlabelled, n_unlabelled)


def test_use_cases_stand_below_their_domain_and_what_is_no_label_last():
    one = column("one", "Law > Forms", "Law > Forms", "Health > Nursing", "None of these", n_unlabelled=1)
    shown, n_hidden = bars.lines([one])
    assert [line.shown for line in shown] == ["Law", "Forms", "Health", "Nursing", "None of these", "(no label)"]
    assert [bars.count_of(one, line) for line in shown] == [2, 2, 1, 1, 1, 1]
    assert [line.colour for line in shown[-2:]] == [bars.GREY, bars.GREY]
    assert n_hidden == 1, "Health > Forms"
    assert bars.share_of(one, shown[0]) == 0.4


def test_every_corpus_has_the_same_lines():
    one, other = column("one", "Law > Forms"), column("other", "Health > Forms")
    shown, _ = bars.lines([one, other])
    assert [(bars.count_of(one, line), bars.count_of(other, line)) for line in shown] == [
        *((0, 1), (0, 1), (1, 0), (1, 0)),
        *((0, 0), (0, 0)),
    ]


def test_twelve_corpora_fit_on_a_page_and_old_pages_go(tmp_path: Path):
    pytest.importorskip("matplotlib")
    many = [column(f"corpus {i}", "Law", "Niñez", tree=FLAT) for i in range(13)]
    assert [path.name for path in bars.draw(tmp_path, many, "Labels")] == ["labels.png", "labels-2.png"]
    assert [path.name for path in bars.draw(tmp_path, many[:12], "Labels")] == ["labels.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["labels.png"]
    assert (tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("longest", ["A", "A label of quite some length, longer than any other"])
def test_nothing_in_a_picture_is_cut_off_or_lies_on_another(tmp_path: Path, n: int, longest: str):
    """Every text lies within the picture, and no figures beside a bar run into the next column."""
    figures = pytest.importorskip("matplotlib.figure")
    tree = {"labels": [longest, "Costs $5 to $6", "Niñez"]}
    many = [column(f"a/rather/long/name of corpus number {i}", *["Niñez"] * 9999, tree=tree) for i in range(n)]
    measured: list[tuple[Any, Any, Any, Any]] = []

    def measure(figure: Any, *args: Any, **options: Any) -> None:
        figure.set_dpi(options["dpi"])
        savefig(figure, *args, **options)
        names = [name for axis in figure.axes for name in axis.get_yticklabels() if name.get_text()]
        told = [text for axis in figure.axes for text in (*axis.texts, axis.title)]
        boxes = [text.get_window_extent() for text in (*names, *told, *figure.texts)]
        right = max(text.get_window_extent().x1 for text in figure.axes[0].texts)
        measured.append((figure.get_size_inches() * figure.dpi, boxes, right, figure.axes[-1].get_window_extent()))

    savefig = figures.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Figure, "savefig", measure)
        bars.draw(tmp_path, many, "Labels by a teacher with a long name, prompt something-or-other", "A note. " * 15)
    (((width, height), boxes, right, last_column),) = measured
    assert len(boxes) == 5 + n * 6 + 2
    for box in boxes:
        assert 0 <= box.x0 <= box.x1 <= width and 0 <= box.y0 <= box.y1 <= height
    assert right <= (last_column.x0 if n > 1 else width)


def test_without_matplotlib_the_stage_succeeds_and_names_the_extra(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with serve(said("Law")) as endpoint, caplog.at_level(logging.INFO, "gristmill"):
        label.run(recipe(tmp_path, endpoint.url))
    assert not (tmp_path / "run/label/labels.png").exists()
    (line,) = [record.message for record in caplog.records if "picture" in record.message]
    assert 'pip install -e ".[plots]"' in line


def test_a_picture_is_drawn_for_each_corpus_and_for_all(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with serve(said("Law")) as endpoint:
        result = label.run(listing(tmp_path, endpoint.url, [str(corpus(tmp_path / "a", 4))], n=4))
    assert isinstance(result, label.SeveralResult)
    assert (tmp_path / "run/labels.png").exists()
    assert (tmp_path / "run" / result.corpora[0].folder / "label/labels.png").exists()


# -- what is shipped


def test_the_shipped_recipe_labels_with_a_prompt_that_loads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    shipped = load_recipe(Path("configs/label-es.yaml"), {})
    assert shipped.label.prompt is not None
    prompt = prompts.load(shipped.label.prompt)
    assert prompt.read == "label" and prompt.form is not None and prompt.form.kind == "choice"
    longest = max(len(path.encode()) for path in prompt.form.value)
    assert shipped.teacher.max_tokens >= longest / 2, "room for the longest label at two bytes a token"


def test_the_script_says_how_it_is_used_and_is_sound(tmp_path: Path):
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, ROOT / "scripts/label_datasets.sh"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.split()[0]) == (2, "usage:")
    assert subprocess.run([bash, "-n", ROOT / "scripts/label_datasets.sh"]).returncode == 0


def test_the_command_takes_a_list_as_a_flag(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["label", str(ROOT / "configs/label-es.yaml"), "--datasets", "list.tsv", "--dry-run"])
    assert stop.value.code == 0 and "datasets: list.tsv" in capsys.readouterr().out
