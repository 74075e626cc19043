"""The Llama family: decoders with RMSNorm, rotary positions, grouped-query attention, gated MLPs.

Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024), Mistral, Qwen2, SmolLM2 and Gemma 2
are settings of one network.

Letters in names are axes: B rows, C continuations of a row, T positions, S positions of a prefix,
D features, V vocabulary, H heads, G heads of keys and values, K features of a head.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers

from m2l.errors import ConfigError, DataError
from m2l.models.attention import Causal, attend, attend_parts, hide
from m2l.models.fields import (
    LAYERS,
    NOT_NEGATIVE,
    POSITIVE,
    WIDTH,
    WORDS,
    check_choice,
    check_fields,
)
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

Rotations = tuple[Array, Array]
"""Cosines and sines of the angles, float32 [N, 1, T, K / 2] each."""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_INIT = initializers.normal(0.02)  # the initializer_range of all of them


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The dimensions and variants of a decoder, named as Hugging Face names them where it does.

    Attributes:
        head_dim: Features of a head; heads times it may differ from hidden_size.
        model_type: What Hugging Face calls the model: "llama", "mistral", "qwen2" or "gemma2".
            Used only for the names under which it is exported.
        max_position_embeddings: The longest row in its training; not used here.
        hidden_act: "silu", or "gelu_pytorch_tanh" (Gemma's).
        qkv_bias: Whether queries, keys and values have biases (Qwen2).
        out_bias: Whether the attention's output has one.
        windows: Per layer, how many positions it sees, itself included; 0 for all before it.
            Empty: every layer sees all.
        rope_theta: The base of the rotary frequencies.
        rope_type: "default", "linear", "llama3" or "yarn"; the further rope_ settings belong to
            these, as in Hugging Face's rope_scaling.
        norm_offset: What is added to the weights of norms: 1 for Gemma.
        scale_embeddings: Whether embeddings are multiplied by sqrt(hidden_size) (Gemma).
        query_pre_attn_scalar: Scores are divided by its square root; 0: by head_dim's.
        post_norms: Whether what a block adds is normed as well (Gemma 2).
        attn_logit_softcapping: c of c tanh(scores / c); 0: none (Gemma 2).
        final_logit_softcapping: The same for the logits.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    decoder_only: ClassVar[bool] = True

    vocab_size: int = dataclasses.field(metadata=WORDS)
    hidden_size: int = dataclasses.field(metadata=WIDTH)
    intermediate_size: int = dataclasses.field(metadata=WIDTH)
    num_hidden_layers: int = dataclasses.field(metadata=LAYERS)
    num_attention_heads: int = dataclasses.field(metadata=WIDTH)
    num_key_value_heads: int = dataclasses.field(metadata=WIDTH)
    head_dim: int = dataclasses.field(metadata=WIDTH)
    model_type: str = "llama"
    rms_norm_eps: float = dataclasses.field(default=1e-5, metadata=POSITIVE)
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    windows: tuple[int, ...] = ()
    rope_theta: float = dataclasses.field(default=10000.0, metadata=POSITIVE)
    rope_type: str = "default"
    rope_factor: float = dataclasses.field(default=1.0, metadata=POSITIVE)
    rope_original_max_position_embeddings: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_attention_factor: float = 0.0
    norm_offset: float = 0.0
    scale_embeddings: bool = False
    query_pre_attn_scalar: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    post_norms: bool = False
    attn_logit_softcapping: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    final_logit_softcapping: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice(self, "model_type", ("llama", "mistral", "qwen2", "gemma2"))
        check_choice(self, "hidden_act", _ACTIVATIONS)
        check_choice(self, "rope_type", ("default", "linear", "llama3", "yarn"))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"LlamaConfig.num_key_value_heads: {self.num_key_value_heads} does not divide the "
                f"{self.num_attention_heads} attention heads"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"LlamaConfig.head_dim: expected an even number (rotary positions turn pairs), "
                f"found {self.head_dim}"
            )
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ConfigError(
                f"LlamaConfig.windows: {len(self.windows)} numbers for {self.num_hidden_layers} "
                "layers; give one for each, or none"
            )
        above = {}
        if self.rope_type == "yarn":
            above = {"rope_theta": 1.0, "rope_beta_fast": 0.0, "rope_beta_slow": 0.0}
        if self.rope_type == "llama3":
            above["rope_high_freq_factor"] = self.rope_low_freq_factor
        for name, least in above.items():
            if not getattr(self, name) > least:
                raise ConfigError(
                    f"LlamaConfig.{name}: expected more than {least:g}, found {getattr(self, name)}"
                )
        if self.rope_type in ("llama3", "yarn") and not self.rope_original_max_position_embeddings:
            raise ConfigError(
                f"LlamaConfig.rope_original_max_position_embeddings: rope_type {self.rope_type!r} "
                "needs it"
            )

    @property
    def logit_softcap(self) -> float:
        """c of c tanh(logits / c); 0: none."""
        return self.final_logit_softcapping


def rotary_frequencies(config: LlamaConfig) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each pair of features, float32 [K / 2], and a factor.

    The factor scales the rotated pair.

    Computed on the host in float32, as Hugging Face does.

    Source: Su et al. 2021 (rotary positions); Chen et al. 2023 (linear); Llama 3's own scaling by
    wave length; Peng et al. 2023 (YaRN).
    """
    c, size = config, config.head_dim
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain = (1.0 / np.float32(c.rope_theta) ** exponents).astype(np.float32)
    if c.rope_type == "default":
        return plain, 1.0
    stretched = plain / np.float32(c.rope_factor)
    if c.rope_type == "linear":
        return stretched, 1.0
    original = c.rope_original_max_position_embeddings
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
    factor = c.rope_attention_factor
    if not factor:
        factor = 0.1 * math.log(c.rope_factor) + 1.0 if c.rope_factor > 1 else 1.0
    return (share * plain + (1 - share) * stretched).astype(np.float32), factor


def rotations(config: LlamaConfig, positions_NxT: Array | np.ndarray) -> Rotations:
    """Returns the rotations of rows at these positions."""
    frequencies, factor = rotary_frequencies(config)
    # On the host where it can be: XLA's CPU backend computes them anew for every head.
    xp = np if isinstance(positions_NxT, np.ndarray) else jnp
    angles = positions_NxT[:, None, :, None].astype(np.float32) * frequencies
    return xp.cos(angles) * xp.float32(factor), xp.sin(angles) * xp.float32(factor)


def rotate(x_NxHxTxK: Array, turns: Rotations) -> Array:
    """Rotations each pair of features (i, i + K / 2) by its position's angle, in float32."""
    cosine, sine = turns
    first, second = jnp.split(x_NxHxTxK.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x_NxHxTxK.dtype)


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
        self.out = self.param("out", _INIT, (queries, c.hidden_size))
        if c.out_bias:
            self.out_bias = self.param("out_bias", initializers.zeros, (c.hidden_size,))

    def _heads(self, name: str, x_NxTxD: Array, heads: int) -> Array:
        joined = dense(x_NxTxD, self.kernels[name])
        if name in self.biases:
            joined = joined + self.biases[name].astype(joined.dtype)
        return split_heads(constrain(joined, "batch", None, "heads"), heads)

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
        names = ["pre_self_attention_norm", "pre_mlp_norm"]
        names += ["post_self_attention_norm", "post_mlp_norm"] if c.post_norms else []
        init = initializers.constant(1.0 - c.norm_offset)
        self.norms = {name: self.param(name, init, (c.hidden_size,)) for name in names}
        self.self_attention = _LlamaAttention(c)
        activation = _ACTIVATIONS[c.hidden_act]
        self.mlp = Mlp(c.hidden_size, c.intermediate_size, activation, True, _INIT, self.execution)
        self.dropout = self.execution.dropout(-2)
        scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5
        self.scores = {"scale": scale, "softcap": c.attn_logit_softcapping}

    def _norm(self, name: str, x: Array) -> Array:
        scale_D = self.norms[name] + self.config.norm_offset
        return rms_norm(x, scale_D, self.config.rms_norm_eps, self.execution.dtype)

    def _add(self, x_NxTxD: Array, block: str, added: Array) -> Array:
        if self.config.post_norms:
            added = self._norm(f"post_{block}_norm", added)
        return constrain(x_NxTxD + self.dropout(added), "batch", None, None)

    def _after(self, x_NxTxD: Array, read_NxHxTxK: Array) -> Array:
        x_NxTxD = self._add(
            x_NxTxD, "self_attention", self.self_attention.project_out(read_NxHxTxK)
        )
        return self._add(x_NxTxD, "mlp", self.mlp(self._norm("pre_mlp_norm", x_NxTxD)))

    def __call__(
        self, x_BxTxD: Array, window: int | Array, segments_BxT: Array | None, turns: Rotations
    ) -> Array:
        return self.first(x_BxTxD, window, segments_BxT, turns)[0]

    def first(
        self, x_BxTxD: Array, window: int | Array, segments_BxT: Array | None, turns: Rotations
    ) -> tuple[Array, KeysValues]:
        """Returns the layer's output on rows from their beginning, and their keys and values."""
        h = self._norm("pre_self_attention_norm", x_BxTxD)
        query, present = self.self_attention.project(h, turns)
        visible = Causal(segments_BxT, window)
        kernel = self.execution.attention
        read = attend(query, *present, visible, **self.scores, implementation=kernel)
        return self._after(x_BxTxD, read), present

    def further(
        self,
        x_NxTxD: Array,
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
        query, present = self.self_attention.project(h, turns)
        if past is not None:
            present = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, position, 0)),
                past,
                present,
            )
        parts = [(*memory, memory_bias), (*present, bias)]
        return self._after(x_NxTxD, attend_parts(query, parts, **self.scores)), present


class _LlamaDecoder(nn.Module):
    config: LlamaConfig
    execution: Execution

    def setup(self) -> None:
        c = self.config
        self.layers = [
            _LlamaLayer(c, self.execution, name=f"layers_{i:02}")
            for i in range(c.num_hidden_layers)
        ]
        self.windows = c.windows or (0,) * c.num_hidden_layers
        self.norm = self.param("norm", initializers.constant(1.0 - c.norm_offset), (c.hidden_size,))
        if not c.tie_word_embeddings:
            self.logits = self.param("logits", _INIT, (c.hidden_size, c.vocab_size))

    def _finish(self, x: Array) -> Array:
        scale_D = self.norm + self.config.norm_offset
        return rms_norm(x, scale_D, self.config.rms_norm_eps, self.execution.dtype)

    def __call__(
        self, x_BxTxD: Array, segments_BxT: Array | None, positions_BxT: Array | np.ndarray
    ) -> Array:
        shared = segments_BxT, rotations(self.config, positions_BxT)
        each = [(window,) for window in self.windows]
        return self._finish(through(self.layers, x_BxTxD, each, shared, self.execution))

    def encode(self, x_BxSxD: Array, mask_BxS: Array) -> list[KeysValues]:
        """Returns the keys and values of each layer."""
        turns = rotations(self.config, np.arange(x_BxSxD.shape[1])[None])
        memories = []
        for layer, window in zip(self.layers, self.windows, strict=True):
            x_BxSxD, present = layer.first(x_BxSxD, window, mask_BxS.astype(jnp.int32), turns)
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
        positions_NxT = jnp.sum(mask_NxS, axis=1)[:, None] + query_places_T
        turns = rotations(self.config, positions_NxT)
        behind_TxU = query_places_T[:, None] - key_places_U
        from_prefix_NxTxS = positions_NxT[..., None] - jnp.arange(mask_NxS.shape[1])
        presents = []
        for i, (layer, window) in enumerate(zip(self.layers, self.windows, strict=True)):
            own, seen = behind_TxU >= 0, mask_NxS[:, None, :]
            if window:
                own, seen = own & (behind_TxU < window), seen & (from_prefix_NxTxS < window)
            biases = hide(seen[:, None]), hide(own)
            past = None if pasts is None else pasts[i]
            x_NxTxD, present = layer.further(x_NxTxD, turns, memories[i], *biases, past, position)
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

    def encode(self, tokens_BxS: Array, mask_BxS: Array) -> list[KeysValues]:
        return self.decoder.encode(self._embed(tokens_BxS), mask_BxS)

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
