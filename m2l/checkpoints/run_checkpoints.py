"""The checkpoints of a training run: Orbax saves them while training goes on."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

import jax
import numpy as np
from jax.typing import ArrayLike

from m2l.checkpoints import digest
from m2l.checkpoints.digest import NOTHING
from m2l.checkpoints.manifest import ENTRY, custom_metadata
from m2l.checkpoints.publishing import remove
from m2l.checkpoints.pytrees import flatten, flatten_state
from m2l.checkpoints.reading import DATA_STATE, OPT_STATE, PARAMS, steps
from m2l.checkpoints.saving import (
    ManifestFields,
    array_records,
    check_space,
    new_manifest,
    numbered,
    save,
    specs_of,
    summed,
)
from m2l.checkpoints.spans import in_parallel
from m2l.checkpoints.tokenizer import DIRECTORY as TOKENIZER
from m2l.errors import CheckpointError
from m2l.storage import AnyPath
from m2l.typing import Json, JsonObject, Params, PyTree

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp

R = TypeVar("R")

CHUNK_BYTES = 16 << 20
"""The most bytes of a chunk that Orbax writes: a merge reads one in a few milliseconds."""


# Orbax tells the saves of a process apart by one number that the next save changes.
_ONE_SAVE = threading.Lock()


class RunCheckpoints:
    """The checkpoints of a run, by step. A context manager: leaving it waits for the last save.

    Every process of a run makes one and calls the same methods.

    Args:
        directory: The directory of steps.
        keep: How many of the newest stay.
        keep_every: Those of the steps that are multiples of this stay as well; 0: none.
    """

    def __init__(self, directory: AnyPath, keep: int, keep_every: int = 0):
        self.directory = directory
        self._keep, self._keep_every = keep, keep_every
        self._best: int | None = None
        self._orbax: ocp.training.Checkpointer | None = None
        self._saving: Future[None] | ocp.AsyncResponse | None = None
        self._digests: Future[JsonObject] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            if kind is None:
                raise
        finally:
            if self._orbax is not None:
                self._orbax.close()
            if self._thread is not None:
                self._thread.shutdown()

    def path(self, step: int) -> AnyPath:
        """Returns where the checkpoint of a step is."""
        return self.finished().get(step, self.directory / str(step))

    def finished(self) -> dict[int, AnyPath]:
        """Returns the finished checkpoints by step, in order."""
        return steps(self.directory)

    def save(
        self,
        step: int,
        params: Params,
        opt_state: PyTree,
        *,
        best: int | None = None,
        **fields: Unpack[ManifestFields],
    ) -> AnyPath:
        """Begins to save a step; returns its directory when the arrays may be changed or donated.

        In another thread than the main one, where other runs of the process may save at the same
        time, it returns when the step is saved.

        Args:
            step: The step; a checkpoint of it that exists already is left as it is.
            params: The parameters, sharded in any way.
            opt_state: The optimizer's state.
            best: The step whose checkpoint stays although it is old; None: none does.
            **fields: What is recorded, see `ManifestFields`.

        Raises:
            CheckpointError: The save before it failed, or, where it is waited for, this one.
        """
        self.wait()
        self._best = best
        finished = self.finished()
        if step in finished:
            return finished[step]
        if isinstance(self.directory, Path) or self.directory.scheme == "gs":
            if threading.current_thread() is threading.main_thread():
                self._save_by_orbax(step, params, opt_state, fields)
            else:
                with _ONE_SAVE:
                    self._save_by_orbax(step, params, opt_state, fields)
                    self.wait()
        else:
            self._save_directly(step, params, opt_state, fields)
        return self.directory / str(step)

    def check_space(self, step: int, params: Params, opt_state: PyTree) -> None:
        """Raises CheckpointError if a local file system has no space for the save of a step."""
        if isinstance(self.directory, Path):
            items = [specs_of(flatten(params)), specs_of(flatten_state(opt_state))]
            check_space(self.directory / str(step), items)

    def _save_by_orbax(
        self, step: int, params: Params, opt_state: PyTree, fields: ManifestFields
    ) -> None:
        leaves, state = flatten(params), flatten_state(opt_state)
        specs, state_specs = specs_of(leaves), specs_of(state)
        unknown = dict.fromkeys([*leaves, *state], "")
        manifest, files = new_manifest(specs, unknown, step, state_specs, unknown, **fields)
        items = {PARAMS: params, OPT_STATE: opt_state}
        items[DATA_STATE] = _arrays(numbered(fields.get("data_state")))
        items[TOKENIZER] = _arrays(files)
        # Orbax has no item without an array.
        items = {name: item for name, item in items.items() if jax.tree.leaves(item)}
        parts = {(PARAMS, name): _deferred(leaf) for name, leaf in leaves.items()}
        parts |= {(OPT_STATE, name): _deferred(leaf) for name, leaf in state.items()}

        started = threading.Event()

        def described() -> JsonObject:
            started.wait()
            words = dict.fromkeys(parts, NOTHING)

            def compute(key: tuple[str, str]) -> None:
                words[key] = parts[key]()

            in_parallel(compute, parts)
            digests: dict[str, dict[str, str]] = {PARAMS: {}, OPT_STATE: {}}
            for (item, name), each in summed(self.directory / str(step), words).items():
                digests[item][name] = digest.to_hex(each)
            return custom_metadata(
                dataclasses.replace(
                    manifest,
                    parameters=array_records(specs, digests[PARAMS]),
                    opt_state=array_records(state_specs, digests[OPT_STATE]),
                )
            )

        self._digests = self._submit(described)
        try:
            self._saving = self._checkpointer().save_checkpointables_async(
                step, items, force=True, custom_metadata=_LaterMetadata(self._digests)
            )
        finally:
            # No earlier, it would take processors from what training waits for.
            started.set()

    def _submit(self, work: Callable[[], R]) -> "Future[R]":
        self._thread = self._thread or ThreadPoolExecutor(1)
        return self._thread.submit(work)

    def _save_directly(
        self, step: int, params: Params, opt_state: PyTree, fields: ManifestFields
    ) -> None:
        # The copies on the devices are this save's; the originals may be donated.
        params, opt_state = jax.tree.map(lambda leaf: leaf.copy(), (params, opt_state))

        def write() -> None:
            directory = self.directory / str(step)
            save(directory, params, opt_state=opt_state, step=step, **fields)
            if jax.process_index() == 0:
                for old in self._superseded(list(self.finished())):
                    remove(self.finished()[old])

        self._saving = self._submit(write)

    def _superseded(self, finished: Sequence[int]) -> list[int]:
        old = sorted(finished)[: -self._keep]
        return [step for step in old if step != self._best and not self._is_periodic(step)]

    def _is_periodic(self, step: int) -> bool:
        return self._keep_every > 0 and step % self._keep_every == 0

    def _checkpointer(self) -> "ocp.training.Checkpointer":
        """Returns Orbax's, which finds the steps that are there."""
        if self._orbax is None:
            import absl.logging
            from orbax.checkpoint import v1 as ocp

            # Each save would warn that there are no OCDBT databases to merge.
            absl.logging.set_verbosity(absl.logging.ERROR)
            context = ocp.Context()
            context.array.saving.use_zarr3 = True
            # Plain chunks: faster to write than Orbax's database of them, and read in any order.
            context.array.saving.use_ocdbt = False
            context.array.saving.use_compression = False
            context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
            self._orbax = ocp.training.Checkpointer(
                str(self.directory),
                context=context,
                preservation_policy=_NewestAndBest(self),
                cleanup_tmp_directories=True,
            )
        return self._orbax

    def check(self) -> None:
        """Raises what the save in progress has failed with, if it has."""
        if isinstance(self._saving, Future):
            if self._saving.done():
                self.wait()
        elif self._saving is not None and not self._orbax.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            CheckpointError: It failed.
        """
        pending, self._saving = self._saving, None
        digests, self._digests = self._digests, None
        if pending is None:
            return
        try:
            pending.result()
            if digests is not None:
                digests.result()
        except (OSError, ValueError) as error:
            if self._orbax is not None:
                # It would raise the same again when the run ends.
                with contextlib.suppress(OSError, ValueError):
                    self._orbax.close()
                self._orbax = None
            raise CheckpointError(f"{self.directory}: cannot be written ({error})") from error

    def remove(self, step: int) -> None:
        """Removes the checkpoint of a step; only the first process does."""
        if jax.process_index() == 0:
            remove(self.finished()[step])
        if self._orbax is not None:
            self._orbax.reload()


def _arrays(content: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(data, np.uint8) for name, data in content.items()}


def _deferred(leaf: ArrayLike) -> Callable[[], np.ndarray]:
    """Returns what computes this process's part of a leaf's digest, of its values of now."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return digest.deferred(leaf)
    if jax.process_index() != 0:
        return lambda: NOTHING
    if isinstance(leaf, jax.Array):
        return digest.deferred(leaf)
    array = np.array(leaf, jax.dtypes.result_type(leaf))
    return lambda: digest.of_numpy(array)


class _LaterMetadata(dict[str, Json]):
    """Custom metadata of a checkpoint that is there when its digests are.

    Orbax reads it after the arrays are written, in the thread that then commits the checkpoint.
    """

    def __init__(self, content: "Future[JsonObject]"):
        super().__init__({ENTRY: None})
        self._content = content

    def __iter__(self) -> Iterator[str]:
        self.update(self._content.result())
        return super().__iter__()


class _NewestAndBest:
    """Orbax's policy of what stays: the newest checkpoints, the best, and the periodic ones."""

    def __init__(self, run: RunCheckpoints):
        self._run = run

    def should_preserve(self, checkpoints: Sequence[PyTree], context: object) -> list[bool]:
        """Returns for each checkpoint whether it stays."""
        del context
        superseded = self._run._superseded([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step not in superseded for checkpoint in checkpoints]
