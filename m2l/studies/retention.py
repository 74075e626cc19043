"""The share of its experts' performance that a merge keeps, predicted from checkpoints alone.

A ridge regression of normalised held-in performance on what `merging.interference` measures,
fitted to the merges of finished studies. Its error is that on merges that it was not fitted to.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from m2l import files, storage
from m2l.errors import ConfigError, DataError, EvaluationError
from m2l.merging import Recipe
from m2l.merging.interference import Measures, measure
from m2l.storage import AnyPath
from m2l.studies import graph, merging_at_scale, normalized_performance, study_results
from m2l.studies.merging_at_scale import MergeCell, ScalingStudy
from m2l.studies.study_results import StudyResults
from m2l.typing import JsonObject

FITTED = Path(__file__).with_name("retention.json")
"""What m2l's own studies give."""

Ranges = Mapping[str, tuple[float, float]]
Columns = Mapping[str, ArrayLike]
"""Measures by name: numbers, or columns of them."""

FEATURES: Mapping[str, Callable[[Columns], np.ndarray]] = {
    "projection": lambda m: np.asarray(m["projection"]),
    "projection_log2_experts": lambda m: m["projection"] * np.log2(m["experts"]),
    "interference_norm": lambda m: m["interference"] * m["norm"],
    "log10_norm": lambda m: np.log10(m["norm"]),
}
"""The last two: what disturbs an expert, and how far experts are from it, in units of the base."""

RIDGE = 1e-3
"""The penalty on coefficients of standardised features, where the loss is the mean square."""

GROUPS = {
    "experts": ["study", "base", "constituents"],
    "base": ["study", "base"],
    "study": ["study"],
}
"""What is left out at a time, from what resembles the remaining merges most to what does least."""

_LEAST_GROUPS = 3
_COVERAGE = 0.9
_MARGIN = 0.1
_KIND = "retention"


def collect(out: AnyPath) -> tuple[pd.DataFrame, dict[str, dict[str, JsonObject]]]:
    """Measures the merges of a finished study, and reads what they kept.

    Its merges, on the examples that it reports, and every setting that it chose from, on those that
    it chose by. Experts are measured once for each set and method.

    Args:
        out: The study's folder, with its checkpoints.

    Returns:
        Rows with study, base (its size and kind), constituents, method, held_in and the fields of
        `Measures`; and the recipe that was chosen most often, by method and number of experts.

    Raises:
        DataError: The study is not finished, or published without its checkpoints.
        ConfigError: It is not one over numbers of experts.
    """
    out = storage.path(out)
    results = study_results.load(out)
    if not isinstance(results.study, ScalingStudy):
        raise ConfigError(f"{out}: expected a study over numbers of experts (ScalingStudy)")
    if (out / study_results.RESULTS).exists():
        raise DataError(
            f"{out}: published, without checkpoints to measure; name the folder of m2l study"
        )
    scored, chosen = _scored(results)
    rows = []
    for (size, base, categories), pairs in scored.items():
        names = [f"experts/{size}/{base}/{category}" for category in categories]
        measured = measure(
            graph.stage_folder(out, f"bases/{size}/{base}"),
            [graph.stage_folder(out, name) for name in names],
            [recipe for recipe, _ in pairs],
        )
        place = {"study": out.resolve().name if isinstance(out, Path) else out.name}
        place |= {"base": f"{size}/{base}", "constituents": "+".join(categories)}
        for (recipe, held_in), measures in zip(pairs, measured, strict=True):
            row = {"method": recipe.method, "held_in": held_in}
            rows.append(place | row | measures._asdict())
    return pd.DataFrame(rows), chosen


Scored = dict[tuple[str, str, tuple[str, ...]], list[tuple[Recipe, float]]]
"""By size, base and categories of the experts: recipes, with normalised held-in performance."""


def _scored(results: StudyResults) -> tuple[Scored, dict[str, dict[str, JsonObject]]]:
    study = results.study
    table = normalized_performance.cells(normalized_performance.grid(results))
    values = table.set_index([*normalized_performance.CELL, "seed"])["held_in"]
    models: dict[str, tuple[MergeCell, float]] = {}
    for cell in merging_at_scale.merges(study):
        at = (cell.size, cell.base, cell.recipe.method, cell.count, cell.seed)
        models[cell.model] = cell, float(values[at])
    scored: Scored = {}
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    recipes = {}
    for model, (cell, held_in) in models.items():
        recipe = Recipe.from_dict(results.recipes[model])
        scored.setdefault((cell.size, cell.base, cell.categories), []).append((recipe, held_in))
        plain = recipe.to_dict() | ({"seed": 0} if "seed" in recipe.to_dict() else {})
        key = files.checksum(plain)
        recipes[key] = plain
        at = recipe.method, str(cell.count)
        counts.setdefault(at, collections.Counter())[key] += 1
    for stage, methods in results.choices.items():
        _, size, base, _ = stage.split("/")
        for recipe in study.recipes:
            record = methods.get(recipe.method, {"points": []})
            candidates = merging_at_scale.candidates(study, recipe)
            for candidate, point in zip(candidates, record["points"], strict=False):
                # Older versions recorded the mean alone.
                if "by_set" in point:
                    for names, value in zip(record["sets"], point["by_set"], strict=True):
                        scored[size, base, tuple(names)].append((candidate, value))
    chosen: dict[str, dict[str, JsonObject]] = {}
    for (method, count), counter in counts.items():
        chosen.setdefault(method, {})[count] = recipes[counter.most_common(1)[0][0]]
    scored = {k: [p for p in pairs if np.isfinite(p[1])] for k, pairs in scored.items()}
    return scored, chosen


@dataclasses.dataclass(frozen=True)
class HeldOutError:
    """How far predictions are off on merges that were left out of the fit.

    Attributes:
        groups: How many parts were left out, one at a time.
        error: The mean absolute error.
        error_of_mean: That of the mean of the merges that were fitted, in place of a prediction.
        within: Nine of ten merges are at most so far off.
    """

    groups: int
    error: float
    error_of_mean: float
    within: float


@dataclasses.dataclass(frozen=True)
class Retention:
    """A fitted prediction.

    Attributes:
        intercept: What is predicted where every feature is 0.
        coefficients: Of each of FEATURES.
        ranges: The least and the largest of each measure, and of held_in, among what was fitted.
        errors: By what was left out, of GROUPS; of those of which there is more than one.
        merges: How many merges that is, by study.
        recipes: The recipes chosen most often there, by method and number of experts.
    """

    intercept: float
    coefficients: Mapping[str, float]
    ranges: Ranges
    errors: Mapping[str, HeldOutError]
    merges: Mapping[str, int]
    recipes: Mapping[str, Mapping[str, JsonObject]]

    @property
    def left_out(self) -> str:
        """What was left out where the error is the one to expect: of three or more the last."""
        several = [n for n, error in self.errors.items() if error.groups >= _LEAST_GROUPS]
        return several[-1] if several else next(iter(self.errors))

    def predict(self, measures: Measures) -> tuple[float, float, float]:
        """Returns the share that is kept, and the interval that has nine of ten merges.

        Measures, and the share, are cut to between the least and the largest of what was fitted.
        """
        weights = np.array([self.coefficients[name] for name in FEATURES])
        share = self.intercept + _design(measures._asdict(), self.ranges) @ weights
        share = float(np.clip(share, *self.ranges["held_in"]))
        within = self.errors[self.left_out].within
        return share, max(0.0, share - within), share + within

    def outside(self, measures: Measures) -> dict[str, tuple[float, float, float]]:
        """Returns the measures that are outside of what was fitted: (value, least, largest).

        By more than a tenth of the least or the largest.
        """
        return {
            name: (value, low, high)
            for name, value in measures._asdict().items()
            for low, high in [self.ranges[name]]
            if not low - _MARGIN * abs(low) <= value <= high + _MARGIN * abs(high)
        }

    def recipes_for(self, experts: int) -> list[Recipe]:
        """Returns a recipe of each method, as chosen for the nearest number of experts."""
        return [
            Recipe.from_dict(by_count[min(by_count, key=lambda count: abs(int(count) - experts))])
            for by_count in self.recipes.values()
        ]

    def write(self, file: AnyPath) -> None:
        """Writes it as JSON; `read` reads it."""
        files.write_record(storage.path(file), {"kind": _KIND, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, file: AnyPath = FITTED) -> "Retention":
        """Reads what `write` wrote.

        Raises:
            DataError: It is something else, or damaged.
        """
        advice = "fit it again with scripts/fit_retention.py"
        fields = files.read_record(file, required=False, finite=True, advice=advice)
        problem = f"{file}: expected what scripts/fit_retention.py writes"
        if fields.pop("kind", None) != _KIND:
            raise DataError(f"{problem}, found another JSON object")
        try:
            errors = {name: HeldOutError(**error) for name, error in fields["errors"].items()}
            ranges = {name: (float(a), float(b)) for name, (a, b) in fields["ranges"].items()}
            fitted = cls(**fields | {"errors": errors, "ranges": ranges})
            complete = {*Measures._fields, "held_in"} <= {*ranges} and {*errors} <= {*GROUPS}
            if not (complete and errors and {*fitted.coefficients} == {*FEATURES}):
                raise KeyError("features, ranges or errors")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"{problem} ({error!r} is missing or wrong)") from error
        return fitted


def fit(
    examples: pd.DataFrame, recipes: Mapping[str, Mapping[str, JsonObject]] | None = None
) -> Retention:
    """Fits what merges kept to what was measured of them; each study counts the same.

    Args:
        examples: Rows as `collect` returns them, of one or more studies.
        recipes: Those to predict where none is named.

    Raises:
        EvaluationError: All merges are of one set of experts, so that none can be left out.
    """
    errors = {}
    for name, columns in GROUPS.items():
        labels = examples.groupby(columns, sort=False).ngroup().to_numpy()
        if labels.max() > 0:
            errors[name] = _held_out_error(examples, labels)
    if not errors:
        raise EvaluationError("one set of experts: nothing could be left out to measure an error")
    intercept, coefficients, ranges = _fitted(examples)
    return Retention(
        intercept=intercept,
        coefficients=dict(zip(FEATURES, coefficients.tolist(), strict=True)),
        ranges=ranges,
        errors=errors,
        merges={str(study): int(n) for study, n in examples["study"].value_counts().items()},
        recipes=recipes or {},
    )


def _design(measures: Columns, ranges: Ranges) -> np.ndarray:
    """Returns FEATURES of measures that are cut to their ranges, float64 [..., features]."""
    cut = {name: np.clip(measures[name], *ranges[name]) for name in Measures._fields}
    return np.stack([feature(cut) for feature in FEATURES.values()], axis=-1)


def _fitted(examples: pd.DataFrame) -> tuple[float, np.ndarray, Ranges]:
    columns = [*Measures._fields, "held_in"]
    ranges = {n: (float(examples[n].min()), float(examples[n].max())) for n in columns}
    targets, weights = examples["held_in"].to_numpy(), _weights(examples)
    return *ridge(_design(examples, ranges), targets, weights), ranges


def _weights(examples: pd.DataFrame) -> np.ndarray:
    """Returns weights of a sum of 1, by which each study counts the same."""
    weights = 1 / examples["study"].map(examples["study"].value_counts()).to_numpy(float)
    return weights / weights.sum()


def ridge(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """Computes a weighted ridge regression in closed form, of standardised features.

    Minimises sum_i v_i (y_i - a - z_i w)^2 + RIDGE |w|^2 with z the features less their mean, over
    their standard deviation (one that is constant has no coefficient).

    Args:
        features: float64 [rows, features].
        targets: float64 [rows], y.
        weights: float64 [rows], v, of a sum of 1.

    Returns:
        The intercept, and the coefficients of the features as they are, float64 [features].
    """
    centre, middle = weights @ features, weights @ targets
    spread = np.sqrt(weights @ (features - centre) ** 2)
    spread = np.where(spread > 1e-12 * np.abs(centre), spread, 1.0)
    scaled = (features - centre) / spread
    products = scaled.T @ (weights[:, None] * scaled) + RIDGE * np.eye(features.shape[1])
    coefficients = np.linalg.solve(products, scaled.T @ (weights * (targets - middle))) / spread
    return float(middle - centre @ coefficients), coefficients


def _held_out_error(examples: pd.DataFrame, labels: np.ndarray) -> HeldOutError:
    held_in, weights = examples["held_in"].to_numpy(), _weights(examples)
    residuals, mean_residuals = np.empty_like(held_in), np.empty_like(held_in)
    for label in np.unique(labels):
        out = labels == label
        remaining = examples[~out]
        intercept, coefficients, ranges = _fitted(remaining)
        predicted = intercept + _design(examples[out], ranges) @ coefficients
        residuals[out] = np.abs(held_in[out] - np.clip(predicted, *ranges["held_in"]))
        mean_residuals[out] = np.abs(held_in[out] - _weights(remaining) @ held_in[~out])
    within = np.quantile(residuals, _COVERAGE, weights=weights, method="inverted_cdf")
    return HeldOutError(
        groups=int(labels.max()) + 1,
        error=float(weights @ residuals),
        error_of_mean=float(weights @ mean_residuals),
        within=float(within),
    )
