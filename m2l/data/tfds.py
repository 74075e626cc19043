"""Records of TensorFlow Datasets, in the Hugging Face Hub's schema."""

import contextlib
import functools
import io
import logging
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from m2l.data.raw_records import Record, Tfds
from m2l.errors import DataError, reason
from m2l.typing import Json, JsonObject

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

# The library asks three minutes for every file; one answer from here shows that there is a network.
_PROBE = "https://storage.googleapis.com"
_PROBE_SECONDS = 5


def read(
    tfds: Tfds, split: str, *, name: str, fields: Iterable[str], data_dir: Path | None = None
) -> Iterator[Record]:
    """Yields a split's records, one after another, in the order in which the library stored them.

    What the library has not prepared yet is downloaded and prepared first, if there is a network.

    Args:
        tfds: The builder, and what its records lack to be the Hub's.
        split: The library's own name of the split.
        name: The dataset's name, for messages.
        fields: Paths of the fields to read, `a/b`, as the Hub names them.
        data_dir: Where the library keeps its data; without it, where its own settings say.

    Yields:
        Records of `fields` alone, nested as the Hub's: texts, numbers, lists and dicts.

    Raises:
        DataError: there is no such builder, split or field; the dataset is not prepared and cannot
            be; a file or a record of it is damaged.
    """
    fields = tuple(fields)
    number = 0
    try:
        builder = _prepared(tfds.builder, data_dir)
        _check(builder, tfds, split, fields)
        for example in _examples(builder, split):
            record = _record(example, tfds, fields)
            yield record
            number += 1
    except _RecordError as error:
        raise DataError(
            f"dataset {name!r}, split {split!r}, record {number}: {error} ({tfds.builder} in "
            f"{builder.data_dir})"
        ) from error
    except DataError as error:
        raise DataError(f"dataset {name!r}, split {split!r}: {error}") from error


class _RecordError(Exception):
    """What is wrong with one record, or with the file at that place."""


def _check(builder: "DatasetBuilder", tfds: Tfds, split: str, fields: Iterable[str]) -> None:
    info = builder.info
    if split not in info.splits:
        raise DataError(
            f"{tfds.builder} has no such split; it has {', '.join(sorted(info.splits))}"
        )
    for field in fields:
        theirs = tfds.fields.get(field, field)
        if isinstance(theirs, str) and theirs.split("/")[0] not in info.features:
            raise DataError(
                f"{tfds.builder} has no field {theirs!r}; its fields are {', '.join(info.features)}"
            )


def _examples(builder: "DatasetBuilder", split: str) -> Iterator[Record]:
    """Yields the library's records, as Python's values."""
    import tensorflow_datasets

    in_order = tensorflow_datasets.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    with _quiet():
        dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=in_order)
        examples = dataset.as_numpy_iterator()
    while True:
        try:
            example = _plain(next(examples))
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise _RecordError(f"it is not UTF-8 text: {error.reason}") from error
        except Exception as error:  # TensorFlow's, of many classes
            raise _RecordError(f"its file is damaged or not there: {reason(error)}") from error
        yield example


def _plain(value: Json) -> Json:
    """Arrays as lists, and bytes as texts, at any depth."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return _plain(value.to_list()) if hasattr(value, "to_list") else value  # ragged, or plain


def _record(example: Record, tfds: Tfds, fields: Iterable[str]) -> JsonObject:
    record: JsonObject = {}
    for field in fields:
        theirs = tfds.fields.get(field, field)
        try:
            value = (
                functools.reduce(lambda part, name: part[name], theirs.split("/"), example)
                if isinstance(theirs, str)
                else theirs(example)
            )
        except Exception as error:  # a declaration's function may fail in any way
            raise _RecordError(
                f"field {field!r} cannot be made of it: {type(error).__name__}: {reason(error)}"
            ) from error
        *above, last = field.split("/")
        place = record
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return record


# ---- Preparing


def _prepared(name: str, data_dir: Path | None) -> "DatasetBuilder":
    """Returns the builder, its data on disk."""
    import tensorflow_datasets

    with _quiet():
        try:
            builder = tensorflow_datasets.builder(name, data_dir=data_dir and str(data_dir))
        except Exception as error:  # an unknown name, or a package that this builder needs
            first, *_ = str(error).split("\n")
            raise DataError(f"TensorFlow Datasets has no {name}: {first}") from error
        if builder.is_prepared():
            return builder
        why = "there is no network"
        if _network():
            try:
                return _prepare(builder)
            except Exception as error:  # of the network, the archive or the builder's code
                why = f"preparing it failed: {reason(error)}"
        root = builder.data_dir_root
        manual = ""
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            manual = (
                f"; some of its files have to be put into {root}/downloads/manual by hand: "
                f"{reason(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)}"
            )
    raise DataError(
        f"{name} is not prepared in {root}, and {why}; prepare it where there is a network with "
        f"`python -c \"import tensorflow_datasets as t; t.load('{name}', data_dir='{root}')\"` and "
        f"name that folder in the source, tfds:DIR{manual}"
    )


def _prepare(builder: "DatasetBuilder") -> "DatasetBuilder":
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return builder


@functools.cache
def _network() -> bool:
    request = urllib.request.Request(_PROBE, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:  # an answer
        return True
    except OSError:
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the library and what it downloads with."""
    with contextlib.ExitStack() as after:
        for name in ("absl", "urllib3", "tensorflow"):
            logger = logging.getLogger(name)
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
