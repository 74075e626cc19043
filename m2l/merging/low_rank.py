"""Adapters of low rank, made of what differs between a model and its base.

The truncated singular value decomposition is the nearest matrix of a rank in the Frobenius norm
(Eckart & Young 1936, doi:10.1007/BF02288367). Of large matrices it is found in a random subspace
(Halko, Martinsson & Tropp 2011, doi:10.1137/090771806); the error that is reported is that of what
is written, whichever way it was found.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints, signals, storage
from m2l.checkpoints import Manifest, adapters, huggingface_directory
from m2l.checkpoints.importing import float_dtype
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.reading import KEY, existing_result
from m2l.checkpoints.spans import Span, TensorReader, read_whole, transposed_reader
from m2l.checkpoints.tensor_kinds import CONV1D, EMBEDDING, is_buffer, is_float
from m2l.errors import MergeError
from m2l.files import checksum
from m2l.merging import inputs
from m2l.merging.engine import merge
from m2l.merging.job import prepare
from m2l.merging.recipe import Recipe
from m2l.progress import Progress
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, JsonObject

_EXACT = 1024
"""Of matrices with a side up to this the whole decomposition is computed."""

_POWERS, _MORE = 4, 16


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """The factors of a difference, B [out, r] and A [r, in], and how far they are from it."""

    up: np.ndarray
    down: np.ndarray
    squared: float
    squared_error: float

    @property
    def error(self) -> float:
        return math.sqrt(self.squared_error / self.squared)


def extract(
    model: PathLike,
    base: PathLike,
    out: PathLike,
    *,
    rank: int | None = None,
    error: float | None = None,
    exclude: Sequence[str] = (),
    dtype: str = "float32",
) -> Manifest:
    """Makes an adapter in PEFT's format of the difference of two models, matrix by matrix.

    What is no matrix and differs is stored whole, as are matrices whose factors would be larger.
    Memory: a few times the largest matrix in float32, and the factors.

    Args:
        model: What the base and the adapter are to make.
        base: The base.
        out: The directory to make; must not exist, unless the same call made it.
        rank: Of the factors of every matrix.
        error: Instead of a rank: the most that a difference is missed by, as a share of its
            Frobenius norm; each matrix gets the least rank for it.
        exclude: Patterns of Hugging Face's names of tensors that stay the base's.
        dtype: Of the factors.

    Returns:
        The manifest, whose made_by has the rank and the relative error of each matrix, and the
        error of all together.

    Raises:
        MergeError: Neither or both of rank and error; the models do not fit each other, or do not
            differ; something differs that no adapter can hold.
        CheckpointError: One is missing or damaged; `out` exists.
    """
    options = _options(rank, error, exclude, dtype)
    paths = [storage.path(path).absolute() for path in (base, model)]
    opened, _ = inputs.open_all(paths, None)
    inputs.check_destination(out, [path for each in opened for path in each.paths])
    key = checksum([[each.digest for each in opened], options])
    if (same := _existing(out, key)) is not None:
        return same
    inputs.check_alike(opened)
    parents = tuple(
        {"role": role, "path": str(each.path), "digest": each.digest}
        for role, each in zip(("base", "model"), opened, strict=True)
    )
    made_by = {"kind": "extract", **options, KEY: key}
    return _write(storage.path(out).absolute(), *opened, options, made_by, parents)


def merge_into_adapter(
    base: PathLike,
    experts: Sequence[PathLike],
    recipe: Recipe,
    out: PathLike,
    *,
    rank: int | None = None,
    error: float | None = None,
    **merging: Json,
) -> Manifest | None:
    """Merges experts of a base, and makes an adapter of how far the merge is from the base.

    The merge itself is streamed to a directory next to `out`, in float32, and removed at the end.

    Args:
        base: The base.
        experts: The experts.
        recipe: How to merge; its dtype is that of the factors.
        out, rank, error: As `extract` takes them.
        merging: Options of `merge`.

    Returns:
        As `extract` does; None in processes other than the first.

    Raises:
        MergeError: The recipe changes the vocabulary or the layers.
        M2LError: As `merge` and `extract` say.
    """
    if recipe.tokenizer is not None or merging.get("slices") is not None:
        raise MergeError(
            "an adapter is put on its base as that is: a merge by another tokenizer or of slices "
            "makes a model"
        )
    options = _options(rank, error, (), recipe.dtype)
    recipe = dataclasses.replace(recipe, dtype="float32")
    out = storage.path(out).absolute()
    progress = merging.pop("progress", True)
    job = prepare(base, experts, recipe, out, **merging)
    key = checksum([job.identity, options])
    if (same := _existing(out, key)) is not None:
        return same
    between = out.with_name(f".{out.name}.merged-{job.key[:16]}")
    merged = merge(base, experts, recipe, between, progress=progress, **merging)
    if merged is None:
        return None
    opened, _ = inputs.open_all([storage.path(base).absolute(), between], None)
    made_by = {"kind": "merge", **merged.made_by, **options, KEY: key}
    result = _write(out, *opened, options, made_by, merged.parents)
    checkpoints.remove(between)
    return result


def _options(
    rank: int | None, error: float | None, exclude: Sequence[str], dtype: str
) -> JsonObject:
    if (rank is None) == (error is None):
        raise MergeError("an adapter needs either a rank or an error: give one of the two")
    if rank is not None and rank < 1:
        raise MergeError(f"a rank of {rank}: expected 1 or more")
    if error is not None and not 0 < error < 1:
        raise MergeError(f"an error of {error}: expected a share of the difference, in (0, 1)")
    return {"rank": rank, "error": error, "exclude": [*exclude], "dtype": float_dtype(dtype).name}


def _existing(out: PathLike, key: str) -> Manifest | None:
    return existing_result(
        out, lambda manifest: manifest.made_by.get(KEY) == key, huggingface_directory.MANIFEST
    )


def _write(
    out: AnyPath,
    base: Checkpoint,
    model: Checkpoint,
    options: Mapping[str, Json],
    made_by: JsonObject,
    parents: tuple[Mapping[str, str], ...],
) -> Manifest:
    """Computes the factors and writes the adapter's directory."""
    names, tied = base.tensor_names
    covered = {name for name, _ in names.values()} | set(base.copies)
    for name in base.parameters:
        if name in covered or any(fnmatch.fnmatchcase(name, p) for p in options["exclude"]):
            continue
        stored = base.parameters[name]
        if is_float(stored.dtype) and _difference(base, model, name, False).any():
            raise MergeError(
                f"{model.path}: {name} differs from {base.path}, and Hugging Face's models hold it "
                "as a part of a tensor, or in several: convert both by m2l convert first"
            )
    conv1d = base.model.get("model_type") in CONV1D
    matrices: dict[str, _Matrix] = {}
    whole: dict[str, TensorReader] = {}
    with Progress("differences", len(names), "tensors") as progress:
        for done, (theirs, (name, transposed)) in enumerate(names.items(), 1):
            if name in base.copies and name in model.copies:
                continue  # The embedding once more.
            stored = model.parameters[name]
            excluded = any(fnmatch.fnmatchcase(theirs, p) for p in options["exclude"])
            if is_float(stored.dtype) and not excluded and not is_buffer(theirs, stored):
                is_matrix = len(stored.shape) == 2 and theirs.endswith(".weight")
                flipped = transposed != (conv1d and not EMBEDDING.fullmatch(theirs))
                difference = _difference(base, model, name, flipped and is_matrix)
                if not difference.any():
                    continue
                matrix = None
                if is_matrix and name not in tied:
                    matrix = _factorized(difference, options, bool(EMBEDDING.fullmatch(theirs)))
                if matrix is not None:
                    matrices[theirs] = matrix
                else:
                    _check_whole(model, base, theirs, name in tied)
                    whole[theirs] = (
                        transposed_reader(stored) if transposed and is_matrix else stored
                    )
            progress.update(done)
            signals.check()
    if not matrices and not whole:
        raise MergeError(
            f"{model.path} does not differ from {base.path}: there is nothing to adapt"
        )
    return _save(out, base, matrices, whole, conv1d, options, made_by, parents)


def _difference(base: Checkpoint, model: Checkpoint, name: str, transposed: bool) -> np.ndarray:
    """Returns the float32 difference of a parameter, of Hugging Face's shape."""
    span = Span(name, 0, base.parameters[name].size)
    inputs.refuse_nonfinite([base, model], span)
    theta = [read_whole(each.parameters[name]).astype(np.float32) for each in (base, model)]
    difference = np.subtract(theta[1], theta[0], out=theta[1])
    return np.ascontiguousarray(difference.T) if transposed else difference


def _check_whole(model: Checkpoint, base: Checkpoint, theirs: str, tied: bool) -> None:
    """Refuses what differs and that no adapter in PEFT's format holds."""
    problem = None
    if not theirs.endswith((".weight", ".bias")):
        problem = "is no module's weight or bias"
    elif tied and not theirs.endswith("embed_tokens.weight"):
        problem = "is embedding and output in one"
    if problem is not None:
        raise MergeError(
            f"{model.path}: {theirs} differs from {base.path}, and {problem}, which PEFT's format "
            f"cannot hold; --exclude {theirs!r} leaves it as it is in the base"
        )


def _factorized(
    difference: np.ndarray, options: Mapping[str, Json], embedding: bool
) -> _Matrix | None:
    """Returns the factors of a matrix; None where they are no smaller than itself."""
    left, sizes, right = decompose(difference, options["rank"], options["error"])
    rank = options["rank"] or len(sizes)
    if rank * sum(difference.shape) >= difference.size:
        return None
    # Both factors alike, so that neither loses more where they are rounded.
    roots = np.sqrt(sizes)
    dtype = np.dtype(jnp.dtype(options["dtype"]))
    up, down = (left * roots).astype(dtype), (roots[:, None] * right).astype(dtype)
    missing = rank - len(sizes)
    up, down = np.pad(up, ((0, 0), (0, missing))), np.pad(down, ((0, missing), (0, 0)))
    missed = _missed(difference, up.astype(np.float32), down.astype(np.float32))
    if embedding:  # PEFT's are those of the transpose.
        up, down = np.ascontiguousarray(down.T), np.ascontiguousarray(up.T)
    matrix = _Matrix(up, down, _squared(difference), float(missed))
    # Rounding of the factors comes on top; more of them cannot take it away.
    if options["error"] is not None and matrix.error > max(options["error"], 1e-6) * 1.01:
        raise MergeError(
            f"factors in {options['dtype']} miss {matrix.error:.3g} of a difference, more than the "
            f"error {options['error']:g}: ask for another --dtype or error"
        )
    return matrix


def _squared(matrix: np.ndarray) -> float:
    """Returns the squared Frobenius norm, summed in float64."""
    return float(np.sum(np.square(matrix, dtype=np.float64)))


@jax.jit
def _missed(difference: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Returns the squared Frobenius norm of what the factors miss."""
    return jnp.sum(jnp.square(difference - jnp.dot(up, down, precision="highest")))


def decompose(
    matrix: np.ndarray, rank: int | None, error: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the singular value decomposition of a matrix, cut at a rank or an error.

    Args:
        matrix: float32 [m, n].
        rank: The most values.
        error: Instead: as many values as are needed so that the rest's Frobenius norm is at most
            this share of the matrix's.

    Returns:
        U [m, r], s [r], V^T [r, n]; without values that are 0.
    """
    most = min(matrix.shape)
    squared = _squared(matrix)
    tried = most if most <= _EXACT else min(most, (rank or 32) + _MORE)
    while True:
        if tried == most:
            left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
        else:
            left, sizes, right = map(np.asarray, _in_subspace(matrix, tried))
        rests = squared - np.cumsum(np.square(sizes, dtype=np.float64))
        needed = rank or int(np.searchsorted(-rests, -squared * error**2)) + 1
        if needed <= len(sizes) - (tried < most and error is not None) * _MORE or tried == most:
            break
        tried = min(most, 2 * tried)
    nonzero = int(np.count_nonzero(sizes > sizes[0] * np.finfo(np.float32).eps))
    cut = max(1, min(needed, nonzero))
    return left[:, :cut], sizes[:cut], right[:cut]


@functools.partial(jax.jit, static_argnums=1)
def _in_subspace(matrix: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the decomposition of a matrix's part in the subspace of its largest values."""
    product = functools.partial(jnp.dot, precision="highest")
    draws = jax.random.normal(jax.random.key(0), (matrix.shape[1], size), jnp.float32)
    basis = jnp.linalg.qr(product(matrix, draws))[0]
    for _ in range(_POWERS):
        basis = jnp.linalg.qr(product(matrix.T, basis))[0]
        basis = jnp.linalg.qr(product(matrix, basis))[0]
    left, sizes, right = jnp.linalg.svd(product(basis.T, matrix), full_matrices=False)
    return product(basis, left), sizes, right


def _save(
    out: AnyPath,
    base: Checkpoint,
    matrices: Mapping[str, _Matrix],
    whole: Mapping[str, TensorReader],
    conv1d: bool,
    options: Mapping[str, Json],
    made_by: JsonObject,
    parents: tuple[Mapping[str, str], ...],
) -> Manifest:
    """Writes the adapter's directory."""
    arrays: dict[str, np.ndarray | TensorReader] = {}
    for name, matrix in matrices.items():
        module = adapters.PREFIX + name.removesuffix(".weight")
        kind = "lora_embedding_{}" if EMBEDDING.fullmatch(name) else "lora_{}.weight"
        arrays[f"{module}.{kind.format('A')}"] = matrix.down
        arrays[f"{module}.{kind.format('B')}"] = matrix.up
    modules = {name.removesuffix(".weight") for name in matrices}
    for name, stored in whole.items():
        module, _, part = name.rpartition(".")
        inside = ".base_layer" if part == "bias" and module in modules else ""
        arrays[f"{adapters.PREFIX}{module}{inside}.{part}"] = stored
    ranks = {name.removesuffix(".weight"): len(m.down) for name, m in matrices.items()}
    saved = [name.removesuffix(".weight") for name in whole if name.endswith(".weight")]
    fields = adapters.fields(ranks, ranks, saved=saved, base=str(base.path))
    fields |= {"fan_in_fan_out": conv1d}
    fields |= {"bias": "all" if any(name.endswith(".bias") for name in whole) else "none"}
    names, tied = base.tensor_names
    for name in whole:
        if names[name][0] in tied:
            fields["ensure_weight_tying"] = True
            arrays[adapters.PREFIX + adapters.OUTPUT] = whole[name]
    squared = sum(matrix.squared for matrix in matrices.values())
    missed = sum(matrix.squared_error for matrix in matrices.values())
    made_by |= {
        "matrices": {
            name: {"rank": len(matrix.down), "error": float(f"{matrix.error:.6g}")}
            for name, matrix in matrices.items()
        },
        "stored_whole": [*whole],
        "total_error": float(f"{math.sqrt(missed / squared) if squared else 0.0:.6g}"),
    }
    return adapters.write(out, fields, arrays, made_by=made_by, parents=parents)
