"""Rotary positions, and the ways to stretch them over rows longer than a model was made for."""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from m2l.models.llama import LlamaConfig

Array = jax.Array
Turns = tuple[Array, Array]
"""Cosines and sines of the angles, float32 [N, 1, T, K / 2] each."""


def rotary_frequencies(config: "LlamaConfig") -> tuple[np.ndarray, float]:
    """The angle per position of each pair of features, float32 [K / 2], and what scales the turn.

    Computed on the host in float32, as Hugging Face does.

    Source: Su et al. 2021 (rotary positions); Chen et al. 2023 (linear); Llama 3's own scaling by
    wave length; Peng et al. 2023 (YaRN).
    """
    c, size = config, config.head_dim
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain = (1.0 / np.float32(c.rope_theta) ** exponents).astype(np.float32)
    if c.rope_type == "default":
        return plain, 1.0
    stretched = plain / np.float32(c.rope_factor)
    if c.rope_type == "linear":
        return stretched, 1.0
    original = c.rope_original_max_position_embeddings
    if c.rope_type == "llama3":
        turns = np.float32(original / (2 * math.pi)) * plain
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (kept * plain + (1 - kept) * stretched).astype(np.float32), 1.0

    def pair_turning(times: float) -> float:
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    first = max(math.floor(pair_turning(c.rope_beta_fast)), 0)
    last = min(math.ceil(pair_turning(c.rope_beta_slow)), size - 1)
    steps = (np.arange(size // 2, dtype=np.float32) - first) / max(last - first, 0.001)
    kept = 1 - np.clip(steps, 0.0, 1.0)
    factor = c.rope_attention_factor
    if not factor:
        factor = 0.1 * math.log(c.rope_factor) + 1.0 if c.rope_factor > 1 else 1.0
    return (kept * plain + (1 - kept) * stretched).astype(np.float32), factor


def turns_of(config: "LlamaConfig", positions_NxT: Array | np.ndarray) -> Turns:
    """What rows at these positions are turned by."""
    frequencies, factor = rotary_frequencies(config)
    # On the host where it can be: XLA's CPU backend computes them anew for every head.
    xp = np if isinstance(positions_NxT, np.ndarray) else jnp
    angles = positions_NxT[:, None, :, None].astype(np.float32) * frequencies
    return xp.cos(angles) * xp.float32(factor), xp.sin(angles) * xp.float32(factor)


def rotate(x_NxHxTxK: Array, turns: Turns) -> Array:
    """Turns each pair of features (i, i + K / 2) by its position's angle, in float32."""
    cosine, sine = turns
    first, second = jnp.split(x_NxHxTxK.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x_NxHxTxK.dtype)
