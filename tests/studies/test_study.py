"""A whole study in the small: killed in each kind of work, it ends with the same results."""

import json
import os

import numpy as np
import pytest

from m2l import checkpoints, merging, storage
from m2l.merging import Recipe
from m2l.studies import method_scores, study_results

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


# --- a comparison of methods, on the models of that study ---


@pytest.fixture(scope="module")
def compared(undisturbed, run_m2l, tmp_path_factory):
    """A comparison's folder; the study's models are given, so that nothing is trained."""
    names = ["bases/1M/instruct", "multitask/1M/instruct"]
    names += [f"experts/1M/instruct/{category}" for category in ("sentiment", "closed_book_qa")]
    given = {name: str(undisturbed / name) for name in names}
    spaces = {
        "average": {},
        "ties": {"density": (0.1, 1.0), "scale": [0.5, 1.0, 2.0], "consensus": ["mean", "sum"]},
        "fisher": {"floor": (1e-8, 1e-4, "log")},
        "tsv_m": {"scale": (0.5, 2.0)},
        "sce": {"density": (0.1, 1.0)},
    }
    bindings = [
        *SMALL,
        f"ScalingStudy.given={given}",
        "ScalingStudy.bases=['instruct']",
        f"MethodComparison.methods={spaces}",
        "MethodComparison.left_out=['sce']",
        "MethodComparison.unsearched=['tsv_m']",
        "MethodComparison.defaults={}",
        "MethodComparison.statistics_examples=4",
        "MethodComparison.memory='2GiB'",
        "CANDIDATES=3",
    ]
    out = tmp_path_factory.mktemp("comparison") / "out"
    files = ("--gin_file", "experiments/demo.gin", "--gin_file", "runs/comparison.gin")
    arguments = ["study", *files, *(f"--gin.{b}" for b in bindings), "--out", out]
    assert run_m2l(*arguments) == 0
    return out


def test_a_comparison_chooses_the_best_of_the_defaults_and_of_what_was_searched(compared):
    assert {path.name for path in (compared / "choices").iterdir()} == {"ties", "fisher"}
    assert not (compared / "results/methods/sce").exists()
    ties = {"density": 0.2, "scale": 1.0, "consensus": "mean"}
    for method, default in (("ties", ties), ("fisher", {"floor": 1e-6})):
        choice = json.loads((compared / f"choices/{method}/{method}.json").read_text())
        points = choice["points"]
        # The default, and three more, of which one may be the default again.
        assert points[0]["settings"] == default and len(points) in (3, 4)
        assert choice["chosen"] == max(points, key=lambda point: point["score"])["settings"]
        recipes = json.loads((compared / f"results/methods/{method}/recipes.json").read_text())
        chosen = recipes.get("searched", recipes["default"])
        assert {name: chosen[name] for name in default} == choice["chosen"]


def test_a_comparisons_scores_are_of_merges_and_in_units_of_experts_and_base(
    compared, undisturbed, tmp_path
):
    models = undisturbed / "bases/1M/instruct"
    experts = [
        undisturbed / "experts/1M/instruct" / name for name in ("sentiment", "closed_book_qa")
    ]
    manifest = merging.merge(models, experts, Recipe("ties"), tmp_path / "ties", progress=False)
    found = results(compared)
    own = {n: r for n, r in found.items() if n.startswith("results/methods/ties/default/")}
    assert {result["model_digest"] for result in own.values()} == {manifest.digest}
    # One prompt's score over the expert's; the mean over a category's datasets, then categories.
    by_dataset = {}
    for result in own.values():
        if not result["held_out"]:
            name = f"results/experts/1M/instruct/{result['category']}/{result['task']}.json"
            key = result["category"], result["dataset"]
            by_dataset.setdefault(key, []).append((result["score"], found[name]["score"]))
    by_category = {}
    for (category, _), pairs in by_dataset.items():
        own_scores, reference = zip(*pairs, strict=True)
        by_category.setdefault(category, []).append(sum(own_scores) / sum(reference))
    expected = np.mean([np.mean(each) for each in by_category.values()])
    loaded = study_results.load(compared)
    scores = method_scores.scores(loaded)
    row = scores.rows.loc[scores.index("ties", "default")]
    assert row["held_in"] == pytest.approx(expected)
    costs = method_scores.costs(loaded).set_index("method")
    size = sum(file.stat().st_size for file in (tmp_path / "ties").rglob("*") if file.is_file())
    assert 0.5 * size < costs.loc["average", "written"] < 2 * size
    assert (costs["cpu_seconds"] > 0.5).all()  # No Python starts in less.


def test_a_comparison_is_published_and_its_page_is_made_from_that(compared, run_m2l, tmp_path):
    published = tmp_path / "published"
    assert run_m2l("report", compared, "--publish", published) == 0
    loaded, original = study_results.load(published), study_results.load(compared)
    assert loaded.recipes == original.recipes and loaded.costs == original.costs
    page = (published / "report/index.html").read_text()
    for name in ("TIES", "Fisher", "TSV-M", "Average"):
        assert f">{name}</td>" in page
    assert "What was chosen" in page


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("MethodComparison.methods={}", "expected one or more"),
        ("MethodComparison.methods={'tise': {}}", "'tise'"),
        ("MethodComparison.methods={'slerp': {}, 'ties': {}}", "merges 2 experts, not 4"),
        ("MethodComparison.methods={'dare': {}}", "drop_rate"),
        ("MethodComparison.methods={'ties': {'densty': (0.1, 0.2)}}", "'densty'"),
        ("MethodComparison.methods={'ties': {'density': (0.1, 3.0)}}", "density"),
        ("MethodComparison.defaults={'slrp': {}}", "'slrp'"),
        ("MethodComparison.left_out=['tise']", "'tise'"),
        ("MethodComparison.left_out=['ties']", "expected one or more"),
        ("MethodComparison.unsearched=['tise']", "'tise'"),
        ("MethodComparison.unsearched='ties'", "unsearched"),
        ("MethodComparison.candidates=-1", "candidates"),
        ("MethodComparison.memory='much'", "much"),
        ("ScalingStudy.bases=['instruct', 'pretrained']", "one of its bases"),
    ],
)
def test_a_comparison_refuses(binding, message, run_m2l, capfd, tmp_path):
    files = ("--gin_file", "experiments/demo.gin", "--gin_file", "runs/comparison.gin")
    bindings = ["ScalingStudy.bases=['instruct']", "MethodComparison.defaults={}", binding]
    if "methods" not in binding:
        bindings.insert(0, "MethodComparison.methods={'ties': {}}")
    arguments = ["study", *files, *(f"--gin.{b}" for b in bindings), "--out", tmp_path / "out"]
    assert run_m2l(*arguments) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
