"""The Llama family: decoders with RMSNorm, rotary positions, grouped-query attention, gated MLPs.

Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024), Mistral, Qwen, SmolLM, Gemma, OLMo 2
and 3, Phi-3 and 4, and the mixtures of experts Mixtral, Qwen3-MoE and OLMoE are settings of one
network.

Letters in names are axes: B rows, C continuations of a row, T positions, S positions of a prefix,
D features, V vocabulary, H heads, G heads of keys and values, K features of a head.
"""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers

from m2l.errors import DataError
from m2l.models.attention import Causal, attend, attend_parts, hide, same_segment
from m2l.models.configs import ACTIVATIONS, LlamaConfig
from m2l.models.experts import RoutedMlp, Routing, no_routing
from m2l.models.layers import (
    Array,
    Cache,
    Execution,
    KeysValues,
    Mlp,
    check_continuations,
    dense,
    embed,
    empty_cache,
    join_heads,
    rms_norm,
    split_heads,
    through,
)
from m2l.partitioning import constrain

Rotations = tuple[Array | np.ndarray, Array | np.ndarray]
"""Cosines and sines of the angles, float32 [kinds, N, 1, T, K / 2] each."""

_INIT = initializers.normal(0.02)  # the initializer_range of all of them


def rotary_frequencies(
    config: LlamaConfig, *, past_original: bool = False
) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each pair of features, float32 [K / 2], and a factor.

    The factor scales the rotated pair. K is the number of features of a head that are rotated.

    Computed on the host in float32, as Hugging Face does.

    Args:
        config: The model.
        past_original: Whether a row has more positions than the original length: what longrope
            asks for.

    Source: Su et al. 2021 (rotary positions); Chen et al. 2023 (linear); Llama 3's own scaling by
    wave length; Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE).
    """
    c, size = config, config.rotary_dim
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    periods = np.float32(c.rope_theta) ** exponents
    plain = (1.0 / periods).astype(np.float32)
    if c.rope_type == "default":
        return plain, 1.0
    original, factor = c.rope_original_max_position_embeddings, c.rope_attention_factor
    if c.rope_type == "longrope":
        stretches = np.array(c.rope_long_factor if past_original else c.rope_short_factor)
        if not factor:
            growth = math.log(c.rope_factor) / math.log(original) if c.rope_factor > 1 else 0.0
            factor = math.sqrt(1 + growth)
        return (1.0 / (stretches.astype(np.float32) * periods)).astype(np.float32), factor
    stretched = plain / np.float32(c.rope_factor)
    if c.rope_type == "linear":
        return stretched, 1.0
    if c.rope_type == "llama3":
        turns = np.float32(original / (2 * math.pi)) * plain
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (share * plain + (1 - share) * stretched).astype(np.float32), 1.0

    def pair_turning(times: float) -> float:
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    first = max(math.floor(pair_turning(c.rope_beta_fast)), 0)
    last = min(math.ceil(pair_turning(c.rope_beta_slow)), size - 1)
    steps = (np.arange(size // 2, dtype=np.float32) - first) / max(last - first, 0.001)
    share = 1 - np.clip(steps, 0.0, 1.0)
    if not factor:
        factor = 0.1 * math.log(c.rope_factor) + 1.0 if c.rope_factor > 1 else 1.0
    return (share * plain + (1 - share) * stretched).astype(np.float32), factor


def rotary_kinds(config: LlamaConfig) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the kinds of rotary positions that layers have, and which of them each layer has.

    "scaled" is what the rope_ settings say, "local" the unscaled one of layers with windows, and
    "none" turns nothing.
    """
    layers = range(config.num_hidden_layers)
    rotary, windows = (x or (0,) * len(layers) for x in (config.rotary_layers, config.windows))

    def kind(layer: int) -> str:
        if config.rotary_layers and not rotary[layer]:
            return "none"
        return "local" if config.rope_local_base_freq and windows[layer] else "scaled"

    kinds = tuple(sorted({kind(layer) for layer in layers}))
    return kinds, tuple(kinds.index(kind(layer)) for layer in layers)


def rotations(
    config: LlamaConfig,
    positions_NxT: Array | np.ndarray,
    past_original_NxT: Array | None = None,
) -> Rotations:
    """Returns the rotations of rows at these positions, of each of the layers' kinds.

    Args:
        config: The model.
        positions_NxT: Places in the rows.
        past_original_NxT: bool, which of them are in rows longer than longrope's original length;
            None: none.
    """
    # On the host where it can be: XLA's CPU backend computes them anew for every head.
    on_host = isinstance(positions_NxT, np.ndarray) and past_original_NxT is None
    xp = np if on_host else jnp
    places_Nx1xTx1 = positions_NxT[:, None, :, None].astype(np.float32)

    def angles(kind: str) -> tuple[Array | np.ndarray, float]:
        c = config
        if kind == "none":
            return places_Nx1xTx1 * np.zeros(c.rotary_dim // 2, np.float32), 1.0
        if kind == "local":
            c = dataclasses.replace(c, rope_type="default", rope_theta=c.rope_local_base_freq)
        frequencies, factor = rotary_frequencies(c)
        if past_original_NxT is not None:
            long_frequencies, _ = rotary_frequencies(c, past_original=True)
            past_Nx1xTx1 = past_original_NxT[:, None, :, None]
            frequencies = xp.where(past_Nx1xTx1, long_frequencies, frequencies)
        return places_Nx1xTx1 * frequencies, factor

    turns = [angles(kind) for kind in rotary_kinds(config)[0]]
    cosines, sines = (
        xp.stack([function(angle) * xp.float32(factor) for angle, factor in turns])
        for function in (xp.cos, xp.sin)
    )
    return cosines, sines


def rotate(x_NxHxTxK: Array, turns: Rotations) -> Array:
    """Rotates each pair of features (i, i + R / 2) by its position's angle, in float32.

    Args:
        x_NxHxTxK: Queries or keys, whose first R features are rotated.
        turns: Cosines and sines of the angles, [N, 1, T, R / 2] each.
    """
    cosine, sine = turns
    rotated = 2 * cosine.shape[-1]
    turned_part, kept_part = x_NxHxTxK[..., :rotated], x_NxHxTxK[..., rotated:]
    first, second = jnp.split(turned_part.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    result = jnp.concatenate(turned, axis=-1).astype(x_NxHxTxK.dtype)
    return jnp.concatenate([result, kept_part], axis=-1) if kept_part.shape[-1] else result


class _LlamaAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        queries, keys = (
            heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads)
        )
        sizes = {"query": queries, "key": keys, "value": keys}
        self.kernels = {n: self.param(n, _INIT, (c.hidden_size, s)) for n, s in sizes.items()}
        biased = sizes if c.qkv_bias else {}
        self.biases = {
            n: self.param(f"{n}_bias", initializers.zeros, (s,)) for n, s in biased.items()
        }
        self.norms = {}
        if c.qk_norm:
            one = initializers.constant(1.0 - c.norm_offset)
            widths = {"query": queries, "key": keys} if c.qk_norm == "whole" else {}
            self.norms = {
                n: self.param(f"{n}_norm", one, (widths.get(n, c.head_dim),))
                for n in ("query", "key")
            }
        self.out = self.param("out", _INIT, (queries, c.hidden_size))
        if c.out_bias:
            self.out_bias = self.param("out_bias", initializers.zeros, (c.hidden_size,))

    def _heads(self, name: str, x_NxTxD: Array, heads: int) -> Array:
        joined = dense(x_NxTxD, self.kernels[name])
        if name in self.biases:
            joined = joined + self.biases[name].astype(joined.dtype)
        if self.config.qk_norm == "whole":
            joined = self._norm(name, joined)
        split = split_heads(constrain(joined, "batch", None, "heads"), heads)
        return self._norm(name, split) if self.config.qk_norm == "head" else split

    def _norm(self, name: str, x: Array) -> Array:
        if name not in self.norms:  # values are not normed
            return x
        scale = self.norms[name] + self.config.norm_offset
        return rms_norm(x, scale, self.config.rms_norm_eps, x.dtype)

    def project(self, x_NxTxD: Array, turns: Rotations) -> tuple[Array, KeysValues]:
        """Queries [N, H, T, K], keys and values [N, G, T, K], turned by their positions."""
        query = self._heads("query", x_NxTxD, self.config.num_attention_heads)
        key, value = (
            self._heads(name, x_NxTxD, self.config.num_key_value_heads) for name in ("key", "value")
        )
        return rotate(query, turns), (rotate(key, turns), value)

    def project_out(self, read_NxHxTxK: Array) -> Array:
        """Projects what was read: [N, T, D]."""
        out = dense(join_heads(read_NxHxTxK), self.out)
        return out + self.out_bias.astype(out.dtype) if self.config.out_bias else out


class _LlamaLayer(nn.Module):
    config: LlamaConfig
    execution: Execution

    def setup(self) -> None:
        c = self.config
        sides = ["pre"] * (not c.omit_pre_norms) + ["post"] * c.post_norms
        names = [f"{side}_{block}_norm" for side in sides for block in ("self_attention", "mlp")]
        init = initializers.constant(1.0 - c.norm_offset)
        self.norms = {name: self.param(name, init, (c.hidden_size,)) for name in names}
        self.self_attention = _LlamaAttention(c)
        if c.num_experts:
            self.mlp = RoutedMlp(c, _INIT)
        else:
            self.mlp = Mlp(
                c.hidden_size,
                c.intermediate_size,
                ACTIVATIONS[c.hidden_act],
                True,
                _INIT,
                self.execution,
            )
        self.dropout = self.execution.dropout(-2)
        scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5
        self.scores = {"scale": scale, "softcap": c.attn_logit_softcapping}

    def _norm(self, name: str, x: Array) -> Array:
        if name not in self.norms:
            return x
        scale_D = self.norms[name] + self.config.norm_offset
        return rms_norm(x, scale_D, self.config.rms_norm_eps, self.execution.dtype)

    def _add(self, x_NxTxD: Array, block: str, added: Array) -> Array:
        added = self._norm(f"post_{block}_norm", added)
        return constrain(x_NxTxD + self.dropout(added), "batch", None, None)

    def _after(
        self, x_NxTxD: Array, read_NxHxTxK: Array, counted_NxT: Array | None = None
    ) -> tuple[Array, Routing | None]:
        """Returns the layer's output, and of a mixture of experts what the router did."""
        added = self.self_attention.project_out(read_NxHxTxK)
        x_NxTxD = self._add(x_NxTxD, "self_attention", added)
        h = self._norm("pre_mlp_norm", x_NxTxD)
        if not self.config.num_experts:
            return self._add(x_NxTxD, "mlp", self.mlp(h)), None
        added, routing = self.mlp(h, counted_NxT)
        return self._add(x_NxTxD, "mlp", added), routing

    def __call__(
        self,
        x: Array | tuple[Array, Routing],
        window: int | Array,
        kind: int | Array,
        segments_BxT: Array | None,
        turns: Rotations,
    ) -> Array | tuple[Array, Routing]:
        """Returns the layer's output; arguments as for `first`.

        A mixture of experts carries the sums of what its routers did along.
        """
        if not self.config.num_experts:
            return self.first(x, window, kind, segments_BxT, turns)[0]
        x_BxTxD, total = x
        x_BxTxD, _, routing = self.first(x_BxTxD, window, kind, segments_BxT, turns)
        return x_BxTxD, jax.tree.map(jnp.add, total, routing)

    def first(
        self,
        x_BxTxD: Array,
        window: int | Array,
        kind: int | Array,
        segments_BxT: Array | None,
        turns: Rotations,
    ) -> tuple[Array, KeysValues, Routing | None]:
        """Returns the layer's output on rows from their beginning, their keys and values, routing.

        Args:
            x_BxTxD: Its input.
            window: How many positions a position sees; 0: all before it.
            kind: Which of the rotations are the layer's.
            segments_BxT: Which positions see one another; None: all of a row.
            turns: The rotations.
        """
        h = self._norm("pre_self_attention_norm", x_BxTxD)
        query, present = self.self_attention.project(h, _of_kind(turns, kind))
        visible = Causal(segments_BxT, window)
        kernel = self.execution.attention
        read = attend(query, *present, visible, **self.scores, implementation=kernel)
        counted = None if segments_BxT is None else segments_BxT != 0
        x_BxTxD, routing = self._after(x_BxTxD, read, counted)
        return x_BxTxD, present, routing

    def further(
        self,
        x_NxTxD: Array,
        kind: int,
        turns: Rotations,
        memory: KeysValues,
        memory_bias: Array,
        bias: Array,
        past: KeysValues | None = None,
        position: Array | None = None,
    ) -> tuple[Array, KeysValues]:
        """Returns the same for what continues a prefix, whose keys and values are `memory`.

        With `past` (decoding step by step), x is written into it at `position`, and all is read.
        """
        h = self._norm("pre_self_attention_norm", x_NxTxD)
        query, present = self.self_attention.project(h, _of_kind(turns, kind))
        if past is not None:
            present = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, position, 0)),
                past,
                present,
            )
        parts = [(*memory, memory_bias), (*present, bias)]
        x_NxTxD, _ = self._after(x_NxTxD, attend_parts(query, parts, **self.scores))
        return x_NxTxD, present


def _of_kind(turns: Rotations, kind: int | Array) -> Rotations:
    """Returns the rotations of one kind; traced where layers that differ are scanned over."""
    if isinstance(kind, int):
        return turns[0][kind], turns[1][kind]
    return jnp.asarray(turns[0])[kind], jnp.asarray(turns[1])[kind]


def _past_original(
    config: LlamaConfig, segments_BxT: Array | None, positions_BxT: Array | np.ndarray
) -> Array | None:
    """Returns which positions are in examples longer than longrope's original length."""
    most = config.rope_original_max_position_embeddings
    if config.rope_type != "longrope" or positions_BxT.shape[1] <= most:
        return None
    if segments_BxT is None:
        return jnp.ones(positions_BxT.shape, bool)
    same_BxTxT = same_segment(segments_BxT, segments_BxT)[:, 0]
    return jnp.max(jnp.where(same_BxTxT, positions_BxT[:, None, :], 0), axis=2) >= most


class _LlamaDecoder(nn.Module):
    config: LlamaConfig
    execution: Execution

    def setup(self) -> None:
        c = self.config
        self.layers = [
            _LlamaLayer(c, self.execution, name=f"layers_{i:02}")
            for i in range(c.num_hidden_layers)
        ]
        windows = c.windows or (0,) * c.num_hidden_layers
        self.each = tuple(zip(windows, rotary_kinds(c)[1], strict=True))
        self.norm = self.param("norm", initializers.constant(1.0 - c.norm_offset), (c.hidden_size,))
        if not c.tie_word_embeddings:
            self.logits = self.param("logits", _INIT, (c.hidden_size, c.vocab_size))

    def _finish(self, x: Array) -> Array:
        scale_D = self.norm + self.config.norm_offset
        return rms_norm(x, scale_D, self.config.rms_norm_eps, self.execution.dtype)

    def _check_length(self, length: int) -> None:
        """Refuses what would change longrope's frequencies between a prefix and its continuation.

        Keys and values of the prefix would have to be computed anew.
        """
        most = self.config.rope_original_max_position_embeddings
        if self.config.rope_type == "longrope" and length > most:
            raise DataError(
                f"inputs and targets of up to {length} positions: past {most} "
                "(rope_original_max_position_embeddings) longrope has other frequencies, which "
                "training knows and decoding and ranking do not; shorten inputs or targets"
            )

    def __call__(
        self, x_BxTxD: Array, segments_BxT: Array | None, positions_BxT: Array | np.ndarray
    ) -> tuple[Array, Routing | None]:
        """Returns the output on rows, and of a mixture of experts what its routers did."""
        past_original = _past_original(self.config, segments_BxT, positions_BxT)
        shared = segments_BxT, rotations(self.config, positions_BxT, past_original)
        experts = self.config.num_experts
        x = (x_BxTxD, no_routing(experts)) if experts else x_BxTxD
        x = through(self.layers, x, self.each, shared, self.execution)
        x_BxTxD, routing = x if experts else (x, None)
        return self._finish(x_BxTxD), routing

    def encode(
        self, x_BxSxD: Array, mask_BxS: Array, shared_1xPxD: Array | None = None
    ) -> list[KeysValues]:
        """Returns the keys and values of each layer, those of what all rows begin with first."""
        if shared_1xPxD is not None:
            seen_1xP = jnp.ones(shared_1xPxD.shape[:2], bool)
            shared = self.encode(shared_1xPxD, seen_1xP)
            _, own = self.further(x_BxSxD, shared, seen_1xP)

            def join(shared_1xGxPxK: Array, own_BxGxSxK: Array) -> Array:
                shape = (len(own_BxGxSxK), *shared_1xGxPxK.shape[1:])
                repeated = jnp.broadcast_to(shared_1xGxPxK, shape)
                return jnp.concatenate([repeated, own_BxGxSxK], axis=2)

            return jax.tree.map(join, shared, own)
        turns = rotations(self.config, np.arange(x_BxSxD.shape[1])[None])
        memories = []
        for layer, own in zip(self.layers, self.each, strict=True):
            x_BxSxD, present, _ = layer.first(x_BxSxD, *own, mask_BxS.astype(jnp.int32), turns)
            memories.append(present)
        return memories

    def further(
        self,
        x_NxTxD: Array,
        memories: list[KeysValues],
        mask_BxS: Array,
        pasts: list[KeysValues] | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, list[KeysValues]]:
        """Returns the output on what continues prefixes, [N, T, D], and its keys and values.

        It begins at `position`.
        """
        rows, length = x_NxTxD.shape[:2]
        mask_NxS = jnp.repeat(mask_BxS, rows // mask_BxS.shape[0], axis=0)
        # Places among what continues the prefix: of queries, and of keys.
        query_places_T = position + jnp.arange(length)
        key_places_U = jnp.arange(length if pasts is None else pasts[0][0].shape[2])
        self._check_length(mask_BxS.shape[1] + key_places_U.size)
        positions_NxT = jnp.sum(mask_NxS, axis=1)[:, None] + query_places_T
        turns = rotations(self.config, positions_NxT)
        behind_TxU = query_places_T[:, None] - key_places_U
        from_prefix_NxTxS = positions_NxT[..., None] - jnp.arange(mask_NxS.shape[1])
        presents = []
        for i, (layer, (window, kind)) in enumerate(zip(self.layers, self.each, strict=True)):
            own, seen = behind_TxU >= 0, mask_NxS[:, None, :]
            if window:
                own, seen = own & (behind_TxU < window), seen & (from_prefix_NxTxS < window)
            biases = hide(seen[:, None]), hide(own)
            past = None if pasts is None else pasts[i]
            x_NxTxD, present = layer.further(
                x_NxTxD, kind, turns, memories[i], *biases, past, position
            )
            presents.append(present)
        return self._finish(x_NxTxD), presents


class Llama(nn.Module):
    """The network of `m2l.models`, where functions of the same names document its methods."""

    config: LlamaConfig
    execution: Execution

    def setup(self) -> None:
        c = self.config
        self.token_embedder = self.param("token_embedder", _INIT, (c.vocab_size, c.hidden_size))
        self.decoder = _LlamaDecoder(c, self.execution)

    def _embed(self, tokens: Array) -> Array:
        x = embed(self.token_embedder, tokens, self.execution.dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return x

    def unembed(self, hidden: Array) -> Array:
        tied, cap = self.config.tie_word_embeddings, self.config.logit_softcap
        kernel_DxV = self.token_embedder.T if tied else self.decoder.logits
        logits = constrain(dense(hidden, kernel_DxV, jnp.float32), "batch", None, "vocab")
        return cap * jnp.tanh(logits / cap) if cap else logits

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        return self.unembed(self.hidden(batch))

    def hidden(self, batch: Mapping[str, Array]) -> Array:
        return self._read(batch)[0]

    def balanced_hidden(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        hidden, routing = self._read(batch)
        return hidden, jnp.zeros(()) if routing is None else routing.balance()

    def _read(self, batch: Mapping[str, Array]) -> tuple[Array, Routing | None]:
        if "encoder_input_tokens" in batch:
            raise DataError(
                "a batch for a decoder: found encoder_input_tokens, expected inputs and targets as "
                "one row of decoder_input_tokens"
            )
        tokens, segments = batch["decoder_input_tokens"], batch.get("decoder_segment_ids")
        positions = batch.get("decoder_positions")
        if positions is None:
            if segments is not None:
                raise DataError("a packed batch: expected decoder_positions, found none")
            positions = np.arange(tokens.shape[1])[None]
        return self.decoder(self._embed(tokens), segments, positions)

    def encode(
        self, tokens_BxS: Array, mask_BxS: Array, shared_P: Array | None = None
    ) -> list[KeysValues]:
        shared = None if shared_P is None else self._embed(shared_P[None])
        return self.decoder.encode(self._embed(tokens_BxS), mask_BxS, shared)

    def decode(self, memories: list[KeysValues], mask_BxS: Array, tokens: Array) -> Array:
        check_continuations(tokens, mask_BxS)
        x_NxTxD = self._embed(tokens.reshape(-1, tokens.shape[-1]))
        hidden, _ = self.decoder.further(x_NxTxD, memories, mask_BxS)
        return self.unembed(hidden).reshape(*tokens.shape, -1)

    def start_decoding(self, memories: list[KeysValues], mask_BxS: Array, max_length: int) -> Cache:
        c = self.config
        shape = (mask_BxS.shape[0], c.num_key_value_heads, max_length, c.head_dim)
        cache = empty_cache(c.num_hidden_layers, shape, self.execution.dtype)
        return {"mask": mask_BxS, "prefix": memories, "self": cache}

    def decode_step(self, cache: Cache, tokens_B: Array, position: Array) -> tuple[Array, Cache]:
        x_Bx1xD = self._embed(tokens_B[:, None])
        hidden_Bx1xD, presents = self.decoder.further(
            x_Bx1xD, cache["prefix"], cache["mask"], cache["self"], position
        )
        return self.unembed(hidden_Bx1xD)[:, 0], {**cache, "self": presents}
