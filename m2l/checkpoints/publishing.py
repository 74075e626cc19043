"""Directories that appear under their name when they are whole, and never otherwise."""

import contextlib
import itertools
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from m2l import distributed, signals, storage
from m2l.errors import CheckpointError
from m2l.storage import AnyPath, PathLike

_FLUSHED = 32 << 20
# File systems commit together the syncs that wait together.
_SYNCING = 16

_TEMPORARY = re.compile(r"\..+\.tmp-(?P<host>.+)-(?P<pid>\d+)-\d+")
# In a directory on object storage, which cannot be renamed, until all is written.
UNFINISHED = "unfinished.json"
_serial = itertools.count()
_being_written: set[str] = set()


def check_absent(directory: PathLike) -> None:
    """Raises CheckpointError if a checkpoint cannot have this name: it exists.

    What a save to object storage left that was killed does not count.
    """
    directory = storage.path(directory)
    if isinstance(directory, Path):
        exists = os.path.lexists(directory)
    else:
        exists = directory.exists() and not (directory / UNFINISHED).is_file()
    if exists:
        raise CheckpointError(
            f"{directory}: exists already, and nothing is overwritten: choose another name or "
            "remove it"
        )


def clean(directory: Path | str) -> list[Path]:
    """Removes what saves that were killed have left in `directory`; returns what was removed.

    A temporary directory carries the host and process that writes it; those of other hosts and of
    living processes stay.
    """
    removed = []
    directory = Path(directory)
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _TEMPORARY.fullmatch(entry.name)
        if not match or match["host"] != socket.gethostname():
            continue
        pid = int(match["pid"])
        if entry.name in _being_written if pid == os.getpid() else _alive(pid):
            continue
        # Another process may be cleaning the same.
        shutil.rmtree(entry, ignore_errors=True)
        removed.append(entry)
    return removed


def remove(directory: PathLike) -> None:
    """Removes a checkpoint: at once under its name, so that no kill leaves a part of it there."""
    directory = storage.path(directory).absolute()
    if isinstance(directory, Path):
        doomed = _temporary(directory)
        directory.rename(doomed)
        directory = doomed
    else:
        storage.create(directory / UNFINISHED, b"{}")
    storage.remove_tree(directory)


def _temporary(directory: Path) -> Path:
    """Returns a name next to `directory` that `clean` recognises."""
    serial = next(_serial)
    return directory.parent / (
        f".{directory.name}.tmp-{socket.gethostname()}-{os.getpid()}-{serial}"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path | str, *, metadata: bool = True) -> None:
    """Waits until a file or a directory, or a file's content alone, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        (os.fsync if metadata else os.fdatasync)(descriptor)
    finally:
        os.close(descriptor)


class Flusher:
    """Syncs written files in a thread while more is written.

    What waits at the end until all is on the disk then has little to wait for. A context manager:
    leaving the block waits.
    """

    def __init__(self) -> None:
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(1)
        self._files: dict[Path, None] = {}
        self._bytes = 0
        self._syncs: list[Future] = []

    def wrote(self, files: Iterable[Path], nbytes: int) -> None:
        """Counts `nbytes` written to these files; any thread may call it."""
        with self._lock:
            self._files |= dict.fromkeys(files)
            self._bytes += nbytes
            if self._bytes >= _FLUSHED:
                self._syncs.append(self._pool.submit(_sync_data, self._files))
                self._files, self._bytes = {}, 0

    def wait(self) -> None:
        """Waits for the syncs that have begun; raises the OSError of a file that was not synced.

        Linux tells of a write that failed once: a later sync of the file would not know it.
        """
        with self._lock:
            syncs, self._syncs = self._syncs, []
            self._files, self._bytes = {}, 0
        for future in syncs:
            future.result()

    def __enter__(self) -> "Flusher":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.wait()


def _sync_data(files: Iterable[Path]) -> None:
    for file in files:
        sync(file, metadata=False)


def publish(temporary: Path | str, directory: Path | str) -> None:
    """Gives a directory its final name, when all that it holds is on the disk.

    Args:
        temporary: Where it is; in the same parent directory as `directory`.
        directory: Its final name; must not exist.

    Raises:
        CheckpointError: `directory` exists.
        OSError: Not all could be put on the disk.
    """
    temporary, directory = Path(temporary), Path(directory).absolute()
    paths = [
        path
        for folder, _, files in os.walk(temporary)
        for path in (*(os.path.join(folder, file) for file in files), folder)
    ]
    with ThreadPoolExecutor(_SYNCING) as pool:
        for _ in pool.map(sync, paths):
            pass
    check_absent(directory)
    temporary.rename(directory)
    sync(directory.parent)


@contextlib.contextmanager
def publishing(directory: PathLike, size: int, *, together: bool = False) -> Iterator[AnyPath]:
    """Yields a temporary name; what is written there becomes `directory` if all goes well.

    On object storage it is `directory` itself, with a mark until all is written.

    Args:
        directory: The final name; must not exist. Its parents are made.
        size: The bytes that will be written, for refusing early what the disk cannot take.
        together: Whether all processes of the run write there; each calls this.

    Raises:
        CheckpointError: `directory` exists, cannot be created, or the disk is full.
    """
    directory = storage.path(directory).absolute()
    is_first = not together or jax.process_index() == 0
    if isinstance(directory, Path):
        staging = directory.with_name(f".{directory.name}.together") if together else None
        publish_to = _publishing_locally(directory, size, staging, is_first)
    else:
        publish_to = _publishing_remotely(directory, is_first)
    with publish_to as temporary:
        if together:
            distributed.wait_for_all(f"{directory} created")
        yield temporary
    if together:
        distributed.wait_for_all(f"{directory} published")


@contextlib.contextmanager
def _publishing_remotely(directory: AnyPath, is_first: bool) -> Iterator[AnyPath]:
    if not is_first:
        yield directory
        return
    check_absent(directory)
    storage.remove_tree(directory)
    storage.create(directory / UNFINISHED, b"{}")
    with signals.deferred():
        yield directory
        (directory / UNFINISHED).unlink()


@contextlib.contextmanager
def _publishing_locally(
    directory: Path, size: int, staging: Path | None, is_first: bool
) -> Iterator[Path]:
    if not is_first:
        yield staging
        return
    check_absent(directory)
    parent = directory.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{parent}: cannot be created ({error.strerror})") from error
    clean(parent)
    if (free := shutil.disk_usage(parent).free) < size:
        raise CheckpointError(
            f"{directory}: no space left: {size:,} bytes are needed, {free:,} are free in {parent}"
        )
    temporary = staging or _temporary(directory)
    storage.remove_tree(temporary)
    _being_written.add(temporary.name)
    try:
        # What the body has written so far goes if a signal stops it between its steps.
        with signals.deferred():
            temporary.mkdir()
            yield temporary
            publish(temporary, directory)
    except (OSError, CheckpointError) as error:
        if not re.search(r"No space left on device|Disk quota exceeded", str(error)):
            raise
        raise CheckpointError(
            f"{directory}: no space left: {size:,} bytes are needed; nothing was written"
        ) from error
    finally:
        # What cannot be removed now is removed by the next save here.
        shutil.rmtree(temporary, ignore_errors=True)
        _being_written.discard(temporary.name)
