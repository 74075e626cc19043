"""Adapters made of differences: the best of their rank, with the error that is reported."""

import json

import numpy as np
import pytest
from safetensors import numpy as official

from m2l import checkpoints
from m2l.checkpoints import huggingface
from m2l.checkpoints.spans import read_whole
from m2l.errors import CheckpointError, MergeError
from m2l.merging import Recipe, extract, low_rank, merge, merge_into_adapter
from tests.merging.test_adapted_experts import LAYER, SHAPES, save

QUERY, UP = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.up_proj.weight"
VOCABULARY = {"name": "bytes", "size": 12, "fingerprint": "x"}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and a model that differs from it in two matrices and a norm."""
    root = tmp_path_factory.mktemp("low_rank")
    tensors = draw(0)
    changed = tensors | {n: tensors[n] + draw(1)[n] for n in (QUERY, UP, "model.norm.weight")}
    return save(root / "base", tensors), save(root / "model", changed)


def cut(matrix, rank):
    """The best matrix of a rank, in float64, and what share of the matrix it misses."""
    left, sizes, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    error = np.sqrt((sizes[rank:] ** 2).sum() / (sizes**2).sum())
    return left[:, :rank] * sizes[:rank] @ right[:rank], error


def test_factors_are_the_truncated_decomposition_and_errors_are_theirs(models, tmp_path):
    base, model = models
    manifest = extract(model, base, tmp_path / "adapter", rank=3)
    theta, adapted = (
        checkpoints.open(path, native=True).parameters
        for path in (base, f"{base}+{tmp_path / 'adapter'}")
    )
    squares = []
    for name in (QUERY, UP):
        wanted, error = cut(draw(1)[name], 3)
        found = read_whole(adapted[name]) - read_whole(theta[name])
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        record = manifest.made_by["matrices"][name]
        assert record == {"rank": 3, "error": pytest.approx(error, rel=1e-4)}
        squares.append([(draw(1)[name] ** 2).sum() * e for e in (1, error**2)])
    total, missed = np.sum(squares, axis=0)
    assert manifest.made_by["total_error"] == pytest.approx(np.sqrt(missed / total), rel=1e-4)
    assert manifest.made_by["stored_whole"] == ["model.norm.weight"]
    whole = official.load_file(model / "model.safetensors")["model.norm.weight"]
    assert read_whole(adapted["model.norm.weight"]).tobytes() == whole.tobytes()
    assert [parent["role"] for parent in manifest.parents] == ["base", "model"]


@pytest.mark.parametrize("error", [0.9, 0.5, 0.3])
def test_an_error_gives_each_matrix_the_least_rank(models, tmp_path, error):
    base, model = models
    manifest = extract(model, base, tmp_path / "adapter", error=error, exclude=["*.norm.*"])
    for name, record in manifest.made_by["matrices"].items():
        errors = [cut(draw(1)[name], rank)[1] for rank in range(1, 9)]
        assert record["rank"] == 1 + next(i for i, each in enumerate(errors) if each <= error)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None or QUERY not in manifest.made_by["matrices"]


@pytest.mark.parametrize("rank", [8, 40])
def test_large_matrices_are_cut_as_well_as_by_the_whole_decomposition(monkeypatch, rank):
    """In a random subspace; the spectrum falls slowly, as that of fine-tuning does."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 120)))[0] for n in (180, 120))
    matrix = np.float32(left * (np.arange(1, 121) ** -0.5) @ right.T)
    _, error = cut(matrix, rank)
    monkeypatch.setattr(low_rank, "_EXACT", 16)
    up, sizes, down = low_rank.decompose(matrix, rank, None)
    missed = np.linalg.norm(matrix - up * sizes @ down) / np.linalg.norm(matrix)
    assert len(sizes) == rank
    assert missed == pytest.approx(error, rel=1e-3)
    up, sizes, down = low_rank.decompose(matrix, None, error * 1.001)
    assert len(sizes) == rank


def test_a_model_and_its_base_in_other_formats_give_the_same_adapter(models, tmp_path):
    base, model = models
    extract(model, base, tmp_path / "theirs", rank=2)
    for path in models:
        huggingface.import_checkpoint(path, tmp_path / path.name, vocabulary=VOCABULARY)
    extract(tmp_path / "model", tmp_path / "base", tmp_path / "ours", rank=2)
    one, other = (
        checkpoints.open(f"{base}+{tmp_path / name}", native=True).parameters
        for name in ("theirs", "ours")
    )
    for name in one:
        np.testing.assert_allclose(read_whole(one[name]), read_whole(other[name]), atol=1e-5)


def test_adapters_merge_into_an_adapter_of_their_ranks_together(models, tmp_path):
    """A sum of matrices of rank 2 has rank 4; of a method that trims, the error is what is lost."""
    base, _ = models
    experts = []
    for seed in (2, 3):
        factors = {}
        for name in (QUERY, UP):
            rng, module = np.random.default_rng(seed), name.removesuffix(".weight")
            for half, shape in (("A", (2, SHAPES[name][1])), ("B", (SHAPES[name][0], 2))):
                key = f"base_model.model.{module}.lora_{half}.weight"
                factors[key] = rng.standard_normal(shape, np.float32)
        folder = tmp_path / f"adapter_{seed}"
        folder.mkdir()
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        official.save_file(factors, folder / "adapter_model.safetensors")
        experts.append(f"{base}+{folder}")
    recipe = Recipe("task_arithmetic", scale=0.7)
    out = tmp_path / "sum"
    manifest = merge_into_adapter(base, experts, recipe, out, rank=4, progress=False)
    assert manifest.made_by["total_error"] < 1e-6
    assert manifest.made_by["recipe"] == recipe.to_dict()
    assert [parent["path"] for parent in manifest.parents] == [str(base), *experts]
    wanted = merge(base, experts, recipe)
    found = merge(None, [f"{base}+{out}"], Recipe("average"))
    for name, array in checkpoints.flatten(wanted).items():
        np.testing.assert_allclose(checkpoints.flatten(found)[name], array, atol=1e-5)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    again = merge_into_adapter(base, experts, recipe, out, rank=4, progress=False)
    assert again.digest == manifest.digest
    ties = Recipe("ties", density=0.3)
    manifest = merge_into_adapter(base, experts, ties, tmp_path / "ties", rank=4, progress=False)
    assert 0.05 < manifest.made_by["total_error"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a rank or an error"),
        ({"rank": 2, "error": 0.1}, "either a rank or an error"),
        ({"rank": 0}, "a rank of 0: expected 1 or more"),
        ({"error": 1.0}, r"an error of 1.0: expected a share"),
    ],
)
def test_ranks_and_errors_that_cannot_be_are_refused(models, tmp_path, options, message):
    base, model = models
    with pytest.raises(MergeError, match=message):
        extract(model, base, tmp_path / "out", **options)


def test_models_that_do_not_fit_or_do_not_differ_are_refused(models, tmp_path):
    base, model = models
    other = save(tmp_path / "other", draw(0), rope_theta=5.0)
    with pytest.raises(MergeError, match="another model: rope"):
        extract(other, base, tmp_path / "out", rank=2)
    with pytest.raises(MergeError, match="does not differ from"):
        extract(save(tmp_path / "same", draw(0)), base, tmp_path / "out", rank=2)
    extract(model, base, tmp_path / "out", rank=2)
    with pytest.raises(CheckpointError, match="exists"):
        extract(model, base, tmp_path / "out", rank=3)
    tensors = draw(0) | {"router.table": np.zeros((2, 2), np.float32)}
    one = save(tmp_path / "one", tensors)
    two = save(tmp_path / "two", tensors | {"router.table": np.ones((2, 2), np.float32)})
    with pytest.raises(MergeError, match=r"router.table differs .* --exclude 'router.table'"):
        extract(two, one, tmp_path / "none", rank=1)
