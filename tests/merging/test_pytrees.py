"""Any pytree of parameters merges in memory to the numbers of the nested dict of its leaves."""

import typing

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from m2l.errors import MergeError
from m2l.merging import Recipe, merge_params

from .conftest import same_bits


class Pair(typing.NamedTuple):
    kernel: typing.Any
    bias: typing.Any


def array(seed, shape=(4, 3)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def train_state(seed):
    params = {"w": array(seed), "b": array(seed + 50, (3,))}
    # Another optimizer object and function each time, as in programs that restored each.
    return TrainState.create(apply_fn=lambda: seed, params=params, tx=optax.adam(1e-3))


def nnx_state(seed):
    return nnx.state(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(seed)), jnp.tanh))


TREES = {
    "list": lambda seed: [array(seed), [array(seed + 50, (2,))]],
    "tuple": lambda seed: (array(seed), (array(seed + 50),)),
    "namedtuple": lambda seed: {"layer": Pair(array(seed), array(seed + 50, (3,)))},
    "frozen dict": lambda seed: flax.core.freeze({"a": {"w": array(seed)}}),
    "keys with / and .": lambda seed: {"a/b": array(seed), "a.c": {"w": array(seed + 50)}},
    "one array": array,
    "train state": train_state,
    "nnx state": nnx_state,
    "nnx pure dict": lambda seed: nnx.to_pure_dict(nnx_state(seed)),
    "dtypes": lambda seed: {"w": jnp.bfloat16(array(seed)), "n": np.arange(3) + seed, "m": True},
    "numbers": lambda seed: {"w": array(seed), "rate": 0.5 * seed, "step": seed},
    "keys": lambda seed: {
        "w": array(seed), "old": jax.random.PRNGKey(seed), "key": jax.random.key(seed)
    },
}  # fmt: skip


def named(tree):
    """The leaves by the documented names."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/") or "value": x for p, x in pairs}


@pytest.mark.parametrize("kind", TREES)
def test_a_pytree_merges_as_the_dict_of_its_leaves_does(kind):
    base, *experts = (TREES[kind](seed) for seed in range(3))
    leaves = [named(tree) for tree in (base, *experts)]
    merged = {
        name: leaf
        for name, leaf in leaves[0].items()
        if jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else type(leaf), np.floating)
        or isinstance(leaf, float)
    }
    recipe = Recipe("dare_ties", drop_rate=0.4, density=0.5, seed=3)
    result = merge_params(base, experts, recipe)
    assert jax.tree.structure(result) == jax.tree.structure(base)
    # Each name is a key of one dict: the same names draw the same numbers.
    flat = [{name: np.asarray(tree[name], np.float32) for name in merged} for tree in leaves]
    expected = merge_params(flat[0], flat[1:], recipe)
    same_bits({name: named(result)[name] for name in merged}, expected)
    for name, leaf in leaves[0].items():
        if name not in merged:
            assert named(result)[name] is leaf


@pytest.mark.parametrize(
    ("trees", "message", "table"),
    [
        (({"a": [array(0)]}, {"a": [array(0), array(1)]}), "other parameters", ["a/1"]),
        (({"a": array(0)}, {"a": Pair(array(0), 1)}), "other parameters",
         ["a", "a/kernel", "a/bias"]),
        (({"k": jax.random.key(0), "w": 1.0}, {"k": jax.random.PRNGKey(0), "w": 1.0}),
         "other parameters", ["k"]),
        (({"a/b": 1.0, "a": {"b": 2.0}},) * 2,
         r"base: \['a'\]\['b'\] and \['a/b'\] have one name, 'a/b': rename", []),
        (({"a": "float32"},) * 2, "base: a is a str; expected an array or a number", []),
        (({0: 1.0, "a": 2.0},) * 2, "base: cannot flatten its tree of parameters: Compar", []),
    ],
)  # fmt: skip
def test_trees_that_do_not_fit_are_refused_by_key_path(trees, message, table):
    with pytest.raises(MergeError, match=message) as caught:
        merge_params(trees[0], trees[1:], Recipe("task_arithmetic"))
    rows = str(caught.value).split("\n")[2:]
    assert [row.split()[0] for row in rows] == table


def test_patterns_match_the_names_of_leaves():
    base, expert = TREES["namedtuple"](0), TREES["namedtuple"](1)
    recipe = Recipe("task_arithmetic", exclude=("*/bias",), scales=(("layer/kernel", 0.0),))
    result = merge_params(base, [expert], recipe)
    np.testing.assert_array_equal(result["layer"].kernel, base["layer"].kernel)
    np.testing.assert_array_equal(result["layer"].bias, base["layer"].bias)


def test_statistics_that_lack_a_leaf_are_refused():
    trees = [TREES["list"](seed) for seed in range(2)]
    with pytest.raises(MergeError, match="statistics 1 cannot be merged with expert 0") as caught:
        merge_params(None, trees, Recipe("fisher"), [trees[0], trees[1][:1]])
    assert str(caught.value).split("\n")[2].split() == ["1/0", "float[2]", "missing"]


def test_regmean_inside_jit_is_refused():
    with pytest.raises(
        MergeError, match="value: this method is computed on the host, not inside jit"
    ):
        jax.jit(lambda x: merge_params(None, [x], Recipe("regmean"), [{}]))(array(0))
