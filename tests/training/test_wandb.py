"""Logging to Weights & Biases, by a stand-in for its module."""

import json
import sys
from types import SimpleNamespace

import pytest

from m2l.errors import ConfigError, Stopped
from m2l.training import monitoring


@pytest.fixture
def calls(monkeypatch):
    """What was called, in order: (name, arguments)."""
    called = []

    def record(name):
        return lambda *args, **kwargs: called.append((name, args, kwargs))

    def init(**kwargs):
        called.append(("init", (), kwargs))
        return SimpleNamespace(log=record("log"), finish=record("finish"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return called


def test_every_figure_of_a_run_is_forwarded_under_its_part(calls, run_m2l, tmp_path):
    (tmp_path / "tiny.gin").write_text(
        "include 'models/t5_1m.gin'\nRun.model = %MODEL\n"
        "T5.d_model = 16\nT5.d_kv = 8\nT5.d_ff = 32\nT5.num_heads = 2\n"
        "T5.num_encoder_layers = 1\nT5.num_decoder_layers = 1\n"
        "Train.mixture = 'app_reviews'\nTrain.batch_size = 4\nTrain.steps = 2\n"
        "Train.log_every = 1\nTrain.validation = 'app_reviews'\nTrain.evaluate_every = 2\n"
        "Train.validation_batches = 1\n"
    )
    out = tmp_path / "run"
    assert run_m2l("train", "--gin_file", tmp_path / "tiny.gin", "--out", out, "--wandb", "p") == 0
    (first, _, made), *logged, (last, _, ended) = calls
    assert (first, made["project"], made["name"], made["resume"]) == ("init", "p", "run", "allow")
    assert made["config"] == {"mixture": "app_reviews"}
    assert (last, ended) == ("finish", {"exit_code": 0})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert len(logged) == len(lines) == 3
    for (name, (figures,), at), line in zip(logged, lines, strict=True):
        assert (name, at) == ("log", {"step": line.pop("step")})
        found = {
            n.replace("train/", "").replace("validation/", "validation_"): v
            for n, v in figures.items()
        }
        assert found == line
    assert {"train/loss", "train/learning_rate", "train/gradient_norm"} <= logged[0][1][0].keys()
    assert "validation/loss" in logged[-1][1][0]


def test_a_run_gone_on_with_is_the_same_run_and_another_folder_is_another(calls, tmp_path):
    for folder in ("a", "a", "b"):
        with monitoring.wandb_log("p", tmp_path / folder, {}):
            pass
    ids = [kwargs["id"] for name, _, kwargs in calls if name == "init"]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(("kind", "code"), [(ValueError, 1), (Stopped, 0)])
def test_a_run_that_fails_is_finished_as_failed_and_one_that_stopped_is_not(
    calls, tmp_path, kind, code
):
    with pytest.raises(kind), monitoring.wandb_log("p", tmp_path, {}):
        raise kind
    assert calls[-1] == ("finish", (), {"exit_code": code})


def test_wandb_that_is_not_installed_is_said_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'm2l\[wandb\]'"),
        monitoring.wandb_log("p", tmp_path, {}),
    ):
        pass
