"""Your own data, a JSON object a line: written-out examples, or raw records of a dataset."""

import contextlib
import difflib
import gzip
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from m2l import storage
from m2l.errors import DataError
from m2l.files import parse_json

FIELDS = ("inputs", "targets", "answer_choices")


def read(path: str | Path) -> list[dict[str, Any]]:
    """Reads and checks a whole file of examples: nothing is found wrong after hours of work.

    Args:
        path: A UTF-8 text file, compressed if its name ends in ".gz". Blank lines are skipped;
            fields of other names are ignored, unless one looks like a misspelling. Either every
            line has answer_choices, or none.

    Returns:
        Per example {"inputs": str, "targets": str} and, where the file has them,
        "answer_choices": list of two or more different str, one of which is the target.

    Raises:
        DataError: `FILE:LINE: what is wrong with it`.
    """
    examples: list[dict[str, Any]] = []
    first = 0
    for number, line in _lines(storage.path(path)):
        where = f"{path}:{number}"
        example = _example(_object(line, where), where)
        if examples and len(example) != len(examples[0]):
            has, lacks = (number, first) if "answer_choices" in example else (first, number)
            raise DataError(
                f"{where}: line {has} has answer_choices and line {lacks} has none; put the "
                "examples with choices and those without into files of their own"
            )
        first = first or number
        examples.append(example)
    return examples


def records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The raw records of a file, one after another, whatever fields they have.

    Args:
        path: A UTF-8 text file, compressed if its name ends in ".gz". Blank lines are skipped.

    Raises:
        DataError: `FILE:LINE: what is wrong with it`.
    """
    for number, line in _lines(storage.path(path)):
        yield _object(line, f"{path}:{number}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line that is not blank, and its number from 1."""
    number, found = 0, False
    try:
        with contextlib.ExitStack() as exits:
            file = exits.enter_context(path.open("rb"))
            if path.suffix == ".gz":
                file = exits.enter_context(gzip.open(file))
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found = True
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number + 1}: it is no whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror}") from error
    if not found:
        raise DataError(f"{path}: it is empty; expected one JSON object a line")


def _object(line: bytes, where: str) -> dict[str, Any]:
    value = parse_json(line, where, pairs=partial(_fields, where), advice="correct the line")
    if not isinstance(value, dict):
        raise DataError(f"{where}: it is {_kind(value)}, expected an object with named fields")
    return value


def _fields(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise DataError(f"{where}: the field {name!r} is there twice")
        fields[name] = value
    return fields


def _kind(value: Any) -> str:
    names = {str: "a text", bool: "a truth value", type(None): "null", list: "a list"}
    return "an object" if isinstance(value, dict) else names.get(type(value), "a number")


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {_kind(value)}, expected a text")
    if not value.strip():
        raise DataError(f"{where}: {what} is empty")
    return value


def _example(value: dict[str, Any], where: str) -> dict[str, Any]:
    for name in value.keys() - FIELDS:
        meant = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
        if meant and meant[0] not in value:
            raise DataError(f"{where}: the field {name!r} is unknown; is {meant[0]!r} meant?")
    for name in ("inputs", "targets"):
        if name not in value:
            raise DataError(f"{where}: the field {name!r} is missing")
    example: dict[str, Any] = {name: _text(value[name], name, where) for name in FIELDS[:2]}
    choices = value.get("answer_choices")
    if choices is None:
        return example
    if not isinstance(choices, list):
        raise DataError(f"{where}: answer_choices is {_kind(choices)}, expected a list of texts")
    for place, choice in enumerate(choices):
        _text(choice, f"answer_choices[{place}]", where)
        if choice in choices[:place]:
            raise DataError(f"{where}: the answer choice {choice!r} is there twice")
    if len(choices) < 2:
        raise DataError(f"{where}: answer_choices has {len(choices)}, expected at least two")
    if example["targets"] not in choices:
        raise DataError(
            f"{where}: the target {example['targets']!r} is not among its answer choices "
            f"{', '.join(repr(choice) for choice in choices)}"
        )
    return {**example, "answer_choices": choices}
