"""How to merge, as data: checked when it is made, kept in the manifest of what it makes."""

import dataclasses
import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2l import files, storage
from m2l.errors import MergeError, UnknownNameError
from m2l.merging.method import REQUIRED, Consensus
from m2l.merging.methods import METHODS

SCOPES = ("model", "tensor")
DTYPES = ("float32", "bfloat16", "float16")
CONSENSUS = ("mean", "sum", "max")
ZERO_SIGNS = ("none", "positive", "majority", "majority_or_none")
KEEPS = ("floor", "at_least_one", "one_more", "complement")
RESCALES = ("expectation", "norm", "none")

_HYPER_PARAMETERS = (
    "density", "scale", "drop_rate", "epsilon", "gamma", "t", "weights", "floor",
    "nondiagonal_scale",
)  # fmt: skip
_RANGES = {
    "density": (lambda x: 0 < x <= 1, "above 0 and at most 1 (20 % is 0.2)"),
    "drop_rate": (lambda x: 0 <= x < 1, "at least 0 and below 1 (90 % is 0.9)"),
    "epsilon": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "gamma": (lambda x: 0 <= x < 1, "at least 0 and below 1 (1 % is 0.01)"),
    "nondiagonal_scale": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "floor": (lambda x: 0 <= x < math.inf, "at least 0"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A merge method with its hyper-parameters. Those left out take the method's defaults.

    The last five settings are where codebases differ; the defaults are the papers', and
    `presets.PRESETS` has those of others.

    Attributes:
        method: One of METHODS.
        density: The share of each task vector that is kept, in (0, 1]. Defaults: 0.2 for ties, as
            its paper; 1 for dare_ties, which then does not trim; 0.9 for breadcrumbs.
        scale: lambda. 1 by default, what TIES recommends without validation data; with it, sweep
            0.8 to 2.5 for ties and 0.1 to 1 for task_arithmetic, which sums and so overshoots with
            many experts. Below 0 it forgets what the experts learned.
        drop_rate: p of dare, dare_ties and della, in [0, 1). There is no agreed default (0.1 to 0.9
            are in use), so it must be given.
        epsilon: della's drop rates go from p + epsilon to p - epsilon.
        gamma: The share of largest entries that breadcrumbs leaves out.
        t: linear and slerp: how far from the first model (0) to the second (1).
        weights: One number per expert; equal by default.
        floor: The least Fisher information an entry counts with.
        nondiagonal_scale: What regmean multiplies Grams by off their diagonals.
        scales: (pattern, scale) or (pattern, weights): what parameters that match the shell pattern
            take instead of `scale` or `weights`. The first pattern that matches counts.
        seed: Of the random drops; methods that draw nothing ignore it.
        scope: What "the largest entries" are taken over: "model", all parameters of an expert as in
            the papers (and the default, but for breadcrumbs and della), or "tensor", each parameter
            by itself as mergekit and PEFT do.
        dtype: Of the result; the arithmetic is always float32.
        exclude: Patterns (`token_embedder`, `*norm`, as in a shell) of parameters that are not
            merged but taken from the base, or from the first expert where there is no base. They do
            not count among the largest entries either.
        consensus: What TIES and its kin do with entries that agree: "mean", "sum" or "max".
        weighted_signs: Whether the weights count in the election of signs.
        zero_sign: Which sign is elected where masses cancel exactly: "none" (the entry is the
            base's), "positive", or "majority": that of most of the model's other entries; where
            those cancel too it is negative, or, with "majority_or_none", none.
        keep: How many of d entries density keeps: "floor" int(d density), "at_least_one" that but
            not none, "one_more" that and one, "complement" d - int(d (1 - density)) + 1; entries
            that tie with the last are all kept.
        rescale: What is done to entries that are not dropped: "expectation" divides them by
            1 - p, "norm" multiplies them so that the parameter's L1 norm stays, "none" nothing.

    Raises:
        MergeError: A setting is of the wrong type, out of range, missing, or not the method's.
        UnknownNameError: The method is not known.
    """

    method: str
    density: float | None = None
    scale: float | None = None
    drop_rate: float | None = None
    epsilon: float | None = None
    gamma: float | None = None
    t: float | None = None
    weights: tuple[float, ...] | None = None
    floor: float | None = None
    nondiagonal_scale: float | None = None
    scales: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
    seed: int = 0
    scope: str | None = None
    dtype: str = "float32"
    exclude: tuple[str, ...] = ()
    consensus: str = "mean"
    weighted_signs: bool = False
    zero_sign: str = "none"
    keep: str = "floor"
    rescale: str = "expectation"

    def __post_init__(self):
        if self.method not in METHODS:
            raise UnknownNameError("merge method", str(self.method), METHODS)
        method = METHODS[self.method]
        for name in _HYPER_PARAMETERS:
            given = getattr(self, name)
            if given is not None and name not in method.hyper_parameters:
                known = ", ".join(method.hyper_parameters) or "none"
                raise MergeError(f"{self.method} has no {name}; its settings are: {known}")
            value = method.hyper_parameters.get(name) if given is None else given
            if value is REQUIRED:
                raise MergeError(f"{self.method} needs a {name}; none is agreed on, so give one")
            self._set(name, value if value is None else self._checked(name, value))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise MergeError(f"seed must be a whole number, not {self.seed!r}")
        scoped = method.trims or method.ranks
        if self.scope not in (None, "model") and not scoped:
            raise MergeError(f"{self.method} does not trim, so scope {self.scope!r} means nothing")
        by_tensor = method.ranks or "ceilings" in method.takes
        self._set("scope", self.scope or ("tensor" if by_tensor else "model"))
        for name, known in (
            ("scope", SCOPES),
            ("dtype", DTYPES),
            ("consensus", CONSENSUS),
            ("zero_sign", ZERO_SIGNS),
            ("keep", KEEPS),
            ("rescale", RESCALES),
        ):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), known)
        self._check_variants()
        if isinstance(self.exclude, str) or not all(isinstance(e, str) for e in self.exclude):
            raise MergeError(f"exclude must be a list of patterns, not {self.exclude!r}")
        self._set("exclude", tuple(self.exclude))
        self._set("scales", self._checked_scales())

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_variants(self) -> None:
        method = METHODS[self.method]
        for name, applies in (
            ("consensus", method.elects),
            ("weighted_signs", method.elects),
            ("zero_sign", method.elects),
            ("keep", method.trims),
            ("rescale", method.draws),
        ):
            default = getattr(type(self), name)
            if getattr(self, name) != default and not applies:
                raise MergeError(f"{self.method} has no {name}")
        if not isinstance(self.weighted_signs, bool):
            raise MergeError(f"weighted_signs must be true or false, not {self.weighted_signs!r}")
        if self.epsilon is not None:
            least, most = self.drop_rate - self.epsilon, self.drop_rate + self.epsilon
            if least < 0 or most >= 1:
                raise MergeError(
                    f"drop_rate {self.drop_rate} with epsilon {self.epsilon}: the rates from "
                    f"{least:g} to {most:g} must be at least 0 and below 1"
                )
        if self.gamma is not None and self.gamma + self.density > 1:
            raise MergeError(
                f"density {self.density} with gamma {self.gamma}: together above 1, which is all"
            )

    def _checked(self, name: str, value: Any) -> Any:
        if name == "weights":
            if isinstance(value, str) or not isinstance(value, list | tuple) or not value:
                raise MergeError(f"weights must be a list of numbers, not {value!r}")
            weights = tuple(self._checked("weight", weight) for weight in value)
            if self.method == "average" and math.fsum(weights) == 0:
                raise MergeError(f"weights must not sum to zero: {list(weights)}")
            if self.method == "fisher" and min(weights) <= 0:
                raise MergeError(f"weights of fisher must be above 0: {list(weights)}")
            return weights
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MergeError(f"{name} must be a number, not {value!r}")
        within, words = _RANGES.get(name, (math.isfinite, "finite"))
        if not within(value) or not math.isfinite(value):
            raise MergeError(f"{name} must be {words}, not {value!r}")
        return float(value)

    def _checked_scales(self) -> tuple[tuple[str, float | tuple[float, ...]], ...]:
        hyper = METHODS[self.method].hyper_parameters
        checked = []
        for entry in self.scales:
            if isinstance(entry, str) or len(entry) != 2 or not isinstance(entry[0], str):
                raise MergeError(f"scales must be pairs of a pattern and a scale, not {entry!r}")
            pattern, value = entry
            name = "weights" if isinstance(value, list | tuple) else "scale"
            if name not in hyper:
                raise MergeError(f"{self.method} has no {name}, and so none for {pattern!r}")
            checked.append((pattern, self._checked(name, value)))
        return tuple(checked)

    @property
    def election(self) -> Consensus:
        """How signs are elected, for `methods.elect_and_merge`."""
        return Consensus(self.consensus, self.weighted_signs)

    def weights_for(self, experts: int) -> np.ndarray:
        """The weights, float32 [experts]; ones where none are given."""
        return np.array(self.weights or (1.0,) * experts, np.float32)

    def settings_for(self, names: Sequence[str], experts: int) -> dict[str, Any]:
        """The numbers that the method takes for a parameter that is known by these names."""
        method = METHODS[self.method]
        found: dict[str, Any] = {
            name: np.float32(getattr(self, name))
            for name in ("scale", "t", "floor")
            if name in method.takes
        }
        if "weights" in method.takes:
            found["weights"] = self.weights_for(experts)
        for pattern, value in self.scales:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                if isinstance(value, tuple):
                    return found | {"weights": np.array(value, np.float32)}
                return found | {"scale": np.float32(value)}
        return found

    def identity(self, base: str | None, experts: Sequence[str]) -> str:
        """The digest of what this makes of checkpoints with these digests: sha256 over all."""
        made_of = json.dumps([base, list(experts), self.to_dict()], sort_keys=True)
        return hashlib.sha256(made_of.encode()).hexdigest()

    def kept_of(self, size: int) -> int:
        """How many of `size` entries the density keeps, before ties with the last."""
        if self.keep == "complement":
            return min(size, size - int(size * (1 - self.density)) + 1)
        floor = int(size * self.density)
        if self.keep == "at_least_one":
            return min(size, max(1, floor))
        return min(size, floor + (self.keep == "one_more"))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-like data, defaults filled in and without what the method has not."""
        method = METHODS[self.method]
        variants = {
            "scope": method.trims or method.ranks,
            "consensus": method.elects,
            "weighted_signs": method.elects,
            "zero_sign": method.elects,
            "keep": method.trims,
            "rescale": method.draws,
            "seed": method.draws,
        }
        return json.loads(
            json.dumps(
                {
                    name: value
                    for name, value in dataclasses.asdict(self).items()
                    if value is not None and variants.get(name, True)
                }
            )
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the recipe") -> "Recipe":
        """A recipe of JSON-like data, such as a manifest holds.

        Raises:
            MergeError: A setting is unknown, or as the class says.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UnknownNameError(f"setting in {where}:", name, known)
        if "method" not in values:
            raise MergeError(f"{where}: it names no method")
        return cls(**{name: _tuples(value) for name, value in values.items()})

    @classmethod
    def read(cls, file: Path, **overriding: Any) -> "Recipe":
        """The recipe in a JSON file, some settings overridden.

        Raises:
            MergeError: It cannot be read, or as `from_dict` says.
        """
        file = storage.path(file)
        advice = "if it was edited on purpose, remove its checksum"
        values = files.read_record(
            file, required=False, finite=True, error=MergeError, advice=advice
        )
        values = values.get("recipe", values)
        if not isinstance(values, dict):
            raise MergeError(f"{file}: its recipe is not a JSON object")
        return cls.from_dict(values | overriding, str(file))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
