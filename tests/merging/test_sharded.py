"""On eight devices a merge gives the bits of one, in memory and through files."""

import numpy as np
import pytest

from m2l import checkpoints
from m2l.merging import Recipe, merge

SHAPES = {"decoder/layers_00/wi": (16, 24), "decoder/norm": (16,), "embedder": (32, 16)}
RECIPES = {
    "average": Recipe("average"),
    "ties": Recipe("ties", density=0.3, scale=0.7, dtype="bfloat16"),
    "dare_ties": Recipe("dare_ties", drop_rate=0.4, density=0.5, seed=2),
}
PROGRAM = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from m2l import checkpoints
from m2l.merging import Recipe, merge, merge_params
root = sys.argv[1]
assert len(jax.devices()) == 8
def on(shape, names, *spec):
    return NamedSharding(jax.make_mesh(shape, names), P(*spec))
def shardings(shape):
    matrix = on(shape, ("a", "b"), "a", "b")
    return {"decoder": {"layers_00": {"wi": matrix}, "norm": on(shape, ("a", "b"), "b")},
            "embedder": on(shape, ("a", "b"), "b", "a")}
base, *experts = (
    checkpoints.restore(f"{root}/{n}", shardings=shardings((4, 2))) for n in ("base", "0", "1")
)
for name, tree in zip(("base", "0", "1"), (base, *experts)):
    about = checkpoints.read_manifest(f"{root}/{name}")
    checkpoints.save(f"{root}/sharded_{name}", tree, model=about.model,
                     vocabulary=about.vocabulary, made_by={"kind": "test"})
for name in sys.argv[2:]:
    recipe = Recipe.from_dict(checkpoints.read_manifest(f"{root}/one_{name}").made_by["recipe"])
    merged = merge_params(base, experts, recipe)
    one = checkpoints.restore(f"{root}/one_{name}")
    for found, wanted in zip(jax.tree.leaves(merged), jax.tree.leaves(one)):
        assert np.asarray(found).tobytes() == wanted.tobytes(), name
        assert len(found.sharding.device_set) == 8
    manifest = merge(f"{root}/sharded_base", [f"{root}/sharded_{i}" for i in (0, 1)], recipe,
                     f"{root}/eight_{name}", block=100, progress=False)
    assert manifest.parameters == checkpoints.read_manifest(f"{root}/one_{name}").parameters
    other = checkpoints.restore(f"{root}/eight_{name}", shardings=shardings((2, 4)))
    for found, wanted in zip(jax.tree.leaves(other), jax.tree.leaves(one)):
        assert np.asarray(found).tobytes() == wanted.tobytes(), name
print("equal")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("sharded"), np.random.default_rng(0)
    about = {"model": {"family": "t5"}, "made_by": {"kind": "test"}}
    about["vocabulary"] = {"name": "bytes", "size": 3, "fingerprint": "a"}
    for name in ("base", "0", "1"):
        params = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        checkpoints.save(root / name, checkpoints.unflatten(params), **about)
    for name, recipe in RECIPES.items():
        base = root / "base"
        merge(base, [root / "0", root / "1"], recipe, root / f"one_{name}", progress=False)
    return root


def test_eight_devices_give_the_bits_of_one_and_any_mesh_reads_them(forge, root):
    # Optimized as elsewhere: the bits are compared.
    (said,) = forge((PROGRAM, root, *RECIPES), devices=8, optimized=True)
    assert said.strip() == "equal"
