"""`m2l verify`."""

from pathlib import Path

import click

from m2l.cli.options import DIRECTORY, MODEL
from m2l.errors import MergeError

_SHOWN = 5


@click.command()
@click.argument("merged", type=MODEL)
@click.option("--base", type=MODEL, help="By default where it was.")
@click.option("--expert", "experts", type=MODEL, multiple=True, help="All, or where they were.")
@click.option("--statistics", type=MODEL, multiple=True, help="All, or where they were.")
@click.option("--subtree", help="Of pytrees that Orbax stored; by default as recorded.")
@click.option("--recipe", type=DIRECTORY, help="JSON, where neither manifest nor card has it.")
@click.option("--only", multiple=True, help="Parameters to compare: a pattern. By default all.")
@click.option("--share", type=float, default=1.0, show_default=True, help="Of the blocks.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses these blocks.")
@click.option("--memory", help="The most that the process may hold: 2GiB.")
def verify(
    merged: Path,
    base: Path | None,
    experts: tuple[Path, ...],
    statistics: tuple[Path, ...],
    subtree: str | None,
    recipe: Path | None,
    only: tuple[str, ...],
    share: float,
    seed: int,
    memory: str | None,
) -> None:
    """Prove that MERGED is what its recipe makes of its inputs, bit for bit.

    The recipe is that of its manifest, or of its card. What differs is told by the first parameter
    and index, and the command exits with 2.
    """
    from m2l import merging
    from m2l.merging.job import parse_bytes

    result = merging.verify(
        merged,
        base,
        experts,
        statistics=statistics,
        subtree=subtree,
        recipe=merging.Recipe.read(recipe) if recipe else None,
        only=only,
        share=share,
        seed=seed,
        memory=parse_bytes(memory) if memory else None,
    )
    compared = f"{result.compared:,} of {result.size:,} elements"
    if result.differences:
        for difference in result.differences[1:_SHOWN]:
            click.echo(str(difference))
        raise MergeError(
            f"{merged}: {len(result.differences)} of {result.parameters} parameters differ, by "
            f"{compared}; the first is {result.differences[0]}"
        )
    click.echo(f"equal, bit for bit: {compared}, of {result.parameters} parameters")
