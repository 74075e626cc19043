import math

import gin
import jax
import pytest

from m2l import configuration, models
from m2l.errors import ConfigError, M2LError, UnknownNameError

TRAIN = ["runs/train.gin"]
NEEDED = ["MIXTURE=imdb", "STEPS=7"]


def test_every_shipped_experiment_can_be_read():
    experiments = [name for name in configuration.files() if name.startswith("experiments/")]
    markers = "Study.of", "runs/comparison.gin"
    studies = [name for name in experiments if any(each in text_of(name) for each in markers)]
    assert "experiments/demo.gin" in studies and len(studies) < len(experiments)
    for name in experiments:
        large = name.endswith(("_t5.gin", "_llama.gin", "_llama2.gin"))
        needed = ["VOCABULARY=spiece.model"] * large
        if "merge_to_learn" in name and large:
            needed.append("BASE=model")
        elif large:
            sizes = ("small", "base", "large", "xl", "xxl", "1B", "3B", "8B", "70B")
            bases = {f"bases/{size}/pretrained": "DIR" for size in sizes}
            needed.append(f"ScalingStudy.given={bases}")
        kind = "Rounds" if "Rounds.merge" in text_of(name) else "Run"
        configuration.load("Study" if name in studies or large else kind, [name], needed)


def text_of(name):
    return (configuration.directory() / name).read_text()


def test_a_later_binding_wins_over_an_earlier_one_and_over_the_file():
    run, _ = configuration.load("Run", TRAIN, [*NEEDED, "LEARNING_RATE=0.5", "Train.steps=9"])
    assert (run.settings.learning_rate, run.settings.steps) == (0.5, 9)


def test_a_bare_word_is_a_string():
    assert configuration.quoted("MIXTURE=imdb") == "MIXTURE = 'imdb'"
    assert configuration.quoted("MIXTURE='imdb'") == "MIXTURE = 'imdb'"
    assert configuration.quoted("A.b=1e-3") == "A.b = 1e-3"
    assert configuration.quoted("A.b=True") == "A.b = True"
    assert configuration.quoted("A.b=@expert/Train()") == "A.b = @expert/Train()"
    assert configuration.quoted("Run.vocabulary=models/spiece.model") == (
        "Run.vocabulary = 'models/spiece.model'"
    )


def test_the_resolved_text_makes_the_same_run_again(tmp_path):
    run, resolved = configuration.load("Run", TRAIN, [*NEEDED, "SCHEDULE=cosine"])
    (tmp_path / "config.gin").write_text(resolved)
    again, _ = configuration.load("Run", [str(tmp_path / "config.gin")])
    assert again == run


@pytest.mark.parametrize(
    ("bindings", "said"),
    [
        ([*NEEDED, "Trian.steps=3"], "unknown gin name 'Trian'.*'Train'"),
        ([*NEEDED, "Train.stps=3"], "Train has no setting 'stps'; the nearest is 'steps'"),
        ([*NEEDED, "STPES=3"], "unknown gin macro 'STPES'.*'STEPS'"),
        (["MIXTURE=imdb"], "Train.steps is not set: --steps N"),
        ([*NEEDED, "STEPS=many"], "expected a positive integer, found 'many'"),
        ([*NEEDED, "STEPS=0"], "steps: expected a positive integer, found 0"),
        ([*NEEDED, "Run.model=%MODLE"], "MODLE"),
        ([*NEEDED, "STEPS="], "expected --gin.NAME=VALUE"),
        ([*NEEDED, "STEPS"], "expected --gin.NAME=VALUE"),
    ],
)
def test_a_bad_binding_is_refused_in_one_line(bindings, said):
    with pytest.raises(M2LError, match=said) as caught:
        configuration.load("Run", TRAIN, bindings)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnknownNameError, match=r"'nowhere\.gin'"):
        configuration.load("Run", ["nowhere.gin"])
    (tmp_path / "bad.gin").write_text("Train.steps = = 3\n")
    with pytest.raises(ConfigError, match="gin"):
        configuration.load("Run", [str(tmp_path / "bad.gin")])


def test_folders_named_like_those_of_the_gin_files_do_no_harm(tmp_path, monkeypatch):
    for name in ("runs", "models", "experiments"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    configuration.load("ScalingStudy", ["experiments/demo.gin"])
    configuration.load("Run", TRAIN, NEEDED)


def test_a_file_beside_you_comes_before_one_of_m2ls_own(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "train.gin").write_text(
        "Run.settings = @Train()\nTrain.mixture = 'mine'\nTrain.steps = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert configuration.load("Run", TRAIN)[0].settings.mixture == "mine"


def test_nothing_of_one_load_is_left_for_the_next():
    configuration.load("Run", TRAIN, [*NEEDED, "LEARNING_RATE=0.5"])
    run, _ = configuration.load("Run", TRAIN, NEEDED)
    assert run.settings.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("size", "millions"),
    # As the models' authors and hubs give them.
    [("small", 77), ("base", 248), ("large", 783), ("xl", 2850), ("xxl", 11135)],
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(size, millions):
    run, _ = configuration.load("Run", [f"models/t5_1_1_{size}.gin", *TRAIN], NEEDED)
    specs = jax.tree.leaves(models.spec(run.model))
    total = sum(math.prod(spec.shape) for spec in specs)
    assert total / 1e6 == pytest.approx(millions, rel=2e-3)


def test_a_vocabulary_left_out_is_the_checkpoints_own():
    run, _ = configuration.load("Run", TRAIN, NEEDED)
    assert (run.vocabulary, run.model) == (None, None)
    run, _ = configuration.load("Run", TRAIN, [*NEEDED, "VOCABULARY=bytes"])
    assert run.vocabulary == "bytes"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import subprocess", "cannot import"),
        ("import touched", "cannot import"),
        ("from touched import function", "cannot import"),
        ("from __gin__ import dynamic_registration", "cannot import"),
        ("Run.vocabulary = @touched.function()", "'touched.function'"),
        ("Run.vocabulary = [1, {'a': (@scope/touched.function(),)}]", "'touched.function'"),
        ("Run.vocabulary = @foreign()", "'foreign'"),
        ("Run.vocabulary = @scope/other.foreign", "'other.foreign'"),
        ("Run.vocabulary = @gin.singleton()", "'gin.singleton'"),
        ("Run.vocabulary = %other.CONSTANT", "other.CONSTANT"),
        ("singleton.constructor = @T5", "'singleton'"),
        ("X/gin.macro.value = 1", "'gin.macro'"),
        ("foreign.value = 1", "'foreign'"),
        ("scope/other.foreign.value = 1", "'other.foreign'"),
        ("foreign:\n  value = 1", "'foreign'"),
        ("include 'http://host/x.gin'", "http:// is not supported"),
        ("include 's3:/bucket/x.gin'", "expected s3://BUCKET/PATH"),
    ],
)
@pytest.mark.parametrize("place", ["file", "included", "binding"])
def test_gin_imports_nothing_and_names_nothing_but_m2ls_own(
    line, expected, place, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "touched.py").write_text(
        f"from pathlib import Path\ndef function(): Path({str(tmp_path / 'mark')!r}).touch()\n"
        "function()\n"
    )
    monkeypatch.setattr(gin.config, "_REGISTRY", gin.config._REGISTRY.copy())
    called = []
    gin.external_configurable(lambda value=0: called.append(value), "foreign", module="other")
    gin.constant("other.CONSTANT", 1)
    inner, outer = tmp_path / "inner.gin", tmp_path / "outer.gin"
    inner.write_text(f"include 'runs/train.gin'\n{line}\n")
    outer.write_text(f"include '{inner}'\n")
    files, bindings = {
        "file": ([inner], []),
        "included": ([outer], []),
        # Behind a value that is not quoted.
        "binding": (["runs/train.gin"], [f"Run.vocabulary=[\n]\n{line}"]),
    }[place]
    try:
        with pytest.raises(M2LError) as refused:
            configuration.load("Run", list(map(str, files)), [*bindings, *NEEDED])
    finally:
        gin.clear_config(clear_constants=True)
    assert expected in str(refused.value) and "\n" not in str(refused.value)
    assert not called and not (tmp_path / "mark").exists()
