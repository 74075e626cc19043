"""What every model's settings have to be: of their declared types, and within range."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from m2l.errors import ConfigError, UnknownNameError


def check_fields(config: Any) -> None:
    """Refuses a dataclass whose fields are not of their declared types; an int does for a float.

    Every int must be positive, unless its field says `metadata={"least": N}`; a tuple's elements
    are ints of at least 0, and a list is made one.

    Raises:
        ConfigError: naming the setting, what was expected and what was found.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        where = f"{type(config).__name__}.{field.name}"
        if field.type is int:
            least = field.metadata.get("least", 1)
            if type(value) is not int or value < least:
                what = "a positive integer" if least == 1 else f"an integer of at least {least}"
                raise ConfigError(f"{where}: expected {what}, found {value!r}")
        elif field.type is float:
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ConfigError(f"{where}: expected a finite number, found {value!r}")
            object.__setattr__(config, field.name, float(value))
        elif field.type in (str, bool):
            if type(value) is not field.type:
                what = "a name" if field.type is str else "True or False"
                raise ConfigError(f"{where}: expected {what}, found {value!r}")
        elif not isinstance(value, list | tuple) or any(type(e) is not int or e < 0 for e in value):
            raise ConfigError(f"{where}: expected a list of integers from 0, found {value!r}")
        else:
            object.__setattr__(config, field.name, tuple(value))


def check_choice(config: Any, name: str, choices: Collection[str]) -> None:
    """Raises UnknownNameError unless the field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise UnknownNameError(f"{type(config).__name__}.{name}", value, choices)
