"""Attention: one function, a reference in einsums, and the kernels that devices have for it.

Letters in names are axes: B rows, H heads of queries, G heads of keys and values (each serves
H / G neighbouring heads of queries), Q or T (query) and S (key) positions, K features of a head.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from m2l.errors import UnknownNameError
from m2l.models.products import product
from m2l.partitioning import RULES

Array = jax.Array

IMPLEMENTATIONS = ("auto", "einsum", "xla", "cudnn", "splash")
"""auto: cudnn on a GPU, splash on a TPU where they support the arguments, else einsum."""

_HIDDEN = -1e10
_SPLASH_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Causal:
    """A query sees the keys of its own segment up to its own position.

    Attributes:
        segments_BxT: int32, the segments of queries and keys alike; 0 is padding. None: one.
        window: How many positions it sees, itself included; 0: all. May be traced.
    """

    segments_BxT: Array | None = None
    window: int | Array = 0

    def mask(self, length: int) -> Array:
        """Returns which keys each query sees: bool, broadcastable to [B, H, T, T]."""
        distance_TxT = np.arange(length)[:, None] - np.arange(length)
        seen = jnp.asarray(distance_TxT >= 0)
        if not (isinstance(self.window, int) and self.window == 0):
            seen &= (distance_TxT < self.window) | (jnp.asarray(self.window) == 0)
        seen = seen[None, None]
        if self.segments_BxT is None:
            return seen
        return seen & same_segment(self.segments_BxT, self.segments_BxT)


def same_segment(query_segments_BxQ: Array, key_segments_BxS: Array) -> Array:
    """Returns whether query and key are of one segment: bool [B, 1, Q, S]."""
    return (query_segments_BxQ[:, :, None] == key_segments_BxS[:, None, :])[:, None]


def hide(mask: Array, bias: Array | float = 0.0) -> Array:
    """Returns the additive attention bias, float32: `bias` where the mask is True, else -1e10."""
    return jnp.where(mask, bias, jnp.float32(_HIDDEN))


def attend(
    query_BxHxQxK: Array,
    key_BxGxSxK: Array,
    value_BxGxSxK: Array,
    visible: Array | Causal,
    *,
    scale: float,
    softcap: float = 0.0,
    dropout: Callable[[Array], Array] | None = None,
    implementation: str = "auto",
) -> Array:
    """Computes softmax attention; scores, bias and softmax in float32 in every implementation.

    Args:
        visible: What a query sees: an additive float32 bias, broadcastable to [B, H, Q, S], which
            `hide` makes, or `Causal` where Q = S.
        scale: What the scores are multiplied by.
        softcap: c of c tanh(scores / c), before the bias; 0: none.
        dropout: Applied to the attention weights [B, H, Q, S]; None: there is none.
        implementation: One of IMPLEMENTATIONS. One that does not support these arguments is
            replaced by einsum, with a warning that says why.

    Returns:
        [B, H, Q, K] in the dtype of the values. A query that sees no key reads the mean of all
        (einsum), or something finite (the others).

    Raises:
        UnknownNameError: there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UnknownNameError("attention implementation", implementation, IMPLEMENTATIONS)
    automatic = implementation == "auto"
    if automatic:
        implementation = _OF_DEVICE.get(jax.default_backend(), "einsum")
    groups = key_BxGxSxK.shape[1]
    obstacle = _obstacle(implementation, query_BxHxQxK, groups, visible, softcap, dropout)
    if obstacle:
        _warn(implementation, obstacle, automatic)
        implementation = "einsum"
    if implementation == "splash":
        return _splash(query_BxHxQxK, key_BxGxSxK, value_BxGxSxK, visible, scale, softcap)
    bias = visible
    if isinstance(visible, Causal):
        bias = hide(visible.mask(query_BxHxQxK.shape[2]))
    if implementation == "einsum":
        return attend_parts(
            query_BxHxQxK,
            [(key_BxGxSxK, value_BxGxSxK, bias)],
            scale=scale,
            softcap=softcap,
            dropout=dropout,
        )
    query, key, value = (x.swapaxes(1, 2) for x in (query_BxHxQxK, key_BxGxSxK, value_BxGxSxK))
    if isinstance(visible, Causal) and visible.segments_BxT is None:
        window = (visible.window - 1, 0) if visible.window else None
        options = {"is_causal": True, "local_window_size": window}
    else:
        whole = (*bias.shape[:2], query.shape[1], key.shape[1])
        options = {"bias": jnp.broadcast_to(bias, whole)}
    attended = jax.nn.dot_product_attention(
        query, key, value, scale=scale, implementation=implementation, **options
    )
    return attended.swapaxes(1, 2)


_OF_DEVICE = {"gpu": "cudnn", "tpu": "splash"}


def _obstacle(
    implementation: str,
    query_BxHxQxK: Array,
    groups: int,
    visible: Array | Causal,
    softcap: float,
    dropout: Callable[[Array], Array] | None,
) -> str | None:
    """Returns why an implementation does not support these arguments; None if it does."""
    rows, _, length, size = query_BxHxQxK.shape
    if implementation == "einsum":
        return None
    if dropout is not None:
        return "it has no dropout of attention weights"
    if isinstance(visible, Causal) and not isinstance(visible.window, int):
        return "the layers have different windows and are scanned over"
    if implementation == "splash":
        if not isinstance(visible, Causal):
            return "it supports no bias"
        if length % _SPLASH_BLOCK or size % _SPLASH_BLOCK:
            return f"{length} positions of {size} features are not both multiples of 128"
        for noun, axis, count in (("rows", "batch", rows), ("heads of keys", "heads", groups)):
            if count % _devices(axis):
                return f"the mesh does not divide {count} {noun}"
        return None
    if softcap:
        return "it has no softcap"
    if implementation == "cudnn":
        if jax.default_backend() != "gpu":
            return "the device is no GPU"
        if query_BxHxQxK.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it computes in bfloat16 or float16, not in {query_BxHxQxK.dtype}"
        if size > 128 or size % 8 or length % 2:
            return (
                f"heads of {size} features and {length} positions: it takes up to 128 features, "
                "a multiple of 8, and an even number of positions"
            )
    return None


def _devices(axis: str) -> int:
    """Returns the number of devices over which the current mesh splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    over = RULES[axis]
    names = (over,) if isinstance(over, str) else over
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in names)


@functools.cache
def _warn(implementation: str, obstacle: str, automatic: bool) -> None:
    noun = "this device's attention kernel" if automatic else "attention implementation"
    warnings.warn(f"{noun} {implementation!r}: falling back to einsum: {obstacle}", stacklevel=3)


def attend_parts(
    query_BxHxQxK: Array,
    parts: Sequence[tuple[Array, Array, Array]],
    *,
    scale: float,
    softcap: float = 0.0,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Computes attention over keys in several arrays, as if these were concatenated.

    Args:
        parts: Keys [A, G, S, K], values of the same shape and the bias of each, broadcastable to
            [B, H, Q, S]. A may be a divisor of B: keys are then shared by B / A neighbouring rows,
            without being repeated.

    Returns:
        [B, H, Q, K], as `attend` does.
    """
    scores = [_product("agrk,agsk->agrs", query_BxHxQxK, key, jnp.float32) for key, _, _ in parts]
    scores = [score if scale == 1.0 else score * scale for score in scores]
    if softcap:
        scores = [softcap * jnp.tanh(score / softcap) for score in scores]
    scores = [score + bias for score, (_, _, bias) in zip(scores, parts, strict=True)]
    whole = scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)
    weights_BxHxQxS = jax.nn.softmax(whole).astype(parts[0][1].dtype)
    if dropout is not None:
        weights_BxHxQxS = dropout(weights_BxHxQxS)
    ends = np.cumsum([score.shape[-1] for score in scores])
    read = [
        _product("agrs,agsk->agrk", weights, value)
        for weights, (_, value, _) in zip(
            jnp.split(weights_BxHxQxS, ends[:-1], axis=-1), parts, strict=True
        )
    ]
    return functools.reduce(jnp.add, read)


def _product(
    equation: str, left_BxHxQxX: Array, right_AxGxSxK: Array, dtype: jnp.dtype | None = None
) -> Array:
    """Multiplies every row and head of queries with the keys or values that serve it."""
    (rows, heads), (keys, groups) = left_BxHxQxX.shape[:2], right_AxGxSxK.shape[:2]
    shared, repeats, (length, size) = rows // keys, heads // groups, left_BxHxQxX.shape[2:]
    # Neighbouring heads are contiguous, one larger matrix; rows that share keys are moved there.
    left = left_BxHxQxX.reshape(keys, shared, groups, repeats * length, size)
    left_AxGxRxX = left.swapaxes(1, 2).reshape(keys, groups, shared * repeats * length, size)
    result = product(equation, left_AxGxRxX, right_AxGxSxK, dtype)
    result = result.reshape(keys, groups, shared, repeats * length, result.shape[-1])
    return result.swapaxes(1, 2).reshape(rows, heads, length, result.shape[-1])


def _splash(
    query_BxHxTxK: Array,
    key_BxGxTxK: Array,
    value_BxGxTxK: Array,
    visible: Causal,
    scale: float,
    softcap: float,
) -> Array:
    """Runs the TPU kernel that skips what no query sees; elsewhere interpreted (for tests)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length = query_BxHxTxK.shape[2]
    if visible.window:
        mask = kernels.LocalMask((length, length), (visible.window - 1, 0), 0)
    else:
        mask = kernels.CausalMask((length, length))
    interpret = jax.default_backend() != "tpu"
    segments_BxT = visible.segments_BxT
    if segments_BxT is None:
        segments_BxT = jnp.ones((query_BxHxTxK.shape[0], length), jnp.int32)

    def local(query: Array, key: Array, value: Array, segments: Array) -> Array:
        kernel = kernels.make_splash_mha(
            kernels.MultiHeadMask([mask] * query.shape[1]),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap or None,
            interpret=interpret,
        )
        return jax.vmap(kernel)(query * scale, key, value, kernels.SegmentIds(segments, segments))

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        heads = PartitionSpec(RULES["batch"], RULES["heads"])
        local = jax.shard_map(
            local,
            in_specs=(heads, heads, heads, PartitionSpec(RULES["batch"])),
            out_specs=heads,
            check_vma=False,
        )
    return local(query_BxHxTxK, key_BxGxTxK, value_BxGxTxK, segments_BxT).astype(
        value_BxGxTxK.dtype
    )
