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
    coefficients  the parameter's own, from the inner products of its experts (see measures.py)
    fishers       per expert, the diagonal of its Fisher information

and its other arguments are hyper-parameters. To add a method, add a function here.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l.merging import data_driven

Arrays = Sequence[jax.Array]
REQUIRED = "required"
METHODS: dict[str, "Method"] = {}


@dataclasses.dataclass(frozen=True)
class Consensus:
    """How TIES and its kin make one task vector of several.

    Attributes:
        merge: What becomes of the entries that agree with the elected sign: their "mean", "sum" or
            "max" (the one of the largest magnitude).
        weighted: Whether the experts' weights count in the election.
    """

    merge: str = "mean"
    weighted: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge method and what it asks for.

    Attributes:
        name: As recipes call it.
        function: The arithmetic.
        hyper_parameters: Each with its default, or REQUIRED.
        takes: The arguments of `function`.
        summary: What it does, in one line.
        experts: How many experts it merges; None: any number.
        coefficients: Makes `coefficients` of inner products, if the method takes them: of the task
            vectors', [experts, experts], or, without a base, of the experts'. Its other arguments
            are hyper-parameters, and numpy or jax.numpy to compute with.
        statistic: The statistic that must lie beside each expert: "fisher", "gram" or None.
        whole: Whether it needs a whole parameter at once, in its shape: no block will do.
    """

    name: str
    function: Callable[..., jax.Array]
    hyper_parameters: Mapping[str, Any]
    takes: tuple[str, ...]
    summary: str
    experts: int | None = None
    coefficients: Callable[..., Any] | None = None
    statistic: str | None = None
    whole: bool = False

    @property
    def needs_base(self) -> bool:
        """Whether it works on task vectors."""
        return "base" in self.takes

    @property
    def trims(self) -> bool:
        """Whether it keeps the largest entries of a task vector, and so needs thresholds."""
        return "thresholds" in self.takes

    @property
    def draws(self) -> bool:
        """Whether it drops entries at random, and so needs masks."""
        return "kept" in self.takes

    @property
    def elects(self) -> bool:
        """Whether signs are elected."""
        return "consensus" in self.takes

    @property
    def ranks(self) -> bool:
        """Whether an entry's drop rate depends on the rank of its magnitude."""
        return "epsilon" in self.hyper_parameters

    def before_trimming(
        self, base: jax.Array, experts: Arrays, kept: Arrays | None, rescale: Arrays | None
    ) -> list[jax.Array]:
        """The task vectors whose magnitudes the thresholds are taken over."""
        taus = task_vectors(base, experts)
        return drop(taus, kept, rescale) if self.draws else taus

    def sparsified(
        self, base: jax.Array, experts: Arrays, given: Mapping[str, Any]
    ) -> list[jax.Array]:
        """The task vectors as the method adds or elects them: dropped, trimmed, or as they are."""
        taus = self.before_trimming(base, experts, given.get("kept"), given.get("rescale"))
        if "ceilings" in self.takes:
            return between(taus, given["thresholds"], given["ceilings"])
        return trim(taus, given["thresholds"]) if self.trims else taus


def method(
    *,
    experts: int | None = None,
    coefficients: Callable[..., Any] | None = None,
    statistic: str | None = None,
    whole: bool = False,
    **hyper_parameters: Any,
) -> Callable[[Callable], Callable]:
    """Registers a function as the merge method of its name, with these hyper-parameters."""

    def register(function: Callable) -> Callable:
        name, summary = function.__name__, inspect.getdoc(function).splitlines()[0]
        takes = tuple(inspect.signature(function).parameters)
        METHODS[name] = Method(
            name,
            function,
            hyper_parameters,
            takes,
            summary,
            experts,
            coefficients,
            statistic,
            whole,
        )
        return function

    return register


def add(arrays: Arrays) -> jax.Array:
    """The sum, from the first array to the last."""
    return functools.reduce(jnp.add, arrays)


def scaled(factors: Sequence[jax.Array] | jax.Array, arrays: Arrays) -> list[jax.Array]:
    """Each array times its factor."""
    return [factor * array for factor, array in zip(factors, arrays, strict=True)]


def divided(total: jax.Array, by: jax.Array) -> jax.Array:
    """total / by, correctly rounded, for a scalar `by`."""
    # Dividing by a scalar, XLA multiplies by its rounded reciprocal; an array it cannot see through
    # is divided by.
    return total / jax.lax.optimization_barrier(jnp.broadcast_to(by, total.shape))


def task_vectors(base: jax.Array, experts: Arrays) -> list[jax.Array]:
    """tau_i = theta_i - theta_base (Ilharco et al. 2023, arXiv:2212.04089)."""
    return [expert - base for expert in experts]


def trim(taus: Arrays, thresholds: jax.Array) -> list[jax.Array]:
    """Keeps the entries whose magnitude reaches the expert's threshold; ties are all kept."""
    return [
        jnp.where(jnp.abs(tau) >= threshold, tau, 0)
        for tau, threshold in zip(taus, thresholds, strict=True)
    ]


def between(taus: Arrays, thresholds: jax.Array, ceilings: jax.Array) -> list[jax.Array]:
    """Keeps the entries whose magnitude reaches the threshold but not the ceiling."""
    return [
        jnp.where(jnp.abs(tau) < ceiling, tau, 0)
        for tau, ceiling in zip(trim(taus, thresholds), ceilings, strict=True)
    ]


def drop(taus: Arrays, kept: Arrays, rescale: Arrays | jax.Array) -> list[jax.Array]:
    """Drops entries and multiplies the rest: by 1 / (1 - p), the task vector stays in expectation.

    Yu et al. 2024, arXiv:2311.03099.
    """
    pairs = zip(kept, scaled(rescale, taus), strict=True)
    return [jnp.where(keep, tau, 0) for keep, tau in pairs]


def elect_and_merge(
    taus: Arrays, weights: jax.Array, zero_sign: jax.Array, consensus: Consensus
) -> jax.Array:
    """Elects each entry's sign by mass, then merges the task vectors that agree with it.

    gamma = sgn(sum_i tau_i); by default the result is the mean of {tau_i : sgn(tau_i) = gamma}.
    Yadav et al. 2023, arXiv:2306.01708.

    Args:
        taus: The task vectors, trimmed.
        weights: [experts]; the mean is sum_i w_i tau_i / sum_i w_i over those that agree.
        zero_sign: The sign elected where the masses cancel exactly; with 0 the result is 0 there.
        consensus: What is done with those that agree, and whether weights vote.
    """
    weighted = scaled(weights, taus)
    votes = weighted if consensus.weighted else taus
    mass = add(votes)
    mass = jnp.where(mass == 0, zero_sign, mass)
    agreeing = [((vote > 0) & (mass > 0)) | ((vote < 0) & (mass < 0)) for vote in votes]
    found = [jnp.where(agrees, tau, 0) for agrees, tau in zip(agreeing, weighted, strict=True)]
    if consensus.merge == "max":
        return jnp.sign(mass) * functools.reduce(jnp.maximum, [jnp.abs(tau) for tau in found])
    total = add(found)
    if consensus.merge == "sum":
        return total
    count = add([jnp.where(agrees, w, 0) for agrees, w in zip(agreeing, weights, strict=True)])
    return total / jnp.where(count == 0, 1, count)


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
    experts: Sequence[np.ndarray],
    grams: Sequence[np.ndarray] | None,
    nondiagonal_scale: float,
) -> np.ndarray:
    """Linear kernels fit to all experts' outputs in least squares; the mean of what is none.

    W = (sum_i G_i)^-1 sum_i G_i W_i, Jin et al. 2023, arXiv:2212.09849.
    """
    if grams is None:
        return np.sum(np.float32(experts), axis=0, dtype=np.float32) / np.float32(len(experts))
    pairs = zip(experts, grams, strict=True)
    return data_driven.regmean(name, pairs, nondiagonal_scale)
