"""What the trainings of a proof have in common: the texts they are judged on, and equally many tokens for each."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import arms, corpus, scratch
from pipeline.arguments import typed
from pipeline.arms import Drawn
from pipeline.config import Prove, Recipe
from pipeline.errors import UserError
from pipeline.models import load_tokenizer

log = logging.getLogger("gristmill")

Tokens = NDArray[np.int32]

FROM_SCRATCH = {"max_length": 256, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "adam_beta2": 0.95}
"""Arguments of SFTConfig for a model from scratch where the recipe says nothing: steps of 2,048 tokens."""
FURTHER = {"max_length": 512, "per_device_train_batch_size": 8, "learning_rate": 5e-5}
"""The same for prove.model."""
MOST_TOKENS = 1_000_000
"""Tokens of a training where the recipe says nothing and each arm has as many."""
MOST_EPOCHS = 4
"""Repeated more often, texts teach much less than as many others would (arXiv:2305.16264)."""
FEWEST_STEPS, FEWEST_TRUSTED = 10, 5
"""Below which a training, or a judgement, says nothing."""
BYTES_PER_TOKEN = 12
"""More than a token has on average: a draw of so many bytes fills a budget of tokens."""


class Training(NamedTuple):
    """An arm with a seed."""

    arm: str
    seed: int
    blocks: Tokens
    """(n_blocks, block length) What is learned from."""
    folder: Path


class Proof(NamedTuple):
    """All trainings, and what they are judged on."""

    tokenizer: Any
    texts: list[str]
    trainings: list[Training]
    tokens: int
    """Tokens of each training."""
    arms: Mapping[str, dict[str, Any]]
    """Documents and tokens that each arm has, and how often a training reads them."""
    n_copies: int
    n_repeated: int
    """Trusted texts left out, as copies of the corpus and of one another."""

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return int(self.trainings[0].blocks.shape[1])


def prepare(recipe: Recipe, folder: Path) -> Proof:
    """Draw documents for every arm and seed and cut them into blocks; the same however often it is done."""
    settings, trusted = recipe.prove, arms.read_trusted(recipe)
    length = block_length(settings)
    most = settings.tokens or MOST_TOKENS
    ids = {corpus.text_id(text) for text in trusted}
    drawn = arms.draw(recipe, settings.arms, BYTES_PER_TOKEN * most, ids)
    check_arms(settings, drawn)
    tokenizer = words(settings, folder / "scratch", drawn.whole)
    read = {key: tokens_of(tokenizer, texts, most) for key, texts in drawn.texts.items()}
    sizes: dict[str, int] = {arm: size(drawn, arm, read[arm, 0]) for arm in settings.arms}
    tokens = budget(settings, sizes) // length * length
    texts, n_copies, n_repeated = judged_on(settings, trusted, drawn, read)
    trainings = [
        Training(arm, seed, blocks(read[arm, seed], tokens, length, seed), folder / "trainings" / f"{arm}-{seed}")
        for seed in range(settings.seeds)
        for arm in settings.arms
    ]
    of_arms: dict[str, dict[str, Any]] = {
        arm: {"n_documents": drawn.n_documents[arm], "n_tokens": size, "epochs": tokens / size}
        for arm, size in sizes.items()
    }
    return Proof(tokenizer, texts, trainings, tokens, of_arms, n_copies, n_repeated)


def check_arms(settings: Prove, drawn: Drawn) -> None:
    """Refuse an arm without documents."""
    why = {
        "kept": "the filter kept nothing; lower its cut",
        "rejected": "the filter rejected nothing; raise its cut, or give prove.arms [kept, random] once it does",
        "random": "the scored corpus holds no text; score it with its text",
    }
    for arm in settings.arms:
        if not drawn.n_documents[arm]:
            raise UserError(f"prove: {why[arm]}")


# -- tokens -----------------------------------------------------------------------------------------------------------


def arguments(settings: Prove) -> dict[str, Any]:
    """Arguments of SFTConfig: the recipe's over ours."""
    return {**(FURTHER if settings.model else FROM_SCRATCH), **settings.args}


def block_length(settings: Prove) -> int:
    """Tokens of a block."""
    return int(typed("int", arguments(settings)["max_length"], "prove.args.max_length"))


def words(settings: Prove, folder: Path, whole: Sequence[str]) -> Any:
    """The tokenizer of prove.model, or one learned from the whole corpus, which is kept in a folder for each seed with
    the model that training begins from."""
    if settings.model:
        return load_tokenizer(settings.model, "prove.model", settings.revision)
    begun = folder / "0"
    found = scratch.read(begun) if begun.exists() else scratch.tokenizer(whole, settings.vocabulary)
    for seed in range(settings.seeds):
        if not (folder / str(seed)).exists():
            scratch.write(folder / str(seed), settings, found, block_length(settings), seed)
    return found


def tokens_of(tokenizer: Any, texts: Sequence[str], most: int, at_a_time: int = 64) -> list[Tokens]:
    """The tokens of the first documents, as many as hold so many tokens, each with those that begin and end a text."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = [] if begin in (None, end) else [begin]
    after = [end] if end is not None else []
    found: list[Tokens] = []
    n = 0
    for start in range(0, len(texts), at_a_time):
        batch = tokenizer(list(texts[start : start + at_a_time]), add_special_tokens=False, verbose=False)
        for ids in batch["input_ids"]:
            found.append(np.array([*before, *ids, *after], np.int32))
            n += len(found[-1])
            if n >= most:
                return found
    return found


def size(drawn: Drawn, arm: str, read: list[Tokens]) -> int:
    """Tokens that an arm has: counted where all its documents were read, else by their bytes."""
    n = sum(map(len, read))
    if len(read) == drawn.n_documents[arm]:
        return n
    n_bytes = sum(len(text.encode()) for text in drawn.texts[arm, 0][: len(read)])
    return round(n / n_bytes * drawn.n_bytes[arm])


def budget(settings: Prove, sizes: Mapping[str, int]) -> int:
    """Tokens of each training; refused where an arm would repeat too often, or be over too soon."""
    smallest = min(sizes, key=lambda arm: sizes[arm])
    least, tokens = sizes[smallest], settings.tokens or min(MOST_TOKENS, sizes[smallest])
    if tokens > MOST_EPOCHS * least:
        raise UserError(
            f"prove.tokens: {tokens:,} are more than {MOST_EPOCHS} times the {least:,} that {smallest} has; give at"
            f" most {MOST_EPOCHS * least}, or score and filter more text"
        )
    given = arguments(settings)
    batch = int(given["per_device_train_batch_size"]) * int(given.get("gradient_accumulation_steps", 1))
    needed = FEWEST_STEPS * batch * block_length(settings)
    if tokens < needed:
        raise UserError(
            f"prove: {smallest} has {least:,} tokens and each training reads {tokens:,}, but {FEWEST_STEPS} steps of"
            f" {batch} blocks take {needed:,}; score and filter more text, or lower"
            " prove.args.per_device_train_batch_size and prove.args.max_length"
        )
    for arm, n in sizes.items():
        if tokens > n:
            log.warning("prove: %s has %d tokens, so it is read %.1f times to make %d", arm, n, tokens / n, tokens)
    return tokens


def blocks(read: list[Tokens], tokens: int, length: int, seed: int) -> Tokens:
    """Documents one after the other, cut into blocks: (n_blocks, length); read again, in another order, until there
    are enough."""
    rng = np.random.default_rng(seed)
    parts, n = list(read), sum(map(len, read))
    while n < tokens:
        parts += [read[i] for i in rng.permutation(len(read))]
        n += sum(map(len, read))
    return np.concatenate(parts)[: tokens // length * length].reshape(-1, length)


# -- what is judged on ------------------------------------------------------------------------------------------------


def judged_on(
    settings: Prove, trusted: list[str], drawn: Drawn, read: Mapping[tuple[str, int], Sequence[Tokens]]
) -> tuple[list[str], int, int]:
    """The trusted texts that are no copies of what is in the corpus or among what is learned from, nor of one another,
    and how many were left out as either."""
    learned = {text for key, ids in read.items() for text in drawn.texts[key][: len(ids)]}
    is_copy = arms.copied(trusted, learned)
    others = [
        text
        for text, is_one in zip(trusted, is_copy.tolist(), strict=True)
        if not is_one and corpus.text_id(text) not in drawn.ids
    ]
    is_repeated = arms.repeated(others)
    texts = [text for text, is_one in zip(others, is_repeated.tolist(), strict=True) if not is_one]
    n_copies, n_repeated = len(trusted) - len(others), len(others) - len(texts)
    if len(texts) < FEWEST_TRUSTED:
        raise UserError(
            f"prove.trusted: of {len(trusted)} texts of {settings.trusted}, {n_copies} are in the corpus, nearly or in"
            f" part, and {n_repeated} say what another one says, which leaves {len(texts)}; give texts that the filter"
            f" never saw, {FEWEST_TRUSTED} at least"
        )
    return texts, n_copies, n_repeated
