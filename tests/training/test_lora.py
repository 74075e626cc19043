"""Adapters are trained by the trainer: factors alone move, are saved, resumed and exported."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2l import api, checkpoints, models, partitioning
from m2l.checkpoints.spans import read_whole
from m2l.errors import CheckpointError, ConfigError, UnknownNameError
from m2l.evaluation.model import load
from m2l.models import LlamaConfig
from m2l.training import resources, state
from m2l.training.lora import Lora
from m2l.training.optimizers import Optimizer
from m2l.training.settings import from_flat

from .conftest import SETTINGS
from .test_loop import at_step

LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
)  # fmt: skip
LORA = dataclasses.replace(
    SETTINGS,
    lora="r=2,alpha=6,targets=q+wi_0",
    validation="sentiment",
    evaluate_every=3,
    validation_batches=1,
)


@pytest.fixture(scope="module")
def lora_run(train, whole, tmp_path_factory):
    """An adapter that was trained without interruption."""
    return train(tmp_path_factory.mktemp("lora") / "run", settings=LORA, init=whole)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("r=16", Lora(16, 16.0)),
        ("r=8,alpha=2.5", Lora(8, 2.5)),
        ("alpha=4, targets=q_proj+mlp.up_proj,r=2", Lora(2, 4.0, ("q_proj", "mlp.up_proj"))),
    ],
)
def test_adapters_are_described_in_a_line(text, wanted):
    assert Lora.parse(text) == wanted


@pytest.mark.parametrize(
    "text", ["16", "r=", "r=1.5", "r=0", "alpha=2", "r=2,r=3", "r=2,dropout=1"]
)
def test_other_descriptions_are_refused(text):
    with pytest.raises(ConfigError, match=r"lora|Lora|rank"):
        from_flat(mixture="sentiment", steps=1, lora=text)


def test_targets_are_named_as_hugging_face_does(tiny_config):
    llama = Lora(2, 2.0, ("v_proj", "mlp.down_proj")).modules(LLAMA)
    assert llama == {
        f"decoder/layers_{i:02}/{ours}": f"model.layers.{i}.{theirs}"
        for i in range(2)
        for ours, theirs in (
            ("mlp/wo", "mlp.down_proj"),
            ("self_attention/value", "self_attn.v_proj"),
        )
    }
    everything = Lora(2, 2.0).modules(LLAMA)
    assert len(everything) == 14
    assert "decoder/logits" not in everything
    assert set(Lora(2, 2.0, ("lm_head",)).modules(LLAMA)) == {"decoder/logits"}
    assert not any("relative" in module for module in Lora(2, 2.0).modules(tiny_config).values())
    with pytest.raises(
        UnknownNameError, match="target of lora 'q_pro'; the nearest known one is 'q_p"
    ):
        Lora(2, 2.0, ("q_pro",)).modules(LLAMA)
    with pytest.raises(ConfigError, match="the rank 9 is more than"):
        Lora(9, 2.0).modules(LLAMA)


def test_a_step_is_that_of_the_two_factors_gradients():
    """Written out: theta + s A B in the loss, Adam's first step of each factor."""
    lora = Lora(2, 6.0, ("q_proj", "up_proj"))
    base = models.init(LLAMA, jax.random.key(0))
    optimizer = Optimizer("sgd")
    factors = lora.init(LLAMA, jax.random.key(1))
    drawn = jax.random.normal(jax.random.key(2), (100,))
    factors = jax.tree.map(lambda leaf: leaf + 0.1 * drawn[: leaf.size].reshape(leaf.shape)
                           if leaf.size <= 100 else leaf, factors)  # fmt: skip
    ids = jax.random.randint(jax.random.key(3), (2, 9), 1, 40)
    batch = {
        "decoder_input_tokens": ids[:, :-1],
        "decoder_target_tokens": ids[:, 1:],
        "decoder_loss_weights": jnp.ones((2, 8), jnp.int32),
    }
    batch["decoder_positions"] = jnp.broadcast_to(jnp.arange(8), (2, 8))
    batch["decoder_segment_ids"] = jnp.ones((2, 8), jnp.int32)

    def loss(factors):
        params = checkpoints.flatten(base)
        for name in lora.modules(LLAMA):
            part = checkpoints.flatten(factors)
            params = params | {name: params[name] + 3 * part[f"{name}/down"] @ part[f"{name}/up"]}
        logits = models.apply(LLAMA, checkpoints.unflatten(params), batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    gradients = jax.grad(loss)(factors)
    wanted = jax.tree.map(lambda p, g: p - 0.5 * g, factors, gradients)
    before = jax.tree.map(np.asarray, base)
    for accumulate in (1, 2):
        mesh = partitioning.make_mesh()
        objective = state.Objective(accumulate=accumulate)
        step = state.train_step(LLAMA, optimizer, models.Execution(), mesh, objective, lora)
        current = jax.device_put(
            state.from_params(optimizer, jax.tree.map(jnp.copy, factors)),
            state.shardings(LLAMA, optimizer, mesh, lora),
        )
        with jax.set_mesh(mesh):
            result, metrics = step(current, batch, np.float32(0.5), jax.random.key(0), base)
        assert float(metrics["loss"]) == pytest.approx(float(loss(factors)), rel=1e-5)
        for one, other in zip(*map(jax.tree.leaves, (result.params, wanted)), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6)
        for one, other in zip(*map(jax.tree.leaves, (base, before)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_run_saves_factors_and_their_optimizer_state_alone(lora_run, whole):
    manifest = checkpoints.read_manifest(lora_run)
    ends = {name.rpartition("/")[2] for name in manifest.parameters}
    assert ends == {"down", "up"}
    assert len(manifest.parameters) == 2 * (1 + 2 + 2 + 1 + 2)  # q of self and cross, wi_0
    sizes = [int(np.prod(r["shape"])) for r in manifest.opt_state.values()]
    assert max(sizes) <= 2 * 32
    factors = checkpoints.flatten(checkpoints.restore(lora_run))
    assert all(factors[name].any() for name in factors if name.endswith("/up"))
    with pytest.raises(
        CheckpointError, match=r"factors of an adapter, without the base: name .*\+"
    ):
        checkpoints.open(lora_run)
    with pytest.raises(CheckpointError, match="factors of an adapter, without the base"):
        load(lora_run)


def test_a_stopped_run_goes_on_to_the_same_bits(train, whole, lora_run, tmp_path, monkeypatch):
    from m2l.errors import Stopped

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            train(out, settings=LORA, init=whole)
    last = train(out, settings=LORA, init=whole)
    assert checkpoints.read_manifest(last).digest == checkpoints.read_manifest(lora_run).digest
    exported = "adapter/adapter_model.safetensors"
    assert (out / exported).read_bytes() == (lora_run.parents[1] / exported).read_bytes()


def test_a_finished_run_leaves_an_adapter_that_makes_the_trained_model(lora_run, whole, recwarn):
    adapter = lora_run.parents[1] / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 6, "LORA")
    assert config["base_model_name_or_path"] == str(whole)
    opened = checkpoints.open(f"{whole}+{adapter}")
    assert not [w for w in recwarn if "put on" in str(w.message)]
    factors = checkpoints.flatten(checkpoints.restore(lora_run))
    theta = checkpoints.flatten(checkpoints.restore(whole))
    for name, parameter in opened.parameters.items():
        wanted = theta[name].astype(np.float64)
        if f"{name}/up" in factors:
            wanted = wanted + 3 * factors[f"{name}/down"].astype(np.float64) @ factors[f"{name}/up"]
        np.testing.assert_allclose(read_whole(parameter), wanted, atol=1e-6)
    # The model that validation saw is the one that is evaluated.
    run = lora_run.parents[1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert any("loss" in str(line) and "validation" in str(line) for line in lines)
    results = api.evaluate(f"{whole}+{adapter}", "sentiment", max_examples=2)
    assert all(np.isfinite(result.score) for result in results.values())


def test_an_adapter_needs_a_base(train, tmp_path, lora_run):
    with pytest.raises(ConfigError, match="needs a base: name it with --init"):
        train(tmp_path / "run", settings=LORA)
    assert not (tmp_path / "run").exists()


def test_settings_without_an_adapter_are_what_they_were(lora_run):
    assert "lora" not in SETTINGS.flat()
    assert from_flat(**LORA.flat()) == LORA
    assert checkpoints.read_manifest(lora_run).made_by["settings"]["lora"] == LORA.lora


def test_memory_is_that_of_the_base_and_of_the_factors_state():
    mesh = partitioning.make_mesh()
    settings = from_flat(mixture="x", steps=1, optimizer="adamw", batch_size=8)
    full = resources.memory_need(LLAMA, settings, mesh)
    adapted = resources.memory_need(LLAMA, dataclasses.replace(settings, lora="r=2"), mesh)
    factors = sum(
        4 * int(np.prod(s.shape)) for s in checkpoints.flatten(Lora(2, 2.0).spec(LLAMA)).values()
    )
    assert adapted.opt_state < 2 * factors + 64 < full.opt_state
    assert adapted.gradients < full.gradients + factors


def test_a_moving_average_of_factors_is_an_adapter_as_well(train, whole, tmp_path):
    settings = dataclasses.replace(LORA, steps=3, optimizer=Optimizer(ema=0.5))
    last = train(tmp_path / "run", settings=settings, init=whole)
    average = checkpoints.flatten(checkpoints.restore_average(last))
    opened = checkpoints.open(f"{whole}+{tmp_path / 'run' / 'average'}").parameters
    name = "encoder/layers_00/self_attention/query"
    product = average[f"{name}/down"].astype(np.float64) @ average[f"{name}/up"]
    wanted = checkpoints.flatten(checkpoints.restore(whole))[name] + 3 * product
    np.testing.assert_allclose(read_whole(opened[name]), wanted, atol=1e-6)
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "loss_of_average" in line
