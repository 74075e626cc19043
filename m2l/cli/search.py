"""`m2l search`."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l import api
from m2l.cli.options import (
    COUNT,
    DIRECTORY,
    MODEL,
    merge_command,
    print_table,
    with_batches,
    with_generative_score,
    with_gin,
    with_jsonl,
    with_max_examples,
    with_mesh,
    with_source,
)
from m2l.errors import ConfigError
from m2l.storage import AnyPath

if TYPE_CHECKING:
    from m2l.studies.recipe_search import SearchResult


@click.command()
@click.option("--base", type=MODEL, help="The checkpoint the experts were trained from.")
@click.option("--expert", "experts", type=MODEL, multiple=True, help="Repeat for each.")
@click.option("--statistics", type=DIRECTORY, multiple=True, help="Of each expert.")
@click.option(
    "--mixture", "mixtures", multiple=True, help="The tasks to score by; twice: two aims."
)
@with_jsonl("validation=FILE: your own data, as the task `jsonl`.")
@with_gin
@click.option("--candidates", type=COUNT, help="Recipes to try.  [default: 100]")
@click.option("--sampler", help="tpe, cma-es, nsga-ii.  [default: tpe; with two aims nsga-ii]")
@click.option("--seed", type=click.IntRange(0), help="Of the sampler.  [default: 0]")
@click.option(
    "--racing/--no-racing", default=None, help="Stop candidates that are shown to be worse."
)
@click.option(
    "--storage",
    help="postgresql://USER:PASSWORD@HOST/DATABASE, for many workers.  [default: OUT/study.db]",
)
@click.option("--study", default="search", show_default=True, help="Its name in the storage.")
@with_batches()
@with_max_examples
@with_generative_score("Of tasks in free text.")
@click.option("--vocabulary", help="By default the experts' own.")
@with_mesh
@with_source()
@click.option("--out", type=DIRECTORY, required=True, help="recipe.json, the page, this worker's.")
def search(
    base: Path | None,
    experts: tuple[Path, ...],
    statistics: tuple[Path, ...],
    mixtures: tuple[str, ...],
    jsonl: dict[str, AnyPath],
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
    candidates: int | None,
    sampler: str | None,
    seed: int | None,
    racing: bool | None,
    storage: str | None,
    study: str,
    split: str,
    max_examples: int | None,
    batch_size: int,
    input_length: int,
    target_length: int,
    generative_score: str,
    vocabulary: str | None,
    fsdp: int,
    model: int,
    source: str,
    out: Path,
) -> None:
    """Search a space of recipes for the best merge, by one half of the data; the other judges.

    The space is Search.methods in gin; see runs/search.gin. Candidates are merged and scored in
    memory, and stop early when they are shown to be worse. OUT gets recipe.json for m2l merge
    --recipe, and report/index.html. Stopped, the same command goes on; so do several with one
    --storage, each with its own OUT.
    """
    names = [api.mixture_name(name, jsonl) for name in mixtures or (None,)]
    for wrong, message in (
        (not experts, "--expert is missing"),
        (None in names, "what to score by: name a --mixture, or your own data with --jsonl"),
        (len(names) > 2, f"--mixture: one aim or two, not {len(names)}"),
        (len(set(names)) < len(names), f"--mixture {names[0]} is there twice"),
        (
            storage is not None and not storage.startswith(("postgresql://", "postgres://")),
            "--storage: expected postgresql://USER:PASSWORD@HOST/DATABASE",
        ),
    ):
        if wrong:
            raise ConfigError(f"m2l search: {message}")
    for module in ("optuna", "cmaes", *(["psycopg"] if storage else [])):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"m2l search: {module} is not installed: pip install 'm2l[search]'")

    from m2l import configuration, merging, partitioning
    from m2l.reporting import page, recipe_search_report
    from m2l.studies import recipe_search

    flags = {"candidates": candidates, "sampler": sampler, "seed": seed, "racing": racing}
    bound = [f"Search.{name}={value!r}" for name, value in flags.items() if value is not None]
    # The settings' own file comes first, so that no file is needed.
    settings, resolved = configuration.load(
        "Search", ("runs/search.gin", *gin_files), [*bindings, *bound]
    )
    to_merge = recipe_search.ToMerge(base, experts, statistics)
    manifest = to_merge.check(settings.space)
    aims = {}
    for name in names:
        loaded, aims[name] = api.evaluation_tasks(
            name,
            jsonl,
            vocabulary or manifest.vocabulary["name"],
            manifest.vocabulary["fingerprint"],
            source,
            split=split,
            lengths={"inputs": input_length, "targets": target_length},
            max_examples=max_examples,
            generative_score=generative_score,
        )
    result = recipe_search.search(
        settings,
        to_merge,
        aims,
        loaded,
        out,
        data=api.record_origin(source, jsonl) | {"split": split, "max_examples": max_examples},
        mesh=partitioning.make_mesh(fsdp=fsdp, model=model),
        url=storage and storage.replace("postgres://", "postgresql://", 1),
        study=study,
        batch_size=batch_size,
        notice=lambda line: click.echo(f"m2l: {line}", err=True),
    )
    _write(result, out)
    described = dataclasses.asdict(settings) | {"storage": result.storage, "gin": resolved}
    report = recipe_search_report.report(result, described)
    written = page.write(out, report)
    title, frame = report.summary
    print_table(title, list(frame.columns), list(frame.itertuples(index=False, name=None)))
    click.echo(recipe_search_report.answer(result))
    statistics = statistics if merging.METHODS[result.chosen.recipe["method"]].statistic else ()
    click.echo(f"page: {written}; its merge:\n{merge_command(base, experts, statistics, out)}")


def _write(result: "SearchResult", out: AnyPath) -> None:
    """Writes the chosen recipe and, with two aims, each of the front."""
    from m2l import files

    def record(number: int) -> Mapping[str, object]:
        (model,) = [each for each in result.judged if each.number == number]
        (candidate,) = [each for each in result.front if each.number == number]
        return {
            "recipe": candidate.recipe,
            "candidate": number,
            "chosen_by": dict(zip(result.aims, candidate.scores, strict=True)),
            "judged": dict(zip(result.aims, model.scores, strict=True)),
        }

    files.write_record(out / "recipe.json", record(result.chosen.number))
    if len(result.aims) > 1:
        (out / "front").mkdir(exist_ok=True)
        for candidate in result.front:
            files.write_record(out / "front" / f"{candidate.number}.json", record(candidate.number))
