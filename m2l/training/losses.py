"""What training minimises."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = tuple[jax.Array, jax.Array]


def cross_entropy(
    hidden_BxTxD: jax.Array,
    kernel_DxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    *,
    softcap: float = 0.0,
    chunk: int = 0,
    tied: bool = False,
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
    loss, correct = _sums(hidden_BxTxD, kernel, targets_BxT, weights_BxT, softcap, chunk, tied)
    return {"loss": loss, "correct": correct, "weight": jnp.sum(weights_BxT)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    softcap: float,
    chunk: int,
    tied: bool,
) -> Sums:
    def add(sums: Sums, part: Any) -> tuple[Sums, None]:
        of_part, _, _ = _logits(*part, kernel.T if tied else kernel, softcap)
        return jax.tree.map(jnp.add, sums, of_part), None

    zeros = jnp.float32(0), jnp.float32(0)
    return jax.lax.scan(add, zeros, _chunks(hidden, targets, weights, chunk))[0]


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
    softcap: float,
) -> tuple[Sums, jax.Array, jax.Array]:
    """The sums, the logits [B * T, V] and their log-normalisers [B * T, 1]."""
    # In two dimensions: XLA's CPU backend copies the gradient, transposed, for more of them.
    rows = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
    logits = jnp.matmul(rows, kernel_DxV.astype(rows.dtype), preferred_element_type=jnp.float32)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    targets, weights = targets_BxT.reshape(-1), weights_BxT.reshape(-1)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    loss = jnp.sum((log_normalizer - of_target)[:, 0] * weights)
    # Where several are the largest, each is correct: an argmax would be one more pass over all.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    correct = jnp.sum((of_target == largest)[:, 0] * weights)
    return (loss, correct), logits, log_normalizer


def _forward(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    softcap: float,
    chunk: int,
    tied: bool,
) -> tuple[Sums, Any]:
    kernel_DxV = kernel.T if tied else kernel
    kernel_VxD_in_dtype = kernel_DxV.T.astype(hidden.dtype)

    def add(carry: Any, part: Any) -> tuple[Any, jax.Array]:
        sums, of_kernel = carry
        hidden_BxTxD, targets_BxT, weights_BxT = part
        of_part, logits, log_normalizer = _logits(*part, kernel_DxV, softcap)
        is_target = jnp.arange(logits.shape[-1]) == targets_BxT.reshape(-1, 1)
        gradient = jnp.exp(logits - log_normalizer) - is_target
        gradient = gradient * weights_BxT.reshape(-1, 1)
        if softcap:
            gradient = gradient * (1 - jnp.square(logits / softcap))
        gradient = gradient.astype(hidden_BxTxD.dtype)
        rows = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
        product = (gradient.T, rows) if tied else (rows.T, gradient)
        of_kernel = of_kernel + jnp.matmul(*product, preferred_element_type=jnp.float32)
        of_hidden = jnp.matmul(gradient, kernel_VxD_in_dtype).reshape(hidden_BxTxD.shape)
        return (jax.tree.map(jnp.add, sums, of_part), of_kernel), of_hidden

    zeros = (jnp.float32(0), jnp.float32(0)), jnp.zeros(kernel.shape, jnp.float32)
    parts = _chunks(hidden, targets, weights, chunk)
    if parts[0].shape[0] == 1:  # a scan of one would keep what it adds up apart
        (sums, of_kernel), of_hidden = add(zeros, jax.tree.map(lambda part: part[0], parts))
    else:
        (sums, of_kernel), of_hidden = jax.lax.scan(add, zeros, parts)
        of_hidden = jnp.moveaxis(of_hidden, 0, 1).reshape(hidden.shape)
    return sums, (of_hidden, of_kernel, targets, weights, jnp.zeros((), kernel.dtype))


def _backward(softcap: float, chunk: int, tied: bool, kept: Any, of_sums: Sums) -> tuple[Any, ...]:
    of_hidden, of_kernel, targets, weights, like_kernel = kept
    of_loss, _ = of_sums
    return (
        of_hidden * of_loss.astype(of_hidden.dtype),
        (of_kernel * of_loss).astype(like_kernel.dtype),
        np.zeros(targets.shape, jax.dtypes.float0),
        jnp.zeros_like(weights),
    )


_sums.defvjp(_forward, _backward)
