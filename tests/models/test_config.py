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
        ({"family": ["t5"]}, "unknown model family"),
        ({"vocab_size": 2**60}, "vocab_size: expected at most 134,217,728"),
        ({"num_encoder_layers": 10**9}, "num_encoder_layers: expected at most 1,024"),
        ({"d_model": 10**9}, "d_model: expected at most 1,048,576"),
        ({"relative_attention_num_buckets": 2**40}, "expected at most"),
        ({"relative_attention_max_distance": 2**31}, "expected at most 2,147,483,647"),
        ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon: expected a finite number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: expected a finite number"),
        ({"d_kv": [8]}, "d_kv: expected a positive integer, found [8]"),
        ({"model_type": ["t5"]}, "model_type: expected a string"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, told):
    with pytest.raises(M2LError) as refusal:
        models.from_dict(models.to_dict(CONFIG) | change)
    assert told in str(refusal.value) and "\n" not in str(refusal.value)
    assert isinstance(refusal.value, ConfigError | UnknownNameError)


@pytest.mark.parametrize("values", [None, [], "t5", 3])
def test_settings_that_are_no_dict_are_refused(values):
    with pytest.raises(ConfigError, match="expected its settings by name"):
        models.from_dict(values)


LARGEST = {"vocab_size": 2**27, "d_model": 2**20, "d_kv": 2**20, "d_ff": 2**20, "num_heads": 2**20}


def test_the_shapes_of_the_largest_model_that_is_accepted_can_be_computed():
    config = models.from_dict(models.to_dict(CONFIG) | LARGEST)
    # By hand: two embeddings, 8 kernels of attention to a decoder layer and 4 to an encoder one, 3
    # matrices to an mlp, norms, and two tables of positions.
    attention, mlp = 2**20 * 2**40, 3 * 2**40
    expected = 2 * 2**47 + (3 * 8 + 2 * 4) * attention + 5 * mlp + (3 * 3 + 2 * 2 + 2) * 2**20
    assert models.parameters(config) == expected + 2 * 32 * 2**20


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
