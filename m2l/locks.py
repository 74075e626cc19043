"""Locks by which one process at a time works in a directory, local or in a bucket."""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from m2l import storage
from m2l.errors import M2LError
from m2l.storage import AnyPath, ObjectPath

if TYPE_CHECKING:
    from filelock import FileLock

# Seconds. A process that does not renew its lock in a bucket for so long has stopped.
RENEWED, EXPIRES = 15.0, 60.0
# By the lock: its generation, and when this process first saw it.
_seen: dict[ObjectPath, tuple[bytes, float]] = {}


class Lock:
    """A lock of one process.

    On a file system it is filelock's, which the system releases when the process ends. In a bucket
    it is an object that exists while it is locked: a thread renews it every 15 seconds, and one
    that was not renewed for 60 seconds is taken over. No clocks are compared.

    Args:
        file: The lock's own file.
    """

    def __init__(self, file: AnyPath):
        self.file = file
        self._file_lock: FileLock | None = None
        self._generation: bytes | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = False

    @property
    def acquired(self) -> bool:
        return self._file_lock is not None or self._thread is not None

    def acquire(self, wait: bool = False) -> bool:
        """Acquires the lock, and returns whether it has.

        Args:
            wait: Whether to wait until the lock of a process that has stopped expires, which in a
                bucket cannot be told from one that works.
        """
        if isinstance(self.file, Path):
            return self._acquire_file(self.file)
        end = time.monotonic() + EXPIRES + RENEWED
        while not self._acquire_object(self.file):
            if not wait or time.monotonic() >= end:
                return False
            time.sleep(1.0)
        return True

    def _acquire_file(self, file: Path) -> bool:
        # It takes 0.3 s to import, where JAX has not done so.
        from filelock import FileLock, Timeout

        lock = FileLock(file, blocking=False, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return False
        file.write_bytes(self._content())
        self._file_lock = lock
        return True

    def _acquire_object(self, file: ObjectPath) -> bool:
        generation = storage.swap(file, self._content(), None)
        if generation is None and (current := storage.generation(file)) is not None:
            now = time.monotonic()
            seen, since = _seen.get(file, (None, now))
            if seen != current:
                _seen[file] = current, now
            is_new = seen != current or now - since < EXPIRES
            if is_new and not _is_copy_of_released(file):
                return False
            generation = storage.swap(file, self._content(), current)
        if generation is None:
            return False
        _seen.pop(file, None)
        self._generation, self._lost = generation, False
        self._released.clear()
        self._thread = threading.Thread(target=self._renew, args=(file,), daemon=True)
        self._thread.start()
        return True

    def _content(self) -> bytes:
        # An object's generation on S3 is of its content, which therefore has the time in it.
        return f"process {os.getpid()} of {socket.gethostname()}, {time.time_ns()}".encode()

    def _renew(self, file: ObjectPath) -> None:
        while not self._released.wait(RENEWED):
            try:
                generation = storage.swap(file, self._content(), self._generation)
            except M2LError:  # The service cannot be reached; others cannot take over either.
                continue
            if generation is None:
                self._lost = True
                return
            self._generation = generation

    def owner(self) -> str:
        """Returns which process has the lock, in words; "" where that is unknown."""
        try:
            return self.file.read_text().partition(",")[0]
        except FileNotFoundError:
            return ""

    def check(self) -> None:
        """Raises M2LError if another process has taken the lock over."""
        if self._lost:
            raise M2LError(
                f"{self.file}: not renewed for {EXPIRES:.0f} seconds, and another process "
                f"({self.owner()}) has taken over; this one ends"
            )

    def release(self) -> None:
        """Releases the lock, if it is acquired."""
        if self._file_lock is not None:
            with contextlib.suppress(OSError):  # Its directory may be gone.
                os.truncate(self.file, 0)
            self._file_lock.release()
            self._file_lock = None
        if self._thread is not None:
            self._released.set()
            self._thread.join()
            self._thread = None
            if not self._lost:
                self.file.unlink(missing_ok=True)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_copy_of_released(file: ObjectPath) -> bool:
    """Returns whether a lock's file that nobody held was copied here, with the folder it is in."""
    try:
        return not file.read_bytes()
    except FileNotFoundError:
        return False
