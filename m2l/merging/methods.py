"""The merge methods: each one pure function of arrays, elementwise, that reads like its formula.

Every function works on float32 arrays of one shape, whatever the shape: a flat block of a
checkpoint that is streamed, a parameter in memory, a shard of it. Sums run over the experts in the
recipe's order. What a function takes says what it needs:

    base        the base model's parameters
    experts     the experts' parameters, one array each
    thresholds  per expert, the magnitude from which on an entry is kept (see statistics.py)
    kept        per expert, which entries DARE keeps (see randomness.py)

and its other arguments are hyper-parameters. To add a method, add a function here.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Sequence[jax.Array]
REQUIRED = "required"
METHODS: dict[str, "Method"] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge method and what it asks for.

    Attributes:
        name: As recipes call it.
        function: The arithmetic.
        hyper_parameters: Each with its default, or REQUIRED.
        takes: The arguments of `function`.
        summary: What it does, in one line.
    """

    name: str
    function: Callable[..., jax.Array]
    hyper_parameters: Mapping[str, Any]
    takes: tuple[str, ...]
    summary: str

    @property
    def needs_base(self) -> bool:
        """Whether it works on task vectors."""
        return "base" in self.takes

    @property
    def trims(self) -> bool:
        """Whether it keeps the largest entries of a task vector, and so needs thresholds."""
        return "thresholds" in self.takes

    @property
    def draws(self) -> bool:
        """Whether it drops entries at random, and so needs masks."""
        return "kept" in self.takes

    def before_trimming(
        self, base: jax.Array, experts: Arrays, kept: Arrays | None, drop_rate: float | None
    ) -> list[jax.Array]:
        """The task vectors whose magnitudes the thresholds are taken over."""
        taus = task_vectors(base, experts)
        return drop(taus, kept, drop_rate) if self.draws else taus


def method(**hyper_parameters: Any) -> Callable[[Callable], Callable]:
    """Registers a function as the merge method of its name, with these hyper-parameters."""

    def register(function: Callable) -> Callable:
        name, summary = function.__name__, inspect.getdoc(function).splitlines()[0]
        takes = tuple(inspect.signature(function).parameters)
        METHODS[name] = Method(name, function, hyper_parameters, takes, summary)
        return function

    return register


def add(arrays: Arrays) -> jax.Array:
    """The sum, from the first array to the last."""
    return functools.reduce(jnp.add, arrays)


def task_vectors(base: jax.Array, experts: Arrays) -> list[jax.Array]:
    """tau_i = theta_i - theta_base (Ilharco et al. 2023, arXiv:2212.04089)."""
    return [expert - base for expert in experts]


def trim(taus: Arrays, thresholds: jax.Array) -> list[jax.Array]:
    """Keeps the entries whose magnitude reaches the expert's threshold; ties are all kept."""
    return [
        jnp.where(jnp.abs(tau) >= threshold, tau, 0)
        for tau, threshold in zip(taus, thresholds, strict=True)
    ]


def drop(taus: Arrays, kept: Arrays, drop_rate: float) -> list[jax.Array]:
    """Drops entries and rescales the rest by 1 / (1 - p) (Yu et al. 2024, arXiv:2311.03099)."""
    rescale = np.float32(1 / (1 - drop_rate))
    return [jnp.where(keep, tau * rescale, 0) for tau, keep in zip(taus, kept, strict=True)]


def elect_and_average(taus: Arrays) -> jax.Array:
    """Elects each entry's sign by mass, then averages the task vectors that agree with it.

    gamma = sgn(sum_i tau_i); the result is the mean of {tau_i : sgn(tau_i) = gamma}, and 0 where
    there is none, as where the sum cancels exactly (Yadav et al. 2023, arXiv:2306.01708).
    """
    elected = jnp.sign(add(taus))
    agreeing = [elected * tau > 0 for tau in taus]
    total = add([jnp.where(agrees, tau, 0) for agrees, tau in zip(agreeing, taus, strict=True)])
    count = add([agrees.astype(jnp.float32) for agrees in agreeing])
    return total / jnp.maximum(count, 1)


@method(weights=None)
def average(experts: Arrays, weights: jax.Array) -> jax.Array:
    """The (weighted) mean of the experts' parameters: sum_i w_i theta_i / sum_i w_i.

    Without weights this is the uniform soup of Wortsman et al. 2022, arXiv:2203.05482.
    """
    total = add([weight * expert for weight, expert in zip(weights, experts, strict=True)])
    # Dividing by a scalar, XLA multiplies by its rounded reciprocal; an array it cannot see through
    # is divided by.
    return total / jax.lax.optimization_barrier(jnp.broadcast_to(add([*weights]), total.shape))


@method(scale=1.0, weights=None)
def task_arithmetic(
    base: jax.Array, experts: Arrays, scale: jax.Array, weights: jax.Array
) -> jax.Array:
    """The base plus the scaled sum of the task vectors: theta_base + lambda sum_i w_i tau_i.

    Ilharco et al. 2023, arXiv:2212.04089. A sum, not a mean: with n experts lambda = 1 / n is the
    average. Negative weights forget.
    """
    taus = task_vectors(base, experts)
    return base + scale * add([weight * tau for weight, tau in zip(weights, taus, strict=True)])


@method(density=0.2, scale=1.0)
def ties(base: jax.Array, experts: Arrays, thresholds: jax.Array, scale: jax.Array) -> jax.Array:
    """Keeps the largest entries of each task vector, elects signs, averages what agrees.

    theta_base + lambda tau, Yadav et al. 2023, arXiv:2306.01708.
    """
    taus = trim(task_vectors(base, experts), thresholds)
    return base + scale * elect_and_average(taus)


@method(drop_rate=REQUIRED, density=1.0, scale=1.0)
def dare_ties(
    base: jax.Array,
    experts: Arrays,
    kept: Arrays,
    thresholds: jax.Array,
    drop_rate: float,
    scale: jax.Array,
) -> jax.Array:
    """Drops entries of each task vector at random, rescales, then elects and averages as TIES.

    Yu et al. 2024, arXiv:2311.03099. Density 1 trims nothing; below 1 the rescaled task vectors are
    trimmed as TIES does, which is the authors' own code.
    """
    taus = trim(drop(task_vectors(base, experts), kept, drop_rate), thresholds)
    return base + scale * elect_and_average(taus)
