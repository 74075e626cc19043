"""One progress bar for long work: a live bar in a terminal, plain lines elsewhere.

By hand: importing rich.progress takes 0.4 s, next to JAX, and it writes no lines to a log.
"""

import shutil
import sys
import time
from types import TracebackType

_SECONDS_BETWEEN_LINES = 5.0
_BAR_WIDTH = 24


def clock(seconds: float) -> str:
    """Returns a duration as 4:05 or 1:04:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Shows how far a piece of work is, at which rate, and how long it will still take.

    Use as a context manager and call `update` as work is done; it is cheap enough for every step.
    On a terminal one line is redrawn in place; otherwise a line is written every five seconds. What
    is done by the first update is left out of the rate: functions are compiled for it.

    Args:
        description: What is being done, a few words.
        total: How many units there are.
        unit: The name of a unit in the plural.
        done: How many were done before (a resumed run): they do not count towards the rate.
        silent: Shows nothing, as in all but one of several processes.
        first: What is said until the first update, such as "compiling".
    """

    def __init__(
        self,
        description: str,
        total: int,
        unit: str = "steps",
        done: int = 0,
        silent: bool = False,
        first: str = "",
    ):
        self._silent, self._preparing = silent, first
        self._description, self._total, self._unit = description, total, unit
        self._before, self._done = done, done
        # How many units, and when, the rate is counted from.
        self._counted: tuple[int, float] | None = None
        self._figures: dict[str, str] = {}
        self._terminal = sys.stderr.isatty()
        self._every = 0.1 if self._terminal else _SECONDS_BETWEEN_LINES
        self._start = self._shown = time.monotonic()

    def update(self, done: int | None = None, **figures: str) -> None:
        """Sets how many units are finished (None: unchanged) and figures to show."""
        self._done = self._done if done is None else done
        self._figures.update(figures)
        if self._counted is None and self._done > self._before:
            self._counted = self._done, time.monotonic()
        if time.monotonic() - self._shown >= self._every:
            self._show(self._line())

    def _line(self) -> str:
        share = self._done / self._total if self._total else 1.0
        parts = [f"{self._done:,}/{self._total:,} {self._unit}"]
        if self._counted is None:
            parts += [self._preparing] if self._preparing else []
        else:
            done, start = self._counted
            elapsed = time.monotonic() - start
            rate = (self._done - done) / elapsed if elapsed else 0.0
            left = clock((self._total - self._done) / rate) if rate else "?"
            parts += [f"{rate:,.1f}/s", f"{left} left"] if rate else []
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        bar = ""
        if self._terminal:
            filled = int(_BAR_WIDTH * share)
            bar = "━" * filled + "─" * (_BAR_WIDTH - filled) + " "
        return f"{self._description}: {bar}{share:4.0%}  " + "  ".join(parts)

    def _show(self, line: str) -> None:
        self._shown = time.monotonic()
        if self._silent:
            return
        if self._terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write(f"\r\x1b[2K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        self._show(self._line())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._show(self._line() + f"  in {clock(time.monotonic() - self._start)}")
        if self._terminal and not self._silent:
            sys.stderr.write("\n")
