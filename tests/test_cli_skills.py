"""`m2l skills`: from three files and two checkpoints to a merged one, and everything it refuses."""

import json

import jax
import numpy as np
import pytest

from m2l import checkpoints, merging
from m2l.errors import Stopped
from m2l.evaluation.bootstrap import Difference
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.results import read_examples
from m2l.merging import Recipe
from m2l.reporting import adding_skills_report
from m2l.studies.adding_skills import AddedSkill, Choice, CurvePoint, Tolerance

MIXTURE = "ag_news_section+ag_news_topic"
WORDS = ("cat", "dog", "owl", "fox", "hen", "cow", "pig", "bee", "ant", "elk", "eel", "emu")


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A skill of 24 + 12 questions with choices, one of which is to be kept, and free text."""
    root = tmp_path_factory.mktemp("data")
    asked = [
        {"inputs": f"{a} or {b}?", "targets": a, "answer_choices": [a, b]}
        for a in WORDS
        for b in WORDS[:4]
        if a != b
    ]
    write(root / "train.jsonl", asked[:24])
    write(root / "valid.jsonl", asked[24:36])
    write(root / "facts.jsonl", asked[32:44])
    write(root / "few.jsonl", asked[:4])
    return root


def command(road, data, out, *further):
    return (
        *("skills", "--general", road / "sentiment", "--base", road / "base"),
        *("--jsonl", f"train={data / 'train.jsonl'},validation={data / 'valid.jsonl'}"),
        *("--keep", data / "facts.jsonl", "--weights", "0.5,1", "--steps", 3),
        *("--gin.BATCH_SIZE=4", "--gin.LEARNING_RATE=0.05", "--input_length", 24),
        *("--target_length", 8, "--eval_batch_size", 4, "--out", out, *further),
    )


@pytest.fixture(scope="module")
def added(road, data, run_m2l, tmp_path_factory):
    out = tmp_path_factory.mktemp("added") / "out"
    assert run_m2l(*command(road, data, out, "--general_examples", 96)) == 0
    return out


def read(path):
    return json.loads(path.read_text())


def flat(path):
    return checkpoints.flatten(checkpoints.restore(path))


def test_the_merged_checkpoint_is_that_of_the_chosen_weight(road, added):
    curve = read(added / "curve.json")
    chosen = curve["chosen"]
    assert chosen in (0.5, 1.0)
    recipe = Recipe(method="task_arithmetic", weights=(1.0, chosen))
    manifest = checkpoints.verify(added / "merged")
    assert manifest.made_by["recipe"] == recipe.to_dict()
    experts = [road / "sentiment", added / "skill"]
    trees = [checkpoints.restore(checkpoints.resolve(path)) for path in experts]
    base = checkpoints.restore(checkpoints.resolve(road / "base"))
    wanted = checkpoints.flatten(merging.merge_params(base, trees, recipe))
    for name, leaf in flat(added / "merged").items():
        np.testing.assert_array_equal(leaf, wanted[name])


def test_the_curve_has_every_weight_the_heuristics_too_with_intervals(added):
    curve = read(added / "curve.json")
    # |D| / |G| = 24 / 96.
    assert [point["weight"] for point in curve["points"]] == [0.25, 0.5, 1.0]
    assert curve["heuristic"] == 0.25
    for point in (curve["general"], curve["alone"], *curve["points"]):
        for part in ("skill", "kept"):
            low, high = point[part]["interval"]
            assert low <= point[part]["score"] <= high
    assert curve["least"] == pytest.approx(0.98 * curve["general"]["kept"]["score"])
    for kind in ("png", "svg"):
        assert (added / f"curve.{kind}").stat().st_size > 1000


def test_the_table_compares_before_and_after_by_examples_that_w_was_not_chosen_by(added):
    table = read(added / "table.json")
    assert [(row["part"], row["task"]) for row in table["rows"]] == [
        ("skill", "skill"),
        ("kept", "facts"),
    ]
    for row in table["rows"]:
        assert row["examples"] == 6
        assert row["change"] == pytest.approx(row["merged"] - row["general"])
        assert row["low"] <= row["change"] <= row["high"]
    assert table["answer"] in (added / "table.md").read_text()
    assert (added / "table.csv").read_text().count("\n") == 3
    inputs = []
    for half in ("choosing/general/skill__choosing", "judging/general/skill"):
        _, name = half.rsplit("/", 1)
        folder = (added / "results" / half).parent
        inputs.append({line["inputs"] for line in read_examples(folder, name)})
    assert len(inputs[0] | inputs[1]) == 12


def test_costs_are_of_the_training_that_was_done(added):
    costs = read(added / "costs.json")
    assert costs["training"]["steps"] == 3 and costs["training"]["examples"] == 24
    assert costs["training"]["positions"] == 3 * 4 * (96 + 32)
    assert costs["training"]["flops"] > 0
    # The general model, the skill's own, and three merges.
    assert costs["choosing"]["models"] == 5
    assert all(costs[name]["seconds"] >= 0 for name in ("choosing", "merging", "judging"))


def test_the_same_command_again_trains_and_scores_nothing(
    road, data, added, run_m2l, monkeypatch, capsys
):
    def never(*args, **kwargs):
        raise AssertionError("it is there already")

    before = {path: path.read_bytes() for path in added.glob("*.json")}
    del before[added / "seconds.json"]
    monkeypatch.setattr("m2l.training.state.train_step", lambda *args: never)
    monkeypatch.setattr("m2l.evaluation.evaluator.Evaluator.run", never)
    monkeypatch.setattr("m2l.merging.merge", never)
    assert run_m2l(*command(road, data, added, "--general_examples", 96)) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert read(added / "table.json")["answer"] in capsys.readouterr().out


def test_what_a_kill_left_is_taken_up(road, data, added, run_m2l, monkeypatch, tmp_path):
    """Killed while w is chosen: then nothing is trained again, and the end is the same."""
    out = tmp_path / "out"
    again = command(road, data, out, "--general_examples", 96)
    asked = []

    whole = Evaluator.run

    def killed(self, params, out, **how):
        asked.append(out.name)
        if len(asked) == 4:
            raise Stopped("stopped")
        return whole(self, params, out, **how)

    monkeypatch.setattr(Evaluator, "run", killed)
    assert run_m2l(*again) == 143
    assert asked == ["general", "alone", "w_0.25", "w_0.5"]
    monkeypatch.setattr("m2l.training.state.train_step", lambda *args: None)
    assert run_m2l(*again) == 0
    assert asked[4:7] == ["w_0.5", "w_1.0", "general"]
    assert read(out / "curve.json") == read(added / "curve.json")
    jax.tree.map(np.testing.assert_array_equal, flat(out / "merged"), flat(added / "merged"))


def test_a_given_skill_and_a_mixture_to_keep_without_a_base(road, run_m2l, tmp_path, capsys):
    out = tmp_path / "out"
    code = run_m2l(
        *("skills", "--general", road / "sentiment", "--skill", road / "closed_book_qa"),
        *("--mixture", MIXTURE, "--keep", "imdb_good_or_bad", "--weights", "0.5:1:0.5"),
        *("--tolerance", "100%", "--max_examples", 12, "--input_length", 24),
        *("--target_length", 8, "--eval_batch_size", 8, "--out", out),
    )
    assert code == 0
    assert "the skill's model was there already" in capsys.readouterr().out
    assert not (out / "skill").exists()
    curve = read(out / "curve.json")
    assert curve["method"] == "wise_ft" and curve["within"]
    recipe = checkpoints.read_manifest(out / "merged").made_by["recipe"]
    assert recipe["method"] == "average"
    assert recipe["weights"] == [1 - curve["chosen"], curve["chosen"]]
    rows = read(out / "table.json")["rows"]
    assert rows[-1]["task"] == "imdb_good_or_bad"
    skill = [row for row in rows if row["part"] == "skill"]
    assert len(skill) == 3 and skill[-1]["task"] == f"mean of {len(skill) - 1} tasks"
    mean = np.mean([row["merged"] for row in skill[:-1]])
    assert skill[-1]["merged"] == pytest.approx(mean)


def test_what_cannot_be_added_is_refused_in_one_line(road, data, added, run_m2l, capsys, tmp_path):
    out = tmp_path / "out"

    def refused(*further):
        capsys.readouterr()
        assert run_m2l(*command(road, data, out, *further)) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m2l:")]
        assert len(lines) == 1
        return lines[0]

    few, facts = data / "few.jsonl", data / "facts.jsonl"
    assert "4 examples" in refused("--keep", few)
    assert "'imdb" in refused("--keep", "imdb_good_or_bed")
    assert "none.jsonl" in refused("--keep", data / "none.jsonl")
    assert "a name of its own" in refused("--keep", facts)
    assert "train=FILE" in refused("--jsonl", f"validation={facts}")
    assert "validation=FILE" in refused("--jsonl", f"train={facts}")
    assert "leave --mixture" in refused("--mixture", MIXTURE)
    assert "--tolerance" in refused("--tolerance", "two")
    assert "weights" in refused("--weights", "0.5,1.5")
    assert "FIRST:LAST:STEP" in refused("--weights", "0.5:1")
    assert "density" in refused("--method", "ties", "--density", 1)
    assert "--method" in refused("--method", "slerp")
    assert "--epochs" in refused("--epochs", 2)
    assert "--skill" in refused("--skill", road / "closed_book_qa")
    assert "nearest" in refused("--gin.Train.learning_rat=1")
    assert "--general's" in refused("--gin_file", "models/t5_1m.gin", "--gin.Run.model=%MODEL")
    assert "vocabulary" in refused("--vocabulary", "bytes")
    assert "no such checkpoint" in refused("--base", tmp_path / "none")
    assert "both to be learned and to be kept" in refused_mixture(road, run_m2l, capsys, out)
    model = checkpoints.read_manifest(road / "base")
    checkpoints.save(
        tmp_path / "other",
        {"w": np.zeros(2, np.float32)},
        model=model.model | {"d_ff": 48},
        vocabulary=model.vocabulary,
        made_by={"kind": "hand"},
    )
    assert "d_ff is 48 and not 32" in refused("--base", tmp_path / "other")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert "m2l convert" in refused("--general", tmp_path / "hf")
    assert not out.exists()
    assert "holds another addition" in refused("--out", added)
    assert "is not empty" in refused("--out", road)


def refused_mixture(road, run_m2l, capsys, out):
    capsys.readouterr()
    arguments = ("skills", "--general", road / "sentiment", "--mixture", MIXTURE, "--keep", MIXTURE)
    assert run_m2l(*arguments, "--steps", 1, "--max_examples", 12, "--out", out) == 2
    return capsys.readouterr().err


# --- the answer ---


@pytest.fixture
def answered(monkeypatch):
    """The answer where the skill and what is kept go (before, after, low, high)."""

    def answered(within, skill, kept, tolerance="2%", training=True):
        def row(part, before, after, low, high):
            change = Difference(after - before, low, high, 0.5)
            return adding_skills_report.TaskChange(
                part, part, "accuracy", 9, before, 50.0, None, after, change
            )

        costs = {name: {"seconds": 30.0} for name in ("choosing", "merging", "judging")}
        if training:
            of = {"steps": 1200, "positions": 10_000, "flops": 2.5e12, "seconds": 600.0}
            costs["training"] = of
        rows = [row("skill", *skill), row("kept", *kept)]
        monkeypatch.setattr(adding_skills_report, "rows", lambda added: rows)
        added = AddedSkill(None, Choice(CurvePoint(0.3, 0, 0), within), None, {}, {}, {}, costs)
        return adding_skills_report.answer(added, Tolerance.parse(tolerance))

    return answered


def test_the_answer_is_yes_no_or_doubtful(answered):
    gain, same = (50.0, 80.0, 20.0, 40.0), (60.0, 59.5, -2.0, 1.0)
    yes = answered(True, gain, same)
    assert yes == (
        "Yes, within the 2 % allowed: at w = 0.3 the skill goes from 50.0 % to 80.0 % (+30.0 "
        "points, 95 %: +20.0 to +40.0), and what is to be kept from 60.0 % to 59.5 % (-0.5 points, "
        "95 %: -2.0 to +1.0). It cost 1,200 steps of training (10,000 positions, 2.5e+12 FLOPs, "
        "10.0 minutes) and 60 s of choosing w and merging."
    )
    assert answered(False, gain, same).startswith("Not within the 2 % allowed")
    assert "cannot tell the gain" in answered(True, (50.0, 52.0, -1.0, 5.0), same)
    # 60 % less 2 % of it is 58.8 %; less 2 points 58 %.
    lost = (60.0, 58.5, -3.0, 0.0)
    assert answered(True, gain, lost).startswith("Doubtful")
    assert answered(True, gain, lost, "2").startswith("Yes, within the 2 points allowed")
    assert "there already" in answered(True, gain, same, training=False)
