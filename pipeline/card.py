"""The student's model card: README.md in the form of the Hugging Face Hub."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline import prompts
from pipeline.card_text import Figures, between, measure, sections, title, told
from pipeline.config import Recipe, Settings
from pipeline.errors import UserError, needs
from pipeline.storage import write_text
from pipeline.student import Student

EXAMPLES = (
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. It happens in the chloroplasts of"
    " plants and algae, in two steps: the light reactions store energy, and the Calvin cycle spends it.",
    "BUY NOW!!! Best prices, free shipping, click here, limited offer, click here, click here.",
    "To find the median of a list, sort it and take the middle value; of an even number of values, take the mean of"
    " the two in the middle. Unlike the mean, it hardly moves when one value is very large.",
    "lol same",
    "The train leaves at nine.",
    "Terms of use. By using this site you agree to the following terms. We may change them at any time without notice."
    " All rights reserved.",
    "Why is the sky blue? Air scatters short waves of light more than long ones, so from every direction but the sun's"
    " own mostly blue light reaches the eye.",
    "0 0 0 0 0 1 1 0 0 1 0 1 1 1 0 0 0 1 0 1 0 1 1 0",
)
"""Texts of unlike quality and length, none of them anybody's."""

ON_THE_HUB = {
    "spearman": "spearmanr",
    "mae": "mae",
    "macro_f1": "f1",
    "auc": "roc_auc",
    "kept.f1": "f1",
    "accuracy": "accuracy",
    "micro_f1": "f1",
}
"""Those of them that the Hub knows, by its names."""


def write(folder: Path, student: Student, result: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write README.md into the student's folder, from train/result.json and what is known of where it comes from
    (prompts, teachers, rounding, and what `of_run` finds); what is not known is left out."""
    huggingface = needs("huggingface_hub", "torch")
    targets = result.get("targets", {})
    front = huggingface.ModelCardData(
        license="other",
        library_name="sentence-transformers",
        pipeline_tag="text-classification",
        base_model=base_model(student),
        tags=["gristmill", "data-quality", "distillation", *(head.name for head in student.heads)],
        metrics=sorted({ON_THE_HUB[name] for figures in targets.values() for name, _, _ in told(figures, ON_THE_HUB)})
        or None,
        model_name=title(student),
        eval_results=list(eval_results(targets)) or None,
        widget=[{"text": EXAMPLES[0]}, {"text": EXAMPLES[1]}],
    )
    body = "\n\n".join(part.strip() for part in sections(student, result, origin) if part)
    write_text(folder / "README.md", f"---\n{front.to_yaml()}\n---\n\n{body}\n")


def of_run(recipe: Recipe) -> dict[str, Any]:
    """What a run knows of its student: the prompt files as they are, and the recipe."""
    paths = [path for path in (recipe.rate.prompt, *recipe.rate.more_prompts, recipe.label.prompt) if path]
    return {
        "prompt_files": [prompt_file(path) for path in paths if path.exists()],
        "recipe": yaml.safe_dump(dict(own_settings(recipe))),
    }


def own_settings(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """What is not the default of the seed and the sections that decide the student; nothing of where and how fast it
    was made."""
    if recipe.seed != Recipe().seed:
        yield "seed", recipe.seed
    for name in ("corpus", "teacher", "rate", "label", "encoder", "train"):
        section: Settings = getattr(recipe, name)
        given = section.model_dump(mode="json", exclude_defaults=True)
        if own := {key: value for key, value in given.items() if key in section.identity()}:
            yield name, own


def prompt_file(path: Path) -> dict[str, str]:
    """A prompt's name, digest and whole text."""
    try:
        digest = prompts.load(path).digest
    except UserError:
        digest = ""
    return {"name": path.name, "digest": digest, "text": path.read_text(encoding="utf-8")}


# -- front matter -----------------------------------------------------------------------------------------------------


def base_model(student: Student) -> str | None:
    """The encoder's Hub name; None where it came from a folder or a package."""
    name = student.encoder_settings.model
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists() and not name.startswith(".")
    return name if on_hub else None


def eval_results(targets: dict[str, Figures]) -> Iterator[Any]:
    """Figures on the test part as the Hub's model index has them."""
    huggingface = needs("huggingface_hub", "torch")
    for target, figures in targets.items():
        for name, value, interval in told(figures, ON_THE_HUB):
            yield huggingface.EvalResult(
                task_type="text-classification",
                dataset_type="gristmill-ratings",
                dataset_name=f"the teacher's {target}, test part",
                metric_type=ON_THE_HUB[name],
                metric_name=f"{target}: {measure(name, figures)}"
                + (f", 95% interval {between(interval)}" if interval else ""),
                metric_value=round(value, 4),
            )
