"""Small real models and corpora that the tests share. Nothing here reaches a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other make small models several times slower

import json
import re
import signal
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

# A run in the background ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("shared machine", deadline=None, derandomize=True)
settings.load_profile("shared machine")

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}
"""Configuration of a random encoder of two layers."""
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
"""Its special tokens, where a family wants them named."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prose() -> list[str]:
    """Real texts, from Python's own language reference."""
    return [text.strip()[:1500] for _, text in sorted(topics.items()) if len(text) > 600]


def characters(texts: list[str]) -> list[str]:
    """Every character that is no space, sorted."""
    return sorted({character for text in texts for character in text if not character.isspace()})


def commonest_words(texts: list[str], n: int) -> list[str]:
    """The commonest words: a vocabulary that is the same in every run, which the trainers' own are not."""
    counts = Counter(word for text in texts for word in re.findall(r"\w+", text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:n]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some seventy real texts of 600 to 1,500 characters."""
    return prose()


@pytest.fixture
def corpus_folder(tmp_path: Path, texts: list[str]) -> Path:
    """Sixty documents in three parquet shards, with a nested column and a known quality."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard in range(3):
        rows = [
            {"id": f"doc-{i}", "text": texts[i], "meta": {"length": len(texts[i])}, "good": i % 2 == 0}
            for i in range(shard * 20, shard * 20 + 20)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{shard}.parquet")
    return folder


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-causal")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = ["This text is educational. spam yes no Yes No 0 1 2 3 4 5 Score: Quality: "] * 50
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(prose() + words, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.4,  # large enough that probabilities differ from document to document
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of two layers with a unigram tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny-t5")
    texts = [*prose(), *["yes no Yes No YES NO"] * 200]
    pieces = ["▁", *characters(texts), *(f"▁{word}" for word in commonest_words(texts, 500))]
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    scores = [(piece, -3.0 - 0.01 * place) for place, piece in enumerate(pieces)]
    unigram = Tokenizer(models.Unigram(special + scores, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=2.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a WordPiece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-encoder")
    texts = [text.lower() for text in prose()]
    pieces = [prefix + character for prefix in ("", "##") for character in characters(texts)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = dict.fromkeys([*special, *pieces, *commonest_words(texts, 600)])
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=128)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_align(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts/align_tiny.py makes (model, actor.json, prompts.json), and `actor`, the model taught to reply."""
    import runpy

    from pipeline import training

    folder = tmp_path_factory.mktemp("align-tiny")
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "align_tiny.py"))
    script["make"](folder, seed=0)
    rows = json.loads((folder / "actor.json").read_text(encoding="utf-8"))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    args = {"max_steps": 120, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "max_length": 64}
    given = {"trainer": "sft", "section": "actor", "model": str(folder / "model"), "device": "cpu", "args": args}
    where = {"rows": folder / "rows.parquet", "folder": folder / "sft"}
    made = training.run(training.Job.model_validate({**given, **where}))
    made.rename(folder / "actor")
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path, corpus_folder: Path, tiny_causal: Path, tiny_encoder: Path) -> Path:
    """A recipe of the four stages on small models; JSON is YAML."""
    prompt = tmp_path / "prompt.md"
    prompt.write_text(
        "---\nscale: [0, 5]\nread: choices\nanswer_start: This text is\nchoices:\n"
        '  - {value: 5, answers: [" educational"]}\n  - {value: 0, answers: [" spam"]}\n---\n'
        "What kind of text is this?\n\n{{ text }}\n",
        encoding="utf-8",
    )
    recipe = {
        "run_folder": str(tmp_path / "run"),
        "corpus": {"path": str(corpus_folder), "id_column": "id"},
        "teacher": {"model": str(tiny_causal), "document_tokens": 64, "dtype": "float32", "device": "cpu"},
        "encoder": {"model": str(tiny_encoder), "max_tokens": 64, "dtype": "float32", "device": "cpu"},
        "rate": {"prompt": str(prompt), "sample": 50, "gold_column": "good"},
        "filter": {"keep_share": 0.3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path
