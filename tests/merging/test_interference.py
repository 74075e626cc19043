"""What a merge leaves of its experts, against NumPy on the merge that is written."""

import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import Recipe, merge
from m2l.merging.interference import measure


def vector(tree, names):
    flat = checkpoints.flatten(tree)
    return np.concatenate([np.asarray(flat[name], np.float64).reshape(-1) for name in names])


def expected(models, merged, names):
    """The formulas of the module, expert by expert, on whole vectors."""
    base, experts = vector(models[0], names), [vector(expert, names) for expert in models[1]]
    taus, result = [expert - base for expert in experts], vector(merged, names) - base
    pairs = [(a, b) for i, a in enumerate(taus) for b in taus[:i]]
    parts = [min(max(result @ tau / (tau @ tau), 0.0), 1.0) for tau in taus]
    signs = np.sign(np.stack(taus))
    return {
        "experts": 3.0,
        "norm": np.sqrt(np.mean([tau @ tau for tau in taus]) / (base @ base)),
        "cosine": np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]),
        "conflicts": np.mean((signs.max(0) > 0) & (signs.min(0) < 0)),
        "projection": np.mean(parts),
        "interference": np.mean(
            [
                np.linalg.norm(result - part * tau) / np.linalg.norm(tau)
                for part, tau in zip(parts, taus, strict=True)
            ]
        ),
    }


RECIPES = [
    Recipe("average", weights=(1, 2, 4)),
    Recipe("task_arithmetic", scale=0.3),
    Recipe("task_arithmetic", scale=1.4),
    Recipe("task_arithmetic", scale=-0.5),
    Recipe("ties", density=0.2, scale=1.7),
    Recipe("ties", density=0.4, scope="tensor", exclude=("token_embedder",)),
    Recipe("dare_ties", drop_rate=0.6, seed=4, scale=0.7),
    Recipe("task_arithmetic", scale=0.3, scales=[("decoder/*", 0.9)]),
    Recipe("task_multislerp"),
]


def test_measures_are_those_of_the_merge_that_a_recipe_writes(models, paths, tmp_path):
    base, experts = paths
    measured = measure(base, experts, RECIPES, progress=False)
    for number, (recipe, measures) in enumerate(zip(RECIPES, measured, strict=True)):
        out = tmp_path / str(number)
        merge(base, experts, recipe, out, progress=False)
        names = [n for n in checkpoints.flatten(models[0]) if n not in recipe.exclude]
        wanted = expected(models, checkpoints.restore(out), names)
        for name, value in measures._asdict().items():
            # Sums are of float32, over 900 entries; differences of squares cancel some digits.
            assert value == pytest.approx(wanted[name], rel=2e-4, abs=1e-5), (recipe, name)


def test_what_cannot_be_measured_is_refused(paths):
    base, experts = paths
    average = [Recipe("average")]
    with pytest.raises(MergeError, match="name two or more, not 1"):
        measure(base, experts[:1], average)
    with pytest.raises(MergeError, match="base: equal to the base, it has no task vector"):
        measure(base, [experts[0], base], average, progress=False)
    for method in ("fisher", "tsv_m", "multislerp"):
        with pytest.raises(MergeError, match=f"{method} needs statistics, whole matrices, or"):
            measure(base, experts, [Recipe(method)])
