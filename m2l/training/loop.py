"""The trainer: it reads in the order in which it runs."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints, files, models, partitioning
from m2l.data import layouts, pipeline
from m2l.errors import CheckpointError, ConfigError, M2LError, Stopped
from m2l.progress import Progress
from m2l.training import optimizers, state
from m2l.training.metrics import MetricsWriter
from m2l.training.settings import TrainSettings


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM instead of dying of it."""
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


def _saved(saves: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first; a directory with a manifest is whole."""
    return sorted(manifest.parent for manifest in saves.glob("step_*/manifest.json"))


def _first_state(
    config: Any, settings: TrainSettings, init: Path | None, placed: state.TrainState
) -> state.TrainState:
    """The state at step 0, made or read straight onto its shards."""
    if init is None:
        make = jax.jit(
            lambda key: state.fresh(config, settings.optimizer, key), out_shardings=placed
        )
        return make(jax.random.key(settings.seed))
    params = checkpoints.restore(init, shardings=placed.params)
    around = jax.jit(lambda p: state.around(settings.optimizer, p), out_shardings=placed)
    return around(params)


def train(
    out: Path,
    *,
    config: Any,
    vocabulary: Mapping[str, Any],
    settings: TrainSettings,
    data: Mapping[str, Any],
    init: Path | None = None,
    resolved_config: str | None = None,
) -> Path:
    """Trains a model, or goes on where a stopped run of the same settings left off.

    Args:
        out: The run's directory: checkpoints/, metrics.jsonl, tensorboard/ and run.json.
        config: The model's configuration.
        vocabulary: The vocabulary's description, as `vocabularies.describe` gives it.
        settings: What to do.
        data: Where the records come from, as plain JSON values: {"source": "microworld"}. Part of
            what the run is, and of the checkpoint's manifest.
        init: The checkpoint to start from; None starts from a random model.
        resolved_config: The gin text of the run, kept beside it as config.gin.

    Returns:
        The directory of the last checkpoint.

    Raises:
        ConfigError: `out` holds another run.
        CheckpointError: `init` is unusable, or of another model or vocabulary.
        M2LError: The loss is not finite.
        Stopped: After SIGTERM, when the state was saved.
    """
    out = Path(out).absolute()

    # --- what it is ---
    parents = []
    if init is not None:
        init = checkpoints.resolve(init)
        manifest = checkpoints.read_manifest(init)
        _check_same_model(init, manifest, config, vocabulary)
        parents = [{"role": "init", "path": str(init), "digest": manifest.digest}]
    if vocabulary["size"] > config.vocab_size:
        raise ConfigError(
            f"vocabulary {vocabulary['name']!r} has {vocabulary['size']} ids, the model room for "
            f"{config.vocab_size}; set its vocab_size to at least that"
        )
    made_by = {"kind": "train", "settings": dataclasses.asdict(settings), "data": dict(data)}
    run = {
        **dataclasses.asdict(settings),
        "model": models.to_dict(config),
        "vocabulary": vocabulary["fingerprint"],
        "chat": vocabulary["name"].startswith("chat:"),
        "data": dict(data),
        "init": parents[0]["digest"] if parents else None,
    }
    files.check_claim(out, "run.json", run, what="run")

    # --- mesh, model, optimizer ---
    mesh = partitioning.make_mesh(fsdp=settings.fsdp, model=settings.model)
    _check_rows(settings.batch_size, mesh)
    placed = state.shardings(config, settings.optimizer, mesh)
    step_fn = state.train_step(
        config, settings.optimizer, settings.execution(), mesh, settings.loss_chunk
    )
    learning_rate = optimizers.schedule(
        settings.schedule,
        peak=settings.learning_rate,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
    )
    dropout_key = jax.random.key(settings.seed)

    # --- data, from where the newest checkpoint stands ---
    saves = out / "checkpoints"
    newest = next(reversed(_saved(saves)), None)
    if newest is not None and checkpoints.read_manifest(newest).step >= settings.steps:
        return newest
    batches = pipeline.training_batches(
        settings.mixture,
        lengths={"inputs": settings.input_length, "targets": settings.target_length},
        batch_size=settings.batch_size,
        seed=settings.seed,
        pack=settings.pack,
        layout=layouts.of(config, pipeline.vocabulary_of(settings.mixture)),
        state=None if newest is None else checkpoints.restore_data_state(newest),
    )
    on_mesh = partitioning.batch_sharding(mesh)

    # --- state: the run's own newest checkpoint, else init, else a random model ---
    if newest is not None:
        current = _restored(newest, config, settings, placed)
    else:
        current = _first_state(config, settings, init, placed)
    first = int(current.step)

    # --- nothing is left to refuse: the folder is this run's from here on ---
    files.claim(out, "run.json", run)
    if resolved_config is not None:
        files.write(out / "config.gin", resolved_config)
    saves.mkdir(exist_ok=True)
    checkpoints.clean(saves)

    def save(step: int) -> Path:
        directory = saves / f"step_{step:08d}"
        checkpoints.save(
            directory,
            current.params,
            model=models.to_dict(config),
            vocabulary=vocabulary,
            made_by=made_by,
            parents=parents,
            step=step,
            opt_state=current.opt_state,
            data_state=batches.state(),
        )
        for old in _saved(saves)[: -settings.keep]:
            checkpoints.remove(old)
        return directory

    # --- loop: the metrics of a step are read when the next one is already on its way ---
    with (
        jax.set_mesh(mesh),
        _stop_requests() as stop_requested,
        MetricsWriter(out, after=first) as writer,
        Progress(f"train {settings.mixture}", settings.steps, done=first) as progress,
    ):
        pending: tuple[int, state.Metrics] | None = None
        tokens, since = 0.0, time.monotonic()
        last_saved = newest
        for step in range(first, settings.steps):
            batch = {
                name: jax.make_array_from_process_local_data(on_mesh, value)
                for name, value in next(batches).items()
            }
            rate = learning_rate(step)
            current, metrics = step_fn(current, batch, np.float32(rate), dropout_key)
            done = step + 1
            if pending is not None:
                tokens += _read(*pending, progress)["target_tokens"]
            pending = (done, metrics)

            if done % settings.log_every == 0 or done == settings.steps:
                figures = _read(*pending, progress)
                pending, tokens = None, tokens + figures["target_tokens"]
                per_second = tokens / (time.monotonic() - since)
                writer.write(
                    done,
                    figures | {"learning_rate": rate, "target_tokens_per_second": per_second},
                )
                tokens, since = 0.0, time.monotonic()
            stopping = bool(stop_requested) and done < settings.steps
            if done % settings.save_every == 0 or done == settings.steps or stopping:
                _read(done, metrics, progress)
                _check_parameters(done, current.params)
                writer.flush()
                last_saved = save(done)
            if stopping:
                raise Stopped(f"stopped at step {done} of {settings.steps}; saved in {last_saved}")
        progress.update(settings.steps)
    if stop_requested:
        raise Stopped(f"stopped; this run is finished: {last_saved}")
    return last_saved


def _read(step: int, metrics: state.Metrics, progress: Progress) -> dict[str, float]:
    """The metrics as Python floats; stops a run whose loss is not a finite number."""
    figures = {name: float(value) for name, value in metrics.items()}
    if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient_norm"])):
        raise M2LError(
            f"step {step}: the loss is {figures['loss']} and the gradient's norm "
            f"{figures['gradient_norm']}; lower the learning rate, or look at the batch"
        )
    progress.update(step, loss=f"{figures['loss']:.3f}")
    return figures


@jax.jit
def _all_finite(params: state.Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def _check_parameters(step: int, params: state.Params) -> None:
    """The loss is of the parameters before the update: what is saved is looked at itself."""
    if not _all_finite(params):
        raise M2LError(f"step {step}: a parameter is not a finite number; lower the learning rate")


def _check_rows(batch_size: int, mesh: jax.sharding.Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ConfigError(f"batch_size {batch_size} cannot be split evenly over {ways} devices")
    if jax.process_count() > 1:
        raise ConfigError("training runs in one process, on all of its devices; found several")


def _check_same_model(
    init: Path, manifest: checkpoints.Manifest, config: Any, vocabulary: Mapping[str, Any]
) -> None:
    # A manifest of an older m2l lacks the settings that came later, which were the defaults.
    held, wanted = models.to_dict(models.from_dict(manifest.model)), models.to_dict(config)
    for name, value in wanted.items():
        if held.get(name) != value:
            raise CheckpointError(
                f"{init}: its model's {name} is {held.get(name)!r}, the configured "
                f"model's is {value!r}; leave the model out to take the checkpoint's own"
            )
    own, used = manifest.vocabulary, vocabulary
    if own["fingerprint"] != used["fingerprint"]:
        raise CheckpointError(
            f"{init}: it was made with vocabulary {own['name']!r} ({own['fingerprint'][:8]}), this "
            f"run uses {used['name']!r} ({used['fingerprint'][:8]}); a model reads its own alone"
        )


def _restored(
    directory: Path, config: Any, settings: TrainSettings, placed: state.TrainState
) -> state.TrainState:
    like = state.abstract(config, settings.optimizer)
    return state.TrainState(
        jax.device_put(np.int32(checkpoints.read_manifest(directory).step), device=placed.step),
        checkpoints.restore(directory, shardings=placed.params),
        jax.device_put(checkpoints.restore_opt_state(directory, like.opt_state), placed.opt_state),
    )
