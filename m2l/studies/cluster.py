"""Runs the stages of a study in several processes of this machine, or on a cluster with Slurm."""

import contextlib
import importlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from m2l import signals
from m2l.errors import ConfigError, M2LError, Stopped
from m2l.studies.graph import Graph, discard_damaged, run_stage, stage_state

_POLL_SECONDS = 0.2


def by_processes(out: Path, workers: int) -> None:
    """Starts processes that share the stages of the study in `out`, and waits for all of them.

    Raises:
        M2LError: A process failed; its output has the error.
        Stopped: SIGINT or SIGTERM was received; what was in progress in each process is saved.
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
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for process in running:
                process.send_signal(number or signal.SIGTERM)
            for process in running:
                process.wait()
            raise
    codes = [process.returncode for process in running]
    if any(codes):
        raise M2LError(f"{sum(map(bool, codes))} of {workers} processes failed; see above")


def levels(graph: Graph) -> list[list[str]]:
    """Returns the stages by depth in the graph: those of one level can run at the same time."""
    depth: dict[str, int] = {}
    for stage in graph:
        depth[stage.name] = 1 + max((depth[name] for name in stage.inputs.values()), default=-1)
    deepest = max(depth.values(), default=-1)
    return [[name for name in depth if depth[name] == level] for level in range(deepest + 1)]


class StageJob:
    """One stage as a job of its own; it is queued again when it is preempted or out of time."""

    def __init__(self, out: Path, name: str):
        self.out, self.name = out, name

    def __call__(self) -> str:
        from m2l.studies import run, study_results

        graph = study_results.read_study(self.out).stage_graph().needed_for(self.name)
        inputs = graph[self.name].inputs.values()
        missing = [name for name in inputs if stage_state(graph, self.out, name) != "done"]
        if missing:
            raise M2LError(f"{self.name} reads {missing}, which is not done: see their jobs")
        run_stage(graph, self.out, self.name, run.RUNNERS)
        return self.name

    def checkpoint(self) -> object:
        """Returns what submitit queues in its place: the same job, which resumes."""
        submitit = importlib.import_module("submitit")
        return submitit.helpers.DelayedSubmission(StageJob(self.out, self.name))


def by_slurm(
    graph: Graph, out: Path, settings: Mapping[str, int | str], parallelism: int
) -> list[str]:
    """Queues a job for each stage that is not done: an array for each level of the graph.

    Args:
        graph: The study's stages.
        out: The study's folder, on a file system that all nodes share.
        settings: Parameters of submitit's AutoExecutor: slurm_partition, timeout_min, ...
        parallelism: The number of jobs of an array that may run at a time.

    Returns:
        The jobs' numbers.

    Raises:
        ConfigError: submitit or Slurm is not installed, or the folder is in a bucket.
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
    discard_damaged(graph, out)
    queued: list[str] = []
    sbatch_options: dict[str, bool | str] = {"requeue": True}
    for names in levels(graph):
        remaining = [name for name in names if stage_state(graph, out, name) != "done"]
        if not remaining:
            continue
        executor = submitit.AutoExecutor(folder=out / "slurm", cluster="slurm")
        defaults = {"name": "m2l", "timeout_min": 24 * 60, "slurm_array_parallelism": parallelism}
        executor.update_parameters(
            **{**defaults, **settings}, slurm_additional_parameters=dict(sbatch_options)
        )
        with executor.batch():
            jobs = [executor.submit(StageJob(out.absolute(), name)) for name in remaining]
        sbatch_options["dependency"] = f"afterany:{jobs[0].job_id.split('_')[0]}"
        queued += [job.job_id for job in jobs]
    return queued
