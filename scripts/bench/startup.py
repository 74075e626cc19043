"""Measures what a user waits for: whole processes, from the command to its end, medians.

    python scripts/bench/startup.py commands
    python scripts/bench/startup.py demo
    python scripts/bench/startup.py suite | fast

`commands`: small commands, warm: each runs once before it counts, so that its examples are
tokenised and its functions compiled. The limit is the start of Python with what the command cannot
do without: Click for what is there already and for records, JAX for what computes.
`demo`: `m2l demo`, once, with empty caches. `suite`, `fast`: the test commands, once, where all is
installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
ROOT = Path(__file__).parents[2]
M2L = str(Path(sys.executable).parent / "m2l")
TASK = "imdb_good_or_bad"
MODEL = [
    "--gin_file",
    "experiments/pretrain_microworld.gin",
    "--gin.STEPS=10",
    "--gin.WARMUP_STEPS=2",
]


def seconds(command: list[str]) -> float:
    """Returns the seconds of a whole process.

    Raises:
        SystemExit: It failed.
    """
    start = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {process.stderr[-2000:]}")
    return time.perf_counter() - start


def median(command: list[str], out: Path | None = None) -> float:
    """Returns the median, after one run that does not count; `out` is removed before each."""
    times = []
    for _ in range(RUNS + 1):
        if out is not None:
            subprocess.run(["rm", "-rf", str(out)], check=True)
        times.append(seconds(command))
    return statistics.median(times[1:])


def commands(folder: Path) -> dict[str, float]:
    """Returns the seconds of each command, by name, and their bounds."""
    model, again, results = folder / "model", folder / "again", folder / "results"
    seconds([M2L, "train", *MODEL, "--out", str(model)])
    evaluate = [M2L, "eval", str(model), "--mixture", TASK, "--max_examples", "64", "--out"]
    train = [M2L, "train", "--init", str(model), "--mixture", TASK, "--steps", "10"]
    train += ["--batch_size", "32"]
    plain, computing = (
        median([sys.executable, "-c", code])
        for code in ("import click", "import jax; jax.devices()")
    )
    return {
        "tasks show": median([M2L, "tasks", "show", TASK]),
        "tasks show limit": plain,
        "eval": median([*evaluate, str(results)], results),
        "eval limit": computing,
        # The last of these is there.
        "eval again": median([*evaluate, str(results)]),
        "eval again limit": plain,
        "train": median([*train, "--out", str(again)], again),
        "train limit": computing,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["commands", "demo", "suite", "fast"])
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if flags.what == "commands":
            figures = commands(folder)
        elif flags.what == "demo":
            # As on the first day: nothing is compiled or tokenised yet.
            os.environ |= {
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "M2L_CACHE": str(folder / "cache"),
            }
            figures = {"demo": seconds([M2L, "demo", "--out", str(folder / "demo")]) / 60}
        else:
            fast = ["--fast"] if flags.what == "fast" else []
            command = ["bash", str(ROOT / "scripts" / "test.sh"), *fast]
            figures = {flags.what: seconds(command) / 60}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
