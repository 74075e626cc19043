"""Products of bfloat16: what they are multiplied and added up in, and where they are float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import models, partitioning
from m2l.models import products
from m2l.training import state
from m2l.training.optimizers import Optimizer

T5 = models.T5Config(
    vocab_size=96,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    tie_word_embeddings=True,
    scale_decoder_outputs=True,
)
LLAMA = models.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


@pytest.fixture
def units(monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    tokens = {name: rng.integers(2, 96, (2, 16), dtype=np.int32) for name in names}
    return tokens | {"decoder_loss_weights": np.ones((2, 16), np.int32)}


def of(config, batch):
    return {name: x for name, x in batch.items() if not (config is LLAMA and "encoder" in name)}


@pytest.mark.parametrize(
    ("execution", "objective"),
    [
        ({}, {}),
        ({"remat": "dots", "dropout_rate": 0.1}, {"loss_chunk": 4}),
        ({"remat": "full", "scan_layers": True}, {"accumulate": 2}),
    ],
)
@pytest.mark.parametrize("config", [T5, LLAMA])
def test_every_product_of_a_bfloat16_step_takes_bfloat16_and_gives_float32(
    config, execution, objective, batch, units
):
    mesh = partitioning.make_mesh()
    step = state.train_step.__wrapped__(
        config,
        Optimizer(),
        models.Execution("bfloat16", **execution),
        mesh,
        state.Objective(**objective),
    )
    abstract = state.abstract(config, Optimizer())
    with jax.set_mesh(mesh):
        lowered = step.lower(abstract, of(config, batch), np.float32(1.0), jax.random.key(0))
    dots = re.findall(r"dot_general.* : \((.*)\) -> (.*?)(?: loc.*)?$", lowered.as_text(), re.M)
    kinds = {tuple(re.findall(r"x(bf16|f32)>", " ".join(dot))) for dot in dots}
    assert kinds == {("bf16", "bf16", "f32")}
    # Forward and two gradients of each weight's product, and of attention's two.
    layers = 1 if execution.get("scan_layers") else 2
    assert len(dots) >= layers * 3 * 9


def test_gradients_are_those_of_the_rounded_operands_added_up_in_float32():
    rng = np.random.default_rng(0)
    x, kernel, cotangent = (
        rng.normal(size=shape).astype(np.float32) for shape in ((64, 512), (512, 48), (64, 48))
    )
    x, cotangent = (jnp.asarray(a, jnp.bfloat16) for a in (x, cotangent))
    result, gradients = jax.vjp(lambda x, k: products.product("rd,dn->rn", x, k), x, kernel)
    of_x, of_kernel = gradients(cotangent)
    exact_x, exact_kernel, exact_cotangent = (
        np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, kernel, cotangent)
    )
    # bfloat16 is rounded to 2^-9; sums of 512 products in float32 are as good as exact.
    for ours, exact in (
        (result, exact_x @ exact_kernel),
        (of_x, exact_cotangent @ exact_kernel.T),
    ):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=1e-3)
    # The gradient of a float32 weight has float32's digits.
    assert of_kernel.dtype == jnp.float32
    np.testing.assert_allclose(of_kernel, exact_x.T @ exact_cotangent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [T5, LLAMA])
def test_scores_in_bfloat16_are_on_average_within_2e_2_nats_of_those_in_float32(
    config, batch, units
):
    params = models.init(config, jax.random.key(0))

    @jax.jit
    def scores(params):
        logits = [
            models.apply(config, params, of(config, batch), execution=models.Execution(dtype))
            for dtype in ("float32", "bfloat16")
        ]
        targets = batch["decoder_target_tokens"][..., None]
        return [jnp.take_along_axis(jax.nn.log_softmax(x), targets, -1)[..., 0] for x in logits]

    exact, low = scores(params)
    difference = float(jnp.mean(jnp.abs(low - exact)))
    # Exactly equal would mean that nothing was computed in bfloat16.
    assert 0 < difference < 2e-2


def test_a_cpu_without_units_for_bfloat16_computes_in_float32_and_says_so(monkeypatch, tmp_path):
    for flags, expected in (("avx2 fma", False), ("avx512f amx_bf16", True), (None, False)):
        file = tmp_path / "cpuinfo"
        file.unlink(missing_ok=True)
        if flags:
            file.write_text(f"flags : {flags}\n")
        monkeypatch.setattr(products, "_CPU_INFO", file)
        assert products.has_bfloat16.__wrapped__() == expected
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    products._say_float32.cache_clear()
    with pytest.warns(UserWarning, match="no units"):
        assert products.computed_in("bfloat16") == jnp.float32
    assert products.computed_in("float16") == jnp.float16
