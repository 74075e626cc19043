"""Whether models can be merged: everything that can be known before a byte is read."""

import fnmatch
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2l.checkpoints import check_absent
from m2l.errors import MergeError
from m2l.merging.method import Method
from m2l.merging.methods import METHODS
from m2l.merging.recipe import Recipe
from m2l.merging.results import is_float
from m2l.merging.sources import Source

_SHOWN = 8


def check_counts(base: bool, experts: int, statistics: int, recipe: Recipe) -> None:
    """Refuses a number of experts, or the lack of a base, that the recipe cannot work with.

    Args:
        base: Whether there is one.
        experts: How many.
        statistics: How many statistics of experts.
        recipe: How to merge.
    """
    method = METHODS[recipe.method]
    if not experts:
        raise MergeError("nothing to merge: give at least one expert")
    if not base and method.needs_base:
        raise MergeError(f"{recipe.method} works on task vectors: give the base of the experts")
    if method.experts not in (None, experts):
        wanted = {1: "one expert", 2: "two experts"}[method.experts]
        raise MergeError(f"{recipe.method} merges {wanted}, not {experts}")
    if recipe.method == "model_stock" and experts < 2:
        raise MergeError("model_stock needs at least two experts, whose angle it measures")
    given = [recipe.weights, *(v for _, v in recipe.scales if isinstance(v, tuple))]
    for weights in given:
        if weights is not None and len(weights) != experts:
            raise MergeError(f"{len(weights)} weights for {experts} experts: give one for each")
    if method.statistic is None and statistics:
        raise MergeError(f"{recipe.method} takes no statistics")
    if method.statistic is not None and statistics != experts:
        raise MergeError(
            f"{recipe.method} needs the {method.statistic} statistics of each expert, in the same "
            f"order: {statistics} given for {experts}; m2l statistics --kind {method.statistic} "
            "gathers them"
        )


def check_destination(out: str | os.PathLike, inputs: Sequence[Path]) -> None:
    """Refuses an output that exists or that lies inside an input."""
    out = Path(out).absolute()
    for path in inputs:
        if out.resolve().is_relative_to(path.resolve()):
            raise MergeError(f"{out}: lies inside an input, {path}: choose another place")
    check_absent(out)


def check_alike(sources: Sequence[Source]) -> None:
    """Refuses models that differ from the first in vocabulary, kind or parameters."""
    first, *others = sources
    for other in others:
        where = f"{other.path} cannot be merged with {first.path}"
        _check_vocabulary(where, other, first)
        table = differences(_kinds(first), _kinds(other), _short_names(first.path, other.path))
        mine, reference = _model(other), _model(first)
        fields = [
            f"{name} is {mine.get(name, 'missing')} and not {reference.get(name, 'there')}"
            for name in [*reference, *(name for name in mine if name not in reference)]
            if mine.get(name) != reference.get(name)
        ]
        if fields:
            raise MergeError(f"{where}: another model: {'; '.join(fields[:_SHOWN])}{table}")
        if table:
            raise MergeError(f"{where}: other parameters{table}")


def differences(reference: Mapping[str, str], found: Mapping[str, str], of: Sequence[str]) -> str:
    """A table of the first parameters that two models have not alike, in lines of their own.

    Args:
        reference: Name -> kind of each parameter, as `kind` tells it.
        found: The other model's.
        of: What the models are called.

    Returns:
        The lines, each after a line break; nothing where there is no difference.
    """
    names = [*reference, *(name for name in found if name not in reference)]
    rows = [
        (name, reference.get(name, "missing"), found.get(name, "missing"))
        for name in names
        if reference.get(name) != found.get(name)
    ]
    if not rows:
        return ""
    shown = [("parameter", *of), *rows[:_SHOWN]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    ]
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN} more")
    return "".join(f"\n  {line}" for line in lines)


def kind(shape: Sequence[int], dtype: Any) -> str:
    """What must be equal of a parameter; a bfloat16 and a float32 one can be merged."""
    return f"{'float' if is_float(dtype) else dtype}{list(shape)}"


def _short_names(first: Path, other: Path) -> tuple[str, str]:
    shared = os.path.commonpath([first, other])
    return os.path.relpath(first, shared), os.path.relpath(other, shared)


def _check_vocabulary(where: str, other: Source, first: Source) -> None:
    mine, reference = other.vocabulary, first.vocabulary
    if mine and reference and mine["fingerprint"] != reference["fingerprint"]:
        raise MergeError(
            f"{where}: another vocabulary, {mine.get('name')!r} of {mine.get('size')} pieces and "
            f"not {reference.get('name')!r} of {reference.get('size')}"
        )
    if other.tokenizer and first.tokenizer and other.tokenizer != first.tokenizer:
        raise MergeError(f"{where}: another tokenizer: its pieces and ids are not the same")


def _model(source: Source) -> Mapping[str, Any]:
    """What must be equal of a configuration: of a config.json, what says which model it is."""
    if source.native:
        return {name: source.model.get(name) for name in ("model_type", "architectures")}
    return source.model


def _kinds(source: Source) -> dict[str, str]:
    return {name: kind(stored.shape, stored.dtype) for name, stored in source.parameters.items()}


def check_statistics(method: Method, experts: Sequence[Source], found: Sequence[Source]) -> None:
    """Refuses statistics of another kind, of another expert, or of other parameters."""
    for expert, source in zip(experts, found, strict=False):
        made_by = source.manifest.made_by if source.manifest else {}
        if made_by.get("statistic") != method.statistic:
            raise MergeError(
                f"{source.path}: holds no {method.statistic} statistics; m2l statistics --kind "
                f"{method.statistic} gathers them"
            )
        if expert.manifest is not None and made_by.get("of") != expert.digest:
            raise MergeError(
                f"{source.path}: statistics of another model than {expert.path}: give them in the "
                "order of the experts"
            )
        for name, stored in expert.parameters.items():
            if not method.whole and name not in source.parameters:
                raise MergeError(f"{source.path}: it has nothing for {name}")
            found_shape = None if method.whole else tuple(source.parameters[name].shape)
            if found_shape not in (None, tuple(stored.shape)):
                raise MergeError(
                    f"{source.path}: {name} has shape {list(found_shape)} and not "
                    f"{list(stored.shape)}"
                )


def warn_of_repetition(sources: Sequence[Source]) -> None:
    """Warns where two of the sources are the same model."""
    seen: dict[str, Path] = {}
    for source in sources:
        if source.digest in seen:
            warnings.warn(
                f"{source.path} is the same model as {seen[source.digest]}",
                stacklevel=3,
            )
        seen.setdefault(source.digest, source.path)


def merged_names(reference: Source, recipe: Recipe) -> list[str]:
    """The parameters that a merge computes, in order: real numbers, and not excluded.

    Args:
        reference: Whose parameters they are.
        recipe: Says which are excluded, by patterns of the names that they have here or in m2l.

    Raises:
        MergeError: A pattern matches nothing, or nothing is left to merge.
    """
    names = {name: (name, reference.name_of(name)[0]) for name in reference.parameters}
    kinds = {name: stored.dtype for name, stored in reference.parameters.items()}
    return select_names(names, kinds, recipe)


def select_names(
    names: Mapping[str, Sequence[str]], dtypes: Mapping[str, Any], recipe: Recipe
) -> list[str]:
    """The same, for parameters that go by several names."""

    def matches(name: str, pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(known, pattern) for known in names[name])

    patterns = [("exclude", p) for p in recipe.exclude] + [("scales", p) for p, _ in recipe.scales]
    for kind, pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise MergeError(
                f"{kind} {pattern!r} matches no parameter; the first is {next(iter(names))!r}"
            )
    found = [
        name
        for name, dtype in dtypes.items()
        if is_float(dtype) and not any(matches(name, pattern) for pattern in recipe.exclude)
    ]
    if not found:
        raise MergeError("nothing to merge: every parameter is excluded or not a real number")
    return found
