"""What training minimises."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Sums = tuple[jax.Array, jax.Array]

SUMS = ("loss", "correct", "weight")


class How(NamedTuple):
    """How a cross-entropy is computed; see `cross_entropy`."""

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
    """The summed token cross-entropy, in nats, and what it is to be divided by.

    The logits are hidden @ kernel, in float32. Their gradient is made along with the loss, chunk by
    chunk, so that the logits of one chunk are all that is ever held, and none are computed twice.

    Args:
        hidden_BxTxD: of the dtype to multiply in.
        kernel_DxV: of any float dtype.
        targets_BxT: int32 token ids.
        weights_BxT: 1 where a target counts, 0 at padding.
        softcap: c of c tanh(logits / c); 0: none.
        chunk: positions of a row whose logits are made at a time; 0: all. Where it does not divide
            T, the largest number below that does.
        tied: whether the kernel is a transposed table [V, D], whose gradient is then made as that.
        z_loss: z of z log(Z)^2, which is added for each target, Z being its softmax's normaliser.
        smoothing: s of targets that have 1 - s on the right token and s / (V - 1) on each other
            one; the loss is less their entropy, so that its least value is 0, as in T5X.

    Returns:
        Three float32 scalars: `loss` (sum), `correct` (targets whose logit is the largest) and
        `weight` (targets that count). Sums, so that parts of a batch can be added before the one
        division.
    """
    length = targets_BxT.shape[1]
    chunk = min(chunk or length, length)
    while length % chunk:
        chunk -= 1
    weights_BxT = weights_BxT.astype(jnp.float32)
    kernel = kernel_DxV.T if tied else kernel_DxV
    how = How(softcap, chunk, tied, z_loss, smoothing)
    loss, correct = _sums(hidden_BxTxD, kernel, targets_BxT, weights_BxT, how)
    return {"loss": loss, "correct": correct, "weight": jnp.sum(weights_BxT)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, how: How
) -> Sums:
    def add(sums: Sums, part: Any) -> tuple[Sums, None]:
        of_part, _, _ = _logits(*part, kernel.T if how.tied else kernel, how)
        return jax.tree.map(jnp.add, sums, of_part), None

    zeros = jnp.float32(0), jnp.float32(0)
    return jax.lax.scan(add, zeros, _chunks(hidden, targets, weights, how.chunk))[0]


def _chunks(
    hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, ...]:
    """Positions cut into chunks, which come first; every device keeps its rows of each."""

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return cut(hidden), cut(targets), cut(weights)


def _logits(
    hidden_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    kernel_DxV: jax.Array,
    how: How,
) -> tuple[Sums, jax.Array, jax.Array]:
    """The sums, the logits [B * T, V] and their log-normalisers [B * T, 1]."""
    # In two dimensions: XLA's CPU backend copies the gradient, transposed, for more of them.
    rows = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
    logits = jnp.matmul(rows, kernel_DxV.astype(rows.dtype), preferred_element_type=jnp.float32)
    if how.softcap:
        logits = how.softcap * jnp.tanh(logits / how.softcap)
    targets, weights = targets_BxT.reshape(-1), weights_BxT.reshape(-1)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    each = log_normalizer - of_target
    if how.smoothing:
        right, other = _smoothed(how.smoothing, logits.shape[-1])
        of_all = jnp.sum(logits, axis=-1, keepdims=True)
        entropy = -right * math.log(right) - how.smoothing * math.log(other)
        each = log_normalizer - (right - other) * of_target - other * of_all - entropy
    if how.z_loss:
        each = each + how.z_loss * jnp.square(log_normalizer)
    loss = jnp.sum(each[:, 0] * weights)
    # Where several are the largest, each is correct: an argmax would be one more pass over all.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    correct = jnp.sum((of_target == largest)[:, 0] * weights)
    return (loss, correct), logits, log_normalizer


def _smoothed(smoothing: float, vocabulary: int) -> tuple[float, float]:
    """What of a smoothed target lies on the right token, and on each other one."""
    return 1.0 - smoothing, smoothing / (vocabulary - 1)


def _forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, how: How
) -> tuple[Sums, Any]:
    kernel_DxV = kernel.T if how.tied else kernel
    kernel_VxD_in_dtype = kernel_DxV.T.astype(hidden.dtype)

    def add(carry: Any, part: Any) -> tuple[Any, jax.Array]:
        sums, of_kernel = carry
        hidden_BxTxD, targets_BxT, weights_BxT = part
        of_part, logits, log_normalizer = _logits(*part, kernel_DxV, how)
        wanted = jnp.arange(logits.shape[-1]) == targets_BxT.reshape(-1, 1)
        if how.smoothing:
            wanted = jnp.where(wanted, *_smoothed(how.smoothing, logits.shape[-1]))
        probabilities = jnp.exp(logits - log_normalizer)
        if how.z_loss:
            probabilities = probabilities * (1 + 2 * how.z_loss * log_normalizer)
        gradient = (probabilities - wanted) * weights_BxT.reshape(-1, 1)
        if how.softcap:
            gradient = gradient * (1 - jnp.square(logits / how.softcap))
        gradient = gradient.astype(hidden_BxTxD.dtype)
        rows = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
        product = (gradient.T, rows) if how.tied else (rows.T, gradient)
        of_kernel = of_kernel + jnp.matmul(*product, preferred_element_type=jnp.float32)
        of_hidden = jnp.matmul(gradient, kernel_VxD_in_dtype).reshape(hidden_BxTxD.shape)
        return (jax.tree.map(jnp.add, sums, of_part), of_kernel), of_hidden

    zeros = (jnp.float32(0), jnp.float32(0)), jnp.zeros(kernel.shape, jnp.float32)
    parts = _chunks(hidden, targets, weights, how.chunk)
    if parts[0].shape[0] == 1:  # a scan of one would keep what it adds up apart
        (sums, of_kernel), of_hidden = add(zeros, jax.tree.map(lambda part: part[0], parts))
    else:
        (sums, of_kernel), of_hidden = jax.lax.scan(add, zeros, parts)
        of_hidden = jnp.moveaxis(of_hidden, 0, 1).reshape(hidden.shape)
    return sums, (of_hidden, of_kernel, targets, weights, jnp.zeros((), kernel.dtype))


def _backward(how: How, kept: Any, of_sums: Sums) -> tuple[Any, ...]:
    of_hidden, of_kernel, targets, weights, like_kernel = kept
    of_loss, _ = of_sums
    return (
        of_hidden * of_loss.astype(of_hidden.dtype),
        (of_kernel * of_loss).astype(like_kernel.dtype),
        np.zeros(targets.shape, jax.dtypes.float0),
        jnp.zeros_like(weights),
    )


_sums.defvjp(_forward, _backward)
