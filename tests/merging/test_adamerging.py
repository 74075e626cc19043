"""AdaMerging: its gradient against differences, what it learns, and how it divides a model."""

import dataclasses
import fnmatch
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import checkpoints, models
from m2l.errors import MergeError
from m2l.merging import Recipe, merge_params
from m2l.merging.search import layer_patterns, learn_coefficients, loss_gradient

SHAPES = {
    "token_embedder": (5, 3),
    "decoder/layers_00/mlp/wi": (3, 3),
    "decoder/layers_00/norm": (3,),
    "decoder/layers_01/mlp/wi": (3, 3),
    "decoder/layers_10/mlp/wi": (3, 3),
    "decoder/logits": (3, 4),
}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    flat = {name: np.float32(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}
    return checkpoints.unflatten(flat)


@pytest.fixture(scope="module")
def base():
    return tree(0)


@pytest.fixture(scope="module")
def experts(base):
    return [jax.tree.map(np.add, base, tree(seed, 0.5)) for seed in (1, 2)]


def entropy(params, tokens):
    """The mean entropy of a small network's softmax."""
    flat = checkpoints.flatten(params)
    x = flat["token_embedder"][tokens]
    for layer in ("00", "01", "10"):
        x = x + jnp.tanh(x @ flat[f"decoder/layers_{layer}/mlp/wi"])
    x = x * flat["decoder/layers_00/norm"]
    log_p = jax.nn.log_softmax(x @ flat["decoder/logits"])
    return jnp.mean(-jnp.sum(jnp.exp(log_p) * log_p, -1))


TOKENS = np.array([0, 3, 1, 4, 2], np.int32)


def test_the_gradient_is_that_of_differences_through_the_merge(base, experts):
    flat_base, flat_experts = checkpoints.flatten(base), list(map(checkpoints.flatten, experts))
    layers = (0, 1, 1, 2, 3, 4)
    lambdas = np.random.default_rng(3).uniform(size=(5, 2))

    def merged(lambdas):
        """In float64, by the formula."""
        return {
            name: theta.astype(np.float64)
            + sum(
                lambdas[layer, i] * (e[name].astype(np.float64) - theta)
                for i, e in enumerate(flat_experts)
            )
            for layer, (name, theta) in zip(layers, flat_base.items(), strict=True)
        }

    loss, found = loss_gradient(
        entropy, layers, jnp.float32(lambdas), flat_base, flat_experts, TOKENS
    )
    with jax.enable_x64():
        of = lambda lambdas: float(entropy(checkpoints.unflatten(merged(lambdas)), TOKENS))  # noqa: E731
        np.testing.assert_allclose(loss, of(lambdas), rtol=1e-5)
        for place in np.ndindex(*lambdas.shape):
            step = np.zeros_like(lambdas)
            step[place] = 1e-6
            slope = (of(lambdas + step) - of(lambdas - step)) / 2e-6
            np.testing.assert_allclose(found[place], slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_entropy_falls_and_every_parameter_has_one_row_of_coefficients(
    base, experts, per_layer
):
    told = []
    learned = learn_coefficients(
        base,
        experts,
        entropy,
        itertools.repeat([TOKENS]),
        per_layer=per_layer,
        steps=40,
        learning_rate=0.02,
        on_step=lambda step, value: told.append((step, value)),
    )
    assert learned.losses[-1] < 0.95 * learned.losses[0]
    assert told == list(enumerate(learned.losses, 1))
    assert len(learned.coefficients) == (5 if per_layer else 1)
    for name in SHAPES:
        rows = [p for p in learned.coefficients if fnmatch.fnmatchcase(name, p)]
        assert len(rows) == 1
    numbers = np.array(list(learned.coefficients.values()))
    assert numbers.shape[1] == len(experts)
    assert (numbers >= 0).all() and (numbers <= 1).all()


def test_the_entropy_is_that_of_task_arithmetic_and_all_batches_of_a_step_count_the_same(
    base, experts
):
    batches = [TOKENS[:3], TOKENS[3:]]
    learned = learn_coefficients(base, experts, entropy, [batches], steps=1, initial=0.4)
    merged = merge_params(base, experts, Recipe(method="task_arithmetic", scale=0.4))
    wanted = np.mean([entropy(merged, batch) for batch in batches])
    np.testing.assert_allclose(learned.losses, [wanted], rtol=1e-5)


@pytest.mark.parametrize(("dtype", "models"), [(jnp.float32, 1.1), (jnp.bfloat16, 2.1)])
def test_beside_base_and_experts_there_is_one_gradient_however_many_experts(dtype, models):
    size, layers, experts = 64, 6, 8
    theta = jax.ShapeDtypeStruct((size, size), dtype)
    model = {f"layers_{layer:02d}/w": theta for layer in range(layers)}

    def loss(params, x):
        for layer in range(layers):
            x = jnp.tanh(x @ params[f"layers_{layer:02d}"]["w"])
        return jnp.mean(x)

    gradient = jax.jit(functools.partial(loss_gradient, loss, tuple(range(layers))))
    lambdas = jax.ShapeDtypeStruct((layers, experts), jnp.float32)
    x = jax.ShapeDtypeStruct((4, size), jnp.float32)
    memory = gradient.lower(lambdas, model, [model] * experts, x).compile().memory_analysis()
    # In float32: the merge, whose arrays the gradient takes over, and activations; of a base in
    # bfloat16 a CPU keeps its copy as well. Differentiated, the merge would keep all eight experts.
    assert memory.temp_size_in_bytes < models * layers * 4 * size**2


def test_one_step_of_adam_moves_every_coefficient_by_the_learning_rate_downhill(base, experts):
    learned = learn_coefficients(base, experts, entropy, [[TOKENS]], per_layer=False, steps=1)
    [found] = learned.coefficients.values()
    flat = checkpoints.flatten(base), [checkpoints.flatten(expert) for expert in experts]
    start = jnp.full((1, 2), 0.3)
    _, slope = loss_gradient(entropy, (0,) * len(SHAPES), start, *flat, TOKENS)
    np.testing.assert_allclose(found, 0.3 - 1e-3 * np.sign(slope[0]), rtol=1e-4)


def test_each_layer_has_its_own_slope_whatever_the_order_of_the_parameters(base, experts):
    learned = learn_coefficients(base, experts, entropy, [[TOKENS]], steps=1)
    flat = checkpoints.flatten(base), [checkpoints.flatten(expert) for expert in experts]
    patterns = list(dict.fromkeys(layer_patterns(list(SHAPES)).values()))
    start = jnp.full((5, 2), 0.3)
    _, slopes = loss_gradient(entropy, (0, 1, 1, 2, 3, 4), start, *flat, TOKENS)
    for pattern, slope in zip(patterns, slopes, strict=True):
        np.testing.assert_allclose(
            learned.coefficients[pattern], 0.3 - 1e-3 * np.sign(slope), rtol=1e-4
        )


def test_a_coefficient_stays_between_0_and_1(base, experts):
    learned = learn_coefficients(
        base, experts, entropy, itertools.repeat([TOKENS]), steps=3, learning_rate=5.0
    )
    assert {value for row in learned.coefficients.values() for value in row} <= {0.0, 1.0}


def test_layers_are_the_blocks_of_a_network(tiny_config):
    names = list(checkpoints.flatten(models.spec(tiny_config)))
    patterns = layer_patterns(names)
    assert patterns["encoder/layers_00/mlp/wo"] == "encoder/layers_00/*"
    assert patterns["decoder/layers_01/pre_mlp_norm"] == "decoder/layers_01/*"
    assert patterns["token_embedder"] == "token_embedder"
    for name in names:
        assert [p for p in set(patterns.values()) if fnmatch.fnmatchcase(name, p)] == [
            patterns[name]
        ]


# Learns by the sum of all losses, on a mesh or on one device; prints what it learned.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from m2l import models, partitioning
from m2l.data import layouts
from m2l.data.examples import RankingExample
from m2l.evaluation import batching, ranking
from m2l.merging.learned_masks import learn_shared_mask, localize
from m2l.merging.search import learn_coefficients
config = models.from_dict(json.loads(sys.argv[1]))
rng = np.random.default_rng(0)
ids = lambda size: np.append(rng.integers(3, 1000, size), 1).astype(np.int32)
examples = [RankingExample(ids(6), (ids(2), ids(3)), (True, False), "", ("", ""), False)
            for _ in range(8)]
[(_, batch)] = batching.batches(examples, 8, layouts.of(config))
mesh = partitioning.make_mesh(fsdp=int(sys.argv[2]), model=int(sys.argv[3]))
placed = partitioning.shardings(models.spec(config), mesh)
parents = [jax.device_put(models.init(config, jax.random.key(seed)), placed) for seed in range(3)]
def loss(params, read):
    batch, right_B, log_p = read
    return (ranking.mean_entropy(config, params, batch)
            + ranking.mean_cross_entropy(config, params, (batch, right_B))
            + ranking.mean_divergence(config, params, (batch, log_p)))
with jax.set_mesh(mesh):
    predict = jax.jit(lambda params: ranking.predictions(config, params, batch)[0])
    read = batch, np.arange(8, dtype=np.int32) % 2, predict(parents[1])
    learned = learn_coefficients(parents[0], parents[1:], loss, [[read]] * 3, steps=3,
                                 learning_rate=0.05)
    def distance(params, batch):
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(parents[2]), strict=True)
        return sum(jnp.sum(jnp.square(x - y)) for x, y in pairs)
    shared = learn_shared_mask(parents[0], parents[1:], distance, [[0]] * 2, steps=2, seed=3)
    alone = localize(parents[0], parents[1], distance, [[0]] * 2, steps=2)
def alike(tree):
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), tree, placed)
    return jax.tree.all(same)
alike = [alike(tree) for tree in (shared.logits, alone.logits, alone.params)]
print(json.dumps([jax.device_count(), learned.losses, list(learned.coefficients.values()),
                  shared.losses + alone.losses, all(alike), alone.share]))
"""


def test_a_mesh_of_eight_devices_learns_what_one_does(forge, tiny_config):
    config = dataclasses.replace(tiny_config, num_decoder_layers=1)
    described = json.dumps(models.to_dict(config))
    one, eight = (
        json.loads(forge((PROGRAM, described, *axes), devices=axes[0] * axes[1])[0])
        for axes in ((1, 1), (4, 2))
    )
    assert (one[0], eight[0]) == (1, 8) and one[1][-1] < one[1][0]
    # Sums over devices are taken in another order, and Adam's steps are of a slope's sign.
    np.testing.assert_allclose(eight[1], one[1], rtol=1e-5)
    np.testing.assert_allclose(eight[2], one[2], atol=1e-3)
    # Masks, which are as large as the model, are sharded as it is; draws are the same.
    assert one[4] == eight[4] is True and one[5] == eight[5]
    np.testing.assert_allclose(eight[3], one[3], rtol=1e-4)


def test_what_cannot_be_learned_is_refused(base, experts):
    def refused(said, base=base, experts=experts, batches=([TOKENS],), function=entropy, **how):
        with pytest.raises(MergeError, match=said):
            learn_coefficients(base, experts, function, batches, **{"steps": 1} | how)

    refused("0 experts", experts=[])
    refused("0 steps", steps=0)
    refused("initial", initial=1.5)
    refused("learning_rate", learning_rate=0.0)
    refused("1 of 2 steps", steps=2)
    refused(
        "step 1: the loss is nan", function=lambda params, batch: entropy(params, batch) * np.nan
    )
    fewer = {"decoder": experts[0]["decoder"]}
    refused("token_embedder has shape none", experts=[fewer])
    refused("token_embedder has shape", experts=[experts[0] | {"token_embedder": np.ones((5, 4))}])
