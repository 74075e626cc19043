"""The checkpoints of a training run: written by Orbax while training goes on.

Each process writes its own shards. Orbax has no S3; there the same layout is written directly.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2l.checkpoints import saving
from m2l.checkpoints.manifest import custom_metadata
from m2l.checkpoints.publishing import remove
from m2l.checkpoints.reading import DATA_STATE, OPT_STATE, PARAMS, steps
from m2l.checkpoints.tokenizer import DIRECTORY as TOKENIZER
from m2l.checkpoints.trees import flatten, flatten_state
from m2l.errors import CheckpointError

CHUNK_BYTES = 16 << 20
"""The most bytes of a chunk that Orbax writes: a merge reads one in a few milliseconds."""


class RunCheckpoints:
    """The checkpoints of a run, by step. A context manager: leaving it waits for the last save.

    Every process of a run makes one and calls the same methods.

    Args:
        directory: The directory of steps.
        keep: How many of the newest stay.
    """

    def __init__(self, directory: Any, keep: int):
        self.directory = directory
        self._keep = keep
        self._best: int | None = None
        self._orbax: Any = None
        self._saving: Any = None
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

    def path(self, step: int) -> Any:
        """Returns where the checkpoint of a step is."""
        return self.finished().get(step, self.directory / str(step))

    def finished(self) -> dict[int, Any]:
        """Returns the finished checkpoints by step, in order."""
        return steps(self.directory)

    def save(
        self,
        step: int,
        params: Mapping[str, Any],
        opt_state: Any,
        *,
        best: int | None = None,
        **about: Any,
    ) -> Any:
        """Begins to save a step; returns its directory when the arrays may be changed or donated.

        Args:
            step: The step; a checkpoint of it that exists already is left as it is.
            params: The parameters, sharded in any way.
            opt_state: The optimizer's state.
            best: The step whose checkpoint stays although it is old; None: none does.
            **about: model, vocabulary, made_by, parents and data_state, as `checkpoints.save` takes
                them.

        Raises:
            CheckpointError: The save before it failed.
        """
        self.wait()
        self._best = best
        finished = self.finished()
        if step in finished:
            return finished[step]
        if isinstance(self.directory, Path) or self.directory.scheme == "gs":
            self._save_by_orbax(step, params, opt_state, about)
        else:
            self._save_directly(step, params, opt_state, about)
        return self.directory / str(step)

    def check_space(self, step: int, params: Mapping[str, Any], opt_state: Any) -> None:
        """Raises CheckpointError if a local file system has no space for the save of a step."""
        if isinstance(self.directory, Path):
            items = [saving.specs_of(flatten(params)), saving.specs_of(flatten_state(opt_state))]
            saving.check_space(self.directory / str(step), items)

    def _save_by_orbax(
        self, step: int, params: Mapping[str, Any], opt_state: Any, about: Mapping[str, Any]
    ) -> None:
        leaves, state = flatten(params), flatten_state(opt_state)
        specs, opt_specs = saving.specs_of(leaves), saving.specs_of(state)
        digests = saving.digests_of({**leaves, **{f"\0{n}": x for n, x in state.items()}})
        manifest, files = saving.described(
            specs,
            digests,
            opt_state=opt_specs,
            opt_state_digests={name: digests[f"\0{name}"] for name in state},
            step=step,
            **about,
        )
        items = {PARAMS: params, OPT_STATE: opt_state}
        items[DATA_STATE] = _arrays(saving.numbered(about["data_state"]))
        if files:
            items[TOKENIZER] = _arrays(files)
        self._saving = self._checkpointer().save_checkpointables_async(
            step, items, force=True, custom_metadata=custom_metadata(manifest)
        )

    def _save_directly(
        self, step: int, params: Mapping[str, Any], opt_state: Any, about: Mapping[str, Any]
    ) -> None:
        # The copies on the devices are this save's; the originals may be donated.
        params, opt_state = jax.tree.map(lambda leaf: leaf.copy(), (params, opt_state))
        self._thread = self._thread or ThreadPoolExecutor(1)

        def write() -> None:
            directory = self.directory / str(step)
            saving.save(directory, params, opt_state=opt_state, step=step, **about)
            if jax.process_index() == 0:
                for old in self._superseded(list(self.finished())):
                    remove(self.finished()[old])

        self._saving = self._thread.submit(write)

    def _superseded(self, finished: Sequence[int]) -> list[int]:
        return [step for step in sorted(finished)[: -self._keep] if step != self._best]

    def _checkpointer(self) -> Any:
        """Returns Orbax's, which finds the steps that are there."""
        if self._orbax is None:
            import absl.logging
            from orbax.checkpoint import v1 as ocp

            # Each save would be told of that it has no OCDBT databases to merge.
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
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory}: cannot be written ({error})") from error

    def remove(self, step: int) -> None:
        """Removes the checkpoint of a step; only the first process does."""
        if jax.process_index() == 0:
            remove(self.finished()[step])
        if self._orbax is not None:
            self._orbax.reload()


def _arrays(content: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(data, np.uint8) for name, data in content.items()}


class _NewestAndBest:
    """Orbax's policy of what stays: the newest checkpoints, and the best."""

    def __init__(self, run: RunCheckpoints):
        self._run = run

    def should_preserve(self, checkpoints: Sequence[Any], context: Any) -> list[bool]:
        """Returns for each checkpoint whether it stays."""
        del context
        superseded = self._run._superseded([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step not in superseded for checkpoint in checkpoints]
