"""Decoding with a key-value cache, greedily or by beams, for tasks without answer choices."""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample
from m2l.data.tokenizer_files import EOS
from m2l.errors import EvaluationError
from m2l.evaluation.batching import Part, batches
from m2l.partitioning import constrain
from m2l.typing import Params, PyTree

Decoder = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
# Less than any log-probability, and finite: infinities would make NaN of differences.
_NEVER = -1e30


@functools.cache
def decoder(config: models.Config, max_length: int, eos_id: int, dtype: str) -> Decoder:
    """Returns the jitted greedy decoder of a model; it compiles once per shape."""
    compute = jnp.dtype(dtype)

    def decode(
        params: Params,
        prefix_BxS: jax.Array,
        lengths_B: jax.Array,
        start_B: jax.Array,
        is_padding_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens int32 [B, max_length], how many precede EOS, if all logits are finite."""
        mask_BxS = jnp.arange(prefix_BxS.shape[1]) < lengths_B[:, None]
        memory = models.encode(config, params, prefix_BxS, mask_BxS, dtype=compute)
        cache = models.start_decoding(config, params, memory, mask_BxS, max_length, dtype=compute)
        tokens_BxT = jnp.zeros((prefix_BxS.shape[0], max_length), jnp.int32)

        def going(carry: PyTree) -> jax.Array:
            position, _, _, done_B, *_ = carry
            return (position < max_length) & ~jnp.all(done_B)

        def step(carry: PyTree) -> PyTree:
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
        return constrain(tokens_BxT, None, None), constrain(count_B, None), finite

    return jax.jit(decode)


@functools.cache
def beam_decoder(
    config: models.Config, max_length: int, eos_id: int, dtype: str, beams: int, alpha: float
) -> Decoder:
    """Returns the jitted beam search of a model; it compiles once per shape."""
    compute = jnp.dtype(dtype)

    def penalty(length: jax.Array | int) -> jax.Array | float:
        return ((5.0 + length) / 6.0) ** alpha

    def take(values: jax.Array, places_BxK: jax.Array) -> jax.Array:
        places = places_BxK.reshape(*places_BxK.shape, *(1,) * (values.ndim - 2))
        return jnp.take_along_axis(values, places, axis=1)

    def decode(
        params: Params,
        prefix_BxS: jax.Array,
        lengths_B: jax.Array,
        start_B: jax.Array,
        is_padding_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens int32 [B, max_length], how many precede EOS, if all logits are finite."""
        rows = prefix_BxS.shape[0]
        mask_BxS = jnp.arange(prefix_BxS.shape[1]) < lengths_B[:, None]
        memory = models.encode(config, params, prefix_BxS, mask_BxS, dtype=compute)
        cache = models.start_decoding(config, params, memory, mask_BxS, max_length, dtype=compute)
        # An input's keys and values are read by all its beams; only what they wrote differs.
        own = jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), cache["self"])

        def going(carry: PyTree) -> jax.Array:
            position, _, alive_BxK, _, ended_BxK, *_ = carry
            # What is alive can only lose probability; no length favours it more than the last.
            hoped_B = alive_BxK[:, 0] / penalty(max_length)
            settled_B = (hoped_B <= ended_BxK[:, -1]) | is_padding_B
            return (position < max_length) & ~jnp.all(settled_B)

        def step(carry: PyTree) -> PyTree:
            (
                position,
                last_BxK,
                alive_BxK,
                tokens_BxKxT,
                ended_BxK,
                written,
                count_BxK,
                finite,
                own,
            ) = carry
            logits_NxV, stepped = models.decode_step(
                config,
                params,
                {**cache, "self": own},
                last_BxK.reshape(-1),
                position,
                dtype=compute,
            )
            logits_BxKxV = logits_NxV.reshape(rows, beams, -1)
            is_read_BxK = (alive_BxK > _NEVER) & ~is_padding_B[:, None]
            finite &= jnp.all(jnp.isfinite(logits_BxKxV) | ~is_read_BxK[..., None])
            log_p_BxKxV = alive_BxK[..., None] + jax.nn.log_softmax(logits_BxKxV)
            log_p_BxKxV = jnp.where(is_read_BxK[..., None], log_p_BxKxV, _NEVER)
            # Of twice as many at most half end here, one for each beam.
            best_BxJ, places_BxJ = jax.lax.top_k(log_p_BxKxV.reshape(rows, -1), 2 * beams)
            parent_BxJ, token_BxJ = jnp.divmod(places_BxJ, logits_BxKxV.shape[-1])
            candidates_BxJxT = take(tokens_BxKxT, parent_BxJ).at[..., position].set(token_BxJ)
            ends_BxJ = token_BxJ == eos_id

            value_BxJ = jnp.where(ends_BxJ, best_BxJ / penalty(position + 1), _NEVER)
            value_BxL = jnp.concatenate([ended_BxK, value_BxJ], axis=1)
            ended_BxK, next_BxK = jax.lax.top_k(value_BxL, beams)
            written = take(jnp.concatenate([written, candidates_BxJxT], axis=1), next_BxK)
            count_BxJ = jnp.full_like(token_BxJ, position)
            count_BxK = take(jnp.concatenate([count_BxK, count_BxJ], axis=1), next_BxK)

            alive_BxK, next_BxK = jax.lax.top_k(jnp.where(ends_BxJ, _NEVER, best_BxJ), beams)
            parent_BxK = take(parent_BxJ, next_BxK)
            rows_N = (jnp.arange(rows)[:, None] * beams + parent_BxK).reshape(-1)
            own = jax.tree.map(lambda leaf: leaf[rows_N], stepped["self"])
            last_BxK, tokens_BxKxT = take(token_BxJ, next_BxK), take(candidates_BxJxT, next_BxK)
            finished = ended_BxK, written, count_BxK
            return position + 1, last_BxK, alive_BxK, tokens_BxKxT, *finished, finite, own

        none_BxK = jnp.full((rows, beams), _NEVER)
        tokens_BxKxT = jnp.zeros((rows, beams, max_length), jnp.int32)
        last_BxK = jnp.repeat(start_B[:, None], beams, axis=1)
        first_BxK = none_BxK.at[:, 0].set(0.0)
        finished = none_BxK, tokens_BxKxT, jnp.zeros_like(last_BxK)
        start = (jnp.int32(0), last_BxK, first_BxK, tokens_BxKxT, *finished, True, own)
        position, _, _, tokens_BxKxT, ended_BxK, written, count_BxK, finite, _ = jax.lax.while_loop(
            going, step, start
        )
        has_ended_B = ended_BxK[:, 0] > _NEVER
        tokens_BxT = jnp.where(has_ended_B[:, None], written[:, 0], tokens_BxKxT[:, 0])
        count_B = jnp.where(has_ended_B, count_BxK[:, 0], position)
        return constrain(tokens_BxT, None, None), constrain(count_B, None), finite

    return jax.jit(decode)


def greedy(
    config: models.Config,
    params: Params,
    examples: Sequence[GenerationExample],
    *,
    max_length: int,
    layout: layouts.Layout | None = None,
    eos_id: int = EOS,
    batch_size: int = 32,
    dtype: str = "float32",
    parts: Iterable[Part] | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[np.ndarray]:
    """Decodes the most probable next token, one after another, until EOS.

    Args:
        config: The model's configuration.
        params: Its parameters.
        examples: What to decode.
        max_length: Tokens to produce at most, EOS included.
        layout: How the model reads them; of an encoder-decoder its config says it.
        eos_id: The token that ends an answer.
        batch_size: Examples decoded together; a batch stops when all of them are done.
        dtype: The dtype to compute in.
        parts: From `batching.batches`, in place of `layout` and `batch_size`; None makes them.
        on_done: Called with the number of examples finished, batch by batch.

    Returns:
        Per example, int32 token ids without EOS.

    Raises:
        EvaluationError: a logit was NaN or infinite.
    """
    decode = decoder(config, max_length, eos_id, dtype)
    if parts is None:
        parts = batches(examples, batch_size, layout or layouts.of(config))
    return _decoded(decode, params, examples, parts, on_done)


def beam_search(
    config: models.Config,
    params: Params,
    examples: Sequence[GenerationExample],
    *,
    beams: int,
    max_length: int,
    alpha: float = 0.6,
    layout: layouts.Layout | None = None,
    eos_id: int = EOS,
    batch_size: int = 32,
    dtype: str = "float32",
    parts: Iterable[Part] | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[np.ndarray]:
    """Decodes by a beam search, which ranks finished texts as T5X's `decoding.beam_search` does.

    A text of n tokens, EOS among them, is worth log p(text) / ((5 + n) / 6) ** alpha (Wu et al.
    2016, arXiv:1609.08144, equation 14). An input is done when nothing alive can beat its `beams`
    best finished texts; where none has finished, the most probable unfinished one is taken.

    Args:
        beams: How many unfinished texts of an input are continued.
        alpha: 0: log-probabilities are compared; larger favours longer texts.

    The others, what is returned and what is raised are those of `greedy`.
    """
    decode = beam_decoder(config, max_length, eos_id, dtype, beams, alpha)
    if parts is None:
        parts = batches(examples, batch_size, layout or layouts.of(config))
    return _decoded(decode, params, examples, parts, on_done)


def _decoded(
    decode: Decoder,
    params: Params,
    examples: Sequence[GenerationExample],
    parts: Iterable[Part],
    on_done: Callable[[int], None],
) -> list[np.ndarray]:
    decoded: list[np.ndarray] = [np.empty(0, np.int32)] * len(examples)
    for part, batch in parts:
        is_padding_B = np.arange(len(batch.lengths_B)) >= len(part)
        tokens_BxT, count_B, finite = decode(
            params, batch.prefix_BxS, batch.lengths_B, batch.start_B, is_padding_B
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
