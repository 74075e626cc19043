"""What a merge says of its task vectors: norms, cosines, what is kept, where signs conflict."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from m2l.merging import layerwise
from m2l.typing import Json

Sums = dict[str, dict[str, np.ndarray]]
"""Of each parameter what was summed over it."""


def summary(
    sums: Sums, sizes: Mapping[str, int], densities: Sequence[float] | None
) -> dict[str, Json]:
    """Returns the measures of the whole model and of each of its layers, as JSON-like data.

    Args:
        sums: Of the parameters that were measured; sums of a part are scaled up to the whole.
        sizes: Name -> elements, of all parameters.
        densities: The share of each expert's entries that trimming keeps, where it is known.
    """
    groups: dict[str, dict[str, Json]] = {}
    for name, parameter_sums in sums.items():
        factor = sizes[name] / float(parameter_sums["entries"])
        for group in ("", group_of(name)):
            totals = groups.setdefault(group, {"parameters": 0})
            totals["parameters"] += sizes[name]
            for kind, array in parameter_sums.items():
                if kind != "entries":
                    totals[kind] = totals.get(kind, 0.0) + array * factor
    sampled = sum(float(each["entries"]) for each in sums.values())
    whole = groups.pop("")
    # As if the parameters that were not looked at were like the others.
    factor = sum(sizes.values()) / whole["parameters"]
    model = _described({kind: array * factor for kind, array in whole.items()})
    model["parameters"] = sum(sizes.values())
    if densities is not None:
        model["density"] = list(densities)
    return model | {
        "share": sampled / sum(sizes.values()),
        "groups": {group: _described(totals) for group, totals in groups.items()},
    }


def _described(totals: Mapping[str, Json]) -> dict[str, Json]:
    norms = np.sqrt(np.diagonal(totals["products"]))
    cosines = totals["products"] / np.maximum(np.outer(norms, norms), 1e-30)
    measures = {
        "parameters": totals["parameters"],
        "norms": [float(f"{norm:.6g}") for norm in norms],
        "cosines": np.clip(cosines, -1, 1).round(6).tolist(),
    }
    if "kept" in totals:
        measures |= {
            "density": (totals["kept"] / totals["parameters"]).round(6).tolist(),
            "sign_conflicts": round(float(totals["conflicts"] / max(1.0, totals["touched"])), 6),
        }
    return measures


def group_of(name: str) -> str:
    """Returns the layer that a parameter belongs to, or the part of the model that has none."""
    if layer := layerwise.LAYER.match(name):
        return layer[1] + layer[2]
    return name.split("/")[0] if "/" in name else re.sub(r"\.(weight|bias)$", "", name)


def flat(sums: Sums) -> dict[str, np.ndarray]:
    """Returns sums of every parameter as an array of each kind, to be gathered."""
    kinds = next(iter(sums.values()), {})
    stacked = {kind: np.stack([each[kind] for each in sums.values()]) for kind in kinds}
    return stacked | {"": np.array(list(sums), dtype=np.str_)}


def nested(part: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the sums that `flat` returned arrays of."""
    names, kinds = part[""], [kind for kind in part if kind]
    return {
        str(name): {kind: part[kind][place] for kind in kinds} for place, name in enumerate(names)
    }
