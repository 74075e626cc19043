"""The merge methods: each one pure function of arrays, elementwise, that reads like its formula.

Every function works on float32 arrays of one shape, whatever the shape: a flat block of a
checkpoint that is streamed, a parameter in memory, a shard of it. Sums run over the experts in the
recipe's order. What a function takes says what it needs:

    base          the base model's parameters
    experts       the experts' parameters, one array each
    thresholds    per expert, the magnitude from which on an entry is kept (see thresholds.py)
    ceilings      per expert, the magnitude from which on an entry is an outlier
    kept          per expert, which entries are not dropped at random (see randomness.py)
    rescale       per expert, what entries that were kept are multiplied by
    zero_sign     which sign is elected where the signed masses cancel exactly
    coefficients  the parameter's own, from the inner products of its experts (see kernel.py)
    fishers       per expert, the diagonal of its Fisher information

and its other arguments are hyper-parameters. To add a method, add a function here.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l.merging import data_driven
from m2l.merging.method import (
    METHODS,
    REQUIRED,
    Arrays,
    Consensus,
    add,
    between,
    divided,
    drop,
    elect_and_merge,
    method,
    scaled,
    task_vectors,
    trim,
)

__all__ = ["METHODS"]


@method(weights=None)
def average(experts: Arrays, weights: jax.Array) -> jax.Array:
    """The (weighted) mean of the experts' parameters: sum_i w_i theta_i / sum_i w_i.

    Without weights this is the uniform soup of Wortsman et al. 2022, arXiv:2203.05482.
    """
    return divided(add(scaled(weights, experts)), add([*weights]))


@method(experts=1, t=0.5)
def linear(base: jax.Array, experts: Arrays, t: jax.Array) -> jax.Array:
    """On the line from the base to one expert: (1 - t) theta_base + t theta.

    WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, whose alpha is t.
    """
    return (1 - t) * base + t * experts[0]


@method(scale=1.0, weights=None)
def task_arithmetic(
    base: jax.Array, experts: Arrays, scale: jax.Array, weights: jax.Array
) -> jax.Array:
    """The base plus the scaled sum of the task vectors: theta_base + lambda sum_i w_i tau_i.

    Ilharco et al. 2023, arXiv:2212.04089. A sum, not a mean: with n experts lambda = 1 / n is the
    average. Negative weights or scales forget.
    """
    return base + scale * add(scaled(weights, task_vectors(base, experts)))


@method(density=0.2, scale=1.0, weights=None)
def ties(
    base: jax.Array,
    experts: Arrays,
    thresholds: jax.Array,
    weights: jax.Array,
    zero_sign: jax.Array,
    consensus: Consensus,
    scale: jax.Array,
) -> jax.Array:
    """Keeps the largest entries of each task vector, elects signs, averages what agrees.

    theta_base + lambda tau, Yadav et al. 2023, arXiv:2306.01708.
    """
    taus = trim(task_vectors(base, experts), thresholds)
    return base + scale * elect_and_merge(taus, weights, zero_sign, consensus)


@method(drop_rate=REQUIRED, scale=1.0, weights=None)
def dare(
    base: jax.Array,
    experts: Arrays,
    kept: Arrays,
    rescale: Arrays,
    weights: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Drops entries of each task vector at random, rescales, then adds as task arithmetic.

    theta_base + lambda sum_i w_i m_i tau_i / (1 - p), Yu et al. 2024, arXiv:2311.03099.
    """
    taus = drop(task_vectors(base, experts), kept, rescale)
    return base + scale * add(scaled(weights, taus))


@method(drop_rate=REQUIRED, density=1.0, scale=1.0, weights=None)
def dare_ties(
    base: jax.Array,
    experts: Arrays,
    kept: Arrays,
    rescale: Arrays,
    thresholds: jax.Array,
    weights: jax.Array,
    zero_sign: jax.Array,
    consensus: Consensus,
    scale: jax.Array,
) -> jax.Array:
    """Drops entries of each task vector at random, rescales, then elects and averages as TIES.

    Yu et al. 2024, arXiv:2311.03099. Density 1 trims nothing; below 1 the rescaled task vectors are
    trimmed as TIES does, which is the authors' own code.
    """
    taus = trim(drop(task_vectors(base, experts), kept, rescale), thresholds)
    return base + scale * elect_and_merge(taus, weights, zero_sign, consensus)


@method(drop_rate=REQUIRED, epsilon=0.15, scale=1.0, weights=None)
def della(
    base: jax.Array,
    experts: Arrays,
    kept: Arrays,
    rescale: Arrays,
    weights: jax.Array,
    zero_sign: jax.Array,
    consensus: Consensus,
    scale: jax.Array,
) -> jax.Array:
    """Drops small entries more often than large ones, rescales, then elects and averages as TIES.

    Deep et al. 2024, arXiv:2406.11617: drop rates fall from p + epsilon to p - epsilon with the
    rank of the magnitude, here among the entries of the parameter or, by scope, of the model.
    """
    taus = drop(task_vectors(base, experts), kept, rescale)
    return base + scale * elect_and_merge(taus, weights, zero_sign, consensus)


@method(density=0.9, gamma=0.01, scale=1.0, weights=None)
def breadcrumbs(
    base: jax.Array,
    experts: Arrays,
    thresholds: jax.Array,
    ceilings: jax.Array,
    weights: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Leaves out the smallest entries and the largest of each task vector, then adds.

    Davari & Belilovsky 2024, arXiv:2312.06795: of the magnitudes the top gamma are outliers, of the
    rest the largest are kept until density is reached.
    """
    taus = between(task_vectors(base, experts), thresholds, ceilings)
    return base + scale * add(scaled(weights, taus))


def _on_the_arc(products: Any, t: Any, xp: Any) -> Any:
    norms = xp.sqrt(xp.maximum(products[0, 0] * products[1, 1], 1e-30))
    cosine = xp.clip(products[0, 1] / norms, -1, 1)
    angle = xp.arccos(cosine)
    sine = xp.where(xp.abs(cosine) > 0.9995, 1, xp.sin(angle))
    arc = xp.stack([xp.sin((1 - t) * angle), xp.sin(t * angle)]) / sine
    return xp.where(xp.abs(cosine) > 0.9995, xp.stack([1 - t + 0 * angle, t + 0 * angle]), arc)


@method(experts=2, coefficients=_on_the_arc, t=0.5)
def slerp(experts: Arrays, coefficients: jax.Array) -> jax.Array:
    """On the arc from one expert to another: (sin((1-t)w) theta_1 + sin(t w) theta_2) / sin(w).

    Shoemake 1985 (doi:10.1145/325334.325242), parameter by parameter, w being the angle between the
    two; where |cos w| > 0.9995 the arc is taken for the line.
    """
    return add(scaled(coefficients, experts))


def _between_base_and_mean(products: Any, xp: Any) -> Any:
    n = products.shape[0]
    norms = xp.sqrt(xp.diagonal(products))
    cosines = products / xp.maximum(norms[:, None] * norms[None, :], 1e-6)
    cosine = (xp.clip(cosines, -1, 1).sum() - xp.diagonal(cosines).sum()) / (n * (n - 1))
    return xp.stack([n * cosine / (1 + (n - 1) * cosine)])


@method(coefficients=_between_base_and_mean)
def model_stock(base: jax.Array, experts: Arrays, coefficients: jax.Array) -> jax.Array:
    """Between the base and the mean, nearer to the mean the smaller the angles of task vectors.

    t mean_i theta_i + (1 - t) theta_base with t = n cos / (1 + (n - 1) cos), parameter by
    parameter; cos is the mean over pairs. Jang et al. 2024, arXiv:2403.19522.
    """
    t, n = coefficients[0], jnp.float32(len(experts))
    return t * divided(add(experts), n) + (1 - t) * base


@method(statistic="fisher", weights=None, floor=data_driven.FISHER_FLOOR)
def fisher(experts: Arrays, fishers: Arrays, weights: jax.Array, floor: jax.Array) -> jax.Array:
    """The mean of the experts, each entry weighted by its Fisher information.

    sum_i w_i F_i theta_i / sum_i w_i F_i, Matena & Raffel 2022, arXiv:2111.09832.
    """
    return data_driven.fisher_average(experts, fishers, weights, floor)


@method(statistic="gram", whole=True, nondiagonal_scale=data_driven.NONDIAGONAL_SCALE)
def regmean(
    name: str,
    experts: Iterable[np.ndarray],
    grams: Iterable[np.ndarray] | None,
    nondiagonal_scale: float,
) -> np.ndarray:
    """Linear kernels fit to all experts' outputs in least squares; the mean of what is none.

    W = (sum_i G_i)^-1 sum_i G_i W_i, Jin et al. 2023, arXiv:2212.09849.
    """
    if grams is None:
        count, total = 0, np.float32(0)
        for expert in experts:
            count, total = count + 1, total + np.float32(expert)
        return total / np.float32(count)
    pairs = zip(experts, grams, strict=True)
    return data_driven.regmean(name, pairs, nondiagonal_scale)
