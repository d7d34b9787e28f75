"""How often a reward prefers the reply that people prefer."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import conversations, prepare
from pipeline.errors import UserError
from pipeline.metrics import Interval, bootstrap_interval
from pipeline.rewards import Reward

SETTING = "reward.preferences"
COLUMNS = ("prompt", "chosen", "rejected")
AT_A_TIME = 64
"""Pairs that are rewarded together."""


class Preference(NamedTuple):
    """A prompt with the reply that was preferred, and the other one."""

    prompt: str
    chosen: str
    rejected: str


def read(path: Path) -> list[Preference]:
    """The pairs of a file: a JSON array, JSON lines or parquet with prompt, chosen and rejected."""
    is_table = path.suffix == ".parquet"
    rows = enumerate(from_parquet(path), 1) if is_table else conversations.rows(path, SETTING)
    found = [preference(row, f"{SETTING}: {path}, row {number}") for number, row in rows]
    if not found:
        raise UserError(f"{SETTING}: {path} has no rows; give {{prompt, chosen, rejected}}")
    return found


def preference(row: dict[str, Any], where: str) -> Preference:
    """One row, if it has all three texts; a prompt of several turns as align prepare writes it."""
    for name in COLUMNS:
        if not isinstance(row.get(name), str):
            raise UserError(f"{where} has no text {name!r}; there are: {', '.join(row) or 'no keys'}")
    try:
        return Preference(prepare.user_input(row["prompt"]).strip(), row["chosen"], row["rejected"])
    except prepare.Unusable as reason:
        raise UserError(f"{where}: {reason}; leave the row out") from None


def from_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{SETTING}: {path} cannot be read ({str(error)[:100]}); give parquet") from None
    rows: list[dict[str, Any]] = table.select([name for name in COLUMNS if name in table.column_names]).to_pylist()
    return rows


def accuracy(reward: Reward, pairs: list[Preference]) -> dict[str, Any]:
    """Share of the pairs in which the chosen reply has the higher reward, ties half, with a 95% interval from
    resampled prompts. Pairs of which a reply has no reward don't count, and their number stands beside."""
    gaps = np.concatenate([gap(reward, pairs[i : i + AT_A_TIME]) for i in range(0, len(pairs), AT_A_TIME)])
    known = np.isfinite(gaps)
    won = (1 + np.sign(gaps[known])) / 2
    return {
        "n": len(won),
        "n_unscored": int((~known).sum()),
        "accuracy": float(won.mean()) if len(won) else None,
        "interval": interval(won, np.array([pair.prompt for pair in pairs])[known]),
    }


def gap(reward: Reward, pairs: list[Preference]) -> Any:
    """(n_pairs,) reward of the chosen reply less that of the other."""
    found = reward([(pair.prompt, reply) for pair in pairs for reply in (pair.chosen, pair.rejected)])
    return found[::2] - found[1::2]


def interval(won: Any, prompts: Any) -> Interval | None:
    """Of the mean of (n_pairs,) values, those of one prompt drawn together."""
    of_prompt = np.unique(prompts, return_inverse=True)[1]
    return bootstrap_interval(
        lambda sums, counts: sums.sum(axis=1) / counts.sum(axis=1), np.bincount(of_prompt, won), np.bincount(of_prompt)
    )
