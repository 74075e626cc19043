"""Every merge on 1, 2 and 8 devices, in 1 to 3 processes and in memory: the bits of one device."""

import json

import numpy as np
import pytest

from m2l import checkpoints
from m2l.merging import METHODS, Recipe, preset

from .conftest import free_port, write

SHAPES = {
    "decoder/layers_00/wi": (16, 24),
    "decoder/nothing": (0, 16),
    "decoder/norm": (16,),
    "embedder": (32, 16),
}
BLOCK = 384
RECIPES = {
    "average": Recipe("average"),
    "average weighted": Recipe("average", weights=(1, 3)),
    "linear": Recipe("linear", t=0.3),
    "task_arithmetic": Recipe("task_arithmetic", scale=0.3, exclude=("*norm",)),
    "weighted_sum": Recipe("weighted_sum", weights=(0.3, 0.9)),
    "ties": Recipe("ties", density=0.3, scale=0.7),
    "ties of each tensor": Recipe("ties", density=0.3, scope="tensor"),
    "ties max weighted": Recipe("ties", consensus="max", weighted_signs=True, dtype="bfloat16"),
    "dare": Recipe("dare", drop_rate=0.6, seed=1),
    "dare_ties": Recipe("dare_ties", drop_rate=0.4, seed=2),
    "dare_ties trimmed": Recipe("dare_ties", drop_rate=0.4, density=0.5, seed=2),
    "dare_ties of each tensor": Recipe("dare_ties", drop_rate=0.4, density=0.5, scope="tensor"),
    "della": Recipe("della", drop_rate=0.5, epsilon=0.3),
    "della of the model": Recipe("della", drop_rate=0.5, epsilon=0.3, scope="model"),
    "breadcrumbs": Recipe("breadcrumbs", density=0.6, gamma=0.1),
    "breadcrumbs of the model": Recipe("breadcrumbs", density=0.6, gamma=0.1, scope="model"),
    "della_linear": Recipe("della_linear", drop_rate=0.5, epsilon=0.3),
    "breadcrumbs_ties": Recipe("breadcrumbs_ties", density=0.6, gamma=0.1),
    "nearswap": Recipe("nearswap", nearness=0.3),
    "nuslerp": Recipe("nuslerp", weights=(1, 2)),
    "task_nuslerp": Recipe("task_nuslerp", weights=(1, 2)),
    "multislerp": Recipe("multislerp", weights=(1, 2)),
    "task_multislerp": Recipe("task_multislerp", weights=(1, 2)),
    "karcher": Recipe("karcher", weights=(1, 2)),
    "ram": Recipe("ram", epsilon=0.5),
    "ram_plus": Recipe("ram_plus", epsilon=0.5),
    "ram_plus of each tensor": Recipe("ram_plus", epsilon=0.5, scope="tensor"),
    "sce": Recipe("sce", density=0.3),
    "sce of the model": Recipe("sce", density=0.3, scope="model"),
    "emr": Recipe("emr", weights=(1, 2)),
    "pcb": Recipe("pcb", density=0.3),
    "pcb of each tensor": Recipe("pcb", density=0.3, scope="tensor"),
    "tall_masks": Recipe("tall_masks", weights=(1, 3)),
    "consensus_ta": Recipe("consensus_ta", scale=0.7),
    "slerp": Recipe("slerp", t=0.3),
    "model_stock": Recipe("model_stock"),
    "fisher": Recipe("fisher", weights=(1, 2)),
    "gradient_matching": Recipe("gradient_matching", weights=(1, 2)),
    "localize_and_stitch": Recipe("localize_and_stitch", density=0.3),
    "regmean": Recipe("regmean"),
    "mats": Recipe("mats", steps=3),
    "tsv_m": Recipe("tsv_m"),
    "iso_c": Recipe("iso_c"),
    "iso_cts": Recipe("iso_cts", common=0.5),
    "wudi": Recipe("wudi", steps=3, step_size=0.01),
    "arcee_fusion": Recipe("arcee_fusion"),
    "widen": Recipe("widen"),
    "knots_ties": Recipe("knots_ties", density=0.5),
    "core_space": Recipe("core_space", density=0.5),
    **{
        name: Recipe(name, weights=(1, 2))
        for name in ("nuslerp_rows", "nuslerp_columns", "task_nuslerp_rows", "task_nuslerp_columns")
    },
}
RECIPES |= {
    f"{name} {settings['method']}": Recipe(**preset(name, settings))
    for name, settings in (
        ("official", {"method": "ties"}),
        ("fusion_bench", {"method": "ties"}),
        ("mergelm", {"method": "ties"}),
        ("mergekit", {"method": "ties", "density": 0.4}),
        ("mergekit", {"method": "dare_ties", "drop_rate": 0.3}),
        ("mergekit", {"method": "della"}),
    )
}
LAYOUTS = {"2 devices": (2, 1), "8 devices": (8, 1), "2 processes": (1, 2), "3 processes": (1, 3)}
IN_MEMORY = (
    *("average", "linear", "task_arithmetic", "ties", "ties of each tensor", "dare"),
    *("dare_ties trimmed", "breadcrumbs", "slerp", "model_stock", "fisher", "regmean"),
    *("gradient_matching", "localize_and_stitch", "mats"),
    "mergekit dare_ties",
    "weighted_sum",
    *("breadcrumbs_ties", "nearswap", "task_nuslerp", "task_multislerp", "karcher"),
    *("ram", "tall_masks", "consensus_ta", "ram_plus", "sce", "sce of the model", "emr"),
    *("pcb", "pcb of each tensor", "tsv_m", "iso_c", "iso_cts", "wudi", "arcee_fusion"),
    *("widen", "knots_ties", "core_space", "nuslerp_rows", "task_nuslerp_columns"),
)

START = """
import json, os, sys, jax
from m2l import checkpoints, distributed
from m2l.merging import METHODS, Recipe, merge, merge_params
root, devices = sys.argv[1], int(sys.argv[2])
recipes = {n: Recipe.from_dict(r) for n, r in json.load(open(f"{root}/recipes.json")).items()}
def inputs(recipe):
    experts = range(1 if METHODS[recipe.method].experts.high == 1 else 2)
    kind = METHODS[recipe.method].statistic
    statistics = [f"{root}/{kind}_{i}" for i in experts] if kind else []
    return f"{root}/base", [f"{root}/expert_{i}" for i in experts], statistics
"""

# Merges by every recipe, as one of several processes; the first prints what it has made.
STREAMED = """
out, index, count, address = sys.argv[3], *map(int, sys.argv[4:6]), sys.argv[6]
if count > 1:
    distributed.join(address, (index, count), survive=True)
assert len(jax.local_devices()) == devices
os.environ["M2L_CACHE"] = f"{out}/cache-{index}"
for name, recipe in recipes.items():
    base, experts, statistics = inputs(recipe)
    manifest = merge(base, experts, recipe, f"{out}/{name}", statistics=statistics, block=BLOCK,
                     diagnostics=name == "ties", progress=False)
    if manifest is not None:
        print(json.dumps([name, manifest.parameters, manifest.made_by]))
distributed.leave()
"""

# Merges sharded parameters in memory by some recipes, and compares with the checkpoints of above.
SHARDED = """
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
out, names = sys.argv[3], sys.argv[4:]
os.environ["M2L_CACHE"] = f"{out}/cache-memory"
def shardings(shape):
    def on(*spec):
        return NamedSharding(jax.make_mesh(shape, ("a", "b")), P(*spec))
    return {"decoder": {"layers_00": {"wi": on("a", "b")}, "nothing": on(), "norm": on("b")},
            "embedder": on("b", "a")}
def placed(path):
    tree = checkpoints.restore(path, shardings=shardings((4, 2)))
    about = checkpoints.read_manifest(path)
    saved = checkpoints.save(f"{out}/{os.path.basename(path)}", tree, model=about.model,
                             vocabulary=about.vocabulary, made_by=about.made_by)
    assert saved.parameters == about.parameters
    return tree
trees = {name: placed(f"{root}/{name}") for name in
         ("base", "expert_0", "expert_1", "fisher_0", "fisher_1")}
for name in names:
    recipe = recipes[name]
    base, experts, statistics = inputs(recipe)
    load = lambda p: trees.get(os.path.basename(p)) or checkpoints.restore(p)
    merged = merge_params(load(base), [*map(load, experts)], recipe, [*map(load, statistics)])
    wanted = checkpoints.restore(f"{out}/{name}", shardings=shardings((2, 4)))
    for found, leaf in zip(jax.tree.leaves(merged), jax.tree.leaves(wanted), strict=True):
        found, leaf = np.asarray(found), np.asarray(leaf)
        if METHODS[recipe.method].coefficients is not None or recipe.rescale == "norm":
            # Sums of its own order.
            np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            assert (found.dtype, found.tobytes()) == (leaf.dtype, leaf.tobytes()), name
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(merged)} == {devices}
    print(name)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, two experts and their statistics, and the recipes."""
    root, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    for name in ("base", "expert_0", "expert_1"):
        params = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        manifest = write(root / name, checkpoints.unflatten(params))
        if name == "base":
            continue
        fisher = {n: rng.random(s, np.float32) for n, s in SHAPES.items()}
        inputs = rng.standard_normal((40, 16)).astype(np.float32)
        gram = {"decoder/layers_00/wi": inputs.T @ inputs}
        for kind, tree in (("fisher", fisher), ("gram", gram)):
            made_by = {"kind": "statistics", "statistic": kind, "of": manifest.digest}
            path = root / name.replace("expert", kind)
            write(path, checkpoints.unflatten(tree), made_by=made_by)
    recipes = {name: recipe.to_dict() for name, recipe in RECIPES.items()}
    (root / "recipes.json").write_text(json.dumps(recipes))
    return root


@pytest.fixture(scope="module")
def merged(forge, root, tmp_path_factory):
    """What every recipe makes on so many devices in so many processes: name -> its manifest's."""
    results: dict[tuple[int, int], dict] = {}

    def merge_all(devices, processes):
        if (devices, processes) not in results:
            out = tmp_path_factory.mktemp("merged")
            code = START + STREAMED.replace("BLOCK", str(BLOCK))
            address = f"127.0.0.1:{free_port()}"
            programs = [
                (code, root, devices, out, index, processes, address) for index in range(processes)
            ]
            lines = forge(*programs, devices=devices)[0].splitlines()
            results[devices, processes] = {name: made for name, *made in map(json.loads, lines)}
            results[devices, processes]["folder"] = out
        return results[devices, processes]

    return merge_all


def test_every_method_is_in_the_table():
    assert {recipe.method for recipe in RECIPES.values()} == set(METHODS)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_devices_and_processes_change_no_bit(merged, layout, name):
    wanted = merged(1, 1)[name]
    assert merged(*LAYOUTS[layout])[name] == wanted


def test_sharded_over_eight_devices_parameters_merge_to_the_checkpoints_of_one(forge, root, merged):
    program = (START + SHARDED, root, 8, merged(1, 1)["folder"], *IN_MEMORY)
    (lines,) = forge(program, devices=8)
    assert lines.splitlines() == [*IN_MEMORY]
