"""Checkpoints of m2l's first format, whose arrays are in OCDBT, are read as they always were."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from m2l import checkpoints
from m2l.checkpoints import ocdbt
from m2l.checkpoints.manifest import Manifest, sha256
from m2l.errors import CheckpointError

PARAMS = {
    "layers_0/w": np.random.default_rng(0).standard_normal((4, 5, 6), np.float32),
    "layers_1/w": np.arange(60, dtype=np.float32).reshape(20, 3).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
}
STATE = {"n": np.int32(4)}


@pytest.fixture
def old(tmp_path):
    """Written as format 1 was: Orbax's metadata of scalars, then uncompressed chunks over them."""
    path, items = tmp_path / "old", {"params": PARAMS, "opt_state": STATE}
    names = {item: dict.fromkeys(arrays, np.zeros((), np.int8)) for item, arrays in items.items()}
    ocp.save_checkpointables(path, {k: checkpoints.unflatten(v) for k, v in names.items()})
    for item, arrays in items.items():
        for name, array in arrays.items():
            metadata = {
                "shape": array.shape,
                "data_type": array.dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [min(2, n) for n in array.shape]},
                },
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            }
            base = {"driver": "file", "path": f"{path}/{item}/"}
            place = name.replace("/", ".") + "/"
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "ocdbt", "base": base, "path": place},
                "metadata": metadata,
            }
            store = ts.open(spec, create=True, delete_existing=True).result()
            store.write(array).result()
    records = {
        item: {
            name: {"shape": list(a.shape), "dtype": a.dtype.name, "digest": sha256(a)}
            for name, a in arrays.items()
        }
        for item, arrays in items.items()
    }
    Manifest(
        model={"family": "t5"},
        vocabulary={"name": "bytes", "size": 7, "fingerprint": "abc"},
        dtype="mixed",
        step=3,
        made_by={},
        parents=(),
        parameters=records["params"],
        opt_state=records["opt_state"],
        format_version=1,
    ).write(path)
    return path


def test_everything_comes_back_bit_for_bit(old):
    found = checkpoints.flatten(checkpoints.restore(old))
    assert found.keys() == PARAMS.keys()
    for name, array in PARAMS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    assert checkpoints.restore_opt_state(old, STATE) == STATE
    assert checkpoints.verify(old).format_version == 1


def test_any_slice_reads_its_elements(old):
    for name, parameter in checkpoints.open_parameters(old).items():
        flat = PARAMS[name].reshape(-1)
        for start in range(0, flat.size + 1, 7):
            for stop in range(start, flat.size + 1, 9):
                np.testing.assert_array_equal(parameter.read(start, stop), flat[start:stop])


def test_a_copy_of_it_is_of_the_new_format_and_has_its_digest(old, tmp_path):
    before = checkpoints.read_manifest(old)
    about = {name: getattr(before, name) for name in ("model", "vocabulary", "made_by")}
    checkpoints.save(tmp_path / "new", checkpoints.restore(old), **about)
    after = checkpoints.read_manifest(tmp_path / "new")
    assert (after.digest, after.format_version) == (before.digest, 2)
    assert not list((tmp_path / "new").rglob("*ocdbt*"))


@pytest.mark.parametrize("damage", ["truncated", "removed", "zeroed", "flipped"])
def test_every_damaged_file_is_refused_by_name_or_not_needed(old, damage):
    refused = 0
    for file in [file for file in (old / "params").rglob("*") if file.is_file()]:
        content = file.read_bytes()
        if damage == "removed":
            file.unlink()
        elif damage == "flipped":
            flipped = bytearray(content)
            flipped[len(content) // 2 :: 5] = bytes(len(flipped[len(content) // 2 :: 5]))
            file.write_bytes(flipped)
        else:
            half = content[: len(content) // 2]
            file.write_bytes(half if damage == "truncated" else bytes(len(content)))
        try:
            for name, array in checkpoints.flatten(checkpoints.restore(old)).items():
                np.testing.assert_array_equal(array, PARAMS[name])
        except CheckpointError as error:
            assert any(name in str(error) for name in PARAMS)
            assert "\n" not in str(error)
            refused += 1
        file.write_bytes(content)
    assert refused >= 2


def test_arrays_of_another_checkpoint_under_its_manifest_are_refused(old):
    manifest = Manifest.read(old)
    record = manifest.parameters["scalar"] | {"shape": [2]}
    changed = {**manifest.parameters, "scalar": record}
    dataclasses.replace(manifest, parameters=changed).write(old)
    with pytest.raises(CheckpointError, match=r"scalar is float32\[\], its manifest says"):
        checkpoints.restore(old)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=4), st.data())
def test_boxes_tile_a_range_without_gap_or_overlap(shape, data):
    size = int(np.prod(shape, dtype=int))
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    indices = np.arange(size).reshape(shape)
    found = {
        position: index
        for box, a, b in ocdbt.boxes(tuple(shape), start, stop)
        for position, index in zip(range(a, b), indices[box].reshape(-1).tolist(), strict=True)
    }
    assert sorted(found.items()) == [(i, i) for i in range(start, stop)]
