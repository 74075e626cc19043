"""What training minimises."""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits_BxTxV: jax.Array, targets_BxT: jax.Array, weights_BxT: jax.Array
) -> dict[str, jax.Array]:
    """The summed token cross-entropy, in nats, and what it is to be divided by.

    Args:
        logits_BxTxV: float32.
        targets_BxT: int32 token ids.
        weights_BxT: 1 where a target counts, 0 at padding.

    Returns:
        Three float32 scalars: `loss` (sum), `correct` (targets whose logit is the largest) and
        `weight` (targets that count). Sums, so that parts of a batch can be added before the one
        division.
    """
    weights_BxT = weights_BxT.astype(jnp.float32)
    log_normalizer_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    target_logits_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    correct_BxT = jnp.argmax(logits_BxTxV, axis=-1) == targets_BxT
    return {
        "loss": jnp.sum((log_normalizer_BxT - target_logits_BxT) * weights_BxT),
        "correct": jnp.sum(correct_BxT * weights_BxT),
        "weight": jnp.sum(weights_BxT),
    }
