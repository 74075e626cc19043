"""Where the tasks' records come from: one setting, and what each of its values has.

microworld                  the embedded data
hub, hub:DIR                the Hugging Face Hub, or local copies of its repositories
p3, p3:DIR                  the same, as T0's published prompts wrote it out
tfds, tfds:DIR              TensorFlow Datasets
promptsource[+SOURCE]       your checkout of T0's templates, over the Hub's records or another's
jsonl:DIR                   your own files in the Hub's schema, DIR/<dataset>/<its split>.jsonl
cache:DIR                   what `m2l tasks cache` wrote
none                        nothing: only tasks of your own JSON lines, under any names
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from m2l import files, storage
from m2l.data.prompts import Dataset, Prompt, written_out
from m2l.data.raw_records import SPLITS, Hub, Part, ReadSplit, Record, Splits, checked
from m2l.errors import ConfigError, DataError, UnknownNameError
from m2l.tasks import flan, skills, t0_held_in, t0_held_out
from m2l.typing import Json

KINDS = ("microworld", "hub", "p3", "tfds", "promptsource", "jsonl", "cache", "none")
T0 = (*t0_held_in.DATASETS, *t0_held_out.DATASETS)
# Unlabelled text to pretrain on; declared like a dataset, so that every source can have it.
CORPUS = Dataset(
    name="corpus",
    category="pretraining",
    fields={"text": "string"},
    prompts=(Prompt("", "{text}", "{text}", metrics=("rouge",)),),
    hub=Hub("Salesforce/wikitext", "wikitext-103-raw-v1"),
    licence="CC-BY-SA-3.0",
    paper="Merity et al. (2017)",
)
SPAN_CORRUPTION = "span_corruption"
LANGUAGE_MODELING = "language_modeling"
PRETRAINING = (SPAN_CORRUPTION, LANGUAGE_MODELING)
"""The tasks of the corpus: encoder-decoders are pretrained by the first, decoders by the second."""


class Source(NamedTuple):
    """The setting, read.

    Attributes:
        kind: Of KINDS.
        folder: The folder that it names, if it names one.
        records: Where "promptsource" has its records from.
    """

    kind: str
    folder: Path | None = None
    records: "Source | None" = None


def parse(setting: str) -> Source:
    """Reads the setting.

    Raises:
        UnknownNameError: no such source.
        ConfigError: a folder where there can be none, or none where there must be one.
        M2LError: the folder is not on a file system.
    """
    # A folder's name may have a plus in it.
    has_templates = setting.split("+")[0] == "promptsource"
    kind, plus, records = setting.partition("+") if has_templates else (setting, "", "")
    kind, colon, folder = kind.partition(":")
    folder_path = storage.path(folder).expanduser() if folder else None
    if kind not in KINDS:
        raise UnknownNameError("source of records", kind, KINDS)
    if kind in ("jsonl", "cache") and folder_path is None:
        raise ConfigError(f"source {setting!r}: name the folder, as {kind}:DIR")
    if isinstance(folder_path, storage.ObjectPath) and kind not in ("jsonl", "cache"):
        raise ConfigError(
            f"source {setting!r}: expected a local folder; copy it, or write its records to the "
            "bucket by `m2l tasks cache` and use cache:DIR"
        )
    if colon and (folder_path is None or kind in ("microworld", "promptsource", "none")):
        raise ConfigError(f"source {setting!r}: it takes no folder, or the folder's name is empty")
    if kind != "promptsource":
        return Source(kind, folder_path)
    if plus and not records:
        raise ConfigError(f"source {setting!r}: name the source of records after the plus")
    under = parse(records or "hub")
    if under.kind not in ("hub", "microworld", "jsonl"):
        raise ConfigError(
            f"source {setting!r}: promptsource's templates need raw records, of microworld, hub or "
            "jsonl:DIR"
        )
    return Source(kind, None, under)


def datasets(setting: str) -> tuple[Dataset, ...]:
    """Returns every dataset that has tasks under a source, the corpus left out.

    A declared dataset is among them even if the source lacks its records: a mixture never gets
    smaller without a word.

    Raises:
        DataError: the source's own declarations (a cache's index, a checkout) cannot be read.
    """
    source = parse(setting)
    if source.kind == "none":
        return ()
    if source.kind == "cache":
        return _cached_datasets(source.folder)
    if source.kind == "p3":
        from m2l.tasks import p3

        return (*p3.datasets(), *flan.datasets(flan_of(setting)))
    if source.kind == "promptsource":
        from m2l.tasks import t0_templates

        return (*t0_templates.datasets(), *flan.datasets(flan_of(setting)))
    return (*T0, *flan.datasets(source.kind), *skills.datasets(source.kind))


def _cache_index(root: Path) -> Mapping[str, Json]:
    from m2l.data import parquet_cache

    path = root / parquet_cache.INDEX
    return _read_index(root, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=8)
def _read_index(root: Path, modified: int) -> Mapping[str, Json]:
    from m2l.data import parquet_cache

    return parquet_cache.read_index(root)


def _cached_datasets(root: Path) -> tuple[Dataset, ...]:
    """Returns every dataset of the source that a cache was written from, cached or not."""
    index = _cache_index(root)
    if "declared" not in index:
        return datasets(index["source"])
    return (*_declared(index["digest"], root), *flan.datasets(flan_of(index["source"])))


@functools.lru_cache(maxsize=8)
def _declared(digest: str, root: Path) -> tuple[Dataset, ...]:
    return tuple(
        written_out(**{**fields, "metrics": tuple(fields["metrics"])})
        for fields in _cache_index(root)["declared"]
    )


def flan_of(setting: str) -> str:
    """Returns the kind of source that the instruction mixture comes from."""
    source = parse(setting)
    return "hub" if source.kind == "p3" else (source.records or source).kind


def asked(dataset: Dataset) -> str:
    """Returns the dataset that the prompts ask about: a written-out one is a prompt of another."""
    return dataset.name if dataset.prompts[0].name else dataset.part_of or dataset.name


def having(dataset: Dataset) -> tuple[str, ...]:
    """Returns the kinds of source that have a declared dataset."""
    from m2l.tasks import p3

    has = {
        "microworld": _has_generator(dataset),
        "hub": dataset.hub is not None,
        "p3": dataset.name in p3.DATASETS,
        "tfds": dataset.tfds is not None,
        "promptsource": bool(dataset.promptsource),
        "jsonl": dataset not in skills.EMBEDDED,
        "its own records": dataset.records is not None,
    }
    return tuple(kind for kind, yes in has.items() if yes)


def has(setting: str, dataset: Dataset) -> bool:
    """Returns whether a source has a dataset, as far as that can be told without reading."""
    source = parse(setting)
    if source.kind == "cache":
        return dataset.name in _cache_index(source.folder)["datasets"]
    if source.kind in ("hub", "microworld", "p3", "tfds") and dataset.records is None:
        kinds = {"microworld": _has_generator(dataset), "tfds": dataset.tfds is not None}
        return kinds.get(source.kind, dataset.hub is not None)
    return True


def _has_generator(dataset: Dataset) -> bool:
    from m2l.tasks import microworld

    generated = dataset is CORPUS or dataset.category == flan.MIXTURE
    return generated or skills.whole(dataset).name in {**microworld.DATASETS, **microworld.SKILLS}


def _lacking(owner: str, dataset: Dataset) -> DataError:
    return DataError(
        f"dataset {dataset.name!r}: {owner} does not have it; these sources do: "
        f"{', '.join(having(dataset))}"
    )


def splits(setting: str, dataset: Dataset) -> tuple[str, ...]:
    """Returns our names of the splits that a source has of a dataset."""
    source = parse(setting)
    if source.kind == "cache":
        # Of a dataset that was not cached, those declared.
        return tuple(_cache_index(source.folder)["datasets"].get(dataset.name, dataset.splits))
    if dataset.records is not None:
        return tuple(dataset.splits)
    if source.kind == "tfds" and dataset.tfds is not None and dataset.tfds.splits is not None:
        return tuple(dataset.tfds.splits)
    return tuple(dataset.splits)


def origin(setting: str) -> Json:
    """Returns what all records of a source follow from, as a JSON value that changes with them.

    Returns:
        None where nothing tells: of records from the network, and of others' templates. The
        microworld's follow from m2l's code.
    """
    source = parse(setting)
    if source.kind == "microworld":
        return source.kind
    if source.kind == "promptsource" or not isinstance(source.folder, Path):
        return None
    return [source.kind, str(source.folder.absolute()), files.directory_digest(source.folder)]


def read(setting: str, dataset: Dataset, split: str) -> Iterable[Record]:
    """Yields a split's records: the declared fields, flat and checked, in the source's order.

    Args:
        setting: The source.
        dataset: One of `datasets(setting)`, or CORPUS.
        split: One of `splits(setting, dataset)`.

    Raises:
        DataError: the source lacks the dataset or the split, or its records cannot be read; names
            them, and where they were looked for.
    """
    source = parse(setting)
    if source.kind == "cache" and (dataset.records is None or has(setting, dataset)):
        from m2l.data import parquet_cache

        index = _cache_index(source.folder)
        cached = parquet_cache.read(source.folder, index, dataset.name, split)
        return checked(dataset.name, split, cached, dataset.fields, dataset.complaint)
    if dataset.records is not None:
        theirs_of, records = dataset.splits, dataset.records
    else:
        if source.kind not in _READERS:
            raise _lacking(f"source {setting!r}", dataset)
        theirs_of, records = _READERS[source.kind](source, dataset)
    theirs = theirs_of[split]

    def whole(name: str) -> Iterator[Record]:
        flat = checked(dataset.name, name, records(name), dataset.fields, dataset.complaint)
        return flat if dataset.keep is None else filter(dataset.keep, flat)

    if not isinstance(theirs, Part):
        return whole(theirs)
    part = theirs.of(whole(theirs.split))
    if theirs.field or not theirs.held_back:
        return part
    # Numbers hold back records, and a text that is there twice can be on both sides: not here.
    train = dataclasses.replace(theirs, held_back=False).of(whole(theirs.split))
    seen = {hash(record["inputs"]) for record in train}
    return (record for record in part if hash(record["inputs"]) not in seen)


Reader = tuple[Splits, ReadSplit]  # the splits, and a function that reads one of the source's


def _microworld(source: Source, dataset: Dataset) -> Reader:
    from m2l.tasks import microworld

    if dataset is CORPUS:
        return SPLITS, lambda split: [{"text": text} for text in microworld.corpus(split)]
    if dataset.category == flan.MIXTURE:
        return SPLITS, lambda split: _families(split).get(flan.family(dataset), ())
    if not _has_generator(dataset):
        raise _lacking("the microworld", dataset)
    return dataset.splits, functools.partial(microworld.records, skills.whole(dataset).name)


@functools.cache
def _families(split: str) -> dict[str, list[Record]]:
    from m2l.tasks import microworld

    by_family: dict[str, list[Record]] = {}
    for record in microworld.instructions(split):
        by_family.setdefault(record["task"], []).append(record)
    return by_family


def _hub(source: Source, dataset: Dataset, fields: Iterable[str] = ()) -> Reader:
    from m2l.data import hub

    if dataset.hub is None:
        raise _lacking("the Hugging Face Hub", dataset)
    declared = flan.FIELDS if dataset.category == flan.MIXTURE else dataset.fields
    fields = dict.fromkeys([*declared, *fields])
    read = functools.partial(
        hub.read, dataset.hub, name=dataset.name, fields=fields, root=source.folder
    )
    return dataset.splits, _without_t0(dataset, read)


def _without_t0(dataset: Dataset, read: ReadSplit) -> ReadSplit:
    if dataset.category != flan.MIXTURE:
        return read
    return lambda split: flan.kept(flan.family(dataset), read(split))


def _p3(source: Source, dataset: Dataset) -> Reader:
    from m2l.data import hub
    from m2l.tasks import p3

    if dataset.hub is None or dataset.hub.repo != p3.REPO:
        return _hub(source, dataset)
    read = functools.partial(
        hub.read, dataset.hub, name=dataset.name, fields=p3.fields(dataset), root=source.folder
    )
    return dataset.splits, lambda split: map(p3.record, read(split))


def _tfds(source: Source, dataset: Dataset) -> Reader:
    from m2l.data import tfds

    if dataset.tfds is None:
        raise _lacking("TensorFlow Datasets", dataset)
    read = functools.partial(
        tfds.read, dataset.tfds, name=dataset.name, fields=dataset.fields, data_dir=source.folder
    )
    return dataset.tfds.splits or dataset.splits, read


def _jsonl(source: Source, dataset: Dataset) -> Reader:
    from m2l.data import jsonl

    def read(split: str) -> Iterable[Record]:
        plain = source.folder / skills.whole(dataset).name / f"{split}.jsonl"
        packed = plain.with_suffix(".jsonl.gz")
        return jsonl.records(packed if packed.exists() and not plain.exists() else plain)

    return dataset.splits, _without_t0(dataset, read)


def _promptsource(source: Source, dataset: Dataset) -> Reader:
    from m2l.tasks import t0_templates

    under = source.records
    if dataset is CORPUS or dataset.category == flan.MIXTURE:
        return _READERS[under.kind](under, dataset)
    base, render = t0_templates.template(dataset)
    # A template may name columns that are not declared; only the Hub is asked for single ones.
    more = {"fields": t0_templates.columns(dataset)} if under.kind == "hub" else {}
    theirs_of, records = _READERS[under.kind](under, base, **more)

    def read(split: str) -> Iterator[Record]:
        theirs = theirs_of[split]
        if isinstance(theirs, Part):
            return render(theirs.of(records(theirs.split)))
        return render(records(theirs))

    return {split: split for split in theirs_of}, read


_READERS: Mapping[str, Callable[..., Reader]] = {
    "microworld": _microworld,
    "hub": _hub,
    "p3": _p3,
    "tfds": _tfds,
    "promptsource": _promptsource,
    "jsonl": _jsonl,
}
