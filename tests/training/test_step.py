"""The training step: parts of a batch, clipping, freezing, against what they are to equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import models, partitioning
from m2l.errors import ConfigError
from m2l.training import losses, state
from m2l.training.optimizers import Optimizer

SGD, PLAIN = Optimizer("sgd"), state.Objective()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = {
        name: rng.integers(2, 1000, (8, length), dtype=np.int32)
        for name, length in (
            ("encoder_input_tokens", 12),
            ("decoder_input_tokens", 6),
            ("decoder_target_tokens", 6),
        )
    }
    # Parts with different numbers of targets: a mean of means would be another gradient.
    weights = np.arange(6)[None] < np.array([6, 1, 5, 2, 6, 1, 3, 1])[:, None]
    return tokens | {"decoder_loss_weights": weights.astype(np.int32)}


@pytest.fixture(scope="module")
def stepped(tiny_config, tiny_params, batch):
    """One step with learning rate 1; returns the parameters' changes and the metrics."""
    before = jax.tree.map(np.array, tiny_params)

    def run(optimizer, objective=PLAIN):
        mesh = partitioning.make_mesh()
        placed = state.shardings(tiny_config, optimizer, mesh)
        current = jax.device_put(
            state.from_params(optimizer, jax.tree.map(jnp.copy, before)), placed
        )
        step = state.train_step(tiny_config, optimizer, models.Execution(), mesh, objective)
        with jax.set_mesh(mesh):
            after, metrics = step(current, batch, np.float32(1.0), jax.random.key(0))
        changes = jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b), after.params, tiny_params
        )
        return changes, {name: float(value) for name, value in metrics.items()}, after

    return run


@pytest.fixture(scope="module")
def gradient(stepped):
    return stepped(SGD)


def assert_close(found, expected, rtol=2e-4):
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6 * largest),
        found,
        expected,
    )


def test_a_batch_in_parts_has_the_gradient_of_the_whole(stepped, gradient):
    changes, metrics, _ = gradient
    for parts in (2, 4):
        of_parts, in_parts, _ = stepped(SGD, state.Objective(accumulate=parts))
        # float32 sums in another order
        assert_close(of_parts, changes)
        assert in_parts == pytest.approx(metrics, rel=1e-5)


def test_every_device_keeps_its_rows_when_they_are_dealt_out():
    parts = state._in_parts(2, jnp.arange(8))
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_clipped_gradient_has_the_norm_asked_for_and_its_direction(stepped, gradient):
    changes, metrics, _ = gradient
    norm = metrics["gradient_norm"]
    clipped, of_clipped, _ = stepped(dataclasses.replace(SGD, clip=norm / 3))
    assert_close(clipped, jax.tree.map(lambda leaf: leaf / 3, changes), rtol=1e-5)
    assert of_clipped["gradient_norm"] == pytest.approx(norm, rel=1e-6)
    loose, _, _ = stepped(dataclasses.replace(SGD, clip=norm * 3))
    assert_close(loose, changes, rtol=1e-6)


def test_frozen_parameters_keep_their_bits_and_have_no_state(stepped, gradient):
    frozen = Optimizer("adamw", weight_decay=0.1, freeze=("^encoder/", "token_embedder"))
    changes, metrics, after = stepped(frozen)
    assert not any(leaf.any() for leaf in jax.tree.leaves(changes["encoder"]))
    assert not changes["token_embedder"].any()
    assert all(leaf.any() for leaf in jax.tree.leaves(changes["decoder"]))
    held = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state))
    trained = sum(
        leaf.size
        for name, part in after.params.items()
        if name not in ("encoder", "token_embedder")
        for leaf in jax.tree.leaves(part)
    )
    assert held == 2 * trained + 1
    assert metrics["gradient_norm"] < gradient[1]["gradient_norm"]


def test_a_pattern_that_freezes_nothing_or_all_is_refused(tiny_config):
    mesh = partitioning.make_mesh()
    for pattern, said in (("decodr", "'decodr'"), (".", "nothing to train")):
        optimizer = Optimizer("sgd", freeze=(pattern,))
        with pytest.raises(ConfigError, match=said):
            state.train_step(tiny_config, optimizer, models.Execution(), mesh)
    with pytest.raises(ConfigError, match="not a regular expression"):
        Optimizer("sgd", freeze=("(",))


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.01, 0.0), (0.0, 0.1), (0.01, 0.1)])
def test_z_loss_and_smoothing_are_as_t5x_defines_them(chunk, z_loss, smoothing):
    rng = np.random.default_rng(2)
    hidden, kernel = rng.normal(size=(3, 4, 5)), rng.normal(size=(5, 11))
    targets, weights = rng.integers(0, 11, (3, 4)), rng.integers(0, 2, (3, 4))

    def plain(hidden, kernel):
        logits = hidden @ kernel
        normalizer = jax.nn.logsumexp(logits, -1)
        soft = jnp.where(jnp.arange(11) == targets[..., None], 1 - smoothing, smoothing / 10)
        each = (
            normalizer
            - jnp.sum(soft * logits, -1)
            + jnp.sum(jax.scipy.special.xlogy(soft, soft), -1)
        )
        return jnp.sum((each + z_loss * normalizer**2) * weights)

    def ours(hidden, kernel):
        how = {"chunk": chunk, "z_loss": z_loss, "smoothing": smoothing}
        sums = losses.cross_entropy(hidden, kernel, jnp.int32(targets), jnp.int32(weights), **how)
        return sums["loss"]

    given = jnp.float32(hidden), jnp.float32(kernel)
    for found, expected in zip(
        *(jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(*given)) for loss in (ours, plain)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
