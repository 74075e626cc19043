import json

import pytest

from m2l import configuration
from m2l.errors import ConfigError, M2LError
from m2l.training.settings import TrainSettings, from_flat

# Every name that gin files of version 0.1 may bind; none ever goes.
# fmt: off
GIN_NAMES = {
    "mixture": "imdb", "steps": 7, "batch_size": 6, "input_length": 5, "target_length": 4,
    "learning_rate": 0.5, "schedule": "rsqrt", "warmup_steps": 3,
    "optimizer": "sgd", "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.7, "momentum": 0.6,
    "clip": 2.0, "freeze": ["encoder/"], "z_loss": 0.2, "label_smoothing": 0.3,
    "accumulate": 2, "dropout_rate": 0.4, "dtype": "bfloat16", "attention": "einsum",
    "remat": "dots", "scan_layers": True, "loss_chunk": 9, "fsdp": 8, "model": 10,
    "pack": False, "seed": 11, "save_every": 12, "log_every": 13, "keep": 14,
    "validation": "sst2", "evaluate_every": 15, "validation_batches": 16, "patience": 17,
    "minimum_improvement": 0.9, "keep_best": True, "export_dtype": "bfloat16", "keep_every": 24,
    "ema": 0.99,
}
# fmt: on


def test_every_name_of_a_gin_file_sets_one_setting_and_is_read_back():
    bindings = [f"Train.{name} = {value!r}" for name, value in GIN_NAMES.items()]
    settings, text = configuration.load("Train", [], bindings)
    stored = json.loads(json.dumps(settings.flat()))
    assert stored == GIN_NAMES
    assert from_flat(**stored) == settings
    assert all(f"Train.{name} = " in text for name in GIN_NAMES)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("steps", "ten", "expected a positive integer, found 'ten'"),
        ("steps", 0, "expected a positive integer, found 0"),
        ("pack", 1, "expected True or False"),
        ("learning_rate", -1.0, "expected more than 0"),
        ("dropout_rate", 1.0, "expected less than 1"),
        ("ema", 1.0, "expected less than 1"),
        ("keep_every", -1, "expected an integer of at least 0"),
        ("keep_every", 300, "300 is no multiple of save_every, 500"),
        ("warmup_steps", 99, "not in 0 to 10"),
        ("dtype", "float8", "'float32'|'bfloat16'"),
        ("schedule", "cosine_", "'cosine'"),
        ("optimizer", "adam", "'adamw'"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value(setting, value, said):
    with pytest.raises(M2LError, match=said):
        from_flat(**{"mixture": "imdb", "steps": 10, setting: value})


def test_settings_that_came_later_are_told_where_they_change_something():
    flat = TrainSettings(mixture="imdb", steps=10).flat()
    assert GIN_NAMES.keys() - flat.keys() == {"keep_every", "ema"}


def test_an_int_stands_for_a_float():
    assert TrainSettings(mixture="imdb", steps=1, learning_rate=1).learning_rate == 1.0


def test_a_bool_does_not_stand_for_an_int():
    with pytest.raises(ConfigError, match="expected a positive integer, found True"):
        TrainSettings(mixture="imdb", steps=True)
