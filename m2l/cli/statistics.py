"""`m2l statistics`."""

from pathlib import Path

import click

from m2l import api
from m2l.cli.data import jsonl_files
from m2l.cli.options import DIRECTORY, print_table, with_mesh, with_source
from m2l.errors import ConfigError


@click.command()
@click.option("--checkpoint", type=DIRECTORY, required=True, help="The expert to look at.")
@click.option("--mixture", help="The task or mixture it was trained on.")
@click.option("--jsonl", help="train=FILE: your own data, as the task `jsonl`.")
@click.option(
    "--kind",
    type=click.Choice(["fisher", "gram"]),
    required=True,
    help="fisher, for Fisher averaging; gram, for RegMean.",
)
@click.option("--examples", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--out", type=DIRECTORY, required=True, help="The checkpoint of the statistic.")
@click.option("--split", default="train", show_default=True)
@click.option("--batch_size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--input_length", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--target_length", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the examples' order.")
@click.option("--vocabulary", help="By default the checkpoint's own.")
@with_mesh
@with_source()
def statistics(
    checkpoint: Path,
    mixture: str | None,
    jsonl: str | None,
    kind: str,
    examples: int,
    out: Path,
    split: str,
    batch_size: int,
    input_length: int,
    target_length: int,
    seed: int,
    vocabulary: str | None,
    fsdp: int,
    model: int,
    source: str,
) -> None:
    """Gather what Fisher merging or RegMean needs to know of an expert on its own data."""
    from m2l import checkpoints

    files = jsonl_files(jsonl)
    mixture = api.mixture_name(mixture, files)
    if mixture is None:
        raise ConfigError("m2l statistics: name a --mixture, or your own data with --jsonl")
    manifest = checkpoints.read_manifest(checkpoint)

    from m2l.data import vocabularies
    from m2l.training import statistics as gathering

    name = vocabulary or manifest.vocabulary["name"]
    described = vocabularies.describe(vocabularies.load(name), name)
    data = api.register_tasks(name, source, files)
    made = gathering.gather(
        checkpoint,
        out,
        kind=kind,
        mixture=mixture,
        examples=examples,
        vocabulary=described,
        data=data,
        split=split,
        batch_size=batch_size,
        input_length=input_length,
        target_length=target_length,
        seed=seed,
        fsdp=fsdp,
        model=model,
    )
    rows = [(name, "x".join(map(str, p["shape"]))) for name, p in made.parameters.items()]
    print_table(f"{kind} of {examples} examples", ["parameter", "shape"], rows)
    click.echo(f"statistics: {out}  digest {made.digest[:16]}")
