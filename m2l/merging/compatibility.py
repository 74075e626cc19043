"""Whether models can be merged: everything that can be known before a byte is read."""

import dataclasses
import fnmatch
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2l import storage
from m2l.checkpoints import model_fields, tensor_kinds
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.tensor_kinds import is_float
from m2l.errors import MergeError, UnknownNameError
from m2l.merging.method import Method
from m2l.merging.methods import METHODS
from m2l.merging.recipe import Recipe

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
    """Refuses an output that lies inside an input."""
    out = storage.path(out).absolute()
    for path in inputs:
        if out.resolve().is_relative_to(path.resolve()):
            raise MergeError(f"{out}: lies inside an input, {path}: choose another place")


@dataclasses.dataclass(frozen=True)
class Roles:
    """How each tensor of the result comes about.

    Attributes:
        merged: The names of what the method computes, in order.
        copied: Name -> the model it is taken from: what is excluded, and buffers.
        repeated: Name -> the tensor of the result that it is to equal: a second copy of a tied
            embedding in the model whose config.json the result gets.
        files: The model whose config.json, tokenizer and other files the result gets.
    """

    merged: tuple[str, ...]
    copied: Mapping[str, Checkpoint]
    repeated: Mapping[str, str]
    files: Checkpoint


def assign_roles(
    sources: Sequence[Checkpoint], experts: int, recipe: Recipe, allowed: Sequence[str] = ()
) -> Roles:
    """Checks that models can be merged, and says what becomes of each of their tensors.

    What the recipe excludes is compared in nothing. Buffers of Hugging Face's models, which
    versions write or not, are taken from the first that has them.

    Args:
        sources: The models; the first is that whose parameters are copied where they are not
            merged.
        experts: How many of the last are experts.
        recipe: How to merge.
        allowed: Fields of descriptions that may differ, by name; "tokenizer" is one.

    Raises:
        MergeError: They differ in a field that decides what a model computes, in their tokenizers
            or parameters; a pattern matches nothing; or nothing is left to merge.
        UnknownNameError: There is no field of a name in `allowed`.
    """
    first = sources[0]
    _check_allowed(sources, allowed)
    excluded = _excluded(sources, recipe)
    copies = _shared_copies(sources)

    def is_compared(name: str, source: Checkpoint) -> bool:
        buffer = source.native and tensor_kinds.is_buffer(name, source.parameters[name])
        return not (buffer or name in excluded or name in copies)

    compared = [{n for n in source.parameters if is_compared(n, source)} for source in sources]
    merged = tuple(
        name
        for name, stored in first.parameters.items()
        if name in compared[0] and is_float(stored.dtype)
    )
    no_words = any(map(tensor_kinds.is_vocabulary, excluded)) and not any(
        tensor_kinds.is_vocabulary(first.name_of(name)[0]) for name in merged
    )
    ignored = {*allowed, "vocab_size", "tokenizer"} if no_words else {*allowed}
    for other, names in zip(sources[1:], compared[1:], strict=True):
        kinds = [
            {n: kind(s.parameters[n].shape, s.parameters[n].dtype) for n in s.parameters if n in of}
            for s, of in ((first, compared[0]), (other, names))
        ]
        _check_alike(first, other, kinds, ignored)
    if not merged:
        raise MergeError("nothing to merge: every parameter is excluded or not a real number")
    copied = {name: first for name in first.parameters if name not in (*merged, *copies)}
    for source, names in zip(sources, compared, strict=True):
        rest = (n for n in source.parameters if n not in names and n not in copies)
        copied |= {n: source for n in rest if n not in excluded and n not in copied}
    # Where the words are the first model's, so is the tokenizer.
    files = first if no_words else sources[-experts]
    repeated = {n: original for n, original in copies.items() if n in files.parameters}
    return Roles(merged, copied, repeated, files)


def check_alike(sources: Sequence[Checkpoint]) -> None:
    """Refuses models that differ from the first in vocabulary, kind or parameters."""
    assign_roles(sources, len(sources), Recipe("average"))


def _check_allowed(sources: Sequence[Checkpoint], allowed: Sequence[str]) -> None:
    known = {"tokenizer", "quantization_config"}
    known |= {name for source in sources for name in (*source.model, *source.description)}
    for name in allowed:
        if name not in known | model_fields.DECIDING:
            raise UnknownNameError("field of a model's description", name, known)


def _excluded(sources: Sequence[Checkpoint], recipe: Recipe) -> set[str]:
    """The names of tensors, of any of the models, that a recipe excludes."""
    names = {n: (n, source.name_of(n)[0]) for source in sources for n in source.parameters}
    return matched_names(names, recipe)


def _shared_copies(sources: Sequence[Checkpoint]) -> dict[str, str]:
    """Tensors that repeat another in every model that has them, copy -> original."""
    result = {name: original for source in sources for name, original in source.copies.items()}
    for name in list(result):
        having = [source for source in sources if name in source.parameters]
        apart = [source for source in having if source.copies.get(name) != result[name]]
        tied = [s for s in having if s not in apart and model_fields.ties_embeddings(s.model)]
        if apart and tied:
            raise MergeError(
                f"{apart[0].path} cannot be merged with {tied[0].path}: {name} is a matrix of its "
                f"own in the one, and {result[name]} in the other, whose config.json says "
                "tie_word_embeddings"
            )
        if apart:
            del result[name]
    return result


def _check_alike(
    first: Checkpoint,
    other: Checkpoint,
    kinds: Sequence[Mapping[str, str]],
    ignored: Collection[str],
) -> None:
    where = f"{other.path} cannot be merged with {first.path}"
    if "tokenizer" not in ignored:
        _check_vocabulary(where, other, first)
    table = differences(*kinds, _short_names(first.path, other.path))
    fields = [
        row
        for row in model_fields.differing(first.description, other.description)
        if not {row[0], row[0].rpartition(".")[2]} & set(ignored)
    ]
    # Settings of m2l's decide all; config.json may hold anything.
    deciding = [row for row in fields if not first.native or model_fields.decides(row[0])]
    if deciding:
        spelled = [
            f"{name} is {_spell(value)} and not {_spell(wanted)}"
            for name, wanted, value in deciding
        ]
        names = ",".join(name for name, *_ in deciding[:_SHOWN])
        raise MergeError(
            f"{where}: another model: {'; '.join(spelled[:_SHOWN])}; to merge them all the same, "
            f"--allow_differences {names}",
            table,
        )
    if table:
        raise MergeError(f"{where}: other parameters", table)
    for name, wanted, value in fields:
        warnings.warn(
            f"{other.path}: {name} is {_spell(value)}, in {first.path} {_spell(wanted)}; m2l does "
            "not know whether that decides what the model computes",
            stacklevel=4,
        )


def _spell(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def differences(
    reference: Mapping[str, str], found: Mapping[str, str], of: Sequence[str]
) -> list[str]:
    """A table of the first parameters that two models have not alike, in lines of their own.

    Args:
        reference: Name -> kind of each parameter, as `kind` tells it.
        found: The other model's.
        of: What the models are called.

    Returns:
        The lines, indented; none where there is no difference.
    """
    names = [*reference, *(name for name in found if name not in reference)]
    rows = [
        (name, reference.get(name, "missing"), found.get(name, "missing"))
        for name in names
        if reference.get(name) != found.get(name)
    ]
    if not rows:
        return []
    shown = [("parameter", *of), *rows[:_SHOWN]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    ]
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN} more")
    return [f"  {line}" for line in lines]


def kind(shape: Sequence[int], dtype: Any) -> str:
    """What must be equal of a parameter; a bfloat16 and a float32 one can be merged."""
    return f"{'float' if is_float(dtype) else dtype}{list(shape)}"


def _short_names(first: Path, other: Path) -> tuple[str, str]:
    if not (isinstance(first, Path) and isinstance(other, Path)):
        return str(first), str(other)
    shared = os.path.commonpath([first, other])
    return os.path.relpath(first, shared), os.path.relpath(other, shared)


def _check_vocabulary(where: str, other: Checkpoint, first: Checkpoint) -> None:
    one, two = first.vocabulary, other.vocabulary
    if one and two and one["fingerprint"] == two["fingerprint"]:
        return
    if first.tokenizer and other.tokenizer:
        from m2l.data import tokenizer_comparison

        difference = tokenizer_comparison.difference(first.tokenizer, other.tokenizer)
        if difference is not None:
            raise MergeError(
                f"{where}: another tokenizer: {difference}; to merge them all the same, "
                "--allow_differences tokenizer"
            )
    elif one and two:
        raise MergeError(
            f"{where}: another vocabulary, {two.get('name')!r} of {two.get('size')} pieces and "
            f"not {one.get('name')!r} of {one.get('size')}"
        )


def check_statistics(
    method: Method, experts: Sequence[Checkpoint], found: Sequence[Checkpoint]
) -> None:
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


def warn_of_repetition(sources: Sequence[Checkpoint]) -> None:
    """Warns where two of the sources are the same model."""
    seen: dict[str, Path] = {}
    for source in sources:
        if source.digest in seen:
            warnings.warn(
                f"{source.path} is the same model as {seen[source.digest]}",
                stacklevel=3,
            )
        seen.setdefault(source.digest, source.path)


def matched_names(names: Mapping[str, Sequence[str]], recipe: Recipe) -> set[str]:
    """Returns the parameters that a recipe excludes.

    Args:
        names: Each parameter's names, in m2l and elsewhere, by which patterns may match it.
        recipe: How to merge.

    Raises:
        MergeError: There are none, or a pattern of the recipe matches nothing.
    """
    if not names:
        raise MergeError("nothing to merge: the models have no parameters")

    def matching(pattern: str) -> set[str]:
        return {
            n
            for n, known in names.items()
            if any(fnmatch.fnmatchcase(each, pattern) for each in known)
        }

    patterns = [("exclude", p) for p in recipe.exclude] + [("scales", p) for p, _ in recipe.scales]
    for kind, pattern in patterns:
        if not matching(pattern):
            raise MergeError(
                f"{kind} {pattern!r} matches no parameter; the first is {next(iter(names))!r}"
            )
    return {name for pattern in recipe.exclude for name in matching(pattern)}


def select_names(
    names: Mapping[str, Sequence[str]], dtypes: Mapping[str, Any], recipe: Recipe
) -> list[str]:
    """Returns the parameters that a merge in memory computes, in order.

    Args:
        names: Each parameter's names, as `matched_names` takes them.
        dtypes: Name -> dtype.
        recipe: How to merge.

    Raises:
        MergeError: A pattern matches nothing, or nothing is left to merge.
    """
    excluded = matched_names(names, recipe)
    merged = [n for n, dtype in dtypes.items() if is_float(dtype) and n not in excluded]
    if not merged:
        raise MergeError("nothing to merge: every parameter is excluded or not a real number")
    return merged
