"""The `m2l` command. Signals are handled from here on, before anything else is imported."""

import gc
import os
import sys
from collections.abc import Sequence

from m2l import signals

COMPUTING = (
    *("adamerging", "demo", "eval", "generate", "lm_eval", "mask", "moe", "rounds", "search"),
    *("skills", "statistics", "study", "sweep", "train"),
)
"""The commands that run models."""

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
    if own and name in COMPUTING:
        _use_huge_pages()
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


def _use_huge_pages() -> None:
    """Starts this process anew with huge pages for malloc, which glibc reads at its start.

    XLA on a CPU takes memory for its temporaries anew at every step: in pages of 4 KiB, a step of
    training takes a fifth longer. Where GLIBC_TUNABLES is set already, it stays as it is. A program
    of the user's own, which has called the command, is not started again.
    """
    program = os.path.basename(sys.argv[0])
    if program not in ("m2l", "__main__.py") or not sys.executable:
        return
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
