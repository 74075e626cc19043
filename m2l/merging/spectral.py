"""Merge methods of whole matrices: singular values, least squares, the importance of rows.

They are computed on the host, one parameter at a time, in float32. A matrix comes with its outputs
as rows, as Hugging Face's models store a linear layer, so that a model merges alike in either
layout; what is no matrix (norms, biases) gets the mean of its task vectors where a method says
nothing of it, as in the authors' code. LAPACK's last bits differ between machines: elsewhere
`m2l verify` may find them different.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints import tensor_kinds
from m2l.merging.method_registry import Interval, Method, method
from m2l.merging.methods import Scale, whole_steps

Matrices = Sequence[np.ndarray]


class _Svd(NamedTuple):
    """U [rows, r], S [r] and V^T [r, columns] of U diag(S) V^T."""

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray


def _svd(matrix: np.ndarray, rank: int | None = None, size: float | None = None) -> _Svd:
    """Decomposes a matrix, without directions that are rounding: of those the vectors are chance.

    Args:
        matrix: float32 [rows, columns].
        rank: The most directions, the largest; None: all.
        size: The norm of what the matrix is a difference of, and so was rounded at; None: its own.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    size = np.max(values, initial=0) if size is None else size
    noise = size * max(matrix.shape) * np.finfo(np.float32).eps
    count = int(np.count_nonzero(values > noise))
    count = count if rank is None else min(count, rank)
    # Copies: views would keep all directions of every expert in memory.
    return _Svd(left[:, :count].copy(), values[:count], right[:count].copy())


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """Returns the matrix with orthonormal columns that is nearest: the polar factor."""
    nearest = _svd(columns)
    return nearest.left @ nearest.right


def _joined(parts: Sequence[_Svd]) -> _Svd:
    """Puts the directions of several matrices together, made orthonormal on either side."""
    left = _orthonormal(np.concatenate([part.left for part in parts], axis=1))
    right = _orthonormal(np.concatenate([part.right for part in parts], axis=0).T)
    return _Svd(left, np.concatenate([part.values for part in parts]), right.T)


def _mean(base: np.ndarray, experts: Matrices) -> np.ndarray:
    """Returns the mean of the task vectors."""
    return functools.reduce(np.add, (e - base for e in experts)) / np.float32(len(experts))


def _turned(matrix: np.ndarray) -> np.ndarray:
    """Returns the transpose, in memory as such a matrix is: products of views have other bits."""
    return np.ascontiguousarray(matrix.T)


class _OnUse(Sequence[np.ndarray]):
    """Arrays that are read when they are asked for, so that one at a time is in memory."""

    def __init__(self, reads: Sequence[Callable[[], np.ndarray]], flipped: bool):
        self._reads, self._flipped = reads, flipped

    def __len__(self) -> int:
        return len(self._reads)

    def __getitem__(self, index: int) -> np.ndarray:
        array = self._reads[index]()
        return _turned(array) if self._flipped else array


def merged(
    method: Method,
    name: str,
    base: np.ndarray | None,
    experts: Sequence[Callable[[], np.ndarray]],
    has_output_rows: bool,
    hyper_parameters: Mapping[str, np.ndarray | np.floating],
) -> np.ndarray:
    """Merges a whole parameter by a method of matrices.

    Args:
        method: The method.
        name: The parameter's.
        base: The base's, float32; None for methods that do not take it.
        experts: Each reads an expert's, float32 of the same shape.
        has_output_rows: Whether a matrix has its outputs as rows; otherwise its transpose is
            merged.
        hyper_parameters: The method's.

    Returns:
        float32, of the same shape.
    """
    first = experts[0]() if base is None else base
    is_matrix = first.ndim == 2
    flipped = is_matrix and not has_output_rows
    arguments = {
        "base": _turned(base) if flipped and base is not None else base,
        "experts": _OnUse(experts, flipped),
        "matrix": is_matrix,
        "name": name,
    }
    result = method.function(
        **{each: arguments[each] for each in method.inputs}, **hyper_parameters
    )
    return result.T if flipped else result


def matrix_bytes(name: str, shape: Sequence[int]) -> int:
    """Returns the bytes that a method of this module and its caller hold for a matrix, at most."""
    shorter, longer = min(shape, default=0), max(shape, default=0)
    gram = longer**2 * (len(shape) == 2 and not tensor_kinds.is_vocabulary(name))
    return 4 * (12 * math.prod(shape) + 4 * shorter**2 + gram)


@method
def tsv_m(base: np.ndarray, experts: Matrices, matrix: bool, scale: Scale = 1.0) -> np.ndarray:
    """Keeps each task matrix's largest singular directions, makes them orthonormal, adds them.

    theta_base + lambda U diag(S) V^T: of n experts each has 1 / n of the rank, and U and V are the
    nearest orthonormal matrices to the experts' vectors side by side. Gargiulo et al. 2025,
    arXiv:2412.00081.
    """
    scale = np.float32(scale)
    if not matrix:
        return base + scale * _mean(base, experts)
    rank = max(1, min(base.shape) // len(experts))
    together = _joined([_svd(expert - base, rank) for expert in experts])
    return base + (scale * together.values * together.left) @ together.right


@method
def iso_c(base: np.ndarray, experts: Matrices, matrix: bool, scale: Scale = 1.0) -> np.ndarray:
    """Adds the sum of the task vectors with all its singular values made equal to their mean.

    theta_base + lambda mean(S) U V^T, U S V^T being the sum. Marczak et al. 2025, arXiv:2502.04959.
    """
    scale = np.float32(scale)
    if not matrix:
        return base + scale * _mean(base, experts)
    total = _svd(functools.reduce(np.add, (expert - base for expert in experts)))
    return base + scale * _mean_value(total) * (total.left @ total.right)


@method
def iso_cts(
    base: np.ndarray,
    experts: Matrices,
    matrix: bool,
    common: Annotated[
        float, Interval(0, 1), "Share of the directions that is of all experts."
    ] = 0.8,
    scale: Scale = 1.0,
) -> np.ndarray:
    """Adds, equally strong, the common directions of the sum and each expert's own beside them.

    The largest directions of the sum of the task vectors, and, in equal parts, the largest of what
    each task vector has outside of these outputs; made orthonormal, with the mean of their singular
    values. Marczak et al. 2025, arXiv:2502.04959; the share is theirs.
    """
    scale = np.float32(scale)
    if not matrix:
        return base + scale * _mean(base, experts)
    full, n = min(base.shape), len(experts)
    own = min(round((full - int(full * common)) / n), full // n)
    shared = _svd(functools.reduce(np.add, (e - base for e in experts)), full - n * own)
    outside = (_outside(expert - base, shared.left, own) for expert in experts if own)
    together = _joined([*outside, shared])
    return base + scale * _mean_value(together) * (together.left @ together.right)


def _outside(tau: np.ndarray, outputs: np.ndarray, rank: int) -> _Svd:
    """Decomposes what is left of a matrix without a subspace of its outputs, [rows, r]."""
    return _svd(tau - outputs @ (outputs.T @ tau), rank, float(np.linalg.norm(tau)))


def _mean_value(matrix: _Svd) -> np.float32:
    return np.float32(matrix.values.mean()) if matrix.values.size else np.float32(0)


@method(check=whole_steps)
def wudi(
    name: str,
    base: np.ndarray,
    experts: Matrices,
    matrix: bool,
    steps: Annotated[float, Interval(0, 100_000), "Steps of Adam, a whole number."] = 300,
    step_size: Annotated[float, Interval(0, open_low=True), "Learning rate of Adam."] = 1e-5,
    scale: Scale = 1.0,
) -> np.ndarray:
    """Moves the sum of the task vectors to where it disturbs each expert least on its own inputs.

    theta_base + lambda tau, tau by steps of Adam from sum_i tau_i down
    sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2: the rows of tau_i span what the layer saw in
    training. Embeddings and heads, which are no hidden layers, get the mean. Cheng et al. 2025,
    arXiv:2503.08099.
    """
    scale = np.float32(scale)
    if not matrix or tensor_kinds.is_vocabulary(name):
        return base + scale * _mean(base, experts)
    total, products = np.zeros_like(base), np.zeros_like(base)
    gram = np.zeros((base.shape[1], base.shape[1]), np.float32)
    for expert in experts:
        tau = expert - base
        total += tau
        if squared := float(np.sum(np.square(tau, dtype=np.float64))):
            own = (tau.T @ tau) / np.float32(squared)
            gram += own
            products += tau @ own
    return base + scale * np.asarray(_descended(total, gram, products, steps, step_size))


@jax.jit
def _descended(
    tau: jax.Array, gram: jax.Array, products: jax.Array, steps: float, step_size: float
) -> jax.Array:
    """Minimizes the quadratic whose gradient is tau gram - products, times a constant."""
    import optax  # Which other merges do without.

    adam = optax.adam(step_size)

    def step(_: int, carry: tuple) -> tuple:
        tau, state = carry
        gradient = 2 * (jnp.dot(tau, gram, precision="highest") - products)
        updates, state = adam.update(gradient, state)
        return tau + updates, state

    count = jnp.asarray(steps).astype(jnp.int32)
    return jax.lax.fori_loop(0, count, step, (tau, adam.init(tau)))[0]


@method(experts=Interval(1, 1))
def arcee_fusion(base: np.ndarray, experts: Matrices, matrix: bool) -> np.ndarray:
    """Takes the entries of the expert that are far more important than most, and the base's else.

    Important is what differs, in a row whose softmax differs: |tau| KL(softmax theta, softmax
    theta_base), from the parameter's median and 1.5 times its interquartile range on; the quartiles
    are exact, of all entries. mergekit's method of this name, whose quartiles are of a sample where
    a parameter has more than a million.
    """
    if not base.size:
        return base
    expert, shape = np.atleast_1d(experts[0]), base.shape
    base = np.atleast_1d(base)
    tau = expert - base
    importance = np.abs(tau) * _divergences(expert, base)
    places = [int(share * (importance.size - 1)) for share in (0.25, 0.5, 0.75)]
    low, median, high = np.partition(importance, places, axis=None)[places]
    threshold = median + np.float32(1.5) * (high - low)
    return (base + np.where(importance >= threshold, tau, 0)).reshape(shape)


_ROWS = 1024


def _divergences(theta: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Returns KL(softmax theta, softmax base) of each row, float32 [..., 1]."""
    rows = [each.reshape(-1, each.shape[-1]) for each in (theta, base)]
    parts = []
    for start in range(0, len(rows[0]), _ROWS):
        # Rows are much alike: their difference would be rounding in float32.
        p, q = (_softmax(each[start : start + _ROWS].astype(np.float64)) for each in rows)
        parts.append(np.sum(p * np.log(p / q), axis=-1, keepdims=True))
    return np.concatenate(parts).reshape(*theta.shape[:-1], 1).astype(np.float32)


def _softmax(rows: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis, and mergekit's 1e-8 more."""
    powers = np.exp(rows - np.max(rows, axis=-1, keepdims=True, initial=-np.inf))
    return powers / np.sum(powers, axis=-1, keepdims=True) + 1e-8
