"""`m2l adamerging`."""

import functools
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l import api
from m2l.cli.options import (
    COUNT,
    DIRECTORY,
    MODEL,
    print_table,
    with_batches,
    with_jsonl,
    with_max_examples,
    with_mesh,
    with_source,
)
from m2l.errors import ConfigError, DataError, MergeError
from m2l.progress import Progress
from m2l.storage import AnyPath
from m2l.typing import Json, PyTree

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from m2l import models
    from m2l.checkpoints import Manifest
    from m2l.data.vocabularies import Vocabulary
    from m2l.evaluation.task_data import TaskData
    from m2l.merging.search import Learned


LOSSES = {"entropy": "entropy", "labels": "cross-entropy", "teacher": "divergence"}
"""What --loss may be, and what is minimised."""
# Under which name a recipe holds the values of other losses than entropy, and of this.
_RECORDED = ("losses", "entropies")


@click.command()
@click.option("--base", type=MODEL, help="The checkpoint the experts were trained from.")
@click.option("--expert", "experts", type=MODEL, multiple=True, help="Repeat for each.")
@click.option("--mixture", help="The task or mixture to learn by.")
@with_jsonl("validation=FILE: your own data, as the task `jsonl`.")
@click.option("--out", type=DIRECTORY, required=True, help="The recipe: a JSON file.")
@click.option(
    "--loss",
    type=click.Choice([*LOSSES]),
    default="entropy",
    show_default=True,
    help="Of predictions: their entropy, which reads no labels; -log p(what is right); or their "
    "divergence from those of a task's own expert, --teacher.",
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    help="MIXTURE=EXPERT: which of --expert teaches a part of --mixture; repeat for each.",
)
@click.option("--steps", type=COUNT, default=500, show_default=True)
@click.option(
    "--per_layer/--per_expert",
    default=True,
    show_default=True,
    help="A coefficient for each layer of each expert, or one for each expert.",
)
@click.option("--learning_rate", type=float, default=1e-3, show_default=True)
@click.option("--initial", type=float, default=0.3, show_default=True, help="Of coefficients.")
@with_batches(batch_size=16)
@with_max_examples
@click.option("--vocabulary", help="By default the base's own.")
@with_mesh
@with_source()
def adamerging(
    base: Path | None,
    experts: tuple[Path, ...],
    mixture: str | None,
    jsonl: dict[str, AnyPath],
    out: Path,
    loss: str,
    teachers: tuple[str, ...],
    steps: int,
    per_layer: bool,
    learning_rate: float,
    initial: float,
    split: str,
    max_examples: int | None,
    batch_size: int,
    input_length: int,
    target_length: int,
    vocabulary: str | None,
    fsdp: int,
    model: int,
    source: str,
) -> None:
    """Learn how much each expert counts in a merge, from examples, by default without labels.

    Writes a recipe with the coefficients for m2l merge. Every step reads a batch of each task.
    """
    from m2l import checkpoints, models, partitioning

    mixture = api.mixture_name(mixture, jsonl)
    for flag, value in (("--base", base), ("--expert", experts), ("--mixture", mixture)):
        if not value:
            raise ConfigError(f"m2l adamerging: {flag} is missing")
    paths = [checkpoints.resolve(path) for path in (base, *experts)]
    manifests = [checkpoints.read_manifest(path) for path in paths]
    _check_alike(dict(zip(paths, manifests, strict=True)))
    taught = _taught(loss, teachers, paths[1:])
    settings = {
        "steps": steps,
        "per_layer": per_layer,
        "learning_rate": learning_rate,
        "initial": initial,
    }
    made_by = {
        "kind": "adamerging",
        "base": manifests[0].digest,
        "experts": [manifest.digest for manifest in manifests[1:]],
        "settings": settings
        | {"mixture": mixture, "split": split, "batch_size": batch_size}
        | {"max_examples": max_examples}
        | {"input_length": input_length, "target_length": target_length},
        "data": api.record_origin(source, jsonl),
    }
    # A recipe of a version that knew entropy alone says nothing of losses.
    made_by |= {} if loss == "entropy" else {"loss": loss}
    made_by |= {"teachers": taught} if taught else {}
    if out.exists():
        _check_finished(out, made_by)
        return

    vocabulary, tasks = api.evaluation_tasks(
        mixture,
        jsonl,
        vocabulary or manifests[0].vocabulary["name"],
        manifests[0].vocabulary["fingerprint"],
        source,
        split=split,
        lengths={"inputs": input_length, "targets": target_length},
        max_examples=max_examples,
        generative_score="likelihood",
    )
    mesh = partitioning.make_mesh(fsdp=fsdp, model=model)
    config = models.from_dict(manifests[0].model)
    numbers = _teacher_numbers(taught, tasks) if taught else []
    learned = _learn(paths, config, mesh, vocabulary, tasks, batch_size, loss, numbers, settings)
    scales = [[pattern, row] for pattern, row in learned.coefficients.items()]
    record = {
        "recipe": {"method": "task_arithmetic", "scales": scales},
        "made_by": made_by | {_RECORDED[loss == "entropy"]: learned.losses},
    }
    _write(out, record)
    columns = ["parameters", *(path.name for path in experts)]
    rows = [(pattern, *row) for pattern, row in learned.coefficients.items()]
    first, last = learned.losses[0], learned.losses[-1]
    print_table(f"{LOSSES[loss]} {first:.4f} to {last:.4f} nats", columns, rows)
    flags = [part for path in experts for part in ("--expert", str(path))]
    command = ["m2l", "merge", "--recipe", str(out), "--base", str(base), *flags]
    click.echo(f"recipe: {out}\nmerge with it: {shlex.join(command)} --out DIR")


def _taught(loss: str, teachers: Sequence[str], experts: Sequence[AnyPath]) -> dict[str, int]:
    """Returns which expert, by its number, teaches each mixture that --teacher names."""
    from m2l import checkpoints, storage

    if (loss == "teacher") != bool(teachers):
        raise ConfigError(
            "m2l adamerging: expected --loss teacher and --teacher MIXTURE=EXPERT together"
        )
    taught = {}
    for text in teachers:
        mixture, equals, path = text.partition("=")
        located = checkpoints.resolve(storage.path(path)) if equals else None
        if located not in experts:
            raise ConfigError(f"--teacher {text}: expected MIXTURE=EXPERT, with one of --expert")
        taught[mixture] = [*experts].index(located)
    return taught


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


def _check_finished(out: Path, made_by: Mapping[str, Json]) -> None:
    """Refuses what is at `out` unless the same command wrote it, and says that it did."""
    from m2l import files

    try:
        recorded = files.read_record(out, required=False).get("made_by")
    except DataError:
        recorded = None  # Whatever it is, it is not of this command.
    recorded = dict(recorded) if isinstance(recorded, Mapping) else {}
    for name in _RECORDED:
        recorded.pop(name, None)
    if recorded != json.loads(json.dumps(made_by)):
        raise ConfigError(f"{out} exists and is not of this command; choose another --out")
    click.echo(f"recipe: {out}, already there, learned by the same command")


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


def _learn(
    paths: Sequence[Path],
    config: "models.Config",
    mesh: "Mesh",
    vocabulary: "Vocabulary",
    tasks: Sequence["TaskData"],
    batch_size: int,
    loss: str,
    teachers: Sequence[int],
    settings: Mapping[str, Json],
) -> "Learned":
    """Learns the coefficients on the mesh, with a progress bar."""
    import jax
    import numpy as np

    from m2l import checkpoints, models, partitioning
    from m2l.data import layouts
    from m2l.evaluation import batching, ranking
    from m2l.merging.search import learn_coefficients

    layout = layouts.of(config, vocabulary)
    examples = [task.examples for task in tasks]
    shapes = batching.common_shapes(examples, batch_size, layout)
    task_batches = [
        list(batching.batches(task_examples, batch_size, layout, shapes))
        for task_examples in examples
    ]
    placed = partitioning.shardings(models.spec(config), mesh)
    base, *experts = (checkpoints.restore(path, shardings=placed) for path in paths)
    predict = jax.jit(lambda params, batch: ranking.predictions(config, params, batch)[0])

    def right_choices(task: int, part: Sequence[int]) -> np.ndarray:
        right_B = np.zeros(batch_size, np.int32)
        if tasks[task].info.kind == "rank":
            right_B[: len(part)] = [examples[task][each].is_correct.index(True) for each in part]
        return right_B

    def read(task: int, part: Sequence[int], batch: batching.Batch) -> PyTree:
        if loss == "labels":
            return batch, right_choices(task, part)
        if loss == "teacher":
            return batch, predict(experts[teachers[task]], batch)
        return batch

    def step_batches() -> Iterator[Iterator[PyTree]]:
        for step in itertools.count():
            # Each when it is its turn: of the teachers' predictions one is in memory.
            yield (
                read(task, *batches[step % len(batches)])
                for task, batches in enumerate(task_batches)
            )

    losses = {
        "entropy": ranking.mean_entropy,
        "labels": ranking.mean_cross_entropy,
        "teacher": ranking.mean_divergence,
    }
    with (
        Progress("adamerging", settings["steps"], first="compiling") as progress,
        jax.set_mesh(mesh),
    ):
        return learn_coefficients(
            base,
            experts,
            functools.partial(losses[loss], config),
            step_batches(),
            on_step=lambda step, value: progress.update(step, **{LOSSES[loss]: f"{value:.4f}"}),
            **settings,
        )


def _write(out: Path, record: Mapping[str, Json]) -> None:
    from m2l import files

    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_record(out, record)
