"""The `m2l` command: a thin function a subcommand, which imports its room when it is called."""

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from m2l import __version__
from m2l.errors import ConfigError, DataError, M2LError, Stopped

_DIRECTORY = click.Path(path_type=Path)


def _prepare() -> None:
    """Quiet libraries, and compiled functions kept between runs. For the command only."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import logging

    import jax
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "m2l" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row))
    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False).print(table)


def _jsonl(value: str | None) -> dict[str, Path]:
    """`train=FILE,validation=FILE` as a dict."""
    files = {}
    for part in value.split(",") if value else []:
        split, found, path = part.partition("=")
        if not found or not split or not path:
            raise ConfigError(f"--jsonl {value}: expected train=FILE,validation=FILE")
        files[split] = Path(path)
    return files


def _register(vocabulary: str, source: str, jsonl: dict[str, Path]) -> dict[str, Any]:
    """Fills seqio's registry; returns where the records come from, as plain values."""
    import hashlib

    from m2l import tasks

    tasks.register(vocabulary=vocabulary, source=source)
    if not jsonl:
        return {"source": source}
    tasks.register_jsonl(jsonl)
    digests = {split: hashlib.sha256(p.read_bytes()).hexdigest() for split, p in jsonl.items()}
    return {"source": "jsonl", **digests}


@click.group(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="m2l")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """m2l (merge to learn): train experts from one base, merge them, measure what it is worth.

    Settings: --gin_file FILE (repeated), then --gin.NAME=VALUE, then the subcommand's own flags;
    the later wins. A bare word as VALUE is a string.
    """


def _gin(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--gin_binding", "bindings", multiple=True, hidden=True)(command)
    return click.option("--gin_file", "gin_files", multiple=True, help="A gin file; repeatable.")(
        command
    )


@cli.command()
@click.option("--out", type=_DIRECTORY, default=Path("m2l_demo"), show_default=True)
@_gin
def demo(out: Path, gin_files: tuple[str, ...], bindings: tuple[str, ...]) -> None:
    """The embedded study, from nothing to the report page: about ten minutes on two cores."""
    _study(out, gin_files or ("experiments/demo.gin",), bindings, None, False, False)
    _report(out)


@cli.command()
@_gin
@click.option("--out", type=_DIRECTORY, required=True, help="The study's folder.")
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
    from m2l import configuration
    from m2l.studies import execute, scaling

    settings, resolved = configuration.load("ScalingStudy", gin_files, bindings)
    plan = scaling.plan(settings)
    plan = plan.needed_for(only) if only else plan
    if dry_run:
        rows = [(stage.name, stage.kind, execute.state(plan, out, stage.name)) for stage in plan]
        _print_table(f"{len(plan)} stages", ["stage", "kind", "state"], rows)
        return
    execute.claim(out, {"kind": "scaling", "settings": scaling.to_dict(settings)}, update=update)
    (out / "config.gin").write_text(resolved)
    from m2l.studies import stages

    ran = execute.execute(plan, out, stages.runners(settings.categories + settings.held_out))
    click.echo(f"{ran} of {len(plan)} stages run, {len(plan) - ran} were done before; in {out}")


@cli.command()
@click.argument("directory", type=_DIRECTORY)
def report(directory: Path) -> None:
    """Tables (csv, md, tex), figures (svg, pdf, png) and index.html of a study."""
    _report(directory)


def _report(directory: Path) -> None:
    from m2l.reporting import page, tables

    path = page.write(directory)
    frame = tables.performance(page.read_study(directory), directory)
    rows = [tuple(row) for row in frame.itertuples(index=False)]
    _print_table("normalised performance, by number of experts merged", list(frame.columns), rows)
    click.echo(f"report: {path}")


@cli.group()
def tasks() -> None:
    """What there is to train on and to evaluate by."""


@tasks.command("list")
@click.option("--mixture", help="Only the tasks of this mixture.")
def tasks_list(mixture: str | None) -> None:
    """Every task with its dataset, category, kind and metric."""
    from m2l import tasks as registry

    registry.register()
    names = registry.tasks_in(mixture) if mixture else registry.task_names()
    infos = [registry.info(name) for name in names]
    rows = [
        (i.name, i.category, "held-out" if i.held_out else "held-in", i.kind, i.metric)
        for i in infos
    ]
    _print_table(f"{len(rows)} tasks", ["task", "category", "", "kind", "metric"], rows)
    if not mixture:
        click.echo("mixtures: " + ", ".join(registry.mixtures()))


@tasks.command("show")
@click.argument("task")
@click.option("--n", default=3, show_default=True, help="How many examples.")
@click.option("--split", default="validation", show_default=True)
def tasks_show(task: str, n: int, split: str) -> None:
    """Examples of a task, as the model will see them."""
    from m2l import tasks as registry

    registry.register()
    click.echo(registry.render(task, n, split=split))


@cli.command()
@_gin
@click.option("--out", type=_DIRECTORY, required=True, help="The run's folder.")
@click.option("--init", type=_DIRECTORY, help="The checkpoint to start from.")
@click.option("--mixture", help="The task or mixture to train on.")
@click.option("--steps", type=int, help="Optimizer steps in all.")
@click.option("--jsonl", help="train=FILE[,validation=FILE]: your own data, as the task `jsonl`.")
@click.option("--vocabulary", help="microworld, bytes, or a SentencePiece model's path.")
def train(
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
    out: Path,
    init: Path | None,
    mixture: str | None,
    steps: int | None,
    jsonl: str | None,
    vocabulary: str | None,
) -> None:
    """Train a model, or go on where a stopped run left off."""
    from m2l import checkpoints, configuration, models

    files = _jsonl(jsonl)
    mixture = mixture or ("jsonl" if files else None)
    flags = [f"Train.mixture={mixture!r}"] if mixture else []
    flags += [f"Train.steps={steps}"] if steps is not None else []
    flags += [f"Run.vocabulary={vocabulary!r}"] if vocabulary else []
    run, resolved = configuration.load("Run", gin_files or ("runs/train.gin",), [*bindings, *flags])
    config, vocabulary_name = run.model, run.vocabulary
    if init is not None:
        manifest = checkpoints.read_manifest(checkpoints.resolve(init))
        config = config or models.from_dict(manifest.model)
        vocabulary_name = vocabulary or manifest.vocabulary["name"]
    if config is None:
        raise ConfigError(
            "m2l train: no model; name an --init checkpoint or a gin file with a MODEL"
        )

    from m2l.data import vocabularies
    from m2l.training import loop

    data = _register(vocabulary_name, run.source, files)
    described = vocabularies.describe(vocabularies.load(vocabulary_name), vocabulary_name)
    last = loop.train(
        out,
        config=config,
        vocabulary=described,
        settings=run.settings,
        data=data,
        init=init,
        resolved_config=resolved,
    )
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    rows = [(name, float(value)) for name, value in final.items() if name != "step"]
    _print_table(f"step {final['step']}", ["figure", "value"], rows)
    click.echo(f"checkpoint: {last}")


@cli.command()
@click.option("--base", type=_DIRECTORY, help="The checkpoint the experts were trained from.")
@click.option("--expert", "experts", type=_DIRECTORY, multiple=True, help="Repeat for each.")
@click.option("--method", help="average, task_arithmetic, ties, dare_ties; see --list.")
@click.option("--density", type=float, help="Share of each task vector that ties keeps.")
@click.option("--scale", type=float, help="lambda: what the merged task vector is multiplied by.")
@click.option("--drop_rate", type=float, help="Share of each task vector that dare drops.")
@click.option("--seed", type=int, help="Of the methods that draw at random.")
@click.option("--exclude", multiple=True, help="Parameters taken from the base: a pattern.")
@click.option("--dtype", help="Of the merged parameters: float32 or bfloat16.")
@click.option("--out", type=_DIRECTORY, help="The merged checkpoint.")
@click.option("--list", "list_methods", is_flag=True, help="Show the methods and their settings.")
def merge(
    base: Path | None,
    experts: tuple[Path, ...],
    method: str | None,
    out: Path | None,
    list_methods: bool,
    **settings: Any,
) -> None:
    """Merge experts' checkpoints into one."""
    from m2l import merging

    if list_methods:
        rows = [
            (m.name, ", ".join(m.hyper_parameters), m.summary) for m in merging.METHODS.values()
        ]
        _print_table("merge methods", ["method", "settings", ""], rows)
        return
    for flag, value in (("--method", method), ("--expert", experts), ("--out", out)):
        if not value:
            raise ConfigError(f"m2l merge: {flag} is missing")
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    recipe = merging.Recipe(method=method, **given)
    manifest = merging.merge(base, list(experts), recipe, out)
    rows = [(p["role"], p["path"], p["digest"][:16]) for p in manifest.parents]
    _print_table(f"{method} of {len(experts)} experts", ["role", "checkpoint", "digest"], rows)
    click.echo(f"merged checkpoint: {out}  digest {manifest.digest[:16]}")


@cli.command("eval")
@click.option("--checkpoint", type=_DIRECTORY, required=True, help="What to evaluate.")
@click.option("--mixture", help="The task or mixture to evaluate by.")
@click.option("--jsonl", help="validation=FILE: your own data, as the task `jsonl`.")
@click.option("--out", type=_DIRECTORY, required=True, help="One JSON result a task goes here.")
@click.option("--split", default="validation", show_default=True)
@click.option("--max_examples", type=click.IntRange(min=1), help="Examples of each task at most.")
@click.option("--batch_size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--input_length", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--target_length", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--source", default="microworld", show_default=True, help="Of the raw records.")
def evaluate(
    checkpoint: Path,
    mixture: str | None,
    jsonl: str | None,
    out: Path,
    split: str,
    max_examples: int | None,
    batch_size: int,
    input_length: int,
    target_length: int,
    source: str,
) -> None:
    """Evaluate a checkpoint: rank classification where there are answer choices, else decoding."""
    import jax

    from m2l import checkpoints, models

    files = _jsonl(jsonl)
    mixture = mixture or ("jsonl" if files else None)
    if mixture is None:
        raise ConfigError("m2l eval: name a --mixture, or your own data with --jsonl")
    directory = checkpoints.resolve(checkpoint)
    manifest = checkpoints.read_manifest(directory)

    from m2l import tasks as registry
    from m2l.data import vocabularies
    from m2l.evaluation import runner

    name = manifest.vocabulary["name"]
    vocabulary = vocabularies.load(name)
    if vocabularies.describe(vocabulary, name)["fingerprint"] != manifest.vocabulary["fingerprint"]:
        raise DataError(f"vocabulary {name!r} is not the one that {directory} was trained with")
    _register(name, source, files)
    infos = [registry.info(task) for task in registry.tasks_in(mixture)]
    scored = [info for info in infos if info.kind != "train"]
    if not scored:
        raise DataError(f"mixture {mixture!r} has no task that can be evaluated")
    loaded = runner.load_tasks(
        scored,
        split=split,
        lengths={"inputs": input_length, "targets": target_length},
        max_examples=max_examples,
    )
    results = runner.evaluate(
        models.from_dict(manifest.model),
        jax.device_put(checkpoints.restore(directory)),
        loaded,
        out,
        vocabulary=vocabulary,
        model_digest=manifest.digest,
        max_target_length=target_length,
        batch_size=batch_size,
    )
    rows = [(r.task, r.metric, r.score, r.count, r.ties, r.truncated) for r in results]
    columns = ["task", "metric", "score %", "examples", "ties", "truncated"]
    _print_table(f"{directory}", columns, rows)
    click.echo(f"results: {out}")


@cli.command()
@click.argument("checkpoint", type=_DIRECTORY)
@click.option("--verify", is_flag=True, help="Compute every digest anew.")
def inspect(checkpoint: Path, verify: bool) -> None:
    """What is in a checkpoint and where it came from."""
    import math

    from m2l import checkpoints

    directory = checkpoints.resolve(checkpoint)
    manifest = checkpoints.read_manifest(directory)
    rows = [
        (name, "x".join(map(str, p["shape"])), p["dtype"], p["digest"][:12])
        for name, p in manifest.parameters.items()
    ]
    _print_table(str(directory), ["parameter", "shape", "dtype", "digest"], rows)
    total = sum(math.prod(p["shape"]) for p in manifest.parameters.values())
    click.echo(f"parameters: {total:,}  digest {manifest.digest[:16]}  step {manifest.step}")
    click.echo(f"model: {json.dumps(manifest.model)}")
    click.echo(f"vocabulary: {json.dumps(manifest.vocabulary)}")
    click.echo(f"made by: {json.dumps(manifest.made_by)}")
    for parent in manifest.parents:
        click.echo(f"from: {parent['role']} {parent['path']}  digest {parent['digest'][:16]}")
    if verify:
        checkpoints.verify(directory)
        click.echo("every digest is right")


@cli.command()
def doctor() -> None:
    """Is this installation sound? Versions, devices, mixed installs, and the repair."""
    from m2l import doctor as examination

    findings = examination.report()
    click.echo(examination.render(findings))
    if not all(finding.ok for finding in findings):
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exit codes: 0 done (or stopped and saved), 2 bad input, 1 a bug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # T5X's way of setting gin: --gin.NAME=VALUE.
    expanded = []
    for argument in arguments:
        if argument.startswith("--gin."):
            expanded += ["--gin_binding", argument.removeprefix("--gin.")]
        else:
            expanded.append(argument)
    debug = "--debug" in expanded
    try:
        if expanded and not {"-h", "--help", "--version"} & set(expanded):
            _prepare()
        cli.main(expanded, prog_name="m2l", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _fail(error.format_message().replace("\n", " "))
    except click.Abort:
        sys.exit(130)
    except Stopped as stop:
        click.echo(f"m2l: {stop}", err=True)
    except M2LError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:
        if debug or error.errno != errno.ENOSPC:
            raise
        _fail(f"no space left on the disk of {error.filename}; free some, and run this again")


def _fail(message: str) -> None:
    click.echo(f"m2l: {message}", err=True)
    sys.exit(2)
