"""Averaging by Fisher information and RegMean against NumPy, least squares and identities."""

import jax
import numpy as np
import pytest

from m2l.errors import MergeError
from m2l.merging.statistical import fisher, mats, regmean

# Sums of three float32 numbers, and a division.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def float32(*arrays):
    return [np.asarray(array, np.float32) for array in arrays]


# --- Fisher ---


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fisher_average_weighs_each_entry_by_its_information(rng, compiled):
    experts = float32(*rng.normal(size=(3, 4, 5)))
    # Over the many orders of magnitude that gradients have, most above the floor.
    fishers = float32(*np.exp(rng.normal(size=(3, 4, 5), scale=8)))
    weights = np.array([1.0, 0.5, 2.0], np.float32)
    average = jax.jit(fisher, static_argnums=3) if compiled else fisher
    found = average(experts, fishers, weights, 1e-6)
    information = weights[:, None, None] * np.maximum(np.array(fishers, np.float64), 1e-6)
    wanted = (information * experts).sum(0) / information.sum(0)
    np.testing.assert_allclose(found, wanted, **TOLERANCE)
    assert found.dtype == np.float32


@pytest.mark.parametrize("value", [0.0, 1e-7, 3.0])
def test_equal_information_gives_the_mean_by_weights(rng, value):
    experts = float32(*rng.normal(size=(2, 6)))
    weights = np.array([1.0, 3.0], np.float32)
    found = fisher(experts, [np.full(6, value, np.float32)] * 2, weights)
    np.testing.assert_allclose(found, 0.25 * experts[0] + 0.75 * experts[1], **TOLERANCE)


def test_without_a_floor_the_smallest_information_decides_and_none_gives_the_mean():
    experts = float32([1, 1, 1], [3, 3, 3])
    fishers = float32([0, 1e-37, 0], [0, 0, 1e-37])
    found = fisher(experts, fishers, np.ones(2, np.float32), floor=0.0)
    np.testing.assert_allclose(found, [2, 1, 3], **TOLERANCE)


def test_an_expert_below_the_floor_counts_as_the_floor():
    found = fisher(float32([0], [1]), float32([0], [3]), np.ones(2, np.float32), 1.0)
    np.testing.assert_allclose(found, [0.75], **TOLERANCE)


# --- RegMean ---


def experts_with_inputs(rng, tokens=40, d_in=6, d_out=4, experts=3):
    """Kernels, and inputs whose features are correlated and of sizes far apart."""
    mixing = rng.normal(size=(d_in, d_in)) * 10.0 ** rng.integers(-3, 3, d_in)
    kernels = rng.normal(size=(experts, d_in, d_out))
    inputs = [rng.normal(size=(tokens, d_in)) @ mixing for _ in range(experts)]
    return kernels, inputs


def grams_of(inputs):
    return [x.T @ x / len(x) for x in inputs]


def test_with_all_of_the_grams_regmean_is_the_least_squares_fit_of_the_outputs(rng):
    kernels, inputs = experts_with_inputs(rng)
    found = regmean("w", kernels, grams_of(inputs), 1.0)
    outputs = [x @ kernel for x, kernel in zip(inputs, kernels, strict=True)]
    wanted = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs), rcond=None)[0]
    # An eigenvalue of the correlations below 1e-5 would be too small to be resolved.
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_regmean_is_the_papers_formula(rng, alpha):
    kernels, inputs = experts_with_inputs(rng)
    grams = grams_of(inputs)
    found = regmean("w", kernels, grams, alpha)
    scaled = [alpha * gram + (1 - alpha) * np.diag(np.diag(gram)) for gram in grams]
    products = sum(gram @ kernel for gram, kernel in zip(scaled, kernels, strict=True))
    np.testing.assert_allclose(found, np.linalg.inv(sum(scaled)) @ products, **TOLERANCE)
    assert found.dtype == np.float32 and found.shape == kernels[0].shape


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_equal_grams_give_the_mean(rng, alpha):
    kernels, inputs = experts_with_inputs(rng)
    for gram in (np.eye(6), grams_of(inputs)[0]):
        found = regmean("w", kernels, [gram] * 3, alpha)
        np.testing.assert_allclose(found, kernels.mean(0), **TOLERANCE)


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_an_input_that_is_always_0_leaves_the_mean_and_others_untouched(rng, alpha):
    kernels, inputs = experts_with_inputs(rng)
    alone = regmean("w", kernels[:, 1:], grams_of([x[:, 1:] for x in inputs]), alpha)
    dead = [np.concatenate([0 * x[:, :1], x[:, 1:]], axis=1) for x in inputs]
    found = regmean("w", kernels, grams_of(dead), alpha)
    np.testing.assert_allclose(found[0], kernels[:, 0].mean(0), **TOLERANCE)
    np.testing.assert_allclose(found[1:], alone, **TOLERANCE)


def test_fewer_tokens_than_inputs_leave_the_solution_nearest_to_the_mean(rng):
    kernels, _ = experts_with_inputs(rng)
    inputs = rng.normal(size=(2, 6))
    grams = [np.float32(gram) for gram in grams_of([inputs, inputs, inputs])]
    found = regmean("w", kernels, grams, 1.0)
    np.testing.assert_allclose(found, kernels.mean(0), rtol=1e-4, atol=1e-4)
    # In float64: an eigenvalue of 1e-5, the regulariser, is only some hundred roundings of float32.
    only = [inputs.T @ inputs, np.zeros((6, 6)), np.zeros((6, 6))]
    found = regmean("w", kernels, only, 1.0)
    # The one expert that has seen anything decides the outputs on what it saw.
    np.testing.assert_allclose(inputs @ found, inputs @ kernels[0], rtol=1e-3, atol=1e-3)
    # Each input in units of its size, no part of the change is in a direction without inputs.
    sizes = np.linalg.norm(inputs, axis=0)
    unseen = np.linalg.svd(inputs / sizes)[2][2:]
    change = sizes[:, None] * (found - kernels.mean(0))
    np.testing.assert_allclose(unseen @ change, 0, atol=1e-4)


def test_no_information_at_all_gives_the_mean(rng):
    kernels, _ = experts_with_inputs(rng)
    found = regmean("w", kernels, [np.zeros((6, 6))] * 3)
    np.testing.assert_allclose(found, kernels.mean(0), **TOLERANCE)


def test_a_kernel_of_several_output_axes_is_merged_as_a_matrix(rng):
    kernels, inputs = experts_with_inputs(rng)
    grams = grams_of(inputs)
    cubes = kernels.reshape(3, 6, 2, 2)
    found = regmean("w", cubes, grams)
    assert found.shape == (6, 2, 2)
    wanted = regmean("w", kernels, grams)
    np.testing.assert_array_equal(found.reshape(6, 4), wanted)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("expert 1.*Gram \\[5, 5\\]", lambda kernel, gram: (kernel, gram[1:, 1:])),
        ("expert 1.*kernel \\[5, 4\\]", lambda kernel, gram: (kernel[1:], gram)),
        ("expert 1.*NaN", lambda kernel, gram: (kernel * np.nan, gram)),
        ("expert 1.*infinity", lambda kernel, gram: (kernel, gram + np.inf)),
        ("expert 1.*not symmetric", lambda kernel, gram: (kernel, np.triu(gram))),
        ("expert 1.*negative", lambda kernel, gram: (kernel, -gram)),
        ("negative eigenvalue", lambda kernel, gram: (kernel, 9 - 8 * np.eye(6))),
    ],
)
def test_what_is_no_gram_of_a_kernel_is_refused_by_name(rng, said, change):
    kernel = rng.normal(size=(6, 4))
    with pytest.raises(MergeError, match=f"mlp/wo.*{said}|mlp/wo: .*{said}"):
        regmean("mlp/wo", *zip((kernel, np.eye(6)), change(kernel, np.eye(6) + 0.1), strict=True))


# --- MaTS ---


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_conjugate_gradients_find_the_best_of_their_krylov_space(rng, steps):
    kernels, base = rng.normal(size=(3, 6, 4)), rng.normal(size=(6, 4))
    grams = grams_of(rng.normal(size=(3, 40, 6)))
    merged = mats("w", np.float32(base), kernels, grams, steps, 0.3, 0.8)
    assert merged.dtype == np.float32
    scaled = [0.8 * gram + 0.2 * np.diag(np.diag(gram)) for gram in grams]
    # Of the kernel as one vector.
    matrix = np.kron(sum(scaled), np.eye(4))
    right = sum(gram @ kernel for gram, kernel in zip(scaled, kernels, strict=True)).ravel()
    start = (base + 0.3 * (kernels - base).sum(0)).ravel()
    residual = right - matrix @ start
    powers = (np.linalg.matrix_power(matrix, k) for k in range(max(steps, 1)))
    space = np.stack([(steps > 0) * power @ residual for power in powers], 1)
    best = np.linalg.lstsq(space.T @ matrix @ space, space.T @ residual, rcond=None)[0]
    np.testing.assert_allclose(merged.ravel(), start + space @ best, rtol=1e-4, atol=1e-5)


def test_many_steps_of_mats_are_regmean_but_for_directions_without_inputs(rng):
    kernels, inputs = rng.normal(size=(3, 6, 2, 2)), rng.normal(size=(3, 40, 6))
    inputs[:, :, 0] = 0
    grams = grams_of(inputs)
    base = rng.normal(size=(6, 2, 2))
    merged = mats("w", base, kernels, grams, 100, 0.3, 0.9)
    wanted = regmean("w", kernels, grams, 0.9)
    wanted[0] = base[0] + 0.3 * (kernels[:, 0] - base[0]).sum(0)
    # It stops where the residual is 1e-5 of the right side.
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-3)
    with pytest.raises(MergeError, match=r"w of expert 0: a kernel"):
        mats("w", base, kernels[:1], [np.eye(5)], 1, 0.3)
