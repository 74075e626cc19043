"""`m2l inspect --predict`: what a merge should keep of its experts' performance."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from m2l import storage
from m2l.cli.options import print_json, print_table
from m2l.errors import ConfigError
from m2l.storage import AnyPath

if TYPE_CHECKING:
    from m2l.merging import Recipe
    from m2l.studies.retention import Retention

_LEFT_OUT = {"experts": "sets of experts", "base": "bases", "study": "studies"}


def show(
    file: str,
    merged: AnyPath | None,
    base: AnyPath | None,
    experts: Sequence[AnyPath],
    recipe_file: AnyPath | None,
    settings: Mapping[str, str | float | None],
    *,
    subtree: str | None,
    as_json: bool,
) -> None:
    """Measures the experts, and prints the prediction of each recipe.

    Args:
        file: What scripts/fit_retention.py wrote; "": m2l's own.
        merged: A merge, whose manifest names the others.
        base, experts: Or these.
        recipe_file: A recipe; None: those of the studies.
        settings: The method and its scale, where they are named.
        subtree: Of pytrees that Orbax stored, the part that is merged.
        as_json: Whether to print JSON.

    Raises:
        ConfigError: The models are not named, or named twice.
    """
    from m2l.merging.interference import measure
    from m2l.studies import retention

    settings = {name: value for name, value in settings.items() if value is not None}
    fitted = retention.Retention.read(storage.path(file) if file else retention.FITTED)
    if merged is not None:
        if base or experts or recipe_file or settings:
            raise ConfigError(
                f"m2l inspect --predict: {merged} says itself what it was merged from, and how: "
                "leave it out, or --base, --expert, --recipe, --method and --scale"
            )
        base, experts, recipe = _merged_from(merged)
        recipes = [recipe]
    elif base is None or len(experts) < 2:
        raise ConfigError(
            "m2l inspect --predict: expected --base and two or more of --expert, found "
            f"{'no base' if base is None else 'a base'} and {len(experts)}; of a merge, "
            "m2l inspect MERGED --predict"
        )
    else:
        recipes = _recipes(fitted, len(experts), recipe_file, settings)
    rows, records, texts = [], [], {}
    measured = measure(base, experts, recipes, subtree=subtree)
    for recipe, measures in zip(recipes, measured, strict=True):
        share, low, high = fitted.predict(measures)
        rows.append((_label(recipe), share, low, high, measures.projection, measures.interference))
        outside = fitted.outside(measures)
        records.append(
            {"recipe": recipe.to_dict(), "share": share, "low": low, "high": high}
            | {"measures": measures._asdict(), "outside": outside}
        )
        for name, (value, least, largest) in outside.items():
            prefix = f"{recipe.method}: " if name in ("projection", "interference") else ""
            texts[f"{prefix}{name} is {value:.3g}, not in {least:.3g} to {largest:.3g}"] = None
    for text in texts:
        warnings.warn(f"{text}, what was fitted: the prediction is a guess", stacklevel=2)
    error = fitted.errors[fitted.left_out]
    if as_json:
        described = {"left_out": fitted.left_out, **dataclasses.asdict(error)}
        print_json({"predictions": records, "error": described, "merges": dict(fitted.merges)})
        return
    first = measured[0]
    click.echo(
        f"{len(experts)} experts of {base}: task vectors of {first.norm:.2%} of its norm, mean "
        f"cosine {first.cosine:.3f}, signs conflict at {first.conflicts:.1%} of the entries"
    )
    columns = ["recipe", "share", "low", "high", "projection", "interference"]
    print_table("predicted share of the experts' held-in performance", columns, rows)
    merges = ", ".join(f"{count} merges of {study}" for study, count in fitted.merges.items())
    click.echo(
        f"not evaluated: a regression on {merges}. With {_LEFT_OUT[fitted.left_out]} left out, one "
        f"of {error.groups} at a time, it was off by {error.error:.3f} on average, and the mean of "
        f"the others by {error.error_of_mean:.3f}; nine of ten merges were between low and high"
    )


def _merged_from(merged: AnyPath) -> tuple[AnyPath, list[AnyPath], "Recipe"]:
    """Returns base, experts and recipe of a merge, as its manifest has them."""
    from m2l import checkpoints
    from m2l.checkpoints import huggingface_directory
    from m2l.merging import Recipe

    exported = (merged / huggingface_directory.MANIFEST).is_file()
    manifest = (huggingface_directory if exported else checkpoints).read_manifest(merged)
    paths = {role: [] for role in ("base", "expert")}
    for parent in manifest.parents:
        paths.setdefault(parent["role"], []).append(storage.path(parent["path"]))
    made_by = manifest.made_by
    if made_by.get("kind") != "merge" or "slices" in made_by or len(paths["base"]) != 1:
        raise ConfigError(
            f"m2l inspect --predict: {merged}: expected a merge of a base's experts; name these "
            "with --base and --expert"
        )
    return paths["base"][0], paths["expert"], Recipe.from_dict(made_by["recipe"], f"{merged}")


def _recipes(
    fitted: "Retention",
    experts: int,
    file: AnyPath | None,
    settings: Mapping[str, str | float],
) -> "list[Recipe]":
    from m2l.merging import Recipe

    if file is not None:
        return [Recipe.read(file, **settings)]
    recipes = fitted.recipes_for(experts)
    if "method" in settings:
        known = [recipe for recipe in recipes if recipe.method == settings["method"]]
        recipes = known or [Recipe(settings["method"])]
    elif settings:
        raise ConfigError("m2l inspect --predict: --scale needs a --method")
    return [Recipe.from_dict(recipe.to_dict() | settings) for recipe in recipes]


def _label(recipe: "Recipe") -> str:
    """Returns a recipe as the flags of `m2l merge` that matter."""
    values = [(name, recipe.spell(name)) for name in recipe.hyper_parameters]
    plain = [f"{name} {value}" for name, value in values if value not in ("[]", "()")]
    return ", ".join([recipe.method, *plain])
