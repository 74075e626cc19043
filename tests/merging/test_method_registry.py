"""A function with a typed signature is a whole merge method, wherever it is defined."""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import (
    METHODS,
    Interval,
    Recipe,
    grid,
    merge,
    merge_each,
    merge_params,
    method,
    sweep,
)
from m2l.merging.methods import Density, Weights

from .conftest import same_bits, whole

Sharpness = Annotated[float, Interval(low=0), "How fast the share of an expert falls with |tau|."]


@pytest.fixture
def registry(monkeypatch):
    """The registry of methods; what a test adds is gone after it."""
    monkeypatch.setattr(METHODS, "_methods", dict(METHODS))
    return METHODS


@pytest.fixture
def softened(registry):
    """A method of this file, with a hyper-parameter that no other has."""

    @method
    def softened(
        base: jax.Array,
        experts: Sequence[jax.Array],
        thresholds: jax.Array,
        density: Annotated[float, Interval(0, 1, open_low=True), "Share that is kept."] = 0.5,
        sharpness: Sharpness = 2.0,
    ) -> jax.Array:
        """Adds the mean of task vectors that a large entry weakens: tau / (1 + sharpness |tau|).

        Nobody 2026.
        """
        taus = [expert - base for expert in experts]
        trimmed = [
            jnp.where(jnp.abs(tau) >= threshold, tau, 0)
            for tau, threshold in zip(taus, thresholds, strict=True)
        ]
        return base + sum(tau / (1 + sharpness * jnp.abs(tau)) for tau in trimmed) / len(taus)

    return softened


def expected(base, experts, density, sharpness):
    base, taus = whole(base), [whole(expert) - whole(base) for expert in experts]
    count = int(density * base.size)
    limits = [np.sort(np.abs(tau))[-count] for tau in taus]
    trimmed = [np.where(np.abs(t) >= limit, t, 0) for t, limit in zip(taus, limits, strict=True)]
    return base + sum(tau / (1 + sharpness * np.abs(tau)) for tau in trimmed) / len(taus)


def test_a_new_method_merges_in_memory_from_disk_and_in_sweeps(softened, models, paths, tmp_path):
    base, experts = models
    recipes = grid({"method": "softened"}, {"sharpness": [0.5, 3.0], "density": [0.2]})
    assert [(r.sharpness, r.density) for r in recipes] == [(0.5, 0.2), (3.0, 0.2)]
    points = sweep(base, experts, recipes, lambda params, recipe: float(whole(params).sum()))
    assert len({point.score for point in points}) == 2
    for recipe in recipes:
        merged = merge_params(base, experts, recipe)
        wanted = expected(base, experts, 0.2, recipe.sharpness)
        np.testing.assert_allclose(whole(merged), wanted, rtol=0, atol=1e-6)
        out = tmp_path / f"{recipe.sharpness}"
        manifest = merge(*paths, recipe, out, progress=False)
        same_bits(*(checkpoints.flatten(tree) for tree in (checkpoints.restore(out), merged)))
        assert Recipe.from_dict(manifest.made_by["recipe"]) == recipe
    with pytest.raises(MergeError, match="sharpness must be at least 0, not -1"):
        Recipe("softened", sharpness=-1)
    with pytest.raises(MergeError, match="ties has no sharpness"):
        Recipe("ties", sharpness=1)


def test_the_commands_know_a_new_method(softened, paths, tmp_path, run_m2l, capsys):
    assert run_m2l("merge", "--list") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "softened" in line]
    assert "density=0.5, sharpness=2" in line and "Adds the mean of task vectors" in line
    assert run_m2l("merge", "--help") == 0
    assert "--sharpness" in capsys.readouterr().out
    base, experts = paths
    models = ("--base", base, *(word for path in experts for word in ("--expert", path)))
    flags = (*models, "--method", "softened", "--density", "0.2")
    assert run_m2l("merge", *flags, "--sharpness", 3, "--out", tmp_path / "one") == 0
    assert run_m2l("sweep", *flags, "--sharpness", "1:3:2", "--out", tmp_path / "many") == 0
    names = [f"density=0.2,sharpness={value}" for value in (1, 3)]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == names
    merged = [tmp_path / "one", *(tmp_path / "many" / name for name in names)]
    digests = [checkpoints.read_manifest(path).digest for path in merged]
    assert digests[0] == digests[2] != digests[1]


def test_thresholds_of_magnitudes_by_weights_are_each_recipes_own(registry, models):
    def weighted(taus, weights):
        return [jnp.abs(weight * tau + 1) for weight, tau in zip(weights, taus, strict=True)]

    @method(magnitudes=weighted)
    def shifted(base, experts, thresholds, density: Density = 0.2, weights: Weights = ()):
        """Keeps the entries whose weighted task vector is far from -1."""
        sizes = weighted([expert - base for expert in experts], weights)
        return sum(jnp.where(s >= t, s, 0) for s, t in zip(sizes, thresholds, strict=True))

    recipes = [Recipe("shifted", weights=(1.0, w, 2.0)) for w in (1.0, -30.0)]
    for recipe, merged in zip(recipes, merge_each(*models, recipes), strict=True):
        np.testing.assert_array_equal(whole(merged), whole(merge_params(*models, recipe)))


def _unknown(experts, widgets):
    """Needs what there is not."""


def _reserved(experts, seed: Annotated[float, Interval()] = 0.0):
    """Takes a setting of every recipe for its own."""


def _of_text(experts, mode: Annotated[str, Interval()] = "a"):
    """Has a hyper-parameter that is no number."""


def _without_density(base, experts, thresholds):
    """Wants thresholds of no density."""


def _without_base(experts, masks, rescale):
    """Drops entries of what is no task vector."""


def _without_coefficients(experts, coefficients):
    """Wants coefficients of no inner products."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_unknown, "widgets is no input .*Annotated"),
        (_reserved, "every recipe has a setting seed"),
        (_of_text, "mode: a hyper-parameter is a float or a Sequence"),
        (_without_density, "thresholds needs density"),
        (_without_base, "masks needs base"),
        (_without_coefficients, "coefficients are an argument of the function and of @method"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_signature_that_describes_no_method_is_refused(registry, function, message):
    with pytest.raises(TypeError, match=message):
        method(function)
    assert function.__name__ not in registry


def test_sums_and_magnitudes_are_for_methods_that_use_them(registry):
    for options in ({"sums": sum}, {"magnitudes": list}):
        with pytest.raises(TypeError, match="sums are for coefficients, magnitudes for thresholds"):
            method(_without_inputs, **options)


def _without_inputs(experts):
    """Takes neither coefficients nor thresholds."""


def test_a_method_of_another_module_is_not_replaced(registry):
    def average(experts):
        """Is another average."""

    with pytest.raises(MergeError, match=r"'average' of .*registry is already defined in m2l"):
        method(average)


PLUGIN = '''
from m2l.merging import method

@method
def first_of_all(experts):
    """Takes the first expert."""
    return experts[0]
'''


def install(folder, module, text):
    """Writes a module and what pip would of a distribution that has it as an entry point."""
    (folder / f"{module}.py").write_text(text)
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[m2l.merge_methods]\nany = {module}\n")


def test_packages_add_methods_by_an_entry_point(registry, models, monkeypatch, tmp_path):
    install(tmp_path, "m2l_plugin_of_a_test", PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_complete", False)
    merged = merge_params(None, models[1], Recipe("first_of_all"))
    np.testing.assert_array_equal(whole(merged), whole(models[1][0]))


def test_a_package_that_cannot_be_loaded_is_named(registry, monkeypatch, tmp_path):
    install(tmp_path, "m2l_broken_plugin", "import a_module_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_complete", False)
    message = "merge methods 'any' of the package m2l_broken_plugin .*a_module_that_is_missing.*"
    with pytest.raises(MergeError, match=message):
        Recipe("average")
