"""Models of every format are merged: the same parameters give the same bits, whoever's files."""

import errno
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest

from m2l import checkpoints, models
from m2l.checkpoints import huggingface, publishing, safetensors
from m2l.errors import CheckpointError, MergeError
from m2l.merging import METHODS, Recipe, merge

CONFIG = models.LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
)
VOCABULARY = {"name": "bytes", "size": 40, "fingerprint": "abc"}
RECIPES = [
    Recipe("average", dtype="bfloat16"),
    Recipe("ties", density=0.3, dtype="bfloat16"),
    Recipe("dare_ties", drop_rate=0.5, seed=3, dtype="bfloat16"),
    Recipe("slerp", t=0.3),
    Recipe("model_stock"),
    Recipe("della", drop_rate=0.5, seed=1),
    Recipe("breadcrumbs", density=0.6, gamma=0.1),
    Recipe("tsv_m"),
    Recipe("iso_cts", common=0.5),
    Recipe("wudi", steps=2, step_size=0.01),
    Recipe("widen"),
    Recipe("core_space", density=0.5),
    Recipe("nuslerp_columns"),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same base and two experts as m2l's checkpoints and as Hugging Face directories."""
    root, rng = tmp_path_factory.mktemp("both"), np.random.default_rng(0)
    spec = models.spec(CONFIG)
    base = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), spec)
    about = {"model": models.to_dict(CONFIG), "vocabulary": VOCABULARY}
    for name in ("base", "one", "two"):
        params = jax.tree.map(
            lambda leaf: (leaf + 0.1 * rng.standard_normal(leaf.shape)).astype(ml_dtypes.bfloat16),
            base,
        )
        checkpoints.save(root / "orbax" / name, params, **about, made_by={"kind": "test"})
        huggingface.export_checkpoint(root / "orbax" / name, root / "huggingface" / name)
    return root


def sources(root, kind, recipe):
    base = None if recipe.method in ("average", "slerp") else root / kind / "base"
    return base, [root / kind / "one", root / kind / "two"]


def tensors(directory):
    return {n: t.read().tobytes() for n, t in safetensors.open_tensors(directory).items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_hugging_face_directories_merge_to_what_checkpoints_merge_to(both, tmp_path, recipe):
    merge(*sources(both, "huggingface", recipe), recipe, tmp_path / "native", progress=False)
    merge(*sources(both, "orbax", recipe), recipe, tmp_path / "orbax", progress=False)
    in_memory = merge(*sources(both, "huggingface", recipe), recipe, output_format="huggingface")
    assert {n: a.tobytes() for n, a in in_memory.items()} == tensors(tmp_path / "native")
    huggingface.export_checkpoint(tmp_path / "orbax", tmp_path / "exported")
    native, exported = tensors(tmp_path / "native"), tensors(tmp_path / "exported")
    # Its output is the embedding, and an export of a tied model may write it once more.
    assert native.keys() <= exported.keys()
    if METHODS[recipe.method].coefficients is not None:
        # Inner products are summed in the order in which parameters lie.
        a, b = (
            safetensors.open_tensors(tmp_path / k)["model.norm.weight"].read()
            for k in ("native", "exported")
        )
        np.testing.assert_allclose(a, b, rtol=1e-5)
    else:
        assert all(native[name] == exported[name] for name in native)


def test_a_merged_directory_is_complete_and_says_what_it_is(both, tmp_path):
    recipe = Recipe("task_arithmetic", scale=0.5, dtype="bfloat16")
    manifest = merge(*sources(both, "huggingface", recipe), recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert huggingface.read_config(tmp_path / "out") == CONFIG
    stored = json.loads((tmp_path / "out" / "m2l_manifest.json").read_text())
    assert stored["made_by"]["recipe"]["method"] == "task_arithmetic"
    assert stored["digest"] == manifest.digest
    assert "task_arithmetic" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES[:3], ids=lambda recipe: recipe.method)
def test_formats_may_be_mixed_and_changed(both, tmp_path, recipe):
    base, experts = sources(both, "orbax", recipe)
    alone = merge(base, experts, recipe, tmp_path / "alone", progress=False)
    mixed = [experts[0], both / "huggingface" / "two"]
    found = merge(base, mixed, recipe, tmp_path / "mixed", progress=False)
    assert found.parameters == alone.parameters
    turned = merge(
        *sources(both, "huggingface", recipe),
        recipe,
        tmp_path / "turned",
        output_format="orbax",
        vocabulary=VOCABULARY,
        progress=False,
    )
    assert turned.parameters == alone.parameters
    merge(base, experts, recipe, tmp_path / "out", output_format="huggingface", progress=False)
    huggingface.export_checkpoint(tmp_path / "alone", tmp_path / "wanted")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "wanted")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_model_that_m2l_has_no_network_for_is_merged_by_its_own_names(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("one", "two"):
        path = tmp_path / name
        path.mkdir()
        arrays[name] = rng.standard_normal((5, 7)).astype(np.float32)
        described = {"transformer.h.0.attn.weight": ((5, 7), np.dtype(np.float32))}
        extents = safetensors.create(path, described, [list(described)])
        extents["transformer.h.0.attn.weight"].write_from(arrays[name].reshape(-1), 0)
        (path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    merge(None, [tmp_path / "one", tmp_path / "two"], Recipe("average"), tmp_path / "out")
    (found,) = safetensors.open_tensors(tmp_path / "out").values()
    np.testing.assert_array_equal(
        found.read().reshape(5, 7), (arrays["one"] + arrays["two"]) / np.float32(2)
    )


def test_patterns_are_of_either_name(both, tmp_path):
    recipe = Recipe(
        "task_arithmetic",
        scale=0.0,
        scales=(("decoder/layers_01/*", 1.0), ("model.norm.weight", (1.0, 0.0))),
        exclude=("model.embed_tokens.weight",),
    )
    base, experts = sources(both, "huggingface", recipe)
    merge(base, experts, recipe, tmp_path / "out", progress=False)
    read = {
        path: {n: t.read().astype(np.float32) for n, t in safetensors.open_tensors(path).items()}
        for path in (base, *experts, tmp_path / "out")
    }
    found = read[tmp_path / "out"]
    for name in found:
        b, one, two = (read[path][name] for path in (base, *experts))
        both_added = b + ((one - b) + (two - b))
        wanted = both_added if ".layers.1." in name else b
        np.testing.assert_allclose(found[name], wanted, atol=1e-6, err_msg=name)


def test_another_tokenizer_is_refused(both, tmp_path):
    import shutil

    for name, vocabulary in (("one", {"a": 0}), ("two", {"b": 0})):
        shutil.copytree(both / "huggingface" / name, tmp_path / name)
        content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeError, match=r"two cannot be merged with .*one: another tokenizer"):
        merge(None, [tmp_path / "one", tmp_path / "two"], Recipe("average"), tmp_path / "out")


def test_what_cannot_be_opened_is_refused_by_name(both, tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    one = both / "huggingface" / "one"
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: not read"):
        merge(None, [one, tmp_path / "pickled"], Recipe("average"), tmp_path / "out")
    with pytest.raises(MergeError, match="its vocabulary is not known to m2l: name the tokenizer"):
        merge(None, [one, one], Recipe("average"), tmp_path / "out", output_format="orbax")
    with pytest.raises(MergeError, match="--to gguf: a merge writes orbax or huggingface"):
        merge(None, [one, one], Recipe("average"), tmp_path / "out", output_format="gguf")


def test_a_disk_that_is_full_when_a_part_is_put_on_it_is_not_passed_over(
    both, monkeypatch, tmp_path
):
    """A write that failed is told once: to the first that waits for it, before the file's end."""
    told, synced = [], os.fdatasync

    def full(descriptor):
        synced(descriptor)
        if not told:
            told.append(descriptor)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", full)
    monkeypatch.setattr(publishing, "_FLUSHED", 1)
    experts = [both / "huggingface" / name for name in ("one", "two")]
    with pytest.raises(CheckpointError, match=r"out: no space left: .*nothing was written"):
        merge(None, experts, Recipe("average"), tmp_path / "out", progress=False)
    assert told
    assert list(tmp_path.iterdir()) == []
