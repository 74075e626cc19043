"""What an import of any format shares: the shapes that it expects."""

import dataclasses

import pytest

from m2l import checkpoints, models
from m2l.checkpoints import importing

LLAMA = models.LlamaConfig(64, 32, 48, 12, 4, 2, 8)
T5 = models.T5Config(
    vocab_size=64,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_heads=2,
    num_encoder_layers=3,
    num_decoder_layers=2,
)


@pytest.mark.parametrize(
    "config",
    [
        T5,
        dataclasses.replace(T5, feed_forward_proj="relu", tie_word_embeddings=True),
        LLAMA,
        dataclasses.replace(LLAMA, num_hidden_layers=1, tie_word_embeddings=True),
        dataclasses.replace(LLAMA, num_hidden_layers=101, qkv_bias=True, out_bias=True),
        dataclasses.replace(LLAMA, windows=(4, 0) * 6, post_norms=True, model_type="gemma2"),
    ],
)
def test_the_shapes_of_a_model_are_those_that_its_spec_has(config):
    specs = checkpoints.flatten(models.spec(config))
    found = importing.parameter_shapes(config)
    assert list(found.items()) == [(name, spec.shape) for name, spec in specs.items()]
