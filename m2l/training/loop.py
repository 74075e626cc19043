"""The trainer: it reads in the order in which it runs."""

import contextlib
import dataclasses
import math
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from m2l import checkpoints, files, models, partitioning, storage
from m2l.checkpoints import adapters
from m2l.checkpoints.model_fields import differing, normalized
from m2l.errors import CheckpointError, ConfigError, DataError, M2LError, Stopped
from m2l.locks import Lock
from m2l.progress import Progress
from m2l.storage import AnyPath
from m2l.training import feed, optimizers, processes, resources, run_directory, state
from m2l.training.monitoring import Log, MetricsWriter, ThroughputMeter, draw_curve
from m2l.training.settings import TrainSettings
from m2l.training.validation import EarlyStopping, Validation


@dataclasses.dataclass(frozen=True)
class RunPart:
    """A part of a run whose parameters are exchanged, for a merge, between its parts.

    Attributes:
        last_step: The step that it ends with; the schedule is that of all steps of the settings.
        previous: The run of the part before, whose step, positions in the data and, unless
            `reset_optimizer`, optimizer state go on; None: it is the first part.
        reset_optimizer: Whether the optimizer begins anew.
    """

    last_step: int
    previous: AnyPath | None = None
    reset_optimizer: bool = False


def train(
    out: AnyPath,
    *,
    config: models.Config,
    vocabulary: Mapping[str, str],
    settings: TrainSettings,
    data: Mapping[str, object],
    init: AnyPath | None = None,
    part: RunPart | None = None,
    resolved_config: str | None = None,
    synthetic: bool = False,
    profile: bool = False,
    log: Log | None = None,
) -> AnyPath:
    """Trains a model, or resumes a stopped run of the same settings.

    Every process of a run calls it with the same arguments.

    Args:
        out: The run's directory: checkpoints/, metrics.jsonl, tensorboard/, loss.svg and run.json.
        config: The model's configuration.
        vocabulary: The vocabulary's description, as `vocabularies.describe` returns it.
        settings: The run's settings.
        data: Where the records come from, as plain JSON values: {"source": "microworld"}. Part of
            what the run is, and of the checkpoint's manifest.
        init: The checkpoint to start from; None starts from a random model.
        part: Which part of the steps this run is, from the parameters of `init`; None: all.
        resolved_config: The gin text of the run, written to config.gin.
        synthetic: Whether one batch of random tokens is fed instead of the mixture.
        profile: Whether steps 5 to 10 are traced, to out/profile.
        log: Is called with every figure as well; see `monitoring.wandb_log`.

    Returns:
        The directory of the last checkpoint; with keep_best, of the best.

    Raises:
        ConfigError: `out` is of another run, or is locked by another trainer; the mesh has too
            little memory.
        CheckpointError: `init` is unusable, or of another model or vocabulary; or a save failed.
        M2LError: The loss is not finite.
        Stopped: After SIGINT or SIGTERM, when the state was saved.
    """
    out, lora = storage.path(out).absolute(), settings.adapter

    # --- the run's identity ---
    parents = []
    if lora is not None and init is None:
        raise ConfigError("lora: an adapter needs a base: name it with --init")
    if init is not None:
        if adapters.split(storage.path(init)) is not None:
            raise CheckpointError(
                f"{init}: a run starts from one checkpoint, not from a base and an adapter: make "
                f"one of them first: m2l convert {shlex.quote(str(init))} CHECKPOINT"
            )
        init = checkpoints.resolve(init)
        manifest = checkpoints.read_manifest(init)
        _check_same_model(init, manifest, config, vocabulary)
        parents = [{"role": "init", "path": str(init), "digest": manifest.digest}]
    checkpoints.check_vocabulary(vocabulary, config.vocab_size, init)
    data = dict(data) | ({"synthetic": True} if synthetic else {})
    made_by = {"kind": "train", "settings": settings.flat(), "data": data}
    run = {
        **settings.flat(),
        "model": models.to_dict(config),
        "vocabulary": vocabulary["fingerprint"] + _text_settings(vocabulary["name"]),
        "chat": vocabulary["name"].startswith("chat:"),
        "data": data,
        "init": parents[0]["digest"] if parents else None,
    }
    last_step, previous = settings.steps, None
    if part is not None:
        last_step, digest = part.last_step, None
        if part.previous is not None:
            previous = checkpoints.resolve(part.previous)
            digest = checkpoints.read_manifest(previous).digest
            parents.append({"role": "previous", "path": str(previous), "digest": digest})
        run["part"] = {**dataclasses.asdict(part), "previous": digest}
    files.check_claim(out, "run.json", run, kind="run")

    # --- mesh, model, optimizer ---
    mesh = partitioning.make_mesh(fsdp=settings.fsdp, model=settings.model)
    _check_rows(settings, mesh)
    need = resources.check_memory(config, settings, mesh)
    shardings = state.shardings(config, settings.optimizer, mesh, lora)
    step_fn = state.train_step(
        config, settings.optimizer, settings.execution, mesh, settings.objective, lora
    )
    learning_rate = optimizers.schedule(
        settings.schedule,
        peak=settings.learning_rate,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
    )
    dropout_key = jax.random.key(settings.seed)

    with contextlib.ExitStack() as exits:
        # --- one trainer a directory, and a run that is finished already ---
        lock = exits.enter_context(Lock(out / ".run.json.lock"))
        with processes.failing_together():
            if processes.is_first():
                _acquire(lock)
        saves = exits.enter_context(
            run_directory.RunDirectory(out, settings.keep, settings.keep_every)
        )
        if (finished := saves.result()) is not None:
            saves.prune(finished if settings.keep_best else None)
            _export(finished, out, config, settings)
            return finished

        # --- data ---
        share = processes.batch_share(mesh, settings.batch_size)
        open_feed = feed.opener(config, settings, share, synthetic)

        # --- restore: the newest whole checkpoint, else init, else a random model ---
        resumed = run_directory.resume(saves, config, settings, shardings, open_feed)
        if resumed is not None:
            newest, current, batches, stopping = resumed
            over = stopping.is_over(settings.patience)
            if over or int(current.step) >= last_step:
                cut = processes.sum_over_shares(batches.cut, share)
                return _finish(saves, newest, config, settings, stopping, out, cut)
        else:
            positions = previous and checkpoints.restore_data_state(previous)
            newest, batches, stopping = None, open_feed(positions), EarlyStopping()
            current = _first_state(config, settings, init, mesh)
            if previous is not None:
                current = run_directory.continued(
                    current, previous, config, settings, shardings, part.reset_optimizer
                )
        first = int(current.step)
        # Of an adapter the base, which is an argument of each step and stays as it is.
        frozen = () if lora is None else (_base(config, init, mesh),)
        validation = None
        if settings.validation:
            open_held_out = feed.opener(config, settings, share, synthetic, settings.validation)
            placed = partitioning.shardings(models.spec(config), mesh)
            combine = None if lora is None else jax.jit(lora.combine, out_shardings=placed)
            validation = Validation(
                config,
                settings.execution,
                mesh,
                batches=open_held_out(None),
                count=settings.validation_batches,
                loss_chunk=settings.objective.loss_chunk,
            )

        # --- nothing is left to refuse: the directory is this run's from here on ---
        with processes.failing_together():
            if processes.is_first():
                out.mkdir(parents=True, exist_ok=True)
                _acquire(lock)
                files.claim(out, "run.json", run)
                if resolved_config is not None:
                    storage.write_atomic(out / "config.gin", resolved_config)
                run_directory.write_tables(out, state.spec(config, lora), mesh, need)
                saves.directory.mkdir(exist_ok=True)

        def whole(params: state.Params) -> state.Params:
            """Returns the model's parameters, of those that are trained."""
            return params if lora is None else combine(*frozen, params)

        def save(step: int) -> AnyPath:
            so_far = made_by | {"validation": dataclasses.asdict(stopping)}
            with processes.failing_together():
                saves.check_space(step, current.params, current.opt_state)
            return saves.save(
                step,
                current.params,
                current.opt_state,
                best=_best(settings, stopping),
                # Factors alone are no model.
                model=models.to_dict(config) if lora is None else {},
                vocabulary=vocabulary,
                made_by=so_far if settings.validation else made_by,
                parents=parents,
                data_state=processes.gather_positions(batches.positions()),
            )

        def read(step: int, metrics: state.Metrics) -> dict[str, float]:
            figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient_norm"])):
                batch_files = "" if synthetic else write_failed_batch(step)
                raise M2LError(
                    f"step {step}: the loss is {figures['loss']} and the gradient's norm "
                    f"{figures['gradient_norm']}; lower the learning rate, or look at the batch"
                    f"{batch_files}"
                )
            progress.update(step, loss=f"{figures['loss']:.3f}")
            return figures

        def write_failed_batch(step: int) -> str:
            try:
                return "; " + run_directory.write_failed_batch(
                    out, step, settings.mixture, open_feed, anchor
                )
            except (DataError, OSError) as error:
                return f" (it could not be written: {error})"

        # --- loop: the metrics of a step are read when the next one is already on its way ---
        meter = ThroughputMeter(
            resources.step_flops(
                config, settings.batch_size, settings.input_length, settings.target_length
            ),
            resources.peak_flops(str(settings.execution.dtype)),
            shares=share[1],
        )
        exits.enter_context(jax.set_mesh(mesh))
        writer = MetricsWriter(out, first_step=first, log=log) if processes.is_first() else None
        exits.enter_context(writer or contextlib.nullcontext())
        progress = exits.enter_context(
            Progress(
                f"train {settings.mixture}",
                last_step,
                done=first,
                silent=not processes.is_first(),
                first="compiling",
            )
        )
        tracing = exits.enter_context(contextlib.ExitStack())
        pending: tuple[int, state.Metrics] | None = None
        anchor = first, batches.positions()
        last_saved, stopped, over = newest, False, False
        for step in range(first, last_step):
            if profile and step == first + 4:
                tracing.enter_context(_trace(out / "profile"))
            if profile and step == first + 10:
                tracing.close()
            start = time.perf_counter()
            batch = next(batches)
            meter.count(batch, time.perf_counter() - start)
            rate = learning_rate(step)
            current, metrics = step_fn(
                current, feed.place(batch, mesh), np.float32(rate), dropout_key, *frozen
            )
            if step == first:  # Before it nothing was to be saved, and compiling takes long.
                stop_requested = exits.enter_context(processes.stop_requests())
            done = step + 1
            if pending is not None:
                read(*pending)
            pending = (done, metrics)
            is_last = done == last_step
            stopped = stop_requested(done)

            if done % settings.log_every == 0 or is_last:
                figures = read(*pending)
                pending = None
                speed = meter.read()
                cut = processes.sum_over_shares(batches.cut, share)
                with processes.failing_together():
                    saves.check()
                    lock.check()
                    if writer is not None:
                        writer.write(done, figures | {"learning_rate": rate} | speed | cut)
                _show(progress, speed, cut)
            if done == first + 1:
                # What was compiled does not count.
                read(done, metrics)
                meter.run()

            improved = False
            if validation is not None and (done % settings.evaluate_every == 0 or is_last):
                meter.pause()
                scores = validation.run(done, whole(current.params))
                if settings.optimizer.ema:
                    average = validation.run(done, whole(current.opt_state.average))
                    scores |= {f"{name}_of_average": value for name, value in average.items()}
                stopping = stopping.updated(done, scores["loss"], settings.minimum_improvement)
                improved = settings.keep_best and stopping.best_step == done
                over = stopping.is_over(settings.patience)
                with processes.failing_together():
                    if writer is not None:
                        writer.write(done, scores, part="validation")
                progress.update(validation=f"{scores['loss']:.3f}")
                meter.run()
            ending = is_last or stopped or over
            if done % settings.save_every == 0 or improved or ending:
                meter.pause()
                read(done, metrics)
                _check_parameters(done, current.params)
                with processes.failing_together():
                    saves.wait()
                    if writer is not None:
                        writer.flush()
                last_saved, anchor = save(done), (done, batches.positions())
                meter.run()
            if ending:
                break

        # --- the end of the run, or of this part of it ---
        tracing.close()
        with processes.failing_together():
            saves.wait()
            if processes.is_first():
                draw_curve(out, f"{settings.mixture}: loss per target token")
        if stopped and not (is_last or over):
            raise Stopped(
                f"stopped at step {done} of {last_step}; saved in {last_saved}; the same "
                "command goes on"
            )
        progress.update(done)
        cut = processes.sum_over_shares(batches.cut, share)
        result = _finish(saves, last_saved, config, settings, stopping, out, cut)
    if stopped:
        raise Stopped(f"stopped; this run is finished: {result}")
    return result


@jax.jit
def _all_finite(params: state.Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def _check_parameters(step: int, params: state.Params) -> None:
    # The loss is of the parameters before the update: those that are saved are checked themselves.
    if not _all_finite(params):
        raise M2LError(f"step {step}: a parameter is not a finite number; lower the learning rate")


def _text_settings(vocabulary: str) -> str:
    """Returns the prefixes of a vocabulary's name that set how texts are encoded, not "chat:"."""
    prefixes, _ = files.split_name(vocabulary)
    return "" if prefixes in ("", files.CHAT) else f" {prefixes}"


def _check_rows(settings: TrainSettings, mesh: Mesh) -> None:
    """Raises ConfigError where a batch does not split evenly over the mesh, and into its parts."""
    ways, accumulate = mesh.shape["data"] * mesh.shape["fsdp"], settings.objective.accumulate
    parts = f" in {accumulate} parts" if accumulate > 1 else ""
    if settings.batch_size % (ways * accumulate):
        raise ConfigError(
            f"batch_size {settings.batch_size} cannot be split evenly over {ways} devices{parts}"
        )


def _check_same_model(
    init: AnyPath,
    manifest: checkpoints.Manifest,
    config: models.Config,
    vocabulary: Mapping[str, str],
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


def _first_state(
    config: models.Config, settings: TrainSettings, init: AnyPath | None, mesh: Mesh
) -> state.TrainState:
    """Returns the state at step 0, initialised or read straight onto its shards."""
    lora = settings.adapter
    initialise, from_params = state.sharded_initializers(config, settings.optimizer, mesh, lora)
    if init is None or lora is not None:
        return initialise(jax.random.key(settings.seed))
    shardings = state.shardings(config, settings.optimizer, mesh)
    return from_params(checkpoints.restore(init, shardings=shardings.params))


def _base(config: models.Config, init: AnyPath, mesh: Mesh) -> state.Params:
    """Returns the parameters of an adapter's base, on their shards."""
    placed = partitioning.shardings(models.spec(config), mesh)
    return checkpoints.restore(init, shardings=placed)


def _best(settings: TrainSettings, stopping: EarlyStopping) -> int | None:
    return stopping.best_step if settings.keep_best and stopping.best is not None else None


def _finish(
    saves: run_directory.RunDirectory,
    last: AnyPath,
    config: models.Config,
    settings: TrainSettings,
    stopping: EarlyStopping,
    out: AnyPath,
    cut: Mapping[str, int],
) -> AnyPath:
    why = "early stopping" if stopping.is_over(settings.patience) else "steps"
    with processes.failing_together():
        result = saves.finish(last, _best(settings, stopping), why, cut)
        _export(result, out, config, settings)
    return result


def _export(
    checkpoint: AnyPath, out: AnyPath, config: models.Config, settings: TrainSettings
) -> None:
    if processes.is_first() and (lora := settings.adapter) is not None:
        options = config, lora, settings.export_dtype
        run_directory.export_adapter(checkpoint, out / "adapter", *options)
        if settings.optimizer.ema:
            read = checkpoints.restore_average
            run_directory.export_adapter(checkpoint, out / "average", *options, read)
    elif processes.is_first():
        dtype = settings.export_dtype
        if dtype:
            run_directory.export(checkpoint, out / "exported", dtype)
        if settings.optimizer.ema:
            read = checkpoints.restore_average
            run_directory.export(checkpoint, out / "average", dtype, read, kind="average")


def _show(progress: Progress, speed: Mapping[str, float], cut: Mapping[str, int]) -> None:
    shown = {}
    if "tokens_per_second" in speed:
        shown["tokens/s"] = f"{speed['tokens_per_second']:,.0f}"
    if "mfu" in speed:
        shown["MFU"] = f"{speed['mfu']:.0%}"
    if cut.get("targets_cut"):
        shown["targets cut"] = f"{cut['targets_cut'] / cut['examples']:.2%}"
    progress.update(**shown)


@contextlib.contextmanager
def _trace(directory: AnyPath) -> Iterator[None]:
    with storage.local_output(directory) as local, jax.profiler.trace(str(local)):
        yield


def _acquire(lock: Lock) -> None:
    """Locks the run's directory, once it exists.

    Raises:
        ConfigError: Another trainer has the lock.
    """
    if lock.acquired or (isinstance(lock.file, Path) and not lock.file.parent.is_dir()):
        return
    if not lock.acquire(wait=True):
        raise ConfigError(
            f"{lock.file.parent}: the run directory is locked by another trainer "
            f"({lock.owner() or 'of unknown number'}); wait for it, or choose another --out"
        )
