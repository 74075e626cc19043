"""Two processes of one run on the CPU, started as Slurm starts them, each feeding its share."""

import json
import re

import pytest

from m2l import checkpoints

# Forks both processes of four runs: one that is asked to stop, the same gone on with, one in one
# go, and one whose disk is full at its second save.
PROGRAM = """
import contextlib, dataclasses, json, os, shutil, signal, sys, time, traceback
from pathlib import Path

import jax
from m2l import distributed, models, partitioning, tasks
from m2l.data import vocabularies
from m2l.errors import M2LError, Stopped
from m2l.training import loop, processes
from m2l.training.settings import TrainSettings

root, ports = Path(sys.argv[1]), sys.argv[2:]
CONFIG = models.LlamaConfig(1152, 16, 32, 1, 2, 1, 8)
SETTINGS = TrainSettings(
    mixture="sentiment", steps=12, batch_size=8, learning_rate=0.05, save_every=100, log_every=1,
    fsdp=2, validation="sentiment", evaluate_every=4, validation_batches=1,
)


def fill_the_disk_after(save):
    usage = shutil.disk_usage
    full = lambda path: usage(path)._replace(free=0) if save.exists() else usage(path)
    shutil.disk_usage = full


def signalled_at(step, by_itself):
    # The process sends itself SIGTERM after a step, and leaves time for the other to hear of it.
    requests = processes.stop_requests

    @contextlib.contextmanager
    def watched():
        with requests() as asked:
            def stop(done):
                if done == step and by_itself:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3 * (done >= step))
                return asked(done)
            yield stop

    processes.stop_requests = watched


def work(out, number, port, stop):
    os.environ |= {
        "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    }
    joined, share = distributed.join(), processes.batch_share(partitioning.make_mesh(fsdp=2), 8)
    os.write(1, f"{joined} {share}\\n".encode())
    tasks.register()
    settings = SETTINGS
    if stop:
        signalled_at(3, by_itself=number == 1)
    if out.name == "full":
        settings = dataclasses.replace(SETTINGS, save_every=1)
        if number == 0:
            fill_the_disk_after(out / "checkpoints/1")
    try:
        loop.train(
            out, config=CONFIG, settings=settings, data={"source": "microworld"},
            vocabulary=vocabularies.describe(vocabularies.load("microworld"), "microworld"),
        )
    except Stopped as stopped:
        os.write(1, f"{stopped}\\n".encode())
    except M2LError as error:
        os.write(1, f"process {number} ends: {error}\\n".encode())
    jax.distributed.shutdown()


def run(out, port, stop=False):
    children = []
    for number in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(out, number, port, stop)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("codes", codes, flush=True)


run(root / "stopped", ports[0], stop=True)
run(root / "stopped", ports[1])
run(root / "whole", ports[2])
run(root / "full", ports[3])
"""


@pytest.fixture(scope="module")
def runs(forge, free_port, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    (said,) = forge((PROGRAM, root, *(free_port() for _ in range(4))), devices=2)
    assert said.count("codes [0, 0]") == 4
    return root, said


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


def test_what_was_cut_is_the_sum_over_the_processes(runs):
    root, _ = runs
    record = json.loads((root / "whole" / "finished.json").read_text())
    streams = checkpoints.restore_data_state(root / "whole" / "checkpoints" / record["checkpoint"])
    positions = [json.loads(stream.partition(b"\n")[2]) for stream in streams]
    counted = [(one["examples"], *one["cut"]) for one in positions]
    assert all(examples > 0 for examples, *_ in counted)
    sums = tuple(map(sum, zip(*counted, strict=True)))
    assert (record["examples"], record["inputs_cut"], record["targets_cut"]) == sums
    assert record == json.loads((root / "stopped" / "finished.json").read_text())


def test_a_save_that_fails_in_process_0_stops_both_with_its_reason(runs):
    root, said = runs
    reason = r"\S+/2: no space left: .+"
    alone = re.search(rf"process 0 ends: ({reason})", said)
    assert f"process 1 ends: process 0 has failed: {alone[1]}\n" in said
    assert [path.name for path in (root / "full" / "checkpoints").iterdir()] == ["1"]
