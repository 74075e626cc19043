"""The hidden folder beside the result in which a merge is under way, and outlives its process.

Any number of processes that see the same file system work in it. What one finds that all need, it
leaves there under a name; so it is also found by a process that takes up what another left.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from m2l import files
from m2l.errors import CheckpointError, DataError, MergeError

Arrays = dict[str, np.ndarray]

_SECONDS_BETWEEN_COMMITS = 0.25
_SECONDS_TO_START = 600.0


class ProcessStopped(MergeError):
    """Another process of the same merge is not there any more; nothing is lost."""


class Workplace:
    """The folder of one merge; a context manager, which leaves it as it is.

    Args:
        out: The result.
        key: What is merged and how, as a digest: only the same merge goes on in the folder.
        process: Which of how many processes this is.

    Raises:
        MergeError: Another process is at the same part of the same merge.
    """

    def __init__(self, out: Path, key: str, process: tuple[int, int]):
        self.out, self.process = out, process
        self.path = out.parent / f".{out.name}.merge-{key[:16]}"
        self.content = self.path / out.name

    def __enter__(self) -> "Workplace":
        index = self.process[0]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / f"process-{index}.lock", "ab")
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be made ({error.strerror})") from error
        # Others may hold it for an instant, to see whether we live.
        if not any(_locked(self._lock.fileno()) or time.sleep(0.05) for _ in range(10)):
            self._lock.close()
            raise MergeError(f"{self.out}: another process is making it right now")
        if index == 0:
            for folder in self.out.parent.glob(f".{self.out.name}.merge-*"):
                if folder != self.path and not _alive(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def remove(self) -> None:
        """Removes the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def mine(self, tag: str, make: Callable[[], Arrays]) -> Arrays:
        """What this process left under `tag`; made if there is nothing yet."""
        file = self.path / f"{tag}-{self.process[0]}.npz"
        if file.is_file():
            return _load(file)
        found, temporary = make(), file.with_suffix(".tmp")
        with open(temporary, "wb") as opened:
            np.savez(opened, **found)
        # From here on others may go on, and remove the folder.
        temporary.rename(file)
        return found

    def gather(self, tag: str, make: Callable[[], Arrays]) -> list[Arrays]:
        """What every process left under `tag`, in their order; waits until all have.

        Raises:
            ProcessStopped: A process has stopped, or did not start in ten minutes.
        """
        found = [self.mine(tag, make)]
        for index in range(self.process[1]):
            if index != self.process[0]:
                found.insert(index, _load(self.wait(tag, index)))
        return found

    def wait(self, tag: str, index: int) -> Path:
        """Waits for the file that a process leaves under `tag`; see `gather`."""
        file, lock = self.path / f"{tag}-{index}.npz", self.path / f"process-{index}.lock"
        since = time.monotonic()
        seen = False
        while not file.is_file():
            running = lock.is_file() and _held(lock)
            seen = seen or running
            if (seen and not running and not file.is_file()) or (
                not seen and time.monotonic() - since > _SECONDS_TO_START
            ):
                what = "has stopped" if seen else "has not started"
                raise ProcessStopped(
                    f"process {index} of {self.process[1]} {what}; run all of them again with the "
                    "same commands: they go on from here"
                )
            time.sleep(0.02)
        return file

    def wait_for_result(self) -> None:
        """Waits until process 0 has published the result.

        Raises:
            ProcessStopped: It has stopped without.
        """
        lock = self.path / "process-0.lock"
        while not self.out.exists():
            if not (lock.is_file() and _held(lock)) and not self.out.exists():
                raise ProcessStopped(
                    f"{self.out}: process 0 has stopped before publishing it; run all of them "
                    "again with the same commands: they go on from here"
                )
            time.sleep(0.02)


class Journal:
    """Which spans of a process's part are on the disk, in their order, and their checksums.

    A context manager: once it is left nothing is written, so that the folder can be removed.

    Args:
        file: Where it is kept.
    """

    def __init__(self, file: Path):
        self._file = file
        self.sums: list[int] = []
        self._committed = 0
        self._touched: dict[Path, None] = {}
        self._due = time.monotonic() + _SECONDS_BETWEEN_COMMITS
        self._pool = ThreadPoolExecutor(1)
        self._under_way: Future | None = None
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            try:
                sums = files.parse_json(line, file, kind=list)
            except DataError:
                break  # A kill cuts the last line; what follows a damaged one is written again.
            if any(type(checksum) is not int for checksum in sums):
                break
            self.sums += sums
        self._committed = len(self.sums)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, checksum: int, files: Iterable[Path]) -> None:
        """Notes that the next span is written; from time to time puts it on the disk."""
        self.sums.append(checksum)
        self._touched |= dict.fromkeys(files)
        done = self._under_way is None or self._under_way.done()
        if done and time.monotonic() >= self._due:
            self._commit()

    def _commit(self) -> None:
        if self._under_way is not None:
            self._under_way.result()
        new, files = self.sums[self._committed :], list(self._touched)
        self._committed, self._touched = len(self.sums), {}
        self._under_way = self._pool.submit(self._put, new, files)
        self._due = time.monotonic() + _SECONDS_BETWEEN_COMMITS

    def _put(self, sums: list[int], files: list[Path]) -> None:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        with open(self._file, "a") as journal:
            journal.write(json.dumps(sums) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def close(self) -> None:
        """Puts on the disk what is not there yet."""
        self._commit()
        self._under_way.result()


def _load(file: Path) -> Arrays:
    try:
        with np.load(file) as loaded:
            return dict(loaded)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{file}: damaged ({error}); it is removed: run the same merge again"
        ) from error


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _held(lock: Path) -> bool:
    """Whether a living process holds a lock file."""
    with contextlib.suppress(OSError), open(lock, "rb") as opened:
        return not _locked(opened.fileno())
    return False


def _alive(folder: Path) -> bool:
    return any(_held(lock) for lock in folder.glob("process-*.lock"))
