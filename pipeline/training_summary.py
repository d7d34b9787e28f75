"""Trainings in a few lines for a terminal; what is not known is left out."""

from typing import Any

from rich.markup import escape

from pipeline.training_charts import interval, known

Values = dict[str, Any]


def tell_finetune(result: Values) -> str:
    """Whether it predicts documents held out better than before."""
    return lines(
        sentence(result),
        fact("perplexity {} to {}", result, "perplexity_before", "perplexity_after", digits=1),
        fact("trained on {} of {} documents", result, "n_trained_on", "n_documents", digits=0)
        + fact(", {} held out", result, "n_held_out", digits=0)
        + fact("; {} steps", result, "n_steps", digits=0)
        + fact(", {} tokens/s", result, "tokens_per_s", digits=0),
    )


def tell_prove(result: Values) -> str:
    """The verdict, then bits per byte of each arm, and its benchmarks."""
    arms = result.get("arms") or {}
    told = [f"{name} {ranged(arm.get('bits_per_byte'), arm.get('interval'))}" for name, arm in arms.items()]
    tasks: dict[str, list[str]] = {}
    for each in result.get("tasks") or []:
        name = f"{each['task']}: {each['metric']}"
        tasks.setdefault(name, []).append(f"{each['arm']} {ranged(each['value'], each['interval'])}")
    return lines(
        sentence(result),
        "bits per byte: " + ", ".join(told) if told else "",
        *(escape(f"{name}: {', '.join(figures)}") for name, figures in tasks.items()),
        fact("{} tokens each", result, "tokens", digits=0)
        + fact(", {} times", result, "n_seeds", digits=0)
        + fact("; judged on {} documents", result, "n_trusted", digits=0),
    )


def tell_counts(result: Values) -> str:
    """Every count of rows that is not 0."""
    return ", ".join(
        f"{value:,} {name.removeprefix('n_').replace('_', ' ')}"
        for name, value in result.items()
        if name.startswith("n_") and known(value) and value
    )


def tell_actor(result: Values) -> str:
    """What it learned from, and the loss."""
    return lines(
        fact("learned from {} of {} replies", result, "n_trained_on", "n_rows", digits=0)
        + fact(", {} too long", result, "n_too_long", digits=0)
        + fact("; {} steps", result, "n_steps", digits=0),
        fact("loss {} to {}", result, "loss_first", "loss_last")
        + fact(", on replies held out {} to {}", result, "held_out_loss_before", "held_out_loss_after"),
    )


def tell_reward(result: Values) -> str:
    """How far the reward follows the teacher, and people."""
    found = result.get("preferences") or {}
    preferred = ranged(found.get("accuracy"), found.get("interval"), 2)
    return lines(
        sentence(result),
        f"judged by {escape(str(result['by']))}" + fact(", {} replies rated", result, "n_rated", digits=0),
        f"prefers what people prefer in {preferred} of {found.get('n', 0):,} pairs"
        if known(found.get("accuracy"))
        else "",
    )


def tell_rl(result: Values) -> str:
    """What the teacher says of replies before and after, beside the reward's own."""
    return lines(
        sentence(result),
        escape(str(result.get("warning") or "")),
        fact("{} prompts", result, "n_prompts", digits=0)
        + fact(", {} held out", result, "n_held_out", digits=0)
        + fact("; {} steps", result, "n_steps", digits=0)
        + (f" of {escape(str(result['algorithm']).upper())}" if result.get("algorithm") else ""),
        f"stopped by {result['stopped_by']}; raise it and run with --redo to learn for longer"
        if result.get("stopped_by")
        else "",
    )


def sentence(result: Values) -> str:
    """What the stage says itself."""
    return escape(str(result.get("sentence") or ""))


def fact(words: str, result: Values, *names: str, digits: int = 2) -> str:
    """Words with these figures; nothing where one of them is not known."""
    values = [result.get(name) for name in names]
    return words.format(*(f"{value:,.{digits}f}" for value in values)) if all(map(known, values)) else ""


def ranged(value: Any, ends: Any = None, digits: int = 3) -> str:
    """2.051 [2.031, 2.071]."""
    if not known(value):
        return "not known"
    there = interval(ends)
    return f"{value:.{digits}f}" + (f" [{there[0]:.{digits}f}, {there[1]:.{digits}f}]" if there else "")


def lines(*told: str) -> str:
    """Those lines that say something."""
    return "\n".join(line.lstrip(",; ") for line in told if line)
