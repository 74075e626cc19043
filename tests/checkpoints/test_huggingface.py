"""Hugging Face's checkpoints come in and go out bit for bit, or are refused by name."""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as official

from m2l import checkpoints, models
from m2l.checkpoints import huggingface, huggingface_config, huggingface_directory
from m2l.errors import CheckpointError, UnknownNameError
from m2l.models import LlamaConfig

from .families import (
    CONFIGS,
    DECODER,
    HEAD,
    HEADS,
    INNER,
    LLAMA3_ROPE,
    T5,
    VOCAB,
    VOCABULARY,
    WIDTH,
    bits,
    imported,
    load,
    tensors_of,
    write,
)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_comes_back_bit_for_bit(tmp_path, family, dtype):
    config = CONFIGS[family]
    tensors = tensors_of(config, dtype)
    source = write(tmp_path / "theirs", config, tensors)
    manifest = imported(source, tmp_path / "ours")
    assert {**manifest.made_by, "key": None} == {
        "key": None,
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
    record = manifest.parameters[name] | {"digest": "0" * 32}
    parameters = manifest.parameters | {name: record}
    file = tmp_path / "y" / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    changed = dataclasses.replace(manifest, parameters=parameters)
    file.write_text(json.dumps(content | {"custom_metadata": {"m2l": changed.to_json()}}))
    with pytest.raises(CheckpointError, match="decoder/layers_00/mlp/wi_0 is damaged"):
        huggingface.export_checkpoint(tmp_path / "y", tmp_path / "z")
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_an_existing_output_is_refused_before_anything_else(tmp_path):
    source = write(tmp_path / "x", CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    imported(source, tmp_path / "y")
    (tmp_path / "there").mkdir()
    for convert, here in ((imported, source), (huggingface.export_checkpoint, tmp_path / "y")):
        with pytest.raises(CheckpointError, match="exists already"):
            convert(here, tmp_path / "there")
    with pytest.raises(CheckpointError, match="exists already"):
        huggingface.export_checkpoint(tmp_path / "y", tmp_path / "y")
    # Another source of the same name and sizes.
    write(source, CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    with pytest.raises(CheckpointError, match="exists already"):
        imported(source, tmp_path / "y")


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


def save_ours(directory, vocabulary=VOCABULARY, **settings):
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
        vocabulary=vocabulary,
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
        with pytest.raises(CheckpointError, match=rf"LlamaConfig\.{field}: .* cannot be expressed"):
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
    ours = json.loads((tmp_path / "ours/_CHECKPOINT_METADATA").read_text())
    read = [json.loads((out / "m2l_manifest.json").read_text()), ours["custom_metadata"]["m2l"]]
    own = ("directory", "checksum")
    assert set(read[0]["made_by"].pop("exported")) == {"dtype", "shard_size", "results"}
    without = [{name: v for name, v in one.items() if name not in own} for one in read]
    assert without[0] == without[1]


def test_results_of_another_model_are_refused(tmp_path):
    digest = save_ours(tmp_path / "ours").digest
    for file, message in (
        (result(tmp_path / "r.json", "f" * 64), "a result of another model"),
        (result(tmp_path / "s.json", digest, score="good"), "no result of m2l eval"),
        (tmp_path / "ours/_CHECKPOINT_METADATA", "no result of m2l eval"),
    ):
        with pytest.raises(CheckpointError, match=message):
            huggingface.export_checkpoint(tmp_path / "ours", tmp_path / "out", results=[file])
    assert not (tmp_path / "out").exists()


def test_the_tokenizers_files_go_along_and_name_the_special_tokens(tmp_path, monkeypatch):
    tokenizer = tmp_path / "tokenizer"
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
    save_ours(tmp_path / "ours", vocabulary=VOCABULARY | {"name": str(tokenizer)})
    out = huggingface.export_checkpoint(tmp_path / "ours", tmp_path / "out")
    for name in files:
        assert (out / name).read_bytes() == (tokenizer / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    ids = [config[f"{token}_token_id"] for token in ("bos", "eos", "pad")]
    assert ids == [11, [12, 14], 13]

    # On another machine, where no copy of the tokenizer is.
    out = out.rename(tmp_path / "moved")
    monkeypatch.setenv("M2L_CACHE", str(tmp_path / "empty"))
    assert huggingface_directory.read_manifest(out).vocabulary["name"] == str(out)
    assert checkpoints.open(out).tokenizer == out
