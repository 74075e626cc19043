"""Permutation alignment of an expert to a reference, before any method: Git Re-Basin.

Ainsworth et al. 2022, arXiv:2209.04836. A network computes the same when its hidden units are
exchanged together with the weights that read them; of all these networks that are equal, one is
near to the reference. Weight matching (their section 3.2) finds the permutations one group at a
time, by linear assignment, given all others, until none moves; activation matching (3.1) assigns
units by what they say on the same tokens.

The groups of a transformer:

- residual: the features that all layers read and add to, with the weights of norms, whose mean of
  squares does not know their order.
- mlp: hidden units of an MLP; of a mixture of experts those of each, and the experts.
- heads: those of keys and values, each with the heads of queries that it serves, and these among
  themselves. Where one table of position biases serves all layers of a stack (T5), its heads are
  exchanged in all of them at once.
- features: those of values within a head; those of queries and keys where they are neither turned
  by rotary positions nor normed by weights that heads share.

Elements are moved, never computed with: what a model computes changes by the rounding of sums in
another order alone, and its bits are those that it had.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from m2l import checkpoints, models, signals, storage
from m2l.checkpoints import Manifest, opening
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.reading import KEY, existing_result
from m2l.errors import MergeError
from m2l.files import checksum
from m2l.merging import inputs
from m2l.models import LlamaConfig
from m2l.storage import PathLike
from m2l.typing import Json, Params

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]
Moves = collections.Counter
"""How many units of each kind of group are not where they were."""

MOST_SWEEPS = 50
_FEATURE_NORMS = ("query_norm", "key_norm")


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What came of aligning an expert.

    Attributes:
        moved: Of each kind of group, how many units moved, in the sweep in which most did.
        units: How many there are.
        sweeps: How often all groups were gone through.
        distances: The Frobenius norm of the difference of all parameters, before and after.
    """

    moved: Mapping[str, int]
    units: Mapping[str, int]
    sweeps: int
    distances: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The layout of an attention block: G heads of keys, R of queries for each, K features.

    Attributes:
        prefix: Of its parameters' names.
        groups, queries, features: G, R and K.
        free: The features of queries and keys that may be exchanged within a head.
        vectors: The parameters that have a number for each feature of each head: biases, and norms
            of all heads together.
    """

    prefix: str
    groups: int
    queries: int
    features: int
    free: np.ndarray
    vectors: tuple[str, ...] = ()


class _Matcher:
    """Permutes an expert's arrays, group by group, towards a reference's.

    Args:
        config: The model's configuration.
        reference: Its parameters by name.
        expert: The expert's; replaced as groups are permuted.
        products: By kernel, the sum over tokens of x_reference x_expert^T of its inputs: then
            units are assigned by these, and otherwise by weights.
    """

    def __init__(
        self,
        config: models.Config,
        reference: Arrays,
        expert: Arrays,
        products: Mapping[str, np.ndarray] | None = None,
    ):
        self.reference, self.expert, self._products = reference, expert, products
        specs = checkpoints.flatten(models.spec(config))
        self._axes = {name: specs[name].axes for name in reference}
        self.units: Moves = collections.Counter()
        self._moved: Moves = collections.Counter()
        self._places: Moves = collections.Counter()
        self._residual = [
            (name, axis)
            for name, axes in self._axes.items()
            for axis, each in enumerate(axes)
            if each == "embed" or (axes == ("norm",) and not name.endswith(_FEATURE_NORMS))
        ]
        self._mlps: dict[str, dict[str, int]] = {}
        for name, axes in self._axes.items():
            for axis, each in enumerate(axes):
                if each in ("mlp", "expert_mlp"):
                    self._mlps.setdefault(name.rpartition("/")[0], {})[name] = axis
        self._attentions = _attentions(config, reference)

    def match_anchors(self) -> bool:
        """Assigns the residual's features by what no other permutation changes.

        These are embeddings, norms and the output's matrix. Returns whether any moved.
        """
        kinds = (("norm",), ("vocab", "embed"), ("embed", "vocab"))
        anchors = [(name, axis) for name, axis in self._residual if self._axes[name] in kinds]
        order = assignment(self._scores(anchors))
        for name, axis in self._residual:
            self._permute(name, axis, order)
        self._places["residual"] = int(np.count_nonzero(order != np.arange(len(order))))
        return bool(self._places["residual"])

    def run(self) -> int:
        """Goes through all groups until none moves; returns how often."""
        sweeps, changed = 0, True
        while changed and sweeps < (MOST_SWEEPS if self._products is None else 1):
            changed = self._sweep()
            self._places |= self._moved
            sweeps += 1
        return sweeps

    @property
    def moved(self) -> dict[str, int]:
        """Of each kind of group, how many units moved in the sweep in which most did."""
        return {kind: self._places[kind] for kind in self.units}

    def _sweep(self) -> bool:
        """Assigns the units of every group; returns whether any moved."""
        self._moved.clear()
        self.units.clear()
        self._match_residual()
        for prefix, kernels in self._mlps.items():
            self._match_mlp(prefix, kernels)
            signals.check()
        for blocks in self._attentions:
            self._match_attention(blocks)
            signals.check()
        return bool(sum(self._moved.values()))

    def _rows(self, arrays: Arrays, name: str, axis: int) -> np.ndarray:
        array = np.moveaxis(arrays[name], axis, 0)
        return np.ascontiguousarray(array.reshape(len(array), -1), np.float32)

    def _scores(self, places: Sequence[tuple[str, int]]) -> np.ndarray:
        """Returns the inner products of the reference's units and the expert's, summed."""
        return sum(
            self._rows(self.reference, name, axis) @ self._rows(self.expert, name, axis).T
            for name, axis in places
        )

    def _permute(self, name: str, axis: int, order: np.ndarray) -> None:
        self.expert[name] = np.ascontiguousarray(np.take(self.expert[name], order, axis))

    def _count(self, kind: str, order: np.ndarray) -> None:
        self.units[kind] += len(order)
        self._moved[kind] += int(np.count_nonzero(order != np.arange(len(order))))

    def _match_residual(self) -> None:
        if self._products is not None:
            reads = [n for n, axis in self._residual if axis == 0 and n in self._products]
            scores = sum(self._products[name] for name in reads)
        else:
            scores = self._scores(self._residual)
        order = assignment(scores)
        self._count("residual", order)
        for name, axis in self._residual:
            self._permute(name, axis, order)

    def _match_mlp(self, prefix: str, kernels: Mapping[str, int]) -> None:
        router = f"{prefix}/router"
        if router not in self.expert:
            products = None if self._products is None else self._products[f"{prefix}/wo"]
            order = assignment(self._scores([*kernels.items()]) if products is None else products)
            self._count("mlp", order)
            for name, axis in kernels.items():
                self._permute(name, axis, order)
            return
        order = assignment(self._scores([(router, 1)]))
        self._count("experts", order)
        for name, axis in {router: 1, **dict.fromkeys(kernels, 0)}.items():
            self._permute(name, axis, order)
        permuted = {name: [] for name in kernels}
        for number in range(len(order)):
            ours, theirs = (
                {name: arrays[name][number] for name in kernels}
                for arrays in (self.reference, self.expert)
            )
            order = assignment(
                sum(
                    self._rows(ours, name, axis - 1) @ self._rows(theirs, name, axis - 1).T
                    for name, axis in kernels.items()
                )
            )
            self._count("mlp", order)
            for name, axis in kernels.items():
                permuted[name].append(np.take(theirs[name], order, axis - 1))
        self.expert |= {name: np.stack(parts) for name, parts in permuted.items()}

    def _match_attention(self, blocks: Sequence[_Attention]) -> None:
        """Assigns the heads of blocks that share their order, and what is within heads."""
        groups, queries = blocks[0].groups, blocks[0].queries
        matches = [_HeadMatches(self, block) for block in blocks]
        scores = sum(match.scores for match in matches)
        table = blocks[0].prefix.split("/layers_")[0] + "/relpos_bias"
        tables = table in self.expert and blocks[0].prefix.endswith("/self_attention")
        if tables and self._products is None:
            scores = scores + self._scores([(table, 0)])
        order = assignment(scores)
        self._count("heads", order)
        if tables:
            self._permute(table, 0, order)
        for block, match in zip(blocks, matches, strict=True):
            parts = [match.inner[place, other] for place, other in enumerate(order)]
            rows = np.stack([part[0] for part in parts])
            for part in parts:
                if queries > 1:
                    self._count("query heads", part[0])
                if len(block.free):
                    self._count("query and key features", part[1])
                self._count("value features", part[2])
            feature_orders = {
                1: np.stack([p[1] for p in parts]),
                2: np.stack([p[2] for p in parts]),
            }
            for part in ("query", "key", "value", "out", *block.vectors):
                # Of keys and values there is one head for R of queries.
                heads = queries if part.startswith(("query", "out")) else 1
                full, axis = f"{block.prefix}/{part}", int(part in ("query", "key", "value"))
                view = np.moveaxis(self.expert[full], axis, 0)
                split = view.reshape(groups, heads, block.features, -1)[order]
                if heads > 1:
                    split = np.take_along_axis(split, rows[:, :, None, None], 1)
                features = feature_orders[1 if part.startswith(("query", "key")) else 2]
                split = np.take_along_axis(split, features[:, None, :, None], 2)
                moved = np.moveaxis(split.reshape(view.shape), 0, axis)
                self.expert[full] = np.ascontiguousarray(moved)


class _HeadMatches:
    """How well each head of keys matches each, with the best orders of what is within.

    Attributes:
        scores: [G, G], of the reference's heads with the expert's.
        inner: (g, g') -> the orders of the R heads of queries, of the K features of queries and
            keys, and of the K features of values.
    """

    def __init__(self, matcher: _Matcher, block: _Attention):
        c, self._free = block, block.free
        shape = (c.groups, c.queries, c.features)

        def products(name: str, heads: int) -> np.ndarray:
            """Returns the inner products [G, r, K, G, r, K] of all features of all heads."""
            sides = []
            for arrays in (matcher.reference, matcher.expert):
                axis = 0 if name == "out" else 1
                rows = [matcher._rows(arrays, f"{c.prefix}/{name}", axis)]
                vectors = [each for each in c.vectors if each.startswith(name)]
                rows += [matcher._rows(arrays, f"{c.prefix}/{each}", 0) for each in vectors]
                sides.append(np.concatenate(rows, axis=1))
            each = (c.groups, heads, c.features)
            return (sides[0] @ sides[1].T).reshape(*each, *each)

        self._query, self._key = products("query", c.queries), products("key", 1)[:, 0, :, :, 0]
        if matcher._products is None:
            self._value = products("value", 1)[:, 0, :, :, 0]
            self._out = products("out", c.queries)
        else:
            self._value = None
            self._out = matcher._products[f"{c.prefix}/out"].reshape(*shape, *shape)
        self.scores = np.zeros((c.groups, c.groups))
        self.inner: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for g in range(c.groups):
            for h in range(c.groups):
                self.scores[g, h], self.inner[g, h] = self._match(g, h)

    def _match(self, g: int, h: int) -> tuple[float, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        query, key, out = self._query[g, :, :, h], self._key[g, :, h], self._out[g, :, :, h]
        queries, features = query.shape[:2]
        by_weights, fixed = self._value is not None, np.ones(features, bool)
        fixed[self._free] = False
        rows, columns = np.arange(queries), np.arange(features)
        values = columns
        for _ in range(2 if queries > 1 else 1):
            if queries > 1:
                if by_weights:
                    places = columns if self._free.size == 0 else np.flatnonzero(fixed)
                    pairs = query[:, places, :, columns[places]].sum(0)
                else:
                    pairs = out[:, np.arange(features), :, values].sum(0)
                rows = assignment(pairs)
            if by_weights:
                seen = self._value[g, :, h] + out[np.arange(queries), :, rows].sum(0)
            else:
                seen = out[np.arange(queries), :, rows].sum(0)
            values = assignment(seen)
        asked = key + query[np.arange(queries), :, rows].sum(0)
        if self._free.size:
            columns = columns.copy()
            columns[self._free] = self._free[assignment(asked[np.ix_(self._free, self._free)])]
        score = float(seen[np.arange(features), values].sum())
        if by_weights:
            score += float(asked[np.arange(features), columns].sum())
        return score, (rows, columns, values)


def assignment(scores: np.ndarray) -> np.ndarray:
    """Returns which unit of the expert goes to each place: the assignment of the largest sum.

    Where the sum is no larger than that of the units where they are, these stay.

    Args:
        scores: [n, n], of the reference's units with the expert's.
    """
    scores = np.asarray(scores, np.float64)
    places = np.arange(len(scores))
    order = linear_sum_assignment(scores, maximize=True)[1]
    before, after = scores[places, places].sum(), scores[places, order].sum()
    better = after - before > 1e-7 * np.abs(scores).max(initial=0.0)
    return order if better else places


def _attentions(config: models.Config, names: Mapping[str, np.ndarray]) -> list[list[_Attention]]:
    """Returns the attention blocks, those together whose heads keep one order."""
    prefixes = [name.removesuffix("/query") for name in names if name.endswith("/query")]
    if not isinstance(config, LlamaConfig):
        shared: dict[str, list[_Attention]] = {}
        for prefix in prefixes:
            block = _Attention(prefix, config.num_heads, 1, config.d_kv, np.arange(config.d_kv))
            own = prefix if prefix.endswith("cross_attention") else prefix.split("/")[0]
            shared.setdefault(own, []).append(block)
        return [*shared.values()]
    c, blocks = config, []
    for prefix in prefixes:
        number = int(prefix.split("/layers_")[1].split("/")[0])
        rotary = c.rotary_dim if not c.rotary_layers or c.rotary_layers[number] else 0
        free = np.arange(c.head_dim if c.qk_norm == "head" else rotary, c.head_dim)
        groups = c.num_key_value_heads
        queries = c.num_attention_heads // groups
        vectors = [f"{name}_bias" for name in ("query", "key", "value")] * c.qkv_bias
        vectors += [*_FEATURE_NORMS] * (c.qk_norm == "whole")
        blocks.append([_Attention(prefix, groups, queries, c.head_dim, free, (*vectors,))])
    return blocks


def align_params(
    config: models.Config,
    reference: Params,
    expert: Params,
    products: Mapping[str, np.ndarray] | None = None,
) -> tuple[Params, Alignment]:
    """Returns an expert with its units where the reference's are that match them best.

    Weight matching ends where a sweep moves nothing, or after MOST_SWEEPS. Groups are gone through
    in one order, where the paper draws it, so that the same models give the same result. Experts of
    a mixture are matched by the router alone.

    Args:
        config: Of both.
        reference: Nested dict of arrays.
        expert: The same; it is not changed.
        products: By kernel, sum of x_reference x_expert^T over tokens of its inputs, [d_in, d_in],
            as `training.statistics.cross_products` gives them: units are assigned by these, once.
            None: by weights.
    """
    ours, theirs = (
        {name: np.asarray(array) for name, array in checkpoints.flatten(params).items()}
        for params in (reference, expert)
    )
    matcher = _Matcher(config, ours, dict(theirs), products)
    results = [(matcher.run(), matcher)]
    if products is None:
        # Of models of other origins, the inner products of layers whose inputs are in another order
        # say nothing; of two results the nearer one counts.
        anchored = _Matcher(config, ours, dict(theirs))
        if anchored.match_anchors():
            results.append((anchored.run(), anchored))
    distances = [_distance(ours, each.expert) for _, each in results]
    best = int(np.argmin(distances))
    sweeps, matcher = results[best]
    alignment = Alignment(
        matcher.moved, dict(matcher.units), sweeps, (_distance(ours, theirs), distances[best])
    )
    return checkpoints.unflatten(matcher.expert), alignment


def _distance(ours: Arrays, theirs: Arrays) -> float:
    squares = (
        np.square(array.astype(np.float32) - theirs[name].astype(np.float32), dtype=np.float64)
        for name, array in ours.items()
    )
    return float(np.sqrt(sum(float(each.sum()) for each in squares)))


def open_pair(
    reference: PathLike, expert: PathLike
) -> tuple[models.Config, list[Checkpoint], list[Params]]:
    """Reads a reference and an expert of one network: its configuration, both, their parameters.

    Raises:
        MergeError: They do not fit each other, or do not say which model they are of.
        CheckpointError: One is missing or damaged.
    """
    paths = [storage.path(path).absolute() for path in (reference, expert)]
    opened = [opening.open(path) for path in paths]
    inputs.check_alike(opened)
    if not opened[0].model:
        raise MergeError(
            f"{paths[0]}: it does not say which model it is of, and so not what may be exchanged"
        )
    config = models.from_dict(opened[0].model)
    trees = [
        checkpoints.unflatten({n: opening.read_checked(t) for n, t in each.parameters.items()})
        for each in opened
    ]
    return config, opened, trees


def align(
    expert: PathLike,
    reference: PathLike,
    out: PathLike,
    *,
    products: Mapping[str, np.ndarray] | None = None,
    matching: Json = "weights",
    vocabulary: Mapping[str, Json] | None = None,
) -> tuple[Manifest, Alignment | None]:
    """Writes an expert with its units where the reference's are that match them best.

    Both are in memory, and the largest parameter a few times in float32.

    Args:
        expert: The expert, of any format.
        reference: The base, or the expert that others are to be near to.
        out: The checkpoint to make, of m2l's; must not exist, unless the same call made it.
        products: As for `align_params`.
        matching: How units are matched, as it is recorded: "weights", or what the products are of.
        vocabulary: The expert's, where it is not a checkpoint of m2l's.

    Returns:
        The manifest, and what came of it; None where it was there.

    Raises:
        MergeError: The models do not fit each other.
        CheckpointError: One is missing or damaged; `out` exists.
    """
    config, opened, trees = open_pair(reference, expert)
    inputs.check_destination(out, [path for each in opened for path in each.paths])
    key = checksum(["align", *(each.digest for each in opened), matching])
    same = existing_result(out, lambda manifest: manifest.made_by.get(KEY) == key)
    if same is not None:
        return same, None
    aligned, alignment = align_params(config, *trees, products)
    parents = tuple(
        {"role": role, "path": str(each.path), "digest": each.digest}
        for role, each in zip(("reference", "expert"), opened, strict=True)
    )
    unknown = {"name": None, "size": None, "fingerprint": None}
    manifest = checkpoints.save(
        storage.path(out),
        jax.tree.map(np.asarray, aligned),
        model=opened[1].model,
        vocabulary=opened[1].vocabulary or vocabulary or unknown,
        made_by={
            "kind": "align",
            "matching": matching,
            "moved": dict(alignment.moved),
            "sweeps": alignment.sweeps,
            KEY: key,
        },
        parents=parents,
    )
    return manifest, alignment
