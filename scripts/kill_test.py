"""Kills a training run at random moments, and compares its end with a run that was not killed.

    python scripts/kill_test.py [--kills 20] [--steps 40] [--seed 0] [--signal KILL]

Trains a tiny T5, with a checkpoint every two steps and a validation every five, first in one go and
then killed that many times, each time some random steps and milliseconds further on.
Prints the step that each attempt began at, and both digests; exits with 1 if they differ. Every
attempt is a process of its own, forked from one that has imported everything but used nothing.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

from m2l import checkpoints, models, tasks
from m2l.data import vocabularies
from m2l.training import loop
from m2l.training.settings import TrainSettings

CONFIG = models.T5Config(1152, 16, 8, 32, 2, 1, 1)
SETTINGS = functools.partial(
    TrainSettings,
    mixture="sentiment",
    batch_size=4,
    learning_rate=0.05,
    save_every=2,
    log_every=1,
    validation="sentiment",
    validation_batches=1,
    evaluate_every=5,
    keep_best=True,
)


def train(out: Path, cache: Path, steps: int) -> None:
    """Trains a number of steps, or resumes."""
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    tasks.declare()
    loop.train(
        out,
        config=CONFIG,
        vocabulary=vocabularies.describe(vocabularies.load("microworld"), "microworld"),
        settings=SETTINGS(steps=steps),
        data={"source": "microworld"},
    )


def forked(work: Callable[[], None]) -> int:
    """Does work in a forked process; returns its id. It is quiet, and exits with 1 if it fails."""
    if process := os.fork():
        return process
    code = 1
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            work()
        code = 0
    finally:
        os._exit(code)


def steps_in(metrics: Path) -> int:
    """Returns the last complete step in a run's metrics; 0 for none."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def killed_run(
    root: Path, kills: int, steps: int, seed: int, number: int
) -> tuple[str, str, list[int]]:
    """Trains twice, in one go and with kills.

    Args:
        root: An empty folder.
        kills: How many times a process is killed.
        steps: How many steps are trained.
        seed: Decides the moments.
        number: The signal.

    Returns:
        The digests of both ends, and the step that each attempt began at.
    """
    chance = random.Random(seed)
    cache, whole, out = root / "cache", root / "whole", root / "killed"

    def wait(process: int) -> None:
        _, status = os.waitpid(process, 0)
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"a run ended with {os.waitstatus_to_exitcode(status)}")

    wait(forked(lambda: train(whole, cache, steps)))
    metrics, began = out / "metrics.jsonl", []
    for _ in range(kills):
        done = [int(path.name) for path in out.glob("checkpoints/*") if path.name.isdigit()]
        began.append(max(done, default=0))
        until = max(began[-1], steps_in(metrics)) + chance.randint(1, max(1, 2 * steps // kills))
        process = forked(lambda: train(out, cache, steps))
        while steps_in(metrics) < min(until, steps - 1):
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(process, number)
        os.waitpid(process, 0)
    wait(forked(lambda: train(out, cache, steps)))
    ends = [checkpoints.read_manifest(run).digest for run in (whole, out)]
    lines = [
        [
            {name: value for name, value in json.loads(line).items() if name in ("step", "loss")}
            for line in (run / "metrics.jsonl").open()
        ]
        for run in (whole, out)
    ]
    if lines[0] != lines[1]:
        raise SystemExit("the losses differ")
    return ends[0], ends[1], began


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        number = signal.Signals["SIG" + flags.signal]
        whole, killed, began = killed_run(
            Path(folder), flags.kills, flags.steps, flags.seed, number
        )
    print(f"{len(began)} kills; attempts began at steps {began}")
    print(f"in one go: {whole}\nkilled:    {killed}")
    sys.exit(whole != killed)


if __name__ == "__main__":
    main()
