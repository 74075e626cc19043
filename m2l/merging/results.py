"""What a merge writes: blocks into files of full size, in any order, and the description after."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from m2l import checkpoints
from m2l.checkpoints import Extents, Manifest, safetensors
from m2l.errors import CheckpointError
from m2l.merging.passes import Span
from m2l.merging.sources import HUGGINGFACE, Source

_READ = 1 << 20

# Beside the weights, what a Hugging Face directory is made of.
_COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip


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
    reference: Source, dtype: str, merged: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """name -> (shape, dtype) of the result's parameters: real numbers get the recipe's dtype."""
    real = np.dtype(jnp.dtype(dtype))
    merged = set(merged)
    return {
        name: (
            tuple(stored.shape),
            real if name in merged or is_float(stored.dtype) else stored.dtype,
        )
        for name, stored in reference.parameters.items()
    }


def is_float(dtype: Any) -> bool:
    """Whether a dtype holds real numbers: others are copied, not merged."""
    return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


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
    dtype: str,
    made_by: Mapping[str, Any],
    parents: tuple[Mapping[str, str], ...],
) -> Manifest:
    """Writes what makes a Hugging Face directory of the files: all but weights is `like`'s."""
    from m2l.checkpoints.huggingface_card import write_card

    directory = like.path if like.path.is_dir() else like.path.parent
    for name in _COPIED:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, result.directory / name)
    model = dict(like.model)
    if model:
        key = "dtype" if "dtype" in model else "torch_dtype"
        model[key] = dtype
        text = json.dumps(model, indent=2) + "\n"
        (result.directory / "config.json").write_text(text)
    manifest = Manifest(
        model=model,
        vocabulary={"name": None, "size": model.get("vocab_size"), "fingerprint": like.tokenizer},
        dtype=dtype,
        step=0,
        made_by=dict(made_by),
        parents=tuple(parents),
        parameters={
            name: {"shape": list(shape), "dtype": found.name, "digest": digests[name]}
            for name, (shape, found) in result.described.items()
        },
    )
    manifest.write(result.directory)
    (result.directory / "manifest.json").rename(result.directory / "m2l_manifest.json")
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
