"""Hugging Face's checkpoints come in and go out bit for bit, or are refused by name.

The fixtures are written with the safetensors library, under the names and in the shapes that
transformers gives them.
"""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as official

from m2l import checkpoints, models
from m2l.checkpoints import huggingface, huggingface_config, importing
from m2l.checkpoints.importing import Origin, Tensor
from m2l.errors import CheckpointError, UnknownNameError
from m2l.models import LlamaConfig, T5Config

VOCABULARY = {"name": "bytes", "size": 7, "fingerprint": "abc"}
VOCAB, WIDTH, HEAD, HEADS, INNER = 19, 8, 6, 2, 10

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": HEAD,
    "d_ff": INNER,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 9,
    "layer_norm_epsilon": 1e-5,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "torch_dtype": "float32",
}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "t5 1.0": T5 | {"feed_forward_proj": "relu"},
    "t5 1.1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5 tied, unscaled": T5
    | {
        "feed_forward_proj": "gated-silu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": False,
        "transformers_version": "5.1.0",
    },
    "mt5": T5
    | {"model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "llama": DECODER
    | {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_ROPE,
    },
    "llama, tied": DECODER | {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biased": DECODER
    | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "mistral": DECODER
    | {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 5},
    "qwen2": DECODER
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
    },
    "gemma2": {name: value for name, value in DECODER.items() if name != "hidden_act"}
    | {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 144},
}


def t5_shapes(config):
    joined = HEADS * HEAD
    attention = {"q": (joined, WIDTH), "k": (joined, WIDTH), "v": (joined, WIDTH)}
    attention |= {"o": (WIDTH, joined)}
    gated = config["feed_forward_proj"].startswith("gated")
    mlp = dict.fromkeys(("wi_0", "wi_1") if gated else ("wi",), (INNER, WIDTH))
    mlp |= {"wo": (WIDTH, INNER)}
    shapes = {"shared.weight": (VOCAB, WIDTH)}
    for stack, layers, blocks in (
        ("encoder", 1, ("SelfAttention", "DenseReluDense")),
        ("decoder", 2, ("SelfAttention", "EncDecAttention", "DenseReluDense")),
    ):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes |= {bias: (4, HEADS), f"{stack}.final_layer_norm.weight": (WIDTH,)}
        for i in range(layers):
            for j, block in enumerate(blocks):
                shapes[f"{stack}.block.{i}.layer.{j}.layer_norm.weight"] = (WIDTH,)
                for part, shape in (mlp if block == "DenseReluDense" else attention).items():
                    shapes[f"{stack}.block.{i}.layer.{j}.{block}.{part}.weight"] = shape
    if config.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    return shapes


def decoder_shapes(config):
    queries, keys, kind = HEADS * HEAD, HEAD, config["model_type"]
    layer = {
        "self_attn.q_proj.weight": (queries, WIDTH),
        "self_attn.k_proj.weight": (keys, WIDTH),
        "self_attn.v_proj.weight": (keys, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, queries),
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
    }
    if kind == "qwen2" or config.get("attention_bias"):
        layer |= {f"self_attn.{x}_proj.bias": (keys,) for x in "kv"}
        layer["self_attn.q_proj.bias"] = (queries,)
    if config.get("attention_bias"):
        layer["self_attn.o_proj.bias"] = (WIDTH,)
    if kind == "gemma2":
        layer |= {f"{x}_feedforward_layernorm.weight": (WIDTH,) for x in ("pre", "post")}
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes |= {f"model.layers.{i}.{name}": s for i in range(3) for name, s in layer.items()}
    if not config.get("tie_word_embeddings", kind == "gemma2"):
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    return shapes


def tensors_of(config, dtype=np.float32):
    shapes = (t5_shapes if "d_model" in config else decoder_shapes)(config)
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()
    }


def write(directory, config, tensors, file="model.safetensors"):
    directory.mkdir(exist_ok=True)
    official.save_file(tensors, directory / file, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def bits(tensors):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()}


def load(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= official.load_file(file)
    return found


def imported(source, out, **options):
    return huggingface.import_checkpoint(source, out, vocabulary=VOCABULARY, **options)


def config_of(tmp_path, config, without=(), **changes):
    """What read_config makes of a config.json that fits its tensors, with these changes."""
    changed = {k: v for k, v in (config | changes).items() if k not in without}
    return huggingface.read_config(write(tmp_path / "read", changed, tensors_of(config)))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_comes_back_bit_for_bit(tmp_path, family, dtype):
    config = CONFIGS[family]
    tensors = tensors_of(config, dtype)
    source = write(tmp_path / "theirs", config, tensors)
    manifest = imported(source, tmp_path / "ours")
    assert manifest.made_by == {
        "kind": "convert",
        "from": "huggingface",
        "source": str(source),
        "config": config,
    }
    assert (manifest.parents, manifest.dtype) == ((), np.dtype(dtype).name)
    assert models.from_dict(manifest.model) == huggingface.read_config(source)
    out = huggingface.export_checkpoint(tmp_path / "ours", tmp_path / "again")
    written = load(out)
    if family == "t5 tied, unscaled":
        np.testing.assert_array_equal(written.pop("lm_head.weight"), tensors["shared.weight"])
    assert bits(written) == bits(tensors)
    again = imported(out, tmp_path / "ours again")
    assert (again.model, again.parameters) == (manifest.model, manifest.parameters)
    assert again.digest == manifest.digest


def test_t5s_tensors_get_their_places_and_kernels_are_transposed(tmp_path):
    tensors = tensors_of(CONFIGS["t5 1.1"])
    imported(write(tmp_path / "x", CONFIGS["t5 1.1"], tensors), tmp_path / "y")
    params = checkpoints.flatten(checkpoints.restore(tmp_path / "y"))
    cross, bias = "1.layer.1.EncDecAttention", "layer.0.SelfAttention.relative_attention_bias"
    for ours, theirs, transposed in (
        ("token_embedder", "shared.weight", False),
        ("encoder/relpos_bias", f"encoder.block.0.{bias}.weight", True),
        ("decoder/relpos_bias", f"decoder.block.0.{bias}.weight", True),
        (
            "encoder/layers_00/self_attention/query",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            True,
        ),
        ("encoder/layers_00/mlp/wi_1", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight", True),
        ("encoder/layers_00/pre_mlp_norm", "encoder.block.0.layer.1.layer_norm.weight", False),
        ("encoder/norm", "encoder.final_layer_norm.weight", False),
        ("decoder/layers_01/cross_attention/key", f"decoder.block.{cross}.k.weight", True),
        ("decoder/layers_01/cross_attention/out", f"decoder.block.{cross}.o.weight", True),
        (
            "decoder/layers_01/pre_cross_attention_norm",
            "decoder.block.1.layer.1.layer_norm.weight",
            False,
        ),
        ("decoder/layers_01/pre_mlp_norm", "decoder.block.1.layer.2.layer_norm.weight", False),
        ("decoder/layers_01/mlp/wo", "decoder.block.1.layer.2.DenseReluDense.wo.weight", True),
        ("decoder/logits", "lm_head.weight", True),
    ):
        wanted = tensors[theirs].T if transposed else tensors[theirs]
        np.testing.assert_array_equal(params[ours], wanted, err_msg=ours)


def test_gemmas_four_norms_and_a_decoders_projections_get_their_places(tmp_path):
    tensors = tensors_of(CONFIGS["gemma2"])
    imported(write(tmp_path / "x", CONFIGS["gemma2"], tensors), tmp_path / "y")
    params = checkpoints.flatten(checkpoints.restore(tmp_path / "y"))
    for ours, theirs in {
        "pre_self_attention_norm": "input_layernorm",
        "post_self_attention_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }.items():
        wanted = tensors[f"model.layers.2.{theirs}.weight"]
        np.testing.assert_array_equal(params[f"decoder/layers_02/{ours}"], wanted)
    for ours, theirs in {
        "self_attention/query": "self_attn.q_proj",
        "self_attention/value": "self_attn.v_proj",
        "self_attention/out": "self_attn.o_proj",
        "mlp/wi_0": "mlp.gate_proj",
        "mlp/wi_1": "mlp.up_proj",
        "mlp/wo": "mlp.down_proj",
    }.items():
        wanted = tensors[f"model.layers.1.{theirs}.weight"].T
        np.testing.assert_array_equal(params[f"decoder/layers_01/{ours}"], wanted)


def test_llamas_mlp_norm_is_what_comes_after_its_attention(tmp_path):
    tensors = tensors_of(CONFIGS["llama"])
    imported(write(tmp_path / "x", CONFIGS["llama"], tensors), tmp_path / "y")
    found = checkpoints.restore(tmp_path / "y")["decoder"]["layers_01"]["pre_mlp_norm"]
    wanted = tensors["model.layers.1.post_attention_layernorm.weight"]
    np.testing.assert_array_equal(found, wanted)


def test_a_sharded_model_is_the_model(tmp_path):
    config = CONFIGS["llama"]
    tensors = tensors_of(config, ml_dtypes.bfloat16)
    whole = imported(write(tmp_path / "whole", config, tensors), tmp_path / "1")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, group in halves.items():
        write(tmp_path / "halves", config, {name: tensors[name] for name in group}, file)
    weight_map = {name: file for file, group in halves.items() for name in group}
    index = tmp_path / "halves/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert imported(tmp_path / "halves", tmp_path / "2").parameters == whole.parameters
    out = huggingface.export_checkpoint(tmp_path / "2", tmp_path / "3", shard_size=1000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert bits(load(out)) == bits(tensors)
    assert imported(out, tmp_path / "4").digest == whole.digest


def test_parameters_are_cast_on_the_way_if_asked(tmp_path):
    config = CONFIGS["t5 1.1"]
    tensors = tensors_of(config)
    source = write(tmp_path / "x", config, tensors)
    manifest = imported(source, tmp_path / "y", dtype="bfloat16")
    assert manifest.dtype == "bfloat16"
    logits = checkpoints.restore(tmp_path / "y")["decoder"]["logits"]
    np.testing.assert_array_equal(logits, tensors["lm_head.weight"].T.astype(ml_dtypes.bfloat16))
    out = huggingface.export_checkpoint(tmp_path / "y", tmp_path / "z", dtype="float16")
    wanted = {name: a.astype(ml_dtypes.bfloat16).astype(np.float16) for name, a in tensors.items()}
    assert bits(load(out)) == bits(wanted)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    for convert, here in ((imported, source), (huggingface.export_checkpoint, tmp_path / "y")):
        with pytest.raises(UnknownNameError, match="unknown dtype 'int8'"):
            convert(here, tmp_path / "no", dtype="int8")


def test_what_float16_cannot_hold_is_refused_by_name_and_nothing_is_left(tmp_path):
    config = CONFIGS["llama, tied"]
    tensors = tensors_of(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = -70000.0
    tensors["model.norm.weight"][0] = np.inf
    source = write(tmp_path / "x", config, tensors)
    imported(source, tmp_path / "y")
    message = "decoder/layers_01/mlp/wi_1: 70000 is too large for float16, which ends at 65504"
    with pytest.raises(CheckpointError, match=message):
        huggingface.export_checkpoint(tmp_path / "y", tmp_path / "z", dtype="float16")
    with pytest.raises(CheckpointError, match=message):
        imported(source, tmp_path / "z", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_nan_infinity_and_negative_zero_are_kept_bit_for_bit(tmp_path):
    config = CONFIGS["llama, tied"]
    tensors = tensors_of(config)
    odd = np.array([0x7F800001, 0xFFC12345, 0x80000000, 0xFF800000, 1], np.uint32)
    tensors["model.layers.0.mlp.up_proj.weight"].view(np.uint32)[2, :5] = odd
    imported(write(tmp_path / "x", config, tensors), tmp_path / "y")
    out = huggingface.export_checkpoint(tmp_path / "y", tmp_path / "z")
    assert bits(load(out)) == bits(tensors)


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    source = write(tmp_path / "x", CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    manifest = imported(source, tmp_path / "y")
    # The bytes stay, and the manifest remembers others: a small array has no file of its own.
    name = "decoder/layers_00/mlp/wi_0"
    record = manifest.parameters[name] | {"digest": "0" * 64}
    parameters = manifest.parameters | {name: record}
    dataclasses.replace(manifest, parameters=parameters).write(tmp_path / "y")
    with pytest.raises(CheckpointError, match="decoder/layers_00/mlp/wi_0 is damaged"):
        huggingface.export_checkpoint(tmp_path / "y", tmp_path / "z")
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_an_existing_output_is_refused_before_anything_else(tmp_path):
    source = write(tmp_path / "x", CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    imported(source, tmp_path / "y")
    for convert, here in ((imported, source), (huggingface.export_checkpoint, tmp_path / "y")):
        with pytest.raises(CheckpointError, match="exists already"):
            convert(here, tmp_path / "y")


def test_a_base_model_that_was_saved_without_its_output_has_no_prefix(tmp_path):
    config = CONFIGS["gemma2"]
    tensors = {name.removeprefix("model."): a for name, a in tensors_of(config).items()}
    manifest = imported(write(tmp_path / "x", config, tensors), tmp_path / "y")
    whole = imported(write(tmp_path / "z", config, tensors_of(config)), tmp_path / "w")
    assert manifest.parameters == whole.parameters


def test_a_given_config_replaces_the_file(tmp_path):
    source = write(tmp_path / "x", CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    config = huggingface.read_config(source)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        imported(source, tmp_path / "y")
    manifest = imported(source, tmp_path / "y", config=config)
    assert "config" not in manifest.made_by


# --- what a T5's file says of its output


def test_the_weights_decide_whether_a_t5_is_tied(tmp_path):
    config = T5 | {"feed_forward_proj": "gated-gelu"}
    tensors = tensors_of(config)
    head = {"lm_head.weight": tensors["shared.weight"] + 1}
    copy = {"lm_head.weight": tensors["shared.weight"]}

    def read(values, added):
        return huggingface.read_config(write(tmp_path / "x", config | values, tensors | added))

    for values, added, tied, scaled in (
        ({}, {}, True, True),
        ({"tie_word_embeddings": True}, copy, True, True),
        ({"tie_word_embeddings": False}, {}, True, False),
        ({"tie_word_embeddings": False}, copy, True, False),
        ({"tie_word_embeddings": False}, head, False, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, head, False, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, {}, True, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, {}, True, True),
    ):
        found = read(values, added)
        assert (found.tie_word_embeddings, found.scale_decoder_outputs) == (tied, scaled), values
    with pytest.raises(CheckpointError, match=r"an lm_head\.weight of its own: transformers 4 and"):
        read({}, head)


def test_an_mt5_of_transformers_5_is_tied_but_never_scaled(tmp_path):
    config = T5 | {"model_type": "mt5", "tie_word_embeddings": True}
    tensors = tensors_of(config | {"feed_forward_proj": "gated-gelu"})
    for version, scaled in (("4.40.0", True), ("5.24.0", False)):
        values = config | {"transformers_version": version}
        found = huggingface.read_config(write(tmp_path / "x", values, tensors))
        assert (found.tie_word_embeddings, found.scale_decoder_outputs) == (True, scaled)
    assert found.feed_forward_proj == "gated-gelu"


def test_aliases_of_the_embedding_are_equal_to_it_or_refused(tmp_path):
    config = CONFIGS["t5 1.1"]
    tensors = tensors_of(config)
    wanted = imported(write(tmp_path / "x", config, tensors), tmp_path / "1").parameters
    stale = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    alias = {
        "encoder.embed_tokens.weight": tensors["shared.weight"],
        "decoder.embed_tokens.weight": tensors["shared.weight"],
        stale: np.zeros((4, HEADS), np.float32),
    }
    source = write(tmp_path / "x", config, tensors | alias)
    assert imported(source, tmp_path / "2").parameters == wanted
    alias["decoder.embed_tokens.weight"] = alias["decoder.embed_tokens.weight"] * 2
    source = write(tmp_path / "x", config, tensors | alias)
    with pytest.raises(CheckpointError, match=r"decoder\.embed_tokens\.weight differs from shared"):
        imported(source, tmp_path / "3")


def test_a_decoders_flag_and_output_must_agree(tmp_path):
    config = CONFIGS["llama, tied"]
    tensors = tensors_of(config)
    embedding = tensors["model.embed_tokens.weight"]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    wanted = imported(write(tmp_path / "x", config, tensors), tmp_path / "1").parameters
    same = tensors | frequencies | {"lm_head.weight": embedding}
    source = write(tmp_path / "x", config, same)
    assert imported(source, tmp_path / "2").parameters == wanted
    source = write(tmp_path / "x", config, tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        imported(source, tmp_path / "3")
    source = write(tmp_path / "x", config | {"tie_word_embeddings": False}, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing, though config\.json"):
        imported(source, tmp_path / "3")


# --- config.json


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
        ("t5 1.1", {"d_kv": "6"}, "d_kv: expected a positive integer, found '6'"),
        ("t5 1.1", {"tie_encoder_decoder": True}, "tie_encoder_decoder = True is not supported"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = True is not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'q"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "the rope type 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "the rope type 'longrope'"),
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
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types does not agree with"),
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


def test_unknown_fields_are_warned_of_once_and_harmless_ones_never(tmp_path, recwarn):
    config_of(tmp_path, CONFIGS["llama"], _name_or_path="x", temperature=0.6, id2label={"0": "a"})
    assert not [w for w in recwarn if "unknown fields" in str(w.message)]
    with pytest.warns(UserWarning, match="unknown fields, .*: residual_scale, wobble") as caught:
        config_of(tmp_path, CONFIGS["llama"], wobble=3, residual_scale=0.2)
    assert len([w for w in caught if "unknown fields" in str(w.message)]) == 1


# --- what export writes


def test_a_t5_1_1_is_exported_so_that_transformers_4_and_5_read_it_alike(tmp_path):
    for family in ("t5 1.1", "t5 tied, unscaled"):
        source = write(tmp_path / family, CONFIGS[family], tensors_of(CONFIGS[family]))
        imported(source, tmp_path / f"{family} ours")
        out = huggingface.export_checkpoint(tmp_path / f"{family} ours", tmp_path / f"{family} x")
        config = json.loads((out / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert config["scale_decoder_outputs"] is False
        assert "lm_head.weight" in load(out)
        assert config["architectures"] == ["T5ForConditionalGeneration"]
        assert (config["pad_token_id"], config["eos_token_id"]) == (0, 1)
        assert config["decoder_start_token_id"] == 0


def test_rope_is_exported_in_both_layouts(tmp_path):
    source = write(tmp_path / "x", CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    imported(source, tmp_path / "y")
    out = huggingface.export_checkpoint(tmp_path / "y", tmp_path / "z")
    config = json.loads((out / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, LLAMA3_ROPE)
    assert config["rope_parameters"] == LLAMA3_ROPE | {"rope_theta": 5e5}
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (config["torch_dtype"], config["dtype"]) == ("float32", "float32")


def save_ours(directory, **settings):
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
    }
    config = LlamaConfig(**fields | settings)
    spec = checkpoints.flatten(models.spec(config))
    params = {name: np.ones(s.shape, np.float32) for name, s in spec.items()}
    return checkpoints.save(
        directory,
        checkpoints.unflatten(params),
        model=models.to_dict(config),
        vocabulary=VOCABULARY,
        made_by={"kind": "merge", "recipe": {"method": "ties", "density": 0.2, "names": ["a|b"]}},
        parents=({"role": "base", "path": "/models/base", "digest": "0123456789abcdef0123"},),
    )


def test_a_model_that_its_type_cannot_express_is_refused(tmp_path):
    for i, (settings, field) in enumerate(
        [
            ({"norm_offset": 1.0}, "norm_offset"),
            ({"windows": (3,)}, "windows"),
            ({"qkv_bias": True}, "out_bias"),
            ({"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh"}, "norm_offset"),
        ]
    ):
        save_ours(tmp_path / str(i), **settings)
        with pytest.raises(CheckpointError, match=rf"LlamaConfig\.{field}: .* cannot be told"):
            huggingface.export_checkpoint(tmp_path / str(i), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def result(file, digest, **changes):
    values = {
        "task": "rte_gpt3",
        "dataset": "rte",
        "held_out": True,
        "metric": "accuracy",
        "score": 61.256,
        "count": 1277,
        "model_digest": digest,
    }
    file.write_text(json.dumps(values | changes))
    return file


def test_the_card_tells_recipe_parents_and_results(tmp_path):
    digest = save_ours(tmp_path / "ours").digest
    results = [result(tmp_path / "r.json", digest)]
    out = huggingface.export_checkpoint(tmp_path / "ours", tmp_path / "my-merge", results=results)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for line in (
        "- merge",
        "# my-merge",
        "| recipe.method | ties |",
        '| recipe.names | ["a\\|b"] |',
        "| base | /models/base | `0123456789abcdef` |",
        "| rte_gpt3 | rte | yes | accuracy | 61.26 | 1,277 |",
    ):
        assert line in card.splitlines()
    assert digest in card
    ours = (tmp_path / "ours/manifest.json").read_bytes()
    assert (out / "m2l_manifest.json").read_bytes() == ours


def test_results_of_another_model_are_refused(tmp_path):
    digest = save_ours(tmp_path / "ours").digest
    for file, message in (
        (result(tmp_path / "r.json", "f" * 64), "a result of another model"),
        (result(tmp_path / "s.json", digest, score="good"), "no result of m2l eval"),
        (tmp_path / "ours/manifest.json", "no result of m2l eval"),
    ):
        with pytest.raises(CheckpointError, match=message):
            huggingface.export_checkpoint(tmp_path / "ours", tmp_path / "out", results=[file])
    assert not (tmp_path / "out").exists()


def test_the_tokenizers_files_go_along_and_name_the_special_tokens(tmp_path):
    save_ours(tmp_path / "ours")
    tokenizer = tmp_path / "ours/tokenizer"
    tokenizer.mkdir()
    added = [{"id": 11, "content": "<s>"}, {"id": 12, "content": "</s>"}]
    files = {
        "tokenizer.json": {"added_tokens": added},
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "pad_token": "<pad>",
            "added_tokens_decoder": {"13": {"content": "<pad>"}},
        },
        "generation_config.json": {"eos_token_id": [12, 14]},
    }
    for name, content in files.items():
        (tokenizer / name).write_text(json.dumps(content))
    out = huggingface.export_checkpoint(tmp_path / "ours", tmp_path / "out")
    for name in files:
        assert (out / name).read_bytes() == (tokenizer / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    ids = [config[f"{token}_token_id"] for token in ("bos", "eos", "pad")]
    assert ids == [11, [12, 14], 13]


# --- the part that is shared with other formats


def refuse(config, tensors, message, origins=None, **options):
    origins = huggingface.origins(config) if origins is None else origins
    with pytest.raises(CheckpointError) as caught:
        importing.import_tensors(
            options.pop("out"),
            config,
            tensors,
            origins,
            source=options.pop("source"),
            vocabulary=VOCABULARY,
            made_by={},
            **options,
        )
    assert message in str(caught.value)


def test_tensors_that_are_not_the_models_are_refused_before_anything_is_read(tmp_path):
    config = config_of(tmp_path, CONFIGS["llama"])
    arrays = tensors_of(CONFIGS["llama"])

    def unread():
        raise AssertionError("a tensor was read")

    whole = {n: Tensor(n, a.shape, a.dtype, unread) for n, a in arrays.items()}
    where = {"out": tmp_path / "out", "source": tmp_path / "theirs"}

    def but(**changed):
        return whole | {
            name: Tensor(name, *changed[key], unread)
            for key in changed
            for name in whole
            if name.endswith(key)
        }

    some = {n: t for n, t in whole.items() if "q_proj" not in n and "norm" not in n}
    refuse(config, some, "and 7 more: its tensors are not those", **where)
    refuse(config, some, "model.layers.0.input_layernorm.weight is missing; ", **where)
    extra = whole | {f"adapter.{i}": whole["model.norm.weight"] for i in range(4)}
    refuse(config, extra, "adapter.0 is no part of the model; adapter.1 is no", **where)
    refuse(config, extra, "; and 1 more: ", **where)
    wide = but(weight=((3, 3), np.dtype(np.float32)))
    refuse(config, wide, "model.embed_tokens.weight [3, 3] does not give token_embedder", **where)
    ints = whole | {"model.norm.weight": Tensor("", (WIDTH,), np.dtype(np.int8), unread)}
    refuse(config, ints, "model.norm.weight is int8: expected one of float32, bfloat16", **where)
    origins = huggingface.origins(config)
    refuse(
        config,
        whole,
        "model.norm.weight is claimed by decoder/layers_02/pre_mlp_norm and by decoder/norm",
        origins | {"decoder/layers_02/pre_mlp_norm": origins["decoder/norm"]},
        ignored=[origins["decoder/layers_02/pre_mlp_norm"].tensor],
        **where,
    )
    del origins["decoder/norm"]
    refuse(config, whole, "decoder/norm comes from nowhere", origins, **where)
    origins = huggingface.origins(config) | {"decoder/more": Origin("model.norm.weight")}
    refuse(config, whole, "the model has no decoder/more", origins, **where)
    assert not (tmp_path / "out").exists()


def test_stacked_layers_are_read_once_and_taken_apart(tmp_path):
    config = config_of(tmp_path, CONFIGS["llama"])
    arrays = tensors_of(CONFIGS["llama"])
    wanted = imported(tmp_path / "read", tmp_path / "plain").parameters
    name = "model.layers.{}.mlp.up_proj.weight"
    read = []

    def tensor(key, array):
        return Tensor(key, array.shape, array.dtype, lambda: read.append(key) or array)

    where = {"source": tmp_path / "theirs", "vocabulary": VOCABULARY, "made_by": {}}
    for axis in (0, 1, 2):
        rest = {k: v for k, v in arrays.items() if "up_proj" not in k}
        rest["stack"] = np.stack([arrays[name.format(i)] for i in range(3)], axis)
        tensors = {key: tensor(key, array) for key, array in rest.items()}
        origins = huggingface.origins(config) | {
            f"decoder/layers_{i:02}/mlp/wi_1": Origin("stack", True, axis, i) for i in range(3)
        }
        read.clear()
        out = tmp_path / f"axis {axis}"
        found = importing.import_tensors(out, config, tensors, origins, **where)
        assert found.parameters == wanted
        assert sorted(read) == sorted(tensors)
        rest["stack"] = np.concatenate([rest["stack"]] * 2, axis)
        tensors["stack"] = tensor("stack", rest["stack"])
        with pytest.raises(CheckpointError, match="stack stacks 6 layers, the model has 3"):
            importing.import_tensors(tmp_path / "no", config, tensors, origins, **where)


def test_a_failing_read_leaves_nothing(tmp_path):
    config = config_of(tmp_path, CONFIGS["llama"])

    def fail():
        raise CheckpointError("gone")

    tensors = {
        name: Tensor(name, a.shape, a.dtype, fail if name == "lm_head.weight" else lambda a=a: a)
        for name, a in tensors_of(CONFIGS["llama"]).items()
    }
    refuse(config, tensors, "gone", out=tmp_path / "out", source=tmp_path / "theirs")
    assert {path.name for path in tmp_path.iterdir()} == {"read"}


MEASURED = """
import resource, sys
from m2l import models
from m2l.checkpoints import flatten, huggingface
what, source, out = sys.argv[1:]
config = huggingface.read_config({config!r})
flatten(models.spec(config))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if what == "import":
    vocabulary = {{"name": "bytes", "size": 7, "fingerprint": ""}}
    huggingface.import_checkpoint(source, out, vocabulary=vocabulary)
else:
    huggingface.export_checkpoint(source, out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_model(tmp_path):
    # 16 MiB of embedding, and 26 layers of 24 MiB: 640 MiB, where 560 are allowed.
    config = DECODER | {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 26,
        "num_key_value_heads": 2,
    }
    source = tmp_path / "theirs"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    model = huggingface_config.read_settings(source, tied=None)
    spec = checkpoints.flatten(models.spec(model))
    rng = np.random.default_rng(0)
    tensors = {
        origin.tensor: rng.random(spec[name].shape[:: -1 if origin.transposed else 1], np.float32)
        for name, origin in huggingface.origins(model).items()
    }
    largest = max(a.nbytes for a in tensors.values())
    total = sum(a.nbytes for a in tensors.values())
    official.save_file(tensors, source / "model.safetensors")
    allowed = 3 * largest + (512 << 20)
    program = MEASURED.format(config=str(source))
    places = [source, tmp_path / "ours", tmp_path / "again"]
    for what, here, there in zip(("import", "export"), places, places[1:], strict=False):
        command = [sys.executable, "-c", program, what, str(here), str(there)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        held = int(ran.stdout.splitlines()[-1]) << 10
        assert held < allowed < total, f"{what}: {held >> 20} MiB"
