import pytest

from m2l.errors import ConfigError, M2LError
from m2l.training.settings import TrainSettings


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("steps", "ten", "expected int, found 'ten'"),
        ("steps", 0, "expected 1 or more"),
        ("pack", 1, "expected bool"),
        ("learning_rate", -1.0, "not above 0"),
        ("dropout_rate", 1.0, "not in"),
        ("warmup_steps", 99, "not in 0 to 10"),
        ("dtype", "float8", "'float32'|'bfloat16'"),
        ("schedule", "cosine_", "'cosine'"),
        ("optimizer", "adam", "'adamw'"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value(setting, value, said):
    with pytest.raises(M2LError, match=said):
        TrainSettings(**{"mixture": "imdb", "steps": 10, setting: value})


def test_an_int_stands_for_a_float():
    assert TrainSettings(mixture="imdb", steps=1, learning_rate=1).learning_rate == 1.0


def test_a_bool_does_not_stand_for_an_int():
    with pytest.raises(ConfigError, match="expected int, found True"):
        TrainSettings(mixture="imdb", steps=True)
