"""Merging checkpoints: the in-memory merge's bits, whatever the blocks; every bad input refused."""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import CheckpointError, MergeError
from m2l.merging import Recipe, merge, merge_params

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
