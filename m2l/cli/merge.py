"""`m2l merge`."""

import os
import time
from pathlib import Path
from typing import Any

import click

from m2l.cli.options import DIRECTORY, join, print_table, with_processes
from m2l.errors import ConfigError

_HYPER_PARAMETERS = (
    ("density", float, "Share of each task vector that is kept: ties, dare_ties, breadcrumbs."),
    ("scale", float, "lambda: what the merged task vector is multiplied by; below 0 it forgets."),
    ("drop_rate", float, "Share of each task vector that is dropped at random: dare, della."),
    ("epsilon", float, "della's drop rates go from drop_rate + epsilon to drop_rate - epsilon."),
    ("gamma", float, "Share of outliers that breadcrumbs leaves out."),
    ("t", float, "linear, slerp: from the first model (0) to the second (1)."),
    ("floor", float, "The least Fisher information that an entry counts with."),
    ("nondiagonal_scale", float, "What regmean multiplies Grams by off their diagonals."),
    ("scope", str, "What the largest entries are taken over: model (the papers') or tensor."),
    ("seed", int, "Of the methods that draw at random."),
    ("dtype", str, "Of the merged parameters: float32, bfloat16 or float16."),
    ("consensus", str, "Of entries that agree in sign: mean, sum or max."),
    ("zero_sign", str, "Where signs cancel: none, positive, majority or majority_or_none."),
    ("keep", str, "How density rounds: floor, at_least_one, one_more or complement."),
    ("rescale", str, "Of what is not dropped: expectation, norm or none."),
)


def _with_hyper_parameters(command: Any) -> Any:
    for name, kind, what in reversed(_HYPER_PARAMETERS):
        command = click.option(f"--{name}", type=kind, help=what)(command)
    return command


@click.command()
@click.option("--base", type=DIRECTORY, help="The model the experts were trained from.")
@click.option("--expert", "experts", type=DIRECTORY, multiple=True, help="Repeat for each.")
@click.option("--method", help="See --list.")
@_with_hyper_parameters
@click.option("--weights", help="One number an expert: 0.7,0.3.")
@click.option("--weighted_signs", is_flag=True, help="Weights count when signs are elected.")
@click.option(
    "--scale_of",
    multiple=True,
    help="PATTERN=SCALE, or PATTERN=WEIGHT,WEIGHT,...: for parameters whose name matches.",
)
@click.option("--exclude", multiple=True, help="Parameters taken from the base: a pattern.")
@click.option("--preset", help="How another codebase does it: official, mergekit, ...; see --list.")
@click.option("--recipe", type=DIRECTORY, help="A JSON file of settings; flags override it.")
@click.option(
    "--statistics", type=DIRECTORY, multiple=True, help="Of each expert: fisher, regmean need them."
)
@click.option("--subtree", help="Of pytrees that Orbax stored, the part to merge: params.")
@click.option("--to", help="orbax or huggingface; by default what the inputs are.")
@click.option("--vocabulary", help="The tokenizer, for an Orbax result of models that have none.")
@click.option("--memory", default=None, help="The most the process may hold.  [default: 1GiB]")
@with_processes
@click.option("--diagnostics/--no-diagnostics", default=True, help="Measure the task vectors.")
@click.option("--verify/--no-verify", default=True, help="Check the digests of the inputs.")
@click.option(
    "--allow_differences",
    help="FIELD,...: fields of config.json, or tokenizer, that may differ; the manifest says so.",
)
@click.option("--dry_run", is_flag=True, help="Say what it would take, and stop.")
@click.option("--bandwidth", help="Bytes a second for --dry_run's time, instead of measuring.")
@click.option("--out", type=DIRECTORY, help="What to make.")
@click.option("--list", "list_methods", is_flag=True, help="Show the methods and their settings.")
def merge(
    base: Path | None,
    experts: tuple[Path, ...],
    method: str | None,
    weights: str | None,
    weighted_signs: bool,
    scale_of: tuple[str, ...],
    preset: str | None,
    recipe: Path | None,
    out: Path | None,
    list_methods: bool,
    statistics: tuple[Path, ...],
    subtree: str | None,
    to: str | None,
    vocabulary: str | None,
    memory: str | None,
    distributed: bool,
    coordinator: str | None,
    process: str | None,
    diagnostics: bool,
    verify: bool,
    allow_differences: str | None,
    dry_run: bool,
    bandwidth: str | None,
    **settings: Any,
) -> None:
    """Merge experts' checkpoints into one.

    Models are m2l's checkpoints and training runs, any pytrees that Orbax stored, Hugging Face
    directories, T5X checkpoints.
    """
    if list_methods:
        _list()
        return
    from m2l import checkpoints, merging
    from m2l.merging import plan

    given = {name: value for name, value in settings.items() if value not in (None, ())}
    given |= {"weighted_signs": True} if weighted_signs else {}
    given |= {"weights": numbers("--weights", weights)} if weights else {}
    given |= {"scales": tuple(map(_scale_of, scale_of))} if scale_of else {}
    given |= {"method": method} if method else {}
    for flag, missing in (
        ("--method", not (method or recipe)),
        ("--expert", not experts),
        ("--out", not out),
    ):
        if missing:
            raise ConfigError(f"m2l merge: {flag} is missing")
    if preset:
        given = merging.preset(preset, given)
    # Elsewhere such short compilations are not worth keeping; here they are a tenth of a merge.
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    how = merging.Recipe.read(recipe, **given) if recipe else merging.Recipe(**given)
    if (distributed or coordinator or process) and not os.environ.get("JAX_PLATFORMS"):
        # Several processes of a host cannot share its accelerators, and reading is what costs.
        jax.config.update("jax_platforms", "cpu")
    join(distributed, coordinator, process, survive=True)
    options = {
        "statistics": statistics,
        "subtree": subtree,
        "to": to,
        "vocabulary": _described(vocabulary),
        "memory": plan.parse_bytes(memory) if memory else None,
        "diagnostics": diagnostics,
        "verify": verify,
        "allow_differences": allow_differences.split(",") if allow_differences else (),
    }
    if dry_run:
        job = merging.prepare(base, experts, how, out, **options)
        checkpoints.check_absent(job.out)
        _show_plan(job, plan.parse_bytes(bandwidth) if bandwidth else None)
        return
    start = time.monotonic()
    manifest = merging.merge(base, experts, how, out, **options)
    if manifest is None:
        click.echo(f"merged checkpoint: {out}, published by process 0")
        return
    # Not a table: what prints those would be imported at the end of every merge.
    for parent in manifest.parents:
        click.echo(f"{parent['role']:<10} {parent['digest'][:16]}  {parent['path']}")
    click.echo(
        f"merged checkpoint: {out}  digest {manifest.digest[:16]}  in "
        f"{time.monotonic() - start:.1f} s"
    )


def _list() -> None:
    from m2l import merging

    def settings(method: merging.Method) -> str:
        return ", ".join(
            name if default is None else f"{name}={default}"
            for name, default in method.hyper_parameters.items()
        )

    rows = [(m.name, settings(m), m.summary) for m in merging.METHODS.values()]
    print_table("merge methods", ["method", "settings", ""], rows)
    rows = [(name, ", ".join(methods)) for name, methods in merging.PRESETS.items()]
    print_table("presets", ["preset", "methods"], rows)


def _show_plan(job: Any, bandwidth: int | None) -> None:
    from m2l.merging import plan

    rows = job.plan.rows()
    source = "told"
    if bandwidth is None:
        bandwidth, source = plan.measure_bandwidth(job), "measured"
    seconds = job.plan.seconds(bandwidth)
    rows.append(("time", f"{seconds:,.1f} s at {plan.spell(bandwidth)}/s ({source})"))
    print_table(f"plan of {job.recipe.method}, nothing is done", ["what", "how much"], rows)


def _described(vocabulary: str | None) -> Any:
    if vocabulary is None:
        return None
    from m2l.data import tokenizer_files

    return tokenizer_files.describe(vocabulary)


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """The numbers between the commas of a flag's text."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: expected numbers with commas between") from error


def series(flag: str, text: str) -> list[float]:
    """The numbers of a flag's text, with commas between or as FIRST:LAST:STEP."""
    if ":" not in text:
        return list(numbers(flag, text))
    parts = numbers(flag, text.replace(":", ","))
    if len(parts) != 3 or parts[2] <= 0 or parts[1] < parts[0]:
        raise ConfigError(f"{flag} {text}: expected FIRST:LAST:STEP, such as 0.1:1:0.1")
    first, last, step = parts
    count = int((last - first) / step + 1e-9) + 1
    return [round(first + step * place, 10) for place in range(count)]


def _scale_of(text: str) -> tuple[str, float | tuple[float, ...]]:
    pattern, equals, value = text.rpartition("=")
    if not equals:
        raise ConfigError(f"--scale_of {text}: expected PATTERN=SCALE")
    found = numbers("--scale_of", value)
    return pattern, found if len(found) > 1 else found[0]
