"""Paper 2's study in the small, by the command: trained, merged, evaluated and reported."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from m2l.studies.graph import Stage

SMALL = [
    "T5.d_model=16",
    "T5.d_kv=8",
    "T5.d_ff=32",
    "T5.num_heads=2",
    "T5.num_encoder_layers=1",
    "T5.num_decoder_layers=1",
    "Train.batch_size=4",
    "Train.input_length=16",
    "Train.target_length=8",
    "pretrain/Train.steps=1",
    "pretrain/Train.warmup_steps=0",
    "SkillsStudy.skills={'safety': 'skills_safety'}",
    "SkillsStudy.evaluations={'general': 'general_requests_ask', 'safety': 'safety_unsafe_ask'}",
    "SkillsStudy.examples={'skills_general': 12, 'skills_safety': 4}",
    "SkillsStudy.epochs=1",
    "SkillsStudy.weights=[0.5]",
    "SkillsStudy.parts=[]",
    "SkillsStudy.retrained_parts=[]",
    "SkillsStudy.max_examples=2",
    "SkillsStudy.eval_batch_size=2",
    "SkillsStudy.generative_score=likelihood",
]
ARGUMENTS = [*("study", "--gin_file", "experiments/merge_to_learn.gin")]
ARGUMENTS += [f"--gin.{binding}" for binding in SMALL]


@pytest.fixture(scope="module")
def finished(run_m2l, tmp_path_factory):
    out = tmp_path_factory.mktemp("skills")
    assert run_m2l(*ARGUMENTS, "--out", out) == 0
    return out


def test_every_regime_and_merge_has_its_results(finished):
    results = finished / "results"
    names = {
        str(path.parent.relative_to(results))
        for path in results.rglob("*.json")
        if path.name != "recipes.json"
    }
    trained = {"pretrained", "general", "ptm/safety", "cft/safety", "rt/safety"}
    methods = ("task_arithmetic", "linear", "ties_mergekit", "ties", "dare")
    ours = {f"{method}-{w}" for method in methods for w in ("0.5", "heuristic")}
    merged = {f"merges/safety/ptm/{name}" for name in ours}
    merged |= {f"merges/safety/cft/wise_ft-{w}" for w in ("0.5", "heuristic")}
    assert names == {f"models/{name}" for name in trained} | merged
    made = json.loads((results / "merges/safety/ptm/recipes.json").read_text())
    assert made["task_arithmetic-0.5"]["weights"] == [1.0, 0.5]


def test_it_is_not_run_again_and_its_report_tells_each_way(finished, run_m2l, capfd):
    assert run_m2l("study", "--out", finished) == 0
    assert "0 of" in capfd.readouterr().out
    assert run_m2l("report", finished) == 0
    assert "Retraining" in capfd.readouterr().out
    assert 'id="figure-tradeoff"' in (finished / "report/index.html").read_text()


def test_stages_done_again_are_compared_by_all_but_their_seconds(finished, tmp_path):
    rerun = runpy.run_path(str(Path(__file__).parents[2] / "scripts/rerun_study.py"))
    stage = Stage("results/models/general", "evaluate", {}, {})
    results = finished / "results/models/general"
    for name, changed in {
        "again": {"seconds": 9.0, "checksum": "of other seconds"},
        "other": {"score": 9.0},
    }.items():
        shutil.copytree(results, tmp_path / name)
        for path in (tmp_path / name).glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    expected = rerun["content"](stage, results)
    assert len(expected) == 2
    assert rerun["content"](stage, tmp_path / "again") == expected
    assert rerun["content"](stage, tmp_path / "other") != expected
