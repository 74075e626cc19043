"""Runs a plan in this process: what is finished stays, what is not is done or taken up again."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from m2l import files
from m2l.studies.plan import Plan, Stage

Run = Callable[[Stage, Path, Mapping[str, Path]], None]


def folder(out: Path, name: str) -> Path:
    """Where a stage's output lies."""
    return out / name


def _mark(out: Path, name: str) -> Path:
    """The file that says how far a stage is."""
    return out / "stages" / f"{name}.json"


def _write_mark(mark: Path, digest: str, finished: bool) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    files.write(mark, json.dumps({"digest": digest, "finished": finished}) + "\n")


def state(plan: Plan, out: Path, name: str) -> str:
    """ "done", "begun" (by the same settings and inputs), "outdated" (by others) or "missing"."""
    mark = _mark(out, name)
    if not mark.exists():
        return "missing"
    held = files.read_json(mark)
    if held["digest"] != plan.digest(name):
        return "outdated"
    return "done" if held["finished"] and folder(out, name).exists() else "begun"


def execute(plan: Plan, out: Path, runners: Mapping[str, Run]) -> int:
    """Brings every stage of the plan to its end, in order.

    A stage is done when its mark says so with the digest of the same settings and inputs. One that
    was begun with that digest is run again over what it left, and its runner goes on from there.
    One of another digest is deleted and done anew.

    Args:
        plan: What to do.
        out: The study's folder; each stage has its own in it.
        runners: By kind of stage, what does it: called with the stage, its output directory and
            its inputs' output directories by role.

    Returns:
        How many stages were run: those found done are not counted.
    """
    ran = 0
    for number, stage in enumerate(plan, start=1):
        found = state(plan, out, stage.name)
        if found == "done":
            continue
        output, mark = folder(out, stage.name), _mark(out, stage.name)
        if found == "outdated" and output.exists():
            shutil.rmtree(output)
        _write_mark(mark, plan.digest(stage.name), finished=False)
        print(f"[{number}/{len(plan)}] {stage.name}", file=sys.stderr, flush=True)
        inputs = {role: folder(out, name) for role, name in stage.inputs.items()}
        runners[stage.kind](stage, output, inputs)
        _write_mark(mark, plan.digest(stage.name), finished=True)
        ran += 1
    return ran
