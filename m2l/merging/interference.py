"""What a merge leaves of each of its experts, measured from checkpoints: nothing is evaluated.

tau_i is the task vector of expert i, and m that of the merge, by any method that works on blocks.
The merge has the part p_i = <m, tau_i> / |tau_i|^2 of it, cut to between 0 and 1, and disturbs it
by all else that is in m, q_i = |m - p_i tau_i| / |tau_i|.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2l.distributed import Processes
from m2l.errors import MergeError
from m2l.merging import kernel
from m2l.merging.job import prepare
from m2l.merging.method_registry import METHODS, Method
from m2l.merging.methods import Arrays, Consensus, task_vectors
from m2l.merging.passes import Analysis, Pass
from m2l.merging.recipe import Recipe
from m2l.progress import Progress
from m2l.storage import PathLike

Sums = tuple[np.ndarray, float, float]


class Measures(NamedTuple):
    """A set of experts and one merge of them.

    Attributes:
        experts: How many.
        norm: The root mean square of the task vectors' norms, over the norm of the base.
        cosine: The mean over pairs of task vectors.
        conflicts: The share of entries that some experts raise and others lower.
        projection: The mean of p_i over experts.
        interference: The mean of q_i over experts.
    """

    experts: float
    norm: float
    cosine: float
    conflicts: float
    projection: float
    interference: float


def measure(
    base: PathLike,
    experts: Sequence[PathLike],
    recipes: Sequence[Recipe],
    *,
    subtree: str | None = None,
    progress: bool = True,
) -> list[Measures]:
    """Measures what each recipe would make of the experts; writes nothing.

    Sums are over a sample of about 2 M entries at even distances, as the diagnostics of merges.
    Thresholds are exact, and take as many readings as when merging. Memory: that of a merge.

    Args:
        base: The base's checkpoint.
        experts: The experts', two or more.
        recipes: How to merge.
        subtree: Of pytrees that Orbax stored, the part that is merged.
        progress: Whether to show a progress bar.

    Returns:
        One for each recipe.

    Raises:
        MergeError: There are fewer than two experts; or they do not fit each other or a recipe; or
            one is equal to its base; or a method cannot be measured by a sample of task vectors.
        CheckpointError: One is missing or damaged.
    """
    if len(experts) < 2:
        raise MergeError(
            f"experts are measured against each other: name two or more, not {len(experts)}"
        )
    for recipe in recipes:
        method = METHODS[recipe.method]
        products = method.coefficients and not method.needs_base
        if method.whole or method.statistic or products:
            raise MergeError(
                f"{recipe.method} needs statistics, whole matrices, or products of whole models: "
                "its interference cannot be measured by a sample; name another --method"
            )
    units = [_without_scale(recipe) for recipe in recipes]
    sums: dict[Recipe, Sums] = dict.fromkeys(unit for unit, _ in units)
    with Progress(
        f"measuring {len(experts)} experts", len(sums), "recipes", silent=not progress
    ) as bar:
        for done, unit in enumerate(sums, start=1):
            sums[unit] = _sums(base, experts, unit, subtree)
            bar.update(done)
    return [summary(*sums[unit], scale) for unit, scale in units]


def _without_scale(recipe: Recipe) -> tuple[Recipe, float]:
    """Returns the recipe that gives the task vector that `scale` multiplies, and the scale."""
    scale = recipe.hyper_parameters.get("scale")
    known = METHODS["task_arithmetic"].hyper_parameters["scale"]
    is_factor = METHODS[recipe.method].hyper_parameters.get("scale") == known
    if recipe.scales or not is_factor or not isinstance(scale, float):
        return recipe, 1.0
    return Recipe.from_dict(recipe.to_dict() | {"scale": 1.0}), scale


def _sums(base: PathLike, experts: Sequence[PathLike], recipe: Recipe, subtree: str | None) -> Sums:
    """Returns the first arguments of `summary`."""
    options = {"subtree": subtree, "verify": False, "in_memory": False}
    job = prepare(base, experts, recipe, **options)
    names, plan = list(job.sizes), job.plan
    sources = [source.parameters for source in (job.reference, *job.experts)]
    with Processes() as processes, Pass(sources, plan.threads, plan.block, plan.at_once) as stream:
        analysis = Analysis(
            *(job.needs, job.reference, job.experts, job.sizes, names, names),
            *(processes, stream, lambda _: None),
        )
        analysis.run(diagnose=False)
        parts = analysis.sample(_program(METHODS[recipe.method], recipe.election))
    totals = dict.fromkeys(("products", "base", "conflicts", "touched"), np.zeros(()))
    for name, part in parts.items():
        factor = job.sizes[name] / float(part["entries"])
        totals = {kind: total + part[kind] * factor for kind, total in totals.items()}
    products = totals["products"]
    for place in np.flatnonzero(np.diagonal(products)[:-1] == 0):
        raise MergeError(f"{experts[place]}: equal to the base, it has no task vector")
    return products, float(totals["base"]), float(totals["conflicts"] / totals["touched"])


def summary(
    products: np.ndarray, base_square: float, conflicts: float, scale: float = 1.0
) -> Measures:
    """Computes the measures.

    Args:
        products: float64 [experts + 1, experts + 1], inner products of the task vectors; the last
            is the merge's.
        base_square: The squared norm of the base.
        conflicts: The share of entries on which signs conflict.
        scale: A factor of the merge's task vector.
    """
    squares, merged = np.diagonal(products)[:-1], scale * products[-1, :-1]
    merged_square, count = scale**2 * products[-1, -1], len(squares)
    norms = np.sqrt(squares)
    cosines = products[:-1, :-1] / np.outer(norms, norms)
    parts = np.clip(merged / squares, 0, 1)
    differences = merged_square - 2 * parts * merged + parts**2 * squares
    return Measures(
        experts=float(count),
        norm=float(np.sqrt(squares.mean() / base_square)),
        cosine=float((cosines.sum() - count) / (count * (count - 1))),
        conflicts=conflicts,
        projection=float(parts.mean()),
        interference=float((np.sqrt(np.maximum(differences, 0)) / norms).mean()),
    )


@functools.cache
def _program(method: Method, consensus: Consensus) -> Callable[..., dict[str, jax.Array]]:
    def sums(base: jax.Array, experts: Arrays, inputs: kernel.Inputs) -> dict[str, jax.Array]:
        merged = kernel.merged(method, consensus, base, experts, [], inputs)
        base = base.astype(jnp.float32)
        taus = task_vectors(base, kernel.float32(experts))
        up, down = (jnp.any(jnp.stack(taus) * sign > 0, axis=0) for sign in (1, -1))
        stacked = jnp.stack([tau.reshape(-1) for tau in (*taus, merged - base)])
        return {
            "products": jnp.einsum("ix,jx->ij", stacked, stacked, precision="highest"),
            "base": jnp.sum(jnp.square(base)),
            "conflicts": jnp.sum(up & down, dtype=jnp.int32),
            "touched": jnp.sum(up | down, dtype=jnp.int32),
        }

    return jax.jit(sums)
