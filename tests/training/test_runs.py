"""The runs that come as gin files are the papers'."""

import pytest

from m2l import configuration

OF_ALL = ("mixture", "steps", "learning_rate", "schedule", "dropout_rate")


@pytest.mark.parametrize(
    ("run", "bindings", "expected"),
    [
        ("pretrain", (), ("span_corruption", 524288, 0.01, "rsqrt", 0.0)),
        ("instruct", (), ("flan_without_t0", 60000, 1e-4, "cosine", 0.05)),
        ("expert", ("MIXTURE=sentiment",), ("sentiment", 2000, 3e-5, "constant", 0.05)),
        ("multitask", (), ("t0_held_in", 2000, 3e-5, "constant", 0.05)),
    ],
)
def test_a_run_of_the_papers_is_the_one_trainer_with_other_settings(run, bindings, expected):
    made, _ = configuration.load("Run", ["runs/train.gin", f"runs/{run}.gin"], bindings)
    settings = made.settings
    assert tuple(settings.flat()[name] for name in OF_ALL) == expected
    assert settings.optimizer.name == "adafactor"
    if run in ("instruct", "expert", "multitask"):
        assert (settings.input_length, settings.target_length) == (2048, 512)
    if run == "expert":  # What a command is told by --mixture is that of the validation, too.
        files = ["runs/train.gin", "runs/expert.gin"]
        assert configuration.load("Run", files, (), "sentiment")[0] == made
    if run in ("expert", "multitask"):
        assert settings.validation == settings.mixture
