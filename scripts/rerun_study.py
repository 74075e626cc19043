"""Does a sample of a finished study's stages again, and compares every bit of what comes out.

    python scripts/rerun_study.py STUDY [--share 0.1] [--seed 0] [--out DIR]

Each sampled stage is run in a folder of its own, on the inputs that the study's own stage read.
Trained models are compared by the digest of their parameters, results and choices by their values,
in all digits; only the seconds may differ. Prints each stage, and exits with 1 if any differs.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from m2l import checkpoints
from m2l.studies.graph import Graph, Stage, stage_folder
from m2l.studies.run import RUNNERS
from m2l.studies.study_results import read_study
from m2l.typing import Json


def main() -> int:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="Of each kind of stage.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Kept, and gone on with; else in a new folder.")
    asked = parser.parse_args()
    plan = read_study(asked.study).stage_graph()
    out = asked.out or Path(tempfile.mkdtemp(prefix="rerun_"))
    differing, start = 0, time.monotonic()
    chosen = sample(plan, asked.share, asked.seed)
    for stage in chosen:
        again = stage_folder(out / "results" / "again", stage.name)
        inputs = {role: stage_folder(asked.study, name) for role, name in stage.inputs.items()}
        RUNNERS[stage.kind](stage, again, inputs)
        same = content(stage, again) == content(stage, stage_folder(asked.study, stage.name))
        differing += not same
        print(f"{'equal ' if same else 'DIFFER'}  {stage.name}", flush=True)
    seconds = time.monotonic() - start
    print(
        f"{len(chosen) - differing} of {len(chosen)} stages of {len(plan)} equal, {seconds:.0f} s"
    )
    return int(differing > 0)


def sample(plan: Graph, share: float, seed: int) -> list[Stage]:
    """Draws that share of the stages of each kind at random; returns them in their order."""
    draws, names = random.Random(seed), set()
    for kind in dict.fromkeys(stage.kind for stage in plan):
        candidates = [stage.name for stage in plan if stage.kind == kind]
        names |= set(draws.sample(candidates, max(1, round(share * len(candidates)))))
    return [stage for stage in plan if stage.name in names]


def content(stage: Stage, folder: Path) -> Json:
    """Returns the output of a stage, by value."""
    if stage.kind in ("train", "given"):
        return checkpoints.read_manifest(checkpoints.resolve(folder)).digest
    result = {}
    for path in sorted(folder.rglob("*.json")):
        values = json.loads(path.read_text())
        for name in ("seconds", "checksum"):  # The record's own checksum is over the seconds too.
            values.pop(name, None)
        result[str(path.relative_to(folder))] = values
    return result


if __name__ == "__main__":
    sys.exit(main())
