"""Your own data, a JSON object a line: written-out examples, or raw records of a dataset."""

import contextlib
import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from m2l import storage
from m2l.errors import DataError
from m2l.files import parse_json
from m2l.typing import Json, JsonObject

FIELDS = ("inputs", "targets", "answer_choices")


def read(path: str | Path) -> list[JsonObject]:
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
    examples: list[JsonObject] = []
    first = 0
    for number, line in _lines(storage.path(path)):
        line_name = f"{path}:{number}"
        example = _example(_object(line, line_name), line_name)
        if examples and len(example) != len(examples[0]):
            has, lacks = (number, first) if "answer_choices" in example else (first, number)
            raise DataError(
                f"{line_name}: line {has} has answer_choices and line {lacks} has none; put the "
                "examples with choices and those without into files of their own"
            )
        first = first or number
        examples.append(example)
    return examples


def split(path: str | Path, group: str) -> dict[str, list[JsonObject]]:
    """Splits a file's examples: a fifth to "test", a tenth to "validation", the rest to "train".

    Groups are drawn by the digest of their value, so that the order of the file does not matter.

    Args:
        path: As `read` takes it.
        group: The field whose value an example shares with those that it must stay with.

    Raises:
        DataError: As `read`; a line lacks the field; or there are fewer than three groups.
    """
    groups: dict[str, list[int]] = {}
    examples = read(path)
    for place, record in enumerate(records(path)):
        if group not in record:
            raise DataError(f"{path}: example {place + 1} has no field {group!r} to split by")
        value = json.dumps(record[group], sort_keys=True)
        groups.setdefault(hashlib.sha256(value.encode()).hexdigest(), []).append(place)
    if len(groups) < 3:
        raise DataError(f"{path}: {len(groups)} values of {group!r}, too few for three parts")
    places: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    shares = {"test": 0.2, "validation": 0.1}
    for number, digest in enumerate(sorted(groups)):
        # Each part gets a group at least.
        open_parts = [name for name in shares if len(places[name]) < shares[name] * len(examples)]
        missing = [name for name in places if not places[name]]
        last = len(groups) - number <= len(missing)
        places[(missing if last else [*open_parts, "train"])[0]] += groups[digest]
    return {
        name: [examples[place] for place in sorted(members)] for name, members in places.items()
    }


def share(examples: Sequence[JsonObject], percent: int) -> list[JsonObject]:
    """Returns so many percent of the examples, in their order; less is part of more."""

    def digest(place: int) -> bytes:
        return hashlib.sha256(str(examples[place]["inputs"]).encode()).digest()

    count = max(1, len(examples) * percent // 100)
    drawn = sorted(range(len(examples)), key=digest)[:count]
    return [examples[place] for place in sorted(drawn)]


def records(path: str | Path) -> Iterator[JsonObject]:
    """Yields the raw records of a file, one after another, whatever fields they have.

    Args:
        path: A UTF-8 text file, compressed if its name ends in ".gz". Blank lines are skipped.

    Raises:
        DataError: `FILE:LINE: what is wrong with it`.
    """
    for number, line in _lines(storage.path(path)):
        yield _object(line, f"{path}:{number}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields every line that is not blank, and its number from 1."""
    number, any_line = 0, False
    try:
        with contextlib.ExitStack() as exits:
            file = exits.enter_context(path.open("rb"))
            if path.suffix == ".gz":
                file = exits.enter_context(gzip.open(file))
            for number, line in enumerate(file, start=1):
                if line.strip():
                    any_line = True
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number + 1}: it is not a complete gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror}") from error
    if not any_line:
        raise DataError(f"{path}: it is empty; expected one JSON object a line")


def _object(line: bytes, line_name: str) -> JsonObject:
    value = parse_json(
        line, line_name, pairs=partial(_fields, line_name), advice="correct the line"
    )
    if not isinstance(value, dict):
        raise DataError(f"{line_name}: it is {_kind(value)}, expected an object with named fields")
    return value


def _fields(line_name: str, pairs: list[tuple[str, Json]]) -> JsonObject:
    fields: JsonObject = {}
    for name, value in pairs:
        if name in fields:
            raise DataError(f"{line_name}: the field {name!r} is there twice")
        fields[name] = value
    return fields


def _kind(value: object) -> str:
    names = {str: "a text", bool: "a truth value", type(None): "null", list: "a list"}
    return "an object" if isinstance(value, dict) else names.get(type(value), "a number")


def _text(value: Json, field: str, line_name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{line_name}: {field} is {_kind(value)}, expected a text")
    if not value.strip():
        raise DataError(f"{line_name}: {field} is empty")
    return value


def _example(value: JsonObject, line_name: str) -> JsonObject:
    for name in value.keys() - FIELDS:
        meant = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
        if meant and meant[0] not in value:
            raise DataError(f"{line_name}: the field {name!r} is unknown; is {meant[0]!r} meant?")
    for name in ("inputs", "targets"):
        if name not in value:
            raise DataError(f"{line_name}: the field {name!r} is missing")
    example: JsonObject = {name: _text(value[name], name, line_name) for name in FIELDS[:2]}
    choices = value.get("answer_choices")
    if choices is None:
        return example
    if not isinstance(choices, list):
        raise DataError(
            f"{line_name}: answer_choices is {_kind(choices)}, expected a list of texts"
        )
    for place, choice in enumerate(choices):
        _text(choice, f"answer_choices[{place}]", line_name)
        if choice in choices[:place]:
            raise DataError(f"{line_name}: the answer choice {choice!r} is there twice")
    if len(choices) < 2:
        raise DataError(f"{line_name}: answer_choices has {len(choices)}, expected at least two")
    if example["targets"] not in choices:
        raise DataError(
            f"{line_name}: the target {example['targets']!r} is not among its answer choices "
            f"{', '.join(repr(choice) for choice in choices)}"
        )
    return {**example, "answer_choices": choices}
