"""Checkpoints come back as they were, whole or by slice, and Orbax itself can read them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from m2l import checkpoints
from m2l.checkpoints import digest, publishing, pytrees, zarr
from m2l.checkpoints.run_checkpoints import RunCheckpoints
from m2l.errors import CheckpointError

ABOUT = {
    "model": {"family": "t5", "d_model": 4},
    "vocabulary": {"name": "bytes", "size": 7, "fingerprint": "abc"},
    "made_by": {"kind": "test"},
}


@pytest.fixture(params=["local", "gcs_bucket", "s3_bucket"])
def root(request, tmp_path):
    """An empty directory on each kind of storage."""
    return tmp_path if request.param == "local" else request.getfixturevalue(request.param)


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


def test_parameters_come_back_bit_for_bit(root, params):
    path = root / "a b%20c"
    manifest = checkpoints.save(path, params, **ABOUT, step=3)
    assert_equal(checkpoints.restore(path), params)
    assert checkpoints.read_manifest(path) == manifest
    assert (manifest.step, manifest.dtype) == (3, "mixed")
    assert checkpoints.verify(path).digest == manifest.digest
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert_equal(checkpoints.restore(path, shardings=on_device), params)
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoints.save(path, params, **ABOUT)
    checkpoints.remove(path)
    assert not path.exists()


def test_the_newest_finished_checkpoint_of_a_run_is_meant(root):
    steps = root / "run" / "checkpoints"
    for step in (9, 10):
        checkpoints.save(steps / str(step), {"w": np.full(3, step, np.int32)}, **ABOUT, step=step)
    assert checkpoints.read_manifest(root / "run").step == 10
    assert pytrees.find_item(steps) == steps / "10" / "params"
    former = pytrees.open_pytree(pytrees.find_item(steps / "9"))
    assert former.arrays["w"].read().tolist() == [9] * 3
    (steps / "10" / "_CHECKPOINT_METADATA").unlink()
    assert checkpoints.read_manifest(root / "run").step == 9


@pytest.mark.parametrize("bucket", ["gcs_bucket", "s3_bucket"])
def test_unfinished_checkpoints_in_a_bucket_are_no_checkpoints(request, bucket):
    bucket = request.getfixturevalue(bucket)
    for step in (1, 2):
        checkpoints.save(bucket / str(step), {"w": np.full(3, step, np.int32)}, **ABOUT, step=step)
    for name in ("commit_success.txt", "params/commit_success.txt"):
        (bucket / "2" / name).unlink()
    assert checkpoints.read_manifest(bucket).step == 1
    assert pytrees.find_item(bucket) == bucket / "1" / "params"
    for path in (bucket / "2", bucket / "2" / "params"):
        with pytest.raises(CheckpointError, match=r"unfinished: commit_success\.txt is missing"):
            pytrees.find_item(path)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        checkpoints.restore(bucket / "2")
    # What a save or a removal that was killed has left is replaced.
    (bucket / "2" / publishing.UNFINISHED).write_text("{}")
    (bucket / "2" / "params" / "w" / "stale").write_text("")
    checkpoints.save(bucket / "2", {"w": np.ones(3, np.float32)}, **ABOUT)
    assert checkpoints.verify(bucket / "2").step == 0
    assert not (bucket / "2" / "params" / "w" / "stale").exists()


@pytest.mark.parametrize("bucket", ["gcs_bucket", "s3_bucket"])
def test_damage_in_a_bucket_is_refused_by_name(request, bucket):
    path = request.getfixturevalue(bucket) / "x"
    arrays = {"a": np.ones(3, np.float32), "b": np.arange(4, dtype=np.int32)}
    checkpoints.save(path, arrays, **ABOUT)
    chunk = path / "params" / "b" / "c.0"
    content = chunk.read_bytes()
    for damaged in (content[:-1], bytes(len(content)), None):
        chunk.unlink() if damaged is None else chunk.write_bytes(damaged)
        for read in (checkpoints.restore, checkpoints.verify):
            with pytest.raises(CheckpointError, match=r"params: b (is damaged|cannot be read)"):
                read(path)


def test_orbax_reads_what_is_written_to_a_bucket_and_is_read_from_there(
    gcs_bucket, params, monkeypatch
):
    # TensorFlow's files, which are chosen for the process at its first use, know no emulator.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    checkpoints.save(gcs_bucket / "x", params, **ABOUT)
    assert_equal(ocp.load(str(gcs_bucket / "x"), checkpointable_name="params"), params)
    tree = {"w": [params["embedding"], params["decoder"]["norm"]["scale"]]}
    ocp.save(str(gcs_bucket / "y"), tree)
    opened = pytrees.open_pytree(pytrees.find_item(gcs_bucket / "y"))
    for name, leaf in zip(("w/0", "w/1"), tree["w"], strict=True):
        assert opened.arrays[name].read().tobytes() == np.asarray(leaf).tobytes()


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


def test_the_optimizer_state_comes_back_into_its_own_structure(root, params):
    weights = {"w": jnp.ones((256, 128)), "b": jnp.ones((3,))}
    optimizer = optax.chain(optax.adafactor(1e-3), optax.ema(0.9))
    state = optimizer.init(weights)
    checkpoints.save(root / "x", params, **ABOUT, opt_state=state, data_state=[b"\0a", b""])
    assert_equal(checkpoints.restore_opt_state(root / "x", state), state)
    abstract = jax.eval_shape(optimizer.init, weights)
    assert_equal(checkpoints.restore_opt_state(root / "x", abstract), state)
    assert checkpoints.restore_data_state(root / "x") == [b"\0a", b""]


def test_an_empty_optimizer_state_is_a_state(tmp_path, params):
    del params["nothing"]  # Orbax itself saves no array without elements.
    state = optax.sgd(0.1).init(params)
    checkpoints.save(tmp_path / "x", params, **ABOUT, opt_state=state)
    assert checkpoints.restore_opt_state(tmp_path / "x", state) == state
    weights = jax.device_put(params)
    with RunCheckpoints(tmp_path / "run", keep=1) as saves:
        path = saves.save(1, weights, state, **ABOUT, parents=(), data_state=[b"\0"])
    assert checkpoints.restore_opt_state(path, state) == state
    assert_equal(checkpoints.restore(path), weights)
    assert checkpoints.verify(path).digest == checkpoints.read_manifest(tmp_path / "x").digest


def test_values_are_saved_and_digested_although_the_next_step_overwrites_them(root, params):
    params = {name: jax.tree.map(np.array, params[name]) for name in ("decoder", "embedding")}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with RunCheckpoints(root / "run", keep=2) as saves:
        current = jax.tree.map(jnp.asarray, params)
        for number in (1, 2):
            saves.save(number, current, {"m": current}, **ABOUT)
            current = step(current)
    for number, values in enumerate((params, step(jax.tree.map(jnp.asarray, params))), start=1):
        path = root / "run" / str(number)
        checkpoints.verify(path)
        assert_equal(checkpoints.restore(path), jax.tree.map(np.asarray, values))
        assert_equal(checkpoints.restore_opt_state(path, {"m": values}), {"m": values})


def test_threads_may_save_their_runs_at_the_same_time(tmp_path):
    together = threading.Barrier(4)

    def save(number):
        weights, state = {"w": jnp.full(8, number)}, {"m": jnp.full(3, number)}
        with RunCheckpoints(tmp_path / str(number), keep=3) as saves:
            together.wait(60)
            return [saves.save(step, weights, state, **ABOUT) for step in (1, 2, 3)]

    with ThreadPoolExecutor(4) as pool:
        for number, paths in enumerate(pool.map(save, range(4))):
            for path in paths:
                checkpoints.verify(path)
                np.testing.assert_array_equal(checkpoints.restore(path)["w"], np.full(8, number))


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_save_is_no_checkpoint_before_its_digests_are_there(
    tmp_path, monkeypatch, fails
):
    digests_wanted, of_box = threading.Event(), digest.of_box

    def of_box_when_wanted(*arguments):
        digests_wanted.wait()
        if fails:
            raise OSError("no digest")
        return of_box(*arguments)

    monkeypatch.setattr(digest, "of_box", of_box_when_wanted)
    with RunCheckpoints(tmp_path / "run", keep=1) as saves:
        path = saves.save(1, {"w": jnp.ones(3)}, {}, **ABOUT)
        while not any(tmp_path.rglob("w/c*")):
            time.sleep(0.01)  # The arrays are written, while digests are computed.
        assert saves.finished() == {} and not path.exists()
        digests_wanted.set()
        if fails:
            with pytest.raises(CheckpointError, match="no digest"):
                saves.wait()
            assert saves.finished() == {}
            monkeypatch.undo()
            saves.save(1, {"w": jnp.ones(3)}, {}, **ABOUT)
        saves.wait()
        assert saves.finished() == {1: path}
    checkpoints.verify(path)


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
row = checkpoints.open_parameters(path)["w"].read((slice(1, 2),))
assert row.tolist() == [[6, 7, 8, 9, 10, 11]]
"""
    forge((program,), devices=8)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 64)


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
            out = np.empty(stop - start, np.float32)
            parameter.read_into(start, stop, out)
            np.testing.assert_array_equal(out, flat[start:stop])
    np.testing.assert_array_equal(parameter.read(), value)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("block", "dtype"), [(7, np.float32), (1000, np.float32), (50, ml_dtypes.bfloat16)]
)
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


@pytest.mark.usefixtures("small_chunks")
def test_a_checkpoint_is_streamed_to_any_storage(root):
    value = np.arange(100, dtype=np.float32).reshape(20, 5)
    with checkpoints.writing(root / "x", {"a/w": (value.shape, value.dtype)}) as writer:
        for start in range(0, 100, 30):
            writer.append("a/w", value.reshape(-1)[start : start + 30])
        manifest = writer.finish(**ABOUT)
    assert checkpoints.verify(root / "x") == manifest
    assert_equal(checkpoints.restore(root / "x"), {"a": {"w": value}})


def test_flatten_and_unflatten_are_inverse_and_refuse_names_that_cannot_be_stored():
    nested = {"b": {"x": 1, "a": {"y": 2}}, "a": 3}
    assert checkpoints.flatten(nested) == {"b/x": 1, "b/a/y": 2, "a": 3}
    assert checkpoints.unflatten(checkpoints.flatten(nested)) == nested
    for name in ("a/b", "a.b", "", 3):
        with pytest.raises(CheckpointError, match="cannot name a parameter"):
            checkpoints.flatten({"x": {name: 1}})
