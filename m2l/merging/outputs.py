"""What a merge writes, in units that are there whole or not at all, and the description after.

A unit is one chunk of an Orbax result, or one file of a Hugging Face directory. Several processes
share them; a merge that goes on takes those that are there.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from m2l import checkpoints, files, storage
from m2l.checkpoints import Manifest, digest, huggingface_directory, safetensors, saving, zarr
from m2l.checkpoints.huggingface_directory import write_card
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.publishing import UNFINISHED
from m2l.checkpoints.pytrees import Tree
from m2l.checkpoints.reading import PARAMS
from m2l.checkpoints.safetensors import StoredTensor
from m2l.checkpoints.spans import Span, boxes, cut, cut_box, reserve
from m2l.checkpoints.tensor_kinds import is_buffer, is_float
from m2l.checkpoints.zarr import TensorWriter
from m2l.errors import CheckpointError, MergeError
from m2l.locks import Lock
from m2l.merging.inputs import Roles
from m2l.storage import AnyPath
from m2l.typing import Json

ArraySpec = tuple[tuple[int, ...], np.dtype]
Box = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is written whole or not at all.

    Attributes:
        key: The name of a tensor and the number of a chunk, or a file.
        size: How many elements are in it.
        box: Of a chunk, what it is of the tensor.
    """

    key: tuple[str, int]
    size: int
    box: Box | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A part of a tensor of the result that one thread makes.

    Attributes:
        name: The tensor's.
        spans: What is read at once, in order; together they are the part.
        units: What the part belongs to.
        box: Of whole chunks, what they are of the tensor together.
    """

    name: str
    spans: tuple[Span, ...]
    units: tuple[Unit, ...]
    box: Box | None = None

    @property
    def size(self) -> int:
        """How many elements it has."""
        return sum(span.size for span in self.spans)

    def view(self, part: np.ndarray, span: Span, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a span's elements of the 1-D `part`, as a view of the span's size or shape."""
        if self.box is None:
            first = span.start - self.spans[0].start
            return part[first : first + span.size]
        origin, sides = _origin(self.box), _sides(self.box)
        if span.index is not None:
            inside = (
                slice(axis.start - o, axis.stop - o)
                for axis, o in zip(span.index, origin, strict=True)
            )
            return part.reshape(sides)[tuple(inside)]
        if not shape:
            return part
        place = np.subtract(np.unravel_index(span.start, shape), origin)
        first = int(np.ravel_multi_index(tuple(place), sides))
        return part[first : first + span.size]


def _origin(box: Box) -> tuple[int, ...]:
    return tuple(axis.start for axis in box)


def _sides(box: Box) -> tuple[int, ...]:
    return tuple(axis.stop - axis.start for axis in box)


class OrbaxResult:
    """The arrays of an m2l checkpoint, in chunks.

    Args:
        directory: The checkpoint's, a local or remote path.
        described: name -> (shape, dtype) of every parameter.
        grid: Returns the boxes in which a parameter is best read; None: rows.
        tree: Orbax's description of the tree of parameters; None: nested dicts.
    """

    def __init__(
        self,
        directory: AnyPath,
        described: Mapping[str, ArraySpec],
        grid: Callable[[str], tuple[int, ...] | None],
        tree: Tree | None = None,
    ):
        self.directory, self.described = directory, described
        self._grids = {name: grid(name) for name in described}
        item = directory / PARAMS
        self._writers = {
            name: TensorWriter(
                saving.array_directory(item, name, tree),
                name,
                shape,
                dtype,
                zarr.chunk_shape(shape, dtype.itemsize, self._grids[name]),
            )
            for name, (shape, dtype) in described.items()
        }

    def create(self) -> None:
        """Writes what describes the chunks, before any process writes one.

        What a process that was killed had half written is removed.
        """
        if isinstance(self.directory, Path):
            self.directory.mkdir(parents=True, exist_ok=True)
            for unfinished in self.directory.rglob(f".*{zarr.TEMPORARY}"):
                unfinished.unlink(missing_ok=True)
        for writer in self._writers.values():
            writer.create()

    def units(self) -> list[Unit]:
        """Returns every chunk; those of one box of the grid follow one another."""
        units = []
        for name, writer in self._writers.items():
            chunks = [*boxes(writer.shape, writer.chunk)]
            if (cells := self._grids[name]) is not None:
                chunks.sort(key=lambda box, cells=cells: (_cell(box, cells), _origin(box)))
            units += [
                Unit((name, number), math.prod(_sides(box)), box)
                for number, box in enumerate(chunks)
            ]
        return units

    def finished(self) -> Callable[[Unit], bool]:
        """Returns what tells whether a unit is there."""
        keys = {name: writer.finished() for name, writer in self._writers.items()}
        return lambda unit: self._writers[unit.key[0]].has(unit.box, keys[unit.key[0]])

    def read(self, unit: Unit) -> Iterator[tuple[Span, np.ndarray]]:
        """Yields the elements of a unit that is there, by spans, 1-D."""
        part = np.ascontiguousarray(self._writers[unit.key[0]].read(unit.box)).reshape(-1)
        yield from self.cut(Task(unit.key[0], (), (unit,), unit.box), unit, part)

    def cut(self, task: Task, unit: Unit, part: np.ndarray) -> Iterator[tuple[Span, np.ndarray]]:
        """Yields the elements of a unit, 1-D by spans, of what a task has made."""
        shape = self.described[task.name][0]
        for span in cut_box(task.name, shape, unit.box, max(1, unit.size)):
            yield span, np.ascontiguousarray(task.view(part, span, shape)).reshape(-1)

    def tasks(self, units: Sequence[Unit], block: int, at_once: int) -> Iterator[Task]:
        """Cuts units into what one thread makes: whole chunks, and what is read together.

        Args:
            units: Of those of `units`, in order.
            block: The most elements that are read at once of rows.
            at_once: The same of boxes, which may be several chunks of the result.
        """
        for name, group in itertools.groupby(units, key=lambda unit: unit.key[0]):
            shape, cells = self.described[name][0], self._grids[name]
            for chunks in _joined(list(group), cells, at_once):
                box = _hull(chunks)
                spans = [*self._spans(name, shape, cells, box, block, at_once)]
                yield Task(name, tuple(spans), tuple(chunks), box)

    def _spans(
        self,
        name: str,
        shape: tuple[int, ...],
        cells: tuple[int, ...] | None,
        box: Box,
        block: int,
        at_once: int,
    ) -> Iterator[Span]:
        if cells is None:
            yield from cut_box(name, shape, box, block)
            return
        ranges = [
            range(axis.start // side, -(-axis.stop // side))
            for axis, side in zip(box, cells, strict=True)
        ]
        for place in itertools.product(*ranges):
            part = tuple(
                slice(max(axis.start, i * side), min(axis.stop, (i + 1) * side))
                for axis, i, side in zip(box, place, cells, strict=True)
            )
            yield from cut_box(name, shape, part, at_once)

    def whole(self, units: Sequence[Unit], name: str) -> Task:
        """Returns the task of a tensor that is made at once."""
        shape = self.described[name][0]
        box = tuple(slice(0, length) for length in shape)
        span = Span(name, 0, math.prod(shape))
        return Task(name, (span,), tuple(u for u in units if u.key[0] == name), box)

    def write(self, task: Task, part: np.ndarray) -> None:
        """Writes what a task has made, 1-D, row-major."""
        origin, whole = _origin(task.box), part.reshape(_sides(task.box))
        for unit in task.units:
            inside = tuple(
                slice(axis.start - o, axis.stop - o)
                for axis, o in zip(unit.box, origin, strict=True)
            )
            self._writers[task.name].write(unit.box, whole[inside])


def _cell(box: Box, cells: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis.start // side for axis, side in zip(box, cells, strict=True))


def _hull(units: Sequence[Unit]) -> Box:
    first, last = units[0].box, units[-1].box
    return tuple(slice(a.start, b.stop) for a, b in zip(first, last, strict=True))


def _joined(
    units: Sequence[Unit], cells: tuple[int, ...] | None, at_once: int
) -> Iterator[list[Unit]]:
    """Joins chunks that are a box together, within one box of the grid."""
    group: list[Unit] = []
    for unit in units:
        joins = group and cells is not None
        if joins:
            hull = _hull([*group, unit])
            size = sum(each.size for each in group) + unit.size
            joins = (
                size <= at_once
                and math.prod(_sides(hull)) == size
                and _cell(unit.box, cells) == _cell(group[0].box, cells)
            )
        if group and not joins:
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


class ShardedResult:
    """The safetensors files of a Hugging Face directory.

    Args:
        directory: Where they are made.
        described: name -> (shape, dtype) of every tensor.
        shard_size: The most bytes of a file of several tensors.
        run_length: Returns how many elements of a tensor are best read at once, about a block.
    """

    def __init__(
        self,
        directory: AnyPath,
        described: Mapping[str, ArraySpec],
        shard_size: int,
        run_length: Callable[[str, int], int],
    ):
        self.directory, self.described, self._run_length = directory, described, run_length
        # Objects are written whole: the files of a bucket are made here, and uploaded one by one.
        self._local: AnyPath = directory
        if not isinstance(directory, Path):
            self._temporaries = tempfile.TemporaryDirectory(prefix="m2l-")
            self._local = Path(self._temporaries.name)
        shards = safetensors.plan_shards(described, shard_size)
        self._layouts, self._index = safetensors.lay_out(described, shards)
        self._tensors = {
            name: StoredTensor(self._temporary(number), name, *described[name], offset)
            for number, layout in enumerate(self._layouts)
            for name, offset in layout.offsets.items()
        }
        self._hashed: dict[str, str] = {}
        self._begun: set[Unit] = set()
        self._flusher = checkpoints.Flusher()
        self.files = {
            name: number for number, layout in enumerate(self._layouts) for name in layout.offsets
        }

    def _temporary(self, number: int) -> Path:
        return self._local / f".{self._layouts[number].file}.tmp"

    def create(self) -> None:
        """Writes the index of the files of tensors."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._index is not None:
            zarr.put(self.directory / safetensors.INDEX, self._index)

    def units(self) -> list[Unit]:
        """Returns a unit for each file."""
        return [
            Unit((layout.file, number), sum(self._tensors[n].size for n in layout.offsets))
            for number, layout in enumerate(self._layouts)
        ]

    def finished(self) -> Callable[[Unit], bool]:
        """Returns what tells whether a unit is there."""
        return lambda unit: (self.directory / unit.key[0]).is_file()

    def tasks(self, units: Sequence[Unit], block: int, at_once: int) -> Iterator[Task]:
        """Makes the files of units, and cuts these into blocks, as `OrbaxResult.tasks` does."""
        for unit in units:
            self._begin(unit)
            for name in self._layouts[unit.key[1]].offsets:
                length = self._run_length(name, block)
                for span in cut(name, self.described[name][0], None, length):
                    yield Task(name, (span,), (unit,))

    def whole(self, units: Sequence[Unit], name: str) -> Task:
        """Returns the task of a tensor that is made at once."""
        unit = next(unit for unit in units if unit.key[1] == self.files[name])
        self._begin(unit)
        return Task(name, (Span(name, 0, self._tensors[name].size),), (unit,))

    def _begin(self, unit: Unit) -> None:
        """Makes a unit's file, where this process has not yet."""
        if unit in self._begun:
            return
        self._begun.add(unit)
        layout, temporary = self._layouts[unit.key[1]], self._temporary(unit.key[1])
        temporary.unlink(missing_ok=True)
        reserve(temporary, layout.size, layout.header)

    def write(self, task: Task, part: np.ndarray) -> None:
        """Writes what a task has made."""
        tensor = self._tensors[task.name]
        tensor.extents.write_from(part, task.spans[0].start)
        self._wrote(tensor, part.size)

    def copy(self, task: Task, blocks: Iterable[np.ndarray]) -> str:
        """Writes all of a tensor, in blocks that follow one another; returns its SHA-256."""
        tensor = self._tensors[task.name]
        self._hashed[task.name] = tensor.extents.write_blocks(blocks)
        self._wrote(tensor, tensor.size)
        return self._hashed[task.name]

    def _wrote(self, tensor: StoredTensor, elements: int) -> None:
        if isinstance(self.directory, Path):
            self._flusher.wrote([tensor.file], elements * tensor.dtype.itemsize)

    def sha256(self, name: str, unit_is_there: bool) -> str:
        """Returns the SHA-256, in hex, of a tensor's bytes as they are stored."""
        if name in self._hashed:
            return self._hashed[name]
        tensor = self._tensors[name]
        if unit_is_there:
            file = self.directory / self._layouts[self.files[name]].file
            tensor = dataclasses.replace(tensor, file=file)
        return digest.sha256_of_stored(tensor)

    def tensors(self, unit: Unit) -> list[str]:
        """Returns the names of a file's tensors."""
        return [*self._layouts[unit.key[1]].offsets]

    def finish(self, unit: Unit) -> None:
        """Gives a file of which all is written its name, when it is on the disk."""
        temporary, file = self._temporary(unit.key[1]), self.directory / unit.key[0]
        if isinstance(file, Path):
            self._flusher.wait()
            checkpoints.publishing.sync(temporary)
            temporary.rename(file)
        else:
            file.write_bytes(temporary.read_bytes())
            temporary.unlink()


class MemoryResult:
    """Parameters in memory, on the host.

    Args:
        described: name -> (shape, dtype) of every parameter.
        grid: As `OrbaxResult` takes it.
    """

    directory = None

    def __init__(
        self,
        described: Mapping[str, ArraySpec],
        grid: Callable[[str], tuple[int, ...] | None],
    ):
        self.described = described
        self._grids = {name: grid(name) for name in described}
        self.arrays = {name: np.empty(*spec) for name, spec in described.items()}

    def units(self) -> list[Unit]:
        """Returns a unit for each parameter."""
        return [Unit((name, 0), array.size) for name, array in self.arrays.items()]

    def finished(self) -> Callable[[Unit], bool]:
        """Returns what tells that nothing is there before it is merged."""
        return lambda unit: False

    def tasks(self, units: Sequence[Unit], block: int, at_once: int) -> Iterator[Task]:
        """Cuts units as `OrbaxResult.tasks` does."""
        for unit in units:
            name, cells = unit.key[0], self._grids[unit.key[0]]
            for span in cut(name, self.arrays[name].shape, cells, at_once if cells else block):
                yield Task(name, (span,), (unit,))

    def whole(self, units: Sequence[Unit], name: str) -> Task:
        """Returns the task of a parameter that is made at once."""
        unit = next(unit for unit in units if unit.key[0] == name)
        return Task(name, (Span(name, 0, unit.size),), (unit,))

    def write(self, task: Task, part: np.ndarray) -> None:
        """Copies what a task has made to its place."""
        (span,), array = task.spans, self.arrays[task.name]
        if span.index is None:
            array.reshape(-1)[span.start : span.start + span.size] = part
        else:
            array[span.index] = part.reshape(array[span.index].shape)


Result = OrbaxResult | ShardedResult | MemoryResult


def described(
    reference: Checkpoint, dtype: str, roles: Roles
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns name -> (shape, dtype) of the result's tensors.

    What is merged gets the recipe's dtype, as does what is excluded of real numbers; buffers keep
    theirs.
    """
    real = np.dtype(jnp.dtype(dtype))

    def copied_dtype(name: str, source: Checkpoint) -> np.dtype:
        stored = source.parameters[name]
        keeps = source.native and is_buffer(name, stored)
        return real if is_float(stored.dtype) and not keeps else stored.dtype

    dtypes = dict.fromkeys(roles.merged, real)
    dtypes |= {name: copied_dtype(name, source) for name, source in roles.copied.items()}
    shapes = {name: tuple(source.parameters[name].shape) for name, source in roles.copied.items()}
    shapes |= {name: tuple(reference.parameters[name].shape) for name in roles.merged}
    for name, original in roles.repeated.items():
        shapes[name], dtypes[name] = shapes[original], dtypes[original]
    order = [*(name for name in reference.parameters if name in shapes), *shapes]
    return {name: (shapes[name], dtypes[name]) for name in dict.fromkeys(order)}


def nbytes(described: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    """Returns the bytes of the elements."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values())


def describe_checkpoint(
    result: OrbaxResult,
    digests: Mapping[str, str],
    *,
    model: Mapping[str, Json],
    vocabulary: Mapping[str, Json],
    like: Checkpoint,
    made_by: Mapping[str, Json],
    parents: tuple[Mapping[str, str], ...],
) -> Manifest:
    """Writes what makes an m2l checkpoint of the files; its tree is that of `like`."""
    tree = {
        name: node
        for name, node in (like.tree or {}).items()
        if name in result.described
        or name in (like.strings or {})
        or node["value_metadata"].get("skip_deserialize")
    }
    return checkpoints.describe(
        result.directory,
        result.described,
        digests,
        model=model,
        vocabulary=vocabulary,
        made_by=made_by,
        parents=parents,
        tree=tree or None,
        strings=like.strings,
    )


def describe_directory(
    result: ShardedResult,
    final: Path,
    digests: Mapping[str, str],
    *,
    like: Checkpoint,
    fallbacks: Sequence[Checkpoint],
    dtype: str,
    made_by: Mapping[str, Json],
    parents: tuple[Mapping[str, str], ...],
) -> Manifest:
    """Writes what makes a Hugging Face directory of the files.

    All but weights is `like`'s, and of what it lacks the first of the fallbacks' that has it.
    """
    huggingface_directory.copy_companions(
        [source.directory for source in (like, *fallbacks)],
        result.directory,
        tokenizer=like.tokenizer if like.rows or like.adapted else None,
    )
    model = huggingface_directory.config_of([like.model, *(source.model for source in fallbacks)])
    if model:
        key = "dtype" if "dtype" in model else "torch_dtype"
        model[key] = dtype
        text = json.dumps(model, indent=2) + "\n"
        (result.directory / "config.json").write_text(text)
    manifest = Manifest(
        model=model,
        vocabulary={"name": None, "size": model.get("vocab_size"), "fingerprint": None},
        dtype=dtype,
        step=0,
        made_by=dict(made_by),
        parents=tuple(parents),
        parameters={
            name: {"shape": list(shape), "dtype": tensor_dtype.name, "digest": digests[name]}
            for name, (shape, tensor_dtype) in result.described.items()
        },
    )
    manifest = huggingface_directory.write(result.directory, manifest, digests)
    kinds = " ".join(model.get("architectures") or ())
    known = "ForCausalLM" in kinds or "ForConditionalGeneration" in kinds
    write_card(
        result.directory,
        final.name,
        model.get("model_type", "safetensors"),
        manifest,
        dtype,
        generates="ForCausalLM" in kinds if known else None,
    )
    return manifest


_KEY = 16


@contextlib.contextmanager
def staging(out: AnyPath, key: str, first: bool) -> Iterator[AnyPath]:
    """Yields the directory in which a result is made; it stays when the block ends.

    On a local disk that is a hidden one next to the result, elsewhere the result's own.

    Args:
        out: The result.
        key: What is merged and how, as a digest: only the same merge goes on in the directory.
        first: Whether this is the first of the processes that make it.

    Raises:
        MergeError: Another merge makes it right now.
        CheckpointError: The directory cannot be made.
    """
    if not isinstance(out, Path):
        _claim(out, key)
        yield out
        return
    folder = _folder(out, key)
    with Lock(folder / "lock") as lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A courtesy to whoever starts a merge twice: nothing depends on it.
            locked = not first or lock.acquire()
        except OSError as error:
            raise CheckpointError(f"{out}: cannot be made ({error.strerror})") from error
        if not locked:
            raise MergeError(f"{out}: another process is making it right now")
        if first:
            for other in out.parent.glob(f".{out.name}.merge-*"):
                if other != folder and not _in_progress(other):
                    shutil.rmtree(other, ignore_errors=True)
        yield folder / out.name


def publish(out: AnyPath, key: str) -> None:
    """Gives a result that is whole its name, and removes what is left of the merge."""
    if isinstance(out, Path):
        folder = _folder(out, key)
        checkpoints.publish(folder / out.name, out)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        (out / UNFINISHED).unlink()


def discard(out: AnyPath, key: str) -> None:
    """Removes what was made of a result that cannot be finished."""
    if isinstance(out, Path):
        shutil.rmtree(_folder(out, key), ignore_errors=True)


def used_bytes(directory: Path) -> int:
    """Returns the bytes that a local directory's files take on the disk."""
    used = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            # Other processes write there, by temporary files that they rename.
            with contextlib.suppress(FileNotFoundError):
                used += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return used


def _folder(out: Path, key: str) -> Path:
    return out.parent / f".{out.name}.merge-{key[:_KEY]}"


def _claim(out: AnyPath, key: str) -> None:
    marker = out / UNFINISHED
    content = json.dumps({"key": key}).encode()
    if storage.create(marker, content):
        return
    claim = files.parse_json(marker.read_bytes(), marker, kind=dict, error=CheckpointError)
    if claim.get("key") != key:
        raise MergeError(
            f"{out}: another merge was making it: run that one again, choose another --out, or "
            "remove it"
        )


def _in_progress(folder: Path) -> bool:
    """Returns whether a living process of this machine makes something in a folder."""
    with contextlib.suppress(OSError), Lock(folder / "lock") as lock:
        return not lock.acquire()
    return False
