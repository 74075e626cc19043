"""Whether checkpoints can be merged: everything that can be known before a byte is read."""

import fnmatch
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from m2l.checkpoints import Manifest, check_absent
from m2l.errors import MergeError
from m2l.merging.methods import METHODS
from m2l.merging.recipe import Recipe

_DIFFERENCES_SHOWN = 3


def check_sources(base: Path | None, experts: Sequence[Path], recipe: Recipe) -> None:
    """Refuses a number of experts, or the lack of a base, that the recipe cannot work with."""
    if not experts:
        raise MergeError("nothing to merge: give at least one expert")
    if base is None and METHODS[recipe.method].needs_base:
        raise MergeError(f"{recipe.method} works on task vectors: give the base of the experts")
    if recipe.weights is not None and len(recipe.weights) != len(experts):
        raise MergeError(
            f"{len(recipe.weights)} weights for {len(experts)} experts: give one for each"
        )


def check_destination(out: str | os.PathLike, sources: Sequence[Path]) -> None:
    """Refuses an output that exists or that lies inside a source."""
    out = Path(out).absolute()
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise MergeError(f"{out}: lies inside an input, {source}: choose another place")
    check_absent(out)


def check_alike(sources: Sequence[tuple[Path, Manifest]]) -> None:
    """Refuses checkpoints that differ from the first in vocabulary, model or parameters."""
    (first_path, first), *others = sources
    for path, manifest in others:
        where = f"{path} cannot be merged with {first_path}"
        if manifest.vocabulary["fingerprint"] != first.vocabulary["fingerprint"]:
            raise MergeError(
                f"{where}: another vocabulary, {manifest.vocabulary.get('name')!r} of "
                f"{manifest.vocabulary.get('size')} pieces and not "
                f"{first.vocabulary.get('name')!r} of {first.vocabulary.get('size')}"
            )
        for kind, mine, reference in (
            ("model", manifest.model, first.model),
            ("parameters", _kinds(manifest), _kinds(first)),
        ):
            names = [*reference, *(name for name in mine if name not in reference)]
            differing = [
                f"{name} is {mine.get(name, 'missing')} and not {reference.get(name, 'there')}"
                for name in names
                if mine.get(name) != reference.get(name)
            ]
            if differing:
                more = len(differing) - _DIFFERENCES_SHOWN
                shown = "; ".join(differing[:_DIFFERENCES_SHOWN])
                rest = f"; and {more} more" if more > 0 else ""
                raise MergeError(f"{where}: another {kind}: {shown}{rest}")


def _kinds(manifest: Manifest) -> dict[str, str]:
    """Shape and kind of each parameter; a bfloat16 and a float32 one can be merged."""
    return {
        name: f"{'float' if is_float(record['dtype']) else record['dtype']}{record['shape']}"
        for name, record in manifest.parameters.items()
    }


def is_float(dtype: str) -> bool:
    """Whether a dtype holds real numbers: others are copied, not merged."""
    return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


def warn_of_repetition(sources: Sequence[tuple[Path, Manifest]]) -> None:
    """Warns where two of the sources are the same model."""
    seen: dict[str, Path] = {}
    for path, manifest in sources:
        if manifest.digest in seen:
            warnings.warn(
                f"{path} is the same model as {seen[manifest.digest]}",
                stacklevel=3,
            )
        seen.setdefault(manifest.digest, path)


def merged_names(parameters: dict[str, str], exclude: Sequence[str]) -> list[str]:
    """The parameters that a merge computes, in order: real numbers, and not excluded.

    Args:
        parameters: name -> dtype.
        exclude: Shell patterns of names.

    Raises:
        MergeError: A pattern matches nothing, or nothing is left to merge.
    """
    for pattern in exclude:
        if not fnmatch.filter(parameters, pattern):
            raise MergeError(
                f"exclude {pattern!r} matches no parameter; the first is {next(iter(parameters))!r}"
            )
    names = [
        name
        for name, dtype in parameters.items()
        if is_float(dtype) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not names:
        raise MergeError("nothing to merge: every parameter is excluded or not a real number")
    return names
