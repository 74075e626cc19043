"""Records on disk as Parquet files, read without their source or a network."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from m2l import files, storage
from m2l.data.raw_records import FieldType, Record, checked, kind_of
from m2l.errors import DataError
from m2l.typing import Json, JsonObject

FORMAT = 1
INDEX = "cache.json"
SHARD = 100_000  # records in a file, at most
_GROUP = 2_000  # records that are held in memory at a time
_TYPES = {"string": pa.string(), "int": pa.int64(), "strings": pa.list_(pa.string())}


def write(
    root: Path, name: str, split: str, records: Iterable[Record], fields: Mapping[str, FieldType]
) -> JsonObject:
    """Writes one split, as root/<name>/<split>-00000-of-00003.parquet and so on.

    The files get these names once all of them are complete; those of an earlier write go.

    Args:
        root: The cache's folder.
        name: The dataset's name.
        split: Our name of the split.
        records: Its records, nested or flat; they are never all in memory.
        fields: The fields to keep, by their paths `a/b`, which become the columns' names.

    Returns:
        {"records": how many, "files": {a file's name relative to root: its SHA-256}}, which
        `write_index` takes.

    Raises:
        DataError: there is no record, or one is not as declared or cannot be stored, by its number.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    ours = re.compile(rf"\.?{re.escape(split)}-\d{{5}}(-of-\d{{5}})?\.parquet(\.tmp)?")
    earlier = {path for path in folder.iterdir() if ours.fullmatch(path.name)}
    schema = pa.schema([(field, _TYPES[kind_of(of)]) for field, of in fields.items()])
    rows = enumerate(checked(name, split, records, fields))
    unfinished: list[Path] = []
    written = 0
    try:
        while True:
            unfinished.append(folder / f".{split}-{len(unfinished):05}.parquet.tmp")
            size = _write_shard(unfinished[-1], itertools.islice(rows, SHARD), schema, name, split)
            written += size
            if size < SHARD:
                break
        if not size:
            unfinished.pop().unlink()
        digests = {}
        for number, path in enumerate(unfinished):
            shard = folder / f"{split}-{number:05}-of-{len(unfinished):05}.parquet"
            digests[str(shard.relative_to(root))] = _digest(path)
            path.rename(shard)
            earlier.discard(shard)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    for path in earlier:
        path.unlink(missing_ok=True)
    return {"records": written, "files": digests}


def _write_shard(
    path: Path, rows: Iterator[tuple[int, Record]], schema: pa.Schema, name: str, split: str
) -> int:
    """Writes numbered records as one file; returns how many there were."""
    written = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _GROUP)):
            try:
                table = pa.Table.from_pylist([row for _, row in group], schema)
            except (OverflowError, ValueError):
                raise _not_storable(group, schema, name, split) from None
            writer.write_table(table)
            written += len(group)
    return written


def _not_storable(
    group: Iterable[tuple[int, Record]], schema: pa.Schema, name: str, split: str
) -> DataError:
    for number, row in group:
        for field in schema:
            try:
                pa.array([row[field.name]], field.type)
            except (OverflowError, ValueError) as error:  # Arrow's own errors are ValueErrors
                return DataError(
                    f"dataset {name!r}, split {split!r}, record {number}: field {field.name!r} "
                    f"cannot be stored: {' '.join(str(error).split())}"
                )
    raise AssertionError("every record of the group can be stored alone")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(root: Path, about: Mapping[str, Json]) -> str:
    """Writes root/cache.json, which makes the folder a cache; comes last.

    Args:
        root: The cache's folder.
        about: As JSON values by name, "source": where the records came from, "datasets": dataset
            -> split -> what `write` returned for it; and whatever else is to be kept.

    Returns:
        The digest of all of it, and so of every record.

    Raises:
        DataError: a file that it names is not there.
    """
    for splits in about["datasets"].values():
        for name in itertools.chain(*(part["files"] for part in splits.values())):
            if not (root / name).is_file():
                raise DataError(f"{root / name} is missing; write the cache again")
    content = {"format": FORMAT, **about}
    digest = _digest_of(content)
    storage.write_atomic(root / INDEX, json.dumps({**content, "digest": digest}, indent=1) + "\n")
    return digest


def _digest_of(content: Mapping[str, Json]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(root: Path) -> JsonObject:
    """Reads what `write_index` wrote, with "format" and "digest".

    Raises:
        DataError: the folder is no cache, or one of another format, or the index is damaged.
    """
    path = root / INDEX
    if not path.is_file():
        raise DataError(f"{root} is not a cache, or an unfinished one: it has no {INDEX}")
    index = files.read_json(path)
    if not isinstance(index, dict) or "format" not in index:
        raise DataError(f"{path}: damaged, not the index of a cache; write the cache again")
    if index["format"] != FORMAT:
        raise DataError(
            f"{path}: the cache has format {index['format']!r}, this version of m2l reads "
            f"{FORMAT}; write it again"
        )
    if index.pop("digest", None) != (digest := _digest_of(index)):
        raise DataError(f"{path}: damaged, its digest is not that of its content; write it again")
    if not _is_index(index):
        raise DataError(f"{path}: damaged, it does not list datasets' files; write the cache again")
    return {**index, "digest": digest}


def _is_index(index: Mapping[str, Json]) -> bool:
    """Returns whether an index gives, by dataset and split, digests of files in the cache."""
    datasets = index.get("datasets")
    if not isinstance(datasets, dict) or not isinstance(index.get("source"), str):
        return False
    return all(
        isinstance(splits, dict)
        and all(
            isinstance(split, dict)
            and type(split.get("records")) is int
            and isinstance(split.get("files"), dict)
            and all(
                isinstance(digest, str) and _is_inside(name)
                for name, digest in split["files"].items()
            )
            for split in splits.values()
        )
        for splits in datasets.values()
    )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and not path.is_absolute() and ".." not in path.parts


def read(root: Path, index: Mapping[str, Json], name: str, split: str) -> Iterator[Record]:
    """Yields a split's records, in the order in which they were written.

    Args:
        root: The cache's folder.
        index: What `read_index` gives for it.
        name: The dataset's name.
        split: Our name of the split.

    Yields:
        Flat records, {path of a field: its value}.

    Raises:
        DataError: the cache lacks the dataset or the split; or a file is missing or damaged, before
            a record of that file has been given.
    """
    for kind, key, known in (
        ("dataset", name, index["datasets"]),
        ("split", split, index["datasets"].get(name, {})),
    ):
        if key not in known:
            raise DataError(
                f"dataset {name!r}, split {split!r}: the cache {root} has no such {kind}; it has "
                f"{', '.join(known) or 'none'}"
            )
    for file, digest in sorted(index["datasets"][name][split]["files"].items()):
        path = storage.download(root / file)
        place = f"dataset {name!r}, split {split!r}: {root / file}"
        try:
            if _digest(path) != digest:
                raise DataError(f"{place} is damaged; write the cache again")
        except OSError as error:
            raise DataError(f"{place} cannot be read: {error.strerror}") from error
        with pq.ParquetFile(path, memory_map=True) as shard:
            for batch in shard.iter_batches(_GROUP):
                yield from batch.to_pylist()
