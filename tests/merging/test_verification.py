"""A merge is proven by its own recipe, and what was changed afterwards is told by its index."""

import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import numpy as official

from m2l import checkpoints
from m2l import models as networks
from m2l.checkpoints import huggingface
from m2l.data import tokenizer_files
from m2l.errors import MergeError
from m2l.merging import Recipe, merge, mergekit, mergekit_file, verification, verify

from .conftest import RECIPES
from .test_huggingface_models import LLAMA, decoder, write

TIES = Recipe("ties", density=0.3, scale=1.5)
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


def made(paths, recipe, out, **options):
    base, experts = paths
    merge(base, experts, recipe, out, progress=False, **options)
    return out


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("directories")
    base, *experts = (write(root / str(seed), LLAMA, decoder(seed)) for seed in range(3))
    return base, experts


@pytest.mark.parametrize(
    "recipe", [*RECIPES, Recipe("iso_cts")], ids=lambda recipe: f"{recipe.method}-{recipe.dtype}"
)
def test_a_checkpoint_is_what_its_recipe_gives(paths, recipe, tmp_path):
    out = made(paths, recipe, tmp_path / "out")
    result = verify(out, progress=False)
    size = sum(array.size for array in checkpoints.flatten(checkpoints.restore(out)).values())
    assert (result.compared, result.size, result.differences) == (size, size, ())
    base, experts = paths
    assert verify(out, base, experts, progress=False) == result


def test_the_first_element_that_differs_is_told(paths, tmp_path):
    out = made(paths, TIES, tmp_path / "out")
    manifest = checkpoints.read_manifest(out)
    params = checkpoints.flatten(checkpoints.restore(out))
    expected = {name: array.copy() for name, array in params.items()}
    changed = {name: array.copy() for name, array in params.items()}
    embedding = changed["token_embedder"]
    embedding[7, 2], embedding[41, 0] = -0.0 if embedding[7, 2] == 0 else 0.0, 5.0
    changed["decoder/norm"][3] = np.nextafter(changed["decoder/norm"][3], np.float32(9))
    checkpoints.save(
        tmp_path / "changed",
        checkpoints.unflatten(changed),
        model=manifest.model,
        vocabulary=manifest.vocabulary,
        made_by=manifest.made_by,
        parents=manifest.parents,
    )
    norm, embedder = verify(tmp_path / "changed", progress=False).differences
    assert (norm.parameter, norm.index, norm.count) == ("decoder/norm", (3,), 1)
    assert norm.expected == expected["decoder/norm"][3] and norm.stored != norm.expected
    assert (embedder.parameter, embedder.index, embedder.count) == ("token_embedder", (7, 2), 2)
    assert (embedder.expected, embedder.stored) == (expected["token_embedder"][7, 2], 0)
    only = verify(tmp_path / "changed", only=["decoder/layers_*"], progress=False)
    assert (only.parameters, only.compared, only.differences) == (2, 2 * 8 * 31, ())


def test_a_share_of_the_blocks_is_compared(tmp_path):
    rng = np.random.default_rng(0)
    size = 3 << 20
    about = {"model": {"family": "t5"}, "made_by": {"kind": "test"}}
    about["vocabulary"] = {"name": "bytes", "size": 3, "fingerprint": "a"}
    for name in ("base", "one", "two"):
        params = {"big": rng.standard_normal(size, np.float32), "small": np.ones(3, np.float32)}
        checkpoints.save(tmp_path / name, params, **about)
    paths = tmp_path / "base", [tmp_path / "one", tmp_path / "two"]
    out = made(paths, Recipe("dare", drop_rate=0.5), tmp_path / "out")
    part = verify(out, share=0.1, progress=False)
    assert part.parameters == 2 and 3 < part.compared < size / 2 and not part.differences


def test_directories_are_compared_by_their_own_names(directories, tmp_path):
    out = made(directories, TIES, tmp_path / "out")
    assert not verify(out, progress=False).differences
    tensors = official.load_file(out / "model.safetensors")
    tensors[DOWN][2, 5] += 1
    (tmp_path / "pushed").mkdir()
    official.save_file(tensors, tmp_path / "pushed/model.safetensors")
    for name in ("config.json", "README.md"):
        shutil.copy(out / name, tmp_path / "pushed" / name)
    # Without a manifest the card says how it was merged, but not where the models are.
    base, experts = directories
    with pytest.raises(MergeError, match="name the base and the experts"):
        verify(tmp_path / "pushed", progress=False)
    (difference,) = verify(tmp_path / "pushed", base, experts, progress=False).differences
    assert (difference.parameter, difference.index) == (DOWN, (2, 5))


def test_a_base_that_is_not_merged_is_no_expert(directories, tmp_path):
    base, experts = directories
    out = made(directories, Recipe("average"), tmp_path / "out")
    assert not verify(out, base, experts, progress=False).differences
    (out / "m2l_manifest.json").unlink()
    assert not verify(out, base, experts, progress=False).differences
    assert not verify(out, None, experts, progress=False).differences


def test_the_subtree_that_was_merged_is_recorded(tmp_path):
    rng = np.random.default_rng(0)
    with ocp.StandardCheckpointer() as checkpointer:
        for name in ("base", "one"):
            tree = {"params": {"w": rng.standard_normal((4, 5), np.float32)}, "step": np.array(3)}
            checkpointer.save(tmp_path / name, tree)
    recipe = Recipe("task_arithmetic", scale=0.5)
    merge(
        tmp_path / "base", [tmp_path / "one"], recipe, tmp_path / "out",
        subtree="params", progress=False,
    )  # fmt: skip
    assert verify(tmp_path / "out", progress=False).compared == 20


def test_models_in_another_format_prove_the_same(tmp_path):
    # The names of m2l's parameters are others, and its kernels transposed.
    config = networks.LlamaConfig(384, 16, 32, 1, 2, 1, 8)
    shapes = {n: s.shape for n, s in checkpoints.flatten(networks.spec(config)).items()}
    vocabulary = {
        "name": "bytes",
        "size": 384,
        "fingerprint": tokenizer_files.read("bytes").fingerprint,
    }
    names = ("base", "one", "two")
    rng = np.random.default_rng(0)
    for name in names:
        params = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
        checkpoints.save(
            tmp_path / name,
            checkpoints.unflatten(params),
            model=networks.to_dict(config),
            vocabulary=vocabulary,
            made_by={"kind": "test"},
        )
        huggingface.export_checkpoint(tmp_path / name, tmp_path / f"{name}_hf")
    base, *experts = (tmp_path / name for name in names)
    others = [tmp_path / f"{name}_hf" for name in names]
    for index, recipe in enumerate((TIES, Recipe("dare_ties", drop_rate=0.4, dtype="bfloat16"))):
        out, directory = tmp_path / f"out{index}", tmp_path / f"directory{index}"
        made((others[0], others[1:]), recipe, out)
        with pytest.warns(UserWarning, match="and that of the base of the merge was"):
            assert not verify(out, base, experts, progress=False).differences
        made((base, experts), recipe, directory, output_format="huggingface")
        assert not verify(directory, progress=False).differences


def test_slices_are_put_together_again(directories, tmp_path):
    _, (one, two) = directories
    (tmp_path / "file.yml").write_text(
        "merge_method: linear\ndtype: float32\nslices:\n- sources:\n"
        + "".join(
            f"  - {{model: {path}, layer_range: [0, 1], parameters: {{weight: 1}}}}\n"
            for path in (one, two)
        )
    )
    merge_file = mergekit.resolve(mergekit_file.read(tmp_path / "file.yml"))
    out = tmp_path / "out"
    merge(
        merge_file.base, merge_file.experts, merge_file.recipe, out,
        slices=merge_file.slices, progress=False,
    )  # fmt: skip
    assert not verify(out, progress=False).differences
    moved = [shutil.copytree(path, tmp_path / path.name) for path in (one, two)]
    assert not verify(out, None, moved, progress=False).differences
    assert verify(out, None, moved[::-1], recipe=Recipe("weighted_sum", weights=(1, 3))).differences


def test_what_cannot_be_proven_is_refused(paths, tmp_path, monkeypatch):
    out = made(paths, Recipe("average"), tmp_path / "out")
    base, experts = paths
    with monkeypatch.context() as patch, pytest.raises(MergeError, match="one of several"):
        patch.setattr(verification, "rank", lambda: (1, 2))
        verify(out)
    for arguments, options, message in (
        ((out, base, experts[:2]), {}, "was merged from 3 experts, not from 2"),
        ((out,), {"only": ["decoder/norm", "*typo*"]}, r"no parameter matches \*typo\*"),
        ((base,), {}, "no recipe made it, but: test"),
        ((out,), {"share": 0}, "a share of 0"),
        ((out,), {"only": ["*nothing*"]}, "no parameter matches"),
        (
            (out,),
            {"recipe": Recipe("average", exclude=["decoder/norm"], dtype="bfloat16")},
            "gives",
        ),
    ):
        with pytest.raises(MergeError, match=message):
            verify(*arguments, **options, progress=False)


def test_the_command_proves_and_refutes(paths, tmp_path, run_m2l, capfd):
    out = made(paths, TIES, tmp_path / "out")
    assert run_m2l("verify", out) == 0
    assert "equal, bit for bit" in capfd.readouterr().out
    (tmp_path / "other.json").write_text(json.dumps(Recipe("ties", density=0.31).to_dict()))
    assert run_m2l("verify", out, "--recipe", tmp_path / "other.json", "--share", "0.5") == 2
    said = capfd.readouterr().err
    assert "the recipe gives" in said and "differ" in said
