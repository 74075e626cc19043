"""The presets give what the peers' own code gave on a tiny model: tests/goldens/merge_goldens.*."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from m2l.checkpoints import safetensors
from m2l.errors import UnknownNameError
from m2l.merging import METHODS, PRESETS, Recipe, merge, preset
from m2l.merging.methods import Consensus, drop, elect_and_merge, trim
from m2l.merging.requirements import Requirements

DATA = Path(__file__).parents[1] / "goldens"
NAMES = ["embed.weight", "up.weight", "down.weight", "norm.weight", "gate", "odd"]
WEIGHTS = (0.5, 0.3, 0.2)
UNEQUAL = (0.5, 0.4, 0.3)

# Case -> preset, settings, and for slerp which models.
CASES = {
    "official_ties": ("official", {"method": "ties"}),
    "official_ties_bf16": ("official", {"method": "ties"}),
    "official_ties_cancel": ("official", {"method": "ties"}),
    "official_ties_balanced": ("official", {"method": "ties"}),
    "official_ties_sum": ("official", {"method": "ties", "consensus": "sum"}),
    "official_ties_max": ("official", {"method": "ties", "consensus": "max"}),
    "official_ties_max_cancel": ("official", {"method": "ties", "consensus": "max"}),
    "official_task_arithmetic": ("official", {"method": "task_arithmetic"}),
    "fusion_bench_simple_average": ("fusion_bench", {"method": "average"}),
    "fusion_bench_weighted_average": ("fusion_bench", {"method": "average", "weights": UNEQUAL}),
    "fusion_bench_task_arithmetic": ("fusion_bench", {"method": "task_arithmetic"}),
    "fusion_bench_ties": ("fusion_bench", {"method": "ties"}),
    "fusion_bench_ties_bf16": ("fusion_bench", {"method": "ties"}),
    "fusion_bench_ties_mean": (
        "fusion_bench",
        {"method": "ties", "consensus": "mean", "scale": 1.0},
    ),
    "mergelm_average": ("mergelm", {"method": "average"}),
    "mergelm_task_arithmetic": ("mergelm", {"method": "task_arithmetic", "scale": 0.5}),
    "mergelm_ties": ("mergelm", {"method": "ties"}),
    "mergelm_ties_bf16": ("mergelm", {"method": "ties"}),
    "mergelm_ties_cancel": ("mergelm", {"method": "ties"}),
    "mergelm_ties_balanced": ("mergelm", {"method": "ties"}),
    "mergekit_linear": ("mergekit", {"method": "average", "weights": UNEQUAL}),
    "mergekit_linear_sum": ("mergekit", {"method": "weighted_sum", "weights": UNEQUAL}),
    "mergekit_task_arithmetic": (
        "mergekit",
        {"method": "task_arithmetic", "weights": WEIGHTS, "scale": 0.7},
    ),
    "mergekit_ties": ("mergekit", {"method": "ties", "density": 0.3, "weights": WEIGHTS}),
    "mergekit_ties_sum": (
        "mergekit",
        {"method": "ties", "density": 0.3, "weights": WEIGHTS, "consensus": "sum", "scale": 0.7},
    ),
    "mergekit_bf16_ties_untrimmed": ("mergekit", {"method": "ties"}),
    "mergekit_breadcrumbs": (
        "mergekit",
        {
            "method": "breadcrumbs",
            "density": 0.6,
            "gamma": 0.1,
            "weights": WEIGHTS,
            "exclude": ("gate",),
        },
    ),
    "mergekit_breadcrumbs_ties": (
        "mergekit",
        {
            "method": "breadcrumbs_ties",
            "density": 0.6,
            "gamma": 0.1,
            "weights": WEIGHTS,
            "exclude": ("gate",),
        },
    ),
    "mergekit_slerp": ("mergekit", {"method": "slerp", "t": 0.3}),
    "mergekit_model_stock": ("mergekit", {"method": "model_stock"}),
}


@pytest.fixture(scope="module")
def goldens():
    about = json.loads((DATA / "merge_goldens.json").read_text())["cases"]
    with np.load(DATA / "merge_goldens.npz") as arrays:
        return about, dict(arrays)


@pytest.fixture(scope="module")
def directories(goldens, tmp_path_factory):
    """Of each set of inputs, its base and experts as safetensors."""
    _, arrays = goldens
    root, found = tmp_path_factory.mktemp("goldens"), {}
    for inputs in ("inputs", "bf16", "cancel", "balanced"):
        found[inputs] = []
        for model in ("base", "expert_0", "expert_1", "expert_2"):
            tensors = {name: arrays[f"{inputs}/{model}/{name}"] for name in NAMES}
            path = root / inputs / model
            path.mkdir(parents=True)
            described = {name: (a.shape, a.dtype) for name, a in tensors.items()}
            extents = safetensors.create(path, described, [NAMES])
            for name, array in tensors.items():
                extents[name].write_from(array.reshape(-1), 0)
            found[inputs].append(path)
    return found


def read(path):
    return {n: t.read().reshape(t.shape) for n, t in safetensors.open_tensors(path).items()}


@pytest.mark.parametrize("case", CASES)
def test_a_preset_gives_what_its_codebase_gave(case, goldens, directories, tmp_path):
    about, arrays = goldens
    name, settings = CASES[case]
    base, *experts = directories[about[case]["inputs"]]
    experts = experts[:2] if settings["method"] == "slerp" else experts
    base = None if not METHODS[settings["method"]].needs_base else base
    recipe = Recipe(**preset(name, settings))
    merge(base, experts, recipe, tmp_path / "out", progress=False)
    in_memory = merge(base and read(base), [read(expert) for expert in experts], recipe)
    for merged in (read(tmp_path / "out"), in_memory):
        for tensor in set(NAMES) - {*settings.get("exclude", ())}:
            wanted = arrays[f"{case}/{tensor}"]
            # Their sums run in another order than ours.
            np.testing.assert_allclose(merged[tensor], wanted, rtol=1e-6, atol=1e-6, err_msg=tensor)


def models(goldens, case):
    about, arrays = goldens
    inputs = about[case]["inputs"]
    for name in NAMES:
        base = arrays[f"{inputs}/base/{name}"]
        yield name, base, [arrays[f"{inputs}/expert_{i}/{name}"] - base for i in range(3)]


def masks(goldens, case, name, kind="mask"):
    about, arrays = goldens
    holder = about[case]["saved"][kind]
    return [arrays.get(f"{holder}/{kind}_{i}/{name}") for i in range(3)]


def l1_rescale(taus, kept):
    before = np.array([np.abs(tau).sum() for tau in taus])
    after = np.array([np.abs(tau[keep]).sum() for tau, keep in zip(taus, kept, strict=True)])
    small = (before < 1e-7) | (after < 1e-7)
    return np.where(small, 1, before / np.where(small, 1, after)).astype(np.float32)


@pytest.mark.parametrize(
    ("case", "weighted_mean"),
    [
        ("mergekit_dare_linear", None),
        ("mergekit_dare_ties", "sum"),
        ("mergekit_della", "mean"),
        ("mergekit_della_linear", None),
    ],
)
def test_mergekits_drops_are_ours_with_its_own_masks(case, weighted_mean, goldens):
    _, arrays = goldens
    weights = np.float32(WEIGHTS)
    for name, base, taus in models(goldens, case):
        kept = masks(goldens, case, name)
        # Where its density is 1 it draws nothing.
        kept = [np.ones(base.shape, bool) if k is None else k.astype(bool) for k in kept]
        dropped = drop(taus, kept, l1_rescale(taus, kept))
        if weighted_mean is None:
            found = base + sum(w * tau for w, tau in zip(weights, dropped, strict=True))
        else:
            consensus = Consensus(weighted_mean, weighted=True)
            found = base + elect_and_merge(dropped, weights, np.float32(1), consensus)
        wanted = arrays[f"{case}/{name}"]
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6, err_msg=name)


def test_fusion_bench_trims_what_it_dropped_over_the_whole_model(goldens):
    case = "fusion_bench_dare_ties"
    _, arrays = goldens
    parts = [
        (name, base, drop(taus, [m.astype(bool) for m in masks(goldens, case, name)], [2.0] * 3))
        for name, base, taus in models(goldens, case)
    ]
    flat = [np.concatenate([np.ravel(p[2][i]) for p in parts]) for i in range(3)]
    recipe = Recipe(**preset("fusion_bench", {"method": "dare_ties"}))
    rank = Requirements(recipe, 3).ranks(flat[0].size)["thresholds"][0]
    limits = np.float32([np.sort(np.abs(tau))[-rank] for tau in flat])
    trimmed = [(name, base, trim(taus, limits)) for name, base, taus in parts]
    signs = sum(int(np.sign(sum(taus)).sum()) for _, _, taus in trimmed)
    for name, base, taus in trimmed:
        merged = elect_and_merge(
            taus, np.ones(3, np.float32), np.float32(np.sign(signs)), recipe.election
        )
        wanted = arrays[f"{case}/{name}"]
        np.testing.assert_allclose(base + recipe.scale * merged, wanted, rtol=1e-6, atol=1e-6)


def test_fisher_and_regmean_are_mergelms(goldens):
    _, arrays = goldens
    for name in [name for name in NAMES if name != "odd"]:
        experts = [arrays[f"inputs/expert_{i}/{name}"] for i in range(3)]
        # Theirs adds the least Fisher information, ours raises to it.
        fishers = [f + np.float32(1e-6) for f in masks(goldens, "mergelm_fisher", name, "fisher")]
        weights = np.ones(3, np.float32)
        found = METHODS["fisher"].function(experts, fishers, weights, 1e-6)
        np.testing.assert_allclose(found, arrays[f"mergelm_fisher/{name}"], rtol=2e-6, atol=1e-6)
    for name in ("up.weight", "down.weight"):
        kernels = [arrays[f"inputs/expert_{i}/{name}"].T for i in range(3)]
        grams = masks(goldens, "mergelm_regmean", name, "gram")
        found = METHODS["regmean"].function(name, kernels, grams, 0.9)
        # They invert in float32.
        np.testing.assert_allclose(found.T, arrays[f"mergelm_regmean/{name}"], rtol=0, atol=1e-4)


def test_every_preset_is_of_known_methods_and_valid_settings():
    for name, methods in PRESETS.items():
        for method in methods:
            Recipe(**preset(name, {"method": method}))
    with pytest.raises(UnknownNameError, match=r"unknown preset 'mergkit'.*'mergekit'"):
        preset("mergkit", {"method": "ties"})
    with pytest.raises(UnknownNameError, match="method of the preset official: 'slerp'"):
        preset("official", {"method": "slerp"})


def test_inputs_in_bfloat16_are_what_they_were(goldens):
    _, arrays = goldens
    for name in NAMES:
        array = arrays[f"bf16/expert_0/{name}"]
        np.testing.assert_array_equal(array.astype(ml_dtypes.bfloat16).astype(np.float32), array)
