"""The decoders of Hugging Face as data: what of config.json each family reads, and what is fixed.

A family is a row here, and its name one of `models.configs.DECODERS`; the network is the same.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from m2l.typing import Json

Values = Mapping[str, Json]


@dataclasses.dataclass(frozen=True)
class DecoderFamily:
    """What sets a family apart, in the words of config.json and of LlamaConfig.

    Attributes:
        architecture: Its class in transformers.
        defaults: Fields of config.json that its class completes otherwise than Llama's.
        settings: Settings of LlamaConfig that all its models have.
        reads: Setting of LlamaConfig -> the field of config.json whose value it is.
        slides: Whether a layer has a window, of its number and the fields, where no layer_types
            are written.
        lists_layers: Whether layer_types decides which layers have one.
        optional_windows: Whether there are windows only with use_sliding_window.
        local_rope_theta: The field with the rotary base of layers with windows, where these are not
            scaled as the others are.
        fused: Whether queries, keys and values are one tensor, and gates and inputs of the MLP.
        experts: Of a mixture, its parameters -> their modules in a layer, {} being the number of an
            expert.
        mixture: The family of a mixture whose experts are models of this one; "": there is none.
    """

    architecture: str
    defaults: Values = dataclasses.field(default_factory=dict)
    settings: Values = dataclasses.field(default_factory=dict)
    reads: Mapping[str, str] = dataclasses.field(default_factory=dict)
    slides: Callable[[int, Values], bool] = lambda layer, fields: False
    lists_layers: bool = False
    optional_windows: bool = False
    local_rope_theta: str | None = None
    fused: bool = False
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mixture: str = ""


def _every(layer: int, fields: Values) -> bool:
    return fields["sliding_window"] is not None


def _last(layer: int, fields: Values) -> bool:
    return fields["sliding_window"] is not None and layer >= fields["max_window_layers"]


def _but_every(period: str | int) -> Callable[[int, Values], bool]:
    """Returns the rule by which the last of each `period` layers sees all positions."""

    def slides(layer: int, fields: Values) -> bool:
        return bool((layer + 1) % (fields[period] if isinstance(period, str) else period))

    return slides


_BIASES = {"out_bias": "attention_bias", "qkv_bias": "attention_bias"}
_GEMMA = {"norm_offset": 1.0, "scale_embeddings": True}
_GEMMA_READS = _BIASES | {
    "hidden_act": "hidden_activation",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_OLMO = {"omit_pre_norms": True, "post_norms": True, "qk_norm": "whole"}
_OLMO_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_EXPERTS = {
    "router": "mlp.gate",
    "expert_wi_0": "mlp.experts.{}.gate_proj",
    "expert_wi_1": "mlp.experts.{}.up_proj",
    "expert_wo": "mlp.experts.{}.down_proj",
}
_EXPERT_READS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_EXPERT_DEFAULTS = {"num_experts_per_tok": 8, "router_aux_loss_coef": 0.001}
_MISTRAL = DecoderFamily(
    "MistralForCausalLM",
    {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    slides=_every,
    mixture="mixtral",
)

DECODER_FAMILIES: Mapping[str, DecoderFamily] = MappingProxyType(
    {
        "llama": DecoderFamily(
            "LlamaForCausalLM",
            {"max_position_embeddings": 2048},
            reads=_BIASES,
            mixture="mixtral",
        ),
        "mistral": _MISTRAL,
        "ministral": dataclasses.replace(
            _MISTRAL, architecture="MinistralForCausalLM", lists_layers=True, mixture=""
        ),
        "qwen2": DecoderFamily(
            "Qwen2ForCausalLM",
            _QWEN_DEFAULTS,
            {"qkv_bias": True},
            slides=_last,
            lists_layers=True,
            optional_windows=True,
        ),
        "qwen3": DecoderFamily(
            "Qwen3ForCausalLM",
            _QWEN_DEFAULTS | {"head_dim": 128},
            {"qk_norm": "head"},
            _BIASES,
            slides=_last,
            lists_layers=True,
            optional_windows=True,
            mixture="qwen3_moe",
        ),
        "gemma": DecoderFamily(
            "GemmaForCausalLM",
            {
                "max_position_embeddings": 8192,
                "head_dim": 256,
                "num_key_value_heads": 16,
                "hidden_act": "gelu_pytorch_tanh",
                "tie_word_embeddings": True,
            },
            _GEMMA,
            _BIASES,
        ),
        "gemma2": DecoderFamily(
            "Gemma2ForCausalLM",
            _GEMMA_DEFAULTS
            | {
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            _GEMMA | {"post_norms": True},
            _GEMMA_READS,
            slides=lambda layer, fields: layer % 2 == 0,
            lists_layers=True,
        ),
        "gemma3_text": DecoderFamily(
            "Gemma3ForCausalLM",
            _GEMMA_DEFAULTS
            | {
                "max_position_embeddings": 131072,
                "sliding_window_pattern": 6,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
            },
            _GEMMA | {"post_norms": True, "qk_norm": "head"},
            _GEMMA_READS,
            slides=_but_every("sliding_window_pattern"),
            lists_layers=True,
            local_rope_theta="rope_local_base_freq",
        ),
        "olmo2": DecoderFamily("Olmo2ForCausalLM", _OLMO_DEFAULTS, _OLMO, _BIASES),
        "olmo3": DecoderFamily(
            "Olmo3ForCausalLM",
            _OLMO_DEFAULTS | {"sliding_window": 4096, "rope_theta": 5e5},
            _OLMO,
            _BIASES,
            slides=_but_every(4),
            lists_layers=True,
            local_rope_theta="rope_theta",
        ),
        "phi3": DecoderFamily(
            "Phi3ForCausalLM",
            {
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
            },
            reads={"partial_rotary_factor": "partial_rotary_factor"},
            slides=_every,
            fused=True,
        ),
        "smollm3": DecoderFamily(
            "SmolLM3ForCausalLM",
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "rope_theta": 2e6,
                "no_rope_layer_interval": 4,
                "sliding_window": None,
                "tie_word_embeddings": True,
            },
            reads=_BIASES | {"rotary_layers": "no_rope_layers"},
            slides=lambda layer, fields: (
                fields["sliding_window"] is not None and not fields["no_rope_layers"][layer]
            ),
            lists_layers=True,
            optional_windows=True,
        ),
        "mixtral": DecoderFamily(
            "MixtralForCausalLM",
            _EXPERT_DEFAULTS
            | {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "sliding_window": None,
                "num_experts_per_tok": 2,
                "num_local_experts": 8,
            },
            {"norm_topk_prob": True},
            {
                "num_experts": "num_local_experts",
                "num_experts_per_tok": "num_experts_per_tok",
                "router_aux_loss_coef": "router_aux_loss_coef",
                "moe_intermediate_size": "intermediate_size",
            },
            slides=_every,
            experts={
                "router": "block_sparse_moe.gate",
                "expert_wi_0": "block_sparse_moe.experts.{}.w1",
                "expert_wi_1": "block_sparse_moe.experts.{}.w3",
                "expert_wo": "block_sparse_moe.experts.{}.w2",
            },
        ),
        "qwen3_moe": DecoderFamily(
            "Qwen3MoeForCausalLM",
            _EXPERT_DEFAULTS
            | {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "sliding_window": 4096,
            },
            {"qk_norm": "head"},
            _BIASES | _EXPERT_READS | {"moe_intermediate_size": "moe_intermediate_size"},
            slides=_every,
            optional_windows=True,
            experts=_EXPERTS,
        ),
        "olmoe": DecoderFamily(
            "OlmoeForCausalLM",
            _EXPERT_DEFAULTS
            | {
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "num_experts": 64,
                "router_aux_loss_coef": 0.01,
            },
            {"qk_norm": "whole"},
            _BIASES | _EXPERT_READS | {"moe_intermediate_size": "intermediate_size"},
            experts=_EXPERTS,
        ),
    }
)
