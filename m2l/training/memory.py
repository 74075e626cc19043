"""What a run needs of each device's memory, from shapes alone: nothing is allocated."""

import math
from typing import Any, NamedTuple

import jax
import psutil
from jax.sharding import Mesh

from m2l import models
from m2l.errors import ConfigError
from m2l.training import state
from m2l.training.settings import TrainSettings

_GIB = 2**30


class Need(NamedTuple):
    """Bytes on the device that holds most.

    Attributes:
        params: Float32 parameters.
        opt_state: The optimizer's state.
        gradients: Float32 gradients; while parts are accumulated, twice.
        logits: Of the positions that are held at a time, and their gradient.
        activations: About what the layers keep for the gradient; an estimate, unlike the others.
    """

    params: int
    opt_state: int
    gradients: int
    logits: int
    activations: int

    @property
    def least(self) -> int:
        """What is needed whatever the compiler does."""
        return self.params + self.opt_state + self.gradients + self.logits

    @property
    def total(self) -> int:
        """What it comes to with activations."""
        return self.least + self.activations


def need(config: Any, settings: TrainSettings, mesh: Mesh) -> Need:
    """What a run needs of a device of this mesh.

    Args:
        config: The model's configuration.
        settings: The run's.
        mesh: May be a `jax.sharding.AbstractMesh`, of devices that are not here.
    """
    shapes = state.abstract(config, settings.optimization())
    placed = state.shardings(config, settings.optimization(), mesh)

    def held(shapes: Any, placed: Any) -> int:
        return sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True)
        )

    params = held(shapes.params, placed.params)
    ways, parts = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["model"]
    rows = -(-settings.batch_size // ways // settings.accumulate)
    width = 2 if settings.dtype == "bfloat16" else 4
    sides = _sides(config, settings)
    scored = sides[-1][1]
    positions = rows * min(settings.loss_chunk or scored, scored)
    return Need(
        params=params,
        opt_state=held(shapes.opt_state, placed.opt_state),
        gradients=params * (2 if settings.accumulate > 1 else 1),
        logits=positions * config.vocab_size // parts * (4 + width),
        activations=sum(
            rows * length * _kept(config, settings.remat, seen, parts) * layers * width
            for layers, length, seen in sides
        ),
    )


def _sides(config: Any, settings: TrainSettings) -> list[tuple[int, int, int]]:
    """(layers, positions of a row, positions that each attends to) of each stack."""
    inputs, targets = settings.input_length, settings.target_length
    if config.decoder_only:
        return [(config.num_hidden_layers, inputs + targets, inputs + targets)]
    return [
        (config.num_encoder_layers, inputs, inputs),
        (config.num_decoder_layers, targets, inputs + targets),
    ]


def _kept(config: Any, remat: str, seen: int, parts: int) -> int:
    """Numbers that a layer keeps for each position."""
    if isinstance(config, models.LlamaConfig):
        d, ff = config.hidden_size, config.intermediate_size
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


def check(config: Any, settings: TrainSettings, mesh: Mesh) -> Need:
    """Refuses a run that cannot fit, before anything of it is allocated.

    Returns:
        What it needs.

    Raises:
        ConfigError: Parameters, gradients, optimizer state and logits alone are more than a device
            has.
    """
    needed = need(config, settings, mesh)
    limit = device_bytes(jax.local_devices()[0])
    if limit and needed.least > limit:
        raise ConfigError(
            f"a mesh of {dict(mesh.shape)} needs at least {needed.least / _GIB:.1f} GiB on each "
            f"device ({describe(needed)}), which has {limit / _GIB:.1f}: use more devices, raise "
            "fsdp or model, or lower loss_chunk or batch_size"
        )
    return needed


def device_bytes(device: jax.Device) -> int | None:
    """The memory that a device offers; None where it does not say."""
    if device.platform == "cpu":
        return psutil.virtual_memory().total // len(jax.local_devices())
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit")


def describe(needed: Need) -> str:
    """A need, in GiB, in words."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value / _GIB:.2f}" for name, value in needed._asdict().items()
    )
