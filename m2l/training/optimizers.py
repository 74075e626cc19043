"""Adafactor as T5X and the papers use it, and the learning rates it is driven with."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m2l.errors import UnknownNameError

Schedule = Callable[[int], float]


def adafactor() -> optax.GradientTransformation:
    """Adafactor without momentum or weight decay: factored, clipped, scaled by each parameter.

    The learning rate is left out: the training step multiplies it in, as a value that can change
    from step to step and from run to run without another compilation.

    Returns:
        A transformation whose updates are to be multiplied by the learning rate and added.

    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost"
    (2018), algorithm 5 with beta2 = 1 - t^-0.8, d = 1, epsilon = (1e-30, 1e-3).
    """
    return optax.chain(
        optax.scale_by_factored_rms(
            factored=True, decay_rate=0.8, min_dim_size_to_factor=128, epsilon=1e-30
        ),
        _descend_in_proportion(clip=1.0, least=1e-3),
    )


def _descend_in_proportion(clip: float, least: float) -> optax.GradientTransformation:
    """-update * max(least, RMS(parameter)) / max(1, RMS(update) / clip), leaf by leaf.

    In one factor, where optax has three: a step of a large model takes as long as its passes over
    the parameters.
    """

    def factor(update: jax.Array, parameter: jax.Array) -> jax.Array:
        return -jnp.maximum(least, _rms(parameter)) / jnp.maximum(1.0, _rms(update) / clip)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, p: factor(u, p) * u, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {"adafactor": adafactor}


def constant(peak: float, steps: int, warmup_steps: int) -> Schedule:
    """A linear rise from 0 to `peak` over `warmup_steps`, then `peak`."""
    del steps
    return lambda step: peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak


def cosine(peak: float, steps: int, warmup_steps: int) -> Schedule:
    """A linear rise from 0 to `peak` over `warmup_steps`, then half a cosine down to 0."""

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return rate


SCHEDULES: dict[str, Callable[[float, int, int], Schedule]] = {
    "constant": constant,
    "cosine": cosine,
}


def optimizer(name: str) -> optax.GradientTransformation:
    """The optimizer of that name; UnknownNameError if there is none."""
    if name not in OPTIMIZERS:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]()


def schedule(name: str, *, peak: float, steps: int, warmup_steps: int) -> Schedule:
    """The learning rate at each step (counted from 0), for a run of `steps` steps."""
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    return SCHEDULES[name](peak, steps, warmup_steps)
