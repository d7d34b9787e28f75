"""Make what configs/align/tiny.yaml learns from: a random model with a vocabulary of some forty words, and its data.

    python scripts/align_tiny.py data/align-tiny [--seed 0]

Prompts ask about things; replies to learn from call them kind and unkind words, more often the
latter. So small a model learns within seconds, and the same seed gives the same files.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from random import Random

from pipeline.cli import quieten_libraries

ASKS = ("tell me about", "what is", "say something of", "how is")
OWNERS = ("the", "my")
THINGS = ("cat", "dog", "friend", "house", "day", "garden", "song", "town")
KIND = ("good", "kind", "happy", "warm", "gentle", "lovely", "nice", "sweet")
UNKIND = ("bad", "rude", "ugly", "nasty", "awful", "stupid", "cold", "mean")
KIND_SHARE = 0.3
"""Share of the words in replies to learn from that are kind."""
REPLIES = 4
"""Replies to learn from, to each prompt."""

SPECIAL = ("<pad>", "<end>", "<unknown>", "<user>", "<assistant>")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def main() -> int:
    """Write model and data."""
    parser = argparse.ArgumentParser(description="Make a tiny model and its data for gristmill align.")
    parser.add_argument("folder", type=Path, help="where they go")
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights and of the replies")
    given = parser.parse_args()
    quieten_libraries()
    prompts = make(given.folder, given.seed)
    print(f"{len(prompts)} prompts, {REPLIES} replies to each and a model of {len(words())} words in {given.folder}")
    return 0


def make(folder: Path, seed: int) -> list[str]:
    """Write all of it; the prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [" ".join(some) for some in product(ASKS, OWNERS, THINGS)]
    write_rows(folder / "prompts.json", [{"user_input": prompt} for prompt in prompts])
    write_rows(folder / "actor.json", replies(prompts, Random(seed)))
    write_model(folder / "model", seed)
    return prompts


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """A JSON array, a row a line."""
    text = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def replies(prompts: list[str], rng: Random) -> list[dict[str, str]]:
    """Replies such as `my cat is nasty and warm`, shuffled."""

    def word() -> str:
        return rng.choice(KIND if rng.random() < KIND_SHARE else UNKIND)

    rows = [
        {"user_input": prompt, "completion": f"{' '.join(prompt.split()[-2:])} is {word()} and {word()}"}
        for prompt in prompts
        for _ in range(REPLIES)
    ]
    rng.shuffle(rows)
    return rows


def words() -> list[str]:
    """The whole vocabulary."""
    asked = " ".join(ASKS).split()
    return list(dict.fromkeys([*SPECIAL, *asked, *OWNERS, *THINGS, *KIND, *UNKIND, "is", "and"]))


def write_model(folder: Path, seed: int) -> None:
    """A random Llama of two layers whose tokens are words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(words())}
    by_word = Tokenizer(models.WordLevel(known, unk_token="<unknown>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_word,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        additional_special_tokens=["<user>", "<assistant>"],
        model_max_length=64,
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=known["<pad>"],
        bos_token_id=None,
        eos_token_id=known["<end>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
