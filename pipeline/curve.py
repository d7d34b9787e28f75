"""The learning curve: how good a student of fewer ratings would be, and what more of them would buy."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import calibration, metrics, splits
from pipeline.metrics import Bools, Floats

SHARES = (0.1, 0.2, 0.4, 0.7, 1.0)

N_DRAWS = (5, 3, 2, 1, 1)
"""Draws of each share, over which a point is averaged."""

N_FOLDS = 5

N_RESAMPLES = 500

EXPONENTS = np.linspace(0.2, 1.5, 14)
"""Of the power laws that errors are known to follow (arXiv:1712.00409)."""

MORE = 2000

MEASURES = ("spearman", "kappa")

Learn = Callable[[Bools], Floats]
"""Predictions (n,) of a head that has learned from these documents (n,)."""


def of_score(
    learn: Learn,
    truth: Floats,
    scale: tuple[float, float],
    judged: Bools,
    units: NDArray[np.int64],
    strata: Sequence[Hashable],
    rounding: str,
    n_train: int,
    n_rated: int,
    seed: int,
) -> dict[str, Any]:
    """Points of the curve and what more ratings would buy, by cross-validation over n documents.

    Only documents of `judged` (n,) are judged on. Of `n_rated` documents `n_train` are learned from; of more ratings
    the same share would be. The intervals resample the documents judged on, not those learned from.
    """
    folds = splits.folds(units, strata, N_FOLDS, seed)
    drawn = [draws(learn, folds, units, share, n, seed) for share, n in zip(SHARES, N_DRAWS, strict=True)]
    sizes = np.array([np.mean([n for _, n in each]) for each in drawn])
    guesses = [np.array([guess[judged] for guess, _ in each]) for each in drawn]
    tables = resampled(truth[judged], guesses, scale, rounding)
    whole = {name: table[:, 0] for name, table in tables.items()}
    at = [gain(sizes, tables["kappa"], n_train, n_train / n_rated, n_more) for n_more in sorted({n_rated, MORE})]
    return {
        "points": [point(round(size), whole, tables, i) for i, size in enumerate(sizes)],
        "more": at,
    }


def draws(
    learn: Learn, folds: NDArray[np.int64], units: NDArray[np.int64], share: float, n_draws: int, seed: int
) -> list[tuple[Floats, float]]:
    """For each draw the held-out prediction of every document (n,) by heads that learned from this share of the other
    folds, and how many documents that were on average."""
    found = []
    for draw in range(n_draws):
        order = np.random.default_rng([seed, draw]).random(units.max() + 1)[units]
        guess, sizes = np.empty(len(units)), []
        for fold in range(N_FOLDS):
            rest = folds != fold
            taken = rest & (order <= np.quantile(order[rest], share))
            guess[~rest] = learn(taken)[~rest]
            sizes.append(int(taken.sum()))
        found.append((guess, float(np.mean(sizes))))
    return found


def resampled(truth: Floats, guesses: list[Floats], scale: tuple[float, float], rounding: str) -> dict[str, Floats]:
    """Each measure of each share, averaged over its draws (n_draws, n): (n_shares, 1 + n_resamples), that of all
    documents first."""
    whole, n = metrics.int_scores(truth, scale), len(truth)
    ints = [np.array([rounded(truth, guess, scale, rounding) for guess in of_share]) for of_share in guesses]
    rows = [np.arange(n)[None], *(drawn for (drawn,) in metrics.resamples([np.arange(n)], 0, N_RESAMPLES))]

    def over(measure: Callable[..., Floats], a: NDArray[Any], sides: list[NDArray[Any]]) -> Floats:
        return np.array(
            [
                np.concatenate([np.mean([measure(a[drawn], b[drawn]) for b in of_share], axis=0) for drawn in rows])
                for of_share in sides
            ]
        )

    return {
        "spearman": over(metrics.spearman_rows, truth, list(guesses)),
        "kappa": over(metrics.kappa_rows, whole, ints),
    }


def rounded(truth: Floats, guess: Floats, scale: tuple[float, float], rounding: str) -> NDArray[np.int8]:
    """Whole scores of held-out predictions (n,), at cuts fitted to them where that is how they are rounded."""
    cuts = calibration.fitted_cuts(truth, guess, scale) if rounding == "fitted" else ()
    return metrics.int_scores(guess, scale, cuts)


def point(n: int, whole: dict[str, Floats], tables: dict[str, Floats], i: int) -> dict[str, Any]:
    """One point of the curve."""
    found: dict[str, Any] = {"n": n}
    for name in MEASURES:
        found[name] = float(whole[name][i]) if np.isfinite(whole[name][i]) else None
        found[f"{name}_interval"] = metrics.percentile_interval(tables[name][i, 1:])
    return found


# -- what more ratings would buy --------------------------------------------------------------------------------------


def gain(sizes: Floats, kappas: Floats, n_train: int, share: float, n_more: int) -> dict[str, Any]:
    """What so many more ratings would add to kappa (n_sizes, 1 + n_resamples), this share of them learned from: the
    mean over all exponents, and 95% of them and the resamples.

    Five points cannot tell the exponent. Of simulated students the nearest one alone promised up to twice the gain,
    with 95% intervals that held it in 50 to 83 of 100.
    """
    now, then = extrapolate(sizes, kappas, np.array([n_train, n_train + share * n_more]))
    of_all, gained = float((then - now)[:, 0].mean()), metrics.percentile_interval((then - now)[:, 1:].ravel())
    defined = bool(np.isfinite(of_all))
    return {
        "n_more": n_more,
        "measure": "kappa",
        "gain": of_all if defined else None,
        "gain_interval": gained,
        "sentence": sentence(n_more, of_all, gained) if defined else None,
    }


def sentence(n_more: int, gained: float, between: tuple[float, float] | None) -> str:
    """What more ratings would buy, for people."""
    doubt = f" (95% interval {between[0]:+.3f} to {between[1]:+.3f})" if between else ""
    return f"{n_more:,} more ratings would buy about {gained:+.3f} kappa{doubt}"


def extrapolate(sizes: Floats, values: Floats, at: Floats) -> tuple[Floats, Floats]:
    """Values (n_exponents, n_curves) at both of `at`, never above 1, of the power laws a - b n^-c, b >= 0, that are
    nearest to each column of `values` (n_sizes, n_curves): a and b by least squares for each c."""
    found = np.minimum([power_law(sizes, values, at, exponent) for exponent in EXPONENTS], 1.0)
    return found[:, 0], found[:, 1]


def power_law(sizes: Floats, values: Floats, at: Floats, exponent: float) -> Floats:
    """Values (n_at, n_curves) of the best curve with this exponent."""
    x, asked = sizes**-exponent, at**-exponent
    centred = x - x.mean()
    slope = np.minimum(centred @ values / max(float(centred @ centred), 1e-300), 0)
    return np.asarray(values.mean(axis=0) - slope * x.mean() + np.outer(asked, slope))
