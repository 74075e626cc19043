"""`m2l tasks`; and the data that other subcommands are pointed at."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2l import storage
from m2l.cli.options import DIRECTORY, print_table, with_source
from m2l.errors import ConfigError, DataError
from m2l.progress import Progress

if TYPE_CHECKING:
    from m2l.evaluation.task_data import TaskData


def jsonl_files(value: str | None, mixture: str | None) -> dict[str, Path]:
    """`train=FILE,validation=FILE` as a dict."""
    if value and mixture not in (None, "jsonl"):
        raise ConfigError(f"--jsonl is the task `jsonl`: leave --mixture {mixture} out")
    files = {}
    for part in value.split(",") if value else []:
        split, found, path = part.partition("=")
        if not found or not split or not path:
            raise ConfigError(f"--jsonl {value}: expected train=FILE,validation=FILE")
        files[split] = storage.path(path)
    return files


def register(vocabulary: str, source: str, jsonl: Mapping[str, Path]) -> dict[str, Any]:
    """Fills seqio's registry; returns where the records come from, as plain values."""
    from m2l import tasks

    tasks.register(vocabulary=vocabulary, source=source)
    if jsonl:
        tasks.register_jsonl(jsonl)
    return origin(source, jsonl)


def origin(source: str, jsonl: Mapping[str, Path]) -> dict[str, Any]:
    """Where records come from, as plain values: a source's name, or digests of files."""
    import hashlib

    if not jsonl:
        return {"source": source}
    digests = {split: hashlib.sha256(p.read_bytes()).hexdigest() for split, p in jsonl.items()}
    return {"source": "jsonl", **digests}


def scored_tasks(
    mixture: str | None,
    jsonl: Mapping[str, Path],
    vocabulary_name: str,
    fingerprint: str,
    source: str,
    *,
    split: str,
    lengths: Mapping[str, int],
    max_examples: int | None = None,
    generative_score: str = "decoding",
    beams: int = 1,
    max_truncated: float = 1.0,
) -> tuple[Any, list["TaskData"]]:
    """Reads and tokenises what a model is to be scored on: all of a mixture but its corpora.

    Args:
        mixture: A task or mixture; None with `jsonl`.
        jsonl: The files that `jsonl_files` found.
        vocabulary_name: The vocabulary to read by, "microworld" or a path.
        fingerprint: That of the vocabulary the model was trained with.
        source: Of the records.
        split, lengths, max_examples, generative_score, beams, max_truncated: As `load_tasks` takes
            them.

    Returns:
        The seqio vocabulary, and the tasks.

    Raises:
        ConfigError: neither a mixture nor files.
        DataError: another vocabulary than the model's; nothing in the mixture can be scored.
        UnknownNameError: no such mixture.
    """
    mixture = "jsonl" if jsonl else mixture
    if mixture is None:
        raise ConfigError("what to score by: name a --mixture, or your own data with --jsonl")

    from m2l import tasks as registry
    from m2l.data import vocabularies
    from m2l.evaluation.task_data import load_tasks

    vocabulary = vocabularies.load(vocabulary_name)
    if vocabularies.describe(vocabulary, vocabulary_name)["fingerprint"] != fingerprint:
        raise DataError(f"vocabulary {vocabulary_name!r} is not the one that the model reads")
    register(vocabulary_name, source, jsonl)
    infos = [registry.info(task) for task in registry.tasks_in(mixture)]
    scored = [info for info in infos if info.kind != "train"]
    if not scored:
        raise DataError(f"mixture {mixture!r} has no task that can be evaluated")
    loaded = load_tasks(
        scored,
        split=split,
        lengths=lengths,
        max_examples=max_examples,
        generative_score=generative_score,
        beams=beams,
        max_truncated=max_truncated,
    )
    return vocabulary, loaded


@click.group()
def tasks() -> None:
    """What there is to train on and to evaluate by."""


@tasks.command("list")
@click.option("--mixture", help="Only the tasks of this mixture.")
@click.option("--category", help="Only this task category.")
@click.option("--dataset", help="Only this dataset.")
@click.option(
    "--held_in/--held_out",
    "held_in",
    default=None,
    help="Only what experts are trained on, or not.",
)
@with_source()
def tasks_list(
    mixture: str | None,
    category: str | None,
    dataset: str | None,
    held_in: bool | None,
    source: str,
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
    for what, wanted in (("category", category), ("dataset", dataset)):
        known = {getattr(info, what): None for info in infos}
        if wanted is not None and wanted not in known:
            raise UnknownNameError(f"{what} of a task", wanted, known)
        infos = [info for info in infos if wanted in (None, getattr(info, what))]
    if held_in is not None:
        infos = [info for info in infos if info.held_out != held_in]
    declared = {info.name: registry.declaration(info.name) for info in infos}
    infos = [info for info in infos if sources.has(source, registry.datasets_of(info.name)[0])]
    if not infos:
        raise ConfigError(f"no task of source {source} is left by these filters together")
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
    listed = dict.fromkeys(declared[info.name] for info in infos)
    rows = [
        (
            one.name,
            f"{one.sizes['train']:,}" if "train" in one.sizes else "",
            f"{one.sizes['validation']:,}" if "validation" in one.sizes else "1 in 20",
            " ".join(dict.fromkeys(metric for prompt in one.prompts for metric in prompt.metrics)),
            " ".join(sources.having(one)),
            one.licence,
            one.paper,
        )
        for one in listed
        if one.paper and one is not sources.CORPUS
    ]
    columns = ["dataset", "train", "validation", "metrics", "sources", "licence", "to cite"]
    print_table(f"{len(rows)} datasets, as published", columns, rows)
    if not mixture:
        whole = [name for name in registry.mixtures() if not name.endswith(registry.ORIGINAL)]
        click.echo(f"mixtures: {', '.join(whole)}; all but flan's also as NAME{registry.ORIGINAL}")


@tasks.command("show")
@click.argument("task")
@click.option("--n", type=click.IntRange(min=1), default=3, show_default=True, help="Examples.")
@click.option("--split", default="validation", show_default=True)
@with_source()
def tasks_show(task: str, n: int, split: str, source: str) -> None:
    """Examples of a task, as the model will see them."""
    from m2l import tasks as registry

    registry.register(source=source)
    click.echo(registry.render(task.removesuffix("_score_eval"), n, split=split))


@tasks.command("cache")
@click.argument("mixture")
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
