"""Measures the published figures, each beside its peer, and prints docs/performance.md.

    python scripts/bench/all.py [--only WORD] [--torch PYTHON] [--mergekit MERGEKIT_YAML]

Every figure is a row of FIGURES. A command runs once for all rows that name it, and measures the
peers in the same run: PYTHON has torch and transformers, MERGEKIT_YAML is mergekit's command; a
peer that is not given stays out. WORD: only commands with it in them ("none": the page alone).
Results are kept in scripts/bench/performance.json, from all of which the page is printed. Nothing
else should run.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
PAGE = BENCH.parents[1] / "docs" / "performance.md"
RESULTS = BENCH / "performance.json"
RUNS = 5
PEERS = ("torch", "mergekit")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published figure.

    Attributes:
        name: What is measured.
        command: A script of this folder and its arguments, which prints figures by name as the JSON
            of its last line, or a line that begins with "m2l ", whose whole process is timed (OUT
            in it is an empty directory). An option whose value is "{torch}" or "{mergekit}" is left
            out where that peer is not given.
        key: Its name among the command's figures; that with " limit" behind it is its limit, that
            with the peer's name behind it the peer's.
        unit: "s", "min" and "MiB" are better small, everything else large.
        peer: Whose figure it is compared with.
        wanted: How many times as good as the peer's it is to be or, without a peer, the value.
        note: What was tried and what holds it, where it is missed.
    """

    name: str
    command: str
    key: str = ""
    unit: str = "s"
    peer: str = ""
    wanted: float | None = None
    note: str = ""

    @property
    def small(self) -> bool:
        """Whether less is better."""
        return self.unit.split()[0] in ("s", "min", "MiB")


T5_STEP = "models.py train t5 --torch {torch}"
LLAMA_STEP = "models.py train llama --torch {torch}"
TUNING = "models.py train llama --targets 0.25 --torch {torch}"
LLAMA_NOTE = "On a CPU with AVX2 alone, another day: 118 tokens/s, torch 126, limit 142."
T5_BFLOAT16_NOTE = (
    "A traced step of T5-small spends 1.26 of 2.0 s in products, at 690 GFLOP/s where they reach "
    "900 alone (in float32 430 of 470), 0.17 s in those of attention, which XLA leaves to another "
    "library, and 0.3 s in conversions between the dtypes."
)
LLAMA_BFLOAT16_NOTE = (
    "A traced step of SmolLM2-135M spends 1.21 of 2.1 s in products, at 690 GFLOP/s where they "
    "reach 900 alone, and 0.4 s in conversions between the dtypes."
)
AVERAGE_NOTE = (
    "A fifth of mergekit's time is 1.4 s, of task arithmetic's 1.5 s. Apart from the start the two "
    "cores are 85 % busy; another thread made it slower."
)
DARE_NOTE = "Drawing 2e9 words by Threefry takes 1.6 CPU seconds, which the limit leaves out."
TINY_NOTE = (
    "As of DARE-TIES, Python and JAX take 0.4 s to start, m2l's modules 0.06, functions that are "
    "compiled already 0.1 in all to be traced and loaded."
)
SUITE_NOTE = (
    "Some 2,100 CPU seconds: 650 in XLA, compiled once for all processes, 300 in tracing, 500 in "
    "processes that are started to be killed or to work together. What is left is a test's own "
    "work; fewer seconds were not had without fewer tests."
)
RANKING = "evaluate.py rank --torch {torch}"
DECODING = "evaluate.py decode --torch {torch}"
MEMORY = "The same: peak memory of the process"
BFLOAT16 = "The same in bfloat16"
MERGES = "merge.py figures --models 500m --mergekit {mergekit}"
TINY_MERGES = "merge.py figures --models 10m"
GROWTH = "merge.py growth --models 125m,500m,1b --experts 4 --runs 3"
SPECTRAL = "merge.py spectral --models 10m --experts 4"
LARGER_SPECTRAL = "merge.py spectral --models 125m --experts 4 --methods iso_c --runs 3"
COMMANDS = "startup.py commands"
FIGURES = {
    "First steps, whole processes": (
        Figure("`m2l tasks show`", COMMANDS, "tasks show", wanted=1.5),
        Figure("`m2l eval`, all of it there", COMMANDS, "eval again", wanted=1.0),
        Figure("`m2l eval`, tokenised before, 1M parameters", COMMANDS, "eval", wanted=3.0),
        Figure("`m2l train`, 10 steps, 1M parameters", COMMANDS, "train", wanted=5.0),
        Figure("`m2l demo`", "startup.py demo", "demo", "min", wanted=3.5),
        Figure("The suite", "startup.py suite", "suite", "min", wanted=8.0, note=SUITE_NOTE),
        Figure("The suite's fast part", "startup.py fast", "fast", "min", wanted=2.0),
    ),
    "Training": (
        Figure("T5-small, 16 x (256 + 64)", T5_STEP, "T5", "tokens/s", "torch", 1.15),
        Figure(MEMORY, T5_STEP, "T5 memory", "MiB", "torch"),
        Figure(
            *(BFLOAT16, T5_STEP, "T5 bfloat16", "tokens/s", "torch autocast", 1.4),
            T5_BFLOAT16_NOTE,
        ),
        Figure("SmolLM2-135M, 8 x 128", LLAMA_STEP, "Llama", "tokens/s", "torch", 1.15, LLAMA_NOTE),
        Figure(MEMORY, LLAMA_STEP, "Llama memory", "MiB", "torch"),
        Figure("The same, a quarter are targets", TUNING, "Llama", "tokens/s", "torch", 1.15),
        Figure(
            *(BFLOAT16, LLAMA_STEP, "Llama bfloat16", "tokens/s", "torch autocast", 1.1),
            LLAMA_BFLOAT16_NOTE,
        ),
    ),
    "Evaluation": (
        Figure("Ranking, T5-small, 4 choices", RANKING, "ranking", "examples/s", "torch"),
        Figure("The peer: each choice apart", RANKING, "ranking", "examples/s", "torch apart"),
        Figure(BFLOAT16, RANKING, "ranking bfloat16", "examples/s", "torch medium", 1.3),
        Figure("Decoding, T5-small, greedy", DECODING, "decoding", "tokens/s", "torch"),
    ),
    "Merging 4 experts, bfloat16, whole processes": (
        Figure("500M, average", MERGES, "average", "s", "mergekit", 5, AVERAGE_NOTE),
        Figure("500M, task arithmetic", MERGES, "task_arithmetic", "s", "mergekit", 5),
        Figure("500M, DARE-TIES", MERGES, "dare_ties", "s", "mergekit", 16, DARE_NOTE),
        Figure("500M, TIES, exact", MERGES, "ties", "s", "mergekit", 30),
        Figure(MEMORY, MERGES, "ties memory", "MiB", "mergekit"),
        Figure("7M, average", TINY_MERGES, "average", wanted=0.7),
        Figure("7M, DARE-TIES", TINY_MERGES, "dare_ties", wanted=0.7),
        Figure("7M, TIES", TINY_MERGES, "ties", wanted=0.7, note=TINY_NOTE),
    ),
    "Merging 4 experts by singular values; the limit are the decompositions alone": (
        Figure("7M, TSV-M", SPECTRAL, "tsv_m"),
        Figure("7M, Iso-C", SPECTRAL, "iso_c"),
        Figure("7M, Iso-CTS", SPECTRAL, "iso_cts"),
        Figure("125M, Iso-C", LARGER_SPECTRAL, "iso_c"),
    ),
    "Merging 4 experts, as the model grows": (
        *(
            Figure(f"{name}, {sizes}", GROWTH, f"{method} {sizes}", "s for each 1e9 parameters")
            for name, method in (
                ("Average", "average"),
                ("Task arithmetic", "task_arithmetic"),
                ("DARE-TIES", "dare_ties"),
                ("TIES, exact", "ties"),
            )
            for sizes in ("125m to 500m", "500m to 1b")
        ),
        *(
            Figure(f"TIES, exact: peak memory, {size}", GROWTH, f"ties memory {size}", "MiB")
            for size in ("125m", "500m", "1b")
        ),
    ),
}


def machine() -> str:
    """Describes the processor, its units for bfloat16, the memory and JAX's version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {name.strip(): value for name, _, value in (line.partition(": ") for line in lines)}
    flags = facts.get("flags", "").split()
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores of {facts.get('model name', platform.machine())} "
        f"({', '.join(units)}), {gib:.0f} GiB, jax {importlib.metadata.version('jax')}"
    )


def measure(command: str, peers: Mapping[str, str | None]) -> dict[str, float]:
    """Runs a command and returns its figures; of "m2l ..." its median seconds, by the name ""."""
    words = shlex.split(command)
    if words[0] == "m2l":
        words[0] = str(Path(sys.executable).parent / "m2l")
        with tempfile.TemporaryDirectory() as folder:
            seconds = [timed([*words], Path(folder) / str(run)) for run in range(RUNS + 1)]
        return {"": statistics.median(seconds[1:])}
    for index in reversed(range(len(words))):
        if words[index].strip("{}") in PEERS:
            peer = peers[words[index].strip("{}")]
            words[index - 1 : index + 1] = [words[index - 1], peer] if peer else []
    environment = dict(os.environ)
    if words[0] in ("models.py", "evaluate.py"):
        environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    script = [sys.executable, str(BENCH / words[0]), *words[1:]]
    done = subprocess.run(script, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    output = done.stdout
    return json.loads(output.splitlines()[-1])


def timed(command: list[str], out: Path) -> float:
    """Returns the seconds of a whole process, with OUT in its words replaced by a new path."""
    start = time.perf_counter()
    words = [word.replace("OUT", str(out)) for word in command]
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns docs/performance.md, of all figures with results."""
    lines = [
        "# Performance",
        "",
        "Printed by `python scripts/bench/all.py`; peers are measured in the same run. Limit: what",
        "the rates of products, reads and writes allow for the same work; share: how much of it is",
        "reached. Medians; nothing else was running. A dash: not possible on this machine.",
        "Training and evaluation have huge pages: m2l's command sees to it, the peer has them too.",
    ]
    for section, figures in FIGURES.items():
        rows = [figure for figure in figures if figure.command in results]
        if not rows:
            continue
        lines += ["", f"## {section}", ""]
        lines += ["| | m2l | peer | times as good | wanted | limit | share |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for figure in rows:
            lines.append(f"| {' | '.join(cells(figure, results[figure.command]['figures']))} |")
        notes = [f"- {figure.name}: {figure.note}" for figure in rows if figure.note]
        lines += ["", *notes] if notes else []
        for command in dict.fromkeys(figure.command for figure in rows):
            result = results[command]
            lines += ["", f"`{command}`: {result['date']}, {result['machine']}."]
    return "\n".join(lines) + "\n"


def cells(figure: Figure, figures: Mapping[str, float]) -> list[str]:
    """Returns the cells of a figure's row."""
    if figure.key not in figures:
        return [figure.name, "–", "", "", wanted_of(figure, None), "", ""]
    value, limit = figures[figure.key], figures.get(f"{figure.key} limit")
    peer = figures.get(f"{figure.key} {figure.peer}") if figure.peer else figure.wanted

    def times(other: float) -> float:
        return other / value if figure.small else value / other

    return [
        figure.name,
        shown(value, figure.unit),
        f"{figure.peer} {shown(peer, figure.unit)}" if figure.peer and peer else "",
        f"{times(peer):.2f}" if figure.peer and peer else "",
        wanted_of(figure, times(peer) if peer else None),
        shown(limit, figure.unit) if limit else "",
        f"{times(limit):.0%}" if limit else "",
    ]


def wanted_of(figure: Figure, times: float | None) -> str:
    """Returns what a figure is to be and, where it is not, so; `times` as good as the peer's."""
    if figure.wanted is None:
        return ""
    text = f"{figure.wanted:g} times" if figure.peer else shown(figure.wanted, figure.unit)
    missed = times is not None and times < (figure.wanted if figure.peer else 1.0)
    return f"{text}, missed" if missed else text


def shown(value: float, unit: str) -> str:
    """Returns a value with three digits and its unit."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f} {unit}"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="Only commands with this in them.")
    parser.add_argument("--torch", help="A Python that has torch and transformers.")
    parser.add_argument("--mergekit", help="The mergekit-yaml of an installation.")
    flags = parser.parse_args()
    # Modules are compiled to bytecode once, as where m2l is installed, not by every process.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for command in dict.fromkeys(figure.command for figure in itertools.chain(*FIGURES.values())):
        if flags.only in command:
            print(command, file=sys.stderr, flush=True)
            figures = measure(command, {name: getattr(flags, name) for name in PEERS})
            today = datetime.date.today().isoformat()
            results[command] = {"date": today, "machine": machine(), "figures": figures}
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    text = page(results)
    PAGE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
