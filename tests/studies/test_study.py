"""A whole study in the small: killed in each kind of work, it ends with the same results."""

import json
import os

import numpy as np
import pytest

from m2l import checkpoints, storage

SMALL = [
    "T5.d_model=16",
    "T5.d_kv=8",
    "T5.d_ff=32",
    "T5.num_heads=2",
    "T5.num_encoder_layers=1",
    "Train.batch_size=4",
    "Train.save_every=2",
    "pretrain/Train.steps=4",
    "pretrain/Train.warmup_steps=1",
    "instruct/Train.steps=3",
    "expert/Train.steps=3",
    "multitask/Train.steps=3",
    "ScalingStudy.categories=['sentiment', 'closed_book_qa']",
    "ScalingStudy.held_out=['natural_language_inference']",
    "ScalingStudy.recipes=[@average/Merge(), @dare_ties/Merge()]",
    "ScalingStudy.expert_counts=[2]",
    "ScalingStudy.seeds=[0]",
    "ScalingStudy.swept={'dare_ties': {'scale': [0.5, 1.0]}}",
    "ScalingStudy.max_examples=4",
    "ScalingStudy.max_prompts=2",
    "ScalingStudy.choosing_examples=4",
    "ScalingStudy.generative_score=likelihood",
]
ARGUMENTS = ["study", "--gin_file", "experiments/demo.gin", *(f"--gin.{b}" for b in SMALL)]


def results(out):
    """Every result, apart from how long it took."""
    found = {}
    for path in sorted(storage.list_files(out / "results"), key=str):
        if path.suffix != ".json":
            continue
        result = json.loads(path.read_text())
        for own in ("seconds", "checksum"):
            result.pop(own, None)
        found[str(path.relative_to(out))] = result
    return found


@pytest.fixture(scope="module")
def undisturbed(run_m2l, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "undisturbed"
    assert run_m2l(*ARGUMENTS, "--out", out) == 0
    return out


def test_a_study_holds_a_result_for_every_model_and_task(undisturbed):
    found = {name: of for name, of in results(undisturbed).items() if "recipes" not in name}
    # Two prompts of each dataset; one of each of ANLI's three rounds.
    sentiment, closed_book, inference = 4, 4, 5
    everything = sentiment + closed_book + inference
    # Two bases, two multitask models and four merges on all, two experts of each category on it.
    assert len(found) == 8 * everything + 2 * sentiment + 2 * closed_book
    assert len({result["model_digest"] for result in found.values()}) == 2 + 2 + 4 + 4


def test_a_study_goes_on_in_a_bucket_to_the_results_of_a_local_one(
    undisturbed, run_m2l, gcs_bucket
):
    out = gcs_bucket / "study"
    storage.upload(undisturbed, out)
    # An expert has to be trained again, and what it is an input of, merged and evaluated.
    for part in (
        "experts/1M/instruct/sentiment",
        "results/merges/1M/instruct",
        "choices/1M/instruct",
    ):
        assert storage.list_files(out / part)
        storage.remove_tree(out / part)
    assert run_m2l(*ARGUMENTS, "--out", out) == 0
    assert results(out) == results(undisturbed)
    assert run_m2l("report", out) == 0
    assert (out / "report" / "index.html").is_file()


def test_what_is_swept_is_chosen_by_the_best_score(undisturbed):
    for base in ("pretrained", "instruct"):
        choice = json.loads((undisturbed / f"choices/1M/{base}/2/dare_ties.json").read_text())
        assert [point["settings"]["scale"] for point in choice["points"]] == [0.5, 1.0]
        best = max(choice["points"], key=lambda point: point["score"])
        assert choice["chosen"] == best["settings"]
        recipes = json.loads(
            (undisturbed / f"results/merges/1M/{base}/all/recipes.json").read_text()
        )
        assert recipes["dare_ties-seed0"]["scale"] == choice["chosen"]["scale"]


COMMAND = "import sys; from m2l import cli; cli.main(sys.argv[1:])"


def test_a_study_killed_in_each_kind_of_work_ends_with_the_same_results(
    undisturbed, forge, run_m2l, tmp_path
):
    out = tmp_path / "killed"
    for done, next_file in (
        ("bases/1M/pretrained/checkpoints/2", "bases/1M/pretrained/checkpoints/4"),
        ("bases/1M/pretrained/finished.json", "results/bases/1M/pretrained/imdb_liked_it.json"),
        ("results/experts/1M/instruct", "results/merges/1M/instruct/all/recipes.json"),
    ):
        forge(
            (COMMAND, *ARGUMENTS, "--out", out),
            devices=1,
            dies=rf"^os\.rename \S+ {out}/{next_file}",
        )
        assert (out / done).exists()
        assert not (out / next_file).exists()
    # It goes on by what its folder says, and by two processes that share what is left.
    assert run_m2l("study", "--out", out, "--executor", "processes", "--workers", "2") == 0
    assert results(out) == results(undisturbed)


def test_a_finished_study_runs_nothing(undisturbed, run_m2l, capfd):
    assert run_m2l(*ARGUMENTS, "--out", undisturbed) == 0
    assert "0 of" in capfd.readouterr().out


def test_a_changed_merge_reruns_that_merge_and_nothing_trained(undisturbed, run_m2l, capfd):
    changed = [*ARGUMENTS, "--gin.dare_ties/Merge.drop_rate=0.9", "--out", undisturbed]
    assert run_m2l(*changed) == 2
    assert "holds another study" in capfd.readouterr().err
    assert run_m2l(*changed, "--update") == 0
    assert "4 of" in capfd.readouterr().out


def test_merges_that_are_kept_are_the_checkpoints_that_were_evaluated(undisturbed, run_m2l):
    before = results(undisturbed)
    kept = "--gin.ScalingStudy.keep_merges=True"
    assert run_m2l(*ARGUMENTS, kept, "--update", "--out", undisturbed) == 0
    found = {name: of for name, of in results(undisturbed).items() if "/average/" in name}
    assert found == {name: of for name, of in before.items() if "/average/" in name}
    experts = [
        checkpoints.flatten(checkpoints.restore(undisturbed / "experts/1M/instruct" / category))
        for category in ("sentiment", "closed_book_qa")
    ]
    merged = checkpoints.flatten(
        checkpoints.restore(undisturbed / "merges/1M/instruct/all/average")
    )
    for name, value in merged.items():
        mean = (experts[0][name].astype(np.float64) + experts[1][name]) / 2
        np.testing.assert_allclose(value, mean, rtol=1e-6, atol=1e-9)


def test_a_dry_run_prints_the_graph_with_time_and_disk_and_does_nothing(tmp_path, run_m2l, capfd):
    out = tmp_path / "dry"
    assert run_m2l(*ARGUMENTS, "--dry_run", "--peak", "1e12", "--out", out) == 0
    said = capfd.readouterr().out
    assert not out.exists()
    assert "experts/1M/instruct/sentiment" in said and "bases/1M/instruct" in said
    assert "left to do:" in said and "of disk" in said


def test_a_study_needs_a_gin_file_or_a_folder_to_go_on_with(tmp_path, run_m2l, capfd):
    assert run_m2l("study", "--out", tmp_path / "none") == 2
    assert "--gin_file is missing" in capfd.readouterr().err
    assert run_m2l("study", "--out", tmp_path, "--gin.ScalingStudy.seeds=[1]") == 2
    assert "needs a --gin_file" in capfd.readouterr().err


def test_the_studys_report_is_made_from_its_results(undisturbed, run_m2l):
    assert run_m2l("report", undisturbed) == 0
    assert (undisturbed / "report" / "index.html").stat().st_size > os.path.getsize(__file__)
