"""Every setting of every stage, once. Importing this costs no torch."""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline import yaml_text
from pipeline.errors import SettingsError

OPERATIONAL = "operational"
"""Marks settings that change how fast or where a stage works, never what it makes."""

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def whole_number(value: Any) -> Any:
    """10B, 1.5M or 300k as a whole number; anything else as it is."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    if isinstance(value, str) and value[-1:].lower() in units:
        try:
            return round(float(value[:-1]) * units[value[-1].lower()])
        except (ValueError, OverflowError):
            return value
    return value


def without_password(value: Any) -> Any:
    """A URL, unless there is a password in it, which would be recorded; it is not repeated."""
    if isinstance(value, str) and "@" in value:
        raise SettingsError(
            "teacher.base_url: a URL must not hold a password; put the key into the variable of teacher.api_key_env"
        )
    return value


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

    path: Annotated[str | None, OPERATIONAL] = None
    """File, folder or glob of parquet, JSONL (.gz, .zst), Arrow or plain text (.txt: a row for each paragraph, or for
    each line where no blank line separates paragraphs); a save_to_disk folder; a URL (s3://, gs://, hf://); or a Hub
    dataset name."""
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
    """Leave out JSONL lines that cannot be read or are too long, and count them, instead of stopping."""
    max_row_mb: Annotated[Count, OPERATIONAL] = 100
    """A larger row, line or paragraph is refused."""
    max_expansion: Annotated[Count, OPERATIONAL] = 200
    """A file that unpacks to more than 200 MB and more than so many times its size is refused."""


class Teacher(Settings):
    """The LLM that rates the sample."""

    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """Who runs it: transformers or vLLM on this machine, or any OpenAI-compatible endpoint."""
    model: str | None = None
    """Hub name, folder, .gguf file, or package:NAME/PATH (inside an installed Python package); with openai the
    endpoint's model name."""
    revision: str | None = None
    """Hub revision of the model."""
    trust_remote_code: Annotated[bool, OPERATIONAL] = False
    """Run the code that comes with the model or its tokenizer; pin revision and read it first."""
    document_tokens: Count = 1024
    """Longer documents are cut to this many tokens, and the cut is marked for the teacher."""
    max_tokens: Count = 512
    """Longest answer, in tokens (prompts that generate)."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time (prompts that generate)."""
    top_p: Share | None = None
    """Nucleus sampling: the likeliest tokens with this probability together (prompts that generate, temperature above
    0)."""
    top_k: Count | None = None
    """The likeliest so many tokens (as top_p)."""
    min_p: Share | None = None
    """Tokens with at least this share of the likeliest one's probability (as top_p)."""
    tfs: Share | None = None
    """Tail-free sampling (as top_p; transformers): the likeliest tokens, as far as their probabilities still bend."""
    top_a: Share | None = None
    """Top-a sampling (as top_p; transformers): tokens with at least this times the square of the likeliest one's
    probability."""
    repetition_penalty: Positive | None = None
    """Above 1, tokens that have occurred become less likely (prompts that generate)."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it (prompts that generate)."""
    seed: int = 0
    """Seed of sampled answers."""
    args: dict[str, Any] = {}
    """Passed verbatim to generate(), to vLLM's SamplingParams, or into the request body of an endpoint."""
    chat_template_args: dict[str, Any] = {}
    """Passed verbatim to the chat template, such as enable_thinking: false."""
    device: Annotated[str | None, OPERATIONAL] = None
    """cuda, cuda:1, mps or cpu; without it the best one present."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of a local teacher; auto is bfloat16 where the hardware multiplies it and float32 elsewhere, with vllm
    what it makes of the model's files."""
    batch_tokens: Annotated[Count, OPERATIONAL] = 8192
    """Tokens in one batch of the transformers engine, padding and room for the answer included."""
    structured: bool = True
    """Keep answers to the form that the prompt asks for (a label, JSON, a regex), where the engine can."""
    tensor_parallel_size: Annotated[Count, OPERATIONAL] = 1
    """GPUs that share one copy of the model (vllm)."""
    data_parallel_size: Annotated[Count, OPERATIONAL] = 1
    """Copies of the model (vllm)."""
    max_model_len: Count | None = None
    """Tokens of prompt and answer together (vllm); without it what the model can take."""
    quantization: str | None = None
    """Quantisation method (vllm), such as fp8 or awq; without it what the model's files say."""
    gpu_memory_utilization: Annotated[Share | None, OPERATIONAL] = None
    """Share of the GPU's memory that vLLM takes; without it its own default."""
    engine_args: dict[str, Any] = {}
    """Passed verbatim to vLLM's engine, such as enforce_eager: true."""
    base_url: Annotated[str | None, BeforeValidator(without_password), OPERATIONAL] = None
    """Endpoint, such as http://localhost:8000/v1; without it OpenAI's own."""
    api_key_env: Annotated[str, OPERATIONAL] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the endpoint's key; the key itself is never written anywhere."""
    tokenizer: str | None = None
    """Hub name or folder of the endpoint model's tokenizer, to cut documents by tokens and, on a vLLM server, to ask
    for the probabilities of exactly the candidates; without it 4 bytes count as one token."""
    top_logprobs: Annotated[int, Field(ge=1, le=1000)] = 20
    """How many likeliest tokens an endpoint is asked for (prompts that compare choices), if it cannot be asked for the
    candidates themselves."""
    concurrency: Annotated[int, Field(ge=1, le=4096), OPERATIONAL] = 16
    """Requests in flight (vllm, openai)."""
    timeout_s: Annotated[float, Field(gt=0), OPERATIONAL] = 120
    """Seconds before one request to an endpoint counts as failed."""
    retries: Annotated[int, Field(ge=0), OPERATIONAL] = 7
    """Times a failed request is sent again, with growing pauses: about a minute in all."""
    batch_folder: Annotated[Path | None, OPERATIONAL] = None
    """Don't send requests: write them here in OpenAI's batch format, and read the answers from the files put beside
    them (openai)."""
    usd_per_million_prompt_tokens: Annotated[NotNegative | None, OPERATIONAL] = None
    """Price of a million prompt tokens, for plan and rate.budget_usd."""
    usd_per_million_answer_tokens: Annotated[NotNegative | None, OPERATIONAL] = None
    """Price of a million answer tokens."""


class Budget(Settings):
    """How much asking may cost."""

    budget_usd: Annotated[Positive | None, OPERATIONAL] = None
    """Stop, with a result that the same command can extend, before the answers cost more: room is left for those on
    their way, each taken to cost what the others did on average."""
    budget_tokens: Annotated[Count | None, OPERATIONAL] = None
    """The same for prompt and answer tokens together."""
    budget_minutes: Annotated[Positive | None, OPERATIONAL] = None
    """The same for the time spent asking, this time."""


class Asking(Budget):
    """What is asked about, and how much that may cost."""

    sample: Count = 2000
    """Documents drawn from the whole corpus."""
    stratify_by: str | None = None
    """Draw equally from each value of this column; or, where no column is called so, from each length (doubling
    classes of characters) or each source (first folder below corpus.path)."""
    stratum_floor: Count | None = None
    """Instead of equal shares, draw uniformly, but at least so many from each stratum."""
    max_unscored_rate: Annotated[float, Field(ge=0, le=1), OPERATIONAL] = 0.5
    """Stop if a larger share of what was asked ends without a readable answer."""


class Rate(Asking):
    """Stage 1: the teacher rates a sample."""

    prompt: Path | None = None
    """Prompt file (Markdown with front matter)."""
    more_prompts: tuple[Path, ...] = ()
    """Further prompts on the same scale; each gives a further opinion."""
    more_teachers: tuple[dict[str, Any], ...] = ()
    """Further teachers: settings laid over those of `teacher`, but for revision, tokenizer and other settings that
    belong to its model; each gives a further opinion."""
    repeats: Count = 1
    """Opinions of each teacher with each prompt: with another seed (temperature above 0) or another order of choices
    (permute)."""
    permute: bool = False
    """List the choices in another order at each repeat (prompts with {{ choices }})."""
    consensus: Literal["mean", "median"] = "mean"
    """How several opinions become one score."""
    calibrate: bool = False
    """Contextual calibration (arXiv:2102.09690): take off what the teacher says of an empty document (prompts that
    read choices)."""
    gold: Path | None = None
    """File of human scores (CSV, JSONL or parquet with id or text, and one or more columns human*), to measure the
    teacher against; those of its documents that are not in the sample are rated beside it."""
    gold_column: str | None = None
    """Column of the corpus with a known quality (true/false or a number), to measure teacher and student against;
    never shown to them."""
    group_column: str | None = None
    """Column of the corpus kept in the ratings as `group` (a site, an author): no group is in two parts of train."""
    pool: Annotated[Count, OPERATIONAL] = 10_000
    """Documents drawn for rate --next to choose from."""
    probe_documents: Annotated[Count, OPERATIONAL] = 50
    """Documents of the sample that rate --probe tries adversarial lines on."""


class Label(Asking):
    """Beside stage 1: the teacher sorts a sample into the labels of a taxonomy."""

    prompt: Path | None = None
    """Prompt file with read: label."""
    datasets: Path | None = None
    """Text file with a corpus a line (path, and a text column after a tab, if it has another); labelled one after the
    other with the model loaded once, each in a folder of its own."""


class Tune(Budget):
    """Before stage 1: prompts and generation settings are tried on documents whose score or answer is known."""

    gold: Path | None = None
    """File of human scores, as for rate: the teacher is tuned to rate like them."""
    gold_column: str | None = None
    """Instead, a column of the corpus with a known quality (true/false or a number)."""
    reference: str | None = None
    """Instead, a column of the corpus with the right answer: the teacher is tuned to answer `template` like it."""
    template: str | None = None
    """What is asked, each {{ column }} filled in (with reference)."""
    system: str | None = None
    """System turn before the template; an empty one keeps a chat template from adding its own."""
    answer_start: str = ""
    """What an answer to the template is made to begin with; it is no part of the answer."""
    chat: bool = True
    """Ask the template in the model's chat template; false sends it as it is."""
    sample: Count = 400
    """Documents with a known score or answer that are used; of more, a uniform draw."""
    objective: str | None = None
    """What is maximised. For ratings spearman, kappa, auc or f1; without it auc where the human scores are 0 and 1,
    else spearman. For answers exact_match, rouge1, rouge2, rougeL, bleu, chrf, a function of sklearn.metrics,
    evaluate:NAME, or FILE.py:FUNCTION; without it exact_match."""
    good_from: float | None = None
    """Human score from which a document counts as good (auc and f1); without it 1 where the human scores are 0 and 1,
    else the middle of the scale."""
    usd_weight: NotNegative = 0
    """Taken off the objective for each US dollar that 1,000 documents cost."""
    space: dict[str, Any] = {}
    """What is tried, by name: a list of values, or a range {low: 0.5, high: 1} (step, log: true). Names are prompt
    (files), examples (how many known documents stand in the prompt), examples_draw, calibrate, settings of the teacher
    (temperature, document_tokens, args.NAME), settings of the prompt (prompt.chat), and with reference template,
    system, answer_start and chat."""
    search: Literal["tpe", "random", "grid"] = "tpe"
    """How the next trial is chosen: by Optuna's tree-structured Parzen estimator, at random, or all in turn."""
    trials: Count = 30
    """Trials, the defaults beside them; those with settings that were tried before don't count."""
    halving: bool = False
    """Successive halving: trials begin on an eighth of the documents, or 50, and only the better half goes on to twice
    as many."""
    workers: Annotated[Count, OPERATIONAL] = 1
    """Trials at a time (openai); more than one makes the search depend on which is done first."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the documents that nothing is chosen on: the winner's figure comes from them."""
    folds: Annotated[int | None, Field(ge=2)] = None
    """Instead of holding out a share, cross-validation: on each fold, what was best on the others (search random or
    grid). The interval is wider for it, as folds share what they are chosen on."""
    example_characters: Count = 600
    """Characters of a known document that stands in the prompt; a longer one is cut, and marked as cut."""


class Plan(Settings):
    """What rating will take, before it is paid for."""

    count_on: Annotated[Count, OPERATIONAL] = 200
    """Documents of the sample whose tokens are counted."""
    answer_tokens: Annotated[Positive | None, OPERATIONAL] = None
    """Mean length of an answer; without it that of the answers recorded in the run folder, else teacher.max_tokens."""
    tokens_per_s: Annotated[Positive | None, OPERATIONAL] = None
    """Prompt and answer tokens a second; without it the speed measured when the run folder was last rated."""


class Encoder(Settings):
    """The frozen encoder of the student."""

    model: str = "Snowflake/snowflake-arctic-embed-m"
    """Hub name, folder, or package:NAME/PATH: anything that sentence-transformers loads."""
    revision: str | None = None
    """Hub revision of the model."""
    trust_remote_code: Annotated[bool, OPERATIONAL] = False
    """Run the code that comes with the model, or with the student's copy of it; pin revision and read it first."""
    pooling: Literal["cls", "mean"] | None = None
    """How token states become an embedding; without it as the model's own files say, and the mean where they don't."""
    max_tokens: Count = 512
    """Tokens in one window; longer documents are judged by the windows chosen below."""
    windows: Literal["first", "spread", "all"] = "first"
    """Windows of a longer document that are read: its first, those at its begin, middle and end, or all."""
    aggregate: Literal["mean", "weighted", "max"] = "mean"
    """How the scores of several windows become one: their mean, their mean weighted by tokens, or the highest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the encoder; auto is bfloat16 where the hardware multiplies it and float32 elsewhere."""
    engine: Literal["packed", "plain", "exact"] = "packed"
    """How it computes: packed, over texts one after the other, where its architecture is known, else
    plain; plain, by transformers in padded batches; exact, by transformers in float32, one window at a time, bit for
    bit what the model gives for it alone."""
    device: Annotated[str | None, OPERATIONAL] = None
    """cuda (all of them), cuda:1, mps or cpu; without it the best one present."""
    workers: Annotated[Count | None, OPERATIONAL] = None
    """Threads that tokenise and compute; without it one for each CPU core, and three for each GPU."""
    batch_tokens: Count | None = None
    """Tokens in one pack, or in one batch with its padding; without it 4096, and 32,768 in a pack on a GPU."""
    cache: Annotated[Path | None, OPERATIONAL] = None
    """File of embeddings computed before; without it embeddings.sqlite in the run folder."""


class Train(Settings):
    """Stage 2: a head on the frozen encoder learns the ratings."""

    ratings: Path | None = None
    """Ratings or labels to learn from; without it those of the run folder."""
    targets: tuple[str, ...] = ("score",)
    """Columns to learn: score or a named attribute of the ratings, or a column of the labels."""
    head: Literal["linear", "ordinal", "mlp", "full"] = "linear"
    """How scores are learned: ridge regression; a cumulative logistic model, from the teacher's probabilities where
    there are some; one hidden layer; or, with full, the encoder is fine-tuned too."""
    args: dict[str, Any] = {}
    """Passed verbatim to Hugging Face's TrainingArguments (head: full), such as num_train_epochs: 5."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    """Share of the ratings on which cuts are chosen, beside what was held out in cross-validation."""
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of the ratings that is only reported on."""
    near_duplicates: Share | None = 0.8
    """Texts that share this much of their word 5-grams (Jaccard) are never in different parts; null turns it off."""
    good_from: float | None = None
    """Teacher score from which a document counts as good in precision, recall and F1; without it the middle of the
    scale."""
    rounding: Literal["fitted", "half_up"] = "fitted"
    """How a score becomes an int_score: at cuts that give each whole score as often as the teacher, or half up."""
    learning_curve: bool = True
    """Learn from 10, 20, 40 and 70% of the ratings too, to tell what more of them would buy."""


class Score(Settings):
    """Stage 3: the student scores every document."""

    student: Annotated[Path | None, OPERATIONAL] = None
    """Student folder; without it that of the run folder."""
    replace_existing: bool = False
    """Replace columns called score and int_score that the corpus already has, instead of stopping."""
    keep_embeddings: bool = False
    """Write each document's embedding beside the scores (float16), for filter.sampling: density."""
    sidecar: bool = False
    """Write id and scores only, instead of the documents with their scores; later stages read both."""
    output: Annotated[str | None, OPERATIONAL] = None
    """Folder or URL of the scored corpus; without it score/scored in the run folder."""
    more_students: Annotated[tuple[str, ...], OPERATIONAL] = ()
    """Further students, each NAME=FOLDER, that score in the same pass; their columns end in _NAME (score_NAME)."""
    cascade_keep_share: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Read with the encoder only what a cheap first student cannot rule out of this best share of the corpus, and give
    the rest no score; without it everything is scored."""
    cascade_recall: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of those best documents that is scored all the same, with 95% confidence."""
    cascade_sample: Count = 10_000
    """Documents that are scored first, for the first student to learn from and to be calibrated on; the more, the more
    it rules out later."""


class Export(Settings):
    """The student in other formats, and what was made for the Hub."""

    student: Path | None = None
    """Student folder; without it that of the run folder."""
    formats: tuple[Literal["onnx", "openvino"], ...] = ("onnx", "openvino")
    """Formats to write."""
    push_to_hub: Annotated[str | None, OPERATIONAL] = None
    """Upload the student folder and the exports to this Hub repository (owner/name)."""
    push_kept_to_hub: Annotated[str | None, OPERATIONAL] = None
    """Upload the kept corpus, with a dataset card, to this Hub dataset (owner/name)."""
    private: Annotated[bool, OPERATIONAL] = True
    """Whether a repository that is made anew is private."""


CUTS = ("min_score", "min_int_score", "keep_share", "keep_documents", "keep_tokens", "precision")
"""Ways to choose what is kept; one is given, or min_score or min_int_score beside an amount."""


class Filter(Settings):
    """Stage 4: the best documents are kept. Give one of the six cuts, or a threshold and an amount; gristmill plan
    shows what each would keep."""

    min_score: float | None = None
    """Keep documents with at least this score."""
    min_int_score: int | None = None
    """Keep documents with at least this int_score."""
    keep_share: Share | None = None
    """Keep this share of the scored documents, those that a cascade ruled out included; ties at the cut are kept."""
    keep_documents: Count | None = None
    """Keep so many documents; ties at the cut are kept."""
    keep_tokens: Annotated[Count | None, BeforeValidator(whole_number)] = None
    """Keep the best documents with at most so many tokens in all, such as 10B; documents of one score are kept or
    dropped together."""
    precision: Share | None = None
    """Keep as much as can be kept with this share of it good by the teacher, as far as ratings or audit tell."""
    per_group: str | None = None
    """Column; the share, documents or tokens to keep count within each of its values."""
    sampling: Literal["top", "gumbel", "density"] = "top"
    """What is kept: the best; a draw with probability growing as exp(score / temperature) (QuRating,
    arXiv:2402.09739); or a draw in inverse proportion to how many documents are alike (arXiv:2402.09668)."""
    temperature: Positive = 1.0
    """Of the gumbel draw, in points of the score: near 0 the best are kept, large ones draw uniformly."""
    tokens_column: str | None = None
    """Column with each document's tokens, such as token_count; without it 4 bytes of text count as one."""
    scored: Path | None = None
    """Scored corpus; without it that of the run folder."""
    output: Annotated[str | None, OPERATIONAL] = None
    """Folder or URL of the kept corpus; without it filter/kept in the run folder."""
    output_format: Literal["parquet", "jsonl"] = "parquet"
    """Format of the kept corpus."""
    keep_dropped: bool = False
    """Write the dropped rows aside too, each with its reason."""


class Cuts(Settings):
    """What each cut would keep of the scored corpus, before anything is written."""

    by: tuple[str, ...] = ()
    """Columns to break the figures down by, such as source or language."""
    documents: Annotated[Count, OPERATIONAL] = 1_000_000
    """Scored documents that are looked at; of a larger corpus a uniform sample of so many."""


class Audit(Budget):
    """The kept set's quality on the corpus itself: scored documents are rated again by the teacher."""

    sample: Count = 300
    """Scored documents that are rated, drawn from every stratum of the score."""
    strata: Annotated[int, Field(ge=2)] = 10
    """Strata of the score, with equally many documents of the corpus each."""


class Report(Settings):
    """The run as one HTML page."""

    examples: Count = 3
    """Documents shown at each int_score."""
    documents: Count = 5_000
    """Scored documents that the audit of shortcuts looks at."""


class Training(Settings):
    """A causal language model that is trained, through TRL and Transformers."""

    model: str | None = None
    """What training starts from: Hub name, folder, package:NAME/PATH or .gguf file."""
    revision: str | None = None
    """Hub revision of the model."""
    args: dict[str, Any] = {}
    """Passed verbatim to TRL's configuration (SFTConfig, GRPOConfig ...): learning_rate, max_length, save_steps,
    save_total_limit, optim, deepspeed ..."""
    lora: dict[str, Any] = {}
    """Passed verbatim to peft's LoraConfig (r, lora_alpha, lora_dropout ...); without it all weights are trained."""
    device: Annotated[str | None, OPERATIONAL] = None
    """cuda (the first GPU), mps or cpu; without it the best one present."""
    launch: Path | None = None
    """Configuration file of `accelerate`: train in the processes it describes (several GPUs, DeepSpeed, FSDP), each
    with a batch of its own."""


class Finetune(Training):
    """A language model is trained further on the documents of a corpus; of plain text, on passages of some 4,000
    characters. A document longer than args.max_length is learned in several blocks."""

    on: Literal["corpus", "kept"] = "corpus"
    """The corpus, or what the run's filter kept of it."""
    documents: Count | None = None
    """At most so many documents, a uniform draw; without it all."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the documents that is not trained on: perplexity is measured on it, before and after."""
    held_out_documents: Count = 200
    """At most so many of them are measured on."""
    prompts: tuple[str, ...] = ()
    """Beginnings that the model continues, before and after; without them the first words of documents held out."""
    n_continuations: Annotated[int, Field(ge=0)] = 3
    """Documents held out whose first words are continued, where no prompts are given."""
    continuation_tokens: Count = 60
    """Length of a continuation."""
    temperature: NotNegative = 0.7
    """Of the continuations; 0 takes the likeliest token each time."""


class Generate(Settings):
    """How a language model goes on from a beginning; not part of the recipe."""

    max_tokens: Count = 100
    """At most so many tokens."""
    temperature: NotNegative = 0.7
    """0 takes the likeliest token each time."""
    top_p: Share | None = None
    """Nucleus sampling: the likeliest tokens with this probability together."""
    repetition_penalty: Positive | None = None
    """Above 1, tokens that have occurred become less likely."""
    seed: int = 0
    """Seed of what is drawn."""
    n: Count = 1
    """Continuations of each prompt, with the seeds that follow."""
    chat: bool = False
    """Ask an instruct model in its chat template, and print its reply alone."""
    revision: str | None = None
    """Hub revision of the model."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu; without it the best one present."""


class Prove(Training):
    """Does the filter help? The same small model is trained on what was kept, on a random draw and on what was
    rejected, equally long, and judged on texts that the filter never saw."""

    trusted: str | None = None
    """Corpus (file, folder or Hub name) of texts to be judged on, such as textbooks."""
    trusted_text_column: str = "text"
    """Its column with the text."""
    trusted_documents: Count = 200
    """At most so many of its documents, a uniform draw."""
    arms: tuple[Literal["kept", "random", "rejected"], ...] = ("kept", "random", "rejected")
    """What is trained on: rows the filter kept, a uniform draw of the whole scored corpus, rows it dropped."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Trainings of each arm: with another draw of documents and, from scratch, another initialisation."""
    tokens: Annotated[Count | None, BeforeValidator(whole_number)] = None
    """Tokens that each training reads, such as 2M; without it as many as the smallest arm has, up to a million."""
    vocabulary: Annotated[int, Field(ge=300)] = 4096
    """Size of the byte-level vocabulary of a model from scratch."""
    layers: Count = 4
    """Layers of a model from scratch, which is what is trained where no prove.model is given."""
    hidden_size: Count = 192
    """Its width, a multiple of 32, which each attention head has of it."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (extra lm-eval), such as arc_easy, on top."""
    task_documents: Count | None = None
    """At most so many documents of each task."""


class Align(Settings):
    """Prompts and replies that a model is aligned on. Files are JSON arrays or JSON lines."""

    source: str | None = None
    """What `align prepare` reads: arlhf (Dahoas/rm-static) or shp (stanfordnlp/SHP) from the Hub, or a JSON array or
    corpus of any format with the columns prompt, chosen and rejected, with those of SHP, or with instruction and
    output."""
    sample: Count = 1000
    """Rows of it that are used, a uniform draw."""
    actor_data: Path | None = None
    """Rows {user_input, completion} to learn replies from; without it what prepare and expand left."""
    prompt_data: Path | None = None
    """Rows {user_input}: prompts for replies, and for RL; without it what prepare and expand left."""
    reward_data: Path | None = None
    """Rows {user_input, completion, score}, where a null score is to be rated; without it what prepare and expand
    left."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the prompts on which nothing is trained: success is measured on them."""
    held_out_prompts: Count = 100
    """At most so many of them."""
    replies_per_prompt: Annotated[int, Field(ge=0)] = 2
    """Replies of the actor to each other prompt that `align rate` has rated beside reward_data."""
    reply_tokens: Count = 128
    """Longest reply, in tokens, when replies are sampled or judged."""
    reply_temperature: NotNegative = 1.0
    """Of sampled replies."""
    templates: Path = Path("configs/align/templates.json")
    """What `align expand` asks the teacher, by key: actor, rlhf, reward."""
    examples: Annotated[int, Field(ge=0)] = 3
    """Rows of the data that are shown to the teacher as examples with each expansion; 0 starts from nothing."""
    expand_temperature: Positive = 1.0
    """Of the teacher in `align expand`, so that rows differ; other settings of sampling are the teacher's."""


class Actor(Training):
    """Supervised fine-tuning on actor_data."""


class Reward(Training, Budget):
    """What a reply is worth during RL. A budget caps what a teacher costs that judges live."""

    by: str = "student"
    """student: frozen encoder and linear head on the ratings; model: a sequence classifier fine-tuned on them
    (reward.model); teacher: the teacher, live and cached; or a folder or Hub name of a student or classifier."""
    preferences: Path | None = None
    """Pairs {prompt, chosen, rejected} of people: how often the reward prefers the same reply."""


class RL(Training):
    """Reinforcement learning of the actor against the reward."""

    algorithm: Literal["grpo", "rloo", "dpo"] = "grpo"
    """Of TRL. dpo needs no reward: it learns from the best and the worst rated reply to each prompt."""
    repetition_penalty: NotNegative = 1.0
    """Taken off the reward, in points of the score, times the share of a reply's word trigrams that repeat."""


class Tracking(Settings):
    """Where metrics go besides metrics.jsonl in the run folder."""

    to: Literal["wandb", "trackio"] | None = None
    """Send them, with tables of examples, the report and the student, to Weights & Biases (WANDB_MODE=offline works
    without an account) or Trackio (on this machine)."""
    project: str = "gristmill"
    """The project there."""


class Ray(Settings):
    """The cluster that --engine ray works on."""

    address: str | None = None
    """Address of a running cluster (auto, host:6379, ray://host:10001); without it RAY_ADDRESS, or else a cluster on
    this machine alone that ends with the command."""
    actors: Count | None = None
    """Processes that work at once, each with the model loaded once; without it as many as the cluster has room for."""
    cpus: Positive = 1
    """CPU cores of each actor, which computes with as many threads."""
    gpus: NotNegative = 0
    """GPUs of each actor; 0.5 lets two share one, 2 gives each two (teacher.tensor_parallel_size: 2)."""
    restarts: Count = 3
    """Times that one piece of work is tried when actors or machines die under it."""


class Common(Settings):
    """What every stage shares."""

    run_folder: Path = Path("runs/default")
    """Everything a run makes is in here. A URL (s3://, gs://, hf://) becomes the mirror of a folder here."""
    mirror: str | None = None
    """URL where a copy of the run folder is kept up to date while stages work; a run that is not here is fetched from
    it. Scored and kept corpora go there directly."""
    mirror_every_s: Positive = 30
    """Seconds between pushes to the mirror; more where they would take a tenth of the time."""
    seed: int = 0
    """Seed of sampling and splitting."""
    engine: Literal["local", "ray"] = "local"
    """Where rate, label, score, filter and prove work: in this process, or in actors on a Ray cluster that share the
    run folder."""
    shard: Annotated[str, Field(pattern=r"^[1-9]\d*/[1-9]\d*$")] | None = None
    """i/n: do only the i-th of n parts of the work of a stage, beside other processes that do theirs; the same command
    without it then puts them together."""
    ray: Ray = Ray()

    @model_validator(mode="before")
    @classmethod
    def with_mirror(cls, values: Any) -> Any:
        """A run folder that is a URL as its mirror, beside a folder here that is named after it."""
        given = str(values.get("run_folder", "")) if isinstance(values, dict) else ""
        url = re.fullmatch(r"(\w+):/+(.+?)/*", given)  # a Path has lost one of the slashes
        if url is None:
            return values
        mirror = f"{url[1]}://{url[2]}"
        name = f"{mirror.rpartition('/')[2]}-{digest(mirror)[:8]}"
        return {**values, "run_folder": Path("runs") / name, "mirror": mirror}

    corpus: Corpus = Corpus()
    teacher: Teacher = Teacher()
    encoder: Encoder = Encoder()
    tracking: Tracking = Tracking()


class Recipe(Common):
    """A whole run: a section per stage."""

    tune: Tune = Tune()
    plan: Plan = Plan()
    rate: Rate = Rate()
    label: Label = Label()
    train: Train = Train()
    score: Score = Score()
    cuts: Cuts = Cuts()
    audit: Audit = Audit()
    filter: Filter = Filter()
    export: Export = Export()
    finetune: Finetune = Finetune()
    prove: Prove = Prove()
    align: Align = Align()
    actor: Actor = Actor()
    reward: Reward = Reward()
    rl: RL = RL()
    report: Report = Report()


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
        values = yaml_text.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"recipe {path}: {error.strerror}; give a YAML file such as configs/demo.yaml") from None
    except ValueError as error:
        raise SettingsError(f"recipe {path} is not YAML: {error}") from None
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


def explain(error: ValidationError, path: Path | None, flag: str = "") -> str:
    """The first validation error as one line: which file, which key (or `flag`, which has none), what to do."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"{path}: {key}" if path else f"--{key.replace('_', '-')}" if key else flag
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
