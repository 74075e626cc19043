"""T5 1.0 and 1.1 (Raffel et al. 2020; Shazeer 2020): encoder, decoder, relative positions.

Letters in names are axes: B inputs, C answer choices of an input, N = B * C decoder rows, S input
and T target positions, D features, V vocabulary, H heads, R distances.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers

from m2l.errors import DataError
from m2l.models.attention import hide, same_segment
from m2l.models.configs import FEED_FORWARD, T5Config
from m2l.models.layers import (
    Array,
    Attention,
    Cache,
    Execution,
    KeysValues,
    Mlp,
    bias_matrix,
    check_continuations,
    dense,
    embed,
    empty_cache,
    relative_position_buckets,
    rms_norm,
    through,
)
from m2l.partitioning import constrain


class _T5Layer(nn.Module):
    """Self-attention, in a decoder cross-attention, and an MLP; each normed, each added."""

    config: T5Config
    is_decoder: bool
    execution: Execution

    def setup(self) -> None:
        c = self.config
        ones = initializers.ones, (c.d_model,)
        attention = functools.partial(Attention, c.num_heads, c.d_kv, c.d_model, self.execution)
        self.pre_self_attention_norm = self.param("pre_self_attention_norm", *ones)
        self.self_attention = attention()
        if self.is_decoder:
            self.pre_cross_attention_norm = self.param("pre_cross_attention_norm", *ones)
            self.cross_attention = attention()
        self.pre_mlp_norm = self.param("pre_mlp_norm", *ones)
        init = initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        feed_forward = FEED_FORWARD[c.feed_forward_proj]
        self.mlp = Mlp(c.d_model, c.d_ff, *feed_forward, init, self.execution)
        # T5 drops a feature at all positions of a row at once.
        self.dropout = self.execution.dropout(-2)

    def _norm(self, x: Array, scale_D: Array) -> Array:
        return rms_norm(x, scale_D, self.config.layer_norm_epsilon, self.execution.dtype)

    def memory(self, encoded_BxSxD: Array) -> KeysValues:
        """Returns the keys and values by which this layer reads the encoded inputs."""
        return self.cross_attention.keys_values(encoded_BxSxD)

    def __call__(
        self,
        x_NxTxD: Array,
        bias: Array,
        encoded_BxSxD: Array | None = None,
        memory_bias: Array | None = None,
    ) -> Array:
        memory = None if encoded_BxSxD is None else self.memory(encoded_BxSxD)
        return self.run(x_NxTxD, bias, memory, memory_bias)[0]

    def run(
        self,
        x_NxTxD: Array,
        bias: Array,
        memory: KeysValues | None,
        memory_bias: Array | None,
        past: KeysValues | None = None,
        position: Array | None = None,
    ) -> tuple[Array, KeysValues]:
        """Returns the layer's output, and the keys and values that its self-attention read.

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


class _T5Stack(nn.Module):
    """The layers of an encoder or a decoder, their one table of position biases, the last norm."""

    config: T5Config
    is_decoder: bool
    execution: Execution

    def setup(self) -> None:
        c = self.config
        # One mask for all positions of a row, except in what the encoder returns.
        self.dropout = self.execution.dropout(-2)
        self.last_dropout = self.dropout if self.is_decoder else self.execution.dropout()
        self.relpos_bias = self.param(
            "relpos_bias",
            initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (c.num_heads, c.relative_attention_num_buckets),
        )
        self.layers = [
            _T5Layer(c, self.is_decoder, self.execution, name=f"layers_{i:02}")
            for i in range(c.num_decoder_layers if self.is_decoder else c.num_encoder_layers)
        ]
        self.norm = self.param("norm", initializers.ones, (c.d_model,))
        if self.is_decoder and not c.tie_word_embeddings:
            self.logits = self.param(
                "logits",
                initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
                (c.d_model, c.vocab_size),
            )

    def _bias_by_distance(self, length: int) -> Array:
        """Returns biases [H, R], float32, at the distances 1 - length ... length - 1."""
        buckets = relative_position_buckets(
            np.arange(1 - length, length),
            bidirectional=not self.is_decoder,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return self.relpos_bias.astype(jnp.float32)[:, buckets]

    def _finish(self, x: Array) -> Array:
        x = rms_norm(x, self.norm, self.config.layer_norm_epsilon, self.execution.dtype)
        x = self.last_dropout(x)
        if self.is_decoder and self.config.scale_decoder_outputs:
            x = x * self.config.d_model**-0.5
        return x

    def memories(self, encoded_BxSxD: Array) -> list[KeysValues]:
        return [layer.memory(encoded_BxSxD) for layer in self.layers]

    def __call__(
        self,
        x_NxTxD: Array,
        mask: Array,
        encoded_BxSxD: Array | None = None,
        memory_bias: Array | None = None,
    ) -> Array:
        """Computes all positions at once: the encoded input [B, S, D], or the hidden states.

        `mask` is bool, broadcastable to [N, H, T, T].
        """
        length = x_NxTxD.shape[1]
        # Once for all layers, mask included: their gradients are summed before the rows are.
        bias = hide(mask, bias_matrix(self._bias_by_distance(length), length, length))
        shared = (bias, encoded_BxSxD, memory_bias)
        each = [()] * len(self.layers)
        return self._finish(
            through(self.layers, self.dropout(x_NxTxD), each, shared, self.execution)
        )

    def step(self, x_Bx1xD: Array, cache: Cache, position: Array) -> tuple[Array, Cache]:
        """Computes one position of a decoder, [B, 1, D], and adds it to the cache."""
        max_length = cache["self"][0][0].shape[2]
        by_distance_HxR = self._bias_by_distance(max_length)
        row_Hx1xT = jax.lax.dynamic_slice_in_dim(
            by_distance_HxR, max_length - 1 - position, max_length, axis=1
        )[:, None]
        bias = hide(jnp.arange(max_length) <= position, row_Hx1xT)
        memory_bias = hide(cache["mask"][:, None, None, :])
        presents = []
        for layer, memory, past in zip(self.layers, cache["cross"], cache["self"], strict=True):
            x_Bx1xD, present = layer.run(x_Bx1xD, bias, memory, memory_bias, past, position)
            presents.append(present)
        return self._finish(x_Bx1xD), {**cache, "self": presents}


class T5(nn.Module):
    """The network of `m2l.models`, where functions of the same names document its methods."""

    config: T5Config
    execution: Execution

    def setup(self) -> None:
        c = self.config
        self.token_embedder = self.param(
            "token_embedder", initializers.normal(1.0), (c.vocab_size, c.d_model)
        )
        self.encoder = _T5Stack(c, False, self.execution)
        self.decoder = _T5Stack(c, True, self.execution)

    def _embed(self, tokens: Array) -> Array:
        return embed(self.token_embedder, tokens, self.execution.dtype)

    def unembed(self, hidden: Array) -> Array:
        tied = self.config.tie_word_embeddings
        kernel_DxV = self.token_embedder.T if tied else self.decoder.logits
        return constrain(dense(hidden, kernel_DxV, jnp.float32), "batch", None, "vocab")

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        return self.unembed(self.hidden(batch))

    def hidden(self, batch: Mapping[str, Array]) -> Array:
        if "encoder_input_tokens" not in batch:
            raise DataError("a batch for T5: expected encoder_input_tokens, found none")
        inputs, targets = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
        segments = [name for name in batch if name.endswith("_segment_ids")]
        if not segments:
            mask_BxS = inputs != 0
            encoded_BxSxD = self.encode(inputs, mask_BxS)
            return self._decode(encoded_BxSxD, mask_BxS[:, None, None, :], targets, True)
        if len(segments) == 1:
            raise DataError(
                f"a packed batch: expected encoder_segment_ids and decoder_segment_ids, found only "
                f"{segments[0]}"
            )
        input_segments, target_segments = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
        encoded_BxSxD = self.encoder(
            self._embed(inputs), same_segment(input_segments, input_segments)
        )
        visible = same_segment(target_segments, input_segments)
        own = same_segment(target_segments, target_segments)
        return self._decode(encoded_BxSxD, visible, targets, own)

    def _decode(
        self, encoded_BxSxD: Array, visible: Array, tokens_NxT: Array, mask: Array | bool
    ) -> Array:
        # Padding needs no mask of its own: it is after all tokens.
        causal = np.tril(np.ones((tokens_NxT.shape[1],) * 2, bool)) & mask
        return self.decoder(self._embed(tokens_NxT), causal, encoded_BxSxD, hide(visible))

    def encode(self, tokens_BxS: Array, mask_BxS: Array) -> Array:
        return self.encoder(self._embed(tokens_BxS), mask_BxS[:, None, None, :])

    def decode(self, encoded_BxSxD: Array, mask_BxS: Array, tokens: Array) -> Array:
        check_continuations(tokens, mask_BxS)
        tokens_NxT = tokens.reshape(-1, tokens.shape[-1])
        hidden = self._decode(encoded_BxSxD, mask_BxS[:, None, None, :], tokens_NxT, True)
        return self.unembed(hidden).reshape(*tokens.shape, -1)

    def start_decoding(self, encoded_BxSxD: Array, mask_BxS: Array, max_length: int) -> Cache:
        c = self.config
        shape = (encoded_BxSxD.shape[0], c.num_heads, max_length, c.d_kv)
        return {
            "mask": mask_BxS,
            "cross": self.decoder.memories(encoded_BxSxD),
            "self": empty_cache(c.num_decoder_layers, shape, self.execution.dtype),
        }

    def decode_step(self, cache: Cache, tokens_B: Array, position: Array) -> tuple[Array, Cache]:
        hidden_Bx1xD, cache = self.decoder.step(self._embed(tokens_B[:, None]), cache, position)
        return self.unembed(hidden_Bx1xD)[:, 0], cache
