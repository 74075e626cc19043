"""Who runs a study's stages: several processes of this machine, or a cluster through Slurm.

Each of them does no more than `m2l study --out DIR` does: it takes stages that are ready.
"""

import contextlib
import importlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2l import signals
from m2l.errors import ConfigError, M2LError, Stopped
from m2l.studies import execute
from m2l.studies.plan import Plan

_SECONDS_BETWEEN_LOOKS = 0.2


def by_processes(out: Path, workers: int) -> None:
    """Starts so many processes on the study in `out`, and waits for all of them.

    Raises:
        M2LError: one ended with an error; what it was is in its output.
        Stopped: by SIGINT or SIGTERM, when what was under way in each of them was saved.
    """
    command = [sys.executable, "-m", "m2l", "study", "--out", str(out)]
    # In groups of their own, or a terminal's Ctrl-C would reach them twice.
    with contextlib.ExitStack() as exits:
        exits.enter_context(signals.deferred(None))
        running = [subprocess.Popen(command, process_group=0) for _ in range(workers)]
        for process in running:
            exits.enter_context(signals.killed_at_end(process.pid))
        number = None
        try:
            while any(process.poll() is None for process in running):
                if (number := signals.requested()) is not None:
                    raise Stopped("stopped; the same command goes on from what is finished")
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException:
            for process in running:
                process.send_signal(number or signal.SIGTERM)
            for process in running:
                process.wait()
            raise
    codes = [process.returncode for process in running]
    if any(codes):
        raise M2LError(f"{sum(map(bool, codes))} of {workers} processes failed; see above")


def levels(plan: Plan) -> list[list[str]]:
    """The stages by how many stages deep they are: those of one level can run side by side."""
    depth: dict[str, int] = {}
    for stage in plan:
        depth[stage.name] = 1 + max((depth[name] for name in stage.inputs.values()), default=-1)
    deepest = max(depth.values(), default=-1)
    return [[name for name, of in depth.items() if of == level] for level in range(deepest + 1)]


class StageJob:
    """One stage as a job of its own; when it is preempted or out of time, it is queued again."""

    def __init__(self, out: Path, name: str):
        self.out, self.name = out, name

    def __call__(self) -> str:
        from m2l.studies import records, stages

        plan = records.plan(records.read_study(self.out)).needed_for(self.name)
        reads = plan[self.name].inputs.values()
        missing = [name for name in reads if execute.state(plan, self.out, name) != "done"]
        if missing:
            raise M2LError(f"{self.name} reads {missing}, which is not done: see their jobs")
        execute.run_stage(plan, self.out, self.name, stages.RUNNERS)
        return self.name

    def checkpoint(self) -> Any:
        """What submitit queues in its place: the same, which goes on from what was saved."""
        submitit = importlib.import_module("submitit")
        return submitit.helpers.DelayedSubmission(StageJob(self.out, self.name))


def by_slurm(plan: Plan, out: Path, settings: Mapping[str, Any], at_once: int) -> list[str]:
    """Queues a job for each stage that is not done: an array for each level, after the one before.

    Args:
        plan: The study's.
        out: Its folder, on a file system that all nodes share.
        settings: Of submitit's AutoExecutor: slurm_partition, timeout_min, gpus_per_node, ...
        at_once: Jobs of an array that may run at a time.

    Returns:
        The jobs' numbers.

    Raises:
        ConfigError: submitit is not installed, or there is no Slurm here.
    """
    if not isinstance(out, Path):
        raise ConfigError(
            f"--executor slurm: {out} is not on a file system that all nodes share, where jobs and "
            "their output are; run m2l study in jobs of your own, several at one --out"
        )
    try:
        submitit = importlib.import_module("submitit")  # an extra
    except ImportError as error:
        raise ConfigError("--executor slurm needs submitit: pip install 'm2l[slurm]'") from error
    if shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm: no sbatch on this machine; run it where Slurm is")
    execute.discard_damaged(plan, out)
    queued: list[str] = []
    after: str | None = None
    for names in levels(plan):
        left = [name for name in names if execute.state(plan, out, name) != "done"]
        if not left:
            continue
        executor = submitit.AutoExecutor(folder=out / "slurm", cluster="slurm")
        how = {"name": "m2l", "timeout_min": 24 * 60, "slurm_array_parallelism": at_once}
        beside: dict[str, Any] = {"requeue": True}
        if after:
            beside["dependency"] = f"afterany:{after}"
        executor.update_parameters(**{**how, **settings}, slurm_additional_parameters=beside)
        with executor.batch():
            jobs = [executor.submit(StageJob(out.absolute(), name)) for name in left]
        after = jobs[0].job_id.split("_")[0]
        queued += [job.job_id for job in jobs]
    return queued
