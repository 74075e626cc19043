"""How unsure a model is of its answers: what AdaMerging minimises, for no label is needed."""

from typing import Any

import jax
import jax.numpy as jnp

from m2l.evaluation.batching import Batch
from m2l.evaluation.ranking import scorer, token_logits


def mean_entropy(config: Any, params: Any, batch: Batch, *, dtype: str = "float32") -> jax.Array:
    """The mean entropy of a model's predictions on a batch, in nats; differentiable.

    Of examples with answer choices: that of the softmax over the choices' scores, the summed
    log-probabilities that rank classification compares, of which none is known to be right. Of
    examples in free text, which `batching.batches` gives one choice, their target: that of the next
    token at each of the target's positions, so the text decides what is read, though not what is
    wanted. Rows without an example count for nothing.

    Yang et al. 2024, arXiv:2310.02575, equation 5, for classes.

    Args:
        config: The model's configuration.
        params: Its parameters.
        batch: As `batching.batches` gives it.
        dtype: The dtype to compute in.

    Returns:
        A float32 scalar.
    """
    if batch.choices_BxCxT.shape[1] == 1:
        logits, is_counted = token_logits(config, params, batch, dtype)
        entropies = _of_softmax(logits, jnp.ones_like(logits, bool))
    else:
        is_choice_BxC = jnp.asarray(batch.sizes_BxC) > 0
        entropies = _of_softmax(scorer(config, dtype)(params, batch), is_choice_BxC)
        is_counted = is_choice_BxC[:, 0]
    total = jnp.sum(jnp.where(is_counted, entropies, 0.0))
    return total / jnp.maximum(jnp.sum(is_counted), 1)


def _of_softmax(logits: jax.Array, counts: jax.Array) -> jax.Array:
    """-sum p log p over the last axis of the entries that count; finite gradients where none do."""
    logits = jnp.where(counts, logits, -1e30)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(counts, jnp.exp(log_p) * log_p, 0.0), axis=-1)
