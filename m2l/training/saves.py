"""A run's checkpoints: written beside training, the newest and best kept."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2l import checkpoints, files
from m2l.checkpoints.saving import RunCheckpoints
from m2l.errors import DataError
from m2l.training import processes

_RECORD = "finished.json"


class Saves:
    """The checkpoints of a run, and the record of its end. A context manager; see `close`.

    Args:
        out: The run's directory.
        keep: How many of the newest stay.
    """

    def __init__(self, out: Any, keep: int):
        self._checkpoints = RunCheckpoints(out / checkpoints.STEPS, keep)
        self._record = out / _RECORD
        self.directory = self._checkpoints.directory
        self.finished_steps = self._checkpoints.finished
        self.save, self.check = self._checkpoints.save, self._checkpoints.check
        self.wait, self.check_space = self._checkpoints.wait, self._checkpoints.check_space

    def quarantine(self, step: int) -> None:
        """Gives a damaged checkpoint a name that no run goes on from; on object storage, none."""
        if not processes.is_first():
            return
        damaged = self._checkpoints.path(step)
        if not isinstance(damaged, Path):
            checkpoints.remove(damaged)
            return
        renamed = damaged.with_name(f"{damaged.name}.damaged")
        shutil.rmtree(renamed, ignore_errors=True)
        damaged.rename(renamed)

    def finished(self) -> Any:
        """Returns the checkpoint that a finished run is left with; None if it is not finished."""
        if not self._record.exists():
            return None
        name = files.read_record(self._record, required=False).get("checkpoint")
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{self._record}: damaged, it names no checkpoint; delete it")
        directory = self.directory / name
        return directory if checkpoints.is_checkpoint(directory) else None

    def finish(self, last: Any, best: int | None, why: str, cut: Mapping[str, int]) -> Any:
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
        remaining = last if best is None else self._checkpoints.path(best)
        if processes.is_first():
            files.write_record(self._record, {"checkpoint": remaining.name, "why": why, **cut})
        self.prune(remaining if best is not None else None)
        return remaining

    def prune(self, only: Any) -> None:
        """Removes every checkpoint but `only`; None: nothing."""
        if only is None:
            return
        for step, directory in self.finished_steps().items():
            if directory != only:
                self._checkpoints.remove(step)

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpoints.__exit__(*error)
