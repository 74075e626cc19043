"""The merge of a part of one parameter, sums over it, and what these say of the task vectors.

A merge that streams compiles this for blocks, and `merge_params` for whole parameters.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints import digest
from m2l.checkpoints.digest import WIDE
from m2l.merging import layerwise, randomness
from m2l.merging.method_registry import Method
from m2l.merging.methods import (
    Arrays,
    Consensus,
    add,
    between,
    drop,
    scaled,
    task_vectors,
    trim,
)
from m2l.typing import Json

Inputs = Mapping[str, jax.Array | np.ndarray | np.floating]
"""What a method takes besides parameters, as arrays; each only if the method takes it.

The hyper-parameters: scalars, or [experts]; thresholds, ceilings, largest, lowest, highest,
coefficients [experts], zero_sign []; and for drops keys and place (see `randomness.words`), with
cut uint32 and rescale float32 [experts], or, where the drop rate goes by rank, cuts uint32 and
rescales float32 [experts, 65536], by the upper 16 bits of the magnitude (then a rescale precedes
rescales).
"""


Sums = dict[str, dict[str, np.ndarray]]
"""Of each parameter what was summed over it."""


def float32(arrays: Arrays) -> list[jax.Array]:
    """Returns the arrays in the arithmetic's dtype."""
    return [array.astype(jnp.float32) for array in arrays]


def bits(array: jax.Array) -> jax.Array:
    """Returns the bits of magnitudes, uint32: in the order of the numbers."""
    return jax.lax.bitcast_convert_type(jnp.abs(array), jnp.uint32)


def named(
    function: Callable[..., object], inputs: Inputs
) -> dict[str, jax.Array | np.ndarray | np.floating]:
    """Returns what a method's own sums or magnitudes take besides the task vectors."""
    names = [*inspect.signature(function).parameters][1:]
    return {name: inputs[name] for name in names}


def _masks(method: Method, taus: Arrays, inputs: Inputs) -> dict[str, Arrays | jax.Array]:
    """Returns masks of the entries that are not dropped, and their rescale."""
    if not method.draws:
        return {}
    words = randomness.words(inputs["keys"], len(taus), taus[0].shape, inputs["place"])
    if "cuts" not in inputs:
        return {
            "masks": [word >= cut for word, cut in zip(words, inputs["cut"], strict=True)],
            "rescale": inputs["rescale"],
        }
    bins = [bits(tau) >> np.uint32(16) for tau in taus]
    masks = [w >= cuts[b] for w, cuts, b in zip(words, inputs["cuts"], bins, strict=True)]
    if "rescale" in inputs:
        return {"masks": masks, "rescale": inputs["rescale"]}
    rescale = [table[b] for table, b in zip(inputs["rescales"], bins, strict=True)]
    return {"masks": masks, "rescale": rescale}


def merged(
    method: Method,
    consensus: Consensus,
    base: jax.Array | None,
    experts: Arrays,
    statistics: Arrays,
    inputs: Inputs,
) -> jax.Array:
    """Merges a part of a parameter.

    Args:
        method: The method.
        consensus: How signs are elected, if they are.
        base: The base's part, of any float dtype and shape.
        experts: The experts' parts, of the same shape.
        statistics: The experts' statistics, of the same shape, if the method takes any; before them
            the base's, if there are.
        inputs: What else it takes.

    Returns:
        float32, of the same shape.
    """
    experts = float32(experts)
    first = len(statistics) - len(experts)
    arguments = {**inputs, "experts": experts, "consensus": consensus}
    arguments |= {
        "fishers": statistics[first:],
        "base_fisher": statistics[0] if first > 0 else None,
    }
    if base is not None:
        arguments["base"] = base.astype(jnp.float32)
    if method.draws:
        taus = [expert - arguments["base"] for expert in experts]
        arguments |= _masks(method, taus, inputs)
    names = (*method.inputs, *method.hyper_parameters)
    return method.function(**{name: arguments[name] for name in names})


@functools.cache
def compiled(
    method: Method, consensus: Consensus, dtype: str, digested: tuple[bool, ...], with_result: bool
) -> Callable:
    """Returns the merge of a piece; NaN all over if any number that went in is not finite.

    Compiled once for a number of experts, a length and a form of place: all else that it takes are
    arguments.

    Args:
        method: The method.
        consensus: How signs are elected, if they are.
        dtype: The result's.
        digested: Of which of the arrays that go in, in order, digests are computed.
        with_result: Whether one of the result is.
    """

    def merge_piece(
        base: jax.Array | None,
        experts: list,
        statistics: list,
        inputs: Inputs,
        place: jax.Array | None,
        size: jax.Array,
    ) -> tuple[jax.Array, list[jax.Array]]:
        block = merged(method, consensus, base, experts, statistics, inputs)
        read = [*experts, *statistics] if base is None else [base, *experts, *statistics]
        # Trimming and dropping hide what is not finite; 0 times it is NaN, and so is the sum.
        nothing = add([array.astype(jnp.float32) * 0 for array in read])
        block = jnp.where(nothing == 0, block, jnp.nan).astype(dtype)
        if place is None:
            return block, []
        positions = randomness.positions(block.shape, place)
        counted = jax.lax.iota(jnp.uint32, block.size) < size
        wanted = [array for array, each in zip(read, digested, strict=True) if each]
        wanted += [block] if with_result else []
        return block, [digest.of_elements(array, positions, counted) for array in wanted]

    return jax.jit(merge_piece, compiler_options=WIDE)


def _dropped(method: Method, taus: Arrays, inputs: Inputs) -> Arrays:
    """Returns the task vectors whose magnitudes the thresholds are taken over."""
    if not method.draws:
        return taus
    drawn = _masks(method, taus, inputs)
    return drop(taus, drawn["masks"], drawn["rescale"])


def _sparsified(method: Method, taus: Arrays, inputs: Inputs) -> Arrays:
    """Returns the task vectors as the method adds or elects them: dropped, trimmed, or neither."""
    taus = _dropped(method, taus, inputs)
    if method.magnitudes is not None:
        sizes = method.magnitudes(taus, **named(method.magnitudes, inputs))
        triples = zip(taus, sizes, inputs["thresholds"], strict=True)
        return [jnp.where(size >= threshold, tau, 0) for tau, size, threshold in triples]
    if "ceilings" in method.inputs:
        return between(taus, inputs["thresholds"], inputs["ceilings"])
    return trim(taus, inputs["thresholds"]) if method.trims else taus


def magnitudes(method: Method, base: jax.Array, experts: Arrays, inputs: Inputs) -> list[jax.Array]:
    """Returns the magnitudes, float32, that thresholds are taken over; arguments as above."""
    taus = task_vectors(base.astype(jnp.float32), float32(experts))
    if method.magnitudes is not None:
        return method.magnitudes(taus, **named(method.magnitudes, inputs))
    return [jnp.abs(tau) for tau in _dropped(method, taus, inputs)]


def mass(
    method: Method, consensus: Consensus, base: jax.Array, experts: Arrays, inputs: Inputs
) -> jax.Array:
    """Returns the signed mass by which signs are elected; arguments as above."""
    taus = task_vectors(base.astype(jnp.float32), float32(experts))
    return _mass(consensus, _sparsified(method, taus, inputs), inputs)


def _mass(consensus: Consensus, taus: Arrays, inputs: Inputs) -> jax.Array:
    return add(scaled(inputs["weights"], taus) if consensus.weighted else taus)


def norms(method: Method, base: jax.Array, experts: Arrays, inputs: Inputs) -> dict[str, jax.Array]:
    """Sums magnitudes over a part of a parameter, before entries are dropped and after.

    Padding with zeros changes none of them. Arguments as above, but no thresholds.

    Returns:
        l1, l1_kept [experts], float32.
    """
    base, experts = base.astype(jnp.float32), float32(experts)
    dropped = magnitudes(method, base, experts, inputs)
    return {
        "l1": jnp.stack([jnp.sum(jnp.abs(tau)) for tau in task_vectors(base, experts)]),
        "l1_kept": jnp.stack([jnp.sum(magnitude) for magnitude in dropped]),
    }


def sums(
    method: Method,
    consensus: Consensus,
    base: jax.Array | None,
    experts: Arrays,
    inputs: Inputs,
) -> dict[str, jax.Array]:
    """Sums over a part of a parameter, that coefficients and diagnostics are made of.

    Padding with zeros changes none of them. Arguments as above.

    Returns:
        products: [experts, experts], of the task vectors; of the experts where there is no base.
        own: What the method has in place of products for its coefficients.
        And with a base: l1, l1_kept, kept [experts]: sums of the task vectors' magnitudes, of those
        that sparsifying leaves, and how many those are; conflicts, touched []: entries on which
        what is left disagrees in sign, and entries where anything is left; majority []: how many
        more masses are positive than negative.
    """
    experts = float32(experts)
    taus = experts if base is None else task_vectors(base.astype(jnp.float32), experts)
    stacked = jnp.stack([tau.reshape(-1) for tau in taus])
    products = jnp.einsum("ix,jx->ij", stacked, stacked, precision="highest")
    own = {}
    if method.sums is not None:
        own = {"own": method.sums(taus, **named(method.sums, inputs))}
    if base is None:
        return {"products": products, **own}
    sparse = _sparsified(method, taus, inputs)

    def count(array: jax.Array) -> jax.Array:
        return jnp.sum(array, dtype=jnp.int32)

    def either(arrays: list[jax.Array]) -> jax.Array:
        return jnp.any(jnp.stack(arrays), axis=0)

    up, down = either([tau > 0 for tau in sparse]), either([tau < 0 for tau in sparse])
    votes = _mass(consensus, sparse, inputs)
    return own | {
        "products": products,
        "l1": jnp.stack([jnp.sum(jnp.abs(tau)) for tau in taus]),
        "l1_kept": jnp.stack([jnp.sum(jnp.abs(tau)) for tau in sparse]),
        "kept": jnp.stack([count(tau != 0) for tau in sparse]),
        "conflicts": count(up & down),
        "touched": count(up | down),
        "majority": count(votes > 0) - count(votes < 0),
    }


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
        for group in ("", _group_of(name)):
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


def _group_of(name: str) -> str:
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
