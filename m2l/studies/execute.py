"""Runs a plan in this process: what is finished stays, what is not is done or taken up again."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m2l.errors import ConfigError
from m2l.studies.plan import Plan, Stage

_RECORD = "study.json"

Run = Callable[[Stage, Path, Mapping[str, Path]], None]


def claim(out: Path, study: Mapping[str, Any], *, update: bool) -> None:
    """Makes `out` this study's folder, or refuses one that holds something else.

    Args:
        out: The folder.
        study: The study's kind and settings, as plain JSON values.
        update: Take over a study of the same kind with other settings; `execute` then does anew
            what they change.

    Raises:
        ConfigError: `out` is not empty and holds no study, one of another kind, or (without
            `update`) one of other settings.
    """
    record = out / _RECORD
    if record.exists():
        held = json.loads(record.read_text())
        if held["kind"] != study["kind"]:
            raise ConfigError(f"{out} holds a {held['kind']} study; choose another --out")
        for name, value in study["settings"].items():
            if not update and held["settings"].get(name) != value:
                raise ConfigError(
                    f"{out} holds another study: its {name} is {held['settings'].get(name)!r}, "
                    f"here it is {value!r}; choose another --out, or redo what changes by --update"
                )
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no study; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f".{_RECORD}.{os.getpid()}.tmp"
    unfinished.write_text(json.dumps(study, indent=1) + "\n")
    unfinished.rename(record)


def folder(out: Path, name: str) -> Path:
    """Where a stage's output lies."""
    return out / name


def _mark(out: Path, name: str) -> Path:
    """The file that says how far a stage is."""
    return out / "stages" / f"{name}.json"


def _write_mark(mark: Path, digest: str, finished: bool) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    unfinished = mark.with_name(f".{mark.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"digest": digest, "finished": finished}) + "\n")
    unfinished.rename(mark)


def state(plan: Plan, out: Path, name: str) -> str:
    """ "done", "begun" (by the same settings and inputs), "outdated" (by others) or "missing"."""
    mark = _mark(out, name)
    if not mark.exists():
        return "missing"
    held = json.loads(mark.read_text())
    if held["digest"] != plan.digest(name):
        return "outdated"
    return "done" if held["finished"] else "begun"


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
        if found == "outdated":
            if output.exists():
                shutil.rmtree(output)
        _write_mark(mark, plan.digest(stage.name), finished=False)
        print(f"[{number}/{len(plan)}] {stage.name}", file=sys.stderr, flush=True)
        inputs = {role: folder(out, name) for role, name in stage.inputs.items()}
        runners[stage.kind](stage, output, inputs)
        _write_mark(mark, plan.digest(stage.name), finished=True)
        ran += 1
    return ran
