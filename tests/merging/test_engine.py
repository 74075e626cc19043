"""Merging checkpoints: the in-memory merge's bits, whatever the blocks; every bad input refused."""

import errno
import os
import re
import shutil
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import CheckpointError, MergeError
from m2l.merging import (
    Recipe,
    best,
    grid,
    in_memory,
    merge,
    merge_params,
    plan,
    prepare,
    sweep,
)

from . import oracles

MODEL = {"family": "t5", "d_model": 8}
VOCABULARY = {"name": "bytes", "size": 30, "fingerprint": "abc"}
SHAPES = {
    "decoder/layers_00/mlp/wi_0": (8, 31),
    "decoder/layers_01/mlp/wi_0": (8, 31),
    "decoder/norm": (8,),
    "token_embedder": (50, 8),
}
RECIPES = [
    Recipe("average"),
    Recipe("average", weights=(1, 2, 4)),
    Recipe("task_arithmetic", scale=0.3),
    Recipe("ties", density=0.2, scale=1.7),
    Recipe("ties", density=0.4, scope="tensor"),
    Recipe("dare_ties", drop_rate=0.6, seed=4),
    Recipe("dare_ties", drop_rate=0.3, density=0.5, dtype="bfloat16"),
]


def write(path, params, **changes):
    about = {"model": MODEL, "vocabulary": VOCABULARY, "made_by": {"kind": "test"}} | changes
    return checkpoints.save(path, params, **about)


@pytest.fixture(scope="module")
def models():
    rng = np.random.default_rng(1)
    draw = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    experts = [
        {
            name: a + (0.1 * rng.standard_normal(a.shape)).astype(np.float32)
            for name, a in draw.items()
        }
        for _ in range(3)
    ]
    return checkpoints.unflatten(draw), [checkpoints.unflatten(expert) for expert in experts]


@pytest.fixture(scope="module")
def paths(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    base, experts = models
    write(root / "base", base)
    for index, expert in enumerate(experts):
        write(root / f"expert_{index}", expert)
    return root / "base", [root / f"expert_{index}" for index in range(3)]


def whole(tree):
    return np.concatenate([np.ravel(leaf) for leaf in checkpoints.flatten(tree).values()])


def same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert np.asarray(array).dtype == np.asarray(wanted[name]).dtype
        assert np.asarray(array).tobytes() == np.asarray(wanted[name]).tobytes(), name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_checkpoints_merge_to_the_bits_of_the_merge_in_memory(tmp_path, models, paths, recipe):
    manifest = merge(*paths, recipe, tmp_path / "out")
    found = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    same_bits(found, checkpoints.flatten(merge_params(*models, recipe)))
    jitted = jax.jit(lambda base, experts: merge_params(base, experts, recipe))
    same_bits(found, checkpoints.flatten(jitted(*models)))
    assert manifest.dtype == recipe.dtype
    assert Recipe.from_dict(manifest.made_by["recipe"]) == recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_block_size_changes_no_bit(tmp_path, paths, recipe):
    digests = {merge(*paths, recipe, tmp_path / "whole", progress=False).digest}
    for block in (100, 7):
        found = merge(*paths, recipe, tmp_path / str(block), progress=False, block=block)
        digests.add(found.digest)
    assert len(digests) == 1


def test_ties_trims_over_the_whole_model_by_default(tmp_path, models, paths):
    base, experts = models
    merge(*paths, Recipe("ties", density=0.2), tmp_path / "out")
    wanted = oracles.ties(whole(base), np.stack([whole(expert) for expert in experts]), 0.2, 1.0)
    np.testing.assert_allclose(whole(checkpoints.restore(tmp_path / "out")), wanted, atol=2e-6)


def test_ties_trims_each_tensor_when_asked(tmp_path, models, paths):
    merge(*paths, Recipe("ties", density=0.2, scope="tensor"), tmp_path / "out")
    found = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    base, *experts = [checkpoints.flatten(tree) for tree in (models[0], *models[1])]
    for name, array in found.items():
        stack = np.stack([expert[name] for expert in experts])
        np.testing.assert_allclose(array, oracles.ties(base[name], stack, 0.2, 1.0), atol=2e-6)


def test_the_manifest_names_its_parents_and_what_was_kept(tmp_path, models, paths):
    base, experts = paths
    manifest = merge(base, experts, Recipe("ties", density=0.3), tmp_path / "out")
    assert [parent["role"] for parent in manifest.parents] == ["base", *["expert"] * 3]
    for parent, path in zip(manifest.parents, (base, *experts), strict=True):
        assert parent["path"] == str(path)
        assert parent["digest"] == checkpoints.read_manifest(path).digest
    size = whole(models[0]).size
    assert manifest.made_by["diagnostics"]["density"] == pytest.approx(
        [int(0.3 * size) / size] * 3, abs=0
    )
    assert checkpoints.verify(tmp_path / "out") == manifest


def test_average_needs_no_base(tmp_path, paths):
    base, experts = paths
    alone = merge(None, experts, Recipe("average"), tmp_path / "alone")
    beside = merge(base, experts, Recipe("average"), tmp_path / "beside")
    assert [parent["role"] for parent in alone.parents] == ["expert"] * 3
    assert alone.parameters == beside.parameters


def test_excluded_parameters_are_the_bases_and_do_not_count(tmp_path, models, paths):
    recipe = Recipe("ties", density=0.2, exclude=["token_*", "*norm"])
    merge(*paths, recipe, tmp_path / "out")
    found = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    same_bits(found, checkpoints.flatten(merge_params(*models, recipe)))
    base, *experts = [checkpoints.flatten(tree) for tree in (models[0], *models[1])]
    np.testing.assert_array_equal(found["decoder/norm"], base["decoder/norm"])
    kept = [name for name in SHAPES if name.endswith("wi_0")]
    base, found, *experts = [
        np.concatenate([np.ravel(tree[name]) for name in kept]) for tree in (base, found, *experts)
    ]
    np.testing.assert_allclose(found, oracles.ties(base, np.stack(experts), 0.2, 1.0), atol=2e-6)


def test_what_is_not_a_real_number_is_copied(tmp_path):
    for name in ("base", "expert"):
        params = {"steps": np.arange(5, dtype=np.int32), "w": np.full(3, len(name), np.float32)}
        write(tmp_path / name, params)
    recipe = Recipe("task_arithmetic", dtype="bfloat16")
    merge(tmp_path / "base", [tmp_path / "expert"], recipe, tmp_path / "out")
    found = checkpoints.restore(tmp_path / "out")
    np.testing.assert_array_equal(found["steps"], np.arange(5, dtype=np.int32))
    assert found["w"].dtype == ml_dtypes.bfloat16
    assert found["w"].tolist() == [6, 6, 6]


def test_low_precision_inputs_are_merged_in_float32_and_rounded_once(tmp_path, models):
    low = ml_dtypes.bfloat16
    base, *experts = [
        jax.tree.map(lambda leaf: leaf.astype(low), tree) for tree in (models[0], *models[1])
    ]
    names = ["base", "e0", "e1", "e2"]
    for name, tree in zip(names, (base, *experts), strict=True):
        write(tmp_path / name, tree)
    inputs = [tmp_path / name for name in names]
    recipe = Recipe("task_arithmetic", scale=0.5, dtype="bfloat16")
    merge(inputs[0], inputs[1:], recipe, tmp_path / "out")
    stack = np.stack([np.float32(whole(expert)) for expert in experts])
    exact = oracles.task_arithmetic(np.float32(whole(base)), stack, 0.5)
    found = whole(checkpoints.restore(tmp_path / "out"))
    assert (found == exact.astype(np.float32).astype(low)).mean() > 0.999


@pytest.mark.parametrize("rescale", ["expectation", "none"])
def test_della_drops_by_the_rank_of_magnitudes(tmp_path, models, paths, rescale):
    recipe = Recipe("della", drop_rate=0.5, epsilon=0.4, seed=3, scale=0.7, rescale=rescale)
    merge(*paths, recipe, tmp_path / "out", progress=False)
    found = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    base, *experts = [checkpoints.flatten(tree) for tree in (models[0], *models[1])]
    for name, array in found.items():
        taus = oracles.exact_task_vectors(
            base[name].ravel(), np.stack([expert[name].ravel() for expert in experts])
        )
        rates = np.stack([oracles.drop_rates_by_rank(tau, 0.5, 0.4) for tau in taus])
        kept = oracles.kept(3, 3, name, taus.shape[1], rates)
        factor = 1 / (1 - rates) if rescale == "expectation" else 1
        merged = oracles.disjoint_mean(np.where(kept, taus * factor, 0))
        wanted = base[name].ravel() + 0.7 * merged
        np.testing.assert_allclose(array.ravel(), wanted, atol=4e-6, err_msg=name)


def test_linear_ends_at_its_two_models_exactly(tmp_path, models, paths):
    base, experts = paths
    for t, wanted in ((0.0, models[0]), (1.0, models[1][0])):
        merge(base, experts[:1], Recipe("linear", t=t), tmp_path / str(t), progress=False)
        found = checkpoints.restore(tmp_path / str(t))
        same_bits(checkpoints.flatten(found), checkpoints.flatten(wanted))


def test_slerp_keeps_the_norm_of_vectors_at_right_angles(tmp_path):
    for name, vector in (("one", [3, 0, 0, 0]), ("two", [0, 0, 3, 0])):
        write(tmp_path / name, {"w": np.float32(vector)})
    inputs = [tmp_path / "one", tmp_path / "two"]
    merge(None, inputs, Recipe("slerp", t=1 / 3), tmp_path / "out", progress=False)
    found = checkpoints.restore(tmp_path / "out")["w"]
    np.testing.assert_allclose(found, [3 * 3**0.5 / 2, 0, 1.5, 0], atol=1e-6)


def test_model_stock_is_the_mean_of_equal_experts_and_the_base_of_unrelated_ones(tmp_path):
    base = np.zeros(4, np.float32)
    for name, a, b in (("same", [1, 2, 0, 0], [1, 2, 0, 0]), ("apart", [1, 0, 0, 0], [0, 1, 0, 0])):
        for path, vector in (("base", base), ("a", a), ("b", b)):
            write(tmp_path / name / path, {"w": np.float32(vector), "n": np.ones(1, np.float32)})
        inputs = [tmp_path / name / "a", tmp_path / name / "b"]
        recipe = Recipe("model_stock", exclude=["n"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # One expert given twice.
            merge(tmp_path / name / "base", inputs, recipe, tmp_path / f"{name}_out")
        found = checkpoints.restore(tmp_path / f"{name}_out")["w"]
        np.testing.assert_allclose(found, a if name == "same" else base, atol=1e-6)


# ---- bad input: one line, and nothing is written


@pytest.fixture
def refused(tmp_path, paths):
    base, experts = paths

    def check(message, *, kind=MergeError, base=base, experts=experts, recipe=None, out=None):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(kind, match=message) as caught:
            merge(base, experts, recipe or Recipe("task_arithmetic"), out or tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    return check


def test_missing_sources_are_refused(refused, paths, tmp_path):
    refused("at least one expert", experts=[])
    refused("give the base", base=None)
    refused("2 weights for 3 experts", recipe=Recipe("average", weights=(1, 2)))
    refused("no such checkpoint", kind=CheckpointError, experts=[tmp_path / "nowhere"])


def test_an_output_in_the_way_or_inside_an_input_is_refused(refused, paths, tmp_path):
    base, experts = paths
    refused("lies inside an input", out=experts[1] / "merged")
    refused("lies inside an input", out=base)
    (tmp_path / "there").mkdir()
    refused("exists already", kind=CheckpointError, out=tmp_path / "there")


def test_experts_of_another_kind_are_refused_with_the_first_differences(refused, models, tmp_path):
    params = models[1][0]
    write(tmp_path / "words", params, vocabulary=VOCABULARY | {"name": "w", "fingerprint": "x"})
    write(tmp_path / "wide", params, model=MODEL | {"d_model": 9})
    write(tmp_path / "deep", params | {"extra": np.ones(2, np.float32)})
    flat = checkpoints.flatten(params)
    flat["token_embedder"] = np.ones((49, 8), np.float32)
    del flat["decoder/norm"]
    write(tmp_path / "other", checkpoints.unflatten(flat))
    refused("another vocabulary, 'w' of 30 pieces and not 'bytes'", experts=[tmp_path / "words"])
    refused("another model: d_model is 9 and not 8", experts=[tmp_path / "wide"])
    refused("extra is float.2. and not there", experts=[tmp_path / "deep"])
    refused(
        r"decoder/norm is missing and not float\[8\]; token_embedder is float\[49, 8\] and not "
        r"float\[50, 8\]",
        experts=[tmp_path / "other"],
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_a_number_that_is_not_finite_is_refused_with_its_place(
    refused, models, paths, tmp_path, recipe, value
):
    params = jax.tree.map(np.copy, models[1][1])
    params["decoder"]["layers_01"]["mlp"]["wi_0"][3, 4] = value
    write(tmp_path / "bad", params)
    experts = [paths[1][0], tmp_path / "bad", paths[1][2]]
    place = rf"bad: decoder/layers_01/mlp/wi_0\[{3 * 31 + 4}\] \(row-major\) is {value}"
    refused(place, experts=experts, recipe=recipe)


def test_a_merge_that_overflows_its_dtype_is_refused_with_its_place(refused):
    recipe = Recipe("task_arithmetic", scale=1e6, dtype="float16")
    refused(r"the merged token_embedder\[\d+\] is -?inf: too large", recipe=recipe)


def test_large_numbers_whose_sum_overflows_are_still_merged(tmp_path):
    for index in range(3):
        write(tmp_path / str(index), {"w": np.full(4, 3e38, np.float32)})
    inputs = [tmp_path / str(index) for index in range(3)]
    with pytest.warns(UserWarning, match="the same model"):
        merge(inputs[0], inputs[1:], Recipe("task_arithmetic"), tmp_path / "out")
    assert checkpoints.restore(tmp_path / "out")["w"].tolist() == [np.float32(3e38)] * 4


def test_a_damaged_expert_is_refused_by_the_parameters_name(refused, models, paths, tmp_path):
    shutil.copytree(paths[1][0], tmp_path / "damaged")
    content = models[1][0]["token_embedder"].tobytes()
    (file,) = [f for f in tmp_path.rglob("*") if f.is_file() and content in f.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.find(content) + 40] ^= 1
    file.write_bytes(data)
    refused("token_embedder is damaged", kind=CheckpointError, experts=[tmp_path / "damaged"])


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(refused, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        refused(r"out: no space left: \d+.* bytes are needed; nothing", kind=CheckpointError)
    usage = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(r"out: no space left: 3,\d+ bytes are needed, 100 are free", kind=CheckpointError)


def test_an_exclusion_that_means_nothing_is_refused(refused):
    refused("'embedder' matches no parameter", recipe=Recipe("average", exclude=["embedder"]))
    refused("every parameter is excluded", recipe=Recipe("average", exclude=["*"]))


def test_an_expert_given_twice_is_warned_of(tmp_path, paths):
    base, experts = paths
    with pytest.warns(UserWarning, match="expert_1 is the same model as .*expert_1$"):
        merge(base, [experts[1], experts[1]], Recipe("average"), tmp_path / "out")


def test_parameters_in_memory_of_another_shape_are_refused(models):
    base, experts = models
    other = experts[0] | {"decoder": {"norm": np.ones(9, np.float32)}}
    with pytest.raises(MergeError, match="expert 1: decoder/layers_00/mlp/wi_0 has shape none"):
        merge_params(base, [experts[0], other], Recipe("average"))


# ---- merges by statistics of data


@pytest.fixture
def statistics(tmp_path, models, paths):
    """Writes statistics of the experts, as m2l statistics does; says where."""

    def make(kind, trees):
        found = []
        for index, tree in enumerate(trees):
            of = checkpoints.read_manifest(paths[1][index]).digest
            about = {"kind": "statistics", "statistic": kind, "of": of}
            write(tmp_path / f"{kind}_{index}", tree, made_by=about)
            found.append(tmp_path / f"{kind}_{index}")
        return found

    return make


def test_fisher_weighs_each_entry(tmp_path, models, paths, statistics):
    rng = np.random.default_rng(0)
    fishers = [
        jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), tree) for tree in models[1]
    ]
    beside = statistics("fisher", fishers)
    recipe = Recipe("fisher", weights=(1, 2, 0.5))
    merge(None, paths[1], recipe, tmp_path / "out", statistics=beside, block=100, progress=False)
    found = checkpoints.restore(tmp_path / "out")
    same_bits(
        checkpoints.flatten(found),
        checkpoints.flatten(merge_params(None, models[1], recipe, fishers)),
    )
    certain = np.stack([w * whole(f) for w, f in zip((1, 2, 0.5), fishers, strict=True)])
    wanted = (certain * np.stack(list(map(whole, models[1])))).sum(0) / certain.sum(0)
    np.testing.assert_allclose(whole(found), wanted, atol=1e-5)


def test_regmean_solves_for_kernels_and_averages_the_rest(tmp_path, models, paths, statistics):
    rng, name = np.random.default_rng(0), "decoder/layers_01/mlp/wi_0"
    inputs = [rng.standard_normal((50, 8)).astype(np.float32) for _ in range(3)]
    grams = [checkpoints.unflatten({name: x.T @ x}) for x in inputs]
    beside = statistics("gram", grams)
    recipe = Recipe("regmean", nondiagonal_scale=1.0)
    merge(None, paths[1], recipe, tmp_path / "out", statistics=beside, progress=False)
    found = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    same_bits(found, checkpoints.flatten(merge_params(None, models[1], recipe, grams)))
    experts = [checkpoints.flatten(expert) for expert in models[1]]
    for other in SHAPES:
        if other != name:
            mean = oracles.average([expert[other] for expert in experts])
            np.testing.assert_allclose(found[other], mean, atol=1e-6)
    # The kernel is the least-squares fit to what each expert makes of its own inputs.
    outputs = np.concatenate([x @ e[name] for x, e in zip(inputs, experts, strict=True)])
    wanted = np.linalg.lstsq(np.concatenate(inputs), outputs, rcond=None)[0]
    np.testing.assert_allclose(found[name], wanted, atol=1e-4)


def test_statistics_must_be_the_experts_own(refused, paths, statistics, models):
    beside = statistics("fisher", models[1])
    for given, message in (
        ([], "needs the fisher statistics of each expert, in the same order: 0 given for 3"),
        (beside[::-1], "statistics of another model than"),
        (paths[1], "holds no fisher statistics"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(None, paths[1], Recipe("fisher"), "unused", statistics=given)
    with pytest.raises(MergeError, match="average takes no statistics"):
        merge(None, paths[1], Recipe("average"), "unused", statistics=beside)


def test_numbers_of_experts_that_a_method_cannot_merge_are_refused(refused, paths):
    refused("linear merges one expert, not 3", recipe=Recipe("linear"))
    refused("slerp merges two experts, not 3", recipe=Recipe("slerp"), base=None)
    refused("at least two experts", recipe=Recipe("model_stock"), experts=paths[1][:1])


# ---- what a merge will take, and what it found


def test_a_limit_that_is_too_low_says_the_least_that_works(paths, tmp_path):
    little = r"--memory 10.5 MB is too little.* is the least"
    with pytest.raises(MergeError, match=little) as caught:
        merge(*paths, Recipe("ties"), tmp_path / "out", memory=10 << 20)
    least = re.search(r": ([\d.]+ [MG]B) is the least", str(caught.value))[1]
    enough = int(plan.parse_bytes(least) * 1.02)
    assert prepare(*paths, Recipe("ties"), tmp_path / "out", memory=enough).plan.memory <= enough


def test_a_plan_counts_what_is_read_and_written(paths, tmp_path):
    job = prepare(*paths, Recipe("ties", dtype="bfloat16"), tmp_path / "out")
    size = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert (job.plan.parameters, job.plan.experts, job.plan.readings) == (size, 3, 2)
    assert job.plan.read == 2 * 4 * 4 * size
    assert job.plan.write == 2 * size
    halves = [
        prepare(*paths, Recipe("average"), tmp_path / "out", process=(i, 2)) for i in range(2)
    ]
    assert not halves[0].mine & halves[1].mine
    assert halves[0].mine | halves[1].mine == set(SHAPES)


@pytest.mark.parametrize(
    ("text", "count"), [("2GiB", 2 << 30), ("1.5 GB", 15 * 10**8), ("800m", 8 * 10**8), ("7", 7)]
)
def test_memory_is_read_as_people_write_it(text, count):
    assert plan.parse_bytes(text) == count
    with pytest.raises(MergeError, match="no amount of memory"):
        plan.parse_bytes(text + "x")


def test_diagnostics_are_those_of_the_task_vectors(tmp_path, models, paths):
    manifest = merge(*paths, Recipe("ties", density=0.3), tmp_path / "out", progress=False)
    found = manifest.made_by["diagnostics"]
    assert found["share"] == 1.0
    taus = np.stack([whole(expert) - whole(models[0]) for expert in models[1]])
    norms = np.linalg.norm(taus, axis=1)
    np.testing.assert_allclose(found["norms"], norms, rtol=1e-5)
    np.testing.assert_allclose(found["cosines"], taus @ taus.T / np.outer(norms, norms), atol=2e-6)
    kept = np.stack([oracles.trim(tau, 0.3) for tau in taus])
    both = (kept > 0).any(0) & (kept < 0).any(0)
    assert found["sign_conflicts"] == pytest.approx(both.sum() / (kept != 0).any(0).sum(), abs=1e-6)
    groups = found["groups"]
    assert list(groups) == ["decoder/layers_00", "decoder/layers_01", "decoder", "token_embedder"]
    layer = [
        checkpoints.flatten(e)["decoder/layers_00/mlp/wi_0"]
        - checkpoints.flatten(models[0])["decoder/layers_00/mlp/wi_0"]
        for e in models[1]
    ]
    np.testing.assert_allclose(
        groups["decoder/layers_00"]["norms"], [np.linalg.norm(tau) for tau in layer], rtol=1e-5
    )


# ---- in memory, many recipes


def test_a_sweep_scores_every_recipe_and_finds_the_best(models):
    base, experts = models
    recipes = grid({"method": "ties"}, {"density": [0.2, 0.5], "scale": [0.0, 0.5, 1.0]})
    assert [(r.density, r.scale) for r in recipes][:4] == [(0.2, 0), (0.2, 0.5), (0.2, 1), (0.5, 0)]
    wanted = whole(merge_params(base, experts, recipes[4]))
    compiled = in_memory._merge._cache_size()

    def score(params, recipe):
        return -float(np.abs(whole(params) - wanted).sum())

    points = sweep(base, experts, recipes, score)
    assert in_memory._merge._cache_size() == compiled
    assert [point.recipe for point in points] == recipes
    assert best(points) == points[4]
    assert best(points).score == 0
    for point in points:
        np.testing.assert_array_equal(
            score(merge_params(base, experts, point.recipe), point.recipe), point.score
        )
    with pytest.raises(MergeError, match="no values"):
        grid({"method": "ties"}, {"scale": []})
