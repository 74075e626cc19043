import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l.training import losses


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(3, 6, 5)).astype(np.float32)
    kernel = rng.normal(size=(5, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (3, 6)).astype(np.int32)
    weights = (rng.random((3, 6)) < 0.6).astype(np.int32)
    return hidden, kernel, targets, weights


@pytest.mark.parametrize("chunk", [0, 1, 2, 4])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_cross_entropy_is_the_summed_negative_log_softmax_of_the_weighted_targets(
    batch, softcap, chunk
):
    hidden, kernel, targets, weights = batch
    logits = hidden.astype(np.float64) @ kernel
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, targets[..., None], -1)[..., 0]
    sums = losses.cross_entropy(*batch, softcap=softcap, chunk=chunk)

    np.testing.assert_allclose(sums["loss"], -(np.log(chosen) * weights).sum(), rtol=1e-5)
    assert float(sums["weight"]) == weights.sum()
    assert float(sums["correct"]) == ((logits.argmax(-1) == targets) * weights).sum()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_its_gradient_is_that_of_automatic_differentiation(batch, softcap, chunk, tied):
    *_, targets, weights = batch

    def plain(hidden, kernel):
        logits = hidden @ kernel
        logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -3.0 * jnp.sum(log_p * weights)

    def ours(hidden, kernel):
        how = {"softcap": softcap, "chunk": chunk, "tied": tied}
        return 3.0 * losses.cross_entropy(hidden, kernel, targets, weights, **how)["loss"]

    for found, expected in zip(
        *(jax.grad(loss, (0, 1))(*batch[:2]) for loss in (ours, plain)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_target_among_several_largest_logits_is_correct():
    hidden, kernel = np.ones((1, 4, 2), np.float32), np.array([[1, 0, 1], [1, 0, 1]], np.float32)
    targets, weights = np.array([[0, 1, 2, 2]]), np.array([[1, 1, 1, 0]])
    assert float(losses.cross_entropy(hidden, kernel, targets, weights)["correct"]) == 2.0


def test_gradients_keep_the_dtypes_of_what_they_are_of(batch):
    hidden, kernel, targets, weights = batch
    loss = functools.partial(losses.cross_entropy, targets_BxT=targets, weights_BxT=weights)
    of_hidden, of_kernel = jax.grad(lambda h, k: loss(h, k)["loss"], (0, 1))(
        jnp.asarray(hidden, jnp.bfloat16), kernel
    )
    assert (of_hidden.dtype, of_kernel.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("chunk", [0, 2])
def test_what_stands_at_padding_changes_nothing(batch, chunk):
    hidden, kernel, targets, _ = batch
    weights = np.array([[1, 1, 0, 0, 0, 0]] * 3)
    other = hidden.copy()
    other[:, 2:] = 50.0
    np.testing.assert_array_equal(
        losses.cross_entropy(hidden, kernel, targets, weights, chunk=chunk)["loss"],
        losses.cross_entropy(other, kernel, targets, weights, chunk=chunk)["loss"],
    )


def test_targets_that_count_come_first_and_chunks_of_others_are_skipped(batch):
    hidden, kernel, targets, _ = batch
    weights = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]])
    # A NaN would show, even with a weight of 0; the third row has one place to fill.
    needed = (weights != 0) | (np.arange(6) == 1) & (np.arange(3) == 2)[:, None]
    spoilt = np.where(needed[..., None], hidden, np.nan)

    def loss(hidden):
        return losses.cross_entropy(hidden, kernel, targets, weights, chunk=2)["loss"]

    for result, expected in zip(
        jax.value_and_grad(loss)(spoilt), jax.value_and_grad(loss)(hidden), strict=True
    ):
        np.testing.assert_array_equal(result, expected)
