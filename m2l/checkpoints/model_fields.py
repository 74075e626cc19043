"""Which fields of a model's description decide what it computes, and where two descriptions differ.

A description is the content of a config.json of any family, or m2l's own settings of a model. This
is the one list that every format and every destination of a merge goes by. Fields are compared by
value: defaults are filled in, renamed values and the spellings of rotary positions are resolved.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from m2l import files
from m2l.errors import CheckpointError
from m2l.typing import Json, JsonObject

Description = Mapping[str, Json]

_LARGEST = {"sizes": 2**31, "layers": 10**5}


def words(text: str) -> frozenset[str]:
    """Splits a list of fields."""
    return frozenset(text.split())


# Fields that decide nothing: names, training, generation, and what follows from other fields.
HARMLESS = words(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout cls_token_id
    cross_attention_hidden_size decoder_start_token_id dense_act_fn diversity_penalty do_sample
    dropout_rate dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder is_gated_act is_llama_config label2id length_penalty mask_token_id max_length
    min_length model_type n_positions name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_return_dict
    """
)

_SIZES = words(
    """
    vocab_size hidden_size d_model n_embd n_embed dim embed_dim intermediate_size d_ff ffn_dim
    encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size hidden_dim moe_intermediate_size
    shared_expert_intermediate_size num_attention_heads num_heads n_head n_heads num_key_value_heads
    num_kv_heads n_head_kv encoder_attention_heads decoder_attention_heads head_dim d_kv kv_channels
    num_local_experts num_experts n_routed_experts n_shared_experts
    """
)
_LAYERS = words(
    """
    num_hidden_layers num_layers n_layer n_layers num_encoder_layers num_decoder_layers
    encoder_layers decoder_layers
    """
)
DECIDING = (
    _SIZES
    | _LAYERS
    | words(
        # Heads and attention.
        """
        model_type multi_query qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim q_lora_rank
        kv_lora_rank attention_head_dim is_decoder is_encoder_decoder add_cross_attention
        cross_attention_layers tie_encoder_decoder use_bidirectional_attention is_causal
        attention_chunk_size attn_temperature_tuning floor_scale attn_scale attn_config
        """
        # Positions.
        """
        rotary_interleaved alibi use_alibi position_embedding_type no_rope_layers
        no_rope_layer_interval relative_attention relative_attention_num_buckets
        relative_attention_max_distance pos_att_type share_att_key max_relative_positions
        position_buckets position_biased_input rotary use_rotary_position_embeddings
        """
        # Norms and where they stand.
        """
        rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon norm_eps
        norm_type norm_offset norm_bias post_norms use_qk_norm qk_layernorm qk_norm
        use_post_norm do_layer_norm_before apply_residual_connection_post_layernorm post_layernorm
        use_parallel_residual parallel_attn num_ln_in_parallel_attn new_decoder_architecture
        """
        # Activations and multipliers.
        """
        hidden_act hidden_activation activation_function activation feed_forward_proj mlp_hidden_act
        projector_hidden_act scale_attn_weights scale_attn_by_inverse_layer_idx embedding_multiplier
        attention_multiplier residual_multiplier logits_scaling logit_scale scale_embedding
        scale_embeddings scale_decoder_outputs scale_emb scale_depth dim_model_base
        query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping clip_qkv
        lm_head_multiplier normalize_embedding
        """
        # Windows.
        """
        windows sliding_window sliding_window_size sliding_window_pattern layer_types
        attention_window window_size attention_types local_attention global_attn_every_n_layers
        """
        # Biases.
        """
        attention_bias attention_out_bias mlp_bias use_bias qkv_bias out_bias bias add_bias_linear
        add_qkv_bias lm_head_bias use_qkv_bias
        """
        # Experts.
        """
        num_experts_per_tok num_experts_per_token moe_top_k moe_k n_group topk_group topk_method
        routed_scaling_factor scoring_func norm_topk_prob first_k_dense_replace moe_layer_freq
        decoder_sparse_step mlp_only_layers interleave_moe_layer_step
        """
        # State spaces, images, audio, labels.
        """
        state_size conv_kernel expand time_step_rank mamba_d_state mamba_d_conv mamba_expand
        attn_layer_period attn_layer_offset expert_layer_period expert_layer_offset image_size
        patch_size num_channels projection_dim depths image_token_id image_token_index
        vision_feature_layer vision_feature_select_strategy spatial_merge_size temporal_patch_size
        num_mel_bins id2label decoder_start_token_id
        """
    )
)

# Lengths that no weight depends on, and what only training or generation reads; with HARMLESS, the
# fields that decide nothing of what a model computes, or follow from others.
IGNORED = (
    HARMLESS
    | words(
        """
    max_position_embeddings n_ctx max_seq_len max_sequence_length seq_length model_max_length
    max_target_positions max_source_positions activation_dropout attn_dropout attn_pdrop dropout
    embd_pdrop embd_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob
    resid_pdrop resid_dropout ffn_dropout layerdrop encoder_layerdrop decoder_layerdrop
    summary_first_dropout summary_activation summary_proj_to_labels summary_type summary_use_proj
    init_std initializer_cutoff_factor rescale_prenorm_residual router_aux_loss_coef
    router_jitter_noise router_z_loss_coef output_router_logits aux_loss_alpha seq_aux ep_size
    auto_map vocab_file gradient_checkpointing_kwargs tie_word_embeddings use_sliding_window
    max_window_layers num_labels label2id rms_norm mlp_dropout reorder_and_upcast_attn
    original_max_position_embeddings base_model_name_or_path transformers_weights
    """
    )
) - {"decoder_start_token_id", "is_decoder", "is_encoder_decoder", "id2label", "model_type"}

_PARTS = ("encoder", "decoder", "text_encoder", "audio_encoder")
_NO_PARTS = ("quantization_config", "compression_config", "per_layer_config")

_ACTIVATION_FIELDS = words(
    """
    hidden_act hidden_activation activation_function activation feed_forward_proj mlp_hidden_act
    """
)
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "gated-gelu_new": "gated-gelu",
}
# Renamed; "axial" is what transformers 5 calls the only kind that the image encoders have.
_ROPE_NAMES = {"su": "longrope", "mrope": "default", "axial": "default"}
_ROPE_FIELDS = words(
    """
    rope_theta rope_scaling rope_parameters rope_local_base_freq rotary_emb_base rotary_pct
    rotary_dim partial_rotary_factor rotary_base global_rope_theta local_rope_theta
    """
)
_ROTATED_SHARES = ("partial_rotary_factor", "rotary_pct", "rotary_dim")
# What each kind of scaling reads, of what may be written beside it; other kinds read all.
_ROPE_READS: Mapping[str, frozenset[str]] = {
    "default": words("mrope_section"),
    "linear": words("factor mrope_section"),
    "llama3": words("factor low_freq_factor high_freq_factor original_max_position_embeddings"),
    "yarn": words(
        """
        factor original_max_position_embeddings beta_fast beta_slow attention_factor mscale
        mscale_all_dim truncate
        """
    ),
}
_THETA = 10000.0

# What tensors' shapes and names say as well, or other fields, and families write or leave out.
_OPTIONAL = (
    _SIZES
    | _LAYERS
    | words(
        """
        model_type layer_types decoder_start_token_id id2label qk_head_dim is_decoder
        use_bidirectional_attention no_rope_layer_interval global_attn_every_n_layers
        local_attention attention_bias attention_out_bias mlp_bias use_bias qkv_bias out_bias bias
        lm_head_bias use_qk_norm qk_layernorm qk_norm
        """
    )
) - {"num_attention_heads", "num_key_value_heads", "head_dim"}
_RENAMED = {"num_local_experts": "num_experts"}

# Where a family's default is not what a field's absence means in the others (transformers 5.24).
_T5 = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
_DEFAULTS: Mapping[str, Mapping[str, Json]] = {
    "gemma": {"head_dim": 256, "num_key_value_heads": 16},
    "gemma2": {
        "head_dim": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
    },
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8, "rope_theta": 1e6},
    "mt5": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "t5": _T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True},
}


def read_json(file: Path) -> JsonObject:
    """Returns the object in a JSON file.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    return files.read_json(file, kind=dict, error=CheckpointError, advice="download it again")


def parts(config: Description) -> dict[str, Description]:
    """Returns the descriptions within a description, of a text's or an image's part, by field."""
    return {
        name: value
        for name, value in config.items()
        if isinstance(value, Mapping)
        and (name in _PARTS or (name.endswith("_config") and name not in _NO_PARTS))
    }


def normalized(config: Description) -> JsonObject:
    """Returns the fields that may decide what a model computes, by one name and spelling each.

    Fields that decide nothing and those whose value says "none" (null, false, 0, empty) are left
    out.

    Args:
        config: The content of a config.json, or m2l's settings of a model.
    """
    family = config.get("model_type")
    values = {**_DEFAULTS.get(family if isinstance(family, str) else "", {}), **config}
    values = {name: value for name, value in values.items() if value is not None}
    result: JsonObject = {}
    for name, part in parts(values).items():
        # What a part is called changed, and follows from what the whole is called.
        inner = {n: v for n, v in normalized(part).items() if n != "model_type"}
        result |= {f"{name}.{field}": value for field, value in inner.items()}
    for name in values.keys() - result.keys():
        result |= _normalized_field(name, values)
    result |= _heads(values) | _windows(values) | _rope(values)
    if "d_kv" in values:
        # transformers 4 scales the output of a tied T5; transformers 5 has a field of its own, and
        # never scales an mT5's.
        version_5 = str(values.get("transformers_version", "")).split(".")[0] >= "5"
        tied = values.get("tie_word_embeddings") is not False
        scaled = values.get("scale_decoder_outputs", tied) and not (family == "mt5" and version_5)
        result["scale_decoder_outputs"] = scaled or None
    return {name: value for name, value in result.items() if value is not None}


def _normalized_field(name: str, values: Description) -> JsonObject:
    """Returns one field by its normalized name; empty where it decides nothing."""
    value = values[name]
    if name in parts(values) or not value:
        return {}
    if name == "model_type" and isinstance(value, str):
        return {name: value.replace("-", "_")}
    if name in _ACTIVATION_FIELDS and isinstance(value, str):
        return {name: _ACTIVATIONS.get(value, value)}
    if name == "id2label" and isinstance(value, Mapping):
        named = any(label != f"LABEL_{key}" for key, label in value.items())
        return {name: {str(key): label for key, label in value.items()}} if named else {}
    if name == "position_embedding_type" and value in ("absolute", "rope"):
        return {}
    if name in IGNORED or name in _ROPE_FIELDS or name.startswith("_"):
        return {}
    if "rope_type" in values and name.startswith("rope_"):
        return {}
    return {_RENAMED.get(name, name): value}


def _heads(values: Description) -> JsonObject:
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if type(heads) is not int or heads < 1:
        return {}
    result = {"num_key_value_heads": values.get("num_key_value_heads", heads)}
    if type(width) is int and not width % heads:
        result["head_dim"] = values.get("head_dim", width // heads)
    return result


def _windows(values: Description) -> JsonObject:
    """Returns the width of sliding windows, and which layers have one; None where no layer has."""
    width, types = values.get("sliding_window"), values.get("layer_types")
    slides = width is not None and values.get("use_sliding_window", True) is not False
    if isinstance(types, list) and types and all(each == "full_attention" for each in types):
        slides, types = False, None
    result: JsonObject = {"sliding_window": width if slides else None, "layer_types": types}
    if slides and values.get("model_type") == "qwen2":
        result["max_window_layers"] = values.get("max_window_layers", 28)
    return result


def _rope(values: Description) -> JsonObject:
    """Returns rotary positions in one spelling, as rope_NAME; empty where there are none."""
    if "rope_type" in values:
        scaling: Json = {n.removeprefix("rope_"): v for n, v in values.items() if n[:5] == "rope_"}
    else:
        scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        return {"rope_type": scaling}
    spelled = ("rope_theta", "rotary_emb_base", "rotary_base", "global_rope_theta")
    theta = next((values[name] for name in spelled if name in values), None)
    if theta is None and not scaling and not _ROPE_FIELDS & set(values):
        return {}
    local = values.get("rope_local_base_freq") or values.get("local_rope_theta")
    layers = {kind: each for kind, each in scaling.items() if isinstance(each, Mapping)}
    if not layers and local is not None:
        layers = {"full_attention": scaling, "sliding_attention": {"rope_theta": local}}
    if layers:
        ropes = {kind: _one_rope(values, each, theta) for kind, each in layers.items()}
        if all(rope == next(iter(ropes.values())) for rope in ropes.values()):
            return next(iter(ropes.values()))
        return {f"{kind}.{n}": value for kind, rope in ropes.items() for n, value in rope.items()}
    return _one_rope(values, scaling, theta)


def _one_rope(values: Description, scaling: Description, theta: Json) -> JsonObject:
    read = {name: value for name, value in scaling.items() if value is not None}
    kinds = [read.pop(name) for name in ("rope_type", "type") if name in read]
    kind = kinds[0] if kinds else "default"
    kind = _ROPE_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    thetas = [read.pop(name) for name in ("rope_theta", "theta") if name in read]
    shares = [read.pop("partial_rotary_factor", None), *map(values.get, _ROTATED_SHARES)]
    share = next((each for each in shares if each is not None), 1)
    if isinstance(kind, str) and kind in _ROPE_READS:
        read = {name: value for name, value in read.items() if name in _ROPE_READS[kind]}
    if kind != "default" and kind != "linear":
        _complete_scaling(kind, read, values)
    result = {
        "type": kind,
        "theta": next(iter(thetas), theta),
        "share": None if share == 1 else share,
    }
    return {f"rope_{name}": value for name, value in (result | read).items() if name != "finetuned"}


def _complete_scaling(kind: Json, scaling: JsonObject, values: Description) -> None:
    """Fills in what a scaling that depends on lengths reads from elsewhere."""
    length = "original_max_position_embeddings"
    if kind == "dynamic":
        scaling[length] = values.get("max_position_embeddings")
    scaling[length] = (
        values.get(length) or scaling.get(length) or values.get("max_position_embeddings")
    )
    factor = scaling.get("factor")
    if kind == "longrope" and factor is None:
        scaling["max_position_embeddings"] = values.get("max_position_embeddings")
    if kind == "yarn" and type(factor) in (int, float):
        scaling.setdefault("beta_fast", 32)
        scaling.setdefault("beta_slow", 1)
        first, second = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
        growth = 0.1 * math.log(factor) if factor > 1 else 0.0
        if not scaling.get("attention_factor"):
            numbers = type(first) in (int, float) and type(second) in (int, float)
            both = (growth * first + 1) / (growth * second + 1) if numbers and second else None
            scaling["attention_factor"] = growth + 1 if both is None or not first else both
        if scaling.get("truncate") is True:
            del scaling["truncate"]


def ties_embeddings(config: Description) -> bool:
    """Returns whether a description says that the output's matrix is the input embedding."""
    family = config.get("model_type")
    default = isinstance(family, str) and family.startswith("gemma")
    described = [config, *parts(config).values()]
    said = [part["tie_word_embeddings"] for part in described if "tie_word_embeddings" in part]
    return all(said) if said else default


def differing(reference: Description, other: Description) -> Iterator[tuple[str, Json, Json]]:
    """Yields (field, value in reference, value in other) where normalized descriptions differ.

    What one of them has not is None there. Neither has to say what its tensors' shapes or other
    fields say as well. A description that says nothing, as of a bare file of weights, contradicts
    none.
    """
    if not reference or not other:
        return
    absent = {"rope_theta": _THETA, "rope_type": "default"}
    for name in [*reference, *(name for name in other if name not in reference)]:
        field = name.rpartition(".")[2]
        one = reference.get(name, absent.get(field))
        two = other.get(name, absent.get(field))
        if field in _OPTIONAL and (one is None or two is None):
            continue
        if not _equal(one, two):
            yield name, reference.get(name), other.get(name)


def decides(name: str) -> bool:
    """Returns whether a field of a normalized description is known to decide the computation."""
    field = name.rpartition(".")[2]
    return field in DECIDING or field.startswith("rope_")


def _equal(one: Json, other: Json) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        # A float32's digits are another spelling of the number.
        return numbers and math.isclose(one, other, rel_tol=1e-6)
    return one == other


def implausible(config: Description) -> str | None:
    """Returns what no model's description can say, in words with the field's name; else None.

    Args:
        config: The content of a config.json.
    """
    for name, part in parts(config).items():
        if (problem := implausible(part)) is not None:
            return f"in {name}: {problem}"
    for name, value in config.items():
        if value is None:
            continue
        if name == "model_type" and not isinstance(value, str):
            return f"{name} = {_short(value)}: a name was expected"
        elif name == "architectures" and not (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            return f"{name} = {_short(value)}: a list of names was expected"
        elif name in _SIZES | _LAYERS:
            largest = _LARGEST["layers" if name in _LAYERS else "sizes"]
            # Some families give a number a layer or a part; and there may be no experts.
            numbers = [*value.values()] if isinstance(value, Mapping) else value
            numbers = numbers if isinstance(numbers, list) else [numbers]
            least = int(numbers is not value and "expert" not in name)
            if any(type(each) is not int or not least <= each <= largest for each in numbers):
                return (
                    f"{name} = {_short(value)}: an integer from {least} to {largest:,} was expected"
                )
    return None


def _short(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
