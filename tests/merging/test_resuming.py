"""A merge that is killed anywhere goes on where it was; several processes write what one writes."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from m2l import checkpoints
from m2l.checkpoints import safetensors, zarr
from m2l.errors import CheckpointError, MergeError
from m2l.merging import Recipe, engine, merge, outputs, passes, prepare
from m2l.merging.outputs import staging

from .conftest import free_port

SHAPES = {"decoder/layers_00/wi": (40, 31), "decoder/layers_01/wi": (40, 31), "embedder": (64, 40)}
BLOCK = 100

# Kills itself when so many chunks are written.
KILLED = """
import os, signal, sys
from m2l import distributed, storage
from m2l.checkpoints import zarr
from m2l.merging import Recipe, merge
chunks, root, method, name, index, count, address = sys.argv[1:]
zarr.CHUNK_BYTES = 400
if int(count) > 1:
    distributed.join(address, (int(index), int(count)), survive=True)
write, left = storage.write_atomic, [int(chunks)]
def dying(file, data):
    left[0] -= file.name.startswith("c.")
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, data)
if left[0] >= 0:
    storage.write_atomic = dying
recipe = Recipe(method, **({"drop_rate": 0.5} if method == "dare_ties" else {}))
try:
    merge(f"{root}/base", [f"{root}/{i}" for i in range(3)], recipe, f"{root}/out_{name}",
          block=100, progress=False)
except Exception as error:
    sys.stderr.write(f"{error}\\n")
    sys.exit(2)
finally:
    distributed.leave()
"""


def recipe_of(method):
    return Recipe(method, **({"drop_rate": 0.5} if method == "dare_ties" else {}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    about = {
        "model": {"family": "t5"},
        "vocabulary": {"name": "bytes", "size": 3, "fingerprint": "a"},
        "made_by": {"kind": "test"},
    }
    for name in ("base", "0", "1", "2"):
        params = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        checkpoints.save(root / name, checkpoints.unflatten(params), **about)
    return root


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A base and two experts as Hugging Face directories, of a model that m2l does not know."""
    root, rng = tmp_path_factory.mktemp("directories"), np.random.default_rng(1)
    described = {f"{name}.weight": ((30, 40), np.dtype(np.float32)) for name in "abcd"}
    for name in ("base", "one", "two"):
        (root / name).mkdir()
        (root / name / "config.json").write_text('{"model_type": "clip"}')
        extents = safetensors.create(root / name, described, [[*described]])
        for tensor in described:
            extents[tensor].write_from(rng.standard_normal(1200).astype(np.float32))
    return root / "base", [root / "one", root / "two"]


def inputs(root):
    return root / "base", [root / str(index) for index in range(3)]


def run(arguments, **environment):
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(root, chunks, method, name, index=0, count=1, address=""):
    arguments = map(str, (chunks, root, method, name, index, count, address))
    return run(["-c", KILLED, *arguments])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 400)


def chunks_of(folder):
    return {file.name for file in folder.rglob("c.*")}


@pytest.mark.parametrize(("method", "chunks"), [("ties", 0), ("ties", 23), ("dare_ties", 40)])
def test_a_killed_merge_goes_on_and_gives_the_same_bytes(
    root, method, chunks, monkeypatch, small_chunks
):
    name = f"{method}_{chunks}"
    assert killed(root, chunks, method, name).wait() == -signal.SIGKILL
    out = root / f"out_{name}"
    assert not out.exists()
    (place,) = root.glob(f".out_{name}.merge-*")
    there = {file for file in place.rglob("c.*") if file.suffix != ".tmp"}
    # Others of a few threads were being written.
    assert chunks - 8 <= len(there) <= chunks
    (next(place.rglob("zarr.json")).parent / ".c.0.0.123-456.tmp").write_bytes(b"half a chunk")
    written, write = [], zarr.TensorWriter.write

    def counted(self, box, block):
        written.append(self._file(box))
        return write(self, box, block)

    monkeypatch.setattr(zarr.TensorWriter, "write", counted)
    recipe = recipe_of(method)
    found = merge(*inputs(root), recipe, out, block=BLOCK, progress=False)
    assert there.isdisjoint(written)
    assert not place.exists()
    whole = merge(*inputs(root), recipe, root / f"whole_{name}", block=BLOCK, progress=False)
    assert found == whole
    assert checkpoints.verify(out) == found
    files, others = (
        {file.relative_to(path) for file in path.rglob("*")}
        for path in (out, root / f"whole_{name}")
    )
    assert files == others


@pytest.mark.parametrize(("method", "count"), [("ties", 2), ("weighted_sum", 1)])
def test_a_finished_file_of_a_hugging_face_directory_is_not_made_again(
    directories, tmp_path, monkeypatch, method, count
):
    monkeypatch.setattr(engine, "SHARD_SIZE", 5000)
    base, experts = directories
    recipe, experts = Recipe(method), experts[:count]
    whole = merge(base, experts, recipe, tmp_path / "whole", progress=False)
    finish, left = outputs.ShardedResult.finish, [1]

    def stopping(self, unit):
        finish(self, unit)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs.ShardedResult, "finish", stopping)
        with pytest.raises(KeyboardInterrupt):
            merge(base, experts, recipe, tmp_path / "out", progress=False)
    (place,) = tmp_path.glob(".out.merge-*/out")
    assert len([*place.glob("*.safetensors")]) == 2
    made, tasks = [], outputs.ShardedResult.tasks

    def noted(self, units, *sizes):
        made.extend(unit.key[0] for unit in units)
        return tasks(self, units, *sizes)

    monkeypatch.setattr(outputs.ShardedResult, "tasks", noted)
    found = merge(base, experts, recipe, tmp_path / "out", progress=False)
    assert made == [f"model-{number:05}-of-00004.safetensors" for number in (3, 4)]
    assert found.parameters == whole.parameters
    for file in (tmp_path / "whole").glob("*.safetensors*"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_another_merge_does_not_go_on_with_what_it_finds(root):
    assert killed(root, 9, "ties", "other").wait() == -signal.SIGKILL
    (place,) = root.glob(".out_other.merge-*")
    found = merge(*inputs(root), Recipe("average"), root / "out_other", progress=False)
    assert not place.exists()
    assert found.parameters == merge(*inputs(root), Recipe("average"), root / "mean").parameters


def test_a_merge_in_progress_is_not_joined_by_a_second(root):
    job = prepare(*inputs(root), Recipe("average"), root / "busy")
    with (
        staging(job.out, job.key, first=True),
        pytest.raises(MergeError, match="busy: another process is making it right now"),
    ):
        merge(*inputs(root), Recipe("average"), root / "busy")


def test_an_input_that_was_merged_is_checked_while_it_is_merged(root, tmp_path, small_chunks):
    base, experts = inputs(root)
    merge(base, experts, Recipe("average"), tmp_path / "first", progress=False)
    recipe = Recipe("ties", density=0.5)
    merge(base, [tmp_path / "first", experts[0]], recipe, tmp_path / "sound", progress=False)
    file = sorted((tmp_path / "first").rglob("c.*"))[7]
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"first: \S+ is damaged"):
        merge(base, [tmp_path / "first", experts[0]], recipe, tmp_path / "out", progress=False)
    assert not [*tmp_path.glob("*out*")]
    merge(base, [tmp_path / "first", experts[0]], recipe, tmp_path / "out", verify=False)


def test_processes_of_which_one_is_killed_go_on_in_one_or_two(root, small_chunks):
    address = f"127.0.0.1:{free_port()}"
    parts = [killed(root, (-1, 5)[i], "ties", "halved", i, 2, address) for i in range(2)]
    said = [part.communicate(timeout=120)[1] for part in parts]
    assert parts[1].returncode == -signal.SIGKILL
    assert parts[0].returncode == 2, said
    assert "process 1 of 2 has stopped; the same command goes on" in said[0]
    (place,) = root.glob(".out_halved.merge-*")
    assert len(chunks_of(place)) >= 5
    shutil.copytree(root, root.with_name("copy"))
    address = f"127.0.0.1:{free_port()}"
    parts = [killed(root, -1, "ties", "halved", i, 2, address) for i in range(2)]
    for part in parts:
        _, errors = part.communicate(timeout=120)
        assert part.returncode == 0, errors
    alone = merge(*inputs(root), Recipe("ties"), root / "alone", block=BLOCK, progress=False)
    copied = root.with_name("copy") / "out_halved"
    # Of the same inputs by their digests, whatever their path.
    one = merge(*inputs(root), Recipe("ties"), copied, block=BLOCK, progress=False)
    two = checkpoints.verify(root / "out_halved")
    assert two.parameters == one.parameters == alone.parameters
    assert two.made_by["recipe"] == alone.made_by["recipe"]


def test_a_process_that_fails_is_named_with_its_reason(root, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    code = KILLED.replace('recipe, f"{root}/out_', 'recipe, f"{root}/{index}_')
    parts = [
        run(["-c", code, "-1", str(root), "ties", "other", str(i), "2", address]) for i in range(2)
    ]
    said = [part.communicate(timeout=120)[1] for part in parts]
    assert [part.returncode for part in parts] == [2, 2], said
    assert all("process 1 merges something else than process 0" in text for text in said)


def test_thresholds_that_were_found_once_are_not_counted_again(root, monkeypatch, tmp_path):
    monkeypatch.setenv("M2L_CACHE", str(tmp_path))
    counted, count = [], passes.Analysis._count
    monkeypatch.setattr(
        passes.Analysis, "_count", lambda *arguments: counted.append(1) or count(*arguments)
    )
    first = merge(*inputs(root), Recipe("ties", density=0.3), root / "first", progress=False)
    assert counted
    counted.clear()
    recipe = Recipe("ties", density=0.3, scale=2.0)
    again = merge(*inputs(root), recipe, root / "again", progress=False)
    assert not counted
    density = [m.made_by["diagnostics"]["density"] for m in (first, again)]
    assert density[0] == density[1]
    # Other experts, another base or density are other thresholds.
    base, experts = inputs(root)
    merge(base, experts, Recipe("ties", density=0.4), root / "denser", progress=False)
    merge(experts[0], experts[1:], Recipe("ties", density=0.3), root / "other", progress=False)
    assert len(counted) >= 2


def test_files_that_another_process_renames_meanwhile_do_not_stop_the_count(tmp_path, monkeypatch):
    (tmp_path / "chunk").write_bytes(bytes(10_000))
    blocks = (tmp_path / "chunk").stat().st_blocks * 512
    names = ["chunk", ".chunk.1.tmp"]
    monkeypatch.setattr(os, "walk", lambda folder: [(folder, [], names)])
    assert outputs.used_bytes(tmp_path) == blocks > 0
