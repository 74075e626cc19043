"""Decoding with a key-value cache, greedily, by beams or by drawing, where no answers are given."""

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample
from m2l.data.tokenizer_files import EOS
from m2l.errors import EvaluationError
from m2l.evaluation import ranking
from m2l.evaluation.batching import Part, batches
from m2l.evaluation.decoding import Decoding
from m2l.partitioning import constrain
from m2l.typing import Params, PyTree

Decoder = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
# Less than any log-probability, and finite: infinities would make NaN of differences.
_NEVER = -1e30
_ROWS = 128


@functools.cache
def decoder(config: models.Config, max_length: int, eos_id: int, dtype: str) -> Decoder:
    """Returns the jitted greedy decoder of a model; it compiles once per shape."""
    compute = jnp.dtype(dtype)

    def decode(
        params: Params,
        shared_P: jax.Array,
        prefix_BxS: jax.Array,
        lengths_B: jax.Array,
        start_B: jax.Array,
        is_padding_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens int32 [B, max_length], how many precede EOS, if all logits are finite."""
        memory, mask_BxS = ranking.encode_inputs(
            config, params, shared_P, prefix_BxS, lengths_B, compute
        )
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
        shared_P: jax.Array,
        prefix_BxS: jax.Array,
        lengths_B: jax.Array,
        start_B: jax.Array,
        is_padding_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens int32 [B, max_length], how many precede EOS, if all logits are finite."""
        rows = prefix_BxS.shape[0]
        memory, mask_BxS = ranking.encode_inputs(
            config, params, shared_P, prefix_BxS, lengths_B, compute
        )
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


@functools.cache
def sampler(
    config: models.Config,
    max_length: int,
    eos_id: int,
    dtype: str,
    samples: int,
    top_k: int,
    with_top_p: bool,
) -> Decoder:
    """Returns the jitted decoder that draws tokens; it compiles once per shape."""
    compute = jnp.dtype(dtype)

    def drawn(
        logits_NxV: jax.Array, keys_N: jax.Array, temperature: jax.Array, top_p: jax.Array
    ) -> jax.Array:
        logits_NxV = logits_NxV.astype(jnp.float32) / temperature
        if top_k:
            least_Nx1 = jax.lax.top_k(logits_NxV, min(top_k, logits_NxV.shape[-1]))[0][:, -1:]
            logits_NxV = jnp.where(logits_NxV >= least_Nx1, logits_NxV, -jnp.inf)
        if with_top_p:
            sorted_NxV = -jnp.sort(-logits_NxV, axis=-1)
            p_NxV = jax.nn.softmax(sorted_NxV)
            # Of all that come before a token: the first is always among those that may be drawn.
            before_NxV = jnp.cumsum(p_NxV, axis=-1) - p_NxV
            may_NxV = before_NxV < top_p
            least_Nx1 = jnp.min(jnp.where(may_NxV, sorted_NxV, jnp.inf), axis=-1, keepdims=True)
            logits_NxV = jnp.where(logits_NxV >= least_Nx1, logits_NxV, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys_N, logits_NxV).astype(jnp.int32)

    def decode(
        params: Params,
        shared_P: jax.Array,
        prefix_BxS: jax.Array,
        lengths_B: jax.Array,
        start_B: jax.Array,
        is_padding_B: jax.Array,
        inputs_B: jax.Array,
        temperature: jax.Array,
        top_p: jax.Array,
        seed: jax.Array,
        numbers_K: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens int32 [B, samples, max_length], how many precede EOS, if all is finite."""
        rows = prefix_BxS.shape[0]
        memory, mask_BxS = ranking.encode_inputs(
            config, params, shared_P, prefix_BxS, lengths_B, compute
        )
        cache = models.start_decoding(config, params, memory, mask_BxS, max_length, dtype=compute)
        # An input's keys and values are read by all its samples; only what they wrote differs.
        own = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), cache["self"])
        own = {**cache, "self": own}
        key, fold = jax.random.key(seed), jax.vmap(jax.random.fold_in, (None, 0))
        keys_BxK = jax.vmap(fold, (0, None))(fold(key, inputs_B), numbers_K)
        keys_N, is_padding_N = keys_BxK.reshape(-1), jnp.repeat(is_padding_B, samples)
        tokens_NxT = jnp.zeros((rows * samples, max_length), jnp.int32)

        def going(carry: PyTree) -> jax.Array:
            position, _, _, done_N, *_ = carry
            return (position < max_length) & ~jnp.all(done_N)

        def step(carry: PyTree) -> PyTree:
            position, last_N, tokens_NxT, done_N, count_N, finite, cache = carry
            logits_NxV, stepped = models.decode_step(
                config, params, cache, last_N, position, dtype=compute
            )
            finite &= jnp.all(jnp.isfinite(logits_NxV) | done_N[:, None])
            now_N = jax.vmap(jax.random.fold_in, (0, None))(keys_N, position)
            next_N = jnp.where(done_N, 0, drawn(logits_NxV, now_N, temperature, top_p))
            tokens_NxT = tokens_NxT.at[:, position].set(next_N)
            done_N |= next_N == eos_id
            count_N += ~done_N
            return position + 1, next_N, tokens_NxT, done_N, count_N, finite, stepped

        last_N = jnp.repeat(start_B, samples)
        start = (jnp.int32(0), last_N, tokens_NxT, is_padding_N, jnp.zeros_like(last_N), True, own)
        _, _, tokens_NxT, _, count_N, finite, _ = jax.lax.while_loop(going, step, start)
        tokens_BxKxT = tokens_NxT.reshape(rows, samples, max_length)
        count_BxK = count_N.reshape(rows, samples)
        return constrain(tokens_BxKxT, None, None, None), constrain(count_BxK, None, None), finite

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


def sample(
    config: models.Config,
    params: Params,
    examples: Sequence[GenerationExample],
    *,
    temperature: float,
    max_length: int,
    top_k: int = 0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    layout: layouts.Layout | None = None,
    eos_id: int = EOS,
    batch_size: int = 32,
    dtype: str = "float32",
    parts: Iterable[Part] | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[list[np.ndarray]]:
    """Draws texts token by token from softmax(logits / temperature), until EOS.

    What is drawn depends on the seed, the inputs, the sample's number and the position alone, not
    on batches or on what else is decoded. Tokens as probable as the least one that `top_k` or
    `top_p` lets through are let through too. At most _ROWS texts are decoded at once, or one for
    each example of a batch.

    Args:
        temperature, top_k, top_p, samples, seed: As `Decoding` has them.

    The others, and what is raised, are those of `greedy`.

    Returns:
        Per example its samples, int32 token ids without EOS.
    """
    if parts is None:
        parts = batches(examples, batch_size, layout or layouts.of(config))
    parts = list(parts)
    rows = max((len(batch.lengths_B) for _, batch in parts), default=1)
    at_once = max(1, min(samples, _ROWS // rows))
    decode = sampler(config, max_length, eos_id, dtype, at_once, top_k, top_p < 1)
    decoded: list[list[np.ndarray]] = [[] for _ in examples]
    for first in range(0, samples, at_once):
        numbers = np.arange(first, first + at_once, dtype=np.uint32)
        chosen = (jnp.float32(temperature), jnp.float32(top_p), jnp.uint32(seed), numbers)

        def draw(
            part: Sequence[int], *arrays: PyTree, chosen: tuple = chosen
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            inputs_B = np.zeros(len(arrays[-1]), np.uint32)
            inputs_B[: len(part)] = [
                zlib.crc32(examples[index].inputs.astype("<i4").tobytes()) for index in part
            ]
            return decode(*arrays, inputs_B, *chosen)

        is_last = first + at_once >= samples
        for part, tokens_BxKxT, count_BxK in _batches(
            draw, params, examples, parts, on_done if is_last else lambda count: None
        ):
            for row, index in enumerate(part):
                pairs = zip(tokens_BxKxT[row], count_BxK[row], strict=True)
                decoded[index] += [tokens[:length] for tokens, length in pairs]
    return [texts[:samples] for texts in decoded]


def decode(
    config: models.Config,
    params: Params,
    examples: Sequence[GenerationExample],
    decoding: Decoding,
    **options: Any,
) -> list[list[np.ndarray]]:
    """Decodes as `decoding` says, with the options of `greedy`; per example, all its texts."""
    if decoding.draws:
        fields = ("temperature", "top_k", "top_p", "samples", "seed")
        drawing = {name: getattr(decoding, name) for name in fields}
        return sample(config, params, examples, **drawing, **options)
    if decoding.beams > 1:
        decoded = beam_search(config, params, examples, beams=decoding.beams, **options)
    else:
        decoded = greedy(config, params, examples, **options)
    return [[tokens] for tokens in decoded]


def _decoded(
    decode: Decoder,
    params: Params,
    examples: Sequence[GenerationExample],
    parts: Iterable[Part],
    on_done: Callable[[int], None],
) -> list[np.ndarray]:
    decoded: list[np.ndarray] = [np.empty(0, np.int32)] * len(examples)

    def run(_: Sequence[int], *arrays: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
        return decode(*arrays)

    for part, tokens_BxT, count_B in _batches(run, params, examples, parts, on_done):
        for row, index in enumerate(part):
            decoded[index] = tokens_BxT[row, : count_B[row]]
    return decoded


def _batches(
    decode: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    params: Params,
    examples: Sequence[GenerationExample],
    parts: Iterable[Part],
    on_done: Callable[[int], None],
) -> Iterator[tuple[Sequence[int], np.ndarray, np.ndarray]]:
    """Yields of each batch the examples' numbers, their tokens, and how many of these count.

    `decode` takes these numbers before all that a decoder takes.
    """
    for part, batch in parts:
        is_padding_B = np.arange(len(batch.lengths_B)) >= len(part)
        arrays = batch.shared_P, batch.prefix_BxS, batch.lengths_B, batch.start_B, is_padding_B
        tokens, count, finite = decode(part, params, *arrays)
        if not finite:
            raise EvaluationError(
                f"decoding {examples[part[0]].inputs_text[:60]!r} and its batch: a logit is "
                "not finite; the model's parameters or the arithmetic are broken"
            )
        yield part, np.asarray(tokens), np.asarray(count)
        on_done(len(part))
