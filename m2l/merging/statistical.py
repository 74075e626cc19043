"""Merge methods that need statistics of data: Fisher information, or Grams of kernels' inputs.

`m2l statistics` gathers them. Fisher information weighs entries, in blocks of any shape; Grams give
least squares of whole kernels, on the host, one parameter at a time.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from m2l.errors import MergeError
from m2l.merging.method_registry import Interval, method
from m2l.merging.methods import Arrays, Steps, add, scaled, task_vectors, whole_steps

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
NondiagonalScale = Annotated[
    float,
    Interval(0, 1),
    "Factor of the entries of Gram matrices off their diagonals.",
]
PositiveWeights = Annotated[
    Sequence[float],
    Interval(0, open_low=True),
    "One number an expert.",
]

# The least eigenvalue of a correlation matrix that float32 Grams can tell from 0.
_RESOLVED = 1e-5


@method
def fisher(
    experts: Arrays, fishers: Arrays, weights: PositiveWeights = (), floor: Floor = 1e-6
) -> jax.Array:
    """Averages the experts by their Fisher information: sum_i w_i F_i theta_i / sum_i w_i F_i.

    Matena & Raffel 2022, arXiv:2111.09832.
    """
    # Equation 6. The authors' code has the same floor, but for the first model alone, the one whose
    # task matters to them, which thereby keeps what no model is sure of; and it divides each weight
    # by the L2 norm of the model's whole Fisher, which here is for the caller to do. Where all F
    # are 0, and so is the floor, the result is the mean by weights.
    certainties = scaled(weights, [jnp.maximum(each, floor) for each in fishers])
    total = add(certainties)
    # Shares first: products of a parameter with an information of 1e-40 would lose their digits.
    unsure, mean = total == 0, add([*weights])
    total = jnp.where(unsure, 1, total)
    shares = [
        jnp.where(unsure, weight / mean, certainty / total)
        for weight, certainty in zip(weights, certainties, strict=True)
    ]
    return add(scaled(shares, experts))


@method
def gradient_matching(
    base: jax.Array,
    experts: Arrays,
    fishers: Arrays,
    base_fisher: jax.Array | None,
    prior: Prior = 1e-12,
    base_weight: BaseWeight = 1.0,
    scale: Annotated[float, Interval(0), "alpha: the factor of the task vectors."] = 1.0,
    weights: PositiveWeights = (),
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
    return base + scale * add(scaled(shares, task_vectors(base, experts)))


@method
def regmean(
    name: str,
    experts: Iterable[np.ndarray],
    grams: Iterable[np.ndarray] | None,
    nondiagonal_scale: NondiagonalScale = 0.9,
) -> np.ndarray:
    """Fits kernels to all experts' outputs: (sum_i G_i)^-1 sum_i G_i W_i; averages all else.

    In least squares, Jin et al. 2023, arXiv:2212.09849.
    """
    if grams is None:
        return _mean(experts)
    import scipy.linalg  # Which takes as long to import as all else that merging needs.

    # Equation 2 and section 3.3. Entries of G_i = X_i^T X_i off the diagonal count alpha: below 1
    # that takes the solution nearer to an average, and makes sum_i G_i regular. Where it leaves W
    # free, for an input that is always 0 or, with alpha 1, a direction in which no expert has
    # inputs, the solution nearest to the mean of the W_i is meant. So the difference from the mean
    # is solved for, each input in units of its size: what is to be free is then 0, and the
    # eigenvalues of a correlation matrix are at least 1 - alpha.
    _, shape, grams, products, mean = _regression(name, experts, grams, nondiagonal_scale)
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
    import scipy.sparse.linalg

    # One step length for all columns; it stops, as the authors' code, where the residual is 1e-5 of
    # the right side. What G leaves free stays as it is in task arithmetic, and the directions in
    # which the inputs are largest move first.
    count, shape, grams, products, initial = _regression(name, experts, grams, nondiagonal_scale)
    initial *= count * initial_scale
    initial += (1 - count * initial_scale) * np.float64(base).reshape(initial.shape)

    def forward(kernel: np.ndarray) -> np.ndarray:
        return (grams @ kernel.reshape(products.shape)).ravel()

    operator = scipy.sparse.linalg.LinearOperator((products.size,) * 2, forward)
    solution = initial.ravel()
    if steps and products.size:
        solution, _ = scipy.sparse.linalg.cg(
            operator, products.ravel(), solution, rtol=1e-5, atol=0.0, maxiter=int(steps)
        )
    return solution.reshape(shape).astype(np.float32)


def _mean(arrays: Iterable[np.ndarray]) -> np.ndarray:
    count, total = 0, np.float32(0)
    for array in arrays:
        count, total = count + 1, total + np.float32(array)
    return total / np.float32(count)


def _regression(
    name: str,
    experts: Iterable[np.ndarray],
    grams: Iterable[np.ndarray],
    nondiagonal_scale: float,
) -> tuple[int, tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Adds up what least squares need of the experts, one in memory at a time.

    Args:
        name: The kernel's, for messages.
        experts: The kernels [d_in, ...], of any float dtypes.
        grams: Their Gram matrices [d_in, d_in], likewise.
        nondiagonal_scale: alpha, the factor of the entries of a Gram that are not on its diagonal.

    Returns:
        The number of experts, the shape of a kernel, and float64 sum_i G_i [d_in, d_in], sum_i G_i
        W_i and the mean of the W_i [d_in, d_out].

    Raises:
        MergeError: A Gram is not of the kernel's inputs, or is no Gram: negative on its diagonal,
            or not symmetric; or an entry is not finite.
    """
    count, total, kernels, products = 0, 0.0, 0.0, 0.0
    shape: tuple[int, ...] = ()
    for kernel, gram in zip(experts, grams, strict=True):
        shape = shape or kernel.shape
        _check_regression(f"{name} of expert {count}", shape, kernel, gram)
        kernel = np.array(kernel, np.float64).reshape(shape[0], math.prod(shape[1:]))
        scaled_gram = np.array(gram, np.float64)
        diagonal = np.diagonal(scaled_gram).copy()
        scaled_gram *= nondiagonal_scale
        np.fill_diagonal(scaled_gram, diagonal)
        count += 1
        products += scaled_gram @ kernel
        total += scaled_gram
        kernels += kernel
        del kernel, gram, scaled_gram
    kernels /= count
    return count, shape, total, products, kernels


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


def gram_bytes(kernel: Sequence[int], inputs: int, has_base: bool) -> int:
    """Returns the bytes that merging a kernel by Grams takes with its caller, at most.

    Args:
        kernel: Its shape.
        inputs: d_in, the length of its Gram's sides.
        has_base: Whether by `mats`, and not by `regmean`.
    """
    return 8 * (3 * inputs**2 + (9 if has_base else 5) * math.prod(kernel))
