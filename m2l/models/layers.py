"""The parts that networks are made of: norm, relative positions, attention, gated MLP.

Letters in names are axes: B rows, L or Q (query) or S (key) positions, H heads, K features of a
head, D features of the model, R distances.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jax.typing import DTypeLike

from m2l.partitioning import constrain

Array = jax.Array
KeysValues = tuple[Array, Array]

AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "token_embedder": ("vocab", "embed"),
        "logits": ("embed", "vocab"),
        "relpos_bias": ("heads", "relpos_buckets"),
        "query": ("embed", "heads"),
        "key": ("embed", "heads"),
        "value": ("embed", "heads"),
        "out": ("heads", "embed"),
        "wi_0": ("embed", "mlp"),
        "wi_1": ("embed", "mlp"),
        "wo": ("mlp", "embed"),
        "norm": ("norm",),
        "pre_self_attention_norm": ("norm",),
        "pre_cross_attention_norm": ("norm",),
        "pre_mlp_norm": ("norm",),
    }
)
"""Logical axes of each parameter, by the last part of its name."""

_HIDDEN = -1e10


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What a parameter is, without its values: shape, dtype, one logical axis per dimension."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str, ...]


def spec_of(module: nn.Module, *args: Any) -> dict[str, Any]:
    """The ParamSpec of every parameter of a module, from its abstract initialisation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]

    def describe(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> ParamSpec:
        axes = AXES[path[-1].key]
        if len(axes) != len(leaf.shape):
            name = "/".join(part.key for part in path)
            raise ValueError(f"{name} has shape {leaf.shape} but the axes {axes}")
        return ParamSpec(leaf.shape, np.dtype(leaf.dtype), axes)

    return jax.tree.map_with_path(describe, shapes)


def rms_norm(x: Array, scale_D: Array, epsilon: float, dtype: DTypeLike) -> Array:
    """x / root mean square over the last axis * scale, in float32 (Zhang and Sennrich 2019)."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + epsilon) * scale_D).astype(dtype)


def dense(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """x @ kernel over the last axis, multiplied in x's dtype; the result too, or in `dtype`."""
    # In two dimensions: XLA's CPU backend copies the gradient, transposed, for more of them.
    rows = x.reshape(-1, x.shape[-1])
    product = jnp.matmul(rows, kernel.astype(x.dtype), preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def relative_position_buckets(
    distances: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """T5's bucket of each relative position (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each, the other half logarithmically growing ranges up
    to `max_distance`; everything farther shares the last. Bidirectional: half of all buckets are
    for keys up to the query, half for keys after it. Otherwise keys after it count as distance 0.

    Computed on the host in float32, then truncated, as T5 does: no device's own logarithm may
    move a boundary.

    Args:
        distances: int array, key position minus query position.

    Returns:
        int32 array of the same shape, in [0, num_buckets).
    """
    behind, offset = -distances, 0
    if bidirectional:
        num_buckets //= 2
        offset = np.where(behind < 0, num_buckets, 0)
        behind = np.abs(behind)
    behind = np.maximum(behind, 0)
    exact = num_buckets // 2
    ratio = np.maximum(behind, exact).astype(np.float32) / np.float32(exact)
    octaves = np.log(ratio) / np.float32(np.log(max_distance / exact))
    far = exact + (octaves * np.float32(num_buckets - exact)).astype(np.int32)
    bucket = np.where(behind < exact, behind, np.minimum(far, num_buckets - 1))
    return (offset + bucket).astype(np.int32)


def bias_matrix(bias_by_distance_HxR: Array, query_length: int, key_length: int) -> Array:
    """Lays out a bias that depends on key position minus query position as a matrix per head.

    Args:
        bias_by_distance_HxR: at the distances 1 - query_length ... key_length - 1, ascending.

    Returns:
        [H, query_length, key_length].
    """
    # Row q is the vector shifted by q places. Repeating it with a period one longer than a row
    # makes each row start one place earlier; a gather would sum its gradient in no fixed order.
    heads, distances = bias_by_distance_HxR.shape
    period = jnp.pad(bias_by_distance_HxR, ((0, 0), (0, 1)))[:, None]
    repeated = jnp.broadcast_to(period, (heads, query_length, distances + 1)).reshape(heads, -1)
    rows = repeated[:, : query_length * distances].reshape(heads, query_length, distances)
    return rows[:, :, query_length - 1 :]


def hide(mask: Array, bias: Array | float = 0.0) -> Array:
    """The additive attention bias, float32: `bias` where the bool mask allows, else -1e10."""
    return jnp.where(mask, bias, jnp.float32(_HIDDEN))


def attend(
    query_BxHxQxK: Array,
    key_BxHxSxK: Array,
    value_BxHxSxK: Array,
    bias: Array,
    dropout: Callable[[Array], Array],
) -> Array:
    """Softmax attention without scaling; scores, bias and softmax in float32.

    Args:
        bias: float32, added to the scores, broadcastable to [B, H, Q, S]; `hide` makes it.
        dropout: applied to the attention weights [B, H, Q, S].

    Returns:
        [B, H, Q, K] in the dtype of the values. A query that sees no key reads the mean of all.
    """
    scores_BxHxQxS = jnp.einsum(
        "bhqk,bhsk->bhqs", query_BxHxQxK, key_BxHxSxK, preferred_element_type=jnp.float32
    )
    weights_BxHxQxS = jax.nn.softmax(scores_BxHxQxS + bias).astype(value_BxHxSxK.dtype)
    return jnp.einsum("bhqs,bhsk->bhqk", dropout(weights_BxHxQxS), value_BxHxSxK)


class Attention(nn.Module):
    """Multi-head attention without biases; 1 / sqrt(d_kv) is in the query's initialisation."""

    num_heads: int
    d_kv: int
    d_model: int
    dropout: nn.Dropout

    def setup(self) -> None:
        joined = self.num_heads * self.d_kv
        unit = initializers.variance_scaling(1.0, "fan_in", "normal")
        scaled = initializers.variance_scaling(1.0 / self.d_kv, "fan_in", "normal")
        self.query = self.param("query", scaled, (self.d_model, joined))
        self.key = self.param("key", unit, (self.d_model, joined))
        self.value = self.param("value", unit, (self.d_model, joined))
        self.out = self.param("out", unit, (joined, self.d_model))

    def _heads(self, x_BxLxD: Array, kernel: Array) -> Array:
        joined = constrain(dense(x_BxLxD, kernel), "batch", None, "heads")
        return joined.reshape(*joined.shape[:2], self.num_heads, self.d_kv).swapaxes(1, 2)

    def keys_values(self, x_BxSxD: Array) -> KeysValues:
        """The keys and the values of a sequence, each [B, H, S, K]."""
        return self._heads(x_BxSxD, self.key), self._heads(x_BxSxD, self.value)

    def __call__(self, x_BxQxD: Array, keys_values: KeysValues, bias: Array) -> Array:
        """What each position of x reads: [B, Q, D]; `bias` as for `attend`."""
        query_BxHxQxK = self._heads(x_BxQxD, self.query)
        read_BxHxQxK = attend(query_BxHxQxK, *keys_values, bias, self.dropout)
        joined = read_BxHxQxK.swapaxes(1, 2).reshape(*x_BxQxD.shape[:2], -1)
        return dense(joined, self.out)


class GatedMlp(nn.Module):
    """(gelu(x wi_0) * x wi_1) wo, with the tanh form of GELU and no biases (Shazeer 2020)."""

    d_model: int
    d_ff: int
    dropout: nn.Dropout

    def setup(self) -> None:
        init = initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.wi_0 = self.param("wi_0", init, (self.d_model, self.d_ff))
        self.wi_1 = self.param("wi_1", init, (self.d_model, self.d_ff))
        self.wo = self.param("wo", init, (self.d_ff, self.d_model))

    def __call__(self, x_BxLxD: Array) -> Array:
        gate = nn.gelu(dense(x_BxLxD, self.wi_0), approximate=True)
        hidden = constrain(gate * dense(x_BxLxD, self.wi_1), "batch", None, "mlp")
        return dense(self.dropout(hidden), self.wo)
