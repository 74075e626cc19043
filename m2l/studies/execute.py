"""Runs a plan: what is finished stays, what is not is done or taken up again, by one or several."""

import contextlib
import dataclasses
import hashlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from m2l import files, storage
from m2l.errors import DataError, M2LError, Stopped, one_line
from m2l.locks import Lock
from m2l.studies.plan import Plan, Stage

Run = Callable[[Stage, Path, Mapping[str, Path]], None]

_SECONDS_BETWEEN_LOOKS = 0.5
# Stages whose output is small files of figures, which their record has digests of.
_OF_RESULTS = ("evaluate", "choose", "merge")
_REDONE = "`m2l study` does the stage again"


@dataclasses.dataclass
class Outcome:
    """What became of a plan.

    Attributes:
        ran: The stages run to their end by this call; those found done are not among them.
        failed: By stage, what it failed with.
        blocked: The stages that could not be run, for something they read failed.
        bugs: Whether any failed with something else than a bad input.
    """

    ran: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    blocked: list[str] = dataclasses.field(default_factory=list)
    bugs: bool = False


def folder(out: Path, name: str) -> Path:
    """Where a stage's output lies."""
    return out / name


def _mark(out: Path, name: str) -> Path:
    """The file that says how far a stage is."""
    return out / "stages" / f"{name}.json"


def _write_mark(
    mark: Path,
    digest: str,
    finished: bool,
    seconds: float = 0.0,
    results: Mapping[str, str] | None = None,
) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    record = {"digest": digest, "finished": finished, "seconds": round(seconds, 3)}
    files.write_record(mark, record if results is None else {**record, "results": results})


def _read_mark(mark: Path) -> dict[str, Any]:
    """What a mark says.

    Raises:
        DataError: It is damaged. One that an older m2l wrote, without a checksum, may be read.
    """
    record = files.read_record(mark, required=False, finite=True, advice=_REDONE)
    results = record.get("results", {})
    if not (
        isinstance(record.get("digest"), str)
        and isinstance(record.get("finished"), bool)
        and type(record.get("seconds", 0.0)) in (int, float)
        and isinstance(results, dict)
    ):
        raise DataError(f"{mark}: damaged, not the record of a stage; {_REDONE}")
    return record


def _digests(stage: Stage, output: Path) -> dict[str, str] | None:
    """SHA-256 of a stage's results by their paths in its folder; None for stages of models."""
    if stage.kind not in _OF_RESULTS:
        return None
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def state(plan: Plan, out: Path, name: str) -> str:
    """ "done", "begun" (by the same settings and inputs), "outdated" (by others) or "missing".

    "damaged" where the record of it is.
    """
    mark = _mark(out, name)
    if not mark.exists():
        return "missing"
    try:
        record = _read_mark(mark)
    except DataError:
        return "damaged"
    if record["digest"] != plan.digest(name):
        return "outdated"
    return "done" if record["finished"] and folder(out, name).exists() else "begun"


def seconds(out: Path, name: str) -> float:
    """How long the call that finished a stage took; 0 for one that is not finished.

    Raises:
        DataError: Its record is damaged.
    """
    mark = _mark(out, name)
    return _read_mark(mark).get("seconds", 0.0) if mark.exists() else 0.0


def check_results(plan: Plan, out: Path, name: str) -> None:
    """Compares the results of a stage that is done with those that it wrote.

    Raises:
        DataError: One is missing, changed or too many. What an older m2l recorded has no digests.
    """
    output = folder(out, name)
    recorded, found = _read_mark(_mark(out, name)).get("results"), _digests(plan[name], output)
    if recorded is None or found is None:
        return
    for path in sorted({*recorded, *found}):
        if recorded.get(path) != found.get(path):
            what = "missing" if path not in found else "changed since it was written"
            what = what if path in recorded else "not a result of this stage"
            raise DataError(f"{output / path}: {what}; {_REDONE}")


def discard_damaged(plan: Plan, out: Path) -> None:
    """Discards the results of stages that are done but do not check, each with a line on stderr."""
    for stage in plan:
        if state(plan, out, stage.name) != "done":
            continue
        with _alone(out, stage.name) as alone:
            try:
                check_results(plan, out, stage.name)
            except DataError as error:
                if alone:
                    print(f"m2l: {one_line(str(error))}", file=sys.stderr, flush=True)
                    storage.remove_tree(folder(out, stage.name))
                    _write_mark(_mark(out, stage.name), plan.digest(stage.name), finished=False)


@contextlib.contextmanager
def _alone(out: Path, name: str) -> Iterator[bool]:
    """Yields whether no other process is at the stage; see `locks.Lock`."""
    file = _mark(out, name).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with Lock(file) as lock:
        yield lock.acquire()


def run_stage(plan: Plan, out: Path, name: str, runners: Mapping[str, Run]) -> bool:
    """Brings one stage, whose inputs are done, to its end.

    A stage is done when its mark says so with the digest of the same settings and inputs. One that
    was begun with that digest is run again over what it left, and its runner goes on from there.
    One of another digest is deleted and done anew.

    Returns:
        Whether it was run; else it was done.
    """
    stage, found = plan[name], state(plan, out, name)
    if found == "done":
        return False
    if found == "damaged":
        print(f"m2l: {_mark(out, name)}: damaged; {_REDONE}", file=sys.stderr, flush=True)
    output, mark = folder(out, name), _mark(out, name)
    if found == "outdated" and (output.exists() or output.is_symlink()):
        output.unlink() if output.is_symlink() else storage.remove_tree(output)
    _write_mark(mark, plan.digest(name), finished=False)
    inputs = {role: folder(out, of) for role, of in stage.inputs.items()}
    start = time.monotonic()
    runners[stage.kind](stage, output, inputs)
    seconds = time.monotonic() - start
    _write_mark(mark, plan.digest(name), True, seconds, _digests(stage, output))
    return True


def execute(plan: Plan, out: Path, runners: Mapping[str, Run]) -> Outcome:
    """Brings every stage of the plan to its end, each after what it reads.

    Several processes that share the folder may do this at once: each takes the next stage that is
    ready and that no other is at. A stage that fails is told and left; what does not read it goes
    on, and the next call tries it again.

    Args:
        plan: What to do.
        out: The study's folder; each stage has its own in it.
        runners: By kind of stage, what does it: called with the stage, its output directory and
            its inputs' output directories by role.

    Raises:
        Stopped: by SIGINT or SIGTERM, when what was under way was saved.
    """
    discard_damaged(plan, out)
    outcome = Outcome()
    waiting = {stage.name: number for number, stage in enumerate(plan, start=1)}
    while waiting:
        moved = False
        for name in list(waiting):
            reads = plan[name].inputs.values()
            if any(of in outcome.failed or of in outcome.blocked for of in reads):
                outcome.blocked.append(name)
            elif state(plan, out, name) != "done":
                if any(of in waiting for of in reads):
                    continue
                with _alone(out, name) as alone:
                    if not alone:
                        continue
                    _try(plan, out, name, runners, outcome, f"[{waiting[name]}/{len(plan)}]")
            del waiting[name]
            moved = True
        if not moved:  # others are at what is left
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    return outcome


def _try(
    plan: Plan, out: Path, name: str, runners: Mapping[str, Run], outcome: Outcome, number: str
) -> None:
    print(f"{number} {name}", file=sys.stderr, flush=True)
    try:
        if run_stage(plan, out, name, runners):
            outcome.ran.append(name)
    except Stopped:
        raise
    except Exception as error:
        known = isinstance(error, M2LError)
        outcome.bugs |= not known
        outcome.failed[name] = str(error) if known else f"{type(error).__name__}: {error}"
        trace = _mark(out, name).with_suffix(".error")
        trace.write_text("".join(traceback.format_exception(error)))
        print(
            f"{name} failed: {one_line(outcome.failed[name])} ({trace})",
            file=sys.stderr,
            flush=True,
        )
