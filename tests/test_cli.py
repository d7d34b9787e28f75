"""The command line, as a user meets it."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import cli, config, locks, prompts
from pipeline.config import Recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def run(capsys: pytest.CaptureFixture[str], *tokens: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(token) for token in tokens])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.fixture
def twenty(tmp_path: Path, recipe_file: Path, texts: list[str]) -> Path:
    """A recipe for twenty documents in a JSONL file."""
    documents = tmp_path / "twenty.jsonl"
    documents.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts[:20])))
    recipe = yaml.safe_load(recipe_file.read_text()) | {"run_folder": str(tmp_path / "twenty")}
    recipe["corpus"]["path"], recipe["rate"]["gold_column"] = str(documents), None
    recipe_file.write_text(json.dumps(recipe))
    return recipe_file


def test_trap_01_the_four_stages_on_twenty_documents(twenty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = {}
    for stage in cli.STAGES:
        code, out, err = run(capsys, stage, twenty)
        assert code == 0, err
        results |= {stage: json.loads(out)[stage]}
    assert results["rate"]["n_scored"] == results["score"]["n_scored"] == results["filter"]["n_rows"] == 20
    assert sum(results["train"][name] for name in ("n_train", "n_validation", "n_test")) == 20
    kept = pq.read_table(tmp_path / "twenty/filter/kept/twenty.parquet")
    assert kept.schema.names == ["id", "text", "score", "int_score"] and kept.num_rows == 6


def test_a_process_of_its_own_answers_with_one_json_line(twenty: Path):
    command = [sys.executable, "-m", "pipeline", "run", str(twenty)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == [*cli.WITH_PICTURES, "run_folder"]
    refused = subprocess.run([*command, "--rate.gold-column", "good"], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1 and "rate.gold_column changed from None to 'good'" in last_line(refused.stderr)


def test_run_does_every_stage_and_a_second_run_skips_them(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, "run", recipe_file)
    assert code == 0, err
    first = json.loads(out)
    assert [first[name]["seconds"] > 0 for name in cli.STAGES] == [True] * 4
    assert first["filter"]["n_rows"] == 60 == first["filter"]["n_kept"] + first["filter"]["n_dropped"]
    code, out, err = run(capsys, "run", recipe_file)
    assert code == 0 and json.loads(out) == first
    assert all(f"{name}: done already, skipped" in err for name in cli.STAGES)


def test_stages_run_from_flags_alone(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], corpus_folder: Path
):
    run(capsys, "run", recipe_file)
    done = tmp_path / "run"
    other = ["--run-folder", tmp_path / "other"]
    encoder = ["--encoder.device", "cpu", "--encoder.dtype", "float32"]
    code, out, err = run(
        capsys, "score", *other, "--corpus.path", corpus_folder, "--student", done / "train/student", *encoder
    )
    assert code == 0, err
    assert json.loads(out)["score"]["n_scored"] == 60
    code, out, _ = run(capsys, "filter", *other, "--min-score", -100)
    assert code == 0 and json.loads(out)["filter"]["n_kept"] == 60


def test_a_changed_setting_is_named_and_redo_does_only_what_changed(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(capsys, "run", recipe_file)[0] == 0
    code, out, err = run(capsys, "run", recipe_file, "--filter.keep-share", 0.5)
    assert code == 1 and out == ""
    assert "filter: filter.keep_share changed from 0.3 to 0.5" in last_line(err) and "--redo" in err
    code, out, err = run(capsys, "run", recipe_file, "--filter.keep-share", 0.5, "--redo")
    assert code == 0 and json.loads(out)["filter"]["n_kept"] == 30
    assert [f"{name}: done already" in err for name in cli.STAGES] == [True, True, True, False]


def test_a_changed_seed_goes_through_all_stages(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    first = json.loads(run(capsys, "run", recipe_file)[1])
    second = json.loads(run(capsys, "run", recipe_file, "--seed", 1, "--redo")[1])
    assert second["rate"]["n_reused"] > 0 and second["rate"]["n_asked"] < 50
    assert first["train"] != second["train"]


def test_a_result_of_another_version_is_refused(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys, "rate", recipe_file)
    result = tmp_path / "run" / "rate" / "result.json"
    result.write_text(result.read_text().replace('"n_scored"', '"n_graded"'))
    code, _, err = run(capsys, "rate", recipe_file)
    assert code == 1 and "result.json was written by another version; remove it" in last_line(err)
    result.unlink()
    assert json.loads(run(capsys, "rate", recipe_file)[1])["rate"]["n_asked"] == 0


def test_status_tells_of_results_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run" / "score").mkdir(parents=True)
    (tmp_path / "run" / "score" / "result.json").write_text('{"n_rows": 3}')
    code, out, _ = run(capsys, "status", tmp_path / "run", "--table")
    assert code == 0 and "another version" in out


def test_status_tells_what_is_done(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys, "rate", recipe_file)
    code, out, _ = run(capsys, "status", tmp_path / "run")
    states = json.loads(out)
    assert code == 0
    assert [states[name]["state"] for name in cli.STAGES] == ["done", "not begun", "not begun", "not begun"]
    assert run(capsys, "status", tmp_path / "run", "--table")[1].count("not begun") == 3
    code, _, err = run(capsys, "status", tmp_path / "nowhere")
    assert code == 1 and "nowhere is no folder" in err


def test_a_table_is_printed_for_people(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "run", recipe_file, "--table")
    assert code == 0
    for word in (
        "stage",
        "rate",
        "train",
        "score",
        "filter",
        "teacher against the known quality: AUC",
        "Spearman",
        "kept 18 (30.0%)",
        "run folder",
    ):
        assert word in out
    assert out.count("    kept ") == 3 and out.count(" dropped ") >= 3


@pytest.mark.parametrize("stage", ["run", *cli.STAGES])
def test_dry_run_prints_a_recipe_that_can_be_fed_back(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
):
    code, out, _ = run(capsys, stage, recipe_file, "--dry-run", "--teacher.args.min_p", "0.1")
    assert code == 0 and not (tmp_path / "run").exists()
    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    recipe = config.load_recipe(printed, {})
    assert recipe == config.load_recipe(recipe_file, {"teacher": {"args": {"min_p": 0.1}}})


def test_flags_win_over_the_recipe_and_sections_merge(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "rate", recipe_file, "--dry-run", "--teacher.temperature", "0.5", "--sample", "7")[1]
    recipe = Recipe.model_validate(yaml.safe_load(out))
    assert (recipe.teacher.temperature, recipe.rate.sample, recipe.teacher.document_tokens) == (0.5, 7, 64)
    assert recipe.rate.gold_column == "good"


def test_every_setting_is_a_flag_of_run_and_has_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    words = re.sub(r"[\s│]+", " ", run(capsys, "run", "--help")[1])
    for name in config.setting_names(Recipe):
        assert f"--{name.replace('_', '-')}" in words, name
    for section in (config.Common, *(field.annotation for field in Recipe.model_fields.values())):
        for name, field in getattr(section, "model_fields", {}).items():
            nested = hasattr(field.annotation, "model_fields")
            assert nested or (field.description or "").endswith("."), f"{section}: {name}"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["rate", "--smple", "3"], "Did you mean --sample?"),
        (["rate", "--next", "0"], "--next: input should be greater than or equal to 1, got 0"),
        (["rate", "--sample", "0"], "--sample: input should be greater than or equal to 1, got '0'"),
        (["rate", "--sample", "many"], "many"),
        (["rte"], 'Did you mean "rate"?'),
        (["run", "nowhere.yaml"], "recipe nowhere.yaml: No such file or directory; give a YAML file"),
        (["filter", "--output-format", "csv"], "csv"),
        (["rate", "--stratify-by", "x", "false"], "false"),
    ],
)
def test_a_wrong_command_line_exits_2_with_one_line(
    tokens: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *tokens)
    assert (code, out) == (2, "")
    assert message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("rate: {smple: 3}", "rate.smple is not a setting; did you mean rate.sample?"),
        ("rates: {sample: 3}", "rates is not a setting"),
        ("rate: {sample: -3}", "rate.sample: input should be greater than or equal to 1, got -3"),
        ("filter: {min_score: high}", "filter.min_score"),
        ("rate: [", "is not YAML"),
        ("- a list", "holds no settings"),
        ("", "holds no settings"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_wrong_recipe_names_file_and_key(
    recipe: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "wrong.yaml"
    path.write_text(recipe)
    code, _, err = run(capsys, "run", path)
    assert code == 2 and str(path) in err and message in err and len(err.strip().splitlines()) == 1


def test_what_would_stop_a_later_stage_is_found_before_the_first_token(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for flags, message in [
        (["--encoder.model", "package:no_such_package/model"], "'no_such_package' is not installed"),
        (
            ["--filter.min-score", "3", "--filter.min-int-score", "3"],
            "given: min_score and min_int_score",
        ),
        (["--corpus.text-column", "body"], "has no column 'body'; there are: id, text, meta, good"),
        (["--corpus.path", str(tmp_path / "nowhere")], "nowhere does not exist"),
        (["--rate.prompt", "nowhere.md"], "rate.prompt: nowhere.md"),
        (["--train.good-from", "6"], "train.good_from: 6 must be above 0 and at most 5"),
    ]:
        code, _, err = run(capsys, "run", recipe_file, *flags)
        assert code == 1 and message in last_line(err)
        assert not (tmp_path / "run" / "rate" / "answers.sqlite").exists()


def test_trap_02_errors_are_not_logged_and_forgotten(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    """A bug keeps its traceback and never exits 0."""
    from pipeline import filter

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(filter, "run", broken)
        cli.main(["filter", str(recipe_file)])


def test_help_answers_without_torch_and_in_about_a_second():
    begin = time.perf_counter()
    code = "import sys; sys.argv=['gristmill', 'run', '--help']\ntry:\n import pipeline.cli; pipeline.cli.main()\n"
    code += "except SystemExit: pass\nprint({'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert last_line(done.stdout) == "set()"
    assert time.perf_counter() - begin < 30


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_names_a_prompt_that_loads(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    recipe = config.load_recipe(path, {})
    if recipe.label.prompt:
        assert prompts.load(recipe.label.prompt).read == "label"
        return
    if not recipe.rate.prompt and (recipe.finetune.model or recipe.prove.trusted):  # nothing is rated or filtered
        assert recipe.corpus.path and recipe.run_folder.parent == Path("runs")
        return
    assert recipe.rate.prompt is not None and prompts.load(recipe.rate.prompt).read != "label"
    low, high = prompts.load(recipe.rate.prompt).scale
    assert recipe.train.good_from is None or low < recipe.train.good_from <= high
    from pipeline.filter import check_one_cut

    check_one_cut(recipe.filter)
    assert recipe.run_folder == Path("runs") / path.stem


def readme_commands() -> list[str]:
    """Every line of the bash blocks in the README, then in the pages beside it."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    return "".join(blocks).strip().splitlines()


def test_every_command_of_the_readme_and_the_pages_beside_it_parses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """In the order in which they stand, files that one writes for the next included."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "prompts"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", line), comments=True) for line in readme_commands()]
    assert {words[0] for words in commands} == {"bash", "pip", "python", "gristmill"} and len(commands) >= 8
    for words in commands:
        if words[0] in ("bash", "python"):
            assert (ROOT / words[1]).exists()
        if words[0] == "gristmill" and words[1] in ("show", "generate", "status", "verify"):
            cli.app.parse_args(words[1:], exit_on_error=False, print_error=False)
        elif words[0] == "gristmill":
            command, _, target = " ".join(words[1:]).partition(" > ")
            code, out, err = run(capsys, *command.removesuffix(" --dry-run").split(), "--dry-run")
            assert code == 0, f"{words}: {err}"
            if target:
                Path(target).write_text(out)


def test_the_prompt_of_the_docs_loads(tmp_path: Path):
    block = re.search(r"```markdown\n(.*?)```", (ROOT / "docs" / "prompts.md").read_text(), re.DOTALL)
    assert block is not None
    (tmp_path / "prompt.md").write_text(block[1], encoding="utf-8")
    assert prompts.load(tmp_path / "prompt.md").scale == (0, 5)


def test_a_cut_given_as_a_flag_replaces_the_recipes(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "filter", recipe_file, "--min-score", "3", "--dry-run")[1]
    assert yaml.safe_load(out)["filter"]["keep_share"] is None
    code, _, err = run(capsys, "run", recipe_file, "--filter.keep-documents", "3", "--filter.keep-share", "0.1")
    assert code == 1 and "given: keep_share and keep_documents" in last_line(err)


def test_metrics_are_always_in_the_run_folder(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys, "run", recipe_file)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == list(cli.WITH_PICTURES)
    learned = json.loads((tmp_path / "run/train/result.json").read_text())["targets"]["score"]
    assert lines[1]["targets.score.kept.f1"] == learned["kept"]["f1"]
    assert config.load_recipe(tmp_path / "run" / "filter" / "recipe.yaml", {}) == config.load_recipe(recipe_file, {})
    assert "rate: 50 documents" in (tmp_path / "run" / "run.log").read_text()


def test_two_processes_never_work_on_one_stage(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with locks.held(tmp_path / "run" / "rate" / ".lock", "not held yet"):
        code, _, err = run(capsys, "rate", recipe_file)
    assert code == 1 and "another process is at work in" in last_line(err)


def test_a_run_folder_and_a_corpus_never_overlap(
    recipe_file: Path, corpus_folder: Path, capsys: pytest.CaptureFixture[str]
):
    code, _, err = run(capsys, "rate", recipe_file, "--run-folder", corpus_folder / "run")
    assert code == 1 and "overlap; keep them apart" in last_line(err)


def test_a_stage_says_when_the_one_before_was_made_otherwise(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys, "rate", recipe_file)
    code, _, err = run(capsys, "train", recipe_file, "--teacher.document-tokens", "32")
    assert code == 0 and "train: teacher.document_tokens changed from 64 to 32 since" in err
    assert "changed" not in run(capsys, "train", recipe_file)[2]


def test_a_setting_that_made_nothing_yet_may_be_mended_without_redo(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(capsys, "rate", recipe_file, "--gold-column", "nowhere")[0] == 1
    assert run(capsys, "rate", recipe_file)[0] == 0


@pytest.mark.parametrize("product", ["rate/ratings.parquet", "train/student", "filter/kept"])
def test_a_product_that_was_removed_is_made_again(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], product: str
):
    import shutil

    first = json.loads(run(capsys, "run", recipe_file)[1])
    path = tmp_path / "run" / product
    path.unlink() if path.is_file() else shutil.rmtree(path)
    code, out, err = run(capsys, "run", recipe_file)
    assert code == 0, err
    assert path.exists() and json.loads(out)["filter"]["n_kept"] == first["filter"]["n_kept"]


def test_the_kept_corpus_is_the_best_of_the_scored_one(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(capsys, "run", recipe_file)
    kept = pq.read_table(tmp_path / "run/filter/kept")["score"].to_pylist()
    scored = pq.read_table(tmp_path / "run/score/scored")["score"].to_pylist()
    assert sorted(kept) == sorted(scored)[-18:]


def test_a_missing_extra_is_named(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run(capsys, "rate", recipe_file)
    assert (
        code == 1
        and last_line(err) == 'gristmill: torch is not installed; in your clone run: pip install -e ".[torch]"'
    )


def test_a_run_folder_that_cannot_be_made_is_named(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "rate", recipe_file, "--run-folder", os.devnull + "/x")
    assert code == 1 and "run_folder: /dev/null/x cannot be written" in last_line(err)
