"""A scaling law of merging, fitted to a study's results: loss over model size and experts.

Source: "Model Merging Scaling Laws in Large Language Models", arXiv 2509.24244: L = L* + B N^-beta
+ A0 N^-gamma / (k + b) for models of N parameters merged of k experts.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from m2l.errors import EvaluationError
from m2l.studies.normalized_performance import MULTITASK, Replicates, interval

# What one expert more must save of the loss to be worth its training: half a point in a hundred.
WORTH = 0.005
_DRAWS = 500
_MOST_EXPERTS = 64
_EXPONENTS = np.geomspace(0.05, 2.0, 14)
_OFFSETS = np.concatenate([[0.0], np.geomspace(0.1, 20.0, 15)])
# Of fewer sizes the exponents say nothing, and each is fitted on its own.
_LEAST_SIZES, _LEAST_COUNTS = 3, 3
COLUMNS = ("L", "B", "beta", "A0", "gamma", "b", "worth")


def fit(replicates: Replicates, parameters: Mapping[str, int]) -> pd.DataFrame:
    """Fits the law to each base and method, held-in and held-out.

    The loss is 1 less normalised performance: held-in, the share of its experts' performance that a
    merge loses; held-out, negative where it does better than its base. N counts from the smallest
    size, so that B and A0 are that size's terms.

    Args:
        replicates: The study's grid.
        parameters: The number of parameters of each size's models.

    Returns:
        Rows with base, method, size ("all", or one of fewer than three), loss ("held_in",
        "held_out"), error (the root mean square of the residuals), and for each of COLUMNS the
        value, NAME_low and NAME_high, the 95 % interval of the bootstrap over datasets and seeds.
        `worth` is the number of experts up to which each saves at least WORTH of the loss; 1:
        none does, and at most 64. Terms in N are NaN where a size is fitted on its own.

    Raises:
        EvaluationError: The study has fewer than three numbers of experts.
    """
    axes = replicates.axes
    counts = np.array(axes["experts"], float)
    if len(counts) < _LEAST_COUNTS:
        raise EvaluationError(
            f"a scaling law needs three numbers of experts, the study has {len(counts)}: "
            "set ScalingStudy.expert_counts"
        )
    sizes = np.array([parameters[size] for size in axes["size"]], float)
    together = len(sizes) >= _LEAST_SIZES
    groups = {"all": slice(None)} if together else {s: [i] for i, s in enumerate(axes["size"])}
    rows = []
    for (b, base), (m, method), loss, (size, chosen) in itertools.product(
        enumerate(axes["base"]),
        enumerate(axes["method"]),
        ("held_in", "held_out"),
        groups.items(),
    ):
        if method == MULTITASK:
            continue
        losses = 1 - getattr(replicates, loss)[: 1 + _DRAWS, chosen, b, m]
        row = {"base": base, "method": method, "size": size, "loss": loss}
        rows.append(row | _fitted(losses, sizes[chosen] / sizes.min(), counts, together))
    return pd.DataFrame(rows)


def _fitted(
    losses: np.ndarray, sizes: np.ndarray, counts: np.ndarray, together: bool
) -> dict[str, float]:
    """Fits every replicate of losses [replicates, sizes, counts]; the first is the measured."""
    flat = losses.reshape(len(losses), -1)
    flat = flat[np.isfinite(flat).all(1)]
    if not flat.size or not np.isfinite(losses[0]).all():
        raise EvaluationError("a scaling law needs every cell of the grid, and some are empty")
    size, count = (grid.ravel() for grid in np.meshgrid(sizes, counts, indexing="ij"))
    best = np.full(len(flat), np.inf)
    values = np.full((len(flat), 6), np.nan)
    exponents = _EXPONENTS if together else [np.nan]
    for beta, gamma, offset in itertools.product(exponents, exponents, _OFFSETS):
        # What is left is linear.
        merged = 1 / (count + offset)
        terms = [np.ones_like(count), merged]
        if together:
            terms = [terms[0], size**-gamma * merged, size**-beta]
        design = np.stack(terms, 1)
        solved = np.linalg.lstsq(design, flat.T, rcond=None)[0]
        squares = ((design @ solved - flat.T) ** 2).sum(0)
        better = squares < best
        best[better] = squares[better]
        lowest, slope, *size_term = solved[:, better]
        values[better, 0], values[better, 3] = lowest, slope
        values[better, 1] = size_term[0] if size_term else np.nan
        values[better, 2], values[better, 4], values[better, 5] = beta, gamma, offset
    largest = sizes.max()
    decay = largest ** -values[:, 4] if together else 1.0
    worth = experts_worth(values[:, 3] * decay, values[:, 5])
    result = {"error": float(np.sqrt(best[0] / flat.shape[1]))}
    for name, column in zip(COLUMNS, [*values.T, worth], strict=True):
        low, high = interval(column)
        result |= {name: float(column[0]), f"{name}_low": low, f"{name}_high": high}
    return result


def experts_worth(slope: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Returns the number of experts up to which each further one saves at least WORTH.

    Args:
        slope: A0 N^-gamma of the law.
        offset: Its b.
    """
    counts = np.arange(1, _MOST_EXPERTS + 1)[:, None]
    loss = slope / (counts + offset)
    saved = loss[:-1] - loss[1:]
    # What an expert saves falls with their number.
    return 1.0 + (saved >= WORTH).sum(0)
