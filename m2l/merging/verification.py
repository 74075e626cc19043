"""Proves that a recipe made a model: what it gives is computed anew, and compared bit for bit."""

import dataclasses
import fnmatch
import json
import os
import random
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from m2l import hub_models, storage
from m2l.checkpoints import huggingface_directory, opening, reading
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.opening import HUGGINGFACE, ORBAX, Checkpoint
from m2l.checkpoints.reading import EXPORTED
from m2l.checkpoints.spans import Span, cut
from m2l.distributed import rank
from m2l.errors import MergeError
from m2l.merging import engine
from m2l.merging.inputs import memory_of
from m2l.merging.job import MergeJob, prepare
from m2l.merging.method_registry import METHODS
from m2l.merging.outputs import MemoryResult, Task, Unit
from m2l.merging.recipe import Recipe
from m2l.merging.slices import Slices
from m2l.typing import Json

_CARD = "README.md"
_SETTING = re.compile(
    r"\| ((?:recipe\.|slices|allowed_differences|subtree|exported\.)\S*) \| (.*) \|"
)
_ROLES = ("base", "expert", "statistics")


@dataclasses.dataclass(frozen=True)
class ParameterDifference:
    """Where a parameter is not what the recipe gives.

    Attributes:
        parameter: Its name.
        index: The index of the first element that differs, of those that were compared.
        expected: What the recipe gives there.
        stored: What the model has there.
        count: How many elements differ.
    """

    parameter: str
    index: tuple[int, ...]
    expected: float
    stored: float
    count: int

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return (
            f"{self.parameter}[{place}]: the recipe gives {self.expected!r}, the model has "
            f"{self.stored!r}; {self.count:,} elements of the parameter differ"
        )


@dataclasses.dataclass(frozen=True)
class Verification:
    """What came of comparing a model with its recipe.

    Attributes:
        parameters: How many parameters were compared, wholly or in part.
        compared: How many elements.
        size: How many elements the model has.
        differences: One for each parameter that differs, in the model's order.
    """

    parameters: int
    compared: int
    size: int
    differences: tuple[ParameterDifference, ...]


class ComparedResult(MemoryResult):
    """A result that is compared with a model that is there, and kept nowhere.

    Args:
        job: What makes it.
        merged: The model that is there.
        only: Patterns of the names of parameters to compare; empty: all.
        share: How many of the blocks, from 0 to 1; of each parameter at least one.
        seed: Chooses them.
        exported: Whether the model was cast on its way out, as its dtypes say.

    Raises:
        MergeError: The two have not the same parameters.
    """

    def __init__(
        self,
        job: MergeJob,
        merged: Checkpoint,
        *,
        only: Sequence[str],
        share: float,
        seed: int,
        exported: bool,
    ):
        self.described, self.arrays = job.described, {}
        self._merged, self._lock = merged.parameters, threading.Lock()
        self._differences: dict[str, tuple[int, float, float, int]] = {}
        self._check(merged, exported)
        chosen = random.Random(seed)
        self._spans: dict[str, list[Span]] = {}
        unmatched = set(only)
        for name, (shape, _) in self.described.items():
            known = (name, merged.name_of(name)[0])
            matching = {p for p in only if any(fnmatch.fnmatchcase(n, p) for n in known)}
            unmatched -= matching
            if only and not matching:
                continue
            cells = job.grid(name)
            spans = [*cut(name, shape, cells, job.plan.at_once if cells else job.plan.block)]
            count = min(len(spans), max(1, round(share * len(spans))))
            self._spans[name] = [
                spans[place] for place in sorted(chosen.sample(range(len(spans)), count))
            ]
        if unmatched:
            raise MergeError(f"{merged.path}: no parameter matches {', '.join(sorted(unmatched))}")

    def _check(self, merged: Checkpoint, exported: bool) -> None:
        for names, place, there in (
            (self.described, merged.path, self._merged),
            (self._merged, "the recipe's result", self.described),
        ):
            if missing := [name for name in names if name not in there]:
                raise MergeError(
                    f"{merged.path}: {len(missing)} parameters are not in {place}: "
                    f"{', '.join(missing[:3])}"
                )
        for name, (shape, dtype) in self.described.items():
            stored = self._merged[name]
            if tuple(stored.shape) != shape or (stored.dtype != dtype and not exported):
                raise MergeError(
                    f"{merged.path}: {name} is {stored.dtype}{list(stored.shape)}; the recipe "
                    f"gives {dtype}{list(shape)}"
                )

    def units(self) -> list[Unit]:
        """Returns a unit for each parameter that is compared."""
        return [Unit((n, 0), sum(s.size for s in spans)) for n, spans in self._spans.items()]

    def tasks(self, units: Sequence[Unit], block: int, at_once: int) -> Iterator[Task]:
        """Yields a task for each block that was chosen."""
        for unit in units:
            for span in self._spans[unit.key[0]]:
                yield Task(span.name, (span,), (unit,))

    def whole(self, units: Sequence[Unit], name: str) -> Task:
        """Returns the task of a parameter that is made, and so compared, at once."""
        unit = next(unit for unit in units if unit.key[0] == name)
        size = self._merged[name].size
        self._spans[name] = [Span(name, 0, size)]
        return Task(name, (Span(name, 0, size),), (unit,))

    def write(self, task: Task, part: np.ndarray) -> None:
        """Compares what a task has made with what is stored there."""
        (span,), stored = task.spans, self._merged[task.name]
        there = np.empty(span.size, stored.dtype)
        stored.read_span(span, there)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = part.astype(stored.dtype, copy=False)
        bits = f"u{stored.dtype.itemsize}"
        differs = np.flatnonzero(expected.view(bits) != there.view(bits))
        if not differs.size:
            return
        first = min(map(int, differs), key=span.position) if span.rows > 1 else int(differs[0])
        new = (span.position(first), float(expected[first]), float(there[first]), differs.size)
        with self._lock:
            old = self._differences.get(task.name)
            nearest = new if old is None else min(old, new)
            count = new[3] + (old[3] if old else 0)
            self._differences[task.name] = (*nearest[:3], count)

    def outcome(self) -> Verification:
        """Returns what came of it."""
        differences = []
        for name in self.described:
            if name in self._differences:
                position, expected, stored, count = self._differences[name]
                index = np.unravel_index(position, self.described[name][0])
                place = tuple(int(axis) for axis in index)
                differences.append(ParameterDifference(name, place, expected, stored, count))
        spans = [span for parts in self._spans.values() for span in parts]
        return Verification(
            parameters=len(self._spans),
            compared=sum(span.size for span in spans),
            size=sum(self._merged[name].size for name in self.described),
            differences=tuple(differences),
        )


def verify(
    merged: str | os.PathLike,
    base: str | os.PathLike | None = None,
    experts: Sequence[str | os.PathLike] = (),
    *,
    statistics: Sequence[str | os.PathLike] = (),
    subtree: str | None = None,
    recipe: Recipe | None = None,
    only: Sequence[str] = (),
    share: float = 1.0,
    seed: int = 0,
    memory: int | None = None,
    progress: bool = True,
) -> Verification:
    """Computes a merge anew, by the recipe in its manifest or card, and compares every bit.

    A model whose digest is not the recorded one is warned of, and compared all the same: the same
    weights in another format have another.

    Args:
        merged: The model: an m2l checkpoint or a Hugging Face directory.
        base: The base; None: where the manifest says that it was, if there was one.
        experts: The experts, in order; empty: where they were. Of slices, with the base, the models
            in the manifest's order.
        statistics: Of each expert; empty: where they were.
        subtree: Of pytrees that Orbax stored, the part that was merged; None: as recorded.
        recipe: How it was merged; None: as its manifest says, or else its card.
        only: Patterns of the names of parameters to compare; empty: all.
        share: How many of the blocks to compare, from 0 to 1; of each parameter at least one.
            Thresholds are of whole models, and take as many readings as when merging. The inputs'
            own digests are checked where all is compared.
        seed: Chooses the blocks.
        memory: Bytes that the process may hold.
        progress: Whether to show a progress bar.

    Raises:
        MergeError: There is no recipe; or models are missing, or do not fit it; or several
            processes have joined.
        CheckpointError: A model is missing or damaged.
    """
    if rank()[1] > 1:
        raise MergeError("a recipe is verified by one process; this is one of several")
    if not 0 < share <= 1:
        raise MergeError(f"a share of {share:g}: it is above 0, and at most 1")
    merged = hub_models.located(merged)
    manifest = _manifest(merged)
    made_by = _card(merged) if manifest is None else manifest.made_by
    if recipe is None:
        recipe = _recipe(merged, made_by)
    parents = () if manifest is None else manifest.parents
    paths = {role: [p["path"] for p in parents if p["role"] == role] for role in _ROLES}
    slices = None
    if "slices" in made_by:
        slices = Slices.from_json(made_by["slices"])
        named = [*([] if base is None else [base]), *experts] or slices.paths
        _check_count(merged, "models", slices.paths, named)
        models = [hub_models.located(path) for path in named]
        slices = slices.at(dict(zip(slices.paths, map(str, models), strict=True)))
        inputs = [part.path for part in slices.slices[0].parts]
        first = int(METHODS[recipe.method].needs_base)
        base, experts = (inputs[0] if first else None), inputs[first:]
    else:
        base = base or next(iter(paths["base"]), None)
        experts = experts or paths["expert"]
        _check_count(merged, "experts", paths["expert"] if parents else experts, experts)
        base = None if base is None else hub_models.located(base)
        experts = [hub_models.located(expert) for expert in experts]
        models = [*([] if base is None else [base]), *experts]
    is_export = EXPORTED in made_by
    kinds = {opening.kind(path) for path in (merged, *models)}
    native = kinds == {HUGGINGFACE} and not is_export
    allowed = made_by.get("allowed_differences", ())
    opened = opening.open(merged, native=native, allowed=allowed)
    job = prepare(
        base,
        experts,
        recipe,
        statistics=statistics or paths["statistics"],
        subtree=subtree or made_by.get("subtree"),
        output_format=HUGGINGFACE if native else ORBAX,
        memory=None if memory is None else memory - memory_of(opened),
        allow_differences=allowed,
        slices=slices,
        verify=share == 1 and not only,
        in_memory=False,
    )
    sources = [*job.parts] if slices else [*job.experts]
    if slices is None and base is not None:
        sources = [job.reference, *sources]
    unrecorded = slices is None and base is not None and not paths["base"]
    sources = [*sources[unrecorded:], *job.statistics] if parents else []
    for parent, source in zip(parents, sources, strict=True):
        if source.digest != parent["digest"]:
            warnings.warn(
                f"{source.path}: its digest is {source.digest[:16]}, and that of the "
                f"{parent['role']} of the merge was {parent['digest'][:16]}",
                stacklevel=2,
            )
    comparison = ComparedResult(
        job,
        opened,
        only=only,
        share=share,
        seed=seed,
        exported=is_export and made_by[EXPORTED].get("dtype") is not None,
    )
    engine.compute(job, comparison, progress)
    return comparison.outcome()


def _check_count(merged: storage.AnyPath, kind: str, recorded: Sequence, named: Sequence) -> None:
    if not named:
        raise MergeError(f"{merged}: name the base and the experts that it was merged from")
    if len(recorded) != len(named):
        raise MergeError(f"{merged} was merged from {len(recorded)} {kind}, not from {len(named)}")


def _manifest(merged: storage.AnyPath) -> Manifest | None:
    if opening.kind(merged) == HUGGINGFACE:
        known = (merged / huggingface_directory.MANIFEST).is_file()
        return huggingface_directory.read_manifest(merged) if known else None
    return reading.read_manifest(merged) if opening.has_manifest(merged) else None


def _card(merged: storage.AnyPath) -> dict[str, Json]:
    """Returns what the table of a card says of how a model was made; empty without one."""
    made_by: dict[str, Json] = {}
    card = merged / _CARD
    if not card.is_file():
        return made_by
    for name, text in _SETTING.findall(card.read_text()):
        place = made_by
        *outer, last = name.split(".")
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = _parsed(text.replace("\\|", "|"))
    return {"kind": "merge", **made_by} if "recipe" in made_by else made_by


def _recipe(merged: storage.AnyPath, made_by: Mapping[str, Json]) -> Recipe:
    if not made_by:
        raise MergeError(
            f"{merged}: neither a manifest of m2l nor a card that says how it was merged: --recipe"
        )
    if made_by.get("kind") != "merge":
        kind = made_by.get("kind", "something else")
        raise MergeError(f"{merged}: no recipe made it, but: {kind}")
    return Recipe.from_dict(made_by["recipe"], f"{merged}: its recipe")


def _parsed(text: str) -> Json:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
