"""Reading checkpoints: whole, by parameter or by slice, and never a damaged one in silence."""

import functools
import hashlib
import math
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2l.checkpoints import tokenizer
from m2l.checkpoints.manifest import FILE_NAME as MANIFEST
from m2l.checkpoints.manifest import OCDBT, Manifest, sha256
from m2l.checkpoints.orbax import (
    DATA_STATE,
    OPT_STATE,
    PARAMS,
    check_metadata,
    expected_files,
    open_array,
)
from m2l.checkpoints.streaming import in_parallel
from m2l.checkpoints.trees import flatten_state, unflatten
from m2l.errors import CheckpointError
from m2l.files import check_local


def resolve(path: str | os.PathLike) -> Path:
    """Finds the checkpoint that `path` means: itself, or the newest whole one of a training run.

    Raises:
        CheckpointError: There is nothing there, nothing finished, or a checkpoint to be converted.
    """
    check_local(path)
    path = Path(path).absolute()
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint or training run")
    steps = {
        int(entry.name.removeprefix("step_")): entry
        for entry in path.glob("checkpoints/step_*")
        if re.fullmatch(r"step_\d+", entry.name) and (entry / MANIFEST).is_file()
    }
    if steps:
        return steps[max(steps)]
    if not any(path.iterdir()):
        raise CheckpointError(f"{path}: the directory is empty; a checkpoint was expected")
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path}: a Hugging Face directory; make a checkpoint of it first: m2l convert "
            f"{shlex.quote(str(path))} CHECKPOINT"
        )
    if any((path / name).exists() for name in ("checkpoint", "state")) or any(
        path.glob("checkpoint_*")
    ):
        raise CheckpointError(
            f"{path}: a T5X checkpoint; make one of m2l's first: m2l convert --from t5x "
            f"--vocabulary FILE {shlex.quote(str(path))} CHECKPOINT"
        )
    raise CheckpointError(
        f"{path}: no finished checkpoint: neither {MANIFEST} nor checkpoints/step_*/{MANIFEST}"
    )


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Reads the manifest of the checkpoint that `path` means (see `resolve`)."""
    return Manifest.read(resolve(path))


class Parameter:
    """A parameter on disk; nothing is held open, and any number of threads may read it.

    Attributes:
        name: As "a/b/c".
        shape: Its shape.
        dtype: Its dtype.
        size: How many elements it has.
    """

    def __init__(self, item: Path, name: str, record: Mapping[str, Any], old: Any = None):
        """The array `name` of an Orbax item, which must agree with the manifest's record.

        `old` is the `ocdbt.context` of an item that is stored so.
        """
        self.name, self._item, self._old = name, item, old
        self.shape, self.dtype = tuple(record["shape"]), np.dtype(record["dtype"])
        self.size, self._digest = math.prod(self.shape), record["digest"]

    @functools.cached_property
    def extents(self) -> Any:
        """Where its elements are stored; of an old checkpoint a `StoredArray`.

        Raises:
            CheckpointError: A file is missing, damaged, or of another size.
        """
        if self._old is None:
            return open_array(self._item, self.name, self.shape, self.dtype)
        from m2l.checkpoints import ocdbt

        return ocdbt.StoredArray(self._item, self.name, self.shape, self.dtype, self._old)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Reads elements [start, stop) into `out`, 1-D, contiguous, of its dtype and that size.

        Raises:
            CheckpointError: A file is missing, truncated or damaged.
        """
        if out.size != stop - start:
            raise ValueError(f"{self.name}: [{start}, {stop}) into {out.size} elements")
        self.extents.read_into(out, start)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads elements [start, stop) of the row-major parameter; 1-D, of its dtype.

        Raises:
            CheckpointError: A file is missing, truncated or damaged.
        """
        stop = self.size if stop is None else stop
        _ = self.extents  # Before memory is allocated, of a size that no file may bear out.
        block = np.empty(stop - start, self.dtype)
        self.read_into(start, stop, block)
        return block

    def check(self, digest: str) -> None:
        """Raises CheckpointError unless `digest`, as `sha256` gives it, is the manifest's."""
        if digest != self._digest:
            raise CheckpointError(
                f"{self._item}: {self.name} is damaged: its bytes do not have the digest that the "
                "manifest records; copy the checkpoint again or make it anew"
            )


def open_parameters(path: str | os.PathLike) -> dict[str, Parameter]:
    """Opens every parameter of a checkpoint, in the manifest's order; nothing is read yet."""
    directory = resolve(path)
    return _open(directory, PARAMS, Manifest.read(directory))


def _items(manifest: Manifest) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """The records of arrays by Orbax item, as the checkpoint was written."""
    opt_state = {} if manifest.opt_state is None else {OPT_STATE: manifest.opt_state}
    return {PARAMS: manifest.parameters, **opt_state}


def _open(directory: Path, item: str, manifest: Manifest) -> dict[str, Parameter]:
    old, records = None, _items(manifest).get(item, {})
    if manifest.format_version == OCDBT:
        from m2l.checkpoints import ocdbt  # TensorStore, which nothing else here needs.

        old = ocdbt.context()
    else:
        check_metadata(directory, _items(manifest))
    return {
        name: Parameter(directory / item, name, record, old) for name, record in records.items()
    }


def _read(directory: Path, item: str, manifest: Manifest, verify: bool) -> dict[str, np.ndarray]:
    parameters = _open(directory, item, manifest)
    arrays: dict[str, np.ndarray] = dict.fromkeys(parameters)

    def read(name: str) -> None:
        arrays[name] = parameters[name].read().reshape(parameters[name].shape)
        if verify:
            parameters[name].check(sha256(arrays[name]))

    in_parallel(read, parameters)
    return arrays


def restore(path: str | os.PathLike, *, shardings: Any = None, verify: bool = True) -> dict:
    """Reads the parameters of the checkpoint that `path` means.

    With shardings one parameter is held on the host at a time, and they may span processes, each
    of which reads the checkpoint and keeps what its own devices hold.

    Args:
        path: A checkpoint or a training run.
        shardings: Where to place them: a sharding, or a nested dict of shardings like the
            parameters. None: numpy arrays on the host.
        verify: Recompute every digest, so that a flipped bit is refused (about 0.7 s per GB).

    Returns:
        A nested dict of arrays.

    Raises:
        CheckpointError: Missing, unfinished, truncated, damaged, or not what its manifest says.
    """
    directory = resolve(path)
    manifest = Manifest.read(directory)
    if shardings is None:
        return unflatten(_read(directory, PARAMS, manifest, verify))

    def place(parameter: Parameter, sharding: jax.sharding.Sharding) -> jax.Array:
        array = parameter.read().reshape(parameter.shape)
        if verify:
            parameter.check(sha256(array))
        # Copies: a shard that is a view would keep all of the parameter.
        return jax.make_array_from_callback(
            parameter.shape, sharding, lambda index: np.array(array[index])
        )

    parameters = unflatten(_open(directory, PARAMS, manifest))
    return jax.tree.map(place, parameters, jax.tree.broadcast(shardings, parameters))


def restore_opt_state(path: str | os.PathLike, like: Any) -> Any:
    """Reads the optimizer's state into the structure of `like`.

    Args:
        path: A checkpoint or a training run.
        like: A pytree of arrays or ShapeDtypeStructs; where a leaf has a sharding it is used.

    Raises:
        CheckpointError: There is none, it is damaged, or its leaves differ from those of `like`.
    """
    directory = resolve(path)
    manifest = Manifest.read(directory)
    records = manifest.opt_state
    if records is None:
        raise CheckpointError(f"{directory}: it holds no optimizer state, only parameters")
    wanted = {
        name: (list(np.shape(leaf)), jax.dtypes.result_type(leaf).name)
        for name, leaf in flatten_state(like).items()
    }
    found = {name: (record["shape"], record["dtype"]) for name, record in records.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{directory}: optimizer state {name}: expected {_spell(wanted.get(name))}, found "
                f"{_spell(found.get(name))}: it belongs to another optimizer or model"
            )
    arrays = _read(directory, OPT_STATE, manifest, verify=True)

    def place(leaf: Any, array: np.ndarray) -> Any:
        sharding = getattr(leaf, "sharding", None)
        return array if sharding is None else jax.device_put(array, sharding)

    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten(map(place, leaves, (arrays[name] for name in wanted)))


def _spell(described: tuple[list[int], str] | None) -> str:
    return "none" if described is None else f"{described[1]}{described[0]}"


def restore_data_state(path: str | os.PathLike) -> bytes:
    """Reads the data pipeline's position.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    directory = resolve(path)
    digest, file = Manifest.read(directory).data_state, directory / DATA_STATE
    if digest is None:
        raise CheckpointError(f"{directory}: it holds no data position, only parameters")
    try:
        state = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(state).hexdigest() != digest:
        raise CheckpointError(f"{file}: damaged: its digest is not the one its manifest records")
    return state


def verify(path: str | os.PathLike) -> Manifest:
    """Recomputes every digest of a checkpoint, with a few arrays in memory at a time.

    Raises:
        CheckpointError: Naming the first parameter or file that is missing or damaged.
    """
    directory = resolve(path)
    manifest = Manifest.read(directory)
    items = {item: _open(directory, item, manifest) for item in _items(manifest)}
    arrays = [array for opened in items.values() for array in opened.values()]
    in_parallel(lambda array: array.check(sha256(array.read())), arrays)
    if manifest.format_version != OCDBT:
        _check_no_other_files(directory, manifest, items)
    if manifest.data_state is not None:
        restore_data_state(directory)
    if manifest.tokenizer is not None:
        tokenizer.verify(directory, manifest.tokenizer)
    return manifest


def _check_no_other_files(
    directory: Path, manifest: Manifest, items: Mapping[str, Mapping[str, Parameter]]
) -> None:
    """Raises CheckpointError naming the first file of a checkpoint that nothing wrote there."""
    expected = {directory / name for name in (MANIFEST, "_CHECKPOINT_METADATA", "orbax.checkpoint")}
    expected |= {directory / DATA_STATE} if manifest.data_state is not None else set()
    expected |= {directory / tokenizer.DIRECTORY / name for name in manifest.tokenizer or ()}
    for item, opened in items.items():
        extents = {name: parameter.extents for name, parameter in opened.items()}
        expected |= set(expected_files(directory, item, extents))
    for file in sorted(directory.rglob("*")):
        if file not in expected and not file.is_dir():
            raise CheckpointError(f"{file}: unexpected, not part of the checkpoint; remove it")
