"""The Llama family: its rotary positions, its settings, and the ways in which it is computed."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import models
from m2l.errors import ConfigError, M2LError
from m2l.models.layers import Execution, through
from m2l.models.llama import rotary_frequencies, rotate

TINY = models.LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
TINY_T5 = models.T5Config(31, 16, 4, 24, 4, 2, 2)


def change(config, **settings):
    return dataclasses.replace(config, **settings)


# Rotary positions.

ROTARY = {
    "default": {},
    "linear": {"rope_type": "linear", "rope_factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "rope_factor": 8.0,
        "rope_original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "rope_factor": 4.0,
        "rope_original_max_position_embeddings": 4096,
    },
}


def rotary(kind, size=128, **further):
    config = change(TINY, head_dim=size, **(ROTARY[kind] | further))
    frequencies, factor = rotary_frequencies(config)
    assert frequencies.dtype == np.float32 and frequencies.shape == (size // 2,)
    return frequencies, factor


def of_pairs(theta, size=128):
    """theta^(-2 i / K) of each pair i, in float64."""
    return [math.exp(-2 * pair / size * math.log(theta)) for pair in range(size // 2)]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_default_frequencies_fall_by_one_ratio_from_one(theta):
    frequencies, factor = rotary("default", rope_theta=theta)
    np.testing.assert_allclose(frequencies, of_pairs(theta), rtol=1e-6)
    assert frequencies[0] == 1 and factor == 1


def test_linear_scaling_puts_factor_times_as_many_positions_in_a_turn():
    frequencies, factor = rotary("linear")
    turn = 2 * np.pi / np.array(of_pairs(10000.0))
    np.testing.assert_allclose(2 * np.pi / frequencies, 4 * turn, rtol=1e-6)
    assert factor == 1


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends_between():
    """Wave by wave, as Meta's own code puts it."""
    frequencies, factor = rotary("llama3")
    expected, kinds = [], set()
    for frequency in of_pairs(500000.0):
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            kinds.add("short")
            expected.append(frequency)
        elif wave > 8192 / 1:
            kinds.add("long")
            expected.append(frequency / 8)
        else:
            kinds.add("between")
            smooth = (8192 / wave - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert len(kinds) == 3 and factor == 1
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)


def pair_that_turns(times, theta, original, size=128):
    """The real-valued pair whose frequency turns `times` times in `original` positions."""
    low, high = -1000.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        turns = original * theta ** (-2 * middle / size) / (2 * math.pi)
        low, high = (middle, high) if turns > times else (low, middle)
    return low


def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_ramps_between():
    frequencies, factor = rotary("yarn")
    first = math.floor(pair_that_turns(32, 1e4, 4096))
    last = math.ceil(pair_that_turns(1, 1e4, 4096))
    assert 0 < first < last < 64
    expected = []
    for pair, frequency in enumerate(of_pairs(1e4)):
        if pair <= first:
            expected.append(frequency)
        elif pair >= last:
            expected.append(frequency / 4)
        else:
            share = (pair - first) / (last - first)
            expected.append(frequency * ((1 - share) + share / 4))
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


def test_yarns_attention_factor_is_the_one_that_is_set():
    assert rotary("yarn", rope_attention_factor=1.25)[1] == 1.25
    assert rotary("yarn", rope_factor=0.5)[1] == 1


def test_a_rotation_is_a_complex_one_of_features_half_a_head_apart():
    frequencies, _ = rotary("default", size=6)
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2, 0, 1], [3, 4, 50, 60, 1000]])
    angles = (positions[:, None, :, None] * frequencies.astype(np.float64)).astype(np.float32)
    found = rotate(jnp.asarray(x), (jnp.cos(angles), jnp.sin(angles)))
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles.astype(np.float64))
    np.testing.assert_allclose(
        found, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=1e-6
    )


# Ways to compute it.

# Compiled in half the time.
QUICKLY = {"xla_backend_optimization_level": 0}
WAYS = {
    "full": {"remat": "full"},
    "dots": {"remat": "dots"},
    "scan": {"scan_layers": True},
    "scan, full": {"scan_layers": True, "remat": "full"},
    "scan, dots": {"scan_layers": True, "remat": "dots"},
}
MODELS = {
    "llama": TINY,
    "llama with windows": change(
        TINY,
        windows=(0, 3),
        post_norms=True,
        attn_logit_softcapping=3.0,
        qk_norm="head",
        rope_local_base_freq=9.0,
    ),
    "mixture": change(TINY, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8),
    "t5": TINY_T5,
}
# The loop without a scan gives every layer its own window, whether they differ or not.
CASES = [("llama", "scan"), ("llama", "scan, dots"), ("mixture", "scan, dots")]
CASES += [(name, way) for name in ("llama with windows", "t5") for way in WAYS]


def batch_of(config):
    rng = np.random.default_rng(0)
    sides = {"decoder": 7} if config.decoder_only else {"encoder": 9, "decoder": 7}
    batch = {}
    for side, length in sides.items():
        segments = np.repeat([[1, 2]], [4, length - 4], axis=1).repeat(2, axis=0).astype(np.int32)
        batch[f"{side}_input_tokens"] = rng.integers(1, 31, (2, length), dtype=np.int32)
        batch[f"{side}_segment_ids"] = segments
        batch[f"{side}_positions"] = np.arange(length, dtype=np.int32) - 4 * (segments - 1)
    return batch


def drawn(config):
    """Drawn wide, so that attention attends: layers that differ must be told apart."""
    return jax.tree.map(lambda leaf: 5 * leaf, models.init(config, jax.random.key(0)))


@functools.cache
def computed(name, **way):
    """Logits, and the gradients of a function of them."""
    config = MODELS[name]
    batch, execution = batch_of(config), Execution(attention="einsum", **way)

    def product(params):
        logits = models.apply(config, params, batch, execution=execution)
        return jnp.sum(jnp.sin(jnp.arange(31.0)) * jax.nn.log_softmax(logits)), logits

    gradient = jax.jit(jax.value_and_grad(product, has_aux=True), compiler_options=QUICKLY)
    (_, logits), gradients = gradient(drawn(config))
    return logits, gradients


@pytest.mark.parametrize("name, way", CASES)
def test_rematerialised_and_scanned_layers_compute_what_the_loop_does(name, way):
    (logits, gradients), (expected, of_expected) = computed(name, **WAYS[way]), computed(name)

    def close(path, found, wanted):
        # Float32, compiled another way.
        limit = 2e-5 * np.abs(wanted).max()
        told = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=limit, err_msg=told)

    close((), logits, expected)
    jax.tree.map_with_path(close, gradients, of_expected)


def test_each_layer_has_its_own_window():
    name = "llama with windows"
    config = MODELS[name]
    exchanged = change(config, windows=config.windows[::-1])
    apply = jax.jit(lambda params: models.apply(exchanged, params, batch_of(config)))
    assert np.abs(apply(drawn(config)) - computed(name)[0]).max() > 1e-2


FEATURES = 2000


class _Adding(nn.Module):
    """Adds its weight to the features that dropout keeps: what is dropped can be read off."""

    execution: Execution

    def setup(self):
        self.weight = self.param("weight", nn.initializers.ones, ())
        self.dropout = self.execution.dropout()

    def __call__(self, x):
        return x + self.dropout(self.weight * jnp.ones_like(x))


class _Layers(nn.Module):
    execution: Execution

    def setup(self):
        self.layers = [_Adding(self.execution, name=f"layers_{i}") for i in range(3)]

    def __call__(self, x):
        return through(self.layers, x, [()] * 3, (), self.execution)


@pytest.mark.parametrize("way", WAYS)
def test_each_layer_draws_its_own_dropout_and_its_gradient_the_same(way):
    network = _Layers(Execution(dropout_rate=0.5, **WAYS[way]))
    params = {f"layers_{i}": {"weight": jnp.float32(10**i)} for i in range(3)}

    def total(params, key):
        read = network.apply({"params": params}, jnp.zeros((1, FEATURES)), rngs={"dropout": key})
        return read.sum(), read[0]

    step = jax.jit(jax.grad(total, has_aux=True))
    gradients, read = step(params, jax.random.key(0))
    # What is kept is doubled: the digits of half of it are the layers that kept a feature.
    digits = np.rint(np.asarray(read) / 2).astype(int)
    kept = np.array([digits // 10**i % 10 for i in range(3)])
    assert set(np.unique(kept)) == {0, 1}
    # Standard deviation of a mean of 2000 coins: 0.011.
    np.testing.assert_allclose(kept.mean(1), 0.5, atol=0.06)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((kept[one] == kept[other]).mean() - 0.5) < 0.06
    for i in range(3):
        assert float(gradients[f"layers_{i}"]["weight"]) == 2 * kept[i].sum()
    _, again = step(params, jax.random.key(0))
    _, another = step(params, jax.random.key(1))
    assert (again == read).all() and (another != read).any()


# Settings.

LLAMA_REFUSALS = [
    ({"query_pre_attn_scalar": -1.0}, "query_pre_attn_scalar: expected 0 or more, found -1.0"),
    ({"attn_logit_softcapping": -5.0}, "attn_logit_softcapping: expected 0 or more, found -5.0"),
    ({"norm_offset": math.nan}, "norm_offset: expected a finite number, found nan"),
    (
        {
            "rope_type": "llama3",
            "rope_original_max_position_embeddings": 8,
            "rope_high_freq_factor": 1.0,
        },
        "rope_high_freq_factor: expected more than 1, found 1.0",
    ),
    (
        {"rope_type": "yarn", "rope_original_max_position_embeddings": 8, "rope_beta_slow": 0.0},
        "rope_beta_slow: expected more than 0, found 0.0",
    ),
    ({"hidden_size": 0}, "LlamaConfig.hidden_size: expected a positive integer, found 0"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers: expected a positive integer, found 2.0"),
    ({"qkv_bias": 1}, "qkv_bias: expected True or False, found 1"),
    ({"rope_theta": "1e4"}, "rope_theta: expected a finite number, found '1e4'"),
    ({"rope_type": 3}, "rope_type: expected a string, found 3"),
    ({"windows": (1, -1)}, "windows: expected a list of integers, 0 or more"),
    ({"windows": 3}, "windows: expected a list of integers, 0 or more, found 3"),
    (
        {"rope_original_max_position_embeddings": -1},
        "rope_original_max_position_embeddings: expected an integer of at least 0, found -1",
    ),
    ({"model_type": "lama"}, "LlamaConfig.model_type 'lama'; the nearest known one is 'llama'"),
    ({"hidden_act": "sil"}, "LlamaConfig.hidden_act 'sil'; the nearest known one is 'silu'"),
    ({"rope_type": "liner"}, "LlamaConfig.rope_type 'liner'; the nearest known one is 'linear'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide the 4 attention heads"),
    ({"head_dim": 5}, "head_dim: expected an even number (rotary positions turn pairs), found 5"),
    ({"windows": (3, 0, 1)}, "windows: 3 numbers for 2 layers; give one for each, or none"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: expected more than 0, found 0"),
    ({"rope_theta": -1.0}, "rope_theta: expected more than 0, found -1.0"),
    ({"rope_factor": float("nan")}, "rope_factor: expected a finite number, found nan"),
    ({"rotary_layers": (1,)}, "rotary_layers: 1 numbers for 2 layers; give one for each, or none"),
    ({"qk_norm": "heads"}, "LlamaConfig.qk_norm 'heads'; the nearest known one is 'head'"),
    ({"omit_pre_norms": True}, "omit_pre_norms: blocks without any norm; set post_norms"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected an even number"),
    ({"partial_rotary_factor": 0.1}, "partial_rotary_factor: expected an even number"),
    ({"partial_rotary_factor": 1.4}, "found 8 of 6"),
    (
        {
            "rope_type": "longrope",
            "rope_original_max_position_embeddings": 8,
            "rope_short_factor": (1.0, 2.0),
        },
        "rope_short_factor: expected 3 numbers above 0, one for each pair of features",
    ),
    ({"rope_type": "llama3"}, "rope_original_max_position_embeddings: rope_type 'llama3' needs"),
    ({"rope_type": "yarn"}, "rope_original_max_position_embeddings: rope_type 'yarn' needs it"),
]
T5_REFUSALS = [
    ({"d_kv": 0}, "T5Config.d_kv: expected a positive integer, found 0"),
    ({"decoder_start_token_id": -1}, "decoder_start_token_id: expected an integer of at least 0"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected True or False, found 1"),
    ({"layer_norm_epsilon": None}, "layer_norm_epsilon: expected a finite number, found None"),
    ({"model_type": "t6"}, "T5Config.model_type 't6'; the nearest known one is 't5'"),
    (
        {"feed_forward_proj": "gated-relu"},
        "T5Config.feed_forward_proj 'gated-relu'; the nearest known one is 'gated-",
    ),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: expected more than 0, found 0"),
    ({"scale_decoder_outputs": True}, "only a tied output is scaled; set tie_word_embeddings"),
    ({"decoder_start_token_id": 31}, "31 is outside the vocabulary of 31"),
    ({"relative_attention_num_buckets": 2}, "an even number of at least 4"),
    ({"relative_attention_num_buckets": 7}, "an even number of at least 4"),
    (
        {"relative_attention_max_distance": 16},
        "relative_attention_max_distance: expected more than half of the 32 buckets, found 16",
    ),
]


@pytest.mark.parametrize(
    "config, settings, told",
    [(TINY, *refusal) for refusal in LLAMA_REFUSALS]
    + [(TINY_T5, *refusal) for refusal in T5_REFUSALS],
)
def test_a_setting_that_cannot_be_is_refused_by_name(config, settings, told):
    with pytest.raises(M2LError) as refusal:
        change(config, **settings)
    assert told in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_decoder_survives_the_way_through_plain_values():
    config = change(TINY, windows=[0, 3], rope_theta=500000)
    assert config.windows == (0, 3) and type(config.rope_theta) is float
    values = models.to_dict(config)
    assert values["family"] == "llama"
    assert models.from_dict(values | {"windows": [0, 3]}) == config
    with pytest.raises(ConfigError, match="a llama model: the setting 'head_dim' is missing"):
        models.from_dict({name: value for name, value in values.items() if name != "head_dim"})


def published(*dimensions, **settings):
    return models.LlamaConfig(*dimensions, **settings)


PUBLISHED = {
    "SmolLM2-135M": (
        published(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True),
        134_515_008,
    ),
    "Llama-2-7B": (published(32000, 4096, 11008, 32, 32, 32, 128), 6_738_415_616),
    "Llama-3-8B": (published(128256, 4096, 14336, 32, 32, 8, 128), 8_030_261_248),
    "Mistral-7B": (
        published(32000, 4096, 14336, 32, 32, 8, 128, windows=(4096,) * 32),
        7_241_732_096,
    ),
    "Qwen2-0.5B": (
        published(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True, qkv_bias=True),
        494_032_768,
    ),
    "Gemma-2-2B": (
        published(256000, 2304, 9216, 26, 8, 4, 256, tie_word_embeddings=True, post_norms=True),
        2_614_341_888,
    ),
    "Qwen3-0.6B": (
        published(151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True, qk_norm="head"),
        596_049_920,
    ),
    "Gemma-3-1B": (
        published(
            *(262144, 1152, 6912, 26, 4, 1, 256),
            tie_word_embeddings=True,
            post_norms=True,
            qk_norm="head",
        ),
        999_885_952,
    ),
    "OLMo-2-1B": (
        published(
            *(100352, 2048, 8192, 16, 16, 16, 128),
            omit_pre_norms=True,
            post_norms=True,
            qk_norm="whole",
        ),
        1_484_916_736,
    ),
    "SmolLM3-3B": (
        published(128256, 2048, 11008, 36, 16, 4, 128, tie_word_embeddings=True),
        3_075_098_624,
    ),
    "Phi-3-mini": (published(32064, 3072, 8192, 32, 32, 32, 96), 3_821_079_552),
    "Mixtral-8x7B": (
        published(
            *(32000, 4096, 14336, 32, 32, 8, 128),
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=14336,
        ),
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        published(
            *(151936, 2048, 6144, 48, 32, 4, 128),
            qk_norm="head",
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        30_532_122_624,
    ),
    "OLMoE-1B-7B": (
        published(
            *(50304, 2048, 1024, 16, 16, 16, 128),
            qk_norm="whole",
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=1024,
        ),
        6_919_161_856,
    ),
    "T5 1.0 small": (
        models.T5Config(
            32128, 512, 64, 2048, 8, 6, 6, feed_forward_proj="relu", tie_word_embeddings=True
        ),
        60_506_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_spec_counts_the_parameters_that_the_published_models_have(name):
    config, parameters = PUBLISHED[name]
    specs = jax.tree.leaves(models.spec(config))
    assert sum(math.prod(param.shape) for param in specs) == parameters
