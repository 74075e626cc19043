"""When two descriptions are of one model: by value, whatever the spelling, and in what decides."""

import pytest

from m2l import models
from m2l.checkpoints import model_fields

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16,
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "transformers_version": "4.30.0",
}  # fmt: skip
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 128}
GEMMA3 = LLAMA | {
    "model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 512,
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
T5 = {"model_type": "t5", "d_model": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "d_ff": 16}
LLAVA = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"patch_size": 14}}
BERT = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "layer_norm_eps": 1e-12}
PHI3 = LLAMA | {
    "model_type": "phi3", "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]},
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def differing(one, other):
    rows = model_fields.differing(model_fields.normalized(one), model_fields.normalized(other))
    return {name for name, *_ in rows}


SAME = {
    "class renamed": (LLAMA, LLAMA | {"architectures": ["LLaMAForCausalLM"]}),
    "no class": (LLAMA, without(LLAMA, "architectures")),
    "longer rows": (LLAMA, LLAMA | {"max_position_embeddings": 131072}),
    "dtype and version": (
        LLAMA,
        without(LLAMA, "torch_dtype") | {"dtype": "float32", "transformers_version": "5.1"},
    ),
    "heads by their default": (LLAMA, LLAMA | {"num_key_value_heads": 2, "head_dim": 4}),
    "null for absent": (LLAMA, LLAMA | {"rope_scaling": None, "head_dim": None}),
    "false for absent": (LLAMA, LLAMA | {"attention_bias": False, "mlp_bias": False}),
    "rope in transformers 5": (
        LLAMA,
        without(LLAMA, "rope_theta")
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
    ),
    "the usual base of rope": (without(LLAMA, "rope_theta"), LLAMA | {"rope_theta": 10000}),
    "type for rope_type": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}},
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "finetuned": True}},
    ),
    "yarn by its defaults": (
        LLAMA | {"rope_scaling": YARN},
        LLAMA | {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1, "truncate": True,
                                         "attention_factor": 1.1386294361119891}},
    ),
    "yarn with two scales of one": (
        LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.0}},
        LLAMA | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "rope by kinds of layers": (
        GEMMA3,
        without(GEMMA3, "rope_theta", "rope_scaling", "rope_local_base_freq")
        | {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }},
    ),
    "su renamed": (PHI3, PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"type": "longrope"}}),
    "a float32's digits": (LLAMA, LLAMA | {"rms_norm_eps": 9.999999747378752e-06}),
    "swish": (LLAMA, LLAMA | {"hidden_act": "swish"}),
    "gelu of tanh": (
        BERT | {"hidden_act": "gelu_new"}, BERT | {"hidden_act": "gelu_pytorch_tanh"}),
    "no layer slides": (
        LLAMA | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False},
        LLAMA | {"model_type": "qwen2", "sliding_window": None, "use_sliding_window": False,
                 "layer_types": ["full_attention"] * 2, "max_window_layers": 1},
    ),
    "labels without names": (BERT, BERT | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}),
    "dropout": (BERT, BERT | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}),
    "experts' losses": (MIXTRAL, MIXTRAL | {"router_aux_loss_coef": 0.01}),
    "nothing known": (LLAMA, {}),
    "experts renamed": (
        MIXTRAL, without(MIXTRAL, "num_local_experts") | {"num_experts": 4}),
    "layers by parts": (BERT, BERT | {"num_hidden_layers": 12, "encoder_layers": 12}),
    "absolute positions": (BERT, BERT | {"position_embedding_type": "absolute"}),
    "one rope for all kinds of layers": (
        LLAMA,
        without(LLAMA, "rope_theta")
        | {"rope_parameters": {"full": {"rope_theta": 5e5}, "sliding": {"rope_theta": 5e5}}},
    ),
    "an image's only rope": (
        LLAVA,
        LLAVA | {"vision_config": {"patch_size": 14, "model_type": "siglip_vision",
                                   "rope_parameters": {"rope_type": "axial"}}},
    ),
    "a scale that is tied": (T5, T5 | {"scale_decoder_outputs": True, "feed_forward_proj": "relu"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_spelling_and_what_decides_nothing_make_no_other_model(case):
    one, other = SAME[case]
    assert differing(one, other) == differing(other, one) == set()


OTHER = {
    "heads": (LLAMA, {"num_attention_heads": 4, "head_dim": 4}, "num_attention_heads"),
    "key heads": (LLAMA, {"num_key_value_heads": 1}, "num_key_value_heads"),
    "head size": (QWEN3, {"head_dim": 64}, "head_dim"),
    "rope": (LLAMA, {"rope_theta": 1e6}, "rope_theta"),
    "rope, in transformers 5": (
        LLAMA, {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
    "scaling": (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
    "its factor": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_factor"),
    "its factors": (
        PHI3, {"rope_scaling": PHI3["rope_scaling"] | {"long_factor": [3.0]}}, "rope_long_factor"),
    "lengths that a scaling reads": (
        LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"max_position_embeddings": 128}, "rope_original_max_position_embeddings"),
    "the share that is rotated": (LLAMA, {"partial_rotary_factor": 0.5}, "rope_share"),
    "the sliding layers' rope": (
        GEMMA3, {"rope_local_base_freq": 2e4}, "sliding_attention.rope_theta"),
    "norm": (LLAMA, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    "activation": (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
    "window": (LLAMA | {"model_type": "mistral"}, {"sliding_window": 32}, "sliding_window"),
    "layers that slide": (
        GEMMA3 | {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    "vocabulary": (LLAMA, {"vocab_size": 18}, "vocab_size"),
    "kind": (LLAMA, {"model_type": "mistral"}, "model_type"),
    "experts a token": (MIXTRAL, {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    "soft caps": (
        LLAMA | {"model_type": "gemma2"}, {"final_logit_softcapping": 0},
        "final_logit_softcapping"),
    "the text's part": (
        LLAVA, {"text_config": LLAMA | {"rope_theta": 1e4}}, "text_config.rope_theta"),
    "the image's part": (LLAVA, {"vision_config": {"patch_size": 16}}, "vision_config.patch_size"),
    "buckets": (T5, {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets"),
    "a scale that is not tied": (T5, {"tie_word_embeddings": False}, "scale_decoder_outputs"),
    "labels in another order": (
        BERT | {"id2label": {"0": "no", "1": "yes"}}, {"id2label": {"0": "yes", "1": "no"}},
        "id2label"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_what_decides_the_function_makes_another_model(case):
    config, changes, field = OTHER[case]
    found = differing(config, config | changes)
    assert field in found
    assert all(map(model_fields.decides, found))
    assert differing(config | changes, config) == found


def test_fields_of_unknown_meaning_are_seen_and_known_not_to_be_known():
    assert differing(LLAMA, LLAMA | {"warp_drive": 7}) == {"warp_drive"}
    assert not model_fields.decides("warp_drive")


def test_the_settings_of_our_own_models_go_by_the_same_list():
    config = models.LlamaConfig(16, 8, 16, 2, 2, 2, 4, rope_type="linear", rope_factor=2.0)
    own = models.to_dict(config)
    assert (
        differing(own, own | {"max_position_embeddings": 4, "rope_low_freq_factor": 3.0}) == set()
    )
    assert differing(own, own | {"rope_factor": 4.0}) == {"rope_factor"}
    assert differing(own, own | {"windows": (2, 2)}) == {"windows"}
    theirs = without(LLAMA, "rope_theta") | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = {n: v for n, v in model_fields.normalized(own).items() if n.startswith("rope_")}
    assert rope.items() <= (model_fields.normalized(theirs) | {"rope_theta": 10000.0}).items()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"hidden_size": 64.0},
        {"hidden_size": True},
        {"hidden_size": 0},
        {"num_attention_heads": [2, -1]},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**60},
        {"vocab_size": {"text": "many"}},
        {"model_type": ["llama"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [3]},
        {"text_config": {"vocab_size": -1}},
    ],
    ids=str,
)
def test_absurd_descriptions_are_named_by_their_field(changes):
    (field,) = changes
    problem = model_fields.implausible(LLAMA | changes)
    assert problem is not None
    assert f"{field}" in problem and "expected" in problem
    assert model_fields.implausible(LLAMA) is None
    assert model_fields.implausible(LLAMA | {"num_key_value_heads": [1, 2]}) is None
