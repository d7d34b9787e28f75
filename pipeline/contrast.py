"""By how much one arm is better than another: an interval over trainings and documents at once."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import Floats, Interval


class Estimate(NamedTuple):
    """A mean, or a difference of means, with its 95% interval; None where one seed says nothing of chance."""

    value: float
    interval: Interval | None


def estimate(values: Floats, sizes: NDArray[Any]) -> Estimate:
    """The sum of values (n_seeds, n_documents) over the sum of sizes (n_documents,): bits over bytes, or points over
    ones.

    Trainings differ by seed and documents among themselves, so the interval has two parts: Student's t over the seeds
    (n_seeds - 1 degrees of freedom), and over the documents, whose ratio to their sizes is linearised (Cochran 1977,
    section 6.4). Their half-widths are added in squares, each with its own t (Howe 1974). In simulated studies without
    a difference (2 to 5 seeds, 30 or 200 documents, varying mostly by seed, by document, by both or by their
    interaction) it held 0 in 91 to 99.9%; the bootstrap that draws seeds and documents anew did in 59 to 99%, as
    three seeds drawn again are too alike.
    """
    n_seeds, n_documents = values.shape
    total = float(sizes.sum())
    by_seed = values.sum(axis=1) / total
    mean = float(by_seed.mean())
    if n_seeds < 2 or n_documents < 2:
        return Estimate(mean, None)
    off = values.mean(axis=0) - mean * sizes
    of_documents = n_documents / (n_documents - 1) * float((off**2).sum()) / total**2
    of_seeds = float(by_seed.var(ddof=1)) / n_seeds
    half = math.sqrt(student_t(n_seeds - 1) ** 2 * of_seeds + student_t(n_documents - 1) ** 2 * of_documents)
    return Estimate(mean, (mean - half, mean + half))


def student_t(freedom: int) -> float:
    """The quantile that leaves 2.5% above it."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def compare(better: str, than: str, bits: Mapping[str, Floats], n_bytes: NDArray[np.int64]) -> dict[str, Any]:
    """Bits a byte that one arm saves against another, paired by seed and document, and what follows from it."""
    gain = estimate(bits[than] - bits[better], n_bytes)
    values = (estimate(bits[better], n_bytes).value, estimate(bits[than], n_bytes).value)
    told = sentence((better, than), values, gain, f"bits per byte on {len(n_bytes):,} trusted documents")
    return {"better": better, "than": than, "gain": gain.value, "interval": gain.interval, "sentence": told}


def sentence(names: tuple[str, str], values: tuple[float, float], gain: Estimate, unit: str) -> str:
    """What a comparison says, in words; with an interval across 0, which differences it rules out."""
    if gain.interval is None:
        return (
            f"Nothing can be said of {names[0]} and {names[1]}: {values[0]:.3f} and {values[1]:.3f} {unit}, from one"
            " training each; give prove.seeds 3 or more."
        )
    low, high = gain.interval
    if low <= 0 <= high:
        return (
            f"No difference found between {names[0]} and {names[1]}: {values[0]:.3f} and {values[1]:.3f} {unit}, a"
            f" gain of {gain.value:.3f} (95% {low:.3f} to {high:.3f}); a difference beyond {max(-low, high):.3f} is"
            " ruled out."
        )
    first, second = (0, 1) if low > 0 else (1, 0)
    ends = sorted((abs(low), abs(high)))
    return (
        f"{names[first].capitalize()} is better than {names[second]}: {values[first]:.3f} against"
        f" {values[second]:.3f} {unit}, a gain of {abs(gain.value):.3f} (95% {ends[0]:.3f} to {ends[1]:.3f})."
    )
