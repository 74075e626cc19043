"""Runs a plan: what is finished stays, what is not is done or taken up again, by one or several."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from m2l import files
from m2l.errors import M2LError, Stopped
from m2l.studies.plan import Plan, Stage

Run = Callable[[Stage, Path, Mapping[str, Path]], None]

_SECONDS_BETWEEN_LOOKS = 0.5


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


def _write_mark(mark: Path, digest: str, finished: bool, seconds: float = 0.0) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    held = {"digest": digest, "finished": finished, "seconds": round(seconds, 3)}
    files.write(mark, json.dumps(held) + "\n")


def state(plan: Plan, out: Path, name: str) -> str:
    """ "done", "begun" (by the same settings and inputs), "outdated" (by others) or "missing"."""
    mark = _mark(out, name)
    if not mark.exists():
        return "missing"
    held = files.read_json(mark)
    if held["digest"] != plan.digest(name):
        return "outdated"
    return "done" if held["finished"] and folder(out, name).exists() else "begun"


def seconds(out: Path, name: str) -> float:
    """How long the call that finished a stage took; 0 for one that is not finished."""
    mark = _mark(out, name)
    return files.read_json(mark).get("seconds", 0.0) if mark.exists() else 0.0


@contextlib.contextmanager
def _alone(out: Path, name: str) -> Iterator[bool]:
    """Whether no other process is at the stage; the system frees it when this one ends."""
    lock = _mark(out, name).with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


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
    output, mark = folder(out, name), _mark(out, name)
    if found == "outdated" and (output.exists() or output.is_symlink()):
        output.unlink() if output.is_symlink() else shutil.rmtree(output)
    _write_mark(mark, plan.digest(name), finished=False)
    inputs = {role: folder(out, of) for role, of in stage.inputs.items()}
    start = time.monotonic()
    runners[stage.kind](stage, output, inputs)
    _write_mark(mark, plan.digest(name), True, time.monotonic() - start)
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
        print(f"{name} failed: {outcome.failed[name]} ({trace})", file=sys.stderr, flush=True)
