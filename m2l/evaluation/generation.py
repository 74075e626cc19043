"""Greedy decoding with a key-value cache, for tasks without answer choices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample
from m2l.data.vocabularies import EOS
from m2l.errors import EvaluationError
from m2l.evaluation.ranking import bucket


@functools.cache
def decoder(
    config: Any, max_length: int, eos_id: int, dtype: str
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """The jitted greedy decoder of a model: one compilation per shape, for any parameters."""
    compute = jnp.dtype(dtype)

    def decode(
        params: Any,
        prefix_BxS: jax.Array,
        lengths_B: jax.Array,
        start_B: jax.Array,
        is_padding_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens int32 [B, max_length], how many come before EOS, whether all logits are finite."""
        mask_BxS = jnp.arange(prefix_BxS.shape[1]) < lengths_B[:, None]
        memory = models.encode(config, params, prefix_BxS, mask_BxS, dtype=compute)
        cache = models.start_decoding(config, params, memory, mask_BxS, max_length, dtype=compute)
        tokens_BxT = jnp.zeros((prefix_BxS.shape[0], max_length), jnp.int32)

        def going(carry: Any) -> jax.Array:
            position, _, _, done_B, *_ = carry
            return (position < max_length) & ~jnp.all(done_B)

        def step(carry: Any) -> Any:
            position, last_B, tokens_BxT, done_B, count_B, finite, cache = carry
            logits_BxV, cache = models.decode_step(
                config, params, cache, last_B, position, dtype=compute
            )
            finite &= jnp.all(jnp.isfinite(logits_BxV) | done_B[:, None])
            next_B = jnp.where(done_B, 0, jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32))
            tokens_BxT = tokens_BxT.at[:, position].set(next_B)
            done_B |= next_B == eos_id
            count_B += ~done_B
            return position + 1, next_B, tokens_BxT, done_B, count_B, finite, cache

        start = (jnp.int32(0), start_B, tokens_BxT, is_padding_B, jnp.zeros_like(start_B), True)
        _, _, tokens_BxT, _, count_B, finite, _ = jax.lax.while_loop(going, step, (*start, cache))
        return tokens_BxT, count_B, finite

    return jax.jit(decode)


def greedy(
    config: Any,
    params: Any,
    examples: Sequence[GenerationExample],
    *,
    max_length: int,
    layout: layouts.Layout | None = None,
    eos_id: int = EOS,
    batch_size: int = 32,
    dtype: str = "float32",
    on_done: Callable[[int], None] = lambda count: None,
) -> list[np.ndarray]:
    """The most probable next token, one after another, until EOS.

    Args:
        config: The model's configuration.
        params: Its parameters.
        examples: What to decode.
        max_length: Tokens to produce at most, EOS included.
        layout: How the model reads them; of an encoder-decoder its config says it.
        eos_id: The token that ends an answer.
        batch_size: Examples decoded together; a batch stops when all of them are done.
        dtype: The dtype to compute in.
        on_done: Told how many examples were finished, batch by batch.

    Returns:
        Per example, int32 token ids without EOS.

    Raises:
        EvaluationError: a logit was NaN or infinite.
    """
    decode = decoder(config, max_length, eos_id, dtype)
    layout = layout or layouts.of(config)
    prompts = [layout.prompt(example.inputs) for example in examples]
    decoded: list[np.ndarray] = [np.empty(0, np.int32)] * len(examples)
    by_length: dict[int, list[int]] = {}
    for index, (prefix, _) in enumerate(prompts):
        by_length.setdefault(bucket(len(prefix), 16), []).append(index)
    for length, indices in sorted(by_length.items()):
        for first in range(0, len(indices), batch_size):
            part = indices[first : first + batch_size]
            prefix_BxS = np.zeros((batch_size, length), np.int32)
            lengths_B, start_B = np.zeros((2, batch_size), np.int32)
            for row, index in enumerate(part):
                prefix, start_B[row] = prompts[index]
                prefix_BxS[row, : len(prefix)] = prefix
                lengths_B[row] = len(prefix)
            is_padding_B = np.arange(batch_size) >= len(part)
            tokens_BxT, count_B, finite = decode(
                params, prefix_BxS, lengths_B, start_B, is_padding_B
            )
            if not finite:
                raise EvaluationError(
                    f"decoding {examples[part[0]].inputs_text[:60]!r} and its batch: a logit is "
                    "not finite; the model's parameters or the arithmetic are broken"
                )
            tokens_BxT, count_B = np.asarray(tokens_BxT), np.asarray(count_B)
            for row, index in enumerate(part):
                decoded[index] = tokens_BxT[row, : count_B[row]]
            on_done(len(part))
    return decoded
