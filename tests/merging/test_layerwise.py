"""Numbers that vary by expert, over layers and by name: what they resolve to, and their merges."""

import functools
import json
from typing import Annotated

import jax
import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import METHODS, Interval, Recipe, grid, layerwise, merge, merge_each, method
from m2l.merging.method_registry import Method
from m2l.merging.requirements import Requirements

from . import oracles
from .conftest import SHAPES, same_bits

NAMES = ["embed", "enc/layers_00/a", "enc/layers_01/a", "enc/layers_02/mlp", "dec.block.4.mlp"]
MLP = "*/mlp/*"


def numbers(settings, names=NAMES, experts=2, method="ties"):
    needs = Requirements(Recipe(method, **settings), experts, {name: (name,) for name in names})
    return {name: needs.arguments(name, np.float64) for name in names}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"density": 0.5}, [0.5] * 5),
        ({"density": "0.2..0.8"}, [0.2, 0.2, 0.5, 0.8, 0.8]),
        ({"density": "0.1..0.9..0.3"}, [0.1, 0.1, 0.9, 0.3, 0.3]),
        ({"density": "1..0.7..0.4..1"}, [1, 1, 0.55, 1, 1]),
        ({"density": [0.5, "0.2..0.8"]}, [[0.5, x] for x in (0.2, 0.2, 0.5, 0.8, 0.8)]),
        ({"density": {"*mlp": 0.9, "*": 0.1}}, [0.1, 0.1, 0.1, 0.9, 0.9]),
        ({"density": [["*mlp", 0.9]]}, [0.2, 0.2, 0.2, 0.9, 0.9]),
        ({"density": [["embed", 0.3], ["e*", "0.5..1"], ["*", 1]]}, [0.3, 0.5, 0.75, 1, 1]),
        (
            {"density": {"*mlp": [0.9, 0.8], "*": [0.1, "0.2..0.6"]}},
            [[0.1, 0.2], [0.1, 0.2], [0.1, 0.4], [0.9, 0.8], [0.9, 0.8]],
        ),
        ({"density": [{"embed": 1, "*": 0.5}, 0.7]}, [[1, 0.7], *[[0.5, 0.7]] * 4]),
        ({"weights": "0..1"}, [[x, x] for x in (0, 0, 0.5, 1, 1)]),
        ({"weights": 2}, [[2, 2]] * 5),
        ({"weights": {"embed": [1, 3]}}, [[1, 3], *[[1, 1]] * 4]),
        ({"scale": "-1..1"}, [-1, -1, 0, 1, 1]),
    ],
)
def test_a_value_is_resolved_for_every_parameter_and_expert(settings, wanted):
    # As in mergekit: of no layer, the first number; the only layer of a stack, the last.
    (name,) = settings
    recipe = Recipe("ties", **settings)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    resolved = numbers(settings)
    for parameter, each in zip(NAMES, wanted, strict=True):
        np.testing.assert_allclose(resolved[parameter][name], each, rtol=1e-15)


def test_recipes_of_plain_numbers_have_the_digests_that_they_had():
    # Of the version before numbers could vary.
    digests = {
        Recipe("average", weights=(1, 2.5)): "e2f3c43a4b15f9f6",
        Recipe("ties"): "9a39cbcd90d8c9cd",
        Recipe("dare_ties", drop_rate=0.5, density=0.3, seed=3): "af319d2f1ed2c530",
        Recipe("task_arithmetic", scales=[("decoder/*", 0.5), ("*", (1, 0))]): "e0f65d4c07c8ad4f",
    }  # fmt: skip
    for recipe, digest in digests.items():
        assert recipe.identity("b", ["e"])[:16] == digest


def test_layers_of_every_naming_are_counted_from_the_first_to_the_last():
    stacks = {
        "model.layers.{}.mlp.up_proj.weight": 1,
        "encoder.block.{}.layer.0.SelfAttention.q.weight": 0,
        "transformer.h.{}.attn.weight": 2,
        "layers/{}/kernel": 1,
        "stack/block_{}/kernel": 1,
        "model.layers.{}.mlp.experts.7.w1.weight": 3,
    }
    for pattern, first in stacks.items():
        layers = layerwise.Layers(pattern.format(i) for i in range(first, first + 5))
        places = [layers.position([pattern.format(i)]) for i in range(first, first + 5)]
        assert places == [0, 0.25, 0.5, 0.75, 1]
    assert layerwise.Layers(["path3/a", "layer_norm1.weight", "layers.2"]).position(["a"]) == 0


VARIED = {
    "ties by expert": ("ties", {"density": [0.1, 0.4, 1]}),
    "ties over layers": ("ties", {"density": "0.1..0.6", "scale": "0.5..1.5"}),
    "ties by name": ("ties", {"density": {MLP: 0.6, "*": [0.2, 0.1, "0.3..1"]}}),
    "ties by tensor": ("ties", {"density": [0.1, "0.2..0.9", 1], "scope": "tensor"}),
    "weights": ("ties", {"density": 0.3, "weights": [1, "0..2", {MLP: 0.5}]}),
    "dare": ("dare", {"drop_rate": [0.1, "0.2..0.8", 0], "weights": "1..0.5"}),
    "dare, then trim": ("dare_ties", {"drop_rate": [0.1, 0.5, 0], "density": "0.2..0.9"}),
    "dare by norms": ("dare", {"drop_rate": [0.1, "0.2..0.8", 0], "rescale": "norm"}),
    "della": ("della", {"drop_rate": ["0.3..0.5", 0.4, 0.5], "epsilon": {MLP: 0.1, "*": 0.2}}),
    "della by model": (
        "della",
        {"drop_rate": "0.3..0.5", "epsilon": [0.1, 0.2, 0], "scope": "model"},
    ),
    "outliers": ("breadcrumbs", {"density": ["0.2..0.8", 0.9, 0.5], "gamma": [0.1, 0, "0..0.2"]}),
    "outliers by model": ("breadcrumbs", {"density": {MLP: 0.5}, "gamma": 0.1, "scope": "model"}),
    "majority": ("ties", {"density": [0.1, "0.2..0.4", 0.5], "zero_sign": "majority"}),
}


@pytest.mark.parametrize("case", VARIED)
def test_from_disk_and_in_memory_the_bits_are_the_same_and_the_manifest_has_the_numbers(
    tmp_path, models, paths, case
):
    (base, experts), (base_path, expert_paths) = models, paths
    name, settings = VARIED[case]
    recipe = Recipe(name, **settings)
    manifest = merge(base_path, expert_paths, recipe, tmp_path / "out")
    params = checkpoints.restore(tmp_path / "out")
    in_memory = merge(base, experts, recipe)
    flat, flat_in_memory = checkpoints.flatten(params), checkpoints.flatten(in_memory)
    if recipe.rescale == "norm":
        # Whose norms are summed in another order.
        for parameter in SHAPES:
            np.testing.assert_allclose(flat[parameter], flat_in_memory[parameter], atol=1e-6)
    else:
        same_bits(flat, flat_in_memory)
    wanted = numbers(settings, list(SHAPES), 3, name)
    for setting, by_name in manifest.made_by.get("numbers", {}).items():
        assert by_name == {n: np.asarray(v[setting]).tolist() for n, v in wanted.items()}


def groups(settings):
    """Of each expert, the parameters by their density."""
    resolved = numbers(settings, list(SHAPES), 3)
    for expert in range(3):
        by_density = {}
        for name in SHAPES:
            density = np.broadcast_to(resolved[name]["density"], 3)[expert]
            by_density.setdefault(float(density), []).append(name)
        yield by_density


@pytest.mark.parametrize("case", ["ties by expert", "ties over layers", "ties by name"])
def test_exactly_the_largest_entries_of_all_parameters_of_a_density_are_kept(models, case):
    base, experts = models
    name, settings = VARIED[case]
    flat = checkpoints.flatten(base)
    taus = [
        {n: oracles.exact_task_vectors(flat[n], leaf) for n, leaf in checkpoints.flatten(e).items()}
        for e in experts
    ]
    for tau, by_density in zip(taus, groups(settings), strict=True):
        for density, names in by_density.items():
            joined = oracles.trim(np.concatenate([tau[n].ravel() for n in names]), density)
            ends = np.cumsum([tau[n].size for n in names])[:-1]
            for n, part in zip(names, np.split(joined, ends), strict=True):
                tau[n] = part.reshape(tau[n].shape)
    merged = checkpoints.flatten(merge(base, experts, Recipe(name, **settings)))
    resolved = numbers(settings, list(SHAPES), 3)
    for n in SHAPES:
        delta = oracles.disjoint_mean(np.stack([tau[n] for tau in taus]))
        wanted = flat[n] + resolved[n]["scale"] * delta
        np.testing.assert_allclose(merged[n], wanted, rtol=1e-6, atol=1e-6)


def test_each_expert_is_dropped_at_its_own_rate(models):
    base, experts = models
    rates = [0.1, 0.7, 0.4]
    merged = merge(base, experts, Recipe("dare", drop_rate=rates, seed=3))
    alone = [
        merge(base, experts, Recipe("dare", drop_rate=rate, seed=3, weights=np.eye(3)[i].tolist()))
        for i, rate in enumerate(rates)
    ]
    for n, array in checkpoints.flatten(merged).items():
        start = checkpoints.flatten(base)[n]
        parts = [checkpoints.flatten(each)[n] - start for each in alone]
        # The sum is rounded otherwise.
        np.testing.assert_allclose(array - start, sum(parts), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "plain", "varied"),
    [
        ("ties", {"density": 0.3, "scale": 0.7}, {"density": "0.3..0.3", "scale": {"*": 0.7}}),
        ("ties", {"density": 0.3}, {"density": [0.3, 0.3, "0.3..0.3"]}),
        ("della", {"drop_rate": 0.4}, {"drop_rate": [0.4, 0.4, 0.4], "epsilon": "0.15..0.15"}),
        ("average", {"weights": [2, 2, 2]}, {"weights": "2..2"}),
        ("dare", {"drop_rate": 0.4}, {"drop_rate": {"decoder/*": 0.4, "*": [0.4, 0.4, 0.4]}}),
    ],
)
def test_equal_numbers_have_the_bits_of_one_number(models, name, plain, varied):
    base, experts = models
    one, other = (merge(base, experts, Recipe(name, each)) for each in (plain, varied))
    same_bits(checkpoints.flatten(one), checkpoints.flatten(other))


def test_inside_jit_and_in_sweeps_varied_numbers_merge_to_the_same_bits(models):
    base, experts = models
    recipes = grid(
        {"method": "ties", "scale": 0.5},
        {"density": [0.2, "0.1..0.6", [0.1, 0.4, 1], {MLP: 0.6, "*": [0.2, 0.1, 1]}]},
    )
    swept = merge_each(base, experts, recipes)
    for recipe, params in zip(recipes, swept, strict=True):
        same_bits(checkpoints.flatten(params), checkpoints.flatten(merge(base, experts, recipe)))
    traced = jax.jit(functools.partial(merge, recipe=recipes[3]))(base, experts)
    same_bits(checkpoints.flatten(traced), checkpoints.flatten(swept[3]))


@pytest.mark.parametrize(("name", "experts"), [("slerp", 2), ("linear", 1)])
def test_a_position_over_layers_is_each_layers_own(tmp_path, models, paths, name, experts):
    base, all_experts = models
    used = all_experts[:experts]
    merged = merge(base, used, Recipe(name, t="0.1..0.9"))
    merge(paths[0], paths[1][:experts], Recipe(name, t="0.1..0.9"), tmp_path / "out")
    stored = checkpoints.flatten(checkpoints.restore(tmp_path / "out"))
    for layer, t in (("decoder/layers_00/mlp/wi_0", 0.1), ("decoder/layers_01/mlp/wi_0", 0.9)):
        plain = checkpoints.flatten(merge(base, used, Recipe(name, t=t)))[layer]
        assert np.array_equal(checkpoints.flatten(merged)[layer], plain)
        # Inner products are summed in another order.
        np.testing.assert_allclose(stored[layer], plain, rtol=1e-5, atol=1e-6)


def test_a_method_of_another_package_has_them_by_its_signature(models, monkeypatch):
    monkeypatch.setattr(METHODS, "_methods", dict(METHODS._methods))

    @method
    def damped(
        base: jax.Array,
        experts: list[jax.Array],
        damping: Annotated[float, Interval(0, 1), "Share that is left out."] = 0.1,
    ) -> jax.Array:
        """Adds a part of each task vector."""
        return base + (1 - damping) * sum(expert - base for expert in experts)

    assert isinstance(METHODS["damped"], Method)
    base, experts = models
    merged = merge(base, experts, Recipe("damped", damping={MLP: "0..1", "*": 0.5}))
    for n, array in checkpoints.flatten(merged).items():
        damping = {"00": 0, "01": 1}.get(n[len("decoder/layers_") :][:2], 0.5)
        damping = damping if "/mlp/" in n else 0.5
        start = checkpoints.flatten(base)[n]
        taus = [checkpoints.flatten(expert)[n] - start for expert in experts]
        np.testing.assert_allclose(array, start + (1 - damping) * sum(taus), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ties", {"density": "0.2..1.5"}, "density must be above 0 and at most 1"),
        ("ties", {"density": "0.2.."}, r"density: '0.2..' is no gradient over layers; expected"),
        ("ties", {"density": [0.2, "x"]}, r"density\[1\] must be a number, not 'x'"),
        ("ties", {"density": []}, "density must be a list of numbers, one for each expert"),
        ("ties", {"density": [0.1, [0.2]]}, r"density\[1\] is one number for all experts"),
        ("ties", {"scale": [1, 2, 3]}, "scale is one number for all experts together"),
        ("ties", {"density": {"*mlp": 2}}, r"density of '\*mlp' must be above 0 and at most 1"),
        ("dare", {"drop_rate": {"*mlp*": 0.5}}, r"drop_rate: .* have none: add one for '\*'"),
        ("ties", {"density": "0.1..0.2..0.3"}, "density 0.1..0.2..0.3 has 3 numbers for 2 layers"),
        ("ties", {"density": [0.1, 0.2]}, "2 density for 3 experts: give one for each"),
        ("ties", {"density": {MLP: [0.1], "*": 1}}, "1 density for 3 experts"),
        ("ties", {"density": {"*attn*": 0.5}}, r"density '\*attn\*' matches no parameter"),
        (
            "della",
            {"drop_rate": [0.5, 0.5, "0.1..0.5"]},
            "decoder/layers_00/.*: drop_rate 0.1 with",
        ),
        ("average", {"weights": [1, 1, "1..-2"]}, "decoder/layers_01/.* must not sum to zero"),
        ("ties", {"exclude": ["*/layers_*"], "density": "0.1..1"}, None),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(models, name, settings, message):
    base, experts = models
    if message is None:
        merge(base, experts, Recipe(name, **settings))
        return
    with pytest.raises(MergeError, match=message):
        merge(base, experts, Recipe(name, **settings))


def test_a_gradient_over_no_layers_is_refused():
    model = {"kernel": np.ones(3, np.float32)}
    with pytest.raises(MergeError, match=r"scale 0\.\.1 is over layers, and no parameter's name"):
        merge(model, [model], Recipe("task_arithmetic", scale="0..1"))
