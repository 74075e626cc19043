"""Normalised performance of a comparison of methods, and which differences are more than noise.

A bootstrap draws datasets with replacement, the same for all models, so that differences between
them are paired. Of all differences between two methods at once, 95 % of the bootstrap's samples are
within their bounds: the more methods there are, the wider these become (Tukey's simultaneous
intervals, studentized by the bootstrap).
"""

import dataclasses

import numpy as np
import pandas as pd

from m2l.evaluation.results import defined_ratios
from m2l.studies.method_comparison import DEFAULT, SEARCHED, MethodComparison
from m2l.studies.normalized_performance import MULTITASK, Units, draw_counts, interval
from m2l.studies.study_results import StudyResults

BASE = "base"
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class MethodScores:
    """The scores of every merge, of the multitask model and of the base.

    Attributes:
        rows: A row for each model: method (also MULTITASK and BASE), settings (DEFAULT, SEARCHED
            or ""), and held_in and held_out with their 95 % intervals, NAME_low and NAME_high.
        replicates: By column, float64 [1 + REPLICATES, rows]; the first is the measured value.
    """

    rows: pd.DataFrame
    replicates: dict[str, np.ndarray]

    def index(self, method: str, settings: str) -> int:
        """Returns a model's row; without these settings the first, which is of the defaults."""
        models = self.rows[self.rows["method"] == method]
        rows = models[models["settings"] == settings]
        return int((rows if len(rows) else models).index[0])

    def compared(self, column: str, settings: str) -> pd.DataFrame:
        """Compares the methods with the one that scores best, all by defaults or all searched.

        Returns:
            Rows with method, value, behind (the difference from the best), bound (how far a
            difference may be noise, see this module), worse, and beyond_base (whether it is better
            than the base by more than noise), from the best down.
        """
        names = [name for name in self.rows["method"].unique() if name != MULTITASK]
        values = self.replicates[column][:, [self.index(name, settings) for name in names]]
        finite = np.isfinite(values[1:]).all(1)
        values = np.concatenate([values[:1], values[1:][finite]])
        pairs = values[:, :, None] - values[:, None, :]
        errors = pairs[1:].std(0, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            deviations = np.where(errors > 0, np.abs(pairs[1:] - pairs[0]) / errors, 0.0)
        bounds = errors * float(np.quantile(deviations.max((1, 2)), CONFIDENCE))
        frame = pd.DataFrame({"method": names, "value": values[0]})
        merges, base = frame["method"] != BASE, names.index(BASE)
        best = int(frame["value"].where(merges).argmax())
        frame["behind"], frame["bound"] = pairs[0][best], bounds[best]
        frame["worse"] = frame["behind"] > frame["bound"]
        frame["beyond_base"] = pairs[0][:, base] > bounds[:, base]
        frame = frame[merges].sort_values("value", ascending=False, kind="stable")
        return frame.reset_index(drop=True)


def scores(results: StudyResults, seed: int = 0) -> MethodScores:
    """Computes the scores of a finished comparison; see `defined_ratios`.

    Args:
        results: The study's.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: Results are missing or cannot be compared.
    """
    comparison: MethodComparison = results.study
    study, place = comparison.study, f"{comparison.size}/{comparison.base}"
    base = {result.task: result for result in results.of(f"bases/{place}")}
    experts = {
        result.task: result
        for category in study.categories
        for result in results.of(f"experts/{place}/{category}", (category,))
    }
    models = {(BASE, ""): f"bases/{place}", (MULTITASK, ""): f"multitask/{place}"}
    models |= {
        (method, settings): f"methods/{method}/{settings}"
        for method in comparison.methods
        for settings in (DEFAULT, SEARCHED)
        if f"methods/{method}/{settings}" in results.recipes
    }
    rows = pd.DataFrame(list(models), columns=["method", "settings"])
    references = {"held_in": (study.categories, experts), "held_out": (study.held_out, base)}
    rng, replicates = np.random.default_rng(seed), {}
    for column, (categories, reference) in references.items():
        cells = [
            defined_ratios(results.of(model, categories), reference) for model in models.values()
        ]
        units = Units.from_cells(cells)
        values = units.performance(draw_counts(rng, units.weights.size))
        replicates[column] = values
        rows[column] = values[0]
        ends = [interval(values[:, row]) for row in range(len(rows))]
        rows[[f"{column}_low", f"{column}_high"]] = ends
    return MethodScores(rows, replicates)


def costs(results: StudyResults) -> pd.DataFrame:
    """Returns what each method's merge by its defaults took.

    Returns:
        Rows with method, cpu_seconds (of the whole command), read and written (bytes).
    """
    rows = [
        {"method": model.removeprefix("methods/"), **cost} for model, cost in results.costs.items()
    ]
    return pd.DataFrame(rows)


def searches(results: StudyResults) -> pd.DataFrame:
    """Returns every candidate of the searches.

    Returns:
        Rows with method, number, settings (as text), score (on the examples to choose by) and
        chosen; number 0 are the defaults.
    """
    rows = []
    for stage, methods in results.choices.items():
        method = stage.removeprefix("choices/")
        record = methods[method]
        for number, point in enumerate(record["points"]):
            spelled = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in point["settings"].items()
            )
            row = {"method": method, "number": number, "settings": spelled}
            rows.append(
                row | {"score": point["score"], "chosen": point["settings"] == record["chosen"]}
            )
    return pd.DataFrame(rows, columns=["method", "number", "settings", "score", "chosen"])
