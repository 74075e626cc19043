"""Makes deltas: experts as what differs from their base, without loss or approximately.

ComPEFT (Yadav et al. 2023, arXiv:2311.13171): of a task vector the signs of its `density` largest
entries by magnitude, over the whole model, and one number, alpha times its standard deviation.
EMR-Merging (Huang et al. 2024, arXiv:2405.17461): of several experts one task vector, elected as
the method `emr` does, and of each a mask and a number that restore its L1 norm.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from m2l import checkpoints, files, signals, storage
from m2l.checkpoints import deltas, digest, huggingface_directory, opening, safetensors, zarr
from m2l.checkpoints.deltas import COMPEFT, DIFFERENCE, EMR, LOSSLESS, MASKED, TERNARY, WHOLE, Delta
from m2l.checkpoints.importing import float_dtype
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.opening import HUGGINGFACE, Checkpoint
from m2l.checkpoints.publishing import check_absent, publishing
from m2l.checkpoints.saving import array_records
from m2l.checkpoints.spans import ArraySpec, Span, boxes, cut, in_parallel, read_box
from m2l.checkpoints.tensor_kinds import DELTA_RECORD, is_buffer, is_float
from m2l.checkpoints.tokenizer import is_path, name_in, read_files
from m2l.errors import CheckpointError, MergeError
from m2l.merging import inputs, thresholds
from m2l.merging.engine import SHARD_SIZE
from m2l.merging.thresholds import LARGEST, BitRange, Counts
from m2l.progress import Progress
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json

Box = tuple[slice, ...]

_BLOCK = 1 << 20


def compress(
    experts: Sequence[PathLike],
    base: PathLike,
    out: PathLike,
    *,
    method: str = LOSSLESS,
    density: float = 0.2,
    alpha: float = 1.0,
    dtype: str = "float32",
    progress: bool = True,
) -> list[Delta]:
    """Writes experts as differences from their base; BASE+OUT then names the expert.

    Memory: a few blocks of each model, of 2 M elements.

    Args:
        experts: One expert; of "emr" two or more.
        base: The base.
        out: The directory to make; must not exist, unless the same call made it. Of "emr" it has a
            directory for each expert, of its name, and one that they share.
        method: "lossless", "compeft" or "emr".
        density: Of "compeft", the share of entries that get a sign.
        alpha: Of "compeft", how many standard deviations they are.
        dtype: Of the task vector that "emr" shares.
        progress: Whether to show a progress bar.

    Returns:
        One for each expert.

    Raises:
        MergeError: A setting is out of range, or models do not fit each other.
        CheckpointError: A model is missing or damaged; `out` exists.
    """
    _check_settings(method, len(experts), density, alpha)
    element_type = np.dtype(float_dtype(dtype))
    options: dict[str, Json] = {"method": method}
    if method == COMPEFT:
        options |= {"density": density, "alpha": alpha}
    if method == EMR:
        options |= {"dtype": element_type.name}
    out = storage.path(out).absolute()
    paths = [storage.path(path).absolute() for path in (base, *experts)]
    opened, _ = inputs.open_all(paths, None, named=False)
    inputs.check_destination(out, [path for each in opened for path in each.paths])
    key = files.checksum([[each.content_digest for each in opened], options])
    places = _places(out, paths[1:], method)
    if (same := _existing(out, places, key)) is not None:
        return same
    check_absent(out)
    if method != LOSSLESS:
        inputs.check_alike(opened)
    for source in opened:
        _check_digests(source)
    with publishing(out, 1 << 20) as staging:
        writer = _Writer(opened, _places(staging, paths[1:], method), method, progress)
        settings: list[dict[str, float]] = [{}]
        if method == COMPEFT:
            settings = [writer.write_ternary(density, alpha)]
        elif method == EMR:
            settings = writer.write_masked(staging / deltas.SHARED, element_type)
        writer.write_exact()
        for number, numbers in enumerate(settings):
            writer.finish(number, numbers, key)
    return [deltas.read(place) for place in places]


def _check_settings(method: str, experts: int, density: float, alpha: float) -> None:
    if method not in deltas.METHODS:
        raise MergeError(f"--method {method}: expected {', '.join(deltas.METHODS)}")
    if method == EMR and experts < 2:
        raise MergeError(f"emr elects the task vector of two experts or more; there is {experts}")
    if method != EMR and experts != 1:
        raise MergeError(f"{method} makes a delta of one expert; there are {experts}")
    if not 0 < density <= 1:
        raise MergeError(f"a density of {density:g}: expected a share of the entries, in (0, 1]")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise MergeError(f"alpha {alpha:g}: expected a number above 0")


def _places(out: AnyPath, experts: Sequence[AnyPath], method: str) -> list[AnyPath]:
    """Returns the directory of each expert's delta."""
    if method != EMR:
        return [out]
    names = [path.name for path in experts]
    plain = len({*names, deltas.SHARED}) > len(names) and not any("+" in name for name in names)
    return [out / (name if plain else f"expert_{i}") for i, name in enumerate(names)]


def _existing(out: AnyPath, places: Sequence[AnyPath], key: str) -> list[Delta] | None:
    """Returns what the same call has made before, and says so on stderr."""
    if not all(map(deltas.is_delta, places)):
        return None
    try:
        results = [deltas.read(place) for place in places]
    except CheckpointError:
        return None  # What it is of is then not known, and refused.
    if any(delta.key != key for delta in results):
        return None
    print(
        f"m2l: {out}: already there, made from the same inputs with the same options",
        file=sys.stderr,
    )
    return results


def _check_digests(source: Checkpoint) -> None:
    """Reads the parameters of which a digest is recorded, and compares it.

    Raises:
        CheckpointError: One is damaged.
    """

    def check(name: str) -> None:
        inputs.read_and_check(source, name, _BLOCK)
        signals.check()

    in_parallel(check, source.parameters)


class _Writer:
    """Writes the deltas of experts of one base, each into a directory."""

    def __init__(
        self, opened: Sequence[Checkpoint], places: Sequence[AnyPath], method: str, progress: bool
    ):
        self.base, *self.experts = opened
        self.places, self.method, self._progress = places, method, progress
        approximate = {COMPEFT: TERNARY, EMR: MASKED}.get(method)
        self.copies = [dict(expert.copies) for expert in self.experts]
        self.kinds = [
            {n: self._kind(expert, n, approximate) for n in expert.parameters if n not in copies}
            for expert, copies in zip(self.experts, self.copies, strict=True)
        ]
        # Of what is restored to the bit the experts' own.
        self.digests: list[dict[str, str]] = [{} for _ in self.experts]
        self.unified: dict[str, str] | None = None
        self.errors = [0.0 for _ in self.experts]

    def _kind(self, expert: Checkpoint, name: str, approximate: str | None) -> str:
        tensor, other = expert.parameters[name], self.base.parameters.get(name)
        if other is None or tuple(other.shape) != tuple(tensor.shape):
            return WHOLE
        both_float = is_float(tensor.dtype) and is_float(other.dtype)
        buffer = self.base.native and is_buffer(name, tensor)
        if approximate is not None and both_float and not buffer:
            return approximate
        return DIFFERENCE if both_float or tensor.dtype == other.dtype else WHOLE

    def _chunk(self, name: str, expert: Checkpoint) -> tuple[int, ...]:
        """Returns the shape of blocks: of 8 MiB in float32, and in boxes as models are stored."""
        sources = (self.base.parameters.get(name), expert.parameters[name])
        grids = (tensor.chunk for tensor in sources if tensor is not None)
        grid = next((grid for grid in grids if grid is not None), None)
        return zarr.chunk_shape(tuple(expert.parameters[name].shape), 4, grid)

    def _boxes(
        self, title: str, names: Sequence[str], expert: Checkpoint
    ) -> Iterator[tuple[str, Box]]:
        """Yields the blocks of parameters of an expert, in order; shows progress."""
        sizes = {name: expert.parameters[name].size for name in names}
        done, silent = 0, not self._progress
        total = sum(sizes.values())
        with Progress(title, total, "M parameters", silent=silent, scale=10**6) as bar:
            for name, size in sizes.items():
                shape = tuple(expert.parameters[name].shape)
                for box in boxes(shape, self._chunk(name, expert)):
                    yield name, box
                    signals.check()
                done += size
                bar.update(done)

    def _task_vectors(self, name: str, box: Box) -> list[np.ndarray]:
        """Reads a block of the experts' task vectors, float32."""
        base = read_box(self.base.parameters[name], box).astype(np.float32)
        taus = [
            read_box(expert.parameters[name], box).astype(np.float32) - base
            for expert in self.experts
        ]
        if not all(np.isfinite(tau).all() for tau in taus):
            span = Span(name, 0, self.base.parameters[name].size)
            inputs.refuse_nonfinite([self.base, *self.experts], span)
        return taus

    def _create(
        self, item: AnyPath, kind: str, dtype: np.dtype | None, names: Sequence[str], number: int
    ) -> dict[str, object]:
        """Creates the arrays of an expert's codes; of a dtype, or None: as wide as its own."""
        stores, expert = {}, self.experts[number]
        for name in names:
            tensor = expert.parameters[name]
            words = np.dtype(f"u{tensor.dtype.itemsize}") if dtype is None else dtype
            shape, chunk = tuple(tensor.shape), self._chunk(name, expert)
            stores[name] = deltas.create(item / deltas.ARRAYS, name, shape, words, chunk, kind)
        return stores

    def write_exact(self) -> None:
        """Writes the parameters that are restored to the bit."""
        for number, expert in enumerate(self.experts):
            totals: dict[str, np.ndarray] = {}
            stores: dict[str, object] = {}
            for kind in (DIFFERENCE, WHOLE):
                names = [name for name, each in self.kinds[number].items() if each == kind]
                stores |= self._create(self.places[number], kind, None, names, number)
                totals |= dict.fromkeys(names, digest.NOTHING)
            for name, box in self._boxes("differences", [*totals], expert):
                tensor = expert.parameters[name]
                elements, base = read_box(tensor, box), None
                if self.kinds[number][name] == DIFFERENCE:
                    base = read_box(self.base.parameters[name], box)
                _write(stores[name], box, deltas.encode(base, elements))
                part = digest.of_box(elements, box, tuple(tensor.shape))
                totals[name] = digest.add(totals[name], part)
            self.digests[number] = {name: digest.to_hex(words) for name, words in totals.items()}

    def write_ternary(self, density: float, alpha: float) -> dict[str, float]:
        """Writes the signs of the largest entries; returns the settings, with the scalar."""
        names = [name for name, kind in self.kinds[0].items() if kind == TERNARY]
        size = sum(self.base.parameters[name].size for name in names)
        sums = np.zeros(2)

        def read(intervals: Sequence[Sequence[BitRange]]) -> list[list[Counts]]:
            counts = Counts(intervals[0][0])
            sums[:] = 0
            for name, box in self._boxes("threshold", names, self.experts[0]):
                (tau,) = self._task_vectors(name, box)
                sums[:] += tau.sum(dtype=np.float64), np.square(tau, dtype=np.float64).sum()
                bits = np.abs(tau).view(np.uint32).reshape(-1)
                low, high = np.uint32(counts.interval.low), np.uint32(counts.interval.high)
                inside = bits[(bits >= low) & (bits <= high)]
                counts.add(counts.interval.places(inside), int(np.count_nonzero(bits > high)))
            return [[counts]]

        rank = max(1, int(density * size))
        everywhere = [[BitRange(0, LARGEST)]]
        ((trimming,),) = thresholds.select(read, everywhere, [[rank]], size)
        if rank == size:
            read(everywhere)
        mean, squares = sums / size
        scale = float(np.float32(alpha * math.sqrt(max(0.0, squares - mean * mean))))
        missed = 0.0
        stores = self._create(self.places[0], TERNARY, np.dtype(np.uint8), names, 0)
        for name, box in self._boxes("signs", names, self.experts[0]):
            (tau,) = self._task_vectors(name, box)
            codes = np.where(tau > 0, np.uint8(1), np.where(tau < 0, np.uint8(2), np.uint8(0)))
            codes[np.abs(tau) < trimming.threshold] = 0
            _write(stores[name], box, codes)
            change = deltas.changes(codes, scale, None)
            missed += float(np.square(change - tau, dtype=np.float64).sum())
        self.errors[0] = math.sqrt(missed / sums[1]) if sums[1] else 0.0
        return {"density": density, "alpha": alpha, "scale": scale}

    def write_masked(self, shared: AnyPath, dtype: np.dtype) -> list[dict[str, float]]:
        """Writes the elected task vector and each expert's mask; returns the settings of each."""
        names = [name for name, kind in self.kinds[0].items() if kind == MASKED]
        # Of each expert sum |tau|, sum |m u|, sum tau^2, sum tau m u, sum (m u)^2.
        sums = np.zeros((len(self.experts), 5))
        totals = dict.fromkeys(names, digest.NOTHING)
        unified_stores = self._create(shared, WHOLE, dtype, names, 0)
        stores = [
            self._create(place, MASKED, np.dtype(np.uint8), names, number)
            for number, place in enumerate(self.places)
        ]
        for name, box in self._boxes("masks", names, self.experts[0]):
            taus, shape = self._task_vectors(name, box), tuple(self.base.parameters[name].shape)
            unified = _elected(taus).astype(dtype)
            _write(unified_stores[name], box, unified)
            totals[name] = digest.add(totals[name], digest.of_box(unified, box, shape))
            direction = np.sign(unified.astype(np.float32))
            for number, tau in enumerate(taus):
                mask = (tau * direction > 0).astype(np.uint8)
                _write(stores[number][name], box, mask)
                own = deltas.changes(mask, 1.0, unified).astype(np.float64)
                wide = tau.astype(np.float64)
                products = (np.abs(wide), np.abs(own), wide * wide, wide * own, own * own)
                sums[number] += [product.sum() for product in products]
        records = array_records(
            {name: (tuple(self.base.parameters[name].shape), dtype) for name in names},
            {name: digest.to_hex(words) for name, words in totals.items()},
        )
        content = files.checksum(records)
        files.write_record(shared / DELTA_RECORD, {"digest": content, "tensors": records})
        self.unified = {"path": deltas.SHARED, "digest": content}
        settings = []
        for number, (l1, own, squares, product, own_squares) in enumerate(sums):
            scale = float(np.float32(l1 / own)) if own else 1.0
            missed = max(0.0, squares - 2 * scale * product + scale * scale * own_squares)
            self.errors[number] = math.sqrt(missed / squares) if squares else 0.0
            settings.append({"scale": scale})
        return settings

    def finish(self, number: int, settings: Mapping[str, float], key: str) -> None:
        """Writes an expert's other files, and the record."""
        expert, place = self.experts[number], self.places[number]
        vocabulary = _write_files(expert, place / deltas.FILES)
        exact = {n for n, kind in self.kinds[number].items() if kind in (DIFFERENCE, WHOLE)}
        specs: dict[str, ArraySpec] = {}
        for name, tensor in expert.parameters.items():
            original = self.copies[number].get(name, name)
            dtype = tensor.dtype if original in exact else np.dtype(np.float32)
            specs[name] = tuple(tensor.shape), dtype
        shared = 0
        if self.unified is not None:
            shared = _nbytes(place.parent / self.unified["path"])
        manifest = expert.manifest
        origin = {}
        if manifest is not None:
            made_by, parents = dict(manifest.made_by), [dict(p) for p in manifest.parents]
            origin = {"step": manifest.step, "made_by": made_by, "parents": parents}
        stored = sum(tensor.size * tensor.dtype.itemsize for tensor in expert.parameters.values())
        delta = Delta(
            path=place,
            method=self.method,
            native=expert.native,
            base={"path": str(self.base.path), "digest": self.base.content_digest},
            expert={"path": str(expert.path), "digest": expert.content_digest},
            tensors=array_records(specs, dict.fromkeys(specs, digest.to_hex(digest.NOTHING))),
            kinds=self.kinds[number],
            copies=self.copies[number],
            settings=dict(settings),
            key=key,
            error=float(f"{self.errors[number]:.6g}"),
            model=dict(expert.model),
            vocabulary=vocabulary,
            origin=origin,
            unified=self.unified,
            nbytes={"expert": stored, "delta": _nbytes(place / deltas.ARRAYS), "shared": shared},
        )
        digests = self._restored_digests(number, delta)
        dataclasses.replace(delta, tensors=array_records(specs, digests)).write()

    def _restored_digests(self, number: int, delta: Delta) -> dict[str, str]:
        """Returns the digest of each parameter as it is restored.

        Raises:
            CheckpointError: What is to be the expert's to the bit is not: storage is at fault.
        """
        digests: dict[str, str] = {}
        restored = delta.apply(self.base.parameters)

        def compute(name: str) -> None:
            digests[name] = digest.to_hex(digest.of_stored(restored[name]))
            if self.digests[number].get(name, digests[name]) != digests[name]:
                raise CheckpointError(
                    f"{delta.path}: {name} was not stored as it was written; make it again"
                )
            signals.check()

        in_parallel(compute, [name for name in restored if name not in delta.copies])
        return digests | {name: digests[original] for name, original in delta.copies.items()}


def _elected(taus: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the entries of the elected signs that are the largest, float32."""
    sign = np.sign(sum(taus[1:], start=taus[0]))
    largest = [np.where(tau * sign > 0, np.abs(tau), np.float32(0)) for tau in taus]
    return sign * np.max(largest, axis=0)


def _write(store: object, box: Box, block: np.ndarray) -> None:
    try:
        store[box].write(block).result()
    except ValueError as error:
        raise CheckpointError(f"{store.kvstore.url}: cannot be written ({error})") from error


def _nbytes(folder: AnyPath) -> int:
    return sum(map(storage.size, storage.list_files(folder)))


def _write_files(expert: Checkpoint, folder: AnyPath) -> Mapping[str, Json] | None:
    """Writes config.json, the tokenizer and what else belongs to an expert; returns its vocabulary.

    The name of a vocabulary whose files are written is as in a checkpoint that carries them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if expert.native:
        own = expert.tokenizer if expert.adapted else None
        huggingface_directory.copy_companions([expert.directory], folder, tokenizer=own)
        config = expert.directory / huggingface_directory.CONFIG
        if config.is_file():
            (folder / huggingface_directory.CONFIG).write_bytes(config.read_bytes())
        return None
    vocabulary = expert.vocabulary
    if vocabulary is not None and is_path(vocabulary["name"]):
        for name, data in read_files(vocabulary["name"]).items():
            (folder / name).write_bytes(data)
        return {**vocabulary, "name": name_in(vocabulary["name"])}
    if vocabulary is None and expert.tokenizer is not None:
        huggingface_directory.copy_companions([expert.tokenizer], folder)
    return vocabulary


def restore(model: PathLike, out: PathLike) -> Manifest:
    """Writes the expert of BASE+DELTA, without loss: every bit of its parameters, and its files.

    Of Hugging Face's a directory with m2l's manifest; else a checkpoint, with the manifest that the
    expert had. Memory: a few blocks.

    Args:
        model: BASE+DELTA.
        out: The directory to make; must not exist.

    Raises:
        CheckpointError: A block is damaged, or the base is another; `out` exists.
    """
    path = storage.path(model).absolute()
    native = opening.kind(path) == HUGGINGFACE
    opened = opening.open(path, native=native, named=False)
    inputs.check_destination(out, opened.paths)
    specs = {n: (tuple(t.shape), t.dtype) for n, t in opened.parameters.items()}
    if not native:
        return _restore_checkpoint(opened, specs, out)
    with storage.local_output(storage.path(out).absolute()) as local:
        return _restore_directory(opened, specs, local)


def _elements(opened: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """Yields the elements of a parameter in row-major order, 1-D, and compares their digest."""
    tensor, total = opened.parameters[name], digest.NOTHING
    for span in cut(name, tuple(tensor.shape), None, _BLOCK):
        elements = np.empty(span.size, tensor.dtype)
        tensor.read_span(span, elements)
        total = digest.add(total, digest.of_span(elements, span))
        yield elements
        signals.check()
    tensor.check(digest.to_hex(total))


def _restore_checkpoint(
    opened: Checkpoint, specs: Mapping[str, ArraySpec], out: PathLike
) -> Manifest:
    delta = opened.delta
    unknown = {"name": None, "size": None, "fingerprint": None}
    whole = opened.tree is not None and all(name in opened.tree for name in specs)
    tree = opened.tree if whole and not delta.model else None
    parents = delta.origin.get("parents", [])
    with checkpoints.writing(out, specs) as writer:
        for name in specs:
            for elements in _elements(opened, name):
                writer.append(name, elements)
        return writer.finish(
            step=delta.origin.get("step", 0),
            tree=tree,
            strings=opened.strings if tree else None,
            model=delta.model,
            vocabulary=opened.vocabulary or unknown,
            made_by=delta.origin.get("made_by", {"kind": "convert", "from": str(opened.path)}),
            parents=tuple(parents),
        )


def _restore_directory(opened: Checkpoint, specs: Mapping[str, ArraySpec], out: Path) -> Manifest:
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    with publishing(out, size) as temporary:
        temporary.mkdir(exist_ok=True)
        huggingface_directory.copy_companions([opened.directory], temporary)
        config = opened.directory / huggingface_directory.CONFIG
        if config.is_file():
            (temporary / huggingface_directory.CONFIG).write_bytes(config.read_bytes())
        shards = safetensors.plan_shards(specs, SHARD_SIZE)
        digests = {}
        for name, extents in safetensors.create(temporary, specs, shards).items():
            digests[name] = extents.write_blocks(_elements(opened, name))
        dtypes = {dtype.name for _, dtype in specs.values()}
        manifest = Manifest(
            model=opened.model,
            vocabulary={"name": None, "size": opened.model.get("vocab_size"), "fingerprint": None},
            dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
            step=0,
            made_by={"kind": "convert", "from": str(opened.path)},
            parents=({"role": "delta", "path": str(opened.path), "digest": opened.digest},),
            parameters=array_records(specs, digests),
        )
        return huggingface_directory.write(temporary, manifest, digests)
