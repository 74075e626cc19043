"""GGUF files that the package gguf writes, and what transformers would read of them."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from m2l import checkpoints
from m2l.checkpoints import gguf_files, huggingface_directory, opening
from m2l.errors import CheckpointError

HIDDEN, WIDE, HEADS, GROUPS, SIZE = 64, 96, 4, 2, 16
PIECES = ["<|endoftext|>", "<|im_start|>", "a", "b", "ab"]
Q8 = GGMLQuantizationType.Q8_0


def matrices():
    """Returns Hugging Face's name of each tensor of one layer -> llama.cpp's, and its shape."""
    layer, block = "model.layers.0.", "blk.0."
    return {
        "model.embed_tokens.weight": ("token_embd", (len(PIECES), HIDDEN)),
        "model.norm.weight": ("output_norm", (HIDDEN,)),
        f"{layer}input_layernorm.weight": (f"{block}attn_norm", (HIDDEN,)),
        f"{layer}self_attn.q_proj.weight": (f"{block}attn_q", (HEADS * SIZE, HIDDEN)),
        f"{layer}self_attn.k_proj.weight": (f"{block}attn_k", (GROUPS * SIZE, HIDDEN)),
        f"{layer}self_attn.v_proj.weight": (f"{block}attn_v", (GROUPS * SIZE, HIDDEN)),
        f"{layer}self_attn.o_proj.weight": (f"{block}attn_output", (HIDDEN, HEADS * SIZE)),
        f"{layer}post_attention_layernorm.weight": (f"{block}ffn_norm", (HIDDEN,)),
        f"{layer}mlp.gate_proj.weight": (f"{block}ffn_gate", (WIDE, HIDDEN)),
        f"{layer}mlp.up_proj.weight": (f"{block}ffn_up", (WIDE, HIDDEN)),
        f"{layer}mlp.down_proj.weight": (f"{block}ffn_down", (HIDDEN, WIDE)),
    }


def write(file, architecture="llama", split="smollm", more=()):
    """Writes a model as llama.cpp's converter does; returns what each tensor then holds."""
    rng, held = np.random.default_rng(0), {}
    writer = GGUFWriter(file, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(PIECES)
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    for name, (theirs, shape) in matrices().items():
        values = rng.standard_normal(shape).astype(np.float32)
        stored = values
        for part, heads in (("attn_q", HEADS), ("attn_k", GROUPS)):
            if theirs.endswith(part):  # features of a pair become neighbours
                turned = values.reshape(heads, 2, SIZE // 2, HIDDEN).swapaxes(1, 2)
                stored = np.ascontiguousarray(turned.reshape(shape))
        if "ffn_up" in theirs:
            packed = quants.quantize(stored, Q8)
            writer.add_tensor(f"{theirs}.weight", packed, raw_dtype=Q8)
            values = quants.dequantize(packed, Q8)
        else:
            writer.add_tensor(f"{theirs}.weight", stored)
        held[name] = values
    for name in more:
        writer.add_tensor(name, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def test_a_file_becomes_a_directory_with_its_weights_and_its_lineage(run_m2l, tmp_path, capsys):
    held = write(tmp_path / "model.gguf")
    assert run_m2l("convert", tmp_path / "model.gguf", tmp_path / "hf") == 0
    assert "tensors 10 F32, 1 Q8_0, in float32 now" in capsys.readouterr().out
    stored = opening.open(tmp_path / "hf", native=True).parameters
    assert set(stored) == set(held)
    for name, values in held.items():
        np.testing.assert_array_equal(stored[name].read_checked(), values, name)
    manifest = huggingface_directory.verify(tmp_path / "hf")
    assert manifest.made_by["from"] == "gguf" and manifest.made_by["types"] == {
        "F32": 10,
        "Q8_0": 1,
    }
    assert "types.Q8_0 | 1" in (tmp_path / "hf/README.md").read_text()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100000.0)
    # m2l has a network for it, and its tokenizer is one.
    assert run_m2l("convert", tmp_path / "hf", tmp_path / "checkpoint") == 0
    loaded = checkpoints.flatten(checkpoints.restore(tmp_path / "checkpoint"))
    up = held["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(loaded["decoder/layers_00/mlp/wi_1"], up.T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "qwen2"}, "its architecture is qwen2"),
        ({"split": "qwen2"}, "its tokenizer is 'gpt2', split as 'qwen2'"),
        ({"more": ["blk.0.attn_q.bias"]}, "blk.0.attn_q.bias is no tensor of a plain Llama"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(settings, message, tmp_path):
    write(tmp_path / "model.gguf", **settings)
    with pytest.raises(CheckpointError, match=message):
        gguf_files.to_huggingface(tmp_path / "model.gguf", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("size", [0, 3, 100, 2000])
def test_a_damaged_file_is_refused(size, tmp_path):
    write(tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        gguf_files.to_huggingface(tmp_path / "model.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_other_commands_name_the_one_that_reads_it(tmp_path):
    write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="m2l convert"):
        opening.open(tmp_path / "model.gguf")
