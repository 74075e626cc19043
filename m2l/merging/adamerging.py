"""AdaMerging: the coefficients of a merge, learned from the entropy of its predictions."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.typing import Params, PyTree

Entropy = Callable[[Params, PyTree], jax.Array]

EVERYTHING = "*"


class Learned(NamedTuple):
    """What AdaMerging found.

    Attributes:
        coefficients: Per pattern of parameter names one number an expert, in the experts' order.
            Every parameter matches exactly one pattern.
        entropies: The mean entropy before each step, in nats.
    """

    coefficients: dict[str, list[float]]
    entropies: list[float]


def layer_patterns(names: Sequence[str]) -> dict[str, str]:
    """Returns each parameter's layer, as a shell pattern; outside of layers, its own name.

    "decoder/layers_03/mlp/wo" belongs to "decoder/layers_03/*", "token_embedder" to itself.
    """
    layers = {name: re.match(r"(.*/)?layers_\d+/", name) for name in names}
    return {name: f"{layer[0]}*" if layer else name for name, layer in layers.items()}


def learn_coefficients(
    base: Params,
    experts: Sequence[Params],
    entropy: Entropy,
    batches: Iterable[Sequence[PyTree]],
    *,
    per_layer: bool = True,
    steps: int = 500,
    learning_rate: float = 1e-3,
    initial: float = 0.3,
    on_step: Callable[[int, float], None] = lambda step, entropy: None,
) -> Learned:
    """Learns by how much each task vector counts: what makes predictions the surest.

    The merge is task arithmetic with a coefficient per expert, or per expert and layer,

        theta = theta_base + sum_i lambda_il (theta_i - theta_base),

    and Adam (b1 0.9, b2 0.999) goes down the gradient of the mean entropy of its predictions. No
    labels are needed. Every step ends with the coefficients brought back to [0, 1]. (The authors'
    code clips them where it merges, so that one that has left has no gradient and stays outside.)

    Base and experts stay on the devices that they are given on, sharded as they are, as do the
    merge and its gradient in float32.

    Yang et al. 2024, arXiv:2310.02575, sections 3.2 and 3.3. Their layers are single parameters;
    here a layer is a block of the network, and a parameter outside of blocks is one by itself.

    Args:
        base: Nested dict of arrays, of any float dtypes.
        experts: The same for each expert.
        entropy: (parameters, batch) -> the mean entropy of the predictions, a scalar; jittable and
            differentiable.
        batches: For each step its batches, one of each task; their mean entropy is minimised.
        per_layer: Whether each layer has its own coefficients, or all the same.
        steps: Steps of Adam, 500 in the paper.
        learning_rate: Of Adam.
        initial: What every coefficient is at first, in [0, 1].
        on_step: Called after each step with how many there were, and the entropy before it.

    Raises:
        MergeError: no experts, not at least one step; a setting out of range; parameters that do
            not fit; an entropy that is not finite; batches that end before the steps do.
    """
    if not experts or steps < 1:
        raise MergeError(f"AdaMerging of {len(experts)} experts in {steps} steps: nothing to learn")
    if not (learning_rate > 0 and 0 <= initial <= 1):
        raise MergeError(
            f"AdaMerging: expected a learning_rate above 0 and an initial coefficient in [0, 1], "
            f"found {learning_rate} and {initial}"
        )
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
    by_name = layer_patterns(list(flat_base)) if per_layer else dict.fromkeys(shapes, EVERYTHING)
    patterns = list(dict.fromkeys(by_name.values()))
    layers = tuple(patterns.index(pattern) for pattern in by_name.values())
    gradient = jax.jit(functools.partial(entropy_gradient, entropy, layers))
    flat_base, flat_experts = jax.tree.map(jnp.asarray, (flat_base, flat_experts))
    adam = optax.adam(learning_rate)
    lambdas_LxE = jnp.full((len(patterns), len(experts)), initial, jnp.float32)
    state, entropies, batches = adam.init(lambdas_LxE), [], iter(batches)
    for step in range(steps):
        step_batches = next(batches, ())
        if not step_batches:
            raise MergeError(f"AdaMerging: there are batches for {step} of {steps} steps")
        parts = [gradient(lambdas_LxE, flat_base, flat_experts, batch) for batch in step_batches]
        loss, slope = jax.tree.map(lambda *values: sum(values) / len(values), *parts)
        entropies.append(float(loss))
        if not math.isfinite(entropies[-1]):
            raise MergeError(
                f"AdaMerging, step {step + 1}: the entropy is {entropies[-1]}; lower the learning "
                "rate, or look at the experts"
            )
        updates, state = adam.update(slope, state)
        lambdas_LxE = jnp.clip(optax.apply_updates(lambdas_LxE, updates), 0.0, 1.0)
        on_step(step + 1, entropies[-1])
    return Learned(dict(zip(patterns, lambdas_LxE.tolist(), strict=True)), entropies)


def entropy_gradient(
    entropy: Entropy,
    layers: Sequence[int],
    lambdas_LxE: jax.Array,
    base: Mapping[str, jax.Array],
    experts: Sequence[Mapping[str, jax.Array]],
    batch: PyTree,
) -> tuple[jax.Array, jax.Array]:
    """Computes the entropy of a merge, and its gradient in the coefficients.

    Args:
        entropy: As for `learn_coefficients`.
        layers: Of each parameter in the base's order, which row of coefficients is its own.
        lambdas_LxE: The coefficients, float32.
        base: Arrays by name.
        experts: The same for each expert.
        batch: What `entropy` takes.

    Returns:
        A scalar and [L, E], float32.
    """
    merged = {}
    for layer, (name, theta) in zip(layers, base.items(), strict=True):
        taus = _task_vectors(theta, [expert[name] for expert in experts])
        terms = [lam * tau for lam, tau in zip(lambdas_LxE[layer], taus, strict=True)]
        merged[name] = theta.astype(jnp.float32) + functools.reduce(jnp.add, terms)
    loss, gradient = jax.value_and_grad(entropy)(checkpoints.unflatten(merged), batch)
    gradient = checkpoints.flatten(gradient)
    # By the chain rule: d/dlambda_i = <d/dtheta, tau_i>. Were the merge differentiated, or the
    # barrier not there, XLA would keep every task vector from above for this sum.
    slopes_LxE = jnp.zeros_like(lambdas_LxE)
    for layer, (name, theta) in zip(layers, base.items(), strict=True):
        slope, theta = jax.lax.optimization_barrier((gradient[name], theta))
        taus = _task_vectors(theta, [expert[name] for expert in experts])
        sums = jnp.stack([jnp.sum(slope * tau) for tau in taus])
        slopes_LxE = slopes_LxE.at[layer].add(sums)
    return loss, slopes_LxE


def _task_vectors(theta: jax.Array, experts: Sequence[jax.Array]) -> list[jax.Array]:
    return [expert.astype(jnp.float32) - theta.astype(jnp.float32) for expert in experts]
