"""Runs programs in forks of one process that has imported everything and used nothing.

Reads one line of JSON for each call, {"programs": [{"code", "arguments", "stdin", "environment",
"dies"}], "folder"}: runs the programs at once, each in a fork, writes what they say into the
folder, and then answers with a line of their exit codes. A program that takes longer than SECONDS
is killed, and one with `dies` where `die_at` says.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path

import jax

SECONDS = 900


def die_at(pattern):
    """Kills this process at the first audit event, "os.rename FROM TO" say, that has the pattern.

    Python raises such an event before it renames, removes or opens.
    """
    matches = re.compile(pattern).search

    def hook(event, arguments):
        if not event.startswith(("os.", "shutil.")):
            return
        if matches(" ".join(map(str, (event, *arguments)))):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(program, folder, number):
    """What a fork does: the program, as if it had been started by itself."""
    (folder / f"{number}.in").write_text(program["stdin"])
    for descriptor, name in enumerate(("in", "out", "err")):
        opened = os.open(folder / f"{number}.{name}", os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = os.fdopen(0)
    os.environ.update(program["environment"])
    sys.argv = ["-c", *program["arguments"]]
    if program["dies"]:
        die_at(program["dies"])
    code = 1
    try:
        exec(compile(program["code"], "<program>", "exec"), {"__name__": "__main__"})
        # A process of Python's does it at its end, which a fork does not come to: process 0 must
        # not go while another one still asks it.
        jax.distributed.shutdown()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill(processes):
    """Kills processes, and those that they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def together(programs, folder):
    """Runs programs at once; returns their exit codes."""
    forked = []
    for number, program in enumerate(programs):
        if not (process := os.fork()):
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            run(program, folder, number)
        forked.append(process)
    # They would go on, in groups of their own.
    signal.signal(signal.SIGTERM, lambda *_: (kill(forked), os._exit(1)))
    waiting = threading.Timer(SECONDS, kill, [forked])
    waiting.start()
    try:
        return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in forked]
    finally:
        waiting.cancel()


def main():
    # Used by the programs.
    from m2l import checkpoints, merging, tasks  # noqa: F401
    from m2l.evaluation import evaluator  # noqa: F401
    from m2l.training import loop  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        answers.write(json.dumps(together(job["programs"], Path(job["folder"]))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
