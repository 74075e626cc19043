"""What happens to a part of one parameter: to float32, through a merge method, and back.

The streaming engine compiles this for blocks, and `merge_params` for whole parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l.merging import randomness
from m2l.merging.method import Consensus, Method, add, scaled, task_vectors

Given = Mapping[str, Any]
"""What a method takes beside parameters, as arrays; each only if the method takes it.

scale, t, floor [], weights, thresholds, ceilings, coefficients [experts], zero_sign [];
and for drops keys and place (see `randomness.words`), with cut uint32 [] and rescale float32
[experts], or, where the drop rate goes by rank, cuts uint32 and rescales float32 [experts, 65536],
by the upper 16 bits of the magnitude (and then a rescale goes before rescales).
"""


def float32(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays in the arithmetic's dtype."""
    return [array.astype(jnp.float32) for array in arrays]


def bits(array: jax.Array) -> jax.Array:
    """The bits of magnitudes, uint32: in the order of the numbers."""
    return jax.lax.bitcast_convert_type(jnp.abs(array), jnp.uint32)


def _drawn(method: Method, taus: Sequence[jax.Array], given: Given) -> dict[str, Any]:
    """Which entries are kept, and what they are multiplied by."""
    if not method.draws:
        return {}
    words = randomness.words(given["keys"], len(taus), taus[0].shape, given["place"])
    if "cuts" not in given:
        kept = [word >= given["cut"] for word in words]
        return {"kept": kept, "rescale": given["rescale"]}
    bins = [bits(tau) >> np.uint32(16) for tau in taus]
    kept = [w >= cuts[b] for w, cuts, b in zip(words, given["cuts"], bins, strict=True)]
    if "rescale" in given:
        return {"kept": kept, "rescale": given["rescale"]}
    rescale = [table[b] for table, b in zip(given["rescales"], bins, strict=True)]
    return {"kept": kept, "rescale": rescale}


def merged(
    method: Method,
    consensus: Consensus,
    base: jax.Array | None,
    experts: Sequence[jax.Array],
    statistics: Sequence[jax.Array],
    given: Given,
) -> jax.Array:
    """Merges a part of a parameter.

    Args:
        method: How.
        consensus: How signs are elected, if they are.
        base: The base's part, of any float dtype and shape.
        experts: The experts' parts, of the same shape.
        statistics: The experts' statistics, of the same shape, if the method takes any.
        given: What else it takes.

    Returns:
        float32, of the same shape.
    """
    experts = float32(experts)
    known = dict(given) | {"experts": experts, "consensus": consensus, "fishers": statistics}
    if base is not None:
        known["base"] = base.astype(jnp.float32)
    if method.draws:
        known |= _drawn(method, [expert - known["base"] for expert in experts], given)
    return method.function(**{name: known[name] for name in method.takes})


def magnitudes(
    method: Method, base: jax.Array, experts: Sequence[jax.Array], given: Given
) -> list[jax.Array]:
    """The magnitudes, float32, that the method's thresholds are taken over; arguments as above."""
    base, experts = base.astype(jnp.float32), float32(experts)
    drawn = _drawn(method, [expert - base for expert in experts], given)
    taus = method.before_trimming(base, experts, drawn.get("kept"), drawn.get("rescale"))
    return [jnp.abs(tau) for tau in taus]


def norms(
    method: Method, base: jax.Array, experts: Sequence[jax.Array], given: Given
) -> dict[str, jax.Array]:
    """Sums magnitudes over a part of a parameter, before entries are dropped and after.

    Padding with zeros changes none of them. Arguments as above, but no thresholds.

    Returns:
        l1, l1_kept [experts], float32.
    """
    base, experts = base.astype(jnp.float32), float32(experts)
    dropped = magnitudes(method, base, experts, given)
    return {
        "l1": jnp.stack([jnp.sum(jnp.abs(tau)) for tau in task_vectors(base, experts)]),
        "l1_kept": jnp.stack([jnp.sum(magnitude) for magnitude in dropped]),
    }


def measured(
    method: Method,
    consensus: Consensus,
    base: jax.Array | None,
    experts: Sequence[jax.Array],
    given: Given,
) -> dict[str, jax.Array]:
    """Sums over a part of a parameter, that coefficients and diagnostics are made of.

    Padding with zeros changes none of them. Arguments as above.

    Returns:
        products: [experts, experts], of the task vectors; of the experts where there is no base.
        And with a base: l1, l1_kept, kept [experts]: sums of the task vectors' magnitudes, of those
        that sparsifying leaves, and how many those are; conflicts, touched []: entries on which
        what is left disagrees in sign, and entries where anything is left; majority []: how many
        more masses are positive than negative.
    """
    experts = float32(experts)
    taus = experts if base is None else [e - base.astype(jnp.float32) for e in experts]
    stacked = jnp.stack([tau.reshape(-1) for tau in taus])
    products = jnp.einsum("ix,jx->ij", stacked, stacked, precision="highest")
    if base is None:
        return {"products": products}
    base = base.astype(jnp.float32)
    left = method.sparsified(base, experts, dict(given) | _drawn(method, taus, given))

    def count(array: jax.Array) -> jax.Array:
        return jnp.sum(array, dtype=jnp.int32)

    def either(arrays: list[jax.Array]) -> jax.Array:
        return jnp.any(jnp.stack(arrays), axis=0)

    up, down = either([tau > 0 for tau in left]), either([tau < 0 for tau in left])
    mass = add(scaled(given["weights"], left) if consensus.weighted else left)
    return {
        "products": products,
        "l1": jnp.stack([jnp.sum(jnp.abs(tau)) for tau in taus]),
        "l1_kept": jnp.stack([jnp.sum(jnp.abs(tau)) for tau in left]),
        "kept": jnp.stack([count(tau != 0) for tau in left]),
        "conflicts": count(up & down),
        "touched": count(up | down),
        "majority": count(mass > 0) - count(mass < 0),
    }
