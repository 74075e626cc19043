"""Attention against the formula in float64, and the devices' kernels against the einsums."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l.errors import UnknownNameError
from m2l.models import attention
from m2l.models.attention import Causal, attend, attend_parts, hide

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3, 3]], np.int32)
CAUSAL = {
    "causal": {},
    "segments": {"segments": SEGMENTS},
    "window": {"window": 3},
    "one key a query": {"window": 1},
    "segments and window": {"segments": SEGMENTS, "window": 2},
}


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def arrays(rows=2, heads=4, groups=4, length=7, keys=None, size=6):
    keys = keys or length
    return (
        draw(rows, heads, length, size),
        draw(rows, groups, keys, size, seed=1),
        draw(rows, groups, keys, size, seed=2),
    )


def seen_by(rows, length, segments=None, window=0):
    """bool [B, 1, T, T], pair by pair."""
    seen = np.zeros((rows, 1, length, length), bool)
    for row, query, key in np.ndindex(rows, length, length):
        near = key <= query and (window == 0 or query - key < window)
        alike = segments is None or segments[row, query] == segments[row, key]
        seen[row, 0, query, key] = near and alike
    return seen


def formula(query, key, value, seen=True, bias=0.0, scale=1.0, softcap=0.0):
    """Softmax attention in float64, one query at a time; what is not seen is left out."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    (rows, heads, length, _), (groups, keys) = query.shape, key.shape[1:3]
    shape = rows, heads, length, keys
    seen, bias = np.broadcast_to(seen, shape), np.broadcast_to(bias, shape)
    read = np.zeros((rows, heads, length, value.shape[-1]))
    for row, head, at in np.ndindex(rows, heads, length):
        of_head = head // (heads // groups)
        scores = scale * key[row, of_head] @ query[row, head, at]
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        chosen = seen[row, head, at]
        weights = np.exp((scores + bias[row, head, at])[chosen])
        read[row, head, at] = weights @ value[row, of_head][chosen] / weights.sum()
    return read


def causal(segments=None, window=0):
    return Causal(None if segments is None else jnp.asarray(segments), window)


def close(found, expected, atol=2e-6):
    """Float32 sums of a few numbers near 1."""
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=atol)


@pytest.fixture
def told():
    """Warnings that were given once are given again."""
    attention._warn.cache_clear()
    yield
    attention._warn.cache_clear()


# The reference.


@pytest.mark.parametrize("case", CAUSAL)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal_attention_is_the_formula(case, groups):
    given = arrays(groups=groups)
    found = attend(*given, causal(**CAUSAL[case]), scale=0.3, implementation="einsum")
    close(found, formula(*given, seen_by(2, 7, **CAUSAL[case]), scale=0.3))


@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (2, 1, 5, 9), (2, 4, 1, 9), (2, 4, 5, 9)])
def test_a_bias_is_added_to_the_scores_of_the_heads_and_rows_that_it_has(shape):
    given, bias = arrays(groups=2, length=5, keys=9), draw(*shape)
    found = attend(*given, jnp.asarray(bias), scale=0.3, implementation="einsum")
    close(found, formula(*given, bias=bias, scale=0.3))


def test_what_is_hidden_is_as_if_it_were_not_there():
    given, seen, bias = arrays(length=5, keys=9), draw(2, 1, 5, 9) > -0.5, draw(1, 4, 5, 9)
    assert seen.any(-1).all() and not seen.all()
    found = attend(*given, hide(seen, bias), scale=1.0, implementation="einsum")
    close(found, formula(*given, seen, bias))


def test_the_softcap_bends_scores_before_the_bias_and_after_the_scale():
    given, bias = arrays(groups=2, length=5, keys=9), 3 * draw(2, 4, 5, 9)
    found = attend(*given, bias, scale=2.0, softcap=1.5, implementation="einsum")
    expected = formula(*given, bias=bias, scale=2.0, softcap=1.5)
    close(found, expected)
    assert np.abs(expected - formula(*given, bias=bias, scale=2.0)).max() > 0.1


def test_a_query_that_sees_no_key_reads_the_mean_of_all():
    given = arrays(groups=2, length=5, keys=9)
    found = attend(*given, hide(np.zeros((1, 1, 1, 9), bool)), scale=1.0, implementation="einsum")
    mean = np.repeat(given[2], 2, axis=1).mean(2, keepdims=True)
    close(found, np.broadcast_to(mean, found.shape))


def test_a_traced_window_is_the_window_and_none_where_it_is_zero():
    given, segments = arrays(), jnp.asarray(SEGMENTS)

    @jax.jit
    def windowed(window):
        return attend(*given, Causal(segments, window), scale=0.3, implementation="einsum")

    for window in (0, 1, 3):
        close(windowed(window), formula(*given, seen_by(2, 7, SEGMENTS, window), scale=0.3))


def test_bfloat16_attention_has_float32_scores():
    given = [jnp.asarray(x, jnp.bfloat16) for x in arrays()]
    # Scores near 300, which bfloat16 tells from their neighbours by 2: they must not be rounded.
    found = attend(*given, Causal(), scale=100.0, implementation="einsum")
    assert found.dtype == jnp.bfloat16
    exact = formula(*(np.asarray(x, np.float32) for x in given), seen_by(2, 7), scale=100.0)
    # Weights and what is read are rounded to 8 bits.
    close(np.asarray(found, np.float32), exact, atol=0.02)


def test_dropout_is_applied_to_the_weights():
    given = arrays()
    kept = jnp.asarray(draw(2, 4, 7, 7) > 0)
    found = attend(*given, Causal(), scale=0.0, dropout=lambda w: w * kept, implementation="einsum")
    # At scale 0 every key that is seen has the same weight.
    seen = seen_by(2, 7)
    weights = seen / seen.sum(-1, keepdims=True) * np.asarray(kept)
    close(found, weights @ given[2])


def test_a_shared_prefix_is_read_as_if_it_were_repeated_before_each_rows_own_keys():
    query, own_key, own_value = arrays(rows=6, groups=2, length=3)
    _, key, value = arrays(rows=2, groups=2, length=5)
    biases = draw(6, 1, 1, 5), np.asarray(hide(np.tril(np.ones((3, 3), bool))))[None, None]
    how = {"scale": 0.3, "softcap": 2.0}
    parts = [(key, value, biases[0]), (own_key, own_value, biases[1])]
    found = attend_parts(query, parts, **how)

    keys, values = (
        np.concatenate([np.repeat(shared, 3, axis=0), own], axis=2)
        for shared, own in ((key, own_key), (value, own_value))
    )
    bias = np.concatenate(
        [np.broadcast_to(bias, (6, 4, 3, bias.shape[-1])) for bias in biases], axis=-1
    )
    close(found, attend(query, keys, values, bias, implementation="einsum", **how))
    close(found, formula(query, keys, values, bias > -1e9, np.where(bias > -1e9, bias, 0), **how))


def test_an_unknown_implementation_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"attention implementation 'splat'.*'splash'"):
        attend(*arrays(), Causal(), scale=1.0, implementation="splat")


def test_the_cpu_takes_the_einsums_and_says_nothing(told):
    given = arrays()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = attend(*given, Causal(), scale=0.3)
    np.testing.assert_array_equal(
        found, attend(*given, Causal(), scale=0.3, implementation="einsum")
    )


# The kernels.


def both(implementation, given, visible, **how):
    """Output and gradients of an implementation and of the einsums."""
    turned = draw(*given[0].shape[:3], given[2].shape[-1], seed=3)

    def run(name):
        def product(query, key, value):
            read = attend(query, key, value, visible, implementation=name, **how)
            return (read * turned).sum(), read

        gradient = jax.value_and_grad(product, argnums=(0, 1, 2), has_aux=True)
        quickly = {"xla_backend_optimization_level": 0}
        (_, read), gradients = jax.jit(gradient, compiler_options=quickly)(*given)
        return read, *gradients

    return run(implementation), run("einsum")


@pytest.mark.parametrize("case", CAUSAL)
def test_xla_computes_what_the_einsums_do_and_their_gradients(case, told):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = both("xla", arrays(groups=2), causal(**CAUSAL[case]), scale=0.3)
    for found, expected in zip(*pairs, strict=True):
        close(found, expected)


def test_xla_adds_a_bias_as_the_einsums_do():
    given, bias = arrays(groups=2, length=5, keys=9), draw(2, 1, 1, 9)
    for found, expected in zip(*both("xla", given, bias, scale=0.3), strict=True):
        close(found, expected)


LONG = np.array([[1] * 100 + [2] * 90 + [0] * 66, [1] * 10 + [2] * 200 + [3] * 46], np.int32)
SPLASH = {
    "segments": (4, {"segments": LONG}, 0.0),
    "window": (4, {"window": 40}, 0.0),
    "softcap and shared keys": (2, {}, 2.0),
}


@pytest.mark.parametrize("case", SPLASH)
def test_splash_computes_what_the_einsums_do_and_their_gradients(case, told):
    groups, given, softcap = SPLASH[case]
    qkv = arrays(groups=groups, length=256, size=128)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pairs = both("splash", qkv, causal(**given), scale=128**-0.5, softcap=softcap)
    for found, expected in zip(*pairs, strict=True):
        # Blocks of keys are summed one after the other.
        close(found, expected, atol=1e-5)


def _on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


HALF = {"dtype": jnp.bfloat16}
OBSTACLES = {
    "splash: a bias": ("splash", {}, {"bias": True}, "it supports no bias"),
    "splash: a length": (
        "splash",
        {"length": 130, "size": 128},
        {},
        "130 positions of 128 features are not both multiples of 128",
    ),
    "splash: a size": ("splash", {"length": 128, "size": 64}, {}, "of 64 features"),
    "splash: dropout": ("splash", {}, {"dropout": True}, "no dropout of attention weights"),
    "splash: traced": ("splash", {}, {"window": jnp.int32(3)}, "different windows"),
    "xla: dropout": ("xla", {}, {"dropout": True}, "no dropout of attention weights"),
    "xla: traced": ("xla", {}, {"window": jnp.int32(3)}, "different windows"),
    "xla: softcap": ("xla", {}, {"softcap": 2.0}, "it has no softcap"),
    "cudnn: softcap": ("cudnn", {}, {"softcap": 2.0}, "it has no softcap"),
    "cudnn: on a cpu": ("cudnn", {"size": 8}, HALF, "the device is no GPU"),
    "cudnn: float32": ("cudnn on a gpu", {"size": 8}, {}, "not in float32"),
    "cudnn: a size": ("cudnn on a gpu", {"length": 8, "size": 12}, HALF, "heads of 12 features"),
    "cudnn: large": ("cudnn on a gpu", {"length": 8, "size": 136}, HALF, "heads of 136 features"),
    "cudnn: a length": ("cudnn on a gpu", {"length": 7, "size": 8}, HALF, "7 positions"),
    "auto: a gpu": ("auto on a gpu", {"size": 8}, {}, "this device's attention kernel 'cudnn'"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_a_kernel_that_cannot_gives_way_to_the_einsums_and_says_why(case, told, monkeypatch):
    asked, shape, change, reason = OBSTACLES[case]
    implementation, *device = asked.split(" on a ")
    given = [jnp.asarray(x, change.get("dtype", jnp.float32)) for x in arrays(groups=2, **shape)]
    length = given[0].shape[2]
    visible = Causal(None, change.get("window", 0))
    if change.get("bias"):
        visible = jnp.asarray(draw(1, 4, length, length))
    how = {"scale": 0.3, "softcap": change.get("softcap", 0.0)}
    if change.get("dropout"):
        how["dropout"] = lambda weights: weights * jnp.arange(length)
    expected = attend(*given, visible, implementation="einsum", **how)
    if device:
        _on_gpu(monkeypatch)
    with pytest.warns(UserWarning, match="falling back to einsum") as given_warnings:
        found = attend(*given, visible, implementation=implementation, **how)
        again = attend(*given, visible, implementation=implementation, **how)
    [warning] = [w for w in given_warnings if "falling back" in str(w.message)]
    assert reason in str(warning.message)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again, expected)


ON_A_MESH = """
import json, warnings
import jax, jax.numpy as jnp, numpy as np
from m2l import partitioning
from m2l.models.attention import Causal, attend

mesh = partitioning.make_mesh(fsdp=2, model=2)
rng = np.random.default_rng(0)


def apart(rows, groups):
    q, k, v, turned = (
        rng.normal(size=(rows, heads, 128, 128)).astype(np.float32)
        for heads in (4, groups, groups, 4)
    )
    segments = np.sort(rng.integers(1, 4, (rows, 128), dtype=np.int32))

    def run(name):
        def product(q, k, v, segments):
            read = attend(q, k, v, Causal(segments, 50), scale=0.1, implementation=name)
            return (read * turned).sum(), read

        step = jax.jit(jax.value_and_grad(product, argnums=(0, 1, 2), has_aux=True))
        (_, read), gradients = step(q, k, v, segments)
        return read, *gradients

    expected = run("einsum")
    with jax.set_mesh(mesh), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = run("splash")
    told = [str(w.message) for w in told if "falling back" in str(w.message)]
    distances = [float(np.abs(np.asarray(a) - np.asarray(b)).max())
                 for a, b in zip(found, expected)]
    return max(distances), told


print(json.dumps({"divided": apart(4, 2), "rows": apart(3, 2), "heads": apart(2, 1)}))
"""


@pytest.fixture(scope="module")
def on_a_mesh(forge):
    (said,) = forge((ON_A_MESH,), devices=4)
    return json.loads(said)


def test_splash_on_a_mesh_computes_what_the_einsums_do_on_one_device(on_a_mesh):
    distance, told = on_a_mesh["divided"]
    assert distance < 1e-5 and not told


@pytest.mark.parametrize(
    "case, reason",
    [
        ("rows", "the mesh does not divide 3 rows"),
        ("heads", "the mesh does not divide 1 heads of keys"),
    ],
)
def test_splash_gives_way_where_the_mesh_does_not_divide(on_a_mesh, case, reason):
    distance, told = on_a_mesh[case]
    assert distance < 1e-5
    assert len(told) == 1 and reason in told[0]
