"""Each merge method computes its formula; the identities between the methods hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from m2l.errors import MergeError
from m2l.merging import METHODS, Recipe, merge, merge_params
from m2l.merging.methods import Consensus, elect_and_merge, trim

from . import oracles
from .conftest import write

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


WEIGHTS = (1.0, 2.5, 0.5, 0.25)
FORMULAS = {
    "tall_masks": (
        {"mask_threshold": 0.5, "weights": WEIGHTS},
        lambda base, experts: oracles.tall_mask_models(base, experts, 0.5, WEIGHTS),
    ),
    "tall_masks of one": (
        {"weights": (0, 1, 0, 0)},
        lambda base, experts: oracles.tall_mask_models(base, experts, 0.4, (0, 1, 0, 0)),
    ),
    "consensus_ta": (
        {"mask_threshold": 0.5, "agreement": 2, "scale": 0.7},
        lambda base, experts: oracles.consensus_ta(base, experts, 0.5, 2, 0.7),
    ),
    "ram_plus": (
        {"reinforcement": 0.7, "overlap_limit": 2, "epsilon": 0.1},
        lambda base, experts: oracles.ram_plus(base, experts, 0.7, 2, 0.1),
    ),
    "ram_plus of much in common": (
        {"epsilon": 0.01},
        lambda base, experts: oracles.ram_plus(base, experts, 0.1, 0.2, 0.01),
    ),
    "sce": (
        {"density": 0.1, "scale": 0.7},
        lambda base, experts: oracles.sce(base, experts, 0.1, 0.7),
    ),
    "sce of all": ({}, lambda base, experts: oracles.sce(base, experts, 1.0, 1.0)),
    "emr": (
        {"weights": WEIGHTS},
        lambda base, experts: oracles.emr(base, experts, WEIGHTS),
    ),
    "emr of one": (
        {"weights": (0, 0, 1, 0)},
        lambda base, experts: oracles.emr(base, experts, (0, 0, 1, 0)),
    ),
    "localize_and_stitch": (
        {"density": 0.1, "scale": 0.7},
        lambda base, experts: oracles.localize_and_stitch(base, experts, 0.1, 0.7),
    ),
    "multislerp": (
        {"weights": WEIGHTS},
        lambda base, experts: oracles.spherical_mean(experts, WEIGHTS),
    ),
    "task_multislerp": (
        {"weights": WEIGHTS, "scale": 0.5},
        lambda base, experts: base + oracles.spherical_mean(experts - base, WEIGHTS) / 2,
    ),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_a_method_computes_the_formula_of_its_paper(models, case):
    base, experts = models
    settings, formula = FORMULAS[case]
    method = case.split()[0]
    wanted = formula(base, experts)
    base = base if METHODS[method].needs_base else None
    np.testing.assert_allclose(run(Recipe(method, settings), base, experts), wanted, **TOLERANCE)


@pytest.mark.parametrize(("size", "count"), [(20_000, 3), (15_003, 3), (203, 3), (40, 25)])
def test_parameters_compete_within_and_between_tasks_as_in_the_authors_code(tmp_path, size, count):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(size).astype(np.float32)
    experts = base + rng.standard_normal((count, size)).astype(np.float32)
    wanted = oracles.pcb(base, experts, 0.1, 0.7)
    np.testing.assert_allclose(run(Recipe("pcb", scale=0.7), base, experts), wanted, **TOLERANCE)
    if size == 203:
        for name, array in (
            ("base", base),
            ("0", experts[0]),
            ("1", experts[1]),
            ("2", experts[2]),
        ):
            write(tmp_path / name, {"w": array})
        paths = tmp_path / "base", [tmp_path / str(index) for index in range(3)]
        # What is in the cache for the least of all magnitudes is not that magnitude.
        merge(*paths, Recipe("ties", density=(1, 0.5, 1)), progress=False)
        merged = merge(*paths, Recipe("pcb", scale=0.7), progress=False)
        np.testing.assert_allclose(merged["w"], wanted, **TOLERANCE)


@pytest.mark.parametrize("method", ["sce", "pcb"])
def test_where_fewer_entries_count_than_asked_for_those_are_kept(tmp_path, method):
    base, taus = np.zeros(10, np.float32), np.ones((2, 10), np.float32)
    # The others do not vary, and score 0.
    taus[:, :7] = [[0], [0]] if method == "pcb" else [[1], [1]]
    taus[:, 7:] = [[1, 2, 3], [3, 4, 4]]
    recipe = Recipe(method, density=0.5)
    merged = run(recipe, base, taus)
    assert merged[8:].all() and not merged[:7].any()
    for name, array in (("base", base), ("0", taus[0]), ("1", taus[1])):
        write(tmp_path / name, {"w": array})
    experts = [tmp_path / "0", tmp_path / "1"]
    manifest = merge(tmp_path / "base", experts, recipe, tmp_path / "out", progress=False)
    assert manifest.made_by["diagnostics"]["density"] == [0.3, 0.3]
    np.testing.assert_array_equal(merge(tmp_path / "base", experts, recipe)["w"], merged)


def test_of_outliers_and_density_above_all_the_density_counts():
    expert = np.arange(1, 11, dtype=np.float32)
    for density, gamma, outliers in ((0.9, 0.5, 1), (0.95, 0.06, 0), (0.5, 0.3, 3)):
        merged = run(Recipe("breadcrumbs", density=density, gamma=gamma), 0 * expert, [expert])
        lowest = 10 - outliers - int(10 * density)
        wanted = [0] * lowest + [*range(lowest + 1, 11 - outliers)] + [0] * outliers
        np.testing.assert_array_equal(merged, wanted)


@pytest.mark.parametrize(
    ("settings", "experts", "message"),
    [({"agreement": 3}, 2, "agreement 3 of 2 experts"), ({}, 1, "at least 2 experts, not 1")],
)
def test_an_agreement_that_no_entry_can_have_is_refused(models, settings, experts, message):
    with pytest.raises(MergeError, match=message):
        run(Recipe("consensus_ta", settings), models[0], models[1][:experts])


@pytest.mark.parametrize("method", ["ram_plus", "sce", "emr", "pcb"])
def test_what_is_taken_over_the_model_is_that_of_one_parameter_of_all_its_entries(models, method):
    settings = {
        "sce": {"density": 0.1},
        "ram_plus": {"epsilon": 0.1, "overlap_limit": 50},
        "pcb": {"density": 0.3},
    }
    recipe = Recipe(method, settings.get(method, {}), scope="model")

    def cut(array):
        return {"a": array[:300], "b": array[300:].reshape(-1, 7)}

    base, experts = models
    merged = merge_params(cut(base), [cut(expert) for expert in experts], recipe)
    wanted = run(recipe, base, experts)
    np.testing.assert_allclose(
        np.concatenate([merged["a"], merged["b"].reshape(-1)]), wanted, **TOLERANCE
    )
    alone = run(recipe, base[:300], experts[:, :300])
    assert not np.allclose(merged["a"], alone, **TOLERANCE)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (3, 1, 0.5, 2)])
def test_from_the_karcher_mean_the_ways_to_all_experts_add_up_to_nothing(models, weights):
    experts = np.float64(models[1])
    mean = run(Recipe("karcher", iterations=50, weights=weights), None, models[1])
    lengths = np.linalg.norm(experts, axis=1)
    shares = np.array(weights) / sum(weights)
    np.testing.assert_allclose(np.linalg.norm(mean), shares @ lengths, rtol=1e-6)
    point = np.float64(mean) / np.linalg.norm(mean)
    units = experts / lengths[:, None]
    angles = np.arccos(units @ point)[:, None]
    ways = angles / np.sin(angles) * (units - np.cos(angles) * point)
    assert np.linalg.norm(shares @ ways) < 1e-4 < np.linalg.norm(ways, axis=1).min()


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
@pytest.mark.parametrize("direction", [1, 0, -1])
def test_on_the_sphere_equal_opposite_and_no_directions_give_numbers(models, method, direction):
    vector = models[0]
    merged = run(Recipe(method), None, [vector, direction * vector])
    shares = {1: 1, 0: 0.5, -1: 0}
    if method == "nuslerp":
        shares[0] = 0.5**0.5  # At a right angle.
    elif method == "karcher":
        shares[-1] = 1  # The first.
    np.testing.assert_allclose(merged, shares[direction] * vector, **TOLERANCE)


SPHERICAL = ("nuslerp", "task_nuslerp", "multislerp", "task_multislerp", "karcher")


@pytest.mark.parametrize("method", SPHERICAL)
def test_opposite_vectors_are_told_from_others_in_spite_of_rounding(tmp_path, method):
    rng = np.random.default_rng(0)
    first = {f"{n}_{i}": rng.standard_normal(n) for n in (1, 3, 1000, 20_000) for i in range(4)}
    first["1_0"] = np.array([0.3428080379962921])
    second = {name: -rng.uniform(0.1, 5) * a for name, a in first.items()}
    second["1_0"], second["1000_0"] = np.array([-0.844986617565155]), -0.7 * first["1000_0"]
    base = {name: np.zeros_like(a) for name, a in first.items()}
    trees = [{n: np.float32(a) for n, a in tree.items()} for tree in (base, first, second)]
    paths = [tmp_path / str(index) for index in range(3)]
    for path, tree in zip(paths, trees, strict=True):
        write(path, tree)
    has_base = METHODS[method].needs_base
    in_memory = merge_params(trees[0] if has_base else None, trees[1:], Recipe(method))
    from_disk = merge(paths[0] if has_base else None, paths[1:], Recipe(method), progress=False)
    for name, a in first.items():
        wanted = (a + second[name]) / 2
        if method == "karcher":
            wanted = a * (1 + np.linalg.norm(second[name]) / np.linalg.norm(a)) / 2
        for merged in (in_memory, from_disk):
            np.testing.assert_allclose(merged[name], wanted, rtol=0, atol=4e-6, err_msg=name)


@pytest.mark.parametrize("method", ("slerp", *SPHERICAL, "model_stock"))
def test_gradients_of_equal_opposite_and_no_vectors_are_finite(models, method):
    @jax.jit
    @jax.value_and_grad
    def total(experts):
        base = {"w": jnp.zeros(5)} if METHODS[method].needs_base else None
        merged = merge_params(base, [{"w": expert} for expert in experts], Recipe(method))
        return (merged["w"] * jnp.arange(1.0, 6)).sum()

    opposite = [(1, -1)] * (method != "model_stock")  # There that has a pole.
    for factors in ((0, 0), (1, 0), (0, 1), (1, 1), *opposite):
        value, gradient = total(jnp.outer(jnp.float32(factors), models[0][:5]))
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_one_expert_is_its_own_karcher_mean_however_short():
    vector = np.float32([3e-6, -4e-6])
    np.testing.assert_array_equal(run(Recipe("karcher"), None, [vector]), vector)
    weighted = run(Recipe("karcher", weights=(0, 2)), None, [np.ones(2, np.float32), vector])
    np.testing.assert_array_equal(weighted, vector)


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
    (Recipe("weighted_sum"), 4),
    (Recipe("linear"), 1),
    (Recipe("task_arithmetic"), 4),
    *((Recipe("ties", scope=scope), 4) for scope in ("model", "tensor")),
    (Recipe("dare", drop_rate=0.9), 3),
    (Recipe("dare", drop_rate=0.9, rescale="norm"), 3),
    *((Recipe("dare_ties", drop_rate=0.9, density=0.5, scope=s), 3) for s in ("model", "tensor")),
    *((Recipe("breadcrumbs", scope=scope), 3) for scope in ("model", "tensor")),
    *((Recipe("della", drop_rate=0.5, scope=scope), 3) for scope in ("model", "tensor")),
    (Recipe("ties", zero_sign="majority"), 3),
    (Recipe("della_linear", drop_rate=0.5), 3),
    *((Recipe("breadcrumbs_ties", scope=scope), 3) for scope in ("model", "tensor")),
    (Recipe("nearswap"), 1),
    *((Recipe(name), 2) for name in ("slerp", "nuslerp", "task_nuslerp", "model_stock")),
    *((Recipe(name), 3) for name in ("multislerp", "task_multislerp", "karcher")),
    *((Recipe(name), 3) for name in ("ram", "tall_masks", "consensus_ta")),
    *((Recipe("sce", density=0.1, scope=scope), 3) for scope in ("model", "tensor")),
    *((Recipe("pcb", scope=scope), 3) for scope in ("model", "tensor")),
    *((Recipe(n, scope=scope), 3) for n in ("emr", "ram_plus") for scope in ("model", "tensor")),
    (Recipe("localize_and_stitch"), 3),
    (Recipe("fisher"), 2),
    (Recipe("gradient_matching"), 2),
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
        "weighted_sum": (False, False, False),
        "linear": (True, False, False),
        "task_arithmetic": (True, False, False),
        "ties": (True, True, False),
        "dare": (True, False, True),
        "dare_ties": (True, True, True),
        "della": (True, False, True),
        "della_linear": (True, False, True),
        "breadcrumbs": (True, True, False),
        "breadcrumbs_ties": (True, True, False),
        "nearswap": (True, False, False),
        "model_stock": (True, False, False),
        "fisher": (False, False, False),
        "gradient_matching": (True, False, False),
        "regmean": (False, False, False),
        "mats": (True, False, False),
        "slerp": (False, False, False),
        "nuslerp": (False, False, False),
        "task_nuslerp": (True, False, False),
        "multislerp": (False, False, False),
        "task_multislerp": (True, False, False),
        "karcher": (False, False, False),
        "ram": (True, False, False),
        "ram_plus": (True, False, False),
        "tall_masks": (True, False, False),
        "consensus_ta": (True, False, False),
        "localize_and_stitch": (True, True, False),
        "sce": (True, True, False),
        "emr": (True, False, False),
        "pcb": (True, True, False),
        "tsv_m": (True, False, False),
        "iso_c": (True, False, False),
        "iso_cts": (True, False, False),
        "wudi": (True, False, False),
        "arcee_fusion": (True, False, False),
        "widen": (True, False, False),
        "knots_ties": (True, False, False),
        "core_space": (True, False, False),
        "nuslerp_rows": (False, False, False),
        "nuslerp_columns": (False, False, False),
        "task_nuslerp_rows": (True, False, False),
        "task_nuslerp_columns": (True, False, False),
    }
    for method in METHODS.values():
        assert method.summary
