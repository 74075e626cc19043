"""Merges checkpoints of any size: blocks stream in, through one compiled kernel, and out."""

from __future__ import annotations  # By which help() prints types as written.

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from m2l import checkpoints, hub_models, storage
from m2l.checkpoints import Manifest, digest, huggingface_directory, opening, tensor_kinds
from m2l.checkpoints.opening import HUGGINGFACE, ORBAX, Checkpoint
from m2l.checkpoints.spans import Span
from m2l.distributed import Processes
from m2l.errors import CheckpointError, MergeError
from m2l.merging import kernel, outputs, randomness, spectral
from m2l.merging.in_memory import merge_params
from m2l.merging.inputs import (
    InputDigests,
    gather_digests,
    is_finite,
    read_and_check,
    refuse_nonfinite,
)
from m2l.merging.job import MergeJob, prepare, shares
from m2l.merging.method_registry import METHODS
from m2l.merging.outputs import (
    MemoryResult,
    OrbaxResult,
    Result,
    ShardedResult,
    Task,
    Unit,
    discard,
    is_float,
    publish,
    staging,
    used_bytes,
)
from m2l.merging.passes import Analysis, Pass, Segment
from m2l.merging.recipe import Recipe
from m2l.merging.slices import Slices
from m2l.progress import Progress
from m2l.typing import Json, PyTree

SHARD_SIZE, SHARD_SIZE_OF_BUCKETS = 5_000_000_000, 1_000_000_000
_FULL = re.compile(r"No space left on device|Disk quota exceeded")


Model = str | os.PathLike | storage.AnyPath | PyTree
"""A checkpoint's path, or parameters."""


def merge(
    base: Model | None,
    experts: Sequence[Model],
    recipe: Recipe,
    out: str | os.PathLike | None = None,
    *,
    statistics: Sequence[Model] = (),
    subtree: str | None = None,
    output_format: str | None = None,
    vocabulary: Mapping[str, Json] | None = None,
    memory: int | None = None,
    block: int | None = None,
    diagnostics: bool = True,
    verify: bool = True,
    allow_differences: Sequence[str] = (),
    progress: bool = True,
    slices: Slices | None = None,
) -> Manifest | PyTree | None:
    """Merges models: checkpoints into a new one or into memory, and parameters in memory.

    Checkpoints are merged in memory that does not grow with them. Equal inputs give equal
    parameters to the last bit, and so an equal digest, whatever the blocks, the memory and the
    number of processes. The result appears under its name when it is whole and on the disk. A merge
    that was killed, started again with the same arguments, goes on with what is not finished:
    chunks of an m2l checkpoint, files of a Hugging Face directory.

    Processes that have joined (`m2l.distributed.join`) and see the same paths share the work, each
    called with the same arguments.

    Args:
        base: The model that the experts were trained from: a checkpoint or training run of m2l, a
            Hugging Face directory, or owner/name[@revision] on its Hub, a T5X checkpoint. Methods
            that do not need it take from it what is not merged; None then means the first expert.
        experts: The experts, in the order in which sums run.
        recipe: How to merge.
        out: The checkpoint or directory to make; must not exist, unless the same merge made it:
            then nothing is done. None: the parameters are returned.
        statistics: Per expert a checkpoint that `m2l statistics` made, for the methods that need
            one; before them that of the base, if there is one.
        subtree: Of pytrees that Orbax stored, the part that is merged.
        output_format: "orbax" or "huggingface": whose names and layout the result has. By default
            those that all inputs have; of parameters that are returned, "orbax".
        vocabulary: {"name", "size", "fingerprint"} for an m2l checkpoint made of models that do not
            say.
        memory: Bytes that the process may hold.
        block: Elements of a block.
        diagnostics: Whether to measure the task vectors, for the manifest.
        verify: Whether to check the digests of inputs that have them.
        allow_differences: Names of fields in which the models' descriptions may differ all the
            same; "tokenizer" is one.
        progress: Whether to show what it will take, and a progress bar.
        slices: The layers of which base and experts are put together; these then name the models of
            their first layers.

    Returns:
        The manifest of `out`: its parents with their digests, the recipe, and diagnostics; None in
        processes other than the first. Without `out` the parameters: of checkpoints nested dicts of
        NumPy arrays; of parameters in memory what `merge_params` returns, which takes no other
        arguments than these, the recipe and statistics.

    Raises:
        MergeError: The models do not fit each other or the recipe, or hold NaN or infinity; or the
            memory is too small; or another of the processes has failed or stopped.
        CheckpointError: One is missing or damaged, or its tokenizer is missing; `out` exists, or
            the disk is full.
    """
    models = [*([] if base is None else [base]), *experts, *statistics]
    paths = [isinstance(model, str | os.PathLike | storage.AnyPath) for model in models]
    if paths and not any(paths):
        if out is not None or subtree or output_format or vocabulary or allow_differences:
            raise MergeError(
                "parameters in memory are merged in memory: leave out what is of checkpoints "
                "(out, subtree, output_format, vocabulary, allow_differences)"
            )
        return merge_params(base, experts, recipe, statistics)
    if not all(paths):
        raise MergeError("cannot merge checkpoints with parameters in memory: name all by paths")
    base = None if base is None else hub_models.located(base)
    experts = [hub_models.located(expert) for expert in experts]
    prepared = functools.partial(
        prepare,
        base,
        experts,
        recipe,
        statistics=statistics,
        subtree=subtree,
        vocabulary=vocabulary,
        memory=memory,
        block=block,
        diagnostics=diagnostics,
        verify=verify,
        allow_differences=allow_differences,
        slices=slices,
    )
    models = [*([] if base is None else [base]), *experts]
    if output_format == HUGGINGFACE and any(opening.kind(model) != HUGGINGFACE for model in models):
        if out is None:
            raise MergeError(
                "parameters of m2l's layout are merged into memory: leave out output_format"
            )
        return _by_export(prepared, storage.path(out).absolute(), progress)
    with Processes() as processes:
        return _run(prepared(out, output_format=output_format), processes, progress)


def _run(job: MergeJob, processes: Processes, progress: bool) -> Manifest | PyTree | None:
    """Does a job, or takes what the same one has done."""
    if job.out is None and processes.count > 1:
        raise MergeError("each process has a part of the merged parameters: name an `out`")
    if job.out is not None and (manifest := _agree(job, processes)) is not None:
        return manifest if processes.index == 0 else None
    if progress:
        print(f"plan: {job.plan}", file=sys.stderr)
    if job.out is None:
        return _Merge(job, processes, MemoryResult(job.described, job.grid)).run(progress)
    with staging(job.out, job.key, processes.index == 0) as directory:
        try:
            return _Merge(job, processes, _result_in(directory, job)).run(progress)
        except (MergeError, CheckpointError, OSError) as error:
            full = _FULL.search(str(error))
            if processes.count == 1 and (full or not isinstance(error, OSError)):
                # Nothing that the same command could take up.
                discard(job.out, job.key)
            if full:
                raise CheckpointError(
                    f"{job.out}: no space left: {job.plan.size:,} bytes are needed; nothing was "
                    "written"
                ) from error
            raise


def _result_in(directory: storage.AnyPath, job: MergeJob) -> Result:
    if job.output_format == HUGGINGFACE:
        size = SHARD_SIZE if isinstance(directory, Path) else SHARD_SIZE_OF_BUCKETS
        return ShardedResult(directory, job.described, size, job.run_length)
    return OrbaxResult(directory, job.described, job.grid, job.reference.tree)


def compute(job: MergeJob, result: Result, progress: bool = True) -> None:
    """Hands what a job gives to a result that is neither kept nor written."""
    with Processes() as processes:
        _Merge(job, processes, result).run(progress)


def _agree(
    job: MergeJob, processes: Processes, exported: Mapping[str, Json] | None = None
) -> Manifest | None:
    """Returns the manifest of a result that is there already, if process 0 sees it.

    Raises:
        MergeError: The processes were not started with the same arguments.
    """
    manifest = job.finished(exported) if processes.index == 0 else None
    own = {"key": np.array(f"{job.key} {job.out}"), "finished": np.array(manifest is not None)}
    parts = processes.gather("start", own)
    for index, part in enumerate(parts):
        if str(part["key"]) != str(parts[0]["key"]):
            raise MergeError(
                f"process {index} merges something else than process 0: start all with the same "
                "arguments, where all see the same files"
            )
    if parts[0]["finished"] and manifest is None:
        manifest = job.finished(exported)
    return manifest


def _by_export(
    prepared: Callable[..., MergeJob], out: storage.AnyPath, progress: bool
) -> Manifest | None:
    """Merges into an m2l checkpoint, and makes a Hugging Face directory of that."""
    from m2l.checkpoints import huggingface

    with Processes() as processes:
        job = prepared(out, output_format=ORBAX)
        manifest = _agree(job, processes, huggingface.export_options())
    if manifest is not None:
        return manifest if processes.index == 0 else None
    # Another merge to the same place must not be taken for this one.
    between = out.with_name(f".{out.name}.merged-{job.key[:16]}")
    with Processes() as processes:
        _run(prepared(between, output_format=ORBAX), processes, progress)
    with Processes() as processes:
        if processes.index == 0:
            manifest = checkpoints.read_manifest(between)
            huggingface.export_checkpoint(between, out)
            checkpoints.remove(between)
        processes.gather("exported", {})
    return manifest


Outcome = tuple[np.ndarray | None, list[tuple[Checkpoint, np.ndarray]]]
"""Of a task: the digest of what was written, if it is wanted, and those of what was read."""


class _Merge:
    """One merge: its passes and its result.

    Args:
        job: What to merge.
        processes: Those that merge it together.
        result: What takes what is made.
    """

    def __init__(self, job: MergeJob, processes: Processes, result: Result):
        self.job, self.processes, self.result = job, processes, result
        self.method = METHODS[job.recipe.method]
        self._bar: Progress | None = None
        # Elements: what was read and written, all that is to be, and what is to be written.
        self._done = self._total = self._ahead = 0
        merged = [(source, list(job.sizes)) for source in job.used]
        copied: dict[int, tuple[Checkpoint, list[str]]] = {}
        for name, source in job.roles.copied.items():
            copied.setdefault(id(source), (source, []))[1].append(name)
        for source, names in merged:
            names += copied.pop(id(source), (source, []))[1]
        read = [
            (source, [name for name in names if name in source.parameters])
            for source, names in (*merged, *copied.values())
        ]
        self._inputs = InputDigests(read, job.verify)
        self._copied = dict(job.roles.copied)
        for name in filter(job.needs.copies, job.sizes):
            if job.experts[0].parameters[name].dtype == self.job.described[name][1]:
                self._copied[name] = job.experts[0]

    def _advance(self, elements: int) -> None:
        self._done += elements
        # Where a sample has misled, thresholds take one reading more than was planned.
        self._total = max(self._total, self._done + self._ahead)
        if self._bar is not None:
            self._bar.update(self._done, self._total)

    def run(self, progress: bool) -> Manifest | PyTree | None:
        """Computes the merge; returns the manifest, in the first process, or the parameters."""
        job = self.job
        if isinstance(job.out, Path):
            free = shutil.disk_usage(job.out.parent).free
            if free + used_bytes(self.result.directory) < job.plan.size:
                raise CheckpointError(
                    f"{job.out}: no space left: {job.plan.size:,} bytes are needed, {free:,} are "
                    f"free in {job.out.parent}"
                )
        units = self.result.units()
        sizes = {number: unit.size for number, unit in enumerate(units)}
        own = [units[number] for number in shares(sizes, job.process[1])[job.process[0]]]
        names = [self.job.origin(name) for unit in own for name in self._names(unit)]
        written = [name for name in dict.fromkeys(names) if name in job.sizes]
        self._ahead = sum(unit.size for unit in own)
        self._total = job.plan.local * (job.plan.readings - 1) + self._ahead
        bar = Progress(
            f"merging {len(job.experts)} experts", self._total, "M parameters", scale=10**6
        )
        # Grams are read whole.
        read = job.used[: len(job.used) - len(job.statistics) * self.method.whole]
        inputs = [source.parameters for source in read]
        with (
            bar if progress else contextlib.nullcontext() as self._bar,
            Pass(inputs, job.plan.threads, job.plan.block, job.plan.at_once) as self.stream,
        ):
            self.analysis = Analysis(
                job.needs,
                job.base,
                job.experts,
                job.sizes,
                [name for name in job.sizes if name in job.local],
                written,
                self.processes,
                self.stream,
                self._advance,
            )
            self.analysis.run(job.diagnostics)
            self._create()
            self._ahead = 0
            stored = self._write(own)
            if self._inputs:
                check = functools.partial(read_and_check, at_once=job.plan.at_once)
                unread = self._inputs.check(self.processes)
                for _ in self.stream.map(lambda each: check(*each), unread):
                    pass
            if isinstance(self.result, MemoryResult):
                return checkpoints.unflatten(self.result.arrays)
            return self._finish(stored)

    def _create(self) -> None:
        if isinstance(self.result, MemoryResult):
            return
        if self.processes.index == 0:
            self.result.create()
        self.processes.gather("created", {})
        directory = self.result.directory
        if isinstance(directory, Path) and not directory.is_dir():
            raise CheckpointError(
                f"{directory}: process 0 has made it, and process {self.processes.index} does "
                "not see it: all processes need the same file system, or a bucket"
            )

    def _names(self, unit: Unit) -> list[str]:
        result = self.result
        return result.tensors(unit) if isinstance(result, ShardedResult) else [unit.key[0]]

    def _write(self, own: Sequence[Unit]) -> dict[str, str]:
        """Makes this process's units; returns the digests of all tensors."""
        result, job = self.result, self.job
        is_finished = result.finished()
        todo = [unit for unit in own if not is_finished(unit)]
        finished = [unit for unit in own if is_finished(unit)]
        self._advance(sum(unit.size for unit in finished))
        words: dict[str, np.ndarray] = {}
        sha256: dict[str, Future[str]] = {}
        if isinstance(result, OrbaxResult):
            for unit, unit_words in self.stream.map(lambda u: _digest(result.read(u)), finished):
                words[unit.key[0]] = digest.add(words.get(unit.key[0], digest.NOTHING), unit_words)
        elif isinstance(result, ShardedResult):
            for unit in finished:
                for name in result.tensors(unit):
                    sha256[name] = self.stream.pool.submit(result.sha256, name, True)
        names = dict.fromkeys(name for unit in todo for name in self._names(unit))
        wholes = [name for name in names if self._is_whole(self.job.origin(name))]
        tasks = (
            task
            for task in self._joined(result.tasks(todo, job.plan.block, job.plan.at_once))
            if task.name not in wholes
        )
        unwritten = {name: math.prod(shape) for name, (shape, _) in self.job.described.items()}
        unmade = set(wholes)  # Those of no elements are made as well.

        def note(task: Task, outcome: Outcome) -> None:
            origin = self.job.origin(task.name)
            unmade.discard(task.name)
            if outcome[0] is not None:
                words[task.name] = digest.add(words.get(task.name, digest.NOTHING), outcome[0])
            if task.name not in job.roles.repeated:
                for source, read_words in outcome[1]:
                    self._inputs.add(source, origin, read_words, task.size)
            unwritten[task.name] -= task.size
            if isinstance(result, ShardedResult) and not unwritten[task.name]:
                sha256[task.name] = self.stream.pool.submit(result.sha256, task.name, False)
                (unit,) = task.units
                if not any(unwritten[n] or n in unmade for n in result.tensors(unit)):
                    self._finish_file(unit, sha256)
            self._advance(task.size)
            self.processes.check()

        for name in wholes:
            task = result.whole(todo, name)
            note(task, self._make_whole(task))
        for task, outcome in self.stream.map(self._make, tasks):
            note(task, outcome)
        if isinstance(result, ShardedResult):
            read = [name for unit in own for name in result.tensors(unit)]
        else:
            read = [unit.key[0] for unit in own if unit.key[1] == 0]
        checks = [
            (stored, self.stream.pool.submit(digest.sha256_of_stored, stored))
            for name in dict.fromkeys(map(self.job.origin, read))
            for stored in self._inputs.sha256(name)
        ]
        for stored, sha256_of in checks:
            stored.check(sha256_of.result())
        if isinstance(result, MemoryResult):
            return {}
        if isinstance(result, OrbaxResult):
            return gather_digests(words, list(self.job.described), self.processes)
        for unit in todo:
            if not result.finished()(unit):
                self._finish_file(unit, sha256)  # Of no elements.
        local = {name: np.array(future.result()) for name, future in sha256.items()}
        parts = self.processes.gather("digests", local)
        return {name: str(text) for part in parts for name, text in part.items()}

    def _joined(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Joins the parts of what is copied into files, whose bytes are hashed in their order."""
        for name, parts in itertools.groupby(tasks, key=lambda task: task.name):
            if isinstance(self.result, ShardedResult) and self.job.origin(name) in self._copied:
                first, *remaining = parts
                spans = itertools.chain(first.spans, *(part.spans for part in remaining))
                yield dataclasses.replace(first, spans=tuple(spans))
            else:
                yield from parts

    def _finish_file(self, unit: Unit, sha256: dict[str, Future[str]]) -> None:
        for name in self.result.tensors(unit):
            if name not in sha256:
                sha256[name] = self.stream.pool.submit(self.result.sha256, name, False)
            sha256[name].result()
        self.result.finish(unit)

    def _make(self, task: Task) -> Outcome:
        """Computes and writes a part of a tensor."""
        origin = self.job.origin(task.name)
        shape, dtype = self.job.described[task.name]
        if origin in self._copied:
            return self._copy(task, origin)
        if self.method.whole:
            return self._make_whole(task)
        part = self.stream.buffers().take("result", task.size, dtype)
        words = digest.NOTHING if isinstance(self.result, OrbaxResult) else None
        read = [digest.NOTHING for _ in self.job.used]
        summed = tuple(
            self._inputs.sums(source, origin) and source.parameters[origin].dtype.itemsize <= 4
            for source in self.job.used
        )
        for span in task.spans:
            named = dataclasses.replace(span, name=origin)
            merged = np.empty(span.size, dtype) if span.index is not None else None
            if merged is None:
                merged = task.view(part, span, shape)
            for piece, arrays in self.stream.pieces(named):
                block, digests = self._merge_piece(piece, arrays, summed)
                merged[piece.first : piece.first + piece.size] = block
                if words is not None:
                    words = digest.add(words, digests.pop())
                for index, each in zip(np.flatnonzero(summed), digests, strict=True):
                    read[index] = digest.add(read[index], each)
            if span.index is not None:
                view = task.view(part, span, shape)
                view[...] = merged.reshape(view.shape)
        self.result.write(task, part)
        return words, [
            (source, total)
            for source, total, each in zip(self.job.used, read, summed, strict=True)
            if each
        ]

    def _merge_piece(
        self, piece: Segment, arrays: list[np.ndarray], summed: tuple[bool, ...]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        job = self.job
        first, n = int(job.base is not None), len(job.experts)
        base = arrays[0] if self.method.needs_base else None
        with_result = isinstance(self.result, OrbaxResult)
        compiled = kernel.compiled(
            self.method, job.recipe.election, job.recipe.dtype, summed, with_result
        )
        place = None
        if with_result or any(summed):
            place = randomness.boxed(piece.span, piece.first)
        block, digests = compiled(
            base,
            arrays[first : first + n],
            arrays[first + n :],
            self.analysis.inputs(piece),
            place,
            np.uint32(piece.size),
        )
        block = np.asarray(block)[: piece.size]
        if not is_finite(block):
            self._refuse(piece.span, block, piece.first)
        return block, [np.asarray(each) for each in digests]

    def _is_whole(self, name: str) -> bool:
        if self.method.of_matrices:
            return name in self.job.sizes and name not in self._copied
        return self.method.whole and name in self.job.statistics[0].parameters

    def _make_whole(self, task: Task) -> Outcome:
        """Computes and writes a whole kernel, or a part of what has no statistics."""
        shape, dtype = self.job.described[task.name]
        part = np.empty(task.size, dtype)
        for span in task.spans:
            named = dataclasses.replace(span, name=self.job.origin(task.name))
            view = task.view(part, span, shape)
            view[...] = self._merge_whole(named).reshape(view.shape)
        result = self.result
        result.write(task, part)
        if not isinstance(result, OrbaxResult):
            return None, []
        # Of the elements that are in its units.
        return _digest(cut for unit in task.units for cut in result.cut(task, unit, part)), []

    def _merge_whole(self, span: Span) -> np.ndarray:
        """Merges a span by a method that takes whole parameters; one expert at a time."""
        job, name = self.job, span.name
        refuse_nonfinite(job.used[: len(job.used) - len(job.statistics)], span)

        def read(source: Checkpoint, shape: tuple[int, ...], span: Span = span) -> np.ndarray:
            stored = source.parameters[name]
            array = np.empty(span.size, stored.dtype)
            stored.read_span(span, array)
            return array.reshape(shape).astype(np.float32, copy=False)

        shape, grams = (span.size,), None
        if self._is_whole(name):
            shape = tuple(job.reference.parameters[name].shape)
            if job.statistics:
                square = tuple(job.statistics[0].parameters[name].shape)
                gram = Span(name, 0, math.prod(square))
                grams = (read(source, square, gram) for source in job.statistics)
        merged = spectral.merged(
            self.method,
            name,
            None if job.base is None else read(job.base, shape),
            [functools.partial(read, each, shape) for each in job.experts],
            tensor_kinds.has_output_rows(name, job.reference.native, job.reference.model),
            job.needs.arguments(name, np.float64),
            grams,
        )
        block = merged.astype(self.job.described[name][1]).reshape(-1)
        if not is_finite(block):
            self._refuse(span, block)
        return block

    def _refuse(self, span: Span, block: np.ndarray, first: int = 0) -> None:
        refuse_nonfinite(self.job.used, span)
        index = int(np.flatnonzero(~np.isfinite(block.astype(np.float32)))[0])
        raise MergeError(
            f"the merged {span.name}[{span.position(first + index)}] is {block[index]}: too large "
            f"for {self.job.recipe.dtype}; lower the scale"
        )

    def _copy(self, task: Task, name: str) -> Outcome:
        """Writes a part of what is taken from one input as it is, or in another dtype."""
        source = self._copied[name]
        stored, (shape, dtype) = source.parameters[name], self.job.described[task.name]
        recorded = self._inputs.sums(source, name)
        read, written = digest.NOTHING, digest.NOTHING

        def blocks() -> Iterator[tuple[Span, np.ndarray]]:
            nonlocal read, written
            for span in task.spans:
                block = self.stream.buffers().take("copied", span.size, stored.dtype)
                self.stream.read_stored(stored, span, block)
                cast = self._cast(span, block, source, dtype)
                if recorded:
                    words = digest.of_span(block, span)
                    read = digest.add(read, words)
                if isinstance(self.result, OrbaxResult):
                    if not recorded or cast is not block:
                        words = digest.of_span(cast, span)
                    written = digest.add(written, words)
                yield span, cast

        if isinstance(self.result, ShardedResult):
            sha256 = self.result.copy(task, (block for _, block in blocks()))
            if stored.dtype == dtype:
                self._inputs.check_sha256(source, name, sha256)
        else:
            part = np.empty(task.size, dtype)
            for span, block in blocks():
                view = task.view(part, span, shape)
                view[...] = block.reshape(view.shape)
            self.result.write(task, part)
        words = written if isinstance(self.result, OrbaxResult) else None
        return words, [(source, read)] if recorded else []

    def _cast(
        self, span: Span, block: np.ndarray, source: Checkpoint, dtype: np.dtype
    ) -> np.ndarray:
        """Returns what is copied in the result's dtype; refuses what is not finite."""
        if span.name in self.job.sizes and not is_finite(block):
            refuse_nonfinite([source], span)
        if dtype == block.dtype:
            return block
        with np.errstate(over="ignore", invalid="ignore"):
            cast = block.astype(dtype)
        if is_float(dtype) and not is_finite(cast):
            # What is excluded may be infinite, as masks are; it must not become so.
            lost = np.isfinite(block.astype(np.float64)) & ~np.isfinite(cast.astype(np.float64))
            for index in np.flatnonzero(lost)[:1]:
                raise MergeError(
                    f"{source.path}: {span.name}[{span.position(int(index))}] is {block[index]}: "
                    f"too large for {dtype.name}; choose bfloat16 or float32"
                )
        return cast

    def _finish(self, stored: Mapping[str, str]) -> Manifest | None:
        # All have verified what they were to verify.
        self.processes.gather("verified", {})
        manifest = self._publish(stored) if self.processes.index == 0 else None
        self.processes.gather("published", {})
        return manifest

    def _publish(self, stored: Mapping[str, str]) -> Manifest:
        job, result = self.job, self.result
        made_by, parents = job.record()
        if job.diagnostics:
            made_by["diagnostics"] = self.analysis.diagnostics()
        elif self.analysis.densities is not None:
            made_by["diagnostics"] = {"density": self.analysis.densities}
        ordered = {name: stored[name] for name in result.described}
        if isinstance(result, ShardedResult):
            manifest = outputs.describe_directory(
                result,
                job.out,
                ordered,
                like=job.roles.files,
                fallbacks=[job.reference, *job.experts],
                dtype=job.recipe.dtype,
                made_by=made_by,
                parents=parents,
            )
        else:
            manifest = outputs.describe_checkpoint(
                result,
                ordered,
                model=huggingface_directory.config_of(
                    [s.model for s in (job.roles.files, job.reference, *job.experts)]
                ),
                vocabulary=job.vocabulary,
                like=job.reference,
                made_by=made_by,
                parents=parents,
            )
        publish(job.out, job.key)
        return manifest


def _digest(parts: Iterable[tuple[Span, np.ndarray]]) -> np.ndarray:
    return functools.reduce(
        digest.add, (digest.of_span(part, span) for span, part in parts), digest.NOTHING
    )
