"""Writes tests/goldens/merge_goldens: what the peers' merging code computes on tiny models.

The peers are run, not copied: mergekit from an environment that has it (pip install
mergekit==0.1.5, with torch), the others from clones at the commits below. FusionBench also needs
hydra-core, lightning, h5py, bidict and joblib; ties-merging matplotlib and scipy.

    python tests/goldens/make_merge_goldens.py --ties-merging DIR --fusion-bench DIR --mergelm DIR
    python tests/goldens/make_merge_goldens.py --check

--check needs NumPy alone: it computes every case again in float64 from the formula that
merge_goldens.json states, and compares.

merge_goldens.npz holds

    <inputs>/base/<tensor>, <inputs>/expert_<i>/<tensor>    the models of a set of inputs
    <case>/<tensor>                                         what the peer made of them
    <case>/mask_<i>/<tensor>                                the entries of expert i it kept
    <case>/p_<i>/<tensor>                                   the odds with which it kept them
    <case>/fisher_<i>/<tensor>, <case>/gram_<i>/<tensor>    the statistics it was given

all float32 but for the masks, which are Booleans. Cases that drew the same masks share them: the
case's "saved" in the JSON says under which case each kind lies. The sets of inputs are

    inputs      a network of six tensors, whose task vectors are of unlike sizes
    bf16        the same shapes; all of bfloat16, many magnitudes are equal
    cancel      the same shapes; task vectors are small multiples of 1/64, many sums are 0
    balanced    the same shapes; as many elected signs are positive as negative
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

DATA = Path(__file__).parent
ARRAYS, CASES_FILE = DATA / "merge_goldens.npz", DATA / "merge_goldens.json"

PEERS = {
    "official": "prateeky2806/ties-merging at 44e7891fc84f3de7e4caa52664cd864ca3715e91",
    "fusion_bench": "tanganke/fusion_bench 0.2.33 at 54c9e8c9d9621620c720452cd8533332a32d3689",
    "mergelm": "yule-BUAA/MergeLM at 6d49ad96fd69c92013654b837041b868aa806564",
    "mergekit": "mergekit 0.1.5 (PyPI)",
}
EXPERTS = 3
SEED = 0

Array = np.ndarray
Model = dict[str, Array]


# --- The tiny models -----------------------------------------------------------------------------

# Name: shape, and the size of the task vectors there.
TINY = {
    "embed.weight": ((13, 8), 0.02),
    "up.weight": ((16, 8), 0.08),
    "down.weight": ((8, 16), 0.01),
    "norm.weight": ((8,), 0.05),
    "gate": ((1,), 0.1),
    "odd": ((3, 1, 5), 0.04),
}
# mergekit falls back on the names in the files where transformers cannot build a language model.
CONFIG = {"architectures": ["Tiny"], "model_type": "t5"}


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds finite values to the nearest bfloat16, ties to even, as float32."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def drawn_models(seed: int) -> list[Model]:
    """Draws a base and its experts: normal, float32."""
    rng = np.random.default_rng(seed)
    base = {
        name: (np.float32("norm" in name) + rng.normal(0, 0.5, shape)).astype(np.float32)
        for name, (shape, _) in TINY.items()
    }
    return [base] + [
        {
            name: base[name] + rng.normal(0, size, shape).astype(np.float32)
            for name, (shape, size) in TINY.items()
        }
        for _ in range(EXPERTS)
    ]


def rounded_models(models: list[Model]) -> list[Model]:
    """Returns models in bfloat16 whose task vectors are a few units in the last place."""
    base = models[0]
    return [
        {name: to_bfloat16(16 * base[name] + 4 * (value - base[name])) for name, value in m.items()}
        for m in models
    ]


def cancelling_models(seed: int) -> list[Model]:
    """Draws models on a grid of 1/64, whose task vectors often sum to exactly nothing."""
    rng = np.random.default_rng(seed)
    base = {name: rng.integers(-99, 100, shape) for name, (shape, _) in TINY.items()}
    steps = [
        {name: rng.integers(-5, 6, shape) for name, (shape, _) in TINY.items()}
        for _ in range(EXPERTS)
    ]
    # Signs lean to one side, so that there is a majority.
    steps[0] = {name: np.abs(step) for name, step in steps[0].items()}
    models = [base] + [{name: base[name] + step[name] for name in base} for step in steps]
    return [{n: (v / 64).astype(np.float32) for n, v in model.items()} for model in models]


def balanced_models(seed: int) -> list[Model]:
    """Draws models on a grid of 1/64; each task vector is a vector and then its negative."""
    rng = np.random.default_rng(seed)
    sizes = [int(np.prod(shape)) for shape, _ in TINY.values()]
    half = sum(sizes) // 2
    assert 2 * half == sum(sizes)
    vectors = [np.zeros(2 * half)]
    for _ in range(EXPERTS):
        step = rng.integers(-5, 6, half)
        vectors.append(np.concatenate([step, -step]))
    start = rng.integers(-99, 100, 2 * half)
    models = []
    for vector in vectors:
        parts = np.split((start + vector) / 64, np.cumsum(sizes)[:-1])
        models.append(
            {
                name: part.reshape(shape).astype(np.float32)
                for (name, (shape, _)), part in zip(TINY.items(), parts, strict=True)
            }
        )
    return models


def all_inputs() -> dict[str, list[Model]]:
    """Returns every set of inputs: the base, then the experts."""
    plain = drawn_models(1)
    return {
        "inputs": plain,
        "bf16": rounded_models(plain),
        "cancel": cancelling_models(3),
        "balanced": balanced_models(4),
    }


# --- The formulas, in float64 ----------------------------------------------------------------


def joined(model: Model) -> np.ndarray:
    """Returns all entries of a model, one vector."""
    return np.concatenate([model[name].reshape(-1) for name in sorted(model)])


def split(vector: np.ndarray, like: Model) -> Model:
    """Inverts `joined`."""
    names = sorted(like)
    parts = np.split(vector, np.cumsum([like[name].size for name in names])[:-1])
    return {name: part.reshape(like[name].shape) for name, part in zip(names, parts, strict=True)}


def over_model(formula: Callable) -> Callable:
    """Makes a formula of the whole model's vectors one of models."""

    def merge(base: Model, experts: list[Model], parameters: dict, extras: dict) -> Model:
        extras = {kind: [joined(model) for model in models] for kind, models in extras.items()}
        result = formula(joined(base), np.stack([*map(joined, experts)]), parameters, extras)
        return split(result, base)

    return merge


def per_tensor(formula: Callable) -> Callable:
    """Makes a formula of one tensor one of models."""

    def merge(base: Model, experts: list[Model], parameters: dict, extras: dict) -> Model:
        return {
            name: formula(
                base[name],
                np.stack([expert[name] for expert in experts]),
                parameters,
                {
                    kind: [model.get(name) for model in models]
                    for kind, models in extras.items()
                    if name in models[0]
                },
            )
            for name in base
        }

    return merge


def task_vectors(base: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Computes differences, rounded to float32 as every peer does."""
    return np.float64(experts - base)


def elected_merge(taus: np.ndarray, merge: str, zero_agrees: str) -> np.ndarray:
    """Elects signs by mass, cancelled ones by majority; merges what agrees by mean, sum or max.

    zero_agrees says what agrees with a majority that is itself 0: "negative" ones, or "none".
    """
    signs = np.sign(taus.sum(0))
    signs[signs == 0] = np.sign(signs.sum())
    agreeing = np.where(signs > 0, taus > 0, taus < 0)
    if zero_agrees == "none":
        agreeing &= signs != 0
    agreed = np.where(agreeing, taus, 0)
    if merge == "mean":
        return agreed.sum(0) / np.maximum(agreeing.sum(0), 1)
    return agreed.sum(0) if merge == "sum" else np.abs(agreed).max(0) * signs


def from_rank(taus: np.ndarray, rank: int) -> np.ndarray:
    """Keeps of each row the entries whose magnitude is at least the rank-th smallest (from 1)."""
    thresholds = np.sort(np.abs(taus), axis=1)[:, rank - 1, None]
    return np.where(np.abs(taus) >= thresholds, taus, 0)


def top_percent(taus: np.ndarray, percent: float) -> np.ndarray:
    """Trims as ties-merging and FusionBench do."""
    size = taus.shape[1]
    return from_rank(taus, size - int(size * (percent / 100)))


@over_model
def average(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes the mean of the experts."""
    return np.float64(experts).mean(0)


@over_model
def task_arithmetic(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes the base plus lambda times the sum of the task vectors."""
    return base + parameters["lambda"] * task_vectors(base, experts).sum(0)


@over_model
def ties(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes TIES of ties-merging and FusionBench."""
    taus = top_percent(task_vectors(base, experts), parameters["percent"])
    merged = elected_merge(taus, parameters["merge"], "negative")
    return base + parameters["lambda"] * merged


@over_model
def weighted_average(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes the weighted mean or sum of the experts."""
    weights = np.array(parameters["weights"])
    total = weights.sum() if parameters["normalize"] else 1
    return np.einsum("n,n...->...", weights, np.float64(experts)) / total


@over_model
def fusion_bench_dare(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes DARE, then task arithmetic or TIES with its trim."""
    rescale = np.float32(1 - parameters["drop_rate"])
    taus = task_vectors(base, experts)
    for tau, mask in zip(taus, extras["mask"], strict=True):
        # Tensors without a mask are left as they are; `joined` needs all of them.
        tau[:] = np.where(mask == 2, tau, np.float32(tau) * (mask == 1) / rescale)
    if "percent" in parameters:
        merged = elected_merge(
            top_percent(taus, parameters["percent"]), parameters["merge"], "negative"
        )
    else:
        merged = taus.sum(0)
    return base + parameters["lambda"] * merged


@over_model
def mergelm_ties(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes MergeLM's TIES: trims from the int(rate d)-th smallest magnitude on."""
    taus = task_vectors(base, experts)
    taus = from_rank(taus, int(taus.shape[1] * parameters["param_value_mask_rate"]))
    return base + parameters["scaling_coefficient"] * elected_merge(taus, "mean", "none")


@over_model
def mergelm_dare(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes MergeLM's DARE through float32 models, then the method it is applied to."""
    models = []
    for expert, mask, rate in zip(
        experts, extras["mask"], parameters["weight_mask_rates"], strict=True
    ):
        tau = (expert - base) * mask
        if parameters["use_weight_rescale"]:
            tau = tau / np.float32(1 - rate)
        models.append(base + np.float32(tau))
    models = np.stack(models)
    if parameters["mask_apply_method"] == "average_merging":
        return np.float64(models).mean(0)
    taus = task_vectors(base, models)
    if parameters["mask_apply_method"] == "task_arithmetic":
        merged = taus.sum(0)
    else:
        rank = int(taus.shape[1] * parameters["param_value_mask_rate"])
        merged = elected_merge(from_rank(taus, rank), "mean", "none")
    return base + parameters["scaling_coefficient"] * merged


@per_tensor
def mergelm_magnitude(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes MergeLM's magnitude pruning, per tensor; the case excludes tensors of one entry."""
    if base.size == 1:
        return np.float64(base)
    total = np.zeros(base.shape)
    for tau, rate in zip(task_vectors(base, experts), parameters["weight_mask_rates"], strict=True):
        threshold = np.sort(np.abs(tau), axis=None)[int(tau.size * rate) - 1]
        total += np.where(np.abs(tau) > threshold, tau / (1 - rate), 0)
    return base + parameters["scaling_coefficient"] * total


@over_model
def fisher(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes the Fisher-weighted mean; normalised: each Fisher is divided by its norm."""
    fishers, least = np.float64(extras["fisher"]), parameters["minimal_fisher_weight"]
    scales = np.ones(len(experts))
    if parameters["normalize_fisher_weight"]:
        scales = 1 / (np.linalg.norm(fishers, axis=1) + least)
    weights = scales[:, None] * (fishers + least)
    return (weights * experts).sum(0) / weights.sum(0)


@per_tensor
def regmean(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes least squares for linear layers of [out, in], the mean for the rest."""
    if "gram" not in extras:
        return np.float64(experts).mean(0)
    grams = np.float64(extras["gram"])
    diagonal = np.eye(grams.shape[-1], dtype=bool)
    grams = np.where(diagonal, grams, grams * parameters["reduce_non_diagonal_ratio"])
    right = np.einsum("nij,noj->io", grams, np.float64(experts))
    return np.linalg.solve(grams.sum(0), right).T


def slerp_coefficients(t: float, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Computes sin((1 - t) phi) / sin phi, sin(t phi) / sin phi; 1 - t, t if nearly collinear."""
    first, second = np.float64(first).ravel(), np.float64(second).ravel()
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    if abs(cosine) > 0.9995:
        return 1 - t, t
    angle = np.arccos(cosine)
    return np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)


@per_tensor
def slerp(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes slerp from the first of the pair to the second, each tensor as one vector."""
    models = [base, *experts]
    first, second = (models[number] for number in parameters["pair"])
    first_share, second_share = slerp_coefficients(parameters["t"], first, second)
    return first_share * np.float64(first) + second_share * np.float64(second)


def pairs(taus: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns every two task vectors."""
    return [(a, b) for number, a in enumerate(taus) for b in taus[number + 1 :]]


@per_tensor
def fusion_bench_model_stock(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes Model Stock with the mean of the angles; the case ignores tensors of one entry."""
    if base.size == 1:
        return np.float64(experts).mean(0)
    taus = task_vectors(base, experts)
    cosines = [
        (a * b).sum() / (np.sqrt((a**2).sum() * (b**2).sum()) + 1e-8) for a, b in pairs(taus)
    ]
    cosine = np.cos(np.mean(np.arccos(np.clip(cosines, -1, 1))))
    ratio = len(taus) * cosine / (1 + (len(taus) - 1) * cosine + 1e-8)
    return ratio * np.float64(experts).mean(0) + (1 - ratio) * base


@per_tensor
def mergekit_model_stock(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes Model Stock with the mean of the cosines, per tensor or per row."""
    taus = task_vectors(base, experts)
    rows = parameters["filter_wise"] and base.ndim > 1
    flat = taus.reshape(len(taus), *(base.shape if rows else (1, -1)))
    cosine = np.mean(
        [
            (a * b).sum(-1)
            / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-6)
            for a, b in pairs(flat)
        ],
        axis=0,
    )
    ratio = len(taus) * cosine / (1 + (len(taus) - 1) * cosine)
    ratio = ratio[:, None] if rows else ratio[0]
    return ratio * np.float64(experts).mean(0) + (1 - ratio) * base


@per_tensor
def mergekit_linear(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes the weighted mean or sum of the experts."""
    weights = np.array(parameters["weight"])
    total = weights.sum() if parameters["normalize"] else 1
    return np.einsum("n,n...->...", weights, np.float64(experts)) / total


def mergekit_mask(tau: np.ndarray, number: int, parameters: dict, extras: dict) -> np.ndarray:
    """Returns the mask of mergekit's sparsification of a tensor: drawn, or by magnitude."""
    if "mask" in extras:
        return extras["mask"][number]
    density, gamma = parameters.get("density", 1.0), parameters.get("gamma", 0.0)
    if density >= 1:
        return np.ones(tau.shape, bool)
    keep = int(density * tau.size)
    if "gamma" not in parameters:
        keep = max(1, keep)
    start = max(0, tau.size - keep - int(gamma * tau.size))
    if "gamma" not in parameters:
        start = tau.size - keep
    mask = np.zeros(tau.size, bool)
    mask[np.argsort(np.abs(tau), axis=None)[start : start + keep]] = True
    return mask.reshape(tau.shape)


def della_odds(tau: Array, density: float, epsilon: float) -> Array:
    """Computes the odds of being kept, which rise with the magnitude's rank along axis 1."""
    rows = np.abs(tau if tau.ndim > 1 else tau[None])
    ranks = rows.argsort(1).argsort(1)
    odds = density - epsilon + 2 * epsilon * ranks / (rows.shape[1] - 1)
    return odds.reshape(tau.shape)


@per_tensor
def mergekit(base: Array, experts: Array, parameters: dict, extras: dict) -> Array:
    """Computes mergekit's generalised task arithmetic."""
    weights = np.array(parameters["weight"])
    weights = weights.reshape(-1, *[1] * base.ndim)
    taus = task_vectors(base, experts)
    for number, tau in enumerate(taus):
        if "p" in extras and not (extras["p"][number] == 1).all():
            odds = della_odds(tau, parameters["drawn_density"], parameters["epsilon"])
            np.testing.assert_allclose(extras["p"][number], odds, atol=1e-6)
        sparse = tau * mergekit_mask(tau, number, parameters, extras)
        if parameters["rescale"]:
            before, after = np.abs(tau).sum(), np.abs(sparse).sum()
            sparse *= before / after if min(before, after) >= 1e-7 else 1
        tau[:] = sparse
    taus = taus * weights
    agreeing = np.ones(taus.shape, bool)
    if parameters["elects"]:
        elected = np.where(taus.sum(0) >= 0, 1, -1)
        agreeing = np.sign(taus) == elected
    merged = (taus * agreeing).sum(0)
    if parameters["normalize"]:
        divisor = (weights * agreeing).sum(0)
        merged = merged / np.where(divisor == 0, 1, divisor)
    return base + parameters["lambda"] * merged


@per_tensor
def mergekit_bfloat16_arithmetic(
    base: Array, experts: Array, parameters: dict, extras: dict
) -> Array:
    """Computes mergekit's task arithmetic when every step is rounded to bfloat16."""
    total = np.zeros(base.shape, np.float32)
    for expert, weight in zip(experts, parameters["weight"], strict=True):
        total = total + to_bfloat16(to_bfloat16(expert - base) * to_bfloat16(np.float32(weight)))
    total = to_bfloat16(to_bfloat16(total) * np.float32(parameters["lambda"]))
    return to_bfloat16(base + total)


# --- The cases -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One merge by one peer.

    Attributes:
        peer: Whose code.
        inputs: The set of inputs.
        call: What is called, in the peer's words.
        parameters: As the peer's code takes them.
        formula: What it computes, in one line.
        oracle: The same in NumPy: (base, experts, settings, extras) to a model.
        settings: What the oracle reads in place of the parameters, where words differ.
        output: The dtype of the peer's output.
    """

    peer: str
    inputs: str
    call: str
    parameters: dict[str, object]
    formula: str
    oracle: Callable
    settings: dict[str, object] = dataclasses.field(default_factory=dict)
    output: str = "float32"


SYMBOLS = (
    "x_0: the base; x_i: expert i of n; tau_i = x_i - x_0 in float32; d: the entries of the whole "
    "model; numel: those of one tensor; [.]: 1 where it holds, else 0; int: rounds down; "
    "pair: the two models that are interpolated, by number"
)
_TRIM = (
    "u_i = tau_i [|tau_i| >= t_i], t_i = the (d - int(0.2 d))-th smallest |tau_i| of the whole "
    "model (int(0.2 d) + 1 entries and all ties are kept)"
)
_ELECT = (
    "s = sgn(sum_i u_i), where that is 0: sgn(sum of s over the whole model); A = {i: u_i > 0} "
    "where s > 0, {i: u_i < 0} where s <= 0"
)


def _official_ties(merge: str, inputs: str = "inputs") -> Case:
    """Returns a case of ties-merging, topk20_mass_dis-<merge>_1."""
    result = {
        "mean": "m = sum_A u_i / max(1, |A|)",
        "sum": "m = sum_A u_i",
        "max": "m = s max_A |u_i|",
    }[merge]
    return Case(
        peer="official",
        inputs=inputs,
        call="merge_utils.merge_methods, then flat_ptm + lam * merged_tv",
        parameters={
            "reset_type": "topk",
            "reset_thresh": 20,
            "resolve_method": "mass",
            "merge_func": f"dis-{merge}",
            "lam": 1.0,
        },
        formula=f"{_TRIM}; {_ELECT}; {result}; x_0 + 1.0 m",
        oracle=ties,
        settings={"percent": 20, "merge": merge, "lambda": 1.0},
    )


def _fusion_bench_ties(merge: str, scale: float, inputs: str = "inputs") -> Case:
    """Returns a case of FusionBench's TIES."""
    result = {"mean": "m = sum_A u_i / max(1, |A|)", "sum": "m = sum_A u_i"}[merge]
    return Case(
        peer="fusion_bench",
        inputs=inputs,
        call="method.TiesMergingAlgorithm",
        parameters={
            "threshold": 20,
            "merge_func": merge,
            "scaling_factor": scale,
            "remove_keys": [],
        },
        formula=f"{_TRIM}; {_ELECT}; {result}; x_0 + {scale} m",
        oracle=ties,
        settings={"percent": 20, "merge": merge, "lambda": scale},
    )


_FUSION_BENCH_DROP = (
    "v_i = tau_i k_i / (1 - 0.5), k_i = [rand > p], rand uniform in float32 of each tensor in "
    "the order of parameters(), the experts one after another (mask_i = k_i)"
)
_MERGELM_DROP = (
    "y_i = x_0 + tau_i k_i {rescale}in float32, p = {rate}, k_i = 1 - bernoulli(p) of each tensor "
    "(mask_i = k_i)"
)
_MERGELM_TIES = (
    "u_i = tau_i [|tau_i| >= t_i], t_i = the int(0.8 d)-th smallest |tau_i| of the whole model "
    "(d - int(0.8 d) + 1 entries and all ties are kept); s = sgn(sum_i u_i), where that is 0: "
    "sgn(sum of s over the whole model); A = {i: u_i s > 0}, none where s = 0; x_0 + 1.0 sum_A "
    "u_i / max(1, |A|)"
)


def _mergelm_dare(
    method: str, rate: float, rescale: bool, scale: float, formula: str, strategy: str = "random"
) -> Case:
    """Returns a case of MergeLM's mask_merging."""
    drop = _MERGELM_DROP.format(rescale="/ (1 - p) " if rescale else "", rate=rate)
    return Case(
        peer="mergelm",
        inputs="inputs",
        call="MergingMethod('mask_merging').merging_models",
        parameters={
            "exclude_param_names_regex": [] if strategy == "random" else ["gate"],
            "weight_format": "delta_weight",
            "weight_mask_rates": [rate] * EXPERTS,
            "use_weight_rescale": rescale,
            "mask_strategy": strategy,
            "mask_apply_method": method,
            "scaling_coefficient": scale,
            "param_value_mask_rate": 0.8,
            "models_use_deepcopy": True,
        },
        formula=f"{drop}; {formula}" if strategy == "random" else formula,
        oracle=mergelm_dare if strategy == "random" else mergelm_magnitude,
    )


_WEIGHTS = [0.5, 0.3, 0.2]
DELLA_LEAVES = ("gate", "odd")
# Whether the method elects signs, normalises, rescales, and what it takes besides.
_MERGEKIT_METHODS = {
    "task_arithmetic": (False, False, False),
    "ties": (True, True, False),
    "dare_linear": (False, False, True),
    "dare_ties": (True, False, True),
    "breadcrumbs": (False, False, False),
    "breadcrumbs_ties": (True, False, False),
    "della": (True, True, True),
    "della_linear": (False, False, True),
}


def _mergekit(method: str, inputs: str = "inputs", **parameters: object) -> Case:
    """Returns a case of mergekit's task arithmetics; `weight`, `density`, ... as in its YAML."""
    elects, normalizes, rescales = _MERGEKIT_METHODS[method]
    dtype, out_dtype = parameters.pop("dtype", "float32"), parameters.pop("out_dtype", None)
    parameters = {"weight": _WEIGHTS} | parameters
    settings = {
        "elects": elects,
        "normalize": normalizes,
        "rescale": rescales,
        "lambda": 1.0,
        "drawn_density": parameters.get("density"),
    } | parameters
    density = parameters.get("density", 1.0)
    if "della" in method:
        # Odds where axis 1 has one entry are 0 / 0, which raises; density 1 leaves a tensor alone.
        parameters["density"] = [
            *({"filter": name, "value": 1.0} for name in DELLA_LEAVES),
            {"value": density},
        ]
    if method == "task_arithmetic" or density == 1:
        sparsified = "v_i = tau_i"
    elif method == "ties":
        sparsified = (
            f"v_i = tau_i of the k largest |tau_i| of each tensor, k = max(1, int({density} "
            "numel)), exactly k: equal magnitudes by a sort that is not stable"
        )
    elif "dare" in method:
        sparsified = f"v_i = tau_i k_i, k_i = bernoulli({density}) (mask_i = k_i)"
    elif "breadcrumbs" in method:
        sparsified = (
            "v_i = tau_i of ranks b to b + k of |tau_i|, ascending, of each tensor (from 0, end "
            f"excluded), k = int({density} numel), b = max(0, numel - k - "
            f"int({parameters['gamma']} numel))"
        )
    else:
        epsilon = parameters["epsilon"]
        sparsified = (
            "v_i = tau_i k_i, k_i = bernoulli(p_i) (mask_i = k_i), "
            f"p_i = {density} - {epsilon} + 2 {epsilon} (r - 1) / (c - 1), r = the rank of "
            "|tau_i| along axis 1, of c entries, ascending from 1 (a vector is one row); gate and "
            "odd, of density 1: v_i = tau_i"
        )
    if settings["rescale"]:
        sparsified += (
            "; v_i *= sum |tau_i| / sum |v_i| over the tensor, unless one of the sums is below 1e-7"
        )
    if elects:
        mixed = "u_i = w_i v_i; e = +1 where sum_i u_i >= 0, else -1; A = {i: sgn u_i = e}"
        total, divisor = "sum_A u_i", "sum_A w_i"
    else:
        mixed, total, divisor = "u_i = w_i v_i", "sum_i u_i", "sum_i w_i"
    if settings["normalize"]:
        total += f" / {divisor} (a divisor of 0 becomes 1)"
    formula = f"{sparsified}; {mixed}; x_0 + {settings['lambda']} {total}"
    oracle = mergekit
    if dtype == "bfloat16":
        formula += "; every operation is rounded to bfloat16, the sum over i once"
        oracle = mergekit_bfloat16_arithmetic
    elif out_dtype:
        formula += f"; in float32, rounded once to {out_dtype}"
    return Case(
        peer="mergekit",
        inputs=inputs,
        call="mergekit.merge.run_merge",
        parameters={"merge_method": method, "dtype": dtype, "out_dtype": out_dtype} | parameters,
        formula=formula,
        oracle=oracle,
        settings=settings,
        output="float32" if (out_dtype or dtype) == "float32" else "bfloat16",
    )


def _mergekit_other(method: str, formula: str, oracle: Callable, **parameters: object) -> Case:
    """Returns a case of another of mergekit's methods."""
    return Case(
        peer="mergekit",
        inputs="inputs",
        call="mergekit.merge.run_merge",
        parameters={"merge_method": method, "dtype": "float32", "out_dtype": None} | parameters,
        formula=formula,
        oracle=oracle,
    )


_SLERP = (
    "each tensor one vector; c = cosine of a and b; |c| > 0.9995: (1 - t) a + t b; else phi = "
    "arccos c, (sin((1 - t) phi) a + sin(t phi) b) / sin phi; t = {t}, a = {a}, b = {b}"
)
_FISHER = (
    "w_i = f_i (F_i + 1e-6); x = sum_i w_i x_i / sum_i w_i; F_i: squared gradients (fisher_i); "
    "f_i = {f}"
)
_MODEL_STOCK = (
    "each {part} by itself; {cosine} r = n c / (1 + (n - 1) c); r mean(x_i) + (1 - r) x_0"
)

_MEAN_COSINE = (
    "c = mean over pairs i < j of cos(tau_i, tau_j), norms' product at least 1e-6; r = 0 where "
    "|1 + (n - 1) c| < 1e-6, else"
)

CASES: dict[str, Case] = {
    "official_ties": _official_ties("mean"),
    "official_ties_sum": _official_ties("sum"),
    "official_ties_max": _official_ties("max"),
    "official_ties_bf16": _official_ties("mean", "bf16"),
    "official_ties_cancel": _official_ties("mean", "cancel"),
    "official_ties_max_cancel": _official_ties("max", "cancel"),
    "official_ties_balanced": _official_ties("mean", "balanced"),
    "official_task_arithmetic": Case(
        peer="official",
        inputs="inputs",
        call="merge_utils.tv_merging, then flat_ptm + lam * merged_tv",
        parameters={"lam": 0.4},
        formula="x_0 + 0.4 sum_i tau_i",
        oracle=task_arithmetic,
        settings={"lambda": 0.4},
    ),
    "fusion_bench_simple_average": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.SimpleAverageAlgorithm",
        parameters={},
        formula="sum_i x_i / n",
        oracle=average,
    ),
    "fusion_bench_weighted_average": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.WeightedAverageAlgorithm",
        parameters={"normalize": True, "weights": [0.5, 0.4, 0.3]},
        formula="sum_i w_i x_i, w = weights / sum(weights)",
        oracle=weighted_average,
    ),
    "fusion_bench_task_arithmetic": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.TaskArithmeticAlgorithm",
        parameters={"scaling_factor": 0.3},
        formula="x_0 + 0.3 sum_i tau_i",
        oracle=task_arithmetic,
        settings={"lambda": 0.3},
    ),
    "fusion_bench_ties": _fusion_bench_ties("sum", 0.3),
    "fusion_bench_ties_mean": _fusion_bench_ties("mean", 1.0),
    "fusion_bench_ties_bf16": _fusion_bench_ties("sum", 0.3, "bf16"),
    "fusion_bench_dare_task_arithmetic": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.DareTaskArithmetic",
        parameters={
            "scaling_factor": 0.3,
            "sparsity_ratio": 0.5,
            "only_on_linear_weights": False,
            "rescale": True,
        },
        formula=f"{_FUSION_BENCH_DROP}; x_0 + 0.3 sum_i v_i",
        oracle=fusion_bench_dare,
        settings={"drop_rate": 0.5, "lambda": 0.3},
    ),
    "fusion_bench_dare_task_arithmetic_linear": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.DareTaskArithmetic",
        parameters={
            "scaling_factor": 0.3,
            "sparsity_ratio": 0.5,
            "only_on_linear_weights": True,
            "rescale": True,
        },
        formula=f"{_FUSION_BENCH_DROP}, for weights of nn.Linear alone (up, down), else v_i = "
        "tau_i; x_0 + 0.3 sum_i v_i",
        oracle=fusion_bench_dare,
        settings={"drop_rate": 0.5, "lambda": 0.3},
    ),
    "fusion_bench_dare_simple_average": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.DareSimpleAverage",
        parameters={"sparsity_ratio": 0.5, "only_on_linear_weights": False, "rescale": True},
        formula=f"{_FUSION_BENCH_DROP}; x_0 + (1 / n) sum_i v_i",
        oracle=fusion_bench_dare,
        settings={"drop_rate": 0.5, "lambda": 1 / EXPERTS},
    ),
    "fusion_bench_dare_ties": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.DareTiesMerging",
        parameters={
            "sparsity_ratio": 0.5,
            "only_on_linear_weights": False,
            "rescale": True,
            "scaling_factor": 0.5,
            "threshold": 20,
            "remove_keys": [],
            "merge_func": "sum",
        },
        formula=f"{_FUSION_BENCH_DROP}; then the trim too: {_TRIM} with tau_i = v_i; {_ELECT}; "
        "m = sum_A u_i; x_0 + 0.5 m",
        oracle=fusion_bench_dare,
        settings={"drop_rate": 0.5, "lambda": 0.5, "percent": 20, "merge": "sum"},
    ),
    "fusion_bench_slerp": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.SlerpMergeAlgorithm",
        parameters={"t": 0.3, "pair": [1, 2]},
        formula=_SLERP.format(t=0.3, a="x_1", b="x_2"),
        oracle=slerp,
    ),
    "fusion_bench_model_stock": Case(
        peer="fusion_bench",
        inputs="inputs",
        call="method.model_stock.ModelStock",
        parameters={"ignore_keys": ["gate"]},
        formula="gate, ignored: sum_i x_i / n; "
        + _MODEL_STOCK.format(
            part="tensor",
            cosine="c = cos(mean over pairs i < j of arccos cos(tau_i, tau_j)), 1e-8 added to both "
            "denominators;",
        ),
        oracle=fusion_bench_model_stock,
    ),
    "mergelm_average": Case(
        peer="mergelm",
        inputs="inputs",
        call="MergingMethod('average_merging').merging_models",
        parameters={"exclude_param_names_regex": []},
        formula="sum_i x_i / n",
        oracle=average,
    ),
    "mergelm_task_arithmetic": Case(
        peer="mergelm",
        inputs="inputs",
        call="MergingMethod('task_arithmetic').merging_models",
        parameters={"exclude_param_names_regex": [], "scaling_coefficient": 0.5},
        formula="x_0 + 0.5 sum_i tau_i",
        oracle=task_arithmetic,
        settings={"lambda": 0.5},
    ),
    **{
        f"mergelm_ties{suffix}": Case(
            peer="mergelm",
            inputs=inputs,
            call="MergingMethod('ties_merging').merging_models",
            parameters={
                "exclude_param_names_regex": [],
                "param_value_mask_rate": 0.8,
                "scaling_coefficient": 1.0,
            },
            formula=_MERGELM_TIES,
            oracle=mergelm_ties,
        )
        for suffix, inputs in {
            "": "inputs",
            "_bf16": "bf16",
            "_cancel": "cancel",
            "_balanced": "balanced",
        }.items()
    },
    "mergelm_dare_task_arithmetic": _mergelm_dare(
        "task_arithmetic", 0.7, True, 0.5, "x_0 + 0.5 sum_i (y_i - x_0)"
    ),
    "mergelm_dare_task_arithmetic_no_rescale": _mergelm_dare(
        "task_arithmetic", 0.7, False, 0.5, "x_0 + 0.5 sum_i (y_i - x_0)"
    ),
    "mergelm_dare_average": _mergelm_dare("average_merging", 0.7, False, 1.0, "sum_i y_i / n"),
    "mergelm_dare_ties": _mergelm_dare(
        "ties_merging", 0.7, True, 1.0, f"then with tau_i = y_i - x_0: {_MERGELM_TIES}"
    ),
    "mergelm_magnitude_task_arithmetic": _mergelm_dare(
        "task_arithmetic",
        0.7,
        True,
        0.5,
        "v_i = tau_i [|tau_i| > t_i] / (1 - 0.7), t_i = the int(0.7 numel)-th smallest |tau_i| of "
        "each tensor; x_0 + 0.5 sum_i v_i; `gate` is excluded and stays the base's (0.7 of one "
        "entry is rank 0, which raises)",
        strategy="magnitude",
    ),
    **{
        f"mergelm_fisher{suffix}": Case(
            peer="mergelm",
            inputs="inputs",
            call="MergingMethod('fisher_merging').merging_models, with trainers whose loss has "
            "the given gradients",
            parameters={
                "exclude_param_names_regex": ["odd"],
                "nums_fisher_examples": [1] * EXPERTS,
                "fisher_scaling_coefficients": None,
                "normalize_fisher_weight": normalize,
                "minimal_fisher_weight": 1e-6,
            },
            formula=_FISHER.format(
                f="1 / (N_i + 1e-6), N_i = the L2 norm of F_i over the whole model"
                if normalize
                else "1"
            ),
            oracle=fisher,
        )
        for suffix, normalize in {"": False, "_normalized": True}.items()
    },
    "mergelm_regmean": Case(
        peer="mergelm",
        inputs="inputs",
        call="MergingMethod('regmean_merging').merging_models, with trainers that feed given "
        "activations to the linear layers",
        parameters={
            "exclude_param_names_regex": [],
            "nums_regmean_examples": [48] * EXPERTS,
            "reduce_non_diagonal_ratio": 0.9,
        },
        formula="weights W_i [out, in] of nn.Linear (up, down): W = (sum_i G_i)^-1 (sum_i G_i "
        "W_i^T), transposed; G_i = X_i^T X_i / rows (gram_i), its entries off the diagonal times "
        "0.9; other tensors: sum_i x_i / n",
        oracle=regmean,
    ),
    "mergekit_linear": _mergekit_other(
        "linear",
        "sum_i w_i x_i / sum_i w_i",
        mergekit_linear,
        weight=[0.5, 0.4, 0.3],
        normalize=True,
    ),
    "mergekit_linear_sum": _mergekit_other(
        "linear", "sum_i w_i x_i", mergekit_linear, weight=[0.5, 0.4, 0.3], normalize=False
    ),
    "mergekit_task_arithmetic": _mergekit("task_arithmetic", **{"lambda": 0.7}),
    "mergekit_task_arithmetic_normalized": _mergekit(
        "task_arithmetic", weight=[0.5, 0.4, 0.3], normalize=True
    ),
    "mergekit_ties": _mergekit("ties", density=0.3),
    "mergekit_ties_sum": _mergekit("ties", density=0.3, normalize=False, **{"lambda": 0.7}),
    "mergekit_ties_rescaled": _mergekit("ties", density=0.3, rescale=True),
    "mergekit_dare_linear": _mergekit("dare_linear", density=0.3),
    "mergekit_dare_linear_no_rescale": _mergekit("dare_linear", density=0.3, rescale=False),
    "mergekit_dare_ties": _mergekit("dare_ties", density=0.3),
    "mergekit_dare_ties_normalized": _mergekit("dare_ties", density=0.3, normalize=True),
    "mergekit_breadcrumbs": _mergekit("breadcrumbs", density=0.6, gamma=0.1),
    "mergekit_breadcrumbs_reduced": _mergekit("breadcrumbs", density=0.95, gamma=0.1),
    "mergekit_breadcrumbs_ties": _mergekit("breadcrumbs_ties", density=0.6, gamma=0.1),
    "mergekit_della": _mergekit("della", density=0.5, epsilon=0.15),
    "mergekit_della_linear": _mergekit("della_linear", density=0.5, epsilon=0.15),
    "mergekit_slerp": _mergekit_other(
        "slerp", _SLERP.format(t=0.3, a="x_1", b="x_2"), slerp, t=0.3, pair=[1, 2]
    ),
    "mergekit_slerp_from_base": _mergekit_other(
        "slerp", _SLERP.format(t=0.3, a="x_0", b="x_1"), slerp, t=0.3, pair=[0, 1]
    ),
    "mergekit_model_stock": _mergekit_other(
        "model_stock",
        _MODEL_STOCK.format(
            part="tensor",
            cosine=_MEAN_COSINE,
        ),
        mergekit_model_stock,
        filter_wise=False,
    ),
    "mergekit_model_stock_filter_wise": _mergekit_other(
        "model_stock",
        _MODEL_STOCK.format(
            part="row (last axis; a vector is one row)",
            cosine=_MEAN_COSINE,
        ),
        mergekit_model_stock,
        filter_wise=True,
    ),
    "mergekit_bf16_task_arithmetic": _mergekit(
        "task_arithmetic", "bf16", out_dtype="bfloat16", **{"lambda": 0.7}
    ),
    "mergekit_bf16_task_arithmetic_in_bfloat16": _mergekit(
        "task_arithmetic", "bf16", dtype="bfloat16"
    ),
    # Equal weights, so that no election hangs on how a sum was rounded.
    "mergekit_bf16_ties": _mergekit("ties", "bf16", weight=[1.0] * EXPERTS, density=0.3),
    "mergekit_bf16_ties_untrimmed": _mergekit("ties", "bf16", weight=[1.0] * EXPERTS, density=1.0),
}


# --- Running the peers ---------------------------------------------------------------------------


@contextlib.contextmanager
def recording(module: types.ModuleType, name: str) -> Iterator[list[tuple[tuple, "torch.Tensor"]]]:
    """Yields the list of calls of module.name meanwhile: positional arguments and result."""
    calls, original = [], getattr(module, name)

    def recorded(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    setattr(module, name, recorded)
    try:
        yield calls
    finally:
        setattr(module, name, original)


def network(model: Model) -> "torch.nn.Module":
    """Returns the tiny model as a torch module, from which MergeLM can get its statistics."""
    import torch
    from torch import nn

    class Tiny(nn.Module):
        """Six tensors. It has no forward pass of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(*TINY["embed.weight"][0])
            self.up = nn.Linear(*TINY["up.weight"][0][::-1], bias=False)
            self.down = nn.Linear(*TINY["down.weight"][0][::-1], bias=False)
            self.norm = nn.LayerNorm(TINY["norm.weight"][0], bias=False)
            self.gate = nn.Parameter(torch.zeros(TINY["gate"][0]))
            self.odd = nn.Parameter(torch.zeros(TINY["odd"][0]))

        def forward(
            self, slopes: dict | None = None, activations: dict | None = None
        ) -> types.SimpleNamespace | None:
            """Computes a loss with these gradients, or runs linear layers on these activations."""
            if activations is not None:
                self.up(activations["up"])
                self.down(activations["down"])
                return None
            loss = sum((p * slopes[name]).sum() for name, p in self.named_parameters())
            return types.SimpleNamespace(logits=torch.zeros(1, 1), loss=loss)

    module = Tiny()
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in model.items()})
    return module


def as_model(tensors: dict[str, "torch.Tensor"]) -> Model:
    """Returns torch tensors by name as float32 arrays."""
    return {name: value.detach().float().numpy().copy() for name, value in tensors.items()}


def kept_by_draw(masks: list, networks: list, names: list[str]) -> dict[str, list[Model]]:
    """Returns masks, which come in the order they were drawn, by expert and name."""
    assert len(masks) == len(networks) * len(names), (len(masks), names)
    masks = [mask.bool().numpy() for mask in masks]
    return {
        "mask": [
            dict(zip(names, masks[start : start + len(names)], strict=True))
            for start in range(0, len(masks), len(names))
        ]
    }


def run_official(case: Case, models: list[Model]) -> tuple[Model, dict]:
    """Runs ties-merging."""
    import torch
    from src.utils import merge_utils

    base, *experts = [
        {name: torch.from_numpy(value.copy()) for name, value in model.items()} for model in models
    ]
    flat_base = merge_utils.state_dict_to_vector(base)
    flat = torch.vstack([merge_utils.state_dict_to_vector(expert) for expert in experts])
    parameters = dict(case.parameters)
    scale = parameters.pop("lam")
    if parameters:
        reset_type = parameters.pop("reset_type")
        merged = merge_utils.merge_methods(reset_type, flat - flat_base, **parameters)
    else:
        merged = merge_utils.tv_merging(flat - flat_base)
    result = merge_utils.vector_to_state_dict(flat_base + scale * merged, base)
    return as_model(result), {}


def run_fusion_bench(case: Case, models: list[Model]) -> tuple[Model, dict]:
    """Runs FusionBench."""
    import torch
    from fusion_bench import BaseModelPool, method
    from fusion_bench.method import dare, model_stock

    base, *experts = map(network, models)
    parameters = dict(case.parameters)
    pool = {"_pretrained_": base} | {f"expert_{i}": expert for i, expert in enumerate(experts)}
    if pair := parameters.pop("pair", None):
        pool = {f"model_{number}": [base, *experts][number] for number in pair}
    name = case.call.split(".")[-1]
    algorithm = next(getattr(m, name) for m in (method, dare, model_stock) if hasattr(m, name))
    torch.manual_seed(SEED)
    with torch.no_grad(), recording(torch, "rand_like") as calls:
        merged = algorithm(**parameters).run(BaseModelPool(pool))
    if not calls:
        return as_model(merged.state_dict()), {}
    names = [name for name, _ in base.named_parameters()]
    if parameters["only_on_linear_weights"]:
        names = ["up.weight", "down.weight"]
    masks = [drawn > parameters["sparsity_ratio"] for _, drawn in calls]
    return as_model(merged.state_dict()), kept_by_draw(masks, experts, names)


def run_mergelm(case: Case, models: list[Model]) -> tuple[Model, dict]:
    """Runs MergeLM."""
    import torch
    from model_merging_methods.merging_methods import MergingMethod

    base, *experts = map(network, models)
    names = [name for name, _ in base.named_parameters()]
    method = case.call.split("'")[1]
    parameters, extras = dict(case.parameters), {}
    rng = np.random.default_rng(5)
    if method == "fisher_merging":
        slopes = [
            {n: rng.normal(0, 1 + i, TINY[n][0]).astype(np.float32) for n in names}
            for i in range(EXPERTS)
        ]
        extras["fisher"] = [{n: v**2 for n, v in s.items() if n != "odd"} for s in slopes]
        batches = [{"slopes": {n: torch.from_numpy(v) for n, v in s.items()}} for s in slopes]
    elif method == "regmean_merging":
        batches = [
            {
                "activations": {
                    layer: torch.from_numpy(rng.normal(0, 1, (48, width)).astype(np.float32))
                    for layer, width in (("up", 8), ("down", 16))
                }
            }
            for _ in range(EXPERTS)
        ]
        extras["gram"] = [
            {f"{layer}.weight": (x.T @ x / len(x)).numpy() for layer, x in b["activations"].items()}
            for b in batches
        ]
    if extras:
        count = parameters.get("nums_fisher_examples", parameters.get("nums_regmean_examples"))
        parameters["trainers"] = [
            types.SimpleNamespace(
                _train_batch_size=count[0],
                _prepare_inputs=lambda inputs: inputs,
                get_train_dataloader=lambda batch=batch: [batch],
            )
            for batch in batches
        ]
    torch.manual_seed(SEED)
    with recording(torch, "bernoulli") as calls:
        result = MergingMethod(method).merging_models(
            merged_model=base, models_to_merge=experts, **parameters
        )
    if calls:
        extras = kept_by_draw([1 - drawn for _, drawn in calls], experts, names)
    # What is excluded, MergeLM leaves as it is in the merged model, the base.
    return as_model(dict(base.named_parameters()) | result), extras


def mergekit_configuration(case: Case) -> dict[str, object]:
    """Returns the case's YAML, with base, expert_0, ... for the paths of the models."""
    parameters = dict(case.parameters)
    top = {name: parameters.pop(name) for name in ("merge_method", "dtype", "out_dtype")}
    pair = parameters.pop("pair", None)
    names = ["base"] + [f"expert_{number}" for number in range(EXPERTS)]
    if pair:
        first, second = (names[number] for number in pair)
        top |= {"base_model": first, "models": [{"model": first}, {"model": second}]}
    else:
        weights = parameters.pop("weight", None)
        own = {n: parameters.pop(n) for n in ("density", "gamma", "epsilon") if n in parameters}
        top["models"] = [{"model": name} for name in names[1:]]
        for number, record in enumerate(top["models"]):
            record["parameters"] = own | ({"weight": weights[number]} if weights else {})
        if top["merge_method"] != "linear":
            top["base_model"] = "base"
    return {name: value for name, value in top.items() if value} | {"parameters": parameters}


def run_mergekit(case: Case, models: list[Model]) -> tuple[Model, dict]:
    """Runs mergekit on directories of safetensors."""
    import torch
    from mergekit import sparsify
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file, save_file

    stored = torch.bfloat16 if case.inputs == "bf16" else torch.float32
    names = ["base"] + [f"expert_{number}" for number in range(EXPERTS)]
    configuration = mergekit_configuration(case)
    method = case.parameters["merge_method"]
    drawing = "dare" in method or "della" in method
    breaks_ties = method == "ties" and case.inputs == "bf16" and case.parameters["density"] < 1
    extras = {kind: [{} for _ in range(EXPERTS)] for kind in ("mask", "p")}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, model in zip(names, models, strict=True):
            (folder / name).mkdir()
            config = CONFIG | {"dtype": str(stored).removeprefix("torch.")}
            (folder / name / "config.json").write_text(json.dumps(config))
            tensors = {n: torch.from_numpy(value).to(stored) for n, value in model.items()}
            save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        for record in configuration["models"]:
            record["model"] = str(folder / record["model"])
        if "base_model" in configuration:
            configuration["base_model"] = str(folder / configuration["base_model"])

        draws = stack.enter_context(recording(torch, "bernoulli"))
        sparsified = stack.enter_context(recording(sparsify, "rescaled_masked_tensor"))
        merge_group = GeneralizedTaskArithmeticMerge.merge_group

        def merge_and_record(
            self: GeneralizedTaskArithmeticMerge, group: object, /, **parameters: object
        ) -> torch.Tensor:
            draws.clear()
            sparsified.clear()
            result = merge_group(self, group, **parameters)
            shape, name = group.base.tensor.shape, group.metadata.name
            masks = [mask for (_, mask, *_), _ in sparsified]
            odds = [arguments[0] for arguments, _ in draws]
            # Of density 1, nothing is drawn.
            masks, odds = (kind or [torch.ones(shape)] * EXPERTS for kind in (masks, odds))
            for number in range(EXPERTS):
                if drawing or breaks_ties:
                    extras["mask"][number][name] = masks[number].reshape(shape).bool().numpy()
                if "della" in self.method_name:
                    extras["p"][number][name] = odds[number].reshape(shape).float().numpy()
            return result

        GeneralizedTaskArithmeticMerge.merge_group = merge_and_record
        stack.callback(setattr, GeneralizedTaskArithmeticMerge, "merge_group", merge_group)
        run_merge(
            MergeConfiguration.model_validate(configuration),
            str(folder / "merged"),
            MergeOptions(
                copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=SEED
            ),
        )
        merged = load_file(folder / "merged" / "model.safetensors")
    assert {str(value.dtype) for value in merged.values()} == {f"torch.{case.output}"}
    return as_model(merged), {kind: result for kind, result in extras.items() if result[0]}


RUNNERS = {
    "official": run_official,
    "fusion_bench": run_fusion_bench,
    "mergelm": run_mergelm,
    "mergekit": run_mergekit,
}


# --- Writing and checking ------------------------------------------------------------------------


def collinear_tensors(case: Case, models: list[Model]) -> list[str]:
    """Returns the tensors that slerp interpolates linearly."""
    first, second = (models[number] for number in case.parameters["pair"])
    return [
        name
        for name in sorted(first)
        if slerp_coefficients(0.3, first[name], second[name])[1] == 0.3
    ]


def record_of(case: Case, models: list[Model], saved: dict[str, str]) -> dict[str, object]:
    """Returns what merge_goldens.json says of a case."""
    record = {
        "peer": case.peer,
        "version": PEERS[case.peer],
        "inputs": case.inputs,
        "call": case.call,
        "parameters": case.parameters,
    }
    if "mask" in saved:
        record["torch_seed"] = SEED
    if saved:
        record["saved"] = saved
    if "pair" in case.parameters:
        record["linear_tensors"] = collinear_tensors(case, models)
    return record | {"output": case.output, "formula": case.formula}


def same(arrays: Model, case: str, kind: str, own: Model) -> bool:
    """Returns whether a case has saved these very arrays of a kind."""
    theirs = {k: v for k, v in under(arrays, case).items() if k.startswith(f"{kind}_")}
    return theirs.keys() == own.keys() and all(np.array_equal(theirs[k], own[k]) for k in own)


def write() -> None:
    """Runs every case and writes both files."""
    import torch

    torch.set_num_threads(1)
    inputs = all_inputs()
    arrays: Model = {}
    for name, models in inputs.items():
        for role, model in zip(["base", "expert_0", "expert_1", "expert_2"], models, strict=True):
            arrays |= {f"{name}/{role}/{tensor}": value for tensor, value in model.items()}
    records = {}
    for name, case in CASES.items():
        models = inputs[case.inputs]
        result, extras = RUNNERS[case.peer](case, models)
        assert {n: v.shape for n, v in result.items()} == {n: v.shape for n, v in models[0].items()}
        arrays |= {f"{name}/{tensor}": value for tensor, value in result.items()}
        saved = {}
        for kind, models_by_expert in extras.items():
            own = {
                f"{kind}_{number}/{tensor}": value
                for number, model in enumerate(models_by_expert)
                for tensor, value in model.items()
            }
            saved[kind] = next((other for other in records if same(arrays, other, kind, own)), name)
            if saved[kind] == name:
                arrays |= {f"{name}/{key}": value for key, value in own.items()}
        records[name] = record_of(case, models, saved)
    np.savez_compressed(ARRAYS, **arrays)
    packages = ("torch", "transformers", "numpy", "safetensors")
    document = {
        "made_by": "tests/goldens/make_merge_goldens.py",
        "with": {package: importlib.metadata.version(package) for package in packages},
        "symbols": SYMBOLS,
        "cases": records,
    }
    CASES_FILE.write_text(json.dumps(document, indent=1) + "\n")


def check() -> None:
    """Compares every case in merge_goldens.npz with its formula in float64."""
    with np.load(ARRAYS) as file:
        arrays = dict(file)
    records = json.loads(CASES_FILE.read_text())["cases"]
    assert records.keys() == CASES.keys()
    for name, case in CASES.items():
        base, *experts = (
            under(arrays, f"{case.inputs}/{role}")
            for role in ["base"] + [f"expert_{number}" for number in range(EXPERTS)]
        )
        extras = {
            kind: [under(arrays, f"{place}/{kind}_{number}") for number in range(EXPERTS)]
            for kind, place in records[name].get("saved", {}).items()
        }
        golden = {tensor: arrays[f"{name}/{tensor}"] for tensor in base}
        wanted = expected(case, base, experts, extras)
        worst = 0.0
        for tensor, value in golden.items():
            allowed = 1e-6 * np.maximum(1, np.abs(wanted[tensor]))
            if case.output == "bfloat16":
                # Half a unit in the last place of a significand of 8 bits.
                allowed = allowed + np.abs(wanted[tensor]) / 256
            error = np.abs(value - wanted[tensor])
            worst = max(worst, float(error.max()))
            if (error > allowed).any():
                raise SystemExit(f"{name}: {tensor} is off by {error.max():.3g}")
        print(f"{name}: {worst:.1e}")


def under(arrays: Model, prefix: str) -> Model:
    """Returns the arrays whose names begin so, without the prefix."""
    return {
        k.removeprefix(prefix + "/"): v for k, v in arrays.items() if k.startswith(prefix + "/")
    }


def expected(case: Case, base: Model, experts: list[Model], extras: dict) -> Model:
    """Computes the case's formula, in float64."""
    if case.peer == "fusion_bench" and extras:
        # A tensor that was not masked is marked, for `joined` needs all of them.
        extras = {
            "mask": [
                {n: m[n].astype(int) if n in m else np.full(v.shape, 2) for n, v in base.items()}
                for m in extras["mask"]
            ]
        }
    if case.oracle is fisher:
        # An excluded tensor stays the base's.
        excluded = case.parameters["exclude_param_names_regex"]
        inside = [n for n in base if n not in excluded]
        result = case.oracle(
            {n: base[n] for n in inside},
            [{n: expert[n] for n in inside} for expert in experts],
            case.parameters,
            extras,
        )
        return base | result
    return case.oracle(base, experts, case.settings or case.parameters, extras)


def main() -> None:
    """Writes the goldens, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    clones = ("--ties-merging", "--fusion-bench", "--mergelm")
    for clone in clones:
        parser.add_argument(clone, type=Path)
    arguments = parser.parse_args()
    if not arguments.check:
        paths = (arguments.ties_merging, arguments.fusion_bench, arguments.mergelm)
        if None in paths:
            parser.error(f"give {', '.join(clones)}, or --check")
        sys.path[:0] = [str(path.absolute()) for path in paths]
        write()
    check()


if __name__ == "__main__":
    main()
