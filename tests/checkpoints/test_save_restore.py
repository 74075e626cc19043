"""Checkpoints come back as they were, whole or by slice, and Orbax itself can read them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from m2l import checkpoints
from m2l.checkpoints import orbax
from m2l.errors import CheckpointError

ABOUT = {
    "model": {"family": "t5", "d_model": 4},
    "vocabulary": {"name": "bytes", "size": 7, "fingerprint": "abc"},
    "made_by": {"kind": "test"},
}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "decoder": {
            "layers_00": {"wi": rng.standard_normal((5, 7, 3), np.float32)},
            "norm": {"scale": jnp.arange(4, dtype=jnp.bfloat16)},
        },
        "embedding": rng.standard_normal((300, 11)).astype(np.float32),
        "scalar": np.float32(3.5),
        "nothing": np.zeros((3, 0), np.float32),
        "single": np.full((1, 1, 1), -0.0, np.float32),
    }


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_parameters_come_back_bit_for_bit(tmp_path, params):
    manifest = checkpoints.save(tmp_path / "a b%20c", params, **ABOUT, step=3)
    assert_equal(checkpoints.restore(tmp_path / "a b%20c"), params)
    assert checkpoints.read_manifest(tmp_path / "a b%20c") == manifest
    assert (manifest.step, manifest.dtype) == (3, "mixed")
    assert checkpoints.verify(tmp_path / "a b%20c").digest == manifest.digest


def test_orbax_reads_what_is_written(tmp_path, params):
    checkpoints.save(tmp_path / "x", params, **ABOUT, opt_state={"count": np.int32(4)})
    found = ocp.load_checkpointables(tmp_path / "x", {"params": None, "opt_state": None})
    assert_equal(found["params"], params)
    assert found["opt_state"]["count"] == 4


def test_the_digest_is_of_the_model_and_not_of_how_it_was_made(tmp_path, params):
    first = checkpoints.save(tmp_path / "1", params, **ABOUT)
    again = checkpoints.save(tmp_path / "2", params, **ABOUT | {"made_by": {"kind": "x"}}, step=9)
    params["embedding"] = params["embedding"].copy()
    params["embedding"][7, 3] += 1
    other = checkpoints.save(tmp_path / "3", params, **ABOUT)
    wider = checkpoints.save(tmp_path / "4", params, **ABOUT | {"model": {"family": "llama"}})
    assert first.digest == again.digest
    assert len({first.digest, other.digest, wider.digest}) == 3


def test_the_optimizer_state_comes_back_into_its_own_structure(tmp_path, params):
    weights = {"w": jnp.ones((256, 128)), "b": jnp.ones((3,))}
    optimizer = optax.chain(optax.adafactor(1e-3), optax.ema(0.9))
    state = optimizer.init(weights)
    checkpoints.save(tmp_path / "x", params, **ABOUT, opt_state=state, data_state=b"\0position")
    assert_equal(checkpoints.restore_opt_state(tmp_path / "x", state), state)
    abstract = jax.eval_shape(optimizer.init, weights)
    assert_equal(checkpoints.restore_opt_state(tmp_path / "x", abstract), state)
    assert checkpoints.restore_data_state(tmp_path / "x") == b"\0position"


def test_an_empty_optimizer_state_is_a_state(tmp_path, params):
    state = optax.sgd(0.1).init(params)
    checkpoints.save(tmp_path / "x", params, **ABOUT, opt_state=state)
    assert checkpoints.restore_opt_state(tmp_path / "x", state) == state


def test_another_optimizers_state_is_refused_by_name(tmp_path, params):
    weights = {"w": jnp.ones((4, 3))}
    checkpoints.save(tmp_path / "x", params, **ABOUT, opt_state=optax.adam(1.0).init(weights))
    with pytest.raises(
        CheckpointError, match=r"0/mu/w: expected float32\[5, 3\], found float32\[4, 3\]"
    ):
        checkpoints.restore_opt_state(tmp_path / "x", optax.adam(1.0).init({"w": jnp.ones((5, 3))}))
    with pytest.raises(CheckpointError, match=r"0/count: expected none, found int32\[\]"):
        checkpoints.restore_opt_state(tmp_path / "x", optax.sgd(1.0, momentum=None).init(weights))


def test_a_checkpoint_without_states_says_so(tmp_path, params):
    checkpoints.save(tmp_path / "x", params, **ABOUT)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        checkpoints.restore_opt_state(tmp_path / "x", ())
    with pytest.raises(CheckpointError, match="no data position"):
        checkpoints.restore_data_state(tmp_path / "x")


def test_sharded_arrays_are_saved_whole_and_restored_onto_other_shardings(forge, tmp_path):
    program = f"""
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from m2l import checkpoints
auto = (AxisType.Auto, AxisType.Auto)
value = np.arange(48, dtype=np.float32).reshape(8, 6)
def place(shape, spec):
    return NamedSharding(jax.make_mesh(shape, ("a", "b"), axis_types=auto), P(*spec))
params = {{"w": jax.device_put(value, place((4, 2), ("a", "b")))}}
path = {str(tmp_path / "x")!r}
vocabulary = {{"name": None, "size": None, "fingerprint": ""}}
checkpoints.save(path, params, model={{}}, vocabulary=vocabulary, made_by={{}})
target = place((2, 4), ("b", None))
found = checkpoints.restore(path, shardings={{"w": target}})["w"]
assert found.sharding == target and (np.asarray(found) == value).all()
assert checkpoints.open_parameters(path)["w"].read(5, 9).tolist() == [5, 6, 7, 8]
"""
    forge((program,), devices=8)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(orbax, "_CHUNK_BYTES", 64)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "shape", [(), (1,), (97,), (13, 5), (3, 40), (4, 3, 5), (2, 3, 33), (2, 1, 1, 7), (6, 1)]
)
def test_any_slice_of_any_shape_reads_what_is_there(tmp_path, shape):
    value = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    checkpoints.save(tmp_path / "x", {"w": value}, **ABOUT)
    parameter = checkpoints.open_parameters(tmp_path / "x")["w"]
    assert (parameter.shape, parameter.dtype, parameter.size) == (shape, np.float32, value.size)
    flat = value.reshape(-1)
    for start in range(0, flat.size, max(1, flat.size // 9)):
        for stop in range(start + 1, flat.size + 1, max(1, flat.size // 11)):
            np.testing.assert_array_equal(parameter.read(start, stop), flat[start:stop])
    np.testing.assert_array_equal(parameter.read(), flat)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("block", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_streamed_checkpoint_is_the_saved_one(tmp_path, params, block, dtype):
    params = {name: np.asarray(a, dtype) for name, a in checkpoints.flatten(params).items()}
    saved = checkpoints.save(tmp_path / "saved", checkpoints.unflatten(params), **ABOUT)
    described = {name: (array.shape, array.dtype) for name, array in params.items()}
    with checkpoints.writing(tmp_path / "streamed", described) as writer:
        for name, array in params.items():
            for start in range(0, array.size, block):
                writer.append(name, array.reshape(-1)[start : start + block])
        streamed = writer.finish(**ABOUT)
    assert streamed == saved
    assert_equal(checkpoints.restore(tmp_path / "streamed"), checkpoints.unflatten(params))


def test_flatten_and_unflatten_are_inverse_and_refuse_names_that_cannot_be_stored():
    nested = {"b": {"x": 1, "a": {"y": 2}}, "a": 3}
    assert checkpoints.flatten(nested) == {"b/x": 1, "b/a/y": 2, "a": 3}
    assert checkpoints.unflatten(checkpoints.flatten(nested)) == nested
    for name in ("a/b", "a.b", "", 3):
        with pytest.raises(CheckpointError, match="cannot name a parameter"):
            checkpoints.flatten({"x": {name: 1}})
