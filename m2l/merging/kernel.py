"""What happens to a part of one parameter: to float32, through a merge method, and back.

The streaming engine compiles this for blocks, and `merge_params` for whole parameters.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2l.merging import randomness
from m2l.merging.methods import Method


def _masks(
    method: Method,
    experts: Sequence[jax.Array],
    drop_rate: float | None,
    keys: jax.Array | None,
    offset: jax.Array,
) -> list[jax.Array] | None:
    if not method.draws:
        return None
    return randomness.kept(keys, len(experts), experts[0].shape, offset, drop_rate)


def merged(
    method: Method,
    base: jax.Array | None,
    experts: Sequence[jax.Array],
    *,
    scale: jax.Array | None,
    weights: jax.Array,
    drop_rate: float | None,
    thresholds: jax.Array | None,
    keys: jax.Array | None,
    offset: jax.Array,
) -> jax.Array:
    """Merges a part of a parameter.

    Args:
        method: How.
        base: The base's part, of any float dtype and shape.
        experts: The experts' parts, of the same shape.
        scale: lambda, if the method has one.
        weights: [experts], if the method has them.
        drop_rate: p, a Python number, if the method draws.
        thresholds: [experts], if the method trims.
        keys: The parameter's, as `randomness.keys` gives them, if the method draws.
        offset: uint32 [2], high and low word of the part's first index in the parameter.

    Returns:
        float32, of the same shape.
    """
    given = {
        "base": None if base is None else base.astype(jnp.float32),
        "experts": [expert.astype(jnp.float32) for expert in experts],
        "scale": scale,
        "weights": weights,
        "drop_rate": drop_rate,
        "thresholds": thresholds,
        "kept": _masks(method, experts, drop_rate, keys, offset),
    }
    return method.function(**{name: given[name] for name in method.takes})


def magnitudes(
    method: Method,
    base: jax.Array,
    experts: Sequence[jax.Array],
    *,
    drop_rate: float | None,
    keys: jax.Array | None,
    offset: jax.Array,
) -> list[jax.Array]:
    """The magnitudes, float32, that the method's thresholds are taken over; arguments as above."""
    taus = method.before_trimming(
        base.astype(jnp.float32),
        [expert.astype(jnp.float32) for expert in experts],
        _masks(method, experts, drop_rate, keys, offset),
        drop_rate,
    )
    return [jnp.abs(tau) for tau in taus]


def split(index: int) -> np.ndarray:
    """An element's index as two 32-bit words, high and low."""
    return np.array([index >> 32, index & 0xFFFFFFFF], np.uint32)
