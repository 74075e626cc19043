"""The parts that networks are made of: norm, relative positions, attention, MLP, and their stack.

Letters in names are axes: B rows, L or Q (query) or S (key) positions, H heads, K features of a
head, D features of the model, R distances.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jax.typing import DTypeLike

from m2l.errors import DataError, UnknownNameError
from m2l.models.attention import IMPLEMENTATIONS, attend
from m2l.models.fields import FRACTION, check_choice, check_fields
from m2l.models.products import product
from m2l.partitioning import constrain
from m2l.typing import Params, PyTree

Array = jax.Array
KeysValues = tuple[Array, Array]
Cache = dict[str, PyTree]
Observer = Callable[[Array, Array], None]

_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("_observer")

AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "token_embedder": ("vocab", "embed"),
        "logits": ("embed", "vocab"),
        "relpos_bias": ("heads", "relpos_buckets"),
        "query": ("embed", "heads"),
        "key": ("embed", "heads"),
        "value": ("embed", "heads"),
        "out": ("heads", "embed"),
        "query_bias": ("heads",),
        "key_bias": ("heads",),
        "value_bias": ("heads",),
        "out_bias": ("norm",),
        "wi": ("embed", "mlp"),
        "wi_0": ("embed", "mlp"),
        "wi_1": ("embed", "mlp"),
        "wo": ("mlp", "embed"),
        "router": ("embed", "norm"),
        "expert_wi_0": ("experts", "embed", "expert_mlp"),
        "expert_wi_1": ("experts", "embed", "expert_mlp"),
        "expert_wo": ("experts", "expert_mlp", "embed"),
        "norm": ("norm",),
        "query_norm": ("norm",),
        "key_norm": ("norm",),
        "pre_self_attention_norm": ("norm",),
        "pre_cross_attention_norm": ("norm",),
        "pre_mlp_norm": ("norm",),
        "post_self_attention_norm": ("norm",),
        "post_mlp_norm": ("norm",),
    }
)
"""Logical axes of each parameter, by the last part of its name."""

REMAT: Mapping[str, Callable[..., bool] | None] = MappingProxyType(
    {
        "none": None,
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
)
"""What of a layer is saved for the gradient. none: all; full: its input; dots: and the products
with its weights."""

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "relu": nn.relu,
        "gelu": lambda x: nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
        "silu": nn.silu,
    }
)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network is computed: none of it changes what is computed, but for dropout.

    Attributes:
        dtype: Of the computation; norms, attention scores, softmax, logits and sums of products
            are float32. On CPUs that do not multiply bfloat16, all of it is (`products`).
        dropout_rate: The share dropped, in [0, 1).
        attention: One of `attention.IMPLEMENTATIONS`.
        remat: One of REMAT.
        scan_layers: Whether layers are scanned over (compiled once), stacked within the step alone.

    Raises:
        UnknownNameError: there is no such dtype, attention or remat.
        ConfigError: a setting of the wrong type, or a dropout rate out of range.
    """

    dtype: DTypeLike = jnp.float32
    dropout_rate: float = dataclasses.field(default=0.0, metadata=FRACTION)
    attention: str = "auto"
    remat: str = "none"
    scan_layers: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice(self, "attention", IMPLEMENTATIONS)
        check_choice(self, "remat", REMAT)
        try:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        except TypeError:
            known = ("float32", "bfloat16", "float16")
            raise UnknownNameError("dtype", str(self.dtype), known) from None

    def dropout(self, *broadcast_dims: int) -> nn.Dropout:
        """Returns a module that drops the same at all places of the axes `broadcast_dims`."""
        return nn.Dropout(self.dropout_rate, broadcast_dims, deterministic=False)


def through(
    layers: Sequence[nn.Module],
    x: PyTree,
    each: Sequence[tuple[int, ...]],
    shared: tuple[PyTree, ...],
    execution: Execution,
) -> PyTree:
    """Applies layer after layer, `x = layer(x, *each[i], *shared)`, rematerialised or scanned.

    Args:
        layers: Alike but for their parameters, and bound.
        x: What the first layer reads, arrays of the shapes that each returns.
        each: Arguments of each layer; traced where layers are scanned over and they differ.
        shared: Further arguments, the same for all of them.
    """
    first, policy = layers[0], REMAT[execution.remat]
    if first.is_initializing() or (policy is None and not execution.scan_layers):
        for layer, own in zip(layers, each, strict=True):
            x = layer(x, *own, *shared)
        return x
    key = first.make_rng("dropout") if execution.dropout_rate else None
    alone = first.clone(parent=None, name=None)

    def run(own: tuple[int, ...] | None) -> Callable[..., PyTree]:
        def layer(x: PyTree, params: Params, number: Array, traced: tuple[Array, ...]) -> PyTree:
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, number)}
            arguments = traced if own is None else own
            return alone.apply({"params": params}, x, *arguments, *shared, rngs=rngs)

        return layer if policy is None else jax.checkpoint(layer, policy=policy)

    params = [layer.variables["params"] for layer in layers]
    if not execution.scan_layers:
        for number, (layer_params, own) in enumerate(zip(params, each, strict=True)):
            x = run(own)(x, layer_params, jnp.int32(number), ())
        return x
    alike = len(set(each)) == 1
    layer = run(each[0] if alike else None)
    traced = () if alike else tuple(jnp.array(column) for column in zip(*each, strict=True))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    items = stacked, jnp.arange(len(layers)), traced
    return jax.lax.scan(lambda x, item: (layer(x, *item), None), x, items)[0]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter without its values: shape, dtype, one logical axis per dimension."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str, ...]


def spec_of(module: nn.Module, *args: PyTree) -> Params:
    """Returns the ParamSpec of every parameter of a module, from its abstract initialisation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]

    def describe(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> ParamSpec:
        axes = AXES[path[-1].key]
        if len(axes) != len(leaf.shape):
            name = "/".join(part.key for part in path)
            raise ValueError(f"{name} has shape {leaf.shape} but the axes {axes}")
        return ParamSpec(leaf.shape, np.dtype(leaf.dtype), axes)

    return jax.tree.map_with_path(describe, shapes)


def rms_norm(x: Array, scale_D: Array, epsilon: float, dtype: DTypeLike) -> Array:
    """Divides x by its root mean square over the last axis and scales it, in float32.

    Source: Zhang and Sennrich 2019.
    """
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + epsilon) * scale_D).astype(dtype)


@contextlib.contextmanager
def observing(observe: Observer) -> Iterator[None]:
    """Calls `observe` with every x and kernel that `dense` multiplies while the block runs.

    In a function that is traced, they are tracers of that trace: return their values from it.
    Layers that are scanned over or rematerialised are traced by themselves.
    """
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def dense(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """Multiplies x @ kernel over the last axis in x's dtype; the result is in it, or `dtype`.

    Accumulates in float32, and so do the gradients: `products.product`.
    """
    if (observe := _observer.get(None)) is not None:
        observe(x, kernel)
    # In two dimensions: XLA's CPU backend copies the gradient, transposed, for more of them.
    rows = x.reshape(-1, x.shape[-1])
    return product("rd,dn->rn", rows, kernel, dtype).reshape(*x.shape[:-1], kernel.shape[-1])


def relative_position_buckets(
    distances: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Returns T5's bucket of each relative position (Raffel et al. 2020, section 2.1).

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


class Attention(nn.Module):
    """Multi-head attention without biases; 1 / sqrt(d_kv) is in the query's initialisation."""

    num_heads: int
    d_kv: int
    d_model: int
    execution: Execution

    def setup(self) -> None:
        joined = self.num_heads * self.d_kv
        unit = initializers.variance_scaling(1.0, "fan_in", "normal")
        scaled = initializers.variance_scaling(1.0 / self.d_kv, "fan_in", "normal")
        self.query = self.param("query", scaled, (self.d_model, joined))
        self.key = self.param("key", unit, (self.d_model, joined))
        self.value = self.param("value", unit, (self.d_model, joined))
        self.out = self.param("out", unit, (joined, self.d_model))
        self.dropout = self.execution.dropout(-2)

    def _heads(self, x_BxLxD: Array, kernel: Array) -> Array:
        joined = constrain(dense(x_BxLxD, kernel), "batch", None, "heads")
        return split_heads(joined, self.num_heads)

    def keys_values(self, x_BxSxD: Array) -> KeysValues:
        """Returns the keys and the values of a sequence, each [B, H, S, K]."""
        return self._heads(x_BxSxD, self.key), self._heads(x_BxSxD, self.value)

    def __call__(self, x_BxQxD: Array, keys_values: KeysValues, bias: Array) -> Array:
        """Returns what each position of x reads: [B, Q, D]; `bias` as for `attend`."""
        read_BxHxQxK = attend(
            self._heads(x_BxQxD, self.query),
            *keys_values,
            bias,
            scale=1.0,
            dropout=self.dropout if self.execution.dropout_rate else None,
            implementation=self.execution.attention,
        )
        return dense(join_heads(read_BxHxQxK), self.out)


def split_heads(x_BxLxHK: Array, heads: int) -> Array:
    """Splits the last axis: [B, H, L, K]."""
    return x_BxLxHK.reshape(*x_BxLxHK.shape[:2], heads, -1).swapaxes(1, 2)


def join_heads(x_BxHxLxK: Array) -> Array:
    """Joins the heads: [B, L, H * K]."""
    rows, heads, length, size = x_BxHxLxK.shape
    return x_BxHxLxK.swapaxes(1, 2).reshape(rows, length, heads * size)


class Mlp(nn.Module):
    """act(x wi) wo or, gated, (act(x wi_0) * x wi_1) wo, without biases (Shazeer 2020)."""

    d_model: int
    d_ff: int
    activation: str
    gated: bool
    kernel_init: Callable[..., Array]
    execution: Execution

    def setup(self) -> None:
        names = ("wi_0", "wi_1") if self.gated else ("wi",)
        self.wi = [self.param(name, self.kernel_init, (self.d_model, self.d_ff)) for name in names]
        self.wo = self.param("wo", self.kernel_init, (self.d_ff, self.d_model))
        self.dropout = self.execution.dropout(-2)

    def __call__(self, x_BxLxD: Array) -> Array:
        activation = ACTIVATIONS[self.activation]
        if self.gated:
            hidden = _gate(activation, *(dense(x_BxLxD, kernel) for kernel in self.wi))
        else:
            hidden = activation(dense(x_BxLxD, self.wi[0]))
        return dense(self.dropout(constrain(hidden, "batch", None, "mlp")), self.wo)


@functools.partial(jax.checkpoint, static_argnums=0)
def _gate(activation: Callable[[Array], Array], gate: Array, x: Array) -> Array:
    """Computes activation(gate) * x; only its arguments are saved for the gradient."""
    return activation(gate) * x


def embed(table_VxD: Array, tokens_BxL: Array, dtype: DTypeLike) -> Array:
    """Returns the rows of the table, [B, L, D]; NaN where an id is outside the vocabulary."""
    # Indexing would take the last row.
    table = constrain(table_VxD, "vocab", None)
    embedded = jnp.take(table, tokens_BxL, axis=0, mode="fill")
    return constrain(embedded.astype(dtype), "batch", None, None)


def empty_cache(layers: int, shape: tuple[int, ...], dtype: DTypeLike) -> list[KeysValues]:
    """Returns zeros for keys and values to decode; distinct arrays, so they can be donated."""
    empty = [jnp.zeros(shape, dtype) for _ in range(2 * layers)]
    return list(zip(empty[::2], empty[1::2], strict=True))


def check_continuations(tokens: Array, mask_BxS: Array) -> None:
    """Raises DataError unless the tokens are [B, T] or [B, C, T] for B inputs."""
    shape, inputs = tokens.shape, mask_BxS.shape[0]
    if len(shape) not in (2, 3) or shape[0] != inputs:
        raise DataError(
            f"decoder_input_tokens: expected [B, T] or [B, C, T] for B = {inputs} encoded "
            f"inputs, found {list(shape)}"
        )
