"""What a merge tells of its task vectors: norms, cosines, densities, conflicts of signs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Sums = Mapping[str, Mapping[str, np.ndarray]]
"""Of each parameter what `kernel.measured` sums, and of how many entries."""


def summary(
    sums: Sums, sizes: Mapping[str, int], densities: Sequence[float] | None
) -> dict[str, Any]:
    """Of the whole model and of each of its layers, as JSON-like data.

    Args:
        sums: Of the parameters that were measured; sums of a part are scaled up to the whole.
        sizes: Name -> elements, of all parameters.
        densities: The share of each expert's entries that trimming keeps, where it is known.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, found in sums.items():
        up = sizes[name] / float(found["entries"])
        for group in ("", group_of(name)):
            held = groups.setdefault(group, {"parameters": 0})
            held["parameters"] += sizes[name]
            for kind, array in found.items():
                if kind != "entries":
                    held[kind] = held.get(kind, 0.0) + array * up
    looked_at = sum(float(found["entries"]) for found in sums.values())
    whole = groups.pop("")
    # As if the parameters that were not looked at were like the others.
    up = sum(sizes.values()) / whole["parameters"]
    model = _described({kind: array * up for kind, array in whole.items()})
    model["parameters"] = sum(sizes.values())
    if densities is not None:
        model["density"] = list(densities)
    return model | {
        "share": looked_at / sum(sizes.values()),
        "groups": {group: _described(held) for group, held in groups.items()},
    }


def _described(held: Mapping[str, Any]) -> dict[str, Any]:
    norms = np.sqrt(np.diagonal(held["products"]))
    cosines = held["products"] / np.maximum(np.outer(norms, norms), 1e-30)
    found = {
        "parameters": held["parameters"],
        "norms": [float(f"{norm:.6g}") for norm in norms],
        "cosines": np.clip(cosines, -1, 1).round(6).tolist(),
    }
    if "kept" in held:
        found |= {
            "density": (held["kept"] / held["parameters"]).round(6).tolist(),
            "sign_conflicts": round(float(held["conflicts"] / max(1.0, held["touched"])), 6),
        }
    return found


def group_of(name: str) -> str:
    """The layer that a parameter belongs to, or the part of the model that has none."""
    layer = re.match(r"(.*?(?:layers?_?|block|h)[./_]?\d+)[./]", name)
    if layer:
        return layer[1]
    return name.split("/")[0] if "/" in name else re.sub(r"\.(weight|bias)$", "", name)


def flat(sums: Sums) -> dict[str, np.ndarray]:
    """Sums of every parameter as an array of each kind, for a file."""
    kinds = next(iter(sums.values()), {})
    stacked = {kind: np.stack([held[kind] for held in sums.values()]) for kind in kinds}
    return stacked | {"": np.array(list(sums), dtype=np.str_)}


def nested(part: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The sums that were made flat."""
    names, kinds = part[""], [kind for kind in part if kind]
    return {
        str(name): {kind: part[kind][place] for kind in kinds} for place, name in enumerate(names)
    }
