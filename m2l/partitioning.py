"""The device mesh, and the one table of which of its axes holds which axis of an array.

Callers enter a mesh with `jax.set_mesh`; under the older `with mesh:` constraints are dropped.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from m2l.errors import ConfigError, UnknownNameError
from m2l.typing import Params, PyTree

MESH_AXES = ("data", "fsdp", "model")

RULES: Mapping[str, str | tuple[str, ...] | None] = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "embed": "fsdp",
        "heads": "model",
        "mlp": "model",
        "vocab": "model",
        "experts": "model",
        "expert_mlp": None,
        "norm": None,
        "rank": None,
        "relpos_buckets": None,
    }
)
"""Logical axis -> mesh axis or axes; None: every device holds all of it."""

_MIB = 2**20


_devices: contextvars.ContextVar[Sequence[jax.Device]] = contextvars.ContextVar("devices")


def current_devices() -> Sequence[jax.Device]:
    """Returns the devices that a mesh is of: all, or those of `restricted_to`."""
    return _devices.get(None) or jax.devices()


@contextlib.contextmanager
def restricted_to(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Lets the body, in this thread, work on these devices alone."""
    token = _devices.set(devices)
    try:
        with jax.default_device(devices[0]):
            yield
    finally:
        _devices.reset(token)


class ShardedParameter(NamedTuple):
    """One parameter in the table of a mesh."""

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    mib_per_device: float


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh with the axes data, fsdp and model.

    Batches are split over data and fsdp, parameters over fsdp and model. Model-parallel
    neighbours are next to each other, so they share the fastest links.

    Args:
        data: None takes all devices that fsdp and model leave.
        devices: None takes `current_devices()`.

    Raises:
        ConfigError: the three sizes do not multiply to the number of devices.
    """
    devices = current_devices() if devices is None else devices
    sizes = [size for size in (data, fsdp, model) if size is not None]
    positive = all(type(size) is int and size > 0 for size in sizes)
    if positive and data is None:
        data = len(devices) // (fsdp * model)
    if not positive or data * fsdp * model != len(devices):
        raise ConfigError(
            f"a mesh of data={data}, fsdp={fsdp}, model={model}: expected positive integers that "
            f"multiply to the number of devices, {len(devices)}"
        )
    # make_mesh's own default, Explicit, refuses half of the operations of a transformer.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((data, fsdp, model), MESH_AXES, auto, devices=devices)


def widest_mesh(spec: Params, *, model: int = 1) -> Mesh:
    """Returns the mesh over all devices that splits a model over as many of them as divide it.

    Args:
        spec: The model's parameters, as `models.spec` gives them.
        model: How many devices split layers.
    """
    sizes = [
        size
        for param in jax.tree.leaves(spec)
        for size, axis in zip(param.shape, param.axes, strict=True)
        if RULES.get(axis) == "fsdp"
    ]
    return make_mesh(fsdp=math.gcd(len(current_devices()) // model, *sizes), model=model)


def shardings(
    spec: Params, mesh: Mesh, rules: Mapping[str, str | None] = RULES
) -> dict[str, PyTree]:
    """Returns a NamedSharding for every ParamSpec of `models.spec`.

    Raises:
        UnknownNameError: a logical axis that `rules` does not have.
        ConfigError: two dimensions of a parameter on one mesh axis, a dimension that its mesh
            axis does not divide, or a rule for an axis that the mesh does not have.
    """

    def place(path: tuple[jax.tree_util.DictKey, ...], param: PyTree) -> NamedSharding:
        name = "/".join(part.key for part in path)
        return NamedSharding(mesh, _partition(name, param.shape, param.axes, mesh, rules))

    return jax.tree.map_with_path(place, spec)


def _partition(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    mesh: Mesh,
    rules: Mapping[str, str | None],
) -> PartitionSpec:
    used: dict[str, str] = {}
    for dimension, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis not in rules:
            raise UnknownNameError(f"logical axis of the parameter {name}:", axis, rules)
        mesh_axis = rules[axis]
        if mesh_axis is None:
            continue
        if mesh_axis not in mesh.shape:
            raise ConfigError(
                f"parameter {name}: its axis {axis!r} goes to the mesh axis {mesh_axis!r}, "
                f"but the mesh has {', '.join(mesh.shape)}"
            )
        if mesh_axis in used:
            raise ConfigError(
                f"parameter {name}: its axes {used[mesh_axis]!r} and {axis!r} both go to the "
                f"mesh axis {mesh_axis!r}; change a rule"
            )
        if size % mesh.shape[mesh_axis]:
            raise ConfigError(
                f"parameter {name}: dimension {dimension} ({axis}) is {size}, which the mesh axis "
                f"{mesh_axis!r} of {mesh.shape[mesh_axis]} devices does not divide"
            )
        used[mesh_axis] = axis
    return PartitionSpec(*(rules[axis] for axis in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first dimension is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def table(spec: Params, mesh: Mesh) -> list[ShardedParameter]:
    """Returns a row for each parameter of a model on a mesh, in the order of their names."""
    rows = []
    placed = jax.tree.leaves_with_path(shardings(spec, mesh))
    for (path, sharding), param in zip(placed, jax.tree.leaves(spec), strict=True):
        local = math.prod(sharding.shard_shape(param.shape)) * param.dtype.itemsize
        name = "/".join(part.key for part in path)
        rows.append(ShardedParameter(name, param.shape, sharding.spec, local / _MIB))
    return rows


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation on the mesh that `jax.set_mesh` entered, if any.

    A hint, not a contract: a dimension that its mesh axes do not divide is left to the compiler.

    Args:
        axes: a logical axis, or None, for each dimension of x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        over = RULES[axis] if axis else None
        names = (over,) if isinstance(over, str) else over or ()
        devices = math.prod(mesh.shape[name] for name in names)
        spec.append(over if size % devices == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
