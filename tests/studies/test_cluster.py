"""Jobs of a cluster, with a stand-in for submitit; docs/training.md has a real Slurm to try."""

import contextlib
import shutil
import sys
import types

import pytest

from m2l import files
from m2l.errors import ConfigError, M2LError
from m2l.studies import graph, study_results
from m2l.studies.cluster import StageJob, by_slurm


class Executor:
    """Keeps what it is asked to queue."""

    queued: list[tuple[dict, list]] = []  # noqa: RUF012

    def __init__(self, folder, cluster):
        assert cluster == "slurm"

    def update_parameters(self, **settings):
        self.settings = settings

    @contextlib.contextmanager
    def batch(self):
        self.jobs = []
        yield
        Executor.queued.append((self.settings, self.jobs))

    def submit(self, job):
        self.jobs.append(job)
        number = f"{100 + len(Executor.queued)}_{len(self.jobs) - 1}"
        return types.SimpleNamespace(job_id=number)


@pytest.fixture
def slurm(monkeypatch):
    Executor.queued = []
    helpers = types.SimpleNamespace(DelayedSubmission=lambda job: ("queued again", job))
    module = types.SimpleNamespace(AutoExecutor=Executor, helpers=helpers)
    monkeypatch.setitem(sys.modules, "submitit", module)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


def test_each_level_is_an_array_that_waits_for_the_one_before(slurm, study, tmp_path):
    plan = study.stage_graph()
    settings = {"slurm_partition": "gpu", "timeout_min": 30}
    numbers = by_slurm(plan, tmp_path, settings, parallelism=7)
    assert len(numbers) == len(plan)
    level_of = {}
    for level, (how, jobs) in enumerate(Executor.queued):
        assert how["slurm_partition"] == "gpu" and how["timeout_min"] == 30
        assert how["slurm_array_parallelism"] == 7
        after = how["slurm_additional_parameters"].get("dependency")
        assert after == (f"afterany:{99 + level}" if level else None)
        assert how["slurm_additional_parameters"]["requeue"]
        level_of |= {job.name: level for job in jobs}
    for stage in plan:
        assert all(level_of[name] < level_of[stage.name] for name in stage.inputs.values())


def test_only_what_is_not_done_is_queued(slurm, finished_study, study):
    assert by_slurm(study.stage_graph(), finished_study, {}, parallelism=1) == []


def test_a_job_refuses_to_run_before_what_it_reads_and_is_queued_again_as_it_is(
    slurm, study, tmp_path
):
    files.claim(tmp_path, "study.json", study_results.describe(study))
    job = StageJob(tmp_path, "experts/0.1M/instruct/sentiment")
    with pytest.raises(M2LError, match=r"reads \['bases/0\.1M/instruct'\], which is not done"):
        job()
    words, again = job.checkpoint()
    assert words == "queued again" and (again.out, again.name) == (job.out, job.name)


def test_a_job_of_a_stage_that_is_done_does_nothing(finished_study, study):
    name = "experts/0.1M/instruct/sentiment"
    before = graph.stage_seconds(finished_study, name)
    assert StageJob(finished_study, name)() == name
    assert graph.stage_seconds(finished_study, name) == before


def test_without_submitit_or_slurm_it_says_what_to_do(monkeypatch, study, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match="pip install"):
        by_slurm(study.stage_graph(), tmp_path, {}, parallelism=1)
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no sbatch"):
        by_slurm(study.stage_graph(), tmp_path, {}, parallelism=1)
