"""The `m2l` command. Signals are handled from here on, before anything else is imported."""

import gc
import sys
from collections.abc import Sequence

from m2l import signals

RESUMABLE = ("train", "rounds", "demo", "study", "search")
"""The commands that go on from what they saved: stopped, they exit with 0."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Exit codes: 0 done, or stopped and saved by one of RESUMABLE; 130 stopped by SIGINT and 143 by
    SIGTERM, without a result; 2 bad input; 1 a bug.

    Args:
        arguments: Of the command; None: those of the process, which ends with it.
    """
    own = arguments is None
    arguments = list(sys.argv[1:] if own else arguments)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    line, code = None, None
    if name in RESUMABLE:
        line, code = "stopped; the same command goes on from what is finished", 0
    with signals.watched(line, code, restored=not own):
        from m2l.cli import command

        try:
            command.run(arguments, stopped_code=code)
        finally:
            if own:
                # At its end Python looks for garbage among all that was imported: 0.2 s.
                gc.freeze()
