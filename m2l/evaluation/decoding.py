"""How text is decoded: greedily, by beams, or drawn."""

import dataclasses

from m2l.errors import ConfigError
from m2l.typing import Json

_COLDEST = 1e-3
"""Logits that are divided by less may be too large for float32."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is decoded. Its tokens are drawn if there is a temperature.

    Attributes:
        beams: Of a beam search; 1: the most probable token is taken.
        temperature: What logits are divided by before tokens are drawn; 0: none are.
        top_k: How many of the most probable tokens may be drawn; 0: any.
        top_p: Tokens are drawn from the fewest that are together at least so probable (Holtzman et
            al. 2020, arXiv:1904.09751), of those that `top_k` leaves.
        samples: How many texts are drawn for an input.
        seed: Of what is drawn: equal seeds draw equal texts for an input, whatever the batch.

    Raises:
        ConfigError: A number is out of range, or has no effect.
    """

    beams: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("beams", 1, 2**31 - 1),
            ("temperature", 0, 1e4),
            ("top_k", 0, 2**31 - 1),
            ("samples", 1, 2**31 - 1),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}: expected {low} to {high:g}, found {value}")
        if 0 < self.temperature < _COLDEST:
            raise ConfigError(
                f"temperature: expected 0, or at least {_COLDEST:g}, found {self.temperature:g}"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected above 0 and at most 1, found {self.top_p}")
        default = Decoding.__dataclass_fields__
        if self.draws and self.beams > 1:
            raise ConfigError(f"beams {self.beams}: a beam search draws nothing; no temperature")
        for name in ("top_k", "top_p", "samples", "seed"):
            if not self.draws and getattr(self, name) != default[name].default:
                raise ConfigError(f"{name}: without a temperature nothing is drawn")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    @property
    def decided_by(self) -> list[Json]:
        """What is not as by default, for digests: nothing if tokens are taken greedily."""
        if not self.draws:
            return [self.beams] if self.beams > 1 else []
        return [dataclasses.asdict(self)]

    def settings(self) -> dict[str, str]:
        """Returns what is not as by default, in words, for a result."""
        if not self.draws:
            return {"decoding": f"{self.beams} beams"} if self.beams > 1 else {}
        parts = [f"{self.samples} drawn at temperature {self.temperature:g}"]
        parts += [f"top {self.top_k}"] if self.top_k else []
        parts += [f"top p {self.top_p:g}"] if self.top_p < 1 else []
        return {"decoding": ", ".join([*parts, f"seed {self.seed}"])}


GREEDY = Decoding()
