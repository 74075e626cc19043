"""SIGINT (Ctrl-C) and SIGTERM: noted by the handler, answered where that is safe.

The handler raises nothing: an exception that surfaces in the middle of a library is swallowed
there, and one in the middle of an import leaves half-initialised C modules. What has work to save
or to remove looks at `requested` in a block of `deferred`. Everywhere else a thread ends the
process at once, which is as safe as SIGKILL: what is on disk appears whole or not at all.

Nothing is imported here that takes time, for this comes before everything else.
"""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

_HANDLED = (signal.SIGINT, signal.SIGTERM)
_SECONDS = 10.0
_SECONDS_BETWEEN_LOOKS = 0.05

_received: list[int] = []
_answered: list[int] = []
_limits: list[float | None] = []
_groups: set[int] = set()
_watched: list[int] = []


def requested() -> int | None:
    """Returns the signal that asks to stop, if any; the caller then has to stop."""
    if _received and not _answered:
        _answered.append(_received[0])
    return _received[0] if _received else None


def check() -> None:
    """Stops the work in a block of `deferred` if a signal was received.

    Raises:
        Stopped: A signal was received.
    """
    if (number := requested()) is not None:
        from m2l.errors import Stopped

        raise Stopped(described(number))


def described(number: int) -> str:
    """Returns the line that says what ended a command that has no result yet."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"stopped by {name} before the end; run the same command again"


@contextlib.contextmanager
def deferred(seconds: float | None = _SECONDS, numbers: Sequence[int] = _HANDLED) -> Iterator[None]:
    """Lets the body answer a signal by itself: it calls `requested` or `check` between its steps.

    A second signal ends the process at once. Outside of the command, where `watched` is not in
    use, the handlers are those of the body, in the main thread.

    Args:
        seconds: How long a signal may stay unanswered; None: for ever.
        numbers: The signals that the body gets a handler for where it is not the command's.
    """
    alone = not (_watched or _limits) and threading.current_thread() is threading.main_thread()
    _limits.append(seconds)
    previous = {}

    def note(number: int, frame: object) -> None:
        _received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    if alone:
        previous |= {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        _limits.remove(seconds)
        if alone:
            for number, handler in previous.items():
                signal.signal(number, handler)
            _clear()


@contextlib.contextmanager
def killed_at_end(group: int) -> Iterator[None]:
    """Has the process group killed if a signal ends this process in the block."""
    _groups.add(group)
    try:
        yield
    finally:
        _groups.discard(group)


@contextlib.contextmanager
def watched(line: str | None, code: int | None, *, restored: bool) -> Iterator[None]:
    """Handles the signals in the block, for a command in the main thread.

    A SIGINT that is ignored when the block begins stays ignored, as in a shell's background jobs.

    Args:
        line: What is printed where a signal ends the process; None: what `described` returns.
        code: The exit code then; None: 128 and the signal's number.
        restored: Whether the previous handlers are restored at the end. Without, signals that
            come later are ignored, for the work is done.
    """
    if threading.current_thread() is not threading.main_thread() or _watched:
        yield
        return
    _clear()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    _watched[:] = [reading, writing]
    previous_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    previous = {
        number: signal.signal(number, _note)
        for number in _HANDLED
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    watcher = threading.Thread(target=_watch, args=(reading, line, code), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        _answered.append(0)  # The work is done, and the process ends by itself.
        if restored:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            os.close(writing)
            watcher.join()
            os.close(reading)
            _watched.clear()
            _clear()
        else:
            # Python's own end would set the default actions back.
            for number in previous:
                signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: object) -> None:
    _received.append(number)


def _watch(reading: int, line: str | None, code: int | None) -> None:
    """Ends the process where no body answers, or at a second signal; the pipe has the signals.

    Python writes them there at once, while handlers wait for the main thread's C code.
    """
    numbers: list[int] = []
    since = 0.0
    while written := os.read(reading, 64):
        since = since if numbers else time.monotonic()
        numbers += [byte for byte in written if byte in _HANDLED]
        while numbers:
            limit = math.inf if None in _limits else max(_limits, default=0.0)
            if len(numbers) > 1 or (not _answered and time.monotonic() - since >= limit):
                _end(
                    described(numbers[0]) if line is None else line,
                    128 + numbers[0] if code is None else code,
                )
            if _answered or select.select([reading], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
                break


def _end(line: str, code: int) -> None:
    clear = "\r\x1b[2K" if sys.stderr is not None and sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):  # Nobody may be reading it any more.
        os.write(2, f"{clear}m2l: {line}\n".encode())
    for group in tuple(_groups):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os._exit(code)


def _clear() -> None:
    _received.clear()
    _answered.clear()


def _forget() -> None:
    """Resets a forked process: the pipe and its reader are the parent's."""
    if _watched:
        signal.set_wakeup_fd(-1)
        for descriptor in _watched:
            os.close(descriptor)
        for number in _HANDLED:
            if signal.getsignal(number) is _note:
                signal.signal(number, signal.SIG_DFL)
    _watched.clear()
    _groups.clear()
    _clear()


os.register_at_fork(after_in_child=_forget)
