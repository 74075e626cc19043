"""Directories of Hugging Face's format that m2l wrote are compared with what was written."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as official

from m2l import checkpoints, merging, models, storage
from m2l.checkpoints import huggingface, huggingface_directory
from m2l.errors import CheckpointError
from m2l.evaluation.model import load

from .families import VOCABULARY

CONFIG = models.LlamaConfig(
    vocab_size=384,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
SQUARE, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
AVERAGE = merging.Recipe("average")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What m2l writes: an export, one that is cast, and a merge that keeps Hugging Face's names."""
    root, rng = tmp_path_factory.mktemp("written"), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), models.spec(CONFIG)
    )
    about = {"model": models.to_dict(CONFIG), "vocabulary": VOCABULARY, "made_by": {}}
    checkpoints.save(root / "ours", params, **about)
    huggingface.export_checkpoint(root / "ours", root / "export")
    huggingface.export_checkpoint(root / "ours", root / "cast", dtype="bfloat16", shard_size=2000)
    merging.merge(None, [root / "export"], AVERAGE, root / "merge", progress=False)
    return root


def evaluate(directory, _):
    load(directory, "bytes").read(None)


def convert(directory, out):
    huggingface.import_checkpoint(directory, out / "converted", vocabulary=VOCABULARY)


def merge(directory, out):
    merging.merge(None, [directory], AVERAGE, out / "merged", progress=False)


def merge_to_orbax(directory, out):
    how = {"output_format": "orbax", "vocabulary": VOCABULARY, "progress": False}
    merging.merge(None, [directory], AVERAGE, out / "orbax", **how)


def verify(directory, _):
    huggingface_directory.verify(directory)


READERS = (evaluate, convert, merge, merge_to_orbax, verify)


def flip(directory, name):
    tensor = huggingface_directory.open_tensors(directory)[name]
    content = bytearray(tensor.file.read_bytes())
    content[tensor.offset + tensor.nbytes // 2] ^= 1
    tensor.file.write_bytes(content)


def edit(name):
    def change(directory):
        text = (directory / name).read_text()
        (directory / name).write_text(text.replace("1", "2", 1))

    return change


def trained_further(directory):
    file = directory / "model.safetensors"
    tensors = official.load_file(file)
    official.save_file({name: a + np.float32(1) for name, a in tensors.items()}, file)


def resized(directory):
    file = directory / "model.safetensors"
    tensors = official.load_file(file)
    official.save_file(tensors | {NORM: tensors[NORM].reshape(2, -1)}, file)


DAMAGES = {
    "a transposed matrix": (lambda d: flip(d, SQUARE), SQUARE),
    "a norm": (lambda d: flip(d, NORM), NORM),
    "the embedding": (lambda d: flip(d, "model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "config.json": (edit("config.json"), r"config\.json: its digest is not"),
    "no config.json": (
        lambda d: (d / "config.json").rename(d / "x.json"),
        r"config\.json|no finished",
    ),
    "trained further": (trained_further, r"delete m2l_manifest\.json"),
    "resized": (resized, rf"{NORM} is float32\[2, 8\], m2l_manifest\.json records float32\[16\]"),
    "the manifest": (edit("m2l_manifest.json"), r"m2l_manifest\.json: damaged or edited"),
    "no manifest's text": (
        lambda d: (d / "m2l_manifest.json").write_text("[" * 100_000),
        r"m2l_manifest\.json: damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["export", "merge"])
def test_damage_to_what_m2l_wrote_is_named_by_whoever_reads_it(written, tmp_path, kind, damage):
    change, message = DAMAGES[damage]
    directory = shutil.copytree(written / kind, tmp_path / "x")
    change(directory)
    for read in READERS:
        with pytest.raises(CheckpointError, match=message) as caught:
            read(directory, tmp_path)
        assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["export", "cast", "merge"])
def test_what_m2l_wrote_is_read_by_all_and_may_be_described_and_added_to(written, tmp_path, kind):
    directory = shutil.copytree(written / kind, tmp_path / "x")
    (directory / "README.md").write_text("My model.")
    (directory / "LICENSE").write_text("Apache 2.0")
    for read in READERS:
        read(directory, tmp_path)


def test_a_cast_export_is_checked_by_what_is_stored(written, tmp_path):
    directory = shutil.copytree(written / "cast", tmp_path / "x")
    assert (directory / "model.safetensors.index.json").is_file()
    flip(directory, SQUARE)
    with pytest.raises(CheckpointError, match=SQUARE):
        huggingface_directory.verify(directory)


def test_without_the_record_a_changed_directory_is_read_as_anybodys(written, tmp_path):
    directory = shutil.copytree(written / "export", tmp_path / "x")
    trained_further(directory)
    (directory / "m2l_manifest.json").unlink()
    for read in READERS[:-1]:
        read(directory, tmp_path)


def test_the_record_of_an_older_version_is_said_to_lack_digests(written, tmp_path):
    directory = shutil.copytree(written / "export", tmp_path / "x")
    ours = json.loads((written / "ours/_CHECKPOINT_METADATA").read_text())
    (directory / "m2l_manifest.json").write_text(json.dumps(ours["custom_metadata"]["m2l"]))
    with pytest.raises(CheckpointError, match="older m2l, without the digests"):
        huggingface_directory.verify(directory)
    for read in READERS[:-1]:
        read(directory, tmp_path)


def test_inspect_verifies_a_directory(written, tmp_path, run_m2l, capsys):
    directory = shutil.copytree(written / "merge", tmp_path / "x")
    assert run_m2l("inspect", directory, "--verify") == 0
    assert "every digest is right" in capsys.readouterr().out
    flip(directory, NORM)
    assert run_m2l("inspect", directory, "--verify") == 2
    assert f"{NORM} does not have the digest" in capsys.readouterr().err


def test_the_record_has_a_digest_for_each_tensor_and_file(written):
    content = json.loads((written / "cast/m2l_manifest.json").read_text())["directory"]
    files = {file.name for file in (written / "cast").iterdir()}
    shards = {name for name in files if name.endswith(".safetensors")}
    assert set(content["files"]) == files - shards - {"README.md", "m2l_manifest.json"}
    stored = [official.load_file(written / "cast" / shard) for shard in shards]
    assert len(stored) > 1
    assert set(content["tensors"]) == {name for tensors in stored for name in tensors}
    assert {record["dtype"] for record in content["tensors"].values()} == {"bfloat16"}


def content(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in storage.list_files(directory)
    }


def test_directories_in_a_bucket_are_read_and_written_as_local_ones(written, folder):
    for name in ("export", "cast"):
        storage.upload(written / name, folder / name)
    merging.merge(None, [folder / "export"], AVERAGE, folder / "merge", progress=False)
    huggingface.export_checkpoint(
        written / "ours", folder / "again", dtype="bfloat16", shard_size=2000
    )
    for made, local in (("merge", written / "merge"), ("again", written / "cast")):
        files, expected = content(folder / made), content(local)
        assert files.keys() == expected.keys()
        for name in files:
            # These two name the inputs by their paths, or the directory itself.
            if name not in ("README.md", huggingface_directory.MANIFEST):
                assert files[name] == expected[name]
        huggingface_directory.verify(folder / made)
    for directory in (folder / "cast", folder / "merge"):
        params = checkpoints.flatten(load(directory, "bytes").read(None))
        imported = huggingface.import_checkpoint(
            directory, folder / f"{directory.name}-own", vocabulary=VOCABULARY
        )
        assert imported.parameters.keys() == params.keys()
    mixed = [folder / "merge-own", folder / "export"]
    merged = merging.merge(
        None, mixed, AVERAGE, folder / "mixed", vocabulary=VOCABULARY, progress=False
    )
    assert checkpoints.verify(folder / "mixed") == merged
