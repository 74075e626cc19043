"""From a study's results to the paper's figures: normalised performance, with its uncertainty.

Source: Yadav et al., "What Matters for Model Merging at Scale?", section 3: scores are divided by
those of the task's expert (held-in) or of the base (held-out); then the mean is taken over the
datasets of a category, over categories, and over seeds.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from m2l.evaluation.results import Result, dataset_scores, ratios
from m2l.studies import records as of_studies
from m2l.studies import scaling
from m2l.studies.records import Records
from m2l.studies.scaling import BASES

MULTITASK = "multitask"
REPLICATES = 2000
CELL = ["size", "base", "method", "experts"]


@dataclasses.dataclass(frozen=True)
class Units:
    """Scores in units of their references, dataset by dataset.

    Attributes:
        ratios: float64 [cells, datasets]; NaN where the reference scores 0.
        present: bool [cells, datasets]: whether the cell was evaluated on the dataset.
        weights: float64 [datasets], one over the number of datasets in the dataset's category.
    """

    ratios: np.ndarray
    present: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, found: list[dict[tuple[str, str], float]]) -> "Units":
        """From a ratio by category and dataset for each cell."""
        columns = list(dict.fromkeys(key for of_cell in found for key in of_cell))
        present = np.array([[key in of_cell for key in columns] for of_cell in found])
        table = np.array([[of_cell.get(key, 0.0) for key in columns] for of_cell in found])
        sizes = [sum(category == other for other, _ in columns) for category, _ in columns]
        return cls(table, present, 1 / np.array(sizes))

    def performance(self, counts: np.ndarray) -> np.ndarray:
        """The mean over datasets, then categories, if each dataset counts so often.

        Args:
            counts: [replicates, datasets]; of ones, it is the paper's normalised performance.

        Returns:
            [replicates, cells]; infinite where no dataset of a cell counts.
        """
        weighted = counts * self.weights
        with np.errstate(divide="ignore", invalid="ignore"):
            sums, of = weighted @ self.ratios.T, weighted @ self.present.T.astype(float)
            return np.where(of > 0, sums / of, np.inf)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every cell of the study, seed by seed, and what it is worth.

    Attributes:
        cells: A row for each cell and seed, the multitask models' among them: size, base, method,
            experts, seed, constituents.
        held_in: In units of each task's expert.
        held_out: In units of the base.
    """

    cells: pd.DataFrame
    held_in: Units
    held_out: Units


def grid(records: Records) -> Grid:
    """The study's results in units of their references.

    Raises:
        EvaluationError: results that are missing or cannot be compared.
    """
    study = records.study
    rows: list[dict[str, Any]] = []
    held_in, held_out = [], []
    for size in study.models:
        for base in BASES:
            of_base = _by_task(records.of(f"bases/{size}/{base}"))
            of_experts = _by_task(
                result
                for category in study.categories
                for result in records.of(f"experts/{size}/{base}/{category}", (category,))
            )
            of_here = [m for m in scaling.merges(study) if (m.size, m.base) == (size, base)]
            for method, model, merge in _with_multitask(of_here):
                where = {"size": size, "base": base, "method": method, "experts": merge.count}
                beside = {"seed": merge.seed, "constituents": "+".join(merge.categories)}
                rows.append(where | beside)
                held_in.append(ratios(records.of(model, merge.categories), of_experts))
                held_out.append(ratios(records.of(model, study.held_out), of_base))
    return Grid(pd.DataFrame(rows), Units.of(held_in), Units.of(held_out))


def _by_task(results: Iterable[Result]) -> dict[str, Result]:
    return {result.task: result for result in results}


def _with_multitask(cells: Iterable[scaling.Merge]) -> Iterable[tuple[str, str, scaling.Merge]]:
    """Method, model and cell; the multitask model once for each set of constituents."""
    seen = set()
    for merge in cells:
        yield merge.recipe.method, merge.model, merge
        if (merge.count, merge.seed) not in seen:
            seen.add((merge.count, merge.seed))
            yield MULTITASK, f"{MULTITASK}/{merge.size}/{merge.base}", merge


def cells(of: Grid) -> pd.DataFrame:
    """One row for each cell and seed: its place in the grid, held_in and held_out."""
    held_in, held_out = (
        units.performance(np.ones((1, units.weights.size)))[0]
        for units in (of.held_in, of.held_out)
    )
    return of.cells.assign(held_in=held_in, held_out=held_out)


class Replicates:
    """The grid as measured, and as it might have been with other datasets and other seeds.

    The bootstrap draws datasets and, apart from them, seeds, with replacement, the same draw for
    every model, so that differences between models keep what they share.

    Attributes:
        held_in: float64 [1 + REPLICATES, sizes, bases, methods, counts], means over seeds; the
            first is what was measured. NaN where the grid has no such cell.
        held_out: The same.
    """

    def __init__(self, of: Grid, seed: int = 0):
        rng = np.random.default_rng(seed)
        frame = of.cells
        self.axes = {name: list(dict.fromkeys(frame[name])) for name in CELL}
        self._place = tuple(
            frame[name].map({value: i for i, value in enumerate(self.axes[name])}).to_numpy()
            for name in CELL
        )
        seeds = list(dict.fromkeys(frame["seed"]))
        of_seed = frame["seed"].map({value: i for i, value in enumerate(seeds)}).to_numpy()
        # A cell counts as often as its seed.
        self._counts = _drawn(rng, len(seeds))[:, of_seed].astype(float)
        self.held_in = self._means(of.held_in, rng)
        self.held_out = self._means(of.held_out, rng)

    def _means(self, units: Units, rng: np.random.Generator) -> np.ndarray:
        values = units.performance(_drawn(rng, units.weights.size))
        counts = np.where(np.isinf(values), 0.0, self._counts)
        values = np.where(np.isinf(values), 0.0, values)
        shape = (len(values), *(len(names) for names in self.axes.values()))
        sums, of = np.zeros(shape), np.zeros(shape)
        where = (slice(None), *self._place)
        np.add.at(sums, where, counts * values)
        np.add.at(of, where, counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums / of


def _drawn(rng: np.random.Generator, size: int) -> np.ndarray:
    """How often each of `size` things is drawn, [1 + REPLICATES, size]; first, each once."""
    drawn = rng.multinomial(size, np.full(size, 1 / size), REPLICATES)
    return np.concatenate([np.ones((1, size)), drawn])


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """Where a statistic lies with 95 % confidence: percentiles over all but the first replicate."""
    of = replicates[1:][np.isfinite(replicates[1:])]
    if not of.size:
        return np.nan, np.nan
    low, high = np.quantile(of, [0.025, 0.975])
    return float(low), float(high)


def performance(of: Replicates) -> pd.DataFrame:
    """Normalised performance, mean over seeds, with its 95 % interval.

    Returns:
        Rows with size, base, method ("multitask" among them), experts, held_in, held_in_low,
        held_in_high, held_out, held_out_low, held_out_high.
    """
    rows = []
    for place in np.ndindex(of.held_in.shape[1:]):
        row = {name: of.axes[name][i] for name, i in zip(CELL, place, strict=True)}
        for what in ("held_in", "held_out"):
            values = getattr(of, what)[(slice(None), *place)]
            low, high = interval(values)
            row |= {what: float(values[0]), f"{what}_low": low, f"{what}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


# --- what stands beside the grid ---


def experts(records: Records) -> pd.DataFrame:
    """What each expert gained over its base on its own category, in percent.

    Returns:
        Rows with size, base, category, dataset, before (the base's score), expert and multitask:
        means over the dataset's prompts.
    """
    rows = []
    for size in records.study.models:
        for base in BASES:
            for category in records.study.categories:
                names = {
                    "before": f"bases/{size}/{base}",
                    "expert": f"experts/{size}/{base}/{category}",
                    MULTITASK: f"{MULTITASK}/{size}/{base}",
                }
                found = {
                    what: dataset_scores(records.of(model, (category,)))
                    for what, model in names.items()
                }
                where = {"size": size, "base": base, "category": category}
                for dataset in found["before"]:
                    of_dataset = {what: scores[dataset] for what, scores in found.items()}
                    rows.append({**where, "dataset": dataset, **of_dataset})
    return pd.DataFrame(rows)


def held_out(records: Records) -> pd.DataFrame:
    """The scores of bases and multitask models on the held-out datasets, in percent, with chance.

    Returns:
        Rows with size, base, dataset, chance, before and multitask; chance is NaN where a task has
        no answer choices.
    """
    rows = []
    for size in records.study.models:
        for base in BASES:
            of_base = records.of(f"bases/{size}/{base}", records.study.held_out)
            together = records.of(f"{MULTITASK}/{size}/{base}", records.study.held_out)
            before, after = dataset_scores(of_base), dataset_scores(together)
            for dataset in before:
                chance = [
                    result.metrics["chance"]
                    for result in of_base
                    if result.dataset == dataset and "chance" in result.metrics
                ]
                where = {"size": size, "base": base, "dataset": dataset}
                scored = {"before": before[dataset], MULTITASK: after[dataset]}
                rows.append({**where, "chance": fmean(chance) if chance else np.nan, **scored})
    return pd.DataFrame(rows)


def choices(records: Records) -> pd.DataFrame:
    """The sweeps by which hyper-parameters were chosen.

    Returns:
        Rows with size, base, experts, method, the swept settings (NaN where a method has none),
        score (mean normalised performance on the examples to choose by) and chosen.
    """
    rows = []
    for stage, methods in records.choices.items():
        _, size, base, count = stage.split("/")
        where = {"size": size, "base": base, "experts": int(count)}
        for method, record in methods.items():
            for point in record["points"]:
                chosen = point["settings"] == record["chosen"]
                beside = {"score": point["score"], "chosen": chosen}
                rows.append({**where, "method": method, **point["settings"], **beside})
    names = ["size", "base", "experts", "method", "scale", "density", "drop_rate"]
    return pd.DataFrame(rows).reindex(columns=[*names, "score", "chosen"])


def lineage(records: Records) -> pd.DataFrame:
    """Every model of any study: what it is made of and by, its digest, and how many results."""
    rows, plan = [], of_studies.plan(records.study)
    for stage in plan:
        if stage.kind == "evaluate":
            model = stage.inputs["model"]
            made = plan[model]
            rows.append(_line(records, model, made.kind, made.inputs, None))
        elif stage.kind == "merge":
            group = stage.name.removeprefix("results/")
            inputs = {role: of for role, of in stage.inputs.items() if role != "choice"}
            for name in stage.settings["recipes"]:
                model = f"{group}/{name}"
                rows.append(_line(records, model, "merge", inputs, records.recipes[model]))
    return pd.DataFrame(rows)


def _line(
    records: Records,
    model: str,
    kind: str,
    inputs: Mapping[str, str],
    recipe: Mapping[str, Any] | None,
) -> dict[str, Any]:
    found = records.of(model)
    return {
        "model": model,
        "kind": kind,
        "made_of": list(inputs.values()),
        "recipe": recipe,
        "digest": found[0].model_digest,
        "results": len(found),
    }
