"""Methods of whole matrices, against float64 by other decompositions."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import METHODS, Recipe, merge, merge_params, prepare, spectral

from . import oracles
from .conftest import SHAPES, same_bits

KERNEL = "decoder/layers_00/mlp/wi_0"


def largest(matrix, rank):
    """The largest singular directions of a matrix, by the eigenvectors of its Gram matrix."""
    squares, right = np.linalg.eigh(matrix.T @ matrix)
    right, values = right[:, ::-1][:, :rank], np.sqrt(squares[::-1][:rank])
    return matrix @ right / values, values, right


def polar(columns):
    """U (U^T U)^(-1/2)."""
    squares, vectors = np.linalg.eigh(columns.T @ columns)
    return columns @ (vectors / np.sqrt(squares)) @ vectors.T


def added(parts):
    left = polar(np.concatenate([left for left, _, _ in parts], 1))
    right = polar(np.concatenate([right for _, _, right in parts], 1))
    return left, np.concatenate([values for _, values, _ in parts]), right


def tsv_m(taus):
    left, values, right = added([largest(tau, min(tau.shape) // len(taus)) for tau in taus])
    return left @ np.diag(values) @ right.T


def iso_c(taus):
    total = sum(taus)
    return scipy.linalg.polar(total)[0] * scipy.linalg.svdvals(total).mean()


def iso_cts(taus, common=0.8):
    full = min(taus[0].shape)
    own = round((full - int(full * common)) / len(taus))
    shared = largest(sum(taus), full - own * len(taus))
    projector = np.eye(len(taus[0])) - shared[0] @ shared[0].T
    left, values, right = added([*(largest(projector @ tau, own) for tau in taus), shared])
    return values.mean() * left @ right.T


def wudi(taus, steps=300, size=1e-5):
    tau, first, second = sum(taus), 0.0, 0.0
    for step in range(1, steps + 1):
        gradient = sum(2 * (tau - each) @ each.T @ each / np.sum(each**2) for each in taus)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        tau = tau - size * first / (1 - 0.9**step) / update
    return tau


ORACLES = {
    "tsv_m": (Recipe("tsv_m", scale=0.7), tsv_m),
    "iso_c": (Recipe("iso_c", scale=0.7), iso_c),
    "iso_cts": (Recipe("iso_cts", scale=0.7), iso_cts),
    "iso_cts half": (Recipe("iso_cts", common=0.5, scale=0.7), lambda t: iso_cts(t, 0.5)),
    "wudi": (Recipe("wudi", scale=0.7), wudi),
    "wudi far": (
        Recipe("wudi", steps=40, step_size=0.01, scale=0.7),
        lambda taus: wudi(taus, 40, 0.01),
    ),
}


def turned(matrices):
    return [matrix.T for matrix in matrices]


def widen(name, base, experts, ratio=1.0, calibration=1.0):
    """As the authors' code has it, of [outputs, inputs]; embeddings are transposed."""
    if name == "token_embedder":
        return widen("", base.T, turned(experts), ratio, calibration).T

    def importance(changes, slack=0.0):
        scores = scipy.special.softmax(changes, axis=0)
        scores[changes > ratio * changes.mean(1, keepdims=True) + slack] = calibration
        return scores

    def significance(changes):
        ranks = scipy.stats.rankdata(changes, axis=1, method="ordinal") - 1
        # Of an odd number of columns one is at the mean, but for rounding.
        return importance(ranks / changes.shape[1], 1e-9)

    taus = np.stack(experts) - base
    if base.ndim == 1:
        return (importance(np.abs(taus)) * taus).sum(0)
    lengths = np.linalg.norm(experts, axis=1)
    cosines = np.einsum("nij,ij->nj", experts, base) / lengths / np.linalg.norm(base, axis=0)
    scores = significance(np.abs(lengths - np.linalg.norm(base, axis=0))) + significance(
        1 - cosines
    )
    return (taus * scores[:, None] / 2).sum(0)


def ties(taus, density):
    return oracles.disjoint_mean(
        np.stack([oracles.trim(tau, density) for tau in np.float32(taus)]).astype(np.float64)
    )


def knots_ties(name, base, experts, density=1.0):
    """As the authors' code has it, but trimmed in each matrix."""
    taus = [expert - base for expert in experts]
    if base.ndim != 2 or name == "token_embedder":
        return ties(taus, density)
    left, values, right = svd(np.concatenate(taus, 1))
    return left @ ties(np.split(values[:, None] * right, len(taus), 1), density)


def svd(matrix):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, values > 1e-5], values[values > 1e-5], right[values > 1e-5]


def core_space(name, base, experts, density=1.0):
    taus = [expert - base for expert in experts]
    if base.ndim != 2 or name == "token_embedder":
        return ties(taus, density)
    left, right = svd(np.concatenate(taus, 1))[0], svd(np.concatenate(taus))[2]
    return left @ ties([left.T @ tau @ right.T for tau in taus], density) @ right


def nuslerp(vectors, weights):
    """Of one vector each: along the great circle from the first direction."""
    lengths = [np.linalg.norm(each) for each in vectors]
    one, other = (each / length for each, length in zip(vectors, lengths, strict=True))
    angle = 2 * np.arctan2(np.linalg.norm(one - other), np.linalg.norm(one + other))
    share = weights[1] / sum(weights)
    parts = np.sin(angle * (1 - share)) * vectors[0], np.sin(angle * share) * vectors[1]
    return sum(parts) / np.sin(angle)


def arcs(axis, weights=(1, 3)):
    def merged(name, base, experts):
        vectors = [expert - base for expert in experts[:2]]
        if base.ndim != 2:
            return nuslerp(vectors, weights)
        rows = zip(*(np.moveaxis(each, axis, 1) for each in vectors), strict=True)
        return np.moveaxis(np.stack([nuslerp(pair, weights) for pair in rows]), 1, axis)

    return merged


WHOLE_ORACLES = {
    "widen": ({}, widen),
    "widen calibrated": (
        {"above_average": 1.3, "calibration": 0.4},
        lambda *arguments: widen(*arguments, 1.3, 0.4),
    ),
    "knots_ties": ({}, knots_ties),
    "knots_ties trimmed": ({"density": 0.3}, lambda *arguments: knots_ties(*arguments, 0.3)),
    "core_space": ({}, core_space),
    "core_space trimmed": ({"density": 0.3}, lambda *arguments: core_space(*arguments, 0.3)),
    "nuslerp_rows": ({"weights": (1, 3)}, arcs(1)),
    "nuslerp_columns": ({"weights": (1, 3)}, arcs(0)),
    "task_nuslerp_rows": ({"weights": (1, 3)}, arcs(1)),
    "task_nuslerp_columns": ({"weights": (1, 3)}, arcs(0)),
}


@pytest.mark.parametrize("case", WHOLE_ORACLES)
def test_parameters_are_merged_by_the_papers_formulas(tmp_path, models, paths, case):
    settings, oracle = WHOLE_ORACLES[case]
    method = METHODS[case.split()[0]]
    has_scale = "scale" in method.hyper_parameters
    recipe = Recipe(method.name, settings | ({"scale": 0.7} if has_scale else {}))
    count = int(min(3, method.experts.high))
    base, experts = wide(models[0]), [wide(expert) for expert in models[1][:count]]
    has_base = method.needs_base
    merged = merge_params(models[0] if has_base else None, models[1][:count], recipe)
    for name, array in checkpoints.flatten(merged).items():
        origin = base[name] * has_base
        arrays = [origin, *(expert[name] for expert in experts)]
        is_kernel = array.ndim == 2 and name != "token_embedder"
        arrays = turned(arrays) if is_kernel else arrays
        moved = oracle(name, arrays[0], arrays[1:])
        wanted = origin + (0.7 if has_scale else 1) * (moved.T if is_kernel else moved)
        np.testing.assert_allclose(array, wanted, rtol=0, atol=2e-5, err_msg=name)
    inputs = paths[0] if has_base else None, paths[1][:count]
    merge(*inputs, recipe, tmp_path / "out", progress=False)
    from_disk = checkpoints.restore(tmp_path / "out")
    same_bits(*(checkpoints.flatten(tree) for tree in (from_disk, merged)))


@pytest.mark.parametrize("method", ["knots_ties", "core_space"])
def test_of_adapters_the_bases_have_their_rank(method, monkeypatch):
    rng = np.random.default_rng(4)
    base = rng.standard_normal((64, 48)).astype(np.float32)
    products = [0.1 * rng.standard_normal((64, 2)) @ rng.standard_normal((2, 48)) for _ in "ab"]
    experts = [np.float32(base + product) for product in products]
    doubles = [np.float64(each) for each in (base, *experts)]
    # Of all directions there are, most would be rounding, and the density would count them.
    wanted = {"knots_ties": knots_ties, "core_space": core_space}[method](
        "w", doubles[0], doubles[1:], 0.3
    )
    subspaces = []
    search = spectral._subspace
    monkeypatch.setattr(
        spectral, "_subspace", lambda *each: subspaces.append(search(*each)) or subspaces[-1]
    )
    merged = METHODS[method].function("w", base, experts, True, density=0.3)
    assert [columns.shape for columns in subspaces] == [(64, 8), (48, 6)][: len(subspaces)]
    np.testing.assert_allclose(merged - base, wanted, rtol=0, atol=1e-5)
    monkeypatch.setattr(spectral, "_subspace", lambda *_: None)
    merged = METHODS[method].function("w", base, experts, True, density=0.3)
    np.testing.assert_allclose(merged - base, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["nuslerp_rows", "nuslerp_columns"])
def test_on_arcs_equal_opposite_and_no_rows_give_numbers(method):
    rng = np.random.default_rng(5)
    one = rng.standard_normal((4, 4)).astype(np.float32)
    factors = np.float32([1, -1, 0, 2])
    other = one * (factors[:, None] if method == "nuslerp_rows" else factors)
    merged = METHODS[method].function([one, other], True, weights=(1.0, 1.0))
    shares = np.float32([1, 0, 0.5**0.5, 1.5])
    wanted = one * (shares[:, None] if method == "nuslerp_rows" else shares)
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-6)


def test_columns_that_hardly_moved_are_told_apart_by_widen():
    rng = np.random.default_rng(6)
    base = rng.standard_normal((30, 8)).astype(np.float32)
    base[:, 7] = 0
    # Turned by angles so small that float32 has no cosine of them other than 1.
    tau = np.float32(2.0**-12 * rng.standard_normal((30, 8)) * np.arange(8))
    lengths, turns = spectral._column_changes(base, tau, 0)
    base, double = np.float64(base), np.float64(base) + tau
    norms = np.linalg.norm(double, axis=0), np.linalg.norm(base, axis=0)
    np.testing.assert_allclose(lengths, np.abs(norms[0] - norms[1]), rtol=1e-5, atol=1e-12)
    units = [
        each[:, :7] / np.linalg.norm(each[:, :7], axis=0) for each in (double, np.float64(base))
    ]
    np.testing.assert_allclose(turns[:7], ((units[0] - units[1]) ** 2).sum(0) / 2, rtol=1e-5)
    assert turns[7] == 1


def wide(tree):
    return {n: np.asarray(a, np.float64) for n, a in checkpoints.flatten(tree).items()}


@pytest.mark.parametrize(("recipe", "oracle"), ORACLES.values(), ids=list(ORACLES))
def test_matrices_are_merged_by_the_papers_formulas(tmp_path, models, paths, recipe, oracle):
    base, experts = wide(models[0]), [wide(expert) for expert in models[1]]
    merged = merge_params(*models, recipe)
    for name, array in checkpoints.flatten(merged).items():
        taus = [expert[name] - base[name] for expert in experts]
        if array.ndim != 2 or (recipe.method == "wudi" and name == "token_embedder"):
            tau = sum(taus) / len(taus)
        elif name == "token_embedder":
            tau = oracle(taus)
        else:  # Flax's kernels are [inputs, outputs].
            tau = oracle([tau.T for tau in taus]).T
        np.testing.assert_allclose(array, base[name] + 0.7 * tau, rtol=0, atol=2e-5)
    merge(*paths, recipe, tmp_path / "out", progress=False)
    from_disk = checkpoints.restore(tmp_path / "out")
    same_bits(*(checkpoints.flatten(tree) for tree in (from_disk, merged)))


def defaults(method, experts):
    numbers = method.hyper_parameters.values()
    return {e.name: np.ones(experts) if e.per_expert else e.default for e in numbers}


@pytest.mark.parametrize("name", [name for name, each in METHODS.items() if each.of_matrices])
def test_either_layout_gives_the_same_matrix_and_one_expert_alone_is_kept(name):
    rng = np.random.default_rng(2)
    base, *experts = rng.standard_normal((4, 6, 9)).astype(np.float32)
    method = METHODS[name]
    numbers = defaults(method, most := int(min(3, method.experts.high)))

    def merged(base, experts, has_rows=True):
        reads = [lambda e=expert: e for expert in experts]
        return spectral.merged(method, "w", base, reads, has_rows, numbers)

    rows = merged(base, experts[:most])
    columns = merged(base.T.copy(), [expert.T.copy() for expert in experts[:most]], False)
    np.testing.assert_array_equal(rows, columns.T)
    # Nothing to add, and directions that are nobody's.
    np.testing.assert_array_equal(merged(base, [base, base][:most]), base)
    if 1 not in method.experts or most == 1:
        return
    outer = np.outer(base[:, 0], base[0])
    alone = merged(base, [base + outer])
    np.testing.assert_allclose(alone, base + outer, atol=1e-5 if name != "wudi" else 1e-2)
    assert np.isfinite(merged(base, [base, base + outer, base + outer])).all()


def test_arcee_fusion_takes_what_differs_most_in_rows_that_differ(models):
    base, expert = (checkpoints.flatten(tree) for tree in (models[0], models[1][0]))
    merged = checkpoints.flatten(merge_params(models[0], models[1][:1], Recipe("arcee_fusion")))
    for name, array in merged.items():
        turned = name.endswith("wi_0")  # Whose rows are inputs.
        pair = [np.float64(each[name].T if turned else each[name]) for each in (base, expert)]
        q, p = (scipy.special.softmax(each, axis=-1) + 1e-8 for each in pair)
        tau = pair[1] - pair[0]
        importance = np.abs(tau) * (p * np.log(p / q)).sum(-1, keepdims=True)
        low, median, high = np.quantile(importance, (0.25, 0.5, 0.75), method="lower")
        wanted = pair[0] + np.where(importance >= median + 1.5 * (high - low), tau, 0)
        np.testing.assert_allclose(array, wanted.T if turned else wanted, rtol=0, atol=1e-6)
        assert 0 < np.mean(array != base[name]) < 0.5


@pytest.mark.parametrize("name", [name for name, each in METHODS.items() if each.of_matrices])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (3, 0), (1, 1)])
def test_parameters_of_few_elements_or_none_keep_their_shape(name, shape):
    base = np.ones(shape, np.float32)
    experts = [{"w": 2 * base}] * int(METHODS[name].experts.low)
    merged = merge_params({"w": base}, experts, Recipe(name))["w"]
    np.testing.assert_allclose(merged, 2 * base, rtol=1e-5)


def test_equal_experts_of_tsv_m_are_one():
    rng = np.random.default_rng(3)
    base = rng.standard_normal((8, 6)).astype(np.float32)
    low = (rng.standard_normal((8, 2)) @ rng.standard_normal((2, 6))).astype(np.float32)
    merged = spectral.tsv_m(base, [base + low] * 3, True)
    np.testing.assert_allclose(merged, base + low, atol=1e-5)


def test_what_is_no_matrix_and_what_cannot_be_read_as_one_is_refused():
    stacked = {"w": np.zeros((2, 3, 4), np.float32), "b": np.zeros(3, np.float32)}
    with pytest.raises(MergeError, match=r"tsv_m merges matrices.* of w \[2, 3, 4\]: --exclude"):
        merge_params(stacked, [stacked], Recipe("tsv_m"))
    merged = merge_params(stacked, [stacked], Recipe("tsv_m", exclude=("w",)))
    assert merged["w"].shape == (2, 3, 4)
    with pytest.raises(MergeError, match="steps must be a whole number"):
        Recipe("wudi", steps=2.5)


@pytest.mark.parametrize("name", [name for name, each in METHODS.items() if each.of_matrices])
@pytest.mark.parametrize("shape", [(192, 640), (300, 300), (640, 192)])
def test_a_matrix_takes_the_memory_that_is_planned(name, shape):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape, np.float32)
    reads = [lambda: base + rng.standard_normal(shape, np.float32)] * 7
    reads = reads[: int(min(7, METHODS[name].experts.high))]
    numbers = defaults(METHODS[name], len(reads))
    numbers |= {"steps": 1.0} if "steps" in numbers else {}
    arguments = (METHODS[name], "w", base, reads, True, numbers)
    spectral.merged(*arguments)  # Compiles.
    tracemalloc.start()
    spectral.merged(*arguments)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most <= spectral.matrix_bytes(METHODS[name], "w", shape)


def test_the_largest_matrix_is_in_the_plan(paths):
    for name in ("iso_c", "core_space"):
        job = prepare(*paths, Recipe(name), "unused")
        sizes = (spectral.matrix_bytes(METHODS[name], *each) for each in SHAPES.items())
        assert job.plan.whole == max(sizes)
