import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from m2l import checkpoints, models, partitioning
from m2l.errors import CheckpointError, ConfigError, M2LError, Stopped
from m2l.training import feed, optimizers, state

from .conftest import SETTINGS


def figures(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines]


def at_step(monkeypatch, step, act):
    """Does something in the middle of a run, when the learning rate of `step` is asked for."""
    schedule = optimizers.schedule

    def interrupted(*args, **kwargs):
        rate = schedule(*args, **kwargs)
        return lambda at: (act() if at == step else None) or rate(at)

    monkeypatch.setattr(optimizers, "schedule", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(
    train, whole, tmp_path, monkeypatch, number
):
    out = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(number))
        with pytest.raises(Stopped, match="stopped at step 3 of 6"):
            train(out)
    assert signal.getsignal(number) is before
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["2", "3"]
    last = train(out)
    assert checkpoints.read_manifest(last).digest == checkpoints.read_manifest(whole).digest
    assert figures(out) == figures(whole.parents[1])


def test_a_run_records_what_it_cut_whether_or_not_it_was_stopped(train, tmp_path, monkeypatch):
    short = dataclasses.replace(SETTINGS, input_length=16, target_length=2)
    at_once, stopped = tmp_path / "at_once", tmp_path / "stopped"
    last = train(at_once, settings=short)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            train(stopped, settings=short)
    train(stopped, settings=short)
    position = json.loads(checkpoints.restore_data_state(last)[0].partition(b"\n")[2])
    record = json.loads((at_once / "finished.json").read_text())
    assert record == json.loads((stopped / "finished.json").read_text())
    assert record["examples"] == position["examples"] >= 6 * 4
    # Every input is longer than 16 tokens; answers are a word or a sentence, and the end.
    assert record["inputs_cut"] == record["examples"] > record["targets_cut"] > 0
    for run in (at_once, stopped):
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        names = ("examples", "inputs_cut", "targets_cut")
        assert [line[name] for name in names] == [record[name] for name in names]


def test_a_run_that_was_killed_goes_on_from_its_last_save_to_the_same_bits(
    train, whole, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, kill)
        with pytest.raises(Killed):
            train(out)
    assert [step for step, *_ in figures(out)][-1] >= 4
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    last = train(out)
    assert checkpoints.read_manifest(last).digest == checkpoints.read_manifest(whole).digest
    assert figures(out) == figures(whole.parents[1])


def test_a_finished_run_is_not_run_again(train, whole, monkeypatch):
    before = figures(whole.parents[1])
    monkeypatch.setattr(feed.pipeline, "training_batches", lambda *_, **__: pytest.fail("read"))
    assert train(whole.parents[1]) == whole
    assert figures(whole.parents[1]) == before


def test_a_folder_of_other_settings_is_refused(train, whole):
    with pytest.raises(ConfigError, match=r"its seed is 0, this one's is 1"):
        train(whole.parents[1], dataclasses.replace(SETTINGS, seed=1))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(train, whole, tmp_path):
    short = dataclasses.replace(SETTINGS, steps=2)
    digests = [
        checkpoints.read_manifest(train(tmp_path / str(i), settings)).digest
        for i, settings in enumerate((short, short, dataclasses.replace(short, seed=1)))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_all_runs_of_a_model_share_one_compilation(train, whole, tiny_config, tmp_path):
    mesh = partitioning.make_mesh()
    step = state.train_step(
        tiny_config, SETTINGS.optimizer, SETTINGS.execution, mesh, SETTINGS.objective
    )
    compiled = step._cache_size()
    other = dataclasses.replace(SETTINGS, mixture="closed_book_qa", learning_rate=0.2, steps=2)
    train(tmp_path / "other", dataclasses.replace(other, schedule="cosine"), init=whole)
    assert step._cache_size() == compiled


def test_an_expert_starts_from_its_base(train, whole, tmp_path):
    still = dataclasses.replace(SETTINGS, steps=1, learning_rate=1e-30)
    expert = train(tmp_path / "expert", still, init=whole)
    base, after = checkpoints.restore(whole), checkpoints.restore(expert)
    jax.tree.map(np.testing.assert_array_equal, base, after)


def test_what_is_refused_leaves_no_folder(train, tmp_path):
    for change, said in (
        ({"mixture": "sentimant"}, "'sentiment'"),
        ({"fsdp": 2}, "multiply to the number of devices"),
        ({"model": 3}, "multiply to the number of devices"),
    ):
        with pytest.raises(M2LError, match=said):
            train(tmp_path / "run", dataclasses.replace(SETTINGS, **change))
        assert not (tmp_path / "run").exists()


def test_a_base_of_another_model_is_refused(train, whole, tiny_config, tmp_path):
    other = dataclasses.replace(tiny_config, d_ff=48)
    with pytest.raises(CheckpointError, match="d_ff is 32, the configured model's is 48"):
        train(tmp_path / "run", config=other, init=whole)
    assert not (tmp_path / "run").exists()


def test_a_base_and_an_adapter_are_no_start(train, whole, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not from a base and an adapter: make one of them"):
        train(tmp_path / "run", init=f"{whole}+{tmp_path / 'adapter'}")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(train, tmp_path):
    wild = dataclasses.replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(M2LError, match=r"step [2-6]: the loss is"):
        train(tmp_path / "run", wild)
    for saved in (tmp_path / "run" / "checkpoints").glob("step_*"):
        jax.tree.map(
            lambda leaf: np.testing.assert_(np.isfinite(leaf).all()), checkpoints.restore(saved)
        )


def test_training_learns(train, tmp_path):
    long = dataclasses.replace(
        SETTINGS, steps=60, batch_size=16, save_every=60, execution=models.Execution()
    )
    train(tmp_path / "run", long)
    losses = [loss for _, loss, _ in figures(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_old_checkpoints_go_and_as_many_as_asked_stay(train, tmp_path):
    last = train(tmp_path / "run", dataclasses.replace(SETTINGS, save_every=1, keep=3))
    names = sorted(path.name for path in last.parent.iterdir())
    assert names == ["4", "5", "6"]


EIGHT_DEVICES = """
import json, sys
import jax, numpy as np
from m2l import models, partitioning
from m2l.models import T5Config
from m2l.training import state
from m2l.training.optimizers import Optimizer

config = T5Config(**json.loads(sys.argv[1]))
batch = {name: np.array(value, np.int32) for name, value in json.load(sys.stdin).items()}
mesh = partitioning.make_mesh(data=2, fsdp=2, model=2)
placed = state.shardings(config, Optimizer(), mesh)
make = jax.jit(
    lambda: state.init(config, Optimizer(), jax.random.key(0)), out_shardings=placed
)
current = make()
with jax.set_mesh(mesh):
    step = state.train_step(config, Optimizer(), models.Execution(), mesh)
    for _ in range(3):
        current, metrics = step(current, batch, np.float32(0.1), jax.random.key(1))
print(json.dumps([jax.device_count(), float(metrics["loss"])]))
"""


def test_eight_devices_compute_what_one_does(forge, tiny_config):
    config = tiny_config
    rng = np.random.default_rng(0)
    batch = {
        "encoder_input_tokens": rng.integers(2, 1000, (8, 12)),
        "decoder_input_tokens": rng.integers(2, 1000, (8, 6)),
        "decoder_target_tokens": rng.integers(2, 1000, (8, 6)),
        "decoder_loss_weights": np.ones((8, 6), int),
    }
    arguments = json.dumps(dataclasses.asdict(config))
    given = json.dumps({name: value.tolist() for name, value in batch.items()})
    (said,) = forge((EIGHT_DEVICES, arguments), devices=8, stdin=given)
    devices, loss = json.loads(said)
    assert devices == 8

    current = state.from_params(optimizers.Optimizer(), models.init(config, jax.random.key(0)))
    mesh = partitioning.make_mesh()
    step = state.train_step(config, optimizers.Optimizer(), models.Execution(), mesh)
    batch = {name: value.astype(np.int32) for name, value in batch.items()}
    with jax.set_mesh(mesh):
        for _ in range(3):
            current, metrics = step(current, batch, np.float32(0.1), jax.random.key(1))
    # Sums over devices are taken in another order.
    assert loss == pytest.approx(float(metrics["loss"]), rel=1e-5)
