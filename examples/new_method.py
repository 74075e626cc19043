"""Adds a merge method with a hyper-parameter of its own, and sweeps it.

    python examples/new_method.py

The function is all there is to write: recipes, `m2l merge --list`, flags and sweeps know the method
and its hyper-parameter as soon as this file is imported. A package offers its methods to the
command `m2l` by an entry point of the group `m2l.merge_methods`.
"""

from typing import Annotated

import jax
import jax.numpy as jnp

import m2l
from m2l import merging
from m2l.merging import Interval, method
from m2l.merging.methods import Arrays, add, task_vectors
from m2l.typing import Params


@method
def consensus_task_arithmetic(
    base: jax.Array,
    experts: Arrays,
    strictness: Annotated[float, Interval(low=0), "How large its own part must be."] = 0.4,
    scale: Annotated[float, Interval(), "The factor of their sum."] = 0.3,
) -> jax.Array:
    """Adds the task vectors, only where at least two experts need the entry (TALL masks).

    With m_i = |tau_i| >= strictness |sum_j tau_j - tau_i|, the result is base + scale sum_i tau_i
    where sum_i m_i >= 2, else base. Wang et al. 2024, arXiv:2405.07813.
    """
    taus = task_vectors(base, experts)
    total = add(taus)
    needed = [jnp.abs(tau) >= strictness * jnp.abs(total - tau) for tau in taus]
    experts_per_entry = add([mask.astype(jnp.float32) for mask in needed])
    return base + scale * jnp.where(experts_per_entry >= 2, total, 0)


def random_model(seed: int) -> dict[str, dict[str, jax.Array]]:
    """Returns the parameters of a model of two layers; any pytree of arrays is merged."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        f"layers_{i}": {"kernel": jax.random.normal(key, (64, 64))} for i, key in enumerate(keys)
    }


def main() -> None:
    """Merges random models by every strictness, and prints how much of the base is changed."""
    base = random_model(0)
    experts = [
        jax.tree.map(lambda start, change: start + 0.1 * change, base, random_model(seed))
        for seed in (1, 2, 3)
    ]

    def changed(params: Params, recipe: m2l.Recipe) -> float:
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(base), strict=True)
        return float(jnp.mean(jnp.stack([jnp.mean(merged != start) for merged, start in leaves])))

    recipes = merging.grid(
        {"method": "consensus_task_arithmetic"}, {"strictness": [0.0, 0.2, 0.4, 0.8, 1.6]}
    )
    for point in merging.sweep(base, experts, recipes, changed):
        print(f"strictness {point.recipe.strictness:.1f}: {point.score:.1%} of the entries change")


if __name__ == "__main__":
    main()
