"""What a search found, in a sentence and in figures."""

from typing import Any

from pipeline import tried
from pipeline.trials import Compared, Params, Trial


def sentence(objective: str, best: Trial, compared: Compared) -> str:
    """What a person has to know, on one line."""
    called, gain, interval = tried.called(objective), compared.gain, compared.gain_interval
    if best.number == tried.DEFAULTS:
        return "No better than the default: nothing that was tried beats it."
    if gain is None:
        return f"Not known to be better than the default: {called} is not defined on the documents held out."
    if interval is None:
        return (
            f"Not known to be better than the default: {called} {compared.best[objective]:.3f} against"
            f" {compared.default[objective]:.3f} on {compared.best['n']} documents held out, which are too few"
            " to tell."
        )
    verdict = "Better" if is_better(best, compared) else "Worse" if interval[1] < 0 else "No better"
    chance = ", which may be chance" if verdict == "No better" else ""
    return (
        f"{verdict} than the default: {called} {compared.best[objective]:.3f} against"
        f" {compared.default[objective]:.3f} on {compared.best['n']} documents held out, a gain of {gain:+.3f} (95%"
        f" {interval[0]:+.3f} to {interval[1]:+.3f}){chance}.{price(compared)}"
    )


def price(compared: Compared) -> str:
    """What both cost, where that is known and not the same."""
    best, default = (side.get("usd_per_1000") for side in (compared.best, compared.default))
    if best is None or default is None or best == default:
        return ""
    return f" It costs ${best:.3g} per 1,000 documents instead of ${default:.3g}."


def is_better(best: Trial, compared: Compared) -> bool:
    """Whether it is another than the defaults, and the whole interval of the gain is above 0."""
    return best.number != tried.DEFAULTS and compared.gain_interval is not None and compared.gain_interval[0] > 0


def is_worth_it(compared: Compared, usd_weight: float) -> bool:
    """Whether the best, its price taken off, gained anything on the documents held out."""
    prices = [side.get("usd_per_1000") or 0.0 for side in (compared.best, compared.default)]
    return compared.gain is not None and compared.gain - usd_weight * (prices[0] - prices[1]) > 0


def figures(trial: Trial, objective: str, about: Params, held_out: dict[str, Any]) -> dict[str, Any]:
    """The best or the defaults: the objective on the documents chosen on, then what is known of those held out."""
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in held_out.items()}
    return {**about, "chosen_on": trial.figures[objective], **as_json}
