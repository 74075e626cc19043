"""A run's checkpoints: one trainer a folder, written beside training, the newest and best kept."""

import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from m2l import checkpoints, files
from m2l.errors import CheckpointError, ConfigError, DataError
from m2l.training import processes

_RECORD = "finished.json"


class Lock:
    """Held by the one trainer of a run's folder; the system frees it when the process ends."""

    def __init__(self, out: Path):
        self._file = out / ".run.json.lock"
        self._held: int | None = None

    def take(self) -> None:
        """Takes it, if the folder is there and it is not taken yet.

        Raises:
            ConfigError: Another trainer has it.
        """
        if self._held is not None or not self._file.parent.is_dir():
            return
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 100).decode()
            os.close(descriptor)
            raise ConfigError(
                f"{self._file.parent}: another trainer ({holder or 'of unknown number'}) is at "
                "this run; wait for it, or choose another --out"
            ) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())
        self._held = descriptor

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


class Saves:
    """The checkpoints of a run. A context manager: leaving it waits for the save under way.

    Args:
        out: The run's folder.
        keep: How many of the newest stay.
    """

    def __init__(self, out: Path, keep: int):
        self.directory = out / "checkpoints"
        self._record = out / _RECORD
        self._keep = keep
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.directory / f"step_{step:08d}"

    def whole(self) -> list[Path]:
        """The checkpoints, oldest first; a directory with a manifest is whole."""
        return sorted(manifest.parent for manifest in self.directory.glob("step_*/manifest.json"))

    def start(self, step: int, write: Callable[[Path], None], best: int | None) -> Path:
        """Lets `write` make the checkpoint of a step while training goes on.

        Args:
            step: The step; a checkpoint of it that exists already is left as it is.
            write: Given the directory to make; runs in a thread, on copies of its own.
            best: The step whose checkpoint stays although it is old; None: none does.

        Raises:
            CheckpointError: The save before it failed.
        """
        self.wait()
        directory = self.path(step)

        def save() -> None:
            if not directory.exists():
                write(directory)
            for old in self.whole()[: -self._keep]:
                if best is None or old != self.path(best):
                    checkpoints.remove(old)

        if processes.is_first():
            self._under_way = self._thread.submit(save)
        return directory

    def check(self) -> None:
        """Raises what the save under way has failed with, if it has."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
            CheckpointError: It failed.
        """
        future, self._under_way = self._under_way, None
        if future is not None:
            future.result()

    def set_aside(self, damaged: Path) -> None:
        """Gives a damaged checkpoint a name that no run goes on from."""
        if processes.is_first():
            aside = damaged.with_name(f"damaged_{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)

    def finished(self) -> Path | None:
        """The checkpoint that a finished run is left with; None where it is not finished."""
        if not self._record.exists():
            return None
        name = files.read_record(self._record, required=False).get("checkpoint")
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{self._record}: damaged, it names no checkpoint; delete it")
        directory = self.directory / name
        return directory if (directory / "manifest.json").exists() else None

    def finish(self, last: Path, best: int | None, why: str, cut: Mapping[str, int]) -> Path:
        """Records that the run is finished; with a best checkpoint, only that one stays.

        Args:
            last: The last checkpoint.
            best: The step of the best one, if that is what stays.
            why: What ended the run.
            cut: How many examples it has seen, and how many of them were cut.

        Returns:
            The checkpoint that the run is left with.
        """
        self.wait()
        left = last if best is None else self.path(best)
        if processes.is_first():
            files.write_record(self._record, {"checkpoint": left.name, "why": why, **cut})
        self.prune(left if best is not None else None)
        return left

    def prune(self, only: Path | None) -> None:
        """Removes every checkpoint but `only`; None: nothing."""
        if only is None or not processes.is_first():
            return
        for other in self.whole():
            if other != only:
                checkpoints.remove(other)

    def __enter__(self) -> "Saves":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError:
            if kind is None:
                raise
        finally:
            self._thread.shutdown()
