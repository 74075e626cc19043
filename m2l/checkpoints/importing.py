"""Imports tensors of any format into a checkpoint: checked first, then streamed."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from m2l import models, signals
from m2l.checkpoints.manifest import Manifest, check_vocabulary
from m2l.checkpoints.pytrees import flatten
from m2l.checkpoints.reading import KEY, existing_result
from m2l.checkpoints.safetensors import StoredTensor
from m2l.checkpoints.saving import writing
from m2l.checkpoints.spans import FLOATS, WORKERS, blocks, in_parallel
from m2l.errors import CheckpointError, UnknownNameError
from m2l.files import checksum, directory_digest
from m2l.progress import Progress
from m2l.typing import Json


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in another format; `read` returns it whole, and is called once, in any thread."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from in a checkpoint of another format.

    Attributes:
        tensor: The tensor's name there.
        transposed: Whether its axes are in the reverse order.
        axis: The axis along which the tensor stacks the parameters of several layers; None if it
            is one parameter. The slice is taken first, then transposed.
        index: Which slice of that axis.
        rows: Which rows of the tensor, first and end, where it joins several parameters; None if
            it is one. They are taken first, then transposed.
        stacked: The tensors that are the parameter's parts along its first axis, `tensor` the first
            of them; empty if it is one tensor. Each is transposed by itself.
    """

    tensor: str
    transposed: bool = False
    axis: int | None = None
    index: int = 0
    rows: tuple[int, int] | None = None
    stacked: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that it comes from."""
        return self.stacked or (self.tensor,)

    @property
    def is_stored(self) -> bool:
        """Whether the tensor is the parameter as it is, or transposed."""
        return self.axis is None and self.rows is None and not self.stacked

    def take(self, array: np.ndarray) -> np.ndarray:
        """Returns the parameter, or the part of it that a tensor is, as a view of its array."""
        if self.axis is not None:
            array = array[(slice(None),) * self.axis + (self.index,)]
        if self.rows is not None:
            array = array[slice(*self.rows)]
        return array.T if self.transposed else array

    def read(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Returns the parameter; `read` returns a tensor by its name."""
        if not self.stacked:
            return self.take(read(self.tensor))
        return np.stack([self.take(read(tensor)) for tensor in self.stacked])

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the parameter's shape, of that of its first tensor."""
        shape = self.take(np.broadcast_to(np.int8(0), stored)).shape
        return (len(self.stacked), *shape) if self.stacked else shape


def import_tensors(
    out: str | Path,
    config: models.Config,
    tensors: Mapping[str, Tensor],
    origins: Mapping[str, Origin],
    *,
    source: Path,
    vocabulary: Mapping[str, Json],
    made_by: Mapping[str, Json],
    ignored: Collection[str] = (),
    dtype: str | None = None,
    at_once: int = WORKERS,
) -> Manifest:
    """Makes a checkpoint, reading each tensor once, and a few at a time.

    Peak memory: `at_once` tensors and 0.5 GiB. NaN and infinity are preserved.

    Args:
        out: The checkpoint to make; must not exist.
        config: The model that the tensors are of.
        tensors: Name -> tensor, all that the source holds.
        origins: m2l's name of a parameter -> where it comes from, for every parameter.
        source: The checkpoint that the tensors are of, for messages.
        vocabulary: {"name", "size", "fingerprint"} of the one the model was trained with.
        made_by: What made it, as JSON-like data.
        ignored: Names of tensors that are not needed.
        dtype: One of FLOATS, for all parameters; None keeps each tensor's.
        at_once: How many tensors are in memory at a time.

    Raises:
        CheckpointError: Before anything is read or written: a tensor is missing, has another
            shape, is no float, is mapped twice or not at all; the vocabulary has more ids than
            the model's embedding rows; or `out` exists. Then: a tensor
            cannot be read, or a value is too large for `dtype`.
        UnknownNameError: There is no such dtype.
    """
    content = {
        "source": directory_digest(source),
        "made_by": made_by,
        "model": models.to_dict(config),
        "vocabulary": vocabulary,
        "dtype": dtype if dtype is None else float_dtype(dtype).name,
    }
    made_by = {**made_by, KEY: checksum(content)}
    same = existing_result(out, lambda manifest: manifest.made_by.get(KEY) == made_by[KEY])
    if same is not None:
        return same
    check_vocabulary(vocabulary, config.vocab_size, source)
    shapes = parameter_shapes(config)
    check_origins(shapes, tensors, origins, source=source, ignored=ignored)
    cast = None if dtype is None else float_dtype(dtype)
    described = {
        name: (shape, cast or tensors[origins[name].tensor].dtype) for name, shape in shapes.items()
    }
    names_by_tensors: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in shapes:
        names_by_tensors[origins[name].tensors].append(name)
    # The largest first, or a thread would be left alone with one at the end.
    largest_first = sorted(
        names_by_tensors,
        key=lambda sources: -sum(math.prod(tensors[tensor].shape) for tensor in sources),
    )
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values())
    done = 0
    with (
        writing(out, described) as writer,
        Progress(f"import {source.name}", total, "MB", scale=10**6) as progress,
    ):

        def convert(sources: tuple[str, ...]) -> int:
            nbytes = 0
            for tensor in sources:
                array = tensors[tensor].read()
                for name in names_by_tensors[sources]:
                    view, cast_to = origins[name].take(array), described[name][1]
                    for block in blocks(view, cast_to, f"{source}: {name}"):
                        writer.append(name, block)
                        nbytes += block.nbytes
            return nbytes

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress.update(done)
            signals.check()

        in_parallel(convert, largest_first, advance, at_once)
        return writer.finish(model=models.to_dict(config), vocabulary=vocabulary, made_by=made_by)


def parameter_shapes(config: models.Config) -> dict[str, tuple[int, ...]]:
    """Returns m2l's name of each parameter -> its shape, as `models.spec` has it.

    The layers of a stack are alike, and only one is traced: `models.spec` takes as long for thirty
    as copying them takes.
    """
    if isinstance(config, models.T5Config):
        layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
        short = dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1)
    else:
        layers = {"decoder": config.num_hidden_layers}
        per_layer = {n: getattr(config, n)[:1] for n in ("windows", "rotary_layers")}
        short = dataclasses.replace(config, num_hidden_layers=1, **per_layer)
    shapes = {}
    for name, spec in flatten(models.spec(short)).items():
        stack, _, part = name.partition("/layers_00/")
        names = [f"{stack}/layers_{i:02}/{part}" for i in range(layers[stack])] if part else [name]
        shapes |= dict.fromkeys(names, spec.shape)
    return dict(sorted(shapes.items(), key=lambda item: item[0].split("/")))


def float_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype that parameters are to have on disk.

    Raises:
        UnknownNameError: It is none of FLOATS.
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in FLOATS:
        raise UnknownNameError("dtype", name, FLOATS)
    return np.dtype(jnp.dtype(name))


def check_origins(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor | StoredTensor],
    origins: Mapping[str, Origin],
    *,
    source: Path,
    ignored: Collection[str] = (),
) -> None:
    """Refuses tensors that are not exactly what a model's parameters come from; reads none.

    Args:
        shapes: m2l's name of a parameter -> its shape.
        tensors: Name -> tensor, all that the source holds.
        origins: m2l's name of a parameter -> where it comes from.
        source: The checkpoint, for messages.
        ignored: Names of tensors that are not needed.

    Raises:
        CheckpointError: Naming up to three that do not fit, and how many more there are.
    """

    def refuse(problems: list[str], remedy: str) -> None:
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(f"{source}: {'; '.join(problems[:3])}{more}: {remedy}")

    wrong_model = "its tensors are not those of the model that its configuration describes"
    refuse([f"no tensor for {name}" for name in shapes if name not in origins], wrong_model)
    refuse([f"the model has no {name}" for name in origins if name not in shapes], wrong_model)
    wanted = dict.fromkeys(tensor for origin in origins.values() for tensor in origin.tensors)
    refuse([f"missing key {name}" for name in wanted if name not in tensors], wrong_model)
    unused = [name for name in tensors if name not in wanted and name not in ignored]
    refuse([f"unexpected key {name}" for name in unused], wrong_model)
    dtypes = {name: tensors[name].dtype.name for name in wanted}
    other_dtypes = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]
    refuse(other_dtypes, f"expected one of {', '.join(FLOATS)}; quantised weights are not read")
    misshapen = []
    slices: dict[str, dict[tuple[int | None, int, tuple[int, int] | None], str]] = defaultdict(dict)
    for name, origin in origins.items():
        shape = shapes[name][1:] if origin.stacked else shapes[name]
        wide = shape[::-1] if origin.transposed else shape
        for tensor in origin.tensors:
            stored = tensors[tensor].shape
            fits = stored == wide
            if origin.axis is not None:
                length = stored[origin.axis] if origin.axis < len(stored) else 0
                fits = stored == (*wide[: origin.axis], length, *wide[origin.axis :])
                fits = fits and origin.index < length
            if origin.rows is not None:
                fits = stored[1:] == wide[1:] and origin.rows[1] <= stored[0]
            if not fits or (origin.stacked and len(origin.stacked) != shapes[name][0]):
                part = (
                    "" if origin.axis is None else f", layer {origin.index} of axis {origin.axis},"
                )
                part += "" if origin.rows is None else ", rows {} to {},".format(*origin.rows)
                misshapen.append(
                    f"{tensor} {list(stored)}{part} does not give {name}, for which "
                    f"{list(wide)} is expected"
                )
            if dtypes[tensor] != dtypes[origin.tensor]:
                misshapen.append(f"{tensor} is {dtypes[tensor]}, and {origin.tensor} is not")
            mapped = slices[tensor]
            key = (origin.axis, origin.index if origin.axis is not None else 0, origin.rows)
            if key in mapped or any(
                (axis, rows is None) != (origin.axis, origin.rows is None)
                for axis, _, rows in mapped
            ):
                other = mapped.get(key) or next(iter(mapped.values()))
                raise CheckpointError(
                    f"{source}: duplicate mapping: {tensor} is both {other} and {name}"
                )
            mapped[key] = name
    refuse(misshapen, wrong_model)
    unmapped = []
    for name, mapped in slices.items():
        stored, (axis, _, rows) = tensors[name].shape, next(iter(mapped))
        if axis is not None and len(mapped) != stored[axis]:
            unmapped.append(f"{name} stacks {stored[axis]} layers, the model has {len(mapped)}")
        joined = sum(end - first for _, _, (first, end) in mapped) if rows is not None else 0
        if rows is not None and joined != stored[0]:
            unmapped.append(f"{name} joins {stored[0]} rows, the model has {joined}")
    refuse(unmapped, wrong_model)
