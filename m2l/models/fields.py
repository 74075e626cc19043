"""Checks of a settings dataclass: fields of their declared types, and within range."""

import dataclasses
from collections.abc import Collection

from m2l.errors import ConfigError, UnknownNameError

# So that a number of a damaged or hostile file is refused before anything of its size is computed.
_MOST = 2**31 - 1
LAYERS, WIDTH, WORDS = ({"most": most} for most in (1024, 2**20, 2**27))


def check_types(settings: object) -> None:
    """Refuses a dataclass whose fields are not of their declared plain types.

    An int stands for a float; nothing else is converted.

    Raises:
        ConfigError: naming the setting, its type and its value.
    """
    for field in dataclasses.fields(settings):
        value, declared = getattr(settings, field.name), field.type
        if declared is float and type(value) is int:
            object.__setattr__(settings, field.name, float(value))
        elif declared in (bool, int, float, str) and type(value) is not declared:
            raise ConfigError(
                f"{type(settings).__name__}.{field.name}: expected {declared.__name__}, "
                f"found {value!r}; correct it in the gin file or flag"
            )


def check_fields(config: object) -> None:
    """Refuses a model's config whose fields are not of their declared types, or out of range.

    An int stands for a float. Every int must be positive and below 2**31, unless its field says
    `metadata={"least": N, "most": M}`; a tuple's elements are ints of at least 0, and a list is
    converted to one.

    Raises:
        ConfigError: naming the setting, what was expected and what was found.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{type(config).__name__}.{field.name}"
        if field.type is int:
            least, most = field.metadata.get("least", 1), field.metadata.get("most", _MOST)
            if type(value) is not int or value < least:
                expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
                raise ConfigError(f"{name}: expected {expected}, found {value!r:.80}")
            if value > most:
                raise ConfigError(f"{name}: expected at most {most:,}, found {value!r:.80}")
        elif field.type is float:
            # 10**400 is an int that no float can hold.
            if type(value) not in (int, float) or not abs(value) < 1e300:
                raise ConfigError(f"{name}: expected a finite number, found {value!r:.80}")
            object.__setattr__(config, field.name, float(value))
        elif field.type in (str, bool):
            if type(value) is not field.type:
                expected = "a name" if field.type is str else "True or False"
                raise ConfigError(f"{name}: expected {expected}, found {value!r:.80}")
        elif not isinstance(value, list | tuple) or any(
            type(element) is not int or not 0 <= element <= _MOST for element in value
        ):
            raise ConfigError(f"{name}: expected a list of integers from 0, found {value!r:.80}")
        else:
            object.__setattr__(config, field.name, tuple(value))


def check_choice(config: object, name: str, choices: Collection[str]) -> None:
    """Raises UnknownNameError unless the field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise UnknownNameError(f"{type(config).__name__}.{name}", value, choices)
