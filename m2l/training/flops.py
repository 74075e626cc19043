"""How much arithmetic a training step is, and how much of it the devices could do in that time."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l.models import LlamaConfig, T5Config

PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""Dense bfloat16 operations a second of one device, by a part of its kind; the first that fits.

Source: the makers' data sheets (NVIDIA's without sparsity; Google's per chip).
"""


def of_step(config: Any, rows: int, inputs: int, targets: int) -> float:
    """Floating-point operations of a training step: matrix products alone, forward and backward.

    Every position counts, padded or not. A position of causal attention counts for the half of the
    row that it sees on average; rematerialisation does not count (it is model FLOPs, not the
    hardware's).

    Args:
        config: The model's configuration.
        rows: Rows of a batch, over all devices.
        inputs: Tokens in a row's inputs.
        targets: Tokens in a row's targets; a decoder's row has both.
    """
    # Twice for a multiply-add; once forward, twice for the two gradients of every product.
    return 6.0 * rows * _multiply_adds(config, inputs, targets)


def of_evaluation(config: Any, rows: int, inputs: int, targets: int, choices: int = 1) -> float:
    """Floating-point operations of scoring examples: forward, the inputs once for all choices.

    Args:
        config: The model's configuration.
        rows: Examples.
        inputs: Tokens of an example's inputs.
        targets: Tokens of one of its choices.
        choices: How many it has.
    """
    return 2.0 * rows * _multiply_adds(config, inputs, targets * choices)


def _multiply_adds(config: T5Config | LlamaConfig, inputs: int, targets: int) -> float:
    """Of a row, forward."""
    if isinstance(config, LlamaConfig):
        length, d = inputs + targets, config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        weights = 2 * d * queries + 2 * d * keys + 3 * d * config.intermediate_size
        windows = config.windows or (0,) * config.num_hidden_layers
        seen = sum(min(window or length, length / 2) for window in windows)
        per_token = config.num_hidden_layers * weights + 2 * seen * queries
        return length * (per_token + d * config.vocab_size)
    d, inner = config.d_model, config.num_heads * config.d_kv
    mlp = (3 if config.feed_forward_proj.startswith("gated") else 2) * d * config.d_ff
    own = 4 * d * inner + mlp
    encoder = config.num_encoder_layers * inputs * (own + 2 * inputs * inner)
    cross = inputs * 2 * d * inner + targets * (2 * d * inner + 2 * inputs * inner)
    decoder = config.num_decoder_layers * (targets * (own + targets * inner) + cross)
    return encoder + decoder + targets * d * config.vocab_size


def peak(dtype: str) -> float | None:
    """Floating-point operations a second of all devices together; None for unknown devices.

    Of an accelerator bfloat16's, from `PEAKS`, whatever is computed in: MFU is defined by it. Of
    CPUs what a matrix product of this dtype reaches here, measured once.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # Simulated devices share the cores of their process.
        return _measured(dtype) * jax.process_count()
    for kind, operations in PEAKS.items():
        if kind.lower() in device.device_kind.lower():
            return operations * jax.device_count()
    return None


@functools.cache
def _measured(dtype: str, side: int = 1024, times: int = 5) -> float:
    product = jax.jit(lambda x: x @ x)
    x = jax.device_put(np.ones((side, side), jnp.dtype(dtype)), jax.local_devices()[0])
    product(x).block_until_ready()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)
