"""T5 1.1 (Raffel et al. 2020; Shazeer 2020): an encoder and a decoder with relative positions.

Letters in names are axes: B inputs, C answer choices of an input, N = B * C decoder rows, S input
and T target positions, D features, V vocabulary, H heads, R distances.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jax.typing import DTypeLike

from m2l.errors import ConfigError, DataError
from m2l.models.layers import (
    Array,
    Attention,
    GatedMlp,
    KeysValues,
    bias_matrix,
    dense,
    hide,
    relative_position_buckets,
    rms_norm,
)
from m2l.models.settings import check_choice, check_fields
from m2l.partitioning import constrain

PAD_ID = 0
"""Fills inputs up, and starts every target."""

Cache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The dimensions and variants of a T5, named as Hugging Face's T5Config names them.

    The defaults are T5 1.1's, and with them FLAN-T5's, T0's and mT5's. T5 1.0 is
    `feed_forward_proj="relu"` and `tie_word_embeddings=True`.

    Attributes:
        model_type: What Hugging Face calls the model: "t5" or "mt5". The network is the same.
        feed_forward_proj: "relu", "gelu" (the exact form), "gated-gelu" (the tanh form) or
            "gated-silu".
        tie_word_embeddings: Whether the embedding is the output's matrix as well.
        scale_decoder_outputs: Whether what a tied output matrix is given is first multiplied by
            d_model ** -0.5, as T5 1.0 does.
        decoder_start_token_id: The token that starts every target.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    model_type: str = "t5"
    feed_forward_proj: str = "gated-gelu"
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool = False
    decoder_start_token_id: int = dataclasses.field(default=0, metadata={"least": 0})

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice(self, "model_type", ("t5", "mt5"))
        check_choice(self, "feed_forward_proj", ("relu", "gelu", "gated-gelu", "gated-silu"))
        if not self.layer_norm_epsilon > 0:
            raise ConfigError(
                f"T5Config.layer_norm_epsilon: expected more than 0, found "
                f"{self.layer_norm_epsilon}"
            )
        if self.scale_decoder_outputs and not self.tie_word_embeddings:
            raise ConfigError(
                "T5Config.scale_decoder_outputs: only a tied output is scaled; set "
                "tie_word_embeddings as well"
            )
        if self.decoder_start_token_id >= self.vocab_size:
            raise ConfigError(
                f"T5Config.decoder_start_token_id: {self.decoder_start_token_id} is outside the "
                f"vocabulary of {self.vocab_size}"
            )
        buckets, farthest = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 4 or buckets % 2:
            raise ConfigError(
                f"T5Config.relative_attention_num_buckets: expected an even number of at least 4 "
                f"(half of them for each direction), found {buckets}"
            )
        if farthest <= buckets // 2:
            raise ConfigError(
                f"T5Config.relative_attention_max_distance: expected more than half of the "
                f"{buckets} buckets, found {farthest}"
            )


class _Layer(nn.Module):
    """Self-attention, in a decoder cross-attention, and a gated MLP; each normed, each added."""

    config: T5Config
    dtype: DTypeLike
    is_decoder: bool
    dropout: nn.Dropout

    def setup(self) -> None:
        c = self.config
        ones = initializers.ones, (c.d_model,)
        attention = functools.partial(Attention, c.num_heads, c.d_kv, c.d_model, self.dropout)
        self.pre_self_attention_norm = self.param("pre_self_attention_norm", *ones)
        self.self_attention = attention()
        if self.is_decoder:
            self.pre_cross_attention_norm = self.param("pre_cross_attention_norm", *ones)
            self.cross_attention = attention()
        self.pre_mlp_norm = self.param("pre_mlp_norm", *ones)
        self.mlp = GatedMlp(c.d_model, c.d_ff, self.dropout)

    def _norm(self, x: Array, scale_D: Array) -> Array:
        return rms_norm(x, scale_D, self.config.layer_norm_epsilon, self.dtype)

    def memory(self, encoded_BxSxD: Array) -> KeysValues:
        """What the cross-attention reads from."""
        return self.cross_attention.keys_values(encoded_BxSxD)

    def __call__(
        self,
        x_NxTxD: Array,
        bias: Array,
        memory: KeysValues | None = None,
        memory_bias: Array | None = None,
        past: KeysValues | None = None,
        position: Array | None = None,
    ) -> tuple[Array, KeysValues]:
        """The layer's output, and the keys and values that its self-attention read.

        With `past` (decoding step by step), x is written into it at `position`, and all is read.
        """
        h = self._norm(x_NxTxD, self.pre_self_attention_norm)
        present = self.self_attention.keys_values(h)
        if past is not None:
            present = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, position, 0)),
                past,
                present,
            )
        x_NxTxD = x_NxTxD + self.dropout(self.self_attention(h, present, bias))
        if self.is_decoder:
            h = self._norm(x_NxTxD, self.pre_cross_attention_norm)
            # The C choices of an input are further queries to the one memory: [B, C * T, D].
            folded = h.reshape(memory[0].shape[0], -1, h.shape[-1])
            read = self.cross_attention(folded, memory, memory_bias)
            x_NxTxD = x_NxTxD + self.dropout(read.reshape(h.shape))
        h = self._norm(x_NxTxD, self.pre_mlp_norm)
        x_NxTxD = x_NxTxD + self.dropout(self.mlp(h))
        return constrain(x_NxTxD, "batch", None, None), present


class _Stack(nn.Module):
    """The layers of an encoder or a decoder, their one table of position biases, the last norm."""

    config: T5Config
    dtype: DTypeLike
    is_decoder: bool
    dropout_rate: float

    def setup(self) -> None:
        c = self.config
        # T5 drops a feature at all positions of a row at once, except in what the encoder returns.
        dropout = functools.partial(nn.Dropout, self.dropout_rate, deterministic=False)
        self.dropout = dropout(broadcast_dims=(-2,))
        self.last_dropout = self.dropout if self.is_decoder else dropout()
        self.relpos_bias = self.param(
            "relpos_bias",
            initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (c.num_heads, c.relative_attention_num_buckets),
        )
        self.layers = [
            _Layer(c, self.dtype, self.is_decoder, self.dropout, name=f"layers_{i:02}")
            for i in range(c.num_decoder_layers if self.is_decoder else c.num_encoder_layers)
        ]
        self.norm = self.param("norm", initializers.ones, (c.d_model,))
        if self.is_decoder:
            self.logits = self.param(
                "logits",
                initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
                (c.d_model, c.vocab_size),
            )

    def _bias_by_distance(self, length: int) -> Array:
        """[H, R], float32, at the distances 1 - length ... length - 1."""
        buckets = relative_position_buckets(
            np.arange(1 - length, length),
            bidirectional=not self.is_decoder,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return self.relpos_bias.astype(jnp.float32)[:, buckets]

    def _finish(self, x: Array) -> Array:
        x = rms_norm(x, self.norm, self.config.layer_norm_epsilon, self.dtype)
        x = self.last_dropout(x)
        if not self.is_decoder:
            return x
        return constrain(dense(x, self.logits, jnp.float32), "batch", None, "vocab")

    def memories(self, encoded_BxSxD: Array) -> list[KeysValues]:
        return [layer.memory(encoded_BxSxD) for layer in self.layers]

    def __call__(
        self,
        x_NxTxD: Array,
        mask: Array,
        memories: list[KeysValues] | None = None,
        memory_bias: Array | None = None,
    ) -> Array:
        """All positions at once: the encoded input [B, S, D], or a decoder's logits [N, T, V].

        `mask` is bool, broadcastable to [N, H, T, T].
        """
        length = x_NxTxD.shape[1]
        # Once for all layers, mask included: their gradients are summed before the rows are.
        bias = hide(mask, bias_matrix(self._bias_by_distance(length), length, length))
        x_NxTxD = self.dropout(x_NxTxD)
        for layer, memory in zip(self.layers, memories or [None] * len(self.layers), strict=True):
            x_NxTxD, _ = layer(x_NxTxD, bias, memory, memory_bias)
        return self._finish(x_NxTxD)

    def step(self, x_Bx1xD: Array, cache: Cache, position: Array) -> tuple[Array, Cache]:
        """One position of a decoder: its logits [B, 1, V], and the cache with it added."""
        max_length = cache["self"][0][0].shape[2]
        by_distance_HxR = self._bias_by_distance(max_length)
        row_Hx1xT = jax.lax.dynamic_slice_in_dim(
            by_distance_HxR, max_length - 1 - position, max_length, axis=1
        )[:, None]
        bias = hide(jnp.arange(max_length) <= position, row_Hx1xT)
        memory_bias = hide(cache["encoder_mask"][:, None, None, :])
        presents = []
        for layer, memory, past in zip(self.layers, cache["cross"], cache["self"], strict=True):
            x_Bx1xD, present = layer(x_Bx1xD, bias, memory, memory_bias, past, position)
            presents.append(present)
        return self._finish(x_Bx1xD), {**cache, "self": presents}


class T5(nn.Module):
    """The network behind `m2l.models`, whose functions of the same names say what these do."""

    config: T5Config
    dtype: DTypeLike = jnp.float32
    dropout_rate: float = 0.0

    def setup(self) -> None:
        c = self.config
        self.token_embedder = self.param(
            "token_embedder", initializers.normal(1.0), (c.vocab_size, c.d_model)
        )
        self.encoder = _Stack(c, self.dtype, False, self.dropout_rate)
        self.decoder = _Stack(c, self.dtype, True, self.dropout_rate)

    def _embed(self, tokens: Array) -> Array:
        # An id outside the vocabulary becomes NaN, where indexing would take the last row.
        table = constrain(self.token_embedder, "vocab", None)
        embedded = jnp.take(table, tokens, axis=0, mode="fill")
        return constrain(embedded.astype(self.dtype), "batch", None, None)

    def _decode(
        self, encoded_BxSxD: Array, visible: Array, tokens_NxT: Array, causal: Array
    ) -> Array:
        memories = self.decoder.memories(encoded_BxSxD)
        return self.decoder(self._embed(tokens_NxT), causal, memories, hide(visible))

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        inputs, targets = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
        segments = [name for name in batch if name.endswith("_segment_ids")]
        if not segments:
            return self.decode(self.encode(inputs), inputs != PAD_ID, targets)
        if len(segments) == 1:
            raise DataError(
                f"a packed batch: expected encoder_segment_ids and decoder_segment_ids, found only "
                f"{segments[0]}"
            )
        of_input, of_target = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
        encoded_BxSxD = self.encoder(self._embed(inputs), _same_segment(of_input, of_input))
        causal = _causal(targets.shape[1]) & _same_segment(of_target, of_target)
        return self._decode(encoded_BxSxD, _same_segment(of_target, of_input), targets, causal)

    def encode(self, tokens_BxS: Array) -> Array:
        return self.encoder(self._embed(tokens_BxS), (tokens_BxS != PAD_ID)[:, None, None, :])

    def decode(self, encoded_BxSxD: Array, encoder_mask_BxS: Array, tokens: Array) -> Array:
        shape, inputs = tokens.shape, encoded_BxSxD.shape[0]
        if len(shape) not in (2, 3) or shape[0] != inputs:
            raise DataError(
                f"decoder_input_tokens: expected [B, T] or [B, C, T] for B = {inputs} encoded "
                f"inputs, found {list(shape)}"
            )
        # Padding needs no mask: it is at the end, and its id is also the one that starts a target.
        causal = _causal(shape[-1])
        tokens_NxT = tokens.reshape(-1, shape[-1])
        visible = encoder_mask_BxS[:, None, None, :]
        return self._decode(encoded_BxSxD, visible, tokens_NxT, causal).reshape(*shape, -1)

    def start_decoding(
        self, encoded_BxSxD: Array, encoder_mask_BxS: Array, max_length: int
    ) -> Cache:
        c = self.config
        room = (encoded_BxSxD.shape[0], c.num_heads, max_length, c.d_kv)
        # Distinct arrays, so that a caller may donate the cache.
        empty = [jnp.zeros(room, self.dtype) for _ in range(2 * c.num_decoder_layers)]
        return {
            "encoder_mask": encoder_mask_BxS,
            "cross": self.decoder.memories(encoded_BxSxD),
            "self": list(zip(empty[::2], empty[1::2], strict=True)),
        }

    def decode_step(self, cache: Cache, tokens_B: Array, position: Array) -> tuple[Array, Cache]:
        logits_Bx1xV, cache = self.decoder.step(self._embed(tokens_B[:, None]), cache, position)
        return logits_Bx1xV[:, 0], cache


def _same_segment(of_query_BxQ: Array, of_key_BxS: Array) -> Array:
    return (of_query_BxQ[:, :, None] == of_key_BxS[:, None, :])[:, None]


def _causal(length: int) -> np.ndarray:
    return np.tril(np.ones((length, length), bool))
