"""`m2l align`."""

import itertools
from collections.abc import Mapping
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
    with_source,
)
from m2l.errors import ConfigError
from m2l.storage import AnyPath
from m2l.typing import Json

if TYPE_CHECKING:
    from m2l.merging.alignment import Alignment


@click.command()
@click.argument("expert", type=MODEL)
@click.option("--to", "reference", type=MODEL, required=True, help="The base, or another expert.")
@click.option(
    "--match",
    type=click.Choice(["weights", "activations"]),
    default="weights",
    show_default=True,
    help="What units are matched by.",
)
@click.option("--mixture", help="The task or mixture of activations and of the barrier.")
@with_jsonl("SPLIT=FILE: your own data, as the task `jsonl`.")
@click.option("--examples", type=COUNT, default=64, show_default=True)
@click.option(
    "--points", type=COUNT, default=5, show_default=True, help="Of the line, for the barrier."
)
@click.option("--out", type=DIRECTORY, required=True, help="The checkpoint to make.")
@with_batches(split="validation", batch_size=8)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the examples' order.")
@click.option("--vocabulary", help="By default the models' own.")
@with_source()
def align(
    expert: Path,
    reference: Path,
    match: str,
    mixture: str | None,
    jsonl: dict[str, AnyPath],
    examples: int,
    points: int,
    out: Path,
    vocabulary: str | None,
    source: str,
    **options: int | str,
) -> None:
    """Exchange EXPERT's units so that they are where those of another model match them best.

    EXPERT computes what it did; merges with the other model add up what belongs together. With
    data the loss on the line between the two is measured, before and after.
    """
    from m2l.merging import alignment

    mixture = api.mixture_name(mixture, jsonl)
    if match == "activations" and mixture is None:
        raise ConfigError(
            "m2l align --match activations: name a --mixture, or your data with --jsonl"
        )
    if points < 2:
        raise ConfigError("m2l align --points: expected 2 or more, the ends of the line")
    described = _vocabulary(expert, vocabulary)
    recorded: Json = match
    products = batches = None
    if mixture is not None:
        from m2l.training import statistics

        if described["name"] is None:
            raise ConfigError(f"m2l align: {expert} has no tokenizer: name one with --vocabulary")
        data = api.register_tasks(described["name"], source, jsonl)
        config, _, trees = alignment.open_pair(reference, expert)
        batches = _batches(config, mixture, examples, **options)
        if match == "activations":
            products = statistics.cross_products(config, *trees, iter(batches), examples)
            settings = {"mixture": mixture, "examples": examples, "data": data, **options}
            recorded = {"activations": settings}
    manifest, result = alignment.align(
        expert, reference, out, products=products, matching=recorded, vocabulary=described
    )
    if result is not None:
        _show(result)
    if batches is not None:
        from m2l import checkpoints
        from m2l.training import barrier

        aligned = checkpoints.restore(out)
        lines = [
            barrier.losses_on_line(config, trees[0], end, batches, points)
            for end in (trees[1], aligned)
        ]
        rows = [
            (f"{place / (points - 1):.2f}", *(f"{line[place]:.4f}" for line in lines))
            for place in range(points)
        ]
        print_table(f"loss on {mixture}", ["share of the expert", "as it was", "aligned"], rows)
        heights = [barrier.barrier(line) for line in lines]
        click.echo(f"barrier: {heights[0]:.4f} as it was, {heights[1]:.4f} aligned")
    click.echo(f"checkpoint: {out}  digest {manifest.digest[:16]}")


def _show(result: "Alignment") -> None:
    rows = [(kind, f"{units:,}", f"{result.moved[kind]:,}") for kind, units in result.units.items()]
    print_table("units", ["group", "units", "moved"], rows)
    before, after = result.distances
    click.echo(f"distance: {before:.5g}, aligned {after:.5g}, in {result.sweeps} sweeps")


def _vocabulary(expert: Path, name: str | None) -> dict[str, Json]:
    """Returns the description of the vocabulary of an expert, or of one that is named."""
    from m2l.checkpoints import opening
    from m2l.data import tokenizer_files

    opened = opening.open(expert, named=False)
    if name is None and opened.vocabulary is not None:
        return dict(opened.vocabulary)
    if name is None and opened.tokenizer is None:
        return {"name": None, "size": None, "fingerprint": None}
    return tokenizer_files.describe(name or str(opened.tokenizer))


def _batches(
    config: object,
    mixture: str,
    examples: int,
    *,
    split: str,
    batch_size: int,
    input_length: int,
    target_length: int,
    seed: int,
) -> list[Mapping[str, object]]:
    """Returns so many examples, one a row; of the last batch there may be more."""
    from m2l.data import layouts, pipeline

    size = min(batch_size, examples)
    stream = pipeline.training_batches(
        mixture,
        lengths={"inputs": input_length, "targets": target_length},
        batch_size=size,
        seed=seed,
        pack=False,
        split=split,
        layout=layouts.of(config, pipeline.vocabulary_of(mixture, split)),
    )
    return list(itertools.islice(stream, -(-examples // size)))
