"""The routed layer: of many MLPs each token is sent to a few, and no token is dropped.

Letters in names are axes: N tokens, E experts, J experts of a token, R = N J pairs of the two, S
their places, sorted by expert, D features, F features within an expert.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from m2l.models.configs import ACTIVATIONS, LlamaConfig
from m2l.models.layers import ACTIVATIONS as FUNCTIONS
from m2l.models.layers import dense
from m2l.models.products import product
from m2l.partitioning import RULES

Array = jax.Array
Kernels = tuple[Array, Array, Array]

_MOST_ROWS = 256
_LEAST_ROWS = 8


class Routing(NamedTuple):
    """What a router did, summed over tokens and layers; float32.

    Attributes:
        chosen_E: How many tokens were sent to each expert.
        probability_E: The sum of each expert's probability.
        tokens: How many tokens there were.
    """

    chosen_E: Array
    probability_E: Array
    tokens: Array

    def balance(self) -> Array:
        """Returns the loss that is least where all experts are used alike.

        Source: Fedus et al. 2021, equations 4 to 6, over all layers together as Mixtral has it.
        """
        tokens = jnp.maximum(self.tokens, 1.0)
        shares = (self.chosen_E / tokens) * (self.probability_E / tokens)
        return shares.size * jnp.sum(shares)


def no_routing(experts: int) -> Routing:
    """Returns the sums over no token."""
    return Routing(jnp.zeros(experts), jnp.zeros(experts), jnp.zeros(()))


class RoutedMlp(nn.Module):
    """Sends each token to the most probable of E gated MLPs (Shazeer et al. 2017).

    There is no capacity: rows are sorted by expert, and each expert multiplies as many blocks of
    rows as it has (Gale et al. 2022). On a mesh each device has some of the experts, and computes
    what they add for all tokens of its part of the batch.
    """

    config: LlamaConfig
    kernel_init: Callable[..., Array]

    def setup(self) -> None:
        c = self.config
        wide = c.num_experts, c.hidden_size, c.moe_intermediate_size
        self.router = self.param("router", self.kernel_init, wide[1::-1])
        self.kernels = (
            self.param("expert_wi_0", self.kernel_init, wide),
            self.param("expert_wi_1", self.kernel_init, wide),
            self.param("expert_wo", self.kernel_init, (wide[0], wide[2], wide[1])),
        )

    def __call__(self, x_BxTxD: Array, counted_BxT: Array | None = None) -> tuple[Array, Routing]:
        """Returns what the experts add, [B, T, D], and what the router did.

        Args:
            x_BxTxD: The input.
            counted_BxT: Which tokens count in the routing, bool; None: all.
        """
        c = self.config
        probabilities_BxTxE = jax.nn.softmax(dense(x_BxTxD, self.router, jnp.float32))
        weights_BxTxJ, chosen_BxTxJ = jax.lax.top_k(probabilities_BxTxE, c.num_experts_per_tok)
        if c.norm_topk_prob:
            weights_BxTxJ = weights_BxTxJ / jnp.sum(weights_BxTxJ, axis=-1, keepdims=True)
        activation = ACTIVATIONS[c.hidden_act]
        out = _on_mesh(
            activation, x_BxTxD, weights_BxTxJ.astype(x_BxTxD.dtype), chosen_BxTxJ, self.kernels
        )
        counted = jnp.ones(x_BxTxD.shape[:2], bool) if counted_BxT is None else counted_BxT
        counted_BxTx1 = counted[..., None].astype(jnp.float32)
        hits_BxTxE = jnp.sum(jax.nn.one_hot(chosen_BxTxJ, c.num_experts), axis=2)
        routing = Routing(
            jnp.sum(hits_BxTxE * counted_BxTx1, axis=(0, 1)),
            jnp.sum(probabilities_BxTxE * counted_BxTx1, axis=(0, 1)),
            jnp.sum(counted_BxTx1),
        )
        return out, routing


def _on_mesh(
    activation: str, x_BxTxD: Array, weights_BxTxJ: Array, chosen_BxTxJ: Array, kernels: Kernels
) -> Array:
    """Runs the experts where they are, and adds up what they return."""
    experts = kernels[0].shape[0]
    mesh = jax.sharding.get_abstract_mesh()

    def local(x: Array, weights: Array, chosen: Array, *local_kernels: Array) -> Array:
        own = local_kernels[0].shape[0]
        if own < experts:
            chosen = chosen - own * jax.lax.axis_index(RULES["experts"])
            chosen = jnp.where((chosen >= 0) & (chosen < own), chosen, own)
        flat = (array.reshape(-1, array.shape[-1]) for array in (x, weights, chosen))
        out = apply_experts(activation, *flat, local_kernels).reshape(x.shape)
        return jax.lax.psum(out, RULES["experts"]) if own < experts else out

    if mesh.empty:
        return local(x_BxTxD, weights_BxTxJ, chosen_BxTxJ, *kernels)
    rows = x_BxTxD.shape[0] % math.prod(mesh.shape[axis] for axis in RULES["batch"])
    batch = PartitionSpec(None if rows else RULES["batch"])
    divided = experts % mesh.shape[RULES["experts"]] == 0
    placed = PartitionSpec(RULES["experts"] if divided else None)
    return jax.shard_map(
        local, in_specs=(*[batch] * 3, *[placed] * 3), out_specs=batch, check_vma=False
    )(x_BxTxD, weights_BxTxJ, chosen_BxTxJ, *kernels)


def apply_experts(
    activation: str,
    x_NxD: Array,
    weights_NxJ: Array,
    chosen_NxJ: Array,
    kernels: Kernels,
) -> Array:
    """Computes the weighted sum of what each token's experts return, [N, D].

    Args:
        activation: Of the gate.
        x_NxD: The tokens.
        weights_NxJ: What an expert's output is multiplied by.
        chosen_NxJ: The experts of each token; E for one that is not here, and adds nothing.
        kernels: [E, D, F] of the gate and the input, [E, F, D] of the output.
    """
    (tokens, chosen), experts = chosen_NxJ.shape, kernels[0].shape[0]
    rows = tokens * chosen
    block = _block_rows(rows, experts)
    # Every expert that has a row fills its last block but for block - 1 rows at most.
    blocks = min(rows, (rows + min(experts, rows) * (block - 1)) // block)
    # NumPy's arrays cannot be indexed by what is traced in the loop.
    kernels, expert_R = jax.tree.map(jnp.asarray, (kernels, chosen_NxJ.reshape(-1)))
    order_R = jnp.argsort(expert_R, stable=True)
    counts_E = jnp.sum(expert_R[:, None] == jnp.arange(experts), axis=0)
    ends_E = jnp.cumsum(-(-counts_E // block))
    # How far the rows of an expert move so that they begin a block.
    shift_E = (ends_E - (-(-counts_E // block))) * block - (jnp.cumsum(counts_E) - counts_E)
    sorted_R = expert_R[order_R]
    moved_R = jnp.arange(rows) + jnp.append(shift_E, 0)[sorted_R]
    places = blocks * block
    place_R = (
        jnp.zeros(rows, jnp.int32)
        .at[order_R]
        .set(jnp.where(sorted_R < experts, moved_R, places), unique_indices=True)
    )
    row_S = jnp.full(places, rows, jnp.int32).at[place_R].set(jnp.arange(rows), mode="drop")
    expert_of_block = jnp.searchsorted(ends_E, jnp.arange(blocks), side="right")
    # Repeated first: the gradient of a gather with repetitions sums in no fixed order.
    x_RxD = jnp.repeat(x_NxD, chosen, axis=0)
    x_SxD = x_RxD.at[row_S].get(mode="fill", fill_value=0)
    y_SxD = _grouped(activation, block, x_SxD, kernels, expert_of_block, ends_E[-1])
    y_NxJxD = y_SxD.at[place_R].get(mode="fill", fill_value=0).reshape(tokens, chosen, -1)
    return product("nj,njd->nd", weights_NxJ, y_NxJxD)


def _block_rows(rows: int, experts: int) -> int:
    """Returns how many rows of one expert are multiplied at a time: a quarter of them is padding.

    That is, where all experts have as many.
    """
    wanted = max(rows // (2 * experts), 1)
    return min(max(1 << (wanted.bit_length() - 1), _LEAST_ROWS), _MOST_ROWS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(activation: str, block: int, *operands: Array | Kernels) -> Array:
    """Computes each block of rows by its expert; rows of blocks that are not used are 0."""
    return _grouped_forward(activation, block, *operands)[0]


def _expert(activation: str, x_SxD: Array, wi_0: Array, wi_1: Array, wo: Array) -> Array:
    gate, inner = (product("sd,df->sf", x_SxD, kernel) for kernel in (wi_0, wi_1))
    return product("sf,fd->sd", FUNCTIONS[activation](gate) * inner, wo)


def _rows(array: Array, number: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, number * block, block)


def _grouped_forward(
    activation: str,
    block: int,
    x_SxD: Array,
    kernels: Kernels,
    expert_of_block: Array,
    blocks: Array,
) -> tuple[Array, tuple[Array, Kernels, Array, Array]]:
    def compute(number: Array, y_SxD: Array) -> Array:
        expert = expert_of_block[number]
        rows = _expert(activation, _rows(x_SxD, number, block), *(k[expert] for k in kernels))
        return jax.lax.dynamic_update_slice_in_dim(y_SxD, rows, number * block, 0)

    y_SxD = jax.lax.fori_loop(0, blocks, compute, jnp.zeros_like(x_SxD))
    return y_SxD, (x_SxD, kernels, expert_of_block, blocks)


def _grouped_backward(
    activation: str,
    block: int,
    residuals: tuple[Array, Kernels, Array, Array],
    cotangent_SxD: Array,
) -> tuple[Array, Kernels, np.ndarray, np.ndarray]:
    x_SxD, kernels, expert_of_block, blocks = residuals

    def add(number: Array, sums: tuple[Array, Kernels]) -> tuple[Array, Kernels]:
        gradient_SxD, kernel_gradients = sums
        expert = expert_of_block[number]
        _, pull = jax.vjp(
            functools.partial(_expert, activation),
            _rows(x_SxD, number, block),
            *(kernel[expert] for kernel in kernels),
        )
        rows, *parts = pull(_rows(cotangent_SxD, number, block))
        return (
            jax.lax.dynamic_update_slice_in_dim(gradient_SxD, rows, number * block, 0),
            tuple(
                total.at[expert].add(part)
                for total, part in zip(kernel_gradients, parts, strict=True)
            ),
        )

    zeros = jnp.zeros_like(x_SxD), jax.tree.map(jnp.zeros_like, kernels)
    gradient_SxD, kernel_gradients = jax.lax.fori_loop(0, blocks, add, zeros)
    none = (np.zeros(array.shape, jax.dtypes.float0) for array in (expert_of_block, blocks))
    return gradient_SxD, kernel_gradients, *none


_grouped.defvjp(_grouped_forward, _grouped_backward)
