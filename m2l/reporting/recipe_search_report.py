"""The report of a search of recipes: the curve, the front, and the importance of each setting."""

from collections.abc import Callable, Sequence

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2l.merging import Recipe
from m2l.reporting import blocks, style
from m2l.reporting.blocks import Drawing, Folded, Report, Section, Table, Text
from m2l.studies.recipe_search import Candidate, SearchResult
from m2l.typing import JsonObject
from m2l.version import __version__

_CAPTIONS = {
    "curve": "The score of each candidate on the half that chooses, in the order in which they "
    "were tried, and the best so far. Hollow: stopped early, with the score that was estimated.",
    "front": "Both scores of each candidate on the half that chooses; the line is the front, of "
    "which none is better in both, and the star the chosen one. Hollow: stopped early.",
    "importance": "The share of the scores' variance that is between methods, and that each "
    "setting explains within its method (fANOVA).",
}


def curve(result: SearchResult) -> Figure:
    """Draws the score of each candidate and the best so far, a panel for each aim."""
    with matplotlib.rc_context(style.RC):
        count = len(result.aims)
        figure = Figure(figsize=(4.8 * count, 3.2), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        for aim, (axis, name) in enumerate(zip(axes, _labels(result), strict=True)):
            _points(axis, result, lambda each: each.number, lambda each, aim=aim: each.scores[aim])
            best, line = float("-inf"), []
            for candidate in result.candidates:
                if candidate.stopped_by is None:
                    best = max(best, candidate.scores[aim])
                    line.append((candidate.number, best))
            axis.step(*zip(*line, strict=True), where="post", color=style.VERMILLION, label="best")
            axis.set_xlabel("candidate")
            axis.set_ylabel(f"{name} (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return figure


def front(result: SearchResult) -> Figure:
    """Draws both scores of each candidate, and the front."""
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(4.8, 3.8), layout="constrained")
        axis = figure.subplots()
        _points(axis, result, lambda each: each.scores[0], lambda each: each.scores[1])
        x, y = zip(*(candidate.scores for candidate in result.front), strict=True)
        axis.step(x, y, where="post", color=style.VERMILLION, marker="o", label="front")
        axis.plot(*result.chosen.scores, "*", color=style.BLACK, markersize=11, label="chosen")
        axis.set_xlabel(f"{_labels(result)[0]} (%)")
        axis.set_ylabel(f"{_labels(result)[1]} (%)")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return figure


def _points(
    axis: Axes,
    result: SearchResult,
    x: Callable[[Candidate], float],
    y: Callable[[Candidate], float],
) -> None:
    look = {"linestyle": "", "marker": "o", "markersize": 4}
    for label, stopped, face in (("scored", False, style.BLUE), ("stopped early", True, "none")):
        members = [c for c in result.candidates if (c.stopped_by is not None) == stopped]
        if members:
            look |= {"color": style.BLUE, "markerfacecolor": face, "label": label}
            axis.plot(list(map(x, members)), list(map(y, members)), **look)


def importance(result: SearchResult) -> Figure:
    """Draws the share of each setting as bars, a colour for each aim."""
    frame, labels = importances(result), _labels(result)
    height = 0.8 / len(labels)
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(4.8, 0.8 + 0.28 * len(frame)), layout="constrained")
        axis = figure.subplots()
        colours = (style.BLUE, style.VERMILLION)
        for place, (label, colour) in enumerate(zip(labels, colours, strict=False)):
            places = frame.index + height * place
            axis.barh(places, frame[label], height, color=colour, label=label)
        axis.set_yticks(frame.index + height * (len(labels) - 1) / 2, frame["setting"])
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of the variance")
        if len(labels) > 1:
            figure.legend(loc="outside upper center", ncols=2)
        return figure


def importances(result: SearchResult) -> pd.DataFrame:
    """Returns rows with setting, and for each aim its share."""
    columns = {
        label: pd.Series(dict(s))
        for label, s in zip(_labels(result), result.importances, strict=True)
    }
    return pd.DataFrame(columns).rename_axis("setting").reset_index()


def _labels(result: SearchResult) -> list[str]:
    """Returns the aims' names for axes and columns: long ones are cut."""
    if len(result.aims) == 1:
        return ["score"]
    return [
        name if len(name) < 28 else f"{place}: {name[:24]}..."
        for place, name in enumerate(result.aims, 1)
    ]


def candidates(result: SearchResult) -> pd.DataFrame:
    """Returns a row for each candidate: number, method, settings, scores, how much was scored."""
    rows = [
        {
            "candidate": each.number,
            "method": each.recipe["method"],
            "settings": _spelled(each),
            **dict(zip(_labels(result), each.scores, strict=True)),
            "examples": each.examples,
            "stopped_by": "" if each.stopped_by is None else str(each.stopped_by),
            "seconds": each.seconds,
        }
        for each in result.candidates
    ]
    return pd.DataFrame(rows)


def judged(result: SearchResult) -> pd.DataFrame:
    """Returns a row for each model on the half that judges, with its change from the average."""
    rows = []
    for model in result.judged:
        row: dict[str, object] = {"model": model.name}
        for place, label in enumerate(_labels(result)):
            low, high = model.intervals[place]
            row |= {f"{label} %": model.scores[place], f"{label} 95 %": f"{low:.1f} to {high:.1f}"}
            change = model.changes and model.changes[place]
            row[f"{label} from average"] = (
                f"{change.value:+.2f} ({change.low:+.1f} to {change.high:+.1f})" if change else ""
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _spelled(candidate: Candidate) -> str:
    """Returns a candidate's hyper-parameters as people read them."""
    recipe = Recipe.from_dict(candidate.recipe)
    chosen = {name.partition(".")[2].partition("[")[0] for name in candidate.settings}
    values = {name: str(candidate.recipe[name]) for name in chosen & candidate.recipe.keys()}
    values |= {name: recipe.spell(name) for name in chosen & recipe.hyper_parameters.keys()}
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


def answer(result: SearchResult) -> str:
    """Returns one sentence: what was chosen, and what it is worth on the half that judges."""
    (model,) = [each for each in result.judged if each.number == result.chosen.number]
    worth = ", ".join(
        f"{score:.2f} % on {aim} ({change.value:+.2f} from the average, 95 %: {change.low:+.2f} to "
        f"{change.high:+.2f})"
        for aim, score, change in zip(result.aims, model.scores, model.changes, strict=True)
    )
    name = style.method_name(result.chosen.recipe["method"])
    return f"Candidate {result.chosen.number}, {name} with {_spelled(result.chosen)}: {worth}."


def report(result: SearchResult, settings: JsonObject) -> Report:
    """Returns the report of a search.

    Args:
        result: The search's.
        settings: As JSON values, for the page's end.
    """
    drawn = {"curve": curve(result), "importance": importance(result)}
    if len(result.aims) > 1:
        drawn["front"] = front(result)
    tables = {
        "judged": judged(result),
        "candidates": candidates(result),
        "importances": importances(result),
    }

    def section(name: str, title: str, further: Sequence[blocks.Block] = ()) -> Section:
        drawing = Drawing(name, _CAPTIONS[name], blocks.svg(drawn[name], name, _CAPTIONS[name]))
        return Section(name, title, title, [drawing, *further])

    every = Table("Every candidate", blocks.cells(tables["candidates"]), "candidates")
    notes = [Text(f"Candidate {number} is no recipe: {text}", "note")
             for number, text in result.refused.items()]  # fmt: skip
    sections = [
        Section(
            "judged",
            "By the half that judges",
            "Judged",
            [
                Text(answer(result)),
                Text(
                    "On examples that nothing was chosen by, next to the experts' plain average; "
                    "intervals and changes of 95 %, by a (paired) bootstrap over examples.",
                    "note",
                ),
                Table("Judged", blocks.cells(tables["judged"]), "judged"),
            ],
        ),
        *([section("front", "The front")] if "front" in drawn else []),
        section(
            "curve",
            "The curve",
            [Folded(f"{len(result.candidates)} candidates", [every, *notes], aside=True)],
        ),
        section("importance", "The importance of each setting"),
    ]
    return Report(
        title="A search of merge recipes",
        plain=f"Recipes for merging were tried by how well what they make does on one half of the "
        f"examples, {len(result.candidates)} of them; the other half, by which nothing was chosen, "
        f"judged the best. {answer(result)}",
        lead=f"Recipes of {', '.join(map(style.method_name, settings['methods']))}, scored on "
        f"{' and '.join(result.aims)}. m2l {__version__}.",
        headline=_headline(result),
        claims="",
        notes=[],
        findings=[],
        sections=sections,
        settings=settings,
        seconds=0.0,
        tables=tables,
        figures=drawn,
        summary=("by the half that judges", tables["judged"]),
        made="By m2l search, whose same command goes on, or writes the page again. Tables are in "
        "tables/ and figures in figures/; recipe.json is the chosen recipe.",
    )


def _headline(result: SearchResult) -> list[tuple[str, str]]:
    stopped = sum(each.stopped_by is not None for each in result.candidates)
    scored = sum(each.examples for each in result.candidates)
    share = scored / max(1, result.examples * len(result.candidates))
    (model,) = [each for each in result.judged if each.number == result.chosen.number]
    average = next(each for each in result.judged if each.name == "average")
    numbers = [
        (f"{score:.1f} %", f"on {aim}, by the half that judges; the average has {other:.1f} %")
        for aim, score, other in zip(result.aims, model.scores, average.scores, strict=True)
    ]
    numbers.append((f"{len(result.candidates)}", f"candidates, of which {stopped} stopped early"))
    numbers.append((f"{share:.0%}", "of the examples were scored that all in full would take"))
    return numbers
