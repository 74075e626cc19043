"""What must be known of whole models before a part of a parameter is merged.

A merge that streams counts it in passes over files, a merge in memory on devices.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from m2l.errors import MergeError
from m2l.merging import layerwise, randomness
from m2l.merging.method_registry import METHODS, Method
from m2l.merging.recipe import Recipe, scaled_name
from m2l.merging.thresholds import BINS
from m2l.typing import Json

Array = jax.Array | np.ndarray

TABLE = 1 << 16
"""Entries of a table by rank: by the upper 16 bits of a magnitude."""


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What a recipe for so many experts needs.

    Attributes:
        recipe: How to merge.
        experts: How many.
        names: Of every parameter of the model the names that patterns may match and layers are
            read off, the first being that by which random numbers are drawn. What is not in it
            has one name.
    """

    recipe: Recipe
    experts: int
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The recipe's."""
        return METHODS[self.recipe.method]

    @property
    def norms(self) -> bool:
        """Whether L1 norms before and after entries are dropped are needed, for `rescale`."""
        return self.method.draws and self.recipe.rescale == "norm"

    @property
    def limits(self) -> bool:
        """Whether thresholds have to be searched for."""
        values = self.recipe.hyper_parameters
        return self.method.trims and (
            "largest" in self.method.inputs
            or any(density < 1 for density in layerwise.numbers(values["density"]))
            or any(layerwise.numbers(values.get("gamma", 0.0)))
        )

    @property
    def minimum(self) -> bool:
        """Whether the least of all magnitudes is a limit itself, and not taken to be 0."""
        return "largest" in self.method.inputs

    @functools.cached_property
    def bounds(self) -> "Bounds | None":
        """What `lowest` and `highest` need, which are searched before other limits."""
        if "lowest" not in self.method.inputs:
            return None
        recipe = Recipe("breadcrumbs", scope=self.recipe.scope)
        return Bounds(recipe, self.experts, self.names)

    @property
    def products(self) -> bool:
        """Whether inner products are needed, for `coefficients`."""
        return self.method.coefficients is not None

    @property
    def pooled(self) -> bool:
        """Whether sums, for `coefficients`, are of the model and not of each parameter."""
        return self.method.sums is not None and self.recipe.scope == "model"

    @property
    def majority(self) -> bool:
        """Whether the signs of all masses have to be counted, for `zero_sign`."""
        return self.recipe.zero_sign.startswith("majority")

    def copies(self, name: str) -> bool:
        """Returns whether a parameter is that of the only expert, bit for bit."""
        if self.experts != 1 or self.method.name not in ("average", "weighted_sum"):
            return False
        return bool(np.all(self.arguments(name)["weights"] == 1))

    def readings(self, sizes: Mapping[str, int]) -> int:
        """Returns how many times all is read before it is merged.

        Args:
            sizes: Name -> elements, of all that is merged.
        """
        limits = 0
        if self.limits:
            scopes = self.scopes(sizes)
            read = sum(sizes[name] for scope in scopes for name in scope.names)
            # A sample of all of a model spares a reading.
            shared = len(scopes) > 1 or self.recipe.scope == "tensor"
            shared |= self.method.magnitudes is not None
            limits = math.ceil(read / max(1, sum(sizes.values()))) * (1 + shared)
        counted = self.method.ranks + self.norms + (self.products or self.majority)
        return counted + limits + (self.bounds.readings(sizes) if self.bounds is not None else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of counts and tables."""
        counts = 8 * BINS * self.experts * len(self.untrimmed()) * 3
        return counts * self.method.trims + 8 * TABLE * self.experts * 4 * self.method.ranks

    @functools.cached_property
    def _layers(self) -> layerwise.Layers:
        return layerwise.Layers(name for names in self.names.values() for name in names)

    def arguments(
        self, name: str, dtype: type[np.floating] = np.float32
    ) -> dict[str, np.ndarray | np.floating]:
        """Returns the method's hyper-parameters for a parameter.

        Returns:
            Scalars; arrays [experts] where the method or the recipe has one for each expert.
        """
        names = self.names.get(name, (name,))
        position = self._layers.position(names)
        arguments = {}
        for each, value in self.recipe.values_of(names).items():
            by_expert = self.method.hyper_parameters[each].per_expert or layerwise.lists(value)
            values = [
                layerwise.number(1.0 if value == () else value, names, position, expert)
                for expert in range(self.experts)
            ]
            arguments[each] = np.array(values, dtype) if by_expert else dtype(values[0])
        return arguments

    def _by_expert(self, name: str) -> dict[str, np.ndarray]:
        """Returns the method's hyper-parameters for a parameter, float64 [experts] each."""
        arguments = self.arguments(name, np.float64)
        return {each: np.broadcast_to(value, self.experts) for each, value in arguments.items()}

    def resolved(self, names: Iterable[str]) -> dict[str, dict[str, Json]]:
        """Returns the numbers of parameters where they vary: by hyper-parameter and name.

        Raises:
            MergeError: They are not allowed together, or vary over layers where there are none.
        """
        recipe, method = self.recipe, self.method
        varying = {*(scaled_name(value) for _, value in recipe.scales)}
        for each, value in recipe.hyper_parameters.items():
            if not layerwise.varies(value):
                continue
            varying.add(each)
            gradients = [v for v in layerwise.parts(value) if isinstance(v, layerwise.Gradient)]
            if gradients and not self._layers.longest:
                raise MergeError(
                    f"{each} {gradients[0]} is over layers, and no parameter's name has the number "
                    f"of one; the first is {next(iter(self.names), None)!r}"
                )
            for gradient in gradients:
                if len(gradient.points) > max(2, self._layers.longest):
                    raise MergeError(
                        f"{each} {gradient} has {len(gradient.points)} numbers for "
                        f"{self._layers.longest} layers: give at most one for each"
                    )
        numbers: dict[str, dict[str, Json]] = {each: {} for each in sorted(varying)}
        for name in names if numbers else [*names][:1]:
            arguments = self.arguments(name, np.float64)
            for each in numbers:
                numbers[each][name] = arguments[each].tolist()
            rows = [{k: float(v[e]) for k, v in self._by_expert(name).items()
                     if not method.hyper_parameters[k].per_expert}
                    for e in range(self.experts)]  # fmt: skip
            lists = {k: tuple(v.tolist()) for k, v in arguments.items()
                     if method.hyper_parameters[k].per_expert}  # fmt: skip
            for row in rows:
                if complaint := method.check(**row, **lists):
                    raise MergeError(f"{name}: {complaint}")
        return numbers

    def inputs(self, name: str) -> dict[str, np.ndarray | np.floating]:
        """Returns the inputs of a parameter, see `kernel.Inputs`, before anything is counted."""
        recipe, method = self.recipe, self.method
        inputs = self.arguments(name)
        if method.elects:
            inputs["zero_sign"] = np.float32(recipe.zero_sign == "positive")
        if method.trims and not self.limits:
            inputs |= self.untrimmed()
        if method.draws:
            rates = self._by_expert(name)["drop_rate"]
            drawn = self.names.get(name, (name,))[0]
            inputs["keys"] = randomness.keys(recipe.seed, self.experts, drawn)
            if not method.ranks:
                inputs["cut"] = np.array([randomness.cut(rate) for rate in rates], np.uint32)
            if not method.ranks or self.norms:
                rates = rates if recipe.rescale == "expectation" else 0 * rates
                inputs["rescale"] = np.float32(1 / (1 - rates))
        return inputs

    def untrimmed(self) -> dict[str, np.ndarray]:
        """Returns thresholds and ceilings that keep every entry, float32 [experts]."""
        limits = {"thresholds": np.zeros(self.experts, np.float32)}
        for name in {"ceilings", "largest"}.intersection(self.method.inputs):
            limits[name] = np.full(self.experts, np.inf, np.float32)
        return limits

    def ranks(self, size: int, name: str = "") -> dict[str, list[int]]:
        """Returns how many of the largest of `size` magnitudes each limit is the least of.

        These are the entries that thresholds keep, outliers included, and those that ceilings leave
        out, before ties with the last.

        Args:
            size: How many magnitudes.
            name: A parameter whose numbers count.

        Returns:
            By limit, one for each expert.
        """
        values = self._by_expert(name)
        counts = [self._kept(size, density) for density in values["density"].tolist()]
        if "largest" in self.method.inputs:
            return {"thresholds": counts, "largest": [min(1, size)] * self.experts}
        if "ceilings" not in self.method.inputs:
            return {"thresholds": counts}
        pairs = zip(values["gamma"].tolist(), counts, strict=True)
        outliers = [min(int(size * gamma), size - count) for gamma, count in pairs]
        both = [a + b for a, b in zip(outliers, counts, strict=True)]
        return {"thresholds": both, "ceilings": outliers}

    def _kept(self, size: int, density: float) -> int:
        """Returns how many of `size` entries a density keeps."""
        keep, floor = self.recipe.keep, int(size * density)
        if keep == "floor" and "largest" in self.method.inputs:
            return size - int(size * (1 - density))  # The last of them counts 0.
        if keep == "complement":
            return min(size, size - int(size * (1 - density)) + 1)
        if keep == "at_least_one":
            return min(size, max(1, floor))
        return min(size, floor + (keep == "one_more"))

    def scopes(self, sizes: Mapping[str, int]) -> list["Scope"]:
        """Returns what each limit is searched over.

        A parameter by itself, by the recipe's scope; or else, of each expert, all parameters whose
        numbers are equal: of most recipes the model.

        Args:
            sizes: Name -> elements, of all that is merged.
        """
        everyone = tuple(range(self.experts))
        if self.recipe.scope == "tensor":
            return [Scope((n,), everyone, self.ranks(sizes[n], n)) for n in sizes]
        if not self.recipe.varies:
            total = sum(sizes.values())
            return [Scope((*sizes,), everyone, self.ranks(total, next(iter(sizes))))]
        groups: list[dict[object, list[str]]] = [{} for _ in range(self.experts)]
        for name in sizes:
            values = self._by_expert(name)
            rows = zip(values["density"], values.get("gamma", values["density"]), strict=True)
            for by_number, row in zip(groups, rows, strict=True):
                by_number.setdefault(row, []).append(name)
        experts: dict[tuple[str, ...], list[int]] = {}
        for expert, by_number in enumerate(groups):
            for names in by_number.values():
                experts.setdefault(tuple(names), []).append(expert)
        scopes = []
        for names, members in experts.items():
            size = sum(sizes[name] for name in names)
            ranks = {
                limit: [rank if expert in members else size for expert, rank in enumerate(row)]
                for limit, row in self.ranks(size, names[0]).items()
            }
            scopes.append(Scope(names, tuple(members), ranks))
        return scopes

    def table(self, counts: np.ndarray, name: str = "") -> dict[str, np.ndarray]:
        """Returns cuts uint32 and rescales float32, [experts, TABLE]: drop rates by rank.

        Args:
            counts: How many entries have each upper 16 bits, [experts, TABLE].
            name: A parameter whose numbers count.
        """
        total = counts.sum(1, keepdims=True)
        below = np.cumsum(counts, 1) - counts
        ranks = (below + (counts - 1) / 2) / np.maximum(total - 1, 1)
        values = self._by_expert(name)
        rate, epsilon = values["drop_rate"][:, None], values["epsilon"][:, None]
        rates = rate + epsilon - 2 * epsilon * np.clip(ranks, 0, 1)
        rescales = 1 / (1 - rates) if self.recipe.rescale == "expectation" else np.ones_like(rates)
        return {"cuts": np.uint32(rates * 2**32), "rescales": np.float32(rescales)}

    def alike(self, names: Iterable[str]) -> list[list[str]]:
        """Returns the parameters in groups of equal drop rates."""
        if not self.recipe.varies:
            return [[*names]]
        groups: dict[tuple[bytes, bytes], list[str]] = {}
        for name in names:
            values = self._by_expert(name)
            key = values["drop_rate"].tobytes(), values["epsilon"].tobytes()
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def zero_sign(self, surplus: int) -> np.float32:
        """Returns the sign that is elected where masses cancel.

        Args:
            surplus: How many more of the model's masses are positive than negative.
        """
        undecided = -1 if self.recipe.zero_sign == "majority" else 0
        return np.float32(np.sign(surplus) or undecided)


OUTLIERS = 1e-4
"""The share of the smallest entries, and of the largest, that `lowest` and `highest` leave out."""


class Bounds(Requirements):
    """What is needed of the task vectors' magnitudes for `lowest` and `highest`.

    The recipe is one of a method that takes two limits of these.
    """

    @property
    def limits(self) -> bool:
        """Whether limits have to be searched for, which these always have."""
        return True

    @property
    def minimum(self) -> bool:
        """Whether the least of all magnitudes is a limit itself: `lowest` of few entries is."""
        return True

    def untrimmed(self) -> dict[str, np.ndarray]:
        """Returns bounds that leave out no entry, float32 [experts]."""
        zeros = np.zeros(self.experts, np.float32)
        return {"lowest": zeros, "highest": zeros + np.float32(np.inf)}

    def ranks(self, size: int, name: str = "") -> dict[str, list[int]]:
        """Returns the rank of each bound among `size` magnitudes, from the largest."""
        # From the least entry on the authors' code counts int(d r) and int(d (1 - r) - 1), from 0.
        lowest, highest = int(size * OUTLIERS), int(size * (1 - OUTLIERS) - 1)
        ranks = {"lowest": size - lowest, "highest": min(size, size - highest)}
        return {name: [rank] * self.experts for name, rank in ranks.items()}


class Scope(NamedTuple):
    """Parameters over which limits are searched together.

    Attributes:
        names: Theirs, in order.
        experts: Of which experts.
        ranks: By limit, of each expert, the rank of its magnitude among theirs; of other experts
            one that needs no search.
    """

    names: tuple[str, ...]
    experts: tuple[int, ...]
    ranks: dict[str, list[int]]


def norm_rescale(l1: Array, l1_kept: Array, xp: ModuleType = np) -> Array:
    """Returns the factors that restore the L1 norms from before entries were dropped."""
    small = (l1 < 1e-7) | (l1_kept < 1e-7)
    return xp.float32(xp.where(small, 1, l1 / xp.where(small, 1, l1_kept)))


def host_counts(words: Array) -> np.ndarray:
    """Returns 64-bit counts, as words uint32 [2, ...], as int64."""
    high, low = np.asarray(words).astype(np.int64)
    return (high << 32) + low
