"""Reading m2l's checkpoints, whole, by parameter or by shard; damaged ones are refused by name."""

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from m2l import files, storage
from m2l.checkpoints import digest, huggingface_directory, tokenizer
from m2l.checkpoints.manifest import Manifest, is_checkpoint
from m2l.checkpoints.publishing import check_absent
from m2l.checkpoints.pytrees import (
    Pytree,
    StoredArray,
    flatten,
    flatten_state,
    open_pytree,
    unflatten,
)
from m2l.checkpoints.spans import in_parallel
from m2l.errors import CheckpointError
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, Params, PyTree

PARAMS, OPT_STATE, DATA_STATE = "params", "opt_state", "data_state"

KEY = "key"
"""In a manifest's made_by: the digest of all that decides the bytes of a result."""

EXPORTED = "exported"
"""In the manifest of an exported checkpoint, in made_by: the options of the export."""

STEPS = "checkpoints"
"""Of a training run, the directory with a checkpoint for each step."""

_STEP = re.compile(r"(?:step_)?(\d+)")


def steps(directory: AnyPath) -> dict[int, AnyPath]:
    """Returns the finished checkpoints of m2l's in a directory of steps, by step, in order."""
    if not directory.is_dir():
        return {}
    named = {
        int(match[1]): entry
        for entry in directory.iterdir()
        if (match := _STEP.fullmatch(entry.name)) and is_checkpoint(entry)
    }
    return dict(sorted(named.items()))


def resolve(path: PathLike) -> AnyPath:
    """Finds the checkpoint of m2l's that a path means.

    Args:
        path: A checkpoint, a training run or its directory of steps, of which the newest finished
            checkpoint is meant.

    Returns:
        Its directory, absolute.

    Raises:
        CheckpointError: There is nothing there, nothing finished, or a checkpoint to be converted.
    """
    path = storage.path(path).absolute()
    if is_checkpoint(path):
        return path
    if not path.is_dir():
        raise missing(path)
    if finished := steps(path / STEPS) or steps(path):
        return finished[max(finished)]
    if not any(path.iterdir()):
        raise CheckpointError(f"{path}: the directory is empty; a checkpoint was expected")
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path}: a Hugging Face directory; make a checkpoint of it first: m2l convert "
            f"{shlex.quote(str(path))} CHECKPOINT"
        )
    if any((path / name).is_file() for name in ("checkpoint", "state")) or any(
        path.glob("checkpoint_*")
    ):
        raise CheckpointError(
            f"{path}: a T5X checkpoint; make one of m2l's first: m2l convert --from t5x "
            f"--vocabulary FILE {shlex.quote(str(path))} CHECKPOINT"
        )
    raise CheckpointError(
        f"{path}: no finished checkpoint of m2l's, and no training run with one; what other "
        "programs wrote through Orbax can be merged and inspected"
    )


def read_manifest(path: PathLike) -> Manifest:
    """Reads the manifest of the checkpoint that `path` means (see `resolve`)."""
    return Manifest.read(resolve(path))


def open_parameters(path: PathLike) -> dict[str, StoredArray]:
    """Opens every parameter of a checkpoint, in the manifest's order; nothing is read yet."""
    directory = resolve(path)
    return open_item(directory, PARAMS, Manifest.read(directory).parameters)


def open_item(
    directory: AnyPath, item: str, records: Mapping[str, Mapping[str, Json]]
) -> dict[str, StoredArray]:
    """Returns the arrays of `open_recorded`."""
    return dict(open_recorded(directory, item, records).arrays)


def open_recorded(
    directory: AnyPath, item: str, records: Mapping[str, Mapping[str, Json]]
) -> Pytree:
    """Opens an Orbax item whose arrays a manifest records; they are in the manifest's order.

    Raises:
        CheckpointError: An array is missing, unexpected, or of another shape or dtype.
    """
    # Orbax has no item without an array.
    pytree = open_pytree(directory / item) if records else Pytree(directory / item, {}, {}, {})
    arrays = pytree.arrays
    for name in [*records, *arrays]:
        stored = _spell(arrays[name].shape, arrays[name].dtype) if name in arrays else "missing"
        record = records.get(name)
        recorded = "unknown" if record is None else _spell(record["shape"], record["dtype"])
        if stored != recorded:
            raise CheckpointError(
                f"{directory / item}: {name} is {stored}, its manifest says {recorded}: the two "
                "are not from one checkpoint"
            )
    checked = {n: dataclasses.replace(arrays[n], digest=records[n]["digest"]) for n in records}
    return dataclasses.replace(pytree, arrays=checked)


def _spell(shape: Sequence[int], dtype: DTypeLike) -> str:
    return f"{np.dtype(dtype)}{list(shape)}"


def _read(arrays: Mapping[str, StoredArray], verify: bool) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = dict.fromkeys(arrays)

    def read(name: str) -> None:
        stored = arrays[name]
        result[name] = stored.read()
        if verify:
            stored.check(stored.digest_of(result[name]))

    in_parallel(read, arrays)
    return result


def _place(
    arrays: Mapping[str, StoredArray], shardings: Mapping[str, jax.sharding.Sharding], verify: bool
) -> dict[str, jax.Array]:
    """Reads arrays onto devices, each process its own shards, and checks them there."""
    placed: dict[str, jax.Array] = dict.fromkeys(arrays)
    digests: dict[str, np.ndarray] = {}

    def read(name: str) -> None:
        stored = arrays[name]
        placed[name] = stored.place(shardings[name])
        if verify and digest.is_digest(stored.digest):
            # At once, while the elements are in a processor's cache.
            digests[name] = digest.of_shards(placed[name])
        elif verify:
            stored.verify()

    in_parallel(read, arrays)
    digests |= digest.sum_over_processes(
        {n: digests[n] for n in arrays if n in digests and not placed[n].is_fully_addressable}
    )
    for name, words in digests.items():
        arrays[name].check(digest.to_hex(words))
    return placed


def restore(path: PathLike, *, shardings: PyTree = None, verify: bool = True) -> Params:
    """Reads the parameters of the checkpoint that `path` means.

    With shardings each process reads what its own devices hold, whatever mesh the checkpoint was
    written from, and digests are computed on the devices.

    Args:
        path: A checkpoint or a training run.
        shardings: Where to place them: a sharding, or a nested dict of shardings like the
            parameters. None: numpy arrays on the host.
        verify: Compute every digest, so that a flipped bit is refused.

    Returns:
        A nested dict of arrays.

    Raises:
        CheckpointError: Missing, unfinished, truncated, damaged, or not what its manifest says.
    """
    arrays = open_parameters(path)
    if shardings is None:
        return unflatten(_read(arrays, verify))
    if isinstance(shardings, jax.sharding.Sharding):
        by_name = dict.fromkeys(arrays, shardings)
    else:
        by_name = flatten(shardings)
    return unflatten(_place(arrays, by_name, verify))


def restore_opt_state(path: PathLike, like: PyTree) -> PyTree:
    """Reads the optimizer's state into the structure of `like`.

    Args:
        path: A checkpoint or a training run.
        like: A pytree of arrays or ShapeDtypeStructs; where the leaves have shardings, each process
            reads what its own devices hold.

    Raises:
        CheckpointError: There is none, it is damaged, or its leaves differ from those of `like`.
    """
    directory = resolve(path)
    records = Manifest.read(directory).opt_state
    if records is None:
        raise CheckpointError(f"{directory}: it has no optimizer state, only parameters")
    leaves = flatten_state(like)
    expected = {n: _spell(np.shape(x), jax.dtypes.result_type(x)) for n, x in leaves.items()}
    stored = {name: _spell(record["shape"], record["dtype"]) for name, record in records.items()}
    for name in [*expected, *stored]:
        if expected.get(name) != stored.get(name):
            raise CheckpointError(
                f"{directory}: optimizer state {name}: expected {expected.get(name, 'none')}, "
                f"found {stored.get(name, 'none')}: it belongs to another optimizer or model"
            )
    arrays = open_item(directory, OPT_STATE, records)
    shardings = {name: getattr(leaf, "sharding", None) for name, leaf in leaves.items()}
    on_host = {name: array for name, array in arrays.items() if shardings[name] is None}
    on_devices = {name: array for name, array in arrays.items() if name not in on_host}
    restored = _read(on_host, verify=True) | _place(on_devices, shardings, verify=True)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in expected])


AVERAGE = "average"
"""In an optimizer's state: the moving average of the parameters."""


def restore_average(path: PathLike) -> Params:
    """Reads the moving average of the parameters that a training run's checkpoint has.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    directory = resolve(path)
    records = Manifest.read(directory).opt_state or {}
    arrays = {
        name.removeprefix(f"{AVERAGE}/"): array
        for name, array in open_item(directory, OPT_STATE, records).items()
        if name.startswith(f"{AVERAGE}/")
    }
    if not arrays:
        raise CheckpointError(f"{directory}: it has no average; train with ema=0.999, say")
    return unflatten(_read(arrays, verify=True))


def restore_data_state(path: PathLike) -> list[bytes]:
    """Reads the positions in the data, one of each share in which the run was fed.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    directory = resolve(path)
    manifest = Manifest.read(directory)
    if manifest.data_state is None:
        raise CheckpointError(f"{directory}: it has no data position, only parameters")
    item = directory / DATA_STATE
    if isinstance(item, Path) and item.is_file():  # in format 2
        state = item.read_bytes()
        shares = [state]
        if state.startswith(b'{"shares"'):
            shares = [bytes.fromhex(text) for text in files.parse_json(state, item)["shares"]]
        actual = hashlib.sha256(state).hexdigest()
    else:
        arrays = open_pytree(item).arrays
        shares = [array.read().tobytes() for array in arrays.values()]
        actual = data_state_digest(shares)
    if actual != manifest.data_state:
        raise CheckpointError(f"{item}: damaged: its digest is not the one its manifest records")
    return shares


def data_state_digest(shares: list[bytes]) -> str:
    """Returns the SHA-256, in hex, of the positions in the data."""
    return hashlib.sha256(json.dumps([share.hex() for share in shares]).encode()).hexdigest()


def verify(path: PathLike) -> Manifest:
    """Computes every digest of a checkpoint, with a few blocks of arrays in memory at a time.

    Raises:
        CheckpointError: Naming the first parameter or file that is missing or damaged.
    """
    directory = resolve(path)
    manifest = Manifest.read(directory)
    items = {PARAMS: manifest.parameters, OPT_STATE: manifest.opt_state or {}}
    arrays = [
        array
        for item, records in items.items()
        for array in open_item(directory, item, records).values()
    ]
    in_parallel(StoredArray.verify, arrays)
    if manifest.data_state is not None:
        restore_data_state(directory)
    if manifest.tokenizer is not None:
        tokenizer.verify(directory, manifest.tokenizer)
    return manifest


def existing_result(
    directory: PathLike, is_same: Callable[[Manifest], bool], file: str | None = None
) -> Manifest | None:
    """Returns the manifest of a result that need not be made again, and says so on stderr.

    Its digests are checked first.

    Args:
        directory: What is to be made.
        is_same: Returns whether a manifest is of the same inputs and options.
        file: The manifest's name in a Hugging Face directory; None: it is a checkpoint of m2l's.

    Returns:
        None: there is nothing.

    Raises:
        CheckpointError: Something else is there, or the result is damaged.
    """
    directory = storage.path(directory)
    manifest = _manifest(directory, file)
    if manifest is None or not is_same(manifest):
        check_absent(directory)
        return None
    if file is None:
        verify(directory)
    else:
        huggingface_directory.verify(directory)
    print(
        f"m2l: {directory}: already there, made from the same inputs with the same options",
        file=sys.stderr,
    )
    return manifest


def _manifest(directory: AnyPath, file: str | None) -> Manifest | None:
    try:
        if not (is_checkpoint(directory) if file is None else (directory / file).is_file()):
            return None
        return Manifest.read(directory, file)
    except CheckpointError:
        return None  # What it belongs to is then not known, and refused.


def missing(path: AnyPath) -> CheckpointError:
    """Returns the error of a path where nothing is; it names what is next to it, or inside."""
    text = f"{path}: there is no such checkpoint or training run"
    folder = next((each for each in path.parents if each.is_dir()), None)
    if folder is None or folder == folder.parent:
        return CheckpointError(text)
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    near = difflib.get_close_matches(path.relative_to(folder).parts[0], names, n=1)
    return CheckpointError(f"{text}; there is {folder / near[0]}" if near else text)
