"""Where a merge that is in progress is, and outlives its process."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2l import checkpoints, files, storage
from m2l.checkpoints.publishing import UNFINISHED
from m2l.errors import CheckpointError, MergeError

_KEY = 16


@contextlib.contextmanager
def staging(out: Any, key: str, first: bool) -> Iterator[Any]:
    """Yields the directory in which a result is made; it stays when the block ends.

    On a local disk that is a hidden one next to the result, elsewhere the result's own.

    Args:
        out: The result.
        key: What is merged and how, as a digest: only the same merge goes on in the directory.
        first: Whether this is the first of the processes that make it.

    Raises:
        MergeError: Another merge makes it right now.
        CheckpointError: The directory cannot be made.
    """
    if not isinstance(out, Path):
        _claim(out, key)
        yield out
        return
    folder = _folder(out, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "ab")  # noqa: SIM115 - it is closed below
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from error
    with lock:
        # A courtesy to whoever starts a merge twice: nothing depends on it.
        if first and not _locked(lock.fileno()):
            raise MergeError(f"{out}: another process is making it right now")
        if first:
            for other in out.parent.glob(f".{out.name}.merge-*"):
                if other != folder and not _in_progress(other):
                    shutil.rmtree(other, ignore_errors=True)
        yield folder / out.name


def publish(out: Any, key: str) -> None:
    """Gives a result that is whole its name, and removes what is left of the merge."""
    if isinstance(out, Path):
        folder = _folder(out, key)
        checkpoints.publish(folder / out.name, out)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        (out / UNFINISHED).unlink()


def discard(out: Any, key: str) -> None:
    """Removes what was made of a result that cannot be finished."""
    if isinstance(out, Path):
        shutil.rmtree(_folder(out, key), ignore_errors=True)


def used_bytes(directory: Any) -> int:
    """The bytes of a local disk that what was made takes."""
    return sum(f.stat().st_blocks * 512 for f in directory.rglob("*") if f.is_file())


def _folder(out: Path, key: str) -> Path:
    return out.parent / f".{out.name}.merge-{key[:_KEY]}"


def _claim(out: Any, key: str) -> None:
    marker = out / UNFINISHED
    content = json.dumps({"key": key}).encode()
    if storage.create(marker, content):
        return
    found = files.parse_json(marker.read_bytes(), marker, kind=dict, error=CheckpointError)
    if found.get("key") != key:
        raise MergeError(
            f"{out}: another merge was making it: run that one again, choose another --out, or "
            "remove it"
        )


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _in_progress(folder: Path) -> bool:
    """Whether a living process of this machine makes something in a folder."""
    with contextlib.suppress(OSError), open(folder / "lock", "rb") as opened:
        return not _locked(opened.fileno())
    return False
