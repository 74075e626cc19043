"""The registry of merge methods: the signature of a function is all that describes a method.

    @method(experts=Interval(1, 1))
    def nearswap(
        base: jax.Array,
        experts: Arrays,
        nearness: Annotated[float, Interval(0), "Entries that differ by less are swapped."] = 1e-4,
    ) -> jax.Array: ...

A keyword that is annotated with an `Interval` is a hyper-parameter of the method, required if it
has no default; any other argument is an input, one of INPUTS, and says what the method needs.
Recipes and their checks, the flags of the commands, the tables and the tests are derived from that.
Packages add methods by an entry point of the group `m2l.merge_methods`, which names their module.
"""

import collections.abc
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np

from m2l.errors import MergeError
from m2l.merging import layerwise
from m2l.merging.layerwise import Value

MODULES = (
    *("m2l.merging.methods", "m2l.merging.statistical", "m2l.merging.selection"),
    "m2l.merging.spectral",
)
"""Those of m2l that define methods."""

GROUP = "m2l.merge_methods"
"""The entry points of packages that define methods."""

INPUTS = {
    "base": "the base model's parameters",
    "experts": "the experts' parameters, one array each",
    "thresholds": "per expert, the magnitude from which on an entry is kept; of `density`",
    "ceilings": "per expert, the magnitude from which on an entry is an outlier; of `gamma`",
    "largest": "per expert, the largest of what thresholds are taken over",
    "lowest": "per expert, the least magnitude of a task vector without one entry in 10,000 "
    "(rounded down)",
    "highest": "per expert, the largest magnitude of a task vector without one entry in 10,000 "
    "(rounded up), of one entry its own",
    "masks": "per expert, which entries are not dropped at random; of `drop_rate`, and by the rank "
    "of the magnitude if there is an `epsilon`",
    "rescale": "per expert, the factor of entries that are not dropped",
    "zero_sign": "the sign that is elected where the signed masses cancel exactly",
    "consensus": "how the task vectors that agree with the elected sign are merged",
    "coefficients": "what the method's `coefficients` computes for each parameter: of inner "
    "products of its task vectors (of its experts, without a base), or of the method's `sums`",
    "fishers": "per expert, the diagonal of its Fisher information",
    "base_fisher": "that of the base, None where there are no statistics of it; with `fishers`",
    "grams": "per expert, the Gram matrix of the inputs of a kernel; the method is called on the "
    "host, with whole parameters",
    "matrix": "whether the parameter is a matrix, whose rows then are its outputs; the method is "
    "called on the host, with whole parameters",
    "name": "the parameter's name, with `grams` or `matrix`",
}
"""What a method may ask for by the name of an argument."""

_SETTINGS = (
    "method", "hyper_parameters", "scales", "seed", "dtype", "exclude", "weighted_signs",
    "tokenizer",
)  # fmt: skip
_NEEDED = {
    "thresholds": ("base", "density"),
    "ceilings": ("thresholds", "gamma"),
    "largest": ("thresholds",),
    "lowest": ("base", "highest"),
    "highest": ("base", "lowest"),
    "masks": ("base", "drop_rate"),
    "rescale": ("masks",),
    "base_fisher": ("base", "fishers"),
    "consensus": ("base", "zero_sign", "weights"),
    "zero_sign": ("consensus",),
}
_BY_EXPERT = {
    "density": "thresholds",
    "gamma": "ceilings",
    "drop_rate": "masks",
    "epsilon": "masks",
}
"""Hyper-parameters of which inputs are made, one for each expert."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """The finite numbers from `low` to `high`, or without these where the interval is open.

    `hint` is added to messages: "20 % is 0.2".
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    hint: str = ""

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        high = f"{'below' if self.open_high else 'at most'} {self.high:g}"
        bounds = [low] * (self.low > -math.inf) + [high] * (self.high < math.inf)
        return " and ".join(bounds) or "finite"


@dataclasses.dataclass(frozen=True)
class HyperParameter:
    """A hyper-parameter of a method.

    Attributes:
        name: As recipes and flags call it.
        default: Its value where a recipe has none; None: it is required.
        interval: The numbers that it may be.
        per_expert: Whether the function takes one number for each expert; () stands for 1 each.
        description: For help texts, a sentence.
        by_expert: Whether a recipe may have one for each expert, as of those that the function
            takes so, and of those that only inputs are made of.
    """

    name: str
    default: float | tuple[()] | None
    interval: Interval
    per_expert: bool
    description: str
    by_expert: bool = False

    def checked(self, value: object) -> Value:
        """Returns a value that a recipe may have; see `layerwise`.

        Raises:
            MergeError: It is of another type, or out of range.
        """
        default = 1.0 if self.default == () else self.default
        return layerwise.parse(
            self.name, value, self._number, by_expert=self.by_expert, default=default
        )

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = "a list of numbers" if self.per_expert and name == self.name else "a number"
            raise MergeError(f"{name} must be {kind}, not {value!r}")
        if value not in self.interval:
            hint = f" ({self.interval.hint})" if self.interval.hint else ""
            raise MergeError(f"{name} must be {self.interval}{hint}, not {value!r}")
        return float(value)

    def __str__(self) -> str:
        """Returns the name with the default, for tables."""
        if self.default is None:
            return f"{self.name}=required"
        return self.name if self.per_expert else f"{self.name}={self.default:g}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A setting in which codebases differ; it applies to methods that take one of its inputs."""

    choices: tuple[str, ...]
    inputs: frozenset[str]
    description: str


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "scope": Variant(
            ("model", "tensor"),
            frozenset({"thresholds", "ranks", "sums"}),
            "What the largest entries, and sums, are taken over; the papers' is the model.",
        ),
        "consensus": Variant(
            ("mean", "sum", "max"),
            frozenset({"consensus"}),
            "What is made of entries that agree in sign.",
        ),
        "zero_sign": Variant(
            ("none", "positive", "majority", "majority_or_none"),
            frozenset({"consensus"}),
            "The sign that is elected where signs cancel.",
        ),
        "keep": Variant(
            ("floor", "at_least_one", "one_more", "complement"),
            frozenset({"thresholds"}),
            "How density rounds.",
        ),
        "rescale": Variant(
            ("expectation", "norm", "none"),
            frozenset({"masks"}),
            "What is done to entries that are not dropped.",
        ),
    }
)
"""Name -> its choices; the first is the default, but for `scope`, where the method has one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A merge method, as its function's signature describes it.

    Attributes:
        name: As recipes call it.
        function: The arithmetic.
        inputs: The arguments of `function` that are no hyper-parameters.
        hyper_parameters: Its hyper-parameters, by name.
        experts: How many experts it merges.
        scope: What the largest entries are taken over by default: "model" or "tensor".
        coefficients: Computes `coefficients` of inner products, if the method takes them: of the
            task vectors', [experts, experts], or, without a base, of the experts'. Its other
            arguments are hyper-parameters, and numpy or jax.numpy to compute with.
        sums: Adds up, over a part of a parameter, what `coefficients` are computed of in place of
            inner products: an array of the task vectors (of the experts, without a base) and of
            what else its arguments name, thresholds and hyper-parameters. Zeros add nothing. By
            the recipe's scope these are sums over the model or over each parameter.
        magnitudes: Returns what thresholds are taken over in place of the task vectors'
            magnitudes: of these, and of what else its arguments name (`lowest`, `highest`,
            hyper-parameters), not negative, an array for each expert. Where fewer than asked for
            are above 0, those alone are kept.
        check: Returns what is wrong with hyper-parameters that are each in range, or "".
    """

    name: str
    function: Callable[..., jax.Array | np.ndarray]
    inputs: tuple[str, ...]
    hyper_parameters: Mapping[str, HyperParameter]
    experts: Interval
    scope: str
    coefficients: Callable[..., jax.Array | np.ndarray] | None
    check: Callable[..., str]
    sums: Callable[..., jax.Array] | None = None
    magnitudes: Callable[..., list[jax.Array]] | None = None

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def description(self) -> str:
        """All that its docstring says, as one paragraph."""
        return " ".join((inspect.getdoc(self.function) or "").split())

    @property
    def needs_base(self) -> bool:
        """Whether it works on task vectors."""
        return "base" in self.inputs

    @property
    def trims(self) -> bool:
        """Whether it keeps the largest entries of a task vector, and so needs thresholds."""
        return "thresholds" in self.inputs

    @property
    def draws(self) -> bool:
        """Whether it drops entries at random, and so needs masks."""
        return "masks" in self.inputs

    @property
    def elects(self) -> bool:
        """Whether signs are elected."""
        return "consensus" in self.inputs

    @property
    def ranks(self) -> bool:
        """Whether an entry's drop rate depends on the rank of its magnitude."""
        return self.draws and "epsilon" in self.hyper_parameters

    @property
    def statistic(self) -> str | None:
        """The statistic that is needed of each expert: "fisher", "gram" or None."""
        return next((name[:-1] for name in ("fishers", "grams") if name in self.inputs), None)

    @property
    def whole(self) -> bool:
        """Whether it needs a whole parameter at once, in its shape: no block will do."""
        return "grams" in self.inputs or self.of_matrices

    @property
    def of_matrices(self) -> bool:
        """Whether it works on matrices, and on the host."""
        return "matrix" in self.inputs

    def has_variant(self, name: str) -> bool:
        """Returns whether one of VARIANTS applies to it."""
        kinds = [*["ranks"] * self.ranks, *["sums"] * (self.sums is not None)]
        return not VARIANTS[name].inputs.isdisjoint((*self.inputs, *kinds))


class _Registry(Mapping[str, Method]):
    """Name -> method; those of other packages are loaded when the registry is first read."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}
        self._complete = False

    def register(self, new: Method) -> None:
        """Adds a method, or, of the module that defined it, replaces one.

        Raises:
            MergeError: Another module has defined a method of this name.
        """
        old = self._methods.get(new.name)
        if old is not None and old.function.__module__ != new.function.__module__:
            raise MergeError(
                f"merge method {new.name!r} of {new.function.__module__} is already defined in "
                f"{old.function.__module__}: choose another name"
            )
        self._methods[new.name] = new

    def _loaded(self) -> dict[str, Method]:
        """Returns all methods.

        Raises:
            MergeError: A package's methods cannot be loaded.
        """
        if self._complete:
            return self._methods
        self._complete = True  # For what is imported.
        for module in MODULES:
            importlib.import_module(module)
        for point in importlib.metadata.entry_points(group=GROUP):
            try:
                point.load()
            except Exception as error:
                self._complete = False
                package = f" of the package {point.dist.name}" if point.dist else ""
                raise MergeError(
                    f"merge methods {point.name!r}{package} ({point.value}) cannot be loaded: "
                    f"{type(error).__name__}: {error}; upgrade or uninstall it"
                ) from error
        return self._methods

    def __getitem__(self, name: str) -> Method:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())


METHODS = _Registry()
"""Name -> method."""

F = typing.TypeVar("F", bound=Callable[..., jax.Array | np.ndarray])


def method(
    function: F | None = None,
    *,
    experts: Interval = Interval(low=1),
    scope: str = "model",
    coefficients: Callable[..., jax.Array | np.ndarray] | None = None,
    check: Callable[..., str] = lambda **_: "",
    sums: Callable[..., jax.Array] | None = None,
    magnitudes: Callable[..., list[jax.Array]] | None = None,
) -> F | Callable[[F], F]:
    """Registers a function as the merge method of its name; see this module and `Method`.

    Raises:
        TypeError: An argument is neither a hyper-parameter nor one of INPUTS, or has the name of a
            recipe's setting; or an input needs another argument, which is missing.
        MergeError: Another module has defined a method of this name.
    """
    if function is None:
        return functools.partial(
            method,
            experts=experts,
            scope=scope,
            coefficients=coefficients,
            check=check,
            sums=sums,
            magnitudes=magnitudes,
        )
    inputs: list[str] = []
    hyper_parameters: dict[str, HyperParameter] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        hyper_parameter = _hyper_parameter(name, parameter)
        if hyper_parameter is not None and name in (*_SETTINGS, *VARIANTS):
            raise TypeError(
                f"merge method {function.__name__}: every recipe has a setting {name}; rename the "
                "hyper-parameter"
            )
        if hyper_parameter is not None:
            hyper_parameters[name] = hyper_parameter
        elif name in INPUTS:
            inputs.append(name)
        else:
            raise TypeError(
                f"merge method {function.__name__}: {name} is no input ({', '.join(INPUTS)}); "
                "annotate a hyper-parameter as Annotated[float, Interval(...), DESCRIPTION]"
            )
    for name, each in hyper_parameters.items():
        by_expert = each.per_expert or _BY_EXPERT.get(name) in inputs
        hyper_parameters[name] = dataclasses.replace(each, by_expert=by_expert)
    for name in inputs:
        for needed in _NEEDED.get(name, ()):
            if needed not in (*inputs, *hyper_parameters):
                raise TypeError(f"merge method {function.__name__}: {name} needs {needed}")
    if ("coefficients" in inputs) != (coefficients is not None):
        raise TypeError(
            f"merge method {function.__name__}: coefficients are an argument of the function and "
            "of @method, or of neither"
        )
    if (sums and not coefficients) or (magnitudes and "thresholds" not in inputs):
        raise TypeError(
            f"merge method {function.__name__}: sums are for coefficients, magnitudes for "
            "thresholds"
        )
    METHODS.register(
        Method(
            function.__name__,
            function,
            tuple(inputs),
            MappingProxyType(hyper_parameters),
            experts,
            scope,
            coefficients,
            check,
            sums,
            magnitudes,
        )
    )
    return function


def _hyper_parameter(name: str, parameter: inspect.Parameter) -> HyperParameter | None:
    """Returns what an annotation says of a hyper-parameter; None of an input."""
    kind, *metadata = typing.get_args(parameter.annotation) or (None,)
    interval = next((each for each in metadata if isinstance(each, Interval)), None)
    if typing.get_origin(parameter.annotation) is not typing.Annotated or interval is None:
        return None
    if kind not in (float, Sequence[float]):
        raise TypeError(f"{name}: a hyper-parameter is a float or a Sequence[float], not {kind}")
    required = parameter.default is inspect.Parameter.empty
    return HyperParameter(
        name,
        None if required else parameter.default,
        interval,
        per_expert=typing.get_origin(kind) is collections.abc.Sequence,
        description=next((each for each in metadata if isinstance(each, str)), ""),
    )


def hyper_parameters() -> dict[str, dict[str, HyperParameter]]:
    """Returns the hyper-parameters of all methods: name -> method -> what it is there."""
    by_name: dict[str, dict[str, HyperParameter]] = {}
    for each in METHODS.values():
        for name, hyper_parameter in each.hyper_parameters.items():
            by_name.setdefault(name, {})[each.name] = hyper_parameter
    return by_name
