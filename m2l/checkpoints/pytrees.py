"""Pytrees that Orbax stored: any of its versions and layouts, opened leaf by leaf for reading."""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.typing import DTypeLike

from m2l import files, storage
from m2l.checkpoints import digest
from m2l.checkpoints.publishing import UNFINISHED
from m2l.checkpoints.spans import Extents, Piece, Span, is_array_shape, is_run, run_indices
from m2l.errors import CheckpointError
from m2l.storage import AnyPath
from m2l.typing import Json, JsonObject, Params, PyTree

if TYPE_CHECKING:
    import tensorstore as ts


METADATA = "_METADATA"
STRINGS = "_strings.json"
COMMITTED = "commit_success.txt"
"""On object storage, what tells that a checkpoint is finished."""

_UNFINISHED = ".orbax-checkpoint-tmp"
_STEP = re.compile(r"(?:.*_)?(\d+)")
# Names of items that hold a model, where a step has several.
_ITEMS = ("params", "state", "items", "default", "pytree", "model_params", "model")

ADVICE = "copy the checkpoint again or make it anew"
_CACHE_BYTES = 64 << 20

_ARRAY = "np.ndarray"

# Of an array with more chunks than this in local files, the files are not listed in memory.
_MOST_PIECES = 1 << 16
# An array of more bytes is read only when its last chunk is there: its shape may be damaged.
_PROBED_BYTES = 1 << 30

# The bytes that zarr's sharding_indexed codec adds to a chunk of one part: its place and size, and
# a CRC of these.
_INDEX_BYTES = 20

Tree = dict[str, JsonObject]
"""Orbax's description of a pytree: name -> {"key_metadata", "value_metadata"} of a leaf or of an
empty node."""


@functools.cache
def context() -> "ts.Context":
    """Returns the TensorStore context, with its cache of decoded chunks, that all reads share."""
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array of an Orbax item; a `TensorReader`, which any number of threads may read.

    Attributes:
        item: The item's directory.
        name: As "a/b/c".
        store: The array in TensorStore.
        chunk: The boxes in which it is stored; None where rows follow one another in local files.
        extents: Where the elements are then; None otherwise.
        digest: What its manifest records, for `check`: 32 hexadecimal digits of
            `checkpoints.digest`, or 64 of SHA-256; None where there is none.
    """

    item: AnyPath
    name: str
    store: "ts.TensorStore"
    chunk: tuple[int, ...] | None
    extents: Extents | None
    digest: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.store.shape)

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, of the dtype and the span's size.

        Raises:
            CheckpointError: A file or chunk is missing, truncated or damaged.
        """
        if self.extents is not None:
            self.extents.read_span(span, out)
        elif span.index is not None:
            self._result(self.store[span.index].read(), out.reshape(self.store[span.index].shape))
        else:
            self.read_into(span.start, span.start + span.size, out)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Reads the row-major elements [start, stop) into `out`; errors as `read_span`'s."""
        if self.extents is not None:
            self.extents.read_into(out, start)
            return
        parts = [
            (out[first - start : last - start], self.store[index].read())
            for index, first, last in run_indices(self.shape, start, stop)
        ]
        for part, future in parts:
            self._result(future, part)

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads the array, or a box of it; errors as `read_span`'s."""
        store = self.store if index is None else self.store[index]
        _check_memory(self.item, self.name, store.shape, self.dtype)
        if math.prod(store.shape) * self.dtype.itemsize > _PROBED_BYTES:
            last = store[tuple(slice(end - 1, end) for end in store.domain.exclusive_max)]
            self._result(last.read(), np.empty(last.shape, self.dtype))
        out = np.empty(store.shape, self.dtype)
        start = self._run_start(store)
        if self.extents is not None and start is not None:
            self.extents.read_into(out.reshape(-1), start)
        else:
            self._result(store.read(), out)
        return out

    def _run_start(self, box: "ts.TensorStore") -> int | None:
        """Returns where the elements of a box begin if they follow one another in the array."""
        shape, origin = self.shape, box.domain.inclusive_min
        if not is_run(shape, tuple(box.shape)):
            return None
        return sum(o * math.prod(shape[axis + 1 :]) for axis, o in enumerate(origin))

    def place(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """Reads the array onto devices; each process reads what its own devices hold, once."""
        boxes: dict[tuple, np.ndarray] = {}

        def read(index: tuple[slice, ...]) -> np.ndarray:
            key = tuple((axis.start, axis.stop) for axis in index)
            if key not in boxes:
                boxes[key] = self.read(index)
            return boxes[key]

        return jax.make_array_from_callback(self.shape, sharding, read)

    def digest_of(self, array: np.ndarray) -> str:
        """Returns the digest, in hex, of an array, of the kind that the manifest records."""
        if self.digest is None or digest.is_digest(self.digest):
            return digest.to_hex(digest.of_numpy(array))
        return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()

    def check(self, actual: str) -> None:
        """Raises CheckpointError unless a digest, in hex, is the one that the manifest records."""
        if self.digest is not None and actual != self.digest:
            raise CheckpointError(
                f"{self.item}: {self.name} is damaged: its bytes do not have the digest that the "
                f"manifest records; {ADVICE}"
            )

    def verify(self) -> None:
        """Reads the array in blocks and compares its digest with the manifest's.

        Raises:
            CheckpointError: It is another, or a file or chunk cannot be read.
        """
        if self.digest is None or digest.is_digest(self.digest):
            self.check(digest.to_hex(digest.of_stored(self)))
            return
        self.check(digest.sha256_of_stored(self))

    def _result(self, future: "ts.Future", out: np.ndarray) -> None:
        try:
            out[...] = future.result().reshape(out.shape)
        except ValueError as error:
            raise _damaged(self.item, self.name, error) from error


@dataclasses.dataclass(frozen=True)
class Pytree:
    """A pytree that Orbax stored.

    Attributes:
        item: Its directory.
        arrays: Its arrays by name, keys joined by "/", in the tree's order.
        tree: Orbax's description of all its nodes, by name.
        strings: Its leaves that are texts, by name.
    """

    item: AnyPath
    arrays: Mapping[str, StoredArray]
    tree: Tree
    strings: Mapping[str, str]


def find_item(path: AnyPath) -> AnyPath:
    """Returns the directory of the pytree that a path means.

    Args:
        path: An item, a checkpoint of several items, or a folder of steps, of which the newest
            finished one is meant; a local or remote path.

    Raises:
        CheckpointError: There is no finished checkpoint.
    """
    if _UNFINISHED in path.name:
        raise CheckpointError(f"{path}: unfinished: Orbax was writing it; name a finished step")
    if (path / METADATA).is_file():
        _check_committed(path if (path / COMMITTED).is_file() else path.parent)
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    entries = sorted(entry for entry in path.iterdir() if entry.is_dir())
    items = {entry.name: entry for entry in entries if (entry / METADATA).is_file()}
    if items:
        _check_committed(path)
        name = next((name for name in _ITEMS if name in items), None)
        if name is None and len(items) > 1:
            raise CheckpointError(
                f"{path}: it has the items {', '.join(sorted(items))}: name one of them as "
                f"{path / min(items)}"
            )
        return items[name or next(iter(items))]
    steps = {int(m[1]): e for e in entries if (m := _STEP.fullmatch(e.name))}
    finished = {number: e for number, e in steps.items() if is_committed(e)}
    if finished:
        return find_item(finished[max(finished)])
    unfinished = [e.name for e in entries if _UNFINISHED in e.name or e in steps.values()]
    reason = f"only unfinished ones ({unfinished[-1]})" if unfinished else "no steps"
    raise CheckpointError(f"{path}: no finished checkpoint: {reason}, and no {METADATA} of Orbax")


def is_committed(step: AnyPath) -> bool:
    """Returns whether Orbax has finished a step; on object storage a file says so."""
    if isinstance(step, Path):
        return True
    return (step / COMMITTED).is_file() and not (step / UNFINISHED).is_file()


def _check_committed(path: AnyPath) -> None:
    if not is_committed(path):
        raise CheckpointError(
            f"{path}: unfinished: {COMMITTED} is missing; name a finished checkpoint"
        )


def open_pytree(item: AnyPath, subtree: str | None = None) -> Pytree:
    """Opens an item; nothing but metadata is read yet.

    Args:
        item: Its directory, as `find_item` returns it.
        subtree: The part of the tree that is meant, as "a/b"; None: all. Names do not have it.

    Raises:
        CheckpointError: It is damaged, an array is missing, or there is no such subtree.
    """
    metadata = files.read_json(item / METADATA, kind=dict, error=CheckpointError, advice=ADVICE)
    nodes = _nodes(item / METADATA, metadata)
    depth = 0
    if subtree:
        prefix = tuple(part for part in subtree.split("/") if part)
        depth = len(prefix)
        chosen = {keys: node for keys, node in nodes.items() if keys[:depth] == prefix}
        if not chosen:
            raise CheckpointError(_no_subtree(item, subtree, nodes))
        nodes = chosen
    opened, tree, texts = {}, {}, {}
    for keys, node in nodes.items():
        first = min(depth, len(keys) - 1)  # of a subtree that is a leaf, its own key
        name = "/".join(keys[first:])
        tree[name] = {**node, "key_metadata": node["key_metadata"][first:]}
        if node["value_metadata"].get("skip_deserialize"):
            continue
        if node["value_metadata"]["value_type"] == "string":
            texts[name] = ".".join(keys)
        else:
            opened[name] = _open(item, name, ".".join(keys), metadata)
    return Pytree(
        item,
        {name: _reader(item, name, metadata, future) for name, future in opened.items()},
        tree,
        _strings(item, texts),
    )


def open_arrays(item: AnyPath, folders: Mapping[str, str]) -> dict[str, StoredArray]:
    """Opens arrays in zarr 3, name -> folder in `item`, every chunk of which is stored.

    Raises:
        CheckpointError: One is missing or damaged.
    """
    metadata = {"use_zarr3": True, "use_ocdbt": False, "store_array_data_equal_to_fill_value": True}
    opened = {name: _open(item, name, place, metadata) for name, place in folders.items()}
    return {name: _reader(item, name, metadata, future) for name, future in opened.items()}


def _nodes(file: AnyPath, metadata: Mapping[str, Json]) -> dict[tuple[str, ...], JsonObject]:
    """Returns the nodes of an item's tree by their keys, each of them checked."""
    try:
        nodes = list(metadata["tree_metadata"].values())
        for node in nodes:
            if not isinstance(node["value_metadata"]["value_type"], str):
                raise TypeError
            for entry in node["key_metadata"]:
                if type(entry["key"]) not in (str, int) or type(entry["key_type"]) is not int:
                    raise TypeError
        by_keys = {tuple(str(e["key"]) for e in node["key_metadata"]): node for node in nodes}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: damaged: it does not describe a pytree; {ADVICE}"
        ) from error
    names, stored = set(), set()
    for node in nodes:
        keys = tuple(str(entry["key"]) for entry in node["key_metadata"])
        name, place = "/".join(keys), ".".join(keys)
        if not keys:
            raise CheckpointError(f"{file}: it describes a single array, not a tree of arrays")
        if not place.isprintable() or {"", ".", ".."} & set(place.split("/")):
            raise CheckpointError(
                f"{file}: damaged: {keys!r:.80} cannot be the keys of an array; {ADVICE}"
            )
        if name in names or place in stored:
            raise CheckpointError(f"{file}: two leaves are called {name!r}, or stored as {place!r}")
        names.add(name), stored.add(place)
    return by_keys


def _strings(item: AnyPath, texts: Mapping[str, str]) -> dict[str, str]:
    """Reads the leaves that are texts, which Orbax stores in one file by their keys."""
    if not texts:
        return {}
    file = item / STRINGS
    stored = files.read_json(file, kind=dict, error=CheckpointError, advice=ADVICE)
    for name, place in texts.items():
        if not isinstance(stored.get(place), str):
            raise CheckpointError(f"{file}: damaged: it has no text for {name}; {ADVICE}")
    return {name: stored[place] for name, place in texts.items()}


def _no_subtree(item: AnyPath, subtree: str, nodes: Iterable[tuple[str, ...]]) -> str:
    known = {"/".join(keys[:depth]) for keys in nodes for depth in range(1, len(keys) + 1)}
    nearest = difflib.get_close_matches(subtree, sorted(known), 3, 0.3) or sorted(known)[:3]
    return f"{item}: it has no subtree {subtree!r}; the nearest: {', '.join(nearest)}"


def _open(item: AnyPath, name: str, stored: str, metadata: Mapping[str, Json]) -> "ts.Future":
    import tensorstore as ts

    kvstore = storage.kvstore_spec(item)
    if metadata.get("use_ocdbt", True):
        kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{stored}/"}
    else:
        kvstore = storage.kvstore_spec(item / stored)
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": kvstore,
        "recheck_cached_data": "open",
        # Orbax may have left out chunks of zeros, and then says so.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
    }
    try:
        return ts.open(spec, open=True, read=True, context=context())
    except ValueError as error:  # as of keys that are not Unicode
        raise _damaged(item, name, error) from error


def _reader(
    item: AnyPath, name: str, metadata: Mapping[str, Json], future: "ts.Future"
) -> StoredArray:
    try:
        store = future.result()
    except ValueError as error:
        raise _damaged(item, name, error) from error
    if not is_array_shape(store.shape):
        raise CheckpointError(f"{item}: {name} is damaged: its shape is {store.shape}; {ADVICE}")
    # TensorStore ends the process where a chunk does not fit.
    read_chunk = tuple(store.chunk_layout.read_chunk.shape or store.shape)
    _check_memory(item, name, read_chunk, store.dtype.numpy_dtype)
    extents = None
    if isinstance(item, Path) and metadata.get("use_zarr3") and not metadata.get("use_ocdbt", True):
        extents = _local_rows(name, store)
    return StoredArray(item, name, store, None if extents else read_chunk, extents)


def _check_memory(item: AnyPath, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Raises CheckpointError where the machine has less memory than an array or chunk needs."""
    import psutil

    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > psutil.virtual_memory().total:
        raise CheckpointError(
            f"{item}: {name} has {size:,} bytes in a piece, more than the memory of this machine: "
            f"read it on a larger one, or, if it is not so large, {ADVICE}"
        )


def _local_rows(name: str, store: "ts.TensorStore") -> Extents | None:
    """Returns where the elements are if each chunk is a file of plain consecutive rows."""
    spec = store.spec(retain_context=False).to_json()
    content = spec["metadata"]
    folder = Path(spec["kvstore"]["path"])
    shape, chunk = tuple(store.shape), tuple(content["chunk_grid"]["configuration"]["chunk_shape"])
    dtype = np.dtype(store.dtype.numpy_dtype)
    extra = _extra_bytes(content["codecs"], chunk, dtype.itemsize)
    axis = next((axis for axis, length in enumerate(chunk) if length > 1), len(chunk))
    consecutive = all(c == n for c, n in zip(chunk[axis + 1 :], shape[axis + 1 :], strict=True))
    if extra is None or not consecutive:
        return None
    if math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True)) > _MOST_PIECES:
        return None
    key = content["chunk_key_encoding"]
    separator = key.get("configuration", {}).get("separator", "/")
    if key["name"] != "default":
        return None
    pieces = tuple(
        Piece(start, folder / separator.join(["c", *map(str, place)]), 0)
        for start, place in _places(shape, chunk, axis)
    )
    nbytes = math.prod(chunk) * dtype.itemsize + extra
    return Extents(name, dtype, math.prod(shape), pieces, nbytes)


def _extra_bytes(codecs: Sequence[Mapping], chunk: tuple[int, ...], itemsize: int) -> int | None:
    """Returns how many bytes a chunk's file has after its plain elements; None: they are not."""
    if not all(chunk):
        return None
    (codec, *more) = codecs
    if more:
        return None
    if codec["name"] == "sharding_indexed":
        configuration = codec["configuration"]
        if tuple(configuration["chunk_shape"]) != chunk:
            return None
        if configuration.get("index_location", "end") != "end":
            return None
        inner = _extra_bytes(configuration["codecs"], chunk, itemsize)
        return None if inner is None else inner + _INDEX_BYTES
    little = itemsize == 1 or codec.get("configuration", {}).get("endian") == "little"
    return 0 if codec["name"] == "bytes" and little else None


def _places(
    shape: tuple[int, ...], chunk: tuple[int, ...], axis: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the first position and the grid place of each chunk of consecutive elements."""
    if not math.prod(shape):
        return
    inner = (0,) * len(shape[axis + 1 :])
    run, step = math.prod(shape[axis:]), math.prod(chunk)
    for number in range(math.prod(shape[:axis])):
        outer = tuple(int(i) for i in np.unravel_index(number, shape[:axis]))
        for place, start in enumerate(range(0, run, step)):
            along = (place,) if axis < len(shape) else ()
            yield number * run + start, (*outer, *along, *inner)


def _damaged(item: AnyPath, name: str, error: ValueError) -> CheckpointError:
    reason = str(error).split(" [", maxsplit=1)[0].splitlines()[0]
    return CheckpointError(
        f"{item}: {name} cannot be read: a file is missing, truncated or damaged ({reason}); "
        f"{ADVICE}"
    )


def write_metadata(
    item: AnyPath, tree: Mapping[str, Mapping[str, Json]], strings: Mapping[str, str] | None = None
) -> None:
    """Writes what makes an Orbax item of arrays in zarr 3 that are stored in a directory.

    Args:
        item: The directory.
        tree: Orbax's description of the tree's nodes, by name, as `Pytree.tree` has it.
        strings: The leaves that are texts, by name, as `Pytree.strings` has them.
    """
    described, texts = {}, {}
    for name, node in tree.items():
        keys = tuple(entry["key"] for entry in node["key_metadata"])
        value = {k: v for k, v in node["value_metadata"].items() if k != "write_shape"}
        if value["value_type"] == "jax.Array":
            # Without a target, Orbax restores those only with a file of their shardings.
            value["value_type"] = _ARRAY
        described[str(keys)] = {"key_metadata": node["key_metadata"], "value_metadata": value}
        if strings and name in strings:
            texts[stored_name(node)] = strings[name]
    content = {
        "tree_metadata": described,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    if texts:
        (item / STRINGS).write_text(json.dumps(texts))
    (item / METADATA).write_text(json.dumps(content))


def stored_name(node: Mapping[str, Json]) -> str:
    """Returns what Orbax calls the directory of an array, of its node in a `Tree`."""
    return ".".join(str(entry["key"]) for entry in node["key_metadata"])


def tree_of(names: Sequence[str], separator: str | None = "/") -> Tree:
    """Returns Orbax's description of a nested dict of arrays with these names.

    Args:
        names: The arrays', as "a/b/c".
        separator: What separates keys; None: each name is one key.
    """
    return {
        name: _node([(key, 2) for key in (name.split(separator) if separator else [name])])
        for name in names
    }


def tree_from(pytree: PyTree) -> Tree:
    """Returns Orbax's description of any pytree of arrays, such as an optimizer's state."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(pytree, is_leaf=_is_empty)
    result = {}
    for path, leaf in nodes:
        keys = [_key(entry) for entry in path] or [("value", 2)]
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
        empty = {dict: "Dict", list: "List"}.get(type(leaf), "None")
        result[name] = _node(keys, empty if _is_empty(leaf) else _ARRAY)
    return result


def _is_empty(node: PyTree) -> bool:
    return node is None or (isinstance(node, tuple | list | dict) and not node)


# As Orbax numbers kinds of keys: 1 is an index of a sequence, 2 a key of a dict or a field's name.
def _key(entry: jax.tree_util.KeyEntry) -> tuple[str, int]:
    if isinstance(entry, jax.tree_util.SequenceKey):
        return str(entry.idx), 1
    return jax.tree_util.keystr((entry,), simple=True), 2


def _node(keys: Sequence[tuple[str, int]], kind: str = _ARRAY) -> JsonObject:
    return {
        "key_metadata": [{"key": key, "key_type": number} for key, number in keys],
        "value_metadata": {"value_type": kind, "skip_deserialize": kind != _ARRAY},
    }


def flatten(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Turns a nested dict into {"a/b/c": leaf}, in the nested dict's order.

    Raises:
        CheckpointError: A key is no string, is empty, or contains "/" or "." (Orbax joins by it).
    """
    flat = {}
    for key, value in params.items():
        if not isinstance(key, str) or not key or "/" in key or "." in key:
            raise CheckpointError(f"{key!r} cannot name a parameter: use a string without / and .")
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": leaf for name, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, PyTree]) -> Params:
    """Turns {"a/b/c": leaf} back into a nested dict."""
    nested: Params = {}
    for name, leaf in flat.items():
        *groups, last = name.split("/")
        group = nested
        for key in groups:
            group = group.setdefault(key, {})
        group[last] = leaf
    return nested


def flatten_state(tree: PyTree) -> dict[str, PyTree]:
    """Turns any pytree into {"key/path": leaf}; NamedTuple fields and indices become keys."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf
        for path, leaf in leaves
    }
