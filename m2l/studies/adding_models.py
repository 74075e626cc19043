"""The models of an addition: opened, compared, and merged in memory or on disk."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2l import checkpoints, merging, models, partitioning
from m2l.checkpoints import Manifest
from m2l.errors import CheckpointError
from m2l.merging import Recipe, inputs
from m2l.studies import skills


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint, and what its manifest says.

    Attributes:
        path: Its directory.
        manifest: The manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "Model":
        """Opens a checkpoint, or a training run's last one.

        Raises:
            CheckpointError: it is missing, unfinished, damaged, or a Hugging Face directory.
        """
        path = checkpoints.resolve(path)
        return cls(path, checkpoints.read_manifest(path))


def opened(general: Path, base: Path | None, trained: Path | None) -> dict[str, Model]:
    """The models by "general", "base" and, where there is one, "alone", the skill's own.

    Args:
        general: The general model.
        base: What it was trained from; None: the general model stands for it.
        trained: The skill's own.

    Raises:
        CheckpointError: one cannot be read.
        MergeError: they differ in model, parameters or vocabulary.
    """
    found = {"general": Model.open(general)}
    found["base"] = found["general"] if base is None else Model.open(base)
    if trained is not None:
        found["alone"] = Model.open(trained)
    paths = list(dict.fromkeys(model.path for model in found.values()))
    inputs.check_alike(inputs.open_all(paths, inputs.ORBAX)[0])
    return found


class Pool:
    """The models that are merged; read when they are first asked for.

    Args:
        base: The base.
        general: The general model.
        alone: The skill's own.
        method: Of skills.METHODS.
        density: What ties keeps, and dare.
    """

    def __init__(self, base: Model, general: Model, alone: Model, method: str, density: float):
        self.base, self.general, self._alone = base, general, alone
        self._method, self._density = method, density
        spec = models.spec(models.from_dict(base.manifest.model))
        self.mesh = partitioning.widest_mesh(spec)
        self._placed = partitioning.shardings(spec, self.mesh)
        self._held: dict[Path, Any] = {}

    def recipe(self, weight: float) -> Recipe:
        """How general and skill's model become one."""
        return skills.recipe(self._method, (weight,), self._density)

    def _base_of(self, recipe: Recipe) -> Model | None:
        return self.base if merging.METHODS[recipe.method].needs_base else None

    def _params(self, model: Model) -> Any:
        if model.path not in self._held:
            self._held[model.path] = self._read(model)
        return self._held[model.path]

    def _read(self, model: Model) -> Any:
        return checkpoints.restore(model.path, shardings=self._placed)

    def digest(self, weight: float) -> str:
        """What identifies the merge."""
        recipe = self.recipe(weight)
        base = self._base_of(recipe)
        experts = [self.general.manifest.digest, self._alone.manifest.digest]
        return recipe.identity(base and base.manifest.digest, experts)

    def reader(self, model: Model) -> Callable[[], Any]:
        """Gives a model's parameters; those that are merged stay in memory."""
        if model in (self.general, self._alone):
            return lambda: self._params(model)
        return lambda: self._read(model)

    def merger(self, weight: float) -> Callable[[], Any]:
        """Gives the parameters of the merge."""

        def merge() -> Any:
            recipe = self.recipe(weight)
            base = self._base_of(recipe)
            experts = [self._params(self.general), self._params(self._alone)]
            return merging.merge_params(base and self._params(base), experts, recipe)

        return merge

    def write(self, weight: float, out: Path) -> Model:
        """Makes the checkpoint of the merge, if it is not there.

        Raises:
            CheckpointError: what is there is another merge.
        """
        recipe = self.recipe(weight)
        base = self._base_of(recipe)
        used = [*([base] if base else []), self.general, self._alone]
        if not out.exists():
            paths = [self.general.path, self._alone.path]
            merging.merge(base and base.path, paths, recipe, out)
        merged = Model.open(out)
        parents = [parent["digest"] for parent in merged.manifest.parents]
        wanted = [model.manifest.digest for model in used]
        if merged.manifest.made_by.get("recipe") != recipe.to_dict() or parents != wanted:
            raise CheckpointError(f"{out}: holds another merge; delete it, and run this again")
        return merged
