"""The road of a pod: several processes train on a bucket, are killed, go on, and merge there."""

import json
import os
import uuid

import numpy as np
import pytest

from m2l import checkpoints, storage
from m2l.checkpoints import opening, reading

START = """
import json, os, signal, sys, time
arguments = json.loads(sys.argv[1])
os.environ |= arguments["environment"]
import jax
from m2l import distributed
if arguments["processes"] > 1:
    joined = (arguments["number"], arguments["processes"])
    distributed.join(f"127.0.0.1:{arguments['port']}", joined, survive=arguments["merges"])
"""

TRAIN = (
    START
    + """
from m2l import locks, models, storage, tasks
from m2l.data import vocabularies
from m2l.training import loop, optimizers
from m2l.training.settings import TrainSettings

# The lock of a killed run is taken over sooner.
locks.RENEWED, locks.EXPIRES = 0.5, 3.0
out = storage.path(arguments["out"])
schedule = optimizers.schedule

def dying(*args, **kwargs):
    rate = schedule(*args, **kwargs)

    def at_step(step):
        if step == 3:
            until = time.monotonic() + 100
            while not (out / "checkpoints/2/commit_success.txt").is_file():
                assert time.monotonic() < until
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return rate(step)

    return at_step

if arguments["dies"]:
    optimizers.schedule = dying
tasks.register()
loop.train(
    out,
    config=models.LlamaConfig(1152, 16, 32, 1, 2, 1, 8),
    vocabulary=vocabularies.describe(vocabularies.load("microworld"), "microworld"),
    data={"source": "microworld"},
    settings=TrainSettings(
        mixture="sentiment", steps=4, batch_size=8, learning_rate=0.01, save_every=2, keep=9,
        log_every=1, fsdp=8,
    ),
)
"""
)

MERGE = (
    START
    + """
from m2l.merging import Recipe, merge
base, *experts = arguments["inputs"]
merge(base, experts, Recipe("dare_ties", drop_rate=0.5), arguments["out"], progress=False)
if arguments["processes"] > 1:
    distributed.leave()
"""
)


@pytest.fixture(scope="module")
def bucket(emulated_storage):
    return storage.path(f"gs://bucket/{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def environment(emulated_storage):
    names = ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST", "GCE_METADATA_ROOT")
    named = {name: os.environ[name] for name in (*names, "M2L_CACHE")}
    return named | {"EPATH_USE_TF": "false", "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def run(forge, free_port, environment):
    """Runs a program in so many processes of the eight devices; returns what they said."""

    def run(program, processes, **arguments):
        common = {"environment": environment, "processes": processes, "port": free_port()}
        common["merges"] = program == MERGE
        texts = [json.dumps(common | arguments | {"number": number}) for number in range(processes)]
        programs = [(program, text) for text in texts]
        killed = arguments.get("dies", False)
        return forge(*programs, devices=8 // processes, killed=killed)

    return run


@pytest.fixture(scope="module")
def trained(run, bucket):
    """A run of two processes, and the same run, killed, with which one process went on."""
    places = {name: str(bucket / name) for name in ("whole", "killed")}
    run(TRAIN, 2, out=places["whole"], dies=False)
    run(TRAIN, 2, out=places["killed"], dies=True)
    assert sorted(reading.steps(bucket / "killed/checkpoints")) == [2]
    run(TRAIN, 1, out=places["killed"], dies=False)
    return places


def test_another_number_of_processes_goes_on_to_the_same_parameters(trained):
    whole, killed = (
        checkpoints.flatten(checkpoints.restore(trained[name])) for name in ("whole", "killed")
    )
    assert checkpoints.read_manifest(trained["killed"]).step == 4
    for name, array in whole.items():
        np.testing.assert_allclose(killed[name], array, rtol=2e-4, atol=2e-6, err_msg=name)
    positions = [checkpoints.restore_data_state(trained[name]) for name in ("whole", "killed")]
    examples = [
        sum(json.loads(stream.partition(b"\n")[2])["examples"] for stream in streams)
        for streams in positions
    ]
    assert [len(streams) for streams in positions] == [2, 2]
    assert examples[0] == examples[1]
    assert min(examples) > 0


def test_two_processes_merge_in_the_bucket_to_the_bits_of_one(trained, run, bucket, run_m2l):
    inputs = [str(bucket / "whole/checkpoints/2"), trained["whole"], trained["killed"]]
    for processes in (1, 2):
        run(MERGE, processes, inputs=inputs, out=str(bucket / f"merged_{processes}"))
    manifests = [checkpoints.verify(bucket / f"merged_{processes}") for processes in (1, 2)]
    assert manifests[0].parameters == manifests[1].parameters
    assert manifests[0].digest == manifests[1].digest
    files = {
        str(file.relative_to(bucket / "merged_1")): file.read_bytes()
        for file in storage.list_files(bucket / "merged_1")
    }
    for file in storage.list_files(bucket / "merged_2"):
        name = str(file.relative_to(bucket / "merged_2"))
        if name != "_CHECKPOINT_METADATA":  # which has the versions and the time of nothing else
            assert file.read_bytes() == files.pop(name)
    assert set(files) == {"_CHECKPOINT_METADATA"}
    opened = opening.open(bucket / "merged_1")
    assert opened.format == "orbax"
    out = bucket / "results"
    arguments = ["eval", "--checkpoint", str(bucket / "merged_2"), "--mixture", "sentiment"]
    arguments += ["--out", str(out), "--max_examples", "4", "--input_length", "64"]
    assert run_m2l(*arguments) == 0
    results = [json.loads(file.read_text()) for file in out.glob("*.json")]
    assert results and all(r["model_digest"] == manifests[1].digest for r in results)
