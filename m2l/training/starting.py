"""How a run starts: what it refuses, where its data stands, and the state it goes on from."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from m2l import checkpoints, models
from m2l.checkpoints.model_fields import differing, normalized
from m2l.data import layouts, pipeline
from m2l.errors import CheckpointError, ConfigError
from m2l.training import processes, record, state
from m2l.training.feed import Feed, Positions
from m2l.training.saves import Saves
from m2l.training.settings import TrainSettings
from m2l.training.stopping import Stopping

Reader = Callable[[Positions | None], Any]


def check_rows(settings: TrainSettings, mesh: Mesh) -> None:
    """Raises ConfigError where a batch does not split evenly over the mesh, and into its parts."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
    if settings.batch_size % (ways * settings.accumulate):
        raise ConfigError(
            f"batch_size {settings.batch_size} cannot be split evenly over {ways} devices{parts}"
        )


def check_same_model(
    init: Path, manifest: checkpoints.Manifest, config: Any, vocabulary: Mapping[str, Any]
) -> None:
    """Raises CheckpointError where `init` is of another model or vocabulary than the run."""
    # A manifest of an older m2l lacks the settings that came later, which were the defaults.
    descriptions = models.to_dict(models.from_dict(manifest.model)), models.to_dict(config)
    for name, stored, configured in differing(*map(normalized, descriptions)):
        raise CheckpointError(
            f"{init}: its model's {name} is {stored!r}, the configured model's is {configured!r}; "
            "leave the model out to take the checkpoint's own"
        )
    own, used = manifest.vocabulary, vocabulary
    if own["fingerprint"] != used["fingerprint"]:
        raise CheckpointError(
            f"{init}: it was made with vocabulary {own['name']!r} ({own['fingerprint'][:8]}), this "
            f"run uses {used['name']!r} ({used['fingerprint'][:8]}); a model reads its own alone"
        )


def reader(
    config: Any,
    settings: TrainSettings,
    share: tuple[int, int],
    synthetic: bool,
    validation: str = "",
) -> Reader:
    """A function that opens this process's batches at positions; None: at their beginning.

    Args:
        config: The model's configuration.
        settings: The run's.
        share: Which share of a batch this process feeds.
        synthetic: Whether they are random tokens.
        validation: The mixture whose validation split is read; "": the run's own, to train on.
    """
    lengths = {"inputs": settings.input_length, "targets": settings.target_length}
    mixture = validation or settings.mixture

    def open_stream(stream: tuple[int, int], position: bytes | None) -> Any:
        rows = settings.batch_size // stream[1]
        if synthetic:
            return record.Synthetic(config, lengths, rows)
        return pipeline.training_batches(
            mixture,
            lengths=lengths,
            batch_size=rows,
            seed=settings.seed,
            pack=settings.pack,
            split="validation" if validation else "train",
            shard=stream,
            layout=layouts.of(config, pipeline.vocabulary_of(mixture)),
            state=position,
        )

    return lambda positions: Feed(open_stream, settings.batch_size, share, positions)


def resumed(
    saves: Saves,
    config: Any,
    settings: TrainSettings,
    placed: state.TrainState,
    read_from: Reader,
) -> tuple[Path, state.TrainState, Any, Stopping] | None:
    """The newest checkpoint that is not damaged, as (directory, state, batches, stopping).

    Raises:
        CheckpointError: There are some, and all are damaged.
    """
    damaged: list[int] = []
    for step, directory in reversed(saves.finished_steps().items()):
        try:
            manifest = checkpoints.read_manifest(directory)
            positions = checkpoints.restore_data_state(directory)
            current = _restored(directory, config, settings, placed)
        except CheckpointError as error:
            print(f"m2l: warning: {error}; going on from the one before", file=sys.stderr)
            damaged.append(step)
            continue
        batches = read_from(positions)
        processes.wait_for_all("restored")
        for other in damaged:
            saves.quarantine(other)
        return directory, current, batches, Stopping(**manifest.made_by.get("validation", {}))
    if damaged:
        raise CheckpointError(
            f"{saves.directory}: every checkpoint of this run is damaged; delete the run's folder "
            "to start it again"
        )
    return None


def _restored(
    directory: Path, config: Any, settings: TrainSettings, placed: state.TrainState
) -> state.TrainState:
    abstract = state.abstract(config, settings.optimization())
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract.opt_state,
        placed.opt_state,
    )
    step = np.asarray(checkpoints.read_manifest(directory).step, np.int32)
    return state.TrainState(
        jax.make_array_from_callback((), placed.step, lambda index: step[index]),
        checkpoints.restore(directory, shardings=placed.params),
        checkpoints.restore_opt_state(directory, like),
    )


def first_state(
    config: Any, settings: TrainSettings, init: Path | None, mesh: Mesh
) -> state.TrainState:
    """The state at step 0, made or read straight onto its shards."""
    make, around = state.makers(config, settings.optimization(), mesh)
    if init is None:
        return make(jax.random.key(settings.seed))
    placed = state.shardings(config, settings.optimization(), mesh)
    return around(checkpoints.restore(init, shardings=placed.params))
