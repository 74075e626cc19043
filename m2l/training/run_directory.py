"""The directory of a run: its checkpoints, its records, its export, a batch whose loss failed."""

import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from m2l import checkpoints, distributed, files, models, partitioning, storage
from m2l.checkpoints import adapters, huggingface_directory
from m2l.checkpoints.manifest import versions
from m2l.checkpoints.run_checkpoints import RunCheckpoints
from m2l.data import pipeline
from m2l.errors import CheckpointError, DataError
from m2l.storage import AnyPath
from m2l.training import processes, state
from m2l.training.feed import Batch, Feed, OpenFeed, Positions
from m2l.training.lora import Lora
from m2l.training.resources import MemoryNeed
from m2l.training.settings import TrainSettings
from m2l.training.validation import EarlyStopping
from m2l.typing import Params, PyTree

# --- checkpoints ---


class RunDirectory(RunCheckpoints):
    """The checkpoints of a run, and the record of its end. A context manager.

    Args:
        out: The run's directory.
        keep: How many of the newest stay.
        keep_every: Those of the steps that are multiples of this stay as well; 0: none.
    """

    def __init__(self, out: AnyPath, keep: int, keep_every: int = 0):
        super().__init__(out / checkpoints.STEPS, keep, keep_every)
        self._out = out

    def quarantine(self, step: int) -> None:
        """Renames a damaged checkpoint so that no run resumes from it; in a bucket, removes it."""
        if not processes.is_first():
            return
        damaged = self.path(step)
        if not isinstance(damaged, Path):
            checkpoints.remove(damaged)
            return
        renamed = damaged.with_name(f"{damaged.name}.damaged")
        shutil.rmtree(renamed, ignore_errors=True)
        damaged.rename(renamed)

    @property
    def _record(self) -> AnyPath:
        return self._out / "finished.json"

    def result(self) -> AnyPath | None:
        """Returns the checkpoint of a finished run; None if it is not finished."""
        if not self._record.exists():
            return None
        name = files.read_record(self._record, required=False).get("checkpoint")
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{self._record}: damaged, it names no checkpoint; delete it")
        directory = self.directory / name
        return directory if checkpoints.is_checkpoint(directory) else None

    def finish(self, last: AnyPath, best: int | None, why: str, cut: Mapping[str, int]) -> AnyPath:
        """Writes the record of a finished run; with a best checkpoint, none after it stays.

        Args:
            last: The last checkpoint.
            best: The step of the best one, if that is what stays.
            why: What ended the run.
            cut: How many examples it has seen, and how many of them were cut.

        Returns:
            The run's result.
        """
        self.wait()
        remaining = last if best is None else self.path(best)
        if processes.is_first():
            files.write_record(self._record, {"checkpoint": remaining.name, "why": why, **cut})
        self.prune(remaining if best is not None else None)
        return remaining

    def prune(self, only: AnyPath | None) -> None:
        """Removes every checkpoint but `only`; None: those that a killed removal has left.

        Of those before it the periodic ones stay: what reads a run reads its newest checkpoint.
        """
        finished = self.finished()
        superseded = self._superseded([*finished])
        if only is not None:
            best = next((step for step in finished if finished[step] == only), 0)
            earlier = [step for step in finished if step < best and self._is_periodic(step)]
            superseded = [step for step in finished if step not in (best, *earlier)]
        for step in superseded:
            self.remove(step)


def resume(
    run: RunDirectory,
    config: models.Config,
    settings: TrainSettings,
    shardings: state.TrainState,
    open_feed: OpenFeed,
) -> tuple[AnyPath, state.TrainState, Feed, EarlyStopping] | None:
    """Restores the newest checkpoint that is not damaged: (directory, state, batches, stopping).

    Raises:
        CheckpointError: There are some, and all are damaged.
    """
    damaged: list[int] = []
    for step, directory in reversed(run.finished().items()):
        try:
            manifest = checkpoints.read_manifest(directory)
            positions = checkpoints.restore_data_state(directory)
            current = _restored(directory, manifest.step, config, settings, shardings)
        except CheckpointError as error:
            print(f"m2l: warning: {error}; going on from the one before", file=sys.stderr)
            damaged.append(step)
            continue
        batches = open_feed(positions)
        distributed.wait_for_all("restored")
        for earlier in damaged:
            run.quarantine(earlier)
        validation = manifest.made_by.get("validation", {})
        return directory, current, batches, EarlyStopping(**validation)
    if damaged:
        raise CheckpointError(
            f"{run.directory}: every checkpoint of this run is damaged; delete the run's directory "
            "to start it again"
        )
    return None


def _restored(
    directory: AnyPath,
    step: int,
    config: models.Config,
    settings: TrainSettings,
    shardings: state.TrainState,
) -> state.TrainState:
    return state.TrainState(
        _step_array(step, shardings),
        checkpoints.restore(directory, shardings=shardings.params),
        _restored_opt_state(directory, config, settings, shardings),
    )


def _step_array(step: int, shardings: state.TrainState) -> jax.Array:
    count = np.asarray(step, np.int32)
    return jax.make_array_from_callback((), shardings.step, lambda index: count[index])


def _restored_opt_state(
    directory: AnyPath,
    config: models.Config,
    settings: TrainSettings,
    shardings: state.TrainState,
) -> PyTree:
    opt_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state.abstract(config, settings.optimizer, settings.adapter).opt_state,
        shardings.opt_state,
    )
    return checkpoints.restore_opt_state(directory, opt_state)


def continued(
    first: state.TrainState,
    previous: AnyPath,
    config: models.Config,
    settings: TrainSettings,
    shardings: state.TrainState,
    reset_optimizer: bool,
) -> state.TrainState:
    """Returns a first state with the step and the optimizer's state of the checkpoint `previous`.

    With `reset_optimizer` the optimizer's state is the first one.
    """
    step = _step_array(checkpoints.read_manifest(previous).step, shardings)
    if reset_optimizer:
        return first._replace(step=step)
    opt_state = _restored_opt_state(previous, config, settings, shardings)
    return first._replace(step=step, opt_state=opt_state)


def export(
    checkpoint: AnyPath,
    exported: AnyPath,
    dtype: str,
    read: Callable[[AnyPath], Params] = checkpoints.restore,
    kind: str = "export",
) -> None:
    """Writes a checkpoint's parameters alone, in another dtype, unless they are written.

    Args:
        checkpoint: The checkpoint.
        exported: The directory to write to.
        dtype: "float32" or "bfloat16"; "": that of each parameter.
        read: Returns the parameters of a checkpoint: those, or their moving average.
        kind: What the manifest says made it.
    """
    if checkpoints.is_checkpoint(exported):
        return
    manifest, params = checkpoints.read_manifest(checkpoint), read(checkpoint)
    if dtype:
        number = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(number), params)
    checkpoints.save(
        exported,
        params,
        model=manifest.model,
        vocabulary=manifest.vocabulary,
        made_by={"kind": kind, "dtype": dtype, "settings": manifest.made_by.get("settings")},
        parents=({"role": "exported", "path": str(checkpoint), "digest": manifest.digest},),
        step=manifest.step,
    )


def export_adapter(
    checkpoint: AnyPath,
    exported: AnyPath,
    config: models.Config,
    lora: Lora,
    dtype: str,
    read: Callable[[AnyPath], Params] = checkpoints.restore,
) -> None:
    """Writes the factors of a checkpoint as an adapter in PEFT's format, unless they are written.

    Args:
        checkpoint: The checkpoint.
        exported: The directory to write to.
        config: The base's configuration.
        lora: The adapter.
        dtype: Of the factors; "": float32.
        read: Returns the factors of a checkpoint: those, or their moving average.
    """
    if (exported / huggingface_directory.MANIFEST).is_file():
        return
    manifest = checkpoints.read_manifest(checkpoint)
    number = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    factors = checkpoints.flatten(read(checkpoint))
    arrays = lora.exported(config, {name: each.astype(number) for name, each in factors.items()})
    (base,) = manifest.parents
    origin = checkpoints.read_manifest(base["path"]).made_by
    modules = lora.modules(config).values()
    adapters.write(
        exported,
        adapters.fields(
            dict.fromkeys(modules, lora.rank),
            dict.fromkeys(modules, int(lora.alpha) if lora.alpha.is_integer() else lora.alpha),
            saved=[],
            base=origin["source"] if origin.get("from") == "huggingface" else base["path"],
        ),
        arrays,
        made_by={**manifest.made_by, "step": manifest.step},
        parents=({**base, "role": "base"},),
    )


# --- records ---


def write_tables(out: AnyPath, spec: Params, mesh: Mesh, need: MemoryNeed) -> None:
    """Writes model.txt, the parameters that are trained on this mesh, and environment.json."""
    rows = partitioning.table(spec, mesh)
    width = max(len(row.name) for row in rows)
    lines = [
        f"{row.name:{width}}  {'x'.join(map(str, row.shape)):>14}  {row.mib_per_device:10.3f} MiB "
        f"a device  {row.spec}"
        for row in rows
    ]
    count = sum(int(np.prod(row.shape)) for row in rows)
    lines.append(f"\n{count:,} parameters; GiB a device: {need.describe()}\n")
    storage.write_atomic(out / "model.txt", "\n".join(lines))
    devices = partitioning.current_devices()
    environment = {
        "versions": versions(),
        "devices": {"kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }
    storage.write_atomic(out / "environment.json", json.dumps(environment, indent=1) + "\n")


def write_failed_batch(
    out: AnyPath,
    step: int,
    mixture: str,
    open_feed: OpenFeed,
    anchor: tuple[int, Positions],
) -> str:
    """Reads the batch of a step again, and writes it to `out`.

    Two files: failed_step_N.npz, the arrays, and failed_step_N.txt, its examples as text; of
    several processes each writes its share.

    Args:
        out: The run's directory.
        step: The step, counted from 1.
        mixture: The mixture that is trained on.
        open_feed: Opens the batches at positions in the data.
        anchor: A number of steps done, and the positions there.

    Returns:
        A sentence that names the files and the examples.
    """
    done, positions = anchor
    batches = open_feed(positions)
    for _ in range(done, step - 1):
        next(batches)
    before, batch, after = batches.positions(), next(batches), batches.positions()
    process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
    name = f"failed_step_{step}{process}"
    packed = io.BytesIO()
    np.savez(packed, **batch)
    storage.write_atomic(out / f"{name}.npz", packed.getvalue())
    ranges = _example_ranges(mixture, before, after)
    listed = "\n".join(f"{task}: {first} to {last}" for task, first, last in ranges)
    (out / f"{name}.txt").write_text(f"{listed}\n\n{_texts(mixture, batch)}")
    named = ", ".join(f"{task} {first} to {last}" for task, first, last in ranges[:3])
    more = f" and {len(ranges) - 3} tasks more" if len(ranges) > 3 else ""
    examples = f"; its examples, as drawn from their tasks: {named}{more}" if ranges else ""
    return f"its batch is in {out / name}.npz and, as text, .txt{examples}"


def _example_ranges(mixture: str, first: Positions, last: Positions) -> list[tuple[str, int, int]]:
    """Returns (task, first, last) of the examples between positions of this process's stream."""
    counts = []
    for positions in (first, last):
        position = next(each for each in positions if each).partition(b"\n")[2]
        if not position.startswith(b"{"):
            return []  # a pipeline of its own, whose position is TensorFlow's
        counts.append(files.parse_json(position, "the position in the data")["counts"])
    tasks = pipeline.sizes(mixture, "train")
    ranges = zip(tasks, *counts, strict=True)
    return [(task, begin, end - 1) for task, begin, end in ranges if end > begin]


def _texts(mixture: str, batch: Batch) -> str:
    vocabulary = pipeline.vocabulary_of(mixture)
    lines = []
    sides = [name for name in ("encoder_input_tokens", "decoder_target_tokens") if name in batch]
    for row in range(len(batch["decoder_target_tokens"])):
        for side in sides:
            tokens = batch[side][row]
            segments = batch.get(side.split("_")[0] + "_segment_ids", np.ones_like(batch[side]))
            for segment in range(1, int(segments[row].max()) + 1):
                ids = [int(token) for token in tokens[segments[row] == segment] if token]
                lines.append(f"row {row}, {side}, {segment}: {vocabulary.decode(ids)}")
    return "\n".join(lines) + "\n"
