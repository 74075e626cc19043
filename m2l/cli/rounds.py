"""`m2l rounds`."""

from pathlib import Path
from statistics import fmean

import click

from m2l.cli.options import DIRECTORY, print_table, with_gin


@click.command()
@with_gin
@click.option("--init", type=DIRECTORY, required=True, help="The checkpoint to start from.")
@click.option("--out", type=DIRECTORY, required=True, help="The job's folder.")
def rounds(gin_files: tuple[str, ...], bindings: tuple[str, ...], init: Path, out: Path) -> None:
    """Train experts that are merged every so many steps and go on from the merge.

    Settings are gin's: --gin_file experiments/rounds.gin is an example, docs/training.md has them.
    Started again, the job goes on; several at one OUT share its work.
    """
    from m2l import configuration, storage

    settings, resolved = configuration.load("Rounds", gin_files, bindings)

    from m2l.studies import rounds as job

    result = job.run(settings, init, out)
    storage.write_atomic(out / "config.gin", resolved)
    if settings.train.validation:
        rows = [
            (name, settings.experts[name], result.rounds[name], losses[0], min(losses), losses[-1])
            for name, losses in result.losses.items()
        ]
        columns = ["expert", "mixture", "rounds", "first loss", "lowest", "last"]
        print_table("validation of the merged model", columns, rows)
        means = [fmean(losses) for losses in zip(*result.losses.values(), strict=True)]
        best = means.index(min(means))
        click.echo(f"lowest mean loss: {means[best]:.4f}, of round {best + 1} of {len(means)}")
    click.echo(f"checkpoint: {result.model}")
