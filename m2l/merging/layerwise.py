"""Numbers of a recipe that vary: by expert, over layers, by the names of parameters.

A value is a number, a `Gradient` over layers, a `ByName` of values by patterns, or a tuple of
these, one for each expert. As JSON: 0.5, "0.2..0.8", [["*mlp*", 0.5], ["*", "0..1"]] and
[0.5, "0..1"].
"""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from m2l.errors import MergeError
from m2l.typing import Json

LAYER = re.compile(r"(.*?(?:layers?|blocks?|\bh)[./_]?)(\d+)[./]")
"""Matches the start of a name of a parameter of a layer: its stack, and its number in that."""


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Numbers at even distances from the first layer to the last, interpolated linearly."""

    points: tuple[float, ...]

    def at(self, position: float) -> float:
        """Returns the number at a position, 0 being the first layer and 1 the last."""
        place = position * (len(self.points) - 1)
        first = int(place)
        last, fraction = min(len(self.points) - 1, first + 1), place - first
        return (1 - fraction) * self.points[first] + fraction * self.points[last]

    def __str__(self) -> str:
        return "..".join(f"{point:g}" if float(f"{point:g}") == point else repr(point)
                         for point in self.points)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ByName:
    """Values by shell patterns of parameters' names; the first that matches counts."""

    entries: tuple[tuple[str, "Value"], ...]

    @functools.cached_property
    def _places(self) -> tuple[dict[str, int], list[tuple[int, str]]]:
        """The places of names in full, and of patterns."""
        names: dict[str, int] = {}
        patterns = []
        for place, (pattern, _) in enumerate(self.entries):
            if re.search(r"[*?[]", pattern):
                patterns.append((place, pattern))
            else:
                names.setdefault(pattern, place)
        return names, patterns

    def of(self, names: Sequence[str]) -> "Value | None":
        """Returns the value of a parameter that is known by these names; None: nothing matches."""
        known, patterns = self._places
        places = [known[name] for name in names if name in known]
        matching = (
            place
            for place, pattern in patterns
            if any(fnmatch.fnmatchcase(name, pattern) for name in names)
        )
        first = min([*places, next(matching, len(self.entries))])
        return self.entries[first][1] if first < len(self.entries) else None


Value: TypeAlias = float | Gradient | ByName | tuple["Value", ...]
"""Of a hyper-parameter."""


def parse(
    label: str,
    value: object,
    number: Callable[[str, object], float],
    *,
    by_expert: bool,
    default: float | None,
) -> Value:
    """Returns the value that JSON-like data, or a value itself, stands for.

    Args:
        label: What messages call it.
        value: The data; mappings stand for lists of pairs.
        number: Returns a number of a label and a number, or refuses it.
        by_expert: Whether there may be one for each expert.
        default: What parameters have whose names match no pattern; None: a pattern must be "*".

    Raises:
        MergeError: It is none.
    """
    again = functools.partial(parse, number=number, default=default)
    if isinstance(value, Gradient | ByName):
        value = to_json(value)
    if isinstance(value, str) and ".." in value:
        return Gradient(tuple(number(label, each) for each in _points(label, value)))
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple):
        return number(label, value)
    if pairs and all(_is_pair(each) for each in pairs):
        entries = [
            (pattern, again(f"{label} of {pattern!r}", each, by_expert=by_expert))
            for pattern, each in pairs
        ]
        if "*" not in dict(entries):
            if default is None:
                raise MergeError(f"{label}: parameters of other names have none: add one for '*'")
            entries.append(("*", default))
        return ByName(tuple(entries))
    if not by_expert:
        raise MergeError(
            f"{label} is one number for all experts together, not {value!r}; weights are one for "
            "each"
        )
    if not pairs:
        raise MergeError(f"{label} must be a list of numbers, one for each expert")
    return tuple(again(f"{label}[{i}]", each, by_expert=False) for i, each in enumerate(pairs))


def _is_pair(entry: object) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)


def _points(label: str, text: str) -> list[float]:
    try:
        return [float(point) for point in text.split("..")]
    except ValueError as error:
        raise MergeError(
            f"{label}: {text!r} is no gradient over layers; expected numbers such as 0.2..0.8"
        ) from error


def to_json(value: Value) -> Json:
    """Returns the JSON-like data that stands for a value."""
    match value:
        case Gradient():
            return str(value)
        case ByName(entries):
            return [[pattern, to_json(each)] for pattern, each in entries]
        case tuple():
            return [to_json(each) for each in value]
    return value


def number(value: Value, names: Sequence[str], position: float, expert: int) -> float:
    """Returns the number of a parameter and an expert.

    Args:
        value: The value.
        names: Of the parameter, by which patterns may match it.
        position: Of its layer, from 0 to 1.
        expert: Which.
    """
    match value:
        case Gradient():
            return value.at(position)
        case ByName():
            return number(value.of(names), names, position, expert)
        case tuple():
            return number(value[expert], names, position, expert)
    return value


def parts(value: Value) -> Iterator[Value]:
    """Yields a value and the values that are in it."""
    yield value
    match value:
        case ByName(entries):
            for _, each in entries:
                yield from parts(each)
        case tuple():
            for each in value:
                yield from parts(each)


def numbers(value: Value) -> Iterator[float]:
    """Yields the numbers that a value has, or has between."""
    for part in parts(value):
        if isinstance(part, Gradient):
            yield from part.points
        elif isinstance(part, float):
            yield part


def lists(value: Value) -> list[tuple[Value, ...]]:
    """Returns the tuples in a value, of one value for each expert."""
    return [part for part in parts(value) if isinstance(part, tuple)]


def patterns(value: Value) -> list[str]:
    """Returns the patterns of names in a value."""
    return [name for part in parts(value) if isinstance(part, ByName) for name, _ in part.entries]


def varies(value: Value) -> bool:
    """Returns whether a value is not the same for all parameters."""
    return any(isinstance(part, Gradient | ByName) for part in parts(value))


class Layers:
    """The stacks of layers of a model.

    Args:
        names: Its parameters' names.
    """

    def __init__(self, names: Iterable[str]):
        self._stacks: dict[str, list[int]] = {}
        for name in names:
            if layer := LAYER.match(name):
                index = int(layer[2])
                first, last = self._stacks.setdefault(layer[1], [index, index])
                self._stacks[layer[1]] = [min(first, index), max(last, index)]

    @property
    def longest(self) -> int:
        """How many layers the longest stack has; 0 where there is none."""
        return max((last - first + 1 for first, last in self._stacks.values()), default=0)

    def position(self, names: Sequence[str]) -> float:
        """Returns where in its stack a parameter's layer is.

        0 is the first layer, as for parameters of no layer, 1 the last, as for the only one.

        Args:
            names: The parameter's; the first that has a layer counts.
        """
        for name in names:
            layer = LAYER.match(name)
            if layer and layer[1] in self._stacks:
                first, last = self._stacks[layer[1]]
                return (int(layer[2]) - first) / (last - first) if last > first else 1.0
        return 0.0
