"""What an export writes beside the weights: config.json, the card, the tokenizer's files."""

import json

import numpy as np
import pytest

from m2l import checkpoints, models
from m2l.checkpoints import huggingface
from m2l.errors import CheckpointError
from m2l.models import LlamaConfig

from .families import (
    CONFIGS,
    HEAD,
    INNER,
    LLAMA3_ROPE,
    VOCAB,
    VOCABULARY,
    WIDTH,
    imported,
    load,
    tensors_of,
    write,
)


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


def test_the_tokenizers_files_go_along_and_name_the_special_tokens(tmp_path):
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
