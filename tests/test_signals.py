"""SIGINT and SIGTERM: what every command does with them, at any moment."""

import os
import random
import signal
import subprocess
import sys

import pytest

from m2l import checkpoints, signals
from m2l.errors import Stopped
from m2l.training import optimizers

BOTH = (signal.SIGINT, signal.SIGTERM)
MODULES = ("click", "numpy", "jax", "jax._src.core", "ml_dtypes", "jax._src.lax.lax")
# What a command does its work with: one that is given nothing to do ends before it imports JAX.
COMMANDS = {
    "train": "--gin_file {road}/tiny.gin --out {out}",
    "demo": "--out {out}",
    "study": "--gin_file experiments/demo.gin --out {out}",
    "merge": "--base {road}/base --expert {road}/sentiment --method average --out {out}",
    "convert": "{road}/base {out}",
    "eval": "--checkpoint {road}/base --mixture sentiment --out {out}",
    "sweep": "--base {road}/base --expert {road}/sentiment --method average --out {out}",
    "search": "--expert {road}/sentiment --mixture sentiment --out {out}",
    "inspect": "{road}/base",
    "doctor": "",
    "rounds": "--gin_file experiments/rounds.gin --init {road}/base --out {out}",
}

# Sends itself a signal when it comes to import a module, and tells who goes on after that.
AT_IMPORT = """
import importlib.abc, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))
        return None

_, module, number, *sys.argv[1:] = sys.argv
sys.meta_path.insert(0, Finder())
from m2l.cli import main
main()
"""


@pytest.fixture(autouse=True, scope="module")
def sigint_as_in_a_terminal():
    """Children would inherit that a job in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        start_new_session=True,
    )


def seeded():
    """For every command a signal, and the module during whose import it comes."""
    draw = random.Random(16)
    return [(name, draw.choice(BOTH), draw.choice(MODULES)) for name in COMMANDS]


@pytest.mark.parametrize(("command", "number", "module"), seeded())
def test_a_signal_during_imports_ends_every_command_with_one_line(
    command, number, module, road, tmp_path
):
    arguments = COMMANDS[command].format(road=road, out=tmp_path / "out").split()
    done = run(AT_IMPORT, module, int(number), command, *arguments)
    resumable = command in ("train", "rounds", "demo", "study", "search")
    assert done.returncode == (0 if resumable else 128 + number), done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("m2l: stopped")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", BOTH)
def test_the_command_saves_training_and_says_so(
    number, road, run_m2l, tmp_path, monkeypatch, capsys
):
    schedule = optimizers.schedule

    def interrupted(*args, **kwargs):
        rate = schedule(*args, **kwargs)
        return lambda at: (signal.raise_signal(number) if at == 1 else None) or rate(at)

    trained = ["train", "--gin_file", road / "tiny.gin", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "schedule", interrupted)
        assert run_m2l(*trained) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m2l:")]
    assert "stopped at step 2 of 3" in line and "the same command goes on" in line
    assert run_m2l(*trained) == 0
    digests = {checkpoints.read_manifest(path).digest for path in (tmp_path / "run", road / "base")}
    assert len(digests) == 1


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_a_signal_in_convert_leaves_nothing(
    number, to, road, run_m2l, tmp_path, monkeypatch, capsys
):
    from m2l.checkpoints import huggingface, importing

    arguments = [road / "base", tmp_path / "results" / "out"]
    if to == "orbax":
        assert run_m2l("convert", road / "base", tmp_path / "exported") == 0
        arguments = [tmp_path / "exported", arguments[1], "--vocabulary", "microworld"]
    for module in (huggingface, importing):
        original = module.in_parallel

        def interrupted(work, items, done, workers=1, original=original):
            def advance(nbytes):
                signal.raise_signal(number)
                done(nbytes)

            original(work, items, advance, workers)

        monkeypatch.setattr(module, "in_parallel", interrupted)
    capsys.readouterr()
    assert run_m2l("convert", *arguments) == 128 + number
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m2l:")]
    assert len(lines) == 1 and "stopped" in lines[0]
    assert not list((tmp_path / "results").iterdir())


PROGRAM = """
import os, signal, subprocess, sys, time
from m2l import signals

def send(number):
    os.kill(os.getpid(), number)

with signals.watched(None, None, restored=False):
    {body}
    sys.exit(7)
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        # Nothing to save: at once.
        ("send(signal.SIGTERM); time.sleep(60)", 143),
        ("send(signal.SIGINT); signals.threading.Event().wait()", 130),
        # A body that never looks is ended when its time is over; one without a limit by a second.
        ("with signals.deferred(0.1): send(signal.SIGTERM); time.sleep(60)", 143),
        ("with signals.deferred(None): send(2); send(2); time.sleep(60)", 130),
        ("with signals.deferred(None): send(15); send(2); time.sleep(60)", 143),
        # A body that answers goes on to its own end.
        ("with signals.deferred(0.1): send(signal.SIGINT); assert signals.requested() == 2", 7),
        ("with signals.deferred(None): send(15); signals.requested(); time.sleep(0.2)", 7),
    ],
)  # fmt: skip
def test_a_signal_is_answered_by_the_body_or_ends_the_process(body, code):
    done = run(PROGRAM.format(body=body))
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == (code != 7)


def test_a_signal_that_ends_the_process_kills_its_children():
    reading, writing = os.pipe()
    body = (
        "child = subprocess.Popen(['sleep', '600'], process_group=0, pass_fds=[int(sys.argv[1])])\n"
        "    with signals.killed_at_end(child.pid): send(signal.SIGTERM); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body), str(writing)], pass_fds=[writing]
    )
    os.close(writing)
    assert process.wait(60) == 143
    assert os.read(reading, 1) == b""  # No process has the other end any more.
    os.close(reading)


def test_an_ignored_sigint_stays_ignored():
    body = "send(signal.SIGINT)"
    ignoring = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    assert run(ignoring + PROGRAM.format(body=body)).returncode == 7


def test_a_body_outside_the_command_answers_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(Stopped, match="Ctrl-C"), signals.deferred():
        signals.check()
        signal.raise_signal(signal.SIGINT)
        signals.check()
    assert [signal.getsignal(number) for number in BOTH] == before
    with signals.deferred():
        assert signals.requested() is None


def test_a_forked_process_has_the_default_handlers_again():
    body = (
        "child = os.fork()\n"
        "    if not child: signal.raise_signal(signal.SIGTERM); os._exit(0)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM"
    )
    assert run(PROGRAM.format(body=body)).returncode == 7
