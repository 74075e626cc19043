"""The files of a T5X checkpoint, and the arrays in them, without T5X or TensorFlow.

T5X has two formats. Its own is a msgpack file `checkpoint` {version, optimizer: {target, state}}
whose leaves are small arrays, or TensorStore specs of zarr arrays that lie beside it. Orbax's is a
folder `state` of the same arrays under the same dotted names, in directories or in one OCDBT
database; older versions of Orbax add a msgpack `checkpoint` of placeholders.
"""

import contextlib
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import tensorstore as ts
from flax import serialization

from m2l import storage
from m2l.checkpoints.importing import Tensor
from m2l.checkpoints.publishing import publishing
from m2l.checkpoints.pytrees import StoredArray
from m2l.checkpoints.streaming import blocks, in_parallel
from m2l.checkpoints.trees import unflatten
from m2l.checkpoints.zarr import chunk_shape
from m2l.errors import CheckpointError

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


def read(source: str | PathLike) -> dict[str, Tensor]:
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


def resolve(source: str | PathLike) -> Path:
    """The directory of the checkpoint that `source` means."""
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
    out: str | PathLike, arrays: Mapping[str, StoredArray], *, step: int, dtype: np.dtype | None
) -> Any:
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
    described: dict[str, Any] = {}
    with publishing(out, size) as staging:

        def convert(name: str) -> tuple[str, dict[str, Any]]:
            stored = arrays[name]
            array, kept = stored.read(), dtype or stored.dtype
            stored.check(stored.digest_of(array))
            path = f"target.{name.replace('/', '.')}"
            spec = {
                "driver": "zarr",
                "dtype": kept.name,
                "kvstore": storage.kvstore_spec(staging / path),
                "metadata": {
                    "compressor": {"id": "gzip"},
                    "shape": array.shape,
                    "chunks": chunk_shape(array.shape, kept.itemsize),
                },
            }
            store = ts.open(spec, create=True, open=True).result()
            cast = [block.reshape(-1) for block in blocks(array, kept, name)]
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
    """The parameters that a msgpack names: each an array, or the stored name of one."""
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
            # Where it was written says nothing about where it lies now; only the name is used.
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


def _stored_name(file: Path, name: str, path: Any) -> str:
    # A path that leads out of the checkpoint would have m2l read, and publish, any array here.
    stored = path.rstrip("/") if isinstance(path, str) else ""
    if not re.fullmatch(r"[\w.-]+", stored) or not stored.strip("."):
        raise CheckpointError(
            f"{file}: {name}: expected the name of a directory beside it, found "
            f"{f'{path!r:.60}' if isinstance(path, str) else f'a {type(path).__name__}'}"
        )
    return stored


def _kvstore(item: Path, name: str = "") -> dict[str, Any]:
    if (item / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": storage.kvstore_spec(item), "path": name}
    return storage.kvstore_spec(item / name.rstrip("/") if name else item)


def _spec(item: Path, stored: str) -> dict[str, Any]:
    # T5X's zarr has no fill value: a chunk that is not there is lost, and not all zeros.
    kvstore = _kvstore(item, f"{stored}/")
    return {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}


def _listed(item: Path) -> dict[str, str]:
    """The parameters of an Orbax item that no msgpack describes, with their stored names."""
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
        what = str(error).split(":")[0].lower().replace("_", " ")
        raise CheckpointError(
            f"{item}: {name} cannot be read ({what}): a file is missing, truncated or damaged; "
            "copy the checkpoint again"
        ) from error


def _tensor(item: Path, name: str, leaf: np.ndarray | ts.TensorStore) -> Tensor:
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
    found = [match for name in tensors if (match := pattern.fullmatch(name))]
    if not found or shared in tensors:
        return
    own = [tensors.pop(match[0]) for match in sorted(found, key=lambda m: int(m[2] or 0))]
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
            for i, of_layer in enumerate(table.swapaxes(0, 1) if table.ndim == 3 else [table]):
                first = of_layer if first is None else first
                if of_layer.shape != first.shape or of_layer.tobytes() != first.tobytes():
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


def _join_heads(name: str, leaf: Any) -> tuple[Any, tuple[int, ...]]:
    """The array, and the shape to give it; axes are moved before it is read, so without a copy."""
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
