"""`m2l compress`."""

from pathlib import Path

import click

from m2l.cli.options import DIRECTORY, MODEL, print_table

METHODS = ("lossless", "compeft", "emr")


@click.command()
@click.argument("expert", type=MODEL, nargs=-1, required=True)
@click.option("--base", type=MODEL, required=True, help="What the experts were trained from.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="lossless",
    show_default=True,
    help="To the bit, by signs of the largest entries, or by masks of one task vector.",
)
@click.option(
    "--density", type=float, default=0.2, show_default=True, help="Of compeft: the share of signs."
)
@click.option(
    "--alpha", type=float, default=1.0, show_default=True, help="Of compeft: standard deviations."
)
@click.option(
    "--dtype", default="float32", show_default=True, help="Of emr: of the shared task vector."
)
@click.option("--out", type=DIRECTORY, required=True, help="What to make.")
def compress(
    expert: tuple[Path, ...],
    base: Path,
    method: str,
    density: float,
    alpha: float,
    dtype: str,
    out: Path,
) -> None:
    """Store EXPERT as what differs from its base; of emr, several experts.

    BASE+OUT then names the expert wherever a checkpoint is named, of emr BASE+OUT/NAME; m2l convert
    BASE+OUT DIR restores it.
    """
    from m2l import merging

    options = {"method": method, "density": density, "alpha": alpha, "dtype": dtype}
    deltas = merging.compress(expert, base, out, **options)
    rows = [
        (
            str(delta.path),
            f"{delta.nbytes['expert']:,}",
            f"{delta.nbytes['delta']:,}",
            f"{delta.ratio:.4g}",
            "none" if delta.is_lossless else f"{delta.error:.3g}",
        )
        for delta in deltas
    ]
    print_table(method, ["delta", "bytes of the expert", "bytes", "ratio", "relative error"], rows)
    if shared := deltas[0].nbytes["shared"]:
        total = sum(delta.nbytes["expert"] for delta in deltas)
        stored = shared + sum(delta.nbytes["delta"] for delta in deltas)
        click.echo(f"shared task vector: {shared:,} bytes; ratio of all {total / stored:.4g}")
