"""`m2l extract`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l.cli.options import COUNT, DIRECTORY, MODEL, print_table

if TYPE_CHECKING:
    from m2l.checkpoints import Manifest


@click.command()
@click.argument("model", type=MODEL)
@click.option("--base", type=MODEL, required=True, help="What the adapter is to be put on.")
@click.option("--rank", type=COUNT, help="Of the factors of every matrix.")
@click.option("--error", type=float, help="Instead: the share of a difference that may be missed.")
@click.option("--exclude", multiple=True, help="Tensors that stay the base's: a pattern.")
@click.option("--dtype", default="float32", show_default=True, help="Of the factors.")
@click.option("--out", type=DIRECTORY, required=True, help="What to make.")
def extract(
    model: Path,
    base: Path,
    rank: int | None,
    error: float | None,
    exclude: tuple[str, ...],
    dtype: str,
    out: Path,
) -> None:
    """Make an adapter of low rank of what differs between MODEL and its base.

    It is in PEFT's format; BASE+OUT names the model that both make.
    """
    from m2l import merging

    options = {"rank": rank, "error": error, "exclude": exclude, "dtype": dtype}
    show_adapter(merging.extract(model, base, out, **options), out)


def show_adapter(manifest: "Manifest", out: Path) -> None:
    """Prints the rank and the error of each matrix of an adapter that was made."""
    made_by = manifest.made_by
    rows = [
        (name, matrix["rank"], f"{matrix['error']:.2e}")
        for name, matrix in made_by["matrices"].items()
    ]
    print_table(str(out), ["matrix", "rank", "relative error"], rows)
    if made_by["stored_whole"]:
        click.echo(f"stored whole: {', '.join(made_by['stored_whole'])}")
    click.echo(
        f"adapter: {out}  digest {manifest.digest[:16]}  relative error of all matrices "
        f"{made_by['total_error']:.2e}"
    )
