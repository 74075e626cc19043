"""What a merge method is: a function, what it takes, and the steps that several are made of."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Arrays = Sequence[jax.Array]
REQUIRED = "required"
METHODS: dict[str, "Method"] = {}


@dataclasses.dataclass(frozen=True)
class Consensus:
    """How TIES and its kin make one task vector of several.

    Attributes:
        merge: What becomes of the entries that agree with the elected sign: their "mean", "sum" or
            "max" (the one of the largest magnitude).
        weighted: Whether the experts' weights count in the election.
    """

    merge: str = "mean"
    weighted: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge method and what it asks for.

    Attributes:
        name: As recipes call it.
        function: The arithmetic.
        hyper_parameters: Each with its default, or REQUIRED.
        takes: The arguments of `function`.
        summary: What it does, in one line.
        experts: How many experts it merges; None: any number.
        coefficients: Makes `coefficients` of inner products, if the method takes them: of the task
            vectors', [experts, experts], or, without a base, of the experts'. Its other arguments
            are hyper-parameters, and numpy or jax.numpy to compute with.
        statistic: The statistic that must lie beside each expert: "fisher", "gram" or None.
        whole: Whether it needs a whole parameter at once, in its shape: no block will do.
    """

    name: str
    function: Callable[..., jax.Array]
    hyper_parameters: Mapping[str, Any]
    takes: tuple[str, ...]
    summary: str
    experts: int | None = None
    coefficients: Callable[..., Any] | None = None
    statistic: str | None = None
    whole: bool = False

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

    @property
    def elects(self) -> bool:
        """Whether signs are elected."""
        return "consensus" in self.takes

    @property
    def ranks(self) -> bool:
        """Whether an entry's drop rate depends on the rank of its magnitude."""
        return "epsilon" in self.hyper_parameters

    def before_trimming(
        self, base: jax.Array, experts: Arrays, kept: Arrays | None, rescale: Arrays | None
    ) -> list[jax.Array]:
        """The task vectors whose magnitudes the thresholds are taken over."""
        taus = task_vectors(base, experts)
        return drop(taus, kept, rescale) if self.draws else taus

    def sparsified(
        self, base: jax.Array, experts: Arrays, given: Mapping[str, Any]
    ) -> list[jax.Array]:
        """The task vectors as the method adds or elects them: dropped, trimmed, or as they are."""
        taus = self.before_trimming(base, experts, given.get("kept"), given.get("rescale"))
        if "ceilings" in self.takes:
            return between(taus, given["thresholds"], given["ceilings"])
        return trim(taus, given["thresholds"]) if self.trims else taus


def method(
    *,
    experts: int | None = None,
    coefficients: Callable[..., Any] | None = None,
    statistic: str | None = None,
    whole: bool = False,
    **hyper_parameters: Any,
) -> Callable[[Callable], Callable]:
    """Registers a function as the merge method of its name, with these hyper-parameters."""

    def register(function: Callable) -> Callable:
        name, summary = function.__name__, inspect.getdoc(function).splitlines()[0]
        takes = tuple(inspect.signature(function).parameters)
        METHODS[name] = Method(
            name,
            function,
            hyper_parameters,
            takes,
            summary,
            experts,
            coefficients,
            statistic,
            whole,
        )
        return function

    return register


def add(arrays: Arrays) -> jax.Array:
    """The sum, from the first array to the last."""
    return functools.reduce(jnp.add, arrays)


def scaled(factors: Sequence[jax.Array] | jax.Array, arrays: Arrays) -> list[jax.Array]:
    """Each array times its factor."""
    return [factor * array for factor, array in zip(factors, arrays, strict=True)]


def divided(total: jax.Array, by: jax.Array) -> jax.Array:
    """total / by, correctly rounded, for a scalar `by`."""
    # Dividing by a scalar, XLA multiplies by its rounded reciprocal; an array it cannot see through
    # is divided by.
    return total / jax.lax.optimization_barrier(jnp.broadcast_to(by, total.shape))


def task_vectors(base: jax.Array, experts: Arrays) -> list[jax.Array]:
    """tau_i = theta_i - theta_base (Ilharco et al. 2023, arXiv:2212.04089)."""
    return [expert - base for expert in experts]


def trim(taus: Arrays, thresholds: jax.Array) -> list[jax.Array]:
    """Keeps the entries whose magnitude reaches the expert's threshold; ties are all kept."""
    return [
        jnp.where(jnp.abs(tau) >= threshold, tau, 0)
        for tau, threshold in zip(taus, thresholds, strict=True)
    ]


def between(taus: Arrays, thresholds: jax.Array, ceilings: jax.Array) -> list[jax.Array]:
    """Keeps the entries whose magnitude reaches the threshold but not the ceiling."""
    return [
        jnp.where(jnp.abs(tau) < ceiling, tau, 0)
        for tau, ceiling in zip(trim(taus, thresholds), ceilings, strict=True)
    ]


def drop(taus: Arrays, kept: Arrays, rescale: Arrays | jax.Array) -> list[jax.Array]:
    """Drops entries and multiplies the rest: by 1 / (1 - p), the task vector stays in expectation.

    Yu et al. 2024, arXiv:2311.03099.
    """
    pairs = zip(kept, scaled(rescale, taus), strict=True)
    return [jnp.where(keep, tau, 0) for keep, tau in pairs]


def elect_and_merge(
    taus: Arrays, weights: jax.Array, zero_sign: jax.Array, consensus: Consensus
) -> jax.Array:
    """Elects each entry's sign by mass, then merges the task vectors that agree with it.

    gamma = sgn(sum_i tau_i); by default the result is the mean of {tau_i : sgn(tau_i) = gamma}.
    Yadav et al. 2023, arXiv:2306.01708.

    Args:
        taus: The task vectors, trimmed.
        weights: [experts]; the mean is sum_i w_i tau_i / sum_i w_i over those that agree.
        zero_sign: The sign elected where the masses cancel exactly; with 0 the result is 0 there.
        consensus: What is done with those that agree, and whether weights vote.
    """
    weighted = scaled(weights, taus)
    votes = weighted if consensus.weighted else taus
    mass = add(votes)
    mass = jnp.where(mass == 0, zero_sign, mass)
    agreeing = [((vote > 0) & (mass > 0)) | ((vote < 0) & (mass < 0)) for vote in votes]
    found = [jnp.where(agrees, tau, 0) for agrees, tau in zip(agreeing, weighted, strict=True)]
    if consensus.merge == "max":
        return jnp.sign(mass) * functools.reduce(jnp.maximum, [jnp.abs(tau) for tau in found])
    total = add(found)
    if consensus.merge == "sum":
        return total
    count = add([jnp.where(agrees, w, 0) for agrees, w in zip(agreeing, weights, strict=True)])
    return total / jnp.where(count == 0, 1, count)
