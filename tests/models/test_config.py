"""A model's configuration checks itself and survives its description as plain values."""

import pytest

from m2l import models
from m2l.errors import ConfigError, M2LError, UnknownNameError

CONFIG = models.T5Config(
    vocab_size=41,
    d_model=16,
    d_kv=6,
    d_ff=20,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=3,
    layer_norm_epsilon=1e-2,
)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"d_model": 0}, "d_model: expected a positive integer, found 0"),
        ({"num_heads": "4"}, "num_heads: expected a positive integer, found '4'"),
        ({"vocab_size": True}, "vocab_size"),
        ({"d_ff": 16.0}, "d_ff"),
        ({"layer_norm_epsilon": "0"}, "layer_norm_epsilon: expected a finite number"),
        ({"dropout_rate": 0.1}, "setting of a t5 model 'dropout_rate'"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        ({"relative_attention_num_buckets": 7}, "an even number"),
        ({"relative_attention_max_distance": 16}, "more than half of the 32 buckets"),
        ({"activation": "relu"}, "setting of a t5 model 'activation'"),
        ({"family": "t6"}, "the nearest known one is 't5'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, told):
    with pytest.raises(M2LError) as refusal:
        models.from_dict(models.to_dict(CONFIG) | change)
    assert told in str(refusal.value) and "\n" not in str(refusal.value)
    assert isinstance(refusal.value, ConfigError | UnknownNameError)


@pytest.mark.parametrize("missing", ["family", "d_model"])
def test_a_config_with_a_missing_setting_is_refused(missing):
    values = models.to_dict(CONFIG)
    del values[missing]
    with pytest.raises(ConfigError, match=missing):
        models.from_dict(values)


def test_a_config_survives_the_way_through_plain_values():
    values = models.to_dict(CONFIG)
    assert values["family"] == "t5"
    assert models.from_dict(values) == CONFIG
