"""`m2l statistics`, `m2l adamerging` and `m2l mask`, and everything they refuse."""

import fnmatch
import json
import shutil

import numpy as np
import pytest

from m2l import checkpoints, models


def statistics(road, out, kind="fisher", *further):
    return (
        *("statistics", "--checkpoint", road / "sentiment", "--mixture", "sentiment"),
        *("--kind", kind, "--examples", 3, "--batch_size", 2, "--input_length", 32),
        *("--target_length", 8, "--out", out, *further),
    )


@pytest.fixture(scope="module")
def gathered(road, run_m2l, tmp_path_factory):
    root = tmp_path_factory.mktemp("statistics")
    for kind in ("fisher", "gram"):
        assert run_m2l(*statistics(road, root / kind, kind)) == 0
    return root


def read(path):
    flat = checkpoints.flatten(checkpoints.restore(path))
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def test_a_fisher_is_a_checkpoint_like_its_expert_that_says_what_it_is(road, gathered):
    expert = checkpoints.read_manifest(road / "sentiment")
    manifest = checkpoints.verify(gathered / "fisher")
    assert manifest.parameters.keys() == expert.parameters.keys()
    for name, record in manifest.parameters.items():
        assert record["shape"] == expert.parameters[name]["shape"]
        assert record["dtype"] == "float32"
    made_by = manifest.made_by
    assert (made_by["kind"], made_by["statistic"]) == ("statistics", "fisher")
    assert (made_by["of"], made_by["examples"]) == (expert.digest, 3)
    assert made_by["settings"]["mixture"] == "sentiment"
    assert made_by["data"] == {"source": "microworld"}
    assert [parent["digest"] for parent in manifest.parents] == [expert.digest]
    assert manifest.vocabulary == expert.vocabulary
    values = read(gathered / "fisher").values()
    assert all((value >= 0).all() for value in values)
    assert sum(value.sum() for value in values) > 0


def test_grams_are_symmetric_and_named_as_their_kernels(road, gathered):
    expert = checkpoints.read_manifest(road / "sentiment")
    grams = read(gathered / "gram")
    kinds = {name.rsplit("/", 1)[-1] for name in grams}
    assert {"query", "key", "value", "out", "wi_0", "wi_1", "wo", "logits"} >= kinds
    for name, gram in grams.items():
        d_in = expert.parameters[name]["shape"][0]
        assert gram.shape == (d_in, d_in)
        np.testing.assert_allclose(gram, gram.T, rtol=1e-5, atol=1e-6)
        assert (np.diag(gram) >= 0).all()
    shapes = models.spec(models.from_dict(expert.model))
    kernels = {name for name in checkpoints.flatten(shapes) if name.split("/")[-1] in kinds}
    assert grams.keys() == kernels


def test_inspect_says_what_a_statistic_is_and_of_what(road, gathered, run_m2l, capsys):
    assert run_m2l("inspect", gathered / "fisher") == 0
    shown = capsys.readouterr().out
    assert "fisher of 3 examples" in shown and str(road / "sentiment") in shown


def test_the_same_command_again_finds_its_statistic(road, gathered, run_m2l, capsys):
    assert run_m2l(*statistics(road, gathered / "fisher")) == 0
    assert "already there" in capsys.readouterr().err
    assert run_m2l(*statistics(road, gathered / "fisher", "gram")) == 2


def test_the_same_command_gives_the_same_statistic(road, gathered, run_m2l, tmp_path):
    assert run_m2l(*statistics(road, tmp_path / "again")) == 0
    assert run_m2l(*statistics(road, tmp_path / "other", "fisher", "--seed", 1)) == 0
    digests = [
        checkpoints.read_manifest(path).digest
        for path in (gathered / "fisher", tmp_path / "again", tmp_path / "other")
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.fixture
def refused(run_m2l, capsys):
    """Runs the command, which must exit with 2 and one line; returns the line."""

    def run(*arguments):
        capsys.readouterr()
        assert run_m2l(*arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m2l:")]
        assert len(lines) == 1
        return lines[0]

    return run


def test_what_no_statistic_can_be_gathered_of_is_refused_in_one_line(
    road, gathered, refused, tmp_path
):
    given, out = statistics(road, tmp_path / "out"), tmp_path / "out"
    assert "'sentiment'" in refused(*given, "--mixture", "sentimant")
    assert "no split 'tran'" in refused(*given, "--split", "tran")
    assert "--examples" in refused(*given, "--examples", 0)
    assert "--kind" in refused(*given, "--kind", "hessian")
    assert "not a model" in refused(*given, "--checkpoint", gathered / "gram")
    assert "no such checkpoint" in refused(*given, "--checkpoint", tmp_path / "none")
    assert "made with vocabulary" in refused(*given, "--vocabulary", "bytes")
    assert "exists" in refused(*given, "--out", gathered / "gram")
    assert "--mixture" in refused(*given[:3], *given[5:])
    assert not out.exists()


EXPERTS = ("sentiment", "closed_book_qa")


def adamerging(road, out, *further):
    experts = [part for name in EXPERTS for part in ("--expert", road / name)]
    return (
        *("adamerging", "--base", road / "base", *experts, "--mixture", "imdb_good_or_bad"),
        *("--steps", 3, "--learning_rate", 0.05, "--max_examples", 4, "--batch_size", 4),
        *("--input_length", 32, "--target_length", 8, "--out", out, *further),
    )


def test_adamerging_writes_a_recipe_and_says_how_to_merge_with_it(road, run_m2l, capsys, tmp_path):
    out = tmp_path / "new" / "recipe.json"
    assert run_m2l(*adamerging(road, out)) == 0
    assert f"m2l merge --recipe {out} --base {road / 'base'} --expert" in capsys.readouterr().out
    record = json.loads(out.read_text())
    recipe, made_by = record["recipe"], record["made_by"]
    assert recipe["method"] == "task_arithmetic"
    for name in checkpoints.read_manifest(road / "base").parameters:
        [row] = [row for pattern, row in recipe["scales"] if fnmatch.fnmatchcase(name, pattern)]
        assert len(row) == 2 and all(0 <= value <= 1 for value in row)
    assert any(value != 0.3 for _, row in recipe["scales"] for value in row)
    entropies = made_by["entropies"]
    assert len(entropies) == 3 and entropies[-1] < entropies[0]
    wanted = [checkpoints.read_manifest(road / name).digest for name in EXPERTS]
    assert made_by["experts"] == wanted
    before = out.read_bytes()
    assert run_m2l(*adamerging(road, out)) == 0
    assert "already there" in capsys.readouterr().out
    assert out.read_bytes() == before
    assert run_m2l(*adamerging(road, out, "--steps", 2)) == 2


@pytest.mark.parametrize("loss", ["labels", "teacher"])
def test_adamerging_learns_from_labels_and_from_the_experts(road, run_m2l, capsys, tmp_path, loss):
    teacher = ("--teacher", f"imdb_good_or_bad={road / 'sentiment'}") * (loss == "teacher")
    command = adamerging(road, tmp_path / "recipe.json", "--loss", loss, *teacher)
    assert run_m2l(*command) == 0
    made_by = json.loads((tmp_path / "recipe.json").read_text())["made_by"]
    assert made_by["loss"] == loss and "entropies" not in made_by
    assert made_by.get("teachers") == ({"imdb_good_or_bad": 0} if teacher else None)
    assert len(made_by["losses"]) == 3 and made_by["losses"][-1] < made_by["losses"][0]
    assert run_m2l(*command) == 0
    assert "already there" in capsys.readouterr().out
    assert run_m2l(*adamerging(road, tmp_path / "recipe.json")) == 2


def test_what_cannot_be_learned_is_refused_in_one_line(road, gathered, refused, tmp_path):
    out = tmp_path / "recipe.json"
    given = adamerging(road, out)
    assert "'imdb" in refused(*given, "--mixture", "imdb_good_or_bed")
    assert "language_modeling" in refused(*given, "--mixture", "language_modeling")
    assert "statistics" in refused(*given, "--expert", gathered / "fisher")
    assert "initial" in refused(*given, "--initial", 2)
    assert "together" in refused(*given, "--loss", "teacher")
    expert = f"={road / 'sentiment'}"
    assert "together" in refused(*given, "--teacher", f"imdb_good_or_bad{expert}")
    taught = (*given, "--loss", "teacher", "--teacher")
    assert "with one of --expert" in refused(*taught, f"imdb_good_or_bad={road / 'base'}")
    assert "with one of --expert" in refused(*taught, "imdb_good_or_bad")
    assert "imdb_good_or_bad has 0 teachers" in refused(*taught, f"ag_news{expert}")
    twice = refused(*taught, f"imdb{expert}", "--teacher", f"imdb_good_or_bad{expert}")
    assert "imdb_good_or_bad has 2 teachers" in twice
    other = checkpoints.read_manifest(road / "base")
    checkpoints.save(
        tmp_path / "wider",
        {"w": np.zeros(2, np.float32)},
        model=other.model | {"d_ff": 48},
        vocabulary=other.vocabulary,
        made_by={"kind": "hand"},
    )
    assert "d_ff is 48 and not" in refused(*given, "--expert", tmp_path / "wider")
    assert "--steps" in refused(*given, "--steps", 0)
    assert "vocabulary" in refused(*given, "--vocabulary", "bytes")
    assert "--expert" in refused(*given[:3], *given[7:])
    assert not out.exists()
    shutil.copy(__file__, out)
    assert "exists" in refused(*given)


def mask(road, out, kind, *further):
    experts = EXPERTS if kind == "concrete" else EXPERTS[:1]
    flags = [part for name in experts for part in ("--expert", road / name)]
    rate = {"concrete": 0.3, "localize": 5.0}[kind]  # Of three steps.
    return (
        *("mask", kind, "--base", road / "base", *flags, "--mixture", "imdb_good_or_bad"),
        *("--steps", 3, "--learning_rate", rate, "--max_examples", 4, "--batch_size", 4),
        *("--input_length", 32, "--target_length", 8, "--out", out, *further),
    )


def test_a_localized_expert_has_its_own_entries_and_otherwise_the_bases(
    road, run_m2l, capsys, tmp_path
):
    out = tmp_path / "localized"
    command = mask(road, out, "localize", "--density", 0.2)
    assert run_m2l(*command) == 0
    said = capsys.readouterr().out
    assert "--method localize_and_stitch --density 1 --base" in said and "cross-entropy" in said
    manifest = checkpoints.verify(out)
    parents = [checkpoints.read_manifest(road / name) for name in ("base", "sentiment")]
    assert [parent["role"] for parent in manifest.parents] == ["base", "expert"]
    assert [parent["digest"] for parent in manifest.parents] == [each.digest for each in parents]
    assert manifest.model == parents[0].model and manifest.vocabulary == parents[0].vocabulary
    assert manifest.made_by["settings"]["density"] == 0.2
    assert len(manifest.made_by["losses"]) == 3
    base, expert, localized = (read(path) for path in (road / "base", road / "sentiment", out))
    changed = {name: leaf != base[name] for name, leaf in localized.items()}
    for name, leaf in localized.items():
        np.testing.assert_array_equal(leaf[changed[name]], expert[name][changed[name]])
    size = sum(leaf.size for leaf in base.values())
    assert sum(each.sum() for each in changed.values()) / size == manifest.made_by["share"] > 0
    assert run_m2l(*command) == 0
    assert "already there" in capsys.readouterr().err
    assert run_m2l(*command, "--l1", 2) == 2
    stitched = ("--method", "localize_and_stitch", "--density", 1, "--base", road / "base")
    further = ("--expert", out, "--expert", road / "closed_book_qa", "--out", tmp_path / "merge")
    assert run_m2l("merge", *stitched, *further) == 0


def test_a_concrete_merge_is_made_by_one_mask_and_its_coefficients(road, run_m2l, capsys, tmp_path):
    out = tmp_path / "new" / "concrete"
    adapted = ("--coefficients", "per_layer", "--coefficient_steps", 2, "--coefficient_rate", 0.05)
    command = mask(road, out, "concrete", *adapted)
    assert run_m2l(*command) == 0
    assert "entropy" in capsys.readouterr().out
    manifest = checkpoints.verify(out)
    assert [parent["role"] for parent in manifest.parents] == ["base", "expert", "expert"]
    settings, made_by = manifest.made_by["settings"], manifest.made_by
    assert settings["inner_learning_rate"] == 0.1 and settings["seed"] == 0
    assert len(made_by["losses"]) == 5
    base, merged, *experts = (
        read(path) for path in (road / "base", out, *(road / name for name in EXPERTS))
    )
    ratios = []
    for name, leaf in merged.items():
        [row] = [r for p, r in made_by["scales"].items() if fnmatch.fnmatchcase(name, p)]
        vector = sum(lam * (e[name] - base[name]) for lam, e in zip(row, experts, strict=True))
        difference = leaf - base[name]
        assert (difference[vector == 0] == 0).all()
        large = np.abs(vector) > 1e-3
        ratios.append(np.mean(difference[large] / vector[large]) if large.any() else 1.0)
    # A mask's mean is 1; that of its largest changes need not be so exactly.
    np.testing.assert_allclose(ratios, 1, atol=0.4)
    assert run_m2l(*command) == 0
    assert "already there" in capsys.readouterr().err


def test_what_no_mask_can_be_learned_of_is_refused_in_one_line(road, gathered, refused, tmp_path):
    out = tmp_path / "out"
    localize, concrete = (mask(road, out, kind) for kind in ("localize", "concrete"))
    inside = checkpoints.resolve(road / "base") / "out"
    for command in (localize, concrete):
        assert "'imdb" in refused(*command, "--mixture", "imdb_good_or_bed")
        assert "statistics" in refused(*command, "--expert", gathered / "fisher")
        assert "--steps" in refused(*command, "--steps", 0)
        assert "vocabulary" in refused(*command, "--vocabulary", "bytes")
        assert "is inside an input" in refused(*command, "--out", inside)
        assert "exists" in refused(*command, "--out", gathered / "gram")
        assert "--base is missing" in refused(*command[:2], *command[4:])
        assert "learning_rate above 0" in refused(*command, "--learning_rate", 0)
    assert "density" in refused(*localize, "--density", 20)
    assert "together" in refused(*concrete, "--loss", "teacher")
    assert "without effect" in refused(*concrete, "--coefficient_steps", 3)
    assert "0 to 1" in refused(*concrete, "--coefficients", "per_layer", "--scale", 2)
    assert "temperature above 0" in refused(*concrete, "--temperature", 0)
    assert not out.exists()
