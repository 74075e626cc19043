"""Training on one mesh of simulated devices, going on on another: what one device computes."""

import json

import pytest

PROGRAM = """
import json, sys
import jax, numpy as np
from m2l import checkpoints, models, partitioning
from m2l.data import layouts
from m2l.training import state
from m2l.training.optimizers import Optimizer

CONFIGS = {
    "t5": models.T5Config(64, 32, 8, 48, 4, 1, 1),
    "llama": models.LlamaConfig(64, 32, 48, 1, 4, 2, 8, qkv_bias=True, windows=(5,)),
    "mixture": models.LlamaConfig(
        *(64, 32, 48, 1, 4, 2, 8),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        router_aux_loss_coef=0.1,
    ),
}
ABOUT = {"vocabulary": {"name": None, "size": None, "fingerprint": ""}, "made_by": {}}


def batches(config, count):
    layout = layouts.PrefixLM(0) if config.decoder_only else layouts.EncoderDecoder()
    rng = np.random.default_rng(0)
    examples = (
        tuple(rng.integers(2, 64, rng.integers(2, 7), dtype=np.int32) for _ in range(2))
        for _ in range(1000)
    )
    lengths = {"inputs": 12, "targets": 10}
    filled = layouts.batches(examples, lengths, 8, True, layout)
    return [next(filled)[0] for _ in range(count)]


class Run:
    def __init__(self, config, mesh, params):
        self.mesh = mesh
        self.placed = state.shardings(config, Optimizer(), mesh)
        self.state = jax.device_put(state.from_params(Optimizer(), params), self.placed)
        self.step_fn = state.train_step(config, Optimizer(), models.Execution(), mesh)

    def step(self, batch):
        on_mesh = partitioning.batch_sharding(self.mesh)
        batch = {
            name: jax.make_array_from_process_local_data(on_mesh, value)
            for name, value in batch.items()
        }
        with jax.set_mesh(self.mesh):
            rate, key = np.float32(0.05), jax.random.key(1)
            self.state, metrics = self.step_fn(self.state, batch, rate, key)
        return [float(metrics[name]) for name in ("loss", "gradient_norm")]


def go(name, folder):
    config = CONFIGS[name]
    fed = batches(config, 3)
    one = partitioning.make_mesh(devices=jax.devices()[:1])
    first = partitioning.make_mesh(data=2, fsdp=2, model=2)
    second = partitioning.make_mesh(data=4, fsdp=2, model=1)
    params = jax.tree.map(np.asarray, models.init(config, jax.random.key(0)))

    alone, trained = Run(config, one, params), Run(config, first, params)
    losses = [[run.step(batch) for batch in fed[:2]] for run in (alone, trained)]
    held = jax.tree.map(np.asarray, trained.state.params)
    path = folder + "/" + name
    checkpoints.save(path, trained.state.params, model=models.to_dict(config), **ABOUT)

    asked = state.shardings(config, Optimizer(), second).params
    restored = checkpoints.restore(path, shardings=asked)
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes(), restored, held
    )
    lies = jax.tree.map(
        lambda leaf, sharding: leaf.sharding == sharding
        and len(leaf.addressable_shards) == 8
        and all(s.data.shape == sharding.shard_shape(leaf.shape) for s in leaf.addressable_shards),
        restored,
        asked,
    )
    kernel = "expert_wo" if name == "mixture" else "wo"
    wo = [
        tree["decoder"]["layers_00"]["mlp"][kernel].addressable_shards[0].data.shape
        for tree in (trained.state.params, restored)
    ]
    alone.state = Run(config, one, held).state
    further = Run(config, second, restored)
    changed = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), held, params)))
    return {
        "losses": losses,
        "further": [run.step(fed[2]) for run in (alone, trained, further)],
        "same": all(jax.tree.leaves(same)),
        "lies": all(jax.tree.leaves(lies)),
        "wo": wo,
        "changed": float(changed),
    }


print(json.dumps({name: go(name, sys.argv[1]) for name in CONFIGS}))
"""


@pytest.fixture(scope="module")
def on_eight_devices(forge, tmp_path_factory):
    (said,) = forge((PROGRAM, tmp_path_factory.mktemp("sharding")), devices=8)
    return json.loads(said)


@pytest.fixture(params=["t5", "llama", "mixture"])
def run(request, on_eight_devices):
    return on_eight_devices[request.param]


def test_training_on_a_2x2x2_mesh_has_the_losses_of_one_device(run):
    alone, trained = run["losses"]
    for (loss, norm), (expected, of_expected) in zip(trained, alone, strict=True):
        # Sums over devices are taken in another order.
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(of_expected, rel=1e-4)
    assert run["changed"] > 1e-3


def test_a_checkpoint_is_restored_onto_another_mesh_bit_for_bit(run):
    assert run["same"]


def test_restored_parameters_lie_as_asked(run):
    assert run["lies"]
    # Of a mixture some of the experts, not a part of each.
    mixture = [[4 // 2, 24, 32 // 2], [4, 24, 32 // 2]]
    assert run["wo"] in ([[48 // 2, 32 // 2], [48, 32 // 2]], mixture)


def test_training_goes_on_on_another_mesh_with_the_loss_of_one_device(run):
    (expected, of_expected), *others = run["further"]
    for loss, norm in others:
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(of_expected, rel=1e-4)
