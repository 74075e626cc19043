"""Parameter trees and their names: nested dicts to "a/b/c" and back."""

from collections.abc import Mapping
from typing import Any

import jax

from m2l.errors import CheckpointError


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a nested dict into {"a/b/c": leaf}, in the nested dict's order.

    Raises:
        CheckpointError: A key is no string, is empty, or contains "/" or "." (Orbax joins by it).
    """
    flat = {}
    for key, value in params.items():
        if not isinstance(key, str) or not key or "/" in key or "." in key:
            raise CheckpointError(f"{key!r} cannot name a parameter: use a string without / and .")
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": leaf for name, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns {"a/b/c": leaf} back into a nested dict."""
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *groups, last = name.split("/")
        group = nested
        for key in groups:
            group = group.setdefault(key, {})
        group[last] = leaf
    return nested


def flatten_state(tree: Any) -> dict[str, Any]:
    """Turns any pytree into {"key/path": leaf}; NamedTuple fields and indices become keys."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf
        for path, leaf in leaves
    }
