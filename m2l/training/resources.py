"""The device memory that a run needs and the arithmetic of its steps, from shapes alone."""

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import AbstractMesh, Mesh

from m2l import checkpoints, models, partitioning
from m2l.errors import ConfigError
from m2l.models.products import computed_in
from m2l.training import losses, state
from m2l.training.settings import TrainSettings
from m2l.typing import PyTree

_GIB = 2**30

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


# --- memory ---


class MemoryNeed(NamedTuple):
    """Bytes on the device that needs most.

    Attributes:
        params: Float32 parameters; with an adapter those of the base too.
        opt_state: The optimizer's state.
        gradients: Float32 gradients; while parts are accumulated, twice.
        logits: Of the positions that are computed at a time, and their gradient.
        activations: About what the layers keep for the gradient; an estimate, unlike the others.
    """

    params: int
    opt_state: int
    gradients: int
    logits: int
    activations: int

    @property
    def least(self) -> int:
        """The bytes that are needed at least, without activations."""
        return self.params + self.opt_state + self.gradients + self.logits

    @property
    def total(self) -> int:
        """The bytes with activations."""
        return self.least + self.activations

    def describe(self) -> str:
        """Returns the parts in words, in GiB."""
        return ", ".join(
            f"{name.replace('_', ' ')} {value / _GIB:.2f}" for name, value in self._asdict().items()
        )


def memory_need(
    config: models.Config, settings: TrainSettings, mesh: Mesh | AbstractMesh
) -> MemoryNeed:
    """Computes what a run needs of a device of this mesh.

    Args:
        config: The model's configuration.
        settings: The run's.
        mesh: May be a `jax.sharding.AbstractMesh`, of devices that are not here.
    """
    lora = settings.adapter
    abstract = state.abstract(config, settings.optimizer, lora)
    shardings = state.shardings(config, settings.optimizer, mesh, lora)

    def device_bytes(leaves: PyTree, placed: PyTree) -> int:
        return sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(*map(jax.tree.leaves, (leaves, placed)), strict=True)
        )

    trained = device_bytes(abstract.params, shardings.params)
    frozen = adapted = 0
    if lora is not None:
        # The kernels that have factors are made of both in a step, and so are their gradients.
        base = models.spec(config)
        kernels = [checkpoints.flatten(each) for each in (base, partitioning.shardings(base, mesh))]
        frozen = device_bytes(*kernels)
        adapted = device_bytes(*([each[name] for name in lora.modules(config)] for each in kernels))
    ways, parts = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["model"]
    accumulate, loss_chunk = settings.objective.accumulate, settings.objective.loss_chunk
    rows = -(-settings.batch_size // ways // accumulate)
    dtype = settings.execution.dtype
    # An abstract mesh is of other devices than this host's.
    width = (dtype if isinstance(mesh, AbstractMesh) else computed_in(dtype)).itemsize
    stacks = _stacks(config, settings)
    scored = stacks[-1][1]
    all_rows = settings.batch_size // accumulate
    positions = rows * min(loss_chunk or losses.default_chunk(all_rows, scored), scored)
    return MemoryNeed(
        params=trained + frozen + adapted,
        opt_state=device_bytes(abstract.opt_state, shardings.opt_state),
        gradients=trained * (2 if accumulate > 1 else 1) + adapted,
        logits=positions * config.vocab_size // parts * (4 + width),
        activations=sum(
            rows * length * layers * width * _saved(config, settings.execution.remat, seen, parts)
            for layers, length, seen in stacks
        ),
    )


def _stacks(config: models.Config, settings: TrainSettings) -> list[tuple[int, int, int]]:
    """Returns (layers, positions of a row, positions that each attends to) of each stack."""
    inputs, targets = settings.input_length, settings.target_length
    if isinstance(config, models.LlamaConfig):
        return [(config.num_hidden_layers, inputs + targets, inputs + targets)]
    return [
        (config.num_encoder_layers, inputs, inputs),
        (config.num_decoder_layers, targets, inputs + targets),
    ]


def _saved(config: models.Config, remat: str, seen: int, parts: int) -> int:
    """Counts the numbers that a layer saves of each position for the gradient."""
    if isinstance(config, models.LlamaConfig):
        d, ff = config.hidden_size, config.mlp_size
        heads, inner = config.num_attention_heads, config.num_attention_heads * config.head_dim
        keys, mlps = 2 * config.num_key_value_heads * config.head_dim, 3
    else:
        d, ff, heads = config.d_model, config.d_ff, config.num_heads
        inner = heads * config.d_kv
        keys, mlps = 2 * inner, 3 if config.feed_forward_proj.startswith("gated") else 2
    if remat == "full":
        return d
    products = (2 * inner + keys + mlps * ff) // parts + 2 * d
    return products if remat == "dots" else products + 3 * d + 2 * heads * seen // parts


def check_memory(config: models.Config, settings: TrainSettings, mesh: Mesh) -> MemoryNeed:
    """Refuses a run that cannot fit, before anything of it is allocated.

    Returns:
        What it needs.

    Raises:
        ConfigError: Parameters, gradients, optimizer state and logits alone are more than a device
            has.
    """
    need = memory_need(config, settings, mesh)
    limit = device_bytes(mesh.local_devices[0])
    if limit and need.least > limit:
        raise ConfigError(
            f"a mesh of {dict(mesh.shape)} needs at least {need.least / _GIB:.1f} GiB on each "
            f"device ({need.describe()}), which has {limit / _GIB:.1f}: use more devices, raise "
            "fsdp or model, or lower loss_chunk or batch_size"
        )
    return need


def device_bytes(device: jax.Device) -> int | None:
    """Returns the memory that a device offers; None where it does not say."""
    if device.platform == "cpu":
        return psutil.virtual_memory().total // len(jax.local_devices())
    return (device.memory_stats() or {}).get("bytes_limit")


# --- arithmetic ---


def step_flops(config: models.Config, rows: int, inputs: int, targets: int) -> float:
    """Counts the floating-point operations of a training step: matrix products, both ways.

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


def evaluation_flops(
    config: models.Config, rows: int, inputs: int, targets: int, choices: int = 1
) -> float:
    """Counts the floating-point operations of scoring: forward, the inputs once for all choices.

    Args:
        config: The model's configuration.
        rows: Examples.
        inputs: Tokens of an example's inputs.
        targets: Tokens of one of its choices.
        choices: How many it has.
    """
    return 2.0 * rows * _multiply_adds(config, inputs, targets * choices)


def _multiply_adds(config: models.Config, inputs: int, targets: int) -> float:
    """Counts those of a row, forward."""
    if isinstance(config, models.LlamaConfig):
        length, d = inputs + targets, config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        mlp = 3 * d * config.mlp_size + d * config.num_experts
        weights = 2 * d * queries + 2 * d * keys + mlp
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


def peak_flops(dtype: str) -> float | None:
    """Returns operations a second of the current devices together; None for unknown ones.

    Of an accelerator bfloat16's, from `PEAKS`, whatever `dtype` is: MFU is defined by it. Of CPUs
    what a matrix product of this dtype reaches here, measured once.
    """
    devices = partitioning.current_devices()
    if devices[0].platform == "cpu":
        # Simulated devices share the cores of their process.
        return _measured_flops(dtype) * jax.process_count()
    for kind, operations in PEAKS.items():
        if kind.lower() in devices[0].device_kind.lower():
            return operations * len(devices)
    return None


@functools.cache
def _measured_flops(dtype: str) -> float:
    side, times = 1024, 5
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    x = jax.device_put(np.ones((side, side), computed_in(dtype)), jax.local_devices()[0])
    product(x).block_until_ready()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)
