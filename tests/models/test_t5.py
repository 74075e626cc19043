"""T5 against a float64 NumPy T5 written from the papers' formulas, one unpadded example a time."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import models
from m2l.errors import DataError
from m2l.models import products
from m2l.models.layers import relative_position_buckets

# No two dimensions alike, and sequences longer than the range of the position buckets.
CONFIG = models.T5Config(
    vocab_size=41,
    d_model=16,
    d_kv=6,
    d_ff=20,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    layer_norm_epsilon=1e-2,
)
INPUT_LENGTHS, TARGET_LENGTHS = (20, 7, 3, 13), (17, 2, 9, 5)
S, T = 20, 17


# The oracle.


def exact_bucket(distance, bidirectional, num_buckets, max_distance):
    """The paper's bucket in whole numbers: log(n / e) / log(m / e) * (b - e) >= k, unrolled."""
    behind, offset = -distance, 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if behind < 0 else 0
        behind = abs(behind)
    behind = max(behind, 0)
    exact = num_buckets // 2
    if behind < exact:
        return offset + behind
    steps = num_buckets - exact
    passed = [k for k in range(steps) if behind**steps * exact**k >= max_distance**k * exact**steps]
    return offset + exact + max(passed)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def oracle_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.layer_norm_epsilon) * scale


def oracle_attention(p, x, memory, bias):
    out = np.zeros_like(x)
    for head in range(CONFIG.num_heads):
        part = slice(head * CONFIG.d_kv, (head + 1) * CONFIG.d_kv)
        scores = (x @ p["query"][:, part]) @ (memory @ p["key"][:, part]).T + bias[head]
        out += softmax(scores) @ (memory @ p["value"][:, part]) @ p["out"][part]
    return out


def oracle_bias(table, length, causal):
    buckets, farthest = table.shape[1], CONFIG.relative_attention_max_distance
    bias = np.zeros((CONFIG.num_heads, length, length))
    for query in range(length):
        for key in range(length):
            bias[:, query, key] = table[:, exact_bucket(key - query, not causal, buckets, farthest)]
            if causal and key > query:
                bias[:, query, key] = -np.inf
    return bias


def oracle_stack(p, x, memory):
    bias = oracle_bias(p["relpos_bias"], len(x), causal=memory is not None)
    for name in sorted(name for name in p if name.startswith("layers_")):
        layer = p[name]
        h = oracle_norm(x, layer["pre_self_attention_norm"])
        x = x + oracle_attention(layer["self_attention"], h, h, bias)
        if memory is not None:
            h = oracle_norm(x, layer["pre_cross_attention_norm"])
            x = x + oracle_attention(layer["cross_attention"], h, memory, np.zeros(4))
        h = oracle_norm(x, layer["pre_mlp_norm"]) @ layer["mlp"]["wi_0"]
        gate = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        up = oracle_norm(x, layer["pre_mlp_norm"]) @ layer["mlp"]["wi_1"]
        x = x + (gate * up) @ layer["mlp"]["wo"]
    return oracle_norm(x, p["norm"])


def oracle(params, inputs, targets):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    memory = oracle_stack(p["encoder"], p["token_embedder"][inputs], None)
    return oracle_stack(p["decoder"], p["token_embedder"][targets], memory) @ p["decoder"]["logits"]


# What is tested.


def random_params(config, seed):
    """Weights of a size at which every part of the network changes the logits."""
    rng = np.random.default_rng(seed)

    def draw(param):
        if len(param.shape) == 1:
            return rng.uniform(0.5, 1.5, param.shape).astype(np.float32)
        return rng.normal(0, 0.4, param.shape).astype(np.float32)

    return jax.tree.map(draw, models.spec(config))


PARAMS = random_params(CONFIG, seed=0)

apply = jax.jit(functools.partial(models.apply, CONFIG))
encode = jax.jit(functools.partial(models.encode, CONFIG))
decode = jax.jit(functools.partial(models.decode, CONFIG))


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(1)
    inputs = [rng.integers(1, CONFIG.vocab_size, n).astype(np.int32) for n in INPUT_LENGTHS]
    # As in training: a target starts with id 0, which is also the id of padding.
    targets = [
        np.r_[0, rng.integers(1, CONFIG.vocab_size, n - 1)].astype(np.int32) for n in TARGET_LENGTHS
    ]
    return inputs, targets


@pytest.fixture(scope="module")
def batch(examples):
    def pad(rows, length):
        return np.stack([np.pad(row, (0, length - len(row))) for row in rows])

    inputs, targets = examples
    return {"encoder_input_tokens": pad(inputs, S), "decoder_input_tokens": pad(targets, T)}


@pytest.fixture(scope="module")
def expected(examples):
    return [oracle(PARAMS, *example) for example in zip(*examples, strict=True)]


@pytest.fixture(scope="module")
def logits(batch):
    return np.asarray(apply(PARAMS, batch))


@pytest.fixture(scope="module")
def made():
    return models.init(CONFIG, jax.random.key(0))


def assert_close(actual, desired):
    """1e-5 of the largest logit: float32 keeps 6e-8 of a number, and some hundred are summed."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-5 * np.abs(desired).max())


def test_padded_logits_equal_the_formula_on_each_example_alone(logits, expected):
    for row, desired in zip(logits, expected, strict=True):
        assert_close(row[: len(desired)], desired)


def test_packed_logits_equal_the_formula_on_each_example_alone(examples, expected):
    (inputs, targets), rows = examples, ((1, 3), (2, 1, 2))
    packed = {}
    for side, tokens, length in (("encoder", inputs, 24), ("decoder", targets, 21)):
        numbers = [[i for i, e in enumerate(row, 1) for _ in tokens[e]] for row in rows]
        tokens = [np.concatenate([tokens[e] for e in row]) for row in rows]
        columns = {"input_tokens": tokens, "segment_ids": numbers}
        for name, values in columns.items():
            values = [np.pad(row, (0, length - len(row))) for row in values]
            packed[f"{side}_{name}"] = np.array(values, np.int32)
    logits = np.asarray(apply(PARAMS, packed))
    for row, members in zip(logits, rows, strict=True):
        start = 0
        for e in members:
            assert_close(row[start : start + len(targets[e])], expected[e])
            start += len(targets[e])


def test_answer_choices_of_an_input_are_scored_as_if_each_were_alone(batch):
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    choices_BxCxT = np.stack([targets, np.roll(targets, 1, 0), np.roll(targets, 2, 0)], axis=1)
    encoded = encode(PARAMS, inputs, inputs != 0)
    scored = np.asarray(decode(PARAMS, encoded, inputs != 0, choices_BxCxT))
    assert scored.shape == (4, 3, T, CONFIG.vocab_size)
    for choice in range(3):
        alone = {"encoder_input_tokens": inputs, "decoder_input_tokens": choices_BxCxT[:, choice]}
        assert_close(scored[:, choice], np.asarray(apply(PARAMS, alone)))


def test_decoding_step_by_step_equals_teacher_forcing(batch, logits):
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_input_tokens"]

    @jax.jit
    def all_steps(params):
        encoded = models.encode(CONFIG, params, inputs, inputs != 0)
        cache = models.start_decoding(CONFIG, params, encoded, inputs != 0, max_length=T + 4)

        def step(cache, at):
            position, tokens = at
            logits, cache = models.decode_step(CONFIG, params, cache, tokens, position)
            return cache, logits

        return jax.lax.scan(step, cache, (jnp.arange(T), targets.T))[1]

    assert_close(np.asarray(all_steps(PARAMS)).swapaxes(0, 1), logits)


def test_bfloat16_computation_gives_float32_logits_near_the_float32_ones(made, batch, monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    exact = np.asarray(apply(made, batch))
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), made)
    low = jax.jit(
        functools.partial(models.apply, CONFIG, execution=models.Execution(jnp.bfloat16))
    )(halved, batch)
    assert low.dtype == jnp.float32
    error = np.sqrt(np.mean((np.asarray(low) - exact) ** 2)) / exact.std()
    # A bfloat16 keeps 8 bits, 0.2% on average, and five layers add their roundings up.
    assert 1e-3 < error < 2e-2


def test_a_token_outside_the_vocabulary_gives_nan_in_its_own_row_only(batch, logits):
    wrong = batch["encoder_input_tokens"].copy()
    wrong[2, 1] = CONFIG.vocab_size
    wrong = np.asarray(apply(PARAMS, {**batch, "encoder_input_tokens": wrong}))
    assert np.isnan(wrong[2]).all()
    np.testing.assert_array_equal(wrong[[0, 1, 3]], logits[[0, 1, 3]])


# Relative positions.


def test_buckets_of_small_distances_are_those_of_the_paper():
    """Worked by hand for T5's 32 buckets and 128 positions.

    Encoder: 16 buckets a direction, 8 exact; bucket 8 + k starts at 8 * 16**(k / 8):
    8, 11.3, 16, 22.6, 32, 45.3, 64, 90.5. Decoder: 16 exact; 16 * 8**(k / 16): 16, 18.2, ...
    """
    encoder = {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -15: 9, -16: 10, -22: 10, -23: 11}
    encoder |= {-31: 11, -32: 12, -45: 12, -46: 13, -63: 13, -64: 14, -90: 14, -91: 15, -5000: 15}
    encoder |= {1: 17, 7: 23, 8: 24, 12: 25, 16: 26, 64: 30, 5000: 31}
    decoder = {5: 0, 1: 0, 0: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -32: 21, -64: 26}
    decoder |= {-112: 30, -113: 31, -128: 31, -5000: 31}
    for bidirectional, by_hand in ((True, encoder), (False, decoder)):
        found = relative_position_buckets(
            np.array(list(by_hand)), bidirectional=bidirectional, num_buckets=32, max_distance=128
        )
        assert dict(zip(by_hand, found.tolist(), strict=True)) == by_hand


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (12, 20), (4, 3), (64, 256)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_no_bucket_boundary_is_moved_by_rounding(bidirectional, num_buckets, max_distance):
    distances = np.arange(-300, 301)
    settings = bidirectional, num_buckets, max_distance
    found = relative_position_buckets(
        distances,
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    assert found.tolist() == [exact_bucket(int(d), *settings) for d in distances]


# Dropout.


@pytest.fixture(scope="module")
def bare():
    """A T5 whose layers add nothing and whose head is the identity: what dropout does is seen."""
    size = 64
    config = models.T5Config(size, size, 8, 8, 2, 1, 1)
    params = jax.tree.map(lambda param: np.ones(param.shape, np.float32), models.spec(config))
    layer = params["decoder"]["layers_00"]
    for kernel in layer["self_attention"], layer["cross_attention"]:
        kernel["out"] *= 0
    layer["mlp"]["wo"] *= 0
    params["decoder"]["logits"] = np.eye(size, dtype=np.float32)
    tokens = np.ones((64, 3), np.int32)
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens}

    @functools.partial(jax.jit, static_argnames="rate")
    def run(key, rate):
        execution = models.Execution(dropout_rate=rate)
        return models.apply(config, params, batch, dropout_key=key, execution=execution)

    return lambda seed, rate=0.2: np.asarray(
        run(None if seed is None else jax.random.key(seed), rate=rate)
    )


def test_dropout_has_its_rate_its_scale_and_one_mask_for_all_positions(bare):
    dropped = bare(0)
    np.testing.assert_array_equal(dropped, dropped[:, :1].repeat(3, axis=1))
    # Twice a feature may go: after the embedding and after the last norm. 4096 features: the
    # standard deviation of the share is 0.0075.
    zeros = dropped[:, 0] == 0
    assert abs(zeros.mean() - (1 - 0.8**2)) < 0.03
    # Of a row of ones, m / 64 survive the first time; the norm makes them sqrt(64 / m).
    for row in dropped[:, 0]:
        values = np.unique(row[row != 0])
        survivors = 64 / (values * 0.8) ** 2
        np.testing.assert_allclose(survivors, np.round(survivors)[:1].repeat(len(values)), 1e-4)
        assert 64 >= survivors[0] >= (row != 0).sum()


def test_dropout_follows_its_key_and_is_off_without_one_or_at_rate_zero(bare):
    np.testing.assert_array_equal(bare(0), bare(0))
    assert (bare(0) != bare(1)).any()
    np.testing.assert_allclose(bare(None), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(bare(0, rate=0.0), bare(None))


# Parameters.


def test_spec_tells_shapes_dtypes_and_names_of_what_init_makes(made):
    told = models.spec(CONFIG)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda param: (param.shape, param.dtype), told
    )
    names = ["/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(told)]
    assert "decoder/layers_02/mlp/wi_0" in names and "token_embedder" in names
    assert not any("." in name for name in names)


@pytest.mark.parametrize(
    "size, dimensions, parameters",
    [
        ("small", (512, 64, 1024, 6, 8), 76_961_152),
        ("base", (768, 64, 2048, 12, 12), 247_577_856),
        ("xxl", (4096, 64, 10240, 64, 24), 11_135_332_352),
    ],
)
def test_spec_counts_the_parameters_that_the_released_checkpoints_have(
    size, dimensions, parameters
):
    *widths, layers = dimensions
    assert models.parameters(models.T5Config(32128, *widths, layers, layers)) == parameters


def test_init_draws_each_parameter_at_the_scale_that_t5x_draws_it(made):
    d_model, d_ff, heads = CONFIG.d_model, CONFIG.d_ff, CONFIG.num_heads
    scales = {
        "token_embedder": 1.0,
        "query": (d_model * CONFIG.d_kv) ** -0.5,
        "key": d_model**-0.5,
        "value": d_model**-0.5,
        "out": (heads * CONFIG.d_kv) ** -0.5,
        "wi_0": d_model**-0.5,
        "wi_1": d_model**-0.5,
        "wo": d_ff**-0.5,
        "logits": d_model**-0.5,
        "relpos_bias": ((heads + CONFIG.relative_attention_num_buckets) / 2) ** -0.5,
    }
    drawn = collections.defaultdict(list)
    for path, leaf in jax.tree.leaves_with_path(made):
        drawn[path[-1].key].append(np.ravel(leaf))
    for name, layers in drawn.items():
        values = np.concatenate(layers)
        if name.endswith("norm"):
            np.testing.assert_array_equal(values, 1.0)
        else:
            # Four times the standard deviation of a sample's own standard deviation.
            off = 4 * (2 * values.size) ** -0.5
            assert np.std(values) == pytest.approx(scales.pop(name), rel=off), name
    assert not scales


def test_init_draws_no_two_parameters_alike(made):
    kernels = [leaf for leaf in jax.tree.leaves(made) if leaf.ndim == 2]
    assert len({float(leaf[0, 0]) for leaf in kernels}) == len(kernels)


# Refusals.


def test_a_batch_packed_on_one_side_only_is_refused(batch):
    with pytest.raises(DataError, match="found only decoder_segment_ids"):
        apply(PARAMS, {**batch, "decoder_segment_ids": np.ones((4, T), np.int32)})


def test_decoder_tokens_of_other_inputs_are_refused(batch):
    encoded = jax.ShapeDtypeStruct((4, S, CONFIG.d_model), jnp.float32)
    for shape in ((3, T), (T,), (4, 2, 1, T)):
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        mask = jax.ShapeDtypeStruct((4, S), bool)
        with pytest.raises(DataError, match=r"expected \[B, T\] or \[B, C, T\] for B = 4"):
            jax.eval_shape(decode, PARAMS, encoded, mask, tokens)
