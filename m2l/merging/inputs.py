"""What is merged: how it is opened, whether it fits together, whether its bytes are right."""

import dataclasses
import fnmatch
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from m2l import storage
from m2l.checkpoints import digest, model_fields, opening, tensor_kinds
from m2l.checkpoints.adapters import AdaptedTensor
from m2l.checkpoints.opening import HUGGINGFACE, ORBAX, Checkpoint, recorded_digest
from m2l.checkpoints.spans import Span, TensorReader, is_one
from m2l.checkpoints.tensor_kinds import is_float
from m2l.distributed import Processes
from m2l.errors import CheckpointError, MergeError, UnknownNameError
from m2l.merging import layerwise
from m2l.merging.method_registry import METHODS, Method
from m2l.merging.recipe import Recipe
from m2l.merging.token_rows import as_stored
from m2l.typing import Json

FORMATS = (ORBAX, HUGGINGFACE)
"""What a merge can write."""


def open_all(
    paths: Sequence[Path],
    output_format: str | None,
    *,
    named: bool = True,
    allowed: Sequence[str] = (),
    subtree: str | None = None,
) -> tuple[list[Checkpoint], str]:
    """Opens models; nothing but headers is read yet.

    Args:
        paths: Where they are.
        output_format: The format to write; None: that of the inputs.
        named: Whether m2l's names of parameters are asked for.
        allowed: Fields of config.json that are not to be refused for what they say.
        subtree: Of pytrees that Orbax stored, the part that is merged.

    Returns:
        The models, and the format that the merge is to write.

    Raises:
        CheckpointError: One is missing, unfinished or damaged, or is no model to be merged.
        MergeError: There is no such format.
    """
    kinds = {opening.kind(path) for path in paths}
    output_format = output_format or (HUGGINGFACE if kinds == {HUGGINGFACE} else ORBAX)
    if output_format not in FORMATS:
        raise MergeError(f"--to {output_format}: a merge writes {' or '.join(FORMATS)}")
    native = output_format == HUGGINGFACE and kinds == {HUGGINGFACE}
    options = {"native": native, "named": named, "allowed": allowed}
    return [opening.open(path, subtree=subtree, **options) for path in paths], output_format


def memory_of(checkpoint: Checkpoint) -> int:
    """Returns the bytes that a checkpoint itself may hold while its parameters are read."""
    stored = map(as_stored, checkpoint.parameters.values())
    return max((getattr(tensor, "memory", 0) for tensor in stored), default=0)


def is_finite(block: np.ndarray) -> bool:
    """Returns whether all numbers are finite, by their bits: NumPy's test of bfloat16 is slow."""
    width = block.dtype.itemsize
    infinities = np.array([np.inf, -np.inf], block.dtype)
    # As signed integers what is negative is below 0; as unsigned ones above all that is not.
    return all(
        bool(block.view(word).max(initial=0) < infinity)
        for word, infinity in (
            (f"i{width}", infinities.view(f"i{width}")[0]),
            (f"u{width}", infinities.view(f"u{width}")[1]),
        )
    )


def refuse_nonfinite(checkpoints: Sequence[Checkpoint], span: Span) -> None:
    """Raises MergeError naming the first entry of a span that is NaN or infinity, if any is."""
    for checkpoint in checkpoints:
        stored = checkpoint.parameters[span.name]
        array = np.empty(span.size, stored.dtype)
        stored.read_span(span, array)
        for index in np.flatnonzero(~np.isfinite(array.astype(np.float32)))[:1]:
            place = span.position(int(index))
            raise MergeError(
                f"{checkpoint.path}: {span.name}[{place}] (row-major) is {array[index]}: "
                "only finite numbers can be merged; use a checkpoint from before the training run "
                "diverged, or it is damaged: m2l inspect --verify"
            )


_SHOWN = 8


def check_counts(base: bool, experts: int, statistics: int, recipe: Recipe) -> None:
    """Refuses a number of experts, or the lack of a base, that the recipe cannot work with.

    Args:
        base: Whether there is one.
        experts: How many.
        statistics: How many statistics of experts, and of the base.
        recipe: How to merge.
    """
    method = METHODS[recipe.method]
    if not experts:
        raise MergeError("nothing to merge: give at least one expert")
    if not base and method.needs_base:
        raise MergeError(f"{recipe.method} works on task vectors: give the base of the experts")
    if experts not in method.experts:
        plural = "s"[: method.experts.high > 1]
        raise MergeError(f"{recipe.method} merges {method.experts} expert{plural}, not {experts}")
    settings = [
        *recipe.hyper_parameters.items(),
        *(("weights", value) for _, value in recipe.scales),
    ]
    for name, value in settings:
        for values in layerwise.lists(value):
            if values and len(values) != experts:
                raise MergeError(f"{len(values)} {name} for {experts} experts: give one for each")
    for agreement in layerwise.numbers(recipe.hyper_parameters.get("agreement", 0.0)):
        if agreement > experts:
            raise MergeError(
                f"agreement {agreement:g} of {experts} experts: give at most {experts}"
            )
    if method.statistic is None and statistics:
        raise MergeError(f"{recipe.method} takes no statistics")
    numbers = (experts, experts + 1) if "base_fisher" in method.inputs else (experts,)
    if method.statistic is not None and statistics not in numbers:
        raise MergeError(
            f"{recipe.method} needs the {method.statistic} statistics of each expert, in the same "
            f"order{', and may have those of the base, first' * (len(numbers) - 1)}: {statistics} "
            f"given for {experts}; m2l statistics --kind {method.statistic} gathers them"
        )


def check_destination(out: str | os.PathLike, inputs: Sequence[Path]) -> None:
    """Refuses an output that is inside an input."""
    out = storage.path(out).absolute()
    for path in inputs:
        alike = isinstance(out, Path) == isinstance(path, Path)
        if alike and out.resolve().is_relative_to(path.resolve()):
            raise MergeError(f"{out}: is inside an input, {path}: choose another place")


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
    sources: Sequence[Checkpoint],
    experts: int,
    recipe: Recipe,
    allowed: Sequence[str] = (),
    files: Checkpoint | None = None,
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
        files: The model whose files the result gets; None: the first expert, or the first model
            where the words are its.

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
            {
                n: array_kind(s.parameters[n].shape, s.parameters[n].dtype)
                for n in s.parameters
                if n in compared_names
            }
            for s, compared_names in ((first, compared[0]), (other, names))
        ]
        _check_alike(first, other, kinds, ignored)
    if not merged:
        raise MergeError("nothing to merge: every parameter is excluded or not a real number")
    copied = {name: first for name in first.parameters if name not in (*merged, *copies)}
    for source, names in zip(sources, compared, strict=True):
        ignored_names = (n for n in source.parameters if n not in names and n not in copies)
        copied |= {n: source for n in ignored_names if n not in excluded and n not in copied}
    # Where the words are the first model's, so is the tokenizer.
    files = files or (first if no_words else sources[-experts])
    repeated = {n: original for n, original in copies.items() if n in files.parameters}
    return Roles(merged, copied, repeated, files)


def check_alike(sources: Sequence[Checkpoint], allowed: Sequence[str] = ()) -> None:
    """Refuses models that differ from the first in vocabulary, kind or parameters."""
    assign_roles(sources, len(sources), Recipe("average"), allowed)


def _check_allowed(sources: Sequence[Checkpoint], allowed: Sequence[str]) -> None:
    known = {"tokenizer", "quantization_config"}
    known |= {name for source in sources for name in (*source.model, *source.description)}
    for name in allowed:
        if name not in known | model_fields.DECIDING:
            raise UnknownNameError("field of a model's description", name, known)


def _excluded(sources: Sequence[Checkpoint], recipe: Recipe) -> set[str]:
    """Returns the names of tensors, of any of the models, that a recipe excludes."""
    names = {n: (n, source.name_of(n)[0]) for source in sources for n in source.parameters}
    return matched_names(names, recipe)


def _shared_copies(sources: Sequence[Checkpoint]) -> dict[str, str]:
    """Returns tensors that repeat another in every model that has them, copy -> original."""
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
    problem = f"{other.path} cannot be merged with {first.path}"
    # Those that were re-indexed have got one vocabulary.
    if "tokenizer" not in ignored and not first.rows:
        _check_vocabulary(problem, other, first)
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
            f"{problem}: another model: {'; '.join(spelled[:_SHOWN])}; to merge them all the same, "
            f"--allow_differences {names}",
            table,
        )
    if table:
        raise MergeError(f"{problem}: other parameters", table)
    for name, wanted, value in fields:
        warnings.warn(
            f"{other.path}: {name} is {_spell(value)}, in {first.path} {_spell(wanted)}; m2l does "
            "not know whether that decides what the model computes",
            stacklevel=4,
        )


def _spell(value: Json) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def differences(
    reference: Mapping[str, str], other: Mapping[str, str], labels: Sequence[str]
) -> list[str]:
    """Returns a table of the first parameters in which two models differ, as lines.

    Args:
        reference: Name -> kind of each parameter, as `array_kind` returns it.
        other: The other model's.
        labels: What the models are called.

    Returns:
        The lines, indented; none where there is no difference.
    """
    names = [*reference, *(name for name in other if name not in reference)]
    rows = [
        (name, reference.get(name, "missing"), other.get(name, "missing"))
        for name in names
        if reference.get(name) != other.get(name)
    ]
    if not rows:
        return []
    shown = [("parameter", *labels), *rows[:_SHOWN]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    ]
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN} more")
    return [f"  {line}" for line in lines]


def array_kind(shape: Sequence[int], dtype: np.dtype) -> str:
    """Returns what must be equal of arrays: shape, and dtype unless both are real numbers."""
    return f"{'float' if is_float(dtype) else dtype}{list(shape)}"


def _short_names(first: Path, other: Path) -> tuple[str, str]:
    if not (isinstance(first, Path) and isinstance(other, Path)):
        return str(first), str(other)
    shared = os.path.commonpath([first, other])
    return os.path.relpath(first, shared), os.path.relpath(other, shared)


def _check_vocabulary(problem: str, other: Checkpoint, first: Checkpoint) -> None:
    one, two = first.vocabulary, other.vocabulary
    if one and two and one["fingerprint"] == two["fingerprint"]:
        return
    if first.tokenizer and other.tokenizer:
        from m2l.data import tokenizer_comparison

        difference = tokenizer_comparison.difference(first.tokenizer, other.tokenizer)
        if difference is not None:
            raise MergeError(
                f"{problem}: another tokenizer: {difference}; to merge them all the same, "
                "--allow_differences tokenizer"
            )
    elif one and two:
        raise MergeError(
            f"{problem}: another vocabulary, {two.get('name')!r} of {two.get('size')} pieces and "
            f"not {one.get('name')!r} of {one.get('size')}"
        )


def check_statistics(
    method: Method, models: Sequence[Checkpoint], statistics: Sequence[Checkpoint]
) -> None:
    """Refuses statistics of another kind, of another model, or of other parameters.

    Args:
        method: The method.
        models: The base, if there is one, and the experts.
        statistics: Of the last of these.
    """
    for expert, source in zip(models[len(models) - len(statistics) :], statistics, strict=True):
        made_by = source.manifest.made_by if source.manifest else {}
        if made_by.get("statistic") != method.statistic:
            raise MergeError(
                f"{source.path}: holds no {method.statistic} statistics; m2l statistics --kind "
                f"{method.statistic} gathers them"
            )
        if expert.manifest is not None and made_by.get("of") != expert.digest:
            raise MergeError(
                f"{source.path}: statistics of another model than {expert.path}: give them in the "
                "order of the experts, those of the base first"
            )
        for name, stored in expert.parameters.items():
            if method.whole:
                continue
            if name not in source.parameters:
                raise MergeError(f"{source.path}: missing parameter {name}")
            shape = tuple(source.parameters[name].shape)
            if shape != tuple(stored.shape):
                raise MergeError(
                    f"{source.path}: {name} has shape {list(shape)} and not {list(stored.shape)}"
                )


def check_matrices(method: Method, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuses parameters of more than two axes, of which a method of matrices cannot make one."""
    stacked = [f"{name} {list(shape)}" for name, shape in shapes.items() if len(shape) > 2]
    if method.of_matrices and stacked:
        raise MergeError(
            f"{method.name} merges matrices, and it is not known which axes are the inputs of "
            f"{', '.join(stacked[:3])}{' ...' * (len(stacked) > 3)}: --exclude them, or merge "
            "Hugging Face directories, which have a matrix for each"
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
    for name, value in recipe.hyper_parameters.items():
        patterns += [(name, pattern) for pattern in layerwise.patterns(value) if pattern != "*"]
    for kind, pattern in patterns:
        if not matching(pattern):
            raise MergeError(
                f"{kind} {pattern!r} matches no parameter; the first is {next(iter(names))!r}"
            )
    return {name for pattern in recipe.exclude for name in matching(pattern)}


def select_names(
    names: Mapping[str, Sequence[str]], dtypes: Mapping[str, np.dtype], recipe: Recipe
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


_READ = 1 << 20
_ADVICE = "its bytes do not have the digest that is recorded; copy it again or make it anew"

Key = tuple[int, str]
"""A source's place in a list, and a parameter's name."""


def digested(tensor: TensorReader) -> TensorReader:
    """Returns the tensor whose recorded digest is checked for one: as stored, without adapters."""
    stored = as_stored(tensor)
    return digested(stored.base) if isinstance(stored, AdaptedTensor) else stored


class InputDigests:
    """Digests of the parameters that are read, added up over the parts that this process reads.

    Args:
        read: The parameters that are read: of each source the names.
        verify: Whether any is to be checked.
    """

    def __init__(self, read: Sequence[tuple[Checkpoint, Sequence[str]]], verify: bool):
        self._sources = [source for source, _ in read]
        self._recorded: dict[Key, str] = {}
        checked: dict[str, list[TensorReader]] = {}
        for index, (source, names) in enumerate(read if verify else ()):
            for name in names:
                stored = source.parameters[name]
                recorded, file = recorded_digest(digested(stored)), digested(stored)
                before = checked.setdefault(name, [])
                if recorded is None or (
                    # A base that several adapters are put on is read once.
                    file is not stored and any(is_one(file, other) for other in before)
                ):
                    continue
                self._recorded[index, name] = recorded
                before.append(file)
        self._checked: set[Key] = set()
        self._words: dict[Key, np.ndarray] = {}
        self._elements: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def sums(self, source: Checkpoint, name: str) -> bool:
        """Returns whether a parameter's parts are to be digested as they are read."""
        stored = source.parameters[name]
        if digested(stored) is not stored:
            return False  # What is read are rows in another order, or sums: it is read once more.
        recorded = self._recorded.get((self._index(source), name))
        return recorded is not None and digest.is_digest(recorded)

    def sha256(self, name: str) -> list[TensorReader]:
        """Returns the parameters of a name that are checked by reading them once more."""
        return [
            digested(self._sources[index].parameters[name])
            for (index, other), recorded in self._recorded.items()
            if other == name and not digest.is_digest(recorded)
            if (index, name) not in self._checked
        ]

    def check_sha256(self, source: Checkpoint, name: str, sha256: str) -> None:
        """Compares the SHA-256, in hex, of all that was read of a parameter, if one is recorded.

        Raises:
            CheckpointError: It is damaged.
        """
        key, stored = (self._index(source), name), source.parameters[name]
        if digested(stored) is stored and not digest.is_digest(self._recorded.get(key, "0" * 32)):
            stored.check(sha256)
            self._checked.add(key)

    def add(self, source: Checkpoint, name: str, words: np.ndarray, elements: int) -> None:
        """Adds the digest of a part of so many elements."""
        key = self._index(source), name
        self._words[key] = digest.add(self._words.get(key, digest.NOTHING), words)
        self._elements[key] = self._elements.get(key, 0) + elements

    def check(self, processes: Processes) -> list[tuple[Checkpoint, str]]:
        """Compares the digests of all that the processes have read together.

        Returns:
            What was not read completely, as after a merge that was killed, and is to be read now:
            this process's share.

        Raises:
            CheckpointError: Naming a parameter that is damaged, and where it is.
        """
        keys = [key for key, recorded in self._recorded.items() if digest.is_digest(recorded)]
        own = {
            "words": np.array([self._words.get(k, digest.NOTHING) for k in keys], np.uint32),
            "elements": np.array([self._elements.get(k, 0) for k in keys], np.int64),
        }
        parts = processes.gather("inputs", own)
        words = np.sum([part["words"] for part in parts], axis=0, dtype=np.uint32)
        elements = np.sum([part["elements"] for part in parts], axis=0)
        unread = []
        for key, total, size in zip(keys, words, elements, strict=True):
            source, name = self._sources[key[0]], key[1]
            if size != source.parameters[name].size:
                unread.append((source, name))
            elif digest.to_hex(total) != self._recorded[key]:
                raise damaged(source, name)
        return unread[processes.index :: processes.count]

    def _index(self, source: Checkpoint) -> int:
        return next((i for i, each in enumerate(self._sources) if each is source), -1)


def damaged(source: Checkpoint, name: str) -> CheckpointError:
    """Returns the error that names a parameter whose digest is not the recorded one."""
    return CheckpointError(f"{source.path}: {name} is damaged: {_ADVICE}")


def read_and_check(source: Checkpoint, name: str, at_once: int) -> None:
    """Reads a parameter and compares its digest, if one is recorded.

    Raises:
        CheckpointError: It is damaged.
    """
    stored = digested(source.parameters[name])
    recorded = recorded_digest(stored)
    if recorded is not None and not digest.is_digest(recorded):
        stored.check(digest.sha256_of_stored(stored))
    elif recorded is not None:
        total = digest.of_stored(stored, at_once if stored.chunk else _READ)
        if digest.to_hex(total) != recorded:
            raise damaged(source, name)


def gather_digests(
    words: Mapping[str, np.ndarray], names: Sequence[str], processes: Processes
) -> dict[str, str]:
    """Returns the digests, in hex, of arrays of which every process has digested some parts."""
    own = np.array([words.get(name, digest.NOTHING) for name in names], np.uint32).reshape(-1, 4)
    parts = processes.gather("digests", {"words": own})
    total = np.sum([part["words"] for part in parts], axis=0, dtype=np.uint32)
    return {name: digest.to_hex(row) for name, row in zip(names, total, strict=True)}


def check_described(first: Checkpoint, other: Checkpoint, allowed: Sequence[str]) -> None:
    """Refuses models whose descriptions or tokenizers differ, whatever their tensors are."""
    _check_alike(first, other, ({}, {}), allowed)
