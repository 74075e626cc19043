"""Experts that are merged while they are trained."""

import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest

from m2l import checkpoints, files, models, tasks
from m2l.data import vocabularies
from m2l.errors import ConfigError, M2LError, MergeError, UnknownNameError
from m2l.merging import Recipe
from m2l.studies import rounds
from m2l.studies.rounds import Rounds
from m2l.training import loop
from m2l.training.settings import TrainSettings

# Compiles in no time.
CONFIG = models.LlamaConfig(1152, 16, 32, 1, 2, 1, 8)
TRAIN = TrainSettings(
    mixture="set by each", steps=2, batch_size=8, learning_rate=0.05, save_every=100, log_every=1
)
EXPERTS = {"one": "sentiment", "two": "closed_book_qa"}
AVERAGE = Rounds(EXPERTS, TRAIN, Recipe("average"), every=2)
DILOCO = dataclasses.replace(
    AVERAGE,
    train=dataclasses.replace(TRAIN, steps=6, validation="theirs", validation_batches=1),
    learning_rate=0.7,
    momentum=0.9,
    keep=3,
)


@pytest.fixture(scope="module")
def described():
    return vocabularies.describe(vocabularies.load("microworld"), "microworld")


@pytest.fixture(scope="module")
def init(described, tmp_path_factory):
    out = tmp_path_factory.mktemp("init") / "model"
    described = {"model": models.to_dict(CONFIG), "vocabulary": described}
    params = models.init(CONFIG, jax.random.key(0))
    checkpoints.save(out, params, **described, made_by={"kind": "save"})
    return out


def digest(path):
    return checkpoints.read_manifest(path).digest


def arrays(path):
    leaves = checkpoints.flatten(checkpoints.restore(checkpoints.resolve(path)))
    return {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}


def mean(models_):
    return {name: np.mean([each[name] for each in models_], axis=0) for name in models_[0]}


def test_a_round_of_averages_is_the_average_of_experts_trained_apart(init, described, tmp_path):
    tasks.declare()
    apart = {
        name: loop.train(
            tmp_path / name,
            config=CONFIG,
            vocabulary=described,
            settings=dataclasses.replace(TRAIN, mixture=mixture, seed=seed),
            data={"source": "microworld"},
            init=init,
        )
        for seed, (name, mixture) in enumerate(EXPERTS.items())
    }
    result = rounds.run(AVERAGE, init, tmp_path / "job")
    for name, checkpoint in apart.items():
        assert digest(tmp_path / f"job/rounds/0001/experts/{name}") == digest(checkpoint)
    merged = {name: leaf.astype(np.float32) for name, leaf in arrays(result.model).items()}
    pairs = [arrays(checkpoint) for checkpoint in apart.values()]
    for name, leaf in mean(pairs).items():  # Of two float32 the mean in float64 is exact.
        np.testing.assert_array_equal(merged[name], leaf.astype(np.float32), err_msg=name)
    assert result.rounds == {"one": 1, "two": 1}


@pytest.fixture(scope="module")
def diloco(init, tmp_path_factory):
    out = tmp_path_factory.mktemp("diloco") / "job"
    return out, rounds.run(DILOCO, init, out)


def test_the_outer_step_is_sgd_with_nesterov_momentum(init, diloco):
    out, result = diloco
    theta, velocity = arrays(init), 0.0
    for number in (1, 2, 3):
        folder = out / f"rounds/{number:04}"
        experts = mean([arrays(folder / "experts" / name) for name in EXPERTS])
        model = arrays(folder / "merge/model")
        gradient = {name: theta[name] - experts[name] for name in theta}
        velocity = {n: 0.9 * (velocity[n] if velocity else 0) + gradient[n] for n in theta}
        for name, leaf in model.items():
            step = theta[name] - 0.7 * (gradient[name] + 0.9 * velocity[name])
            # A few roundings of float32, of numbers around 1.
            np.testing.assert_allclose(leaf, step, rtol=0, atol=2e-6, err_msg=name)
        assert max(np.abs(model[name] - experts[name]).max() for name in model) > 1e-3
        theta = model
    assert result.model == out / "rounds/0003/merge/model"


def test_steps_and_data_of_an_expert_go_on_with_each_round(diloco):
    out, _ = diloco
    runs = [out / f"rounds/{number:04}/experts/one" for number in (1, 2, 3)]
    lines = [json.loads(line) for run in runs for line in (run / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    seen = [json.loads((run / "finished.json").read_text())["examples"] for run in runs]
    assert 0 < seen[0] < seen[1] < seen[2]
    parents = checkpoints.read_manifest(runs[1]).parents
    digests = digest(out / "rounds/0001/merge/model"), digest(runs[0])
    assert [(each["role"], each["digest"]) for each in parents] == [
        ("init", digests[0]),
        ("previous", digests[1]),
    ]


PROGRAM = """
import pickle, sys
from pathlib import Path
import jax
from m2l.studies import rounds

settings, init = pickle.loads(Path(sys.argv[1]).read_bytes())
assert jax.device_count() == 8 * settings.submeshes
rounds.run(settings, init, Path(sys.argv[2]))
"""


def test_one_host_that_was_killed_two_and_two_submeshes_make_the_same_bits(forge, init, tmp_path):
    arguments = tmp_path / "arguments"
    train = dataclasses.replace(DILOCO.train, steps=2)
    settings = dataclasses.replace(DILOCO, train=train, every=1, keep=1)
    arguments.write_bytes(pickle.dumps((settings, init)))
    # The first merge of the second round is written, and not yet under its name.
    dies = r"^os\.rename \S+ \S+/rounds/0002/merge/merged "
    forge((PROGRAM, arguments, tmp_path / "one"), devices=8, dies=dies)
    assert (tmp_path / "one/rounds/0002/experts/two/finished.json").exists()
    assert not (tmp_path / "one/rounds/0002/merge/merged").exists()
    jobs = [tmp_path / name for name in ("one", "two", "two")]
    forge(*((PROGRAM, arguments, job) for job in jobs), devices=8)
    arguments.write_bytes(pickle.dumps((dataclasses.replace(settings, submeshes=2), init)))
    jobs[2] = tmp_path / "submeshes"
    forge((PROGRAM, arguments, jobs[2]), devices=16)
    for path in ("0001/merge/model", "0002/experts/one", "0002/experts/two", "0002/merge/model"):
        assert len({digest(job / "rounds" / path) for job in jobs}) == 1
    losses = [
        [file.read_bytes() for file in sorted(job.glob("rounds/*/validation/*/validation.json"))]
        for job in jobs
    ]
    assert losses[0] == losses[1] == losses[2]
    assert len(losses[0]) == 4


def test_an_expert_that_no_longer_improves_stops_and_its_last_parameters_stay(
    init, tmp_path, monkeypatch
):
    def validate(stage, out, inputs):
        number = int(stage.name.split("/")[1])
        out.mkdir(parents=True)
        loss = 1.0 if stage.name.endswith("one") else 1.0 / number
        files.write_record(out / "validation.json", {"loss": loss})

    monkeypatch.setattr(rounds, "RUNNERS", {**rounds.RUNNERS, "evaluate": validate})
    train = dataclasses.replace(DILOCO.train, patience=1, validation_batches=1)
    settings = Rounds(EXPERTS, train, Recipe("average"), every=2, keep=1)
    result = rounds.run(settings, init, tmp_path)
    assert result.rounds == {"one": 2, "two": 3}
    assert result.losses == {"one": [1.0] * 3, "two": [1.0, 1 / 2, 1 / 3]}
    newest = [tmp_path / "rounds" / path for path in ("0002/experts/one", "0003/experts/two")]
    merged = arrays(result.model)
    for name, leaf in mean([arrays(run) for run in newest]).items():
        np.testing.assert_array_equal(merged[name], leaf.astype(np.float32), err_msg=name)
    # Of older rounds the models stay, and the records; and nothing is done again.
    left = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("**/checkpoints")}
    assert left == {"rounds/0002/experts/one", "rounds/0003/experts/two"}
    models_ = sorted(tmp_path.glob("rounds/*/merge/*"))
    assert models_ == [tmp_path / f"rounds/000{number}/merge/model" for number in (1, 2, 3)]
    monkeypatch.setattr(rounds, "RUNNERS", {})
    assert rounds.run(settings, init, tmp_path) == result


def test_a_job_ends_when_every_expert_has_stopped(init, tmp_path, run_m2l, capfd):
    settings = ["steps=4", "batch_size=8", "minimum_improvement=1e9", "patience=1", "save_every=9"]
    arguments = [
        *("rounds", "--gin_file", "experiments/rounds.gin", "--init", init, "--out", tmp_path),
        *("--gin.Rounds.every=1", "--gin.Rounds.reset_optimizer=True"),
        f"--gin.Rounds.experts={EXPERTS}",
        *("--gin.Merge.method=ties", "--gin.Merge.density=0.5", "--gin.Merge.scale=1.0"),
        *(f"--gin.Train.{setting}" for setting in settings),
    ]
    assert run_m2l(*arguments) == 0
    said = capfd.readouterr().out
    # The first validation is the best so far, the second one no better.
    assert f"checkpoint: {tmp_path / 'rounds/0002/merge/model'}" in said
    assert "of round" in said
    assert not (tmp_path / "rounds/0003").exists()
    assert run_m2l(*arguments, "--gin.Rounds.every=2") == 2
    assert "holds another job: its every is 1, this one's is 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"experts": {"one": "sentiment"}}, ConfigError, "two experts or more"),
        ({"experts": ["sentiment", "closed_book_qa"]}, ConfigError, "expected {NAME: MIXTURE}"),
        ({"experts": {"..": "sentiment", "b": "sentiment"}}, ConfigError, "'..' cannot be"),
        ({"every": 0}, ConfigError, "Rounds.every: expected a positive integer, found 0"),
        ({"learning_rate": 0}, ConfigError, "Rounds.learning_rate: expected more than 0"),
        ({"momentum": 1.0}, ConfigError, "Rounds.momentum: expected less than 1"),
        ({"merge": "average"}, ConfigError, "Rounds.merge: expected Recipe"),
        ({"merge": Recipe("linear")}, MergeError, "linear merges 1 expert, not 2"),
        ({"merge": Recipe("fisher")}, MergeError, "fisher"),
        ({"train": dataclasses.replace(TRAIN, lora="r=2")}, ConfigError, "lora and ema"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_trained(changes, error, said):
    with pytest.raises(error) as refused:
        dataclasses.replace(AVERAGE, **changes)
    assert said in str(refused.value)


def test_unknown_names_are_refused_and_nothing_is_written(init, tmp_path, run_m2l, capfd):
    unknown = dataclasses.replace(AVERAGE, experts={"a": "sentiment", "b": "sentimant"})
    with pytest.raises(UnknownNameError, match="'sentimant'"):
        rounds.run(unknown, init, tmp_path / "job")
    job = ["--gin_file", "experiments/rounds.gin", "--init", init, "--out", tmp_path / "job"]
    assert run_m2l("rounds", *job, "--gin.Merge.method=avrage") == 2
    assert "'avrage'" in capfd.readouterr().err
    with pytest.raises(M2LError, match="there is no such checkpoint"):
        rounds.run(AVERAGE, tmp_path / "nowhere", tmp_path / "job")
    divided = dataclasses.replace(AVERAGE, submeshes=jax.local_device_count() + 1)
    with pytest.raises(ConfigError, match="submeshes: expected a divisor of the number of devices"):
        rounds.run(divided, init, tmp_path / "job")
    assert not (tmp_path / "job").exists()
