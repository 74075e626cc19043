"""`m2l merge`."""

import functools
import importlib.metadata
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2l.cli.options import (
    COUNT,
    DIRECTORY,
    MODEL,
    GroupedCommand,
    Name,
    join,
    print_json,
    print_table,
    with_json,
    with_processes,
)
from m2l.errors import ConfigError
from m2l.typing import Json, JsonObject

if TYPE_CHECKING:
    from m2l.merging import MergeJob
    from m2l.merging.method_registry import HyperParameter


Setting = float | str | list[float | str]
"""A number, a gradient over layers such as 0.2..0.8, or one of these for each expert."""


class Number(click.ParamType):
    """A setting, or PATTERN=SETTING.

    Args:
        per_expert: Whether a single number is a list of one.
    """

    name = "number"

    def __init__(self, per_expert: bool = False):
        self._per_expert = per_expert

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str | None, Setting]:
        """Returns the pattern, if there is one, and the setting of a flag's text."""
        if not isinstance(value, str):
            return value
        flag = param.opts[0] if param else self.name
        pattern, _, text = value.rpartition("=")
        values = settings_of(flag, text)
        single = len(values) == 1 and (isinstance(values[0], str) or not self._per_expert)
        return pattern or None, values[0] if single else values


class Series(click.ParamType):
    """Numbers or gradients with commas between them, or FIRST:LAST:STEP."""

    name = "series"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float | str, ...]:
        """Returns the numbers of a flag's text."""
        flag = param.opts[0] if param else self.name
        if not isinstance(value, str):
            return value
        return tuple(settings_of(flag, value) if ".." in value else series(flag, value))


class RecipeCommand(GroupedCommand):
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
        _import_jax()
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

    def grouped(self, ctx: click.Context) -> dict[str, list[click.Parameter]]:
        """Returns the flags by group: hyper-parameters after the method, then variants."""
        from m2l.merging import method_registry

        groups = super().grouped(ctx)
        flags = {each.name: each for each in groups.pop("Other")}
        variants = [flags.pop(name) for name in method_registry.VARIANTS if name in flags]
        known = [flags.pop(n) for n in method_registry.hyper_parameters() if n in flags]
        groups["Numbers"] = [*known, *groups.get("Numbers", [])]
        groups["Where codebases differ"] = [*variants, *groups.get("Where codebases differ", [])]
        return {**groups, "Other": list(flags.values())}


def _import_jax() -> None:
    """Imports JAX, which looks for ROCm's plugin in the metadata of every installed package.

    Here by the names of their folders alone, which takes 0.2 s less.
    """
    paths = [info for folder in sys.path for info in Path(folder).glob("jax_rocm*.dist-info")]
    plugins = list(map(importlib.metadata.Distribution.at, paths))
    distributions = importlib.metadata.distributions
    try:
        importlib.metadata.distributions = lambda: iter(plugins)
        import jax  # noqa: F401
    finally:
        importlib.metadata.distributions = distributions


@functools.lru_cache(4)
def _recipe_flags(methods: tuple[str, ...], swept: bool) -> list[click.Option]:
    """Returns the flags of hyper-parameters: the same objects while there are these methods."""
    from m2l.merging import method_registry

    flags = []
    for name, by_method in method_registry.hyper_parameters().items():
        first = next(iter(by_method.values()))
        defaults = {method: _default(each) for method, each in by_method.items()}
        if len(set(defaults.values())) > 1:
            readers = ", ".join(f"{method} {value}" for method, value in defaults.items())
        else:
            readers = f"{next(iter(defaults.values()))}; of {', '.join(defaults)}"
        text = f"{first.description}  [default: {readers}]"
        if swept:
            text = f"Values, 0.1,0.2 or FIRST:LAST:STEP. {text}"
        kind = Series() if swept else Number(first.per_expert)
        if not (swept and first.per_expert):
            flags.append(click.Option([f"--{name}"], type=kind, help=text, multiple=not swept))
    for name, variant in () if swept else method_registry.VARIANTS.items():
        default = "the method's" if name == "scope" else variant.choices[0]
        text = f"{variant.description}  [default: {default}]"
        flags.append(click.Option([f"--{name}"], type=click.Choice(variant.choices), help=text))
    return flags


def _default(hyper_parameter: "HyperParameter") -> str:
    if hyper_parameter.default is None:
        return "none"
    return "1 each" if hyper_parameter.per_expert else f"{hyper_parameter.default:g}"


def _methods() -> list[str]:
    from m2l.merging import METHODS

    return list(METHODS)


def _presets() -> list[str]:
    from m2l.merging import PRESETS

    return list(PRESETS)


METHOD = Name("method", _methods)
PRESET = Name("preset", _presets)
DTYPES = ("float32", "bfloat16", "float16")
GROUPS = {
    "Inputs": "base experts run last decay config statistics subtree allow_differences verify",
    "Method": "method preset recipe seed list_methods",
    "Numbers": "scale_of exclude",
    "Where codebases differ": "weighted_signs",
    "Vocabularies that differ": "tokenizer pad_vocabulary chat_template tokens forced",
    "Output": "out output_format dtype adapter_rank adapter_error vocabulary diagnostics as_json",
    "Machine": "dry_run bandwidth memory distributed coordinator process",
}


@click.command(cls=RecipeCommand, groups=GROUPS)
@click.option("--base", type=MODEL, help="The model the experts were trained from.")
@click.option("--expert", "experts", type=MODEL, multiple=True, help="Repeat for each.")
@click.option("--run", type=DIRECTORY, help="Of one training run, instead of --expert ...")
@click.option("--last", type=COUNT, default=10, show_default=True, help="... so many last saves.")
@click.option(
    "--decay",
    type=click.Choice(["linear", "cosine", "1-sqrt"]),
    help="The decay of the learning rate that their average stands in for: linear (the mean), "
    "cosine or 1-sqrt.",
)
@click.option("--method", type=METHOD, help="See --list; with --run by default average.")
@click.option("--seed", type=int, help="Of the methods that draw at random.  [default: 0]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the merged parameters.")
@click.option("--weighted_signs", is_flag=True, help="Weights count when signs are elected.")
@click.option(
    "--scale_of",
    multiple=True,
    help="PATTERN=SCALE, or PATTERN=WEIGHT,WEIGHT,...: for parameters whose name matches.",
)
@click.option("--exclude", multiple=True, help="Parameters taken from the base: a pattern.")
@click.option(
    "--tokenizer", help="Where vocabularies differ, the result's: base, union, or one of --expert."
)
@click.option("--pad_vocabulary", type=int, help="Round the rows of embeddings up to a multiple.")
@click.option("--chat_template", help="The result's: auto, base, one of --expert, or a file.")
@click.option(
    "--token",
    "tokens",
    multiple=True,
    help="TOKEN=SOURCE: whose rows it has in models that lack it: base, zero, one of --expert, or "
    "another token there, SOURCE:TOKEN.",
)
@click.option(
    "--force_token", "forced", multiple=True, help="As --token, in models that have it as well."
)
@click.option(
    "--preset",
    type=PRESET,
    help="How another codebase does it: official, mergekit, ...; see --list.",
)
@click.option("--recipe", type=DIRECTORY, help="A JSON file of settings; flags override it.")
@click.option("--config", type=DIRECTORY, help="A YAML file of mergekit's, with models and method.")
@click.option(
    "--statistics",
    type=DIRECTORY,
    multiple=True,
    help="Of each expert, in their order (gradient_matching: the base's may be first).",
)
@click.option("--subtree", help="Of pytrees that Orbax stored, the part to merge: params.")
@click.option(
    "--to",
    "output_format",
    type=click.Choice(["orbax", "huggingface", "adapter"]),
    help="What to make; by default what the inputs are.",
)
@click.option("--adapter_rank", type=COUNT, help="Of the factors, with --to adapter.")
@click.option("--adapter_error", type=float, help="Instead: the share that may be missed.")
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
@with_json
@click.option("--list", "list_methods", is_flag=True, help="Show the methods and their settings.")
def merge(
    base: Path | None,
    experts: tuple[Path, ...],
    run: Path | None,
    last: int,
    decay: str | None,
    method: str | None,
    weighted_signs: bool,
    scale_of: tuple[str, ...],
    tokenizer: str | None,
    pad_vocabulary: int | None,
    chat_template: str | None,
    tokens: tuple[str, ...],
    forced: tuple[str, ...],
    preset: str | None,
    recipe: Path | None,
    config: Path | None,
    out: Path | None,
    list_methods: bool,
    statistics: tuple[Path, ...],
    subtree: str | None,
    output_format: str | None,
    adapter_rank: int | None,
    adapter_error: float | None,
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
    as_json: bool,
    **settings: Json,
) -> None:
    """Merge experts' checkpoints into one.

    Models are m2l's checkpoints and training runs, any pytrees that Orbax stored, Hugging Face
    directories, T5X checkpoints.

    A hyper-parameter is a number, a gradient from the first layer to the last (0.2..0.8), or one of
    these for each expert (0.5,0.2..0.8); --density '*mlp*=0.5' is of parameters whose name matches
    alone: repeat the flag.
    """
    if list_methods:
        _list()
        return
    from m2l import checkpoints, merging
    from m2l.merging import method_registry
    from m2l.merging.job import parse_bytes

    repeated = {name: settings.pop(name) for name in method_registry.hyper_parameters()}
    settings = {name: value for name, value in settings.items() if value not in (None, ())}
    settings |= {name: _joined(name, values) for name, values in repeated.items() if values}
    settings |= {"weighted_signs": True} if weighted_signs else {}
    settings |= {"scales": tuple(map(_scale_of, scale_of))} if scale_of else {}
    if run is not None:
        saves, decayed = _saves(run, last, decay, experts)
        experts, method = tuple(saves), method or (None if recipe else "average")
        settings |= {"weights": decayed} if decayed else {}
    elif decay:
        raise ConfigError(f"--decay {decay}: it is of the last checkpoints of a --run")
    for flag, idle in (
        ("--weights beside --decay", run is not None and decay and repeated["weights"]),
        ("--adapter_rank without --to adapter", adapter_rank and output_format != "adapter"),
        ("--adapter_error without --to adapter", adapter_error and output_format != "adapter"),
        *(
            (f"{name} without --tokenizer", value and not tokenizer)
            for name, value in (
                ("--pad_vocabulary", pad_vocabulary),
                ("--chat_template", chat_template),
                ("--token", tokens),
                ("--force_token", forced),
            )
        ),
    ):
        if idle:
            raise ConfigError(f"m2l merge: {flag}: it would have no effect")
    settings |= {"method": method} if method else {}
    if tokenizer:
        names = {str(path): f"expert_{place}" for place, path in enumerate(experts)}
        names |= {} if base is None else {str(base): "base"}
        sources = {"--token": tokens, "--force_token": forced}
        settings["tokenizer"] = _tokenizer(tokenizer, pad_vocabulary, chat_template, sources, names)
    for flag, missing in (
        ("--method", not (method or recipe or config)),
        ("--expert", not (experts or config)),
        ("--out", not out),
    ):
        if missing:
            raise ConfigError(f"m2l merge: {flag} is missing")
    if preset:
        settings = merging.preset(preset, settings)
    # Elsewhere such short compilations are not worth keeping; here they are a tenth of a merge.
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    slices = None
    if config:
        seed = settings.pop("seed", 0)
        if settings or base or experts or recipe or statistics or subtree:
            raise ConfigError(
                "m2l merge: --config has the models and the method: leave out their flags"
            )
        from m2l.merging import mergekit, mergekit_file

        base, experts, merge_recipe, slices = mergekit.resolve(
            mergekit_file.read(config),
            output_format=None if output_format == "adapter" else output_format,
            allowed=allow_differences.split(",") if allow_differences else (),
            seed=seed,
        )
    else:
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
        "slices": slices,
    }
    to_adapter = output_format == "adapter"
    if to_adapter:
        del options["output_format"]
    if dry_run:
        job = merging.prepare(base, experts, merge_recipe, out, **options)
        checkpoints.check_absent(job.out)
        _show_plan(job, parse_bytes(bandwidth) if bandwidth else None)
        return
    start = time.monotonic()
    if to_adapter:
        from m2l.cli.extract import show_adapter

        if base is None:
            raise ConfigError("m2l merge --to adapter: --base is missing, which it is put on")
        cut = {"rank": adapter_rank, "error": adapter_error}
        manifest = merging.merge_into_adapter(base, experts, merge_recipe, out, **cut, **options)
    else:
        manifest = merging.merge(base, experts, merge_recipe, out, **options)
    if manifest is None:
        click.echo(f"merged checkpoint: {out}, published by process 0")
        return
    if as_json:
        document = {"out": str(out), "digest": manifest.digest, "recipe": merge_recipe.to_dict()}
        print_json({**document, "parents": [*manifest.parents]})
        return
    if to_adapter:
        show_adapter(manifest, out)
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


def _joined(name: str, values: Sequence[tuple[str | None, Setting]]) -> Json:
    """Returns the setting that a repeated flag makes: by patterns, if there are any."""
    plain = [value for pattern, value in values if pattern is None]
    if len(plain) > 1:
        raise ConfigError(f"--{name} is there twice; --{name} PATTERN=NUMBER is of some parameters")
    patterns = [(pattern, value) for pattern, value in values if pattern is not None]
    return plain[0] if not patterns else [*patterns, *(("*", value) for value in plain)]


def settings_of(flag: str, text: str) -> list[float | str]:
    """Returns the numbers and gradients between the commas of a flag's text."""
    try:
        return [part if ".." in part else float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: expected numbers with commas between") from error


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


def _saves(
    run: Path, last: int, decay: str | None, experts: tuple[Path, ...]
) -> tuple[list[Path], tuple[float, ...]]:
    """Returns the last checkpoints of a run, and their weights where they are not equal."""
    from m2l.merging.recipe import decay_weights, last_checkpoints

    if experts:
        raise ConfigError("m2l merge: --run takes its own checkpoints; leave --expert out")
    saves = last_checkpoints(run, last)
    weights = decay_weights([*saves], decay) if decay else ()
    return [*saves.values()], weights


def _tokenizer(
    source: str,
    pad_to: int | None,
    chat_template: str | None,
    tokens: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str],
) -> JsonObject:
    """Returns what a recipe says of the tokenizer; models that flags name by path by their role."""
    choice: JsonObject = {"source": _role(source, names), "tokens": {}}
    if pad_to is not None:
        choice["pad_to"] = pad_to
    if chat_template is not None:
        role, file = _role(chat_template, names), Path(chat_template)
        choice["chat_template"] = file.read_text() if file.is_file() else role
    for flag, texts in tokens.items():
        for text in texts:
            token, equals, origin = text.rpartition("=")
            if not equals:
                raise ConfigError(f"{flag} {text}: expected TOKEN=SOURCE")
            # A path may have colons as well.
            path, _, other = (origin, "", "") if origin in names else origin.partition(":")
            choice["tokens"][token] = {"source": _role(path, names), "force": flag != "--token"}
            choice["tokens"][token] |= {"token": other} if other else {}
    return choice


def _role(text: str, names: Mapping[str, str]) -> str:
    """Returns what a recipe calls a model that is named as --base or --expert names it."""
    from m2l import hub_models

    located = str(hub_models.located(text)) if "/" in text and text not in names else text
    return names.get(located) or names.get(str(Path(text)), text)


def _scale_of(text: str) -> tuple[str, float | tuple[float, ...]]:
    pattern, equals, value = text.rpartition("=")
    if not equals:
        raise ConfigError(f"--scale_of {text}: expected PATTERN=SCALE")
    scales = numbers("--scale_of", value)
    return pattern, scales if len(scales) > 1 else scales[0]
