"""Two processes of one run on the CPU, started as Slurm starts them, each feeding its share."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from m2l import checkpoints

ROOT = Path(__file__).parents[2]

# Imports once, then forks both processes of three runs: one that is asked to stop, the same gone on
# with, and one in one go.
PROGRAM = """
import json, os, signal, sys, time, traceback
from pathlib import Path

import jax
from m2l import models, partitioning, tasks
from m2l.data import vocabularies
from m2l.errors import Stopped
from m2l.training import loop, processes
from m2l.training.settings import TrainSettings

root, ports = Path(sys.argv[1]), sys.argv[2:]
CONFIG = models.T5Config(1152, 16, 8, 32, 2, 1, 2)
SETTINGS = TrainSettings(
    mixture="sentiment", steps=12, batch_size=8, learning_rate=0.05, save_every=100, log_every=1,
    fsdp=2, validation="sentiment", evaluate_every=4, validation_batches=1,
)


def work(out, number, port):
    os.environ |= {
        "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    }
    joined, share = processes.join(), processes.share(partitioning.make_mesh(fsdp=2), 8)
    os.write(1, f"{joined} {share}\\n".encode())
    jax.config.update("jax_compilation_cache_dir", str(root / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    tasks.register()
    try:
        loop.train(
            out, config=CONFIG, settings=SETTINGS, data={"source": "microworld"},
            vocabulary=vocabularies.describe(vocabularies.load("microworld"), "microworld"),
        )
    except Stopped as stopped:
        os.write(1, f"{stopped}\\n".encode())
    jax.distributed.shutdown()


def run(out, port, stop=False):
    children = []
    for number in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(out, number, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    metrics = out / "metrics.jsonl"
    until = time.monotonic() + 100
    while stop and time.monotonic() < until:
        if metrics.exists() and metrics.read_text().count("\\n") >= 2:
            os.kill(children[1], signal.SIGTERM)
            break
        time.sleep(0.01)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("codes", codes, flush=True)


run(root / "stopped", ports[0], stop=True)
run(root / "stopped", ports[1])
run(root / "whole", ports[2])
"""


def free_ports(count):
    opened = [socket.socket() for _ in range(count)]
    for one in opened:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return ports


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, root, *map(str, free_ports(3))],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
            "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.count("codes [0, 0]") == 3, done.stdout + done.stderr
    return root, done.stdout


def figures(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]


def test_each_process_feeds_its_share(runs):
    _, said = runs
    for number in range(2):
        assert f"process {number} of 2, 2 of 4 devices ({number}, 2)" in said


def test_sigterm_to_one_saves_at_a_step_common_to_both(runs):
    _, said = runs
    steps = re.findall(r"stopped at step (\d+) of 12", said)
    assert len(steps) == 2
    assert steps[0] == steps[1]


def test_going_on_ends_in_the_bits_of_never_having_stopped(runs):
    root, _ = runs
    stopped, whole = root / "stopped", root / "whole"
    assert figures(stopped) == figures(whole)
    assert checkpoints.read_manifest(stopped).digest == checkpoints.read_manifest(whole).digest
    checkpoints.verify(stopped)
