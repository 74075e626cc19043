import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l.errors import UnknownNameError
from m2l.training import optimizers


def _numpy_adafactor(parameter, gradients, learning_rate):
    """Shazeer & Stern (2018), algorithm 5, in float64: factored where both sides reach 128."""
    parameter = parameter.astype(np.float64)
    factored = parameter.ndim == 2 and min(parameter.shape) >= 128
    row = column = full = 0.0
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient.astype(np.float64)
        decay = 1.0 - t**-0.8
        squared = gradient**2 + 1e-30
        if factored:
            row = decay * row + (1 - decay) * squared.sum(axis=1)
            column = decay * column + (1 - decay) * squared.sum(axis=0)
            second_moment = np.outer(row, column) / row.sum()
        else:
            full = second_moment = decay * full + (1 - decay) * squared
        update = gradient / np.sqrt(second_moment)
        update /= max(1.0, np.sqrt(np.mean(update**2)) / 1.0)
        scale = max(1e-3, np.sqrt(np.mean(parameter**2)))
        parameter = parameter - learning_rate * scale * update
    return parameter


@pytest.mark.parametrize("shape", [(128, 256), (130, 128), (64, 256), (128,)])
def test_adafactor_equals_the_published_algorithm(shape):
    rng = np.random.default_rng(0)
    start = rng.normal(scale=0.05, size=shape).astype(np.float32)
    gradients = rng.normal(scale=rng.uniform(0.01, 3.0, shape), size=(6, *shape)).astype(np.float32)

    transformation = optimizers.adafactor()
    parameter, state = jnp.asarray(start), transformation.init(jnp.asarray(start))
    for gradient in gradients:
        update, state = transformation.update(jnp.asarray(gradient), state, parameter)
        parameter = parameter + 0.01 * update

    expected = _numpy_adafactor(start, gradients, 0.01)
    np.testing.assert_allclose(parameter, expected, rtol=2e-5, atol=2e-7)
    assert np.abs(expected - start).max() > 1e-4


def test_adafactor_keeps_two_vectors_for_a_large_kernel():
    state = optimizers.adafactor().init({"kernel": jnp.zeros((512, 256))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 1024


def test_constant_schedule_rises_linearly_and_stays():
    rate = optimizers.schedule("constant", peak=0.4, steps=100, warmup_steps=4)
    np.testing.assert_allclose([rate(s) for s in (0, 1, 3, 4, 99)], [0.1, 0.2, 0.4, 0.4, 0.4])
    assert optimizers.schedule("constant", peak=0.4, steps=9, warmup_steps=0)(0) == 0.4


def test_cosine_schedule_falls_to_half_in_the_middle_and_to_zero_at_the_end():
    rate = optimizers.schedule("cosine", peak=0.4, steps=110, warmup_steps=10)
    np.testing.assert_allclose(
        [rate(s) for s in (4, 9, 10, 60, 110)], [0.2, 0.4, 0.4, 0.2, 0.0], atol=1e-12
    )


def test_unknown_names_propose_the_nearest():
    with pytest.raises(UnknownNameError, match="'adafactor'"):
        optimizers.Optimizer("adafaktor")
    with pytest.raises(UnknownNameError, match="'cosine'"):
        optimizers.schedule("cosin", peak=1.0, steps=1, warmup_steps=0)


def test_linear_schedule_falls_in_a_line_to_zero():
    rate = optimizers.schedule("linear", peak=0.4, steps=110, warmup_steps=10)
    np.testing.assert_allclose(
        [rate(s) for s in (4, 9, 10, 60, 110)], [0.2, 0.4, 0.4, 0.2, 0.0], atol=1e-12
    )


def test_rsqrt_schedule_falls_with_the_root_of_the_step():
    rate = optimizers.schedule("rsqrt", peak=0.01, steps=1, warmup_steps=100)
    np.testing.assert_allclose([rate(s) for s in (49, 99, 399, 9999)], [0.005, 0.01, 0.005, 0.001])


def test_adamw_equals_the_published_algorithm():
    rng = np.random.default_rng(0)
    start, vector = rng.normal(size=(4, 3)), rng.normal(size=3)
    optimizer = optimizers.Optimizer("adamw", weight_decay=0.1, beta1=0.8, beta2=0.9)
    transformation = optimizer.transformation()
    params = {"matrix": jnp.float32(start), "vector": jnp.float32(vector)}
    state = transformation.init(params)
    expected, decay = {"matrix": start, "vector": vector}, {"matrix": 0.1, "vector": 0.0}
    moments = dict.fromkeys(params, (0.0, 0.0))
    for t in range(1, 6):
        gradients = {name: rng.normal(size=leaf.shape) for name, leaf in params.items()}
        updates, state = transformation.update(jax.tree.map(jnp.float32, gradients), state, params)
        params = jax.tree.map(lambda p, u: p + 0.01 * u, params, updates)
        for name, g in gradients.items():
            m, v = moments[name]
            m, v = moments[name] = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            expected[name] = expected[name] - 0.01 * (step + decay[name] * expected[name])
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5)


def test_sgd_descends_along_its_velocity():
    transformation = optimizers.Optimizer("sgd", momentum=0.5).transformation()
    state = transformation.init(jnp.zeros(2))
    gradient = jnp.array([1.0, -2.0])
    first, state = transformation.update(gradient, state)
    second, _ = transformation.update(gradient, state)
    np.testing.assert_array_equal([first, second], [-gradient, -1.5 * gradient])
