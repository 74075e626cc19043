"""Python that a model wrote, run against tests, behind walls; off unless it is switched on.

Each program is a process of its own with no network and no sockets, no other process in sight,
every file system read-only but an empty folder in memory, no environment, no capabilities, a filter
of system calls, and limits of CPU and wall time, memory and file size; it ends with all that it
started. A machine that cannot put up one of the walls runs nothing, and says which.

It is still somebody else's code on your kernel, and may read your files, though it can tell nobody:
run it on a machine that holds nothing you could not lose, such as a virtual machine of its own.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from m2l.errors import EvaluationError

SWITCH, ON = "M2L_RUN_GENERATED_CODE", "sandbox"
ANSWER = "#<answer>"
"""The line of a test program that gives way to what the model wrote."""

_INSIDE = Path(__file__).with_name("sandboxed.py")
_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Of CPU, and of the clock; the latter with a second to start.
        memory: Bytes of address space.
        file: Bytes of a file, and of all its files together.
    """

    seconds: int = 10
    memory: int = 1 << 30
    file: int = 1 << 20


def enabled() -> bool:
    """Whether this process may run code that a model wrote."""
    return os.environ.get(SWITCH, "") == ON


def require_enabled() -> None:
    """Refuses to go on where generated code may not run.

    Raises:
        EvaluationError: it is not switched on.
    """
    if not enabled():
        raise EvaluationError(
            "this task is scored by running Python that the model wrote, which is off by default; "
            f"on a machine that holds nothing you could not lose, set {SWITCH}={ON}; or score by "
            "--generative_score likelihood, which runs nothing"
        )


def run(program: str, limits: Limits = Limits()) -> str:
    """Runs one program; "passed" if it came to its end, else what became of it.

    Args:
        program: Python, the tests included: a test that is not met raises.
        limits: What it may use.

    Raises:
        EvaluationError: it is not switched on; or this machine cannot put up one of the walls.
    """
    require_enabled()
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="m2l-sandbox-") as folder:
        job = {
            **dataclasses.asdict(limits),
            "program": program,
            "folder": folder,
            "word": word,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_INSIDE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            start_new_session=True,
        )
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.close()
            process.wait(limits.seconds + 1)
            said = os.read(process.stdout.fileno(), 4096).decode(errors="replace")
        except subprocess.TimeoutExpired:
            return "failed: out of time"
        except BrokenPipeError:
            said = ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # what is left in its namespace ends with it
                process.wait()
            process.stdout.close()
    ours, _, said = said.partition(" ")  # all else was written by the program, into what it found
    if ours == word and said.startswith("no wall: "):
        raise EvaluationError(
            f"this machine cannot run generated code safely: {said.removeprefix('no wall: ')}; it "
            "takes Linux 5.12 or later on x86-64 or ARM64 with user namespaces allowed, which "
            "containers often forbid; nothing was run"
        )
    if ours == word:
        return said
    if process.returncode in (signal.SIGXCPU + 128, 256 - signal.SIGXCPU, 256 - signal.SIGKILL):
        return "failed: out of time"
    return "failed: it ended before its tests did"


def code_of(answer: str) -> str:
    """The code of an answer: its first fenced block if it has one, else all of it."""
    fenced = _FENCE.search(answer)
    return fenced[1] if fenced else answer


def assembled(test: str, answer: str) -> str:
    """A test program with the code of an answer in place of its line ANSWER.

    Raises:
        EvaluationError: the test program has no such line.
    """
    lines = test.split("\n")
    if ANSWER not in lines:
        raise EvaluationError(f"a test program lacks the line {ANSWER!r}: {test!r:.80}")
    place = lines.index(ANSWER)
    return "\n".join([*lines[:place], code_of(answer), *lines[place + 1 :]])


def verdicts(
    tests: Sequence[Sequence[str]], answers: Sequence[str], limits: Limits = Limits()
) -> list[str]:
    """What became of each answer, as many at once as there are processors.

    Args:
        tests: Per answer the test programs that it has to pass.
        answers: What a model wrote.
        limits: What each program may use.

    Returns:
        "passed" or the first failure.

    Raises:
        EvaluationError: as `run` and `assembled` do.
    """
    require_enabled()

    def verdict(of_one: Sequence[str], answer: str) -> str:
        programs = (assembled(test, answer) for test in of_one)
        found = (run(program, limits) for program in programs)
        return next((one for one in found if one != "passed"), "passed")

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(verdict, tests, answers))


def pass_at_k(samples: int, passing: int, k: int) -> float:
    """The chance that one of `k` of a model's answers passes, without bias.

    Source: Chen et al. (2021), equation 1: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: How many answers were drawn, n.
        passing: How many of them pass, c.
        k: How many may be handed in, at most n.

    Raises:
        EvaluationError: counts that cannot be.
    """
    if not 0 <= passing <= samples or not 1 <= k <= samples:
        raise EvaluationError(
            f"pass@{k} of {samples} answers, {passing} of which pass: there have to be at least k"
        )
    return 1.0 - math.comb(samples - passing, k) / math.comb(samples, k)
