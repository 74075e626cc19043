"""Raw records: where a dataset has them, how its splits are made of them, and whether they fit."""

import dataclasses
import hashlib
import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from m2l.errors import DataError
from m2l.typing import Json, JsonObject

# A record of a source: texts, numbers, lists and further records by name.
Record: TypeAlias = Mapping[str, Json]
# Reads one of a source's splits.
ReadSplit: TypeAlias = Callable[[str], Iterable[Record]]
# One record in this many is held back where a source has no split to validate on.
HELD_BACK = 20


@dataclasses.dataclass(frozen=True)
class Part:
    """Part of a source's split: what is held back of it to validate on, or all the rest; or both.

    A digest of one field decides, not the place in the split: sources sort their records (IMDB
    has every negative review first), and repeat them, which must not put one text on both sides.

    Attributes:
        split: The source's split.
        field: The field that decides. Empty: the record's number does.
        held_back: Whether this is the part that is held back; None: it does not matter.
        percent: Of the part's records about so many percent; a smaller part is in every larger.
    """

    split: str
    field: str
    held_back: bool | None
    percent: int = 100

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yields those records of the split that belong to this part, in their order."""
        for number, record in enumerate(records):
            if self.field and self.field not in record:
                yield record  # whoever checks the records will name it
                continue
            value = str(record[self.field] if self.field else number)
            digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
            drawn, remainder = divmod(int.from_bytes(digest, "little"), HELD_BACK)
            if self.held_back in (None, remainder == 0) and drawn % 100 < self.percent:
                yield record


Splits = Mapping[str, str | Part]  # our name of a split -> the source's
SPLITS: Splits = {"train": "train", "validation": "validation"}


def held_back(split: str = "train", field: str = "text") -> dict[str, Part]:
    """Returns our splits train and validation as the two parts of one of the source's."""
    return {"train": Part(split, field, False), "validation": Part(split, field, True)}


@dataclasses.dataclass(frozen=True)
class Hub:
    """A dataset on the Hugging Face Hub.

    Attributes:
        repo: The repository, `owner/name`.
        config: The configuration; empty where there is only one.
        revision: The branch to read; "refs/convert/parquet" where the main one has a loading script
            in place of data.
    """

    repo: str
    config: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.repo} ({self.config})" if self.config else self.repo


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A dataset in TensorFlow Datasets, and what its records lack to be the Hub's.

    Attributes:
        builder: `name` or `name/config`.
        splits: Our splits -> its; None where they are those of the Hub.
        fields: Our field -> its name of it, or a function of one of its records that gives our
            value; fields left out have the same name there.
    """

    builder: str
    splits: Splits | None = None
    fields: Mapping[str, str | Callable[[Record], Json]] = dataclasses.field(default_factory=dict)


# ---- Records checked against their declaration

# A field's type: "string", "int", "strings" (a list of them), "choices" (a list of two or more to
# choose from), or the values it may take.
FieldType = str | Collection[str] | Collection[int]


def kind_of(field_type: FieldType) -> str:
    """Returns one of "string", "int", "strings" for a field's type."""
    if isinstance(field_type, str):
        return "strings" if field_type == "choices" else field_type
    return "int" if all(isinstance(value, int) for value in field_type) else "string"


_MISSING = object()


def checked(
    name: str,
    split: str,
    records: Iterable[Record],
    fields: Mapping[str, FieldType],
    complaint: Callable[[Record], str] | None = None,
) -> Iterator[JsonObject]:
    """Yields the declared fields of records, flat, by their paths.

    Args:
        name: The dataset's name, for messages.
        split: The split's name, for messages.
        records: Raw records, nested, or flat as this function gives them.
        fields: The fields to keep, and their types (see `m2l.data.prompts.Dataset`).
        complaint: What is wrong with a flat record whose fields are all of their types, or "".

    Raises:
        DataError: there is no record at all; or one is not as declared, by its number.
    """
    parts = {path: path.split("/") for path in fields}
    number = -1
    for number, record in enumerate(records):
        flat = {}
        for path, field_type in fields.items():
            value = record[path] if path in record else _lookup(record, parts[path])
            if value is _MISSING or not _fits(value, field_type):
                lost = value is _MISSING or (isinstance(value, list) and _MISSING in value)
                state = "is missing" if lost else f"is {value!r:.80}"
                raise DataError(
                    f"dataset {name!r}, split {split!r}, record {number}: field {path!r} "
                    f"{state}, expected {_expected(field_type)}"
                )
            flat[path] = value
        if complaint is not None and (wrong := complaint(flat)):
            raise DataError(f"dataset {name!r}, split {split!r}, record {number}: {wrong}")
        yield flat
    if number < 0:
        raise DataError(f"dataset {name!r}, split {split!r}: there are no records")


def _lookup(value: Json, path: Sequence[str]) -> Json:
    """Returns the value at a path; through a list of records, the list of their values."""
    for depth, name in enumerate(path):
        if isinstance(value, list | tuple):
            return [_lookup(item, path[depth:]) for item in value]
        if not isinstance(value, Mapping) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _fits(value: object, field_type: FieldType) -> bool:
    kind = kind_of(field_type)
    if kind == "strings":
        texts = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        return texts and (field_type != "choices" or len(value) >= 2)
    if kind == "string":
        right = isinstance(value, str)
    else:
        right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return right and (isinstance(field_type, str) or value in field_type)


def _expected(field_type: FieldType) -> str:
    kinds = {
        "string": "a text",
        "int": "a whole number",
        "strings": "a list of texts",
        "choices": "a list of two or more texts",
    }
    if isinstance(field_type, str):
        return kinds[field_type]
    return f"one of {', '.join(repr(value) for value in field_type)}"
