"""The sandbox: off by default, and what a program tries inside it does not get out."""

import contextlib
import os
import re
import time
from pathlib import Path

import pytest

from m2l.errors import EvaluationError
from m2l.evaluation import metrics, sandbox
from m2l.evaluation.sandbox import isolation

FEW = sandbox.Limits(seconds=2, memory=1 << 28, file=1 << 16)


@pytest.fixture(scope="module")
def can_run():
    """Skips where this machine cannot put up the walls, as some containers cannot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sandbox.SWITCH, sandbox.ON)
        try:
            sandbox.run("", FEW)
        except EvaluationError as error:
            pytest.skip(str(error))


@pytest.fixture
def on(can_run, monkeypatch):
    monkeypatch.setenv(sandbox.SWITCH, sandbox.ON)


@pytest.mark.parametrize("value", [None, "", "1", "true"])
def test_nothing_runs_unless_it_is_switched_on(monkeypatch, tmp_path, value):
    monkeypatch.delenv(sandbox.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(sandbox.SWITCH, value)
    monkeypatch.setattr(sandbox.subprocess, "Popen", None)
    for attempt in (
        lambda: sandbox.run("x = 1"),
        lambda: sandbox.verdicts([["#<answer>"]], ["x = 1"]),
        lambda: metrics.metric("sandbox")([["#<answer>"]], ["x = 1"]),
        lambda: metrics.require(["sandbox"]),
    ):
        with pytest.raises(EvaluationError, match="M2L_RUN_GENERATED_CODE=sandbox"):
            attempt()


FINE = [
    "assert 1 + 1 == 2",
    "import math, re, json, collections, itertools, random, threading\nassert math.sqrt(4) == 2",
    "with open('mine', 'w') as f: f.write('x')\nassert open('mine').read() == 'x'",
    "import threading\nt = threading.Thread(target=lambda: None)\nt.start()\nt.join()",
    "import os\nassert os.listdir('.') == [] and os.listdir('/proc') == []",
    "import os\nassert set(os.environ) <= {'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'LC_CTYPE'}",
    "print('x' * 1000000)",
]


@pytest.mark.parametrize("program", FINE)
def test_a_program_that_only_computes_passes(on, program):
    assert sandbox.run(program, sandbox.Limits(seconds=5)) == "passed"


SYSTEM_CALL = (
    "import ctypes, os, platform\nif platform.machine() != 'x86_64': os._exit(0)\n"
    "call = ctypes.CDLL(None).syscall\n"
)
THREADS = """
import threading, time
threading.stack_size(1 << 15)
started = 0
try:
    for _ in range(2000):
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
"""
FAILING = {
    "assert 1 + 1 == 3": "AssertionError",
    "x = (": "SyntaxError",
    "def f(): return f()\nf()": "RecursionError",
    "import sys\nsys.exit(0)": "SystemExit",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "import os\nos._exit(0)": "ended before its tests",
    "import ctypes\nctypes.string_at(0)": "ended before its tests",
    # Time and memory.
    "while True: pass": "out of time",
    "import time\ntime.sleep(60)": "out of time",
    "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: 0)\nwhile 1: pass": "out of time",
    "x = bytearray(1 << 29)": "MemoryError",
    "x = []\nwhile True: x.append('a' * 1000000 + str(len(x)))": "MemoryError",
    # Files.
    "open('big', 'wb').write(b'x' * (1 << 20))": "OSError",
    "for i in range(9999): open(str(i), 'w')": "OSError",
    "open('/dev/null', 'w')": "PermissionError",
    # The network and other programs.
    "import socket\nsocket.socket()": "PermissionError",
    "import socket\nsocket.socket(socket.AF_UNIX)": "PermissionError",
    "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')": "URLError",
    "import os\nos.fork()": "PermissionError",
    "import subprocess\nsubprocess.run(['/bin/true'])": "PermissionError",
    "import os\nos.execv('/bin/true', ['true'])": "PermissionError",
    "import os\nos.kill(1, 9)": "PermissionError",
    "import os\nassert os.system('true') == 0": "AssertionError",
    # Memory that is not of its address space, threads, signals.
    f"{SYSTEM_CALL}assert call(29, 0, 1 << 20, 0o1600) >= 0": "AssertionError",
    f"{SYSTEM_CALL}assert call(68, 0, 0o1600) >= 0": "AssertionError",
    f"{SYSTEM_CALL}assert call(64, 0, 1, 0o1600) >= 0": "AssertionError",
    f"{SYSTEM_CALL}assert call(240, b'/q', 0o102, 0o600, None) >= 0": "AssertionError",
    f"{SYSTEM_CALL}assert call(319, b'm', 0) >= 0": "AssertionError",
    f"{SYSTEM_CALL}assert call(447, 0) >= 0": "AssertionError",
    f"{SYSTEM_CALL}assert call(206, 1024, b'\\0' * 8) == 0": "AssertionError",
    f"{SYSTEM_CALL}assert call(157, 1, 0, 0, 0, 0) == 0": "AssertionError",
    f"{SYSTEM_CALL}assert call(129, 1, 0, b'\\0' * 128) == 0": "AssertionError",
    "open('/dev/shm/x', 'w')": "FileNotFoundError",
    "from multiprocessing import shared_memory as s\ns.SharedMemory(create=True, size=1)": (
        "Error"
    ),
    "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(8)]": "OSError",
    f"{THREADS}assert started == 2000": "AssertionError",
    "import os\nos.setsid()": "PermissionError",
    # Other processes' files and locks.
    "import fcntl, os\nfcntl.flock(os.open(os.__file__, os.O_RDONLY), 1)": "PermissionError",
    "import fcntl, os\nfcntl.lockf(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)": (
        "PermissionError"
    ),
    "import fcntl, os\nfcntl.fcntl(os.open('.', 0), fcntl.F_NOTIFY, 2)": "PermissionError",
    "import os\nos.mkfifo('fifo')": "PermissionError",
    "import socket\nsocket.socketpair()": "PermissionError",
    "open('/etc/passwd')": "FileNotFoundError",
    "import os\nopen(os.__file__, 'a')": "Error",
    "import os\nos.utime(os.__file__)": "Error",
    # The walls themselves.
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))": "ValueError",
    "import ctypes\nl = ctypes.CDLL(None)\nassert l.unshare(0x10000000) == 0": "AssertionError",
    "import ctypes\nl = ctypes.CDLL(None)\nassert l.mount(b'a', b'/tmp', b'tmpfs', 0, 0) == 0": (
        "AssertionError"
    ),
    "import ctypes\nl = ctypes.CDLL(None)\nassert l.umount2(b'/proc', 2) == 0": "AssertionError",
}


@pytest.mark.parametrize("program", FAILING)
def test_a_program_that_goes_beyond_its_limits_fails(on, program):
    found = sandbox.run(program, FEW)
    assert found.startswith("failed: ") and FAILING[program] in found


@pytest.mark.parametrize("said", ["passed", "no wall: none", "x" * 100000])
def test_a_verdict_that_a_program_writes_itself_is_none(on, said):
    program = f"""
import os
for number in range(64):
    try:
        os.write(number, {said!r}.encode())
    except OSError:
        pass
os._exit(0)
"""
    assert sandbox.run(program, FEW).startswith("failed: ")


def test_files_outside_are_neither_written_nor_removed(on, tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("whole")
    folder.mkdir()
    for attempt in (
        f"open({str(victim)!r}, 'w').write('gone')",
        f"open({str(victim)!r}, 'a').write('more')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, 'mine')",
        f"import os; os.rmdir({str(folder)!r})",
        f"import os; os.chmod({str(victim)!r}, 0)",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        assert sandbox.run(attempt, FEW).startswith("failed: "), attempt
    assert victim.read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "victim"]


def test_fifos_files_and_locks_outside_are_not_there(on, tmp_path):
    fifo, secret = tmp_path / "fifo", tmp_path / "secret"
    os.mkfifo(fifo)
    secret.write_text("secret")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for path in (fifo, secret):
        for mode in ("r", "w"):
            found = sandbox.run(f"open({str(path)!r}, {mode!r}).write('out')", FEW)
            assert found == "failed: FileNotFoundError"
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.skipif(os.getuid() != 0, reason="of root alone")
def test_a_program_of_root_is_not_run_by_root(on):
    assert sandbox.run("import os\nassert os.getuid() != 0 and os.getgroups() == []") == "passed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 1000)
        assert isolation._ids_of_user(os.getuid()) == [1000]


def running(name):
    """The processes whose command line has a name."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                found.add(pid)
    return found


def test_nothing_of_a_run_stays_behind(on, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    inside = tmp_path / "sandboxed_for_this_test.py"
    inside.write_text(Path(isolation.__file__).read_text())
    monkeypatch.setattr(sandbox, "_ISOLATION", inside)
    found = sandbox.run("open('mine', 'w').write('x')\nwhile True: pass", FEW)
    assert found == "failed: out of time"
    assert list(tmp_path.iterdir()) == [inside]
    deadline = time.monotonic() + 60  # the kernel takes its time where there is much to do
    while running(inside.name) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(inside.name)


def test_the_wall_clock_stops_what_uses_no_time_of_the_processor(on):
    start = time.monotonic()
    assert sandbox.run("import time\ntime.sleep(1000)", FEW) == "failed: out of time"
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("part", "instead", "missing"),
    [
        ("_MOUNT_SETATTR = 442", "_MOUNT_SETATTR = 99999", "file systems that are read-only"),
        ("_NEWUSER | _NEWNS", "0x1000 | _NEWNS", "namespaces of its own"),
        ("(1, _MAX_PROCESSES)", "(9, _MAX_PROCESSES)", "limits"),
        ('"x86_64": 0xC0', '"vax": 0xC0', "a filter of system calls"),
    ],
)
def test_a_missing_part_of_the_isolation_is_named_and_nothing_runs(
    on, monkeypatch, tmp_path, part, instead, missing
):
    source = Path(isolation.__file__).read_text()
    if "x86_64" in part and os.uname().machine != "x86_64":
        pytest.skip("of another architecture")
    assert part in source
    broken, trace = tmp_path / "broken.py", tmp_path / "trace"
    broken.write_text(source.replace(part, instead))
    monkeypatch.setattr(sandbox, "_ISOLATION", broken)
    with pytest.raises(EvaluationError, match=f"cannot run generated code safely: {missing}"):
        sandbox.run(f"open({str(trace)!r}, 'w')", FEW)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("header", "place"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0),
        ("/usr/include/asm-generic/unistd.h", 1),
    ],
)
def test_the_numbers_of_system_calls_are_the_kernels(header, place):
    if not Path(header).exists():
        pytest.skip("no headers of the kernel here")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    numbers = {name: int(number) for name, number in defined}
    for name, pair in isolation._SYSTEM_CALLS.items():
        assert pair[place] == numbers.get(name), name


TEST = "import math\n#<answer>\nassert double(2) == 4\nassert double(-1) == -2"


def test_an_answer_takes_its_place_in_the_test_program():
    assert sandbox.insert_answer("a\n#<answer>\nb", "x") == sandbox.AnswerTests("a", "x", "b")
    answer = "Here you are:\n```python\nx = 1\n```\nDone.\n```\ny = 2\n```"
    assert sandbox.insert_answer("#<answer>\nb", answer) == sandbox.AnswerTests("", "x = 1\n", "b")
    assert sandbox.extract_code("```py\nx = 1") == "x = 1"
    with pytest.raises(EvaluationError, match="lacks the line"):
        sandbox.insert_answer("a = '#<answer>'", "x")


def test_the_metric_is_the_share_of_answers_that_pass_all_their_tests(on):
    right, wrong = "def double(x):\n    return 2 * x", "def double(x):\n    return x * x"
    answers = [right, wrong, f"```python\n{right}\n```", "I do not know."]
    figures, values = metrics.figures("sandbox", [[TEST]] * 4, answers)
    assert values == [100, 0, 100, 0]
    assert figures == {"sandbox": 50.0}
    both = ["#<answer>\nassert double(2) == 4", "#<answer>\nassert double(3) == 6"]
    assert metrics.figures("sandbox", [both] * 2, [right, wrong])[1] == [100, 0]
