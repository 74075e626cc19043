"""Damages, kills and feeds m2l at random, and counts what ends as README promises.

    python scripts/damage_campaign.py [--damages 160] [--kills 60] [--hostile 100] [--seed 0]

- A damage changes one file of a checkpoint, an export, a merged directory, a cached task, a cache
  of thresholds or results: a bit, the length, the content, its neighbour's content, or its
  existence. A command that reads it must say so in one line and exit with 2, or end with the same
  parameters as without the damage.
- A kill ends a merge, a conversion or the caching of a task at a random moment, by SIGKILL, SIGINT
  or SIGTERM. The signal must be answered by at most one line and the right exit code, and the same
  command, run again until it is done, must end with the same files and nothing left over.
- A hostile file is JSON, gin, YAML, a template or a header that no honest program writes. The
  command must say so in one line and exit with 2, within LIMIT seconds of processor time.

Prints a table of what was tried and passed, and a line for each that did not; exits with 1 if any
did not. Equal seeds try the same.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from m2l import checkpoints, models
from m2l.checkpoints import huggingface
from m2l.data import tokenizer_files
from m2l.typing import Json

LIMIT = 20.0
"""Seconds of processor time that a refusal may take, the command's start included."""

M2L = [sys.executable, "-m", "m2l"]
CONFIG = models.LlamaConfig(384, 16, 32, 2, 2, 1, 8, tie_word_embeddings=True)
LARGE = models.LlamaConfig(384, 256, 1024, 6, 4, 4, 64, tie_word_embeddings=True)
WEIGHTS = ".safetensors"


class Campaign:
    """Counts by kind, and what failed."""

    def __init__(self) -> None:
        self.tried: collections.Counter[str] = collections.Counter()
        self.failed: collections.Counter[str] = collections.Counter()

    def count(self, kind: str, trial: str, problem: str | None) -> None:
        """Counts a trial; `problem` says what went wrong, None that nothing did."""
        self.tried[kind] += 1
        print(f"{self.tried.total()}", end=" ", flush=True)
        if problem is not None:
            self.failed[kind] += 1
            print(f"FAILED {kind}: {trial}: {problem}", flush=True)


def run(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> tuple[int, str, str]:
    """Runs m2l; returns its exit code and what it wrote to stdout and stderr."""

    # Not preexec_fn: this process has threads.
    limited = ["bash", "-c", f'ulimit -t {int(4 * LIMIT)} && exec "$@"', "bash"]
    done = subprocess.run(
        [*limited, *M2L, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout, done.stderr


def said(error: str) -> list[str]:
    """Returns the lines of stderr that are no progress and no warning."""
    lines = error.replace("\r", "\n").splitlines()
    quiet = ("plan: ", "m2l: warning: ", "m2l: copied ")
    return [
        line
        for line in lines
        if line.strip() and not line.startswith(quiet) and not _is_progress(line)
    ]


def _is_progress(line: str) -> bool:
    return re.match(r"(?!m2l: ).*: +\d+%  ", line) is not None


def contents(path: Path) -> dict[str, str]:
    """Computes the digests of a directory's files of parameters and records, by name."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix not in (".md",) and "manifest" not in file.name
    }


# What is damaged


def make_inputs(root: Path, config: models.Config, seed: int) -> None:
    """Makes three checkpoints of one model, a base and two experts, and an export of each."""
    rng = np.random.default_rng(seed)
    base = {
        name: rng.standard_normal(spec.shape).astype(np.float32)
        for name, spec in checkpoints.flatten(models.spec(config)).items()
    }
    vocabulary = {
        "name": "bytes",
        "size": 384,
        "fingerprint": tokenizer_files.read("bytes").fingerprint,
    }
    for name in ("base", "one", "two"):
        params = {
            n: jnp.asarray(a + 0.1 * rng.standard_normal(a.shape).astype(np.float32))
            for n, a in base.items()
        }
        checkpoints.save(
            root / name,
            checkpoints.unflatten(params),
            model=models.to_dict(config),
            vocabulary=vocabulary,
            made_by={"kind": "campaign"},
        )
        huggingface.export_checkpoint(root / name, root / f"{name}_hf")


def flip(data: bytes, rng: random.Random) -> bytes:
    """Changes one bit."""
    if not data:
        return b"\0"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def digit(data: bytes, rng: random.Random) -> bytes:
    """Changes one decimal digit, or a bit where there is none."""
    places = [place for place, byte in enumerate(data[: 1 << 16]) if 48 <= byte < 58]
    if not places:
        return flip(data, rng)
    place = rng.choice(places)
    return data[:place] + bytes([48 + (data[place] - 48 + 1) % 10]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flip": flip,
    "digit": digit,
    "cut": lambda data, rng: data[: rng.randrange(max(1, len(data)))],
    "append": lambda data, rng: data + rng.randbytes(rng.randint(1, 64)),
    "empty": lambda data, rng: b"",
    "zeros": lambda data, rng: bytes(len(data)) if any(data) else b"\1" + data,
    "list": lambda data, rng: b"[]",
    "object": lambda data, rng: b"{}",
    "null": lambda data, rng: b"null",
    "deep": lambda data, rng: b"[" * 100_000,
    "delete": lambda data, rng: None,
}


def damage(file: Path, kind: str, rng: random.Random) -> bool:
    """Damages a file; returns whether that changed anything."""
    before = file.read_bytes()
    if kind == "swap":
        files = [f for f in file.parent.parent.rglob("*") if f.is_file() and f != file]
        after: bytes | None = rng.choice(files).read_bytes() if files else before
    else:
        after = DAMAGES[kind](before, rng)
    if after is None:
        file.unlink()
    else:
        file.write_bytes(after)
    return after != before


READERS = {
    "checkpoint": (
        ("one", "inspect one --verify"),
        ("one", "merge --base base --expert one --method task_arithmetic"),
        ("base", "merge --base base --expert one --method ties --density .3"),
        ("one", "convert one OUT"),
        ("one", "eval --checkpoint one --jsonl validation=valid.jsonl"),
    ),
    "export": (
        ("one_hf", "inspect one_hf --verify"),
        ("one_hf", "merge --base base_hf --expert one_hf --method ties --density .3"),
        ("one_hf", "convert one_hf OUT"),
        ("one_hf", "eval --checkpoint one_hf --jsonl validation=valid.jsonl"),
    ),
    "merged directory": (
        ("merged_hf", "inspect merged_hf --verify"),
        ("merged_hf", "merge --expert merged_hf --expert two_hf --method average"),
        ("merged_hf", "convert merged_hf OUT"),
    ),
    "cached task": (("cached", "tasks show imdb_good_or_bad --source cache:cached --n 3"),),
    "thresholds": (("cache", "merge --base base_hf --expert two_hf --method ties --density .3"),),
}
"""What is damaged, by kind: the folder with the files, and a command that reads it."""

PREPARED = (
    "merge --base base_hf --expert one_hf --method average --out merged_hf",
    "merge --base base_hf --expert two_hf --method ties --density .3 --out unused",
    "tasks cache imdb_good_or_bad --out cached",
)
QUESTIONS = [
    {"inputs": f"is {i} even?", "targets": answer, "answer_choices": ["yes", "no"]}
    for i, answer in enumerate(["yes", "no"] * 4)
]


def damages(campaign: Campaign, root: Path, count: int, rng: random.Random) -> None:
    """Damages one file at a time, and runs a command that reads it."""
    environment = os.environ | {"M2L_CACHE": str(root / "cache")}
    make_inputs(root, CONFIG, rng.randrange(2**32))
    (root / "valid.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for command in PREPARED:
        code, _, error = run(command.split(), root, environment)
        if code:
            raise SystemExit(f"the campaign cannot begin: {command}: {error}")
    expected: dict[str, tuple[int, str, dict[str, Json]]] = {}
    kinds = sorted(READERS)
    for _ in range(count):
        kind = rng.choice(kinds)
        target, command = rng.choice(READERS[kind])
        if command not in expected:
            expected[command] = _outcome(command, root, environment)
            if expected[command][0]:
                raise SystemExit(f"{command}: {expected[command]}")
        files = sorted(f for f in (root / target).rglob("*") if f.is_file())
        # What no command computes with may be edited by people.
        files = [f for f in files if f.name not in ("README.md", ".lock")]
        file, change = rng.choice(files), rng.choice([*DAMAGES, "swap"])
        shutil.copytree(root / target, root / "whole")
        try:
            if not damage(file, change, rng):
                continue
            code, shown, written = _outcome(command, root, environment)
            wanted = expected[command]
            problem = None
            if code == 0 and command.startswith("inspect"):
                problem = "inspect --verify sees nothing"
            elif code == 0 and written != wanted[2]:
                problem = f"another result, without a word: {shown[-200:]!r}"
            elif code == 0 and command.startswith("tasks") and shown != wanted[1]:
                problem = "other examples, without a word"
            elif code not in (0, 2):
                problem = f"exit {code}: {shown[-300:]!r}"
            elif code == 2 and (shown.count("\n") > 1 or "Traceback" in shown):
                problem = f"not one line: {shown!r}"
            campaign.count(
                f"damage: {kind}",
                f"{change} of {file.relative_to(root)}, m2l {command}",
                problem,
            )
        finally:
            shutil.rmtree(root / target)
            (root / "whole").rename(root / target)


def _outcome(
    command: str, root: Path, environment: Mapping[str, str]
) -> tuple[int, str, dict[str, Json]]:
    """Returns exit code, messages, and the digests or scores of the output, which is removed."""
    verb, out = command.split()[0], root / "OUT"
    flags = ["--out", "OUT"] if verb in ("merge", "eval") else []
    try:
        code, shown, error = run([*command.split(), *flags], root, environment)
        written: dict[str, Json] = {}
        if out.is_dir() and verb == "eval":
            written = {f.name: json.loads(f.read_text())["score"] for f in out.glob("*.json")}
        elif out.is_dir():
            written = contents(out)
        shown = shown if verb == "tasks" and code == 0 else "".join(f"{s}\n" for s in said(error))
        return code, shown, written
    finally:
        shutil.rmtree(out, ignore_errors=True)


# Kills

KILLED = (
    "merge --base base_hf --expert one_hf --expert two_hf --method ties --density .3 --out OUT",
    "merge --base base --expert one --expert two --method dare_ties --drop_rate .5 --out OUT",
    "convert one OUT",
    "convert one_hf OUT",
    "tasks cache imdb_good_or_bad --out OUT",
)
_CODES = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}


def kills(campaign: Campaign, root: Path, count: int, rng: random.Random) -> None:
    """Ends commands at random moments, and runs them again until they are done."""
    make_inputs(root, LARGE, rng.randrange(2**32))
    environment = os.environ | {"M2L_CACHE": str(root / "cache")}
    out = root / "OUT"
    expected, seconds = {}, {}
    before = {path.name for path in root.iterdir()} | {"cache"}
    for command in KILLED:
        start = time.monotonic()
        code, _, error = run(command.split(), root, environment)
        if code:
            raise SystemExit(f"{command}: {error}")
        seconds[command] = time.monotonic() - start
        expected[command] = contents(out)
        shutil.rmtree(out)
    for _ in range(count):
        command, by = rng.choice(KILLED), rng.choice(sorted(_CODES))
        wait = rng.random() * seconds[command] * 1.1
        process = subprocess.Popen(
            [*M2L, *command.split()], cwd=root, env=environment, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        process.send_signal(by)
        _, error = process.communicate()
        problem = None
        if process.returncode not in (0, _CODES[by]):
            problem = f"exit {process.returncode}: {error[-300:]!r}"
        elif by != signal.SIGKILL and process.returncode and len(said(error)) > 1:
            problem = f"not one line: {said(error)}"
        code, _, again = run(command.split(), root, environment)
        left = {path.name for path in root.iterdir()} - before - {"OUT"}
        if problem is None and code:
            problem = f"the same command again: exit {code}: {again[-300:]!r}"
        elif problem is None and contents(out) != expected[command]:
            problem = "other files than without the kill"
        elif problem is None and left:
            problem = f"left over: {sorted(left)}"
        kind = f"{signal.Signals(by).name}: {command.split()[0]}"
        campaign.count(kind, f"m2l {command}, after {wait:.2f} s", problem)
        shutil.rmtree(out, ignore_errors=True)
        for name in left:
            shutil.rmtree(root / name, ignore_errors=True)


# Hostile files

_DEEP = "[" * 50_000
_WRONG = ("-1", '"8"', "1e400", "NaN", "null", "[]", "{}", "true", str(2**60), '"\\ud800"', _DEEP)


def _hostile_json(text: str, rng: random.Random) -> str:
    """Returns a JSON object with one value, or all of it, that no honest program writes."""
    if rng.random() < 0.2:
        return rng.choice(_WRONG)
    content = json.loads(text)
    key = rng.choice(sorted(content))
    marked = json.dumps(content | {key: "MARK"})
    return marked.replace('"MARK"', rng.choice(_WRONG))


def _hostile_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry, wrong = dict(header[name]), rng.choice([*_WRONG[:-1], '["F32"]'])
    field = rng.choice(sorted(entry))
    header[name] = entry | {field: "MARK"}
    if rng.random() < 0.2:
        header[f"a\nb {name}"] = header.pop(name)
    text = json.dumps(header).replace('"MARK"', wrong).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


_GIN = (
    "import os\n",
    "from __gin__ import dynamic_registration\nimport subprocess\n",
    "STEPS = @os.getpid()\n",
    "include '/etc/passwd'\n",
    "Train.steps = @subprocess.getoutput()\n",
    "Train.steps = " + "[" * 5000 + "\n",
    "Train.stepz = 3\n",
    "\0\n",
    "Train.steps = 10 ** 10 ** 10\n",
)
_TEMPLATES = (
    "{% for a in range(10**9) %}x{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10**12 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% raise %}",
    "{{ messages | map('length') | sum / 0 }}",
)


def hostile(campaign: Campaign, root: Path, count: int, rng: random.Random) -> None:
    """Gives commands files that no honest program writes."""
    make_inputs(root, CONFIG, rng.randrange(2**32))
    for file in root.glob("*_hf/m2l_manifest.json"):
        file.unlink()  # as anybody's directory
    (root / "text.jsonl").write_text('{"inputs": "a", "targets": "b"}\n')
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {chr(97 + i): i for i in range(20)}, "merges": []},
    }
    settings = {"eos_token": "a", "chat_template": "x"}
    merge = "merge --base base_hf --expert hostile --method average --out OUT"
    convert = "convert hostile OUT --vocabulary bytes"
    for _ in range(count):
        shutil.rmtree(root / "hostile", ignore_errors=True)
        shutil.copytree(root / "one_hf", root / "hostile")
        kind = rng.choice(
            ("config", "header", "manifest", "gin", "template", "tokenizer", "recipe")
        )
        command = rng.choice((merge, convert))
        text = ""
        if kind == "config":
            file = root / "hostile" / "config.json"
            text = _hostile_json(file.read_text(), rng)
            file.write_text(text)
        elif kind == "header":
            file = root / "hostile" / "model.safetensors"
            data = _hostile_header(file.read_bytes(), rng)
            text = repr(data[:300])
            file.write_bytes(data)
        elif kind == "manifest":
            shutil.rmtree(root / "hostile")
            shutil.copytree(root / "one", root / "hostile")
            file = root / "hostile" / "_CHECKPOINT_METADATA"
            content = json.loads(file.read_text())
            entry = _hostile_manifest(content["custom_metadata"]["m2l"], rng)
            content["custom_metadata"]["m2l"] = json.loads(entry)
            text = json.dumps(content)
            file.write_text(text)
            command = rng.choice(("inspect hostile --verify", merge.replace("base_hf", "base")))
        elif kind == "gin":
            text = rng.choice(_GIN)
            (root / "hostile.gin").write_text(text)
            command = "train --gin_file hostile.gin --mixture sentiment --steps 1 --out OUT"
        elif kind == "template":
            text = rng.choice(_TEMPLATES)
            settings["chat_template"] = text
            (root / "hostile" / "tokenizer.json").write_text(json.dumps(tokenizer))
            (root / "hostile" / "tokenizer_config.json").write_text(json.dumps(settings))
            command = "generate hostile a --chat"
        elif kind == "tokenizer":
            text = _hostile_json(json.dumps(tokenizer), rng)
            for name, content in (("base_hf", json.dumps(tokenizer)), ("hostile", text)):
                (root / name / "tokenizer.json").write_text(content)
            command = merge
        else:
            text = _hostile_json('{"method": "ties", "density": 0.3, "scale": 1.0}', rng)
            (root / "recipe.json").write_text(text)
            command = "merge --base base --expert one --recipe recipe.json --out OUT"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code, shown, error = run(command.split(), root, os.environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        lines = said(error)
        problem = None
        # Some of what is drawn is honest after all: null for a field that may be absent.
        if code not in (0, 2):
            problem = f"exit {code}: {error[-300:]!r}"
        elif code == 2 and (len(lines) != 1 or "Traceback" in error):
            problem = f"not one line: {lines[:5]}"
        elif used > LIMIT:
            problem = f"{used:.0f} s of processor time"
        elif code == 2 and (root / "OUT").exists() and kind != "gin":
            problem = "a refusal that leaves its output"
        elif code == 0 and kind == "gin":
            problem = f"was taken: {shown[-200:]!r}"
        campaign.count(f"hostile: {kind}", f"{text[:200]!r}, m2l {command}", problem)
        shutil.rmtree(root / "OUT", ignore_errors=True)
        (root / "base_hf" / "tokenizer.json").unlink(missing_ok=True)


def _hostile_manifest(content: dict, rng: random.Random) -> str:
    """Returns a manifest with a right checksum and one wrong value."""
    from m2l.checkpoints import manifest

    content.pop("checksum")
    key = rng.choice(sorted(content))
    content[key] = rng.choice((-1, "x", None, [], {}, 2**60, [["../../x"]], {"a": {"b": -1}}))
    return json.dumps({"checksum": manifest._checksum(content)} | content)


def main() -> None:
    """Runs the campaigns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damages", type=int, default=160)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--hostile", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    campaign = Campaign()
    for name, work, count in (
        ("damages", damages, options.damages),
        ("kills", kills, options.kills),
        ("hostile", hostile, options.hostile),
    ):
        with tempfile.TemporaryDirectory() as folder:
            work(campaign, Path(folder), count, random.Random(f"{name} {options.seed}"))
    print(f"{'campaign':<44} {'tried':>5} {'passed':>6}")
    for kind, tried in sorted(campaign.tried.items()):
        print(f"{kind:<44} {tried:>5} {tried - campaign.failed[kind]:>6}")
    total, failed = campaign.tried.total(), campaign.failed.total()
    print(f"{'all':<44} {total:>5} {total - failed:>6}")
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
