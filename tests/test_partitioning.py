"""The rules table on abstract meshes, and a real 2 x 2 x 2 mesh of simulated devices."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from m2l import models, partitioning
from m2l.errors import ConfigError, UnknownNameError
from m2l.models import ParamSpec

SPEC = models.spec(models.T5Config(64, 32, 8, 48, 4, 1, 1))


def mesh(*sizes, names=partitioning.MESH_AXES):
    return AbstractMesh(sizes, names, (AxisType.Auto,) * len(sizes))


def one(*axes, shape=(8, 8)):
    return {"decoder": {"kernel": ParamSpec(shape, np.dtype(np.float32), axes)}}


def test_every_kernel_is_split_over_fsdp_and_model_and_small_vectors_are_not():
    for row in partitioning.table(SPEC, mesh(2, 2, 2)):
        if row.name.endswith("norm"):
            assert row.spec == PartitionSpec(None)
        elif row.name.endswith("relpos_bias"):
            assert row.spec == PartitionSpec("model", None)
        else:
            assert set(row.spec) == {"fsdp", "model"}, row


def test_the_table_tells_what_a_device_holds():
    rows = {row.name: row for row in partitioning.table(SPEC, mesh(1, 4, 2))}
    wi_0 = rows["encoder/layers_00/mlp/wi_0"]
    assert wi_0.shape == (32, 48)
    assert wi_0.mib_per_device == 32 / 4 * 48 / 2 * 4 / 2**20
    assert rows["encoder/norm"].mib_per_device == 32 * 4 / 2**20
    assert len(rows) == len(jax.tree.leaves(SPEC))


def test_an_unknown_logical_axis_is_refused_with_the_parameter_and_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"decoder/kernel.*'embd'.*'embed'"):
        partitioning.shardings(one("embd", "mlp"), mesh(2, 2, 2))


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(ConfigError, match=r"decoder/kernel.*'heads' and 'mlp'.*'model'"):
        partitioning.shardings(one("heads", "mlp"), mesh(2, 2, 2))


def test_a_dimension_that_the_mesh_axis_does_not_divide_is_refused():
    with pytest.raises(
        ConfigError, match=r"decoder/kernel: dimension 1 \(mlp\) is 9.*'model' of 2"
    ):
        partitioning.shardings(one("embed", "mlp", shape=(8, 9)), mesh(2, 2, 2))


def test_heads_that_the_mesh_would_cut_in_two_are_refused():
    """The joined dimension 4 * 8 divides by 8, but four heads do not go on eight devices."""
    with pytest.raises(ConfigError, match=r"relpos_bias: dimension 0 \(heads\) is 4"):
        partitioning.shardings(SPEC, mesh(1, 1, 8))


def test_a_rule_for_an_axis_that_the_mesh_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"'fsdp', but the mesh has data, model"):
        partitioning.shardings(SPEC, mesh(2, 2, names=("data", "model")))


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"fsdp": 7}, {"model": 0}, {"data": -1}, {"fsdp": "1"}]
)
def test_a_mesh_that_the_devices_do_not_fill_is_refused(sizes):
    with pytest.raises(ConfigError, match="multiply to the number of devices, 1"):
        partitioning.make_mesh(**sizes, devices=jax.devices()[:1])


def test_constraints_without_a_mesh_change_nothing():
    x = np.ones((3, 4))
    assert partitioning.constrain(x, "batch", "heads") is x


def test_the_rules_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        partitioning.RULES["embed"] = "model"


ON_EIGHT_DEVICES = """
import json, jax, numpy as np
from m2l import models, partitioning

config = models.T5Config(64, 32, 8, 48, 4, 1, 1)
params = models.init(config, jax.random.key(0))
rng = np.random.default_rng(0)
batch = {}
for side, length in (("encoder", 12), ("decoder", 6)):
    batch[f"{side}_input_tokens"] = rng.integers(1, 64, (8, length), dtype=np.int32)
    batch[f"{side}_segment_ids"] = np.sort(rng.integers(1, 3, (8, length), dtype=np.int32))

def loss(params, batch):
    logits = models.apply(config, params, batch)
    return (logits ** 2).mean(), logits

step = jax.jit(jax.value_and_grad(loss, has_aux=True))
(_, logits), gradients = step(params, batch)

mesh = partitioning.make_mesh(fsdp=2, model=2)
places = partitioning.shardings(models.spec(config), mesh)
with jax.set_mesh(mesh):
    placed = jax.device_put(params, places)
    fed = jax.device_put(batch, partitioning.batch_sharding(mesh))
    (_, on_mesh), on_mesh_gradients = step(placed, fed)
    born = jax.jit(lambda key: models.init(config, key), out_shardings=places)(jax.random.key(0))
    three = {name: rows[:3] for name, rows in batch.items()}
    odd = jax.jit(lambda params: models.apply(config, params, three))(placed)

def distance(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / np.abs(a).max())

print(json.dumps({
    "mesh": dict(mesh.shape),
    "default": dict(partitioning.make_mesh().shape),
    "types": sorted({str(kind) for kind in mesh.axis_types}),
    "logits": distance(logits, on_mesh),
    "gradients": max(jax.tree.leaves(jax.tree.map(distance, gradients, on_mesh_gradients))),
    "born": max(jax.tree.leaves(jax.tree.map(distance, params, born))),
    "odd": distance(logits[:3], odd),
    "shard": placed["decoder"]["layers_00"]["mlp"]["wo"].addressable_shards[0].data.shape,
    "logits_spec": str(on_mesh.sharding.spec),
}))
"""


@pytest.fixture(scope="module")
def on_eight_devices(forge):
    (said,) = forge((ON_EIGHT_DEVICES,), devices=8)
    return json.loads(said)


def test_logits_and_gradients_on_a_2x2x2_mesh_are_those_of_one_device(on_eight_devices):
    # float32, and sums over devices in another order.
    assert on_eight_devices["logits"] < 1e-5
    assert on_eight_devices["gradients"] < 1e-5


def test_init_on_a_mesh_draws_the_same_values(on_eight_devices):
    assert on_eight_devices["born"] < 1e-6


def test_a_batch_that_the_mesh_does_not_divide_is_still_computed(on_eight_devices):
    assert on_eight_devices["odd"] < 1e-5


def test_parameters_and_activations_are_really_split(on_eight_devices):
    assert on_eight_devices["shard"] == [48 // 2, 32 // 2]
    assert on_eight_devices["logits_spec"] == str(PartitionSpec(("data", "fsdp"), None, "model"))


def test_make_mesh_puts_devices_on_data_unless_told_and_lets_the_compiler_shard(on_eight_devices):
    assert on_eight_devices["mesh"] == {"data": 2, "fsdp": 2, "model": 2}
    assert on_eight_devices["default"] == {"data": 8, "fsdp": 1, "model": 1}
    assert on_eight_devices["types"] == ["AxisType.Auto"]
