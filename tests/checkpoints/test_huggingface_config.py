"""Of a config.json every field is honoured, or refused by name."""

import dataclasses

import numpy as np
import pytest

from m2l.checkpoints import huggingface
from m2l.errors import CheckpointError
from m2l.models import LlamaConfig, T5Config

from .families import (
    CONFIGS,
    HEAD,
    HEADS,
    INNER,
    LLAMA3_ROPE,
    VOCAB,
    WIDTH,
    config_of,
)


def test_t5s_fields_are_honoured(tmp_path):
    assert config_of(tmp_path, CONFIGS["t5 1.1"]) == T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=HEAD,
        d_ff=INNER,
        num_heads=HEADS,
        num_encoder_layers=1,
        num_decoder_layers=2,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=9,
        layer_norm_epsilon=1e-5,
    )
    absent = ("relative_attention_max_distance", "num_decoder_layers", "layer_norm_epsilon")
    found = config_of(tmp_path, CONFIGS["t5 1.0"], absent)
    assert found.relative_attention_max_distance == 128
    assert (found.num_encoder_layers, found.num_decoder_layers) == (1, 1)
    assert (found.layer_norm_epsilon, found.feed_forward_proj) == (1e-6, "relu")
    assert config_of(tmp_path, CONFIGS["t5 1.0"], num_decoder_layers=None).num_decoder_layers == 1
    assert config_of(tmp_path, CONFIGS["t5 1.0"], decoder_start_token_id=3) == dataclasses.replace(
        config_of(tmp_path, CONFIGS["t5 1.0"]), decoder_start_token_id=3
    )


def test_a_decoders_fields_are_honoured_in_both_layouts(tmp_path):
    wanted = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=64,
        rope_theta=5e5,
        rope_type="llama3",
        rope_factor=8.0,
        rope_original_max_position_embeddings=32,
    )
    config = CONFIGS["llama"]
    assert config_of(tmp_path, config) == wanted
    legacy = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"} | {"type": "llama3"}
    assert config_of(tmp_path, config, rope_scaling=legacy) == wanted
    newer = LLAMA3_ROPE | {"rope_theta": 5e5}
    absent = ("rope_theta", "rope_scaling")
    config = config | {"rope_parameters": newer, "dtype": "bfloat16"}
    assert config_of(tmp_path, config, absent) == wanted


def test_a_decoders_defaults_are_those_of_its_class(tmp_path):
    llama = config_of(tmp_path, CONFIGS["llama"], ("num_key_value_heads", "head_dim", "rope_theta"))
    assert (llama.num_key_value_heads, llama.head_dim, llama.rope_theta) == (2, 4, 10000.0)
    assert config_of(tmp_path, CONFIGS["llama"], ("rms_norm_eps",)).rms_norm_eps == 1e-6
    gemma = config_of(tmp_path, CONFIGS["gemma2"], ("query_pre_attn_scalar", "head_dim"))
    assert (gemma.query_pre_attn_scalar, gemma.head_dim) == (256.0, 256)
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping) == (50.0, 30.0)
    assert gemma.hidden_act == "gelu_pytorch_tanh"
    assert gemma.norm_offset == 1.0 and gemma.scale_embeddings and gemma.post_norms
    assert gemma.tie_word_embeddings
    capless = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    gemma = config_of(tmp_path, CONFIGS["gemma2"], **capless)
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": 5}, ()),
        ("mistral", {}, (5, 5, 5)),
        ("mistral", {"sliding_window": None}, ()),
        ("qwen2", {}, (0, 0, 7)),
        ("qwen2", {"max_window_layers": 3}, ()),
        ("qwen2", {"use_sliding_window": False}, ()),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}, (7, 7, 0)),
        ("gemma2", {}, (4, 0, 4)),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, ()),
        ("gemma2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, (0, 0, 4)),
        ("gemma3", {}, (4, 0, 4)),
        ("gemma3", {"sliding_window_pattern": 3}, (4, 4, 0)),
        ("ministral", {}, (5, 0, 5)),
        ("olmo3", {}, (4, 4, 4, 0)),
        ("phi3", {"sliding_window": 9}, (9, 9, 9)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, (0, 4096, 4096)),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 6}, (0, 6, 0)),
        ("smollm3", {"sliding_window": 6}, ()),
    ],
)
def test_each_layer_has_the_window_that_its_family_gives_it(tmp_path, family, changes, windows):
    assert config_of(tmp_path, CONFIGS[family], **changes).windows == windows


def test_yarns_scales_become_the_attention_factor_that_they_decide(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    found = config_of(tmp_path, CONFIGS["llama"], rope_scaling=yarn | {"truncate": True})
    assert (found.rope_type, found.rope_factor, found.rope_attention_factor) == ("yarn", 4.0, 0.0)
    scaled = yarn | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 20}
    found = config_of(tmp_path, CONFIGS["llama"], rope_scaling=scaled)
    growth = 0.1 * np.log(4.0)
    wanted = (growth + 1) / (0.5 * growth + 1)
    assert found.rope_attention_factor == pytest.approx(wanted, rel=1e-12)
    assert found.rope_beta_fast == 20.0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("t5 1.1", {"model_type": "umt5"}, "'umt5' is not supported; known are t5, mt5, llama"),
        ("t5 1.1", {"pad_token_id": 3}, "pad_token_id = 3 is not supported"),
        ("t5 1.1", {"decoder_start_token_id": None}, "'decoder_start_token_id' is missing"),
        ("t5 1.1", {"feed_forward_proj": "gelu_new"}, "'gelu_new'"),
        ("t5 1.1", {"d_kv": "6"}, "d_kv = '6': an integer from 1 to"),
        ("t5 1.1", {"tie_encoder_decoder": True}, "tie_encoder_decoder = True is not supported"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = True is not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not"),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq"}},
            "its weights are quantised (quantization_config says gptq)",
        ),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "the rope type 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope' needs short_factor"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
            "rope_short_factor: expected 2 numbers above 0, one for each pair of features",
        ),
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected an even number"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod = 2 is not supported"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention = {'rope_theta': 10000.0, 'rope_type': 'linear'",
        ),
        ("qwen3 mixture", {"mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: expected 1 to 3"),
        ("llama", {"residual_scale": 0.2}, "the field residual_scale = 0.2 is unknown; remove it"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate of the rope type 'yarn' is not supported",
        ),
        (
            "gemma2",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "one set for all layers is",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types = ['chunked"),
        ("gemma2", {"sliding_window": None}, "sliding_window = None, but there are layers that"),
        ("gemma2", {"sliding_window_pattern": 0, "layer_types": 3}, "a field is of the wrong type"),
        ("mistral", {"num_hidden_layers": None}, "num_hidden_layers = None is no number"),
        ("qwen2", {"max_window_layers": None}, "a field is of the wrong type"),
        ("gemma2", {"layer_types": 3}, "a field is of the wrong type"),
        ("qwen2", {"num_key_value_heads": 3}, "3 does not divide the 2 attention heads"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, family, changes, message):
    with pytest.raises(CheckpointError) as caught:
        config_of(tmp_path, CONFIGS[family], **changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "read/config.json"))


def test_a_missing_field_and_a_damaged_file_are_refused(tmp_path):
    for family, field in (("t5 1.1", "d_kv"), ("llama", "hidden_size"), ("llama", "vocab_size")):
        with pytest.raises(CheckpointError, match=f"the field '{field}' is missing"):
            config_of(tmp_path, CONFIGS[family], (field,))
    for text in ("{", "[1]"):
        (tmp_path / "read/config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: damaged"):
            huggingface.read_config(tmp_path / "read")


def test_fields_that_decide_nothing_or_say_none_are_not_refused(tmp_path, recwarn):
    harmless = {"_name_or_path": "x", "temperature": 0.6, "id2label": {"0": "a"}, "auto_map": {}}
    none = {"residual_scale": None, "wobble": False, "experts": [], "shift": 0}
    config = CONFIGS["llama"]
    assert config_of(tmp_path, config, **harmless, **none) == config_of(tmp_path, config)
    assert not [w for w in recwarn if "fields" in str(w.message)]


@pytest.mark.parametrize(
    ("family", "changes", "without", "settings"),
    [
        ("gemma3", {}, (), {"rope_theta": 1e6, "rope_factor": 8.0, "rope_local_base_freq": 1e4}),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                }
            },
            ("rope_theta", "rope_local_base_freq", "rope_scaling"),
            {"rope_theta": 1e6, "rope_type": "default", "rope_local_base_freq": 500.0},
        ),
        ("gemma3", {"rope_theta": 1e4, "rope_scaling": None}, (), {"rope_local_base_freq": 0.0}),
        ("olmo3", {}, (), {"rope_theta": 5e5, "rope_type": "yarn", "rope_local_base_freq": 5e5}),
        ("olmo3", {"rope_scaling": None}, (), {"rope_local_base_freq": 0.0}),
        ("phi3", {}, (), {"rope_factor": 2.0, "rope_original_max_position_embeddings": 32}),
        ("phi3", {"rope_scaling": None}, (), {"rope_type": "default", "rotary_dim": 4}),
        ("smollm3", {}, ("no_rope_layers",), {"rotary_layers": (1, 0, 1)}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, (), {"rotary_layers": ()}),
        ("gemma", {"hidden_act": "gelu"}, (), {"hidden_act": "gelu_pytorch_tanh"}),
    ],
)
def test_layers_have_the_positions_that_their_family_gives_them(
    tmp_path, family, changes, without, settings
):
    config = config_of(tmp_path, CONFIGS[family], without, **changes)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_number_of_experts_has_two_spellings(kind, tmp_path):
    name = next(n for n, config in CONFIGS.items() if config["model_type"] == kind)
    spellings = {"num_experts", "num_local_experts"}
    (own,) = spellings & CONFIGS[name].keys()
    (other,) = spellings - {own}
    count = CONFIGS[name][own]
    changed = config_of(tmp_path, CONFIGS[name], (own,), **{other: count})
    assert changed == config_of(tmp_path, CONFIGS[name]) and changed.num_experts == count


def test_a_mistral_that_lists_its_layers_is_a_ministral(tmp_path):
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    listed = config_of(tmp_path, CONFIGS["mistral"], layer_types=layers, sliding_window=5)
    assert (listed.model_type, listed.windows) == ("ministral", (5, 0, 5))
