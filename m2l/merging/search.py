"""Recipes chosen by what their merges do: the best of many by a score, and AdaMerging.

AdaMerging learns the coefficients of a merge from a loss of its predictions, such as their entropy.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging.engine import Model, merge
from m2l.merging.in_memory import merge_each
from m2l.merging.recipe import Recipe
from m2l.storage import AnyPath
from m2l.typing import Json, Params, PyTree

AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """A recipe and what its merge scores; more is better."""

    recipe: Recipe
    score: float


def grid(fixed: Mapping[str, Json], swept: Mapping[str, Sequence[float]]) -> list[Recipe]:
    """Returns a recipe for every combination of the swept settings' values, with what is fixed.

    Raises:
        MergeError: There is none, or a combination makes no recipe.
    """
    recipes = [
        Recipe(**fixed, **dict(zip(swept, values, strict=True)))
        for values in itertools.product(*swept.values())
    ]
    if not recipes:
        raise MergeError("nothing to sweep: a setting has no values")
    return recipes


def sweep(
    base: Model | None,
    experts: Sequence[Model],
    recipes: Iterable[Recipe],
    score: Callable[[PyTree, Recipe], float],
    statistics: Sequence[Model] = (),
) -> list[SweepPoint]:
    """Merges models by each recipe and scores what comes of it.

    Recipes that differ only in numbers share a compilation. Checkpoints are read by blocks for each
    recipe, and one merge is in memory; of parameters in memory up to `AT_ONCE` merges are made by
    one program, as many as memory has room for.

    Args:
        base: The base, a checkpoint or parameters; None for methods that do not need it.
        experts: The experts.
        recipes: How to merge.
        score: Of the merged parameters; more is better.
        statistics: As `merge` takes them.

    Returns:
        A point for each recipe, in their order.
    """
    points: list[SweepPoint] = []
    remaining = iter(recipes)
    stored = any(isinstance(model, str | os.PathLike | AnyPath) for model in experts)
    at_once = 1 if stored else _at_once(experts)
    while group := list(itertools.islice(remaining, at_once)):
        if stored:
            options = {"statistics": statistics, "verify": not points, "progress": False}
            merges = [merge(base, experts, recipe, **options) for recipe in group]
        else:
            merges = merge_each(base, experts, group, statistics)
        merges.reverse()  # So that each is freed when it is scored.
        for recipe in group:
            points.append(SweepPoint(recipe, score(merges.pop(), recipe)))
    return points


def _at_once(experts: Sequence[PyTree]) -> int:
    """Returns how many merges the first device has room for, half of what is free; at least 1."""
    if jax.process_count() > 1:
        return 1  # Each process would see other memory, and all run the same programs.
    memory = jax.local_devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
    if not memory:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = sum(4 * np.size(leaf) for model in experts[:1] for leaf in jax.tree.leaves(model))
    return max(1, min(AT_ONCE, free // (2 * max(1, size))))


def best(points: Sequence[SweepPoint]) -> SweepPoint:
    """Returns the point of the highest score; of equal ones the first.

    Raises:
        MergeError: There is none.
    """
    if not points:
        raise MergeError("nothing was swept")
    return max(points, key=lambda point: point.score)


Loss = Callable[[Params, PyTree], jax.Array]

EVERYTHING = "*"


class Learned(NamedTuple):
    """What AdaMerging learned.

    Attributes:
        coefficients: Per pattern of parameter names one number an expert, in the experts' order.
            Every parameter matches exactly one pattern.
        losses: The mean loss before each step, in nats.
    """

    coefficients: dict[str, list[float]]
    losses: list[float]


def layer_patterns(names: Sequence[str]) -> dict[str, str]:
    """Returns each parameter's layer, as a shell pattern; outside of layers, its own name.

    "decoder/layers_03/mlp/wo" belongs to "decoder/layers_03/*", "token_embedder" to itself.
    """
    layers = {name: re.match(r"(.*/)?layers_\d+/", name) for name in names}
    return {name: f"{layer[0]}*" if layer else name for name, layer in layers.items()}


def learn_coefficients(
    base: Params,
    experts: Sequence[Params],
    loss: Loss,
    batches: Iterable[Iterable[PyTree]],
    *,
    per_layer: bool = True,
    steps: int = 500,
    learning_rate: float = 1e-3,
    initial: float = 0.3,
    masks: Params | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Learned:
    """Learns by how much each task vector counts: what makes a loss of the predictions least.

    The merge is task arithmetic with a coefficient per expert, or per expert and layer,

        theta = theta_base + sum_i lambda_il (theta_i - theta_base),

    and Adam (b1 0.9, b2 0.999) goes down the gradient of the loss: in the paper the mean entropy of
    its predictions, which needs no labels. Every step ends with the coefficients brought back to
    [0, 1]. (The authors' code clips them where it merges, so that one that has left has no gradient
    and stays outside.)

    Base and experts stay on the devices that they are given on, sharded as they are. Besides them
    there are the merge, whose arrays give way to its gradient's, in float32, and activations.

    Yang et al. 2024, arXiv:2310.02575, sections 3.2 and 3.3. Their layers are single parameters;
    here a layer is a block of the network, and a parameter outside of blocks is one by itself.

    Args:
        base: Nested dict of arrays, of any float dtypes.
        experts: The same for each expert.
        loss: (parameters, batch) -> the mean loss of the predictions, a scalar; jittable and
            differentiable.
        batches: For each step its batches, one of each task; their mean loss is minimised.
        per_layer: Whether each layer has its own coefficients, or all the same.
        steps: Steps of Adam, 500 in the paper.
        learning_rate: Of Adam.
        initial: What every coefficient is at first, in [0, 1].
        masks: Nested dict of arrays like the base, by which task vectors are multiplied; None: by
            1. See `learned_masks.learn_shared_mask`.
        on_step: Called after each step with how many there were, and the loss before it.

    Raises:
        MergeError: no experts, not at least one step; a setting out of range; parameters that do
            not fit; a loss that is not finite; batches that end before the steps do.
    """
    import optax  # Which other merges do without.

    if not experts or steps < 1:
        raise MergeError(f"AdaMerging of {len(experts)} experts in {steps} steps: nothing to learn")
    if not (learning_rate > 0 and 0 <= initial <= 1):
        raise MergeError(
            f"AdaMerging: expected a learning_rate above 0 and an initial coefficient in [0, 1], "
            f"found {learning_rate} and {initial}"
        )
    flat_base, flat_experts = flattened(base, experts)
    flat_masks = None if masks is None else checkpoints.flatten(masks)
    patterns, layers = coefficient_rows(list(flat_base), per_layer)
    gradient = jax.jit(functools.partial(loss_gradient, loss, layers))
    adam = optax.adam(learning_rate)
    lambdas_LxE = jnp.full((len(patterns), len(experts)), initial, jnp.float32)
    state, losses, batches = adam.init(lambdas_LxE), [], iter(batches)
    for step in range(steps):
        step_batches = next(batches, ())
        parts = [
            gradient(lambdas_LxE, flat_base, flat_experts, batch, flat_masks)
            for batch in step_batches
        ]
        losses.append(mean_loss("AdaMerging", [value for value, _ in parts], step, steps))
        slope = sum(slopes for _, slopes in parts) / len(parts)
        updates, state = adam.update(slope, state)
        lambdas_LxE = jnp.clip(optax.apply_updates(lambdas_LxE, updates), 0.0, 1.0)
        on_step(step + 1, losses[-1])
    return Learned(dict(zip(patterns, lambdas_LxE.tolist(), strict=True)), losses)


def flattened(
    base: Params, experts: Sequence[Params]
) -> tuple[dict[str, jax.Array], list[dict[str, jax.Array]]]:
    """Returns the arrays of a base and of experts by name.

    Raises:
        MergeError: An expert has other parameters than the base.
    """
    flat_base = checkpoints.flatten(base)
    flat_experts = [checkpoints.flatten(expert) for expert in experts]
    shapes = {name: jnp.shape(leaf) for name, leaf in flat_base.items()}
    for index, expert in enumerate(flat_experts):
        expert_shapes = {name: jnp.shape(leaf) for name, leaf in expert.items()}
        for name in [*shapes, *expert_shapes]:
            if shapes.get(name) != expert_shapes.get(name):
                raise MergeError(
                    f"expert {index}: {name} has shape {expert_shapes.get(name, 'none')} and not "
                    f"{shapes.get(name, 'none')}: these are not models of one kind"
                )
    return jax.tree.map(jnp.asarray, (flat_base, flat_experts))


def coefficient_rows(names: Sequence[str], per_layer: bool) -> tuple[list[str], tuple[int, ...]]:
    """Returns the pattern of each row of coefficients, and of each parameter which row is its."""
    by_name = layer_patterns(names) if per_layer else dict.fromkeys(names, EVERYTHING)
    patterns = list(dict.fromkeys(by_name.values()))
    return patterns, tuple(patterns.index(pattern) for pattern in by_name.values())


def mean_loss(label: str, values: Sequence[jax.Array], step: int, steps: int) -> float:
    """Returns the mean of the losses of a step's batches.

    Raises:
        MergeError: There are none, or it is not finite.
    """
    if not values:
        raise MergeError(f"{label}: there are batches for {step} of {steps} steps")
    value = float(sum(values) / len(values))
    if not math.isfinite(value):
        raise MergeError(
            f"{label}, step {step + 1}: the loss is {value}; lower the learning rate, "
            "or look at the experts"
        )
    return value


def loss_gradient(
    loss: Loss,
    layers: Sequence[int],
    lambdas_LxE: jax.Array,
    base: Mapping[str, jax.Array],
    experts: Sequence[Mapping[str, jax.Array]],
    batch: PyTree,
    masks: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of a merge, and its gradient in the coefficients.

    Args:
        loss: As for `learn_coefficients`.
        layers: Of each parameter in the base's order, which row of coefficients is its own.
        lambdas_LxE: The coefficients, float32.
        base: Arrays by name.
        experts: The same for each expert.
        batch: What `loss` takes.
        masks: What multiplies the task vectors, float32 arrays by name; None: 1.

    Returns:
        A scalar and [L, E], float32.
    """
    merged = masked_merge(layers, lambdas_LxE, base, experts, masks)
    value, gradient = jax.value_and_grad(loss)(checkpoints.unflatten(merged), batch)
    gradient = checkpoints.flatten(gradient)
    # By the chain rule: d/dlambda_i = <d/dtheta, tau_i>. Were the merge differentiated, or the
    # barrier not there, XLA would keep every task vector from above for this sum; of experts in
    # bfloat16, their copies in float32, did the barrier not hold these back as well.
    slopes_LxE = jnp.zeros_like(lambdas_LxE)
    for layer, (name, theta) in zip(layers, base.items(), strict=True):
        arrays = gradient[name], theta, [expert[name] for expert in experts]
        slope, theta, own = jax.lax.optimization_barrier(arrays)
        slope = slope if masks is None else slope * masks[name]
        taus = _task_vectors(theta, own)
        sums = jnp.stack([jnp.sum(slope * tau) for tau in taus])
        slopes_LxE = slopes_LxE.at[layer].add(sums)
    return value, slopes_LxE


def masked_merge(
    layers: Sequence[int],
    lambdas_LxE: jax.Array,
    base: Mapping[str, jax.Array],
    experts: Sequence[Mapping[str, jax.Array]],
    masks: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Computes theta_base + m sum_i lambda_il tau_i, float32 arrays by name.

    Args:
        layers, lambdas_LxE, base, experts, masks: As for `loss_gradient`.
    """
    merged = {}
    for layer, (name, theta) in zip(layers, base.items(), strict=True):
        vector = weighted_sum(lambdas_LxE[layer], theta, [expert[name] for expert in experts])
        vector = vector if masks is None else masks[name] * vector
        merged[name] = theta.astype(jnp.float32) + vector
    return merged


def weighted_sum(lambdas_E: jax.Array, theta: jax.Array, experts: Sequence[jax.Array]) -> jax.Array:
    """Computes sum_i lambda_i tau_i of one parameter, float32."""
    taus = _task_vectors(theta, experts)
    terms = [lam * tau for lam, tau in zip(lambdas_E, taus, strict=True)]
    return functools.reduce(jnp.add, terms)


def _task_vectors(theta: jax.Array, experts: Sequence[jax.Array]) -> list[jax.Array]:
    return [expert.astype(jnp.float32) - theta.astype(jnp.float32) for expert in experts]
