"""Merges by statistics of data: each entry's Fisher information, each kernel's Gram."""

import tracemalloc

import jax
import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import Recipe, merge, merge_params, prepare
from m2l.merging.job import spell
from m2l.merging.statistical import gram_bytes, mats, regmean

from . import oracles
from .conftest import SHAPES, same_bits, whole, write


@pytest.fixture
def statistics(tmp_path, models, paths):
    """Writes statistics of the experts, or of all models, as m2l statistics does; says where."""

    def make(kind, trees):
        found = []
        for index, tree in enumerate(trees):
            model = [paths[0], *paths[1]][index - len(trees)]
            of = checkpoints.read_manifest(model).digest
            about = {"kind": "statistics", "statistic": kind, "of": of}
            found.append(tmp_path / f"{kind}_{index}_of_{len(trees)}")
            write(found[-1], tree, made_by=about)
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
    in_memory = merge(None, paths[1], recipe, statistics=beside, block=100, progress=False)
    same_bits(checkpoints.flatten(found), checkpoints.flatten(in_memory))
    certain = np.stack([w * whole(f) for w, f in zip((1, 2, 0.5), fishers, strict=True)])
    wanted = (certain * np.stack(list(map(whole, models[1])))).sum(0) / certain.sum(0)
    np.testing.assert_allclose(whole(found), wanted, atol=1e-5)


@pytest.mark.parametrize("count", [3, 4])
def test_gradient_matching_weighs_each_entry_by_the_hessians(
    tmp_path, models, paths, statistics, count
):
    rng = np.random.default_rng(0)
    # Over the many orders of magnitude that squares of gradients have.
    fishers = [
        jax.tree.map(lambda leaf: np.float32(10 ** rng.uniform(-9, 0, leaf.shape)), tree)
        for tree in [models[0], *models[1]][-count:]
    ]
    settings = {"scale": 0.7, "weights": (1, 2, 0.5), "prior": 1e-6, "base_weight": 3}
    recipe = Recipe("gradient_matching", settings)
    beside = statistics("fisher", fishers)
    merge(*paths, recipe, tmp_path / "out", statistics=beside, block=100, progress=False)
    merged = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    same_bits(merged, checkpoints.flatten(merge_params(*models, recipe, fishers)))
    flat = [checkpoints.flatten(tree) for tree in (models[0], *models[1], *fishers)]
    for name, array in merged.items():
        base, *experts = (tree[name] for tree in flat[:4])
        base_fisher = 3 * np.float64(flat[4][name]) if count == 4 else 0 * base
        own = [tree[name] for tree in flat[-3:]]
        wanted = oracles.gradient_matching(base, experts, own, base_fisher, (1, 2, 0.5), 1e-6, 0.7)
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-5)


def test_gradient_matching_lies_between_fisher_averages_and_task_arithmetic(models):
    rng = np.random.default_rng(0)
    fishers = [jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), t) for t in models[1]]
    alike = {
        Recipe("gradient_matching", prior=0): merge_params(
            None, models[1], Recipe("fisher", floor=0), fishers
        ),
        Recipe("gradient_matching", prior=1e30): merge_params(*models, Recipe("task_arithmetic")),
    }
    for recipe, wanted in alike.items():
        merged = merge_params(*models, recipe, fishers)
        np.testing.assert_allclose(whole(merged), whole(wanted), rtol=0, atol=1e-5)
    # What no expert is sure of moves as in task arithmetic.
    unsure = [jax.tree.map(np.zeros_like, tree) for tree in fishers]
    merged = merge_params(*models, Recipe("gradient_matching", prior=0), unsure)
    np.testing.assert_allclose(whole(merged), whole(wanted), rtol=0, atol=1e-5)


def test_regmean_solves_for_kernels_and_averages_the_rest(tmp_path, models, paths, statistics):
    rng, name = np.random.default_rng(0), "decoder/layers_01/mlp/wi_0"
    inputs = [rng.standard_normal((50, 8)).astype(np.float32) for _ in range(3)]
    grams = [checkpoints.unflatten({name: x.T @ x}) for x in inputs]
    beside = statistics("gram", grams)
    recipe = Recipe("regmean", nondiagonal_scale=1.0)
    merge(None, paths[1], recipe, tmp_path / "out", statistics=beside, progress=False)
    found = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    same_bits(found, checkpoints.flatten(merge_params(None, models[1], recipe, grams)))
    in_memory = merge(None, paths[1], recipe, statistics=beside, progress=False)
    same_bits(found, checkpoints.flatten(in_memory))
    experts = [checkpoints.flatten(expert) for expert in models[1]]
    for other in SHAPES:
        if other != name:
            mean = oracles.average([expert[other] for expert in experts])
            np.testing.assert_allclose(found[other], mean, atol=1e-6)
    # The kernel is the least-squares fit to what each expert makes of its own inputs.
    outputs = np.concatenate([x @ e[name] for x, e in zip(inputs, experts, strict=True)])
    wanted = np.linalg.lstsq(np.concatenate(inputs), outputs, rcond=None)[0]
    np.testing.assert_allclose(found[name], wanted, atol=1e-4)


def test_mats_moves_kernels_and_averages_the_rest(tmp_path, models, paths, statistics):
    rng, name = np.random.default_rng(0), "decoder/layers_01/mlp/wi_0"
    inputs = [rng.standard_normal((50, 8)).astype(np.float32) for _ in range(3)]
    grams = [checkpoints.unflatten({name: x.T @ x}) for x in inputs]
    beside = statistics("gram", grams)
    recipe = Recipe("mats", steps=2, initial_scale=0.5)
    merge(*paths, recipe, tmp_path / "out", statistics=beside, block=100, progress=False)
    merged = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    same_bits(merged, checkpoints.flatten(merge_params(*models, recipe, grams)))
    base, *experts = (checkpoints.flatten(tree) for tree in (models[0], *models[1]))
    kernels, grams = [expert[name] for expert in experts], [x.T @ x for x in inputs]
    np.testing.assert_array_equal(merged[name], mats(name, base[name], kernels, grams, 2, 0.5))
    assert np.abs(merged[name] - oracles.average([e[name] for e in experts])).max() > 1e-3
    for other in {*SHAPES} - {name}:
        mean = oracles.average([expert[other] for expert in experts])
        np.testing.assert_allclose(merged[other], mean, atol=1e-6)
    with pytest.raises(MergeError, match="steps must be a whole number"):
        Recipe("mats", steps=0.5)


def test_statistics_must_be_the_experts_own(refused, paths, statistics, models):
    beside = statistics("fisher", models[1])
    for given, message in (
        ([], "needs the fisher statistics of each expert, in the same order: 0 given for 3"),
        (beside[::-1], "statistics of another model than"),
        (paths[1], "holds no fisher statistics"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(None, paths[1], Recipe("fisher"), "unused", statistics=given)
    beside = statistics("fisher", [models[0], *models[1]])
    for given, message in (
        (beside[:2], "and may have those of the base, first: 2 given for 3"),
        ([*beside[1:], beside[0]], "order of the experts, those of the base first"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(*paths, Recipe("gradient_matching"), "unused", statistics=given)
    with pytest.raises(MergeError, match="average takes no statistics"):
        merge(None, paths[1], Recipe("average"), "unused", statistics=beside)


def test_regmean_is_planned_with_its_largest_kernel_and_grams(paths, statistics):
    name, side = "decoder/layers_01/mlp/wi_0", 8
    gram = checkpoints.unflatten({name: np.eye(side, dtype=np.float32)})
    beside = statistics("gram", [gram] * 3)
    job = prepare(None, paths[1], Recipe("regmean"), "unused", statistics=beside)
    assert job.plan.whole == gram_bytes(SHAPES[name], side, False)
    job = prepare(*paths, Recipe("mats"), "unused", statistics=beside)
    assert job.plan.whole == gram_bytes(SHAPES[name], side, True)
    assert prepare(None, paths[1], Recipe("average"), "unused").plan.whole == 0
    told = dict(job.plan.rows())["memory"]
    assert told.startswith(f"{spell(job.plan.memory)} at most, {spell(job.plan.whole)}")
    with pytest.raises(MergeError, match=r"is too little .* for the largest parameter"):
        prepare(None, paths[1], Recipe("regmean"), "unused", statistics=beside, memory=1 << 20)


@pytest.mark.parametrize("shape", [(512, 64), (128, 4, 128), (32, 4096)])
@pytest.mark.parametrize("method", ["regmean", "mats"])
def test_grams_take_what_is_planned_whatever_the_number_of_experts(method, shape):
    def drawn(count):
        rngs = [np.random.default_rng(index) for index in range(count)]
        kernels = (rng.standard_normal(shape, np.float32) for rng in rngs)
        return kernels, (np.diag(rng.random(shape[0], np.float32)) for rng in rngs)

    planned = gram_bytes(shape, shape[0], method == "mats")
    base = np.zeros(shape, np.float32)
    for count in (2, 6):
        tracemalloc.start()
        if method == "regmean":
            regmean("w", *drawn(count))
        else:
            mats("w", base, *drawn(count), 3, 0.3)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert planned / 2 < most <= planned


def test_regmean_in_blocks_of_any_size_has_the_same_bits(tmp_path, paths, statistics):
    name = "decoder/layers_01/mlp/wi_0"
    beside = statistics("gram", [checkpoints.unflatten({name: np.eye(8, dtype=np.float32)})] * 3)
    digests = {
        merge(
            *(None, paths[1], Recipe("regmean"), tmp_path / str(block)),
            statistics=beside,
            block=block,
            progress=False,
        ).digest
        for block in (7, 100, None)
    }
    assert len(digests) == 1
