"""Writes checkpoints as m2l 0.x did, in format 2, from the description of that format."""

import hashlib
import json

import numpy as np

CHUNK_ROWS = 3


def write(directory, params, opt_state=None, data_state=None, tokenizer=None, **fields):
    """Writes a checkpoint in format 2.

    Args:
        directory: Made.
        params: Arrays by name, as "a/b".
        opt_state: The same of the optimizer's state.
        data_state: The bytes of a position in the data.
        tokenizer: The tokenizer's files, bytes by name.
        **fields: Fields of the manifest.
    """
    directory.mkdir(parents=True)
    records = {"params": {}, "opt_state": {}}
    for item, arrays in (("params", params), ("opt_state", opt_state or {})):
        tree = {}
        for name, array in arrays.items():
            keys = name.split("/")
            tree[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            records[item][name] = {
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "digest": hashlib.sha256(array.tobytes()).hexdigest(),
            }
            _write_array(directory / item / ".".join(keys), array)
        if arrays:
            content = {
                "tree_metadata": tree,
                "use_ocdbt": False,
                "use_zarr3": True,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
            (directory / item / "_METADATA").write_text(json.dumps(content))
    if data_state is not None:
        (directory / "data_state").write_bytes(data_state)
    if tokenizer is not None:
        (directory / "tokenizer").mkdir()
        for name, content in tokenizer.items():
            (directory / "tokenizer" / name).write_bytes(content)
    (directory / "orbax.checkpoint").write_bytes(b"")
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    metadata = {
        "item_handlers": {item: handler for item, arrays in records.items() if arrays},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    manifest = {
        "model": {"family": "t5"},
        "vocabulary": {"name": "bytes", "size": 7, "fingerprint": "abc"},
        "dtype": "mixed",
        "step": 3,
        "made_by": {"kind": "test"},
        "parents": [],
        "parameters": records["params"],
        "opt_state": records["opt_state"] if opt_state is not None else None,
        "data_state": None if data_state is None else hashlib.sha256(data_state).hexdigest(),
        "tokenizer": tokenizer
        and {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.items()},
        "versions": {"m2l": "0.1"},
        "format_version": 2,
    } | fields
    identity = {
        "model": manifest["model"],
        "vocabulary": manifest["vocabulary"]["fingerprint"],
        "parameters": manifest["parameters"],
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    manifest = {"digest": hashlib.sha256(text.encode()).hexdigest()} | manifest
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps({"checksum": checksum} | manifest))


def _write_array(folder, array):
    """Chunks of up to CHUNK_ROWS rows of the first axis, in files as "c.0.0"."""
    folder.mkdir(parents=True)
    rows = min(CHUNK_ROWS, len(array)) if array.ndim else 1
    chunk = [rows, *array.shape[1:]] if array.ndim else []
    codec = {"name": "bytes"}
    if array.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    content = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [codec],
    }
    (folder / "zarr.json").write_text(json.dumps(content))
    if not array.ndim:
        (folder / "c").write_bytes(array.tobytes())
    for number, start in enumerate(range(0, len(array) if array.ndim else 0, rows)):
        block = np.zeros(chunk, array.dtype)
        part = array[start : start + rows]
        block[: len(part)] = part
        key = ".".join(["c", str(number), *["0"] * (array.ndim - 1)])
        (folder / key).write_bytes(block.tobytes())
