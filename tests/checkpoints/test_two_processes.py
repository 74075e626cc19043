"""Two processes restore one checkpoint onto a mesh over both and compute what one process does."""

import json

import jax
import numpy as np
import pytest

from m2l import checkpoints, models, partitioning
from m2l.data import layouts
from m2l.training import state
from m2l.training.optimizers import Optimizer

CONFIG = models.LlamaConfig(64, 32, 48, 1, 4, 2, 8)

PROGRAM = """
import json, sys
import jax, numpy as np

address, number, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=number)

from m2l import checkpoints, models, partitioning
from m2l.training import state
from m2l.training.optimizers import Optimizer

config = models.from_dict(checkpoints.read_manifest(path).model)
mesh = partitioning.make_mesh(fsdp=4, model=2)
placed = state.shardings(config, Optimizer(), mesh)
params = checkpoints.restore(path, shardings=placed.params)
leaf = params["decoder"]["layers_00"]["mlp"]["wo"]
vocabulary = {"name": None, "size": None, "fingerprint": ""}
about = {"model": models.to_dict(config), "vocabulary": vocabulary, "made_by": {}}
state_of_leaf = {"moment": leaf, "count": np.int32(3)}
saved = checkpoints.save(
    path + "_again", params, **about, opt_state=state_of_leaf, data_state=[b"one", b"two"]
)
again = checkpoints.restore(path + "_again", shardings=placed.params)
unequal = [
    shard.index
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True)
    for shard, other in zip(a.addressable_shards, b.addressable_shards, strict=True)
    if (np.asarray(shard.data) != np.asarray(other.data)).any()
]
restored = checkpoints.restore_opt_state(path + "_again", state_of_leaf)["moment"]
assert restored.sharding == leaf.sharding
verified = checkpoints.verify(path + "_again")
around = jax.jit(lambda p: state.from_params(Optimizer(), p), out_shardings=placed)
current = around(params)

rows = np.split(np.arange(8), 2)[number]
on_mesh = partitioning.batch_sharding(mesh)
batch = {
    name: jax.make_array_from_process_local_data(on_mesh, np.array(value, np.int32)[rows])
    for name, value in json.load(sys.stdin).items()
}
with jax.set_mesh(mesh):
    step = state.train_step(config, Optimizer(), models.Execution(), mesh)
    losses = []
    for _ in range(2):
        current, metrics = step(current, batch, np.float32(0.05), jax.random.key(0))
        losses.append(float(metrics["loss"]))
print(json.dumps({
    "devices": [jax.device_count(), jax.local_device_count()],
    "lies": leaf.sharding == placed.params["decoder"]["layers_00"]["mlp"]["wo"],
    "shards": [
        [[[s.start, s.stop] for s in shard.index], np.asarray(shard.data).tolist()]
        for shard in leaf.addressable_shards
    ],
    "losses": losses,
    "saved": saved.digest,
    "verified": verified.digest,
    "unequal": len(unequal),
}))
"""


def one_batch():
    rng = np.random.default_rng(0)
    examples = (
        tuple(rng.integers(2, 64, rng.integers(2, 7), dtype=np.int32) for _ in range(2))
        for _ in range(100)
    )
    lengths = {"inputs": 12, "targets": 10}
    return next(layouts.batches(examples, lengths, 8, True, layouts.PrefixLM(0)))[0]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, models.init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def two_processes(forge, free_port, tmp_path_factory, params):
    """What each of the processes printed, and the checkpoint that they have saved together."""
    folder = tmp_path_factory.mktemp("two_processes")
    about = {"vocabulary": {"name": None, "size": None, "fingerprint": ""}, "made_by": {}}
    checkpoints.save(folder / "x", params, model=models.to_dict(CONFIG), **about)
    batch = json.dumps({name: value.tolist() for name, value in one_batch().items()})
    address = f"127.0.0.1:{free_port()}"
    programs = [(PROGRAM, address, number, folder / "x") for number in range(2)]
    printed = forge(*programs, devices=4, stdin=batch)
    return [json.loads(text.splitlines()[-1]) for text in printed], folder / "x_again"


def test_both_processes_compute_the_losses_of_one_process_on_one_device(two_processes, params):
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    step = state.train_step(CONFIG, Optimizer(), models.Execution(), mesh)
    current, batch, expected = state.from_params(Optimizer(), params), one_batch(), []
    with jax.set_mesh(mesh):
        for _ in range(2):
            current, metrics = step(current, batch, np.float32(0.05), jax.random.key(0))
            expected.append(float(metrics["loss"]))
    for told in two_processes[0]:
        assert told["devices"] == [8, 4]
        # Sums over devices are taken in another order.
        assert told["losses"] == pytest.approx(expected, rel=1e-5)


def test_each_process_holds_its_own_shards_and_together_they_are_the_parameter(
    two_processes, params
):
    whole = params["decoder"]["layers_00"]["mlp"]["wo"]
    found, held = np.full_like(whole, np.nan), []
    for told in two_processes[0]:
        assert told["lies"] and len(told["shards"]) == 4
        for ranges, value in told["shards"]:
            index = tuple(slice(*each) for each in ranges)
            assert np.shape(value) == (48 // 2, 32 // 4)
            found[index] = value
        held.append({str(ranges) for ranges, _ in told["shards"]})
    assert not held[0] & held[1]
    np.testing.assert_array_equal(found, whole)


def test_processes_save_one_checkpoint_together_each_its_own_shards(two_processes, params):
    printed, saved = two_processes
    manifest = checkpoints.verify(saved)
    for process in printed:
        assert process["saved"] == process["verified"] == manifest.digest
        assert process["unequal"] == 0
    restored = checkpoints.restore(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        assert a.tobytes() == b.tobytes()
    like = {"moment": params["decoder"]["layers_00"]["mlp"]["wo"], "count": np.int32(0)}
    state = checkpoints.restore_opt_state(saved, like)
    assert state["moment"].tobytes() == like["moment"].tobytes()
    assert state["count"] == 3
    assert checkpoints.restore_data_state(saved) == [b"one", b"two"]
    assert sorted(entry.name for entry in saved.parent.iterdir()) == ["x", "x_again"]
