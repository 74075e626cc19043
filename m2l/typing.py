"""Types that signatures throughout m2l name: JSON values, and nested containers of arrays."""

from typing import Any, TypeAlias

# What `json.loads` returns. The exact type is recursive, and needs a cast wherever one is read.
Json: TypeAlias = Any
# A JSON object that is read field by field; one that is only passed on is a `Mapping[str, Json]`.
JsonObject: TypeAlias = dict[str, Json]
# Nested containers of leaves, as `jax.tree` walks; JAX, Flax and Optax write `Any` as well.
PyTree: TypeAlias = Any
# Parameters: nested dicts with string keys, arrays at the leaves.
Params: TypeAlias = dict[str, PyTree]
