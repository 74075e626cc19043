"""Writes a mixture's records to disk; `sources` reads them as cache:DIR, without a network."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from m2l.data import parquet_cache
from m2l.data.prompts import Dataset
from m2l.data.raw_records import kind_of
from m2l.errors import DataError
from m2l.files import checksum, directory_digest
from m2l.tasks import sources
from m2l.typing import JsonObject


def write(
    datasets: Iterable[Dataset],
    source: str,
    out: Path,
    on_split: Callable[[str, str, int], None] = lambda dataset, split, records: None,
) -> int:
    """Writes all splits of datasets; prompts and vocabularies are applied when it is read.

    Args:
        datasets: What to write, of `m2l.tasks.sources.datasets(source)`, or its CORPUS.
        source: Where their records come from.
        out: A folder that is not there, or holds a write that was interrupted; or the same cache,
            which is read and checked, and not written again.
        on_split: Told what was written, split by split.

    Returns:
        How many records were written.

    Raises:
        DataError: the folder holds another finished cache; a record that is not as declared.
    """
    if sources.parse(source).kind == "cache":
        raise DataError(f"source {source!r} is a cache already; copy its folder")
    datasets = tuple(datasets)
    if (out / parquet_cache.INDEX).exists():
        return _finished(out, _key(datasets, source))
    if out.exists() and (
        foreign := {path.name for path in out.iterdir()} - {d.name for d in datasets}
    ):
        raise DataError(f"{out} holds something else ({min(foreign)}); choose another --out")
    written: dict[str, JsonObject] = {}
    for dataset in datasets:
        written[dataset.name] = {}
        for split in sources.splits(source, dataset):
            records = sources.read(source, dataset, split)
            entry = parquet_cache.write(out, dataset.name, split, records, dataset.fields)
            written[dataset.name][split] = entry
            on_split(dataset.name, split, entry["records"])
    about = {"source": source, "key": _key(datasets, source), "datasets": written}
    if sources.parse(source).kind == "promptsource":
        from m2l.tasks import t0_templates

        about["declared"] = [_to_dict(dataset) for dataset in t0_templates.datasets()]
    parquet_cache.write_index(out, about)
    return sum(entry["records"] for splits in written.values() for entry in splits.values())


def _key(datasets: Sequence[Dataset], source: str) -> str:
    """Computes the key of a cache: its source, files of its own folder included, and datasets."""
    folders = []
    parsed = sources.parse(source)
    while parsed is not None:
        folders += [] if parsed.folder is None else [directory_digest(parsed.folder)]
        parsed = parsed.records
    declared = {
        dataset.name: [[name, str(kind_of(of))] for name, of in dataset.fields.items()]
        for dataset in datasets
    }
    return checksum({"source": source, "folders": folders, "datasets": declared})


def _finished(out: Path, key: str) -> int:
    """Counts the records of a cache that is already there, if it is of the same key and whole."""
    index = parquet_cache.read_index(out)
    if index.get("key") != key:
        raise DataError(f"{out} holds a finished cache; choose another --out, or delete it")
    for dataset, splits in index["datasets"].items():
        for split in splits:
            for _ in parquet_cache.read(out, index, dataset, split):
                pass
    print(f"m2l: {out}: already there, written from the same source", file=sys.stderr)
    return sum(
        entry["records"] for splits in index["datasets"].values() for entry in splits.values()
    )


def _to_dict(dataset: Dataset) -> JsonObject:
    [prompt] = dataset.prompts
    return {
        "name": dataset.name,
        "category": dataset.category,
        "held_out": dataset.held_out,
        "part_of": dataset.part_of,
        "splits": list(dataset.splits),
        "choices": prompt.answer_choices is not None,
        "metrics": list(prompt.metrics),
        "original_task": prompt.original_task,
    }
