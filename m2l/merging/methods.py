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
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Annotated, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from m2l.errors import MergeError
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
Weights = Annotated[
    Sequence[float],
    Interval(),
    "One number an expert.",
]
Floor = Annotated[
    float,
    Interval(0),
    "The least Fisher information that an entry counts with.",
]
Prior = Annotated[
    float,
    Interval(0),
    "delta: the information on each entry that is not from data; 0 counts as 1e-30.",
]
BaseWeight = Annotated[
    float,
    Interval(0),
    "w_0: the weight of the base's Fisher information.",
]
Steps = Annotated[
    float,
    Interval(0, 100_000),
    "Steps of Adam (wudi) or of conjugate gradients (mats), a whole number.",
]
NondiagonalScale = Annotated[
    float,
    Interval(0, 1),
    "Factor of the entries of Gram matrices off their diagonals.",
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


# Merges by statistics of data, of one parameter at a time

FISHER_FLOOR = 1e-6
NONDIAGONAL_SCALE = 0.9

# The least eigenvalue of a correlation matrix that float32 Grams can tell from 0.
_RESOLVED = 1e-5


def fisher_average(
    experts: Sequence[jax.Array],
    fishers: Sequence[jax.Array],
    weights: jax.Array,
    floor: float = FISHER_FLOOR,
) -> jax.Array:
    """Averages each entry by how sure the experts are of it.

    sum_i w_i F_i theta_i / sum_i w_i F_i, no F_i counting as less than `floor`; so where all are
    below it, this is the mean by weights alone. Elementwise, on blocks of any shape; jittable and
    differentiable.

    Matena & Raffel 2022, arXiv:2111.09832, equation 6. Their code has the same floor, but for the
    first model alone, the one whose task matters to them, which thereby keeps what no model is sure
    of; and it divides each weight by the L2 norm of the model's whole Fisher, which here is for the
    caller to do.

    Args:
        experts: float32 arrays of one shape, one an expert.
        fishers: Their diagonal Fisher information, float32 of the same shape, not negative.
        weights: float32 [experts], above 0.
        floor: The smallest F. 0 is allowed: where all F are 0, the result is the mean by weights.

    Returns:
        float32, of the same shape.
    """
    certainties = [
        weight * jnp.maximum(fisher, floor) for weight, fisher in zip(weights, fishers, strict=True)
    ]
    total = functools.reduce(jnp.add, certainties)
    # Shares first: products of a parameter with an information of 1e-40 would lose their digits.
    unsure, mean = total == 0, functools.reduce(jnp.add, list(weights))
    total = jnp.where(unsure, 1, total)
    shares = [
        jnp.where(unsure, weight / mean, certainty / total)
        for weight, certainty in zip(weights, certainties, strict=True)
    ]
    return functools.reduce(
        jnp.add, [share * expert for share, expert in zip(shares, experts, strict=True)]
    )


def regression_mean(
    name: str,
    experts: Iterable[tuple[np.ndarray, np.ndarray]],
    nondiagonal_scale: float = NONDIAGONAL_SCALE,
) -> np.ndarray:
    """Computes the kernel whose outputs are nearest to each expert's on the expert's inputs.

    W = (sum_i G_i)^-1 sum_i G_i W_i, G_i = X_i^T X_i with its entries off the diagonal times alpha:
    below 1 that takes the solution nearer to an average, and makes sum_i G_i regular. Where that
    leaves W free, for an input that is always 0 or, with alpha 1, a direction in which no expert
    has inputs, it is the solution nearest to the mean of the W_i (each input in units of its size).
    In float64, by Cholesky.

    Jin et al. 2023, arXiv:2212.09849, equation 2 and section 3.3, who take alpha = 0.9. Other
    parameters than kernels they average.

    Args:
        name: The kernel's, for messages.
        experts: Per expert its kernel [d_in, ...] and its Gram matrix [d_in, d_in], of any float
            dtypes. Taken one after the other, so that a generator holds one expert in memory.
        nondiagonal_scale: alpha, in [0, 1].

    Returns:
        float32, of a kernel's shape.

    Raises:
        MergeError: alpha is out of range; a Gram is not of the kernel's inputs, or is no Gram:
            negative on its diagonal, or not symmetric; an entry is not finite; no experts.
    """
    import scipy.linalg  # Which takes as long to import as all else that merging needs.

    regression = _Regression.of(name, experts, nondiagonal_scale)
    shape, grams, products, mean = regression.shape, *regression.sums
    del regression
    # The difference from the mean is solved for, each input in units of its size: what is to be
    # free is then 0, and the eigenvalues of a correlation matrix are at least 1 - alpha.
    sizes = np.sqrt(np.diagonal(grams))
    sizes = np.where(sizes > 0, sizes, 1.0)
    products -= grams @ mean
    products /= sizes[:, None]
    correlations = np.outer(sizes, sizes)
    np.divide(grams, correlations, out=correlations)
    del grams
    np.fill_diagonal(correlations, 1 + max(0.0, _RESOLVED - (1 - nondiagonal_scale)))
    try:
        solution = scipy.linalg.solve(correlations, products, assume_a="pos")
    except np.linalg.LinAlgError as error:
        raise MergeError(
            f"{name}: the Grams together have a negative eigenvalue, so one of them is no Gram; "
            "gather them anew with m2l statistics"
        ) from error
    solution /= sizes[:, None]
    mean += solution
    return mean.reshape(shape).astype(np.float32)


def matched_kernel(
    name: str,
    base: np.ndarray,
    experts: Iterable[tuple[np.ndarray, np.ndarray]],
    steps: float,
    initial_scale: float,
    nondiagonal_scale: float = 1.0,
) -> np.ndarray:
    """Moves a kernel by conjugate gradients to where it does as each expert on its inputs.

    From W_0 = theta_base + lambda sum_i tau_i towards a solution of (sum_i G_i) W = sum_i G_i W_i,
    G_i as in `regression_mean`, with one step length for all columns. What G leaves free stays as
    it is in W_0, and the directions in which the inputs are largest move first. In float64.

    Tam et al. 2023, arXiv:2312.04339, who stop where the residual is 1e-5 of the right side.

    Args:
        name: The kernel's, for messages.
        base: The base's kernel, [d_in, ...].
        experts: As `regression_mean` takes them.
        steps: The most steps, a whole number; 0 returns W_0.
        initial_scale: lambda.
        nondiagonal_scale: alpha, in [0, 1].

    Returns:
        float32, of a kernel's shape.

    Raises:
        MergeError: As `regression_mean`.
    """
    import scipy.sparse.linalg

    regression = _Regression.of(name, experts, nondiagonal_scale)
    grams, products, mean = regression.sums
    initial = mean
    initial *= regression.count * initial_scale
    initial += (1 - regression.count * initial_scale) * np.float64(base).reshape(mean.shape)

    def forward(kernel: np.ndarray) -> np.ndarray:
        return (grams @ kernel.reshape(products.shape)).ravel()

    operator = scipy.sparse.linalg.LinearOperator((products.size,) * 2, forward)
    solution = initial.ravel()
    if steps and products.size:
        solution, _ = scipy.sparse.linalg.cg(
            operator, products.ravel(), solution, rtol=1e-5, atol=0.0, maxiter=int(steps)
        )
    return solution.reshape(regression.shape).astype(np.float32)


class _Regression(NamedTuple):
    """What least squares need of the experts.

    Attributes:
        count: The number of experts.
        shape: Of a kernel.
        sums: sum_i G_i, sum_i G_i W_i and the mean of the W_i, float64 [d_in, d_in] and twice
            [d_in, d_out].
    """

    count: int
    shape: tuple[int, ...]
    sums: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(
        cls,
        name: str,
        experts: Iterable[tuple[np.ndarray, np.ndarray]],
        nondiagonal_scale: float,
    ) -> Self:
        """Adds up kernels and Grams; arguments and errors as of `regression_mean`."""
        if not 0 <= nondiagonal_scale <= 1:
            raise MergeError(f"nondiagonal_scale must be in [0, 1], not {nondiagonal_scale!r}")
        count, grams, kernels, products = 0, 0.0, 0.0, 0.0
        shape: tuple[int, ...] = ()
        for kernel, gram in experts:
            shape = shape or kernel.shape
            _check_regression(f"{name} of expert {count}", shape, kernel, gram)
            kernel = np.array(kernel, np.float64).reshape(shape[0], math.prod(shape[1:]))
            scaled = np.array(gram, np.float64)
            diagonal = np.diagonal(scaled).copy()
            scaled *= nondiagonal_scale
            np.fill_diagonal(scaled, diagonal)
            count += 1
            products += scaled @ kernel
            grams += scaled
            kernels += kernel
            del kernel, gram, scaled
        if not count:
            raise MergeError(f"{name}: no experts to merge")
        kernels /= count
        return cls(count, shape, (grams, products, kernels))


def gram_bytes(kernel: Sequence[int], inputs: int, has_base: bool) -> int:
    """Returns the bytes that merging a kernel by Grams takes with its caller, at most.

    Args:
        kernel: Its shape.
        inputs: d_in, the length of its Gram's sides.
        has_base: Whether by `matched_kernel`, and not by `regression_mean`.
    """
    return 8 * (3 * inputs**2 + (9 if has_base else 5) * math.prod(kernel))


def _check_regression(
    label: str, shape: tuple[int, ...], kernel: np.ndarray, gram: np.ndarray
) -> None:
    if kernel.shape != shape or gram.shape != (shape[0], shape[0]):
        raise MergeError(
            f"{label}: a kernel {list(kernel.shape)} with a Gram {list(gram.shape)}; expected "
            f"{list(shape)} with {[shape[0], shape[0]]}"
        )
    # No entry of a Gram is larger than the largest on its diagonal.
    largest = np.max(np.diagonal(gram), initial=0)
    if not (np.isfinite(kernel).all() and np.isfinite(gram).all()):
        raise MergeError(f"{label}: NaN or infinity in the kernel or in its Gram")
    if (np.diagonal(gram) < 0).any() or np.abs(gram - gram.T).max(initial=0) > 1e-3 * largest:
        raise MergeError(f"{label}: its Gram is none: negative on the diagonal, or not symmetric")


# The methods


def zero_weights(weights: Sequence[float] | float, **_: object) -> str:
    """Returns the complaint about weights that sum to zero, for methods that divide by the sum."""
    weights = (weights,) if isinstance(weights, float) else weights
    return f"weights must not sum to zero: {[*weights]}" * bool(weights and not math.fsum(weights))


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


@method
def fisher(
    experts: Arrays,
    fishers: Arrays,
    weights: Annotated[Sequence[float], Interval(0, open_low=True), "One number an expert."] = (),
    floor: Floor = FISHER_FLOOR,
) -> jax.Array:
    """Averages the experts by their Fisher information: sum_i w_i F_i theta_i / sum_i w_i F_i.

    Matena & Raffel 2022, arXiv:2111.09832.
    """
    return fisher_average(experts, fishers, weights, floor)


@method
def gradient_matching(
    base: jax.Array,
    experts: Arrays,
    fishers: Arrays,
    base_fisher: jax.Array | None,
    prior: Prior = 1e-12,
    base_weight: BaseWeight = 1.0,
    scale: Annotated[float, Interval(0), "alpha: the factor of the task vectors."] = 1.0,
    weights: Annotated[Sequence[float], Interval(0, open_low=True), "One number an expert."] = (),
) -> jax.Array:
    """Adds the task vectors, each entry by how sure its expert is of it, next to the others.

    theta_base + alpha sum_i (H_0 + w_i F_i) / (H_0 + alpha sum_j w_j F_j) tau_i, H_0 = w_0 F_0 +
    delta: uncertainty-based gradient matching, Daheim et al. 2024, arXiv:2310.12808, whose w are
    the numbers of examples of the data that the F are of. F_0 is the base's, the first of the
    statistics if there is one more than experts, and otherwise 0. A large delta makes this task
    arithmetic; a small one without F_0, with alpha 1, `fisher`.
    """
    prior = jnp.maximum(prior, 1e-30)
    if base_fisher is not None:
        prior = prior + base_weight * base_fisher
    sure = scaled(weights, fishers)
    total = prior + scale * add(sure)
    shares = [(prior + each) / total for each in sure]
    taus = task_vectors(base, experts)
    return base + scale * add([share * tau for share, tau in zip(shares, taus, strict=True)])


@method
def regmean(
    name: str,
    experts: Iterable[np.ndarray],
    grams: Iterable[np.ndarray] | None,
    nondiagonal_scale: NondiagonalScale = NONDIAGONAL_SCALE,
) -> np.ndarray:
    """Fits kernels to all experts' outputs: (sum_i G_i)^-1 sum_i G_i W_i; averages all else.

    In least squares, Jin et al. 2023, arXiv:2212.09849.
    """
    if grams is None:
        return _mean(experts)
    pairs = zip(experts, grams, strict=True)
    return regression_mean(name, pairs, nondiagonal_scale)


def _mean(arrays: Iterable[np.ndarray]) -> np.ndarray:
    count, total = 0, np.float32(0)
    for array in arrays:
        count, total = count + 1, total + np.float32(array)
    return total / np.float32(count)


def whole_steps(steps: float, **_: object) -> str:
    """Returns the complaint about a number of steps that is none."""
    return "" if float(steps).is_integer() else f"steps must be a whole number, not {steps!r}"


@method(check=whole_steps)
def mats(
    name: str,
    base: np.ndarray,
    experts: Iterable[np.ndarray],
    grams: Iterable[np.ndarray] | None,
    steps: Steps = 100,
    initial_scale: Annotated[
        float, Interval(), "lambda of the task arithmetic that the steps start from."
    ] = 0.3,
    nondiagonal_scale: NondiagonalScale = 1.0,
) -> np.ndarray:
    """Moves kernels from task arithmetic to where they do as each expert on its own inputs.

    By conjugate gradients towards (sum_i G_i) W = sum_i G_i W_i, averages all else: MaTS, Tam et
    al. 2023, arXiv:2312.04339, with RegMean's objective. Where inputs are small few steps leave
    task arithmetic as it is; many make this `regmean`.
    """
    if grams is None:
        return _mean(experts)
    pairs = zip(experts, grams, strict=True)
    return matched_kernel(name, base, pairs, steps, initial_scale, nondiagonal_scale)
