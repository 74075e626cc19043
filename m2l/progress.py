"""One progress bar for long work: a live bar in a terminal, plain lines elsewhere.

By hand: importing rich.progress takes 0.4 s, next to JAX, and it writes no lines to a log.
"""

import shutil
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

_REDRAWN = 0.1
_FIRST_LINE, _LONGEST_PAUSE = 60.0, 600.0
_BAR_WIDTHS = (24, 10, 0)


def clock(seconds: float) -> str:
    """Returns a duration as 4:05 or 1:04:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Shows how far a piece of work is, at which rate, and how long it will still take.

    Use as a context manager and call `update` as work is done; it is cheap enough for every step.
    On a terminal one line is redrawn in place, and what does not fit is left out, figures first.
    Elsewhere one line is written at the end, and before it a line after a minute, two, four, ...,
    every ten in the end: what has more to tell writes it to a file. What is done by the first
    update is left out of the rate: functions are compiled for it.

    Args:
        description: What is being done, a few words.
        total: How much there is to do.
        unit: The name of a unit in the plural.
        done: How much was done before (a resumed run): it does not count towards the rate.
        silent: Shows nothing, as in all but one of several processes.
        first: What is said until the first update, such as "compiling".
        scale: How much of `total` and `done` a unit is, as 10**6 bytes are an MB.
    """

    def __init__(
        self,
        description: str,
        total: int,
        unit: str = "steps",
        done: int = 0,
        silent: bool = False,
        first: str = "",
        scale: int = 1,
    ):
        self._silent, self._preparing = silent, first
        self._description, self._total, self._unit = description, total, unit
        self._scale, self._digits = scale, 2 if scale > 1 and total < 10 * scale else 0
        self._before, self._done = done, done
        # How much, and when, the rate is counted from.
        self._counted: tuple[int, float] | None = None
        self._figures: dict[str, str] = {}
        # Of several threads only the main one draws.
        in_main = threading.current_thread() is threading.main_thread()
        self._terminal = in_main and sys.stderr.isatty()
        self._pause = _REDRAWN if self._terminal else _FIRST_LINE
        self._start = self._shown = time.monotonic()

    def update(self, done: int | None = None, total: int | None = None, **figures: str) -> None:
        """Sets how many units are finished and there are (None: unchanged), and figures to show."""
        self._done = self._done if done is None else done
        self._total = self._total if total is None else total
        self._figures.update(figures)
        if self._counted is None and self._done > self._before:
            self._counted = self._done, time.monotonic()
        if time.monotonic() - self._shown >= self._pause:
            self._show()
            self._pause = _REDRAWN if self._terminal else min(2 * self._pause, _LONGEST_PAUSE)

    def _amount(self, amount: float) -> str:
        return f"{amount / self._scale:,.{self._digits}f}"

    def _line(self, end: Sequence[str]) -> str:
        share = self._done / self._total if self._total else 1.0
        parts = [f"{self._amount(self._done)}/{self._amount(self._total)} {self._unit}"]
        if self._counted is None:
            parts += [self._preparing] if self._preparing else []
        else:
            done, start = self._counted
            elapsed = time.monotonic() - start
            rate = (self._done - done) / elapsed if elapsed else 0.0
            left = clock((self._total - self._done) / rate) if rate else "?"
            parts += [f"{rate / self._scale:,.1f}/s", f"{left} left"] if rate else []
        figures = [f"{name} {value}" for name, value in self._figures.items()]
        head = f"{self._description}: "
        if not self._terminal:
            return head + f"{share:4.0%}  " + "  ".join([*parts, *figures, *end])
        for width in _BAR_WIDTHS:
            bar = "━" * int(width * share) + "─" * (width - int(width * share)) + " " * bool(width)
            whole = [f"{head}{bar}{share:4.0%}", *parts]
            while figures and _length([*whole, *figures, *end]) > _columns():
                figures.pop()
            if _length([*whole, *figures, *end]) <= _columns():
                break
        return "  ".join([*whole, *figures, *end])[: _columns()]

    def _show(self, *end: str) -> None:
        self._shown = time.monotonic()
        if self._silent:
            return
        line = self._line(end)
        sys.stderr.write(f"\r\x1b[2K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        if self._terminal:
            self._show()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._show(f"in {clock(time.monotonic() - self._start)}")
        if self._terminal and not self._silent:
            sys.stderr.write("\n")


def _length(parts: Sequence[str]) -> int:
    return len("  ".join(parts))


def _columns() -> int:
    """Returns how many characters a line of the terminal has room for."""
    return shutil.get_terminal_size().columns - 1
