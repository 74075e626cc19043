"""Which weight a skill is added with: the rule, as a function of the curve."""

import dataclasses
from collections.abc import Sequence

from m2l.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What the general model may lose.

    Attributes:
        value: How much, in points of its score or in percent of it.
        relative: Whether it is in percent of the score.
    """

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> "Tolerance":
        """`2%` of the general model's score, or `2` points of it.

        Raises:
            ConfigError: it is neither.
        """
        number, relative = text.strip().removesuffix("%"), text.strip().endswith("%")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 100:
            raise ConfigError(
                f"--tolerance {text}: expected 2% (of the general model's score) or 2 (points)"
            )
        return cls(value, relative)

    def floor(self, score: float) -> float:
        """The least that still counts as kept, of a general model with this score."""
        return score * (1 - self.value / 100) if self.relative else score - self.value

    def __str__(self) -> str:
        return f"{self.value:g} %" if self.relative else f"{self.value:g} points"


@dataclasses.dataclass(frozen=True)
class Point:
    """A merge on the curve.

    Attributes:
        weight: w.
        general: What it scores on what is to be kept, in percent.
        skill: What it scores on the skill.
    """

    weight: float
    general: float
    skill: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen merge, and whether it keeps what it should."""

    point: Point
    within: bool


def choose(points: Sequence[Point], general: float, tolerance: Tolerance) -> Choice:
    """The best skill among the merges that keep enough; if none does, the one that keeps most.

    Of equal ones that with the better other score, then that with the smaller weight.

    Args:
        points: The curve, in any order.
        general: What the general model itself scores on what is to be kept.
        tolerance: What a merge may score less than it.

    Raises:
        ConfigError: there are no points.
    """
    if not points:
        raise ConfigError("no weights to choose from")
    floor = tolerance.floor(general)
    # Means over examples carry the error of their last bits.
    kept = [point for point in points if point.general >= floor - 1e-9]
    if kept:
        best = max(kept, key=lambda point: (point.skill, point.general, -point.weight))
    else:
        best = max(points, key=lambda point: (point.general, point.skill, -point.weight))
    return Choice(best, bool(kept))
