"""Which results of a run become which charts; those of which nothing is known are left out."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from pipeline import bars, pictures
from pipeline.bars import Bars
from pipeline.errors import needs
from pipeline.examples import whole
from pipeline.pictures import Line

Values = dict[str, Any]
Charts = dict[str, Any]
"""SVG by name, as markup that is not escaped."""


def of_run(results: dict[str, Values], found: Values, scale: tuple[float, float], cut: float | None) -> Charts:
    """Charts of all stages but train; `found` are the shortcuts, `cut` the score from which documents are kept."""
    drawn = {
        "ratings": counted({"": results.get("rate", {}).get("int_score_counts")}, scale, "score by the teacher"),
        "scores": scored_counts(results.get("score", {}), scale),
        "labels": labels(results.get("label", {})),
        "cuts": quality(results.get("cuts", {}).get("curve") or [], results.get("filter", {}).get("kept_share")),
        "histogram": histogram(results.get("cuts", {}), cut),
        "audit": quality(results.get("audit", {}).get("by_cut") or [], None),
        "shortcuts": explained(found.get("shortcuts") or []),
    }
    return {name: markup(chart) for name, chart in drawn.items() if chart}


def of_target(found: Values) -> Charts:
    """Charts of what the student learned in one matter."""
    bins, points = found.get("calibration") or [], (found.get("learning_curve") or {}).get("points") or []
    counts = found.get("int_score_counts") or {}
    ends = [each[side] for each in bins for side in ("predicted", "actual")]
    scores = sorted({name for of in counts.values() for name in of}, key=int)
    called = {ROUNDINGS.get(who, who): [of.get(name, 0) for name in scores] for who, of in counts.items()}
    drawn = {
        "calibration": pictures.calibration(bins, (min(ends), max(ends))) if bins else None,
        "rounding": pictures.bars(scores, called, "documents of the test part by int_score") if scores else None,
        "learning": pictures.lines(
            [curve(points, "spearman", "Spearman"), curve(points, "kappa", "kappa")], "ratings", "", log_x=True
        )
        if points
        else None,
    }
    return {name: markup(chart) for name, chart in drawn.items() if chart}


ROUNDINGS = {"teacher": "teacher", "fitted": "fitted cuts", "half_up": "half up"}


def markup(chart: str) -> Any:
    """A chart that is not escaped: it is ours."""
    return needs("markupsafe", "plots").Markup(chart)


def counted(
    series: dict[str, dict[str, int] | None],
    scale: tuple[float, float],
    label: str,
    colours: Sequence[str] = pictures.SERIES,
) -> str | None:
    """Documents by whole score, those that never occur among them; one series or several."""
    there = {name: counts for name, counts in series.items() if counts}
    names = list(dict.fromkeys([*whole(scale), *chain.from_iterable(there.values())]))
    values = {name: [counts.get(each, 0) for each in names] for name, counts in there.items()}
    return pictures.bars(names, values, label, colours) if there else None


def scored_counts(score: Values, scale: tuple[float, float]) -> str | None:
    """Documents of the corpus by whole score, under both roundings where they differ."""
    written, half_up = score.get("int_score_counts"), score.get("half_up_counts")
    series = {"as written": written, "half up": None if half_up == written else half_up}
    return counted(series, scale, "int_score", pictures.SERIES[1:])


def labels(result: Values) -> str | None:
    """The distribution of labels of one corpus."""
    if not result.get("levels"):
        return None
    n_asked = result["n_sampled"] - result.get("unlabelled", {}).get("not_asked", 0)
    return bars.as_svg(Bars("", result["levels"], result["no_match"], n_asked, n_asked - result["n_labelled"]))


def quality(rows: Iterable[Values], kept_share: float | None) -> str | None:
    """Precision and recall over the share that is kept."""
    there = sorted((row for row in rows if row.get("precision") is not None), key=lambda row: float(row["share"]))
    if len(there) < 2:
        return None
    drawn = [share_curve(there, name) for name in ("precision", "recall")]
    return pictures.lines(drawn, "share kept", "", percent_x=True, marks={"kept": kept_share} if kept_share else None)


def histogram(cuts: Values, kept_from: float | None) -> str | None:
    """Documents of the corpus by score."""
    counts = cuts.get("score_counts") or {}
    marks = {} if kept_from is None else {"kept": kept_from}
    return pictures.histogram(counts["edges"], counts["documents"], marks) if counts.get("documents") else None


def share_curve(rows: list[Values], name: str) -> Line:
    """One figure over the share kept."""
    there = [row for row in rows if row.get(name) is not None]
    return Line(name, [row["share"] for row in there], [row[name] for row in there], bands(there, name))


def curve(points: list[Values], name: str, called: str) -> Line:
    """One figure over the number of ratings."""
    there = [point for point in points if point.get(name) is not None]
    return Line(called, [point["n"] for point in there], [point[name] for point in there], bands(there, name))


def bands(rows: list[Values], name: str) -> list[Any]:
    """The intervals of a figure."""
    return [row.get(f"{name}_interval") for row in rows]


def explained(found: list[Values]) -> str | None:
    """How much of the score each shortcut explains."""
    if not found:
        return None
    names, values = [each["name"] for each in found], [max(each["r2"], 0.0) for each in found]
    intervals = [each.get("r2_interval") and [max(end, 0.0) for end in each["r2_interval"]] for each in found]
    return pictures.dots(names, values, intervals, "share of the score explained (R², 95% interval)")
