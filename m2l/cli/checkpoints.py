"""`m2l convert`, `m2l push`, `m2l inspect`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l import storage
from m2l.cli import diagnostics, prediction
from m2l.cli.merge import METHOD
from m2l.cli.options import (
    DIRECTORY,
    MODEL,
    print_json,
    print_table,
    with_gin,
    with_json,
    with_mesh,
)
from m2l.errors import CheckpointError, ConfigError
from m2l.typing import JsonObject

if TYPE_CHECKING:
    from rich.tree import Tree

    from m2l import models
    from m2l.checkpoints import opening
    from m2l.checkpoints.adapters import Adapter
    from m2l.checkpoints.deltas import Delta
    from m2l.checkpoints.manifest import Manifest

SHARD_GB = 5.0
FORMATS = ("huggingface", "t5x", "orbax", "gguf")


@click.command()
@click.argument("source", type=MODEL)
@click.argument("out", type=DIRECTORY)
@click.option("--from", "kind", type=click.Choice(FORMATS), help="By default what SOURCE is.")
@click.option(
    "--to", "output_kind", type=click.Choice(FORMATS[:3]), help="By default orbax, or huggingface."
)
@click.option("--dtype", help="float32, bfloat16 or float16; by default the source's.")
@click.option("--vocabulary", help="Where the tokenizer is, if SOURCE has none.")
@click.option(
    "--shard_size", type=float, default=SHARD_GB, show_default=True, help="GB, of an export."
)
@click.option("--results", type=DIRECTORY, help="A folder of m2l eval, for an export's README.md.")
@with_gin
def convert(
    source: Path,
    out: Path,
    kind: str | None,
    output_kind: str | None,
    dtype: str | None,
    vocabulary: str | None,
    shard_size: float,
    results: Path | None,
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
) -> None:
    """Make a checkpoint of a Hugging Face or T5X one, or one of these of a checkpoint.

    Of BASE+ADAPTER it makes one model, by default of the base's format and dtype, and of BASE+DELTA
    the expert, to the bit if nothing was lost; of a GGUF file a Hugging Face directory, in float32
    unless --dtype says otherwise.
    The settings of a T5X model are read off its shapes; --gin_file models/NAME.gin overrides them.
    """
    from m2l import checkpoints
    from m2l.checkpoints import (
        adapters,
        gguf_files,
        huggingface,
        huggingface_directory,
        opening,
        t5x,
    )

    is_adapted = adapters.split(source) is not None
    is_gguf = kind == "gguf" or (kind is None and source.suffix == gguf_files.SUFFIX)
    idle = {
        "--from": is_adapted and kind,
        "--vocabulary": is_gguf and vocabulary,
        "--results": (is_adapted or is_gguf) and results,
        "--shard_size": (is_adapted or is_gguf) and shard_size != SHARD_GB,
        "gin settings": (is_adapted or is_gguf) and (gin_files or bindings),
    }
    if flags := [flag for flag, value in idle.items() if value]:
        raise ConfigError(f"m2l convert: {', '.join(flags)}: without effect for {source}")
    if is_adapted:
        _convert_adapted(source, out, output_kind, dtype, vocabulary)
        return
    if is_gguf:
        if output_kind not in (None, "huggingface"):
            raise ConfigError("m2l convert: of a GGUF file a Hugging Face directory is made")
        manifest = gguf_files.to_huggingface(source, out, dtype=dtype or "float32")
        types = ", ".join(f"{n} {name}" for name, n in manifest.made_by["types"].items())
        click.echo(f"Hugging Face directory: {out}  tensors {types}, in {manifest.dtype} now")
        return
    kind = kind or opening.kind(source)
    output_kind = output_kind or ("huggingface" if kind == "orbax" else "orbax")
    if (kind == "orbax") == (output_kind == "orbax"):
        raise ConfigError(
            f"m2l convert: from {kind} to {output_kind}: one of the two must be orbax, which is "
            "m2l's own"
        )
    if output_kind == "t5x":
        click.echo(f"T5X checkpoint: {t5x.export_checkpoint(source, out, dtype=dtype)}")
        return
    if kind == "orbax":
        huggingface.export_checkpoint(
            source,
            out,
            dtype=dtype,
            shard_size=int(shard_size * 1e9),
            results=sorted(results.glob("*.json")) if results else [],
        )
        click.echo(f"Hugging Face directory: {out}")
        if not huggingface_directory.has_tokenizer(out):
            name = checkpoints.read_manifest(source).vocabulary.get("name")
            click.echo(
                f"without a tokenizer: the checkpoint has no files of its vocabulary {name!r}"
            )
        return

    from m2l.data import tokenizer_files

    config = _model(gin_files, bindings) if gin_files or bindings else None
    if kind == "t5x" and vocabulary is None:
        raise ConfigError(
            "m2l convert: a T5X checkpoint does not hold its vocabulary; name it with --vocabulary"
        )
    described = tokenizer_files.describe(vocabulary or str(source))
    import_checkpoint = {"huggingface": huggingface, "t5x": t5x}[kind].import_checkpoint
    manifest = import_checkpoint(source, out, vocabulary=described, dtype=dtype, config=config)
    click.echo(f"checkpoint: {out}  digest {manifest.digest[:16]}")


def _convert_adapted(
    source: Path, out: Path, output_kind: str | None, dtype: str | None, vocabulary: str | None
) -> None:
    """Makes one model of BASE+ADAPTER: the merge of one, by blocks."""
    from m2l import merging
    from m2l.checkpoints import opening, tensor_kinds
    from m2l.data import tokenizer_files

    adapted = opening.open(source, native=True, named=False)
    base, _ = adapted.adapted
    if adapted.delta is not None and adapted.delta.is_lossless and not (dtype or vocabulary):
        own = {True: "huggingface", False: "orbax"}[adapted.native]
        if output_kind in (None, own):
            manifest = merging.restore(source, out)
            click.echo(f"checkpoint: {out}  digest {manifest.digest[:16]}  restored to the bit")
            return
    if dtype is None:
        stored = [
            tensor.dtype
            for name, tensor in base.parameters.items()
            if tensor_kinds.is_float(tensor.dtype) and not tensor_kinds.is_buffer(name, tensor)
        ]
        dtype = max(stored, key=lambda each: each.itemsize).name
    described = None if vocabulary is None else tokenizer_files.describe(vocabulary)
    recipe = merging.Recipe("average", dtype=dtype)
    options = {"output_format": output_kind, "vocabulary": described}
    manifest = merging.merge(None, [source], recipe, out, **options)
    click.echo(f"checkpoint: {out}  digest {manifest.digest[:16]}  of {dtype}")


def _model(gin_files: tuple[str, ...], bindings: tuple[str, ...]) -> "models.Config":
    from m2l import configuration

    # Of a run's settings only the model matters.
    bindings = (*bindings, "Train.mixture='none'", "Train.steps=1")
    run, _ = configuration.load("Run", ("runs/train.gin", *gin_files), bindings)
    if run.model is None:
        raise ConfigError("m2l convert: the gin files have no model; see those in models/")
    return run.model


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.argument("name")
@click.option("--private", is_flag=True, help="A new repository is private.")
def push(directory: Path, name: str, private: bool) -> None:
    """Upload a Hugging Face directory, with its card, to the Hugging Face Hub as owner/name."""
    from m2l import hub_models

    click.echo(f"pushed: {hub_models.push(directory, name, private=private)}")


@click.command()
@click.argument("checkpoint", type=MODEL, required=False)
@click.option("--verify", is_flag=True, help="Compute every digest anew.")
@click.option("--subtree", help="Of a pytree that Orbax stored, the part to show: params.")
@with_mesh
@with_json
@click.option("--cosines", type=DIRECTORY, help="Draw a merge's task vectors: a .png, .svg, .pdf.")
@click.option(
    "--predict",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Predict what a merge keeps of its experts' performance: of CHECKPOINT, a merge, or of "
    "--base and --expert. FILE: of scripts/fit_retention.py, in place of m2l's own.",
)
@click.option("--base", type=MODEL, help="With --predict: the experts' base.")
@click.option("--expert", "experts", type=MODEL, multiple=True, help="... repeat for each.")
@click.option("--method", type=METHOD, help="... this one alone.  [default: those of the studies]")
@click.option("--scale", type=float, help="... by this.  [default: as the studies chose it]")
@click.option("--recipe", type=DIRECTORY, help="... a JSON file of settings.")
def inspect(
    checkpoint: Path | None,
    verify: bool,
    subtree: str | None,
    fsdp: int,
    model: int,
    as_json: bool,
    cosines: Path | None,
    predict: str | None,
    base: Path | None,
    experts: tuple[Path, ...],
    method: str | None,
    scale: float | None,
    recipe: Path | None,
) -> None:
    """What is in a checkpoint and where it came from: its parameters come last."""
    settings = {"method": method, "scale": scale}
    if predict is not None:
        options = {"subtree": subtree, "as_json": as_json}
        prediction.show(predict, checkpoint, base, experts, recipe, settings, **options)
        return
    named = {"--base": base, "--expert": experts or None, "--recipe": recipe, "--method": method}
    named["--scale"] = scale
    if flags := [flag for flag, value in named.items() if value is not None]:
        raise ConfigError(f"m2l inspect: {', '.join(flags)}: without effect without --predict")
    if checkpoint is None:
        raise ConfigError("m2l inspect: CHECKPOINT is missing")
    from jax import numpy as jnp
    from jax.sharding import AbstractMesh
    from rich.console import Console

    from m2l import checkpoints, models, partitioning
    from m2l.checkpoints import adapters, deltas, huggingface_directory, opening, tensor_kinds

    exported = (checkpoint / huggingface_directory.MANIFEST).is_file()
    if (checkpoint / tensor_kinds.ADAPTER_CONFIG).is_file() and not (
        checkpoint / huggingface_directory.CONFIG
    ).is_file():
        _show_adapter(adapters.read(checkpoint), as_json)
        return
    if deltas.is_delta(checkpoint):
        _show_delta(deltas.read(checkpoint), as_json)
        return
    if subtree is not None or not (exported or opening.has_manifest(checkpoint)):
        opened = opening.open(checkpoint, subtree=subtree, native=True, named=False)
        if verify and opened.delta is not None:
            for tensor in opened.parameters.values():
                tensor.read_checked()
        _show_foreign(opened, as_json)
        if verify and opened.delta is not None and not as_json:
            click.echo("every digest is right")
        return
    directory = checkpoint if exported else checkpoints.resolve(checkpoint)
    module = huggingface_directory if exported else checkpoints
    manifest = module.read_manifest(directory)
    if as_json:
        if verify:
            module.verify(directory)
        print_json({"path": str(directory), **manifest.to_json(), "verified": verify})
        return
    sizes = [(math.prod(p["shape"]), p["dtype"]) for p in manifest.parameters.values()]
    size = sum(count * jnp.dtype(dtype).itemsize for count, dtype in sizes)
    click.echo(str(directory))
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
    rows = [
        (name, "x".join(map(str, p["shape"])), p["dtype"], p["digest"][:12])
        for name, p in manifest.parameters.items()
    ]
    print_table("parameters", ["parameter", "shape", "dtype", "digest"], rows)
    if fsdp * model > 1:
        mesh = AbstractMesh((1, fsdp, model), partitioning.MESH_AXES)
        placed = partitioning.table(models.spec(models.from_dict(manifest.model)), mesh)
        rows = [(row.name, str(tuple(row.spec)), row.mib_per_device) for row in placed]
        print_table(f"fsdp {fsdp}, model {model}", ["parameter", "axes", "MiB/device"], rows)
        click.echo(f"MiB per device: {sum(row.mib_per_device for row in placed):.1f}")
    if verify:
        module.verify(directory)
        click.echo("every digest is right")


def _show_foreign(checkpoint: "opening.Checkpoint", as_json: bool) -> None:
    """Prints what is in a checkpoint without a manifest."""
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": tensor.dtype.name}
        for name, tensor in checkpoint.parameters.items()
    }
    if as_json:
        content = {"path": str(checkpoint.path), "format": checkpoint.format}
        print_json({**content, "parameters": tensors})
        return
    size = sum(t.size * t.dtype.itemsize for t in checkpoint.parameters.values())
    count = sum(t.size for t in checkpoint.parameters.values())
    click.echo(str(checkpoint.path))
    click.echo(f"parameters: {count:,}  {size / 2**20:,.1f} MiB  {checkpoint.format}")
    if checkpoint.adapted is not None:
        base, part = checkpoint.adapted
        kind = "adapter" if checkpoint.delta is None else "delta"
        click.echo(f"base: {base.path}  digest {base.digest[:16]}")
        click.echo(f"{kind}: {part.path}  digest {part.digest[:16]}  {part.describe()}")
    else:
        click.echo("without a manifest of m2l's: nothing tells where it came from, or its digests")
    print_table("parameters", ["parameter", "shape", "dtype"], _shapes(tensors))


def _show_adapter(adapter: "Adapter", as_json: bool) -> None:
    """Prints what is in an adapter's directory."""
    replaced = {
        name: {"shape": list(tensor.shape), "dtype": tensor.dtype.name}
        for name, tensor in adapter.replaced.items()
    }
    factors = {
        each.module: {"shape": list(each.shape), "rank": each.rank, "scale": float(each.scale)}
        | {"dtype": each.up.dtype.name}
        for each in adapter.factors.values()
    }
    if as_json:
        content = {"path": str(adapter.path), "digest": adapter.digest}
        print_json({**content, "factors": factors, "stored_whole": replaced})
        return
    click.echo(f"{adapter.path}\nadapter: {adapter.describe()}  digest {adapter.digest[:16]}")
    columns = ["module", "shape", "rank", "scale", "dtype"]
    print_table("matrices", columns, _shapes(factors))
    if replaced:
        print_table("stored whole", ["tensor", "shape", "dtype"], _shapes(replaced))


def _show_delta(delta: "Delta", as_json: bool) -> None:
    """Prints what is in a delta's directory."""
    if as_json:
        print_json({"path": str(delta.path), "digest": delta.digest, **delta.to_json()})
        return
    click.echo(f"{delta.path}\ndelta: {delta.describe()}  digest {delta.digest[:16]}")
    click.echo(f"expert: {delta.expert['path']}  digest {delta.expert['digest'][:16]}")
    click.echo(f"base: {delta.base['path']}  digest {delta.base['digest'][:16]}")
    rows = [
        (name, "x".join(map(str, record["shape"])), record["dtype"], *_kind_of(delta, name))
        for name, record in delta.tensors.items()
    ]
    print_table("parameters", ["parameter", "shape", "dtype", "stored as"], rows)


def _kind_of(delta: "Delta", name: str) -> tuple[str]:
    original = delta.copies.get(name)
    return (delta.kinds[name] if original is None else f"a copy of {original}",)


def _shapes(tensors: Mapping[str, JsonObject]) -> list[tuple[object, ...]]:
    """Returns rows of names and figures, shapes as 3x4."""
    return [
        (name, "x".join(map(str, figures["shape"])), *list(figures.values())[1:])
        for name, figures in tensors.items()
    ]


def _lineage(title: str, manifest: "Manifest") -> "Tree":
    """Returns the tree of a checkpoint's parents, as far as they are still there."""
    from rich.markup import escape
    from rich.tree import Tree

    from m2l import checkpoints

    tree = Tree(escape(f"{title}  {manifest.origin()}, digest {manifest.digest[:16]}"))
    for parent in manifest.parents:
        label = f"{parent['role']} {parent['path']}"
        try:
            ancestor = checkpoints.read_manifest(parent["path"])
        except CheckpointError:
            exists = storage.path(parent["path"]).exists()
            problem = "no checkpoint of m2l" if exists else "not there any more"
        else:
            problem = "another model by now" if ancestor.digest != parent["digest"] else None
        if problem is None:
            tree.add(_lineage(label, ancestor))
        else:
            tree.add(escape(f"{label}  digest {parent['digest'][:16]}, {problem}"))
    return tree
