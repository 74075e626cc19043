"""How to merge, as data: checked when it is made, kept in the manifest of what it makes."""

import dataclasses
import math
from typing import Any

import numpy as np

from m2l.errors import MergeError, UnknownNameError
from m2l.merging.methods import METHODS, REQUIRED

SCOPES = ("model", "tensor")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A merge method with its hyper-parameters. Those left out take the method's defaults.

    Attributes:
        method: average, task_arithmetic, ties or dare_ties.
        density: The share of each task vector that ties and dare_ties keep, in (0, 1]. Defaults:
            0.2 for ties, as its paper; 1 for dare_ties, which then does not trim.
        scale: lambda. 1 by default, what TIES recommends without validation data; with it, sweep
            0.8 to 2.5 for ties and 0.1 to 1 for task_arithmetic, which sums and so overshoots with
            many experts.
        drop_rate: p of dare_ties, in [0, 1). There is no agreed default (0.1 to 0.9 are in use), so
            it must be given.
        weights: One number per expert, for average and task_arithmetic; equal by default.
        seed: Of the random drops; methods that draw nothing ignore it.
        scope: What "the largest entries" are taken over: "model", all parameters of an expert as in
            the papers, or "tensor", each parameter by itself as mergekit and PEFT do.
        dtype: Of the result; the arithmetic is always float32.
        exclude: Patterns (`token_embedder`, `*norm`, as in a shell) of parameters that are not
            merged but taken from the base, or from the first expert where there is no base. They do
            not count among the largest entries either.

    Raises:
        MergeError: A setting is of the wrong type, out of range, missing, or not the method's.
        UnknownNameError: The method is not known.
    """

    method: str
    density: float | None = None
    scale: float | None = None
    drop_rate: float | None = None
    weights: tuple[float, ...] | None = None
    seed: int = 0
    scope: str = "model"
    dtype: str = "float32"
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        if self.method not in METHODS:
            raise UnknownNameError("merge method", str(self.method), METHODS)
        method = METHODS[self.method]
        for name in ("density", "scale", "drop_rate", "weights"):
            given = getattr(self, name)
            if given is not None and name not in method.hyper_parameters:
                known = ", ".join(method.hyper_parameters)
                raise MergeError(f"{self.method} has no {name}; its settings are: {known}")
            value = method.hyper_parameters.get(name) if given is None else given
            if value is REQUIRED:
                raise MergeError(f"{self.method} needs a {name}; none is agreed on, so give one")
            object.__setattr__(self, name, value if value is None else self._checked(name, value))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise MergeError(f"seed must be a whole number, not {self.seed!r}")
        for name, known in (("scope", SCOPES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), known)
        if self.scope != "model" and not method.trims:
            raise MergeError(f"{self.method} does not trim, so scope {self.scope!r} means nothing")
        if isinstance(self.exclude, str) or not all(isinstance(e, str) for e in self.exclude):
            raise MergeError(f"exclude must be a list of patterns, not {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def _checked(self, name: str, value: Any) -> Any:
        if name == "weights":
            if isinstance(value, str) or not isinstance(value, list | tuple) or not value:
                raise MergeError(f"weights must be a list of numbers, not {value!r}")
            weights = tuple(self._checked("weight", weight) for weight in value)
            if self.method == "average" and math.fsum(weights) == 0:
                raise MergeError(f"weights must not sum to zero: {list(weights)}")
            return weights
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MergeError(f"{name} must be a number, not {value!r}")
        within = {
            "density": (0 < value <= 1, "above 0 and at most 1 (20 % is 0.2)"),
            "drop_rate": (0 <= value < 1, "at least 0 and below 1 (90 % is 0.9)"),
        }.get(name, (math.isfinite(value), "finite"))
        if not within[0]:
            raise MergeError(f"{name} must be {within[1]}, not {value!r}")
        return float(value)

    def weights_for(self, experts: int) -> np.ndarray:
        """The weights, float32 [experts]; ones where none are given."""
        return np.array(self.weights or (1.0,) * experts, np.float32)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-like data, defaults filled in and without what the method has not."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
            if value is not None
        }
