"""`m2l demo`, `m2l study`, `m2l report`."""

from collections.abc import Sequence
from pathlib import Path

import click

from m2l.cli.options import DIRECTORY, print_table, with_gin
from m2l.errors import ConfigError


@click.command()
@click.option("--out", type=DIRECTORY, default=Path("m2l_demo"), show_default=True)
@with_gin
def demo(out: Path, gin_files: tuple[str, ...], bindings: tuple[str, ...]) -> None:
    """The embedded study, from nothing to the report page: about ten minutes on two cores."""
    _study(out, gin_files or ("experiments/demo.gin",), bindings, None, False, False)
    _report(out)


@click.command()
@with_gin
@click.option("--out", type=DIRECTORY, required=True, help="The study's folder.")
@click.option("--only", help="Do one stage, and what it is made from.")
@click.option("--dry_run", is_flag=True, help="Print the stages and do nothing.")
@click.option("--update", is_flag=True, help="In a study of other settings, redo what they change.")
def study(
    out: Path,
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
    only: str | None,
    dry_run: bool,
    update: bool,
) -> None:
    """Run a study: bases, experts, merges and evaluations; what is finished is not done again."""
    if not gin_files:
        raise ConfigError("m2l study: --gin_file is missing; experiments/demo.gin is an example")
    _study(out, gin_files, bindings, only, dry_run, update)


def _study(
    out: Path,
    gin_files: Sequence[str],
    bindings: Sequence[str],
    only: str | None,
    dry_run: bool,
    update: bool,
) -> None:
    from m2l import configuration, files
    from m2l.studies import execute, scaling

    settings, resolved = configuration.load("ScalingStudy", gin_files, bindings)
    scaling.check_mixtures(settings)
    plan = scaling.plan(settings)
    plan = plan.needed_for(only) if only else plan
    if dry_run:
        rows = [(stage.name, stage.kind, execute.state(plan, out, stage.name)) for stage in plan]
        print_table(f"{len(plan)} stages", ["stage", "kind", "state"], rows)
        return
    content = {"kind": "scaling", **scaling.to_dict(settings)}
    mend = "redo what changes with m2l study --update"
    files.check_claim(out, "study.json", content, what="study", update=update, mend=mend)
    files.claim(out, "study.json", content)
    files.write(out / "config.gin", resolved)
    from m2l.studies import stages

    ran = execute.execute(plan, out, stages.runners(settings.categories + settings.held_out))
    click.echo(f"{ran} of {len(plan)} stages run, {len(plan) - ran} were done before; in {out}")


@click.command()
@click.argument("directory", type=DIRECTORY)
def report(directory: Path) -> None:
    """Tables (csv, md, tex), figures (svg, pdf, png) and index.html of a study."""
    _report(directory)


def _report(directory: Path) -> None:
    from m2l.reporting import page, tables

    path = page.write(directory)
    frame = tables.performance(tables.cells(page.read_study(directory), directory))
    rows = [tuple(row) for row in frame.itertuples(index=False)]
    print_table("normalised performance, by number of experts merged", list(frame.columns), rows)
    click.echo(f"report: {path}")
