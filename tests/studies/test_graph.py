import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from m2l.errors import ConfigError, UnknownNameError
from m2l.studies import cluster, graph
from m2l.studies.graph import Graph, Outcome, Stage


def plan(steps=3, scale=0.5):
    return Graph(
        [
            Stage("base", "train", {"steps": steps}),
            Stage("expert", "train", {"steps": 2}, {"init": "base"}),
            Stage("merged", "merge", {"scale": scale}, {"base": "base", "expert_00": "expert"}),
            Stage("other", "train", {"steps": 9}),
        ]
    )


def digests(of):
    return {stage.name: of.digest(stage.name) for stage in of}


def test_a_changed_setting_changes_the_digests_of_all_that_depends_on_it_and_no_other():
    before, after = digests(plan()), digests(plan(scale=0.6))
    assert {name for name in before if before[name] != after[name]} == {"merged"}
    after = digests(plan(steps=4))
    assert {name for name in before if before[name] != after[name]} == {"base", "expert", "merged"}


def test_a_stage_needs_what_it_is_made_from_and_no_more():
    assert [stage.name for stage in plan().needed_for("expert")] == ["base", "expert"]
    assert digests(plan().needed_for("merged"))["merged"] == digests(plan())["merged"]


def test_an_unknown_stage_proposes_the_nearest():
    with pytest.raises(UnknownNameError, match="'merged'"):
        plan().needed_for("merge")


def test_an_input_must_be_made_by_an_earlier_stage():
    with pytest.raises(ValueError, match="no earlier stage"):
        Graph([Stage("a", "train", {}, {"init": "b"}), Stage("b", "train", {})])


class Recorder:
    """A runner that writes its settings and its inputs' contents."""

    def __init__(self):
        self.ran = []

    def __call__(self, stage, out, inputs):
        self.ran.append(stage.name)
        out.mkdir(parents=True, exist_ok=True)
        read = {role: (path / "made").read_text() for role, path in inputs.items()}
        (out / "made").write_text(json.dumps([stage.settings, read]))


def run(of, out):
    recorder = Recorder()
    graph.execute(of, out, {"train": recorder, "merge": recorder})
    return recorder.ran


def test_finished_stages_are_not_run_again(folder):
    assert run(plan(), folder) == ["base", "expert", "merged", "other"]
    assert run(plan(), folder) == []


def test_a_changed_setting_reruns_only_what_depends_on_it(folder):
    run(plan(), folder)
    assert run(plan(steps=4), folder) == ["base", "expert", "merged"]
    assert (folder / "base" / "made").read_text() == json.dumps([{"steps": 4}, {}])


def test_a_stage_that_broke_off_is_run_again_over_what_it_left(folder):
    class Broken(Recorder):
        def __call__(self, stage, out, inputs):
            if stage.name == "expert":
                out.mkdir(parents=True, exist_ok=True)
                (out / "half").write_text("done")
                raise KeyboardInterrupt
            super().__call__(stage, out, inputs)

    broken = Broken()
    with pytest.raises(KeyboardInterrupt):
        graph.execute(plan(), folder, {"train": broken, "merge": broken})
    assert graph.stage_state(plan(), folder, "base") == "done"
    assert graph.stage_state(plan(), folder, "expert") == "begun"
    assert graph.stage_state(plan(), folder, "merged") == "missing"
    assert run(plan(), folder) == ["expert", "merged", "other"]
    assert (folder / "expert" / "half").exists()


class Failing(Recorder):
    """Fails at the expert, of which one other stage is made."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def __call__(self, stage, out, inputs):
        if stage.name == "expert":
            raise self.error
        super().__call__(stage, out, inputs)


@pytest.mark.parametrize(
    ("error", "bugs"), [(ConfigError("too small"), False), (ValueError("too small"), True)]
)
def test_a_stage_that_fails_is_named_and_the_others_go_on(tmp_path, capfd, error, bugs):
    failing = Failing(error)
    outcome = graph.execute(plan(), tmp_path, {"train": failing, "merge": failing})
    assert outcome.ran == ["base", "other"] and outcome.blocked == ["merged"]
    assert list(outcome.failed) == ["expert"] and "too small" in outcome.failed["expert"]
    assert outcome.bugs is bugs
    assert "expert failed" in capfd.readouterr().err
    assert "too small" in (tmp_path / "stages" / "expert.error").read_text()
    assert run(plan(), tmp_path) == ["expert", "merged"]


def test_threads_share_the_stages_and_none_repeats_what_failed_in_another(tmp_path):
    failing, outcome, together = Failing(ConfigError("too small")), Outcome(), threading.Barrier(2)

    def run_both(stage, out, inputs):
        if stage.name in ("expert", "other"):
            together.wait(60)  # Each thread has one of the two.
        failing(stage, out, inputs)

    with ThreadPoolExecutor(2) as pool:
        runners = {"train": run_both, "merge": run_both}
        list(pool.map(lambda _: graph.execute(plan(), tmp_path, runners, outcome=outcome), "ab"))
    assert sorted(failing.ran) == sorted(outcome.ran) == ["base", "other"]
    assert list(outcome.failed) == ["expert"] and set(outcome.blocked) == {"merged"}


def test_processes_that_share_a_folder_share_the_stages(tmp_path):
    def stage(number):
        return Stage(f"stage_{number}", "train", {}, {"init": "first"})

    of = Graph([Stage("first", "train", {}), *map(stage, range(12))])
    workers = []
    for _ in range(3):
        if (worker := os.fork()) == 0:
            recorder = Recorder()

            def slowly(stage, out, inputs, recorder=recorder):
                time.sleep(0.05)  # so that others find it under way
                recorder(stage, out, inputs)

            graph.execute(of, tmp_path, {"train": slowly})
            (tmp_path / f"ran_{os.getpid()}").write_text("\n".join(recorder.ran))
            os._exit(0)
        workers.append(worker)
    assert [os.waitpid(worker, 0)[1] for worker in workers] == [0, 0, 0]
    ran = [path.read_text().split() for path in tmp_path.glob("ran_*")]
    assert sorted(name for names in ran for name in names) == sorted(stage.name for stage in of)
    assert sum(map(bool, ran)) > 1


def test_levels_hold_what_can_run_side_by_side():
    assert cluster.levels(plan()) == [["base", "other"], ["expert"], ["merged"]]


def test_what_another_digest_began_is_thrown_away(tmp_path):
    run(plan(), tmp_path)
    (tmp_path / "base" / "half").write_text("of other settings")
    run(plan(steps=4), tmp_path)
    assert not (tmp_path / "base" / "half").exists()


def test_a_stage_whose_output_is_gone_is_run_again(tmp_path):
    run(plan(), tmp_path)
    shutil.rmtree(tmp_path / "expert")
    assert run(plan(), tmp_path) == ["expert"]


def test_time_left_is_estimated_and_corrected_by_what_stages_took():
    left = graph._TimeLeft(plan(), {"base": 30, "expert": 10, "merged": 60, "other": 5})
    assert left.describe(["base", "expert", "merged", "other"], 0) == ", about 1:45 left"
    # Twice as long as estimated: so are all others thought to take, until one of their kind ends.
    left.count("base", 60)
    assert left.describe(["expert", "merged", "other"], 60) == ", about 2:30 left"
    left.count("expert", 20)
    left.count("merged", 30)
    assert left.describe(["other"], 110) == ", about 0:10 left"
    assert left.describe(["other"], 55) == ", about 0:05 left"  # Two processes did it.
    assert graph._TimeLeft(plan(), {}).describe(["base"], 1) == ""


def test_time_left_is_estimated_by_what_an_earlier_call_did(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(graph.time, "monotonic", lambda: now[0])

    def slowly(stage, out, inputs):
        out.mkdir()
        now[0] += 30

    estimates = {"base": 10, "expert": 10, "merged": 10, "other": 10}
    runners = {"train": slowly, "merge": slowly}
    graph.execute(plan().needed_for("base"), tmp_path, runners, estimates)
    assert capsys.readouterr().err == "[1/1] base, about 0:10 left\n"
    graph.execute(plan(), tmp_path, runners, estimates)
    assert capsys.readouterr().err.splitlines() == [
        "[2/4] expert, about 1:30 left",
        "[3/4] merged, about 1:00 left",
        "[4/4] other, about 0:30 left",
    ]
