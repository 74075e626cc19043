"""The report of `m2l skills`: the answer, the curve, and a table of scores before and after."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from m2l import storage
from m2l.evaluation.bootstrap import Difference
from m2l.reporting import figures, style
from m2l.studies.adding_skills import AddedSkill, Scores, SkillAddition, Tolerance
from m2l.typing import JsonObject

SKILL, KEPT = "skill", "kept"


@dataclasses.dataclass(frozen=True)
class TaskChange:
    """A task, or the mean over tasks, before and after; scores in percent.

    Attributes:
        part: SKILL or KEPT.
        task: The task's name; "mean of N tasks".
        metric: The metric of the score.
        examples: The number of examples it was evaluated on.
        general: The general model's score: before.
        alone: The score of the skill's model.
        heuristic: The score of the merge by the heuristic's w; None without one.
        merged: The merged model's score: after.
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


def rows(added: AddedSkill) -> list[TaskChange]:
    """Returns a row for each task of the skill and of what is kept, then their means."""
    rows = []
    for index, part in enumerate((SKILL, KEPT)):
        by_model = {name: scores[index] for name, scores in added.judged.items()}
        tasks = [
            dict(zip(by_model, scores, strict=True))
            for scores in zip(*(scores.single() for scores in by_model.values()), strict=True)
        ]
        rows += [_row(part, scores) for scores in tasks]
        if len(tasks) > 1:
            rows.append(_row(part, by_model))
    return rows


def _row(part: str, by_model: Mapping[str, Scores]) -> TaskChange:
    general, merged = by_model["general"], by_model["merged"]
    results = general.results
    single = len(results) == 1
    return TaskChange(
        part=part,
        task=results[0].task if single else f"mean of {len(results)} tasks",
        metric=results[0].metric if single else "",
        examples=sum(result.count for result in results),
        general=general.mean,
        alone=by_model["alone"].mean,
        heuristic=by_model["heuristic"].mean if "heuristic" in by_model else None,
        merged=merged.mean,
        change=merged.against(general),
    )


# --- the answer ---


def answer(added: AddedSkill, tolerance: Tolerance) -> str:
    """Returns two sentences: whether the skill can be added and what is lost, and the cost."""
    by_part = {row.part: row for row in rows(added)}  # the last one, the mean
    skill, keep = by_part[SKILL], by_part[KEPT]
    confirmed = keep.merged >= tolerance.floor(keep.general) - 1e-9
    figures = (
        f"at w = {added.choice.point.weight:g} the skill goes from {skill.general:.1f} % to "
        f"{skill.merged:.1f} % ({_change(skill.change)}), and what is to be kept from "
        f"{keep.general:.1f} % to {keep.merged:.1f} % ({_change(keep.change)})"
    )
    allowed = f"the {tolerance} allowed"
    if not added.choice.within:
        verdict = f"Not within {allowed}: no w keeps so much, and of all that loses least:"
    elif skill.change.low <= 0:
        verdict = "Not so that it shows: these examples cannot tell the gain from chance:"
    elif not confirmed:
        verdict = (
            f"Doubtful: chosen within {allowed}, but on the examples that it is judged by it loses "
            "more:"
        )
    else:
        verdict = f"Yes, within {allowed}:"
    return f"{verdict} {figures}. {_cost(added.costs)}"


def _change(change: Difference) -> str:
    return f"{change.value:+.1f} points, 95 %: {change.low:+.1f} to {change.high:+.1f}"


def _cost(costs: JsonObject) -> str:
    merging = sum(costs[phase]["seconds"] for phase in ("choosing", "merging"))
    after = f"{_time(merging)} of choosing w and merging"
    if "training" not in costs:
        return f"It cost {after}; the skill's model was there already."
    training = costs["training"]
    return (
        f"It cost {training['steps']:,} steps of training ({training['positions']:,} positions, "
        f"{training['flops']:.2g} FLOPs, {_time(training['seconds'])}) and {after}."
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"


# --- files ---


def write(added: AddedSkill, adding: SkillAddition, out: Path) -> None:
    """Writes curve.json, .svg, .pdf and .png, and table.md, .csv and .json."""
    described = curve(added, adding)
    storage.write_atomic(out / "curve.json", json.dumps(described, indent=1) + "\n")
    figures.write(draw(described), out, "curve")
    table = rows(added)
    text = answer(added, adding.tolerance)
    storage.write_atomic(out / "table.md", f"{text}\n\n{markdown(table)}")
    lines = [_plain(row) for row in table]
    storage.write_atomic(out / "table.csv", pd.DataFrame(lines).to_csv(index=False))
    record = {"answer": text, "weight": added.choice.point.weight, "rows": lines}
    storage.write_atomic(out / "table.json", json.dumps(record, indent=1) + "\n")


def curve(added: AddedSkill, adding: SkillAddition) -> JsonObject:
    """Returns the scores along w on the half to choose by, as JSON values."""
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


def _both(pair: tuple[Scores, Scores]) -> JsonObject:
    return {
        part: {
            "score": scores.mean,
            "interval": scores.interval(),
            "tasks": {result.task: result.score for result in scores.results},
        }
        for part, scores in zip((SKILL, KEPT), pair, strict=True)
    }


def columns(rows: Sequence[TaskChange]) -> tuple[list[str], list[tuple[object, ...]]]:
    """Returns the table's column names and its lines, for a terminal."""
    with_heuristic = any(row.heuristic is not None for row in rows)
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
        for row in rows
    ]
    return names, lines


def markdown(rows: Sequence[TaskChange]) -> str:
    """Returns the table as Markdown."""
    names, lines = columns(rows)
    body = [
        [f"{value:.1f}" if isinstance(value, float) else str(value) for value in line[:-1]]
        + [f"{line[-1]:.2g}"]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [names, ["---"] * len(names), *body])


def _plain(row: TaskChange) -> JsonObject:
    fields = dataclasses.asdict(row)
    change = fields.pop("change")
    return fields | {"change": change.pop("value"), **change}


def draw(described: JsonObject) -> Figure:
    """Draws both scores along w, the least score that is allowed, and the chosen w."""
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
        for linestyle, label in (("--", "the least to be kept"), (":", "the skill's own model")):
            axis.plot([], [], color=style.GREY, linewidth=0.8, linestyle=linestyle, label=label)
        if described["heuristic"] is not None:
            axis.axvline(described["heuristic"], color=style.GREY, linewidth=0.8, label="heuristic")
        axis.set_xlabel("w (0: the general model)")
        axis.set_ylabel("score (%)")
        figure.legend(loc="outside upper center", ncols=3, fontsize=7)
        return figure
