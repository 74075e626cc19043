"""A checkpoint carries its tokenizer's files: through moves, training's saves and merges."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from orbax.checkpoint import v1 as ocp

from m2l import checkpoints, merging
from m2l.data import tokenizer_files, vocabularies
from m2l.errors import CheckpointError

MODEL = {"family": "t5"}
MADE_BY = {"kind": "test"}
WORDS = {"<pad>": 0, "</s>": 1, "yes": 2, "no": 3, "user": 4}


@pytest.fixture
def directory(tmp_path):
    """A model's directory: a tokenizer's files, and others that are none of its business."""
    directory = tmp_path / "model"
    directory.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": "user {{ messages[0]['content'] }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text('{"eos_token_id": 1, "d_model": 8}')
    (directory / "model.safetensors").write_bytes(b"0" * 99)
    return directory


def parameters(seed=0):
    return {"w": np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)}


def save(path, name, seed=0):
    vocabulary = tokenizer_files.describe(str(name))
    return checkpoints.save(
        path, parameters(seed), model=MODEL, vocabulary=vocabulary, made_by=MADE_BY
    )


def on_disk(checkpoint):
    content = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
    return content["custom_metadata"]["m2l"]["vocabulary"]["name"]


def carried(checkpoint):
    loaded = ocp.load_checkpointables(checkpoint, {"tokenizer": None})["tokenizer"]
    return {name: np.asarray(content).tobytes() for name, content in sorted(loaded.items())}


@pytest.mark.parametrize("chat", ["", "chat:"])
def test_a_moved_checkpoint_brings_its_tokenizer(directory, tmp_path, chat):
    saved = save(tmp_path / "one" / "x", f"{chat}{directory}")
    assert checkpoints.read_manifest(tmp_path / "one" / "x") == saved
    assert on_disk(tmp_path / "one" / "x") == f"{chat}tokenizer"
    assert "generation_config.json" in carried(tmp_path / "one" / "x")
    assert not {"config.json", "model.safetensors"} & set(carried(tmp_path / "one" / "x"))
    shutil.rmtree(directory)
    moved = tmp_path / "another place"
    shutil.move(tmp_path / "one" / "x", moved)
    manifest = checkpoints.verify(moved)
    name = manifest.vocabulary["name"]
    assert name == saved.vocabulary["name"]
    assert name.startswith(chat) and str(directory) not in name
    vocabulary = vocabularies.load(name)
    assert vocabulary.encode("yes no") == ([4] if chat else []) + [2, 3]
    assert vocabularies.describe(vocabulary, name) == manifest.vocabulary


def test_what_is_read_is_written_on(directory, tmp_path):
    save(tmp_path / "first", directory)
    vocabulary = checkpoints.read_manifest(tmp_path / "first").vocabulary
    checkpoints.save(
        tmp_path / "second", parameters(), model=MODEL, vocabulary=vocabulary, made_by=MADE_BY
    )
    shutil.rmtree(tmp_path / "first")
    assert checkpoints.verify(tmp_path / "second").vocabulary == vocabulary
    assert carried(tmp_path / "second")["tokenizer.json"]


def test_a_local_copy_that_was_removed_is_made_again(directory, tmp_path):
    name = save(tmp_path / "x", directory).vocabulary["name"]
    shutil.rmtree(name)
    assert checkpoints.read_manifest(tmp_path / "x").vocabulary["name"] == name
    content = carried(tmp_path / "x")
    assert {file.name: file.read_bytes() for file in Path(name).iterdir()} == content


def test_the_digest_is_of_the_ids_alone(directory, tmp_path):
    plain = save(tmp_path / "plain", directory)
    assert save(tmp_path / "chat", f"chat:{directory}").digest == plain.digest
    checkpoints.save(
        tmp_path / "none",
        parameters(),
        model=MODEL,
        vocabulary=plain.vocabulary | {"name": "elsewhere"},
        made_by=MADE_BY,
    )
    assert checkpoints.read_manifest(tmp_path / "none").digest == plain.digest
    assert not (tmp_path / "none" / "tokenizer").exists()


@pytest.mark.parametrize("name", ["microworld", "bytes"])
def test_what_m2l_ships_is_not_carried(tmp_path, name):
    manifest = save(tmp_path / "x", name)
    assert manifest.vocabulary["name"] == on_disk(tmp_path / "x") == name
    assert manifest.tokenizer is None
    assert not (tmp_path / "x" / "tokenizer").exists()


def test_t5s_model_by_its_file_or_directory_is_the_same(tmp_path):
    shipped = vocabularies.load("microworld").sentencepiece_model_file
    (tmp_path / "t5").mkdir()
    for name in ("t5/spiece.model", "my.model"):
        shutil.copy(shipped, tmp_path / name)
    manifests = [
        save(tmp_path / f"of_{number}", tmp_path / name)
        for number, name in enumerate(("t5", "t5/spiece.model", "my.model"))
    ]
    assert {manifest.digest for manifest in manifests} == {manifests[0].digest}
    for number, manifest in enumerate(manifests):
        assert list(carried(tmp_path / f"of_{number}")) == ["spiece.model"]
        name = manifest.vocabulary["name"]
        vocabulary = vocabularies.load(name)
        assert vocabularies.describe(vocabulary, name) == manifest.vocabulary
        by_file = vocabularies.load(str(tmp_path / "my.model"))
        assert vocabulary.encode("the cat eats.") == by_file.encode("the cat eats.")


def test_one_file_takes_its_settings_along_but_no_other_tokenizer(directory, tmp_path):
    shipped = vocabularies.load("microworld").sentencepiece_model_file
    shutil.copy(shipped, directory / "spiece.model")
    (directory / "tokenizer.json").rename(directory / "mine.json")
    manifest = save(tmp_path / "x", directory / "mine.json")
    assert list(carried(tmp_path / "x")) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert tokenizer_files.describe(manifest.vocabulary["name"]) == manifest.vocabulary


def test_the_end_of_a_text_is_carried_from_the_models_own_settings(directory, tmp_path):
    (directory / "tokenizer_config.json").unlink()
    manifest = save(tmp_path / "x", directory)
    assert tokenizer_files.describe(manifest.vocabulary["name"]) == manifest.vocabulary


def test_a_tokenizer_that_vanished_is_refused_and_nothing_is_written(directory, tmp_path):
    vocabulary = tokenizer_files.describe(str(directory))
    shutil.rmtree(directory)
    with pytest.raises(
        CheckpointError, match=r"model: the vocabulary's file is not there any more"
    ):
        checkpoints.save(
            tmp_path / "x", parameters(), model=MODEL, vocabulary=vocabulary, made_by=MADE_BY
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage, message", [("removed", "cannot be read"), ("edited", "damaged")])
def test_verifying_looks_at_the_tokenizer_too(directory, tmp_path, damage, message):
    save(tmp_path / "x", directory)
    file = tmp_path / "x" / "tokenizer" / "tokenizer_config.json" / "c.0"
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes().replace(b"user", b"uses"))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config.json.*{message}"):
        checkpoints.verify(tmp_path / "x")


def test_orbax_still_reads_the_parameters(directory, tmp_path):
    save(tmp_path / "x", directory)
    found = ocp.load_checkpointables(tmp_path / "x", {"params": None})
    assert jax.tree.map(np.shape, found["params"]) == {"w": (4, 3)}


def test_a_merge_carries_the_tokenizer_as_its_experts_read_it(directory, tmp_path):
    save(tmp_path / "base", directory, seed=9)
    for number in range(2):
        save(tmp_path / f"expert_{number}", f"chat:{directory}", seed=number)
    shutil.rmtree(directory)
    recipe = merging.Recipe(method="task_arithmetic", scale=0.5)
    experts = [tmp_path / "expert_0", tmp_path / "expert_1"]
    merged = merging.merge(tmp_path / "base", experts, recipe, tmp_path / "x", progress=False)
    assert merged.vocabulary["name"].startswith("chat:/")
    assert checkpoints.verify(tmp_path / "x") == merged
    assert vocabularies.load(merged.vocabulary["name"]).encode("no") == [4, 3]


def test_a_merge_whose_tokenizer_vanished_is_refused_before_anything_is_read(
    directory, tmp_path, monkeypatch
):
    for number in range(2):
        save(tmp_path / f"expert_{number}", directory, seed=number)
        shutil.rmtree(tmp_path / f"expert_{number}" / "tokenizer")
        for array in (tmp_path / f"expert_{number}" / "params").glob("*/"):
            shutil.rmtree(array)
    monkeypatch.setenv("M2L_CACHE", str(tmp_path / "without a copy of it"))
    experts = [tmp_path / "expert_0", tmp_path / "expert_1"]
    with pytest.raises(CheckpointError, match=r"expert_0/tokenizer/\S+: missing"):
        merging.merge(None, experts, merging.Recipe(method="average"), tmp_path / "x")
