"""The Llama family: decoders with RMSNorm, rotary positions, grouped-query attention, gated MLPs.

Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024), Mistral, Qwen2, SmolLM2 and Gemma 2
are settings of one network.

Letters in names are axes: B rows, C continuations of a row, T positions, S positions of a prefix,
D features, V vocabulary, H heads, G heads of keys and values, K features of a head.
"""

import dataclasses

from m2l.errors import ConfigError
from m2l.models.settings import check_choice, check_fields

_NONE = {"least": 0}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The dimensions and variants of a decoder, named as Hugging Face names them where it does.

    Attributes:
        head_dim: Features of a head; heads times it may differ from hidden_size.
        model_type: What Hugging Face calls the model: "llama", "mistral", "qwen2" or "gemma2".
            Decides nothing here but the names under which it is exported.
        max_position_embeddings: The longest row it was made for; decides nothing here.
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

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    windows: tuple[int, ...] = ()
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_original_max_position_embeddings: int = dataclasses.field(default=0, metadata=_NONE)
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_attention_factor: float = 0.0
    norm_offset: float = 0.0
    scale_embeddings: bool = False
    query_pre_attn_scalar: float = 0.0
    post_norms: bool = False
    attn_logit_softcapping: float = 0.0
    final_logit_softcapping: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice(self, "model_type", ("llama", "mistral", "qwen2", "gemma2"))
        check_choice(self, "hidden_act", ("silu", "gelu_pytorch_tanh"))
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
        for name in ("rms_norm_eps", "rope_theta", "rope_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"LlamaConfig.{name}: expected more than 0, found {getattr(self, name)}"
                )
        if self.rope_type in ("llama3", "yarn") and not self.rope_original_max_position_embeddings:
            raise ConfigError(
                f"LlamaConfig.rope_original_max_position_embeddings: rope_type {self.rope_type!r} "
                "needs it"
            )
