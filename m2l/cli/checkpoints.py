"""`m2l convert`, `m2l inspect`."""

import json
import math
from pathlib import Path
from typing import Any

import click

from m2l import storage
from m2l.cli import diagnostics
from m2l.cli.options import DIRECTORY, print_table, with_gin, with_mesh
from m2l.errors import CheckpointError, ConfigError

FORMATS = ("huggingface", "t5x", "orbax")


@click.command()
@click.argument("source", type=DIRECTORY)
@click.argument("out", type=DIRECTORY)
@click.option("--from", "kind", type=click.Choice(FORMATS), help="By default what SOURCE is.")
@click.option("--to", "into", type=click.Choice(FORMATS), help="By default orbax, or huggingface.")
@click.option("--dtype", help="float32, bfloat16 or float16; by default the source's.")
@click.option("--vocabulary", help="Where the tokenizer is, if SOURCE has none.")
@click.option("--shard_size", type=float, default=5.0, show_default=True, help="GB, of an export.")
@click.option("--results", type=DIRECTORY, help="A folder of m2l eval, for an export's README.md.")
@with_gin
def convert(
    source: Path,
    out: Path,
    kind: str | None,
    into: str | None,
    dtype: str | None,
    vocabulary: str | None,
    shard_size: float,
    results: Path | None,
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
) -> None:
    """Make a checkpoint of a Hugging Face or T5X one, or one of these of a checkpoint.

    The settings of a T5X model are read off its shapes; --gin_file models/NAME.gin overrides them.
    """
    from m2l import checkpoints
    from m2l.checkpoints import huggingface, huggingface_directory, opening, t5x

    kind = kind or opening.kind(source)
    into = into or ("huggingface" if kind == "orbax" else "orbax")
    if (kind == "orbax") == (into == "orbax"):
        raise ConfigError(
            f"m2l convert: from {kind} to {into}: one of the two must be orbax, which is m2l's own"
        )
    if into == "t5x":
        click.echo(f"T5X checkpoint: {t5x.export_checkpoint(source, out, dtype=dtype)}")
        return
    if kind == "orbax":
        found = sorted(results.glob("*.json")) if results else []
        size = int(shard_size * 1e9)
        huggingface.export_checkpoint(source, out, dtype=dtype, shard_size=size, results=found)
        click.echo(f"Hugging Face directory: {out}")
        if not huggingface_directory.has_tokenizer(out):
            name = checkpoints.read_manifest(source).vocabulary.get("name")
            click.echo(
                f"without a tokenizer: the checkpoint has no files of its vocabulary {name!r}"
            )
        return

    from m2l.data import tokenizer_files

    config = None
    if gin_files or bindings:
        config = _model(gin_files, bindings)
    if kind == "t5x" and vocabulary is None:
        raise ConfigError(
            "m2l convert: a T5X checkpoint does not hold its vocabulary; name it with --vocabulary"
        )
    described = tokenizer_files.describe(vocabulary or str(source))
    import_checkpoint = {"huggingface": huggingface, "t5x": t5x}[kind].import_checkpoint
    manifest = import_checkpoint(source, out, vocabulary=described, dtype=dtype, config=config)
    click.echo(f"checkpoint: {out}  digest {manifest.digest[:16]}")


def _model(gin_files: tuple[str, ...], bindings: tuple[str, ...]) -> Any:
    from m2l import configuration

    # A run's settings are asked for, of which only the model matters.
    given = [*bindings, "Train.mixture='none'", "Train.steps=1"]
    run, _ = configuration.load("Run", ("runs/train.gin", *gin_files), given)
    if run.model is None:
        raise ConfigError("m2l convert: the gin files have no model; see those in models/")
    return run.model


@click.command()
@click.argument("checkpoint", type=DIRECTORY)
@click.option("--verify", is_flag=True, help="Compute every digest anew.")
@click.option("--subtree", help="Of a pytree that Orbax stored, the part to show: params.")
@with_mesh
@click.option("--cosines", type=DIRECTORY, help="Draw a merge's task vectors: a .png, .svg, .pdf.")
def inspect(
    checkpoint: Path,
    verify: bool,
    subtree: str | None,
    fsdp: int,
    model: int,
    cosines: Path | None,
) -> None:
    """What is in a checkpoint and where it came from."""
    from jax import numpy as jnp
    from jax.sharding import AbstractMesh
    from rich.console import Console

    from m2l import checkpoints, models, partitioning
    from m2l.checkpoints import huggingface_directory

    if (opened := _guest(checkpoint, subtree)) is not None:
        _show_guest(opened)
        return
    directory, manifest = _opened(checkpoint)
    rows = [
        (name, "x".join(map(str, p["shape"])), p["dtype"], p["digest"][:12])
        for name, p in manifest.parameters.items()
    ]
    print_table(str(directory), ["parameter", "shape", "dtype", "digest"], rows)
    if fsdp * model > 1:
        mesh = AbstractMesh((1, fsdp, model), partitioning.MESH_AXES)
        placed = partitioning.table(models.spec(models.from_dict(manifest.model)), mesh)
        rows = [(row.name, str(tuple(row.spec)), row.mib_per_device) for row in placed]
        print_table(f"fsdp {fsdp}, model {model}", ["parameter", "axes", "MiB/device"], rows)
        click.echo(f"MiB per device: {sum(row.mib_per_device for row in placed):.1f}")
    sizes = [(math.prod(p["shape"]), p["dtype"]) for p in manifest.parameters.values()]
    size = sum(count * jnp.dtype(dtype).itemsize for count, dtype in sizes)
    click.echo(
        f"parameters: {sum(count for count, _ in sizes):,}  {size / 2**20:,.1f} MiB of "
        f"{manifest.dtype}  digest {manifest.digest[:16]}  step {manifest.step}"
    )
    click.echo(f"model: {json.dumps(manifest.model)}")
    click.echo(f"vocabulary: {json.dumps(manifest.vocabulary)}")
    made_by = dict(manifest.made_by)
    measured = made_by.pop("diagnostics", None)
    click.echo(f"made by: {json.dumps(made_by)}")
    experts = diagnostics.names([p["path"] for p in manifest.parents if p["role"] == "expert"])
    if measured:
        diagnostics.show(manifest.made_by, experts)
    if cosines:
        diagnostics.draw(manifest.made_by, experts, cosines)
    if manifest.parents:
        Console(width=200, highlight=False).print(_lineage(str(directory), manifest))
    if verify:
        exported = (directory / huggingface_directory.MANIFEST).is_file()
        (huggingface_directory if exported else checkpoints).verify(directory)
        click.echo("every digest is right")


def _guest(checkpoint: Path, subtree: str | None) -> Any:
    """Opens what m2l did not write and has no manifest of; None: it has one."""
    from m2l.checkpoints import huggingface_directory, opening

    if subtree is None and (
        (checkpoint / huggingface_directory.MANIFEST).is_file() or opening.has_manifest(checkpoint)
    ):
        return None
    return opening.open(checkpoint, subtree=subtree, native=True, named=False)


def _show_guest(opened: Any) -> None:
    rows = [
        (name, "x".join(map(str, tensor.shape)), tensor.dtype.name)
        for name, tensor in opened.parameters.items()
    ]
    print_table(str(opened.path), ["parameter", "shape", "dtype"], rows)
    size = sum(t.size * t.dtype.itemsize for t in opened.parameters.values())
    count = sum(t.size for t in opened.parameters.values())
    click.echo(f"parameters: {count:,}  {size / 2**20:,.1f} MiB  {opened.format}")
    click.echo("without a manifest of m2l's: nothing tells where it came from, or its digests")


def _opened(checkpoint: Path) -> tuple[Path, Any]:
    """A checkpoint, or a Hugging Face directory that m2l made, and its manifest."""
    from m2l import checkpoints
    from m2l.checkpoints import huggingface_directory

    if (checkpoint / huggingface_directory.MANIFEST).is_file():
        return checkpoint, huggingface_directory.read_manifest(checkpoint)
    directory = checkpoints.resolve(checkpoint)
    return directory, checkpoints.read_manifest(directory)


def _lineage(title: str, manifest: Any) -> Any:
    """What a checkpoint was made from, and that from, as far as it is still there."""
    from rich.markup import escape
    from rich.tree import Tree

    from m2l import checkpoints

    tree = Tree(escape(f"{title}  {_made(manifest)}, digest {manifest.digest[:16]}"))
    for parent in manifest.parents:
        label = f"{parent['role']} {parent['path']}"
        try:
            found = checkpoints.read_manifest(parent["path"])
        except CheckpointError:
            there = storage.path(parent["path"]).exists()
            what = "no checkpoint of m2l" if there else "not there any more"
            tree.add(escape(f"{label}  digest {parent['digest'][:16]}, {what}"))
            continue
        if found.digest != parent["digest"]:
            tree.add(escape(f"{label}  digest {parent['digest'][:16]}, another model by now"))
        else:
            tree.add(_lineage(label, found))
    return tree


def _made(manifest: Any) -> str:
    match manifest.made_by:
        case {"kind": "train", "settings": {"mixture": mixture}}:
            return f"{manifest.step} steps on {mixture}"
        case {"kind": "merge", "recipe": {"method": method}}:
            return f"merged by {method}"
        case {"kind": "convert", "from": source}:
            return f"converted from {source}"
        case {"kind": "statistics", "statistic": statistic, "examples": examples}:
            return f"{statistic} of {examples} examples"
    return f"made by {manifest.made_by.get('kind', 'hand')}"
