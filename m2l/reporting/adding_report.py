"""What `m2l skills` found, for people: the answer, the curve, and before and after as a table."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from m2l import storage
from m2l.evaluation.bootstrap import Difference
from m2l.reporting import figures, style
from m2l.studies.adding import Added, Adding
from m2l.studies.adding_choice import Tolerance
from m2l.studies.adding_scores import Scores

SKILL, KEPT = "skill", "kept"


@dataclasses.dataclass(frozen=True)
class Row:
    """A task, or the mean over tasks, before and after; scores in percent.

    Attributes:
        part: SKILL or KEPT.
        task: Its name; "mean of N tasks".
        metric: Of the score.
        examples: How many it was judged by.
        general: The general model's score: before.
        alone: That of the skill's own model.
        heuristic: That of the merge by the heuristic's w; None without one.
        merged: That of the merged model: after.
        change: merged less general, paired.
    """

    part: str
    task: str
    metric: str
    examples: int
    general: float
    alone: float
    heuristic: float | None
    merged: float
    change: Difference


def rows(added: Added) -> list[Row]:
    """Every task of the skill and of what is to be kept, and of several their mean, last."""
    found = []
    for place, part in enumerate((SKILL, KEPT)):
        whole = {name: scores[place] for name, scores in added.judged.items()}
        single = [
            dict(zip(whole, of_task, strict=True))
            for of_task in zip(*(scores.single() for scores in whole.values()), strict=True)
        ]
        found += [_row(part, of_task) for of_task in single]
        if len(single) > 1:
            found.append(_row(part, whole))
    return found


def _row(part: str, by_model: Mapping[str, Scores]) -> Row:
    general, merged = by_model["general"], by_model["merged"]
    results = general.results
    one = len(results) == 1
    return Row(
        part=part,
        task=results[0].task if one else f"mean of {len(results)} tasks",
        metric=results[0].metric if one else "",
        examples=sum(result.count for result in results),
        general=general.mean,
        alone=by_model["alone"].mean,
        heuristic=by_model["heuristic"].mean if "heuristic" in by_model else None,
        merged=merged.mean,
        change=merged.against(general),
    )


# --- the answer ---


def answer(added: Added, tolerance: Tolerance) -> str:
    """Whether the skill can be added and what is lost, and what it cost: two sentences."""
    found = rows(added)
    skill, kept = ([row for row in found if row.part == part][-1] for part in (SKILL, KEPT))
    kept_by_judges = kept.merged >= tolerance.floor(kept.general) - 1e-9
    figures = (
        f"at w = {added.choice.point.weight:g} the skill goes from {skill.general:.1f} % to "
        f"{skill.merged:.1f} % ({_change(skill.change)}), and what is to be kept from "
        f"{kept.general:.1f} % to {kept.merged:.1f} % ({_change(kept.change)})"
    )
    allowed = f"the {tolerance} allowed"
    if not added.choice.within:
        verdict = f"Not within {allowed}: no w keeps so much, and of all that loses least:"
    elif skill.change.low <= 0:
        verdict = "Not so that it shows: these examples cannot tell the gain from chance:"
    elif not kept_by_judges:
        verdict = (
            f"Doubtful: chosen within {allowed}, but on the examples that it is judged by it loses "
            "more:"
        )
    else:
        verdict = f"Yes, within {allowed}:"
    return f"{verdict} {figures}. {_cost(added.costs)}"


def _change(change: Difference) -> str:
    return f"{change.value:+.1f} points, 95 %: {change.low:+.1f} to {change.high:+.1f}"


def _cost(costs: Mapping[str, Any]) -> str:
    merging = sum(costs[phase]["seconds"] for phase in ("choosing", "merging"))
    after = f"{_time(merging)} of choosing w and merging"
    if "training" not in costs:
        return f"It cost {after}; the skill's model was there already."
    of = costs["training"]
    return (
        f"It cost {of['steps']:,} steps of training ({of['positions']:,} positions, "
        f"{of['flops']:.2g} FLOPs, {_time(of['seconds'])}) and {after}."
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"


# --- files ---


def write(added: Added, adding: Adding, out: Path) -> None:
    """Writes curve.json, .svg, .pdf and .png, and table.md, .csv and .json."""
    described = curve(added, adding)
    storage.write_atomic(out / "curve.json", json.dumps(described, indent=1) + "\n")
    figures.write(draw(described), out, "curve")
    found = rows(added)
    text = answer(added, adding.tolerance)
    storage.write_atomic(out / "table.md", f"{text}\n\n{markdown(found)}")
    lines = [_plain(row) for row in found]
    held = io.StringIO()
    writer = csv.DictWriter(held, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    storage.write_atomic(out / "table.csv", held.getvalue())
    record = {"answer": text, "weight": added.choice.point.weight, "rows": lines}
    storage.write_atomic(out / "table.json", json.dumps(record, indent=1) + "\n")


def curve(added: Added, adding: Adding) -> dict[str, Any]:
    """The scores along w on the half to choose by, as JSON values."""
    general = added.ends["general"][1].mean
    return {
        "method": adding.method,
        "tolerance": str(adding.tolerance),
        "least": adding.tolerance.floor(general),
        "chosen": added.choice.point.weight,
        "within": added.choice.within,
        "heuristic": added.heuristic,
        **{name: _both(pair) for name, pair in added.ends.items()},
        "points": [{"weight": weight} | _both(pair) for weight, pair in added.curve.items()],
    }


def _both(pair: tuple[Scores, Scores]) -> dict[str, Any]:
    return {
        part: {
            "score": scores.mean,
            "interval": scores.interval(),
            "tasks": {result.task: result.score for result in scores.results},
        }
        for part, scores in zip((SKILL, KEPT), pair, strict=True)
    }


def columns(found: Sequence[Row]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The table for a terminal: its columns and rows."""
    with_heuristic = any(row.heuristic is not None for row in found)
    names = ["", "task", "metric", "examples", "before %", "skill alone %"]
    names += ["heuristic %"] * with_heuristic + ["after %", "change", "95 %", "p"]
    lines = [
        (
            *(row.part, row.task, row.metric, row.examples, row.general, row.alone),
            *([row.heuristic] * with_heuristic),
            *(row.merged, f"{row.change.value:+.2f}"),
            f"{row.change.low:+.2f} to {row.change.high:+.2f}",
            row.change.p,
        )
        for row in found
    ]
    return names, lines


def markdown(found: Sequence[Row]) -> str:
    """The table as Markdown."""
    names, lines = columns(found)

    body = [
        [f"{value:.1f}" if isinstance(value, float) else str(value) for value in line[:-1]]
        + [f"{line[-1]:.2g}"]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [names, ["---"] * len(names), *body])


def _plain(row: Row) -> dict[str, Any]:
    fields = dataclasses.asdict(row)
    change = fields.pop("change")
    return fields | {"change": change.pop("value"), **change}


def draw(described: Mapping[str, Any]) -> Figure:
    """The curve: both scores along w, what must be kept, and what was chosen."""
    points = [{"weight": 0.0, **described["general"]}, *described["points"]]
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(5.0, 3.5), layout="constrained")
        axis = figure.subplots()
        for part, colour, label in (
            (SKILL, style.VERMILLION, "the skill"),
            (KEPT, style.BLUE, "what is to be kept"),
        ):
            weights = [point["weight"] for point in points]
            scores = [point[part]["score"] for point in points]
            low = [point[part]["interval"][0] for point in points]
            high = [point[part]["interval"][1] for point in points]
            axis.plot(weights, scores, marker="o", markersize=4, color=colour, label=label)
            axis.fill_between(weights, low, high, color=colour, alpha=0.15, linewidth=0)
            alone = described["alone"][part]["score"]
            axis.axhline(alone, color=colour, linewidth=0.8, linestyle=":")
            chosen = next(p for p in points if p["weight"] == described["chosen"])
            axis.plot(described["chosen"], chosen[part]["score"], "*", color="black", markersize=10)
        axis.axhline(described["least"], color=style.GREY, linewidth=0.8, linestyle="--")
        axis.plot([], [], "*", color="black", label=f"chosen: {described['chosen']:g}")
        axis.plot(
            [], [], color=style.GREY, linewidth=0.8, linestyle="--", label="the least to be kept"
        )
        axis.plot(
            [], [], color=style.GREY, linewidth=0.8, linestyle=":", label="the skill's own model"
        )
        if described["heuristic"] is not None:
            axis.axvline(described["heuristic"], color=style.GREY, linewidth=0.8, label="heuristic")
        axis.set_xlabel("w (0: the general model)")
        axis.set_ylabel("score (%)")
        figure.legend(loc="outside upper center", ncols=3, fontsize=7)
        return figure
