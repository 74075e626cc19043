"""`m2l merge`."""

import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2l.cli.options import DIRECTORY, join, print_table, with_processes
from m2l.errors import ConfigError
from m2l.typing import Json, JsonObject

if TYPE_CHECKING:
    from m2l.merging import MergeJob


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Returns the numbers of a flag's text."""
        flag = param.opts[0] if param else "numbers"
        return numbers(flag, value) if isinstance(value, str) else value


class Series(Numbers):
    """Numbers with commas between them, or FIRST:LAST:STEP."""

    name = "series"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Returns the numbers of a flag's text."""
        flag = param.opts[0] if param else "series"
        return tuple(series(flag, value)) if isinstance(value, str) else value


class RecipeCommand(click.Command):
    """A command with the flags of recipes, behind --method.

    Which there are follows from the methods' signatures, and is looked up when the command is run:
    until then nothing is imported.

    Args:
        swept: Whether the flags are hyper-parameters alone, each with several values.
    """

    def __init__(self, *arguments: Any, swept: bool = False, **options: Any):
        super().__init__(*arguments, **options)
        self._swept = swept

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Returns the command's own flags and those of recipes.

        Raises:
            ConfigError: A hyper-parameter has the name of another flag.
        """
        from m2l.merging import method_registry

        own = super().get_params(ctx)
        recipe_flags = _recipe_flags(tuple(method_registry.METHODS), self._swept)
        place = 1 + [each.name for each in own].index("method")
        for flag in recipe_flags:
            if flag.name in {each.name for each in own}:
                raise ConfigError(
                    f"hyper-parameter {flag.name}: m2l {self.name} has another flag of this name; "
                    "rename it"
                )
        return [*own[:place], *recipe_flags, *own[place:]]


@functools.lru_cache(4)
def _recipe_flags(methods: tuple[str, ...], swept: bool) -> list[click.Option]:
    """Returns the flags of hyper-parameters: the same objects while there are these methods."""
    from m2l.merging import method_registry

    flags = []
    for name, by_method in method_registry.hyper_parameters().items():
        first = next(iter(by_method.values()))
        kind: click.ParamType | type = Numbers() if first.per_expert else float
        text = f"{first.description.rstrip('.')}: {', '.join(by_method)}."
        if swept:
            kind, text = Series(), f"Values, 0.1,0.2 or FIRST:LAST:STEP. {text}"
        if not (swept and first.per_expert):
            flags.append(click.Option([f"--{name}"], type=kind, help=text))
    for name, variant in () if swept else method_registry.VARIANTS.items():
        text = f"{variant.description} One of {', '.join(variant.choices)}."
        flags.append(click.Option([f"--{name}"], help=text))
    return flags


@click.command(cls=RecipeCommand)
@click.option("--base", type=DIRECTORY, help="The model the experts were trained from.")
@click.option("--expert", "experts", type=DIRECTORY, multiple=True, help="Repeat for each.")
@click.option("--method", help="See --list.")
@click.option("--seed", type=int, help="Of the methods that draw at random.")
@click.option("--dtype", help="Of the merged parameters: float32, bfloat16 or float16.")
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
@click.option("--to", "output_format", help="orbax or huggingface; by default what the inputs are.")
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
    weighted_signs: bool,
    scale_of: tuple[str, ...],
    preset: str | None,
    recipe: Path | None,
    out: Path | None,
    list_methods: bool,
    statistics: tuple[Path, ...],
    subtree: str | None,
    output_format: str | None,
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
    **settings: Json,
) -> None:
    """Merge experts' checkpoints into one.

    Models are m2l's checkpoints and training runs, any pytrees that Orbax stored, Hugging Face
    directories, T5X checkpoints.
    """
    if list_methods:
        _list()
        return
    from m2l import checkpoints, merging
    from m2l.merging.job import parse_bytes

    settings = {name: value for name, value in settings.items() if value not in (None, ())}
    settings |= {"weighted_signs": True} if weighted_signs else {}
    settings |= {"scales": tuple(map(_scale_of, scale_of))} if scale_of else {}
    settings |= {"method": method} if method else {}
    for flag, missing in (
        ("--method", not (method or recipe)),
        ("--expert", not experts),
        ("--out", not out),
    ):
        if missing:
            raise ConfigError(f"m2l merge: {flag} is missing")
    if preset:
        settings = merging.preset(preset, settings)
    # Elsewhere such short compilations are not worth keeping; here they are a tenth of a merge.
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    read = functools.partial(merging.Recipe.read, recipe) if recipe else merging.Recipe
    merge_recipe = read(**settings)
    if (distributed or coordinator or process) and not os.environ.get("JAX_PLATFORMS"):
        # Several processes of a host cannot share its accelerators, and reading is what costs.
        jax.config.update("jax_platforms", "cpu")
    join(distributed, coordinator, process, survive=True)
    options = {
        "statistics": statistics,
        "subtree": subtree,
        "output_format": output_format,
        "vocabulary": _described(vocabulary),
        "memory": parse_bytes(memory) if memory else None,
        "diagnostics": diagnostics,
        "verify": verify,
        "allow_differences": allow_differences.split(",") if allow_differences else (),
    }
    if dry_run:
        job = merging.prepare(base, experts, merge_recipe, out, **options)
        checkpoints.check_absent(job.out)
        _show_plan(job, parse_bytes(bandwidth) if bandwidth else None)
        return
    start = time.monotonic()
    manifest = merging.merge(base, experts, merge_recipe, out, **options)
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

    rows = [
        (method.name, ", ".join(map(str, method.hyper_parameters.values())), method.summary)
        for method in merging.METHODS.values()
    ]
    print_table("merge methods", ["method", "settings", ""], rows)
    rows = [(name, ", ".join(methods)) for name, methods in merging.PRESETS.items()]
    print_table("presets", ["preset", "methods"], rows)


def _show_plan(job: "MergeJob", bandwidth: int | None) -> None:
    from m2l.merging.job import measure_bandwidth, spell

    rows = job.plan.rows()
    source = "--bandwidth"
    if bandwidth is None:
        bandwidth, source = measure_bandwidth(job), "measured"
    seconds = job.plan.seconds(bandwidth)
    rows.append(("time", f"{seconds:,.1f} s at {spell(bandwidth)}/s ({source})"))
    print_table(f"plan of {job.recipe.method}, nothing is done", ["what", "how much"], rows)


def _described(vocabulary: str | None) -> JsonObject | None:
    if vocabulary is None:
        return None
    from m2l.data import tokenizer_files

    return tokenizer_files.describe(vocabulary)


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """Returns the numbers between the commas of a flag's text."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: expected numbers with commas between") from error


def series(flag: str, text: str) -> list[float]:
    """Returns the numbers of a flag's text, with commas between or as FIRST:LAST:STEP."""
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
    scales = numbers("--scale_of", value)
    return pattern, scales if len(scales) > 1 else scales[0]
