"""Templates that others wrote, rendered by `jinja_worker` in a process of its own.

The process is started at the first request, answers one after the other, and ends with this one.
"""

import atexit
import contextlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

from m2l.data import jinja_worker
from m2l.typing import Json

_PROGRAM = Path(jinja_worker.__file__)


class TemplateError(Exception):
    """What a template did wrong, in one line.

    Attributes:
        kind: The name of the exception that it raised.
        message: The exception's own.
    """

    def __init__(self, kind: str, message: str):
        self.kind = kind
        self.message = " ".join(message.split()) or kind
        super().__init__(f"{kind}: {self.message}" if message.strip() else kind)


class _Worker:
    """The process, if one runs; requests of several threads wait for each other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: bytes) -> bytes:
        with self._lock:
            process = self._started()
            try:
                process.stdin.write(struct.pack("<Q", len(request)) + request)
                process.stdin.flush()
                header = process.stdout.read(8)
            except BrokenPipeError:
                header = b""
            except BaseException:
                # An answer that nobody has read would be taken for the next request's.
                self._end()
                raise
            if len(header) == 8:
                return process.stdout.read(*struct.unpack("<Q", header))
            self._process = None
            ended_by = -process.wait()
            self._close(process)
        if ended_by == signal.SIGPROF:
            seconds = jinja_worker.SECONDS
            raise TemplateError("TimeoutError", f"it takes more than {seconds:g} s of computing")
        raise TemplateError("MemoryError", f"the process that renders it ended ({-ended_by})")

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            self._process = subprocess.Popen(
                # -P: what is next to the program must not be taken for modules of Python's.
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is this process's to answer
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._close(process)

    @staticmethod
    def _close(process: "subprocess.Popen[bytes]") -> None:
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """Leaves the process to the one that started it."""
        self._process, self._lock = None, threading.Lock()


_worker = _Worker()
atexit.register(_worker.close)
os.register_at_fork(after_in_child=_worker.forget)


def call(function: str, *arguments: object) -> Json:
    """Calls a function of `jinja_worker` in the process.

    Args:
        function: "chat", "columns" or "promptsource".
        *arguments: The function's; plain values.

    Returns:
        What the function returns, as JSON has it.

    Raises:
        TemplateError: the template fails, or takes more time or memory than `jinja_worker` allows.
    """
    answer = json.loads(_worker.ask(pickle.dumps((function, arguments))))
    if "error" in answer:
        raise TemplateError(*answer["error"])
    return answer["result"]
