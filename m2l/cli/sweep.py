"""`m2l sweep`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l import api
from m2l.cli.merge import METHOD, PRESET, RecipeCommand
from m2l.cli.options import (
    DIRECTORY,
    MIXTURE,
    MODEL,
    merge_command,
    print_table,
    with_batches,
    with_jsonl,
    with_max_examples,
    with_mesh,
    with_source,
)
from m2l.errors import ConfigError
from m2l.storage import AnyPath
from m2l.typing import JsonObject, PyTree

if TYPE_CHECKING:
    from m2l.merging import Recipe


@click.command(
    cls=RecipeCommand,
    swept=True,
    groups={
        "Inputs": "base experts statistics subtree",
        "Method": "method preset seed",
        "Numbers": "",
        "Scores": "mixture jsonl source split max_examples vocabulary",
        "Output": "out",
        "Batches": "batch_size input_length target_length",
        "Machine": "fsdp model",
    },
)
@click.option("--base", type=MODEL, help="The checkpoint the experts were trained from.")
@click.option("--expert", "experts", type=MODEL, multiple=True, help="Repeat for each.")
@click.option("--method", type=METHOD, help="See m2l merge --list.")
@click.option("--preset", type=PRESET, help="How another codebase does it; see m2l merge --list.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option("--statistics", type=DIRECTORY, multiple=True, help="Of each expert.")
@click.option("--subtree", help="Of pytrees that Orbax stored, the part to merge: params.")
@click.option(
    "--mixture",
    type=MIXTURE,
    help="The held-in tasks to choose by; by default all merges are kept.",
)
@with_jsonl("validation=FILE: your own data, as the task `jsonl`.")
@with_batches()
@with_max_examples
@click.option("--vocabulary", help="By default the experts' own.")
@with_mesh
@with_source()
@click.option("--out", type=DIRECTORY, required=True, help="The curve, its picture, the recipe.")
def sweep(
    base: Path | None,
    experts: tuple[Path, ...],
    method: str | None,
    preset: str | None,
    seed: int,
    statistics: tuple[Path, ...],
    subtree: str | None,
    mixture: str | None,
    jsonl: dict[str, AnyPath],
    split: str,
    max_examples: int | None,
    batch_size: int,
    input_length: int,
    target_length: int,
    vocabulary: str | None,
    fsdp: int,
    model: int,
    source: str,
    out: Path,
    **values: tuple[float | str, ...] | None,
) -> None:
    """Merge by many recipes, and find the best on validation data.

    OUT gets curve.json with every score, curve.png, and recipe.json for m2l merge --recipe. Without
    --mixture nothing is evaluated, and OUT gets every merged checkpoint, as scale=0.2.
    """
    import jax

    from m2l import checkpoints, files, merging, models, partitioning, storage
    from m2l.evaluation.evaluator import Evaluator

    swept = {name: numbers for name, numbers in values.items() if numbers}
    mixture = api.mixture_name(mixture, jsonl)
    for flag, missing in (
        ("--method", not method),
        ("--expert", not experts),
        ("a setting to sweep, such as --scale", not swept),
    ):
        if missing:
            raise ConfigError(f"m2l sweep: {flag} is missing")
    fixed = {"method": method}
    fixed = merging.preset(preset, fixed) if preset else fixed
    fixed = {name: value for name, value in fixed.items() if name not in swept}
    if merging.METHODS.get(method) and merging.METHODS[method].draws:
        fixed["seed"] = seed
    recipes = merging.grid(fixed, swept)
    if not mixture:
        _merge_all(recipes, list(swept), base, experts, statistics, subtree, out)
        return
    if subtree:
        raise ConfigError("m2l sweep: --subtree is of merges that are not evaluated, no --mixture")
    content = {
        "recipes": [recipe.to_dict() for recipe in recipes],
        "base": None if base is None else checkpoints.read_manifest(base).digest,
        "experts": [checkpoints.read_manifest(path).digest for path in experts],
        "data": {
            "mixture": mixture,
            "split": split,
            "max_examples": max_examples,
            "lengths": [input_length, target_length],
            "source": source,
        },
    }
    files.check_claim(out, "sweep.json", content, kind="sweep")
    merging.prepare(base, experts, recipes[0], statistics=statistics)
    manifest = checkpoints.read_manifest(experts[0])
    config = models.from_dict(manifest.model)
    checkpoints.check_vocabulary(manifest.vocabulary, config.vocab_size, experts[0])
    loaded, tasks = api.evaluation_tasks(
        mixture,
        jsonl,
        vocabulary or manifest.vocabulary["name"],
        manifest.vocabulary["fingerprint"],
        source,
        split=split,
        lengths={"inputs": input_length, "targets": target_length},
        max_examples=max_examples,
    )
    files.claim(out, "sweep.json", content)
    mesh = partitioning.make_mesh(fsdp=fsdp, model=model)
    placed = partitioning.shardings(models.spec(config), mesh)
    evaluator = Evaluator(config, tasks, loaded, batch_size=batch_size)
    curve: list[JsonObject] = []

    def score(params: PyTree, recipe: "Recipe") -> float:
        digest = recipe.identity(content["base"], content["experts"])
        with jax.set_mesh(mesh):
            results = evaluator.run(
                jax.device_put(params, placed),
                out / "results" / digest[:16],
                model_digest=digest,
                description=f"recipe {len(curve) + 1} of {len(recipes)}",
            )
        settings = {name: recipe.to_dict()[name] for name in swept}
        by_task = {result.task: result.score for result in results}
        mean = sum(by_task.values()) / len(by_task)
        curve.append({"settings": settings, "score": mean, "tasks": by_task})
        return mean

    points = merging.sweep(base, experts, recipes, score, statistics)
    chosen = merging.best(points)
    storage.write_atomic(out / "curve.json", json.dumps(curve, indent=1) + "\n")
    record = {"recipe": chosen.recipe.to_dict(), "score": chosen.score} | content["data"]
    files.write_record(out / "recipe.json", record)
    _draw(curve, mixture, out / "curve.png")
    rows = [(*point["settings"].values(), point["score"]) for point in curve]
    print_table(f"{method} on {mixture}", [*swept, "score %"], rows)
    settings = ", ".join(f"{name} {chosen.recipe.spell(name)}" for name in swept)
    tied = sum(point.score == chosen.score for point in points) - 1
    ties = f", the first of {tied + 1} that tie" if tied else ""
    click.echo(f"best: {settings} ({chosen.score:.2f} %{ties}); its merge:")
    click.echo(merge_command(base, experts, statistics, out))


def _merge_all(
    recipes: "Sequence[Recipe]",
    swept: Sequence[str],
    base: Path | None,
    experts: Sequence[Path],
    statistics: Sequence[Path],
    subtree: str | None,
    out: Path,
) -> None:
    """Makes the checkpoint of every recipe; those that are there already are left as they are."""
    from m2l import merging

    for recipe in recipes:
        name = ",".join(f"{setting}={recipe.spell(setting)}" for setting in swept)
        options = {"statistics": statistics, "subtree": subtree}
        manifest = merging.merge(base, experts, recipe, out / name, **options)
        click.echo(f"merged checkpoint: {out / name}  digest {manifest.digest[:16]}")


def _draw(curve: Sequence[JsonObject], mixture: str, file: Path) -> None:
    from m2l.reporting import merge_figures

    points = [(point["settings"], point["score"]) for point in curve]
    with file.open("wb") as image:
        merge_figures.curve(points, f"score on {mixture} (%)").savefig(image, format="png", dpi=200)
