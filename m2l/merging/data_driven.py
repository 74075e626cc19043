"""The merges by statistics of data: averaging by Fisher information, and RegMean.

`m2l statistics` gathers the statistics of each expert. Both functions work on one parameter at a
time, as models are streamed.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2l.errors import MergeError

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

    sum_i w_i F_i theta_i / sum_i w_i F_i, no F_i counting as less than `floor`; so where all lie
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


def regmean(
    name: str,
    experts: Iterable[tuple[np.ndarray, np.ndarray]],
    nondiagonal_scale: float = NONDIAGONAL_SCALE,
) -> np.ndarray:
    """The kernel whose outputs are nearest to each expert's on the expert's own inputs.

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
    if not 0 <= nondiagonal_scale <= 1:
        raise MergeError(f"nondiagonal_scale must be in [0, 1], not {nondiagonal_scale!r}")
    import scipy.linalg  # Which takes as long to import as all else that merging needs.

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
    mean = kernels
    mean /= count
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


def regmean_bytes(kernel: Sequence[int], inputs: int) -> int:
    """The most that `regmean` and its caller hold for a kernel, whatever the number of experts.

    Args:
        kernel: Its shape.
        inputs: d_in, the length of its Gram's sides.
    """
    return 8 * (3 * inputs**2 + 5 * math.prod(kernel))


def _check_regression(
    where: str, shape: tuple[int, ...], kernel: np.ndarray, gram: np.ndarray
) -> None:
    if kernel.shape != shape or gram.shape != (shape[0], shape[0]):
        raise MergeError(
            f"{where}: a kernel {list(kernel.shape)} with a Gram {list(gram.shape)}; expected "
            f"{list(shape)} with {[shape[0], shape[0]]}"
        )
    # No entry of a Gram is larger than the largest on its diagonal.
    largest = np.max(np.diagonal(gram), initial=0)
    if not (np.isfinite(kernel).all() and np.isfinite(gram).all()):
        raise MergeError(f"{where}: NaN or infinity in the kernel or in its Gram")
    if (np.diagonal(gram) < 0).any() or np.abs(gram - gram.T).max(initial=0) > 1e-3 * largest:
        raise MergeError(f"{where}: its Gram is none: negative on the diagonal, or not symmetric")
