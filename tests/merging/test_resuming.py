"""A merge that is killed anywhere goes on where it was; several processes write what one writes."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import CheckpointError, MergeError
from m2l.merging import Recipe, analysis, merge, prepare, results
from m2l.merging.workplace import Journal, Workplace

SHAPES = {"decoder/layers_00/wi": (40, 31), "decoder/layers_01/wi": (40, 31), "embedder": (64, 40)}
BLOCK = 100

# Kills itself in the middle of the n-th block that it writes, with every block before it committed.
KILLED = """
import os, signal, sys, time
from m2l.merging import Recipe, merge, results, workplace
workplace._SECONDS_BETWEEN_COMMITS = 0.0
write, left = results.Result.write, [int(sys.argv[1])]
def dying(self, span, block):
    time.sleep(0.02)
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, span, block)
results.Result.write = dying
root, method = sys.argv[2], sys.argv[3]
recipe = Recipe(method, **({"drop_rate": 0.5} if method == "dare_ties" else {}))
merge(f"{root}/base", [f"{root}/{i}" for i in range(3)], recipe, f"{root}/out_{sys.argv[4]}",
      block=100, progress=False)
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


@pytest.mark.parametrize(("method", "blocks"), [("ties", 0), ("ties", 23), ("dare_ties", 49)])
def test_a_killed_merge_goes_on_and_gives_the_same_bytes(root, method, blocks, monkeypatch):
    name = f"{method}_{blocks}"
    killed = run(["-c", KILLED, str(blocks), str(root), method, name])
    assert killed.wait() == -signal.SIGKILL
    out = root / f"out_{name}"
    assert not out.exists()
    (place,) = root.glob(f".out_{name}.merge-*")
    written, write = [], results.Result.write

    def counted(self, span, block):
        written.append(span)
        return write(self, span, block)

    monkeypatch.setattr(results.Result, "write", counted)
    recipe = recipe_of(method)
    found = merge(*inputs(root), recipe, out, block=BLOCK, progress=False)
    total = sum(-(-int(np.prod(shape)) // BLOCK) for shape in SHAPES.values())
    # What was under way in other threads, or not yet committed, is done again.
    assert total - blocks <= len(written) <= total - blocks + 16
    assert not place.exists()
    whole = merge(*inputs(root), recipe, root / f"whole_{name}", block=BLOCK, progress=False)
    assert found == whole
    assert checkpoints.verify(out) == found


def test_another_merge_does_not_go_on_with_what_it_finds(root):
    assert run(["-c", KILLED, "9", str(root), "ties", "other"]).wait() == -signal.SIGKILL
    (place,) = root.glob(".out_other.merge-*")
    found = merge(*inputs(root), Recipe("average"), root / "out_other", progress=False)
    assert not place.exists()
    assert found.parameters == merge(*inputs(root), Recipe("average"), root / "mean").parameters


def test_a_merge_under_way_is_not_joined_by_a_second(root):
    job = prepare(*inputs(root), Recipe("average"), root / "busy")
    with Workplace(job.out, job.key, (0, 1)) as work:
        with pytest.raises(MergeError, match="busy: another process is making it right now"):
            merge(*inputs(root), Recipe("average"), root / "busy")
        work.remove()


@pytest.mark.parametrize("damage", [b"[" * 100_000, b"{}", b'["a"]', b"[1.5]", b"null", b"\xff"])
def test_a_damaged_line_of_a_journal_ends_what_is_taken_from_it(tmp_path, damage):
    (tmp_path / "journal").write_bytes(b"[1, 2]\n" + damage + b"\n[4]\n")
    with Journal(tmp_path / "journal") as journal:
        assert journal.sums == [1, 2]


@pytest.mark.parametrize("damage", [b"", b"x", "flipped", "cut"])
def test_damaged_arrays_of_a_merge_under_way_are_refused_in_one_line(tmp_path, damage):
    with Workplace(tmp_path / "out", "key", (0, 1)) as work:
        made = {"a": np.arange(1000)}
        assert work.mine("tag", lambda: made)["a"] is made["a"]
        (file,) = work.path.glob("*.npz")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        changed = {"flipped": bytes(content), "cut": bytes(content[:500])}
        file.write_bytes(changed.get(damage, damage))
        with pytest.raises(CheckpointError, match=r"npz: damaged .*run the same merge again"):
            work.mine("tag", lambda: made)


def test_a_result_that_reads_back_differently_is_refused(root, monkeypatch):
    write = results.Result.write

    def wrong(self, span, block):
        checksum = write(self, span, block)
        if span.name == "embedder" and span.start == 2 * BLOCK:
            self.extents[span.name].write_from(block + 1, span.start)
        return checksum

    monkeypatch.setattr(results.Result, "write", wrong)
    with pytest.raises(
        CheckpointError, match="embedder was written but reads differently from 200"
    ):
        merge(*inputs(root), Recipe("average"), root / "wrong", block=BLOCK, progress=False)
    assert not list(root.glob("*wrong*"))


PART = """
import sys
from m2l.merging import Recipe, merge
root, method, out, index, count = sys.argv[1:]
recipe = Recipe(method, **({"drop_rate": 0.5} if method == "dare_ties" else {}))
merge(f"{root}/base", [f"{root}/{i}" for i in range(3)], recipe, out, block=100, progress=False,
      process=(int(index), int(count)))
"""


@pytest.mark.parametrize("method", ["ties", "dare_ties", "model_stock"])
def test_two_processes_write_what_one_writes(root, method):
    out = root / f"together_{method}"
    parts = [run(["-c", PART, str(root), method, str(out), str(i), "2"]) for i in range(2)]
    for part in parts:
        _, errors = part.communicate()
        assert part.returncode == 0, errors
    alone = merge(*inputs(root), recipe_of(method), root / f"alone_{method}", block=BLOCK)
    together = checkpoints.verify(out)
    assert together.parameters == alone.parameters
    assert together.made_by["recipe"] == alone.made_by["recipe"]


def test_a_process_that_stopped_is_not_waited_for(root, tmp_path):
    out = root / "halved"
    arguments = ["-c", PART, str(root), "ties", str(out), "1", "2"]
    second = run(arguments, M2L_CACHE=str(tmp_path))
    deadline = time.monotonic() + 120
    while not list(root.glob(".halved.merge-*/cached-1.npz")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (place,) = root.glob(".halved.merge-*")
    with open(place / "process-0.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(0.5)
    _, errors = second.communicate(timeout=60)
    assert "process 0 of 2 has stopped; run all of them again" in errors
    assert place.exists()


def test_thresholds_that_were_found_once_are_not_counted_again(root, monkeypatch, tmp_path):
    monkeypatch.setenv("M2L_CACHE", str(tmp_path))
    counted, count = [], analysis.Analysis._count
    monkeypatch.setattr(
        analysis.Analysis, "_count", lambda *arguments: counted.append(1) or count(*arguments)
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
