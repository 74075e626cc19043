"""The routed layer: a token gets what its experts return, whatever the blocks that compute it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import models
from m2l.errors import ConfigError
from m2l.models import experts

WIDTH, INNER = 5, 7

# Tokens, experts, experts of each token: fewer rows than a block has, experts without a row, blocks
# that are full, and the larger blocks of many rows.
SIZES = [(1, 4, 2), (3, 16, 3), (37, 3, 1), (130, 4, 2), (24, 2, 2), (400, 3, 2)]


def drawn(tokens, count, chosen, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, WIDTH)).astype(np.float32)
    weights = rng.uniform(size=(tokens, chosen)).astype(np.float32)
    # Each token has other experts; the last expert of more than four is nobody's.
    numbers = range(count - (count > 4))
    order = [rng.permutation(numbers)[:chosen] for _ in range(tokens)]
    shapes = ((count, WIDTH, INNER), (count, WIDTH, INNER), (count, INNER, WIDTH))
    kernels = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, weights, np.array(order, np.int32), kernels


def dense(x, weights, chosen, kernels):
    """Every expert of every token, as the formula has it; absent experts add nothing."""
    count = kernels[0].shape[0]
    share_NxE = jnp.einsum("nj,nje->ne", weights, jax.nn.one_hot(chosen, count))
    gate, inner = (jnp.einsum("nd,edf->enf", x, kernel) for kernel in kernels[:2])
    y_ExNxD = jnp.einsum("enf,efd->end", jax.nn.silu(gate) * inner, kernels[2])
    return jnp.einsum("ne,end->nd", share_NxE, y_ExNxD)


@pytest.mark.parametrize("sizes", SIZES)
def test_sums_and_gradients_are_those_of_computing_every_expert(sizes):
    x, weights, chosen, kernels = drawn(*sizes)

    def loss(function, x, weights, kernels):
        y = function(x, weights, chosen, kernels)
        return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y), y

    computed, expected = (
        jax.jit(jax.grad(functools.partial(loss, function), argnums=(0, 1, 2), has_aux=True))(
            x, weights, kernels
        )
        for function in (functools.partial(experts.apply_experts, "silu"), dense)
    )
    # Float32, summed in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()),
        computed,
        expected,
    )


def test_an_expert_of_another_device_adds_nothing():
    x, weights, chosen, kernels = drawn(20, 4, 2)
    own = tuple(kernel[:2] for kernel in kernels)
    absent = jnp.where(chosen < 2, chosen, 2)
    part = experts.apply_experts("silu", x, weights, absent, own)
    masked = dense(x, jnp.where(chosen < 2, weights, 0), chosen, kernels)
    np.testing.assert_allclose(part, masked, rtol=0, atol=1e-5 * np.abs(masked).max())


def test_the_balance_is_experts_times_shares_of_tokens_and_probabilities():
    chosen, probability = np.array([6.0, 2.0, 4.0]), np.array([3.0, 1.0, 2.0])
    balance = experts.Routing(chosen, probability, np.float32(6)).balance()
    assert float(balance) == pytest.approx(3 * (1 * 0.5 + 1 / 3 * 1 / 6 + 2 / 3 * 1 / 3))
    even = experts.Routing(np.full(3, 4.0), np.full(3, 2.0), np.float32(6)).balance()
    assert float(even) == pytest.approx(2)  # of 2 experts a token, the least


MIXTURE = models.LlamaConfig(
    *(31, 16, 24, 2, 4, 2, 6),
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    router_aux_loss_coef=0.1,
)


def test_padding_does_not_count_in_the_balance():
    params = models.init(MIXTURE, jax.random.key(0))
    tokens = np.array([[3, 4, 5, 6, 7]], np.int32)

    def balance(segments):
        batch = {
            "decoder_input_tokens": tokens[:, : segments.size],
            "decoder_segment_ids": segments,
            "decoder_positions": np.arange(segments.size)[None],
        }
        return models.balanced_hidden(MIXTURE, params, batch)[1]

    padded, alone = np.array([[1, 1, 1, 0, 0]]), np.array([[1, 1, 1]])
    np.testing.assert_allclose(balance(padded), balance(alone), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: expected 1 to 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: expected 1 to 4"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: a mixture of experts needs"),
    ],
)
def test_a_mixture_without_sizes_is_refused(settings, message):
    values = models.to_dict(MIXTURE) | settings
    with pytest.raises(ConfigError, match=message):
        models.from_dict(values)
