"""What is missing, unfinished, damaged or in the way is refused by name, and never half-written."""

import collections
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from m2l import checkpoints, storage
from m2l.checkpoints import Manifest, publishing
from m2l.errors import CheckpointError

ABOUT = {
    "model": {"family": "t5"},
    "vocabulary": {"name": "bytes", "size": 7, "fingerprint": "abc"},
    "made_by": {"kind": "test"},
}
PARAMS = {
    f"layers_{i}": {"w": np.random.default_rng(i).standard_normal((64, 32), np.float32)}
    for i in range(6)
}


@pytest.fixture
def saved(tmp_path):
    checkpoints.save(tmp_path / "x", PARAMS, **ABOUT, opt_state={"n": 1}, data_state=[b"here"])
    return tmp_path / "x"


def edit_manifest(saved, change):
    """Replaces the manifest by what a function makes of it."""
    file = saved / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    content["custom_metadata"]["m2l"] = change(content["custom_metadata"]["m2l"])
    file.write_text(json.dumps(content))


def with_checksum(content):
    content = {name: value for name, value in content.items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return content | {"checksum": checksum}


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)


def find(directory, content):
    """The file of `directory` that holds `content`, and where in it."""
    for file in directory.rglob("*"):
        if file.is_file() and (position := file.read_bytes().find(content)) >= 0:
            return file, position
    raise AssertionError("not stored as it is")


@pytest.mark.parametrize("read", [checkpoints.restore, checkpoints.verify])
def test_one_flipped_byte_is_refused_by_the_parameters_name(saved, read):
    file, position = find(saved / "params", PARAMS["layers_3"]["w"].tobytes())
    flip(file, position + 1000)
    with pytest.raises(CheckpointError, match="layers_3/w is damaged"):
        read(saved)
    restored = checkpoints.restore(saved, verify=False)
    assert (restored["layers_3"]["w"] != PARAMS["layers_3"]["w"]).sum() == 1


def read_all(path):
    checkpoints.verify(path)
    restored = checkpoints.flatten(checkpoints.restore(path))
    restored["n"] = checkpoints.restore_opt_state(path, {"n": np.int32(0)})["n"]
    restored["position"] = np.frombuffer(checkpoints.restore_data_state(path)[0], np.uint8)
    return restored, checkpoints.read_manifest(path)


@pytest.mark.parametrize("damage", ["truncated", "removed", "zeroed", "longer"])
def test_every_damaged_file_is_refused_in_one_line_or_changes_nothing(tmp_path, damage):
    vocabulary = ABOUT["vocabulary"] | {"name": str(tmp_path)}
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    saved, few = tmp_path / "x", {name: PARAMS[name] for name in ("layers_0", "layers_1")}
    about = ABOUT | {"vocabulary": vocabulary, "opt_state": {"n": 1}, "data_state": [b"here"]}
    checkpoints.save(saved, few, **about)
    expected, manifest = read_all(saved)
    unneeded = set()
    for file in sorted(file for file in saved.rglob("*") if file.is_file()):
        content = file.read_bytes()
        if damage == "removed":
            file.unlink()
        else:
            half, longer = content[: len(content) // 2], content + b"}"
            damaged = {"truncated": half, "longer": longer, "zeroed": bytes(len(content))}
            file.write_bytes(damaged[damage])
        try:
            restored, again = read_all(saved)
            assert again == manifest
            for name, array in expected.items():
                np.testing.assert_array_equal(restored[name], array)
            unneeded.add(file.name)
        except CheckpointError as error:
            assert str(saved) in str(error)
            item = file.relative_to(saved).parts[0]
            array = file.parent.name.replace(".", "/") if file.parent.parent != saved else item
            if file.name != "_METADATA" and file.parent != saved and item != "tokenizer":
                named = (array, file.parent.name, "data_state: damaged")
                assert any(name in str(error) for name in named)
            assert "\n" not in str(error)
        file.write_bytes(content)
    assert unneeded <= {"commit_success.txt", "orbax.checkpoint"}


def test_damage_to_the_states_is_refused(saved):
    flip(saved / "data_state" / "00000" / "c.0", 1)
    for read in (checkpoints.restore_data_state, checkpoints.verify):
        with pytest.raises(CheckpointError, match="data_state: damaged"):
            read(saved)
    shutil.rmtree(saved / "data_state")
    with pytest.raises(CheckpointError, match="data_state/_METADATA: cannot be read"):
        checkpoints.restore_data_state(saved)
    shutil.rmtree(saved / "opt_state")
    with pytest.raises(CheckpointError, match="opt_state/_METADATA: cannot be read"):
        checkpoints.restore_opt_state(saved, {"n": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"format_version": 4}, "format 4 by a newer m2l"),
        (lambda content: content | {"surprise": 1}, "does not match its own checksum"),
        (lambda content: {"format_version": 1}, "does not match its own checksum"),
        (lambda content: {}, "no format_version"),
        (lambda content: [], "no format_version"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(saved, change, message):
    edit_manifest(saved, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read_manifest(saved)


FIELDS = [f.name for f in dataclasses.fields(Manifest) if f.name != "directory"]


@pytest.mark.parametrize("field", ["checksum", "digest", *FIELDS])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damage_to_any_field_of_a_manifest_is_refused(saved, field, damage):
    def change(content):
        rest = {name: value for name, value in content.items() if name != field}
        return rest if damage == "missing" else content | {field: "?"}

    edit_manifest(saved, change)
    with pytest.raises(CheckpointError, match="_CHECKPOINT_METADATA: damaged"):
        checkpoints.read_manifest(saved)


RECORD = {"shape": [64, 32], "dtype": "float32", "digest": "0" * 64}
VOCABULARY = ABOUT["vocabulary"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ["t5"]),
        ("vocabulary", "bytes"),
        ("vocabulary", {"name": "bytes"}),
        ("vocabulary", VOCABULARY | {"name": ["bytes"]}),
        ("vocabulary", VOCABULARY | {"size": "7"}),
        ("vocabulary", VOCABULARY | {"fingerprint": {}}),
        ("dtype", 3),
        ("step", "3"),
        ("step", -1),
        ("step", 2**60),
        ("made_by", None),
        ("parents", {}),
        ("parents", ["a"]),
        ("parents", [{"role": "base", "path": 1, "digest": "a"}]),
        ("parents", [{"role": "base"}]),
        ("parameters", [RECORD]),
        ("parameters", {"a": 1}),
        ("parameters", {"a": RECORD | {"shape": [2**60]}}),
        ("parameters", {"a": RECORD | {"shape": [2**40, 2**40]}}),
        ("parameters", {"a": RECORD | {"shape": [0, 2**62]}}),
        ("parameters", {"a": RECORD | {"shape": [-1]}}),
        ("parameters", {"a": RECORD | {"shape": [2.0]}}),
        ("parameters", {"a": RECORD | {"shape": "64"}}),
        ("parameters", {"a": RECORD | {"shape": [1] * 100}}),
        ("parameters", {"a": RECORD | {"dtype": "object"}}),
        ("parameters", {"a": RECORD | {"dtype": ["float32"]}}),
        ("parameters", {"a": RECORD | {"digest": "0" * 63}}),
        ("parameters", {"a": {"shape": [1], "dtype": "float32"}}),
        ("parameters", {"..": RECORD}),
        ("parameters", {"": RECORD}),
        ("parameters", {"a\nb": RECORD}),
        ("opt_state", []),
        ("opt_state", {"n": None}),
        ("data_state", 3),
        ("data_state", "../data"),
        ("tokenizer", ["spiece.model"]),
        ("tokenizer", {"../spiece.model": "0" * 64}),
        ("tokenizer", {"/etc/passwd": "0" * 64}),
        ("tokenizer", {"..": "0" * 64}),
        ("tokenizer", {"spiece.model": 1}),
        ("directory", []),
        ("versions", {"m2l": 1}),
        ("surprise", 1),
    ],
)
def test_a_manifest_of_wrong_types_or_sizes_is_refused_though_its_checksum_is_right(
    saved, field, value
):
    edit_manifest(saved, lambda content: with_checksum(content | {field: value}))
    for read in (checkpoints.restore, checkpoints.verify, checkpoints.open_parameters):
        with pytest.raises(CheckpointError, match=r"_CHECKPOINT_METADATA: .*damaged: ") as caught:
            read(saved)
        assert "\n" not in str(caught.value)


def test_a_shape_that_no_file_bears_out_is_refused_before_anything_is_allocated(saved):
    shape, zarr = [2**50, 4], saved / "params" / "layers_0.w" / "zarr.json"

    def change(content):
        content["parameters"]["layers_0/w"]["shape"] = shape
        return with_checksum(content)

    edit_manifest(saved, change)
    described = json.loads(zarr.read_text())
    described["shape"] = shape
    for chunk in (shape, [64, 4], [1, 1], [0, 4], [-64, 4], [64.0, 4]):
        described["chunk_grid"]["configuration"]["chunk_shape"] = chunk
        zarr.write_text(json.dumps(described))
        for read in (checkpoints.restore, checkpoints.verify):
            with pytest.raises(CheckpointError, match=r"layers_0"):
                read(saved)


@pytest.mark.parametrize("read", [checkpoints.restore, checkpoints.verify])
@pytest.mark.parametrize("damage", [b"[]", b"{}", b"[" * 100_000, b"", None, "array", "skipped"])
@pytest.mark.parametrize("name", ["params/_METADATA", "_CHECKPOINT_METADATA"])
def test_damage_to_the_files_that_orbax_reads_is_refused(saved, read, name, damage):
    file = saved / name
    if damage is None:
        file.unlink()
    elif isinstance(damage, bytes):
        file.write_bytes(damage)
    else:
        old, new = {"skipped": ("false", "true"), "array": ("layers_3", "layers_9")}[damage]
        content = file.read_text()
        if old not in content:
            pytest.skip("the file has none")
        file.write_text(content.replace(old, new))
    with pytest.raises(CheckpointError) as caught:
        read(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_of_another_checkpoint_under_a_manifest_are_refused(saved, tmp_path):
    checkpoints.save(tmp_path / "y", {"layers_0": {"w": np.ones((2, 2), np.float32)}}, **ABOUT)
    shutil.copy(tmp_path / "y" / "_CHECKPOINT_METADATA", saved)
    with pytest.raises(CheckpointError, match=r"layers_0/w is .*, its manifest says"):
        checkpoints.restore(saved)


def test_resolve_finds_the_newest_whole_checkpoint_of_a_run(tmp_path):
    for step in (20, 100):
        path = tmp_path / f"run/checkpoints/{step}"
        checkpoints.save(path, PARAMS, **ABOUT, step=step)
    (tmp_path / "run/checkpoints/300").mkdir()
    shutil.copytree(path, tmp_path / "run/checkpoints/best")
    shutil.copytree(path, tmp_path / "run/checkpoints/200.orbax-checkpoint-tmp-1")
    assert checkpoints.resolve(tmp_path / "run").name == "100"
    assert checkpoints.read_manifest(tmp_path / "run").step == 100
    assert checkpoints.resolve(path) == path


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    for name, message in (("no", "no such"), ("empty", "empty"), ("other", "no finished")):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.resolve(tmp_path / name)


def test_an_existing_destination_is_refused_and_untouched(saved):
    before = checkpoints.read_manifest(saved)
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoints.save(saved, {"other": np.ones(3)}, **ABOUT)
    assert checkpoints.verify(saved) == before


def test_a_destination_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be created"):
        checkpoints.save(tmp_path / "file" / "x", PARAMS, **ABOUT)


def test_an_exception_leaves_nothing(tmp_path):
    described = {"w": ((4,), np.float32)}

    def interrupted():
        with checkpoints.writing(tmp_path / "x", described) as writer:
            writer.append("w", np.ones(2, np.float32))
            raise KeyboardInterrupt

    def forgotten():
        with checkpoints.writing(tmp_path / "x", described):
            pass

    for failing, kind in ((interrupted, KeyboardInterrupt), (forgotten, RuntimeError)):
        with pytest.raises(kind):
            failing()
        assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(publishing.shutil, "disk_usage", lambda path: usage(9, 9, 40_000))
    with pytest.raises(CheckpointError, match=r"no space left: 1,\d+,\d+ bytes are needed, 40,000"):
        checkpoints.save(tmp_path / "x", PARAMS, **ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_meanwhile_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space left"):
        checkpoints.save(tmp_path / "x", PARAMS, **ABOUT)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
import numpy as np
from m2l import checkpoints
with checkpoints.writing(sys.argv[1], {"w": ((1 << 20,), np.float32)}) as writer:
    while True:
        print("writing", flush=True)
        time.sleep(0.01)
"""


def test_a_killed_save_leaves_no_checkpoint_and_the_next_one_works(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x")]
    environment = os.environ | {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"writing\n"
        assert checkpoints.clean(tmp_path) == []
        process.send_signal(signal.SIGKILL)
    leftover = [entry.name for entry in tmp_path.iterdir()]
    assert len(leftover) == 1
    assert leftover[0].startswith(".x.tmp-")
    with pytest.raises(CheckpointError):
        checkpoints.resolve(tmp_path / "x")
    checkpoints.save(tmp_path / "x", PARAMS, **ABOUT)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    checkpoints.verify(tmp_path / "x")


def test_clean_removes_only_what_dead_saves_of_this_host_left(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = publishing.socket.gethostname()
    gone = tmp_path / f".x.tmp-{host}-{dead.pid}-0"
    kept = [f".x.tmp-elsewhere-{dead.pid}-0", f".x.tmp-{host}-1-0", "x", ".x.tmp"]
    for name in (gone.name, *kept):
        (tmp_path / name).mkdir()
    assert checkpoints.clean(tmp_path) == [gone]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)
