"""`m2l demo`, `m2l study`, `m2l report`."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l.cli.options import DIRECTORY, print_table, with_gin
from m2l.errors import ConfigError, M2LError

if TYPE_CHECKING:
    from m2l.studies.graph import Graph


@click.command()
@click.option("--out", type=DIRECTORY, default=Path("m2l_demo"), show_default=True)
@click.option("--full", is_flag=True, help="Both bases, more steps and examples: eleven minutes.")
@with_gin
def demo(out: Path, full: bool, gin_files: tuple[str, ...], bindings: tuple[str, ...]) -> None:
    """The embedded study, from nothing to the report page: four minutes on two cores."""
    if full and gin_files:
        raise ConfigError("m2l demo: --full is a gin file of m2l's; leave one of them out")
    names = gin_files or ("experiments/demo.gin" if full else "experiments/demo_short.gin",)
    plan = _planned(names, bindings, out, update=False)
    click.echo(f"m2l: {', '.join(names)}, to {out}", err=True)
    _run(plan, out)
    _report(out, None)


@click.command()
@with_gin
@click.option("--out", type=DIRECTORY, required=True, help="The study's folder.")
@click.option("--only", help="Do one stage, and what it is made from.")
@click.option("--dry_run", is_flag=True, help="Print stages, time and disk, and do nothing.")
@click.option("--update", is_flag=True, help="In a study of other settings, redo what they change.")
@click.option(
    "--executor",
    type=click.Choice(["local", "processes", "slurm"]),
    default="local",
    show_default=True,
    help="Who runs the stages: this process, several of this machine, a Slurm job for each.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Processes, or jobs at a time.",
)
@click.option(
    "--slurm",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of submitit's executor: slurm_partition=gpu, gpus_per_node=4, timeout_min=600; repeat.",
)
@click.option(
    "--peak",
    type=float,
    help="With --dry_run: operations a second of the devices it is for; else this machine's.",
)
def study(
    out: Path,
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
    only: str | None,
    dry_run: bool,
    update: bool,
    executor: str,
    workers: int,
    slurm: tuple[str, ...],
    peak: float | None,
) -> None:
    """Run a study: bases, experts, merges and evaluations; what is finished is not done again.

    Without --gin_file, the study in OUT goes on. Several at one OUT share the work.
    """
    if not gin_files and bindings:
        raise ConfigError("m2l study: --gin.NAME=VALUE needs a --gin_file to be applied to")
    if not gin_files and not (out / "study.json").exists():
        raise ConfigError("m2l study: --gin_file is missing; experiments/demo.gin is an example")
    plan = _planned(gin_files, bindings, out, update, claim=not dry_run)
    plan = plan.needed_for(only) if only else plan
    if dry_run:
        _print_plan(plan, out, peak)
    elif executor == "local":
        _run(plan, out)
    elif executor == "processes":
        from m2l.studies import cluster

        if only:
            raise ConfigError("--only is for one process: leave --executor out")
        cluster.by_processes(out, workers)
    else:
        from m2l.studies import cluster

        queued = cluster.by_slurm(plan, out, _slurm_settings(slurm), workers)
        click.echo(f"{len(queued)} jobs queued; their output is in {out / 'slurm'}")


def _planned(
    gin_files: Sequence[str], bindings: Sequence[str], out: Path, update: bool, claim: bool = True
) -> "Graph":
    """Returns the study's stages; with `claim`, writes its settings to its folder."""
    from m2l import configuration, files, storage
    from m2l.studies import study_results

    if not gin_files:
        return study_results.read_study(out).stage_graph()
    asked, resolved = configuration.load("Study", gin_files, bindings)
    settings = asked.of.resolved()
    settings.check_mixtures()
    plan = settings.stage_graph()
    if claim:
        content = study_results.describe(settings)
        advice = "redo what changes with m2l study --update"
        files.check_claim(out, "study.json", content, kind="study", update=update, advice=advice)
        files.claim(out, "study.json", content)
        storage.write_atomic(out / "config.gin", resolved)
    return plan


def _run(plan: "Graph", out: Path) -> None:
    from m2l.studies import graph
    from m2l.studies.run import RUNNERS, cost_seconds, stage_cost
    from m2l.training import resources

    peak = resources.peak_flops("float32")
    costs = {stage.name: stage_cost(stage, plan) for stage in plan} if peak else {}
    estimates = {name: cost_seconds(cost, peak) for name, cost in costs.items()}
    outcome = graph.execute(plan, out, RUNNERS, estimates)
    ran = len(outcome.ran)
    if outcome.failed:
        rows = [*outcome.failed.items(), *((name, "not run") for name in outcome.blocked)]
        print_table("stages that failed, and those that read them", ["stage", "why"], rows)
        message = f"{len(outcome.failed)} of {len(plan)} stages failed; {ran} others were run"
        if outcome.bugs:
            raise RuntimeError(f"{message}; tracebacks are in {out / 'stages'}")
        raise M2LError(f"{message}; the same command tries them again")
    click.echo(f"{ran} of {len(plan)} stages run, {len(plan) - ran} were done before; in {out}")


def _slurm_settings(bindings: Sequence[str]) -> dict[str, int | str]:
    settings: dict[str, int | str] = {}
    for binding in bindings:
        name, equals, value = binding.partition("=")
        if not equals:
            raise ConfigError(f"--slurm {binding}: expected NAME=VALUE")
        settings[name] = int(value) if value.isdigit() else value
    return settings


def _print_plan(plan: "Graph", out: Path, peak: float | None) -> None:
    from m2l.studies import graph
    from m2l.studies.run import NO_COST, UTILISATION, cost_seconds, stage_cost
    from m2l.training import resources

    states = {stage.name: graph.stage_state(plan, out, stage.name) for stage in plan}
    costs = {stage.name: stage_cost(stage, plan) for stage in plan}
    peak = peak or resources.peak_flops("float32") or 0.0
    if not peak:
        raise ConfigError("the devices of this machine are not known: say their --peak")
    width = shutil.get_terminal_size().columns
    columns = ("kind", "state", "time", "stage, and what it reads")
    rows = [
        (stage.kind, states[stage.name], _time(cost_seconds(costs[stage.name], peak)), stage.name)
        for stage in plan
    ]
    sizes = [max(len(row[place]) for row in (columns, *rows)) for place in range(3)]
    click.echo(f"{len(plan)} stages")
    reads = [_braced(list(stage.inputs.values())) for stage in plan]
    for (kind, state, time, name), read in zip((columns, *rows), ("", *reads), strict=True):
        start = f"{kind:<{sizes[0]}}  {state:<{sizes[1]}}  {time:>{sizes[2]}}"
        fits = len(start) + 2 + len(name) <= width
        lines = [f"{start}  {name}"] if fits else [start, *_folded(name, "    ", width)]
        click.echo("\n".join(lines + _folded(read, "    < ", width)))
    kinds = []
    for kind in dict.fromkeys(stage.kind for stage in plan):
        names = [stage.name for stage in plan if stage.kind == kind]
        done = sum(states[name] == "done" for name in names)
        cost = sum((costs[name] for name in names), NO_COST)
        time = _time(cost_seconds(cost, peak))
        kinds.append((kind, len(names), done, f"{cost.flops:.2g}", time, _bytes(cost.disk)))
    left = sum((costs[n] for n in states if states[n] != "done"), NO_COST)
    columns = ["kind", "stages", "done", "operations", "time", "disk"]
    print_table("in all", columns, kinds)
    text = (
        f"left to do: {left.flops:.2g} operations, {_time(cost_seconds(left, peak))} at "
        f"{UTILISATION:.0%} of {peak:.3g} a second; {_bytes(left.disk)} of disk. "
        "Small models reach less, and compiling comes on top."
    )
    click.echo("\n".join(_folded(text, "", width)))


def _braced(names: Sequence[str]) -> str:
    """Returns names with those in one folder together, as shells write them: a/{b,c}."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, slash, base = name.rpartition("/")
        folders.setdefault(folder + slash, []).append(base)
    return ", ".join(
        folder + (bases[0] if len(bases) == 1 else f"{{{','.join(bases)}}}")
        for folder, bases in folders.items()
    )


def _folded(text: str, indent: str, width: int) -> list[str]:
    """Returns a text in lines; a word longer than one is broken after one of its "/", "+", ","."""
    width = max(width - len(indent), 20)
    lines = [""] if text else []
    for word in text.split():
        parts = re.findall(r"[^/+,]+[/+,]?|[/+,]", word) if len(word) > width else [word]
        for place, part in enumerate(parts):
            space = " " if lines[-1] and not place else ""
            if lines[-1] and len(lines[-1]) + len(space) + len(part) > width:
                lines.append(part)
            else:
                lines[-1] += space + part
    return [(" " * len(indent) if place else indent) + line for place, line in enumerate(lines)]


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.option(
    "--publish", type=DIRECTORY, help="Write results, page, csv and svg there, for a repository."
)
@click.option("--fit", is_flag=True, help="Fit a scaling law over size and number of experts.")
def report(directory: Path, publish: Path | None, fit: bool) -> None:
    """Tables (csv, md, tex), figures (svg, pdf, png) and index.html of a study."""
    _report(directory, publish)
    if fit:
        _fit(publish or directory)


def _fit(directory: Path) -> None:
    from m2l.reporting import tables
    from m2l.studies import normalized_performance, scaling_law, study_results
    from m2l.studies.merging_at_scale import ScalingStudy

    results = study_results.load(directory)
    if not isinstance(results.study, ScalingStudy):
        raise ConfigError("m2l report --fit: only a study over numbers of experts has the law")
    replicates = normalized_performance.Replicates(normalized_performance.grid(results))
    parameters = {size: results.parameters(size) for size in results.study.models}
    frame = scaling_law.fit(replicates, parameters)
    tables.write(frame, directory / "report" / "tables", "scaling_law")
    columns = ["base", "method", "size", "loss", "error", *scaling_law.COLUMNS]
    columns += ["worth_low", "worth_high"]
    rows = [tuple(row) for row in tables.named(frame)[columns].itertuples(index=False)]
    print_table("L = L + B N^-beta + A0 N^-gamma / (k + b)", columns, rows)
    click.echo(
        "worth: the experts up to which each saves half a point of the loss, with its 95 % "
        f"interval; every term's is in {directory / 'report' / 'tables' / 'scaling_law.csv'}"
    )


def _report(directory: Path, publish: Path | None) -> None:
    from m2l.reporting import page
    from m2l.studies import study_results

    if publish:
        study_results.publish(study_results.load(directory), publish)
        directory = publish
    report = page.collect(directory)
    path = page.write(directory, report, publish=publish is not None)
    title, frame = report.summary
    rows = [tuple(row) for row in frame.itertuples(index=False)]
    print_table(title, list(frame.columns), rows)
    click.echo(f"report: {path}")
