"""The kept corpus's dataset card: README.md in the form of the Hugging Face Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from pipeline import card, card_text, corpus
from pipeline.config import Corpus, Recipe
from pipeline.errors import UserError, needs
from pipeline.shards import find_shards
from pipeline.storage import write_text
from pipeline.tracking import read_json

DATA = "data"
"""Where the kept corpus goes in its repository."""

SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "n>10B")
"""The Hub's names of sizes, each ten times the one before."""

Values = dict[str, Any]


def write(folder: Path, kept: Path, recipe: Recipe, name: str) -> None:
    """Write README.md into a folder, for a kept corpus that is to lie in data/ of the dataset `name`."""
    found = Corpus(path=str(kept), text_column=recipe.corpus.text_column)
    shards = find_shards(found)
    schema = corpus.read_schema(shards[0], found)
    result = read_json(recipe.run_folder / "filter" / "result.json")
    if result is None:
        raise UserError(f"export.push_kept_to_hub: {recipe.run_folder} has no kept corpus; run gristmill filter first")
    body = "\n\n".join(sections(recipe, result, schema, name))
    write_text(folder / "README.md", f"---\n{front_matter(result, name)}\n---\n\n{body}\n")


def front_matter(result: Values, name: str) -> str:
    """What the Hub and `datasets` read."""
    huggingface = needs("huggingface_hub", "torch")
    front: str = huggingface.DatasetCardData(
        license="other",
        pretty_name=name.split("/")[-1],
        size_categories=[size(result["n_kept"])],
        task_categories=["text-generation"],
        tags=["gristmill", "data-quality", "filtered"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": f"{DATA}/**"}]}],
    ).to_yaml()
    return front


def size(n: int) -> str:
    """The Hub's name of so many rows."""
    return SIZES[min(max(len(str(n)) - 3, 0), len(SIZES) - 1)]


def sections(recipe: Recipe, result: Values, schema: pa.Schema, name: str) -> Iterator[str]:
    """The card's body, part by part."""
    yield f"# {name.split('/')[-1]}\n\n{introduction(result)}"
    yield "## Use\n\n" + card_text.code(f'from datasets import load_dataset\n\nrows = load_dataset("{name}")["train"]')
    yield rows(result)
    yield columns(schema)
    yield making(recipe)
    yield from quality(recipe)
    yield LIMITS
    yield LICENCE


def introduction(result: Values) -> str:
    """What it is, in two sentences."""
    return (
        f"{result['n_kept']:,} of {result['n_rows']:,} documents ({result['kept_share']:.1%}), chosen by their score."
        " A large language model graded a sample, a small encoder learned to grade like it and graded everything"
        " (gristmill)."
    )


def rows(result: Values) -> str:
    """What became of the rows, and how good the kept ones are thought to be."""
    lines = [
        f"| kept | {result['n_kept']:,} |",
        *(f"| dropped: {why} | {n:,} |" for why, n in result["dropped"].items()),
    ]
    table = "\n".join(["| Rows | Count |", "|---|---|", f"| in | {result['n_rows']:,} |", *lines])
    return "\n\n".join(["## Rows", table, *told(result)])


def told(result: Values) -> Iterator[str]:
    """Cut, tokens and estimated quality, where they are known."""
    if result["cut"] is not None:
        yield f"The lowest score that was kept is {result['cut']:.4g}."
    if result["n_tokens_kept"] is not None:
        yield (
            f"{result['n_tokens_kept']:,} of {result['n_tokens']:,} tokens were kept, counted by"
            f" {result['tokens_counted_by']}."
        )
    found = result["quality"]
    if found and found.get("precision") is not None:
        yield f"By the teacher's ratings, {found['precision']:.0%} of what was kept is estimated to be good."


def columns(schema: pa.Schema) -> str:
    """Each column and its type."""
    lines = [f"| `{field.name}` | {field.type} |{ABOUT.get(field.name, '')} |" for field in schema]
    return "\n".join(["## Columns", "", "| Column | Type | |", "|---|---|---|", *lines])


ABOUT = {
    "score": " the student's score, not rounded",
    "int_score": " the same as a whole number",
    "score_reason": " why there is no score",
}


def making(recipe: Recipe) -> str:
    """The prompt, the teacher, the student and the recipe, without what would tell where they were made."""
    settings = {**dict(card.own_settings(recipe)), "filter": filter_settings(recipe)}
    known = read_json(recipe.run_folder / "train" / "student" / "student.json") or {}
    lines = [*facts(known), *(f"- Prompt: `{name}` (digest `{digest}`)." for name, digest in prompts(recipe))]
    recipe_text = yaml.safe_dump(unplaced(settings), sort_keys=False)
    return "\n\n".join(
        ["## How it was made", *(["\n".join(lines)] if lines else []), card_text.code(recipe_text, "yaml")]
    )


def facts(student: Values) -> Iterator[str]:
    """The teacher and the encoder, a line each."""
    if student.get("teachers"):
        yield f"- Teacher: {', '.join(f'`{unplaced(name)}`' for name in student['teachers'])}."
    if student.get("encoder"):
        yield f"- Student: a head on the encoder `{unplaced(student['encoder']['model'])}`."


def prompts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Name and digest of each prompt that is there."""
    for each in card.of_run(recipe)["prompt_files"]:
        yield each["name"], each["digest"]


def filter_settings(recipe: Recipe) -> Values:
    """What was chosen by."""
    given = recipe.filter.model_dump(mode="json", exclude_defaults=True)
    return {name: value for name, value in given.items() if name in recipe.filter.identity() and name != "scored"}


def unplaced(value: Any) -> Any:
    """The same with the names of files alone, where paths of this machine stood."""
    if isinstance(value, dict):
        return {key: unplaced(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [unplaced(each) for each in value]
    is_placed = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".")))
    return Path(value).name if is_placed else value


def quality(recipe: Recipe) -> Iterator[str]:
    """How well the student follows its teacher, target by target."""
    trained = read_json(recipe.run_folder / "train" / "result.json") or {}
    for name, figures in trained.get("targets", {}).items():
        said = card_text.quality(name, figures)
        if said:
            yield said


LIMITS = """## Limits

- The score repeats what the teacher thinks good, errors and tastes included; it was only held against that teacher.
- A document was judged by what the student reads of it, which may be its beginning.
- Nothing was checked for copies, personal data, licences or test sets here."""

LICENCE = """## Licence

**To be chosen by whoever publishes this dataset.** `license: other` above is a placeholder. The licence of the
documents decides; that of the teacher may restrict what is made of its answers."""
