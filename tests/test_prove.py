"""The proof from end to end: what is found, what is refused, and how it goes on."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import benchmarks, filter, locks, prove, summary, training
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.prove import ProveResult
from pipeline.tracking import read_json

SMALL = {"max_length": 32, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
PROOF = {
    "arms": ["kept", "rejected"],
    "seeds": 3,
    "tokens": 3200,
    "vocabulary": 300,
    "layers": 1,
    "hidden_size": 64,
    "device": "cpu",
    "args": SMALL,
}


def write(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path)


def recipe(folder: Path, **settings: Any) -> Recipe:
    """The proof on a corpus of prose and of jumbled letters, of which the filter kept the prose."""
    proof = {"trusted": str(folder / "trusted.parquet"), **PROOF, **settings}
    values = {"run_folder": folder / "run", "filter": {"scored": folder / "scored", "keep_share": 0.5}, "prove": proof}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("prove")
    (folder / "scored").mkdir()
    rng = random.Random(0)
    jumbled = ["".join(rng.sample(text, len(text))) for text in texts[:40]]
    scores = [5.0] * 40 + [0.0] * 40
    columns = {"score": pa.array(scores, pa.float32()), "int_score": pa.array([int(s) for s in scores], pa.int8())}
    pq.write_table(pa.table({"text": texts[:40] + jumbled, **columns}), folder / "scored" / "part-0.parquet")
    write(folder / "trusted.parquet", [*texts[40:60], texts[0], texts[41] + " Again."])
    filter.run(recipe(folder))
    return folder


@pytest.fixture(scope="module")
def proven(corpus: Path) -> ProveResult:
    return prove.run(recipe(corpus))


@pytest.fixture
def copy(tmp_path: Path, corpus: Path, proven: ProveResult) -> Path:
    """Of the finished proof."""
    shutil.copytree(corpus, tmp_path / "copy")
    return tmp_path / "copy"


def test_prose_teaches_prose_better_than_jumbled_letters_do(proven: ProveResult) -> None:
    assert proven.sentence.startswith("Kept is better than rejected: ")
    assert proven.sentence == proven.comparisons[0]["sentence"]
    kept, rejected = proven.arms["kept"], proven.arms["rejected"]
    assert kept["bits_per_byte"] < rejected["bits_per_byte"] - 0.1
    assert len(kept["by_seed"]) == proven.n_seeds == 3
    assert kept["curve"][0]["bits_per_byte"] > kept["curve"][-1]["bits_per_byte"]
    assert kept["curve"][-1]["bits_per_byte"] == pytest.approx(kept["bits_per_byte"], rel=0.1)


def test_arms_read_equally_much(corpus: Path, proven: ProveResult) -> None:
    assert (proven.tokens, proven.n_steps) == (3200, 25)
    for folder in (corpus / "run" / "prove" / "trainings").iterdir():
        assert max(line["step"] for line in training.read_curve(folder)) == 25


def test_copies_are_not_judged_on(proven: ProveResult) -> None:
    assert (proven.n_trusted, proven.n_trusted_copies, proven.n_trusted_repeated) == (20, 1, 1)


def test_only_what_is_needed_is_left(corpus: Path, proven: ProveResult) -> None:
    folder = corpus / "run" / "prove"

    assert (folder / "prove.png").exists()
    assert sorted(path.name for path in (folder / "trainings" / "kept-0").iterdir()) == [
        "curve.jsonl",
        "judged.json",
        "predicted.parquet",
    ]


def test_a_finished_training_is_never_done_again(
    copy: Path, proven: ProveResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, done, train = copy / "run" / "prove", [], training.run
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "trainings" / "rejected-1")
    begun = json.loads((folder / "inputs.json").read_text())
    begun["prove"]["trusted"] = str(copy / "trusted.parquet")
    (folder / "inputs.json").write_text(json.dumps(begun))
    monkeypatch.setattr(training, "run", lambda job, launch: done.append(job.folder.name) or train(job, launch))

    again = prove.run(recipe(copy))

    assert done == ["rejected-1"]
    for name in ("kept", "rejected"):
        assert again.arms[name]["by_seed"] == pytest.approx(proven.arms[name]["by_seed"], rel=1e-4)


def test_trainings_in_parts_and_then_the_whole_find_the_same(corpus: Path, copy: Path, proven: ProveResult) -> None:
    folder, done = copy / "run" / "prove", read_json(corpus / "run" / "prove" / "result.json")
    (folder / "result.json").unlink()
    for name in ("kept-1", "rejected-2"):
        shutil.rmtree(folder / "trainings" / name)
    begun = json.loads((folder / "inputs.json").read_text())
    begun["prove"]["trusted"] = str(copy / "trusted.parquet")
    (folder / "inputs.json").write_text(json.dumps(begun))

    parts = [prove.run(recipe(copy).model_copy(update={"shard": f"{i}/4"})) for i in (1, 2, 3, 4)]

    assert [(each.n_trainings, each.n_trained) for each in parts] == [(2, 0), (2, 1), (1, 1), (1, 0)]  # type: ignore[union-attr]
    assert "part 4/4: 1 trainings, 0 of them done now" in summary.tell_part(parts[3].model_dump())
    assert summary.status(copy / "run", ())["prove"]["parts_done"] == "4 of 4"
    whole = prove.run(recipe(copy)).model_dump(mode="json")
    assert done is not None
    for name in done.keys() - {"seconds", "trusted"}:
        assert whole[name] == done[name], name


def test_a_training_is_done_by_one_process_and_none_begins_others_meanwhile(copy: Path) -> None:
    folder = copy / "run" / "prove"
    part = recipe(copy).model_copy(update={"shard": "1/6"})
    with locks.held(folder / prove.IN_USE, "", shared=True), pytest.raises(UserError, match="parts with other setti"):
        prove.run(recipe(copy, tokens=3840).model_copy(update={"shard": "1/6"}), redo=True)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "trainings" / "kept-0")
    begun = json.loads((folder / "inputs.json").read_text())
    begun["prove"]["trusted"] = str(copy / "trusted.parquet")
    (folder / "inputs.json").write_text(json.dumps(begun))
    with (
        locks.written_by_one(folder / "trainings" / "kept-0"),
        pytest.raises(UserError, match=r"kept-0: another process is writing this training"),
    ):
        prove.run(part)


def test_changed_settings_are_refused_also_before_it_is_finished(copy: Path) -> None:
    (copy / "run" / "prove" / "result.json").unlink()

    with pytest.raises(UserError, match=r"prove.tokens changed from 3200 to 3840.*run again with --redo"):
        prove.run(recipe(copy, tokens=3840))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"trusted": None}, "prove.trusted is not set; give texts you trust"),
    ({"trusted": "nowhere.parquet"}, "prove.trusted: nowhere.parquet does not exist"),
    ({"trusted_text_column": "body"}, "no column 'body'"),
    ({"tokens": 10**6}, r"prove.tokens: 1,000,000 are more than 4 times the [\d,]+ that [a-z]+ has; give at most"),
    ({"tokens": 1000}, "each training reads 1,000, but 10 steps of 4 blocks take 1,280"),
    ({"args": {**SMALL, "max_steps": 3}}, "prove.args.max_steps: prove.tokens says how long"),
    (
        {"args": {**SMALL, "learning_rat": 3}},
        "prove.args: 'learning_rat' is not an argument of SFTConfig; did you",
    ),
    ({"args": {**SMALL, "max_length": None}}, "prove.args.max_length: input should be a valid integer"),
    ({"arms": ["kept"]}, "prove.arms: give two or three different ones"),
    ({"hidden_size": 100}, "prove.hidden_size: 100 is not a multiple of 32"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_a_bad_setting_is_one_line(corpus: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = fresh(corpus, tmp_path)

    with pytest.raises(UserError, match=message) as caught:
        prove.run(recipe(folder, **settings))
    assert "\n" not in str(caught.value)


def fresh(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus and its filter, without a proof."""
    folder = tmp_path / "fresh"
    shutil.copytree(corpus, folder, ignore=shutil.ignore_patterns("prove"))
    return folder


def test_trusted_texts_that_are_the_corpus_are_refused(corpus: Path, tmp_path: Path, texts: list[str]) -> None:
    folder = fresh(corpus, tmp_path)
    write(folder / "trusted.parquet", texts[:30])

    with pytest.raises(UserError, match=r"of 30 texts of .*, 30 are in the corpus, nearly or in part, .* leaves 0"):
        prove.run(recipe(folder))
    write(folder / "trusted.parquet", ["", " "])
    with pytest.raises(UserError, match=r"trusted.parquet holds no text in column 'text'"):
        prove.run(recipe(folder), redo=True)
    same = recipe(folder, trusted=str(folder / "scored")).model_copy(
        update={"corpus": recipe(folder).corpus.model_copy(update={"path": str(folder / "scored")})}
    )
    with pytest.raises(UserError, match="is the corpus itself; give texts that the filter never saw"):
        prove.run(same)


def test_a_filter_must_have_kept_and_rejected_something(corpus: Path, tmp_path: Path) -> None:
    folder = fresh(corpus, tmp_path)
    shutil.rmtree(folder / "run")
    with pytest.raises(UserError, match="filter is not finished; run gristmill filter first"):
        prove.run(recipe(folder))
    whole = recipe(folder)
    filter.run(whole.model_copy(update={"filter": whole.filter.model_copy(update={"keep_share": 1.0})}))
    with pytest.raises(UserError, match="the filter rejected nothing; raise its cut"):
        prove.run(whole)


def test_an_adapter_is_no_model(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")

    with pytest.raises(UserError, match=r"prove.model: .* is a LoRA adapter, not a whole model"):
        prove.run(recipe(fresh(corpus, tmp_path), model=str(tmp_path / "adapter")))


def test_any_causal_model_is_trained_further(corpus: Path, tmp_path: Path, tiny_causal: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"]}
    settings = {
        "model": str(tiny_causal),
        "lora": lora,
        "seeds": 1,
        "tokens": 1280,
        "args": {**SMALL, "eval_strategy": "no"},
    }

    found = prove.run(recipe(fresh(corpus, tmp_path), **settings))

    assert found.model == str(tiny_causal)
    assert found.arms["kept"]["interval"] is None
    assert "give prove.seeds 3 or more" in found.sentence


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------

TASK = """
task: is_prose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["prose", "figures"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_a_task_of_the_harness_is_compared_by_document(corpus: Path, tmp_path: Path, texts: list[str]) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    folder = fresh(corpus, tmp_path)
    (folder / "task.json").write_text("".join(json.dumps({"text": text[:60]}) + "\n" for text in texts[:12]))
    (folder / "task.yaml").write_text(TASK.format(data=folder / "task.json"))

    found = prove.run(recipe(folder, tasks=[str(folder / "task.yaml")], task_documents=8, seeds=1, tokens=1280))

    assert [(each["task"], each["arm"], each["metric"]) for each in found.tasks] == [
        ("is_prose", "kept", "acc"),
        ("is_prose", "rejected", "acc"),
    ]
    assert all(each["n_documents"] == 8 and 0 <= each["value"] <= 1 for each in found.tasks)
    assert "acc on 8 documents of is_prose" in found.task_comparisons[0]["sentence"]


def test_tasks_are_compared_over_seeds_and_documents() -> None:
    right = {"kept": 1.0, "rejected": 0.0}
    said: dict[tuple[str, int], dict[str, Any]] = {
        (arm, seed): {"tasks": {"quiz": {"metric": "acc", "values": {str(i): value for i in (0, 10, 9)}}}}
        for arm, value in right.items()
        for seed in range(3)
    }

    figures, compared = benchmarks.summarise(said, ["kept", "rejected"], [("kept", "rejected")])

    assert [(each["arm"], each["value"], each["interval"]) for each in figures] == [
        ("kept", 1.0, (1.0, 1.0)),
        ("rejected", 0.0, (0.0, 0.0)),
    ]
    assert compared[0]["sentence"] == (
        "Kept is better than rejected: 1.000 against 0.000 acc on 3 documents of quiz, a gain of 1.000 (95% 1.000 to"
        " 1.000)."
    )
