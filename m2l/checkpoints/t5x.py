"""T5X checkpoints become m2l's, and m2l's become T5X's: what `m2l convert` does.

T5X has two T5s. `examples/t5` is the published one. `examples/scalable_t5` stacks its layers along
axis 1 ("encoder/encoder/..."), keeps the heads of attention kernels apart, and gives every layer a
table of position biases of its own.
"""

import contextlib
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np
import tensorstore as ts
from flax import serialization
from jax.typing import DTypeLike

from m2l import models, storage
from m2l.checkpoints import reading
from m2l.checkpoints.importing import Origin, Tensor, float_dtype, import_tensors
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.publishing import publishing
from m2l.checkpoints.pytrees import StoredArray, unflatten
from m2l.checkpoints.spans import blocks, in_parallel
from m2l.checkpoints.zarr import chunk_shape
from m2l.errors import CheckpointError, UnsupportedModelError
from m2l.models import T5Config
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, JsonObject

__all__ = ["export_checkpoint", "import_checkpoint", "infer_config", "origins", "read"]

Leaf = np.ndarray | ts.TensorStore

_LAYER_AXIS = 1

# m2l's name of a part of a layer -> T5X's, for the names that differ.
_NORMS = {
    "encoder": {
        "pre_self_attention_norm": "pre_attention_layer_norm",
        "pre_mlp_norm": "pre_mlp_layer_norm",
    },
    "decoder": {
        "pre_self_attention_norm": "pre_self_attention_layer_norm",
        "pre_cross_attention_norm": "pre_cross_attention_layer_norm",
        "pre_mlp_norm": "pre_mlp_layer_norm",
    },
}
_ATTENTIONS = {
    "encoder": {"self_attention": "attention"},
    "decoder": {
        "self_attention": "self_attention",
        "cross_attention": "encoder_decoder_attention",
    },
}


def import_checkpoint(
    source: PathLike,
    out: PathLike,
    *,
    vocabulary: Mapping[str, Json],
    config: T5Config | None = None,
    dtype: DTypeLike | None = None,
) -> Manifest:
    """Makes an m2l checkpoint of a T5X checkpoint's parameters, array by array.

    Args:
        source: A checkpoint_<step>, or the MODEL_DIR of a run, whose newest is taken.
        out: The checkpoint to make; must not exist.
        vocabulary: {"name", "size", "fingerprint"} of the one the model was trained with.
        config: What the model is; None: what `infer_config` finds.
        dtype: Of the parameters written; None: as they are stored.

    Returns:
        The manifest of `out`. Its made_by records the absolute path of the checkpoint, and the
        step that its name gives.

    Raises:
        CheckpointError: Not a T5X checkpoint; a file is missing or damaged; an array is missing,
            unknown or of another shape than the config says; or the layers have tables of position
            biases that differ, which no T5 of m2l has.
        ConfigError: The sizes found are not those of a T5.
        UnknownNameError: There is no such dtype.
    """
    directory = resolve(source)
    tensors = read(directory)
    config = infer_config(tensors) if config is None else config
    for name, tensor in tensors.items():
        if name.endswith("relpos_bias/rel_embedding"):
            tensor.read()  # So that layers whose tables differ are refused before the long copy.
    step = re.fullmatch(r"checkpoint_([0-9]+)", directory.name)
    made_by = {"kind": "convert", "from": "t5x", "source": str(directory)}
    return import_tensors(
        out,
        config,
        tensors,
        origins(config, tensors),
        source=directory,
        vocabulary=vocabulary,
        made_by=made_by | ({"step": int(step[1])} if step else {}),
        dtype=dtype,
        at_once=2,  # Three in memory, for the one being read is there twice.
    )


def export_checkpoint(
    source: PathLike, out: PathLike, *, dtype: DTypeLike | None = None
) -> AnyPath:
    """Makes a T5X checkpoint, in its own format and the names of examples/t5, of one of m2l's.

    It has no optimizer's state. Its digests are checked on the way.

    Args:
        source: A checkpoint or a training run.
        out: The checkpoint to make, as "MODEL_DIR/checkpoint_1000"; must not exist.
        dtype: "float32", "bfloat16" or "float16", to which parameters are cast; None keeps theirs.

    Returns:
        `out`, absolute.

    Raises:
        CheckpointError: The source is missing or damaged, has a value too large for `dtype`; or
            `out` exists.
        UnsupportedModelError: The model is no T5.
        UnknownNameError: There is no such dtype.
    """
    directory = reading.resolve(source)
    manifest = Manifest.read(directory)
    config = models.from_dict(manifest.model)
    if not isinstance(config, T5Config):
        raise UnsupportedModelError(
            f"{directory}: a {config.model_type}; T5X's checkpoints are of T5s: convert it "
            "--to huggingface"
        )
    cast = None if dtype is None else float_dtype(dtype)
    stored = reading.open_parameters(directory)
    arrays = {origin.tensor: stored[name] for name, origin in origins(config, {}).items()}
    return write(out, arrays, step=manifest.step, dtype=cast)


def infer_config(tensors: Mapping[str, Tensor]) -> T5Config:
    """Finds out which T5 the parameters that `read` gave are of.

    Sizes come from the shapes: heads and buckets from the encoder's relpos_bias, d_kv from the
    query's kernel, layers by counting. With mlp/wi_0 the MLP is gated, and then by the tanh form of
    GELU; otherwise it is a ReLU's. Without decoder/logits_dense the output is tied to the embedding
    and scaled. These are T5 1.1 (FLAN-T5, T0, mT5, ByT5) and T5 1.0. No array tells the rest, which
    is as published: epsilon 1e-6, distances up to 128, targets started by token 0. Give
    `import_checkpoint` a config where a model differs in these.

    Raises:
        CheckpointError: An array that a T5 has is missing or has another rank.
        ConfigError: The sizes are not those of a T5.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{name}: no such array in the checkpoint: it is not of a T5")
        stored = tensors[name].shape
        if len(stored) != rank or 0 in stored:
            raise CheckpointError(f"{name}: expected {rank} axes, found the shape {list(stored)}")
        return stored

    def layer_shape(stack: str, name: str, rank: int) -> tuple[int, ...]:
        """Returns the shape of the layers' array `name`, without the axis of layers."""
        if not _is_scanned(stack, tensors):
            return shape(f"{stack}/layers_0/{name}", rank)
        stored = shape(f"{stack}/{stack}/{name}", rank + 1)
        return stored[:_LAYER_AXIS] + stored[_LAYER_AXIS + 1 :]

    def layers(stack: str) -> int:
        if _is_scanned(stack, tensors):
            features, count = shape(f"{stack}/{stack}/pre_mlp_layer_norm/scale", 2)
            if features != d_model:
                raise CheckpointError(
                    f"{stack}/{stack}/pre_mlp_layer_norm/scale: expected the shape "
                    f"[{d_model}, layers], found {[features, count]}: only layers stacked along "
                    f"axis {_LAYER_AXIS} are read (T5X's param_scan_axis)"
                )
            return count
        # Counted, and not the highest plus one: a name may claim any number.
        return len({name.split("/")[1] for name in tensors if name.startswith(f"{stack}/layers_")})

    vocab_size, d_model = shape("token_embedder/embedding", 2)
    encoder_layers, decoder_layers = layers("encoder"), layers("decoder")
    heads, buckets = shape("encoder/relpos_bias/rel_embedding", 2)
    joined = layer_shape("encoder", "attention/query/kernel", 2)[1]
    if joined % heads:
        raise CheckpointError(
            f"encoder attention/query/kernel: its {joined} columns are no multiple of the {heads} "
            "heads of encoder relpos_bias"
        )
    tied = "decoder/logits_dense/kernel" not in tensors
    gated = any(name.endswith("/mlp/wi_0/kernel") for name in tensors)
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=joined // heads,
        d_ff=layer_shape("encoder", "mlp/wo/kernel", 2)[0],
        num_heads=heads,
        num_encoder_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,
        scale_decoder_outputs=tied,
    )


def origins(config: T5Config, tensors: Mapping[str, Tensor]) -> dict[str, Origin]:
    """Returns where each parameter of a model is among the tensors that `read` returned.

    Returns:
        m2l's name -> Origin, for every parameter of the config, whether its tensor is there or not.
        A parameter of stacked layers is a slice of axis 1.
    """
    gated = config.feed_forward_proj.startswith("gated")
    result = {"token_embedder": Origin("token_embedder/embedding")}
    for stack in _NORMS:
        scanned = _is_scanned(stack, tensors)
        count = config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers
        parts = {ours: f"{theirs}/scale" for ours, theirs in _NORMS[stack].items()}
        for ours, theirs in _ATTENTIONS[stack].items():
            for matrix in ("query", "key", "value", "out"):
                parts[f"{ours}/{matrix}"] = f"{theirs}/{matrix}/kernel"
        for matrix in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            parts[f"mlp/{matrix}"] = f"mlp/{matrix}/kernel"

        result[f"{stack}/relpos_bias"] = Origin(f"{stack}/relpos_bias/rel_embedding")
        if scanned:
            result |= {
                f"{stack}/layers_{i:02}/{ours}": Origin(
                    f"{stack}/{stack}/{theirs}", axis=_LAYER_AXIS, index=i
                )
                for ours, theirs in parts.items()
                for i in range(count)
            }
        else:
            result |= {
                f"{stack}/layers_{i:02}/{ours}": Origin(f"{stack}/layers_{i}/{theirs}")
                for i in range(count)
                for ours, theirs in parts.items()
            }
        result[f"{stack}/norm"] = Origin(f"{stack}/{stack}_norm/scale")
    if not config.tie_word_embeddings:
        result["decoder/logits"] = Origin("decoder/logits_dense/kernel")
    return result


def _is_scanned(stack: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(f"{stack}/{stack}/") for name in tensors)


_MSGPACK = "checkpoint"
_PLACEHOLDER = "PLACEHOLDER://"
_ZARR = "/.zarray"

# A file is decoded in one piece and may be anyone's: these bound what that costs. T5X's own files
# have some 30,000 entries, and hold only arrays that were not partitioned.
_MSGPACK_BYTES = 128 << 20
_MSGPACK_ENTRIES = 1 << 20
_DEPTH = 32

# TensorStore holds an array twice while it reads it, so one at a time.
_READING = threading.Lock()


def read(source: PathLike) -> dict[str, Tensor]:
    """Opens the parameters of a T5X checkpoint; the optimizer's state is left alone.

    What scalable_t5 keeps apart is joined as examples/t5 has it. The heads of attention kernels:
    [D, heads, K] becomes [D, heads * K], of stacked layers [D, layers, heads * K], and likewise
    `out`, [heads * K, layers, D]. The layers' tables of position biases: one for each stack,
    "encoder/relpos_bias/rel_embedding" [heads, buckets], whose `read` refuses layers that differ.

    Args:
        source: A checkpoint_<step>, or the MODEL_DIR of a run, whose newest is taken.

    Returns:
        T5X's name, "encoder/layers_0/attention/query/kernel", -> a Tensor in the floating dtype it
        is stored in. Arrays of their own are read only when `Tensor.read` is called, which raises
        CheckpointError naming the array if a file of it is missing or damaged.

    Raises:
        CheckpointError: Not a T5X checkpoint, or damaged; names the file or the array.
    """
    directory = resolve(source)
    item = directory / "state" if (directory / "state").is_dir() else directory
    file = item / _MSGPACK
    target = _described(file) if file.is_file() else _listed(item)
    context = ts.Context()
    opening = {
        name: ts.open(_spec(item, leaf), context=context, open=True, read=True)
        for name, leaf in target.items()
        if isinstance(leaf, str)
    }
    tensors = {}
    for name, leaf in target.items():
        if name in opening:
            with _naming(item, name):
                leaf = opening[name].result()
        tensors[name] = _tensor(item, name, leaf)
    if not tensors:
        raise CheckpointError(f"{item}: it holds no parameters (nothing under 'target')")
    for stack in ("encoder", "decoder"):
        _share_table(item, tensors, stack)
    return tensors


def resolve(source: PathLike) -> Path:
    """Returns the directory of the checkpoint that `source` means."""
    path = storage.path(source).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory; a T5X checkpoint is one")
    if (path / _MSGPACK).is_file() or (path / "state").is_dir():
        return path
    # Unfinished ones carry a further suffix.
    steps = {
        int(entry.name.removeprefix("checkpoint_")): entry
        for entry in path.glob("checkpoint_*")
        if re.fullmatch(r"checkpoint_[0-9]+", entry.name) and entry.is_dir()
    }
    if not steps:
        raise CheckpointError(
            f"{path}: not a T5X checkpoint: neither a file 'checkpoint' nor a folder 'state', and "
            "no checkpoint_<step> in it"
        )
    return resolve(steps[max(steps)])


def write(
    out: PathLike, arrays: Mapping[str, StoredArray], *, step: int, dtype: np.dtype | None
) -> AnyPath:
    """Writes a checkpoint in T5X's own format, version 3, whole or not at all.

    Args:
        out: Its directory; must not exist.
        arrays: T5X's name, "encoder/layers_0/attention/query/kernel" -> the array.
        step: The training step.
        dtype: What the arrays are cast to; None: theirs.

    Returns:
        `out`, absolute.

    Raises:
        CheckpointError: It exists, an array cannot be read, or a value is too large for `dtype`.
    """
    out = storage.path(out).absolute()
    size = sum(array.size * (dtype or array.dtype).itemsize for array in arrays.values())
    described: JsonObject = {}
    with publishing(out, size) as staging:

        def convert(name: str) -> tuple[str, JsonObject]:
            stored = arrays[name]
            array, stored_as = stored.read(), dtype or stored.dtype
            stored.check(stored.digest_of(array))
            path = f"target.{name.replace('/', '.')}"
            spec = {
                "driver": "zarr",
                "dtype": stored_as.name,
                "kvstore": storage.kvstore_spec(staging / path),
                "metadata": {
                    "compressor": {"id": "gzip"},
                    "shape": array.shape,
                    "chunks": chunk_shape(array.shape, stored_as.itemsize),
                },
            }
            store = ts.open(spec, create=True, open=True).result()
            cast = [block.reshape(-1) for block in blocks(array, stored_as, name)]
            store.write(np.concatenate(cast).reshape(array.shape)).result()
            relative = ts.Spec(spec).to_json()
            # T5X reads arrays relative to the checkpoint, wherever that is.
            relative["kvstore"] = {"driver": "file", "path": f"{path}/"}
            return name, relative

        in_parallel(convert, arrays, lambda done: described.update([done]))
        state = {"step": np.int32(step), "param_states": {}}
        content = {
            "version": 3,
            "optimizer": {"target": unflatten(dict(sorted(described.items()))), "state": state},
        }
        (staging / _MSGPACK).write_bytes(serialization.msgpack_serialize(content))
    return out


def _described(file: Path) -> dict[str, np.ndarray | str]:
    """Returns the parameters that a msgpack names: each an array, or the stored name of one."""
    if (size := storage.size(file)) > _MSGPACK_BYTES:
        raise CheckpointError(
            f"{file}: {size:,} bytes, and at most {_MSGPACK_BYTES:,} are read: T5X keeps large "
            "arrays in directories of their own"
        )
    content = file.read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise CheckpointError(
            f"{file}: a TensorFlow checkpoint; T5X's scripts/convert_tf_checkpoint.py makes a T5X "
            "one of it"
        )
    try:
        _check_size(content)
        tree = serialization.msgpack_restore(content)
    except Exception as error:  # What flax raises on a file that is not its own has no one type.
        raise CheckpointError(
            f"{file}: truncated, damaged or not a checkpoint's msgpack "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if isinstance(tree, dict) and "optimizer" in tree:
        version = tree.get("version")
        if type(version) is not int or version not in (2, 3):
            which = version if type(version) is int else f"of type {type(version).__name__}"
            raise CheckpointError(
                f"{file}: written in version {which} of T5X's format; 2 and 3 are read"
            )
        tree = tree["optimizer"]
    if not isinstance(tree, dict) or not isinstance(tree.get("target"), dict):
        raise CheckpointError(f"{file}: not a T5X checkpoint: it has no 'target'")
    return dict(_leaves(file, tree["target"], ""))


def _check_size(content: bytes) -> None:
    """Raises ValueError if a msgpack would become too many objects; keeps none of them."""
    entries = 0

    def count(container: dict | list) -> None:
        nonlocal entries
        entries += len(container) + 1
        if entries > _MSGPACK_ENTRIES:
            raise ValueError(f"it has more than {_MSGPACK_ENTRIES:,} entries")

    msgpack.unpackb(
        content,
        object_hook=count,
        list_hook=count,
        ext_hook=lambda code, data: None,
        strict_map_key=False,
        max_array_len=1 << 10,
        max_map_len=1 << 16,
    )


def _leaves(file: Path, tree: Mapping, above: str) -> Iterator[tuple[str, np.ndarray | str]]:
    for key, value in tree.items():
        name = f"{above}{key}"
        if not isinstance(key, str) or not re.fullmatch(r"[\w-]+", key):
            raise CheckpointError(f"{file}: {name!r:.200} is not the name of a parameter")
        if name.count("/") > _DEPTH:
            raise CheckpointError(f"{file}: {name}: more than {_DEPTH} names deep")
        if isinstance(value, dict) and value.keys() >= {"driver", "kvstore", "metadata"}:
            # Where it was written says nothing about where it is now; only the name is used.
            kvstore = value["kvstore"] if isinstance(value["kvstore"], dict) else {}
            yield name, _stored_name(file, name, kvstore.get("path", value.get("path")))
        elif isinstance(value, dict):
            yield from _leaves(file, value, f"{name}/")
        elif isinstance(value, str) and value.startswith(_PLACEHOLDER):
            yield name, _stored_name(file, name, value.removeprefix(_PLACEHOLDER))
        elif isinstance(value, np.ndarray | np.generic):
            yield name, np.asarray(value)
        else:
            raise CheckpointError(
                f"{file}: {name}: expected an array, found a {type(value).__name__}"
            )


def _stored_name(file: Path, name: str, path: AnyPath) -> str:
    # A path that leads out of the checkpoint would have m2l read, and publish, any array here.
    stored = path.rstrip("/") if isinstance(path, str) else ""
    if not re.fullmatch(r"[\w.-]+", stored) or not stored.strip("."):
        raise CheckpointError(
            f"{file}: {name}: expected the name of a directory next to it, found "
            f"{f'{path!r:.60}' if isinstance(path, str) else f'a {type(path).__name__}'}"
        )
    return stored


def _kvstore(item: Path, name: str = "") -> JsonObject:
    if (item / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": storage.kvstore_spec(item), "path": name}
    return storage.kvstore_spec(item / name.rstrip("/") if name else item)


def _spec(item: Path, stored: str) -> JsonObject:
    # T5X's zarr has no fill value: a chunk that is not there is lost, and not all zeros.
    kvstore = _kvstore(item, f"{stored}/")
    return {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}


def _listed(item: Path) -> dict[str, str]:
    """Returns the parameters of an Orbax item without a msgpack, with their stored names."""
    with _naming(item, "the list of its arrays"):
        store = ts.KvStore.open(_kvstore(item)).result()
        keys = store.list(ts.KvStore.KeyRange("target.", "target/")).result()
    names = sorted(key.decode(errors="replace") for key in keys)
    stored = [name.removesuffix(_ZARR) for name in names if name.endswith(_ZARR)]
    for name in stored:
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)+", name):
            raise CheckpointError(f"{item}: {name!r} is not the name of a parameter")
    return {name.removeprefix("target.").replace(".", "/"): name for name in stored}


@contextlib.contextmanager
def _naming(item: Path, name: str) -> Iterator[None]:
    """Turns TensorStore's errors into one line that names the array."""
    try:
        yield
    except ValueError as error:
        reason = str(error).split(":")[0].lower().replace("_", " ")
        raise CheckpointError(
            f"{item}: {name} cannot be read ({reason}): a file is missing, truncated or damaged; "
            "copy the checkpoint again"
        ) from error


def _tensor(item: Path, name: str, leaf: Leaf) -> Tensor:
    stored = isinstance(leaf, ts.TensorStore)
    dtype = leaf.dtype.numpy_dtype if stored else leaf.dtype
    # Version 2 stored the bits of bfloat16 as uint16.
    native = np.dtype(ml_dtypes.bfloat16) if dtype == np.uint16 else dtype
    if native not in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        raise CheckpointError(f"{item}: {name}: expected an array of floats, found {dtype}")
    leaf, shape = _join_heads(name, leaf)

    def load() -> np.ndarray:
        # TensorStore ends the process when it gets no memory, whatever a damaged shape asks for.
        if (size := math.prod(shape) * native.itemsize) > _memory():
            raise CheckpointError(
                f"{item}: {name}: {list(shape)} is {size:,} bytes, more than this machine's memory"
            )
        with _READING, _naming(item, name):
            return (leaf.read().result() if stored else leaf).view(native).reshape(shape)

    return Tensor(name=name, shape=shape, dtype=native, read=load)


def _share_table(item: Path, tensors: dict[str, Tensor], stack: str) -> None:
    """Puts one table of position biases where a stack's layers have one each."""
    shared = f"{stack}/relpos_bias/rel_embedding"
    pattern = re.compile(rf"{stack}/({stack}|layers_([0-9]+))/relpos_bias/rel_embedding")
    matches = [match for name in tensors if (match := pattern.fullmatch(name))]
    if not matches or shared in tensors:
        return
    own = [tensors.pop(match[0]) for match in sorted(matches, key=lambda m: int(m[2] or 0))]
    for tensor in own:
        rank = 3 if tensor.name.startswith(f"{stack}/{stack}/") else 2
        if len(tensor.shape) != rank or 0 in tensor.shape:
            raise CheckpointError(
                f"{item}: {tensor.name}: expected {rank} axes, found the shape {list(tensor.shape)}"
            )

    def load() -> np.ndarray:
        first = None
        for tensor in own:
            table = tensor.read()
            for i, layer in enumerate(table.swapaxes(0, 1) if table.ndim == 3 else [table]):
                first = layer if first is None else first
                if layer.shape != first.shape or layer.tobytes() != first.tobytes():
                    which = f" (layer {i} from layer 0)" if table.ndim == 3 else ""
                    raise CheckpointError(
                        f"{item}: {tensor.name}: the layers have tables of position biases that "
                        f"differ{which}: this is not the published T5, whose layers share one, and "
                        "m2l has no such network"
                    )
        return first

    shape = (own[0].shape[0], own[0].shape[-1])
    tensors[shared] = Tensor(name=shared, shape=shape, dtype=own[0].dtype, read=load)


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _join_heads(name: str, leaf: Leaf) -> tuple[Leaf, tuple[int, ...]]:
    """Returns the array, its axes moved before it is read, and its shape with joined heads."""
    kernel = re.fullmatch(r"(\w+)/(\w+)/\w*attention/(query|key|value|out)/kernel", name)
    shape = tuple(leaf.shape)
    scanned = kernel is not None and kernel[2] == kernel[1]
    if kernel is None or len(shape) != 3 + scanned:
        return leaf, shape
    if kernel[3] != "out":
        return leaf, (*shape[:-2], shape[-2] * shape[-1])
    if scanned:  # [heads, layers, K, D]
        leaf = leaf.transpose((0, 2, 1, 3))
        shape = tuple(leaf.shape)
    return leaf, (shape[0] * shape[1], *shape[2:])
