"""`m2l tasks`; and the data that other subcommands are pointed at."""

from pathlib import Path
from typing import Any

import click

from m2l.cli.options import print_table
from m2l.errors import ConfigError


def jsonl_files(value: str | None, mixture: str | None) -> dict[str, Path]:
    """`train=FILE,validation=FILE` as a dict."""
    if value and mixture not in (None, "jsonl"):
        raise ConfigError(f"--jsonl is the task `jsonl`: leave --mixture {mixture} out")
    files = {}
    for part in value.split(",") if value else []:
        split, found, path = part.partition("=")
        if not found or not split or not path:
            raise ConfigError(f"--jsonl {value}: expected train=FILE,validation=FILE")
        files[split] = Path(path)
    return files


def register(vocabulary: str, source: str, jsonl: dict[str, Path]) -> dict[str, Any]:
    """Fills seqio's registry; returns where the records come from, as plain values."""
    import hashlib

    from m2l import tasks

    tasks.register(vocabulary=vocabulary, source=source)
    if not jsonl:
        return {"source": source}
    tasks.register_jsonl(jsonl)
    digests = {split: hashlib.sha256(p.read_bytes()).hexdigest() for split, p in jsonl.items()}
    return {"source": "jsonl", **digests}


@click.group()
def tasks() -> None:
    """What there is to train on and to evaluate by."""


@tasks.command("list")
@click.option("--mixture", help="Only the tasks of this mixture.")
def tasks_list(mixture: str | None) -> None:
    """Every task with its dataset, category, kind and metric."""
    from m2l import tasks as registry

    names = registry.tasks_in(mixture) if mixture else registry.task_names()
    infos = [registry.info(name) for name in names]
    rows = [
        (i.name, i.category, "held-out" if i.held_out else "held-in", i.kind, i.metric)
        for i in infos
    ]
    print_table(f"{len(rows)} tasks", ["task", "category", "", "kind", "metric"], rows)
    if not mixture:
        click.echo("mixtures: " + ", ".join(registry.mixtures()))


@tasks.command("show")
@click.argument("task")
@click.option("--n", default=3, show_default=True, help="How many examples.")
@click.option("--split", default="validation", show_default=True)
def tasks_show(task: str, n: int, split: str) -> None:
    """Examples of a task, as the model will see them."""
    from m2l import tasks as registry

    registry.register()
    click.echo(registry.render(task, n, split=split))
