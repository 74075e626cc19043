"""Checkpoints of the format before Orbax's own metadata are read and verified as they were."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from m2l import checkpoints
from m2l.data import vocabularies
from m2l.errors import CheckpointError

from . import format_2

PARAMS = {
    "layers_0/w": np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32),
    "layers_1/w": np.arange(60, dtype=np.float32).reshape(5, 4, 3).astype(ml_dtypes.bfloat16),
    "scale": np.array(2.5, np.float32),
}
STATE = {"count": np.array(4, np.int32), "mu/w": np.arange(7, dtype=np.float32)}
MU = {"count": np.int32(0), "mu": {"w": np.zeros(7, np.float32)}}
TOKENIZER = {"tokenizer_config.json": b'{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}'}


@pytest.fixture
def old(tmp_path):
    vocabulary = {"name": "tokenizer", "size": 384, "fingerprint": "abc"}
    path = tmp_path / "run" / "checkpoints" / "step_00000003"
    format_2.write(path, PARAMS, STATE, b"here", TOKENIZER, vocabulary=vocabulary)
    return path


def read_all(path):
    checkpoints.verify(path)
    state = checkpoints.flatten(checkpoints.restore_opt_state(path, MU))
    restored = checkpoints.flatten(checkpoints.restore(path)) | {
        f"opt/{n}": a for n, a in state.items()
    }
    return restored, checkpoints.restore_data_state(path)


def test_everything_comes_back_bit_for_bit(old):
    assert checkpoints.resolve(old.parents[1]) == old
    restored, data_state = read_all(old)
    for name, array in (PARAMS | {f"opt/{name}": array for name, array in STATE.items()}).items():
        assert (restored[name].dtype, restored[name].shape) == (array.dtype, array.shape)
        assert restored[name].tobytes() == array.tobytes()
    assert data_state == [b"here"]
    manifest = checkpoints.read_manifest(old)
    assert (manifest.format_version, manifest.step) == (2, 3)
    assert vocabularies.load(manifest.vocabulary["name"]).encode("a") == [100]


def test_it_is_restored_onto_devices_and_verified(old):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored = checkpoints.flatten(checkpoints.restore(old, shardings=sharding))
    for name, array in PARAMS.items():
        assert restored[name].sharding == sharding
        assert np.asarray(restored[name]).tobytes() == array.tobytes()


def test_the_shares_of_a_position_come_back(tmp_path):
    shares = json.dumps({"shares": [b"one".hex(), b"two".hex()]}).encode()
    format_2.write(tmp_path / "x", PARAMS, data_state=shares)
    assert checkpoints.restore_data_state(tmp_path / "x") == [b"one", b"two"]


@pytest.mark.parametrize("damage", ["truncated", "removed", "zeroed", "longer"])
def test_every_damaged_file_is_refused_in_one_line_or_not_needed(old, damage):
    expected = read_all(old)
    needed = {file for file in old.rglob("*") if file.is_file()}
    needed -= {old / "orbax.checkpoint", old / "_CHECKPOINT_METADATA"}
    for file in sorted(needed | {old / "orbax.checkpoint", old / "_CHECKPOINT_METADATA"}):
        content = file.read_bytes()
        if damage == "removed":
            file.unlink()
        else:
            half, longer = content[: len(content) // 2], content + b"}"
            damaged = {"truncated": half, "longer": longer, "zeroed": bytes(len(content))}
            file.write_bytes(damaged[damage])
        try:
            restored, data_state = read_all(old)
            assert data_state == expected[1]
            for name, array in expected[0].items():
                np.testing.assert_array_equal(restored[name], array)
            assert file not in needed
        except CheckpointError as error:
            assert "\n" not in str(error)
            assert str(old) in str(error)
        file.write_bytes(content)


def test_a_flipped_bit_is_refused_by_the_arrays_name(old):
    chunk = old / "params" / "layers_0.w" / "c.1.0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for read in (
        checkpoints.restore,
        checkpoints.verify,
        lambda path: checkpoints.restore(path, shardings=sharding),
    ):
        with pytest.raises(CheckpointError, match="layers_0/w is damaged"):
            read(old)
