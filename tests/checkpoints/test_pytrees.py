"""Checkpoints that Orbax wrote, by any of its ways, are read leaf by leaf and written again."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import pytest
from flax import nnx
from orbax.checkpoint import v1

from m2l import checkpoints, merging
from m2l.checkpoints import pytrees, saving, spans, zarr
from m2l.errors import CheckpointError, MergeError

RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return jnp.asarray(RNG.standard_normal(shape, np.float32), dtype)


WEIGHTS = {"w": normal(6, 10), "b": normal(5, dtype=jnp.bfloat16)}
MIXED = {
    "layers": [{"w": normal(24, 7)}, {"w": normal(24, 7)}],
    "pair": (normal(3), None),
    "steps": 3,
    "rate": 2.5,
    "causal": True,
    "half": normal(9, 4, dtype=jnp.bfloat16),
    "numpy": np.arange(6, dtype=np.int16).reshape(2, 3),
    "with.dots": {"and/slash": np.arange(3, dtype=np.int32)},
    "empty": {},
    "none": [],
}
TEXTS = {"name": "expert", "nested": {"license": "Apache \u00df 2.0"}}
SCANNED = {
    "params": {
        "decoder": {
            "layers": {"mlp": {"wi": normal(6, 3, 8)}, "self_attention": {"q": normal(6, 3, 2, 4)}},
            "logits": normal(6, 11),
        },
        "token_embedder": {"embedding": normal(11, 6)},
    }
}
GEMMA = {
    "transformer": {
        f"layer_{i}": {
            "attn": {"q_einsum": {"w": normal(2, 6, 3)}},
            "mlp": {"gating_einsum": normal(2, 5, 6)},
        }
        for i in range(2)
    }
    | {"embedder": {"input_embedding": normal(11, 6)}, "final_norm": {"scale": normal(6)}}
}


def training_state():
    state = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(WEIGHTS)
    return {"params": WEIGHTS, "opt_state": jax.tree.map(lambda a: a + 1, state), "step": 7}


def nnx_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])

    return nnx.state(Model(nnx.Rngs(0)))


def by_standard(path, tree):
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def by_handler(**options):
    def save(path, tree):
        with v0.Checkpointer(v0.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path, v0.args.PyTreeSave(tree))

    return save


def by_manager(path, tree):
    with v0.CheckpointManager(path) as manager:
        for step in (4, 12):
            manager.save(step, args=v0.args.PyTreeSave(tree))


def by_manager_of_items(path, tree):
    options = v0.CheckpointManagerOptions(step_prefix="step")
    with v0.CheckpointManager(path, options=options) as manager:
        about = v0.args.JsonSave({"a": 1})
        args = {"params": v0.args.PyTreeSave(tree), "opt_state": v0.args.StandardSave(WEIGHTS)}
        manager.save(3, args=v0.args.Composite(about=about, **args))


def by_v1(ocdbt=True, zarr3=True, compression=True, chunk_bytes=None):
    def save(path, tree):
        context = v1.Context()
        context.array.saving.use_ocdbt, context.array.saving.use_zarr3 = ocdbt, zarr3
        context.array.saving.use_compression = compression
        context.array.saving.storage_options.chunk_byte_size = chunk_bytes
        with context:
            v1.save(path, tree)

    return save


def by_v1_training(path, tree):
    with v1.training.Checkpointer(path) as checkpointer:
        checkpointer.save(5, tree)


WRITERS = {
    "v0 standard": by_standard,
    "v0 ocdbt zarr2": by_handler(),
    "v0 directories zarr2": by_handler(use_ocdbt=False),
    "v0 ocdbt zarr3": by_handler(use_zarr3=True),
    "v0 directories zarr3": by_handler(use_ocdbt=False, use_zarr3=True),
    "v0 manager": by_manager,
    "v0 manager of items": by_manager_of_items,
    "v1": by_v1(),
    "v1 zarr2": by_v1(zarr3=False),
    "v1 chunks": by_v1(chunk_bytes=64),
    "v1 plain": by_v1(ocdbt=False, compression=False),
    "v1 plain chunks": by_v1(ocdbt=False, compression=False, chunk_bytes=64),
    "v1 compressed chunks": by_v1(ocdbt=False, chunk_bytes=64),
    "v1 training": by_v1_training,
}
TREES = {
    "mixed": MIXED | TEXTS,
    "scanned": SCANNED,
    "gemma": GEMMA,
    "training state": training_state(),
    "nnx": nnx_state(),
    "list": [WEIGHTS, WEIGHTS["w"]],
}
CASES = [(writer, "mixed") for writer in WRITERS if writer != "v0 standard"]
CASES += [("v0 standard", tree) for tree in TREES if tree != "mixed"]
CASES += [("v1", tree) for tree in TREES if tree != "mixed"]
CASES += [("v1 plain chunks", tree) for tree in ("scanned", "training state")]


def leaves(tree):
    """The leaves of a tree by name, as NumPy arrays or texts."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    return {n: leaf if isinstance(leaf, str) else np.asarray(leaf) for n, leaf in named.items()}


def assert_same(read, written):
    """Compares leaves by name; Orbax restores 64 bits as JAX does, with 32."""
    assert read.keys() == written.keys()
    for name, leaf in written.items():
        if isinstance(leaf, str):
            assert read[name] == leaf
            continue
        assert read[name].shape == leaf.shape
        kinds = {read[name].dtype.itemsize, leaf.dtype.itemsize}
        assert read[name].dtype == leaf.dtype or kinds == {4, 8}, name
        np.testing.assert_array_equal(read[name], leaf, err_msg=name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that returns where a writer has saved a tree, once for all tests."""
    root, paths = tmp_path_factory.mktemp("orbax"), {}

    def make(writer, tree):
        if (writer, tree) not in paths:
            path = root / f"{writer} {tree}"
            WRITERS[writer](path, TREES[tree])
            paths[writer, tree] = path
        return paths[writer, tree]

    return make


def open_path(path, subtree=None):
    return pytrees.open_pytree(pytrees.find_item(path), subtree)


@pytest.mark.parametrize(("writer", "tree"), CASES)
def test_every_leaf_has_the_bits_that_were_saved(made, writer, tree):
    opened = open_path(made(writer, tree))
    written = leaves(TREES[tree])
    texts = {name: leaf for name, leaf in written.items() if isinstance(leaf, str)}
    assert opened.strings == texts
    assert opened.arrays.keys() == written.keys() - texts.keys()
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name, array in opened.arrays.items():
        leaf = written[name]
        assert (array.name, array.shape, array.dtype) == (name, leaf.shape, leaf.dtype)
        assert array.read().tobytes() == leaf.tobytes()
        flat = leaf.reshape(-1)
        for block in (1, 5, 1000):
            covered = np.zeros(leaf.shape, bool)
            for span in spans.cut(name, array.shape, array.chunk, block):
                out = np.empty(span.size, array.dtype)
                array.read_span(span, out)
                places = [span.position(element) for element in range(span.size)]
                assert out.tobytes() == flat[places].tobytes()
                assert not covered.reshape(-1)[places].any()
                covered.reshape(-1)[places] = True
            assert covered.all()
        for start in range(0, flat.size, max(1, flat.size // 5)):
            stop = min(flat.size, start + max(1, flat.size // 3))
            out = np.empty(stop - start, array.dtype)
            array.read_into(start, stop, out)
            assert out.tobytes() == flat[start:stop].tobytes()
        if leaf.dtype.itemsize < 8:
            assert np.asarray(array.place(one_device)).tobytes() == leaf.tobytes()


SUBTREES = [
    ("layers", ["0/w", "1/w"]),
    ("layers/1", ["w"]),
    ("/layers/1/", ["w"]),
    ("layers/1/w", ["w"]),
    ("nested", []),
]


@pytest.mark.parametrize("writer", ["v1", "v1 plain", "v0 directories zarr2"])
@pytest.mark.parametrize(("subtree", "names"), SUBTREES)
def test_a_subtree_is_read_by_names_within_it(made, tmp_path, writer, subtree, names):
    opened = open_path(made(writer, "mixed"), subtree)
    part = MIXED["layers"][1]["w"]
    assert list(opened.arrays) == names
    if names:
        assert opened.arrays[names[-1]].read().tobytes() == np.asarray(part).tobytes()
        written = {name: array.read() for name, array in opened.arrays.items()}
        write_again(opened, tmp_path / "x")
        assert_same(leaves(v1.load(tmp_path / "x", checkpointable_name="params")), written)
    else:
        assert opened.strings == {"license": TEXTS["nested"]["license"]}


def write_again(opened, directory):
    """Makes a checkpoint of m2l's layout of an open one, as a merge does."""
    item = directory / "params"
    for name, array in opened.arrays.items():
        chunk = zarr.chunk_shape(array.shape, array.dtype.itemsize, array.chunk)
        folder = saving.array_directory(item, name, opened.tree)
        writer = zarr.TensorWriter(folder, name, array.shape, array.dtype, chunk)
        writer.create()
        for box in spans.boxes(array.shape, chunk):
            writer.write(box, array.read(box))
    saving.finish(directory, {"params": opened.tree}, None, {"params": opened.strings})


@pytest.mark.parametrize(("writer", "tree"), CASES)
def test_arrays_written_again_with_their_tree_are_what_orbax_restores(
    made, tmp_path, monkeypatch, writer, tree
):
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 64)
    opened, step = open_path(made(writer, tree)), tmp_path / "run" / "3"
    write_again(opened, step)
    written = leaves(TREES[tree])
    again = open_path(tmp_path / "run")
    assert (again.tree.keys(), again.strings) == (opened.tree.keys(), opened.strings)
    for name, array in again.arrays.items():
        assert array.read().tobytes() == written[name].tobytes()

    assert_same(leaves(v1.load(step, checkpointable_name="params")), written)
    assert_same(leaves(v1.load_checkpointables(step, {"params": None})["params"]), written)
    with v0.Checkpointer(v0.PyTreeCheckpointHandler()) as checkpointer:
        assert_same(leaves(checkpointer.restore(step / "params")), written)
    with v0.CheckpointManager(tmp_path / "run") as manager:
        assert manager.latest_step() == 3
        args = v0.args.Composite(params=v0.args.PyTreeRestore())
        assert_same(leaves(manager.restore(3, args=args)["params"]), written)
    if tree != "mixed":
        with v0.StandardCheckpointer() as checkpointer:
            assert_same(leaves(checkpointer.restore(step / "params")), written)


def near(tree, seed):
    """An expert: numbers near those of a tree."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        if isinstance(leaf, str) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        change = 0.1 * rng.standard_normal(np.shape(leaf))
        changed = jnp.asarray(np.asarray(leaf, np.float32) + change, jnp.result_type(leaf))
        return float(changed) if isinstance(leaf, float) else changed

    return jax.tree.map(moved, tree)


@pytest.mark.parametrize(("writer", "tree"), CASES)
def test_every_kind_merges_to_the_bits_of_the_merge_in_memory(made, tmp_path, writer, tree):
    experts = [near(TREES[tree], seed) for seed in range(2)]
    for number, expert in enumerate(experts):
        WRITERS[writer](tmp_path / str(number), expert)
    paths = [tmp_path / str(number) for number in range(2)]
    recipe = merging.Recipe("ties", density=0.5)
    manifest = merging.merge(made(writer, tree), paths, recipe, tmp_path / "out", progress=False)
    assert checkpoints.verify(tmp_path / "out") == manifest
    trees = [
        {n: x for n, x in leaves(each).items() if not isinstance(x, str)}
        for each in (TREES[tree], *experts)
    ]
    expected = merging.merge_params(trees[0], trees[1:], recipe)
    texts = {name: x for name, x in leaves(TREES[tree]).items() if isinstance(x, str)}
    restored = v1.load(tmp_path / "out", checkpointable_name="params")
    assert_same(leaves(restored), {n: np.asarray(x) for n, x in expected.items()} | texts)


def test_a_part_of_a_training_state_merges_alone(made, tmp_path):
    state = TREES["training state"]
    by_v1()(tmp_path / "expert", near(state, 0))
    inputs = made("v1", "training state"), [tmp_path / "expert"]
    recipe = merging.Recipe("task_arithmetic", scale=0.5)
    merging.merge(*inputs, recipe, tmp_path / "out", subtree="params", progress=False)
    expected = merging.merge_params(state["params"], [near(state, 0)["params"]], recipe)
    restored = v1.load(tmp_path / "out", checkpointable_name="params")
    assert_same(leaves(restored), leaves(expected))
    with pytest.raises(CheckpointError, match=r"no subtree 'parms'; the nearest: params"):
        merging.merge(*inputs, recipe, tmp_path / "no", subtree="parms", progress=False)


def test_trees_of_unlike_structure_are_refused_with_the_keys_that_differ(made, tmp_path):
    other = {**GEMMA["transformer"], "extra": {"scale": normal(3)}}
    by_v1()(tmp_path / "expert", {"transformer": other})
    with pytest.raises(MergeError) as caught:
        merging.merge(
            made("v1", "gemma"), [tmp_path / "expert"], merging.Recipe("ties"), tmp_path / "out"
        )
    assert "transformer/extra/scale" in caught.value.render()
    assert not (tmp_path / "out").exists()


def test_inspect_shows_a_tree_of_others_and_eval_says_what_it_needs(
    made, tmp_path, run_m2l, capsys
):
    path = made("v1", "training state")
    assert run_m2l("inspect", path, "--subtree", "params") == 0
    shown = capsys.readouterr().out
    assert "6x10" in shown and "bfloat16" in shown and "opt_state" not in shown
    recipe = merging.Recipe("average")
    merging.merge(None, [path], recipe, tmp_path / "out", subtree="params", progress=False)
    assert run_m2l("inspect", tmp_path / "out", "--verify") == 0
    for checkpoint in (path, tmp_path / "out"):
        arguments = ("--checkpoint", checkpoint, "--mixture", "imdb", "--out", tmp_path / "results")
        assert run_m2l("eval", *arguments) == 2
    said = capsys.readouterr().err
    assert "can be merged and inspected" in said


@pytest.mark.parametrize("tree", ["training state", "nnx", "list"])
def test_what_is_written_again_restores_into_the_structure_that_was_saved(made, tmp_path, tree):
    write_again(open_path(made("v1", tree)), tmp_path / "x")
    like = jax.tree.map(jnp.zeros_like, TREES[tree])
    with v0.StandardCheckpointer() as checkpointer:
        by_v0 = checkpointer.restore(tmp_path / "x" / "params", like)
    for restored in (by_v0, v1.load(tmp_path / "x", like, checkpointable_name="params")):
        assert jax.tree.structure(restored) == jax.tree.structure(TREES[tree])
        assert_same(leaves(restored), leaves(TREES[tree]))


SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np, orbax.checkpoint as v0
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1
from m2l.checkpoints import pytrees, saving, spans, zarr

root, zarr.CHUNK_BYTES = Path(sys.argv[1]), 64
def place(shape, *spec):
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, P(*spec))
values = {
    "both": np.arange(96, dtype=np.float32).reshape(8, 12),
    "inner": np.arange(2 * 3 * 16, dtype=np.int32).reshape(2, 3, 16),
    "alike": np.arange(5, dtype=np.float32),
}
first = {"both": place((4, 2), "a", "b"), "inner": place((4, 2), None, None, ("a", "b")),
         "alike": place((4, 2))}
second = {"both": place((2, 4), "b"), "inner": place((2, 4), "a"), "alike": place((2, 4))}
tree = {name: jax.device_put(value, first[name]) for name, value in values.items()}
like = {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=second[name])
        for name, value in values.items()}

def check(arrays):
    for name, value in values.items():
        assert arrays[name].sharding == second[name], name
        np.testing.assert_array_equal(np.asarray(arrays[name]), value)

def v1_save(path, ocdbt, chunk_bytes):
    context = v1.Context()
    context.array.saving.use_ocdbt = ocdbt
    context.array.saving.use_compression = ocdbt
    context.array.saving.storage_options.chunk_byte_size = chunk_bytes
    with context:
        v1.save(path, tree)

with v0.StandardCheckpointer() as checkpointer:
    checkpointer.save(root / "v0", tree)
for name, ocdbt, chunk_bytes in (("1", True, None), ("2", False, None), ("3", False, 32)):
    v1_save(root / name, ocdbt, chunk_bytes)
for name in ("v0", "1", "2", "3"):
    opened = pytrees.open_pytree(pytrees.find_item(root / name))
    check({name: array.place(second[name]) for name, array in opened.arrays.items()})
    directory = root / f"{name} again"
    for key, array in opened.arrays.items():
        for span in spans.cut(key, array.shape, array.chunk, 7):
            out = np.empty(span.size, array.dtype)
            array.read_span(span, out)
            places = [span.position(element) for element in range(span.size)]
            np.testing.assert_array_equal(out, values[key].reshape(-1)[places])
        chunk = zarr.chunk_shape(array.shape, 4, array.chunk)
        folder = saving.array_directory(directory / "params", key, opened.tree)
        writer = zarr.TensorWriter(folder, key, array.shape, array.dtype, chunk)
        writer.create()
        for box in spans.boxes(array.shape, chunk):
            writer.write(box, array.read(box))
    saving.finish(directory, {"params": opened.tree}, None)
    check(v1.load(directory, like, checkpointable_name="params"))
    with v0.StandardCheckpointer() as checkpointer:
        check(checkpointer.restore(directory / "params", like))
with v0.CheckpointManager(root / "run") as manager:
    (root / "3 again").rename(root / "run" / "1")
    manager.reload()
    args = v0.args.Composite(params=v0.args.StandardRestore(like))
    check(manager.restore(1, args=args)["params"])
"""


def test_sharded_arrays_are_placed_onto_another_mesh_and_written_again(forge, tmp_path):
    forge((SHARDED, tmp_path), devices=8)


# What is damaged, unfinished or not what is asked for.


def message(call, *arguments):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_newest_finished_step_is_meant_unless_one_is_named(tmp_path):
    by_manager(tmp_path / "run", WEIGHTS)
    (tmp_path / "run" / "31.orbax-checkpoint-tmp-5").mkdir()
    assert pytrees.find_item(tmp_path / "run") == tmp_path / "run" / "12" / "default"
    assert pytrees.find_item(tmp_path / "run" / "4") == tmp_path / "run" / "4" / "default"
    assert "there is no such" in message(pytrees.find_item, tmp_path / "run" / "5")


def test_folders_without_a_finished_checkpoint_are_refused(tmp_path):
    assert "there is no such" in message(pytrees.find_item, tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "there is no such" in message(pytrees.find_item, tmp_path / "file")
    (tmp_path / "run").mkdir()
    assert "no steps, and no _METADATA" in message(pytrees.find_item, tmp_path / "run")
    unfinished = tmp_path / "run" / "3.orbax-checkpoint-tmp-5"
    unfinished.mkdir()
    assert f"only unfinished ones ({unfinished.name})" in message(
        pytrees.find_item, tmp_path / "run"
    )
    assert "unfinished: Orbax was writing it" in message(pytrees.find_item, unfinished)


def test_of_several_items_of_unknown_names_one_has_to_be_named(tmp_path):
    with v0.CheckpointManager(tmp_path / "run") as manager:
        items = {name: v0.args.StandardSave(WEIGHTS) for name in ("teacher", "student")}
        manager.save(1, args=v0.args.Composite(**items))
    assert "the items student, teacher: name one of them" in message(
        pytrees.find_item, tmp_path / "run"
    )
    assert pytrees.find_item(tmp_path / "run/1/teacher") == tmp_path / "run/1/teacher"


def test_a_subtree_that_is_not_there_is_refused_with_the_nearest_names(made):
    path = made("v1", "training state")
    assert "no subtree 'param'; the nearest: params" in message(open_path, path, "param")
    assert "params/w" in message(open_path, path, "params/v")


@pytest.fixture
def plain(made, tmp_path):
    """A copy of a checkpoint whose chunks are files of plain elements."""
    return pytrees.find_item(shutil.copytree(made("v1 plain chunks", "scanned"), tmp_path / "x"))


def read_all(item):
    for array in pytrees.open_pytree(item).arrays.values():
        array.read()


@pytest.mark.parametrize("damage", ["truncated", "longer", "removed"])
@pytest.mark.parametrize("writer", ["v1 plain chunks", "v1 compressed chunks", "v1 plain"])
def test_damaged_chunks_are_refused_by_the_arrays_name(made, tmp_path, writer, damage):
    item = pytrees.find_item(shutil.copytree(made(writer, "mixed"), tmp_path / "x"))
    chunk = sorted(file for file in (item / "half" / "c").rglob("*") if file.is_file())[-1]
    content = chunk.read_bytes()
    if damage == "removed":
        chunk.unlink()
    else:
        chunk.write_bytes(content[:-1] if damage == "truncated" else content + b"junk")
    array = pytrees.open_pytree(item).arrays["half"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    out = np.empty(array.size, array.dtype)
    for call in (array.read, lambda: array.read_into(0, array.size, out)):
        assert "half" in message(call)
    with pytest.raises(CheckpointError, match="half"):
        array.place(sharding)


def test_a_missing_or_damaged_array_is_refused_by_name_when_it_is_opened(plain):
    file = plain / "params.decoder.logits" / "zarr.json"
    content = json.loads(file.read_text())
    for text in ("[]", "{}", "[" * 1000, "\x00", None):
        file.write_text(text) if text is not None else file.unlink()
        assert "params/decoder/logits cannot be read" in message(pytrees.open_pytree, plain)
    huge = {"name": "regular", "configuration": {"chunk_shape": [2**40, 1]}}
    for change in (
        {"shape": [2**70]},
        {"shape": [-1, 2]},
        {"shape": [2**62, 2**61], "chunk_grid": huge},
        {"shape": [2**50, 2**7]},
        {"shape": [2**40, 11]},
        {"shape": [2**40, 11], "chunk_grid": huge},
        {"data_type": "object"},
        {"codecs": [{"name": "nothing"}]},
        {"codecs": []},
    ):
        file.write_text(json.dumps(content | change))
        assert "params/decoder/logits" in message(read_all, plain), change


def node(*keys, kind="jax.Array"):
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in keys],
        "value_metadata": {"value_type": kind, "skip_deserialize": False},
    }


HOSTILE = {
    "no tree": {},
    "a list": {"tree_metadata": []},
    "a leaf that is a text": {"tree_metadata": {"a": "b"}},
    "keys that are a number": {"tree_metadata": {"a": node("a") | {"key_metadata": 3}}},
    "keys that are texts": {"tree_metadata": {"a": node("a") | {"key_metadata": ["a"]}}},
    "a key that is a list": {"tree_metadata": {"a": node(["a"])}},
    "a kind that is a list": {"tree_metadata": {"a": node("a", kind=[])}},
    "no keys": {"tree_metadata": {"()": node()}},
    "one name twice": {"tree_metadata": {"a": node("a", "b"), "b": node("a/b")}},
    "one place twice": {"tree_metadata": {"a": node("a", "b"), "b": node("a.b")}},
    "above the item": {"tree_metadata": {"a": node("../x")}},
    "far above the item": {"tree_metadata": {"a": node("a/../../../x")}},
    "dots of empty keys": {"tree_metadata": {"a": node("", "", "")}},
    "the item itself": {"tree_metadata": {"a": node("")}},
    "an absolute path": {"tree_metadata": {"a": node("/etc/passwd")}},
    "two lines": {"tree_metadata": {"a": node("a\nb")}},
    "a null": {"tree_metadata": {"a": node("a\0b")}},
    "half a character": {"tree_metadata": {"a": node("\ud800")}},
    "a text without a file": {"tree_metadata": {"a": node("a", kind="string")}},
    "wrong switches": {"tree_metadata": {"a": node("a")}, "use_ocdbt": "x", "use_zarr3": {"a": 1}},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("layout", ["v1", "v1 plain chunks"])
def test_metadata_that_describes_no_tree_of_arrays_is_refused(made, tmp_path, layout, case):
    item = pytrees.find_item(shutil.copytree(made(layout, "scanned"), tmp_path / "x"))
    content = json.loads((item / "_METADATA").read_text())
    del content["tree_metadata"]
    (item / "_METADATA").write_text(json.dumps(content | HOSTILE[case]))
    assert str(item) in message(pytrees.open_pytree, item)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"tree_metadata": 1e999}'])
def test_metadata_that_is_not_json_is_refused(plain, text):
    (plain / "_METADATA").write_text(text)
    assert str(plain / "_METADATA") in message(pytrees.open_pytree, plain)


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": 3}'])
def test_texts_that_are_not_in_their_file_are_refused(made, tmp_path, text):
    item = pytrees.find_item(shutil.copytree(made("v1", "mixed"), tmp_path / "x"))
    (item / "_strings.json").write_text(text)
    assert "_strings.json: damaged" in message(pytrees.open_pytree, item)


def test_no_array_outside_of_an_item_is_opened(plain):
    """Names like these would be found if they were followed."""
    shutil.copytree(plain / "params.decoder.logits", plain.parent / "outside")
    content = json.loads((plain / "_METADATA").read_text())
    for key in ("../outside", str(plain.parent / "outside"), "x/../../outside"):
        (plain / "_METADATA").write_text(json.dumps(content | {"tree_metadata": {"a": node(key)}}))
        assert "cannot be the keys of an array" in message(pytrees.open_pytree, plain)
    assert Path(plain.parent / "outside" / "zarr.json").is_file()
