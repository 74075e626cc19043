"""Masks of task vectors that are learned from data: one of each expert, or one that all share.

Every entry of a parameter has a logit S; which entries of a task vector a merge has, and how much
of them, is a function of it. The loss of the merge's predictions goes down by Adam. The gradient of
a logit has the factors tau and dL/dtheta, so small that it would be under Adam's epsilon, 1e-8:
here it is multiplied by the number of entries, by which Adam's steps are otherwise unchanged.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging.in_memory import merge_params
from m2l.merging.recipe import Recipe
from m2l.merging.search import (
    EVERYTHING,
    Loss,
    coefficient_rows,
    flattened,
    loss_gradient,
    masked_merge,
    mean_loss,
    weighted_sum,
)
from m2l.merging.shards import constrained
from m2l.typing import Params, PyTree

OnStep = Callable[[int, float], None]
Arrays = dict[str, jax.Array]


class Localized(NamedTuple):
    """An expert of which the entries outside of a mask are the base's.

    Attributes:
        params: Nested dict of arrays.
        logits: S, a nested dict of float32 arrays; the mask is S > 0.
        share: How many entries of all are in the mask.
        losses: The mean loss before each step, in nats, without the norm.
    """

    params: Params
    logits: Params
    share: float
    losses: list[float]


class SharedMask(NamedTuple):
    """A mask that all experts share, before it is one: see `rescaled_mask`.

    Attributes:
        logits: Nested dict of float32 arrays.
        losses: The mean loss before each step, in nats.
    """

    logits: Params
    losses: list[float]


def localize(
    base: Params,
    expert: Params,
    loss: Loss,
    batches: Iterable[Iterable[PyTree]],
    *,
    density: float = 0.05,
    bias: float = 5.0,
    l1: float = 1.0,
    steps: int = 100,
    learning_rate: float = 0.1,
    on_step: OnStep = lambda step, loss: None,
) -> Localized:
    """Learns which entries of a task vector an expert needs on its own task.

    min over S of L(theta_base + sigmoid(S) tau) + lambda mean(sigmoid(S)), S being `bias` at the
    largest |tau| of the model at first, as many as `density` says, and -bias elsewhere. The result
    is theta_base + round(sigmoid(S)) tau. `localize_and_stitch` of density 1 averages such experts
    where they overlap: an entry counts where it is not the base's.

    He et al. 2024, Localize-and-Stitch, arXiv:2408.13656, section 3. The norm is of the mean: an
    entry of n is worth lambda / n nats whatever the size of the model, and all together lambda. In
    their code it is of the sum, and has the gradient's sign at S > 0 turned: there it makes masks
    surer, not smaller. They go down whole passes over 64 examples of a class by steps of 1e7, which
    fit one size of task vectors; Adam's do any. They start from 1 in 100,000 entries of the layers,
    all else stays the base's.

    Besides base and expert there are on the devices, sharded as the base, six models in float32:
    logits, Adam's two moments, the mask, its gradient, and the merge; where a step has several
    batches a seventh, their gradients' sum.

    Args:
        base, loss, batches: As for `search.learn_coefficients`.
        expert: As the base.
        density: Share of entries that are in the mask at first, in (0, 1].
        bias: Of the logits at first, above 0.
        l1: lambda, at least 0.
        steps: Steps of Adam.
        learning_rate: Of Adam; a logit moves by about as much a step.
        on_step: Called after each step with how many there were, and the loss before it.

    Raises:
        MergeError: a setting out of range; parameters that do not fit; a loss that is not finite;
            batches that end before the steps do.
    """
    _check_positive("localize", steps=steps, learning_rate=learning_rate, bias=bias)
    if not 0 <= l1 < jnp.inf:
        raise MergeError(f"localize: expected an l1 of 0 or more, found {l1}")
    flat_base, [flat_expert] = flattened(base, [expert])
    recipe = Recipe("localize_and_stitch", density=density)
    trimmed = merge_params(flat_base, [flat_expert], recipe)
    place = _placement(flat_base)

    @jax.jit
    def first_logits(trimmed: Arrays, base: Arrays) -> Arrays:
        return place(
            {
                name: jnp.where(trimmed[name] != theta.astype(jnp.float32), bias, -bias)
                for name, theta in base.items()
            }
        )

    layers, ones_LxE = (0,) * len(flat_base), jnp.ones((1, 1), jnp.float32)
    logits, losses = _descend(
        "localize",
        functools.partial(mask_gradient, loss, layers),
        first_logits(trimmed, flat_base),
        lambda logits, key: jax.tree.map(jax.nn.sigmoid, logits),
        flat_base,
        [flat_expert],
        iter(batches),
        lambda masks, batches: ones_LxE,
        steps=steps,
        learning_rate=learning_rate,
        l1=l1,
        on_step=on_step,
    )

    @jax.jit
    def select(logits: Arrays, base: Arrays, expert: Arrays) -> Arrays:
        return place(jax.tree.map(lambda s, *pair: jnp.where(s > 0, *pair), logits, expert, base))

    counts = [int(jnp.count_nonzero(leaf > 0)) for leaf in logits.values()]
    return Localized(
        checkpoints.unflatten(select(logits, flat_base, flat_expert)),
        checkpoints.unflatten(logits),
        sum(counts) / max(1, _size(logits)),
        losses,
    )


def learn_shared_mask(
    base: Params,
    experts: Sequence[Params],
    loss: Loss,
    batches: Iterable[Iterable[PyTree]],
    *,
    scale: float = 0.3,
    temperature: float = 0.5,
    initial: float = 0.0,
    steps: int = 2000,
    learning_rate: float = 1e-3,
    seed: int = 0,
    inner_learning_rate: float = 0.0,
    per_layer: bool = True,
    on_step: OnStep = lambda step, loss: None,
) -> SharedMask:
    """Learns which entries of all task vectors a merge needs: the concrete subspace.

    theta = theta_base + m / mean(m) sum_i lambda_i tau_i, the mean being that of a parameter, and
    m = sigmoid((S + logit(u)) / T) with u uniform on (0, 1), drawn for each entry and step: a
    Bernoulli variable, relaxed at temperature T (Maddison et al. 2016, arXiv:1611.00712). Numbers
    follow from the seed, whatever the sharding.

    Tang et al. 2023, arXiv:2312.06173. Without an inner step it is their Concrete Task Arithmetic.
    With one, Concrete AdaMerging: each step the coefficients take a step of Adam from their first
    values, on batches of their own and with the mask as a constant, and S goes down the loss of
    what they then are (no second derivatives, as in FusionBench). There they move by up to 1 a
    step and are not clipped; here they stay in [0, 1], as in AdaMerging. It adds up the losses of
    tasks; here is their mean. `rescaled_mask` is for what follows: AdaMerging with that mask, or
    the merge.

    Besides base and experts there are on the devices, sharded as the base, six models in float32:
    logits, Adam's two moments, the mask, its gradient, and the merge; where a step has several
    batches a seventh, their gradients' sum.

    Args:
        base, experts, loss, batches: As for `search.learn_coefficients`; of an inner step a second
            row of batches each step.
        scale: The coefficients; with inner steps their first values, in [0, 1].
        temperature: T, above 0.
        initial: S at first, of all entries.
        steps: Steps of Adam on S.
        learning_rate: Of these.
        seed: Of u.
        inner_learning_rate: Of the coefficients' step; 0: they stay.
        per_layer: Whether each layer has its own coefficients there.
        on_step: Called after each step with how many there were, and the loss before it.

    Raises:
        MergeError: no experts; a setting out of range; parameters that do not fit; a loss that is
            not finite; batches that end before the steps do.
    """
    import optax

    settings = {"steps": steps, "learning_rate": learning_rate, "temperature": temperature}
    _check_positive("concrete mask", experts=len(experts), **settings)
    if inner_learning_rate < 0 or (inner_learning_rate and not 0 <= scale <= 1):
        raise MergeError(
            "concrete mask: expected an inner_learning_rate of 0 or more, and with it a scale in "
            f"[0, 1], found {inner_learning_rate} and {scale}"
        )
    flat_base, flat_experts = flattened(base, experts)
    patterns, layers = coefficient_rows(list(flat_base), per_layer)
    first_LxE = jnp.full((len(patterns), len(experts)), scale, jnp.float32)
    place, inner = _placement(flat_base), optax.adam(inner_learning_rate)
    state = inner.init(first_LxE)
    slopes = jax.jit(functools.partial(loss_gradient, loss, layers))

    def coefficients(masks: Arrays, batches: Iterator[Iterable[PyTree]]) -> jax.Array:
        nonlocal state
        if not inner_learning_rate:
            return first_LxE
        parts = [
            slopes(first_LxE, flat_base, flat_experts, batch, masks)[1]
            for batch in next(batches, ())
        ]
        if not parts:
            return first_LxE  # The loop says that there are no batches.
        updates, state = inner.update(sum(parts) / len(parts), state)
        return jnp.clip(first_LxE + updates, 0.0, 1.0)

    def draw(logits: Arrays, key: jax.Array) -> Arrays:
        keys = jax.random.split(key, len(logits))
        return {
            name: _rescaled(relaxed_bernoulli(s, jax.random.logistic(k, s.shape), temperature))
            for k, (name, s) in zip(keys, logits.items(), strict=True)
        }

    @jax.jit
    def first_logits(base: Arrays) -> Arrays:
        return place(jax.tree.map(lambda leaf: jnp.full(leaf.shape, initial, jnp.float32), base))

    logits, losses = _descend(
        "concrete mask",
        functools.partial(mask_gradient, loss, layers),
        first_logits(flat_base),
        draw,
        flat_base,
        flat_experts,
        iter(batches),
        coefficients,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        on_step=on_step,
    )
    return SharedMask(checkpoints.unflatten(logits), losses)


def relaxed_bernoulli(logits: jax.Array, noise: jax.Array, temperature: float) -> jax.Array:
    """Computes sigmoid((S + logit(u)) / T): noise is logit(u) = log u - log(1 - u)."""
    return jax.nn.sigmoid((logits + noise) / temperature)


def rescaled_mask(logits: Params) -> Params:
    """Computes sigmoid(S) over its mean, parameter by parameter: the mask after learning.

    FusionBench draws it once more instead, so that its merges vary with the draw.
    """
    return jax.tree.map(lambda leaf: _rescaled(jax.nn.sigmoid(leaf)), logits)


def _rescaled(mask: jax.Array) -> jax.Array:
    return mask / jnp.mean(mask)


def merge_by_mask(
    base: Params,
    experts: Sequence[Params],
    masks: Params,
    coefficients: Mapping[str, Sequence[float]],
) -> Params:
    """Computes theta_base + m sum_i lambda_il tau_i, in the widest dtype of the models.

    Args:
        base, experts: As for `search.learn_coefficients`.
        masks: Nested dict of arrays like the base.
        coefficients: As `search.Learned` has them: by pattern, one of each expert.
    """
    flat_base, flat_experts = flattened(base, experts)
    patterns, layers = coefficient_rows(list(flat_base), EVERYTHING not in coefficients)
    lambdas_LxE = jnp.array([coefficients[pattern] for pattern in patterns], jnp.float32)
    place = _placement(flat_base)

    @jax.jit
    def merge(base: Arrays, experts: list[Arrays], masks: Arrays, lambdas_LxE: jax.Array) -> Arrays:
        merged = masked_merge(layers, lambdas_LxE, base, experts, masks)
        dtypes = {
            name: jnp.result_type(theta, *(expert[name] for expert in experts))
            for name, theta in base.items()
        }
        return place({name: leaf.astype(dtypes[name]) for name, leaf in merged.items()})

    flat_masks = checkpoints.flatten(masks)
    return checkpoints.unflatten(merge(flat_base, flat_experts, flat_masks, lambdas_LxE))


def mask_gradient(
    loss: Loss,
    layers: Sequence[int],
    lambdas_LxE: jax.Array,
    base: Mapping[str, jax.Array],
    experts: Sequence[Mapping[str, jax.Array]],
    masks: Mapping[str, jax.Array],
    batch: PyTree,
) -> tuple[jax.Array, Arrays]:
    """Computes the loss of a merge, and its gradient in the mask.

    Args:
        loss, layers, lambdas_LxE, base, experts, masks, batch: As for `search.loss_gradient`.

    Returns:
        A scalar, and float32 arrays by name.
    """
    merged = masked_merge(layers, lambdas_LxE, base, experts, masks)
    value, gradient = jax.value_and_grad(loss)(checkpoints.unflatten(merged), batch)
    gradient, slopes = checkpoints.flatten(gradient), {}
    # The chain rule by hand, and the barrier, for the reason in `search.loss_gradient`.
    for layer, (name, theta) in zip(layers, base.items(), strict=True):
        arrays = gradient[name], theta, [expert[name] for expert in experts]
        slope, theta, own = jax.lax.optimization_barrier(arrays)
        slopes[name] = slope * weighted_sum(lambdas_LxE[layer], theta, own)
    return value, slopes


def _descend(
    label: str,
    gradient: Callable[..., tuple[jax.Array, Arrays]],
    logits: Arrays,
    masks_of: Callable[[Arrays, jax.Array], Arrays],
    base: Arrays,
    experts: Sequence[Arrays],
    batches: Iterator[Iterable[PyTree]],
    coefficients: Callable[[Arrays, Iterator[Iterable[PyTree]]], jax.Array],
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    l1: float = 0.0,
    on_step: OnStep,
) -> tuple[Arrays, list[float]]:
    """Takes steps of Adam on logits.

    Args:
        label: For messages.
        gradient: Of the mask, as `mask_gradient` without its first two arguments.
        logits: By name; they are given up.
        masks_of: (logits, key) -> masks, differentiable.
        base, experts: Arrays by name.
        batches: For each step those that are averaged.
        coefficients: (masks, batches) -> lambdas_LxE of a step.
        steps, learning_rate: Of Adam.
        seed: Of the keys.
        l1: What the mean of the masks costs.
        on_step: As for `localize`.

    Returns:
        The logits, and the loss before each step.
    """
    import optax

    size, place = _size(logits), _placement(base)
    optimizer = optax.chain(optax.scale(float(size)), optax.adam(learning_rate))
    state, losses = optimizer.init(logits), []
    root = jax.random.key(seed, impl="threefry2x32")

    @jax.jit
    def slopes_of(lambdas_LxE: jax.Array, *arguments: PyTree) -> tuple[jax.Array, Arrays]:
        value, slopes = gradient(lambdas_LxE, *arguments)
        return value, place(slopes)

    @jax.jit
    def draw(logits: Arrays, key: jax.Array) -> Arrays:
        return place(masks_of(logits, key))

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: Arrays, slopes: Arrays) -> Arrays:
        return place(jax.tree.map(jnp.add, total, slopes))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(
        logits: Arrays, state: PyTree, key: jax.Array, total: Arrays, count: int
    ) -> tuple[Arrays, PyTree]:
        _, pull = jax.vjp(lambda each: masks_of(each, key), logits)
        [slopes] = pull(jax.tree.map(lambda leaf: leaf / count + l1 / size, total))
        updates, state = optimizer.update(place(slopes), state)
        return place(optax.apply_updates(logits, updates)), state

    for step in range(steps):
        key = jax.random.fold_in(root, step)
        masks = draw(logits, key)
        lambdas_LxE = coefficients(masks, batches)
        values, total = [], None
        for batch in next(batches, ()):
            value, slopes = slopes_of(lambdas_LxE, base, experts, masks, batch)
            values.append(value)
            total = slopes if total is None else add(total, slopes)
        losses.append(mean_loss(label, values, step, steps))
        del masks
        logits, state = update(logits, state, key, total, len(values))
        on_step(step + 1, losses[-1])
    return logits, losses


def _placement(base: Mapping[str, jax.Array]) -> Callable[[Arrays], Arrays]:
    """Returns a function that shards arrays of a program by name as the base's are."""
    shardings = {
        name: leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
        for name, leaf in base.items()
    }
    return lambda tree: {name: constrained(leaf, shardings[name]) for name, leaf in tree.items()}


def _size(arrays: Mapping[str, jax.Array]) -> int:
    return sum(leaf.size for leaf in arrays.values())


def _check_positive(label: str, **settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < float("inf"):
            raise MergeError(f"{label}: expected {name} above 0, found {value}")
