"""T5X's checkpoints, written here as T5X's code writes them, become m2l's or are refused by name.

T5X's names and shapes are those that its examples/t5/network.py and examples/scalable_t5/network.py
give their parameters, written out here on their own; `legacy` follows checkpoints.py's
Checkpointer._write_state_to_tensorstore, `_get_spec` and `save`, and `orbax` its
OrbaxCheckpointManagerInterface.save.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import serialization

from m2l import checkpoints, merging, models
from m2l.checkpoints import t5x
from m2l.errors import CheckpointError, MergeError, UnsupportedModelError
from m2l.models import T5Config

VOCABULARY = {"name": "bytes", "size": 40, "fingerprint": "abc"}

# vocab_size, d_model, d_kv, d_ff, heads, layers of the encoder and of the decoder: sizes that
# differ, so that no two axes can be mistaken for one another.
T5_1_1 = T5Config(40, 12, 5, 20, 3, 4, 2)
T5_1_0 = dataclasses.replace(
    T5_1_1, feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True
)

# Of one layer: m2l's name -> T5X's name.
ENCODER_LAYER = {
    "pre_self_attention_norm": "pre_attention_layer_norm/scale",
    "self_attention/query": "attention/query/kernel",
    "self_attention/key": "attention/key/kernel",
    "self_attention/value": "attention/value/kernel",
    "self_attention/out": "attention/out/kernel",
    "pre_mlp_norm": "pre_mlp_layer_norm/scale",
}
DECODER_LAYER = {
    "pre_self_attention_norm": "pre_self_attention_layer_norm/scale",
    "self_attention/query": "self_attention/query/kernel",
    "self_attention/key": "self_attention/key/kernel",
    "self_attention/value": "self_attention/value/kernel",
    "self_attention/out": "self_attention/out/kernel",
    "pre_cross_attention_norm": "pre_cross_attention_layer_norm/scale",
    "cross_attention/query": "encoder_decoder_attention/query/kernel",
    "cross_attention/key": "encoder_decoder_attention/key/kernel",
    "cross_attention/value": "encoder_decoder_attention/value/kernel",
    "cross_attention/out": "encoder_decoder_attention/out/kernel",
    "pre_mlp_norm": "pre_mlp_layer_norm/scale",
}
GATED = {"mlp/wi_0": "mlp/wi_0/kernel", "mlp/wi_1": "mlp/wi_1/kernel", "mlp/wo": "mlp/wo/kernel"}
PLAIN = {"mlp/wi": "mlp/wi/kernel", "mlp/wo": "mlp/wo/kernel"}

RANDOM = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)


def stacks(config):
    mlp = PLAIN if config.feed_forward_proj == "relu" else GATED
    yield "encoder", config.num_encoder_layers, ENCODER_LAYER | mlp
    yield "decoder", config.num_decoder_layers, DECODER_LAYER | mlp


def parameters(config, draw=RANDOM):
    """What an m2l model of these sizes has: name -> float32 array."""
    c, joined = config, config.num_heads * config.d_kv
    kernels = {"out": (joined, c.d_model), "wo": (c.d_ff, c.d_model)}
    kernels |= dict.fromkeys(("query", "key", "value"), (c.d_model, joined))
    kernels |= dict.fromkeys(("wi", "wi_0", "wi_1"), (c.d_model, c.d_ff))
    shapes = {"token_embedder": (c.vocab_size, c.d_model)}
    for stack, count, layer in stacks(c):
        shapes[f"{stack}/relpos_bias"] = (c.num_heads, 32)
        shapes[f"{stack}/norm"] = (c.d_model,)
        for name in (f"layers_{i:02}/{ours}" for i in range(count) for ours in layer):
            shapes[f"{stack}/{name}"] = kernels.get(name.split("/")[-1], (c.d_model,))
    if not c.tie_word_embeddings:
        shapes["decoder/logits"] = (c.d_model, c.vocab_size)
    return {name: draw(shape) for name, shape in shapes.items()}


def apart(config, theirs, array):
    """An attention kernel as scalable_t5 has it, its heads apart; what is none stays as it is."""
    if "attention/" not in theirs:
        return array
    heads = config.num_heads, config.d_kv
    shape = (*heads, config.d_model) if theirs.endswith("out/kernel") else (config.d_model, *heads)
    return array.reshape(shape)


def arrange(config, params, layout):
    """The parameters by T5X's names: of examples/t5 ("t5"), or of scalable_t5 with or without scan.

    Returns:
        {"encoder/layers_0/attention/query/kernel": array}.
    """
    target = {"token_embedder/embedding": params["token_embedder"]}
    for stack, count, layer in stacks(config):
        target[f"{stack}/{stack}_norm/scale"] = params[f"{stack}/norm"]
        table = params[f"{stack}/relpos_bias"]
        if layout == "t5":
            target[f"{stack}/relpos_bias/rel_embedding"] = table
        elif layout == "unscanned":
            for i in range(count):
                target[f"{stack}/layers_{i}/relpos_bias/rel_embedding"] = table.copy()
        else:
            stacked = np.stack([table] * count, axis=1)
            target[f"{stack}/{stack}/relpos_bias/rel_embedding"] = stacked
        for ours, theirs in layer.items():
            arrays = [params[f"{stack}/layers_{i:02}/{ours}"] for i in range(count)]
            if layout != "t5":
                arrays = [apart(config, theirs, array) for array in arrays]
            if layout == "scanned":
                target[f"{stack}/{stack}/{theirs}"] = np.stack(arrays, axis=1)
            else:
                for i, array in enumerate(arrays):
                    target[f"{stack}/layers_{i}/{theirs}"] = array
    if not config.tie_word_embeddings:
        target["decoder/logits_dense/kernel"] = params["decoder/logits"]
    return target


def state_of(target):
    """An optimizer's state: Adafactor's, in part."""
    slots = {f"{name}/v": array[:1] for name, array in target.items()}
    return {"step": np.int32(9), "param_states": checkpoints.unflatten(slots)}


def write_msgpack(directory, content):
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(content))


def legacy(directory, target, *, dtype=None, inline=(), driver="file", version=3):
    """Writes T5X's own format; `inline` are the parameters that are not partitioned."""
    directory.mkdir(parents=True)
    described = {}
    for name, array in {f"target/{name}": array for name, array in target.items()}.items():
        if name.removeprefix("target/") in inline:
            described[name] = array
            continue
        # In at least two chunks, where T5X aims at 64 MiB; T5X's casts to save_dtype on writing.
        chunks = [-(-array.shape[0] // 2), *array.shape[1:]]
        stored = np.dtype(dtype or array.dtype).name
        metadata = {"compressor": {"id": "gzip"}, "shape": array.shape, "chunks": chunks}
        kvstore = {"driver": "file", "path": name.replace("/", ".")}
        spec = {"driver": "zarr", "dtype": stored, "kvstore": kvstore, "metadata": metadata}
        relative = ts.Spec(spec).to_json()
        spec["kvstore"] = kvstore | {"path": f"{directory}/{kvstore['path']}"}
        casting = {"driver": "cast", "base": spec, "dtype": array.dtype.name}
        ts.open(casting, create=True, open=True).result().write(array).result()
        relative["kvstore"] |= {"driver": driver}
        if driver == "gcs":
            relative["kvstore"]["bucket"] = "t5x-dummy-bucket"
        described[name] = relative
    state = {"target": checkpoints.unflatten(described)["target"], "state": state_of(target)}
    write_msgpack(directory, {"version": version, "optimizer": state})
    return directory


def orbax(model_dir, target, *, step=9, use_ocdbt=True):
    """Writes the format of T5X's Orbax manager, whose handler uses OCDBT."""
    manager = ocp.CheckpointManager(
        model_dir,
        item_handlers={"state": ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)},
        options=ocp.CheckpointManagerOptions(step_prefix="checkpoint"),
    )
    tree = {"target": checkpoints.unflatten(target), "state": state_of(target), "flax_mutables": {}}
    manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    manager.close()
    return model_dir / f"checkpoint_{step}"


def with_placeholders(directory, target, inline=()):
    """Describes an Orbax checkpoint by a msgpack, as Orbax did before it had _METADATA."""
    (directory / "state" / "_METADATA").unlink()
    described = {f"target/{name}": target[name] for name in inline}
    for name in target.keys() - set(inline):
        described[f"target/{name}"] = f"PLACEHOLDER://target.{name.replace('/', '.')}"
    step = {"step": "PLACEHOLDER://state.step"}
    write_msgpack(directory / "state", {"state": step, **checkpoints.unflatten(described)})
    return directory


def convert(source, out, **options):
    manifest = t5x.import_checkpoint(source, out, vocabulary=VOCABULARY, **options)
    return manifest, checkpoints.flatten(checkpoints.restore(out))


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def params():
    return parameters(T5_1_1)


@pytest.fixture(scope="module")
def target(params):
    return arrange(T5_1_1, params, "t5")


@pytest.mark.parametrize("layout", ["t5", "unscanned", "scanned"])
@pytest.mark.parametrize("config", [T5_1_1, T5_1_0], ids=["T5 1.1", "T5 1.0"])
def test_every_layout_gives_the_arrays_it_was_made_from(tmp_path, config, layout):
    params = parameters(config)
    source = legacy(tmp_path / "checkpoint_7", arrange(config, params, layout))
    assert t5x.infer_config(t5x.read(source)) == config
    manifest, found = convert(source, tmp_path / "out")
    assert_same(found, params)
    about = {"kind": "convert", "from": "t5x", "source": str(source), "step": 7}
    assert {**manifest.made_by, "key": None} == about | {"key": None}


@pytest.mark.parametrize("layout", ["t5", "scanned"])
@pytest.mark.parametrize("use_ocdbt", [True, False], ids=["ocdbt", "directories"])
@pytest.mark.parametrize("described", ["metadata", "placeholders"])
def test_orbax_checkpoints_are_read(tmp_path, params, layout, use_ocdbt, described):
    target = arrange(T5_1_1, params, layout)
    source = orbax(tmp_path / "run", target, use_ocdbt=use_ocdbt)
    if described == "placeholders":
        with_placeholders(source, target, inline=["encoder/encoder_norm/scale"])
    assert_same(convert(source, tmp_path / "out")[1], params)


@pytest.mark.parametrize("driver", ["file", "gfile", "gcs"])
def test_arrays_are_where_the_checkpoint_is_now_whatever_wrote_them(
    tmp_path, params, target, driver
):
    norms = [name for name in target if name.endswith("scale")]
    legacy(tmp_path / "there", target, driver=driver, inline=norms)
    source = (tmp_path / "there").rename(tmp_path / "here")
    manifest, found = convert(source, tmp_path / "out")
    assert_same(found, params)
    assert "step" not in manifest.made_by


def test_paths_beside_the_kvstore_are_read_as_old_versions_wrote_them(tmp_path, params, target):
    source = legacy(tmp_path / "x", target)
    content = serialization.msgpack_restore((source / "checkpoint").read_bytes())
    spec = content["optimizer"]["target"]["token_embedder"]["embedding"]
    spec["path"] = spec["kvstore"].pop("path")
    write_msgpack(source, content)
    assert_same(convert(source, tmp_path / "out")[1], params)


def test_bfloat16_stays_bfloat16_or_becomes_what_is_asked_for(tmp_path, params, target):
    source = legacy(tmp_path / "x", target, dtype=ml_dtypes.bfloat16)
    short = {name: array.astype(ml_dtypes.bfloat16) for name, array in params.items()}
    assert_same(convert(source, tmp_path / "bfloat16")[1], short)
    wide = {name: array.astype(np.float32) for name, array in short.items()}
    assert_same(convert(source, tmp_path / "float32", dtype=np.float32)[1], wide)


def test_bfloat16_of_version_2_was_stored_as_its_bits(tmp_path, params, target):
    bits = {
        name: array.astype(ml_dtypes.bfloat16).view(np.uint16) for name, array in target.items()
    }
    source = legacy(tmp_path / "x", bits, version=2)
    short = {name: array.astype(ml_dtypes.bfloat16) for name, array in params.items()}
    assert_same(convert(source, tmp_path / "out")[1], short)


def test_the_newest_whole_checkpoint_of_a_run_is_taken(tmp_path, target):
    for step in (9, 100, 20):
        legacy(tmp_path / f"checkpoint_{step}", target)
    shutil.copytree(tmp_path / "checkpoint_9", tmp_path / "checkpoint_500.tmp-1700000000")
    assert convert(tmp_path, tmp_path / "out")[0].made_by["step"] == 100


def test_a_config_may_be_given(tmp_path, target):
    config = dataclasses.replace(T5_1_1, model_type="mt5", relative_attention_max_distance=64)
    source = legacy(tmp_path / "x", target)
    manifest, _ = convert(source, tmp_path / "out", config=config)
    assert manifest.model["model_type"] == "mt5"
    assert manifest.model["relative_attention_max_distance"] == 64


def test_no_array_is_read_before_it_is_asked_for(tmp_path, target):
    source = legacy(tmp_path / "x", target)
    for chunk in source.glob("target.*/[0-9]*"):
        chunk.unlink()
    tensors = t5x.read(source)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: array.shape for name, array in target.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("layout", ["unscanned", "scanned"])
def test_layers_with_tables_of_their_own_are_refused(tmp_path, params, layout):
    target = arrange(T5_1_1, params, layout)
    if layout == "scanned":
        name = "decoder/decoder/relpos_bias/rel_embedding"
        target[name][2, 1, 5] += 1
    else:
        name = "decoder/layers_1/relpos_bias/rel_embedding"
        target[name][2, 5] += 1
    source = legacy(tmp_path / "x", target)
    with pytest.raises(CheckpointError, match=f"{name}: the layers have tables .* that differ"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda array: (array / "1.0").unlink(),
        lambda array: (array / "0.0").write_bytes((array / "0.0").read_bytes()[:50]),
        lambda array: (array / ".zarray").write_text("{"),
    ],
    ids=["no array", "no chunk", "truncated chunk", "damaged description"],
)
def test_missing_and_damaged_files_are_refused_by_the_arrays_name(tmp_path, target, damage):
    source = legacy(tmp_path / "x", target)
    damage(source / "target.encoder.layers_1.mlp.wo.kernel")
    with pytest.raises(CheckpointError, match=r"encoder/layers_1/mlp/wo/kernel.*") as caught:
        convert(source, tmp_path / "out")
    assert "is missing, truncated or damaged" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["manifest.ocdbt", "d"])
def test_a_damaged_database_is_refused(tmp_path, target, file):
    state = orbax(tmp_path / "run", target) / "state"
    for damaged in [state / file] if (state / file).is_file() else (state / file).iterdir():
        damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"checkpoint_9/state: .* cannot be read") as caught:
        convert(state.parent, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_arrays_that_a_t5_has_not_or_has_otherwise_are_refused_by_name(tmp_path, target):
    def refused(change, name, count):
        source = legacy(tmp_path / f"source{count}", change)
        with pytest.raises(CheckpointError) as caught:
            convert(source, tmp_path / "out")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)

    name = "decoder/layers_1/encoder_decoder_attention/key/kernel"
    without = {key: array for key, array in target.items() if key != name}
    refused(without, name, 0)
    refused(target | {"decoder/layers_1/adapter/kernel": np.ones(3, np.float32)}, "adapter", 1)
    refused(target | {name: target[name][:-1]}, name, 2)
    refused(target | {name: target[name].astype(np.int32)}, name, 3)
    for count, name in enumerate(("token_embedder/embedding", "encoder/layers_0/mlp/wo/kernel"), 4):
        refused({key: array for key, array in target.items() if key != name}, name, count)


def test_a_shape_that_no_machine_holds_is_refused_before_it_is_allocated(tmp_path, target):
    source = legacy(tmp_path / "x", target)
    file = source / "target.token_embedder.embedding" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [10**12, 12]}))
    with pytest.raises(CheckpointError, match=r"token_embedder/embedding.* this machine's memory"):
        t5x.read(source)["token_embedder/embedding"].read()


def test_layers_stacked_along_another_axis_are_refused(tmp_path, params):
    target = {
        name: np.moveaxis(array, 1, 0) if name.startswith("encoder/encoder/") else array
        for name, array in arrange(T5_1_1, params, "scanned").items()
    }
    with pytest.raises(CheckpointError, match="only layers stacked along axis 1"):
        convert(legacy(tmp_path / "x", target), tmp_path / "out")


def test_memory_stays_within_three_times_the_largest_array_and_half_a_gibibyte(tmp_path):
    config = T5Config(1 << 16, 512, 8, 8192, 1, 8, 8)
    ones = parameters(config, lambda shape: np.broadcast_to(np.float32(1), shape))
    target = arrange(config, ones, "scanned")
    sizes = [array.nbytes for array in target.values()]
    allowed = 3 * max(sizes) + (512 << 20)
    assert sum(sizes) > allowed
    source = legacy(tmp_path / "x", target)
    program = f"""
import pathlib
from m2l.checkpoints import t5x
t5x.import_checkpoint({str(source)!r}, {str(tmp_path / "out")!r}, vocabulary={VOCABULARY})
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    # Not getrusage: its maximum counts what the process that forked held.
    environment = os.environ | {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) << 10 < allowed


@pytest.mark.parametrize("layout", ["t5", "scanned"])
def test_t5x_checkpoints_merge_to_what_their_conversions_merge_to(tmp_path, layout):
    rng, experts = np.random.default_rng(1), []
    for name in ("base", "one", "two"):
        draw = functools.partial(rng.standard_normal, dtype=np.float32)
        target = arrange(T5_1_1, parameters(T5_1_1, draw), layout)
        legacy(tmp_path / name / "checkpoint_9", target)
        convert(tmp_path / name, tmp_path / f"ours_{name}")
        experts.append(tmp_path / name)
    recipe = merging.Recipe("dare_ties", drop_rate=0.4, density=0.5, seed=1)
    base, *experts = experts
    found = merging.merge(
        base, experts, recipe, tmp_path / "out", vocabulary=VOCABULARY, progress=False
    )
    ours = [tmp_path / f"ours_{path.name}" for path in experts]
    wanted = merging.merge(tmp_path / "ours_base", ours, recipe, tmp_path / "wanted")
    assert found.parameters == wanted.parameters
    assert found.model == wanted.model
    with pytest.raises(MergeError, match="its vocabulary is not known to m2l"):
        merging.merge(base, experts, recipe, tmp_path / "unused")


@pytest.mark.parametrize("config", [T5_1_1, T5_1_0], ids=["1.1", "1.0"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_export_is_what_t5x_writes(tmp_path, config, dtype):
    params = parameters(config)
    about = {"model": models.to_dict(config), "vocabulary": VOCABULARY, "made_by": {}}
    checkpoints.save(tmp_path / "own", checkpoints.unflatten(params), **about, step=9)
    out = t5x.export_checkpoint(tmp_path / "own", tmp_path / "checkpoint_9", dtype=dtype)
    golden = legacy(tmp_path / "golden", arrange(config, params, "t5"), dtype=dtype)
    ours, theirs = (
        serialization.msgpack_restore((path / "checkpoint").read_bytes()) for path in (out, golden)
    )
    assert (ours["version"], ours["optimizer"]["state"]["step"]) == (3, 9)
    leaves = [checkpoints.flatten(each["optimizer"]["target"]) for each in (ours, theirs)]
    for flat in leaves:
        # The shape of chunks is each writer's own choice.
        for name in [name for name in flat if "/chunks" in name]:
            del flat[name]
    assert leaves[0] == leaves[1]
    for name, tensor in t5x.read(golden).items():
        assert t5x.read(out)[name].read().tobytes() == tensor.read().tobytes()
    imported = t5x.import_checkpoint(out, tmp_path / "back", vocabulary=VOCABULARY)
    assert imported.parameters.keys() == params.keys()


def test_only_a_t5_is_exported(tmp_path):
    config = models.LlamaConfig(40, 8, 16, 1, 2, 1, 4)
    params = models.init(config, jax.random.key(0))
    about = {"model": models.to_dict(config), "vocabulary": VOCABULARY, "made_by": {}}
    checkpoints.save(tmp_path / "own", params, **about)
    with pytest.raises(UnsupportedModelError, match="a llama; T5X's checkpoints are of T5s"):
        t5x.export_checkpoint(tmp_path / "own", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_t5x_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such directory"):
        t5x.read(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="not a T5X checkpoint: neither"):
        t5x.read(tmp_path)
    (tmp_path / "state").mkdir()
    with pytest.raises(CheckpointError, match="it holds no parameters"):
        t5x.read(tmp_path)


def nested(depth):
    return b"\x81\xa1a" * depth + b"\x80"


def leaf(value):
    target = {"token_embedder": {"embedding": value}}
    content = {"version": 3, "optimizer": {"target": target, "state": {}}}
    return serialization.msgpack_serialize(content)


def spec(path):
    kvstore = {"driver": "file", "path": path}
    return leaf({"driver": "zarr", "kvstore": kvstore, "metadata": {}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, damaged or not"),
        (b"model_checkpoint_path: 'x'", "a TensorFlow checkpoint; .*convert_tf_checkpoint"),
        (b"\x80\x04K\x01.", "truncated, damaged or not"),
        (leaf(np.ones(9, np.float32))[:-1], "truncated, damaged or not"),
        (nested(980), "truncated, damaged or not|has no 'target'"),
        (nested(100_000), "truncated, damaged or not"),
        (b"\x81\xa6target" + nested(900), "more than 32 names deep"),
        (b"\x81\xa6target\x81\xa1a" + b"\x91" * 900 + b"\xc0", "expected an array, found a list"),
        (msgpack.packb([1]), "has no 'target'"),
        (msgpack.packb({"version": 3, "optimizer": {"state": {}}}), "has no 'target'"),
        (msgpack.packb({"version": 1, "optimizer": {}}), "version 1 of T5X's format"),
        (msgpack.packb({"version": [3], "optimizer": {}}), "version of type list of T5X's"),
        (msgpack.packb({"target": {}}), "holds no parameters"),
        (msgpack.packb({"target": {"a/b": 1}}), "'a/b' is not the name of a parameter"),
        (msgpack.packb({"target": {"a\nb": 1}}), r"'a\\nb' is not the name of a parameter"),
        (msgpack.packb({"target": {7: 1}}), "'7' is not the name of a parameter"),
        (msgpack.packb({"target": msgpack.ExtType(1, b"x")}), "truncated, damaged or not"),
        (leaf("hello"), "token_embedder/embedding: expected an array, found a str"),
        (leaf(None), "token_embedder/embedding: expected an array, found a NoneType"),
        (leaf(np.ones(9, np.int32)), "token_embedder/embedding: expected an array of floats"),
        (leaf("PLACEHOLDER://../x"), "expected the name of a directory next to it"),
        (spec("/etc/x"), "expected the name of a directory next to it, found '/etc/x'"),
        (spec("../other/x"), "expected the name of a directory next to it"),
        (spec(".."), "expected the name of a directory next to it"),
        (spec(7), "expected the name of a directory next to it"),
        (b"\xdc\xff\xff" + b"\xc0" * 65535, "max_array_len"),
        (
            b"\xdc\x04\x00" + (b"\xdc\x04\x00" + b"\x90" * 1024) * 1024,
            "more than 1,048,576 entries",
        ),
    ],
    ids=itertools.count(),
)
def test_a_msgpack_that_is_not_whole_or_not_honest_is_refused_in_one_line(
    tmp_path, content, message
):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        t5x.read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_msgpack_too_large_to_decode_is_refused(tmp_path):
    with open(tmp_path / "checkpoint", "wb") as file:
        os.truncate(file.fileno(), t5x._MSGPACK_BYTES + 1)
    with pytest.raises(CheckpointError, match="134,217,729 bytes, and at most 134,217,728"):
        t5x.read(tmp_path)
