"""Python that a model wrote, run against tests in isolation; off unless it is switched on.

The tests run in one process and the program in another, which receives its own source and the
arguments of its calls and answers with values: it knows neither the tests nor what they expect,
and has no part in the verdict. Each of the two has no network and no sockets, no other process in
sight, no file but the system's libraries, Python's and an empty folder in memory, no environment,
no privileges, a filter of system calls, and limits of CPU and wall time, memory, threads and file
size; it ends with all that it started. A machine that lacks a part of the isolation runs nothing,
and the error says which part.

It is still somebody else's code on your kernel: run it on a machine that holds nothing you could
not lose, such as a virtual machine of its own.
"""

import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from m2l import signals
from m2l.errors import EvaluationError

SWITCH, ON = "M2L_RUN_GENERATED_CODE", "sandbox"
ANSWER = "#<answer>"
"""The line of a test program that is replaced by what the model wrote."""

_ISOLATION, *_MODULES = (
    Path(__file__).with_name(name) for name in ("isolation.py", "exchange.py", "execution.py")
)
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


def require_enabled() -> None:
    """Refuses to go on where generated code may not run.

    Raises:
        EvaluationError: it is not switched on.
    """
    if os.environ.get(SWITCH) != ON:
        raise EvaluationError(
            "this task is scored by running Python that the model wrote, which is off by default; "
            f"on a machine that holds nothing you could not lose, set {SWITCH}={ON}; or score by "
            "--generative_score likelihood, which runs nothing"
        )


@dataclasses.dataclass(frozen=True)
class AnswerTests:
    """Tests of an answer.

    Attributes:
        preamble: Source that the tests share with the answer: imports, and what it may use.
        answer: Source that the model wrote, run after `preamble` in a process of its own.
        tests: Source of the tests, run after `preamble` in another process: one that does not pass
            raises.
    """

    preamble: str
    answer: str
    tests: str


def run(program: str | AnswerTests, limits: Limits = Limits()) -> str:
    """Runs one program; returns "passed" if all its tests pass, else how it failed.

    Args:
        program: Tests and answer; or Python with its tests inside. Of the latter, asserts at the
            top, loops of them, and functions named `check` or `test...` that have asserts are the
            tests; an assert elsewhere is part of the program, which could evade it.
        limits: What the program, and likewise its tests, may use.

    Raises:
        EvaluationError: it is not switched on; or this machine lacks a part of the isolation.
    """
    require_enabled()
    job = {"program": program} if isinstance(program, str) else dataclasses.asdict(program)
    with tempfile.TemporaryDirectory(prefix="m2l-sandbox-") as folder:
        settings = {**dataclasses.asdict(limits), "folder": folder}
        process = subprocess.Popen(
            [sys.executable, "-I", *map(str, (_ISOLATION, *_MODULES))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            start_new_session=True,
        )
        message = "\n".join(map(json.dumps, (settings, job))).encode()
        try:
            with signals.killed_at_end(process.pid):
                output, _ = process.communicate(message, limits.seconds + 1)
        except subprocess.TimeoutExpired:
            return "failed: out of time"
        finally:
            if process.poll() is None:
                # What is left in its namespaces ends with it.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdin.close()
            process.stdout.close()
    result = json.loads(output or "{}")
    if "lacks" in result:
        raise EvaluationError(
            f"this machine cannot run generated code safely: {result['lacks']}; it takes Linux "
            "5.14 or later on x86-64 or ARM64 with user namespaces allowed, which containers often "
            "forbid; nothing was run"
        )
    if "verdict" in result:
        return result["verdict"]
    if process.returncode in (signal.SIGXCPU + 128, 256 - signal.SIGXCPU, 256 - signal.SIGKILL):
        return "failed: out of time"
    return "failed: it ended before its tests did"


def extract_code(answer: str) -> str:
    """Returns the code of an answer: its first fenced block if it has one, else all of it."""
    fenced = _FENCE.search(answer)
    return fenced[1] if fenced else answer


def insert_answer(test: str, answer: str) -> AnswerTests:
    """Returns a test program with the code of an answer in place of its line ANSWER.

    Raises:
        EvaluationError: the test program has no such line.
    """
    lines = test.split("\n")
    if ANSWER not in lines:
        raise EvaluationError(f"a test program lacks the line {ANSWER!r}: {test!r:.80}")
    place = lines.index(ANSWER)
    preamble, tests = "\n".join(lines[:place]), "\n".join(lines[place + 1 :])
    return AnswerTests(preamble, extract_code(answer), tests)


def verdicts(
    tests: Sequence[Sequence[str]], answers: Sequence[str], limits: Limits = Limits()
) -> list[str]:
    """Runs the tests of each answer, as many at once as there are processors.

    Args:
        tests: Per answer the test programs that it has to pass.
        answers: What a model wrote.
        limits: What each program may use.

    Returns:
        "passed" or the first failure.

    Raises:
        EvaluationError: as `run` and `insert_answer` do.
    """
    require_enabled()

    def verdict(answer_tests: Sequence[str], answer: str) -> str:
        programs = (insert_answer(test, answer) for test in answer_tests)
        results = (run(program, limits) for program in programs)
        return next((result for result in results if result != "passed"), "passed")

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(verdict, tests, answers))
