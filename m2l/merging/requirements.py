"""What a recipe needs to know of whole models before it can merge a part of a parameter.

A merge that streams counts in passes over files, a merge in memory on devices. What each has to
count, and what follows from the counts, is said here for both.
"""

import dataclasses
from types import ModuleType

import jax
import numpy as np

from m2l.merging import randomness
from m2l.merging.method_registry import METHODS, Method
from m2l.merging.recipe import Recipe
from m2l.merging.thresholds import BINS

Array = jax.Array | np.ndarray

TABLE = 1 << 16
"""Entries of a table by rank: by the upper 16 bits of a magnitude."""


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What a recipe for so many experts needs."""

    recipe: Recipe
    experts: int

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
        recipe = self.recipe
        gamma = recipe.hyper_parameters.get("gamma")
        return self.method.trims and (recipe.density < 1 or bool(gamma))

    @property
    def products(self) -> bool:
        """Whether inner products are needed, for `coefficients`."""
        return self.method.coefficients is not None

    @property
    def majority(self) -> bool:
        """Whether the signs of all masses have to be counted, for `zero_sign`."""
        return self.recipe.zero_sign.startswith("majority")

    @property
    def readings(self) -> int:
        """How many times all is read before it is merged."""
        limits = (1 + (self.recipe.scope == "tensor")) * self.limits
        return self.method.ranks + self.norms + limits + (self.products or self.majority)

    @property
    def nbytes(self) -> int:
        """Bytes of counts and tables."""
        counts = 8 * BINS * self.experts * (1 + ("ceilings" in self.method.inputs)) * 3
        return counts * self.method.trims + 8 * TABLE * self.experts * 4 * self.method.ranks

    def inputs(self, name: str, alias: str | None = None) -> dict[str, np.ndarray | np.floating]:
        """Returns the inputs of a parameter, see `kernel.Inputs`, before anything is counted.

        Args:
            name: The parameter's, by which random numbers are drawn.
            alias: Another name of it that patterns may match.
        """
        recipe, method = self.recipe, self.method
        inputs = recipe.arguments((name, alias or name), self.experts)
        if method.elects:
            inputs["zero_sign"] = np.float32(recipe.zero_sign == "positive")
        if method.trims and not self.limits:
            inputs |= self.untrimmed()
        if method.draws:
            inputs["keys"] = randomness.keys(recipe.seed, self.experts, name)
            if not method.ranks:
                inputs["cut"] = randomness.cut(recipe.drop_rate)
            if not method.ranks or self.norms:
                rate = recipe.drop_rate if recipe.rescale == "expectation" else 0
                inputs["rescale"] = np.full(self.experts, 1 / (1 - rate), np.float32)
        return inputs

    def untrimmed(self) -> dict[str, np.ndarray]:
        """Returns thresholds and ceilings that keep every entry, float32 [experts]."""
        limits = {"thresholds": np.zeros(self.experts, np.float32)}
        if "ceilings" in self.method.inputs:
            limits["ceilings"] = np.full(self.experts, np.inf, np.float32)
        return limits

    def ranks(self, size: int) -> dict[str, int]:
        """Returns how many of the largest of `size` magnitudes each limit is the least of.

        These are the entries that thresholds keep, outliers included, and those that ceilings leave
        out, before ties with the last.
        """
        if not self.limits:
            return {name: size if name == "thresholds" else 0 for name in self.untrimmed()}
        if "ceilings" not in self.method.inputs:
            return {"thresholds": self._kept(size)}
        outliers = int(size * self.recipe.gamma)
        return {"thresholds": min(size, outliers + self._kept(size)), "ceilings": outliers}

    def _kept(self, size: int) -> int:
        """Returns how many of `size` entries the density keeps."""
        recipe, floor = self.recipe, int(size * self.recipe.density)
        if recipe.keep == "complement":
            return min(size, size - int(size * (1 - recipe.density)) + 1)
        if recipe.keep == "at_least_one":
            return min(size, max(1, floor))
        return min(size, floor + (recipe.keep == "one_more"))

    def table(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Returns cuts uint32 and rescales float32, [experts, TABLE]: drop rates by rank.

        Args:
            counts: How many entries have each upper 16 bits, [experts, TABLE].
        """
        total = counts.sum(1, keepdims=True)
        below = np.cumsum(counts, 1) - counts
        ranks = (below + (counts - 1) / 2) / np.maximum(total - 1, 1)
        epsilon = self.recipe.epsilon
        rates = self.recipe.drop_rate + epsilon - 2 * epsilon * np.clip(ranks, 0, 1)
        rescales = 1 / (1 - rates) if self.recipe.rescale == "expectation" else np.ones_like(rates)
        return {"cuts": np.uint32(rates * 2**32), "rescales": np.float32(rescales)}

    def zero_sign(self, surplus: int) -> np.float32:
        """Returns the sign that is elected where masses cancel.

        Args:
            surplus: How many more of the model's masses are positive than negative.
        """
        undecided = -1 if self.recipe.zero_sign == "majority" else 0
        return np.float32(np.sign(surplus) or undecided)


def norm_rescale(l1: Array, l1_kept: Array, xp: ModuleType = np) -> Array:
    """Returns the factors that restore the L1 norms from before entries were dropped."""
    small = (l1 < 1e-7) | (l1_kept < 1e-7)
    return xp.float32(xp.where(small, 1, l1 / xp.where(small, 1, l1_kept)))


def host_counts(words: Array) -> np.ndarray:
    """Returns 64-bit counts, as words uint32 [2, ...], as int64."""
    high, low = np.asarray(words).astype(np.int64)
    return (high << 32) + low
