"""A merge that was checked and planned before a byte is read: bytes, blocks, memory, time."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from m2l import checkpoints, files, hub_models, storage
from m2l.checkpoints import Manifest, huggingface_directory, zarr
from m2l.checkpoints.adapters import AdaptedTensor
from m2l.checkpoints.digest import is_digest
from m2l.checkpoints.opening import HUGGINGFACE, ORBAX, Checkpoint, recorded_digest
from m2l.checkpoints.reading import EXPORTED, KEY, existing_result
from m2l.checkpoints.spans import Span
from m2l.distributed import rank
from m2l.errors import MergeError
from m2l.merging import inputs, outputs
from m2l.merging.inputs import Roles, memory_of
from m2l.merging.method_registry import METHODS, Method
from m2l.merging.passes import BLOCK, LARGE_CHUNK, SHORT, cores, grid, run_length
from m2l.merging.recipe import Recipe
from m2l.merging.requirements import Requirements
from m2l.merging.slices import Slices
from m2l.merging.spectral import matrix_bytes
from m2l.merging.statistical import gram_bytes
from m2l.typing import Json
from m2l.version import __version__

K = TypeVar("K")

DEFAULT_MEMORY = 1 << 30

# Beside what the process holds now: the compiler, threads, and JAX's own.
_OVERHEAD = 160 << 20
_SMALLEST = 1 << 16
_MEASURED = 256 << 20

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_bytes(text: str) -> int:
    """Returns the number of bytes that "2GiB", "1.5 GB" or "800M" means.

    Raises:
        MergeError: It means none.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", text.upper())
    try:
        return int(float(match[1]) * (_UNITS | _BINARY)[match[2]])
    except (TypeError, ValueError, KeyError):
        raise MergeError(f"cannot parse memory size {text!r}; expected e.g. 2GiB") from None


def spell(count: float) -> str:
    """Returns bytes as people read them: 1.03 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def resident() -> int:
    """Returns the bytes that this process holds in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """What a merge will take.

    Attributes:
        parameters: Of the model.
        local: Of this process.
        experts: How many.
        read: Bytes that this process reads, all readings together.
        write: Bytes that it writes.
        readings: How many times the inputs are read.
        verified: Bytes of inputs that are read once more for their SHA-256.
        block: Elements of a block.
        at_once: Elements of a chunk, or of a part of one, that are read at once.
        blocks: How many blocks this process merges.
        threads: How many threads work.
        memory: Bytes that the process will hold in memory at most.
        free: Bytes free where the result goes; None where that is not known.
        size: Bytes of the result.
        whole: Bytes of the memory that the largest of the parameters takes that are merged whole.
    """

    parameters: int
    local: int
    experts: int
    read: int
    write: int
    readings: int
    verified: int
    block: int
    at_once: int
    blocks: int
    threads: int
    memory: int
    free: int | None
    size: int
    whole: int

    def seconds(self, bandwidth: float) -> float:
        """Returns how long reading and writing take at so many bytes a second."""
        return (self.read + self.write) / bandwidth

    def rows(self) -> list[tuple[str, str]]:
        """Returns the plan as rows of a table."""
        return [
            ("parameters", f"{self.parameters:,}" + self._share()),
            ("experts", f"{self.experts}"),
            ("read", f"{spell(self.read)}, in {self.readings} reading{'s'[: self.readings > 1]}"),
            ("write", f"{spell(self.write)}" + self._free()),
            ("blocks", f"{self.blocks:,} of {self.block:,}, {self.threads} threads"),
            ("memory", f"{spell(self.memory)} at most" + self._at_once()),
        ]

    def _share(self) -> str:
        return "" if self.local == self.parameters else f", {self.local:,} of them here"

    def _at_once(self) -> str:
        return f", {spell(self.whole)} of it for the largest parameter" * bool(self.whole)

    def _free(self) -> str:
        return "" if self.free is None else f" ({spell(self.free)} are free)"

    def __str__(self) -> str:
        return "; ".join(f"{name} {value}" for name, value in self.rows())


def make_plan(
    sources: Sequence[Checkpoint],
    sizes: Mapping[str, int],
    local: Sequence[str],
    *,
    experts: int,
    described: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    readings: int,
    verify: bool,
    states: int,
    memory: int | None,
    block: int | None,
    whole: int,
    in_chunks: bool,
    out: storage.AnyPath | None,
    in_memory: bool = True,
) -> MergePlan:
    """Works out blocks and threads that keep to the memory limit.

    Args:
        sources: All that are read.
        sizes: Name -> elements, of all that is merged.
        local: Those of this process.
        experts: How many experts.
        described: name -> (shape, dtype) of the result.
        readings: How many times all is read.
        verify: Whether inputs' digests are checked.
        states: Bytes that counts and tables take.
        memory: The limit; None: 1 GiB, or what a process that holds much already needs, and what a
            result in memory takes.
        block: Elements of a block; None: chosen by the limit.
        whole: The most bytes that a parameter takes which is merged at once; 0: none is.
        in_chunks: Whether the result is written by chunks.
        out: Where the result goes; None: in memory.
        in_memory: Whether it is kept there.

    Raises:
        MergeError: No block is small enough for the limit; says which limit works. Or the block
            that is asked for is too long.
    """
    if block is not None and not 1 <= block <= BLOCK:
        raise MergeError(f"a block of {block:,} elements: it may have 1 to {BLOCK:,}")
    # A Gram checkpoint may have no parameters.
    widths = [max((p.dtype.itemsize for p in s.parameters.values()), default=0) for s in sources]
    kernel = 4 * len(sources) + 8
    chunks = _chunks(sources, sizes)
    longest = max((length for length, _, _ in chunks), default=0)
    # As it is stored, decoded, and as it is handed over.
    decoded = 3 * max((length * width for length, width, _ in chunks), default=0)
    result = outputs.nbytes(described)
    resulting = result if out is None and in_memory else 0
    memory = memory or max(DEFAULT_MEMORY, resident() + (DEFAULT_MEMORY >> 1)) + resulting
    fixed = resident() + _OVERHEAD + states + sum(map(memory_of, sources)) + whole + resulting
    largest = max(sizes.values())
    result_width = max((dtype.itemsize for _, dtype in described.values()), default=0)

    adapted = [
        tensor
        for source in sources
        for tensor in source.parameters.values()
        if isinstance(tensor, AdaptedTensor)
    ]

    def needs(block: int, at_once: int, threads: int) -> int:
        length = min(block, max(largest, SHORT))
        runs = (min(tensor.best_run(block), tensor.size) for tensor in adapted)
        read = max(length, at_once if longest else 0, *runs)
        # Chunks of the result, and one more where they are not one piece of memory.
        written = max(zarr.CHUNK_BYTES, result_width * at_once) + zarr.CHUNK_BYTES
        # With what is read of the base of adapters.
        a_thread = (
            read * (sum(widths) + 4 * bool(adapted))
            + min(written, 2 * result_width * largest) * in_chunks
        )
        at_a_time = threads if decoded < LARGE_CHUNK else 1
        # One block more: what the threads' results leave for the next.
        blocks = (threads + 1) * length * kernel + length * sum(widths)
        return fixed + threads * a_thread + blocks + at_a_time * decoded

    def cost(choice: tuple[int, int, int]) -> tuple[float, ...]:
        size, at_once, threads = choice
        decoding = sum(-(-length // at_once) * elements for length, _, elements in chunks)
        return -size, decoding / min(threads, cores()), -threads

    choices = [
        (size, max(longest >> halved, size), threads)
        for size in ([block] if block else [BLOCK, BLOCK >> 2, _SMALLEST])
        for halved in range(8 if longest else 1)
        for threads in (cores() + 1, cores(), 1)
    ]
    fitting = sorted((choice for choice in choices if needs(*choice) <= memory), key=cost)
    if not fitting:
        least = min(needs(*choice) for choice in choices)
        raise MergeError(
            f"--memory {spell(memory)} is too little for this merge: {spell(least)} is the least "
            f"that works ({len(sources)} models at once, and {spell(fixed)} for all else"
            + (f", {spell(whole)} of it for the largest parameter)" if whole else ")")
        )
    size, at_once, threads = fitting[0]
    size = min(size, max(largest, SHORT))
    share = sum(sizes[name] for name in local)
    total = sum(sizes.values())
    stored = sum(
        source.parameters[name].size * source.parameters[name].dtype.itemsize
        for source in sources
        for name in local
        if name in source.parameters
    )
    verified = sum(
        source.parameters[name].size * source.parameters[name].dtype.itemsize
        for source in sources
        for name in local
        if verify and name in source.parameters
        if (recorded := recorded_digest(inputs.digested(source.parameters[name])))
        and not is_digest(recorded)
    )
    folders = (out, *out.parents) if isinstance(out, Path) else ()
    parent = next((folder for folder in folders if folder.is_dir()), None)
    status = None if parent is None else os.statvfs(parent)
    return MergePlan(
        parameters=total,
        local=share,
        experts=experts,
        read=stored * (readings + 1),
        write=0 if out is None else result * share // max(1, total),
        readings=readings + 1,
        verified=verified,
        block=size,
        at_once=at_once,
        blocks=sum(-(-sizes[name] // size) for name in local),
        threads=threads,
        memory=needs(size, at_once, threads),
        free=None if status is None else status.f_bavail * status.f_frsize,
        size=result,
        whole=whole,
    )


def _chunks(sources: Sequence[Checkpoint], sizes: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Returns for each array in chunks: elements of a chunk, bytes of an element, elements."""
    stored = [s.parameters[name] for s in sources for name in sizes if name in s.parameters]
    return [(math.prod(p.chunk), p.dtype.itemsize, p.size) for p in stored if p.chunk is not None]


def shares(sizes: Mapping[K, int], processes: int) -> list[list[K]]:
    """Cuts parameters, or units, into consecutive parts of about equal size, one a process."""
    total, parts, done = sum(sizes.values()), [[] for _ in range(processes)], 0
    for name, size in sizes.items():
        # By the position of its middle.
        place = int((done + size / 2) * processes / max(1, total))
        parts[min(processes - 1, place)].append(name)
        done += size
    return parts


def measure_bandwidth(job: "MergeJob") -> float:
    """Measures the bytes a second at which this machine reads the inputs' first megabytes."""
    buffer, read, start = np.empty(1 << 22, np.uint8), 0, time.perf_counter()
    for source in job.used:
        for stored in source.parameters.values():
            count = min(stored.size, buffer.nbytes // stored.dtype.itemsize)
            span = Span(stored.name, 0, count)
            stored.read_span(span, buffer[: count * stored.dtype.itemsize].view(stored.dtype))
            read += count * stored.dtype.itemsize
            if read >= _MEASURED:
                break
    return max(1, read) / (time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class MergeJob:
    """A merge that was checked, and can be planned or done.

    Attributes:
        recipe: How to merge.
        base: The base; None without one.
        experts: The experts.
        statistics: A statistic of each expert, if the method needs them; before them that of the
            base, if there is one.
        reference: Whose parameters are copied where they are not merged.
        roles: How each tensor of the result comes about.
        allowed: Fields that may differ between the models.
        output_format: Whose names and layout the result has, "orbax" or "huggingface".
        out: Where; None: in memory.
        vocabulary: Of an m2l checkpoint to be written.
        sizes: Name -> elements of all that is merged, in order.
        local: The names of which this process counts what must be known before.
        process: Which of how many processes this is.
        diagnostics: Whether to measure the task vectors.
        verify: Whether to check the inputs' digests.
        plan: What it will take.
        tokens: What was done to models whose vocabularies differ, by token; None: nothing.
        slices: The layers of the inputs, if they are put together of models' layers.
        parts: These models, in the order of `slices.paths`.
        subtree: Of pytrees that Orbax stored, the part that is merged.
    """

    recipe: Recipe
    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]
    statistics: tuple[Checkpoint, ...]
    reference: Checkpoint
    roles: Roles
    allowed: tuple[str, ...]
    output_format: str
    out: storage.AnyPath | None
    vocabulary: Mapping[str, Json] | None
    sizes: Mapping[str, int]
    local: frozenset[str]
    process: tuple[int, int]
    diagnostics: bool
    verify: bool
    plan: MergePlan
    tokens: Mapping[str, Json] | None = None
    slices: Slices | None = None
    parts: tuple[Checkpoint, ...] = ()
    subtree: str | None = None

    @functools.cached_property
    def needs(self) -> Requirements:
        """What the recipe needs of these models."""
        return Requirements(
            self.recipe, len(self.experts), parameter_names(self.experts[0], self.reference)
        )

    @functools.cached_property
    def described(self) -> dict[str, outputs.ArraySpec]:
        """Name -> (shape, dtype) of the result's tensors."""
        return outputs.described(self.reference, self.recipe.dtype, self.roles)

    def origin(self, name: str) -> str:
        """Returns the parameter that a tensor of the result is made of."""
        return self.roles.repeated.get(name, name)

    def grid(self, name: str) -> tuple[int, ...] | None:
        """Returns the boxes in which what a tensor is made of is best read; None: rows."""
        origin = self.origin(name)
        if origin in self.roles.copied:
            return self.roles.copied[origin].parameters[origin].chunk
        return grid([source.parameters for source in self.used], origin)

    def run_length(self, name: str, block: int) -> int:
        """Returns how many elements of a tensor in rows are best read at once: about `block`."""
        return run_length([source.parameters for source in self.used], self.origin(name), block)

    @property
    def key(self) -> str:
        """What is merged and how: equal for merges that give the same files."""
        content = {
            "m2l": __version__,
            "recipe": self.recipe.to_dict(),
            "inputs": [s.digest + s.rows for s in (*self.used, self.reference)],
            "to": self.output_format,
            "diagnostics": self.diagnostics,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """What decides the files of the result; of a result, it is in the manifest."""
        content = {
            "recipe": self.recipe.to_dict(),
            "inputs": [[s.format, s.digest + s.rows] for s in (*self.used, self.reference)],
            "to": self.output_format,
            "vocabulary": self.vocabulary,
            "diagnostics": self.diagnostics,
            "allowed": self.allowed,
        }
        if self.output_format == HUGGINGFACE:
            # The result has this model's tokenizer and settings as well.
            content["files"] = files.directory_digest(self.roles.files.directory)
        return files.checksum(content)

    def finished(self, exported: Mapping[str, Json] | None = None) -> Manifest | None:
        """Returns the manifest of `out` if this very merge made it; None if there is nothing.

        Args:
            exported: The options with which the merge was exported, where it was.

        Raises:
            CheckpointError: Something else is there, or it is damaged.
        """

        def is_same(manifest: Manifest) -> bool:
            made_by = manifest.made_by
            key, options = made_by.get(KEY), made_by.get(EXPORTED)
            return (key, options) == (self.identity, exported)

        is_directory = exported is not None or self.output_format == HUGGINGFACE
        name = huggingface_directory.MANIFEST if is_directory else None
        return existing_result(self.out, is_same, name)

    def record(self) -> tuple[dict[str, Json], tuple[dict[str, str], ...]]:
        """Returns what a manifest says of the merge: what made the result, and its parents."""
        made_by = {"kind": "merge", "recipe": self.recipe.to_dict(), KEY: self.identity}
        optional = {
            "numbers": self.needs.resolved(self.sizes),
            "subtree": self.subtree,
            "allowed_differences": list(self.allowed),
        }
        made_by |= {name: value for name, value in optional.items() if value}
        if self.tokens is not None:
            made_by["tokens"] = self.tokens
        reference = self.reference
        used = self.base is not None or reference in self.roles.copied.values()
        used |= self.tokens is not None  # Whose tokens there are, it may have decided.
        parents = [(reference, "base")] if used and reference is not self.experts[0] else []
        parents += [(source, "expert") for source in self.experts]
        if self.slices is not None:
            made_by["slices"] = self.slices.to_json()
            bases = self.slices.bases if self.base is not None else ()
            parents = [
                (source, "base" if path in bases else "expert")
                for path, source in zip(self.slices.paths, self.parts, strict=True)
            ]
        parents += [(source, "statistics") for source in self.statistics]
        return made_by, tuple(
            {"role": role, "path": str(source.path), "digest": source.digest}
            for source, role in parents
        )

    @property
    def used(self) -> list[Checkpoint]:
        """The models that are read for what is merged, in the order in which blocks are."""
        first = [] if self.base is None else [self.base]
        return [*first, *self.experts, *self.statistics]


def prepare(
    base: str | os.PathLike | None,
    experts: Sequence[str | os.PathLike],
    recipe: Recipe,
    out: str | os.PathLike | None = None,
    *,
    statistics: Sequence[str | os.PathLike] = (),
    output_format: str | None = None,
    vocabulary: Mapping[str, Json] | None = None,
    memory: int | None = None,
    block: int | None = None,
    process: tuple[int, int] | None = None,
    diagnostics: bool = True,
    verify: bool = True,
    allow_differences: Sequence[str] = (),
    subtree: str | None = None,
    slices: Slices | None = None,
    in_memory: bool = True,
) -> MergeJob:
    """Checks all that can be checked before a byte is read, and plans; see `merge`.

    Args:
        process: Which of how many processes this is; None: of those that have joined.
        in_memory: Whether a result that is not written is kept in memory.
    """
    if out is None and output_format is None:
        output_format = ORBAX
    process = process or rank()
    if not 0 <= process[0] < process[1]:
        raise MergeError(f"process {process[0]} of {process[1]}: counted from 0")
    inputs.check_counts(base is not None, len(experts), len(statistics), recipe)
    method = METHODS[recipe.method]
    paths = [storage.path(path).absolute() for path in ([] if base is None else [base])]
    paths += [storage.path(path).absolute() for path in experts]
    named = method.draws or bool(recipe.exclude or recipe.varies)
    if slices is not None:
        paths = [hub_models.located(path).absolute() for path in slices.paths]
    parts, output_format = inputs.open_all(
        paths, output_format, named=named, allowed=allow_differences, subtree=subtree
    )
    models = parts if slices is None else slices.compose(parts, allow_differences)
    if len(models) != len(experts) + (base is not None):
        raise MergeError(
            f"slices compose {len(models)} models, of a base and experts that are "
            f"{len(experts) + (base is not None)}"
        )
    statistic_paths = [storage.path(path).absolute() for path in statistics]
    statistic_checkpoints, _ = inputs.open_all(statistic_paths, ORBAX)
    united = None
    if recipe.tokenizer is not None:
        from m2l.merging.reindexing import reindexed

        united = reindexed(
            models,
            statistic_checkpoints,
            recipe.tokenizer,
            has_base=base is not None,
            described=output_format == ORBAX and out is not None,
            allowed=allow_differences,
        )
        models, statistic_checkpoints = united.models, united.statistics
    reference, expert_checkpoints = models[0], models[len(models) - len(experts) :]
    if out is not None:
        out = storage.path(out).absolute()
        opened = [*parts, *statistic_checkpoints]
        inputs.check_destination(out, [path for s in opened for path in s.paths])
    own_files = None if united is None else united.files
    roles = inputs.assign_roles(models, len(experts), recipe, allow_differences, own_files)
    inputs.check_statistics(method, models, statistic_checkpoints)
    inputs.check_matrices(method, {n: reference.parameters[n].shape for n in roles.merged})
    if output_format == ORBAX and out is not None:
        # As the experts read it: the base may have been trained without their chat template.
        vocabulary = vocabulary or _vocabulary([*expert_checkpoints, reference])
        checkpoints.check_tokenizer(vocabulary)
    sizes = {name: reference.parameters[name].size for name in roles.merged}
    # A base that the method does not take is read only for what is copied.
    base_checkpoint = reference if base is not None and method.needs_base else None
    used = [s for s in (base_checkpoint, *expert_checkpoints) if s is not None]
    inputs.warn_of_repetition(used)
    used += statistic_checkpoints
    local = shares(sizes, process[1])[process[0]]
    needs = Requirements(recipe, len(experts), parameter_names(expert_checkpoints[0], reference))
    needs.resolved(sizes)
    return MergeJob(
        recipe=recipe,
        base=base_checkpoint,
        experts=tuple(expert_checkpoints),
        statistics=tuple(statistic_checkpoints),
        reference=reference,
        roles=roles,
        allowed=tuple(allow_differences),
        output_format=output_format,
        out=out,
        vocabulary=vocabulary,
        sizes=sizes,
        local=frozenset(local),
        process=process,
        slices=slices,
        subtree=subtree,
        parts=() if slices is None else tuple(parts),
        diagnostics=(diagnostics and out is not None and method.needs_base and any(sizes.values())),
        verify=verify,
        plan=make_plan(
            used,
            sizes,
            local,
            experts=len(experts),
            described=outputs.described(reference, recipe.dtype, roles),
            readings=needs.readings(sizes),
            verify=verify and any(s.has_digests for s in used),
            states=needs.nbytes,
            memory=memory,
            block=block,
            whole=_whole(method, reference, statistic_checkpoints, roles.merged),
            in_chunks=output_format == ORBAX and out is not None,
            out=out,
            in_memory=in_memory,
        ),
        tokens=None if united is None else united.report,
    )


def parameter_names(expert: Checkpoint, reference: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Returns the names by which patterns match each parameter: m2l's, and that in the files."""
    return {name: (expert.name_of(name)[0], name) for name in reference.parameters}


def _whole(
    method: Method, reference: Checkpoint, statistics: Sequence[Checkpoint], names: Sequence[str]
) -> int:
    """Returns the bytes of memory that the largest parameter takes of those merged at once."""
    shapes = {name: reference.parameters[name].shape for name in names}
    if method.of_matrices:
        return max(matrix_bytes(method, *each) for each in shapes.items())
    if not method.whole:
        return 0
    grams = statistics[0].parameters
    sides = {name: grams[name].shape[0] for name in names if name in grams}
    return max(
        (gram_bytes(shapes[name], side, method.needs_base) for name, side in sides.items()),
        default=0,
    )


def _vocabulary(candidates: Sequence[Checkpoint]) -> Mapping[str, Json]:
    """Returns the first vocabulary of the candidates."""
    for source in candidates:
        if source.vocabulary is not None:
            return source.vocabulary
    if not any(source.model for source in candidates):
        # Of pytrees that m2l did not write; such a result can be merged, and not evaluated.
        return {"name": None, "size": None, "fingerprint": None}
    raise MergeError(
        f"{candidates[0].path}: its vocabulary is not known to m2l: name the tokenizer with "
        "--vocabulary, or write --to huggingface"
    )
