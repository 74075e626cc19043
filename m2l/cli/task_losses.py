"""Models, and the losses on tasks that `m2l adamerging` and `m2l mask` learn by."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from m2l import api
from m2l.cli.options import (
    Command,
    with_batches,
    with_jsonl,
    with_max_examples,
    with_mesh,
    with_options,
    with_source,
)
from m2l.errors import ConfigError, MergeError
from m2l.progress import Progress
from m2l.storage import AnyPath
from m2l.typing import Json, JsonObject, PyTree

if TYPE_CHECKING:
    from m2l.checkpoints import Manifest
    from m2l.evaluation.task_data import TaskData

T = TypeVar("T")
StepBatches = Iterator[Iterator[PyTree]]
Learn = Callable[..., T]

LOSSES = {"entropy": "entropy", "labels": "cross-entropy", "teacher": "divergence"}
"""What --loss may be, and what is minimised."""


def with_loss(default: str, teacher: str) -> Callable[[Command], Command]:
    """Returns a decorator that adds --loss; `teacher` says whose predictions the last one takes."""
    return click.option(
        "--loss",
        type=click.Choice([*LOSSES]),
        default=default,
        show_default=True,
        help="Of predictions: their entropy, which reads no labels; -log p(what is right); or "
        f"their divergence from those of {teacher}.",
    )


with_teachers = click.option(
    "--teacher",
    "teachers",
    multiple=True,
    help="MIXTURE=EXPERT: which of --expert teaches a part of --mixture; repeat for each.",
)
with_mixture = with_options(
    click.option("--mixture", help="The task or mixture to learn by."),
    with_jsonl("validation=FILE: your own data, as the task `jsonl`."),
)
with_task_data = with_options(
    with_batches(batch_size=16),
    with_max_examples,
    click.option("--vocabulary", help="By default the base's own."),
    with_mesh,
    with_source(),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskLoss:
    """Models, and how the loss of a merge of theirs is computed on tasks.

    Attributes:
        command: The command's name, for messages.
        base, experts: The checkpoints.
        mixture, jsonl: What is read: as `api.evaluation_tasks` takes them.
        loss: Of LOSSES.
        teachers: The values of --teacher; with none and the loss "teacher", the first expert
            teaches everything.
        split, max_examples, batch_size, input_length, target_length, vocabulary, fsdp, model,
            source: The values of the flags that `with_task_data` adds.

    Raises:
        ConfigError: A flag is missing.
        MergeError, CheckpointError: A checkpoint is no model, or another one than the base.
    """

    command: str
    base: Path | None
    experts: tuple[Path, ...]
    mixture: str | None
    jsonl: dict[str, AnyPath]
    loss: str
    teachers: tuple[str, ...] = ()
    split: str
    max_examples: int | None
    batch_size: int
    input_length: int
    target_length: int
    vocabulary: str | None
    fsdp: int
    model: int
    source: str

    def __post_init__(self) -> None:
        mixture = api.mixture_name(self.mixture, self.jsonl)
        object.__setattr__(self, "mixture", mixture)
        for flag, value in (
            ("--base", self.base),
            ("--expert", self.experts),
            ("--mixture", mixture),
        ):
            if not value:
                raise ConfigError(f"m2l {self.command}: {flag} is missing")
        _check_alike(dict(zip(self.paths, self.manifests, strict=True)))

    @functools.cached_property
    def paths(self) -> list[Path]:
        """The checkpoints, the base first."""
        from m2l import checkpoints

        return [checkpoints.resolve(path) for path in (self.base, *self.experts)]

    @functools.cached_property
    def manifests(self) -> list["Manifest"]:
        """Theirs."""
        from m2l import checkpoints

        return [checkpoints.read_manifest(path) for path in self.paths]

    @functools.cached_property
    def taught(self) -> dict[str, int]:
        """Which expert, by its number, teaches each mixture that --teacher names."""
        from m2l import checkpoints, storage

        taught = {}
        for text in self.teachers:
            mixture, equals, path = text.partition("=")
            located = checkpoints.resolve(storage.path(path)) if equals else None
            if located not in self.paths[1:]:
                raise ConfigError(
                    f"--teacher {text}: expected MIXTURE=EXPERT, with one of --expert"
                )
            taught[mixture] = self.paths[1:].index(located)
        return taught

    def check_teachers(self) -> None:
        """Refuses --teacher without --loss teacher, and the other way round."""
        if (self.loss == "teacher") != bool(self.teachers):
            raise ConfigError(
                f"m2l {self.command}: expected --loss teacher and --teacher MIXTURE=EXPERT together"
            )

    def made_by(self, kind: str, settings: Mapping[str, Json]) -> JsonObject:
        """Returns what decides a result, as it is recorded."""
        names = ("mixture", "split", "batch_size", "max_examples", "input_length", "target_length")
        digests = [manifest.digest for manifest in self.manifests]
        record = {
            "kind": kind,
            "base": digests[0],
            "experts": digests[1:],
            "settings": {**settings, **{name: getattr(self, name) for name in names}},
            "data": api.record_origin(self.source, self.jsonl),
        }
        # What a version that knew entropy alone recorded says nothing of losses.
        record |= {} if self.loss == "entropy" else {"loss": self.loss}
        return record | ({"teachers": self.taught} if self.taught else {})

    def run(self, steps: int, learn: Learn[T]) -> T:
        """Reads the tasks, restores the models on the mesh and learns, with a progress bar.

        Args:
            steps: How many the bar is for.
            learn: (base, experts, loss, batches of each step, on_step=what is called after each).

        Returns:
            What `learn` returns.
        """
        import jax

        from m2l import checkpoints, models, partitioning
        from m2l.data import layouts
        from m2l.evaluation import batching, ranking

        described = self.manifests[0].vocabulary
        vocabulary, tasks = api.evaluation_tasks(
            self.mixture,
            self.jsonl,
            self.vocabulary or described["name"],
            described["fingerprint"],
            self.source,
            split=self.split,
            lengths={"inputs": self.input_length, "targets": self.target_length},
            max_examples=self.max_examples,
            generative_score="likelihood",
        )
        teachers = _teacher_numbers(self.taught, tasks) if self.taught else [0] * len(tasks)
        config = models.from_dict(self.manifests[0].model)
        mesh = partitioning.make_mesh(fsdp=self.fsdp, model=self.model)
        layout = layouts.of(config, vocabulary)
        examples = [task.examples for task in tasks]
        shapes = batching.common_shapes(examples, self.batch_size, layout)
        task_batches = [
            list(batching.batches(task_examples, self.batch_size, layout, shapes))
            for task_examples in examples
        ]
        placed = partitioning.shardings(models.spec(config), mesh)
        base, *experts = (checkpoints.restore(path, shardings=placed) for path in self.paths)
        predict = jax.jit(lambda params, batch: ranking.predictions(config, params, batch)[0])

        def read(task: int, part: Sequence[int], batch: batching.Batch) -> PyTree:
            if self.loss == "labels":
                return batch, _right_choices(tasks[task], part, self.batch_size)
            if self.loss == "teacher":
                return batch, predict(experts[teachers[task]], batch)
            return batch

        def step_batches() -> StepBatches:
            for step in itertools.count():
                # Each when it is its turn: of the teachers' predictions one is in memory.
                yield (
                    read(task, *batches[step % len(batches)])
                    for task, batches in enumerate(task_batches)
                )

        functions = {
            "entropy": ranking.mean_entropy,
            "labels": ranking.mean_cross_entropy,
            "teacher": ranking.mean_divergence,
        }
        loss = functools.partial(functions[self.loss], config)
        with (
            Progress(self.command, steps, first="compiling") as progress,
            jax.set_mesh(mesh),
        ):

            def on_step(step: int, value: float) -> None:
                progress.update(step, **{LOSSES[self.loss]: f"{value:.4f}"})

            return learn(base, experts, loss, step_batches(), on_step=on_step)

    def summary(self, losses: Sequence[float]) -> str:
        """Returns how far the loss came, in a line."""
        return f"{LOSSES[self.loss]} {losses[0]:.4f} to {losses[-1]:.4f} nats"


def _right_choices(task: "TaskData", part: Sequence[int], batch_size: int) -> PyTree:
    """Returns the right choice of each of a batch's examples, int32 [B]; in free text 0."""
    import numpy as np

    right_B = np.zeros(batch_size, np.int32)
    if task.info.kind == "rank":
        right_B[: len(part)] = [task.examples[each].is_correct.index(True) for each in part]
    return right_B


def _teacher_numbers(taught: Mapping[str, int], tasks: Sequence["TaskData"]) -> list[int]:
    """Returns the number of the expert that teaches each task."""
    from m2l import tasks as registry

    members = {mixture: registry.tasks_in(mixture) for mixture in taught}
    numbers = []
    for task in tasks:
        having = [number for name, number in taught.items() if task.info.name in members[name]]
        if len(having) != 1:
            raise ConfigError(
                f"--teacher: {task.info.name} has {len(having)} teachers; expected one for each "
                "task of the mixture"
            )
        numbers += having
    return numbers


def _check_alike(manifests: Mapping[Path, "Manifest"]) -> None:
    """Refuses what is no model, or another model than the first, before anything is read."""
    from m2l import checkpoints, models
    from m2l.merging import inputs

    for path, manifest in manifests.items():
        if manifest.made_by.get("kind") == "statistics":
            raise MergeError(f"{path}: it holds statistics of a model, not a model")
        vocab_size = models.from_dict(manifest.model).vocab_size
        checkpoints.check_vocabulary(manifest.vocabulary, vocab_size, path)
    inputs.check_alike(inputs.open_all(list(manifests), inputs.ORBAX)[0])
