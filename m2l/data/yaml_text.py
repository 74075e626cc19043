"""YAML that others wrote, as plain data; what cannot be read in bounded time is refused."""

import re
from collections.abc import Sequence

import yaml

from m2l.errors import DataError
from m2l.typing import Json

MAX_CHARACTERS = 2**24
MAX_DEPTH = 50
# How many values may come from aliases, beyond those that are written out.
MAX_REPEATED = 10_000

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Python refuses to read longer numbers; in YAML's base 60 they take quadratic time.
_LONG_NUMBER = re.compile(r"[-+]?[0-9][0-9_:.]{1000,}")


class _TooMuch(Exception):
    """The text asks for more than is read."""


def load(text: str, wrong: str, mappings: Sequence[str] = ()) -> Json:
    """Reads a YAML document.

    Args:
        text: The document.
        wrong: What an error's message begins with: its file, and that it is damaged.
        mappings: Tags of objects that are read as mappings: "!Template".

    Returns:
        Its dicts, lists, texts, numbers, dates and None.

    Raises:
        DataError: it is not YAML, names a tag that is not known, nests deeper than MAX_DEPTH, is
            longer than MAX_CHARACTERS, has an alias of what it is itself in, or aliases that
            repeat more than MAX_REPEATED values; one line.
    """

    class Loader(_PARSER):
        """Of this call: its constructors are the class's own."""

    for tag in mappings:
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    try:
        if len(text) > MAX_CHARACTERS:
            raise _TooMuch(f"{len(text)} characters, and at most {MAX_CHARACTERS} are read")
        _check(text)
        return yaml.load(text, Loader)
    except _TooMuch as error:
        raise DataError(f"{wrong}: {error}") from error
    except (
        *(yaml.YAMLError, RecursionError),
        # What PyYAML lets through of numbers, dates and the like that are none: "!!int x".
        *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{wrong}: {reason:.300}") from error


def _check(text: str) -> None:
    """Raises _TooMuch where reading the text would take more than its length suggests."""
    # By anchor, how many values it stands for; None: it is not complete.
    sizes: dict[str, int | None] = {}
    # Of each collection that is open: its anchor, and how many values it has.
    opened: list[tuple[str | None, int]] = [(None, 0)]
    repeated = 0

    def count(values: int) -> None:
        anchor, size = opened[-1]
        opened[-1] = anchor, size + values

    for event in yaml.parse(text, _PARSER):
        line = event.start_mark.line + 1
        match event:
            case yaml.AliasEvent():
                size = sizes.get(event.anchor, 0)
                if size is None:
                    raise _TooMuch(f"line {line}: the alias {event.anchor!r} is in what it names")
                repeated += size
                if repeated > MAX_REPEATED:
                    raise _TooMuch(
                        f"line {line}: its aliases repeat more than {MAX_REPEATED} values"
                    )
                count(size)
            case yaml.ScalarEvent():
                may_be_number = event.implicit[0] or event.tag
                if may_be_number and _LONG_NUMBER.fullmatch(event.value):
                    raise _TooMuch(f"line {line}: a number of {len(event.value)} characters")
                if event.anchor:
                    sizes[event.anchor] = 1
                count(1)
            case yaml.CollectionStartEvent():
                if event.anchor:
                    sizes[event.anchor] = None
                opened.append((event.anchor, 1))
                if len(opened) > MAX_DEPTH:
                    raise _TooMuch(f"line {line}: it nests deeper than {MAX_DEPTH} levels")
            case yaml.CollectionEndEvent():
                anchor, size = opened.pop()
                if anchor:
                    sizes[anchor] = size
                count(size)
