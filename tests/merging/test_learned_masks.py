"""Learned masks against NumPy's formulas, problems whose mask is known, and FusionBench's draws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import Recipe, learned_masks, merge_params
from m2l.merging.learned_masks import learn_shared_mask, localize, merge_by_mask, rescaled_mask

SHAPES = {"layers_00/w": (3, 4), "layers_01/w": (4,), "out": (2, 3)}
SIZE = 22


def flat(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: np.float32(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


BASE = flat(0)
EXPERTS = [{n: BASE[n] + tau for n, tau in flat(seed, 0.01).items()} for seed in (1, 2)]
TAUS = [{n: np.float64(e[n]) - BASE[n] for n in BASE} for e in EXPERTS]
NEEDED = {n: np.random.default_rng(3).random(s) < 0.5 for n, s in SHAPES.items()}
MODELS = checkpoints.unflatten(BASE), [checkpoints.unflatten(each) for each in EXPERTS]
# What the loss wants, as a task vector: entries of the first expert alone.
WANTED = {n: NEEDED[n] * TAUS[0][n] for n in BASE}
SLOPE = 400.0


def loss(params, batch):
    """SLOPE batch |theta - theta_base - wanted|^2."""
    leaves = checkpoints.flatten(params)
    return (
        SLOPE * batch * sum(jnp.sum((leaves[n] - BASE[n] - WANTED[n]) ** 2) for n in BASE)
    ).astype(jnp.float32)


def gradients(masks, vector, batch=1.0):
    """dL/dm by the formula, in float64."""
    return {n: 2 * SLOPE * batch * (masks[n] * vector[n] - WANTED[n]) * vector[n] for n in SHAPES}


class Adam:
    """Kingma & Ba 2014, in NumPy."""

    def __init__(self, learning_rate):
        self.rate, self.step, self.m, self.v = learning_rate, 0, 0.0, 0.0

    def update(self, slope):
        self.step += 1
        self.m = 0.9 * self.m + 0.1 * slope
        self.v = 0.999 * self.v + 0.001 * slope**2
        m, v = self.m / (1 - 0.9**self.step), self.v / (1 - 0.999**self.step)
        return -self.rate * m / (np.sqrt(v) + 1e-8)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def as_numpy(params):
    return {n: np.asarray(leaf) for n, leaf in checkpoints.flatten(params).items()}


def test_localize_takes_adams_steps_on_the_loss_and_the_mean_of_the_mask():
    batches = [1.0, 3.0]  # Of two tasks: their mean counts.
    result = localize(
        MODELS[0], MODELS[1][0], loss, itertools.repeat(batches), density=0.25, bias=0.4, steps=4
    )
    largest = np.sort(np.abs(np.concatenate([t.ravel() for t in TAUS[0].values()])))[-5]
    logits = {n: np.where(np.abs(TAUS[0][n]) >= largest, 0.4, -0.4) for n in SHAPES}
    adams, losses = {n: Adam(0.1) for n in SHAPES}, []
    for _ in range(4):
        masks = {n: sigmoid(s) for n, s in logits.items()}
        differences = [masks[n] * TAUS[0][n] - WANTED[n] for n in SHAPES]
        losses.append(SLOPE * 2 * sum(np.sum(each**2) for each in differences))
        slopes = gradients(masks, TAUS[0], 2.0)
        for n, m in masks.items():
            logits[n] = logits[n] + adams[n].update(SIZE * (slopes[n] + 1 / SIZE) * m * (1 - m))
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    for n, s in as_numpy(result.logits).items():
        np.testing.assert_allclose(s, logits[n], atol=1e-4)  # float32's rounding of tau
    masks = {n: s > 0 for n, s in as_numpy(result.logits).items()}
    assert result.share == sum(mask.sum() for mask in masks.values()) / SIZE
    for n, leaf in as_numpy(result.params).items():
        np.testing.assert_array_equal(leaf, np.where(masks[n], EXPERTS[0][n], BASE[n]))


def test_localize_finds_the_entries_that_the_loss_wants():
    result = localize(MODELS[0], MODELS[1][0], loss, itertools.repeat([1e6]), density=0.05)
    assert result.losses[-1] < 0.02 * result.losses[0]
    for n, s in as_numpy(result.logits).items():
        np.testing.assert_array_equal(s > 0, NEEDED[n])
    # Of no use at its price, nothing stays.
    nothing = localize(MODELS[0], MODELS[1][0], loss, itertools.repeat([1.0]), l1=1e3)
    assert nothing.share == 0
    assert jax.tree.all(jax.tree.map(np.array_equal, nothing.params, MODELS[0]))


def test_localized_experts_are_averaged_exactly_where_their_entries_overlap():
    masks = [
        {n: np.random.default_rng(s).random(x) < 0.6 for n, x in SHAPES.items()} for s in (8, 9)
    ]
    localized = [
        {n: np.where(mask[n], expert[n], BASE[n]) for n in BASE}
        for mask, expert in zip(masks, EXPERTS, strict=True)
    ]
    merged = merge_params(BASE, localized, Recipe("localize_and_stitch", density=1))
    for n, base in BASE.items():
        taus = [np.where(mask[n], e[n] - base, 0) for mask, e in zip(masks, EXPERTS, strict=True)]
        count = np.maximum(masks[0][n].astype(np.float32) + masks[1][n], 1)
        np.testing.assert_array_equal(merged[n], base + (taus[0] + taus[1]) / count)


def drawn(logits, step, seed=0):
    """(m, m / mean(m)) of a step, from the noise that is drawn in it."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    keys = dict(zip(sorted(SHAPES), jax.random.split(key, len(SHAPES)), strict=True))
    noise = {n: np.float64(jax.random.logistic(keys[n], SHAPES[n])) for n in SHAPES}
    masks = {n: sigmoid((logits[n] + noise[n]) / 0.5) for n in SHAPES}
    return masks, {n: m / m.mean() for n, m in masks.items()}


def by_formula(steps, seed=0, inner=None):
    """(logits, losses) of the shared mask; inner: the coefficients' learning rate."""
    logits = {n: np.zeros(SHAPES[n]) for n in SHAPES}
    adams, losses, coefficients = {n: Adam(0.1) for n in SHAPES}, [], Adam(inner)
    for step in range(steps):
        lambdas = np.full(2, 0.4)
        masks, rescaled = drawn(logits, step, seed)
        vector = {n: sum(lam * t[n] for lam, t in zip(lambdas, TAUS, strict=True)) for n in SHAPES}
        if inner:
            slopes = [
                sum(
                    np.sum(2 * SLOPE * (rescaled[n] * vector[n] - WANTED[n]) * rescaled[n] * tau[n])
                    for n in SHAPES
                )
                for tau in TAUS
            ]
            lambdas = np.clip(lambdas + coefficients.update(np.array(slopes)), 0, 1)
            vector = {
                n: sum(lam * t[n] for lam, t in zip(lambdas, TAUS, strict=True)) for n in SHAPES
            }
        losses.append(
            SLOPE * sum(np.sum((rescaled[n] * vector[n] - WANTED[n]) ** 2) for n in SHAPES)
        )
        slopes = gradients(rescaled, vector)
        for n, m in masks.items():
            # m / mean(m), differentiated: (I - (m / mean) 1^T / size) / mean.
            slope = (slopes[n] - np.mean(slopes[n] * rescaled[n])) / m.mean()
            logits[n] = logits[n] + adams[n].update(SIZE * slope * m * (1 - m) / 0.5)
    return logits, losses


@pytest.mark.parametrize("inner", [0.0, 0.1])
def test_a_shared_mask_takes_adams_steps_on_relaxed_draws(inner):
    learned = learn_shared_mask(
        *MODELS,
        loss,
        itertools.repeat([1.0]),
        scale=0.4,
        steps=3,
        learning_rate=0.1,
        seed=7,
        inner_learning_rate=inner,
        per_layer=False,
    )
    logits, losses = by_formula(3, 7, inner)
    np.testing.assert_allclose(learned.losses, losses, rtol=1e-4)
    for n, s in as_numpy(learned.logits).items():
        np.testing.assert_allclose(s, logits[n], atol=1e-4)


def test_a_shared_mask_has_what_the_loss_wants_of_one_expert_and_not_of_the_other():
    # Each entry is changed by one of them; only the first's changes are wanted.
    experts = [{n: np.where(m, BASE[n] + 0.01, BASE[n]) for n, m in NEEDED.items()}]
    experts += [{n: np.where(m, BASE[n], BASE[n] + 0.01) for n, m in NEEDED.items()}]

    def distance(params, batch):
        leaves = checkpoints.flatten(params)
        return SLOPE * sum(jnp.sum((leaves[n] - experts[0][n]) ** 2) for n in SHAPES) * batch

    learned = learn_shared_mask(
        MODELS[0],
        [checkpoints.unflatten(each) for each in experts],
        distance,
        itertools.repeat([1.0]),
        scale=0.5,
        steps=60,
        learning_rate=0.1,
    )
    for n, s in as_numpy(learned.logits).items():
        assert s[NEEDED[n]].min() > s[~NEEDED[n]].max()


def test_the_merge_is_by_the_mask_over_its_mean_and_without_logits_task_arithmetic():
    logits = flat(5)
    masks = rescaled_mask(checkpoints.unflatten(logits))
    coefficients = {"layers_00/*": [0.1, 0.9], "layers_01/*": [0.5, 0.2], "out": [1.0, 0.0]}
    merged = as_numpy(merge_by_mask(*MODELS, masks, coefficients))
    for (n, base), row in zip(BASE.items(), coefficients.values(), strict=True):
        m = sigmoid(np.float64(logits[n]))
        vector = row[0] * TAUS[0][n] + row[1] * TAUS[1][n]
        np.testing.assert_allclose(merged[n], base + m / m.mean() * vector, rtol=1e-6, atol=1e-7)
    even = rescaled_mask(jax.tree.map(jnp.zeros_like, MODELS[0]))
    plain = merge_params(*MODELS, Recipe("task_arithmetic", scale=0.3))
    merged = merge_by_mask(*MODELS, even, {"*": [0.3, 0.3]})
    for n, leaf in as_numpy(merged).items():
        np.testing.assert_allclose(leaf, as_numpy(plain)[n], rtol=1e-6, atol=1e-7)


def test_draws_are_fusion_benchs():
    # What its MaskModel.sample_mask gave in PyTorch 2.13 of these uniforms, at temperature 0.5.
    u = np.float32([[0.1, 0.5, 0.9], [0.37, 0.82, 0.03]])
    logits = np.float32([[-1.5, 0.0, 0.25], [2.0, -0.75, 1.0]])
    drawn = [[6.142778439e-04, 0.5, 9.925676584e-01], [9.495767951e-01, 8.224002123e-01]]
    drawn[1].append(7.018255536e-03)
    noise = np.log(u) - np.log1p(-u)
    found = learned_masks.relaxed_bernoulli(logits, noise, 0.5)
    np.testing.assert_allclose(found, drawn, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps above 0"),
        ({"learning_rate": float("nan")}, "learning_rate above 0"),
        ({"bias": 0.0}, "bias above 0"),
        ({"l1": -1.0}, "l1 of 0 or more"),
        ({"density": 1.5}, "density"),
        ({"steps": 2}, "1 of 2 steps"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"inner_learning_rate": -1.0}, "inner_learning_rate of 0 or more"),
        ({"inner_learning_rate": 0.1, "scale": 2.0}, "scale in"),
    ],
)
def test_what_cannot_be_learned_is_refused(settings, message):
    shared = {"temperature", "inner_learning_rate", "scale"} & {*settings}
    learn = learn_shared_mask if shared else localize
    models = MODELS if shared else (MODELS[0], MODELS[1][0])
    with pytest.raises(MergeError, match=message):
        learn(*models, loss, [[1.0]], **{"steps": 1} | settings)


def test_models_of_other_parameters_and_losses_that_are_no_numbers_are_refused():
    with pytest.raises(MergeError, match="experts above 0"):
        learn_shared_mask(MODELS[0], [], loss, [[1.0]], steps=1)
    with pytest.raises(MergeError, match="layers_01/w has shape none"):
        localize(MODELS[0], {"layers_00": MODELS[0]["layers_00"]}, loss, [[1.0]], steps=1)
    with pytest.raises(MergeError, match="step 1: the loss is nan"):
        localize(MODELS[0], MODELS[1][0], loss, [[np.nan]], steps=1)


def test_a_masks_gradient_takes_one_more_model_however_many_experts():
    size, layers = 64, 6
    theta = jax.ShapeDtypeStruct((size, size), jnp.float32)
    model = {f"layers_{layer:02d}/w": theta for layer in range(layers)}

    def network(params, x):
        for layer in range(layers):
            x = jnp.tanh(x @ params[f"layers_{layer:02d}"]["w"])
        return jnp.mean(x)

    gradient = jax.jit(
        functools.partial(learned_masks.mask_gradient, network, tuple(range(layers)))
    )
    lambdas, x = jax.ShapeDtypeStruct((layers, 8), jnp.float32), jnp.ones((4, size))
    compiled = gradient.lower(lambdas, model, [model] * 8, model, x).compile()
    # Besides what it returns: the merge, which gives way to its gradient, and activations.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * layers * 4 * size**2
