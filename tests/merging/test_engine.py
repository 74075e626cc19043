"""Merging checkpoints: the in-memory merge's bits, whatever the blocks, and what they should be."""

import hashlib
import shutil
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest

from m2l import checkpoints
from m2l.checkpoints import digest, huggingface_directory, safetensors, saving, zarr
from m2l.checkpoints.spans import boxes
from m2l.errors import CheckpointError, MergeError
from m2l.merging import METHODS, Recipe, merge, merge_params, passes

from . import oracles
from .conftest import (
    ELEMENTWISE,
    MODEL,
    RECIPES,
    SHAPES,
    VOCABULARY,
    default,
    same_bits,
    whole,
    write,
)

MATRIX = [*RECIPES, *map(default, ELEMENTWISE), Recipe("ties", zero_sign="majority")]


@pytest.mark.parametrize("recipe", dict.fromkeys(MATRIX), ids=lambda recipe: recipe.method)
def test_checkpoints_merge_to_the_bits_of_the_merge_in_memory(tmp_path, models, paths, recipe):
    manifest = merge(*paths, recipe, tmp_path / "out")
    found = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    same_bits(found, checkpoints.flatten(merge_params(*models, recipe)))
    if not METHODS[recipe.method].whole:  # Whole matrices are merged on the host.
        jitted = jax.jit(lambda base, experts: merge_params(base, experts, recipe))
        same_bits(found, checkpoints.flatten(jitted(*models)))
    same_bits(found, checkpoints.flatten(merge(*paths, recipe, progress=False)))
    assert manifest.dtype == recipe.dtype
    assert Recipe.from_dict(manifest.made_by["recipe"]) == recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_block_size_changes_no_bit(tmp_path, paths, recipe):
    digests = {merge(*paths, recipe, tmp_path / "whole", progress=False).digest}
    for block in (100, 7):
        found = merge(*paths, recipe, tmp_path / str(block), progress=False, block=block)
        digests.add(found.digest)
    assert len(digests) == 1


def write_boxes(path, params, chunk):
    """Writes a checkpoint whose arrays are stored in boxes, as of a sharded model."""
    arrays = checkpoints.flatten(params)
    for name, array in arrays.items():
        sides = tuple(min(c, n) for c, n in zip(chunk[-array.ndim :], array.shape, strict=True))
        directory = saving.array_directory(path / "params", name)
        writer = zarr.TensorWriter(directory, name, array.shape, array.dtype, sides)
        writer.create()
        for box in boxes(array.shape, sides):
            writer.write(box, array[box])
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    digests = {name: digest.to_hex(digest.of_numpy(array)) for name, array in arrays.items()}
    about = {"model": MODEL, "vocabulary": VOCABULARY, "made_by": {"kind": "test"}}
    checkpoints.describe(path, described, digests, **about)
    return path


def write_directory(path, arrays):
    """Writes a Hugging Face directory with a manifest of m2l's."""
    path.mkdir()
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    extents = safetensors.create(path, described, [[*described]])
    for name, array in arrays.items():
        extents[name].write_from(array.reshape(-1))
    digests = {n: hashlib.sha256(array.tobytes()).hexdigest() for n, array in arrays.items()}
    manifest = checkpoints.Manifest(
        model={},
        vocabulary={"name": None, "size": None, "fingerprint": None},
        dtype="float32",
        step=0,
        made_by={"kind": "test"},
        parents=(),
        parameters=saving.array_records(described, digests),
    )
    huggingface_directory.write(path, manifest, digests)


@pytest.fixture(scope="module")
def boxed(models, tmp_path_factory):
    """The base, and each expert in boxes of its own."""
    root, (base, experts) = tmp_path_factory.mktemp("boxed"), models
    grids = ((3, 4), (50, 8), (8, 3))
    return (
        write_boxes(root / "base", base, (4, 16)),
        [
            write_boxes(root / str(index), expert, grid)
            for index, (expert, grid) in enumerate(zip(experts, grids, strict=True))
        ],
    )


@pytest.mark.parametrize("chunk_bytes", [40, 600, 8 << 20])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_the_layout_in_storage_changes_no_bit(
    tmp_path, paths, boxed, recipe, chunk_bytes, monkeypatch
):
    wanted = merge(*paths, recipe, tmp_path / "rows", progress=False)
    monkeypatch.setattr(zarr, "CHUNK_BYTES", chunk_bytes)
    for name, inputs in (("boxes", boxed), ("mixed", (paths[0], boxed[1]))):
        found = merge(*inputs, recipe, tmp_path / name, progress=False, block=50)
        assert found.parameters == wanted.parameters
        assert checkpoints.verify(tmp_path / name) == found
    in_memory = merge(*boxed, recipe, progress=False, block=50)
    wanted = checkpoints.restore(tmp_path / "rows")
    same_bits(checkpoints.flatten(in_memory), checkpoints.flatten(wanted))


def test_one_function_merges_checkpoints_and_parameters_but_not_both(tmp_path, models, paths):
    recipe = Recipe("average")
    merged = merge(*models, recipe)
    same_bits(checkpoints.flatten(merged), checkpoints.flatten(merge_params(*models, recipe)))
    for base, experts, options, message in (
        (*models, {"out": tmp_path / "out"}, "in memory: leave out what is of checkpoints"),
        (*models, {"subtree": "params"}, "in memory: leave out what is of checkpoints"),
        (paths[0], models[1], {}, "cannot merge checkpoints with parameters in memory"),
        (*paths, {"output_format": "huggingface"}, "merged into memory: leave out output_format"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(base, experts, recipe, **options)
    assert list(tmp_path.iterdir()) == []


def test_damage_in_a_box_is_found_while_it_is_merged(tmp_path, boxed):
    shutil.copytree(boxed[1][0], tmp_path / "damaged")
    file = sorted((tmp_path / "damaged").rglob("token_embedder/**/c*"))[-1]
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged: token_embedder is damaged"):
        merge(boxed[0], [tmp_path / "damaged"], Recipe("average"), tmp_path / "out")


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["orbax", "huggingface", None, "parameters"])
def test_one_expert_at_weight_one_is_copied_bit_for_bit(tmp_path, dtype, to):
    """Subnormal numbers and negative zeros as well, of which arithmetic makes others."""
    rng = np.random.default_rng(2)
    words = rng.integers(0, 1 << 16, (2, 3, 700), np.uint16)
    words[words & 0x7F80 == 0x7F80] = 1
    arrays = {
        name: a.view(ml_dtypes.bfloat16).astype(dtype) for name, a in zip("ab", words, strict=True)
    }
    arrays["a"][0, :2] = -0.0, 1e-39
    scaled = (("b", (0.5,)),)
    if to == "parameters":
        found = merge_params(None, [arrays], Recipe("weighted_sum", dtype=dtype, scales=scaled))
    else:
        inputs = tmp_path / "inputs"
        if to == "huggingface":
            write_directory(inputs, arrays)
        else:
            write_boxes(inputs, arrays, (2, 90))
        recipe, out = Recipe("weighted_sum", dtype=dtype, scales=scaled), to and tmp_path / "out"
        found = merge(None, [inputs], recipe, out, progress=False, block=50)
        if to == "huggingface":
            assert huggingface_directory.verify(out) == found
            found = {n: t.read_checked() for n, t in safetensors.open_tensors(out).items()}
        elif to is not None:
            assert checkpoints.verify(out) == found
            found = checkpoints.restore(out)
    same_bits({"a": found["a"]}, {"a": arrays["a"]})
    half = (arrays["b"].astype(np.float32) / 2).astype(dtype)
    normal = np.abs(half.astype(np.float32)) > 1e-37
    np.testing.assert_array_equal(np.asarray(found["b"])[normal], half[normal])


@pytest.mark.parametrize("damage", ["digest", "nan"])
@pytest.mark.parametrize("to", ["orbax", "huggingface"])
def test_a_copy_of_what_is_damaged_or_not_finite_is_refused(tmp_path, to, damage):
    arrays = {"a": np.ones((3, 70), np.float32)}
    arrays["a"][1, 3] = np.nan if damage == "nan" else 1
    if to == "huggingface":
        write_directory(tmp_path / "inputs", arrays)
        file = tmp_path / "inputs" / "model.safetensors"
    else:
        write_boxes(tmp_path / "inputs", arrays, (3, 70))
        (file,) = (tmp_path / "inputs").rglob("c.*")
    if damage == "digest":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    message = "only finite" if damage == "nan" else "a (is damaged|does not have the digest)"
    with pytest.raises((CheckpointError, MergeError), match=message):
        merge(None, [tmp_path / "inputs"], Recipe("average"), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]
    options = {"verify": False, "progress": False}
    if damage == "digest":
        merge(None, [tmp_path / "inputs"], Recipe("average"), tmp_path / "out", **options)


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


def test_samples_of_chunks_tell_what_samples_of_rows_tell(tmp_path, paths, boxed, monkeypatch):
    found = []
    for name, inputs in (("rows", paths), ("boxes", boxed)):
        # As of a model of which a part is looked at, and where a sample says where to look.
        monkeypatch.setattr(passes, "SAMPLED", 500)
        monkeypatch.setattr(passes, "SKIPPED", 2)
        monkeypatch.setattr(passes, "RUNS", 16)
        monkeypatch.setattr(passes, "RUN", 8)
        monkeypatch.setattr(passes, "_CELL", 32)
        monkeypatch.setenv("M2L_CACHE", str(tmp_path / "cache" / name))
        recipe = Recipe("ties", density=0.3)
        found.append(merge(*inputs, recipe, tmp_path / name, progress=False, block=50))
    rows, boxes_ = found
    assert rows.parameters == boxes_.parameters
    one, two = (manifest.made_by["diagnostics"] for manifest in found)
    assert one["density"] == two["density"]
    assert one["parameters"] == two["parameters"]
    assert 0.3 < two["share"] < 0.8
    np.testing.assert_allclose(two["norms"], one["norms"], rtol=0.2)
