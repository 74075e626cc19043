"""The merge methods: each one pure function of arrays, elementwise, that reads like its formula.

Every function works on float32 arrays of one shape, whatever the shape: a flat block of a
checkpoint that is streamed, a parameter in memory, a shard of it. Sums run over the experts in the
recipe's order. To add a method, add a function here: method_registry.py says how signatures are
read. A hyper-parameter that only inputs are made of, as thresholds are of the density, is not used
by the function itself.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from m2l.merging.method_registry import Interval, method

Arrays = Sequence[jax.Array]

Density = Annotated[
    float,
    Interval(0, 1, open_low=True, hint="20 % is 0.2"),
    "Share of each task vector that is kept.",
]
Scale = Annotated[
    float,
    Interval(),
    "lambda: the factor of the merged task vector; below 0 it forgets.",
]
DropRate = Annotated[
    float,
    Interval(0, 1, open_high=True, hint="90 % is 0.9"),
    "p: share of each task vector that is dropped at random.",
]
Epsilon = Annotated[
    float,
    Interval(0, 1, open_high=True),
    "Drop rates go from drop_rate + epsilon to drop_rate - epsilon.",
]
Gamma = Annotated[
    float,
    Interval(0, 1, open_high=True, hint="1 % is 0.01"),
    "Share of the largest entries, outliers, that is left out.",
]
Position = Annotated[
    float,
    Interval(),
    "From the first model (0) to the second (1).",
]
Nearness = Annotated[
    float,
    Interval(0),
    "t: entries that differ from the base's by less are the expert's.",
]
Iterations = Annotated[float, Interval(0, 100), "Steps towards the Karcher mean, at most."]
Tolerance = Annotated[
    float,
    Interval(0),
    "Norms and angles below it count as 0, and a step below it is the last.",
]
Steps = Annotated[
    float,
    Interval(0, 100_000),
    "Steps of Adam (wudi) or of conjugate gradients (mats), a whole number.",
]
Weights = Annotated[
    Sequence[float],
    Interval(),
    "One number an expert.",
]


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


# The steps


def add(arrays: Arrays | Sequence[float]) -> jax.Array:
    """Returns the sum, from the first array to the last."""
    return functools.reduce(jnp.add, arrays)


def scaled(factors: Arrays | Sequence[float] | jax.Array, arrays: Arrays) -> list[jax.Array]:
    """Returns each array times its factor."""
    return [factor * array for factor, array in zip(factors, arrays, strict=True)]


def divided(total: jax.Array, divisor: jax.Array) -> jax.Array:
    """Returns total / divisor, correctly rounded, for a scalar divisor."""
    # Dividing by a scalar, XLA multiplies by its rounded reciprocal; an array it cannot see through
    # is divided by.
    return total / jax.lax.optimization_barrier(jnp.broadcast_to(divisor, total.shape))


def task_vectors(base: jax.Array, experts: Arrays) -> list[jax.Array]:
    """Returns tau_i = theta_i - theta_base (Ilharco et al. 2023, arXiv:2212.04089)."""
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


def drop(taus: Arrays, masks: Arrays, rescale: Arrays | jax.Array) -> list[jax.Array]:
    """Drops entries and multiplies the rest: by 1 / (1 - p), the task vector stays in expectation.

    Yu et al. 2024, arXiv:2311.03099.
    """
    pairs = zip(masks, scaled(rescale, taus), strict=True)
    return [jnp.where(mask, tau, 0) for mask, tau in pairs]


def elect_and_merge(
    taus: Arrays,
    weights: Sequence[float] | jax.Array,
    zero_sign: jax.Array,
    consensus: Consensus,
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
    elected = [jnp.where(agrees, tau, 0) for agrees, tau in zip(agreeing, weighted, strict=True)]
    if consensus.merge == "max":
        return jnp.sign(mass) * functools.reduce(jnp.maximum, [jnp.abs(tau) for tau in elected])
    total = add(elected)
    if consensus.merge == "sum":
        return total
    count = add([jnp.where(agrees, w, 0) for agrees, w in zip(agreeing, weights, strict=True)])
    return total / jnp.where(count == 0, 1, count)


# The methods


def zero_weights(weights: Sequence[float] | float, **_: object) -> str:
    """Returns the complaint about weights that sum to zero, for methods that divide by the sum."""
    weights = (weights,) if isinstance(weights, float) else weights
    return f"weights must not sum to zero: {[*weights]}" * bool(weights and not math.fsum(weights))


def whole_steps(steps: float, **_: object) -> str:
    """Returns the complaint about a number of steps that is none."""
    return "" if float(steps).is_integer() else f"steps must be a whole number, not {steps!r}"


@method(check=zero_weights)
def average(experts: Arrays, weights: Weights = ()) -> jax.Array:
    """Averages the experts: sum_i w_i theta_i / sum_i w_i.

    Without weights this is the uniform soup of Wortsman et al. 2022, arXiv:2203.05482.
    """
    return divided(add(scaled(weights, experts)), add([*weights]))


@method
def weighted_sum(experts: Arrays, weights: Weights = ()) -> jax.Array:
    """Adds the experts: sum_i w_i theta_i.

    mergekit's `linear` without `normalize`; of one expert at weight 1, a copy.
    """
    return add(scaled(weights, experts))


@method(experts=Interval(1, 1))
def linear(base: jax.Array, experts: Arrays, t: Position = 0.5) -> jax.Array:
    """Interpolates from the base to one expert: (1 - t) theta_base + t theta.

    WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, whose alpha is t.
    """
    return (1 - t) * base + t * experts[0]


@method
def task_arithmetic(
    base: jax.Array, experts: Arrays, scale: Scale = 1.0, weights: Weights = ()
) -> jax.Array:
    """Adds the scaled sum of the task vectors: theta_base + lambda sum_i w_i tau_i.

    Ilharco et al. 2023, arXiv:2212.04089. A sum, not a mean: with n experts lambda = 1 / n is the
    average; sweep 0.1 to 1, many experts overshoot. Negative weights or scales forget.
    """
    return base + scale * add(scaled(weights, task_vectors(base, experts)))


@method
def ties(
    base: jax.Array,
    experts: Arrays,
    thresholds: jax.Array,
    zero_sign: jax.Array,
    consensus: Consensus,
    density: Density = 0.2,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Keeps the largest entries of each task vector, elects signs, averages those that agree.

    theta_base + lambda tau, Yadav et al. 2023, arXiv:2306.01708, who recommend lambda 1 without
    validation data; with it, sweep 0.8 to 2.5.
    """
    taus = trim(task_vectors(base, experts), thresholds)
    return base + scale * elect_and_merge(taus, weights, zero_sign, consensus)


@method
def dare(
    base: jax.Array,
    experts: Arrays,
    masks: Arrays,
    rescale: Arrays,
    drop_rate: DropRate,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Drops entries at random, rescales, adds: theta_base + lambda sum_i w_i m_i tau_i / (1 - p).

    Yu et al. 2024, arXiv:2311.03099. There is no agreed drop rate: 0.1 to 0.9 are in use.
    """
    taus = drop(task_vectors(base, experts), masks, rescale)
    return base + scale * add(scaled(weights, taus))


@method
def dare_ties(
    base: jax.Array,
    experts: Arrays,
    masks: Arrays,
    rescale: Arrays,
    thresholds: jax.Array,
    zero_sign: jax.Array,
    consensus: Consensus,
    drop_rate: DropRate,
    density: Density = 1.0,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Drops and rescales as `dare`, trims if density is below 1, elects and averages as `ties`.

    Yu et al. 2024, arXiv:2311.03099. Density 1 trims nothing; below 1 the rescaled task vectors are
    trimmed as TIES does, which is the authors' own code.
    """
    taus = trim(drop(task_vectors(base, experts), masks, rescale), thresholds)
    return base + scale * elect_and_merge(taus, weights, zero_sign, consensus)


def _drop_rates(drop_rate: float, epsilon: float, **_: object) -> str:
    least, most = drop_rate - epsilon, drop_rate + epsilon
    if least >= 0 and most < 1:
        return ""
    return (
        f"drop_rate {drop_rate} with epsilon {epsilon}: the rates from {least:g} to {most:g} must "
        "be at least 0 and below 1"
    )


@method(scope="tensor", check=_drop_rates)
def della_linear(
    base: jax.Array,
    experts: Arrays,
    masks: Arrays,
    rescale: Arrays,
    drop_rate: DropRate,
    epsilon: Epsilon = 0.15,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Drops small entries more often than large ones and rescales as `della`, then adds.

    theta_base + lambda sum_i w_i tau_i, Deep et al. 2024, arXiv:2406.11617, without the election of
    signs.
    """
    taus = drop(task_vectors(base, experts), masks, rescale)
    return base + scale * add(scaled(weights, taus))


@method(scope="tensor", check=_drop_rates)
def della(
    base: jax.Array,
    experts: Arrays,
    masks: Arrays,
    rescale: Arrays,
    zero_sign: jax.Array,
    consensus: Consensus,
    drop_rate: DropRate,
    epsilon: Epsilon = 0.15,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Drops small entries more often than large ones, rescales, elects and averages as `ties`.

    Deep et al. 2024, arXiv:2406.11617: drop rates fall from p + epsilon to p - epsilon with the
    rank of the magnitude, here among the entries of the parameter or, by scope, of the model.
    """
    taus = drop(task_vectors(base, experts), masks, rescale)
    return base + scale * elect_and_merge(taus, weights, zero_sign, consensus)


@method(scope="tensor")
def breadcrumbs(
    base: jax.Array,
    experts: Arrays,
    thresholds: jax.Array,
    ceilings: jax.Array,
    density: Density = 0.9,
    gamma: Gamma = 0.01,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Leaves out the largest share gamma of each task vector and all but the next density, adds.

    Davari & Belilovsky 2024, arXiv:2312.06795: of the magnitudes the top gamma are outliers, of the
    rest the largest are kept until density is reached. Of both together more than all, gamma gives
    way.
    """
    taus = between(task_vectors(base, experts), thresholds, ceilings)
    return base + scale * add(scaled(weights, taus))


@method(scope="tensor")
def breadcrumbs_ties(
    base: jax.Array,
    experts: Arrays,
    thresholds: jax.Array,
    ceilings: jax.Array,
    zero_sign: jax.Array,
    consensus: Consensus,
    density: Density = 0.9,
    gamma: Gamma = 0.01,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Leaves out entries as `breadcrumbs`, elects signs and averages those that agree as `ties`.

    Davari & Belilovsky 2024, arXiv:2312.06795, with the election of Yadav et al. 2023,
    arXiv:2306.01708, as mergekit joins them.
    """
    taus = between(task_vectors(base, experts), thresholds, ceilings)
    return base + scale * elect_and_merge(taus, weights, zero_sign, consensus)


@method(experts=Interval(1, 1))
def nearswap(base: jax.Array, experts: Arrays, nearness: Nearness = 1e-4) -> jax.Array:
    """Takes the expert's entries where they are near the base's, and little of them elsewhere.

    theta_base + min(1, t / |tau|) tau, t being the nearness: entries that differ by less are
    swapped. Alchemonaut 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    (tau,) = task_vectors(base, experts)
    return base + jnp.minimum(nearness / jnp.maximum(jnp.abs(tau), 1e-6), 1) * tau


def _between_base_and_mean(
    products: jax.Array | np.ndarray, xp: ModuleType
) -> jax.Array | np.ndarray:
    n = products.shape[0]
    # Without the least one the derivative at 0 were infinite.
    norms = xp.sqrt(xp.maximum(xp.diagonal(products), 1e-30))
    cosines = products / xp.maximum(norms[:, None] * norms[None, :], 1e-6)
    cosine = (xp.clip(cosines, -1, 1).sum() - xp.diagonal(cosines).sum()) / (n * (n - 1))
    return xp.stack([n * cosine / (1 + (n - 1) * cosine)])


@method(experts=Interval(low=2), coefficients=_between_base_and_mean)
def model_stock(base: jax.Array, experts: Arrays, coefficients: jax.Array) -> jax.Array:
    """Interpolates from the base to the mean, the farther the smaller the task vectors' angles.

    t mean_i theta_i + (1 - t) theta_base with t = n cos / (1 + (n - 1) cos), parameter by
    parameter; cos is the mean over pairs. Jang et al. 2024, arXiv:2403.19522.
    """
    t, n = coefficients[0], jnp.float32(len(experts))
    return t * divided(add(experts), n) + (1 - t) * base


# Merges on the sphere: they turn from one direction to others, parameter by parameter. What they
# make is a sum of the experts, or of the task vectors, whose coefficients follow from the inner
# products of these: so one reading computes the products, and the sum streams.

_Array = jax.Array | np.ndarray

_ROUNDING = 1e-5
"""What the rounding of float32 products may leave of a squared sine, or of the squared length of a
mean of unit vectors, that is 0: below it vectors are on one line, and a mean has no direction."""


def _length(squared: _Array, xp: ModuleType) -> _Array:
    """Returns a square root whose derivative is finite at 0, where it is 1e-15."""
    return xp.sqrt(xp.maximum(squared, 1e-30))


def _inverse(squared: _Array, xp: ModuleType) -> _Array:
    """Returns 1 / sqrt(squared), and 0 where that, or its derivative, is no float32 number."""
    some = squared > 1e-25
    return xp.where(some, 1 / xp.sqrt(xp.where(some, squared, 1)), 0)


def _cosine(products: _Array, xp: ModuleType) -> _Array:
    inverse = _inverse(xp.diagonal(products), xp)
    return xp.clip(products[0, 1] * inverse[0] * inverse[1], -1, 1)


def _arc(cosine: _Array, t: _Array | float, line: _Array, xp: ModuleType) -> _Array:
    """Returns the coefficients of two vectors on the arc between them; where `line`, on a line."""
    angle = xp.arccos(xp.where(line, 0, cosine))
    arc = xp.stack([xp.sin((1 - t) * angle), xp.sin(t * angle)]) / xp.sin(angle)
    return xp.where(line, xp.stack([1 - t + 0 * angle, t + 0 * angle]), arc)


def _slerp(products: _Array, t: _Array | float, xp: ModuleType) -> _Array:
    cosine = _cosine(products, xp)
    return _arc(cosine, t, xp.abs(cosine) > 0.9995, xp)


@method(experts=Interval(2, 2), coefficients=_slerp)
def slerp(experts: Arrays, coefficients: jax.Array, t: Position = 0.5) -> jax.Array:
    """Follows the arc of two experts: (sin((1-t)w) theta_1 + sin(t w) theta_2) / sin(w).

    Shoemake 1985, doi:10.1145/325334.325242, parameter by parameter, w being the angle between the
    two; where |cos w| > 0.9995 the arc is taken for the line.
    """
    return add(scaled(coefficients, experts))


def _nuslerp(products: _Array, weights: _Array, xp: ModuleType, **_: _Array) -> _Array:
    total = weights[0] + weights[1]
    unweighted = xp.abs(total) < 1e-6
    t = xp.where(unweighted, 0.5, weights[1] / xp.where(unweighted, 1, total))
    cosine = _cosine(products, xp)
    # There the arc is a line to float32, or, of opposite vectors, any half of a circle.
    return _arc(cosine, t, 1 - cosine**2 <= _ROUNDING, xp)


@method(experts=Interval(2, 2), coefficients=_nuslerp)
def nuslerp(experts: Arrays, coefficients: jax.Array, weights: Weights = ()) -> jax.Array:
    """Follows the arc of two experts as `slerp`, as far as t = w_2 / (w_1 + w_2).

    mergekit's NuSLERP of whole parameters, without a base.
    """
    return add(scaled(coefficients, experts))


@method(experts=Interval(2, 2), coefficients=_nuslerp)
def task_nuslerp(
    base: jax.Array,
    experts: Arrays,
    coefficients: jax.Array,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Follows the arc of two task vectors, and adds it to the base; t = w_2 / (w_1 + w_2).

    theta_base + lambda (sin((1-t)w) tau_1 + sin(t w) tau_2) / sin(w): mergekit's NuSLERP of whole
    parameters, with a base.
    """
    return base + scale * add(scaled(coefficients, task_vectors(base, experts)))


def _multislerp(products: _Array, weights: _Array, xp: ModuleType, **_: _Array) -> _Array:
    shares = weights / weights.sum()
    squares = xp.diagonal(products)
    units = shares * _inverse(squares, xp)
    mean = units @ products @ units
    cancels = mean <= _ROUNDING * xp.abs(shares).sum() ** 2
    length = (shares * _length(squares, xp)).sum() / xp.sqrt(xp.where(cancels, 1, mean))
    return xp.where(cancels, shares, units * length)


@method(coefficients=_multislerp, check=zero_weights)
def multislerp(
    experts: Arrays, coefficients: jax.Array, scale: Scale = 1.0, weights: Weights = ()
) -> jax.Array:
    """Points along the weighted mean of the experts' directions, as long as they are in the mean.

    lambda (sum_i w_i |theta_i|) u / |u|, u = sum_i w_i theta_i / |theta_i|, the weights summing to
    1: mergekit's Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea, whose step from u
    along the sphere is 0 but for rounding. Where directions cancel it is the weighted average.
    """
    return scale * add(scaled(coefficients, experts))


@method(coefficients=_multislerp, check=zero_weights)
def task_multislerp(
    base: jax.Array,
    experts: Arrays,
    coefficients: jax.Array,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Points along the weighted mean of the task vectors' directions: `multislerp` of these.

    theta_base + lambda (sum_i w_i |tau_i|) u / |u|, u = sum_i w_i tau_i / |tau_i|: mergekit's
    Multi-SLERP with a base.
    """
    return base + scale * add(scaled(coefficients, task_vectors(base, experts)))


def _karcher(
    products: _Array,
    iterations: _Array | float,
    tolerance: _Array | float,
    weights: _Array,
    xp: ModuleType,
) -> _Array:
    squares = xp.diagonal(products)
    lengths = _length(squares, xp)
    counts = (lengths > tolerance) & (weights != 0)
    inverse = xp.where(counts, _inverse(squares, xp), 0)
    cosines = products * inverse[:, None] * inverse[None, :]
    shares = xp.where(counts, weights, 0)
    total = shares.sum()
    shares = shares / xp.where(total == 0, 1, total)

    def norm(vector: _Array) -> _Array:
        return _length(vector @ cosines @ vector, xp)

    def step(state: tuple[_Array, _Array], number: _Array | int) -> tuple[_Array, _Array]:
        # Vectors are their coefficients of the unit vectors.
        mean, done = state
        dots = xp.clip(cosines @ mean, -1, 1)
        far = 1 - dots**2 > _ROUNDING
        angles = xp.arccos(xp.where(far, dots, 0))
        # Angle / sine of a direction that is near; to the opposite one is no way more than another.
        near = xp.where(dots > 0, 1 + (1 - dots) / 3, 0)
        factors = xp.where(far, angles / xp.sin(angles), near)
        factors = xp.where(dots > xp.cos(xp.minimum(tolerance, np.pi)), 0, factors) * shares
        tangent = factors - (factors * dots).sum() * mean
        size = norm(tangent)
        done = done | (size < tolerance) | (number >= iterations)
        moved = xp.cos(size) * mean + xp.sin(size) / size * tangent
        return xp.where(done, mean, moved / norm(moved)), done

    mean = norm(shares)
    first = (xp.arange(len(shares)) == xp.argmax(counts)) * xp.ones_like(shares)
    cancels = mean**2 <= xp.maximum(tolerance**2, _ROUNDING * xp.abs(shares).sum() ** 2)
    state = xp.where(cancels, first, shares / mean), xp.asarray(False)
    if xp is np:
        for number in range(int(np.ceil(iterations))):
            state = step(state, number)
            if state[1]:
                break
    else:
        state = jax.lax.fori_loop(0, 100, lambda number, state: step(state, number), state)
    length = (weights * lengths).sum() / weights.sum()
    alone = (weights != 0) & ((weights != 0).sum() == 1)
    return xp.where(alone, 1, state[0] * inverse * length)


@method(coefficients=_karcher, check=zero_weights)
def karcher(
    experts: Arrays,
    coefficients: jax.Array,
    iterations: Iterations = 10.0,
    tolerance: Tolerance = 1e-5,
    weights: Weights = (),
) -> jax.Array:
    """Points along the Karcher mean of the experts' directions, as long as they are in the mean.

    The point of the sphere from which the geodesics to the directions add up to 0, by gradient
    steps from their mean (from the first, where directions cancel); times sum_i w_i |theta_i|.
    arXiv:2603.04972, as mergekit has it; of one expert, or weight, that expert.
    """
    return add(scaled(coefficients, experts))
