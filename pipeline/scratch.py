"""A small Llama that begins from nothing, with a byte-level vocabulary learned from the whole corpus."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import language_model
from pipeline.config import Prove
from pipeline.errors import UserError, needs

END = "<|endoftext|>"
"""Stands between documents, and before each that is judged."""
HEAD = 32
"""Width of an attention head."""


def tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer, so that every text can be said and no arm owns the vocabulary."""
    tokenizers, transformers = needs("tokenizers", "torch"), needs("transformers", "torch")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def read(folder: Path) -> Any:
    """The tokenizer that `write` left."""
    return needs("transformers", "torch").AutoTokenizer.from_pretrained(folder)


def model(settings: Prove, n_tokens: int, max_length: int, seed: int) -> Any:
    """A Llama with random weights for a vocabulary of `n_tokens`; the same for the same seed."""
    torch, transformers = needs("torch", "torch"), needs("transformers", "torch")
    width = settings.hidden_size
    if width % HEAD:
        raise UserError(f"prove.hidden_size: {width} is not a multiple of {HEAD}, such as {6 * HEAD}")
    shape = transformers.LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // HEAD * HEAD,
        num_hidden_layers=settings.layers,
        num_attention_heads=width // HEAD,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(shape)


def write(folder: Path, settings: Prove, words: Any, max_length: int, seed: int) -> None:
    """A model of a seed as a folder that training begins from."""
    language_model.save(folder, words, model(settings, len(words), max_length, seed))
