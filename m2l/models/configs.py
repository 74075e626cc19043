"""The dimensions and variants of each model family: read and checked without any network.

Importing networks takes half a second, which merging does not need.
"""

import dataclasses
from typing import ClassVar

from m2l.errors import ConfigError
from m2l.models.fields import (
    LAYERS,
    NOT_NEGATIVE,
    POSITIVE,
    WIDTH,
    WORDS,
    check_choice,
    check_fields,
)

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Of a decoder's `hidden_act`: what the network calls it."""

DECODERS = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "phi3",
    "smollm3",
    "mixtral",
    "qwen3_moe",
    "olmoe",
)
"""What Hugging Face calls the decoders that are settings of one network."""

LATER_SETTINGS = frozenset(
    {
        *("rope_short_factor", "rope_long_factor", "rope_local_base_freq", "rotary_layers"),
        *("partial_rotary_factor", "omit_pre_norms", "qk_norm", "norm_topk_prob"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef"),
    }
)
"""Settings that models of the first version do not have."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

FEED_FORWARD = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
}
"""Of T5's `feed_forward_proj`: its activation, and whether it is gated."""


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
        scale_decoder_outputs: Whether the input of a tied output matrix is multiplied by
            d_model ** -0.5, as in T5 1.0.
        decoder_start_token_id: The token that starts every target.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    decoder_only: ClassVar[bool] = False
    logit_softcap: ClassVar[float] = 0.0
    router_aux_loss_coef: ClassVar[float] = 0.0

    vocab_size: int = dataclasses.field(metadata=WORDS)
    d_model: int = dataclasses.field(metadata=WIDTH)
    d_kv: int = dataclasses.field(metadata=WIDTH)
    d_ff: int = dataclasses.field(metadata=WIDTH)
    num_heads: int = dataclasses.field(metadata=WIDTH)
    num_encoder_layers: int = dataclasses.field(metadata=LAYERS)
    num_decoder_layers: int = dataclasses.field(metadata=LAYERS)
    relative_attention_num_buckets: int = dataclasses.field(default=32, metadata=WIDTH)
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = dataclasses.field(default=1e-6, metadata=POSITIVE)
    model_type: str = "t5"
    feed_forward_proj: str = "gated-gelu"
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool = False
    decoder_start_token_id: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice(self, "model_type", ("t5", "mt5"))
        check_choice(self, "feed_forward_proj", FEED_FORWARD)
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


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The dimensions and variants of a decoder, named as Hugging Face names them where it does.

    Attributes:
        head_dim: Features of a head; heads times it may differ from hidden_size.
        model_type: What Hugging Face calls the model, one of DECODERS. Used only for the names
            under which it is exported.
        max_position_embeddings: The longest row in its training; not used here.
        hidden_act: "silu", or "gelu_pytorch_tanh" (Gemma's).
        qkv_bias: Whether queries, keys and values have biases (Qwen2).
        out_bias: Whether the attention's output has one.
        windows: Per layer, how many positions it sees, itself included; 0 for all before it.
            Empty: every layer sees all.
        rope_theta: The base of the rotary frequencies.
        rope_type: "default", "linear", "llama3", "yarn" or "longrope"; the further rope_ settings
            belong to these, as in Hugging Face's rope_scaling.
        rope_short_factor: What longrope divides each frequency by; rope_long_factor in rows of more
            than rope_original_max_position_embeddings positions.
        rope_local_base_freq: The base of layers with windows, unscaled; 0: they are as the others
            (Gemma 3, OLMo 3).
        partial_rotary_factor: The share of a head's features that is rotated, the first (Phi).
        rotary_layers: Per layer, 1 where positions are rotary and 0 where there are none (SmolLM3).
            Empty: all are rotary.
        qk_norm: Whether queries and keys are normed before they are rotated: "" for no, "head" for
            each head by itself (Qwen3, Gemma 3), "whole" for all heads together (OLMo).
        norm_offset: What is added to the weights of norms: 1 for Gemma.
        scale_embeddings: Whether embeddings are multiplied by sqrt(hidden_size) (Gemma).
        query_pre_attn_scalar: Scores are divided by its square root; 0: by head_dim's.
        post_norms: Whether what a block adds is normed as well (Gemma 2).
        omit_pre_norms: Whether blocks read what is not normed, and norm what they add (OLMo 2).
        attn_logit_softcapping: c of c tanh(scores / c); 0: none (Gemma 2).
        final_logit_softcapping: The same for the logits.
        num_experts: MLPs of a layer, `moe_intermediate_size` wide, of which each token is sent to
            `num_experts_per_tok` (Shazeer et al. 2017); 0: one MLP, intermediate_size wide.
        norm_topk_prob: Whether the weights of a token's experts sum to 1.
        router_aux_loss_coef: What the loss that balances the experts is multiplied by in training.

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
    rope_short_factor: tuple[float, ...] = ()
    rope_long_factor: tuple[float, ...] = ()
    rope_local_base_freq: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    partial_rotary_factor: float = dataclasses.field(default=1.0, metadata=POSITIVE)
    rotary_layers: tuple[int, ...] = ()
    norm_offset: float = 0.0
    scale_embeddings: bool = False
    query_pre_attn_scalar: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    post_norms: bool = False
    omit_pre_norms: bool = False
    qk_norm: str = ""
    attn_logit_softcapping: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    final_logit_softcapping: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    num_experts: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    num_experts_per_tok: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    moe_intermediate_size: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice(self, "model_type", DECODERS)
        check_choice(self, "hidden_act", ACTIVATIONS)
        check_choice(self, "rope_type", ROPE_TYPES)
        check_choice(self, "qk_norm", ("", "head", "whole"))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"LlamaConfig.num_key_value_heads: {self.num_key_value_heads} does not divide the "
                f"{self.num_attention_heads} attention heads"
            )
        rotated = self.rotary_dim
        if self.head_dim % 2 or rotated % 2 or not 0 < rotated <= self.head_dim:
            name = "partial_rotary_factor" if rotated != self.head_dim else "head_dim"
            raise ConfigError(
                f"LlamaConfig.{name}: expected an even number (rotary positions turn pairs), "
                f"found {rotated}" + (f" of {self.head_dim}" if rotated != self.head_dim else "")
            )
        for name in ("windows", "rotary_layers"):
            numbers = getattr(self, name)
            if numbers and len(numbers) != self.num_hidden_layers:
                raise ConfigError(
                    f"LlamaConfig.{name}: {len(numbers)} numbers for {self.num_hidden_layers} "
                    "layers; give one for each, or none"
                )
        if self.omit_pre_norms and not self.post_norms:
            raise ConfigError("LlamaConfig.omit_pre_norms: blocks without any norm; set post_norms")
        self._check_rope()
        self._check_experts()

    def _check_rope(self) -> None:
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
        scaled = self.rope_type in ("llama3", "yarn", "longrope")
        if scaled and not self.rope_original_max_position_embeddings:
            raise ConfigError(
                f"LlamaConfig.rope_original_max_position_embeddings: rope_type {self.rope_type!r} "
                "needs it"
            )
        for name in ("rope_short_factor", "rope_long_factor"):
            factors = getattr(self, name)
            if self.rope_type == "longrope" and (
                len(factors) != self.rotary_dim // 2 or not all(factor > 0 for factor in factors)
            ):
                raise ConfigError(
                    f"LlamaConfig.{name}: expected {self.rotary_dim // 2} numbers above 0, one for "
                    f"each pair of features, found {list(factors)!r:.60}"
                )

    def _check_experts(self) -> None:
        if not self.num_experts:
            return
        if not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"LlamaConfig.num_experts_per_tok: expected 1 to {self.num_experts}, the number of "
                f"experts, found {self.num_experts_per_tok}"
            )
        if not self.moe_intermediate_size:
            raise ConfigError(
                "LlamaConfig.moe_intermediate_size: a mixture of experts needs the width of each"
            )

    @property
    def mlp_size(self) -> int:
        """Features within the MLPs that a token goes through."""
        return self.num_experts_per_tok * self.moe_intermediate_size or self.intermediate_size

    @property
    def rotary_dim(self) -> int:
        """How many features of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def logit_softcap(self) -> float:
        """c of c tanh(logits / c); 0: none."""
        return self.final_logit_softcapping
