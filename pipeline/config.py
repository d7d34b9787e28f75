"""Every setting of every stage, once. Importing this costs no torch."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import SettingsError

OPERATIONAL = "operational"
"""Marks settings that change how fast or where a stage works, never what it makes."""

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """A frozen section of the recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a stage makes: everything but the operational ones."""
        fields = type(self).model_fields
        kept = {name for name, field in fields.items() if OPERATIONAL not in field.metadata}
        return self.model_dump(mode="json", include=kept)


class Corpus(Settings):
    """Where the documents are and how to read them."""

    path: str | None = None
    """File, folder or glob of parquet, JSONL (.gz, .zst) or Arrow; a save_to_disk folder; a URL (s3://, gs://, hf://);
    or a Hub dataset name."""
    subset: str | None = None
    """Configuration of a Hub dataset."""
    revision: str | None = None
    """Revision of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset or of a saved DatasetDict."""
    text_column: str = "text"
    """Column with the document; a dot reaches into a struct (content.text)."""
    id_column: str | None = None
    """Column that names a document; without it the id is a hash of the text, so duplicates share one."""
    skip_bad_rows: bool = False
    """Leave out JSONL lines that cannot be read, and count them, instead of stopping."""


class Teacher(Settings):
    """The LLM that rates the sample."""

    engine: Literal["transformers", "openai"] = "transformers"
    """Who runs it: transformers on this machine, or any OpenAI-compatible endpoint."""
    model: str | None = None
    """Hub name, folder, .gguf file, or package:NAME/PATH (inside an installed Python package); with openai the
    endpoint's model name."""
    revision: str | None = None
    """Hub revision of the model."""
    document_tokens: Count = 1024
    """Longer documents are cut to this many tokens, and the cut is marked for the teacher."""
    max_tokens: Count = 512
    """Longest answer, in tokens (prompts that generate)."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time (prompts that generate)."""
    top_p: Share | None = None
    """Nucleus sampling share (prompts that generate, temperature above 0)."""
    seed: int = 0
    """Seed of sampled answers."""
    args: dict[str, Any] = {}
    """Passed verbatim to generate(), or into the request body of an endpoint."""
    chat_template_args: dict[str, Any] = {}
    """Passed verbatim to the chat template, such as enable_thinking: false."""
    device: Annotated[str | None, OPERATIONAL] = None
    """cuda, cuda:1, mps or cpu; without it the best one present."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of a local teacher; auto is bfloat16 where the hardware multiplies it and float32 elsewhere."""
    batch_tokens: Annotated[Count, OPERATIONAL] = 8192
    """Tokens in one batch of a local teacher, padding and room for the answer included."""
    base_url: Annotated[str | None, OPERATIONAL] = None
    """Endpoint, such as http://localhost:8000/v1; without it OpenAI's own."""
    api_key_env: Annotated[str, OPERATIONAL] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the endpoint's key; the key itself is never written anywhere."""
    tokenizer: str | None = None
    """Hub name or folder of the endpoint model's tokenizer, to cut documents by tokens; without it 4 bytes count as
    one."""
    top_logprobs: Annotated[int, Field(ge=1, le=1000)] = 20
    """How many likeliest tokens an endpoint is asked for (prompts that compare choices)."""
    concurrency: Annotated[int, Field(ge=1, le=1000), OPERATIONAL] = 16
    """Requests in flight at an endpoint."""
    timeout_s: Annotated[float, Field(gt=0), OPERATIONAL] = 120
    """Seconds before one request to an endpoint counts as failed."""
    retries: Annotated[int, Field(ge=0), OPERATIONAL] = 5
    """Times a failed request is sent again, with growing pauses."""


class Rate(Settings):
    """Stage 1: the teacher rates a sample."""

    prompt: Path | None = None
    """Prompt file (Markdown with front matter)."""
    sample: Count = 2000
    """Documents to rate, drawn uniformly from the whole corpus."""
    stratify_by: str | None = None
    """Draw equally from each value of this column instead."""
    gold_column: str | None = None
    """Column with a known quality (true/false or a number), to measure teacher and student against; never shown to
    them."""
    max_unscored_rate: Annotated[float, Field(ge=0, le=1), OPERATIONAL] = 0.5
    """Stop if a larger share of the sample ends without a score."""


class Encoder(Settings):
    """The frozen encoder of the student."""

    model: str = "Snowflake/snowflake-arctic-embed-m"
    """Hub name, folder, or package:NAME/PATH: anything that sentence-transformers loads."""
    revision: str | None = None
    """Hub revision of the model."""
    max_tokens: Count = 512
    """Longer documents are judged by their first so many tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the encoder; auto is bfloat16 where the hardware multiplies it and float32 elsewhere."""
    device: Annotated[str | None, OPERATIONAL] = None
    """cuda, cuda:1, mps or cpu; without it the best one present."""
    batch_tokens: Count = 4096
    """Tokens in one batch, padding included."""


class Train(Settings):
    """Stage 2: a linear head on the frozen encoder learns the ratings."""

    ratings: Path | None = None
    """Ratings to learn from; without it those of the run folder."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    """Share of the ratings on which cuts are chosen."""
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of the ratings that is only reported on."""
    good_from: float | None = None
    """Teacher score from which a document counts as good in precision, recall and F1; without it the middle of the
    scale."""


class Score(Settings):
    """Stage 3: the student scores every document."""

    student: Path | None = None
    """Student folder; without it that of the run folder."""
    replace_existing: bool = False
    """Replace columns called score and int_score that the corpus already has, instead of stopping."""


CUTS = ("min_score", "min_int_score", "keep_share")
"""Ways to choose what is kept; one is given."""


class Filter(Settings):
    """Stage 4: the best documents are kept. Give one of the three cuts."""

    min_score: float | None = None
    """Keep documents with at least this score."""
    min_int_score: int | None = None
    """Keep documents with at least this int_score."""
    keep_share: Share | None = None
    """Keep this share of the scored documents; ties at the cut are kept."""
    scored: Path | None = None
    """Scored corpus; without it that of the run folder."""
    output_format: Literal["parquet", "jsonl"] = "parquet"
    """Format of the kept corpus."""
    keep_dropped: bool = False
    """Write the dropped rows aside too, each with its reason."""


class Tracking(Settings):
    """Where metrics go besides metrics.jsonl in the run folder."""

    wandb: bool = False
    """Send them to Weights & Biases (WANDB_MODE=offline works without an account)."""
    wandb_project: str = "gristmill"
    """Its project."""


class Common(Settings):
    """What every stage shares."""

    run_folder: Path = Path("runs/default")
    """Everything a run makes is in here."""
    seed: int = 0
    """Seed of sampling and splitting."""
    corpus: Corpus = Corpus()
    teacher: Teacher = Teacher()
    encoder: Encoder = Encoder()
    tracking: Tracking = Tracking()


class Recipe(Common):
    """A whole run: a section per stage."""

    rate: Rate = Rate()
    train: Train = Train()
    score: Score = Score()
    filter: Filter = Filter()


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """The recipe file with the flags laid over it; flags win, and a cut given as a flag replaces the recipe's."""
    values = read_recipe(path) if path else {}
    if set(CUTS) & set(overrides.get("filter", {})):
        overrides = merge({"filter": dict.fromkeys(CUTS)}, overrides)
    try:
        return Recipe.model_validate(merge(values, overrides))
    except ValidationError as error:
        raise SettingsError(explain(error, path)) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The YAML of a recipe as nested dicts, unchecked."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"recipe {path}: {error.strerror}; give a YAML file such as configs/demo.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"recipe {path} holds no settings; see configs/demo.yaml")
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, the second laid over the first."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def explain(error: ValidationError, path: Path | None) -> str:
    """The first validation error as one line: which file, which key, what to do."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"{path}: {key}" if path else f"--{key.replace('_', '-')}"
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
    near = difflib.get_close_matches(key, setting_names(Recipe), n=1, cutoff=0.5)
    return f"{where} is not a setting" + (f"; did you mean {near[0]}?" if near else "; see gristmill run --help")


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every setting as a dotted name."""
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        names += setting_names(kind, f"{prefix}{name}.") if nested else [prefix + name]  # type: ignore[arg-type]
    return names


def to_yaml(recipe: Recipe) -> str:
    """The resolved settings as YAML that can be fed back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(value: Any) -> str:
    """A short fingerprint of anything JSON can hold: 16 hex digits of SHA-256."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
