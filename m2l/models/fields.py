"""Checks of a settings dataclass: fields of their declared types, and within range."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import get_args, get_origin

from m2l.errors import ConfigError, UnknownNameError

# So that a number of a damaged or hostile file is refused before anything of its size is computed.
_MOST = 2**31 - 1
LAYERS, WIDTH, WORDS = ({"most": most} for most in (1024, 2**20, 2**27))
_ELEMENTS = {int: "integers, 0 or more", float: "numbers", str: "strings"}
NOT_NEGATIVE, POSITIVE, FRACTION = {"least": 0}, {"above": 0}, {"least": 0, "below": 1}


def check_fields(settings: object) -> None:
    """Refuses a dataclass whose fields are not of their declared types, or out of range.

    An int stands for a float, and a list for a tuple. An int must be positive and below 2**31
    unless its field's metadata is {"least": N, "most": M}, a float finite and as its metadata says:
    "least" or "above", and "below". Ints of a tuple must be 0 or more. Checked are bool, int,
    float, str, tuples of one type, and dataclasses.

    Raises:
        ConfigError: naming the setting, what was expected and what was found.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if (expected := _violated(value, field.type, field.metadata)) is not None:
            raise ConfigError(
                f"{type(settings).__name__}.{field.name}: expected {expected}, found {value!r:.80}"
            )
        if field.type is float:
            object.__setattr__(settings, field.name, float(value))
        elif get_origin(field.type) is tuple:
            object.__setattr__(settings, field.name, tuple(value))


def _violated(value: object, declared: object, bounds: Mapping[str, float]) -> str | None:
    """Returns what is expected of a value; None if it is that."""
    if declared is int:
        least, most = bounds.get("least", 1), bounds.get("most", _MOST)
        if type(value) is not int or value < least:
            return "a positive integer" if least == 1 else f"an integer of at least {least}"
        return f"at most {most:,}" if value > most else None
    if declared is float:
        # 10**400 is an int that no float can hold.
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
            return "a finite number"
        if "above" in bounds and not value > bounds["above"]:
            return f"more than {bounds['above']:g}"
        if value < bounds.get("least", value):
            return f"{bounds['least']} or more"
        return f"less than {bounds['below']}" if value >= bounds.get("below", math.inf) else None
    if declared is str or declared is bool:
        expected = "a string" if declared is str else "True or False"
        return None if type(value) is declared else expected
    if get_origin(declared) is tuple:
        kind = get_args(declared)[0]
        valid = isinstance(value, list | tuple) and all(
            type(element) in ((int, float) if kind is float else (kind,))
            and (kind is not int or 0 <= element <= _MOST)
            for element in value
        )
        return None if valid else f"a list of {_ELEMENTS.get(kind, kind.__name__)}"
    if isinstance(declared, type) and dataclasses.is_dataclass(declared):
        return None if isinstance(value, declared) else f"{declared.__name__}(...)"
    return None


def check_choice(config: object, name: str, choices: Collection[str]) -> None:
    """Raises UnknownNameError unless the field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise UnknownNameError(f"{type(config).__name__}.{name}", value, choices)
