"""Tensors that are not a model's are refused by name, whatever format they come from."""

import dataclasses

import numpy as np
import pytest

from m2l import checkpoints, models
from m2l.checkpoints import huggingface, importing
from m2l.checkpoints.importing import Origin, Tensor
from m2l.errors import CheckpointError

from .families import (
    CONFIGS,
    VOCABULARY,
    WIDTH,
    config_of,
    imported,
    tensors_of,
)


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
    refuse(config, some, "missing key model.layers.0.input_layernorm.weight; ", **where)
    extra = whole | {f"adapter.{i}": whole["model.norm.weight"] for i in range(4)}
    refuse(config, extra, "unexpected key adapter.0; unexpected key adapter.1", **where)
    refuse(config, extra, "; and 1 more: ", **where)
    wide = but(weight=((3, 3), np.dtype(np.float32)))
    refuse(config, wide, "model.embed_tokens.weight [3, 3] does not give token_embedder", **where)
    ints = whole | {"model.norm.weight": Tensor("", (WIDTH,), np.dtype(np.int8), unread)}
    refuse(config, ints, "model.norm.weight is int8: expected one of float32, bfloat16", **where)
    origins = huggingface.origins(config)
    refuse(
        config,
        whole,
        "duplicate mapping: model.norm.weight is both decoder/layers_02/pre_mlp_norm and ",
        origins | {"decoder/layers_02/pre_mlp_norm": origins["decoder/norm"]},
        ignored=[origins["decoder/layers_02/pre_mlp_norm"].tensor],
        **where,
    )
    del origins["decoder/norm"]
    refuse(config, whole, "no tensor for decoder/norm", origins, **where)
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


LLAMA = models.LlamaConfig(64, 32, 48, 12, 4, 2, 8)
T5 = models.T5Config(
    vocab_size=64,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_heads=2,
    num_encoder_layers=3,
    num_decoder_layers=2,
)


@pytest.mark.parametrize(
    "config",
    [
        T5,
        dataclasses.replace(T5, feed_forward_proj="relu", tie_word_embeddings=True),
        LLAMA,
        dataclasses.replace(LLAMA, num_hidden_layers=1, tie_word_embeddings=True),
        dataclasses.replace(LLAMA, num_hidden_layers=101, qkv_bias=True, out_bias=True),
        dataclasses.replace(LLAMA, windows=(4, 0) * 6, post_norms=True, model_type="gemma2"),
    ],
)
def test_the_shapes_of_a_model_are_those_that_its_spec_has(config):
    specs = checkpoints.flatten(models.spec(config))
    found = importing.parameter_shapes(config)
    assert list(found.items()) == [(name, spec.shape) for name, spec in specs.items()]
