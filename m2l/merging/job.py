"""A merge that was checked and planned, before a byte is read."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2l import checkpoints, files, storage
from m2l.checkpoints import Manifest, huggingface_directory
from m2l.checkpoints.opening import HUGGINGFACE, ORBAX, Checkpoint
from m2l.checkpoints.reading import EXPORTED, KEY, existing_result
from m2l.distributed import rank
from m2l.errors import MergeError
from m2l.merging import compatibility, data_driven, plan, results, sources
from m2l.merging.compatibility import Roles
from m2l.merging.methods import METHODS
from m2l.merging.plan import Plan
from m2l.merging.recipe import Recipe
from m2l.merging.thresholds import BINS
from m2l.version import __version__


@dataclasses.dataclass(frozen=True)
class Job:
    """A merge that was checked, and can be planned or done.

    Attributes:
        recipe: How to merge.
        base: The base; None without one.
        experts: The experts.
        statistics: A statistic of each expert, if the method needs them.
        reference: Whose parameters are copied where they are not merged.
        roles: How each tensor of the result comes about.
        allowed: Fields that may differ between the models.
        to: The format to write.
        out: Where.
        vocabulary: Of an m2l checkpoint to be written.
        sizes: Name -> elements of all that is merged, in order.
        mine: The names of which this process counts what must be known before.
        process: Which of how many processes this is.
        diagnostics: Whether to measure the task vectors.
        verify: Whether to check the inputs' digests.
        plan: What it will take.
    """

    recipe: Recipe
    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]
    statistics: tuple[Checkpoint, ...]
    reference: Checkpoint
    roles: Roles
    allowed: tuple[str, ...]
    to: str
    out: Path
    vocabulary: Mapping[str, Any] | None
    sizes: Mapping[str, int]
    mine: frozenset[str]
    process: tuple[int, int]
    diagnostics: bool
    verify: bool
    plan: Plan

    @property
    def key(self) -> str:
        """What is merged and how: equal for merges that give the same files."""
        content = {
            "m2l": __version__,
            "recipe": self.recipe.to_dict(),
            "inputs": [s.digest for s in (*self.used, self.reference)],
            "to": self.to,
            "diagnostics": self.diagnostics,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """What decides the files of the result; of a result, it is in the manifest."""
        content = {
            "recipe": self.recipe.to_dict(),
            "inputs": [[s.format, s.digest] for s in (*self.used, self.reference)],
            "to": self.to,
            "vocabulary": self.vocabulary,
            "diagnostics": self.diagnostics,
            "allowed": self.allowed,
        }
        if self.to == HUGGINGFACE:
            # The result has this model's tokenizer and settings as well.
            path = self.roles.files.path
            content["files"] = files.directory_digest(path if path.is_dir() else path.parent)
        return files.checksum(content)

    def finished(self, exported: Mapping[str, Any] | None = None) -> Manifest | None:
        """Returns the manifest of `out` if this very merge made it; None if there is nothing.

        Args:
            exported: The options with which the merge was exported, where it was.

        Raises:
            CheckpointError: Something else is there, or it is damaged.
        """

        def is_same(manifest: Manifest) -> bool:
            made_by = manifest.made_by
            key, options = made_by.get(KEY), made_by.get(EXPORTED)
            return (key, options) == (self.identity, exported)

        is_directory = exported is not None or self.to == HUGGINGFACE
        name = huggingface_directory.MANIFEST if is_directory else None
        return existing_result(self.out, is_same, name)

    @property
    def used(self) -> list[Checkpoint]:
        """The models that are read for what is merged, in the order in which blocks are."""
        first = [] if self.base is None else [self.base]
        return [*first, *self.experts, *self.statistics]


def prepare(
    base: str | os.PathLike | None,
    experts: Sequence[str | os.PathLike],
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    statistics: Sequence[str | os.PathLike] = (),
    to: str | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    memory: int | None = None,
    block: int | None = None,
    process: tuple[int, int] | None = None,
    diagnostics: bool = True,
    verify: bool = True,
    allow_differences: Sequence[str] = (),
    subtree: str | None = None,
) -> Job:
    """Checks all that can be checked before a byte is read, and plans; see `merge`."""
    process = process or rank()
    if not 0 <= process[0] < process[1]:
        raise MergeError(f"process {process[0]} of {process[1]}: counted from 0")
    compatibility.check_counts(base is not None, len(experts), len(statistics), recipe)
    paths = [storage.path(path).absolute() for path in ([] if base is None else [base])]
    paths += [storage.path(path).absolute() for path in experts]
    named = METHODS[recipe.method].draws or bool(recipe.exclude or recipe.scales)
    opened, to = sources.open_all(
        paths, to, named=named, allowed=allow_differences, subtree=subtree
    )
    beside, _ = sources.open_all([storage.path(path).absolute() for path in statistics], ORBAX)
    of_base, of_experts = (None, opened) if base is None else (opened[0], opened[1:])
    reference = of_experts[0] if of_base is None else of_base
    out = storage.path(out).absolute()
    compatibility.check_destination(out, [source.path for source in (*opened, *beside)])
    roles = compatibility.assign_roles(opened, len(experts), recipe, allow_differences)
    compatibility.check_statistics(METHODS[recipe.method], of_experts, beside)
    if to == ORBAX:
        vocabulary = vocabulary or _vocabulary([*of_experts, *([of_base] if of_base else [])])
        checkpoints.check_tokenizer(vocabulary)
    names = roles.merged
    sizes = {name: reference.parameters[name].size for name in names}
    method = METHODS[recipe.method]
    # A base that the method does not take is read only for what is copied.
    of_base = of_base if method.needs_base else None
    diagnostics = diagnostics and method.needs_base and any(sizes.values())
    compatibility.warn_of_repetition([s for s in (of_base, *of_experts) if s is not None])
    shares = plan.shares(sizes, process[1])
    described = results.described(reference, recipe.dtype, roles)
    used = [s for s in (of_base, *of_experts, *beside) if s is not None]
    mine = frozenset(shares[process[0]])
    readings = _readings(recipe)
    planned = plan.make(
        used,
        sizes,
        [name for name in names if name in mine],
        described=described,
        readings=readings,
        verify=verify and any(s.has_digests for s in used),
        states=_states(recipe, len(of_experts)),
        memory=memory,
        block=block,
        whole=_whole(reference, beside, names) if method.whole else 0,
        to_orbax=to == ORBAX,
        out=out,
    )
    return Job(
        recipe,
        of_base,
        tuple(of_experts),
        tuple(beside),
        reference,
        roles,
        tuple(allow_differences),
        to,
        out,
        vocabulary,
        sizes,
        mine,
        process,
        diagnostics,
        verify,
        dataclasses.replace(planned, experts=len(of_experts)),
    )


def _readings(recipe: Recipe) -> int:
    """How many times all is read before it is merged."""
    method = METHODS[recipe.method]
    trims = method.trims and (recipe.density < 1 or bool(recipe.gamma))
    return (
        int(method.ranks)
        + (1 + (recipe.scope == "tensor")) * trims
        + (method.coefficients is not None or recipe.zero_sign.startswith("majority"))
        + (method.draws and recipe.rescale == "norm")
    )


def _states(recipe: Recipe, experts: int) -> int:
    """Bytes of counts and tables."""
    method = METHODS[recipe.method]
    counts = 8 * BINS * experts * (1 + ("ceilings" in method.takes)) * 3 if method.trims else 0
    return counts + (8 << 16) * experts * 4 * method.ranks


def _whole(reference: Checkpoint, statistics: Sequence[Checkpoint], names: Sequence[str]) -> int:
    """The most bytes that a kernel takes which is merged whole, with its Grams."""
    grams = statistics[0].parameters
    return max(
        (
            data_driven.regmean_bytes(reference.parameters[name].shape, grams[name].shape[0])
            for name in names
            if name in grams
        ),
        default=0,
    )


def _vocabulary(candidates: Sequence[Checkpoint]) -> Mapping[str, Any]:
    # As the experts read it: the base may have been trained without their chat template.
    for source in candidates:
        if source.vocabulary is not None:
            return source.vocabulary
    if not any(source.model for source in candidates):
        # Of pytrees that m2l did not write; such a result can be merged, and not evaluated.
        return {"name": None, "size": None, "fingerprint": None}
    raise MergeError(
        f"{candidates[0].path}: its vocabulary is not known to m2l: name the tokenizer with "
        "--vocabulary, or write --to huggingface"
    )
