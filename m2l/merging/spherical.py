"""Merge methods on the sphere: they turn from one direction to others, parameter by parameter.

What they make is a sum of the experts, or of the task vectors, whose coefficients follow from the
inner products of these. So one reading computes the products, and the sum streams.
"""

from types import ModuleType
from typing import Annotated

import jax
import numpy as np

from m2l.merging.method_registry import Interval, method
from m2l.merging.methods import (
    Arrays,
    Position,
    Scale,
    Weights,
    add,
    scaled,
    task_vectors,
    zero_weights,
)

Iterations = Annotated[float, Interval(0, 100), "Steps towards the Karcher mean, at most."]
Tolerance = Annotated[
    float,
    Interval(0),
    "Norms and angles below it count as 0, and a step below it is the last.",
]

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
