"""Records of the Hugging Face Hub: over the network, or from local copies of its repositories."""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2l.data import yaml_text
from m2l.data.raw_records import Hub, Record
from m2l.errors import DataError, reason
from m2l.typing import Json

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# The branch that the Hub keeps of every dataset: <config>/<split>/0000.parquet, and no README.
_CONVERTED = "refs/convert/parquet"
_BATCH = 1000  # records that are made Python's values at a time
_PROBE_SECONDS = 5
_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
# A file of a split: train, train-00000-of-00002, also with a digest after that.
_FILE = re.compile(r"(?P<split>.+?)(-(?P<number>\d+)(-of-(?P<of>\d+)(-[0-9a-f]+)?)?)?")


def read(
    hub: Hub, split: str, *, name: str, fields: Iterable[str], root: Path | None = None
) -> Iterator[Record]:
    """Yields a split's records, one after another, in the repository's order.

    Args:
        hub: The dataset on the Hub.
        split: The Hub's own name of the split.
        name: The dataset's name, for messages.
        fields: Paths of the fields to read, `a/b`; the columns that they begin with come whole.
            None at all: every column.
        root: A folder with local copies, `root/<owner>/<name>`, each as
            `hf download --repo-type dataset --local-dir` lays it out: all of a repository, or only
            the files of the configuration. Without it: what the Hub has, or, where that cannot be
            reached, what this machine keeps of it.

    Yields:
        Records with strings, numbers, lists and dicts as values.

    Raises:
        DataError: the dataset, configuration, split or a column is not there, the Hub cannot be
            reached, or a file is missing or damaged.
    """
    columns = list(dict.fromkeys(field.split("/")[0] for field in fields))
    try:
        if root is None:
            batches = _from_hub(hub, split, columns)
        else:
            batches = _from_folder(root / hub.repo, hub, split, columns)
        for batch in batches:
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(f"{hub} has a text that is not UTF-8: {error.reason}") from error
            yield from records
    except DataError as error:
        raise DataError(f"dataset {name!r}, split {split!r}: {error}") from error


def _download(hub: Hub, folder: str) -> str:
    """Says how to download data that is missing."""
    revision = f" --revision {hub.revision}" if hub.revision else ""
    part = f" (add --include README.md --include '{hub.config}/*' for this configuration alone)"
    return (
        f"download it where there is a network with `hf download {hub.repo} --repo-type dataset"
        f"{revision} --local-dir {folder}`{part if hub.config else ''}"
    )


# ---- The Hub, and what this machine keeps of it


def _from_hub(
    hub: Hub, split: str, columns: Sequence[str]
) -> "Iterator[pa.Table | pa.RecordBatch]":
    import datasets
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    with _quiet(offline):
        try:
            return _batches(_load(hub, split), columns, str(hub))
        except DataError:
            raise
        # What can go wrong in a download has classes of its own in four libraries.
        except Exception as error:
            if not offline:
                raise DataError(f"{hub}: {reason(error)}") from error
        folder = _snapshot(hub)
    with contextlib.suppress(DataError):
        if folder is not None:
            return _from_folder(folder, hub, split, columns)
    why = ", HF_HUB_OFFLINE being set" if constants.HF_HUB_OFFLINE else ""
    raise DataError(
        f"{hub} is not on this machine (looked in {datasets.config.HF_DATASETS_CACHE} and "
        f"{constants.HF_HUB_CACHE}) and the Hub cannot be reached{why}; "
        f"{_download(hub, f'DIR/{hub.repo}')} and name DIR in the source: hub:DIR, p3:DIR or "
        "promptsource+hub:DIR"
    )


def _load(hub: Hub, split: str) -> "datasets.Dataset":
    import datasets
    import huggingface_hub

    if hub.revision == _CONVERTED:
        # Left to itself the library takes all configurations for one, and renames splits.
        there: dict[str, dict[str, list[str]]] = {}
        for path in huggingface_hub.list_repo_files(
            hub.repo, repo_type="dataset", revision=hub.revision
        ):
            if path.count("/") == 2 and path.endswith(".parquet"):
                config, its_split, _ = path.split("/")
                there.setdefault(config, {}).setdefault(its_split, []).append(path)
        splits = there[_choose(f"{hub.repo}, {hub.revision},", hub.config, there)]
        _check_split(split, splits, str(hub))
        return datasets.load_dataset(
            hub.repo, data_files={split: splits[split]}, split=split, revision=hub.revision
        )
    builder = datasets.load_dataset_builder(
        hub.repo, hub.config or None, revision=hub.revision or None
    )
    builder.download_and_prepare()
    _check_split(split, builder.info.splits, str(hub))
    return builder.as_dataset(split=split)


def _snapshot(hub: Hub) -> Path | None:
    """Returns the folder of the files of a repository that were downloaded earlier, if any."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub.repo, repo_type="dataset", revision=hub.revision or None, local_files_only=True
            )
        )
    except OSError:
        return None


@functools.cache
def _reachable(endpoint: str) -> bool:
    """Returns whether the Hub answers: its own libraries would ask for half a minute, each time."""
    from huggingface_hub import utils

    try:
        utils.get_session().head(endpoint, timeout=_PROBE_SECONDS)
    except Exception:  # of whichever HTTP library this one is built on
        return False
    return True


@contextlib.contextmanager
def _quiet(offline: bool) -> Iterator[None]:
    """Silences the Hub's libraries; if offline, keeps them from trying to reach it."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    with contextlib.ExitStack() as after:
        for library in (datasets, huggingface_hub):
            after.callback(
                library.utils.logging.set_verbosity, library.utils.logging.get_verbosity()
            )
            library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)
            if not library.utils.are_progress_bars_disabled():
                after.callback(library.utils.enable_progress_bars)
                library.utils.disable_progress_bars()
        for module in (datasets.config, constants) if offline else ():
            after.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
            module.HF_HUB_OFFLINE = True
        yield


def _batches(
    dataset: "datasets.Dataset", columns: Sequence[str], owner: str
) -> "Iterator[pa.Table]":
    _check_columns(columns, dataset.column_names, owner)
    return dataset.select_columns(columns or dataset.column_names).with_format("arrow").iter(_BATCH)


def _check_split(split: str, there: Iterable[str], owner: str) -> None:
    if split not in there:
        raise DataError(f"{owner} has no such split; it has {', '.join(sorted(there))}")


def _check_columns(wanted: Sequence[str], there: Sequence[str], owner: str) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise DataError(f"{owner} has no column {missing[0]!r}; its columns are {', '.join(there)}")


# ---- Local copies
# Not by the `datasets` library: importing it takes 1.5 s, it copies every file into its own cache,
# and it reports neither a missing file of a split nor a damaged one by its name.


def _from_folder(
    folder: Path, hub: Hub, split: str, columns: Sequence[str]
) -> "Iterator[pa.Table | pa.RecordBatch]":
    try:
        files, expected = _files(folder, hub.config, split)
    except DataError as error:
        raise DataError(f"{error}; {_download(hub, str(folder))}") from error
    if files[0].suffix == ".parquet":
        return _parquet(files, expected, columns)
    import datasets

    with _quiet(offline=True):
        try:
            dataset = datasets.load_dataset(
                _FORMATS[files[0].suffix], data_files=[str(path) for path in files], split="train"
            )
        except Exception as error:  # each format's reader has its own
            raise DataError(f"{files[0]}: {reason(error)}") from error
    return _batches(dataset, columns, str(files[0]))


def _parquet(
    files: Sequence[Path], expected: int | None, columns: Sequence[str]
) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = 0
    for path in files:
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                _check_columns(columns, file.schema_arrow.names, str(path))
                for batch in file.iter_batches(_BATCH, columns=list(columns) or None):
                    yield batch
                    records += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is damaged, from record {records} of the split on ({reason(error)}); "
                "download it again"
            ) from error
    if expected not in (None, records):
        raise DataError(
            f"{files[0].parent} has {records} records of it and README.md says "
            f"{expected}; download it again"
        )


def _files(folder: Path, config: str, split: str) -> tuple[list[Path], int | None]:
    """Returns a split's files, in order, and how many records they hold, if README.md says so.

    README.md says which files are whose; where it does not, or says it of other configurations
    only, the folders' names do.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    readme = folder / "README.md"
    card = _card(readme, readme.stat().st_mtime_ns) if readme.is_file() else {}
    configs = {entry.get("config_name", "default"): entry for entry in _entries(card, "configs")}
    declared = {name: entry for name, entry in configs.items() if "data_files" in entry}
    folders = _folders(folder)
    if declared and (not config or config in declared or config not in folders):
        marked = (name for name, entry in declared.items() if entry.get("default"))
        chosen = _choose(folder, config or next(marked, ""), declared)
        splits = {
            name: _matching(folder, patterns)
            for name, patterns in _patterns(declared[chosen]["data_files"]).items()
        }
    else:
        chosen = _choose(folder, config, folders)
        splits = _layout(folders[chosen])
    owner = f"{folder} ({chosen})" if chosen else str(folder)
    _check_split(split, splits, owner)
    files = splits[split]
    if not files or files[0].suffix not in _FORMATS:
        raise DataError(f"{owner} lacks the files of the split, or they are not in a known format")
    _check_whole(files)
    sizes = {
        (info.get("config_name", chosen), part.get("name")): part.get("num_examples")
        for info in _entries(card, "dataset_info")
        for part in _entries(info, "splits")
    }
    return files, sizes.get((chosen, split))


@functools.lru_cache(maxsize=8)
def _card(readme: Path, modified: int) -> Mapping[str, Json]:
    """Reads the YAML block that README.md begins with; P3's is long, and read for every task."""
    text = readme.read_text(encoding="utf-8", errors="replace")
    block = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
    card = yaml_text.load(block[1], f"{readme}: its YAML block is damaged") if block else {}
    return card if isinstance(card, dict) else {}


def _entries(card: Mapping[str, Json], name: str) -> list[Mapping[str, Json]]:
    """Returns a list of mappings, which is written as one mapping where there is only one."""
    value = card.get(name)
    return [
        entry
        for entry in (value if isinstance(value, list) else [value])
        if isinstance(entry, dict)
    ]


def _patterns(data_files: Json) -> dict[str, list[str]]:
    """Returns split -> patterns of its files, from any of the forms that the Hub accepts."""
    if isinstance(data_files, dict):
        pairs = list(data_files.items())
    else:
        listed = data_files if isinstance(data_files, list) else [data_files]
        pairs = [
            (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
            for entry in listed
        ]
    splits: dict[str, list[str]] = {}
    for split, paths in pairs:
        splits.setdefault(str(split), []).extend(paths if isinstance(paths, list) else [paths])
    return splits


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    try:
        paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    except (NotImplementedError, TypeError, ValueError) as error:
        raise DataError(f"{folder}/README.md: its data_files are damaged: {error}") from error
    # `hf download` keeps notes on every file, under its name, in .cache.
    return [
        path for path in paths if path.is_file() and ".cache" not in path.relative_to(folder).parts
    ]


def _folders(folder: Path) -> dict[str, Path]:
    """Returns configuration -> its folder; "" where nothing names it."""
    folders = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_dir() and (any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")))
    }
    if any(folder.glob("*.parquet")):
        folders[""] = folder
    elif "data" in folders:
        folders[""] = folders.pop("data")
    return folders


def _layout(folder: Path) -> dict[str, list[Path]]:
    """Returns split -> files: train-00000-of-00001.parquet, train.parquet or train/0000.parquet."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        splits.setdefault(_FILE.fullmatch(path.stem)["split"], []).append(path)
    for path in sorted(folder.glob("*/*.parquet")):
        splits.setdefault(path.parent.name, []).append(path)
    return splits


def _choose(owner: Path | str, config: str, there: Mapping[str, object]) -> str:
    """Returns the configuration that is asked for; the only one, or the default, if none is."""
    if config in there:
        return config
    if len(there) == 1 and (not config or "" in there):
        return next(iter(there))
    if not config and "default" in there:
        return "default"
    if not there:
        raise DataError(f"{owner} has no parquet files")
    lacks = f"no configuration {config!r}" if config else "several configurations"
    raise DataError(f"{owner} has {lacks}; it has {', '.join(filter(None, there))}")


def _check_whole(files: Sequence[Path]) -> None:
    """Refuses to read part of a split whose files number themselves."""
    stems = [_FILE.fullmatch(path.stem) for path in files]
    numbers = {int(stem["number"]) for stem in stems if stem["of"]}
    for stem in stems:
        if stem["of"] and (lost := set(range(int(stem["of"]))) - numbers):
            raise DataError(
                f"{files[0].parent} has {len(numbers)} of the {int(stem['of'])} files of the split;"
                f" number {min(lost)} is missing"
            )
    if all(path.stem.isdigit() for path in files):
        numbers = {int(path.stem) for path in files}
        if lost := set(range(max(numbers))) - numbers:
            raise DataError(f"{files[0].parent} lacks file number {min(lost)} of the split")
