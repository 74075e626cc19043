"""Sizes of 0: tensors of no elements stay as they are, and models of nothing are refused."""

import json

import numpy as np
import pytest

from m2l import checkpoints
from m2l.checkpoints import safetensors
from m2l.errors import MergeError
from m2l.merging import METHODS, Recipe, merge, merge_params, prepare

from .conftest import same_bits, write

# Models of tensors of no elements alone are equal.
pytestmark = pytest.mark.filterwarnings("ignore:.*is the same model as")

EMPTY = {"a/none": (0,), "b/rows": (0, 8), "c/w": (6, 8), "d/columns": (3, 0), "e/norm": (5,)}
EMPTY |= {"f/last": (0, 2)}
NOTHING = {name: shape for name, shape in EMPTY.items() if 0 in shape}
RECIPES = [
    Recipe("average"),
    Recipe("linear"),
    Recipe("task_arithmetic"),
    Recipe("ties", density=0.5),
    Recipe("ties", density=0.5, scope="tensor", keep="at_least_one"),
    Recipe("ties", density=0.5, scope="tensor", keep="one_more", zero_sign="majority"),
    Recipe("ties", density=0.5, keep="complement", zero_sign="majority_or_none"),
    Recipe("dare", drop_rate=0.5),
    Recipe("dare_ties", drop_rate=0.5, density=0.5, scope="tensor"),
    Recipe("dare_ties", drop_rate=0.5, rescale="norm"),
    Recipe("della", drop_rate=0.5),
    Recipe("della", drop_rate=0.5, scope="model"),
    Recipe("breadcrumbs"),
    Recipe("breadcrumbs", scope="model"),
    Recipe("nearswap"),
    Recipe("ram"),
    Recipe("consensus_ta"),
    *(Recipe(name, scope=s) for name in ("ram_plus", "emr") for s in ("model", "tensor")),
    *(Recipe(n, density=0.5, scope=s) for n in ("sce", "pcb") for s in ("model", "tensor")),
    *(Recipe(name) for name in ("slerp", "task_nuslerp", "multislerp", "karcher", "model_stock")),
    *(Recipe(n) for n in ("localize_and_stitch", "widen", "knots_ties", "core_space", "tsv_m")),
    Recipe("nuslerp_rows"),
    *(Recipe(name) for name in ("gradient_matching", "mats", "fisher", "regmean")),
]


def draw(shapes, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def name_of(recipe):
    variants = (recipe.scope, recipe.keep, recipe.zero_sign, recipe.rescale)
    return "-".join((recipe.method, *variants))


def write_tensors(directory, tensors):
    """A directory of safetensors, of a model that m2l has no network for."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "clip"}))
    tensors = {name.replace("/", "."): array for name, array in tensors.items()}
    described = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    extents = safetensors.create(directory, described, [[*tensors]])
    for name, array in tensors.items():
        extents[name].write_from(array.reshape(-1), 0)


def read_tensors(directory):
    tensors = safetensors.open_tensors(directory)
    return {n.replace(".", "/"): t.read().reshape(t.shape) for n, t in tensors.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models with tensors of no elements and without these, of such alone, and of none at all."""
    root = tmp_path_factory.mktemp("empty")
    about = {"kind": "statistics"}
    for kind, shapes in (("some", EMPTY), ("only", NOTHING), ("none", {})):
        for seed, name in enumerate(("base", "one", "two")):
            tensors = draw(shapes, seed)
            manifest = write(root / f"{kind}_{name}", checkpoints.unflatten(tensors))
            write_tensors(root / f"{kind}_hf_{name}", tensors)
            of = {"of": manifest.digest}
            fisher = checkpoints.unflatten(draw(shapes, 10 + seed))
            write(
                root / f"{kind}_fisher_{name}", fisher, made_by=about | {"statistic": "fisher"} | of
            )
            grams = {
                name: np.eye(shape[0], dtype=np.float32)
                for name, shape in shapes.items()
                if len(shape) == 2
            }
            gram = checkpoints.unflatten(grams)
            write(root / f"{kind}_gram_{name}", gram, made_by=about | {"statistic": "gram"} | of)
    return root


def inputs(root, kind, recipe, infix=""):
    method = METHODS[recipe.method]
    names = ("one", "two")[: 1 if method.experts.high == 1 else 2]
    base = root / f"{kind}_{infix}base" if method.needs_base else None
    statistics = [root / f"{kind}_{method.statistic}_{n}" for n in names if method.statistic]
    return base, [root / f"{kind}_{infix}{n}" for n in names], statistics


def load(paths):
    return [checkpoints.restore(path) for path in paths]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("kind", ["some", "only"])
def test_a_tensor_of_no_elements_keeps_its_shape_and_changes_no_other(tmp_path, root, recipe, kind):
    base, experts, statistics = inputs(root, kind, recipe)
    out = tmp_path / "out"
    options = {"statistics": statistics, "diagnostics": not METHODS[recipe.method].draws}
    manifest = merge(base, experts, recipe, out, progress=False, **options)
    assert checkpoints.verify(out) == manifest
    merged = checkpoints.flatten(checkpoints.restore(out))
    assert {name: array.shape for name, array in merged.items()} == {
        "some": EMPTY,
        "only": NOTHING,
    }[kind]
    trees = None if base is None else load([base])[0]
    wanted = merge_params(trees, load(experts), recipe, load(statistics))
    for name, array in checkpoints.flatten(wanted).items():
        np.testing.assert_allclose(merged[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    in_memory = merge(base, experts, recipe, progress=False, statistics=statistics)
    same_bits(merged, checkpoints.flatten(in_memory))
    if kind == "some":
        # As if they were not merged.
        recipe = Recipe.from_dict(recipe.to_dict() | {"exclude": [*NOTHING]})
        merge(base, experts, recipe, tmp_path / "alone", progress=False, **options)
        alone = checkpoints.flatten(checkpoints.restore(tmp_path / "alone"))
        same_bits(merged, alone)


@pytest.mark.parametrize("recipe", RECIPES[:-4], ids=name_of)
@pytest.mark.parametrize("kind", ["some", "only"])
def test_safetensors_of_no_elements_are_merged_as_checkpoints_are(tmp_path, root, recipe, kind):
    base, experts, _ = inputs(root, kind, recipe, "hf_")
    merge(base, experts, recipe, tmp_path / "out", progress=False, diagnostics=False)
    base, experts, _ = inputs(root, kind, recipe)
    merge(base, experts, recipe, tmp_path / "orbax", progress=False, diagnostics=False)
    wanted = checkpoints.flatten(checkpoints.restore(tmp_path / "orbax"))
    merged = read_tensors(tmp_path / "out")
    assert {n: a.shape for n, a in merged.items()} == {n: a.shape for n, a in wanted.items()}
    if METHODS[recipe.method].of_matrices:
        # Whose outputs are rows in the one format, and columns in the other.
        merged, wanted = ({n: a for n, a in of.items() if a.ndim < 2} for of in (merged, wanted))
    # Draws go by the name, which is another.
    if not METHODS[recipe.method].draws:
        same_bits(merged, wanted)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_models_of_no_tensors_are_refused(tmp_path, root, recipe):
    wanted = "nothing to merge: the models have no parameters"
    base, experts, statistics = inputs(root, "none", recipe)
    with pytest.raises(MergeError, match=wanted):
        merge(base, experts, recipe, tmp_path / "out", statistics=statistics)
    if not METHODS[recipe.method].statistic:
        with pytest.raises(MergeError, match=wanted):
            merge(*inputs(root, "none", recipe, "hf_")[:2], recipe, tmp_path / "out")
    with pytest.raises(MergeError, match=wanted):
        empty = None if base is None else {}
        merge_params(empty, [{}] * len(experts), recipe, [{}] * len(statistics))
    assert not list(tmp_path.iterdir())


def test_models_of_no_tensors_are_refused_before_patterns_are_matched(tmp_path, root):
    with pytest.raises(MergeError, match="the models have no parameters"):
        merge(
            root / "none_base",
            [root / "none_one"],
            Recipe("average", exclude=("w",)),
            tmp_path / "o",
        )


@pytest.mark.parametrize("kind", ["some", "only"])
def test_several_processes_plan_models_of_few_elements(root, kind, tmp_path):
    base, experts, _ = inputs(root, kind, RECIPES[3])
    jobs = [
        prepare(base, experts, RECIPES[3], tmp_path / "out", process=(index, 3))
        for index in range(3)
    ]
    assert sorted(name for job in jobs for name in job.local) == sorted(jobs[0].sizes)


@pytest.mark.parametrize("kind", ["some", "only"])
def test_the_commands_read_a_merge_with_tensors_of_no_elements(
    run_m2l, tmp_path, root, kind, capsys
):
    base, experts, _ = inputs(root, kind, RECIPES[3])
    flags = ["--base", base, *(f"--expert={e}" for e in experts), "--method", "ties"]
    assert run_m2l("merge", *flags, "--out", tmp_path / "out", "--dry_run") == 0
    assert run_m2l("merge", *flags, "--out", tmp_path / "out") == 0
    assert run_m2l("inspect", tmp_path / "out", "--verify") == 0
    assert "every digest is right" in capsys.readouterr().out
    drawn = run_m2l("inspect", tmp_path / "out", "--cosines", tmp_path / "cosines.png")
    assert drawn == (0 if kind == "some" else 2)
