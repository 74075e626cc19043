"""Adafactor as T5X and the papers use it, AdamW, SGD; and the schedules of learning rates.

An optimizer's updates are to be multiplied by the learning rate and added: the training step does
so with a rate that is a value, which can change from step to step and from run to run without
another compilation.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from m2l.errors import ConfigError, UnknownNameError
from m2l.models.fields import FRACTION, NOT_NEGATIVE, check_fields
from m2l.typing import Params, PyTree

Schedule = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer and its settings: hashable, the key of a compiled step.

    Attributes:
        name: A key of OPTIMIZERS.
        weight_decay: AdamW's: the share of the learning rate by which every matrix shrinks.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        momentum: SGD's; 0: none.
        clip: The largest norm that the gradient of all parameters may have; 0: any.
        freeze: Regular expressions; a parameter that one of them matches anywhere in its name
            ("encoder/", "token_embedder$") is not changed, and has no optimizer state.
        ema: The decay of a moving average of the parameters, which is kept beside them; 0: none.

    Raises:
        UnknownNameError: There is no such optimizer.
        ConfigError: A number out of range, or an invalid regular expression.
    """

    name: str = "adafactor"
    weight_decay: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    beta1: float = dataclasses.field(default=0.9, metadata=FRACTION)
    beta2: float = dataclasses.field(default=0.999, metadata=FRACTION)
    momentum: float = dataclasses.field(default=0.0, metadata=FRACTION)
    clip: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    freeze: tuple[str, ...] = ()
    ema: float = dataclasses.field(default=0.0, metadata=FRACTION)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.name not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.name, OPTIMIZERS)
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"freeze: {pattern!r} is not a regular expression: {error}"
                ) from error

    def trained(self, params: Params) -> Params:
        """Returns True for every parameter that is trained, False for every frozen one.

        Raises:
            ConfigError: A pattern that matches no parameter, or nothing left to train.
        """
        unused = set(self.freeze)

        def is_trained(path: jax.tree_util.KeyPath, leaf: object) -> bool:
            name = "/".join(part.key for part in path)
            matching = {pattern for pattern in self.freeze if re.search(pattern, name)}
            unused.difference_update(matching)
            return not matching

        mask = jax.tree.map_with_path(is_trained, params)
        if unused:
            raise ConfigError(f"freeze: no parameter has a name with {min(unused)!r} in it")
        if not any(jax.tree.leaves(mask)):
            raise ConfigError("freeze: every parameter is frozen, so there is nothing to train")
        return mask

    def transformation(self) -> optax.GradientTransformation:
        """Returns the optimizer itself, without state of frozen parameters; ignore their update."""
        transformation = OPTIMIZERS[self.name](self)
        return optax.masked(transformation, self.trained) if self.freeze else transformation


def adafactor() -> optax.GradientTransformation:
    """Returns Adafactor without momentum or weight decay: factored, clipped, scaled by parameter.

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
    """Computes -update * max(least, RMS(parameter)) / max(1, RMS(update) / clip) of each leaf.

    In one factor, where optax has three: a step of a large model takes as long as its passes over
    the parameters.
    """

    def factor(update: jax.Array, parameter: jax.Array) -> jax.Array:
        return -jnp.maximum(least, _rms(parameter)) / jnp.maximum(1.0, _rms(update) / clip)

    def update(
        updates: Params, state: PyTree, params: Params | None = None
    ) -> tuple[Params, PyTree]:
        return jax.tree.map(lambda u, p: factor(u, p) * u, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def adamw(weight_decay: float, beta1: float, beta2: float) -> optax.GradientTransformation:
    """Returns AdamW: bias-corrected moments, and decoupled weight decay of matrices alone.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2017), algorithm 2, with
    epsilon 1e-8; the decay is multiplied by the learning rate, as in PyTorch and optax.
    """
    decay = optax.add_decayed_weights(
        weight_decay, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    )
    return optax.chain(optax.scale_by_adam(beta1, beta2, eps=1e-8), decay, optax.scale(-1.0))


def sgd(momentum: float) -> optax.GradientTransformation:
    """Returns gradient descent along velocity = momentum * velocity + gradient."""
    return optax.chain(optax.trace(momentum) if momentum else optax.identity(), optax.scale(-1.0))


OPTIMIZERS: Mapping[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    "adafactor": lambda _: adafactor(),
    "adamw": lambda settings: adamw(settings.weight_decay, settings.beta1, settings.beta2),
    "sgd": lambda settings: sgd(settings.momentum),
}


# Not optax.schedules: these compute in float32 on the device, 0.3 ms a step or more, and half of
# their rates differ in the last bits.
def constant(peak: float, steps: int, warmup_steps: int) -> Schedule:
    """Returns a linear rise from 0 to `peak` over `warmup_steps`, then `peak`."""
    del steps
    return lambda step: peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak


def cosine(peak: float, steps: int, warmup_steps: int) -> Schedule:
    """Returns a linear rise from 0 to `peak` over `warmup_steps`, then half a cosine down to 0."""

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return rate


def linear(peak: float, steps: int, warmup_steps: int) -> Schedule:
    """Returns a linear rise from 0 to `peak` over `warmup_steps`, then a line down to 0."""

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        return peak * max(0.0, steps - step) / max(1, steps - warmup_steps)

    return rate


def rsqrt(peak: float, steps: int, warmup_steps: int) -> Schedule:
    """Returns a linear rise from 0 to `peak`, then peak * sqrt(warmup_steps / step).

    T5's pretraining is peak 0.01 after 10,000 steps of `peak` (its rise is left out there).
    Source: Raffel et al. (2020), section 3.1.2; Vaswani et al. (2017), equation 3.
    """
    del steps
    first = max(1, warmup_steps)
    return lambda step: peak * min((step + 1) / first, math.sqrt(first / (step + 1)))


SCHEDULES: dict[str, Callable[[float, int, int], Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "rsqrt": rsqrt,
}


def schedule(name: str, *, peak: float, steps: int, warmup_steps: int) -> Schedule:
    """Returns the learning rate as a function of the step, from 0, for a run of `steps` steps."""
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    return SCHEDULES[name](peak, steps, warmup_steps)
