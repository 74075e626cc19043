"""A study as a graph of stages, and its execution: finished stages are kept, the others are run.

Each stage has a digest of everything that decides its output. Several processes that share the
study's folder may execute it at once.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from m2l import files, signals, storage
from m2l.errors import DataError, M2LError, Stopped, UnknownNameError, one_line
from m2l.locks import Lock
from m2l.progress import clock
from m2l.typing import Json, JsonObject


@dataclass(frozen=True)
class Stage:
    """One piece of work with one output directory.

    Attributes:
        name: Its name and its folder under the study's: "experts/instruct/sentiment".
        kind: "train", "merge" or "evaluate".
        settings: Everything else that decides the output, as JSON values.
        inputs: The stages whose outputs it reads, by role: "init", "base", "expert/nli", "model".
    """

    name: str
    kind: str
    settings: Mapping[str, Json]
    inputs: Mapping[str, str] = field(default_factory=dict)


class Graph:
    """Stages in an order in which they can be run.

    Raises:
        ValueError: Two stages have one name, or an input is not the output of an earlier stage.
    """

    def __init__(self, stages: Iterable[Stage]):
        self._stages: dict[str, Stage] = {}
        self._digests: dict[str, str] = {}
        for stage in stages:
            if stage.name in self._stages:
                raise ValueError(f"two stages are called {stage.name}")
            missing = [name for name in stage.inputs.values() if name not in self._stages]
            if missing:
                raise ValueError(f"{stage.name} reads {missing}, which no earlier stage makes")
            decided_by = [
                stage.kind,
                stage.settings,
                {role: self._digests[name] for role, name in stage.inputs.items()},
            ]
            text = json.dumps(decided_by, sort_keys=True)
            self._stages[stage.name] = stage
            self._digests[stage.name] = hashlib.sha256(text.encode()).hexdigest()

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages.values())

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, name: str) -> Stage:
        if name not in self._stages:
            raise UnknownNameError("stage", name, self._stages)
        return self._stages[name]

    def digest(self, name: str) -> str:
        """Returns the SHA-256 of the stage's kind and settings and of its inputs' digests."""
        return self._digests[self[name].name]

    def needed_for(self, name: str) -> "Graph":
        """Returns the stage and, in order, all stages that it depends on."""
        wanted = {self[name].name}
        for stage in reversed(list(self)):
            if stage.name in wanted:
                wanted.update(stage.inputs.values())
        return Graph(stage for stage in self if stage.name in wanted)


Runner = Callable[[Stage, Path, Mapping[str, Path]], None]

_POLL_SECONDS = 0.5
# Stages whose output is small files of numbers; their record has digests of these files.
_RESULT_KINDS = ("evaluate", "choose", "merge", "search", "compare")
_ADVICE = "`m2l study` runs the stage again"


@dataclasses.dataclass
class Outcome:
    """What `execute` did.

    Attributes:
        ran: The stages that this call ran to their end.
        failed: The error message of each stage that failed.
        blocked: The stages that could not be run because one of their inputs failed.
        bugs: Whether any failed for another reason than a bad input.
    """

    ran: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    blocked: list[str] = dataclasses.field(default_factory=list)
    bugs: bool = False


def stage_folder(out: Path, name: str) -> Path:
    """Returns the folder of a stage's output."""
    return out / name


def _record_file(out: Path, name: str) -> Path:
    return out / "stages" / f"{name}.json"


def _write_record(
    file: Path,
    digest: str,
    finished: bool,
    seconds: float = 0.0,
    results: Mapping[str, str] | None = None,
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"digest": digest, "finished": finished, "seconds": round(seconds, 3)}
    files.write_record(file, record if results is None else {**record, "results": results})


def _read_record(file: Path) -> JsonObject:
    # Older versions wrote no checksum.
    record = files.read_record(file, required=False, finite=True, advice=_ADVICE)
    results = record.get("results", {})
    if not (
        isinstance(record.get("digest"), str)
        and isinstance(record.get("finished"), bool)
        and type(record.get("seconds", 0.0)) in (int, float)
        and isinstance(results, dict)
    ):
        raise DataError(f"{file}: damaged, not the record of a stage; {_ADVICE}")
    return record


def _result_digests(stage: Stage, output: Path) -> dict[str, str] | None:
    """Returns the SHA-256 of each result file by its relative path; None for stages of models."""
    if stage.kind not in _RESULT_KINDS:
        return None
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def stage_state(graph: Graph, out: Path, name: str) -> str:
    """Returns how far a stage is.

    "done", "begun" (with the same settings and inputs), "outdated" (with others), "missing", or
    "damaged" if its record is.
    """
    file = _record_file(out, name)
    if not file.exists():
        return "missing"
    try:
        record = _read_record(file)
    except DataError:
        return "damaged"
    if record["digest"] != graph.digest(name):
        return "outdated"
    return "done" if record["finished"] and stage_folder(out, name).exists() else "begun"


def stage_seconds(out: Path, name: str) -> float:
    """Returns the duration of the call that finished a stage; 0 for one that is not finished.

    Raises:
        DataError: Its record is damaged.
    """
    file = _record_file(out, name)
    return _read_record(file).get("seconds", 0.0) if file.exists() else 0.0


def check_results(graph: Graph, out: Path, name: str) -> None:
    """Compares the result files of a stage that is done with the digests in its record.

    Raises:
        DataError: A file is missing, changed or not one of the stage's.
    """
    output = stage_folder(out, name)
    # Older versions recorded no digests.
    recorded = _read_record(_record_file(out, name)).get("results")
    actual = _result_digests(graph[name], output)
    if recorded is None or actual is None:
        return
    for path in sorted({*recorded, *actual}):
        if path not in recorded:
            raise DataError(f"{output / path}: not a result of this stage; {_ADVICE}")
        if recorded[path] != actual.get(path):
            problem = "changed since it was written" if path in actual else "missing"
            raise DataError(f"{output / path}: {problem}; {_ADVICE}")


def discard_damaged(graph: Graph, out: Path, checked: Collection[str] = ()) -> None:
    """Discards the results of finished stages whose digests differ, each with a line on stderr.

    Those that are named in `checked` are not looked at.
    """
    for stage in graph:
        if stage.name in checked or stage_state(graph, out, stage.name) != "done":
            continue
        with _stage_lock(out, stage.name) as acquired:
            try:
                check_results(graph, out, stage.name)
            except DataError as error:
                if acquired:
                    print(f"m2l: {one_line(str(error))}", file=sys.stderr, flush=True)
                    storage.remove_tree(stage_folder(out, stage.name))
                    file = _record_file(out, stage.name)
                    _write_record(file, graph.digest(stage.name), finished=False)


@contextlib.contextmanager
def _stage_lock(out: Path, name: str) -> Iterator[bool]:
    """Yields whether the stage's lock was acquired; see `locks.Lock`."""
    file = _record_file(out, name).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with Lock(file) as lock:
        yield lock.acquire()


def return_memory() -> None:
    """Returns to the system what arrays that are gone occupied.

    glibc keeps it, in pieces that the next model's arrays do not fit into: of two stages with nine
    models of 135M parameters each, 8 GB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # Another C library has none.
            ctypes.CDLL(None).malloc_trim(0)


def run_stage(graph: Graph, out: Path, name: str, runners: Mapping[str, Runner]) -> bool:
    """Runs one stage, whose inputs are done, to its end.

    A stage is done when its record says so with the digest of the same settings and inputs. One
    that was begun with that digest is run again in the same folder, and its runner resumes. The
    output of one with another digest is deleted first.

    Returns:
        Whether it was run; False if it was already done.
    """
    stage, state = graph[name], stage_state(graph, out, name)
    if state == "done":
        return False
    output, file = stage_folder(out, name), _record_file(out, name)
    if state == "damaged":
        print(f"m2l: {file}: damaged; {_ADVICE}", file=sys.stderr, flush=True)
    if state == "outdated" and (output.exists() or output.is_symlink()):
        output.unlink() if output.is_symlink() else storage.remove_tree(output)
    _write_record(file, graph.digest(name), finished=False)
    inputs = {role: stage_folder(out, name) for role, name in stage.inputs.items()}
    start = time.monotonic()
    runners[stage.kind](stage, output, inputs)
    return_memory()
    seconds = time.monotonic() - start
    _write_record(file, graph.digest(name), True, seconds, _result_digests(stage, output))
    return True


class _TimeLeft:
    """Estimates how long stages will take, and corrects it by how long those of a kind took."""

    def __init__(self, graph: Graph, estimates: Mapping[str, float]):
        self._graph, self._estimates = graph, estimates
        # Of each kind, the seconds that its finished stages took, and those that were estimated.
        self._sums: dict[str, list[float]] = {}
        self._spent = 0.0

    def count(self, name: str, seconds: float, now: bool = True) -> None:
        """Counts a stage that was run: now, by any of the processes, or by an earlier call."""
        sums = self._sums.setdefault(self._graph[name].kind, [0.0, 0.0])
        sums[0] += seconds
        sums[1] += self._estimates.get(name, 0.0)
        self._spent += seconds if now else 0.0

    def describe(self, names: Iterable[str], elapsed: float) -> str:
        """Returns ", about 2:10 left" for stages that are not finished; "" without estimates.

        Args:
            names: The stages.
            elapsed: Seconds since the call began. What was done in less time than it took was done
                by several processes at once, and so will the rest be.
        """
        if not self._estimates:
            return ""
        overall = self._factor(self._sums.values())
        left = 0.0
        for name in names:
            sums = self._sums.get(self._graph[name].kind)
            factor = self._factor([sums]) if sums else overall
            left += factor * self._estimates.get(name, 0.0)
        at_once = max(1.0, self._spent / elapsed) if elapsed > 0 else 1.0
        return f", about {clock(left / at_once)} left"

    def _factor(self, sums: Iterable[Sequence[float]]) -> float:
        pairs = list(sums)
        estimated = sum(pair[1] for pair in pairs)
        return sum(pair[0] for pair in pairs) / estimated if estimated else 1.0


def execute(
    graph: Graph,
    out: Path,
    runners: Mapping[str, Runner],
    estimates: Mapping[str, float] | None = None,
    checked: Collection[str] = (),
    outcome: Outcome | None = None,
) -> Outcome:
    """Runs every stage of the graph to its end, each after its inputs.

    Several processes that share the folder may do this at once: each takes the next stage that is
    ready and not locked. The error of a stage that fails is printed; stages that do not depend on
    it are run, and the next call tries it again.

    Args:
        graph: The study's stages.
        out: The study's folder; each stage has its own in it.
        runners: The function for each kind of stage, called with the stage, its output directory
            and its inputs' output directories by role.
        estimates: How many seconds stages take, by name; to say how long all of them will.
        checked: The stages that an earlier call of this process has seen to be done.
        outcome: Of several threads that execute one graph, the one for all of them.

    Raises:
        Stopped: SIGINT or SIGTERM was received; what was in progress is saved.
    """
    discard_damaged(graph, out, checked)
    outcome = Outcome() if outcome is None else outcome
    left, begin = _TimeLeft(graph, estimates or {}), time.monotonic()
    numbers = {stage.name: number for number, stage in enumerate(graph, start=1)}
    waiting = dict.fromkeys(numbers)
    for name in numbers:
        if name in checked:
            del waiting[name]
        elif stage_state(graph, out, name) == "done":
            left.count(name, stage_seconds(out, name), now=False)
            del waiting[name]
    while waiting:
        progress = False
        for name in list(waiting):
            signals.check()
            inputs = set(graph[name].inputs.values())
            if inputs & {*outcome.failed, *outcome.blocked}:
                outcome.blocked.append(name)
            elif inputs & waiting.keys():
                continue
            elif stage_state(graph, out, name) == "done":  # by another process
                left.count(name, stage_seconds(out, name))
            else:
                with _stage_lock(out, name) as acquired:
                    if not acquired:
                        continue
                    if name in outcome.failed:  # in another thread
                        del waiting[name]
                        continue
                    about = name + left.describe(waiting, time.monotonic() - begin)
                    print(f"[{numbers[name]}/{len(graph)}] {about}", file=sys.stderr, flush=True)
                    _run_or_record(graph, out, name, runners, outcome)
                if name not in outcome.failed:
                    left.count(name, stage_seconds(out, name))
            del waiting[name]
            progress = True
        if not progress:  # other processes run the remaining stages
            time.sleep(_POLL_SECONDS)
    return outcome


def _run_or_record(
    graph: Graph, out: Path, name: str, runners: Mapping[str, Runner], outcome: Outcome
) -> None:
    try:
        if run_stage(graph, out, name, runners):
            outcome.ran.append(name)
    except Stopped:
        raise
    except Exception as error:
        known = isinstance(error, M2LError)
        outcome.bugs |= not known
        message = str(error) if known else f"{type(error).__name__}: {error}"
        outcome.failed[name] = message
        trace = _record_file(out, name).with_suffix(".error")
        trace.write_text("".join(traceback.format_exception(error)))
        print(f"{name} failed: {one_line(message)} ({trace})", file=sys.stderr, flush=True)
