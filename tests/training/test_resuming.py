"""What a run survives: kills, damage, a full disk, a second trainer; and when it stops."""

import dataclasses
import json
import pickle
import re
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import checkpoints
from m2l.checkpoints import publishing
from m2l.errors import CheckpointError, ConfigError, M2LError, Stopped
from m2l.locks import Lock
from m2l.training.loop import RunPart

from .conftest import SETTINGS
from .test_loop import at_step

VALIDATED = dataclasses.replace(
    SETTINGS, validation="sentiment", evaluate_every=1, validation_batches=1
)
# Nothing improves by so much, so the first evaluation stays the best.
NEVER_BETTER = dataclasses.replace(VALIDATED, minimum_improvement=1e9)


def digest(path):
    return checkpoints.read_manifest(path).digest


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def damage(checkpoint):
    files = [file for file in (checkpoint / "params").rglob("*") if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def unfinished(whole, tmp_path):
    """A copy of the whole run, as it was before it was recorded to be finished."""
    out = shutil.copytree(whole.parents[1], tmp_path / "run")
    (out / "finished.json").unlink()
    return out


PROGRAM = """
import pickle, sys
from pathlib import Path
from m2l import tasks
from m2l.training import loop

tasks.register()
out = Path(sys.argv[1])
loop.train(out / "run", **pickle.loads((out / "arguments").read_bytes()))
"""


def test_kills_around_saves_end_in_the_same_bits(forge, train, whole, tmp_path):
    out = tmp_path / "run"
    arguments = train.arguments | {"settings": SETTINGS}
    (tmp_path / "arguments").write_bytes(pickle.dumps(arguments))
    for dies, left in (
        # Written, but not yet under its name; the same of the next; where the oldest is removed.
        (r"^os\.rename \S+ \S+/checkpoints/2 ", []),
        (r"^os\.rename \S+ \S+/checkpoints/4 ", ["2"]),
        (r"^shutil\.rmtree \S+/checkpoints/2 ", ["2", "4", "6"]),
    ):
        forge((PROGRAM, tmp_path), devices=1, dies=dies)
        assert [name for name in names(out) if name.isdigit()] == left
    assert digest(train(out)) == digest(whole)
    assert names(out) == names(whole.parents[1]) == ["4", "6"]
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, (run / "metrics.jsonl").open())]
        for run in (out, whole.parents[1])
    ]
    assert losses[0] == losses[1]


def test_parts_whose_parameters_are_not_exchanged_end_in_the_same_bits(train, whole, tmp_path):
    first = train(tmp_path / "first", part=RunPart(2))
    assert first.name == "2"
    assert digest(first) != digest(whole)
    again = {"init": first, "part": RunPart(6, tmp_path / "first")}
    assert digest(train(tmp_path / "second", **again)) == digest(whole)
    reset = dataclasses.replace(again["part"], reset_optimizer=True)
    last = train(tmp_path / "reset", **(again | {"part": reset}))
    assert digest(last) != digest(whole)
    with pytest.raises(ConfigError, match="holds another run: its part is"):
        train(tmp_path / "second", **(again | {"part": reset}))


def test_a_damaged_newest_checkpoint_is_left_for_the_one_before(train, whole, unfinished, capsys):
    newest = unfinished / "checkpoints" / whole.name
    damage(newest)
    last = train(unfinished)
    assert digest(last) == digest(whole)
    checkpoints.verify(last)
    said = capsys.readouterr().err
    assert f"{newest}" in said
    assert "damaged" in said
    assert "going on from the one before" in said
    assert "6.damaged" in names(unfinished)


def test_a_truncated_manifest_counts_as_damage(train, whole, unfinished):
    manifest = unfinished / "checkpoints" / whole.name / "_CHECKPOINT_METADATA"
    manifest.write_text(manifest.read_text()[:100])
    assert digest(train(unfinished)) == digest(whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(train, unfinished):
    for checkpoint in (unfinished / "checkpoints").iterdir():
        damage(checkpoint)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        train(unfinished)


def test_a_second_trainer_of_a_folder_is_refused(train, unfinished):
    before = names(unfinished)
    with Lock(unfinished / ".run.json.lock") as lock:
        assert lock.acquire()
        with pytest.raises(ConfigError, match=r"locked by another trainer \(process \d+ of \S+\)"):
            train(unfinished)
    assert names(unfinished) == before
    train(unfinished)


def test_a_full_disk_stops_the_run_and_the_last_save_stays(train, whole, tmp_path, monkeypatch):
    out, usage = tmp_path / "run", shutil.disk_usage
    with monkeypatch.context() as patch:
        full = lambda path: (  # noqa: E731
            SimpleNamespace(free=0) if (out / "checkpoints/2").exists() else usage(path)
        )
        patch.setattr(publishing.shutil, "disk_usage", full)
        with pytest.raises(CheckpointError, match="no space left"):
            train(out)
    assert names(out) == ["2"]
    assert digest(train(out)) == digest(whole)


def test_a_run_stops_when_validation_no_longer_improves(train, tmp_path):
    out = tmp_path / "run"
    settings = dataclasses.replace(NEVER_BETTER, patience=2)
    last = train(out, settings)
    assert last.name == "3"
    assert json.loads((out / "finished.json").read_text())["why"] == "early stopping"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [1, 2, 3]
    assert train(out, settings) == last
    # Killed between its last save and the record.
    (out / "finished.json").unlink()
    assert train(out, settings) == last
    assert (out / "finished.json").exists()


def test_a_stopped_run_remembers_how_validation_went(train, tmp_path, monkeypatch):
    settings = dataclasses.replace(NEVER_BETTER, patience=3)
    expected = train(tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped at step 3"):
            train(tmp_path / "run", settings)
    last = train(tmp_path / "run", settings)
    assert last.name == expected.name == "4"
    assert digest(last) == digest(expected)


def test_a_run_that_keeps_its_best_is_left_with_it_alone(train, tmp_path):
    out = tmp_path / "run"
    settings = dataclasses.replace(NEVER_BETTER, keep_best=True, export_dtype="bfloat16")
    best = train(out, settings)
    assert names(out) == [best.name] == ["1"]
    assert checkpoints.resolve(out) == best
    assert train(out, settings) == best

    exported = checkpoints.restore(out / "exported")
    assert checkpoints.read_manifest(out / "exported").dtype == "bfloat16"
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, jnp.asarray(b, jnp.bfloat16)),
        exported,
        checkpoints.restore(best),
    )


def test_a_run_that_improves_keeps_its_newest_checkpoints(train, whole, tmp_path):
    settings = dataclasses.replace(VALIDATED, learning_rate=1e-3, patience=1, keep_best=True)
    best = train(tmp_path / "run", settings)
    assert best.name == "6"


def test_a_loss_that_is_not_finite_leaves_its_batch_and_names_the_examples(train, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(
        M2LError, match=r"failed_step_\d+.npz .* drawn from their tasks: \w+ \d+ to"
    ):
        train(out, dataclasses.replace(SETTINGS, learning_rate=1e30))
    (arrays,) = out.glob("failed_step_*.npz")
    batch = np.load(arrays)
    assert batch["decoder_target_tokens"].shape == (4, 32)
    text = arrays.with_suffix(".txt").read_text()
    assert re.match(r"\w+: \d+ to \d+\n", text)
    assert "row 0, encoder_input_tokens, 1: " in text


def test_what_is_written_beside_a_run(whole):
    out = whole.parents[1]
    assert "decoder/layers_00/mlp/wo" in (out / "model.txt").read_text()
    assert json.loads((out / "environment.json").read_text())["processes"] == 1
    assert 'id="training"' in (out / "loss.svg").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert {"tokens_per_second", "mfu", "input_wait"} <= lines[-1].keys()
    assert 0 < lines[-1]["mfu"] < 1


def test_a_synthetic_run_reads_no_data_and_is_another_run(train, whole, tmp_path, monkeypatch):
    from m2l.training import feed

    with pytest.raises(ConfigError, match="its data is"):
        train(whole.parents[1], synthetic=True)
    with monkeypatch.context() as patch:
        patch.setattr(feed.pipeline, "training_batches", lambda *_, **__: pytest.fail("read"))
        train(tmp_path / "run", synthetic=True, profile=True)
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
