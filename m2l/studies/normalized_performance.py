"""Normalised performance of paper 1's study, with its uncertainty.

Source: Yadav et al., "What Matters for Model Merging at Scale?", section 3: scores are divided by
those of the task's expert (held-in) or of the base (held-out); then the mean is taken over the
datasets of a category, over categories, and over seeds.
"""

import dataclasses
from collections.abc import Iterable
from statistics import fmean

import numpy as np
import pandas as pd

from m2l.evaluation.results import Result, dataset_scores, ratios
from m2l.studies import merging_at_scale
from m2l.studies.study_results import StudyResults

MULTITASK = "multitask"
REPLICATES = 2000
CELL = ["size", "base", "method", "experts"]


@dataclasses.dataclass(frozen=True)
class Units:
    """Scores in units of their references, dataset by dataset.

    Attributes:
        ratios: float64 [cells, datasets]; NaN where the reference scores 0.
        present: bool [cells, datasets], whether the cell was evaluated on the dataset.
        weights: float64 [datasets], one over the number of datasets in the dataset's category.
    """

    ratios: np.ndarray
    present: np.ndarray
    weights: np.ndarray

    @classmethod
    def from_cells(cls, cells: list[dict[tuple[str, str], float]]) -> "Units":
        """Returns the arrays of each cell's ratios by category and dataset."""
        columns = list(dict.fromkeys(key for cell in cells for key in cell))
        present = np.array([[key in cell for key in columns] for cell in cells])
        table = np.array([[cell.get(key, 0.0) for key in columns] for cell in cells])
        sizes = [sum(category == other for other, _ in columns) for category, _ in columns]
        return cls(table, present, 1 / np.array(sizes))

    def performance(self, counts: np.ndarray) -> np.ndarray:
        """Computes the mean over datasets, then categories, with a multiplicity for each dataset.

        Args:
            counts: [replicates, datasets]; ones for the paper's normalised performance.

        Returns:
            [replicates, cells]; infinite where no dataset of a cell counts.
        """
        weighted = counts * self.weights
        with np.errstate(divide="ignore", invalid="ignore"):
            sums, totals = weighted @ self.ratios.T, weighted @ self.present.T.astype(float)
            return np.where(totals > 0, sums / totals, np.inf)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The scores of every cell of the study, seed by seed.

    Attributes:
        cells: A row for each cell and seed, also of the multitask models: size, base, method,
            experts, seed, constituents.
        held_in: The scores in units of each task's expert.
        held_out: The scores in units of the base.
    """

    cells: pd.DataFrame
    held_in: Units
    held_out: Units


def grid(study_results: StudyResults) -> Grid:
    """Returns the study's results in units of their references.

    Raises:
        EvaluationError: Results are missing or cannot be compared.
    """
    study = study_results.study
    rows: list[dict[str, object]] = []
    held_in, held_out = [], []
    for size in study.models:
        for base in study.bases:
            base_results = _by_task(study_results.of(f"bases/{size}/{base}"))
            expert_results = _by_task(
                result
                for category in study.categories
                for result in study_results.of(f"experts/{size}/{base}/{category}", (category,))
            )
            cells = [m for m in merging_at_scale.merges(study) if (m.size, m.base) == (size, base)]
            for method, model, merge in _with_multitask(cells):
                row = {"size": size, "base": base, "method": method, "experts": merge.count}
                row |= {"seed": merge.seed, "constituents": "+".join(merge.categories)}
                rows.append(row)
                held_in.append(ratios(study_results.of(model, merge.categories), expert_results))
                held_out.append(ratios(study_results.of(model, study.held_out), base_results))
    return Grid(pd.DataFrame(rows), Units.from_cells(held_in), Units.from_cells(held_out))


def _by_task(results: Iterable[Result]) -> dict[str, Result]:
    return {result.task: result for result in results}


def _with_multitask(
    cells: Iterable[merging_at_scale.MergeCell],
) -> Iterable[tuple[str, str, merging_at_scale.MergeCell]]:
    """Yields method, model and cell; the multitask model once for each set of constituents."""
    seen = set()
    for merge in cells:
        yield merge.recipe.method, merge.model, merge
        if (merge.count, merge.seed) not in seen:
            seen.add((merge.count, merge.seed))
            yield MULTITASK, f"{MULTITASK}/{merge.size}/{merge.base}", merge


def cells(grid: Grid) -> pd.DataFrame:
    """Returns a row for each cell and seed: its coordinates, held_in and held_out."""
    held_in, held_out = (
        units.performance(np.ones((1, units.weights.size)))[0]
        for units in (grid.held_in, grid.held_out)
    )
    return grid.cells.assign(held_in=held_in, held_out=held_out)


class Replicates:
    """The measured grid, and bootstrap replicates of it.

    The bootstrap draws datasets and, independently, seeds, with replacement; all models share a
    draw, so that differences between models are paired.

    Attributes:
        axes: The values along the last four axes, by the names in CELL.
        held_in: float64 [1 + REPLICATES, sizes, bases, methods, counts], means over seeds; the
            first is the measured value. NaN where the grid has no such cell.
        held_out: The same of held-out performance.
    """

    def __init__(self, grid: Grid, seed: int = 0):
        rng = np.random.default_rng(seed)
        # Categories in order of appearance, and the index of each row's.
        codes, values = zip(*(pd.factorize(grid.cells[name]) for name in CELL), strict=True)
        self.axes = {name: list(labels) for name, labels in zip(CELL, values, strict=True)}
        self._index = (slice(None), *codes)
        seed_index, seeds = pd.factorize(grid.cells["seed"])
        # A cell counts as often as its seed.
        self._counts = draw_counts(rng, len(seeds))[:, seed_index].astype(float)
        self.held_in = self._means(grid.held_in, rng)
        self.held_out = self._means(grid.held_out, rng)

    def _means(self, units: Units, rng: np.random.Generator) -> np.ndarray:
        values = units.performance(draw_counts(rng, units.weights.size))
        counts = np.where(np.isinf(values), 0.0, self._counts)
        values = np.where(np.isinf(values), 0.0, values)
        shape = (len(values), *(len(names) for names in self.axes.values()))
        sums, totals = np.zeros(shape), np.zeros(shape)
        np.add.at(sums, self._index, counts * values)
        np.add.at(totals, self._index, counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums / totals


def draw_counts(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns how often each of `size` items is drawn, [1 + REPLICATES, size]; first, once each."""
    drawn = rng.multinomial(size, np.full(size, 1 / size), REPLICATES)
    return np.concatenate([np.ones((1, size)), drawn])


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """Returns a statistic's 95 % interval: percentiles over all but the first replicate."""
    finite = replicates[1:][np.isfinite(replicates[1:])]
    if not finite.size:
        return np.nan, np.nan
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def performance(replicates: Replicates) -> pd.DataFrame:
    """Computes normalised performance, the mean over seeds, with its 95 % interval.

    Returns:
        Rows with size, base, method (also "multitask"), experts, held_in, held_in_low,
        held_in_high, held_out, held_out_low, held_out_high.
    """
    rows = []
    for index in np.ndindex(replicates.held_in.shape[1:]):
        row = {name: replicates.axes[name][i] for name, i in zip(CELL, index, strict=True)}
        for name in ("held_in", "held_out"):
            values = getattr(replicates, name)[(slice(None), *index)]
            low, high = interval(values)
            row |= {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


# --- scores outside the grid ---


def experts(study_results: StudyResults) -> pd.DataFrame:
    """Computes each expert's gain over its base on its own category, in percent.

    Returns:
        Rows with size, base, category, dataset, before (the base's score), expert and multitask:
        means over the dataset's prompts.
    """
    rows = []
    for size in study_results.study.models:
        for base in study_results.study.bases:
            for category in study_results.study.categories:
                names = {
                    "before": f"bases/{size}/{base}",
                    "expert": f"experts/{size}/{base}/{category}",
                    MULTITASK: f"{MULTITASK}/{size}/{base}",
                }
                scores = {
                    name: dataset_scores(study_results.of(model, (category,)))
                    for name, model in names.items()
                }
                for dataset in scores["before"]:
                    row = {"size": size, "base": base, "category": category, "dataset": dataset}
                    rows.append(row | {name: scores[name][dataset] for name in names})
    return pd.DataFrame(rows)


def held_out(study_results: StudyResults) -> pd.DataFrame:
    """Returns the held-out scores of bases and multitask models, in percent, with chance.

    Returns:
        Rows with size, base, dataset, chance, before and multitask; chance is NaN where a task has
        no answer choices.
    """
    rows = []
    for size in study_results.study.models:
        for base in study_results.study.bases:
            base_results, multitask_results = (
                study_results.of(model, study_results.study.held_out)
                for model in (f"bases/{size}/{base}", f"{MULTITASK}/{size}/{base}")
            )
            before, multitask = dataset_scores(base_results), dataset_scores(multitask_results)
            for dataset in before:
                chance = [
                    result.metrics["chance"]
                    for result in base_results
                    if result.dataset == dataset and "chance" in result.metrics
                ]
                row = {"size": size, "base": base, "dataset": dataset}
                row |= {"chance": fmean(chance) if chance else np.nan}
                rows.append(row | {"before": before[dataset], MULTITASK: multitask[dataset]})
    return pd.DataFrame(rows)


def choices(study_results: StudyResults) -> pd.DataFrame:
    """Returns the sweeps that hyper-parameters were chosen by.

    Returns:
        Rows with size, base, experts, method, the swept settings (NaN where a method has none),
        score (mean normalised performance on the examples to choose by) and chosen.
    """
    rows = []
    for stage, methods in study_results.choices.items():
        _, size, base, count = stage.split("/")
        for method, record in methods.items():
            for point in record["points"]:
                chosen = point["settings"] == record["chosen"]
                row = {"size": size, "base": base, "experts": int(count), "method": method}
                rows.append({**row, **point["settings"], "score": point["score"], "chosen": chosen})
    names = ["size", "base", "experts", "method", "scale", "density", "drop_rate"]
    return pd.DataFrame(rows).reindex(columns=[*names, "score", "chosen"])
