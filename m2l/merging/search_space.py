"""Spaces of recipes: for each method, the values that a search may choose of its settings.

    {
        "task_arithmetic": {"scale": (0.1, 1.5)},
        "ties": {
            "density": (0.01, 1.0, "log"),
            "scale": {"encoder/*": (0.2, 2.0), "decoder/*": (0.2, 2.0)},
            "consensus": ["mean", "sum"],
        },
        "dare_ties": {"drop_rate": [0.5, 0.9], "weights": [(0, 1), (0, 1)]},
    }

(LOW, HIGH) is any number between, (LOW, HIGH, STEP) and (LOW, HIGH, "log") are evenly spaced ones
and those of a logarithmic scale; [A, B] is one of these; {PATTERN: VALUES} has values of its own
for the parameters whose names match, as recipes have; a list of ranges has one for each expert, and
a tuple of ranges is a gradient from the first layer to the last. Anything else is fixed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from m2l.errors import ConfigError, M2LError, UnknownNameError
from m2l.merging import layerwise
from m2l.merging.method_registry import METHODS, VARIANTS, Method
from m2l.merging.recipe import Recipe, check_variants
from m2l.typing import Json

METHOD = "method"
"""The name of the dimension that is the method, where there are several."""

_FURTHER = (*VARIANTS, "seed", "weighted_signs")


@dataclasses.dataclass(frozen=True)
class Dimension:
    """What is chosen by itself: one number, or one of several values.

    Attributes:
        name: "ties.density", "ties.scale[encoder/*]", "ties.weights[0]".
        choices: The values; () of a range.
        low, high: The ends of a range, which belong to it.
        step: The distance of its numbers; 0: it has all between.
        log: Whether numbers are drawn from the logarithmic scale.
    """

    name: str
    choices: tuple[Json, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    log: bool = False

    def at(self, position: float) -> Json:
        """Returns the value at a position from 0 to 1, both among choices and in a range."""
        if self.choices:
            return self.choices[min(int(position * len(self.choices)), len(self.choices) - 1)]
        if self.log:
            return self.low * (self.high / self.low) ** position
        value = self.low + position * (self.high - self.low)
        return self.low + self.step * int((value - self.low) / self.step) if self.step else value


Draw = Callable[[Dimension], Json]


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The recipes that a search may make.

    Attributes:
        methods: Of each method, its settings' values; see this module.

    Raises:
        ConfigError: There is no method, or values are none.
        UnknownNameError: A method or a setting is unknown.
        MergeError: A value is out of its setting's range, or a required setting has none.
    """

    methods: Mapping[str, Mapping[str, object]]

    def __post_init__(self) -> None:
        if not isinstance(self.methods, Mapping) or not self.methods:
            raise ConfigError(
                "Search.methods: expected {METHOD: {SETTING: VALUES}}, such as {'ties': "
                f"{{'scale': (0.5, 2.0)}}}}, found {self.methods!r}"
            )
        for name, settings in self.methods.items():
            if name not in METHODS:
                raise UnknownNameError("merge method in Search.methods", str(name), METHODS)
            if not isinstance(settings, Mapping):
                raise ConfigError(
                    f"Search.methods: {name}: expected {{SETTING: VALUES}}, found {settings!r}"
                )
            try:
                self._check(METHODS[name], settings)
            except UnknownNameError:
                raise
            except M2LError as error:
                raise type(error)(f"Search.methods: {name}: {error}") from error

    def _check(self, method: Method, settings: Mapping[str, object]) -> None:
        """Checks every choice, and both ends of every range."""
        known = (*method.hyper_parameters, *_FURTHER)
        for setting in settings:
            if setting not in known:
                raise UnknownNameError(f"setting of {method.name}", str(setting), known)
        for name, hyper_parameter in method.hyper_parameters.items():
            if hyper_parameter.default is None and name not in settings:
                raise ConfigError(f"it needs a {name}; give its values")
        dimensions = self.dimensions(method.name)
        for place in range(max([2, *(len(each.choices) for each in dimensions)])):
            values = self._values(method.name, lambda each, place=place: _extreme(each, place))
            for name in values.keys() & method.hyper_parameters.keys():
                method.hyper_parameters[name].checked(values.pop(name))
            seed, weighted = values.pop("seed", 0), values.pop("weighted_signs", False)
            if type(seed) is not int or type(weighted) is not bool:
                raise ConfigError("a seed is a whole number, and weighted_signs true or false")
            check_variants(method, values, weighted)

    def _values(self, method: str, draw: Draw) -> dict[str, Json]:
        settings = self.methods[method].items()
        return {name: _resolved(f"{method}.{name}", values, draw) for name, values in settings}

    def dimensions(self, method: str) -> list[Dimension]:
        """Returns what is chosen of a method's settings."""
        dimensions: list[Dimension] = []

        def note(dimension: Dimension) -> Json:
            dimensions.append(dimension)
            return _extreme(dimension, 0)

        self._values(method, note)
        return dimensions

    def recipe(self, draw: Draw) -> Recipe:
        """Returns the recipe of what is drawn for each dimension, first the method.

        Raises:
            MergeError: Values that are each in range do not go together.
        """
        methods = tuple(self.methods)
        method = methods[0]
        if len(methods) > 1:
            method = str(draw(Dimension(METHOD, choices=methods)))
        return Recipe(method, **self._values(method, draw))

    def spread(self, count: int) -> list[dict[str, Json]]:
        """Returns values by dimension that are spread over the space, to begin a search with.

        Methods take turns, each from the middle of its ranges on along Sobol's sequence.
        """
        from scipy.stats import qmc  # It takes time to import.

        points: list[dict[str, Json]] = []
        methods = tuple(self.methods)
        for place in range(count):
            method = methods[place % len(methods)]
            dimensions = self.dimensions(method)
            # The sequence begins with the origin; its lengths are powers of 2.
            turn = place // len(methods) + 1
            sobol = qmc.Sobol(max(1, len(dimensions)), scramble=False)
            positions = sobol.random(1 << turn.bit_length())[turn]
            values = zip(dimensions, positions.tolist(), strict=False)
            points.append({METHOD: method} if len(methods) > 1 else {})
            points[-1] |= {dimension.name: dimension.at(position) for dimension, position in values}
        return points


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_range(values: object) -> bool:
    return isinstance(values, tuple) and bool(values) and _is_number(values[0])


def _extreme(dimension: Dimension, place: int) -> Json:
    """Returns a choice, or an end of a range: all of them as `place` goes up from 0."""
    if dimension.choices:
        return dimension.choices[place % len(dimension.choices)]
    return dimension.high if place % 2 else dimension.low


def _resolved(label: str, values: object, draw: Draw) -> Json:
    """Returns the value of a recipe's setting that is drawn from values."""
    if _is_range(values):
        return draw(_range(label, values))
    if isinstance(values, tuple):
        if len(values) < 2 or not all(map(_is_range, values)):
            raise ConfigError(f"{label}: expected (LOW, HIGH), found {values!r}")
        points = [draw(_range(f"{label}[{i}]", each)) for i, each in enumerate(values)]
        return str(layerwise.Gradient(tuple(map(float, points))))
    if isinstance(values, Mapping):
        return [
            [pattern, _resolved(f"{label}[{pattern}]", each, draw)]
            for pattern, each in values.items()
        ]
    if not isinstance(values, list):
        return values
    if any(isinstance(each, tuple | Mapping) for each in values):
        return [_resolved(f"{label}[{i}]", each, draw) for i, each in enumerate(values)]
    if not values or not all(isinstance(each, str | int | float) for each in values):
        raise ConfigError(f"{label}: expected [A, B, ...] to choose from, found {values!r}")
    return draw(Dimension(label, choices=tuple(values)))


def _range(label: str, values: Sequence[object]) -> Dimension:
    low, high, *further = (*values, 0.0) if len(values) == 2 else values
    step = further[0] if len(further) == 1 else None
    log = step == "log"
    if not (
        _is_number(high)
        and low < high
        and (log or (_is_number(step) and 0 <= step <= high - low))
        and not (log and low <= 0)
    ):
        raise ConfigError(
            f"{label}: expected (LOW, HIGH), (LOW, HIGH, STEP) or (LOW, HIGH, 'log') with LOW "
            f"below HIGH, of a logarithm above 0, found {values!r}"
        )
    return Dimension(
        label, low=float(low), high=float(high), step=0.0 if log else float(step), log=log
    )
