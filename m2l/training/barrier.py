"""The loss barrier between two models: how much higher it is on the line between them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from m2l import models
from m2l.training import losses
from m2l.training.state import Batch
from m2l.typing import Params


def losses_on_line(
    config: models.Config, start: Params, end: Params, batches: Sequence[Batch], points: int
) -> list[float]:
    """Computes the mean loss of a target token, in nats, at points of the line of two models.

    Args:
        config: Of both.
        start: The parameters at 0.
        end: Those at 1.
        batches: Of packed or unpacked examples, as `pipeline.training_batches` yields.
        points: How many, both ends included, equally far apart; 2 or more.
    """
    values = []
    for place in range(points):
        share = place / (points - 1)
        params = _between(start, end, share)
        parts = [jax.device_get(_sums(config, params, batch)) for batch in batches]
        # Summed in float64 on the host.
        loss, weight = (sum(float(part[name]) for part in parts) for name in ("loss", "weight"))
        values.append(loss / max(weight, 1.0))
    return values


def barrier(values: Sequence[float]) -> float:
    """Returns the most that a loss on a line is above the line between the losses of its ends.

    Frankle et al. 2020, arXiv:1912.05671; 0 where it is nowhere above.
    """
    steps = len(values) - 1
    ends = values[0], values[-1]
    heights = (
        value - (ends[0] + place / steps * (ends[1] - ends[0]))
        for place, value in enumerate(values)
    )
    return max(0.0, *heights)


@jax.jit
def _between(start: Params, end: Params, share: float) -> Params:
    def mix(one: jax.Array, other: jax.Array) -> jax.Array:
        wide, other = one.astype(jnp.float32), other.astype(jnp.float32)
        return wide + share * (other - wide)

    return jax.tree.map(mix, start, end)


@functools.partial(jax.jit, static_argnums=0)
def _sums(config: models.Config, params: Params, batch: Batch) -> dict[str, jax.Array]:
    return losses.cross_entropy(
        models.hidden(config, params, batch),
        models.unembedding(config, params),
        batch["decoder_target_tokens"],
        batch["decoder_loss_weights"],
        softcap=config.logit_softcap,
    )
