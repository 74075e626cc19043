"""Merge methods that compare the task vectors entry by entry, and select by what they find."""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from m2l.merging.method_registry import Interval, method
from m2l.merging.methods import (
    Arrays,
    Consensus,
    Density,
    Scale,
    Weights,
    add,
    divided,
    elect_and_merge,
    scaled,
    task_vectors,
    trim,
    zero_weights,
)

Changed = Annotated[
    float,
    Interval(0),
    "Entries that changed by more count as changed.",
]
MaskThreshold = Annotated[
    float,
    Interval(0),
    "lambda_t: how far the sum of all task vectors may be from one, in its magnitude, for a mask.",
]
Agreement = Annotated[
    float,
    Interval(0),
    "k: how many experts must need an entry for it to be kept; at most all.",
]
Reinforcement = Annotated[
    float,
    Interval(0),
    "r: how much more what one expert alone changed counts, the more it shares with others.",
]
OverlapLimit = Annotated[
    float,
    Interval(0),
    "alpha: the most that what an expert shares, relative to what it does not, counts.",
]


@method
def ram(base: jax.Array, experts: Arrays, epsilon: Changed = 1e-5) -> jax.Array:
    """Averages what several experts changed, and takes what one alone changed as it is.

    theta_base + sum_i m_i tau_i / max(1, sum_i m_i), m_i = 1 where |tau_i| > epsilon: Reinforced
    Agent Merging, arXiv:2601.13572, as mergekit has it.
    """
    taus = task_vectors(base, experts)
    masks = [jnp.abs(tau) > epsilon for tau in taus]
    total = add([jnp.where(mask, tau, 0) for mask, tau in zip(masks, taus, strict=True)])
    return base + total / jnp.maximum(_count(masks), 1)


def _change_counts(taus: Arrays, epsilon: float | jax.Array) -> jax.Array:
    """Returns of each expert how many entries others changed as well, and how many not: [2, n]."""
    masks = [jnp.abs(tau) > epsilon for tau in taus]
    several = _count(masks) > 1
    kinds = [[mask & several for mask in masks], [mask & ~several for mask in masks]]
    return jnp.stack([jnp.stack([_sum(mask) for mask in kind]) for kind in kinds])


def _sum(array: jax.Array) -> jax.Array:
    return jnp.sum(array.astype(jnp.float32))


def _reinforced(
    counts: jax.Array | np.ndarray,
    reinforcement: float | jax.Array,
    overlap_limit: float | jax.Array,
    xp: ModuleType,
    **_: object,
) -> jax.Array | np.ndarray:
    shared, alone = counts
    overlap = shared / xp.maximum(alone, 1e-9)
    return 1 + reinforcement * xp.minimum(overlap, overlap_limit)


@method(sums=_change_counts, coefficients=_reinforced)
def ram_plus(
    base: jax.Array,
    experts: Arrays,
    coefficients: jax.Array,
    reinforcement: Reinforcement = 0.1,
    overlap_limit: OverlapLimit = 0.2,
    epsilon: Changed = 1e-5,
) -> jax.Array:
    """Does as `ram`, and takes more of what an expert alone changed, the more it shares otherwise.

    That is multiplied by 1 + r min(alpha, shared / alone), counts of an expert's changed entries in
    the model or, by scope, the parameter: RAM+, arXiv:2601.13572; mergekit's ramplus_tl has the
    latter.
    """
    taus = task_vectors(base, experts)
    masks = [jnp.abs(tau) > epsilon for tau in taus]
    count = _count(masks)
    factors = [jnp.where(count > 1, 1, factor) for factor in coefficients]
    total = add(
        [
            jnp.where(mask, factor * tau, 0)
            for mask, factor, tau in zip(masks, factors, taus, strict=True)
        ]
    )
    return base + total / jnp.maximum(count, 1)


def _count(masks: Arrays) -> jax.Array:
    """Returns how many masks there are of each entry, float32."""
    return add([mask.astype(jnp.float32) for mask in masks])


def _tall_masks(taus: Arrays, total: jax.Array, threshold: float | jax.Array) -> list[jax.Array]:
    """Returns of each task vector which entries it needs of their sum, and does not mind there."""
    return [jnp.abs(tau) >= threshold * jnp.abs(total - tau) for tau in taus]


@method(check=zero_weights)
def tall_masks(
    base: jax.Array,
    experts: Arrays,
    mask_threshold: MaskThreshold = 0.4,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Keeps of the sum of the task vectors what an expert needs: weights 1,0,0 make the first's.

    theta_base + lambda sum_i w_i m_i tau / sum_i w_i, tau = sum_j tau_j and m_i = 1 where |tau_i|
    >= lambda_t |tau - tau_i|, Wang et al. 2024, arXiv:2405.07813, whose models have w of one
    expert, and who choose lambda_t of 0.2 to 0.6 by validation data. Equal weights average these.
    """
    taus = task_vectors(base, experts)
    total = add(taus)
    masks = _tall_masks(taus, total, mask_threshold)
    return base + scale * _averaged(masks, weights, weights, total)


def _averaged(
    masks: Arrays, factors: Sequence[float] | jax.Array, weights: Sequence[float], vector: jax.Array
) -> jax.Array:
    """Returns sum_i f_i m_i tau / sum_i w_i of a task vector and masks of it."""
    parts = [
        jnp.where(mask, factor * vector, 0) for mask, factor in zip(masks, factors, strict=True)
    ]
    return divided(add(parts), add([*weights]))


@method(experts=Interval(low=2))
def consensus_ta(
    base: jax.Array,
    experts: Arrays,
    mask_threshold: MaskThreshold = 0.4,
    agreement: Agreement = 2.0,
    scale: Scale = 1.0,
) -> jax.Array:
    """Adds the task vectors, without the entries that fewer than k experts need: k = `agreement`.

    theta_base + lambda sum_i tau_i where sum_i m_i >= k, with the m_i of `tall_masks`: Consensus
    Task Arithmetic, Wang et al. 2024, arXiv:2405.07813, who take k = 2: what nobody needs, and what
    one alone needs, is left out.
    """
    taus = task_vectors(base, experts)
    total = add(taus)
    needed = _count(_tall_masks(taus, total, mask_threshold))
    return base + scale * jnp.where(needed >= agreement, total, 0)


@method
def localize_and_stitch(
    base: jax.Array,
    experts: Arrays,
    thresholds: jax.Array,
    density: Density = 0.05,
    scale: Scale = 1.0,
) -> jax.Array:
    """Keeps the few largest entries of each task vector, and averages these where they overlap.

    theta_base + lambda sum_i m_i tau_i / max(1, sum_i m_i), m_i = 1 for the density-th largest
    |tau_i| of the model, if above 0: He et al. 2024, arXiv:2408.13656, without data. They take 0.05
    for language and 0.1 for vision, of layers alone (--exclude says what else stays the base's). Of
    experts whose masks `m2l mask localize` learned, density is 1.
    """
    taus = trim(task_vectors(base, experts), thresholds)
    return base + scale * add(taus) / jnp.maximum(_count([tau != 0 for tau in taus]), 1)


def _spread(taus: Arrays) -> list[jax.Array]:
    """Returns n times the variance of each entry over the experts, once for each."""
    # What is multiplied is rounded before it is added, in every program.
    rounded = jax.lax.optimization_barrier
    mean = rounded(divided(add(taus), jnp.float32(len(taus))))
    deviations = [tau - mean for tau in taus]
    return [add([rounded(each * each) for each in deviations])] * len(taus)


def _selected(taus: Arrays, thresholds: jax.Array) -> list[jax.Array]:
    triples = zip(taus, _spread(taus), thresholds, strict=True)
    return [jnp.where(spread >= threshold, tau, 0) for tau, spread, threshold in triples]


def _squares(taus: Arrays, thresholds: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(tau * tau) for tau in _selected(taus, thresholds)])


def _shares(squares: jax.Array | np.ndarray, xp: ModuleType, **_: object) -> jax.Array | np.ndarray:
    total = squares.sum()
    return xp.where(total > 0, squares / xp.where(total > 0, total, 1), 1 / len(squares))


@method(scope="tensor", magnitudes=_spread, sums=_squares, coefficients=_shares)
def sce(
    base: jax.Array,
    experts: Arrays,
    thresholds: jax.Array,
    zero_sign: jax.Array,
    consensus: Consensus,
    coefficients: jax.Array,
    density: Density = 1.0,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Selects entries that vary most over the experts, calculates weights, erases minority signs.

    theta_base + lambda sum_i w_i s_i tau_i / sum_i w_i s_i over those that agree with the elected
    sign, s_i being expert i's share of the sum of squares of what was selected: Wan et al. 2024,
    FuseChat, arXiv:2408.07990, who select and weigh matrix by matrix. Below density 1 entries that
    do not vary are not selected.
    """
    taus = _selected(task_vectors(base, experts), thresholds)
    return base + scale * elect_and_merge(taus, weights * coefficients, zero_sign, consensus)


def _unified(taus: Arrays) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the largest entries of the elected signs, and of each expert where it agrees."""
    sign = jnp.sign(add(taus))
    agreeing = [tau * sign > 0 for tau in taus]
    largest = [
        jnp.where(agrees, jnp.abs(tau), 0) for agrees, tau in zip(agreeing, taus, strict=True)
    ]
    return sign * functools.reduce(jnp.maximum, largest), agreeing


def _norms(taus: Arrays) -> jax.Array:
    """Returns the L1 norms of the task vectors, and of their parts of the unified one: [2, n]."""
    unified, agreeing = _unified(taus)
    own = [jnp.where(agrees, jnp.abs(unified), 0) for agrees in agreeing]
    return jnp.stack([jnp.stack([_sum(jnp.abs(a)) for a in arrays]) for arrays in (taus, own)])


def _rescalers(
    norms: jax.Array | np.ndarray, xp: ModuleType, **_: object
) -> jax.Array | np.ndarray:
    return norms[0] / xp.where(norms[1] > 0, norms[1], 1)


@method(sums=_norms, coefficients=_rescalers, check=zero_weights)
def emr(
    base: jax.Array,
    experts: Arrays,
    coefficients: jax.Array,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Elects one task vector, masks and rescales it for an expert: weights 1,0,0 for the first.

    theta_base + lambda sum_i w_i r_i m_i tau / sum_i w_i, where tau has the sign of sum_j tau_j and
    the largest magnitude of those that agree, m_i = 1 where tau_i does, and r_i = sum |tau_i| / sum
    |m_i tau| over the model: Huang et al. 2024, EMR-Merging, arXiv:2405.17461, whose models have w
    of one expert. Equal weights average these; tau alone is `ties` of density 1 and consensus max.
    """
    unified, agreeing = _unified(task_vectors(base, experts))
    return base + scale * _averaged(agreeing, weights * coefficients, weights, unified)


def _scores(taus: Arrays, lowest: jax.Array, highest: jax.Array) -> list[jax.Array]:
    """Returns how an entry does among those of its expert, and among the experts' there."""
    total, scores = add(taus), []
    for tau, low, high in zip(taus, lowest, highest, strict=True):
        share = (jnp.clip(jnp.abs(tau), low, high) - low) / jnp.maximum(high - low, 1e-30)
        # Of many experts the scores, of which norms alone count, are smaller by a factor.
        exponent = len(taus) * jnp.square(share) - max(0, len(taus) - 80)
        score = jnp.exp(exponent) * jnp.tanh(tau * total)
        scores.append(jnp.maximum(score, 0))
    return scores


@method(magnitudes=_scores)
def pcb(
    base: jax.Array,
    experts: Arrays,
    lowest: jax.Array,
    highest: jax.Array,
    thresholds: jax.Array,
    largest: jax.Array,
    density: Density = 0.1,
    scale: Scale = 1.0,
    weights: Weights = (),
) -> jax.Array:
    """Lets parameters compete within each task and between tasks, and averages by their scores.

    theta_base + lambda sum_i w_i b_i tau_i / sum_i w_i b_i; b_i = exp(n norm(|tau_i|)^2) tanh(tau_i
    sum_j tau_j), 0 below its density-th largest, and from there on norm(b_i); norm(x) runs from 0
    for the least to 1 for the most. Du et al. 2024, PCB-Merging, arXiv:2410.02396, by their code:
    of |tau_i| one in 10,000 at both ends is clamped (rounded down for the least, up for the
    largest); but no score is below 0.
    """
    taus, entries, shares = task_vectors(base, experts), [], []
    limits = zip(lowest, highest, thresholds, largest, strict=True)
    pairs = zip(taus, _scores(taus, lowest, highest), strict=True)
    for (tau, score), (low, high, least, most) in zip(pairs, limits, strict=True):
        entries.append(jnp.sign(tau) * jnp.clip(jnp.abs(tau), low, high))
        share = (score - least) / jnp.maximum(most - least, 1e-30)
        shares.append(jnp.where(score > least, share, 0))
    shares = scaled(weights, shares)
    total = add(shares)
    merged = add([share * entry for share, entry in zip(shares, entries, strict=True)])
    return base + scale * (merged / jnp.where(total == 0, 1, total))
