"""Merge methods of whole matrices: singular values, least squares, the importance of columns.

They are computed on the host, one parameter at a time, in float32. A matrix comes with its outputs
as rows, as Hugging Face's models store a linear layer, so that a model merges alike in either
layout; what is no matrix (norms, biases) gets the mean of its task vectors where a method says
nothing of it, as in the authors' code. LAPACK's last bits differ between machines: elsewhere
`m2l verify` may find them different.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints import tensor_kinds
from m2l.merging.method_registry import Interval, Method, method
from m2l.merging.methods import Scale, Steps, Weights, whole_steps

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
    grams: Iterable[np.ndarray] | None = None,
) -> np.ndarray:
    """Merges a whole parameter by a method of matrices, or of Grams.

    Args:
        method: The method.
        name: The parameter's.
        base: The base's, float32; None for methods that do not take it.
        experts: Each reads an expert's, float32 of the same shape.
        has_output_rows: Whether a matrix has its outputs as rows; otherwise a method of matrices
            merges its transpose.
        hyper_parameters: The method's.
        grams: The experts', if there are any of the parameter.

    Returns:
        float32, of the same shape.
    """
    flipped, arguments = False, {"base": base, "name": name, "grams": grams}
    if method.of_matrices:
        arguments["matrix"] = (experts[0]() if base is None else base).ndim == 2
        flipped = arguments["matrix"] and not has_output_rows
        arguments["experts"] = _OnUse(experts, flipped)
        if flipped and base is not None:
            arguments["base"] = _turned(base)
    else:
        arguments["experts"] = (read() for read in experts)
    result = method.function(
        **{each: arguments[each] for each in method.inputs}, **hyper_parameters
    )
    return result.T if flipped else result


def matrix_bytes(method: Method, name: str, shape: Sequence[int]) -> int:
    """Returns the bytes that a method of this module and its caller hold for a matrix, at most."""
    shorter, longer = min(shape, default=0), max(shape, default=0)
    squares = 8 if method.name in ("knots_ties", "core_space") else 1
    squares *= len(shape) == 2 and not tensor_kinds.is_vocabulary(name)
    return 4 * (12 * math.prod(shape) + 4 * shorter**2 + squares * longer**2)


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
    steps: Steps = 300,
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
"""Of matrices so many rows at a time are in float64."""


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


@method
def widen(
    name: str,
    base: np.ndarray,
    experts: Matrices,
    matrix: bool,
    above_average: Annotated[
        float, Interval(0), "t: columns above t times the mean of their expert are important."
    ] = 1.0,
    calibration: Annotated[float, Interval(0), "s: the score of what is important."] = 1.0,
    scale: Scale = 1.0,
) -> np.ndarray:
    """Scores each column of a task matrix by the ranks of how far its length and direction moved.

    theta_base + lambda sum_i (a_i + b_i) / 2 tau_i, for each input; a_i and b_i are softmaxes over
    the experts of the column's rank, from 0 to 1, among its expert's by ||theta_i| - |theta_base||
    and by 1 - cos(theta_i, theta_base), and s where that is above t times the expert's mean. In
    embeddings a column is a token's; entries of what is no matrix are scored by |tau_i| in place of
    ranks. WIDEN, Yu et al. 2024, arXiv:2408.03092; with t = s = 1 as theirs.
    """
    scale = np.float32(scale)
    if not matrix:
        changes = np.stack([np.abs(np.float64(expert) - base) for expert in experts])
        own = tuple(range(1, changes.ndim))
        means = np.sum(changes, axis=own, keepdims=True) * (len(changes) / max(1, changes.size))
        scores = np.where(changes > above_average * means, calibration, _softmax_over(changes))
    else:
        axis = int(tensor_kinds.is_lookup(name))
        pairs = [_column_changes(base, expert - base, axis) for expert in experts]
        scores = np.float64(0)
        for changes in zip(*pairs, strict=True):
            ranks, count = _ranks(np.stack(changes)), max(1, len(changes[0]))
            # By whole numbers, of which one may be the mean.
            is_important = 2 * ranks > above_average * (count - 1)
            half = np.where(is_important, calibration, _softmax_over(ranks / count)) / 2
            scores = scores + np.expand_dims(half, 1 + axis)
    total = np.zeros_like(base)
    for expert, score in zip(experts, scores.astype(np.float32), strict=True):
        total += score * (expert - base)
    return base + scale * total


def _column_changes(base: np.ndarray, tau: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far columns moved in length and in direction, 1 - cos; float64 each.

    Args:
        base: float32 [rows, columns].
        tau: By how much they moved, likewise.
        axis: Along which a column lies: 0; of a transposed matrix 1.
    """
    parts = []
    for start in range(0, len(base), _ROWS):
        one, moved = (each[start : start + _ROWS].astype(np.float64) for each in (base, tau))
        pairs = ((one, one), (one, moved), (moved, moved))
        parts.append([np.einsum("ij,ij->" + "ji"[axis], *pair) for pair in pairs])
    parts = parts or [[np.zeros(base.shape[1 - axis])] * 3]
    joined = [np.concatenate(each) if axis else sum(each) for each in zip(*parts, strict=True)]
    squares, products, moved = joined
    length = np.sqrt(squares)
    other = np.sqrt(np.maximum(squares + 2 * products + moved, 0))
    both = length + other
    change = (2 * products + moved) / np.where(both > 0, both, 1)
    # |tau|^2 = (|theta| - |theta_base|)^2 + 2 |theta| |theta_base| (1 - cos): the cosine of columns
    # that hardly moved is 1 but for rounding.
    double = 2 * length * other
    turned = np.maximum(moved - change**2, 0) / np.where(double > 0, double, 1)
    return np.abs(change), np.where(double > 0, turned, moved > 0)


def _ranks(changes: np.ndarray) -> np.ndarray:
    """Returns each entry's rank in its row, from 0, the first of equal ones being the lower."""
    order = np.argsort(changes, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(changes.shape[1])[None], axis=1)
    return ranks


def _softmax_over(experts: np.ndarray) -> np.ndarray:
    """Returns the softmax over the first axis."""
    powers = np.exp(experts - np.max(experts, axis=0))
    return powers / np.sum(powers, axis=0)


@method(experts=Interval(2, 2))
def nuslerp_rows(experts: Matrices, matrix: bool, weights: Weights = ()) -> np.ndarray:
    """Follows the arc of two experts as `nuslerp`, row by row: the weights of each output.

    mergekit's NuSLERP with nuslerp_flatten: false.
    """
    return _arcs(experts[0], experts[1], weights, axis=-1)


@method(experts=Interval(2, 2))
def nuslerp_columns(experts: Matrices, matrix: bool, weights: Weights = ()) -> np.ndarray:
    """Follows the arc of two experts as `nuslerp`, column by column: the weights of each input.

    mergekit's NuSLERP with nuslerp_flatten: false and nuslerp_row_wise: true.
    """
    return _arcs(experts[0], experts[1], weights, axis=0)


@method(experts=Interval(2, 2))
def task_nuslerp_rows(
    base: np.ndarray, experts: Matrices, matrix: bool, scale: Scale = 1.0, weights: Weights = ()
) -> np.ndarray:
    """Follows the arcs of two task vectors' rows, and adds these to the base.

    As `nuslerp_rows`, of mergekit's NuSLERP with a base.
    """
    arcs = _arcs(experts[0] - base, experts[1] - base, weights, axis=-1)
    return base + np.float32(scale) * arcs


@method(experts=Interval(2, 2))
def task_nuslerp_columns(
    base: np.ndarray, experts: Matrices, matrix: bool, scale: Scale = 1.0, weights: Weights = ()
) -> np.ndarray:
    """Follows the arcs of two task vectors' columns, and adds these to the base.

    As `nuslerp_columns`, of mergekit's NuSLERP with a base.
    """
    arcs = _arcs(experts[0] - base, experts[1] - base, weights, axis=0)
    return base + np.float32(scale) * arcs


def _arcs(one: np.ndarray, other: np.ndarray, weights: Sequence[float], axis: int) -> np.ndarray:
    """Returns the points at w_2 / (w_1 + w_2) of the arcs of vectors along an axis, float32."""
    shape = one.shape
    one, other = np.atleast_1d(one), np.atleast_1d(other)
    first, second = weights
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)

    def dots(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.sum(np.multiply(left, right, dtype=np.float64), axis=axis, keepdims=True)

    lengths = np.sqrt(dots(one, one) * dots(other, other))
    cosines = np.clip(dots(one, other) / np.where(lengths > 0, lengths, 1), -1, 1)
    # There the arc is a line, or, of opposite vectors, any half of a circle.
    line = 1 - cosines**2 <= 1e-12
    angles = np.arccos(np.where(line, 0, cosines))
    left = np.where(line, 1 - t, np.sin((1 - t) * angles) / np.sin(angles))
    right = np.where(line, t, np.sin(t * angles) / np.sin(angles))
    return (left.astype(np.float32) * one + right.astype(np.float32) * other).reshape(shape)


MatrixDensity = Annotated[
    float,
    Interval(0, 1, open_low=True, hint="20 % is 0.2"),
    "Share of each matrix's coordinates in the basis that is kept.",
]


@method
def knots_ties(
    name: str,
    base: np.ndarray,
    experts: Matrices,
    matrix: bool,
    density: MatrixDensity = 1.0,
    scale: Scale = 1.0,
) -> np.ndarray:
    """Does as `ties` with the task matrices in a basis of outputs that they share.

    theta_base + lambda U c: U are the left singular vectors of the task matrices side by side, c is
    what TIES makes of the U^T tau_i, trimmed matrix by matrix. KnOTS, Stoica et al. 2025,
    arXiv:2410.19735, who trim over the model, and for language models not at all. Vocabularies, and
    what is no matrix, are merged in their own basis. Task arithmetic is the same in any basis.
    """
    taus = _Taus(base, experts)
    if not matrix or tensor_kinds.is_vocabulary(name):
        return base + np.float32(scale) * _ties(lambda: taus, density)
    basis = _shared_basis(taus)
    merged = _ties(lambda: (basis.T @ tau for tau in taus), density)
    return base + np.float32(scale) * (basis @ merged)


@method
def core_space(
    name: str,
    base: np.ndarray,
    experts: Matrices,
    matrix: bool,
    density: MatrixDensity = 1.0,
    scale: Scale = 1.0,
) -> np.ndarray:
    """Does as `ties` with the task matrices in bases of outputs and of inputs that they share.

    theta_base + lambda U c V^T: U as in `knots_ties`, V likewise of the task matrices one upon
    another, c is what TIES makes of the U^T tau_i V. Panariello et al. 2025, arXiv:2509.17786, who
    take bases of the adapters' factors, not of their products: the same spaces, turned. `tsv_m` and
    `iso_c` are the same in any basis, and so as they are in the core space. Vocabularies as there.
    """
    taus = _Taus(base, experts)
    if not matrix or tensor_kinds.is_vocabulary(name):
        return base + np.float32(scale) * _ties(lambda: taus, density)
    left, right = _shared_basis(taus), _shared_basis(_Taus(base, experts, turned=True))
    merged = _ties(lambda: (left.T @ tau @ right for tau in taus), density)
    return base + np.float32(scale) * (left @ merged @ right.T)


class _Taus(Iterable[np.ndarray]):
    """Task matrices, or their transposes, of which each is computed when it is its turn."""

    def __init__(self, base: np.ndarray, experts: Matrices, turned: bool = False):
        self._base, self._experts, self._turned = base, experts, turned

    def __iter__(self) -> Iterator[np.ndarray]:
        for expert in self._experts:
            tau = expert - self._base
            yield tau.T if self._turned else tau

    def expert_norms(self) -> Iterator[float]:
        """Yields the Frobenius norms of the experts."""
        return (math.sqrt(_squared_norm(expert)) for expert in self._experts)


def _shared_basis(taus: _Taus) -> np.ndarray:
    """Returns the left singular vectors of matrices side by side, orthonormal float32 [rows, r].

    They are the eigenvectors of sum_i tau_i tau_i^T, in float64, but for those in which there is no
    more than the experts' rounding to float32. Where a random subspace of an eighth of the rows has
    all of the matrices but for that, as it does of adapters, they are looked for in it (Halko et
    al. 2011, doi:10.1137/090771806).
    """
    roundings = [norm * 2**-24 for norm in taus.expert_norms()]
    subspace = _subspace(taus, roundings)
    total: np.ndarray | float = 0.0
    for tau in taus:
        part = tau.astype(np.float64) if subspace is None else subspace.T @ tau
        total += part @ part.T
    squares, vectors = np.linalg.eigh(total)
    vectors = vectors[:, squares > np.sum(np.square(roundings))][:, ::-1]
    vectors = vectors if subspace is None else subspace @ vectors
    return np.ascontiguousarray(vectors, np.float32)


def _subspace(taus: _Taus, roundings: Sequence[float]) -> np.ndarray | None:
    """Returns orthonormal columns, float64 [rows, rows / 8], that span all matrices; or None.

    Args:
        taus: The matrices.
        roundings: Of each the Frobenius norm of what may be missed.
    """
    rng, sketch = np.random.default_rng(0), None
    for tau in taus:
        draws = rng.standard_normal((tau.shape[1], len(tau) // 8), np.float32)
        sketch = tau @ draws if sketch is None else sketch + tau @ draws
    columns = np.linalg.qr(sketch.astype(np.float64))[0]
    for tau, rounding in zip(taus, roundings, strict=True):
        if _squared_norm(tau) - _squared_norm(columns.T @ tau) > rounding**2:
            return None
    return columns


def _squared_norm(matrix: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))


def _ties(parts: Callable[[], Iterable[np.ndarray]], density: float) -> np.ndarray:
    """Returns TIES's mean of arrays, each trimmed by itself; they are asked for twice."""
    thresholds, mass = [], np.float32(0)
    for part in parts():
        count = int(part.size * density)
        threshold = np.float32(np.inf)
        if count:
            magnitudes = np.abs(part).ravel()
            threshold = np.partition(magnitudes, part.size - count)[part.size - count]
        thresholds.append(threshold)
        mass = mass + np.where(np.abs(part) >= threshold, part, 0)
    total, count = np.zeros_like(mass), np.zeros_like(mass)
    for part, threshold in zip(parts(), thresholds, strict=True):
        agrees = (np.abs(part) >= threshold) & (part * mass > 0)
        total += np.where(agrees, part, 0)
        count += agrees
    return total / np.maximum(count, 1)
