"""The cross-entropy that training minimises, chunk by chunk, with its gradient."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Sums = tuple[jax.Array, jax.Array]
Part = tuple[jax.Array, jax.Array, jax.Array]
"""Hidden states, targets and weights."""

Residuals = tuple[jax.Array, ...]

SUMS = ("loss", "correct", "weight")


class LossOptions(NamedTuple):
    """The options of `cross_entropy`, static in what is compiled."""

    softcap: float
    chunk: int
    tied: bool
    z_loss: float
    smoothing: float


def cross_entropy(
    hidden_BxTxD: jax.Array,
    kernel_DxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    *,
    softcap: float = 0.0,
    chunk: int = 0,
    tied: bool = False,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> dict[str, jax.Array]:
    """Sums the cross-entropy of tokens, in nats, and counts what to divide it by.

    The logits are hidden @ kernel, in float32. Their gradient is computed along with the loss,
    chunk by chunk: only the logits of one chunk are in memory, and none are computed twice. The
    targets that count are moved to the front of their rows first, and chunks without any skipped.

    Args:
        hidden_BxTxD: of the dtype to multiply in.
        kernel_DxV: of any float dtype.
        targets_BxT: int32 token ids.
        weights_BxT: 1 where a target counts, 0 at padding.
        softcap: c of c tanh(logits / c); 0: none.
        chunk: positions of a row whose logits are computed at a time; 0: `default_chunk`.
        tied: whether the kernel is a transposed table [V, D]; its gradient then has that layout.
        z_loss: z of z log(Z)^2, which is added for each target, Z being its softmax's normaliser.
        smoothing: s of targets that have 1 - s on the right token and s / (V - 1) on each other
            one; the loss is less their entropy, so that its least value is 0, as in T5X.

    Returns:
        Three float32 scalars: `loss` (sum), `correct` (targets whose logit is the largest) and
        `weight` (targets that count). Sums, so that parts of a batch can be added before the one
        division.
    """
    chunk = min(chunk or default_chunk(*targets_BxT.shape), targets_BxT.shape[1])
    weights_BxT = weights_BxT.astype(jnp.float32)
    kernel = kernel_DxV.T if tied else kernel_DxV
    options = LossOptions(softcap, chunk, tied, z_loss, smoothing)
    loss, correct = _sums(hidden_BxTxD, kernel, targets_BxT, weights_BxT, options)
    return {"loss": loss, "correct": correct, "weight": jnp.sum(weights_BxT)}


def default_chunk(rows: int, length: int) -> int:
    """Returns an eighth of the positions of a row, or those that 128 positions of a batch need."""
    return min(length, max(-(-length // 8), -(-128 // rows)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    options: LossOptions,
) -> Sums:
    kernel_DxV = (kernel.T if options.tied else kernel).astype(hidden.dtype)
    parts, count, _ = _chunks(hidden, targets, weights, options.chunk)

    def add(number: jax.Array, sums: Sums) -> Sums:
        part_sums, _, _ = _logits(*_part(parts, number), kernel_DxV, options)
        return jax.tree.map(jnp.add, sums, part_sums)

    return jax.lax.fori_loop(0, count, add, (jnp.float32(0), jnp.float32(0)))


def _chunks(
    hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[Part, int | jax.Array, jax.Array | None]:
    """Moves the targets that count to the front of their rows, and splits these into chunks.

    Returns:
        The chunks, the new first axis, of which every device has its rows; how many of them have
        targets that count; and of each place in a row the position that moved there, None where
        there is one chunk and nothing moved.
    """
    length = weights.shape[1]
    chunks = -(-length // chunk)
    if chunks == 1:
        whole = tuple(jnp.asarray(x)[None] for x in (hidden, targets, weights))
        return whole, 1, None
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def cut(x: jax.Array) -> jax.Array:
        index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
        moved = jnp.take_along_axis(x, index, axis=1)
        padding = [(0, 0), (0, chunks * chunk - length), *[(0, 0)] * (x.ndim - 2)]
        padded = jnp.pad(moved, padding).reshape(x.shape[0], chunks, chunk, *x.shape[2:])
        return jnp.moveaxis(padded, 1, 0)

    counting = jnp.max(jnp.sum(weights != 0, axis=1))
    return (cut(hidden), cut(targets), cut(weights)), -(-counting // chunk), order


def _part(parts: Part, number: int | jax.Array) -> Part:
    return jax.tree.map(lambda part: part[number], parts)


def _logits(
    hidden_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    kernel_DxV: jax.Array,
    options: LossOptions,
) -> tuple[Sums, jax.Array, jax.Array]:
    """Computes the sums, the logits [B * T, V] and their log-normalisers [B * T, 1]."""
    # In two dimensions: XLA's CPU backend copies the gradient, transposed, for more of them.
    rows = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
    logits = jnp.matmul(rows, kernel_DxV, preferred_element_type=jnp.float32)
    if options.softcap:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    targets, weights = targets_BxT.reshape(-1), weights_BxT.reshape(-1)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    each = log_normalizer - target_logits
    if options.smoothing:
        right, other = _smoothed(options.smoothing, logits.shape[-1])
        logit_sums = jnp.sum(logits, axis=-1, keepdims=True)
        entropy = -right * math.log(right) - options.smoothing * math.log(other)
        each = log_normalizer - (right - other) * target_logits - other * logit_sums - entropy
    if options.z_loss:
        each = each + options.z_loss * jnp.square(log_normalizer)
    loss = jnp.sum(each[:, 0] * weights)
    # Where several are the largest, each is correct: an argmax would be one more pass over all.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    correct = jnp.sum((target_logits == largest)[:, 0] * weights)
    return (loss, correct), logits, log_normalizer


def _smoothed(smoothing: float, vocabulary: int) -> tuple[float, float]:
    """Returns the probability of the right token in a smoothed target, and of each other one."""
    return 1.0 - smoothing, smoothing / (vocabulary - 1)


def _forward(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    options: LossOptions,
) -> tuple[Sums, Residuals]:
    kernel_DxV = (kernel.T if options.tied else kernel).astype(hidden.dtype)
    parts, count, order = _chunks(hidden, targets, weights, options.chunk)

    def add(
        number: int | jax.Array, carry: tuple[Sums, jax.Array, jax.Array]
    ) -> tuple[Sums, jax.Array, jax.Array]:
        sums, kernel_gradient, hidden_gradients = carry
        hidden_BxTxD, targets_BxT, weights_BxT = part = _part(parts, number)
        part_sums, logits, log_normalizer = _logits(*part, kernel_DxV, options)
        right = jnp.arange(logits.shape[-1]) == targets_BxT.reshape(-1, 1)
        if options.smoothing:
            right = jnp.where(right, *_smoothed(options.smoothing, logits.shape[-1]))
        probabilities = jnp.exp(logits - log_normalizer)
        if options.z_loss:
            probabilities = probabilities * (1 + 2 * options.z_loss * log_normalizer)
        gradient = (probabilities - right) * weights_BxT.reshape(-1, 1)
        if options.softcap:
            gradient = gradient * (1 - jnp.square(logits / options.softcap))
        gradient = gradient.astype(hidden_BxTxD.dtype)
        rows = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
        product = (gradient.T, rows) if options.tied else (rows.T, gradient)
        kernel_gradient += jnp.matmul(*product, preferred_element_type=jnp.float32)
        hidden_gradient = jnp.matmul(gradient, kernel_DxV.T, preferred_element_type=jnp.float32)
        hidden_gradients = hidden_gradients.at[number].set(
            hidden_gradient.astype(hidden.dtype).reshape(hidden_BxTxD.shape)
        )
        return jax.tree.map(jnp.add, sums, part_sums), kernel_gradient, hidden_gradients

    zeros = jnp.float32(0), jnp.float32(0)
    carry = zeros, jnp.zeros(kernel.shape, jnp.float32), jnp.zeros_like(parts[0])
    if order is None:  # a loop of one would keep a copy of the sums
        sums, kernel_gradient, (hidden_gradient,) = add(0, carry)
    else:
        sums, kernel_gradient, gradients = jax.lax.fori_loop(0, count, add, carry)
        moved = jnp.moveaxis(gradients, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
        places = jnp.argsort(order, axis=1)[..., None]
        hidden_gradient = jnp.take_along_axis(moved, places, axis=1)
    return sums, (hidden_gradient, kernel_gradient, targets, weights, jnp.zeros((), kernel.dtype))


def _backward(
    options: LossOptions, residuals: Residuals, cotangents: Sums
) -> tuple[jax.Array | np.ndarray, ...]:
    hidden_gradient, kernel_gradient, targets, weights, like_kernel = residuals
    scale, _ = cotangents
    return (
        hidden_gradient * scale.astype(hidden_gradient.dtype),
        (kernel_gradient * scale).astype(like_kernel.dtype),
        np.zeros(targets.shape, jax.dtypes.float0),
        jnp.zeros_like(weights),
    )


_sums.defvjp(_forward, _backward)
