"""`m2l tasks`."""

import dataclasses
from pathlib import Path

import click

from m2l import storage
from m2l.cli.options import (
    DIRECTORY,
    MIXTURE,
    print_json,
    print_table,
    with_json,
    with_source,
)
from m2l.errors import ConfigError
from m2l.progress import Progress


@click.group()
def tasks() -> None:
    """What there is to train on and to evaluate by."""


@tasks.command("list")
@click.option("--mixture", type=MIXTURE, help="Only the tasks of this mixture.")
@click.option("--category", help="Only this task category.")
@click.option("--dataset", help="Only this dataset.")
@click.option(
    "--held_in/--held_out",
    "held_in",
    default=None,
    help="Only what experts are trained on, or not.",
)
@with_source()
@with_json
def tasks_list(
    mixture: str | None,
    category: str | None,
    dataset: str | None,
    held_in: bool | None,
    source: str,
    as_json: bool,
) -> None:
    """Every task, then every dataset: its published size, its licence and whom to cite."""
    from m2l import tasks as registry
    from m2l.errors import UnknownNameError
    from m2l.tasks import sources

    registry.use(source)
    infos = [
        registry.info(name)
        for name in (registry.tasks_in(mixture) if mixture else registry.task_names())
    ]
    for field, value in (("category", category), ("dataset", dataset)):
        known = {getattr(info, field): None for info in infos}
        if value is not None and value not in known:
            raise UnknownNameError(f"{field} of a task", value, known)
        infos = [info for info in infos if value in (None, getattr(info, field))]
    if held_in is not None:
        infos = [info for info in infos if info.held_out != held_in]
    infos = [info for info in infos if sources.has(source, registry.datasets_of(info.name)[0])]
    if not infos:
        raise ConfigError(f"no task of source {source} is left by these filters together")
    if as_json:
        print_json([dataclasses.asdict(info) for info in infos])
        return
    rows = [
        (
            info.name,
            info.category,
            "held-out" if info.held_out else "held-in",
            info.kind,
            " ".join(info.metrics),
            "" if info.original_task or info.kind == "train" else "changes the task",
        )
        for info in infos
    ]
    print_table(f"{len(rows)} tasks", ["task", "category", "", "kind", "metrics", ""], rows)
    rows = [
        (
            dataset.name,
            f"{dataset.sizes['train']:,}" if "train" in dataset.sizes else "",
            f"{dataset.sizes['validation']:,}" if "validation" in dataset.sizes else "1 in 20",
            " ".join(dict.fromkeys(m for prompt in dataset.prompts for m in prompt.metrics)),
            " ".join(sources.having(dataset)),
            dataset.licence,
            dataset.paper,
        )
        for dataset in dict.fromkeys(registry.declaration(info.name) for info in infos)
        if dataset.paper and dataset is not sources.CORPUS
    ]
    columns = ["dataset", "train", "validation", "metrics", "sources", "licence", "to cite"]
    print_table(f"{len(rows)} datasets, as published", columns, rows)
    if not mixture:
        whole = [name for name in registry.mixtures() if not name.endswith(registry.ORIGINAL)]
        click.echo(f"mixtures: {', '.join(whole)}; all but flan's also as NAME{registry.ORIGINAL}")


@tasks.command("show")
@click.argument("task", type=MIXTURE)
@click.option("--n", type=click.IntRange(min=1), default=3, show_default=True, help="Examples.")
@click.option("--split", default="validation", show_default=True)
@with_source()
def tasks_show(task: str, n: int, split: str, source: str) -> None:
    """Examples of a task, as the model will see them."""
    from m2l import tasks as registry

    registry.declare(source=source)
    click.echo(registry.render(task.removesuffix("_score_eval"), n, split=split))


@tasks.command("cache")
@click.argument("mixture", type=MIXTURE)
@click.option("--out", type=DIRECTORY, required=True, help="The folder; then --source cache:DIR.")
@with_source()
def tasks_cache(mixture: str, out: Path, source: str) -> None:
    """Write a mixture's records to disk, to be read without its source or a network."""
    from m2l import tasks as registry
    from m2l.tasks import caches

    registry.use(source)
    datasets = registry.datasets_of(mixture)
    done = []

    def on_split(dataset: str, split: str, records: int) -> None:
        done.append(split)
        progress.update(len(done))

    count = sum(len(dataset.splits) for dataset in datasets)
    with Progress("write", count, "splits") as progress, storage.local_output(out) as local:
        records = caches.write(datasets, source, local, on_split)
    click.echo(f"{records:,} records of {len(datasets)} datasets: use --source cache:{out}")
