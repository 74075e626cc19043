"""Merges checkpoints of any size: blocks stream in, through one compiled kernel, and out."""

import concurrent.futures
import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints
from m2l.checkpoints import Manifest, Parameter
from m2l.errors import MergeError
from m2l.merging import compatibility, kernel, randomness
from m2l.merging.methods import METHODS, add
from m2l.merging.recipe import Recipe
from m2l.merging.statistics import Trimming, trimmings
from m2l.progress import Progress

# Elements; large enough to make dispatch cheap, small enough for nine models' blocks to be cached.
_BLOCK = 1 << 20

Block = tuple[str, int, list[np.ndarray]]  # parameter, index of its first element, one per source


def merge(
    base: str | os.PathLike | None,
    experts: Sequence[str | os.PathLike],
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    progress: bool = True,
) -> Manifest:
    """Merges checkpoints into a new one, in memory that does not grow with the model.

    Equal inputs give equal parameters to the last bit, and so an equal digest. Every byte read is
    checked against the digests in the inputs' manifests.

    Args:
        base: The checkpoint (or training run) that the experts were trained from. Methods that do
            not need it take from it what is not merged; None then means the first expert.
        experts: Checkpoints or training runs, in the order in which sums run.
        recipe: How to merge.
        out: The checkpoint to make; must not exist.
        progress: Whether to show a progress bar.

    Returns:
        The manifest of `out`: its parents with their digests, the recipe, and the share of each
        expert's entries that trimming kept in fact.

    Raises:
        MergeError: The checkpoints do not fit each other or the recipe, or hold NaN or infinity.
        CheckpointError: One is missing or damaged, or its tokenizer is missing; `out` exists, or
            the disk is full.
    """
    paths = [checkpoints.resolve(path) for path in experts]
    base_path = None if base is None else checkpoints.resolve(base)
    compatibility.check_sources(base_path, paths, recipe)
    reference = paths[0] if base_path is None else base_path
    compatibility.check_destination(out, [reference, *paths])
    manifests = {path: checkpoints.read_manifest(path) for path in (reference, *paths)}
    compatibility.check_alike(list(manifests.items()))

    first = manifests[reference]
    # As the experts read it: the base may have been trained without their chat template.
    vocabulary = manifests[paths[0]].vocabulary
    checkpoints.check_tokenizer(vocabulary)
    dtypes = {name: record["dtype"] for name, record in first.parameters.items()}
    names = compatibility.merged_names(dtypes, recipe.exclude)
    copied = [name for name in dtypes if name not in set(names)]
    needs_base = METHODS[recipe.method].needs_base
    sources = ([reference] if needs_base else []) + paths
    compatibility.warn_of_repetition([(path, manifests[path]) for path in sources])

    work = _Work(recipe, sources, names)
    shown = Progress(f"merging {len(paths)} experts", work.total, "parameters")
    described = {
        name: (
            record["shape"],
            recipe.dtype if compatibility.is_float(dtypes[name]) else dtypes[name],
        )
        for name, record in first.parameters.items()
    }
    with shown if progress else contextlib.nullcontext() as bar:
        work.bar = bar
        thresholds, densities = work.trim()
        with checkpoints.writing(out, described) as writer:
            for name, block in work.merged(thresholds):
                writer.append(name, block)
            for name, block in _copied(reference, copied, recipe.dtype):
                writer.append(name, block)
            parents = [(reference, "base")] if needs_base or (copied and base is not None) else []
            parents += [(path, "expert") for path in paths]
            return writer.finish(
                model=first.model,
                vocabulary=vocabulary,
                made_by={"kind": "merge", "recipe": recipe.to_dict()} | densities,
                parents=tuple(
                    {"role": role, "path": str(path), "digest": manifests[path].digest}
                    for path, role in parents
                ),
            )


@functools.cache
def _compiled(name: str, drop_rate: float | None, dtype: str) -> tuple[Callable, Callable]:
    """The two passes over a block: its merge, and the bits of its magnitudes.

    Both return too whether all numbers are finite. They are compiled once for a number of experts
    and a block size: scales, weights, thresholds and keys are arguments.
    """
    method = METHODS[name]

    def merge_block(
        base: jax.Array | None, experts: list[jax.Array], given: dict[str, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        block = kernel.merged(method, base, experts, drop_rate=drop_rate, **given).astype(dtype)
        return block, _all_finite([block, *experts] if base is None else [block, base, *experts])

    def magnitude_bits(
        base: jax.Array, experts: list[jax.Array], given: dict[str, jax.Array | None]
    ) -> tuple[list[jax.Array], jax.Array]:
        found = kernel.magnitudes(method, base, experts, drop_rate=drop_rate, **given)
        bits = [jax.lax.bitcast_convert_type(array, jnp.uint32) for array in found]
        return bits, _all_finite([base, *experts])

    return jax.jit(merge_block), jax.jit(magnitude_bits)


def _all_finite(arrays: Sequence[jax.Array]) -> jax.Array:
    # One sum instead of a test each: it is False for finite numbers only where they overflow.
    return jnp.isfinite(add([array.astype(jnp.float32) for array in arrays])).all()


class _Work:
    """One merge: its open sources, and the passes over them."""

    def __init__(self, recipe: Recipe, paths: Sequence[Path], names: Sequence[str]):
        self.recipe, self.method = recipe, METHODS[recipe.method]
        self.bar: Progress | None = None
        self._paths, self._names = paths, names
        self._sources = [checkpoints.open_parameters(path) for path in paths]
        sizes = [self._sources[0][name].size for name in names]
        self._experts = len(paths) - self.method.needs_base
        self._block = min(_BLOCK, max(sizes))
        self._size, self._done = sum(sizes), 0
        self._trims = self.method.trims and recipe.density < 1
        self._merge_block, self._magnitude_bits = _compiled(
            recipe.method, recipe.drop_rate, recipe.dtype
        )
        self.total = self._size * (3 if self._trims else 1)

    def trim(self) -> tuple[dict[str, np.ndarray | None], dict[str, list[float]]]:
        """Finds each parameter's thresholds, float32 [experts], and the realised densities."""
        if not self.method.trims:
            return dict.fromkeys(self._names), {}
        if not self._trims:
            return dict.fromkeys(self._names, np.zeros(self._experts, np.float32)), {}
        together = [self._names] if self.recipe.scope == "model" else [[n] for n in self._names]
        thresholds: dict[str, np.ndarray] = {}
        found: list[list[Trimming]] = []
        for names in together:
            read = functools.partial(self._magnitudes, names)
            group = trimmings(read, self._experts, [self.recipe.density])
            found.append([trimming for (trimming,) in group])
            limits = np.array([trimming.threshold for trimming in found[-1]], np.float32)
            thresholds |= dict.fromkeys(names, limits)
        kept = [sum(trimming.kept for trimming in expert) for expert in zip(*found, strict=True)]
        return thresholds, {"density": [count / self._size for count in kept]}

    def merged(self, thresholds: dict[str, np.ndarray | None]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the merged blocks of every parameter, in order."""
        recipe = self.recipe
        settings = {
            "scale": None if recipe.scale is None else np.float32(recipe.scale),
            "weights": recipe.weights_for(self._experts),
        }
        for name, start, arrays in self._read(self._names):
            given = settings | self._drawing(name, start) | {"thresholds": thresholds[name]}
            block, finite = self._merge_block(*self._padded(arrays), given)
            block = np.asarray(block)[: arrays[0].size]
            if not finite:
                self._refuse(name, start, arrays, block)
            yield name, block
            self._advance(block.size)

    def _magnitudes(self, names: Sequence[str]) -> Iterator[list[np.ndarray]]:
        for name, start, arrays in self._read(names):
            given = self._drawing(name, start)
            bits, finite = self._magnitude_bits(*self._padded(arrays), given)
            if not finite:
                self._refuse(name, start, arrays, arrays[0])
            yield [np.asarray(array)[: arrays[0].size] for array in bits]
            self._advance(arrays[0].size)

    def _read(self, names: Sequence[str]) -> Iterator[Block]:
        return _verified(_blocks(self._sources, names, self._block), self._sources)

    def _drawing(self, name: str, start: int) -> dict[str, np.ndarray | None]:
        draws = self.method.draws
        keys = randomness.keys(self.recipe.seed, self._experts, name) if draws else None
        return {"keys": keys, "offset": kernel.split(start)}

    def _padded(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray | None, list[np.ndarray]]:
        # Every block has one size, so that one compilation serves the whole model.
        missing = self._block - arrays[0].size
        padded = [np.pad(array, (0, missing)) if missing else array for array in arrays]
        return (padded[0], padded[1:]) if self.method.needs_base else (None, padded)

    def _refuse(
        self, name: str, start: int, arrays: Sequence[np.ndarray], block: np.ndarray
    ) -> None:
        for path, array in zip(self._paths, arrays, strict=True):
            _refuse_nonfinite(path, name, start, array)
        for index in np.flatnonzero(~np.isfinite(block.astype(np.float32)))[:1]:
            raise MergeError(
                f"the merged {name}[{start + index}] is {block[index]}: too large for "
                f"{self.recipe.dtype}; lower the scale"
            )

    def _advance(self, elements: int) -> None:
        self._done += elements
        if self.bar is not None:
            self.bar.update(self._done)


def _refuse_nonfinite(path: Path, name: str, start: int, array: np.ndarray) -> None:
    for index in np.flatnonzero(~np.isfinite(array.astype(np.float32)))[:1]:
        raise MergeError(
            f"{path}: {name}[{start + index}] (row-major) is {array[index]}: only finite numbers "
            "can be merged; use a checkpoint from before the training run diverged, or it is "
            "damaged: m2l inspect --verify"
        )


def _copied(source: Path, names: Sequence[str], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the blocks of parameters that are not merged, real numbers in the result's dtype."""
    opened = [checkpoints.open_parameters(source)]
    for name, start, (block,) in _verified(_blocks(opened, names, _BLOCK), opened):
        if compatibility.is_float(block.dtype.name):
            _refuse_nonfinite(source, name, start, block)
            block = block.astype(dtype)
        yield name, block


def _blocks(
    sources: Sequence[dict[str, Parameter]], names: Sequence[str], size: int
) -> Iterator[Block]:
    """Reads parameters block by block, each block while the one before it is worked on."""
    ahead: tuple[str, int, list[Callable[[], np.ndarray]]] | None = None
    for name in names:
        length = sources[0][name].size
        for start in range(0, length, size):
            stop = min(start + size, length)
            current = ahead
            ahead = name, start, [source[name].start(start, stop) for source in sources]
            if current is not None:
                yield current[0], current[1], [finish() for finish in current[2]]
    if ahead is not None:
        yield ahead[0], ahead[1], [finish() for finish in ahead[2]]


def _verified(blocks: Iterator[Block], sources: Sequence[dict[str, Parameter]]) -> Iterator[Block]:
    """Passes blocks on, and compares each parameter's digest with its manifest's at its end."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, start, arrays in blocks:
            if start == 0:
                digests = [hashlib.sha256() for _ in sources]
            pairs = zip(digests, arrays, strict=True)
            under_way = [
                pool.submit(digest.update, array.view(np.uint8)) for digest, array in pairs
            ]
            yield name, start, arrays
            concurrent.futures.wait(under_way)
            if start + arrays[0].size == sources[0][name].size:
                for source, digest in zip(sources, digests, strict=True):
                    source[name].check(digest.hexdigest())
