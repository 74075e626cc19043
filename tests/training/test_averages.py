"""The moving average that a run keeps, and the checkpoints that it keeps for averages."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import CheckpointError, Stopped
from m2l.merging import Recipe, merge
from m2l.merging.recipe import last_checkpoints
from m2l.training import state

from .conftest import SETTINGS
from .test_loop import at_step

AVERAGED = dataclasses.replace(
    SETTINGS,
    optimizer=dataclasses.replace(SETTINGS.optimizer, ema=0.5),
    validation="sentiment",
    evaluate_every=3,
    validation_batches=1,
    save_every=1,
    keep=1,
    keep_every=1,
)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flat(path):
    return checkpoints.flatten(checkpoints.restore(path))


@pytest.fixture(scope="module")
def averaged(train, tmp_path_factory):
    """A run with a moving average and all of its checkpoints."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    train(out, AVERAGED)
    return out


def test_the_average_is_that_of_the_parameters_after_every_step(averaged, tiny_config):
    steps = range(1, SETTINGS.steps + 1)
    assert names(averaged) == [str(step) for step in steps]
    first = state.init(tiny_config, SETTINGS.optimizer, jax.random.key(SETTINGS.seed)).params
    wanted = {n: np.asarray(a, np.float64) for n, a in checkpoints.flatten(first).items()}
    for step in steps:
        decay = min(0.5, (1 + step) / (10 + step))
        for name, array in flat(averaged / "checkpoints" / str(step)).items():
            wanted[name] = decay * wanted[name] + (1 - decay) * array
    average = flat(averaged / "average")
    assert average.keys() == wanted.keys()
    for name, array in average.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    newest = averaged / "checkpoints" / str(SETTINGS.steps)
    same = checkpoints.flatten(checkpoints.restore_average(newest))
    assert all(np.array_equal(array, same[name]) for name, array in average.items())
    parent = checkpoints.read_manifest(averaged / "average").parents[0]
    assert parent["digest"] == checkpoints.read_manifest(newest).digest


def test_the_average_is_evaluated_beside_and_changes_no_parameter(averaged, whole):
    lines = [json.loads(line) for line in (averaged / "metrics.jsonl").open()]
    scores = [line for line in lines if "validation_loss_of_average" in line]
    assert [line["step"] for line in scores] == [3, 6]
    assert all(line["validation_loss_of_average"] != line["validation_loss"] for line in scores)
    one, two = (checkpoints.read_manifest(path).parameters for path in (averaged, whole))
    assert one == two
    assert 'id="average"' in (averaged / "loss.svg").read_text()


def test_a_stopped_run_goes_on_with_its_average(averaged, train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped at step 3"):
            train(tmp_path / "run", AVERAGED)
    assert not (tmp_path / "run" / "average").exists()
    train(tmp_path / "run", AVERAGED)
    one, two = (checkpoints.read_manifest(out / "average") for out in (averaged, tmp_path / "run"))
    assert one.parameters == two.parameters


def test_checkpoints_of_every_so_many_steps_stay_and_are_averaged(train, tmp_path):
    settings = dataclasses.replace(SETTINGS, save_every=1, keep=1, keep_every=2)
    train(tmp_path / "run", settings)
    assert names(tmp_path / "run") == ["2", "4", "6"]
    saves = last_checkpoints(tmp_path / "run", 3)
    merged = merge(None, [*saves.values()], Recipe("average"), progress=False)
    wanted = [flat(path) for path in saves.values()]
    for name, array in checkpoints.flatten(merged).items():
        mean = np.mean([params[name] for params in wanted], axis=0)
        np.testing.assert_allclose(array, mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="it has no average; train with ema"):
        checkpoints.restore_average(tmp_path / "run")


def test_a_run_that_keeps_its_best_keeps_what_is_before_it(train, tmp_path):
    settings = dataclasses.replace(
        SETTINGS, validation="sentiment", evaluate_every=1, validation_batches=1, keep=1,
        minimum_improvement=1e9, keep_best=True, keep_every=1, save_every=1,
    )  # fmt: skip
    best = train(tmp_path / "run", settings)
    assert names(tmp_path / "run") == [best.name] == ["1"]
    assert checkpoints.resolve(tmp_path / "run") == best
