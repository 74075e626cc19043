"""Each merge method computes its formula; the identities between the methods hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from m2l.merging import METHODS, Recipe, merge_params
from m2l.merging.methods import Consensus, elect_and_merge, trim

from . import oracles

EXPERTS, SIZE = 4, 1000
# Float32 rounds each of a handful of operations to half a unit in the last place of at most ~4.
TOLERANCE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def models():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(SIZE).astype(np.float32)
    return base, base + (0.1 * rng.standard_normal((EXPERTS, SIZE))).astype(np.float32)


def run(recipe, base, experts):
    tree = None if base is None else {"w": base}
    merged = merge_params(tree, [{"w": expert} for expert in experts], recipe)
    return np.asarray(merged["w"])


def test_average_is_the_mean(models):
    base, experts = models
    found = run(Recipe("average"), base, experts)
    np.testing.assert_allclose(found, oracles.average(experts), **TOLERANCE)


def test_average_weighs(models):
    base, experts = models
    weights = (1.0, 2.5, 0.0, 0.25)
    found = run(Recipe("average", weights=weights), base, experts)
    np.testing.assert_allclose(found, oracles.average(experts, weights), **TOLERANCE)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_average_sums_in_order_and_divides_once(models, n):
    experts = models[1][:n]
    total = experts[0]
    for expert in experts[1:]:
        total = total + expert
    wanted = total / np.float32(n)
    np.testing.assert_array_equal(run(Recipe("average"), None, experts), wanted)


@pytest.mark.parametrize("weights", [None, (1.0, -0.5, 2.0, 0.0)])
def test_task_arithmetic_adds_the_scaled_task_vectors(models, weights):
    base, experts = models
    found = run(Recipe("task_arithmetic", scale=0.4, weights=weights), base, experts)
    wanted = oracles.task_arithmetic(base, experts, 0.4, weights)
    np.testing.assert_allclose(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages(models, density):
    base, experts = models
    found = run(Recipe("ties", density=density, scale=1.3), base, experts)
    np.testing.assert_allclose(found, oracles.ties(base, experts, density, 1.3), **TOLERANCE)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("drop_rate", [0.0, 0.5, 0.9])
def test_dare_ties_drops_rescales_and_then_does_as_ties(models, drop_rate, density):
    base, experts = models
    recipe = Recipe("dare_ties", drop_rate=drop_rate, density=density, scale=0.7, seed=5)
    kept = oracles.kept(5, EXPERTS, "w", SIZE, drop_rate)
    wanted = oracles.dare_ties(base, experts, kept, drop_rate, density, 0.7)
    np.testing.assert_allclose(run(recipe, base, experts), wanted, **TOLERANCE)


def test_ties_keeps_all_magnitudes_equal_to_the_threshold():
    base = np.zeros(10, np.float32)
    expert = np.float32([1, -1, 1, 2, 0.5, 0.5, 0, -1, 0.25, 3])
    found = run(Recipe("ties", density=0.3), base, [expert])
    np.testing.assert_array_equal(found, [1, -1, 1, 2, 0, 0, 0, -1, 0, 3])


def test_a_density_that_rounds_down_to_nothing_leaves_the_base(models):
    base, experts = models
    np.testing.assert_array_equal(run(Recipe("ties", density=0.0009), base, experts), base)


def test_exact_cancellation_leaves_the_base():
    taus = [jnp.float32([1, 1, -1]), jnp.float32([-1, 1, -3]), jnp.float32([0, -2, 1])]
    ones = np.ones(3, np.float32)
    found = elect_and_merge(taus, ones, np.float32(0), Consensus())
    np.testing.assert_array_equal(found, [0, 0, -2])
    positive = elect_and_merge(taus, ones, np.float32(1), Consensus())
    np.testing.assert_array_equal(positive, [1, 1, -2])


def test_trim_compares_with_each_experts_own_threshold():
    taus = [jnp.float32([1, -2, 3])] * 3
    found = trim(taus, jnp.float32([2, 0, np.inf]))
    np.testing.assert_array_equal(found, [[0, -2, 3], [1, -2, 3], [0, 0, 0]])


# Small whole numbers: sums and differences of a few are exact, so order cannot matter.
exact = hnp.arrays(np.float32, (3, 12), elements=st.integers(-8, 8).map(np.float32))
# One shape, so that each recipe is compiled once.
few = settings(max_examples=25, deadline=None)


@few
@given(exact, exact)
def test_task_arithmetic_at_one_over_n_is_the_average(base, experts):
    mean = run(Recipe("average"), None, experts)
    found = run(Recipe("task_arithmetic", scale=1 / 3), base[0], experts)
    np.testing.assert_allclose(found, mean, rtol=0, atol=4e-6)


@few
@given(exact)
def test_ties_of_one_expert_at_density_one_is_task_arithmetic(experts):
    base, expert = experts[0], experts[1:2]
    np.testing.assert_array_equal(
        run(Recipe("ties", density=1.0, scale=0.7), base, expert),
        run(Recipe("task_arithmetic", scale=0.7), base, expert),
    )


@few
@given(exact, st.permutations(range(3)), st.sampled_from(["average", "task_arithmetic", "ties"]))
def test_the_order_of_experts_does_not_matter_where_sums_are_exact(experts, order, method):
    recipe, base = Recipe(method), np.ones(12, np.float32)
    np.testing.assert_array_equal(
        run(recipe, base, experts), run(recipe, base, experts[list(order)])
    )


@few
@given(exact, st.sampled_from([0.5, 2.0, -1.0]), st.sampled_from(["ties", "task_arithmetic"]))
def test_scale_multiplies_the_merged_task_vector(experts, scale, method):
    base = np.zeros(12, np.float32)
    once, scaled = (run(Recipe(method, scale=s), base, experts) for s in (1.0, scale))
    np.testing.assert_array_equal(scaled, scale * once)


@few
@given(exact)
def test_dare_ties_that_drops_nothing_is_ties_that_trims_nothing(experts):
    base = np.ones(12, np.float32)
    np.testing.assert_array_equal(
        run(Recipe("dare_ties", drop_rate=0.0), base, experts),
        run(Recipe("ties", density=1.0), base, experts),
    )


def test_merging_is_differentiable_in_the_experts(models):
    base, experts = models

    def total(expert, recipe):
        merged = merge_params({"w": base}, [{"w": expert}, {"w": experts[1]}], recipe)
        return merged["w"].sum()

    gradient = jax.grad(total)(jnp.asarray(experts[0]), Recipe("task_arithmetic", scale=0.25))
    np.testing.assert_allclose(gradient, 0.25)
    gradient = jax.grad(total)(jnp.asarray(experts[0]), Recipe("average"))
    np.testing.assert_allclose(gradient, 0.5)
    gradient = np.asarray(jax.grad(total)(jnp.asarray(experts[0]), Recipe("ties", density=0.5)))
    kept = oracles.trim(oracles.exact_task_vectors(base, experts[:1])[0], 0.5) != 0
    assert not gradient[~kept].any()
    assert set(gradient[kept].tolist()) == {0.0, 0.5, 1.0}


# A model of 74B parameters whose layers are stacked: a tensor has up to 56B.
LARGE = {
    "embedder": (128256, 8192),
    "attention": (80, 8192, 18432),
    "mlp": (80, 3, 8192, 28672),
    "norm": (80, 8192),
    "vector": ((1 << 32) + 5,),
}
LARGE_RECIPES = [
    (Recipe("average"), 4),
    (Recipe("linear"), 1),
    (Recipe("task_arithmetic"), 4),
    *((Recipe("ties", scope=scope), 4) for scope in ("model", "tensor")),
    (Recipe("dare", drop_rate=0.9), 3),
    (Recipe("dare", drop_rate=0.9, rescale="norm"), 3),
    *((Recipe("dare_ties", drop_rate=0.9, density=0.5, scope=s), 3) for s in ("model", "tensor")),
    *((Recipe("breadcrumbs", scope=scope), 3) for scope in ("model", "tensor")),
    *((Recipe("della", drop_rate=0.5, scope=scope), 3) for scope in ("model", "tensor")),
    (Recipe("ties", zero_sign="majority"), 3),
    (Recipe("slerp"), 2),
    (Recipe("model_stock"), 2),
    (Recipe("fisher"), 2),
]


@pytest.mark.parametrize(("recipe", "experts"), LARGE_RECIPES, ids=lambda value: str(value)[:60])
def test_a_model_of_more_parameters_than_a_word_counts_is_merged_in_memory(recipe, experts):
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in LARGE.items()}
    base = tree if METHODS[recipe.method].needs_base else None
    statistics = [tree] * experts if METHODS[recipe.method].statistic else []
    merged = jax.eval_shape(
        lambda *trees: merge_params(trees[0], trees[1], recipe, trees[2]),
        *(base, [tree] * experts, statistics),
    )
    assert {name: leaf.shape for name, leaf in merged.items()} == LARGE


def test_every_method_that_merges_in_memory_is_tried_on_a_large_model():
    tried = {recipe.method for recipe, _ in LARGE_RECIPES}
    assert tried == {m.name for m in METHODS.values() if not m.whole}


def test_a_methods_signature_says_what_it_needs():
    needs = {m.name: (m.needs_base, m.trims, m.draws) for m in METHODS.values()}
    assert needs == {
        "average": (False, False, False),
        "linear": (True, False, False),
        "task_arithmetic": (True, False, False),
        "ties": (True, True, False),
        "dare": (True, False, True),
        "dare_ties": (True, True, True),
        "della": (True, False, True),
        "breadcrumbs": (True, True, False),
        "slerp": (False, False, False),
        "model_stock": (True, False, False),
        "fisher": (False, False, False),
        "regmean": (False, False, False),
    }
    for method in METHODS.values():
        assert method.summary
