"""What a merge writes: blocks into files of full size, in any order, and the description after."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from m2l import checkpoints
from m2l.checkpoints import Extents, Manifest, huggingface_directory, recorded, safetensors
from m2l.checkpoints.tensor_kinds import is_buffer, is_float
from m2l.errors import CheckpointError
from m2l.merging.compatibility import Roles
from m2l.merging.passes import Span
from m2l.merging.sources import HUGGINGFACE, Source

_READ = 1 << 20


@dataclasses.dataclass(frozen=True)
class Result:
    """The files of a merge, before they are published.

    Attributes:
        directory: Where they are.
        format: "orbax" or "huggingface".
        described: name -> (shape, dtype) of every parameter.
        extents: Where its elements lie.
    """

    directory: Path
    format: str
    described: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    extents: Mapping[str, Extents]

    def write(self, span: Span, block: np.ndarray) -> int:
        """Writes the elements of a span; returns their checksum."""
        self.extents[span.name].write_from(block, span.start)
        return _checksum(block)

    def verify(self, name: str, parts: Sequence[tuple[Span, int]]) -> str:
        """Reads a parameter again and compares it with the checksums of its spans.

        Returns:
            Its SHA-256, in hex.

        Raises:
            CheckpointError: The files do not hold what was written.
        """
        extents, digest = self.extents[name], hashlib.sha256()
        buffer = np.empty(min(_READ, max(1, extents.size)), extents.dtype)
        for span, wanted in parts:
            found = 0
            for start in range(span.start, span.stop, _READ):
                part = buffer[: min(_READ, span.stop - start)]
                extents.read_into(part, start)
                found = (found + _checksum(part)) % 2**64
                digest.update(part.view(np.uint8))
            if found != wanted:
                raise CheckpointError(
                    f"{self.directory}: {name} was written but reads differently from {span.start} "
                    "on: the disk is failing; choose another --out"
                )
        return digest.hexdigest()


def _checksum(block: np.ndarray) -> int:
    """The sum of a block's 64-bit words: fast, and tells bytes that are missing or elsewhere."""
    data = block.view(np.uint8)
    whole = data.size // 8 * 8
    words = int(data[:whole].view(np.uint64).sum(dtype=np.uint64))
    return (words + int.from_bytes(data[whole:].tobytes(), "little")) % 2**64


def described(
    reference: Source, dtype: str, roles: Roles
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """name -> (shape, dtype) of the result's tensors.

    What is merged gets the recipe's dtype, as does what is excluded of real numbers; buffers keep
    theirs.
    """
    real = np.dtype(jnp.dtype(dtype))

    def copied_dtype(name: str, source: Source) -> np.dtype:
        stored = source.parameters[name]
        keeps = source.native and is_buffer(name, stored)
        return real if is_float(stored.dtype) and not keeps else stored.dtype

    dtypes = dict.fromkeys(roles.merged, real)
    dtypes |= {name: copied_dtype(name, source) for name, source in roles.copied.items()}
    shapes = {name: tuple(source.parameters[name].shape) for name, source in roles.copied.items()}
    shapes |= {name: tuple(reference.parameters[name].shape) for name in roles.merged}
    for name, original in roles.repeated.items():
        shapes[name], dtypes[name] = shapes[original], dtypes[original]
    order = [*(name for name in reference.parameters if name in shapes), *shapes]
    return {name: (shapes[name], dtypes[name]) for name in dict.fromkeys(order)}


def create(
    directory: Path,
    format: str,
    described: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    shard_size: int,
) -> Result:
    """Makes the files in full size; made again, they keep what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    if format == HUGGINGFACE:
        shards = safetensors.plan_shards(described, shard_size)
        extents = safetensors.create(directory, described, shards)
    else:
        extents = checkpoints.create(directory, described)
    return Result(directory, format, described, extents)


def nbytes(described: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    """The bytes of the elements."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values())


def describe_checkpoint(
    result: Result,
    final: Path,
    digests: Mapping[str, str],
    *,
    model: Mapping[str, Any],
    vocabulary: Mapping[str, Any],
    made_by: Mapping[str, Any],
    parents: tuple[Mapping[str, str], ...],
) -> Manifest:
    """Writes what makes an m2l checkpoint of the files."""
    return checkpoints.describe(
        result.directory,
        final,
        result.described,
        digests,
        model=model,
        vocabulary=vocabulary,
        made_by=made_by,
        parents=parents,
    )


def describe_directory(
    result: Result,
    final: Path,
    digests: Mapping[str, str],
    *,
    like: Source,
    others: Sequence[Source],
    dtype: str,
    made_by: Mapping[str, Any],
    parents: tuple[Mapping[str, str], ...],
) -> Manifest:
    """Writes what makes a Hugging Face directory of the files.

    All but weights is `like`'s, and of what it lacks the first of the others' that has it.
    """
    from m2l.checkpoints.huggingface_card import write_card

    huggingface_directory.copy_companions(
        [like.path, *(source.path for source in others)], result.directory
    )
    model = huggingface_directory.config_of([like.model, *(source.model for source in others)])
    if model:
        key = "dtype" if "dtype" in model else "torch_dtype"
        model[key] = dtype
        text = json.dumps(model, indent=2) + "\n"
        (result.directory / "config.json").write_text(text)
    manifest = Manifest(
        model=model,
        vocabulary={"name": None, "size": model.get("vocab_size"), "fingerprint": None},
        dtype=dtype,
        step=0,
        made_by=dict(made_by),
        parents=tuple(parents),
        parameters={
            name: {"shape": list(shape), "dtype": found.name, "digest": digests[name]}
            for name, (shape, found) in result.described.items()
        },
    )
    manifest = recorded.write(result.directory, manifest, digests)
    kinds = " ".join(model.get("architectures") or ())
    known = "ForCausalLM" in kinds or "ForConditionalGeneration" in kinds
    write_card(
        result.directory,
        final.name,
        model.get("model_type", "safetensors"),
        manifest,
        dtype,
        generates="ForCausalLM" in kinds if known else None,
    )
    return manifest
