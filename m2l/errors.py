"""What can go wrong, as one line a person can act on: where, what was expected, what to do."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence

_LONGEST = 2000
# Control characters, line and paragraph separators, halves of surrogate pairs, text direction.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def one_line(text: str) -> str:
    """Returns `text` with what is not printable in a line as escapes, cut at 2,000 characters."""
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _ESCAPED else char
        for char in cut
    )


def reason(error: object) -> str:
    """Returns an error of a library, or a long text of it, as one line of 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."


class M2LError(Exception):
    """A bad input. The command prints its message alone and exits with code 2.

    Args:
        message: One line: where, what was expected, what was found, what to do.
        table: Lines printed below it.
    """

    def __init__(self, message: str = "", table: Sequence[str] = ()):
        super().__init__("\n".join([message, *table]))
        self._lines = [message, *table]

    def render(self) -> str:
        """Returns what the command prints: the message in one line, and the table's lines."""
        return "\n".join(map(one_line, self._lines))


class UnknownNameError(M2LError):
    """A name that nothing answers to; the message proposes the nearest known one.

    Args:
        kind: What was looked for, as a noun: "task", "merge method".
        name: The name as it was given.
        known: Every name that would have been accepted.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known, name = sorted(known), name[:200]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"; the nearest known one is {near[0]!r}" if near else "; none is known"
        super().__init__(f"unknown {kind} {name!r}{hint}")


class ConfigError(M2LError):
    """A setting of the wrong name, type or range."""


class DataError(M2LError):
    """A record, file, task or mixture that cannot be used; names the line or the example."""


class CheckpointError(M2LError):
    """A checkpoint that is missing, unfinished, damaged, or of another model or vocabulary."""


class UnsupportedModelError(CheckpointError):
    """A sound model that m2l has no network for; it can be merged by its own names."""


class MergeError(M2LError):
    """Checkpoints or hyper-parameters that cannot be merged."""


class EvaluationError(M2LError):
    """Scores or results that cannot be believed: non-finite, incomplete, or of other examples."""


class Stopped(BaseException):
    """Not an error: work that a signal stopped has saved what it had, or removed it, and ends.

    No Exception, so that no library's `except` takes it for a failure of its own.
    """
