"""Merges checkpoints of any size: blocks stream in, through one compiled kernel, and out."""

import contextlib
import functools
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints
from m2l.checkpoints import Manifest, identity
from m2l.errors import CheckpointError, MergeError
from m2l.merging import kernel, results, sources
from m2l.merging.analysis import Analysis
from m2l.merging.job import Job, prepare
from m2l.merging.method import Consensus, add
from m2l.merging.methods import METHODS
from m2l.merging.passes import Pass, Span, spans
from m2l.merging.recipe import Recipe
from m2l.merging.results import Result
from m2l.merging.sources import HUGGINGFACE, ORBAX, Source, check_digest, refuse_nonfinite
from m2l.merging.workplace import Journal, ProcessStopped, Workplace
from m2l.progress import Progress

SHARD_SIZE = 5_000_000_000
_FULL = re.compile(r"No space left on device|Disk quota exceeded")


def merge(
    base: str | os.PathLike | None,
    experts: Sequence[str | os.PathLike],
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    progress: bool = True,
    **options: Any,
) -> Manifest | None:
    """Merges checkpoints into a new one, in memory that does not grow with the model.

    Equal inputs give equal parameters to the last bit, and so an equal digest, whatever the blocks,
    the memory and the number of processes. The result appears under its name when it is whole, on
    the disk, and was read again and found to be what was written. A merge that was killed, started
    again with the same arguments, goes on from the last block that was on the disk.

    Args:
        base: The model that the experts were trained from: a checkpoint or training run of m2l, a
            Hugging Face directory, a T5X checkpoint. Methods that do not need it take from it what
            is not merged; None then means the first expert.
        experts: The experts, in the order in which sums run.
        recipe: How to merge.
        out: The checkpoint or directory to make; must not exist, unless the same merge made it:
            then nothing is done.
        progress: Whether to show what it will take, and a progress bar.
        **options: statistics: per expert a checkpoint that `m2l statistics` made, for the methods
            that need one. to: "orbax" or "huggingface"; by default what all inputs are.
            vocabulary: {"name", "size", "fingerprint"} for an m2l checkpoint made of models that do
            not say. memory: bytes that the process may hold. block: elements of a block. process:
            (index, count), where several processes that see the same files share the work, each
            started with the same arguments but for its index; by default JAX's. diagnostics:
            whether to measure the task vectors. verify: whether to check the digests of inputs
            that have them. allow_differences: names of fields in which the models' descriptions may
            differ all the same; "tokenizer" is one.

    Returns:
        The manifest of `out`: its parents with their digests, the recipe, and diagnostics. None in
        processes other than the first.

    Raises:
        MergeError: The models do not fit each other or the recipe, or hold NaN or infinity; or the
            memory is too small.
        CheckpointError: One is missing or damaged, or its tokenizer is missing; `out` exists, or
            the disk is full.
    """
    to = options.get("to")
    if to == HUGGINGFACE and any(
        sources.kind(Path(path)) != HUGGINGFACE for path in ([base] if base else []) + [*experts]
    ):
        return _by_export(base, experts, recipe, out, progress=progress, **options)
    job = prepare(base, experts, recipe, out, **options)
    if (manifest := job.finished()) is not None:
        return manifest if job.process[0] == 0 else None
    if progress:
        print(f"plan: {job.plan}", file=sys.stderr)
    with Workplace(job.out, job.key, job.process) as work:
        try:
            return _Merge(job, work).run(progress)
        except ProcessStopped:
            raise  # What the others left is to be taken up.
        except (MergeError, CheckpointError) as error:
            # Nothing that the same command could take up.
            work.remove()
            if _FULL.search(str(error)):
                raise CheckpointError(
                    f"{job.out}: no space left: {job.plan.size:,} bytes are needed; nothing was "
                    "written"
                ) from error
            raise
        except OSError as error:
            work.remove()
            if not _FULL.search(str(error)):
                raise
            raise CheckpointError(
                f"{job.out}: no space left: {job.plan.size:,} bytes are needed; nothing was written"
            ) from error


def _by_export(
    base: Any, experts: Sequence[Any], recipe: Recipe, out: Any, progress: bool, **options: Any
) -> Manifest | None:
    """Merges into an m2l checkpoint, and makes a Hugging Face directory of that."""
    from m2l.checkpoints import huggingface

    out = Path(out).absolute()
    options = options | {"to": ORBAX}
    job = prepare(base, experts, recipe, out, **options)
    if (manifest := job.finished(huggingface.export_options())) is not None:
        return manifest if job.process[0] == 0 else None
    # Another merge to the same place must not be taken for this one.
    between = out.with_name(f".{out.name}.merged-{job.key[:16]}")
    if not between.exists():
        merge(base, experts, recipe, between, progress=progress, **options)
    if job.process[0] != 0:
        return None
    manifest = checkpoints.read_manifest(between)
    huggingface.export_checkpoint(between, out)
    checkpoints.remove(between)
    return manifest


@functools.cache
def _compiled(name: str, consensus: Consensus, dtype: str) -> Callable:
    """The merge of a block; NaN all over if any number that went in is not finite.

    Compiled once for a number of experts and a length: all else that it takes are arguments.
    """
    method = METHODS[name]

    def merge_block(
        base: jax.Array | None, experts: list, statistics: list, given: kernel.Given
    ) -> jax.Array:
        block = kernel.merged(method, consensus, base, experts, statistics, given)
        read = [*experts, *statistics] if base is None else [base, *experts, *statistics]
        # Trimming and dropping hide what is not finite; 0 times it is NaN, and so is the sum.
        nothing = add([array.astype(jnp.float32) * 0 for array in read])
        return jnp.where(nothing == 0, block, jnp.nan).astype(dtype)

    return jax.jit(merge_block, compiler_options=kernel.WIDE)


class _Merge:
    """One merge: its passes, its result, its place."""

    def __init__(self, job: Job, work: Workplace):
        self.job, self.work = job, work
        self.method = METHODS[job.recipe.method]
        self.names = [name for name in job.sizes if name in job.mine]
        self._merge_block = _compiled(job.recipe.method, job.recipe.election, job.recipe.dtype)
        self._bar: Progress | None = None
        self._done = 0
        self._verifying: list[Future] = []
        read = {id(s): s for s in (*job.used, *job.roles.copied.values())}
        self._to_verify = [source for source in read.values() if source.has_digests]
        self._verified: set[str] = set()

    def _advance(self, elements: int) -> None:
        self._done += elements
        if self._bar is not None:
            self._bar.update(self._done // 10**6)

    def run(self, progress: bool) -> Manifest | None:
        """Does it."""
        job, work = self.job, self.work
        free = shutil.disk_usage(job.out.parent).free
        held = sum(f.stat().st_blocks * 512 for f in work.content.rglob("*") if f.is_file())
        if free + held < job.plan.size:
            raise CheckpointError(
                f"{job.out}: no space left: {job.plan.size:,} bytes are needed, {free:,} are free "
                f"in {job.out.parent}"
            )
        total = job.plan.mine * job.plan.readings
        bar = Progress(f"merging {len(job.experts)} experts", total // 10**6, "M parameters")
        with (
            bar if progress else contextlib.nullcontext() as self._bar,
            Pass([source.parameters for source in job.used], job.plan.threads) as stream,
        ):
            self.analysis = Analysis(
                job.recipe,
                job.base,
                job.experts,
                job.sizes,
                self.names,
                work,
                stream,
                job.plan.block,
                self._advance,
            )
            self.analysis.run(job.diagnostics)
            result = self._result()
            digests = self._write(stream, result)
            return self._finish(result, digests)

    def _result(self) -> Result:
        job = self.job
        described = results.described(job.reference, job.recipe.dtype, job.roles)

        def create() -> dict[str, np.ndarray]:
            results.create(self.work.content, job.to, described, SHARD_SIZE)
            return {"made": np.ones(1)}

        if self.job.process[0] == 0:
            self.work.mine("created", create)
        elif job.process[1] > 1:
            self.work.wait("created", 0)
        return results.create(self.work.content, job.to, described, SHARD_SIZE)

    def _write(self, stream: Pass, result: Result) -> dict[str, str]:
        """Writes this process's parameters; returns the digests, process 0 those of all."""
        with Journal(self.work.path / f"journal-{self.job.process[0]}.jsonl") as journal:
            return self._write_spans(stream, result, journal)

    def _write_spans(self, stream: Pass, result: Result, journal: Journal) -> dict[str, str]:
        job = self.job
        others = {n: s.parameters[n].size for n, s in job.roles.copied.items() if n in job.mine}
        others |= {n: result.extents[n].size for n in job.roles.repeated if n in job.mine}
        sizes = {name: job.sizes[name] for name in self.names}
        block = job.plan.block
        kernels = {n: size for n, size in sizes.items() if self._is_whole(n)}
        merged = spans(kernels, max([1, *kernels.values()]))
        merged += spans({n: size for n, size in sizes.items() if n not in kernels}, block)
        copied = spans(others, block)
        todo = merged + copied
        # The last spans of a journal may be of files that never came to be.
        done = min(len(journal.sums), len(todo))
        self._advance(sum(span.size for span in merged[:done]))
        parts: dict[str, list[tuple[Span, int]]] = {}
        verifying: dict[str, Future[str]] = {}

        def note(span: Span, checksum: int) -> None:
            parts.setdefault(span.name, []).append((span, checksum))
            if span.stop == result.extents[span.name].size:
                verifying[span.name] = stream.pool.submit(
                    result.verify, span.name, parts[span.name]
                )
                self._check_inputs(stream, span.name)

        for span, checksum in zip(todo[:done], journal.sums, strict=False):
            note(span, checksum)
        act = self._merge_whole if self.method.whole else self._merge_span
        act = functools.partial(act, result)
        rest = merged[done:]
        for span, checksum in (
            stream.run(rest, act, block)
            if not self.method.whole
            else ((span, act(span)) for span in rest)
        ):
            journal.add(checksum, self._files(result, span))
            note(span, checksum)
            self._advance(span.size)
        for span in copied[max(0, done - len(merged)) :]:
            checksum = self._copy(result, span)
            journal.add(checksum, self._files(result, span))
            note(span, checksum)
        for name, extents in result.extents.items():
            if extents.size == 0 and name in job.mine:
                verifying[name] = stream.pool.submit(result.verify, name, [])
        journal.close()
        digests = {name: future.result() for name, future in verifying.items()}
        for future in self._verifying:
            future.result()
        arrays = {name: np.array(digest) for name, digest in digests.items()}
        if job.process[0] != 0:
            # Process 0 may have published, and removed the place, before we looked for its own.
            self.work.mine("digests", lambda: arrays)
            return digests
        found = self.work.gather("digests", lambda: arrays)
        return {name: str(digest) for part in found for name, digest in part.items()}

    def _files(self, result: Result, span: Span) -> list[Path]:
        return result.extents[span.name].files()

    def _merge_span(self, result: Result, span: Span, arrays: list) -> int:
        job = self.job
        first, n = int(job.base is not None), len(job.experts)
        base = arrays[0] if self.method.needs_base else None
        block = self._merge_block(
            base, arrays[first : first + n], arrays[first + n :], self.analysis.given(span)
        )
        block = np.asarray(block)[: span.size]
        if not _finite(block):
            self._refuse(span, block)
        return result.write(span, block)

    def _is_whole(self, name: str) -> bool:
        return self.method.whole and name in self.job.statistics[0].parameters

    def _merge_whole(self, result: Result, span: Span) -> int:
        """Merges a whole kernel, or a span of what has no statistics; one expert at a time."""
        job, name = self.job, span.name
        refuse_nonfinite(job.experts, span)

        def read(source: Source, start: int, stop: int, shape: tuple[int, ...]) -> np.ndarray:
            stored = source.parameters[name]
            array = np.empty(stop - start, stored.dtype)
            stored.read_into(start, stop, array)
            return array.reshape(shape).astype(np.float32, copy=False)

        shape, grams = (span.size,), None
        if self._is_whole(name):
            shape = tuple(job.reference.parameters[name].shape)
            square = tuple(job.statistics[0].parameters[name].shape)
            grams = (read(source, 0, math.prod(square), square) for source in job.statistics)
        experts = (read(source, span.start, span.stop, shape) for source in job.experts)
        merged = self.method.function(name, experts, grams, job.recipe.nondiagonal_scale)
        block = merged.astype(result.described[name][1]).reshape(-1)
        if not np.isfinite(block.astype(np.float32)).all():
            self._refuse(span, block)
        return result.write(span, block)

    def _refuse(self, span: Span, block: np.ndarray) -> None:
        refuse_nonfinite(self.job.used, span)
        index = int(np.flatnonzero(~np.isfinite(block.astype(np.float32)))[0])
        raise MergeError(
            f"the merged {span.name}[{span.start + index}] is {block[index]}: too large for "
            f"{self.job.recipe.dtype}; lower the scale"
        )

    def _copy(self, result: Result, span: Span) -> int:
        """Writes what is not merged: a span of an input's, or of the result's for a repetition."""
        roles, name = self.job.roles, span.name
        if name in roles.repeated:
            extents = result.extents[roles.repeated[name]]
            block = np.empty(span.size, extents.dtype)
            extents.read_into(block, span.start)
            return result.write(span, block)
        stored = roles.copied[name].parameters[name]
        block = np.empty(span.size, stored.dtype)
        stored.read_into(span.start, span.stop, block)
        dtype = result.described[name][1]
        with np.errstate(over="ignore", invalid="ignore"):
            cast = block.astype(dtype)
        if results.is_float(dtype) and dtype != block.dtype and not _finite(cast):
            # What is copied may be infinite, as masks are; it must not become so.
            lost = np.isfinite(block.astype(np.float64)) & ~np.isfinite(cast.astype(np.float64))
            for index in np.flatnonzero(lost)[:1]:
                raise MergeError(
                    f"{roles.copied[name].path}: {name}[{span.start + index}] is {block[index]}: "
                    f"too large for {dtype.name}; choose bfloat16 or float32"
                )
        return result.write(span, cast)

    def _check_inputs(self, stream: Pass, name: str) -> None:
        """Compares a parameter's digests with the inputs' manifests, as its bytes are at hand."""
        if not self.job.verify or name in self._verified:
            return
        self._verified.add(name)
        for source in self._to_verify:
            if name in source.parameters:
                stored = source.parameters[name]
                self._verifying.append(stream.pool.submit(check_digest, stored))

    def _finish(self, result: Result, digests: Mapping[str, str]) -> Manifest | None:
        job = self.job
        if job.process[0] != 0:
            self.work.wait_for_result()
            return None
        made_by = {"kind": "merge", "recipe": job.recipe.to_dict(), identity.KEY: job.identity}
        if job.allowed:
            made_by["allowed_differences"] = list(job.allowed)
        if job.diagnostics:
            made_by["diagnostics"] = self.analysis.diagnostics()
        elif self.analysis.densities is not None:
            made_by["diagnostics"] = {"density": self.analysis.densities}
        base = job.reference if job.reference is not job.experts[0] else None
        used = job.base is not None or job.reference in job.roles.copied.values()
        parents = [(base, "base")] if base is not None and used else []
        parents += [(source, "expert") for source in job.experts]
        parents += [(source, "statistics") for source in job.statistics]
        described = tuple(
            {"role": role, "path": str(source.path), "digest": source.digest}
            for source, role in parents
        )
        ordered = {name: digests[name] for name in result.described}
        if job.to == HUGGINGFACE:
            manifest = results.describe_directory(
                result,
                job.out,
                ordered,
                like=job.roles.files,
                others=[job.reference, *job.experts],
                dtype=job.recipe.dtype,
                made_by=made_by,
                parents=described,
            )
        else:
            manifest = results.describe_checkpoint(
                result,
                job.out,
                ordered,
                model=job.roles.files.model,
                vocabulary=job.vocabulary,
                made_by=made_by,
                parents=described,
            )
        checkpoints.publish(result.directory, job.out)
        self.work.remove()
        return manifest


def _finite(block: np.ndarray) -> bool:
    """Whether all numbers are finite, by their bits: NumPy has no fast test of bfloat16."""
    word = np.dtype(f"u{block.dtype.itemsize}")
    infinity = np.array(np.inf, block.dtype).view(word)
    sign = word.type(1 << (8 * word.itemsize - 1))
    return bool((block.view(word) & ~sign).max(initial=0) < infinity)
