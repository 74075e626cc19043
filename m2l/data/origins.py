"""Where a dataset's records can be had, and how its splits are made of theirs."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
# One record in this many is held back where a source has no split to validate on.
HELD_BACK = 20


@dataclass(frozen=True)
class Part:
    """Part of a source's split: what is held back of it to validate on, or all the rest; or both.

    A digest of one field decides, not the place in the split: sources sort their records (IMDB
    has every negative review first), and repeat them, which must not put one text on both sides.

    Attributes:
        split: The source's split.
        by: The field that decides. Empty: the record's number does.
        held_back: Whether this is the part that is held back; None: it does not matter.
        percent: Of the part's records about so many percent; a smaller part is in every larger.
    """

    split: str
    by: str
    held_back: bool | None
    percent: int = 100

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        """Those records of the split that belong to this part, in their order."""
        for number, record in enumerate(records):
            if self.by and self.by not in record:
                yield record  # whoever checks the records will name it
                continue
            value = str(record[self.by] if self.by else number)
            digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
            drawn, rest = divmod(int.from_bytes(digest, "little"), HELD_BACK)
            if self.held_back in (None, rest == 0) and drawn % 100 < self.percent:
                yield record


Splits = Mapping[str, str | Part]  # our name of a split -> the source's
SPLITS: Splits = {"train": "train", "validation": "validation"}


def held_back(split: str = "train", by: str = "text") -> dict[str, Part]:
    """Our splits train and validation as the two parts of one of the source's."""
    return {"train": Part(split, by, False), "validation": Part(split, by, True)}


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
    fields: Mapping[str, str | Callable[[Record], Any]] = field(default_factory=dict)
