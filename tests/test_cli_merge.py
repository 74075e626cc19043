"""`m2l merge` and `m2l sweep`: their flags, what they print, and what they refuse."""

import dataclasses
import json

import numpy as np
import pytest

from m2l import checkpoints
from m2l.merging import Recipe, interference
from m2l.studies import retention


def models(road):
    return (
        *("--base", road / "base", "--expert", road / "sentiment"),
        *("--expert", road / "closed_book_qa"),
    )


def read(path):
    return checkpoints.flatten(checkpoints.restore(path))


def test_the_list_shows_methods_settings_and_presets(run_m2l, capsys):
    assert run_m2l("merge", "--list") == 0
    shown = capsys.readouterr().out
    for words in ("model_stock", "drop_rate=required", "density=0.2", "fusion_bench", "mergelm"):
        assert words in shown


def test_a_dry_run_says_what_it_takes_and_does_nothing(road, run_m2l, capsys, tmp_path):
    flags = ("--method", "ties", "--dry_run", "--bandwidth", "1GB", "--out", tmp_path / "out")
    assert run_m2l("merge", *models(road), *flags) == 0
    shown = capsys.readouterr().out
    for words in ("in 2 readings", "are free", "at most", "at 1 GB/s (--bandwidth)"):
        assert words in shown
    assert list(tmp_path.iterdir()) == []


def test_flags_become_a_recipe_and_a_recipe_is_read_back(road, run_m2l, capsys, tmp_path):
    flags = ("--method", "ties", "--preset", "mergekit", "--density", 0.3, "--weights", "0.5,0.7")
    flags += ("--scale_of", "decoder/*=0.25", "--memory", "8GiB", "--no-diagnostics")
    flags += ("--density", "*/mlp/*=0.5,0.25..1")
    assert run_m2l("merge", *models(road), *flags, "--out", tmp_path / "one") == 0
    made_by = checkpoints.read_manifest(tmp_path / "one").made_by
    recipe = made_by["recipe"]
    assert recipe["density"] == [["*/mlp/*", [0.5, "0.25..1"]], ["*", 0.3]]
    assert recipe["weights"] == [0.5, 0.7]
    assert recipe["scales"] == [["decoder/*", 0.25]]
    assert (recipe["scope"], recipe["zero_sign"], recipe["keep"]) == (
        "tensor",
        "positive",
        "at_least_one",
    )
    assert "cosines" not in made_by["diagnostics"]
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": recipe}))
    again = ("--recipe", tmp_path / "recipe.json", "--out", tmp_path / "two")
    assert run_m2l("merge", *models(road), *again) == 0
    one, two = (checkpoints.read_manifest(tmp_path / name) for name in ("one", "two"))
    assert one.digest == two.digest


def test_a_file_of_mergekits_is_a_merge_of_the_models_that_it_names(
    road, run_m2l, capsys, tmp_path
):
    file, out = tmp_path / "merge.yml", tmp_path / "out"
    models_of_file = "\n".join(
        f"- model: {road / name}\n  parameters: {{weight: {weight}, density: 0.4}}"
        for name, weight in (("sentiment", 0.5), ("closed_book_qa", [0.2, 0.7]))
    )
    file.write_text(f"merge_method: ties\nbase_model: {road / 'base'}\nmodels:\n{models_of_file}\n")
    assert run_m2l("merge", "--config", file, "--to", "orbax", "--out", out) == 0
    flags = ("--method", "ties", "--preset", "mergekit", "--density", "0.4,0.4")
    flags += ("--weights", "0.5,0.2..0.7", "--out", tmp_path / "by_flags")
    assert run_m2l("merge", *models(road), *flags) == 0
    digests = [checkpoints.read_manifest(each).digest for each in (out, tmp_path / "by_flags")]
    assert digests[0] == digests[1]
    capsys.readouterr()
    assert run_m2l("merge", "--config", file, "--scale", 2, "--out", tmp_path / "no") == 2
    assert "--config has the models and the method" in capsys.readouterr().err


def test_a_merge_of_checkpoints_becomes_a_hugging_face_directory(road, run_m2l, tmp_path):
    flags = ("--method", "task_arithmetic", "--to", "huggingface")
    for scale in (0.5, 1.0):
        out = ("--scale", scale, "--out", tmp_path / str(scale))
        assert run_m2l("merge", *models(road), *flags, *out) == 0
        assert (tmp_path / str(scale) / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.5", "1.0"]


def test_a_negative_scale_forgets(road, run_m2l, tmp_path):
    flags = ("--method", "task_arithmetic", "--scale", -1, "--out", tmp_path / "out")
    expert = ("--base", road / "base", "--expert", road / "sentiment")
    assert run_m2l("merge", *expert, *flags) == 0
    base, one, out = (read(path) for path in (road / "base", road / "sentiment", tmp_path / "out"))
    for name, array in out.items():
        np.testing.assert_allclose(array, 2 * base[name] - one[name], atol=1e-6)


def test_inspect_shows_and_draws_what_a_merge_measured(road, run_m2l, capsys, tmp_path):
    flags = ("--method", "task_arithmetic", "--out", tmp_path / "out")
    assert run_m2l("merge", *models(road), *flags) == 0
    capsys.readouterr()
    picture = tmp_path / "cosines.png"
    assert run_m2l("inspect", tmp_path / "out", "--cosines", picture) == 0
    shown = capsys.readouterr().out
    for words in ("task vectors", "|sentiment|", "sign conflicts", "decoder/layers_00", "cosines"):
        assert words in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run_m2l("inspect", road / "base", "--cosines", picture) == 2
    assert "no cosines were measured" in capsys.readouterr().err


def test_inspect_predicts_what_a_merge_keeps(road, run_m2l, capsys, tmp_path):
    fitted, paths = retention.Retention.read(), [road / "sentiment", road / "closed_book_qa"]
    near = dataclasses.replace(fitted, ranges={**fitted.ranges, "norm": (1e-9, 1e-8)})
    near.write(tmp_path / "near.json")
    assert run_m2l("inspect", *models(road), "--predict", tmp_path / "near.json") == 0
    shown, warned = capsys.readouterr()
    for words in ("2 experts of", "signs conflict at", "ties, density", "it was off by"):
        assert words in shown
    assert warned.count("norm is") == 1 and "the prediction is a guess" in warned

    recipe = Recipe("task_arithmetic", scale=0.3)
    [measures] = interference.measure(road / "base", paths, [recipe], progress=False)
    flags = ("--predict", "--method", "task_arithmetic", "--scale", 0.3)
    assert run_m2l("inspect", *models(road), *flags, "--json") == 0
    named = json.loads(capsys.readouterr().out)
    [prediction] = named["predictions"]
    assert prediction["recipe"] == recipe.to_dict()
    assert prediction["measures"] == pytest.approx(measures._asdict())
    expected = fitted.predict(measures)
    assert [prediction[name] for name in ("share", "low", "high")] == pytest.approx(expected)
    assert named["error"]["error"] == fitted.errors[fitted.left_out].error

    # A merge names its base, its experts and its recipe itself.
    out, own = tmp_path / "out", tmp_path / "own.json"
    assert run_m2l("merge", *models(road), *flags[1:], "--out", out) == 0
    fitted.write(own)
    capsys.readouterr()
    assert run_m2l("inspect", out, "--predict", own, "--json") == 0
    assert json.loads(capsys.readouterr().out) == named


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--predict", "--expert", "ONE", "--expert", "TWO"), "found no base and 2"),
        (("--predict", "--base", "BASE", "--expert", "ONE"), "found a base and 1"),
        (("ONE", "--predict"), "expected a merge of a base's experts"),
        (("ONE", "--predict", "--base", "BASE"), "leave it out, or --base"),
        (("ONE", "--base", "BASE"), "--base: without effect without --predict"),
        (("ONE", "--scale", "0"), "--scale: without effect without --predict"),
        (("--predict", "RECIPE", "ONE"), "expected what scripts/fit_retention.py writes"),
        ((), "CHECKPOINT is missing"),
    ],
)
def test_inspect_says_what_a_prediction_needs(road, run_m2l, capsys, tmp_path, flags, message):
    (tmp_path / "recipe.json").write_text('{"method": "ties"}')
    places = {"BASE": road / "base", "ONE": road / "sentiment", "TWO": road / "closed_book_qa"}
    places |= {"RECIPE": tmp_path / "recipe.json"}
    assert run_m2l("inspect", *(places.get(flag, flag) for flag in flags)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "tise"), "unknown merge method 'tise'"),
        (("--method", "ties", "--preset", "mergekid"), "unknown preset 'mergekid'"),
        (("--method", "ties", "--scale_of", "x"), "expected PATTERN=SCALE"),
        (("--method", "ties", "--scale_of", "x=1"), "scales 'x' matches no parameter"),
        (("--method", "ties", "--density", 0.2, "--density", 0.3), "--density is there twice"),
        (("--method", "ties", "--density", "0.2..x"), "'0.2..x' is no gradient over layers"),
        (("--method", "ties", "--memory", "lots"), "cannot parse memory size 'lots'"),
        (("--method", "ties", "--process", "2"), "--process 2: expected I/N"),
        (("--method", "ties", "--process", "2/2"), "--process 2/2: expected I/N"),
        (
            ("--method", "ties", "--to", "gguf"),
            "'gguf' is not one of 'orbax', 'huggingface', 'adapter'",
        ),
        (("--method", "fisher"), "needs the fisher statistics of each expert"),
        ((), "--method is missing"),
    ],
)
def test_bad_flags_are_refused_in_one_line(road, run_m2l, capsys, tmp_path, flags, message):
    assert run_m2l("merge", *models(road), *flags, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def swept(road, run_m2l, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    flags = ("--method", "ties", "--density", "0.2,0.4..0.6", "--scale", "0:1:0.5")
    flags += ("--mixture", "sentiment", "--max_examples", 4, "--input_length", 32)
    flags += ("--target_length", 8, "--batch_size", 4, "--out", out)
    assert run_m2l("sweep", *models(road), *flags) == 0
    return out, flags


def test_a_sweep_leaves_curve_picture_and_the_best_recipe(road, run_m2l, swept, tmp_path):
    out, _ = swept
    curve = json.loads((out / "curve.json").read_text())
    assert [point["settings"] for point in curve] == [
        {"density": density, "scale": scale}
        for density in (0.2, "0.4..0.6")
        for scale in (0, 0.5, 1)
    ]
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["score"] == max(point["score"] for point in curve)
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    # At scale 0 every density is the base.
    assert curve[0]["tasks"] == curve[3]["tasks"]
    again = ("--recipe", out / "recipe.json", "--out", tmp_path / "merged")
    assert run_m2l("merge", *models(road), *again) == 0


def test_a_sweep_goes_on_with_its_own_results_and_refuses_another(road, run_m2l, swept, capsys):
    out, flags = swept
    before = {path: path.stat().st_mtime_ns for path in out.glob("results/*/*.json")}
    assert run_m2l("sweep", *models(road), *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("results/*/*.json")} == before
    other = ("sweep", *models(road), "--method", "average", "--scale", "1", *flags[6:])
    assert run_m2l(*other) == 2
    assert "average has no scale" in capsys.readouterr().err
    other = ("sweep", *models(road), "--method", "ties", "--scale", "1", *flags[6:])
    assert run_m2l(*other) == 2
    assert "holds another sweep" in capsys.readouterr().err
    assert run_m2l("sweep", *models(road), *flags[:4], "--scale", "1:0:1", *flags[6:]) == 2
    assert "expected FIRST:LAST:STEP" in capsys.readouterr().err


def test_a_sweep_refuses_models_that_do_not_belong_together(road, run_m2l, swept, tmp_path, capsys):
    manifest = checkpoints.read_manifest(road / "sentiment")
    checkpoints.save(
        tmp_path / "other",
        checkpoints.restore(road / "sentiment"),
        model={**manifest.model, "layer_norm_epsilon": 1e-3},
        vocabulary=manifest.vocabulary,
        made_by={"kind": "test"},
    )
    flags = (*swept[1][:-1], tmp_path / "out")
    assert run_m2l("sweep", *models(road), "--expert", tmp_path / "other", *flags) == 2
    assert "layer_norm_epsilon is 0.001 and not 1e-06" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_drop_rates_by_rank_is_scored(road, run_m2l, swept, tmp_path):
    flags = ("--method", "della", "--drop_rate", "0.5", "--epsilon", "0.1,0.2")
    flags += (*swept[1][6:-1], tmp_path / "out")
    assert run_m2l("sweep", *models(road), *flags) == 0
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [point["settings"]["epsilon"] for point in curve] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "della", "--drop_rate", "0.9", "--epsilon", "0.05,0.2"), "rates from 0.7 to"),
        (("--method", "fisher", "--floor", "0.1"), "needs the fisher statistics of each expert"),
        (("--method", "linear", "--t", "0.5"), "linear merges 1 expert, not 2"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused_before_anything_is_read(
    road, run_m2l, swept, tmp_path, capsys, flags, message
):
    assert run_m2l("sweep", *models(road), *flags, *swept[1][6:-1], tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_a_mixture_keeps_every_merge(road, run_m2l, tmp_path):
    out = tmp_path / "out"
    flags = ("--method", "task_arithmetic", "--scale", "0.2,0.4", "--out", out)
    assert run_m2l("sweep", *models(road), *flags) == 0
    assert sorted(path.name for path in out.iterdir()) == ["scale=0.2", "scale=0.4"]
    single = ("--method", "task_arithmetic", "--scale", 0.4, "--out", tmp_path / "single")
    assert run_m2l("merge", *models(road), *single) == 0
    digests = [checkpoints.verify(path).digest for path in (out / "scale=0.4", tmp_path / "single")]
    assert digests[0] == digests[1]
    assert run_m2l("sweep", *models(road), *flags) == 0


def test_a_delta_is_stored_shown_evaluated_and_restored(road, run_m2l, capsys, tmp_path):
    """Of a checkpoint whose base is a Hugging Face directory, too."""
    base, expert = tmp_path / "hf", road / "sentiment"
    assert run_m2l("convert", road / "base", base) == 0
    assert run_m2l("compress", expert, "--base", base, "--out", tmp_path / "delta") == 0
    assert "lossless" in capsys.readouterr().out
    assert run_m2l("inspect", tmp_path / "delta") == 0
    assert "stored as" in (shown := capsys.readouterr().out) and "difference" in shown
    model = f"{base}+{tmp_path / 'delta'}"
    assert run_m2l("inspect", model, "--verify") == 0
    assert "every digest is right" in capsys.readouterr().out
    assert run_m2l("convert", model, tmp_path / "restored") == 0
    wanted = checkpoints.read_manifest(checkpoints.resolve(expert))
    assert checkpoints.read_manifest(tmp_path / "restored").digest == wanted.digest
    scores = []
    for number, path in enumerate((expert, model)):
        out = tmp_path / f"results_{number}"
        flags = ("--mixture", "imdb_good_or_bad", "--max_examples", 4, "--out", out)
        assert run_m2l("eval", path, *flags) == 0
        (result,) = (json.loads(file.read_text()) for file in out.glob("imdb*.json"))
        scores.append((result["model_digest"], result["score"]))
    assert scores[0] == scores[1]


def test_experts_are_stored_as_masks_of_one_task_vector(road, run_m2l, capsys, tmp_path):
    experts = (road / "sentiment", road / "closed_book_qa")
    flags = ("--base", road / "base", "--method", "emr", "--dtype", "bfloat16")
    assert run_m2l("compress", *experts, *flags, "--out", tmp_path / "store") == 0
    assert "shared task vector" in capsys.readouterr().out
    model = f"{road / 'base'}+{tmp_path / 'store' / 'sentiment'}"
    assert run_m2l("convert", model, tmp_path / "restored") == 0
    assert read(tmp_path / "restored").keys() == read(road / "sentiment").keys()
    assert run_m2l("compress", road / "base", *flags, "--out", tmp_path / "other") == 2
    assert "two experts or more" in capsys.readouterr().err


@pytest.mark.parametrize("match", ["weights", "activations"])
def test_an_expert_is_aligned_and_the_barrier_measured(road, run_m2l, capsys, tmp_path, match):
    expert, out = road / "sentiment", tmp_path / "aligned"
    flags = ("--to", road / "closed_book_qa", "--match", match, "--out", out)
    data = ("--mixture", "imdb_good_or_bad", "--examples", 4, "--batch_size", 4, "--points", 3)
    lengths = ("--input_length", 32, "--target_length", 8)
    assert run_m2l("align", expert, *flags, *data, *lengths) == 0
    shown = capsys.readouterr().out
    assert "barrier: " in shown and "value features" in shown and "as it was" in shown
    manifest = checkpoints.read_manifest(out)
    assert [parent["role"] for parent in manifest.parents] == ["reference", "expert"]
    for name, array in read(expert).items():
        assert np.array_equal(np.sort(np.ravel(read(out)[name])), np.sort(np.ravel(array)))


def test_activations_of_no_data_are_refused(road, run_m2l, capsys, tmp_path):
    flags = ("--to", road / "base", "--match", "activations", "--out", tmp_path / "out")
    assert run_m2l("align", road / "sentiment", *flags) == 2
    assert "name a --mixture" in capsys.readouterr().err
