"""`m2l statistics`."""

from pathlib import Path

import click

from m2l import api
from m2l.cli.options import (
    COUNT,
    DIRECTORY,
    MODEL,
    print_table,
    with_batches,
    with_jsonl,
    with_mesh,
    with_source,
)
from m2l.errors import ConfigError
from m2l.storage import AnyPath


@click.command()
@click.option("--checkpoint", type=MODEL, required=True, help="The expert to look at.")
@click.option("--mixture", help="The task or mixture it was trained on.")
@with_jsonl("train=FILE: your own data, as the task `jsonl`.")
@click.option(
    "--kind",
    type=click.Choice(["fisher", "gram"]),
    required=True,
    help="fisher, for fisher and gradient_matching; gram, for regmean and mats.",
)
@click.option("--examples", type=COUNT, default=256, show_default=True)
@click.option("--out", type=DIRECTORY, required=True, help="The checkpoint of the statistic.")
@with_batches(split="train", batch_size=8)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the examples' order.")
@click.option("--vocabulary", help="By default the checkpoint's own.")
@with_mesh
@with_source()
def statistics(
    checkpoint: Path,
    mixture: str | None,
    jsonl: dict[str, AnyPath],
    kind: str,
    examples: int,
    out: Path,
    vocabulary: str | None,
    source: str,
    **options: int | str,
) -> None:
    """Gather what fisher, gradient_matching, regmean and mats need to know of an expert's data."""
    from m2l import checkpoints

    mixture = api.mixture_name(mixture, jsonl)
    if mixture is None:
        raise ConfigError("m2l statistics: name a --mixture, or your own data with --jsonl")
    manifest = checkpoints.read_manifest(checkpoint)

    from m2l.data import vocabularies
    from m2l.training import statistics as gathering

    name = vocabulary or manifest.vocabulary["name"]
    described = vocabularies.describe(vocabularies.load(name), name)
    data = api.register_tasks(name, source, jsonl)
    statistic = gathering.gather(
        checkpoint,
        out,
        kind=kind,
        mixture=mixture,
        examples=examples,
        vocabulary=described,
        data=data,
        **options,
    )
    rows = [(name, "x".join(map(str, p["shape"]))) for name, p in statistic.parameters.items()]
    print_table(f"{kind} of {examples} examples", ["parameter", "shape"], rows)
    click.echo(f"statistics: {out}  digest {statistic.digest[:16]}")
