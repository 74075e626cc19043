"""Averages of a run's last checkpoints give the model that a decayed learning rate gives."""

import math

import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import CheckpointError, MergeError, UnknownNameError
from m2l.merging.recipe import DECAYS, decay_weights, last_checkpoints

from .conftest import write

STEPS = (10, 20, 30, 40)
SHARES = {
    "linear": [1.0, 0.75, 0.5, 0.25],
    "cosine": [(1 + math.cos(math.pi * j / 4)) / 2 for j in range(4)],
    "1-sqrt": [1 - math.sqrt(j / 4) for j in range(4)],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of plain gradient descent with four checkpoints, its updates, and one unfinished."""
    root, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    params = [rng.standard_normal((5, 3)).astype(np.float32)]
    for _ in STEPS[1:]:
        params.append(params[-1] + rng.standard_normal((5, 3)).astype(np.float32))
    for step, leaf in zip(STEPS, params, strict=True):
        write(root / "checkpoints" / str(step), {"leaf": leaf}, step=step)
    (root / "checkpoints" / "50").mkdir()
    return root, params


@pytest.mark.parametrize("decay", DECAYS)
def test_the_average_is_the_model_whose_updates_were_decayed(run, run_m2l, tmp_path, decay):
    root, params = run
    flags = ("--run", root, "--last", "4", "--decay", decay, "--out", tmp_path / "out")
    assert run_m2l("merge", *flags) == 0
    wanted = params[0].astype(np.float64)
    for share, before, after in zip(SHARES[decay][1:], params, params[1:], strict=False):
        wanted = wanted + share * (after.astype(np.float64) - before)
    merged = checkpoints.restore(tmp_path / "out")["leaf"]
    np.testing.assert_allclose(merged, wanted, rtol=1e-6, atol=1e-6)
    made_by = checkpoints.read_manifest(tmp_path / "out").made_by
    assert made_by["recipe"]["method"] == "average"


def test_without_a_decay_it_is_the_mean_of_the_last(run, run_m2l, tmp_path):
    root, params = run
    flags = ("--run", root / "checkpoints", "--last", "3", "--out", tmp_path / "out")
    assert run_m2l("merge", *flags) == 0
    merged = checkpoints.restore(tmp_path / "out")["leaf"]
    np.testing.assert_allclose(merged, np.mean(params[1:], axis=0), rtol=1e-6)


def test_weights_follow_the_steps_and_add_up():
    for decay in DECAYS:
        assert math.isclose(sum(decay_weights((5, 6, 11, 20), decay)), 1)
        assert decay_weights((7,), decay) == (1.0,)
    np.testing.assert_allclose(decay_weights(STEPS), [0.25] * 4)
    # The update from 0 to 30 counts a half, that from 30 to 40 a third.
    length = 40 * 3 / 2
    np.testing.assert_allclose(
        decay_weights((0, 30, 40)), [30 / length, 10 / length, 1 - 40 / length]
    )


def test_what_a_run_does_not_have_is_refused(run, run_m2l, tmp_path):
    root, _ = run
    with pytest.raises(MergeError, match="5 checkpoints are asked for, and 4 are there"):
        last_checkpoints(root, 5)
    with pytest.raises(CheckpointError, match="no training run"):
        last_checkpoints(tmp_path, 1)
    with pytest.raises(UnknownNameError, match="unknown decay 'sudden'"):
        decay_weights(STEPS, "sudden")
    out = ("--out", tmp_path / "out")
    assert run_m2l("merge", "--run", root, "--expert", root, *out) == 2
    assert run_m2l("merge", "--expert", root, "--method", "average", "--decay", "linear", *out) == 2
