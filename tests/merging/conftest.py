"""A base and three experts, in memory and as checkpoints."""

import socket

import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import METHODS, Recipe, merge

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


def default(method):
    """A recipe of a method's defaults, and 0.5 for what has none."""
    settings = METHODS[method].hyper_parameters.values()
    return Recipe(method, {each.name: 0.5 for each in settings if each.default is None})


ELEMENTWISE = [
    name
    for name, method in METHODS.items()
    if 3 in method.experts and method.coefficients is None and method.statistic is None
]
"""Methods that merge the three experts, and with the same bits in memory and from disk."""


def write(path, params, **changes):
    about = {"model": MODEL, "vocabulary": VOCABULARY, "made_by": {"kind": "test"}} | changes
    return checkpoints.save(path, params, **about)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def paths(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    base, experts = models
    write(root / "base", base)
    for index, expert in enumerate(experts):
        write(root / f"expert_{index}", expert)
    return root / "base", [root / f"expert_{index}" for index in range(3)]


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def whole(tree):
    return np.concatenate([np.ravel(leaf) for leaf in checkpoints.flatten(tree).values()])


def same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert np.asarray(array).dtype == np.asarray(wanted[name]).dtype
        assert np.asarray(array).tobytes() == np.asarray(wanted[name]).tobytes(), name


@pytest.fixture
def refused(tmp_path, paths):
    """Merges what cannot be merged, sees that nothing is written, and returns the error's table."""
    base, experts = paths

    def check(message, *, kind=MergeError, base=base, experts=experts, recipe=None, out=None):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(kind, match=message) as caught:
            merge(base, experts, recipe or Recipe("task_arithmetic"), out or tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before
        first, *table = str(caught.value).split("\n")
        assert not table or "cannot be merged with" in first
        return table

    return check
