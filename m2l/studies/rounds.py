"""Merging while training: experts that are merged every so many steps, and go on from the merge.

ColD Fusion (Don-Yehiya et al. 2022, arXiv:2212.01378) and DiLoCo (Douillard et al. 2023,
arXiv:2311.08105). Each round is stages of a graph, whose only communication is the folder: which
process, or which part of its devices, runs a stage does not change its bits.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from m2l import checkpoints, files, merging, models, partitioning, signals, storage, tasks
from m2l.checkpoints import Manifest
from m2l.errors import ConfigError, M2LError
from m2l.merging import Recipe
from m2l.merging.inputs import check_counts
from m2l.models.fields import FRACTION, POSITIVE, check_fields
from m2l.storage import AnyPath
from m2l.studies import given_checkpoints, graph, own_tasks
from m2l.studies.graph import Graph, Outcome, Runner, Stage
from m2l.studies.own_tasks import OwnTasks
from m2l.studies.run import run_train
from m2l.training import feed
from m2l.training.settings import TrainSettings, from_flat, on_mixture
from m2l.training.validation import EarlyStopping, Validation
from m2l.typing import Json, JsonObject

START = "start"
_MODEL, _MERGED, _STEPPED, _VALIDATION = "model", "merged", "stepped", "validation.json"


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Several experts of one model, merged every so many steps.

    In round t every expert trains for `every` steps from the model theta_t, and `merge` makes m_t
    of them, with theta_t as the base. The outer step takes theta_t - m_t for a gradient: SGD with
    Nesterov momentum, as DiLoCo has it, makes theta_(t+1) of it. At learning rate 1 without
    momentum that is m_t.

    Attributes:
        experts: Each expert's mixture, by its name. Several may have the same one: their seeds,
            `train.seed` and the number of the expert, differ.
        train: Trains each expert; its mixture is set by `experts`. Its `steps` are those of all
            rounds together, which the schedule follows. With a `validation`, the model of each
            round is evaluated on every expert's mixture, and an expert for whom it does not improve
            in `patience` rounds stops; its last parameters stay in the merge.
        merge: How experts are merged.
        every: Steps between merges.
        learning_rate: The outer step's.
        momentum: The outer step's.
        reset_optimizer: Whether the experts' optimizers begin anew with each round.
        submeshes: Into how many equal parts a process divides its devices; each trains an expert at
            the same time as the others.
        keep: Of how many of the newest rounds the experts' checkpoints stay; of older ones the
            model and the records do.
        own_tasks: Tasks of your own JSON lines, see `own_tasks.read`.
        source: Where the records of declared datasets come from.

    Raises:
        ConfigError, MergeError: A setting of the wrong type or out of range; fewer experts than
            two; a method that cannot merge them.
    """

    experts: Mapping[str, str]
    train: TrainSettings
    merge: Recipe
    every: int
    learning_rate: float = dataclasses.field(default=1.0, metadata=POSITIVE)
    momentum: float = dataclasses.field(default=0.0, metadata=FRACTION)
    reset_optimizer: bool = False
    submeshes: int = 1
    keep: int = 2
    own_tasks: OwnTasks = dataclasses.field(default_factory=dict)
    source: str = "microworld"

    def __post_init__(self) -> None:
        check_fields(self)
        pairs = self.experts.items() if isinstance(self.experts, Mapping) else ()
        if len(pairs) < 2 or not all(isinstance(each, str) for pair in pairs for each in pair):
            raise ConfigError(
                "Rounds.experts: expected {NAME: MIXTURE} of two experts or more, found "
                f"{self.experts!r:.80}"
            )
        for name in self.experts:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ConfigError(f"Rounds.experts: {name!r} cannot be the name of a folder")
        if self.train.lora or self.train.optimizer.ema:
            raise ConfigError(
                "Rounds.train: lora and ema are of the parameters of one run, which merges exchange"
            )
        check_counts(True, len(self.experts), 0, self.merge)

    @property
    def count(self) -> int:
        """The number of rounds; the last one may be shorter."""
        return -(-self.train.steps // self.every)

    def last_step(self, number: int) -> int:
        """Returns the step that a round, counted from 1, ends with."""
        return min(number * self.every, self.train.steps)

    def training(self, name: str) -> TrainSettings:
        """Returns the settings by which an expert is trained."""
        return dataclasses.replace(
            on_mixture(self.train, self.experts[name]),
            seed=self.train.seed + list(self.experts).index(name),
            patience=0,
            keep_best=False,
            export_dtype="",
        )

    def to_dict(self) -> JsonObject:
        """Returns what decides the result, as JSON values."""
        # As pairs: the order of the experts decides their seeds and the sums.
        fields = {"train": self.train.flat(), "merge": self.merge.to_dict()}
        fields["experts"] = [list(pair) for pair in self.experts.items()]
        names = ("every", "learning_rate", "momentum", "reset_optimizer", "source")
        return fields | {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class RoundsResult:
    """What `run` has made.

    Attributes:
        model: The checkpoint of the last round.
        losses: The validation losses of each expert's mixture, round by round.
        rounds: In how many rounds each expert was trained.
    """

    model: AnyPath
    losses: Mapping[str, list[float]]
    rounds: Mapping[str, int]


def run(rounds: Rounds, init: AnyPath, out: AnyPath) -> RoundsResult:
    """Trains and merges round after round, or goes on; several processes may do so at once.

    Threads of this process do, on a part of its devices each, if `submeshes` says so.

    Args:
        rounds: The settings.
        init: The checkpoint, or training run, that the first round starts from.
        out: The folder: rounds/NNNN/experts/NAME are training runs, rounds/NNNN/merge/model the
            model that round ends with, rounds/NNNN/validation/NAME its loss; finished.json, at the
            end, has the last model and all losses.

    Raises:
        ConfigError: `out` is of other settings, or the devices cannot be divided.
        CheckpointError: `init` cannot be used.
        UnknownNameError: There is no such mixture.
        M2LError: A stage failed.
        Stopped: After SIGINT or SIGTERM, when what was in progress is saved.
    """
    init, parts = checkpoints.resolve(storage.path(init).absolute()), _divided(rounds.submeshes)
    manifest = checkpoints.read_manifest(init)
    data = {name: _data(rounds, manifest, name) for name in rounds.experts}
    for name, settings in data.items():
        own_tasks.declare(settings)
        for mixture in rounds.experts[name].split("+"):
            tasks.tasks_in(mixture)
    content = rounds.to_dict() | {"init": manifest.digest, "data": data}
    files.check_claim(out, "rounds.json", content, kind="job")
    files.claim(out, "rounds.json", content)

    origin = str(init), given_checkpoints.digest_of(str(init)), manifest.vocabulary["name"]
    stages = [given_checkpoints.stage_of(START, *origin, manifest.model)]
    model, runs = START, {}
    stopping = dict.fromkeys(rounds.experts, EarlyStopping())
    losses: dict[str, list[float]] = {name: [] for name in rounds.experts}
    trained = dict.fromkeys(rounds.experts, 0)
    checked: set[str] = set()
    by_round: list[list[Stage]] = []
    for number in range(1, rounds.count + 1):
        names = [n for n in rounds.experts if not stopping[n].is_over(rounds.train.patience)]
        if not names:
            break
        by_round.append(_stages(rounds, number, names, model, runs, data, manifest))
        stages += by_round[-1]
        _execute(stages, out, checked, parts)
        model, folder = _folder(number) + "/merge", out / _folder(number) / "validation"
        for name in rounds.experts if rounds.train.validation else ():
            loss = files.read_record(folder / name / _VALIDATION)["loss"]
            losses[name].append(loss)
            improvement = rounds.train.minimum_improvement
            stopping[name] = stopping[name].updated(number, loss, improvement)
        trained |= {name: trained[name] + 1 for name in names}
        if number > rounds.keep:
            _prune(by_round[number - rounds.keep - 1], out, runs.values())
    record = {"checkpoint": f"{model}/{_MODEL}", "losses": losses, "rounds": trained}
    files.write_record(out / "finished.json", record)
    return RoundsResult(_model(out / model), losses, trained)


def _folder(number: int) -> str:
    return f"rounds/{number:04}"


def _data(rounds: Rounds, manifest: Manifest, name: str) -> JsonObject:
    """Returns the data of an expert's stages."""
    own = own_tasks.read(rounds.own_tasks, "Rounds.own_tasks")
    settings = own_tasks.settings_of(own, rounds.experts[name].split("+"), {})
    return {"data": [manifest.vocabulary["name"], rounds.source], **settings}


def _stages(
    rounds: Rounds,
    number: int,
    names: Iterable[str],
    model: str,
    runs: dict[str, str],
    data: Mapping[str, JsonObject],
    manifest: Manifest,
) -> list[Stage]:
    """Returns the stages of a round, and notes each expert's newest run in `runs`."""
    folder, stages = _folder(number), []
    settings: dict[str, dict[str, Json]] = {
        name: {
            **data[name],
            "model": manifest.model,
            "settings": rounds.training(name).flat(),
        }
        for name in rounds.experts
    }
    part = {"last_step": rounds.last_step(number), "reset_optimizer": rounds.reset_optimizer}
    for name in names:
        inputs = {"init": model} | ({"previous": runs[name]} if name in runs else {})
        runs[name] = f"{folder}/experts/{name}"
        stages.append(Stage(runs[name], "train", settings[name] | {"part": part}, inputs))
    outer = {"learning_rate": rounds.learning_rate, "momentum": rounds.momentum}
    recipe = {"recipe": rounds.merge.to_dict()}
    inputs = {"base": model} | {f"expert/{name}": runs[name] for name in rounds.experts}
    stages.append(Stage(f"{folder}/merge", "outer_step", recipe | outer, inputs))
    if rounds.train.validation:
        inputs = {"model": f"{folder}/merge"}
        for name in rounds.experts:
            stages.append(Stage(f"{folder}/validation/{name}", "evaluate", settings[name], inputs))
    return stages


def _divided(count: int) -> list[Sequence[jax.Device]]:
    """Returns this process's devices in so many equal parts of neighbours."""
    devices = jax.local_devices()
    if len(devices) % count:
        raise ConfigError(
            f"Rounds.submeshes: expected a divisor of the number of devices, {len(devices)}, found "
            f"{count}"
        )
    size = len(devices) // count
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def _execute(
    stages: Iterable[Stage],
    out: Path,
    checked: set[str],
    parts: Sequence[Sequence[jax.Device]],
) -> None:
    """Executes the stages in a thread for each part of the devices."""
    plan, outcome = Graph(stages), Outcome()

    def work(devices: Sequence[jax.Device]) -> None:
        with partitioning.restricted_to(devices):
            graph.execute(plan, out, RUNNERS, checked=checked, outcome=outcome)

    if len(parts) == 1:
        work(parts[0])
    else:
        with signals.deferred(), ThreadPoolExecutor(len(parts)) as pool:
            running = [pool.submit(work, part) for part in parts]
        for thread in running:
            thread.result()
    for name, message in outcome.failed.items():
        raise (RuntimeError if outcome.bugs else M2LError)(f"{name}: {message}")
    checked.update(stage.name for stage in plan)


def _prune(stages: Iterable[Stage], out: Path, needed: Iterable[str]) -> None:
    """Removes all checkpoints of a round but its model and the runs that are needed."""
    for stage in stages:
        if stage.kind == "train" and stage.name not in needed:
            storage.remove_tree(out / stage.name / checkpoints.STEPS)
        if stage.kind == "outer_step":
            for name in (_MERGED, _STEPPED):
                storage.remove_tree(out / stage.name / name)


# --- the stages ---


def _model(folder: AnyPath) -> AnyPath:
    """Returns the model of a stage: of a merge, or where the first round starts."""
    return folder / _MODEL if (folder / _MODEL).exists() else folder


def _run_train(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    run_train(stage, out, {**inputs, "init": _model(inputs["init"])})


def _run_outer_step(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Merges the experts, and makes the outer step.

    With theta the base, m the merge, a the learning rate and b the momentum:
    y = theta + a (m - theta), and the model is y + b (y - y'), y' being the round before's y, at
    first theta. This is Nesterov's momentum as it was first written. It equals PyTorch's
    v = b v' + (theta - m), theta - a (theta - m + b v), as y = theta_next + a b v; and what has to
    be remembered is a model, not a velocity.
    """
    recipe, rate = Recipe.from_dict(stage.settings["recipe"]), stage.settings["learning_rate"]
    base, momentum = inputs["base"], stage.settings["momentum"]
    before = [base / name for name in (_STEPPED, _MERGED) if (base / name).exists()]
    theta = _model(base)
    experts = [path for role, path in inputs.items() if role.startswith("expert/")]
    merges = [(_MERGED, theta, recipe)]
    if rate != 1:
        merges.append((_STEPPED, theta, Recipe("task_arithmetic", scale=rate)))
    if momentum:
        merges.append((_MODEL, [*before, theta][0], Recipe("task_arithmetic", scale=1 + momentum)))
    out.mkdir(parents=True, exist_ok=True)
    for name, origin, each in merges:
        target = out / (_MODEL if name == merges[-1][0] else name)
        merging.merge(origin, experts, each, target)
        experts = [target]


def _run_evaluate(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Computes the validation loss of a round's model on an expert's mixture."""
    own_tasks.declare(stage.settings)
    config = models.from_dict(stage.settings["model"])
    settings = from_flat(**stage.settings["settings"])
    mesh = partitioning.make_mesh(fsdp=settings.fsdp, model=settings.model)
    validation = Validation(
        config,
        settings.execution,
        mesh,
        batches=feed.opener(config, settings, (0, 1), False, settings.validation)(None),
        count=settings.validation_batches,
        loss_chunk=settings.objective.loss_chunk,
    )
    shardings = partitioning.shardings(models.spec(config), mesh)
    with jax.set_mesh(mesh):
        params = checkpoints.restore(_model(inputs["model"]), shardings=shardings)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        scores = validation.run(0, params)
    out.mkdir(parents=True, exist_ok=True)
    files.write_record(out / _VALIDATION, scores)


RUNNERS: Mapping[str, Runner] = {
    "given": given_checkpoints.run,
    "train": _run_train,
    "outer_step": _run_outer_step,
    "evaluate": _run_evaluate,
}
